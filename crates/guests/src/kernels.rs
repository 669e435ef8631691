//! Ten small programs that say how fast a CPU is, each at another kind of work, and a guest that runs them all.
//!
//! They use no system and no library, so the same bytes run on the software CPU alone ([`flat`]), and on any machine
//! that boots a multiboot kernel ([`multiboot`]). Each answers a checksum that does not depend on who runs it.

use crate::asm::{CodeAssembler, CodeLabel, *};
use crate::{Bits, assemble, elf};
use iced_x86::IcedError;

/// One of the programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kernel {
    /// Its name, in small letters.
    pub name: &'static str,
    /// How much work it is to do for a run of about a second on an interpreter.
    pub work: u32,
    /// What it answers for that.
    pub checksum: u64,
}

/// The programs in the order of their numbers.
pub const KERNELS: [Kernel; 10] = [
    kernel("fib", 37, 0x170_9e79),
    kernel("sieve", 60, 0x47_ddf8),
    kernel("crc", 300, 0x211c_5208_e2f9_213e),
    kernel("rand", 5_000_000, 0xb50f_2619_2a1f_974f),
    kernel("copy", 20, 0x17c),
    kernel("rep", 5, 6),
    kernel("sort", 10, 0x5_fffe_70cc),
    kernel("vm", 100_000_000, 0xfc1b_3eaa_88ba_4deb),
    kernel("nbody", 1_000_000, 0x4040_b212_3684_6ab6),
    kernel("matmul", 200, 0x478c_0180),
];

/// Where [`flat`] is to be loaded, and entered in 64-bit mode.
pub const BASE: u64 = 0x20_0000;
/// The programs use memory up to here, one to one, with their code and stack between the first and the 16th mebibyte.
pub const END: u64 = 0x700_0000;
/// A stack pointer out of their way.
pub const STACK: u64 = 0x18_0000;

/// Two buffers. Their distance is no power of two, so that pages of both do not meet in direct-mapped caches.
const BUF: u64 = 0x100_0000;
const BUF2: u64 = 0x402_5000;

type Result<T = ()> = std::result::Result<T, IcedError>;

const fn kernel(name: &'static str, work: u32, checksum: u64) -> Kernel {
    Kernel { name, work, checksum }
}

/// All programs: 64-bit code for [`BASE`], a function that takes the number of a program in EDI and the amount of work in
/// RSI, and answers the checksum in RAX. It keeps only RSP, needs SSE2, and expects the stack to be writable.
#[must_use]
pub fn flat() -> Vec<u8> {
    assemble(Bits::B64, BASE, |a| {
        let programs = [fib, sieve, crc, rand, copy, rep, sort, vm, nbody, matmul];
        let mut labels: Vec<CodeLabel> = programs.iter().map(|_| a.create_label()).collect();
        a.mov(eax, edi)?;
        a.mov(rdi, rsi)?;
        for (number, label) in labels.iter().enumerate() {
            a.cmp(eax, number as u32)?;
            a.je(*label)?;
        }
        a.ud2()?;
        for (program, label) in programs.iter().zip(&mut labels) {
            a.set_label(label)?;
            program(a)?;
        }
        Ok(())
    })
}

/// Calls and returns: Fibonacci's numbers by definition.
fn fib(a: &mut CodeAssembler) -> Result {
    let (mut fib, mut more) = (a.create_label(), a.create_label());
    a.call(fib)?;
    a.ret()?;
    a.set_label(&mut fib)?;
    a.cmp(rdi, 2)?;
    a.jae(more)?;
    a.mov(rax, rdi)?;
    a.ret()?;
    a.set_label(&mut more)?;
    a.push(rbp)?;
    a.push(rbx)?;
    a.mov(rbx, rdi)?;
    a.sub(rsp, 8)?;
    a.lea(rdi, qword_ptr(rdi - 1))?;
    a.call(fib)?;
    a.mov(rbp, rax)?;
    a.lea(rdi, qword_ptr(rbx - 2))?;
    a.call(fib)?;
    a.add(rax, rbp)?;
    a.add(rsp, 8)?;
    a.pop(rbx)?;
    a.pop(rbp)?;
    a.ret()
}

