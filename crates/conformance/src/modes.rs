//! CPU modes, exceptions, HLT, the ways in which a guest ends.

use crate::harness::machine::assemble64;
use crate::harness::{Host, Machine, Outcome, cases};
use vm_accel::VcpuExit;
use vm_accel::x86_64::Reg;
use vm_accel_guests::asm::*;
use vm_accel_guests::world::{PTE_LARGE, PTE_TABLE, World, layout, selector};
use vm_accel_guests::{Bits, IcedError, assemble};

cases![
    real_mode,
    real_mode_interrupt,
    reset_vector,
    protected_mode,
    protected_mode_exception,
    long_mode,
    boot_from_real_to_long_mode,
    compatibility_mode,
    paging_32_bit,
    paging_pae,
    page_tables_written_by_guest,
    no_execute,
    ring3_undefined_instruction,
    ring3_page_fault_is_fixed_up,
    ring3_privileged_instruction,
    ring3_breakpoint,
    ring3_software_interrupt,
    ring3_system_call,
    divide_error,
    general_protection_error_code,
    page_fault_in_ring0,
    iret_to_ring3,
    halt_and_go_on,
    triple_fault,
    hypercall,
];

fn real_mode(host: &Host) -> Outcome {
    let world = World::real().code(|a| {
        // 0x1234:0x0010 is 0x12350.
        a.mov(ax, 0x1234)?;
        a.mov(es, ax)?;
        a.mov(word_ptr(0x10).es(), 0xbeefu32)?;
        a.mov(cx, 3)?;
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.add(bx, cx)?;
        a.loop_(again)?;
        a.mov(ax, 0x500)?;
        a.mov(fs, ax)?;
        a.mov(al, byte_ptr(1).fs())?;
        a.out(0x10, al)?;
        a.hlt()
    });
    let mut m = Machine::new(host, &world.put(layout::DATA + 1, [0x77]))?;
    m.expect_out_data(0x10, &[0x77])?;
    m.expect_halted()?;
    assert_eq!(m.read(0x12350)?, [0xef, 0xbe]);
    assert_eq!(m.gpr(Reg::Rbx)?, 6);
    Ok(())
}

/// Exceptions go through the vector table at 0.
fn real_mode_interrupt(host: &Host) -> Outcome {
    let world = World::real().code(|a| {
        a.xor(cx, cx)?;
        a.div(cl)?;
        a.hlt()
    });
    let mut m = Machine::new(host, &world)?;
    let report = m.expect_vector(0)?;
    assert_eq!((report.ip, report.cs, report.count), (layout::CODE + 2, 0, 1));
    // The handler returned to the instruction, which faults again: a fault, not a trap.
    m.expect_vector(0)?;
    m.set_gpr(Reg::Rcx, 1)?;
    m.expect_halted()
}

/// A vCPU that nobody set up starts at the reset vector: CS base 0xffff_0000, IP 0xfff0.
fn reset_vector(host: &Host) -> Outcome {
    let mut vm = host.vm()?;
    let rom = vm_accel::GuestRegion::anonymous(0x1_0000)?;
    let code = assemble(Bits::B16, 0xfff0, |a| {
        a.mov(al, 0x42)?;
        a.out(0x10, al)?;
        a.hlt()
    });
    rom.write(0xfff0, &code)?;
    vm.map_memory(0xffff_0000, &rom, vm_accel::MemoryFlags::RAM)?;
    let mut vcpu = vm.create_vcpu(0)?;
    host.watch.add(vcpu.kick_handle()?);
    let out = VcpuExit::Io { port: 0x10, direction: vm_accel::IoDirection::Out, size: 1 };
    assert_eq!(vcpu.run()?, out);
    assert_eq!(vcpu.io_data()?, [0x42]);
    assert_eq!(vcpu.run()?, VcpuExit::Halted);
    Ok(())
}

