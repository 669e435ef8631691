//! The platform's GIC: what may be asked of it and when. What it does as a device is `crate::a64::gic`'s.
//!
//! Its order is that of hv_gic.h: after the VM, before any vCPU, once; vCPUs say their affinity before they run; its state is
//! taken while nothing runs, and given before anything has. Sizes and alignments are those of one real machine or other: a
//! VMM must ask.

use super::api::{Answer, MACOS_13, Thing, answer, create_object, put, with_thing, with_vcpu, with_vm, wrong_thing};
use super::vm::{MAX_VCPUS, Vm, current};
use super::{FAILURES, complain, lock};
use crate::a64::gic::{AFFINITY, DISTRIBUTOR_SIZE, FRAME_SIZE, Frame, Gic, REDISTRIBUTOR_SIZE, SHARED};
use std::ffi::c_void;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;
use vm_accel_sys::hvf::aarch64::gic::{GICM_SET_SPI_NSR, GICM_TYPER, ICC, ICC_RPR_EL1};
use vm_accel_sys::hvf::aarch64::{HvfArm64Api, HvfArm64Functions, Object};
use vm_accel_sys::hvf::{HvReturn, code};

/// A system with a GIC.
pub static MACOS_15: HvfArm64Api = HvfArm64Api {
    functions: HvfArm64Functions {
        hv_gic_create: Some(hv_gic_create),
        hv_gic_set_spi: Some(hv_gic_set_spi),
        hv_gic_send_msi: Some(hv_gic_send_msi),
        hv_gic_get_distributor_reg: Some(hv_gic_get_distributor_reg),
        hv_gic_set_distributor_reg: Some(hv_gic_set_distributor_reg),
        hv_gic_get_redistributor_base: Some(hv_gic_get_redistributor_base),
        hv_gic_get_redistributor_reg: Some(hv_gic_get_redistributor_reg),
        hv_gic_set_redistributor_reg: Some(hv_gic_set_redistributor_reg),
        hv_gic_get_icc_reg: Some(hv_gic_get_icc_reg),
        hv_gic_set_icc_reg: Some(hv_gic_set_icc_reg),
        hv_gic_get_msi_reg: Some(hv_gic_get_msi_reg),
        hv_gic_set_msi_reg: Some(hv_gic_set_msi_reg),
        hv_gic_set_state: Some(hv_gic_set_state),
        hv_gic_reset: Some(hv_gic_reset),
        hv_gic_state_create: Some(hv_gic_state_create),
        hv_gic_state_get_size: Some(hv_gic_state_get_size),
        hv_gic_state_get_data: Some(hv_gic_state_get_data),
        hv_gic_config_create: Some(hv_gic_config_create),
        hv_gic_config_set_distributor_base: Some(hv_gic_config_set_distributor_base),
        hv_gic_config_set_redistributor_base: Some(hv_gic_config_set_redistributor_base),
        hv_gic_config_set_msi_region_base: Some(hv_gic_config_set_msi_region_base),
        hv_gic_config_set_msi_interrupt_range: Some(hv_gic_config_set_msi_interrupt_range),
        hv_gic_get_distributor_size: Some(hv_gic_get_distributor_size),
        hv_gic_get_distributor_base_alignment: Some(hv_gic_get_distributor_base_alignment),
        hv_gic_get_redistributor_region_size: Some(hv_gic_get_redistributor_region_size),
        hv_gic_get_redistributor_size: Some(hv_gic_get_redistributor_size),
        hv_gic_get_redistributor_base_alignment: Some(hv_gic_get_redistributor_base_alignment),
        hv_gic_get_msi_region_size: Some(hv_gic_get_msi_region_size),
        hv_gic_get_msi_region_base_alignment: Some(hv_gic_get_msi_region_base_alignment),
        hv_gic_get_spi_interrupt_range: Some(hv_gic_get_spi_interrupt_range),
        hv_gic_get_intid: Some(hv_gic_get_intid),
        ..MACOS_13.functions
    },
    ..MACOS_13
};

const ALIGNMENT: u64 = 0x1_0000;
const REGION_SIZE: u64 = MAX_VCPUS as u64 * REDISTRIBUTOR_SIZE;
/// `hv_gic_intid_t`, whose values are INTIDs.
const INTERRUPTS: [u16; 5] = [23, 25, 26, 27, 30];
const IROUTER: Range<u16> = 0x6100..0x7fe0;

/// A configuration: bases, and the INTIDs of MSIs.
#[derive(Debug, Clone, Default)]
pub(super) struct Config {
    distributor: Option<u64>,
    redistributors: Option<u64>,
    frame: Option<u64>,
    messages: Option<Range<u32>>,
}

/// The GIC of a VM.
pub(super) struct Device {
    pub(super) gic: Mutex<Gic>,
    distributor: u64,
    redistributors: u64,
    /// Whoever waits for an interrupt has to look again.
    changed: Condvar,
}

