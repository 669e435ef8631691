//! A guest hops from virtual machine to virtual machine in the middle of its work, all state saved and restored, and ends
//! with the result that it would have had.

use crate::harness::{Host, Machine, Outcome, cases, fail};
use std::sync::atomic::{AtomicBool, Ordering};
use vm_accel::x86_64::{CpuidEntry, LapicState, MpState, Reg, X86DebugRegs, X86Events, X86Msr, X86Sregs, Xcr};
use vm_accel::{GuestRegs, IrqChip, VcpuExit};
use vm_accel_guests::asm::*;
use vm_accel_guests::world::{World, flags, layout};

cases![
    hop_at_exits_ring0[Xsave],
    hop_between_accesses_of_an_instruction[Xsave],
    hop_at_kicks_ring3[Xsave],
    hop_with_interrupts_pending[Xsave, LocalApic],
];

/// Everything that a vCPU is.
struct Saved {
    cpuid: Vec<CpuidEntry>,
    xcrs: Vec<Xcr>,
    sregs: X86Sregs,
    xsave: Vec<u8>,
    lapic: Option<LapicState>,
    msrs: Vec<X86Msr>,
    regs: GuestRegs,
    debug: X86DebugRegs,
    events: X86Events,
    mp_state: MpState,
    memory: Vec<u8>,
}

/// Saves a machine of which nothing is pending.
fn save(m: &mut Machine, chip: IrqChip) -> Outcome<Saved> {
    assert!(m.vcpu.pending_access().is_none());
    let mut memory = vec![0; layout::RAM_SIZE as usize];
    m.ram.read(0, &mut memory)?;
    let regs = m.vcpu.get_regs()?;
    let x86 = m.x86();
    let indices = x86.msr_indices()?;
    Ok(Saved {
        cpuid: x86.get_cpuid()?,
        xcrs: x86.get_xcrs()?,
        sregs: x86.get_sregs()?,
        xsave: x86.get_xsave()?,
        lapic: match chip {
            IrqChip::None => None,
            _ => Some(x86.get_lapic()?),
        },
        msrs: x86.get_msrs(&indices)?,
        regs,
        debug: x86.get_debug_regs()?,
        events: x86.get_events()?,
        mp_state: x86.get_mp_state()?,
        memory,
    })
}

/// A new virtual machine in that state. The order is that of the documentation of `X86Vcpu`.
fn restore(host: &Host, saved: &Saved, chip: IrqChip) -> Outcome<Machine> {
    let mut m = Machine::with_chip(host, &World::long(), chip)?;
    m.ram.write(0, &saved.memory)?;
    let x86 = m.x86();
    x86.set_cpuid(&saved.cpuid)?;
    x86.set_xcrs(&saved.xcrs)?;
    x86.set_sregs(&saved.sregs)?;
    x86.set_xsave(&saved.xsave)?;
    if let Some(lapic) = &saved.lapic {
        x86.set_lapic(lapic)?;
    }
    x86.set_msrs(&saved.msrs)?;
    m.vcpu.set_regs(&saved.regs)?;
    let x86 = m.x86();
    x86.set_debug_regs(&saved.debug)?;
    x86.set_events(&saved.events)?;
    x86.set_mp_state(saved.mp_state)?;
    Ok(m)
}

fn hop(host: &Host, mut m: Machine, chip: IrqChip) -> Outcome<Machine> {
    let saved = save(&mut m, chip)?;
    drop(m);
    restore(host, &saved, chip)
}

const MULTIPLIER: u32 = 0x0019_660d;
const INCREMENT: u32 = 0x3c6e_f35f;

/// What the guests below compute: a linear congruential generator, summed up.
fn expected(turns: u32) -> (u32, u32) {
    let (mut state, mut sum) = (1u32, 0u32);
    for _ in 0..turns {
        state = state.wrapping_mul(MULTIPLIER).wrapping_add(INCREMENT);
        sum = sum.wrapping_add(state);
    }
    (state, sum)
}

fn hop_at_exits_ring0(host: &Host) -> Outcome {
    const TURNS: u32 = 12;
    let world = World::long().code(|a| {
        let mut again = a.create_label();
        a.mov(eax, 1)?;
        a.mov(ecx, TURNS)?;
        a.mov(esp, layout::STACK as u32 - 64)?;
        a.set_label(&mut again)?;
        a.imul_3(eax, eax, MULTIPLIER as i32)?;
        a.add(eax, INCREMENT)?;
        a.add(dword_ptr(layout::DATA), eax)?;
        a.out(0x10, eax)?;
        a.dec(ecx)?;
        a.jne(again)?;
        a.hlt()
    });
    let mut m = Machine::new(host, &world)?;
    m.x86().set_debug_regs(&X86DebugRegs { db: [1, 2, 3, 4], dr6: 0xffff_0ff0, dr7: 0x400 })?;
    m.x86().set_msrs(&[X86Msr { index: 0xc000_0082, value: 0x1234 }])?;
    for turn in 1..=TURNS {
        m.expect_out_data(0x10, &expected(turn).0.to_le_bytes())?;
        m.quiesce()?;
        m = hop(host, m, IrqChip::None)?;
    }
    m.expect_halted()?;
    assert_eq!(m.read(layout::DATA)?, expected(TURNS).1.to_le_bytes());
    assert_eq!(m.gpr(Reg::Rsp)?, layout::STACK - 64);
    assert_eq!(m.x86().get_debug_regs()?.db, [1, 2, 3, 4]);
    assert_eq!(m.x86().get_msrs(&[0xc000_0082])?[0].value, 0x1234);
    Ok(())
}

