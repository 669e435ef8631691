//! A vCPU, and what happens around an entry.

use super::vm::{Vm, ticks};
use super::{exit, lock, mischief};
use crate::a64::gic::Gic;
use crate::a64::{Bus, Cpu, class, pstate};
use crate::hostile::Mischief;
use std::cell::{Cell, RefCell, UnsafeCell};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::ThreadId;
use std::time::Duration;
use vm_accel_sys::hvf::aarch64::gic::CNTP;
use vm_accel_sys::hvf::aarch64::{FEATURE_REGS, VcpuExit, interrupt, reason, sys_reg};
use vm_accel_sys::hvf::memory;

/// Instructions between two looks at the world.
const SLICE: u32 = 64;
/// The longest time that a waiting CPU does not look at the world, should nobody tell it that something has changed.
const LOOK: Duration = Duration::from_millis(2);

/// One more than the reason; 0 for none.
static NEXT_EXIT: AtomicU64 = AtomicU64::new(0);

pub(super) fn set_next_exit(reason: u32) {
    NEXT_EXIT.store(u64::from(reason) + 1, Ordering::Relaxed);
}

pub(super) fn clear_next_exit() {
    NEXT_EXIT.store(0, Ordering::Relaxed);
}

/// What the host's CPU has: [`FEATURE_REGS`] in order. With scalable vectors, performance monitors and pointer authentication,
/// which a VMM may hide.
const FEATURES: [u64; FEATURE_REGS.len()] = [
    0x0000_0000_1030_5406, // DFR0: 6 breakpoints, 4 watchpoints, PMU
    0,
    0x0000_1000_0021_1120, // ISAR0: atomics, CRC32, SHA, AES
    0x0000_0000_0000_0110, // ISAR1: API, APA
    0x0000_0000_0010_0002, // MMFR0: 40 bits, granules of 4, 16 and 64 KiB
    0,
    0,
    0x0000_0001_0000_0011, // PFR0: AArch64 at EL0 and EL1, SVE
    0x0000_0000_0100_0000, // PFR1: SME
];

/// The value of a feature register.
pub(super) fn feature(reg: u32) -> Option<u64> {
    FEATURES.get(reg as usize).copied()
}

/// The structure that the platform writes and the VMM reads, each on the vCPU's thread.
pub(super) struct ExitArea(UnsafeCell<VcpuExit>);

// SAFETY: written by `Vcpu::run`, which the caller has found to be on the owner's thread; read by the VMM on the same.
unsafe impl Sync for ExitArea {}

impl ExitArea {
    pub(super) fn get(&self) -> *const VcpuExit {
        self.0.get()
    }
}

pub(super) struct Vcpu {
    id: u64,
    pub(super) owner: ThreadId,
    pub(super) exit: ExitArea,
    cancel: AtomicBool,
    pub(super) inner: Mutex<Inner>,
}

pub(super) struct Inner {
    pub(super) cpu: Cpu,
    pub(super) timer_masked: bool,
    /// By [`interrupt`].
    pub(super) pending: [bool; 2],
    pub(super) trap_debug_accesses: bool,
    mischief: Mischief,
}

/// The CPU's side of a VM.
struct View<'a> {
    vm: &'a Vm,
    id: u64,
    /// The guest touched the GIC.
    touched: Cell<bool>,
    mischief: RefCell<Mischief>,
}

impl View<'_> {
    /// The platform faults although the memory is there, as while it pages it in.
    fn falters(&self) -> bool {
        self.mischief.borrow_mut().one_in(200)
    }

    /// What the GIC says of an access of the guest's.
    fn gic<T>(&self, access: impl FnOnce(&mut Gic) -> Option<T>) -> Option<T> {
        let answer = access(&mut lock(&self.vm.gic.get()?.gic));
        if answer.is_some() {
            self.touched.set(true);
            self.vm.notify();
        }
        answer
    }

    /// Brings the timers to the GIC, and what it drives to the CPU.
    fn connect(&self, cpu: &mut Cpu) {
        if let Some(device) = self.vm.gic.get() {
            let timers = [(27, cpu.timer_fires(self)), (30, cpu.physical_timer_control(self) & 7 == 5)];
            let mut gic = lock(&device.gic);
            timers.into_iter().for_each(|(intid, level)| gic.set_line(self.id, intid, level));
            [cpu.irq, cpu.fiq] = gic.outputs(self.id);
        }
    }

    /// As [`connect`](Self::connect), where it may make a difference to the next instruction.
    fn reconnect(&self, cpu: &mut Cpu) {
        let takes = cpu.irq && cpu.pstate & pstate::I == 0 || cpu.fiq && cpu.pstate & pstate::F == 0;
        if self.touched.take() || takes {
            self.connect(cpu);
        }
    }
}

impl Bus for View<'_> {
    fn read(&self, pa: u64, data: &mut [u8]) -> bool {
        let len = data.len();
        if let Some(value) = self.gic(|gic| gic.has(pa).then(|| gic.read(pa, len.min(8)))) {
            data.copy_from_slice(&u128::from(value).to_le_bytes()[..len]);
            return true;
        }
        !self.falters() && self.vm.memory.read(pa, data)
    }

    fn write(&self, pa: u64, data: &[u8]) -> bool {
        let mut word = [0; 8];
        let len = data.len().min(8);
        word[..len].copy_from_slice(&data[..len]);
        if self.gic(|gic| gic.has(pa).then(|| gic.write(pa, len, u64::from_le_bytes(word)))).is_some() {
            return true;
        }
        !self.falters() && self.vm.memory.write(pa, data)
    }

    fn exchange(&self, pa: u64, old: &[u8], new: &[u8]) -> Option<bool> {
        if self.falters() { None } else { self.vm.memory.exchange(pa, old, new) }
    }

    fn flags(&self, pa: u64) -> u64 {
        let is_gic = self.vm.gic.get().is_some_and(|device| lock(&device.gic).has(pa));
        if is_gic { memory::READ | memory::WRITE } else { self.vm.memory.flags(pa) }
    }

    fn ticks(&self) -> u64 {
        ticks()
    }

    fn read_gic(&self, register: u16) -> Option<u64> {
        self.gic(|gic| gic.read_register(self.id, register))
    }

    fn write_gic(&self, register: u16, value: u64) -> Option<()> {
        self.gic(|gic| gic.write_register(self.id, register, value))
    }
}

