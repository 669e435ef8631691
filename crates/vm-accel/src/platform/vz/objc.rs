//! Virtualization.framework through its Objective-C bindings.
//!
//! A `VZVirtualMachine` may be touched only on the serial queue it was made for, and its completion handlers run on that queue later: each
//! operation is started on the queue, and waited for outside of it. Waiting on the queue would never end.

use super::{Limits, Machine, Platform};
use block2::{DynBlock, RcBlock};
use dispatch2::{DispatchQueue, DispatchRetained};
use objc2::rc::Retained;
use objc2::{AllocAnyThread as _, available};
use objc2_foundation::{NSArray, NSError, NSFileHandle, NSString, NSURL};
use objc2_virtualization::{
    VZBootLoader, VZDiskImageStorageDeviceAttachment, VZEFIBootLoader, VZEFIVariableStore,
    VZEFIVariableStoreInitializationOptions, VZFileHandleSerialPortAttachment, VZLinuxBootLoader,
    VZNATNetworkDeviceAttachment, VZStorageDeviceConfiguration, VZVirtioBlockDeviceConfiguration,
    VZVirtioConsoleDeviceSerialPortConfiguration, VZVirtioEntropyDeviceConfiguration,
    VZVirtioNetworkDeviceConfiguration, VZVirtioSocketConnection, VZVirtioSocketDevice,
    VZVirtioSocketDeviceConfiguration, VZVirtualMachine, VZVirtualMachineConfiguration, VZVirtualMachineState,
};
use std::fs::File;
use std::mem::ManuallyDrop;
use std::os::fd::{BorrowedFd, IntoRawFd as _};
use std::path::Path;
use std::sync::mpsc;
use vm_accel_core::accel::AccelKind;
use vm_accel_core::error::{AccelError, UnavailableReason, VcpuResult};
use vm_accel_core::whole_vm::{WholeVmBoot, WholeVmConfig, WholeVmDisk, WholeVmSerial, WholeVmState};

const ENTITLEMENT: &str = "com.apple.security.virtualization";

/// The framework on a host that supports it.
#[derive(Debug)]
pub(super) struct Framework;

impl Framework {
    pub(super) fn open() -> VcpuResult<Self> {
        // SAFETY: a class property without preconditions.
        if unsafe { VZVirtualMachine::isSupported() } {
            return Ok(Self);
        }
        let detail = "Virtualization.framework does not support this Mac".to_owned();
        Err(unavailable(UnavailableReason::UnsupportedHardware { detail }))
    }
}

impl Platform for Framework {
    fn limits(&self) -> Limits {
        // SAFETY: class properties without preconditions.
        let (cpus, memory) = unsafe {
            (
                VZVirtualMachineConfiguration::minimumAllowedCPUCount()
                    ..=VZVirtualMachineConfiguration::maximumAllowedCPUCount(),
                VZVirtualMachineConfiguration::minimumAllowedMemorySize()
                    ..=VZVirtualMachineConfiguration::maximumAllowedMemorySize(),
            )
        };
        let narrow = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        Limits { cpus: narrow(*cpus.start())..=narrow(*cpus.end()), memory }
    }

    fn create(&self, config: WholeVmConfig) -> VcpuResult<Box<dyn Machine>> {
        let config = describe(config)?;
        let queue = DispatchQueue::new("vm-accel.vz", None);
        // SAFETY: the configuration was validated, and a queue without attributes is serial.
        let vm = unsafe { VZVirtualMachine::initWithConfiguration_queue(VZVirtualMachine::alloc(), &config, &queue) };
        Ok(Box::new(Vm(OnQueue { queue, value: ManuallyDrop::new(Parts { vm, config }) })))
    }
}

/// Objects that are only ever touched on the queue, their release included.
struct OnQueue<T> {
    queue: DispatchRetained<DispatchQueue>,
    value: ManuallyDrop<T>,
}

// SAFETY: the value is reached through `with` and dropped in `drop` only, and both do that on the serial queue.
unsafe impl<T> Send for OnQueue<T> {}
// SAFETY: as above; the queue runs one piece of work at a time.
unsafe impl<T> Sync for OnQueue<T> {}

