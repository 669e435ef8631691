//! The API of [`vm-accel`](https://docs.rs/vm-accel) without its backends.
//!
//! A virtual machine is an [`Accel`], a virtual CPU a [`VcpuOps`]; what they speak of is here too: exits, registers,
//! guest memory, events, errors. A VMM depends on `vm-accel`, which re-exports all of it and adds `PlatformBackend`. This
//! crate is for those who need the types and no backend: a device model, an adapter, or a backend of their own, for which
//! `vm-accel-backend` has the parts that backends share.

pub mod accel;
pub mod error;
pub mod event;
mod macros;
pub mod memory;
#[cfg(feature = "mock")]
pub mod mock;
pub mod regs;
pub mod vcpu_common;
pub mod whole_vm;

pub use accel::{
    Accel, AccelKind, Capabilities, GuestArch, IoAddress, IoEventMatch, IrqChip, IrqHandle, IrqSink, IrqTarget,
    MemoryFlags, MsiMessage, ProbeReport,
};
pub use error::{AccelError, InstructionBytes, RawCode, UnavailableReason, VcpuResult};
pub use event::HostEvent;
pub use memory::{DirtyBitmap, FileMapping, GuestMemory, GuestRegion};
pub use regs::{FpuRegs, GuestRegs, RegMapping, aarch64, x86_64};
pub use vcpu_common::{
    BreakOn, DebugEvent, ExitHandler, FromGuestRegs, GuestDebug, HardwareBreakpoint, IoDirection, KickTarget,
    PendingAccess, ToGuestRegs, VcpuExit, VcpuKick, VcpuOps,
};
pub use whole_vm::{WholeVm, WholeVmBoot, WholeVmConfig, WholeVmDisk, WholeVmSerial, WholeVmState};
