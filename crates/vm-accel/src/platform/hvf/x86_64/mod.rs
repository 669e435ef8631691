//! Hypervisor.framework on Intel Macs.
//!
//! The framework is a thin door to VMX: a vCPU is a VMCS, and what an exit leaves undone is undone. Our emulator finishes it
//! (see the shared x86 layer); interrupts, CPUID and the local APIC are ours, too. What is here: the VM and its memory (this file),
//! the VMCS's set-up and exits (`vcpu.rs`), and the way of registers (`state.rs`).
//!
//! A vCPU of the framework belongs to the thread that creates it. So ours is created at its first entry: a VMM may set
//! it up on one thread and run it on another, which owns it from then on. Other threads get
//! [`AccelError::WrongThread`]; dropped elsewhere, a vCPU waits for its thread (`thread.rs`).
//!
//! One virtual machine per process, one vCPU per thread: the framework's rules. Never run on hardware by this project so far;
//! the simulator holds it to the documentation.

mod state;
#[cfg(all(target_os = "macos", target_arch = "x86_64"))]
mod system;
mod vcpu;

use super::memory::{Calls, Mappings};
use super::unavailable;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use vcpu::{Controls, VmxVcpu};
use vm_accel_backend::impl_accel;
use vm_accel_backend::slots::Mapper as _;
use vm_accel_backend::x86::{Machine, PAGE, Platform, Shared, reduced_cpuid, software_capabilities};
use vm_accel_core::accel::{AccelKind, Capabilities, MemoryFlags};
use vm_accel_core::capabilities;
use vm_accel_core::error::{AccelError, UnavailableReason, VcpuResult};
use vm_accel_core::memory::GuestRegion;
use vm_accel_softcpu::{CpuidEntry, Ram};
use vm_accel_sys::hvf::x86_64::{HvfX86Api, capability, cpu_based};

/// What the framework does not tell about the host.
#[derive(Clone, Copy)]
struct Host {
    /// CPUID of a leaf and subleaf as the host's processor answers; `None` if the guest's processor has all that our
    /// emulator has.
    cpuid: Option<fn(u32, u32) -> [u32; 4]>,
    /// Frequency of the time-stamp counter.
    tsc_hz: u64,
}

/// One virtual machine on Hypervisor.framework.
#[derive(Debug)]
pub struct AccelHvf {
    machine: Machine<Hvf>,
}

impl_accel!(AccelHvf);

#[cfg(feature = "sim")]
impl AccelHvf {
    /// A simulated processor: the emulator's.
    const SIMULATED: Host = Host { cpuid: None, tsc_hz: 1_000_000_000 };

    /// Creates a virtual machine on a table that a simulator filled.
    ///
    /// # Errors
    /// [`AccelError::Unavailable`] with the reason.
    pub fn with_api(api: &'static HvfX86Api) -> VcpuResult<Self> {
        Self::create(api, Self::SIMULATED)
    }

    /// What a simulated platform can do.
    ///
    /// # Errors
    /// [`AccelError::Unavailable`] with the reason.
    pub fn probe_with(api: &'static HvfX86Api) -> VcpuResult<Capabilities> {
        Self::examine(api, Self::SIMULATED)
    }
}

impl AccelHvf {
    fn create(api: &'static HvfX86Api, host: Host) -> VcpuResult<Self> {
        let controls = Controls::new(api)?;
        let caps = capabilities(api, host, &controls);
        let cpuid = guest_cpuid(host, controls.has_rdtscp());
        let vm = Arc::new(Vm::create(api)?);
        let platform = Hvf { vm, controls, knows_time: AtomicBool::new(false) };
        Ok(Self { machine: Machine::new(platform, caps, Some(cpuid), Some(host.tsc_hz)) })
    }

    fn examine(api: &'static HvfX86Api, host: Host) -> VcpuResult<Capabilities> {
        let controls = Controls::new(api)?;
        match Vm::create(api) {
            // In use is available.
            Ok(_) | Err(AccelError::Unavailable { reason: UnavailableReason::InUse, .. }) => {
                Ok(capabilities(api, host, &controls))
            }
            Err(why) => Err(why),
        }
    }
}

/// What the framework offers with these controls.
fn capabilities(api: &HvfX86Api, host: Host, controls: &Controls) -> Capabilities {
    let soft = software_capabilities();
    let mut max_vcpus = 0;
    if let Some(hv_capability) = api.hv_capability {
        // SAFETY: the pointer is that of a local variable.
        if unsafe { hv_capability(capability::VCPU_MAX, &mut max_vcpus) } != 0 {
            max_vcpus = 0;
        }
    }
    // The framework of macOS before 10.15 does not tell; its header allows 64 (HV_VCPU_MAX).
    let max_vcpus = if max_vcpus == 0 { 64 } else { u32::try_from(max_vcpus).unwrap_or(u32::MAX).min(255) };
    let host_bits = host.cpuid.map_or(u32::MAX, |cpuid| cpuid(0x8000_0008, 0)[0] & 0xff);
    capabilities! {
        max_vcpus: max_vcpus,
        max_vcpu_id: max_vcpus,
        // EPT maps of four levels reach 48 bits.
        guest_phys_bits: u32::from(soft.guest_phys_bits).min(host_bits).min(48) as u8,
        sync_regs: false,
        guest_debug: controls.can(cpu_based::MONITOR_TRAP | cpu_based::MOV_DR),
        emulates_ring0: None,
        ..soft
    }
}