/// The first machine serves the accesses that `quiesce` brings up; the second starts behind the instruction.
fn hop_between_accesses_of_an_instruction(host: &Host) -> Outcome {
    let world = World::long().code(|a| {
        a.mov(esi, layout::MMIO as u32)?;
        a.mov(edi, layout::MMIO as u32 + 0x1000)?;
        a.movsd()?;
        a.movsd()?;
        a.hlt()
    });
    let mut m = Machine::new(host, &world)?;
    for turn in 0..2u64 {
        m.expect_mmio_read(layout::MMIO + 4 * turn, &[turn as u8 + 1; 4])?;
        match m.vcpu.quiesce()? {
            VcpuExit::Mmio { addr, is_write: true, .. } => assert_eq!(addr, layout::MMIO + 0x1000 + 4 * turn),
            other => fail!("exit is {other:?}"),
        }
        assert_eq!(m.vcpu.io_data()?, [turn as u8 + 1; 4]);
        m.quiesce()?;
        m = hop(host, m, IrqChip::None)?;
    }
    m.expect_halted()
}

/// Ring 3 with SSE, stopped at arbitrary instructions.
fn hop_at_kicks_ring3(host: &Host) -> Outcome {
    const TURNS: u32 = 30_000_000;
    let world = World::user().put(layout::DATA, [1, 0, 0, 0, 2, 0, 0, 0, 3, 0, 0, 0, 4, 0, 0, 0]).code(|a| {
        let mut again = a.create_label();
        a.movups(xmm1, xmmword_ptr(layout::DATA))?;
        a.pxor(xmm2, xmm2)?;
        a.xor(ebx, ebx)?;
        a.mov(eax, 1)?;
        a.mov(ecx, TURNS)?;
        a.set_label(&mut again)?;
        a.imul_3(eax, eax, MULTIPLIER as i32)?;
        a.add(eax, INCREMENT)?;
        a.add(ebx, eax)?;
        a.paddd(xmm2, xmm1)?;
        a.dec(ecx)?;
        a.jne(again)?;
        a.movups(xmmword_ptr(layout::DATA + 0x10), xmm2)?;
        a.mov(edi, layout::MMIO as u32)?;
        a.mov(dword_ptr(rdi), ebx)
    });
    let mut m = Machine::new(host, &world)?;
    let mut hops = 0;
    loop {
        let kick = m.vcpu.kick_handle()?;
        let done = AtomicBool::new(false);
        let exit = std::thread::scope(|scope| {
            // The hops grow apart, so that the guest gets on also where a hop costs more than it computes.
            scope.spawn(|| {
                std::thread::park_timeout(std::time::Duration::from_millis(1 + hops));
                if !done.load(Ordering::Acquire) {
                    kick.kick();
                }
            });
            let exit = m.vcpu.run();
            done.store(true, Ordering::Release);
            exit
        })?;
        match exit {
            VcpuExit::Interrupt if host.in_time() => {
                m.quiesce()?;
                m = hop(host, m, IrqChip::None)?;
                hops += 1;
            }
            VcpuExit::Mmio { addr: layout::MMIO, is_write: true, .. } => break,
            other => fail!("exit is {other:?} after {hops} hops"),
        }
    }
    assert_eq!(m.vcpu.io_data()?, expected(TURNS).1.to_le_bytes(), "after {hops} hops");
    let lanes = [1u32, 2, 3, 4].map(|n| n.wrapping_mul(TURNS).to_le_bytes()).concat();
    assert_eq!(m.read::<16>(layout::DATA + 0x10)?[..], lanes);
    Ok(())
}

/// An interrupt that waits in the local APIC arrives in the next machine.
fn hop_with_interrupts_pending(host: &Host) -> Outcome {
    let world = World::long().handler_flags(flags::EOI_LAPIC).code(|a| {
        let mut forever = a.create_label();
        a.mov(esi, 0xfee0_0000u32)?;
        a.mov(dword_ptr(rsi + 0xf0), 0x1ff)?;
        a.out(0x10, al)?;
        a.sti()?;
        a.set_label(&mut forever)?;
        a.inc(dword_ptr(layout::DATA))?;
        a.jmp(forever)
    });
    host.with_local_apics(|chip| {
        let mut m = Machine::with_chip(host, &world, chip)?;
        m.expect_out(0x10, 1)?;
        m.quiesce()?;
        for vector in [0x51, 0x62] {
            m.vm.signal_msi(vm_accel::MsiMessage { address: 0xfee0_0000, data: vector, device_id: None })?;
        }
        m = hop(host, m, chip)?;
        // The higher one first (Intel SDM vol. 3, 11.8.3).
        m.expect_vector(0x62)?;
        m.expect_vector(0x51)?;
        Ok(())
    })
}
