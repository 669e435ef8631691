//! The backends, and [`PlatformBackend`] which is one virtual machine on any of them.
//!
//! `cfg` stands here, at the variants and `mod` lines, and nowhere inside a backend's bodies.

pub mod fallback;
#[cfg(any(hvf_x86_64, hvf_aarch64))]
pub mod hvf;
#[cfg(kvm)]
pub mod kvm;
#[cfg(vz)]
pub mod vz;

use vm_accel_backend::x86::software_capabilities;
use vm_accel_core::accel::{
    Accel, AccelKind, Capabilities, IoEventMatch, IrqChip, IrqHandle, IrqTarget, MemoryFlags, MsiMessage, ProbeReport,
};
use vm_accel_core::error::{AccelError, UnavailableReason, VcpuResult};
use vm_accel_core::event::HostEvent;
use vm_accel_core::memory::{DirtyBitmap, GuestRegion};
use vm_accel_core::regs::aarch64::{Aarch64Features, Gic, GicState};
use vm_accel_core::vcpu_common::VcpuOps;
use vm_accel_core::whole_vm::WholeVm;
#[cfg(any(windows, feature = "sim"))]
pub use vm_accel_whpx as whpx;

/// One virtual machine on one backend.
#[derive(Debug)]
#[non_exhaustive]
pub enum PlatformBackend {
    /// Linux KVM.
    #[cfg(kvm)]
    Kvm(kvm::AccelKvm),
    /// Apple's Virtualization.framework: whole machines, see [`Accel::as_whole_vm`].
    #[cfg(target_os = "macos")]
    Vz(vz::AccelVz),
    /// macOS' Hypervisor.framework.
    #[cfg(target_os = "macos")]
    Hvf(hvf::AccelHvf),
    /// The Windows Hypervisor Platform.
    #[cfg(whpx)]
    Whpx(whpx::AccelWhpx),
    /// A software CPU, on every host.
    Fallback(fallback::NoAccel),
}

/// Says what every kind of backend can do on this host, or why it cannot be used and what helps.
///
/// The probe creates and drops a small virtual machine per available backend.
///
/// ```
/// for report in vm_accel::probe() {
///     match report.outcome {
///         Ok(caps) => println!("{}: up to {} vCPUs", report.kind, caps.max_vcpus),
///         Err(why) => println!("{}: {why}", report.kind),
///     }
/// }
/// ```
#[must_use]
pub fn probe() -> Vec<ProbeReport> {
    AccelKind::ALL.into_iter().map(|kind| ProbeReport { kind, outcome: probe_kind(kind) }).collect()
}

/// As [`probe`], for one kind.
///
/// # Errors
/// [`AccelError::Unavailable`] with the reason.
pub fn probe_kind(kind: AccelKind) -> VcpuResult<Capabilities> {
    match kind {
        #[cfg(kvm)]
        AccelKind::Kvm => kvm::probe(),
        #[cfg(target_os = "macos")]
        AccelKind::Vz => vz::probe(),
        #[cfg(target_os = "macos")]
        AccelKind::Hvf => hvf::AccelHvf::probe(),
        #[cfg(whpx)]
        AccelKind::Whpx => whpx::AccelWhpx::probe(),
        AccelKind::Fallback => Ok(software_capabilities()),
        _ => Err(absent(kind)),
    }
}

/// Why a kind has no code on this host.
fn absent(kind: AccelKind) -> AccelError {
    let reason = match (kind, std::env::consts::OS) {
        (AccelKind::Kvm, os) if os != "linux" => UnavailableReason::WrongOs { needs: "Linux" },
        (AccelKind::Hvf | AccelKind::Vz, os) if os != "macos" => UnavailableReason::WrongOs { needs: "macOS" },
        (AccelKind::Whpx, os) if os != "windows" => UnavailableReason::WrongOs { needs: "Windows" },
        _ => UnavailableReason::NotImplemented,
    };
    AccelError::Unavailable { kind, reason }
}

impl PlatformBackend {
    /// Creates a virtual machine without memory, interrupt controllers and vCPUs.
    ///
    /// # Errors
    /// [`AccelError::Unavailable`] with the reason if the kind cannot be used here.
    pub fn new(kind: AccelKind) -> VcpuResult<Self> {
        match kind {
            #[cfg(kvm)]
            AccelKind::Kvm => Ok(Self::Kvm(kvm::AccelKvm::new()?)),
            #[cfg(target_os = "macos")]
            AccelKind::Vz => Ok(Self::Vz(vz::AccelVz::new()?)),
            #[cfg(target_os = "macos")]
            AccelKind::Hvf => Ok(Self::Hvf(hvf::AccelHvf::new()?)),
            #[cfg(whpx)]
            AccelKind::Whpx => Ok(Self::Whpx(whpx::AccelWhpx::new()?)),
            AccelKind::Fallback => Ok(Self::Fallback(fallback::NoAccel::new())),
            _ => Err(absent(kind)),
        }
    }

