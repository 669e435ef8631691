//! Moves, shuffles, blends, inserts, extracts and bitwise logic on XMM registers, whatever type the name of the instruction gives the bits.
//!
//! Nothing here computes with floating-point values or touches MXCSR. Which moves want an aligned operand is in the
//! table of [`lower`]: the manual's "Type 1" instructions and the 16-byte operands of "Type 4".

use iced_x86::{Code, Instruction, Mnemonic};

use super::form::has_memory;
use super::thread::{self, Thread};
use super::{AM_16, AM_32, Exec, Handler, Leave, Op};
use crate::core::Core;
use crate::simd;

const LOW64: u128 = u64::MAX as u128;
const LOW32: u128 = u32::MAX as u128;

/// The source operand, 16 bytes, aligned.
#[inline(always)]
fn source<const M: bool>(cpu: &mut Core, op: &Op) -> Exec<u128> {
    if M { cpu.load_aligned(op) } else { Ok(cpu.xmm(op.s)) }
}

/// The register and the memory form of an instruction that reads XMM or memory and writes XMM: `b` is the source (of
/// `$width` bytes' type in memory, of any alignment; or 16 aligned bytes), `a` the destination's old value.
macro_rules! to_xmm {
    (aligned, |$op:ident, $a:ident, $b:ident| $result:expr) => {
        to_xmm!(aligned, |cpu, $op, $a, $b| $result)
    };
    (aligned, |$cpu:ident, $op:ident, $a:ident, $b:ident| $result:expr) => {{
        fn handler<const M: bool>($cpu: &mut Core, $op: &Op) -> Exec {
            let $b = source::<M>($cpu, $op)?;
            let $a = $cpu.xmm($op.d);
            let result = $result;
            $cpu.set_xmm($op.d, result);
            Ok(())
        }
        [handler::<false> as Handler, handler::<true>]
    }};
    ($width:ty, |$op:ident, $a:ident, $b:ident| $result:expr) => {{
        fn handler<const M: bool>(cpu: &mut Core, $op: &Op) -> Exec {
            let $b = if M { u128::from(cpu.load::<$width>($op)?) } else { cpu.xmm($op.s) };
            let $a = cpu.xmm($op.d);
            cpu.set_xmm($op.d, $result);
            Ok(())
        }
        [handler::<false> as Handler, handler::<true>]
    }};
}

/// The register and the memory form of a store: what the register form makes of the destination, and what is stored.
macro_rules! from_xmm {
    (|$a:ident, $b:ident| $register:expr, store $memory:expr) => {{
        fn register(cpu: &mut Core, op: &Op) -> Exec {
            let ($a, $b) = (cpu.xmm(op.d), cpu.xmm(op.s));
            cpu.set_xmm(op.d, $register);
            Ok(())
        }
        fn memory(cpu: &mut Core, op: &Op) -> Exec {
            let $b = cpu.xmm(op.s);
            cpu.store(op, $memory)
        }
        [register as Handler, memory]
    }};
    (aligned) => {{
        fn register(cpu: &mut Core, op: &Op) -> Exec {
            let b = cpu.xmm(op.s);
            cpu.set_xmm(op.d, b);
            Ok(())
        }
        fn memory(cpu: &mut Core, op: &Op) -> Exec {
            let b = cpu.xmm(op.s);
            cpu.store_aligned(op, b)
        }
        [register as Handler, memory]
    }};
}

/// Inserts a lane of a type, from a general register or memory.
macro_rules! insert {
    ($lane:ty) => {{
        fn handler<const M: bool>(cpu: &mut Core, op: &Op) -> Exec {
            let lane = if M { cpu.load::<$lane>(op)? } else { cpu.reg::<u64>(op.s) as $lane };
            let result = simd::insert::<$lane, u128>(cpu.xmm(op.d), op.imm as u8, lane);
            cpu.set_xmm(op.d, result);
            Ok(())
        }
        [handler::<false> as Handler, handler::<true>]
    }};
}

