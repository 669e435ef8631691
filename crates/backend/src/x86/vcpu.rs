//! A vCPU: what happens around an engine's entry.
//!
//! The mailbox of its local APIC (kicks, NMIs, INIT and start-up messages, ends of interrupts), waiting in HLT as hardware
//! does when there is a local APIC, what is injected when, and the completion protocol's bookkeeping.

use super::bus::{ApicBus, MsrTurn, nanoseconds};
use super::{Engine, Groups, Left, Order, Platform, PortAccess, Shared};
use crate::gate::Gate;
use crate::gate::Wake;
use crate::lock;
use crate::soft_apic::{LocalApic, until};
use crate::x86_debug::{debug_event, debug_registers};
use std::cell::{Cell, RefCell};
use std::sync::{Arc, Mutex};
use std::time::Instant;
use vm_accel_core::accel::{AccelKind, IoAddress};
use vm_accel_core::error::{AccelError, VcpuResult};
use vm_accel_core::regs::x86_64::{MpState, X86Vcpu};
use vm_accel_core::regs::{FpuRegs, GuestRegs};
use vm_accel_core::vcpu_common::{
    DebugEvent, GuestDebug, IoDirection, KickTarget, PendingAccess, VcpuExit, VcpuKick, VcpuOps,
};
use vm_accel_softcpu::apic::Now;
use vm_accel_softcpu::state::{Msrs, Segment, rflags, seg};
use vm_accel_softcpu::{Cpu, CpuState, Exit, Intercept, MsrAnswer};

/// One vCPU.
pub(crate) struct SoftVcpu<P: Platform> {
    // The engine goes first: it uses the machine's memory.
    pub(super) engine: P::Engine,
    pub(super) shared: Arc<Shared<P>>,
    id: u32,
    /// The emulator. Some reads of state (MSRs, translation) change caches of it, hence the cell; nothing holds a borrow
    /// across calls.
    pub(super) cpu: RefCell<Cpu>,
    /// What the platform holds, as far as it was asked: see [`Engine`].
    there: RefCell<CpuState>,
    /// The groups of the emulator's state that are true.
    held: Cell<Groups>,
    /// The platform was not yet asked what it holds; all groups are the emulator's.
    fresh: bool,
    gate: Option<Arc<Gate>>,
    pub(super) apic: Arc<LocalApic>,
    /// The machine has local APICs.
    pub(super) has_apic: bool,
    pub(super) mp_state: MpState,
    pending: Option<PendingAccess>,
    /// What the guest wrote with the last exit, or the answer to its read.
    data: Vec<u8>,
    /// The pending access is one that the emulator knows nothing of.
    port: Option<PortAccess>,
    /// The pending access is of an MSR: where the instruction is, and whether the VMM refused it.
    asked_msr: Option<(u64, bool)>,
    msr_turn: Arc<Mutex<MsrTurn>>,
    last_exit: Option<Exit>,
    debug: GuestDebug,
    /// A non-maskable interrupt is in the mailbox that the CPU had no room for.
    nmi_waits: bool,
    /// A non-maskable interrupt that cannot be injected with this entry.
    nmi_parked: bool,
    /// The VMM asked for an interrupt window.
    pub(super) window: bool,
}

impl KickTarget for LocalApic {
    fn kick(&self) {
        self.signal(|signals| signals.kicked = true);
    }
}

