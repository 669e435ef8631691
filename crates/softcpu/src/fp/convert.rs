//! Between the formats, and between them and signed integers.

use super::format::{Kind, Unpacked, propagate, round, round_bits, shift_right_sticky};
use super::{Env, Float, IE, OE, PE, UE};

/// A number of one format in another (CVTSS2SD, CVTSD2SS, FLD m32, FST m64 and the like).
///
/// Denormal operands are reported except by x87 stores. An x87 load takes place even when that is unmasked.
#[inline]
pub(crate) fn float_to_float<S: Float, D: Float>(env: &mut Env, a: S) -> D {
    let u = a.operand(env);
    unpacked_to_float::<S, D>(env, &u)
}

/// [`float_to_float`] of an operand that was unpacked from format `S`.
pub(crate) fn unpacked_to_float<S: Float, D: Float>(env: &mut Env, u: &Unpacked) -> D {
    env.rounded_up = false;
    match u.kind {
        Kind::Zero => return D::zero(u.sign),
        Kind::Infinite => return D::infinity(u.sign),
        Kind::Finite => {}
        _ => return propagate(env, u, u),
    }
    if D::PRECISION > S::PRECISION {
        // A wider format holds every number of a narrower one.
        env.denormal(u.denormal);
        return D::from_parts(u.sign, u.exp + D::EMAX, u.sig);
    }
    if !env.x87 && env.denormal(u.denormal) {
        return D::INDEFINITE;
    }
    let value = round(env, u.sign, u.exp, u128::from(u.sig) << 64);
    // A store that is prevented does not report what it would have lost.
    if env.x87 && env.unmasked() & (OE | UE) != 0 {
        env.raised &= !PE;
    }
    value
}

/// A signed integer (sign-extended to 64 bits) as a number.
pub(crate) fn int_to_float<F: Float>(env: &mut Env, value: i64) -> F {
    env.rounded_up = false;
    if value == 0 {
        return F::zero(false);
    }
    let magnitude = value.unsigned_abs();
    let shift = magnitude.leading_zeros();
    round(env, value < 0, 63 - shift as i32, u128::from(magnitude << shift) << 64)
}

/// A number as a signed integer of `bits` (16, 32 or 64), rounded as `env` says. What does not fit, NaNs and
/// infinities raise IE and give the integer indefinite: the most negative integer of that size.
pub(crate) fn float_to_int<F: Float>(env: &mut Env, a: F, bits: u32) -> i64 {
    let limit = 1u64 << (bits - 1);
    let u = a.operand(env);
    let rounded = integral_magnitude(env, &u).filter(|&(m, _)| m < limit || u.sign && m == limit);
    let Some((magnitude, inexact)) = rounded else {
        env.rounded_up = false;
        env.raise(IE);
        return (limit as i64).wrapping_neg();
    };
    env.raised |= if inexact { PE } else { 0 };
    if u.sign { (magnitude as i64).wrapping_neg() } else { magnitude as i64 }
}

/// The magnitude rounded to an integer below 2^64 and whether that was inexact; `None` for what has none. Sets
/// `rounded_up` but raises nothing.
pub(super) fn integral_magnitude(env: &mut Env, u: &Unpacked) -> Option<(u64, bool)> {
    env.rounded_up = false;
    match u.kind {
        Kind::Zero => return Some((0, false)),
        Kind::Finite if u.exp < 64 => {}
        _ => return None,
    }
    // The bit of weight one is at 64, so that the integer is the upper half.
    let sig = u128::from(u.sig) << 64;
    let aligned = shift_right_sticky(sig, (63 - u.exp) as u32);
    let (rounded, carry, error) = round_bits(env.rounding(), u.sign, aligned, 64);
    env.rounded_up = error.is_gt();
    (!carry).then_some(((rounded >> 64) as u64, error.is_ne()))
}
