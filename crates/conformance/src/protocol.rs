//! The completion protocol where one instruction makes several accesses, `quiesce`, the convenience loop, and accesses to
//! MSRs.

use crate::harness::{Host, Machine, Outcome, cases, fail};
use vm_accel::x86_64::Reg;
use vm_accel::{AccelError, ExitHandler, IoDirection, VcpuExit, VcpuResult};
use vm_accel_guests::asm::*;
use vm_accel_guests::world::{World, layout};

cases![
    quiesce_with_nothing_pending,
    quiesce_finishes_a_port_read,
    quiesce_finishes_an_mmio_read,
    quiesce_finishes_writes,
    quiesce_reports_further_accesses,
    quiesce_in_a_read_modify_write,
    quiesce_in_string_input,
    pending_access_is_described,
    registers_stay_after_quiesce,
    run_with_serves_a_device,
    run_with_hands_errors_on,
    run_with_reads_ones_from_nobody,
    msr_read_is_answered[MsrExits],
    msr_write_is_reported[MsrExits],
    msr_access_is_refused[MsrExits],
    msr_exits_are_off_at_first[MsrExits],
];

const A: u64 = layout::MMIO;
const B: u64 = layout::MMIO + 0x10_0000;

fn quiesce_with_nothing_pending(host: &Host) -> Outcome {
    let mut m = Machine::long(host, |a| {
        a.mov(al, 1)?;
        a.hlt()?;
        a.mov(al, 2)?;
        a.hlt()
    })?;
    let before = m.vcpu.get_regs()?;
    m.quiesce()?;
    assert_eq!(m.vcpu.get_regs()?, before, "the guest ran");
    m.expect_halted()?;
    m.quiesce()?;
    m.quiesce()?;
    assert_eq!(m.gpr(Reg::Rax)?, 1);
    m.expect_halted()?;
    assert_eq!(m.gpr(Reg::Rax)?, 2);
    Ok(())
}

fn quiesce_finishes_a_port_read(host: &Host) -> Outcome {
    let mut m = Machine::long(host, |a| {
        a.in_(ax, 0x10)?;
        a.inc(eax)?;
        a.hlt()
    })?;
    m.expect_in(0x10, &[0x34, 0x12])?;
    m.quiesce()?;
    assert!(m.vcpu.pending_access().is_none());
    assert_eq!(m.gpr(Reg::Rax)?, 0x1234, "exactly one instruction");
    m.expect_halted()?;
    assert_eq!(m.gpr(Reg::Rax)?, 0x1235);
    Ok(())
}

fn quiesce_finishes_an_mmio_read(host: &Host) -> Outcome {
    let mut m = Machine::long(host, |a| {
        a.mov(esi, A as u32)?;
        a.mov(rax, qword_ptr(rsi))?;
        a.inc(rax)?;
        a.hlt()
    })?;
    m.expect_mmio_read(A, &[9; 8])?;
    m.quiesce()?;
    let regs = m.vcpu.get_regs()?;
    assert_eq!(regs.gpr[Reg::Rax as usize], 0x0909_0909_0909_0909);
    assert_eq!(regs.pc, layout::CODE + 8);
    m.expect_halted()
}

fn quiesce_finishes_writes(host: &Host) -> Outcome {
    let mut m = Machine::long(host, |a| {
        a.mov(edi, A as u32)?;
        a.mov(dword_ptr(rdi), edi)?;
        a.out(0x10, al)?;
        a.hlt()
    })?;
    m.expect_mmio_write(A, &(A as u32).to_le_bytes())?;
    m.quiesce()?;
    assert_eq!(m.vcpu.get_regs()?.pc, layout::CODE + 7);
    m.expect_out(0x10, 1)?;
    m.quiesce()?;
    assert_eq!(m.vcpu.get_regs()?.pc, layout::CODE + 9);
    m.expect_halted()
}

/// MOVS from a device to a device: the write comes out of `quiesce`.
fn quiesce_reports_further_accesses(host: &Host) -> Outcome {
    let mut m = Machine::long(host, |a| {
        a.mov(esi, A as u32)?;
        a.mov(edi, B as u32)?;
        a.movsd()?;
        a.hlt()
    })?;
    m.expect_mmio_read(A, &[1, 2, 3, 4])?;
    let write = VcpuExit::Mmio { addr: B, size: 4, is_write: true };
    assert_eq!(m.vcpu.quiesce()?, write);
    assert_eq!(m.vcpu.io_data()?, [1, 2, 3, 4]);
    m.quiesce()?;
    let regs = m.vcpu.get_regs()?;
    assert_eq!(regs.pc, layout::CODE + 11);
    assert_eq!((regs.gpr[Reg::Rsi as usize], regs.gpr[Reg::Rdi as usize]), (A + 4, B + 4));
    m.expect_halted()
}