impl<P: Platform> SoftVcpu<P> {
    pub(super) fn new(shared: &Arc<Shared<P>>, id: u32, engine: P::Engine) -> Self {
        let has_apic = shared.has_local_apics();
        // Without local APICs the mailbox still carries kicks.
        let apic = shared.fabric.add(id, shared.features);
        let (fabric, mine) = (Arc::clone(&shared.fabric), Arc::clone(&apic));
        let msr_turn = Arc::<Mutex<_>>::default();
        let (msr_exits, turn) = (Arc::clone(&shared.msr_exits), Arc::clone(&msr_turn));
        let start = shared.config.start;
        let bus = Box::new(ApicBus { has_apic, fabric, apic: mine, start, tsc: 0, msr_exits, msr_turn: turn });
        let mut cpu = Cpu::new(id, shared.config, Arc::clone(&shared.ram), bus);
        if let Some(cpuid) = &shared.cpuid {
            cpu.set_cpuid(cpuid);
        }
        let kick = cpu.kick_handle();
        let gate = engine.canceller().map(|cancel| {
            // One of them runs the guest: see `enter_emulator`.
            let both = move || {
                cancel();
                kick.kick();
            };
            Gate::new(Box::new(both), &shared.alarm)
        });
        let wake: Arc<dyn Wake> = match &gate {
            Some(gate) => Arc::clone(gate) as _,
            None => Arc::new(cpu.kick_handle()),
        };
        apic.set_wake(Some(wake));
        Self {
            shared: Arc::clone(shared),
            id,
            engine,
            cpu: RefCell::new(cpu),
            there: RefCell::new(CpuState::reset()),
            held: Cell::new(Groups::all()),
            fresh: !P::Engine::IN_PLACE,
            gate,
            apic,
            has_apic,
            mp_state: if has_apic && id != 0 { MpState::Uninitialized } else { MpState::Runnable },
            pending: None,
            data: Vec::new(),
            port: None,
            asked_msr: None,
            msr_turn,
            last_exit: None,
            debug: GuestDebug::default(),
            nmi_waits: false,
            nmi_parked: false,
            window: false,
        }
    }

    /// Makes groups of the emulator's state true.
    pub(super) fn load(&self, groups: Groups) -> VcpuResult<()> {
        self.engine.check_thread("access to a vCPU")?;
        // The privilege level needs RFLAGS.
        let groups = if groups.contains(Groups::SYSTEM) { groups | Groups::GPR } else { groups };
        let missing = groups.difference(self.held.get());
        if missing.is_empty() {
            return Ok(());
        }
        let mut there = self.there.borrow_mut();
        self.engine.load(missing, &mut there)?;
        if missing.contains(Groups::SYSTEM) {
            there.pdpte = self.page_directory_pointers(there.cr0, there.cr3, there.cr4, there.msr.efer)?;
        }
        self.cpu.borrow_mut().update(|state| {
            missing.copy(&there, state);
            if missing.contains(Groups::SYSTEM) {
                state.pdpte = there.pdpte;
                // The stack segment's privilege is the CPU's (Intel SDM vol. 3, 5.5); real mode has none.
                state.cpl = match state.cr0 & vm_accel_softcpu::state::cr0::PE != 0 {
                    false => 0,
                    true if state.rflags & rflags::VM != 0 => 3,
                    true => state.segs[seg::SS].dpl(),
                };
            }
        });
        self.held.set(self.held.get() | missing);
        Ok(())
    }

    /// Gives the platform what was changed.
    fn store(&mut self) -> VcpuResult<()> {
        let (held, there) = (self.held.get(), self.there.get_mut());
        if self.fresh {
            self.engine.load(Groups::all(), there)?;
            self.fresh = false;
        }
        let state = self.cpu.get_mut().state();
        self.engine.store(held, there, state)?;
        held.copy(state, there);
        if held.contains(Groups::EVENTS) {
            there.events.nmi = state.events.nmi;
        }
        Ok(())
    }

