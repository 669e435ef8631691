//! Two-operand arithmetic and logic, INC, DEC, NEG, NOT, and the fusion of a comparison with the branch behind it.

use iced_x86::{Instruction, Mnemonic};

use super::form::{Word, by_size, number, size0};
use super::thread::{self, Thread, thread_by_size};
use super::{Exec, Form, Handler, Leave, NO_REG, Op};
use crate::core::Core;
use crate::flags::{Flags, kind};

const ADD: u8 = 0;
const OR: u8 = 1;
const ADC: u8 = 2;
const SBB: u8 = 3;
const AND: u8 = 4;
const SUB: u8 = 5;
const XOR: u8 = 6;
const CMP: u8 = 7;
const TEST: u8 = 8;
const INC: u8 = 9;
const DEC: u8 = 10;
const NEG: u8 = 11;
const NOT: u8 = 12;

/// Operand forms as constants of a handler.
const RR: u8 = 0;
const RI: u8 = 1;
const RM: u8 = 2;
const MR: u8 = 3;
const MI: u8 = 4;

/// The result. `carry` counts for ADC and SBB only.
#[inline(always)]
fn compute<T: Word, const OP: u8>(a: u64, b: u64, carry: u64) -> u64 {
    T::cut(match OP {
        ADD => a.wrapping_add(b),
        ADC => a.wrapping_add(b).wrapping_add(carry),
        SUB | CMP => a.wrapping_sub(b),
        SBB => a.wrapping_sub(b).wrapping_sub(carry),
        AND | TEST => a & b,
        OR => a | b,
        XOR => a ^ b,
        INC => a.wrapping_add(1),
        DEC => a.wrapping_sub(1),
        NEG => a.wrapping_neg(),
        _ => !a,
    })
}

/// Leaves the flags of an operation on `a` with result `r`.
#[inline(always)]
fn set_flags<T: Word, const OP: u8>(cpu: &mut Core, a: u64, r: u64, carry: u64) {
    let kind = match OP {
        ADD => kind::ADD,
        ADC => kind::ADC,
        SUB | CMP | NEG => kind::SUB,
        SBB => kind::SBB,
        INC => kind::INC,
        DEC => kind::DEC,
        NOT => return,
        _ => kind::LOGIC,
    };
    // NEG is 0 - a.
    let a = if OP == NEG { 0 } else { a };
    cpu.fl = Flags { kind: kind | T::LOG, aux: carry as u32, a, r };
}

/// CF, for the operations that read or keep it.
#[inline(always)]
fn carry_in<const OP: u8>(cpu: &Core) -> u64 {
    if matches!(OP, ADC | SBB | INC | DEC) { u64::from(cpu.fl.cf()) } else { 0 }
}

fn binary<T: Word, const OP: u8, const F: u8, const LOCK: bool>(cpu: &mut Core, op: &Op) -> Exec {
    let carry = carry_in::<OP>(cpu);
    if F == MR || F == MI {
        let b = T::cut(if F == MR { cpu.reg::<T>(op.s) } else { op.imm });
        if OP == CMP || OP == TEST {
            let a = cpu.load_word::<T>(op)?;
            set_flags::<T, OP>(cpu, a, compute::<T, OP>(a, b, 0), 0);
        } else {
            let lin = cpu.linear(op, T::BYTES, true)?;
            let a = cpu.rmw::<T, LOCK>(lin, |a| compute::<T, OP>(a, b, carry))?;
            set_flags::<T, OP>(cpu, a, compute::<T, OP>(a, b, carry), carry);
        }
        return Ok(());
    }
    let a = cpu.reg::<T>(op.d);
    let b = match F {
        RR => cpu.reg::<T>(op.s),
        RI => T::cut(op.imm),
        _ => cpu.load_word::<T>(op)?,
    };
    let r = compute::<T, OP>(a, b, carry);
    set_flags::<T, OP>(cpu, a, r, carry);
    if OP != CMP && OP != TEST {
        cpu.set_reg::<T>(op.d, r);
    }
    Ok(())
}

