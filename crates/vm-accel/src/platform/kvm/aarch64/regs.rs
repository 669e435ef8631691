//! Registers by KVM's one-reg interface, and the groups of state beyond them.
//!
//! A register's number carries architecture, size and kind: core registers by their place in `struct kvm_regs` in units of
//! 4 bytes, system registers by their MRS encoding (Linux `Documentation/virt/kvm/api.rst`, KVM_SET_ONE_REG).

use super::super::vcpu::KvmVcpu;
use super::super::{errno, refused};
use crate::ffi::kvm as ffi;
use kvm_bindings as kb;
use std::mem::offset_of;
use vm_accel_core::error::{AccelError, VcpuResult};
use vm_accel_core::regs::aarch64::{
    self as aarch64, Aarch64Events, Aarch64Features, Aarch64FpuRegs, Aarch64MpState, Aarch64Vcpu, PlatformRegister,
    Reg, VirtualTimer,
};
use vm_accel_core::regs::{FpuRegs, GuestRegs};
use vm_accel_core::vcpu_common::VcpuOps;

/// The core register at `offset` of `struct kvm_regs`, of the size that `size` says.
const fn core(offset: usize, size: u64) -> u64 {
    kb::KVM_REG_ARM64 | size | kb::KVM_REG_ARM_CORE as u64 | (offset as u64 / 4)
}

const fn core64(offset: usize) -> u64 {
    core(offset, kb::KVM_REG_SIZE_U64)
}

const fn system(encoding: u16) -> u64 {
    kb::KVM_REG_ARM64 | kb::KVM_REG_SIZE_U64 | kb::KVM_REG_ARM64_SYSREG as u64 | encoding as u64
}

/// Names register `n` of each list `base + n * step`.
macro_rules! numbered {
    ($make:expr, $step:literal: $($name:ident = $n:literal),* $(,)?) => {
        $(const $name: u64 = $make($n * $step);)*
    };
}

const fn general(offset: usize) -> u64 {
    core64(offset_of!(kb::kvm_regs, regs.regs) + offset)
}

const fn vector(offset: usize) -> u64 {
    core(offset_of!(kb::kvm_regs, fp_regs.vregs) + offset, kb::KVM_REG_SIZE_U128)
}

numbered!(general, 8:
    X0 = 0, X1 = 1, X2 = 2, X3 = 3, X4 = 4, X5 = 5, X6 = 6, X7 = 7, X8 = 8, X9 = 9, X10 = 10, X11 = 11, X12 = 12,
    X13 = 13, X14 = 14, X15 = 15, X16 = 16, X17 = 17, X18 = 18, X19 = 19, X20 = 20, X21 = 21, X22 = 22, X23 = 23,
    X24 = 24, X25 = 25, X26 = 26, X27 = 27, X28 = 28, X29 = 29, X30 = 30,
);
numbered!(vector, 16:
    V0 = 0, V1 = 1, V2 = 2, V3 = 3, V4 = 4, V5 = 5, V6 = 6, V7 = 7, V8 = 8, V9 = 9, V10 = 10, V11 = 11, V12 = 12,
    V13 = 13, V14 = 14, V15 = 15, V16 = 16, V17 = 17, V18 = 18, V19 = 19, V20 = 20, V21 = 21, V22 = 22, V23 = 23,
    V24 = 24, V25 = 25, V26 = 26, V27 = 27, V28 = 28, V29 = 29, V30 = 30, V31 = 31,
);
pub(super) const PC: u64 = core64(offset_of!(kb::kvm_regs, regs.pc));
const PSTATE: u64 = core64(offset_of!(kb::kvm_regs, regs.pstate));
const SP_EL0: u64 = core64(offset_of!(kb::kvm_regs, regs.sp));
const SP_EL1: u64 = core64(offset_of!(kb::kvm_regs, sp_el1));
const ELR_EL1: u64 = core64(offset_of!(kb::kvm_regs, elr_el1));
const SPSR_EL1: u64 = core64(offset_of!(kb::kvm_regs, spsr));
const FPSR: u64 = core(offset_of!(kb::kvm_regs, fp_regs.fpsr), kb::KVM_REG_SIZE_U32);
const FPCR: u64 = core(offset_of!(kb::kvm_regs, fp_regs.fpcr), kb::KVM_REG_SIZE_U32);
/// No number of the kernel's: the stack pointer that PSTATE selects, which [`KvmVcpu::get_core`] resolves.
const SP: u64 = 0;

