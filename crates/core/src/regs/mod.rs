//! Architecture-neutral registers and the tables that map them to a platform's.
//!
//! [`GuestRegs`] is indexed, so that one table per platform ([`reg_map!`](crate::reg_map)) can drive every conversion.
//! Nobody writes an index as a number: [`x86_64::Reg`] and [`aarch64::Reg`] name them.

pub mod aarch64;
pub mod x86_64;

/// General-purpose registers, program counter and flags of either architecture.
///
/// | | x86-64 ([`x86_64::Reg`]) | aarch64 ([`aarch64::Reg`]) |
/// |---|---|---|
/// | `gpr` | RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8–R15 at 0–15 (ModRM order); 16–31 are 0 | X0–X30; 31 is the stack pointer that PSTATE selects |
/// | `pc` | RIP | PC |
/// | `flags` | RFLAGS | PSTATE in SPSR layout |
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct GuestRegs {
    /// General-purpose registers.
    pub gpr: [u64; 32],
    /// Program counter.
    pub pc: u64,
    /// Flags register.
    pub flags: u64,
}

impl GuestRegs {
    /// The index under which register tables know the program counter.
    pub const PC: usize = 32;
    /// The index under which register tables know the flags.
    pub const FLAGS: usize = 33;

    /// The register at a table index: 0–31, [`GuestRegs::PC`] or [`GuestRegs::FLAGS`].
    ///
    /// # Panics
    /// If `index` is above [`GuestRegs::FLAGS`].
    #[must_use]
    #[inline(always)]
    pub const fn get(&self, index: usize) -> u64 {
        match index {
            Self::PC => self.pc,
            Self::FLAGS => self.flags,
            _ => self.gpr[index],
        }
    }

    /// Sets the register at a table index; see [`GuestRegs::get`].
    ///
    /// # Panics
    /// If `index` is above [`GuestRegs::FLAGS`].
    #[inline(always)]
    pub const fn set(&mut self, index: usize, value: u64) {
        match index {
            Self::PC => self.pc = value,
            Self::FLAGS => self.flags = value,
            _ => self.gpr[index] = value,
        }
    }
}

/// One line of a platform's register table, as [`reg_map!`](crate::reg_map) makes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RegMapping {
    /// Index in [`GuestRegs`]: 0–31, [`GuestRegs::PC`] or [`GuestRegs::FLAGS`].
    pub index: usize,
    /// The platform's name of the register.
    pub name: &'static str,
}

/// Floating-point and SIMD registers of one architecture.
#[non_exhaustive]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FpuRegs {
    /// x87 and SSE. Wider vectors go through [`x86_64::X86Vcpu::get_xsave`].
    X86(x86_64::X86FpuRegs),
    /// V0–V31, FPCR, FPSR.
    Aarch64(aarch64::Aarch64FpuRegs),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_indices_reach_every_register() {
        let mut regs = GuestRegs::default();
        for index in 0..=GuestRegs::FLAGS {
            regs.set(index, 1000 + index as u64);
        }
        for index in 0..=GuestRegs::FLAGS {
            assert_eq!(regs.get(index), 1000 + index as u64);
        }
        assert_eq!((regs.pc, regs.flags), (1032, 1033));
    }
}