fn protected_mode(host: &Host) -> Outcome {
    let world = World::protected().code(|a| {
        let mut routine = a.create_label();
        a.mov(eax, 0x8000_0000u32)?;
        a.add(eax, eax)?;
        a.adc(eax, 41)?;
        a.mov(dword_ptr(0x1f_0000u32), eax)?;
        a.call(routine)?;
        a.mov(ecx, 0x1234_5678)?;
        a.push(ecx)?;
        a.pop(edx)?;
        a.hlt()?;
        a.set_label(&mut routine)?;
        a.mov(ebx, 5)?;
        a.ret()
    });
    let mut m = Machine::new(host, &world)?;
    m.expect_halted()?;
    assert_eq!(m.read(0x1f_0000)?, 42u32.to_le_bytes());
    assert_eq!((m.gpr(Reg::Rbx)?, m.gpr(Reg::Rdx)?), (5, 0x1234_5678));
    Ok(())
}

fn protected_mode_exception(host: &Host) -> Outcome {
    let world = World::protected().code(|a| {
        a.nop()?;
        a.ud2()
    });
    let mut m = Machine::new(host, &world)?;
    let report = m.expect_vector(6)?;
    assert_eq!((report.ip, report.cs), (layout::CODE + 1, selector::CODE32.into()));
    Ok(())
}

fn long_mode(host: &Host) -> Outcome {
    let mut m = Machine::long(host, |a| {
        a.mov(rax, 0x1_0000_0000u64)?;
        a.imul_3(rbx, rax, 3)?;
        a.mov(r15, rbx)?;
        a.sub(r15, 1)?;
        a.mov(r8d, -1)?;
        a.lea(r9, ptr(r8 + r15 * 2 + 1))?;
        a.mov(rcx, cr3)?;
        a.hlt()
    })?;
    m.expect_halted()?;
    assert_eq!(m.gpr(Reg::Rbx)?, 0x3_0000_0000);
    assert_eq!(m.gpr(Reg::R15)?, 0x2_ffff_ffff);
    assert_eq!(m.gpr(Reg::R9)?, 0x5_ffff_fffe + 0x1_0000_0000);
    assert_eq!(m.gpr(Reg::Rcx)?, layout::PAGE_TABLES);
    Ok(())
}

/// The way of every boot loader: real mode, GDT, protected mode, page tables, long mode, all by the guest itself.
fn boot_from_real_to_long_mode(host: &Host) -> Outcome {
    let tables = World::long();
    let mut world = World::real();
    // The tables of the long-mode world, without its registers; the IDT's place is free in the real-mode world.
    world.memory.extend(tables.memory);
    let (gdtr, protected, long) = (layout::DATA, layout::CODE + 0x100, layout::CODE + 0x200);
    let far = |a: &mut CodeAssembler, code: u16, to: u64| a.jmp_far(code, to as u32);
    let world = world
        .put(gdtr, [(10 * 8 - 1), 0, 0, (layout::GDT >> 8) as u8, 0, 0])
        .code(|a| {
            a.cli()?;
            a.lgdt(fword_ptr(gdtr as u32))?;
            a.mov(eax, cr0)?;
            a.or(eax, 1)?;
            a.mov(cr0, eax)?;
            far(a, selector::CODE32, protected)
        })
        .put(
            protected,
            assemble(Bits::B32, protected, |a| {
                a.mov(eax, u32::from(selector::DATA))?;
                a.mov(ds, eax)?;
                a.mov(ss, eax)?;
                a.mov(al, 1)?;
                a.out(0x10, al)?;
                a.mov(eax, 0x20)?;
                a.mov(cr4, eax)?;
                a.mov(eax, layout::PAGE_TABLES as u32)?;
                a.mov(cr3, eax)?;
                a.mov(ecx, 0xc000_0080u32)?;
                a.rdmsr()?;
                a.or(eax, 0x100)?;
                a.wrmsr()?;
                a.mov(eax, cr0)?;
                a.or(eax, 0x8000_0000u32)?;
                a.mov(cr0, eax)?;
                a.jmp_far(selector::CODE64, long as u32)
            }),
        )
        .put(
            long,
            assemble64(long, |a| {
                a.mov(rax, 0x1234_5678_9abc_def0u64)?;
                a.mov(qword_ptr(layout::DATA + 0x10), rax)?;
                a.mov(ecx, 0xc000_0080u32)?;
                a.rdmsr()?;
                a.hlt()
            }),
        );
    let mut m = Machine::new(host, &world)?;
    m.expect_out_data(0x10, &[1])?;
    m.expect_halted()?;
    assert_eq!(m.read_u64(layout::DATA + 0x10)?, 0x1234_5678_9abc_def0);
    assert_eq!(m.gpr(Reg::Rax)? & 0x500, 0x500, "EFER.LME and LMA");
    let sregs = m.x86().get_sregs()?;
    assert!(sregs.cs.long && sregs.cr0 & 0x8000_0001 == 0x8000_0001 && sregs.efer & 0x500 == 0x500);
    Ok(())
}

