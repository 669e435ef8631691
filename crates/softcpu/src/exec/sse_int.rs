//! Integer SIMD on XMM registers: SSE2 to SSE4.2, AES, PCLMULQDQ, SHA; and CRC32, which came with SSE4.2 but is on general registers.
//!
//! What is computed is in [`crate::simd`]; here is where operands come from. A memory operand of 16 bytes must be aligned
//! (#GP(0), SDM vol. 2, table "Type 4 Class Exception Conditions"), the string comparisons' excepted; narrower ones need not be.

use iced_x86::{Code, Instruction, Mnemonic};

use super::form::{Word, has_memory};
use super::{Exec, Form, Handler, Op};
use crate::core::Core;
use crate::flags::Flags;
use crate::simd::{self, StringCompare};
use crate::state::rflags;

/// The instructions of two operands that exist on MMX and on XMM registers, with what they compute. Calls the macro `$then`
/// with the list, so that it is written once.
macro_rules! mmx_and_xmm {
    ($then:ident!($($arguments:tt)*)) => {
        $then! { $($arguments)*
            Paddb paddb, Paddw paddw, Paddd paddd, Paddq paddq, Psubb psubb, Psubw psubw, Psubd psubd, Psubq psubq,
            Paddsb paddsb, Paddsw paddsw, Psubsb psubsb, Psubsw psubsw, Paddusb paddusb, Paddusw paddusw,
            Psubusb psubusb, Psubusw psubusw, Pavgb pavgb, Pavgw pavgw, Pminub pminub, Pminsw pminsw, Pmaxub pmaxub,
            Pmaxsw pmaxsw, Pcmpeqb pcmpeqb, Pcmpeqw pcmpeqw, Pcmpeqd pcmpeqd, Pcmpgtb pcmpgtb, Pcmpgtw pcmpgtw,
            Pcmpgtd pcmpgtd, Pmullw pmullw, Pmulhw pmulhw, Pmulhuw pmulhuw, Pmuludq pmuludq, Pmaddwd pmaddwd,
            Psadbw psadbw, Pand pand, Pandn pandn, Por por, Pxor pxor, Packsswb packsswb, Packssdw packssdw,
            Packuswb packuswb, Punpckhbw punpckhbw, Punpckhwd punpckhwd, Punpckhdq punpckhdq, Pmulhrsw pmulhrsw,
            Psignb psignb, Psignw psignw, Psignd psignd, Pmaddubsw pmaddubsw, Phaddw phaddw, Phaddd phaddd,
            Phaddsw phaddsw, Phsubw phsubw, Phsubd phsubd, Phsubsw phsubsw, Pshufb pshufb
        }
    };
}

/// The shifts by a count, as [`mmx_and_xmm`].
macro_rules! shifts {
    ($then:ident!($($arguments:tt)*)) => {
        $then! { $($arguments)*
            Psllw psllw, Pslld pslld, Psllq psllq, Psrlw psrlw, Psrld psrld, Psrlq psrlq, Psraw psraw, Psrad psrad
        }
    };
}

pub(super) use {mmx_and_xmm, shifts};

/// The source operand, 16 bytes.
#[inline(always)]
fn source<const M: bool>(cpu: &mut Core, op: &Op) -> Exec<u128> {
    if M { cpu.load_aligned(op) } else { Ok(cpu.xmm(op.s)) }
}

