//! A PL031 real-time clock: seconds since 1970, of the host plus what the guest set.
//!
//! Facts are from Arm's technical reference manual (DDI 0224C). The alarm can be polled in the raw interrupt register; the
//! board connects no interrupt, so that nothing has to wake up for it.

use std::fmt;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::bus::BusDevice;
use crate::devices::pl011::{identification, read_word, written_word};

/// Bytes of address space that a PL031 occupies.
pub const PL031_LEN: u64 = 0x1000;

/// Register offsets (section 3.2, table 3-1).
mod reg {
    pub(super) const DATA: u64 = 0x00;
    pub(super) const MATCH: u64 = 0x04;
    pub(super) const LOAD: u64 = 0x08;
    pub(super) const CONTROL: u64 = 0x0c;
    pub(super) const MASK: u64 = 0x10;
    pub(super) const RAW: u64 = 0x14;
    pub(super) const MASKED: u64 = 0x18;
    pub(super) const CLEAR: u64 = 0x1c;
    pub(super) const ID: u64 = 0xfe0;
}

const ID: [u8; 8] = [0x31, 0x10, 0x04, 0x00, 0x0d, 0xf0, 0x05, 0xb1];

/// The clock.
pub struct Pl031 {
    /// The host's seconds since 1970.
    now: Box<dyn Fn() -> u64 + Send>,
    /// What the guest's time is ahead by; counters wrap as the chip's do.
    offset: u32,
    alarm: u32,
    /// The alarm was set, and not cleared since.
    armed: bool,
    load: u32,
    mask: bool,
}

impl Pl031 {
    /// A clock with the host's time.
    #[must_use]
    pub fn host_time() -> Self {
        Self::with_clock(|| SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()))
    }

    /// A clock whose time in seconds is `now`'s.
    #[must_use]
    pub fn with_clock(now: impl Fn() -> u64 + Send + 'static) -> Self {
        Self { now: Box::new(now), offset: 0, alarm: 0, armed: false, load: 0, mask: false }
    }

    fn time(&self) -> u32 {
        // The chip has 32 bits: they last until 2106.
        ((self.now)() as u32).wrapping_add(self.offset)
    }

    fn raised(&self) -> bool {
        self.armed && self.time() >= self.alarm
    }
}

impl BusDevice for Pl031 {
    fn name(&self) -> &'static str {
        "pl031"
    }

    fn max_access(&self) -> usize {
        4
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) {
        read_word(offset, data, |register| match register {
            reg::DATA => self.time(),
            reg::MATCH => self.alarm,
            reg::LOAD => self.load,
            // It always runs.
            reg::CONTROL => 1,
            reg::MASK => self.mask.into(),
            reg::RAW => self.raised().into(),
            reg::MASKED => (self.raised() && self.mask).into(),
            reg::ID.. => identification(&ID, register - reg::ID),
            _ => 0,
        });
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let Some(value) = written_word(offset, data) else {
            return;
        };
        match offset {
            reg::MATCH => (self.alarm, self.armed) = (value, true),
            reg::LOAD => {
                self.load = value;
                self.offset = value.wrapping_sub((self.now)() as u32);
            }
            reg::MASK => self.mask = value & 1 != 0,
            reg::CLEAR if value & 1 != 0 => self.armed = false,
            _ => {}
        }
    }
}

impl fmt::Debug for Pl031 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pl031")
            .field("time", &self.time())
            .field("alarm", &self.armed.then_some(self.alarm))
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    fn get(clock: &mut Pl031, register: u64) -> u32 {
        let mut data = [0; 4];
        clock.read(register, &mut data);
        u32::from_le_bytes(data)
    }

    fn at(seconds: u64) -> (Pl031, Arc<AtomicU64>) {
        let time = Arc::new(AtomicU64::new(seconds));
        let shared = time.clone();
        (Pl031::with_clock(move || shared.load(Ordering::SeqCst)), time)
    }

    #[test]
    fn it_shows_the_hosts_time_and_can_be_set() {
        let (mut clock, time) = at(1_000_000);
        assert_eq!(get(&mut clock, reg::DATA), 1_000_000);
        clock.write(reg::LOAD, &500u32.to_le_bytes());
        time.fetch_add(7, Ordering::SeqCst);
        assert_eq!((get(&mut clock, reg::DATA), get(&mut clock, reg::LOAD)), (507, 500));
    }

    #[test]
    fn the_alarm_can_be_polled_and_cleared() {
        let (mut clock, time) = at(100);
        assert_eq!(get(&mut clock, reg::RAW), 0);
        clock.write(reg::MATCH, &102u32.to_le_bytes());
        clock.write(reg::MASK, &[1]);
        assert_eq!(get(&mut clock, reg::MASKED), 0);
        time.store(102, Ordering::SeqCst);
        assert_eq!((get(&mut clock, reg::RAW), get(&mut clock, reg::MASKED)), (1, 1));
        clock.write(reg::CLEAR, &[1]);
        assert_eq!(get(&mut clock, reg::RAW), 0);
    }

    #[test]
    fn drivers_find_its_identification() {
        let (mut clock, _) = at(0);
        assert_eq!((get(&mut clock, reg::ID), get(&mut clock, reg::ID + 4)), (0x31, 0x10));
        assert_eq!(get(&mut clock, 0xffc), 0xb1);
    }

    #[test]
    fn any_access_anywhere_is_survived() {
        let (mut clock, _) = at(u64::MAX);
        for offset in 0..PL031_LEN {
            for size in [1, 2, 4] {
                let mut data = [0xa5; 4];
                clock.write(offset, &data[..size]);
                clock.read(offset, &mut data[..size]);
            }
        }
    }
}
