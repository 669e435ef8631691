//! String instructions, with and without REP: restartable per element, in pieces of whole pages where memory is plain RAM. Each element
//! is committed (registers moved on) before the next begins, so a fault or a pending access finds exact state.

use iced_x86::{Instruction, Mnemonic};

use super::form::{Word, by_size};
use super::{AM_16, AM_32, AM_LONG, Exec, Handler, Leave, Op};
use crate::core::{Core, mode};
use crate::exception::Exception;
use crate::flags::{Flags, kind};
use crate::state::{rflags, seg};

const MOVS: u8 = 0;
const STOS: u8 = 1;
const LODS: u8 = 2;
const SCAS: u8 = 3;
const CMPS: u8 = 4;
const INS: u8 = 5;
const OUTS: u8 = 6;

const ONCE: u8 = 0;
const REPE: u8 = 1;
const REPNE: u8 = 2;

/// Elements or pieces between two looks for interrupts.
const TURNS: u32 = 256;

const RCX: usize = 1;
const RSI: usize = 6;
const RDI: usize = 7;

/// The address mask of an instruction.
#[inline(always)]
fn address_mask(op: &Op) -> u64 {
    if op.am & AM_32 != 0 {
        0xffff_ffff
    } else if op.am & AM_16 != 0 {
        0xffff
    } else {
        u64::MAX
    }
}

/// Sets a register as wide as the address size.
#[inline(always)]
fn set_address(cpu: &mut Core, reg: usize, mask: u64, value: u64) {
    let slot = &mut cpu.st.gpr[reg];
    *slot = if mask == 0xffff { *slot & !0xffff | value & 0xffff } else { value & mask };
}

/// The same operand with ES, which cannot be overridden, as its segment.
fn destination(op: &Op) -> Op {
    let segment = if op.am & AM_LONG != 0 { 6 } else { seg::ES as u8 };
    Op { am: if op.am == 0 { 0 } else { op.am & !7 | segment }, ..*op }
}

/// How many bytes the piece at `offset` can have: to the end of its page and of the address space.
fn room(lin: u64, offset: u64, mask: u64) -> u64 {
    (0x1000 - (lin & 0xfff)).min((mask - offset).saturating_add(1))
}

/// MOVS or STOS of many elements at once; the number of elements done, zero if it must be element by element.
fn piece<T: Word, const K: u8>(cpu: &mut Core, op: &Op, dst: &Op, mask: u64) -> u64 {
    let count = cpu.st.gpr[RCX] & mask;
    if cpu.st.rflags & rflags::DF != 0 || count < 2 {
        return 0;
    }
    let to = cpu.st.gpr[RDI] & mask;
    let from = cpu.st.gpr[RSI] & mask;
    let Ok(to_lin) = cpu.segmented(dst, to, T::BYTES, true) else {
        return 0;
    };
    let mut bytes = room(to_lin, to, mask);
    let mut from_lin = 0;
    if K == MOVS {
        let Ok(lin) = cpu.segmented(op, from, T::BYTES, false) else {
            return 0;
        };
        from_lin = lin;
        bytes = bytes.min(room(lin, from, mask));
    }
    let mut elements = (bytes >> T::LOG).min(count);
    if elements == 0 {
        return 0;
    }
    // Outside 64-bit mode the whole piece must be inside the segments.
    if cpu.segmented(dst, to, elements << T::LOG, true).is_err()
        || K == MOVS && cpu.segmented(op, from, elements << T::LOG, false).is_err()
    {
        return 0;
    }
    let Some(to_host) = cpu.bulk(to_lin, elements << T::LOG, true) else {
        return 0;
    };
    if K == MOVS {
        let Some(from_host) = cpu.bulk(from_lin, elements << T::LOG, false) else {
            return 0;
        };
        let ahead = to_host.wrapping_sub(from_host) as u64;
        if ahead != 0 && ahead < elements << T::LOG {
            // The copy reads what it wrote: only as far as the distance at once.
            elements = ahead >> T::LOG;
            if elements == 0 {
                return 0;
            }
        }
        cpu.bulk_copy(from_host, to_host, elements << T::LOG);
        set_address(cpu, RSI, mask, from + (elements << T::LOG));
    } else {
        let value = cpu.st.gpr[0];
        match T::BITS {
            8 => cpu.bulk_fill(to_host, value as u8, elements),
            16 => cpu.bulk_fill(to_host, value as u16, elements),
            32 => cpu.bulk_fill(to_host, value as u32, elements),
            _ => cpu.bulk_fill(to_host, value, elements),
        }
    }
    set_address(cpu, RDI, mask, to + (elements << T::LOG));
    set_address(cpu, RCX, mask, count - elements);
    elements
}