    /// Takes in what arrived in the mailbox. Answers with an exit if it is the VMM's to know.
    fn read_mailbox(&mut self) -> VcpuResult<Option<VcpuExit>> {
        let has_nmi = {
            let mut signals = self.apic.signals();
            if std::mem::take(&mut signals.kicked) {
                return Ok(Some(VcpuExit::Interrupt));
            }
            if let Some(vector) = signals.take_eoi() {
                return Ok(Some(VcpuExit::EndOfInterrupt { vector }));
            }
            signals.nmis != 0
        };
        if has_nmi {
            self.load(Groups::EVENTS)?;
        }
        // The CPU itself keeps one that waits; while one is being handled no more than that is kept.
        let events = self.cpu.get_mut().state().events;
        let mut signals = self.apic.signals();
        let nmi = signals.nmis != 0 && has_nmi && !events.nmi;
        if has_nmi && events.nmi_blocked {
            signals.nmis = 0;
        } else if nmi {
            signals.nmis -= 1;
        }
        self.nmi_waits = signals.nmis != 0;
        let init = std::mem::take(&mut signals.init);
        let startup = signals.startup.take();
        drop(signals);
        if nmi {
            self.cpu.get_mut().inject_nmi();
        }
        if init {
            self.load(Groups::all())?;
            lock(&self.apic.apic).init();
            self.cpu.get_mut().update(|state| {
                // INIT leaves the MSRs alone, but for EFER (Intel SDM vol. 3, table "IA-32 and Intel 64 Processor States
                // Following Power-up, Reset, or INIT").
                let msr = Msrs { efer: 0, ..state.msr };
                *state = CpuState { msr, ..CpuState::reset() };
            });
            // The boot CPU starts over at the reset vector, the others wait (Intel SDM vol. 3, 9.1.1).
            self.mp_state = if self.id == 0 { MpState::Runnable } else { MpState::InitReceived };
        }
        if let (Some(vector), MpState::InitReceived) = (startup, self.mp_state) {
            self.load(Groups::SYSTEM)?;
            self.cpu.get_mut().update(|state| {
                let selector = u16::from(vector) << 8;
                state.segs[seg::CS] = Segment::real(selector, true);
                state.rip = 0;
            });
            self.mp_state = MpState::Runnable;
        }
        Ok(None)
    }

    pub(super) fn now(&self) -> Now {
        Now { ns: nanoseconds(self.shared.config.start), tsc: self.cpu.borrow().tsc() }
    }

    /// Whether the guest could take an external interrupt before its next instruction.
    pub(super) fn can_take_interrupt(&self) -> VcpuResult<bool> {
        self.load(Groups::GPR | Groups::EVENTS)?;
        let cpu = self.cpu.borrow();
        Ok(cpu.can_take_interrupt() && cpu.state().events.exception.is_none())
    }

    /// Waits in HLT, or for a start-up message.
    fn wait(&self) -> VcpuResult<()> {
        let takes = self.mp_state == MpState::Runnable && self.can_take_interrupt()?;
        let hz = self.cpu.borrow().tsc_frequency();
        self.apic.wait(takes, hz, || self.now());
        Ok(())
    }

    /// Decides what a hypervisor is to inject and what it is to look out for. Answers with an exit if the guest need not be
    /// entered.
    fn prepare(&mut self, order: &mut Order) -> VcpuResult<Option<Exit>> {
        let mut requested = None;
        if self.has_apic {
            let now = self.now();
            let mut apic = lock(&self.apic.apic);
            apic.advance(now);
            requested = apic.requested();
        }
        order.apic_base = lock(&self.apic.apic).base();
        let mut events = self.cpu.get_mut().state().events;
        if events.shutdown {
            return Ok(Some(Exit::Shutdown));
        }
        if requested.is_some() || self.window || events.nmi || events.halted {
            self.load(Groups::GPR | Groups::EVENTS)?;
        }
        if self.held.get().contains(Groups::EVENTS) {
            let there = self.there.get_mut().events;
            // The VMM's (a restored state): what is new in delivery although the guest could not take it is not worth a way
            // through the platform.
            loop {
                let state = self.cpu.get_mut().state();
                let closed = state.rflags & rflags::IF == 0 || state.events.sti_shadow || state.events.mov_ss_shadow;
                let fault = state.events.exception.is_some() && state.events.exception != there.exception;
                let late = state.events.interrupt.is_some() && state.events.interrupt != there.interrupt && closed;
                if !fault && !late {
                    break;
                }
                self.load(Groups::all())?;
                if let Some(exit) = self.cpu.get_mut().deliver_event() {
                    return Ok(Some(exit));
                }
            }
            let mut can_take = self.can_take_interrupt()?;
            let cpu = self.cpu.get_mut();
            events = cpu.state().events;
            if events.nmi && !there.nmi {
                let is_held_back = events.nmi_blocked || events.sti_shadow || events.mov_ss_shadow;
                self.nmi_parked = is_held_back || events.exception.is_some() || events.interrupt.is_some();
                events.nmi = !self.nmi_parked;
            }
            can_take &= !events.nmi;
            if can_take && requested.is_some() {
                events.interrupt = cpu.bus_mut().acknowledge();
                can_take = events.interrupt.is_none();
                requested = lock(&self.apic.apic).requested();
            }
            // Both end HLT.
            events.halted &= !events.nmi && events.interrupt.is_none();
            cpu.update(|state| state.events = events);
            if can_take && std::mem::take(&mut self.window) {
                return Ok(Some(Exit::InterruptWindow));
            }
        }
        order.window = if self.window { Some(0) } else { requested.map(|vector| vector >> 4) };
        order.nmi_window |= self.nmi_parked;
        order.cr8 = self.cpu.get_mut().bus_mut().cr8();
        Ok(events.halted.then_some(Exit::Halted))
    }

