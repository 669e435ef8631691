//! Local APICs in software, for backends whose platform has none: who they are, what travels between them, and how a CPU
//! that waits is woken.
//!
//! Registers and rules of one APIC are `vm-accel-softcpu`'s. Here is the machine around them: a message from any thread
//! reaches the APICs that it is for; what an APIC cannot do itself (NMI, INIT, start-up) is noted for the CPU's thread,
//! which is woken.
//!
//! Locks: `signals` may be held while an `apic` lock is taken, never the other way round, and no two of a kind at once.

use crate::gate::Wake;
use crate::lock;
use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;
use vm_accel_softcpu::apic::{
    Apic, Deadline, DeliveryMode, Features, Ipi, Message, Now, Outcome, Reception, Shorthand,
};

/// EOIs that the VMM has not asked for; a guest that makes more without one being taken loses the oldest knowledge of
/// nothing: there are only 256 vectors.
type EoiSet = [u64; 4];

/// How many non-maskable interrupts are kept.
const MOST_NMIS: u8 = 2;

/// What the CPU's thread must do at its next look.
#[derive(Debug, Default)]
pub(crate) struct Signals {
    /// Non-maskable interrupts to deliver: one, and one more that came before the first was begun (as KVM keeps them).
    pub(crate) nmis: u8,
    pub(crate) init: bool,
    pub(crate) startup: Option<u8>,
    /// The VMM kicked the vCPU.
    pub(crate) kicked: bool,
    /// Vectors of level-triggered interrupts that ended.
    eois: EoiSet,
}

impl Signals {
    /// True if the CPU's thread has something to do.
    fn any(&self) -> bool {
        self.nmis != 0 || self.init || self.startup.is_some() || self.kicked || self.eois != [0; 4]
    }

    /// The next vector whose end the VMM must hear of.
    pub(crate) fn take_eoi(&mut self) -> Option<u8> {
        let (n, word) = self.eois.iter_mut().enumerate().find(|(_, word)| **word != 0)?;
        let bit = word.trailing_zeros();
        *word &= *word - 1;
        Some((n as u32 * 64 + bit) as u8)
    }
}

impl Wake for vm_accel_softcpu::Kick {
    fn kick(&self) {
        vm_accel_softcpu::Kick::kick(self);
    }

    fn poll(&self) {
        self.poll_interrupts();
    }
}

/// One CPU's local APIC and mailbox.
pub(crate) struct LocalApic {
    pub(crate) apic: Mutex<Apic>,
    signals: Mutex<Signals>,
    changed: Condvar,
    /// Makes a running CPU look at its mailbox; set when the CPU exists.
    wake: Mutex<Option<Arc<dyn Wake>>>,
}

impl fmt::Debug for LocalApic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LocalApic").finish_non_exhaustive()
    }
}

impl LocalApic {
    fn new(id: u32, features: Features) -> Self {
        let mut apic = Apic::new(id, id == 0, features);
        if id == 0 {
            // There is no firmware that would do it.
            apic.enter_virtual_wire();
        }
        Self { apic: Mutex::new(apic), signals: Mutex::default(), changed: Condvar::new(), wake: Mutex::default() }
    }

    pub(crate) fn set_wake(&self, wake: Option<Arc<dyn Wake>>) {
        *lock(&self.wake) = wake;
    }

