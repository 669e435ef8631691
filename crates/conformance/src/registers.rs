//! Every group of registers: what is set is read back, what is set is what the guest sees, and what the guest changes is
//! what the host reads.

use crate::harness::{Host, Machine, Outcome, cases, fail};
use vm_accel::x86_64::{CpuidEntry, FXSAVE_SIZE, MpState, Reg, X86DebugRegs, X86Events, X86FpuRegs, X86Msr, Xcr};
use vm_accel::{AccelError, FpuRegs, IrqChip};
use vm_accel_guests::asm::*;
use vm_accel_guests::world::{PTE_LARGE, PTE_TABLE, World, layout, selector};

cases![
    gprs_before_and_after_running,
    gprs_at_every_exit,
    flags_are_set_and_read,
    program_counter_can_be_moved,
    sregs_round_trip,
    sregs_seen_by_guest,
    sregs_changed_by_guest,
    task_priority_without_irqchip,
    task_priority_with_irqchip[LocalApic],
    fpu_seen_by_guest,
    fpu_changed_by_guest,
    fpu_refuses_reserved_bits,
    xsave_round_trip[Xsave],
    xsave_wide_vectors_seen_by_guest[Xsave],
    xsave_of_another_length_is_refused[Xsave],
    xcrs_round_trip[Xsave],
    msrs_seen_and_changed_by_guest,
    msr_lists_stop_at_the_first_refusal,
    listed_msrs_can_be_read_and_set_back,
    listed_msrs_can_be_set_back_with_irqchip[LocalApic],
    cpuid_supported_is_sensible,
    cpuid_set_is_what_the_guest_sees,
    debug_registers,
    events_round_trip,
    exception_is_injected,
    interrupt_in_delivery_is_injected,
    lapic_round_trip[LocalApic],
    known_msrs_do_not_exit[MsrExits],
    lapic_needs_a_controller,
    mp_state[LocalApic],
    tsc_runs_forward,
    tsc_can_be_set,
    translate_linear_addresses,
];

const REGISTERS: [Reg; 16] = [
    Reg::Rax,
    Reg::Rcx,
    Reg::Rdx,
    Reg::Rbx,
    Reg::Rsp,
    Reg::Rbp,
    Reg::Rsi,
    Reg::Rdi,
    Reg::R8,
    Reg::R9,
    Reg::R10,
    Reg::R11,
    Reg::R12,
    Reg::R13,
    Reg::R14,
    Reg::R15,
];

const ASM_REGISTERS: [AsmRegister64; 16] =
    [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15];

/// The guest stores all registers, then adds 1 to each.
fn gprs_before_and_after_running(host: &Host) -> Outcome {
    let mut m = Machine::long(host, |a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        for (i, register) in ASM_REGISTERS.into_iter().enumerate() {
            a.mov(qword_ptr(layout::DATA + 8 * i as u64), register)?;
            a.lea(register, ptr(register + 1))?;
        }
        a.hlt()?;
        a.jmp(again)
    })?;
    for round in 1..4u64 {
        let mut regs = m.vcpu.get_regs()?;
        for (i, register) in REGISTERS.into_iter().enumerate() {
            regs.gpr[register as usize] = (0xfedc_ba98_7654_3210u64).rotate_left(i as u32 * 4) ^ round;
        }
        m.vcpu.set_regs(&regs)?;
        assert_eq!(m.vcpu.get_regs()?, regs, "read back before running");
        m.expect_halted()?;
        let after = m.vcpu.get_regs()?;
        for (i, register) in REGISTERS.into_iter().enumerate() {
            let set = regs.gpr[register as usize];
            assert_eq!(m.read_u64(layout::DATA + 8 * i as u64)?, set, "{register:?} in the guest");
            assert_eq!(after.gpr[register as usize], set.wrapping_add(1), "{register:?} afterwards");
        }
        assert_eq!(after.gpr[16..], [0; 16]);
    }
    Ok(())
}

/// Registers are read and set at each of many exits, in the way of a VMM that serves calls through registers.
fn gprs_at_every_exit(host: &Host) -> Outcome {
    let mut m = Machine::long(host, |a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.out(0x10, al)?;
        a.lea(rbx, ptr(rbx + rcx))?;
        a.in_(al, 0x11)?;
        a.add(r15, rbx)?;
        a.jmp(again)
    })?;
    let (mut rbx_now, mut r15_now) = (0u64, 0u64);
    for i in 0..300u64 {
        m.expect_out(0x10, 1)?;
        m.quiesce()?;
        let mut regs = m.vcpu.get_regs()?;
        assert_eq!((regs.gpr[Reg::Rbx as usize], regs.gpr[Reg::R15 as usize]), (rbx_now, r15_now));
        regs.gpr[Reg::Rcx as usize] = i * i;
        m.vcpu.set_regs(&regs)?;
        m.expect_in(0x11, &[i as u8])?;
        rbx_now += i * i;
        r15_now += rbx_now;
        if i % 3 == 0 {
            m.quiesce()?;
            assert_eq!(m.gpr(Reg::Rax)? as u8, i as u8);
            m.set_gpr(Reg::R14, i)?;
            assert_eq!(m.gpr(Reg::R14)?, i);
        }
    }
    Ok(())
}