    /// Enters the guest on a hypervisor, unless there is a reason not to.
    fn enter_platform(&mut self, order: &mut Order) -> VcpuResult<Left> {
        if let Some(exit) = self.prepare(order)? {
            return Ok(Left::Exit(exit));
        }
        let Some(gate) = self.gate.clone() else {
            return Ok(Left::Again);
        };
        let wait = if self.has_apic {
            let deadline = lock(&self.apic.apic).next_deadline();
            deadline.map(|deadline| until(deadline, self.now(), self.cpu.borrow().tsc_frequency()))
        } else {
            // Without an APIC it is the VMM that waits for a halted CPU.
            self.engine.look_for_halt()
        };
        if !gate.enter(wait.map(|wait| Instant::now() + wait)) {
            return Ok(Left::Again);
        }
        let left = self.store().and_then(|()| {
            // From here on everything is the platform's.
            self.held.set(Groups::empty());
            self.engine.enter(self.cpu.get_mut(), order)
        });
        gate.leave();
        let left = left?;
        let halted = matches!(left, Left::Exit(Exit::Halted));
        let shutdown = matches!(left, Left::Exit(Exit::Shutdown));
        let cpu = self.cpu.get_mut();
        if cpu.state().events.nmi || halted || shutdown {
            cpu.update(|state| {
                // It was injected.
                state.events.nmi = false;
                (state.events.halted, state.events.shutdown) = (halted, shutdown);
            });
        }
        if let Some(cr8) = self.engine.cr8().filter(|class| *class != order.cr8) {
            cpu.bus_mut().set_cr8(cr8);
        }
        Ok(left)
    }

    /// Sets the emulator's time-stamp counter by the platform's.
    fn take_tsc(&mut self) -> VcpuResult<()> {
        if let Some(tsc) = self.engine.tsc()? {
            self.cpu.get_mut().set_tsc(tsc);
        }
        Ok(())
    }

    /// Runs the guest on the emulator although there is a platform: the host debugs it.
    fn enter_emulator(&mut self) -> VcpuResult<Left> {
        self.load(Groups::all())?;
        self.take_tsc()?;
        let Some(gate) = self.gate.as_ref().filter(|gate| gate.enter(None)) else {
            return Ok(Left::Again);
        };
        let exit = self.cpu.get_mut().run(if self.nmi_waits { 1 } else { u64::MAX });
        gate.leave();
        Ok(Left::Exit(exit))
    }

    /// Runs the guest until it leaves. `None` if nobody need know why.
    fn enter(&mut self) -> VcpuResult<Option<VcpuExit>> {
        let mut order = Order { nmi_window: self.nmi_waits, ..Order::default() };
        let left = if P::Engine::IN_PLACE {
            self.engine.enter(self.cpu.get_mut(), &order)
        } else if P::Engine::DEBUGS_ON_EMULATOR && self.debug != GuestDebug::default() {
            self.enter_emulator()
        } else {
            let left = self.enter_platform(&mut order);
            if std::mem::take(&mut self.nmi_parked) {
                self.cpu.get_mut().inject_nmi();
            }
            left
        };
        match left? {
            Left::Again => Ok(None),
            Left::Other(exit) => Ok(Some(exit)),
            Left::Exit(exit) => self.translate(exit),
            Left::Port(access) => {
                let PortAccess { port, size, is_write, rax, .. } = access;
                self.last_exit = Some(Exit::Io { port, size, write: is_write });
                self.data.clear();
                self.data.extend_from_slice(&rax.to_le_bytes()[..if is_write { size.into() } else { 0 }]);
                self.port = Some(access);
                self.port_exit(port, size, is_write)
            }
            Left::Emulate(groups) => {
                self.load(groups | Groups::SYSTEM | Groups::EVENTS)?;
                if groups.contains(Groups::MSR) {
                    self.take_tsc()?;
                }
                let in_delivery = self.there.get_mut().events;
                let cpu = self.cpu.get_mut();
                let exit = if in_delivery.exception.is_some() || in_delivery.interrupt.is_some() || in_delivery.nmi {
                    // The fault was met on the way to the handler: the instruction at RIP has not begun.
                    cpu.update(|state| state.events.nmi_blocked &= !in_delivery.nmi);
                    cpu.deliver_event()
                } else {
                    cpu.finish_instruction()
                };
                exit.map_or(Ok(None), |exit| self.translate(exit))
            }
        }
    }

