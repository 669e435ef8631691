//! The local APIC as a pure state machine: xAPIC (memory-mapped) and x2APIC (MSRs), interrupt acceptance, timer, IPIs.
//!
//! It owns no thread, no clock and no other CPU. Whoever drives it passes the time ([`Now`]), carries the messages that it
//! answers ([`Outcome`]) to the other APICs and the I/O APICs, and asks for the next moment at which something happens
//! ([`Apic::next_deadline`]). Nothing that a guest writes may panic here or make it loop.
//!
//! Source: Intel SDM volume 3A, chapter "Advanced Programmable Interrupt Controller (APIC)"; sections are named by their
//! titles, because their numbers move between editions. The registers are kept as one array, indexed by offset divided by 16,
//! which is also the x2APIC MSR index less 800H: a register is described once, in `register`.

mod message;
mod register;
#[cfg(test)]
mod tests;
mod timer;

pub use message::{DeliveryMode, Destination, Ipi, Message, Reception, Shorthand};
pub(crate) use timer::TIMER_HZ;
pub use timer::{Deadline, Now};

use register::{
    APR, DFR, DIVIDE, EOI, ESR, ICR, ICR_HIGH, ID, IRR, ISR, LDR, LVT_ERROR, LVT_LINT0, LVT_LINT1, LVT_PERFORMANCE,
    LVT_THERMAL, LVT_TIMER, PPR, SELF_IPI, SVR, TIMER_CURRENT, TIMER_INITIAL, TMR, TPR, VERSION, lvt,
};
use timer::Timer;

/// The MSR IA32_APIC_BASE.
pub const MSR_APIC_BASE: u32 = 0x1b;
/// The MSR IA32_TSC_DEADLINE.
pub const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// First MSR of the x2APIC register space; it ends before 900H.
pub const MSR_X2APIC: u32 = 0x800;
/// Where the registers are in physical memory after a reset.
pub const DEFAULT_BASE: u64 = 0xfee0_0000;
/// Size of the register page.
pub const PAGE_SIZE: u64 = 0x1000;

/// IA32_APIC_BASE: this is the bootstrap processor.
const BASE_BSP: u64 = 1 << 8;
/// IA32_APIC_BASE: x2APIC mode.
const BASE_X2APIC: u64 = 1 << 10;
/// IA32_APIC_BASE: enabled.
const BASE_ENABLE: u64 = 1 << 11;

/// SVR: the APIC is enabled by software.
const SVR_ENABLE: u32 = 1 << 8;
/// SVR: an EOI is not broadcast to the I/O APICs.
const SVR_NO_EOI_BROADCAST: u32 = 1 << 12;

/// What an APIC access that must fault answers: the instruction raises #GP(0).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AccessFault;

/// What the machine around the APIC must do after an access; nothing, mostly.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Outcome {
    /// All was done inside.
    None,
    /// Carry this to other APICs.
    Ipi(Ipi),
    /// Tell every I/O APIC of the end of the level-triggered interrupt with this vector.
    EndOfInterrupt(u8),
}

/// What this APIC offers; must agree with what CPUID says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Features {
    /// Number of physical address bits (CPUID 80000008H), 32 to 52: bits beyond them in IA32_APIC_BASE are reserved.
    pub physical_bits: u8,
    /// x2APIC mode exists.
    pub x2apic: bool,
    /// The timer has the TSC-deadline mode.
    pub tsc_deadline: bool,
    /// Software may suppress EOI broadcasts (version register bit 24).
    pub eoi_suppression: bool,
}

impl Default for Features {
    fn default() -> Self {
        Self { physical_bits: 40, x2apic: true, tsc_deadline: true, eoi_suppression: false }
    }
}

/// One local APIC. See the [module](self).
#[derive(Debug, Clone)]
pub struct Apic {
    features: Features,
    /// The identity that the machine gave, 32 bits; in xAPIC mode software may change its copy in the ID register.
    initial_id: u32,
    base: u64,
    /// By offset / 16, in the format of the current mode.
    regs: [u32; 64],
    timer: Timer,
    /// Errors since ESR was last written ("Error Handling": ESR shows them after the next write).
    errors: u32,
    /// Levels of LINT0 and LINT1.
    lint: [bool; 2],
}

