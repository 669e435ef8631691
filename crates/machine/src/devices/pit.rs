//! The 8254 programmable interval timer as a pure state machine (Intel 8254 data sheet), with the part of port 61h that gates and shows
//! its third channel, for accelerators that have no PIT of their own.
//!
//! It has no clock: every call takes the time in nanoseconds from any fixed moment, never going back. Counts are computed from
//! it when somebody looks, so that a guest that measures (Linux calibrates the TSC against channel 2) sees them run smoothly. The owner
//! asks for [`Pit::next_deadline`] and, when that is over, for the edges of channel 0 ([`Pit::advance`]), which is interrupt line 0.
//!
//! One thing differs from the chip: a new count written to a running counter in modes 2 and 3 counts at once and not from the end of the period.

/// The chip's clock in hertz.
pub const FREQUENCY: u64 = 1_193_182;
/// First port: the three counters, then the control register.
pub const PIT_PORT: u16 = 0x40;
/// Ports of the chip.
pub const PIT_LEN: u16 = 4;
/// The interrupt line of channel 0.
pub const PIT_IRQ: u8 = 0;

const NANOS: u128 = 1_000_000_000;

/// Port 61h: gate of channel 2.
const GATE_2: u8 = 1 << 0;
/// Port 61h: what software keeps in it: gate, speaker, two NMI enables.
const CONTROL_BITS: u8 = 0x0f;
/// Port 61h: toggles as memory refresh does.
const REFRESH: u8 = 1 << 4;
/// Port 61h: output of channel 2.
const OUT_2: u8 = 1 << 5;

/// Which bytes of a count a port access means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Access {
    Low,
    High,
    /// Low, then high.
    Both,
}

#[derive(Debug, Clone)]
struct Channel {
    /// 0 to 5.
    mode: u8,
    bcd: bool,
    access: Access,
    gate: bool,
    /// The count to begin from, 1 to 65536 (10000 in BCD); none since the mode was set.
    reload: Option<u32>,
    /// Low byte of a count half written.
    low: Option<u8>,
    /// The high byte is read next.
    high_next: bool,
    latched_count: Option<u16>,
    latched_status: Option<u8>,
    /// The tick at which counting began, while it counts.
    start: Option<u64>,
    /// Ticks counted before the gate stopped it.
    counted: u64,
}

impl Channel {
    fn new(gate: bool) -> Self {
        Self {
            mode: 3,
            bcd: false,
            access: Access::Both,
            gate,
            reload: None,
            low: None,
            high_next: false,
            latched_count: None,
            latched_status: None,
            start: None,
            counted: 0,
        }
    }

    /// Modes 1 and 5: the gate's edge starts them.
    fn starts_by_gate(&self) -> bool {
        matches!(self.mode, 1 | 5)
    }

    /// Modes 2 and 3: the count begins again at its end.
    fn is_periodic(&self) -> bool {
        matches!(self.mode, 2 | 3)
    }

    fn set_mode(&mut self, mode: u8, access: Access, bcd: bool) {
        *self = Self { mode, access, bcd, ..Self::new(self.gate) };
    }

    /// Ticks since counting began.
    fn elapsed(&self, tick: u64) -> u64 {
        self.counted + self.start.map_or(0, |start| tick.saturating_sub(start))
    }

    /// Whether a count was loaded and, where the gate must start it, it was.
    fn is_loaded(&self) -> bool {
        self.reload.is_some() && (!self.starts_by_gate() || self.start.is_some())
    }

    fn restart(&mut self, tick: u64) {
        self.counted = 0;
        self.start = self.gate.then_some(tick);
    }

    fn load(&mut self, value: u16, tick: u64) {
        let count = if self.bcd {
            (0..4).rev().fold(0, |sum, digit| sum * 10 + u32::from(value >> (4 * digit) & 15))
        } else {
            u32::from(value)
        };
        self.reload = Some(if count == 0 { self.modulus() } else { count });
        if !self.starts_by_gate() {
            self.restart(tick);
        }
    }

    fn modulus(&self) -> u32 {
        if self.bcd { 10_000 } else { 0x1_0000 }
    }

