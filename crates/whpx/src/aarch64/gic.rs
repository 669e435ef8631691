//! The hypervisor's GICv3.
//!
//! It must be configured before a partition's set-up, so each has it. Lines are asserted by INTID. That a private interrupt's CPU is
//! told by its affinity is an assumption: the documentation says "destination address" and no more, and other users of the platform
//! assert shared interrupts only.

use super::Vm;
use std::sync::atomic::Ordering;
use vm_accel_backend::lock;
use vm_accel_core::accel::{AccelKind, IrqChip, IrqSink, MsiMessage};
use vm_accel_core::error::{AccelError, VcpuResult};
use vm_accel_core::regs::aarch64::{Gic, GicVersion, PMU_INTID, VIRTUAL_TIMER_INTID, affinity, private_line};
use vm_accel_sys::whpx::aarch64::{IcParameters, InterruptControl, InterruptKind};

const GICV3: u32 = 1;

/// What a partition's GIC is. Where its translation service would be has to be told (MS documentation of the property), but it
/// has no identifiers: the platform's does not work for guests (openvmm, QEMU).
pub(super) const PARAMETERS: IcParameters = IcParameters {
    emulation_mode: GICV3,
    reserved: 0,
    gicd_base_address: Gic::DISTRIBUTOR,
    gits_translater_base_address: Gic::ITS,
    reserved1: 0,
    gic_lpi_int_id_bits: 0,
    gic_ppi_overflow_interrupt_from_cntv: VIRTUAL_TIMER_INTID,
    gic_ppi_performance_monitors_interrupt: PMU_INTID,
    reserved2: [0; 6],
};

/// Where the redistributor of a vCPU is.
pub(super) fn redistributor(id: u32) -> u64 {
    Gic::GICV3_REDISTRIBUTORS + u64::from(id) * Gic::GICV3_REDISTRIBUTOR_SIZE
}

fn absent(what: &'static str) -> AccelError {
    AccelError::Unsupported { kind: Some(AccelKind::Whpx), what }
}

impl Vm {
    pub(super) fn create_irqchip(&self, chip: IrqChip) -> VcpuResult<()> {
        match chip {
            IrqChip::None => Ok(()),
            IrqChip::Split => Err(absent("a split interrupt controller")),
            IrqChip::Kernel => {
                let vcpus = lock(&self.vcpus);
                if !vcpus.is_empty() || self.has_gic.swap(true, Ordering::Relaxed) {
                    return Err(AccelError::invalid("interrupt controllers", "vCPUs or controllers exist already"));
                }
                Ok(())
            }
        }
    }

    pub(super) fn gic(&self) -> VcpuResult<Gic> {
        if !self.has_gic.load(Ordering::Relaxed) {
            return Err(absent("a GIC in a machine without one"));
        }
        Ok(Gic {
            version: GicVersion::V3,
            distributor: Gic::DISTRIBUTOR,
            cpus: Gic::GICV3_REDISTRIBUTORS,
            its: None,
            msi_frame: None,
        })
    }
}

impl IrqSink for Vm {
    fn set_line(&self, gsi: u32, level: bool) -> VcpuResult<()> {
        let (intid, destination) = match private_line(gsi) {
            None if gsi < Gic::INTERRUPTS - 32 => (gsi + 32, 0),
            Some((vcpu, intid @ 16..32)) if lock(&self.vcpus).contains(&vcpu) => (intid, affinity(vcpu)),
            _ => {
                let most = Gic::INTERRUPTS - 33;
                let detail = format!("{gsi:#x} is neither a shared one (0 to {most}) nor a ppi_line of a vCPU");
                return Err(AccelError::invalid("interrupt line", detail));
            }
        };
        self.partition().request_interrupt(&InterruptControl {
            kind: InterruptKind(0).with_asserted(level.into()),
            destination_address: destination,
            requested_vector: intid,
            ..InterruptControl::default()
        })
    }

    fn signal_msi(&self, _: MsiMessage) -> VcpuResult<()> {
        Err(absent("messages to the GIC"))
    }
}
