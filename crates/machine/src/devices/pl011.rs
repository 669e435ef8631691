//! A PL011 UART: the serial port of Arm machines.
//!
//! Facts are from Arm's technical reference manual (DDI 0183G; its section numbers are cited). As with the 16550 the line
//! is infinitely fast: a byte written to DR is with the host before the write returns, so the transmit FIFO is always
//! empty, and the receive time-out passes at once.
//!
//! Differences from the chip, all on purpose:
//! * A byte is transmitted whether or not the UART is enabled: early consoles do not enable it.
//! * Input is flow-controlled, so that nothing typed or piped in is lost: bytes from the host wait in a bounded queue, and go
//!   to the receive FIFO only while the guest listens, that is, has the receiver enabled and a receive interrupt
//!   unmasked, or polls the flag register many times in a row. Drivers empty the FIFO while they start.
//! * No break, parity or framing error ever comes from the host's side. Overrun exists in loop-back only. There is no DMA.
//!
//! It must never block on input, nor grow without bound.

use std::collections::VecDeque;
use std::fmt;
use std::io::Write;
use std::sync::Arc;

use crate::bus::BusDevice;
use crate::devices::uart::{INPUT_QUEUE, Room, SerialPort};
use crate::irq::IrqPin;

/// Bytes of address space that a PL011 occupies.
pub const PL011_LEN: u64 = 0x1000;

const FIFO: usize = 16;
/// Consecutive reads of FR that show a guest polling for input. Transmitters poll too, but write in between.
const POLLS: u8 = 32;

/// Register offsets (section 3.2, table 3-1).
mod reg {
    pub(super) const DR: u64 = 0x000;
    pub(super) const RSR_ECR: u64 = 0x004;
    pub(super) const FR: u64 = 0x018;
    pub(super) const ILPR: u64 = 0x020;
    pub(super) const IBRD: u64 = 0x024;
    pub(super) const FBRD: u64 = 0x028;
    pub(super) const LCR_H: u64 = 0x02c;
    pub(super) const CR: u64 = 0x030;
    pub(super) const IFLS: u64 = 0x034;
    pub(super) const IMSC: u64 = 0x038;
    pub(super) const RIS: u64 = 0x03c;
    pub(super) const MIS: u64 = 0x040;
    pub(super) const ICR: u64 = 0x044;
    pub(super) const DMACR: u64 = 0x048;
    pub(super) const ID: u64 = 0xfe0;
}

/// Interrupts (section 3.3.10).
mod int {
    pub(super) const RECEIVED: u32 = 1 << 4;
    pub(super) const TRANSMITTED: u32 = 1 << 5;
    pub(super) const TIMEOUT: u32 = 1 << 6;
    pub(super) const OVERRUN: u32 = 1 << 10;
    pub(super) const ALL: u32 = 0x7ff;
}

const FR_CONNECTED: u32 = 7; // CTS, DSR, DCD
const FR_RX_EMPTY: u32 = 1 << 4;
const FR_RX_FULL: u32 = 1 << 6;
const FR_TX_EMPTY: u32 = 1 << 7;
const LCR_FIFOS: u32 = 1 << 4;
const CR_ENABLE: u32 = 1 << 0;
const CR_LOOP: u32 = 1 << 7;
const CR_RECEIVE: u32 = 1 << 9;
const CR_RESET: u32 = 0x300;
const IFLS_RESET: u32 = 0x12;
const DR_OVERRUN: u32 = 1 << 11;
/// PeriphID of revision r1p4, whose FIFOs have 16 entries, and PCellID (sections 3.3.13, 3.3.14).
const ID: [u8; 8] = [0x11, 0x10, 0x24, 0x00, 0x0d, 0xf0, 0x05, 0xb1];

/// The UART. Built with [`Pl011::new`]; the host feeds it through a [`UartInput`](super::uart::UartInput).
pub struct Pl011 {
    ilpr: u32,
    ibrd: u32,
    fbrd: u32,
    lcr: u32,
    control: u32,
    levels: u32,
    mask: u32,
    /// Raw interrupts: events that stay until they are cleared, or their cause is gone.
    raw: u32,
    dma: u32,
    overrun: bool,
    fifo: VecDeque<u8>,
    queue: VecDeque<u8>,
    polls: u8,
    irq: IrqPin,
    /// `None` once a write failed: it is not asked again.
    sink: Option<Box<dyn Write + Send>>,
    on_sink_error: Box<dyn FnMut(std::io::Error) + Send>,
    room: Arc<Room>,
    input_closed: bool,
}

