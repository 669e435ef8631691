//! Debugging by the host: debug exceptions are trapped, and the guest's debug registers stand aside meanwhile.

use super::state::Registers;
use std::collections::BTreeMap;
use vm_accel_backend::aarch64_access::exception::pstate;
use vm_accel_backend::aarch64_debug::comparators;
use vm_accel_core::error::VcpuResult;
use vm_accel_core::regs::aarch64::PlatformRegister;
use vm_accel_core::vcpu_common::{BreakOn, GuestDebug};
use vm_accel_sys::hvf::aarch64::{reg, sys_reg};

/// MDSCR_EL1 (Arm ARM, D24.3.21): software step, breakpoints and watchpoints at EL1 too, and at all.
const MDSCR_SS: u64 = 1;
const MDSCR_KDE: u64 = 1 << 13;
const MDSCR_MDE: u64 = 1 << 15;

/// What the host debugs.
#[derive(Debug, Default)]
pub(super) struct Debugging {
    pub(super) wanted: GuestDebug,
    /// The guest's debug registers while ours are in their place.
    aside: BTreeMap<u16, u64>,
}

impl Debugging {
    /// Debug exceptions are to come to us.
    pub(super) fn is_on(&self) -> bool {
        self.wanted != GuestDebug::default()
    }

    pub(super) fn change(&mut self, registers: &mut Registers, wanted: &GuestDebug) -> VcpuResult<()> {
        let [breakpoints, watchpoints] = registers.comparators();
        let settings = comparators(&wanted.hardware, breakpoints.into(), watchpoints.into())?;
        for (register, value) in std::mem::take(&mut self.aside) {
            registers.set_sys(register, value)?;
        }
        self.wanted = GuestDebug::default();
        let cpsr = registers.get(reg::CPSR)?;
        registers.set(reg::CPSR, cpsr & !pstate::SS)?;
        let hardware = !wanted.hardware.is_empty();
        if hardware || wanted.single_step {
            for register in registers.list_sys_regs() {
                if sys_reg::is_debug(register) || register == sys_reg::MDSCR_EL1 {
                    self.aside.insert(register, registers.sys(register)?);
                }
            }
            for register in self.aside.keys().filter(|register| sys_reg::is_debug(**register)) {
                registers.set_sys(*register, 0)?;
            }
            for (on, n, control, value) in settings {
                let base = if on == BreakOn::Execute { sys_reg::DBGBVR0_EL1 } else { sys_reg::DBGWVR0_EL1 };
                registers.set_sys(base + 8 * n, value)?;
                registers.set_sys(base + 8 * n + 1, control)?;
            }
            let step = if wanted.single_step { MDSCR_SS } else { 0 };
            let compare = if hardware { MDSCR_MDE } else { 0 };
            registers.set_sys(sys_reg::MDSCR_EL1, MDSCR_KDE | step | compare)?;
        }
        self.wanted = wanted.clone();
        Ok(())
    }

    /// The guest's value of a register that stands aside.
    pub(super) fn aside(&self, register: u16) -> Option<u64> {
        self.aside.get(&register).copied()
    }

    /// Its place.
    pub(super) fn aside_mut(&mut self, register: u16) -> Option<&mut u64> {
        self.aside.get_mut(&register)
    }

    /// Puts the guest's values into a list of all registers.
    pub(super) fn hide(&self, registers: &mut [PlatformRegister]) {
        for register in registers {
            if let Some(value) = Registers::system_number(register).and_then(|number| self.aside(number)) {
                register.value = value.to_le_bytes().to_vec();
            }
        }
    }
}
