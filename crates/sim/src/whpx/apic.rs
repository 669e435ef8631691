//! The platform's local APICs (`LocalApicEmulationMode`): messages between them, and processors that wait.
//!
//! Registers and rules of one APIC are `vm-accel-softcpu`'s.

use super::lock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::time::Duration;
use vm_accel_softcpu::Kick;
use vm_accel_softcpu::apic::{
    Apic, Deadline, DeliveryMode, Destination, Features, Message, Now, Outcome, Reception, Shorthand,
};

/// What a processor must look at.
#[derive(Debug, Default)]
pub(super) struct Signals {
    pub(super) nmi: bool,
    pub(super) init: bool,
    pub(super) startup: Option<u8>,
    /// Vectors of level-triggered interrupts that ended.
    pub(super) eois: Vec<u8>,
    /// Interrupt commands whose delivery the caller asked to do himself.
    pub(super) trapped: Vec<u64>,
}

impl Signals {
    fn any(&self) -> bool {
        self.nmi || self.init || self.startup.is_some() || !self.eois.is_empty() || !self.trapped.is_empty()
    }
}

/// One processor's local APIC. Without emulation it only carries cancellations.
#[derive(Debug)]
pub(super) struct LocalApic {
    pub(super) index: u32,
    pub(super) apic: Mutex<Apic>,
    pub(super) signals: Mutex<Signals>,
    changed: Condvar,
    kick: OnceLock<Kick>,
    /// INIT and start-up commands are the caller's to deliver.
    pub(super) traps_init: AtomicBool,
}

impl LocalApic {
    pub(super) fn new(index: u32, x2apic: bool) -> Arc<Self> {
        let features = Features { physical_bits: super::memory::PHYSICAL_BITS as u8, x2apic, ..Features::default() };
        Arc::new(Self {
            index,
            apic: Mutex::new(Apic::new(index, index == 0, features)),
            signals: Mutex::default(),
            changed: Condvar::new(),
            kick: OnceLock::new(),
            traps_init: AtomicBool::new(false),
        })
    }

    pub(super) fn set_kick(&self, kick: Kick) {
        let _ = self.kick.set(kick);
    }

    /// Makes the processor look at its signals, wherever it is.
    pub(super) fn wake(&self) {
        // The lock orders this after the check of a processor that is about to wait.
        drop(lock(&self.signals));
        self.changed.notify_all();
        if let Some(kick) = self.kick.get() {
            kick.kick();
        }
    }

    fn signal(&self, change: impl FnOnce(&mut Signals)) {
        change(&mut lock(&self.signals));
        self.wake();
    }

    fn receive(&self, reception: Reception) {
        match reception {
            Reception::Ignored | Reception::Smi | Reception::ExtInt => {}
            Reception::Interrupt => self.wake(),
            Reception::Nmi => self.signal(|signals| signals.nmi = true),
            Reception::Init => self.signal(|signals| (signals.init, signals.startup) = (true, None)),
            Reception::StartUp(vector) => self.signal(|signals| signals.startup = Some(vector)),
        }
    }

    /// Waits until a signal is there, `stop` says so, or an interrupt is pending that the processor `takes`.
    pub(super) fn wait(&self, takes: bool, now: impl Fn() -> Now, stop: impl Fn() -> bool) {
        /// Deadlines are looked at again after this; no event depends on it.
        const LONGEST: Duration = Duration::from_millis(20);
        let mut signals = lock(&self.signals);
        while !signals.any() && !stop() {
            let time = now();
            let mut apic = lock(&self.apic);
            apic.advance(time);
            let (pending, deadline) = (apic.pending().is_some(), apic.next_deadline());
            drop(apic);
            if pending && takes {
                return;
            }
            // The TSC counts nanoseconds here.
            let left = deadline.map_or(u64::MAX, |deadline| match deadline {
                Deadline::Ns(at) => at.saturating_sub(time.ns),
                Deadline::Tsc(at) => at.saturating_sub(time.tsc),
            });
            let duration = Duration::from_nanos(left.max(1000)).min(LONGEST);
            signals = self.changed.wait_timeout(signals, duration).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// Delivers a message to those of `apics` that it is for.
pub(super) fn deliver(apics: &[Arc<LocalApic>], message: &Message) {
    let targets: Vec<_> = apics.iter().filter(|target| lock(&target.apic).matches(message.destination)).collect();
    send(&targets, message);
}

fn send(targets: &[&Arc<LocalApic>], message: &Message) {
    let one = |target: &Arc<LocalApic>| {
        let reception = lock(&target.apic).accept(message);
        target.receive(reception);
    };
    if message.mode == DeliveryMode::LowestPriority {
        if let Some(target) = targets.iter().min_by_key(|target| lock(&target.apic).processor_priority()) {
            one(target);
        }
    } else {
        targets.iter().for_each(|target| one(target));
    }
}

/// The processors that a destination means.
pub(super) fn targets(apics: &[Arc<LocalApic>], destination: Destination) -> Vec<u32> {
    apics.iter().filter(|target| lock(&target.apic).matches(destination)).map(|target| target.index).collect()
}

/// Does what an access to the APIC of `from` asks of the machine. `icr` is its interrupt command register.
pub(super) fn act(apics: &[Arc<LocalApic>], from: &LocalApic, outcome: Outcome, icr: u64) {
    match outcome {
        Outcome::None => {}
        Outcome::EndOfInterrupt(vector) => from.signal(|signals| signals.eois.push(vector)),
        Outcome::Ipi(ipi) => {
            let starts = matches!(ipi.message.mode, DeliveryMode::Init | DeliveryMode::StartUp);
            if starts && from.traps_init.load(Ordering::Relaxed) {
                from.signal(|signals| signals.trapped.push(icr));
                return;
            }
            let is_sender = |target: &Arc<LocalApic>| std::ptr::eq(Arc::as_ptr(target), from);
            let targets: Vec<_> = apics
                .iter()
                .filter(|target| match ipi.shorthand {
                    Shorthand::None => lock(&target.apic).matches(ipi.message.destination),
                    Shorthand::OnlySelf => is_sender(target),
                    Shorthand::AllIncludingSelf => true,
                    Shorthand::AllExcludingSelf => !is_sender(target),
                })
                .collect();
            send(&targets, &ipi.message);
        }
    }
}