/// PSTATE: the exception level (bits 3:2), SPSel (bit 0), and "AArch32" (bit 4); Arm ARM, C5.2.19.
const PSTATE_AARCH32: u64 = 1 << 4;
const PSTATE_EL1H: u64 = 5;

// PSTATE goes before SP: the new one selects the stack pointer that is set.
crate::impl_reg_accessors!(
    KvmVcpu,
    get_core,
    set_core,
    reg_map!(
        Reg::X0 => X0, Reg::X1 => X1, Reg::X2 => X2, Reg::X3 => X3, Reg::X4 => X4, Reg::X5 => X5, Reg::X6 => X6,
        Reg::X7 => X7, Reg::X8 => X8, Reg::X9 => X9, Reg::X10 => X10, Reg::X11 => X11, Reg::X12 => X12,
        Reg::X13 => X13, Reg::X14 => X14, Reg::X15 => X15, Reg::X16 => X16, Reg::X17 => X17, Reg::X18 => X18,
        Reg::X19 => X19, Reg::X20 => X20, Reg::X21 => X21, Reg::X22 => X22, Reg::X23 => X23, Reg::X24 => X24,
        Reg::X25 => X25, Reg::X26 => X26, Reg::X27 => X27, Reg::X28 => X28, Reg::X29 => X29, Reg::X30 => X30,
        GuestRegs::PC => PC, GuestRegs::FLAGS => PSTATE, Reg::Sp => SP,
    )
);

crate::impl_reg_accessors!(
    KvmVcpu,
    wide get_vector, set_vector,
    reg_map!(
        0 => V0, 1 => V1, 2 => V2, 3 => V3, 4 => V4, 5 => V5, 6 => V6, 7 => V7, 8 => V8, 9 => V9, 10 => V10,
        11 => V11, 12 => V12, 13 => V13, 14 => V14, 15 => V15, 16 => V16, 17 => V17, 18 => V18, 19 => V19,
        20 => V20, 21 => V21, 22 => V22, 23 => V23, 24 => V24, 25 => V25, 26 => V26, 27 => V27, 28 => V28,
        29 => V29, 30 => V30, 31 => V31,
    )
);

/// System registers whose number is not their encoding: four that are core registers, and two that the kernel's interface
/// has exchanged (`arch/arm64/include/uapi/asm/kvm.h`, "KVM_REG_ARM_TIMER_CVAL").
const EXCEPTIONS: [(u16, u64); 6] = [
    (aarch64::SP_EL0, SP_EL0),
    (aarch64::SP_EL1, SP_EL1),
    (aarch64::ELR_EL1, ELR_EL1),
    (aarch64::SPSR_EL1, SPSR_EL1),
    (aarch64::CNTVCT_EL0, system(aarch64::CNTV_CVAL_EL0)),
    (aarch64::CNTV_CVAL_EL0, system(aarch64::CNTVCT_EL0)),
];

fn number_of(encoding: u16) -> u64 {
    EXCEPTIONS
        .iter()
        .find(|(exception, _)| *exception == encoding)
        .map_or_else(|| system(encoding), |(_, number)| *number)
}

/// The encoding of a register's number, if it is a system register's.
fn encoding_of(number: u64) -> Option<u16> {
    let exception = EXCEPTIONS.iter().find(|(_, theirs)| *theirs == number);
    exception.map(|(encoding, _)| *encoding).or_else(|| (number & !0xffff == system(0)).then_some(number as u16))
}

/// Writing the virtual count moves it for all vCPUs, so it goes last.
fn is_count(number: u64) -> bool {
    number == number_of(aarch64::CNTVCT_EL0)
}

/// Bytes of a register.
fn size(number: u64) -> usize {
    1 << ((number & kb::KVM_REG_SIZE_MASK) >> kb::KVM_REG_SIZE_SHIFT)
}

