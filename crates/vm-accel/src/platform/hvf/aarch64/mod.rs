//! Hypervisor.framework on Apple silicon.
//!
//! The framework runs EL1 and EL0 on the host's CPU and leaves everything else to the VMM: there is no PSCI, WFI exits, an
//! access to a device tells at best its register. What a KVM host's kernel does about that is done here, so that the same
//! run loop works on both:
//! * HVC and SMC are answered here (PSCI 1.1, SMCCC 1.1), but for services of the silicon partner and the OEM, which exit as
//!   [`VcpuExit::SystemCall`](crate::VcpuExit::SystemCall). Every vCPU but number 0 begins powered off, and its `run` waits.
//! * WFI blocks inside `run` until a kick, an interrupt or the virtual timer's time.
//! * With [`IrqChip::Kernel`] the GIC is the framework's (`gic.rs`), which delivers the timers' interrupts and knows how to wait.
//!   No vCPU runs there before all have been run by their threads; a kick ends the wait.
//! * Without a GIC the virtual timer exits as [`VcpuExit::VirtualTimer`](crate::VcpuExit::VirtualTimer) when it fires, once until
//!   the guest has dealt with it; the VMM's own controller drives the CPU's inputs with
//!   [`Aarch64Vcpu::set_interrupts`](crate::aarch64::Aarch64Vcpu::set_interrupts).
//!
//! A vCPU of the framework belongs to the thread that creates it. So ours is created at its first entry: a VMM may set
//! it up on one thread and run it on another, which owns it from then on. Other threads get
//! [`AccelError::WrongThread`]; dropped elsewhere, a vCPU waits for its thread (`thread.rs`).
//!
//! One virtual machine per process, one vCPU per thread: the framework's rules. Never run on hardware by this project so far;
//! the simulator holds it to the documentation.

mod call;
mod debug;
mod gic;
mod state;
#[cfg(all(target_os = "macos", target_arch = "aarch64"))]
mod system;
mod vcpu;

use super::memory::{Calls, Mappings};
use super::unavailable;
use gic::FrameworkGic;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;
use vcpu::{HvfVcpu, Shared};
use vm_accel_backend::lock;
use vm_accel_backend::slots::{Rules, Slots};
use vm_accel_core::accel::{Accel, AccelKind, Capabilities, GuestArch, IrqChip, IrqHandle, MemoryFlags};
use vm_accel_core::capabilities;
use vm_accel_core::error::{AccelError, UnavailableReason, VcpuResult};
use vm_accel_core::memory::{DirtyBitmap, GuestRegion};
use vm_accel_core::regs::aarch64::{Aarch64Features, Gic, GicState};
use vm_accel_core::vcpu_common::VcpuOps;
use vm_accel_sys::hvf::aarch64::{FEATURE_REGS, HvfArm64Api, Object, PAGE_SIZE, Timebase, sys_reg};

/// Width of guest physical addresses where the framework lets none be chosen.
const DEFAULT_ADDRESS_BITS: u8 = 36;
/// Most vCPUs where the framework does not tell.
const DEFAULT_MAX_VCPUS: u32 = 64;

/// Fields of feature registers that guests do not see: what they cannot have here, or get only where they ask for it
/// on other platforms. Register, lowest bit.
const HIDDEN: [(u16, u32); 10] = [
    (sys_reg::ID_AA64PFR0_EL1, 32),  // SVE
    (sys_reg::ID_AA64PFR0_EL1, 24),  // GIC system registers
    (sys_reg::ID_AA64PFR0_EL1, 44),  // AMU
    (sys_reg::ID_AA64PFR1_EL1, 24),  // SME
    (sys_reg::ID_AA64DFR0_EL1, 8),   // performance monitors
    (sys_reg::ID_AA64DFR0_EL1, 32),  // statistical profiling
    (sys_reg::ID_AA64ISAR1_EL1, 4),  // APA
    (sys_reg::ID_AA64ISAR1_EL1, 8),  // API
    (sys_reg::ID_AA64ISAR1_EL1, 24), // GPA
    (sys_reg::ID_AA64ISAR1_EL1, 28), // GPI
];

/// One virtual machine on Hypervisor.framework.
#[derive(Debug)]
pub struct AccelHvf {
    vm: Arc<Vm>,
    caps: Capabilities,
}

