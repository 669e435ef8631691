//! The framework's own GIC (macOS 15): a GICv3 that makes shared interrupts of MSIs, without a translation service.
//!
//! It must be there before the first vCPU, and all vCPUs before the first of them runs; what it restores, too. It delivers the
//! timers' interrupts itself. It has no lines for private interrupts: a vCPU's thread makes those pending, see [`lines`].
//!
//! Source: Apple's hv_gic.h, hv_gic_config.h, hv_gic_parameters.h and hv_gic_state.h, which name no values: sizes and alignments
//! are asked for, and must allow what [`Gic`] promises.

use super::vcpu::HvfVcpu;
use super::{Owned, Vm};
use crate::platform::hvf::check;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use vm_accel_backend::lock;
use vm_accel_core::accel::{AccelKind, IrqSink, MsiMessage};
use vm_accel_core::error::{AccelError, RawCode, VcpuResult};
use vm_accel_core::regs::aarch64::{
    Gic, GicState, GicVersion, MsiFrame, PHYSICAL_TIMER_INTID, PMU_INTID, VIRTUAL_TIMER_INTID, private_line,
};
use vm_accel_sys::hvf::aarch64::{HvfArm64Api, Object, gic};
use vm_accel_sys::hvf::code;

/// ID_AA64PFR0_EL1.GIC: the CPU interface is in system registers.
pub(super) const FEATURE: u64 = 1 << 24;
/// Shared interrupts that become MSIs: behind those that have lines. Linux takes none above 1018.
const MSIS: (u32, u32) = (Gic::INTERRUPTS, 64);
/// Private interrupts that are the framework's: performance monitors, maintenance, EL2's timer, the timers.
const RESERVED: [u32; 5] = [PMU_INTID, 25, 26, VIRTUAL_TIMER_INTID, PHYSICAL_TIMER_INTID];

fn absent() -> AccelError {
    AccelError::Unsupported { kind: Some(AccelKind::Hvf), what: "the framework's GIC (macOS 15)" }
}

/// Calls a function that only newer systems have.
macro_rules! call {
    ($api:expr, $name:ident($($arg:expr),*)) => {
        match $api.$name {
            // SAFETY: pointers are those of variables and objects of the caller's that outlive the call; a vCPU is the
            // calling thread's.
            Some(call) => check(stringify!($name), unsafe { call($($arg),*) }),
            None => Err(absent()),
        }
    };
}

/// An object that the framework makes, or none: then it does not say why.
fn object(
    api: &'static HvfArm64Api,
    op: &'static str,
    create: Option<unsafe extern "C" fn() -> Object>,
) -> VcpuResult<Owned> {
    let code = RawCode::HvReturn(code::NO_RESOURCES);
    Owned::new(api, create.ok_or_else(absent)?).ok_or(AccelError::Backend { kind: AccelKind::Hvf, op, code })
}

#[derive(Debug)]
pub(super) struct FrameworkGic {
    pub(super) layout: Gic,
    /// What is to be restored as soon as all vCPUs are there.
    restore: Mutex<Option<Vec<u8>>>,
    /// A vCPU runs, or did.
    started: AtomicBool,
}

impl FrameworkGic {
    /// Whether this system has one.
    pub(super) fn is_there(api: &HvfArm64Api) -> bool {
        api.hv_gic_config_create.is_some() && api.hv_gic_create.is_some()
    }

    pub(super) fn create(api: &'static HvfArm64Api) -> VcpuResult<Self> {
        let layout = layout(api)?;
        let config = object(api, "hv_gic_config_create", api.hv_gic_config_create)?;
        call!(api, hv_gic_config_set_distributor_base(config.object, layout.distributor))?;
        call!(api, hv_gic_config_set_redistributor_base(config.object, layout.cpus))?;
        if let Some(MsiFrame { address, first, count }) = layout.msi_frame {
            call!(api, hv_gic_config_set_msi_region_base(config.object, address))?;
            call!(api, hv_gic_config_set_msi_interrupt_range(config.object, first, count))?;
        }
        call!(api, hv_gic_create(config.object))?;
        Ok(Self { layout, restore: Mutex::default(), started: AtomicBool::new(false) })
    }

    pub(super) fn has_started(&self) -> bool {
        self.started.load(Ordering::Acquire)
    }

    /// All vCPUs are there, and none has run: what is to be restored can be.
    pub(super) fn start(&self, api: &'static HvfArm64Api) -> VcpuResult<()> {
        // The lock keeps other vCPUs from running before.
        let mut restore = lock(&self.restore);
        if let Some(state) = &*restore {
            call!(api, hv_gic_set_state(state.as_ptr().cast(), state.len()))?;
        }
        *restore = None;
        self.started.store(true, Ordering::Release);
        Ok(())
    }

    pub(super) fn save(&self, api: &'static HvfArm64Api) -> VcpuResult<GicState> {
        let opaque = match &*lock(&self.restore) {
            Some(state) => state.clone(),
            None => {
                let state = object(api, "hv_gic_state_create", api.hv_gic_state_create)?;
                let mut size = 0;
                call!(api, hv_gic_state_get_size(state.object, &mut size))?;
                let mut data = vec![0; size];
                call!(api, hv_gic_state_get_data(state.object, data.as_mut_ptr().cast()))?;
                data
            }
        };
        Ok(GicState { opaque, ..GicState::default() })
    }

    pub(super) fn restore(&self, state: &GicState) -> VcpuResult<()> {
        if state.opaque.is_empty() || !state.registers.is_empty() {
            return Err(AccelError::invalid("GIC state", "it is another platform's"));
        }
        if self.has_started() {
            return Err(AccelError::invalid("GIC state", "vCPUs have run already"));
        }
        *lock(&self.restore) = Some(state.opaque.clone());
        Ok(())
    }
}

