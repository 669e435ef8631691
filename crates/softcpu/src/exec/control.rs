//! Near control transfer: JMP, Jcc, CALL, RET, LOOP, JCXZ, and software interrupts. Direct branches only say which way they go;
//! the block knows where that is.

use iced_x86::{Code, Instruction, Mnemonic};

use super::alu::condition_number;
use super::form::{Word, by_size, has_memory};
use super::stack::{pop_hit, push_hit};
use super::thread::{self, Thread};
use super::{Exec, Handler, Leave, Op};
use crate::core::{Core, Trap, mode};
use crate::exception::Exception;
use crate::exit::Exit;
use crate::intercept::Intercept;
use crate::interrupt::Source;
use crate::mem::canonical;
use crate::state::seg;

fn jmp(_: &mut Core, _: &Op) -> Exec {
    Err(Leave::Taken)
}

fn jcc<const CC: u8>(cpu: &mut Core, _: &Op) -> Exec {
    Err(if cpu.fl.condition(CC) { Leave::Taken } else { Leave::Fall })
}

impl Core {
    /// Checks the target of an indirect near jump and sets RIP.
    #[inline(always)]
    fn jump_near(&mut self, rip: u64) -> Exec {
        let inside = if self.code64() { canonical(rip) } else { rip <= u64::from(self.st.segs[seg::CS].limit) };
        if !inside {
            return self.raise(Exception::Gp(0));
        }
        self.st.rip = rip;
        Err(Leave::Indirect)
    }

    /// The same before anything is pushed.
    #[inline(always)]
    fn check_near(&mut self, rip: u64) -> Exec {
        let inside = if self.code64() { canonical(rip) } else { rip <= u64::from(self.st.segs[seg::CS].limit) };
        if inside { Ok(()) } else { self.raise(Exception::Gp(0)) }
    }
}

fn call<T: Word>(cpu: &mut Core, op: &Op) -> Exec {
    cpu.push::<T>(op.imm)?;
    Err(Leave::Taken)
}

fn jmp_indirect<T: Word, const M: bool>(cpu: &mut Core, op: &Op) -> Exec {
    let rip = if M { cpu.load_word::<T>(op)? } else { cpu.reg::<T>(op.d) };
    cpu.jump_near(rip)
}

fn call_indirect<T: Word, const M: bool>(cpu: &mut Core, op: &Op) -> Exec {
    let rip = if M { cpu.load_word::<T>(op)? } else { cpu.reg::<T>(op.d) };
    cpu.check_near(rip)?;
    let next = cpu.next_rip(op);
    cpu.push::<T>(next)?;
    cpu.st.rip = rip;
    Err(Leave::Indirect)
}

fn ret<T: Word>(cpu: &mut Core, op: &Op) -> Exec {
    let (rip, sp) = cpu.peek::<T>(0)?;
    cpu.check_near(rip)?;
    cpu.set_sp(sp.wrapping_add(T::BYTES).wrapping_add(op.imm & 0xffff));
    cpu.st.rip = rip;
    Err(Leave::Indirect)
}

const LOOP: u8 = 0;
const LOOPE: u8 = 1;
const LOOPNE: u8 = 2;
const JCXZ: u8 = 3;

/// `A` is the address size, which chooses CX, ECX or RCX.
fn count_jump<A: Word, const OP: u8>(cpu: &mut Core, _: &Op) -> Exec {
    let count = cpu.reg::<A>(1);
    if OP == JCXZ {
        return Err(if count == 0 { Leave::Taken } else { Leave::Fall });
    }
    let left = A::cut(count.wrapping_sub(1));
    let taken = left != 0
        && match OP {
            LOOPE => cpu.fl.zf(),
            LOOPNE => !cpu.fl.zf(),
            _ => true,
        };
    cpu.set_reg::<A>(1, left);
    Err(if taken { Leave::Taken } else { Leave::Fall })
}

fn int_n(cpu: &mut Core, op: &Op) -> Exec {
    let (rip, next) = (cpu.rip_of(op), cpu.next_rip(op));
    cpu.software_interrupt(Source::Software(op.imm as u8, next), rip)
}