/// Byte stores with a stride: the sieve of Eratosthenes below a million; the sum of what is left.
fn sieve(a: &mut CodeAssembler) -> Result {
    let top = 1_000_000;
    let [mut again, mut fill, mut next, mut cross, mut count, mut add] = std::array::from_fn(|_| a.create_label());
    a.xor(edx, edx)?;
    a.set_label(&mut again)?;
    a.mov(eax, BUF as u32)?;
    a.set_label(&mut fill)?;
    a.mov(byte_ptr(rax), 1)?;
    a.add(rax, 1)?;
    a.cmp(rax, BUF as i32 + top)?;
    a.jne(fill)?;
    a.mov(ecx, 1)?;
    a.set_label(&mut next)?;
    a.add(rcx, 1)?;
    a.mov(rax, rcx)?;
    a.imul_2(rax, rcx)?;
    a.cmp(rax, top)?;
    a.jae(count)?;
    a.cmp(byte_ptr(rcx + BUF), 0)?;
    a.je(next)?;
    a.set_label(&mut cross)?;
    a.mov(byte_ptr(rax + BUF), 0)?;
    a.add(rax, rcx)?;
    a.cmp(rax, top)?;
    a.jb(cross)?;
    a.jmp(next)?;
    a.set_label(&mut count)?;
    a.mov(eax, BUF as u32 + 2)?;
    a.set_label(&mut add)?;
    a.movzx(ecx, byte_ptr(rax))?;
    a.add(rax, 1)?;
    a.add(rdx, rcx)?;
    a.cmp(rax, BUF as i32 + top)?;
    a.jne(add)?;
    a.sub(rdi, 1)?;
    a.jne(again)?;
    a.mov(rax, rdx)?;
    a.ret()
}

/// Logic and shifts in registers, loads from a small table: CRC-32, and a shift-register generator mixed in.
fn crc(a: &mut CodeAssembler) -> Result {
    let [mut entry, mut bit, mut fill, mut again, mut byte] = std::array::from_fn(|_| a.create_label());
    a.xor(r8d, r8d)?;
    a.set_label(&mut entry)?;
    a.mov(eax, r8d)?;
    a.mov(edx, 8)?;
    a.set_label(&mut bit)?;
    a.mov(esi, eax)?;
    a.shr(eax, 1)?;
    a.mov(ecx, eax)?;
    a.xor(ecx, 0xedb8_8320_u32 as i32)?;
    a.test(esi, 1)?;
    a.cmovne(eax, ecx)?;
    a.sub(edx, 1)?;
    a.jne(bit)?;
    a.mov(dword_ptr(r8 * 4 + BUF2), eax)?;
    a.add(r8d, 1)?;
    a.cmp(r8d, 256)?;
    a.jne(entry)?;
    a.xor(ecx, ecx)?;
    a.set_label(&mut fill)?;
    // 7 i + i / 256
    a.lea(edx, dword_ptr(rcx * 8))?;
    a.sub(edx, ecx)?;
    a.mov(eax, ecx)?;
    a.shr(eax, 8)?;
    a.add(edx, eax)?;
    a.mov(byte_ptr(rcx + BUF), dl)?;
    a.add(ecx, 1)?;
    a.cmp(ecx, 0x1_0000)?;
    a.jne(fill)?;
    a.mov(edx, u32::MAX)?;
    a.mov(rax, 0x9e37_79b9_7f4a_7c15_u64)?;
    a.set_label(&mut again)?;
    a.mov(esi, BUF as u32)?;
    a.set_label(&mut byte)?;
    a.movzx(ecx, byte_ptr(rsi))?;
    a.add(rsi, 1)?;
    a.xor(ecx, edx)?;
    a.shr(edx, 8)?;
    a.movzx(ecx, cl)?;
    a.xor(edx, dword_ptr(rcx * 4 + BUF2))?;
    a.mov(rcx, rax)?;
    a.shl(rcx, 13)?;
    a.xor(rax, rcx)?;
    a.mov(rcx, rax)?;
    a.shr(rcx, 7)?;
    a.xor(rcx, rax)?;
    a.mov(rax, rcx)?;
    a.shl(rax, 17)?;
    a.xor(rax, rcx)?;
    a.mov(ecx, edx)?;
    a.add(rax, rcx)?;
    a.cmp(rsi, BUF as i32 + 0x1_0000)?;
    a.jne(byte)?;
    a.sub(rdi, 1)?;
    a.jne(again)?;
    a.xor(rax, rcx)?;
    a.ret()
}

