//! Multiplication, division, and the decimal adjustments. Undefined flags follow current Intel and AMD processors where these agree:
//! after MUL and IMUL SF, ZF and PF come from the low half, AF is clear.

use iced_x86::{Instruction, Mnemonic};

use super::form::{Word, by_size, has_memory, size0};
use super::thread::{self, Thread};
use super::{Exec, Form, Handler, Leave, Op};
use crate::core::Core;
use crate::exception::Exception;
use crate::flags::{Flags, kind};
use crate::state::rflags::{AF, ARITH, CF, OF, PF, SF, ZF};

fn product_flags<T: Word>(cpu: &mut Core, low: u64, overflow: bool) {
    cpu.fl = Flags { kind: kind::RES | T::LOG, aux: if overflow { (CF | OF) as u32 } else { 0 }, a: 0, r: T::cut(low) };
}

/// Writes a double-width result to AX, DX:AX, EDX:EAX or RDX:RAX.
fn set_pair<T: Word>(cpu: &mut Core, low: u64, high: u64) {
    if T::BITS == 8 {
        cpu.set_reg::<u16>(0, T::cut(low) | high << 8);
    } else {
        cpu.set_reg::<T>(0, low);
        cpu.set_reg::<T>(2, high);
    }
}

fn mul<T: Word, const SIGNED: bool, const M: bool>(cpu: &mut Core, op: &Op) -> Exec {
    let b = if M { cpu.load_word::<T>(op)? } else { cpu.reg::<T>(op.d) };
    let a = cpu.reg::<T>(0);
    let (low, high, overflow) = if SIGNED {
        let product = i128::from(T::sign_extend(a)) * i128::from(T::sign_extend(b));
        let low = T::cut(product as u64);
        (low, T::cut((product >> T::BITS) as u64), i128::from(T::sign_extend(low)) != product)
    } else {
        let product = u128::from(a) * u128::from(b);
        let high = (product >> T::BITS) as u64;
        (T::cut(product as u64), high, high != 0)
    };
    set_pair::<T>(cpu, low, high);
    product_flags::<T>(cpu, low, overflow);
    Ok(())
}

/// IMUL with two or three operands.
fn imul<T: Word, const IMM: bool, const M: bool>(cpu: &mut Core, op: &Op) -> Exec {
    let b = if M { cpu.load_word::<T>(op)? } else { cpu.reg::<T>(op.s) };
    let a = if IMM { T::cut(op.imm) } else { cpu.reg::<T>(op.d) };
    let product = i128::from(T::sign_extend(a)) * i128::from(T::sign_extend(b));
    let low = T::cut(product as u64);
    cpu.set_reg::<T>(op.d, low);
    product_flags::<T>(cpu, low, i128::from(T::sign_extend(low)) != product);
    Ok(())
}

/// The flags that a division leaves are undefined; they are left alone.
fn div<T: Word, const SIGNED: bool, const M: bool>(cpu: &mut Core, op: &Op) -> Exec {
    let b = if M { cpu.load_word::<T>(op)? } else { cpu.reg::<T>(op.d) };
    let (low, high) =
        if T::BITS == 8 { (cpu.reg::<u8>(0), cpu.reg::<u8>(16)) } else { (cpu.reg::<T>(0), cpu.reg::<T>(2)) };
    if b == 0 {
        return cpu.raise(Exception::De);
    }
    let result = if SIGNED {
        let shift = 128 - 2 * T::BITS;
        let a = ((u128::from(high) << T::BITS | u128::from(low)) << shift) as i128 >> shift;
        let b = i128::from(T::sign_extend(b));
        a.checked_div(b)
            .filter(|q| i128::from(T::sign_extend(T::cut(*q as u64))) == *q)
            .map(|q| (q as u64, (a - q * b) as u64))
    } else if T::BITS == 64 && high == 0 {
        Some((low / b, low % b))
    } else {
        let a = u128::from(high) << T::BITS | u128::from(low);
        let b = u128::from(b);
        Some(a / b).filter(|q| *q >> T::BITS == 0).map(|q| (q as u64, (a % b) as u64))
    };
    let Some((quotient, remainder)) = result else {
        return cpu.raise(Exception::De);
    };
    set_pair::<T>(cpu, T::cut(quotient), T::cut(remainder));
    Ok(())
}

/// Flags SF, ZF, PF of AL, and the given others.
fn decimal_flags(cpu: &mut Core, al: u64, bits: u64) {
    cpu.fl = Flags { kind: kind::RES, aux: bits as u32, a: 0, r: al & 0xff };
}