impl Pl011 {
    /// A UART after reset whose output goes to `sink`, one byte at a time and flushed, and whose interrupt goes to `irq`.
    ///
    /// A `sink` that blocks holds the guest up: that is back-pressure. One that fails is reported once to `on_sink_error`
    /// (with the device's mutex held), and the guest's output goes nowhere from then on.
    pub fn new(
        sink: Box<dyn Write + Send>,
        irq: IrqPin,
        on_sink_error: impl FnMut(std::io::Error) + Send + 'static,
    ) -> Self {
        Self {
            ilpr: 0,
            ibrd: 0,
            fbrd: 0,
            lcr: 0,
            control: CR_RESET,
            levels: IFLS_RESET,
            mask: 0,
            raw: 0,
            dma: 0,
            overrun: false,
            fifo: VecDeque::with_capacity(FIFO),
            queue: VecDeque::new(),
            polls: 0,
            irq,
            sink: Some(sink),
            on_sink_error: Box::new(on_sink_error),
            room: Arc::default(),
            input_closed: false,
        }
    }

    fn capacity(&self) -> usize {
        if self.lcr & LCR_FIFOS != 0 { FIFO } else { 1 }
    }

    /// The FIFO level that raises the receive interrupt (section 3.3.9).
    fn trigger_level(&self) -> usize {
        if self.lcr & LCR_FIFOS == 0 {
            return 1;
        }
        match self.levels >> 3 & 7 {
            0 => FIFO / 8,
            1 => FIFO / 4,
            2 => FIFO / 2,
            3 => FIFO * 3 / 4,
            _ => FIFO * 7 / 8,
        }
    }

    /// Whether the guest shows that it listens; see the module's text.
    fn listens(&self) -> bool {
        let enabled = CR_ENABLE | CR_RECEIVE;
        self.control & (enabled | CR_LOOP) == enabled
            && (self.mask & (int::RECEIVED | int::TIMEOUT) != 0 || self.polls >= POLLS)
    }

    fn push(&mut self, byte: u8) {
        if self.fifo.len() < self.capacity() {
            self.fifo.push_back(byte);
            self.raw |= int::TIMEOUT;
            if self.fifo.len() >= self.trigger_level() {
                self.raw |= int::RECEIVED;
            }
        } else {
            self.overrun = true;
            self.raw |= int::OVERRUN;
        }
    }

    /// Moves input to the FIFO as far as it goes, then drives the interrupt pin.
    fn update(&mut self) {
        if self.listens() && !self.queue.is_empty() {
            while self.fifo.len() < self.capacity() {
                let Some(byte) = self.queue.pop_front() else {
                    break;
                };
                self.push(byte);
            }
            self.room.notify_all();
        }
        self.irq.set(self.raw & self.mask != 0);
    }

    fn transmit(&mut self, byte: u8) {
        // The transmitter is busy for a moment.
        self.raw &= !int::TRANSMITTED;
        if self.control & CR_LOOP != 0 {
            self.push(byte);
        } else if let Some(sink) = &mut self.sink
            && let Err(error) = sink.write_all(&[byte]).and_then(|()| sink.flush())
        {
            self.sink = None;
            (self.on_sink_error)(error);
        }
        self.raw |= int::TRANSMITTED;
    }

    fn receive_byte(&mut self) -> u32 {
        let byte = self.fifo.pop_front().map_or(0, u32::from);
        if self.fifo.len() < self.trigger_level() {
            self.raw &= !int::RECEIVED;
        }
        if self.fifo.is_empty() {
            self.raw &= !int::TIMEOUT;
        }
        byte | if self.overrun { DR_OVERRUN } else { 0 }
    }

    fn flags(&mut self) -> u32 {
        self.polls = self.polls.saturating_add(1);
        self.update();
        let empty = if self.fifo.is_empty() { FR_RX_EMPTY } else { 0 };
        let full = if self.fifo.len() >= self.capacity() { FR_RX_FULL } else { 0 };
        FR_CONNECTED | FR_TX_EMPTY | empty | full
    }

    fn read_register(&mut self, register: u64) -> u32 {
        if !matches!(register, reg::FR | reg::DR) {
            self.polls = 0;
        }
        let value = match register {
            reg::DR => self.receive_byte(),
            reg::RSR_ECR => u32::from(self.overrun) << 3,
            reg::FR => self.flags(),
            reg::ILPR => self.ilpr,
            reg::IBRD => self.ibrd,
            reg::FBRD => self.fbrd,
            reg::LCR_H => self.lcr,
            reg::CR => self.control,
            reg::IFLS => self.levels,
            reg::IMSC => self.mask,
            reg::RIS => self.raw,
            reg::MIS => self.raw & self.mask,
            reg::DMACR => self.dma,
            reg::ID.. => identification(&ID, register - reg::ID),
            _ => 0,
        };
        self.update();
        value
    }

