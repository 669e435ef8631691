//! Interrupts: lines, MSIs, events that raise them, controllers in the platform, in part, or not at all; NMIs; several
//! CPUs.

use crate::harness::machine::{set_up_vcpu, x86};
use crate::harness::{Host, Machine, Outcome, cases, fail};
use std::sync::atomic::Ordering;
use vm_accel::x86_64::Reg;
use vm_accel::{AccelError, HostEvent, IoAddress, IoEventMatch, IrqChip, IrqTarget, MsiMessage, VcpuExit};
use vm_accel_guests::asm::*;
use vm_accel_guests::world::{World, flags, layout};
use vm_accel_guests::{Bits, IcedError, assemble};

cases![
    msi_is_delivered[LocalApic],
    msi_interrupts_a_loop[LocalApic],
    msi_wakes_halt[LocalApic],
    msi_waits_for_enabled_interrupts[LocalApic],
    line_through_ioapic[KernelIrqchip],
    level_line_is_raised_again[KernelIrqchip],
    line_through_pic[KernelIrqchip],
    line_from_another_thread[KernelIrqchip],
    routed_line_is_an_msi[KernelIrqchip],
    lapic_timer[LocalApic],
    pit_timer[KernelIrqchip],
    irqfd_raises_a_line[KernelIrqchip, Irqfd],
    irqfd_resamples[KernelIrqchip, Irqfd],
    irqfd_resamples_not_before_the_end[KernelIrqchip, Irqfd],
    split_reports_end_of_interrupt[SplitIrqchip],
    split_has_no_lines[SplitIrqchip],
    injected_without_controller,
    interrupt_window,
    injection_needs_no_controller[KernelIrqchip],
    lines_need_a_controller,
    nmi_without_controller,
    nmi_with_controller[LocalApic],
    ioevent_on_port[Ioevent],
    ioevent_on_mmio[Ioevent],
    ioevent_matches_value_and_width[Ioevent],
    ioevent_refuses_nonsense[Ioevent],
    smp_init_and_sipi[LocalApic, ThreadMoves],
    smp_shares_memory[ThreadMoves],
];

const VECTOR: u8 = 0x51;
/// The guest says that it is ready.
const READY: u16 = 0x10;
/// The guest says that it goes on.
const ALIVE: u16 = 0x11;

fn msi(vector: u8) -> MsiMessage {
    MsiMessage { address: 0xfee0_0000, data: vector.into(), device_id: None }
}

/// Software-enables the local APIC with spurious vector 0xff.
fn enable_lapic(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(esi, 0xfee0_0000u32)?;
    a.mov(dword_ptr(rsi + 0xf0), 0x1ff)
}

/// Routes an I/O APIC pin to [`VECTOR`] on CPU 0.
fn route_pin(a: &mut CodeAssembler, pin: u32, bits: u32) -> Result<(), IcedError> {
    a.mov(edi, 0xfec0_0000u32)?;
    a.mov(dword_ptr(rdi), (0x10 + 2 * pin + 1) as i32)?;
    a.mov(dword_ptr(rdi + 0x10), 0)?;
    a.mov(dword_ptr(rdi), (0x10 + 2 * pin) as i32)?;
    a.mov(dword_ptr(rdi + 0x10), (bits | u32::from(VECTOR)) as i32)
}

/// Masks both PICs, so that only the I/O APIC sees lines.
fn mask_pics(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(al, 0xff)?;
    a.out(0x21, al)?;
    a.out(0xa1, al)
}

/// Tells the host, then halts for ever with interrupts on, and says after each wake-up that it goes on.
fn ready_and_halt(a: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut again = a.create_label();
    a.out(u32::from(READY), al)?;
    a.set_label(&mut again)?;
    a.sti()?;
    a.hlt()?;
    a.cli()?;
    a.out(u32::from(ALIVE), al)?;
    a.jmp(again)
}