impl Vcpu {
    pub(super) fn new(id: u64, has_gic: bool) -> Self {
        let mut mischief = mischief();
        let debug = (0..16 * 4).map(|n| sys_reg::DBGBVR0_EL1 + 8 * (n / 4) + n % 4);
        let mut garbage = || mischief.draw() ^ 0xa5a5_a5a5_a5a5_a5a5;
        let physical_timer = CNTP.into_iter().filter(|_| has_gic);
        let registers = sys_reg::ALL.iter().copied().chain(debug).chain(physical_timer);
        let mut cpu = Cpu::new(registers.map(|register| (register, garbage())));
        for (n, (_, register)) in FEATURE_REGS.iter().enumerate() {
            cpu.sys.insert(*register, FEATURES[n]);
        }
        cpu.sys.insert(sys_reg::MIDR_EL1, 0x610f_0000);
        cpu.x = std::array::from_fn(|_| garbage());
        cpu.v = std::array::from_fn(|_| u128::from(garbage()) << 64 | u128::from(garbage()));
        (cpu.pc, cpu.fpcr, cpu.fpsr) = (garbage(), garbage(), garbage());
        let inner = Inner { cpu, timer_masked: false, pending: [false; 2], trap_debug_accesses: false, mischief };
        Self {
            id,
            owner: std::thread::current().id(),
            exit: ExitArea(UnsafeCell::default()),
            cancel: AtomicBool::new(false),
            inner: Mutex::new(inner),
        }
    }

    /// `hv_vcpus_exit`.
    pub(super) fn cancel(&self) {
        self.cancel.store(true, Ordering::SeqCst);
    }

    /// `hv_vcpu_run`, on the owner's thread.
    pub(super) fn run(&self, vm: &Vm) {
        let inner = &mut *lock(&self.inner);
        let mischief = RefCell::new(inner.mischief.clone());
        let view = View { vm, id: self.id, touched: Cell::new(false), mischief };
        let told = self.inside(inner, &view);
        inner.mischief = view.mischief.into_inner();
        inner.pending = [false; 2];
        // SAFETY: the owner's thread is here and not in a read of it.
        unsafe { self.exit.0.get().write(told) };
    }

    /// Whether somebody wants the vCPU back. A platform may tell twice.
    fn is_cancelled(&self, mischief: &mut Mischief) -> bool {
        let cancelled = self.cancel.swap(false, Ordering::SeqCst);
        if cancelled && mischief.one_in(4) {
            self.cancel.store(true, Ordering::SeqCst);
        }
        cancelled
    }

    fn inside(&self, inner: &mut Inner, view: &View<'_>) -> VcpuExit {
        if let Some(reason) = NEXT_EXIT.swap(0, Ordering::Relaxed).checked_sub(1) {
            return exit::only(reason as u32, &mut view.mischief.borrow_mut());
        }
        let Inner { cpu, timer_masked, pending, .. } = inner;
        let has_gic = view.vm.gic.get().is_some();
        if !has_gic {
            cpu.irq = pending[interrupt::IRQ as usize];
            cpu.fiq = pending[interrupt::FIQ as usize];
        }
        loop {
            {
                let mischief = &mut *view.mischief.borrow_mut();
                if self.is_cancelled(mischief) || mischief.one_in(32) {
                    return exit::only(reason::CANCELED, mischief);
                }
                if !has_gic && !*timer_masked && (cpu.timer_fires(view) || mischief.one_in(64)) {
                    *timer_masked = true;
                    return exit::only(reason::VTIMER_ACTIVATED, mischief);
                }
            }
            view.connect(cpu);
            for _ in 0..SLICE {
                view.reconnect(cpu);
                let Err(trap) = cpu.step(view) else {
                    continue;
                };
                // Whether a platform with a GIC tells is not documented.
                let waits = has_gic && trap.syndrome >> 26 == class::WFX && !view.mischief.borrow_mut().one_in(4);
                if !waits {
                    return exit::exception(trap, &mut view.mischief.borrow_mut());
                }
                cpu.pc = cpu.pc.wrapping_add(4);
                if trap.syndrome & 1 == 0 {
                    self.wait(cpu, view);
                }
                break;
            }
        }
    }

    /// WFI: until an interrupt, whether the CPU masks it or not, or somebody wants the vCPU back. It may end early.
    fn wait(&self, cpu: &mut Cpu, view: &View<'_>) {
        view.connect(cpu);
        while !(cpu.irq || cpu.fiq || self.cancel.load(Ordering::SeqCst) || view.mischief.borrow_mut().one_in(8)) {
            let left = cpu
                .ticks_to_timer(view)
                .map_or(Duration::MAX, |ticks| Duration::from_nanos(ticks.min(1 << 32) * 125 / 3));
            view.vm.pause(left.min(LOOK));
            view.connect(cpu);
        }
    }
}