/// What is in no TLB: reads and writes all over 32 MiB.
fn rand(a: &mut CodeAssembler) -> Result {
    let words = 4 << 20;
    let [mut fill, mut next] = std::array::from_fn(|_| a.create_label());
    a.xor(eax, eax)?;
    a.set_label(&mut fill)?;
    a.mov(qword_ptr(rax * 8 + BUF), rax)?;
    a.add(rax, 1)?;
    a.cmp(rax, words)?;
    a.jne(fill)?;
    a.mov(r8, 6_364_136_223_846_793_005_u64)?;
    a.mov(r9, 1_442_695_040_888_963_407_u64)?;
    a.mov(edx, 12345)?;
    a.xor(esi, esi)?;
    a.xor(ecx, ecx)?;
    a.set_label(&mut next)?;
    a.imul_2(rdx, r8)?;
    a.add(rdx, r9)?;
    a.mov(rax, rdx)?;
    a.shr(rax, 33)?;
    a.and(eax, words - 1)?;
    a.mov(rax, qword_ptr(rax * 8 + BUF))?;
    a.mov(r10, rax)?;
    a.xor(r10, rcx)?;
    a.add(rsi, r10)?;
    a.add(rax, rcx)?;
    a.and(eax, words - 1)?;
    a.mov(qword_ptr(rax * 8 + BUF), rsi)?;
    a.add(rcx, 1)?;
    a.cmp(rcx, rdi)?;
    a.jne(next)?;
    a.mov(rax, rsi)?;
    a.ret()
}

/// Loads and stores in order: 16 MiB in words of eight bytes.
fn copy(a: &mut CodeAssembler) -> Result {
    let words = 2 << 20;
    let [mut fill, mut again, mut word] = std::array::from_fn(|_| a.create_label());
    a.xor(eax, eax)?;
    a.set_label(&mut fill)?;
    a.mov(qword_ptr(rax * 8 + BUF), rax)?;
    a.add(rax, 1)?;
    a.cmp(rax, words)?;
    a.jne(fill)?;
    a.xor(esi, esi)?;
    a.xor(edx, edx)?;
    a.set_label(&mut again)?;
    a.xor(eax, eax)?;
    a.set_label(&mut word)?;
    a.mov(rcx, qword_ptr(rax * 8 + BUF))?;
    a.add(rcx, rdx)?;
    a.mov(qword_ptr(rax * 8 + BUF2), rcx)?;
    a.add(rax, 1)?;
    a.cmp(rax, words)?;
    a.jne(word)?;
    a.add(rsi, qword_ptr(rdx * 8 + BUF2))?;
    a.add(rdx, 1)?;
    a.cmp(rdx, rdi)?;
    a.jne(again)?;
    a.mov(rax, rsi)?;
    a.ret()
}

/// String instructions: REP MOVSB and REP STOSQ over 16 MiB.
fn rep(a: &mut CodeAssembler) -> Result {
    let mut again = a.create_label();
    a.mov(r8, rdi)?;
    a.xor(edx, edx)?;
    a.xor(r9d, r9d)?;
    a.cld()?;
    a.set_label(&mut again)?;
    a.mov(esi, BUF as u32)?;
    a.mov(edi, BUF2 as u32)?;
    a.mov(ecx, 16 << 20)?;
    a.rep().movsb()?;
    a.mov(edi, BUF as u32)?;
    a.mov(ecx, 2 << 20)?;
    a.mov(rax, rdx)?;
    a.rep().stosq()?;
    a.add(r9, qword_ptr(rdx * 8 + BUF2))?;
    a.add(rdx, 1)?;
    a.cmp(rdx, r8)?;
    a.jne(again)?;
    a.mov(rax, r9)?;
    a.ret()
}

