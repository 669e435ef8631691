//! Lazy arithmetic flags: an instruction leaves behind what it computed, and a flag is worked out when it is read.
//! The state is always complete, so a fault at any instruction finds exact flags.

use crate::state::rflags::{AF, ARITH, CF, OF, PF, SF, ZF};

/// What the last flag-setting instruction was; the low two bits of `Flags::kind` are log2 of the operand size in bytes.
pub(crate) mod kind {
    /// All flags are in `aux`.
    pub(crate) const EAGER: u32 = 0 << 2;
    /// `r = a + b`.
    pub(crate) const ADD: u32 = 1 << 2;
    /// `r = a - b`.
    pub(crate) const SUB: u32 = 2 << 2;
    /// `r = a + b + aux`.
    pub(crate) const ADC: u32 = 3 << 2;
    /// `r = a - b - aux`.
    pub(crate) const SBB: u32 = 4 << 2;
    /// AND, OR, XOR, TEST: CF = OF = AF = 0.
    pub(crate) const LOGIC: u32 = 5 << 2;
    /// `r = a + 1`, CF in `aux`.
    pub(crate) const INC: u32 = 6 << 2;
    /// `r = a - 1`, CF in `aux`.
    pub(crate) const DEC: u32 = 7 << 2;
    /// SF, ZF, PF from `r`; CF, OF, AF as RFLAGS bits in `aux`.
    pub(crate) const RES: u32 = 8 << 2;
}

/// The arithmetic flags, not yet computed. `a` and `r` are zero-extended from the operand size.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Flags {
    pub(crate) kind: u32,
    pub(crate) aux: u32,
    pub(crate) a: u64,
    pub(crate) r: u64,
}

/// PF of a result: even parity of the low byte.
#[inline(always)]
fn parity(r: u64) -> bool {
    (r as u8).count_ones() & 1 == 0
}

impl Flags {
    /// The given RFLAGS bits.
    pub(crate) fn from_bits(bits: u64) -> Self {
        Flags { kind: kind::EAGER, aux: (bits & ARITH) as u32, a: 0, r: 0 }
    }

    /// How far left a value moves so that its sign is bit 63.
    #[inline(always)]
    fn shift(&self) -> u32 {
        64 - (8 << (self.kind & 3))
    }

    #[inline(always)]
    fn class(&self) -> u32 {
        self.kind & !3
    }

    #[inline(always)]
    fn eager(&self, bit: u64) -> bool {
        u64::from(self.aux) & bit != 0
    }

    /// CF.
    #[inline]
    pub(crate) fn cf(&self) -> bool {
        match self.class() {
            kind::ADD => self.r < self.a,
            kind::SUB => {
                // b = a - r (mod size); borrow when a < b.
                let h = self.shift();
                let (a, r) = (self.a << h, self.r << h);
                a < a.wrapping_sub(r)
            }
            kind::ADC => self.r < self.a || self.aux != 0 && self.r == self.a,
            kind::SBB => {
                let h = self.shift();
                let (a, r) = (self.a << h, self.r << h);
                a < r || self.aux != 0 && a == r
            }
            kind::LOGIC => false,
            kind::INC | kind::DEC => self.aux & 1 != 0,
            _ => self.eager(CF),
        }
    }

    /// The second operand of an addition or subtraction, moved to the top.
    #[inline(always)]
    fn operands(&self) -> (u64, u64, u64) {
        let h = self.shift();
        let (a, r) = (self.a << h, self.r << h);
        let carry = u64::from(self.aux) << h;
        let b = match self.class() {
            kind::ADD => r.wrapping_sub(a),
            kind::SUB => a.wrapping_sub(r),
            kind::ADC => r.wrapping_sub(a).wrapping_sub(carry),
            kind::SBB => a.wrapping_sub(r).wrapping_sub(carry),
            _ => 1 << h,
        };
        (a, b, r)
    }

    /// OF.
    #[inline]
    pub(crate) fn of(&self) -> bool {
        match self.class() {
            kind::ADD | kind::ADC | kind::INC => {
                let (a, b, r) = self.operands();
                ((a ^ r) & (b ^ r)) as i64 >> 63 != 0
            }
            kind::SUB | kind::SBB | kind::DEC => {
                let (a, b, r) = self.operands();
                ((a ^ b) & (a ^ r)) as i64 >> 63 != 0
            }
            kind::LOGIC => false,
            _ => self.eager(OF),
        }
    }