/// Extracts a lane of a type, to memory or, zero-extended, to a general register.
macro_rules! extract {
    ($lane:ty) => {{
        fn handler<const M: bool>(cpu: &mut Core, op: &Op) -> Exec {
            let lane = simd::extract::<$lane, u128>(cpu.xmm(op.s), op.imm as u8);
            if M {
                return cpu.store(op, lane);
            }
            cpu.set_reg::<u64>(op.d, lane.into());
            Ok(())
        }
        [handler::<false> as Handler, handler::<true>]
    }};
}

/// The sign bits of lanes to a general register.
macro_rules! sign_bits {
    ($f:expr) => {{
        fn handler(cpu: &mut Core, op: &Op) -> Exec {
            let mask = $f(cpu.xmm(op.s));
            cpu.set_reg::<u32>(op.d, mask.into());
            Ok(())
        }
        // There is no memory form.
        [handler as Handler, handler]
    }};
}

/// The handler of an instruction that is of this family.
pub(crate) fn lower(insn: &Instruction) -> Option<Handler> {
    let forms = moves(insn.code()).or_else(|| shuffles(insn.mnemonic())).or_else(|| lanes(insn.code()))?;
    Some(forms[usize::from(has_memory(insn))])
}

fn moves(code: Code) -> Option<[Handler; 2]> {
    Some(match code {
        Code::Movaps_xmm_xmmm128 | Code::Movapd_xmm_xmmm128 | Code::Movdqa_xmm_xmmm128 | Code::Movntdqa_xmm_m128 => {
            to_xmm!(aligned, |op, _a, b| b)
        }
        Code::Movups_xmm_xmmm128 | Code::Movupd_xmm_xmmm128 | Code::Movdqu_xmm_xmmm128 | Code::Lddqu_xmm_m128 => {
            to_xmm!(u128, |op, _a, b| b)
        }
        Code::Movaps_xmmm128_xmm
        | Code::Movapd_xmmm128_xmm
        | Code::Movdqa_xmmm128_xmm
        | Code::Movntps_m128_xmm
        | Code::Movntpd_m128_xmm
        | Code::Movntdq_m128_xmm => from_xmm!(aligned),
        Code::Movups_xmmm128_xmm | Code::Movupd_xmmm128_xmm | Code::Movdqu_xmmm128_xmm => {
            from_xmm!(|_a, b| b, store b)
        }
        Code::Movss_xmm_xmmm32 => merge_or_load::<u32>(),
        Code::Movsd_xmm_xmmm64 => merge_or_load::<u64>(),
        Code::Movss_xmmm32_xmm => from_xmm!(|a, b| a & !LOW32 | b & LOW32, store b as u32),
        Code::Movsd_xmmm64_xmm => from_xmm!(|a, b| a & !LOW64 | b & LOW64, store b as u64),
        Code::Movq_xmm_xmmm64 => to_xmm!(u64, |op, _a, b| b & LOW64),
        Code::Movq_xmmm64_xmm => from_xmm!(|_a, b| b & LOW64, store b as u64),
        Code::Movlps_xmm_m64 | Code::Movlpd_xmm_m64 => to_xmm!(u64, |op, a, b| a & !LOW64 | b),
        Code::Movhps_xmm_m64 | Code::Movhpd_xmm_m64 => to_xmm!(u64, |op, a, b| a & LOW64 | b << 64),
        Code::Movlps_m64_xmm | Code::Movlpd_m64_xmm => from_xmm!(|_a, b| b, store b as u64),
        Code::Movhps_m64_xmm | Code::Movhpd_m64_xmm => from_xmm!(|_a, b| b, store(b >> 64) as u64),
        Code::Movhlps_xmm_xmm => to_xmm!(aligned, |op, a, b| a & !LOW64 | b >> 64),
        Code::Movlhps_xmm_xmm => to_xmm!(aligned, |op, a, b| a & LOW64 | b << 64),
        Code::Movddup_xmm_xmmm64 => to_xmm!(u64, |op, _a, b| b & LOW64 | b << 64),
        Code::Movsldup_xmm_xmmm128 => to_xmm!(aligned, |op, _a, b| simd::movsldup(b)),
        Code::Movshdup_xmm_xmmm128 => to_xmm!(aligned, |op, _a, b| simd::movshdup(b)),
        Code::Maskmovdqu_rDI_xmm_xmm => [maskmovdqu, maskmovdqu],
        _ => return None,
    })
}