/// Branches that depend on data: quicksort of 200,000 random numbers, the smaller part by recursion.
fn sort(a: &mut CodeAssembler) -> Result {
    let items = 200_000;
    let [mut again, mut fill, mut quick] = std::array::from_fn(|_| a.create_label());
    a.mov(r12, rdi)?;
    a.xor(r13d, r13d)?;
    a.mov(r14d, 1)?;
    a.set_label(&mut again)?;
    a.xor(ecx, ecx)?;
    a.set_label(&mut fill)?;
    a.imul_3(r14d, r14d, 1_664_525)?;
    a.add(r14d, 1_013_904_223)?;
    a.mov(dword_ptr(rcx * 4 + BUF), r14d)?;
    a.add(rcx, 1)?;
    a.cmp(rcx, items)?;
    a.jne(fill)?;
    a.xor(esi, esi)?;
    a.mov(edx, items - 1)?;
    a.call(quick)?;
    // The two are added as they are, in 32 bits, and then to the sum.
    a.mov(eax, dword_ptr(BUF + 4 * 1000))?;
    a.add(eax, dword_ptr(BUF + 4 * 199_000))?;
    a.add(r13, rax)?;
    a.sub(r12, 1)?;
    a.jne(again)?;
    a.mov(rax, r13)?;
    a.ret()?;
    // RSI and RDX: first and last index of what is to be sorted.
    let [mut up, mut down, mut apart, mut done] = std::array::from_fn(|_| a.create_label());
    let [mut high, mut low_done, mut high_done] = std::array::from_fn(|_| a.create_label());
    a.set_label(&mut quick)?;
    a.cmp(rsi, rdx)?;
    a.jge(done)?;
    a.lea(rax, qword_ptr(rsi + rdx))?;
    a.sar(rax, 1)?;
    a.mov(r8d, dword_ptr(rax * 4 + BUF))?;
    a.mov(rax, rsi)?;
    a.mov(rcx, rdx)?;
    a.set_label(&mut up)?;
    a.mov(r9d, dword_ptr(rax * 4 + BUF))?;
    a.add(rax, 1)?;
    a.cmp(r9d, r8d)?;
    a.jb(up)?;
    a.sub(rax, 1)?;
    a.set_label(&mut down)?;
    a.mov(r10d, dword_ptr(rcx * 4 + BUF))?;
    a.sub(rcx, 1)?;
    a.cmp(r10d, r8d)?;
    a.ja(down)?;
    a.add(rcx, 1)?;
    a.cmp(rax, rcx)?;
    a.jg(apart)?;
    a.mov(dword_ptr(rax * 4 + BUF), r10d)?;
    a.mov(dword_ptr(rcx * 4 + BUF), r9d)?;
    a.add(rax, 1)?;
    a.sub(rcx, 1)?;
    a.cmp(rax, rcx)?;
    a.jle(up)?;
    a.set_label(&mut apart)?;
    a.mov(r9, rcx)?;
    a.sub(r9, rsi)?;
    a.mov(r10, rdx)?;
    a.sub(r10, rax)?;
    a.cmp(r9, r10)?;
    a.jge(high)?;
    a.cmp(rsi, rcx)?;
    a.jge(low_done)?;
    a.push(rax)?;
    a.push(rdx)?;
    a.mov(rdx, rcx)?;
    a.call(quick)?;
    a.pop(rdx)?;
    a.pop(rax)?;
    a.set_label(&mut low_done)?;
    a.mov(rsi, rax)?;
    a.jmp(quick)?;
    a.set_label(&mut high)?;
    a.cmp(rax, rdx)?;
    a.jge(high_done)?;
    a.push(rcx)?;
    a.push(rsi)?;
    a.mov(rsi, rax)?;
    a.call(quick)?;
    a.pop(rsi)?;
    a.pop(rcx)?;
    a.set_label(&mut high_done)?;
    a.mov(rdx, rcx)?;
    a.jmp(quick)?;
    a.set_label(&mut done)?;
    a.ret()
}

/// Indirect jumps: an interpreter for a program of 16 bytes, with a jump table.
fn vm(a: &mut CodeAssembler) -> Result {
    let [mut next, mut run] = std::array::from_fn(|_| a.create_label());
    let mut cases: [CodeLabel; 8] = std::array::from_fn(|_| a.create_label());
    for (number, case) in cases.iter().enumerate() {
        a.lea(rax, qword_ptr(*case))?;
        a.mov(qword_ptr(BUF2 + 8 * number as u64), rax)?;
    }
    let program = [0, 1, 2, 3, 0, 4, 5, 1, 6, 2, 7, 0, 3, 5, 4, 1];
    a.mov(rax, u128::from_le_bytes(program) as u64)?;
    a.mov(qword_ptr(BUF), rax)?;
    a.mov(rax, (u128::from_le_bytes(program) >> 64) as u64)?;
    a.mov(qword_ptr(BUF + 8), rax)?;
    a.mov(eax, 1)?;
    a.mov(r8d, 2)?;
    a.xor(edx, edx)?;
    a.xor(esi, esi)?;
    a.jmp(run)?;
    for (number, case) in cases.iter_mut().enumerate() {
        a.set_label(case)?;
        match number {
            0 => a.add(rax, r8)?,
            1 => {
                a.mov(rcx, rax)?;
                a.shr(rcx, 3)?;
                a.xor(r8, rcx)?;
            }
            2 => a.lea(rax, qword_ptr(rax + rax * 2 + 1))?,
            3 => a.add(r8, rsi)?,
            4 => a.rol(rax, 7)?,
            5 => a.sub(r8, rax)?,
            6 => a.xor(rax, r8)?,
            _ => a.not(r8)?,
        }
        if number != 7 {
            a.jmp(next)?;
        }
    }
    a.set_label(&mut next)?;
    a.add(rdx, 1)?;
    a.add(rsi, 1)?;
    a.and(edx, 15)?;
    a.cmp(rsi, rdi)?;
    let mut end = a.create_label();
    a.je(end)?;
    a.set_label(&mut run)?;
    a.movzx(ecx, byte_ptr(rdx + BUF))?;
    a.cmp(cl, 7)?;
    a.ja(next)?;
    a.jmp(qword_ptr(rcx * 8 + BUF2))?;
    a.set_label(&mut end)?;
    a.xor(rax, r8)?;
    a.ret()
}