impl Apic {
    /// The APIC of CPU `id` as it is after power-up; `bsp` for the one CPU that starts.
    #[must_use]
    pub fn new(id: u32, bsp: bool, features: Features) -> Self {
        let mut apic = Self {
            features,
            initial_id: id,
            base: DEFAULT_BASE | BASE_ENABLE | if bsp { BASE_BSP } else { 0 },
            regs: [0; 64],
            timer: Timer::default(),
            errors: 0,
            lint: [false; 2],
        };
        apic.reset_registers();
        apic
    }

    /// Power-up: xAPIC mode at the default address ("Local APIC State After Power-Up or Reset").
    pub fn reset(&mut self) {
        self.base = DEFAULT_BASE | BASE_ENABLE | self.base & BASE_BSP;
        self.reset_registers();
    }

    /// INIT: as power-up, but the APIC base (and with it the mode) and the ID stay ("Local APIC State After an INIT Reset").
    pub fn init(&mut self) {
        let id = self.regs[ID];
        self.reset_registers();
        if !self.is_x2apic() {
            self.regs[ID] = id;
        }
    }

    fn reset_registers(&mut self) {
        self.regs = [0; 64];
        self.regs[VERSION] = register::VERSION_VALUE | u32::from(self.features.eoi_suppression) << 24;
        self.regs[DFR] = u32::MAX;
        self.regs[SVR] = 0xff;
        for entry in register::LVTS {
            self.regs[entry] = lvt::MASKED;
        }
        self.timer = Timer::default();
        self.errors = 0;
        self.load_identity();
    }

    /// Sets ID and, in x2APIC mode, LDR, which software cannot ("Logical Destination Mode in x2APIC Mode").
    fn load_identity(&mut self) {
        if self.is_x2apic() {
            self.regs[ID] = self.initial_id;
            self.regs[LDR] = self.initial_id >> 4 << 16 | 1 << (self.initial_id & 15);
        } else {
            self.regs[ID] = self.initial_id << 24;
            self.regs[LDR] = 0;
        }
    }

    /// What firmware leaves on the bootstrap processor for an operating system that begins with the 8259A: enabled by
    /// software, LINT0 passes the PIC's interrupts, LINT1 NMIs (MultiProcessor Specification, "virtual wire mode").
    pub fn enter_virtual_wire(&mut self) {
        self.regs[SVR] |= SVR_ENABLE;
        self.regs[LVT_LINT0] = u32::from(DeliveryMode::ExtInt.bits()) << 8;
        self.regs[LVT_LINT1] = u32::from(DeliveryMode::Nmi.bits()) << 8;
    }

    /// IA32_APIC_BASE.
    #[must_use]
    pub fn base(&self) -> u64 {
        self.base
    }

    /// The identity that the machine gave this CPU.
    #[must_use]
    pub fn initial_id(&self) -> u32 {
        self.initial_id
    }

    /// Enabled in IA32_APIC_BASE; CPUID.01H:EDX.APIC shows this.
    #[must_use]
    pub fn is_enabled(&self) -> bool {
        self.base & BASE_ENABLE != 0
    }

    /// In x2APIC mode.
    #[must_use]
    pub fn is_x2apic(&self) -> bool {
        self.base & (BASE_ENABLE | BASE_X2APIC) == BASE_ENABLE | BASE_X2APIC
    }

    /// Enabled in IA32_APIC_BASE and by software in SVR.
    fn is_software_enabled(&self) -> bool {
        self.is_enabled() && self.regs[SVR] & SVR_ENABLE != 0
    }

    /// Physical address of the 4 KiB register page, if there is one now (only in xAPIC mode).
    #[must_use]
    pub fn mmio_base(&self) -> Option<u64> {
        (self.is_enabled() && !self.is_x2apic()).then_some(self.base & !0xfff)
    }

    fn is_base_valid(&self, value: u64) -> bool {
        let mut allowed = ((1u64 << self.features.physical_bits.clamp(32, 52)) - 1) & !0xfff;
        allowed |= BASE_BSP | BASE_ENABLE;
        if self.features.x2apic {
            allowed |= BASE_X2APIC;
        }
        value & !allowed == 0 && value & (BASE_ENABLE | BASE_X2APIC) != BASE_X2APIC
    }

