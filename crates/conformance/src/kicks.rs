//! Kicks: sticky, never lost, coalescing, harmless when late.

use crate::harness::{Host, Machine, Outcome, cases, fail};
use std::sync::atomic::{AtomicBool, Ordering};
use vm_accel::x86_64::Reg;
use vm_accel::{IrqChip, VcpuExit};
use vm_accel_guests::asm::*;
use vm_accel_guests::world::{World, layout};

cases![
    before_run,
    several_kicks_coalesce,
    while_ring0_spins,
    while_ring3_spins,
    while_halted_in_the_platform[LocalApic],
    while_waiting_for_startup[LocalApic],
    from_many_threads,
    between_read_and_answer,
    with_a_write_pending,
    kept_by_quiesce,
    between_elements_of_a_string,
    after_the_vcpu_is_gone,
    while_the_vcpu_is_dropped,
    each_vcpu_has_its_own,
];

fn before_run(host: &Host) -> Outcome {
    let mut m = Machine::long(host, |a| {
        a.out(0x10, al)?;
        a.hlt()
    })?;
    let kick = m.vcpu.kick_handle()?;
    for _ in 0..3 {
        let before = m.vcpu.get_regs()?;
        kick.kick();
        assert_eq!(m.vcpu.run()?, VcpuExit::Interrupt);
        assert_eq!(m.vcpu.get_regs()?, before, "the guest ran");
    }
    m.expect_out(0x10, 1)?;
    m.expect_halted()
}

fn several_kicks_coalesce(host: &Host) -> Outcome {
    let mut m = Machine::long(host, |a| a.hlt())?;
    let kick = m.vcpu.kick_handle()?;
    let other = m.vcpu.kick_handle()?;
    for _ in 0..100 {
        kick.kick();
        other.clone().kick();
    }
    assert_eq!(m.vcpu.run()?, VcpuExit::Interrupt);
    m.expect_halted()
}

/// A guest that counts at [`layout::DATA`] for ever.
fn counting(host: &Host, mut world: World, chip: IrqChip) -> Outcome<Machine> {
    world = world.code(|a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.inc(dword_ptr(layout::DATA))?;
        a.jmp(again)
    });
    Machine::with_chip(host, &world, chip)
}

/// Kicks the vCPU 20 times, each time after the guest was seen to run; each kick must end a `run()`.
fn kick_while_spinning(host: &Host, m: &mut Machine) -> Outcome {
    let kick = m.vcpu.kick_handle()?;
    let ram = m.ram.clone();
    for _ in 0..20 {
        let exit = std::thread::scope(|scope| {
            scope.spawn(|| {
                let count = || ram.load::<u32>(layout::DATA, Ordering::Acquire).expect("inside RAM");
                let first = count();
                while host.in_time() && count() == first {
                    std::thread::yield_now();
                }
                kick.kick();
            });
            m.vcpu.run()
        })?;
        if exit != VcpuExit::Interrupt {
            fail!("exit is {exit:?}");
        }
    }
    Ok(())
}

fn while_ring0_spins(host: &Host) -> Outcome {
    let mut m = counting(host, World::long(), IrqChip::None)?;
    kick_while_spinning(host, &mut m)
}

fn while_ring3_spins(host: &Host) -> Outcome {
    let mut m = counting(host, World::user(), IrqChip::None)?;
    kick_while_spinning(host, &mut m)
}

fn while_halted_in_the_platform(host: &Host) -> Outcome {
    host.with_local_apics(|chip| while_halted(host, chip))
}

fn while_halted(host: &Host, chip: IrqChip) -> Outcome {
    let world = World::long().code(|a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.inc(dword_ptr(layout::DATA))?;
        a.sti()?;
        a.hlt()?;
        a.jmp(again)
    });
    let mut m = Machine::with_chip(host, &world, chip)?;
    let kick = m.vcpu.kick_handle()?;
    let ram = m.ram.clone();
    for _ in 0..20 {
        let exit = std::thread::scope(|scope| {
            scope.spawn(|| {
                while host.in_time() && ram.load::<u32>(layout::DATA, Ordering::Acquire).expect("inside RAM") == 0 {
                    std::thread::yield_now();
                }
                kick.kick();
            });
            m.vcpu.run()
        })?;
        assert_eq!(exit, VcpuExit::Interrupt);
    }
    // A kick is no interrupt: the CPU has not left its HLT.
    assert_eq!(m.read(layout::DATA)?, 1u32.to_le_bytes());
    Ok(())
}

/// An application processor that was never started blocks in the platform too.
fn while_waiting_for_startup(host: &Host) -> Outcome {
    host.with_local_apics(|chip| {
        let mut m = Machine::with_chip(host, &World::long().code(|a| a.hlt()), chip)?;
        let mut second = m.vm.create_vcpu(1)?;
        let kick = second.kick_handle()?;
        for _ in 0..5 {
            let exit = std::thread::scope(|scope| {
                scope.spawn(|| kick.kick());
                second.run()
            })?;
            assert_eq!(exit, VcpuExit::Interrupt);
        }
        Ok(())
    })
}

/// Every thread's kick is answered: a thread that kicks and then waits for a new answer always gets one.
fn from_many_threads(host: &Host) -> Outcome {
    use std::sync::atomic::AtomicU64;
    const THREADS: u64 = 4;
    const KICKS: u64 = 50;
    let mut m = counting(host, World::long(), IrqChip::None)?;
    let kick = m.vcpu.kick_handle()?;
    let (answers, finished) = (AtomicU64::new(0), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                for _ in 0..KICKS {
                    let seen = answers.load(Ordering::SeqCst);
                    kick.kick();
                    while host.in_time() && answers.load(Ordering::SeqCst) == seen {
                        std::thread::yield_now();
                    }
                }
                finished.fetch_add(1, Ordering::SeqCst);
                kick.kick();
            });
        }
        while finished.load(Ordering::SeqCst) < THREADS {
            match m.vcpu.run()? {
                VcpuExit::Interrupt if host.in_time() => answers.fetch_add(1, Ordering::SeqCst),
                exit => fail!("exit is {exit:?} after {answers:?} answers"),
            };
        }
        Ok(())
    })
}