    /// An unanswered read is an error.
    fn check_answered(&self) -> VcpuResult<()> {
        match self.pending {
            Some(PendingAccess { addr, len, answered: false, .. }) => Err(AccelError::PendingRead { addr, len }),
            _ => Ok(()),
        }
    }

    /// The neutral form of an exit; `None` if nobody need know of it.
    fn translate(&mut self, exit: Exit) -> VcpuResult<Option<VcpuExit>> {
        self.last_exit = Some(exit);
        Ok(Some(match exit {
            Exit::Io { port, size, write } => {
                self.take_data();
                return self.port_exit(port, size, write);
            }
            Exit::Mmio { gpa, size, write } => {
                self.take_data();
                if self.expect(IoAddress::Mmio(gpa), gpa, size, write)? {
                    return Ok(None);
                }
                VcpuExit::Mmio { addr: gpa, size, is_write: write }
            }
            Exit::Hypercall => VcpuExit::SystemCall,
            Exit::Debug { .. } => VcpuExit::Debug,
            Exit::Shutdown => VcpuExit::TripleFault,
            Exit::InterruptWindow => {
                self.window = false;
                VcpuExit::InterruptWindow
            }
            Exit::Halted if self.engine.apic().is_some() => {
                // The platform waits, whoever executed HLT.
                self.cpu.get_mut().update(|state| state.events.halted = false);
                self.set_mp_state(MpState::Halted)?;
                return Ok(None);
            }
            Exit::Halted if !self.has_apic => {
                // The VMM decides when the guest goes on: at its next run.
                self.cpu.get_mut().update(|state| state.events.halted = false);
                VcpuExit::Halted
            }
            Exit::Halted => {
                self.wait()?;
                return Ok(None);
            }
            Exit::Kicked | Exit::Budget => return Ok(None),
            Exit::Intercept(Intercept::Msr { index, write }) => match self.access_msr(MsrTurn::Try) {
                Some(Exit::Intercept(Intercept::Exception(_))) => self.ask_for_msr(index, write),
                other => return other.map_or(Ok(None), |exit| self.translate(exit)),
            },
            _ => VcpuExit::Unknown,
        }))
    }

    /// Takes what the emulator writes.
    fn take_data(&mut self) {
        self.data.clear();
        self.data.extend_from_slice(self.cpu.get_mut().io_data());
    }

    fn port_exit(&mut self, port: u16, size: u8, is_write: bool) -> VcpuResult<Option<VcpuExit>> {
        let is_taken = self.expect(IoAddress::Pio(port), port.into(), size, is_write)?;
        let direction = if is_write { IoDirection::Out } else { IoDirection::In };
        Ok((!is_taken).then_some(VcpuExit::Io { port, direction, size }))
    }

    /// Notes the access that the guest waits for. True if a doorbell took it: there is nothing to ask the VMM.
    fn expect(&mut self, address: IoAddress, addr: u64, size: u8, is_write: bool) -> VcpuResult<bool> {
        self.pending = Some(PendingAccess { addr, len: size.into(), is_write, answered: is_write });
        if is_write { self.shared.ring(address, &self.data) } else { Ok(false) }
    }

