//! Machines that a platform runs as a whole: [`WholeVm`].
//!
//! Such a platform (Apple's Virtualization.framework) owns CPUs, devices and the boot protocol; its user describes a machine, starts
//! it and stops it. There are no vCPUs, no exits and no guest memory to reach from outside. [`Accel::as_whole_vm`](crate::Accel::as_whole_vm)
//! leads here.

use crate::error::VcpuResult;
use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};

/// A machine, as a platform of whole machines is told of it.
#[derive(Debug)]
pub struct WholeVmConfig {
    /// What it boots.
    pub boot: WholeVmBoot,
    /// Number of CPUs; the backend's [`Capabilities::max_whole_vm_cpus`](crate::Capabilities::max_whole_vm_cpus) at most.
    pub cpus: u32,
    /// RAM in bytes, a multiple of 1 MiB.
    pub memory: u64,
    /// A virtio console (`hvc0` in Linux). The machine takes the files and closes them when it goes.
    pub serial: Option<WholeVmSerial>,
    /// Virtio block devices, in this order.
    pub disks: Vec<WholeVmDisk>,
    /// A virtio network device behind the host's address translation (NAT).
    pub network: bool,
    /// A virtio entropy device.
    pub entropy: bool,
    /// A virtio socket device, for [`WholeVm::connect`].
    pub vsock: bool,
}

impl WholeVmConfig {
    /// A machine with one CPU, `memory` bytes of RAM, an entropy device and nothing else.
    #[must_use]
    pub fn new(boot: WholeVmBoot, memory: u64) -> Self {
        Self { boot, cpus: 1, memory, serial: None, disks: Vec::new(), network: false, entropy: true, vsock: false }
    }
}

/// What a whole machine boots.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum WholeVmBoot {
    /// A Linux kernel by its own boot protocol (on arm64 an uncompressed `Image`).
    Linux {
        /// The kernel.
        kernel: PathBuf,
        /// The initial RAM disk.
        initrd: Option<PathBuf>,
        /// The command line.
        cmdline: String,
    },
    /// The platform's EFI firmware, which boots from a disk (macOS 13).
    Efi {
        /// The file of its variables; it is made if it does not exist.
        variables: PathBuf,
    },
}

/// The host's ends of a whole machine's console: pipes, sockets, terminals or files.
#[derive(Debug)]
pub struct WholeVmSerial {
    /// What the guest reads.
    pub input: File,
    /// Where the guest's output goes.
    pub output: File,
}

/// A disk of a whole machine: a raw image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WholeVmDisk {
    /// The image.
    pub path: PathBuf,
    /// The guest cannot write to it.
    pub read_only: bool,
}

/// What a whole machine is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum WholeVmState {
    /// It was not started, or the guest powered off, or it was stopped.
    Stopped,
    /// The guest runs.
    Running,
    /// It was paused or restored.
    Paused,
    /// It ended with an error of the platform.
    Failed,
    /// It is on its way from one state to another.
    Changing,
    /// The platform names a state that this library does not know.
    Unknown,
}

impl fmt::Display for WholeVmState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Stopped => "stopped",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Failed => "failed",
            Self::Changing => "changing its state",
            Self::Unknown => "in an unknown state",
        })
    }
}

/// A machine that the platform runs as a whole.
///
/// Order: [`configure`](WholeVm::configure) once, then everything else. Every call returns when the platform has done it, not before;
/// a call in the wrong state is refused with [`AccelError::InvalidArgument`](crate::AccelError::InvalidArgument), and what the platform refuses is
/// [`AccelError::Host`](crate::AccelError::Host) with its text and code.
///
/// Threads: every method may be called from any thread, but not from a callback of the platform. How a guest ends is seen by asking
/// for [`state`](WholeVm::state).
///
/// ```no_run
/// use std::{fs::File, thread, time::Duration};
/// use vm_accel::{Accel, AccelKind, PlatformBackend, WholeVmBoot, WholeVmConfig, WholeVmSerial, WholeVmState};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let backend = PlatformBackend::new(AccelKind::Vz)?;
/// let vm = backend.as_whole_vm().expect("VZ runs whole machines");
/// let boot =
///     WholeVmBoot::Linux { kernel: "Image".into(), initrd: Some("initrd".into()), cmdline: "console=hvc0".into() };
/// let serial = WholeVmSerial { input: File::open("/dev/null")?, output: File::create("console.log")? };
/// vm.configure(WholeVmConfig { cpus: 2, serial: Some(serial), network: true, ..WholeVmConfig::new(boot, 1 << 30) })?;
/// vm.start()?;
/// while vm.state() == WholeVmState::Running {
///     thread::sleep(Duration::from_millis(100));
/// }
/// # Ok(())
/// # }
/// ```
pub trait WholeVm: fmt::Debug + Send + Sync {
    /// Describes the machine.
    ///
    /// # Errors
    /// [`AccelError::InvalidArgument`](crate::AccelError::InvalidArgument) if it is described already or a value is out of range,
    /// [`AccelError::Unavailable`](crate::AccelError::Unavailable) if the program lacks an entitlement,
    /// [`AccelError::Unsupported`](crate::AccelError::Unsupported) if this version of the platform lacks something that was asked for,
    /// [`AccelError::Host`](crate::AccelError::Host) if the platform refuses it.
    fn configure(&self, config: WholeVmConfig) -> VcpuResult<()>;

    /// Boots the guest. The machine is stopped before and runs after.
    ///
    /// # Errors
    /// See [`WholeVm`].
    fn start(&self) -> VcpuResult<()>;

    /// Ends a running or paused machine at once, as pulling the plug does.
    ///
    /// # Errors
    /// See [`WholeVm`].
    fn stop(&self) -> VcpuResult<()>;

    /// Asks the running guest to shut down, as a power button does. It may take its time, and it may not do it.
    ///
    /// # Errors
    /// See [`WholeVm`].
    fn request_stop(&self) -> VcpuResult<()>;

    /// Holds the running guest.
    ///
    /// # Errors
    /// See [`WholeVm`].
    fn pause(&self) -> VcpuResult<()>;

    /// Lets the paused guest go on.
    ///
    /// # Errors
    /// See [`WholeVm`].
    fn resume(&self) -> VcpuResult<()>;

    /// Writes the paused machine's state to a file, and leaves it paused. The platform encrypts the file; only this host can read it.
    ///
    /// # Errors
    /// See [`WholeVm`]; [`AccelError::Unsupported`](crate::AccelError::Unsupported) before macOS 14.
    fn save(&self, to: &Path) -> VcpuResult<()>;

    /// Gives a stopped machine the state that [`save`](WholeVm::save) wrote for one of the same description. It is paused then.
    ///
    /// # Errors
    /// As for saving.
    fn restore(&self, from: &Path) -> VcpuResult<()>;

    /// What it is doing. A machine without a description is stopped.
    fn state(&self) -> WholeVmState;

    /// Connects to `port` of the running guest's virtio socket; the answer is the host's end of the stream.
    ///
    /// # Errors
    /// See [`WholeVm`]; [`AccelError::Unsupported`](crate::AccelError::Unsupported) without [`WholeVmConfig::vsock`].
    fn connect(&self, port: u32) -> VcpuResult<File>;
}
