//! The rules of the manual's APIC chapter, one test each.

use super::*;

const T0: Now = Now { ns: 1_000, tsc: 5_000 };

fn at(ns: u64) -> Now {
    Now { ns, tsc: 5_000 + ns }
}

/// An xAPIC with ID 3, enabled by software.
fn xapic() -> Apic {
    let mut apic = Apic::new(3, false, Features::default());
    write(&mut apic, SVR, 0x1ff);
    apic
}

fn x2apic() -> Apic {
    let mut apic = Apic::new(0x123, false, Features::default());
    assert_eq!(apic.write_msr(MSR_APIC_BASE, DEFAULT_BASE | BASE_ENABLE | BASE_X2APIC, T0), Ok(Outcome::None));
    assert_eq!(wrmsr(&mut apic, SVR, 0x1ff), Ok(Outcome::None));
    apic
}

fn write(apic: &mut Apic, index: usize, value: u32) {
    assert_eq!(write_at(apic, index, value, T0), Outcome::None);
}

fn write_at(apic: &mut Apic, index: usize, value: u32, now: Now) -> Outcome {
    apic.write_mmio(index as u64 * 16, &value.to_le_bytes(), now)
}

fn read(apic: &mut Apic, index: usize) -> u32 {
    read_at(apic, index, T0)
}

fn read_at(apic: &mut Apic, index: usize, now: Now) -> u32 {
    let mut data = [0; 4];
    apic.read_mmio(index as u64 * 16, &mut data, now);
    u32::from_le_bytes(data)
}

fn wrmsr(apic: &mut Apic, index: usize, value: u64) -> Result<Outcome, AccessFault> {
    apic.write_msr(MSR_X2APIC + index as u32, value, T0)
}

fn rdmsr(apic: &mut Apic, index: usize) -> Result<u64, AccessFault> {
    apic.read_msr(MSR_X2APIC + index as u32, T0)
}

fn fixed(vector: u8, level: bool) -> Message {
    Message { destination: Destination::Physical(3), mode: DeliveryMode::Fixed, vector, level }
}

#[test]
fn power_up_state_is_that_of_the_manual() {
    let mut apic = Apic::new(3, true, Features::default());
    assert_eq!(apic.base(), 0xfee0_0900);
    assert_eq!(apic.mmio_base(), Some(0xfee0_0000));
    assert_eq!(read(&mut apic, ID), 3 << 24);
    assert_eq!(read(&mut apic, VERSION), 0x0005_0014);
    assert_eq!(read(&mut apic, DFR), 0xffff_ffff);
    assert_eq!(read(&mut apic, SVR), 0xff);
    for entry in register::LVTS {
        assert_eq!(read(&mut apic, entry), 0x0001_0000);
    }
    for index in [TPR, PPR, LDR, ICR, ICR_HIGH, ESR, TIMER_INITIAL, TIMER_CURRENT, DIVIDE] {
        assert_eq!(read(&mut apic, index), 0, "register {index:#x}");
    }
    assert_eq!(apic.next_deadline(), None);
}

#[test]
fn interrupts_come_by_priority_class_and_nest() {
    let mut apic = xapic();
    for vector in [0x31, 0x45, 0x42] {
        assert_eq!(apic.accept(&fixed(vector, false)), Reception::Interrupt);
    }
    assert_eq!(apic.acknowledge(), Some(0x45));
    assert_eq!(apic.processor_priority(), 0x40);
    // The same class waits, whatever its sub-class.
    assert_eq!(apic.pending(), None);
    assert_eq!(apic.accept(&fixed(0x50, false)), Reception::Interrupt);
    assert_eq!(apic.acknowledge(), Some(0x50));
    write(&mut apic, EOI, 0);
    assert_eq!(apic.pending(), None);
    write(&mut apic, EOI, 0);
    assert_eq!(apic.acknowledge(), Some(0x42));
    write(&mut apic, EOI, 0);
    assert_eq!(apic.acknowledge(), Some(0x31));
    write(&mut apic, EOI, 0);
    assert_eq!(apic.pending(), None);
    write(&mut apic, EOI, 0);
}

