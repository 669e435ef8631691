//! A vCPU: how it is entered and called back, and what its exits mean.
//!
//! Where the program counter stands follows the architecture: behind HVC, at the instruction for everything else. So what was
//! done for the guest is skipped here, and an access that the VMM is asked for is not done until the next run.

use super::Vm;
use super::call::{Answer, Power, answer};
use super::debug::Debugging;
use super::gic;
use super::state::Registers;
use crate::platform::hvf::check;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Instant;
use vm_accel_backend::aarch64_access::exception::{ISS_WALK, ISS_WRITE, SYNCHRONOUS, class, pstate};
use vm_accel_backend::aarch64_access::{Access, Cpu, System};
use vm_accel_backend::aarch64_debug::debug_event;
use vm_accel_backend::lock;
use vm_accel_core::accel::{AccelKind, MemoryFlags};
use vm_accel_core::error::{AccelError, VcpuResult};
use vm_accel_core::regs::aarch64::{
    self as aarch64, Aarch64Events, Aarch64FpuRegs, Aarch64MpState, Aarch64Vcpu, PlatformRegister, VirtualTimer,
};
use vm_accel_core::regs::{FpuRegs, GuestRegs};
use vm_accel_core::vcpu_common::{DebugEvent, GuestDebug, KickTarget, PendingAccess, VcpuExit, VcpuKick, VcpuOps};
use vm_accel_sys::hvf::aarch64::{ExitException, HvfArm64Api, interrupt, reason, reg, sys_reg};

/// Exception classes beside the shared ones.
mod trap {
    pub(super) const WFX: u64 = 0x01;
    pub(super) const HVC: u64 = 0x16;
    pub(super) const SMC: u64 = 0x17;
    pub(super) const SYS_REG: u64 = 0x18;
    pub(super) const BRK: u64 = 0x3c;
}

/// CNTV_CTL_EL0: enabled, its time has come, not masked.
const TIMER_FIRES: u64 = 5;
const TIMER_MASKED: u64 = 2;

/// What others know of a vCPU.
pub(super) struct Shared {
    api: &'static HvfArm64Api,
    id: u32,
    /// A kick that no run has returned for.
    kicked: AtomicBool,
    /// The framework's number, as long as it means this vCPU. Locked while it is used, so never after that.
    target: Mutex<Option<u64>>,
    power: Mutex<Power>,
    /// Lines of private interrupts that are up.
    lines: AtomicU32,
    /// Whoever waits instead of running has to look again.
    changed: Condvar,
}

impl Shared {
    pub(super) fn new(api: &'static HvfArm64Api, id: u32) -> Self {
        let power = if id == 0 { Power::On } else { Power::Off };
        Self {
            api,
            id,
            kicked: AtomicBool::new(false),
            target: Mutex::default(),
            power: Mutex::new(power),
            lines: AtomicU32::new(0),
            changed: Condvar::new(),
        }
    }

    pub(super) fn power(&self) -> Power {
        *lock(&self.power)
    }

    /// Changes the power state; answers what it was.
    pub(super) fn change_power(&self, change: impl FnOnce(Power) -> Power) -> Power {
        let mut power = lock(&self.power);
        let was = *power;
        *power = change(was);
        drop(power);
        self.changed.notify_all();
        was
    }

    /// Gets the vCPU out of the guest, or keeps it from entering once: the framework remembers it.
    pub(super) fn interrupt(&self) -> VcpuResult<()> {
        match *lock(&self.target) {
            // SAFETY: a list of one, and the vCPU lives: it is not destroyed before this lock can be had.
            Some(target) => check("hv_vcpus_exit", unsafe { (self.api.hv_vcpus_exit)(&target, 1) }),
            None => Ok(()),
        }
    }

    /// Sets the line of a private interrupt, which the vCPU brings to the framework at its next entry.
    pub(super) fn set_line(&self, bit: u32, level: bool) -> VcpuResult<()> {
        let was = if level {
            self.lines.fetch_or(bit, Ordering::SeqCst)
        } else {
            self.lines.fetch_and(!bit, Ordering::SeqCst)
        };
        if (was & bit != 0) == level { Ok(()) } else { self.interrupt() }
    }

    /// Lets a waiter look again.
    fn wake(&self) {
        // Under the lock: a waiter is either before its look, or waiting.
        drop(lock(&self.power));
        self.changed.notify_all();
    }

