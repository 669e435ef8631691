//! Shifts, rotates, double shifts. Where the manual leaves flags undefined they follow what current processors do: OF of a shift or
//! rotate by more than one is computed as for the last single step, AF is cleared by shifts.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::form::{Word, by_size, has_memory, size0};
use super::thread::{self, Thread, thread_by_size};
use super::{Exec, Handler, Leave, Op};
use crate::core::Core;
use crate::flags::{Flags, kind};
use crate::state::rflags::{CF, OF};

const ROL: u8 = 0;
const ROR: u8 = 1;
const RCL: u8 = 2;
const RCR: u8 = 3;
const SHL: u8 = 4;
const SHR: u8 = 5;
const SAR: u8 = 6;

/// Where the count comes from.
const ONE: u8 = 0;
const IMM: u8 = 1;
const CL: u8 = 2;

/// What a shift leaves: the result, CF, OF.
type Shifted = (u64, bool, bool);

/// `count` is masked and not zero (for rotates: not zero before it is reduced).
#[inline(always)]
fn shift<T: Word, const OP: u8>(a: u64, count: u32, carry: bool) -> Shifted {
    let bits = T::BITS;
    let top = |v: u64| T::sign(v);
    match OP {
        SHL => {
            let r = if count < bits { T::cut(a << count) } else { 0 };
            let cf = count <= bits && a >> (bits - count) & 1 != 0;
            (r, cf, top(r) != cf)
        }
        SHR => {
            let r = if count < bits { a >> count } else { 0 };
            let cf = count <= bits && a >> (count - 1) & 1 != 0;
            // The sign before the last step differs from the one after it, which is zero.
            (r, cf, count == 1 && top(a))
        }
        SAR => {
            let signed = T::sign_extend(a);
            let r = T::cut((signed >> count.min(63)) as u64);
            (r, signed >> (count - 1).min(63) & 1 != 0, false)
        }
        ROL => {
            let n = count % bits;
            let r = if n == 0 { a } else { T::cut(a << n | a >> (bits - n)) };
            let cf = r & 1 != 0;
            (r, cf, top(r) != cf)
        }
        ROR => {
            let n = count % bits;
            let r = if n == 0 { a } else { T::cut(a >> n | a << (bits - n)) };
            (r, top(r), top(r) != (r >> (bits - 2) & 1 != 0))
        }
        _ => {
            // Through carry: a value of one bit more.
            let n = count % (bits + 1);
            let wide = u128::from(carry) << bits | u128::from(a);
            let n = if OP == RCL { n } else { (bits + 1 - n) % (bits + 1) };
            let mask = (1u128 << (bits + 1)) - 1;
            let turned = (wide << n | wide >> (bits + 1 - n)) & mask;
            let (r, cf) = (T::cut(turned as u64), turned >> bits & 1 != 0);
            (r, cf, if OP == RCL { top(r) != cf } else { top(r) != (r >> (bits - 2) & 1 != 0) })
        }
    }
}

#[inline(always)]
fn count_of<const C: u8>(cpu: &Core, op: &Op, mask: u32) -> u32 {
    (match C {
        ONE => 1,
        IMM => op.imm as u32,
        _ => cpu.st.gpr[1] as u32,
    }) & mask
}

fn shifts<T: Word, const OP: u8, const C: u8, const M: bool>(cpu: &mut Core, op: &Op) -> Exec {
    let mask = if T::BITS == 64 { 63 } else { 31 };
    let count = count_of::<C>(cpu, op, mask);
    if count == 0 {
        // No flag changes; a memory operand is still read and written, a 32-bit register still zero-extended.
        if M {
            let lin = cpu.linear(op, T::BYTES, true)?;
            cpu.rmw::<T, false>(lin, |a| a)?;
        } else {
            let a = cpu.reg::<T>(op.d);
            cpu.set_reg::<T>(op.d, a);
        }
        return Ok(());
    }
    let carry = if OP == RCL || OP == RCR { cpu.fl.cf() } else { false };
    let a = if M {
        let lin = cpu.linear(op, T::BYTES, true)?;
        cpu.rmw::<T, false>(lin, |a| shift::<T, OP>(a, count, carry).0)?
    } else {
        cpu.reg::<T>(op.d)
    };
    let (r, cf, of) = shift::<T, OP>(a, count, carry);
    let bits = if cf { CF } else { 0 } | if of { OF } else { 0 };
    if OP >= SHL {
        cpu.fl = Flags { kind: kind::RES | T::LOG, aux: bits as u32, a: 0, r };
    } else {
        cpu.fl.assign(bits, CF | OF);
    }
    if !M {
        cpu.set_reg::<T>(op.d, r);
    }
    Ok(())
}