fn quiesce_in_a_read_modify_write(host: &Host) -> Outcome {
    let mut m = Machine::long(host, |a| {
        a.mov(edi, A as u32)?;
        a.add(dword_ptr(rdi), 5)?;
        a.hlt()
    })?;
    m.expect_mmio_read(A, &[10, 0, 0, 0])?;
    let write = VcpuExit::Mmio { addr: A, size: 4, is_write: true };
    assert_eq!(m.vcpu.quiesce()?, write);
    assert_eq!(m.vcpu.io_data()?, [15, 0, 0, 0]);
    m.quiesce()?;
    assert_eq!(m.vcpu.get_regs()?.pc, layout::CODE + 8);
    m.expect_halted()
}

/// State is saved in the middle of a REP INS: what was answered is in memory, the rest follows.
fn quiesce_in_string_input(host: &Host) -> Outcome {
    const COUNT: usize = 3000;
    let mut m = Machine::long(host, |a| {
        a.mov(edi, layout::DATA as u32)?;
        a.mov(ecx, COUNT as u32)?;
        a.mov(edx, 0x10)?;
        a.rep().insb()?;
        a.hlt()
    })?;
    let source: Vec<u8> = (0..COUNT).map(|i| (i / 3) as u8).collect();
    let mut done = 0;
    let mut next = m.run()?;
    while done < COUNT {
        let input = VcpuExit::Io { port: 0x10, direction: IoDirection::In, size: 1 };
        assert_eq!(next, input);
        let len = m.vcpu.pending_access().map_or(0, |access| access.len);
        if len == 0 || len > COUNT - done {
            fail!("{len} bytes wanted after {done}");
        }
        m.vcpu.complete_read(&source[done..done + len])?;
        done += len;
        next = m.vcpu.quiesce()?;
        if next == VcpuExit::Interrupt {
            // Nothing is pending: registers and memory agree on how far the instruction got.
            let (left, to) = (m.gpr(Reg::Rcx)?, m.gpr(Reg::Rdi)?);
            let got = COUNT as u64 - left;
            assert_eq!(to, layout::DATA + got);
            assert!(got <= done as u64);
            let mut bytes = vec![0; got as usize];
            m.ram.read(layout::DATA, &mut bytes)?;
            assert_eq!(bytes, source[..got as usize]);
            next = m.run()?;
        }
    }
    assert_eq!(next, VcpuExit::Halted);
    let mut bytes = vec![0; COUNT];
    m.ram.read(layout::DATA, &mut bytes)?;
    assert_eq!(bytes, source);
    Ok(())
}

fn pending_access_is_described(host: &Host) -> Outcome {
    let mut m = Machine::long(host, |a| {
        a.in_(ax, 0x42)?;
        a.mov(edi, A as u32)?;
        a.mov(qword_ptr(rdi + 8), rax)?;
        a.hlt()
    })?;
    assert!(m.vcpu.pending_access().is_none());
    m.run()?;
    let access = m.vcpu.pending_access().expect("a read is pending");
    assert_eq!((access.addr, access.len, access.is_write, access.answered), (0x42, 2, false, false));
    m.vcpu.complete_read(&[1, 2])?;
    assert!(m.vcpu.pending_access().is_some_and(|access| access.answered));
    // A second answer replaces the first as long as the guest has not got it.
    m.vcpu.complete_read(&[3, 4])?;
    m.run()?;
    let access = m.vcpu.pending_access().expect("a write is pending");
    assert_eq!((access.addr, access.len, access.is_write, access.answered), (A + 8, 8, true, true));
    assert_eq!(m.vcpu.io_data()?[..2], [3, 4]);
    m.expect_halted()?;
    assert!(m.vcpu.pending_access().is_none());
    Ok(())
}

fn registers_stay_after_quiesce(host: &Host) -> Outcome {
    let mut m = Machine::long(host, |a| {
        a.mov(esi, A as u32)?;
        a.mov(eax, dword_ptr(rsi))?;
        a.out(0x10, eax)?;
        a.hlt()
    })?;
    m.expect_mmio_read(A, &[1, 1, 1, 1])?;
    m.quiesce()?;
    m.set_gpr(Reg::Rax, 0x7777_7777)?;
    m.expect_out_data(0x10, &[0x77; 4])?;
    m.expect_halted()
}

/// A device with one register at A and one port; it stops at HLT.
#[derive(Default)]
struct Device {
    log: Vec<String>,
}

impl ExitHandler for Device {
    fn io_read(&mut self, port: u16, size: u8, data: &mut [u8]) -> VcpuResult<()> {
        self.log.push(format!("in {port:x} {size} {}", data.len()));
        assert!(data.iter().all(|byte| *byte == 0xff));
        if port == 0x10 {
            data.fill(7);
        }
        Ok(())
    }

    fn io_write(&mut self, port: u16, size: u8, data: &[u8]) -> VcpuResult<()> {
        self.log.push(format!("out {port:x} {size} {data:x?}"));
        if port == 0x666 {
            return Err(AccelError::invalid("port", "this one is cursed"));
        }
        Ok(())
    }

    fn mmio_read(&mut self, addr: u64, data: &mut [u8]) -> VcpuResult<()> {
        self.log.push(format!("read {addr:x} {}", data.len()));
        data.fill(9);
        Ok(())
    }

