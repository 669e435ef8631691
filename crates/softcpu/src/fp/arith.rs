//! Addition, subtraction, multiplication, division, square root and rounding to an integral value: one body each
//! for all formats.

use super::format::{Kind, Unpacked, propagate, round, round_bits, round_to, shift_right_sticky};
use super::{Env, Float, IE, PE, Round, ZE};

/// The bits of significand that arithmetic into `F` keeps.
#[inline]
fn precision<F: Float>(env: &Env) -> u32 {
    F::PRECISION.min(env.precision)
}

/// Raise IE and answer the default NaN.
#[inline]
fn invalid<F: Float>(env: &mut Env) -> F {
    env.raise(IE);
    F::INDEFINITE
}

/// A value that came out without rounding.
#[inline]
fn exact<F: Float>(env: &mut Env, value: F) -> F {
    env.rounded_up = false;
    value
}

/// Round an operand that becomes the result (`x + 0`): precision control may still cut it.
#[inline]
fn same<F: Float>(env: &mut Env, u: &Unpacked) -> F {
    let precision = precision::<F>(env);
    round_to(env, u.sign, u.exp, u128::from(u.sig) << 64, precision)
}

/// `a + b`. Here and below the operands are unpacked by [`Float::operand`], because x87 instructions mix formats.
pub(crate) fn add<F: Float>(env: &mut Env, a: Unpacked, b: Unpacked) -> F {
    if a.is_nan() || b.is_nan() {
        return propagate(env, &a, &b);
    }
    if a.is_infinite() && b.is_infinite() && a.sign != b.sign {
        return invalid(env);
    }
    if env.denormal(a.denormal | b.denormal) {
        return F::INDEFINITE;
    }
    match (a.kind, b.kind) {
        (Kind::Infinite, _) => return exact(env, F::infinity(a.sign)),
        (_, Kind::Infinite) => return exact(env, F::infinity(b.sign)),
        (Kind::Zero, Kind::Zero) => {
            let sign = if a.sign == b.sign { a.sign } else { env.rounding() == Round::Down };
            return exact(env, F::zero(sign));
        }
        (_, Kind::Zero) => return same(env, &a),
        (Kind::Zero, _) => return same(env, &b),
        _ => {}
    }
    let (large, small) = if (a.exp, a.sig) >= (b.exp, b.sig) { (a, b) } else { (b, a) };
    // Bit 127 is left free for the carry. A sticky bit is lost to cancellation only when the shift is below 2.
    let top = u128::from(large.sig) << 63;
    let bottom = shift_right_sticky(u128::from(small.sig) << 63, (large.exp - small.exp) as u32);
    let sum = if a.sign == b.sign { top + bottom } else { top - bottom };
    if sum == 0 {
        let sign = env.rounding() == Round::Down;
        return exact(env, F::zero(sign));
    }
    let shift = sum.leading_zeros();
    let precision = precision::<F>(env);
    round_to(env, large.sign, large.exp + 1 - shift as i32, sum << shift, precision)
}

/// `a * b`.
pub(crate) fn mul<F: Float>(env: &mut Env, a: Unpacked, b: Unpacked) -> F {
    let sign = a.sign ^ b.sign;
    if a.is_nan() || b.is_nan() {
        return propagate(env, &a, &b);
    }
    if a.is_infinite() && b.is_zero() || a.is_zero() && b.is_infinite() {
        return invalid(env);
    }
    if env.denormal(a.denormal | b.denormal) {
        return F::INDEFINITE;
    }
    if a.is_infinite() || b.is_infinite() {
        return exact(env, F::infinity(sign));
    }
    if a.is_zero() || b.is_zero() {
        return exact(env, F::zero(sign));
    }
    let product = u128::from(a.sig) * u128::from(b.sig);
    let shift = product.leading_zeros();
    let precision = precision::<F>(env);
    round_to(env, sign, a.exp + b.exp + 1 - shift as i32, product << shift, precision)
}

/// `a - b`.
pub(crate) fn sub<F: Float>(env: &mut Env, a: Unpacked, mut b: Unpacked) -> F {
    // A NaN keeps its sign.
    b.sign ^= !b.is_nan();
    add(env, a, b)
}

