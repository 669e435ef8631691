//! The one VM of the process.

use super::gic::Device;
use super::memory::Memory;
use super::vcpu::Vcpu;
use super::{complain, lock};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Instant;
use vm_accel_sys::hvf::{HvReturn, code};

/// How many vCPUs the platform allows.
pub(super) const MAX_VCPUS: u32 = 64;
/// Width of guest physical addresses unless the VMM asks for more, and at most.
pub(super) const DEFAULT_BITS: u32 = 36;
pub(super) const MOST_BITS: u32 = 40;

static VM: Mutex<Option<Arc<Vm>>> = Mutex::new(None);

pub(super) struct Vm {
    pub(super) memory: Memory,
    pub(super) vcpus: Mutex<BTreeMap<u64, Arc<Vcpu>>>,
    pub(super) gic: OnceLock<Device>,
    /// vCPUs that are in a run.
    pub(super) running: AtomicUsize,
    /// A vCPU was run.
    pub(super) has_run: AtomicBool,
}

pub(super) fn current() -> Option<Arc<Vm>> {
    lock(&VM).clone()
}

pub(super) fn create(bits: u32) -> Result<(), HvReturn> {
    let mut vm = lock(&VM);
    if vm.is_some() {
        return Err(code::BUSY);
    }
    *vm = Some(Arc::new(Vm {
        memory: Memory::new(bits),
        vcpus: Mutex::default(),
        gic: OnceLock::new(),
        running: AtomicUsize::new(0),
        has_run: AtomicBool::new(false),
    }));
    Ok(())
}

pub(super) fn destroy() -> Result<(), HvReturn> {
    let mut vm = lock(&VM);
    let Some(live) = vm.as_ref().map(|vm| lock(&vm.vcpus).len()) else {
        complain("hv_vm_destroy: there is no VM");
        return Err(code::NO_DEVICE);
    };
    if live != 0 {
        complain(format!("hv_vm_destroy: {live} vCPUs are left"));
        return Err(code::BUSY);
    }
    *vm = None;
    Ok(())
}

/// There is no VM any more.
pub(super) fn forget() {
    *lock(&VM) = None;
}

/// `mach_absolute_time`: 24 million ticks per second, since some day before.
pub(super) fn ticks() -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    const BEFORE: u64 = 1 << 44;
    let nanoseconds = START.get_or_init(Instant::now).elapsed().as_nanos();
    BEFORE + (nanoseconds * 3 / 125) as u64
}
