//! The transcendental instructions of the x87.
//!
//! Results are computed with 128 bits and rounded once, so the error is below 0.501 units in the last place of the
//! extended format with respect to the function of the operand as given: better than the 1 ulp that SDM vol. 1, 8.3.10
//! promises, which is why a processor's result may differ from these in the last bit. Like processors, FSIN, FCOS,
//! FSINCOS and FPTAN reduce their operand with a pi of 66 bits (SDM vol. 1, 8.3.8), so that near multiples of pi they
//! give what software expects of an x87 rather than the sine. PE is raised for every result that is not a special
//! case; precision control is ignored and rounding control applies.

use core::cmp::Ordering;

use super::arith::divide_significands;
use super::compare::order;
use super::format::{Kind, Unpacked, propagate, round};
use super::wide::Wide;
use super::{Env, F80, Float, IE, PE, UE, ZE};

/// ln 2.
const LN_2: Wide = Wide::constant(-1, 0xb17217f7_d1cf79ab_c9e3b398_03f2f6af);
/// 2 / ln 2.
const TWO_LOG2_E: Wide = Wide::constant(1, 0xb8aa3b29_5c17f0bb_be87fed0_691d3e88);
/// pi / 2.
const HALF_PI: Wide = Wide::constant(0, 0xc90fdaa2_2168c234_c4c6628b_80dc1cd1);
/// atan(i / 16) for i from 1 to 16.
const ATAN: [Wide; 16] = [
    Wide::constant(-5, 0xffaaddb9_67ef4e36_cb2792dc_0e2e0d51),
    Wide::constant(-4, 0xfeadd4d5_617b6e32_c897989f_3e888ef7),
    Wide::constant(-3, 0xbdcbda5e_72d81134_7b0b4f88_1c9c7487),
    Wide::constant(-3, 0xfadbafc9_6406eb15_6dc79ef5_f7a217e5),
    Wide::constant(-2, 0x9b13b9b8_3f5e5e69_c5abb498_d27af328),
    Wide::constant(-2, 0xb7b0ca0f_26f78473_8aa32122_dcfe4483),
    Wide::constant(-2, 0xd327761e_611fe5b6_427c95e9_001e7136),
    Wide::constant(-2, 0xed63382b_0dda7b45_6fe445ec_bc3a8d03),
    Wide::constant(-1, 0x832bf4a6_d9867e2a_4b6a09cb_61a515c0),
    Wide::constant(-1, 0x8f005d5e_f7f59f9b_5c835e16_65c43747),
    Wide::constant(-1, 0x9a2f80e6_71bdda20_4226f8e2_204ff3bc),
    Wide::constant(-1, 0xa4bc7d19_34f70924_19a87f2a_457dac9e),
    Wide::constant(-1, 0xaeac4c38_b4d8c080_14725e2f_3e52070a),
    Wide::constant(-1, 0xb8053e2b_c2319e73_cb2da552_10a4443d),
    Wide::constant(-1, 0xc0ce85b8_ac526640_89dd62c4_6e92fa24),
    Wide::constant(-1, 0xc90fdaa2_2168c234_c4c6628b_80dc1cd1),
];

/// 4 * (pi / 2) in units of 2^-65, with the 66 bits of pi that processors use.
const QUARTER_TURN: u128 = 0x3_243f_6a88_85a3_08d3;

/// A finite number as it is.
fn wide(u: &Unpacked) -> Wide {
    Wide { sign: u.sign, exp: u.exp, sig: u128::from(u.sig) << 64 }
}

/// Round a value that is not exact.
fn finish(env: &mut Env, value: Wide) -> F80 {
    if value.is_zero() {
        return F80::zero(value.sign);
    }
    round(env, value.sign, value.exp, value.sig | 1)
}

/// Raise IE and answer the default NaN.
fn invalid(env: &mut Env) -> F80 {
    env.raise(IE);
    F80::INDEFINITE
}