impl<T> OnQueue<T> {
    /// Runs `work` on the queue and waits for it. Must not be called on the queue.
    fn with<R: Send>(&self, work: impl FnOnce(&T) -> R + Send) -> R {
        let mut result = None;
        let (this, place) = (self, &mut result);
        self.queue.exec_sync(move || *place = Some(work(&this.value)));
        result.expect("exec_sync returns after the work")
    }
}

impl<T> Drop for OnQueue<T> {
    fn drop(&mut self) {
        struct Last<'a, T>(&'a mut ManuallyDrop<T>);
        // SAFETY: it goes to the queue, which is where the value belongs, and nowhere else.
        unsafe impl<T> Send for Last<'_, T> {}
        impl<T> Last<'_, T> {
            fn release(self) {
                // SAFETY: called once, from `drop`; nothing uses the value afterwards.
                unsafe { ManuallyDrop::drop(self.0) }
            }
        }
        let last = Last(&mut self.value);
        self.queue.exec_sync(move || last.release());
    }
}

struct Parts {
    vm: Retained<VZVirtualMachine>,
    /// For the question whether it can be saved.
    config: Retained<VZVirtualMachineConfiguration>,
}

struct Vm(OnQueue<Parts>);

/// What most operations call at their end: with an error, or null.
type Done = DynBlock<dyn Fn(*mut NSError)>;

impl Vm {
    /// Starts an operation on the queue and waits for its completion handler.
    fn wait(&self, op: &'static str, begin: impl FnOnce(&VZVirtualMachine, &Done) + Send) -> VcpuResult<()> {
        let (done, result) = mpsc::channel();
        self.0.with(move |parts| {
            let block = RcBlock::new(move |error: *mut NSError| {
                // Nobody may wait for it any more; then there is nobody to tell.
                let _ = done.send(outcome(op, error));
            });
            begin(&parts.vm, &block);
        });
        answer(op, &result)
    }

    /// Whether this version of macOS and this description allow saving.
    fn check_savable(&self) -> VcpuResult<()> {
        const WHAT: &str = "saving a machine (macOS 14 has it)";
        if !available!(macos = 14.0) {
            return Err(AccelError::Unsupported { kind: Some(AccelKind::Vz), what: WHAT });
        }
        // SAFETY: the method exists, as was checked, and only reads the description.
        let savable = |parts: &Parts| unsafe {
            parts.config.validateSaveRestoreSupportWithError().map_err(|e| failed("validateSaveRestoreSupport", &e))
        };
        self.0.with(savable)
    }
}

impl Machine for Vm {
    fn state(&self) -> WholeVmState {
        // SAFETY: on the machine's queue.
        match self.0.with(|parts| unsafe { parts.vm.state() }.0) {
            s if s == VZVirtualMachineState::Stopped.0 => WholeVmState::Stopped,
            s if s == VZVirtualMachineState::Running.0 => WholeVmState::Running,
            s if s == VZVirtualMachineState::Paused.0 => WholeVmState::Paused,
            s if s == VZVirtualMachineState::Error.0 => WholeVmState::Failed,
            s if (VZVirtualMachineState::Starting.0..=VZVirtualMachineState::Restoring.0).contains(&s) => {
                WholeVmState::Changing
            }
            _ => WholeVmState::Unknown,
        }
    }

    fn start(&self) -> VcpuResult<()> {
        // SAFETY: `wait` calls it on the machine's queue, here and below.
        self.wait("start", |vm, done| unsafe { vm.startWithCompletionHandler(done) })
    }

    fn stop(&self) -> VcpuResult<()> {
        if !available!(macos = 12.0) {
            let what = "stopping without the guest's help (macOS 12 has it)";
            return Err(AccelError::Unsupported { kind: Some(AccelKind::Vz), what });
        }
        // SAFETY: as in `start`; the method exists.
        self.wait("stop", |vm, done| unsafe { vm.stopWithCompletionHandler(done) })
    }

    fn request_stop(&self) -> VcpuResult<()> {
        // SAFETY: on the machine's queue.
        self.0.with(|parts| unsafe { parts.vm.requestStopWithError() }.map_err(|e| failed("requestStop", &e)))
    }

    fn pause(&self) -> VcpuResult<()> {
        // SAFETY: as in `start`.
        self.wait("pause", |vm, done| unsafe { vm.pauseWithCompletionHandler(done) })
    }

    fn resume(&self) -> VcpuResult<()> {
        // SAFETY: as in `start`.
        self.wait("resume", |vm, done| unsafe { vm.resumeWithCompletionHandler(done) })
    }

