//! Debugging by the host: single step, breakpoints, watchpoints.

use super::Arm;
use crate::harness::{Host, Outcome, cases};
use vm_accel::{BreakOn, DebugEvent, GuestDebug, HardwareBreakpoint, VcpuExit};
use vm_accel_guests::arm64::Index::Offset;
use vm_accel_guests::arm64::{ZR, layout};

cases![
    single_step[GuestDebug],
    single_step_over_device_accesses[GuestDebug],
    software_breakpoint[GuestDebug],
    guests_own_breakpoint,
    hardware_breakpoint[GuestDebug],
    watchpoints[GuestDebug],
    impossible_requests[GuestDebug],
];

fn debug(m: &mut Arm, debug: GuestDebug) -> Outcome {
    Ok(m.vcpu.set_guest_debug(&debug)?)
}

fn expect_debug(m: &mut Arm, event: DebugEvent) -> Outcome {
    m.expect(VcpuExit::Debug)?;
    assert_eq!(m.vcpu.debug_event()?, event);
    Ok(())
}

fn stepping() -> GuestDebug {
    GuestDebug { single_step: true, ..Default::default() }
}

fn hardware(addr: u64, len: u8, on: BreakOn) -> GuestDebug {
    GuestDebug { hardware: vec![HardwareBreakpoint { addr, len, on }], ..Default::default() }
}

fn single_step(host: &Host) -> Outcome {
    let mut m = Arm::new(host, |a| {
        for n in 1..5 {
            a.add(1, 1, n);
        }
        a.report(1);
    })?;
    debug(&mut m, stepping())?;
    let mut sum = 0;
    for n in 1..5 {
        let pc = layout::CODE + 4 * n;
        expect_debug(&mut m, DebugEvent::SingleStep { pc })?;
        sum += n;
        assert_eq!((m.x(1)?, m.vcpu.get_regs()?.pc), (sum, pc));
    }
    debug(&mut m, GuestDebug::default())?;
    m.expect_report(10)?;
    assert!(m.vcpu.debug_event().is_err(), "the last exit was no debug event");
    Ok(())
}

fn single_step_over_device_accesses(host: &Host) -> Outcome {
    let mut m = Arm::new(host, |a| {
        a.load(8, 2, 1, Offset(0));
        a.load_pair(8, [3, 4], 1, Offset(16));
        a.nop();
        a.report(3);
    })?;
    let mut regs = m.vcpu.get_regs()?;
    regs.gpr[1] = layout::DEVICE;
    m.vcpu.set_regs(&regs)?;
    debug(&mut m, stepping())?;
    m.expect_read(layout::DEVICE, &[1; 8])?;
    // The platform may count the access that it finishes as a step, and stop behind it; ours is none.
    let mut steps = Vec::new();
    let mut exit = m.run()?;
    while exit == VcpuExit::Debug {
        steps.push(m.vcpu.get_regs()?.pc - layout::CODE);
        exit = m.run()?;
    }
    assert!(steps.is_empty() || steps == [4], "steps at {steps:x?}");
    let second = |addr| VcpuExit::Mmio { addr, size: 8, is_write: false };
    assert_eq!(exit, second(layout::DEVICE + 16));
    m.vcpu.complete_read(&[2; 8])?;
    assert_eq!(m.run()?, second(layout::DEVICE + 24));
    m.vcpu.complete_read(&[3; 8])?;
    debug(&mut m, GuestDebug::default())?;
    m.expect_report(0x0202_0202_0202_0202)?;
    assert_eq!(m.x(4)?, 0x0303_0303_0303_0303);
    Ok(())
}

fn software_breakpoint(host: &Host) -> Outcome {
    let mut m = Arm::new(host, |a| {
        a.mov(1, 7);
        a.brk(0);
        a.report(1);
    })?;
    let wanted = GuestDebug { software_breakpoints: true, ..Default::default() };
    debug(&mut m, wanted)?;
    let pc = layout::CODE + 4;
    expect_debug(&mut m, DebugEvent::SoftwareBreakpoint { pc })?;
    let mut regs = m.vcpu.get_regs()?;
    assert_eq!(regs.pc, pc);
    regs.pc += 4;
    m.vcpu.set_regs(&regs)?;
    m.expect_report(7)
}

fn guests_own_breakpoint(host: &Host) -> Outcome {
    let mut m = Arm::new(host, |a| a.brk(3))?;
    m.expect_report(0x200)?;
    let esr = m.arm().get_sys_reg(vm_accel::aarch64::ESR_EL1)?;
    assert_eq!((esr >> 26, esr & 0xffff), (0x3c, 3));
    Ok(())
}

fn hardware_breakpoint(host: &Host) -> Outcome {
    let mut m = Arm::new(host, |a| {
        a.mov(1, 1);
        a.mov(2, 2);
        a.mov(3, 3);
        a.report(3);
    })?;
    let pc = layout::CODE + 8;
    debug(&mut m, hardware(pc, 1, BreakOn::Execute))?;
    expect_debug(&mut m, DebugEvent::HardwareBreakpoint { pc })?;
    let regs = m.vcpu.get_regs()?;
    assert_eq!((regs.pc, regs.gpr[2], regs.gpr[3]), (pc, 2, 0));
    debug(&mut m, GuestDebug::default())?;
    m.expect_report(3)
}

fn watchpoints(host: &Host) -> Outcome {
    const AT: u64 = layout::DATA + 4;
    let mut m = Arm::new(host, |a| {
        a.mov(1, layout::DATA);
        a.load(4, 2, 1, Offset(4));
        a.store(4, 2, 1, Offset(0));
        a.store(4, 2, 1, Offset(8));
        a.store(2, 2, 1, Offset(4));
        a.report(ZR);
    })?;
    // The MOV is one instruction.
    let load = layout::CODE + 4;
    debug(&mut m, hardware(AT, 4, BreakOn::Access))?;
    let event = |pc| DebugEvent::Watchpoint { pc, addr: Some(AT) };
    expect_debug(&mut m, event(load))?;
    debug(&mut m, hardware(AT, 4, BreakOn::Write))?;
    expect_debug(&mut m, event(load + 12))?;
    debug(&mut m, GuestDebug::default())?;
    m.expect_report(0)
}

fn impossible_requests(host: &Host) -> Outcome {
    let mut m = Arm::new(host, |a| a.report(ZR))?;
    for wanted in [
        hardware(layout::CODE + 2, 1, BreakOn::Execute),
        hardware(layout::CODE, 4, BreakOn::Execute),
        hardware(layout::DATA + 2, 4, BreakOn::Write),
        hardware(layout::DATA, 3, BreakOn::Access),
        GuestDebug { hardware: vec![hardware(layout::DATA, 8, BreakOn::Write).hardware[0]; 17], ..Default::default() },
    ] {
        assert!(m.vcpu.set_guest_debug(&wanted).is_err(), "{wanted:x?}");
    }
    m.expect_report(0)
}
