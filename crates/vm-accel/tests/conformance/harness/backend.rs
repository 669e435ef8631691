//! The backends that the suite runs on, as factories. A new backend, or a simulated platform behind an existing one,
//! joins by one line in [`BACKENDS`].

use super::watch::Watch;
use super::{Failure, Outcome};
use std::sync::Arc;
use vm_accel::{Accel, AccelKind, Capabilities, PlatformBackend, VcpuResult, probe_kind};

/// A backend that the suite knows.
pub(crate) struct Backend {
    /// The first part of the names of its tests, and its name in `VM_ACCEL_REQUIRE`.
    pub(crate) name: &'static str,
    /// What it can do here, or why it cannot be used.
    pub(crate) probe: fn() -> VcpuResult<Capabilities>,
    /// Creates a virtual machine.
    pub(crate) create: fn() -> VcpuResult<Box<dyn Accel>>,
    /// vCPUs may move between threads (HVF binds them).
    pub(crate) moves_threads: bool,
}

macro_rules! platform {
    ($name:literal, $kind:ident, $moves_threads:literal) => {
        Backend {
            name: $name,
            probe: || probe_kind(AccelKind::$kind),
            create: || Ok(Box::new(PlatformBackend::new(AccelKind::$kind)?)),
            moves_threads: $moves_threads,
        }
    };
}

/// Every backend that has vCPUs.
pub(crate) const BACKENDS: &[Backend] = &[
    platform!("kvm", Kvm, true),
    platform!("hvf", Hvf, false),
    platform!("whpx", Whpx, true),
    platform!("soft", Fallback, true),
];

/// What a case gets: the backend on this host.
pub(crate) struct Host {
    pub(crate) backend: &'static Backend,
    pub(crate) caps: Capabilities,
    pub(crate) watch: Arc<Watch>,
}

impl Host {
    /// A virtual machine without anything in it.
    pub(crate) fn vm(&self) -> Outcome<Box<dyn Accel>> {
        (self.backend.create)().map_err(Failure::from)
    }

    /// True until the case's time is over; loops that wait for a guest go on while it is.
    pub(crate) fn in_time(&self) -> bool {
        !self.watch.expired()
    }
}

/// The guest's CPU comes out of an emulator: there the platform below the backend lacks what real hardware has.
pub(crate) fn cpu_is_emulated(backend: &Backend) -> bool {
    let brand = || -> VcpuResult<Vec<u8>> {
        let mut vm = (backend.create)()?;
        let mut vcpu = vm.create_vcpu(0)?;
        if let Some(arm) = vcpu.as_aarch64() {
            // Implementer 0 is "software" (Arm ARM, MIDR_EL1): TCG's `max`.
            let software = arm.get_sys_reg(vm_accel::aarch64::MIDR_EL1)? >> 24 == 0;
            return Ok(if software {
                b"TCG".to_vec()
            } else {
                Vec::new()
            });
        }
        let entries = vcpu
            .as_x86()
            .map_or(Ok(Vec::new()), |x86| x86.supported_cpuid())?;
        Ok(entries
            .iter()
            .filter(|entry| (0x8000_0002..=0x8000_0004).contains(&entry.leaf))
            .flat_map(|entry| [entry.eax, entry.ebx, entry.ecx, entry.edx])
            .flat_map(u32::to_le_bytes)
            .collect())
    };
    brand().is_ok_and(|brand| String::from_utf8_lossy(&brand).contains("TCG"))
}
