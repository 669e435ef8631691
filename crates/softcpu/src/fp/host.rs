//! SSE operations with a short cut through the host's floating-point unit.
//!
//! The short cut is taken only when it cannot be told from the integer code: rounding to nearest, PE masked, operands
//! and result ordinary numbers, so that no flag but PE can arise; and PE is known, because it is set already or
//! because exactness can be decided. The host is assumed to run Rust's default environment (nearest, no flushing,
//! flags ignored). Everything else goes to [`super::arith`] and its neighbours.

use core::cmp::Ordering;

use super::format::Float;
use super::{DAZ, Env, F32, F64, MASK_SHIFT, PE, RC_SHIFT, arith, compare as soft, convert};

/// A format that the host computes in.
pub(crate) trait HostFloat: Float {
    /// A one in each of the lanes that 64 bits hold.
    const ONES: u64;
    /// The signs of these lanes.
    const SIGNS: u64;
    /// The smallest normal magnitude in each.
    const NORMAL: u64 = Self::ONES << (Self::PRECISION - 1);

    /// The host's type.
    type Native: Copy
        + PartialOrd
        + core::ops::Add<Output = Self::Native>
        + core::ops::Sub<Output = Self::Native>
        + core::ops::Mul<Output = Self::Native>
        + core::ops::Div<Output = Self::Native>;

    /// As the lowest lane of 64 bits.
    fn bits(self) -> u64;
    /// An operation of the host's on each of the lanes that 64 bits hold.
    fn host_lanes<O: Operation>(a: u64, b: u64) -> u64;
    /// Whether each lane of `r`, which is sure, is exact.
    fn exact_lanes<O: Operation>(a: u64, b: u64, r: u64) -> bool;
    /// Whether `r` is exactly `a * b`, given that it is that rounded.
    fn exact_product(a: Self, b: Self, r: Self) -> bool;
    /// As the host's type.
    fn native(self) -> Self::Native;
    /// From the host's type.
    fn from_native(value: Self::Native) -> Self;
    /// The host's square root.
    fn native_sqrt(value: Self::Native) -> Self::Native;
    /// The host's rounding to an integral value, ties to even.
    fn native_round(value: Self::Native) -> Self::Native;
    /// The host's conversion from an integer, rounded to nearest.
    fn native_from(value: i64) -> Self::Native;
    /// The host's conversion of an integral value of magnitude below 2^63.
    fn native_to_int(value: Self::Native) -> i64;

    /// The biased exponent.
    fn exponent(self) -> i32;
    /// Zero of either sign.
    fn is_zero(self) -> bool;
    /// The significand as an integer, leading one included; for normal numbers.
    fn integer(self) -> u64;
}

/// The two lanes of 64 bits.
#[inline(always)]
fn two(v: u64) -> [F32; 2] {
    [F32(v as u32), F32((v >> 32) as u32)]
}

impl HostFloat for F32 {
    const ONES: u64 = 1 << 32 | 1;
    const SIGNS: u64 = Self::ONES << 31;

    type Native = f32;

    #[inline(always)]
    fn bits(self) -> u64 {
        u64::from(self.0)
    }
    #[inline(always)]
    fn host_lanes<O: Operation>(a: u64, b: u64) -> u64 {
        let ([a, x], [b, y]) = (two(a), two(b));
        O::host(a, b).bits() | O::host(x, y).bits() << 32
    }
    #[inline(always)]
    fn exact_lanes<O: Operation>(a: u64, b: u64, r: u64) -> bool {
        let ([a, x], [b, y], [r, s]) = (two(a), two(b), two(r));
        O::exact(a, b, r) & O::exact(x, y, s)
    }
    #[inline(always)]
    fn exact_product(a: F32, b: F32, r: F32) -> bool {
        // A double holds every product of two singles.
        f64::from(a.native()) * f64::from(b.native()) == f64::from(r.native())
    }

