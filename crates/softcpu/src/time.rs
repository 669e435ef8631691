//! The time stamp counter: of the host's clock, or of the instructions executed, which makes runs repeatable.

use std::hash::{BuildHasher, RandomState};
use std::time::Instant;

/// What the guest's TSC counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TscMode {
    /// The host's monotonic clock, scaled to this frequency in Hz.
    Host(u64),
    /// Instructions executed times this factor.
    Instructions(u64),
}

/// The clock of one CPU.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock {
    mode: TscMode,
    start: Instant,
    offset: u64,
    seed: u64,
}

impl Clock {
    pub(crate) fn new(mode: TscMode, start: Instant) -> Self {
        // Deterministic mode must not depend on the host.
        let seed = match mode {
            TscMode::Host(_) => RandomState::new().hash_one(start),
            TscMode::Instructions(_) => 0,
        };
        Clock { mode, start, offset: 0, seed }
    }

    /// The next random number: SplitMix64 over a seed that the host's random state gave, stirred with the time; repeatable when the TSC is.
    /// Good enough for a guest's kernel, which mixes it with more, and no secret of the host's.
    pub(crate) fn random(&mut self, icount: u64) -> u64 {
        self.seed = self.seed.wrapping_add(0x9e37_79b9_7f4a_7c15) ^ self.raw(icount).rotate_left(32);
        let mut z = self.seed;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// TSC without offset, after `icount` instructions.
    fn raw(&self, icount: u64) -> u64 {
        match self.mode {
            TscMode::Host(hz) => {
                let elapsed = self.start.elapsed();
                // Whole seconds apart from the rest, so that nothing overflows in a century.
                elapsed
                    .as_secs()
                    .wrapping_mul(hz)
                    .wrapping_add((u128::from(elapsed.subsec_nanos()) * u128::from(hz) / 1_000_000_000) as u64)
            }
            TscMode::Instructions(factor) => icount.wrapping_mul(factor),
        }
    }

    /// The TSC.
    pub(crate) fn tsc(&self, icount: u64) -> u64 {
        self.raw(icount).wrapping_add(self.offset)
    }

    /// Sets the TSC; answers by how much it moved.
    pub(crate) fn set_tsc(&mut self, icount: u64, value: u64) -> u64 {
        let delta = value.wrapping_sub(self.tsc(icount));
        self.offset = self.offset.wrapping_add(delta);
        delta
    }

    /// Moves the TSC.
    pub(crate) fn adjust(&mut self, delta: u64) {
        self.offset = self.offset.wrapping_add(delta);
    }

    /// Frequency of the TSC in Hz; an instruction counts as a nanosecond.
    pub(crate) fn frequency(&self) -> u64 {
        match self.mode {
            TscMode::Host(hz) => hz,
            TscMode::Instructions(factor) => factor.saturating_mul(1_000_000_000),
        }
    }
}
