//! Numbers with 128 bits of significand: what the transcendental functions are computed in.
//!
//! Every operation is off by at most a unit or two in bit 0, and keeps bit 0 set when it cut something off, so that a
//! result that is not exact never looks exact to the rounding that follows.

use super::format::shift_right_sticky;

/// `sig / 2^127 * 2^exp` with bit 127 of `sig` set, or zero when `sig` is zero.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wide {
    pub(crate) sign: bool,
    pub(crate) exp: i32,
    pub(crate) sig: u128,
}

impl Wide {
    pub(crate) const ONE: Wide = Wide::constant(0, 1 << 127);

    /// A positive constant; `sig` has bit 127 set.
    pub(crate) const fn constant(exp: i32, sig: u128) -> Self {
        Wide { sign: false, exp, sig }
    }

    /// `sig / 2^127 * 2^exp`, not normalised yet.
    pub(crate) fn new(sign: bool, exp: i32, sig: u128) -> Self {
        if sig == 0 {
            return Wide { sign, exp: 0, sig };
        }
        let shift = sig.leading_zeros();
        Wide { sign, exp: exp - shift as i32, sig: sig << shift }
    }

    /// An integer.
    pub(crate) fn int(value: i32) -> Self {
        Wide::new(value < 0, 127, u128::from(value.unsigned_abs()))
    }

    pub(crate) fn is_zero(self) -> bool {
        self.sig == 0
    }

    pub(crate) fn neg(self) -> Self {
        Wide { sign: !self.sign, ..self }
    }

    pub(crate) fn add(self, other: Self) -> Self {
        if self.is_zero() {
            return other;
        }
        if other.is_zero() {
            return self;
        }
        let (large, small) = if (self.exp, self.sig) >= (other.exp, other.sig) { (self, other) } else { (other, self) };
        if large.sign != small.sign {
            // Close numbers subtract exactly; others lose at most one leading bit.
            let distance = (large.exp - small.exp) as u32;
            if distance <= 1 {
                let (a, b) = (large.sig, shift_right_sticky(small.sig, distance));
                return Wide::new(large.sign, large.exp, a - b);
            }
            return Wide::new(large.sign, large.exp, large.sig - shift_right_sticky(small.sig, distance));
        }
        let a = shift_right_sticky(large.sig, 1);
        let b = shift_right_sticky(small.sig, (large.exp - small.exp) as u32 + 1);
        Wide::new(large.sign, large.exp + 1, a + b)
    }

    pub(crate) fn sub(self, other: Self) -> Self {
        self.add(other.neg())
    }

    pub(crate) fn mul(self, other: Self) -> Self {
        let half = |x: u128| (x >> 64, x & u128::from(u64::MAX));
        let ((a1, a0), (b1, b0)) = (half(self.sig), half(other.sig));
        let low = a0 * b0;
        let (mid, carry) = (a1 * b0).overflowing_add(a0 * b1);
        let (low, carry_low) = low.overflowing_add(mid << 64);
        let high = a1 * b1 + (mid >> 64) + (u128::from(carry) << 64) + u128::from(carry_low);
        let sign = self.sign ^ other.sign;
        let exp = self.exp + other.exp + 1;
        if high >> 127 == 1 {
            Wide { sign, exp, sig: high | u128::from(low != 0) }
        } else {
            Wide::new(sign, exp - 1, high << 1 | low >> 127 | u128::from(low << 1 != 0))
        }
    }

    /// `self / other`; `other` is not zero.
    pub(crate) fn div(self, other: Self) -> Self {
        if self.is_zero() {
            return self;
        }
        let (a, b) = (Wide { sign: false, ..self }, Wide { sign: false, ..other });
        // 62 good bits of the reciprocal, doubled by one Newton step; the quotient is then corrected by what it leaves.
        let seed = Wide::new(false, 62 - b.exp, u128::MAX / (b.sig >> 64));
        let reciprocal = seed.mul(Wide::int(2).sub(b.mul(seed)));
        let quotient = a.mul(reciprocal);
        let rest = a.sub(b.mul(quotient));
        let quotient = if rest.is_zero() { quotient } else { quotient.add(rest.mul(reciprocal)) };
        Wide { sign: self.sign ^ other.sign, exp: quotient.exp, sig: quotient.sig | 1 }
    }

    /// `1 / n`, for tables.
    pub(crate) const fn reciprocal(n: u32) -> Self {
        let n = n as u128;
        let (quotient, rest) = ((1 << 127) / n, (1 << 127) % n);
        let shift = quotient.leading_zeros();
        Wide { sign: false, exp: -(shift as i32), sig: (quotient << shift) | ((rest << shift) / n) }
    }
}