fn flags_are_set_and_read(host: &Host) -> Outcome {
    // CF, PF, AF, ZF, SF, DF, OF.
    const ALL: u64 = 0xcd5;
    let mut m = Machine::long(host, |a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.pushfq()?;
        a.pop(qword_ptr(layout::DATA))?;
        a.hlt()?;
        a.jmp(again)
    })?;
    for bit in (0..12).map(|n| 1u64 << n).filter(|bit| bit & ALL != 0).chain([0, ALL]) {
        let mut regs = m.vcpu.get_regs()?;
        regs.flags = regs.flags & !ALL | bit;
        m.vcpu.set_regs(&regs)?;
        m.expect_halted()?;
        assert_eq!(m.read_u64(layout::DATA)? & ALL, bit);
        assert_eq!(m.vcpu.get_regs()?.flags & (ALL | 2), bit | 2);
    }
    Ok(())
}

fn program_counter_can_be_moved(host: &Host) -> Outcome {
    let mut m = Machine::long(host, |a| {
        a.out(0x10, al)?;
        a.mov(al, 1)?;
        a.hlt()?;
        a.nops_with_size(11)?;
        a.mov(al, 2)?;
        a.hlt()
    })?;
    m.expect_out(0x10, 1)?;
    m.quiesce()?;
    let mut regs = m.vcpu.get_regs()?;
    assert_eq!(regs.pc, layout::CODE + 2);
    regs.pc = layout::CODE + 16;
    m.vcpu.set_regs(&regs)?;
    m.expect_halted()?;
    assert_eq!(m.gpr(Reg::Rax)? as u8, 2);
    Ok(())
}

fn sregs_round_trip(host: &Host) -> Outcome {
    let mut m = Machine::long(host, |a| {
        a.hlt()?;
        a.hlt()
    })?;
    for _ in 0..2 {
        let mut sregs = m.x86().get_sregs()?;
        sregs.fs.base = 0x7fff_1234_5678;
        sregs.gs.base = 0xffff_8000_0000_0000;
        sregs.es.limit = 0xffff;
        sregs.es.granularity = false;
        sregs.cr2 = 0x1234_5000;
        sregs.gdt.limit = 0x57;
        sregs.idt.base = 0x1_2345_6000;
        sregs.ldt.base = 0x9000;
        sregs.ldt.limit = 0x27;
        sregs.ldt.selector = 0x50;
        sregs.ldt.segment_type = 2;
        sregs.ldt.present = true;
        sregs.ldt.unusable = false;
        m.x86().set_sregs(&sregs)?;
        assert_eq!(m.x86().get_sregs()?, sregs);
        m.expect_halted()?;
        let after = m.x86().get_sregs()?;
        assert_eq!(after.gdt, sregs.gdt);
        assert_eq!(after.idt, sregs.idt);
        assert_eq!((after.fs.base, after.gs.base), (sregs.fs.base, sregs.gs.base));
        assert_eq!(after.ldt.base, sregs.ldt.base);
        assert_eq!((after.cr0, after.cr3, after.cr4), (sregs.cr0, sregs.cr3, sregs.cr4));
        assert_eq!((after.cr2, after.efer), (sregs.cr2, sregs.efer));
    }
    Ok(())
}

fn sregs_seen_by_guest(host: &Host) -> Outcome {
    let d = layout::DATA;
    let mut m = Machine::long(host, |a| {
        a.mov(rax, qword_ptr(0x18).fs())?;
        a.mov(qword_ptr(d + 0x100), rax)?;
        a.mov(rax, qword_ptr(0x20).gs())?;
        a.mov(qword_ptr(d + 0x108), rax)?;
        a.mov(rax, cr2)?;
        a.mov(qword_ptr(d + 0x110), rax)?;
        a.mov(rax, cr3)?;
        a.mov(qword_ptr(d + 0x118), rax)?;
        a.mov(rax, cr0)?;
        a.mov(qword_ptr(d + 0x120), rax)?;
        a.sgdt(fword_ptr(d + 0x130))?;
        a.sidt(fword_ptr(d + 0x140))?;
        a.str(ax)?;
        a.mov(word_ptr(d + 0x150), ax)?;
        a.hlt()
    })?;
    m.write(d + 0x18, &0x1111u64.to_le_bytes())?;
    m.write(d + 0x1020, &0x2222u64.to_le_bytes())?;
    let mut sregs = m.x86().get_sregs()?;
    sregs.fs.base = d;
    sregs.gs.base = d + 0x1000;
    sregs.cr2 = 0xdead_b000;
    sregs.idt.limit = 0x7ff;
    m.x86().set_sregs(&sregs)?;
    m.expect_halted()?;
    assert_eq!((m.read_u64(d + 0x100)?, m.read_u64(d + 0x108)?), (0x1111, 0x2222));
    assert_eq!((m.read_u64(d + 0x110)?, m.read_u64(d + 0x118)?), (0xdead_b000, layout::PAGE_TABLES));
    assert_eq!(m.read_u64(d + 0x120)?, sregs.cr0);
    for (at, table) in [(d + 0x130, sregs.gdt), (d + 0x140, sregs.idt)] {
        assert_eq!(u16::from_le_bytes(m.read(at)?), table.limit);
        assert_eq!(m.read_u64(at + 2)?, table.base);
    }
    assert_eq!(m.read::<2>(d + 0x150)?, selector::TSS64.to_le_bytes());
    Ok(())
}