    fn mmio_write(&mut self, addr: u64, data: &[u8]) -> VcpuResult<()> {
        self.log.push(format!("write {addr:x} {data:x?}"));
        Ok(())
    }

    fn stop_at(&mut self, exit: VcpuExit) -> VcpuResult<bool> {
        self.log.push(format!("{exit:?}"));
        Ok(exit == VcpuExit::Halted)
    }
}

fn run_with_serves_a_device(host: &Host) -> Outcome {
    let mut m = Machine::long(host, |a| {
        a.in_(ax, 0x10)?;
        a.out(0x11, ax)?;
        a.mov(esi, A as u32)?;
        a.mov(edi, B as u32)?;
        a.movsd()?;
        a.hlt()
    })?;
    let mut device = Device::default();
    assert_eq!(m.vcpu.run_with(&mut device)?, VcpuExit::Halted);
    let expected = [
        "in 10 2 2".to_owned(),
        "out 11 2 [7, 7]".to_owned(),
        format!("read {A:x} 4"),
        format!("write {B:x} [9, 9, 9, 9]"),
        "Halted".to_owned(),
    ];
    assert_eq!(device.log, expected);
    Ok(())
}

fn run_with_hands_errors_on(host: &Host) -> Outcome {
    let mut m = Machine::long(host, |a| {
        a.mov(edx, 0x666)?;
        a.out(dx, al)?;
        a.hlt()
    })?;
    let mut device = Device::default();
    let error = m.vcpu.run_with(&mut device);
    assert!(matches!(error, Err(AccelError::InvalidArgument { what: "port", .. })), "{error:?}");
    assert_eq!(m.vcpu.run_with(&mut device)?, VcpuExit::Halted);
    Ok(())
}

fn run_with_reads_ones_from_nobody(host: &Host) -> Outcome {
    struct Nobody;
    impl ExitHandler for Nobody {}
    let mut m = Machine::long(host, |a| {
        a.in_(eax, 0x10)?;
        a.mov(esi, A as u32)?;
        a.mov(rbx, qword_ptr(rsi))?;
        a.mov(qword_ptr(rsi), rbx)?;
        a.hlt()
    })?;
    assert_eq!(m.vcpu.run_with(&mut Nobody)?, VcpuExit::Halted);
    assert_eq!(m.gpr(Reg::Rax)?, 0xffff_ffff);
    assert_eq!(m.gpr(Reg::Rbx)?, u64::MAX);
    Ok(())
}

/// No CPU has it.
const MSR: u32 = 0xdead_beef;

/// RDMSR and then WRMSR of its complement.
fn msr_machine(host: &Host) -> Outcome<Machine> {
    let mut m = Machine::new(
        host,
        &World::long().code(|a| {
            a.mov(ecx, MSR)?;
            a.rdmsr()?;
            a.not(eax)?;
            a.wrmsr()?;
            a.hlt()
        }),
    )?;
    m.x86().exit_on_unknown_msrs(true)?;
    Ok(m)
}

fn msr_read_is_answered(host: &Host) -> Outcome {
    let mut m = msr_machine(host)?;
    m.expect(VcpuExit::Msr { index: MSR, is_write: false })?;
    let refused = m.vcpu.run();
    assert_eq!(refused, Err(AccelError::PendingRead { addr: MSR.into(), len: 8 }));
    m.vcpu.complete_read(&0x1111_2222_3333_4444u64.to_le_bytes())?;
    m.quiesce()?;
    assert_eq!((m.gpr(Reg::Rax)?, m.gpr(Reg::Rdx)?), (0x3333_4444, 0x1111_2222));
    Ok(())
}

fn msr_write_is_reported(host: &Host) -> Outcome {
    let mut m = msr_machine(host)?;
    m.expect(VcpuExit::Msr { index: MSR, is_write: false })?;
    m.vcpu.complete_read(&0x1111_2222_0000_0000u64.to_le_bytes())?;
    m.expect(VcpuExit::Msr { index: MSR, is_write: true })?;
    assert_eq!(m.vcpu.io_data()?, 0x1111_2222_ffff_ffffu64.to_le_bytes());
    m.expect_halted()
}

/// The guest gets a general protection fault.
fn msr_access_is_refused(host: &Host) -> Outcome {
    let mut m = msr_machine(host)?;
    m.expect(VcpuExit::Msr { index: MSR, is_write: false })?;
    m.vcpu.fail_access()?;
    let report = m.expect_vector(13)?;
    assert_eq!((report.ip, report.error_code), (layout::CODE + 5, 0));
    // The handler returns to the instruction, which asks again.
    m.expect(VcpuExit::Msr { index: MSR, is_write: false })?;
    m.vcpu.complete_read(&[0; 8])?;
    m.expect(VcpuExit::Msr { index: MSR, is_write: true })?;
    m.vcpu.fail_access()?;
    assert_eq!(m.expect_vector(13)?.ip, layout::CODE + 9);
    Ok(())
}

fn msr_exits_are_off_at_first(host: &Host) -> Outcome {
    let mut m = msr_machine(host)?;
    m.x86().exit_on_unknown_msrs(false)?;
    m.expect_vector(13)?;
    Ok(())
}
