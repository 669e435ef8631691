//! Virtual processors: `WHvRunVirtualProcessor` and what surrounds it.

use super::apic::LocalApic;
use super::bus::{Own, PlatformBus, Shared};
use super::memory::Memory;
use super::registers::time;
use super::{Answer, code, lock, misuse};
use crate::hostile::Mischief;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};
use vm_accel_softcpu::apic::Now;
use vm_accel_softcpu::state::{cr0, cr4, efer, rflags};
use vm_accel_softcpu::{Config, Cpu, CpuState, CpuidEntry, Exception, Exit, Intercept, Kick, Ram};
use vm_accel_sys::whpx::code::WHV_E_INVALID_VP_STATE;
use vm_accel_sys::whpx::x86_64::ExitContext;
use vm_accel_sys::whpx::x86_64::defs::*;
use vm_accel_sys::whpx::x86_64::fields::Deliverability;

/// Instructions between two looks at whether host memory with code in it was changed. The platform is coherent with the
/// host; a software CPU that caches decoded code is not.
const SLICE: u64 = 3_000_000;

/// A virtual processor.
#[derive(Debug)]
pub(super) struct Vp {
    inner: Mutex<Inner>,
    running: AtomicBool,
    /// Somebody cancelled the run; stays until a run has ended by it.
    cancelled: AtomicBool,
    kick: Kick,
    apic: Arc<LocalApic>,
}

/// What only one thread at a time may touch.
#[derive(Debug)]
pub(super) struct Inner {
    pub(super) cpu: Cpu,
    pub(super) own: Arc<Own>,
    pub(super) shared: Arc<Shared>,
    pub(super) apic: Arc<LocalApic>,
    pub(super) has_apic: bool,
    /// Notifications that the caller waits for.
    pub(super) wanted: Deliverability,
    /// An interrupt whose vector an 8259A gave, to be delivered when the processor can take it.
    pub(super) ext_int: Option<u8>,
    pub(super) startup_suspend: bool,
    /// An event was put into delivery while the processor halted: it waits until somebody ends HLT.
    pub(super) held_event: bool,
    /// RFLAGS was set to something that no processor has.
    pub(super) bad_rflags: bool,
    /// The page-directory pointers of PAE paging must be loaded before the next run.
    pub(super) reload_pdptes: bool,
    /// Where the time stamp counter stands while time is suspended.
    frozen: Option<u64>,
    pub(super) mischief: Mischief,
    /// Garbage for what is undefined, in the honest mode as well.
    pub(super) garbage: Mischief,
}

/// The exception of a vector and an error code.
pub(super) fn exception(vector: u8, code: u32, parameter: u64) -> Option<Exception> {
    let selector = code as u16;
    Some(match vector {
        0 => Exception::De,
        1 => Exception::Db(parameter),
        3 => Exception::Bp,
        4 => Exception::Of,
        5 => Exception::Br,
        6 => Exception::Ud,
        7 => Exception::Nm,
        8 => Exception::Df,
        10 => Exception::Ts(selector),
        11 => Exception::Np(selector),
        12 => Exception::Ss(selector),
        13 => Exception::Gp(selector),
        14 => Exception::Pf { addr: parameter, code },
        16 => Exception::Mf,
        17 => Exception::Ac,
        19 => Exception::Xm,
        _ => return None,
    })
}

impl Vp {
    pub(super) fn new(
        index: u32,
        config: Config,
        ram: &Arc<Ram>,
        shared: &Arc<Shared>,
        apic: Arc<LocalApic>,
        has_apic: bool,
        mischief: Mischief,
    ) -> Self {
        let own = Own::new(index);
        let bus = PlatformBus {
            shared: Arc::clone(shared),
            own: Arc::clone(&own),
            apic: has_apic.then(|| Arc::clone(&apic)),
        };
        let cpu = Cpu::new(index, config, Arc::clone(ram), Box::new(bus));
        let kick = cpu.kick_handle();
        apic.set_kick(kick.clone());
        let inner = Inner {
            cpu,
            own,
            shared: Arc::clone(shared),
            apic: Arc::clone(&apic),
            has_apic,
            wanted: Deliverability::default(),
            ext_int: None,
            // Application processors of a platform that has the APICs wait for their start.
            startup_suspend: has_apic && index != 0,
            held_event: false,
            bad_rflags: false,
            reload_pdptes: false,
            frozen: None,
            mischief,
            garbage: Mischief::new(Some(u64::from(index) ^ 0x5eed)),
        };
        Self { inner: Mutex::new(inner), running: false.into(), cancelled: false.into(), kick, apic }
    }

