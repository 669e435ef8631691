//! Ordering, and the SSE minimum and maximum.

use core::cmp::Ordering;

use super::format::{Kind, Unpacked};
use super::{Env, Float, IE};

/// Compare; `None` is unordered. `signaling` compares raise IE for every NaN (COMISD, FCOM, CMPLTPD), the others only
/// for signalling ones (UCOMISD, FUCOM, CMPEQPD). Unsupported extended encodings always raise it.
pub(crate) fn compare<F: Float>(env: &mut Env, a: F, b: F, signaling: bool) -> Option<Ordering> {
    let (a, b) = (a.operand(env), b.operand(env));
    if a.is_nan() || b.is_nan() {
        if signaling || a.is_invalid() || b.is_invalid() {
            env.raise(IE);
        }
        return None;
    }
    env.denormal(a.denormal | b.denormal);
    Some(order(&a, &b))
}

/// The order of two numbers that are not NaNs; zeros are equal.
pub(crate) fn order(a: &Unpacked, b: &Unpacked) -> Ordering {
    let signed = |u: &Unpacked| match u.kind {
        Kind::Zero => 0,
        _ if u.sign => -1,
        _ => 1,
    };
    let (sa, sb) = (signed(a), signed(b));
    if sa != sb || sa == 0 {
        return sa.cmp(&sb);
    }
    let magnitude = (a.is_infinite(), a.exp, a.sig).cmp(&(b.is_infinite(), b.exp, b.sig));
    if a.sign {
        magnitude.reverse()
    } else {
        magnitude
    }
}

/// MINSS and its family: the second operand unless the first is less. Any NaN raises IE and gives the second operand
/// as it is.
pub(crate) fn min<F: Float>(env: &mut Env, a: F, b: F) -> F {
    select(env, a, b, Ordering::Less)
}

/// MAXSS and its family: the second operand unless the first is greater; NaNs as in [`min`].
pub(crate) fn max<F: Float>(env: &mut Env, a: F, b: F) -> F {
    select(env, a, b, Ordering::Greater)
}

fn select<F: Float>(env: &mut Env, a: F, b: F, first: Ordering) -> F {
    let chosen = if compare(env, a, b, true) == Some(first) {
        a
    } else {
        b
    };
    // DAZ makes a zero of a denormal that is handed through.
    let u = chosen.operand(env);
    if u.is_zero() { F::zero(u.sign) } else { chosen }
}
