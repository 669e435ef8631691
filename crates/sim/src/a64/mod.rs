//! A small interpreter of A64: EL0 and EL1 as far as the guest programs of this repository need them, below an EL2 that traps.
//!
//! It is no product: it is slow, it knows integer code, loads and stores, system registers, stage-1 translation, exceptions
//! and very little of SIMD; any other instruction is undefined. What it must get right is what a hypervisor sees: the
//! syndrome of every exception to EL2, and where the program counter stands then. Sections are those of the Arm ARM
//! (DDI 0487).

mod exec;
pub(crate) mod gic;
mod memory;
mod mmu;
mod sys;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use vm_accel_sys::hvf::aarch64::gic::CNTP;
use vm_accel_sys::hvf::aarch64::sys_reg;

/// What the CPU is connected to.
pub(crate) trait Bus {
    /// Reads at a physical address; false if not all of it may be read.
    fn read(&self, pa: u64, data: &mut [u8]) -> bool;
    /// Writes; false, and nothing written, if not all of it may be.
    fn write(&self, pa: u64, data: &[u8]) -> bool;
    /// Writes `new` where `old` stands, at once; `None` if that may not be written.
    fn exchange(&self, pa: u64, old: &[u8], new: &[u8]) -> Option<bool>;
    /// What may be done at an address, as the platform's flags.
    fn flags(&self, pa: u64) -> u64;
    /// The physical count, in ticks.
    fn ticks(&self) -> u64;
    /// A register of the interrupt controller's CPU interface; `None` if there is none.
    fn read_gic(&self, register: u16) -> Option<u64>;
    /// As [`read_gic`](Bus::read_gic).
    fn write_gic(&self, register: u16, value: u64) -> Option<()>;
}

/// An exception to EL2. The program counter stands at what the architecture calls the preferred return address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Trap {
    /// ESR_EL2.
    pub(crate) syndrome: u64,
    /// FAR_EL2, of aborts and watchpoints.
    pub(crate) far: u64,
    /// The intermediate physical address, of aborts.
    pub(crate) ipa: u64,
}

/// Why an instruction did not end in the ordinary way.
pub(super) enum Stop {
    Trap(Trap),
    /// An exception to EL1.
    Fault {
        syndrome: u64,
        far: Option<u64>,
    },
}

/// Exception classes (D24.2.40, "EC").
pub(crate) mod class {
    pub(crate) const UNKNOWN: u64 = 0;
    pub(crate) const WFX: u64 = 0x01;
    pub(crate) const FP: u64 = 0x07;
    pub(crate) const ILLEGAL: u64 = 0x0e;
    pub(crate) const SVC: u64 = 0x15;
    pub(crate) const HVC: u64 = 0x16;
    pub(crate) const SMC: u64 = 0x17;
    pub(crate) const SYS_REG: u64 = 0x18;
    /// Of a lower level; one more is the same level's.
    pub(crate) const INSTRUCTION_ABORT: u64 = 0x20;
    pub(crate) const PC_ALIGNMENT: u64 = 0x22;
    pub(crate) const DATA_ABORT: u64 = 0x24;
    pub(crate) const BREAKPOINT: u64 = 0x30;
    pub(crate) const STEP: u64 = 0x32;
    pub(crate) const WATCHPOINT: u64 = 0x34;
    pub(crate) const BRK: u64 = 0x3c;
}

/// A syndrome of a 32-bit instruction.
pub(super) const fn syndrome(class: u64, iss: u64) -> u64 {
    class << 26 | 1 << 25 | iss
}

/// PSTATE bits, in SPSR layout (C5.2.19).
pub(crate) mod pstate {
    pub(crate) const FLAGS: u64 = 0xf << 28;
    pub(crate) const SS: u64 = 1 << 21;
    pub(crate) const D: u64 = 1 << 9;
    pub(crate) const A: u64 = 1 << 8;
    pub(crate) const I: u64 = 1 << 7;
    pub(crate) const F: u64 = 1 << 6;
    /// AArch32.
    pub(crate) const NARROW: u64 = 1 << 4;
    pub(crate) const EL: u64 = 3 << 2;
    pub(crate) const EL1: u64 = 1 << 2;
    pub(crate) const SP: u64 = 1;
}

/// The ticks per second of every counter.
pub(crate) const FREQUENCY: u64 = 24_000_000;

