//! AES-NI, PCLMULQDQ, SHA and CRC32.
//!
//! These emulate instructions; they are not hardened against timing, as no interpreter is.

use super::{Lanes, split};

/// Multiplies in GF(2^8) with the polynomial of FIPS 197 section 4.2.
const fn gf_mul(mut a: u8, mut b: u8) -> u8 {
    let mut product = 0;
    while b != 0 {
        if b & 1 != 0 {
            product ^= a;
        }
        a = a << 1 ^ if a & 0x80 != 0 { 0x1b } else { 0 };
        b >>= 1;
    }
    product
}

/// The S-box of FIPS 197 section 5.1.1: the inverse in GF(2^8), then an affine map.
const SBOX: [u8; 256] = {
    let mut sbox = [0; 256];
    // 3 generates the field's group and 0xf6 is its inverse: walking both ways at once meets every inverse.
    let (mut p, mut q) = (1u8, 1u8);
    loop {
        sbox[p as usize] = q ^ q.rotate_left(1) ^ q.rotate_left(2) ^ q.rotate_left(3) ^ q.rotate_left(4) ^ 0x63;
        p = gf_mul(p, 3);
        q = gf_mul(q, 0xf6);
        if p == 1 {
            break;
        }
    }
    sbox[0] = 0x63;
    sbox
};

const INVERSE_SBOX: [u8; 256] = {
    let mut inverse = [0; 256];
    let mut i = 0;
    while i < 256 {
        inverse[SBOX[i] as usize] = i as u8;
        i += 1;
    }
    inverse
};

/// One column of MixColumns for a byte in row 0; other rows are rotations.
const fn mix_table(factors: [u8; 4]) -> [u32; 256] {
    let mut table = [0; 256];
    let mut i = 0;
    while i < 256 {
        let x = i as u8;
        table[i] = u32::from_le_bytes([
            gf_mul(x, factors[0]),
            gf_mul(x, factors[1]),
            gf_mul(x, factors[2]),
            gf_mul(x, factors[3]),
        ]);
        i += 1;
    }
    table
}

static MIX: [u32; 256] = mix_table([2, 1, 1, 3]);
static INVERSE_MIX: [u32; 256] = mix_table([14, 9, 13, 11]);

fn mix_columns(state: u128, table: &[u32; 256]) -> u128 {
    let bytes = state.to_le_bytes();
    <u128 as Lanes<u32>>::build(|column| {
        (0..4).fold(0, |sum, row| sum ^ table[usize::from(bytes[4 * column + row])].rotate_left(8 * row as u32))
    })
}

/// SubBytes after ShiftRows; `step` is 1 to shift left (encryption), 3 to shift right.
fn substitute_and_shift(state: u128, sbox: &[u8; 256], step: usize) -> u128 {
    let bytes = state.to_le_bytes();
    <u128 as Lanes<u8>>::build(|i| {
        let (column, row) = (i / 4, i % 4);
        sbox[usize::from(bytes[(column + row * step) % 4 * 4 + row])]
    })
}

/// AESENC.
pub(crate) fn aesenc(state: u128, key: u128) -> u128 {
    mix_columns(substitute_and_shift(state, &SBOX, 1), &MIX) ^ key
}

/// AESENCLAST.
pub(crate) fn aesenclast(state: u128, key: u128) -> u128 {
    substitute_and_shift(state, &SBOX, 1) ^ key
}

/// AESDEC.
pub(crate) fn aesdec(state: u128, key: u128) -> u128 {
    mix_columns(substitute_and_shift(state, &INVERSE_SBOX, 3), &INVERSE_MIX) ^ key
}

/// AESDECLAST.
pub(crate) fn aesdeclast(state: u128, key: u128) -> u128 {
    substitute_and_shift(state, &INVERSE_SBOX, 3) ^ key
}

/// AESIMC.
pub(crate) fn aesimc(key: u128) -> u128 {
    mix_columns(key, &INVERSE_MIX)
}

