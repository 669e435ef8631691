//! Ordering, and the SSE minimum and maximum.

use core::cmp::Ordering;

use super::format::{Kind, Unpacked};
use super::{Env, IE};

/// Compare; `None` is unordered. `signaling` compares raise IE for every NaN (COMISD, FCOM, CMPLTPD), the others only
/// for signalling ones (UCOMISD, FUCOM, CMPEQPD). Unsupported extended encodings always raise it.
pub(crate) fn compare(env: &mut Env, a: &Unpacked, b: &Unpacked, signaling: bool) -> Option<Ordering> {
    if a.is_nan() || b.is_nan() {
        if signaling || a.is_invalid() || b.is_invalid() {
            env.raise(IE);
        }
        return None;
    }
    env.denormal(a.denormal | b.denormal);
    Some(order(a, b))
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
    // The exponent of an infinity depends on the format it came from.
    let key = |u: &Unpacked| {
        if u.is_infinite() { (i32::MAX, 0) } else { (u.exp, u.sig) }
    };
    let magnitude = key(a).cmp(&key(b));
    if a.sign { magnitude.reverse() } else { magnitude }
}
