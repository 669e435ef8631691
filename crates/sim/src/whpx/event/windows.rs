//! Setting an event of Windows.

use windows_sys::Win32::System::Threading::SetEvent;

/// Sets the event.
pub(in crate::whpx) fn signal(handle: usize) {
    // SAFETY: whoever registers an event promises that the handle is open until it is unregistered.
    unsafe { SetEvent(handle as _) };
}