    /// Writes IA32_APIC_BASE as WRMSR does.
    ///
    /// # Errors
    ///
    /// Reserved bits, or a transition that "x2APIC State Transitions" does not show: to x2APIC but from xAPIC mode, from x2APIC
    /// but to disabled.
    fn write_base(&mut self, value: u64) -> Result<(), AccessFault> {
        const MODE: u64 = BASE_ENABLE | BASE_X2APIC;
        let (old, new) = (self.base & MODE, value & MODE);
        let legal = match (old, new) {
            (MODE, BASE_ENABLE) | (0, MODE) => false,
            _ => self.is_base_valid(value),
        };
        if !legal {
            return Err(AccessFault);
        }
        self.base = value;
        if old != new {
            match new {
                // Once enabled again it is as after power-up.
                0 => self.reset_registers(),
                _ => self.load_identity(),
            }
        }
        Ok(())
    }

    /// Sets IA32_APIC_BASE to restore a saved state: any valid value, without the rules of transitions. Registers are not
    /// touched except for the identity; restore them afterwards.
    ///
    /// # Errors
    ///
    /// Reserved bits, or x2APIC mode without the enable bit.
    pub fn restore_base(&mut self, value: u64) -> Result<(), AccessFault> {
        if !self.is_base_valid(value) {
            return Err(AccessFault);
        }
        self.base = value;
        self.load_identity();
        Ok(())
    }

    /// Whether this MSR is served by [`Apic::read_msr`] and [`Apic::write_msr`].
    #[must_use]
    pub fn owns_msr(&self, msr: u32) -> bool {
        match msr {
            MSR_APIC_BASE => true,
            MSR_TSC_DEADLINE => self.features.tsc_deadline,
            _ => self.features.x2apic && (MSR_X2APIC..MSR_X2APIC + 0x100).contains(&msr),
        }
    }

    /// RDMSR.
    ///
    /// # Errors
    ///
    /// [`AccessFault`] for a register that does not exist, cannot be read, or is not there in this mode.
    pub fn read_msr(&mut self, msr: u32, now: Now) -> Result<u64, AccessFault> {
        match msr {
            MSR_APIC_BASE => Ok(self.base),
            MSR_TSC_DEADLINE if self.features.tsc_deadline => {
                self.advance(now);
                Ok(self.timer.tsc_deadline())
            }
            _ => {
                let index = self.x2apic_register(msr)?;
                if !register::REGISTERS[index].x2apic.reads() {
                    return Err(AccessFault);
                }
                let low = u64::from(self.read_register(index, now));
                Ok(if index == ICR { low | u64::from(self.regs[ICR_HIGH]) << 32 } else { low })
            }
        }
    }

    /// WRMSR.
    ///
    /// # Errors
    ///
    /// [`AccessFault`] for a register that does not exist, cannot be written, is not there in this mode, or a value with
    /// reserved bits set ("x2APIC Register Address Space", "Reserved Bit Checking").
    pub fn write_msr(&mut self, msr: u32, value: u64, now: Now) -> Result<Outcome, AccessFault> {
        match msr {
            MSR_APIC_BASE => self.write_base(value).map(|()| Outcome::None),
            MSR_TSC_DEADLINE if self.features.tsc_deadline => {
                self.advance(now);
                self.timer.set_tsc_deadline(value);
                self.advance(now);
                Ok(Outcome::None)
            }
            _ => {
                let index = self.x2apic_register(msr)?;
                let register = &register::REGISTERS[index];
                let high = (value >> 32) as u32;
                let reserved = value as u32 & !register.x2apic_bits(&self.features);
                if !register.x2apic.writes() || reserved != 0 || (high != 0 && index != ICR) {
                    return Err(AccessFault);
                }
                if index == ICR {
                    self.regs[ICR_HIGH] = high;
                }
                Ok(self.write_register(index, value as u32, now))
            }
        }
    }

    fn x2apic_register(&self, msr: u32) -> Result<usize, AccessFault> {
        let index = msr.wrapping_sub(MSR_X2APIC) as usize;
        if self.is_x2apic() && index < self.regs.len() { Ok(index) } else { Err(AccessFault) }
    }