    pub(super) fn replace_cpuid(&self, change: impl FnOnce(&mut Vec<CpuidEntry>)) {
        let mut inner = lock(&self.inner);
        let mut entries = inner.cpu.cpuid().to_vec();
        change(&mut entries);
        inner.cpu.set_cpuid(&entries);
    }

    pub(super) fn is_running(&self) -> bool {
        self.running.load(Ordering::SeqCst)
    }

    pub(super) fn apic(&self) -> &Arc<LocalApic> {
        &self.apic
    }

    /// Makes it pass the gate.
    pub(super) fn kick(&self) {
        self.kick.kick();
    }

    pub(super) fn cancel(&self) {
        // Release: what the caller did before is visible to the run that ends.
        self.cancelled.store(true, Ordering::Release);
        self.apic.wake();
    }

    /// The state, of a processor that does not run.
    pub(super) fn state(&self) -> Answer<MutexGuard<'_, Inner>> {
        if self.is_running() {
            return code(WHV_E_INVALID_VP_STATE);
        }
        Ok(lock(&self.inner))
    }

    /// Runs until something needs the caller, and describes it.
    pub(super) fn run(&self, memory: &Memory, context: &mut ExitContext) -> Answer {
        let mut inner = match self.inner.try_lock() {
            Ok(inner) => inner,
            Err(TryLockError::WouldBlock) if self.is_running() => {
                return misuse("two threads run the same virtual processor");
            }
            _ => lock(&self.inner),
        };
        self.running.store(true, Ordering::SeqCst);
        let result = self.run_to_exit(&mut inner, memory, context);
        inner.cpu.abandon();
        self.running.store(false, Ordering::SeqCst);
        result
    }

    fn take_cancel(&self) -> bool {
        // Acquire pairs with the Release in `cancel`.
        self.cancelled.swap(false, Ordering::Acquire)
    }

    fn run_to_exit(&self, inner: &mut Inner, memory: &Memory, context: &mut ExitContext) -> Answer {
        let forced = super::FORCED.swap(0, Ordering::Relaxed);
        if forced != 0 {
            inner.leave(forced, context);
            return Ok(());
        }
        if inner.mischief.one_in(6) && inner.leave_for_nothing(context) {
            return Ok(());
        }
        if let Some(reason) = inner.entry_failure() {
            inner.leave(reason, context);
            return Ok(());
        }
        inner.load_pdptes(memory);
        loop {
            if self.take_cancel() {
                // The same cancellation may show twice.
                if inner.mischief.one_in(5) {
                    self.cancelled.store(true, Ordering::Release);
                }
                inner.canceled(context);
                return Ok(());
            }
            if inner.take_signals(context) {
                return Ok(());
            }
            if inner.startup_suspend {
                self.apic.wait(false, || inner.now(), || self.cancelled.load(Ordering::Acquire));
                continue;
            }
            if inner.held_event && inner.cpu.state().events.halted {
                let takes = inner.cpu.state().rflags & rflags::IF != 0;
                self.apic.wait(takes, || inner.now(), || self.cancelled.load(Ordering::Acquire));
                inner.held_event = self.cancelled.load(Ordering::Acquire);
                continue;
            }
            if inner.notify(context) {
                return Ok(());
            }
            inner.cpu.forget_code();
            memory.gate.enter();
            let exit = inner.cpu.run(inner.slice());
            memory.gate.leave();
            match exit {
                Exit::Kicked | Exit::Budget => {}
                // HLT leaves where there is no APIC to wake the processor, whatever else could be done then.
                Exit::InterruptWindow if inner.leaves_for_halt() && inner.cpu.state().events.halted => {
                    inner.describe(Exit::Halted, memory, context);
                    return Ok(());
                }
                // The window was for an interrupt that waits in here, or is noticed in `notify`.
                Exit::InterruptWindow => {}
                Exit::Halted if !inner.leaves_for_halt() => {
                    let takes = inner.has_apic && inner.cpu.can_take_interrupt();
                    self.apic.wait(takes, || inner.now(), || self.cancelled.load(Ordering::Acquire));
                }
                other => {
                    if inner.describe(other, memory, context) {
                        return Ok(());
                    }
                }
            }
        }
    }
}

