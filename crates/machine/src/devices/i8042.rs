//! An 8042 keyboard controller without a keyboard: what guests need to reset the machine, and to find quickly that there is nothing to type on.
//!
//! Commands are those of IBM's PS/2 Hardware Interface Technical Reference ("Keyboard and Auxiliary Device Controller").
//! A byte for the keyboard is answered with 0xfe (resend), which drivers take as a failure at once
//! instead of waiting for a time-out; a byte for the mouse is dropped, as there is no mouse port.

use crate::bus::BusDevice;
use crate::control::{Control, Outcome};
use crate::irq::IrqPin;

/// The data port, offset 0 of the device.
pub const DATA_PORT: u64 = 0x60;
/// The status and command port, offset 1 of the device.
pub const COMMAND_PORT: u64 = 0x64;

const STATUS_OUTPUT_FULL: u8 = 1 << 0;
const STATUS_SYSTEM: u8 = 1 << 2;
const STATUS_LAST_WAS_COMMAND: u8 = 1 << 3;
const STATUS_NOT_INHIBITED: u8 = 1 << 4;

const CONTROL_KEYBOARD_IRQ: u8 = 1 << 0;
/// Self-test passed, both ports off, no interrupts.
const CONTROL_AT_RESET: u8 = 0x34;
/// Output port: A20 open (bit 1), not in reset (bit 0).
const OUTPUT_PORT: u8 = 0x03;

const KEYBOARD_RESEND: u8 = 0xfe;

/// The controller.
#[derive(Debug)]
pub struct I8042 {
    control: Control,
    irq: IrqPin,
    command_byte: u8,
    /// The command that waits for its data byte.
    command: Option<u8>,
    output: Option<u8>,
    last_was_command: bool,
}

impl I8042 {
    /// A controller that resets the machine of `control` and raises `irq` (line 1 of a PC) for bytes to the guest.
    #[must_use]
    pub fn new(control: Control, irq: IrqPin) -> Self {
        Self { control, irq, command_byte: CONTROL_AT_RESET, command: None, output: None, last_was_command: false }
    }

    fn respond(&mut self, byte: u8) {
        self.output = Some(byte);
    }

    fn write_output_port(&mut self, value: u8) {
        if value & 1 == 0 {
            self.control.finish(Outcome::Reset);
        }
    }

    fn write_command(&mut self, command: u8) {
        self.command = None;
        match command {
            0x20 => self.respond(self.command_byte),
            0x60 | 0xd1 | 0xd2 | 0xd3 | 0xd4 => self.command = Some(command),
            0xaa => {
                self.command_byte = CONTROL_AT_RESET;
                self.respond(0x55); // self-test passed
            }
            0xa9 => self.respond(0xff), // no mouse port
            0xab => self.respond(0x00), // keyboard port works
            0xad => self.command_byte |= 0x10,
            0xae => self.command_byte &= !0x10,
            0xc0 => self.respond(0x00),
            0xd0 => self.respond(OUTPUT_PORT),
            // Pulse the output port: bits 0 to 3 that are zero go low for a moment; bit 0 is the CPU's reset.
            0xf0..=0xff => self.write_output_port(command),
            _ => {}
        }
    }

    fn write_data(&mut self, value: u8) {
        match self.command.take() {
            None => self.respond(KEYBOARD_RESEND),
            Some(0x60) => self.command_byte = value,
            Some(0xd1) => self.write_output_port(value),
            Some(0xd2) => self.respond(value), // as if the keyboard had sent it
            Some(_) => {}
        }
    }
}

impl BusDevice for I8042 {
    fn name(&self) -> &'static str {
        "i8042"
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let value = if offset == 0 {
            self.output.take().unwrap_or(0)
        } else {
            let full = if self.output.is_some() { STATUS_OUTPUT_FULL } else { 0 };
            let last = if self.last_was_command { STATUS_LAST_WAS_COMMAND } else { 0 };
            full | last | self.command_byte & STATUS_SYSTEM | STATUS_NOT_INHIBITED
        };
        data.fill(value);
        self.irq.set(self.output.is_some() && self.command_byte & CONTROL_KEYBOARD_IRQ != 0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let &[value] = data else { return };
        self.last_was_command = offset != 0;
        if offset == 0 {
            self.write_data(value);
        } else {
            self.write_command(value);
        }
        self.irq.set(self.output.is_some() && self.command_byte & CONTROL_KEYBOARD_IRQ != 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::irq::CountingLine;
    use std::sync::Arc;

    fn controller() -> (I8042, Control, Arc<CountingLine>) {
        let (control, line) = (Control::new(), Arc::new(CountingLine::default()));
        (I8042::new(control.clone(), IrqPin::new(line.clone())), control, line)
    }

    fn get(device: &mut I8042, offset: u64) -> u8 {
        let mut data = [0];
        device.read(offset, &mut data);
        data[0]
    }

    #[test]
    fn resets_by_pulse_and_by_output_port() {
        let (mut dev, control, _) = controller();
        dev.write(1, &[0xff]);
        dev.write(1, &[0xf1]);
        dev.write(1, &[0xd1]);
        dev.write(0, &[0x03]);
        assert_eq!(control.outcome(), None);
        dev.write(1, &[0xfe]);
        assert_eq!(control.outcome(), Some(Outcome::Reset));
        let (mut dev, control, _) = controller();
        dev.write(1, &[0xd1]);
        dev.write(0, &[0x02]);
        assert_eq!(control.outcome(), Some(Outcome::Reset));
    }

    #[test]
    fn a_probe_goes_through() {
        let (mut dev, _, line) = controller();
        // Flush, read the command byte, self-test, write the command byte with interrupts on.
        assert_eq!(get(&mut dev, 1) & STATUS_OUTPUT_FULL, 0);
        dev.write(1, &[0x20]);
        assert_eq!(get(&mut dev, 1) & STATUS_OUTPUT_FULL, 1);
        assert_eq!(get(&mut dev, 0), CONTROL_AT_RESET);
        assert_eq!(get(&mut dev, 1) & STATUS_OUTPUT_FULL, 0);
        dev.write(1, &[0xaa]);
        assert_eq!(get(&mut dev, 0), 0x55);
        dev.write(1, &[0x60]);
        dev.write(0, &[0x45]);
        dev.write(1, &[0x20]);
        assert_eq!(get(&mut dev, 0), 0x45);
        assert!(!line.is_asserted());
        // The keyboard itself refuses, with its interrupt.
        dev.write(0, &[0xf2]);
        assert!(line.is_asserted());
        assert_eq!(get(&mut dev, 0), KEYBOARD_RESEND);
        assert!(!line.is_asserted());
        // There is no mouse.
        dev.write(1, &[0xd4]);
        dev.write(0, &[0xf2]);
        assert_eq!(get(&mut dev, 1) & STATUS_OUTPUT_FULL, 0);
    }

    #[test]
    fn any_command_is_survived() {
        let (mut dev, control, _) = controller();
        for command in 0..=0xffu8 {
            for data in [0x01, 0xff] {
                dev.write(1, &[command]);
                dev.write(0, &[data]);
                get(&mut dev, 0);
                get(&mut dev, 1);
            }
        }
        assert_eq!(control.outcome(), Some(Outcome::Reset));
    }
}
