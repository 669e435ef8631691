//! MMIO: every width, instructions with several accesses, and accesses that cross pages.

use crate::harness::machine::assemble64;
use crate::harness::{Host, Machine, Outcome, cases, fail};
use vm_accel::x86_64::Reg;
use vm_accel::{AccelError, GuestRegion, MemoryFlags, VcpuExit};
use vm_accel_guests::asm::*;
use vm_accel_guests::world::{PTE_LARGE, PTE_TABLE, World, layout};

cases![
    write_sizes,
    read_sizes,
    read_extends,
    every_register,
    movs_between_devices,
    rep_movs_to_and_from_device,
    rep_stos,
    push_and_pop,
    call_through_device_stack,
    read_modify_write,
    exchange,
    compare_only_reads,
    sixteen_byte_moves,
    page_crossing,
    ram_to_device_crossing,
    above_four_gib,
    from_ring3,
    unanswered_read_is_refused,
    unemulated_instruction_reports_its_bytes,
];

const A: u64 = layout::MMIO;
const B: u64 = layout::MMIO + 0x10_0000;

fn write_sizes(host: &Host) -> Outcome {
    let mut m = Machine::long(host, |a| {
        a.mov(rax, 0x8877_6655_4433_2211u64)?;
        a.mov(edi, A as u32)?;
        a.mov(byte_ptr(rdi), al)?;
        a.mov(word_ptr(rdi + 2), ax)?;
        a.mov(dword_ptr(rdi + 4), eax)?;
        a.mov(qword_ptr(rdi + 8), rax)?;
        a.mov(byte_ptr(rdi + 1), 0x5a)?;
        a.mov(qword_ptr(rdi + 16), -2)?;
        a.hlt()
    })?;
    let all = [0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88];
    m.expect_mmio_write(A, &all[..1])?;
    m.expect_mmio_write(A + 2, &all[..2])?;
    m.expect_mmio_write(A + 4, &all[..4])?;
    m.expect_mmio_write(A + 8, &all)?;
    m.expect_mmio_write(A + 1, &[0x5a])?;
    m.expect_mmio_write(A + 16, &(-2i64).to_le_bytes())?;
    m.expect_halted()
}

fn read_sizes(host: &Host) -> Outcome {
    let mut m = Machine::long(host, |a| {
        a.mov(esi, A as u32)?;
        a.mov(rax, -1i64)?;
        a.mov(rbx, rax)?;
        a.mov(rcx, rax)?;
        a.mov(al, byte_ptr(rsi))?;
        a.mov(bx, word_ptr(rsi + 2))?;
        a.mov(ecx, dword_ptr(rsi + 4))?;
        a.mov(rdx, qword_ptr(rsi + 8))?;
        a.hlt()
    })?;
    m.expect_mmio_read(A, &[1])?;
    m.expect_mmio_read(A + 2, &[2, 3])?;
    m.expect_mmio_read(A + 4, &[4, 5, 6, 7])?;
    m.expect_mmio_read(A + 8, &[8, 9, 10, 11, 12, 13, 14, 15])?;
    m.expect_halted()?;
    assert_eq!(m.gpr(Reg::Rax)?, 0xffff_ffff_ffff_ff01);
    assert_eq!(m.gpr(Reg::Rbx)?, 0xffff_ffff_ffff_0302);
    assert_eq!(m.gpr(Reg::Rcx)?, 0x0706_0504);
    assert_eq!(m.gpr(Reg::Rdx)?, 0x0f0e_0d0c_0b0a_0908);
    Ok(())
}

fn read_extends(host: &Host) -> Outcome {
    let mut m = Machine::long(host, |a| {
        a.mov(esi, A as u32)?;
        a.movzx(eax, byte_ptr(rsi))?;
        a.movsx(rbx, byte_ptr(rsi))?;
        a.movzx(ecx, word_ptr(rsi))?;
        a.movsx(rdx, word_ptr(rsi))?;
        a.movsxd(rdi, dword_ptr(rsi))?;
        a.hlt()
    })?;
    m.expect_mmio_read(A, &[0x80])?;
    m.expect_mmio_read(A, &[0x80])?;
    m.expect_mmio_read(A, &[0x00, 0x80])?;
    m.expect_mmio_read(A, &[0x00, 0x80])?;
    m.expect_mmio_read(A, &[0x00, 0x00, 0x00, 0x80])?;
    m.expect_halted()?;
    assert_eq!(m.gpr(Reg::Rax)?, 0x80);
    assert_eq!(m.gpr(Reg::Rbx)?, 0xffff_ffff_ffff_ff80);
    assert_eq!(m.gpr(Reg::Rcx)?, 0x8000);
    assert_eq!(m.gpr(Reg::Rdx)?, 0xffff_ffff_ffff_8000);
    assert_eq!(m.gpr(Reg::Rdi)?, 0xffff_ffff_8000_0000);
    Ok(())
}

