//! Each call of WHPX on arm64 fails once, with each code that it may fail with: the error surfaces, nothing panics, nothing leaks. And
//! what the backend does about a platform that is not there, keeps features from being hidden, or leaves for unknown reasons.

use vm_accel::aarch64::{self, Aarch64Events, Aarch64Features, Aarch64MpState, VirtualTimer, ppi_line, spi_line};
use vm_accel::platform::whpx::aarch64::AccelWhpx;
use vm_accel::{
    Accel, AccelError, GuestRegion, IrqChip, MemoryFlags, RawCode, UnavailableReason, VcpuExit, VcpuOps, VcpuResult,
};
use vm_accel_sim::hostile::Failure;
use vm_accel_sim::whpx_arm64::{
    API, FAILURES, first_release, leave_once_with, live_partitions, reset, set_fixed_features, set_hypervisor_present,
    set_released,
};
use vm_accel_sys::whpx::aarch64::{WhpApi, exit_reason};
use vm_accel_sys::whpx::code::hv::{ERROR_HV_INSUFFICIENT_MEMORY, ERROR_HV_INVALID_REGISTER_VALUE};
use vm_accel_sys::whpx::code::*;

/// What functions of the platform answer (Microsoft's documentation of each, winerror.h).
const CODES: [HRESULT; 14] = [
    E_INVALIDARG,
    E_OUTOFMEMORY,
    E_ACCESSDENIED,
    WHV_E_UNKNOWN_CAPABILITY,
    WHV_E_INSUFFICIENT_BUFFER,
    WHV_E_UNKNOWN_PROPERTY,
    WHV_E_UNSUPPORTED_HYPERVISOR_CONFIG,
    WHV_E_INVALID_PARTITION_CONFIG,
    WHV_E_GPA_RANGE_NOT_FOUND,
    WHV_E_VP_ALREADY_EXISTS,
    WHV_E_INVALID_VP_STATE,
    WHV_E_INVALID_VP_REGISTER_NAME,
    ERROR_HV_INVALID_REGISTER_VALUE,
    ERROR_HV_INSUFFICIENT_MEMORY,
];

/// Failures of one function with one code that are tried at most, one call after the other.
const DEPTH: u32 = 24;

const RAM: u64 = 0x4000_0000;
const DEVICE: u64 = 0x0a00_0000;

mod word {
    /// x1 = 0x0a00_0000, where nothing is.
    pub(crate) const MOVZ_X1_DEVICE: u32 = 0xd2a1_4001;
    pub(crate) const MOVZ_X2_RAM: u32 = 0xd2a8_0002;
    pub(crate) const STR_X0_X1: u32 = 0xf900_0020;
    pub(crate) const STR_X0_X2_4000: u32 = 0xf920_0040;
    pub(crate) const LDP_X3_X4_X1: u32 = 0xa940_1023;
    pub(crate) const LDR_Q5_X1: u32 = 0x3dc0_0025;
    pub(crate) const HVC: u32 = 0xd400_0002;
    /// x0 = 0xc300_0001, a call to the OEM's services.
    pub(crate) const OEM_CALL: [u32; 2] = [0x5280_0020, 0x72b8_6000];
    pub(crate) const BRANCH_HERE: u32 = 0x1400_0000;
}

fn machine(program: &[u32], flags: MemoryFlags) -> VcpuResult<(AccelWhpx, Box<dyn VcpuOps>)> {
    let mut vm = AccelWhpx::with_api(&API)?;
    vm.create_irqchip(IrqChip::Kernel)?;
    let ram = GuestRegion::anonymous(0x1_0000)?;
    let bytes: Vec<u8> = program.iter().flat_map(|word| word.to_le_bytes()).collect();
    ram.write(0, &bytes)?;
    vm.map_memory(RAM, &ram, flags)?;
    let mut vcpu = vm.create_vcpu(0)?;
    let arm = vcpu.as_aarch64().expect("an aarch64 backend");
    arm.set_sys_reg(aarch64::CPACR_EL1, 3 << 20)?;
    arm.set_sys_reg(aarch64::VBAR_EL1, RAM + 0x800)?;
    let mut regs = vcpu.get_regs()?;
    regs.pc = RAM;
    vcpu.set_regs(&regs)?;
    Ok((vm, vcpu))
}