fn shuffles(mnemonic: Mnemonic) -> Option<[Handler; 2]> {
    Some(match mnemonic {
        Mnemonic::Andps | Mnemonic::Andpd => to_xmm!(aligned, |op, a, b| simd::pand(a, b)),
        Mnemonic::Andnps | Mnemonic::Andnpd => to_xmm!(aligned, |op, a, b| simd::pandn(a, b)),
        Mnemonic::Orps | Mnemonic::Orpd => to_xmm!(aligned, |op, a, b| simd::por(a, b)),
        Mnemonic::Xorps | Mnemonic::Xorpd => to_xmm!(aligned, |op, a, b| simd::pxor(a, b)),
        Mnemonic::Unpcklps => to_xmm!(aligned, |op, a, b| simd::punpckldq(a, b)),
        Mnemonic::Unpckhps => to_xmm!(aligned, |op, a, b| simd::punpckhdq(a, b)),
        Mnemonic::Unpcklpd => to_xmm!(aligned, |op, a, b| simd::punpcklqdq(a, b)),
        Mnemonic::Unpckhpd => to_xmm!(aligned, |op, a, b| simd::punpckhqdq(a, b)),
        Mnemonic::Shufps => to_xmm!(aligned, |op, a, b| simd::shufps(a, b, op.imm as u8)),
        Mnemonic::Shufpd => to_xmm!(aligned, |op, a, b| simd::shufpd(a, b, op.imm as u8)),
        Mnemonic::Blendps => to_xmm!(aligned, |op, a, b| simd::blendps(a, b, op.imm as u8)),
        Mnemonic::Blendpd => to_xmm!(aligned, |op, a, b| simd::blendpd(a, b, op.imm as u8)),
        Mnemonic::Blendvps => to_xmm!(aligned, |cpu, op, a, b| simd::blendvps(a, b, cpu.xmm(0))),
        Mnemonic::Blendvpd => to_xmm!(aligned, |cpu, op, a, b| simd::blendvpd(a, b, cpu.xmm(0))),
        Mnemonic::Insertps => [insertps::<false>, insertps::<true>],
        _ => return None,
    })
}

fn lanes(code: Code) -> Option<[Handler; 2]> {
    Some(match code {
        Code::Movd_xmm_rm32 => move_from_general::<u32>(),
        Code::Movq_xmm_rm64 => move_from_general::<u64>(),
        // Lane 0, whatever immediate there is not.
        Code::Movd_rm32_xmm => extract!(u32),
        Code::Movq_rm64_xmm => extract!(u64),
        Code::Pinsrb_xmm_r32m8_imm8 | Code::Pinsrb_xmm_r64m8_imm8 => insert!(u8),
        Code::Pinsrw_xmm_r32m16_imm8 | Code::Pinsrw_xmm_r64m16_imm8 => insert!(u16),
        Code::Pinsrd_xmm_rm32_imm8 => insert!(u32),
        Code::Pinsrq_xmm_rm64_imm8 => insert!(u64),
        Code::Pextrb_r32m8_xmm_imm8 | Code::Pextrb_r64m8_xmm_imm8 => extract!(u8),
        Code::Pextrw_r32_xmm_imm8
        | Code::Pextrw_r64_xmm_imm8
        | Code::Pextrw_r32m16_xmm_imm8
        | Code::Pextrw_r64m16_xmm_imm8 => extract!(u16),
        Code::Pextrd_rm32_xmm_imm8 | Code::Extractps_rm32_xmm_imm8 | Code::Extractps_r64m32_xmm_imm8 => {
            extract!(u32)
        }
        Code::Pextrq_rm64_xmm_imm8 => extract!(u64),
        Code::Pmovmskb_r32_xmm | Code::Pmovmskb_r64_xmm => sign_bits!(simd::pmovmskb::<u128>),
        Code::Movmskps_r32_xmm | Code::Movmskps_r64_xmm => sign_bits!(simd::movmskps),
        Code::Movmskpd_r32_xmm | Code::Movmskpd_r64_xmm => sign_bits!(simd::movmskpd),
        _ => return None,
    })
}

