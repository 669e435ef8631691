//! The three formats, the unpacked form all arithmetic works on, and rounding back from it.

use super::{DAZ, Env, FTZ, OE, PE, Round, UE};

/// What an x87 result exponent is moved by when overflow or underflow is unmasked (SDM vol. 1, 8.5.4).
const BIAS_ADJUST: i32 = 24576;

/// A storage format: how many bits of significand, which exponents, and where they are.
pub(crate) trait Float: Copy + Eq + core::fmt::Debug {
    /// Bits of significand including the leading one.
    const PRECISION: u32;
    /// Largest exponent of a finite number; the smallest normal one is `1 - EMAX`, and the bias is `EMAX`.
    const EMAX: i32;
    /// The default NaN ("real indefinite").
    const INDEFINITE: Self;

    /// Sign, biased exponent and significand with its leading bit at bit 63.
    fn to_parts(self) -> (bool, i32, u64);
    /// The inverse of [`Float::to_parts`]; bits of `sig` below the precision must be zero.
    fn from_parts(sign: bool, biased: i32, sig: u64) -> Self;

    /// The smallest exponent of a normal number.
    const EMIN: i32 = 1 - Self::EMAX;
    /// The biased exponent of infinities and NaNs.
    const SPECIAL: i32 = 2 * Self::EMAX + 1;

    /// A zero.
    #[inline]
    fn zero(sign: bool) -> Self {
        Self::from_parts(sign, 0, 0)
    }

    /// An infinity.
    #[inline]
    fn infinity(sign: bool) -> Self {
        Self::from_parts(sign, Self::SPECIAL, 1 << 63)
    }

    /// The number apart, exactly. Denormal operands are normalised (`denormal` remembers them).
    fn unpack(self) -> Unpacked {
        let (sign, biased, sig) = self.to_parts();
        let make = |kind| Unpacked { sign, kind, exp: biased - Self::EMAX, sig, denormal: false };
        if biased == 0 {
            if sig == 0 {
                return make(Kind::Zero);
            }
            // Pseudo-denormals of the extended format have the leading bit already: the shift is then 0.
            let shift = sig.leading_zeros();
            Unpacked { sign, kind: Kind::Finite, exp: Self::EMIN - shift as i32, sig: sig << shift, denormal: true }
        } else if sig >> 63 == 0 {
            make(Kind::Unsupported)
        } else if biased != Self::SPECIAL {
            make(Kind::Finite)
        } else if sig << 1 == 0 {
            make(Kind::Infinite)
        } else if sig >> 62 & 1 == 1 {
            make(Kind::Quiet)
        } else {
            make(Kind::Signaling)
        }
    }

    /// [`Float::unpack`] as an operation reads its operand: MXCSR.DAZ makes zeros of denormals.
    #[inline]
    fn operand(self, env: &Env) -> Unpacked {
        let mut u = self.unpack();
        if u.denormal && env.control & DAZ != 0 {
            (u.kind, u.denormal) = (Kind::Zero, false);
        }
        u
    }

    /// A NaN of another format in this one, made quiet.
    #[inline]
    fn quiet(nan: &Unpacked) -> Self {
        let keep = !0u64 << (64 - Self::PRECISION);
        Self::from_parts(nan.sign, Self::SPECIAL, (nan.sig | 3 << 62) & keep)
    }
}

/// What an unpacked number is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Zero,
    /// `sig` has bit 63 set, `exp` is unbiased.
    Finite,
    Infinite,
    Quiet,
    Signaling,
    /// An extended encoding that the 387 and later do not accept (unnormal, pseudo-infinity, pseudo-NaN).
    Unsupported,
}

/// A number apart: for `Kind::Finite` its magnitude is `sig / 2^63 * 2^exp`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Unpacked {
    pub(crate) sign: bool,
    pub(crate) kind: Kind,
    pub(crate) exp: i32,
    pub(crate) sig: u64,
    /// The operand was stored as a denormal (or pseudo-denormal).
    pub(crate) denormal: bool,
}

impl Unpacked {
    #[inline]
    pub(crate) fn is_zero(&self) -> bool {
        self.kind == Kind::Zero
    }

    #[inline]
    pub(crate) fn is_infinite(&self) -> bool {
        self.kind == Kind::Infinite
    }

    /// A NaN, or an encoding that is treated like one.
    #[inline]
    pub(crate) fn is_nan(&self) -> bool {
        matches!(self.kind, Kind::Quiet | Kind::Signaling | Kind::Unsupported)
    }

    /// An operand that is an invalid operation by itself.
    #[inline]
    pub(crate) fn is_invalid(&self) -> bool {
        matches!(self.kind, Kind::Signaling | Kind::Unsupported)
    }
}