    #[inline(always)]
    fn native(self) -> f32 {
        f32::from_bits(self.0)
    }
    #[inline(always)]
    fn from_native(value: f32) -> Self {
        F32(value.to_bits())
    }
    #[inline(always)]
    fn native_sqrt(value: f32) -> f32 {
        value.sqrt()
    }
    #[inline(always)]
    fn native_round(value: f32) -> f32 {
        value.round_ties_even()
    }
    #[inline(always)]
    fn native_from(value: i64) -> f32 {
        value as f32
    }
    #[inline(always)]
    fn native_to_int(value: f32) -> i64 {
        value as i64
    }
    #[inline(always)]
    fn exponent(self) -> i32 {
        (self.0 >> 23 & 0xff) as i32
    }
    #[inline(always)]
    fn is_zero(self) -> bool {
        self.0 << 1 == 0
    }
    #[inline(always)]
    fn integer(self) -> u64 {
        u64::from(self.0 & 0x7f_ffff | 1 << 23)
    }
}

impl HostFloat for F64 {
    const ONES: u64 = 1;
    const SIGNS: u64 = 1 << 63;

    type Native = f64;

    #[inline(always)]
    fn bits(self) -> u64 {
        self.0
    }
    #[inline(always)]
    fn host_lanes<O: Operation>(a: u64, b: u64) -> u64 {
        O::host(F64(a), F64(b)).0
    }
    #[inline(always)]
    fn exact_lanes<O: Operation>(a: u64, b: u64, r: u64) -> bool {
        O::exact(F64(a), F64(b), F64(r))
    }
    #[inline(always)]
    fn exact_product(a: F64, b: F64, r: F64) -> bool {
        // The product of two p-bit integers has 2p - 1 bits, or one more when the exponent of the result says so.
        let excess = F64::PRECISION as i32 - 1 + r.exponent() + F64::EMAX - a.exponent() - b.exponent();
        r.is_zero() || (trailing(a) + trailing(b)) as i32 >= excess
    }

    #[inline(always)]
    fn native(self) -> f64 {
        f64::from_bits(self.0)
    }
    #[inline(always)]
    fn from_native(value: f64) -> Self {
        F64(value.to_bits())
    }
    #[inline(always)]
    fn native_sqrt(value: f64) -> f64 {
        value.sqrt()
    }
    #[inline(always)]
    fn native_round(value: f64) -> f64 {
        value.round_ties_even()
    }
    #[inline(always)]
    fn native_from(value: i64) -> f64 {
        value as f64
    }
    #[inline(always)]
    fn native_to_int(value: f64) -> i64 {
        value as i64
    }
    #[inline(always)]
    fn exponent(self) -> i32 {
        (self.0 >> 52 & 0x7ff) as i32
    }
    #[inline(always)]
    fn is_zero(self) -> bool {
        self.0 << 1 == 0
    }
    #[inline(always)]
    fn integer(self) -> u64 {
        self.0 & ((1 << 52) - 1) | 1 << 52
    }
}

/// Rounding is to nearest and PE is masked.
#[inline(always)]
fn usable(mxcsr: u32) -> bool {
    mxcsr & (3 << RC_SHIFT | PE << MASK_SHIFT) == PE << MASK_SHIFT
}

/// PE is set in MXCSR already: exactness makes no difference.
#[inline(always)]
fn sticky(mxcsr: u32) -> bool {
    mxcsr & PE != 0
}

/// Finite, and far enough above the denormals that no rounding of anything tiny can have made it.
#[inline(always)]
fn ordinary<F: HostFloat>(value: F) -> bool {
    ((value.exponent() - 2) as u32) < (F::SPECIAL - 2) as u32
}

/// Zero or normal or infinite or NaN: no denormal.
#[inline(always)]
fn no_denormal<F: HostFloat>(value: F) -> bool {
    value.exponent() != 0 || value.is_zero()
}

// Lanes side by side in 64 bits: the answer is in the sign bit of each lane, other bits mean nothing.

/// The magnitudes of lanes.
#[inline(always)]
fn magnitudes<F: HostFloat>(v: u64) -> u64 {
    v & !F::SIGNS
}

/// Where a magnitude is at least `least`: the sum has its top bit set, and none leaves its lane.
#[inline(always)]
fn at_least<F: HostFloat>(magnitudes: u64, least: u64) -> u64 {
    magnitudes + (F::SIGNS - least)
}

/// Where a magnitude is not zero.
#[inline(always)]
fn not_zero<F: HostFloat>(magnitudes: u64) -> u64 {
    at_least::<F>(magnitudes, F::ONES)
}

/// Where a magnitude is that of a denormal.
#[inline(always)]
fn denormal<F: HostFloat>(magnitudes: u64) -> u64 {
    not_zero::<F>(magnitudes) & !at_least::<F>(magnitudes, F::NORMAL)
}

