//! The GIC: interrupts by line, by irqfd, by message and from the timer, and its state.

use super::machine::prepare;
use super::{Arm, poll};
use crate::harness::{Host, Outcome, cases, fail};
use vm_accel::aarch64::{
    self as aarch64, Gic, GicPart, GicState, GicVersion, MsiFrame, PSTATE_EL1H_MASKED, ppi_line, spi_line, sys_reg,
};
use vm_accel::{HostEvent, IoAddress, IoEventMatch, MsiMessage, VcpuExit};
use vm_accel_guests::arm64::Index::Offset;
use vm_accel_guests::arm64::{Assembler, ZR, layout, psci};

cases![
    gic_is_described [KernelIrqchip],
    shared_interrupt_wakes_the_guest [KernelIrqchip],
    masked_interrupt_waits [KernelIrqchip],
    level_is_delivered_again_until_lowered [KernelIrqchip],
    private_interrupt [KernelIrqchip],
    edge_is_delivered_once [KernelIrqchip],
    generated_interrupt [KernelIrqchip],
    generated_interrupt_wakes_another_cpu [KernelIrqchip],
    timer_interrupt [KernelIrqchip],
    timer_ends_a_wait [KernelIrqchip],
    interrupt_by_event [KernelIrqchip, Irqfd],
    message_to_a_device [KernelIrqchip],
    message_to_a_frame [KernelIrqchip],
    state_outlives_its_machine [KernelIrqchip],
    state_moves_to_another_machine [KernelIrqchip, SeveralVms],
    impossible_lines [KernelIrqchip],
    no_gic_no_interrupts,
    second_gic_is_refused [KernelIrqchip, SeveralVms],
    write_signals_an_event [Ioevent],
];

const ICC_IAR1: u16 = sys_reg(3, 0, 12, 12, 0);
const ICC_EOIR1: u16 = sys_reg(3, 0, 12, 12, 1);
const ICC_PMR: u16 = sys_reg(3, 0, 4, 6, 0);
const ICC_SRE: u16 = sys_reg(3, 0, 12, 12, 5);
const ICC_IGRPEN1: u16 = sys_reg(3, 0, 12, 12, 7);
const ICC_SGI1R: u16 = sys_reg(3, 0, 12, 11, 5);

const GICD: u64 = Gic::DISTRIBUTOR;
const GICR: u64 = Gic::GICV3_REDISTRIBUTORS;
const PRIVATE: u64 = GICR + 0x1_0000;

/// A shared interrupt that the cases use.
const SPI: u32 = 40;

/// Wakes the redistributor, and lets interrupts of group 1 through: `private` are a bit mask, `shared` INTIDs.
fn gic_on(a: &mut Assembler, private: u32, shared: &[u32]) {
    a.mov(0, 7);
    a.msr(ICC_SRE, 0);
    a.isb();
    a.poke(GICD, 0x12);
    a.poke(GICR + 0x14, 0);
    a.poke(PRIVATE + 0x80, u32::MAX);
    a.poke(PRIVATE + 0x100, private);
    for intid in shared {
        let word = u64::from(intid / 32) * 4;
        a.poke(GICD + 0x80 + word, u32::MAX);
        a.poke(GICD + 0x100 + word, 1 << (intid % 32));
        a.poke64(GICD + 0x6000 + 8 * u64::from(*intid), 0);
        // Level-triggered: after reset KVM's are not.
        a.poke(GICD + 0xc00 + 4 * u64::from(intid / 16), 0);
    }
    a.mov(0, 0xff);
    a.msr(ICC_PMR, 0);
    a.mov(0, 1);
    a.msr(ICC_IGRPEN1, 0);
    a.isb();
}

/// Makes shared interrupts edge-triggered, all those of a register.
fn edges(a: &mut Assembler, intid: u32) {
    a.poke(GICD + 0xc00 + 4 * u64::from(intid / 16), 0xaaaa_aaaa);
}