    fn set_gate(&mut self, gate: bool, tick: u64) {
        if gate == self.gate {
            return;
        }
        self.gate = gate;
        match (self.mode, gate) {
            // The edge starts them, and starts them again; the level does not matter.
            (1 | 5, true) if self.reload.is_some() => {
                self.counted = 0;
                self.start = Some(tick);
            }
            (1 | 5, _) => {}
            (2 | 3, true) if self.reload.is_some() => self.restart(tick),
            (_, true) if self.reload.is_some() => self.start = Some(tick),
            (_, true) => {}
            (_, false) => {
                self.counted = self.elapsed(tick);
                self.start = None;
            }
        }
    }

    /// The count as it is read.
    fn count(&self, tick: u64) -> u16 {
        let Some(reload) = self.reload else { return 0 };
        let (n, modulus, elapsed) = (u64::from(reload), u64::from(self.modulus()), self.elapsed(tick));
        let count = match self.mode {
            2 => n - elapsed % n,
            // It counts down by two, twice.
            3 => n - 2 * elapsed % n,
            _ if !self.is_loaded() => n,
            // Past zero it goes on from the top.
            _ => (n % modulus + modulus - elapsed % modulus) % modulus,
        } % modulus;
        if self.bcd {
            (0..4).fold(0, |bcd, digit| bcd | (count / 10u64.pow(digit) % 10) << (4 * digit)) as u16
        } else {
            count as u16
        }
    }

    /// The output.
    fn output(&self, tick: u64) -> bool {
        let Some(reload) = self.reload.filter(|_| self.is_loaded()) else {
            return self.mode != 0;
        };
        let (n, elapsed) = (u64::from(reload), self.elapsed(tick));
        match self.mode {
            0 | 1 => elapsed >= n,
            2 => !self.gate || elapsed % n != n - 1,
            3 => !self.gate || elapsed % n < n.div_ceil(2),
            _ => elapsed != n,
        }
    }

    /// How often the output has risen since counting began.
    fn rises(&self, tick: u64) -> u64 {
        let Some(reload) = self.reload.filter(|_| self.is_loaded()) else {
            return 0;
        };
        let (n, elapsed) = (u64::from(reload), self.elapsed(tick));
        match self.mode {
            0 | 1 => u64::from(elapsed >= n),
            2 | 3 => elapsed / n,
            _ => u64::from(elapsed > n),
        }
    }

    /// The tick of the next rise of the output.
    fn next_rise(&self, tick: u64) -> Option<u64> {
        let (reload, start) = (u64::from(self.reload?), self.start?);
        let rises = self.rises(tick);
        let at = match self.mode {
            _ if self.is_periodic() => reload * (rises + 1),
            _ if rises > 0 => return None,
            0 | 1 => reload,
            _ => reload + 1,
        };
        start.checked_add(at.saturating_sub(self.counted))
    }

    fn latch_count(&mut self, tick: u64) {
        // "Counter Latch Command": a second one before the first was read is ignored.
        if self.latched_count.is_none() {
            self.latched_count = Some(self.count(tick));
        }
    }

    fn latch_status(&mut self, tick: u64) {
        if self.latched_status.is_none() {
            let access = match self.access {
                Access::Low => 1,
                Access::High => 2,
                Access::Both => 3,
            };
            let null = u8::from(self.reload.is_none());
            self.latched_status =
                Some(u8::from(self.output(tick)) << 7 | null << 6 | access << 4 | self.mode << 1 | u8::from(self.bcd));
        }
    }

    fn read(&mut self, tick: u64) -> u8 {
        if let Some(status) = self.latched_status.take() {
            return status;
        }
        let [low, high] = self.latched_count.unwrap_or_else(|| self.count(tick)).to_le_bytes();
        let (value, done) = match self.access {
            Access::Low => (low, true),
            Access::High => (high, true),
            Access::Both => {
                self.high_next = !self.high_next;
                if self.high_next { (low, false) } else { (high, true) }
            }
        };
        if done {
            self.latched_count = None;
        }
        value
    }

    fn write(&mut self, value: u8, tick: u64) {
        match (self.access, self.low.take()) {
            (Access::Low, _) => self.load(value.into(), tick),
            (Access::High, _) => self.load(u16::from(value) << 8, tick),
            (Access::Both, None) => {
                self.low = Some(value);
                // Writing the first byte stops mode 0 ("Mode 0: Interrupt on Terminal Count").
                if self.mode == 0 {
                    self.reload = None;
                    self.start = None;
                    self.counted = 0;
                }
            }
            (Access::Both, Some(low)) => self.load(u16::from_le_bytes([low, value]), tick),
        }
    }
}

