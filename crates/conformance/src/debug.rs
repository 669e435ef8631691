//! The host debugs the guest: single step, breakpoints, watchpoints.

use crate::harness::{Host, Machine, Outcome, cases, fail};
use vm_accel::x86_64::Reg;
use vm_accel::{AccelError, BreakOn, DebugEvent, GuestDebug, HardwareBreakpoint, VcpuExit};
use vm_accel_guests::asm::*;
use vm_accel_guests::world::layout;

cases![
    single_step_ring0[GuestDebug],
    single_step_with_changed_registers[GuestDebug],
    hardware_breakpoint_ring0[GuestDebug],
    watchpoint_ring0[GuestDebug],
    software_breakpoint_ring0[GuestDebug],
    breakpoints_do_not_reach_the_guest[GuestDebug],
    impossible_breakpoints_are_refused[GuestDebug],
    event_only_after_a_debug_exit,
];

/// mov eax, 1 (5 bytes); add ebx, eax (2); nop (1); store (7); hlt.
fn machine(host: &Host) -> Outcome<Machine> {
    Machine::long(host, |a| {
        a.mov(eax, 1)?;
        a.add(ebx, eax)?;
        a.nop()?;
        a.mov(dword_ptr(layout::DATA), eax)?;
        a.hlt()
    })
}

fn step() -> GuestDebug {
    GuestDebug { single_step: true, ..GuestDebug::default() }
}

fn breakpoint(addr: u64, len: u8, on: BreakOn) -> GuestDebug {
    GuestDebug { hardware: vec![HardwareBreakpoint { addr, len, on }], ..GuestDebug::default() }
}

fn single_step_ring0(host: &Host) -> Outcome {
    let mut m = machine(host)?;
    m.vcpu.set_guest_debug(&step())?;
    for pc in [5, 7, 8].map(|offset| layout::CODE + offset) {
        m.expect(VcpuExit::Debug)?;
        assert_eq!(m.vcpu.debug_event()?, DebugEvent::SingleStep { pc });
        assert_eq!(m.vcpu.get_regs()?.pc, pc);
    }
    m.vcpu.set_guest_debug(&GuestDebug::default())?;
    m.expect_halted()?;
    assert_eq!(m.read(layout::DATA)?, [1, 0, 0, 0]);
    assert_eq!(m.vcpu.get_regs()?.flags & 0x100, 0, "the trap flag is left set");
    Ok(())
}

/// Setting registers between steps neither loses the change nor the next step.
fn single_step_with_changed_registers(host: &Host) -> Outcome {
    let mut m = machine(host)?;
    m.vcpu.set_guest_debug(&step())?;
    m.expect(VcpuExit::Debug)?;
    m.set_gpr(Reg::Rbx, 100)?;
    m.expect(VcpuExit::Debug)?;
    assert_eq!(m.gpr(Reg::Rbx)?, 101);
    m.set_gpr(Reg::Rax, 7)?;
    m.expect(VcpuExit::Debug)?;
    assert_eq!(m.vcpu.debug_event()?, DebugEvent::SingleStep { pc: layout::CODE + 8 });
    m.vcpu.set_guest_debug(&GuestDebug::default())?;
    m.expect_halted()?;
    assert_eq!(m.read(layout::DATA)?, [7, 0, 0, 0]);
    Ok(())
}

fn hardware_breakpoint_ring0(host: &Host) -> Outcome {
    let mut m = machine(host)?;
    let pc = layout::CODE + 8;
    m.vcpu.set_guest_debug(&breakpoint(pc, 1, BreakOn::Execute))?;
    m.expect(VcpuExit::Debug)?;
    assert_eq!(m.vcpu.debug_event()?, DebugEvent::HardwareBreakpoint { pc });
    assert_eq!(m.gpr(Reg::Rbx)?, 1);
    assert_eq!(m.read(layout::DATA)?, [0; 4], "the instruction has run");
    m.vcpu.set_guest_debug(&GuestDebug::default())?;
    m.expect_halted()
}

fn watchpoint_ring0(host: &Host) -> Outcome {
    let mut m = machine(host)?;
    m.vcpu.set_guest_debug(&breakpoint(layout::DATA, 4, BreakOn::Write))?;
    m.expect(VcpuExit::Debug)?;
    match m.vcpu.debug_event()? {
        DebugEvent::Watchpoint { addr: None, .. } => {}
        DebugEvent::Watchpoint { addr: Some(addr), .. } => assert_eq!(addr, layout::DATA),
        other => fail!("event is {other:?}"),
    }
    assert_eq!(m.read(layout::DATA)?, [1, 0, 0, 0], "x86 reports a watchpoint after the access");
    m.vcpu.set_guest_debug(&GuestDebug::default())?;
    m.expect_halted()
}

fn software_breakpoint_ring0(host: &Host) -> Outcome {
    let mut m = Machine::long(host, |a| {
        a.nop()?;
        a.int3()?;
        a.hlt()
    })?;
    m.vcpu.set_guest_debug(&GuestDebug { software_breakpoints: true, ..GuestDebug::default() })?;
    m.expect(VcpuExit::Debug)?;
    let pc = layout::CODE + 1;
    assert_eq!(m.vcpu.debug_event()?, DebugEvent::SoftwareBreakpoint { pc });
    let mut regs = m.vcpu.get_regs()?;
    assert_eq!(regs.pc, pc);
    regs.pc += 1;
    m.vcpu.set_regs(&regs)?;
    m.expect_halted()
}

/// Switched off, nothing is left: neither in the guest's debug registers nor in its exceptions.
fn breakpoints_do_not_reach_the_guest(host: &Host) -> Outcome {
    let mut m = Machine::long(host, |a| {
        a.nop()?;
        a.mov(rax, dr7)?;
        a.mov(rbx, dr0)?;
        a.hlt()
    })?;
    m.vcpu.set_guest_debug(&breakpoint(layout::CODE + 1, 1, BreakOn::Execute))?;
    m.vcpu.set_guest_debug(&GuestDebug::default())?;
    m.expect_halted()?;
    assert_eq!((m.gpr(Reg::Rax)? & 0xff, m.gpr(Reg::Rbx)?), (0, 0));
    assert_eq!(m.report()?.count, 0);
    Ok(())
}

fn impossible_breakpoints_are_refused(host: &Host) -> Outcome {
    let mut m = machine(host)?;
    let one = HardwareBreakpoint { addr: layout::CODE, len: 1, on: BreakOn::Execute };
    let too_many = GuestDebug { hardware: vec![one; 5], ..GuestDebug::default() };
    for wrong in [
        too_many,
        breakpoint(layout::DATA, 3, BreakOn::Write),
        breakpoint(layout::DATA, 0, BreakOn::Write),
        breakpoint(layout::DATA + 1, 4, BreakOn::Access),
        breakpoint(layout::CODE, 4, BreakOn::Execute),
    ] {
        let refused = m.vcpu.set_guest_debug(&wrong);
        assert!(matches!(refused, Err(AccelError::InvalidArgument { .. })), "{wrong:?}: {refused:?}");
    }
    m.expect_halted()
}

fn event_only_after_a_debug_exit(host: &Host) -> Outcome {
    let mut m = machine(host)?;
    assert!(m.vcpu.debug_event().is_err());
    m.expect_halted()?;
    assert!(m.vcpu.debug_event().is_err());
    Ok(())
}