    fn write_register(&mut self, register: u64, value: u32) {
        self.polls = 0;
        match register {
            reg::DR => self.transmit(value as u8),
            reg::RSR_ECR => self.overrun = false,
            reg::ILPR => self.ilpr = value & 0xff,
            reg::IBRD => self.ibrd = value & 0xffff,
            reg::FBRD => self.fbrd = value & 0x3f,
            reg::LCR_H => {
                // Switching the FIFOs empties them (section 3.3.7).
                if (value ^ self.lcr) & LCR_FIFOS != 0 {
                    self.fifo.clear();
                    self.raw &= !(int::RECEIVED | int::TIMEOUT);
                }
                self.lcr = value & 0xff;
            }
            reg::CR => self.control = value & 0xff87,
            reg::IFLS => self.levels = value & 0x3f,
            reg::IMSC => self.mask = value & int::ALL,
            reg::ICR => self.raw &= !value,
            reg::DMACR => self.dma = value & 7,
            _ => {}
        }
        self.update();
    }
}

/// A byte of an identification area, a word per byte.
pub(crate) fn identification(id: &[u8], offset: u64) -> u32 {
    let byte = usize::try_from(offset / 4).ok().and_then(|n| id.get(n));
    byte.copied().map_or(0, u32::from)
}

/// Serves a read of a device with 32-bit registers; narrower reads get the low part of an aligned register.
pub(crate) fn read_word(offset: u64, data: &mut [u8], read: impl FnOnce(u64) -> u32) {
    let value = if offset.is_multiple_of(4) { read(offset) } else { 0 };
    for (byte, part) in data.iter_mut().zip(value.to_le_bytes()) {
        *byte = part;
    }
}

/// The 32-bit value of a write; narrower ones have zeros above. `None` if no register begins there.
pub(crate) fn written_word(offset: u64, data: &[u8]) -> Option<u32> {
    let mut bytes = [0; 4];
    bytes.iter_mut().zip(data).for_each(|(byte, part)| *byte = *part);
    offset.is_multiple_of(4).then(|| u32::from_le_bytes(bytes))
}

impl BusDevice for Pl011 {
    fn name(&self) -> &'static str {
        "pl011"
    }

    fn max_access(&self) -> usize {
        4
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) {
        read_word(offset, data, |register| self.read_register(register));
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(value) = written_word(offset, data) {
            self.write_register(offset, value);
        }
    }
}

impl SerialPort for Pl011 {
    fn receive(&mut self, input: &[u8]) -> usize {
        if self.input_closed {
            return 0;
        }
        let taken = input.len().min(INPUT_QUEUE - self.queue.len());
        self.queue.extend(&input[..taken]);
        self.update();
        taken
    }

    fn room(&self) -> Arc<Room> {
        self.room.clone()
    }

    fn input_closed(&mut self) -> &mut bool {
        &mut self.input_closed
    }
}

