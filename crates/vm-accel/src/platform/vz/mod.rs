//! Apple's Virtualization.framework: whole virtual machines, no vCPU access.
//!
//! [`AccelVz`] is an [`Accel`] whose vCPU and memory calls answer `Unsupported`; everything goes through
//! [`Accel::as_whole_vm`]. This file holds what can be judged without the framework: ranges, order, states. Below it stands the small trait
//! `Platform`, which `objc.rs` implements on macOS and a mock in the tests everywhere. Nothing in here may wait inside one of
//! the framework's callbacks.

#[cfg(target_os = "macos")]
mod objc;
#[cfg(test)]
mod tests;

use std::fmt;
use std::fs::File;
use std::ops::RangeInclusive;
use std::path::Path;
use std::sync::OnceLock;
use vm_accel_core::accel::{Accel, AccelKind, Capabilities, GuestArch, MemoryFlags};
use vm_accel_core::capabilities;
use vm_accel_core::error::{AccelError, VcpuResult};
use vm_accel_core::memory::GuestRegion;
use vm_accel_core::vcpu_common::VcpuOps;
use vm_accel_core::whole_vm::{WholeVm, WholeVmConfig, WholeVmState};

/// RAM comes in units of this (documentation of `VZVirtualMachineConfiguration.memorySize`).
const MEMORY_UNIT: u64 = 1 << 20;

/// What the framework allows on this host.
#[derive(Debug, Clone)]
pub(crate) struct Limits {
    cpus: RangeInclusive<u32>,
    memory: RangeInclusive<u64>,
}

/// The framework.
pub(crate) trait Platform: Send + Sync {
    fn limits(&self) -> Limits;
    fn create(&self, config: WholeVmConfig) -> VcpuResult<Box<dyn Machine>>;
}

/// One of the framework's machines. Its calls return when they are done; it judges the states itself, too.
pub(crate) trait Machine: Send + Sync {
    fn state(&self) -> WholeVmState;
    fn start(&self) -> VcpuResult<()>;
    fn stop(&self) -> VcpuResult<()>;
    fn request_stop(&self) -> VcpuResult<()>;
    fn pause(&self) -> VcpuResult<()>;
    fn resume(&self) -> VcpuResult<()>;
    fn save(&self, to: &Path) -> VcpuResult<()>;
    fn restore(&self, from: &Path) -> VcpuResult<()>;
    fn connect(&self, port: u32) -> VcpuResult<File>;
}

/// A whole virtual machine of Virtualization.framework; see [`Accel::as_whole_vm`].
///
/// The program needs the entitlement `com.apple.security.virtualization`.
pub struct AccelVz {
    platform: Box<dyn Platform>,
    capabilities: Capabilities,
    limits: Limits,
    machine: OnceLock<Box<dyn Machine>>,
}

impl fmt::Debug for AccelVz {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AccelVz").field("state", &self.state()).finish_non_exhaustive()
    }
}

/// What the framework can do here.
///
/// # Errors
/// [`AccelError::Unavailable`] with the reason. A missing entitlement shows only when a machine is described.
#[cfg(target_os = "macos")]
pub fn probe() -> VcpuResult<Capabilities> {
    Ok(AccelVz::new()?.capabilities)
}

impl AccelVz {
    /// A machine that is not described yet.
    ///
    /// # Errors
    /// [`AccelError::Unavailable`] if this host cannot run virtual machines.
    #[cfg(target_os = "macos")]
    pub fn new() -> VcpuResult<Self> {
        Ok(Self::on(Box::new(objc::Framework::open()?)))
    }

    // Hosts without the framework only test what stands above it.
    #[cfg_attr(not(target_os = "macos"), allow(dead_code))]
    pub(crate) fn on(platform: Box<dyn Platform>) -> Self {
        // A machine's architecture is the host's.
        let arch = if std::env::consts::ARCH == "aarch64" { GuestArch::Aarch64 } else { GuestArch::X86_64 };
        let limits = platform.limits();
        let capabilities = capabilities! {
            max_vcpus: 0,
            max_vcpu_id: 0,
            max_memory_slots: 0,
            max_whole_vm_cpus: *limits.cpus.end(),
            ..Capabilities::minimal(arch)
        };
        Self { platform, capabilities, limits, machine: OnceLock::new() }
    }

