//! One virtual machine: its memory, its interrupt fabric, its doorbells. [`Machine`] is the whole of
//! [`Accel`] for every [`Platform`]; what a backend adds is its type's name.

use super::vcpu::SoftVcpu;
use super::{Platform, XSAVE_SIZE};
use crate::gate::Alarm;
use crate::lock;
use crate::slots::{Mapper, Rules, Slots};
use crate::soft_apic::Fabric;
use std::collections::HashSet;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Instant;
use vm_accel_core::accel::{
    Accel, AccelKind, Capabilities, GuestArch, IoAddress, IoEventMatch, IrqChip, IrqHandle, IrqSink, MemoryFlags,
    MsiMessage,
};
use vm_accel_core::capabilities;
use vm_accel_core::error::{AccelError, VcpuResult};
use vm_accel_core::event::HostEvent;
use vm_accel_core::memory::{DirtyBitmap, GuestRegion};
use vm_accel_core::vcpu_common::VcpuOps;
use vm_accel_softcpu::apic::{Features, Message};
use vm_accel_softcpu::{Config, Cpu, CpuidEntry, NoBus, Ram, RamError, TscMode};

/// Pages of the software CPU, whatever the host's are.
pub const PAGE: u64 = 4096;

/// More is possible, but nobody has seen it; each costs memory for its caches.
const MAX_VCPUS: u32 = 64;

/// Whose local APICs a machine has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Apics {
    #[default]
    None,
    Ours,
    Platforms,
}

/// What a machine and its vCPUs share.
#[derive(Debug)]
pub struct Shared<P: Platform> {
    /// Memory as the emulator has it.
    pub ram: Arc<Ram>,
    /// Memory as the machine has it.
    pub slots: Slots<Memory<P>>,
    pub(super) fabric: Arc<Fabric>,
    apics: Mutex<Apics>,
    ids: Mutex<HashSet<u32>>,
    pub(super) config: Config,
    pub(super) features: Features,
    pub(super) caps: Capabilities,
    /// What CPUID answers unless the VMM says otherwise; `None` for all that the software CPU has.
    pub(super) cpuid: Option<Vec<CpuidEntry>>,
    pub(super) alarm: Arc<Alarm>,
    doorbells: RwLock<Vec<(IoEventMatch, HostEvent)>>,
    /// The VMM wants exits for MSR accesses that fault.
    pub(super) msr_exits: Arc<AtomicBool>,
}

/// Memory as the emulator and the platform have it.
#[derive(Debug)]
pub struct Memory<P> {
    ram: Arc<Ram>,
    /// The platform.
    pub platform: P,
}

impl<P: Platform> Mapper for Memory<P> {
    type Hold = P::Hold;

    fn map(&self, gpa: u64, region: &GuestRegion, flags: MemoryFlags) -> VcpuResult<P::Hold> {
        let size = region.size();
        let writable = flags.contains(MemoryFlags::WRITE);
        let owner = Arc::new(region.clone());
        // SAFETY: the pointer is good for `size` bytes as long as a clone of the region lives, and `owner` is one; for
        // writes too if `writable`, which `Slots` allows only for such regions. Guest memory is never a Rust reference.
        let mapped = unsafe { self.ram.map(gpa, region.as_ptr(), size, writable, owner) };
        mapped.map_err(|why| AccelError::invalid("mapping", format!("{size:#x} bytes at {gpa:#x}: {why}")))?;
        self.ram.set_dirty_log(gpa, flags.contains(MemoryFlags::LOG_DIRTY)).map_err(unmapped)?;
        let hold = self.platform.map(&self.ram, gpa, region, flags);
        if hold.is_err() {
            self.ram.unmap(gpa).map_err(unmapped)?;
        }
        hold
    }

    fn unmap(&self, gpa: u64, size: u64) -> VcpuResult<()> {
        self.platform.unmap(gpa, size)?;
        self.ram.unmap(gpa).map_err(unmapped)
    }

    fn log_dirty(&self, gpa: u64, region: &GuestRegion, flags: MemoryFlags) -> VcpuResult<()> {
        self.platform.log_dirty(gpa, region, flags)?;
        self.ram.set_dirty_log(gpa, flags.contains(MemoryFlags::LOG_DIRTY)).map_err(unmapped)
    }

