//! The software CPU as a backend: it needs no accelerator, no privilege and no particular host.
//!
//! [`NoAccel`] is the machine's memory and interrupt fabric; `vcpu.rs` runs a CPU of `vm-accel-softcpu`; `x86.rs` moves its
//! groups of state. vCPUs run in parallel, each on the thread that calls `run`, where the host orders memory as x86 does;
//! on other hosts they take turns.

mod vcpu;
mod x86;

use super::soft_apic::{Fabric, lock};
use crate::accel::{Accel, AccelKind, Capabilities, GuestArch, IrqChip, IrqHandle, IrqSink, MemoryFlags, MsiMessage};
use crate::error::{AccelError, VcpuResult};
use crate::memory::{DirtyBitmap, GuestRegion, WriteWatcher};
use crate::vcpu_common::VcpuOps;
use std::collections::{BTreeMap, HashSet};
use std::sync::{Arc, Mutex};
use std::time::Instant;
use vm_accel_softcpu::apic::{Features, Message};
use vm_accel_softcpu::{Config, Cpu, NoBus, Ram, RamError};

/// Pages of the software CPU, whatever the host's are.
const PAGE: u64 = 4096;
/// More is possible, but nobody has seen it; each costs memory for its caches.
const MAX_VCPUS: u32 = 64;

/// What the [`NoAccel`] and its vCPUs share.
#[derive(Debug)]
struct FallbackVm {
    ram: Arc<Ram>,
    slots: Mutex<BTreeMap<u64, Slot>>,
    fabric: Fabric,
    irqchip: Mutex<IrqChip>,
    ids: Mutex<HashSet<u32>>,
    config: Config,
    features: Features,
    /// Held by the vCPU that runs, on hosts where only one may.
    turn: Mutex<()>,
}

/// A mapping.
#[derive(Debug)]
struct Slot {
    region: GuestRegion,
    flags: MemoryFlags,
    /// Hears of host writes as long as the mapping is there.
    _watch: Arc<CodeWatch>,
}

/// Tells the CPUs that the host changed memory from which they may have decoded code.
#[derive(Debug)]
struct CodeWatch {
    ram: Arc<Ram>,
    gpa: u64,
}

impl WriteWatcher for CodeWatch {
    fn written(&self, offset: u64, len: u64) {
        self.ram.invalidate_code(self.gpa + offset, len);
    }
}

/// One virtual machine on software CPUs.
///
/// ```
/// use vm_accel::{Accel, platform::fallback::NoAccel};
/// let vm = NoAccel::new();
/// assert!(vm.capabilities().split_irqchip);
/// ```
#[derive(Debug)]
pub struct NoAccel {
    vm: Arc<FallbackVm>,
    caps: Capabilities,
}

impl Default for NoAccel {
    fn default() -> Self {
        Self::new()
    }
}

/// What the fallback can do; the same on every host.
pub(crate) fn capabilities() -> Capabilities {
    let cpu = Cpu::new(0, Config::default(), Ram::new(), Box::new(NoBus));
    let address_sizes = cpu.cpuid().iter().find(|entry| entry.leaf == 0x8000_0008);
    Capabilities {
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
        guest_debug: true,
        xsave_size: x86::XSAVE_SIZE,
        emulates_ring0: Some(false),
        ..Capabilities::minimal(GuestArch::X86_64)
    }
}

impl NoAccel {
    /// Creates a virtual machine.
    #[must_use]
    pub fn new() -> Self {
        let caps = capabilities();
        let features = Features { physical_bits: caps.guest_phys_bits, ..Features::default() };
        Self {
            vm: Arc::new(FallbackVm {
                ram: Ram::new(),
                slots: Mutex::default(),
                fabric: Fabric::default(),
                irqchip: Mutex::default(),
                ids: Mutex::default(),
                config: Config { start: Instant::now(), ..Config::default() },
                features,
                turn: Mutex::default(),
            }),
            caps,
        }
    }
}

fn no_mapping(gpa: u64) -> AccelError {
    AccelError::invalid("guest physical address", format!("no mapping starts at {gpa:#x}"))
}

impl FallbackVm {
    fn has_local_apics(&self) -> bool {
        *lock(&self.irqchip) != IrqChip::None
    }

