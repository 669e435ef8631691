//! Branches, exceptions and integer arithmetic (C4.1).

use super::{Bus, Cpu, Stop, Trap, class, pstate, syndrome};
use vm_accel_sys::hvf::aarch64::sys_reg;

const fn field(word: u32, high: u32, low: u32) -> u32 {
    word >> low & ((1 << (high - low + 1)) - 1)
}

const fn signed(value: u32, bits: u32) -> u64 {
    (((value as i64) << (64 - bits)) >> (64 - bits)) as u64
}

const N: u64 = 1 << 31;
const Z: u64 = 1 << 30;
const C: u64 = 1 << 29;
const V: u64 = 1 << 28;

/// The bit masks of a logical immediate (J1.1.3, "DecodeBitMasks"): for the operation, and for bitfield moves the top.
fn bit_masks(n: u32, imms: u32, immr: u32, is_logical: bool) -> Option<(u64, u64)> {
    let combined = n << 6 | (!imms & 0x3f);
    let len = combined.checked_ilog2().filter(|len| *len >= 1)?;
    let size = 1u32 << len;
    let levels = size - 1;
    let (s, r) = (imms & levels, immr & levels);
    if is_logical && s == levels {
        return None;
    }
    let ones = |count: u32| if count >= 64 { u64::MAX } else { (1u64 << count) - 1 };
    let replicate = |element: u64| (0..64 / size).fold(0, |all, n| all | element << (n * size));
    let element = ones(s + 1);
    let rotated = if r == 0 { element } else { (element >> r | element << (size - r)) & ones(size) };
    Some((replicate(rotated), replicate(ones((s.wrapping_sub(r) & levels) + 1))))
}

impl Cpu {
    pub(super) fn undefined(&self) -> Stop {
        Stop::Fault { syndrome: syndrome(class::UNKNOWN, 0), far: None }
    }

    /// Does an instruction; answers where to go on if it is not behind it.
    pub(super) fn execute(&mut self, bus: &impl Bus, word: u32) -> Result<Option<u64>, Stop> {
        match field(word, 28, 25) {
            0b1000 | 0b1001 => self.immediate(word)?,
            0b1010 | 0b1011 => return self.branch(bus, word),
            0b0100 | 0b0110 | 0b1100 | 0b1110 => self.load_store(bus, word)?,
            0b0101 | 0b1101 => self.register(word)?,
            0b0111 | 0b1111 => self.vector(word)?,
            _ => return Err(self.undefined()),
        }
        Ok(None)
    }

    fn condition(&self, cond: u32) -> bool {
        let p = self.pstate;
        let (n, z, c, v) = (p & N != 0, p & Z != 0, p & C != 0, p & V != 0);
        let holds = match cond >> 1 {
            0 => z,
            1 => c,
            2 => n,
            3 => v,
            4 => c && !z,
            5 => n == v,
            6 => n == v && !z,
            _ => return true,
        };
        holds != (cond & 1 != 0)
    }

    fn branch(&mut self, bus: &impl Bus, word: u32) -> Result<Option<u64>, Stop> {
        let to = |distance: u64| Some(self.pc.wrapping_add(distance));
        let next = self.pc.wrapping_add(4);
        let wide = field(word, 31, 31) != 0;
        match field(word, 31, 25) {
            0b000_1010..=0b000_1011 | 0b100_1010..=0b100_1011 => {
                let target = to(signed(field(word, 25, 0), 26) << 2);
                if wide {
                    self.x[30] = next;
                }
                Ok(target)
            }
            0b001_1010 | 0b101_1010 => {
                let value = self.r(field(word, 4, 0));
                let value = if wide { value } else { value & 0xffff_ffff };
                let taken = (value == 0) == (field(word, 24, 24) == 0);
                Ok(to(signed(field(word, 23, 5), 19) << 2).filter(|_| taken))
            }
            0b001_1011 | 0b101_1011 => {
                let bit = field(word, 31, 31) << 5 | field(word, 23, 19);
                let taken = (self.r(field(word, 4, 0)) >> bit & 1 != 0) == (field(word, 24, 24) != 0);
                Ok(to(signed(field(word, 18, 5), 14) << 2).filter(|_| taken))
            }
            0b010_1010 => {
                let taken = self.condition(field(word, 3, 0));
                Ok(to(signed(field(word, 23, 5), 19) << 2).filter(|_| taken))
            }
            0b110_1010 if field(word, 24, 24) == 0 => self.exception(word),
            0b110_1010 => self.system(bus, word).map(|()| None),
            0b110_1011 => self.branch_to_register(word, next),
            _ => Err(self.undefined()),
        }
    }