fn int3(cpu: &mut Core, op: &Op) -> Exec {
    if cpu.debug.software_breakpoints {
        return cpu.trap(Trap::Exit(Exit::Debug { vector: 3, dr6: 0 }, false));
    }
    cpu.intercept(Intercept::Exception(Exception::Bp))?;
    let (rip, next) = (cpu.rip_of(op), cpu.next_rip(op));
    cpu.software_interrupt(Source::Trap(Exception::Bp, next), rip)
}

fn int1(cpu: &mut Core, op: &Op) -> Exec {
    let (rip, next) = (cpu.rip_of(op), cpu.next_rip(op));
    // A data breakpoint that waits is reported with this #DB, not by another.
    let waiting = std::mem::take(&mut cpu.st.events.debug_trap);
    cpu.software_interrupt(Source::Trap(Exception::Db(waiting), next), rip)
}

fn into(cpu: &mut Core, op: &Op) -> Exec {
    if !cpu.fl.of() {
        return Ok(());
    }
    let (rip, next) = (cpu.rip_of(op), cpu.next_rip(op));
    cpu.software_interrupt(Source::Trap(Exception::Of, next), rip)
}

fn bound<T: Word>(cpu: &mut Core, op: &Op) -> Exec {
    let lin = cpu.linear(op, 2 * T::BYTES, false)?;
    let low = cpu.read_word::<T>(lin)?;
    let high = cpu.read_word::<T>(cpu.wrap(lin.wrapping_add(T::BYTES)))?;
    let index = T::sign_extend(cpu.reg::<T>(op.d));
    if index < T::sign_extend(low) || index > T::sign_extend(high) {
        return cpu.raise(Exception::Br);
    }
    Ok(())
}

fn ud(cpu: &mut Core, _: &Op) -> Exec {
    cpu.raise(Exception::Ud)
}

/// Operand size in bytes of a near branch, which `Code` names and the operand does not always show.
fn branch_size(insn: &Instruction) -> usize {
    match insn.code() {
        Code::Call_rel16 | Code::Call_rm16 | Code::Jmp_rm16 | Code::Retnw | Code::Retnw_imm16 => 2,
        Code::Call_rel32_32 | Code::Call_rm32 | Code::Jmp_rm32 | Code::Retnd | Code::Retnd_imm16 => 4,
        _ => 8,
    }
}

/// Address size in bytes of LOOP and JCXZ.
fn count_size(insn: &Instruction) -> usize {
    let name = insn.code();
    match name {
        Code::Loop_rel8_16_CX
        | Code::Loop_rel8_32_CX
        | Code::Loope_rel8_16_CX
        | Code::Loope_rel8_32_CX
        | Code::Loopne_rel8_16_CX
        | Code::Loopne_rel8_32_CX
        | Code::Jcxz_rel8_16
        | Code::Jcxz_rel8_32 => 2,
        Code::Loop_rel8_16_RCX
        | Code::Loop_rel8_64_RCX
        | Code::Loope_rel8_16_RCX
        | Code::Loope_rel8_64_RCX
        | Code::Loopne_rel8_16_RCX
        | Code::Loopne_rel8_64_RCX
        | Code::Jrcxz_rel8_16
        | Code::Jrcxz_rel8_64 => 8,
        _ => 4,
    }
}

