//! Moves of integers: MOV, MOVZX, MOVSX, LEA, XCHG, CMOVcc, SETcc, sign extension, BSWAP, MOVBE, XLAT, LAHF, SAHF, and the exchanges with
//! memory: XADD, CMPXCHG, CMPXCHG8B and CMPXCHG16B.

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

use super::alu::condition_number;
use super::form::{Word, by_size, has_memory, number, size0};
use super::thread::{self, Thread, thread_by_size};
use super::{Exec, Form, Handler, Leave, Op};
use crate::core::Core;
use crate::exception::Exception;
use crate::flags::{Flags, kind};
use crate::state::rflags;

fn mov_rr<T: Word>(cpu: &mut Core, op: &Op) -> Exec {
    let value = cpu.reg::<T>(op.s);
    cpu.set_reg::<T>(op.d, value);
    Ok(())
}

fn mov_ri<T: Word>(cpu: &mut Core, op: &Op) -> Exec {
    cpu.set_reg::<T>(op.d, op.imm);
    Ok(())
}

fn mov_rm<T: Word>(cpu: &mut Core, op: &Op) -> Exec {
    let value = cpu.load_word::<T>(op)?;
    cpu.set_reg::<T>(op.d, value);
    Ok(())
}

fn mov_mr<T: Word>(cpu: &mut Core, op: &Op) -> Exec {
    let value = cpu.reg::<T>(op.s);
    cpu.store_word::<T>(op, value)
}

fn mov_mi<T: Word>(cpu: &mut Core, op: &Op) -> Exec {
    cpu.store_word::<T>(op, op.imm)
}

/// MOVZX, MOVSX, MOVSXD: from `S` to `D`.
fn extend<D: Word, S: Word, const SIGNED: bool, const M: bool>(cpu: &mut Core, op: &Op) -> Exec {
    let value = if M { cpu.load_word::<S>(op)? } else { cpu.reg::<S>(op.s) };
    cpu.set_reg::<D>(op.d, if SIGNED { D::cut(S::sign_extend(value) as u64) } else { value });
    Ok(())
}

fn pick_extend<const SIGNED: bool>(insn: &Instruction) -> Handler {
    fn from<S: Word, const SIGNED: bool, const M: bool>(size: usize) -> Handler {
        match size {
            2 => extend::<u16, S, SIGNED, M>,
            4 => extend::<u32, S, SIGNED, M>,
            _ => extend::<u64, S, SIGNED, M>,
        }
    }
    let size = size0(insn);
    if insn.op1_kind() == OpKind::Memory {
        match insn.memory_size().size() {
            1 => from::<u8, SIGNED, true>(size),
            2 => from::<u16, SIGNED, true>(size),
            _ => from::<u32, SIGNED, true>(size),
        }
    } else {
        match insn.op1_register().size() {
            1 => from::<u8, SIGNED, false>(size),
            2 => from::<u16, SIGNED, false>(size),
            _ => from::<u32, SIGNED, false>(size),
        }
    }
}

fn lea<T: Word>(cpu: &mut Core, op: &Op) -> Exec {
    let address = cpu.effective(op);
    cpu.set_reg::<T>(op.d, T::cut(address));
    Ok(())
}

fn xchg_rr<T: Word>(cpu: &mut Core, op: &Op) -> Exec {
    let (a, b) = (cpu.reg::<T>(op.d), cpu.reg::<T>(op.s));
    cpu.set_reg::<T>(op.d, b);
    cpu.set_reg::<T>(op.s, a);
    Ok(())
}

/// XCHG with memory is locked, with or without the prefix.
fn xchg_mr<T: Word>(cpu: &mut Core, op: &Op) -> Exec {
    let lin = cpu.linear(op, T::BYTES, true)?;
    let reg = if op.s == super::NO_REG { op.d } else { op.s };
    let value = cpu.reg::<T>(reg);
    let old = cpu.rmw::<T, true>(lin, |_| value)?;
    cpu.set_reg::<T>(reg, old);
    Ok(())
}

fn cmov<T: Word, const M: bool>(cpu: &mut Core, op: &Op) -> Exec {
    // The load happens, and may fault, whatever the condition is; a 32-bit destination is always zero-extended.
    let value = if M { cpu.load_word::<T>(op)? } else { cpu.reg::<T>(op.s) };
    let value = if cpu.fl.condition(op.sc >> 3) { value } else { cpu.reg::<T>(op.d) };
    cpu.set_reg::<T>(op.d, value);
    Ok(())
}

