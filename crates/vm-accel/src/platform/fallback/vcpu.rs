//! A vCPU of the fallback: what happens around `Cpu::run`.
//!
//! The CPU leaves for accesses, for HLT, and when somebody wakes it. What this adds: the mailbox of its local APIC (kicks,
//! NMIs, INIT and start-up messages, ends of interrupts), waiting in HLT as hardware does when there is a local APIC, and
//! the completion protocol's bookkeeping.

use super::FallbackVm;
use crate::accel::AccelKind;
use crate::error::{AccelError, VcpuResult};
use crate::platform::soft_apic::{LocalApic, lock};
use crate::regs::x86_64::{MpState, X86Vcpu};
use crate::regs::x86_debug::{debug_event, debug_registers};
use crate::regs::{FpuRegs, GuestRegs};
use crate::vcpu_common::{DebugEvent, GuestDebug, IoDirection, KickTarget, PendingAccess, VcpuExit, VcpuKick, VcpuOps};
use std::cell::RefCell;
use std::sync::Arc;
use std::time::Instant;
use vm_accel_softcpu::apic::Now;
use vm_accel_softcpu::state::Segment;
use vm_accel_softcpu::{Answer, Bus, Cpu, CpuState, Exit, MsrAnswer};

/// Whether the host orders memory accesses as an x86 guest expects; then vCPUs may run in parallel.
const HOST_ORDERS_AS_X86: bool = cfg!(any(target_arch = "x86_64", target_arch = "x86"));
/// Instructions per turn where they may not.
const TURN: u64 = 200_000;

/// One software vCPU.
pub(super) struct FallbackVcpu {
    pub(super) vm: Arc<FallbackVm>,
    id: u32,
    /// Some reads of state (MSRs, translation) change caches of the CPU, hence the cell; nothing holds a borrow across calls.
    pub(super) cpu: RefCell<Cpu>,
    pub(super) apic: Arc<LocalApic>,
    /// The machine has local APICs.
    pub(super) has_apic: bool,
    pub(super) mp_state: MpState,
    pending: Option<PendingAccess>,
    /// What the guest wrote with the last exit, or the answer to its read.
    data: Vec<u8>,
    last_exit: Option<Exit>,
    debug: GuestDebug,
    /// A non-maskable interrupt is in the mailbox that the CPU had no room for.
    nmi_waits: bool,
}

/// The machine as the CPU sees it: its local APIC. Everything else is an exit.
struct ApicBus {
    vm: Arc<FallbackVm>,
    apic: Arc<LocalApic>,
    start: Instant,
    /// The time stamp counter when the CPU last told it; the APIC's MMIO interface does not carry it.
    tsc: u64,
}

impl ApicBus {
    fn now(&self, tsc: u64) -> Now {
        Now { ns: nanoseconds(self.start), tsc }
    }

    /// Whether a page is that of the APIC's registers.
    fn is_mine(&self, gpa: u64) -> bool {
        lock(&self.apic.apic).mmio_base() == Some(gpa & !0xfff)
    }
}