    fn take_dirty(&self, gpa: u64, size: u64) -> VcpuResult<Vec<u64>> {
        // The platform first: it may fail, and then nothing must be lost.
        let mut words = vec![0; size.div_ceil(PAGE * 64) as usize];
        self.platform.take_dirty(gpa, size, &mut words)?;
        let emulated = self.ram.take_dirty_log(gpa).map_err(unmapped)?;
        words.iter_mut().zip(emulated).for_each(|(word, more)| *word |= more);
        Ok(words)
    }
}

fn unmapped(why: RamError) -> AccelError {
    AccelError::invalid("mapping", why.to_string())
}

impl<P: Platform> Shared<P> {
    /// The machine has local APICs, and they are ours.
    pub(super) fn has_local_apics(&self) -> bool {
        *lock(&self.apics) == Apics::Ours
    }

    /// The platform.
    pub fn platform(&self) -> &P {
        &self.slots.mapper.platform
    }

    /// Signals the events that a write is bound to. False if there is none: the VMM must see the write.
    pub(super) fn ring(&self, address: IoAddress, data: &[u8]) -> VcpuResult<bool> {
        let mut bytes = [0; 8];
        bytes[..data.len()].copy_from_slice(data);
        let value = u64::from_le_bytes(bytes);
        let doorbells = self.doorbells.read().unwrap_or_else(PoisonError::into_inner);
        let mut rung = false;
        for (on, event) in doorbells.iter() {
            let is_size = on.size == 0 || usize::from(on.size) == data.len();
            if on.address == address && is_size && on.value.is_none_or(|wanted| wanted == value) {
                event.signal()?;
                rung = true;
            }
        }
        Ok(rung)
    }
}

impl<P: Platform> IrqSink for Shared<P> {
    fn set_line(&self, _: u32, _: bool) -> VcpuResult<()> {
        Err(AccelError::Unsupported { kind: Some(P::KIND), what: "an interrupt line: the I/O APIC is the VMM's" })
    }

    fn signal_msi(&self, msi: MsiMessage) -> VcpuResult<()> {
        let message = Message::from_msi(msi.address, msi.data);
        if *lock(&self.apics) == Apics::Platforms {
            return self.platform().deliver(&message);
        }
        self.fabric.deliver(&message);
        Ok(())
    }
}

/// What machines can do whose CPUs are software; the same on every host. Other platforms begin with it.
#[must_use]
pub fn software_capabilities() -> Capabilities {
    let cpu = Cpu::new(0, Config::default(), Ram::new(), Box::new(NoBus));
    let address_sizes = cpu.cpuid().iter().find(|entry| entry.leaf == 0x8000_0008);
    capabilities! {
        max_vcpus: MAX_VCPUS,
        max_vcpu_id: MAX_VCPUS,
        // Each is an entry of a table; this many is more than any machine has.
        max_memory_slots: 4096,
        guest_phys_bits: address_sizes.map_or(36, |entry| entry.eax as u8),
        page_size: PAGE,
        read_only_memory: true,
        dirty_log: true,
        sync_regs: true,
        split_irqchip: true,
        ioevent: true,
        guest_debug: true,
        msr_exits: true,
        xsave_size: XSAVE_SIZE,
        emulates_ring0: Some(false),
        ..Capabilities::minimal(GuestArch::X86_64)
    }
}

/// What CPUID answers on the software CPU without some bits: leaf, index into EAX, EBX, ECX and EDX, bit. `tsc_hz` is the
/// frequency of the time-stamp counter, which CPUID tells.
pub fn reduced_cpuid(tsc_hz: u64, hidden: &[(u32, usize, u32)]) -> Vec<CpuidEntry> {
    let config = Config { tsc: TscMode::Host(tsc_hz), ..Config::default() };
    let cpu = Cpu::new(0, config, Ram::new(), Box::new(NoBus));
    let mut entries = cpu.cpuid().to_vec();
    // Guests take the crystal of leaf 15H for what the local APIC's timer counts (Linux, `native_calibrate_tsc`), which it is not;
    // where they know of a TSC-deadline timer that does no harm. Without the leaf they measure both frequencies.
    for entry in entries.iter_mut().filter(|entry| entry.leaf == 0x15) {
        (entry.eax, entry.ebx, entry.ecx) = (0, 0, 0);
    }
    for &(leaf, register, bit) in hidden {
        for entry in entries.iter_mut().filter(|entry| entry.leaf == leaf && entry.subleaf == 0) {
            let registers = [&mut entry.eax, &mut entry.ebx, &mut entry.ecx, &mut entry.edx];
            registers.into_iter().skip(register).take(1).for_each(|value| *value &= !(1 << bit));
        }
    }
    entries
}

