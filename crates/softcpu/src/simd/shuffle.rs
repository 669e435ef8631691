//! Moving lanes about: pack, unpack, shuffle, blend, insert, extract, widen.

use super::{Lanes, Vector, split};

/// Narrows the lanes of `a`, then of `b`.
#[inline]
fn pack<W: Copy, N, V: Lanes<W> + Lanes<N>>(a: V, b: V, narrow: impl Fn(W) -> N) -> V {
    let (a, b) = (split::<W, V>(a), split::<W, V>(b));
    let (a, b) = (a.as_ref(), b.as_ref());
    <V as Lanes<N>>::build(|i| narrow(if i < a.len() { a[i] } else { b[i - a.len()] }))
}

/// PACKSSWB: signed words to signed bytes with saturation.
#[inline]
pub(crate) fn packsswb<V: Vector>(a: V, b: V) -> V {
    pack::<i16, i8, V>(a, b, |w| w.clamp(-0x80, 0x7f) as i8)
}

/// PACKSSDW: signed doublewords to signed words with saturation.
#[inline]
pub(crate) fn packssdw<V: Vector>(a: V, b: V) -> V {
    pack::<i32, i16, V>(a, b, |d| d.clamp(-0x8000, 0x7fff) as i16)
}

/// PACKUSWB: signed words to unsigned bytes with saturation.
#[inline]
pub(crate) fn packuswb<V: Vector>(a: V, b: V) -> V {
    pack::<i16, u8, V>(a, b, |w| w.clamp(0, 0xff) as u8)
}

/// PACKUSDW: signed doublewords to unsigned words with saturation.
#[inline]
pub(crate) fn packusdw<V: Vector>(a: V, b: V) -> V {
    pack::<i32, u16, V>(a, b, |d| d.clamp(0, 0xffff) as u16)
}

/// Interleaves half of `a` with the same half of `b`, `a` first; `from` is the first lane taken.
#[inline]
fn interleave<L: Copy, V: Lanes<L>>(a: V, b: V, from: usize) -> V {
    let (a, b) = (a.split(), b.split());
    V::build(|i| if i % 2 == 0 { a.as_ref()[from + i / 2] } else { b.as_ref()[from + i / 2] })
}

macro_rules! unpacks {
    ($($low:ident, $high:ident: $lane:ty, $doc:literal;)+) => {$(
        #[doc = concat!("PUNPCKL", $doc)]
        #[inline]
        pub(crate) fn $low<V: Vector>(a: V, b: V) -> V {
            interleave::<$lane, V>(a, b, 0)
        }

        #[doc = concat!("PUNPCKH", $doc)]
        #[inline]
        pub(crate) fn $high<V: Vector>(a: V, b: V) -> V {
            interleave::<$lane, V>(a, b, <V as Lanes<$lane>>::COUNT / 2)
        }
    )+};
}

unpacks! {
    punpcklbw, punpckhbw: u8, "BW.";
    punpcklwd, punpckhwd: u16, "WD.";
    punpckldq, punpckhdq: u32, "DQ, and its PS form on XMM.";
}

/// PUNPCKLQDQ, UNPCKLPD, MOVLHPS.
#[inline]
pub(crate) fn punpcklqdq(a: u128, b: u128) -> u128 {
    u128::from(a as u64) | b << 64
}

/// PUNPCKHQDQ, UNPCKHPD.
#[inline]
pub(crate) fn punpckhqdq(a: u128, b: u128) -> u128 {
    a >> 64 | b >> 64 << 64
}

/// The two-bit field number `i` of a shuffle immediate.
#[inline]
fn field(imm: u8, i: usize) -> usize {
    usize::from(imm >> (2 * i) & 3)
}

/// PSHUFD.
#[inline]
pub(crate) fn pshufd(a: u128, imm: u8) -> u128 {
    let a = split::<u32, u128>(a);
    <u128 as Lanes<u32>>::build(|i| a[field(imm, i)])
}

/// PSHUFW (MMX), and each half of PSHUFLW and PSHUFHW.
#[inline]
pub(crate) fn pshufw(a: u64, imm: u8) -> u64 {
    let a = split::<u16, u64>(a);
    <u64 as Lanes<u16>>::build(|i| a[field(imm, i)])
}