/// The IRQ vector: acknowledges, reports the INTID, ends it, returns.
fn handler() -> Vec<u8> {
    let mut a = Assembler::new(layout::VECTORS + 0x280);
    a.mrs(17, ICC_IAR1);
    a.report(17);
    a.msr(ICC_EOIR1, 17);
    a.eret();
    a.finish()
}

/// A program on a GICv3. A host that has only a GICv2 fails here: what these cases program is not there.
fn machine(host: &Host, write: impl FnOnce(&mut Assembler)) -> Outcome<Arm> {
    let m = Arm::with_gic(host, write)?;
    if m.vm.gic()?.version != GicVersion::V3 {
        fail!("these cases are written for a GICv3");
    }
    m.ram.write(layout::VECTORS - layout::RAM + 0x280, &handler())?;
    Ok(m)
}

/// Reports 0 when everything is set up, unmasks, waits for ever.
fn wait(a: &mut Assembler) {
    a.report(ZR);
    a.daif_clear(2);
    let again = a.bound();
    a.wfi();
    a.b(again);
}

fn gic_is_described(host: &Host) -> Outcome {
    let m = Arm::with_gic(host, |a| a.report(ZR))?;
    let gic = m.vm.gic()?;
    assert_eq!(gic.distributor, Gic::DISTRIBUTOR);
    assert!(gic.its.is_none_or(|its| its == Gic::ITS));
    Ok(())
}

fn shared_interrupt_wakes_the_guest(host: &Host) -> Outcome {
    let mut m = machine(host, |a| {
        gic_on(a, 0, &[SPI]);
        wait(a);
    })?;
    m.expect_report(0)?;
    for _ in 0..3 {
        m.vm.set_irq_line(spi_line(SPI), true)?;
        m.expect_report(SPI.into())?;
        m.vm.set_irq_line(spi_line(SPI), false)?;
    }
    Ok(())
}

fn masked_interrupt_waits(host: &Host) -> Outcome {
    let mut m = machine(host, |a| {
        gic_on(a, 0, &[SPI]);
        a.report(ZR);
        a.nop();
        a.mov(5, 1);
        a.report(5);
        a.daif_clear(2);
        a.nop();
        a.mov(5, 2);
        a.report(5);
    })?;
    m.expect_report(0)?;
    m.vm.set_irq_line(spi_line(SPI), true)?;
    m.expect_report(1)?;
    m.expect_report(SPI.into())?;
    m.vm.set_irq_line(spi_line(SPI), false)?;
    m.expect_report(2)
}

fn level_is_delivered_again_until_lowered(host: &Host) -> Outcome {
    let mut m = machine(host, |a| {
        gic_on(a, 0, &[SPI]);
        wait(a);
    })?;
    m.expect_report(0)?;
    m.vm.set_irq_line(spi_line(SPI), true)?;
    for _ in 0..3 {
        m.expect_report(SPI.into())?;
    }
    m.vm.set_irq_line(spi_line(SPI), false)?;
    m.vm.set_irq_line(spi_line(SPI + 1), true)?;
    // Not enabled: nothing more comes until the kick.
    let kick = m.vcpu.kick_handle()?;
    kick.kick();
    assert_eq!(m.vcpu.run()?, VcpuExit::Interrupt);
    Ok(())
}

fn private_interrupt(host: &Host) -> Outcome {
    const INTID: u32 = 20;
    let mut m = machine(host, |a| {
        gic_on(a, 1 << INTID, &[]);
        wait(a);
    })?;
    m.expect_report(0)?;
    m.vm.set_irq_line(ppi_line(0, INTID), true)?;
    m.expect_report(INTID.into())?;
    Ok(m.vm.set_irq_line(ppi_line(0, INTID), false)?)
}

fn edge_is_delivered_once(host: &Host) -> Outcome {
    let mut m = machine(host, |a| {
        gic_on(a, 0, &[SPI]);
        edges(a, SPI);
        wait(a);
    })?;
    m.expect_report(0)?;
    for _ in 0..3 {
        m.vm.set_irq_line(spi_line(SPI), false)?;
        m.vm.set_irq_line(spi_line(SPI), true)?;
        m.expect_report(SPI.into())?;
    }
    // The line is still up.
    m.vcpu.kick_handle()?.kick();
    assert_eq!(m.vcpu.run()?, VcpuExit::Interrupt);
    Ok(())
}

