//! A 16550A UART: the serial port that every guest knows how to use.
//!
//! Facts are from the data sheet of the National Semiconductor PC16550D (its section numbers are cited). The line itself is
//! infinitely fast: a byte written to THR is with the host before the write returns, so the transmitter is always empty,
//! and the character time-out of section 8.4.2 passes at once.
//!
//! Differences from the chip, all on purpose:
//! * OUT2 does not gate the interrupt pin. It does on a PC, but guests in the wild forget it and work on other VMMs.
//! * Input is flow-controlled, so that nothing typed or piped in is lost. Bytes from the host wait in a bounded queue and go to the
//!   receive FIFO only while the guest shows that it listens: RTS asserted, the receive interrupt enabled,
//!   or the line status register polled many times in a row. Drivers clear the FIFO and read RBR blindly
//!   while they probe; that must not eat the first line of a script.
//! * No break, parity or framing error ever comes from the host's side. Overrun exists in loop-back only.
//!
//! It must never block on input, nor grow without bound.

use std::collections::VecDeque;
use std::fmt;
use std::io::Write;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use crate::bus::{BusDevice, lock};
use crate::irq::IrqPin;

/// Ports that a UART occupies.
pub const UART_PORTS: u64 = 8;
/// Bytes from the host that wait for the guest at most.
pub const INPUT_QUEUE: usize = 4096;

const FIFO: usize = 16;
/// Consecutive reads of LSR that show a guest polling for input. Transmitters poll too, but write in between.
const POLLS: u8 = 32;

/// Register offsets (section 8.0, table II).
mod reg {
    pub(super) const DATA: u64 = 0; // RBR, THR; DLL with DLAB
    pub(super) const IER: u64 = 1; // DLM with DLAB
    pub(super) const IIR_FCR: u64 = 2;
    pub(super) const LCR: u64 = 3;
    pub(super) const MCR: u64 = 4;
    pub(super) const LSR: u64 = 5;
    pub(super) const MSR: u64 = 6;
    pub(super) const SCR: u64 = 7;
}

mod ier {
    pub(super) const RECEIVED: u8 = 1 << 0;
    pub(super) const THR_EMPTY: u8 = 1 << 1;
    pub(super) const LINE_STATUS: u8 = 1 << 2;
    pub(super) const MODEM_STATUS: u8 = 1 << 3;
}

mod iir {
    pub(super) const NONE: u8 = 0x01;
    pub(super) const MODEM_STATUS: u8 = 0x00;
    pub(super) const THR_EMPTY: u8 = 0x02;
    pub(super) const RECEIVED: u8 = 0x04;
    pub(super) const LINE_STATUS: u8 = 0x06;
    pub(super) const TIMEOUT: u8 = 0x0c;
    pub(super) const FIFOS_ON: u8 = 0xc0;
}

const FCR_ENABLE: u8 = 1 << 0;
const FCR_CLEAR_RX: u8 = 1 << 1;
const LCR_DLAB: u8 = 1 << 7;
const MCR_DTR: u8 = 1 << 0;
const MCR_RTS: u8 = 1 << 1;
const MCR_OUT1: u8 = 1 << 2;
const MCR_OUT2: u8 = 1 << 3;
const MCR_LOOP: u8 = 1 << 4;
const LSR_DATA_READY: u8 = 1 << 0;
const LSR_OVERRUN: u8 = 1 << 1;
const LSR_TRANSMITTER_EMPTY: u8 = 0x60; // THRE and TEMT
const MSR_CTS: u8 = 1 << 4;
const MSR_DSR: u8 = 1 << 5;
const MSR_RI: u8 = 1 << 6;
const MSR_DCD: u8 = 1 << 7;
/// What the host's end of the cable says: there, ready, carrier.
const MSR_CONNECTED: u8 = MSR_CTS | MSR_DSR | MSR_DCD;

/// The UART. Built with [`Uart::new`]; the host feeds it through a [`UartInput`].
pub struct Uart {
    ier: u8,
    fcr: u8,
    lcr: u8,
    mcr: u8,
    /// Modem inputs (bits 4 to 7) and their changes (bits 0 to 3).
    msr: u8,
    scr: u8,
    divisor: u16,
    overrun: bool,
    /// The THR-empty interrupt is an event, not a level (section 8.5): set by the transmitter running empty and by enabling it, cleared by
    /// reading IIR while it is the source and by writing THR.
    thr_empty_event: bool,
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

impl Uart {
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
            ier: 0,
            fcr: 0,
            lcr: 0,
            mcr: 0,
            msr: MSR_CONNECTED,
            scr: 0,
            divisor: 12, // 9600 baud
            overrun: false,
            thr_empty_event: false,
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

    fn fifo_capacity(&self) -> usize {
        if self.fcr & FCR_ENABLE != 0 { FIFO } else { 1 }
    }

    /// FIFO level at which "received data available" is raised (section 8.4, FCR bits 6 and 7).
    fn trigger_level(&self) -> usize {
        if self.fcr & FCR_ENABLE == 0 { 1 } else { [1, 4, 8, 14][usize::from(self.fcr >> 6)] }
    }

