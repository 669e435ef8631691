//! HVF on Intel: each call fails once, with each code that it may fail with, and the error surfaces; and the rules about threads
//! and the one virtual machine.
//!
//! One test function: the platform, its plan of failures and its knobs are the process's.

use std::sync::mpsc::channel;
use vm_accel::platform::hvf::x86_64::AccelHvf;
use vm_accel::x86_64::{X86Msr, X86Sregs};
use vm_accel::{
    Accel, AccelError, BreakOn, GuestDebug, GuestRegion, GuestRegs, HardwareBreakpoint, IoDirection, MemoryFlags,
    RawCode, UnavailableReason, VcpuExit, VcpuOps, VcpuResult,
};
use vm_accel_sim::hostile::Failure;
use vm_accel_sim::hvf_x86::{API, FAILURES, FIRST_RELEASE, complaints, end_process, live_vcpus, reset, set_next_exit};
use vm_accel_sys::hvf::code::*;
use vm_accel_sys::hvf::x86_64::HvfX86Api;

/// hv_error.h.
const CODES: [i32; 8] = [ERROR, BUSY, BAD_ARGUMENT, NO_RESOURCES, NO_DEVICE, DENIED, FAULT, UNSUPPORTED];

/// Calls of one function whose failure is tried, one after the other.
const DEPTH: u32 = 4;

const CODE: u64 = 0x1000;

/// A machine with this program in 16-bit code, logged memory and a vCPU that is not yet the platform's.
fn machine(api: &'static HvfX86Api, program: &[u8]) -> VcpuResult<(AccelHvf, Box<dyn VcpuOps>)> {
    let mut vm = AccelHvf::with_api(api)?;
    let ram = GuestRegion::anonymous(0x1_0000)?;
    ram.write(CODE, program)?;
    vm.map_memory(0, &ram, MemoryFlags::RAM | MemoryFlags::LOG_DIRTY)?;
    let mut vcpu = vm.create_vcpu(0)?;
    let x86 = vcpu.as_x86().expect("an x86 backend");
    let mut sregs: X86Sregs = x86.get_sregs()?;
    (sregs.cs.base, sregs.cs.selector, sregs.ds.limit) = (0, 0, u32::MAX);
    x86.set_sregs(&sregs)?;
    vcpu.set_regs(&GuestRegs { pc: CODE, flags: 2, ..GuestRegs::default() })?;
    Ok((vm, vcpu))
}

/// A guest that makes every kind of exit, and a caller that uses every group of state.
fn scenario(api: &'static HvfX86Api) -> VcpuResult<()> {
    #[rustfmt::skip]
    let program = [
        0xe6, 0x10,                         // out 0x10, al
        0xe4, 0x11,                         // in al, 0x11
        0xa2, 0x00, 0x20,                   // mov [0x2000], al
        0x67, 0xa0, 0, 0, 0x10, 0,          // mov al, [0x100000]
        0x0f, 0xa2,                         // cpuid
        0x66, 0xb9, 0x77, 2, 0, 0,          // mov ecx, 0x277
        0x0f, 0x32, 0x0f, 0x30,             // rdmsr; wrmsr
        0xf4,                               // hlt
        0xe6, 0x12,                         // out 0x12, al
    ];
    AccelHvf::probe_with(api)?;
    let (mut vm, mut vcpu) = machine(api, &program)?;
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
    let hardware = vec![HardwareBreakpoint { addr: CODE, len: 1, on: BreakOn::Execute }];
    vcpu.set_guest_debug(&GuestDebug { hardware, ..GuestDebug::default() })?;
    let mut regs = vcpu.get_regs()?;
    regs.pc = CODE;
    vcpu.set_regs(&regs)?;
    let x86 = vcpu.as_x86().expect("an x86 backend");
    let mut area = x86.get_xsave()?;
    area[160] ^= 1;
    x86.set_xsave(&area)?;
    let mut msrs: Vec<X86Msr> = x86.get_msrs(&[0x174])?;
    msrs.iter_mut().for_each(|msr| msr.value ^= 8);
    x86.set_msrs(&msrs)?;
    let mut sregs = x86.get_sregs()?;
    sregs.cr3 = 0x3000;
    x86.set_sregs(&sregs)?;
    let tsc = x86.get_tsc()?;
    x86.set_tsc(tsc)?;
    // Whatever was changed reaches the platform at the latest now.
    assert_eq!(vcpu.run()?, VcpuExit::Debug);
    assert!(vm.take_dirty(0)?.is_dirty(0x2000));
    vm.protect_memory(0, MemoryFlags::RAM)?;
    vm.unmap_memory(0)
}