/// Each general-purpose register as source and as target: the register number is decoded by the platform.
fn every_register(host: &Host) -> Outcome {
    let registers = [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15];
    let addressed = |index: usize| if index == 6 { rdi } else { rsi };
    let mut m = Machine::long(host, |a| {
        for (i, register) in registers.into_iter().enumerate() {
            let pointer = addressed(i);
            a.mov(pointer, A)?;
            a.mov(register, qword_ptr(pointer + 8 * i as u32))?;
            a.mov(pointer, A)?;
            a.mov(qword_ptr(pointer + 8 * i as u32), register)?;
        }
        a.hlt()
    })?;
    for i in 0..16u64 {
        let value = (0x0101_0101_0101_0101 * (i + 1)).to_le_bytes();
        m.expect_mmio_read(A + 8 * i, &value)?;
        m.expect_mmio_write(A + 8 * i, &value)?;
    }
    m.expect_halted()
}

fn movs_between_devices(host: &Host) -> Outcome {
    let mut m = Machine::long(host, |a| {
        a.mov(esi, A as u32)?;
        a.mov(edi, B as u32)?;
        a.movsq()?;
        a.movsb()?;
        a.hlt()
    })?;
    m.expect_mmio_read(A, &[1, 2, 3, 4, 5, 6, 7, 8])?;
    m.expect_mmio_write(B, &[1, 2, 3, 4, 5, 6, 7, 8])?;
    m.expect_mmio_read(A + 8, &[9])?;
    m.expect_mmio_write(B + 8, &[9])?;
    m.expect_halted()?;
    assert_eq!(m.gpr(Reg::Rsi)?, A + 9);
    assert_eq!(m.gpr(Reg::Rdi)?, B + 9);
    Ok(())
}

fn rep_movs_to_and_from_device(host: &Host) -> Outcome {
    let world = World::long().put(layout::DATA, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]).code(|a| {
        a.mov(esi, layout::DATA as u32)?;
        a.mov(edi, A as u32)?;
        a.mov(ecx, 3)?;
        a.rep().movsd()?;
        a.mov(esi, B as u32)?;
        a.mov(edi, layout::DATA as u32 + 0x100)?;
        a.mov(ecx, 3)?;
        a.rep().movsw()?;
        a.hlt()
    });
    let mut m = Machine::new(host, &world)?;
    m.expect_mmio_write(A, &[1, 2, 3, 4])?;
    m.expect_mmio_write(A + 4, &[5, 6, 7, 8])?;
    m.expect_mmio_write(A + 8, &[9, 10, 11, 12])?;
    m.expect_mmio_read(B, &[1, 2])?;
    m.expect_mmio_read(B + 2, &[3, 4])?;
    m.expect_mmio_read(B + 4, &[5, 6])?;
    m.expect_halted()?;
    assert_eq!(m.read(layout::DATA + 0x100)?, [1, 2, 3, 4, 5, 6, 0, 0]);
    assert_eq!(m.gpr(Reg::Rcx)?, 0);
    Ok(())
}

fn rep_stos(host: &Host) -> Outcome {
    let mut m = Machine::long(host, |a| {
        a.mov(edi, A as u32)?;
        a.mov(eax, 0x0403_0201u32)?;
        a.mov(ecx, 3)?;
        a.rep().stosd()?;
        a.mov(esi, A as u32)?;
        a.lodsw()?;
        a.hlt()
    })?;
    for i in 0..3 {
        m.expect_mmio_write(A + 4 * i, &[1, 2, 3, 4])?;
    }
    m.expect_mmio_read(A, &[0xaa, 0xbb])?;
    m.expect_halted()?;
    assert_eq!(m.gpr(Reg::Rax)?, 0x0403_bbaa);
    assert_eq!(m.gpr(Reg::Rdi)?, A + 12);
    Ok(())
}