    /// Whether the guest shows that it listens; see the module's text.
    fn listens(&self) -> bool {
        self.mcr & MCR_LOOP == 0 && (self.mcr & MCR_RTS != 0 || self.ier & ier::RECEIVED != 0 || self.polls >= POLLS)
    }

    /// Moves input to the FIFO as far as it goes, then drives the interrupt pin.
    fn update(&mut self) {
        if self.listens() && !self.queue.is_empty() {
            while self.fifo.len() < self.fifo_capacity() {
                let Some(byte) = self.queue.pop_front() else {
                    break;
                };
                self.fifo.push_back(byte);
            }
            self.room.notify_all();
        }
        let source = self.interrupt_source();
        self.irq.set(source != iir::NONE);
    }

    /// The interrupt of highest priority that is enabled and pending (section 8.5, table III).
    fn interrupt_source(&self) -> u8 {
        if self.ier & ier::LINE_STATUS != 0 && self.overrun {
            iir::LINE_STATUS
        } else if self.ier & ier::RECEIVED != 0 && self.fifo.len() >= self.trigger_level() {
            iir::RECEIVED
        } else if self.ier & ier::RECEIVED != 0 && !self.fifo.is_empty() {
            iir::TIMEOUT
        } else if self.ier & ier::THR_EMPTY != 0 && self.thr_empty_event {
            iir::THR_EMPTY
        } else if self.ier & ier::MODEM_STATUS != 0 && self.msr & 0x0f != 0 {
            iir::MODEM_STATUS
        } else {
            iir::NONE
        }
    }

    fn transmit(&mut self, byte: u8) {
        // The transmitter is busy for a moment: an edge-triggered controller must see the pin fall and rise again.
        self.thr_empty_event = false;
        self.update();
        if self.mcr & MCR_LOOP != 0 {
            if self.fifo.len() < self.fifo_capacity() {
                self.fifo.push_back(byte);
            } else {
                self.overrun = true;
                if self.fcr & FCR_ENABLE == 0 {
                    // Without FIFOs the new character destroys the one in RBR (section 8.3, bit 1).
                    self.fifo.clear();
                    self.fifo.push_back(byte);
                }
            }
        } else if let Some(sink) = &mut self.sink
            && let Err(error) = sink.write_all(&[byte]).and_then(|()| sink.flush())
        {
            self.sink = None;
            (self.on_sink_error)(error);
        }
        self.thr_empty_event = true;
        self.update();
    }

    /// The modem inputs as the guest's end sees them: from the cable, or its own outputs in loop-back (section 8.6, bit 4).
    fn modem_inputs(&self) -> u8 {
        if self.mcr & MCR_LOOP == 0 {
            return MSR_CONNECTED;
        }
        [(MCR_RTS, MSR_CTS), (MCR_DTR, MSR_DSR), (MCR_OUT1, MSR_RI), (MCR_OUT2, MSR_DCD)]
            .into_iter()
            .filter(|(output, _)| self.mcr & output != 0)
            .fold(0, |inputs, (_, input)| inputs | input)
    }

    fn set_mcr(&mut self, value: u8) {
        self.mcr = value & 0x1f;
        let (old, new) = (self.msr & 0xf0, self.modem_inputs());
        let mut changed = (old ^ new) >> 4;
        // The ring indicator's bit reports its trailing edge only (section 8.7, bit 2).
        if new & MSR_RI != 0 {
            changed &= !(MSR_RI >> 4);
        }
        self.msr = new | (self.msr & 0x0f) | changed;
    }

    fn set_fcr(&mut self, value: u8) {
        // Changing bit 0 clears both FIFOs; the other bits only count while it is written as one (section 8.4).
        if (value ^ self.fcr) & FCR_ENABLE != 0 || (value & FCR_ENABLE != 0 && value & FCR_CLEAR_RX != 0) {
            self.fifo.clear();
        }
        self.fcr = if value & FCR_ENABLE != 0 { value & 0xc9 } else { 0 };
    }

    fn set_ier(&mut self, value: u8) {
        let enabled = value & !self.ier;
        self.ier = value & 0x0f;
        if enabled & ier::THR_EMPTY != 0 {
            // The transmitter is empty, and enabling the interrupt reports that (drivers start their output that way).
            self.thr_empty_event = true;
        }
    }

    fn read_register(&mut self, register: u64) -> u8 {
        let dlab = self.lcr & LCR_DLAB != 0;
        if register == reg::LSR {
            self.polls = self.polls.saturating_add(1);
            self.update();
        } else if register != reg::DATA {
            self.polls = 0;
        }
        let value = match register {
            reg::DATA if dlab => self.divisor as u8,
            reg::DATA => self.fifo.pop_front().unwrap_or(0),
            reg::IER if dlab => (self.divisor >> 8) as u8,
            reg::IER => self.ier,
            reg::IIR_FCR => {
                let source = self.interrupt_source();
                if source == iir::THR_EMPTY {
                    self.thr_empty_event = false;
                }
                source | if self.fcr & FCR_ENABLE != 0 { iir::FIFOS_ON } else { 0 }
            }
            reg::LCR => self.lcr,
            reg::MCR => self.mcr,
            reg::LSR => {
                let overrun = if std::mem::take(&mut self.overrun) { LSR_OVERRUN } else { 0 };
                let ready = if self.fifo.is_empty() { 0 } else { LSR_DATA_READY };
                LSR_TRANSMITTER_EMPTY | overrun | ready
            }
            reg::MSR => {
                let value = self.msr;
                self.msr &= 0xf0;
                value
            }
            reg::SCR => self.scr,
            _ => 0xff,
        };
        self.update();
        value
    }

