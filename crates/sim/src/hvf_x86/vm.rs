//! The one VM of the process.

use super::memory::Memory;
use super::vcpu::Vcpu;
use super::{complain, lock, mischief};
use crate::hostile::Mischief;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::time::Instant;
use vm_accel_sys::hvf::{HvReturn, code};

/// `HV_CAP_VCPUMAX`.
pub(super) const MAX_VCPUS: u32 = 64;
/// Frequency of the guests' time-stamp counter.
pub(super) const TSC_HZ: u64 = 1_000_000_000;

static VM: Mutex<Option<Arc<Vm>>> = Mutex::new(None);
/// One more than the reason; 0 for none.
static NEXT_EXIT: AtomicU64 = AtomicU64::new(0);

pub(super) struct Vm {
    pub(super) memory: Arc<Memory>,
    pub(super) vcpus: Mutex<BTreeMap<u32, Arc<Vcpu>>>,
    /// Held for reading by vCPUs inside the guest: a mapping must not be seen while it is being replaced.
    pub(super) gate: RwLock<()>,
    /// Counts changes of mappings: what was touched before must be touched anew.
    pub(super) layout: AtomicU32,
    /// The value that was asked for, when that was, and how often it was.
    pub(super) tsc: Mutex<(u64, Option<Instant>, u32)>,
    pub(super) start: Instant,
    pub(super) mischief: Mutex<Mischief>,
}

pub(super) fn current() -> Option<Arc<Vm>> {
    lock(&VM).clone()
}

pub(super) fn set_next_exit(reason: u32) {
    NEXT_EXIT.store(u64::from(reason) + 1, Ordering::Relaxed);
}

pub(super) fn take_next_exit() -> Option<u32> {
    (NEXT_EXIT.swap(0, Ordering::Relaxed) as u32).checked_sub(1)
}

pub(super) fn create() -> Result<(), HvReturn> {
    let mut vm = lock(&VM);
    if vm.is_some() {
        return Err(code::BUSY);
    }
    *vm = Some(Arc::new(Vm {
        memory: Arc::new(Memory::new()),
        vcpus: Mutex::default(),
        gate: RwLock::new(()),
        layout: AtomicU32::new(1),
        tsc: Mutex::new((0, None, 0)),
        start: Instant::now(),
        mischief: Mutex::new(mischief()),
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

pub(super) fn forget() {
    *lock(&VM) = None;
}

impl Vm {
    /// Changes guest memory while no vCPU is inside.
    pub(super) fn change_memory(&self, change: impl FnOnce(&Memory) -> Result<(), HvReturn>) -> Result<(), HvReturn> {
        lock(&self.vcpus).values().for_each(|vcpu| vcpu.kick.kick());
        let _alone = self.gate.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        self.layout.fetch_add(1, Ordering::SeqCst);
        change(&self.memory)
    }
}