/// The timer chip and port 61h.
#[derive(Debug, Clone)]
pub struct Pit {
    channels: [Channel; 3],
    /// Rises of channel 0 that [`Pit::advance`] has answered, since its count began.
    taken: u64,
    control: u8,
    refresh: bool,
}

impl Default for Pit {
    fn default() -> Self {
        Self::new()
    }
}

impl Pit {
    /// The chip after power-up: no channel counts; channel 2's gate is closed.
    #[must_use]
    pub fn new() -> Self {
        Self {
            channels: [Channel::new(true), Channel::new(true), Channel::new(false)],
            taken: 0,
            control: 0,
            refresh: false,
        }
    }

    /// IN from port 40h to 43h, `offset` from the first; the control register reads as all ones.
    pub fn read(&mut self, offset: u16, now_ns: u64) -> u8 {
        let tick = tick(now_ns);
        match self.channels.get_mut(usize::from(offset)) {
            Some(channel) => channel.read(tick),
            None => 0xff,
        }
    }

    /// OUT to port 40h to 43h, `offset` from the first. Call [`Pit::advance`] before, so that no edge is lost; the deadline changes.
    pub fn write(&mut self, offset: u16, value: u8, now_ns: u64) {
        let tick = tick(now_ns);
        match self.channels.get_mut(usize::from(offset)) {
            Some(channel) => channel.write(value, tick),
            None if offset == 3 => self.write_control(value, tick),
            None => return,
        }
        if offset == 0 || offset == 3 && value >> 6 == 0 && value & 0x30 != 0 {
            self.taken = self.channels[0].rises(tick);
        }
    }

    fn write_control(&mut self, value: u8, tick: u64) {
        let number = usize::from(value >> 6);
        let Some(channel) = self.channels.get_mut(number) else {
            return self.read_back(value, tick);
        };
        let access = match value >> 4 & 3 {
            0 => return channel.latch_count(tick),
            1 => Access::Low,
            2 => Access::High,
            _ => Access::Both,
        };
        // Modes 6 and 7 are 2 and 3.
        let mode = match value >> 1 & 7 {
            mode @ 6..=7 => mode - 4,
            mode => mode,
        };
        channel.set_mode(mode, access, value & 1 != 0);
    }

    fn read_back(&mut self, value: u8, tick: u64) {
        for (number, channel) in self.channels.iter_mut().enumerate() {
            if value & 2 << number != 0 {
                if value & 0x20 == 0 {
                    channel.latch_count(tick);
                }
                if value & 0x10 == 0 {
                    channel.latch_status(tick);
                }
            }
        }
    }

    /// IN from port 61h.
    pub fn read_port_61(&mut self, now_ns: u64) -> u8 {
        self.refresh = !self.refresh;
        let output = self.channels[2].output(tick(now_ns));
        self.control | if self.refresh { REFRESH } else { 0 } | if output { OUT_2 } else { 0 }
    }

    /// OUT to port 61h.
    pub fn write_port_61(&mut self, value: u8, now_ns: u64) {
        self.control = value & CONTROL_BITS;
        self.channels[2].set_gate(value & GATE_2 != 0, tick(now_ns));
    }

    /// How often interrupt line 0 has risen since the last call. The owner pulses the line, once or as often.
    #[must_use]
    pub fn advance(&mut self, now_ns: u64) -> u64 {
        let rises = self.channels[0].rises(tick(now_ns));
        let new = rises.saturating_sub(self.taken);
        self.taken = rises;
        new
    }

    /// When interrupt line 0 next rises, after `now_ns`; `None` if it does not.
    #[must_use]
    pub fn next_deadline(&self, now_ns: u64) -> Option<u64> {
        let at = self.channels[0].next_rise(tick(now_ns))?;
        u64::try_from((u128::from(at) * NANOS).div_ceil(u128::from(FREQUENCY))).ok()
    }
}