/// SHLD and SHRD. A 16-bit operand shifted by more than 16 is undefined; here it is what AMD's processors make of it, the second operand
/// rotated, without a carry.
fn double<T: Word, const LEFT: bool, const C: u8, const M: bool>(cpu: &mut Core, op: &Op) -> Exec {
    let mask = if T::BITS == 64 { 63 } else { 31 };
    let count = count_of::<C>(cpu, op, mask);
    let b = cpu.reg::<T>(op.s);
    let compute = |a: u64| {
        let bits = T::BITS;
        if count == 0 {
            return (a, false);
        }
        if count > bits {
            let b = b as u16;
            let turn = count - bits;
            let result = if LEFT { b.rotate_left(turn) } else { b.rotate_right(turn) };
            return (result.into(), false);
        }
        if LEFT {
            let wide = u128::from(a) << bits | u128::from(b);
            let total = 2 * bits;
            let result = if total == 128 { wide << count >> 64 } else { wide << count >> (total - bits) };
            (T::cut(result as u64), wide >> (total - count) & 1 != 0)
        } else {
            let wide = u128::from(b) << bits | u128::from(a);
            (T::cut((wide >> count) as u64), wide >> (count - 1) & 1 != 0)
        }
    };
    let a = if M {
        let lin = cpu.linear(op, T::BYTES, true)?;
        cpu.rmw::<T, false>(lin, |a| compute(a).0)?
    } else {
        cpu.reg::<T>(op.d)
    };
    let (r, cf) = compute(a);
    if !M {
        cpu.set_reg::<T>(op.d, r);
    }
    if count != 0 {
        let of = if LEFT { T::sign(r) != cf } else { T::sign(r) != (r >> (T::BITS - 2) & 1 != 0) };
        let bits = if cf { CF } else { 0 } | if of { OF } else { 0 };
        cpu.fl = Flags { kind: kind::RES | T::LOG, aux: bits as u32, a: 0, r };
    }
    Ok(())
}

fn pick<const OP: u8>(insn: &Instruction) -> Handler {
    let size = size0(insn);
    let source = match insn.op1_kind() {
        OpKind::Immediate8 if insn.immediate8() == 1 => ONE,
        OpKind::Register => CL,
        _ => IMM,
    };
    match (source, has_memory(insn)) {
        (ONE, false) => by_size!(size, shifts::<[T], OP, ONE, false>),
        (IMM, false) => by_size!(size, shifts::<[T], OP, IMM, false>),
        (CL, false) => by_size!(size, shifts::<[T], OP, CL, false>),
        (ONE, true) => by_size!(size, shifts::<[T], OP, ONE, true>),
        (IMM, true) => by_size!(size, shifts::<[T], OP, IMM, true>),
        (_, _) => by_size!(size, shifts::<[T], OP, CL, true>),
    }
}

fn pick_double<const LEFT: bool>(insn: &Instruction) -> Handler {
    let size = size0(insn);
    match (insn.op2_kind() == OpKind::Register, has_memory(insn)) {
        (true, true) => by_size!(size, double::<[T], LEFT, CL, true>),
        (true, false) => by_size!(size, double::<[T], LEFT, CL, false>),
        (false, true) => by_size!(size, double::<[T], LEFT, IMM, true>),
        (false, false) => by_size!(size, double::<[T], LEFT, IMM, false>),
    }
}

/// See the module documentation of `exec`.
pub(crate) fn lower(insn: &Instruction) -> Option<Handler> {
    Some(match insn.mnemonic() {
        Mnemonic::Rol => pick::<ROL>(insn),
        Mnemonic::Ror => pick::<ROR>(insn),
        Mnemonic::Rcl => pick::<RCL>(insn),
        Mnemonic::Rcr => pick::<RCR>(insn),
        Mnemonic::Shl | Mnemonic::Sal => pick::<SHL>(insn),
        Mnemonic::Shr => pick::<SHR>(insn),
        Mnemonic::Sar => pick::<SAR>(insn),
        Mnemonic::Shld => pick_double::<true>(insn),
        Mnemonic::Shrd => pick_double::<false>(insn),
        _ => return None,
    })
}

/// A shift or rotation of a register by a constant that is not zero, as a thread.
fn quick<T: Word, const OP: u8, const FLAGS: bool>(cpu: &mut Core, op: &Op, rest: &[Op]) -> Leave {
    let a = cpu.reg::<T>(op.a);
    let (r, cf, of) = shift::<T, OP>(a, op.imm as u32 & if T::BITS == 64 { 63 } else { 31 }, false);
    if FLAGS {
        let bits = if cf { CF } else { 0 } | if of { OF } else { 0 };
        if OP >= SHL {
            cpu.fl = Flags { kind: kind::RES | T::LOG, aux: bits as u32, a: 0, r };
        } else {
            cpu.fl.assign(bits, CF | OF);
        }
    }
    cpu.set_reg::<T>(op.d, r);
    thread::next(cpu, rest)
}

/// Whether it shifts or rotates a register by a constant other than zero.
pub(super) fn by_constant(insn: &Instruction) -> bool {
    let size = size0(insn);
    insn.op0_kind() == OpKind::Register
        && insn.op1_kind() == OpKind::Immediate8
        && insn.immediate8() & if size == 8 { 63 } else { 31 } != 0
}

/// See `thread::of`.
pub(super) fn thread(insn: &Instruction, dead: bool) -> Option<Thread> {
    let size = size0(insn);
    macro_rules! pick {
        ($op:ident) => {
            if dead {
                thread_by_size!(size, quick::<[T], $op, false>)
            } else {
                thread_by_size!(size, quick::<[T], $op, true>)
            }
        };
    }
    Some(match insn.mnemonic() {
        _ if !by_constant(insn) => return None,
        Mnemonic::Rol => thread_by_size!(size, quick::<[T], ROL, true>),
        Mnemonic::Ror => thread_by_size!(size, quick::<[T], ROR, true>),
        Mnemonic::Shl | Mnemonic::Sal => pick!(SHL),
        Mnemonic::Shr => pick!(SHR),
        Mnemonic::Sar => pick!(SAR),
        _ => return None,
    })
}
