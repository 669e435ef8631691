//! The stack: PUSH, POP, PUSHA, POPA, PUSHF, POPF, ENTER, LEAVE, and the accesses they are made of.

use iced_x86::{Code, Instruction, Mnemonic, OpKind};

use super::form::{Word, by_size, has_memory};
use super::thread::{self, Thread};
use super::{Exec, Handler, Leave, Op};
use crate::core::{Core, Trap, mode};
use crate::exception::Exception;
use crate::state::{rflags, seg};

impl Core {
    /// The linear address of stack offset `sp` for `len` bytes.
    #[inline(always)]
    fn stack_address(&mut self, sp: u64, len: u64, write: bool) -> Exec<u64> {
        if self.code64() { Ok(sp) } else { self.segment_address(seg::SS, sp, len, write) }
    }

    /// Cuts a stack pointer to the size of the stack.
    #[inline(always)]
    pub(crate) fn cut_sp(&self, sp: u64) -> u64 {
        if self.code64() {
            sp
        } else if self.mode & mode::STACK32 != 0 {
            sp & 0xffff_ffff
        } else {
            sp & 0xffff
        }
    }

    /// The stack pointer, as wide as the stack.
    #[inline(always)]
    pub(crate) fn sp(&self) -> u64 {
        self.cut_sp(self.st.gpr[4])
    }

    /// Sets the stack pointer, as wide as the stack.
    #[inline(always)]
    pub(crate) fn set_sp(&mut self, sp: u64) {
        self.st.gpr[4] = if self.code64() {
            sp
        } else if self.mode & mode::STACK32 != 0 {
            sp & 0xffff_ffff
        } else {
            self.st.gpr[4] & !0xffff | sp & 0xffff
        };
    }

    /// What an access to the stack answers: an address that is not canonical is a stack fault, even if the instruction has another
    /// operand in memory.
    #[inline(always)]
    fn on_stack<T>(&mut self, result: Exec<T>) -> Exec<T> {
        match result {
            Err(_) if matches!(self.trap, Trap::NonCanonical(_)) => self.raise(Exception::Ss(0)),
            other => other,
        }
    }

    /// Pushes one operand. The last memory access of an instruction: it changes RSP.
    #[inline(always)]
    pub(crate) fn push<T: Word>(&mut self, value: u64) -> Exec {
        let sp = self.cut_sp(self.st.gpr[4].wrapping_sub(T::BYTES));
        let lin = self.stack_address(sp, T::BYTES, true)?;
        let written = self.write_word::<T>(lin, value);
        self.on_stack(written)?;
        self.set_sp(sp);
        Ok(())
    }

    /// Writes where the push number `depth` (from 1) would write, without moving the stack pointer.
    pub(crate) fn poke<T: Word>(&mut self, depth: u64, value: u64) -> Exec {
        let sp = self.cut_sp(self.st.gpr[4].wrapping_sub(T::BYTES * depth));
        let lin = self.stack_address(sp, T::BYTES, true)?;
        let written = self.write_word::<T>(lin, value);
        self.on_stack(written)
    }

    /// Reads the operand `depth` slots above the top, and answers the stack pointer too. Does not move it.
    #[inline(always)]
    pub(crate) fn peek<T: Word>(&mut self, depth: u64) -> Exec<(u64, u64)> {
        let top = self.sp();
        let sp = self.cut_sp(top.wrapping_add(T::BYTES * depth));
        let lin = self.stack_address(sp, T::BYTES, false)?;
        let read = self.read_word::<T>(lin);
        Ok((self.on_stack(read)?, top))
    }
}

fn push_reg<T: Word>(cpu: &mut Core, op: &Op) -> Exec {
    let value = cpu.reg::<T>(op.d);
    cpu.push::<T>(value)
}

fn push_imm<T: Word>(cpu: &mut Core, op: &Op) -> Exec {
    cpu.push::<T>(op.imm)
}

fn push_mem<T: Word>(cpu: &mut Core, op: &Op) -> Exec {
    let value = cpu.load_word::<T>(op)?;
    cpu.push::<T>(value)
}

fn push_seg<T: Word>(cpu: &mut Core, op: &Op) -> Exec {
    let value = u64::from(cpu.st.segs[usize::from(op.d & 7)].selector);
    if T::BITS == 32 {
        // Processors write two bytes and leave the upper two.
        let sp = cpu.cut_sp(cpu.st.gpr[4].wrapping_sub(4));
        let lin = cpu.stack_address(sp, 2, true)?;
        cpu.write(lin, value as u16)?;
        cpu.set_sp(sp);
        return Ok(());
    }
    cpu.push::<T>(value)
}