/// Where a magnitude is that of an infinity or a NaN.
#[inline(always)]
fn special<F: HostFloat>(magnitudes: u64) -> u64 {
    at_least::<F>(magnitudes, F::NORMAL * F::SPECIAL as u64)
}

/// Where a magnitude is so small that the rounding of something tiny may have made it.
#[inline(always)]
fn small<F: HostFloat>(magnitudes: u64) -> u64 {
    !at_least::<F>(magnitudes, 2 * F::NORMAL)
}

/// Trailing zeros of the significand.
#[inline(always)]
fn trailing<F: HostFloat>(value: F) -> u32 {
    value.integer().trailing_zeros()
}

/// Whether `a = b * c` exactly, given that it holds to within rounding.
#[inline(always)]
fn is_product<F: HostFloat>(a: F, b: F, c: F) -> bool {
    let odd = |value: F| value.integer() >> trailing(value);
    u128::from(odd(b)) * u128::from(odd(c)) == u128::from(odd(a))
}

/// An operation with a short cut. Those with one operand look at the second only.
pub(crate) trait Operation {
    /// What the host makes of it.
    fn host<F: HostFloat>(a: F, b: F) -> F;
    /// Where `r`, made by the host, is not surely what the guest gets with no flag but perhaps PE: in the sign bits of lanes, and
    /// nowhere in a lane of zeros.
    fn unsure<F: HostFloat>(a: u64, b: u64, r: u64) -> u64;
    /// Whether `r`, which is sure, is exact.
    fn exact<F: HostFloat>(a: F, b: F, r: F) -> bool;
    /// The operation in integer code.
    fn soft<F: HostFloat>(env: &mut Env, a: F, b: F) -> F;
}

/// `a + b`.
pub(crate) struct Add;
/// `a - b`.
pub(crate) struct Sub;
/// `a * b`.
pub(crate) struct Mul;
/// `a / b`.
pub(crate) struct Div;
/// The square root of `b`.
pub(crate) struct Sqrt;
/// MINSS and its family: the second operand unless the first is less. A NaN of any kind raises IE and gives the second
/// operand as it is.
pub(crate) struct Min;
/// MAXSS and its family: the second operand unless the first is greater; NaNs as in [`Min`].
pub(crate) struct Max;

impl Operation for Add {
    #[inline(always)]
    fn host<F: HostFloat>(a: F, b: F) -> F {
        F::from_native(a.native() + b.native())
    }
    #[inline(always)]
    fn unsure<F: HostFloat>(a: u64, b: u64, r: u64) -> u64 {
        let (a, b, r) = (magnitudes::<F>(a), magnitudes::<F>(b), magnitudes::<F>(r));
        // A sum that is zero is exact, and nearest agrees on its sign.
        denormal::<F>(a) | denormal::<F>(b) | special::<F>(r) | small::<F>(r) & not_zero::<F>(r)
    }
    #[inline(always)]
    fn exact<F: HostFloat>(a: F, b: F, r: F) -> bool {
        // The error of a sum in nearest is (a - (r - t)) + (b - t) with t = r - a (Knuth, TAOCP 4.2.2).
        let (a, b, r) = (a.native(), b.native(), r.native());
        let t = r - a;
        F::from_native((a - (r - t)) + (b - t)).is_zero()
    }
    fn soft<F: HostFloat>(env: &mut Env, a: F, b: F) -> F {
        let (a, b) = (a.operand(env), b.operand(env));
        arith::add(env, a, b)
    }
}

impl Operation for Sub {
    #[inline(always)]
    fn host<F: HostFloat>(a: F, b: F) -> F {
        F::from_native(a.native() - b.native())
    }
    #[inline(always)]
    fn unsure<F: HostFloat>(a: u64, b: u64, r: u64) -> u64 {
        Add::unsure::<F>(a, b, r)
    }
    #[inline(always)]
    fn exact<F: HostFloat>(a: F, b: F, r: F) -> bool {
        let (a, b, r) = (a.native(), b.native(), r.native());
        let t = a - r;
        F::from_native((a - (r + t)) - (b - t)).is_zero()
    }
    fn soft<F: HostFloat>(env: &mut Env, a: F, b: F) -> F {
        let (a, b) = (a.operand(env), b.operand(env));
        arith::sub(env, a, b)
    }
}

