//! What `WHvGetCapability` answers.

use super::memory::PHYSICAL_BITS;
use super::partition::{APIC_HZ, TSC_HZ};
use super::{Answer, PRESENT, code};
use std::sync::atomic::Ordering;
use vm_accel_sys::whpx::code::WHV_E_UNKNOWN_CAPABILITY;
use vm_accel_sys::whpx::x86_64::CAPABILITY_PHYSICAL_ADDRESS_WIDTH;
use vm_accel_sys::whpx::x86_64::defs::*;
use vm_accel_sys::whpx::x86_64::fields::{ExtendedVmExits, Features, MsrExitBitmap};

/// The extended exits that there are.
pub(super) const EXTENDED_EXITS: u64 = ExtendedVmExits(0)
    .with_x64_cpuid_exit(1)
    .with_x64_msr_exit(1)
    .with_exception_exit(1)
    .with_x64_rdtsc_exit(1)
    .with_hypercall_exit(1)
    .with_x64_apic_init_sipi_exit_trap(1)
    .0;

const FEATURES: u64 =
    Features(0).with_partial_unmap(1).with_local_apic_emulation(1).with_xsave(1).with_dirty_page_tracking(1).0;

const MSR_EXITS: u64 =
    MsrExitBitmap(0).with_unhandled_msrs(1).with_tsc_msr_write(1).with_tsc_msr_read(1).with_apic_base_msr_write(1).0;

/// XsaveSupport, XsaveoptSupport and XsaveCompSupport of `WHV_PROCESSOR_XSAVE_FEATURES`.
const XSAVE_FEATURES: u64 = 1 | 2 | 1 << 11;

/// `WHV_PROCESSOR_FEATURES` of what the software CPU has, and of some things that it has not.
const PROCESSOR_FEATURES: u64 = 0x0602_03cd_21e3_0f9f;

/// The bytes of a capability.
pub(super) fn get(capability: WHV_CAPABILITY_CODE) -> Answer<Vec<u8>> {
    let wide = |value: u64| value.to_le_bytes().to_vec();
    Ok(match capability {
        WHvCapabilityCodeHypervisorPresent => u32::from(PRESENT.load(Ordering::Relaxed)).to_le_bytes().to_vec(),
        WHvCapabilityCodeFeatures => wide(FEATURES),
        WHvCapabilityCodeExtendedVmExits => wide(EXTENDED_EXITS),
        WHvCapabilityCodeExceptionExitBitmap => wide(0x000b_7fff),
        WHvCapabilityCodeX64MsrExitBitmap => wide(MSR_EXITS),
        WHvCapabilityCodeProcessorVendor => (WHvProcessorVendorIntel as u32).to_le_bytes().to_vec(),
        WHvCapabilityCodeProcessorFeatures => wide(PROCESSOR_FEATURES),
        WHvCapabilityCodeProcessorClFlushSize => vec![8],
        WHvCapabilityCodeProcessorXsaveFeatures => wide(XSAVE_FEATURES),
        WHvCapabilityCodeProcessorClockFrequency => wide(TSC_HZ),
        WHvCapabilityCodeInterruptClockFrequency => wide(APIC_HZ),
        CAPABILITY_PHYSICAL_ADDRESS_WIDTH => PHYSICAL_BITS.to_le_bytes().to_vec(),
        _ => return code(WHV_E_UNKNOWN_CAPABILITY),
    })
}
