//! The Windows Hypervisor Platform on arm64: Windows 11 24H2 from build 26100.3915 on, whose `Features.Arm64Support` says so.
//!
//! The hypervisor has the GIC (a GICv3 without a translation service, in every partition), the timers and PSCI; WFI waits in it. What
//! is left are accesses to devices, which come as the syndrome of an abort, and calls that are nobody's. So this backend
//! resembles KVM's more than HVF's:
//! * [`IrqChip::Kernel`] is the hypervisor's GIC. Without it the GIC is there all the same, at the same
//!   addresses, and nothing drives it. A controller of the VMM's has no way to interrupt a CPU: `set_interrupts` answers
//!   [`AccelError::Unsupported`].
//! * The state of the GIC cannot be saved (its structures are declared, what they mean is not), messages (MSI) cannot be sent, and
//!   the host cannot debug guests.
//!
//! Sources: Microsoft's WinHvPlatformDefs.h and documentation of the platform; openvmm `virt_whp`; QEMU `target/arm/whpx`.
//! Where they are silent both readings work, and the simulator tries both. Never run on hardware by this project so far.

mod gic;
mod partition;
mod registers;
#[cfg(all(windows, target_arch = "aarch64"))]
mod system;
mod vcpu;

use super::partition::{is_off, map_flags, unavailable};
use partition::{Partition, capability};
use registers::Row;
use std::collections::BTreeSet;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, OnceLock};
use vcpu::WhpxVcpu;
use vm_accel_backend::gate::Alarm;
use vm_accel_backend::lock;
use vm_accel_backend::slots::{Mapper, Rules, Slots};
use vm_accel_core::accel::{Accel, AccelKind, Capabilities, GuestArch, IrqChip, IrqHandle, MemoryFlags};
use vm_accel_core::capabilities;
use vm_accel_core::error::{AccelError, UnavailableReason, VcpuResult};
use vm_accel_core::memory::{DirtyBitmap, GuestRegion};
use vm_accel_core::regs::aarch64::{Aarch64Features, Gic, GicState};
use vm_accel_core::vcpu_common::VcpuOps;
use vm_accel_sys::whpx::aarch64::{
    ANY_VP, ExtendedVmExits, Features, RegisterValue, WhpApi, capability as code, feature, property,
};

/// Pages of the platform.
const PAGE: u64 = 4096;
/// Width of guest physical addresses where the platform does not tell.
const DEFAULT_ADDRESS_BITS: u8 = 36;
/// Processors of a partition: the number must be told before its set-up.
const MAX_VCPUS: u32 = 64;

/// Fields of feature registers that guests do not see: register, lowest bit, and what the field means here.
const HIDDEN: [(u16, u32, Aarch64Features); 11] = [
    (0xc020, 32, Aarch64Features::SVE),                    // ID_AA64PFR0_EL1.SVE
    (0xc020, 44, Aarch64Features::empty()),                // .AMU
    (0xc021, 24, Aarch64Features::SVE),                    // ID_AA64PFR1_EL1.SME
    (0xc028, 8, Aarch64Features::PMU),                     // ID_AA64DFR0_EL1.PMUVer
    (0xc028, 32, Aarch64Features::empty()),                // .PMSVer
    (0xc031, 4, Aarch64Features::POINTER_AUTHENTICATION),  // ID_AA64ISAR1_EL1.APA
    (0xc031, 8, Aarch64Features::POINTER_AUTHENTICATION),  // .API
    (0xc031, 24, Aarch64Features::POINTER_AUTHENTICATION), // .GPA
    (0xc031, 28, Aarch64Features::POINTER_AUTHENTICATION), // .GPI
    (0xc032, 8, Aarch64Features::POINTER_AUTHENTICATION),  // ID_AA64ISAR2_EL1.GPA3
    (0xc032, 12, Aarch64Features::POINTER_AUTHENTICATION), // .APA3
];

/// One virtual machine on the Windows Hypervisor Platform.
#[derive(Debug)]
pub struct AccelWhpx {
    vm: Arc<Vm>,
    caps: Capabilities,
}

#[cfg(feature = "sim")]
impl AccelWhpx {
    /// Creates a virtual machine on a simulated platform.
    ///
    /// # Errors
    /// As for the real one.
    pub fn with_api(api: &'static WhpApi) -> VcpuResult<Self> {
        Self::from_table(api)
    }