fn sregs_changed_by_guest(host: &Host) -> Outcome {
    let d = layout::DATA;
    let table = |limit: u16, base: u64| [&limit.to_le_bytes()[..], &base.to_le_bytes()].concat();
    let world = World::long().put(d, table(0x4f, layout::GDT)).put(d + 0x10, table(0x1ff, 0x1_0000_2000)).code(|a| {
        a.lgdt(fword_ptr(d))?;
        a.lidt(fword_ptr(d + 0x10))?;
        a.mov(eax, u32::from(selector::USER_DATA))?;
        a.mov(es, eax)?;
        a.xor(eax, eax)?;
        a.mov(gs, eax)?;
        a.mov(eax, 0x7000)?;
        a.mov(cr2, rax)?;
        a.mov(rax, cr4)?;
        a.or(eax, 0x80)?;
        a.mov(cr4, rax)?;
        a.mov(ecx, 0xc000_0100u32)?;
        a.mov(eax, 0x5678)?;
        a.mov(edx, 0x1234)?;
        a.wrmsr()?;
        a.hlt()
    });
    let mut m = Machine::new(host, &world)?;
    let before = m.x86().get_sregs()?;
    m.expect_halted()?;
    let sregs = m.x86().get_sregs()?;
    assert_eq!((sregs.gdt.limit, sregs.gdt.base), (0x4f, layout::GDT));
    assert_eq!((sregs.idt.limit, sregs.idt.base), (0x1ff, 0x1_0000_2000));
    assert_eq!((sregs.es.selector, sregs.es.dpl), (selector::USER_DATA, 3));
    assert_eq!(sregs.gs.selector, 0);
    assert_eq!((sregs.cr2, sregs.cr4), (0x7000, before.cr4 | 0x80));
    assert_eq!(sregs.fs.base, 0x1234_0000_5678);
    Ok(())
}

fn task_priority(host: &Host, chip: IrqChip) -> Outcome {
    let world = World::long().code(|a| {
        a.mov(rax, cr8)?;
        a.mov(qword_ptr(layout::DATA), rax)?;
        a.mov(eax, 9)?;
        a.mov(cr8, rax)?;
        a.out(0x10, al)?;
        a.hlt()
    });
    let mut m = Machine::with_chip(host, &world, chip)?;
    let mut sregs = m.x86().get_sregs()?;
    sregs.cr8 = 5;
    m.x86().set_sregs(&sregs)?;
    assert_eq!(m.x86().get_sregs()?.cr8, 5);
    m.expect_out(0x10, 1)?;
    assert_eq!(m.read_u64(layout::DATA)?, 5, "in the guest");
    assert_eq!(m.x86().get_sregs()?.cr8, 9, "as the guest left it");
    Ok(())
}

fn task_priority_without_irqchip(host: &Host) -> Outcome {
    task_priority(host, IrqChip::None)
}

fn task_priority_with_irqchip(host: &Host) -> Outcome {
    host.with_local_apics(|chip| task_priority(host, chip))
}

/// x87 and SSE registers with a different value each; ST(0) is 1.0.
fn sample_fpu() -> X86FpuRegs {
    X86FpuRegs {
        st: std::array::from_fn(|i| (0x3fff << 64) | 1 << 63 | i as u128),
        fcw: 0x27f,
        // The top of the stack is register 0, all are in use.
        ftw: 0xff,
        xmm: std::array::from_fn(|i| 0x0123_4567_89ab_cdef_0f1e_2d3c_4b5a_6978u128.rotate_left(i as u32 * 8)),
        mxcsr: 0x9fc0,
        ..X86FpuRegs::default()
    }
}

const XMM: [AsmRegisterXmm; 16] =
    [xmm0, xmm1, xmm2, xmm3, xmm4, xmm5, xmm6, xmm7, xmm8, xmm9, xmm10, xmm11, xmm12, xmm13, xmm14, xmm15];