fn setcc<const M: bool>(cpu: &mut Core, op: &Op) -> Exec {
    let value = u64::from(cpu.fl.condition(op.sc >> 3));
    if M {
        return cpu.store_word::<u8>(op, value);
    }
    cpu.set_reg::<u8>(op.d, value);
    Ok(())
}

fn bswap<T: Word>(cpu: &mut Core, op: &Op) -> Exec {
    let value = cpu.reg::<T>(op.d);
    // With a 16-bit operand the result is undefined; processors clear the register.
    cpu.set_reg::<T>(op.d, value.swap_bytes() >> (64 - T::BITS) & if T::BITS == 16 { 0 } else { u64::MAX });
    Ok(())
}

fn movbe<T: Word, const STORE: bool>(cpu: &mut Core, op: &Op) -> Exec {
    if STORE {
        let value = cpu.reg::<T>(op.s);
        return cpu.store_word::<T>(op, value.swap_bytes() >> (64 - T::BITS));
    }
    let value = cpu.load_word::<T>(op)?;
    cpu.set_reg::<T>(op.d, value.swap_bytes() >> (64 - T::BITS));
    Ok(())
}

/// CBW, CWDE, CDQE.
fn widen<D: Word, S: Word>(cpu: &mut Core, _: &Op) -> Exec {
    let value = S::sign_extend(cpu.reg::<S>(0)) as u64;
    cpu.set_reg::<D>(0, D::cut(value));
    Ok(())
}

/// CWD, CDQ, CQO.
fn widen_pair<T: Word>(cpu: &mut Core, _: &Op) -> Exec {
    let sign = if T::sign(cpu.reg::<T>(0)) { T::MASK } else { 0 };
    cpu.set_reg::<T>(2, sign);
    Ok(())
}

fn lahf(cpu: &mut Core, _: &Op) -> Exec {
    let flags = cpu.fl.bits() & 0xff | rflags::FIXED;
    cpu.set_reg::<u8>(16, flags);
    Ok(())
}

fn sahf(cpu: &mut Core, _: &Op) -> Exec {
    let bits = cpu.reg::<u8>(16);
    cpu.fl.assign(bits, rflags::ARITH & 0xff);
    Ok(())
}

fn xlat(cpu: &mut Core, op: &Op) -> Exec {
    // b is rBX, the index AL is not a 64-bit register.
    let offset = cpu.offset(&Op { i: super::NO_REG, ..*op }).wrapping_add(cpu.reg::<u8>(0));
    let offset = if op.am & super::AM_32 != 0 {
        offset & 0xffff_ffff
    } else if op.am & super::AM_16 != 0 {
        offset & 0xffff
    } else {
        offset
    };
    let lin = cpu.segmented(op, offset, 1, false)?;
    let value = cpu.read::<u8>(lin)?;
    cpu.set_reg::<u8>(0, u64::from(value));
    Ok(())
}

fn xadd<T: Word, const M: bool, const LOCK: bool>(cpu: &mut Core, op: &Op) -> Exec {
    let b = cpu.reg::<T>(op.s);
    let a = if M {
        let lin = cpu.linear(op, T::BYTES, true)?;
        cpu.rmw::<T, LOCK>(lin, |a| a.wrapping_add(b))?
    } else {
        cpu.reg::<T>(op.d)
    };
    let r = T::cut(a.wrapping_add(b));
    cpu.set_reg::<T>(op.s, a);
    if !M {
        cpu.set_reg::<T>(op.d, r);
    }
    cpu.fl = Flags { kind: kind::ADD | T::LOG, aux: 0, a, r };
    Ok(())
}

fn cmpxchg<T: Word, const M: bool, const LOCK: bool>(cpu: &mut Core, op: &Op) -> Exec {
    let (expected, new) = (cpu.reg::<T>(0), cpu.reg::<T>(op.s));
    let old = if M {
        let lin = cpu.linear(op, T::BYTES, true)?;
        // The old value is written back if it differs: the access is always a write.
        cpu.rmw::<T, LOCK>(lin, |old| if old == expected { new } else { old })?
    } else {
        let old = cpu.reg::<T>(op.d);
        if old == expected {
            cpu.set_reg::<T>(op.d, new);
        }
        old
    };
    if old != expected {
        cpu.set_reg::<T>(0, old);
    }
    cpu.fl = Flags { kind: kind::SUB | T::LOG, aux: 0, a: expected, r: T::cut(expected.wrapping_sub(old)) };
    Ok(())
}

