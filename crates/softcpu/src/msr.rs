//! Model-specific registers (SDM vol. 4). Those of the local APIC and the TSC deadline belong to the bus, which is asked first.

use crate::bus::MsrAnswer;
use crate::core::Core;
use crate::cpuid::Feature;
use crate::mem::canonical;
use crate::state::{cr0, efer, seg};

/// MTRRs for the first megabyte, in the order of `Msrs::mtrr_fixed`.
const MTRR_FIXED: [u32; 11] = [0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f];
/// Pairs of variable MTRRs.
const MTRR_PAIRS: u64 = 8;

/// All eight memory types of a PAT or a fixed MTRR exist.
fn memory_types(value: u64, pat: bool) -> bool {
    value.to_le_bytes().iter().all(|kind| matches!(kind, 0 | 1 | 4 | 5 | 6) || pat && *kind == 7)
}

impl Core {
    /// Whether CPUID hides a register of the local APIC that the bus may have, or the bits of `value` in it.
    fn is_hidden(&self, index: u32, value: u64) -> bool {
        match index {
            crate::apic::MSR_APIC_BASE => value & 1 << 10 != 0 && !self.cpuid.has(Feature::X2apic),
            0x800..=0x8ff => !self.cpuid.has(Feature::X2apic),
            0x6e0 => !self.cpuid.has(Feature::TscDeadline),
            _ => false,
        }
    }

    /// RDMSR; `None` is #GP(0).
    pub(crate) fn read_msr(&mut self, index: u32) -> Option<u64> {
        if self.is_hidden(index, 0) {
            return None;
        }
        let tsc = self.tsc();
        match self.bus.msr_read(index, tsc) {
            MsrAnswer::Done(value) => return Some(value),
            MsrAnswer::Fault => return None,
            MsrAnswer::NotMine => {}
        }
        let m = &self.st.msr;
        Some(match index {
            0x10 => tsc,
            // Platform id, microcode control.
            0x17 => 0,
            // FEATURE_CONTROL: locked, no VMX.
            0x3a => 1,
            0x3b if self.cpuid.has(Feature::TscAdjust) => m.tsc_adjust,
            0x8b => m.bios_sign_id,
            0xfe => 1 << 10 | 1 << 8 | MTRR_PAIRS,
            0x174 => m.sysenter_cs,
            0x175 => m.sysenter_esp,
            0x176 => m.sysenter_eip,
            // MCG_CAP: no banks. MCG_STATUS.
            0x179 | 0x17a => 0,
            0x1a0 => m.misc_enable,
            0x1d9 => m.debugctl,
            // Last branch and last exception records: never taken.
            0x1db..=0x1de => 0,
            0x200..=0x20f => m.mtrr_var[(index - 0x200) as usize],
            0x277 => m.pat,
            0x2ff => m.mtrr_def_type,
            0xc000_0080 => m.efer,
            0xc000_0081 => m.star,
            0xc000_0082 => m.lstar,
            0xc000_0083 => m.cstar,
            0xc000_0084 => m.fmask,
            0xc000_0100 => self.st.segs[seg::FS].base,
            0xc000_0101 => self.st.segs[seg::GS].base,
            0xc000_0102 => m.kernel_gs_base,
            0xc000_0103 if self.cpuid.has(Feature::Rdtscp) => m.tsc_aux,
            _ => {
                let fixed = MTRR_FIXED.iter().position(|i| *i == index)?;
                m.mtrr_fixed[fixed]
            }
        })
    }

    /// WRMSR; `None` is #GP(0). `sync_mode` must follow.
    pub(crate) fn write_msr(&mut self, index: u32, value: u64) -> Option<()> {
        if self.is_hidden(index, value) {
            return None;
        }
        let tsc = self.tsc();
        match self.bus.msr_write(index, value, tsc) {
            MsrAnswer::Done(_) => return Some(()),
            MsrAnswer::Fault => return None,
            MsrAnswer::NotMine => {}
        }
        let is_canonical = canonical(value);
        let phys_reserved = !((1u64 << crate::mmu::PHYS_BITS) - 1);
        let m = &mut self.st.msr;
        let address = |slot: &mut u64| is_canonical.then(|| *slot = value);
        match index {
            0x10 => {
                let delta = self.clock.set_tsc(self.icount, value);
                self.st.msr.tsc_adjust = self.st.msr.tsc_adjust.wrapping_add(delta);
            }
            0x3b if self.cpuid.has(Feature::TscAdjust) => {
                let delta = value.wrapping_sub(m.tsc_adjust);
                m.tsc_adjust = value;
                self.clock.adjust(delta);
            }
            // Microcode update: accepted, nothing to do. The signature can be written with zero.
            0x79 => {}
            0x8b => m.bios_sign_id = value,
            0x174 => m.sysenter_cs = value & 0xffff_ffff,
            0x175 => address(&mut m.sysenter_esp)?,
            0x176 => address(&mut m.sysenter_eip)?,
            0x17a => {}
            0x1a0 => m.misc_enable = value,
            0x1d9 => {
                if value & !0xffff != 0 {
                    return None;
                }
                m.debugctl = value & 3;
            }
            0x200..=0x20f => {
                let reserved = if index & 1 == 0 { phys_reserved | 0xf00 } else { phys_reserved | 0x7ff };
                if value & reserved != 0 || index & 1 == 0 && !memory_types(value & 0xff, false) {
                    return None;
                }
                m.mtrr_var[(index - 0x200) as usize] = value;
            }
            0x277 => {
                if !memory_types(value, true) {
                    return None;
                }
                m.pat = value;
            }
            0x2ff => {
                if value & !0xcff != 0 || !memory_types(value & 0xff, false) {
                    return None;
                }
                m.mtrr_def_type = value;
            }
            0xc000_0080 => return self.write_efer(value),
            0xc000_0081 => m.star = value,
            0xc000_0082 => address(&mut m.lstar)?,
            0xc000_0083 => address(&mut m.cstar)?,
            0xc000_0084 => m.fmask = value & 0xffff_ffff,
            0xc000_0100 => {
                address(&mut self.st.segs[seg::FS].base)?;
            }
            0xc000_0101 => {
                address(&mut self.st.segs[seg::GS].base)?;
            }
            0xc000_0102 => address(&mut m.kernel_gs_base)?,
            0xc000_0103 if self.cpuid.has(Feature::Rdtscp) => {
                if value >> 32 != 0 {
                    return None;
                }
                m.tsc_aux = value;
            }
            _ => {
                let fixed = MTRR_FIXED.iter().position(|i| *i == index)?;
                if !memory_types(value, false) {
                    return None;
                }
                m.mtrr_fixed[fixed] = value;
            }
        }
        Some(())
    }

    fn write_efer(&mut self, value: u64) -> Option<()> {
        let mut exist = efer::LMA;
        for (feature, bit) in [(Feature::Syscall, efer::SCE), (Feature::LongMode, efer::LME), (Feature::Nx, efer::NXE)]
        {
            if self.cpuid.has(feature) {
                exist |= bit;
            }
        }
        let old = self.st.msr.efer;
        if value & !exist != 0 || (value ^ old) & efer::LME != 0 && self.st.cr0 & cr0::PG != 0 {
            return None;
        }
        self.st.msr.efer = value & !efer::LMA | old & efer::LMA;
        if (value ^ old) & efer::NXE != 0 {
            self.flush_tlb(true);
        }
        Some(())
    }
}