    fn branch_to_register(&mut self, word: u32, next: u64) -> Result<Option<u64>, Stop> {
        let target = self.r(field(word, 9, 5));
        match field(word, 24, 21) {
            0 | 2 => Ok(Some(target)),
            1 => {
                self.x[30] = next;
                Ok(Some(target))
            }
            4 if !self.is_el0() => self.exception_return().map(Some),
            _ => Err(self.undefined()),
        }
    }

    fn exception_return(&mut self) -> Result<u64, Stop> {
        let back = self.get(sys_reg::SPSR_EL1);
        let legal = back & (pstate::NARROW | 2) == 0 && matches!(back & (pstate::EL | pstate::SP), 0 | 4 | 5);
        if !legal {
            return Err(Stop::Fault { syndrome: syndrome(class::ILLEGAL, 0), far: None });
        }
        self.pstate = back;
        self.monitor = None;
        Ok(self.get(sys_reg::ELR_EL1))
    }

    fn exception(&mut self, word: u32) -> Result<Option<u64>, Stop> {
        let imm = u64::from(field(word, 20, 5));
        let trap = |class| Stop::Trap(Trap { syndrome: syndrome(class, imm), far: 0, ipa: 0 });
        match (field(word, 23, 21), field(word, 4, 0)) {
            // The return address of a call is behind it.
            (0, 1) => {
                self.pc = self.pc.wrapping_add(4);
                Err(Stop::Fault { syndrome: syndrome(class::SVC, imm), far: None })
            }
            (0, 2) if !self.is_el0() => {
                self.pc = self.pc.wrapping_add(4);
                Err(trap(class::HVC))
            }
            // A trapped one is at the instruction, which has not been done.
            (0, 3) if !self.is_el0() => Err(trap(class::SMC)),
            (1, 0) if self.trap_debug => Err(trap(class::BRK)),
            (1, 0) => Err(Stop::Fault { syndrome: syndrome(class::BRK, imm), far: None }),
            _ => Err(self.undefined()),
        }
    }

    /// Adds with carry and sets the flags if asked to (J1.1.3, "AddWithCarry").
    fn add(&mut self, wide: bool, a: u64, b: u64, carry: bool, set_flags: bool) -> u64 {
        let mask = if wide { u64::MAX } else { 0xffff_ffff };
        let top = if wide { 63 } else { 31 };
        let (a, b) = (a & mask, b & mask);
        let sum = u128::from(a) + u128::from(b) + u128::from(carry);
        let result = sum as u64 & mask;
        if set_flags {
            // Both operands have one sign and the result the other.
            let overflow = ((a ^ result) & (b ^ result)) >> top & 1 != 0;
            self.set_flags(wide, result, sum >> (top + 1) != 0, overflow);
        }
        result
    }

    fn set_flags(&mut self, wide: bool, result: u64, carry: bool, overflow: bool) {
        let negative = result >> (if wide { 63 } else { 31 }) & 1 != 0;
        let flags = [(negative, N), (result == 0, Z), (carry, C), (overflow, V)];
        self.pstate &= !pstate::FLAGS;
        self.pstate |= flags.iter().filter(|(on, _)| *on).map(|(_, flag)| flag).sum::<u64>();
    }