fn cmpxchg8b<const LOCK: bool>(cpu: &mut Core, op: &Op) -> Exec {
    let pair = |cpu: &Core, high, low| cpu.reg::<u32>(high) << 32 | cpu.reg::<u32>(low);
    let (expected, new) = (pair(cpu, 2, 0), pair(cpu, 1, 3));
    let lin = cpu.linear(op, 8, true)?;
    let old = cpu.rmw::<u64, LOCK>(lin, |old| if old == expected { new } else { old })?;
    if old != expected {
        cpu.set_reg::<u32>(0, old);
        cpu.set_reg::<u32>(2, old >> 32);
    }
    cpu.fl.assign(if old == expected { rflags::ZF } else { 0 }, rflags::ZF);
    Ok(())
}

fn cmpxchg16b(cpu: &mut Core, op: &Op) -> Exec {
    let pair = |cpu: &Core, high, low| u128::from(cpu.reg::<u64>(high)) << 64 | u128::from(cpu.reg::<u64>(low));
    let (expected, new) = (pair(cpu, 2, 0), pair(cpu, 1, 3));
    let lin = cpu.linear(op, 16, true)?;
    if lin & 15 != 0 {
        return cpu.raise(Exception::Gp(0));
    }
    let old = cpu.exchange16(lin, expected, new)?;
    if old != expected {
        cpu.set_reg::<u64>(0, old as u64);
        cpu.set_reg::<u64>(2, (old >> 64) as u64);
    }
    cpu.fl.assign(if old == expected { rflags::ZF } else { 0 }, rflags::ZF);
    Ok(())
}

fn nop(_: &mut Core, _: &Op) -> Exec {
    Ok(())
}

fn pick_mov(insn: &Instruction) -> Option<Handler> {
    let special = |k: u32| insn.op_kind(k) == OpKind::Register && !insn.op_register(k).is_gpr();
    if special(0) || special(1) {
        // Segment, control and debug registers.
        return None;
    }
    let size = size0(insn);
    Some(match Form::of(insn) {
        Form::Reg => by_size!(size, mov_rr::<[T]>),
        Form::RegImm => by_size!(size, mov_ri::<[T]>),
        Form::RegMem => by_size!(size, mov_rm::<[T]>),
        Form::MemReg => by_size!(size, mov_mr::<[T]>),
        Form::MemImm => by_size!(size, mov_mi::<[T]>),
    })
}

fn pick_locked(insn: &Instruction, size: usize, xadd_not_cmpxchg: bool) -> Handler {
    match (xadd_not_cmpxchg, has_memory(insn), insn.has_lock_prefix()) {
        (true, false, _) => by_size!(size, xadd::<[T], false, false>),
        (true, true, false) => by_size!(size, xadd::<[T], true, false>),
        (true, true, true) => by_size!(size, xadd::<[T], true, true>),
        (false, false, _) => by_size!(size, cmpxchg::<[T], false, false>),
        (false, true, false) => by_size!(size, cmpxchg::<[T], true, false>),
        (false, true, true) => by_size!(size, cmpxchg::<[T], true, true>),
    }
}