#[test]
fn task_priority_holds_its_class_back_and_is_cr8() {
    let mut apic = xapic();
    assert_eq!(apic.accept(&fixed(0x5f, false)), Reception::Interrupt);
    write(&mut apic, TPR, 0x50);
    assert_eq!((apic.cr8(), apic.pending()), (5, None));
    apic.set_cr8(4);
    assert_eq!(read(&mut apic, TPR), 0x40);
    assert_eq!(apic.pending(), Some(0x5f));
    write(&mut apic, TPR, 0x47);
    assert_eq!(read(&mut apic, PPR), 0x47);
    assert_eq!(apic.cr8(), 4);
}

#[test]
fn priority_is_the_tasks_when_the_classes_are_equal() {
    let mut apic = xapic();
    assert_eq!(apic.accept(&fixed(0x45, false)), Reception::Interrupt);
    assert_eq!(apic.acknowledge(), Some(0x45));
    write(&mut apic, TPR, 0x4c);
    assert_eq!(read(&mut apic, PPR), 0x4c);
    write(&mut apic, TPR, 0x3c);
    assert_eq!(read(&mut apic, PPR), 0x40);
}

#[test]
fn only_a_level_triggered_end_is_broadcast() {
    let features = Features { eoi_suppression: true, ..Features::default() };
    let mut apic = Apic::new(3, false, features);
    write(&mut apic, SVR, 0x1ff);
    for (svr, level, expected) in
        [(0x1ff, false, Outcome::None), (0x1ff, true, Outcome::EndOfInterrupt(0x61)), (0x11ff, true, Outcome::None)]
    {
        write(&mut apic, SVR, svr);
        assert_eq!(apic.accept(&fixed(0x61, level)), Reception::Interrupt);
        assert_eq!(read(&mut apic, TMR + 3) >> 1 & 1, u32::from(level));
        assert_eq!(apic.acknowledge(), Some(0x61));
        assert_eq!(write_at(&mut apic, EOI, 0, T0), expected);
    }
}

#[test]
fn without_the_feature_broadcast_suppression_cannot_be_set() {
    let mut apic = xapic();
    write(&mut apic, SVR, 0x11ff);
    assert_eq!(read(&mut apic, SVR), 0x1ff);
}

#[test]
fn disabled_by_software_it_masks_its_table_and_takes_no_vectors() {
    let mut apic = xapic();
    write(&mut apic, LVT_LINT1, 0x400);
    write(&mut apic, SVR, 0xff);
    assert_eq!(read(&mut apic, LVT_LINT1), 0x1_0400);
    write(&mut apic, LVT_LINT1, 0x400);
    assert_eq!(read(&mut apic, LVT_LINT1), 0x1_0400, "the mask bit cannot be cleared");
    assert_eq!(apic.accept(&fixed(0x50, false)), Reception::Ignored);
    let init = Message { mode: DeliveryMode::Init, ..fixed(0, false) };
    assert_eq!(apic.accept(&init), Reception::Init);
    let start = Message { mode: DeliveryMode::StartUp, ..fixed(0x9a, false) };
    assert_eq!(apic.accept(&start), Reception::StartUp(0x9a));
}

#[test]
fn illegal_vectors_and_registers_show_in_esr_after_a_write() {
    let mut apic = xapic();
    write(&mut apic, LVT_ERROR, 0xfe);
    assert_eq!(write_at(&mut apic, ICR, 0x0000_000f, T0), Outcome::None);
    assert_eq!(apic.accept(&fixed(0xf, false)), Reception::Ignored);
    assert_eq!(read(&mut apic, 0x3f), 0);
    assert_eq!(read(&mut apic, ESR), 0, "ESR is a snapshot");
    write(&mut apic, ESR, 0);
    assert_eq!(read(&mut apic, ESR), 0xe0);
    assert_eq!(apic.acknowledge(), Some(0xfe));
    write(&mut apic, EOI, 0);
    assert_eq!(apic.pending(), None, "one error interrupt until ESR is written");
    write(&mut apic, ESR, 0);
    assert_eq!(read(&mut apic, ESR), 0);
    assert_eq!(apic.accept(&fixed(1, false)), Reception::Ignored);
    assert_eq!(apic.pending(), Some(0xfe));
}