fn nanoseconds(start: Instant) -> u64 {
    u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

impl Bus for ApicBus {
    fn mmio_read(&mut self, gpa: u64, data: &mut [u8]) -> Answer {
        if !self.is_mine(gpa) {
            return Answer::Pending;
        }
        let now = self.now(self.tsc);
        lock(&self.apic.apic).read_mmio(gpa & 0xfff, data, now);
        Answer::Done
    }

    fn mmio_write(&mut self, gpa: u64, data: &[u8]) -> Answer {
        if !self.is_mine(gpa) {
            return Answer::Pending;
        }
        let now = self.now(self.tsc);
        let outcome = lock(&self.apic.apic).write_mmio(gpa & 0xfff, data, now);
        self.vm.fabric.act(&self.apic, outcome);
        Answer::Done
    }

    fn msr_read(&mut self, index: u32, tsc: u64) -> MsrAnswer {
        let now = self.now(tsc);
        let mut apic = lock(&self.apic.apic);
        if !apic.owns_msr(index) {
            return MsrAnswer::NotMine;
        }
        apic.read_msr(index, now).map_or(MsrAnswer::Fault, MsrAnswer::Done)
    }

    fn msr_write(&mut self, index: u32, value: u64, tsc: u64) -> MsrAnswer {
        let now = self.now(tsc);
        let result = {
            let mut apic = lock(&self.apic.apic);
            if !apic.owns_msr(index) {
                return MsrAnswer::NotMine;
            }
            apic.write_msr(index, value, now)
        };
        match result {
            Ok(outcome) => {
                self.vm.fabric.act(&self.apic, outcome);
                MsrAnswer::Done(0)
            }
            Err(_) => MsrAnswer::Fault,
        }
    }

    fn cr8(&mut self) -> u8 {
        lock(&self.apic.apic).cr8()
    }

    fn set_cr8(&mut self, class: u8) {
        lock(&self.apic.apic).set_cr8(class);
    }

    fn interrupt_pending(&mut self, tsc: u64) -> bool {
        self.tsc = tsc;
        let now = self.now(tsc);
        let mut apic = lock(&self.apic.apic);
        apic.advance(now);
        apic.pending().is_some()
    }

    fn acknowledge(&mut self) -> Option<u8> {
        lock(&self.apic.apic).acknowledge()
    }
}

/// The machine without local APICs: only the task priority is kept, because CR8 exists all the same.
#[derive(Default)]
struct BareBus {
    cr8: u8,
}

impl Bus for BareBus {
    fn cr8(&mut self) -> u8 {
        self.cr8
    }

    fn set_cr8(&mut self, class: u8) {
        self.cr8 = class & 15;
    }
}

impl KickTarget for LocalApic {
    fn kick(&self) {
        self.signal(|signals| signals.kicked = true);
    }
}

impl FallbackVcpu {
    pub(super) fn new(vm: &Arc<FallbackVm>, id: u32) -> Self {
        let has_apic = vm.has_local_apics();
        // Without local APICs the mailbox still carries kicks.
        let apic = vm.fabric.add(id, vm.features);
        let bus: Box<dyn Bus> = if has_apic {
            Box::new(ApicBus { vm: Arc::clone(vm), apic: Arc::clone(&apic), start: vm.config.start, tsc: 0 })
        } else {
            Box::new(BareBus::default())
        };
        let cpu = Cpu::new(id, vm.config, Arc::clone(&vm.ram), bus);
        apic.set_wake(Some(cpu.kick_handle()));
        Self {
            vm: Arc::clone(vm),
            id,
            cpu: RefCell::new(cpu),
            apic,
            has_apic,
            mp_state: if has_apic && id != 0 { MpState::Uninitialized } else { MpState::Runnable },
            pending: None,
            data: Vec::new(),
            last_exit: None,
            debug: GuestDebug::default(),
            nmi_waits: false,
        }
    }

    /// Takes in what arrived in the mailbox. Answers with an exit if it is the VMM's to know.
    fn read_mailbox(&mut self) -> Option<VcpuExit> {
        let mut signals = self.apic.signals();
        if std::mem::take(&mut signals.kicked) {
            return Some(VcpuExit::Interrupt);
        }
        if let Some(vector) = signals.take_eoi() {
            return Some(VcpuExit::EndOfInterrupt { vector });
        }
        // The CPU itself keeps one that waits; while one is being handled no more than that is kept.
        let events = self.cpu.get_mut().state().events;
        let nmi = signals.nmis != 0 && !events.nmi;
        if events.nmi_blocked {
            signals.nmis = 0;
        } else if nmi {
            signals.nmis -= 1;
        }
        self.nmi_waits = signals.nmis != 0;
        let init = std::mem::take(&mut signals.init);
        let startup = signals.startup.take();
        drop(signals);
        let cpu = self.cpu.get_mut();
        if nmi {
            cpu.inject_nmi();
        }
        if init {
            lock(&self.apic.apic).init();
            cpu.update(|state| *state = CpuState::reset());
            // The boot CPU starts over at the reset vector, the others wait (Intel SDM vol. 3, 9.1.1).
            self.mp_state = if self.id == 0 { MpState::Runnable } else { MpState::InitReceived };
        }
        if let (Some(vector), MpState::InitReceived) = (startup, self.mp_state) {
            cpu.update(|state| {
                let selector = u16::from(vector) << 8;
                state.segs[vm_accel_softcpu::state::seg::CS] = Segment::real(selector, true);
                state.rip = 0;
            });
            self.mp_state = MpState::Runnable;
        }
        None
    }

    fn now(&self) -> Now {
        Now { ns: nanoseconds(self.vm.config.start), tsc: self.cpu.borrow().tsc() }
    }

    /// Waits in HLT, or for a start-up message.
    fn wait(&self) {
        let (takes, hz) = {
            let cpu = self.cpu.borrow();
            (self.mp_state == MpState::Runnable && cpu.can_take_interrupt(), cpu.tsc_frequency())
        };
        self.apic.wait(takes, hz, || self.now());
    }

    /// Runs the CPU until it leaves.
    fn enter(&mut self) -> Exit {
        let cpu = self.cpu.get_mut();
        if self.nmi_waits {
            // Come back as soon as the CPU has room for it.
            return cpu.run(1);
        }
        if HOST_ORDERS_AS_X86 {
            return cpu.run(u64::MAX);
        }
        loop {
            let turn = lock(&self.vm.turn);
            let exit = cpu.run(TURN);
            drop(turn);
            if exit != Exit::Budget {
                return exit;
            }
            // Let the next vCPU have the lock.
            std::thread::yield_now();
        }
    }

    /// An unanswered read is an error.
    fn check_answered(&mut self) -> VcpuResult<()> {
        match self.pending {
            Some(PendingAccess { addr, len, answered: false, .. }) => Err(AccelError::PendingRead { addr, len }),
            _ => Ok(()),
        }
    }

    /// The neutral form of an exit; `None` if nobody need know of it.
    fn translate(&mut self, exit: Exit) -> Option<VcpuExit> {
        self.last_exit = Some(exit);
        Some(match exit {
            Exit::Io { port, size, write } => {
                self.expect(u64::from(port), size, write);
                let direction = if write { IoDirection::Out } else { IoDirection::In };
                VcpuExit::Io { port, direction, size }
            }
            Exit::Mmio { gpa, size, write } => {
                self.expect(gpa, size, write);
                VcpuExit::Mmio { addr: gpa, size, is_write: write }
            }
            Exit::Hypercall => VcpuExit::SystemCall,
            Exit::Debug { .. } => VcpuExit::Debug,
            Exit::Shutdown => VcpuExit::TripleFault,
            Exit::InterruptWindow => VcpuExit::InterruptWindow,
            Exit::Halted if !self.has_apic => {
                // The VMM decides when the guest goes on: at its next run.
                self.cpu.get_mut().update(|state| state.events.halted = false);
                VcpuExit::Halted
            }
            Exit::Halted | Exit::Kicked | Exit::Budget => return None,
            _ => VcpuExit::Unknown,
        })
    }

    fn expect(&mut self, addr: u64, size: u8, is_write: bool) {
        self.data.clear();
        self.data.extend_from_slice(self.cpu.get_mut().io_data());
        self.pending = Some(PendingAccess { addr, len: size.into(), is_write, answered: is_write });
    }
}

impl Drop for FallbackVcpu {
    fn drop(&mut self) {
        self.apic.set_wake(None);
    }
}

impl VcpuOps for FallbackVcpu {
    fn get_id(&self) -> u32 {
        self.id
    }

    fn run(&mut self) -> VcpuResult<VcpuExit> {
        self.check_answered()?;
        loop {
            if self.pending.is_some() {
                // A kick must not keep the instruction under way from being finished.
                let exit = self.quiesce()?;
                if exit != VcpuExit::Interrupt {
                    return Ok(exit);
                }
            }
            if let Some(exit) = self.read_mailbox() {
                return Ok(exit);
            }
            if self.mp_state != MpState::Runnable {
                self.wait();
                continue;
            }
            let exit = self.enter();
            if let Some(exit) = self.translate(exit) {
                return Ok(exit);
            }
            if exit == Exit::Halted {
                self.wait();
            }
        }
    }

    fn quiesce(&mut self) -> VcpuResult<VcpuExit> {
        self.check_answered()?;
        if self.pending.take().is_some_and(|pending| !pending.is_write) {
            // Where the VMM has moved the program counter meanwhile nobody waits for the answer any more.
            let _ = self.cpu.get_mut().complete_read(&self.data);
        }
        let exit = self.cpu.get_mut().quiesce();
        Ok(exit.and_then(|exit| self.translate(exit)).unwrap_or(VcpuExit::Interrupt))
    }

    fn get_regs(&self) -> VcpuResult<GuestRegs> {
        let cpu = self.cpu.borrow();
        let state = cpu.state();
        let mut regs = GuestRegs { pc: state.rip, flags: state.rflags, ..GuestRegs::default() };
        regs.gpr[..16].copy_from_slice(&state.gpr[..16]);
        Ok(regs)
    }

    fn set_regs(&mut self, regs: &GuestRegs) -> VcpuResult<()> {
        self.cpu.get_mut().update(|state| {
            state.gpr[..16].copy_from_slice(&regs.gpr[..16]);
            state.rip = regs.pc;
            state.rflags = regs.flags & vm_accel_softcpu::state::rflags::ALL;
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
        Some(AccelKind::Fallback)
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
        Err(AccelError::invalid("refused access", "no access to an MSR is pending"))
    }

    fn pending_access(&self) -> Option<PendingAccess> {
        self.pending
    }

    fn kick_handle(&self) -> VcpuResult<VcpuKick> {
        Ok(VcpuKick::new(Arc::clone(&self.apic) as _))
    }

    fn set_guest_debug(&mut self, debug: &GuestDebug) -> VcpuResult<()> {
        let (dr, dr7) = debug_registers(&debug.hardware)?;
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
        let (dr, dr7) = debug_registers(&self.debug.hardware)?;
        Ok(debug_event(vector, self.cpu.borrow().state().rip, dr6, dr7, Some(dr)))
    }

    fn as_x86(&mut self) -> Option<&mut dyn X86Vcpu> {
        Some(self)
    }
}
