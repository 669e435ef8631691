//! The GIC in the kernel: GICv3 with an interrupt translation service where the host has it, GICv2 otherwise.
//!
//! Sources: Linux `Documentation/virt/kvm/devices/arm-vgic-v3.rst`, `arm-vgic-its.rst`, `arm-vgic.rst`; Arm GIC
//! architecture specification (IHI 0069), chapter 12 for the registers.

use super::super::{KvmVm, not_here, refused};
use super::Gic;
use kvm_bindings as kb;
use kvm_ioctls::DeviceFd;
use vm_accel_core::accel::IrqChip;
use vm_accel_core::error::{AccelError, VcpuResult};
use vm_accel_core::regs::aarch64::{GicPart, GicRegister, GicState, GicVersion, affinity, sys_reg};

/// The kernel's device, and where it is.
#[derive(Debug)]
pub(super) struct KernelGic {
    device: DeviceFd,
    its: Option<DeviceFd>,
    pub(super) layout: Gic,
}

/// Registers of the distributor that are per interrupt: offset, bits per interrupt (IHI 0069, 12.8). Where a group sets and
/// another clears, writing the first to a fresh GIC is enough.
const PER_INTERRUPT: [(u32, u32); 7] = [
    (0x0080, 1),  // IGROUPR
    (0x0100, 1),  // ISENABLER
    (0x0200, 1),  // ISPENDR
    (0x0300, 1),  // ISACTIVER
    (0x0400, 8),  // IPRIORITYR
    (0x0c00, 2),  // ICFGR
    (0x6000, 64), // IROUTER
];
const GICD_CTLR: u32 = 0;
/// Registers of a redistributor, but those per interrupt: WAKER, PROPBASER and PENDBASER in halves (IHI 0069, 12.10).
const REDISTRIBUTOR: [u32; 5] = [0x14, 0x70, 0x74, 0x78, 0x7c];
/// Enables LPIs, which fixes the bases: it goes last.
const GICR_CTLR: u32 = 0;
/// Private interrupts are in a page of their own, laid out like the distributor.
const GICR_PRIVATE: u32 = 0x1_0000;
/// Private interrupts have no IROUTER.
const PRIVATE_GROUPS: usize = 6;

const ICC_CTLR: u16 = sys_reg(3, 0, 12, 12, 4);
/// SRE, PMR, BPR0, BPR1, IGRPEN0, IGRPEN1 (IHI 0069, 12.2).
const CPU_INTERFACE: [u16; 6] = [
    sys_reg(3, 0, 12, 12, 5),
    sys_reg(3, 0, 4, 6, 0),
    sys_reg(3, 0, 12, 8, 3),
    sys_reg(3, 0, 12, 12, 3),
    sys_reg(3, 0, 12, 12, 6),
    sys_reg(3, 0, 12, 12, 7),
];

/// The translation service's registers in the order of restoring (`arm-vgic-its.rst`): CBASER before the pointers, which it
/// resets; CTLR after the tables.
const ITS: [u32; 11] = [0x80, 0x88, 0x90, 0x100, 0x108, 0x110, 0x118, 0x120, 0x128, 0x130, 0x138];
const GITS_CTLR: u32 = 0;

pub(in super::super) fn create_irqchip(vm: &KvmVm, chip: IrqChip) -> VcpuResult<()> {
    if chip == IrqChip::Split {
        return Err(not_here("a split interrupt controller"));
    }
    let gic = KernelGic::create(vm)?;
    // `Accel::create_irqchip` calls this once.
    let _ = vm.arch.gic.set(gic);
    Ok(())
}

fn create_device(vm: &KvmVm, kind: u32) -> Result<DeviceFd, kvm_ioctls::Error> {
    vm.fd.create_device(&mut kb::kvm_create_device { type_: kind, ..Default::default() })
}

fn set<T>(device: &DeviceFd, group: u32, attr: u64, value: &T) -> VcpuResult<()> {
    device
        .set_device_attr(&kb::kvm_device_attr { group, attr, addr: &raw const *value as u64, ..Default::default() })
        .map_err(refused("KVM_SET_DEVICE_ATTR of the GIC"))
}

fn control(device: &DeviceFd, action: u32) -> VcpuResult<()> {
    set(device, kb::KVM_DEV_ARM_VGIC_GRP_CTRL, action.into(), &0_u64)
}

fn set_address(device: &DeviceFd, kind: u32, address: u64) -> VcpuResult<()> {
    set(device, kb::KVM_DEV_ARM_VGIC_GRP_ADDR, kind.into(), &address)
}