fn compatibility_mode(host: &Host) -> Outcome {
    let world = World::compatibility().code(|a| {
        a.mov(eax, -1)?;
        a.inc(eax)?;
        a.sete(bl)?;
        a.movzx(ebx, bl)?;
        a.mov(dword_ptr(layout::MMIO as u32), ebx)?;
        a.ud2()
    });
    let mut m = Machine::new(host, &world)?;
    m.expect_mmio_write(layout::MMIO, &[1, 0, 0, 0])?;
    let report = m.expect_vector(6)?;
    assert_eq!(report.cs, u64::from(selector::USER_CODE32));
    Ok(())
}

/// A guest in protected mode switches paging on, with a page of 4 MiB or 2 MiB at [`PAGED`] that leads to 0.
fn paged_world(features: u32, tables: u64) -> World {
    World::protected().code(|a| {
        a.mov(eax, features)?;
        a.mov(cr4, eax)?;
        a.mov(eax, tables as u32)?;
        a.mov(cr3, eax)?;
        a.mov(eax, cr0)?;
        a.or(eax, 0x8000_0000u32)?;
        a.mov(cr0, eax)?;
        a.mov(eax, dword_ptr(PAGED + layout::DATA as u32))?;
        a.out(0x10, eax)?;
        a.hlt()
    })
}

const PAGED: u32 = 0x8000_0000;

fn paging_32_bit(host: &Host) -> Outcome {
    let table = layout::SPARE_TABLES;
    // Page directory entries of 4 MiB pages (PSE): one to one at 0, and again at PAGED.
    let entry = 0x83u32.to_le_bytes();
    let world = paged_world(0x10, table)
        .put(table, entry)
        .put(table + 4 * (u64::from(PAGED) >> 22), entry)
        .put(layout::DATA, 0x1234_5678u32.to_le_bytes());
    let mut m = Machine::new(host, &world)?;
    m.expect_out_data(0x10, &0x1234_5678u32.to_le_bytes())?;
    m.expect_halted()
}

fn paging_pae(host: &Host) -> Outcome {
    let (pointers, low, high) = (layout::SPARE_TABLES, layout::SPARE_TABLES + 0x1000, layout::SPARE_TABLES + 0x2000);
    let large = 0x83u64.to_le_bytes();
    let world = paged_world(0x20, pointers)
        .put(pointers, (low | 1).to_le_bytes())
        .put(pointers + 16, (high | 1).to_le_bytes())
        .put(low, large)
        .put(high, large)
        .put(layout::DATA, 0x1234_5678u32.to_le_bytes());
    let mut m = Machine::new(host, &world)?;
    m.expect_out_data(0x10, &0x1234_5678u32.to_le_bytes())?;
    m.expect_halted()
}