    /// AF.
    #[inline]
    pub(crate) fn af(&self) -> bool {
        match self.class() {
            kind::LOGIC => false,
            kind::EAGER | kind::RES => self.eager(AF),
            _ => {
                let (a, b, r) = self.operands();
                (a ^ b ^ r) >> self.shift() & 0x10 != 0
            }
        }
    }

    /// ZF.
    #[inline]
    pub(crate) fn zf(&self) -> bool {
        if self.class() == kind::EAGER { self.eager(ZF) } else { self.r == 0 }
    }

    /// SF.
    #[inline]
    pub(crate) fn sf(&self) -> bool {
        if self.class() == kind::EAGER { self.eager(SF) } else { (self.r << self.shift()) as i64 >> 63 != 0 }
    }

    /// PF.
    #[inline]
    pub(crate) fn pf(&self) -> bool {
        if self.class() == kind::EAGER { self.eager(PF) } else { parity(self.r) }
    }

    /// All six, as RFLAGS bits.
    pub(crate) fn bits(&self) -> u64 {
        if self.class() == kind::EAGER {
            return u64::from(self.aux);
        }
        let bit = |on: bool, mask: u64| if on { mask } else { 0 };
        bit(self.cf(), CF)
            | bit(self.pf(), PF)
            | bit(self.af(), AF)
            | bit(self.zf(), ZF)
            | bit(self.sf(), SF)
            | bit(self.of(), OF)
    }

    /// Sets the flags in `mask` to those in `bits` and keeps the others.
    pub(crate) fn assign(&mut self, bits: u64, mask: u64) {
        *self = Flags::from_bits(self.bits() & !mask | bits & mask);
    }

    /// A condition by its number in Jcc, SETcc and CMOVcc encodings.
    #[inline]
    pub(crate) fn condition(&self, cc: u8) -> bool {
        let holds = match cc >> 1 & 7 {
            0 => self.of(),
            1 => self.cf(),
            2 => self.zf(),
            3 => self.cf() || self.zf(),
            4 => self.sf(),
            5 => self.pf(),
            6 => self.sf() != self.of(),
            _ => self.zf() || self.sf() != self.of(),
        };
        holds ^ (cc & 1 != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flags(kind: u32, size: u32, a: u64, r: u64, aux: u32) -> u64 {
        Flags { kind: kind | size, aux, a, r }.bits()
    }

    #[test]
    fn byte_additions_and_subtractions_match_the_definition() {
        for a in 0..=255u64 {
            for b in 0..=255u64 {
                for carry in 0..2u64 {
                    let bit = |on: bool, mask: u64| if on { mask } else { 0 };
                    let common = |r: u64| {
                        bit(parity(r), PF)
                            | bit(r & 0xff == 0, ZF)
                            | bit(r & 0x80 != 0, SF)
                            | bit((a ^ b ^ r) & 16 != 0, AF)
                    };
                    let sum = a + b + carry;
                    let wide = i64::from(a as i8) + i64::from(b as i8) + carry as i64;
                    let expect = common(sum) | bit(sum > 255, CF) | bit(wide != i64::from(wide as i8), OF);
                    assert_eq!(flags(kind::ADC, 0, a, sum & 0xff, carry as u32), expect, "{a} + {b} + {carry}");
                    let dif = a.wrapping_sub(b).wrapping_sub(carry);
                    let wide = i64::from(a as i8) - i64::from(b as i8) - carry as i64;
                    let expect = common(dif) | bit(a < b + carry, CF) | bit(wide != i64::from(wide as i8), OF);
                    assert_eq!(flags(kind::SBB, 0, a, dif & 0xff, carry as u32), expect, "{a} - {b} - {carry}");
                    if carry == 0 {
                        assert_eq!(flags(kind::ADD, 0, a, sum & 0xff, 0), flags(kind::ADC, 0, a, sum & 0xff, 0));
                        assert_eq!(flags(kind::SUB, 0, a, dif & 0xff, 0), flags(kind::SBB, 0, a, dif & 0xff, 0));
                    }
                }
            }
        }
    }
}