/// MP states, ours and KVM's.
const MP_STATES: [(Aarch64MpState, u32); 3] = [
    (Aarch64MpState::Running, kb::KVM_MP_STATE_RUNNABLE),
    (Aarch64MpState::PoweredOff, kb::KVM_MP_STATE_STOPPED),
    (Aarch64MpState::Suspended, kb::KVM_MP_STATE_SUSPENDED),
];

impl KvmVcpu {
    fn get_one<const N: usize>(&self, number: u64) -> VcpuResult<[u8; N]> {
        let mut value = [0; N];
        self.fd.get_one_reg(number, &mut value).map_err(refused("KVM_GET_ONE_REG"))?;
        Ok(value)
    }

    fn set_one(&self, number: u64, value: &[u8]) -> VcpuResult<()> {
        self.fd.set_one_reg(number, value).map(drop).map_err(refused("KVM_SET_ONE_REG"))
    }

    /// The number of the stack pointer that PSTATE selects.
    fn stack_pointer(&self) -> VcpuResult<u64> {
        let pstate = u64::from_le_bytes(self.get_one(PSTATE)?);
        let el1h = pstate & (PSTATE_AARCH32 | 0xf) == PSTATE_EL1H;
        Ok(if el1h { SP_EL1 } else { SP_EL0 })
    }

    pub(super) fn get_core(&self, number: u64) -> VcpuResult<u64> {
        let number = if number == SP { self.stack_pointer()? } else { number };
        Ok(u64::from_le_bytes(self.get_one(number)?))
    }

    fn set_core(&mut self, number: u64, value: u64) -> VcpuResult<()> {
        let number = if number == SP { self.stack_pointer()? } else { number };
        self.set_one(number, &value.to_le_bytes())
    }

    fn get_vector(&self, number: u64) -> VcpuResult<u128> {
        Ok(u128::from_le_bytes(self.get_one(number)?))
    }

    fn set_vector(&mut self, number: u64, value: u128) -> VcpuResult<()> {
        self.set_one(number, &value.to_le_bytes())
    }

    pub(in super::super) fn arch_get_regs(&self) -> VcpuResult<GuestRegs> {
        self.get_regs_mapped()
    }

    pub(in super::super) fn arch_set_regs(&mut self, regs: &GuestRegs) -> VcpuResult<()> {
        self.set_regs_mapped(regs)
    }

    /// With SVE the kernel has the vectors under other numbers, of which ours are parts.
    fn no_scalable_vectors(&self) -> VcpuResult<()> {
        if self.features().contains(Aarch64Features::SVE) {
            return Err(self.unsupported("128-bit vectors of a vCPU with scalable ones"));
        }
        Ok(())
    }

    pub(in super::super) fn arch_get_fpu(&self) -> VcpuResult<FpuRegs> {
        Ok(FpuRegs::Aarch64(self.get_fpu()?))
    }

    pub(super) fn get_fpu(&self) -> VcpuResult<Aarch64FpuRegs> {
        self.no_scalable_vectors()?;
        Ok(Aarch64FpuRegs {
            v: self.get_wide_mapped()?,
            fpcr: u32::from_le_bytes(self.get_one(FPCR)?),
            fpsr: u32::from_le_bytes(self.get_one(FPSR)?),
        })
    }

    pub(in super::super) fn arch_set_fpu(&mut self, regs: &FpuRegs) -> VcpuResult<()> {
        self.set_fpu(regs.as_aarch64()?)
    }

    pub(super) fn set_fpu(&mut self, regs: &Aarch64FpuRegs) -> VcpuResult<()> {
        self.no_scalable_vectors()?;
        self.set_wide_mapped(&regs.v)?;
        self.set_one(FPCR, &regs.fpcr.to_le_bytes())?;
        self.set_one(FPSR, &regs.fpsr.to_le_bytes())
    }