    fn put(&mut self, wide: bool, d: u32, value: u64) {
        self.set_r(d, if wide { value } else { value & 0xffff_ffff });
    }

    fn immediate(&mut self, word: u32) -> Result<(), Stop> {
        let wide = field(word, 31, 31) != 0;
        let (n, d) = (field(word, 9, 5), field(word, 4, 0));
        match field(word, 25, 23) {
            0 | 1 => {
                let imm = signed(field(word, 23, 5) << 2 | field(word, 30, 29), 21);
                let (base, distance) = if wide { (self.pc & !0xfff, imm << 12) } else { (self.pc, imm) };
                self.set_r(d, base.wrapping_add(distance));
            }
            2 => {
                let imm = u64::from(field(word, 21, 10)) << (12 * field(word, 22, 22));
                let (subtract, set_flags) = (field(word, 30, 30) != 0, field(word, 29, 29) != 0);
                let base = self.r_sp(n);
                let operand = if subtract { !imm } else { imm };
                let result = self.add(wide, base, operand, subtract, set_flags);
                if set_flags { self.set_r(d, result) } else { self.set_r_sp(d, result) }
            }
            4 => {
                let (mask, _) = bit_masks(field(word, 22, 22), field(word, 15, 10), field(word, 21, 16), true)
                    .filter(|_| wide || field(word, 22, 22) == 0)
                    .ok_or_else(|| self.undefined())?;
                let result = self.logical(wide, field(word, 30, 29), self.r(n), mask);
                if field(word, 30, 29) == 3 { self.set_r(d, result) } else { self.set_r_sp(d, result) }
            }
            5 => {
                let shift = 16 * field(word, 22, 21);
                let imm = u64::from(field(word, 20, 5)) << shift;
                let value = match field(word, 30, 29) {
                    0 => !imm,
                    2 => imm,
                    3 => self.r(d) & !(0xffff << shift) | imm,
                    _ => return Err(self.undefined()),
                };
                self.put(wide, d, value);
            }
            6 => self.bitfield(word, wide)?,
            7 if field(word, 30, 29) == 0 => {
                let lsb = field(word, 15, 10);
                let (high, low) = (self.r(n), self.r(field(word, 20, 16)));
                let value = if wide {
                    ((u128::from(high) << 64 | u128::from(low)) >> lsb) as u64
                } else {
                    (high << 32 | low & 0xffff_ffff) >> (lsb & 31)
                };
                self.put(wide, d, value);
            }
            _ => return Err(self.undefined()),
        }
        Ok(())
    }

    fn bitfield(&mut self, word: u32, wide: bool) -> Result<(), Stop> {
        let (n, d) = (field(word, 9, 5), field(word, 4, 0));
        let (immr, imms) = (field(word, 21, 16), field(word, 15, 10));
        let (wmask, tmask) = bit_masks(field(word, 22, 22), imms, immr, false)
            .filter(|_| (field(word, 22, 22) != 0) == wide)
            .ok_or_else(|| self.undefined())?;
        let source = self.r(n);
        let rotated = if wide { source.rotate_right(immr) } else { u64::from((source as u32).rotate_right(immr & 31)) };
        let value = match field(word, 30, 29) {
            0 => {
                let top = if source >> imms & 1 != 0 { u64::MAX } else { 0 };
                top & !tmask | rotated & wmask & tmask
            }
            1 => {
                let kept = self.r(d);
                let bottom = kept & !wmask | rotated & wmask;
                kept & !tmask | bottom & tmask
            }
            2 => rotated & wmask & tmask,
            _ => return Err(self.undefined()),
        };
        self.put(wide, d, value);
        Ok(())
    }

    fn logical(&mut self, wide: bool, op: u32, a: u64, b: u64) -> u64 {
        let result = match op {
            0 | 3 => a & b,
            1 => a | b,
            _ => a ^ b,
        };
        let result = if wide { result } else { result & 0xffff_ffff };
        if op == 3 {
            self.set_flags(wide, result, false, false);
        }
        result
    }

