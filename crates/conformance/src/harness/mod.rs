//! What every case stands on: the backends, the runner, and a machine with a guest in it.
//!
//! Nothing in here knows a platform beyond the factory list in [`backend`].

pub(crate) mod backend;
pub(crate) mod machine;
pub(crate) mod runner;
mod watch;

pub(crate) use backend::Host;
pub(crate) use machine::Machine;
pub(crate) use runner::{Case, Exception, Need, Outcome, When};

use std::fmt;
use vm_accel::AccelError;

/// Why a case failed, for those checks that are no `assert!`.
pub(crate) struct Failure(pub(crate) String);

impl From<AccelError> for Failure {
    fn from(error: AccelError) -> Self {
        Self(format!("{error} [{error:?}]"))
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Self(error.to_string())
    }
}

impl fmt::Debug for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Fails the case with a text, as a value.
macro_rules! fail {
    ($($text:tt)*) => { return Err($crate::harness::Failure(format!($($text)*))) };
}
pub(crate) use fail;

/// The list of a theme's cases: each is a function, optionally with what it needs of the backend.
macro_rules! cases {
    ($($name:ident $([$($need:ident),*])?),* $(,)?) => {
        pub(crate) const CASES: &[$crate::harness::Case] = &[$($crate::harness::Case {
            name: stringify!($name),
            needs: &[$($($crate::harness::Need::$need),*)?],
            run: $name,
        }),*];
    };
}
pub(crate) use cases;
