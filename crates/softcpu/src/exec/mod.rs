//! Instructions. One record per decoded instruction ([`Op`]), one function per instruction form ([`Handler`]), and one
//! table of families that says which form an instruction is.
//!
//! # How to add an instruction family in a file of its own
//!
//! 1. Write handlers: `fn paddb<const M: bool>(cpu: &mut Core, op: &Op) -> Exec`. A handler
//!    * reads its operands: `cpu.xmm(op.s)`, `cpu.reg::<u32>(op.d)`, `cpu.load::<u64>(op)?` for the memory operand (segment,
//!      address size, paging and faults are all behind that call), `cpu.load_aligned(op)?` for a 16-byte operand that must
//!      be aligned, `op.imm` for the immediate;
//!    * computes;
//!    * stores to memory (`cpu.store(op, value)?`) BEFORE it changes any register or flag, because any access may fault or be
//!      pending, and the instruction is then started again from its beginning with the state it found. Two stores: see
//!      `cpu.probe_write`. Never change state and then fail;
//!    * raises with `return cpu.raise(Exception::Gp(0))`;
//!    * answers `Ok(())`. It does not touch RIP.
//! 2. Write `pub(crate) fn lower(insn: &Instruction) -> Option<Handler>`: a `match insn.code()` or `insn.mnemonic()` that
//!    picks the handler; `None` for what is not the family's. `Form::of(insn)` tells register from memory operands.
//!    All operands are filled in by [`Op::new`] before, for every instruction alike:
//!    `d` = register number of operand 0, `s` = that of operand 1 (if they are registers), `imm` = the (sign-extended) immediate,
//!    `b`, `i`, `sc`, `disp`, `am` = the memory operand. Byte registers: 0 to 15 low, 16 to 19 AH, CH, DH, BH. XMM, MMX, ST,
//!    segment, control and debug registers: their number.
//! 3. Add the family to [`FAMILIES`] with what it [`Need`]s: the checks of CR0.EM, CR0.TS and CR4.OSFXSR are made once, when a
//!    block is decoded, and never by a handler (CR0 and CR4 are part of the key of a cached block).
//!
//! An instruction that ends a block (jumps, or anything that changes what the next instruction is or may do) answers
//! `Err(Leave::…)`: see [`Leave`].

mod alu;
mod bits;
mod control;
mod data;
mod far;
pub(crate) mod form;
mod mmx;
mod muldiv;
mod shift;
#[cfg(test)]
mod simd_tests;
mod sse_fp;
mod sse_int;
mod sse_mov;
mod stack;
mod string;
mod system;
pub(crate) mod thread;
mod x87;
mod x87_control;
pub(crate) mod xsave;

use iced_x86::Instruction;

use crate::core::{Core, Trap, mode};
use crate::exception::Exception;
use crate::state::cr4;

pub(crate) use form::Form;
use thread::Thread;

/// Why a handler does not simply continue with the next record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Leave {
    /// The instruction did not complete and changed nothing; `Core::trap` says why.
    Trap = 1,
    /// The direct branch of this block is taken.
    Taken,
    /// The direct branch of this block is not taken.
    Fall,
    /// An indirect jump in the same mode; RIP is set.
    Indirect,
    /// Done; continue with the next instruction, but what it may do has changed (events, mode, flags): look everything up.
    Next,
    /// Like `Next`, but RIP is set.
    Jump,
    /// A string instruction has more to do; everything so far is committed: look for events, then run the same instruction on.
    Again,
    /// The block was invalidated: look up RIP.
    Stale,
}

/// What an instruction or a memory access answers.
pub(crate) type Exec<T = ()> = Result<T, Leave>;

/// The code of an instruction form.
pub(crate) type Handler = fn(&mut Core, &Op) -> Exec;

/// No register: its slot always reads as zero.
pub(crate) const NO_REG: u8 = 16;

/// `Op::am`: the operand needs its segment (number in bits 0-2).
pub(crate) const AM_SEG: u8 = 0x80;
/// `Op::am`: 64-bit mode, so only the base of the segment counts.
pub(crate) const AM_LONG: u8 = 0x40;
/// `Op::am`: address size 32 bits.
pub(crate) const AM_32: u8 = 0x10;
/// `Op::am`: address size 16 bits.
pub(crate) const AM_16: u8 = 0x20;
/// `Op::sc`: the memory operand is relative to the stack segment.
pub(crate) const SC_STACK: u8 = 0x80;

/// One decoded instruction, or several, fused: only the first of those may fault.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Op {
    /// How it runs in a block.
    pub(crate) thread: Thread,
    /// The branch of a loop that `thread` goes round: see `thread::round`.
    pub(crate) branch: Thread,
    /// How it runs in general.
    pub(crate) f: Handler,
    /// Immediate; the return address of a near call.
    pub(crate) imm: u64,
    /// Displacement; absolute for RIP-relative operands.
    pub(crate) disp: u64,
    /// Register operand 0.
    pub(crate) d: u8,
    /// Register operand 1.
    pub(crate) s: u8,
    /// The register that is changed, before: operand 0, unless a MOV to it is part of the record.
    pub(crate) a: u8,
    /// Base register of the memory operand, or `NO_REG`.
    pub(crate) b: u8,
    /// Index register of the memory operand, or `NO_REG`.
    pub(crate) i: u8,
    /// Factor of the index.
    pub(crate) mul: u8,
    /// The condition in bits 3 to 6, and `SC_STACK`.
    pub(crate) sc: u8,
    /// Segment and address size; 0 is the fast case, flat with 64-bit addresses.
    pub(crate) am: u8,
    /// Offset of the instruction from the start of the block.
    pub(crate) off: u8,
    /// Length in bytes.
    pub(crate) len: u8,
    /// Instructions: more than one if they are fused.
    pub(crate) count: u8,
}

