//! Widths of integer operands, operand forms, and how the operands of an iced instruction become an [`Op`].

use iced_x86::{Instruction, OpKind, Register};

use super::{AM_16, AM_32, AM_LONG, AM_SEG, Handler, NO_REG, Op, SC_STACK};
use crate::core::Core;
use crate::state::seg;

/// An integer operand size.
pub(crate) trait Word: Copy + Eq + 'static {
    /// Bits.
    const BITS: u32;
    /// Bytes.
    const BYTES: u64 = Self::BITS as u64 / 8;
    /// log2 of the bytes.
    const LOG: u32 = Self::BITS.trailing_zeros() - 3;
    /// All ones, zero-extended.
    const MASK: u64 = u64::MAX >> (64 - Self::BITS);
    /// The low bits of `v`.
    fn cut(v: u64) -> u64 {
        v & Self::MASK
    }
    /// The value sign-extended from its size.
    fn sign_extend(v: u64) -> i64 {
        ((v << (64 - Self::BITS)) as i64) >> (64 - Self::BITS)
    }
    /// The top bit.
    fn sign(v: u64) -> bool {
        v >> (Self::BITS - 1) & 1 != 0
    }
    /// Reads a register, zero-extended.
    fn get(cpu: &Core, reg: u8) -> u64;
    /// Writes a register: 32 bits clear the upper half, 8 and 16 bits keep the rest.
    fn set(cpu: &mut Core, reg: u8, value: u64);
}

impl Word for u8 {
    const BITS: u32 = 8;
    #[inline(always)]
    fn get(cpu: &Core, reg: u8) -> u64 {
        // 16 to 19 are AH, CH, DH, BH.
        cpu.st.gpr[usize::from(reg & 15)] >> (reg >> 1 & 8) & 0xff
    }
    #[inline(always)]
    fn set(cpu: &mut Core, reg: u8, value: u64) {
        let shift = reg >> 1 & 8;
        let slot = &mut cpu.st.gpr[usize::from(reg & 15)];
        *slot = *slot & !(0xff << shift) | (value & 0xff) << shift;
    }
}

impl Word for u16 {
    const BITS: u32 = 16;
    #[inline(always)]
    fn get(cpu: &Core, reg: u8) -> u64 {
        cpu.st.gpr[usize::from(reg & 31)] & 0xffff
    }
    #[inline(always)]
    fn set(cpu: &mut Core, reg: u8, value: u64) {
        let slot = &mut cpu.st.gpr[usize::from(reg & 15)];
        *slot = *slot & !0xffff | value & 0xffff;
    }
}

impl Word for u32 {
    const BITS: u32 = 32;
    #[inline(always)]
    fn get(cpu: &Core, reg: u8) -> u64 {
        cpu.st.gpr[usize::from(reg & 31)] & 0xffff_ffff
    }
    #[inline(always)]
    fn set(cpu: &mut Core, reg: u8, value: u64) {
        cpu.st.gpr[usize::from(reg & 15)] = value & 0xffff_ffff;
    }
}

impl Word for u64 {
    const BITS: u32 = 64;
    #[inline(always)]
    fn get(cpu: &Core, reg: u8) -> u64 {
        cpu.st.gpr[usize::from(reg & 31)]
    }
    #[inline(always)]
    fn set(cpu: &mut Core, reg: u8, value: u64) {
        cpu.st.gpr[usize::from(reg & 15)] = value;
    }
}

impl Core {
    /// A general register, zero-extended.
    #[inline(always)]
    pub(crate) fn reg<T: Word>(&self, reg: u8) -> u64 {
        T::get(self, reg)
    }

    /// Writes a general register.
    #[inline(always)]
    pub(crate) fn set_reg<T: Word>(&mut self, reg: u8, value: u64) {
        T::set(self, reg, value);
    }
}