fn pop_reg<T: Word>(cpu: &mut Core, op: &Op) -> Exec {
    let (value, sp) = cpu.peek::<T>(0)?;
    cpu.set_sp(sp.wrapping_add(T::BYTES));
    cpu.set_reg::<T>(op.d, value);
    Ok(())
}

fn pop_mem<T: Word>(cpu: &mut Core, op: &Op) -> Exec {
    let (value, sp) = cpu.peek::<T>(0)?;
    let old = cpu.st.gpr[4];
    // An address made with RSP uses the incremented one.
    cpu.set_sp(sp.wrapping_add(T::BYTES));
    let result = cpu.store_word::<T>(op, value);
    if result.is_err() {
        cpu.st.gpr[4] = old;
    }
    result
}

fn pop_seg<T: Word>(cpu: &mut Core, op: &Op) -> Exec {
    let (value, sp) = cpu.peek::<T>(0)?;
    let index = usize::from(op.d & 7);
    // The stack's size must be that before SS is loaded.
    let old = cpu.st.gpr[4];
    cpu.set_sp(sp.wrapping_add(T::BYTES));
    if let Err(why) = cpu.load_segment(index, value as u16) {
        cpu.st.gpr[4] = old;
        return Err(why);
    }
    if index == seg::SS {
        cpu.st.events.mov_ss_shadow = true;
        return Err(Leave::Next);
    }
    Ok(())
}

fn pusha<T: Word>(cpu: &mut Core, _: &Op) -> Exec {
    for (depth, reg) in (0..8u8).enumerate() {
        let value = cpu.reg::<T>(reg);
        cpu.poke::<T>(depth as u64 + 1, value)?;
    }
    let sp = cpu.sp();
    cpu.set_sp(sp.wrapping_sub(8 * T::BYTES));
    Ok(())
}

fn popa<T: Word>(cpu: &mut Core, _: &Op) -> Exec {
    let mut values = [0; 8];
    let mut sp = 0;
    for (depth, value) in values.iter_mut().enumerate() {
        (*value, sp) = cpu.peek::<T>(depth as u64)?;
    }
    cpu.set_sp(sp.wrapping_add(8 * T::BYTES));
    for (reg, value) in (0..8u8).rev().zip(values) {
        if reg != 4 {
            cpu.set_reg::<T>(reg, value);
        }
    }
    Ok(())
}

fn pushf<T: Word>(cpu: &mut Core, _: &Op) -> Exec {
    // VM and RF are never pushed.
    let value = cpu.rflags() & !(rflags::VM | rflags::RF);
    cpu.push::<T>(value)
}

fn popf<T: Word>(cpu: &mut Core, _: &Op) -> Exec {
    let (value, sp) = cpu.peek::<T>(0)?;
    cpu.set_sp(sp.wrapping_add(T::BYTES));
    let mut change = rflags::ARITH | rflags::TF | rflags::DF | rflags::NT | rflags::AC | rflags::ID;
    if cpu.cpl() == 0 || !cpu.pe() {
        change |= rflags::IOPL;
    }
    if !cpu.pe() || cpu.cpl() <= cpu.iopl() {
        change |= rflags::IF;
    }
    if T::BITS == 16 {
        change &= 0xffff;
    }
    let flags = cpu.rflags();
    cpu.set_rflags(flags & !(change | rflags::RF) | value & change);
    cpu.sync_set();
    Err(Leave::Next)
}

fn enter<T: Word>(cpu: &mut Core, op: &Op) -> Exec {
    let (size, level) = (op.imm & 0xffff, op.imm >> 16 & 31);
    let frame_base = cpu.reg::<T>(5);
    let top = cpu.sp();
    let frame = cpu.cut_sp(top.wrapping_sub(T::BYTES));
    cpu.poke::<T>(1, frame_base)?;
    if level > 0 {
        for i in 1..level {
            let bp = cpu.cut_sp(cpu.st.gpr[5].wrapping_sub(T::BYTES * i));
            let lin = cpu.stack_address(bp, T::BYTES, false)?;
            let value = cpu.read_word::<T>(lin)?;
            cpu.poke::<T>(1 + i, value)?;
        }
        cpu.poke::<T>(1 + level, frame)?;
    }
    let sp = cpu.cut_sp(top.wrapping_sub(T::BYTES * (1 + level)).wrapping_sub(size));
    // The new top must be writable.
    let lin = cpu.stack_address(sp, T::BYTES, true)?;
    cpu.probe_write(lin, T::BYTES)?;
    cpu.set_reg::<T>(5, frame);
    cpu.set_sp(sp);
    Ok(())
}