/// Ring 3, because some hosts execute floating-point instructions only there.
fn fpu_seen_by_guest(host: &Host) -> Outcome {
    let d = layout::DATA;
    let world = World::user().code(|a| {
        for (i, register) in XMM.into_iter().enumerate() {
            a.movups(xmmword_ptr(d + 16 * i as u64), register)?;
        }
        a.stmxcsr(dword_ptr(d + 0x200))?;
        a.fnstcw(word_ptr(d + 0x208))?;
        for i in 0..8 {
            a.fstp(tbyte_ptr(d + 0x100 + 16 * i))?;
        }
        a.mov(edi, layout::MMIO as u32)?;
        a.mov(byte_ptr(rdi), al)
    });
    let mut m = Machine::new(host, &world)?;
    let set = sample_fpu();
    m.vcpu.set_fpu_regs(&FpuRegs::X86(set))?;
    assert_eq!(m.vcpu.get_fpu_regs()?, FpuRegs::X86(set), "read back before running");
    m.expect_mmio_write(layout::MMIO, &[0])?;
    for i in 0..16 {
        assert_eq!(u128::from_le_bytes(m.read(d + 16 * i)?), set.xmm[i as usize], "XMM{i} in the guest");
    }
    for i in 0..8 {
        let mut value = [0; 16];
        value[..10].copy_from_slice(&m.read::<10>(d + 0x100 + 16 * i)?);
        assert_eq!(u128::from_le_bytes(value), set.st[i as usize], "ST({i}) in the guest");
    }
    assert_eq!(m.read(d + 0x200)?, set.mxcsr.to_le_bytes());
    assert_eq!(m.read(d + 0x208)?, set.fcw.to_le_bytes());
    Ok(())
}

fn fpu_changed_by_guest(host: &Host) -> Outcome {
    let d = layout::DATA;
    let values: Vec<u8> = (0..=255).collect();
    let world = World::user().put(d, values.clone()).put(d + 0x200, 0x1f81u32.to_le_bytes()).code(|a| {
        for (i, register) in XMM.into_iter().enumerate() {
            a.movups(register, xmmword_ptr(d + 16 * i as u64))?;
        }
        a.ldmxcsr(dword_ptr(d + 0x200))?;
        a.fninit()?;
        a.fldpi()?;
        a.fld1()?;
        a.mov(edi, layout::MMIO as u32)?;
        a.mov(byte_ptr(rdi), al)
    });
    let mut m = Machine::new(host, &world)?;
    m.expect_mmio_write(layout::MMIO, &[0])?;
    let FpuRegs::X86(fpu) = m.vcpu.get_fpu_regs()? else {
        fail!("not x86-64 registers");
    };
    for (i, bytes) in values.chunks(16).enumerate() {
        assert_eq!(fpu.xmm[i].to_le_bytes(), bytes, "XMM{i}");
    }
    assert_eq!(fpu.mxcsr, 0x1f81);
    assert_eq!(fpu.st[0], 0x3fff_8000_0000_0000_0000);
    assert_eq!(fpu.st[1], 0x4000_c90f_daa2_2168_c235);
    // Two registers are in use: 6 (the top) and 7.
    assert_eq!((fpu.fsw >> 11 & 7, fpu.ftw), (6, 0xc0));
    Ok(())
}

fn fpu_refuses_reserved_bits(host: &Host) -> Outcome {
    let mut m = Machine::long(host, |a| a.hlt())?;
    let before = m.vcpu.get_fpu_regs()?;
    let bad = X86FpuRegs { mxcsr: 0x8000_0000, ..X86FpuRegs::default() };
    let refused = m.vcpu.set_fpu_regs(&FpuRegs::X86(bad));
    assert!(matches!(refused, Err(AccelError::InvalidArgument { .. })), "{refused:?}");
    assert_eq!(m.vcpu.get_fpu_regs()?, before);
    m.expect_halted()
}

/// XSTATE_BV in the header of an XSAVE area.
const XSTATE_BV: usize = FXSAVE_SIZE;
/// Where the upper halves of YMM registers stand in the standard format (Intel SDM vol. 1, 13.5.2).
const AVX: usize = 576;

/// True if the host has AVX, with which bits 0–2 of XCR0 can be set.
fn enable_xsave(m: &mut Machine) -> Outcome<bool> {
    let avx = m.x86().supported_cpuid()?.iter().any(|entry| entry.leaf == 1 && entry.ecx & (1 << 28) != 0);
    let mut sregs = m.x86().get_sregs()?;
    sregs.cr4 |= 1 << 18;
    m.x86().set_sregs(&sregs)?;
    let value = if avx { 7 } else { 3 };
    m.x86().set_xcrs(&[Xcr { index: 0, value }])?;
    Ok(avx)
}

fn xsave_round_trip(host: &Host) -> Outcome {
    let mut m = Machine::long(host, |a| a.hlt())?;
    let avx = enable_xsave(&mut m)?;
    let mut area = m.x86().get_xsave()?;
    assert_eq!(area.len(), host.caps.xsave_size);
    sample_fpu().write_xsave(&mut area)?;
    if avx {
        area[XSTATE_BV] |= 4;
        for (i, byte) in area[AVX..AVX + 256].iter_mut().enumerate() {
            *byte = i as u8 ^ 0x5a;
        }
    }
    m.x86().set_xsave(&area)?;
    let back = m.x86().get_xsave()?;
    assert_eq!(X86FpuRegs::from_xsave(&back)?, sample_fpu());
    if avx {
        assert_eq!(back[AVX..AVX + 256], area[AVX..AVX + 256]);
    }
    m.expect_halted()?;
    let after = m.x86().get_xsave()?;
    assert_eq!(X86FpuRegs::from_xsave(&after)?, sample_fpu(), "after running");
    if avx {
        assert_eq!(after[AVX..AVX + 256], area[AVX..AVX + 256], "after running");
    }
    Ok(())
}

