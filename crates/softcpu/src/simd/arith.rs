//! Lane arithmetic, comparison, logic and shifts.

use super::{Lanes, Vector, map, split, zip};

/// Defines functions of two registers that work lane by lane: name, lane type, what one lane becomes.
macro_rules! lanewise {
    ($($name:ident: $lane:ty = $f:expr, $doc:literal;)+) => {$(
        #[doc = $doc]
        #[inline]
        pub(crate) fn $name<V: Vector>(a: V, b: V) -> V {
            zip::<$lane, V>(a, b, $f)
        }
    )+};
}

lanewise! {
    paddb: u8 = u8::wrapping_add, "PADDB.";
    paddw: u16 = u16::wrapping_add, "PADDW.";
    paddd: u32 = u32::wrapping_add, "PADDD.";
    paddq: u64 = u64::wrapping_add, "PADDQ.";
    psubb: u8 = u8::wrapping_sub, "PSUBB.";
    psubw: u16 = u16::wrapping_sub, "PSUBW.";
    psubd: u32 = u32::wrapping_sub, "PSUBD.";
    psubq: u64 = u64::wrapping_sub, "PSUBQ.";
    paddsb: i8 = i8::saturating_add, "PADDSB.";
    paddsw: i16 = i16::saturating_add, "PADDSW.";
    psubsb: i8 = i8::saturating_sub, "PSUBSB.";
    psubsw: i16 = i16::saturating_sub, "PSUBSW.";
    paddusb: u8 = u8::saturating_add, "PADDUSB.";
    paddusw: u16 = u16::saturating_add, "PADDUSW.";
    psubusb: u8 = u8::saturating_sub, "PSUBUSB.";
    psubusw: u16 = u16::saturating_sub, "PSUBUSW.";
    pavgb: u8 = |a, b| ((u16::from(a) + u16::from(b) + 1) >> 1) as u8, "PAVGB: the mean, rounded up.";
    pavgw: u16 = |a, b| ((u32::from(a) + u32::from(b) + 1) >> 1) as u16, "PAVGW: the mean, rounded up.";
    pminub: u8 = Ord::min, "PMINUB.";
    pminuw: u16 = Ord::min, "PMINUW.";
    pminud: u32 = Ord::min, "PMINUD.";
    pminsb: i8 = Ord::min, "PMINSB.";
    pminsw: i16 = Ord::min, "PMINSW.";
    pminsd: i32 = Ord::min, "PMINSD.";
    pmaxub: u8 = Ord::max, "PMAXUB.";
    pmaxuw: u16 = Ord::max, "PMAXUW.";
    pmaxud: u32 = Ord::max, "PMAXUD.";
    pmaxsb: i8 = Ord::max, "PMAXSB.";
    pmaxsw: i16 = Ord::max, "PMAXSW.";
    pmaxsd: i32 = Ord::max, "PMAXSD.";
    pcmpeqb: i8 = |a, b| -i8::from(a == b), "PCMPEQB.";
    pcmpeqw: i16 = |a, b| -i16::from(a == b), "PCMPEQW.";
    pcmpeqd: i32 = |a, b| -i32::from(a == b), "PCMPEQD.";
    pcmpeqq: i64 = |a, b| -i64::from(a == b), "PCMPEQQ.";
    pcmpgtb: i8 = |a, b| -i8::from(a > b), "PCMPGTB: signed.";
    pcmpgtw: i16 = |a, b| -i16::from(a > b), "PCMPGTW: signed.";
    pcmpgtd: i32 = |a, b| -i32::from(a > b), "PCMPGTD: signed.";
    pcmpgtq: i64 = |a, b| -i64::from(a > b), "PCMPGTQ: signed.";
    pmullw: i16 = i16::wrapping_mul, "PMULLW.";
    pmulld: i32 = i32::wrapping_mul, "PMULLD.";
    pmulhw: i16 = |a, b| ((i32::from(a) * i32::from(b)) >> 16) as i16, "PMULHW.";
    pmulhuw: u16 = |a, b| ((u32::from(a) * u32::from(b)) >> 16) as u16, "PMULHUW.";
    pmulhrsw: i16 = |a, b| ((((i32::from(a) * i32::from(b)) >> 14) + 1) >> 1) as i16,
        "PMULHRSW: the high part, rounded.";
    pmuludq: u64 = |a, b| u64::from(a as u32) * u64::from(b as u32), "PMULUDQ: of the even doublewords.";
    pmuldq: i64 = |a, b| i64::from(a as i32) * i64::from(b as i32), "PMULDQ: of the even doublewords.";
    psignb: i8 = |a, b| if b < 0 { a.wrapping_neg() } else if b == 0 { 0 } else { a }, "PSIGNB.";
    psignw: i16 = |a, b| if b < 0 { a.wrapping_neg() } else if b == 0 { 0 } else { a }, "PSIGNW.";
    psignd: i32 = |a, b| if b < 0 { a.wrapping_neg() } else if b == 0 { 0 } else { a }, "PSIGND.";
}

