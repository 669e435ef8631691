//! Single registers of a PC's chipset that guests touch in passing: ports 0x61, 0x80 and 0x92, and the PCI configuration ports.
//!
//! None of them does more than a guest needs to get on: there is no speaker, no PCI bus and no A20 gate that could close.

use crate::bus::BusDevice;
use crate::control::{Control, Outcome};

/// Port of [`Port61`].
pub const PORT_61: u64 = 0x61;
/// Port of [`PostCode`].
pub const POST_PORT: u64 = 0x80;
/// Port of [`Port92`].
pub const PORT_92: u64 = 0x92;
/// First port of [`PciConfig`].
pub const PCI_CONFIG: u64 = 0xcf8;
/// Ports of [`PciConfig`].
pub const PCI_CONFIG_LEN: u64 = 8;
/// The reset control register among them (Intel ICH data sheets, "Reset Control Register").
pub const RESET_CONTROL: u16 = 0xcf9;
/// What resets the machine when written to [`RESET_CONTROL`]: system reset and reset CPU.
pub const RESET_CONTROL_VALUE: u8 = 0x06;

/// Port 0x61, the NMI status and speaker control register.
///
/// Bits 0 to 3 keep what was written; bit 4 toggles with every read as the DRAM refresh did, because old code counts that to
/// wait. Timer 2 (bit 5) is the PIT's: an in-kernel PIT answers this port itself, before an exit.
#[derive(Debug, Default)]
pub struct Port61 {
    control: u8,
    refresh: bool,
}

impl BusDevice for Port61 {
    fn name(&self) -> &'static str {
        "port 0x61"
    }

    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        self.refresh = !self.refresh;
        data.fill(self.control | u8::from(self.refresh) << 4);
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        if let [value] = data {
            self.control = value & 0x0f;
        }
    }
}

/// Port 0x80: power-on self-test codes, and the port that kernels write to for a short delay.
#[derive(Debug, Default)]
pub struct PostCode(u8);

impl BusDevice for PostCode {
    fn name(&self) -> &'static str {
        "POST code"
    }

    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(self.0);
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        if let [value] = data {
            self.0 = *value;
        }
    }
}

/// Port 0x92, the PS/2 system control port A: bit 0 resets, bit 1 is the A20 gate, always open here.
#[derive(Debug)]
pub struct Port92 {
    control: Control,
    value: u8,
}

impl Port92 {
    /// A port that resets the machine of `control`.
    #[must_use]
    pub fn new(control: Control) -> Self {
        Self { control, value: 0 }
    }
}

impl BusDevice for Port92 {
    fn name(&self) -> &'static str {
        "port 0x92"
    }

    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(self.value | 2);
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        if let [value] = data {
            self.value = value & !1;
            if value & 1 != 0 {
                self.control.finish(Outcome::Reset);
            }
        }
    }
}

/// PCI configuration mechanism 1 (PCI Local Bus Specification 3.0, section 3.2.2.3.2) without a device behind it, and
/// the reset control register that lies among its ports.
///
/// The address register keeps what is written, so that a guest finds the mechanism; every
/// configuration space reads all ones, so that it finds nothing in it.
#[derive(Debug)]
pub struct PciConfig {
    control: Control,
    address: u32,
    reset: u8,
}

impl PciConfig {
    /// Ports that reset the machine of `control` through [`RESET_CONTROL`].
    #[must_use]
    pub fn new(control: Control) -> Self {
        Self { control, address: 0, reset: 0 }
    }
}

impl BusDevice for PciConfig {
    fn name(&self) -> &'static str {
        "PCI configuration"
    }

    fn max_access(&self) -> usize {
        4
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) {
        // Only the 32-bit access at 0 is the address register; others there go to the ISA bus.
        if offset == 0 && data.len() == 4 {
            data.copy_from_slice(&self.address.to_le_bytes());
        } else if offset == 1 && data.len() == 1 {
            data[0] = self.reset;
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (0, &[a, b, c, d]) => self.address = u32::from_le_bytes([a, b, c, d]) & 0x80ff_fffc,
            (1, &[value]) => {
                // Bit 1 selects the kind of reset, bit 2 starts it; it never reads back.
                self.reset = value & 0x0a;
                if value & 0x04 != 0 {
                    self.control.finish(Outcome::Reset);
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read<const N: usize>(device: &mut dyn BusDevice, offset: u64) -> [u8; N] {
        let mut data = [0xff; N];
        device.read(offset, &mut data);
        data
    }

    #[test]
    fn refresh_toggles_and_controls_stay() {
        let mut port = Port61::default();
        port.write(0, &[0xf3]);
        let (a, b) = (read::<1>(&mut port, 0)[0], read::<1>(&mut port, 0)[0]);
        assert_eq!((a ^ b, a & 0x0f), (0x10, 3));
    }

    #[test]
    fn post_codes_read_back() {
        let mut port = PostCode::default();
        port.write(0, &[0xab]);
        assert_eq!(read::<1>(&mut port, 0), [0xab]);
    }

    #[test]
    fn port_92_keeps_a20_open_and_resets() {
        let control = Control::new();
        let mut port = Port92::new(control.clone());
        port.write(0, &[0x00]);
        assert_eq!((read::<1>(&mut port, 0), control.outcome()), ([2], None));
        port.write(0, &[0x01]);
        assert_eq!((read::<1>(&mut port, 0), control.outcome()), ([2], Some(Outcome::Reset)));
    }

    #[test]
    fn pci_has_a_mechanism_and_no_devices() {
        let mut pci = PciConfig::new(Control::new());
        pci.write(0, &0x8000_0000u32.to_le_bytes());
        assert_eq!(read::<4>(&mut pci, 0), 0x8000_0000u32.to_le_bytes());
        assert_eq!(read::<4>(&mut pci, 4), [0xff; 4]);
        assert_eq!(read::<2>(&mut pci, 6), [0xff; 2]);
        assert_eq!(read::<2>(&mut pci, 0), [0xff; 2]);
        pci.write(4, &[1, 2, 3, 4]);
    }

    #[test]
    fn the_reset_register_resets_on_bit_2_only() {
        let control = Control::new();
        let mut pci = PciConfig::new(control.clone());
        pci.write(1, &[0x02]);
        assert_eq!((read::<1>(&mut pci, 1), control.outcome()), ([2], None));
        pci.write(0, &[6, 6]);
        assert_eq!(control.outcome(), None);
        pci.write(1, &[RESET_CONTROL_VALUE]);
        assert_eq!(control.outcome(), Some(Outcome::Reset));
    }
}