/// A body: place, velocity, mass.
type Body = [f64; 7];

/// The sun and its four big planets (the Computer Language Benchmarks Game, "n-body").
#[rustfmt::skip]
const BODIES: [Body; 5] = [
    [0.0, 0.0, 0.0,
        0.0, 0.0, 0.0, 39.478_417_604_357_43],
    [4.841_431_442_464_721, -1.160_320_044_027_428_4, -0.103_622_044_471_123_11,
        0.606_326_392_995_832, 2.811_986_844_916_26, -0.025_218_361_659_887_63, 0.037_693_674_870_389_49],
    [8.343_366_718_244_58, 4.124_798_564_124_305, -0.403_523_417_114_321_4,
        -1.010_774_346_178_79, 1.825_662_371_230_41, 0.008_415_761_376_584_15, 0.011_286_326_131_968_767],
    [12.894_369_562_139_131, -15.111_151_401_698_631, -0.223_307_578_892_655_73,
        1.082_791_006_441_54, 0.868_713_018_169_608, -0.010_832_637_401_363_6, 0.001_723_724_057_059_711_2],
    [15.379_697_114_850_917, -25.919_314_609_987_964, 0.179_258_772_950_371_18,
        0.979_090_732_243_898, 0.594_698_998_647_676, -0.034_755_955_504_078_104, 0.002_033_686_869_924_630_4],
];

/// Scalar doubles: five bodies attract one another.
fn nbody(a: &mut CodeAssembler) -> Result {
    let body = size_of::<Body>() as i32;
    let end = BUF as i32 + 5 * body;
    let [mut again, mut first, mut second, mut place] = std::array::from_fn(|_| a.create_label());
    for (index, value) in BODIES.iter().flatten().enumerate() {
        a.mov(rax, value.to_bits())?;
        a.mov(qword_ptr(BUF + 8 * index as u64), rax)?;
    }
    a.mov(rax, 0.01_f64.to_bits())?;
    a.movq(xmm15, rax)?;
    a.set_label(&mut again)?;
    a.mov(esi, BUF as u32)?;
    a.set_label(&mut first)?;
    a.lea(rdx, qword_ptr(rsi + body))?;
    a.set_label(&mut second)?;
    for (axis, difference) in [xmm0, xmm1, xmm2].into_iter().enumerate() {
        a.movsd_2(difference, qword_ptr(rsi + 8 * axis))?;
        a.subsd(difference, qword_ptr(rdx + 8 * axis))?;
    }
    a.movapd(xmm3, xmm0)?;
    a.mulsd(xmm3, xmm0)?;
    for difference in [xmm1, xmm2] {
        a.movapd(xmm4, difference)?;
        a.mulsd(xmm4, difference)?;
        a.addsd(xmm3, xmm4)?;
    }
    a.sqrtsd(xmm4, xmm3)?;
    a.mulsd(xmm3, xmm4)?;
    a.movapd(xmm5, xmm15)?;
    a.divsd(xmm5, xmm3)?;
    a.movsd_2(xmm6, qword_ptr(rdx + 48))?;
    a.mulsd(xmm6, xmm5)?;
    a.mulsd(xmm5, qword_ptr(rsi + 48))?;
    for (axis, difference) in [xmm0, xmm1, xmm2].into_iter().enumerate() {
        a.movapd(xmm7, difference)?;
        a.mulsd(xmm7, xmm6)?;
        a.movsd_2(xmm8, qword_ptr(rsi + 24 + 8 * axis))?;
        a.subsd(xmm8, xmm7)?;
        a.movsd_2(qword_ptr(rsi + 24 + 8 * axis), xmm8)?;
        a.mulsd(difference, xmm5)?;
        a.addsd(difference, qword_ptr(rdx + 24 + 8 * axis))?;
        a.movsd_2(qword_ptr(rdx + 24 + 8 * axis), difference)?;
    }
    a.add(rdx, body)?;
    a.cmp(rdx, end)?;
    a.jne(second)?;
    a.add(rsi, body)?;
    a.cmp(rsi, end - body)?;
    a.jne(first)?;
    a.mov(esi, BUF as u32)?;
    a.set_label(&mut place)?;
    for axis in 0..3 {
        a.movsd_2(xmm0, qword_ptr(rsi + 24 + 8 * axis))?;
        a.mulsd(xmm0, xmm15)?;
        a.addsd(xmm0, qword_ptr(rsi + 8 * axis))?;
        a.movsd_2(qword_ptr(rsi + 8 * axis), xmm0)?;
    }
    a.add(rsi, body)?;
    a.cmp(rsi, end)?;
    a.jne(place)?;
    a.sub(rdi, 1)?;
    a.jne(again)?;
    a.movsd_2(xmm0, qword_ptr(BUF))?;
    a.addsd(xmm0, qword_ptr(BUF + body as u64 + 8))?;
    a.movq(rax, xmm0)?;
    a.ret()
}