impl Device {
    /// A vCPU has an affinity: its redistributor is at that place in the region.
    pub(super) fn place(&self, vcpu: u64, mpidr: u64) {
        let affinity = mpidr & AFFINITY;
        let number = affinity & 0xf | (affinity >> 8 & 0xff) << 4;
        lock(&self.gic).connect(vcpu, affinity, self.redistributors + number * REDISTRIBUTOR_SIZE);
    }
}

impl Vm {
    /// Something that a vCPU may wait for has changed.
    pub(super) fn notify(&self) {
        if let Some(device) = self.gic.get() {
            device.changed.notify_all();
        }
    }

    /// Waits for that, or so long.
    pub(super) fn pause(&self, time: Duration) {
        if let Some(device) = self.gic.get() {
            drop(device.changed.wait_timeout(lock(&device.gic), time).unwrap_or_else(PoisonError::into_inner));
        }
    }
}

/// The frame of what needs a GIC.
fn with_gic(function: &'static str, call: impl FnOnce(&Arc<Vm>, &Device) -> Answer) -> HvReturn {
    with_vm(function, |vm| match vm.gic.get() {
        Some(device) => {
            let result = call(vm, device);
            vm.notify();
            result
        }
        None => {
            complain(format!("{function}: there is no GIC"));
            Err(code::NO_DEVICE)
        }
    })
}

/// The frame of what belongs to a vCPU.
fn with_port(function: &'static str, vcpu: u64, call: impl FnOnce(&mut Gic, u64) -> Answer) -> HvReturn {
    with_vcpu(function, vcpu, |vm, _| {
        let Some(device) = vm.gic.get() else {
            complain(format!("{function}: there is no GIC"));
            return Err(code::NO_DEVICE);
        };
        let gic = &mut *lock(&device.gic);
        match gic.redistributor(vcpu) {
            Some(base) => call(gic, base),
            None => {
                complain(format!("{function}: the vCPU's MPIDR_EL1 was never set"));
                Err(code::BAD_ARGUMENT)
            }
        }
    })
}

unsafe extern "C" fn hv_gic_config_create() -> Object {
    if FAILURES.check("hv_gic_config_create").is_some() {
        return std::ptr::null_mut();
    }
    if current().is_none() {
        complain("hv_gic_config_create: there is no VM");
        return std::ptr::null_mut();
    }
    create_object(Thing::Gic(Config::default()))
}

/// Setters of bases.
macro_rules! bases {
    ($($function:ident => $field:ident;)*) => {
        $(unsafe extern "C" fn $function(config: Object, base: u64) -> HvReturn {
            answer(stringify!($function), || {
                with_thing(config, |thing| match thing {
                    Thing::Gic(config) if base.is_multiple_of(ALIGNMENT) => {
                        config.$field = Some(base);
                        Ok(())
                    }
                    Thing::Gic(_) => Err(code::BAD_ARGUMENT),
                    _ => wrong_thing(),
                })
            })
        })*
    };
}

bases! {
    hv_gic_config_set_distributor_base => distributor;
    hv_gic_config_set_redistributor_base => redistributors;
    hv_gic_config_set_msi_region_base => frame;
}

unsafe extern "C" fn hv_gic_config_set_msi_interrupt_range(config: Object, first: u32, count: u32) -> HvReturn {
    answer("hv_gic_config_set_msi_interrupt_range", || {
        let end = first.checked_add(count).filter(|end| *end <= SHARED.end && first >= SHARED.start && count != 0);
        let messages = first..end.ok_or(code::BAD_ARGUMENT)?;
        with_thing(config, |thing| match thing {
            Thing::Gic(config) => {
                config.messages = Some(messages);
                Ok(())
            }
            _ => wrong_thing(),
        })
    })
}

unsafe extern "C" fn hv_gic_create(config: Object) -> HvReturn {
    with_vm("hv_gic_create", |vm| {
        let mut asked = Config::default();
        with_thing(config, |thing| match thing {
            Thing::Gic(config) => {
                asked = config.clone();
                Ok(())
            }
            _ => wrong_thing(),
        })?;
        if !lock(&vm.vcpus).is_empty() {
            complain("hv_gic_create: vCPUs exist already");
            return Err(code::ERROR);
        }
        let (Some(distributor), Some(redistributors)) = (asked.distributor, asked.redistributors) else {
            return Err(code::BAD_ARGUMENT);
        };
        let frame = asked.frame.zip(asked.messages).map(|(base, intids)| Frame { base, intids });
        let mut parts = vec![(distributor, DISTRIBUTOR_SIZE), (redistributors, REGION_SIZE)];
        parts.extend(frame.as_ref().map(|frame| (frame.base, FRAME_SIZE)));
        parts.sort_unstable();
        let overlaps = parts.windows(2).any(|two| two[1].0 - two[0].0 < two[0].1);
        if overlaps || parts.iter().any(|(base, size)| base.checked_add(*size).is_none()) {
            return Err(code::BAD_ARGUMENT);
        }
        let gic = Mutex::new(Gic::new(distributor, frame));
        let device = Device { gic, distributor, redistributors, changed: Condvar::new() };
        // A second one is refused.
        vm.gic.set(device).map_err(|_| code::FAULT)
    })
}