/// Virtual 8 GiB, which starts not present.
const HIGH: u64 = 0x2_0000_0000;
const HIGH_POINTER: u64 = layout::PAGE_TABLES + 0x1000 + 8 * (HIGH >> 30);

fn page_tables_written_by_guest(host: &Host) -> Outcome {
    let directory = layout::SPARE_TABLES;
    let mut m = Machine::long(host, |a| {
        // Not present to present needs no invalidation; the change afterwards does.
        a.mov(eax, (directory | PTE_TABLE) as u32)?;
        a.mov(qword_ptr(HIGH_POINTER), rax)?;
        a.mov(eax, PTE_LARGE as u32)?;
        a.mov(qword_ptr(directory), rax)?;
        a.mov(rsi, HIGH)?;
        a.mov(rbx, qword_ptr(rsi + layout::DATA as u32))?;
        a.mov(rax, layout::MMIO | PTE_LARGE)?;
        a.mov(qword_ptr(directory), rax)?;
        a.invlpg(byte_ptr(rsi))?;
        a.mov(rcx, qword_ptr(rsi + layout::DATA as u32))?;
        a.hlt()
    })?;
    m.write(layout::DATA, &77u64.to_le_bytes())?;
    m.expect_mmio_read(layout::MMIO + layout::DATA, &88u64.to_le_bytes())?;
    m.expect_halted()?;
    assert_eq!((m.gpr(Reg::Rbx)?, m.gpr(Reg::Rcx)?), (77, 88));
    // The CPU marks what it used: accessed.
    assert_eq!(m.read_u64(directory)? & 0x20, 0x20);
    Ok(())
}

/// A jump to a page that forbids execution: a page fault with the instruction-fetch bit.
fn no_execute(host: &Host) -> Outcome {
    let directory = layout::SPARE_TABLES;
    let world = World::long()
        .put(HIGH_POINTER, (directory | PTE_TABLE).to_le_bytes())
        .put(directory, (PTE_LARGE | 1 << 63).to_le_bytes())
        .code(|a| {
            a.mov(rax, HIGH + layout::CODE)?;
            a.jmp(rax)
        });
    let mut m = Machine::new(host, &world)?;
    let report = m.expect_vector(14)?;
    assert_eq!((report.ip, report.cr2), (HIGH + layout::CODE, HIGH + layout::CODE));
    assert_eq!(report.error_code & 0x11, 0x11, "present, instruction fetch");
    Ok(())
}

