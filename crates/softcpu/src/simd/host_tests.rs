//! Runs each instruction on the host CPU and compares: random operands, lanes at their extremes favoured.

use super::*;
use std::arch::asm;

/// Pairs of operands per instruction and immediate.
const ROUNDS: usize = 400;

/// xorshift64*: repeatable operands.
struct Random(u64);

impl Random {
    fn new(name: &str) -> Self {
        Self(
            name.bytes()
                .fold(0x9e37_79b9_7f4a_7c15, |seed, b| (seed ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3) | 1),
        )
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A register: sometimes plain random, sometimes bytes at the edges, sometimes few distinct bytes (so that strings
    /// match and end).
    fn vector(&mut self) -> u128 {
        let kind = self.next() % 4;
        <u128 as Lanes<u8>>::build(|_| {
            let r = self.next();
            match kind {
                0 => (r >> 8) as u8,
                1 => [0, 1, 0x7f, 0x80, 0x81, 0xfe, 0xff, (r >> 8) as u8][r as usize % 8],
                2 => [0, 1, 2, 3][r as usize % 4],
                _ => [b'a', b'b', b'c', 0x80, 0xff, b'a', b'b', 0][r as usize % 8],
            }
        })
    }

    /// A shift count: mostly small, sometimes huge.
    fn count(&mut self) -> u64 {
        let r = self.next();
        match r % 8 {
            0 => self.next(),
            1 => 1 << ((r >> 8) % 64),
            _ => (r >> 8) % 70,
        }
    }
}

macro_rules! has {
    ($feature:tt) => {{
        let has = is_x86_feature_detected!($feature);
        if !has {
            eprintln!("skipped: the host has no {}", $feature);
        }
        has
    }};
}

/// What `insn xmm0, xmm1` leaves in xmm0.
macro_rules! host_xmm {
    ($insn:expr, $a:expr, $b:expr) => {{
        let (a, b): (u128, u128) = ($a, $b);
        let mut out = 0u128;
        // SAFETY: reads two and writes one local through pointers to them; the caller checked the CPU feature.
        unsafe {
            asm!(
                "movdqu xmm0, [{a}]", "movdqu xmm1, [{b}]", $insn, "movdqu [{out}], xmm0",
                a = in(reg) &a, b = in(reg) &b, out = in(reg) &mut out,
                out("xmm0") _, out("xmm1") _, options(nostack)
            );
        }
        out
    }};
}

/// What `insn mm0, mm1` leaves in mm0.
macro_rules! host_mmx {
    ($insn:expr, $a:expr, $b:expr) => {{
        let (a, b): (u64, u64) = ($a, $b);
        let mut out = 0u64;
        // SAFETY: reads two and writes one local through pointers to them; EMMS leaves the x87 stack empty, as the ABI
        // wants it, and all aliased registers are declared clobbered.
        unsafe {
            asm!(
                "movq mm0, [{a}]", "movq mm1, [{b}]", $insn, "movq [{out}], mm0", "emms",
                a = in(reg) &a, b = in(reg) &b, out = in(reg) &mut out,
                out("mm0") _, out("mm1") _, out("st(0)") _, out("st(1)") _, options(nostack)
            );
        }
        out
    }};
}

/// Tests of `f(a, b)`: `both` on MMX and XMM, `xmm` on XMM only.
macro_rules! binary {
    ($feature:tt both: $($both:ident)* ; xmm: $($xmm:ident)*) => {
        $(#[test] fn $both() {
            if !has!($feature) { return; }
            let mut random = Random::new(stringify!($both));
            for _ in 0..ROUNDS {
                let (a, b) = (random.vector(), random.vector());
                let host = host_xmm!(concat!(stringify!($both), " xmm0, xmm1"), a, b);
                assert_eq!(super::$both(a, b), host, "{a:032x} {b:032x}");
                let (a, b) = (a as u64, b as u64);
                let host = host_mmx!(concat!(stringify!($both), " mm0, mm1"), a, b);
                assert_eq!(super::$both(a, b), host, "{a:016x} {b:016x}");
            }
        })*
        $(#[test] fn $xmm() {
            if !has!($feature) { return; }
            let mut random = Random::new(stringify!($xmm));
            for _ in 0..ROUNDS {
                let (a, b) = (random.vector(), random.vector());
                let host = host_xmm!(concat!(stringify!($xmm), " xmm0, xmm1"), a, b);
                assert_eq!(super::$xmm(a, b), host, "{a:032x} {b:032x}");
            }
        })*
    };
}