/// Getters of one number.
macro_rules! sizes {
    ($($function:ident => $value:expr;)*) => {
        $(unsafe extern "C" fn $function(value: *mut usize) -> HvReturn {
            // SAFETY: the caller's promise (hv_gic_parameters.h).
            answer(stringify!($function), || unsafe { put(value, $value as usize) })
        })*
    };
}

sizes! {
    hv_gic_get_distributor_size => DISTRIBUTOR_SIZE;
    hv_gic_get_distributor_base_alignment => ALIGNMENT;
    hv_gic_get_redistributor_region_size => REGION_SIZE;
    hv_gic_get_redistributor_size => REDISTRIBUTOR_SIZE;
    hv_gic_get_redistributor_base_alignment => ALIGNMENT;
    hv_gic_get_msi_region_size => FRAME_SIZE;
    hv_gic_get_msi_region_base_alignment => ALIGNMENT;
}

unsafe extern "C" fn hv_gic_get_spi_interrupt_range(first: *mut u32, count: *mut u32) -> HvReturn {
    // SAFETY: the caller's promise (hv_gic_parameters.h).
    answer("hv_gic_get_spi_interrupt_range", || unsafe {
        put(first, SHARED.start)?;
        put(count, SHARED.end - SHARED.start)
    })
}

unsafe extern "C" fn hv_gic_get_intid(interrupt: u16, intid: *mut u32) -> HvReturn {
    answer("hv_gic_get_intid", || {
        let found = INTERRUPTS.contains(&interrupt).then_some(interrupt.into());
        // SAFETY: the caller's promise (hv_gic_parameters.h).
        unsafe { put(intid, found.ok_or(code::BAD_ARGUMENT)?) }
    })
}

unsafe extern "C" fn hv_gic_set_spi(intid: u32, level: bool) -> HvReturn {
    with_gic("hv_gic_set_spi", |_, device| {
        let gic = &mut *lock(&device.gic);
        let is_message = gic.frame.as_ref().is_some_and(|frame| frame.intids.contains(&intid));
        if !SHARED.contains(&intid) || is_message {
            complain(format!("hv_gic_set_spi: {intid} has no line"));
            return Err(code::BAD_ARGUMENT);
        }
        gic.set_line(0, intid, level);
        Ok(())
    })
}

unsafe extern "C" fn hv_gic_send_msi(address: u64, intid: u32) -> HvReturn {
    with_gic("hv_gic_send_msi", |_, device| {
        let gic = &mut *lock(&device.gic);
        let doorbell = gic.frame.as_ref().map(|frame| frame.base + u64::from(GICM_SET_SPI_NSR));
        if doorbell == Some(address) && gic.message(intid) {
            return Ok(());
        }
        complain(format!("hv_gic_send_msi: {intid} to {address:#x} is no message"));
        Err(code::BAD_ARGUMENT)
    })
}

/// Registers by address, of one width.
fn width(reg: u16) -> usize {
    if IROUTER.contains(&reg) { 8 } else { 4 }
}

unsafe extern "C" fn hv_gic_get_distributor_reg(reg: u16, value: *mut u64) -> HvReturn {
    with_gic("hv_gic_get_distributor_reg", |_, device| {
        let read = lock(&device.gic).read(device.distributor + u64::from(reg), width(reg));
        // SAFETY: the caller's promise (hv_gic.h).
        unsafe { put(value, read) }
    })
}

unsafe extern "C" fn hv_gic_set_distributor_reg(reg: u16, value: u64) -> HvReturn {
    with_gic("hv_gic_set_distributor_reg", |_, device| {
        lock(&device.gic).write(device.distributor + u64::from(reg), width(reg), value);
        Ok(())
    })
}

unsafe extern "C" fn hv_gic_get_msi_reg(reg: u16, value: *mut u64) -> HvReturn {
    with_gic("hv_gic_get_msi_reg", |_, device| {
        let gic = &mut *lock(&device.gic);
        let base = gic.frame.as_ref().map(|frame| frame.base).filter(|_| [GICM_TYPER, GICM_SET_SPI_NSR].contains(&reg));
        let read = gic.read(base.ok_or(code::BAD_ARGUMENT)? + u64::from(reg), 4);
        // SAFETY: the caller's promise (hv_gic.h).
        unsafe { put(value, read) }
    })
}

