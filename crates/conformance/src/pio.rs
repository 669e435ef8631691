//! Port I/O: every size and direction, string instructions, and what the protocol says about answers.

use crate::harness::{Host, Machine, Outcome, cases, fail};
use vm_accel::x86_64::Reg;
use vm_accel::{AccelError, IoDirection, VcpuExit};
use vm_accel_guests::asm::*;
use vm_accel_guests::world::{World, layout};

cases![
    out_sizes,
    in_sizes,
    out_immediate_port,
    in_keeps_upper_bits,
    rep_outs_each_size,
    rep_ins_each_size,
    string_io_backwards,
    rep_with_zero_count,
    rep_outs_many_pages,
    single_string_elements,
    unanswered_read_is_refused,
    wrong_answers_are_refused,
    regs_before_answer_are_before_instruction,
    protected_mode_io,
];

const PORT: u16 = 0x510;

fn out_sizes(host: &Host) -> Outcome {
    let mut m = Machine::long(host, |a| {
        a.mov(eax, 0x4433_2211u32)?;
        a.mov(edx, u32::from(PORT))?;
        a.out(dx, al)?;
        a.out(dx, ax)?;
        a.out(dx, eax)?;
        a.hlt()
    })?;
    m.expect_out_data(PORT, &[0x11])?;
    m.expect_out_data(PORT, &[0x11, 0x22])?;
    m.expect_out_data(PORT, &[0x11, 0x22, 0x33, 0x44])?;
    m.expect_halted()
}

fn in_sizes(host: &Host) -> Outcome {
    let mut m = Machine::long(host, |a| {
        a.mov(edx, u32::from(PORT))?;
        a.xor(eax, eax)?;
        a.in_(al, dx)?;
        a.mov(qword_ptr(layout::DATA), rax)?;
        a.xor(eax, eax)?;
        a.in_(ax, dx)?;
        a.mov(qword_ptr(layout::DATA + 8), rax)?;
        a.in_(eax, dx)?;
        a.mov(qword_ptr(layout::DATA + 16), rax)?;
        a.hlt()
    })?;
    m.expect_in(PORT, &[0xa1])?;
    m.expect_in(PORT, &[0xb1, 0xb2])?;
    m.expect_in(PORT, &[0xc1, 0xc2, 0xc3, 0xc4])?;
    m.expect_halted()?;
    assert_eq!(m.read_u64(layout::DATA)?, 0xa1);
    assert_eq!(m.read_u64(layout::DATA + 8)?, 0xb2b1);
    assert_eq!(m.read_u64(layout::DATA + 16)?, 0xc4c3_c2c1);
    Ok(())
}

fn out_immediate_port(host: &Host) -> Outcome {
    let mut m = Machine::long(host, |a| {
        a.mov(eax, 0x0102_0304u32)?;
        a.out(0x42, al)?;
        a.out(0x42, ax)?;
        a.out(0xff, eax)?;
        a.in_(al, 0x42)?;
        a.in_(eax, 0xff)?;
        a.hlt()
    })?;
    m.expect_out_data(0x42, &[4])?;
    m.expect_out_data(0x42, &[4, 3])?;
    m.expect_out_data(0xff, &[4, 3, 2, 1])?;
    m.expect_in(0x42, &[9])?;
    m.expect_in(0xff, &[1, 2, 3, 4])?;
    m.expect_halted()?;
    assert_eq!(m.gpr(Reg::Rax)?, 0x0403_0201);
    Ok(())
}

/// IN to AL and AX leaves the rest of RAX alone; IN to EAX clears the upper half.
fn in_keeps_upper_bits(host: &Host) -> Outcome {
    let mut m = Machine::long(host, |a| {
        a.mov(rax, 0x1111_2222_3333_4444u64)?;
        a.mov(edx, u32::from(PORT))?;
        a.in_(al, dx)?;
        a.mov(rbx, rax)?;
        a.in_(ax, dx)?;
        a.mov(rcx, rax)?;
        a.in_(eax, dx)?;
        a.hlt()
    })?;
    m.expect_in(PORT, &[0xaa])?;
    m.expect_in(PORT, &[0xbb, 0xcc])?;
    m.expect_in(PORT, &[0xff; 4])?;
    m.expect_halted()?;
    assert_eq!(m.gpr(Reg::Rbx)?, 0x1111_2222_3333_44aa);
    assert_eq!(m.gpr(Reg::Rcx)?, 0x1111_2222_3333_ccbb);
    assert_eq!(m.gpr(Reg::Rax)?, 0xffff_ffff);
    Ok(())
}

