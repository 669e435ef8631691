//! The Windows Hypervisor Platform on x86-64.
//!
//! The platform hands every access over unfinished: our emulator finishes it (see the shared x86 layer). Its own
//! local APIC is not used: the shared layer's is, so `IrqChip::Split` is the same everywhere.
//!
//! Needs Windows 10 1809. Never run on hardware by this project so far; the simulator holds it to the documentation.

mod partition;
mod registers;
#[cfg(all(windows, target_arch = "x86_64"))]
mod system;
mod vcpu;

use crate::accel::{AccelKind, Capabilities, MemoryFlags};
use crate::error::{AccelError, UnavailableReason, VcpuResult};
use crate::memory::GuestRegion;
use crate::platform::fallback;
use crate::platform::whpx::partition::{is_off, map_flags, unavailable};
use crate::platform::x86::machine::impl_accel;
use crate::platform::x86::{Machine, Platform, Shared, reduced_cpuid};
use partition::{Partition, capability};
use std::sync::Arc;
use vcpu::Processor;
use vm_accel_softcpu::Ram;
use vm_accel_sys::whpx::LIBRARY;
use vm_accel_sys::whpx::x86_64::defs::*;
use vm_accel_sys::whpx::x86_64::features::{CPUID_BITS, LATER_CPUID_BITS};
use vm_accel_sys::whpx::x86_64::fields::{ExtendedVmExits, Features, MsrExitBitmap};
use vm_accel_sys::whpx::x86_64::{CAPABILITY_PHYSICAL_ADDRESS_WIDTH, WhpApi};

/// Leaves of CPUID that the emulator answers: all that it could have, and the platform's own, which are hidden.
const LEAVES: [std::ops::RangeInclusive<u32>; 3] = [0..=0x20, 0x4000_0000..=0x4000_0010, 0x8000_0000..=0x8000_0020];

/// One virtual machine on the Windows Hypervisor Platform.
#[derive(Debug)]
pub struct AccelWhpx {
    machine: Machine<Whpx>,
}

impl_accel!(AccelWhpx);

/// What the platform tells about itself.
#[derive(Debug)]
struct Offer {
    caps: Capabilities,
    exits: ExtendedVmExits,
    msr_exits: Option<u64>,
    /// `WHV_PROCESSOR_FEATURES`.
    features: u64,
    tsc_hz: u64,
}

impl Offer {
    /// Asks the platform.
    fn of(api: &WhpApi) -> VcpuResult<Self> {
        if capability(api, WHvCapabilityCodeHypervisorPresent)?.unwrap_or(0) as u32 == 0 {
            return Err(is_off());
        }
        if api.WHvGetVirtualProcessorXsaveState.is_none() || api.WHvSetVirtualProcessorXsaveState.is_none() {
            let function = "WHvGetVirtualProcessorXsaveState";
            return Err(unavailable(UnavailableReason::FunctionMissing { library: LIBRARY, function }));
        }
        let exits = ExtendedVmExits(capability(api, WHvCapabilityCodeExtendedVmExits)?.unwrap_or(0));
        if exits.x64_cpuid_exit() == 0 || exits.x64_msr_exit() == 0 {
            let detail = "the hypervisor offers no exits for CPUID and MSRs".into();
            return Err(unavailable(UnavailableReason::UnsupportedHardware { detail }));
        }
        let features = Features(capability(api, WHvCapabilityCodeFeatures)?.unwrap_or(0));
        let tsc_hz = capability(api, WHvCapabilityCodeProcessorClockFrequency)?.unwrap_or(0);
        if tsc_hz == 0 {
            let detail = "the hypervisor does not tell the frequency of the time-stamp counter".into();
            return Err(unavailable(UnavailableReason::UnsupportedHardware { detail }));
        }
        let msr_exits = capability(api, WHvCapabilityCodeX64MsrExitBitmap)?;
        // The emulator's page walk has a width of its own.
        let software = fallback::capabilities();
        let width = capability(api, CAPABILITY_PHYSICAL_ADDRESS_WIDTH)?.map_or(u8::MAX, |width| width as u8);
        let caps = Capabilities {
            guest_phys_bits: software.guest_phys_bits.min(width),
            dirty_log: api.WHvQueryGpaRangeDirtyBitmap.is_some() && features.dirty_page_tracking() != 0,
            sync_regs: false,
            // Before there was a choice the unhandled ones were what left.
            msr_exits: msr_exits.is_none_or(|available| MsrExitBitmap(available).unhandled_msrs() != 0),
            ..software
        };
        Ok(Self {
            caps,
            exits,
            msr_exits,
            features: capability(api, WHvCapabilityCodeProcessorFeatures)?.unwrap_or(0),
            tsc_hz,
        })
    }

    /// The bits of CPUID that guests are not shown: what the platform lacks; the TSC-deadline timer and TSC_ADJUST, whose
    /// counter is the platform's; x2APIC, whose MSRs are not faster here than its memory.
    fn hidden(&self) -> Vec<(u32, usize, u32)> {
        let bits = CPUID_BITS.iter().chain(&LATER_CPUID_BITS);
        let lacks = bits.filter(|bit| self.features >> bit.feature & 1 == 0);
        lacks.map(|bit| (bit.leaf, bit.register, bit.bit)).chain([(1, 2, 24), (1, 2, 21), (7, 1, 1)]).collect()
    }
}

