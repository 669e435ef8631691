//! The I/O APIC as a pure state machine (Intel 82093AA data sheet; the EOI register is that of the ICH families), for
//! accelerators that have no I/O APIC of their own.
//!
//! It knows no CPU: what it sends is a message-signalled interrupt, whose address and data have the same fields as a redirection
//! entry, for [`IrqHandle::signal_msi`](vm_accel::IrqHandle::signal_msi) or a software local APIC. Whoever owns it tells it of pins and of the ends of level-triggered
//! interrupts. It must never panic on what a guest writes.

use vm_accel::MsiMessage;

/// Number of interrupt pins.
pub const PINS: usize = 24;
/// Bytes of registers to map, from the base address on.
pub const IOAPIC_LEN: u64 = 0x100;

const SELECT: u64 = 0x00;
const WINDOW: u64 = 0x10;
const EOI: u64 = 0x40;

const REG_ID: u8 = 0x00;
const REG_VERSION: u8 = 0x01;
const REG_ARBITRATION: u8 = 0x02;
const REG_ENTRIES: u8 = 0x10;
/// Version with an EOI register, and the number of the last pin.
const VERSION: u32 = 0x20 | (PINS as u32 - 1) << 16;
const ID_BITS: u32 = 0x0f00_0000;

const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
/// Vector, delivery mode, destination mode, polarity, trigger mode, mask; destination.
const WRITABLE: u64 = 0xff00_0000_0001_afff;

/// Where messages to local APICs go (SDM volume 3A, "Message Address Register Format").
const MSI_ADDRESS: u64 = 0xfee0_0000;
const MSI_LOGICAL: u64 = 1 << 2;
const MSI_REDIRECT: u64 = 1 << 3;
const MSI_ASSERT: u32 = 1 << 14;

/// An I/O APIC with 24 pins.
#[derive(Debug, Clone)]
pub struct IoApic {
    id: u32,
    select: u8,
    entries: [u64; PINS],
    /// Levels of the pins.
    lines: u32,
}

impl Default for IoApic {
    fn default() -> Self {
        Self::new(0)
    }
}

impl IoApic {
    /// An I/O APIC after a reset: all pins masked. Of `id`, four bits.
    #[must_use]
    pub fn new(id: u8) -> Self {
        Self { id: u32::from(id) << 24 & ID_BITS, select: 0, entries: [MASKED; PINS], lines: 0 }
    }