fn generated_interrupt(host: &Host) -> Outcome {
    const SGI: u64 = 3;
    let mut m = machine(host, |a| {
        gic_on(a, 1 << SGI, &[]);
        a.daif_clear(2);
        for _ in 0..2 {
            a.mov(5, SGI << 24 | 1);
            a.msr(ICC_SGI1R, 5);
            a.isb();
            let again = a.bound();
            // The handler counts.
            a.cbz(6, again);
            a.mov(6, 0);
        }
        a.report(ZR);
    })?;
    let mut counting = Assembler::new(layout::VECTORS + 0x280);
    counting.mrs(17, ICC_IAR1);
    counting.add(6, 6, 1);
    counting.report(17);
    counting.msr(ICC_EOIR1, 17);
    counting.eret();
    m.ram.write(layout::VECTORS - layout::RAM + 0x280, &counting.finish())?;
    m.expect_report(SGI)?;
    m.expect_report(SGI)?;
    m.expect_report(0)
}

fn generated_interrupt_wakes_another_cpu(host: &Host) -> Outcome {
    const SGI: u64 = 5;
    let mut m = machine(host, |a| {
        let (entry, off) = (a.label(), a.label());
        gic_on(a, 1 << SGI, &[]);
        a.mov(1, aarch64::affinity(1));
        a.adr(2, entry);
        a.psci(psci::CPU_ON);
        wait(a);
        a.bind(entry);
        a.mov(5, SGI << 24 | 1);
        a.msr(ICC_SGI1R, 5);
        a.isb();
        a.bind(off);
        a.psci(psci::CPU_OFF);
        a.b(off);
    })?;
    let mut other = m.vm.create_vcpu(1)?;
    let kick = other.kick_handle()?;
    host.watch.add(other.kick_handle()?);
    let second = std::thread::spawn(move || other.run());
    m.expect_report(0)?;
    m.expect_report(SGI)?;
    kick.kick();
    assert_eq!(second.join().expect("no panic")?, VcpuExit::Interrupt);
    Ok(())
}

fn timer_interrupt(host: &Host) -> Outcome {
    let mut m = machine(host, |a| {
        gic_on(a, 1 << aarch64::VIRTUAL_TIMER_INTID, &[]);
        a.mrs(0, aarch64::CNTVCT_EL0);
        a.add(0, 0, 4095);
        a.msr(aarch64::CNTV_CVAL_EL0, 0);
        a.mov(0, 1);
        a.msr(aarch64::CNTV_CTL_EL0, 0);
        wait(a);
    })?;
    m.expect_report(0)?;
    m.expect_report(aarch64::VIRTUAL_TIMER_INTID.into())?;
    let timer = m.arm().get_virtual_timer()?;
    assert_eq!(timer.control & 5, 5, "enabled, and its time has come");
    assert!(timer.count >= timer.compare);
    Ok(())
}

/// WFI ends although the CPU masks the interrupt.
fn timer_ends_a_wait(host: &Host) -> Outcome {
    let mut m = machine(host, |a| {
        gic_on(a, 1 << aarch64::VIRTUAL_TIMER_INTID, &[]);
        a.mrs(0, aarch64::CNTVCT_EL0);
        a.add(0, 0, 4095);
        a.msr(aarch64::CNTV_CVAL_EL0, 0);
        a.mov(0, 1);
        a.msr(aarch64::CNTV_CTL_EL0, 0);
        a.isb();
        let again = a.bound();
        a.wfi();
        a.mrs(5, aarch64::CNTV_CTL_EL0);
        a.subs(6, 5, 5);
        a.cbnz(6, again);
        a.report(5);
        // The cause goes before the interrupt is let through.
        a.msr(aarch64::CNTV_CTL_EL0, ZR);
        a.isb();
        a.daif_clear(2);
        a.nop();
        a.report(ZR);
    })?;
    m.expect_report(5)?;
    // A GIC may take a moment to see that the line fell.
    loop {
        match m.report()? {
            0 => return Ok(()),
            1023 => {}
            intid if intid == u64::from(aarch64::VIRTUAL_TIMER_INTID) => {}
            other => fail!("{other} is not what the timer does"),
        }
    }
}