fn lapic_world(set_up: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> World {
    World::long().handler_flags(flags::EOI_LAPIC).code(|a| {
        enable_lapic(a)?;
        set_up(a)?;
        ready_and_halt(a)
    })
}

/// A machine that has run up to [`READY`].
fn ready(host: &Host, world: &World, chip: IrqChip) -> Outcome<Machine> {
    let mut m = Machine::with_chip(host, world, chip)?;
    m.expect_out(READY, 1)?;
    Ok(m)
}

fn msi_is_delivered(host: &Host) -> Outcome {
    host.with_local_apics(|chip| {
        let mut m = ready(host, &lapic_world(|_| Ok(())), chip)?;
        for vector in [VECTOR, 0x20, 0xfe, VECTOR] {
            m.vm.signal_msi(msi(vector))?;
            m.expect_vector(vector)?;
            m.expect_out(ALIVE, 1)?;
        }
        assert_eq!(m.report()?.count, 4);
        Ok(())
    })
}

/// Calls `act` on another thread as soon as the guest has counted at [`layout::DATA`], while this thread runs the guest to
/// its next exit.
fn while_running(
    host: &Host,
    m: &mut Machine,
    act: impl FnOnce() -> Result<(), AccelError> + Send,
) -> Outcome<VcpuExit> {
    let ram = m.ram.clone();
    std::thread::scope(|scope| {
        let helper = scope.spawn(|| {
            let ram = ram;
            while host.in_time() && ram.load::<u32>(layout::DATA, Ordering::Acquire)? == 0 {
                std::thread::yield_now();
            }
            act()
        });
        let exit = m.run();
        helper.join().expect("the helper does not panic")?;
        exit
    })
}

fn msi_interrupts_a_loop(host: &Host) -> Outcome {
    let world = World::long().handler_flags(flags::EOI_LAPIC).code(|a| {
        enable_lapic(a)?;
        a.sti()?;
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.inc(dword_ptr(layout::DATA))?;
        a.jmp(again)
    });
    host.with_local_apics(|chip| {
        let mut m = Machine::with_chip(host, &world, chip)?;
        let irq = m.vm.irq_handle()?;
        let exit = while_running(host, &mut m, || irq.signal_msi(msi(VECTOR)))?;
        assert!(matches!(exit, VcpuExit::Io { .. }), "{exit:?}");
        assert_eq!(m.report()?.vector, u64::from(VECTOR));
        Ok(())
    })
}

/// The CPU is blocked in the platform; only the interrupt lets it go on.
fn msi_wakes_halt(host: &Host) -> Outcome {
    let world = lapic_world(|a| a.mov(dword_ptr(layout::DATA), 1));
    host.with_local_apics(|chip| {
        let mut m = ready(host, &world, chip)?;
        let irq = m.vm.irq_handle()?;
        for _ in 0..5 {
            let exit = while_running(host, &mut m, || irq.signal_msi(msi(VECTOR)))?;
            assert!(matches!(exit, VcpuExit::Io { port: 0xee, .. }), "{exit:?}");
            m.expect_out(ALIVE, 1)?;
        }
        Ok(())
    })
}

fn msi_waits_for_enabled_interrupts(host: &Host) -> Outcome {
    let world = World::long().handler_flags(flags::EOI_LAPIC).code(|a| {
        enable_lapic(a)?;
        a.out(u32::from(READY), al)?;
        a.out(u32::from(ALIVE), al)?;
        a.sti()?;
        let mut forever = a.create_label();
        a.set_label(&mut forever)?;
        a.inc(dword_ptr(layout::DATA))?;
        a.jmp(forever)
    });
    host.with_local_apics(|chip| {
        let mut m = ready(host, &world, chip)?;
        m.vm.signal_msi(msi(VECTOR))?;
        m.expect_out(ALIVE, 1)?;
        assert_eq!(m.report()?.count, 0);
        m.expect_vector(VECTOR)?;
        Ok(())
    })
}

/// Which line the cases use. Not 0, which is the PIT's.
const LINE: u32 = 5;
/// Redirection entry: level-triggered (bit 15).
const LEVEL: u32 = 1 << 15;

fn pin_world(bits: u32) -> World {
    lapic_world(|a| {
        mask_pics(a)?;
        route_pin(a, LINE, bits)
    })
}

fn line_through_ioapic(host: &Host) -> Outcome {
    let mut m = ready(host, &pin_world(0), IrqChip::Kernel)?;
    for _ in 0..3 {
        m.vm.set_irq_line(LINE, true)?;
        m.vm.set_irq_line(LINE, false)?;
        m.expect_vector(VECTOR)?;
        m.expect_out(ALIVE, 1)?;
    }
    assert_eq!(m.report()?.count, 3);
    Ok(())
}

/// While a level-triggered line is up, each end of interrupt raises the next one.
fn level_line_is_raised_again(host: &Host) -> Outcome {
    let mut m = ready(host, &pin_world(LEVEL), IrqChip::Kernel)?;
    m.vm.set_irq_line(LINE, true)?;
    let mut count = 0;
    while count < 4 {
        // Whether the guest gets as far as its main loop in between is not determined.
        match m.run()? {
            VcpuExit::Io { port: ALIVE, .. } => {}
            VcpuExit::Io { port: 0xee, .. } => count += 1,
            other => fail!("exit is {other:?}"),
        }
    }
    // Down during the handler, before its end of interrupt: none follows.
    m.vm.set_irq_line(LINE, false)?;
    m.expect_out(ALIVE, 1)?;
    let count = m.report()?.count;
    m.vm.signal_msi(msi(0x60))?;
    m.expect_vector(0x60)?;
    assert_eq!(m.report()?.count, count + 1);
    Ok(())
}

/// The pair of 8259s in its usual set-up: vectors 0x20 and up, edge-triggered. (Intel 8259A data sheet.)
fn set_up_pics(a: &mut CodeAssembler) -> Result<(), IcedError> {
    for (port, value) in
        [(0x20, 0x11), (0xa0, 0x11), (0x21, 0x20), (0xa1, 0x28), (0x21, 4), (0xa1, 2), (0x21, 1), (0xa1, 1)]
    {
        a.mov(al, value)?;
        a.out(port, al)?;
    }
    // All masked but line 0, line 5 and the cascade; all of the second but line 12.
    a.mov(al, 0xff & !(1 | 1 << 5 | 1 << 2))?;
    a.out(0x21, al)?;
    a.mov(al, 0xff & !(1 << 4))?;
    a.out(0xa1, al)?;
    // LINT0 takes the PIC's interrupts (ExtINT).
    a.mov(dword_ptr(rsi + 0x350), 0x700)
}

fn line_through_pic(host: &Host) -> Outcome {
    let world = World::long().handler_flags(flags::EOI_PIC).code(|a| {
        enable_lapic(a)?;
        set_up_pics(a)?;
        ready_and_halt(a)
    });
    let mut m = ready(host, &world, IrqChip::Kernel)?;
    for (line, vector) in [(5, 0x25), (12, 0x2c), (5, 0x25)] {
        m.vm.set_irq_line(line, true)?;
        m.expect_vector(vector)?;
        m.vm.set_irq_line(line, false)?;
        m.expect_out(ALIVE, 1)?;
    }
    Ok(())
}

/// The handle outlives the virtual machine's and works from anywhere.
fn line_from_another_thread(host: &Host) -> Outcome {
    let m = ready(host, &pin_world(0), IrqChip::Kernel)?;
    let irq = m.vm.irq_handle()?;
    let Machine { mut vcpu, vm, ram, .. } = m;
    drop(vm);
    let exit = std::thread::scope(|scope| {
        let helper = scope.spawn(|| {
            irq.set_line(LINE, true)?;
            irq.set_line(LINE, false)
        });
        let exit = vcpu.run();
        helper.join().expect("the helper does not panic")?;
        exit
    })?;
    assert!(matches!(exit, VcpuExit::Io { port: 0xee, .. }), "{exit:?}");
    assert_eq!(vcpu.io_data()?, [VECTOR]);
    drop(vcpu);
    // Nobody is left to interrupt; that does no harm.
    irq.set_line(LINE, true)?;
    irq.signal_msi(msi(VECTOR)).ok();
    drop(ram);
    Ok(())
}

fn routed_line_is_an_msi(host: &Host) -> Outcome {
    let mut m = ready(host, &lapic_world(|_| Ok(())), IrqChip::Kernel)?;
    let routes = [
        (24, IrqTarget::Msi(msi(VECTOR))),
        (40, IrqTarget::Msi(msi(0x70))),
        (LINE, IrqTarget::Pin { chip: 2, pin: LINE }),
    ];
    m.vm.set_irq_routes(&routes)?;
    for (gsi, vector) in [(24, VECTOR), (40, 0x70), (24, VECTOR)] {
        m.vm.set_irq_line(gsi, true)?;
        m.expect_vector(vector)?;
        m.expect_out(ALIVE, 1)?;
    }
    m.vm.set_irq_routes(&[(24, IrqTarget::Msi(msi(0x71)))])?;
    m.vm.set_irq_line(24, true)?;
    m.expect_vector(0x71)?;
    Ok(())
}

fn lapic_timer(host: &Host) -> Outcome {
    let world = lapic_world(|a| {
        // One shot, divide by 1.
        a.mov(dword_ptr(rsi + 0x3e0), 0xb)?;
        a.mov(dword_ptr(rsi + 0x320), i32::from(VECTOR))?;
        a.mov(dword_ptr(rsi + 0x380), 100_000)
    });
    host.with_local_apics(|chip| {
        let mut m = ready(host, &world, chip)?;
        m.expect_vector(VECTOR)?;
        m.expect_out(ALIVE, 1)?;
        Ok(())
    })
}

fn pit_timer(host: &Host) -> Outcome {
    let world = World::long().handler_flags(flags::EOI_PIC).code(|a| {
        enable_lapic(a)?;
        set_up_pics(a)?;
        // Channel 0, rate generator, about 1 kHz. (Intel 8254 data sheet.)
        for (port, value) in [(0x43, 0x34), (0x40, 0xa9), (0x40, 0x04)] {
            a.mov(al, value)?;
            a.out(port, al)?;
        }
        ready_and_halt(a)
    });
    let mut m = ready(host, &world, IrqChip::Kernel)?;
    for _ in 0..3 {
        m.expect_vector(0x20)?;
        // The next tick may be taken before the guest says that it goes on.
        while m.run()? != (VcpuExit::Io { port: ALIVE, direction: vm_accel::IoDirection::Out, size: 1 }) {}
    }
    Ok(())
}

fn irqfd_raises_a_line(host: &Host) -> Outcome {
    let mut m = ready(host, &pin_world(0), IrqChip::Kernel)?;
    let event = HostEvent::new()?;
    m.vm.register_irqfd(&event, LINE, None)?;
    for _ in 0..3 {
        event.signal()?;
        m.expect_vector(VECTOR)?;
        m.expect_out(ALIVE, 1)?;
    }
    m.vm.unregister_irqfd(&event, LINE)?;
    event.signal()?;
    m.vm.signal_msi(msi(0x60))?;
    m.expect_vector(0x60)?;
    assert_eq!(m.report()?.count, 4, "an unregistered event raised the line");
    Ok(())
}

fn irqfd_resamples(host: &Host) -> Outcome {
    let mut m = ready(host, &pin_world(LEVEL), IrqChip::Kernel)?;
    let (event, resample) = (HostEvent::new()?, HostEvent::new()?);
    m.vm.register_irqfd(&event, LINE, Some(&resample))?;
    for _ in 0..2 {
        assert_eq!(resample.try_take()?, None);
        event.signal()?;
        m.expect_vector(VECTOR)?;
        m.expect_out(ALIVE, 1)?;
        while resample.try_take()?.is_none() {
            if !host.in_time() {
                fail!("the end of interrupt does not signal the event");
            }
            std::thread::yield_now();
        }
    }
    m.vm.unregister_irqfd(&event, LINE)?;
    Ok(())
}

/// Before the guest's end of interrupt nothing is signalled, and the vector is in service.
fn irqfd_resamples_not_before_the_end(host: &Host) -> Outcome {
    let mut m = ready(host, &pin_world(LEVEL), IrqChip::Kernel)?;
    let (event, resample) = (HostEvent::new()?, HostEvent::new()?);
    m.vm.register_irqfd(&event, LINE, Some(&resample))?;
    event.signal()?;
    m.expect_vector(VECTOR)?;
    let in_service = m.x86().get_lapic()?.reg(0x100 + 0x10 * usize::from(VECTOR / 32));
    assert_eq!(in_service, Some(1 << (VECTOR % 32)));
    assert_eq!(resample.try_take()?, None);
    m.expect_out(ALIVE, 1)?;
    Ok(())
}

/// The I/O APIC is the VMM's: it sends level-triggered MSIs and learns when they are acknowledged.
fn split_reports_end_of_interrupt(host: &Host) -> Outcome {
    let mut m = ready(host, &lapic_world(|_| Ok(())), IrqChip::Split)?;
    // Level-triggered, assert (Intel SDM vol. 3, figure "Layout of the MSI Message Data Register").
    let level = MsiMessage { data: u32::from(VECTOR) | 1 << 15 | 1 << 14, ..msi(VECTOR) };
    // KVM reports the ends of interrupts that are routed; elsewhere there may be no routing to tell.
    match m.vm.set_irq_routes(&[(3, IrqTarget::Msi(level))]) {
        Err(AccelError::Unsupported { .. }) => {}
        other => other?,
    }
    for _ in 0..2 {
        m.vm.signal_msi(level)?;
        m.expect_vector(VECTOR)?;
        m.expect(VcpuExit::EndOfInterrupt { vector: VECTOR })?;
        m.expect_out(ALIVE, 1)?;
        // An edge-triggered one is nobody's business.
        m.vm.signal_msi(msi(0x60))?;
        m.expect_vector(0x60)?;
        m.expect_out(ALIVE, 1)?;
    }
    Ok(())
}

fn split_has_no_lines(host: &Host) -> Outcome {
    let m = ready(host, &lapic_world(|_| Ok(())), IrqChip::Split)?;
    let refused = m.vm.set_irq_line(LINE, true);
    assert!(matches!(refused, Err(AccelError::Unsupported { .. })), "{refused:?}");
    Ok(())
}

fn injected_without_controller(host: &Host) -> Outcome {
    let world = World::long().code(ready_and_halt).interrupts_on();
    let mut m = ready(host, &world, IrqChip::None)?;
    for vector in [VECTOR, 0x20, 0xff] {
        assert!(m.x86().ready_for_interrupt()?);
        m.x86().inject_interrupt(vector)?;
        m.expect_vector(vector)?;
        loop {
            match m.run()? {
                VcpuExit::Io { port: ALIVE, .. } | VcpuExit::Halted if m.x86().ready_for_interrupt()? => {
                    break;
                }
                VcpuExit::Io { port: ALIVE, .. } | VcpuExit::Halted => {}
                other => fail!("exit is {other:?}"),
            }
        }
    }
    assert_eq!(m.report()?.count, 3);
    Ok(())
}

fn interrupt_window(host: &Host) -> Outcome {
    let mut m = Machine::long(host, |a| {
        a.cli()?;
        a.out(u32::from(READY), al)?;
        a.out(u32::from(ALIVE), al)?;
        a.sti()?;
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.inc(dword_ptr(layout::DATA))?;
        a.jmp(again)
    })?;
    m.expect_out(READY, 1)?;
    assert!(!m.x86().ready_for_interrupt()?);
    let refused = m.x86().inject_interrupt(VECTOR);
    assert!(matches!(refused, Err(AccelError::InvalidArgument { .. })), "{refused:?}");
    m.x86().request_interrupt_window(true)?;
    m.expect_out(ALIVE, 1)?;
    m.expect(VcpuExit::InterruptWindow)?;
    assert!(m.x86().ready_for_interrupt()?);
    m.x86().request_interrupt_window(false)?;
    m.x86().inject_interrupt(VECTOR)?;
    let report = m.expect_vector(VECTOR)?;
    assert_ne!(report.flags & 0x200, 0, "interrupts were on");
    Ok(())
}

/// With the platform's local APICs there is nothing for the VMM to inject.
fn injection_needs_no_controller(host: &Host) -> Outcome {
    let mut m = Machine::with_chip(host, &World::long().code(|a| a.hlt()), IrqChip::Kernel)?;
    let unsupported = |error: AccelError| matches!(error, AccelError::Unsupported { .. });
    assert!(m.x86().inject_interrupt(VECTOR).is_err_and(unsupported));
    assert!(m.x86().ready_for_interrupt().is_err_and(unsupported));
    assert!(m.x86().request_interrupt_window(true).is_err_and(unsupported));
    Ok(())
}

fn lines_need_a_controller(host: &Host) -> Outcome {
    let mut m = Machine::long(host, |a| a.hlt())?;
    let event = HostEvent::new()?;
    for refused in [
        m.vm.set_irq_line(LINE, true),
        m.vm.signal_msi(msi(VECTOR)),
        m.vm.set_irq_routes(&[(24, IrqTarget::Msi(msi(VECTOR)))]),
        m.vm.register_irqfd(&event, LINE, None),
    ] {
        assert!(refused.is_err());
    }
    m.expect_halted()
}

fn nmi(host: &Host, chip: IrqChip) -> Outcome {
    let world = World::long().code(|a| {
        // Interrupts are off: an NMI does not care.
        a.cli()?;
        a.out(u32::from(READY), al)?;
        a.nop()?;
        a.out(u32::from(ALIVE), al)
    });
    let mut m = ready(host, &world, chip)?;
    m.x86().inject_nmi()?;
    m.expect_vector(2)?;
    m.expect_out(ALIVE, 1)?;
    Ok(())
}

fn nmi_without_controller(host: &Host) -> Outcome {
    nmi(host, IrqChip::None)
}

fn nmi_with_controller(host: &Host) -> Outcome {
    host.with_local_apics(|chip| nmi(host, chip))
}

const DOORBELL_PORT: u16 = 0x600;
const DOORBELL: u64 = layout::MMIO + 0x40;

fn on(address: IoAddress, size: u8, value: Option<u64>) -> IoEventMatch {
    IoEventMatch { address, size, value }
}

fn ioevent_on_port(host: &Host) -> Outcome {
    let mut m = Machine::long(host, |a| {
        let mut again = a.create_label();
        a.mov(edx, u32::from(DOORBELL_PORT))?;
        a.set_label(&mut again)?;
        a.out(dx, ax)?;
        a.out(dx, ax)?;
        a.hlt()?;
        a.jmp(again)
    })?;
    let event = HostEvent::new()?;
    let doorbell = on(IoAddress::Pio(DOORBELL_PORT), 2, None);
    m.vm.register_ioevent(&event, doorbell)?;
    m.expect_halted()?;
    assert_eq!(event.try_take()?, Some(2));
    m.vm.unregister_ioevent(&event, doorbell)?;
    m.expect_out_data(DOORBELL_PORT, &[0, 0])?;
    m.expect_out_data(DOORBELL_PORT, &[0, 0])?;
    m.expect_halted()?;
    assert_eq!(event.try_take()?, None);
    Ok(())
}

fn ioevent_on_mmio(host: &Host) -> Outcome {
    let mut m = Machine::long(host, |a| {
        a.mov(edi, DOORBELL as u32)?;
        a.mov(dword_ptr(rdi), eax)?;
        a.mov(eax, dword_ptr(rdi))?;
        a.mov(dword_ptr(rdi + 4), eax)?;
        a.hlt()
    })?;
    let event = HostEvent::new()?;
    m.vm.register_ioevent(&event, on(IoAddress::Mmio(DOORBELL), 4, None))?;
    // Reads and neighbours are not the event's.
    m.expect_mmio_read(DOORBELL, &[1, 2, 3, 4])?;
    assert_eq!(event.try_take()?, Some(1));
    m.expect_mmio_write(DOORBELL + 4, &[1, 2, 3, 4])?;
    m.expect_halted()?;
    assert_eq!(event.try_take()?, None);
    Ok(())
}

fn ioevent_matches_value_and_width(host: &Host) -> Outcome {
    let mut m = Machine::long(host, |a| {
        a.mov(edi, DOORBELL as u32)?;
        a.mov(dword_ptr(rdi), 5)?;
        a.mov(dword_ptr(rdi), 6)?;
        a.mov(dword_ptr(rdi), 7)?;
        a.mov(word_ptr(rdi), 5)?;
        a.mov(edx, u32::from(DOORBELL_PORT))?;
        a.mov(eax, 0x105)?;
        a.out(dx, al)?;
        a.out(dx, ax)?;
        a.hlt()
    })?;
    let (five, six, port) = (HostEvent::new()?, HostEvent::new()?, HostEvent::new()?);
    m.vm.register_ioevent(&five, on(IoAddress::Mmio(DOORBELL), 4, Some(5)))?;
    m.vm.register_ioevent(&six, on(IoAddress::Mmio(DOORBELL), 4, Some(6)))?;
    m.vm.register_ioevent(&port, on(IoAddress::Pio(DOORBELL_PORT), 1, Some(5)))?;
    m.expect_mmio_write(DOORBELL, &[7, 0, 0, 0])?;
    m.expect_mmio_write(DOORBELL, &[5, 0])?;
    m.expect_out_data(DOORBELL_PORT, &[5, 1])?;
    m.expect_halted()?;
    for event in [five, six, port] {
        assert_eq!(event.try_take()?, Some(1));
    }
    Ok(())
}

fn ioevent_refuses_nonsense(host: &Host) -> Outcome {
    let mut vm = host.vm()?;
    let event = HostEvent::new()?;
    for size in [3, 5, 16] {
        let refused = vm.register_ioevent(&event, on(IoAddress::Mmio(DOORBELL), size, None));
        assert!(matches!(refused, Err(AccelError::InvalidArgument { .. })), "{refused:?}");
    }
    let doorbell = on(IoAddress::Mmio(DOORBELL), 4, Some(1));
    vm.register_ioevent(&event, doorbell)?;
    assert!(vm.register_ioevent(&event, doorbell).is_err(), "it is registered already");
    vm.unregister_ioevent(&event, doorbell)?;
    assert!(vm.unregister_ioevent(&event, doorbell).is_err(), "it is not registered any more");
    Ok(())
}

/// The boot CPU starts the other one with INIT and SIPI; it begins in real mode at the vector's page.
fn smp_init_and_sipi(host: &Host) -> Outcome {
    const AP_CODE: u64 = 0x9000;
    let world = World::long()
        .put(
            AP_CODE,
            assemble(Bits::B16, 0, |a| {
                a.xor(ax, ax)?;
                a.mov(ds, ax)?;
                a.inc(word_ptr(layout::DATA as u32))?;
                a.out(u32::from(ALIVE), al)?;
                a.hlt()
            }),
        )
        .code(|a| {
            let mut wait = a.create_label();
            enable_lapic(a)?;
            // To APIC 1: INIT, then SIPI with vector 9. (Intel SDM vol. 3, "MP Initialization Protocol Algorithm".)
            for command in [0x4500u32, 0x4600 | (AP_CODE >> 12) as u32] {
                a.mov(dword_ptr(rsi + 0x310), 1 << 24)?;
                a.mov(dword_ptr(rsi + 0x300), command as i32)?;
            }
            a.set_label(&mut wait)?;
            a.pause()?;
            a.cmp(word_ptr(layout::DATA), 0)?;
            a.je(wait)?;
            a.out(u32::from(READY), al)
        });
    host.with_local_apics(|chip| {
        let mut m = Machine::with_chip(host, &world, chip)?;
        let mut second = m.vm.create_vcpu(1)?;
        let cpuid = x86(&mut *second).supported_cpuid()?;
        x86(&mut *second).set_cpuid(&cpuid)?;
        host.watch.add(second.kick_handle()?);
        let (exit, second) = std::thread::scope(|scope| {
            let other = scope.spawn(move || second.run().map(|exit| (exit, second)));
            let exit = m.run();
            (exit, other.join().expect("the other CPU's thread does not panic"))
        });
        let port = |exit: &VcpuExit| match exit {
            VcpuExit::Io { port, .. } => Some(*port),
            _ => None,
        };
        assert_eq!(port(&exit?), Some(READY));
        let (exit, second) = second?;
        assert_eq!(port(&exit), Some(ALIVE));
        assert_eq!(second.get_id(), 1);
        assert_eq!(m.read(layout::DATA)?, [1, 0]);
        Ok(())
    })
}

/// Two CPUs increment one word with locked instructions: no increment is lost.
fn smp_shares_memory(host: &Host) -> Outcome {
    const TURNS: u32 = 50_000;
    let world = World::long().code(|a| {
        let mut again = a.create_label();
        a.mov(ecx, TURNS)?;
        a.set_label(&mut again)?;
        a.lock().inc(dword_ptr(layout::DATA))?;
        a.dec(ecx)?;
        a.jne(again)?;
        a.hlt()
    });
    let mut m = Machine::new(host, &world)?;
    let mut second = m.vm.create_vcpu(1)?;
    set_up_vcpu(&mut *second, &world.cpu)?;
    host.watch.add(second.kick_handle()?);
    let other = std::thread::scope(|scope| {
        let other = scope.spawn(move || second.run());
        m.expect_halted()?;
        Ok::<_, crate::harness::Failure>(other.join().expect("the other CPU's thread does not panic"))
    })?;
    assert_eq!(other?, VcpuExit::Halted);
    assert_eq!(m.read(layout::DATA)?, (2 * TURNS).to_le_bytes());
    assert_eq!(m.gpr(Reg::Rcx)?, 0);
    Ok(())
}