impl fmt::Debug for Pl011 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pl011")
            .field("control", &self.control)
            .field("mask", &self.mask)
            .field("raw", &self.raw)
            .field("fifo", &self.fifo.len())
            .field("queue", &self.queue.len())
            .field("irq", &self.irq)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::lock;
    use crate::devices::uart::UartInput;
    use crate::irq::CountingLine;
    use std::sync::Mutex;

    #[derive(Clone, Default)]
    struct Output(Arc<Mutex<Vec<u8>>>);

    impl Write for Output {
        fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
            lock(&self.0).extend(data);
            Ok(data.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    struct Rig {
        uart: Arc<Mutex<Pl011>>,
        input: UartInput,
        output: Output,
        line: Arc<CountingLine>,
    }

    impl Rig {
        fn new() -> Self {
            let (output, line) = (Output::default(), Arc::new(CountingLine::default()));
            let pin = IrqPin::new(line.clone());
            let uart = Pl011::new(Box::new(output.clone()), pin, |_| panic!("no error"));
            let uart = Arc::new(Mutex::new(uart));
            let input = UartInput::new(uart.clone());
            Self { uart, input, output, line }
        }

        fn get(&self, register: u64) -> u32 {
            let mut data = [0; 4];
            lock(&self.uart).read(register, &mut data);
            u32::from_le_bytes(data)
        }

        fn set(&self, register: u64, value: u32) {
            lock(&self.uart).write(register, &value.to_le_bytes());
        }

        /// What Linux' driver does at start-up, in short.
        fn start(&self) {
            self.set(reg::LCR_H, 0x70);
            self.set(reg::CR, 0x301);
            self.set(reg::ICR, 0xffff);
            self.set(reg::IMSC, int::RECEIVED | int::TIMEOUT);
        }
    }

    #[test]
    fn bytes_go_out_at_once_even_before_it_is_enabled() {
        let rig = Rig::new();
        rig.set(reg::DR, u32::from(b'x'));
        lock(&rig.uart).write(reg::DR, b"y");
        assert_eq!(*lock(&rig.output.0), b"xy");
        assert_eq!(rig.get(reg::FR), 0x97);
    }

    #[test]
    fn the_transmit_interrupt_is_an_event() {
        let rig = Rig::new();
        rig.start();
        rig.set(reg::IMSC, int::TRANSMITTED);
        assert!(!rig.line.is_asserted());
        rig.set(reg::DR, 65);
        assert!(rig.line.is_asserted());
        assert_eq!(rig.get(reg::MIS), int::TRANSMITTED);
        rig.set(reg::ICR, int::TRANSMITTED);
        assert!(!rig.line.is_asserted());
    }

    #[test]
    fn input_waits_until_the_guest_listens() {
        let rig = Rig::new();
        assert_eq!(rig.input.try_send(b"hello"), 5);
        rig.set(reg::LCR_H, 0x70);
        rig.set(reg::CR, 0x301);
        assert_ne!(rig.get(reg::FR) & FR_RX_EMPTY, 0);
        rig.set(reg::IMSC, int::RECEIVED | int::TIMEOUT);
        assert!(rig.line.is_asserted());
        let read: Vec<u8> = (0..5).map(|_| rig.get(reg::DR) as u8).collect();
        assert_eq!(read, b"hello");
        assert!(!rig.line.is_asserted());
        assert_eq!((rig.get(reg::FR) & FR_RX_EMPTY, rig.get(reg::DR)), (FR_RX_EMPTY, 0));
    }

    #[test]
    fn a_polling_guest_listens_too() {
        let rig = Rig::new();
        rig.set(reg::CR, 0x301);
        assert_eq!(rig.input.try_send(b"ab"), 2);
        let found = (0..100).any(|_| rig.get(reg::FR) & FR_RX_EMPTY == 0);
        assert!(found);
        assert_eq!(rig.get(reg::DR), 97);
    }

    #[test]
    fn the_queue_is_bounded_and_everything_arrives() {
        let rig = Rig::new();
        let text: Vec<u8> = (0..INPUT_QUEUE + 100).map(|n| n as u8).collect();
        assert_eq!(rig.input.try_send(&text), INPUT_QUEUE);
        rig.start();
        assert_eq!(rig.get(reg::FR) & FR_RX_FULL, FR_RX_FULL);
        let mut read = Vec::new();
        while rig.get(reg::FR) & FR_RX_EMPTY == 0 {
            read.push(rig.get(reg::DR) as u8);
        }
        assert_eq!(read, text[..INPUT_QUEUE]);
        rig.input.close();
        assert_eq!(rig.input.try_send(b"x"), 0);
        assert!(rig.input.send(b"x").is_err());
    }

    #[test]
    fn the_receive_interrupt_follows_the_level() {
        let rig = Rig::new();
        rig.start();
        rig.set(reg::IMSC, int::RECEIVED);
        assert_eq!(rig.input.try_send(&[1; 7]), 7);
        assert!(!rig.line.is_asserted(), "below half");
        assert_eq!(rig.input.try_send(&[1]), 1);
        assert!(rig.line.is_asserted());
        rig.get(reg::DR);
        assert!(!rig.line.is_asserted());
    }

    #[test]
    fn loop_back_overruns() {
        let rig = Rig::new();
        rig.set(reg::LCR_H, 0x70);
        rig.set(reg::CR, 0x381);
        for n in 0..17 {
            rig.set(reg::DR, n);
        }
        assert!(lock(&rig.output.0).is_empty());
        assert_eq!(rig.get(reg::RIS) & int::OVERRUN, int::OVERRUN);
        assert_eq!(rig.get(reg::DR), DR_OVERRUN);
        rig.set(reg::RSR_ECR, 0);
        assert_eq!(rig.get(reg::DR), 1);
    }

    #[test]
    fn drivers_find_its_identification() {
        let rig = Rig::new();
        let id: Vec<u32> = (0..8).map(|n| rig.get(reg::ID + 4 * n)).collect();
        assert_eq!(id, [0x11, 0x10, 0x24, 0, 0xd, 0xf0, 5, 0xb1]);
    }

    #[test]
    fn a_failing_sink_is_reported_once() {
        struct Closed;
        impl Write for Closed {
            fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
                Err(std::io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let (sender, errors) = std::sync::mpsc::channel();
        let report = move |error: std::io::Error| sender.send(error.kind()).unwrap();
        let mut uart = Pl011::new(Box::new(Closed), IrqPin::unconnected(), report);
        uart.write(reg::DR, b"a");
        uart.write(reg::DR, b"b");
        assert_eq!(errors.try_iter().count(), 1);
    }

    #[test]
    fn any_access_anywhere_is_survived() {
        let rig = Rig::new();
        for offset in 0..PL011_LEN {
            for size in [1, 2, 4] {
                let mut data = [0xa5; 4];
                lock(&rig.uart).write(offset, &data[..size]);
                lock(&rig.uart).read(offset, &mut data[..size]);
            }
        }
    }
}
