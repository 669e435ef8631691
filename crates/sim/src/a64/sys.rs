//! The system instructions: MRS and MSR, hints, barriers, maintenance (C4.1.93, "System instructions").

use super::{Bus, Cpu, FREQUENCY, Stop, Trap, class, pstate, syndrome};
use vm_accel_sys::hvf::aarch64::gic::CNTP;
use vm_accel_sys::hvf::aarch64::sys_reg;

const fn encoding(op0: u16, op1: u16, crn: u16, crm: u16, op2: u16) -> u16 {
    op0 << 14 | op1 << 11 | crn << 7 | crm << 3 | op2
}

const NZCV: u16 = encoding(3, 3, 4, 2, 0);
const DAIF: u16 = encoding(3, 3, 4, 2, 1);
const CURRENT_EL: u16 = encoding(3, 0, 4, 2, 2);
const SP_SEL: u16 = encoding(3, 0, 4, 2, 0);
const FPCR: u16 = encoding(3, 3, 4, 4, 0);
const FPSR: u16 = encoding(3, 3, 4, 4, 1);
const CTR_EL0: u16 = encoding(3, 3, 0, 0, 1);
const DCZID_EL0: u16 = encoding(3, 3, 0, 0, 7);
const CNTFRQ_EL0: u16 = encoding(3, 3, 14, 0, 0);
const CNTVCT_EL0: u16 = encoding(3, 3, 14, 0, 2);
const CNTV_TVAL_EL0: u16 = encoding(3, 3, 14, 3, 0);
const CNTP_CTL_EL0: u16 = CNTP[0];
const CNTP_TVAL_EL0: u16 = encoding(3, 3, 14, 2, 0);
const ISR_EL1: u16 = encoding(3, 0, 12, 1, 0);
/// The GIC's CPU interface: ICC_PMR_EL1, and CRn 12 with CRm 8 to 12.
const fn is_gic(register: u16) -> bool {
    register == encoding(3, 0, 4, 6, 0) || register >> 7 == encoding(3, 0, 12, 0, 0) >> 7 && register >> 3 & 15 >= 8
}

const DAIF_BITS: u64 = pstate::D | pstate::A | pstate::I | pstate::F;
/// Bytes that DC ZVA clears.
const ZERO_BLOCK: u64 = 64;

impl Cpu {
    /// Answers what the next instruction is, if it is not the one behind.
    pub(super) fn system(&mut self, bus: &impl Bus, word: u32) -> Result<(), Stop> {
        let register = (word >> 5) as u16;
        let t = word & 31;
        let op0 = word >> 19 & 3;
        let is_read = word >> 21 & 1 != 0;
        match (op0, is_read) {
            (0, false) => self.hint_or_state(word),
            (1, false) => self.maintenance(bus, word, self.r(t)),
            (1, true) => Err(self.undefined()),
            (_, true) => {
                let value = self.read_register(bus, register, t)?;
                self.set_r(t, value);
                Ok(())
            }
            (_, false) => self.write_register(bus, register, t),
        }
    }

    fn hint_or_state(&mut self, word: u32) -> Result<(), Stop> {
        let (op1, crn, crm, op2) = (word >> 16 & 7, word >> 12 & 15, u64::from(word >> 8 & 15), word >> 5 & 7);
        match (op1, crn, op2) {
            // WFE, WFI; every other hint is a NOP.
            (3, 2, 2 | 3) if crm == 0 => {
                let iss = 0x1e << 20 | u64::from(op2 == 2);
                Err(Stop::Trap(Trap { syndrome: syndrome(class::WFX, iss), far: 0, ipa: 0 }))
            }
            (3, 2 | 3, _) => Ok(()),
            (3, 4, 6) => {
                self.pstate |= crm << 6;
                Ok(())
            }
            (3, 4, 7) => {
                self.pstate &= !(crm << 6);
                Ok(())
            }
            (0, 4, 5) if !self.is_el0() => {
                self.pstate = self.pstate & !pstate::SP | (crm & 1);
                Ok(())
            }
            // PAN, UAO: known, without effect.
            (0, 4, 3 | 4) if !self.is_el0() => Ok(()),
            _ => Err(self.undefined()),
        }
    }

    /// IC, DC, TLBI: nothing is cached here.
    fn maintenance(&mut self, bus: &impl Bus, word: u32, address: u64) -> Result<(), Stop> {
        let zva = word >> 5 & 0x3fff == u32::from(encoding(0, 3, 7, 4, 1));
        if zva {
            return self.store_zeros(bus, address & !(ZERO_BLOCK - 1));
        }
        match word >> 12 & 15 {
            7 | 8 => Ok(()),
            _ => Err(self.undefined()),
        }
    }

