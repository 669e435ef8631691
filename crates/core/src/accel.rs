//! One virtual machine on one backend: the [`Accel`] trait, and what a backend can do.
//!
//! Nothing in here knows a platform. A backend that cannot offer a call inherits a default that answers
//! [`AccelError::Unsupported`]; no default succeeds silently.

use crate::error::{AccelError, VcpuResult};
use crate::event::HostEvent;
use crate::memory::{DirtyBitmap, GuestRegion};
use crate::regs::aarch64::{Aarch64Features, Gic, GicState};
use crate::vcpu_common::VcpuOps;
use crate::whole_vm::WholeVm;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// The kinds of backend. Every kind exists on every host; `vm_accel::probe` says which can be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum AccelKind {
    /// Linux KVM (`/dev/kvm`).
    Kvm,
    /// macOS Hypervisor.framework.
    Hvf,
    /// Windows Hypervisor Platform.
    Whpx,
    /// Apple Virtualization.framework: whole virtual machines, no vCPU access.
    Vz,
    /// A software CPU in pure Rust that needs no accelerator.
    Fallback,
}

impl AccelKind {
    /// Every kind, in the order in which a host is searched for a backend.
    pub const ALL: [Self; 5] = [Self::Kvm, Self::Hvf, Self::Whpx, Self::Vz, Self::Fallback];

    /// The name that [`Display`](fmt::Display) prints and [`FromStr`] reads.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Hvf => "hvf",
            Self::Whpx => "whpx",
            Self::Vz => "vz",
            Self::Fallback => "soft",
        }
    }
}

impl fmt::Display for AccelKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for AccelKind {
    type Err = AccelError;

    fn from_str(name: &str) -> VcpuResult<Self> {
        Self::ALL
            .into_iter()
            .find(|kind| kind.name() == name)
            .ok_or_else(|| AccelError::invalid("accelerator", format!("{name:?} is none of kvm, hvf, whpx, vz, soft")))
    }
}

/// The instruction set that a backend's guests run. It is data: an aarch64 host can run an x86-64 guest in software.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum GuestArch {
    /// Intel 64 / AMD64.
    X86_64,
    /// Armv8-A, 64-bit.
    Aarch64,
}

impl fmt::Display for GuestArch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::X86_64 => "x86_64",
            Self::Aarch64 => "aarch64",
        })
    }
}

/// What a backend can do on this host. Fields that do not apply are `false` or 0.
#[non_exhaustive]
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Capabilities {
    /// The instruction set of its guests.
    pub guest_arch: GuestArch,
    /// Most vCPUs that one virtual machine may have; 0 on backends of whole machines, see [`Accel::as_whole_vm`].
    pub max_vcpus: u32,
    /// Largest vCPU id plus one.
    pub max_vcpu_id: u32,
    /// Most memory mappings that may exist at a time.
    pub max_memory_slots: u32,
    /// Width of guest physical addresses in bits; 0 if the platform does not say.
    pub guest_phys_bits: u8,
    /// Alignment of GPA, size and host address of a mapping, in bytes.
    pub page_size: u64,
    /// Guest writes to a mapping without [`MemoryFlags::WRITE`] exit as MMIO.
    pub read_only_memory: bool,
    /// [`Accel::take_dirty`] works for mappings with [`MemoryFlags::LOG_DIRTY`].
    pub dirty_log: bool,
    /// Dirty pages can be collected from a ring per vCPU instead of a bitmap.
    pub dirty_ring: bool,
    /// General-purpose registers after an exit and before a run cost no system call.
    pub sync_regs: bool,
    /// [`IrqChip::Kernel`] works.
    pub kernel_irqchip: bool,
    /// [`IrqChip::Split`] works.
    pub split_irqchip: bool,
    /// [`Accel::register_irqfd`] works (needs an in-kernel or split interrupt controller).
    pub irqfd: bool,
    /// [`Accel::register_ioevent`] works.
    pub ioevent: bool,
    /// Breakpoints and single step can be asked for with [`VcpuOps::set_guest_debug`].
    pub guest_debug: bool,
    /// RDMSR and WRMSR of unknown MSRs can exit as [`VcpuExit::Msr`](crate::VcpuExit::Msr).
    pub msr_exits: bool,
    /// Bytes of a vCPU's XSAVE area; 0 if there is none.
    pub xsave_size: usize,
    /// Optional parts of the architecture that aarch64 guests can be given with [`Accel::set_aarch64_features`]; they
    /// have none of them unless asked for.
    pub aarch64_features: Aarch64Features,
    /// Calls by HVC and SMC to silicon-partner and OEM services exit as
    /// [`VcpuExit::SystemCall`](crate::VcpuExit::SystemCall); without it the platform answers all calls itself.
    pub aarch64_calls: bool,
    /// Most CPUs of a machine that the platform runs as a whole, see [`Accel::as_whole_vm`].
    pub max_whole_vm_cpus: u32,
    /// `Some(true)` if the host emulates the guest's ring 0 instruction by instruction: operating systems do not boot
    /// there. `None` if it was not examined (only `vm_accel::probe` examines it).
    pub emulates_ring0: Option<bool>,
}