/// An exclusive access on its way: physical address and what was loaded.
#[derive(Debug, Clone, Copy)]
pub(super) struct Monitor {
    pa: u64,
    len: usize,
    seen: [u8; 8],
}

/// One CPU.
#[derive(Debug, Clone)]
pub(crate) struct Cpu {
    /// X0 to X30.
    pub(crate) x: [u64; 31],
    pub(crate) pc: u64,
    /// In SPSR layout.
    pub(crate) pstate: u64,
    pub(crate) v: [u128; 32],
    pub(crate) fpcr: u64,
    pub(crate) fpsr: u64,
    /// Those that are nothing but kept.
    pub(crate) sys: BTreeMap<u16, u64>,
    /// What is subtracted from the physical count.
    pub(crate) offset: u64,
    /// Interrupt inputs.
    pub(crate) irq: bool,
    pub(crate) fiq: bool,
    /// Debug exceptions go to EL2.
    pub(crate) trap_debug: bool,
    pub(super) monitor: Option<Monitor>,
}

impl Cpu {
    /// A CPU that knows `registers` and holds garbage in them.
    pub(crate) fn new(registers: impl IntoIterator<Item = (u16, u64)>) -> Self {
        Self {
            x: [0; 31],
            pc: 0,
            pstate: 0,
            v: [0; 32],
            fpcr: 0,
            fpsr: 0,
            sys: registers.into_iter().collect(),
            offset: 0,
            irq: false,
            fiq: false,
            trap_debug: false,
            monitor: None,
        }
    }

    /// A register that every CPU has.
    pub(crate) fn get(&self, register: u16) -> u64 {
        self.sys.get(&register).copied().unwrap_or(0)
    }

    pub(super) fn set(&mut self, register: u16, value: u64) {
        self.sys.insert(register, value);
    }

    pub(super) fn is_el0(&self) -> bool {
        self.pstate & pstate::EL == 0
    }

    fn stack_pointer(&self) -> u16 {
        let own = self.pstate & (pstate::EL | pstate::SP) == pstate::EL1 | pstate::SP;
        if own { sys_reg::SP_EL1 } else { sys_reg::SP_EL0 }
    }

    pub(super) fn sp(&self) -> u64 {
        self.get(self.stack_pointer())
    }

    pub(super) fn set_sp(&mut self, value: u64) {
        self.set(self.stack_pointer(), value);
    }

    /// A register as a value: 31 is zero.
    pub(super) fn r(&self, n: u32) -> u64 {
        self.x.get(n as usize).copied().unwrap_or(0)
    }

    /// Sets a register: 31 is nowhere.
    pub(super) fn set_r(&mut self, n: u32, value: u64) {
        if let Some(x) = self.x.get_mut(n as usize) {
            *x = value;
        }
    }

    /// A register as a base: 31 is the stack pointer.
    pub(super) fn r_sp(&self, n: u32) -> u64 {
        if n == 31 { self.sp() } else { self.r(n) }
    }

    pub(super) fn set_r_sp(&mut self, n: u32, value: u64) {
        if n == 31 { self.set_sp(value) } else { self.set_r(n, value) }
    }

    /// The virtual count.
    pub(crate) fn count(&self, bus: &impl Bus) -> u64 {
        bus.ticks().wrapping_sub(self.offset)
    }

    /// CNTV_CTL_EL0 as it reads: with ISTATUS (D24.10.18).
    pub(crate) fn timer_control(&self, bus: &impl Bus) -> u64 {
        let control = self.get(sys_reg::CNTV_CTL_EL0) & 3;
        let due = control & 1 != 0 && self.count(bus) >= self.get(sys_reg::CNTV_CVAL_EL0);
        control | u64::from(due) << 2
    }

    /// The virtual timer asks for an interrupt.
    pub(crate) fn timer_fires(&self, bus: &impl Bus) -> bool {
        self.timer_control(bus) & 7 == 5
    }

    /// CNTP_CTL_EL0 as it reads, on a CPU that has the physical timer.
    pub(crate) fn physical_timer_control(&self, bus: &impl Bus) -> u64 {
        let [control, compare] = CNTP.map(|register| self.get(register));
        control & 3 | u64::from(control & 1 != 0 && bus.ticks() >= compare) << 2
    }