unsafe extern "C" fn hv_gic_set_msi_reg(reg: u16, value: u64) -> HvReturn {
    with_gic("hv_gic_set_msi_reg", |_, device| {
        let gic = &mut *lock(&device.gic);
        if reg == GICM_SET_SPI_NSR && gic.message(value as u32) { Ok(()) } else { Err(code::BAD_ARGUMENT) }
    })
}

unsafe extern "C" fn hv_gic_get_redistributor_base(vcpu: u64, address: *mut u64) -> HvReturn {
    // SAFETY: the caller's promise (hv_gic.h).
    with_port("hv_gic_get_redistributor_base", vcpu, |_, base| unsafe { put(address, base) })
}

unsafe extern "C" fn hv_gic_get_redistributor_reg(vcpu: u64, reg: u32, value: *mut u64) -> HvReturn {
    with_port("hv_gic_get_redistributor_reg", vcpu, |gic, base| {
        let read = gic.read(base + u64::from(reg), if reg == 8 { 8 } else { 4 });
        // SAFETY: the caller's promise (hv_gic.h).
        unsafe { put(value, read) }
    })
}

unsafe extern "C" fn hv_gic_set_redistributor_reg(vcpu: u64, reg: u32, value: u64) -> HvReturn {
    with_port("hv_gic_set_redistributor_reg", vcpu, |gic, base| {
        gic.write(base + u64::from(reg), 4, value);
        Ok(())
    })
}

unsafe extern "C" fn hv_gic_get_icc_reg(vcpu: u64, reg: u16, value: *mut u64) -> HvReturn {
    with_port("hv_gic_get_icc_reg", vcpu, |gic, _| {
        let known = ICC.contains(&reg) || reg == ICC_RPR_EL1;
        let read = known.then(|| gic.read_register(vcpu, reg)).flatten().ok_or(code::BAD_ARGUMENT)?;
        // SAFETY: the caller's promise (hv_gic.h).
        unsafe { put(value, read) }
    })
}

unsafe extern "C" fn hv_gic_set_icc_reg(vcpu: u64, reg: u16, value: u64) -> HvReturn {
    with_port("hv_gic_set_icc_reg", vcpu, |gic, _| {
        let written = ICC.contains(&reg).then(|| gic.write_register(vcpu, reg, value)).flatten();
        written.ok_or(code::BAD_ARGUMENT)
    })
}

unsafe extern "C" fn hv_gic_set_state(state: *const c_void, size: usize) -> HvReturn {
    with_gic("hv_gic_set_state", |vm, device| {
        if state.is_null() || lock(&vm.vcpus).is_empty() || vm.has_run.load(Ordering::SeqCst) {
            complain("hv_gic_set_state: no state, there are no vCPUs, or they have run");
            return Err(code::ERROR);
        }
        // SAFETY: the caller's promise (hv_gic.h): that many bytes.
        let bytes = unsafe { std::slice::from_raw_parts(state.cast::<u8>(), size) };
        if lock(&device.gic).restore(bytes) { Ok(()) } else { Err(code::BAD_ARGUMENT) }
    })
}

unsafe extern "C" fn hv_gic_reset() -> HvReturn {
    with_gic("hv_gic_reset", |_, device| {
        lock(&device.gic).reset();
        Ok(())
    })
}

unsafe extern "C" fn hv_gic_state_create() -> Object {
    if FAILURES.check("hv_gic_state_create").is_some() {
        return std::ptr::null_mut();
    }
    let vm = current().filter(|vm| vm.running.load(Ordering::SeqCst) == 0);
    let state = vm.and_then(|vm| vm.gic.get().map(|device| lock(&device.gic).save()));
    state.map_or_else(std::ptr::null_mut, |state| create_object(Thing::State(state)))
}

unsafe extern "C" fn hv_gic_state_get_size(state: Object, size: *mut usize) -> HvReturn {
    answer("hv_gic_state_get_size", || {
        with_thing(state, |thing| match thing {
            // SAFETY: the caller's promise (hv_gic_state.h).
            Thing::State(state) => unsafe { put(size, state.len()) },
            _ => wrong_thing(),
        })
    })
}

unsafe extern "C" fn hv_gic_state_get_data(state: Object, data: *mut c_void) -> HvReturn {
    answer("hv_gic_state_get_data", || {
        with_thing(state, |thing| match thing {
            Thing::State(_) if data.is_null() => Err(code::BAD_ARGUMENT),
            Thing::State(state) => {
                // SAFETY: the caller's promise (hv_gic_state.h): room for as many bytes as were told.
                unsafe { std::ptr::copy_nonoverlapping(state.as_ptr(), data.cast(), state.len()) };
                Ok(())
            }
            _ => wrong_thing(),
        })
    })
}
