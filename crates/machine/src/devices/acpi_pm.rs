//! The ACPI fixed hardware: PM1 event and control registers and the power management timer (ACPI 6.5, section 4.8.3).
//!
//! A guest switches the machine off by writing SLP_EN with the type of S5 to PM1 control; no other sleep state
//! exists. The host can press the power button. The system is always in ACPI mode (SCI_EN reads one, there is no SMI
//! command port). The timer's carry (TMR_STS) is never reported, as no guest in use asks for it.

use std::time::Instant;

use crate::bus::BusDevice;
use crate::control::{Control, Outcome};
use crate::irq::IrqPin;

/// First port of the block: PM1 event registers; where QEMU's boards have it, too.
pub const PM_BASE: u16 = 0x600;
/// Ports of the block.
pub const PM_LEN: u64 = 16;
/// PM1 control register.
pub const PM1_CONTROL: u16 = PM_BASE + 4;
/// Power management timer, 32 bits at 3.579545 MHz.
pub const PM_TIMER: u16 = PM_BASE + 8;
/// The sleep type of S5 (soft off), for `\_S5` in the DSDT. QEMU's value: guest programs use it without asking the DSDT.
pub const SLEEP_TYPE_S5: u8 = 0;
/// The system control interrupt.
pub const SCI_IRQ: u32 = 9;

const TIMER_HZ: u128 = 3_579_545;
const POWER_BUTTON: u16 = 1 << 8;
/// Bits of PM1 enable that keep what is written: timer, global lock, power button, sleep button, clock. All but the power
/// button never happen, but operating systems enable them and complain if that does not stay.
const ENABLES: u16 = 1 << 0 | 1 << 5 | POWER_BUTTON | 1 << 9 | 1 << 10;
const SCI_ENABLED: u16 = 1 << 0;

/// The register block.
#[derive(Debug)]
pub struct AcpiPm {
    control: Control,
    sci: IrqPin,
    started: Instant,
    status: u16,
    enable: u16,
    pm1_control: u16,
}

impl AcpiPm {
    /// A block that switches off the machine of `control` and interrupts with `sci`.
    #[must_use]
    pub fn new(control: Control, sci: IrqPin) -> Self {
        Self { control, sci, started: Instant::now(), status: 0, enable: 0, pm1_control: SCI_ENABLED }
    }

    /// Presses the power button: asks the guest's operating system to shut down. A guest without ACPI does not notice.
    pub fn press_power_button(&mut self) {
        self.status |= POWER_BUTTON;
        self.update();
    }

    fn update(&mut self) {
        self.sci.set(self.status & self.enable != 0);
    }

    fn timer(&self) -> u32 {
        (self.started.elapsed().as_nanos() * TIMER_HZ / 1_000_000_000) as u32
    }

    fn image(&self) -> [u8; PM_LEN as usize] {
        let mut image = [0; PM_LEN as usize];
        image[0..2].copy_from_slice(&self.status.to_le_bytes());
        image[2..4].copy_from_slice(&self.enable.to_le_bytes());
        image[4..6].copy_from_slice(&self.pm1_control.to_le_bytes());
        image[8..12].copy_from_slice(&self.timer().to_le_bytes());
        image
    }

    fn write_byte(&mut self, offset: u64, value: u8) {
        let shift = (offset & 1) * 8;
        let (value, kept) = (u16::from(value) << shift, 0xff00u16.rotate_left(shift as u32));
        match offset & !1 {
            0 => self.status &= !value,
            2 => self.enable = (self.enable & kept | value) & ENABLES,
            4 => {
                // SLP_EN (bit 13) is write-only.
                self.pm1_control = self.pm1_control & kept | value & !(1 << 13) | SCI_ENABLED;
                let sleep_type = (self.pm1_control >> 10 & 7) as u8;
                if value & 1 << 13 != 0 && sleep_type == SLEEP_TYPE_S5 {
                    self.control.finish(Outcome::Shutdown);
                }
            }
            _ => {}
        }
    }
}

impl BusDevice for AcpiPm {
    fn name(&self) -> &'static str {
        "ACPI PM"
    }

    fn max_access(&self) -> usize {
        4
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) {
        // One image per access, so that the timer does not tear.
        for (byte, value) in data.iter_mut().zip(self.image().into_iter().skip(offset as usize)) {
            *byte = value;
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        for (at, &value) in (offset..).zip(data) {
            self.write_byte(at, value);
        }
        self.update();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::irq::CountingLine;
    use std::sync::Arc;

    fn pm() -> (AcpiPm, Control, Arc<CountingLine>) {
        let (control, line) = (Control::new(), Arc::new(CountingLine::default()));
        (AcpiPm::new(control.clone(), IrqPin::new(line.clone())), control, line)
    }

    fn get<const N: usize>(pm: &mut AcpiPm, offset: u64) -> [u8; N] {
        let mut data = [0xff; N];
        pm.read(offset, &mut data);
        data
    }

    #[test]
    fn only_s5_with_sleep_enable_switches_off() {
        let (mut pm, control, _) = pm();
        pm.write(4, &(u16::from(SLEEP_TYPE_S5) << 10).to_le_bytes());
        pm.write(4, &(3 << 10 | 1 << 13 | 1u16).to_le_bytes());
        assert_eq!(control.outcome(), None);
        pm.write(4, &(u16::from(SLEEP_TYPE_S5) << 10 | 1 << 13 | 1).to_le_bytes());
        assert_eq!(control.outcome(), Some(Outcome::Shutdown));
        assert_eq!(get(&mut pm, 4), [1, 0]);
    }

    #[test]
    fn a_write_of_the_high_byte_alone_switches_off() {
        let (mut pm, control, _) = pm();
        pm.write(5, &[SLEEP_TYPE_S5 << 2 | 0x20]);
        assert_eq!(control.outcome(), Some(Outcome::Shutdown));
    }

    #[test]
    fn the_power_button_interrupts_until_it_is_acknowledged() {
        let (mut pm, _, line) = pm();
        pm.press_power_button();
        assert!(!line.is_asserted(), "not enabled yet");
        pm.write(2, &[0xff, 0xff]);
        assert!(line.is_asserted());
        assert_eq!(get(&mut pm, 0), [0, 1, 0x21, 7]);
        pm.write(0, &[0xff, 0]);
        assert!(line.is_asserted());
        pm.write(0, &[0, 1]);
        assert!(!line.is_asserted());
        assert_eq!(get(&mut pm, 0), [0, 0]);
    }

    #[test]
    fn the_timer_runs() {
        let (mut pm, _, _) = pm();
        let first = u32::from_le_bytes(get(&mut pm, 8));
        while u32::from_le_bytes(get(&mut pm, 8)) == first {}
    }

    #[test]
    fn registers_that_do_not_exist_read_zero() {
        let (mut pm, _, _) = pm();
        pm.write(12, &[1, 2, 3, 4]);
        assert_eq!(get(&mut pm, 12), [0; 4]);
    }
}