/// Where the first two operands are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    /// One register, or register and register.
    Reg,
    /// Register and immediate.
    RegImm,
    /// Register and memory.
    RegMem,
    /// One memory operand, or memory and register.
    MemReg,
    /// Memory and immediate.
    MemImm,
}

impl Form {
    /// The form of an instruction, from its first two operands.
    pub(crate) fn of(insn: &Instruction) -> Form {
        let memory = |k: u32| insn.op_count() > k && insn.op_kind(k) == OpKind::Memory;
        let immediate = insn.op_count() > 1 && is_immediate(insn.op_kind(1));
        match (memory(0), memory(1), immediate) {
            (true, _, true) => Form::MemImm,
            (true, _, false) => Form::MemReg,
            (_, true, _) => Form::RegMem,
            (_, _, true) => Form::RegImm,
            _ => Form::Reg,
        }
    }
}

/// Whether any explicit operand is in memory.
pub(crate) fn has_memory(insn: &Instruction) -> bool {
    (0..insn.op_count()).any(|k| insn.op_kind(k) == OpKind::Memory)
}

/// An immediate operand of any size.
pub(crate) fn is_immediate(kind: OpKind) -> bool {
    matches!(
        kind,
        OpKind::Immediate8
            | OpKind::Immediate8_2nd
            | OpKind::Immediate16
            | OpKind::Immediate32
            | OpKind::Immediate64
            | OpKind::Immediate8to16
            | OpKind::Immediate8to32
            | OpKind::Immediate8to64
            | OpKind::Immediate32to64
    )
}

/// The number of a register as [`Op`] holds it.
pub(crate) fn number(reg: Register) -> u8 {
    match reg {
        Register::None => NO_REG,
        Register::AH => 16,
        Register::CH => 17,
        Register::DH => 18,
        Register::BH => 19,
        _ if reg.is_gpr() => reg.full_register().number() as u8,
        _ => reg.number() as u8,
    }
}

/// The number of a segment register.
pub(crate) fn segment_number(reg: Register) -> u8 {
    match reg {
        Register::ES => 0,
        Register::CS => 1,
        Register::SS => 2,
        Register::DS => 3,
        Register::FS => 4,
        Register::GS => 5,
        _ => 6,
    }
}

/// The segment of the memory operand; `stack`: without a prefix it would be the stack's. In 64-bit mode prefixes for other segments
/// than FS and GS are ignored (AMD APM vol. 2, 4.5.3), which shows in the exception for an address that is not canonical.
fn operand_segment(insn: &Instruction, stack: bool, code64: bool) -> u8 {
    match insn.memory_segment() {
        named if !code64 || matches!(named, Register::FS | Register::GS) => segment_number(named),
        _ if stack => seg::SS as u8,
        _ => seg::DS as u8,
    }
}

impl Op {
    /// The operands of `insn` in the uniform layout; `off` is its offset in the block.
    pub(crate) fn new(insn: &Instruction, f: Handler, off: u8, code64: bool) -> Op {
        let mut op = Op { off, len: insn.len() as u8, ..Op::nothing(f) };
        for k in 0..insn.op_count() {
            let kind = insn.op_kind(k);
            match kind {
                OpKind::Register if k == 0 => {
                    op.d = number(insn.op_register(0));
                    op.a = op.d;
                }
                OpKind::Register if k == 1 => op.s = number(insn.op_register(1)),
                // MASKMOVDQU and MASKMOVQ: operand 0 is implicit memory, the mask register takes its place.
                OpKind::Register if k == 2 && op.d == NO_REG => op.d = number(insn.op_register(2)),
                OpKind::Memory => op.memory(insn, code64),
                // ENTER, EXTRQ: the second immediate goes above the first.
                OpKind::Immediate8_2nd => op.imm = op.imm & 0xffff | u64::from(insn.immediate8_2nd()) << 16,
                _ if is_immediate(kind) => op.imm = insn.immediate(k),
                OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => {
                    op.imm = insn.near_branch_target()
                }
                OpKind::FarBranch16 => {
                    op.imm = u64::from(insn.far_branch16()) | u64::from(insn.far_branch_selector()) << 32
                }
                OpKind::FarBranch32 => {
                    op.imm = u64::from(insn.far_branch32()) | u64::from(insn.far_branch_selector()) << 32
                }
                OpKind::MemorySegSI
                | OpKind::MemorySegESI
                | OpKind::MemorySegRSI
                | OpKind::MemorySegDI
                | OpKind::MemorySegEDI
                | OpKind::MemorySegRDI => {
                    op.implicit(kind, operand_segment(insn, false, code64), code64);
                }
                OpKind::MemoryESDI | OpKind::MemoryESEDI | OpKind::MemoryESRDI if op.am == 0 => {
                    op.implicit(kind, seg::ES as u8, code64);
                }
                _ => {}
            }
        }
        op
    }

