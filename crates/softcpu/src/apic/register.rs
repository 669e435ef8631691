//! Which registers there are, who may read and write them in which mode, and which bits they have
//! (SDM volume 3A, tables "Local APIC Register Address Map" and "Local APIC Register Address Map Supported by x2APIC").

use super::Features;

pub(super) const ID: usize = 0x02;
pub(super) const VERSION: usize = 0x03;
pub(super) const TPR: usize = 0x08;
pub(super) const APR: usize = 0x09;
pub(super) const PPR: usize = 0x0a;
pub(super) const EOI: usize = 0x0b;
pub(super) const RRD: usize = 0x0c;
pub(super) const LDR: usize = 0x0d;
pub(super) const DFR: usize = 0x0e;
pub(super) const SVR: usize = 0x0f;
/// In service; eight registers of 32 vectors.
pub(super) const ISR: usize = 0x10;
/// Trigger mode; eight registers.
pub(super) const TMR: usize = 0x18;
/// Requested; eight registers.
pub(super) const IRR: usize = 0x20;
pub(super) const ESR: usize = 0x28;
pub(super) const ICR: usize = 0x30;
pub(super) const ICR_HIGH: usize = 0x31;
pub(super) const LVT_TIMER: usize = 0x32;
pub(super) const LVT_THERMAL: usize = 0x33;
pub(super) const LVT_PERFORMANCE: usize = 0x34;
pub(super) const LVT_LINT0: usize = 0x35;
pub(super) const LVT_LINT1: usize = 0x36;
pub(super) const LVT_ERROR: usize = 0x37;
pub(super) const TIMER_INITIAL: usize = 0x38;
pub(super) const TIMER_CURRENT: usize = 0x39;
pub(super) const DIVIDE: usize = 0x3e;
pub(super) const SELF_IPI: usize = 0x3f;

/// The local vector table.
pub(super) const LVTS: [usize; 6] = [LVT_TIMER, LVT_THERMAL, LVT_PERFORMANCE, LVT_LINT0, LVT_LINT1, LVT_ERROR];

/// Version register: an integrated APIC, and the number of the last entry of the vector table.
pub(super) const VERSION_VALUE: u32 = 0x14 | (LVTS.len() as u32 - 1) << 16;

/// Bits of entries of the local vector table.
pub(super) mod lvt {
    /// LINT0: a level-triggered interrupt was accepted and not yet ended.
    pub(in super::super) const REMOTE_IRR: u32 = 1 << 14;
    /// LINT0, LINT1: level triggered.
    pub(in super::super) const LEVEL: u32 = 1 << 15;
    /// No delivery.
    pub(in super::super) const MASKED: u32 = 1 << 16;
    /// Vector, delivery mode, mask.
    pub(super) const COMMON: u32 = 0x0001_07ff;
    /// Polarity and trigger mode of LINT0 and LINT1.
    pub(super) const PIN: u32 = 1 << 13 | LEVEL;
    /// Vector and mask: what the error entry and the timer's have.
    pub(super) const PLAIN: u32 = 0x0001_00ff;
    /// Delivery status and remote IRR: writes that carry them along are no error.
    pub(super) const READ_ONLY: u32 = 1 << 12 | REMOTE_IRR;
}

/// ESR: an IPI with a vector below 16 was to be sent.
pub(super) const ESR_SENT_ILLEGAL_VECTOR: u32 = 1 << 5;
/// ESR: an interrupt with a vector below 16 came.
pub(super) const ESR_RECEIVED_ILLEGAL_VECTOR: u32 = 1 << 6;
/// ESR: access to a register that does not exist.
pub(super) const ESR_ILLEGAL_REGISTER: u32 = 1 << 7;

/// Who may access a register.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    None,
    Read,
    Write,
    Both,
}

impl Access {
    pub(super) fn reads(self) -> bool {
        matches!(self, Access::Read | Access::Both)
    }

    pub(super) fn writes(self) -> bool {
        matches!(self, Access::Write | Access::Both)
    }
}

/// One register.
#[derive(Debug, Clone, Copy)]
pub(super) struct Register {
    pub(super) xapic: Access,
    pub(super) x2apic: Access,
    /// Bits that software can set.
    bits: u32,
}