impl Operation for Mul {
    #[inline(always)]
    fn host<F: HostFloat>(a: F, b: F) -> F {
        F::from_native(a.native() * b.native())
    }
    #[inline(always)]
    fn unsure<F: HostFloat>(a: u64, b: u64, r: u64) -> u64 {
        let (a, b, r) = (magnitudes::<F>(a), magnitudes::<F>(b), magnitudes::<F>(r));
        let vanished = small::<F>(r) & not_zero::<F>(a) & not_zero::<F>(b);
        denormal::<F>(a) | denormal::<F>(b) | special::<F>(r) | vanished
    }
    #[inline(always)]
    fn exact<F: HostFloat>(a: F, b: F, r: F) -> bool {
        F::exact_product(a, b, r)
    }
    fn soft<F: HostFloat>(env: &mut Env, a: F, b: F) -> F {
        let (a, b) = (a.operand(env), b.operand(env));
        arith::mul(env, a, b)
    }
}

impl Operation for Div {
    #[inline(always)]
    fn host<F: HostFloat>(a: F, b: F) -> F {
        F::from_native(a.native() / b.native())
    }
    #[inline(always)]
    fn unsure<F: HostFloat>(a: u64, b: u64, r: u64) -> u64 {
        let (a, b, r) = (magnitudes::<F>(a), magnitudes::<F>(b), magnitudes::<F>(r));
        denormal::<F>(a) | denormal::<F>(b) | special::<F>(r) | small::<F>(r) & not_zero::<F>(a)
    }
    #[inline(always)]
    fn exact<F: HostFloat>(a: F, b: F, r: F) -> bool {
        r.is_zero() || is_product(a, r, b)
    }
    fn soft<F: HostFloat>(env: &mut Env, a: F, b: F) -> F {
        let (a, b) = (a.operand(env), b.operand(env));
        arith::div(env, a, b)
    }
}

impl Operation for Sqrt {
    #[inline(always)]
    fn host<F: HostFloat>(_: F, b: F) -> F {
        F::from_native(F::native_sqrt(b.native()))
    }
    #[inline(always)]
    fn unsure<F: HostFloat>(_: u64, b: u64, r: u64) -> u64 {
        Add::unsure::<F>(0, b, r)
    }
    #[inline(always)]
    fn exact<F: HostFloat>(_: F, b: F, r: F) -> bool {
        r.is_zero() || is_product(b, r, r)
    }
    fn soft<F: HostFloat>(env: &mut Env, _: F, b: F) -> F {
        arith::sqrt(env, b)
    }
}

impl Operation for Min {
    #[inline(always)]
    fn host<F: HostFloat>(a: F, b: F) -> F {
        if a.native() < b.native() { a } else { b }
    }
    #[inline(always)]
    fn unsure<F: HostFloat>(a: u64, b: u64, _: u64) -> u64 {
        let (a, b) = (magnitudes::<F>(a), magnitudes::<F>(b));
        let infinity = F::NORMAL * F::SPECIAL as u64;
        let nan = at_least::<F>(a, infinity + F::ONES) | at_least::<F>(b, infinity + F::ONES);
        denormal::<F>(a) | denormal::<F>(b) | nan
    }
    #[inline(always)]
    fn exact<F: HostFloat>(_: F, _: F, _: F) -> bool {
        true
    }
    fn soft<F: HostFloat>(env: &mut Env, a: F, b: F) -> F {
        select(env, a, b, Ordering::Less)
    }
}

impl Operation for Max {
    #[inline(always)]
    fn host<F: HostFloat>(a: F, b: F) -> F {
        if a.native() > b.native() { a } else { b }
    }
    #[inline(always)]
    fn unsure<F: HostFloat>(a: u64, b: u64, r: u64) -> u64 {
        Min::unsure::<F>(a, b, r)
    }
    #[inline(always)]
    fn exact<F: HostFloat>(_: F, _: F, _: F) -> bool {
        true
    }
    fn soft<F: HostFloat>(env: &mut Env, a: F, b: F) -> F {
        select(env, a, b, Ordering::Greater)
    }
}

/// `a` if it compares as `first` with `b`, else `b`. DAZ makes a zero of a denormal that is handed through.
fn select<F: HostFloat>(env: &mut Env, a: F, b: F, first: Ordering) -> F {
    let chosen = if compare(env, a, b, true) == Some(first) { a } else { b };
    if env.control & DAZ != 0 && !no_denormal(chosen) { F::zero(chosen.to_parts().0) } else { chosen }
}