impl Capabilities {
    /// True if it has vCPUs for guests of `arch`; a backend of whole machines ([`Accel::as_whole_vm`]) has none.
    #[must_use]
    pub fn runs_vcpus(&self, arch: GuestArch) -> bool {
        self.max_vcpus != 0 && self.guest_arch == arch
    }

    /// A backend that can do nothing beyond running one vCPU on `guest_arch`: the start for a backend's own list.
    #[must_use]
    pub fn minimal(guest_arch: GuestArch) -> Self {
        Self {
            guest_arch,
            max_vcpus: 1,
            max_vcpu_id: 1,
            max_memory_slots: 1,
            guest_phys_bits: 0,
            page_size: crate::memory::host_page_size(),
            read_only_memory: false,
            dirty_log: false,
            dirty_ring: false,
            sync_regs: false,
            kernel_irqchip: false,
            split_irqchip: false,
            irqfd: false,
            ioevent: false,
            guest_debug: false,
            msr_exits: false,
            xsave_size: 0,
            aarch64_features: Aarch64Features::empty(),
            aarch64_calls: false,
            max_whole_vm_cpus: 0,
            emulates_ring0: None,
        }
    }
}

/// What `vm_accel::probe` found out about one kind of backend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProbeReport {
    /// The kind.
    pub kind: AccelKind,
    /// What it can do, or why it cannot be used.
    pub outcome: VcpuResult<Capabilities>,
}

bitflags::bitflags! {
    /// What the guest may do with a mapping, and whether its writes are logged.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
    pub struct MemoryFlags: u32 {
        /// The guest may read. Every mapping needs it; no platform has write-only memory.
        const READ = 1;
        /// The guest may write; without it a write exits as MMIO.
        const WRITE = 2;
        /// The guest may execute. KVM cannot withhold it and answers `Unsupported` if it is absent.
        const EXECUTE = 4;
        /// Log the pages that the guest writes, for [`Accel::take_dirty`].
        const LOG_DIRTY = 8;
    }
}

impl MemoryFlags {
    /// Ordinary RAM: read, write, execute.
    pub const RAM: Self = Self::READ.union(Self::WRITE).union(Self::EXECUTE);
    /// Read-only memory that may hold code.
    pub const ROM: Self = Self::READ.union(Self::EXECUTE);
}

/// Where the interrupt controllers live.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum IrqChip {
    /// None in the platform: HLT exits, and the VMM injects interrupts
    /// ([`X86Vcpu::inject_interrupt`](crate::x86_64::X86Vcpu::inject_interrupt)).
    #[default]
    None,
    /// All in the platform: local APICs, PIC pair, I/O APIC and PIT on x86-64; the GIC on aarch64. HLT blocks in the
    /// platform and does not exit.
    Kernel,
    /// Local APICs in the platform, the I/O APIC in the VMM, which sends MSIs and gets
    /// [`VcpuExit::EndOfInterrupt`](crate::VcpuExit::EndOfInterrupt).
    Split,
}

/// A message-signalled interrupt: a write of `data` to `address` by a device (Intel SDM vol. 3, "Message Signalled
/// Interrupts").
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct MsiMessage {
    /// Address of the write (on x86-64 0xFEEx_xxxx; the destination APIC is in it).
    pub address: u64,
    /// Data of the write (vector, delivery and trigger mode).
    pub data: u32,
    /// PCI requester id, for platforms that need one (GICv3 ITS); `None` elsewhere.
    pub device_id: Option<u32>,
}