/// A guest that makes every kind of exit, and a caller that uses every group of state.
fn scenario() -> VcpuResult<()> {
    let [low, high] = word::OEM_CALL;
    let program = [
        word::MOVZ_X1_DEVICE,
        word::MOVZ_X2_RAM,
        word::STR_X0_X1,
        word::STR_X0_X2_4000,
        word::LDP_X3_X4_X1,
        word::LDR_Q5_X1,
        low,
        high,
        word::HVC,
        word::STR_X0_X1,
        word::BRANCH_HERE,
    ];
    AccelWhpx::probe_with(&API)?;
    let (mut vm, mut vcpu) = machine(&program, MemoryFlags::RAM | MemoryFlags::LOG_DIRTY)?;
    vcpu.kick_handle()?.kick();
    let mut exits = Vec::new();
    let store = VcpuExit::Mmio { addr: DEVICE, size: 8, is_write: true };
    while exits.iter().filter(|exit| **exit == store).count() < 2 {
        let exit = vcpu.run()?;
        exits.push(exit);
        match exit {
            VcpuExit::Mmio { is_write: false, size, .. } => vcpu.complete_read(&vec![0; size.into()])?,
            VcpuExit::Mmio { .. } | VcpuExit::Interrupt | VcpuExit::SystemCall => {}
            other => panic!("{other:?} after {exits:?}"),
        }
    }
    // Where the platform does not say that calls leave it answers them.
    let has_called = exits.contains(&VcpuExit::SystemCall) == vm.capabilities().aarch64_calls;
    assert!(exits.contains(&VcpuExit::Interrupt) && has_called, "{exits:?}");
    vcpu.quiesce()?;
    let fpu = vcpu.get_fpu_regs()?;
    vcpu.set_fpu_regs(&fpu)?;
    let arm = vcpu.as_aarch64().expect("aarch64");
    for register in arm.list_sys_regs()? {
        arm.get_sys_reg(register)?;
    }
    let saved = arm.save_registers()?;
    arm.restore_registers(&saved)?;
    let timer = arm.get_virtual_timer()?;
    arm.set_virtual_timer(&VirtualTimer { control: 1, compare: u64::MAX, ..timer })?;
    arm.set_mp_state(Aarch64MpState::Running)?;
    assert_eq!(arm.get_mp_state()?, Aarch64MpState::Running);
    vm.set_irq_line(spi_line(40), true)?;
    vm.set_irq_line(ppi_line(0, 20), false)?;
    // Another one, off.
    let mut second = vm.create_vcpu(1)?;
    assert_eq!(second.as_aarch64().expect("aarch64").get_mp_state()?, Aarch64MpState::PoweredOff);
    assert!(vm.take_dirty(RAM)?.is_dirty(RAM + 0x4000));
    vm.protect_memory(RAM, MemoryFlags::RAM)?;
    vm.unmap_memory(RAM)
}

/// Whether an error says that it is this failure.
fn tells(error: &AccelError, failure: &Failure) -> bool {
    let raw = |op: &str, code: &RawCode| op == failure.function && *code == RawCode::Hresult(failure.code);
    match error {
        AccelError::Backend { op, code, .. } => raw(op, code),
        AccelError::Unavailable { reason: UnavailableReason::Failed { op, code }, .. } => raw(op, code),
        _ => false,
    }
}

/// Failures that the backend is right to survive, or to tell as something else that follows.
fn is_survived(failure: &Failure) -> bool {
    match (failure.function, failure.code) {
        // What is not known is absent.
        ("WHvGetCapability", WHV_E_UNKNOWN_CAPABILITY) => true,
        // Nobody is left who could be told.
        ("WHvDeletePartition" | "WHvDeleteVirtualProcessor", _) => true,
        // Repeated until it is heard.
        ("WHvCancelRunVirtualProcessor", _) => true,
        // An older release: the register is not there.
        ("WHvGetVirtualProcessorRegisters", WHV_E_INVALID_VP_REGISTER_NAME) => true,
        // What cannot be hidden is shown, and told by the vCPU: seven fields of the simulated host.
        ("WHvSetVirtualProcessorRegisters", _) => failure.after < 7,
        _ => false,
    }
}

fn every_failure_surfaces_as_itself() {
    assert_eq!(live_partitions(), 0);
    scenario().expect("nothing fails");
    assert_eq!(live_partitions(), 0);
    let (mut tried, mut leaked) = (0, 0);
    for function in WhpApi::REQUIRED.iter().chain(WhpApi::OPTIONAL) {
        for code in CODES {
            for after in 0..DEPTH {
                let failure = Failure { function, after, code };
                FAILURES.set(Some(failure));
                let result = scenario();
                let happened = !FAILURES.is_waiting();
                FAILURES.set(None);
                if !happened {
                    result.unwrap_or_else(|error| panic!("{failure:?} did not happen, and yet: {error}"));
                    break;
                }
                tried += 1;
                leaked += usize::from(*function == "WHvDeletePartition");
                assert_eq!(live_partitions(), leaked, "{failure:?} leaks the partition");
                match result {
                    Ok(()) => assert!(is_survived(&failure), "{failure:?} was not noticed"),
                    Err(error) => {
                        assert!(tells(&error, &failure) || is_survived(&failure), "{failure:?} surfaced as {error:?}");
                    }
                }
            }
        }
    }
    assert!(tried > 14 * 40, "only {tried} failures happened");
}