/// Collects `total` bytes of OUTs to [`PORT`], in as many exits as the platform likes.
fn collect_outs(m: &mut Machine, size: u8, total: usize) -> Outcome<Vec<u8>> {
    let mut written = Vec::new();
    while written.len() < total {
        let data = m.expect_out(PORT, size)?;
        if data.is_empty() || data.len() % usize::from(size) != 0 {
            fail!("{} bytes are no whole number of {size}-byte elements", data.len());
        }
        written.extend(data);
    }
    Ok(written)
}

/// Answers `source` to INs from [`PORT`], in as many exits as the platform likes.
fn answer_ins(m: &mut Machine, size: u8, mut source: &[u8]) -> Outcome {
    while !source.is_empty() {
        m.expect(VcpuExit::Io { port: PORT, direction: IoDirection::In, size })?;
        let pending = m.vcpu.pending_access().expect("an IN is pending");
        assert_eq!((pending.addr, pending.is_write, pending.answered), (PORT.into(), false, false));
        if pending.len == 0 || pending.len % usize::from(size) != 0 || pending.len > source.len() {
            fail!("an IN of {} bytes in {size}-byte elements", pending.len);
        }
        let (now, later) = source.split_at(pending.len);
        m.vcpu.complete_read(now)?;
        source = later;
    }
    Ok(())
}

/// One of the instructions INSB/W/D or OUTSB/W/D, with a REP prefix if wanted.
fn string_io(a: &mut CodeAssembler, output: bool, size: u8, rep: bool) -> Result<(), vm_accel_guests::IcedError> {
    let a = if rep { a.rep() } else { a };
    match (output, size) {
        (true, 1) => a.outsb(),
        (true, 2) => a.outsw(),
        (true, _) => a.outsd(),
        (false, 1) => a.insb(),
        (false, 2) => a.insw(),
        (false, _) => a.insd(),
    }
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 7 + i / 251 + 3) as u8).collect()
}

fn rep_outs_each_size(host: &Host) -> Outcome {
    for size in [1u8, 2, 4] {
        let bytes = pattern(5 * usize::from(size));
        let world = World::long().put(layout::DATA, bytes.clone()).code(|a| {
            a.mov(esi, layout::DATA as u32)?;
            a.mov(ecx, 5)?;
            a.mov(edx, u32::from(PORT))?;
            string_io(a, true, size, true)?;
            a.hlt()
        });
        let mut m = Machine::new(host, &world)?;
        assert_eq!(collect_outs(&mut m, size, bytes.len())?, bytes);
        m.expect_halted()?;
        assert_eq!(m.gpr(Reg::Rcx)?, 0);
        assert_eq!(m.gpr(Reg::Rsi)?, layout::DATA + bytes.len() as u64);
    }
    Ok(())
}

fn rep_ins_each_size(host: &Host) -> Outcome {
    for size in [1u8, 2, 4] {
        let mut m = Machine::long(host, |a| {
            a.mov(edi, layout::DATA as u32)?;
            a.mov(ecx, 5)?;
            a.mov(edx, u32::from(PORT))?;
            string_io(a, false, size, true)?;
            a.hlt()
        })?;
        let bytes = pattern(5 * usize::from(size));
        answer_ins(&mut m, size, &bytes)?;
        m.expect_halted()?;
        assert_eq!(m.read::<20>(layout::DATA)?[..bytes.len()], bytes);
        assert_eq!(m.read::<21>(layout::DATA)?[bytes.len()], 0, "wrote too much");
        assert_eq!(m.gpr(Reg::Rcx)?, 0);
        assert_eq!(m.gpr(Reg::Rdi)?, layout::DATA + bytes.len() as u64);
    }
    Ok(())
}