/// Whether an error says that it is this failure.
fn tells(error: &AccelError, failure: &Failure) -> bool {
    if failure.function == "hv_vm_destroy" {
        // The probe's machine was left, and so the next cannot be.
        return matches!(error, AccelError::Unavailable { reason: UnavailableReason::InUse, .. });
    }
    let raw = |op: &str, code: &RawCode| op == failure.function && *code == RawCode::HvReturn(failure.code);
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
        // Repeated until it is heard; what is not told is assumed.
        ("hv_vcpu_interrupt" | "hv_capability", _) => true,
        // The probe's: a machine that is in use is available.
        ("hv_vm_create", BUSY) => failure.after == 0,
        _ => false,
    }
}

fn every_failure_surfaces_as_itself(api: &'static HvfX86Api) {
    scenario(api).expect("nothing fails");
    assert_eq!(live_vcpus(), None);
    assert_eq!(complaints(), [""; 0]);
    let mut tried = 0;
    for function in HvfX86Api::REQUIRED.iter().chain(HvfX86Api::OPTIONAL) {
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
    let (vm, mut vcpu) = machine(&API, &[0xf4]).expect("available");
    let (send, receive) = channel::<Box<dyn VcpuOps>>();
    let (done, finish) = channel::<()>();
    let owner = std::thread::spawn(move || {
        assert_eq!(vcpu.run(), Ok(VcpuExit::Halted), "set up on another thread");
        send.send(vcpu).expect("somebody listens");
        finish.recv().expect("somebody speaks");
    });
    let mut vcpu = receive.recv().expect("sent");
    assert_eq!(vcpu.run(), Err(AccelError::WrongThread { op: "run" }));
    assert!(matches!(vcpu.get_regs(), Err(AccelError::WrongThread { .. })));
    assert!(matches!(vcpu.set_regs(&GuestRegs::default()), Err(AccelError::WrongThread { .. })));
    assert!(matches!(vcpu.as_x86().expect("x86").get_tsc(), Err(AccelError::WrongThread { .. })));
    // Its end waits for the owner, and so does that of the machine.
    drop(vcpu);
    drop(vm);
    assert_eq!(live_vcpus(), Some(1));
    let in_use = AccelHvf::with_api(&API).expect_err("one per process");
    assert!(matches!(in_use, AccelError::Unavailable { reason: UnavailableReason::InUse, .. }), "{in_use:?}");
    assert!(AccelHvf::probe_with(&API).is_ok(), "in use is available");
    done.send(()).expect("the owner waits");
    owner.join().expect("no panic");
    assert_eq!(live_vcpus(), None);
    drop(AccelHvf::with_api(&API).expect("free again"));
    assert_eq!(complaints(), [""; 0]);
}

fn unknown_exits_are_told_as_such() {
    let (_vm, mut vcpu) = machine(&API, &[0xf4]).expect("available");
    for reason in [49, 62, 200, 0xffff] {
        set_next_exit(reason);
        assert_eq!(vcpu.run(), Ok(VcpuExit::Unknown));
        assert_eq!(vcpu.raw_exit(), Some(reason.into()));
    }
    set_next_exit(1 << 31 | 34);
    assert!(matches!(vcpu.run(), Err(AccelError::EntryFailed { reason: 0x8000_0022, .. })));
    assert_eq!(vcpu.run(), Ok(VcpuExit::Halted));
    assert_eq!(complaints(), [""; 0]);
}

#[test]
fn hvf_on_intel() {
    reset();
    a_vcpu_belongs_to_the_thread_that_runs_it_first();
    unknown_exits_are_told_as_such();
    every_failure_surfaces_as_itself(&API);
    every_failure_surfaces_as_itself(&FIRST_RELEASE);
}