#[test]
fn an_illegal_error_vector_does_not_recurse() {
    let mut apic = xapic();
    write(&mut apic, LVT_ERROR, 0x05);
    assert_eq!(apic.accept(&fixed(2, false)), Reception::Ignored);
    write(&mut apic, ESR, 0);
    assert_eq!(read(&mut apic, ESR), 0x40);
}

#[test]
fn writes_that_are_not_aligned_words_change_nothing() {
    let mut apic = xapic();
    for (offset, data) in [(0x80u64, &[1u8, 2][..]), (0x81, &[1, 2, 3, 4]), (0x84, &[1, 2, 3, 4]), (0x80, &[])] {
        assert_eq!(apic.write_mmio(offset, data, T0), Outcome::None);
    }
    assert_eq!(read(&mut apic, TPR), 0);
    assert_eq!(apic.write_mmio(0x80, &[0x20, 0, 0, 0, 9, 9, 9, 9], T0), Outcome::None);
    let mut data = [0xaa; 8];
    apic.read_mmio(0x80, &mut data, T0);
    assert_eq!(data, [0x20, 0, 0, 0, 0, 0, 0, 0]);
    // Beyond the page nothing panics.
    apic.read_mmio(0xfff, &mut data, T0);
    apic.read_mmio(u64::MAX, &mut data, T0);
    assert_eq!(apic.write_mmio(!15, &[0; 4], T0), Outcome::None);
}

