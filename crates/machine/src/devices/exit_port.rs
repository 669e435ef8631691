//! The exit port 0xf4: a guest program writes a value to it and the machine ends with that value.
//!
//! Same place and width as QEMU's `isa-debug-exit`, which test guests write to (kvm-unit-tests `lib/x86/io.c`: a 32-bit `out`).
//! The value is passed on as it is; what a process makes of it is the command's business.

use crate::bus::BusDevice;
use crate::control::{Control, Outcome};

/// Where the port is.
pub const EXIT_PORT: u64 = 0xf4;
/// How many ports it occupies.
pub const EXIT_PORT_LEN: u64 = 4;

/// The exit port.
#[derive(Debug)]
pub struct ExitPort(Control);

impl ExitPort {
    /// A port that ends the machine of `control`.
    #[must_use]
    pub fn new(control: Control) -> Self {
        Self(control)
    }
}

impl BusDevice for ExitPort {
    fn name(&self) -> &'static str {
        "exit port"
    }

    fn max_access(&self) -> usize {
        4
    }

    /// Reads zero: that is how a guest finds out that the port exists.
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if offset == 0 {
            let value = data.iter().rev().fold(0, |value, &byte| value << 8 | u32::from(byte));
            self.0.finish(Outcome::ExitPort(value));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_width_ends_the_machine_with_its_value() {
        for (data, value) in [(&[7u8][..], 7), (&[1, 2], 0x201), (&[1, 2, 3, 0x84], 0x8403_0201)] {
            let control = Control::new();
            ExitPort::new(control.clone()).write(0, data);
            assert_eq!(control.outcome(), Some(Outcome::ExitPort(value)));
        }
    }

    #[test]
    fn reads_and_stray_bytes_do_not_end_it() {
        let control = Control::new();
        let mut port = ExitPort::new(control.clone());
        let mut data = [0xff; 4];
        port.read(0, &mut data);
        port.write(1, &[1]);
        assert_eq!((data, control.outcome()), ([0; 4], None));
    }
}
