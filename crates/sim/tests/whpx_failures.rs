//! Each call of WHPX fails once, with each code that it may fail with: the error surfaces, nothing panics, nothing leaks.

use vm_accel::platform::whpx::x86_64::AccelWhpx;
use vm_accel::x86_64::{X86Msr, X86Sregs};
use vm_accel::{
    Accel, AccelError, GuestDebug, GuestRegion, GuestRegs, IoDirection, IrqChip, MemoryFlags, MsiMessage, RawCode,
    UnavailableReason, VcpuExit, VcpuResult,
};
use vm_accel_sim::hostile::Failure;
use vm_accel_sim::whpx::{
    API, FAILURES, SIMULATED, leave_once_with, live_partitions, set_hypervisor_present, windows_1809,
};
use vm_accel_sys::whpx::code::hv::{ERROR_HV_INSUFFICIENT_MEMORY, ERROR_HV_INVALID_PARAMETER};
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
    ERROR_HV_INVALID_PARAMETER,
    ERROR_HV_INSUFFICIENT_MEMORY,
];

/// Calls of one function whose failure is tried, one after the other.
const DEPTH: u32 = 4;

const CODE: u64 = 0x1000;

/// A guest that makes every kind of exit, and a caller that uses every group of state.
fn scenario() -> VcpuResult<()> {
    #[rustfmt::skip]
    let program = [
        0xe6, 0x10,                         // out 0x10, al
        0xe4, 0x11,                         // in al, 0x11
        0xa2, 0x00, 0x20,                   // mov [0x2000], al
        0x67, 0xa0, 0, 0, 0x10, 0,          // mov al, [0x100000]
        0x0f, 0xa2,                         // cpuid
        0x66, 0xb9, 0x1b, 0, 0, 0,          // mov ecx, 0x1b
        0x0f, 0x32, 0x0f, 0x30,             // rdmsr; wrmsr
        0xf4,                               // hlt
        0xe6, 0x12,                         // out 0x12, al
    ];
    AccelWhpx::probe_with(&API)?;
    let mut vm = AccelWhpx::with_api(&API)?;
    vm.create_irqchip(IrqChip::None)?;
    let ram = GuestRegion::anonymous(0x1_0000)?;
    ram.write(CODE, &program)?;
    vm.map_memory(0, &ram, MemoryFlags::RAM | MemoryFlags::LOG_DIRTY)?;
    let mut vcpu = vm.create_vcpu(0)?;
    let x86 = vcpu.as_x86().expect("an x86 backend");
    let cpuid = x86.supported_cpuid()?;
    x86.set_cpuid(&cpuid)?;
    let mut sregs: X86Sregs = x86.get_sregs()?;
    sregs.cs.base = 0;
    sregs.cs.selector = 0;
    sregs.ds.limit = u32::MAX;
    x86.set_sregs(&sregs)?;
    vcpu.set_regs(&GuestRegs { pc: CODE, flags: 2, ..GuestRegs::default() })?;
    vcpu.kick_handle()?.kick();
    let mut exits = Vec::new();
    loop {
        let exit = vcpu.run()?;
        exits.push(exit);
        match exit {
            VcpuExit::Io { port: 0x12, .. } => break,
            VcpuExit::Io { direction: IoDirection::In, size, .. } => vcpu.complete_read(&vec![0; size.into()])?,
            VcpuExit::Mmio { is_write: false, size, .. } => vcpu.complete_read(&vec![0; size.into()])?,
            VcpuExit::Io { .. } | VcpuExit::Interrupt | VcpuExit::Halted => {}
            other => panic!("{other:?} after {exits:?}"),
        }
    }
    assert!(exits.contains(&VcpuExit::Interrupt) && exits.contains(&VcpuExit::Halted), "{exits:?}");
    vcpu.quiesce()?;
    let fpu = vcpu.get_fpu_regs()?;
    vcpu.set_fpu_regs(&fpu)?;
    let x86 = vcpu.as_x86().expect("an x86 backend");
    let mut area = x86.get_xsave()?;
    area[160] ^= 1;
    x86.set_xsave(&area)?;
    let indices = x86.msr_indices()?;
    let mut msrs: Vec<X86Msr> = x86.get_msrs(&indices)?;
    msrs.retain(|msr| msr.index == 0x174);
    msrs.iter_mut().for_each(|msr| msr.value ^= 8);
    x86.set_msrs(&msrs)?;
    let tsc = x86.get_tsc()?;
    x86.set_tsc(tsc)?;
    // Whatever was changed reaches the platform at the latest now.
    vcpu.kick_handle()?.kick();
    assert_eq!(vcpu.run()?, VcpuExit::Interrupt);
    assert!(vm.take_dirty(0)?.is_dirty(0x2000));
    vm.protect_memory(0, MemoryFlags::RAM)?;
    vm.unmap_memory(0)
}