fn leave<T: Word>(cpu: &mut Core, _: &Op) -> Exec {
    let frame = cpu.cut_sp(cpu.st.gpr[5]);
    let lin = cpu.stack_address(frame, T::BYTES, false)?;
    let value = cpu.read_word::<T>(lin)?;
    cpu.set_sp(frame.wrapping_add(T::BYTES));
    cpu.set_reg::<T>(5, value);
    Ok(())
}

/// Operand size in bytes, which for many of these only `Code` names.
fn operand(insn: &Instruction) -> usize {
    let pointer = insn.stack_pointer_increment().unsigned_abs() as usize;
    match insn.mnemonic() {
        Mnemonic::Pusha | Mnemonic::Popa | Mnemonic::Pushf | Mnemonic::Popf => 2,
        Mnemonic::Pushad | Mnemonic::Popad | Mnemonic::Pushfd | Mnemonic::Popfd => 4,
        Mnemonic::Enter | Mnemonic::Leave => match insn.code() {
            Code::Enterw_imm16_imm8 | Code::Leavew => 2,
            Code::Enterd_imm16_imm8 | Code::Leaved => 4,
            _ => 8,
        },
        Mnemonic::Pushfq | Mnemonic::Popfq => 8,
        _ => pointer,
    }
}

/// See the module documentation of `exec`.
pub(crate) fn lower(insn: &Instruction) -> Option<Handler> {
    let size = operand(insn);
    let memory = has_memory(insn);
    let segment =
        insn.op_count() == 1 && insn.op0_kind() == OpKind::Register && insn.op0_register().is_segment_register();
    Some(match insn.mnemonic() {
        Mnemonic::Push if segment => by_size!(size, push_seg::<[T]>),
        Mnemonic::Push if memory => by_size!(size, push_mem::<[T]>),
        Mnemonic::Push if insn.op0_kind() == OpKind::Register => by_size!(size, push_reg::<[T]>),
        Mnemonic::Push => by_size!(size, push_imm::<[T]>),
        Mnemonic::Pop if segment => by_size!(size, pop_seg::<[T]>),
        Mnemonic::Pop if memory => by_size!(size, pop_mem::<[T]>),
        Mnemonic::Pop => by_size!(size, pop_reg::<[T]>),
        Mnemonic::Pusha | Mnemonic::Pushad => by_size!(size, pusha::<[T]>),
        Mnemonic::Popa | Mnemonic::Popad => by_size!(size, popa::<[T]>),
        Mnemonic::Pushf | Mnemonic::Pushfd | Mnemonic::Pushfq => by_size!(size, pushf::<[T]>),
        Mnemonic::Popf | Mnemonic::Popfd | Mnemonic::Popfq => by_size!(size, popf::<[T]>),
        Mnemonic::Enter => by_size!(size, enter::<[T]>),
        Mnemonic::Leave => by_size!(size, leave::<[T]>),
        _ => return None,
    })
}

/// An address through SS raises #SS, and these use it implicitly.
pub(crate) fn adjust(insn: &Instruction, op: &mut Op) {
    if insn.is_stack_instruction() && !has_memory(insn) {
        op.sc |= super::SC_STACK;
    }
}

/// Pushes in 64-bit mode if the TLB has the page; `false` if nothing was done.
#[inline(always)]
pub(super) fn push_hit(cpu: &mut Core, value: u64) -> bool {
    let sp = cpu.st.gpr[4].wrapping_sub(8);
    let done = cpu.hit_write::<u64>(sp, value);
    if done {
        cpu.st.gpr[4] = sp;
    }
    done
}

/// The top of the stack in 64-bit mode if the TLB has the page, taken off it with `more` bytes.
#[inline(always)]
pub(super) fn pop_hit(cpu: &mut Core, more: u64, good: impl FnOnce(u64) -> bool) -> Option<u64> {
    let sp = cpu.st.gpr[4];
    let value = cpu.hit_read::<u64>(sp).filter(|value| good(*value))?;
    cpu.st.gpr[4] = sp.wrapping_add(8).wrapping_add(more);
    Some(value)
}

fn quick_push(cpu: &mut Core, op: &Op, rest: &[Op]) -> Leave {
    let done = push_hit(cpu, cpu.reg::<u64>(op.d));
    thread::done(cpu, op, rest, done)
}

fn quick_pop(cpu: &mut Core, op: &Op, rest: &[Op]) -> Leave {
    match pop_hit(cpu, 0, |_| true) {
        Some(value) => {
            cpu.set_reg::<u64>(op.d, value);
            thread::next(cpu, rest)
        }
        None => thread::plain(cpu, op, rest),
    }
}

/// See `thread::of`; for 64-bit mode.
pub(super) fn thread(insn: &Instruction) -> Option<Thread> {
    match insn.code() {
        Code::Push_r64 => Some(quick_push),
        Code::Pop_r64 => Some(quick_pop),
        _ => None,
    }
}