fn interrupt_by_event(host: &Host) -> Outcome {
    let mut m = machine(host, |a| {
        gic_on(a, 0, &[SPI]);
        // Edge-triggered: an event is a pulse.
        a.poke(GICD + 0xc00 + 4 * u64::from(SPI / 16), 2 << (2 * (SPI % 16)));
        wait(a);
    })?;
    m.expect_report(0)?;
    let event = HostEvent::new()?;
    m.vm.register_irqfd(&event, spi_line(SPI), None)?;
    for _ in 0..3 {
        event.signal()?;
        m.expect_report(SPI.into())?;
    }
    m.vm.unregister_irqfd(&event, spi_line(SPI))?;
    event.signal()?;
    let kick = m.vcpu.kick_handle()?;
    kick.kick();
    assert_eq!(m.vcpu.run()?, VcpuExit::Interrupt);
    Ok(())
}

/// A message through the translation service: the guest gives it its tables and maps one event to LPI 8192.
fn message_to_a_device(host: &Host) -> Outcome {
    const LPI: u32 = 8192;
    const DEVICE: u32 = 5;
    const EVENT: u32 = 3;
    const COMMANDS: u64 = layout::RAM + 0x11_0000;
    const DEVICES: u64 = layout::RAM + 0x12_0000;
    const COLLECTIONS: u64 = layout::RAM + 0x13_0000;
    const TRANSLATIONS: u64 = layout::RAM + 0x14_0000;
    const PROPERTIES: u64 = layout::RAM + 0x15_0000;
    const PENDING: u64 = layout::RAM + 0x16_0000;
    const VALID: u64 = 1 << 63;
    let its = Gic::ITS;
    let mut m = machine(host, |a| {
        gic_on(a, 0, &[]);
        // LPIs: 14 bits of INTID, one byte of properties each; then on.
        a.poke64(GICR + 0x70, PROPERTIES | 13);
        a.poke64(GICR + 0x78, PENDING | 1 << 62);
        a.poke(GICR, 1);
        a.poke64(its + 0x80, VALID | COMMANDS);
        a.poke64(its + 0x100, VALID | DEVICES);
        a.poke64(its + 0x108, VALID | COLLECTIONS);
        a.poke(its, 1);
        // Four commands stand in the queue.
        a.poke64(its + 0x88, 4 * 32);
        wait(a);
    })?;
    if m.vm.gic()?.its.is_none() {
        let message = MsiMessage { address: its + Gic::ITS_TRANSLATER, data: EVENT, device_id: Some(DEVICE) };
        assert!(m.vm.signal_msi(message).is_err());
        return Ok(());
    }
    // MAPD, MAPC to redistributor 0, MAPTI, INV (IHI 0069, 5.3).
    let device = u64::from(DEVICE) << 32;
    let commands = [
        [device | 8, 4, VALID | TRANSLATIONS, 0],
        [9, 0, VALID, 0],
        [device | 10, u64::from(LPI) << 32 | u64::from(EVENT), 0, 0],
        [device | 12, EVENT.into(), 0, 0],
    ];
    for (n, command) in commands.iter().flatten().enumerate() {
        let at = COMMANDS - layout::RAM + 8 * n as u64;
        m.ram.write(at, &command.to_le_bytes())?;
    }
    // Priority 0xa0, enabled, for the first LPI.
    m.ram.write(PROPERTIES - layout::RAM, &[0xa1])?;
    m.expect_report(0)?;
    let message = MsiMessage { address: its + Gic::ITS_TRANSLATER, data: EVENT, device_id: Some(DEVICE) };
    for _ in 0..2 {
        m.vm.signal_msi(message)?;
        m.expect_report(LPI.into())?;
    }
    Ok(())
}