    fn is_kicked(&self) -> bool {
        self.kicked.load(Ordering::SeqCst)
    }

    /// Waits until a kick, a deadline, or something else than what is waited for.
    fn wait(&self, deadline: Option<Instant>, goes_on: impl Fn(Power) -> bool) {
        let mut power = lock(&self.power);
        while !self.is_kicked() && goes_on(*power) {
            power = match deadline.map(|at| at.checked_duration_since(Instant::now())) {
                None => self.changed.wait(power).unwrap_or_else(PoisonError::into_inner),
                Some(None) => return,
                Some(Some(left)) => self.changed.wait_timeout(power, left).unwrap_or_else(PoisonError::into_inner).0,
            };
        }
    }
}

impl KickTarget for Shared {
    fn kick(&self) {
        // SeqCst pairs with `run`: either it sees the kick before it enters, or we see its number, and the framework keeps it
        // from entering.
        self.kicked.store(true, Ordering::SeqCst);
        // A kick has nobody to tell.
        let _ = self.interrupt();
        self.wake();
    }
}

/// One vCPU.
pub(super) struct HvfVcpu {
    pub(super) vm: Arc<Vm>,
    shared: Arc<Shared>,
    /// The framework has it.
    is_counted: bool,
    /// All vCPUs have been there.
    is_ready: bool,
    pub(super) registers: Registers,
    access: Option<Access>,
    debugging: Debugging,
    debug_event: Option<DebugEvent>,
    /// Debug exceptions come to us, as the framework knows.
    traps_debug: bool,
    /// The offset of the count, as the framework knows.
    count_offset: Option<u64>,
    timer_masked: bool,
    /// What the VMM's interrupt controller drives.
    inputs: [bool; 2],
    /// Lines of private interrupts that the framework's GIC knows of.
    lines: u32,
    /// A system error that the guest has not taken, with its syndrome.
    serror: Option<u64>,
    last_exit: Option<(u32, ExitException)>,
}

impl HvfVcpu {
    pub(super) fn new(vm: &Arc<Vm>, shared: Arc<Shared>) -> Self {
        Self {
            registers: Registers::new(vm, shared.id),
            vm: Arc::clone(vm),
            shared,
            is_counted: false,
            is_ready: false,
            access: None,
            debugging: Debugging::default(),
            debug_event: None,
            traps_debug: false,
            count_offset: None,
            timer_masked: false,
            inputs: [false; 2],
            lines: 0,
            serror: None,
            last_exit: None,
        }
    }

    /// Gives the framework what belongs to an entry.
    fn prepare(&mut self, id: u64) -> VcpuResult<()> {
        let api = self.vm.api;
        let offset = self.vm.count_offset.load(Ordering::Relaxed);
        if self.count_offset != Some(offset) {
            // SAFETY: the vCPU is this thread's, which `bind` has checked.
            check("hv_vcpu_set_vtimer_offset", unsafe { (api.hv_vcpu_set_vtimer_offset)(id, offset) })?;
            self.count_offset = Some(offset);
        }
        if self.timer_masked && self.timer_control()? & 7 != TIMER_FIRES {
            // SAFETY: see above.
            check("hv_vcpu_set_vtimer_mask", unsafe { (api.hv_vcpu_set_vtimer_mask)(id, false) })?;
            self.timer_masked = false;
        }
        let traps = self.debugging.is_on();
        if self.traps_debug != traps {
            // SAFETY: see above.
            let answer = unsafe { (api.hv_vcpu_set_trap_debug_exceptions)(id, traps) };
            check("hv_vcpu_set_trap_debug_exceptions", answer)?;
            self.traps_debug = traps;
        }
        if self.debugging.wanted.single_step {
            let cpsr = self.registers.get(reg::CPSR)?;
            self.registers.set(reg::CPSR, cpsr | pstate::SS)?;
        }
        // The framework takes them back whenever a run returns.
        for (kind, level) in [interrupt::IRQ, interrupt::FIQ].into_iter().zip(self.inputs) {
            if level {
                // SAFETY: see above.
                let answer = unsafe { (api.hv_vcpu_set_pending_interrupt)(id, kind, true) };
                check("hv_vcpu_set_pending_interrupt", answer)?;
            }
        }
        let lines = self.shared.lines.load(Ordering::SeqCst);
        gic::lines(self, id, self.lines, lines)?;
        self.lines = lines;
        Ok(())
    }

    fn has_gic(&self) -> bool {
        self.vm.gic.get().is_some()
    }

