//! The library's backends on simulators: what the tests here run on.

use vm_accel::platform::hvf::aarch64::AccelHvf as AccelHvfArm64;
use vm_accel::platform::hvf::x86_64::AccelHvf;
use vm_accel::platform::whpx::aarch64::AccelWhpx as AccelWhpxArm64;
use vm_accel::platform::whpx::x86_64::AccelWhpx;
use vm_accel_conformance::Backend;
use vm_accel_sim::{hvf_arm64, hvf_x86, whpx, whpx_arm64};

/// A simulated platform.
#[derive(Debug)]
pub(crate) struct Platform {
    /// The backend on it.
    pub(crate) backend: Backend,
    /// Switches its hostile mode.
    #[allow(dead_code, reason = "the hostile suite alone reads it")]
    pub(crate) set_hostile: fn(Option<u64>),
}

/// Names begin with `sim-`.
pub(crate) const PLATFORMS: &[Platform] = &[
    Platform {
        backend: Backend {
            name: "sim-whpx",
            probe: || AccelWhpx::probe_with(&whpx::API),
            create: || Ok(Box::new(AccelWhpx::with_api(&whpx::API)?)),
            moves_threads: true,
            native: false,
            serial: false,
        },
        set_hostile: whpx::set_hostile,
    },
    Platform {
        backend: Backend {
            name: "sim-whpx-1809",
            probe: || AccelWhpx::probe_with(whpx::windows_1809()),
            create: || Ok(Box::new(AccelWhpx::with_api(whpx::windows_1809())?)),
            moves_threads: true,
            native: false,
            serial: false,
        },
        set_hostile: whpx::set_hostile,
    },
    Platform {
        backend: Backend {
            name: "sim-whpx-no-hlt-exits",
            probe: || AccelWhpx::probe_with(whpx::without_halt_exits()),
            create: || {
                let mut whpx = AccelWhpx::with_api(whpx::without_halt_exits())?;
                whpx.use_software_apics();
                Ok(Box::new(whpx))
            },
            moves_threads: true,
            native: false,
            serial: false,
        },
        set_hostile: whpx::set_hostile,
    },
    Platform {
        backend: Backend {
            name: "sim-hvf-x86",
            probe: || AccelHvf::probe_with(&hvf_x86::API),
            create: || Ok(Box::new(AccelHvf::with_api(&hvf_x86::API)?)),
            moves_threads: false,
            native: false,
            serial: true,
        },
        set_hostile: hvf_x86::set_hostile,
    },
    Platform {
        backend: Backend {
            name: "sim-hvf-x86-first-release",
            probe: || AccelHvf::probe_with(&hvf_x86::FIRST_RELEASE),
            create: || Ok(Box::new(AccelHvf::with_api(&hvf_x86::FIRST_RELEASE)?)),
            moves_threads: false,
            native: false,
            serial: true,
        },
        set_hostile: hvf_x86::set_hostile,
    },
    Platform {
        backend: Backend {
            name: "sim-hvf-arm64",
            probe: || AccelHvfArm64::probe_with(&hvf_arm64::MACOS_15),
            create: || Ok(Box::new(AccelHvfArm64::with_api(&hvf_arm64::MACOS_15)?)),
            moves_threads: false,
            native: false,
            serial: true,
        },
        set_hostile: hvf_arm64::set_hostile,
    },
    Platform {
        backend: Backend {
            name: "sim-hvf-arm64-first-release",
            probe: || AccelHvfArm64::probe_with(&hvf_arm64::MACOS_11),
            create: || Ok(Box::new(AccelHvfArm64::with_api(&hvf_arm64::MACOS_11)?)),
            moves_threads: false,
            native: false,
            serial: true,
        },
        set_hostile: hvf_arm64::set_hostile,
    },
    Platform {
        backend: Backend {
            name: "sim-whpx-arm64",
            probe: || AccelWhpxArm64::probe_with(&whpx_arm64::API),
            create: || Ok(Box::new(AccelWhpxArm64::with_api(&whpx_arm64::API)?)),
            moves_threads: true,
            native: false,
            serial: false,
        },
        set_hostile: whpx_arm64::set_hostile,
    },
];