/// The quotient of two normalised significands, with a sticky bit: it and what to add to the exponent.
pub(super) fn divide_significands(a: u64, b: u64) -> (u128, i32) {
    let (dividend, exp) = if a >= b { (u128::from(a) << 63, 0) } else { (u128::from(a) << 64, -1) };
    let divisor = u128::from(b);
    let (high, rest) = (dividend / divisor, dividend % divisor);
    if rest == 0 {
        return (high << 64, exp);
    }
    let (low, rest) = ((rest << 64) / divisor, (rest << 64) % divisor);
    (high << 64 | low | u128::from(rest != 0), exp)
}

/// `a / b`.
pub(crate) fn div<F: Float>(env: &mut Env, a: Unpacked, b: Unpacked) -> F {
    let sign = a.sign ^ b.sign;
    if a.is_nan() || b.is_nan() {
        return propagate(env, &a, &b);
    }
    if a.is_infinite() && b.is_infinite() || a.is_zero() && b.is_zero() {
        return invalid(env);
    }
    if b.is_zero() && !a.is_infinite() {
        env.raise(ZE);
        return exact(env, F::infinity(sign));
    }
    if env.denormal(a.denormal | b.denormal) {
        return F::INDEFINITE;
    }
    if a.is_infinite() {
        return exact(env, F::infinity(sign));
    }
    if a.is_zero() || b.is_infinite() {
        return exact(env, F::zero(sign));
    }
    let (quotient, adjust) = divide_significands(a.sig, b.sig);
    let precision = precision::<F>(env);
    round_to(env, sign, a.exp - b.exp + adjust, quotient, precision)
}

/// The square root of `a`.
pub(crate) fn sqrt<F: Float>(env: &mut Env, a: F) -> F {
    let a = a.operand(env);
    if a.is_nan() {
        return propagate(env, &a, &a);
    }
    if a.is_zero() {
        return exact(env, F::zero(a.sign));
    }
    if a.sign {
        return invalid(env);
    }
    if env.denormal(a.denormal) {
        return F::INDEFINITE;
    }
    if a.is_infinite() {
        return exact(env, F::infinity(false));
    }
    // An even exponent, and a radicand whose root has exactly 64 bits.
    let radicand = u128::from(a.sig) << if a.exp & 1 == 0 { 63 } else { 64 };
    let root = radicand.isqrt();
    let rest = radicand - root * root;
    // The root is irrational when there is a rest, so its next bits are never exactly one half.
    let below = match rest {
        0 => 0,
        rest if rest > root => 3u128 << 62,
        _ => 1 << 62,
    };
    let precision = precision::<F>(env);
    round_to(env, false, a.exp >> 1, root << 64 | below, precision)
}

/// `a` rounded to an integral value in its own format (ROUNDSS, ROUNDSD, FRNDINT).
///
/// `inexact` says whether PE is reported (the immediate of ROUNDSx can suppress it). Denormal operands raise DE on
/// the x87 only.
pub(crate) fn round_to_integral<F: Float>(env: &mut Env, a: F, inexact: bool) -> F {
    let u = a.operand(env);
    env.rounded_up = false;
    match u.kind {
        Kind::Zero => return F::zero(u.sign),
        Kind::Infinite => return a,
        Kind::Finite => {}
        _ => return propagate(env, &u, &u),
    }
    if env.x87 && env.denormal(u.denormal) {
        return F::INDEFINITE;
    }
    if u.exp >= F::PRECISION as i32 - 1 {
        return a;
    }
    // The bit of weight one is at `unit`; bit 127 is left free for the carry.
    let sig = shift_right_sticky(u128::from(u.sig) << 63, (-u.exp).max(0) as u32);
    let unit = (126 - u.exp).min(126) as u32;
    let (rounded, _, error) = round_bits(env.rounding(), u.sign, sig, unit);
    if inexact && error.is_ne() {
        env.raised |= PE;
    }
    if rounded == 0 {
        return F::zero(u.sign);
    }
    let shift = rounded.leading_zeros();
    let value = round(env, u.sign, 127 - (shift + unit) as i32, rounded << shift);
    env.rounded_up = error.is_gt();
    value
}