#[cfg(feature = "sim")]
impl AccelHvf {
    /// Creates a virtual machine on a table that a simulator filled.
    ///
    /// # Errors
    /// [`AccelError::Unavailable`] with the reason.
    pub fn with_api(api: &'static HvfArm64Api) -> VcpuResult<Self> {
        Self::create(api)
    }

    /// What a simulated platform can do.
    ///
    /// # Errors
    /// [`AccelError::Unavailable`] with the reason.
    pub fn probe_with(api: &'static HvfArm64Api) -> VcpuResult<Capabilities> {
        Self::examine(api)
    }
}

/// An object of the framework, released when it is dropped.
struct Owned {
    api: &'static HvfArm64Api,
    object: Object,
}

impl Owned {
    fn new(api: &'static HvfArm64Api, create: unsafe extern "C" fn() -> Object) -> Option<Self> {
        // SAFETY: no preconditions.
        let object = unsafe { create() };
        (!object.is_null()).then_some(Self { api, object })
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        // SAFETY: ours, and released once.
        unsafe { (self.api.os_release)(self.object) };
    }
}

impl AccelHvf {
    fn create(api: &'static HvfArm64Api) -> VcpuResult<Self> {
        // What dropped vCPUs of this thread hold back of the last machine.
        super::thread::reap();
        let config = Config::new(api)?;
        let caps = config.capabilities();
        let vm = Arc::new(Vm::create(config, &caps)?);
        Ok(Self { vm, caps })
    }

    fn framework_gic(&self) -> VcpuResult<&FrameworkGic> {
        self.vm.gic.get().ok_or_else(|| self.unsupported("a GIC in a machine without one"))
    }

    fn examine(api: &'static HvfArm64Api) -> VcpuResult<Capabilities> {
        super::thread::reap();
        let config = Config::new(api)?;
        let caps = config.capabilities();
        match Vm::create(config, &caps) {
            // In use is available.
            Ok(_) | Err(AccelError::Unavailable { reason: UnavailableReason::InUse, .. }) => Ok(caps),
            Err(why) => Err(why),
        }
    }
}

/// What is asked before there is a virtual machine.
struct Config {
    api: &'static HvfArm64Api,
    /// The framework's object that asks for wide addresses.
    object: Option<Owned>,
    address_bits: u8,
    max_vcpus: u32,
    /// Feature registers, the host's and the guest's.
    features: BTreeMap<u16, (u64, u64)>,
    timebase: Timebase,
}

impl Config {
    fn new(api: &'static HvfArm64Api) -> VcpuResult<Self> {
        let mut new = Self {
            api,
            object: None,
            address_bits: DEFAULT_ADDRESS_BITS,
            max_vcpus: DEFAULT_MAX_VCPUS,
            features: BTreeMap::new(),
            timebase: Timebase::default(),
        };
        if let Some(count) = api.hv_vm_get_max_vcpu_count {
            let mut most = 0;
            // SAFETY: the pointer is that of a local variable.
            refused("hv_vm_get_max_vcpu_count", unsafe { count(&mut most) })?;
            new.max_vcpus = most;
        }
        if let (Some(create), Some(most), Some(set)) =
            (api.hv_vm_config_create, api.hv_vm_config_get_max_ipa_size, api.hv_vm_config_set_ipa_size)
        {
            new.widest(create, most, set)?;
        }
        new.read_features()?;
        // SAFETY: the pointer is that of a field.
        let told = unsafe { (api.mach_timebase_info)(&mut new.timebase) };
        if told != 0 || new.timebase.numerator == 0 || new.timebase.denominator == 0 {
            return Err(unavailable("mach_timebase_info", told));
        }
        Ok(new)
    }

    /// Asks for the widest guest physical addresses.
    fn widest(
        &mut self,
        create: unsafe extern "C" fn() -> Object,
        most: unsafe extern "C" fn(*mut u32) -> i32,
        set: unsafe extern "C" fn(Object, u32) -> i32,
    ) -> VcpuResult<()> {
        let mut bits = 0;
        // SAFETY: the pointer is that of a local variable.
        refused("hv_vm_config_get_max_ipa_size", unsafe { most(&mut bits) })?;
        if let Some(config) = Owned::new(self.api, create) {
            // SAFETY: the object lives.
            refused("hv_vm_config_set_ipa_size", unsafe { set(config.object, bits) })?;
            self.address_bits = bits.min(52) as u8;
            self.object = Some(config);
        }
        Ok(())
    }