binary! { "sse2"
    both: paddb paddw paddd paddq psubb psubw psubd psubq paddsb paddsw psubsb psubsw paddusb paddusw psubusb psubusw
        pavgb pavgw pminub pminsw pmaxub pmaxsw pcmpeqb pcmpeqw pcmpeqd pcmpgtb pcmpgtw pcmpgtd pmullw pmulhw pmulhuw
        pmuludq pmaddwd psadbw pand pandn por pxor packsswb packssdw packuswb punpcklbw punpckhbw punpcklwd punpckhwd
        punpckldq punpckhdq;
    xmm: punpcklqdq punpckhqdq
}
binary! { "ssse3"
    both: pmulhrsw psignb psignw psignd pmaddubsw phaddw phaddd phaddsw phsubw phsubd phsubsw pshufb;
    xmm:
}
binary! { "sse4.1"
    both: ;
    xmm: pminuw pminud pminsb pminsd pmaxuw pmaxud pmaxsb pmaxsd pcmpeqq pmulld pmuldq packusdw
}
binary! { "sse4.2" both: ; xmm: pcmpgtq }
binary! { "aes" both: ; xmm: aesenc aesenclast aesdec aesdeclast }
binary! { "sha" both: ; xmm: sha1nexte sha1msg1 sha1msg2 sha256msg1 sha256msg2 }

/// Tests of `f(a)`.
macro_rules! unary {
    ($feature:tt both: $($both:ident)* ; xmm: $($xmm:ident)*) => {
        $(#[test] fn $both() {
            if !has!($feature) { return; }
            let mut random = Random::new(stringify!($both));
            for _ in 0..ROUNDS {
                let a = random.vector();
                let host = host_xmm!(concat!(stringify!($both), " xmm0, xmm1"), 0, a);
                assert_eq!(super::$both(a), host, "{a:032x}");
                let host = host_mmx!(concat!(stringify!($both), " mm0, mm1"), 0, a as u64);
                assert_eq!(super::$both(a as u64), host, "{a:032x}");
            }
        })*
        $(#[test] fn $xmm() {
            if !has!($feature) { return; }
            let mut random = Random::new(stringify!($xmm));
            for _ in 0..ROUNDS {
                let a = random.vector();
                let host = host_xmm!(concat!(stringify!($xmm), " xmm0, xmm1"), 0, a);
                assert_eq!(super::$xmm(a), host, "{a:032x}");
            }
        })*
    };
}

unary! { "ssse3" both: pabsb pabsw pabsd; xmm: }
unary! { "sse3" both: ; xmm: movsldup movshdup }
unary! { "sse4.1"
    both: ;
    xmm: phminposuw pmovsxbw pmovsxbd pmovsxbq pmovsxwd pmovsxwq pmovsxdq pmovzxbw pmovzxbd pmovzxbq pmovzxwd pmovzxwq
        pmovzxdq
}
unary! { "aes" both: ; xmm: aesimc }

/// Tests of shifts by the count in a register.
macro_rules! shifts {
    ($($name:ident)*) => {$(
        #[test] fn $name() {
            let mut random = Random::new(stringify!($name));
            for _ in 0..ROUNDS {
                let (a, count) = (random.vector(), random.count());
                // Bits 127:64 of the count register do not count.
                let register = u128::from(count) | random.vector() << 64;
                let host = host_xmm!(concat!(stringify!($name), " xmm0, xmm1"), a, register);
                assert_eq!(super::$name(a, count), host, "{a:032x} by {count}");
                let host = host_mmx!(concat!(stringify!($name), " mm0, mm1"), a as u64, count);
                assert_eq!(super::$name(a as u64, count), host, "{a:032x} by {count}");
            }
        }
    )*};
}

shifts! { psllw pslld psllq psrlw psrld psrlq psraw psrad }