/// What a family needs to be enabled, checked when a block is decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    /// Nothing.
    None,
    /// x87: #NM when CR0.EM or CR0.TS is set.
    X87,
    /// WAIT: #NM when both CR0.MP and CR0.TS are set.
    Wait,
    /// MMX: #UD when CR0.EM is set, #NM when CR0.TS is set.
    Mmx,
    /// SSE on XMM registers: #UD when CR0.EM is set or CR4.OSFXSR clear, #NM when CR0.TS is set.
    Sse,
}

/// A family of instructions.
pub(crate) struct Family {
    /// What it needs.
    pub(crate) need: Need,
    /// Picks the handler, or answers that the instruction is not of this family.
    pub(crate) lower: fn(&Instruction) -> Option<Handler>,
}

/// Every family, asked in this order.
pub(crate) const FAMILIES: &[Family] = &[
    Family { need: Need::None, lower: alu::lower },
    Family { need: Need::None, lower: data::lower },
    Family { need: Need::None, lower: control::lower },
    Family { need: Need::None, lower: stack::lower },
    Family { need: Need::None, lower: shift::lower },
    Family { need: Need::None, lower: bits::lower },
    Family { need: Need::None, lower: muldiv::lower },
    Family { need: Need::None, lower: string::lower },
    Family { need: Need::None, lower: far::lower },
    Family { need: Need::None, lower: system::lower },
    Family { need: Need::None, lower: xsave::lower },
    Family { need: Need::Sse, lower: sse_mov::lower },
    Family { need: Need::Sse, lower: sse_int::lower },
    Family { need: Need::None, lower: sse_int::lower_crc32 },
    Family { need: Need::Sse, lower: sse_fp::lower },
    Family { need: Need::Mmx, lower: mmx::lower },
    Family { need: Need::Sse, lower: mmx::lower_mixed },
    Family { need: Need::X87, lower: x87::lower },
    Family { need: Need::X87, lower: x87_control::lower },
    Family { need: Need::Wait, lower: x87_control::lower_wait },
];

impl Op {
    /// A record without operands.
    pub(crate) fn nothing(f: Handler) -> Op {
        Op {
            thread: thread::plain,
            branch: thread::plain,
            f,
            imm: 0,
            disp: 0,
            d: NO_REG,
            s: NO_REG,
            a: NO_REG,
            b: NO_REG,
            i: NO_REG,
            mul: 1,
            sc: 0,
            am: 0,
            off: 0,
            len: 0,
            count: 1,
        }
    }
}

/// Fills in what operands alone do not tell.
pub(crate) fn adjust(bits: u32, insn: &Instruction, op: &mut Op) {
    control::adjust(bits, insn, op);
    stack::adjust(insn, op);
    if let Some(cc) = alu::condition_number(insn) {
        op.sc |= cc << 3;
    }
}

/// The handler of records of several instructions, should a thread need one: they run one by one.
fn apart(cpu: &mut Core, _: &Op) -> Exec {
    cpu.trap(Trap::StepAlone)
}

/// One record for the first instructions of `insns`, which go on to the end of the block, if there is one:
///
/// * an operation or comparison and the conditional branch behind it, which ends the block; with them, what loops end with:
///   an addition before the comparison;
/// * MOV from register to register and an operation that changes the copy. Together they have three operands.
pub(crate) fn fuse(bits: u32, insns: &[Instruction], off: u8) -> Option<Op> {
    let record = |main: &Instruction, thread: Thread, count: usize| {
        let len = insns[..count].iter().map(Instruction::len).sum::<usize>() as u8;
        let op = Op::new(main, apart, off, bits & mode::CODE64 != 0);
        Op { thread, len, count: count as u8, ..op }
    };
    // The same with another register to begin with.
    let copied = |source: u8, op: Op| Op { a: source, s: if op.s == op.d { source } else { op.s }, ..op };
    let branches = |insn: &Instruction| insn.is_jcc_short_or_near();
    match insns {
        [insn, jcc] if branches(jcc) => {
            let op = record(insn, alu::fuse(insn, jcc)?, 2);
            return (op.am == 0).then_some(op);
        }
        [add, cmp, jcc] if branches(jcc) => {
            if let Some((thread, b, disp)) = alu::fuse_counted(add, cmp, jcc) {
                return Some(Op { b, disp, ..record(cmp, thread, 3) });
            }
            if let (Some(source), Some(thread)) = (data::copied(add, cmp), alu::fuse(cmp, jcc)) {
                return Some(copied(source, record(cmp, thread, 3)));
            }
        }
        _ => {}
    }
    let [mov, insn, behind @ ..] = insns else {
        return None;
    };
    let source = data::copied(mov, insn)?;
    let op = record(insn, thread::plain, 2);
    let thread = thread::of(bits, insn, &op, thread::dead_flags(behind))?;
    Some(copied(source, Op { thread, ..op }))
}

impl Core {
    /// What an unmasked SIMD floating-point exception raises.
    pub(crate) fn simd_exception<T>(&mut self) -> Exec<T> {
        let supported = self.st.cr4 & cr4::OSXMMEXCPT != 0;
        self.raise(if supported { Exception::Xm } else { Exception::Ud })
    }
}
