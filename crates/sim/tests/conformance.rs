//! The conformance suite on the simulated platforms.

use std::process::ExitCode;
use vm_accel::platform::hvf;
use vm_accel_conformance::{Backend, CONFORMANCE, main as run};
use vm_accel_sim::hvf_x86;

/// The library's backends on simulators. Names begin with `sim-`.
const SIMULATED: &[Backend] = &[
    Backend {
        name: "sim-hvf-x86",
        probe: || hvf::x86_64::AccelHvf::probe_with(&hvf_x86::API),
        create: || Ok(Box::new(hvf::x86_64::AccelHvf::with_api(&hvf_x86::API)?)),
        moves_threads: false,
        native: false,
        serial: true,
    },
    Backend {
        name: "sim-hvf-x86-first-release",
        probe: || hvf::x86_64::AccelHvf::probe_with(&hvf_x86::FIRST_RELEASE),
        create: || Ok(Box::new(hvf::x86_64::AccelHvf::with_api(&hvf_x86::FIRST_RELEASE)?)),
        moves_threads: false,
        native: false,
        serial: true,
    },
];

fn main() -> ExitCode {
    run(&CONFORMANCE, SIMULATED)
}