/// An address to which an event is bound with [`Accel::register_ioevent`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum IoAddress {
    /// An I/O port.
    Pio(u16),
    /// A guest physical address.
    Mmio(u64),
}

/// Which writes signal an event that is bound with [`Accel::register_ioevent`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct IoEventMatch {
    /// Where the guest writes.
    pub address: IoAddress,
    /// Width of the write in bytes: 1, 2, 4 or 8; 0 for any (where the platform offers that).
    pub size: u8,
    /// Only this value; `None` for any.
    pub value: Option<u64>,
}

/// What an interrupt line (GSI) leads to, see [`Accel::set_irq_routes`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum IrqTarget {
    /// A pin of an in-kernel controller. On x86-64 chip 0 is the first PIC, 1 the second, 2 the I/O APIC.
    Pin {
        /// The controller.
        chip: u32,
        /// Its pin.
        pin: u32,
    },
    /// A message-signalled interrupt.
    Msi(MsiMessage),
}

/// A way to raise interrupts from any thread, independent of the [`Accel`] that it came from.
///
/// It keeps the virtual machine's interrupt controller alive; after the virtual machine's vCPUs are gone its calls do
/// nothing harmful.
#[derive(Clone)]
pub struct IrqHandle(Arc<dyn IrqSink>);

impl IrqHandle {
    /// Wraps a backend's (or a test's) interrupt sink.
    #[must_use]
    pub fn new(sink: Arc<dyn IrqSink>) -> Self {
        Self(sink)
    }

    /// Sets an interrupt line; see [`Accel::set_irq_line`].
    ///
    /// # Errors
    /// [`AccelError::Unsupported`] without an interrupt controller, [`AccelError::Backend`] if the platform refuses.
    pub fn set_line(&self, gsi: u32, level: bool) -> VcpuResult<()> {
        self.0.set_line(gsi, level)
    }

    /// Sends a message-signalled interrupt; see [`Accel::signal_msi`].
    ///
    /// # Errors
    /// As [`IrqHandle::set_line`].
    pub fn signal_msi(&self, msi: MsiMessage) -> VcpuResult<()> {
        self.0.signal_msi(msi)
    }
}

impl fmt::Debug for IrqHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("IrqHandle").finish_non_exhaustive()
    }
}

/// What stands behind an [`IrqHandle`].
pub trait IrqSink: Send + Sync {
    /// Sets the line `gsi` to `level`.
    ///
    /// # Errors
    /// See [`IrqHandle::set_line`].
    fn set_line(&self, gsi: u32, level: bool) -> VcpuResult<()>;

    /// Delivers a message-signalled interrupt.
    ///
    /// # Errors
    /// See [`IrqHandle::signal_msi`].
    fn signal_msi(&self, msi: MsiMessage) -> VcpuResult<()>;
}

/// One virtual machine on one backend.
///
/// Order: [`create_irqchip`](Accel::create_irqchip) (if wanted) before the first [`create_vcpu`](Accel::create_vcpu);
/// memory may be mapped, unmapped and protected at any time, also while vCPUs run. vCPUs keep the virtual machine alive:
/// the `Accel` may be dropped before them.
///
/// Threads: every method may be called from any thread.
pub trait Accel: fmt::Debug + Send + Sync {
    /// The kind of backend.
    fn kind(&self) -> AccelKind;

    /// What it can do.
    fn capabilities(&self) -> &Capabilities;

    /// Creates the vCPU `id`. On x86-64 the id is its APIC id; vCPU 0 is the boot CPU.
    ///
    /// # Errors
    /// [`AccelError::InvalidArgument`] if the id exists or is too large, [`AccelError::Unsupported`] on backends of whole
    /// machines (VZ): use [`as_whole_vm`](Accel::as_whole_vm) there.
    fn create_vcpu(&mut self, id: u32) -> VcpuResult<Box<dyn VcpuOps>>;

    /// Makes `region` appear at guest physical address `gpa`. The mapping keeps the memory alive until it is unmapped or
    /// the virtual machine is gone. All bytes of the region are mapped.
    ///
    /// # Errors
    /// [`AccelError::InvalidArgument`] (nothing changed) if `gpa` is not a multiple of
    /// [`Capabilities::page_size`], the range leaves the guest's address space or overlaps another mapping, there are
    /// too many mappings, or writing is asked for on read-only host memory.
    fn map_memory(&mut self, gpa: u64, region: &GuestRegion, flags: MemoryFlags) -> VcpuResult<()>;