/// The register and the memory form of `op0 = f(op0, op1)`; the operation may look at the immediate and at the CPU.
macro_rules! xmm {
    (|$cpu:ident, $op:ident, $a:ident, $b:ident| $result:expr) => {{
        fn handler<const M: bool>($cpu: &mut Core, $op: &Op) -> Exec {
            let $b = source::<M>($cpu, $op)?;
            let $a = $cpu.xmm($op.d);
            let result = $result;
            $cpu.set_xmm($op.d, result);
            Ok(())
        }
        [handler::<false> as Handler, handler::<true>]
    }};
    // Two operands.
    ($f:ident) => {
        xmm!(|cpu, op, a, b| simd::$f(a, b))
    };
    // Two operands and an immediate.
    ($f:ident, imm) => {
        xmm!(|cpu, op, a, b| simd::$f(a, b, op.imm as u8))
    };
    // The destination is only written.
    ($f:ident, from source) => {
        xmm!(|cpu, op, _a, b| simd::$f(b))
    };
    ($f:ident, from source, imm) => {
        xmm!(|cpu, op, _a, b| simd::$f(b, op.imm as u8))
    };
    // XMM0 is the third operand.
    ($f:ident, xmm0) => {
        xmm!(|cpu, op, a, b| simd::$f(a, b, cpu.xmm(0)))
    };
    // The memory operand is narrow, and of any alignment.
    ($f:ident, narrow $width:ty) => {{
        fn handler<const M: bool>(cpu: &mut Core, op: &Op) -> Exec {
            let b = if M { u128::from(cpu.load::<$width>(op)?) } else { cpu.xmm(op.s) };
            cpu.set_xmm(op.d, simd::$f(b));
            Ok(())
        }
        [handler::<false> as Handler, handler::<true>]
    }};
}

/// A shift by the low half of the source operand.
macro_rules! shift_by_operand {
    ($f:ident) => {
        xmm!(|cpu, op, a, b| simd::$f(a, b as u64))
    };
}

/// A shift in place by an immediate.
macro_rules! shift_by_immediate {
    ($f:ident) => {{
        fn handler(cpu: &mut Core, op: &Op) -> Exec {
            let result = simd::$f(cpu.xmm(op.d), (op.imm as u8).into());
            cpu.set_xmm(op.d, result);
            Ok(())
        }
        handler as Handler
    }};
}

/// `match mnemonic` with arms for a list of mnemonics and functions, each given to a macro, and further arms.
macro_rules! table {
    ($mnemonic:expr, $make:ident, { $($own:tt)* } $($name:ident $f:ident),*) => {
        match $mnemonic {
            $(Mnemonic::$name => $make!($f),)*
            $($own)*
        }
    };
}

pub(super) use table;

/// The handler of an instruction that is of this family.
pub(crate) fn lower(insn: &Instruction) -> Option<Handler> {
    if !insn.op0_register().is_xmm() {
        return None;
    }
    if Form::of(insn) == Form::RegImm {
        return Some(shifts!(table!(insn.mnemonic(), shift_by_immediate, {
            Mnemonic::Pslldq => shift_by_immediate!(pslldq),
            Mnemonic::Psrldq => shift_by_immediate!(psrldq),
            _ => return None,
        })));
    }
    let forms = shifts!(table!(insn.mnemonic(), shift_by_operand, {
        _ => arithmetic(insn.mnemonic()).or_else(|| other(insn.mnemonic()))?,
    }));
    Some(forms[usize::from(has_memory(insn))])
}

fn arithmetic(mnemonic: Mnemonic) -> Option<[Handler; 2]> {
    Some(mmx_and_xmm!(table!(mnemonic, xmm, {
        Mnemonic::Punpcklbw => xmm!(punpcklbw),
        Mnemonic::Punpcklwd => xmm!(punpcklwd),
        Mnemonic::Punpckldq => xmm!(punpckldq),
        Mnemonic::Punpcklqdq => xmm!(punpcklqdq),
        Mnemonic::Punpckhqdq => xmm!(punpckhqdq),
        Mnemonic::Pminuw => xmm!(pminuw),
        Mnemonic::Pminud => xmm!(pminud),
        Mnemonic::Pminsb => xmm!(pminsb),
        Mnemonic::Pminsd => xmm!(pminsd),
        Mnemonic::Pmaxuw => xmm!(pmaxuw),
        Mnemonic::Pmaxud => xmm!(pmaxud),
        Mnemonic::Pmaxsb => xmm!(pmaxsb),
        Mnemonic::Pmaxsd => xmm!(pmaxsd),
        Mnemonic::Pcmpeqq => xmm!(pcmpeqq),
        Mnemonic::Pcmpgtq => xmm!(pcmpgtq),
        Mnemonic::Pmulld => xmm!(pmulld),
        Mnemonic::Pmuldq => xmm!(pmuldq),
        Mnemonic::Packusdw => xmm!(packusdw),
        Mnemonic::Pabsb => xmm!(pabsb, from source),
        Mnemonic::Pabsw => xmm!(pabsw, from source),
        Mnemonic::Pabsd => xmm!(pabsd, from source),
        Mnemonic::Phminposuw => xmm!(phminposuw, from source),
        Mnemonic::Mpsadbw => xmm!(mpsadbw, imm),
        _ => return None,
    })))
}