/// A message to the frame that makes a shared interrupt of it: the VMM's, and one of the guest's own.
fn message_to_a_frame(host: &Host) -> Outcome {
    let first = Gic::INTERRUPTS;
    let mut m = machine(host, |a| {
        gic_on(a, 0, &[first, first + 1]);
        edges(a, first);
        a.report(ZR);
        a.poke(Gic::MSI_FRAME + MsiFrame::DOORBELL, first + 1);
        wait(a);
    })?;
    let message = |data| MsiMessage { address: Gic::MSI_FRAME + MsiFrame::DOORBELL, data, device_id: None };
    let Some(frame) = m.vm.gic()?.msi_frame else {
        assert!(m.vm.signal_msi(message(first)).is_err());
        return Ok(());
    };
    assert_eq!((frame.address, frame.first), (Gic::MSI_FRAME, first));
    assert!(frame.count > 1);
    m.expect_report(0)?;
    m.expect_report(0)?;
    m.expect_report((first + 1).into())?;
    for intid in [first, first + 1, first] {
        m.vm.signal_msi(message(intid))?;
        m.expect_report(intid.into())?;
    }
    for (address, data) in [(0, first), (8, first - 1), (8, first + frame.count), (8, u32::MAX)] {
        let address = frame.address + MsiFrame::DOORBELL - 8 + address;
        let wrong = MsiMessage { address, data, device_id: None };
        assert!(m.vm.signal_msi(wrong).is_err(), "{wrong:x?}");
    }
    Ok(())
}

/// The state of the GIC; `None` on a platform that keeps it to itself, and then takes none either.
fn saved(m: &mut Arm) -> Outcome<Option<GicState>> {
    match m.vm.get_gic_state() {
        Err(error) if error.is_absent() => {
            assert!(m.vm.set_gic_state(&GicState::default()).is_err_and(|error| error.is_absent()));
            Ok(None)
        }
        state => Ok(Some(state?)),
    }
}

/// As below, where there is one machine at a time. The level line is up when the state is taken; it belongs to the state.
fn state_outlives_its_machine(host: &Host) -> Outcome {
    const PRIORITY_MASK: u64 = 0xa0;
    let write = |a: &mut Assembler| {
        gic_on(a, 0, &[SPI, SPI + 1]);
        a.mov(0, PRIORITY_MASK);
        a.msr(ICC_PMR, 0);
        a.report(ZR);
        a.mrs(5, ICC_PMR);
        a.report(5);
        wait(a);
    };
    let mut m = machine(host, write)?;
    m.expect_report(0)?;
    m.vm.set_irq_line(spi_line(SPI), true)?;
    assert_eq!(m.vcpu.quiesce()?, VcpuExit::Interrupt);
    let Some(gic) = saved(&mut m)? else {
        return Ok(());
    };
    let registers = m.arm().save_registers()?;
    let mut ram = vec![0; layout::RAM_SIZE as usize];
    m.ram.read(0, &mut ram)?;
    drop(m);

    let mut next = machine(host, |a| a.report(ZR))?;
    next.ram.write(0, &ram)?;
    next.arm().restore_registers(&registers)?;
    next.vm.set_gic_state(&gic)?;
    next.expect_report(PRIORITY_MASK)?;
    next.expect_report(0)?;
    next.expect_report(SPI.into())?;
    next.vm.set_irq_line(spi_line(SPI), false)?;
    next.vm.set_irq_line(spi_line(SPI + 1), true)?;
    next.expect_report((SPI + 1).into())?;
    Ok(())
}

