//! Setting an event where HANDLEs are ours.

use super::SimEvent;
use std::sync::atomic::Ordering;

/// Sets the event.
pub(in crate::whpx) fn signal(handle: usize) {
    // SAFETY: whoever registers an event promises that the handle is that of a `SimEvent` which lives until it is
    // unregistered.
    let event = unsafe { &*(handle as *const SimEvent) };
    event.count.fetch_add(1, Ordering::Release);
}
