//! The test device of QEMU's PC (`pc-testdev`), which kvm-unit-tests expect: storage behind ports and memory, and interrupt lines that the
//! guest drives itself.
//!
//! | where | what |
//! |---|---|
//! | ports 0xe0–0xe3, 0xe8–0xeb | the same 32 bits; the second only byte by byte |
//! | port 0xe4 | the guest names a page whose translation the host shall forget: nothing to do, all hosts keep track |
//! | ports 0x2000–0x2017 | a write sets the GSI of that number to 0 or 1 |
//! | 0xff00_0000, 64 KiB | bytes that keep what is written, accessed by exits |
//!
//! It gives a guest nothing that reaches beyond itself, so the board always has it.

use crate::bus::BusDevice;
use crate::irq::IrqPin;

/// First port of the storage; offset 0 of [`TestPorts`].
pub const TEST_PORT: u64 = 0xe0;
/// Ports of the storage, with the one for pages in the middle.
pub const TEST_PORT_LEN: u64 = 12;
/// First port of the interrupt lines.
pub const TEST_IRQ_PORT: u64 = 0x2000;
/// Where the memory is.
pub const TEST_MEMORY: u64 = 0xff00_0000;
/// Bytes of the memory.
pub const TEST_MEMORY_LEN: u64 = 0x1_0000;

/// The storage behind ports.
#[derive(Debug, Default)]
pub struct TestPorts {
    data: [u8; 4],
}

impl BusDevice for TestPorts {
    fn name(&self) -> &'static str {
        "test ports"
    }

    fn max_access(&self) -> usize {
        4
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if !(4..8).contains(&offset) {
            for (at, byte) in (offset..).zip(data) {
                *byte = self.data[(at & 3) as usize];
            }
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if !(4..8).contains(&offset) {
            for (at, &byte) in (offset..).zip(data) {
                self.data[(at & 3) as usize] = byte;
            }
        }
    }
}

/// The interrupt lines: one port for each.
#[derive(Debug)]
pub struct TestIrqs(Vec<IrqPin>);

impl TestIrqs {
    /// Lines that lead to `pins`.
    #[must_use]
    pub fn new(pins: Vec<IrqPin>) -> Self {
        Self(pins)
    }
}

impl BusDevice for TestIrqs {
    fn name(&self) -> &'static str {
        "test interrupts"
    }

    fn read(&mut self, _offset: u64, _data: &mut [u8]) {}

    fn write(&mut self, offset: u64, data: &[u8]) {
        let pin = usize::try_from(offset).ok().and_then(|at| self.0.get_mut(at));
        if let (Some(pin), [value]) = (pin, data) {
            pin.set(*value != 0);
        }
    }
}

/// The memory that is accessed by exits.
#[derive(Debug)]
pub struct TestMemory(Vec<u8>);

impl Default for TestMemory {
    fn default() -> Self {
        Self(vec![0; TEST_MEMORY_LEN as usize])
    }
}

impl BusDevice for TestMemory {
    fn name(&self) -> &'static str {
        "test memory"
    }

    fn max_access(&self) -> usize {
        8
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (byte, stored) in data.iter_mut().zip(self.0.iter().skip(offset as usize)) {
            *byte = *stored;
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        for (stored, byte) in self.0.iter_mut().skip(offset as usize).zip(data) {
            *stored = *byte;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::irq::CountingLine;
    use std::sync::Arc;

    #[test]
    fn both_places_show_the_same_bits() {
        let mut ports = TestPorts::default();
        ports.write(0, &[1, 2, 3, 4]);
        ports.write(9, &[9]);
        ports.write(4, &[7; 4]);
        let mut data = [0; 4];
        ports.read(0, &mut data);
        assert_eq!(data, [1, 9, 3, 4]);
        let mut half = [0; 2];
        ports.read(2, &mut half);
        assert_eq!(half, [3, 4]);
    }

    #[test]
    fn the_guest_drives_lines() {
        let line = Arc::new(CountingLine::default());
        let mut irqs = TestIrqs::new(vec![IrqPin::unconnected(), IrqPin::new(line.clone())]);
        irqs.write(1, &[1]);
        assert!(line.is_asserted());
        irqs.write(0, &[0]);
        irqs.write(2, &[1]);
        irqs.write(1, &[0]);
        assert_eq!((line.is_asserted(), line.edges()), (false, 1));
    }

    #[test]
    fn memory_keeps_bytes_to_its_end() {
        let mut memory = TestMemory::default();
        memory.write(TEST_MEMORY_LEN - 2, &[1, 2]);
        memory.write(TEST_MEMORY_LEN - 1, &[3, 4]);
        let mut data = [0xff; 4];
        memory.read(TEST_MEMORY_LEN - 2, &mut data);
        assert_eq!(data, [1, 3, 0xff, 0xff]);
    }
}