fn other(mnemonic: Mnemonic) -> Option<[Handler; 2]> {
    Some(match mnemonic {
        Mnemonic::Pshufd => xmm!(pshufd, from source, imm),
        Mnemonic::Pshuflw => xmm!(pshuflw, from source, imm),
        Mnemonic::Pshufhw => xmm!(pshufhw, from source, imm),
        Mnemonic::Palignr => xmm!(palignr, imm),
        Mnemonic::Pblendw => xmm!(pblendw, imm),
        Mnemonic::Pblendvb => xmm!(pblendvb, xmm0),
        Mnemonic::Pmovsxbw => xmm!(pmovsxbw, narrow u64),
        Mnemonic::Pmovsxbd => xmm!(pmovsxbd, narrow u32),
        Mnemonic::Pmovsxbq => xmm!(pmovsxbq, narrow u16),
        Mnemonic::Pmovsxwd => xmm!(pmovsxwd, narrow u64),
        Mnemonic::Pmovsxwq => xmm!(pmovsxwq, narrow u32),
        Mnemonic::Pmovsxdq => xmm!(pmovsxdq, narrow u64),
        Mnemonic::Pmovzxbw => xmm!(pmovzxbw, narrow u64),
        Mnemonic::Pmovzxbd => xmm!(pmovzxbd, narrow u32),
        Mnemonic::Pmovzxbq => xmm!(pmovzxbq, narrow u16),
        Mnemonic::Pmovzxwd => xmm!(pmovzxwd, narrow u64),
        Mnemonic::Pmovzxwq => xmm!(pmovzxwq, narrow u32),
        Mnemonic::Pmovzxdq => xmm!(pmovzxdq, narrow u64),
        Mnemonic::Ptest => [ptest::<false>, ptest::<true>],
        Mnemonic::Pcmpistri => [pcmpistr::<false, false>, pcmpistr::<true, false>],
        Mnemonic::Pcmpistrm => [pcmpistr::<false, true>, pcmpistr::<true, true>],
        Mnemonic::Pcmpestri => [pcmpestr::<false, false, false>, pcmpestr::<true, false, false>],
        Mnemonic::Pcmpestrm => [pcmpestr::<false, true, false>, pcmpestr::<true, true, false>],
        Mnemonic::Pcmpestri64 => [pcmpestr::<false, false, true>, pcmpestr::<true, false, true>],
        Mnemonic::Pcmpestrm64 => [pcmpestr::<false, true, true>, pcmpestr::<true, true, true>],
        Mnemonic::Aesenc => xmm!(aesenc),
        Mnemonic::Aesenclast => xmm!(aesenclast),
        Mnemonic::Aesdec => xmm!(aesdec),
        Mnemonic::Aesdeclast => xmm!(aesdeclast),
        Mnemonic::Aesimc => xmm!(aesimc, from source),
        Mnemonic::Aeskeygenassist => xmm!(aeskeygenassist, from source, imm),
        Mnemonic::Pclmulqdq => xmm!(pclmulqdq, imm),
        Mnemonic::Sha1rnds4 => xmm!(sha1rnds4, imm),
        Mnemonic::Sha1nexte => xmm!(sha1nexte),
        Mnemonic::Sha1msg1 => xmm!(sha1msg1),
        Mnemonic::Sha1msg2 => xmm!(sha1msg2),
        Mnemonic::Sha256rnds2 => xmm!(sha256rnds2, xmm0),
        Mnemonic::Sha256msg1 => xmm!(sha256msg1),
        Mnemonic::Sha256msg2 => xmm!(sha256msg2),
        _ => return None,
    })
}