    /// The guest reads at `offset` from the base; all registers are 32 bits wide, and other accesses see the bytes of the
    /// register that they fall into.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let value = match offset & !3 {
            SELECT => u32::from(self.select),
            WINDOW => self.register(),
            _ => 0,
        };
        let bytes = value.to_le_bytes();
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = bytes.get((offset & 3) as usize + i).copied().unwrap_or(0);
        }
    }

    fn register(&self) -> u32 {
        match self.select {
            REG_ID | REG_ARBITRATION => self.id,
            REG_VERSION => VERSION,
            _ => self.entry_half().map_or(0, |(pin, shift)| (self.entries[pin] >> shift) as u32),
        }
    }

    /// The pin whose entry is selected, and which half.
    fn entry_half(&self) -> Option<(usize, u32)> {
        let index = usize::from(self.select.checked_sub(REG_ENTRIES)?);
        (index < 2 * PINS).then_some((index / 2, index as u32 % 2 * 32))
    }

    /// The guest writes `data` at `offset` from the base. Answers what is to be sent: after a change of an entry the one of its pin, or
    /// through the EOI register several.
    ///
    /// Writes count if they begin at a register and have one byte at least; the upper bytes of a shorter one are zero.
    #[must_use]
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Vec<MsiMessage> {
        if data.is_empty() {
            return Vec::new();
        }
        let mut bytes = [0; 4];
        for (to, from) in bytes.iter_mut().zip(data) {
            *to = *from;
        }
        let value = u32::from_le_bytes(bytes);
        match offset {
            SELECT => self.select = value as u8,
            WINDOW if self.select == REG_ID => self.id = value & ID_BITS,
            WINDOW => {
                if let Some((pin, shift)) = self.entry_half() {
                    return self.write_entry(pin, shift, value).into_iter().collect();
                }
            }
            EOI => return self.end_of_interrupt(value as u8),
            _ => {}
        }
        Vec::new()
    }

    fn write_entry(&mut self, pin: usize, shift: u32, value: u32) -> Option<MsiMessage> {
        let half = u64::from(u32::MAX) << shift;
        let writable = WRITABLE & half;
        let entry = &mut self.entries[pin];
        *entry = *entry & !writable | u64::from(value) << shift & writable;
        if *entry & LEVEL == 0 {
            // Remote IRR means nothing for an edge; software relies on this to forget an interrupt that was never ended.
            *entry &= !REMOTE_IRR;
            return None;
        }
        self.send_level(pin)
    }

    /// Drives a pin (active means `true`, whatever the entry's polarity says: that is wiring). Answers what is to be sent. Pins
    /// that do not exist are ignored.
    #[must_use]
    pub fn set_irq(&mut self, pin: usize, level: bool) -> Option<MsiMessage> {
        let entry = *self.entries.get(pin)?;
        let bit = 1 << pin;
        let was = self.lines & bit != 0;
        self.lines = if level { self.lines | bit } else { self.lines & !bit };
        if entry & LEVEL != 0 {
            self.send_level(pin)
        } else {
            // "Interrupt Mask": edges while masked are lost.
            (level && !was && entry & MASKED == 0).then(|| message(entry))
        }
    }

    /// Sends a level-triggered interrupt if its pin is active and the last one was ended.
    fn send_level(&mut self, pin: usize) -> Option<MsiMessage> {
        let entry = self.entries[pin];
        if self.lines >> pin & 1 == 0 || entry & (MASKED | REMOTE_IRR) != 0 {
            return None;
        }
        self.entries[pin] |= REMOTE_IRR;
        Some(message(entry))
    }

    /// A local APIC ended a level-triggered interrupt with this vector. Answers those that are to be sent again, because their
    /// pins are still active.
    #[must_use]
    pub fn end_of_interrupt(&mut self, vector: u8) -> Vec<MsiMessage> {
        let ended = |entry: u64| entry as u8 == vector && entry & (LEVEL | REMOTE_IRR) == LEVEL | REMOTE_IRR;
        (0..PINS)
            .filter_map(|pin| {
                if !ended(self.entries[pin]) {
                    return None;
                }
                self.entries[pin] &= !REMOTE_IRR;
                self.send_level(pin)
            })
            .collect()
    }

    /// The pins that are not masked, or whose interrupt has not ended, and what they send. For accelerators that want to know.
    pub fn routes(&self) -> impl Iterator<Item = (usize, MsiMessage)> + '_ {
        let live = |&(_, &entry): &(usize, &u64)| entry & (MASKED | REMOTE_IRR) != MASKED;
        let entries = self.entries.iter().enumerate().filter(live);
        entries.map(|(pin, &entry)| (pin, message(entry)))
    }

    /// Vectors whose ends this must hear of: those of level-triggered pins. For accelerators that want to be told.
    pub fn level_vectors(&self) -> impl Iterator<Item = u8> + '_ {
        self.entries
            .iter()
            .filter(|&&entry| entry & LEVEL != 0 && entry & (MASKED | REMOTE_IRR) != MASKED)
            .map(|&entry| entry as u8)
    }
}