    fn shifted(&self, wide: bool, value: u64, kind: u32, amount: u32) -> u64 {
        if wide {
            return match kind {
                0 => value << amount,
                1 => value >> amount,
                2 => (value as i64 >> amount) as u64,
                _ => value.rotate_right(amount),
            };
        }
        let (value, amount) = (value as u32, amount & 31);
        u64::from(match kind {
            0 => value << amount,
            1 => value >> amount,
            2 => (value as i32 >> amount) as u32,
            _ => value.rotate_right(amount),
        })
    }

    /// A register extended as its option says and shifted (C6.2, "extended register").
    pub(super) fn extended(&self, m: u32, option: u32, shift: u32) -> u64 {
        let value = self.r(m);
        let extended = match option {
            0 => value & 0xff,
            1 => value & 0xffff,
            2 => value & 0xffff_ffff,
            4 => value as i8 as u64,
            5 => value as i16 as u64,
            6 => value as i32 as u64,
            _ => value,
        };
        extended << shift
    }

    fn register(&mut self, word: u32) -> Result<(), Stop> {
        let wide = field(word, 31, 31) != 0;
        let (n, m, d) = (field(word, 9, 5), field(word, 20, 16), field(word, 4, 0));
        let amount = field(word, 15, 10);
        match (field(word, 28, 28), field(word, 24, 21)) {
            (0, 0..=7) => {
                let mut operand = self.shifted(wide, self.r(m), field(word, 23, 22), amount);
                if field(word, 21, 21) != 0 {
                    operand = !operand;
                }
                let result = self.logical(wide, field(word, 30, 29), self.r(n), operand);
                self.put(wide, d, result);
            }
            (0, 8 | 10 | 12) => {
                let operand = self.shifted(wide, self.r(m), field(word, 23, 22), amount);
                let (subtract, set_flags) = (field(word, 30, 30) != 0, field(word, 29, 29) != 0);
                let operand = if subtract { !operand } else { operand };
                let result = self.add(wide, self.r(n), operand, subtract, set_flags);
                self.set_r(d, result);
            }
            (0, 9) if field(word, 12, 10) <= 4 => {
                let operand = self.extended(m, field(word, 15, 13), field(word, 12, 10));
                let (subtract, set_flags) = (field(word, 30, 30) != 0, field(word, 29, 29) != 0);
                let operand = if subtract { !operand } else { operand };
                let result = self.add(wide, self.r_sp(n), operand, subtract, set_flags);
                if set_flags { self.set_r(d, result) } else { self.set_r_sp(d, result) }
            }
            (1, 0) => {
                let (subtract, set_flags) = (field(word, 30, 30) != 0, field(word, 29, 29) != 0);
                let operand = if subtract { !self.r(m) } else { self.r(m) };
                let result = self.add(wide, self.r(n), operand, self.pstate & C != 0, set_flags);
                self.set_r(d, result);
            }
            (1, 2) => {
                let operand = if field(word, 11, 11) != 0 { u64::from(m) } else { self.r(m) };
                if self.condition(field(word, 15, 12)) {
                    let subtract = field(word, 30, 30) != 0;
                    let operand = if subtract { !operand } else { operand };
                    self.add(wide, self.r(n), operand, subtract, true);
                } else {
                    self.pstate = self.pstate & !pstate::FLAGS | u64::from(field(word, 3, 0)) << 28;
                }
            }
            (1, 4) => {
                let value = if self.condition(field(word, 15, 12)) {
                    self.r(n)
                } else {
                    let other = self.r(m);
                    let other = if field(word, 30, 30) != 0 { !other } else { other };
                    other.wrapping_add(field(word, 10, 10).into())
                };
                self.put(wide, d, value);
            }
            (1, 6) if field(word, 30, 30) != 0 => self.one_source(word, wide)?,
            (1, 6) => self.two_sources(word, wide)?,
            (1, 8..=15) => self.multiply(word, wide)?,
            _ => return Err(self.undefined()),
        }
        Ok(())
    }