    /// What a simulated platform can do.
    ///
    /// # Errors
    /// [`AccelError::Unavailable`] with the reason.
    pub fn probe_with(api: &'static WhpApi) -> VcpuResult<Capabilities> {
        Self::probe_table(api)
    }
}

/// What the platform tells about itself.
fn capabilities(api: &WhpApi) -> VcpuResult<Capabilities> {
    if capability(api, code::HYPERVISOR_PRESENT)?.unwrap_or(0) as u32 == 0 {
        return Err(is_off());
    }
    let features = Features(capability(api, code::FEATURES)?.unwrap_or(0));
    if features.arm64_support() == 0 {
        let detail = "this Windows has the platform as a preview only; it needs build 26100.3915 or later".into();
        return Err(unavailable(UnavailableReason::UnsupportedHardware { detail }));
    }
    let exits = ExtendedVmExits(capability(api, code::EXTENDED_VM_EXITS)?.unwrap_or(0));
    let bits = capability(api, code::PHYSICAL_ADDRESS_WIDTH)?.map_or(DEFAULT_ADDRESS_BITS, |bits| bits as u32 as u8);
    Ok(capabilities! {
        max_vcpus: MAX_VCPUS,
        max_vcpu_id: MAX_VCPUS,
        // The platform names no limit.
        max_memory_slots: 4096,
        guest_phys_bits: bits.clamp(32, 52),
        page_size: PAGE,
        read_only_memory: true,
        dirty_log: api.WHvQueryGpaRangeDirtyBitmap.is_some() && features.dirty_page_tracking() != 0,
        kernel_irqchip: true,
        aarch64_calls: exits.hypercall_exit() != 0,
        emulates_ring0: Some(false),
        ..Capabilities::minimal(GuestArch::Aarch64)
    })
}

impl AccelWhpx {
    /// What the platform of a table can do.
    fn probe_table(api: &WhpApi) -> VcpuResult<Capabilities> {
        capabilities(api).map_err(|why| match why {
            AccelError::Backend { op, code, .. } => unavailable(UnavailableReason::Failed { op, code }),
            why => why,
        })
    }

    /// Creates a virtual machine on the platform of a table: the system's, or a simulator's.
    fn from_table(api: &'static WhpApi) -> VcpuResult<Self> {
        let caps = capabilities(api)?;
        let partition = Partition::new(api)?;
        partition.set_property(property::PROCESSOR_COUNT, &[caps.max_vcpus])?;
        partition.set_property(property::ARM64_IC_PARAMETERS, &[gic::PARAMETERS])?;
        if caps.aarch64_calls {
            let exits = ExtendedVmExits(0).with_hypercall_exit(1);
            partition.set_property(property::EXTENDED_VM_EXITS, &[exits.0])?;
        }
        partition.set_up()?;
        let shown = hide_features(&partition)?;
        let rules = Rules {
            kind: AccelKind::Whpx,
            page: PAGE,
            address_bits: caps.guest_phys_bits,
            most: caps.max_memory_slots,
            no_execute: true,
        };
        let vm = Vm {
            slots: Slots::new(partition, rules),
            vcpus: Mutex::default(),
            alarm: Arc::default(),
            has_gic: AtomicBool::new(false),
            rows: OnceLock::new(),
            shown,
        };
        Ok(Self { vm: Arc::new(vm), caps })
    }
}

/// Takes what this library cannot keep for a guest out of the feature registers, and answers what of it guests see all the same: QEMU
/// writes these registers, and nobody says that they can be written.
fn hide_features(partition: &Partition) -> VcpuResult<Aarch64Features> {
    for (register, bit, _) in HIDDEN {
        let value = partition.get(ANY_VP, &[feature(register)])?[0].low;
        let hidden = value & !(0xf << bit);
        if hidden != value {
            let _ = partition.set(ANY_VP, &[feature(register)], &[RegisterValue { low: hidden, high: 0 }]);
        }
    }
    let names = HIDDEN.map(|(register, ..)| feature(register));
    let values = partition.get(ANY_VP, &names)?;
    let shown = HIDDEN.iter().zip(values).filter(|((_, bit, _), value)| value.low >> bit & 0xf != 0);
    Ok(shown.fold(Aarch64Features::empty(), |all, ((.., meaning), _)| all | *meaning))
}