/// A redirection entry as a message.
fn message(entry: u64) -> MsiMessage {
    let mode = entry as u32 >> 8 & 7;
    let mut address = MSI_ADDRESS | entry >> 56 << 12;
    if entry & 1 << 11 != 0 {
        address |= MSI_LOGICAL;
    }
    if mode == 1 {
        address |= MSI_REDIRECT;
    }
    let level = if entry & LEVEL != 0 { LEVEL as u32 } else { 0 };
    MsiMessage { address, data: entry as u32 & 0x7ff | level | MSI_ASSERT, device_id: None }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(io: &mut IoApic, register: u8, value: u32) -> Vec<MsiMessage> {
        assert_eq!(io.write(SELECT, &[register, 0, 0, 0]), []);
        io.write(WINDOW, &value.to_le_bytes())
    }

    fn read(io: &mut IoApic, register: u8) -> u32 {
        assert_eq!(io.write(SELECT, &[register]), []);
        let mut data = [0; 4];
        io.read(WINDOW, &mut data);
        u32::from_le_bytes(data)
    }

    fn entry(io: &mut IoApic, pin: u8, low: u32) -> Vec<MsiMessage> {
        write(io, REG_ENTRIES + 2 * pin, low)
    }

    fn remote_irr(io: &mut IoApic, pin: u8) -> bool {
        read(io, REG_ENTRIES + 2 * pin) & REMOTE_IRR as u32 != 0
    }

    #[test]
    fn routes_are_of_pins_that_can_send_or_were_not_ended() {
        let mut io = IoApic::new(0);
        assert_eq!(io.routes().count(), 0);
        assert_eq!(entry(&mut io, 3, LEVEL_77), []);
        assert_eq!(io.routes().collect::<Vec<_>>(), [(3, SENT_77)]);
        assert_eq!(io.set_irq(3, true), Some(SENT_77));
        assert_eq!(entry(&mut io, 3, LEVEL_77 | MASKED as u32), []);
        assert_eq!(io.routes().collect::<Vec<_>>(), [(3, SENT_77)]);
        assert_eq!(io.end_of_interrupt(0x77), []);
        assert_eq!(io.routes().count(), 0);
    }

    const LEVEL_77: u32 = 0x8077;
    const SENT_77: MsiMessage = sent(0xfee0_0000, 0xc077);

    const fn sent(address: u64, data: u32) -> MsiMessage {
        MsiMessage { address, data, device_id: None }
    }

    #[test]
    fn registers_have_the_bits_of_the_data_sheet() {
        let mut io = IoApic::new(2);
        assert_eq!(read(&mut io, REG_ID), 0x0200_0000);
        assert_eq!(write(&mut io, REG_ID, 0xffff_ffff), []);
        assert_eq!((read(&mut io, REG_ID), read(&mut io, REG_ARBITRATION)), (0x0f00_0000, 0x0f00_0000));
        assert_eq!(write(&mut io, REG_ARBITRATION, 0), []);
        assert_eq!(read(&mut io, REG_ARBITRATION), 0x0f00_0000);
        assert_eq!(write(&mut io, REG_VERSION, 0), []);
        assert_eq!(read(&mut io, REG_VERSION), 0x0017_0020);
        for pin in 0..PINS as u8 {
            assert_eq!(read(&mut io, REG_ENTRIES + 2 * pin), 0x0001_0000);
        }
        assert_eq!(write(&mut io, REG_ENTRIES, 0xffff_ffff), []);
        assert_eq!(write(&mut io, REG_ENTRIES + 1, 0xffff_ffff), []);
        assert_eq!((read(&mut io, REG_ENTRIES), read(&mut io, REG_ENTRIES + 1)), (0x0001_afff, 0xff00_0000));
        for absent in [3, 0x40, 0xff] {
            assert_eq!(write(&mut io, absent, 0xffff_ffff), []);
            assert_eq!(read(&mut io, absent), 0);
        }
        assert_eq!(io.write(0x44, &[1, 2, 3, 4]), []);
        assert_eq!(io.write(WINDOW, &[]), []);
    }

    #[test]
    fn each_edge_is_one_message_and_masked_edges_are_lost() {
        let mut io = IoApic::default();
        assert_eq!(entry(&mut io, 14, 0x76), []);
        assert_eq!(io.set_irq(14, true), Some(sent(0xfee0_0000, 0x4076)));
        assert_eq!(io.set_irq(14, true), None);
        assert_eq!(io.set_irq(14, false), None);
        assert_eq!(entry(&mut io, 14, 0x1_0076), []);
        assert_eq!(io.set_irq(14, true), None);
        assert_eq!(entry(&mut io, 14, 0x76), []);
        assert_eq!(io.set_irq(24, true), None);
    }

    #[test]
    fn a_level_is_sent_once_until_its_end_and_again_if_it_stays() {
        let mut io = IoApic::default();
        assert_eq!(entry(&mut io, 14, LEVEL_77), []);
        assert_eq!(io.set_irq(14, true), Some(SENT_77));
        assert!(remote_irr(&mut io, 14));
        assert_eq!(io.set_irq(14, false), None);
        assert_eq!(io.set_irq(14, true), None, "coalesced");
        assert_eq!(io.end_of_interrupt(0x78), []);
        assert_eq!(io.end_of_interrupt(0x77), [SENT_77]);
        assert_eq!(io.set_irq(14, false), None);
        assert_eq!(io.end_of_interrupt(0x77), []);
        assert!(!remote_irr(&mut io, 14));
    }

    #[test]
    fn an_active_level_is_sent_when_it_is_unmasked() {
        let mut io = IoApic::default();
        assert_eq!(entry(&mut io, 14, 0x1_0000 | LEVEL_77), []);
        assert_eq!(io.set_irq(14, true), None);
        assert_eq!(entry(&mut io, 14, LEVEL_77), [SENT_77]);
        assert_eq!(entry(&mut io, 14, 0x1_0000 | LEVEL_77), []);
        assert_eq!(io.end_of_interrupt(0x77), [], "masked by its handler");
        assert_eq!(entry(&mut io, 14, LEVEL_77), [SENT_77]);
    }

    #[test]
    fn changing_the_destination_of_a_sent_interrupt_does_not_send_it_again() {
        let mut io = IoApic::default();
        assert_eq!(entry(&mut io, 14, LEVEL_77), []);
        assert_eq!(io.set_irq(14, true), Some(SENT_77));
        assert_eq!(write(&mut io, REG_ENTRIES + 29, 0x0100_0000), []);
        assert!(remote_irr(&mut io, 14));
        assert_eq!(io.end_of_interrupt(0x77), [MsiMessage { address: 0xfee0_1000, ..SENT_77 }]);
    }

    #[test]
    fn switching_to_edge_forgets_an_interrupt_that_was_not_ended() {
        let mut io = IoApic::default();
        assert_eq!(entry(&mut io, 14, LEVEL_77), []);
        assert_eq!(io.set_irq(14, true), Some(SENT_77));
        assert_eq!(entry(&mut io, 14, 0x1_0077), []);
        assert!(!remote_irr(&mut io, 14));
        assert_eq!(entry(&mut io, 14, LEVEL_77), [SENT_77]);
    }

    #[test]
    fn all_pins_with_the_vector_end_at_once_also_by_register() {
        let mut io = IoApic::default();
        for pin in [3, 9] {
            assert_eq!(entry(&mut io, pin, LEVEL_77), []);
            assert_eq!(io.set_irq(pin.into(), true), Some(SENT_77));
        }
        assert_eq!(io.level_vectors().collect::<Vec<_>>(), [0x77, 0x77]);
        assert_eq!(io.write(EOI, &[0x77, 0, 0, 0]), [SENT_77, SENT_77]);
    }

    #[test]
    fn messages_carry_destination_and_modes() {
        let mut io = IoApic::default();
        assert_eq!(write(&mut io, REG_ENTRIES + 1, 0x0d00_0000), []);
        assert_eq!(write(&mut io, REG_ENTRIES, 0x0000_0986), []);
        assert_eq!(io.set_irq(0, true), Some(sent(0xfee0_d00c, 0x4186)));
        assert_eq!(io.set_irq(0, false), None);
        assert_eq!(write(&mut io, REG_ENTRIES, 0x0000_0700), []);
        assert_eq!(io.set_irq(0, true), Some(sent(0xfee0_d000, 0x4700)));
    }
}
