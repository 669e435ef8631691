//! The Windows Hypervisor Platform on x86-64.
//!
//! The platform hands every access over unfinished: our emulator finishes it (see the shared x86 layer).
//!
//! The local APICs of `IrqChip::Split` are the platform's where it has them and can save them (Windows 10 2004): an end of
//! interrupt, a timer or a message between processors is no exit then. [`AccelWhpx::use_software_apics`] chooses ours, which
//! older ones have anyway. Which it is has to be said before a partition is set up, and `create_irqchip` comes later: the
//! partition is made anew then, with the mappings of the one before.
//!
//! Needs Windows 10 1809. Never run on hardware by this project so far; the simulator holds it to the documentation.

mod partition;
mod registers;
#[cfg(all(windows, target_arch = "x86_64"))]
mod system;
mod vcpu;

use crate::partition::{is_off, map_flags, unavailable};
use partition::{Partition, capability};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use vcpu::Processor;
use vm_accel_backend::impl_accel;
use vm_accel_backend::lock;
use vm_accel_backend::x86::{Machine, Platform, Shared, reduced_cpuid, software_capabilities};
use vm_accel_core::accel::{AccelKind, Capabilities, MemoryFlags};
use vm_accel_core::capabilities;
use vm_accel_core::error::{AccelError, UnavailableReason, VcpuResult};
use vm_accel_core::memory::GuestRegion;
use vm_accel_softcpu::Ram;
use vm_accel_softcpu::apic::{DeliveryMode, Destination, Message};
use vm_accel_sys::whpx::LIBRARY;
use vm_accel_sys::whpx::x86_64::defs::*;
use vm_accel_sys::whpx::x86_64::features::{CPUID_BITS, LATER_CPUID_BITS};
use vm_accel_sys::whpx::x86_64::fields::{ExtendedVmExits, Features, InterruptKind, MsrExitBitmap};
use vm_accel_sys::whpx::x86_64::{CAPABILITY_PHYSICAL_ADDRESS_WIDTH, InterruptControl, WhpApi};

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
    /// It has local APICs whose state can be moved.
    apics: bool,
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
        let software = software_capabilities();
        let width = capability(api, CAPABILITY_PHYSICAL_ADDRESS_WIDTH)?.map_or(u8::MAX, |width| width as u8);
        let caps = capabilities! {
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
            apics: features.local_apic_emulation() != 0
                && api.WHvRequestInterrupt.is_some()
                && api.WHvGetVirtualProcessorInterruptControllerState2.is_some()
                && api.WHvSetVirtualProcessorInterruptControllerState2.is_some(),
        })
    }

    /// A partition that is set up.
    fn partition(&self, api: &'static WhpApi, with_apics: bool) -> VcpuResult<Arc<Partition>> {
        let partition = Partition::new(api)?;
        partition.set_property(WHvPartitionPropertyCodeProcessorCount, &[self.caps.max_vcpus])?;
        let exits = ExtendedVmExits(0).with_x64_cpuid_exit(1).with_x64_msr_exit(1);
        let exits = exits.with_hypercall_exit(self.exits.hypercall_exit());
        partition.set_property(WHvPartitionPropertyCodeExtendedVmExits, &[exits.0])?;
        if let Some(available) = self.msr_exits {
            let wanted = MsrExitBitmap(0).with_unhandled_msrs(1).with_apic_base_msr_write((!with_apics).into()).0;
            partition.set_property(WHvPartitionPropertyCodeX64MsrExitBitmap, &[wanted & available])?;
        }
        let leaves: Vec<u32> = LEAVES.into_iter().flatten().collect();
        partition.set_property(WHvPartitionPropertyCodeCpuidExitList, &leaves)?;
        if with_apics {
            // Not x2APIC: CPUID does not show it, and the state is the xAPIC's.
            let mode = WHvX64LocalApicEmulationModeXApic;
            partition.set_property(WHvPartitionPropertyCodeLocalApicEmulationMode, &[mode])?;
        }
        partition.set_up()?;
        Ok(Arc::new(partition))
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
        let partition = Mutex::new((offer.partition(api, false)?, false));
        let cpuid = reduced_cpuid(offer.tsc_hz, &offer.hidden());
        let (caps, tsc_hz, wants_apics) = (offer.caps.clone(), offer.tsc_hz, offer.apics.into());
        let platform = Whpx { offer, partition, wants_apics };
        Ok(Self { machine: Machine::new(platform, caps, Some(cpuid), Some(tsc_hz)) })
    }

    /// From now on [`create_irqchip`](vm_accel_core::Accel::create_irqchip) gives the machine local APICs of this library, as on the
    /// other platforms, where it would give it the platform's. They are slower, and guests that have them can be debugged
    /// ([`set_guest_debug`](vm_accel_core::VcpuOps::set_guest_debug)).
    pub fn use_software_apics(&mut self) {
        // Relaxed: the exclusive reference orders it before the call.
        self.machine.0.platform().wants_apics.store(false, Ordering::Relaxed);
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
    offer: Offer,
    /// The partition, and whether it has local APICs. Another one only as long as there are no vCPUs.
    partition: Mutex<(Arc<Partition>, bool)>,
    /// The machine's local APICs are to be the platform's.
    wants_apics: AtomicBool,
}

impl Whpx {
    fn partition(&self) -> Arc<Partition> {
        Arc::clone(&lock(&self.partition).0)
    }
}