/// PSHUFLW.
#[inline]
pub(crate) fn pshuflw(a: u128, imm: u8) -> u128 {
    a >> 64 << 64 | u128::from(pshufw(a as u64, imm))
}

/// PSHUFHW.
#[inline]
pub(crate) fn pshufhw(a: u128, imm: u8) -> u128 {
    u128::from(pshufw((a >> 64) as u64, imm)) << 64 | u128::from(a as u64)
}

/// SHUFPS: two lanes of `a`, then two of `b`.
#[inline]
pub(crate) fn shufps(a: u128, b: u128, imm: u8) -> u128 {
    let (a, b) = (split::<u32, u128>(a), split::<u32, u128>(b));
    <u128 as Lanes<u32>>::build(|i| if i < 2 { a } else { b }[field(imm, i)])
}

/// SHUFPD: one lane of `a`, then one of `b`.
#[inline]
pub(crate) fn shufpd(a: u128, b: u128, imm: u8) -> u128 {
    let (a, b) = (split::<u64, u128>(a), split::<u64, u128>(b));
    <u128 as Lanes<u64>>::build(|i| if i == 0 { a } else { b }[usize::from(imm >> i & 1)])
}

/// PSHUFB: bit 7 of a selector gives zero; its low bits (three on MMX, four on XMM) choose a byte of `a`.
#[inline]
pub(crate) fn pshufb<V: Vector>(a: V, selectors: V) -> V {
    let (a, s) = (split::<u8, V>(a), split::<u8, V>(selectors));
    <V as Lanes<u8>>::build(|i| {
        let s = s.as_ref()[i];
        if s & 0x80 != 0 { 0 } else { a.as_ref()[usize::from(s) % <V as Lanes<u8>>::COUNT] }
    })
}

/// PALIGNR: the bytes of `b` followed by those of `a` (`a` is the upper part), shifted right by `count` bytes.
#[inline]
pub(crate) fn palignr<V: Vector>(a: V, b: V, count: u8) -> V {
    let (a, b) = (split::<u8, V>(a), split::<u8, V>(b));
    let (a, b) = (a.as_ref(), b.as_ref());
    <V as Lanes<u8>>::build(|i| {
        let from = i + usize::from(count);
        b.get(from).or_else(|| a.get(from - b.len())).copied().unwrap_or(0)
    })
}

/// Chooses between lanes: `from_b(i)` says that lane `i` comes from `b`.
#[inline]
fn blend<L: Copy>(a: u128, b: u128, from_b: impl Fn(usize) -> bool) -> u128
where
    u128: Lanes<L>,
{
    let (a, b) = (split::<L, u128>(a), split::<L, u128>(b));
    <u128 as Lanes<L>>::build(|i| if from_b(i) { b.as_ref()[i] } else { a.as_ref()[i] })
}

/// PBLENDW.
#[inline]
pub(crate) fn pblendw(a: u128, b: u128, imm: u8) -> u128 {
    blend::<u16>(a, b, |i| imm >> i & 1 != 0)
}

/// BLENDPS.
#[inline]
pub(crate) fn blendps(a: u128, b: u128, imm: u8) -> u128 {
    blend::<u32>(a, b, |i| imm >> i & 1 != 0)
}

/// BLENDPD.
#[inline]
pub(crate) fn blendpd(a: u128, b: u128, imm: u8) -> u128 {
    blend::<u64>(a, b, |i| imm >> i & 1 != 0)
}

/// PBLENDVB: the sign bits of the bytes of `mask` (XMM0) choose.
#[inline]
pub(crate) fn pblendvb(a: u128, b: u128, mask: u128) -> u128 {
    let mask = split::<i8, u128>(mask);
    blend::<u8>(a, b, |i| mask[i] < 0)
}

/// BLENDVPS: the sign bits of the doublewords of `mask` (XMM0) choose.
#[inline]
pub(crate) fn blendvps(a: u128, b: u128, mask: u128) -> u128 {
    let mask = split::<i32, u128>(mask);
    blend::<u32>(a, b, |i| mask[i] < 0)
}

