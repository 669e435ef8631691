//! The kick stress suite on the backends of this host.

use std::process::ExitCode;
use vm_accel_conformance::{KICK_STRESS, PLATFORM_BACKENDS, main as run};

fn main() -> ExitCode {
    run(&KICK_STRESS, PLATFORM_BACKENDS)
}
