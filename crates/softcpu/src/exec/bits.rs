//! Single bits and bit counts: BT, BTS, BTR, BTC, BSF, BSR, POPCNT, CRC32, RDRAND, RDSEED, and the flag instructions.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::form::{Word, by_size, has_memory, size0};
use super::{Exec, Handler, Leave, Op};
use crate::core::Core;
use crate::exception::Exception;
use crate::flags::Flags;
use crate::state::rflags::{self, CF, ZF};

const BT: u8 = 0;
const BTS: u8 = 1;
const BTR: u8 = 2;
const BTC: u8 = 3;

fn change<const OP: u8>(value: u64, bit: u64) -> u64 {
    match OP {
        BT => value,
        BTS => value | bit,
        BTR => value & !bit,
        _ => value ^ bit,
    }
}

/// `REG`: the bit number is in a register, and with memory it may lie anywhere around the operand.
fn bit<T: Word, const OP: u8, const REG: bool, const M: bool, const LOCK: bool>(cpu: &mut Core, op: &Op) -> Exec {
    let number = if REG { cpu.reg::<T>(op.s) } else { op.imm };
    let mask = 1u64 << (number & u64::from(T::BITS - 1));
    let old = if M {
        let away = if REG { (T::sign_extend(number) >> (T::LOG + 3)) as u64 } else { 0 };
        let moved = Op { disp: op.disp.wrapping_add(away.wrapping_mul(T::BYTES)), ..*op };
        if OP == BT {
            cpu.load_word::<T>(&moved)?
        } else {
            let lin = cpu.linear(&moved, T::BYTES, true)?;
            cpu.rmw::<T, LOCK>(lin, |old| change::<OP>(old, mask))?
        }
    } else {
        let old = cpu.reg::<T>(op.d);
        if OP != BT {
            cpu.set_reg::<T>(op.d, change::<OP>(old, mask));
        }
        old
    };
    cpu.fl.assign(if old & mask != 0 { CF } else { 0 }, CF);
    Ok(())
}

fn pick_bit<const OP: u8>(insn: &Instruction) -> Handler {
    let size = size0(insn);
    match (insn.op1_kind() == OpKind::Register, has_memory(insn), insn.has_lock_prefix()) {
        (true, false, _) => by_size!(size, bit::<[T], OP, true, false, false>),
        (false, false, _) => by_size!(size, bit::<[T], OP, false, false, false>),
        (true, true, false) => by_size!(size, bit::<[T], OP, true, true, false>),
        (false, true, false) => by_size!(size, bit::<[T], OP, false, true, false>),
        (true, true, true) => by_size!(size, bit::<[T], OP, true, true, true>),
        (false, true, true) => by_size!(size, bit::<[T], OP, false, true, true>),
    }
}

/// BSF and BSR. A zero source sets ZF and leaves the destination; the other flags are undefined: kept.
fn scan<T: Word, const REVERSE: bool, const M: bool>(cpu: &mut Core, op: &Op) -> Exec {
    let value = if M { cpu.load_word::<T>(op)? } else { cpu.reg::<T>(op.s) };
    cpu.fl.assign(if value == 0 { ZF } else { 0 }, ZF);
    if value != 0 {
        let at = if REVERSE { 63 - value.leading_zeros() } else { value.trailing_zeros() };
        cpu.set_reg::<T>(op.d, u64::from(at));
    }
    Ok(())
}

fn popcnt<T: Word, const M: bool>(cpu: &mut Core, op: &Op) -> Exec {
    let value = if M { cpu.load_word::<T>(op)? } else { cpu.reg::<T>(op.s) };
    cpu.set_reg::<T>(op.d, u64::from(value.count_ones()));
    cpu.fl = Flags::from_bits(if value == 0 { ZF } else { 0 });
    Ok(())
}

/// RDRAND and RDSEED: always succeed, CF = 1.
fn random<T: Word>(cpu: &mut Core, op: &Op) -> Exec {
    let value = cpu.clock.random(cpu.icount);
    cpu.set_reg::<T>(op.d, T::cut(value));
    cpu.fl = Flags::from_bits(CF);
    Ok(())
}

/// CLC, STC, CMC.
fn carry<const TO: u8>(cpu: &mut Core, _: &Op) -> Exec {
    let on = match TO {
        0 => false,
        1 => true,
        _ => !cpu.fl.cf(),
    };
    cpu.fl.assign(u64::from(on), CF);
    Ok(())
}

fn direction<const ON: bool>(cpu: &mut Core, _: &Op) -> Exec {
    if ON {
        cpu.st.rflags |= rflags::DF;
    } else {
        cpu.st.rflags &= !rflags::DF;
    }
    Ok(())
}

fn cli(cpu: &mut Core, _: &Op) -> Exec {
    if cpu.pe() && cpu.cpl() > cpu.iopl() {
        return cpu.raise(Exception::Gp(0));
    }
    cpu.st.rflags &= !rflags::IF;
    Ok(())
}

fn sti(cpu: &mut Core, _: &Op) -> Exec {
    if cpu.pe() && cpu.cpl() > cpu.iopl() {
        return cpu.raise(Exception::Gp(0));
    }
    if cpu.st.rflags & rflags::IF == 0 {
        cpu.st.rflags |= rflags::IF;
        cpu.st.events.sti_shadow = true;
    }
    Err(Leave::Next)
}

/// CLAC and STAC.
fn access<const ON: bool>(cpu: &mut Core, _: &Op) -> Exec {
    if cpu.cpl() != 0 {
        return cpu.raise(Exception::Ud);
    }
    if ON {
        cpu.st.rflags |= rflags::AC;
    } else {
        cpu.st.rflags &= !rflags::AC;
    }
    cpu.sync_set();
    Ok(())
}

/// See the module documentation of `exec`.
pub(crate) fn lower(insn: &Instruction) -> Option<Handler> {
    let size = size0(insn);
    let memory = has_memory(insn);
    Some(match insn.mnemonic() {
        Mnemonic::Bt => pick_bit::<BT>(insn),
        Mnemonic::Bts => pick_bit::<BTS>(insn),
        Mnemonic::Btr => pick_bit::<BTR>(insn),
        Mnemonic::Btc => pick_bit::<BTC>(insn),
        Mnemonic::Bsf if memory => by_size!(size, scan::<[T], false, true>),
        Mnemonic::Bsf => by_size!(size, scan::<[T], false, false>),
        Mnemonic::Bsr if memory => by_size!(size, scan::<[T], true, true>),
        Mnemonic::Bsr => by_size!(size, scan::<[T], true, false>),
        Mnemonic::Popcnt if memory => by_size!(size, popcnt::<[T], true>),
        Mnemonic::Popcnt => by_size!(size, popcnt::<[T], false>),
        Mnemonic::Rdrand | Mnemonic::Rdseed => by_size!(size, random::<[T]>),
        Mnemonic::Clc => carry::<0>,
        Mnemonic::Stc => carry::<1>,
        Mnemonic::Cmc => carry::<2>,
        Mnemonic::Cld => direction::<false>,
        Mnemonic::Std => direction::<true>,
        Mnemonic::Cli => cli,
        Mnemonic::Sti => sti,
        Mnemonic::Clac => access::<false>,
        Mnemonic::Stac => access::<true>,
        _ => return None,
    })
}
