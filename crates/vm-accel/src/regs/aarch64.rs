//! aarch64 register names and the groups of state beyond the general-purpose registers.

use crate::error::{AccelError, VcpuResult};

/// Names of the indices in [`GuestRegs::gpr`](super::GuestRegs::gpr).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(usize)]
#[allow(missing_docs)]
pub enum Reg {
    X0 = 0,
    X1,
    X2,
    X3,
    X4,
    X5,
    X6,
    X7,
    X8,
    X9,
    X10,
    X11,
    X12,
    X13,
    X14,
    X15,
    X16,
    X17,
    X18,
    X19,
    X20,
    X21,
    X22,
    X23,
    X24,
    X25,
    X26,
    X27,
    X28,
    X29,
    X30,
    /// The stack pointer that PSTATE selects.
    Sp,
}

/// V0–V31 and the floating-point control and status registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Aarch64FpuRegs {
    /// V0–V31.
    pub v: [u128; 32],
    /// Floating-point control register.
    pub fpcr: u32,
    /// Floating-point status register.
    pub fpsr: u32,
}

/// The state of an aarch64 vCPU beyond [`VcpuOps`](crate::VcpuOps). Every method answers [`AccelError::Unsupported`]
/// unless the backend overrides it.
pub trait Aarch64Vcpu {
    /// Reads a system register, named by its MRS encoding: op0, op1, CRn, CRm, op2 as in
    /// `op0 << 14 | op1 << 11 | CRn << 7 | CRm << 3 | op2` (Arm ARM, C5.1.2).
    ///
    /// # Errors
    /// [`AccelError::InvalidArgument`] if the platform does not know the register.
    fn get_sys_reg(&self, encoding: u16) -> VcpuResult<u64> {
        let _ = encoding;
        Err(self.group_unsupported("system registers"))
    }

    /// Sets a system register; see [`get_sys_reg`](Aarch64Vcpu::get_sys_reg).
    ///
    /// # Errors
    /// [`AccelError::InvalidArgument`] if the platform does not know the register or refuses the value.
    fn set_sys_reg(&mut self, encoding: u16, value: u64) -> VcpuResult<()> {
        let _ = (encoding, value);
        Err(self.group_unsupported("system registers"))
    }

    /// An [`AccelError::Unsupported`] of this vCPU's backend.
    fn group_unsupported(&self, what: &'static str) -> AccelError {
        AccelError::Unsupported { kind: None, what }
    }
}