    /// Removes the mapping that starts at `gpa`. Later guest accesses exit as MMIO.
    ///
    /// # Errors
    /// [`AccelError::InvalidArgument`] if no mapping starts at `gpa`.
    fn unmap_memory(&mut self, gpa: u64) -> VcpuResult<()>;

    /// Replaces the host memory behind the mapping at `gpa` by `region`, which has the same size.
    ///
    /// Not atomic everywhere: on KVM a vCPU that runs meanwhile may see the range unmapped for a moment and exit with an
    /// MMIO access; stop the vCPUs if that matters.
    ///
    /// # Errors
    /// As [`map_memory`](Accel::map_memory) and [`unmap_memory`](Accel::unmap_memory).
    fn remap_memory(&mut self, gpa: u64, region: &GuestRegion, flags: MemoryFlags) -> VcpuResult<()>;

    /// Changes what the guest may do with the mapping that starts at `gpa`, and whether its writes are logged.
    ///
    /// # Errors
    /// [`AccelError::InvalidArgument`] if no mapping starts at `gpa`, [`AccelError::Unsupported`] if the platform has no
    /// such protection.
    fn protect_memory(&mut self, gpa: u64, flags: MemoryFlags) -> VcpuResult<()>;

    /// Takes the dirty pages of the mapping at `gpa`: those that the guest wrote since the last call, joined with those
    /// that the host wrote through [`GuestRegion`]. Reading clears both. It may report pages that were only read (KVM
    /// does for first accesses); it never misses a written one.
    ///
    /// # Errors
    /// [`AccelError::InvalidArgument`] if no mapping with [`MemoryFlags::LOG_DIRTY`] starts at `gpa`,
    /// [`AccelError::Unsupported`] without a dirty log.
    fn take_dirty(&mut self, gpa: u64) -> VcpuResult<DirtyBitmap> {
        let _ = gpa;
        Err(self.unsupported("a dirty log"))
    }

    /// Creates the interrupt controllers. Must precede the first vCPU and may be called once.
    ///
    /// On aarch64 the number of vCPUs is final when the first of them runs, or the first interrupt is raised or bound to an
    /// event.
    ///
    /// # Errors
    /// [`AccelError::Unsupported`] if the platform has no such arrangement, [`AccelError::InvalidArgument`] if vCPUs or
    /// interrupt controllers exist already.
    fn create_irqchip(&mut self, chip: IrqChip) -> VcpuResult<()> {
        match chip {
            IrqChip::None => Ok(()),
            _ => Err(self.unsupported("an in-kernel interrupt controller")),
        }
    }

    /// Sets the interrupt line `gsi` of the in-kernel interrupt controller to `level`. On x86-64 with
    /// [`IrqChip::Kernel`] GSI 0–15 lead to the PICs and the I/O APIC, 16–23 to the I/O APIC. On aarch64 GSI `n` is
    /// the GIC's shared interrupt `32 + n` ([`spi_line`](crate::aarch64::spi_line)), private ones have numbers of their
    /// own ([`ppi_line`](crate::aarch64::ppi_line)).
    ///
    /// # Errors
    /// [`AccelError::Unsupported`] without an in-kernel controller, [`AccelError::Backend`] if the platform refuses.
    fn set_irq_line(&self, gsi: u32, level: bool) -> VcpuResult<()> {
        self.irq_handle()?.set_line(gsi, level)
    }

    /// Delivers a message-signalled interrupt.
    ///
    /// # Errors
    /// As [`set_irq_line`](Accel::set_irq_line).
    fn signal_msi(&self, msi: MsiMessage) -> VcpuResult<()> {
        self.irq_handle()?.signal_msi(msi)
    }

    /// A handle for raising interrupts from device threads.
    ///
    /// # Errors
    /// [`AccelError::Unsupported`] if the backend has no interrupt controller.
    fn irq_handle(&self) -> VcpuResult<IrqHandle> {
        Err(self.unsupported("an in-kernel interrupt controller"))
    }

    /// Replaces the table that says where each GSI leads.
    ///
    /// # Errors
    /// [`AccelError::Unsupported`] without routing, [`AccelError::Backend`] if the platform refuses the table.
    fn set_irq_routes(&mut self, routes: &[(u32, IrqTarget)]) -> VcpuResult<()> {
        let _ = routes;
        Err(self.unsupported("interrupt routing"))
    }