    fn read_features(&mut self) -> VcpuResult<()> {
        let Some(config) = Owned::new(self.api, self.api.hv_vcpu_config_create) else {
            return Err(unavailable("hv_vcpu_config_create", vm_accel_sys::hvf::code::NO_RESOURCES));
        };
        for (feature, register) in FEATURE_REGS {
            let mut host = 0;
            // SAFETY: the object lives, and the pointer is that of a local variable.
            let told = unsafe { (self.api.hv_vcpu_config_get_feature_reg)(config.object, feature, &mut host) };
            refused("hv_vcpu_config_get_feature_reg", told)?;
            let hidden = HIDDEN.iter().filter(|(hidden, _)| *hidden == register);
            let guest = hidden.fold(host, |value, (_, bit)| value & !(0xf << bit));
            self.features.insert(register, (host, guest));
        }
        Ok(())
    }

    fn capabilities(&self) -> Capabilities {
        capabilities! {
            max_vcpus: self.max_vcpus,
            max_vcpu_id: self.max_vcpus,
            // The framework names no limit.
            max_memory_slots: 4096,
            guest_phys_bits: self.address_bits,
            page_size: PAGE_SIZE,
            read_only_memory: true,
            dirty_log: true,
            guest_debug: true,
            aarch64_calls: true,
            kernel_irqchip: FrameworkGic::is_there(self.api),
            emulates_ring0: Some(false),
            ..Capabilities::minimal(GuestArch::Aarch64)
        }
    }
}

/// Makes an error of what a call answered on which everything depends.
fn refused(op: &'static str, answer: i32) -> VcpuResult<()> {
    if answer == 0 { Ok(()) } else { Err(unavailable(op, answer)) }
}

/// The framework's virtual machine of this process.
struct Vm {
    api: &'static HvfArm64Api,
    slots: Slots<Mappings>,
    /// What the virtual counts are behind the host's.
    count_offset: AtomicU64,
    vcpus: Mutex<BTreeMap<u32, Arc<Shared>>>,
    /// How many of them the framework does not have yet.
    missing: AtomicUsize,
    gic: OnceLock<FrameworkGic>,
    features: BTreeMap<u16, (u64, u64)>,
    timebase: Timebase,
}

impl fmt::Debug for Vm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vm").field("slots", &self.slots).finish_non_exhaustive()
    }
}

impl Vm {
    fn create(config: Config, caps: &Capabilities) -> VcpuResult<Self> {
        let api = config.api;
        let object = config.object.as_ref().map_or(std::ptr::null_mut(), |config| config.object);
        // SAFETY: the configuration lives, or is null, which asks for the default.
        refused("hv_vm_create", unsafe { (api.hv_vm_create)(object) })?;
        let rules = Rules {
            kind: AccelKind::Hvf,
            page: caps.page_size,
            address_bits: caps.guest_phys_bits,
            most: caps.max_memory_slots,
            no_execute: true,
        };
        let calls = Calls { map: api.hv_vm_map, unmap: api.hv_vm_unmap, protect: api.hv_vm_protect };
        let vm = Self {
            api,
            slots: Slots::new(Mappings::new(calls, PAGE_SIZE), rules),
            count_offset: AtomicU64::new(0),
            vcpus: Mutex::default(),
            missing: AtomicUsize::new(0),
            gic: OnceLock::new(),
            features: config.features,
            timebase: config.timebase,
        };
        vm.count_offset.store(vm.ticks(), Ordering::Relaxed);
        Ok(vm)
    }

    /// The host's count.
    fn ticks(&self) -> u64 {
        // SAFETY: no preconditions.
        unsafe { (self.api.mach_absolute_time)() }
    }

    /// The guest's count.
    fn count(&self) -> u64 {
        self.ticks().wrapping_sub(self.count_offset.load(Ordering::Relaxed))
    }