fn ptest<const M: bool>(cpu: &mut Core, op: &Op) -> Exec {
    let b = source::<M>(cpu, op)?;
    let (zf, cf) = simd::ptest(cpu.xmm(op.d), b);
    let bits = if zf { rflags::ZF } else { 0 } | if cf { rflags::CF } else { 0 };
    cpu.fl = Flags::from_bits(bits);
    Ok(())
}

/// Implicit lengths; `MASK` for the form that answers in XMM0 rather than ECX.
fn pcmpistr<const M: bool, const MASK: bool>(cpu: &mut Core, op: &Op) -> Exec {
    let b = if M { cpu.load(op)? } else { cpu.xmm(op.s) };
    let result = simd::pcmpistr(cpu.xmm(op.d), b, op.imm as u8);
    finish_string::<MASK>(cpu, result)
}

/// Lengths in EAX and EDX, or with `WIDE` (REX.W) in RAX and RDX.
fn pcmpestr<const M: bool, const MASK: bool, const WIDE: bool>(cpu: &mut Core, op: &Op) -> Exec {
    let b = if M { cpu.load(op)? } else { cpu.xmm(op.s) };
    let length = |register: u64| if WIDE { register as i64 } else { i64::from(register as i32) };
    let (first, second) = (length(cpu.reg::<u64>(0)), length(cpu.reg::<u64>(2)));
    let result = simd::pcmpestr(cpu.xmm(op.d), first, b, second, op.imm as u8);
    finish_string::<MASK>(cpu, result)
}

fn finish_string<const MASK: bool>(cpu: &mut Core, result: StringCompare) -> Exec {
    if MASK {
        cpu.set_xmm(0, result.mask);
    } else {
        cpu.set_reg::<u32>(1, result.index.into());
    }
    let bits = [(result.cf, rflags::CF), (result.zf, rflags::ZF), (result.sf, rflags::SF), (result.of, rflags::OF)];
    let bits = bits.into_iter().fold(0, |bits, (on, flag)| if on { bits | flag } else { bits });
    cpu.fl = Flags::from_bits(bits);
    Ok(())
}

/// The handler of CRC32, which needs nothing to be enabled.
pub(crate) fn lower_crc32(insn: &Instruction) -> Option<Handler> {
    let forms: [Handler; 2] = match insn.code() {
        Code::Crc32_r32_rm8 | Code::Crc32_r64_rm8 => [crc32::<u8, false>, crc32::<u8, true>],
        Code::Crc32_r32_rm16 => [crc32::<u16, false>, crc32::<u16, true>],
        Code::Crc32_r32_rm32 => [crc32::<u32, false>, crc32::<u32, true>],
        Code::Crc32_r64_rm64 => [crc32::<u64, false>, crc32::<u64, true>],
        _ => return None,
    };
    Some(forms[usize::from(has_memory(insn))])
}

fn crc32<T: Word, const M: bool>(cpu: &mut Core, op: &Op) -> Exec {
    let data = if M { cpu.load_word::<T>(op)? } else { cpu.reg::<T>(op.s) };
    let crc = simd::crc32(cpu.reg::<u32>(op.d) as u32, &data.to_le_bytes()[..T::BYTES as usize]);
    cpu.set_reg::<u32>(op.d, crc.into());
    Ok(())
}