/// Packed singles: products of matrices of 128 by 128, eight columns at a time.
fn matmul(a: &mut CodeAssembler) -> Result {
    let side = 128;
    let size = 4 * side * side;
    let [left, right, product] = [BUF as i32, BUF as i32 + size, BUF as i32 + 2 * size];
    let [mut fill, mut again, mut row, mut columns, mut step] = std::array::from_fn(|_| a.create_label());
    // Multiples of a half modulo 13, of a quarter modulo 7.
    a.mov(eax, 0.5_f32.to_bits())?;
    a.movd(xmm4, eax)?;
    a.mov(eax, 0.25_f32.to_bits())?;
    a.movd(xmm5, eax)?;
    a.xor(ecx, ecx)?;
    a.set_label(&mut fill)?;
    for (modulus, factor, matrix) in [(13, xmm4, left), (7, xmm5, right)] {
        a.mov(eax, ecx)?;
        a.xor(edx, edx)?;
        a.mov(esi, modulus)?;
        a.div(esi)?;
        a.cvtsi2ss(xmm0, edx)?;
        a.mulss(xmm0, factor)?;
        a.movss(dword_ptr(rcx * 4 + matrix), xmm0)?;
    }
    a.add(ecx, 1)?;
    a.cmp(ecx, side * side)?;
    a.jne(fill)?;
    a.mov(eax, 1.0_f32.to_bits())?;
    a.movd(xmm8, eax)?;
    a.xorps(xmm9, xmm9)?;
    // R9: the run, R10: the same modulo 100.
    a.xor(r9d, r9d)?;
    a.xor(r10d, r10d)?;
    a.set_label(&mut again)?;
    a.xor(r8d, r8d)?;
    a.set_label(&mut row)?;
    a.xor(edx, edx)?;
    a.set_label(&mut columns)?;
    // R8: bytes to the row, RDX: bytes to the column.
    a.xorps(xmm0, xmm0)?;
    a.xorps(xmm1, xmm1)?;
    a.lea(rax, qword_ptr(r8 + left))?;
    a.lea(rcx, qword_ptr(rdx + right))?;
    a.lea(rsi, qword_ptr(rcx + size))?;
    a.set_label(&mut step)?;
    a.movss(xmm2, dword_ptr(rax))?;
    a.shufps(xmm2, xmm2, 0)?;
    a.movaps(xmm3, xmmword_ptr(rcx))?;
    a.mulps(xmm3, xmm2)?;
    a.mulps(xmm2, xmmword_ptr(rcx + 16))?;
    a.add(rax, 4)?;
    a.add(rcx, 4 * side)?;
    a.addps(xmm0, xmm3)?;
    a.addps(xmm1, xmm2)?;
    a.cmp(rcx, rsi)?;
    a.jne(step)?;
    a.lea(rax, qword_ptr(r8 + rdx))?;
    a.movaps(xmmword_ptr(rax + product), xmm0)?;
    a.movaps(xmmword_ptr(rax + product + 16), xmm1)?;
    a.add(rdx, 32)?;
    a.cmp(rdx, 4 * side)?;
    a.jne(columns)?;
    a.add(r8, 4 * side)?;
    a.cmp(r8, size)?;
    a.jne(row)?;
    a.movss(xmm0, dword_ptr(r10 * 4 + left))?;
    a.addss(xmm0, xmm8)?;
    a.movss(dword_ptr(r10 * 4 + left), xmm0)?;
    a.mov(eax, r9d)?;
    a.and(eax, 127)?;
    a.addss(xmm9, dword_ptr(rax * 4 + product))?;
    a.add(r9, 1)?;
    a.add(r10d, 1)?;
    a.xor(eax, eax)?;
    a.cmp(r10d, 100)?;
    a.cmove(r10d, eax)?;
    a.cmp(r9, rdi)?;
    a.jne(again)?;
    a.movd(eax, xmm9)?;
    a.ret()
}