fn xsave_wide_vectors_seen_by_guest(host: &Host) -> Outcome {
    let d = layout::DATA;
    // Without AVX the guest stores the lower half only.
    let program = |avx: bool| {
        move |a: &mut CodeAssembler| {
            if avx {
                a.vmovups(ymmword_ptr(d), ymm3)?;
                a.vmovups(ymmword_ptr(d + 32), ymm15)?;
            } else {
                a.movups(xmmword_ptr(d), xmm3)?;
                a.movups(xmmword_ptr(d + 32), xmm15)?;
            }
            a.mov(edi, layout::MMIO as u32)?;
            a.mov(byte_ptr(rdi), al)
        }
    };
    let mut m = Machine::new(host, &World::user())?;
    let avx = enable_xsave(&mut m)?;
    let code = vm_accel_guests::assemble(vm_accel_guests::Bits::B64, layout::CODE, program(avx));
    m.write(layout::CODE, &code)?;
    let mut area = m.x86().get_xsave()?;
    sample_fpu().write_xsave(&mut area)?;
    if avx {
        area[XSTATE_BV] |= 4;
        for (i, byte) in area[AVX..AVX + 256].iter_mut().enumerate() {
            *byte = i as u8;
        }
    }
    m.x86().set_xsave(&area)?;
    m.expect_mmio_write(layout::MMIO, &[0])?;
    for (at, register) in [(d, 3), (d + 32, 15)] {
        assert_eq!(u128::from_le_bytes(m.read(at)?), sample_fpu().xmm[register]);
        if avx {
            let upper: [u8; 16] = m.read(at + 16)?;
            assert_eq!(upper[..], area[AVX + 16 * register..][..16], "upper half of YMM{register}");
        }
    }
    Ok(())
}

fn xsave_of_another_length_is_refused(host: &Host) -> Outcome {
    let mut m = Machine::long(host, |a| a.hlt())?;
    let area = m.x86().get_xsave()?;
    let long = [&area[..], &[0]].concat();
    for wrong in [&area[..area.len() - 1], &long, &[]] {
        let refused = m.x86().set_xsave(wrong);
        assert!(matches!(refused, Err(AccelError::InvalidArgument { .. })), "{refused:?}");
    }
    m.x86().set_xsave(&area)?;
    m.expect_halted()
}

fn xcrs_round_trip(host: &Host) -> Outcome {
    let mut m = Machine::long(host, |a| a.hlt())?;
    let initial = m.x86().get_xcrs()?;
    assert_eq!(initial, [Xcr { index: 0, value: 1 }], "XCR0 after reset");
    let avx = enable_xsave(&mut m)?;
    let set = [Xcr { index: 0, value: if avx { 7 } else { 3 } }];
    assert_eq!(m.x86().get_xcrs()?, set);
    m.expect_halted()?;
    assert_eq!(m.x86().get_xcrs()?, set);
    // SSE without x87 is impossible (Intel SDM vol. 1, 13.3).
    let refused = m.x86().set_xcrs(&[Xcr { index: 0, value: 2 }]);
    assert!(refused.is_err());
    assert_eq!(m.x86().get_xcrs()?, set);
    Ok(())
}

const MSR_SYSENTER_EIP: u32 = 0x176;
const MSR_STAR: u32 = 0xc000_0081;
const MSR_LSTAR: u32 = 0xc000_0082;
const MSR_KERNEL_GS_BASE: u32 = 0xc000_0102;
/// No CPU has it.
const MSR_NOBODY: u32 = 0xdead_beef;

fn msr(index: u32, value: u64) -> X86Msr {
    X86Msr { index, value }
}

fn msrs_seen_and_changed_by_guest(host: &Host) -> Outcome {
    let d = layout::DATA;
    let indices = [MSR_STAR, MSR_LSTAR, MSR_KERNEL_GS_BASE, MSR_SYSENTER_EIP];
    let mut m = Machine::long(host, |a| {
        for (i, index) in indices.into_iter().enumerate() {
            a.mov(ecx, index)?;
            a.rdmsr()?;
            a.mov(dword_ptr(d + 8 * i as u64), eax)?;
            a.mov(dword_ptr(d + 8 * i as u64 + 4), edx)?;
            a.add(eax, 1)?;
            a.wrmsr()?;
        }
        a.hlt()
    })?;
    let set: Vec<X86Msr> = indices
        .into_iter()
        .zip([0x1b_0008_0000_0000, 0xffff_ffff_8100_0000, 0xffff_8880_0000_1000, 0x1234_5678])
        .map(|(index, value)| msr(index, value))
        .collect();
    m.x86().set_msrs(&set)?;
    assert_eq!(m.x86().get_msrs(&indices)?, set);
    m.expect_halted()?;
    for (i, set) in set.iter().enumerate() {
        assert_eq!(m.read_u64(d + 8 * i as u64)?, set.value, "MSR {:#x} in the guest", set.index);
    }
    let after = m.x86().get_msrs(&indices)?;
    for (set, after) in set.iter().zip(after) {
        assert_eq!(after, msr(set.index, set.value + 1), "as the guest left it");
    }
    Ok(())
}