fn push_and_pop(host: &Host) -> Outcome {
    let mut m = Machine::long(host, |a| {
        a.mov(rax, 0x1122_3344_5566_7788u64)?;
        a.mov(esp, A as u32 + 0x100)?;
        a.push(rax)?;
        a.pop(rbx)?;
        a.push(-1)?;
        a.mov(esi, A as u32)?;
        a.mov(esp, layout::STACK as u32)?;
        a.push(qword_ptr(rsi))?;
        a.pop(qword_ptr(rsi + 8))?;
        a.hlt()
    })?;
    m.expect_mmio_write(A + 0xf8, &0x1122_3344_5566_7788u64.to_le_bytes())?;
    m.expect_mmio_read(A + 0xf8, &[1; 8])?;
    m.expect_mmio_write(A + 0xf8, &[0xff; 8])?;
    m.expect_mmio_read(A, &[2; 8])?;
    m.expect_mmio_write(A + 8, &[2; 8])?;
    m.expect_halted()?;
    assert_eq!(m.gpr(Reg::Rbx)?, 0x0101_0101_0101_0101);
    assert_eq!(m.gpr(Reg::Rsp)?, layout::STACK);
    Ok(())
}

fn call_through_device_stack(host: &Host) -> Outcome {
    let target = layout::CODE + 0x100;
    let world = World::long()
        .code(|a| {
            a.mov(esp, A as u32 + 0x100)?;
            a.call(target)?;
            a.hlt()
        })
        .put(target, assemble64(target, |a| a.ret()));
    let mut m = Machine::new(host, &world)?;
    let back = (layout::CODE + 10).to_le_bytes();
    m.expect_mmio_write(A + 0xf8, &back)?;
    m.expect_mmio_read(A + 0xf8, &back)?;
    m.expect_halted()?;
    assert_eq!(m.gpr(Reg::Rsp)?, A + 0x100);
    Ok(())
}

/// One read and one write for each, and the flags of the result.
fn read_modify_write(host: &Host) -> Outcome {
    let mut m = Machine::long(host, |a| {
        a.mov(edi, A as u32)?;
        a.mov(eax, 0x10)?;
        a.add(dword_ptr(rdi), eax)?;
        a.pushfq()?;
        a.pop(rbx)?;
        a.or(byte_ptr(rdi + 4), 0x0f)?;
        a.and(word_ptr(rdi + 6), ax)?;
        a.inc(qword_ptr(rdi + 8))?;
        a.not(dword_ptr(rdi))?;
        a.shl(dword_ptr(rdi), 4)?;
        a.bts(dword_ptr(rdi), 3)?;
        a.lock().or(dword_ptr(rdi), eax)?;
        a.hlt()
    })?;
    m.expect_mmio_read(A, &0xffff_fff8u32.to_le_bytes())?;
    m.expect_mmio_write(A, &8u32.to_le_bytes())?;
    m.expect_mmio_read(A + 4, &[0x30])?;
    m.expect_mmio_write(A + 4, &[0x3f])?;
    m.expect_mmio_read(A + 6, &[0xff, 0xff])?;
    m.expect_mmio_write(A + 6, &[0x10, 0])?;
    m.expect_mmio_read(A + 8, &[0xff, 0, 0, 0, 0, 0, 0, 0])?;
    m.expect_mmio_write(A + 8, &[0, 1, 0, 0, 0, 0, 0, 0])?;
    m.expect_mmio_read(A, &[0x0f; 4])?;
    m.expect_mmio_write(A, &[0xf0; 4])?;
    m.expect_mmio_read(A, &0x0123_4567u32.to_le_bytes())?;
    m.expect_mmio_write(A, &0x1234_5670u32.to_le_bytes())?;
    m.expect_mmio_read(A, &0u32.to_le_bytes())?;
    m.expect_mmio_write(A, &8u32.to_le_bytes())?;
    m.expect_mmio_read(A, &3u32.to_le_bytes())?;
    m.expect_mmio_write(A, &0x13u32.to_le_bytes())?;
    m.expect_halted()?;
    assert_eq!(m.gpr(Reg::Rbx)? & 1, 1, "the addition carried");
    Ok(())
}

fn exchange(host: &Host) -> Outcome {
    let mut m = Machine::long(host, |a| {
        a.mov(edi, A as u32)?;
        a.mov(eax, 0x1111_1111u32)?;
        a.xchg(dword_ptr(rdi), eax)?;
        a.mov(ebx, 5)?;
        a.xadd(dword_ptr(rdi + 8), ebx)?;
        a.mov(ecx, 0x77)?;
        a.lock().cmpxchg(dword_ptr(rdi + 16), ecx)?;
        a.hlt()
    })?;
    m.expect_mmio_read(A, &[0x22; 4])?;
    m.expect_mmio_write(A, &[0x11; 4])?;
    m.expect_mmio_read(A + 8, &[7, 0, 0, 0])?;
    m.expect_mmio_write(A + 8, &[12, 0, 0, 0])?;
    m.expect_mmio_read(A + 16, &[0x22; 4])?;
    m.expect_mmio_write(A + 16, &[0x77, 0, 0, 0])?;
    m.expect_halted()?;
    assert_eq!(m.gpr(Reg::Rax)?, 0x2222_2222);
    assert_eq!(m.gpr(Reg::Rbx)?, 7);
    Ok(())
}