/// Where everything is, if the framework can have it there.
fn layout(api: &HvfArm64Api) -> VcpuResult<Gic> {
    type Getter = Option<unsafe extern "C" fn(*mut usize) -> i32>;
    let ask = |op, getter: Getter| {
        let mut value = 0;
        // SAFETY: the pointer is that of a local variable.
        check(op, unsafe { getter.ok_or_else(absent)?(&mut value) })?;
        Ok(value as u64)
    };
    macro_rules! sizes {
        ($($getter:ident),*) => { [$(ask(stringify!($getter), api.$getter)?),*] };
    }
    let [distributor, redistributor, frame] =
        sizes![hv_gic_get_distributor_size, hv_gic_get_redistributor_size, hv_gic_get_msi_region_size];
    let aligned = sizes![
        hv_gic_get_distributor_base_alignment,
        hv_gic_get_redistributor_base_alignment,
        hv_gic_get_msi_region_base_alignment
    ];
    let bases = [Gic::DISTRIBUTOR, Gic::GICV3_REDISTRIBUTORS, Gic::MSI_FRAME];
    let [at_distributor, at_redistributors, at_frame] =
        [0, 1, 2].map(|n: usize| bases[n].checked_rem(aligned[n]) == Some(0));
    let (mut first, mut count, mut timer) = (0, 0, 0);
    call!(api, hv_gic_get_spi_interrupt_range(&mut first, &mut count))?;
    call!(api, hv_gic_get_intid(gic::INT_EL1_VIRTUAL_TIMER, &mut timer))?;
    let has = |end| first <= 32 && first.saturating_add(count) >= end;
    let fits = distributor <= Gic::DISTRIBUTOR_SIZE && redistributor == Gic::GICV3_REDISTRIBUTOR_SIZE;
    if !(fits && at_distributor && at_redistributors && has(Gic::INTERRUPTS) && timer == VIRTUAL_TIMER_INTID) {
        let what = "a GIC of this system's kind: its parts do not fit where this library has them";
        return Err(AccelError::Unsupported { kind: Some(AccelKind::Hvf), what });
    }
    let msis = at_frame && frame <= Gic::MSI_FRAME_SIZE && has(MSIS.0 + MSIS.1);
    Ok(Gic {
        version: GicVersion::V3,
        distributor: Gic::DISTRIBUTOR,
        cpus: Gic::GICV3_REDISTRIBUTORS,
        its: None,
        msi_frame: msis.then_some(MsiFrame { address: Gic::MSI_FRAME, first: MSIS.0, count: MSIS.1 }),
    })
}

impl IrqSink for Vm {
    fn set_line(&self, gsi: u32, level: bool) -> VcpuResult<()> {
        let vcpu = match private_line(gsi) {
            None if gsi < Gic::INTERRUPTS - 32 => return call!(self.api, hv_gic_set_spi(gsi + 32, level)),
            Some((id, intid @ 16..=31)) if !RESERVED.contains(&intid) => {
                lock(&self.vcpus).get(&id).map(|vcpu| (vcpu.clone(), intid))
            }
            _ => None,
        };
        let Some((vcpu, intid)) = vcpu else {
            let most = Gic::INTERRUPTS - 33;
            let detail = format!("{gsi:#x} is neither a shared one (0 to {most}) nor a ppi_line that is free");
            return Err(AccelError::invalid("interrupt line", detail));
        };
        vcpu.set_line(1 << intid, level)
    }

    fn signal_msi(&self, msi: MsiMessage) -> VcpuResult<()> {
        let frame = self.gic.get().and_then(|gic| gic.layout.msi_frame).ok_or_else(absent)?;
        let ours = (frame.first..frame.first + frame.count).contains(&msi.data);
        if !ours || msi.address != frame.address + MsiFrame::DOORBELL {
            let detail = format!("{:#x} to {:#x} does not belong to {frame:x?}", msi.data, msi.address);
            return Err(AccelError::invalid("message-signalled interrupt", detail));
        }
        call!(self.api, hv_gic_send_msi(msi.address, msi.data))
    }
}

/// A register of the CPU interface after reset.
pub(super) fn interface_reset(register: u16) -> Option<u64> {
    gic::ICC.contains(&register).then_some(if register == gic::ICC_SRE_EL1 { 7 } else { 0 })
}

pub(super) fn interface(api: &HvfArm64Api, vcpu: u64, register: u16) -> VcpuResult<u64> {
    let mut value = 0;
    call!(api, hv_gic_get_icc_reg(vcpu, register, &mut value))?;
    Ok(value)
}

/// Sets one, if that changes something: what cannot be written stays unasked.
pub(super) fn set_interface(api: &HvfArm64Api, vcpu: u64, register: u16, value: u64) -> VcpuResult<()> {
    let writable = match register {
        gic::ICC_SRE_EL1 => 0,
        // EOImode, CBPR (IHI 0069, 12.2.6).
        gic::ICC_CTLR_EL1 => 3,
        _ => u64::MAX,
    };
    if (interface(api, vcpu, register)? ^ value) & writable == 0 {
        return Ok(());
    }
    call!(api, hv_gic_set_icc_reg(vcpu, register, value))
}

/// Brings the lines of private interrupts to the framework, which knows no levels of theirs: one that is up is pending
/// at every entry, and not any more when it has fallen.
pub(super) fn lines(vcpu: &HvfVcpu, id: u64, was: u32, now: u32) -> VcpuResult<()> {
    for (register, set) in [(gic::GICR_ICPENDR0, was & !now), (gic::GICR_ISPENDR0, now)] {
        if set != 0 {
            call!(vcpu.vm.api, hv_gic_set_redistributor_reg(id, register, set.into()))?;
        }
    }
    Ok(())
}
