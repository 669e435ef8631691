//! An MC146818 real-time clock with CMOS memory, showing the host's time as UTC (Motorola MC146818A data sheet; PC/AT memory map).
//!
//! The guest may set the time: that moves its own clock against the host's. There are no interrupts: alarm
//! registers keep what is written and nothing more, and of the flags only "update ended" works, by polling.
//! The ACPI tables therefore give the clock no interrupt. (Linux assumes IRQ 8 then; an alarm that is set there never rings.)

use std::fmt;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::bus::BusDevice;

/// The index port, offset 0; the data port is the next one.
pub const RTC_PORT: u64 = 0x70;
/// Ports of the device.
pub const RTC_LEN: u64 = 2;
/// CMOS register of the century, for the FADT.
pub const RTC_CENTURY: u8 = 0x32;

const SECONDS: u8 = 0x00;
const MINUTES: u8 = 0x02;
const HOURS: u8 = 0x04;
const WEEKDAY: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const REG_A: u8 = 0x0a;
const REG_B: u8 = 0x0b;
const REG_C: u8 = 0x0c;
const REG_D: u8 = 0x0d;

const A_UPDATE_IN_PROGRESS: u8 = 1 << 7;
const B_SET: u8 = 1 << 7;
const B_UPDATE_IRQ: u8 = 1 << 4;
const B_BINARY: u8 = 1 << 2;
const B_24_HOURS: u8 = 1 << 1;
const C_IRQ: u8 = 1 << 7;
const C_UPDATE_ENDED: u8 = 1 << 4;
const D_VALID: u8 = 1 << 7;
/// How long before the second changes "update in progress" is shown (data sheet, "Update cycle": 244 µs).
const UPDATE_LEAD: Duration = Duration::from_micros(244);

/// A date and time as the registers hold it, before encoding. What a guest writes may be no date at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct DateTime {
    century: u8,
    year: u8,
    month: u8,
    day: u8,
    weekday: u8,
    hour: u8,
    minute: u8,
    second: u8,
}

impl DateTime {
    /// From seconds since 1970-01-01 (proleptic Gregorian calendar, UTC).
    fn from_unix(seconds: i64) -> Self {
        let (days, time) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
        // Years that begin in March make the leap day the last of the year; eras of 400 years repeat.
        let shifted = days + 719_468;
        let (era, day_of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
        let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let march_month = (5 * day_of_year + 2) / 153;
        let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
        let year = era * 400 + year_of_era + i64::from(month <= 2);
        Self {
            century: year.div_euclid(100).rem_euclid(100) as u8,
            year: year.rem_euclid(100) as u8,
            month: month as u8,
            day: (day_of_year - (153 * march_month + 2) / 5 + 1) as u8,
            weekday: ((days + 4).rem_euclid(7) + 1) as u8,
            hour: (time / 3600) as u8,
            minute: (time / 60 % 60) as u8,
            second: (time % 60) as u8,
        }
    }

    /// Seconds since 1970-01-01. A month that does not exist counts as the nearest; other
    /// excesses run over into the next unit.
    fn to_unix(self) -> i64 {
        let month = i64::from(self.month.clamp(1, 12));
        let year = i64::from(self.century) * 100 + i64::from(self.year) - i64::from(month <= 2);
        let (era, year_of_era) = (year.div_euclid(400), year.rem_euclid(400));
        let march_month = (month + 9) % 12;
        let day_of_year = (153 * march_month + 2) / 5 + i64::from(self.day) - 1;
        let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
        let days = era * 146_097 + day_of_era - 719_468;
        days * 86_400 + i64::from(self.hour) * 3600 + i64::from(self.minute) * 60 + i64::from(self.second)
    }

    fn field(&mut self, register: u8) -> Option<&mut u8> {
        Some(match register {
            SECONDS => &mut self.second,
            MINUTES => &mut self.minute,
            HOURS => &mut self.hour,
            WEEKDAY => &mut self.weekday,
            DAY => &mut self.day,
            MONTH => &mut self.month,
            YEAR => &mut self.year,
            RTC_CENTURY => &mut self.century,
            _ => return None,
        })
    }
}

/// The clock and its 128 bytes of memory.
pub struct Rtc {
    clock: Box<dyn Fn() -> SystemTime + Send>,
    /// The guest's time minus the host's, in seconds.
    offset: i64,
    /// The registers while the guest sets them.
    held: Option<DateTime>,
    index: u8,
    memory: [u8; 128],
    /// The second at which "update ended" was last reported.
    seen: i64,
}

impl Rtc {
    /// A clock that shows what `clock` says, for a machine with `below_4g` and `above_4g` bytes of RAM below and above 4 GiB,
    /// which firmware reads from CMOS memory.
    #[must_use]
    pub fn new(clock: impl Fn() -> SystemTime + Send + 'static, below_4g: u64, above_4g: u64) -> Self {
        let mut memory = [0; 128];
        memory[usize::from(REG_A)] = 0x26; // 32.768 kHz, 1.024 kHz periodic
        memory[usize::from(REG_B)] = B_24_HOURS;
        let mut store = |at: usize, bytes: usize, value: u64| {
            let value = value.min((1 << (8 * bytes)) - 1).to_le_bytes();
            memory[at..at + bytes].copy_from_slice(&value[..bytes]);
        };
        store(0x15, 2, 640); // KiB below 1 MiB
        let extended = below_4g.saturating_sub(1 << 20) >> 10; // KiB above it
        store(0x17, 2, extended);
        store(0x30, 2, extended);
        store(0x34, 2, below_4g.saturating_sub(16 << 20) >> 16); // 64 KiB units above 16 MiB
        store(0x5b, 3, above_4g >> 16);
        let mut rtc = Self { clock: Box::new(clock), offset: 0, held: None, index: 0, memory, seen: 0 };
        rtc.seen = rtc.now().0;
        rtc
    }