/// A pending interrupt, its configuration and the CPU interface go along.
fn state_moves_to_another_machine(host: &Host) -> Outcome {
    let write = |a: &mut Assembler| {
        gic_on(a, 0, &[SPI, SPI + 40]);
        wait(a);
    };
    let mut m = machine(host, write)?;
    let mut second = m.vm.create_vcpu(1)?;
    m.expect_report(0)?;
    m.vm.set_irq_line(spi_line(SPI), true)?;
    assert_eq!(m.vcpu.quiesce()?, VcpuExit::Interrupt);
    let Some(gic) = saved(&mut m)? else {
        return Ok(());
    };
    let registers = m.arm().save_registers()?;
    let others = second.as_aarch64().expect("aarch64").save_registers()?;

    let mut next = machine(host, write)?;
    let mut next_second = next.vm.create_vcpu(1)?;
    prepare(&mut *next_second)?;
    let mut page = vec![0; layout::RAM_SIZE as usize];
    m.ram.read(0, &mut page)?;
    next.ram.write(0, &page)?;
    next.arm().restore_registers(&registers)?;
    next_second.as_aarch64().expect("aarch64").restore_registers(&others)?;
    next.vm.set_gic_state(&gic)?;
    let back = next.vm.get_gic_state()?;
    for (restored, saved) in back.registers.iter().zip(&gic.registers) {
        // An ITS that nobody set up chooses its own attributes for a command queue that is not there.
        if (saved.part, saved.register) != (GicPart::Its, 0x80) {
            assert_eq!(restored, saved);
        }
    }
    assert_eq!(back.registers.len(), gic.registers.len());
    let line = GicPart::Lines { affinity: 0 };
    assert!(gic.registers.iter().any(|r| r.part == line && r.register == 32 && r.value == 1 << (SPI - 32)));
    // The line was up, and the guest was about to unmask.
    next.expect_report(SPI.into())?;
    next.vm.set_irq_line(spi_line(SPI), false)?;
    next.vm.set_irq_line(spi_line(SPI + 40), true)?;
    next.expect_report((SPI + 40).into())
}

fn impossible_lines(host: &Host) -> Outcome {
    let m = Arm::with_gic(host, |a| a.report(ZR))?;
    for line in [224, 1000, ppi_line(0, 3), ppi_line(0, 40), ppi_line(7, 20)] {
        assert!(m.vm.set_irq_line(line, true).is_err(), "{line:#x}");
    }
    Ok(())
}

fn no_gic_no_interrupts(host: &Host) -> Outcome {
    let mut m = Arm::new(host, |a| a.report(ZR))?;
    assert!(m.vm.irq_handle().is_err_and(|error| error.is_absent()));
    assert!(m.vm.gic().is_err_and(|error| error.is_absent()));
    assert!(m.vm.get_gic_state().is_err_and(|error| error.is_absent()));
    m.expect_report(0)
}

fn second_gic_is_refused(host: &Host) -> Outcome {
    let mut m = Arm::with_gic(host, |a| a.report(ZR))?;
    assert!(m.vm.create_irqchip(vm_accel::IrqChip::Kernel).is_err());
    let mut vm = host.vm()?;
    assert!(vm.create_irqchip(vm_accel::IrqChip::Split).is_err());
    let mut regs = m.vcpu.get_regs()?;
    regs.flags = PSTATE_EL1H_MASKED;
    m.vcpu.set_regs(&regs)?;
    m.expect_report(0)
}

fn write_signals_an_event(host: &Host) -> Outcome {
    let mut m = Arm::new(host, |a| {
        a.mov(1, layout::DEVICE);
        a.mov(2, 7);
        a.store(4, 2, 1, Offset(0));
        a.store(4, ZR, 1, Offset(0));
        a.report(ZR);
    })?;
    let event = HostEvent::new()?;
    let on = IoEventMatch { address: IoAddress::Mmio(layout::DEVICE), size: 4, value: Some(7) };
    m.vm.register_ioevent(&event, on)?;
    assert!(m.vm.register_ioevent(&event, on).is_err(), "twice");
    // Another value exits.
    m.expect_write(layout::DEVICE, &[0; 4])?;
    poll(host, "the event", || event.try_take().is_ok_and(|seen| seen.is_some()))?;
    m.vm.unregister_ioevent(&event, on)?;
    m.expect_report(0)
}