/// The chip's clock at a time.
fn tick(now_ns: u64) -> u64 {
    (u128::from(now_ns) * u128::from(FREQUENCY) / NANOS) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first nanosecond of a tick.
    fn ns(tick: u64) -> u64 {
        (u128::from(tick) * NANOS).div_ceil(u128::from(FREQUENCY)) as u64
    }

    fn program(pit: &mut Pit, channel: u8, mode: u8, count: u16, tick: u64) {
        pit.write(3, channel << 6 | 0x30 | mode << 1, ns(tick));
        let [low, high] = count.to_le_bytes();
        pit.write(channel.into(), low, ns(tick));
        pit.write(channel.into(), high, ns(tick));
    }

    fn latch(pit: &mut Pit, channel: u8, tick: u64) -> u16 {
        pit.write(3, channel << 6, ns(tick));
        let low = pit.read(channel.into(), ns(tick));
        u16::from_le_bytes([low, pit.read(channel.into(), ns(tick))])
    }

    #[test]
    fn rate_generator_interrupts_every_count() {
        for mode in [2, 3, 6, 7] {
            let mut pit = Pit::new();
            program(&mut pit, 0, mode, 1000, 50);
            assert_eq!(pit.next_deadline(ns(50)), Some(ns(1050)));
            assert_eq!(pit.advance(ns(1049)), 0);
            assert_eq!(pit.advance(ns(1050)), 1);
            assert_eq!(pit.next_deadline(ns(1050)), Some(ns(2050)));
            assert_eq!(pit.advance(ns(4049)), 2);
            assert_eq!(pit.advance(ns(4049)), 0);
        }
    }

    #[test]
    fn a_deadline_is_over_when_it_says() {
        let mut pit = Pit::new();
        program(&mut pit, 0, 2, 11932, 3);
        let mut now = 0;
        for _ in 0..1000 {
            now = pit.next_deadline(now).unwrap();
            assert_eq!(pit.advance(now - 1), 0);
            assert_eq!(pit.advance(now), 1);
        }
    }

    #[test]
    fn one_shot_interrupts_once() {
        for (mode, delay) in [(0, 500), (4, 501)] {
            let mut pit = Pit::new();
            program(&mut pit, 0, mode, 500, 0);
            assert_eq!(pit.next_deadline(0), Some(ns(delay)));
            assert_eq!(pit.advance(ns(delay - 1)), 0);
            assert_eq!(pit.advance(ns(delay)), 1);
            assert_eq!(pit.next_deadline(ns(delay)), None);
            assert_eq!(pit.advance(ns(1_000_000)), 0);
            // A new count without a new mode starts it again.
            pit.write(0, 100, ns(2_000_000));
            pit.write(0, 0, ns(2_000_000));
            assert_eq!(pit.advance(ns(2_000_200)), 1);
        }
    }

    #[test]
    fn nothing_counts_before_its_count_is_written() {
        let mut pit = Pit::new();
        assert_eq!(pit.next_deadline(5), None);
        pit.write(3, 0x34, 0);
        pit.write(0, 0, 0);
        assert_eq!(pit.next_deadline(5), None);
        pit.write(0, 0, 0);
        assert_eq!(pit.next_deadline(5), Some(ns(65536)), "zero is the largest count");
    }

    #[test]
    fn counts_run_down_and_latches_hold_them() {
        let mut pit = Pit::new();
        program(&mut pit, 0, 2, 1000, 0);
        assert_eq!(latch(&mut pit, 0, 1), 999);
        pit.write(3, 0, ns(10));
        pit.write(3, 0, ns(20));
        assert_eq!([pit.read(0, ns(30)), pit.read(0, ns(40))], 990u16.to_le_bytes());
        assert_eq!(latch(&mut pit, 0, 999), 1);
        assert_eq!(latch(&mut pit, 0, 1000), 1000);
        program(&mut pit, 0, 3, 1000, 0);
        assert_eq!([latch(&mut pit, 0, 1), latch(&mut pit, 0, 499)], [998, 2]);
        assert_eq!([latch(&mut pit, 0, 500), latch(&mut pit, 0, 501)], [1000, 998]);
        program(&mut pit, 0, 0, 1000, 0);
        assert_eq!(latch(&mut pit, 0, 1000), 0);
        assert_eq!(latch(&mut pit, 0, 1001), 0xffff, "it goes on past zero");
    }

    #[test]
    fn bcd_counts_in_decimal() {
        let mut pit = Pit::new();
        pit.write(3, 0x35, 0);
        pit.write(0, 0x00, 0);
        pit.write(0, 0x10, 0);
        assert_eq!(latch(&mut pit, 0, 1), 0x0999);
        assert_eq!(pit.next_deadline(0), Some(ns(1000)));
        pit.write(3, 0x35, 0);
        pit.write(0, 0, 0);
        pit.write(0, 0, 0);
        assert_eq!(pit.next_deadline(0), Some(ns(10_000)));
        assert_eq!(latch(&mut pit, 0, 0), 0);
        assert_eq!(latch(&mut pit, 0, 1), 0x9999);
    }

    #[test]
    fn single_bytes_are_counts_too() {
        let mut pit = Pit::new();
        pit.write(3, 0x14, 0);
        pit.write(0, 100, 0);
        assert_eq!(pit.next_deadline(0), Some(ns(100)));
        assert_eq!([pit.read(0, ns(1)), pit.read(0, ns(2))], [99, 98]);
        pit.write(3, 0x24, 0);
        pit.write(0, 2, 0);
        assert_eq!(pit.next_deadline(0), Some(ns(512)));
    }

    #[test]
    fn read_back_latches_status_then_count() {
        let mut pit = Pit::new();
        pit.write(3, 0xb0, 0);
        pit.write(3, 0xe8, 0);
        assert_eq!(pit.read(2, 0), 0x70, "mode 0, no count yet, output low");
        pit.write_port_61(1, 0);
        pit.write(2, 100, 0);
        pit.write(2, 0, 0);
        pit.write(3, 0xc8, ns(200));
        assert_eq!(pit.read(2, ns(300)), 0xb0);
        assert_eq!([pit.read(2, ns(300)), pit.read(2, ns(300))], (0xffffu16 - 99).to_le_bytes());
    }

    #[test]
    fn port_61_gates_and_shows_channel_2() {
        // What Linux does to measure the TSC: gate open, speaker off, mode 0, wait for the output.
        let mut pit = Pit::new();
        pit.write_port_61(0x01, ns(0));
        program(&mut pit, 2, 0, 11932, 10);
        assert_eq!(pit.read_port_61(ns(11941)) & OUT_2, 0);
        assert_eq!(pit.read_port_61(ns(11942)) & OUT_2, OUT_2);
        // A closed gate stops the count where it is.
        program(&mut pit, 2, 0, 1000, 20_000);
        pit.write_port_61(0x00, ns(20_400));
        assert_eq!(latch(&mut pit, 2, 50_000), 600);
        pit.write_port_61(0x01, ns(60_000));
        assert_eq!(pit.read_port_61(ns(60_599)) & OUT_2, 0);
        assert_eq!(pit.read_port_61(ns(60_600)) & OUT_2, OUT_2);
        let (first, second) = (pit.read_port_61(0), pit.read_port_61(0));
        assert_eq!((first ^ second) & REFRESH, REFRESH);
        pit.write_port_61(0xff, 0);
        assert_eq!(pit.read_port_61(0) & CONTROL_BITS, CONTROL_BITS);
    }

    #[test]
    fn the_gate_triggers_modes_1_and_5() {
        for (mode, out_before, delay) in [(1, 0, 100), (5, OUT_2, 101)] {
            let mut pit = Pit::new();
            program(&mut pit, 2, mode, 100, 0);
            assert_eq!(pit.read_port_61(ns(1_000)) & OUT_2, OUT_2, "waiting");
            pit.write_port_61(1, ns(2_000));
            pit.write_port_61(0, ns(2_010));
            assert_eq!(pit.read_port_61(ns(2_050)) & OUT_2, out_before);
            // A second edge starts it again.
            pit.write_port_61(1, ns(2_060));
            assert_eq!(pit.read_port_61(ns(2_101)) & OUT_2, out_before);
            assert_eq!(pit.read_port_61(ns(2_060 + delay)) & OUT_2, OUT_2);
        }
    }

    #[test]
    fn any_sequence_of_accesses_is_survived() {
        let mut pit = Pit::new();
        let mut seed = 3u64;
        let mut now = 0u64;
        for _ in 0..200_000 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let (what, value) = (seed >> 60, (seed >> 40) as u8);
            now = now.saturating_add(seed >> 20 & 0xff_ffff).max(if what == 15 && value == 0 { u64::MAX } else { 0 });
            match what {
                0..6 => pit.write((seed >> 32) as u16 % 5, value, now),
                6..9 => {
                    pit.read((seed >> 32) as u16 % 5, now);
                }
                9 => pit.write_port_61(value, now),
                10 => {
                    pit.read_port_61(now);
                }
                11..13 => {
                    let _ = pit.advance(now);
                }
                _ => assert!(pit.next_deadline(now).is_none_or(|at| at > now || now > u64::MAX / 2)),
            }
        }
    }
}
