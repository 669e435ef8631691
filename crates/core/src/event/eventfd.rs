//! Events on Linux: eventfd(2), non-blocking, with poll(2) to wait.

use super::HostEvent;
use crate::error::{AccelError, VcpuResult};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::Instant;

#[derive(Debug)]
pub(super) struct Event(OwnedFd);

impl Event {
    pub(super) fn new() -> VcpuResult<Self> {
        // SAFETY: eventfd takes no pointers.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(AccelError::host("eventfd", &io::Error::last_os_error()));
        }
        // SAFETY: the kernel just gave us this descriptor, and nobody else has it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    pub(super) fn signal(&self) -> VcpuResult<()> {
        let one = 1u64.to_ne_bytes();
        loop {
            // SAFETY: the descriptor is open and the buffer has the eight bytes that are written.
            if unsafe { libc::write(self.0.as_raw_fd(), one.as_ptr().cast(), one.len()) } >= 0 {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            match error.kind() {
                io::ErrorKind::Interrupted => {}
                // The counter is full: whoever waits wakes up anyway.
                io::ErrorKind::WouldBlock => return Ok(()),
                _ => return Err(AccelError::host("write to an eventfd", &error)),
            }
        }
    }

    pub(super) fn try_take(&self) -> VcpuResult<Option<u64>> {
        let mut count = [0; 8];
        loop {
            // SAFETY: the descriptor is open and the buffer has room for the eight bytes that are read.
            if unsafe { libc::read(self.0.as_raw_fd(), count.as_mut_ptr().cast(), count.len()) } >= 0 {
                return Ok(Some(u64::from_ne_bytes(count)));
            }
            let error = io::Error::last_os_error();
            match error.kind() {
                io::ErrorKind::Interrupted => {}
                io::ErrorKind::WouldBlock => return Ok(None),
                _ => return Err(AccelError::host("read from an eventfd", &error)),
            }
        }
    }

    /// Waits until signals come or the deadline passes.
    pub(super) fn take_before(&self, deadline: Option<Instant>) -> VcpuResult<Option<u64>> {
        loop {
            // Another waiter may have been faster since poll returned, so taking may find nothing again.
            if let Some(count) = self.try_take()? {
                return Ok(Some(count));
            }
            let timeout = match deadline.map(|deadline| deadline.saturating_duration_since(Instant::now())) {
                None => -1,
                Some(rest) if rest.is_zero() => return Ok(None),
                // Rounded up, so as not to spin in the last millisecond; longer waits take several rounds.
                Some(rest) => i32::try_from(rest.as_millis().saturating_add(1)).unwrap_or(i32::MAX),
            };
            let mut poll = libc::pollfd { fd: self.0.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one entry, as stated, that lives through the call.
            if unsafe { libc::poll(&mut poll, 1, timeout) } < 0 {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(AccelError::host("poll of an eventfd", &error));
                }
            }
        }
    }
}

impl AsFd for HostEvent {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.0.as_fd()
    }
}

impl AsRawFd for HostEvent {
    fn as_raw_fd(&self) -> RawFd {
        self.0.0.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_counter_still_wakes_and_never_blocks() {
        let event = HostEvent::new().unwrap();
        let most = (u64::MAX - 1).to_ne_bytes();
        // SAFETY: the descriptor is open and the buffer has eight bytes.
        let written = unsafe { libc::write(event.as_raw_fd(), most.as_ptr().cast(), most.len()) };
        assert_eq!(written, 8);
        event.signal().unwrap();
        assert_eq!(event.wait().unwrap(), u64::MAX - 1);
    }
}