/// MOVSS and MOVSD to a register: from a register they merge, from memory they clear the rest.
fn merge_or_load<T: crate::mem::Mem>() -> [Handler; 2]
where
    u128: From<T>,
{
    fn register<T: crate::mem::Mem>(cpu: &mut Core, op: &Op) -> Exec {
        let low = u128::MAX >> (128 - 8 * T::SIZE);
        let result = cpu.xmm(op.d) & !low | cpu.xmm(op.s) & low;
        cpu.set_xmm(op.d, result);
        Ok(())
    }
    [register::<T>, load::<T>]
}

/// A load that clears the rest of the register.
fn load<T: crate::mem::Mem>(cpu: &mut Core, op: &Op) -> Exec
where
    u128: From<T>,
{
    let value = cpu.load::<T>(op)?;
    cpu.set_xmm(op.d, value.into());
    Ok(())
}

/// MOVD and MOVQ from a general register or memory.
fn move_from_general<T: crate::mem::Mem + super::form::Word>() -> [Handler; 2]
where
    u128: From<T>,
{
    fn register<T: super::form::Word>(cpu: &mut Core, op: &Op) -> Exec {
        let value = cpu.reg::<T>(op.s);
        cpu.set_xmm(op.d, value.into());
        Ok(())
    }
    [register::<T>, load::<T>]
}

/// INSERTPS: only the register form chooses a lane of the source (`imm[7:6]`).
fn insertps<const M: bool>(cpu: &mut Core, op: &Op) -> Exec {
    let imm = op.imm as u8;
    let lane = if M { cpu.load(op)? } else { simd::extract::<u32, u128>(cpu.xmm(op.s), imm >> 6) };
    let result = simd::insertps(cpu.xmm(op.d), lane, imm);
    cpu.set_xmm(op.d, result);
    Ok(())
}

/// MASKMOVDQU: the operands are numbered behind the implicit memory operand.
fn maskmovdqu(cpu: &mut Core, op: &Op) -> Exec {
    let (data, mask) = (cpu.xmm(op.s), simd::pmovmskb(cpu.xmm(op.d)));
    store_masked(cpu, op, &data.to_le_bytes(), mask)
}

/// Stores the bytes of `data` whose bits in `mask` are set at DS:rDI. No other byte is accessed, so none other can fault;
/// all are checked before the first is stored.
pub(super) fn store_masked(cpu: &mut Core, op: &Op, data: &[u8], mask: u32) -> Exec {
    let offset = cpu.reg::<u64>(7);
    let mut places = [0u64; 16];
    for (at, length) in runs(mask) {
        let offset = cut(op, offset.wrapping_add(at as u64));
        places[at] = cpu.segmented(op, offset, length as u64, true)?;
        cpu.probe_write(places[at], length as u64)?;
    }
    for (at, length) in runs(mask) {
        cpu.write_bytes(cpu.set, places[at], &data[at..at + length])?;
    }
    Ok(())
}

/// The runs of ones of a mask of at most 16 bits: where each begins, and how long it is.
fn runs(mut mask: u32) -> impl Iterator<Item = (usize, usize)> {
    std::iter::from_fn(move || {
        (mask != 0).then(|| {
            let start = mask.trailing_zeros();
            let length = (mask >> start).trailing_ones();
            mask &= !(((1 << length) - 1) << start);
            (start as usize, length as usize)
        })
    })
}

/// Cuts an offset to the address size.
fn cut(op: &Op, offset: u64) -> u64 {
    if op.am & AM_32 != 0 {
        offset & 0xffff_ffff
    } else if op.am & AM_16 != 0 {
        offset & 0xffff
    } else {
        offset
    }
}

// The frequent ones as threads; see there.

/// A load of a type, which clears the rest of the register.
fn quick_load<T: crate::mem::Mem, const ALIGNED: bool>(cpu: &mut Core, op: &Op, rest: &[Op]) -> Leave
where
    u128: From<T>,
{
    match cpu.hit_load::<T, ALIGNED>(op) {
        Some(value) => {
            cpu.set_xmm(op.d, value.into());
            thread::next(cpu, rest)
        }
        None => thread::plain(cpu, op, rest),
    }
}

