//! Why a machine cannot be built. What ends a running one is an [`Outcome`](crate::control::Outcome).

use vm_accel::AccelError;

use crate::boot::BootError;
use crate::bus::BusError;

/// Why a machine cannot be built.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MachineError {
    /// The board cannot have this much RAM.
    #[error("a machine with {size} bytes of memory cannot be built: {rule}")]
    Memory {
        /// What was asked for, in bytes.
        size: u64,
        /// The rule that it breaks.
        rule: String,
    },
    /// The board or the accelerator cannot have this many CPUs.
    #[error("a machine with {count} CPUs cannot be built: from 1 to {most} are possible here")]
    Cpus {
        /// What was asked for.
        count: u32,
        /// The most that is possible.
        most: u32,
    },
    /// CPUID features belong to x86.
    #[error("CPUID features cannot be masked: the guest is not for x86")]
    NoCpuid,
    /// The guest cannot be put into the machine.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The host has no randomness for the guest.
    #[error("the host gives no random numbers for the guest: {message}")]
    Random {
        /// What the host said.
        message: String,
    },
    /// The device tree cannot be built.
    #[error("the guest's device tree cannot be built: {message}")]
    DeviceTree {
        /// Why.
        message: String,
    },
    /// The accelerator refused a part of the machine.
    #[error("{during}: {source}")]
    Accel {
        /// What was being done.
        during: &'static str,
        /// What the accelerator said.
        source: AccelError,
    },
    /// Two devices of the board are in each other's way: a bug of the board.
    #[error(transparent)]
    Bus(#[from] BusError),
}

impl MachineError {
    /// A closure for `map_err` that says what was being done.
    pub(crate) fn accel(during: &'static str) -> impl Fn(AccelError) -> Self {
        move |source| Self::Accel { during, source }
    }
}