    /// The numbers of all registers. (The wrapper of `kvm-ioctls` takes at most 500; SVE guests have more.)
    fn numbers(&self) -> VcpuResult<Vec<u64>> {
        const OP: &str = "KVM_GET_REG_LIST";
        let mut list = vec![0_u64];
        loop {
            // SAFETY: the first word says how many follow, and that is how many there are.
            match unsafe { self.ioctl(OP, ffi::KVM_GET_REG_LIST, list.as_mut_ptr() as u64) } {
                Ok(_) => {
                    list.remove(0);
                    return Ok(list);
                }
                // The kernel wrote how many it has.
                Err(error) if error == errno(OP, libc::E2BIG) && list[0] >= list.len() as u64 => {
                    let count = list[0];
                    list = vec![0; usize::try_from(count).unwrap_or(usize::MAX - 1) + 1];
                    list[0] = count;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// A refusal of a register as the error that the trait promises.
    fn unknown_register(error: AccelError, what: &'static str, name: String) -> AccelError {
        let refusals = [libc::ENOENT, libc::EINVAL, libc::EPERM, libc::EBUSY];
        let known = ["KVM_GET_ONE_REG", "KVM_SET_ONE_REG"]
            .into_iter()
            .any(|op| refusals.iter().any(|code| error == errno(op, *code)));
        if known { AccelError::invalid(what, format!("{name}: {error}")) } else { error }
    }
}

impl Aarch64Vcpu for KvmVcpu {
    fn get_sys_reg(&self, encoding: u16) -> VcpuResult<u64> {
        self.get_one(number_of(encoding))
            .map(u64::from_le_bytes)
            .map_err(|error| Self::unknown_register(error, "system register", format!("{encoding:#x}")))
    }

    fn set_sys_reg(&mut self, encoding: u16, value: u64) -> VcpuResult<()> {
        self.set_one(number_of(encoding), &value.to_le_bytes()).map_err(|error| {
            let name = format!("{encoding:#x} = {value:#x}");
            Self::unknown_register(error, "system register", name)
        })
    }

    fn list_sys_regs(&self) -> VcpuResult<Vec<u16>> {
        Ok(self.numbers()?.into_iter().filter_map(encoding_of).collect())
    }

    fn save_registers(&self) -> VcpuResult<Vec<PlatformRegister>> {
        let mut numbers = self.numbers()?;
        // Stable: all others keep the kernel's order.
        numbers.sort_by_key(|number| is_count(*number));
        numbers
            .into_iter()
            .map(|id| {
                let mut value = vec![0; size(id)];
                self.fd.get_one_reg(id, &mut value).map_err(refused("KVM_GET_ONE_REG"))?;
                Ok(PlatformRegister { id, value })
            })
            .collect()
    }

    fn restore_registers(&mut self, registers: &[PlatformRegister]) -> VcpuResult<()> {
        for PlatformRegister { id, value } in registers {
            if value.len() != size(*id) {
                let detail = format!("{id:#x} has {} bytes, {} were given", size(*id), value.len());
                return Err(AccelError::invalid("register", detail));
            }
            self.set_one(*id, value).map_err(|error| Self::unknown_register(error, "register", format!("{id:#x}")))?;
        }
        Ok(())
    }

    fn get_events(&self) -> VcpuResult<Aarch64Events> {
        let theirs = self.fd.get_vcpu_events().map_err(refused("KVM_GET_VCPU_EVENTS"))?.exception;
        Ok(Aarch64Events {
            serror_pending: theirs.serror_pending != 0,
            serror_esr: (theirs.serror_pending != 0 && theirs.serror_has_esr != 0).then_some(theirs.serror_esr),
            external_abort: false,
        })
    }

    fn set_events(&mut self, events: &Aarch64Events) -> VcpuResult<()> {
        let mut theirs = kb::kvm_vcpu_events::default();
        theirs.exception.serror_pending = events.serror_pending.into();
        theirs.exception.ext_dabt_pending = events.external_abort.into();
        if let Some(esr) = events.serror_esr {
            let cap = kb::KVM_CAP_ARM_INJECT_SERROR_ESR;
            if self.vm.fd.check_extension_raw(cap.into()) <= 0 {
                return Err(self.unsupported("an SError with a syndrome"));
            }
            theirs.exception.serror_has_esr = 1;
            theirs.exception.serror_esr = esr;
        }
        self.fd.set_vcpu_events(&theirs).map_err(refused("KVM_SET_VCPU_EVENTS"))
    }

    fn get_mp_state(&self) -> VcpuResult<Aarch64MpState> {
        let theirs = self.fd.get_mp_state().map_err(refused("KVM_GET_MP_STATE"))?.mp_state;
        MP_STATES
            .iter()
            .find(|(_, number)| *number == theirs)
            .map(|(state, _)| *state)
            .ok_or_else(|| AccelError::invalid("MP state", format!("the kernel reports an unknown one, {theirs}")))
    }

    fn set_mp_state(&mut self, state: Aarch64MpState) -> VcpuResult<()> {
        if state == Aarch64MpState::Suspended
            && self.vm.fd.check_extension_raw(kb::KVM_CAP_ARM_SYSTEM_SUSPEND.into()) <= 0
        {
            return Err(self.unsupported("a suspended vCPU"));
        }
        let number = MP_STATES.iter().find(|(ours, _)| *ours == state).map_or(0, |(_, number)| *number);
        self.fd.set_mp_state(kb::kvm_mp_state { mp_state: number }).map_err(refused("KVM_SET_MP_STATE"))
    }

    fn get_virtual_timer(&self) -> VcpuResult<VirtualTimer> {
        Ok(VirtualTimer {
            control: self.get_sys_reg(aarch64::CNTV_CTL_EL0)?,
            compare: self.get_sys_reg(aarch64::CNTV_CVAL_EL0)?,
            count: self.get_sys_reg(aarch64::CNTVCT_EL0)?,
        })
    }

    fn set_virtual_timer(&mut self, timer: &VirtualTimer) -> VcpuResult<()> {
        self.set_sys_reg(aarch64::CNTVCT_EL0, timer.count)?;
        self.set_sys_reg(aarch64::CNTV_CVAL_EL0, timer.compare)?;
        self.set_sys_reg(aarch64::CNTV_CTL_EL0, timer.control)
    }

    fn features(&self) -> Aarch64Features {
        self.arch.features
    }

    fn reset(&mut self) -> VcpuResult<()> {
        self.init_cpu()
    }

    fn group_unsupported(&self, what: &'static str) -> AccelError {
        self.unsupported(what)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;
    use vm_accel_core::regs::aarch64::sys_reg;

    #[test]
    fn numbers_are_the_kernels() {
        // Linux, Documentation/virt/kvm/api.rst, "arm64 registers".
        assert_eq!(X0, 0x6030_0000_0010_0000);
        assert_eq!(X30, 0x6030_0000_0010_003c);
        assert_eq!(SP_EL0, 0x6030_0000_0010_003e);
        assert_eq!(PC, 0x6030_0000_0010_0040);
        assert_eq!(PSTATE, 0x6030_0000_0010_0042);
        assert_eq!(SP_EL1, 0x6030_0000_0010_0044);
        assert_eq!(V0, 0x6040_0000_0010_0054);
        assert_eq!(V31, 0x6040_0000_0010_00d0);
        assert_eq!(FPSR, 0x6020_0000_0010_00d4);
        assert_eq!(FPCR, 0x6020_0000_0010_00d5);
        assert_eq!(number_of(aarch64::MPIDR_EL1), 0x6030_0000_0013_c005);
    }

    #[test]
    fn tables_name_every_register_once() {
        let of = |map: &[crate::RegMapping]| map.iter().map(|entry| entry.index).collect::<HashSet<_>>();
        assert_eq!(KvmVcpu::REG_MAP.len(), GuestRegs::FLAGS + 1);
        assert_eq!(of(KvmVcpu::REG_MAP).len(), GuestRegs::FLAGS + 1);
        assert_eq!(of(KvmVcpu::WIDE_REG_MAP), (0..32).collect());
    }

    #[test]
    fn the_timers_registers_are_exchanged_and_come_back() {
        assert_eq!(number_of(aarch64::CNTV_CVAL_EL0), system(sys_reg(3, 3, 14, 0, 2)));
        for (encoding, _) in EXCEPTIONS {
            assert_eq!(encoding_of(number_of(encoding)), Some(encoding));
        }
        assert_eq!(encoding_of(X0), None);
        assert_eq!(size(V0), 16);
    }
}