    /// The machine, if it is in one of these states.
    fn machine_if(&self, what: &'static str, allowed: &[WholeVmState]) -> VcpuResult<&dyn Machine> {
        let machine = self.machine.get().ok_or_else(|| AccelError::invalid(what, "the machine is not configured"))?;
        let state = machine.state();
        if allowed.contains(&state) {
            return Ok(&**machine);
        }
        let allowed: Vec<String> = allowed.iter().map(ToString::to_string).collect();
        Err(AccelError::invalid(what, format!("the machine is {state}; it must be {}", allowed.join(" or "))))
    }
}

impl WholeVm for AccelVz {
    fn configure(&self, config: WholeVmConfig) -> VcpuResult<()> {
        let Limits { cpus, memory } = &self.limits;
        if !cpus.contains(&config.cpus) {
            let detail = format!("{}; this host allows {} to {}", config.cpus, cpus.start(), cpus.end());
            return Err(AccelError::invalid("number of CPUs", detail));
        }
        if !memory.contains(&config.memory) || config.memory % MEMORY_UNIT != 0 {
            let (least, most) = (memory.start(), memory.end());
            let detail =
                format!("{:#x}; this host allows {least:#x} to {most:#x} bytes in units of 1 MiB", config.memory);
            return Err(AccelError::invalid("memory size", detail));
        }
        let again = || AccelError::invalid("configuration", "the machine is configured already");
        if self.machine.get().is_some() {
            return Err(again());
        }
        // Of two threads that do this at a time one wins here; the other's machine was never started.
        self.machine.set(self.platform.create(config)?).map_err(|_| again())
    }

    fn start(&self) -> VcpuResult<()> {
        self.machine_if("start", &[WholeVmState::Stopped])?.start()
    }

    fn stop(&self) -> VcpuResult<()> {
        self.machine_if("stop", &[WholeVmState::Running, WholeVmState::Paused])?.stop()
    }

    fn request_stop(&self) -> VcpuResult<()> {
        self.machine_if("stop request", &[WholeVmState::Running])?.request_stop()
    }

    fn pause(&self) -> VcpuResult<()> {
        self.machine_if("pause", &[WholeVmState::Running])?.pause()
    }

    fn resume(&self) -> VcpuResult<()> {
        self.machine_if("resume", &[WholeVmState::Paused])?.resume()
    }

    fn save(&self, to: &Path) -> VcpuResult<()> {
        self.machine_if("save", &[WholeVmState::Paused])?.save(to)
    }

    fn restore(&self, from: &Path) -> VcpuResult<()> {
        self.machine_if("restore", &[WholeVmState::Stopped])?.restore(from)
    }

    fn state(&self) -> WholeVmState {
        self.machine.get().map_or(WholeVmState::Stopped, |machine| machine.state())
    }

    fn connect(&self, port: u32) -> VcpuResult<File> {
        self.machine_if("connection", &[WholeVmState::Running])?.connect(port)
    }
}

const VCPUS: &str = "access to vCPUs (use as_whole_vm)";
const MEMORY: &str = "access to guest memory (use as_whole_vm)";

impl Accel for AccelVz {
    fn kind(&self) -> AccelKind {
        AccelKind::Vz
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn create_vcpu(&mut self, _id: u32) -> VcpuResult<Box<dyn VcpuOps>> {
        Err(self.unsupported(VCPUS))
    }

    fn map_memory(&mut self, _gpa: u64, _region: &GuestRegion, _flags: MemoryFlags) -> VcpuResult<()> {
        Err(self.unsupported(MEMORY))
    }

    fn unmap_memory(&mut self, _gpa: u64) -> VcpuResult<()> {
        Err(self.unsupported(MEMORY))
    }

    fn remap_memory(&mut self, _gpa: u64, _region: &GuestRegion, _flags: MemoryFlags) -> VcpuResult<()> {
        Err(self.unsupported(MEMORY))
    }

    fn protect_memory(&mut self, _gpa: u64, _flags: MemoryFlags) -> VcpuResult<()> {
        Err(self.unsupported(MEMORY))
    }

    fn as_whole_vm(&self) -> Option<&dyn WholeVm> {
        Some(self)
    }
}
