//! The suite's guests on the host's KVM and on the software CPU, step for step.

use std::process::ExitCode;
use vm_accel_conformance::{LOCKSTEP, LOCKSTEP_BACKENDS, main as run};

fn main() -> ExitCode {
    run(&LOCKSTEP, LOCKSTEP_BACKENDS)
}