/// A guest whose local APIC is the platform's.
fn scenario_with_apics() -> VcpuResult<()> {
    #[rustfmt::skip]
    let program = [
        0x67, 0x66, 0xc7, 0x05, 0xf0, 0, 0xe0, 0xfe, 0xff, 1, 0, 0, // mov dword [0xfee000f0], 0x1ff
        0xe6, 0x10,                         // out 0x10, al
        0xfb, 0xf4, 0xeb, 0xfd,             // sti; hlt; jmp back
    ];
    // The handler at 0000:2000: out 0x11, al; mov dword [0xfee000b0], 0; iret
    let handler = [0xe6, 0x11, 0x67, 0x66, 0xc7, 0x05, 0xb0, 0, 0xe0, 0xfe, 0, 0, 0, 0, 0xcf];
    let mut vm = AccelWhpx::with_api(&API)?;
    let ram = GuestRegion::anonymous(0x1_0000)?;
    ram.write(CODE, &program)?;
    ram.write(0x2000, &handler)?;
    ram.write(4 * 0x51, &[0, 0x20, 0, 0])?;
    // Mapped before the controllers are there.
    vm.map_memory(0, &ram, MemoryFlags::RAM)?;
    vm.create_irqchip(IrqChip::Split)?;
    let irq = vm.irq_handle()?;
    let mut vcpu = vm.create_vcpu(0)?;
    let second = vm.create_vcpu(1)?;
    let x86 = vcpu.as_x86().expect("an x86 backend");
    let mut sregs = x86.get_sregs()?;
    (sregs.cs.base, sregs.cs.selector, sregs.ds.limit, sregs.cr8) = (0, 0, u32::MAX, 1);
    x86.set_sregs(&sregs)?;
    let mut regs = GuestRegs { pc: CODE, flags: 2, ..GuestRegs::default() };
    regs.gpr[4] = 0x8000;
    vcpu.set_regs(&regs)?;
    assert!(matches!(vcpu.run()?, VcpuExit::Io { port: 0x10, .. }));
    // Level-triggered; below the task's priority of 1 is nothing but 0.
    irq.signal_msi(MsiMessage { address: 0xfee0_0000, data: 0xc051, device_id: None })?;
    let x86 = vcpu.as_x86().expect("an x86 backend");
    let page = x86.get_lapic()?;
    assert_eq!(page.reg(0x200 + 0x10 * (0x51 / 32)), Some(1 << (0x51 % 32)), "requested in the platform's APIC");
    assert_eq!((page.reg(0x80), page.reg(0xf0)), (Some(0x10), Some(0x1ff)));
    x86.set_lapic(&page)?;
    let state = x86.get_mp_state()?;
    x86.set_mp_state(state)?;
    assert!(matches!(vcpu.run()?, VcpuExit::Io { port: 0x11, .. }));
    assert_eq!(vcpu.run()?, VcpuExit::EndOfInterrupt { vector: 0x51 });
    let kick = vcpu.kick_handle()?;
    let exit = std::thread::scope(|scope| {
        scope.spawn(move || kick.kick());
        vcpu.run()
    })?;
    assert_eq!(exit, VcpuExit::Interrupt, "halted for ever");
    drop((vcpu, second));
    Ok(())
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

/// Failures that the backend is right to survive.
fn is_survived(failure: &Failure) -> bool {
    match (failure.function, failure.code) {
        // What is not known is absent; the scenario then has less, or lacks what it needs.
        ("WHvGetCapability", WHV_E_UNKNOWN_CAPABILITY) => true,
        // Nobody is left who could be told.
        ("WHvDeletePartition" | "WHvDeleteVirtualProcessor", _) => true,
        // Repeated until it is heard.
        ("WHvCancelRunVirtualProcessor", _) => true,
        // An older release: registers are tried one by one.
        ("WHvGetVirtualProcessorRegisters", WHV_E_INVALID_VP_REGISTER_NAME) => true,
        _ => false,
    }
}

/// Exits that the backend did not ask for, or that nobody knows yet, are told as what they are and change nothing.
fn unknown_reasons() {
    let mut vm = AccelWhpx::with_api(&API).expect("a virtual machine");
    let ram = GuestRegion::anonymous(0x1_0000).expect("memory");
    // out 0x10, al; jmp back
    ram.write(CODE, &[0xe6, 0x10, 0xeb, 0xfc]).expect("inside");
    vm.map_memory(0, &ram, MemoryFlags::RAM).expect("a mapping");
    let mut vcpu = vm.create_vcpu(0).expect("a vCPU");
    let x86 = vcpu.as_x86().expect("an x86 backend");
    let mut sregs = x86.get_sregs().expect("registers");
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    x86.set_sregs(&sregs).expect("registers");
    vcpu.set_regs(&GuestRegs { pc: CODE, flags: 2, ..GuestRegs::default() }).expect("registers");
    let out = VcpuExit::Io { port: 0x10, direction: IoDirection::Out, size: 1 };
    for reason in [3, 6, 9, 10, 0x1002, 0x1003, 0x1004, 0x1006, 0x1007, 0x7777, -1] {
        leave_once_with(reason);
        assert_eq!(vcpu.run().ok(), Some(VcpuExit::Unknown), "{reason:#x}");
        assert_eq!(vcpu.run().ok(), Some(out), "after {reason:#x}");
    }
    leave_once_with(5);
    assert!(matches!(vcpu.run(), Err(AccelError::EntryFailed { .. })), "invalid register value");
    assert_eq!(vcpu.run().ok(), Some(out));
}

/// The platform's local APICs are the default where there are any; guests that have them cannot be debugged.
fn whose_apics() {
    for (api, in_software, is_debugged) in [(&API, false, false), (&API, true, true), (windows_1809(), false, true)] {
        let mut vm = AccelWhpx::with_api(api).expect("a virtual machine");
        if in_software {
            vm.use_software_apics();
        }
        vm.create_irqchip(IrqChip::Split).expect("local APICs");
        let mut vcpu = vm.create_vcpu(0).expect("a vCPU");
        let debug = GuestDebug { single_step: true, ..GuestDebug::default() };
        match vcpu.set_guest_debug(&debug) {
            Ok(()) => assert!(is_debugged),
            Err(AccelError::Unsupported { .. }) => assert!(!is_debugged),
            other => panic!("{other:?}"),
        }
        // What the guest is given of a message that no APIC may take is nothing, wherever the APIC is.
        let illegal = MsiMessage { address: 0xfee0_0000, data: 3, device_id: None };
        vm.signal_msi(illegal).expect("nothing happens");
    }
}

/// One test, because the plan of failures is the process's.
#[test]
fn every_failure_surfaces_as_itself() {
    assert_eq!(live_partitions(), 0);
    let (mut tried, mut leaked, mut silent) = (0, 0, Vec::new());
    for scenario in [scenario, scenario_with_apics] {
        scenario().expect("nothing fails");
        assert_eq!(live_partitions(), leaked);
        for (function, code) in SIMULATED.iter().flat_map(|function| CODES.map(|code| (function, code))) {
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
                    Ok(()) if is_survived(&failure) => silent.push(failure),
                    Ok(()) => panic!("{failure:?} was not noticed"),
                    Err(error) if tells(&error, &failure) || is_survived(&failure) => {}
                    Err(error) => panic!("{failure:?} surfaced as {error:?}"),
                }
            }
        }
    }
    assert!(tried > 14 * 14, "only {tried} failures happened");
    assert!(silent.iter().all(is_survived));
    println!("{tried} failures, {} of them survived", silent.len());

    unknown_reasons();
    whose_apics();

    set_hypervisor_present(false);
    let error = AccelWhpx::probe_with(&API).expect_err("no hypervisor");
    set_hypervisor_present(true);
    assert!(matches!(error, AccelError::Unavailable { reason: UnavailableReason::FeatureOff { .. }, .. }), "{error:?}");
    let error = AccelWhpx::probe_with(vm_accel_sim::whpx::first_release()).expect_err("too old");
    let missing = matches!(error, AccelError::Unavailable { reason: UnavailableReason::FunctionMissing { .. }, .. });
    assert!(missing, "{error:?}");
}