    fn one_source(&mut self, word: u32, wide: bool) -> Result<(), Stop> {
        let value = self.r(field(word, 9, 5));
        let bits = if wide { 64 } else { 32 };
        let narrow = if wide { value } else { value & 0xffff_ffff };
        let result = match field(word, 20, 10) {
            0 => narrow.reverse_bits() >> (64 - bits),
            1 => (narrow & 0x00ff_00ff_00ff_00ff) << 8 | narrow >> 8 & 0x00ff_00ff_00ff_00ff,
            2 if wide => u64::from((value as u32).swap_bytes()) | u64::from(((value >> 32) as u32).swap_bytes()) << 32,
            2 => u64::from((value as u32).swap_bytes()),
            3 if wide => value.swap_bytes(),
            4 => u64::from(narrow.leading_zeros() - (64 - bits)),
            _ => return Err(self.undefined()),
        };
        self.put(wide, field(word, 4, 0), result);
        Ok(())
    }

    fn two_sources(&mut self, word: u32, wide: bool) -> Result<(), Stop> {
        let (a, b) = (self.r(field(word, 9, 5)), self.r(field(word, 20, 16)));
        let result = match (field(word, 15, 10), wide) {
            (2, true) => a.checked_div(b).unwrap_or(0),
            (2, false) => u64::from((a as u32).checked_div(b as u32).unwrap_or(0)),
            (3, true) if b == 0 => 0,
            (3, true) => (a as i64).wrapping_div(b as i64) as u64,
            (3, false) if b as u32 == 0 => 0,
            (3, false) => (a as i32).wrapping_div(b as i32) as u64,
            (op @ 8..=11, _) => self.shifted(wide, a, op - 8, b as u32 & if wide { 63 } else { 31 }),
            _ => return Err(self.undefined()),
        };
        self.put(wide, field(word, 4, 0), result);
        Ok(())
    }

    fn multiply(&mut self, word: u32, wide: bool) -> Result<(), Stop> {
        let (n, m, a) = (self.r(field(word, 9, 5)), self.r(field(word, 20, 16)), self.r(field(word, 14, 10)));
        let subtract = field(word, 15, 15) != 0;
        let product = match field(word, 23, 21) {
            0 => n.wrapping_mul(m),
            1 if wide => (n as i32 as i64).wrapping_mul(m as i32 as i64) as u64,
            5 if wide => (n & 0xffff_ffff).wrapping_mul(m & 0xffff_ffff),
            2 if wide => ((i128::from(n as i64) * i128::from(m as i64)) >> 64) as u64,
            6 if wide => ((u128::from(n) * u128::from(m)) >> 64) as u64,
            _ => return Err(self.undefined()),
        };
        let high = field(word, 22, 22) != 0;
        let value = match (high, subtract) {
            (true, _) => product,
            (false, false) => a.wrapping_add(product),
            (false, true) => a.wrapping_sub(product),
        };
        self.put(wide, field(word, 4, 0), value);
        Ok(())
    }

    /// ADD of vectors, which is all that the guest programs compute with them.
    fn vector(&mut self, word: u32) -> Result<(), Stop> {
        if word & 0xbf20_fc00 != 0x0e20_8400 {
            return Err(self.undefined());
        }
        self.need_vectors()?;
        let (a, b) = (self.v[field(word, 9, 5) as usize], self.v[field(word, 20, 16) as usize]);
        let bits = 8 << field(word, 23, 22);
        let len = if field(word, 30, 30) != 0 { 128 } else { 64 };
        let mask = (1u128 << bits) - 1;
        let sum = (0..len / bits).fold(0, |all, n| {
            let at = n * bits;
            all | (((a >> at & mask) + (b >> at & mask)) & mask) << at
        });
        self.v[field(word, 4, 0) as usize] = sum;
        Ok(())
    }
}
