//! The Windows Hypervisor Platform for arm64 guests, in software.
//!
//! Each virtual processor is the interpreter of `crate::a64`, at EL1, below a hypervisor that has a GICv3, the virtual timer and
//! PSCI. The facade owns the platform's semantics, as Microsoft's headers and documentation and the run loops of openvmm and QEMU
//! show them:
//!
//! * The GIC must be configured before the set-up, and the redistributor's address set before a processor runs.
//! * The program counter is never advanced for what leaves. The exit's header says where it stands; what the register holds is
//!   undefined in the hostile mode.
//! * An abort leaves with its syndrome, which tells what simple loads and stores do and nothing of the others.
//! * WFI and PSCI do not leave; SYSTEM_OFF and SYSTEM_RESET do, and calls that are nobody's, if the partition asks for them.
//! * Feature registers are the partition's: `WHV_ANY_VP` alone reaches them.
//! * A cancellation is sticky, though nobody documents it: in the hostile mode one that meets no run may be lost.
//! * Mappings replace what was there. Everything undefined holds garbage.
//!
//! It judges its caller, too. What would corrupt memory or use freed memory on Windows (a misaligned array, a call on a
//! partition that was deleted, a cancellation that overlaps the deletion) ends the process with a message here.

mod api;
mod exit;
mod memory;
mod partition;
mod psci;
mod registers;
mod vp;

#[cfg(test)]
mod tests;

pub use api::{API, first_release};

use crate::hostile::{FailurePlan, Mischief};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use vm_accel_sys::whpx::HRESULT;

/// Calls that are to fail, for the whole process.
pub static FAILURES: FailurePlan = FailurePlan::new();

static SEED: Mutex<Option<u64>> = Mutex::new(None);
static STREAMS: AtomicU64 = AtomicU64::new(0);
static PRESENT: AtomicBool = AtomicBool::new(true);
static RELEASED: AtomicBool = AtomicBool::new(true);
static FIXED_FEATURES: AtomicBool = AtomicBool::new(false);
/// One more than the reason; 0 for none.
static FORCED: AtomicU64 = AtomicU64::new(0);

/// Switches the hostile mode on or off for partitions that are created from now on.
pub fn set_hostile(seed: Option<u64>) {
    *lock(&SEED) = seed;
    STREAMS.store(0, Ordering::Relaxed);
}

/// What `WHvCapabilityCodeHypervisorPresent` answers: false is a Windows on which the library is there and the hypervisor is not.
pub fn set_hypervisor_present(present: bool) {
    PRESENT.store(present, Ordering::Relaxed);
}

/// Whether `Features.Arm64Support` is set: false is a Windows before build 26100.3915.
pub fn set_released(released: bool) {
    RELEASED.store(released, Ordering::Relaxed);
}

/// Whether feature registers refuse to be written.
pub fn set_fixed_features(fixed: bool) {
    FIXED_FEATURES.store(fixed, Ordering::Relaxed);
}

/// Makes the next run end at once for this reason, whatever it is: what a newer platform may have. Its payload is garbage.
pub fn leave_once_with(reason: u32) {
    FORCED.store(u64::from(reason) + 1, Ordering::Relaxed);
}

/// How many partitions exist: none, where nothing leaks.
#[must_use]
pub fn live_partitions() -> usize {
    partition::live()
}

/// Switches every knob back. Partitions stay.
pub fn reset() {
    set_hostile(None);
    set_hypervisor_present(true);
    set_released(true);
    set_fixed_features(false);
    FORCED.store(0, Ordering::Relaxed);
    FAILURES.set(None);
}

/// How a call ends that does not succeed.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Stop {
    /// The platform's code.
    Code(HRESULT),
    /// The caller broke a rule whose breach the platform does not answer but suffers from.
    Misuse(String),
}

/// What a call answers.
type Answer<T = ()> = Result<T, Stop>;

/// Shorthand for an error code.
fn code<T>(code: HRESULT) -> Answer<T> {
    Err(Stop::Code(code))
}

/// Shorthand for a breach.
fn misuse<T>(what: impl Into<String>) -> Answer<T> {
    Err(Stop::Misuse(what.into()))
}

/// A stream of decisions of its own.
fn mischief() -> Mischief {
    let stream = STREAMS.fetch_add(1, Ordering::Relaxed);
    Mischief::new(lock(&SEED).map(|seed| seed ^ stream.wrapping_mul(0xd134_2543_de82_ef95)))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic in here ends the process anyway.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