    /// Maps a region into the CPUs' memory.
    fn map(&self, gpa: u64, region: &GuestRegion, flags: MemoryFlags) -> VcpuResult<Slot> {
        let size = region.size();
        let writable = flags.contains(MemoryFlags::WRITE);
        let owner = Arc::new(region.clone());
        // SAFETY: the pointer is good for `size` bytes as long as a clone of the region lives, and `owner` is one; for
        // writes too if `writable`, which `check` allows only for such regions. Guest memory is never a Rust reference.
        let mapped = unsafe { self.ram.map(gpa, region.as_ptr(), size, writable, owner) };
        mapped.map_err(|error| {
            AccelError::invalid(
                "mapping",
                match error {
                    RamError::Overlap => format!("{size:#x} bytes at {gpa:#x}: overlaps another mapping"),
                    other => format!("{size:#x} bytes at {gpa:#x}: {other}"),
                },
            )
        })?;
        self.log_dirty(gpa, region, flags)?;
        let watch = Arc::new(CodeWatch { ram: Arc::clone(&self.ram), gpa });
        let weak = Arc::downgrade(&watch);
        region.watch(weak);
        Ok(Slot { region: region.clone(), flags, _watch: watch })
    }

    fn log_dirty(&self, gpa: u64, region: &GuestRegion, flags: MemoryFlags) -> VcpuResult<()> {
        let logged = flags.contains(MemoryFlags::LOG_DIRTY);
        // Never off again: another mapping of the same region may still be logged.
        if logged {
            region.track_dirty(true);
        }
        self.ram.set_dirty_log(gpa, logged).map_err(|_| no_mapping(gpa))
    }
}

impl NoAccel {
    /// Checks what can be checked without looking at other mappings.
    fn check(&self, gpa: u64, region: &GuestRegion, flags: MemoryFlags) -> VcpuResult<()> {
        let size = region.size();
        let bad = |why: String| Err(AccelError::invalid("mapping", format!("{size:#x} bytes at {gpa:#x}: {why}")));
        if gpa % PAGE != 0 {
            return bad(format!("the address must be a multiple of the page size {PAGE:#x}"));
        }
        let bits = self.caps.guest_phys_bits;
        if gpa.checked_add(size).is_none_or(|end| end > 1 << bits) {
            return bad(format!("guest physical addresses have {bits} bits here"));
        }
        if !flags.contains(MemoryFlags::READ) {
            return bad("memory must be readable".into());
        }
        if !flags.contains(MemoryFlags::EXECUTE) {
            return Err(self.unsupported("memory that the guest cannot execute"));
        }
        if flags.contains(MemoryFlags::WRITE) && !region.is_writable() {
            return bad("the host memory is read-only".into());
        }
        Ok(())
    }

    /// Puts another mapping in the place of one; vCPUs that run meanwhile may see the range unmapped for a moment.
    fn replace(&self, gpa: u64, region: &GuestRegion, flags: MemoryFlags) -> VcpuResult<()> {
        self.check(gpa, region, flags)?;
        let mut slots = lock(&self.vm.slots);
        let old = slots.get_mut(&gpa).ok_or_else(|| no_mapping(gpa))?;
        if old.region.size() != region.size() {
            let (new, old) = (region.size(), old.region.size());
            return Err(AccelError::invalid("mapping", format!("{gpa:#x}: {new:#x} bytes cannot replace {old:#x}")));
        }
        self.vm.ram.unmap(gpa).map_err(|_| no_mapping(gpa))?;
        *old = self.vm.map(gpa, region, flags)?;
        Ok(())
    }
}

impl Accel for NoAccel {
    fn kind(&self) -> AccelKind {
        AccelKind::Fallback
    }

    fn capabilities(&self) -> &Capabilities {
        &self.caps
    }

    fn create_vcpu(&mut self, id: u32) -> VcpuResult<Box<dyn VcpuOps>> {
        if id >= self.caps.max_vcpu_id {
            return Err(AccelError::invalid("vCPU id", format!("{id} is not below {}", self.caps.max_vcpu_id)));
        }
        if !lock(&self.vm.ids).insert(id) {
            return Err(AccelError::invalid("vCPU id", format!("{id} exists already")));
        }
        Ok(Box::new(vcpu::FallbackVcpu::new(&self.vm, id)))
    }

