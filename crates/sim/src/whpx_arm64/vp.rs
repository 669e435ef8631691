//! A virtual processor, and what the hypervisor does around an entry.

use super::partition::{Partition, ticks};
use super::psci::{Served, serve};
use super::registers::{FEATURES, kept};
use super::{Answer, FORCED, code, lock, misuse};
use crate::a64::{Bus, Cpu, Trap, class};
use crate::hostile::Mischief;
use std::cell::{Cell, RefCell};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::Duration;
use vm_accel_sys::hvf::memory as bus_flag;
use vm_accel_sys::whpx::aarch64::{ExitContext, FEATURE_REGS, exit_reason};
use vm_accel_sys::whpx::code::WHV_E_INVALID_VP_STATE;
use vm_accel_sys::whpx::map_flag;

/// Instructions between two looks at the world.
const SLICE: u32 = 64;
/// How long a processor that waits does so without a look at timer and GIC.
const LOOK: Duration = Duration::from_millis(1);
/// EL1h, everything masked (PSCI, 6.4).
const START_PSTATE: u64 = 0x3c5;
const SCTLR_EL1: u16 = 0xc080;
const SCTLR_RESET: u64 = 0x30d0_0800;

/// Whether a processor runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Power {
    On,
    Off,
    /// Switched on by PSCI, and not there yet.
    Starting {
        entry: u64,
        context: u64,
    },
}

#[derive(Debug)]
pub(super) struct Vp {
    inner: Mutex<Inner>,
    pub(super) power: Mutex<Power>,
    running: AtomicBool,
    /// Somebody cancelled the run; stays until a run has ended by it.
    cancelled: AtomicBool,
    doze: Mutex<()>,
    woken: Condvar,
}

/// What only one thread at a time may touch.
#[derive(Debug)]
pub(super) struct Inner {
    pub(super) index: u32,
    pub(super) cpu: Cpu,
    pub(super) redistributor: Option<u64>,
    pub(super) mischief: Mischief,
    /// Garbage for what is undefined, in the honest mode as well.
    pub(super) garbage: Mischief,
}

/// The CPU's side of a partition.
struct View<'a> {
    partition: &'a Partition,
    vp: u32,
    mischief: RefCell<Mischief>,
    /// The guest changed something at the GIC.
    touched: Cell<bool>,
}

impl View<'_> {
    /// The platform faults although the memory is there, as while it pages it in.
    fn falters(&self) -> bool {
        self.mischief.borrow_mut().one_in(200)
    }

    /// Whether an address is the GIC's, of which a guest may have changed something.
    fn is_gic(&self, pa: u64) -> bool {
        let is_gic = self.partition.gic().has(pa);
        self.touched.set(self.touched.get() | is_gic);
        is_gic
    }
}

impl Bus for View<'_> {
    fn read(&self, pa: u64, data: &mut [u8]) -> bool {
        if self.is_gic(pa) && data.len() <= 8 {
            let bytes = self.partition.gic().read(pa, data.len()).to_le_bytes();
            data.copy_from_slice(&bytes[..data.len()]);
            return true;
        }
        !self.falters() && self.partition.memory.read(pa, data)
    }

    fn write(&self, pa: u64, data: &[u8]) -> bool {
        if self.is_gic(pa) && data.len() <= 8 {
            let mut bytes = [0; 8];
            bytes[..data.len()].copy_from_slice(data);
            self.partition.gic().write(pa, data.len(), u64::from_le_bytes(bytes));
            return true;
        }
        !self.falters() && self.partition.memory.write(pa, data)
    }

    fn exchange(&self, pa: u64, old: &[u8], new: &[u8]) -> Option<bool> {
        if self.falters() { None } else { self.partition.memory.exchange(pa, old, new) }
    }

    fn flags(&self, pa: u64) -> u64 {
        if self.partition.gic().has(pa) {
            return bus_flag::READ | bus_flag::WRITE;
        }
        let flags = self.partition.memory.flags(pa);
        let pairs =
            [(map_flag::READ, bus_flag::READ), (map_flag::WRITE, bus_flag::WRITE), (map_flag::EXECUTE, bus_flag::EXEC)];
        pairs.iter().filter(|(theirs, _)| flags & theirs != 0).fold(0, |all, (_, ours)| all | ours)
    }

    fn ticks(&self) -> u64 {
        ticks()
    }

    fn read_gic(&self, register: u16) -> Option<u64> {
        self.touched.set(true);
        self.partition.gic().read_register(self.vp.into(), register)
    }

    fn write_gic(&self, register: u16, value: u64) -> Option<()> {
        self.touched.set(true);
        self.partition.gic().write_register(self.vp.into(), register, value)
    }
}