    /// The framework has this vCPU from now on, or never will.
    fn count(&mut self) {
        if !std::mem::replace(&mut self.is_counted, true) {
            self.vm.missing.fetch_sub(1, Ordering::SeqCst);
            let all: Vec<_> = lock(&self.vm.vcpus).values().cloned().collect();
            all.iter().for_each(|other| other.wake());
        }
    }

    /// With a GIC, waits for all other vCPUs before the first of them runs; false if a kick came first.
    fn assemble(&mut self) -> VcpuResult<bool> {
        self.count();
        if let Some(gic) = self.vm.gic.get() {
            let is_missing = || self.vm.missing.load(Ordering::SeqCst) != 0;
            self.shared.wait(None, |_| is_missing());
            if is_missing() {
                self.shared.kicked.store(false, Ordering::SeqCst);
                return Ok(false);
            }
            gic.start(self.vm.api)?;
        }
        self.is_ready = true;
        Ok(true)
    }

    /// Runs until something needs the VMM; `None` if it was kicked.
    fn enter(&mut self) -> VcpuResult<Option<VcpuExit>> {
        let (created, destroyed) = (Arc::clone(&self.shared), Arc::clone(&self.shared));
        let bound =
            self.registers.bind(|id| *lock(&created.target) = Some(id), move || *lock(&destroyed.target) = None)?;
        if !self.is_ready && !self.assemble()? {
            return Ok(None);
        }
        loop {
            // After the number is known to others: see `kick`.
            if self.shared.kicked.swap(false, Ordering::SeqCst) {
                return Ok(None);
            }
            match self.shared.power() {
                Power::On => {}
                Power::Off => {
                    self.shared.wait(None, |power| power == Power::Off);
                    continue;
                }
                Power::Starting { entry, context } => {
                    self.registers.reset()?;
                    self.registers.set(reg::PC, entry)?;
                    self.registers.set(reg::X0, context)?;
                    self.shared.change_power(|_| Power::On);
                }
            }
            self.deliver_serror()?;
            self.prepare(bound)?;
            // SAFETY: the vCPU is this thread's, which `bind` has checked.
            check("hv_vcpu_run", unsafe { (self.vm.api.hv_vcpu_run)(bound) })?;
            if let Some(exit) = self.translate(bound)? {
                return Ok(Some(exit));
            }
        }
    }

    /// Makes an exit of what the framework reports; `None` if the guest can go on.
    fn translate(&mut self, id: u64) -> VcpuResult<Option<VcpuExit>> {
        let exit = self.registers.exit()?;
        self.last_exit = Some((exit.reason, exit.exception));
        match exit.reason {
            reason::CANCELED => Ok(None),
            reason::EXCEPTION => self.exception(&exit.exception),
            reason::VTIMER_ACTIVATED => {
                self.timer_masked = true;
                let fires = self.timer_control()? & 7 == TIMER_FIRES;
                if self.has_gic() {
                    // The GIC delivers it by itself, says Apple, and should not tell. Where it does, it is made pending here.
                    gic::lines(self, id, 0, u32::from(fires) << aarch64::VIRTUAL_TIMER_INTID)?;
                    return Ok(None);
                }
                Ok(fires.then_some(VcpuExit::VirtualTimer))
            }
            _ => Ok(Some(VcpuExit::Unknown)),
        }
    }

    fn exception(&mut self, exit: &ExitException) -> VcpuResult<Option<VcpuExit>> {
        let syndrome = exit.syndrome;
        let class = syndrome >> 26 & 0x3f;
        // What a trapped instruction would do comes after a system error that waited for the guest to unmask it.
        if class != trap::HVC && self.deliver_serror()? {
            return Ok(None);
        }
        match class {
            class::DATA_ABORT => self.try_again(exit),
            class::INSTRUCTION_ABORT => {
                if !self.retry(exit, MemoryFlags::EXECUTE)? {
                    self.external_abort(syndrome, Some(exit.virtual_address))?;
                }
                Ok(None)
            }
            trap::HVC => self.call(),
            trap::SMC => {
                self.skip()?;
                self.call()
            }
            trap::SYS_REG => self.system_register(syndrome).map(|()| None),
            trap::WFX => {
                self.skip()?;
                let is_wfe = syndrome & 1 != 0;
                if !is_wfe {
                    self.wait_for_interrupt()?;
                }
                Ok(None)
            }
            trap::BRK if !self.debugging.wanted.software_breakpoints => {
                self.inject(SYNCHRONOUS, syndrome, None)?;
                Ok(None)
            }
            _ => match debug_event(syndrome, exit.virtual_address, self.registers.get(reg::PC)?) {
                Some(event) => {
                    self.debug_event = Some(event);
                    Ok(Some(VcpuExit::Debug))
                }
                None => Ok(Some(VcpuExit::Unknown)),
            },
        }
    }