/// What CPUID answers by default: what our emulator has, as far as the processor has it, too.
fn guest_cpuid(host: Host, rdtscp: bool) -> Vec<CpuidEntry> {
    const ECX: usize = 2;
    const EDX: usize = 3;
    /// Registers that hold features.
    const FEATURES: [(u32, usize); 7] =
        [(1, ECX), (1, EDX), (7, 1), (7, ECX), (7, EDX), (0x8000_0001, ECX), (0x8000_0001, EDX)];
    /// "Hypervisor", local APIC, x2APIC: ours.
    const OURS: [(u32, usize, u32); 3] = [(1, ECX, 31), (1, EDX, 9), (1, ECX, 21)];
    // Without the counter's value at every look our local APIC has no deadline timer.
    let mut hidden = vec![(1, ECX, 24)];
    if !rdtscp {
        // RDPID needs the same control.
        hidden.extend([(0x8000_0001, EDX, 27), (7, ECX, 22)]);
    }
    let Some(cpuid) = host.cpuid else {
        return reduced_cpuid(host.tsc_hz, &hidden);
    };
    for (leaf, register) in FEATURES {
        let has = cpuid(leaf, 0)[register];
        let lacks = (0..32).filter(|bit| has >> bit & 1 == 0).map(|bit| (leaf, register, bit));
        hidden.extend(lacks.filter(|bit| !OURS.contains(bit)));
    }
    let mut entries = reduced_cpuid(host.tsc_hz, &hidden);
    for entry in entries.iter_mut().filter(|entry| (entry.leaf, entry.subleaf) == (0xd, 1)) {
        entry.eax &= cpuid(0xd, 1)[0];
    }
    entries
}

/// The framework's virtual machine of this process.
struct Vm {
    api: &'static HvfX86Api,
    mappings: Mappings,
}

impl fmt::Debug for Vm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vm").finish_non_exhaustive()
    }
}

impl Vm {
    fn create(api: &'static HvfX86Api) -> VcpuResult<Self> {
        // What dropped vCPUs of this thread hold back of the last machine.
        super::thread::reap();
        let calls = Calls { map: api.hv_vm_map, unmap: api.hv_vm_unmap, protect: api.hv_vm_protect };
        // SAFETY: no preconditions; 0 is HV_VM_DEFAULT.
        match unsafe { (api.hv_vm_create)(0) } {
            0 => Ok(Self { api, mappings: Mappings::new(calls, PAGE) }),
            code => Err(unavailable("hv_vm_create", code)),
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // SAFETY: the last one who knows of the VM; every vCPU is gone, each keeps it alive. Should it fail there is nobody to
        // tell; the next VM then says that there is one already.
        let _ = unsafe { (self.api.hv_vm_destroy)() };
    }
}

/// The platform behind a machine.
#[derive(Debug)]
struct Hvf {
    vm: Arc<Vm>,
    controls: Controls,
    /// The framework's time-stamp counter was set to the machine's.
    knows_time: AtomicBool,
}

impl Platform for Hvf {
    const KIND: AccelKind = AccelKind::Hvf;
    type Engine = VmxVcpu;
    type Hold = ();

    fn engine(shared: &Arc<Shared<Self>>, _: u32) -> VcpuResult<VmxVcpu> {
        Ok(VmxVcpu::new(shared))
    }

    fn map(&self, _: &Arc<Ram>, gpa: u64, region: &GuestRegion, flags: MemoryFlags) -> VcpuResult<()> {
        self.vm.mappings.map(gpa, region, flags)
    }

    fn unmap(&self, gpa: u64, size: u64) -> VcpuResult<()> {
        self.vm.mappings.unmap(gpa, size)
    }

    fn log_dirty(&self, gpa: u64, region: &GuestRegion, flags: MemoryFlags) -> VcpuResult<()> {
        self.vm.mappings.log_dirty(gpa, region, flags)
    }

    fn take_dirty(&self, gpa: u64, size: u64, words: &mut [u64]) -> VcpuResult<()> {
        let written = self.vm.mappings.take_dirty(gpa, size)?;
        words.iter_mut().zip(written).for_each(|(word, bits)| *word |= bits);
        Ok(())
    }
}