/// Exits that the backend did not ask for, or that nobody knows yet, are told as what they are and change nothing.
fn unknown_reasons() {
    let (_vm, mut vcpu) = machine(&[word::MOVZ_X1_DEVICE, word::STR_X0_X1], MemoryFlags::RAM).expect("a machine");
    let store = VcpuExit::Mmio { addr: DEVICE, size: 8, is_write: true };
    for reason in [1, 0x2001, 0x8000_0022, 0x8000_0062, 0x8001_0006, 0x8000_7777] {
        leave_once_with(reason);
        assert_eq!(vcpu.run(), Ok(VcpuExit::Unknown), "{reason:#x}");
        assert_eq!(vcpu.raw_exit(), Some(reason.into()));
    }
    leave_once_with(exit_reason::UNRECOVERABLE_EXCEPTION);
    assert_eq!(vcpu.run(), Ok(VcpuExit::Shutdown));
    leave_once_with(exit_reason::INVALID_VP_REGISTER_VALUE);
    assert!(matches!(vcpu.run(), Err(AccelError::EntryFailed { .. })));
    assert_eq!(vcpu.run(), Ok(store));
}

/// An access that fails: the guest takes an external abort with the address.
fn an_access_can_be_refused() {
    let (_vm, mut vcpu) = machine(&[word::MOVZ_X1_DEVICE, word::LDP_X3_X4_X1], MemoryFlags::RAM).expect("a machine");
    let again = Aarch64Events { external_abort: true, ..Aarch64Events::default() };
    assert!(vcpu.as_aarch64().expect("aarch64").set_events(&again).is_err(), "no access waits");
    assert!(matches!(vcpu.run(), Ok(VcpuExit::Mmio { is_write: false, .. })));
    let arm = vcpu.as_aarch64().expect("aarch64");
    arm.set_events(&again).expect("an access waits");
    assert_eq!(arm.get_sys_reg(aarch64::ESR_EL1), Ok(0x25 << 26 | 1 << 25 | 0x10));
    assert_eq!(arm.get_sys_reg(aarch64::FAR_EL1), Ok(DEVICE));
    assert_eq!(arm.get_sys_reg(aarch64::ELR_EL1), Ok(RAM + 4));
    assert_eq!(vcpu.get_regs().map(|regs| regs.pc), Ok(RAM + 0x800 + 0x200));
    assert!(vcpu.pending_access().is_none());
}

/// Feature registers that cannot be written: guests see SVE, whose registers cannot be kept.
fn features_that_cannot_be_hidden() {
    set_fixed_features(true);
    let (_vm, mut vcpu) = machine(&[word::BRANCH_HERE], MemoryFlags::RAM).expect("a machine");
    set_fixed_features(false);
    let arm = vcpu.as_aarch64().expect("aarch64");
    assert!(arm.features().contains(Aarch64Features::SVE | Aarch64Features::PMU));
    assert!(arm.save_registers().is_err_and(|error| error.is_absent()));
}

fn kicks_outlive_the_machine() {
    let (vm, vcpu) = machine(&[word::BRANCH_HERE], MemoryFlags::RAM).expect("a machine");
    let kick = vcpu.kick_handle().expect("there is one");
    let lines = vm.irq_handle().expect("there is a GIC");
    drop(vcpu);
    drop(vm);
    kick.kick();
    assert_eq!(live_partitions(), 1, "the handle keeps the controller");
    lines.set_line(spi_line(40), true).expect("it is there still");
    drop(lines);
    assert_eq!(live_partitions(), 0);
    kick.kick();
}

fn absence_has_reasons() {
    set_hypervisor_present(false);
    let error = AccelWhpx::probe_with(&API).expect_err("no hypervisor");
    set_hypervisor_present(true);
    assert!(matches!(error, AccelError::Unavailable { reason: UnavailableReason::FeatureOff { .. }, .. }), "{error:?}");
    set_released(false);
    let error = AccelWhpx::with_api(&API).expect_err("a preview");
    set_released(true);
    let reason = UnavailableReason::UnsupportedHardware { detail: String::new() };
    let AccelError::Unavailable { reason: told, .. } = error else { panic!("{error:?}") };
    assert_eq!(std::mem::discriminant(&told), std::mem::discriminant(&reason));
    let caps = AccelWhpx::probe_with(first_release()).expect("older, and enough");
    assert!(!caps.dirty_log);
    let mut vm = AccelWhpx::with_api(first_release()).expect("a machine");
    let ram = GuestRegion::anonymous(0x1000).expect("memory");
    assert!(vm.map_memory(RAM, &ram, MemoryFlags::RAM | MemoryFlags::LOG_DIRTY).is_err_and(|error| error.is_absent()));
}

/// One test, because knobs and the plan of failures are the process's.
#[test]
fn whpx_on_arm64() {
    reset();
    unknown_reasons();
    an_access_can_be_refused();
    features_that_cannot_be_hidden();
    kicks_outlive_the_machine();
    absence_has_reasons();
    every_failure_surfaces_as_itself();
}