    fn map_memory(&mut self, gpa: u64, region: &GuestRegion, flags: MemoryFlags) -> VcpuResult<()> {
        self.check(gpa, region, flags)?;
        let mut slots = lock(&self.vm.slots);
        if slots.len() >= self.caps.max_memory_slots as usize {
            return Err(AccelError::invalid("mapping", format!("all {} memory slots are in use", slots.len())));
        }
        let slot = self.vm.map(gpa, region, flags)?;
        slots.insert(gpa, slot);
        Ok(())
    }

    fn unmap_memory(&mut self, gpa: u64) -> VcpuResult<()> {
        let mut slots = lock(&self.vm.slots);
        self.vm.ram.unmap(gpa).map_err(|_| no_mapping(gpa))?;
        slots.remove(&gpa);
        Ok(())
    }

    fn remap_memory(&mut self, gpa: u64, region: &GuestRegion, flags: MemoryFlags) -> VcpuResult<()> {
        self.replace(gpa, region, flags)
    }

    fn protect_memory(&mut self, gpa: u64, flags: MemoryFlags) -> VcpuResult<()> {
        let (region, old) = {
            let slots = lock(&self.vm.slots);
            let slot = slots.get(&gpa).ok_or_else(|| no_mapping(gpa))?;
            (slot.region.clone(), slot.flags)
        };
        if (old ^ flags).contains(MemoryFlags::WRITE) {
            return self.replace(gpa, &region, flags);
        }
        self.check(gpa, &region, flags)?;
        self.vm.log_dirty(gpa, &region, flags)?;
        if let Some(slot) = lock(&self.vm.slots).get_mut(&gpa) {
            slot.flags = flags;
        }
        Ok(())
    }

    fn take_dirty(&mut self, gpa: u64) -> VcpuResult<DirtyBitmap> {
        let slots = lock(&self.vm.slots);
        let slot = slots.get(&gpa).ok_or_else(|| no_mapping(gpa))?;
        if !slot.flags.contains(MemoryFlags::LOG_DIRTY) {
            return Err(AccelError::invalid(
                "guest physical address",
                format!("the mapping at {gpa:#x} is not logged"),
            ));
        }
        let words = self.vm.ram.take_dirty_log(gpa).map_err(|_| no_mapping(gpa))?;
        let mut dirty = DirtyBitmap::from_log(gpa, slot.region.size(), &words, PAGE)?;
        dirty.union(&slot.region.take_host_dirty().with_base(gpa)?)?;
        Ok(dirty)
    }

    fn create_irqchip(&mut self, chip: IrqChip) -> VcpuResult<()> {
        if !lock(&self.vm.ids).is_empty() {
            return Err(AccelError::invalid("interrupt controller", "vCPUs exist already"));
        }
        let mut current = lock(&self.vm.irqchip);
        match (chip, *current) {
            (IrqChip::None, _) => {}
            (IrqChip::Kernel, _) => return Err(self.unsupported("an interrupt controller in the platform")),
            (IrqChip::Split, IrqChip::None) => *current = chip,
            (IrqChip::Split, _) => {
                return Err(AccelError::invalid("interrupt controller", "there is one already"));
            }
        }
        Ok(())
    }

    fn irq_handle(&self) -> VcpuResult<IrqHandle> {
        if !self.vm.has_local_apics() {
            return Err(self.unsupported("raising interrupts without an interrupt controller"));
        }
        Ok(IrqHandle::new(Arc::clone(&self.vm) as Arc<dyn IrqSink>))
    }
}

impl IrqSink for FallbackVm {
    fn set_line(&self, _: u32, _: bool) -> VcpuResult<()> {
        Err(AccelError::Unsupported {
            kind: Some(AccelKind::Fallback),
            what: "an interrupt line: the I/O APIC is the VMM's",
        })
    }

    fn signal_msi(&self, msi: MsiMessage) -> VcpuResult<()> {
        self.fabric.deliver(&Message::from_msi(msi.address, msi.data));
        Ok(())
    }
}
