//! A vCPU, and what happens around an entry.

use super::entry::{bad_control, bad_state, exception};
use super::exits::{Intercepted, Told, event_of, intercepted, io};
use super::state::Vmcs;
use super::traps::{Controls, TrapBus};
use super::vm::{TSC_HZ, Vm, take_next_exit};
use super::{STICKY, complain, lock, mischief};
use crate::hostile::Mischief;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::ThreadId;
use std::time::Instant;
use vm_accel_softcpu::state::seg;
use vm_accel_softcpu::{Config, Cpu, Exception, Exit, GuestDebug, Intercept, Kick, TscMode};
use vm_accel_sys::hvf::x86_64::{cpu_based, cpu_based2, ept_violation, exit, irq_info, reg, vmcs};
use vm_accel_sys::hvf::{HvReturn, code, memory};

/// Instructions between two looks at the world.
const SLICE: u64 = 50_000;
/// The host's XSAVE area: legacy region, header, AVX.
pub(super) const XSAVE_SIZE: usize = 832;

pub(super) struct Vcpu {
    pub(super) owner: ThreadId,
    pub(super) kick: Kick,
    inside: AtomicBool,
    interrupted: AtomicBool,
    pub(super) inner: Mutex<Inner>,
}

pub(super) struct Inner {
    pub(super) cpu: Cpu,
    pub(super) vmcs: Vmcs,
    pub(super) controls: Arc<Mutex<Controls>>,
    pub(super) mischief: Mischief,
    /// The host's AVX registers of this guest: only kept.
    pub(super) avx: [u8; 256],
    /// The mappings as they were when pages were last touched.
    layout: u32,
    /// Which synchronisation of the time-stamp counters was done.
    tsc_round: u32,
    runs: u32,
}

impl Vcpu {
    pub(super) fn new(vm: &Vm, id: u32) -> Self {
        let controls: Arc<Mutex<Controls>> = Arc::default();
        let bus = TrapBus { controls: controls.clone(), memory: vm.memory.clone() };
        let config = Config { tsc: TscMode::Host(TSC_HZ), start: vm.start };
        let cpu = Cpu::new(id, config, vm.memory.ram.clone(), Box::new(bus));
        let mut inner = Inner {
            cpu,
            vmcs: Vmcs::new(),
            controls,
            mischief: mischief(),
            avx: [0xa5; 256],
            layout: 0,
            tsc_round: 0,
            runs: 0,
        };
        inner.fill();
        Self {
            owner: std::thread::current().id(),
            kick: inner.cpu.kick_handle(),
            inside: AtomicBool::new(false),
            interrupted: AtomicBool::new(false),
            inner: Mutex::new(inner),
        }
    }

    /// `hv_vcpu_interrupt`.
    pub(super) fn interrupt(&self, vm: &Vm) {
        let sticky = match &mut *lock(&vm.mischief) {
            hostile if hostile.is_hostile() => hostile.one_in(2),
            _ => STICKY.load(Ordering::Relaxed),
        };
        if sticky || self.inside.load(Ordering::SeqCst) {
            self.interrupted.store(true, Ordering::SeqCst);
            self.kick.kick();
        }
    }

    /// `hv_vcpu_run` and, with `until`, `hv_vcpu_run_until`.
    pub(super) fn run(&self, vm: &Vm, until: bool) -> Result<(), HvReturn> {
        let mut inner = lock(&self.inner);
        self.inside.store(true, Ordering::SeqCst);
        let result = inner.run(self, vm, until);
        self.inside.store(false, Ordering::SeqCst);
        result
    }

    /// Whether the run is to end because somebody interrupts it.
    fn take_interrupt(&self, mischief: &mut Mischief) -> bool {
        if !self.interrupted.swap(false, Ordering::SeqCst) {
            return false;
        }
        if mischief.one_in(4) {
            // One interrupt, two exits.
            self.interrupted.store(true, Ordering::SeqCst);
        }
        true
    }
}

impl Inner {
    /// What a new vCPU holds is not documented: something.
    fn fill(&mut self) {
        if self.mischief.is_hostile() {
            for register in [reg::RAX, reg::RBX, reg::R15, reg::CR2, reg::DR0] {
                self.vmcs.regs[register as usize] = self.mischief.draw();
            }
            for field in [vmcs::GUEST_RIP, vmcs::GUEST_CR3, vmcs::GUEST_FS_BASE, vmcs::EXCEPTION_BITMAP] {
                self.vmcs.set(field, self.mischief.draw());
            }
        }
        self.vmcs.regs[reg::XCR0 as usize] = 1;
        self.vmcs.regs[reg::DR6 as usize] = 0xffff_0ff0;
    }