/// Multiboot Specification 0.6.96, 3.1.1.
const HEADER_MAGIC: u32 = 0x1bad_b002;
/// The page of the guest's own code, in front of the programs.
const BOOT: u32 = BASE as u32 - 0x1000;
const GDT: u32 = BOOT + 0x10;
const GDT_POINTER: u32 = BOOT + 0x30;
const START: u32 = BOOT + 0x40;
const LONG: u32 = BOOT + 0x140;
/// Page tables, behind all that the programs use.
const TABLES: u32 = 0x780_0000;
/// Pages that they map, one to one, four KiB each.
const PAGES: u32 = 0x800_0000 >> 12;

/// What the guest of [`multiboot`] prints before a program, with its name behind.
pub const BEGIN: &str = "begin";
/// What it prints behind a program, with the name and the checksum in 16 hexadecimal digits.
pub const ENDED: &str = "ended";

/// A multiboot 1 kernel (ELF, 32 bits) that goes to 64-bit mode with 4 KiB pages, runs all programs, reports each on the
/// serial port `serial`, and ends by writing 0 to the port `exit`. It needs 128 MiB of RAM.
#[must_use]
pub fn multiboot(serial: u16, exit: u16) -> Vec<u8> {
    let mut image = Vec::new();
    let mut put = |address: u32, bytes: &[u8]| {
        assert!(image.len() <= (address - BOOT) as usize, "parts of the guest overlap");
        image.resize((address - BOOT) as usize, 0);
        image.extend_from_slice(bytes);
    };
    put(BOOT, &[HEADER_MAGIC, 0, 0u32.wrapping_sub(HEADER_MAGIC)].map(u32::to_le_bytes).concat());
    // Nothing, 64-bit code, data (SDM vol. 3A, 3.4.5).
    put(GDT, &[0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff_u64].map(u64::to_le_bytes).concat());
    put(GDT_POINTER, &[&[23, 0], &GDT.to_le_bytes()[..]].concat());
    put(START, &assemble(Bits::B32, START.into(), start));
    put(LONG, &assemble(Bits::B64, LONG.into(), |a| report(a, serial, exit)));
    put(BASE as u32, &flat());
    elf::executable32(BOOT, START, &image, 0)
}

/// From 32-bit protected mode without paging to 64-bit mode.
fn start(a: &mut CodeAssembler) -> Result {
    let [mut directory, mut page] = std::array::from_fn(|_| a.create_label());
    let table = |level: u32| TABLES + 0x1000 * level;
    // The upper levels are zero but for these entries, in RAM that is zero; 3 is present and writable.
    for level in 0..2 {
        a.mov(dword_ptr(u64::from(table(level))), table(level + 1) | 3)?;
    }
    a.mov(eax, table(3) | 3)?;
    a.mov(edi, table(2))?;
    a.mov(ecx, PAGES / 512)?;
    a.set_label(&mut directory)?;
    a.mov(dword_ptr(edi), eax)?;
    a.add(eax, 0x1000)?;
    a.add(edi, 8)?;
    a.sub(ecx, 1)?;
    a.jne(directory)?;
    a.mov(eax, 3)?;
    a.mov(edi, table(3))?;
    a.mov(ecx, PAGES)?;
    a.set_label(&mut page)?;
    a.mov(dword_ptr(edi), eax)?;
    a.add(eax, 0x1000)?;
    a.add(edi, 8)?;
    a.sub(ecx, 1)?;
    a.jne(page)?;
    // CR4: PAE, OSFXSR, OSXMMEXCPT.
    a.mov(eax, 1 << 5 | 1 << 9 | 1 << 10)?;
    a.mov(cr4, eax)?;
    a.mov(eax, table(0))?;
    a.mov(cr3, eax)?;
    // EFER.LME.
    a.mov(ecx, 0xc000_0080_u32)?;
    a.mov(eax, 1 << 8)?;
    a.xor(edx, edx)?;
    a.wrmsr()?;
    // CR0: PG, NE, ET, MP, PE.
    a.mov(eax, 0x8000_0033_u32)?;
    a.mov(cr0, eax)?;
    // LGDT [GDT_POINTER]; JMP FAR 8:LONG.
    let [p, l] = [GDT_POINTER, LONG].map(u32::to_le_bytes);
    a.db(&[0x0f, 0x01, 0x15, p[0], p[1], p[2], p[3]])?;
    a.db(&[0xea, l[0], l[1], l[2], l[3], 8, 0])
}