/// The kernel's group of a register, its number in it, and its width in bytes.
fn attribute(register: &GicRegister) -> (u32, u64, usize) {
    let number = u64::from(register.register);
    let of = |affinity: u32| u64::from(affinity) << kb::KVM_DEV_ARM_VGIC_V3_MPIDR_SHIFT | number;
    match register.part {
        GicPart::Distributor => (kb::KVM_DEV_ARM_VGIC_GRP_DIST_REGS, number, 4),
        GicPart::Redistributor { affinity } => (kb::KVM_DEV_ARM_VGIC_GRP_REDIST_REGS, of(affinity), 4),
        GicPart::CpuInterface { affinity } => (kb::KVM_DEV_ARM_VGIC_GRP_CPU_SYSREGS, of(affinity), 8),
        GicPart::Lines { affinity } => {
            let kind = kb::VGIC_LEVEL_INFO_LINE_LEVEL << kb::KVM_DEV_ARM_VGIC_LINE_LEVEL_INFO_SHIFT;
            (kb::KVM_DEV_ARM_VGIC_GRP_LEVEL_INFO, of(affinity) | u64::from(kind), 4)
        }
        GicPart::Its => (kb::KVM_DEV_ARM_VGIC_GRP_ITS_REGS, number, 8),
    }
}

impl KernelGic {
    fn create(vm: &KvmVm) -> VcpuResult<Self> {
        match create_device(vm, kb::kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3) {
            Ok(device) => Self::version_3(vm, device),
            Err(_) => {
                let device = create_device(vm, kb::kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V2)
                    .map_err(refused("KVM_CREATE_DEVICE of a GIC"))?;
                Self::version_2(device)
            }
        }
    }

    fn version_3(vm: &KvmVm, device: DeviceFd) -> VcpuResult<Self> {
        set_address(&device, kb::KVM_VGIC_V3_ADDR_TYPE_DIST, Gic::DISTRIBUTOR)?;
        set_address(&device, kb::KVM_VGIC_V3_ADDR_TYPE_REDIST, Gic::GICV3_REDISTRIBUTORS)?;
        set(&device, kb::KVM_DEV_ARM_VGIC_GRP_NR_IRQS, 0, &Gic::INTERRUPTS)?;
        let its = create_device(vm, kb::kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_ITS).ok();
        if let Some(its) = &its {
            set_address(its, kb::KVM_VGIC_ITS_ADDR_TYPE, Gic::ITS)?;
        }
        let layout = Gic {
            version: GicVersion::V3,
            distributor: Gic::DISTRIBUTOR,
            cpus: Gic::GICV3_REDISTRIBUTORS,
            its: its.is_some().then_some(Gic::ITS),
            msi_frame: None,
        };
        Ok(Self { device, its, layout })
    }

    fn version_2(device: DeviceFd) -> VcpuResult<Self> {
        set_address(&device, kb::KVM_VGIC_V2_ADDR_TYPE_DIST, Gic::DISTRIBUTOR)?;
        set_address(&device, kb::KVM_VGIC_V2_ADDR_TYPE_CPU, Gic::GICV2_CPU)?;
        set(&device, kb::KVM_DEV_ARM_VGIC_GRP_NR_IRQS, 0, &Gic::INTERRUPTS)?;
        let layout = Gic {
            version: GicVersion::V2,
            distributor: Gic::DISTRIBUTOR,
            cpus: Gic::GICV2_CPU,
            its: None,
            msi_frame: None,
        };
        Ok(Self { device, its: None, layout })
    }

    /// All vCPUs exist.
    pub(super) fn complete(&self) -> VcpuResult<()> {
        control(&self.device, kb::KVM_DEV_ARM_VGIC_CTRL_INIT)?;
        match &self.its {
            Some(its) => control(its, kb::KVM_DEV_ARM_VGIC_CTRL_INIT),
            None => Ok(()),
        }
    }

    fn device(&self, part: GicPart) -> VcpuResult<&DeviceFd> {
        match part {
            GicPart::Its => self
                .its
                .as_ref()
                .ok_or_else(|| AccelError::invalid("GIC state", "it has an ITS, this host's GIC does not")),
            _ => Ok(&self.device),
        }
    }