/// One element: accesses first, then registers.
#[inline(always)]
fn element<T: Word, const K: u8>(cpu: &mut Core, op: &Op, dst: &Op, mask: u64) -> Exec {
    let step = if cpu.st.rflags & rflags::DF != 0 { T::BYTES.wrapping_neg() } else { T::BYTES };
    let from = cpu.st.gpr[RSI] & mask;
    let to = cpu.st.gpr[RDI] & mask;
    match K {
        MOVS => {
            let lin = cpu.segmented(op, from, T::BYTES, false)?;
            let value = cpu.read_word::<T>(lin)?;
            let lin = cpu.segmented(dst, to, T::BYTES, true)?;
            cpu.write_word::<T>(lin, value)?;
        }
        STOS => {
            let lin = cpu.segmented(dst, to, T::BYTES, true)?;
            let value = cpu.reg::<T>(0);
            cpu.write_word::<T>(lin, value)?;
        }
        LODS => {
            let lin = cpu.segmented(op, from, T::BYTES, false)?;
            let value = cpu.read_word::<T>(lin)?;
            cpu.set_reg::<T>(0, value);
        }
        SCAS | CMPS => {
            let a = if K == CMPS {
                let lin = cpu.segmented(op, from, T::BYTES, false)?;
                cpu.read_word::<T>(lin)?
            } else {
                cpu.reg::<T>(0)
            };
            let lin = cpu.segmented(dst, to, T::BYTES, false)?;
            let b = cpu.read_word::<T>(lin)?;
            cpu.fl = Flags { kind: kind::SUB | T::LOG, aux: 0, a, r: T::cut(a.wrapping_sub(b)) };
        }
        _ => {
            cpu.need_alone()?;
            let port = cpu.st.gpr[2] as u16;
            cpu.check_port(port, T::BYTES)?;
            let mut data = [0; 4];
            let data = &mut data[..T::BYTES as usize];
            if K == INS {
                // What is read from a port must not be lost to a page fault.
                let lin = cpu.segmented(dst, to, T::BYTES, true)?;
                cpu.probe_write(lin, T::BYTES)?;
                cpu.port_access(port, data, false)?;
                let set = cpu.set;
                cpu.write_bytes(set, lin, data)?;
            } else {
                let lin = cpu.segmented(op, from, T::BYTES, false)?;
                let set = cpu.set;
                cpu.read_bytes(set, lin, data)?;
                cpu.port_access(port, data, true)?;
            }
            cpu.watch_port(port, T::BYTES);
        }
    }
    if matches!(K, MOVS | LODS | CMPS | OUTS) {
        set_address(cpu, RSI, mask, from.wrapping_add(step));
    }
    if !matches!(K, LODS | OUTS) {
        set_address(cpu, RDI, mask, to.wrapping_add(step));
    }
    Ok(())
}

fn string<T: Word, const K: u8, const REP: u8>(cpu: &mut Core, op: &Op) -> Exec {
    let mask = address_mask(op);
    let dst = destination(op);
    if REP == ONCE {
        return element::<T, K>(cpu, op, &dst, mask);
    }
    let one_by_one = cpu.alone && (cpu.st.rflags & rflags::TF != 0 || cpu.debug.single_step || cpu.watching);
    for _ in 0..TURNS {
        if cpu.st.gpr[RCX] & mask == 0 {
            return Ok(());
        }
        if matches!(K, MOVS | STOS) && !one_by_one && piece::<T, K>(cpu, op, &dst, mask) != 0 {
            continue;
        }
        element::<T, K>(cpu, op, &dst, mask)?;
        let left = (cpu.st.gpr[RCX] & mask).wrapping_sub(1);
        set_address(cpu, RCX, mask, left);
        // An element that waited for the machine ends the turn: whoever finishes an access finishes just that element.
        let waited = cpu.alone && cpu.replay.resume;
        if cpu.alone {
            cpu.replay.commit();
        }
        let stop = match (K, REP) {
            (SCAS | CMPS, REPE) => !cpu.fl.zf(),
            (SCAS | CMPS, _) => cpu.fl.zf(),
            _ => false,
        };
        if left & mask == 0 || stop {
            return Ok(());
        }
        if one_by_one || waited {
            break;
        }
    }
    Err(Leave::Again)
}