/// One virtual machine. The field is behind an `Arc` because vCPUs keep the machine alive.
#[derive(Debug)]
pub struct Machine<P: Platform>(pub Arc<Shared<P>>);

impl<P: Platform> Machine<P> {
    /// A machine on a platform that was set up. `cpuid` is what guests are shown, by default all that the software CPU has;
    /// the local APICs have what it says. `tsc_hz` is the frequency of the guests' time-stamp counter if the platform has
    /// one of its own; then no TSC-deadline timer may be shown, which would need the counter's value at every look.
    pub fn new(platform: P, caps: Capabilities, cpuid: Option<Vec<CpuidEntry>>, tsc_hz: Option<u64>) -> Self {
        let ram = Ram::new();
        let rules = Rules {
            kind: P::KIND,
            page: caps.page_size,
            address_bits: caps.guest_phys_bits,
            most: caps.max_memory_slots,
            no_execute: false,
        };
        let default = Config::default();
        let leaf1 =
            cpuid.as_ref().and_then(|entries| entries.iter().find(|entry| entry.leaf == 1)).map(|entry| entry.ecx);
        let shows = |bit: u32| leaf1.is_none_or(|ecx| ecx >> bit & 1 != 0);
        Self(Arc::new(Shared {
            slots: Slots::new(Memory { ram: Arc::clone(&ram), platform }, rules),
            ram,
            fabric: Arc::default(),
            apics: Mutex::default(),
            ids: Mutex::default(),
            config: Config { start: Instant::now(), tsc: tsc_hz.map_or(default.tsc, TscMode::Host) },
            features: Features {
                physical_bits: caps.guest_phys_bits,
                x2apic: shows(21),
                tsc_deadline: shows(24),
                ..Features::default()
            },
            caps,
            cpuid,
            alarm: Arc::default(),
            doorbells: RwLock::default(),
            msr_exits: Arc::default(),
        }))
    }

    /// Where the list keeps what is bound to exactly these writes.
    fn doorbell(list: &[(IoEventMatch, HostEvent)], on: IoEventMatch) -> Option<usize> {
        list.iter().position(|(other, _)| *other == on)
    }
}

impl<P: Platform> Accel for Machine<P> {
    fn kind(&self) -> AccelKind {
        P::KIND
    }

    fn capabilities(&self) -> &Capabilities {
        &self.0.caps
    }

    fn create_vcpu(&mut self, id: u32) -> VcpuResult<Box<dyn VcpuOps>> {
        let most = self.0.caps.max_vcpu_id;
        if id >= most {
            return Err(AccelError::invalid("vCPU id", format!("{id} is not below {most}")));
        }
        if lock(&self.0.ids).contains(&id) {
            return Err(AccelError::invalid("vCPU id", format!("{id} exists already")));
        }
        let vcpu = SoftVcpu::new(&self.0, id, P::engine(&self.0, id)?);
        lock(&self.0.ids).insert(id);
        Ok(Box::new(vcpu))
    }

    fn map_memory(&mut self, gpa: u64, region: &GuestRegion, flags: MemoryFlags) -> VcpuResult<()> {
        self.0.slots.map(gpa, region, flags)
    }

    fn unmap_memory(&mut self, gpa: u64) -> VcpuResult<()> {
        self.0.slots.unmap(gpa)
    }

    fn remap_memory(&mut self, gpa: u64, region: &GuestRegion, flags: MemoryFlags) -> VcpuResult<()> {
        self.0.slots.remap(gpa, region, flags)
    }

    fn protect_memory(&mut self, gpa: u64, flags: MemoryFlags) -> VcpuResult<()> {
        self.0.slots.protect(gpa, flags)
    }

    fn take_dirty(&mut self, gpa: u64) -> VcpuResult<DirtyBitmap> {
        self.0.slots.take_dirty(gpa)
    }