/// PABSB; -128 stays as it is.
#[inline]
pub(crate) fn pabsb<V: Vector>(a: V) -> V {
    map::<i8, V>(a, i8::wrapping_abs)
}

/// PABSW; -32768 stays as it is.
#[inline]
pub(crate) fn pabsw<V: Vector>(a: V) -> V {
    map::<i16, V>(a, i16::wrapping_abs)
}

/// PABSD; the most negative value stays as it is.
#[inline]
pub(crate) fn pabsd<V: Vector>(a: V) -> V {
    map::<i32, V>(a, i32::wrapping_abs)
}

/// PAND, ANDPS, ANDPD.
#[inline]
pub(crate) fn pand<V: Vector>(a: V, b: V) -> V {
    a & b
}

/// PANDN, ANDNPS, ANDNPD: it is the first operand that is complemented.
#[inline]
pub(crate) fn pandn<V: Vector>(a: V, b: V) -> V {
    !a & b
}

/// POR, ORPS, ORPD.
#[inline]
pub(crate) fn por<V: Vector>(a: V, b: V) -> V {
    a | b
}

/// PXOR, XORPS, XORPD.
#[inline]
pub(crate) fn pxor<V: Vector>(a: V, b: V) -> V {
    a ^ b
}

/// PMADDWD: products of signed words, added in pairs. Only (-32768)² twice wraps, as the manual says.
#[inline]
pub(crate) fn pmaddwd<V: Vector>(a: V, b: V) -> V {
    let (a, b) = (split::<i16, V>(a), split::<i16, V>(b));
    let product = |i: usize| i32::from(a.as_ref()[i]) * i32::from(b.as_ref()[i]);
    <V as Lanes<i32>>::build(|i| product(2 * i).wrapping_add(product(2 * i + 1)))
}

/// PMADDUBSW: unsigned bytes of `a` times signed bytes of `b`, added in pairs with saturation.
#[inline]
pub(crate) fn pmaddubsw<V: Vector>(a: V, b: V) -> V {
    let (a, b) = (split::<u8, V>(a), split::<i8, V>(b));
    // A product fits in 16 bits (at least -32640); only the sum saturates.
    let product = |i: usize| i16::from(a.as_ref()[i]) * i16::from(b.as_ref()[i]);
    <V as Lanes<i16>>::build(|i| product(2 * i).saturating_add(product(2 * i + 1)))
}

/// PSADBW: the sum of absolute differences of each eight bytes.
#[inline]
pub(crate) fn psadbw<V: Vector>(a: V, b: V) -> V {
    let (a, b) = (split::<u8, V>(a), split::<u8, V>(b));
    <V as Lanes<u64>>::build(|q| (8 * q..8 * q + 8).map(|i| u64::from(a.as_ref()[i].abs_diff(b.as_ref()[i]))).sum())
}

/// MPSADBW: eight sums of four absolute differences; a block of `b` slides over `a`. `imm[1:0]` chooses the block of `b`,
/// `imm[2]` where in `a` the walk begins.
#[inline]
pub(crate) fn mpsadbw(a: u128, b: u128, imm: u8) -> u128 {
    let (a, b) = (a.to_le_bytes(), b.to_le_bytes());
    let (start, block) = (usize::from(imm >> 2 & 1) * 4, usize::from(imm & 3) * 4);
    <u128 as Lanes<u16>>::build(|i| (0..4).map(|k| u16::from(a[start + i + k].abs_diff(b[block + k]))).sum())
}