/// The same as a thread, for what the TLB has at hand; `FLAGS`: somebody wants them.
fn quick<T: Word, const OP: u8, const F: u8, const FLAGS: bool>(cpu: &mut Core, op: &Op, rest: &[Op]) -> Leave {
    let carry = carry_in::<OP>(cpu);
    let (a, b) = match F {
        RR => (cpu.reg::<T>(op.a), cpu.reg::<T>(op.s)),
        RI => (cpu.reg::<T>(op.a), T::cut(op.imm)),
        RM => match cpu.hit_read::<T>(cpu.offset(op)) {
            Some(b) => (cpu.reg::<T>(op.d), b),
            None => return thread::plain(cpu, op, rest),
        },
        _ => {
            let b = T::cut(if F == MR { cpu.reg::<T>(op.s) } else { op.imm });
            let hit = if OP == CMP || OP == TEST {
                cpu.hit_read::<T>(cpu.offset(op))
            } else {
                cpu.hit_rmw::<T>(cpu.offset(op), |a| compute::<T, OP>(a, b, carry))
            };
            match hit {
                Some(a) => (a, b),
                None => return thread::plain(cpu, op, rest),
            }
        }
    };
    let r = compute::<T, OP>(a, b, carry);
    if FLAGS {
        set_flags::<T, OP>(cpu, a, r, carry);
    }
    if OP != CMP && OP != TEST && F <= RM {
        cpu.set_reg::<T>(op.d, r);
    }
    thread::next(cpu, rest)
}

fn unary<T: Word, const OP: u8, const M: bool, const LOCK: bool>(cpu: &mut Core, op: &Op) -> Exec {
    let carry = carry_in::<OP>(cpu);
    let a = if M {
        let lin = cpu.linear(op, T::BYTES, true)?;
        cpu.rmw::<T, LOCK>(lin, |a| compute::<T, OP>(a, 0, 0))?
    } else {
        let a = cpu.reg::<T>(op.d);
        cpu.set_reg::<T>(op.d, compute::<T, OP>(a, 0, 0));
        a
    };
    set_flags::<T, OP>(cpu, a, compute::<T, OP>(a, 0, 0), carry);
    Ok(())
}

/// INC and its like on a register, as a thread.
fn quick_unary<T: Word, const OP: u8>(cpu: &mut Core, op: &Op, rest: &[Op]) -> Leave {
    let carry = carry_in::<OP>(cpu);
    let a = cpu.reg::<T>(op.a);
    let r = compute::<T, OP>(a, 0, 0);
    cpu.set_reg::<T>(op.d, r);
    set_flags::<T, OP>(cpu, a, r, carry);
    thread::next(cpu, rest)
}

fn pick_binary<const OP: u8>(insn: &Instruction) -> Handler {
    let size = size0(insn);
    match (Form::of(insn), insn.has_lock_prefix()) {
        (Form::Reg, _) => by_size!(size, binary::<[T], OP, RR, false>),
        (Form::RegImm, _) => by_size!(size, binary::<[T], OP, RI, false>),
        (Form::RegMem, _) => by_size!(size, binary::<[T], OP, RM, false>),
        (Form::MemReg, false) => by_size!(size, binary::<[T], OP, MR, false>),
        (Form::MemReg, true) => by_size!(size, binary::<[T], OP, MR, true>),
        (Form::MemImm, false) => by_size!(size, binary::<[T], OP, MI, false>),
        (Form::MemImm, true) => by_size!(size, binary::<[T], OP, MI, true>),
    }
}

fn pick_unary<const OP: u8>(insn: &Instruction) -> Handler {
    let size = size0(insn);
    match (Form::of(insn), insn.has_lock_prefix()) {
        (Form::Reg, _) => by_size!(size, unary::<[T], OP, false, false>),
        (_, false) => by_size!(size, unary::<[T], OP, true, false>),
        (_, true) => by_size!(size, unary::<[T], OP, true, true>),
    }
}