impl Register {
    /// Bits that a write sets, with what optional features add.
    pub(super) fn writable(&self, features: &Features) -> u32 {
        self.bits
            & !match self.bits {
                TIMER_BITS if !features.tsc_deadline => 1 << 18,
                SVR_BITS if !features.eoi_suppression => 1 << 12,
                _ => 0,
            }
    }

    /// Bits that WRMSR may have set without a fault.
    pub(super) fn x2apic_bits(&self, features: &Features) -> u32 {
        let status = match self.bits {
            TIMER_BITS | lvt::PLAIN | LVT_BITS | PIN_BITS => lvt::READ_ONLY,
            ICR_BITS => 1 << 12,
            _ => 0,
        };
        // EOI and ESR take zero only, whatever writing them does.
        self.writable(features) | status
    }

    /// Bits that a saved register may have.
    pub(super) fn saved(&self, features: &Features) -> u32 {
        match (self.xapic, self.bits) {
            (Access::Read, _) => u32::MAX,
            (_, PIN_BITS) => self.bits | lvt::REMOTE_IRR,
            (Access::Both, 0) => 0xff,
            _ => self.writable(features),
        }
    }
}

const TIMER_BITS: u32 = lvt::PLAIN | 3 << 17;
const LVT_BITS: u32 = lvt::COMMON;
const PIN_BITS: u32 = lvt::COMMON | lvt::PIN;
const SVR_BITS: u32 = 0x13ff;
const ICR_BITS: u32 = 0x000c_cfff;

/// Every register by offset / 16.
pub(super) static REGISTERS: [Register; 64] = {
    use Access::{Both, None, Read, Write};
    const fn register(xapic: Access, x2apic: Access, bits: u32) -> Register {
        Register { xapic, x2apic, bits }
    }
    let mut table = [register(None, None, 0); 64];
    table[ID] = register(Both, Read, 0xff00_0000);
    table[VERSION] = register(Read, Read, 0);
    table[TPR] = register(Both, Both, 0xff);
    table[APR] = register(Read, None, 0);
    table[PPR] = register(Read, Read, 0);
    table[EOI] = register(Write, Write, 0);
    table[RRD] = register(Read, None, 0);
    table[LDR] = register(Both, Read, 0xff00_0000);
    table[DFR] = register(Both, None, 0xf000_0000);
    table[SVR] = register(Both, Both, SVR_BITS);
    let mut bank = ISR;
    while bank < ESR {
        table[bank] = register(Read, Read, 0);
        bank += 1;
    }
    table[ESR] = register(Both, Both, 0);
    table[ICR] = register(Both, Both, ICR_BITS);
    table[ICR_HIGH] = register(Both, None, 0xff00_0000);
    table[LVT_TIMER] = register(Both, Both, TIMER_BITS);
    table[LVT_THERMAL] = register(Both, Both, LVT_BITS);
    table[LVT_PERFORMANCE] = register(Both, Both, LVT_BITS);
    table[LVT_LINT0] = register(Both, Both, PIN_BITS);
    table[LVT_LINT1] = register(Both, Both, PIN_BITS);
    table[LVT_ERROR] = register(Both, Both, lvt::PLAIN);
    table[TIMER_INITIAL] = register(Both, Both, u32::MAX);
    table[TIMER_CURRENT] = register(Read, Read, 0);
    table[DIVIDE] = register(Both, Both, 0xb);
    table[SELF_IPI] = register(None, Write, 0xff);
    table
};

/// Whether the register page has something at this offset / 16.
pub(super) fn exists(index: usize) -> bool {
    REGISTERS.get(index).is_some_and(|r| r.xapic != Access::None)
}

/// Whether `vector` is set in the bank of eight registers that begins at `bank`.
pub(super) fn bit(regs: &[u32; 64], bank: usize, vector: u8) -> bool {
    regs[bank + usize::from(vector / 32)] >> (vector % 32) & 1 != 0
}

/// Sets or clears `vector` in a bank.
pub(super) fn set_bit(regs: &mut [u32; 64], bank: usize, vector: u8, value: bool) {
    let word = &mut regs[bank + usize::from(vector / 32)];
    *word = *word & !(1 << (vector % 32)) | u32::from(value) << (vector % 32);
}

/// The highest vector set in a bank.
pub(super) fn highest_bit(regs: &[u32; 64], bank: usize) -> Option<u8> {
    (0..8u8).rev().find_map(|i| regs[bank + usize::from(i)].checked_ilog2().map(|bit| i * 32 + bit as u8))
}