impl AccelWhpx {
    /// What the platform of a table can do.
    fn probe_table(api: &WhpApi) -> VcpuResult<Capabilities> {
        match Offer::of(api) {
            Ok(offer) => Ok(offer.caps),
            Err(AccelError::Backend { op, code, .. }) => Err(unavailable(UnavailableReason::Failed { op, code })),
            Err(why) => Err(why),
        }
    }

    /// Creates a virtual machine on the platform of a table: the system's, or a simulator's.
    fn from_table(api: &'static WhpApi) -> VcpuResult<Self> {
        let offer = Offer::of(api)?;
        let partition = Partition::new(api)?;
        partition.set_property(WHvPartitionPropertyCodeProcessorCount, &[offer.caps.max_vcpus])?;
        let exits = ExtendedVmExits(0).with_x64_cpuid_exit(1).with_x64_msr_exit(1);
        let exits = exits.with_hypercall_exit(offer.exits.hypercall_exit());
        partition.set_property(WHvPartitionPropertyCodeExtendedVmExits, &[exits.0])?;
        if let Some(available) = offer.msr_exits {
            let wanted = MsrExitBitmap(0).with_unhandled_msrs(1).with_apic_base_msr_write(1).0;
            partition.set_property(WHvPartitionPropertyCodeX64MsrExitBitmap, &[wanted & available])?;
        }
        let leaves: Vec<u32> = LEAVES.into_iter().flatten().collect();
        partition.set_property(WHvPartitionPropertyCodeCpuidExitList, &leaves)?;
        partition.set_up()?;
        let cpuid = reduced_cpuid(offer.tsc_hz, &offer.hidden());
        let platform = Whpx { partition: Arc::new(partition) };
        Ok(Self { machine: Machine::new(platform, offer.caps, Some(cpuid), Some(offer.tsc_hz)) })
    }

    /// Creates a virtual machine on a simulated platform.
    ///
    /// # Errors
    /// As for the real one.
    #[cfg(feature = "sim")]
    pub fn with_api(api: &'static WhpApi) -> VcpuResult<Self> {
        Self::from_table(api)
    }

    /// What a simulated platform can do.
    ///
    /// # Errors
    /// [`AccelError::Unavailable`] with the reason.
    #[cfg(feature = "sim")]
    pub fn probe_with(api: &'static WhpApi) -> VcpuResult<Capabilities> {
        Self::probe_table(api)
    }
}

/// The platform's part of a machine.
#[derive(Debug)]
struct Whpx {
    partition: Arc<Partition>,
}

impl Platform for Whpx {
    const KIND: AccelKind = AccelKind::Whpx;
    type Engine = Processor;
    type Hold = ();

    fn engine(shared: &Arc<Shared<Self>>, id: u32) -> VcpuResult<Processor> {
        Processor::new(&shared.platform().partition, id)
    }

    fn map(&self, _: &Arc<Ram>, gpa: u64, region: &GuestRegion, flags: MemoryFlags) -> VcpuResult<()> {
        if flags.contains(MemoryFlags::LOG_DIRTY) && self.partition.api.WHvQueryGpaRangeDirtyBitmap.is_none() {
            return Err(AccelError::Unsupported { kind: Some(AccelKind::Whpx), what: "a dirty log" });
        }
        self.partition.map(region.as_ptr(), gpa, region.size(), map_flags(flags))
    }

    fn unmap(&self, gpa: u64, size: u64) -> VcpuResult<()> {
        self.partition.unmap(gpa, size)
    }

    fn log_dirty(&self, gpa: u64, region: &GuestRegion, flags: MemoryFlags) -> VcpuResult<()> {
        // A mapping replaces the one before.
        Platform::map(self, &Ram::new(), gpa, region, flags)
    }

    fn take_dirty(&self, gpa: u64, size: u64, words: &mut [u64]) -> VcpuResult<()> {
        let mut dirty = vec![0; words.len()];
        self.partition.take_dirty(gpa, size, &mut dirty)?;
        words.iter_mut().zip(dirty).for_each(|(all, new)| *all |= new);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_host_lacks_is_hidden() {
        let offer = Offer {
            caps: fallback::capabilities(),
            exits: ExtendedVmExits(0),
            msr_exits: None,
            features: !(1 << 41),
            tsc_hz: 1,
        };
        let hidden = offer.hidden();
        assert!(hidden.contains(&(7, 1, 29)), "SHA");
        assert!(!hidden.contains(&(1, 2, 25)), "AES");
        let shown = |hidden: &[_]| reduced_cpuid(1, hidden).iter().find(|entry| entry.leaf == 7).map(|entry| entry.ebx);
        let (with, without) = (shown(&[]).unwrap(), shown(&hidden).unwrap());
        assert_eq!(with ^ without, 1 << 29 | 1 << 1);
    }
}