/// Calls `$body` with `$imm` as a literal in the instruction's text, for each immediate listed.
macro_rules! with_immediates {
    ($name:ident, $feature:tt, [$($imm:literal)*], |$random:ident, $operands:ident, $value:ident| $ours:expr, $host:ident, $registers:literal) => {
        #[test]
        fn $name() {
            if !has!($feature) { return; }
            let mut $random = Random::new(stringify!($name));
            $(for _ in 0..ROUNDS / 4 {
                let $operands = ($random.vector(), $random.vector());
                let (a, b) = $operands;
                let $value: u8 = $imm;
                let host = $host!(concat!(stringify!($name), $registers, ", ", $imm), a as _, b as _);
                assert_eq!($ours, host, "{a:032x} {b:032x} imm {}", $imm);
            })*
        }
    };
}

macro_rules! immediate_xmm {
    ($($name:ident $feature:tt $list:tt |$v:ident, $imm:ident| $ours:expr;)+) => {$(
        with_immediates!($name, $feature, $list, |random, $v, $imm| $ours, host_xmm, " xmm0, xmm1");
    )+};
}

immediate_xmm! {
    pshufd "sse2" [0 1 0x1b 0x4e 0xb1 0xe4 0xff 0x93] |v, imm| super::pshufd(v.1, imm);
    pshuflw "sse2" [0 1 0x1b 0x4e 0xb1 0xe4 0xff 0x93] |v, imm| super::pshuflw(v.1, imm);
    pshufhw "sse2" [0 1 0x1b 0x4e 0xb1 0xe4 0xff 0x93] |v, imm| super::pshufhw(v.1, imm);
    shufps "sse" [0 1 0x1b 0x4e 0xb1 0xe4 0xff 0x93] |v, imm| super::shufps(v.0, v.1, imm);
    shufpd "sse2" [0 1 2 3] |v, imm| super::shufpd(v.0, v.1, imm);
    palignr "ssse3" [0 1 5 8 15 16 17 24 31 32 33 128 255] |v, imm| super::palignr(v.0, v.1, imm);
    pblendw "sse4.1" [0 1 0x55 0xaa 0x80 0xff 0x3c] |v, imm| super::pblendw(v.0, v.1, imm);
    blendps "sse4.1" [0 1 2 4 8 5 10 15] |v, imm| super::blendps(v.0, v.1, imm);
    blendpd "sse4.1" [0 1 2 3] |v, imm| super::blendpd(v.0, v.1, imm);
    mpsadbw "sse4.1" [0 1 2 3 4 5 6 7] |v, imm| super::mpsadbw(v.0, v.1, imm);
    insertps "sse4.1" [0 0x11 0x40 0x95 0xea 0xff 0x3c 0x7b]
        |v, imm| super::insertps(v.0, extract::<u32, u128>(v.1, imm >> 6), imm);
    pclmulqdq "pclmulqdq" [0 1 0x10 0x11 0xee 0xff] |v, imm| super::pclmulqdq(v.0, v.1, imm);
    aeskeygenassist "aes" [0 1 0x1b 0x80 0xff] |v, imm| super::aeskeygenassist(v.1, imm);
    sha1rnds4 "sha" [0 1 2 3] |v, imm| super::sha1rnds4(v.0, v.1, imm);
}

mod mmx_with_immediate {
    use super::*;
    with_immediates!(pshufw, "sse", [0 1 0x1b 0x4e 0xb1 0xe4 0xff 0x93],
        |random, v, imm| crate::simd::pshufw(v.1 as u64, imm), host_mmx, " mm0, mm1");
    with_immediates!(palignr, "ssse3", [0 1 5 7 8 9 15 16 17 255],
        |random, v, imm| crate::simd::palignr(v.0 as u64, v.1 as u64, imm), host_mmx, " mm0, mm1");
}

/// Shifts of a register in place by an immediate number of bytes.
macro_rules! byte_shifts {
    ($($name:ident [$($imm:literal)*])*) => {$(
        #[test] fn $name() {
            let mut random = Random::new(stringify!($name));
            $(for _ in 0..8 {
                let a = random.vector();
                let host = host_xmm!(concat!(stringify!($name), " xmm0, ", $imm), a, 0);
                assert_eq!(super::$name(a, $imm), host, "{a:032x} by {}", $imm);
            })*
        }
    )*};
}

byte_shifts! {
    pslldq [0 1 7 8 9 15 16 17 255]
    psrldq [0 1 7 8 9 15 16 17 255]
}

