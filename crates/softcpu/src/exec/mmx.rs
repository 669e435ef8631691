//! MMX: the 64-bit forms of integer SIMD, MMX to SSSE3, and the moves between MMX and everything else.
//!
//! The registers are the significands of the x87 registers, and every instruction here but EMMS leaves the x87 unit with TOP 0 and all
//! registers in use (SDM vol. 3A, table "Effects of MMX Instructions on x87 FPU State"). Each of them first takes a pending x87
//! error, as #MF. Memory operands may have any alignment.

use iced_x86::{Code, Instruction, Mnemonic};

use super::form::has_memory;
use super::sse_int::{mmx_and_xmm, shifts, table};
use super::sse_mov::store_masked;
use super::{Exec, Form, Handler, Op};
use crate::core::Core;
use crate::exception::Exception;
use crate::simd;

/// FSW: an unmasked error is pending.
const FSW_ES: u16 = 1 << 7;
/// FSW: TOP.
const FSW_TOP: u16 = 7 << 11;

/// Takes a pending x87 error.
#[inline(always)]
fn begin(cpu: &mut Core) -> Exec {
    if cpu.st.x87.fsw & FSW_ES != 0 { cpu.raise(Exception::Mf) } else { Ok(()) }
}

/// Leaves the x87 unit as every MMX instruction does; only when nothing can fail any more.
#[inline(always)]
fn end(cpu: &mut Core) -> Exec {
    cpu.st.x87.fsw &= !FSW_TOP;
    cpu.st.x87.valid = 0xff;
    Ok(())
}

/// The register and the memory form of an instruction that reads MMX or memory and writes MMX.
macro_rules! mmx {
    ($width:ty, |$op:ident, $a:ident, $b:ident| $result:expr) => {{
        fn handler<const M: bool>(cpu: &mut Core, $op: &Op) -> Exec {
            begin(cpu)?;
            let $b = if M { u64::from(cpu.load::<$width>($op)?) } else { cpu.mmx($op.s) };
            let $a = cpu.mmx($op.d);
            cpu.set_mmx($op.d, $result);
            end(cpu)
        }
        [handler::<false> as Handler, handler::<true>]
    }};
    ($f:ident) => {
        mmx!(u64, |op, a, b| simd::$f(a, b))
    };
}

/// A shift in place by an immediate.
macro_rules! shift_by_immediate {
    ($f:ident) => {{
        fn handler(cpu: &mut Core, op: &Op) -> Exec {
            begin(cpu)?;
            let result = simd::$f(cpu.mmx(op.d), u64::from(op.imm as u8));
            cpu.set_mmx(op.d, result);
            end(cpu)
        }
        handler as Handler
    }};
}

/// MOVD and MOVQ from a general register or memory.
macro_rules! from_general {
    ($width:ty) => {{
        fn handler<const M: bool>(cpu: &mut Core, op: &Op) -> Exec {
            begin(cpu)?;
            let value = if M { u64::from(cpu.load::<$width>(op)?) } else { cpu.reg::<$width>(op.s) };
            cpu.set_mmx(op.d, value);
            end(cpu)
        }
        [handler::<false> as Handler, handler::<true>]
    }};
}

/// MOVD, MOVQ and MOVNTQ to a general register (zero-extended) or memory.
macro_rules! to_general {
    ($width:ty) => {{
        fn handler<const M: bool>(cpu: &mut Core, op: &Op) -> Exec {
            begin(cpu)?;
            let value = cpu.mmx(op.s) as $width;
            if M {
                cpu.store(op, value)?;
            } else {
                cpu.set_reg::<u64>(op.d, value.into());
            }
            end(cpu)
        }
        [handler::<false> as Handler, handler::<true>]
    }};
}

/// The handler of an instruction on MMX registers alone.
pub(crate) fn lower(insn: &Instruction) -> Option<Handler> {
    if insn.mnemonic() == Mnemonic::Emms {
        return Some(emms);
    }
    let forms = match moves(insn.code()) {
        Some(forms) => forms,
        None if !insn.op0_register().is_mm() => return None,
        None if Form::of(insn) == Form::RegImm => {
            return Some(shifts!(table!(insn.mnemonic(), shift_by_immediate, { _ => return None })));
        }
        None => operations(insn.mnemonic())?,
    };
    Some(forms[usize::from(has_memory(insn))])
}

/// The handler of a move between MMX and XMM registers, which needs what SSE needs.
pub(crate) fn lower_mixed(insn: &Instruction) -> Option<Handler> {
    match insn.code() {
        Code::Movq2dq_xmm_mm => Some(movq2dq),
        Code::Movdq2q_mm_xmm => Some(movdq2q),
        _ => None,
    }
}