fn compare_only_reads(host: &Host) -> Outcome {
    let mut m = Machine::long(host, |a| {
        a.mov(edi, A as u32)?;
        a.cmp(dword_ptr(rdi), 5)?;
        a.sete(bl)?;
        a.test(byte_ptr(rdi + 4), 0x80)?;
        a.setne(cl)?;
        a.bt(dword_ptr(rdi), 2)?;
        a.setc(dl)?;
        a.hlt()
    })?;
    m.expect_mmio_read(A, &5u32.to_le_bytes())?;
    m.expect_mmio_read(A + 4, &[0x80])?;
    m.expect_mmio_read(A, &4u32.to_le_bytes())?;
    m.expect_halted()?;
    for reg in [Reg::Rbx, Reg::Rcx, Reg::Rdx] {
        assert_eq!(m.gpr(reg)? & 0xff, 1, "{reg:?}");
    }
    Ok(())
}

/// Takes MMIO accesses from `addr` on, in whatever pieces, until `total` bytes are there. A read is answered with
/// `source`.
fn transfer(m: &mut Machine, addr: u64, total: usize, source: Option<&[u8]>) -> Outcome<Vec<u8>> {
    let mut done = Vec::new();
    while done.len() < total {
        let VcpuExit::Mmio { addr: at, size, is_write } = m.run()? else {
            fail!("no MMIO access after {} of {total} bytes", done.len());
        };
        let range = done.len()..done.len() + usize::from(size);
        if at != addr + done.len() as u64 || is_write != source.is_none() || range.end > total {
            fail!("access of {size} at {at:#x} (write: {is_write}) after {} bytes", done.len());
        }
        match source {
            None => done.extend(m.vcpu.io_data()?),
            Some(source) => {
                done.extend(&source[range.clone()]);
                m.vcpu.complete_read(&source[range])?;
            }
        }
    }
    Ok(done)
}

/// An SSE register to and from a device: two accesses of 8 bytes or one of each.
fn sixteen_byte_moves(host: &Host) -> Outcome {
    let mut m = Machine::long(host, |a| {
        a.mov(esi, A as u32)?;
        a.movups(xmm1, xmmword_ptr(rsi))?;
        a.movups(xmmword_ptr(rsi + 0x20), xmm1)?;
        a.hlt()
    })?;
    let bytes: Vec<u8> = (1..=16).collect();
    transfer(&mut m, A, 16, Some(&bytes))?;
    assert_eq!(transfer(&mut m, A + 0x20, 16, None)?, bytes);
    m.expect_halted()
}

fn page_crossing(host: &Host) -> Outcome {
    let at = A + 0x1000 - 3;
    let mut m = Machine::long(host, |a| {
        a.mov(esi, at as u32)?;
        a.mov(rax, 0x0807_0605_0403_0201u64)?;
        a.mov(qword_ptr(rsi), rax)?;
        a.mov(ebx, dword_ptr(rsi))?;
        a.hlt()
    })?;
    assert_eq!(transfer(&mut m, at, 8, None)?, [1, 2, 3, 4, 5, 6, 7, 8]);
    transfer(&mut m, at, 4, Some(&[9, 8, 7, 6]))?;
    m.expect_halted()?;
    assert_eq!(m.gpr(Reg::Rbx)?, 0x0607_0809);
    Ok(())
}

/// The first bytes belong to RAM, the others to nobody: only the others exit.
fn ram_to_device_crossing(host: &Host) -> Outcome {
    let at = layout::RAM_SIZE - 3;
    let mut m = Machine::long(host, |a| {
        a.mov(esi, at as u32)?;
        a.mov(rax, 0x0807_0605_0403_0201u64)?;
        a.mov(qword_ptr(rsi), rax)?;
        a.mov(rbx, qword_ptr(rsi))?;
        a.hlt()
    })?;
    assert_eq!(transfer(&mut m, layout::RAM_SIZE, 5, None)?, [4, 5, 6, 7, 8]);
    transfer(&mut m, layout::RAM_SIZE, 5, Some(&[0x14, 0x15, 0x16, 0x17, 0x18]))?;
    m.expect_halted()?;
    assert_eq!(m.read(at)?, [1, 2, 3]);
    assert_eq!(m.gpr(Reg::Rbx)?, 0x1817_1615_1403_0201);
    Ok(())
}