    /// How many ticks are left until a timer asks for an interrupt, if one will.
    pub(crate) fn ticks_to_timer(&self, bus: &impl Bus) -> Option<u64> {
        let left = |control: u64, compare: u64, count: u64| (control & 3 == 1).then(|| compare.saturating_sub(count));
        let [control, compare] = CNTP.map(|register| self.get(register));
        let physical = left(control, compare, bus.ticks());
        let virt = left(self.get(sys_reg::CNTV_CTL_EL0), self.get(sys_reg::CNTV_CVAL_EL0), self.count(bus));
        physical.into_iter().chain(virt).min()
    }

    /// Takes an exception to EL1 (D1.3.2): `vector` is the offset within its quarter of the table.
    pub(crate) fn take(&mut self, vector: u64, syndrome: Option<u64>, far: Option<u64>) {
        if let Some(syndrome) = syndrome {
            self.set(sys_reg::ESR_EL1, syndrome);
        }
        if let Some(far) = far {
            self.set(sys_reg::FAR_EL1, far);
        }
        let quarter = match self.pstate & (pstate::EL | pstate::SP) {
            el if el & pstate::EL == 0 => 0x400,
            el if el & pstate::SP != 0 => 0x200,
            _ => 0,
        };
        self.set(sys_reg::SPSR_EL1, self.pstate);
        self.set(sys_reg::ELR_EL1, self.pc);
        self.pstate = self.pstate & (pstate::FLAGS | pstate::SS)
            | pstate::D
            | pstate::A
            | pstate::I
            | pstate::F
            | pstate::EL1
            | pstate::SP;
        self.pc = self.get(sys_reg::VBAR_EL1).wrapping_add(quarter + vector);
        self.monitor = None;
    }

    /// Does one instruction, or takes one interrupt.
    pub(crate) fn step(&mut self, bus: &impl Bus) -> Result<(), Trap> {
        if self.irq && self.pstate & pstate::I == 0 {
            self.take(0x80, None, None);
            return Ok(());
        }
        if self.fiq && self.pstate & pstate::F == 0 {
            self.take(0x100, None, None);
            return Ok(());
        }
        let stepping = self.trap_debug && self.get(sys_reg::MDSCR_EL1) & 1 != 0;
        if stepping && self.pstate & pstate::SS == 0 {
            return Err(Trap { syndrome: syndrome(class::STEP, 0x22), far: 0, ipa: 0 });
        }
        match self.instruction(bus) {
            Ok(()) => {}
            Err(Stop::Trap(trap)) => return Err(trap),
            Err(Stop::Fault { syndrome, far }) => {
                // Aborts and their like have a class of their own for exceptions from EL0.
                let abort = [class::INSTRUCTION_ABORT, class::DATA_ABORT].contains(&(syndrome >> 26));
                let same = u64::from(abort && !self.is_el0()) << 26;
                self.take(0, Some(syndrome | same), far);
            }
        }
        if stepping {
            self.pstate &= !pstate::SS;
        }
        Ok(())
    }

    fn instruction(&mut self, bus: &impl Bus) -> Result<(), Stop> {
        if self.trap_debug {
            self.breakpoints()?;
        }
        if !self.pc.is_multiple_of(4) {
            return Err(Stop::Fault { syndrome: syndrome(class::PC_ALIGNMENT, 0), far: Some(self.pc) });
        }
        let word = self.fetch(bus)?;
        let next = self.pc.wrapping_add(4);
        self.pc = self.execute(bus, word)?.unwrap_or(next);
        Ok(())
    }

    /// MDSCR_EL1.MDE: breakpoints and watchpoints work.
    pub(super) fn watches(&self) -> bool {
        self.trap_debug && self.get(sys_reg::MDSCR_EL1) >> 15 & 1 != 0
    }

    fn breakpoints(&self) -> Result<(), Stop> {
        let hit = |n: u16| {
            self.get(sys_reg::DBGBCR0_EL1 + 8 * n) & 1 != 0 && self.get(sys_reg::DBGBVR0_EL1 + 8 * n) == self.pc
        };
        if self.watches() && (0..16).any(hit) {
            return Err(Stop::Trap(Trap { syndrome: syndrome(class::BREAKPOINT, 0x22), far: 0, ipa: 0 }));
        }
        Ok(())
    }
}