    fn save(&self, to: &Path) -> VcpuResult<()> {
        self.check_savable()?;
        let path = text(to)?;
        // SAFETY: as in `start`; the method exists, as was checked.
        self.wait("saveMachineState", |vm, done| unsafe {
            vm.saveMachineStateToURL_completionHandler(&url(path), done)
        })
    }

    fn restore(&self, from: &Path) -> VcpuResult<()> {
        self.check_savable()?;
        let path = text(from)?;
        // SAFETY: as in `save`.
        self.wait("restoreMachineState", |vm, done| unsafe {
            vm.restoreMachineStateFromURL_completionHandler(&url(path), done);
        })
    }

    fn connect(&self, port: u32) -> VcpuResult<File> {
        let (done, result) = mpsc::channel();
        self.0.with(move |parts| {
            // SAFETY: on the machine's queue.
            let device = unsafe { parts.vm.socketDevices() }.firstObject();
            let Some(device) = device.and_then(|device| device.downcast::<VZVirtioSocketDevice>().ok()) else {
                let what = "a virtio socket (the machine is configured without)";
                let _ = done.send(Err(AccelError::Unsupported { kind: Some(AccelKind::Vz), what }));
                return;
            };
            let block = RcBlock::new(move |connection: *mut VZVirtioSocketConnection, error: *mut NSError| {
                let _ = done.send(outcome("connect", error).and_then(|()| stream(connection)));
            });
            // SAFETY: on the machine's queue; the framework copies the block.
            unsafe { device.connectToPort_completionHandler(port, &block) };
        });
        answer("connect", &result)
    }
}

/// The host's end of a connection as a file of its own: the connection closes its descriptor when it goes.
fn stream(connection: *mut VZVirtioSocketConnection) -> VcpuResult<File> {
    // SAFETY: without an error the framework hands a valid connection to the block.
    let connection = unsafe { connection.as_ref() }.ok_or_else(|| AccelError::Host {
        op: "connect",
        message: "no connection".to_owned(),
        code: None,
    })?;
    // SAFETY: the descriptor is open while the connection lives, which is longer than this function.
    let descriptor = unsafe { BorrowedFd::borrow_raw(connection.fileDescriptor()) };
    descriptor.try_clone_to_owned().map(File::from).map_err(|error| AccelError::host("connect", &error))
}

/// What a completion handler sent.
fn answer<T>(op: &'static str, result: &mpsc::Receiver<VcpuResult<T>>) -> VcpuResult<T> {
    let lost =
        || AccelError::Host { op, message: "the framework dropped its completion handler".to_owned(), code: None };
    result.recv().map_err(|_| lost())?
}

/// The outcome that a completion handler is told.
fn outcome(op: &'static str, error: *mut NSError) -> VcpuResult<()> {
    // SAFETY: null, or a valid error for the time of the call.
    match unsafe { error.as_ref() } {
        None => Ok(()),
        Some(error) => Err(failed(op, error)),
    }
}

fn failed(op: &'static str, error: &NSError) -> AccelError {
    let message = error.localizedDescription().to_string();
    // The framework has no code of its own for it, but its text names the entitlement.
    if message.contains(ENTITLEMENT) {
        return unavailable(UnavailableReason::EntitlementMissing { entitlement: ENTITLEMENT });
    }
    AccelError::Host { op, message, code: i32::try_from(error.code()).ok() }
}

fn unavailable(reason: UnavailableReason) -> AccelError {
    AccelError::Unavailable { kind: AccelKind::Vz, reason }
}