    /// A clock that shows the host's time.
    #[must_use]
    pub fn host_time(below_4g: u64, above_4g: u64) -> Self {
        Self::new(SystemTime::now, below_4g, above_4g)
    }

    fn host_seconds(&self) -> (i64, Duration) {
        let since = (self.clock)().duration_since(UNIX_EPOCH).unwrap_or_default();
        // A host clock beyond the year 292 billion is no time; the calendar arithmetic needs some room below that.
        let seconds = i64::try_from(since.as_secs()).unwrap_or(0).min(i64::MAX / 4);
        (seconds, Duration::from_nanos(u64::from(since.subsec_nanos())))
    }

    /// The guest's time: seconds since 1970 and the part of the second that has passed.
    fn now(&self) -> (i64, Duration) {
        let (seconds, part) = self.host_seconds();
        (seconds + self.offset, part)
    }

    fn date_time(&self) -> DateTime {
        self.held.unwrap_or_else(|| DateTime::from_unix(self.now().0))
    }

    fn set_time(&mut self, time: DateTime) {
        self.offset = time.to_unix() - self.host_seconds().0;
    }

    fn reg_b(&self) -> u8 {
        self.memory[usize::from(REG_B)]
    }

    fn encode(&self, register: u8, value: u8) -> u8 {
        let to_bcd = |v: u8| {
            if self.reg_b() & B_BINARY != 0 { v } else { ((v / 10 % 10) << 4) | (v % 10) }
        };
        if register != HOURS || self.reg_b() & B_24_HOURS != 0 {
            return to_bcd(value);
        }
        // 12-hour mode counts 12, 1, …, 11 with bit 7 for the afternoon.
        let hour = to_bcd((value + 11) % 12 + 1);
        if value >= 12 { hour | 0x80 } else { hour }
    }

    fn decode(&self, register: u8, raw: u8) -> u8 {
        let from_bcd = |v: u8| {
            if self.reg_b() & B_BINARY != 0 { v } else { (v >> 4).saturating_mul(10).saturating_add(v & 0x0f) }
        };
        if register != HOURS || self.reg_b() & B_24_HOURS != 0 {
            return from_bcd(raw);
        }
        from_bcd(raw & 0x7f) % 12 + if raw & 0x80 != 0 { 12 } else { 0 }
    }

    fn read_register(&mut self, register: u8) -> u8 {
        if let Some(value) = self.date_time().field(register).copied() {
            return self.encode(register, value);
        }
        match register {
            REG_A => {
                let updating = self.held.is_none() && self.now().1 >= Duration::from_secs(1) - UPDATE_LEAD;
                self.memory[usize::from(REG_A)] | if updating { A_UPDATE_IN_PROGRESS } else { 0 }
            }
            REG_C => {
                let now = self.now().0;
                let ended = self.held.is_none() && now != std::mem::replace(&mut self.seen, now);
                match (ended, self.reg_b() & B_UPDATE_IRQ != 0) {
                    (true, true) => C_UPDATE_ENDED | C_IRQ,
                    (true, false) => C_UPDATE_ENDED,
                    (false, _) => 0,
                }
            }
            REG_D => D_VALID,
            _ => self.memory[usize::from(register & 0x7f)],
        }
    }