/// The read stays answered, whatever happens between the answer and its use.
fn between_read_and_answer(host: &Host) -> Outcome {
    let mut m = Machine::long(host, |a| {
        a.in_(al, 0x10)?;
        a.mov(edi, layout::MMIO as u32)?;
        a.mov(ebx, dword_ptr(rdi))?;
        a.hlt()
    })?;
    let kick = m.vcpu.kick_handle()?;
    m.expect_in(0x10, &[0x42])?;
    kick.kick();
    assert_eq!(m.vcpu.run()?, VcpuExit::Interrupt);
    m.expect_mmio_read(layout::MMIO, &[1, 2, 3, 4])?;
    kick.kick();
    kick.kick();
    assert_eq!(m.vcpu.run()?, VcpuExit::Interrupt);
    m.expect_halted()?;
    assert_eq!(m.gpr(Reg::Rax)?, 0x42);
    assert_eq!(m.gpr(Reg::Rbx)?, 0x0403_0201);
    Ok(())
}

/// A write is reported once, also when the next run is interrupted at once.
fn with_a_write_pending(host: &Host) -> Outcome {
    let mut m = Machine::long(host, |a| {
        a.mov(edi, layout::MMIO as u32)?;
        for i in 0..10 {
            a.mov(dword_ptr(rdi), i)?;
            a.out(0x10, al)?;
        }
        a.hlt()
    })?;
    let kick = m.vcpu.kick_handle()?;
    for i in 0..10u32 {
        m.expect_mmio_write(layout::MMIO, &i.to_le_bytes())?;
        kick.kick();
        assert_eq!(m.vcpu.run()?, VcpuExit::Interrupt);
        m.expect_out(0x10, 1)?;
        kick.kick();
        assert_eq!(m.vcpu.run()?, VcpuExit::Interrupt);
    }
    m.expect_halted()
}

fn kept_by_quiesce(host: &Host) -> Outcome {
    let mut m = Machine::long(host, |a| {
        a.in_(al, 0x10)?;
        a.hlt()
    })?;
    let kick = m.vcpu.kick_handle()?;
    m.expect_in(0x10, &[7])?;
    kick.kick();
    m.quiesce()?;
    assert_eq!(m.gpr(Reg::Rax)?, 7);
    assert_eq!(m.vcpu.run()?, VcpuExit::Interrupt, "quiesce() swallowed the kick");
    m.expect_halted()
}

/// A string instruction over a device gets all its elements, in order, once each.
fn between_elements_of_a_string(host: &Host) -> Outcome {
    let bytes: Vec<u8> = (1..=60).collect();
    let world = World::long().put(layout::DATA, bytes.clone()).code(|a| {
        a.mov(esi, layout::DATA as u32)?;
        a.mov(edi, layout::MMIO as u32)?;
        a.mov(ecx, 15)?;
        a.rep().movsd()?;
        a.hlt()
    });
    let mut m = Machine::new(host, &world)?;
    let kick = m.vcpu.kick_handle()?;
    for (i, element) in bytes.chunks(4).enumerate() {
        m.expect_mmio_write(layout::MMIO + 4 * i as u64, element)?;
        kick.kick();
        // The platform may report the next element before the kick; then the kick comes at the element after.
        if i % 2 == 0 {
            m.vcpu.quiesce().map(|_| ())?;
        }
        assert_eq!(m.vcpu.run()?, VcpuExit::Interrupt);
    }
    m.expect_halted()
}

fn after_the_vcpu_is_gone(host: &Host) -> Outcome {
    let mut m = Machine::long(host, |a| a.hlt())?;
    let kick = m.vcpu.kick_handle()?;
    m.expect_halted()?;
    let Machine { vcpu, vm, .. } = m;
    drop(vcpu);
    kick.kick();
    drop(vm);
    for _ in 0..1000 {
        kick.kick();
    }
    // Also from a thread that never had anything to do with it.
    std::thread::scope(|scope| {
        scope.spawn(|| kick.kick());
    });
    Ok(())
}

fn while_the_vcpu_is_dropped(host: &Host) -> Outcome {
    for _ in 0..10 {
        let mut m = counting(host, World::long(), IrqChip::None)?;
        let kick = m.vcpu.kick_handle()?;
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Acquire) {
                    kick.kick();
                }
            });
            let exit = m.vcpu.run();
            drop(m);
            stop.store(true, Ordering::Release);
            assert_eq!(exit, Ok(VcpuExit::Interrupt));
        });
    }
    Ok(())
}

fn each_vcpu_has_its_own(host: &Host) -> Outcome {
    let world = World::long().code(|a| a.hlt());
    let mut m = Machine::new(host, &world)?;
    let mut second = m.vm.create_vcpu(1)?;
    crate::harness::machine::set_up_vcpu(&mut *second, &world.cpu)?;
    let kick = second.kick_handle()?;
    kick.kick();
    m.expect_halted()?;
    // On a thread of its own: some platforms have one vCPU per thread.
    let exits = std::thread::scope(|scope| scope.spawn(move || [second.run(), second.run()]).join());
    assert_eq!(exits.expect("no panic"), [Ok(VcpuExit::Interrupt), Ok(VcpuExit::Halted)]);
    Ok(())
}