    fn write_register(&mut self, register: u64, value: u8) {
        let dlab = self.lcr & LCR_DLAB != 0;
        self.polls = 0;
        match register {
            reg::DATA if dlab => self.divisor = self.divisor & 0xff00 | u16::from(value),
            reg::DATA => self.transmit(value),
            reg::IER if dlab => self.divisor = self.divisor & 0x00ff | u16::from(value) << 8,
            reg::IER => self.set_ier(value),
            reg::IIR_FCR => self.set_fcr(value),
            reg::LCR => self.lcr = value,
            reg::MCR => self.set_mcr(value),
            reg::SCR => self.scr = value,
            _ => {} // LSR and MSR: "writing is not recommended" (sections 8.3 and 8.7), and does nothing
        }
        self.update();
    }
}

impl SerialPort for Uart {
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

impl BusDevice for Uart {
    fn name(&self) -> &'static str {
        "uart"
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let [byte] = data {
            *byte = self.read_register(offset);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let [byte] = data {
            self.write_register(offset, *byte);
        }
    }
}

impl fmt::Debug for Uart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Uart")
            .field("ier", &self.ier)
            .field("fcr", &self.fcr)
            .field("lcr", &self.lcr)
            .field("mcr", &self.mcr)
            .field("msr", &self.msr)
            .field("divisor", &self.divisor)
            .field("fifo", &self.fifo.len())
            .field("queue", &self.queue.len())
            .field("irq", &self.irq)
            .finish_non_exhaustive()
    }
}

/// Tells whoever waits for a serial port that it may have room again.
#[derive(Debug, Default)]
pub struct Room {
    changes: Mutex<u64>,
    changed: Condvar,
}

impl Room {
    /// Wakes everybody who waits.
    pub fn notify_all(&self) {
        let mut changes = lock(&self.changes);
        *changes = changes.wrapping_add(1);
        self.changed.notify_all();
    }

    /// A mark to wait from: nothing that happens after this is missed.
    fn mark(&self) -> u64 {
        *lock(&self.changes)
    }

    /// Waits until something happened since `mark`.
    fn wait(&self, mark: u64) {
        let mut changes = lock(&self.changes);
        while *changes == mark {
            changes = self.changed.wait(changes).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// A serial port that the host can feed.
pub trait SerialPort: Send {
    /// Takes as many bytes of `input` as there is room for, and answers how many: none once input is closed.
    fn receive(&mut self, input: &[u8]) -> usize;

    /// What is notified when there is room again.
    fn room(&self) -> Arc<Room>;

    /// Whether input is closed.
    fn input_closed(&mut self) -> &mut bool;
}

/// The host's end of the receive line. Clones feed the same serial port.
#[derive(Clone)]
pub struct UartInput {
    uart: Arc<Mutex<dyn SerialPort>>,
    room: Arc<Room>,
}

impl fmt::Debug for UartInput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UartInput").finish_non_exhaustive()
    }
}

/// The UART takes no more input: the machine has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the serial port takes no more input")]
pub struct InputClosed;

impl UartInput {
    /// The input of `uart`.
    #[must_use]
    pub fn new(uart: Arc<Mutex<dyn SerialPort>>) -> Self {
        let room = lock(&uart).room();
        Self { uart, room }
    }

    /// Gives the guest as many bytes of `input` as there is room for and answers how many; never blocks.
    #[must_use = "bytes beyond the count were not taken"]
    pub fn try_send(&self, input: &[u8]) -> usize {
        lock(&self.uart).receive(input)
    }

    /// Gives the guest all of `input`; waits while the guest does not listen.
    ///
    /// # Errors
    /// [`InputClosed`] when [`close`](Self::close) was called, now or while it waits.
    pub fn send(&self, mut input: &[u8]) -> Result<(), InputClosed> {
        loop {
            let mark = self.room.mark();
            {
                let mut uart = lock(&self.uart);
                if *uart.input_closed() {
                    return Err(InputClosed);
                }
                input = &input[uart.receive(input)..];
            }
            if input.is_empty() {
                return Ok(());
            }
            self.room.wait(mark);
        }
    }

    /// Ends input: whoever waits in [`send`](Self::send) returns. What the guest has not read yet stays readable.
    pub fn close(&self) {
        *lock(&self.uart).input_closed() = true;
        self.room.notify_all();
    }
}

#[cfg(test)]
#[path = "uart_tests.rs"]
mod tests;
