//! Linux KVM: the virtual machine. vCPUs are in `vcpu.rs`, what only one architecture has in `x86_64.rs` and `aarch64.rs`,
//! kicks in `kick.rs`, dirty logging in `dirty.rs`.
//!
//! `KvmVm` owns the descriptor and every mapping, and is shared by the [`AccelKvm`], its vCPUs and interrupt handles:
//! guest memory stays mapped in this process as long as anything could still run on it.
//!
//! Sources: Linux `Documentation/virt/kvm/api.rst`.

#[cfg_attr(target_arch = "x86_64", path = "x86_64.rs")]
#[cfg_attr(target_arch = "aarch64", path = "aarch64/mod.rs")]
mod arch;
mod dirty;
mod kick;
mod probe;
mod vcpu;

pub use kick::set_kick_signal;
pub(crate) use probe::probe;

use crate::ffi::kvm as ffi;
use kvm_bindings as kb;
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use std::collections::BTreeMap;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use vm_accel_core::accel::{
    Accel, AccelKind, Capabilities, IoAddress, IoEventMatch, IrqChip, IrqHandle, IrqSink, IrqTarget, MemoryFlags,
    MsiMessage,
};
use vm_accel_core::capabilities;
use vm_accel_core::error::{AccelError, RawCode, VcpuResult};
use vm_accel_core::event::HostEvent;
use vm_accel_core::memory::{DirtyBitmap, GuestRegion};
use vm_accel_core::regs::aarch64::{Aarch64Features, Gic, GicState};
use vm_accel_core::vcpu_common::VcpuOps;

/// An error of an ioctl.
fn refused(op: &'static str) -> impl Fn(kvm_ioctls::Error) -> AccelError {
    move |error| errno(op, error.errno())
}