    /// Follows `hv_vm_sync_tsc`.
    pub(super) fn sync_tsc(&mut self, vm: &Vm) {
        let (value, at, round) = *lock(&vm.tsc);
        if let (Some(at), true) = (at, round != self.tsc_round) {
            self.tsc_round = round;
            let ticks = Instant::now().duration_since(at).as_nanos() as u64;
            self.cpu.set_tsc(value.wrapping_add(ticks));
        }
    }

    fn run(&mut self, vcpu: &Vcpu, vm: &Vm, until: bool) -> Result<(), HvReturn> {
        self.runs = self.runs.wrapping_add(1);
        if let Some(field) = bad_control(&self.vmcs) {
            complain(format!("entry with control {field:#x} = {:#x}", self.vmcs.get(field)));
            return Err(code::ERROR);
        }
        if let Some(why) = bad_state(&self.vmcs) {
            complain(format!("entry with a bad guest state: {why}"));
            Told::only(exit::ENTRY_FAILED | exit::ENTRY_GUEST).record(&mut self.vmcs, &mut self.mischief);
            return Ok(());
        }
        self.sync_tsc(vm);
        self.enter();
        let told = match self.early(vcpu, vm, until) {
            Some(told) => told,
            None => self.inside(vcpu, vm, until),
        };
        self.leave(told);
        Ok(())
    }

    /// Gives the CPU what the VMCS holds.
    fn enter(&mut self) {
        {
            let mut controls = lock(&self.controls);
            let pair = |mask, shadow| (self.vmcs.get(mask), self.vmcs.get(shadow));
            controls.cpu_based = self.vmcs.get32(vmcs::CPU_BASED);
            controls.rdtscp = self.vmcs.has(vmcs::CPU_BASED2, cpu_based2::RDTSCP);
            controls.exceptions = self.vmcs.get32(vmcs::EXCEPTION_BITMAP);
            controls.cr0 = pair(vmcs::CR0_MASK, vmcs::CR0_SHADOW);
            controls.cr4 = pair(vmcs::CR4_MASK, vmcs::CR4_SHADOW);
            controls.tpr = self.vmcs.regs[reg::TPR as usize] as u8;
        }
        let info = self.vmcs.get32(vmcs::VMENTRY_IRQ_INFO);
        let error = self.vmcs.get32(vmcs::VMENTRY_EXC_ERROR);
        let fields = &self.vmcs;
        self.cpu.update(|st| {
            fields.enter(st);
            (st.events.interrupt, st.events.exception, st.events.nmi) = (None, None, false);
            if info & irq_info::VALID != 0 {
                let vector = info & irq_info::VECTOR;
                match info & irq_info::TYPE {
                    irq_info::EXTERNAL => st.events.interrupt = Some(vector as u8),
                    irq_info::NMI => st.events.nmi = true,
                    _ => st.events.exception = exception(vector, error, st.cr2),
                }
            }
        });
        // The caller and its emulator may have written code.
        self.cpu.forget_code();
        let has = |bit| fields.has(vmcs::CPU_BASED, bit);
        self.cpu.request_interrupt_window(has(cpu_based::IRQ_WINDOW));
        self.cpu.set_guest_debug(GuestDebug { single_step: has(cpu_based::MONITOR_TRAP), ..GuestDebug::default() });
    }

    /// Where the next instruction is.
    fn fetch_address(&mut self) -> Option<u64> {
        let st = self.cpu.state();
        let linear = st.segs[seg::CS].base.wrapping_add(st.rip);
        self.cpu.translate(linear)
    }

    /// Exits before anything is done: somebody's interrupt, or what this platform does on a whim.
    fn early(&mut self, vcpu: &Vcpu, vm: &Vm, until: bool) -> Option<Told> {
        if let Some(reason) = take_next_exit() {
            return Some(Told::only(reason));
        }
        let interrupt = self.mischief.pick(&[exit::IRQ, exit::VMX_TIMER]);
        if vcpu.take_interrupt(&mut self.mischief) {
            return Some(Told::only(interrupt));
        }
        // The kernel's own business, which only hv_vcpu_run tells: the host's ticks, first touches.
        let layout = vm.layout.load(Ordering::SeqCst);
        let is_first = layout != self.layout;
        self.layout = layout;
        let tick = self.mischief.one_in(8) || !until && self.runs.is_multiple_of(16);
        let touch = self.mischief.one_in(8) || !until && is_first;
        if touch {
            let gpa = self.fetch_address()?;
            let flags = vm.memory.flags(gpa);
            if flags & memory::READ != 0 {
                return Some(Told::ept(gpa, ept_violation::FETCH, 0));
            }
        }
        tick.then(|| Told::only(interrupt))
    }

