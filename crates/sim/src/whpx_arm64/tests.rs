//! The facade, called as a VMM calls it.

use super::{API, live_partitions, reset};
use std::ffi::c_void;
use std::ptr::null_mut;
use std::sync::{Mutex, MutexGuard, PoisonError};
use vm_accel_sys::whpx::HRESULT;
use vm_accel_sys::whpx::aarch64::{
    ANY_VP, ExitContext, IcParameters, InterruptControl, InterruptKind, RegisterName, RegisterValue, exit_reason,
    feature, property, register,
};
use vm_accel_sys::whpx::code::*;
use vm_accel_sys::whpx::map_flag;

const CODE: u64 = 0x4000_0000;
const GICD: u64 = 0x0800_0000;
const GICR: u64 = 0x1000_0000;

/// Knobs are the process's, and so are failures.
static ALONE: Mutex<()> = Mutex::new(());

/// Page-aligned memory that a guest may write.
#[repr(C, align(4096))]
struct Page([u32; 1024]);

struct Machine {
    handle: isize,
    page: Box<Page>,
    _alone: MutexGuard<'static, ()>,
}

fn words(value: u64) -> RegisterValue {
    RegisterValue { low: value, high: 0 }
}

impl Machine {
    /// A partition that nobody set up.
    fn bare() -> Self {
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        reset();
        let mut handle = 0;
        // SAFETY: the pointer is that of a local variable.
        assert_eq!(unsafe { (API.WHvCreatePartition)(&mut handle) }, 0);
        Self { handle, page: Box::new(Page([0; 1024])), _alone: alone }
    }

    fn property<T>(&self, code: u32, value: T) -> HRESULT {
        let from: *const c_void = (&raw const value).cast();
        // SAFETY: the pointer is that of a local variable of that size.
        unsafe { (API.WHvSetPartitionProperty)(self.handle, code, from, size_of::<T>() as u32) }
    }

    fn gic() -> IcParameters {
        IcParameters {
            emulation_mode: 1,
            gicd_base_address: GICD,
            gic_ppi_overflow_interrupt_from_cntv: 27,
            gic_ppi_performance_monitors_interrupt: 23,
            ..IcParameters::default()
        }
    }

    /// Processor 0 at a program.
    fn at(program: &[u32]) -> Self {
        let mut new = Self::bare();
        assert_eq!(new.property(property::PROCESSOR_COUNT, 2u32), 0);
        assert_eq!(new.property(property::ARM64_IC_PARAMETERS, Self::gic()), 0);
        new.page.0[..program.len()].copy_from_slice(program);
        // SAFETY: the page lives longer than the partition; see `drop`.
        unsafe {
            assert_eq!((API.WHvSetupPartition)(new.handle), 0);
            assert_eq!(
                new.map(CODE, map_flag::READ | map_flag::WRITE | map_flag::EXECUTE | map_flag::TRACK_DIRTY_PAGES),
                0
            );
            assert_eq!((API.WHvCreateVirtualProcessor)(new.handle, 0, 0), 0);
        }
        let values = [GICR, CODE, 0x3c5, 0x30d0_0800].map(words);
        let names = [register::GICR_BASE_GPA, register::PC, register::PSTATE, 0x4_0002];
        assert_eq!(new.set(0, &names, &values), 0);
        new
    }

    fn map(&mut self, gpa: u64, flags: i32) -> HRESULT {
        // SAFETY: the page lives longer than the partition; see `drop`.
        unsafe { (API.WHvMapGpaRange)(self.handle, (&raw mut *self.page).cast(), gpa, 4096, flags) }
    }

    fn set(&self, vp: u32, names: &[RegisterName], values: &[RegisterValue]) -> HRESULT {
        let count = names.len() as u32;
        // SAFETY: the arrays are that long.
        unsafe { (API.WHvSetVirtualProcessorRegisters)(self.handle, vp, names.as_ptr(), count, values.as_ptr()) }
    }

    fn get(&self, vp: u32, name: RegisterName) -> Result<RegisterValue, HRESULT> {
        let mut value = RegisterValue::default();
        // SAFETY: arrays of one.
        match unsafe { (API.WHvGetVirtualProcessorRegisters)(self.handle, vp, &name, 1, &mut value) } {
            0 => Ok(value),
            code => Err(code),
        }
    }

    fn run(&self) -> ExitContext {
        let mut context = ExitContext::default();
        let size = size_of::<ExitContext>() as u32;
        // SAFETY: the pointer is that of a local variable of that size.
        assert_eq!(unsafe { (API.WHvRunVirtualProcessor)(self.handle, 0, &mut context, size) }, 0);
        context
    }

