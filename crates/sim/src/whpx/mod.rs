//! The Windows Hypervisor Platform for x86-64 guests, in software.
//!
//! Each virtual processor is a `Cpu` of `vm-accel-softcpu`; the facade around it owns the platform's semantics, as Microsoft's
//! documentation and the run loops of openvmm, QEMU, crosvm and hyperlight show them:
//!
//! * RIP is never advanced for an access that leaves; the next run starts the instruction anew with whatever the caller set. After
//!   HLT it is already behind.
//! * A cancellation is sticky. Mappings replace what was there. Properties are fixed by the set-up, but four.
//! * Everything undefined holds garbage: unused bytes of an exit's payload, RIP after HLT, the virtual address of a fault.
//!
//! It judges its caller, too. What would corrupt memory or use freed memory on Windows (a misaligned array, a call on a
//! partition that was deleted, a cancellation that overlaps the deletion) ends the process with a message here.
//!
//! [`API`] is the table of a current Windows, [`first_release`] that of Windows 10 1803. Everything is also exported under
//! the platform's names, so that a library made of this crate can stand in for `WinHvPlatform.dll`.

#![allow(non_upper_case_globals, reason = "constants have the platform's names")]

mod apic;
mod bus;
mod calls;
mod capability;
mod event;
mod exit;
mod export;
mod memory;
mod partition;
mod registers;
mod vp;

#[cfg(test)]
mod tests;

pub use event::SimEvent;
pub use export::*;

use crate::hostile::{FailurePlan, Mischief};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};
use vm_accel_sys::whpx::HRESULT;
use vm_accel_sys::whpx::x86_64::WhpApi;

/// Calls that are to fail, for the whole process.
pub static FAILURES: FailurePlan = FailurePlan::new();

static SEED: Mutex<Option<u64>> = Mutex::new(None);
static STREAMS: AtomicU64 = AtomicU64::new(0);
static PRESENT: AtomicBool = AtomicBool::new(true);
static FORCED: AtomicI32 = AtomicI32::new(0);

/// Switches the hostile mode on or off for partitions that are created from now on.
pub fn set_hostile(seed: Option<u64>) {
    *lock(&SEED) = seed;
    STREAMS.store(0, Ordering::Relaxed);
}

/// What `WHvCapabilityCodeHypervisorPresent` answers: false is a Windows on which the library is there and the hypervisor is not.
pub fn set_hypervisor_present(present: bool) {
    PRESENT.store(present, Ordering::Relaxed);
}

/// Makes the next run end at once for this reason, whatever it is: what a newer platform may have. Its payload is garbage.
pub fn leave_once_with(reason: i32) {
    FORCED.store(reason, Ordering::Relaxed);
}

/// How many partitions exist: none, where nothing leaks.
#[must_use]
pub fn live_partitions() -> usize {
    partition::live()
}

/// The table of Windows 10 1803: no optional function.
#[must_use]
pub fn first_release() -> &'static WhpApi {
    without(WhpApi::OPTIONAL)
}

/// Hostile from the start, where the simulator is a library that a program loads: nobody is there to call `set_hostile`.
const SEED_VARIABLE: &str = "VM_ACCEL_SIM_SEED";

/// The table of Windows 10 1809: with the extended state and the dirty log, without everything newer.
#[must_use]
pub fn windows_1809() -> &'static WhpApi {
    static TABLE: LazyLock<WhpApi> = LazyLock::new(|| WhpApi {
        WHvGetVirtualProcessorXsaveState: API.WHvGetVirtualProcessorXsaveState,
        WHvSetVirtualProcessorXsaveState: API.WHvSetVirtualProcessorXsaveState,
        WHvQueryGpaRangeDirtyBitmap: API.WHvQueryGpaRangeDirtyBitmap,
        WHvRequestInterrupt: API.WHvRequestInterrupt,
        ..*first_release()
    });
    &TABLE
}

/// The table of builds on which HLT does not leave although nobody emulates the local APIC: the processor stays inside until it
/// is cancelled or an event ends HLT (what QEMU's developers saw from 19043.1526 on).
#[must_use]
pub fn without_halt_exits() -> &'static WhpApi {
    static TABLE: WhpApi = WhpApi { WHvCreatePartition: export::create_without_halt_exits, ..API };
    &TABLE
}

/// A stream of decisions of its own.
fn mischief() -> Mischief {
    static FROM_ENVIRONMENT: LazyLock<Option<u64>> = LazyLock::new(|| std::env::var(SEED_VARIABLE).ok()?.parse().ok());
    let stream = STREAMS.fetch_add(1, Ordering::Relaxed);
    Mischief::new(lock(&SEED).or(*FROM_ENVIRONMENT).map(|seed| seed ^ stream.wrapping_mul(0xd134_2543_de82_ef95)))
}

/// How a call ends that does not succeed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Stop {
    /// The platform's code.
    Code(HRESULT),
    /// The caller broke a rule whose breach the platform does not answer but suffers from.
    Misuse(String),
}

/// What a call answers.
pub(crate) type Answer<T = ()> = Result<T, Stop>;

/// Shorthand for an error code.
pub(crate) fn code<T>(code: HRESULT) -> Answer<T> {
    Err(Stop::Code(code))
}

/// Shorthand for a breach.
pub(crate) fn misuse<T>(what: impl Into<String>) -> Answer<T> {
    Err(Stop::Misuse(what.into()))
}

/// The frame of every function: the failure plan first, then the call.
fn answer(function: &'static str, call: impl FnOnce() -> Answer) -> HRESULT {
    if let Some(code) = FAILURES.check(function) {
        return code;
    }
    match call() {
        Ok(()) => 0,
        Err(Stop::Code(code)) => code,
        // The caller is across a C interface: the panic ends the process, after the message.
        Err(Stop::Misuse(what)) => panic!("{function}: misuse of the platform: {what}"),
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic in here ends the process anyway.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
