//! Events where the accelerators know none of their own: a counter and a condition variable.

use crate::error::VcpuResult;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

#[derive(Debug)]
pub(super) struct Event {
    count: Mutex<u64>,
    signalled: Condvar,
}

impl Event {
    pub(super) fn new() -> VcpuResult<Self> {
        Ok(Self { count: Mutex::new(0), signalled: Condvar::new() })
    }

    pub(super) fn signal(&self) -> VcpuResult<()> {
        let mut count = self.lock();
        *count = count.saturating_add(1);
        self.signalled.notify_one();
        Ok(())
    }

    pub(super) fn try_take(&self) -> VcpuResult<Option<u64>> {
        Ok(take(&mut self.lock()))
    }

    /// Waits until signals come or the deadline passes.
    pub(super) fn take_before(&self, deadline: Option<Instant>) -> VcpuResult<Option<u64>> {
        let mut count = self.lock();
        loop {
            if let Some(taken) = take(&mut count) {
                return Ok(Some(taken));
            }
            count = match deadline.map(|deadline| deadline.saturating_duration_since(Instant::now())) {
                None => self.signalled.wait(count).unwrap_or_else(PoisonError::into_inner),
                Some(rest) if rest.is_zero() => return Ok(None),
                Some(rest) => {
                    let woken = self.signalled.wait_timeout(count, rest);
                    woken.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }

    // A number cannot be left half changed, so a poisoned lock is as good as any.
    fn lock(&self) -> MutexGuard<'_, u64> {
        self.count.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn take(count: &mut u64) -> Option<u64> {
    match std::mem::take(count) {
        0 => None,
        taken => Some(taken),
    }
}
