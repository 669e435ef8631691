//! The watchdog: every case has a deadline.
//!
//! When it passes, all vCPUs of the case are kicked, again and again, so that `run()` returns and the case can fail by
//! itself. If it does not even then, the process says which case hangs and ends: a hung suite tells nothing.

use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};
use vm_accel::VcpuKick;

/// How long a kicked case has to give up.
const GRACE: Duration = Duration::from_secs(20);

pub(crate) struct Watch {
    state: Mutex<State>,
    wake: Condvar,
    begun: Instant,
    limit: Duration,
}

#[derive(Default)]
struct State {
    kicks: Vec<VcpuKick>,
    done: bool,
}

impl Watch {
    pub(crate) fn new(limit: Duration) -> Self {
        Self { state: Mutex::default(), wake: Condvar::new(), begun: Instant::now(), limit }
    }

    /// From now on the vCPU is kicked when the time is over.
    pub(crate) fn add(&self, kick: VcpuKick) {
        self.lock().kicks.push(kick);
    }

    pub(crate) fn expired(&self) -> bool {
        self.begun.elapsed() > self.limit
    }

    /// Ends [`Watch::guard`].
    pub(crate) fn finish(&self) {
        self.lock().done = true;
        self.wake.notify_all();
    }

    /// Watches until [`Watch::finish`]; runs on a thread of its own.
    pub(crate) fn guard(&self, name: &str) {
        let mut state = self.lock();
        while !state.done {
            let left = self.limit.saturating_sub(self.begun.elapsed());
            if left.is_zero() {
                if self.begun.elapsed() > self.limit + GRACE {
                    eprintln!("{name} hangs and does not react to kicks: the suite ends here");
                    std::process::exit(101);
                }
                state.kicks.iter().for_each(VcpuKick::kick);
            }
            let wait = left.clamp(Duration::from_millis(50), self.limit);
            state = self.wake.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