    /// Raises `gsi` (as a pulse) whenever `event` is signalled, without a run-loop round trip. With `resample` the line
    /// is level-triggered: it stays up until the guest's end of interrupt, which signals `resample`.
    ///
    /// # Errors
    /// [`AccelError::Unsupported`] where [`Capabilities::irqfd`] is false, [`AccelError::Backend`] if it is refused.
    fn register_irqfd(&mut self, event: &HostEvent, gsi: u32, resample: Option<&HostEvent>) -> VcpuResult<()> {
        let _ = (event, gsi, resample);
        Err(self.unsupported("irqfd"))
    }

    /// Undoes [`register_irqfd`](Accel::register_irqfd).
    ///
    /// # Errors
    /// As for registering.
    fn unregister_irqfd(&mut self, event: &HostEvent, gsi: u32) -> VcpuResult<()> {
        let _ = (event, gsi);
        Err(self.unsupported("irqfd"))
    }

    /// Signals `event` on every guest write that matches, instead of an exit.
    ///
    /// # Errors
    /// [`AccelError::Unsupported`] where [`Capabilities::ioevent`] is false, [`AccelError::InvalidArgument`] for an
    /// impossible width, [`AccelError::Backend`] if it is refused (for example because it exists already).
    fn register_ioevent(&mut self, event: &HostEvent, on: IoEventMatch) -> VcpuResult<()> {
        let _ = (event, on);
        Err(self.unsupported("ioeventfd"))
    }

    /// Undoes [`register_ioevent`](Accel::register_ioevent).
    ///
    /// # Errors
    /// As for registering.
    fn unregister_ioevent(&mut self, event: &HostEvent, on: IoEventMatch) -> VcpuResult<()> {
        let _ = (event, on);
        Err(self.unsupported("ioeventfd"))
    }

    /// Gives aarch64 guests optional parts of the architecture. Must precede the first vCPU.
    ///
    /// # Errors
    /// [`AccelError::Unsupported`] for a part that [`Capabilities::aarch64_features`] does not have,
    /// [`AccelError::InvalidArgument`] if vCPUs exist already.
    fn set_aarch64_features(&mut self, features: Aarch64Features) -> VcpuResult<()> {
        let _ = features;
        Err(self.unsupported("optional parts of the aarch64 architecture"))
    }

    /// The in-kernel GIC that [`create_irqchip`](Accel::create_irqchip) made.
    ///
    /// # Errors
    /// [`AccelError::Unsupported`] if there is none.
    fn gic(&self) -> VcpuResult<Gic> {
        Err(self.unsupported("an in-kernel GIC"))
    }

    /// The state of the in-kernel GIC. No vCPU may be running. Tables that the guest gave to the GIC (pending LPIs, the
    /// interrupt translation service's) are written to guest memory, so take that afterwards.
    ///
    /// # Errors
    /// [`AccelError::Unsupported`] if there is none, or it is a GICv2; [`AccelError::Backend`] if the platform refuses
    /// (`EBUSY` while a vCPU runs).
    fn get_gic_state(&self) -> VcpuResult<GicState> {
        Err(self.unsupported("an in-kernel GIC"))
    }

    /// Sets the state of the in-kernel GIC. All vCPUs exist, none has run, and guest memory is restored.
    ///
    /// # Errors
    /// As [`get_gic_state`](Accel::get_gic_state).
    fn set_gic_state(&mut self, state: &GicState) -> VcpuResult<()> {
        let _ = state;
        Err(self.unsupported("an in-kernel GIC"))
    }

    /// The machine as a whole, on platforms that run CPUs, devices and boot by themselves (VZ); `None` on all others. There it
    /// takes the place of [`create_vcpu`](Accel::create_vcpu) and the calls for memory and interrupts.
    fn as_whole_vm(&self) -> Option<&dyn WholeVm> {
        None
    }

    /// An [`AccelError::Unsupported`] of this backend.
    fn unsupported(&self, what: &'static str) -> AccelError {
        AccelError::Unsupported { kind: Some(self.kind()), what }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_round_trip_through_their_names() {
        for kind in AccelKind::ALL {
            assert_eq!(kind.to_string().parse::<AccelKind>(), Ok(kind));
        }
        assert!("tcg".parse::<AccelKind>().is_err());
    }
}