/// Single precision, as its bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct F32(pub(crate) u32);

/// Double precision, as its bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct F64(pub(crate) u64);

/// Double extended precision as a register holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct F80 {
    /// Bits 79:64: sign and biased exponent.
    pub(crate) sign_exp: u16,
    /// Bits 63:0: significand with explicit leading bit.
    pub(crate) sig: u64,
}

impl F80 {
    /// Plus zero.
    pub(crate) const ZERO: F80 = F80 { sign_exp: 0, sig: 0 };
    /// One.
    pub(crate) const ONE: F80 = F80 { sign_exp: 0x3fff, sig: 1 << 63 };

    /// The ten bytes as they are in memory.
    pub(crate) fn to_bytes(self) -> [u8; 10] {
        let mut bytes = [0; 10];
        bytes[..8].copy_from_slice(&self.sig.to_le_bytes());
        bytes[8..].copy_from_slice(&self.sign_exp.to_le_bytes());
        bytes
    }

    /// A number from ten bytes of memory.
    pub(crate) fn from_bytes(bytes: [u8; 10]) -> Self {
        let [a, b, c, d, e, f, g, h, i, j] = bytes;
        F80 { sign_exp: u16::from_le_bytes([i, j]), sig: u64::from_le_bytes([a, b, c, d, e, f, g, h]) }
    }

    /// The same number with the sign given.
    #[inline]
    pub(crate) fn with_sign(self, sign: bool) -> Self {
        F80 { sign_exp: self.sign_exp & 0x7fff | u16::from(sign) << 15, ..self }
    }
}

impl Float for F32 {
    const PRECISION: u32 = 24;
    const EMAX: i32 = 127;
    const INDEFINITE: Self = F32(0xffc0_0000);

    #[inline]
    fn to_parts(self) -> (bool, i32, u64) {
        let biased = self.0 >> 23 & 0xff;
        (self.0 >> 31 != 0, biased as i32, u64::from(biased != 0) << 63 | u64::from(self.0 & 0x7f_ffff) << 40)
    }

    #[inline]
    fn from_parts(sign: bool, biased: i32, sig: u64) -> Self {
        F32(u32::from(sign) << 31 | (biased as u32) << 23 | (sig << 1 >> 41) as u32)
    }
}

impl Float for F64 {
    const PRECISION: u32 = 53;
    const EMAX: i32 = 1023;
    const INDEFINITE: Self = F64(0xfff8_0000_0000_0000);

    #[inline]
    fn to_parts(self) -> (bool, i32, u64) {
        let biased = self.0 >> 52 & 0x7ff;
        (self.0 >> 63 != 0, biased as i32, u64::from(biased != 0) << 63 | self.0 << 12 >> 1)
    }

    #[inline]
    fn from_parts(sign: bool, biased: i32, sig: u64) -> Self {
        F64(u64::from(sign) << 63 | (biased as u64) << 52 | sig << 1 >> 12)
    }
}

impl Float for F80 {
    const PRECISION: u32 = 64;
    const EMAX: i32 = 16383;
    const INDEFINITE: Self = F80 { sign_exp: 0xffff, sig: 3 << 62 };

    #[inline]
    fn to_parts(self) -> (bool, i32, u64) {
        (self.sign_exp >> 15 != 0, i32::from(self.sign_exp & 0x7fff), self.sig)
    }

    #[inline]
    fn from_parts(sign: bool, biased: i32, sig: u64) -> Self {
        F80 { sign_exp: u16::from(sign) << 15 | biased as u16, sig }
    }
}

/// `sig` shifted right with the bits that fall out kept as a sticky bit 0.
#[inline]
pub(crate) fn shift_right_sticky(sig: u128, by: u32) -> u128 {
    match by {
        0 => sig,
        1..=127 => sig >> by | u128::from(sig << (128 - by) != 0),
        _ => u128::from(sig != 0),
    }
}

/// `sig` rounded to a multiple of `2^drop` (`1 <= drop <= 127`): the result, whether it is the carry out of bit 127
/// that is missing from it, and how it compares with the exact value.
#[inline]
pub(crate) fn round_bits(mode: Round, sign: bool, sig: u128, drop: u32) -> (u128, bool, core::cmp::Ordering) {
    use core::cmp::Ordering::{Equal, Greater, Less};
    let low = sig & ((1 << drop) - 1);
    let cut = sig - low;
    if low == 0 {
        return (cut, false, Equal);
    }
    let half = 1u128 << (drop - 1);
    let up = match mode {
        Round::Nearest => low > half || low == half && sig >> drop & 1 == 1,
        Round::Down => sign,
        Round::Up => !sign,
        Round::Zero => false,
    };
    if up {
        let (rounded, carry) = cut.overflowing_add(1 << drop);
        (rounded, carry, Greater)
    } else {
        (cut, false, Less)
    }
}