/// An error of one of our own ioctls.
fn errno(op: &'static str, code: i32) -> AccelError {
    AccelError::Backend { kind: AccelKind::Kvm, op, code: RawCode::Errno(code) }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every change under these locks is complete before anything that can panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A memory slot.
#[derive(Debug)]
struct Slot {
    number: u32,
    region: GuestRegion,
    flags: MemoryFlags,
}

/// The memory slots by guest physical address, and the numbers that were used and are not any more. Together these are all
/// the numbers from 0 up, so the next new one is their count.
#[derive(Debug, Default)]
struct Slots {
    by_gpa: BTreeMap<u64, Slot>,
    freed: Vec<u32>,
}

/// What an architecture adds to a virtual machine. What it does not have answers `Unsupported`.
trait ArchVm {
    /// Called before anything that needs interrupt controllers to be complete.
    fn before_interrupts(&self) -> VcpuResult<()> {
        Ok(())
    }

    /// See [`Accel::set_aarch64_features`].
    fn set_features(&self, caps: &Capabilities, features: Aarch64Features) -> VcpuResult<()> {
        let _ = (caps, features);
        Err(not_here("optional parts of the aarch64 architecture"))
    }

    /// See [`Accel::gic`].
    fn gic(&self) -> VcpuResult<Gic> {
        Err(not_here("an in-kernel GIC"))
    }

    /// See [`Accel::get_gic_state`].
    fn get_gic_state(&self) -> VcpuResult<GicState> {
        Err(not_here("an in-kernel GIC"))
    }

    /// See [`Accel::set_gic_state`].
    fn set_gic_state(&self, state: &GicState) -> VcpuResult<()> {
        let _ = state;
        Err(not_here("an in-kernel GIC"))
    }
}

fn not_here(what: &'static str) -> AccelError {
    AccelError::Unsupported { kind: Some(AccelKind::Kvm), what }
}

/// What the `AccelKvm`, its vCPUs and interrupt handles share.
#[derive(Debug)]
struct KvmVm {
    kvm: Kvm,
    fd: VmFd,
    caps: Capabilities,
    /// By guest physical address.
    slots: Mutex<Slots>,
    irqchip: Mutex<IrqChip>,
    arch: arch::VmArch,
    dirty: dirty::DirtyTracking,
    /// A vCPU was created: interrupt controllers and dirty rings cannot change any more.
    has_vcpus: AtomicBool,
}

/// One virtual machine on KVM.
///
/// ```
/// use vm_accel::{Accel, platform::kvm::AccelKvm};
/// match AccelKvm::new() {
///     Ok(vm) => println!("up to {} vCPUs", vm.capabilities().max_vcpus),
///     Err(why) => println!("{why}"), // says what to do about it
/// }
/// ```
#[derive(Debug)]
pub struct AccelKvm {
    vm: Arc<KvmVm>,
}

impl AccelKvm {
    /// Creates a virtual machine.
    ///
    /// # Errors
    /// [`AccelError::Unavailable`] with the reason.
    pub fn new() -> VcpuResult<Self> {
        let kvm = probe::open()?;
        let fd = create_vm(&kvm)?;
        arch::prepare_vm(&fd)?;
        let caps = host_capabilities(&kvm, &fd)?;
        let dirty = dirty::DirtyTracking::new(&fd);
        Ok(Self {
            vm: Arc::new(KvmVm {
                kvm,
                fd,
                caps,
                slots: Mutex::default(),
                irqchip: Mutex::default(),
                arch: arch::VmArch::default(),
                dirty,
                has_vcpus: AtomicBool::new(false),
            }),
        })
    }

    /// Collects dirty pages from a ring of `entries` entries per vCPU instead of a bitmap per mapping; cheaper when few
    /// pages of much memory are written. To be called before the first vCPU is created and before any mapping has
    /// [`MemoryFlags::LOG_DIRTY`].
    ///
    /// Not for hosts with [`Capabilities::emulates_ring0`]: their interpreter was seen to run on with a full ring, which
    /// loses pages.
    ///
    /// # Errors
    /// [`AccelError::Unsupported`] where [`Capabilities::dirty_ring`] is false, [`AccelError::InvalidArgument`] if it is
    /// too late or `entries` is not a power of two that the kernel accepts.
    pub fn enable_dirty_ring(&mut self, entries: u32) -> VcpuResult<()> {
        if !self.vm.caps.dirty_ring {
            return Err(self.unsupported("a dirty ring"));
        }
        if self.vm.has_vcpus.load(Ordering::Relaxed) {
            return Err(AccelError::invalid("dirty ring", "vCPUs exist already"));
        }
        self.vm.dirty.enable_ring(&self.vm.fd, entries)
    }

    /// The slots, for a change that starts at `gpa`.
    fn slot_error(gpa: u64) -> AccelError {
        AccelError::invalid("guest physical address", format!("no mapping starts at {gpa:#x}"))
    }
}

/// `KVM_CREATE_VM`, again if a signal came in between.
fn create_vm(kvm: &Kvm) -> VcpuResult<VmFd> {
    let kind = arch::vm_type(kvm);
    loop {
        match kvm.create_vm_with_type(kind) {
            Err(error) if error.errno() == libc::EINTR => {}
            result => return result.map_err(refused("KVM_CREATE_VM")),
        }
    }
}

/// What this kernel can do. Asked once: the answers are the host's, and asking CPUID of a hundred leaves costs more than
/// creating a virtual machine where CPUID traps.
fn host_capabilities(kvm: &Kvm, fd: &VmFd) -> VcpuResult<Capabilities> {
    static HOST: OnceLock<Capabilities> = OnceLock::new();
    if let Some(caps) = HOST.get() {
        return Ok(caps.clone());
    }
    let caps = capabilities(kvm, fd)?;
    Ok(HOST.get_or_init(|| caps).clone())
}

/// What this kernel can do for the virtual machine `fd`.
fn capabilities(kvm: &Kvm, fd: &VmFd) -> VcpuResult<Capabilities> {
    let value = |cap: Cap| u32::try_from(fd.check_extension_int(cap)).unwrap_or(0);
    let has = |cap: Cap| value(cap) != 0;
    let mut caps = capabilities! {
        max_vcpus: kvm.get_max_vcpus() as u32,
        max_vcpu_id: kvm.get_max_vcpu_id() as u32,
        max_memory_slots: kvm.get_nr_memslots() as u32,
        read_only_memory: has(Cap::ReadonlyMem),
        dirty_log: true,
        dirty_ring: dirty::ring_capability(fd).is_some(),
        irqfd: has(Cap::Irqfd),
        ioevent: has(Cap::Ioeventfd),
        guest_debug: has(Cap::SetGuestDebug),
        kernel_irqchip: has(Cap::Irqchip),
        ..Capabilities::minimal(arch::GUEST_ARCH)
    };
    arch::capabilities(kvm, fd, &mut caps)?;
    Ok(caps)
}

impl KvmVm {
    /// For `impl_vcpu_new!`: bytes of the run area that the kernel shares per vCPU.
    fn run_area_size(&self) -> VcpuResult<usize> {
        self.kvm.get_vcpu_mmap_size().map_err(refused("KVM_GET_VCPU_MMAP_SIZE"))
    }

    /// For `impl_vcpu_new!`.
    fn open_vcpu(&self, id: u32) -> VcpuResult<VcpuFd> {
        if id >= self.caps.max_vcpu_id {
            return Err(AccelError::invalid("vCPU id", format!("{id} is not below {}", self.caps.max_vcpu_id)));
        }
        let fd = self.fd.create_vcpu(u64::from(id)).map_err(|error| match error.errno() {
            libc::EEXIST => AccelError::invalid("vCPU id", format!("{id} exists already")),
            libc::E2BIG | libc::EINVAL => AccelError::invalid("vCPU id", format!("the kernel refuses {id}")),
            code => errno("KVM_CREATE_VCPU", code),
        })?;
        self.has_vcpus.store(true, Ordering::Relaxed);
        Ok(fd)
    }

    /// Tells the kernel about a slot; a size of 0 removes it.
    fn set_slot(&self, gpa: u64, slot: &Slot, size: u64) -> VcpuResult<()> {
        let mut flags = 0;
        if !slot.flags.contains(MemoryFlags::WRITE) {
            flags |= kb::KVM_MEM_READONLY;
        }
        if slot.flags.contains(MemoryFlags::LOG_DIRTY) {
            flags |= kb::KVM_MEM_LOG_DIRTY_PAGES;
        }
        let region = kb::kvm_userspace_memory_region {
            slot: slot.number,
            flags: if size == 0 { 0 } else { flags },
            guest_phys_addr: gpa,
            memory_size: size,
            userspace_addr: slot.region.as_ptr() as u64,
        };
        // SAFETY: the region is a mapping of this process that `slots` keeps alive until the slot is removed, or until
        // the last user of this virtual machine is gone. Guest memory is never borrowed as a Rust reference.
        unsafe { self.fd.set_user_memory_region(region) }.map_err(|error| match error.errno() {
            libc::EINVAL | libc::EEXIST | libc::E2BIG => AccelError::invalid(
                "mapping",
                format!("the kernel refuses {size:#x} bytes at guest physical address {gpa:#x}"),
            ),
            code => errno("KVM_SET_USER_MEMORY_REGION", code),
        })
    }

    /// Checks a new mapping against the rules of [`Accel::map_memory`] and the other slots.
    fn check_mapping(
        &self,
        slots: &BTreeMap<u64, Slot>,
        gpa: u64,
        region: &GuestRegion,
        flags: MemoryFlags,
    ) -> VcpuResult<()> {
        let size = region.size();
        let page = self.caps.page_size;
        let bad = |why: String| Err(AccelError::invalid("mapping", format!("{size:#x} bytes at {gpa:#x}: {why}")));
        if gpa % page != 0 || size % page != 0 {
            return bad(format!("address and size must be multiples of the page size {page:#x}"));
        }
        let Some(end) = gpa.checked_add(size) else {
            return bad("the end exceeds 64 bits".into());
        };
        let bits = self.caps.guest_phys_bits;
        if bits != 0 && bits < 64 && end > 1 << bits {
            return bad(format!("guest physical addresses have {bits} bits here"));
        }
        let below = slots.range(..end).next_back();
        if let Some((start, slot)) = below.filter(|(start, slot)| *start + slot.region.size() > gpa) {
            return bad(format!("overlaps the mapping of {:#x} bytes at {start:#x}", slot.region.size()));
        }
        self.check_flags(gpa, region, flags)
    }

    fn check_flags(&self, gpa: u64, region: &GuestRegion, flags: MemoryFlags) -> VcpuResult<()> {
        let unsupported = |what| Err(AccelError::Unsupported { kind: Some(AccelKind::Kvm), what });
        if !flags.contains(MemoryFlags::READ) {
            return Err(AccelError::invalid("mapping", format!("{gpa:#x}: memory must be readable")));
        }
        if !flags.contains(MemoryFlags::EXECUTE) {
            return unsupported("memory that the guest cannot execute");
        }
        if flags.contains(MemoryFlags::WRITE) {
            if !region.is_writable() {
                return Err(AccelError::invalid("mapping", format!("{gpa:#x}: the host memory is read-only")));
            }
        } else if !self.caps.read_only_memory {
            return unsupported("read-only memory");
        }
        Ok(())
    }

    /// A slot number that is not in use.
    fn free_slot(&self, slots: &Slots) -> VcpuResult<u32> {
        let used = slots.by_gpa.len();
        if used >= self.caps.max_memory_slots as usize {
            return Err(AccelError::invalid("mapping", format!("all {used} memory slots are in use")));
        }
        Ok(slots.freed.last().copied().unwrap_or(used as u32))
    }

    fn has_local_apics(&self) -> bool {
        *lock(&self.irqchip) != IrqChip::None
    }
}

impl Accel for AccelKvm {
    fn kind(&self) -> AccelKind {
        AccelKind::Kvm
    }

    fn capabilities(&self) -> &Capabilities {
        &self.vm.caps
    }

    fn create_vcpu(&mut self, id: u32) -> VcpuResult<Box<dyn VcpuOps>> {
        Ok(Box::new(vcpu::KvmVcpu::new(&self.vm, id)?))
    }

    fn map_memory(&mut self, gpa: u64, region: &GuestRegion, flags: MemoryFlags) -> VcpuResult<()> {
        let mut slots = lock(&self.vm.slots);
        self.vm.check_mapping(&slots.by_gpa, gpa, region, flags)?;
        let slot = Slot { number: self.vm.free_slot(&slots)?, region: region.clone(), flags };
        self.vm.set_slot(gpa, &slot, region.size())?;
        self.vm.dirty.mapped(&slot);
        slots.freed.pop();
        slots.by_gpa.insert(gpa, slot);
        Ok(())
    }

    fn unmap_memory(&mut self, gpa: u64) -> VcpuResult<()> {
        let mut slots = lock(&self.vm.slots);
        let slot = slots.by_gpa.get(&gpa).ok_or_else(|| Self::slot_error(gpa))?;
        self.vm.set_slot(gpa, slot, 0)?;
        let number = slot.number;
        slots.by_gpa.remove(&gpa);
        slots.freed.push(number);
        Ok(())
    }

    fn remap_memory(&mut self, gpa: u64, region: &GuestRegion, flags: MemoryFlags) -> VcpuResult<()> {
        let mut slots = lock(&self.vm.slots);
        let old = slots.by_gpa.get_mut(&gpa).ok_or_else(|| Self::slot_error(gpa))?;
        if old.region.size() != region.size() {
            let (new, old) = (region.size(), old.region.size());
            return Err(AccelError::invalid("mapping", format!("{gpa:#x}: {new:#x} bytes cannot replace {old:#x}")));
        }
        self.vm.check_flags(gpa, region, flags)?;
        let new = Slot { number: old.number, region: region.clone(), flags };
        // KVM lets neither the host address nor the read-only flag of a slot change: remove and add.
        self.vm.set_slot(gpa, old, 0)?;
        if let Err(error) = self.vm.set_slot(gpa, &new, region.size()) {
            self.vm.set_slot(gpa, old, old.region.size())?;
            return Err(error);
        }
        self.vm.dirty.mapped(&new);
        *old = new;
        Ok(())
    }

    fn protect_memory(&mut self, gpa: u64, flags: MemoryFlags) -> VcpuResult<()> {
        let mut slots = lock(&self.vm.slots);
        let slot = slots.by_gpa.get_mut(&gpa).ok_or_else(|| Self::slot_error(gpa))?;
        self.vm.check_flags(gpa, &slot.region, flags)?;
        let new = Slot { number: slot.number, region: slot.region.clone(), flags };
        if (slot.flags ^ flags).contains(MemoryFlags::WRITE) {
            self.vm.set_slot(gpa, slot, 0)?;
        }
        if let Err(error) = self.vm.set_slot(gpa, &new, new.region.size()) {
            self.vm.set_slot(gpa, slot, slot.region.size())?;
            return Err(error);
        }
        self.vm.dirty.mapped(&new);
        slot.flags = flags;
        Ok(())
    }

    fn take_dirty(&mut self, gpa: u64) -> VcpuResult<DirtyBitmap> {
        let slots = lock(&self.vm.slots);
        let slot = slots.by_gpa.get(&gpa).ok_or_else(|| Self::slot_error(gpa))?;
        if !slot.flags.contains(MemoryFlags::LOG_DIRTY) {
            return Err(AccelError::invalid(
                "guest physical address",
                format!("the mapping at {gpa:#x} is not logged"),
            ));
        }
        self.vm.dirty.take(&self.vm.fd, slot)?.with_base(gpa)
    }

    fn create_irqchip(&mut self, chip: IrqChip) -> VcpuResult<()> {
        if self.vm.has_vcpus.load(Ordering::Relaxed) {
            return Err(AccelError::invalid("interrupt controller", "vCPUs exist already"));
        }
        let mut current = lock(&self.vm.irqchip);
        if *current != IrqChip::None {
            return Err(AccelError::invalid("interrupt controller", "there is one already"));
        }
        let caps = &self.vm.caps;
        match chip {
            IrqChip::None => return Ok(()),
            IrqChip::Kernel if !caps.kernel_irqchip => {
                return Err(self.unsupported("an in-kernel interrupt controller"));
            }
            IrqChip::Split if !caps.split_irqchip => {
                return Err(self.unsupported("a split interrupt controller"));
            }
            _ => arch::create_irqchip(&self.vm, chip)?,
        }
        *current = chip;
        Ok(())
    }

    fn irq_handle(&self) -> VcpuResult<IrqHandle> {
        if !self.vm.has_local_apics() {
            return Err(self.unsupported("raising interrupts without an interrupt controller"));
        }
        Ok(IrqHandle::new(Arc::clone(&self.vm) as Arc<dyn IrqSink>))
    }

    fn set_irq_routes(&mut self, routes: &[(u32, IrqTarget)]) -> VcpuResult<()> {
        if !self.vm.has_local_apics() {
            return Err(self.unsupported("interrupt routing without an interrupt controller"));
        }
        let entries: Vec<_> = routes.iter().map(|(gsi, target)| route(*gsi, target)).collect();
        let table = kb::KvmIrqRouting::from_entries(&entries)
            .map_err(|_| AccelError::invalid("interrupt routes", format!("{} are too many", entries.len())))?;
        self.vm.fd.set_gsi_routing(&table).map_err(refused("KVM_SET_GSI_ROUTING"))
    }

    fn register_irqfd(&mut self, event: &HostEvent, gsi: u32, resample: Option<&HostEvent>) -> VcpuResult<()> {
        self.vm.arch.before_interrupts()?;
        let mut irqfd = kb::kvm_irqfd { fd: event.as_raw_fd() as u32, gsi, ..Default::default() };
        if let Some(resample) = resample {
            irqfd.flags = kb::KVM_IRQFD_FLAG_RESAMPLE;
            irqfd.resamplefd = resample.as_raw_fd() as u32;
        }
        self.vm_ioctl("KVM_IRQFD", ffi::KVM_IRQFD, &irqfd)
    }

    fn unregister_irqfd(&mut self, event: &HostEvent, gsi: u32) -> VcpuResult<()> {
        let irqfd = kb::kvm_irqfd {
            fd: event.as_raw_fd() as u32,
            gsi,
            flags: kb::KVM_IRQFD_FLAG_DEASSIGN,
            ..Default::default()
        };
        self.vm_ioctl("KVM_IRQFD", ffi::KVM_IRQFD, &irqfd)
    }

    fn register_ioevent(&mut self, event: &HostEvent, on: IoEventMatch) -> VcpuResult<()> {
        self.vm_ioctl("KVM_IOEVENTFD", ffi::KVM_IOEVENTFD, &io_event(event, on, 0)?)
    }

    fn set_aarch64_features(&mut self, features: Aarch64Features) -> VcpuResult<()> {
        if self.vm.has_vcpus.load(Ordering::Relaxed) {
            return Err(AccelError::invalid("CPU features", "vCPUs exist already"));
        }
        self.vm.arch.set_features(&self.vm.caps, features)
    }

    fn gic(&self) -> VcpuResult<Gic> {
        self.vm.arch.gic()
    }

    fn get_gic_state(&self) -> VcpuResult<GicState> {
        self.vm.arch.get_gic_state()
    }

    fn set_gic_state(&mut self, state: &GicState) -> VcpuResult<()> {
        self.vm.arch.set_gic_state(state)
    }

    fn unregister_ioevent(&mut self, event: &HostEvent, on: IoEventMatch) -> VcpuResult<()> {
        let deassign = 1 << kb::kvm_ioeventfd_flag_nr_deassign;
        self.vm_ioctl("KVM_IOEVENTFD", ffi::KVM_IOEVENTFD, &io_event(event, on, deassign)?)
    }
}

impl AccelKvm {
    /// An ioctl of the virtual machine that reads one structure.
    fn vm_ioctl<T>(&self, op: &'static str, request: std::ffi::c_ulong, argument: &T) -> VcpuResult<()> {
        // SAFETY: every request passed here (KVM_IRQFD, KVM_IOEVENTFD) reads one structure of the type `T` that its
        // number was made from, and keeps no pointer to it.
        unsafe { ffi::ioctl(self.vm.fd.as_raw_fd(), request, &raw const *argument as std::ffi::c_ulong) }
            .map(drop)
            .map_err(|code| errno(op, code))
    }
}

/// The kernel's form of a routing entry.
fn route(gsi: u32, target: &IrqTarget) -> kb::kvm_irq_routing_entry {
    let mut entry = kb::kvm_irq_routing_entry { gsi, ..Default::default() };
    match *target {
        IrqTarget::Pin { chip, pin } => {
            entry.type_ = kb::KVM_IRQ_ROUTING_IRQCHIP;
            entry.u.irqchip = kb::kvm_irq_routing_irqchip { irqchip: chip, pin };
        }
        IrqTarget::Msi(msi) => {
            entry.type_ = kb::KVM_IRQ_ROUTING_MSI;
            let mut theirs = kb::kvm_irq_routing_msi {
                address_lo: msi.address as u32,
                address_hi: (msi.address >> 32) as u32,
                data: msi.data,
                ..Default::default()
            };
            if let Some(device) = msi.device_id {
                entry.flags = kb::KVM_MSI_VALID_DEVID;
                theirs.__bindgen_anon_1.devid = device;
            }
            entry.u.msi = theirs;
        }
    }
    entry
}

/// The kernel's form of an event binding.
fn io_event(event: &HostEvent, on: IoEventMatch, mut flags: u32) -> VcpuResult<kb::kvm_ioeventfd> {
    if !matches!(on.size, 0 | 1 | 2 | 4 | 8) {
        return Err(AccelError::invalid("event width", format!("{} is none of 0, 1, 2, 4, 8", on.size)));
    }
    if on.size == 0 && on.value.is_some() {
        return Err(AccelError::invalid("event width", "a value needs a width"));
    }
    let addr = match on.address {
        IoAddress::Mmio(addr) => addr,
        IoAddress::Pio(port) => {
            flags |= 1 << kb::kvm_ioeventfd_flag_nr_pio;
            u64::from(port)
        }
    };
    if on.value.is_some() {
        flags |= 1 << kb::kvm_ioeventfd_flag_nr_datamatch;
    }
    Ok(kb::kvm_ioeventfd {
        datamatch: on.value.unwrap_or(0),
        addr,
        len: u32::from(on.size),
        fd: event.as_raw_fd(),
        flags,
        ..Default::default()
    })
}

impl IrqSink for KvmVm {
    fn set_line(&self, gsi: u32, level: bool) -> VcpuResult<()> {
        if *lock(&self.irqchip) != IrqChip::Kernel {
            return Err(AccelError::Unsupported {
                kind: Some(AccelKind::Kvm),
                what: "an interrupt line without an in-kernel I/O APIC",
            });
        }
        self.arch.before_interrupts()?;
        arch::set_line(self, gsi, level)
    }

    fn signal_msi(&self, msi: MsiMessage) -> VcpuResult<()> {
        self.arch.before_interrupts()?;
        let message = kb::kvm_msi {
            address_lo: msi.address as u32,
            address_hi: (msi.address >> 32) as u32,
            data: msi.data,
            flags: msi.device_id.map_or(0, |_| kb::KVM_MSI_VALID_DEVID),
            devid: msi.device_id.unwrap_or(0),
            ..Default::default()
        };
        // The answer says how many vCPUs got it; a guest that masks it is not an error.
        self.fd.signal_msi(message).map(drop).map_err(refused("KVM_SIGNAL_MSI"))
    }
}
