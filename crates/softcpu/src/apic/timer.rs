//! The APIC timer (SDM volume 3A, "APIC Timer"): one-shot, periodic, TSC deadline.

/// The timer's input clock in Hz: one count, undivided, is a nanosecond of [`Now::ns`].
pub(crate) const TIMER_HZ: u32 = 1_000_000_000;

/// The time, in the two units that the timer needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Now {
    /// Nanoseconds from any fixed moment, never going back. The timer's input clock is 1 GHz: one count, undivided, is one of these.
    pub ns: u64,
    /// The CPU's time-stamp counter as RDTSC gives it.
    pub tsc: u64,
}

/// When the timer next fires.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Deadline {
    /// At this many nanoseconds, on the clock of [`Now::ns`].
    Ns(u64),
    /// At this value of the time-stamp counter.
    Tsc(u64),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Mode {
    #[default]
    OneShot,
    Periodic,
    TscDeadline,
}

impl Mode {
    fn from_lvt(entry: u32) -> Self {
        match entry >> 17 & 3 {
            0 => Self::OneShot,
            1 => Self::Periodic,
            // 3 is reserved; nothing counts then, as in TSC-deadline mode before a deadline is set.
            _ => Self::TscDeadline,
        }
    }
}

#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Timer {
    mode: Mode,
    divide: u32,
    initial: u32,
    /// When the count becomes zero, while it counts.
    expiry: Option<u64>,
    /// 0: disarmed.
    tsc_deadline: u64,
}

impl Timer {
    /// From saved registers; `current` is where the count was.
    pub(super) fn restore(lvt: u32, divide: u32, initial: u32, current: u32, now: Now) -> Self {
        let mut timer = Self { mode: Mode::from_lvt(lvt), divide, initial, ..Self::default() };
        if timer.mode != Mode::TscDeadline && current != 0 && initial != 0 {
            timer.expiry = Some(timer.after(now, current.min(initial)));
        }
        timer
    }

    /// Nanoseconds per count: bits 3, 1 and 0 of the divide configuration mean 2, 4, … 128, 1.
    fn divisor(&self) -> u64 {
        match self.divide & 3 | self.divide >> 1 & 4 {
            7 => 1,
            power => 2 << power,
        }
    }

    fn after(&self, now: Now, counts: u32) -> u64 {
        now.ns.saturating_add(u64::from(counts) * self.divisor())
    }

    pub(super) fn current_count(&self, now: Now) -> u32 {
        let left = self.expiry.map_or(0, |expiry| expiry.saturating_sub(now.ns));
        u32::try_from(left.div_ceil(self.divisor())).unwrap_or(u32::MAX)
    }

    /// Sets the initial count and starts counting; `false` in TSC-deadline mode, where it is ignored.
    pub(super) fn set_initial_count(&mut self, count: u32, now: Now) -> bool {
        if self.mode == Mode::TscDeadline {
            return false;
        }
        self.initial = count;
        self.expiry = (count != 0).then(|| self.after(now, count));
        true
    }

    /// Changes the rate; the count goes on from where it is.
    pub(super) fn set_divide(&mut self, divide: u32, now: Now) {
        let current = self.current_count(now);
        self.divide = divide;
        if self.expiry.is_some() {
            self.expiry = Some(self.after(now, current));
        }
    }

    /// Takes the mode from the LVT entry. Changing to or from TSC-deadline mode disarms the timer (answer `true`); between the others
    /// the count goes on.
    pub(super) fn set_mode(&mut self, lvt: u32) -> bool {
        let mode = Mode::from_lvt(lvt);
        let disarm = (mode == Mode::TscDeadline) != (self.mode == Mode::TscDeadline);
        self.mode = mode;
        if disarm {
            self.expiry = None;
            self.initial = 0;
            self.tsc_deadline = 0;
        }
        disarm
    }

    pub(super) fn tsc_deadline(&self) -> u64 {
        self.tsc_deadline
    }

    /// Ignored outside TSC-deadline mode; zero disarms.
    pub(super) fn set_tsc_deadline(&mut self, value: u64) {
        if self.mode == Mode::TscDeadline {
            self.tsc_deadline = value;
        }
    }

    pub(super) fn deadline(&self) -> Option<Deadline> {
        match self.mode {
            Mode::TscDeadline => (self.tsc_deadline != 0).then_some(Deadline::Tsc(self.tsc_deadline)),
            _ => self.expiry.map(Deadline::Ns),
        }
    }

    /// Whether the timer expired by `now`. Periods that nobody looked at are one interrupt, as a CPU that has the vector
    /// requested already would see them.
    pub(super) fn fires(&mut self, now: Now) -> bool {
        match self.deadline() {
            Some(Deadline::Tsc(at)) if at <= now.tsc => self.tsc_deadline = 0,
            Some(Deadline::Ns(at)) if at <= now.ns => {
                let period = u64::from(self.initial) * self.divisor();
                self.expiry = (self.mode == Mode::Periodic && period != 0)
                    .then(|| at.saturating_add(((now.ns - at) / period + 1).saturating_mul(period)));
            }
            _ => return false,
        }
        true
    }
}