/// Instructions whose third operand is XMM0.
macro_rules! implicit_xmm0 {
    ($($name:ident $feature:tt)*) => {$(
        #[test] fn $name() {
            if !has!($feature) { return; }
            let mut random = Random::new(stringify!($name));
            for _ in 0..ROUNDS {
                let (a, b, c) = (random.vector(), random.vector(), random.vector());
                let mut host = 0u128;
                // SAFETY: reads three and writes one local through pointers to them; the feature was checked.
                unsafe {
                    asm!(
                        "movdqu xmm1, [{a}]", "movdqu xmm2, [{b}]", "movdqu xmm0, [{c}]",
                        concat!(stringify!($name), " xmm1, xmm2, xmm0"), "movdqu [{out}], xmm1",
                        a = in(reg) &a, b = in(reg) &b, c = in(reg) &c, out = in(reg) &mut host,
                        out("xmm0") _, out("xmm1") _, out("xmm2") _, options(nostack)
                    );
                }
                assert_eq!(super::$name(a, b, c), host, "{a:032x} {b:032x} {c:032x}");
            }
        }
    )*};
}

implicit_xmm0! { pblendvb "sse4.1" blendvps "sse4.1" blendvpd "sse4.1" sha256rnds2 "sha" }

/// The register that `insn eax, xmm0` leaves.
macro_rules! to_gpr {
    ($($name:ident $feature:tt)*) => {$(
        #[test] fn $name() {
            if !has!($feature) { return; }
            let mut random = Random::new(stringify!($name));
            for _ in 0..ROUNDS {
                let a = random.vector();
                let host: u32;
                // SAFETY: reads one local through a pointer to it; the feature was checked.
                unsafe {
                    asm!("movdqu xmm0, [{a}]", concat!(stringify!($name), " {out:e}, xmm0"),
                        a = in(reg) &a, out = out(reg) host, out("xmm0") _, options(nostack));
                }
                assert_eq!(super::$name(a), host, "{a:032x}");
            }
        }
    )*};
}

to_gpr! { pmovmskb "sse2" movmskps "sse" movmskpd "sse2" }

#[test]
fn ptest_sets_zf_and_cf() {
    if !has!("sse4.1") {
        return;
    }
    let mut random = Random::new("ptest");
    for round in 0..ROUNDS {
        let a = random.vector();
        let b = match round % 4 {
            0 => a & random.vector(),
            1 => !a & random.vector(),
            _ => random.vector(),
        };
        let (zf, cf): (u8, u8);
        // SAFETY: reads two locals through pointers to them; the feature was checked.
        unsafe {
            asm!("movdqu xmm0, [{a}]", "movdqu xmm1, [{b}]", "ptest xmm0, xmm1", "setz {zf}", "setc {cf}",
                a = in(reg) &a, b = in(reg) &b, zf = out(reg_byte) zf, cf = out(reg_byte) cf,
                out("xmm0") _, out("xmm1") _, options(nostack));
        }
        assert_eq!(ptest(a, b), (zf != 0, cf != 0), "{a:032x} {b:032x}");
    }
}

#[test]
fn crc32_accumulates_each_operand_size() {
    if !has!("sse4.2") {
        return;
    }
    let mut random = Random::new("crc32");
    for _ in 0..ROUNDS {
        let (crc, source) = (random.next() as u32, random.next());
        let bytes = source.to_le_bytes();
        macro_rules! check {
            ($text:literal, $size:literal) => {{
                let mut host = u64::from(crc);
                // SAFETY: works on registers only; the feature was checked.
                unsafe {
                    asm!($text, crc = inout(reg) host, source = in(reg) source, options(nomem, nostack));
                }
                assert_eq!(u64::from(crc32(crc, &bytes[..$size])), host, "{crc:x} {source:x}");
            }};
        }
        check!("crc32 {crc:e}, {source:l}", 1);
        check!("crc32 {crc:e}, {source:x}", 2);
        check!("crc32 {crc:e}, {source:e}", 4);
        check!("crc32 {crc:r}, {source:r}", 8);
    }
}

/// RFLAGS as PCMPxSTRx sets it, from a result.
fn string_flags(result: &StringCompare) -> u64 {
    u64::from(result.cf) | u64::from(result.zf) << 6 | u64::from(result.sf) << 7 | u64::from(result.of) << 11
}

