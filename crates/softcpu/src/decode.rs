//! From bytes to blocks of [`Op`] records: decoding by iced-x86, the choice of handlers, and the checks that are the same for every
//! execution of an instruction (does it exist on this CPU, is its unit enabled).

use iced_x86::{Code, Decoder, DecoderError, DecoderOptions, FlowControl, Instruction, Mnemonic};

use crate::core::{Core, mode};
use crate::exception::Exception;
use crate::exec::{self, Exec, FAMILIES, Handler, Need, Op, thread};

/// F3 0F BC and BD are BSF and BSR, WBINVD has no F3 form: BMI1, LZCNT and WBNOINVD are not offered.
const OPTIONS: u32 = DecoderOptions::NO_MPFX_0FBC | DecoderOptions::NO_MPFX_0FBD | DecoderOptions::NO_WBNOINVD;
/// Longest block in instructions.
const MAX_INSNS: usize = 48;
/// A loop that is one block is repeated in it, up to so many times and so many records.
const MAX_ROUNDS: usize = 8;
const MAX_RECORDS: usize = 32;

/// A block without its place in the cache.
#[derive(Debug)]
pub(crate) struct Decoded {
    pub(crate) ops: Vec<Op>,
    pub(crate) count: u32,
    /// RIP if the last branch is taken, and if not.
    pub(crate) targets: [u64; 2],
    /// Bytes.
    pub(crate) len: usize,
}

fn ud(cpu: &mut Core, _: &Op) -> Exec {
    cpu.raise(Exception::Ud)
}

fn nm(cpu: &mut Core, _: &Op) -> Exec {
    cpu.raise(Exception::Nm)
}

/// Bits of code in a mode.
fn bitness(mode: u32) -> u32 {
    if mode & mode::CODE64 != 0 {
        64
    } else if mode & mode::CODE32 != 0 {
        32
    } else {
        16
    }
}

/// The next RIP after a near instruction, in a mode.
fn wrap(mode: u32, rip: u64) -> u64 {
    match bitness(mode) {
        64 => rip,
        32 => rip & 0xffff_ffff,
        _ => rip & 0xffff,
    }
}

/// The handler of an instruction, all checks made; `Err` is one that only raises what came of them.
fn handler(core: &Core, insn: &Instruction) -> Result<Handler, Handler> {
    if insn.code() == Code::INVALID || !core.cpuid.allows(insn) {
        return Err(ud);
    }
    let on = |bit| core.mode & bit != 0;
    for family in FAMILIES {
        let Some(handler) = (family.lower)(insn) else {
            continue;
        };
        let (no, off) = match family.need {
            Need::None => (false, false),
            Need::X87 => (false, on(mode::EM) || on(mode::TS)),
            Need::Wait => (false, on(mode::MP) && on(mode::TS)),
            Need::Mmx => (on(mode::EM), on(mode::TS)),
            Need::Sse => (on(mode::EM) || !on(mode::OSFXSR), on(mode::TS)),
        };
        return if no {
            Err(ud)
        } else if off {
            Err(nm)
        } else {
            Ok(handler)
        };
    }
    Err(ud)
}

/// Whether nothing is decoded behind an instruction: it jumps, or it usually changes what the rest would mean.
fn ends_block(insn: &Instruction) -> bool {
    insn.flow_control() != FlowControl::Next
        || matches!(
            insn.mnemonic(),
            Mnemonic::Sti
                | Mnemonic::Popf
                | Mnemonic::Popfd
                | Mnemonic::Popfq
                | Mnemonic::Wrmsr
                | Mnemonic::Hlt
                | Mnemonic::In
                | Mnemonic::Out
                | Mnemonic::Lmsw
                | Mnemonic::Clts
                | Mnemonic::Invlpg
                | Mnemonic::Cpuid
                | Mnemonic::Xsetbv
        )
        || matches!(insn.code(), Code::Mov_cr_r32 | Code::Mov_cr_r64 | Code::Mov_dr_r32 | Code::Mov_dr_r64)
}

/// One decoded instruction on its own; `None` if the bytes end before it does.
pub(crate) fn one(core: &Core, rip: u64, bytes: &[u8]) -> Option<(Op, [u64; 2])> {
    let mut decoder = Decoder::with_ip(bitness(core.mode), bytes, rip, OPTIONS);
    let insn = decoder.decode();
    if decoder.last_error() == DecoderError::NoMoreBytes {
        return None;
    }
    let op = lower(core, &insn, 0, &[]);
    Some((op, targets(core.mode, &insn)))
}

/// The record of an instruction; `behind` are those that run after it in its block.
fn lower(core: &Core, insn: &Instruction, off: u8, behind: &[Instruction]) -> Op {
    let handler = handler(core, insn);
    let mut op = Op::new(insn, handler.unwrap_or_else(|raises| raises), off, core.code64());
    exec::adjust(core.mode, insn, &mut op);
    if handler.is_ok() {
        if let Some(thread) = thread::of(core.mode, insn, &op, thread::dead_flags(behind)) {
            op.thread = thread;
        }
    }
    op
}

fn targets(mode: u32, insn: &Instruction) -> [u64; 2] {
    [insn.near_branch_target(), wrap(mode, insn.next_ip())]
}

/// A block from the bytes at `rip`; `None` if they end within the first instruction.
pub(crate) fn block(core: &Core, rip: u64, bytes: &[u8]) -> Option<Decoded> {
    let mut decoder = Decoder::with_ip(bitness(core.mode), bytes, rip, OPTIONS);
    let mut insns: Vec<Instruction> = Vec::with_capacity(16);
    while insns.len() < MAX_INSNS {
        let insn = decoder.decode();
        if decoder.last_error() == DecoderError::NoMoreBytes {
            break;
        }
        insns.push(insn);
        if ends_block(&insn) || insn.code() == Code::INVALID {
            break;
        }
    }
    let last = *insns.last()?;
    let offset = |insn: &Instruction| insn.ip().wrapping_sub(rip) as u8;
    let mut ops = Vec::with_capacity(insns.len());
    let mut at = 0;
    while at < insns.len() {
        let off = offset(&insns[at]);
        let op =
            exec::fuse(core.mode, &insns[at..], off).unwrap_or_else(|| lower(core, &insns[at], off, &insns[at + 1..]));
        at += usize::from(op.count);
        ops.push(op);
    }
    let len = insns.iter().map(Instruction::len).sum();
    let targets = targets(core.mode, &last);
    let mut rounds = 1;
    if last.is_jcc_short_or_near() && targets[0] == rip {
        // What leads from one block to the next is paid for once in several rounds.
        rounds = (MAX_RECORDS / ops.len()).clamp(1, MAX_ROUNDS);
        let round: Vec<Op> = ops.clone();
        if let Some(op) = ops.last_mut() {
            (op.branch, op.thread) = (op.thread, thread::round);
        }
        ops = ops.repeat(rounds - 1);
        ops.extend(round);
    }
    Some(Decoded { ops, count: (insns.len() * rounds) as u32, targets, len })
}
