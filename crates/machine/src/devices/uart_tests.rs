//! Tests of the UART: registers, interrupts, input, and the same accesses on it and on vm-superio's.

use super::*;
use crate::irq::CountingLine;

#[derive(Clone, Default)]
struct Sink(Arc<Mutex<Vec<u8>>>);

impl Write for Sink {
    fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
        lock(&self.0).extend_from_slice(buf);
        Ok(buf.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Sink {
    fn taken(&self) -> Vec<u8> {
        std::mem::take(&mut lock(&self.0))
    }
}

fn uart() -> (Uart, Arc<CountingLine>, Sink) {
    let (line, sink) = (Arc::new(CountingLine::default()), Sink::default());
    let uart = Uart::new(Box::new(sink.clone()), IrqPin::new(line.clone()), |e| panic!("{e}"));
    (uart, line, sink)
}

fn set(uart: &mut Uart, register: u64, value: u8) {
    uart.write(register, &[value]);
}

fn get(uart: &mut Uart, register: u64) -> u8 {
    let mut byte = [0];
    uart.read(register, &mut byte);
    byte[0]
}

/// As a driver leaves it: FIFOs on with trigger level 8, receive interrupt, DTR, RTS, OUT2.
fn opened() -> (Uart, Arc<CountingLine>, Sink) {
    let (mut u, line, sink) = uart();
    set(&mut u, reg::IIR_FCR, 0x81);
    set(&mut u, reg::MCR, MCR_DTR | MCR_RTS | MCR_OUT2);
    set(&mut u, reg::IER, ier::RECEIVED);
    (u, line, sink)
}

#[test]
fn output_reaches_the_sink_and_the_transmitter_is_always_empty() {
    let (mut u, _, sink) = uart();
    for &byte in b"hello" {
        assert_eq!(get(&mut u, reg::LSR), 0x60);
        set(&mut u, reg::DATA, byte);
    }
    assert_eq!(sink.taken(), b"hello");
}

#[test]
fn divisor_latch_hides_data_and_interrupt_enable() {
    let (mut u, _, sink) = uart();
    set(&mut u, reg::IER, 0x05);
    set(&mut u, reg::LCR, 0x83);
    assert_eq!((get(&mut u, reg::DATA), get(&mut u, reg::IER)), (12, 0));
    set(&mut u, reg::DATA, 0x34);
    set(&mut u, reg::IER, 0x12);
    assert_eq!((get(&mut u, reg::DATA), get(&mut u, reg::IER)), (0x34, 0x12));
    set(&mut u, reg::LCR, 0x03);
    assert_eq!(get(&mut u, reg::IER), 0x05);
    assert_eq!(get(&mut u, reg::LCR), 0x03);
    assert!(sink.taken().is_empty());
}

#[test]
fn scratch_keeps_and_reserved_bits_read_zero() {
    let (mut u, _, _) = uart();
    set(&mut u, reg::SCR, 0xa5);
    set(&mut u, reg::IER, 0xf0);
    set(&mut u, reg::MCR, 0xe0);
    assert_eq!((get(&mut u, reg::SCR), get(&mut u, reg::IER), get(&mut u, reg::MCR)), (0xa5, 0, 0));
    assert_eq!(get(&mut u, reg::IIR_FCR), 0x01);
    set(&mut u, reg::IIR_FCR, 0x01);
    assert_eq!(get(&mut u, reg::IIR_FCR), 0xc1);
}

#[test]
fn thr_empty_is_an_edge_at_enabling_and_at_each_byte() {
    let (mut u, line, _) = uart();
    set(&mut u, reg::IER, ier::THR_EMPTY);
    assert_eq!(line.edges(), 1);
    assert_eq!(get(&mut u, reg::IIR_FCR), 0x02);
    assert!(!line.is_asserted(), "reading IIR took it back");
    assert_eq!(get(&mut u, reg::IIR_FCR), 0x01);
    set(&mut u, reg::IER, ier::THR_EMPTY);
    assert_eq!(line.edges(), 1, "it was enabled already");
    for n in 2..10 {
        set(&mut u, reg::DATA, b'x');
        assert_eq!(line.edges(), n, "the pin fell and rose again without IIR being read");
    }
    set(&mut u, reg::IER, 0);
    assert!(!line.is_asserted());
}

#[test]
fn interrupt_sources_come_in_order_of_priority() {
    let (mut u, line, _) = uart();
    set(&mut u, reg::MCR, MCR_LOOP);
    set(&mut u, reg::DATA, 1);
    set(&mut u, reg::DATA, 2); // no FIFO: overruns
    set(&mut u, reg::MCR, MCR_LOOP | MCR_DTR);
    set(&mut u, reg::IER, 0x0f);
    assert_eq!(get(&mut u, reg::IIR_FCR), iir::LINE_STATUS);
    assert_eq!(get(&mut u, reg::LSR), 0x63);
    assert_eq!(get(&mut u, reg::IIR_FCR), iir::RECEIVED);
    assert_eq!(get(&mut u, reg::DATA), 2);
    assert_eq!(get(&mut u, reg::IIR_FCR), iir::THR_EMPTY);
    assert_eq!(get(&mut u, reg::IIR_FCR), iir::MODEM_STATUS);
    assert!(line.is_asserted());
    assert_ne!(get(&mut u, reg::MSR) & 0x0f, 0);
    assert_eq!(get(&mut u, reg::IIR_FCR), iir::NONE);
    assert!(!line.is_asserted());
}

#[test]
fn trigger_level_and_timeout_have_their_own_identities() {
    let (mut u, _, _) = opened();
    assert_eq!(u.receive(b"1234567"), 7);
    assert_eq!(get(&mut u, reg::IIR_FCR), 0xcc);
    assert_eq!(u.receive(b"8"), 1);
    assert_eq!(get(&mut u, reg::IIR_FCR), 0xc4);
    assert_eq!(get(&mut u, reg::DATA), b'1');
    assert_eq!(get(&mut u, reg::IIR_FCR), 0xcc);
}

#[test]
fn loop_back_wires_modem_outputs_to_inputs() {
    let (mut u, _, sink) = uart();
    assert_eq!(get(&mut u, reg::MSR), 0xb0);
    for (mcr, inputs) in [(0x10, 0x00), (0x12, 0x10), (0x11, 0x20), (0x14, 0x40), (0x18, 0x80), (0x1f, 0xf0)] {
        set(&mut u, reg::MCR, mcr);
        assert_eq!(get(&mut u, reg::MSR) & 0xf0, inputs);
    }
    set(&mut u, reg::MCR, 0x1f);
    get(&mut u, reg::MSR);
    set(&mut u, reg::MCR, 0x1b); // ring ends: the trailing edge counts
    assert_eq!(get(&mut u, reg::MSR), 0xb4);
    set(&mut u, reg::MCR, 0x1f); // ring begins: it does not
    assert_eq!(get(&mut u, reg::MSR), 0xf0);
    set(&mut u, reg::DATA, 0x5a);
    assert_eq!(get(&mut u, reg::DATA), 0x5a);
    assert!(sink.taken().is_empty(), "a looped byte stays inside");
    set(&mut u, reg::MCR, 0);
    assert_eq!(get(&mut u, reg::MSR) & 0xf0, 0xb0);
}

#[test]
fn host_input_waits_out_a_loop_back_test_and_a_fifo_reset() {
    let (mut u, _, _) = uart();
    assert_eq!(u.receive(b"typed early"), 11);
    // What a driver does before it opens the port.
    set(&mut u, reg::MCR, 0x1a);
    set(&mut u, reg::IIR_FCR, 0x07);
    set(&mut u, reg::IIR_FCR, 0x00);
    set(&mut u, reg::MCR, 0x00);
    for register in [reg::LSR, reg::DATA, reg::IIR_FCR, reg::MSR] {
        get(&mut u, register);
    }
    set(&mut u, reg::IIR_FCR, 0x01);
    set(&mut u, reg::MCR, 0x0b);
    let mut got = Vec::new();
    while get(&mut u, reg::LSR) & 1 != 0 {
        got.push(get(&mut u, reg::DATA));
    }
    assert_eq!(got, b"typed early");
}

#[test]
fn a_guest_that_only_polls_gets_its_input() {
    let (mut u, _, _) = uart();
    assert_eq!(u.receive(b"ab"), 2);
    let mut got = Vec::new();
    for _ in 0..100 {
        if get(&mut u, reg::LSR) & 1 != 0 {
            got.push(get(&mut u, reg::DATA));
        }
    }
    assert_eq!(got, b"ab");
}

#[test]
fn a_console_that_masks_interrupts_while_it_prints_loses_no_input() {
    // The Linux 8250 console saves IER, writes 0, prints by polling, restores IER. Input that arrives
    // meanwhile must raise the interrupt afterwards: as a new edge, for the line is edge-triggered.
    let (mut u, line, _) = opened();
    set(&mut u, reg::IER, 0);
    assert_eq!(u.receive(b"in between"), 10);
    for &byte in b"printk" {
        get(&mut u, reg::LSR);
        set(&mut u, reg::DATA, byte);
    }
    assert_eq!(line.edges(), 0);
    set(&mut u, reg::IER, ier::RECEIVED);
    assert_eq!(line.edges(), 1);
    assert!(line.is_asserted());
    // Input that was announced before printk masked it is announced again.
    set(&mut u, reg::IER, 0);
    assert!(!line.is_asserted());
    set(&mut u, reg::IER, ier::RECEIVED);
    assert_eq!(line.edges(), 2);
    let mut got = Vec::new();
    while get(&mut u, reg::IIR_FCR) & 0x0f != iir::NONE {
        got.push(get(&mut u, reg::DATA));
    }
    assert_eq!(got, b"in between");
    assert!(!line.is_asserted());
}

#[test]
fn input_is_bounded_and_none_is_lost() {
    let (u, _, _) = opened();
    let uart = Arc::new(Mutex::new(u));
    let input = UartInput::new(uart.clone());
    let sent: Vec<u8> = (0..3 * INPUT_QUEUE).map(|i| (i * 7 + i / 251) as u8).collect();
    let sender = std::thread::spawn({
        let (input, sent) = (input.clone(), sent.clone());
        move || input.send(&sent)
    });
    let mut got = Vec::new();
    while got.len() < sent.len() {
        let mut u = lock(&uart);
        assert!(u.queue.len() <= INPUT_QUEUE && u.fifo.len() <= FIFO);
        if get(&mut u, reg::LSR) & 1 != 0 {
            got.push(get(&mut u, reg::DATA));
        } else {
            drop(u);
            std::thread::yield_now();
        }
    }
    assert_eq!(sender.join().unwrap(), Ok(()));
    assert_eq!(got, sent);
}

#[test]
fn closing_ends_a_sender_that_waits() {
    let (u, _, _) = uart();
    let input = UartInput::new(Arc::new(Mutex::new(u)));
    assert_eq!(input.try_send(&[0; INPUT_QUEUE + 1]), INPUT_QUEUE);
    assert_eq!(input.try_send(b"x"), 0);
    let sender = std::thread::spawn({
        let input = input.clone();
        move || input.send(b"x")
    });
    input.close();
    assert_eq!(sender.join().unwrap(), Err(InputClosed));
    assert_eq!(input.send(b"x"), Err(InputClosed));
}

#[test]
fn a_sink_that_fails_is_reported_once() {
    struct Broken;
    impl Write for Broken {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            Err(std::io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let errors = Arc::new(Mutex::new(0));
    let mut u = Uart::new(Box::new(Broken), IrqPin::unconnected(), {
        let errors = errors.clone();
        move |_| *lock(&errors) += 1
    });
    set(&mut u, reg::DATA, 1);
    set(&mut u, reg::DATA, 2);
    assert_eq!(*lock(&errors), 1);
    assert_eq!(get(&mut u, reg::LSR), 0x60);
}

mod differential {
    //! The same random accesses here and on vm-superio's 16550A, whose interrupt is an event counter and whose FIFOs are always on
    //! and 64 deep. What both promise must agree: the registers, IIR's sources, loop-back data, output, input.

    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};

    #[derive(Clone, Default)]
    struct Events(Arc<AtomicU64>);

    impl vm_superio::Trigger for Events {
        type E = std::io::Error;
        fn trigger(&self) -> std::io::Result<()> {
            self.0.fetch_add(1, Ordering::SeqCst);
            Ok(())
        }
    }

    /// xorshift64*: a fixed sequence, no dependency.
    struct Random(u64);

    impl Random {
        fn below(&mut self, n: u64) -> u64 {
            self.0 ^= self.0 >> 12;
            self.0 ^= self.0 << 25;
            self.0 ^= self.0 >> 27;
            (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % n
        }
    }

    #[test]
    fn agrees_with_vm_superio() {
        for seed in 1..200u64 {
            let (mut ours, line, sink) = uart();
            let events = Events::default();
            let mut theirs = vm_superio::Serial::new(events.clone(), Vec::new());
            // Ours: FIFOs on, listening, as theirs always is.
            set(&mut ours, reg::IIR_FCR, 0x01);
            let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
            let mut mcr = 0u8;
            let mut dlab = false;
            let mut buffered = 0usize;
            for step in 0..500 {
                let before = (line.edges(), events.0.load(Ordering::SeqCst));
                let say = format!("seed {seed} step {step}");
                match random.below(12) {
                    0 => {
                        // Data in or out. Reading an empty RBR is undefined on the chip, so it is not compared.
                        if mcr & MCR_LOOP != 0 && !dlab && buffered >= FIFO {
                            continue; // theirs is deeper
                        }
                        let byte = random.below(256) as u8;
                        set(&mut ours, reg::DATA, byte);
                        theirs.write(0, byte).unwrap();
                        buffered += usize::from(mcr & MCR_LOOP != 0 && !dlab);
                    }
                    1 | 2 if buffered > 0 || dlab => {
                        assert_eq!(get(&mut ours, reg::DATA), theirs.read(0), "{say}: RBR");
                        buffered -= usize::from(!dlab);
                    }
                    3 => {
                        let value = random.below(16) as u8;
                        set(&mut ours, reg::IER, value);
                        theirs.write(1, value).unwrap();
                    }
                    4 => {
                        let value = random.below(256) as u8 & 0x7f | if random.below(4) == 0 { 0x80 } else { 0 };
                        dlab = value & 0x80 != 0;
                        set(&mut ours, reg::LCR, value);
                        theirs.write(3, value).unwrap();
                        assert_eq!(get(&mut ours, reg::LCR), theirs.read(3), "{say}: LCR");
                    }
                    5 => {
                        mcr = random.below(32) as u8 | MCR_RTS;
                        set(&mut ours, reg::MCR, mcr);
                        theirs.write(4, mcr).unwrap();
                        assert_eq!(get(&mut ours, reg::MCR), theirs.read(4), "{say}: MCR");
                    }
                    6 => assert_eq!(get(&mut ours, reg::LSR) & 0x61, theirs.read(5) & 0x61, "{say}: LSR"),
                    // Theirs has no change bits.
                    7 => assert_eq!(get(&mut ours, reg::MSR) & 0xf0, theirs.read(6) & 0xf0, "{say}: MSR"),
                    8 => {
                        let value = random.below(256) as u8;
                        set(&mut ours, reg::SCR, value);
                        theirs.write(7, value).unwrap();
                        assert_eq!(get(&mut ours, reg::SCR), theirs.read(7), "{say}: SCR");
                    }
                    9 if mcr & MCR_LOOP == 0 && mcr & MCR_RTS != 0 && buffered < FIFO => {
                        let byte = [random.below(256) as u8];
                        assert_eq!(ours.receive(&byte), 1);
                        assert_eq!(theirs.enqueue_raw_bytes(&byte).unwrap(), 1);
                        buffered += 1;
                        if ours.ier & ier::RECEIVED != 0 && before.1 != events.0.load(Ordering::SeqCst) {
                            assert!(line.is_asserted(), "{say}: they announced input, we do not");
                        }
                    }
                    10 if !dlab => {
                        assert_eq!(get(&mut ours, reg::IER), theirs.read(1), "{say}: IER")
                    }
                    _ => {}
                }
                // Wherever they raise an event, our pin is up for it, or rose.
                if events.0.load(Ordering::SeqCst) > before.1 {
                    assert!(line.is_asserted() || line.edges() > before.0, "{say}: they interrupt, we do not");
                }
            }
            assert_eq!(sink.taken(), *theirs.writer(), "seed {seed}: output");
        }
    }
}