/// Maps memory into a partition.
fn map(partition: &Partition, gpa: u64, region: &GuestRegion, flags: MemoryFlags) -> VcpuResult<()> {
    if flags.contains(MemoryFlags::LOG_DIRTY) && partition.api.WHvQueryGpaRangeDirtyBitmap.is_none() {
        return Err(AccelError::Unsupported { kind: Some(AccelKind::Whpx), what: "a dirty log" });
    }
    partition.map(region.as_ptr(), gpa, region.size(), map_flags(flags))
}

/// A message as the platform takes it; `None` for those that no local APIC acts on.
fn interrupt_control(message: &Message) -> Option<InterruptControl> {
    let has_vector = matches!(message.mode, DeliveryMode::Fixed | DeliveryMode::LowestPriority);
    let is_known = has_vector || matches!(message.mode, DeliveryMode::Nmi | DeliveryMode::Init | DeliveryMode::StartUp);
    // Vectors below 16 are illegal (Intel SDM vol. 3, 11.5.2): a guest that programs one into a device hears nothing.
    if !is_known || has_vector && message.vector < 16 {
        return None;
    }
    let (logical, id) = match message.destination {
        Destination::Physical(id) => (WHvX64InterruptDestinationModePhysical, id),
        Destination::Logical(id) => (WHvX64InterruptDestinationModeLogical, id),
    };
    // The types have the numbers of the delivery modes.
    let kind = InterruptKind(message.mode.bits().into())
        .with_destination_mode(logical as u64)
        .with_trigger_mode(message.level.into());
    // xAPICs have eight bits.
    Some(InterruptControl { kind, destination: id & 0xff, vector: message.vector.into() })
}

impl Platform for Whpx {
    const KIND: AccelKind = AccelKind::Whpx;
    type Engine = Processor;
    type Hold = ();

    fn engine(shared: &Arc<Shared<Self>>, id: u32) -> VcpuResult<Processor> {
        Processor::new(shared, id)
    }

    fn use_apics(shared: &Shared<Self>) -> VcpuResult<bool> {
        let platform = shared.platform();
        if !platform.wants_apics.load(Ordering::Relaxed) {
            return Ok(false);
        }
        let partition = platform.offer.partition(platform.partition().api, true)?;
        shared.slots.try_each(|gpa, region, flags| map(&partition, gpa, region, flags))?;
        *lock(&platform.partition) = (partition, true);
        Ok(true)
    }

    fn deliver(&self, message: &Message) -> VcpuResult<()> {
        interrupt_control(message).map_or(Ok(()), |control| self.partition().request_interrupt(&control))
    }

    fn map(&self, _: &Arc<Ram>, gpa: u64, region: &GuestRegion, flags: MemoryFlags) -> VcpuResult<()> {
        map(&self.partition(), gpa, region, flags)
    }

    fn unmap(&self, gpa: u64, size: u64) -> VcpuResult<()> {
        self.partition().unmap(gpa, size)
    }

    fn log_dirty(&self, gpa: u64, region: &GuestRegion, flags: MemoryFlags) -> VcpuResult<()> {
        // A mapping replaces the one before.
        map(&self.partition(), gpa, region, flags)
    }

    fn take_dirty(&self, gpa: u64, size: u64, words: &mut [u64]) -> VcpuResult<()> {
        let mut dirty = vec![0; words.len()];
        self.partition().take_dirty(gpa, size, &mut dirty)?;
        words.iter_mut().zip(dirty).for_each(|(all, new)| *all |= new);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_what_the_platform_calls_it() {
        // To the logical destination 2: lowest priority, level-triggered, vector 0x51.
        let control = interrupt_control(&Message::from_msi(0xfee0_2004, 0xc151)).unwrap();
        assert_eq!((control.kind.0, control.destination, control.vector), (0x1101, 2, 0x51));
        let broadcast = interrupt_control(&Message::from_msi(0xfeef_f000, 0x400)).unwrap();
        assert_eq!((broadcast.kind.0, broadcast.destination), (WHvX64InterruptTypeNmi as u64, 0xff));
        for nothing in [0x0f, 0x10f, 0x220, 0x720] {
            assert_eq!(interrupt_control(&Message::from_msi(0xfee0_0000, nothing)), None, "{nothing:#x}");
        }
    }

    #[test]
    fn what_the_host_lacks_is_hidden() {
        let offer = Offer {
            caps: software_capabilities(),
            exits: ExtendedVmExits(0),
            msr_exits: None,
            features: !(1 << 41),
            tsc_hz: 1,
            apics: false,
        };
        let hidden = offer.hidden();
        assert!(hidden.contains(&(7, 1, 29)), "SHA");
        assert!(!hidden.contains(&(1, 2, 25)), "AES");
        let shown = |hidden: &[_]| reduced_cpuid(1, hidden).iter().find(|entry| entry.leaf == 7).map(|entry| entry.ebx);
        let (with, without) = (shown(&[]).unwrap(), shown(&hidden).unwrap());
        assert_eq!(with ^ without, 1 << 29 | 1 << 1);
        let crystal =
            |entry: &vm_accel_softcpu::CpuidEntry| entry.leaf == 0x15 && (entry.eax | entry.ebx | entry.ecx) != 0;
        assert!(!reduced_cpuid(1, &[]).iter().any(crystal), "it is not what the APIC's timer counts");
    }
}