/// What a machine and its vCPUs share.
#[derive(Debug)]
struct Vm {
    /// The platform's part of it is the partition. It goes before the memory that it has mapped.
    slots: Slots<Partition>,
    vcpus: Mutex<BTreeSet<u32>>,
    alarm: Arc<Alarm>,
    has_gic: AtomicBool,
    /// The system registers that this version of the platform has, known from the first vCPU on.
    rows: OnceLock<Vec<Row>>,
    /// What could not be hidden from guests.
    shown: Aarch64Features,
}

impl Vm {
    fn partition(&self) -> &Partition {
        &self.slots.mapper
    }
}

impl Mapper for Partition {
    type Hold = ();

    fn map(&self, gpa: u64, region: &GuestRegion, flags: MemoryFlags) -> VcpuResult<()> {
        if flags.contains(MemoryFlags::LOG_DIRTY) && self.api.WHvQueryGpaRangeDirtyBitmap.is_none() {
            return Err(AccelError::Unsupported { kind: Some(AccelKind::Whpx), what: "a dirty log" });
        }
        Self::map(self, region.as_ptr(), gpa, region.size(), map_flags(flags))
    }

    fn unmap(&self, gpa: u64, size: u64) -> VcpuResult<()> {
        Self::unmap(self, gpa, size)
    }

    fn log_dirty(&self, gpa: u64, region: &GuestRegion, flags: MemoryFlags) -> VcpuResult<()> {
        // A mapping replaces the one before.
        Mapper::map(self, gpa, region, flags)
    }

    fn take_dirty(&self, gpa: u64, size: u64) -> VcpuResult<Vec<u64>> {
        let mut words = vec![0; (size / PAGE).div_ceil(64) as usize];
        Self::take_dirty(self, gpa, size, &mut words)?;
        Ok(words)
    }
}

impl Accel for AccelWhpx {
    fn kind(&self) -> AccelKind {
        AccelKind::Whpx
    }

    fn capabilities(&self) -> &Capabilities {
        &self.caps
    }

    fn create_vcpu(&mut self, id: u32) -> VcpuResult<Box<dyn VcpuOps>> {
        let mut vcpus = lock(&self.vm.vcpus);
        let most = self.caps.max_vcpus;
        if id >= most || vcpus.contains(&id) {
            let detail = format!("{id}: it is in use, or not below {most}");
            return Err(AccelError::invalid("vCPU id", detail));
        }
        let vcpu = WhpxVcpu::new(&self.vm, id)?;
        vcpus.insert(id);
        Ok(Box::new(vcpu))
    }

    fn map_memory(&mut self, gpa: u64, region: &GuestRegion, flags: MemoryFlags) -> VcpuResult<()> {
        self.vm.slots.map(gpa, region, flags)
    }

    fn unmap_memory(&mut self, gpa: u64) -> VcpuResult<()> {
        self.vm.slots.unmap(gpa)
    }

    fn remap_memory(&mut self, gpa: u64, region: &GuestRegion, flags: MemoryFlags) -> VcpuResult<()> {
        self.vm.slots.remap(gpa, region, flags)
    }

    fn protect_memory(&mut self, gpa: u64, flags: MemoryFlags) -> VcpuResult<()> {
        self.vm.slots.protect(gpa, flags)
    }

    fn take_dirty(&mut self, gpa: u64) -> VcpuResult<DirtyBitmap> {
        self.vm.slots.take_dirty(gpa)
    }

    fn set_aarch64_features(&mut self, features: Aarch64Features) -> VcpuResult<()> {
        if !lock(&self.vm.vcpus).is_empty() {
            return Err(AccelError::invalid("aarch64 features", "vCPUs exist already"));
        }
        if features.is_empty() {
            return Ok(());
        }
        Err(self.unsupported("optional parts of the aarch64 architecture"))
    }

    fn create_irqchip(&mut self, chip: IrqChip) -> VcpuResult<()> {
        self.vm.create_irqchip(chip)
    }

    fn irq_handle(&self) -> VcpuResult<IrqHandle> {
        self.vm.gic()?;
        Ok(IrqHandle::new(Arc::<Vm>::clone(&self.vm)))
    }

    fn gic(&self) -> VcpuResult<Gic> {
        self.vm.gic()
    }

    fn get_gic_state(&self) -> VcpuResult<GicState> {
        Err(self.unsupported("the state of the hypervisor's GIC"))
    }

    fn set_gic_state(&mut self, _: &GicState) -> VcpuResult<()> {
        Err(self.unsupported("the state of the hypervisor's GIC"))
    }
}