fn msr_lists_stop_at_the_first_refusal(host: &Host) -> Outcome {
    let mut m = Machine::long(host, |a| a.hlt())?;
    m.x86().set_msrs(&[msr(MSR_STAR, 1), msr(MSR_LSTAR, 2)])?;
    let refused = m.x86().set_msrs(&[msr(MSR_STAR, 0x11), msr(MSR_NOBODY, 5), msr(MSR_LSTAR, 0x22)]);
    let as_expected = |error: &AccelError| matches!(error, AccelError::Msr { index: MSR_NOBODY, done: 1, .. });
    assert!(refused.as_ref().is_err_and(as_expected), "{refused:?}");
    let now = m.x86().get_msrs(&[MSR_STAR, MSR_LSTAR])?;
    assert_eq!(now, [msr(MSR_STAR, 0x11), msr(MSR_LSTAR, 2)]);
    let refused = m.x86().get_msrs(&[MSR_STAR, MSR_NOBODY, MSR_LSTAR]);
    assert!(refused.as_ref().is_err_and(as_expected), "{refused:?}");
    m.x86().set_msrs(&[])?;
    assert_eq!(m.x86().get_msrs(&[])?, []);
    Ok(())
}

fn listed_msrs(host: &Host, chip: IrqChip) -> Outcome {
    let mut m = Machine::with_chip(host, &World::long().code(|a| a.hlt()), chip)?;
    let indices = m.x86().msr_indices()?;
    for needed in [0x10, MSR_STAR, MSR_LSTAR, MSR_KERNEL_GS_BASE] {
        assert!(indices.contains(&needed), "MSR {needed:#x} is not in the list");
    }
    let values = m.x86().get_msrs(&indices)?;
    assert_eq!(values.len(), indices.len());
    m.x86().set_msrs(&values)?;
    // A snapshot of a guest that ran must be restorable too.
    if chip == IrqChip::None {
        m.expect_halted()?;
        let values = m.x86().get_msrs(&indices)?;
        m.x86().set_msrs(&values)?;
    }
    Ok(())
}

fn listed_msrs_can_be_read_and_set_back(host: &Host) -> Outcome {
    listed_msrs(host, IrqChip::None)
}

fn listed_msrs_can_be_set_back_with_irqchip(host: &Host) -> Outcome {
    host.with_local_apics(|chip| listed_msrs(host, chip))
}

/// Exits are for MSRs that would fault; in ring 3 it is the instruction itself that does.
fn known_msrs_do_not_exit(host: &Host) -> Outcome {
    let access = |a: &mut CodeAssembler| {
        a.mov(ecx, MSR_LSTAR)?;
        a.mov(eax, 0x1234)?;
        a.xor(edx, edx)?;
        a.wrmsr()?;
        a.xor(eax, eax)?;
        a.rdmsr()?;
        a.out(0x10, eax)
    };
    let mut m = Machine::long(host, access)?;
    m.x86().exit_on_unknown_msrs(true)?;
    m.expect_out_data(0x10, &0x1234u32.to_le_bytes())?;
    // Some platforms have one virtual machine at a time.
    drop(m);
    let mut m = Machine::new(host, &World::user().code(access))?;
    m.x86().exit_on_unknown_msrs(true)?;
    m.expect_vector(13)?;
    Ok(())
}

fn cpuid_supported_is_sensible(host: &Host) -> Outcome {
    let mut m = Machine::long(host, |a| a.hlt())?;
    let entries = m.x86().supported_cpuid()?;
    let leaf = |leaf| entries.iter().find(|entry| entry.leaf == leaf);
    let vendor = leaf(0).expect("leaf 0 exists");
    assert!(vendor.eax >= 1 && vendor.ebx != 0);
    let features = leaf(1).expect("leaf 1 exists");
    // FPU, TSC, MSR, PAE, CX8, SSE, SSE2: what every 64-bit CPU has.
    let needed = 1 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 8 | 1 << 25 | 1 << 26;
    assert_eq!(features.edx & needed, needed);
    let extended = leaf(0x8000_0001).expect("leaf 0x80000001 exists");
    assert_ne!(extended.edx & (1 << 29), 0, "long mode");
    Ok(())
}