    /// Whether the access may be tried again: memory is there, and the platform or the dirty log was the reason.
    fn retry(&self, exit: &ExitException, rights: MemoryFlags) -> VcpuResult<bool> {
        self.vm.slots.mapper.retry(exit.physical_address, rights)
    }

    fn try_again(&mut self, exit: &ExitException) -> VcpuResult<Option<VcpuExit>> {
        let syndrome = exit.syndrome;
        let is_write = syndrome & ISS_WRITE != 0 && syndrome & ISS_WALK == 0;
        if self.retry(exit, if is_write { MemoryFlags::WRITE } else { MemoryFlags::READ })? {
            return Ok(None);
        }
        self.data_abort(syndrome, Some(exit.virtual_address), exit.physical_address)
    }

    fn call(&mut self) -> VcpuResult<Option<VcpuExit>> {
        let mut x = [0; 4];
        for (n, x) in (reg::X0..).zip(&mut x) {
            *x = self.registers.get(n)?;
        }
        match answer(&self.vm, self.shared.id, x) {
            Answer::Result(result) => self.registers.set(reg::X0, result)?,
            Answer::Suspend => {
                self.registers.set(reg::X0, 0)?;
                self.wait_for_interrupt()?;
            }
            Answer::Off => drop(self.shared.change_power(|_| Power::Off)),
            Answer::Exit(exit) => return Ok(Some(exit)),
        }
        Ok(None)
    }

    /// MRS or MSR of a register that the CPU leaves to us: feature registers that are not known are 0, debug and performance
    /// monitors are not there to be seen, the physical count is the host's, everything else is undefined.
    fn system_register(&mut self, syndrome: u64) -> VcpuResult<()> {
        let bits = |shift: u32, len: u32| (syndrome >> shift & ((1 << len) - 1)) as u16;
        let (op0, op1, crn, crm, op2) = (bits(20, 2), bits(14, 3), bits(10, 4), bits(1, 4), bits(17, 3));
        let (target, is_read) = (bits(5, 5), syndrome & 1 != 0);
        let value = match (op0, op1, crn, crm, op2) {
            // Feature registers, OS lock and other debug registers, ACTLR, performance monitors.
            (3, 0, 0, ..) if is_read => 0,
            (2, ..) | (3, 0, 1, 0, 1) | (3, 0 | 3, 9, 12..=14, _) | (3, 3, 14, 8..=15, _) => 0,
            (3, 3, 14, 0, 1) if is_read => self.vm.ticks(),
            _ => return self.inject(SYNCHRONOUS, class::UNKNOWN << 26 | 1 << 25, None),
        };
        if is_read && target != 31 {
            self.registers.set(target.into(), value)?;
        }
        self.skip()
    }

    /// The virtual timer's control register. The framework's "its time has come" is of the last run.
    fn timer_control(&self) -> VcpuResult<u64> {
        let control = self.registers.sys(sys_reg::CNTV_CTL_EL0)? & 3;
        let due = control & 1 != 0 && self.vm.count() >= self.registers.sys(sys_reg::CNTV_CVAL_EL0)?;
        Ok(control | u64::from(due) << 2)
    }

    /// WFI: waits here, as the timer fires only while the vCPU runs.
    fn wait_for_interrupt(&mut self) -> VcpuResult<()> {
        // With the framework's GIC it is the framework that waits; who comes here all the same goes on.
        if self.inputs != [false; 2] || self.serror.is_some() || self.has_gic() {
            return Ok(());
        }
        let control = self.timer_control()?;
        let deadline = if control & 1 != 0 && control & TIMER_MASKED == 0 {
            let left = self.registers.sys(sys_reg::CNTV_CVAL_EL0)?.saturating_sub(self.vm.count());
            // One that fires too far in the future for a clock is none.
            Instant::now().checked_add(self.vm.duration(left))
        } else {
            None
        };
        self.shared.wait(deadline, |power| power == Power::On);
        Ok(())
    }