    fn create_irqchip(&mut self, chip: IrqChip) -> VcpuResult<()> {
        if !lock(&self.0.ids).is_empty() {
            return Err(AccelError::invalid("interrupt controller", "vCPUs exist already"));
        }
        let mut current = lock(&self.0.apics);
        match (chip, *current) {
            (IrqChip::None, _) => {}
            (IrqChip::Kernel, _) => return Err(self.unsupported("an interrupt controller in the platform")),
            (IrqChip::Split, Apics::None) => {
                *current = if P::use_apics(&self.0)? { Apics::Platforms } else { Apics::Ours };
            }
            (IrqChip::Split, _) => {
                return Err(AccelError::invalid("interrupt controller", "there is one already"));
            }
        }
        Ok(())
    }

    fn irq_handle(&self) -> VcpuResult<IrqHandle> {
        if *lock(&self.0.apics) == Apics::None {
            return Err(self.unsupported("raising interrupts without an interrupt controller"));
        }
        Ok(IrqHandle::new(Arc::clone(&self.0) as Arc<dyn IrqSink>))
    }

    fn register_ioevent(&mut self, event: &HostEvent, on: IoEventMatch) -> VcpuResult<()> {
        let widest = if matches!(on.address, IoAddress::Pio(_)) { 4 } else { 8 };
        if on.size > widest || !(on.size == 0 || on.size.is_power_of_two()) || on.size == 0 && on.value.is_some() {
            return Err(AccelError::invalid("I/O event", format!("{on:x?}: no such access")));
        }
        let mut doorbells = self.0.doorbells.write().unwrap_or_else(PoisonError::into_inner);
        if Self::doorbell(&doorbells, on).is_some() {
            return Err(AccelError::invalid("I/O event", format!("{on:x?} is registered already")));
        }
        doorbells.push((on, event.clone()));
        Ok(())
    }

    fn unregister_ioevent(&mut self, _: &HostEvent, on: IoEventMatch) -> VcpuResult<()> {
        let mut doorbells = self.0.doorbells.write().unwrap_or_else(PoisonError::into_inner);
        let at = Self::doorbell(&doorbells, on)
            .ok_or_else(|| AccelError::invalid("I/O event", format!("{on:x?} is not registered")))?;
        doorbells.swap_remove(at);
        Ok(())
    }
}

/// Implements [`Accel`] for a backend whose field `machine` is a [`Machine`].
#[macro_export]
macro_rules! impl_accel {
    ($Backend:ty) => {
        $crate::impl_accel! { $Backend;
            map_memory(gpa: u64, region: &$crate::vm_accel_core::GuestRegion, flags: $crate::vm_accel_core::MemoryFlags) -> ();
            unmap_memory(gpa: u64) -> ();
            remap_memory(gpa: u64, region: &$crate::vm_accel_core::GuestRegion, flags: $crate::vm_accel_core::MemoryFlags) -> ();
            protect_memory(gpa: u64, flags: $crate::vm_accel_core::MemoryFlags) -> ();
            take_dirty(gpa: u64) -> $crate::vm_accel_core::DirtyBitmap;
            create_irqchip(chip: $crate::vm_accel_core::IrqChip) -> ();
            register_ioevent(event: &$crate::vm_accel_core::HostEvent, on: $crate::vm_accel_core::IoEventMatch) -> ();
            unregister_ioevent(event: &$crate::vm_accel_core::HostEvent, on: $crate::vm_accel_core::IoEventMatch) -> ();
            create_vcpu(id: u32) -> ::std::boxed::Box<dyn $crate::vm_accel_core::VcpuOps>;
        }
    };
    ($Backend:ty; $($method:ident($($arg:ident: $Arg:ty),*) -> $Ret:ty;)*) => {
        impl $crate::vm_accel_core::Accel for $Backend {
            fn kind(&self) -> $crate::vm_accel_core::AccelKind {
                self.machine.kind()
            }
            fn capabilities(&self) -> &$crate::vm_accel_core::Capabilities {
                self.machine.capabilities()
            }
            fn irq_handle(&self) -> $crate::vm_accel_core::VcpuResult<$crate::vm_accel_core::IrqHandle> {
                self.machine.irq_handle()
            }
            $(fn $method(&mut self, $($arg: $Arg),*) -> $crate::vm_accel_core::VcpuResult<$Ret> {
                self.machine.$method($($arg),*)
            })*
        }
    };
}