#[test]
fn one_shot_timer_fires_once_after_count_times_divisor() {
    for (divide, divisor) in [(0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (10, 128), (11, 1)] {
        let mut apic = xapic();
        write(&mut apic, DIVIDE, divide);
        write(&mut apic, LVT_TIMER, 0xee);
        write(&mut apic, TIMER_INITIAL, 100);
        let expiry = T0.ns + 100 * divisor;
        assert_eq!(apic.next_deadline(), Some(Deadline::Ns(expiry)));
        assert_eq!(read_at(&mut apic, TIMER_CURRENT, at(T0.ns + 40 * divisor)), 60);
        apic.advance(at(expiry - 1));
        assert_eq!(apic.pending(), None);
        apic.advance(at(expiry));
        assert_eq!(apic.acknowledge(), Some(0xee));
        assert_eq!(apic.next_deadline(), None);
        assert_eq!(read_at(&mut apic, TIMER_CURRENT, at(expiry + 5)), 0);
        assert_eq!(read_at(&mut apic, TIMER_INITIAL, at(expiry + 5)), 100);
    }
}

#[test]
fn periodic_timer_reloads_and_missed_periods_are_one_interrupt() {
    let mut apic = xapic();
    write(&mut apic, DIVIDE, 11);
    write(&mut apic, LVT_TIMER, 0x2_00ee);
    write(&mut apic, TIMER_INITIAL, 1000);
    apic.advance(at(T0.ns + 3500));
    assert_eq!(apic.acknowledge(), Some(0xee));
    write_at_none(&mut apic, EOI, T0.ns + 3500);
    assert_eq!(apic.pending(), None);
    assert_eq!(apic.next_deadline(), Some(Deadline::Ns(T0.ns + 4000)));
    assert_eq!(read_at(&mut apic, TIMER_CURRENT, at(T0.ns + 3600)), 400);
    assert_eq!(write_at(&mut apic, TIMER_INITIAL, 0, at(T0.ns + 3700)), Outcome::None);
    assert_eq!(apic.next_deadline(), None);
}

fn write_at_none(apic: &mut Apic, index: usize, ns: u64) {
    assert_eq!(write_at(apic, index, 0, at(ns)), Outcome::None);
}

#[test]
fn between_one_shot_and_periodic_the_count_goes_on() {
    let mut apic = xapic();
    write(&mut apic, DIVIDE, 11);
    write(&mut apic, LVT_TIMER, 0xee);
    write(&mut apic, TIMER_INITIAL, 1000);
    assert_eq!(write_at(&mut apic, LVT_TIMER, 0x2_00ee, at(T0.ns + 700)), Outcome::None);
    assert_eq!(read_at(&mut apic, TIMER_CURRENT, at(T0.ns + 700)), 300);
    apic.advance(at(T0.ns + 1000));
    assert_eq!(apic.next_deadline(), Some(Deadline::Ns(T0.ns + 2000)));
    assert_eq!(write_at(&mut apic, LVT_TIMER, 0xee, at(T0.ns + 1500)), Outcome::None);
    apic.advance(at(T0.ns + 2000));
    assert_eq!(apic.next_deadline(), None);
}

#[test]
fn a_masked_timer_counts_without_interrupts() {
    let mut apic = xapic();
    write(&mut apic, DIVIDE, 11);
    write(&mut apic, LVT_TIMER, 0x1_00ee);
    write(&mut apic, TIMER_INITIAL, 1000);
    assert_eq!(apic.next_deadline(), None);
    assert_eq!(read_at(&mut apic, TIMER_CURRENT, at(T0.ns + 100)), 900);
    apic.advance(at(T0.ns + 2000));
    assert_eq!(write_at(&mut apic, LVT_TIMER, 0xee, at(T0.ns + 2000)), Outcome::None);
    assert_eq!(apic.pending(), None);
}

#[test]
fn a_new_divisor_keeps_the_count() {
    let mut apic = xapic();
    write(&mut apic, DIVIDE, 11);
    write(&mut apic, LVT_TIMER, 0xee);
    write(&mut apic, TIMER_INITIAL, 1000);
    assert_eq!(write_at(&mut apic, DIVIDE, 0, at(T0.ns + 400)), Outcome::None);
    assert_eq!(apic.next_deadline(), Some(Deadline::Ns(T0.ns + 400 + 600 * 2)));
}

#[test]
fn tsc_deadline_fires_once_and_clears() {
    let mut apic = xapic();
    // Outside its mode the MSR ignores writes and reads as zero.
    assert_eq!(apic.write_msr(MSR_TSC_DEADLINE, 9_000, T0), Ok(Outcome::None));
    assert_eq!(apic.read_msr(MSR_TSC_DEADLINE, T0), Ok(0));
    write(&mut apic, LVT_TIMER, 0x4_00ef);
    write(&mut apic, TIMER_INITIAL, 77);
    assert_eq!(read(&mut apic, TIMER_INITIAL), 0, "the initial count is ignored in this mode");
    assert_eq!(apic.write_msr(MSR_TSC_DEADLINE, 9_000, T0), Ok(Outcome::None));
    assert_eq!(apic.next_deadline(), Some(Deadline::Tsc(9_000)));
    assert_eq!(read(&mut apic, TIMER_CURRENT), 0);
    apic.advance(Now { ns: 0, tsc: 8_999 });
    assert_eq!(apic.pending(), None);
    assert_eq!(apic.read_msr(MSR_TSC_DEADLINE, Now { ns: 0, tsc: 9_000 }), Ok(0));
    assert_eq!(apic.acknowledge(), Some(0xef));
    write(&mut apic, EOI, 0);
    // A deadline in the past fires at once; zero disarms; leaving the mode disarms.
    assert_eq!(apic.write_msr(MSR_TSC_DEADLINE, 1, T0), Ok(Outcome::None));
    assert_eq!(apic.acknowledge(), Some(0xef));
    assert_eq!(apic.write_msr(MSR_TSC_DEADLINE, 9_000, T0), Ok(Outcome::None));
    assert_eq!(apic.write_msr(MSR_TSC_DEADLINE, 0, T0), Ok(Outcome::None));
    assert_eq!(apic.next_deadline(), None);
    assert_eq!(apic.write_msr(MSR_TSC_DEADLINE, 9_000, T0), Ok(Outcome::None));
    write(&mut apic, LVT_TIMER, 0xef);
    assert_eq!(apic.next_deadline(), None);
}

#[test]
fn ipis_become_messages() {
    let mut apic = xapic();
    write(&mut apic, ICR_HIGH, 0x0500_0000);
    let send = |apic: &mut Apic, value| write_at(apic, ICR, value, T0);
    let message = |destination, mode, vector| Message { destination, mode, vector, level: false };
    let to = |shorthand, message| Outcome::Ipi(Ipi { shorthand, message });
    let five = Destination::Physical(5);
    assert_eq!(send(&mut apic, 0x4081), to(Shorthand::None, message(five, DeliveryMode::Fixed, 0x81)));
    assert_eq!(
        send(&mut apic, 0x4981),
        to(Shorthand::None, message(Destination::Logical(5), DeliveryMode::LowestPriority, 0x81))
    );
    assert_eq!(send(&mut apic, 0x4400), to(Shorthand::None, message(five, DeliveryMode::Nmi, 0)));
    assert_eq!(send(&mut apic, 0xc500), to(Shorthand::None, message(five, DeliveryMode::Init, 0)));
    assert_eq!(send(&mut apic, 0x8500), Outcome::None, "INIT level de-assert");
    assert_eq!(send(&mut apic, 0x4699), to(Shorthand::None, message(five, DeliveryMode::StartUp, 0x99)));
    assert_eq!(send(&mut apic, 0x8_4081), to(Shorthand::AllIncludingSelf, message(five, DeliveryMode::Fixed, 0x81)));
    assert_eq!(send(&mut apic, 0xc_4500), to(Shorthand::AllExcludingSelf, message(five, DeliveryMode::Init, 0)));
    assert_eq!(send(&mut apic, 0x4_4081), Outcome::None);
    assert_eq!(apic.acknowledge(), Some(0x81), "the shorthand self needs nobody");
    assert_eq!(send(&mut apic, 0x5081), to(Shorthand::None, message(five, DeliveryMode::Fixed, 0x81)));
    assert_eq!(read(&mut apic, ICR), 0x4081, "delivery status reads as idle");
    write(&mut apic, ICR_HIGH, 0xff00_0000);
    assert_eq!(
        send(&mut apic, 0x4081),
        to(Shorthand::None, message(Destination::Physical(Destination::BROADCAST), DeliveryMode::Fixed, 0x81))
    );
}

#[test]
fn destinations_match_in_each_model() {
    let mut apic = xapic();
    assert!(apic.matches(Destination::Physical(3)) && !apic.matches(Destination::Physical(2)));
    assert!(!apic.matches(Destination::Physical(0x103)), "an xAPIC compares no more than it has");
    write(&mut apic, ID, 0x0900_0000);
    assert!(apic.matches(Destination::Physical(9)));
    assert!(apic.matches(Destination::Physical(Destination::BROADCAST)));
    // Flat.
    write(&mut apic, LDR, 0x0400_0000);
    assert!(apic.matches(Destination::Logical(0x0c)) && !apic.matches(Destination::Logical(0x0b)));
    assert!(apic.matches(Destination::Logical(Destination::BROADCAST)));
    // Cluster 2, second CPU.
    write(&mut apic, DFR, 0x0fff_ffff);
    write(&mut apic, LDR, 0x2200_0000);
    assert!(apic.matches(Destination::Logical(0x23)));
    assert!(!apic.matches(Destination::Logical(0x21)) && !apic.matches(Destination::Logical(0x13)));
    let apic = x2apic();
    assert!(apic.matches(Destination::Physical(0x123)) && !apic.matches(Destination::Physical(0x23)));
    assert!(apic.matches(Destination::Logical(0x12_0008)));
    assert!(!apic.matches(Destination::Logical(0x12_0004)) && !apic.matches(Destination::Logical(0x11_0008)));
    assert!(apic.matches(Destination::Physical(Destination::BROADCAST)));
}

#[test]
fn only_the_transitions_of_the_manual_are_possible() {
    const OFF: u64 = DEFAULT_BASE;
    const XAPIC: u64 = DEFAULT_BASE | BASE_ENABLE;
    const X2APIC: u64 = XAPIC | BASE_X2APIC;
    const INVALID: u64 = DEFAULT_BASE | BASE_X2APIC;
    for (from, to, legal) in [
        (XAPIC, X2APIC, true),
        (XAPIC, OFF, true),
        (XAPIC, INVALID, false),
        (X2APIC, X2APIC, true),
        (X2APIC, OFF, true),
        (X2APIC, XAPIC, false),
        (X2APIC, INVALID, false),
        (OFF, OFF, true),
        (OFF, XAPIC, true),
        (OFF, X2APIC, false),
        (OFF, INVALID, false),
    ] {
        let mut apic = Apic::new(3, false, Features::default());
        apic.restore_base(from).unwrap();
        let result = apic.write_msr(MSR_APIC_BASE, to, T0);
        assert_eq!(result.is_ok(), legal, "{from:#x} to {to:#x}");
        assert_eq!(apic.read_msr(MSR_APIC_BASE, T0), Ok(if legal { to } else { from }));
    }
    let mut apic = Apic::new(3, false, Features::default());
    for reserved in [1, 1 << 9, 1 << 40] {
        assert_eq!(apic.write_msr(MSR_APIC_BASE, XAPIC | reserved, T0), Err(AccessFault));
    }
    let mut old = Apic::new(3, false, Features { x2apic: false, ..Features::default() });
    assert_eq!(old.write_msr(MSR_APIC_BASE, X2APIC, T0), Err(AccessFault));
    assert!(!old.owns_msr(MSR_X2APIC));
}

#[test]
fn disabling_forgets_registers_and_hides_them() {
    let mut apic = xapic();
    write(&mut apic, ID, 0x0900_0000);
    assert_eq!(apic.write_msr(MSR_APIC_BASE, DEFAULT_BASE, T0), Ok(Outcome::None));
    assert_eq!((apic.mmio_base(), apic.is_enabled()), (None, false));
    assert!(apic.accepts_external(), "LINT0 is then the INTR pin");
    apic.set_cr8(9);
    assert_eq!(apic.cr8(), 9, "CR8 works without the APIC");
    apic.set_cr8(0);
    assert_eq!(apic.write_msr(MSR_APIC_BASE, 0xfed4_0000 | BASE_ENABLE, T0), Ok(Outcome::None));
    assert_eq!(apic.mmio_base(), Some(0xfed4_0000));
    assert_eq!(read(&mut apic, ID), 0x0300_0000);
    assert_eq!(read(&mut apic, SVR), 0xff);
}

#[test]
fn x2apic_registers_fault_as_the_manual_lists() {
    let mut apic = x2apic();
    assert_eq!(rdmsr(&mut apic, ID), Ok(0x123));
    assert_eq!(rdmsr(&mut apic, LDR), Ok(0x0012_0008));
    assert_eq!(apic.mmio_base(), None);
    for read_only in [ID, VERSION, LDR, PPR, ISR, TMR, IRR, IRR + 7, TIMER_CURRENT] {
        assert_eq!(wrmsr(&mut apic, read_only, 0), Err(AccessFault), "{read_only:#x}");
        assert!(rdmsr(&mut apic, read_only).is_ok(), "{read_only:#x}");
    }
    for write_only in [EOI, SELF_IPI] {
        assert_eq!(rdmsr(&mut apic, write_only), Err(AccessFault));
    }
    for absent in [0, 1, 4, APR, register::RRD, DFR, 0x29, 0x2f, ICR_HIGH, 0x3a, 0x3d, 0x40, 0xff] {
        assert_eq!(rdmsr(&mut apic, absent), Err(AccessFault), "{absent:#x}");
        assert_eq!(wrmsr(&mut apic, absent, 0), Err(AccessFault), "{absent:#x}");
    }
    for (index, value) in [
        (EOI, 1),
        (ESR, 1),
        (TPR, 0x100),
        (TPR, 1 << 32),
        (SVR, 0x400),
        (SELF_IPI, 0x1ff),
        (DIVIDE, 4),
        (ICR, 1 << 13),
        (ICR, 1 << 20),
        (LVT_ERROR, 0x100),
        (LVT_TIMER, 1 << 19),
        (TIMER_INITIAL, 1 << 32),
    ] {
        assert_eq!(wrmsr(&mut apic, index, value), Err(AccessFault), "{index:#x} {value:#x}");
    }
    assert_eq!(wrmsr(&mut apic, LVT_LINT0, 0x1_f7ff), Ok(Outcome::None), "read-only bits are no fault");
    assert_eq!(rdmsr(&mut apic, LVT_LINT0), Ok(0x1_a7ff));
    // Outside x2APIC mode none of them exists.
    let mut apic = xapic();
    assert_eq!(rdmsr(&mut apic, ID), Err(AccessFault));
    assert_eq!(wrmsr(&mut apic, TPR, 0), Err(AccessFault));
}

#[test]
fn x2apic_sends_with_one_write_of_64_bits() {
    let mut apic = x2apic();
    let message =
        Message { destination: Destination::Physical(0x1_2345), mode: DeliveryMode::Fixed, vector: 0x55, level: false };
    assert_eq!(
        wrmsr(&mut apic, ICR, 0x1_2345_0000_4055),
        Ok(Outcome::Ipi(Ipi { shorthand: Shorthand::None, message }))
    );
    assert_eq!(rdmsr(&mut apic, ICR), Ok(0x1_2345_0000_4055));
    assert_eq!(wrmsr(&mut apic, SELF_IPI, 0x77), Ok(Outcome::None));
    assert_eq!(apic.acknowledge(), Some(0x77));
}

#[test]
fn init_keeps_base_and_identity() {
    let mut apic = xapic();
    write(&mut apic, ID, 0x0700_0000);
    write(&mut apic, TPR, 0x30);
    assert_eq!(apic.accept(&fixed(0x50, false)), Reception::Interrupt);
    apic.init();
    assert_eq!((read(&mut apic, ID), read(&mut apic, TPR), read(&mut apic, SVR)), (0x0700_0000, 0, 0xff));
    assert_eq!(apic.pending(), None);
    let mut apic = x2apic();
    apic.init();
    assert!(apic.is_x2apic());
    assert_eq!(rdmsr(&mut apic, LDR), Ok(0x0012_0008));
    apic.reset();
    assert!(!apic.is_x2apic());
    assert_eq!(read(&mut apic, ID), 0x2300_0000);
}

#[test]
fn virtual_wire_lets_the_pic_and_nmis_through() {
    let mut apic = Apic::new(0, true, Features::default());
    assert!(!apic.accepts_external());
    apic.enter_virtual_wire();
    assert!(apic.accepts_external());
    assert_eq!(apic.set_lint(0, true), Reception::ExtInt);
    assert_eq!(apic.set_lint(1, true), Reception::Nmi);
    assert_eq!(apic.set_lint(1, true), Reception::Ignored, "only the edge");
    assert_eq!(apic.set_lint(2, true), Reception::Ignored);
    write(&mut apic, LVT_LINT0, 0x1_0700);
    assert!(!apic.accepts_external());
}

#[test]
fn a_level_on_lint0_comes_again_after_its_end() {
    let mut apic = xapic();
    write(&mut apic, LVT_LINT0, 0x8071);
    assert_eq!(apic.set_lint(0, true), Reception::Interrupt);
    assert_eq!(read(&mut apic, LVT_LINT0), 0xc071);
    assert_eq!(apic.acknowledge(), Some(0x71));
    assert_eq!(write_at(&mut apic, EOI, 0, T0), Outcome::EndOfInterrupt(0x71));
    assert_eq!(apic.acknowledge(), Some(0x71));
    assert_eq!(apic.set_lint(0, false), Reception::Ignored);
    assert_eq!(write_at(&mut apic, EOI, 0, T0), Outcome::EndOfInterrupt(0x71));
    assert_eq!((apic.pending(), read(&mut apic, LVT_LINT0)), (None, 0x8071));
}

#[test]
fn a_counter_interrupt_masks_its_entry() {
    let mut apic = xapic();
    write(&mut apic, LVT_PERFORMANCE, 0x400);
    assert_eq!(apic.performance_interrupt(), Reception::Nmi);
    assert_eq!(read(&mut apic, LVT_PERFORMANCE), 0x1_0400);
    assert_eq!(apic.performance_interrupt(), Reception::Ignored);
    write(&mut apic, LVT_THERMAL, 0x99);
    assert_eq!(apic.thermal_interrupt(), Reception::Interrupt);
    assert_eq!(apic.pending(), Some(0x99));
}

#[test]
fn msi_fields_are_where_the_manual_has_them() {
    assert_eq!(
        Message::from_msi(0xfee0_5004, 0x8141),
        Message { destination: Destination::Logical(5), mode: DeliveryMode::LowestPriority, vector: 0x41, level: true }
    );
    assert_eq!(Message::from_msi(0xfeef_f000, 0).destination, Destination::Physical(Destination::BROADCAST));
    for bits in 0..8 {
        assert_eq!(DeliveryMode::from_bits(bits).bits(), bits);
    }
}

#[test]
fn a_saved_page_restores_everything_and_the_timer_goes_on() {
    let mut apic = xapic();
    write(&mut apic, DIVIDE, 11);
    write(&mut apic, LVT_TIMER, 0x2_00ee);
    write(&mut apic, TIMER_INITIAL, 1000);
    write(&mut apic, TPR, 0x21);
    assert_eq!(apic.accept(&fixed(0x50, true)), Reception::Interrupt);
    assert_eq!(apic.accept(&fixed(0x60, false)), Reception::Interrupt);
    assert_eq!(apic.acknowledge(), Some(0x60));
    let page = apic.page(at(T0.ns + 400));
    assert_eq!(page[0x390], 0x58, "current count 600");
    let mut other = Apic::new(3, false, Features::default());
    other.restore_base(apic.base()).unwrap();
    other.set_page(&page, at(50_000));
    assert_eq!(other.next_deadline(), Some(Deadline::Ns(50_600)));
    assert_eq!(other.page(at(50_000)), page);
    assert_eq!(write_at(&mut other, EOI, 0, at(50_000)), Outcome::None);
    assert_eq!(other.acknowledge(), Some(0x50));
    assert_eq!(write_at(&mut other, EOI, 0, at(50_000)), Outcome::EndOfInterrupt(0x50));
}

#[test]
fn a_page_of_ones_leaves_no_impossible_state() {
    for mut apic in [xapic(), x2apic()] {
        apic.set_page(&[0xff; 1024], T0);
        assert_eq!(apic.regs[VERSION], 0x0005_0014);
        assert_eq!(apic.regs[ISR] & 0xffff, 0);
        let _ = apic.page(T0);
        for ns in 0..2_000 {
            apic.advance(at(ns * 1_000_000_000));
            let _ = apic.acknowledge();
        }
        let _ = apic.page(Now { ns: u64::MAX, tsc: u64::MAX });
    }
}

/// No sequence of accesses may panic, and what is pending is never at or below the processor's priority.
#[test]
fn random_accesses_never_break_an_invariant() {
    let mut seed = 1u64;
    let mut random = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    for mut apic in [xapic(), x2apic()] {
        for _ in 0..200_000 {
            let (what, value, time) = (random(), random(), random());
            let now = Now { ns: if time % 50 == 0 { u64::MAX } else { time % 100_000 }, tsc: time >> (time % 64) };
            let _ = match what % 6 {
                0 => apic.write_mmio(what >> 8 & 0xfff, &value.to_le_bytes()[..(value % 9) as usize], now),
                1 => write_at(&mut apic, (what >> 8) as usize % 64, value as u32, now),
                2 => apic
                    .write_msr(MSR_X2APIC + (what >> 8 & 0x3f) as u32, value >> (what >> 16 & 63), now)
                    .unwrap_or(Outcome::None),
                3 => {
                    let _ = apic.accept(&Message::from_msi(what, value as u32));
                    let _ = apic.set_lint((what >> 8 & 3) as usize, what & 1 << 20 != 0);
                    Outcome::None
                }
                4 => apic.write_msr(MSR_TSC_DEADLINE, value, now).unwrap_or(Outcome::None),
                _ => {
                    apic.advance(now);
                    Outcome::None
                }
            };
            let _ = apic.next_deadline();
            if let Some(vector) = apic.pending() {
                assert!(vector >> 4 > apic.processor_priority() >> 4 && vector >= 16);
                if what & 1 << 40 != 0 {
                    assert_eq!(apic.acknowledge(), Some(vector));
                }
            }
            let _ = read_at(&mut apic, (what >> 24) as usize % 70, now);
        }
    }
}