    /// Delivers a system error that waits, if the guest does not mask it: true if it was.
    fn deliver_serror(&mut self) -> VcpuResult<bool> {
        let mut waiting = self.serror;
        let taken = self.take_serror(&mut waiting);
        self.serror = waiting;
        taken
    }
}

impl Drop for HvfVcpu {
    fn drop(&mut self) {
        self.count();
    }
}

impl Cpu for HvfVcpu {
    fn regs(&self) -> VcpuResult<GuestRegs> {
        self.registers.get_regs()
    }

    fn set_regs(&mut self, regs: &GuestRegs) -> VcpuResult<()> {
        self.registers.set_regs(regs)
    }

    fn fpu(&self) -> VcpuResult<Aarch64FpuRegs> {
        self.registers.get_fpu()
    }

    fn set_fpu(&mut self, regs: &Aarch64FpuRegs) -> VcpuResult<()> {
        self.registers.set_fpu(regs)
    }

    fn memory(&self, gpa: u64, is_write: bool, data: &mut [u8]) -> bool {
        self.vm.slots.access(gpa, is_write, data)
    }
}

impl System for HvfVcpu {
    const KIND: AccelKind = AccelKind::Hvf;

    fn access(&self) -> &Option<Access> {
        &self.access
    }

    fn access_mut(&mut self) -> &mut Option<Access> {
        &mut self.access
    }

    fn syndrome(&self) -> u64 {
        self.last_exit.map_or(0, |(_, exception)| exception.syndrome)
    }

    fn state(&self) -> VcpuResult<(u64, u64)> {
        Ok((self.registers.get(reg::PC)?, self.registers.get(reg::CPSR)?))
    }

    fn set_state(&mut self, pc: u64, pstate: u64) -> VcpuResult<()> {
        self.registers.set(reg::CPSR, pstate)?;
        self.registers.set(reg::PC, pc)
    }

    fn sys(&self, register: u16) -> VcpuResult<u64> {
        self.registers.sys(register)
    }

    fn set_sys(&mut self, register: u16, value: u64) -> VcpuResult<()> {
        self.registers.set_sys(register, value)
    }
}

impl VcpuOps for HvfVcpu {
    fn get_id(&self) -> u32 {
        self.shared.id
    }

    fn run(&mut self) -> VcpuResult<VcpuExit> {
        self.debug_event = None;
        match self.resume()? {
            Some(exit) => Ok(exit),
            None => Ok(self.enter()?.unwrap_or(VcpuExit::Interrupt)),
        }
    }

    fn quiesce(&mut self) -> VcpuResult<VcpuExit> {
        Ok(self.resume()?.unwrap_or(VcpuExit::Interrupt))
    }

    fn get_regs(&self) -> VcpuResult<GuestRegs> {
        self.registers.get_regs()
    }

    fn set_regs(&mut self, regs: &GuestRegs) -> VcpuResult<()> {
        self.registers.set_regs(regs)
    }

    fn get_fpu_regs(&self) -> VcpuResult<FpuRegs> {
        self.registers.get_fpu().map(FpuRegs::Aarch64)
    }

    fn set_fpu_regs(&mut self, regs: &FpuRegs) -> VcpuResult<()> {
        self.registers.set_fpu(regs.as_aarch64()?)
    }

    fn kind(&self) -> Option<AccelKind> {
        Some(AccelKind::Hvf)
    }

    fn io_data(&self) -> VcpuResult<&[u8]> {
        self.expect("data of a write", true).map(|(access, _)| access.data())
    }

    fn complete_read(&mut self, data: &[u8]) -> VcpuResult<()> {
        self.answer(data)
    }

    fn pending_access(&self) -> Option<PendingAccess> {
        self.access.as_ref().and_then(Access::pending)
    }

    fn kick_handle(&self) -> VcpuResult<VcpuKick> {
        Ok(VcpuKick::new(Arc::<Shared>::clone(&self.shared)))
    }

    fn set_guest_debug(&mut self, debug: &GuestDebug) -> VcpuResult<()> {
        self.debugging.change(&mut self.registers, debug)
    }

    fn debug_event(&self) -> VcpuResult<DebugEvent> {
        self.debug_event.ok_or_else(|| AccelError::invalid("debug event", "the last exit was another one"))
    }

    fn raw_exit(&self) -> Option<u64> {
        self.last_exit.map(|(reason, _)| reason.into())
    }