fn quick_binary<const OP: u8>(insn: &Instruction, dead: bool) -> Option<Thread> {
    let size = size0(insn);
    Some(match (Form::of(insn), dead) {
        _ if insn.has_lock_prefix() => return None,
        (Form::Reg, false) => thread_by_size!(size, quick::<[T], OP, RR, true>),
        (Form::Reg, true) => thread_by_size!(size, quick::<[T], OP, RR, false>),
        (Form::RegImm, false) => thread_by_size!(size, quick::<[T], OP, RI, true>),
        (Form::RegImm, true) => thread_by_size!(size, quick::<[T], OP, RI, false>),
        (Form::RegMem, _) => thread_by_size!(size, quick::<[T], OP, RM, true>),
        (Form::MemReg, _) => thread_by_size!(size, quick::<[T], OP, MR, true>),
        (Form::MemImm, _) => thread_by_size!(size, quick::<[T], OP, MI, true>),
    })
}

/// See `thread::of`.
pub(super) fn thread(insn: &Instruction, dead: bool) -> Option<Thread> {
    let register = Form::of(insn) == Form::Reg;
    match insn.mnemonic() {
        Mnemonic::Add => quick_binary::<ADD>(insn, dead),
        Mnemonic::Or => quick_binary::<OR>(insn, dead),
        Mnemonic::Adc => quick_binary::<ADC>(insn, false),
        Mnemonic::Sbb => quick_binary::<SBB>(insn, false),
        Mnemonic::And => quick_binary::<AND>(insn, dead),
        Mnemonic::Sub => quick_binary::<SUB>(insn, dead),
        Mnemonic::Xor => quick_binary::<XOR>(insn, dead),
        Mnemonic::Cmp => quick_binary::<CMP>(insn, false),
        Mnemonic::Test => quick_binary::<TEST>(insn, false),
        Mnemonic::Inc if register => Some(thread_by_size!(size0(insn), quick_unary::<[T], INC>)),
        Mnemonic::Dec if register => Some(thread_by_size!(size0(insn), quick_unary::<[T], DEC>)),
        Mnemonic::Neg if register => Some(thread_by_size!(size0(insn), quick_unary::<[T], NEG>)),
        Mnemonic::Not if register => Some(thread_by_size!(size0(insn), quick_unary::<[T], NOT>)),
        _ => None,
    }
}

/// See the module documentation of `exec`.
pub(crate) fn lower(insn: &Instruction) -> Option<Handler> {
    Some(match insn.mnemonic() {
        Mnemonic::Add => pick_binary::<ADD>(insn),
        Mnemonic::Or => pick_binary::<OR>(insn),
        Mnemonic::Adc => pick_binary::<ADC>(insn),
        Mnemonic::Sbb => pick_binary::<SBB>(insn),
        Mnemonic::And => pick_binary::<AND>(insn),
        Mnemonic::Sub => pick_binary::<SUB>(insn),
        Mnemonic::Xor => pick_binary::<XOR>(insn),
        Mnemonic::Cmp => pick_binary::<CMP>(insn),
        Mnemonic::Test => pick_binary::<TEST>(insn),
        Mnemonic::Inc => pick_unary::<INC>(insn),
        Mnemonic::Dec => pick_unary::<DEC>(insn),
        Mnemonic::Neg => pick_unary::<NEG>(insn),
        Mnemonic::Not => pick_unary::<NOT>(insn),
        _ => return None,
    })
}

/// The condition `CC` after an operation, worked out from its operands rather than from flags.
#[inline(always)]
fn holds<T: Word, const OP: u8, const CC: u8>(cpu: &Core, a: u64, b: u64, r: u64) -> bool {
    let (sa, sb) = (T::sign_extend(a), T::sign_extend(b));
    let positive = match (OP, CC >> 1) {
        (_, 2) => r == 0,
        (_, 4) => T::sign(r),
        (CMP | SUB, 1) => a < b,
        (CMP | SUB, 3) => a <= b,
        (CMP | SUB, 6) => sa < sb,
        (CMP | SUB, 7) => sa <= sb,
        (TEST | AND, 0 | 1) => false,
        (TEST | AND, 3) => r == 0,
        (TEST | AND, 6) => T::sign(r),
        (TEST | AND, 7) => r == 0 || T::sign(r),
        _ => return cpu.fl.condition(CC),
    };
    positive ^ (CC & 1 != 0)
}