/// One lane of an operation.
#[inline(always)]
pub(crate) fn apply<O: Operation, F: HostFloat>(env: &mut Env, a: F, b: F) -> F {
    match quick::<O, F>(env.control, a, b) {
        Some(result) => result,
        None => O::soft(env, a, b),
    }
}

/// One lane of an operation if MXCSR allows the short cut and the result needs no flag that is not set.
#[inline(always)]
pub(crate) fn quick<O: Operation, F: HostFloat>(mxcsr: u32, a: F, b: F) -> Option<F> {
    let r = O::host(a, b);
    let sure = O::unsure::<F>(a.bits(), b.bits(), r.bits()) & F::SIGNS == 0;
    (usable(mxcsr) && sure && (sticky(mxcsr) || O::exact(a, b, r))).then_some(r)
}

/// All lanes of a register together, under the same condition for each.
#[inline(always)]
pub(crate) fn quick_all<O: Operation, F: HostFloat>(mxcsr: u32, a: u128, b: u128) -> Option<u128> {
    let halves = |v: u128| [v as u64, (v >> 64) as u64];
    let ([a, x], [b, y]) = (halves(a), halves(b));
    let (r, s) = (F::host_lanes::<O>(a, b), F::host_lanes::<O>(x, y));
    let sure = (O::unsure::<F>(a, b, r) | O::unsure::<F>(x, y, s)) & F::SIGNS == 0;
    let exact = || F::exact_lanes::<O>(a, b, r) & F::exact_lanes::<O>(x, y, s);
    (usable(mxcsr) && sure && (sticky(mxcsr) || exact())).then_some(u128::from(s) << 64 | u128::from(r))
}

/// The order of `a` and `b`; flags as in [`soft::compare`].
#[inline(always)]
pub(crate) fn compare<F: HostFloat>(env: &mut Env, a: F, b: F, signaling: bool) -> Option<Ordering> {
    if no_denormal(a) && no_denormal(b) {
        let order = a.native().partial_cmp(&b.native());
        if order.is_some() {
            return order;
        }
    }
    let (a, b) = (a.operand(env), b.operand(env));
    soft::compare(env, &a, &b, signaling)
}

/// CVTSI2SD and the like.
#[inline(always)]
pub(crate) fn int_to_float<F: HostFloat>(env: &mut Env, value: i64) -> F {
    // Integers of at most the precision are exact in every rounding mode.
    if value.unsigned_abs() >> F::PRECISION == 0 || usable(env.control) && sticky(env.control) {
        return F::from_native(F::native_from(value));
    }
    convert::int_to_float(env, value)
}

/// CVTTSD2SI (`truncate`) and CVTSD2SI, to 32 or 64 bits.
#[inline(always)]
pub(crate) fn float_to_int<F: HostFloat>(env: &mut Env, a: F, bits: u32, truncate: bool) -> i64 {
    let masked = env.control & PE << MASK_SHIFT != 0;
    if masked && (truncate || usable(env.control)) && no_denormal(a) {
        let x = a.native();
        let magnitude = F::from_native(x).exponent() - F::EMAX;
        if magnitude < bits as i32 - 2 {
            let whole = if truncate { F::native_to_int(x) } else { F::native_to_int(F::native_round(x)) };
            if sticky(env.control) || F::native_from(whole) == x {
                return whole;
            }
        }
    }
    if truncate {
        let mut toward_zero = env.with_rounding(super::Round::Zero);
        let result = convert::float_to_int(&mut toward_zero, a, bits);
        env.raised = toward_zero.raised;
        return result;
    }
    convert::float_to_int(env, a, bits)
}

/// CVTSS2SD.
#[inline(always)]
pub(crate) fn widen(env: &mut Env, a: F32) -> F64 {
    if a.exponent() != F32::SPECIAL && no_denormal(a) {
        return F64::from_native(f64::from(a.native()));
    }
    convert::float_to_float(env, a)
}

/// CVTSD2SS.
#[inline(always)]
pub(crate) fn narrow(env: &mut Env, a: F64) -> F32 {
    if usable(env.control) {
        let x = a.native();
        let narrow = F32::from_native(x as f32);
        if ordinary(narrow) && (sticky(env.control) || f64::from(narrow.native()) == x) {
            return narrow;
        }
    }
    convert::float_to_float(env, a)
}
