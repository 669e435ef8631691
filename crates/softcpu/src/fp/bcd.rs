//! The packed decimal of FBLD and FBSTP: 18 digits and a sign byte (SDM vol. 1, 4.7).

use super::convert::{int_to_float, integral_magnitude};
use super::{Env, F80, Float, IE, PE};

/// The packed decimal indefinite.
pub(crate) const INDEFINITE: [u8; 10] = [0, 0, 0, 0, 0, 0, 0, 0xc0, 0xff, 0xff];

/// The number that ten bytes of packed decimal stand for. Digits above nine, which the architecture leaves undefined,
/// count with their binary value.
pub(crate) fn load(bytes: [u8; 10]) -> F80 {
    let digits = bytes[..9].iter().rev();
    let magnitude = digits.fold(0i64, |sum, &b| sum * 100 + i64::from(b >> 4) * 10 + i64::from(b & 15));
    // At most 16.7 * 10^17: below 2^63, so exact and without flags.
    int_to_float::<F80>(&mut Env::x87(0x37f), magnitude).with_sign(bytes[9] & 0x80 != 0)
}

/// A number as packed decimal, rounded to an integer as `env` says. What has more than 18 digits, NaNs and
/// infinities raise IE and give the indefinite.
pub(crate) fn store(env: &mut Env, a: F80) -> [u8; 10] {
    let u = a.unpack();
    let Some((mut magnitude, inexact)) = integral_magnitude(env, &u).filter(|&(m, _)| m < 10u64.pow(18)) else {
        env.rounded_up = false;
        env.raise(IE);
        return INDEFINITE;
    };
    env.raised |= if inexact { PE } else { 0 };
    let mut bytes = [0; 10];
    for byte in &mut bytes[..9] {
        *byte = (magnitude % 10 + magnitude / 10 % 10 * 16) as u8;
        magnitude /= 100;
    }
    bytes[9] = u8::from(u.sign) << 7;
    bytes
}
