//! HVF on Apple silicon: each call fails once, with each code that it may fail with, and the error surfaces; and the rules
//! about threads, the one virtual machine, calls and interrupts.
//!
//! One test function: the platform, its plan of failures and its knobs are the process's.

use std::sync::mpsc::channel;
use vm_accel::aarch64::{self, Aarch64Events, GicState, MsiFrame, PSTATE_EL1H_MASKED, VirtualTimer};
use vm_accel::platform::hvf::aarch64::AccelHvf;
use vm_accel::{
    Accel, AccelError, BreakOn, GuestDebug, GuestRegion, HardwareBreakpoint, IrqChip, MemoryFlags, MsiMessage, RawCode,
    UnavailableReason, VcpuExit, VcpuOps, VcpuResult,
};
use vm_accel_sim::hostile::Failure;
use vm_accel_sim::hvf_arm64::{
    FAILURES, MACOS_11, MACOS_13, MACOS_15, complaints, end_process, live_vcpus, reset, set_next_exit,
};
use vm_accel_sys::hvf::aarch64::{HvfArm64Api, HvfArm64Functions};
use vm_accel_sys::hvf::code::*;

/// hv_error.h.
const CODES: [i32; 8] = [ERROR, BUSY, BAD_ARGUMENT, NO_RESOURCES, NO_DEVICE, DENIED, FAULT, UNSUPPORTED];

/// Functions that answer no code.
const OBJECTS: [&str; 2] = ["hv_gic_config_create", "hv_gic_state_create"];

/// Calls of one function whose failure is tried, one after the other.
const DEPTH: u32 = 4;

const RAM: u64 = 0x4000_0000;
const ICC_PMR: u16 = aarch64::sys_reg(3, 0, 4, 6, 0);

mod word {
    pub(crate) const WFI: u32 = 0xd503_207f;
    pub(crate) const NOP: u32 = 0xd503_201f;
    /// x1 = 0x0a00_0000, where nothing is.
    pub(crate) const MOVZ_X1_DEVICE: u32 = 0xd2a1_4001;
    /// x1 = 0x4000_0000, where RAM is.
    pub(crate) const MOVZ_X2_RAM: u32 = 0xd2a8_0002;
    pub(crate) const STR_X0_X1: u32 = 0xf900_0020;
    pub(crate) const STR_X0_X2_4000: u32 = 0xf920_0040;
    pub(crate) const LDP_X3_X4_X1: u32 = 0xa940_1023;
    pub(crate) const LDR_Q5_X1: u32 = 0x3dc0_0025;
    pub(crate) const HVC: u32 = 0xd400_0002;
    pub(crate) const SMC: u32 = 0xd400_0003;
    pub(crate) const MRS_X0_PMCR: u32 = 0xd53b_9c00;
    pub(crate) const BRANCH_HERE: u32 = 0x1400_0000;
}

/// A machine with this program, logged memory and a vCPU that is not yet the platform's.
fn machine(api: &'static HvfArm64Api, program: &[u32]) -> VcpuResult<(AccelHvf, Box<dyn VcpuOps>)> {
    build(api, IrqChip::None, program)
}