impl Inner {
    pub(super) fn now(&self) -> Now {
        time(&self.cpu, self.shared.start)
    }

    fn leaves_for_halt(&self) -> bool {
        !self.has_apic && self.shared.halt_leaves
    }

    /// How far the processor may run: one instruction where something that it does not watch itself may change with each.
    fn slice(&self) -> u64 {
        let nmi_waits = self.wanted.nmi() != 0;
        let priority_waits = self.wanted.interrupt() != 0 && !self.passes_priority();
        if nmi_waits || priority_waits { 1 } else { SLICE }
    }

    /// Whether the priority that a notification names is above the task's.
    fn passes_priority(&self) -> bool {
        let priority = self.wanted.interrupt_priority() as u8;
        priority == 0 || self.has_apic || priority > self.own.cr8.load(Ordering::Relaxed)
    }

    /// Prepares the delivery of what waits; true if a notification is due.
    fn notify(&mut self, context: &mut ExitContext) -> bool {
        let events = self.cpu.state().events;
        let shadow = events.sti_shadow || events.mov_ss_shadow;
        if self.wanted.nmi() != 0 && !shadow && !events.nmi_blocked && !events.nmi {
            self.wanted = self.wanted.with_nmi(0);
            self.window(WHvX64PendingNmi, context);
            return true;
        }
        let open = self.cpu.can_take_interrupt() && events.exception.is_none() && !events.nmi;
        if let (Some(vector), true) = (self.ext_int, open) {
            self.ext_int = None;
            if !self.cpu.inject_interrupt(vector) {
                self.ext_int = Some(vector);
            }
        } else if self.wanted.interrupt() != 0 && open && self.passes_priority() {
            // One notification per request.
            self.wanted = self.wanted.with_interrupt(0).with_interrupt_priority(0);
            self.window(WHvX64PendingInterrupt, context);
            return true;
        }
        let waits = self.ext_int.is_some() || self.wanted.interrupt() != 0 && self.passes_priority();
        self.cpu.request_interrupt_window(waits);
        false
    }

    /// Takes in what the local APIC has for the processor; true if the caller must hear of it.
    fn take_signals(&mut self, context: &mut ExitContext) -> bool {
        let (nmi, init, startup) = {
            let mut signals = lock(&self.apic.signals);
            if let Some(icr) = signals.trapped.pop() {
                drop(signals);
                self.init_sipi(icr, context);
                return true;
            }
            if let Some(vector) = signals.eois.pop() {
                drop(signals);
                self.end_of_interrupt(vector, context);
                return true;
            }
            (std::mem::take(&mut signals.nmi), std::mem::take(&mut signals.init), signals.startup.take())
        };
        if nmi {
            self.cpu.inject_nmi();
        }
        if init {
            lock(&self.apic.apic).init();
            self.reset();
            self.startup_suspend = self.apic.index != 0;
        }
        if let (Some(vector), true) = (startup, self.startup_suspend) {
            self.cpu.update(|st| {
                st.segs[1] = vm_accel_softcpu::state::Segment::real(u16::from(vector) << 8, true);
                st.rip = 0;
            });
            self.startup_suspend = false;
        }
        false
    }

    /// Stops the time stamp counter, or lets it go on from where it stood.
    pub(super) fn set_time(&mut self, runs: bool) {
        match (runs, self.frozen.take()) {
            (true, Some(tsc)) => self.cpu.set_tsc(tsc),
            (true, None) => {}
            (false, frozen) => self.frozen = Some(frozen.unwrap_or_else(|| self.cpu.tsc())),
        }
    }