fn operations(mnemonic: Mnemonic) -> Option<[Handler; 2]> {
    Some(shifts!(table!(mnemonic, mmx, {
        // These read only half of the operand that they have in memory.
        Mnemonic::Punpcklbw => mmx!(u32, |op, a, b| simd::punpcklbw(a, b)),
        Mnemonic::Punpcklwd => mmx!(u32, |op, a, b| simd::punpcklwd(a, b)),
        Mnemonic::Punpckldq => mmx!(u32, |op, a, b| simd::punpckldq(a, b)),
        Mnemonic::Pabsb => mmx!(u64, |op, _a, b| simd::pabsb(b)),
        Mnemonic::Pabsw => mmx!(u64, |op, _a, b| simd::pabsw(b)),
        Mnemonic::Pabsd => mmx!(u64, |op, _a, b| simd::pabsd(b)),
        Mnemonic::Pshufw => mmx!(u64, |op, _a, b| simd::pshufw(b, op.imm as u8)),
        Mnemonic::Palignr => mmx!(u64, |op, a, b| simd::palignr(a, b, op.imm as u8)),
        _ => return arithmetic(mnemonic),
    })))
}

fn arithmetic(mnemonic: Mnemonic) -> Option<[Handler; 2]> {
    Some(mmx_and_xmm!(table!(mnemonic, mmx, { _ => return None })))
}

fn moves(code: Code) -> Option<[Handler; 2]> {
    Some(match code {
        Code::Movq_mm_mmm64 => mmx!(u64, |op, _a, b| b),
        Code::Movq_mmm64_mm => [mmx!(u64, |op, _a, b| b)[0], to_general!(u64)[1]],
        Code::Movd_mm_rm32 => from_general!(u32),
        Code::Movq_mm_rm64 => from_general!(u64),
        Code::Movd_rm32_mm => to_general!(u32),
        Code::Movq_rm64_mm | Code::Movntq_m64_mm => to_general!(u64),
        Code::Pinsrw_mm_r32m16_imm8 | Code::Pinsrw_mm_r64m16_imm8 => [pinsrw::<false>, pinsrw::<true>],
        // No memory forms.
        Code::Pextrw_r32_mm_imm8 | Code::Pextrw_r64_mm_imm8 => [pextrw; 2],
        Code::Pmovmskb_r32_mm | Code::Pmovmskb_r64_mm => [pmovmskb; 2],
        Code::Maskmovq_rDI_mm_mm => [maskmovq; 2],
        _ => return None,
    })
}

fn pinsrw<const M: bool>(cpu: &mut Core, op: &Op) -> Exec {
    begin(cpu)?;
    let lane = if M { cpu.load::<u16>(op)? } else { cpu.reg::<u16>(op.s) as u16 };
    let result = simd::insert::<u16, u64>(cpu.mmx(op.d), op.imm as u8, lane);
    cpu.set_mmx(op.d, result);
    end(cpu)
}

fn pextrw(cpu: &mut Core, op: &Op) -> Exec {
    begin(cpu)?;
    let lane = simd::extract::<u16, u64>(cpu.mmx(op.s), op.imm as u8);
    cpu.set_reg::<u32>(op.d, lane.into());
    end(cpu)
}

fn pmovmskb(cpu: &mut Core, op: &Op) -> Exec {
    begin(cpu)?;
    let mask = simd::pmovmskb(cpu.mmx(op.s));
    cpu.set_reg::<u32>(op.d, mask.into());
    end(cpu)
}

/// MASKMOVQ: the operands are numbered behind the implicit memory operand.
fn maskmovq(cpu: &mut Core, op: &Op) -> Exec {
    begin(cpu)?;
    let (data, mask) = (cpu.mmx(op.s), simd::pmovmskb(cpu.mmx(op.d)));
    store_masked(cpu, op, &data.to_le_bytes(), mask)?;
    end(cpu)
}

fn movq2dq(cpu: &mut Core, op: &Op) -> Exec {
    begin(cpu)?;
    let value = cpu.mmx(op.s);
    cpu.set_xmm(op.d, value.into());
    end(cpu)
}

fn movdq2q(cpu: &mut Core, op: &Op) -> Exec {
    begin(cpu)?;
    let value = cpu.xmm(op.s) as u64;
    cpu.set_mmx(op.d, value);
    end(cpu)
}

fn emms(cpu: &mut Core, _: &Op) -> Exec {
    begin(cpu)?;
    cpu.st.x87.fsw &= !FSW_TOP;
    cpu.st.x87.valid = 0;
    Ok(())
}