/// AESKEYGENASSIST.
pub(crate) fn aeskeygenassist(key: u128, rcon: u8) -> u128 {
    let substitute = |word: u32| u32::from_le_bytes(word.to_le_bytes().map(|b| SBOX[usize::from(b)]));
    let words = split::<u32, u128>(key);
    <u128 as Lanes<u32>>::build(|i| {
        let word = substitute(words[i / 2 * 2 + 1]);
        if i % 2 == 0 { word } else { word.rotate_right(8) ^ u32::from(rcon) }
    })
}

/// PCLMULQDQ: the carry-less product of one half of each operand; `imm[0]` chooses of `a`, `imm[4]` of `b`.
pub(crate) fn pclmulqdq(a: u128, b: u128, imm: u8) -> u128 {
    let half = |v: u128, high: bool| if high { v >> 64 } else { u128::from(v as u64) };
    let (a, b) = (half(a, imm & 1 != 0), half(b, imm & 0x10 != 0));
    (0..64).fold(0, |product, i| product ^ (a << i) & 0u128.wrapping_sub(b >> i & 1))
}

/// CRC-32C's polynomial, bits reflected (SDM: 11EDC6F41H).
const CRC32C: u32 = 0x82f6_3b78;

static CRC32C_TABLE: [u32; 256] = {
    let mut table = [0; 256];
    let mut i = 0;
    while i < 256 {
        let mut crc = i as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = crc >> 1 ^ if crc & 1 != 0 { CRC32C } else { 0 };
            bit += 1;
        }
        table[i] = crc;
        i += 1;
    }
    table
};

/// CRC32: accumulates the bytes of the source operand, lowest first.
pub(crate) fn crc32(crc: u32, source: &[u8]) -> u32 {
    source.iter().fold(crc, |crc, &byte| crc >> 8 ^ CRC32C_TABLE[usize::from(crc as u8 ^ byte)])
}

const fn choose(x: u32, y: u32, z: u32) -> u32 {
    x & y ^ !x & z
}

const fn majority(x: u32, y: u32, z: u32) -> u32 {
    x & y ^ x & z ^ y & z
}

const fn parity(x: u32, y: u32, z: u32) -> u32 {
    x ^ y ^ z
}

/// SHA instructions count lanes from the top: the words of `v`, highest first.
fn words_down(v: u128) -> [u32; 4] {
    let [d, c, b, a] = split::<u32, u128>(v);
    [a, b, c, d]
}

fn from_words_down(words: [u32; 4]) -> u128 {
    <u128 as Lanes<u32>>::build(|i| words[3 - i])
}

/// SHA1RNDS4: four rounds; `imm[1:0]` chooses function and constant.
pub(crate) fn sha1rnds4(state: u128, source: u128, imm: u8) -> u128 {
    type Round = fn(u32, u32, u32) -> u32;
    const ROUNDS: [(Round, u32); 4] =
        [(choose, 0x5a82_7999), (parity, 0x6ed9_eba1), (majority, 0x8f1b_bcdc), (parity, 0xca62_c1d6)];
    let (f, k) = ROUNDS[usize::from(imm & 3)];
    let [mut a, mut b, mut c, mut d] = words_down(state);
    // E is already in the first word of the source (SHA1NEXTE put it there).
    let mut e = 0u32;
    for word in words_down(source) {
        let next = f(b, c, d).wrapping_add(a.rotate_left(5)).wrapping_add(word).wrapping_add(e).wrapping_add(k);
        (a, b, c, d, e) = (next, a, b.rotate_left(30), c, d);
    }
    from_words_down([a, b, c, d])
}

/// SHA1NEXTE: adds the rotated E to the first word of the source.
pub(crate) fn sha1nexte(a: u128, b: u128) -> u128 {
    let [first, rest @ ..] = words_down(b);
    let e = words_down(a)[0].rotate_left(30);
    from_words_down([first.wrapping_add(e), rest[0], rest[1], rest[2]])
}

/// SHA1MSG1.
pub(crate) fn sha1msg1(a: u128, b: u128) -> u128 {
    let ([w0, w1, w2, w3], [w4, w5, ..]) = (words_down(a), words_down(b));
    from_words_down([w2 ^ w0, w3 ^ w1, w4 ^ w2, w5 ^ w3])
}