fn user(host: &Host, write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Outcome<Machine> {
    Machine::new(host, &World::user().code(write))
}

fn ring3_undefined_instruction(host: &Host) -> Outcome {
    let mut m = user(host, |a| {
        a.nop()?;
        a.ud2()
    })?;
    let report = m.expect_vector(6)?;
    assert_eq!((report.ip, report.cs), (layout::CODE + 1, selector::USER_CODE64.into()));
    assert_eq!(report.sp, layout::USER_STACK);
    Ok(())
}

/// The page appears while the handler holds the fault; the instruction is repeated.
fn ring3_page_fault_is_fixed_up(host: &Host) -> Outcome {
    let directory = layout::SPARE_TABLES;
    let world = World::user()
        .put(HIGH_POINTER, (directory | PTE_TABLE).to_le_bytes())
        .put(layout::DATA, 0x77u64.to_le_bytes())
        .code(|a| {
            a.mov(rsi, HIGH + layout::DATA)?;
            a.mov(rax, qword_ptr(rsi))?;
            a.mov(edi, layout::MMIO as u32)?;
            a.mov(qword_ptr(rdi), rax)
        });
    let mut m = Machine::new(host, &world)?;
    let report = m.expect_vector(14)?;
    assert_eq!(report.cr2, HIGH + layout::DATA);
    assert_eq!((report.error_code, report.ip), (4, layout::CODE + 10));
    m.write(directory, &PTE_LARGE.to_le_bytes())?;
    m.expect_mmio_write(layout::MMIO, &0x77u64.to_le_bytes())
}

fn ring3_privileged_instruction(host: &Host) -> Outcome {
    let mut m = user(host, |a| a.hlt())?;
    let report = m.expect_vector(13)?;
    assert_eq!((report.ip, report.error_code), (layout::CODE, 0));
    Ok(())
}

fn ring3_breakpoint(host: &Host) -> Outcome {
    let mut m = user(host, |a| {
        a.int3()?;
        a.ud2()
    })?;
    let report = m.expect_vector(3)?;
    assert_eq!(report.ip, layout::CODE + 1, "a trap reports the next instruction");
    assert_eq!(m.expect_vector(6)?.ip, layout::CODE + 1);
    Ok(())
}

fn ring3_software_interrupt(host: &Host) -> Outcome {
    let mut m = user(host, |a| {
        a.int(0x80)?;
        a.int(0x81)
    })?;
    assert_eq!(m.expect_vector(0x80)?.ip, layout::CODE + 2);
    // Its gate is not open for ring 3: the error code says that it is about the IDT. (Which entry is not compared: QEMU
    // up to 7.2 multiplies the index by 16 instead of 8.)
    let report = m.expect_vector(13)?;
    assert_eq!(report.error_code & 7, 2);
    Ok(())
}

fn ring3_system_call(host: &Host) -> Outcome {
    let entry = layout::CODE + 0x200;
    let world = World::user()
        .code(|a| {
            a.mov(eax, 40)?;
            a.syscall()?;
            a.mov(edi, layout::MMIO as u32)?;
            a.mov(qword_ptr(rdi), rax)
        })
        .put(
            entry,
            assemble64(entry, |a| {
                a.add(eax, 2)?;
                a.mov(dx, cs)?;
                a.out(0x10, al)?;
                a.sysretq()
            }),
        );
    let mut m = Machine::new(host, &world)?;
    let star = (u64::from(selector::CODE64) << 32) | (u64::from(selector::USER_CODE32) << 48);
    let mut sregs = m.x86().get_sregs()?;
    sregs.efer |= 1;
    m.x86().set_sregs(&sregs)?;
    let msr = |index, value| vm_accel::x86_64::X86Msr { index, value };
    m.x86().set_msrs(&[msr(0xc000_0081, star), msr(0xc000_0082, entry), msr(0xc000_0084, 0x200)])?;
    m.expect_out_data(0x10, &[42])?;
    assert_eq!(m.gpr(Reg::Rdx)? as u16, selector::CODE64);
    assert_eq!(m.gpr(Reg::Rcx)?, layout::CODE + 7);
    m.expect_mmio_write(layout::MMIO, &42u64.to_le_bytes())
}

fn divide_error(host: &Host) -> Outcome {
    let mut m = Machine::long(host, |a| {
        a.mov(eax, 100)?;
        a.xor(edx, edx)?;
        a.xor(ecx, ecx)?;
        a.div(ecx)?;
        a.hlt()
    })?;
    assert_eq!(m.expect_vector(0)?.ip, layout::CODE + 9);
    // The handler has saved and will restore RCX, so the divisor is changed on its stack: it is the second word.
    let stack = m.gpr(Reg::Rsp)?;
    m.write(stack + 8, &7u64.to_le_bytes())?;
    m.expect_halted()?;
    assert_eq!((m.gpr(Reg::Rax)?, m.gpr(Reg::Rdx)?), (14, 2));
    Ok(())
}

fn general_protection_error_code(host: &Host) -> Outcome {
    let mut m = Machine::long(host, |a| {
        // A selector beyond the GDT.
        a.mov(eax, 0x150)?;
        a.mov(ds, eax)?;
        a.hlt()
    })?;
    let report = m.expect_vector(13)?;
    assert_eq!((report.error_code, report.ip), (0x150, layout::CODE + 5));
    Ok(())
}

fn page_fault_in_ring0(host: &Host) -> Outcome {
    let mut m = Machine::long(host, |a| {
        a.mov(rsi, HIGH + 0x123)?;
        a.mov(byte_ptr(rsi), 1)?;
        a.hlt()
    })?;
    let report = m.expect_vector(14)?;
    assert_eq!((report.cr2, report.error_code), (HIGH + 0x123, 2));
    assert_eq!(m.x86().get_sregs()?.cr2, HIGH + 0x123);
    Ok(())
}

fn iret_to_ring3(host: &Host) -> Outcome {
    let user = layout::CODE + 0x200;
    let world = World::long()
        .code(|a| {
            a.push(i32::from(selector::USER_DATA))?;
            a.push(layout::USER_STACK as i32)?;
            a.push(2)?;
            a.push(i32::from(selector::USER_CODE64))?;
            a.push(user as i32)?;
            a.iretq()
        })
        .put(
            user,
            assemble64(user, |a| {
                a.push(rax)?;
                a.mov(edi, layout::MMIO as u32)?;
                a.mov(dword_ptr(rdi), esp)?;
                a.ud2()
            }),
        );
    let mut m = Machine::new(host, &world)?;
    m.expect_mmio_write(layout::MMIO, &(layout::USER_STACK as u32 - 8).to_le_bytes())?;
    let report = m.expect_vector(6)?;
    assert_eq!((report.sp, report.cs), (layout::USER_STACK - 8, selector::USER_CODE64.into()));
    Ok(())
}

fn halt_and_go_on(host: &Host) -> Outcome {
    let mut m = Machine::long(host, |a| {
        a.mov(ebx, 1)?;
        a.hlt()?;
        a.mov(ebx, 2)?;
        a.hlt()
    })?;
    m.expect_halted()?;
    let regs = m.vcpu.get_regs()?;
    assert_eq!((regs.pc, regs.gpr[Reg::Rbx as usize]), (layout::CODE + 6, 1));
    m.expect_halted()?;
    assert_eq!(m.gpr(Reg::Rbx)?, 2);
    Ok(())
}

fn triple_fault(host: &Host) -> Outcome {
    let mut world = World::long().code(|a| {
        a.mov(eax, 3)?;
        a.ud2()
    });
    world.cpu.idt = (layout::IDT, 0);
    let mut m = Machine::new(host, &world)?;
    m.expect(VcpuExit::TripleFault)
}

/// Calls to the host that the platform does not serve itself: KVM hands over page-state changes (KVM_HC_MAP_GPA_RANGE). The
/// instruction is that of the CPU's maker; a processor need not know the other's.
fn hypercall(host: &Host) -> Outcome {
    let program = |intel: bool| {
        World::long().code(|a| {
            a.mov(eax, 12)?;
            a.mov(ebx, layout::DATA as u32)?;
            a.mov(ecx, 1)?;
            a.xor(edx, edx)?;
            (if intel { a.vmcall() } else { a.vmmcall() })?;
            a.hlt()
        })
    };
    let mut m = Machine::new(host, &program(true))?;
    let vendor = m.x86().supported_cpuid()?.into_iter().find(|entry| entry.leaf == 0);
    if vendor.is_some_and(|entry| entry.ebx != u32::from_le_bytes(*b"Genu")) {
        drop(m);
        m = Machine::new(host, &program(false))?;
    }
    m.expect(VcpuExit::SystemCall)?;
    let regs = m.vcpu.get_regs()?;
    assert_eq!(regs.gpr[Reg::Rbx as usize], layout::DATA);
    m.set_gpr(Reg::Rax, 0x99)?;
    m.expect_halted()?;
    assert_eq!(m.gpr(Reg::Rax)?, 0x99, "what the VMM leaves in RAX is the result");
    Ok(())
}