    /// The guest reads the register page. Registers are four bytes wide, 16 apart; other bytes read as zero.
    pub fn read_mmio(&mut self, offset: u64, data: &mut [u8], now: Now) {
        for (byte, i) in data.iter_mut().zip(0..) {
            let address = offset.wrapping_add(i);
            *byte = if address % 16 < 4 {
                self.read_xapic(address / 16, now).to_le_bytes()[(address % 4) as usize]
            } else {
                0
            };
        }
    }

    fn read_xapic(&mut self, index: u64, now: Now) -> u32 {
        match usize::try_from(index).ok().filter(|&i| register::exists(i)) {
            Some(index) if register::REGISTERS[index].xapic.reads() => self.read_register(index, now),
            Some(_) => 0,
            None => {
                self.error(register::ESR_ILLEGAL_REGISTER);
                0
            }
        }
    }

    /// The guest writes the register page. Only aligned four-byte writes are defined ("Register Map"); of a longer one the first four bytes
    /// count, and all others are ignored.
    pub fn write_mmio(&mut self, offset: u64, data: &[u8], now: Now) -> Outcome {
        let (0, Some(value)) = (offset % 16, data.first_chunk()) else {
            return Outcome::None;
        };
        match usize::try_from(offset / 16).ok().filter(|&i| register::exists(i)) {
            Some(index) if register::REGISTERS[index].xapic.writes() => {
                self.write_register(index, u32::from_le_bytes(*value), now)
            }
            Some(_) => Outcome::None,
            None => {
                self.error(register::ESR_ILLEGAL_REGISTER);
                Outcome::None
            }
        }
    }

    fn read_register(&mut self, index: usize, now: Now) -> u32 {
        self.advance(now);
        match index {
            PPR => u32::from(self.processor_priority()),
            TIMER_CURRENT => self.timer.current_count(now),
            APR => 0,
            _ => self.regs[index],
        }
    }

    /// A write that the mode allows; bits that the register does not have are dropped.
    fn write_register(&mut self, index: usize, value: u32, now: Now) -> Outcome {
        self.advance(now);
        let writable = register::REGISTERS[index].writable(&self.features);
        let value = value & writable;
        match index {
            EOI => return self.end_of_interrupt(),
            ESR => self.regs[ESR] = std::mem::take(&mut self.errors),
            ICR => {
                self.regs[ICR] = value;
                return self.send_ipi(value);
            }
            SELF_IPI => self.self_ipi(value as u8),
            SVR => {
                self.regs[SVR] = value;
                if value & SVR_ENABLE == 0 {
                    for entry in register::LVTS {
                        self.regs[entry] |= lvt::MASKED;
                    }
                }
            }
            TIMER_INITIAL => {
                if self.timer.set_initial_count(value, now) {
                    self.regs[TIMER_INITIAL] = value;
                }
            }
            DIVIDE => {
                self.regs[DIVIDE] = value;
                self.timer.set_divide(value, now);
            }
            DFR => self.regs[DFR] = value | 0x0fff_ffff,
            _ if register::LVTS.contains(&index) => {
                // "Spurious Interrupt Vector Register": while disabled by software, mask bits cannot be cleared.
                let forced = if self.is_software_enabled() { 0 } else { lvt::MASKED };
                self.regs[index] = self.regs[index] & !writable | value | forced;
                if index == LVT_TIMER && self.timer.set_mode(value) {
                    self.regs[TIMER_INITIAL] = 0;
                }
            }
            _ => self.regs[index] = value,
        }
        self.advance(now);
        Outcome::None
    }

    /// Advances the timer to `now`; what it raises is then pending.
    pub fn advance(&mut self, now: Now) {
        if self.timer.fires(now) {
            let _ = self.fire_lvt(LVT_TIMER);
        }
    }