/// BLENDVPD: the sign bits of the quadwords of `mask` (XMM0) choose.
#[inline]
pub(crate) fn blendvpd(a: u128, b: u128, mask: u128) -> u128 {
    let mask = split::<i64, u128>(mask);
    blend::<u64>(a, b, |i| mask[i] < 0)
}

/// MASKMOVQ and MASKMOVDQU: a bit for each byte that is to be stored; also PMOVMSKB.
#[inline]
pub(crate) fn pmovmskb<V: Vector>(a: V) -> u32 {
    sign_mask::<i8, V>(a, |lane| lane < 0)
}

/// MOVMSKPS.
#[inline]
pub(crate) fn movmskps(a: u128) -> u32 {
    sign_mask::<i32, u128>(a, |lane| lane < 0)
}

/// MOVMSKPD.
#[inline]
pub(crate) fn movmskpd(a: u128) -> u32 {
    sign_mask::<i64, u128>(a, |lane| lane < 0)
}

#[inline]
fn sign_mask<L: Copy, V: Lanes<L>>(a: V, negative: impl Fn(L) -> bool) -> u32 {
    let a = a.split();
    a.as_ref().iter().enumerate().fold(0, |mask, (i, &lane)| mask | u32::from(negative(lane)) << i)
}

/// Replaces one lane (PINSRB/W/D/Q); of `index` only as many bits count as lanes need.
#[inline]
pub(crate) fn insert<L: Copy, V: Lanes<L>>(a: V, index: u8, value: L) -> V {
    let a = a.split();
    let index = usize::from(index) % V::COUNT;
    V::build(|i| if i == index { value } else { a.as_ref()[i] })
}

/// Takes one lane (PEXTRB/W/D/Q, EXTRACTPS); of `index` only as many bits count as lanes need.
#[inline]
pub(crate) fn extract<L: Copy, V: Lanes<L>>(a: V, index: u8) -> L {
    a.split().as_ref()[usize::from(index) % V::COUNT]
}

/// INSERTPS with the source lane already chosen: `imm[5:4]` is where it goes, `imm[3:0]` the lanes to clear.
#[inline]
pub(crate) fn insertps(a: u128, lane: u32, imm: u8) -> u128 {
    let inserted = insert::<u32, u128>(a, imm >> 4 & 3, lane);
    blend::<u32>(inserted, 0, |i| imm >> i & 1 != 0)
}

/// MOVSLDUP: each even lane twice.
#[inline]
pub(crate) fn movsldup(a: u128) -> u128 {
    pshufd(a, 0b10_10_00_00)
}

/// MOVSHDUP: each odd lane twice.
#[inline]
pub(crate) fn movshdup(a: u128) -> u128 {
    pshufd(a, 0b11_11_01_01)
}

/// Defines the widening moves: as many lanes from the bottom as fit.
macro_rules! widenings {
    ($($name:ident: $from:ty => $to:ty, $doc:literal;)+) => {$(
        #[doc = $doc]
        #[inline]
        pub(crate) fn $name(a: u128) -> u128 {
            let a = split::<$from, u128>(a);
            <u128 as Lanes<$to>>::build(|i| <$to>::from(a[i]))
        }
    )+};
}

widenings! {
    pmovsxbw: i8 => i16, "PMOVSXBW.";
    pmovsxbd: i8 => i32, "PMOVSXBD.";
    pmovsxbq: i8 => i64, "PMOVSXBQ.";
    pmovsxwd: i16 => i32, "PMOVSXWD.";
    pmovsxwq: i16 => i64, "PMOVSXWQ.";
    pmovsxdq: i32 => i64, "PMOVSXDQ.";
    pmovzxbw: u8 => u16, "PMOVZXBW.";
    pmovzxbd: u8 => u32, "PMOVZXBD.";
    pmovzxbq: u8 => u64, "PMOVZXBQ.";
    pmovzxwd: u16 => u32, "PMOVZXWD.";
    pmovzxwq: u16 => u64, "PMOVZXWQ.";
    pmovzxdq: u32 => u64, "PMOVZXDQ.";
}
