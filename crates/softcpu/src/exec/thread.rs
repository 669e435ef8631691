//! Threaded code: how the records of a block run one another.
//!
//! Each record of a block has, besides its handler, a [`Thread`]: it does the instruction and then calls the next record's thread
//! in tail position, which optimised builds turn into a jump. So the processor predicts each hand-over by itself, and no
//! loop runs in between. A block has few records, so without that optimisation the stack stays small too.
//!
//! A thread of its own is written for what is frequent: the form that needs no segment, the access that the TLB has at hand. It must
//! not change anything before it knows that it can do the instruction; when it cannot, it ends in [`plain`], which runs the
//! handler. Threads are only offered for instructions whose unit is enabled.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::form::is_immediate;
use super::{Leave, Op, alu, control, data, muldiv, shift, sse_fp, sse_mov, stack};
use crate::core::{Core, mode};

/// The code of a record in a block: what it is called with is the record and those behind it.
pub(crate) type Thread = fn(&mut Core, &Op, &[Op]) -> Leave;

/// Runs the records of a block from the first; answers how it was left. Unless that is `Taken`, `Fall` or `Indirect`, `Core::left`
/// says how many records were not begun.
#[inline(always)]
pub(crate) fn next(cpu: &mut Core, rest: &[Op]) -> Leave {
    match rest.split_first() {
        Some((op, rest)) => (op.thread)(cpu, op, rest),
        None => Leave::Fall,
    }
}

/// The thread of every instruction that has no other: its handler.
#[inline(never)]
pub(crate) fn plain(cpu: &mut Core, op: &Op, rest: &[Op]) -> Leave {
    match (op.f)(cpu, op) {
        Ok(()) => next(cpu, rest),
        Err(why) => {
            cpu.left = rest.len();
            why
        }
    }
}

/// How a thread ends that may have `done` the instruction.
#[inline(always)]
pub(crate) fn done(cpu: &mut Core, op: &Op, rest: &[Op], done: bool) -> Leave {
    if done { next(cpu, rest) } else { plain(cpu, op, rest) }
}

/// The branch of a loop that is one block, when the block holds several rounds and this is not the last: round again, or out.
pub(crate) fn round(cpu: &mut Core, op: &Op, rest: &[Op]) -> Leave {
    let why = (op.branch)(cpu, op, &[]);
    if why == Leave::Taken {
        return next(cpu, rest);
    }
    if why == Leave::Fall {
        // The block was counted as a whole.
        cpu.icount -= rest.iter().map(|op| u64::from(op.count)).sum::<u64>();
    }
    cpu.left = rest.len();
    why
}

/// As `by_size`, for threads.
macro_rules! thread_by_size {
    ($bytes:expr, $h:ident::<[T] $(, $arg:tt)*>) => {
        match $bytes {
            1 => $h::<u8 $(, $arg)*> as $crate::exec::thread::Thread,
            2 => $h::<u16 $(, $arg)*>,
            4 => $h::<u32 $(, $arg)*>,
            _ => $h::<u64 $(, $arg)*>,
        }
    };
}
pub(crate) use thread_by_size;

/// The thread for an instruction of which `op` is the record. `dead`: nobody will see its flags.
pub(crate) fn of(bits: u32, insn: &Instruction, op: &Op, dead: bool) -> Option<Thread> {
    if op.am != 0 {
        return None;
    }
    let long = bits & mode::CODE64 != 0;
    alu::thread(insn, dead)
        .or_else(|| data::thread(insn))
        .or_else(|| control::thread(insn, long))
        .or_else(|| if long { stack::thread(insn) } else { None })
        .or_else(|| shift::thread(insn, dead))
        .or_else(|| muldiv::thread(insn))
        .or_else(|| sse_mov::thread(insn))
        .or_else(|| sse_fp::thread(insn))
}

/// What an instruction is to the flags that one before it left.
enum Effect {
    /// It neither reads nor writes any.
    Keeps,
    /// It replaces them all.
    Replaces,
    /// It reads some, or keeps some, or may leave the block here.
    Needs,
}

fn effect(insn: &Instruction) -> Effect {
    let general = |k| match insn.op_kind(k) {
        OpKind::Register => insn.op_register(k).is_gpr(),
        kind => is_immediate(kind),
    };
    let lea = insn.mnemonic() == Mnemonic::Lea;
    if !lea && !(0..insn.op_count()).all(general) {
        return Effect::Needs;
    }
    match insn.mnemonic() {
        Mnemonic::Mov
        | Mnemonic::Movzx
        | Mnemonic::Movsx
        | Mnemonic::Movsxd
        | Mnemonic::Lea
        | Mnemonic::Not
        | Mnemonic::Bswap => Effect::Keeps,
        Mnemonic::Add
        | Mnemonic::Or
        | Mnemonic::And
        | Mnemonic::Sub
        | Mnemonic::Xor
        | Mnemonic::Cmp
        | Mnemonic::Test
        | Mnemonic::Neg => Effect::Replaces,
        Mnemonic::Shl | Mnemonic::Sal | Mnemonic::Shr | Mnemonic::Sar if shift::by_constant(insn) => Effect::Replaces,
        _ => Effect::Needs,
    }
}

/// Whether nobody sees the flags that the instruction before `rest` leaves: they are replaced before anything reads them, and
/// before the block can be left.
pub(crate) fn dead_flags(rest: &[Instruction]) -> bool {
    for insn in rest {
        match effect(insn) {
            Effect::Keeps => {}
            Effect::Replaces => return true,
            Effect::Needs => return false,
        }
    }
    false
}