/// Round an exact (or sticky) finite value to `F`: `sig` has bit 127 set, the value is `sig / 2^127 * 2^exp`.
/// Raises OE, UE and PE, and gives the response to them that `env` asks for.
#[inline]
pub(crate) fn round<F: Float>(env: &mut Env, sign: bool, exp: i32, sig: u128) -> F {
    round_to(env, sign, exp, sig, F::PRECISION)
}

/// [`round`] to fewer bits of significand than `F` has (x87 precision control).
pub(crate) fn round_to<F: Float>(env: &mut Env, sign: bool, exp: i32, sig: u128, precision: u32) -> F {
    debug_assert!(sig >> 127 == 1);
    let mode = env.rounding();
    let drop = 128 - precision;
    let (rounded, carry, error) = round_bits(mode, sign, sig, drop);
    let (unbounded_exp, unbounded_sig) = if carry { (exp + 1, 1 << 127) } else { (exp, rounded) };
    let finish = |exp: i32, sig: u128| F::from_parts(sign, exp + F::EMAX, (sig >> 64) as u64);

    env.rounded_up = error.is_gt();
    if unbounded_exp > F::EMAX {
        if env.raise(OE) {
            env.raised |= if error.is_eq() { 0 } else { PE };
            if unbounded_exp - BIAS_ADJUST <= F::EMAX || !env.x87 {
                return finish((unbounded_exp - BIAS_ADJUST).max(F::EMIN), unbounded_sig);
            }
            // Beyond even the adjusted range, which only FSCALE reaches: processors answer as if rounded up.
            (env.raised, env.rounded_up) = (env.raised | PE, true);
            return F::infinity(sign);
        }
        env.raised |= PE;
        env.rounded_up = match mode {
            Round::Nearest => true,
            Round::Down => sign,
            Round::Up => !sign,
            Round::Zero => false,
        };
        return if env.rounded_up {
            F::infinity(sign)
        } else {
            F::from_parts(sign, F::SPECIAL - 1, !0 << (64 - precision))
        };
    }
    if unbounded_exp >= F::EMIN {
        env.raised |= if error.is_eq() { 0 } else { PE };
        return finish(unbounded_exp, unbounded_sig);
    }

    // Tiny after rounding as if the exponent had no bound.
    if !env.masks(UE) {
        env.raised |= UE | if error.is_eq() { 0 } else { PE };
        if unbounded_exp + BIAS_ADJUST >= F::EMIN || !env.x87 {
            return finish((unbounded_exp + BIAS_ADJUST).min(F::EMAX), unbounded_sig);
        }
        (env.raised, env.rounded_up) = (env.raised | PE, false);
        return F::zero(sign);
    }
    if env.control & FTZ != 0 {
        env.raised |= UE | PE;
        env.rounded_up = false;
        return F::zero(sign);
    }
    let denormal = shift_right_sticky(sig, F::EMIN.saturating_sub(exp) as u32);
    let (rounded, _, error) = round_bits(mode, sign, denormal, drop);
    env.rounded_up = error.is_gt();
    env.raised |= if error.is_eq() { 0 } else { UE | PE };
    // Rounding may have given the smallest normal number.
    F::from_parts(sign, (rounded >> 127) as i32, (rounded >> 64) as u64)
}

/// The NaN that an operation on two operands gives, at least one of which is a NaN; raises IE as needed.
pub(crate) fn propagate<F: Float>(env: &mut Env, a: &Unpacked, b: &Unpacked) -> F {
    if a.kind == Kind::Unsupported || b.kind == Kind::Unsupported {
        env.raise(super::IE);
        return F::INDEFINITE;
    }
    if a.is_invalid() || b.is_invalid() {
        env.raise(super::IE);
    }
    let first = match (a.is_nan(), b.is_nan()) {
        (true, false) => true,
        (false, _) => false,
        (true, true) if !env.x87 => true,
        // x87: a quiet NaN before a signalling one, then the larger significand, then the positive one.
        (true, true) => match (a.kind, b.kind) {
            (Kind::Quiet, Kind::Signaling) => true,
            (Kind::Signaling, Kind::Quiet) => false,
            _ => a.sig > b.sig || a.sig == b.sig && !a.sign,
        },
    };
    F::quiet(if first { a } else { b })
}