/// See the module documentation of `exec`.
pub(crate) fn lower(insn: &Instruction) -> Option<Handler> {
    let memory = has_memory(insn);
    if insn.is_jcc_short_or_near() {
        macro_rules! pick {
            ($($n:literal)*) => {
                match condition_number(insn)? {
                    $($n => jcc::<$n> as Handler,)*
                    _ => return None,
                }
            };
        }
        return Some(pick!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15));
    }
    if insn.is_jmp_short_or_near() {
        return Some(jmp);
    }
    if insn.is_call_near() {
        return Some(by_size!(branch_size(insn), call::<[T]>));
    }
    if insn.is_jmp_near_indirect() {
        return Some(if memory {
            by_size!(branch_size(insn), jmp_indirect::<[T], true>)
        } else {
            by_size!(branch_size(insn), jmp_indirect::<[T], false>)
        });
    }
    if insn.is_call_near_indirect() {
        return Some(if memory {
            by_size!(branch_size(insn), call_indirect::<[T], true>)
        } else {
            by_size!(branch_size(insn), call_indirect::<[T], false>)
        });
    }
    Some(match insn.mnemonic() {
        Mnemonic::Ret => by_size!(branch_size(insn), ret::<[T]>),
        Mnemonic::Loop => by_size!(count_size(insn), count_jump::<[T], LOOP>),
        Mnemonic::Loope => by_size!(count_size(insn), count_jump::<[T], LOOPE>),
        Mnemonic::Loopne => by_size!(count_size(insn), count_jump::<[T], LOOPNE>),
        Mnemonic::Jcxz | Mnemonic::Jecxz | Mnemonic::Jrcxz => {
            by_size!(count_size(insn), count_jump::<[T], JCXZ>)
        }
        Mnemonic::Int => int_n,
        Mnemonic::Int3 => int3,
        Mnemonic::Int1 => int1,
        Mnemonic::Into => into,
        Mnemonic::Bound => by_size!(insn.op0_register().size(), bound::<[T]>),
        Mnemonic::Ud0 | Mnemonic::Ud1 | Mnemonic::Ud2 => ud,
        _ => return None,
    })
}

/// What operands alone do not tell: return addresses.
pub(crate) fn adjust(bits: u32, insn: &Instruction, op: &mut Op) {
    if insn.is_call_near() {
        let next = insn.next_ip();
        op.imm = match bits & (mode::CODE64 | mode::CODE32) {
            0 => next & 0xffff,
            mode::CODE32 => next & 0xffff_ffff,
            _ => next,
        };
    }
}

// The same as threads, most of them for 64-bit mode; see there. They are the last of their blocks.

fn quick_jmp(_: &mut Core, _: &Op, _: &[Op]) -> Leave {
    Leave::Taken
}

fn quick_jcc<const CC: u8>(cpu: &mut Core, _: &Op, _: &[Op]) -> Leave {
    if cpu.fl.condition(CC) { Leave::Taken } else { Leave::Fall }
}

fn quick_call(cpu: &mut Core, op: &Op, rest: &[Op]) -> Leave {
    if push_hit(cpu, op.imm) { Leave::Taken } else { thread::plain(cpu, op, rest) }
}

fn quick_jmp_indirect<const M: bool>(cpu: &mut Core, op: &Op, rest: &[Op]) -> Leave {
    let target = if M { cpu.hit_read::<u64>(cpu.offset(op)) } else { Some(cpu.reg::<u64>(op.d)) };
    match target.filter(|rip| canonical(*rip)) {
        Some(rip) => {
            cpu.st.rip = rip;
            Leave::Indirect
        }
        None => thread::plain(cpu, op, rest),
    }
}

fn quick_ret(cpu: &mut Core, op: &Op, rest: &[Op]) -> Leave {
    match pop_hit(cpu, op.imm & 0xffff, canonical) {
        Some(rip) => {
            cpu.st.rip = rip;
            Leave::Indirect
        }
        None => thread::plain(cpu, op, rest),
    }
}

/// See `thread::of`; `long` is 64-bit mode.
pub(super) fn thread(insn: &Instruction, long: bool) -> Option<Thread> {
    macro_rules! pick {
        ($($n:literal)*) => {
            match condition_number(insn)? {
                $($n => Some(quick_jcc::<$n> as Thread),)*
                _ => None,
            }
        };
    }
    match insn.code() {
        _ if insn.is_jcc_short_or_near() => pick!(0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15),
        _ if insn.is_jmp_short_or_near() => Some(quick_jmp),
        _ if !long => None,
        Code::Call_rel32_64 => Some(quick_call),
        Code::Jmp_rm64 if has_memory(insn) => Some(quick_jmp_indirect::<true>),
        Code::Jmp_rm64 => Some(quick_jmp_indirect::<false>),
        Code::Retnq | Code::Retnq_imm16 => Some(quick_ret),
        _ => None,
    }
}
