//! The hostile mode: a seeded stream of decisions, and a plan of calls that fail.
//!
//! A simulator asks [`Mischief`] at every place where its platform may legally do something rare: leave without a reason,
//! fault on mapped memory, tell no instruction bytes, repeat a cancellation. All of it must stay invisible to the user of
//! `vm-accel`. A [`FailurePlan`] is the other kind: one call answers an error, which must surface as that error.

use std::sync::{Mutex, PoisonError};

/// A seeded stream of decisions. Without a seed every answer is "no".
#[derive(Debug, Clone, Default)]
pub struct Mischief {
    state: Option<u64>,
}

impl Mischief {
    /// Decisions from a seed; `None` never misbehaves.
    #[must_use]
    pub fn new(seed: Option<u64>) -> Self {
        Self { state: seed }
    }

    /// Whether this is a hostile platform.
    #[must_use]
    pub fn is_hostile(&self) -> bool {
        self.state.is_some()
    }

    /// The next number of the stream (splitmix64, Steele et al. 2014); 0 without a seed.
    pub fn draw(&mut self) -> u64 {
        let Some(state) = &mut self.state else {
            return 0;
        };
        *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = *state;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// True once in `n` times on average, never without a seed.
    pub fn one_in(&mut self, n: u64) -> bool {
        self.is_hostile() && self.draw().is_multiple_of(n.max(1))
    }

    /// One of `choices`; the first without a seed.
    ///
    /// # Panics
    /// If there are no choices.
    pub fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.draw() as usize % choices.len()]
    }
}

/// Fails one call of one function once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Failure {
    /// The function's name.
    pub function: &'static str,
    /// How many calls succeed before.
    pub after: u32,
    /// What the call answers.
    pub code: i32,
}

/// What the tests planned, for the whole process.
#[derive(Debug, Default)]
pub struct FailurePlan {
    planned: Mutex<Option<Failure>>,
}

impl FailurePlan {
    /// A plan without failures.
    #[must_use]
    pub const fn new() -> Self {
        Self { planned: Mutex::new(None) }
    }

    /// Plans a failure, or none.
    pub fn set(&self, failure: Option<Failure>) {
        *self.planned.lock().unwrap_or_else(PoisonError::into_inner) = failure;
    }

    /// True while the planned failure has not happened.
    #[must_use]
    pub fn is_waiting(&self) -> bool {
        self.planned.lock().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Called at the beginning of every function: the code with which it is to fail now.
    #[must_use]
    pub fn check(&self, function: &str) -> Option<i32> {
        let mut planned = self.planned.lock().unwrap_or_else(PoisonError::into_inner);
        let failure = planned.as_mut().filter(|failure| failure.function == function)?;
        if failure.after > 0 {
            failure.after -= 1;
            return None;
        }
        planned.take().map(|failure| failure.code)
    }
}