    fn write_register(&mut self, register: u8, value: u8) {
        let decoded = self.decode(register, value);
        let mut time = self.date_time();
        if let Some(field) = time.field(register) {
            *field = decoded;
            if self.held.is_some() {
                self.held = Some(time);
            } else if register != WEEKDAY {
                self.set_time(time);
            }
            return;
        }
        match register {
            REG_A => self.memory[usize::from(REG_A)] = value & !A_UPDATE_IN_PROGRESS,
            REG_B => {
                let held = (value & B_SET != 0).then_some(time);
                if let (Some(set), None) = (self.held, held) {
                    self.set_time(set);
                }
                self.held = held;
                self.memory[usize::from(REG_B)] = value;
            }
            REG_C | REG_D => {}
            _ => self.memory[usize::from(register & 0x7f)] = value,
        }
    }
}

impl BusDevice for Rtc {
    fn name(&self) -> &'static str {
        "rtc"
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) {
        // The index port is write-only on a PC.
        if offset == 1 {
            data.fill(self.read_register(self.index));
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let &[value] = data else { return };
        if offset == 0 {
            self.index = value & 0x7f; // bit 7 masks NMIs, of which there are none
        } else {
            self.write_register(self.index, value);
        }
    }
}

impl fmt::Debug for Rtc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rtc")
            .field("time", &self.date_time())
            .field("offset", &self.offset)
            .field("index", &self.index)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    /// 2026-11-22 (a Sunday) 21:05:09 UTC.
    const WHEN: u64 = 1_795_381_509;

    /// A clock whose host time the test turns, in microseconds.
    fn rtc() -> (Rtc, Arc<AtomicU64>) {
        let host = Arc::new(AtomicU64::new(WHEN * 1_000_000));
        let reading = host.clone();
        let clock = move || UNIX_EPOCH + Duration::from_micros(reading.load(Ordering::SeqCst));
        (Rtc::new(clock, 3 << 30, 5 << 30), host)
    }

    fn get(rtc: &mut Rtc, register: u8) -> u8 {
        rtc.write(0, &[register]);
        let mut data = [0xff];
        rtc.read(1, &mut data);
        data[0]
    }

    fn set(rtc: &mut Rtc, register: u8, value: u8) {
        rtc.write(0, &[register | 0x80]);
        rtc.write(1, &[value]);
    }

    fn all(rtc: &mut Rtc) -> Vec<u8> {
        [RTC_CENTURY, YEAR, MONTH, DAY, WEEKDAY, HOURS, MINUTES, SECONDS].map(|r| get(rtc, r)).to_vec()
    }

    #[test]
    fn shows_the_host_time_in_each_format() {
        let (mut rtc, _) = rtc();
        assert_eq!(all(&mut rtc), [0x20, 0x26, 0x11, 0x22, 1, 0x21, 0x05, 0x09]);
        set(&mut rtc, REG_B, B_24_HOURS | B_BINARY);
        assert_eq!(all(&mut rtc), [20, 26, 11, 22, 1, 21, 5, 9]);
        set(&mut rtc, REG_B, 0);
        assert_eq!(get(&mut rtc, HOURS), 0x89);
        set(&mut rtc, REG_B, B_BINARY);
        assert_eq!(get(&mut rtc, HOURS), 0x89);
    }

    #[test]
    fn twelve_hour_clock_has_no_zero() {
        let (mut rtc, _) = rtc();
        for (hour, raw) in [(0, 12), (1, 1), (11, 11), (12, 0x8c), (13, 0x81), (23, 0x8b)] {
            set(&mut rtc, REG_B, B_24_HOURS | B_BINARY);
            set(&mut rtc, HOURS, hour);
            set(&mut rtc, REG_B, B_BINARY);
            assert_eq!(get(&mut rtc, HOURS), raw);
            set(&mut rtc, HOURS, raw);
            set(&mut rtc, REG_B, B_24_HOURS | B_BINARY);
            assert_eq!(get(&mut rtc, HOURS), hour);
        }
    }