/// SHA1MSG2.
pub(crate) fn sha1msg2(a: u128, b: u128) -> u128 {
    let ([a0, a1, a2, a3], [_, w13, w14, w15]) = (words_down(a), words_down(b));
    let w16 = (a0 ^ w13).rotate_left(1);
    let w17 = (a1 ^ w14).rotate_left(1);
    let w18 = (a2 ^ w15).rotate_left(1);
    let w19 = (a3 ^ w16).rotate_left(1);
    from_words_down([w16, w17, w18, w19])
}

/// SHA256RNDS2: two rounds; `keys` is XMM0, whose two low words are message plus constant.
pub(crate) fn sha256rnds2(a: u128, b: u128, keys: u128) -> u128 {
    let ([mut c, mut d, mut g, mut h], [mut a, mut b, mut e, mut f]) = (words_down(a), words_down(b));
    let keys = split::<u32, u128>(keys);
    for key in &keys[..2] {
        let sum1 = e.rotate_right(6) ^ e.rotate_right(11) ^ e.rotate_right(25);
        let sum0 = a.rotate_right(2) ^ a.rotate_right(13) ^ a.rotate_right(22);
        let t1 = choose(e, f, g).wrapping_add(sum1).wrapping_add(*key).wrapping_add(h);
        let t2 = majority(a, b, c).wrapping_add(sum0);
        (a, b, c, d, e, f, g, h) = (t1.wrapping_add(t2), a, b, c, d.wrapping_add(t1), e, f, g);
    }
    let _ = (c, d, g, h);
    from_words_down([a, b, e, f])
}

/// SHA256MSG1.
pub(crate) fn sha256msg1(a: u128, b: u128) -> u128 {
    let words = split::<u32, u128>(a);
    let next = [words[1], words[2], words[3], b as u32];
    <u128 as Lanes<u32>>::build(|i| {
        let w = next[i];
        words[i].wrapping_add(w.rotate_right(7) ^ w.rotate_right(18) ^ w >> 3)
    })
}

/// SHA256MSG2.
pub(crate) fn sha256msg2(a: u128, b: u128) -> u128 {
    let sigma1 = |w: u32| w.rotate_right(17) ^ w.rotate_right(19) ^ w >> 10;
    let (a, b) = (split::<u32, u128>(a), split::<u32, u128>(b));
    let w16 = a[0].wrapping_add(sigma1(b[2]));
    let w17 = a[1].wrapping_add(sigma1(b[3]));
    let words = [w16, w17, a[2].wrapping_add(sigma1(w16)), a[3].wrapping_add(sigma1(w17))];
    <u128 as Lanes<u32>>::build(|i| words[i])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sbox_is_the_one_of_fips_197() {
        assert_eq!((SBOX[0], SBOX[1], SBOX[0x53], SBOX[0xff]), (0x63, 0x7c, 0xed, 0x16));
        for i in 0..=255u8 {
            assert_eq!(INVERSE_SBOX[usize::from(SBOX[usize::from(i)])], i);
        }
    }

    #[test]
    fn aes_encrypts_the_example_of_fips_197() {
        // Appendix A.1 (key expansion) and appendix B (cipher).
        let key = u128::from_le_bytes(0x2b7e151628aed2a6abf7158809cf4f3cu128.to_be_bytes());
        let mut state = u128::from_le_bytes(0x3243f6a8885a308d313198a2e0370734u128.to_be_bytes()) ^ key;
        let mut round_key = key;
        for (round, rcon) in [1, 2, 4, 8, 16, 32, 64, 128, 0x1b, 0x36].into_iter().enumerate() {
            let assist = split::<u32, u128>(aeskeygenassist(round_key, rcon))[3];
            let mut previous = assist;
            let old = split::<u32, u128>(round_key);
            round_key = <u128 as Lanes<u32>>::build(|i| {
                previous ^= old[i];
                previous
            });
            state = if round == 9 { aesenclast(state, round_key) } else { aesenc(state, round_key) };
        }
        let expected = 0x3925841d02dc09fbdc118597196a0b32u128;
        assert_eq!(u128::from_be_bytes(state.to_le_bytes()), expected);
    }

    #[test]
    fn crc32_of_the_check_string_is_that_of_crc32c() {
        assert_eq!(!crc32(!0, b"123456789"), 0xe306_9283);
    }
}
