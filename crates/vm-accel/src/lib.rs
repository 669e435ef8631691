//! `vm-accel`: one API over every host's hypervisor.
//!
//! A VMM author writes one run loop; the same guest runs on Linux KVM, macOS Hypervisor.framework, Windows Hypervisor
//! Platform or, where a host has none of them, a software CPU. [`probe`] says which of them this host has, and why not.
//!
//! # Quick start
//!
//! A guest of five instructions in real mode: it reads a port, adds two, writes the sum to another port and halts.
//!
//! ```
//! use vm_accel::{Accel, AccelKind, GuestArch, GuestRegion, IoDirection, MemoryFlags, PlatformBackend, VcpuExit, x86_64::Segment};
//!
//! # fn main() -> vm_accel::VcpuResult<()> {
//! // The first kind that works here and runs x86-64 guests. `probe()` tells why others do not.
//! let mut kinds = AccelKind::ALL.into_iter().filter_map(|kind| PlatformBackend::new(kind).ok());
//! let Some(mut vm) = kinds.find(|vm| vm.capabilities().runs_vcpus(GuestArch::X86_64)) else {
//!     println!("no backend: {:?}", vm_accel::probe());
//!     return Ok(());
//! };
//! let memory = GuestRegion::anonymous(0x10000)?;
//! memory.write(0x1000, &[0xe4, 0x10, 0x04, 0x02, 0xe6, 0x11, 0xf4])?; // in al, 0x10; add al, 2; out 0x11, al; hlt
//! vm.map_memory(0, &memory, MemoryFlags::RAM)?;
//!
//! let mut vcpu = vm.create_vcpu(0)?;
//! let x86 = vcpu.as_x86().expect("this guest is for x86-64");
//! let mut sregs = x86.get_sregs()?;
//! sregs.cs = Segment { segment_type: 0xb, ..Segment::real_mode(0) };
//! x86.set_sregs(&sregs)?;
//! let mut regs = vcpu.get_regs()?;
//! regs.pc = 0x1000;
//! vcpu.set_regs(&regs)?;
//!
//! loop {
//!     match vcpu.run()? {
//!         VcpuExit::Io { port: 0x10, direction: IoDirection::In, .. } => vcpu.complete_read(&[40])?,
//!         VcpuExit::Io { port: 0x11, direction: IoDirection::Out, .. } => assert_eq!(vcpu.io_data()?, [42]),
//!         VcpuExit::Halted => break,
//!         other => panic!("unexpected: {other:?}"),
//!     }
//! }
//! # Ok(())
//! # }
//! ```
//!
//! # Map
//!
//! * [`PlatformBackend`] is one virtual machine on one backend; [`Accel`] is what it can do; [`Capabilities`] what it
//!   offers on this host.
//! * [`VcpuOps`] is one virtual CPU; [`vcpu_common`] explains how an exit is answered.
//! * [`GuestRegion`] is guest memory on the host, [`GuestMemory`] the guest physical address space as devices see it.
//! * [`x86_64`] and [`aarch64`] name the registers and hold the architecture's groups of state.
//! * [`AccelError`] keeps the operation and the platform's raw code, and says what to do.

mod ffi;
pub mod platform;

pub use platform::{PlatformBackend, probe, probe_kind};

#[cfg(feature = "mock")]
#[doc(inline)]
pub use vm_accel_core::mock;
#[doc(inline)]
pub use vm_accel_core::{
    Accel, AccelError, AccelKind, BreakOn, Capabilities, DebugEvent, DirtyBitmap, ExitHandler, FileMapping, FpuRegs,
    FromGuestRegs, GuestArch, GuestDebug, GuestMemory, GuestRegion, GuestRegs, HardwareBreakpoint, HostEvent,
    InstructionBytes, IoAddress, IoDirection, IoEventMatch, IrqChip, IrqHandle, IrqSink, IrqTarget, KickTarget,
    MemoryFlags, MsiMessage, PendingAccess, ProbeReport, RawCode, RegMapping, ToGuestRegs, UnavailableReason, VcpuExit,
    VcpuKick, VcpuOps, VcpuResult, WholeVm, WholeVmBoot, WholeVmConfig, WholeVmDisk, WholeVmSerial, WholeVmState,
    aarch64, event, impl_reg_accessors, impl_vcpu_new, memory, reg_map, vcpu_common, x86_64,
};

pub use vm_accel_sys::ffi_table;

/// Compiles and runs what the README shows.
#[cfg(doctest)]
#[doc = include_str!("../../../README.md")]
struct Readme;