    /// Executes the RDMSR or WRMSR at RIP.
    fn access_msr(&mut self, turn: MsrTurn) -> Option<Exit> {
        *lock(&self.msr_turn) = turn;
        let exit = self.cpu.get_mut().finish_instruction();
        *lock(&self.msr_turn) = MsrTurn::Ask;
        exit
    }

    /// Notes the access to an MSR that the VMM is to answer.
    fn ask_for_msr(&mut self, index: u32, is_write: bool) -> VcpuExit {
        let state = self.cpu.get_mut().state();
        let value = state.gpr[2] << 32 | state.gpr[0] & 0xffff_ffff;
        self.asked_msr = Some((state.rip, false));
        self.data.clear();
        self.data.extend_from_slice(&value.to_le_bytes());
        self.pending = Some(PendingAccess { addr: index.into(), len: 8, is_write, answered: is_write });
        VcpuExit::Msr { index, is_write }
    }

    /// Ends a port access that the emulator knows nothing of.
    fn finish_port(&mut self, access: PortAccess) -> VcpuResult<()> {
        let PortAccess { is_write, rax, rip, next, .. } = access;
        if !self.held.get().contains(Groups::GPR) {
            return self.engine.finish_port(next, (!is_write).then(|| access.merge(rax, &self.data)));
        }
        // The VMM has looked, and may have changed something.
        let data = &self.data;
        self.cpu.get_mut().update(|state| {
            if state.rip == rip {
                state.rip = next;
                state.gpr[0] = if is_write { state.gpr[0] } else { access.merge(state.gpr[0], data) };
            }
        });
        Ok(())
    }

    /// Gives the guest what the VMM answered. The exit to which that leads, if any.
    fn answer(&mut self) -> VcpuResult<Option<Exit>> {
        if let Some(access) = self.port {
            self.finish_port(access)?;
            (self.port, self.pending) = (None, None);
            return Ok(None);
        }
        let pending = self.pending.take();
        let rip = self.cpu.get_mut().state().rip;
        match self.asked_msr.take() {
            // Where the VMM has moved the program counter meanwhile nobody waits for the answer any more.
            Some((at, _)) if at != rip => return Ok(None),
            Some((_, true)) => return Ok(self.access_msr(MsrTurn::Answered(MsrAnswer::Fault))),
            Some((_, false)) => {
                let value = u64::from_le_bytes(std::array::from_fn(|n| self.data.get(n).copied().unwrap_or(0)));
                return Ok(self.access_msr(MsrTurn::Answered(MsrAnswer::Done(value))));
            }
            None if pending.is_some_and(|pending| !pending.is_write) => {
                // As above.
                let _ = self.cpu.get_mut().complete_read(&self.data);
            }
            None => {}
        }
        Ok(self.cpu.get_mut().quiesce())
    }
}

impl<P: Platform> Drop for SoftVcpu<P> {
    fn drop(&mut self) {
        self.apic.set_wake(None);
        if let Some(gate) = &self.gate {
            gate.close();
        }
    }
}

impl<P: Platform> VcpuOps for SoftVcpu<P> {
    fn get_id(&self) -> u32 {
        self.id
    }

    fn run(&mut self) -> VcpuResult<VcpuExit> {
        self.engine.check_thread("run")?;
        self.check_answered()?;
        loop {
            if self.pending.is_some() {
                // A kick must not keep the instruction under way from being finished.
                let exit = self.quiesce()?;
                if exit != VcpuExit::Interrupt {
                    return Ok(exit);
                }
            }
            if let Some(gate) = &self.gate {
                gate.attend();
            }
            if let Some(exit) = self.read_mailbox()? {
                return Ok(exit);
            }
            if self.mp_state != MpState::Runnable {
                self.wait()?;
                continue;
            }
            if let Some(exit) = self.enter()? {
                return Ok(exit);
            }
        }
    }

    fn quiesce(&mut self) -> VcpuResult<VcpuExit> {
        self.check_answered()?;
        loop {
            let Some(exit) = self.answer()? else {
                return Ok(VcpuExit::Interrupt);
            };
            let exit = if exit == Exit::Halted && self.has_apic { None } else { self.translate(exit)? };
            match exit {
                Some(exit) => return Ok(exit),
                None if self.pending.is_none() => return Ok(VcpuExit::Interrupt),
                None => {}
            }
        }
    }