/// IN and OUT.
fn port<T: Word, const WRITE: bool, const IMM: bool>(cpu: &mut Core, op: &Op) -> Exec {
    cpu.need_alone()?;
    let port = if IMM { op.imm as u8 as u16 } else { cpu.st.gpr[2] as u16 };
    cpu.check_port(port, T::BYTES)?;
    let mut data = (cpu.st.gpr[0] as u32).to_le_bytes();
    let data = &mut data[..T::BYTES as usize];
    cpu.port_access(port, data, WRITE)?;
    if !WRITE {
        let mut value = [0; 4];
        value[..data.len()].copy_from_slice(data);
        cpu.set_reg::<T>(0, u64::from(u32::from_le_bytes(value)));
    }
    cpu.watch_port(port, T::BYTES);
    Err(Leave::Next)
}

impl Core {
    /// The right to use ports: IOPL, or the bitmap in the TSS (SDM vol. 1, 18.5).
    fn check_port(&mut self, port: u16, len: u64) -> Exec {
        if !self.pe() || self.cpl() <= self.iopl() && self.mode & mode::VM86 == 0 {
            return Ok(());
        }
        let tr = self.st.tr;
        if tr.unusable || tr.kind() & 8 == 0 || tr.limit < 103 {
            return self.raise(Exception::Gp(0));
        }
        let set = self.system_set();
        let map: u16 = self.read_as(set, self.wrap(tr.base.wrapping_add(102)))?;
        let at = u64::from(map) + u64::from(port / 8);
        if at + 1 > u64::from(tr.limit) {
            return self.raise(Exception::Gp(0));
        }
        let bits: u16 = self.read_as(set, self.wrap(tr.base.wrapping_add(at)))?;
        if u64::from(bits) >> (port % 8) & ((1 << len) - 1) != 0 {
            return self.raise(Exception::Gp(0));
        }
        Ok(())
    }
}

fn pick<const K: u8>(insn: &Instruction, size: usize) -> Handler {
    if insn.has_repne_prefix() {
        by_size!(size, string::<[T], K, REPNE>)
    } else if insn.has_rep_prefix() {
        by_size!(size, string::<[T], K, REPE>)
    } else {
        by_size!(size, string::<[T], K, ONCE>)
    }
}

/// See the module documentation of `exec`.
pub(crate) fn lower(insn: &Instruction) -> Option<Handler> {
    use Mnemonic as M;
    if !insn.is_string_instruction() {
        let size = match insn.mnemonic() {
            M::In => insn.op0_register().size(),
            M::Out => insn.op1_register().size(),
            _ => return None,
        };
        let immediate = super::form::is_immediate(insn.op_kind(u32::from(insn.mnemonic() == M::In)));
        return Some(match (insn.mnemonic() == M::Out, immediate) {
            (false, false) => by_size!(size, port::<[T], false, false>),
            (false, true) => by_size!(size, port::<[T], false, true>),
            (true, false) => by_size!(size, port::<[T], true, false>),
            (true, true) => by_size!(size, port::<[T], true, true>),
        });
    }
    let size = insn.memory_size().size();
    Some(match insn.mnemonic() {
        M::Movsb | M::Movsw | M::Movsd | M::Movsq => pick::<MOVS>(insn, size),
        M::Stosb | M::Stosw | M::Stosd | M::Stosq => pick::<STOS>(insn, size),
        M::Lodsb | M::Lodsw | M::Lodsd | M::Lodsq => pick::<LODS>(insn, size),
        M::Scasb | M::Scasw | M::Scasd | M::Scasq => pick::<SCAS>(insn, size),
        M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq => pick::<CMPS>(insn, size),
        M::Insb | M::Insw | M::Insd => pick::<INS>(insn, size),
        M::Outsb | M::Outsw | M::Outsd => pick::<OUTS>(insn, size),
        _ => return None,
    })
}