    fn inside(&mut self, vcpu: &Vcpu, vm: &Vm, until: bool) -> Told {
        let nmi_window = self.vmcs.has(vmcs::CPU_BASED, cpu_based::NMI_WINDOW);
        let rdtsc_exits = self.vmcs.has(vmcs::CPU_BASED, cpu_based::RDTSC);
        loop {
            let events = self.cpu.state().events;
            let shadow = events.sti_shadow || events.mov_ss_shadow;
            if nmi_window && !events.nmi_blocked && !shadow && !events.nmi {
                return Told::only(exit::NMI_WINDOW);
            }
            let left = {
                let _inside = vm.gate.read().unwrap_or_else(PoisonError::into_inner);
                self.cpu.run(if nmi_window { 1 } else { SLICE })
            };
            match left {
                Exit::Kicked | Exit::Budget => {
                    let interrupt = self.mischief.pick(&[exit::IRQ, exit::VMX_TIMER]);
                    let is_tick = left == Exit::Budget && !nmi_window && (!until || self.mischief.one_in(4));
                    if vcpu.take_interrupt(&mut self.mischief) || is_tick {
                        return Told::only(interrupt);
                    }
                }
                Exit::Io { port, size, write } => {
                    self.cpu.abandon();
                    return io(&mut self.cpu, port, size, write);
                }
                Exit::Mmio { gpa, write, .. } => {
                    self.cpu.abandon();
                    let access = if write { ept_violation::WRITE } else { ept_violation::READ };
                    return Told::ept(gpa, access, vm.memory.flags(gpa));
                }
                Exit::Shutdown => return Told::only(exit::TRIPLE_FAULT),
                Exit::InterruptWindow => return Told::only(exit::IRQ_WINDOW),
                Exit::Debug { .. } => return Told::only(exit::MONITOR_TRAP),
                Exit::Intercept(what) => {
                    if let Some(told) = self.intercept(vm, what, rdtsc_exits) {
                        return told;
                    }
                }
                other => {
                    complain(format!("the simulator does not know the exit {other:?}"));
                    return Told::only(exit::INVD);
                }
            }
        }
    }

    fn intercept(&mut self, vm: &Vm, what: Intercept, rdtsc_exits: bool) -> Option<Told> {
        if what == Intercept::Exception(Exception::Ud) {
            // Nothing answers where nothing is mapped: the CPU read ones and knows no such instruction.
            if let Some(gpa) = self.fetch_address().filter(|gpa| vm.memory.flags(*gpa) & memory::READ == 0) {
                return Some(Told::ept(gpa, ept_violation::FETCH, 0));
            }
            if self.vmcs.get32(vmcs::EXCEPTION_BITMAP) >> Exception::Ud.vector() & 1 == 0 {
                self.cpu.inject_exception(Exception::Ud);
                return None;
            }
        }
        match intercepted(&mut self.cpu, what, rdtsc_exits) {
            Intercepted::Exit(told) => Some(told),
            Intercepted::Raise(exception) => {
                self.cpu.inject_exception(exception);
                None
            }
        }
    }

    /// Takes the state back, and notes an event that was not delivered.
    fn leave(&mut self, told: Told) {
        let mut st = self.cpu.state().clone();
        let undelivered = match (st.events.interrupt, st.events.exception) {
            (Some(vector), _) => Some((irq_info::VALID | irq_info::EXTERNAL | u32::from(vector), 0)),
            (_, Some(exception)) => Some(event_of(exception)),
            _ if st.events.nmi => {
                // Intel SDM vol. 3, 28.3.4: the exit finds NMIs blocked.
                st.events.nmi_blocked = true;
                Some((irq_info::VALID | irq_info::NMI | 2, 0))
            }
            _ => None,
        };
        self.vmcs.leave(&st);
        let (info, error) = undelivered.unwrap_or((0, 0xdead_beef));
        self.vmcs.set(vmcs::IDT_VECTOR_INFO, info.into());
        self.vmcs.set(vmcs::IDT_VECTOR_ERROR, error.into());
        let injected = self.vmcs.get(vmcs::VMENTRY_IRQ_INFO);
        self.vmcs.set(vmcs::VMENTRY_IRQ_INFO, injected & !u64::from(irq_info::VALID));
        self.vmcs.regs[reg::TPR as usize] = lock(&self.controls).tpr.into();
        told.record(&mut self.vmcs, &mut self.mischief);
    }
}