    /// How long so many ticks are.
    fn duration(&self, ticks: u64) -> Duration {
        let Timebase { numerator, denominator } = self.timebase;
        let nanoseconds = u128::from(ticks) * u128::from(numerator) / u128::from(denominator);
        Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX))
    }

    /// A feature register as guests see it.
    fn feature(&self, register: u16) -> u64 {
        let has_gic = register == sys_reg::ID_AA64PFR0_EL1 && self.gic.get().is_some();
        self.features.get(&register).map_or(0, |(_, guest)| *guest) | if has_gic { gic::FEATURE } else { 0 }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // SAFETY: the last one who knows of the VM; every vCPU is gone, each keeps it alive. Should it fail there is nobody to
        // tell; the next VM then says that there is one already.
        let _ = unsafe { (self.api.hv_vm_destroy)() };
    }
}

impl Accel for AccelHvf {
    fn kind(&self) -> AccelKind {
        AccelKind::Hvf
    }

    fn capabilities(&self) -> &Capabilities {
        &self.caps
    }

    fn create_vcpu(&mut self, id: u32) -> VcpuResult<Box<dyn VcpuOps>> {
        let mut vcpus = lock(&self.vm.vcpus);
        let most = self.caps.max_vcpus;
        if id >= most || vcpus.contains_key(&id) {
            let detail = format!("{id}: it is in use, or not below {most}");
            return Err(AccelError::invalid("vCPU id", detail));
        }
        if self.vm.gic.get().is_some_and(FrameworkGic::has_started) {
            return Err(AccelError::invalid("vCPU", "their number is final with a GIC when the first of them has run"));
        }
        let shared = Arc::new(Shared::new(self.vm.api, id));
        self.vm.missing.fetch_add(1, Ordering::SeqCst);
        vcpus.insert(id, Arc::clone(&shared));
        Ok(Box::new(HvfVcpu::new(&self.vm, shared)))
    }

    fn map_memory(&mut self, gpa: u64, region: &GuestRegion, flags: MemoryFlags) -> VcpuResult<()> {
        self.vm.slots.map(gpa, region, flags)
    }

    fn unmap_memory(&mut self, gpa: u64) -> VcpuResult<()> {
        self.vm.slots.unmap(gpa)
    }

    fn remap_memory(&mut self, gpa: u64, region: &GuestRegion, flags: MemoryFlags) -> VcpuResult<()> {
        self.vm.slots.remap(gpa, region, flags)
    }

    fn protect_memory(&mut self, gpa: u64, flags: MemoryFlags) -> VcpuResult<()> {
        self.vm.slots.protect(gpa, flags)
    }

    fn take_dirty(&mut self, gpa: u64) -> VcpuResult<DirtyBitmap> {
        self.vm.slots.take_dirty(gpa)
    }

    fn set_aarch64_features(&mut self, features: Aarch64Features) -> VcpuResult<()> {
        if !lock(&self.vm.vcpus).is_empty() {
            return Err(AccelError::invalid("aarch64 features", "vCPUs exist already"));
        }
        if features.is_empty() {
            return Ok(());
        }
        Err(self.unsupported("optional parts of the aarch64 architecture"))
    }

    fn create_irqchip(&mut self, chip: IrqChip) -> VcpuResult<()> {
        match chip {
            IrqChip::None => return Ok(()),
            IrqChip::Kernel if self.caps.kernel_irqchip => {}
            _ => return Err(self.unsupported("such an interrupt controller")),
        }
        if !lock(&self.vm.vcpus).is_empty() || self.vm.gic.get().is_some() {
            return Err(AccelError::invalid("interrupt controller", "there is one, or vCPUs exist already"));
        }
        let gic = FrameworkGic::create(self.vm.api)?;
        // Empty, as `self` is ours alone.
        let _ = self.vm.gic.set(gic);
        Ok(())
    }

    fn irq_handle(&self) -> VcpuResult<IrqHandle> {
        self.framework_gic().map(|_| IrqHandle::new(Arc::<Vm>::clone(&self.vm)))
    }

    fn gic(&self) -> VcpuResult<Gic> {
        self.framework_gic().map(|gic| gic.layout)
    }

    fn get_gic_state(&self) -> VcpuResult<GicState> {
        self.framework_gic()?.save(self.vm.api)
    }

    fn set_gic_state(&mut self, state: &GicState) -> VcpuResult<()> {
        self.framework_gic()?.restore(state)
    }
}