/// The framework's description of a machine, validated.
fn describe(config: WholeVmConfig) -> VcpuResult<Retained<VZVirtualMachineConfiguration>> {
    let WholeVmConfig { boot, cpus, memory, serial, disks, network, entropy, vsock } = config;
    let boot = boot_loader(&boot)?;
    let disks = disks.iter().map(block_device).collect::<VcpuResult<Vec<_>>>()?;
    // SAFETY: all of these only store what they get in objects that nobody else has yet, and ranges were checked.
    unsafe {
        let config = VZVirtualMachineConfiguration::new();
        config.setBootLoader(Some(&boot));
        config.setCPUCount(cpus as usize);
        config.setMemorySize(memory);
        config.setStorageDevices(&NSArray::from_retained_slice(&disks));
        if let Some(WholeVmSerial { input, output }) = serial {
            let attachment = VZFileHandleSerialPortAttachment::initWithFileHandleForReading_fileHandleForWriting(
                VZFileHandleSerialPortAttachment::alloc(),
                Some(&file_handle(input)),
                Some(&file_handle(output)),
            );
            let port = VZVirtioConsoleDeviceSerialPortConfiguration::new();
            port.setAttachment(Some(&attachment));
            config.setSerialPorts(&NSArray::from_retained_slice(&[port.into_super()]));
        }
        if network {
            let device = VZVirtioNetworkDeviceConfiguration::new();
            device.setAttachment(Some(&VZNATNetworkDeviceAttachment::new()));
            config.setNetworkDevices(&NSArray::from_retained_slice(&[device.into_super()]));
        }
        if entropy {
            let device = VZVirtioEntropyDeviceConfiguration::new();
            config.setEntropyDevices(&NSArray::from_retained_slice(&[device.into_super()]));
        }
        if vsock {
            let device = VZVirtioSocketDeviceConfiguration::new();
            config.setSocketDevices(&NSArray::from_retained_slice(&[device.into_super()]));
        }
        config.validateWithError().map_err(|error| failed("validate", &error))?;
        Ok(config)
    }
}

fn boot_loader(boot: &WholeVmBoot) -> VcpuResult<Retained<VZBootLoader>> {
    match boot {
        WholeVmBoot::Linux { kernel, initrd, cmdline } => {
            let initrd = initrd.as_deref().map(text).transpose()?;
            // SAFETY: these store the paths; the files are read when the machine starts.
            unsafe {
                let loader = VZLinuxBootLoader::initWithKernelURL(VZLinuxBootLoader::alloc(), &url(text(kernel)?));
                loader.setCommandLine(&NSString::from_str(cmdline));
                loader.setInitialRamdiskURL(initrd.map(url).as_deref());
                Ok(loader.into_super())
            }
        }
        WholeVmBoot::Efi { variables } => {
            if !available!(macos = 13.0) {
                return Err(AccelError::Unsupported { kind: Some(AccelKind::Vz), what: "EFI (macOS 13 has it)" });
            }
            let file = url(text(variables)?);
            // SAFETY: the classes exist, as was checked; a store is made only where there is no file.
            unsafe {
                let store = if variables.exists() {
                    VZEFIVariableStore::initWithURL(VZEFIVariableStore::alloc(), &file)
                } else {
                    let options = VZEFIVariableStoreInitializationOptions::empty();
                    VZEFIVariableStore::initCreatingVariableStoreAtURL_options_error(
                        VZEFIVariableStore::alloc(),
                        &file,
                        options,
                    )
                    .map_err(|error| failed("initCreatingVariableStore", &error))?
                };
                let loader = VZEFIBootLoader::new();
                loader.setVariableStore(Some(&store));
                Ok(loader.into_super())
            }
        }
        _ => Err(AccelError::Unsupported { kind: Some(AccelKind::Vz), what: "this way to boot" }),
    }
}

fn block_device(disk: &WholeVmDisk) -> VcpuResult<Retained<VZStorageDeviceConfiguration>> {
    let file = url(text(&disk.path)?);
    // SAFETY: the attachment opens the image and reports if it cannot.
    unsafe {
        let attachment = VZDiskImageStorageDeviceAttachment::initWithURL_readOnly_error(
            VZDiskImageStorageDeviceAttachment::alloc(),
            &file,
            disk.read_only,
        )
        .map_err(|error| failed("initDiskImageAttachment", &error))?;
        let device = VZVirtioBlockDeviceConfiguration::initWithAttachment(
            VZVirtioBlockDeviceConfiguration::alloc(),
            &attachment,
        );
        Ok(device.into_super())
    }
}

/// A path as the framework takes it.
fn text(path: &Path) -> VcpuResult<&str> {
    path.to_str().ok_or_else(|| AccelError::invalid("path", format!("{} is not UTF-8", path.display())))
}

fn url(path: &str) -> Retained<NSURL> {
    NSURL::fileURLWithPath(&NSString::from_str(path))
}

fn file_handle(file: File) -> Retained<NSFileHandle> {
    NSFileHandle::initWithFileDescriptor_closeOnDealloc(NSFileHandle::alloc(), file.into_raw_fd(), true)
}
