//! How a machine comes to its end: the latch into which devices, vCPU threads and the host put why it stops.
//!
//! The first reason wins and the others are dropped: a guest that powers off on one CPU while another
//! triple-faults has powered off. Nothing here knows vCPUs; whoever waits on the latch kicks them.

use std::fmt;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use vm_accel::AccelError;

/// Why a machine ended.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Outcome {
    /// The guest switched the machine off.
    Shutdown,
    /// The guest asked for a reset.
    Reset,
    /// The guest wrote this value to the exit port.
    ExitPort(u32),
    /// A vCPU met a fault while it delivered a double fault; a PC resets then.
    TripleFault {
        /// The vCPU.
        cpu: u32,
    },
    /// The guest reported to the platform that it crashed.
    Crash {
        /// The vCPU that did.
        cpu: u32,
    },
    /// The time limit of the run has passed.
    Timeout,
    /// The host asked for it.
    Stopped,
    /// The machine cannot go on.
    Failed(Failure),
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Shutdown => f.write_str("the guest switched the machine off"),
            Self::Reset => f.write_str("the guest asked for a reset"),
            Self::ExitPort(value) => write!(f, "the guest wrote {value:#x} to the exit port"),
            Self::TripleFault { cpu } => write!(f, "triple fault on vCPU {cpu}"),
            Self::Crash { cpu } => write!(f, "the guest reported a crash on vCPU {cpu}"),
            Self::Timeout => f.write_str("the time limit has passed"),
            Self::Stopped => f.write_str("stopped by the host"),
            Self::Failed(failure) => failure.fmt(f),
        }
    }
}

/// Why a machine cannot go on. Says which vCPU, and at which exit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Failure {
    /// The accelerator answered an error.
    #[error("vCPU {cpu}: {during}: {source}")]
    Vcpu {
        /// The vCPU.
        cpu: u32,
        /// What was being done: `run`, or the exit that was being served.
        during: String,
        /// What the accelerator said.
        source: AccelError,
    },
    /// The guest left with an exit that this machine has no answer to.
    #[error("vCPU {cpu}: the guest stopped with an exit that the board does not serve: {exit}")]
    UnexpectedExit {
        /// The vCPU.
        cpu: u32,
        /// The exit.
        exit: String,
    },
    /// All vCPUs are halted for good: there is no interrupt controller that could wake one.
    #[error("vCPU {cpu}: the guest executed HLT and nothing can wake it")]
    HaltedForever {
        /// The vCPU that halted last.
        cpu: u32,
    },
    /// The operating system has no thread for a part of the machine.
    #[error("cannot start the thread {thread}: {message}")]
    Thread {
        /// The thread's name, such as `vcpu0`.
        thread: String,
        /// What the operating system said.
        message: String,
    },
    /// A thread of the machine panicked: a bug of this program.
    #[error("the thread {thread} panicked: {message}")]
    Panicked {
        /// The thread's name, such as `vcpu0`.
        thread: String,
        /// What it said.
        message: String,
    },
    /// The sink of a device refused what the guest wrote.
    #[error("cannot write the guest's output ({device}): {message}")]
    Output {
        /// The device.
        device: &'static str,
        /// What the operating system said.
        message: String,
    },
    /// The accelerator does not take what the board's interrupt lines do.
    #[error("interrupts: {what}: {source}")]
    Interrupt {
        /// The line or the table.
        what: String,
        /// What the accelerator said.
        source: AccelError,
    },
}

#[derive(Debug, Default)]
struct Latch {
    outcome: Mutex<Option<Outcome>>,
    changed: Condvar,
}

/// The latch. Clones are the same latch.
#[derive(Debug, Clone, Default)]
pub struct Control(Arc<Latch>);

impl Control {
    /// A latch with nothing in it.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Ends the machine for `outcome`, unless it has ended already; answers whether this was the first reason.
    ///
    /// Returns at once; the vCPUs leave the guest soon after.
    pub fn finish(&self, outcome: Outcome) -> bool {
        let mut slot = self.0.outcome.lock().unwrap_or_else(PoisonError::into_inner);
        if slot.is_some() {
            return false;
        }
        *slot = Some(outcome);
        self.0.changed.notify_all();
        true
    }

    /// Why the machine ended, if it has.
    #[must_use]
    pub fn outcome(&self) -> Option<Outcome> {
        self.0.outcome.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether the machine has ended.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.0.outcome.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Waits for the end; after `limit` it ends the machine itself with [`Outcome::Timeout`].
    ///
    /// A limit too long for the host's clock is no limit.
    #[must_use]
    pub fn wait(&self, limit: Option<Duration>) -> Outcome {
        let deadline = limit.and_then(|limit| Instant::now().checked_add(limit));
        let mut slot = self.0.outcome.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(outcome) = &*slot {
                return outcome.clone();
            }
            slot = match deadline {
                None => self.0.changed.wait(slot).unwrap_or_else(PoisonError::into_inner),
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        *slot = Some(Outcome::Timeout);
                        self.0.changed.notify_all();
                        continue;
                    }
                    self.0.changed.wait_timeout(slot, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_reason_wins() {
        let control = Control::new();
        assert!(!control.is_finished());
        assert!(control.finish(Outcome::Shutdown));
        assert!(!control.clone().finish(Outcome::Reset));
        assert_eq!(control.outcome(), Some(Outcome::Shutdown));
        assert_eq!(control.wait(Some(Duration::ZERO)), Outcome::Shutdown);
    }

    #[test]
    fn a_limit_that_passes_is_a_reason_too() {
        let control = Control::new();
        assert_eq!(control.wait(Some(Duration::ZERO)), Outcome::Timeout);
        assert!(!control.finish(Outcome::Shutdown));
    }

    #[test]
    fn a_waiter_is_woken_from_another_thread() {
        let control = Control::new();
        let other = control.clone();
        let waiter = std::thread::spawn(move || other.wait(Some(Duration::MAX)));
        control.finish(Outcome::Stopped);
        assert_eq!(waiter.join().unwrap(), Outcome::Stopped);
    }
}