/// See the module documentation of `exec`.
pub(crate) fn lower(insn: &Instruction) -> Option<Handler> {
    let size = size0(insn);
    let memory = has_memory(insn);
    Some(match insn.mnemonic() {
        Mnemonic::Mov => return pick_mov(insn),
        Mnemonic::Movnti => by_size!(size, mov_mr::<[T]>),
        Mnemonic::Movzx => pick_extend::<false>(insn),
        Mnemonic::Movsx | Mnemonic::Movsxd => match insn.code() {
            // With a 16-bit operand MOVSXD is a plain move.
            Code::Movsxd_r16_rm16 if memory => mov_rm::<u16>,
            Code::Movsxd_r16_rm16 => mov_rr::<u16>,
            Code::Movsxd_r32_rm32 if memory => mov_rm::<u32>,
            Code::Movsxd_r32_rm32 => mov_rr::<u32>,
            _ => pick_extend::<true>(insn),
        },
        Mnemonic::Lea => by_size!(size, lea::<[T]>),
        // 90 is not XCHG EAX, EAX: it does not clear the upper half.
        Mnemonic::Nop | Mnemonic::Pause | Mnemonic::Endbr64 | Mnemonic::Endbr32 => nop,
        Mnemonic::Xchg if memory => by_size!(size, xchg_mr::<[T]>),
        Mnemonic::Xchg => by_size!(size, xchg_rr::<[T]>),
        Mnemonic::Bswap => by_size!(size, bswap::<[T]>),
        Mnemonic::Movbe if insn.op0_kind() == OpKind::Memory => by_size!(size, movbe::<[T], true>),
        Mnemonic::Movbe => by_size!(size, movbe::<[T], false>),
        Mnemonic::Cbw => widen::<u16, u8>,
        Mnemonic::Cwde => widen::<u32, u16>,
        Mnemonic::Cdqe => widen::<u64, u32>,
        Mnemonic::Cwd => widen_pair::<u16>,
        Mnemonic::Cdq => widen_pair::<u32>,
        Mnemonic::Cqo => widen_pair::<u64>,
        Mnemonic::Lahf => lahf,
        Mnemonic::Sahf => sahf,
        Mnemonic::Xlatb => xlat,
        Mnemonic::Xadd => pick_locked(insn, size, true),
        Mnemonic::Cmpxchg => pick_locked(insn, size, false),
        Mnemonic::Cmpxchg8b if insn.has_lock_prefix() => cmpxchg8b::<true>,
        Mnemonic::Cmpxchg8b => cmpxchg8b::<false>,
        Mnemonic::Cmpxchg16b => cmpxchg16b,
        _ if insn.is_jcc_short_or_near() || insn.op0_register() == Register::None && !memory => {
            return None;
        }
        _ if condition_number(insn).is_some() && insn.op_count() == 1 => {
            if memory {
                setcc::<true>
            } else {
                setcc::<false>
            }
        }
        _ if condition_number(insn).is_some() && insn.op_count() == 2 && insn.op0_register().is_gpr() => {
            if memory {
                by_size!(size, cmov::<[T], true>)
            } else {
                by_size!(size, cmov::<[T], false>)
            }
        }
        _ => return None,
    })
}

// The same as threads; see there.

fn quick_mov_rr<T: Word>(cpu: &mut Core, op: &Op, rest: &[Op]) -> Leave {
    let value = cpu.reg::<T>(op.s);
    cpu.set_reg::<T>(op.d, value);
    thread::next(cpu, rest)
}

fn quick_mov_ri<T: Word>(cpu: &mut Core, op: &Op, rest: &[Op]) -> Leave {
    cpu.set_reg::<T>(op.d, op.imm);
    thread::next(cpu, rest)
}

fn quick_mov_mr<T: Word>(cpu: &mut Core, op: &Op, rest: &[Op]) -> Leave {
    let done = cpu.hit_write::<T>(cpu.offset(op), cpu.reg::<T>(op.s));
    thread::done(cpu, op, rest, done)
}

fn quick_mov_mi<T: Word>(cpu: &mut Core, op: &Op, rest: &[Op]) -> Leave {
    let done = cpu.hit_write::<T>(cpu.offset(op), op.imm);
    thread::done(cpu, op, rest, done)
}

/// MOV from memory, too: from a size to itself.
fn quick_extend<D: Word, S: Word, const SIGNED: bool, const M: bool>(cpu: &mut Core, op: &Op, rest: &[Op]) -> Leave {
    let value = if !M {
        cpu.reg::<S>(op.s)
    } else if let Some(value) = cpu.hit_read::<S>(cpu.offset(op)) {
        value
    } else {
        return thread::plain(cpu, op, rest);
    };
    cpu.set_reg::<D>(op.d, if SIGNED { D::cut(S::sign_extend(value) as u64) } else { value });
    thread::next(cpu, rest)
}

fn quick_lea<T: Word>(cpu: &mut Core, op: &Op, rest: &[Op]) -> Leave {
    let address = cpu.offset(op);
    cpu.set_reg::<T>(op.d, T::cut(address));
    thread::next(cpu, rest)
}

fn quick_cmov<T: Word>(cpu: &mut Core, op: &Op, rest: &[Op]) -> Leave {
    let source = if cpu.fl.condition(op.sc >> 3) { op.s } else { op.d };
    let value = cpu.reg::<T>(source);
    cpu.set_reg::<T>(op.d, value);
    thread::next(cpu, rest)
}

fn quick_setcc(cpu: &mut Core, op: &Op, rest: &[Op]) -> Leave {
    let value = u64::from(cpu.fl.condition(op.sc >> 3));
    cpu.set_reg::<u8>(op.d, value);
    thread::next(cpu, rest)
}

fn quick_nop(cpu: &mut Core, _: &Op, rest: &[Op]) -> Leave {
    thread::next(cpu, rest)
}

