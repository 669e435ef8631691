//! PCMPESTRI, PCMPESTRM, PCMPISTRI, PCMPISTRM (SDM volume 2 section 4.1, "Imm8 Control Byte Operation").

use super::{Lanes, split};

/// What a string comparison gives; the four instructions take different parts of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct StringCompare {
    /// What the index forms put in ECX.
    pub(crate) index: u32,
    /// What the mask forms put in XMM0.
    pub(crate) mask: u128,
    /// CF: some element matched.
    pub(crate) cf: bool,
    /// ZF: the second operand ends within the register.
    pub(crate) zf: bool,
    /// SF: the first operand ends within the register.
    pub(crate) sf: bool,
    /// OF: element 0 matched. (AF and PF are cleared.)
    pub(crate) of: bool,
}

/// The elements widened, so that one comparison serves all four formats; `imm[0]` words, `imm[1]` signed.
fn elements(v: u128, imm: u8) -> ([i32; 16], usize) {
    let mut out = [0; 16];
    fn fill<L: Copy + Into<i32>>(out: &mut [i32; 16], v: u128) -> usize
    where
        u128: Lanes<L>,
    {
        for (out, &lane) in out.iter_mut().zip(split::<L, u128>(v).as_ref()) {
            *out = lane.into();
        }
        <u128 as Lanes<L>>::COUNT
    }
    let count = match imm & 3 {
        0 => fill::<u8>(&mut out, v),
        1 => fill::<u16>(&mut out, v),
        2 => fill::<i8>(&mut out, v),
        _ => fill::<i16>(&mut out, v),
    };
    (out, count)
}

/// PCMPISTRx: each string ends at its first zero element.
pub(crate) fn pcmpistr(a: u128, b: u128, imm: u8) -> StringCompare {
    let length = |v| {
        let (elements, count) = elements(v, imm);
        elements[..count].iter().position(|&e| e == 0).unwrap_or(count)
    };
    compare(a, length(a), b, length(b), imm)
}

/// PCMPESTRx: the lengths are given (EAX, EDX, or RAX, RDX with REX.W, sign extended here); their magnitude counts, at most a register full.
pub(crate) fn pcmpestr(a: u128, a_length: i64, b: u128, b_length: i64, imm: u8) -> StringCompare {
    let count = if imm & 1 == 0 { 16 } else { 8 };
    let length = |l: i64| l.unsigned_abs().min(count) as usize;
    compare(a, length(a_length), b, length(b_length), imm)
}

fn compare(a: u128, a_length: usize, b: u128, b_length: usize, imm: u8) -> StringCompare {
    let ((a, count), (b, _)) = (elements(a, imm), elements(b, imm));
    let a = &a[..a_length];
    let all = (1u32 << count) - 1;
    // A comparison with an element beyond the end of a string is false, except that "equal each" holds where both have
    // ended and "equal ordered" where the pattern has (SDM volume 2, 4.1.6 "Valid/Invalid Override of Comparisons").
    let matches = |j: usize| match imm >> 2 & 3 {
        0 => j < b_length && a.contains(&b[j]),
        1 => j < b_length && a.chunks_exact(2).any(|range| (range[0]..=range[1]).contains(&b[j])),
        2 => match (j < a_length, j < b_length) {
            (true, true) => a[j] == b[j],
            (ours, theirs) => ours == theirs,
        },
        _ => a.iter().zip(j..count).all(|(&e, k)| k < b_length && e == b[k]),
    };
    let raw = (0..count).fold(0u32, |bits, j| bits | u32::from(matches(j)) << j);
    let result = match imm >> 4 & 3 {
        1 => raw ^ all,
        3 => raw ^ ((1 << b_length) - 1),
        _ => raw,
    };
    let last = imm & 0x40 != 0;
    let index = match (result, last) {
        (0, _) => count as u32,
        (_, false) => result.trailing_zeros(),
        (_, true) => result.ilog2(),
    };
    let mask = match (last, count) {
        (false, _) => u128::from(result),
        (true, 8) => <u128 as Lanes<u16>>::build(|i| 0u16.wrapping_sub((result >> i & 1) as u16)),
        (true, _) => <u128 as Lanes<u8>>::build(|i| 0u8.wrapping_sub((result >> i & 1) as u8)),
    };
    StringCompare { index, mask, cf: result != 0, zf: b_length < count, sf: a_length < count, of: result & 1 != 0 }
}
