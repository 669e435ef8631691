//! What the backends of [`vm-accel`](https://docs.rs/vm-accel) share, and a new one may build on.
//!
//! Platforms differ in what an exit leaves undone. [`x86`] has one vCPU for all that hand x86-64 instructions over
//! unfinished: the instruction emulator, the completion protocol and the local APIC are the same everywhere, and a platform's
//! part is to enter the guest and to move registers. [`aarch64_access`] does the same for the loads and stores that an
//! arm64 CPU reports without a syndrome. The rest is what stands around them: memory mappings ([`slots`]), calls to a
//! vCPU inside the guest ([`gate`]), debug registers ([`x86_debug`], [`aarch64_debug`]).
//!
//! Nothing here knows a platform or calls one; `vm-accel` has those. This interface serves backends, and follows their
//! needs from version to version more freely than `vm-accel`'s own.

pub mod aarch64_access;
pub mod aarch64_debug;
pub mod gate;
pub mod slots;
mod soft_apic;
pub mod x86;
pub mod x86_debug;

#[doc(hidden)] // For `impl_accel!`.
pub use vm_accel_core;

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Takes a lock under which everything is consistent at every moment, so that a panic of another holder means nothing.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