    fn get(&self, part: GicPart, register: u32) -> VcpuResult<GicRegister> {
        let mut found = GicRegister { part, register, value: 0 };
        let (group, attr, _) = attribute(&found);
        let mut value = 0_u64;
        let mut attribute = kb::kvm_device_attr { group, attr, addr: &raw mut value as u64, ..Default::default() };
        // SAFETY: the kernel writes 4 or 8 bytes, the width of the group's registers, to a u64.
        unsafe { self.device(part)?.get_device_attr(&mut attribute) }
            .map_err(refused("KVM_GET_DEVICE_ATTR of the GIC"))?;
        found.value = value;
        Ok(found)
    }

    fn put(&self, register: &GicRegister) -> VcpuResult<()> {
        let (group, attr, width) = attribute(register);
        let device = self.device(register.part)?;
        match width {
            4 => set(device, group, attr, &(register.value as u32)),
            _ => set(device, group, attr, &register.value),
        }
    }

    fn needs_version_3(&self) -> VcpuResult<()> {
        match self.layout.version {
            GicVersion::V3 => Ok(()),
            GicVersion::V2 => Err(not_here("the state of a GICv2")),
        }
    }

    pub(super) fn save(&self, vcpus: &[u32]) -> VcpuResult<GicState> {
        self.needs_version_3()?;
        control(&self.device, kb::KVM_DEV_ARM_VGIC_SAVE_PENDING_TABLES)?;
        if let Some(its) = &self.its {
            control(its, kb::KVM_DEV_ARM_ITS_SAVE_TABLES)?;
        }
        let mut places = vec![(GicPart::Distributor, GICD_CTLR)];
        for (offset, bits) in PER_INTERRUPT {
            // In words; the first ones belong to private interrupts, which the redistributors have.
            let words = bits..bits * Gic::INTERRUPTS / 32;
            places.extend(words.map(|word| (GicPart::Distributor, offset + 4 * word)));
        }
        for id in vcpus {
            let affinity = affinity(*id) as u32;
            let redistributor = GicPart::Redistributor { affinity };
            places.extend(REDISTRIBUTOR.map(|offset| (redistributor, offset)));
            for (offset, bits) in &PER_INTERRUPT[..PRIVATE_GROUPS] {
                let words = 0..*bits;
                places.extend(words.map(|word| (redistributor, GICR_PRIVATE + offset + 4 * word)));
            }
            places.push((redistributor, GICR_CTLR));
            places.push((GicPart::Lines { affinity }, 0));
            let interface = GicPart::CpuInterface { affinity };
            places.extend(CPU_INTERFACE.map(|register| (interface, register.into())));
            places.push((interface, ICC_CTLR.into()));
            places.extend(self.active_priorities(interface)?);
        }
        let first = affinity(vcpus.first().copied().unwrap_or(0)) as u32;
        let lines = (32..Gic::INTERRUPTS).step_by(32);
        places.extend(lines.map(|intid| (GicPart::Lines { affinity: first }, intid)));
        if self.its.is_some() {
            places.extend(ITS.map(|offset| (GicPart::Its, offset)));
            places.push((GicPart::Its, GITS_CTLR));
        }
        let registers =
            places.into_iter().map(|(part, register)| self.get(part, register)).collect::<VcpuResult<_>>()?;
        Ok(GicState { registers, ..GicState::default() })
    }

    /// AP0R and AP1R: how many there are depends on the number of priority bits (ICC_CTLR_EL1.PRIbits, IHI 0069, 12.2.3).
    fn active_priorities(&self, interface: GicPart) -> VcpuResult<Vec<(GicPart, u32)>> {
        let control = self.get(interface, ICC_CTLR.into())?.value;
        let count = match (control >> 8 & 7) + 1 {
            0..=5 => 1,
            6 => 2,
            _ => 4,
        };
        let registers = (0..count).flat_map(|n| [sys_reg(3, 0, 12, 8, 4 + n), sys_reg(3, 0, 12, 9, n)]);
        Ok(registers.map(|register| (interface, register.into())).collect())
    }

    pub(super) fn restore(&self, state: &GicState) -> VcpuResult<()> {
        self.needs_version_3()?;
        if !state.opaque.is_empty() {
            return Err(AccelError::invalid("GIC state", "it is another platform's"));
        }
        for register in &state.registers {
            if register.part == GicPart::Its && register.register == GITS_CTLR {
                let its = self.device(GicPart::Its)?;
                control(its, kb::KVM_DEV_ARM_ITS_RESTORE_TABLES)?;
            }
            self.put(register)?;
        }
        Ok(())
    }
}