/// Memory and a device above 4 GiB.
fn above_four_gib(host: &Host) -> Outcome {
    let high = 0x2_0000_0000u64;
    let table = layout::SPARE_TABLES;
    let world = World::long()
        // PDPT entry 8 covers 8–9 GiB.
        .put(layout::PAGE_TABLES + 0x1000 + 8 * 8, (table | PTE_TABLE).to_le_bytes())
        .put(table, (high | PTE_LARGE).to_le_bytes())
        .code(|a| {
            a.mov(rdi, high)?;
            a.mov(eax, 0x1234)?;
            a.mov(dword_ptr(rdi), eax)?;
            a.mov(dword_ptr(rdi + 0x10_0000), eax)?;
            a.mov(ebx, dword_ptr(rdi + 8))?;
            a.hlt()
        });
    let mut m = Machine::new(host, &world)?;
    let region = GuestRegion::anonymous(0x10_0000)?;
    region.write(8, &[9, 9, 0, 0])?;
    m.vm.map_memory(high, &region, MemoryFlags::RAM)?;
    m.expect_mmio_write(high + 0x10_0000, &0x1234u32.to_le_bytes())?;
    m.expect_halted()?;
    let mut word = [0; 4];
    region.read(0, &mut word)?;
    assert_eq!(u32::from_le_bytes(word), 0x1234);
    assert_eq!(m.gpr(Reg::Rbx)?, 0x909);
    Ok(())
}

fn from_ring3(host: &Host) -> Outcome {
    let world = World::user().code(|a| {
        a.mov(esi, A as u32)?;
        a.mov(rax, qword_ptr(rsi))?;
        a.add(rax, 1)?;
        a.mov(qword_ptr(rsi + 8), rax)?;
        a.movzx(ebx, byte_ptr(rsi + 0x10))?;
        a.add(dword_ptr(rsi + 0x14), ebx)?;
        let mut stop = a.create_label();
        a.set_label(&mut stop)?;
        a.mov(byte_ptr(rsi), bl)?;
        a.jmp(stop)
    });
    let mut m = Machine::new(host, &world)?;
    m.expect_mmio_read(A, &41u64.to_le_bytes())?;
    m.expect_mmio_write(A + 8, &42u64.to_le_bytes())?;
    m.expect_mmio_read(A + 0x10, &[3])?;
    m.expect_mmio_read(A + 0x14, &4u32.to_le_bytes())?;
    m.expect_mmio_write(A + 0x14, &7u32.to_le_bytes())?;
    m.expect_mmio_write(A, &[3])?;
    m.expect_mmio_write(A, &[3])
}

fn unanswered_read_is_refused(host: &Host) -> Outcome {
    let mut m = Machine::long(host, |a| {
        a.mov(esi, A as u32)?;
        a.mov(rax, qword_ptr(rsi))?;
        a.hlt()
    })?;
    m.expect(VcpuExit::Mmio { addr: A, size: 8, is_write: false })?;
    assert_eq!(m.vcpu.run(), Err(AccelError::PendingRead { addr: A, len: 8 }));
    let short = m.vcpu.complete_read(&[1; 4]);
    assert!(matches!(short, Err(AccelError::InvalidArgument { .. })), "{short:?}");
    m.vcpu.complete_read(&[1; 8])?;
    m.expect_halted()?;
    assert_eq!(m.gpr(Reg::Rax)?, 0x0101_0101_0101_0101);
    Ok(())
}

/// No KVM emulates a population count with an operand in a device: an error that carries the instruction, after which
/// the VMM may finish it itself and go on.
fn unemulated_instruction_reports_its_bytes(host: &Host) -> Outcome {
    let mut m = Machine::long(host, |a| {
        a.mov(esi, A as u32)?;
        a.popcnt(eax, dword_ptr(rsi))?;
        a.hlt()
    })?;
    let instruction = [0xf3, 0x0f, 0xb8, 0x06];
    match m.vcpu.run() {
        Err(AccelError::Emulation { instruction: bytes, .. }) => {
            assert!(bytes.as_slice().starts_with(&instruction), "bytes are {bytes}");
            let mut regs = m.vcpu.get_regs()?;
            assert_eq!(regs.pc, layout::CODE + 5);
            regs.pc += instruction.len() as u64;
            regs.gpr[Reg::Rax as usize] = 32;
            m.vcpu.set_regs(&regs)?;
        }
        // A backend that can emulate it is welcome to.
        Ok(VcpuExit::Mmio { addr: A, size: 4, is_write: false }) => m.vcpu.complete_read(&[0xff; 4])?,
        other => fail!("run() returned {other:?}"),
    }
    m.expect_halted()?;
    assert_eq!(m.gpr(Reg::Rax)?, 32);
    Ok(())
}