/// Runs all programs and reports them.
fn report(a: &mut CodeAssembler, serial: u16, exit: u16) -> Result {
    let [mut print, mut digits] = std::array::from_fn(|_| a.create_label());
    let mut texts = Vec::new();
    let mut say = |a: &mut CodeAssembler, text: String| {
        let label = a.create_label();
        texts.push((label, text));
        a.lea(rsi, qword_ptr(label))?;
        a.call(print)
    };
    a.mov(eax, 16)?;
    a.mov(ss, eax)?;
    a.mov(ds, eax)?;
    a.mov(es, eax)?;
    a.mov(rsp, STACK)?;
    for (number, kernel) in KERNELS.iter().enumerate() {
        say(a, format!("{BEGIN} {}\n", kernel.name))?;
        a.mov(edi, number as u32)?;
        a.mov(esi, kernel.work)?;
        a.mov(eax, BASE as u32)?;
        a.call(rax)?;
        a.mov(rbx, rax)?;
        say(a, format!("{ENDED} {} ", kernel.name))?;
        a.call(digits)?;
    }
    a.xor(eax, eax)?;
    a.mov(dx, u32::from(exit))?;
    a.out(dx, al)?;
    a.cli()?;
    a.hlt()?;
    // The digits of RBX, and the end of the line.
    let [mut digit, mut letter, mut wait, mut done] = std::array::from_fn(|_| a.create_label());
    let mut byte = a.create_label();
    a.set_label(&mut digits)?;
    a.mov(ebp, 16)?;
    a.set_label(&mut digit)?;
    a.rol(rbx, 4)?;
    a.mov(eax, ebx)?;
    a.and(eax, 15)?;
    a.add(eax, u32::from(b'0'))?;
    a.cmp(eax, u32::from(b'9'))?;
    a.jbe(letter)?;
    a.add(eax, u32::from(b'a' - b'9' - 1))?;
    a.set_label(&mut letter)?;
    a.call(byte)?;
    a.sub(ebp, 1)?;
    a.jne(digit)?;
    a.mov(eax, u32::from(b'\n'))?;
    // One byte in AL, when the transmitter is empty.
    a.set_label(&mut byte)?;
    a.mov(ecx, eax)?;
    a.mov(dx, u32::from(serial) + 5)?;
    a.set_label(&mut wait)?;
    a.in_(al, dx)?;
    a.test(al, 1 << 5)?;
    a.je(wait)?;
    a.mov(dx, u32::from(serial))?;
    a.mov(eax, ecx)?;
    a.out(dx, al)?;
    a.ret()?;
    // The text at RSI, up to a zero.
    a.set_label(&mut print)?;
    a.movzx(eax, byte_ptr(rsi))?;
    a.add(rsi, 1)?;
    a.test(eax, eax)?;
    a.je(done)?;
    a.call(byte)?;
    a.jmp(print)?;
    a.set_label(&mut done)?;
    a.ret()?;
    for (label, text) in &mut texts {
        a.set_label(label)?;
        a.db(text.as_bytes())?;
        a.db(&[0])?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guest_is_a_multiboot_kernel() {
        let file = multiboot(0x3f8, 0xf4);
        let word = |at: usize| u32::from_le_bytes(file[at..at + 4].try_into().expect("four bytes"));
        assert_eq!(word(0x1000), HEADER_MAGIC);
        assert_eq!(word(0x1000).wrapping_add(word(0x1004)).wrapping_add(word(0x1008)), 0);
        assert_eq!(&file[0x2000..], flat(), "the programs are where they are linked");
    }
}
