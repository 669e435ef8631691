//! The backends that a suite runs on, as factories.

use super::watch::Watch;
use super::{Failure, Outcome};
use std::sync::Arc;
use vm_accel::{Accel, AccelKind, Capabilities, IrqChip, PlatformBackend, VcpuResult, probe_kind};

/// A backend that a suite can run on.
#[derive(Debug, Clone, Copy)]
pub struct Backend {
    /// The first part of the names of its tests, and its name in `VM_ACCEL_REQUIRE`.
    pub name: &'static str,
    /// What it can do here, or why it cannot be used.
    pub probe: fn() -> VcpuResult<Capabilities>,
    /// Creates a virtual machine.
    pub create: fn() -> VcpuResult<Box<dyn Accel>>,
    /// vCPUs may move between threads (HVF binds them).
    pub moves_threads: bool,
    /// The host's CPU executes the guest.
    pub native: bool,
    /// The platform has one virtual machine per process (HVF): no two cases on it run at a time.
    pub serial: bool,
}

macro_rules! platform {
    ($name:literal, $kind:ident, moves_threads: $moves_threads:literal, native: $native:literal, serial: $serial:literal) => {
        Backend {
            name: $name,
            probe: || probe_kind(AccelKind::$kind),
            create: || Ok(Box::new(PlatformBackend::new(AccelKind::$kind)?)),
            moves_threads: $moves_threads,
            native: $native,
            serial: $serial,
        }
    };
}

/// Every backend of the library that has vCPUs.
#[rustfmt::skip]
pub const PLATFORM_BACKENDS: &[Backend] = &[
    platform!("kvm", Kvm, moves_threads: true, native: true, serial: false),
    platform!("hvf", Hvf, moves_threads: false, native: true, serial: true),
    platform!("whpx", Whpx, moves_threads: true, native: true, serial: false),
    platform!("soft", Fallback, moves_threads: true, native: false, serial: false),
];

/// What a case gets: the backend on this host.
pub(crate) struct Host {
    pub(crate) backend: Backend,
    pub(crate) caps: Capabilities,
    pub(crate) watch: Arc<Watch>,
}

impl Host {
    /// A virtual machine without anything in it.
    pub(crate) fn vm(&self) -> Outcome<Box<dyn Accel>> {
        (self.backend.create)().map_err(Failure::from)
    }

    /// Runs `case` with each arrangement that has local APICs here.
    pub(crate) fn with_local_apics(&self, mut case: impl FnMut(IrqChip) -> Outcome) -> Outcome {
        let chips = [(self.caps.kernel_irqchip, IrqChip::Kernel), (self.caps.split_irqchip, IrqChip::Split)];
        chips.into_iter().filter(|(is_there, _)| *is_there).try_for_each(|(_, chip)| case(chip))
    }

    /// True until the case's time is over; loops that wait for a guest go on while it is.
    pub(crate) fn in_time(&self) -> bool {
        !self.watch.expired()
    }
}

/// The host's CPU comes out of an emulator: there the platform below the backend lacks what real hardware has. (KVM does
/// not hand the brand string on, so Linux is asked; elsewhere nobody runs this suite in QEMU's TCG.)
pub(crate) fn cpu_is_emulated() -> bool {
    // Arm CPUs have no names: implementer 0 is "software" (Arm ARM, MIDR_EL1), which is TCG's `max`.
    let marks = ["QEMU TCG", "CPU implementer\t: 0x00"];
    std::fs::read_to_string("/proc/cpuinfo").is_ok_and(|text| marks.iter().any(|mark| text.contains(mark)))
}