    #[test]
    fn the_guest_sets_its_own_clock() {
        let (mut rtc, host) = rtc();
        set(&mut rtc, REG_B, B_SET | B_24_HOURS);
        let values = [
            (RTC_CENTURY, 0x20),
            (YEAR, 0x24),
            (MONTH, 0x02),
            (DAY, 0x28),
            (HOURS, 0x23),
            (MINUTES, 0x59),
            (SECONDS, 0x59),
        ];
        for (register, value) in values {
            set(&mut rtc, register, value);
        }
        host.fetch_add(5_000_000, Ordering::SeqCst);
        assert_eq!(get(&mut rtc, SECONDS), 0x59, "held while it is set");
        set(&mut rtc, REG_B, B_24_HOURS);
        assert_eq!(get(&mut rtc, SECONDS), 0x59);
        host.fetch_add(1_000_000, Ordering::SeqCst);
        // A leap day, a Thursday.
        assert_eq!(all(&mut rtc), [0x20, 0x24, 0x02, 0x29, 5, 0, 0, 0]);
    }

    #[test]
    fn update_in_progress_only_just_before_the_second() {
        let (mut rtc, host) = rtc();
        for (micros, shown) in [(0, 0), (999_000, 0), (999_756, 0x80), (999_999, 0x80), (1_000_000, 0)] {
            host.store(WHEN * 1_000_000 + micros, Ordering::SeqCst);
            assert_eq!(get(&mut rtc, REG_A) & A_UPDATE_IN_PROGRESS, shown, "{micros}");
        }
        host.store(WHEN * 1_000_000 + 999_999, Ordering::SeqCst);
        set(&mut rtc, REG_B, B_SET);
        assert_eq!(get(&mut rtc, REG_A) & A_UPDATE_IN_PROGRESS, 0);
    }

    #[test]
    fn update_ended_is_reported_once_per_second() {
        let (mut rtc, host) = rtc();
        assert_eq!(get(&mut rtc, REG_C), 0);
        host.fetch_add(1_000_000, Ordering::SeqCst);
        assert_eq!(get(&mut rtc, REG_C), C_UPDATE_ENDED);
        assert_eq!(get(&mut rtc, REG_C), 0);
        set(&mut rtc, REG_B, B_UPDATE_IRQ | B_24_HOURS);
        host.fetch_add(1_000_000, Ordering::SeqCst);
        assert_eq!(get(&mut rtc, REG_C), C_UPDATE_ENDED | C_IRQ);
    }

    #[test]
    fn memory_sizes_and_other_bytes() {
        let (mut rtc, _) = rtc();
        let size = |rtc: &mut Rtc, at: u8| u16::from(get(rtc, at)) | u16::from(get(rtc, at + 1)) << 8;
        assert_eq!(size(&mut rtc, 0x15), 640);
        assert_eq!(size(&mut rtc, 0x30), 0xffff);
        assert_eq!(u64::from(size(&mut rtc, 0x34)), ((3u64 << 30) - (16 << 20)) >> 16);
        assert_eq!(u64::from(size(&mut rtc, 0x5b)) | u64::from(get(&mut rtc, 0x5d)) << 16, (5 << 30) >> 16);
        set(&mut rtc, 0x0f, 0x0a);
        assert_eq!((get(&mut rtc, 0x0f), get(&mut rtc, REG_D)), (0x0a, 0x80));
    }

    #[test]
    fn dates_round_trip_and_nonsense_is_survived() {
        for day in (-200_000..400_000).step_by(37) {
            let seconds = day * 86_400 + 12_345;
            let date = DateTime::from_unix(seconds);
            assert_eq!(DateTime { weekday: 0, ..DateTime::from_unix(date.to_unix()) }, DateTime { weekday: 0, ..date });
            if date.century < 100 && seconds >= 0 {
                assert_eq!(date.to_unix(), seconds);
            }
        }
        let (mut rtc, _) = rtc();
        for mode in [0, B_BINARY, B_24_HOURS, B_BINARY | B_24_HOURS] {
            for register in 0..0x80 {
                for value in [0, 0x7f, 0x99, 0xff] {
                    set(&mut rtc, REG_B, mode);
                    set(&mut rtc, register, value);
                    all(&mut rtc);
                }
            }
        }
    }
}