fn cpuid_set_is_what_the_guest_sees(host: &Host) -> Outcome {
    let d = layout::DATA;
    let leaves = [0x4000_0000u32, 0x8000_0002];
    let mut m = Machine::long(host, |a| {
        for (i, leaf) in leaves.into_iter().enumerate() {
            a.mov(eax, leaf)?;
            a.xor(ecx, ecx)?;
            a.cpuid()?;
            for (k, register) in [eax, ebx, ecx, edx].into_iter().enumerate() {
                a.mov(dword_ptr(d + 16 * i as u64 + 4 * k as u64), register)?;
            }
        }
        a.hlt()
    })?;
    let mut entries = m.x86().supported_cpuid()?;
    let mine = leaves.map(|leaf| CpuidEntry {
        leaf,
        subleaf: None,
        eax: leaf | 1,
        ebx: 0x2d6d_7620,
        ecx: 0x6563_6361,
        edx: 0x2020_206c,
    });
    entries.retain(|entry| !leaves.contains(&entry.leaf));
    entries.extend(mine);
    m.x86().set_cpuid(&entries)?;
    let set = m.x86().get_cpuid()?;
    for entry in &mine {
        assert!(set.contains(entry), "{entry:x?} is not in what was set");
    }
    m.expect_halted()?;
    for (i, entry) in mine.iter().enumerate() {
        let seen = [0, 4, 8, 12].map(|k| m.read(d + 16 * i as u64 + k).map(u32::from_le_bytes));
        let [Ok(eax_seen), Ok(ebx_seen), Ok(ecx_seen), Ok(edx_seen)] = seen else {
            fail!("cannot read what the guest saw");
        };
        assert_eq!(
            (eax_seen, ebx_seen, ecx_seen, edx_seen),
            (entry.eax, entry.ebx, entry.ecx, entry.edx),
            "leaf {:#x}",
            entry.leaf
        );
    }
    // A list that no platform takes.
    let too_many = vec![mine[0]; 10_000];
    let refused = m.x86().set_cpuid(&too_many);
    assert!(matches!(refused, Err(AccelError::InvalidArgument { .. })), "{refused:?}");
    Ok(())
}

fn debug_registers(host: &Host) -> Outcome {
    let mut m = Machine::long(host, |a| {
        a.mov(rax, dr0)?;
        a.mov(rbx, dr3)?;
        a.mov(ecx, 0x6666)?;
        a.mov(dr2, rcx)?;
        a.hlt()
    })?;
    let set = X86DebugRegs { db: [0x1111_0000, 0xffff_8000_0000_2222, 0x3333, 0x4444], dr6: 0xffff_0ff0, dr7: 0x400 };
    m.x86().set_debug_regs(&set)?;
    assert_eq!(m.x86().get_debug_regs()?, set);
    m.expect_halted()?;
    assert_eq!((m.gpr(Reg::Rax)?, m.gpr(Reg::Rbx)?), (set.db[0], set.db[3]));
    let after = m.x86().get_debug_regs()?;
    assert_eq!(after.db, [set.db[0], set.db[1], 0x6666, set.db[3]]);
    Ok(())
}

fn events_round_trip(host: &Host) -> Outcome {
    let mut m = Machine::long(host, |a| a.hlt())?;
    assert_eq!(m.x86().get_events()?, X86Events::default());
    for set in [
        X86Events { exception_injected: Some(13), exception_error_code: Some(0x18), ..X86Events::default() },
        X86Events { interrupt_injected: Some(0x40), ..X86Events::default() },
        X86Events { nmi_pending: true, nmi_masked: true, ..X86Events::default() },
        X86Events::default(),
    ] {
        m.x86().set_events(&set)?;
        assert_eq!(m.x86().get_events()?, set);
    }
    m.expect_halted()
}

fn exception_is_injected(host: &Host) -> Outcome {
    let mut m = Machine::long(host, |a| a.hlt())?;
    m.x86().set_events(&X86Events {
        exception_injected: Some(13),
        exception_error_code: Some(0x18),
        ..X86Events::default()
    })?;
    let report = m.expect_vector(13)?;
    assert_eq!((report.error_code, report.ip), (0x18, layout::CODE));
    assert_eq!(m.x86().get_events()?.exception_injected, None);
    m.expect_halted()?;
    m.x86().set_events(&X86Events { exception_injected: Some(6), ..X86Events::default() })?;
    let report = m.expect_vector(6)?;
    assert_eq!((report.ip, report.count), (layout::CODE + 1, 2));
    Ok(())
}

fn interrupt_in_delivery_is_injected(host: &Host) -> Outcome {
    let mut m = Machine::long(host, |a| a.hlt())?;
    // In delivery already, so IF does not matter.
    m.x86().set_events(&X86Events { interrupt_injected: Some(0x61), ..X86Events::default() })?;
    assert_eq!(m.expect_vector(0x61)?.ip, layout::CODE);
    m.expect_halted()
}

fn lapic_round_trip(host: &Host) -> Outcome {
    host.with_local_apics(|chip| lapic_round_trip_with(host, chip))
}