    /// The state after INIT.
    pub(super) fn reset(&mut self) {
        self.cpu.update(|st| *st = CpuState::reset());
        (self.wanted, self.ext_int, self.bad_rflags) = (Deliverability::default(), None, false);
        self.held_event = false;
    }

    /// What hardware refuses to enter with.
    fn entry_failure(&mut self) -> Option<WHV_RUN_VP_EXIT_REASON> {
        let st = self.cpu.state();
        let shadow = st.events.sti_shadow || st.events.mov_ss_shadow;
        let efer_bits = efer::SCE | efer::LME | efer::LMA | efer::NXE;
        let long = st.msr.efer & efer::LME != 0 && st.cr0 & cr0::PG != 0;
        let bad = self.bad_rflags
            || st.cr0 & !cr0::ALL != 0
            || st.cr0 & (cr0::PG | cr0::PE) == cr0::PG
            || st.cr0 & (cr0::NW | cr0::CD) == cr0::NW
            || st.msr.efer & !efer_bits != 0
            || long != (st.msr.efer & efer::LMA != 0)
            || long && st.cr4 & cr4::PAE == 0
            || (st.dr6 | st.dr7) >> 32 != 0
            || st.events.interrupt.is_some() && (st.rflags & rflags::IF == 0 || shadow);
        bad.then_some(WHvRunVpExitReasonInvalidVpRegisterValue)
    }

    /// PAE paging keeps its four top entries in the processor, loaded with CR3 (SDM vol. 3A, 4.4.1).
    fn load_pdptes(&mut self, memory: &Memory) {
        if !std::mem::take(&mut self.reload_pdptes) {
            return;
        }
        let st = self.cpu.state();
        if st.cr0 & cr0::PG == 0 || st.cr4 & cr4::PAE == 0 || st.msr.efer & efer::LMA != 0 {
            return;
        }
        let mut bytes = [0; 32];
        if memory.read(st.cr3 & 0xffff_ffe0, &mut bytes) {
            let entry = |n: usize| u64::from_le_bytes(std::array::from_fn(|i| bytes[8 * n + i]));
            self.cpu.update(|st| st.pdpte = std::array::from_fn(entry));
        }
    }

    /// Describes an exit of the processor; false if it is the platform's own matter.
    fn describe(&mut self, exit: Exit, memory: &Memory, context: &mut ExitContext) -> bool {
        match exit {
            Exit::Io { port, size, write } => {
                self.cpu.abandon();
                self.io(port, size, write, context);
            }
            Exit::Mmio { gpa, size: _, write } => {
                self.cpu.abandon();
                let access = if write { WHvMemoryAccessWrite } else { WHvMemoryAccessRead };
                self.memory(gpa, access, !memory.is_mapped(gpa, 1), context);
            }
            Exit::Halted => {
                self.cpu.update(|st| st.events.halted = false);
                self.halt(context);
            }
            Exit::Shutdown => {
                self.cpu.update(|st| st.events.shutdown = false);
                self.leave(WHvRunVpExitReasonUnrecoverableException, context);
            }
            Exit::Intercept(Intercept::Cpuid { .. }) => self.cpuid(context),
            Exit::Intercept(Intercept::Msr { index, write }) => self.msr(index, write, context),
            Exit::Intercept(Intercept::Rdtsc { p }) => self.rdtsc(p, context),
            Exit::Intercept(Intercept::Exception(exception)) => self.exception(exception, context),
            Exit::Intercept(Intercept::Hypercall) => {
                if self.shared.exits().hypercall_exit() != 0 {
                    self.hypercall(context);
                    return true;
                }
                // Without a hypercall page there is no such instruction.
                let bitmap = self.shared.exception_bitmap.load(Ordering::Relaxed);
                if self.shared.exits().exception_exit() != 0 && bitmap >> Exception::Ud.vector() & 1 != 0 {
                    self.exception(Exception::Ud, context);
                    return true;
                }
                self.cpu.inject_exception(Exception::Ud);
                return false;
            }
            _ => self.leave(WHvRunVpExitReasonUnsupportedFeature, context),
        }
        true
    }
}
