//! The conformance suite on the simulated platforms.

use std::process::ExitCode;
use vm_accel_conformance::{Backend, CONFORMANCE, main as run};

/// The library's backends on simulators. Names begin with `sim-`.
const SIMULATED: &[Backend] = &[];

fn main() -> ExitCode {
    run(&CONFORMANCE, SIMULATED)
}