/// The register that `mov` copies to the one that `insn` behind it changes, if they can be one record: a thread of `insn` takes
/// its first operand from `Op::a`, needs no memory and never fails.
pub(super) fn copied(mov: &Instruction, insn: &Instruction) -> Option<u8> {
    let wide = |insn: &Instruction| {
        insn.op_count() > 0 && insn.op0_kind() == OpKind::Register && insn.op0_register().is_gpr() && size0(insn) >= 4
    };
    let fits = mov.mnemonic() == Mnemonic::Mov
        && (wide(mov) && wide(insn))
        && Form::of(mov) == Form::Reg
        && mov.op1_register().is_gpr()
        && size0(mov) >= size0(insn)
        && mov.op0_register().full_register() == insn.op0_register().full_register()
        && matches!(Form::of(insn), Form::Reg | Form::RegImm)
        && insn.op_count() < 3;
    let changes = matches!(
        insn.mnemonic(),
        Mnemonic::Add
            | Mnemonic::Adc
            | Mnemonic::And
            | Mnemonic::Dec
            | Mnemonic::Imul
            | Mnemonic::Inc
            | Mnemonic::Neg
            | Mnemonic::Not
            | Mnemonic::Or
            | Mnemonic::Rol
            | Mnemonic::Ror
            | Mnemonic::Sal
            | Mnemonic::Sar
            | Mnemonic::Sbb
            | Mnemonic::Shl
            | Mnemonic::Shr
            | Mnemonic::Sub
            | Mnemonic::Xor
    );
    (fits && changes).then(|| number(mov.op1_register()))
}

/// Threads for zero and sign extension, and for loads, which extend nothing.
fn quick_from<const SIGNED: bool, const M: bool>(to: usize, from: usize) -> Option<Thread> {
    Some(match (to, from) {
        (2, 1) => quick_extend::<u16, u8, SIGNED, M>,
        (4, 1) => quick_extend::<u32, u8, SIGNED, M>,
        (8, 1) => quick_extend::<u64, u8, SIGNED, M>,
        (4, 2) => quick_extend::<u32, u16, SIGNED, M>,
        (8, 2) => quick_extend::<u64, u16, SIGNED, M>,
        (8, 4) => quick_extend::<u64, u32, SIGNED, M>,
        (1, 1) => quick_extend::<u8, u8, SIGNED, M>,
        (2, 2) => quick_extend::<u16, u16, SIGNED, M>,
        (4, 4) => quick_extend::<u32, u32, SIGNED, M>,
        (8, 8) => quick_extend::<u64, u64, SIGNED, M>,
        _ => return None,
    })
}

/// See `thread::of`.
pub(super) fn thread(insn: &Instruction) -> Option<Thread> {
    let size = size0(insn);
    let memory = has_memory(insn);
    let general = |k: u32| k >= insn.op_count() || insn.op_kind(k) != OpKind::Register || insn.op_register(k).is_gpr();
    if !general(0) || !general(1) {
        return None;
    }
    let from = if memory { insn.memory_size().size() } else { insn.op1_register().size() };
    Some(match (insn.mnemonic(), Form::of(insn)) {
        (Mnemonic::Mov, Form::Reg) => thread_by_size!(size, quick_mov_rr::<[T]>),
        (Mnemonic::Mov, Form::RegImm) => thread_by_size!(size, quick_mov_ri::<[T]>),
        (Mnemonic::Mov, Form::RegMem) => return quick_from::<false, true>(size, size),
        (Mnemonic::Mov, Form::MemReg) => thread_by_size!(size, quick_mov_mr::<[T]>),
        (Mnemonic::Mov, Form::MemImm) => thread_by_size!(size, quick_mov_mi::<[T]>),
        (Mnemonic::Movzx, _) if memory => return quick_from::<false, true>(size, from),
        (Mnemonic::Movzx, _) => return quick_from::<false, false>(size, from),
        (Mnemonic::Movsx | Mnemonic::Movsxd, _) if size <= from => return None,
        (Mnemonic::Movsx | Mnemonic::Movsxd, _) if memory => return quick_from::<true, true>(size, from),
        (Mnemonic::Movsx | Mnemonic::Movsxd, _) => return quick_from::<true, false>(size, from),
        (Mnemonic::Lea, _) => thread_by_size!(size, quick_lea::<[T]>),
        (Mnemonic::Nop | Mnemonic::Endbr64 | Mnemonic::Endbr32, _) => quick_nop,
        // Jumps have conditions too, LOOPE and LOOPNE among them.
        _ if condition_number(insn).is_none() || memory || !insn.op0_register().is_gpr() => return None,
        _ if insn.op_count() == 1 => quick_setcc,
        _ => thread_by_size!(size, quick_cmov::<[T]>),
    })
}