    fn cancel(&self) {
        // SAFETY: no preconditions.
        assert_eq!(unsafe { (API.WHvCancelRunVirtualProcessor)(self.handle, 0, 0) }, 0);
    }

    fn line(&self, intid: u32, level: u64) -> HRESULT {
        let control = InterruptControl {
            kind: InterruptKind(0).with_asserted(level),
            requested_vector: intid,
            ..InterruptControl::default()
        };
        // SAFETY: the pointer is that of a local variable of that size.
        unsafe { (API.WHvRequestInterrupt)(self.handle, &control, size_of::<InterruptControl>() as u32) }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // SAFETY: the handle is not used again.
        assert_eq!(unsafe { (API.WHvDeletePartition)(self.handle) }, 0);
        assert_eq!(live_partitions(), 0);
    }
}

mod word {
    /// x1 = 0x0a00_0000, where nothing is.
    pub(super) const MOVZ_X1_DEVICE: u32 = 0xd2a1_4001;
    pub(super) const STR_W0_X1: u32 = 0xb900_0020;
    pub(super) const HVC: u32 = 0xd400_0002;
    pub(super) const WFI: u32 = 0xd503_207f;
    /// x0 = 0x8400_0008, SYSTEM_OFF.
    pub(super) const SYSTEM_OFF: [u32; 2] = [0x5280_0100, 0x72b0_8000];
    /// x2 = 0x4000_0000, where the program is.
    pub(super) const MOVZ_X2_CODE: u32 = 0xd2a8_0002;
    pub(super) const STR_X0_X2_800: u32 = 0xf904_0040;
    /// x0 = ICC_IAR1_EL1.
    pub(super) const MRS_X0_IAR1: u32 = 0xd538_cc00;
}

#[test]
fn order_of_calls_and_properties_is_checked() {
    let mut machine = Machine::bare();
    let set_up = |machine: &Machine| {
        // SAFETY: no preconditions.
        unsafe { (API.WHvSetupPartition)(machine.handle) }
    };
    assert_eq!(machine.map(CODE, map_flag::READ), WHV_E_INVALID_PARTITION_CONFIG);
    assert_eq!(machine.property(property::PROCESSOR_COUNT, 0u32), E_INVALIDARG);
    assert_eq!(machine.property(0x7777, 0u32), WHV_E_UNKNOWN_PROPERTY);
    assert_eq!(machine.property(property::PROCESSOR_COUNT, 1u32), 0);
    assert_eq!(set_up(&machine), WHV_E_INVALID_PARTITION_CONFIG, "there is no GIC");
    for bad in [
        IcParameters { emulation_mode: 0, ..Machine::gic() },
        IcParameters { gicd_base_address: 0x1000, ..Machine::gic() },
        IcParameters { gic_ppi_overflow_interrupt_from_cntv: 40, ..Machine::gic() },
        IcParameters { reserved: 1, ..Machine::gic() },
    ] {
        assert_eq!(machine.property(property::ARM64_IC_PARAMETERS, bad), E_INVALIDARG, "{bad:x?}");
    }
    assert_eq!(machine.property(property::ARM64_IC_PARAMETERS, Machine::gic()), 0);
    assert_eq!(set_up(&machine), 0);
    assert_eq!(machine.property(property::PROCESSOR_COUNT, 1u32), E_INVALIDARG, "too late");
    // SAFETY: no preconditions.
    unsafe {
        assert_eq!((API.WHvCreateVirtualProcessor)(machine.handle, 1, 0), E_INVALIDARG);
        assert_eq!((API.WHvCreateVirtualProcessor)(machine.handle, 0, 0), 0);
        assert_eq!((API.WHvCreateVirtualProcessor)(machine.handle, 0, 0), WHV_E_VP_ALREADY_EXISTS);
    }
    assert_eq!(machine.get(1, register::PC), Err(WHV_E_VP_DOES_NOT_EXIST));
}

#[test]
fn feature_registers_are_the_partitions_and_all_others_are_not() {
    let machine = Machine::at(&[]);
    assert_eq!(machine.get(0, feature(0xc020)), Err(WHV_E_INVALID_VP_REGISTER_NAME));
    assert_eq!(machine.get(ANY_VP, register::PC), Err(WHV_E_INVALID_VP_REGISTER_NAME));
    assert_eq!(machine.get(0, 0x7777), Err(WHV_E_INVALID_VP_REGISTER_NAME));
    let shown = machine.get(ANY_VP, feature(0xc020)).expect("there is one");
    assert_ne!(shown.low >> 32 & 0xf, 0, "SVE");
    assert_eq!(machine.set(ANY_VP, &[feature(0xc020)], &[words(0x11)]), 0);
    assert_eq!(machine.get(ANY_VP, feature(0xc020)), Ok(words(0x11)));
    super::set_fixed_features(true);
    assert_eq!(machine.set(ANY_VP, &[feature(0xc020)], &[words(0x22)]), E_ACCESSDENIED);
}

