//! The conformance suite on the backends of this host.

use std::process::ExitCode;
use vm_accel_conformance::{CONFORMANCE, PLATFORM_BACKENDS, main as run};

fn main() -> ExitCode {
    run(&CONFORMANCE, PLATFORM_BACKENDS)
}