    pub(crate) fn signals(&self) -> MutexGuard<'_, Signals> {
        lock(&self.signals)
    }

    /// Changes the mailbox and makes the CPU's thread look at it, wherever it is.
    pub(crate) fn signal(&self, change: impl FnOnce(&mut Signals)) {
        change(&mut lock(&self.signals));
        self.changed.notify_all();
        if let Some(wake) = &*lock(&self.wake) {
            wake.kick();
        }
    }

    /// Acts on what the APIC answered to a message.
    fn receive(&self, reception: Reception) {
        match reception {
            // Nothing here has system-management mode, and an ExtINT is injected by the VMM, which has the PIC.
            Reception::Ignored | Reception::Smi | Reception::ExtInt => {}
            Reception::Interrupt => {
                // Taking the lock orders this after the check of a CPU that is about to wait.
                drop(lock(&self.signals));
                self.changed.notify_all();
                if let Some(wake) = &*lock(&self.wake) {
                    wake.poll();
                }
            }
            Reception::Nmi => {
                self.signal(|signals| signals.nmis = (signals.nmis + 1).min(MOST_NMIS));
            }
            Reception::Init => self.signal(|signals| {
                signals.init = true;
                signals.startup = None;
            }),
            Reception::StartUp(vector) => self.signal(|signals| signals.startup = Some(vector)),
        }
    }

    /// Notes the end of a level-triggered interrupt for the VMM.
    fn end_of_interrupt(&self, vector: u8) {
        self.signal(|signals| signals.eois[usize::from(vector / 64)] |= 1 << (vector % 64));
    }

    /// Waits until the mailbox has something, or an interrupt is pending that the CPU `takes`.
    pub(crate) fn wait(&self, takes: bool, tsc_hz: u64, now: impl Fn() -> Now) {
        let mut signals = lock(&self.signals);
        while !signals.any() {
            let time = now();
            let mut apic = lock(&self.apic);
            apic.advance(time);
            let pending = apic.pending().is_some();
            let deadline = apic.next_deadline();
            drop(apic);
            if pending && takes {
                return;
            }
            signals = match deadline.map(|deadline| until(deadline, time, tsc_hz)) {
                Some(duration) => {
                    self.changed.wait_timeout(signals, duration).unwrap_or_else(PoisonError::into_inner).0
                }
                None => self.changed.wait(signals).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }
}

/// How long it is to a deadline. At least a microsecond: rounding down would spin.
pub(crate) fn until(deadline: Deadline, now: Now, tsc_hz: u64) -> Duration {
    let ns = match deadline {
        Deadline::Ns(at) => at.saturating_sub(now.ns),
        Deadline::Tsc(at) => {
            let ticks = u128::from(at.saturating_sub(now.tsc));
            (ticks * 1_000_000_000 / u128::from(tsc_hz.max(1))).min(u128::from(u64::MAX)) as u64
        }
    };
    // A deadline far away is looked at again: it costs nothing, and an hour fits every clock.
    Duration::from_nanos(ns.clamp(1_000, 3_600_000_000_000))
}

/// The APICs of one machine.
#[derive(Debug, Default)]
pub(crate) struct Fabric {
    apics: RwLock<Vec<Arc<LocalApic>>>,
}

impl Fabric {
    /// Adds the APIC of CPU `id`.
    pub(crate) fn add(&self, id: u32, features: Features) -> Arc<LocalApic> {
        let apic = Arc::new(LocalApic::new(id, features));
        self.apics.write().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(&apic));
        apic
    }

    fn each(&self) -> Vec<Arc<LocalApic>> {
        self.apics.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Delivers a message from a device or an I/O APIC.
    pub(crate) fn deliver(&self, message: &Message) {
        let mut targets = self.each();
        targets.retain(|target| lock(&target.apic).matches(message.destination));
        deliver_to(&targets, message);
    }

    /// Carries an interprocessor interrupt that `from` sends.
    fn carry(&self, from: &LocalApic, ipi: &Ipi) {
        let is_sender = |target: &Arc<LocalApic>| std::ptr::eq(Arc::as_ptr(target), from);
        let mut targets = self.each();
        targets.retain(|target| match ipi.shorthand {
            Shorthand::None => lock(&target.apic).matches(ipi.message.destination),
            Shorthand::OnlySelf => is_sender(target),
            Shorthand::AllIncludingSelf => true,
            Shorthand::AllExcludingSelf => !is_sender(target),
        });
        deliver_to(&targets, &ipi.message);
    }

    /// Does what an access to the APIC of a CPU asks of the machine.
    pub(crate) fn act(&self, from: &LocalApic, outcome: Outcome) {
        match outcome {
            Outcome::None => {}
            Outcome::Ipi(ipi) => self.carry(from, &ipi),
            Outcome::EndOfInterrupt(vector) => from.end_of_interrupt(vector),
        }
    }
}

/// Delivers to all of `targets`, or for lowest-priority messages to the one that does the least important work.
fn deliver_to(targets: &[Arc<LocalApic>], message: &Message) {
    let send = |target: &LocalApic| {
        let reception = lock(&target.apic).accept(message);
        target.receive(reception);
    };
    if message.mode == DeliveryMode::LowestPriority {
        if let Some(target) = targets.iter().min_by_key(|target| lock(&target.apic).processor_priority()) {
            send(target);
        }
    } else {
        targets.iter().for_each(|target| send(target));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_accel_softcpu::apic::Destination;

    fn message(destination: u32, mode: DeliveryMode, vector: u8) -> Message {
        Message { destination: Destination::Physical(destination), mode, vector, level: false }
    }

    #[test]
    fn init_and_startup_reach_only_their_cpu() {
        let fabric = Fabric::default();
        let (zero, one) = (fabric.add(0, Features::default()), fabric.add(1, Features::default()));
        fabric.deliver(&message(1, DeliveryMode::Init, 0));
        fabric.deliver(&message(1, DeliveryMode::StartUp, 0x9a));
        assert!(one.signals().init);
        assert_eq!(one.signals().startup, Some(0x9a));
        assert!(!zero.signals().any());
    }

    #[test]
    fn ends_of_interrupts_are_told_once_each() {
        let fabric = Fabric::default();
        let apic = fabric.add(0, Features::default());
        for vector in [0x31, 0xff, 0x31] {
            fabric.act(&apic, Outcome::EndOfInterrupt(vector));
        }
        assert_eq!(apic.signals().take_eoi(), Some(0x31));
        assert_eq!(apic.signals().take_eoi(), Some(0xff));
        assert_eq!(apic.signals().take_eoi(), None);
    }

    #[test]
    fn a_waiting_cpu_is_woken_from_another_thread() {
        let fabric = Arc::new(Fabric::default());
        let apic = fabric.add(0, Features::default());
        let sender = Arc::clone(&fabric);
        let thread = std::thread::spawn(move || sender.deliver(&message(0, DeliveryMode::Nmi, 0)));
        apic.wait(true, 1_000_000_000, Now::default);
        assert_eq!(apic.signals().nmis, 1);
        thread.join().unwrap();
    }
}