/// An operation and the conditional branch behind it: the last record of a block.
fn fused<T: Word, const OP: u8, const F: u8, const CC: u8>(cpu: &mut Core, op: &Op, _: &[Op]) -> Leave {
    let carry = carry_in::<OP>(cpu);
    let memory = if F < RM {
        0
    } else if let Some(value) = cpu.hit_read::<T>(cpu.offset(op)) {
        value
    } else {
        return fused_general::<T, OP, F>(cpu, op, CC);
    };
    let a = match F {
        MR | MI => memory,
        RM => cpu.reg::<T>(op.d),
        _ => cpu.reg::<T>(op.a),
    };
    let b = match F {
        RR | MR => cpu.reg::<T>(op.s),
        RM => memory,
        _ => T::cut(op.imm),
    };
    let r = compute::<T, OP>(a, b, carry);
    set_flags::<T, OP>(cpu, a, r, carry);
    if OP != CMP && OP != TEST {
        cpu.set_reg::<T>(op.d, r);
    }
    if holds::<T, OP, CC>(cpu, a, b, r) { Leave::Taken } else { Leave::Fall }
}

/// A comparison with memory that the TLB does not have at hand, and the branch behind it.
#[inline(never)]
fn fused_general<T: Word, const OP: u8, const F: u8>(cpu: &mut Core, op: &Op, cc: u8) -> Leave {
    match binary::<T, OP, F, false>(cpu, op) {
        Ok(()) if cpu.fl.condition(cc) => Leave::Taken,
        Ok(()) => Leave::Fall,
        Err(why) => {
            cpu.left = 0;
            why
        }
    }
}

/// Picks the instance of a handler for one of the conditions listed.
macro_rules! by_condition {
    ($cc:expr, [$($n:literal)*], $h:ident::<$t:ty, $op:ident, $f:ident>) => {
        match $cc {
            $($n => $h::<$t, $op, $f, $n> as Thread,)*
            _ => return None,
        }
    };
}

/// Comparisons fuse with every condition.
fn pick_comparison<const OP: u8>(insn: &Instruction, cc: u8) -> Option<Thread> {
    macro_rules! of_form {
        ($f:ident) => {
            match size0(insn) {
                1 => by_condition!(cc, [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15], fused::<u8, OP, $f>),
                4 => by_condition!(cc, [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15], fused::<u32, OP, $f>),
                8 => by_condition!(cc, [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15], fused::<u64, OP, $f>),
                _ => return None,
            }
        };
    }
    Some(match Form::of(insn) {
        Form::Reg => of_form!(RR),
        Form::RegImm => of_form!(RI),
        Form::MemImm => of_form!(MI),
        Form::RegMem if OP == CMP => of_form!(RM),
        Form::MemReg if OP == CMP => of_form!(MR),
        _ => return None,
    })
}

/// Arithmetic on registers fuses with the conditions that compilers use behind it: carry, zero, sign.
fn pick_arithmetic<const OP: u8, const F: u8>(insn: &Instruction, cc: u8) -> Option<Thread> {
    Some(match size0(insn) {
        4 => by_condition!(cc, [2 3 4 5 8 9], fused::<u32, OP, F>),
        8 => by_condition!(cc, [2 3 4 5 8 9], fused::<u64, OP, F>),
        _ => return None,
    })
}

/// Adds to a register, compares it, and branches.
fn counted<T: Word, const OP: u8, const F: u8, const CC: u8>(cpu: &mut Core, op: &Op, _: &[Op]) -> Leave {
    // The addend is a register or a displacement; the other is zero.
    let a = T::cut(cpu.reg::<u64>(op.d).wrapping_add(cpu.reg::<u64>(op.b)).wrapping_add(op.disp));
    let b = if F == RR { cpu.reg::<T>(op.s) } else { T::cut(op.imm) };
    cpu.set_reg::<T>(op.d, a);
    let r = compute::<T, OP>(a, b, 0);
    set_flags::<T, OP>(cpu, a, r, 0);
    if holds::<T, OP, CC>(cpu, a, b, r) { Leave::Taken } else { Leave::Fall }
}

