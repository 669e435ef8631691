//! Hypervisor.framework of Intel Macs, in software.
//!
//! Each vCPU is a `Cpu` of `vm-accel-softcpu` behind a VMCS. The facade owns the platform's semantics, as Apple's headers,
//! Intel's manual (SDM vol. 3, chapters 25 to 28) and the run loops of QEMU, VirtualBox and hvdos show them:
//!
//! * RIP is never advanced: an exit happens before its instruction, which begins anew with whatever the caller set.
//! * The VMCS is all there is. Control bits must suit the capabilities; a bad guest state fails the entry.
//! * `hv_vcpu_run` also returns for what the kernel handled itself (a host interrupt, the first touch of a mapped page);
//!   `hv_vcpu_run_until` does not.
//! * An EPT violation tells an address and no instruction, and its instruction length is garbage.
//! * Whether `hv_vcpu_interrupt` outside of a run ends the next one is not documented: see [`set_sticky`].
//! * One VM per process, one vCPU per thread, and each vCPU belongs to its thread.
//!
//! It judges its caller, too: calls from another thread, on vCPUs that are gone, with misaligned memory and the like are
//! answered with an error and written down; see [`complaints`].
//!
//! What it does not have: the linear address of an EPT violation (the qualification says that it is not valid), the local APIC of
//! macOS 12, memory that cannot be executed, virtual-8086 mode.

mod api;
mod entry;
mod exits;
mod memory;
mod state;
mod traps;
mod vcpu;
mod vm;

#[cfg(test)]
mod tests;

pub use api::API;

use crate::hostile::{FailurePlan, Mischief};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use vm_accel_sys::hvf::x86_64::HvfX86Api;

/// Calls that are to fail, for the whole process.
pub static FAILURES: FailurePlan = FailurePlan::new();

static SEED: Mutex<Option<u64>> = Mutex::new(None);
static STREAMS: AtomicU64 = AtomicU64::new(0);
static STICKY: AtomicBool = AtomicBool::new(true);
static COMPLAINTS: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// The table of macOS 10.10: no optional function, so the guest runs by `hv_vcpu_run`.
pub static FIRST_RELEASE: HvfX86Api = HvfX86Api {
    hv_capability: None,
    hv_vcpu_run_until: None,
    hv_tsc_clock: None,
    hv_vcpu_set_tsc_relative: None,
    hv_vcpu_enable_managed_msr: None,
    hv_vcpu_set_msr_access: None,
    hv_vmx_get_msr_info: None,
    hv_vmx_vcpu_get_cap_write_vmcs: None,
    hv_vcpu_get_idle_time: None,
    hv_vcpu_vmx_status: None,
    ..API
};

/// Switches the hostile mode on or off for VMs that are created from now on.
pub fn set_hostile(seed: Option<u64>) {
    *lock(&SEED) = seed;
    STREAMS.store(0, Ordering::Relaxed);
}

/// Whether `hv_vcpu_interrupt` on a vCPU that does not run ends its next run (as measured on macOS 14) or has no effect (as QEMU's
/// authors saw it in 2020).
pub fn set_sticky(sticky: bool) {
    STICKY.store(sticky, Ordering::Relaxed);
}

/// The next run of any vCPU leaves with this reason and nothing else, once: for reasons that nobody knows.
pub fn set_next_exit(reason: u32) {
    vm::set_next_exit(reason);
}

/// Takes what the callers did wrong so far.
#[must_use]
pub fn complaints() -> Vec<String> {
    std::mem::take(&mut *lock(&COMPLAINTS))
}

/// How many vCPUs exist: none, where nothing leaks. `None` without a VM.
#[must_use]
pub fn live_vcpus() -> Option<usize> {
    vm::current().map(|vm| lock(&vm.vcpus).len())
}

/// What the kernel does when a process ends: the VM is gone with all its vCPUs, however they were left.
pub fn end_process() {
    vm::forget();
}

/// Switches every knob back. VMs stay.
pub fn reset() {
    set_hostile(None);
    set_sticky(true);
    FAILURES.set(None);
    drop(complaints());
}

fn complain(what: impl Into<String>) {
    lock(&COMPLAINTS).push(what.into());
}

/// A stream of decisions of its own.
fn mischief() -> Mischief {
    let stream = STREAMS.fetch_add(1, Ordering::Relaxed);
    Mischief::new(lock(&SEED).map(|seed| seed ^ stream.wrapping_mul(0xd134_2543_de82_ef95)))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Whatever is under these locks is consistent at every moment.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
