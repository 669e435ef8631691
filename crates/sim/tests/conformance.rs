//! The conformance suite on the simulated platforms.

mod platforms;

use platforms::PLATFORMS;
use std::process::ExitCode;
use vm_accel_conformance::{CONFORMANCE, main as run};

fn main() -> ExitCode {
    let backends: Vec<_> = PLATFORMS.iter().map(|platform| platform.backend).collect();
    run(&CONFORMANCE, &backends)
}
