//! [`HostEvent`]: how one host thread wakes another, and how an accelerator's doorbells and interrupt lines are wired.
//!
//! On Linux it is an eventfd, so KVM can signal it (ioeventfd) or be signalled by it (irqfd) without a system call of
//! the VMM. Elsewhere it is a counter with a condition variable. It must never lose a signal nor block in
//! [`HostEvent::signal`].

#[cfg_attr(target_os = "linux", path = "eventfd.rs")]
#[cfg_attr(not(target_os = "linux"), path = "condvar.rs")]
mod event_impl;

use crate::error::VcpuResult;
use std::sync::Arc;
use std::time::Duration;

/// A counter of signals that a thread can wait for. Clones are handles of the same event.
///
/// Signals that come before one is taken add up, and are taken together. Several threads may wait: each signal wakes
/// one or more of them, and one of those takes what is there.
///
/// ```
/// use vm_accel::HostEvent;
///
/// let event = HostEvent::new()?;
/// let doorbell = event.clone();
/// let device = std::thread::spawn(move || doorbell.signal());
/// assert_eq!(event.wait()?, 1);
/// assert_eq!(event.try_take()?, None);
/// # device.join().unwrap()?;
/// # Ok::<(), vm_accel::AccelError>(())
/// ```
#[derive(Debug, Clone)]
pub struct HostEvent(Arc<event_impl::Event>);

impl HostEvent {
    /// A new event without signals.
    ///
    /// # Errors
    /// [`AccelError::Host`](crate::AccelError::Host) if the operating system has no more descriptors.
    pub fn new() -> VcpuResult<Self> {
        Ok(Self(Arc::new(event_impl::Event::new()?)))
    }

    /// Adds a signal. Never blocks: a counter that is full (after 2^64 - 2 signals) stays full.
    ///
    /// # Errors
    /// [`AccelError::Host`](crate::AccelError::Host) if the operating system refuses.
    pub fn signal(&self) -> VcpuResult<()> {
        self.0.signal()
    }

    /// Takes the signals that are there: their number, or `None` if there are none.
    ///
    /// # Errors
    /// [`AccelError::Host`](crate::AccelError::Host) if the operating system refuses.
    pub fn try_take(&self) -> VcpuResult<Option<u64>> {
        self.0.try_take()
    }

    /// Waits until there are signals and takes them: their number, at least 1.
    ///
    /// # Errors
    /// [`AccelError::Host`](crate::AccelError::Host) if the operating system refuses.
    pub fn wait(&self) -> VcpuResult<u64> {
        loop {
            if let Some(count) = self.0.take_before(None)? {
                return Ok(count);
            }
        }
    }

    /// As [`wait`](Self::wait), but no longer than `timeout`; `None` if no signal came. A timeout that ends beyond what
    /// the clock can tell never ends.
    ///
    /// # Errors
    /// [`AccelError::Host`](crate::AccelError::Host) if the operating system refuses.
    pub fn wait_timeout(&self, timeout: Duration) -> VcpuResult<Option<u64>> {
        match std::time::Instant::now().checked_add(timeout) {
            Some(deadline) => self.0.take_before(Some(deadline)),
            None => self.wait().map(Some),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_add_up_and_are_taken_once() {
        let event = HostEvent::new().unwrap();
        assert_eq!(event.try_take().unwrap(), None);
        for _ in 0..3 {
            event.clone().signal().unwrap();
        }
        assert_eq!(event.try_take().unwrap(), Some(3));
        assert_eq!(event.try_take().unwrap(), None);
        event.signal().unwrap();
        assert_eq!(event.wait().unwrap(), 1);
    }

    #[test]
    fn a_wait_without_signal_ends_with_none() {
        let event = HostEvent::new().unwrap();
        assert_eq!(event.wait_timeout(Duration::ZERO).unwrap(), None);
        assert_eq!(event.wait_timeout(Duration::from_micros(100)).unwrap(), None);
        event.signal().unwrap();
        assert_eq!(event.wait_timeout(Duration::ZERO).unwrap(), Some(1));
        event.signal().unwrap();
        assert_eq!(event.wait_timeout(Duration::MAX).unwrap(), Some(1));
    }

    #[test]
    fn no_signal_is_lost_between_threads() {
        const SIGNALS: u64 = 10_000;
        const SENDERS: u64 = 2;
        let event = HostEvent::new().unwrap();
        std::thread::scope(|scope| {
            for _ in 0..SENDERS {
                scope.spawn(|| (0..SIGNALS).for_each(|_| event.signal().unwrap()));
            }
            let mut taken = 0;
            while taken < SENDERS * SIGNALS {
                taken += event.wait().unwrap();
            }
            assert_eq!(taken, SENDERS * SIGNALS);
        });
        assert_eq!(event.try_take().unwrap(), None);
    }
}