/// A table of reciprocals: the innermost coefficient first, as [`nested`] and [`odd_series`] want them.
macro_rules! reciprocals {
    ($(#[$doc:meta])* $name:ident: $terms:literal, |$n:ident| $divisor:expr) => {
        $(#[$doc])*
        const $name: [Wide; $terms] = {
            let mut table = [Wide::ONE; $terms];
            let mut i = 0;
            while i < $terms {
                let $n = ($terms - i) as u32;
                table[i] = Wide::reciprocal($divisor);
                i += 1;
            }
            table
        };
    };
}

reciprocals! {
    /// For `(exp(z) - 1) / z`: 0.694^n / n! is below 2^-110 from n = 26 on.
    EXP: 26, |n| n + 1
}
reciprocals! {
    /// For `sin(x) / x`: 0.786^(2n) / (2n)! is below 2^-110 from n = 13 on.
    SIN: 14, |n| 2 * n * (2 * n + 1)
}
reciprocals! {
    /// For `cos(x)`.
    COS: 14, |n| (2 * n - 1) * 2 * n
}
reciprocals! {
    /// 1/45, 1/43, ..., 1/3, 1.
    ODD: 23, |n| 2 * n - 1
}

/// `1 + z/a * (1 + z/b * (1 + ...))` for the reciprocals of a table.
fn nested(z: Wide, table: &[Wide]) -> Wide {
    table.iter().fold(Wide::ONE, |sum, &r| z.mul(sum).mul(r).add(Wide::ONE))
}

/// `1 + z/3 + z^2/5 + ...` to `terms` terms.
fn odd_series(z: Wide, terms: usize) -> Wide {
    ODD[ODD.len() - terms..].iter().fold(Wide::constant(0, 0), |sum, &r| sum.mul(z).add(r))
}

/// F2XM1: `2^a - 1` for `-1 <= a <= 1`.
///
/// The architecture leaves other operands undefined; those come back as they are, like on processors.
pub(crate) fn f2xm1(env: &mut Env, a: F80) -> F80 {
    let u = a.unpack();
    env.rounded_up = false;
    match u.kind {
        Kind::Zero => return a,
        Kind::Infinite => return if u.sign { F80::ONE.with_sign(true) } else { a },
        Kind::Finite => {}
        _ => return propagate(env, &u, &u),
    }
    if env.denormal(u.denormal) {
        return a;
    }
    if u.exp >= 0 {
        env.raised |= PE;
        // One itself is exact: 2 - 1, and 1/2 - 1.
        return match (u.exp == 0 && u.sig << 1 == 0, u.sign) {
            (true, true) => F80::from_parts(true, F80::EMAX - 1, 1 << 63),
            _ => a,
        };
    }
    let z = wide(&u).mul(LN_2);
    let series = nested(z, &EXP);
    finish(env, z.mul(series))
}

/// `log2((1 + s) / (1 - s))` for `|s| <= 0.18`, relatively exact.
fn log2_from_ratio(s: Wide) -> Wide {
    // 0.0295^n is below 2^-110 from n = 22 on.
    let series = odd_series(s.mul(s), ODD.len());
    TWO_LOG2_E.mul(s).mul(series)
}

/// The binary logarithm of a positive number.
fn log2(x: Wide) -> Wide {
    // Halve the significand above the square root of two, so that it is within a factor of it around one.
    let above = x.sig > 0xb504_f333_f9de_6484_597d_89b3_754a_be9f;
    let (exp, m) = if above { (x.exp + 1, Wide::constant(-1, x.sig)) } else { (x.exp, Wide::constant(0, x.sig)) };
    let s = m.sub(Wide::ONE).div(m.add(Wide::ONE));
    Wide::int(exp).add(log2_from_ratio(s))
}

/// `y * log2(x)` for finite `y` and positive `x` other than one.
fn times_log2(env: &mut Env, x: Wide, y: &Unpacked) -> F80 {
    if x.sig << 1 != 0 {
        return finish(env, log2(x).mul(wide(y)));
    }
    // A power of two: the logarithm is an integer and the product may be exact.
    let product = Wide::int(x.exp).mul(wide(y));
    let value: F80 = round(env, product.sign, product.exp, product.sig);
    // Processors report even exact results as inexact, and denormal ones as underflow.
    env.raised |= if value.to_parts().1 == 0 { PE | UE } else { PE };
    value
}

/// FYL2X: `y * log2(x)`, with `x` in ST0 and `y` in ST1.
pub(crate) fn fyl2x(env: &mut Env, x: F80, y: F80) -> F80 {
    let (ux, uy) = (x.unpack(), y.unpack());
    env.rounded_up = false;
    if ux.is_nan() || uy.is_nan() {
        return propagate(env, &ux, &uy);
    }
    if ux.sign && !ux.is_zero() {
        return invalid(env);
    }
    let one = ux.kind == Kind::Finite && ux.exp == 0 && ux.sig << 1 == 0;
    if one && uy.is_infinite() || (ux.is_zero() || ux.is_infinite()) && uy.is_zero() {
        return invalid(env);
    }
    if ux.is_zero() && !uy.is_infinite() {
        env.raise(ZE);
        return F80::infinity(!uy.sign);
    }
    if env.denormal(ux.denormal | uy.denormal) {
        return F80::INDEFINITE;
    }
    // The sign of the logarithm.
    let below_one = ux.is_zero() || ux.kind == Kind::Finite && ux.exp < 0;
    if ux.is_infinite() || uy.is_infinite() {
        return F80::infinity(uy.sign ^ below_one);
    }
    if uy.is_zero() || one {
        return F80::zero(uy.sign ^ below_one);
    }
    times_log2(env, wide(&ux), &uy)
}

/// FYL2XP1: `y * log2(x + 1)`, with `x` in ST0 and `y` in ST1.
///
/// Defined by the architecture for `|x| < 1 - sqrt(1/2)`; computed for all `x > -1`, and below that `x` comes back
/// (with PE), both like on processors.
pub(crate) fn fyl2xp1(env: &mut Env, x: F80, y: F80) -> F80 {
    let (ux, uy) = (x.unpack(), y.unpack());
    env.rounded_up = false;
    if ux.is_nan() || uy.is_nan() {
        return propagate(env, &ux, &uy);
    }
    if ux.is_infinite() && ux.sign || ux.is_zero() && uy.is_infinite() || ux.is_infinite() && uy.is_zero() {
        return invalid(env);
    }
    if env.denormal(ux.denormal | uy.denormal) {
        return F80::INDEFINITE;
    }
    let sign = ux.sign ^ uy.sign;
    if ux.is_infinite() || uy.is_infinite() {
        return F80::infinity(sign);
    }
    if ux.is_zero() || uy.is_zero() {
        return F80::zero(sign);
    }
    if ux.sign && ux.exp >= 0 {
        env.raised |= PE;
        return x;
    }
    let x = wide(&ux);
    if ux.exp < -2 {
        let log = log2_from_ratio(x.div(x.add(Wide::int(2))));
        return finish(env, log.mul(wide(&uy)));
    }
    times_log2(env, x.add(Wide::ONE), &uy)
}

/// `atan(q)` for `0 < q <= 1`.
fn atan(q: Wide) -> Wide {
    // The nearest sixteenth.
    let nearest = if q.exp < -5 { 0 } else { ((q.sig >> (122 - q.exp)) + 1) >> 1 } as usize;
    let (base, t) = match nearest {
        0 => (Wide::constant(0, 0), q),
        i => {
            let c = Wide { exp: -4 + Wide::int(i as i32).exp, ..Wide::int(i as i32) };
            (ATAN[i - 1], q.sub(c).div(Wide::ONE.add(q.mul(c))))
        }
    };
    if t.is_zero() {
        return base;
    }
    // 2^-10 a term.
    base.add(t.mul(odd_series(t.mul(t).neg(), 12)))
}

/// FPATAN: the angle of the point (x, y), with `x` in ST0 and `y` in ST1.
pub(crate) fn fpatan(env: &mut Env, x: F80, y: F80) -> F80 {
    let (ux, uy) = (x.unpack(), y.unpack());
    env.rounded_up = false;
    if ux.is_nan() || uy.is_nan() {
        return propagate(env, &ux, &uy);
    }
    if env.denormal(ux.denormal | uy.denormal) {
        return F80::INDEFINITE;
    }
    let steep = order(&Unpacked { sign: false, ..uy }, &Unpacked { sign: false, ..ux });
    let flat = uy.is_zero() || ux.is_infinite() && !uy.is_infinite();
    // The angle between the point and the nearer axis, always 0 to pi/4.
    let near = if flat || ux.is_zero() || uy.is_infinite() && !ux.is_infinite() {
        Wide::constant(0, 0)
    } else if steep == Ordering::Equal {
        ATAN[15]
    } else {
        let (small, large) = if steep == Ordering::Less { (&uy, &ux) } else { (&ux, &uy) };
        let (quotient, adjust) = divide_significands(small.sig, large.sig);
        let q = Wide { sign: false, exp: small.exp - large.exp + adjust, sig: quotient };
        if small.exp - large.exp < -70 && !ux.sign && steep == Ordering::Less {
            // So flat that the angle is the quotient, to be rounded as slightly less than it.
            q.sub(Wide { exp: q.exp - 127, ..q })
        } else {
            atan(q)
        }
    };
    let pi = Wide { exp: 1, ..HALF_PI };
    let angle = match (steep == Ordering::Greater && !flat, ux.sign) {
        (false, false) => near,
        (false, true) => pi.sub(near),
        (true, false) => HALF_PI.sub(near),
        (true, true) => HALF_PI.add(near),
    };
    finish(env, Wide { sign: uy.sign, ..angle })
}

/// An angle reduced to at most pi/4 in magnitude, and how many quarter turns were taken off (modulo 4).
fn reduce(u: &Unpacked) -> (Wide, u32) {
    if u.exp < -1 {
        return (wide(u), 0);
    }
    // The operand in units of 2^-65, modulo a full turn of 68 bits; its exponent is at most 62 here.
    let turn = 4 * QUARTER_TURN;
    let (mut rest, mut shift) = (u128::from(u.sig), (u.exp + 2) as u32);
    while shift > 0 {
        let step = shift.min(59);
        rest = (rest << step) % turn;
        shift -= step;
    }
    rest %= turn;
    let quarters = (2 * rest + QUARTER_TURN) / (2 * QUARTER_TURN);
    let nearest = quarters * QUARTER_TURN;
    let (sign, magnitude) = if rest >= nearest { (false, rest - nearest) } else { (true, nearest - rest) };
    let quarters = quarters as u32;
    let angle = Wide::new(sign ^ u.sign, 62, magnitude);
    (angle, if u.sign { quarters.wrapping_neg() & 3 } else { quarters & 3 })
}

/// Sine and cosine of a reduced angle.
fn sin_cos_kernel(r: Wide) -> (Wide, Wide) {
    let z = r.mul(r).neg();
    let sin = r.mul(nested(z, &SIN));
    let cos = nested(z, &COS);
    (sin, cos)
}

/// The sine and cosine of a finite number that is not zero and below 2^63 in magnitude.
fn sin_cos_wide(u: &Unpacked) -> (Wide, Wide) {
    let (angle, quarters) = reduce(u);
    let (sin, cos) = sin_cos_kernel(angle);
    match quarters {
        0 => (sin, cos),
        1 => (cos, sin.neg()),
        2 => (sin.neg(), cos.neg()),
        _ => (cos.neg(), sin),
    }
}

/// What the trigonometric instructions do before they compute: the answer for everything that needs no computing.
fn trigonometric(env: &mut Env, a: F80) -> Result<Unpacked, Trig> {
    let u = a.unpack();
    env.rounded_up = false;
    match u.kind {
        Kind::Zero => return Err(Trig::Zero),
        Kind::Infinite => return Err(Trig::Nan(invalid(env))),
        Kind::Finite => {}
        _ => return Err(Trig::Nan(propagate(env, &u, &u))),
    }
    if u.exp >= 63 {
        return Err(Trig::OutOfRange);
    }
    if env.denormal(u.denormal) {
        return Err(Trig::Nan(F80::INDEFINITE));
    }
    Ok(u)
}

enum Trig {
    Zero,
    Nan(F80),
    OutOfRange,
}

/// FSIN; `None` when the operand is out of range (C2 is set and it stays as it is).
pub(crate) fn fsin(env: &mut Env, a: F80) -> Option<F80> {
    match trigonometric(env, a) {
        Ok(u) => Some(finish(env, sin_cos_wide(&u).0)),
        Err(Trig::Zero) => Some(a),
        Err(Trig::Nan(nan)) => Some(nan),
        Err(Trig::OutOfRange) => None,
    }
}

/// FCOS; `None` as in [`fsin`].
pub(crate) fn fcos(env: &mut Env, a: F80) -> Option<F80> {
    match trigonometric(env, a) {
        Ok(u) => Some(finish(env, sin_cos_wide(&u).1)),
        Err(Trig::Zero) => Some(F80::ONE),
        Err(Trig::Nan(nan)) => Some(nan),
        Err(Trig::OutOfRange) => None,
    }
}

/// FSINCOS: sine and cosine; `None` as in [`fsin`].
pub(crate) fn fsincos(env: &mut Env, a: F80) -> Option<(F80, F80)> {
    match trigonometric(env, a) {
        Ok(u) => {
            let (sin, cos) = sin_cos_wide(&u);
            let sin = finish(env, sin);
            Some((sin, finish(env, cos)))
        }
        Err(Trig::Zero) => Some((a, F80::ONE)),
        Err(Trig::Nan(nan)) => Some((nan, nan)),
        Err(Trig::OutOfRange) => None,
    }
}

/// FPTAN: the tangent and the number that is pushed after it (one, or the NaN again); `None` as in [`fsin`].
pub(crate) fn fptan(env: &mut Env, a: F80) -> Option<(F80, F80)> {
    match trigonometric(env, a) {
        Ok(u) => {
            let (sin, cos) = sin_cos_wide(&u);
            // With 66 bits of pi no number is an odd multiple of pi/2, but an operand may be one of that pi.
            let tan = if cos.is_zero() { Wide { exp: 1 << 14, ..Wide::ONE } } else { sin.div(cos) };
            Some((finish(env, tan), F80::ONE))
        }
        Err(Trig::Zero) => Some((a, F80::ONE)),
        Err(Trig::Nan(nan)) => Some((nan, nan)),
        Err(Trig::OutOfRange) => None,
    }
}