    /// When [`Apic::advance`] next has something to do; `None` if the timer is stopped or masked. Any access may change it.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Deadline> {
        if self.regs[LVT_TIMER] & lvt::MASKED != 0 || !self.is_enabled() {
            return None;
        }
        self.timer.deadline()
    }

    /// Delivers a local interrupt as its table entry says; answers what the CPU itself must do.
    fn fire_lvt(&mut self, index: usize) -> Reception {
        let entry = self.regs[index];
        if entry & lvt::MASKED != 0 || !self.is_enabled() {
            return Reception::Ignored;
        }
        let level = entry & lvt::LEVEL != 0 && index == LVT_LINT0;
        // The timer's and the error entry's bits 10:8 do not exist and read as 0: fixed.
        match DeliveryMode::from_bits((entry >> 8 & 7) as u8) {
            DeliveryMode::Fixed => self.request(entry as u8, level),
            DeliveryMode::Nmi => Reception::Nmi,
            DeliveryMode::Smi => Reception::Smi,
            DeliveryMode::Init => Reception::Init,
            DeliveryMode::ExtInt => Reception::ExtInt,
            DeliveryMode::LowestPriority | DeliveryMode::Reserved | DeliveryMode::StartUp => Reception::Ignored,
        }
    }

    /// Drives the pin LINT0 (`pin` 0; the PIC's output, usually) or LINT1 (`pin` 1; NMI). Answers what the CPU itself must do. An
    /// ExtINT on LINT0 stays a matter of levels: see [`Apic::accepts_external`].
    pub fn set_lint(&mut self, pin: usize, level: bool) -> Reception {
        let (Some(state), Some(&index)) = (self.lint.get_mut(pin), [LVT_LINT0, LVT_LINT1].get(pin)) else {
            return Reception::Ignored;
        };
        let rising = level && !*state;
        *state = level;
        if !rising {
            return Reception::Ignored;
        }
        let held = self.regs[index] & lvt::REMOTE_IRR != 0;
        if held { Reception::Ignored } else { self.fire_lint(index) }
    }

    fn fire_lint(&mut self, index: usize) -> Reception {
        let reception = self.fire_lvt(index);
        let entry = self.regs[index];
        if index == LVT_LINT0 && reception == Reception::Interrupt && entry & lvt::LEVEL != 0 {
            self.regs[index] |= lvt::REMOTE_IRR;
        }
        reception
    }

    /// The thermal sensor's or a performance counter's interrupt; answers what the CPU itself must do.
    pub fn performance_interrupt(&mut self) -> Reception {
        let reception = self.fire_lvt(LVT_PERFORMANCE);
        // "Local Vector Table": delivering a counter's interrupt masks its entry.
        if reception != Reception::Ignored {
            self.regs[LVT_PERFORMANCE] |= lvt::MASKED;
        }
        reception
    }

    /// The thermal sensor's interrupt; answers what the CPU itself must do.
    pub fn thermal_interrupt(&mut self) -> Reception {
        self.fire_lvt(LVT_THERMAL)
    }

    /// Whether the CPU takes the PIC's interrupts: LINT0 is in ExtINT mode and not masked, or the APIC is disabled altogether and the pin is
    /// INTR. If it does and the PIC's output is high, the vector comes from the PIC.
    #[must_use]
    pub fn accepts_external(&self) -> bool {
        let entry = self.regs[LVT_LINT0];
        !self.is_enabled()
            || entry & lvt::MASKED == 0 && DeliveryMode::from_bits((entry >> 8 & 7) as u8) == DeliveryMode::ExtInt
    }

    /// Whether a message to `destination` is (also) for this APIC ("Determining IPI Destination"; "Logical Destination Mode in x2APIC Mode").
    #[must_use]
    pub fn matches(&self, destination: Destination) -> bool {
        if !self.is_enabled() {
            return false;
        }
        match destination {
            Destination::Physical(id) | Destination::Logical(id) if id == Destination::BROADCAST => true,
            Destination::Physical(id) => id == if self.is_x2apic() { self.regs[ID] } else { self.regs[ID] >> 24 },
            Destination::Logical(wanted) if self.is_x2apic() => {
                let own = self.regs[LDR];
                wanted >> 16 == own >> 16 && wanted & own & 0xffff != 0
            }
            Destination::Logical(wanted) => {
                let own = self.regs[LDR] >> 24;
                match self.regs[DFR] >> 28 {
                    // Flat model: one bit per CPU; cluster model: four bits of cluster number, then one bit per CPU.
                    0xf => wanted <= 0xff && wanted & own != 0,
                    0 => wanted <= 0xff && wanted >> 4 == own >> 4 && wanted & own & 0xf != 0,
                    _ => false,
                }
            }
        }
    }

    /// Takes an interrupt message that [`Apic::matches`]; answers what the CPU itself must do ("Interrupt Acceptance for Fixed Interrupts").
    ///
    /// Lowest-priority delivery is decided by the sender: it picks one of the APICs that match, see [`Apic::processor_priority`].
    pub fn accept(&mut self, message: &Message) -> Reception {
        match message.mode {
            DeliveryMode::Fixed | DeliveryMode::LowestPriority => {
                if self.is_software_enabled() {
                    self.request(message.vector, message.level)
                } else {
                    Reception::Ignored
                }
            }
            DeliveryMode::Nmi => Reception::Nmi,
            DeliveryMode::Smi => Reception::Smi,
            DeliveryMode::Init => Reception::Init,
            DeliveryMode::StartUp => Reception::StartUp(message.vector),
            DeliveryMode::ExtInt => Reception::ExtInt,
            DeliveryMode::Reserved => Reception::Ignored,
        }
    }

    /// Sets a vector in IRR and its trigger mode in TMR.
    fn request(&mut self, vector: u8, level: bool) -> Reception {
        if vector < 16 {
            self.error(register::ESR_RECEIVED_ILLEGAL_VECTOR);
            return Reception::Ignored;
        }
        register::set_bit(&mut self.regs, IRR, vector, true);
        register::set_bit(&mut self.regs, TMR, vector, level);
        Reception::Interrupt
    }

    /// Notes an error, and raises the error interrupt if ESR was written since the last one.
    fn error(&mut self, error: u32) {
        let armed = self.errors == 0;
        self.errors |= error;
        let entry = self.regs[LVT_ERROR];
        // An error entry with an illegal vector is itself an error; noting it is all that can be done.
        if armed && entry & lvt::MASKED == 0 && self.is_software_enabled() {
            if entry as u8 >= 16 {
                let _ = self.request(entry as u8, false);
            } else {
                self.errors |= register::ESR_RECEIVED_ILLEGAL_VECTOR;
            }
        }
    }

    /// PPR: the higher of the task's priority and that of the interrupt in service. It also arbitrates lowest-priority delivery.
    #[must_use]
    pub fn processor_priority(&self) -> u8 {
        let task = self.regs[TPR] as u8;
        let service = register::highest_bit(&self.regs, ISR).unwrap_or(0);
        if task >> 4 >= service >> 4 { task } else { service & 0xf0 }
    }

    /// The vector that would be delivered now: the highest requested one whose class is above the processor priority's.
    #[must_use]
    pub fn pending(&self) -> Option<u8> {
        if !self.is_software_enabled() {
            return None;
        }
        register::highest_bit(&self.regs, IRR).filter(|vector| vector >> 4 > self.processor_priority() >> 4)
    }

    /// The highest requested vector that no interrupt in service holds back, whether or not the task priority lets it through: what
    /// a CPU that keeps the task priority itself is waiting for.
    #[must_use]
    pub fn requested(&self) -> Option<u8> {
        let in_service = register::highest_bit(&self.regs, ISR).map_or(0, |vector| vector >> 4);
        register::highest_bit(&self.regs, IRR).filter(|vector| self.is_software_enabled() && vector >> 4 > in_service)
    }

    /// The CPU takes [`Apic::pending`]: it moves from requested to in service.
    pub fn acknowledge(&mut self) -> Option<u8> {
        let vector = self.pending()?;
        register::set_bit(&mut self.regs, IRR, vector, false);
        register::set_bit(&mut self.regs, ISR, vector, true);
        Some(vector)
    }

    fn end_of_interrupt(&mut self) -> Outcome {
        let Some(vector) = register::highest_bit(&self.regs, ISR) else {
            return Outcome::None;
        };
        register::set_bit(&mut self.regs, ISR, vector, false);
        if !register::bit(&self.regs, TMR, vector) {
            return Outcome::None;
        }
        let lint0 = self.regs[LVT_LINT0];
        if lint0 & lvt::REMOTE_IRR != 0 && lint0 as u8 == vector {
            self.regs[LVT_LINT0] &= !lvt::REMOTE_IRR;
            if self.lint[0] {
                let _ = self.fire_lint(LVT_LINT0);
            }
        }
        if self.regs[SVR] & SVR_NO_EOI_BROADCAST != 0 {
            return Outcome::None;
        }
        Outcome::EndOfInterrupt(vector)
    }

    /// CR8: the task priority's class.
    #[must_use]
    pub fn cr8(&self) -> u8 {
        (self.regs[TPR] >> 4) as u8
    }

    /// Sets the task priority as MOV to CR8 does: the sub-class becomes zero. Works with the APIC disabled, too.
    pub fn set_cr8(&mut self, class: u8) {
        self.regs[TPR] = u32::from(class & 15) << 4;
    }

    fn self_ipi(&mut self, vector: u8) {
        if vector < 16 {
            self.error(register::ESR_SENT_ILLEGAL_VECTOR);
        } else if self.is_software_enabled() {
            let _ = self.request(vector, false);
        }
    }

    /// "Issuing Interprocessor Interrupts": what a write to ICR sends. An IPI with the shorthand "self" is handled here.
    fn send_ipi(&mut self, icr: u32) -> Outcome {
        let vector = icr as u8;
        let mode = DeliveryMode::from_bits((icr >> 8 & 7) as u8);
        let shorthand = Shorthand::from_bits((icr >> 18 & 3) as u8);
        let (level, assert) = (icr & 1 << 15 != 0, icr & 1 << 14 != 0);
        if matches!(mode, DeliveryMode::Fixed | DeliveryMode::LowestPriority) && vector < 16 {
            self.error(register::ESR_SENT_ILLEGAL_VECTOR);
            return Outcome::None;
        }
        // "INIT level de-assert" only synchronised arbitration identities long ago; nobody reacts to it now.
        // ExtINT cannot be sent by an IPI.
        let dropped = mode == DeliveryMode::Init && level && !assert;
        if dropped || matches!(mode, DeliveryMode::Reserved | DeliveryMode::ExtInt) {
            return Outcome::None;
        }
        if shorthand == Shorthand::OnlySelf && mode == DeliveryMode::Fixed {
            self.self_ipi(vector);
            return Outcome::None;
        }
        let id =
            if self.is_x2apic() { self.regs[ICR_HIGH] } else { Destination::widen((self.regs[ICR_HIGH] >> 24) as u8) };
        let destination = if icr & 1 << 11 != 0 { Destination::Logical(id) } else { Destination::Physical(id) };
        // An IPI is edge-triggered whatever bit 15 says, INIT apart.
        Outcome::Ipi(Ipi { shorthand, message: Message { destination, mode, vector, level: false } })
    }

    /// The registers as KVM_GET_LAPIC gives them (with 32-bit IDs): 1 KiB, each register at its offset. TSC deadline and
    /// IA32_APIC_BASE are apart: see [`Apic::read_msr`].
    #[must_use]
    pub fn page(&mut self, now: Now) -> [u8; 1024] {
        self.advance(now);
        let mut page = [0; 1024];
        for (index, slot) in page.chunks_exact_mut(16).enumerate() {
            let value = match index {
                PPR => u32::from(self.processor_priority()),
                TIMER_CURRENT => self.timer.current_count(now),
                _ => self.regs[index],
            };
            slot[..4].copy_from_slice(&value.to_le_bytes());
        }
        page
    }

    /// Restores what [`Apic::page`] gave; IA32_APIC_BASE first ([`Apic::restore_base`]), IA32_TSC_DEADLINE afterwards. The
    /// timer continues from its current count. Bits that no register has are dropped; version and x2APIC identity stay as they are.
    pub fn set_page(&mut self, page: &[u8; 1024], now: Now) {
        for (index, slot) in page.chunks_exact(16).enumerate() {
            let register = &register::REGISTERS[index];
            let value = u32::from_le_bytes([slot[0], slot[1], slot[2], slot[3]]);
            match index {
                VERSION => {}
                ID | LDR if self.is_x2apic() => {}
                ICR_HIGH => self.regs[index] = value,
                DFR => self.regs[index] = value | 0x0fff_ffff,
                _ => self.regs[index] = value & register.saved(&self.features),
            }
        }
        // Vectors 0 to 15 cannot be requested or in service.
        for bank in [ISR, TMR, IRR] {
            self.regs[bank] &= !0xffff;
        }
        let current = self.regs[TIMER_CURRENT];
        self.timer = Timer::restore(self.regs[LVT_TIMER], self.regs[DIVIDE], self.regs[TIMER_INITIAL], current, now);
        self.errors = 0;
    }
}