/// What comes of a trap.
enum Then {
    GoOn,
    /// WFI.
    Wait,
    Leave,
}

impl Vp {
    pub(super) fn new(index: u32, mischief: Mischief) -> Self {
        let mut garbage = Mischief::new(Some(u64::from(index) ^ 0xa264));
        let mut cpu = Cpu::new(kept().map(|register| (register, garbage.draw())).collect::<Vec<_>>());
        for (register, value) in FEATURE_REGS.into_iter().zip(FEATURES) {
            cpu.sys.insert(register, value);
        }
        // MIDR_EL1.
        cpu.sys.insert(0xc000, 0x410f_d490);
        cpu.x = std::array::from_fn(|_| garbage.draw());
        cpu.v = std::array::from_fn(|_| u128::from(garbage.draw()) << 64 | u128::from(garbage.draw()));
        (cpu.pc, cpu.fpcr, cpu.fpsr) = (garbage.draw(), garbage.draw(), garbage.draw());
        Self {
            inner: Mutex::new(Inner { index, cpu, redistributor: None, mischief, garbage }),
            // Which ones begin switched off nobody documents.
            power: Mutex::new(if index == 0 { Power::On } else { Power::Off }),
            running: AtomicBool::new(false),
            cancelled: AtomicBool::new(false),
            doze: Mutex::new(()),
            woken: Condvar::new(),
        }
    }

    pub(super) fn is_running(&self) -> bool {
        self.running.load(Ordering::SeqCst)
    }

    pub(super) fn wake(&self) {
        drop(lock(&self.doze));
        self.woken.notify_all();
    }

    pub(super) fn cancel(&self) {
        // Release: what the caller did before is visible to the run that ends.
        self.cancelled.store(true, Ordering::Release);
        self.wake();
    }

    fn take_cancel(&self) -> bool {
        // Acquire pairs with the Release in `cancel`.
        self.cancelled.swap(false, Ordering::Acquire)
    }