    fn memory(&mut self, insn: &Instruction, code64: bool) {
        self.disp = insn.memory_displacement64();
        let base = insn.memory_base();
        self.b = if insn.is_ip_rel_memory_operand() { NO_REG } else { number(base) };
        self.i = number(insn.memory_index());
        self.mul = insn.memory_index_scale() as u8;
        let address = match base.size().max(insn.memory_index().size()) {
            0 if code64 => (insn.memory_displ_size() as usize).max(4),
            0 if insn.memory_displ_size() == 2 => 2,
            0 => 4,
            size => size,
        };
        // A displacement alone in 64-bit mode is sign-extended unless a 67 prefix cut it; iced gives it whole already.
        let address =
            if code64 && base == Register::None && insn.memory_index() == Register::None { 8 } else { address };
        let stack = matches!(base.full_register(), Register::RSP | Register::RBP);
        self.address_mode(address, operand_segment(insn, stack, code64), code64);
    }

    /// The source or destination of a string instruction: `b` is unused, the handler knows the register.
    fn implicit(&mut self, kind: OpKind, segment: u8, code64: bool) {
        let address = match kind {
            OpKind::MemorySegSI | OpKind::MemorySegDI | OpKind::MemoryESDI => 2,
            OpKind::MemorySegESI | OpKind::MemorySegEDI | OpKind::MemoryESEDI => 4,
            _ => 8,
        };
        self.address_mode(address, segment, code64);
    }

    /// Sets `am` and `sc` for a segment and an address size in bytes.
    pub(crate) fn address_mode(&mut self, address: usize, segment: u8, code64: bool) {
        let size = match address {
            2 => AM_16,
            4 => AM_32,
            _ => 0,
        };
        if usize::from(segment) == seg::SS {
            self.sc |= SC_STACK;
        }
        self.am = if !code64 {
            AM_SEG | size | segment
        } else if usize::from(segment) == seg::FS || usize::from(segment) == seg::GS {
            AM_SEG | AM_LONG | size | segment
        } else if size != 0 {
            AM_SEG | AM_LONG | size | 6
        } else {
            0
        };
    }
}

/// Picks the instance of a generic handler for an operand size in bytes: `by_size!(4, handler::<[T], true>)` is
/// `handler::<u32, true>`.
macro_rules! by_size {
    ($bytes:expr, $h:ident::<[T] $(, $arg:tt)*>) => {
        match $bytes {
            1 => $h::<u8 $(, $arg)*> as $crate::exec::Handler,
            2 => $h::<u16 $(, $arg)*>,
            4 => $h::<u32 $(, $arg)*>,
            _ => $h::<u64 $(, $arg)*>,
        }
    };
}
pub(crate) use by_size;

/// The size in bytes of operand 0, as a register or as memory.
pub(crate) fn size0(insn: &Instruction) -> usize {
    match insn.op0_kind() {
        OpKind::Register => insn.op0_register().size(),
        OpKind::Memory => insn.memory_size().size(),
        _ => 0,
    }
}
