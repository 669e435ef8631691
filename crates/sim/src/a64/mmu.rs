//! Stage-1 translation (D8.2, D8.3): EL1 and EL0, granules of 4, 16 and 64 KiB, 48-bit addresses. Permissions are checked; access
//! flag, dirty state and attributes are not.

use super::{Bus, Cpu, Stop, Trap, class, syndrome};
use vm_accel_sys::hvf::aarch64::sys_reg;

/// What is done at an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    Read,
    Write,
    Execute,
}

/// Fault status codes of the last level: translation, permission.
pub(super) const TRANSLATION: u64 = 0x07;
pub(super) const PERMISSION: u64 = 0x0f;
pub(super) const ALIGNMENT: u64 = 0x21;

const fn bits(value: u64, high: u32, low: u32) -> u64 {
    value >> low & ((1 << (high - low + 1)) - 1)
}

impl Cpu {
    pub(super) fn mmu_is_on(&self) -> bool {
        self.get(sys_reg::SCTLR_EL1) & 1 != 0
    }

    /// An abort of the guest's own making.
    pub(super) fn stage1_fault(&self, va: u64, access: Access, status: u64) -> Stop {
        let write = u64::from(access == Access::Write) << 6;
        let class = if access == Access::Execute { class::INSTRUCTION_ABORT } else { class::DATA_ABORT };
        Stop::Fault { syndrome: syndrome(class, write | status), far: Some(va) }
    }

    /// The physical address behind a virtual one.
    pub(super) fn translate(&self, bus: &impl Bus, va: u64, access: Access) -> Result<u64, Stop> {
        if !self.mmu_is_on() {
            return Ok(va);
        }
        let tcr = self.get(sys_reg::TCR_EL1);
        let upper = bits(va, 55, 55) != 0;
        let (base, size, off, granule) = if upper {
            let granule = [None, Some(14), Some(12), Some(16)][bits(tcr, 31, 30) as usize];
            (self.get(sys_reg::TTBR1_EL1), bits(tcr, 21, 16), bits(tcr, 23, 23), granule)
        } else {
            let granule = [Some(12), Some(16), Some(14), None][bits(tcr, 15, 14) as usize];
            (self.get(sys_reg::TTBR0_EL1), bits(tcr, 5, 0), bits(tcr, 7, 7), granule)
        };
        let fault = |status| self.stage1_fault(va, access, status);
        let granule: u32 = granule.ok_or_else(|| fault(TRANSLATION))?;
        let wide = 64 - size.clamp(16, 39) as u32;
        let sign = va >> wide;
        if off != 0 || sign != if upper { u64::MAX >> wide } else { 0 } {
            return Err(fault(TRANSLATION));
        }
        let stride = granule - 3;
        let mut table = bits(base, 47, 1) << 1;
        for left in (0..(wide - granule).div_ceil(stride)).rev() {
            let shift = granule + stride * left;
            let at = table + 8 * bits(va, (shift + stride).min(wide) - 1, shift);
            let mut word = [0; 8];
            if !bus.read(at, &mut word) {
                return Err(self.walk_trap(va, at, access));
            }
            let descriptor = u64::from_le_bytes(word);
            let output = bits(descriptor, 47, granule) << granule;
            match (descriptor & 3, left) {
                (3, 1..) => table = output,
                (1, 1..) | (3, 0) => {
                    let within = (1 << shift) - 1;
                    return if self.permits(descriptor, access) {
                        Ok((output & !within) | (va & within))
                    } else {
                        Err(fault(PERMISSION))
                    };
                }
                _ => break,
            }
        }
        Err(fault(TRANSLATION))
    }

    /// Table D8-63: AP in bits 7:6, PXN 53, UXN 54.
    fn permits(&self, descriptor: u64, access: Access) -> bool {
        let user = bits(descriptor, 6, 6) != 0;
        let read_only = bits(descriptor, 7, 7) != 0;
        let el0 = self.is_el0();
        match access {
            Access::Read => user || !el0,
            Access::Write => (user || !el0) && !read_only,
            // What EL0 can write EL1 cannot execute.
            Access::Execute if !el0 => bits(descriptor, 53, 53) == 0 && (!user || read_only),
            Access::Execute => user && bits(descriptor, 54, 54) == 0,
        }
    }

    /// A table is not in memory: a stage-2 abort of the walk.
    fn walk_trap(&self, va: u64, ipa: u64, access: Access) -> Stop {
        const S1PTW: u64 = 1 << 7;
        let class = if access == Access::Execute { class::INSTRUCTION_ABORT } else { class::DATA_ABORT };
        Stop::Trap(Trap { syndrome: syndrome(class, S1PTW | TRANSLATION), far: va, ipa })
    }
}