fn lapic_round_trip_with(host: &Host, chip: IrqChip) -> Outcome {
    let world = World::long().code(|a| {
        a.mov(esi, 0xfee0_0000u32)?;
        a.mov(eax, dword_ptr(rsi + 0xf0))?;
        a.mov(dword_ptr(layout::DATA), eax)?;
        a.mov(eax, dword_ptr(rsi + 0x380))?;
        a.mov(dword_ptr(layout::DATA + 4), eax)?;
        a.mov(dword_ptr(rsi + 0x80), 0x30)?;
        a.out(0x10, al)?;
        a.hlt()
    });
    let mut m = Machine::with_chip(host, &world, chip)?;
    let mut lapic = m.x86().get_lapic()?;
    assert_eq!(lapic.reg(0x20), Some(0), "the APIC id is the vCPU's id");
    // Spurious vector and enable bit, timer divisor; the timer is masked, so its count does nothing.
    lapic.set_reg(0xf0, 0x1ff);
    lapic.set_reg(0x320, 0x1_0030);
    lapic.set_reg(0x380, 0x1234);
    m.x86().set_lapic(&lapic)?;
    let back = m.x86().get_lapic()?;
    for register in [0xf0, 0x320, 0x380] {
        assert_eq!(back.reg(register), lapic.reg(register), "register {register:#x}");
    }
    m.expect_out(0x10, 1)?;
    assert_eq!(m.read(layout::DATA)?, 0x1ffu32.to_le_bytes());
    assert_eq!(m.read(layout::DATA + 4)?, 0x1234u32.to_le_bytes());
    assert_eq!(m.x86().get_lapic()?.reg(0x80), Some(0x30), "as the guest left it");
    Ok(())
}

fn lapic_needs_a_controller(host: &Host) -> Outcome {
    let mut m = Machine::long(host, |a| a.hlt())?;
    match m.x86().get_lapic() {
        Err(AccelError::Unsupported { .. }) => {
            assert!(m.vm.irq_handle().is_err());
            Ok(())
        }
        // A backend may emulate one always.
        Ok(_) => Ok(()),
        other => fail!("get_lapic() without a controller: {other:?}"),
    }
}

fn mp_state(host: &Host) -> Outcome {
    host.with_local_apics(|chip| mp_state_with(host, chip))
}

fn mp_state_with(host: &Host, chip: IrqChip) -> Outcome {
    let mut m = Machine::with_chip(host, &World::long().code(|a| a.out(0x10, al)), chip)?;
    assert_eq!(m.x86().get_mp_state()?, MpState::Runnable);
    for state in [MpState::Halted, MpState::Uninitialized, MpState::Runnable] {
        m.x86().set_mp_state(state)?;
        assert_eq!(m.x86().get_mp_state()?, state);
    }
    let mut second = m.vm.create_vcpu(1)?;
    let x86 = second.as_x86().expect("an x86-64 vCPU");
    assert_eq!(x86.get_mp_state()?, MpState::Uninitialized);
    m.expect_out(0x10, 1)?;
    Ok(())
}

fn tsc_runs_forward(host: &Host) -> Outcome {
    let mut m = Machine::long(host, |a| {
        for i in 0..2 {
            a.rdtsc()?;
            a.mov(dword_ptr(layout::DATA + 8 * i), eax)?;
            a.mov(dword_ptr(layout::DATA + 8 * i + 4), edx)?;
        }
        a.hlt()
    })?;
    let khz = m.x86().get_tsc_khz()?;
    assert!((1_000..100_000_000).contains(&khz), "{khz} kHz");
    let first = m.x86().get_tsc()?;
    let second = m.x86().get_tsc()?;
    assert!(first <= second);
    m.expect_halted()?;
    let seen = (m.read_u64(layout::DATA)?, m.read_u64(layout::DATA + 8)?);
    assert!(seen.0 < seen.1, "{seen:?}");
    Ok(())
}

fn tsc_can_be_set(host: &Host) -> Outcome {
    const VALUE: u64 = 1 << 52;
    let mut m = Machine::long(host, |a| {
        a.rdtsc()?;
        a.shl(rdx, 32)?;
        a.or(rax, rdx)?;
        a.hlt()
    })?;
    assert!(m.x86().get_tsc()? < VALUE);
    m.x86().set_tsc(VALUE)?;
    assert!(m.x86().get_tsc()? >= VALUE);
    m.expect_halted()?;
    let seen = m.gpr(Reg::Rax)?;
    assert!((VALUE..2 * VALUE).contains(&seen), "the guest sees {seen:#x}");
    Ok(())
}

fn translate_linear_addresses(host: &Host) -> Outcome {
    const HIGH: u64 = 0x2_0000_0000;
    let directory = layout::SPARE_TABLES;
    let world = World::long()
        .put(layout::PAGE_TABLES + 0x1000 + 8 * (HIGH >> 30), (directory | PTE_TABLE).to_le_bytes())
        .put(directory, (0x20_0000 | PTE_LARGE).to_le_bytes())
        .code(|a| a.hlt());
    let mut m = Machine::new(host, &world)?;
    for (linear, physical) in [
        (layout::CODE + 5, Some(layout::CODE + 5)),
        (HIGH + 0x1234, Some(0x20_1234)),
        (HIGH + 0x20_0000, None),
        (HIGH + 0x4000_0000, None),
    ] {
        assert_eq!(m.x86().translate(linear)?, physical, "{linear:#x}");
    }
    m.expect_halted()
}
