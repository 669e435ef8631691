//! How a vCPU that runs on a hypervisor is called back: for mail, and when its local APIC's timer is due.
//!
//! A call must never be lost, whatever the platform makes of a cancellation that comes just before the entry: documented as
//! sticky by some, by some not at all. So the caller leaves word ([`Gate::kick`]), and as long as the vCPU stays inside
//! without having read it the cancellation is repeated, by the machine's [`Alarm`], whose thread also rings at deadlines.

use crate::lock;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

/// How long a cancellation has to show effect.
const AGAIN: Duration = Duration::from_millis(1);

/// What takes a vCPU out of the guest.
pub type Cancel = Box<dyn Fn() + Send + Sync>;

/// What makes a CPU's thread look at its mailbox.
pub trait Wake: Send + Sync {
    /// There is mail: the CPU leaves the guest.
    fn kick(&self);
    /// The APIC may have an interrupt for the CPU.
    fn poll(&self);
}

/// The door between a vCPU's thread and those who want it back.
pub struct Gate {
    /// Word was left that the vCPU's thread has not read.
    asked: AtomicBool,
    /// The vCPU's thread is in the guest, or about to be.
    inside: AtomicBool,
    /// Gone with the vCPU. The lock is held while it is called, so a vCPU is never deleted under a cancellation.
    cancel: Mutex<Option<Cancel>>,
    /// When the vCPU's thread wants to be called without a word.
    deadline: Mutex<Option<Instant>>,
    alarm: Arc<Alarm>,
    me: Weak<Gate>,
}

impl fmt::Debug for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gate").field("asked", &self.asked).field("inside", &self.inside).finish_non_exhaustive()
    }
}

impl Gate {
    /// A door; `cancel` takes the vCPU out of the guest and is never called after [`close`](Gate::close).
    pub fn new(cancel: Cancel, alarm: &Arc<Alarm>) -> Arc<Self> {
        Arc::new_cyclic(|me| Self {
            asked: AtomicBool::new(false),
            inside: AtomicBool::new(false),
            cancel: Mutex::new(Some(cancel)),
            deadline: Mutex::default(),
            alarm: Arc::clone(alarm),
            me: me.clone(),
        })
    }

    /// The vCPU's thread is about to look at its mail.
    pub fn attend(&self) {
        // Acquire: what the caller did before it left word is visible. A word left from now on stays.
        self.asked.swap(false, Ordering::AcqRel);
    }

    /// The vCPU's thread wants to enter, and to be called at the deadline. False if word was left since it attended.
    pub fn enter(&self, deadline: Option<Instant>) -> bool {
        *lock(&self.deadline) = deadline;
        // SeqCst pairs with `kick`: either it sees us inside, or we see its word.
        self.inside.store(true, Ordering::SeqCst);
        if self.asked.load(Ordering::SeqCst) {
            self.leave();
            return false;
        }
        if let Some(deadline) = deadline {
            self.alarm.set(&self.me, deadline);
        }
        true
    }

    /// The vCPU's thread is back.
    pub fn leave(&self) {
        self.inside.store(false, Ordering::SeqCst);
    }

    /// The alarm rings: for a word that was not read, or at the deadline.
    fn ring(&self) {
        let mut deadline = lock(&self.deadline);
        let is_due = deadline.is_some_and(|at| at <= Instant::now());
        if is_due {
            *deadline = None;
        }
        let later = *deadline;
        drop(deadline);
        if is_due || self.asked.load(Ordering::SeqCst) {
            self.kick();
        }
        if let Some(later) = later {
            self.alarm.set(&self.me, later);
        }
    }

    /// No cancellation is under way when this returns, and none comes any more.
    pub fn close(&self) {
        *lock(&self.cancel) = None;
    }
}

impl Wake for Gate {
    fn kick(&self) {
        self.asked.store(true, Ordering::SeqCst);
        if !self.inside.load(Ordering::SeqCst) {
            return;
        }
        let cancel = lock(&self.cancel);
        if let Some(cancel) = &*cancel {
            cancel();
            self.alarm.set(&self.me, Instant::now() + AGAIN);
        }
    }

    fn poll(&self) {
        self.kick();
    }
}

/// When to call whom. One thread per machine, made when first needed; it ends with the machine.
#[derive(Debug, Default)]
pub struct Alarm {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// At most one entry per vCPU.
    calls: Vec<(Instant, Weak<Gate>)>,
    has_thread: bool,
}

impl Alarm {
    /// Calls `gate` at `at`, or earlier if it is to be called earlier anyway.
    fn set(self: &Arc<Self>, gate: &Weak<Gate>, at: Instant) {
        let mut state = lock(&self.state);
        match state.calls.iter_mut().find(|(_, other)| other.ptr_eq(gate)) {
            Some((already, _)) if *already <= at => return,
            Some((already, _)) => *already = at,
            None => state.calls.push((at, gate.clone())),
        }
        if !state.has_thread {
            let me = Arc::downgrade(self);
            // Without a thread the next call tries again; the platform's own stickiness has to do until then.
            state.has_thread = std::thread::Builder::new().name("vm-accel alarm".into()).spawn(|| ring(me)).is_ok();
        }
        drop(state);
        self.changed.notify_one();
    }
}

/// The alarm's thread.
fn ring(alarm: Weak<Alarm>) {
    /// It holds the alarm no longer than this without looking whether the machine is gone.
    const LOOK: Duration = Duration::from_millis(200);
    while let Some(alarm) = alarm.upgrade() {
        let now = Instant::now();
        let mut state = lock(&alarm.state);
        let due: Vec<_> = state.calls.iter().filter(|(at, _)| *at <= now).map(|(_, gate)| gate.clone()).collect();
        state.calls.retain(|(at, gate)| *at > now && gate.strong_count() != 0);
        if due.is_empty() {
            let sleep = state.calls.iter().map(|(at, _)| at.saturating_duration_since(now)).min();
            let timeout = sleep.unwrap_or(LOOK).min(LOOK);
            drop(alarm.changed.wait_timeout(state, timeout).unwrap_or_else(PoisonError::into_inner));
            continue;
        }
        drop(state);
        due.iter().filter_map(Weak::upgrade).for_each(|gate| gate.ring());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU32;

    fn gate(count: &Arc<AtomicU32>) -> Arc<Gate> {
        let count = Arc::clone(count);
        Gate::new(Box::new(move || _ = count.fetch_add(1, Ordering::SeqCst)), &Arc::default())
    }

    #[test]
    fn a_word_left_outside_keeps_the_vcpu_from_entering() {
        let count = Arc::default();
        let gate = gate(&count);
        gate.kick();
        assert!(!gate.enter(None));
        gate.attend();
        assert!(gate.enter(None));
        assert_eq!(count.load(Ordering::SeqCst), 0, "nobody was inside");
    }

    #[test]
    fn a_cancellation_without_effect_is_repeated_until_the_vcpu_is_back() {
        let count = Arc::default();
        let gate = gate(&count);
        assert!(gate.enter(None));
        gate.kick();
        while count.load(Ordering::SeqCst) < 3 {
            std::thread::yield_now();
        }
        gate.leave();
        gate.close();
    }

    #[test]
    fn a_deadline_calls_back() {
        let count = Arc::default();
        let gate = gate(&count);
        assert!(gate.enter(Some(Instant::now() + AGAIN)));
        while count.load(Ordering::SeqCst) == 0 {
            std::thread::yield_now();
        }
        gate.leave();
        assert!(!gate.enter(None), "the alarm has left word");
    }
}