#[test]
fn an_abort_leaves_with_its_syndrome_and_the_instruction_undone() {
    let machine = Machine::at(&[word::MOVZ_X1_DEVICE, word::STR_W0_X1]);
    for _ in 0..2 {
        let context = machine.run();
        let access = context.memory_access();
        assert_eq!((context.reason, access.gpa, access.header.pc), (exit_reason::UNMAPPED_GPA, 0x0a00_0000, CODE + 4));
        // ISV, 4 bytes, X0, write.
        assert_eq!((access.syndrome >> 26, access.syndrome >> 22 & 7, access.syndrome >> 6 & 1), (0x24, 4 | 2, 1));
        assert_eq!(u32::from_le_bytes(access.instruction_bytes), word::STR_W0_X1);
        assert_eq!(machine.get(0, register::PC), Ok(words(CODE + 4)));
    }
}

#[test]
fn psci_is_the_hypervisors_but_for_the_end() {
    let [low, high] = word::SYSTEM_OFF;
    let machine = Machine::at(&[low, high, word::HVC]);
    let context = machine.run();
    assert_eq!((context.reason, context.reset().reset_type), (exit_reason::ARM64_RESET, 0));
}

#[test]
fn a_cancellation_waits_for_the_next_run_and_ends_a_wait() {
    let machine = Machine::at(&[word::WFI]);
    machine.cancel();
    machine.cancel();
    assert_eq!(machine.run().reason, exit_reason::CANCELED);
    assert_eq!(machine.get(0, register::PC), Ok(words(CODE)));
    std::thread::scope(|scope| {
        let waits = scope.spawn(|| machine.run().reason);
        // Whether it is in there already makes no difference.
        machine.cancel();
        assert_eq!(waits.join().ok(), Some(exit_reason::CANCELED));
    });
}

#[test]
fn an_interrupt_that_nobody_enabled_is_none() {
    let machine = Machine::at(&[word::MRS_X0_IAR1, word::MOVZ_X1_DEVICE, word::STR_W0_X1]);
    assert_eq!(machine.line(40, 1), 0);
    assert_eq!((machine.line(3, 1), machine.line(1020, 1)), (E_INVALIDARG, E_INVALIDARG));
    assert_eq!(machine.run().reason, exit_reason::UNMAPPED_GPA);
    assert_eq!(machine.get(0, register::X0), Ok(words(1023)));
}

#[test]
fn the_dirty_log_is_cleared_by_reading() {
    let machine = Machine::at(&[word::MOVZ_X2_CODE, word::STR_X0_X2_800, word::MOVZ_X1_DEVICE, word::STR_W0_X1]);
    machine.run();
    let query = API.WHvQueryGpaRangeDirtyBitmap.expect("this Windows has it");
    let mut dirty = 0;
    let mut take = |gpa| {
        // SAFETY: the pointer is that of a local variable of that size.
        (unsafe { query(machine.handle, gpa, 4096, &mut dirty, 8) }, dirty)
    };
    assert_eq!(take(CODE), (0, 1));
    assert_eq!(take(CODE), (0, 0));
    assert_eq!(take(CODE + 4096).0, WHV_E_GPA_RANGE_NOT_FOUND);
}

#[test]
fn mappings_replace_one_another_and_go() {
    let mut machine = Machine::at(&[word::MOVZ_X1_DEVICE, word::STR_W0_X1]);
    assert_eq!(machine.map(0x0a00_0000, map_flag::READ), 0);
    let context = machine.run();
    assert_eq!(context.reason, exit_reason::GPA_INTERCEPT, "it is read-only");
    assert_eq!(machine.map(0x0a00_0000, map_flag::READ | map_flag::WRITE), 0);
    // What is behind it is the program: it runs into data.
    // SAFETY: no preconditions.
    unsafe {
        assert_eq!((API.WHvUnmapGpaRange)(machine.handle, 0x0a00_0000, 4096), 0);
        assert_eq!((API.WHvUnmapGpaRange)(machine.handle, 0x0a00_0000, 4096), WHV_E_GPA_RANGE_NOT_FOUND);
        assert_eq!((API.WHvMapGpaRange)(machine.handle, null_mut(), 1, 4096, 1), E_INVALIDARG);
    }
    assert_eq!(machine.run().reason, exit_reason::UNMAPPED_GPA);
}