/// DAA and DAS.
fn daa<const SUB: bool>(cpu: &mut Core, _: &Op) -> Exec {
    let old = cpu.reg::<u8>(0);
    let (cf, af) = (cpu.fl.cf(), cpu.fl.af());
    let mut al = old;
    let mut bits = 0;
    let adjust = |by: u64, al: &mut u64| *al = if SUB { al.wrapping_sub(by) } else { *al + by } & 0xff;
    if old & 15 > 9 || af {
        adjust(6, &mut al);
        bits |= AF;
        // DAS: the borrow of this step counts.
        if cf || SUB && old < 6 {
            bits |= CF;
        }
    }
    if old > 0x99 || cf {
        adjust(0x60, &mut al);
        bits |= CF;
    }
    cpu.set_reg::<u8>(0, al);
    decimal_flags(cpu, al, bits);
    Ok(())
}

/// AAA and AAS.
fn aaa<const SUB: bool>(cpu: &mut Core, _: &Op) -> Exec {
    let ax = cpu.reg::<u16>(0);
    let adjust = ax & 15 > 9 || cpu.fl.af();
    let (ax, bits) = match (adjust, SUB) {
        (true, false) => (ax.wrapping_add(0x106), AF | CF),
        (true, true) => (ax.wrapping_sub(6).wrapping_sub(0x100), AF | CF),
        (false, _) => (ax, 0),
    };
    cpu.set_reg::<u16>(0, ax & 0xff0f);
    decimal_flags(cpu, ax & 15, bits);
    Ok(())
}

fn aam(cpu: &mut Core, op: &Op) -> Exec {
    let (al, base) = (cpu.reg::<u8>(0), op.imm & 0xff);
    if base == 0 {
        return cpu.raise(Exception::De);
    }
    cpu.set_reg::<u16>(0, ((al / base) << 8) | (al % base));
    decimal_flags(cpu, al % base, 0);
    Ok(())
}

fn aad(cpu: &mut Core, op: &Op) -> Exec {
    let al = (cpu.reg::<u8>(0) + cpu.reg::<u8>(16) * (op.imm & 0xff)) & 0xff;
    cpu.set_reg::<u16>(0, al);
    decimal_flags(cpu, al, 0);
    Ok(())
}

/// SALC: undocumented, sets AL from CF.
fn salc(cpu: &mut Core, _: &Op) -> Exec {
    let al = if cpu.fl.cf() { 0xff } else { 0 };
    cpu.set_reg::<u8>(0, al);
    Ok(())
}

const _: () = assert!(ARITH == CF | PF | AF | ZF | SF | OF);

/// See the module documentation of `exec`.
pub(crate) fn lower(insn: &Instruction) -> Option<Handler> {
    let size = size0(insn);
    let memory = has_memory(insn);
    Some(match insn.mnemonic() {
        Mnemonic::Mul if memory => by_size!(size, mul::<[T], false, true>),
        Mnemonic::Mul => by_size!(size, mul::<[T], false, false>),
        Mnemonic::Imul => match (insn.op_count(), Form::of(insn)) {
            (1, Form::Reg) => by_size!(size, mul::<[T], true, false>),
            (1, _) => by_size!(size, mul::<[T], true, true>),
            (2, Form::Reg) => by_size!(size, imul::<[T], false, false>),
            (2, _) => by_size!(size, imul::<[T], false, true>),
            (_, Form::Reg) => by_size!(size, imul::<[T], true, false>),
            (_, _) => by_size!(size, imul::<[T], true, true>),
        },
        Mnemonic::Div if memory => by_size!(size, div::<[T], false, true>),
        Mnemonic::Div => by_size!(size, div::<[T], false, false>),
        Mnemonic::Idiv if memory => by_size!(size, div::<[T], true, true>),
        Mnemonic::Idiv => by_size!(size, div::<[T], true, false>),
        Mnemonic::Daa => daa::<false>,
        Mnemonic::Das => daa::<true>,
        Mnemonic::Aaa => aaa::<false>,
        Mnemonic::Aas => aaa::<true>,
        Mnemonic::Aam => aam,
        Mnemonic::Aad => aad,
        Mnemonic::Salc => salc,
        _ => return None,
    })
}

/// IMUL of registers as a thread.
fn quick_imul<T: Word, const IMM: bool>(cpu: &mut Core, op: &Op, rest: &[Op]) -> Leave {
    let a = if IMM { T::cut(op.imm) } else { cpu.reg::<T>(op.a) };
    let product = i128::from(T::sign_extend(a)) * i128::from(T::sign_extend(cpu.reg::<T>(op.s)));
    let low = T::cut(product as u64);
    cpu.set_reg::<T>(op.d, low);
    product_flags::<T>(cpu, low, i128::from(T::sign_extend(low)) != product);
    thread::next(cpu, rest)
}

/// See `thread::of`.
pub(super) fn thread(insn: &Instruction) -> Option<Thread> {
    Some(match (size0(insn), insn.op_count()) {
        _ if insn.mnemonic() != Mnemonic::Imul || has_memory(insn) => return None,
        (4, 2) => quick_imul::<u32, false>,
        (4, 3) => quick_imul::<u32, true>,
        (8, 2) => quick_imul::<u64, false>,
        (8, 3) => quick_imul::<u64, true>,
        _ => return None,
    })
}