    fn get_regs(&self) -> VcpuResult<GuestRegs> {
        self.load(Groups::GPR)?;
        let cpu = self.cpu.borrow();
        let state = cpu.state();
        let mut regs = GuestRegs { pc: state.rip, flags: state.rflags, ..GuestRegs::default() };
        regs.gpr[..16].copy_from_slice(&state.gpr[..16]);
        Ok(regs)
    }

    fn set_regs(&mut self, regs: &GuestRegs) -> VcpuResult<()> {
        self.load(Groups::GPR)?;
        self.cpu.get_mut().update(|state| {
            state.gpr[..16].copy_from_slice(&regs.gpr[..16]);
            state.rip = regs.pc;
            state.rflags = regs.flags & rflags::ALL;
        });
        Ok(())
    }

    fn get_fpu_regs(&self) -> VcpuResult<FpuRegs> {
        self.fpu()
    }

    fn set_fpu_regs(&mut self, regs: &FpuRegs) -> VcpuResult<()> {
        self.set_fpu(regs)
    }

    fn kind(&self) -> Option<AccelKind> {
        Some(P::KIND)
    }

    fn io_data(&self) -> VcpuResult<&[u8]> {
        match self.pending {
            Some(PendingAccess { is_write: true, .. }) => Ok(&self.data),
            _ => Err(AccelError::invalid("data of a write", "no such access is pending")),
        }
    }

    fn complete_read(&mut self, data: &[u8]) -> VcpuResult<()> {
        let Some(pending) = self.pending.as_mut().filter(|pending| !pending.is_write) else {
            return Err(AccelError::invalid("answer to a read", "no such access is pending"));
        };
        if data.len() != pending.len {
            return Err(AccelError::invalid(
                "answer to a read",
                format!("{} bytes were given, {} are needed", data.len(), pending.len),
            ));
        }
        pending.answered = true;
        self.data.clear();
        self.data.extend_from_slice(data);
        Ok(())
    }

    fn fail_access(&mut self) -> VcpuResult<()> {
        let (Some((_, refused)), Some(pending)) = (&mut self.asked_msr, &mut self.pending) else {
            return Err(AccelError::invalid("refused access", "no access to an MSR is pending"));
        };
        (*refused, pending.answered) = (true, true);
        Ok(())
    }

    fn pending_access(&self) -> Option<PendingAccess> {
        self.pending
    }

    fn kick_handle(&self) -> VcpuResult<VcpuKick> {
        Ok(VcpuKick::new(Arc::clone(&self.apic) as _))
    }

    fn set_guest_debug(&mut self, debug: &GuestDebug) -> VcpuResult<()> {
        if P::Engine::DEBUGS_ON_EMULATOR && self.engine.apic().is_some() && *debug != GuestDebug::default() {
            return Err(self.unsupported("guest debugging with the platform's local APICs"));
        }
        let (dr, dr7) = debug_registers(&debug.hardware)?;
        self.engine.set_guest_debug(debug)?;
        self.cpu.get_mut().set_guest_debug(vm_accel_softcpu::GuestDebug {
            single_step: debug.single_step,
            software_breakpoints: debug.software_breakpoints,
            hardware_breakpoints: !debug.hardware.is_empty(),
            dr,
            dr7: if debug.hardware.is_empty() { 0 } else { dr7 },
        });
        self.debug = debug.clone();
        Ok(())
    }

    fn debug_event(&self) -> VcpuResult<DebugEvent> {
        let Some(Exit::Debug { vector, dr6 }) = self.last_exit else {
            return Err(AccelError::invalid("debug event", "the last exit was another one"));
        };
        self.load(Groups::GPR)?;
        let (dr, dr7) = debug_registers(&self.debug.hardware)?;
        Ok(debug_event(vector, self.cpu.borrow().state().rip, dr6, dr7, Some(dr)))
    }

    fn raw_exit(&self) -> Option<u64> {
        self.engine.raw_exit()
    }

    fn as_x86(&mut self) -> Option<&mut dyn X86Vcpu> {
        Some(self)
    }
}