    /// The state, of a processor that does not run.
    pub(super) fn state(&self) -> Answer<MutexGuard<'_, Inner>> {
        if self.is_running() {
            return code(WHV_E_INVALID_VP_STATE);
        }
        let mut inner = lock(&self.inner);
        self.start(&mut inner);
        Ok(inner)
    }

    /// Takes in what PSCI has for it.
    fn start(&self, inner: &mut Inner) {
        let mut power = lock(&self.power);
        if let Power::Starting { entry, context } = *power {
            (inner.cpu.pc, inner.cpu.x[0], inner.cpu.pstate) = (entry, context, START_PSTATE);
            inner.cpu.sys.insert(SCTLR_EL1, SCTLR_RESET);
            *power = Power::On;
        }
    }

    /// Runs until something needs the caller, and describes it.
    pub(super) fn run(&self, partition: &Partition, context: &mut ExitContext) -> Answer {
        let mut inner = match self.inner.try_lock() {
            Ok(inner) => inner,
            Err(TryLockError::WouldBlock) if self.is_running() => {
                return misuse("two threads run the same virtual processor");
            }
            _ => lock(&self.inner),
        };
        if inner.redistributor.is_none() {
            return misuse("the address of the processor's redistributor was never set");
        }
        self.running.store(true, Ordering::SeqCst);
        self.inside(&mut inner, partition, context);
        self.running.store(false, Ordering::SeqCst);
        Ok(())
    }

    /// Waits a while, or until somebody wakes it.
    fn wait(&self) {
        let doze = lock(&self.doze);
        if !self.cancelled.load(Ordering::Acquire) {
            drop(self.woken.wait_timeout(doze, LOOK).unwrap_or_else(PoisonError::into_inner));
        }
    }

    fn inside(&self, inner: &mut Inner, partition: &Partition, context: &mut ExitContext) {
        if let Some(reason) = FORCED.swap(0, Ordering::Relaxed).checked_sub(1) {
            return inner.leave(reason as u32, context);
        }
        if inner.mischief.one_in(8) {
            let reason = inner.mischief.pick(&[exit_reason::NONE, exit_reason::CANCELED]);
            return inner.leave(reason, context);
        }
        let view = View {
            partition,
            vp: inner.index,
            mischief: RefCell::new(Mischief::new(inner.mischief.is_hostile().then(|| inner.mischief.draw()))),
            touched: Cell::new(false),
        };
        inner.cpu.sys.extend(lock(&partition.features).iter().map(|(register, value)| (*register, *value)));
        let mut waits = false;
        loop {
            if self.take_cancel() {
                // The same cancellation may show twice.
                if inner.mischief.one_in(4) {
                    self.cancelled.store(true, Ordering::Release);
                }
                return inner.leave(exit_reason::CANCELED, context);
            }
            self.start(inner);
            inner.cpu.offset = partition.offset();
            let fires = inner.cpu.timer_fires(&view);
            {
                let mut gic = partition.gic();
                gic.set_line(inner.index.into(), partition.timer_ppi(), fires);
                [inner.cpu.irq, inner.cpu.fiq] = gic.outputs(inner.index.into());
            }
            if *lock(&self.power) != Power::On || waits && !inner.cpu.irq && !inner.cpu.fiq {
                self.wait();
                continue;
            }
            (waits, _) = (false, view.touched.replace(false));
            for _ in 0..SLICE {
                match inner.cpu.step(&view).map_err(|trap| self.trapped(inner, trap, &view, context)) {
                    Ok(()) if view.touched.get() => break,
                    Ok(()) => {}
                    Err(Then::GoOn) => break,
                    Err(Then::Wait) => {
                        waits = true;
                        break;
                    }
                    Err(Then::Leave) => return,
                }
            }
        }
    }

    fn trapped(&self, inner: &mut Inner, trap: Trap, view: &View<'_>, context: &mut ExitContext) -> Then {
        let pc = inner.cpu.pc;
        match trap.syndrome >> 26 {
            class::DATA_ABORT | class::INSTRUCTION_ABORT => {
                // The platform may have read the instruction, where addresses are physical at least.
                let mut word = [0; 4];
                let word = view.partition.memory.read(pc, &mut word).then(|| u32::from_le_bytes(word));
                let word = word.filter(|_| inner.cpu.get(SCTLR_EL1) & 1 == 0);
                let is_mapped = view.partition.memory.flags(trap.ipa) != 0;
                inner.abort(trap, is_mapped, word, context);
                Then::Leave
            }
            class::WFX => {
                inner.cpu.pc = pc.wrapping_add(4);
                if trap.syndrome & 1 == 0 { Then::Wait } else { Then::GoOn }
            }
            // HVC is done when it traps, SMC is not.
            class::HVC => self.call(inner, pc.wrapping_sub(4), trap.syndrome as u16, view, context),
            class::SMC => {
                inner.cpu.pc = pc.wrapping_add(4);
                self.call(inner, pc, trap.syndrome as u16, view, context)
            }
            class::SYS_REG => {
                system_register(&mut inner.cpu, trap.syndrome);
                Then::GoOn
            }
            _ => {
                inner.leave(exit_reason::UNRECOVERABLE_EXCEPTION, context);
                Then::Leave
            }
        }
    }

    /// A call by the instruction at `pc`; the program counter is behind it.
    fn call(&self, inner: &mut Inner, pc: u64, imm: u16, view: &View<'_>, context: &mut ExitContext) -> Then {
        let x = std::array::from_fn(|n| inner.cpu.x[n]);
        match if imm == 0 { serve(view.partition, x) } else { Served::Unknown } {
            Served::Result(result) => inner.cpu.x[0] = result,
            Served::Off => *lock(&self.power) = Power::Off,
            Served::Suspend => {
                inner.cpu.x[0] = 0;
                return Then::Wait;
            }
            Served::Reset(kind) => {
                inner.reset_request(pc, kind, context);
                return Then::Leave;
            }
            Served::Unknown => {
                // Which ones are the hypervisor's own nobody documents.
                let is_standard = x[0] >> 24 & 0x3f == 4;
                if view.partition.wants_calls() && (!is_standard || inner.mischief.one_in(2)) {
                    inner.hypercall(pc, imm, context);
                    return Then::Leave;
                }
                inner.cpu.x[0] = u64::MAX;
            }
        }
        Then::GoOn
    }
}

/// A system register that the interpreter does not keep: feature registers read as 0, the others are undefined.
fn system_register(cpu: &mut Cpu, syndrome: u64) {
    let bits = |shift: u32, len: u32| syndrome >> shift & ((1 << len) - 1);
    let (is_read, target) = (syndrome & 1 != 0, bits(5, 5) as usize);
    let is_feature = (bits(20, 2), bits(14, 3), bits(10, 4)) == (3, 0, 0);
    if !is_read || !is_feature {
        return cpu.take(0, Some(class::UNKNOWN << 26 | 1 << 25), None);
    }
    if let Some(x) = cpu.x.get_mut(target) {
        *x = 0;
    }
    cpu.pc = cpu.pc.wrapping_add(4);
}