    fn as_aarch64(&mut self) -> Option<&mut dyn Aarch64Vcpu> {
        Some(self)
    }
}

/// MP states, ours and PSCI's.
const MP_STATES: [(Aarch64MpState, Power); 2] =
    [(Aarch64MpState::Running, Power::On), (Aarch64MpState::PoweredOff, Power::Off)];

impl Aarch64Vcpu for HvfVcpu {
    fn get_sys_reg(&self, encoding: u16) -> VcpuResult<u64> {
        self.debugging.aside(encoding).map_or_else(|| self.registers.sys(encoding), Ok)
    }

    fn set_sys_reg(&mut self, encoding: u16, value: u64) -> VcpuResult<()> {
        match self.debugging.aside_mut(encoding) {
            Some(aside) => {
                *aside = value;
                Ok(())
            }
            None => self.registers.set_sys(encoding, value),
        }
    }

    fn list_sys_regs(&self) -> VcpuResult<Vec<u16>> {
        Ok(self.registers.list_sys_regs())
    }

    fn save_registers(&self) -> VcpuResult<Vec<PlatformRegister>> {
        let mut registers = self.registers.save()?;
        self.debugging.hide(&mut registers);
        Ok(registers)
    }

    fn restore_registers(&mut self, registers: &[PlatformRegister]) -> VcpuResult<()> {
        let debug = std::mem::take(&mut self.debugging.wanted);
        self.debugging.change(&mut self.registers, &GuestDebug::default())?;
        self.registers.restore(registers)?;
        self.debugging.change(&mut self.registers, &debug)
    }

    fn get_events(&self) -> VcpuResult<Aarch64Events> {
        Ok(Aarch64Events {
            serror_pending: self.serror.is_some(),
            serror_esr: self.serror.filter(|esr| *esr != 0),
            external_abort: false,
        })
    }

    fn set_events(&mut self, events: &Aarch64Events) -> VcpuResult<()> {
        if events.external_abort {
            let abort = self.last_exit.filter(|_| self.access.is_some()).map(|(_, exception)| exception);
            let abort = abort.ok_or_else(|| AccelError::invalid("external abort", "the last exit was no access"))?;
            self.access = None;
            self.external_abort(abort.syndrome, Some(abort.virtual_address))?;
        }
        if events.serror_pending {
            self.serror = Some(events.serror_esr.unwrap_or(0));
        }
        Ok(())
    }

    fn get_mp_state(&self) -> VcpuResult<Aarch64MpState> {
        let off = self.shared.power() != Power::On;
        Ok(if off { Aarch64MpState::PoweredOff } else { Aarch64MpState::Running })
    }

    fn set_mp_state(&mut self, state: Aarch64MpState) -> VcpuResult<()> {
        let found = MP_STATES.iter().find(|(ours, _)| *ours == state);
        let (_, power) = found.ok_or_else(|| self.group_unsupported("a suspended vCPU"))?;
        self.shared.change_power(|_| *power);
        Ok(())
    }

    fn get_virtual_timer(&self) -> VcpuResult<VirtualTimer> {
        Ok(VirtualTimer {
            control: self.timer_control()?,
            compare: self.registers.sys(aarch64::CNTV_CVAL_EL0)?,
            count: self.vm.count(),
        })
    }

    fn set_virtual_timer(&mut self, timer: &VirtualTimer) -> VcpuResult<()> {
        self.registers.set_sys(aarch64::CNTVCT_EL0, timer.count)?;
        self.registers.set_sys(aarch64::CNTV_CVAL_EL0, timer.compare)?;
        self.registers.set_sys(aarch64::CNTV_CTL_EL0, timer.control & 3)
    }

    fn set_interrupts(&mut self, irq: bool, fiq: bool) -> VcpuResult<()> {
        if self.has_gic() {
            return Err(self.unsupported("interrupt inputs of a CPU beside the framework's GIC"));
        }
        self.inputs = [irq, fiq];
        Ok(())
    }

    fn reset(&mut self) -> VcpuResult<()> {
        self.debugging.change(&mut self.registers, &GuestDebug::default())?;
        self.registers.reset()?;
        (self.access, self.serror, self.inputs) = (None, None, [false; 2]);
        let power = if self.shared.id == 0 { Power::On } else { Power::Off };
        self.shared.change_power(|_| power);
        Ok(())
    }

    fn group_unsupported(&self, what: &'static str) -> AccelError {
        self.unsupported(what)
    }
}
