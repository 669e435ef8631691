//! Hypervisor.framework of Apple silicon, in software.
//!
//! Each vCPU is the interpreter of `crate::a64`'s, at EL1. The facade owns the platform's semantics, as Apple's headers and
//! the run loops of openvmm, libkrun, QEMU and uhyve show them:
//!
//! * Exits come in a structure that the platform owns and rewrites. The program counter stands where the architecture puts ELR_EL2:
//!   behind HVC, at everything else.
//! * A data abort has a syndrome for simple loads and stores only; for all others the VMM has to read the instruction.
//! * `hv_vcpus_exit` is sticky, and several coalesce.
//! * Pending interrupts are taken back when a run returns.
//! * The virtual timer leaves once and is masked then, until the VMM unmasks it. It fires only while the vCPU runs.
//! * A new vCPU holds garbage.
//! * One VM per process, one vCPU per thread, and each vCPU belongs to its thread. Memory is mapped in pages of 16 KiB.
//!
//! It judges its caller, too: calls from another thread, on vCPUs that are gone, with misaligned memory and the like are
//! answered with an error and written down; see [`complaints`].
//!
//! * With a GIC (`gic.rs`) interrupts and timers are the platform's; it waits in WFI, or leaves as without one, which Apple does
//!   not tell.
//!
//! Three systems can be had: [`MACOS_11`], which has no optional function, [`MACOS_13`], which tells how wide addresses are, and
//! [`MACOS_15`], which has a GIC.

mod api;
mod exit;
mod gic;
mod memory;
mod vcpu;
mod vm;

pub use api::{MACOS_11, MACOS_13};
pub use gic::MACOS_15;

use crate::hostile::{FailurePlan, Mischief};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Calls that are to fail, for the whole process.
pub static FAILURES: FailurePlan = FailurePlan::new();

static SEED: Mutex<Option<u64>> = Mutex::new(None);
static STREAMS: AtomicU64 = AtomicU64::new(0);
static COMPLAINTS: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Switches the hostile mode on or off for VMs that are created from now on.
pub fn set_hostile(seed: Option<u64>) {
    *lock(&SEED) = seed;
    STREAMS.store(0, Ordering::Relaxed);
}

/// The next run of any vCPU leaves with this reason and nothing else, once: for reasons that nobody knows.
pub fn set_next_exit(reason: u32) {
    vcpu::set_next_exit(reason);
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

/// What the end of the process would do: the VM is gone, whatever is left of it.
pub fn end_process() {
    vm::forget();
}

/// Switches every knob back. VMs stay.
pub fn reset() {
    set_hostile(None);
    vcpu::clear_next_exit();
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