/// The thread for an addition to a register, its comparison and the conditional branch behind it, with the register that is added
/// and the constant.
pub(super) fn fuse_counted(add: &Instruction, cmp: &Instruction, jcc: &Instruction) -> Option<(Thread, u8, u64)> {
    let compared = cmp.mnemonic() == Mnemonic::Cmp
        && match Form::of(cmp) {
            Form::Reg => cmp.op1_register() != cmp.op0_register(),
            form => form == Form::RegImm,
        };
    if !compared || add.op_count() == 0 || add.op0_register() != cmp.op0_register() {
        return None;
    }
    let (b, disp) = match (add.mnemonic(), Form::of(add)) {
        (Mnemonic::Add, Form::RegImm) => (NO_REG, add.immediate(1)),
        (Mnemonic::Sub, Form::RegImm) => (NO_REG, add.immediate(1).wrapping_neg()),
        (Mnemonic::Add, Form::Reg) => (number(add.op1_register()), 0),
        (Mnemonic::Inc, Form::Reg) => (NO_REG, 1),
        (Mnemonic::Dec, Form::Reg) => (NO_REG, u64::MAX),
        _ => return None,
    };
    let cc = condition_number(jcc)?;
    macro_rules! of_form {
        ($t:ty, $f:ident) => {
            by_condition!(cc, [0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15], counted::<$t, CMP, $f>)
        };
    }
    let thread = match (size0(cmp), Form::of(cmp)) {
        (4, Form::Reg) => of_form!(u32, RR),
        (4, _) => of_form!(u32, RI),
        (8, Form::Reg) => of_form!(u64, RR),
        (8, _) => of_form!(u64, RI),
        _ => return None,
    };
    Some((thread, b, disp))
}

/// One record for `insn` and the conditional branch `jcc` behind it, if they fuse.
pub(super) fn fuse(insn: &Instruction, jcc: &Instruction) -> Option<Thread> {
    let cc = condition_number(jcc)?;
    match (insn.mnemonic(), Form::of(insn)) {
        (Mnemonic::Cmp, _) => pick_comparison::<CMP>(insn, cc),
        (Mnemonic::Test, _) => pick_comparison::<TEST>(insn, cc),
        (Mnemonic::Sub, Form::Reg) => pick_arithmetic::<SUB, RR>(insn, cc),
        (Mnemonic::Sub, Form::RegImm) => pick_arithmetic::<SUB, RI>(insn, cc),
        (Mnemonic::Add, Form::Reg) => pick_arithmetic::<ADD, RR>(insn, cc),
        (Mnemonic::Add, Form::RegImm) => pick_arithmetic::<ADD, RI>(insn, cc),
        (Mnemonic::And, Form::Reg) => pick_arithmetic::<AND, RR>(insn, cc),
        (Mnemonic::And, Form::RegImm) => pick_arithmetic::<AND, RI>(insn, cc),
        (Mnemonic::Dec, Form::Reg) => pick_arithmetic::<DEC, RR>(insn, cc),
        (Mnemonic::Inc, Form::Reg) => pick_arithmetic::<INC, RR>(insn, cc),
        _ => None,
    }
}

/// The condition of Jcc, SETcc or CMOVcc as it is encoded: 0 = O to 15 = G. `None` for other instructions.
pub(crate) fn condition_number(insn: &Instruction) -> Option<u8> {
    // iced numbers them 1 to 16 in a different order: by name, not by encoding.
    use iced_x86::ConditionCode as C;
    Some(match insn.condition_code() {
        C::o => 0,
        C::no => 1,
        C::b => 2,
        C::ae => 3,
        C::e => 4,
        C::ne => 5,
        C::be => 6,
        C::a => 7,
        C::s => 8,
        C::ns => 9,
        C::p => 10,
        C::np => 11,
        C::l => 12,
        C::ge => 13,
        C::le => 14,
        C::g => 15,
        C::None => return None,
    })
}