    fn store_zeros(&mut self, bus: &impl Bus, at: u64) -> Result<(), Stop> {
        (0..ZERO_BLOCK / 8).try_for_each(|n| self.store_untold(bus, at + 8 * n, &[0; 8]))
    }

    /// The level that EL1 leaves to EL0 has op1 3; the rest is undefined there.
    fn allowed(&self, register: u16) -> Result<(), Stop> {
        if self.is_el0() && register >> 11 & 7 != 3 { Err(self.undefined()) } else { Ok(()) }
    }

    /// An access that EL2 wants to see (D24.2.40, "ISS encoding for an exception from MSR, MRS").
    fn trapped(register: u16, t: u32, is_read: bool) -> Stop {
        let bits = |high: u32, low: u32| u64::from(register) >> low & ((1 << (high - low + 1)) - 1);
        let iss = bits(15, 14) << 20
            | bits(2, 0) << 17
            | bits(13, 11) << 14
            | bits(10, 7) << 10
            | u64::from(t) << 5
            | bits(6, 3) << 1
            | u64::from(is_read);
        Stop::Trap(Trap { syndrome: syndrome(class::SYS_REG, iss), far: 0, ipa: 0 })
    }

    fn has_physical_timer(&self) -> bool {
        self.sys.contains_key(&CNTP_CTL_EL0)
    }

    fn read_register(&mut self, bus: &impl Bus, register: u16, t: u32) -> Result<u64, Stop> {
        self.allowed(register)?;
        Ok(match register {
            NZCV => self.pstate & pstate::FLAGS,
            DAIF => self.pstate & DAIF_BITS,
            CURRENT_EL => self.pstate & pstate::EL,
            SP_SEL => self.pstate & pstate::SP,
            FPCR => self.fpcr,
            FPSR => self.fpsr,
            CTR_EL0 => 0x8444_c004,
            DCZID_EL0 => 4,
            CNTFRQ_EL0 => FREQUENCY,
            CNTVCT_EL0 => self.count(bus),
            CNTV_TVAL_EL0 => self.get(sys_reg::CNTV_CVAL_EL0).wrapping_sub(self.count(bus)) & 0xffff_ffff,
            sys_reg::CNTV_CTL_EL0 => self.timer_control(bus),
            CNTP_CTL_EL0 if self.has_physical_timer() => self.physical_timer_control(bus),
            CNTP_TVAL_EL0 if self.has_physical_timer() => self.get(CNTP[1]).wrapping_sub(bus.ticks()) & 0xffff_ffff,
            ISR_EL1 => u64::from(self.irq) << 7 | u64::from(self.fiq) << 6,
            _ if is_gic(register) => bus.read_gic(register).ok_or_else(|| Self::trapped(register, t, true))?,
            // EL2's registers, of which the platform lets a VMM see one.
            _ if register >> 11 & 7 >= 4 => return Err(self.undefined()),
            _ => *self.sys.get(&register).ok_or_else(|| Self::trapped(register, t, true))?,
        })
    }

    fn write_register(&mut self, bus: &impl Bus, register: u16, t: u32) -> Result<(), Stop> {
        self.allowed(register)?;
        let value = self.r(t);
        match register {
            NZCV => self.pstate = self.pstate & !pstate::FLAGS | value & pstate::FLAGS,
            DAIF => self.pstate = self.pstate & !DAIF_BITS | value & DAIF_BITS,
            SP_SEL => self.pstate = self.pstate & !pstate::SP | value & pstate::SP,
            FPCR => self.fpcr = value,
            FPSR => self.fpsr = value,
            CNTV_TVAL_EL0 => {
                let distance = i64::from(value as i32);
                self.set(sys_reg::CNTV_CVAL_EL0, self.count(bus).wrapping_add_signed(distance));
            }
            CNTP_TVAL_EL0 if self.has_physical_timer() => {
                let distance = i64::from(value as i32);
                self.set(CNTP[1], bus.ticks().wrapping_add_signed(distance));
            }
            _ if is_gic(register) => {
                bus.write_gic(register, value).ok_or_else(|| Self::trapped(register, t, false))?;
            }
            _ if register >> 11 & 7 >= 4 || register >> 7 == encoding(3, 0, 0, 0, 0) >> 7 => {
                return Err(self.undefined());
            }
            _ if self.sys.contains_key(&register) => self.set(register, value),
            _ => return Err(Self::trapped(register, t, false)),
        }
        Ok(())
    }
}