/// PHMINPOSUW: the least unsigned word in bits 15:0 and its (lowest) index in bits 18:16.
#[inline]
pub(crate) fn phminposuw(a: u128) -> u128 {
    let words = split::<u16, u128>(a);
    let mut least = 0;
    for i in 1..words.len() {
        if words[i] < words[least] {
            least = i;
        }
    }
    u128::from(words[least]) | (least as u128) << 16
}

/// Combines neighbours: the lower half of the result from `a`, the upper from `b`.
#[inline]
fn horizontal<L: Copy, V: Lanes<L>>(a: V, b: V, f: impl Fn(L, L) -> L) -> V {
    let (a, b) = (a.split(), b.split());
    let (a, b) = (a.as_ref(), b.as_ref());
    V::build(|i| {
        let pair = (2 * i) % V::COUNT;
        let source = if 2 * i < V::COUNT { a } else { b };
        f(source[pair], source[pair + 1])
    })
}

macro_rules! horizontals {
    ($($name:ident: $lane:ty = $f:expr, $doc:literal;)+) => {$(
        #[doc = $doc]
        #[inline]
        pub(crate) fn $name<V: Vector>(a: V, b: V) -> V {
            horizontal::<$lane, V>(a, b, $f)
        }
    )+};
}

horizontals! {
    phaddw: i16 = i16::wrapping_add, "PHADDW.";
    phaddd: i32 = i32::wrapping_add, "PHADDD.";
    phaddsw: i16 = i16::saturating_add, "PHADDSW.";
    phsubw: i16 = i16::wrapping_sub, "PHSUBW: the lower lane less the upper.";
    phsubd: i32 = i32::wrapping_sub, "PHSUBD: the lower lane less the upper.";
    phsubsw: i16 = i16::saturating_sub, "PHSUBSW: the lower lane less the upper.";
}

/// Defines shifts of every lane by one count (all 64 bits of it count): what a count beyond the lane gives comes last.
macro_rules! shifts {
    ($($name:ident: $lane:ty = $shift:ident, |$a:ident| $beyond:expr, $doc:literal;)+) => {$(
        #[doc = $doc]
        #[inline]
        pub(crate) fn $name<V: Vector>(a: V, count: u64) -> V {
            map::<$lane, V>(a, |$a| {
                u32::try_from(count).ok().and_then(|count| $a.$shift(count)).unwrap_or($beyond)
            })
        }
    )+};
}

shifts! {
    psllw: u16 = checked_shl, |a| 0, "PSLLW.";
    pslld: u32 = checked_shl, |a| 0, "PSLLD.";
    psllq: u64 = checked_shl, |a| 0, "PSLLQ.";
    psrlw: u16 = checked_shr, |a| 0, "PSRLW.";
    psrld: u32 = checked_shr, |a| 0, "PSRLD.";
    psrlq: u64 = checked_shr, |a| 0, "PSRLQ.";
    psraw: i16 = checked_shr, |a| a >> 15, "PSRAW: beyond 15 the sign fills the lane.";
    psrad: i32 = checked_shr, |a| a >> 31, "PSRAD: beyond 31 the sign fills the lane.";
}

/// PSLLDQ: shift left by bytes.
#[inline]
pub(crate) fn pslldq(a: u128, count: u8) -> u128 {
    a.checked_shl(u32::from(count) * 8).unwrap_or(0)
}

/// PSRLDQ: shift right by bytes.
#[inline]
pub(crate) fn psrldq(a: u128, count: u8) -> u128 {
    a.checked_shr(u32::from(count) * 8).unwrap_or(0)
}

/// PTEST: answers (ZF, CF): ZF if no bit is in both, CF if `b` has no bit outside `a`.
#[inline]
pub(crate) fn ptest(a: u128, b: u128) -> (bool, bool) {
    (a & b == 0, !a & b == 0)
}