    /// Creates the vCPU `id`; see [`Accel::create_vcpu`].
    ///
    /// # Errors
    /// See [`Accel::create_vcpu`].
    pub fn create_vcpu(&mut self, id: u32) -> VcpuResult<Box<dyn VcpuOps>> {
        Accel::create_vcpu(self, id)
    }
}

/// Forwards every call of [`Accel`] to the variant's backend.
macro_rules! dispatch {
    ($self:ident, $backend:ident => $call:expr) => {
        match $self {
            #[cfg(kvm)]
            PlatformBackend::Kvm($backend) => $call,
            #[cfg(target_os = "macos")]
            PlatformBackend::Vz($backend) => $call,
            #[cfg(target_os = "macos")]
            PlatformBackend::Hvf($backend) => $call,
            #[cfg(whpx)]
            PlatformBackend::Whpx($backend) => $call,
            PlatformBackend::Fallback($backend) => $call,
        }
    };
}

impl Accel for PlatformBackend {
    fn kind(&self) -> AccelKind {
        dispatch!(self, b => b.kind())
    }
    fn capabilities(&self) -> &Capabilities {
        dispatch!(self, b => b.capabilities())
    }
    fn create_vcpu(&mut self, id: u32) -> VcpuResult<Box<dyn VcpuOps>> {
        dispatch!(self, b => Accel::create_vcpu(b, id))
    }
    fn map_memory(&mut self, gpa: u64, region: &GuestRegion, flags: MemoryFlags) -> VcpuResult<()> {
        dispatch!(self, b => b.map_memory(gpa, region, flags))
    }
    fn unmap_memory(&mut self, gpa: u64) -> VcpuResult<()> {
        dispatch!(self, b => b.unmap_memory(gpa))
    }
    fn remap_memory(&mut self, gpa: u64, region: &GuestRegion, flags: MemoryFlags) -> VcpuResult<()> {
        dispatch!(self, b => b.remap_memory(gpa, region, flags))
    }
    fn protect_memory(&mut self, gpa: u64, flags: MemoryFlags) -> VcpuResult<()> {
        dispatch!(self, b => b.protect_memory(gpa, flags))
    }
    fn take_dirty(&mut self, gpa: u64) -> VcpuResult<DirtyBitmap> {
        dispatch!(self, b => b.take_dirty(gpa))
    }
    fn create_irqchip(&mut self, chip: IrqChip) -> VcpuResult<()> {
        dispatch!(self, b => b.create_irqchip(chip))
    }
    fn set_irq_line(&self, gsi: u32, level: bool) -> VcpuResult<()> {
        dispatch!(self, b => b.set_irq_line(gsi, level))
    }
    fn signal_msi(&self, msi: MsiMessage) -> VcpuResult<()> {
        dispatch!(self, b => b.signal_msi(msi))
    }
    fn irq_handle(&self) -> VcpuResult<IrqHandle> {
        dispatch!(self, b => b.irq_handle())
    }
    fn set_irq_routes(&mut self, routes: &[(u32, IrqTarget)]) -> VcpuResult<()> {
        dispatch!(self, b => b.set_irq_routes(routes))
    }
    fn register_irqfd(&mut self, event: &HostEvent, gsi: u32, resample: Option<&HostEvent>) -> VcpuResult<()> {
        dispatch!(self, b => b.register_irqfd(event, gsi, resample))
    }
    fn unregister_irqfd(&mut self, event: &HostEvent, gsi: u32) -> VcpuResult<()> {
        dispatch!(self, b => b.unregister_irqfd(event, gsi))
    }
    fn register_ioevent(&mut self, event: &HostEvent, on: IoEventMatch) -> VcpuResult<()> {
        dispatch!(self, b => b.register_ioevent(event, on))
    }
    fn unregister_ioevent(&mut self, event: &HostEvent, on: IoEventMatch) -> VcpuResult<()> {
        dispatch!(self, b => b.unregister_ioevent(event, on))
    }
    fn set_aarch64_features(&mut self, features: Aarch64Features) -> VcpuResult<()> {
        dispatch!(self, b => b.set_aarch64_features(features))
    }
    fn gic(&self) -> VcpuResult<Gic> {
        dispatch!(self, b => b.gic())
    }
    fn get_gic_state(&self) -> VcpuResult<GicState> {
        dispatch!(self, b => b.get_gic_state())
    }
    fn set_gic_state(&mut self, state: &GicState) -> VcpuResult<()> {
        dispatch!(self, b => b.set_gic_state(state))
    }
    fn as_whole_vm(&self) -> Option<&dyn WholeVm> {
        dispatch!(self, b => b.as_whole_vm())
    }
}