fn build(api: &'static HvfArm64Api, chip: IrqChip, program: &[u32]) -> VcpuResult<(AccelHvf, Box<dyn VcpuOps>)> {
    let mut vm = AccelHvf::with_api(api)?;
    vm.create_irqchip(chip)?;
    let ram = GuestRegion::anonymous(0x1_0000)?;
    let bytes: Vec<u8> = program.iter().flat_map(|word| word.to_le_bytes()).collect();
    ram.write(0, &bytes)?;
    vm.map_memory(RAM, &ram, MemoryFlags::RAM | MemoryFlags::LOG_DIRTY)?;
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
fn scenario(api: &'static HvfArm64Api) -> VcpuResult<()> {
    let program = [
        word::MOVZ_X1_DEVICE,
        word::MOVZ_X2_RAM,
        word::STR_X0_X1,
        word::STR_X0_X2_4000,
        word::LDP_X3_X4_X1,
        word::LDR_Q5_X1,
        word::MRS_X0_PMCR,
        word::SMC,
        word::HVC,
        word::STR_X0_X1,
        word::BRANCH_HERE,
    ];
    AccelHvf::probe_with(api)?;
    let (mut vm, mut vcpu) = machine(api, &program)?;
    vcpu.kick_handle()?.kick();
    let mut exits = Vec::new();
    while exits.len() < 7 {
        let exit = vcpu.run()?;
        exits.push(exit);
        match exit {
            VcpuExit::Mmio { is_write: false, size, .. } => vcpu.complete_read(&vec![0; size.into()])?,
            VcpuExit::Mmio { .. } | VcpuExit::Interrupt => {}
            other => panic!("{other:?} after {exits:?}"),
        }
    }
    assert!(exits.contains(&VcpuExit::Interrupt), "{exits:?}");
    vcpu.quiesce()?;
    let fpu = vcpu.get_fpu_regs()?;
    vcpu.set_fpu_regs(&fpu)?;
    let arm = vcpu.as_aarch64().expect("aarch64");
    let saved = arm.save_registers()?;
    arm.restore_registers(&saved)?;
    arm.set_interrupts(true, false)?;
    arm.set_virtual_timer(&VirtualTimer { control: 1, compare: 0, count: 1 << 40 })?;
    assert_eq!(vcpu.run()?, VcpuExit::VirtualTimer);
    let arm = vcpu.as_aarch64().expect("aarch64");
    arm.set_virtual_timer(&VirtualTimer { control: 0, compare: 0, count: 1 << 41 })?;
    let hardware = vec![HardwareBreakpoint { addr: RAM, len: 1, on: BreakOn::Execute }];
    vcpu.set_guest_debug(&GuestDebug { hardware, ..GuestDebug::default() })?;
    let mut regs = vcpu.get_regs()?;
    regs.pc = RAM;
    vcpu.set_regs(&regs)?;
    // Whatever was changed reaches the platform at the latest now.
    assert_eq!(vcpu.run()?, VcpuExit::Debug);
    vcpu.set_guest_debug(&GuestDebug::default())?;
    assert!(vm.take_dirty(RAM)?.is_dirty(RAM + 0x4000));
    vm.protect_memory(RAM, MemoryFlags::RAM)?;
    vm.unmap_memory(RAM)
}

/// A machine with the framework's GIC, and one after it that goes on from its state.
fn gic_scenario(api: &'static HvfArm64Api) -> VcpuResult<()> {
    let program = [word::MOVZ_X1_DEVICE, word::STR_X0_X1, word::STR_X0_X1, word::BRANCH_HERE];
    let (mut vm, mut vcpu) = build(api, IrqChip::Kernel, &program)?;
    let frame = vm.gic()?.msi_frame.expect("there is one");
    vm.set_irq_line(aarch64::spi_line(40), true)?;
    vm.set_irq_line(aarch64::ppi_line(0, 20), true)?;
    let address = frame.address + MsiFrame::DOORBELL;
    vm.signal_msi(MsiMessage { address, data: frame.first, device_id: None })?;
    assert!(matches!(vcpu.run()?, VcpuExit::Mmio { .. }));
    vm.set_irq_line(aarch64::ppi_line(0, 20), false)?;
    assert!(matches!(vcpu.run()?, VcpuExit::Mmio { .. }));
    vcpu.quiesce()?;
    let registers = vcpu.as_aarch64().expect("aarch64").save_registers()?;
    let state = vm.get_gic_state()?;
    let late = vm.set_gic_state(&state).expect_err("too late");
    assert!(matches!(late, AccelError::InvalidArgument { .. }), "{late:?}");
    drop(vcpu);
    drop(vm);
    let (mut vm, mut vcpu) = build(api, IrqChip::Kernel, &program)?;
    vcpu.as_aarch64().expect("aarch64").set_sys_reg(ICC_PMR, 0xf0)?;
    vm.set_gic_state(&state)?;
    assert_eq!(vm.get_gic_state()?, state, "not restored yet, and yet there");
    assert!(matches!(vcpu.run()?, VcpuExit::Mmio { .. }));
    vcpu.quiesce()?;
    let arm = vcpu.as_aarch64().expect("aarch64");
    assert_eq!(arm.get_sys_reg(ICC_PMR)?, 0xf0);
    arm.restore_registers(&registers)?;
    assert_eq!(arm.get_sys_reg(ICC_PMR)?, 0);
    assert_eq!(vm.get_gic_state()?, state);
    Ok(())
}

/// Whether an error says that it is this failure.
fn tells(error: &AccelError, failure: &Failure) -> bool {
    if matches!(failure.function, "hv_vm_destroy" | "hv_vcpu_destroy") {
        // The machine before was left, and so the next cannot be.
        return matches!(error, AccelError::Unavailable { reason: UnavailableReason::InUse, .. });
    }
    // What makes an object makes none then, and tells nothing.
    let code = if OBJECTS.contains(&failure.function) { NO_RESOURCES } else { failure.code };
    let raw = |op: &str, told: &RawCode| op == failure.function && *told == RawCode::HvReturn(code);
    match error {
        AccelError::Backend { op, code, .. } => raw(op, code),
        AccelError::Unavailable { reason, .. } => match reason {
            UnavailableReason::Failed { op, code } => raw(op, code),
            UnavailableReason::InUse => failure.code == BUSY,
            UnavailableReason::EntitlementMissing { .. } => failure.code == DENIED,
            UnavailableReason::UnsupportedHardware { .. } => matches!(failure.code, UNSUPPORTED | NO_DEVICE),
            _ => false,
        },
        _ => false,
    }
}

/// Failures that the backend is right to survive.
fn is_survived(failure: &Failure) -> bool {
    match (failure.function, failure.code) {
        // Nobody is left who could be told.
        ("hv_vm_destroy" | "hv_vcpu_destroy", _) => true,
        // The probe's: a machine that is in use is available.
        ("hv_vm_create", BUSY) => failure.after == 0,
        _ => false,
    }
}

fn every_failure_surfaces_as_itself(
    api: &'static HvfArm64Api,
    prefix: &str,
    scenario: fn(&'static HvfArm64Api) -> VcpuResult<()>,
) {
    scenario(api).expect("nothing fails");
    assert_eq!(live_vcpus(), None);
    assert_eq!(complaints(), [""; 0]);
    let mut tried = 0;
    let functions = HvfArm64Functions::REQUIRED.iter().chain(HvfArm64Functions::OPTIONAL);
    let functions = functions.chain(&["hv_vcpu_set_simd_fp_reg"]).filter(|function| function.starts_with(prefix));
    for function in functions {
        for code in CODES {
            for after in 0..DEPTH {
                let failure = Failure { function, after, code };
                FAILURES.set(Some(failure));
                // A thread of its own: what a failure leaves behind ends with it.
                let result = std::thread::spawn(move || scenario(api)).join();
                let result = result.unwrap_or_else(|_| panic!("{failure:?} makes the backend panic"));
                let happened = !FAILURES.is_waiting();
                FAILURES.set(None);
                if !happened {
                    result.unwrap_or_else(|error| panic!("{failure:?} did not happen, and yet: {error}"));
                    break;
                }
                tried += 1;
                match result {
                    Ok(()) => assert!(is_survived(&failure), "{failure:?} is not told"),
                    Err(error) => assert!(tells(&error, &failure), "{failure:?} is told as {error:?}"),
                }
                if !matches!(*function, "hv_vm_destroy" | "hv_vcpu_destroy") {
                    assert_eq!(live_vcpus(), None, "{failure:?} leaks");
                }
                end_process();
                drop(complaints());
            }
        }
    }
    assert!(tried > 300, "{tried}");
}

fn a_vcpu_belongs_to_the_thread_that_runs_it_first() {
    let (vm, mut vcpu) = machine(&MACOS_13, &[word::MOVZ_X1_DEVICE, word::STR_X0_X1]).expect("available");
    let (send, receive) = channel::<Box<dyn VcpuOps>>();
    let (done, finish) = channel::<()>();
    let owner = std::thread::spawn(move || {
        let exit = vcpu.run().expect("set up on another thread");
        assert_eq!(exit, VcpuExit::Mmio { addr: 0x0a00_0000, size: 8, is_write: true });
        send.send(vcpu).expect("somebody listens");
        finish.recv().expect("somebody speaks");
    });
    let mut vcpu = receive.recv().expect("sent");
    assert!(matches!(vcpu.run(), Err(AccelError::WrongThread { .. })));
    assert!(matches!(vcpu.get_regs(), Err(AccelError::WrongThread { .. })));
    assert!(matches!(vcpu.get_fpu_regs(), Err(AccelError::WrongThread { .. })));
    let arm = vcpu.as_aarch64().expect("aarch64");
    assert!(matches!(arm.get_sys_reg(aarch64::SCTLR_EL1), Err(AccelError::WrongThread { .. })));
    // Its end waits for the owner, and so does that of the machine. A kick is harmless.
    let kick = vcpu.kick_handle().expect("there is one");
    drop(vcpu);
    drop(vm);
    kick.kick();
    assert_eq!(live_vcpus(), Some(1));
    let in_use = AccelHvf::with_api(&MACOS_13).expect_err("one per process");
    assert!(matches!(in_use, AccelError::Unavailable { reason: UnavailableReason::InUse, .. }), "{in_use:?}");
    assert!(AccelHvf::probe_with(&MACOS_13).is_ok(), "in use is available");
    done.send(()).expect("the owner waits");
    owner.join().expect("no panic");
    assert_eq!(live_vcpus(), None);
    kick.kick();
    drop(AccelHvf::with_api(&MACOS_13).expect("free again"));
    assert_eq!(complaints(), [""; 0]);
}

fn unknown_exits_are_told_as_such() {
    let (_vm, mut vcpu) = machine(&MACOS_13, &[word::MOVZ_X1_DEVICE, word::STR_X0_X1]).expect("available");
    for reason in [3, 4, 200, u32::MAX] {
        set_next_exit(reason);
        assert_eq!(vcpu.run(), Ok(VcpuExit::Unknown));
        assert_eq!(vcpu.raw_exit(), Some(reason.into()));
    }
    assert!(matches!(vcpu.run(), Ok(VcpuExit::Mmio { .. })));
    assert_eq!(complaints(), [""; 0]);
}

/// The timer ends a WFI although it fires only while the vCPU runs; its exit comes once, until the guest has dealt with it.
fn wfi_waits_for_the_timer() {
    let program = [word::WFI, word::NOP, word::WFI, word::BRANCH_HERE];
    let (_vm, mut vcpu) = machine(&MACOS_13, &program).expect("available");
    let arm = vcpu.as_aarch64().expect("aarch64");
    arm.set_virtual_timer(&VirtualTimer { control: 1, compare: 50_000, count: 0 }).expect("there is one");
    assert_eq!(vcpu.run(), Ok(VcpuExit::VirtualTimer));
    let timer = vcpu.as_aarch64().expect("aarch64").get_virtual_timer().expect("there is one");
    assert!(timer.control & 7 == 5 && timer.count >= 50_000, "{timer:?}");
    vcpu.kick_handle().expect("there is one").kick();
    assert_eq!(vcpu.run(), Ok(VcpuExit::Interrupt), "the timer told already");
    let arm = vcpu.as_aarch64().expect("aarch64");
    let again = VirtualTimer { control: 0, ..timer };
    arm.set_virtual_timer(&again).expect("there is one");
    vcpu.kick_handle().expect("there is one").kick();
    assert_eq!(vcpu.run(), Ok(VcpuExit::Interrupt));
    assert_eq!(complaints(), [""; 0]);
}

/// An input stays as it was set, although the platform forgets it at every exit.
fn interrupt_inputs_stay() {
    const VECTOR: usize = 0x280;
    let mut program = vec![word::NOP; VECTOR / 4];
    program[..2].copy_from_slice(&[word::MOVZ_X1_DEVICE, word::STR_X0_X1]);
    program.extend([word::MOVZ_X1_DEVICE, word::STR_X0_X1]);
    let (_vm, mut vcpu) = machine(&MACOS_13, &program).expect("available");
    vcpu.as_aarch64().expect("aarch64").set_sys_reg(aarch64::VBAR_EL1, RAM).expect("set");
    for (irq, at) in [(true, VECTOR as u64), (true, VECTOR as u64), (false, 0)] {
        vcpu.quiesce().expect("finished");
        let mut regs = vcpu.get_regs().expect("read");
        (regs.pc, regs.flags) = (RAM, PSTATE_EL1H_MASKED & !(1 << 7));
        vcpu.set_regs(&regs).expect("set");
        vcpu.as_aarch64().expect("aarch64").set_interrupts(irq, false).expect("offered");
        assert!(matches!(vcpu.run(), Ok(VcpuExit::Mmio { .. })));
        assert_eq!(vcpu.get_regs().map(|regs| regs.pc), Ok(RAM + at + 4));
    }
    assert_eq!(complaints(), [""; 0]);
}

/// An access that fails: the guest takes an external abort with the address.
fn an_access_can_be_refused() {
    let (_vm, mut vcpu) = machine(&MACOS_13, &[word::MOVZ_X1_DEVICE, word::LDP_X3_X4_X1]).expect("available");
    assert!(matches!(vcpu.run(), Ok(VcpuExit::Mmio { is_write: false, .. })));
    let arm = vcpu.as_aarch64().expect("aarch64");
    arm.set_events(&Aarch64Events { external_abort: true, ..Aarch64Events::default() }).expect("an access waits");
    assert_eq!(arm.get_sys_reg(aarch64::ESR_EL1), Ok(0x25 << 26 | 1 << 25 | 0x10));
    assert_eq!(arm.get_sys_reg(aarch64::FAR_EL1), Ok(0x0a00_0000));
    assert_eq!(arm.get_sys_reg(aarch64::ELR_EL1), Ok(RAM + 4));
    assert_eq!(vcpu.get_regs().map(|regs| regs.pc), Ok(RAM + 0x800 + 0x200));
    assert!(vcpu.pending_access().is_none());
    let again = Aarch64Events { external_abort: true, ..Aarch64Events::default() };
    assert!(vcpu.as_aarch64().expect("aarch64").set_events(&again).is_err(), "no access waits any more");
    assert_eq!(complaints(), [""; 0]);
}

fn is_invalid(result: VcpuResult<()>) -> bool {
    matches!(result, Err(AccelError::InvalidArgument { .. }))
}

fn gic_comes_first_and_once() {
    let mut vm = AccelHvf::with_api(&MACOS_15).expect("available");
    assert!(vm.capabilities().kernel_irqchip);
    assert!(vm.create_irqchip(IrqChip::Split).is_err_and(|error| error.is_absent()));
    vm.create_irqchip(IrqChip::Kernel).expect("first");
    assert!(is_invalid(vm.create_irqchip(IrqChip::Kernel)));
    let vcpu = vm.create_vcpu(0).expect("free");
    drop(vcpu);
    drop(vm);
    let mut vm = AccelHvf::with_api(&MACOS_15).expect("available");
    let vcpu = vm.create_vcpu(0).expect("free");
    assert!(is_invalid(vm.create_irqchip(IrqChip::Kernel)));
    drop(vcpu);
    drop(vm);
    let mut vm = AccelHvf::with_api(&MACOS_13).expect("available");
    assert!(!vm.capabilities().kernel_irqchip);
    assert!(vm.create_irqchip(IrqChip::Kernel).is_err_and(|error| error.is_absent()));
    assert!(vm.irq_handle().is_err_and(|error| error.is_absent()));
    assert_eq!(complaints(), [""; 0]);
}

/// A system with some of them, which no Mac is, gets a typed error from the first that lacks.
fn gic_needs_all_of_its_functions() {
    static WITHOUT_SIZES: HvfArm64Api = HvfArm64Api {
        functions: HvfArm64Functions { hv_gic_get_redistributor_size: None, ..MACOS_15.functions },
        ..MACOS_15
    };
    static WITHOUT_LINES: HvfArm64Api = HvfArm64Api {
        functions: HvfArm64Functions { hv_gic_set_spi: None, hv_gic_state_create: None, ..MACOS_15.functions },
        ..MACOS_15
    };
    let mut vm = AccelHvf::with_api(&WITHOUT_SIZES).expect("available");
    assert!(vm.create_irqchip(IrqChip::Kernel).is_err_and(|error| error.is_absent()));
    drop(vm);
    let mut vm = AccelHvf::with_api(&WITHOUT_LINES).expect("available");
    vm.create_irqchip(IrqChip::Kernel).expect("there");
    assert!(vm.set_irq_line(8, true).is_err_and(|error| error.is_absent()));
    assert!(vm.get_gic_state().is_err_and(|error| error.is_absent()));
    assert_eq!(complaints(), [""; 0]);
}

/// A system whose GIC must be elsewhere has none for this library; one whose frame must be, no messages.
fn gic_fits_or_is_not_there() {
    unsafe extern "C" fn huge(value: *mut usize) -> i32 {
        // SAFETY: the caller's promise.
        unsafe { value.write(1 << 30) };
        SUCCESS
    }
    static ELSEWHERE: HvfArm64Api = HvfArm64Api {
        functions: HvfArm64Functions { hv_gic_get_distributor_base_alignment: Some(huge), ..MACOS_15.functions },
        ..MACOS_15
    };
    static WITHOUT_FRAME: HvfArm64Api = HvfArm64Api {
        functions: HvfArm64Functions { hv_gic_get_msi_region_size: Some(huge), ..MACOS_15.functions },
        ..MACOS_15
    };
    let mut vm = AccelHvf::with_api(&ELSEWHERE).expect("available");
    assert!(vm.create_irqchip(IrqChip::Kernel).is_err_and(|error| error.is_absent()));
    drop(vm);
    let mut vm = AccelHvf::with_api(&WITHOUT_FRAME).expect("available");
    vm.create_irqchip(IrqChip::Kernel).expect("there");
    assert_eq!(vm.gic().expect("there").msi_frame, None);
    assert!(vm.signal_msi(MsiMessage::default()).is_err_and(|error| error.is_absent()));
    assert_eq!(complaints(), [""; 0]);
}

fn inputs_belong_to_the_gic() {
    let program = [word::MOVZ_X1_DEVICE, word::STR_X0_X1];
    let (vm, mut vcpu) = build(&MACOS_15, IrqChip::Kernel, &program).expect("available");
    let refused = vcpu.as_aarch64().expect("aarch64").set_interrupts(true, false);
    assert!(refused.is_err_and(|error| error.is_absent()));
    // Those of the framework's own devices, software-generated ones, and those of nobody.
    for line in [27, 30, 23, 25, 3, 40].map(|intid| aarch64::ppi_line(0, intid)).into_iter().chain([224, 1 << 30]) {
        assert!(is_invalid(vm.set_irq_line(line, true)), "{line:#x}");
    }
    assert!(matches!(vcpu.run(), Ok(VcpuExit::Mmio { .. })));
    assert_eq!(complaints(), [""; 0]);
}

/// Apple says that there are none; should one come, the guest gets its interrupt and the VMM none of it.
fn timer_exits_beside_a_gic_are_not_told() {
    const TIMER_ACTIVATED: u32 = 2;
    let program = [word::MOVZ_X1_DEVICE, word::STR_X0_X1];
    let (_vm, mut vcpu) = build(&MACOS_15, IrqChip::Kernel, &program).expect("available");
    let arm = vcpu.as_aarch64().expect("aarch64");
    arm.set_virtual_timer(&VirtualTimer { control: 1, compare: 0, count: 1 << 40 }).expect("there is one");
    set_next_exit(TIMER_ACTIVATED);
    assert!(matches!(vcpu.run(), Ok(VcpuExit::Mmio { .. })));
    assert_eq!(complaints(), [""; 0]);
}

fn foreign_gic_state_is_refused() {
    let program = [word::MOVZ_X1_DEVICE, word::STR_X0_X1];
    let (mut vm, mut vcpu) = build(&MACOS_15, IrqChip::Kernel, &program).expect("available");
    assert!(is_invalid(vm.set_gic_state(&GicState::default())));
    vm.set_gic_state(&GicState { opaque: vec![1; 100], ..GicState::default() }).expect("nobody looks at it yet");
    for _ in 0..2 {
        let error = vcpu.run().expect_err("the framework looks at it");
        assert!(matches!(error, AccelError::Backend { op: "hv_gic_set_state", .. }), "{error:?}");
    }
    assert_eq!(complaints(), [""; 0]);
}

/// With a GIC no vCPU runs before all are the framework's; kicks come through, and one that is dropped is not waited for.
fn vcpus_wait_for_each_other() {
    let program = [word::MOVZ_X1_DEVICE, word::STR_X0_X1, word::STR_X0_X1];
    let (mut vm, mut vcpu) = build(&MACOS_15, IrqChip::Kernel, &program).expect("available");
    let (mut second, third) = (vm.create_vcpu(1).expect("free"), vm.create_vcpu(2).expect("free"));
    vcpu.kick_handle().expect("there is one").kick();
    assert_eq!(vcpu.run(), Ok(VcpuExit::Interrupt));
    drop(third);
    let stop = second.kick_handle().expect("there is one");
    // Switched off, it waits in its run.
    let other = std::thread::spawn(move || second.run());
    assert!(matches!(vcpu.run(), Ok(VcpuExit::Mmio { .. })));
    assert!(is_invalid(vm.create_vcpu(3).map(drop)));
    stop.kick();
    assert_eq!(other.join().expect("no panic"), Ok(VcpuExit::Interrupt));
    assert!(matches!(vcpu.run(), Ok(VcpuExit::Mmio { .. })));
    assert_eq!(complaints(), [""; 0]);
}

#[test]
fn hvf_on_apple_silicon() {
    reset();
    a_vcpu_belongs_to_the_thread_that_runs_it_first();
    unknown_exits_are_told_as_such();
    wfi_waits_for_the_timer();
    interrupt_inputs_stay();
    an_access_can_be_refused();
    gic_comes_first_and_once();
    gic_needs_all_of_its_functions();
    gic_fits_or_is_not_there();
    inputs_belong_to_the_gic();
    timer_exits_beside_a_gic_are_not_told();
    foreign_gic_state_is_refused();
    vcpus_wait_for_each_other();
    every_failure_surfaces_as_itself(&MACOS_13, "", scenario);
    every_failure_surfaces_as_itself(&MACOS_11, "", scenario);
    every_failure_surfaces_as_itself(&MACOS_15, "hv_gic_", gic_scenario);
}
