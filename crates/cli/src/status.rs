//! The exit statuses of the command, for scripts.

use std::fmt;
use std::process::ExitCode;
use vm_accel_machine::Outcome;

/// Why the command ends, as its exit status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Status {
    /// 0: the guest shut down, the user left with Ctrl-A x, or the command did what it was asked.
    Ok,
    /// 1: the machine could not be built or could not go on.
    Error,
    /// 3: none of the wanted backends can be used here.
    NoBackend,
    /// 32: the guest reset, and `--no-reboot` was given.
    Reset,
    /// 33: triple fault.
    TripleFault,
    /// 34: the guest told the platform that it crashed.
    Crash,
    /// 124: `--timeout` has passed.
    Timeout,
    /// 128 + n: signal n asked the command to end.
    Signal(u8),
    /// Whatever the guest wrote to the exit port, its low eight bits.
    ExitPort(u8),
}

impl Status {
    /// The number.
    pub(crate) fn code(self) -> u8 {
        match self {
            Self::Ok => 0,
            Self::Error => 1,
            Self::NoBackend => 3,
            Self::Reset => 32,
            Self::TripleFault => 33,
            Self::Crash => 34,
            Self::Timeout => 124,
            Self::Signal(signal) => 128 | signal,
            Self::ExitPort(value) => value,
        }
    }

    /// The status of a machine's end.
    pub(crate) fn of_outcome(outcome: &Outcome) -> Self {
        match outcome {
            Outcome::Shutdown | Outcome::Stopped => Self::Ok,
            Outcome::Reset => Self::Reset,
            Outcome::ExitPort(value) => Self::ExitPort(*value as u8),
            Outcome::TripleFault { .. } => Self::TripleFault,
            Outcome::Crash { .. } => Self::Crash,
            Outcome::Timeout => Self::Timeout,
            _ => Self::Error,
        }
    }
}

impl From<Status> for ExitCode {
    fn from(status: Status) -> Self {
        status.code().into()
    }
}

/// None of the wanted backends works; the text says why of each.
#[derive(Debug)]
pub(crate) struct NoBackend(pub(crate) String);

impl fmt::Display for NoBackend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for NoBackend {}

/// The status of an error.
pub(crate) fn of_error(error: &anyhow::Error) -> Status {
    if error.is::<NoBackend>() { Status::NoBackend } else { Status::Error }
}

/// What `--help` says about the statuses.
pub(crate) const HELP: &str = "\
Exit statuses:
  0    the guest shut down, or you left with Ctrl-A x
  1    error: the machine could not be built or could not go on
  2    wrong usage
  3    none of the wanted backends can be used here
  32   the guest reset, with --no-reboot
  33   triple fault
  34   the guest told the platform that it crashed
  124  the time limit has passed
  128+n  signal n ended the command
A guest that writes a value to I/O port 0xf4 ends the machine with that value as the status.";