/// With the direction flag set, elements come from and go to falling addresses.
fn string_io_backwards(host: &Host) -> Outcome {
    let start = layout::DATA + 0x100;
    let bytes = pattern(16);
    let world = World::long().put(start, bytes.clone()).code(|a| {
        a.std()?;
        a.mov(edx, u32::from(PORT))?;
        a.mov(esi, start as u32 + 12)?;
        a.mov(ecx, 4)?;
        a.rep().outsd()?;
        a.mov(edi, start as u32 + 0x80 + 6)?;
        a.mov(ecx, 4)?;
        a.rep().insw()?;
        a.hlt()
    });
    let mut m = Machine::new(host, &world)?;
    let backwards: Vec<u8> = bytes.chunks(4).rev().flatten().copied().collect();
    assert_eq!(collect_outs(&mut m, 4, 16)?, backwards);
    answer_ins(&mut m, 2, &[1, 2, 3, 4, 5, 6, 7, 8])?;
    m.expect_halted()?;
    assert_eq!(m.read(start + 0x80)?, [7, 8, 5, 6, 3, 4, 1, 2]);
    assert_eq!(m.gpr(Reg::Rsi)?, start - 4);
    assert_eq!(m.gpr(Reg::Rdi)?, start + 0x80 - 2);
    Ok(())
}

fn rep_with_zero_count(host: &Host) -> Outcome {
    let mut m = Machine::long(host, |a| {
        a.xor(ecx, ecx)?;
        a.mov(edx, u32::from(PORT))?;
        a.mov(esi, layout::DATA as u32)?;
        a.mov(edi, layout::DATA as u32)?;
        a.rep().outsb()?;
        a.rep().insd()?;
        a.hlt()
    })?;
    m.expect_halted()?;
    assert_eq!(m.gpr(Reg::Rsi)?, layout::DATA);
    assert_eq!(m.gpr(Reg::Rdi)?, layout::DATA);
    Ok(())
}

/// More than fits in one exit, and not aligned to pages.
fn rep_outs_many_pages(host: &Host) -> Outcome {
    let start = 0x10_0ffb;
    let bytes = pattern(3 * 4096 + 5);
    let world = World::long().put(start, bytes.clone()).code(|a| {
        a.mov(esi, start as u32)?;
        a.mov(ecx, bytes.len() as u32)?;
        a.mov(edx, u32::from(PORT))?;
        a.rep().outsb()?;
        a.mov(edi, 0x18_0ffbu32)?;
        a.mov(ecx, bytes.len() as u32)?;
        a.rep().insb()?;
        a.hlt()
    });
    let mut m = Machine::new(host, &world)?;
    assert_eq!(collect_outs(&mut m, 1, bytes.len())?, bytes);
    answer_ins(&mut m, 1, &bytes)?;
    m.expect_halted()?;
    let mut read = vec![0; bytes.len()];
    m.ram.read(0x18_0ffb, &mut read)?;
    assert_eq!(read, bytes);
    Ok(())
}

fn single_string_elements(host: &Host) -> Outcome {
    let bytes = pattern(7);
    let world = World::long().put(layout::DATA, bytes.clone()).code(|a| {
        a.mov(esi, layout::DATA as u32)?;
        a.mov(edi, layout::DATA as u32 + 0x40)?;
        a.mov(edx, u32::from(PORT))?;
        for size in [1, 2, 4] {
            string_io(a, true, size, false)?;
            string_io(a, false, size, false)?;
        }
        a.hlt()
    });
    let mut m = Machine::new(host, &world)?;
    for element in [&bytes[..1], &bytes[1..3], &bytes[3..]] {
        m.expect_out_data(PORT, element)?;
        m.expect_in(PORT, element)?;
    }
    m.expect_halted()?;
    assert_eq!(m.read::<7>(layout::DATA + 0x40)?[..], bytes);
    Ok(())
}

