//! Events behind HANDLEs: Windows' own there, an object of ours elsewhere.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use vm_accel_sys::whpx::HANDLE;

#[cfg(not(windows))]
mod here;
#[cfg(windows)]
mod windows;
#[cfg(not(windows))]
pub(super) use here::signal;
#[cfg(windows)]
pub(super) use windows::signal;

/// What a HANDLE of an event points to where there is no Windows: it counts how often it was set.
#[derive(Debug, Default)]
pub struct SimEvent {
    count: AtomicU64,
}

impl SimEvent {
    /// A new event. It must outlive its registration, as a HANDLE must not be closed before.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// The HANDLE to register.
    #[must_use]
    pub fn handle(self: &Arc<Self>) -> HANDLE {
        Arc::as_ptr(self).cast_mut().cast()
    }

    /// How often it was set.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::Acquire)
    }
}