fn quick_store16<const ALIGNED: bool>(cpu: &mut Core, op: &Op, rest: &[Op]) -> Leave {
    let done = cpu.hit_store::<u128, ALIGNED>(op, cpu.xmm(op.s));
    thread::done(cpu, op, rest, done)
}

fn quick_store8(cpu: &mut Core, op: &Op, rest: &[Op]) -> Leave {
    let done = cpu.hit_store::<u64, false>(op, cpu.xmm(op.s) as u64);
    thread::done(cpu, op, rest, done)
}

fn quick_store4(cpu: &mut Core, op: &Op, rest: &[Op]) -> Leave {
    let done = cpu.hit_store::<u32, false>(op, cpu.xmm(op.s) as u32);
    thread::done(cpu, op, rest, done)
}

/// What register and register make, neither being memory.
macro_rules! of_registers {
    (|$op:ident, $a:ident, $b:ident| $result:expr) => {{
        fn quick(cpu: &mut Core, $op: &Op, rest: &[Op]) -> Leave {
            let ($a, $b) = (cpu.xmm($op.d), cpu.xmm($op.s));
            cpu.set_xmm($op.d, $result);
            thread::next(cpu, rest)
        }
        quick as Thread
    }};
}

/// See `thread::of`.
pub(super) fn thread(insn: &Instruction) -> Option<Thread> {
    let memory = has_memory(insn);
    Some(match insn.code() {
        Code::Movaps_xmm_xmmm128 | Code::Movapd_xmm_xmmm128 | Code::Movdqa_xmm_xmmm128 if memory => {
            quick_load::<u128, true>
        }
        Code::Movups_xmm_xmmm128 | Code::Movupd_xmm_xmmm128 | Code::Movdqu_xmm_xmmm128 if memory => {
            quick_load::<u128, false>
        }
        Code::Movss_xmm_xmmm32 if memory => quick_load::<u32, false>,
        Code::Movsd_xmm_xmmm64 | Code::Movq_xmm_xmmm64 if memory => quick_load::<u64, false>,
        Code::Movaps_xmmm128_xmm | Code::Movapd_xmmm128_xmm | Code::Movdqa_xmmm128_xmm if memory => {
            quick_store16::<true>
        }
        Code::Movups_xmmm128_xmm | Code::Movupd_xmmm128_xmm | Code::Movdqu_xmmm128_xmm if memory => {
            quick_store16::<false>
        }
        Code::Movsd_xmmm64_xmm | Code::Movq_xmmm64_xmm if memory => quick_store8,
        Code::Movss_xmmm32_xmm if memory => quick_store4,
        _ if memory => return None,
        Code::Movaps_xmm_xmmm128
        | Code::Movapd_xmm_xmmm128
        | Code::Movdqa_xmm_xmmm128
        | Code::Movups_xmm_xmmm128
        | Code::Movupd_xmm_xmmm128
        | Code::Movdqu_xmm_xmmm128 => of_registers!(|op, _a, b| b),
        Code::Movlhps_xmm_xmm => of_registers!(|op, a, b| a & LOW64 | b << 64),
        Code::Movhlps_xmm_xmm => of_registers!(|op, a, b| a & !LOW64 | b >> 64),
        Code::Xorps_xmm_xmmm128 | Code::Xorpd_xmm_xmmm128 | Code::Pxor_xmm_xmmm128 => of_registers!(|op, a, b| a ^ b),
        Code::Andps_xmm_xmmm128 | Code::Andpd_xmm_xmmm128 | Code::Pand_xmm_xmmm128 => of_registers!(|op, a, b| a & b),
        Code::Shufps_xmm_xmmm128_imm8 => of_registers!(|op, a, b| simd::shufps(a, b, op.imm as u8)),
        Code::Unpcklps_xmm_xmmm128 => of_registers!(|op, a, b| simd::punpckldq(a, b)),
        Code::Unpcklpd_xmm_xmmm128 => of_registers!(|op, a, b| simd::punpcklqdq(a, b)),
        Code::Unpckhpd_xmm_xmmm128 => of_registers!(|op, a, b| simd::punpckhqdq(a, b)),
        _ => return None,
    })
}
