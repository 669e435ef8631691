//! The x87 operations that are neither plain arithmetic nor transcendental: partial remainder, scale, extract and
//! examine.

use super::format::{Kind, propagate, round};
use super::{Env, F80, Float, IE, ZE};

/// What FPREM and FPREM1 answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Remainder {
    /// The (partial) remainder.
    pub(crate) value: F80,
    /// What is known of the quotient.
    pub(crate) quotient: Quotient,
}

/// What FPREM and FPREM1 tell of the quotient.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Quotient {
    /// There is none: the result is a NaN.
    None,
    /// The exponents were too far apart for one step (C2): none yet.
    Partial,
    /// Its three low bits (C0, C3, C1).
    Low(u8),
}

/// The remainder of `a / b`. The quotient is truncated (FPREM) or rounded to nearest even (FPREM1). When the
/// exponents are 64 or more apart the dividend is reduced by 32 to 63 bits only.
pub(crate) fn remainder(env: &mut Env, a: F80, b: F80, nearest: bool) -> Remainder {
    let (ua, ub) = (a.unpack(), b.unpack());
    let nan = |value| Remainder { value, quotient: Quotient::None };
    let whole = |value| Remainder { value, quotient: Quotient::Low(0) };
    env.rounded_up = false;
    if ua.is_nan() || ub.is_nan() {
        return nan(propagate(env, &ua, &ub));
    }
    if ua.is_infinite() || ub.is_zero() {
        env.raise(IE);
        return nan(F80::INDEFINITE);
    }
    if env.denormal(ua.denormal | ub.denormal) || ua.is_zero() {
        return whole(F80::zero(ua.sign));
    }
    let distance = ua.exp - ub.exp;
    if ub.is_infinite() || distance < -1 || distance < 0 && !nearest {
        let value = round(env, ua.sign, ua.exp, u128::from(ua.sig) << 64);
        return whole(value);
    }

    // Reduce to a remainder in units of 2^(ub.exp - 63 + scale); what is left then has `scale` more bits to go.
    let partial = distance >= 64;
    let take = if partial { distance & 31 | 32 } else { distance };
    let scale = distance - take;
    let divisor = u128::from(ub.sig);
    let (mut quotient, mut rest) = if take < 0 {
        // Only the leading bit of the quotient may still come from rounding.
        (0, u128::from(ua.sig))
    } else {
        let (first, rest) = (u128::from(ua.sig) / divisor, u128::from(ua.sig) % divisor);
        let wide = rest << take;
        ((first << take) + wide / divisor, wide % divisor)
    };
    let mut sign = ua.sign;
    let mut unit = ub.exp - 63 + scale;
    if nearest && !partial {
        if take < 0 {
            // The dividend is in half units of the divisor.
            unit -= 1;
        }
        let whole = if take < 0 { divisor << 1 } else { divisor };
        let twice = rest << 1;
        if twice > whole || twice == whole && quotient & 1 == 1 {
            rest = whole - rest;
            quotient += 1;
            sign = !sign;
        }
    }
    let value = if rest == 0 {
        F80::zero(ua.sign)
    } else {
        let shift = rest.leading_zeros();
        round(env, sign, unit + 127 - shift as i32, rest << shift)
    };
    let quotient = if partial { Quotient::Partial } else { Quotient::Low((quotient & 7) as u8) };
    Remainder { value, quotient }
}

/// FSCALE: `a * 2^trunc(b)`.
pub(crate) fn scale(env: &mut Env, a: F80, b: F80) -> F80 {
    let (ua, ub) = (a.unpack(), b.unpack());
    env.rounded_up = false;
    if ua.is_nan() || ub.is_nan() {
        return propagate(env, &ua, &ub);
    }
    if ub.is_infinite() && (ua.is_infinite() && ub.sign || ua.is_zero() && !ub.sign) {
        env.raise(IE);
        return F80::INDEFINITE;
    }
    if env.denormal(ua.denormal | ub.denormal) {
        return F80::INDEFINITE;
    }
    match (ua.kind, ub.kind) {
        (Kind::Zero | Kind::Infinite, _) => {
            return if ua.is_zero() { F80::zero(ua.sign) } else { F80::infinity(ua.sign) };
        }
        (_, Kind::Infinite) => {
            return if ub.sign { F80::zero(ua.sign) } else { F80::infinity(ua.sign) };
        }
        _ => {}
    }
    // Further than any exponent reaches is far enough.
    let by = match ub.exp {
        exp if exp < 0 || ub.is_zero() => 0,
        exp if exp > 16 => 1 << 17,
        exp => (ub.sig >> (63 - exp)) as i32,
    };
    round(env, ua.sign, ua.exp + if ub.sign { -by } else { by }, u128::from(ua.sig) << 64)
}

/// FXTRACT: the exponent as a number, and the significand scaled to `1 <= |x| < 2`.
pub(crate) fn extract(env: &mut Env, a: F80) -> (F80, F80) {
    let u = a.unpack();
    env.rounded_up = false;
    match u.kind {
        Kind::Zero => {
            env.raise(ZE);
            (F80::infinity(true), F80::zero(u.sign))
        }
        Kind::Infinite => (F80::infinity(false), F80::infinity(u.sign)),
        Kind::Finite => {
            env.denormal(u.denormal);
            let exponent = super::convert::int_to_float(env, i64::from(u.exp));
            (exponent, F80::from_parts(u.sign, F80::EMAX, u.sig))
        }
        _ => {
            let nan = propagate(env, &u, &u);
            (nan, nan)
        }
    }
}

/// The classes of FXAM as C3, C2 and C0 (bits 2, 1 and 0) of a register that is not empty.
pub(crate) fn examine(a: F80) -> u8 {
    let (_, biased, _) = a.to_parts();
    match a.unpack().kind {
        Kind::Unsupported => 0b000,
        Kind::Quiet | Kind::Signaling => 0b001,
        Kind::Infinite => 0b011,
        Kind::Zero => 0b100,
        // Pseudo-denormals included.
        Kind::Finite if biased == 0 => 0b110,
        Kind::Finite => 0b010,
    }
}