fn unanswered_read_is_refused(host: &Host) -> Outcome {
    let mut m = Machine::long(host, |a| {
        a.mov(edx, u32::from(PORT))?;
        a.in_(ax, dx)?;
        a.hlt()
    })?;
    m.expect(VcpuExit::Io { port: PORT, direction: IoDirection::In, size: 2 })?;
    let refused = AccelError::PendingRead { addr: PORT.into(), len: 2 };
    assert_eq!(m.vcpu.run(), Err(refused.clone()));
    assert_eq!(m.vcpu.quiesce(), Err(refused.clone()));
    assert_eq!(m.vcpu.run(), Err(refused), "the read stays pending");
    m.vcpu.complete_read(&[1, 2])?;
    let pending = m.vcpu.pending_access().expect("answered, not finished");
    assert!(pending.answered);
    m.expect_halted()?;
    assert!(m.vcpu.pending_access().is_none());
    assert_eq!(m.gpr(Reg::Rax)?, 0x201);
    Ok(())
}

fn wrong_answers_are_refused(host: &Host) -> Outcome {
    let mut m = Machine::long(host, |a| {
        a.mov(edx, u32::from(PORT))?;
        a.in_(eax, dx)?;
        a.out(dx, eax)?;
        a.hlt()
    })?;
    let refused = |result: Result<(), AccelError>| {
        assert!(matches!(result, Err(AccelError::InvalidArgument { .. })), "{result:?}")
    };
    refused(m.vcpu.complete_read(&[]));
    refused(m.vcpu.io_data().map(|_| ()));
    refused(m.vcpu.fail_access());
    m.expect(VcpuExit::Io { port: PORT, direction: IoDirection::In, size: 4 })?;
    for wrong in [&[][..], &[1], &[1, 2, 3], &[1, 2, 3, 4, 5]] {
        refused(m.vcpu.complete_read(wrong));
    }
    refused(m.vcpu.io_data().map(|_| ()));
    refused(m.vcpu.fail_access());
    m.vcpu.complete_read(&[1, 2, 3, 4])?;
    m.expect_out_data(PORT, &[1, 2, 3, 4])?;
    refused(m.vcpu.complete_read(&[1, 2, 3, 4]));
    refused(m.vcpu.fail_access());
    assert_eq!(m.vcpu.io_data()?, [1, 2, 3, 4], "refusals changed the data");
    m.expect_halted()?;
    refused(m.vcpu.io_data().map(|_| ()));
    refused(m.vcpu.complete_read(&[1]));
    Ok(())
}

/// At a read exit the registers show the state before the instruction; after `quiesce` the state behind it.
fn regs_before_answer_are_before_instruction(host: &Host) -> Outcome {
    let mut m = Machine::long(host, |a| {
        a.mov(edx, u32::from(PORT))?;
        a.mov(eax, 7)?;
        a.in_(al, dx)?;
        a.hlt()
    })?;
    m.expect(VcpuExit::Io { port: PORT, direction: IoDirection::In, size: 1 })?;
    let before = m.vcpu.get_regs()?;
    assert_eq!(before.pc, layout::CODE + 10);
    assert_eq!(before.gpr[Reg::Rax as usize], 7);
    m.vcpu.complete_read(&[0x55])?;
    m.quiesce()?;
    let after = m.vcpu.get_regs()?;
    assert_eq!(after.pc, layout::CODE + 11);
    assert_eq!(after.gpr[Reg::Rax as usize], 0x55);
    m.expect_halted()
}

fn protected_mode_io(host: &Host) -> Outcome {
    let world = World::protected().put(layout::DATA, [1, 2, 3]).code(|a| {
        a.mov(edx, u32::from(PORT))?;
        a.mov(esi, layout::DATA as u32)?;
        a.mov(ecx, 3)?;
        a.rep().outsb()?;
        a.in_(eax, dx)?;
        a.mov(dword_ptr(layout::DATA as u32 + 8), eax)?;
        a.hlt()
    });
    let mut m = Machine::new(host, &world)?;
    assert_eq!(collect_outs(&mut m, 1, 3)?, [1, 2, 3]);
    m.expect_in(PORT, &[9, 8, 7, 6])?;
    m.expect_halted()?;
    assert_eq!(m.read(layout::DATA + 8)?, [9, 8, 7, 6]);
    Ok(())
}