const ARITHMETIC_FLAGS: u64 = 0x8d5;

/// All 128 meaningful immediates of both forms of one instruction pair.
macro_rules! string_compare {
    ($([$($imm:literal)*])*) => {
        #[test]
        fn string_comparison_of_every_immediate() {
            if !has!("sse4.2") { return; }
            let mut random = Random::new("pcmpstr");
            $($(for _ in 0..60 {
                let (a, b) = (random.vector(), random.vector());
                let length = |r: u64| match r % 8 { 0 => (r >> 8) as i64, _ => (r >> 8) as i64 % 20 };
                let (la, lb) = (length(random.next()), length(random.next()));
                let implicit = pcmpistr(a, b, $imm);
                let narrow = pcmpestr(a, i64::from(la as i32), b, i64::from(lb as i32), $imm);
                let wide = pcmpestr(a, la, b, lb, $imm);
                for (text, ours) in [("i", implicit), ("e", narrow), ("w", wide)] {
                    let (index, flags, mask_flags): (u64, u64, u64);
                    let mut mask = 0u128;
                    macro_rules! run {
                        ($index:literal, $mask:literal) => {
                            // SAFETY: reads two and writes one local through pointers to them, and pops what it pushes;
                            // the feature was checked.
                            unsafe {
                                asm!(
                                    "movdqu xmm1, [{a}]", "movdqu xmm2, [{b}]",
                                    concat!($index, $imm), "pushfq", "pop {flags}",
                                    concat!($mask, $imm), "pushfq", "pop {mask_flags}",
                                    "movdqu [{out}], xmm0",
                                    a = in(reg) &a, b = in(reg) &b, out = in(reg) &mut mask,
                                    flags = out(reg) flags, mask_flags = out(reg) mask_flags,
                                    in("rax") la, in("rdx") lb, out("rcx") index,
                                    out("xmm0") _, out("xmm1") _, out("xmm2") _,
                                );
                            }
                        };
                    }
                    match text {
                        "i" => run!("pcmpistri xmm1, xmm2, ", "pcmpistrm xmm1, xmm2, "),
                        "e" => run!("pcmpestri xmm1, xmm2, ", "pcmpestrm xmm1, xmm2, "),
                        // With REX.W, which assemblers do not offer here: RAX and RDX are the lengths.
_ => run!(".byte 0x66, 0x48, 0x0f, 0x3a, 0x61, 0xca, ", ".byte 0x66, 0x48, 0x0f, 0x3a, 0x60, 0xca, "),
                    }
                    let context = format!("{text} {a:032x} {b:032x} {la} {lb} imm {:#x}", $imm);
                    assert_eq!(u64::from(ours.index), index, "{context}");
                    assert_eq!(ours.mask, mask, "{context}");
                    assert_eq!(string_flags(&ours), flags & ARITHMETIC_FLAGS, "{context}");
                    assert_eq!(string_flags(&ours), mask_flags & ARITHMETIC_FLAGS, "{context}");
                }
            })*)*
        }
    };
}

string_compare! {
    [0x00 0x01 0x02 0x03 0x04 0x05 0x06 0x07 0x08 0x09 0x0a 0x0b 0x0c 0x0d 0x0e 0x0f]
    [0x10 0x11 0x12 0x13 0x14 0x15 0x16 0x17 0x18 0x19 0x1a 0x1b 0x1c 0x1d 0x1e 0x1f]
    [0x20 0x25 0x2a 0x2f]
    [0x30 0x31 0x32 0x33 0x34 0x35 0x36 0x37 0x38 0x39 0x3a 0x3b 0x3c 0x3d 0x3e 0x3f]
    [0x40 0x41 0x42 0x43 0x44 0x45 0x46 0x47 0x48 0x49 0x4a 0x4b 0x4c 0x4d 0x4e 0x4f]
    [0x50 0x51 0x52 0x53 0x54 0x55 0x56 0x57 0x58 0x59 0x5a 0x5b 0x5c 0x5d 0x5e 0x5f]
    [0x60 0x65 0x6a 0x6f]
    [0x70 0x71 0x72 0x73 0x74 0x75 0x76 0x77 0x78 0x79 0x7a 0x7b 0x7c 0x7d 0x7e 0x7f]
}
