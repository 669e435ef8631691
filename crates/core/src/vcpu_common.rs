//! The vCPU interface that every backend obeys: [`VcpuOps`], its exits and the completion protocol.
//!
//! `run()` returns a plain [`VcpuExit`] that borrows nothing. What the exit needs is then asked of the vCPU:
//!
//! * the bytes that the guest wrote: [`VcpuOps::io_data`];
//! * the bytes that the guest reads are supplied with [`VcpuOps::complete_read`]; `run()` with an unanswered read is
//!   [`AccelError::PendingRead`], never stale data;
//! * the next `run()` finishes the instruction first. One that needs several accesses gives one exit for each;
//! * [`VcpuOps::quiesce`] finishes what is pending without running the guest further, so that state can be saved.
//!
//! [`VcpuOps::run_with`] is the convenience loop over exactly these calls.

use crate::accel::AccelKind;
use crate::error::{AccelError, VcpuResult};
use crate::regs::aarch64::Aarch64Vcpu;
use crate::regs::x86_64::X86Vcpu;
use crate::regs::{FpuRegs, GuestRegs};
use std::fmt;
use std::sync::Arc;

/// Who moves data in an I/O access, seen from the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum IoDirection {
    /// The guest reads (IN, INS): answer with [`VcpuOps::complete_read`].
    In,
    /// The guest writes (OUT, OUTS): ask for the data with [`VcpuOps::io_data`].
    Out,
}

/// Why a vCPU stopped running.
#[non_exhaustive]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum VcpuExit {
    /// An access to an I/O port. A string instruction may transfer several elements at once; the bytes to transfer are
    /// [`PendingAccess::len`] of [`VcpuOps::pending_access`], a multiple of `size`.
    Io {
        /// The port.
        port: u16,
        /// Who moves data.
        direction: IoDirection,
        /// Bytes in one element: 1, 2 or 4.
        size: u8,
    },
    /// An access to a guest physical address at which nothing is mapped, or a write to read-only memory.
    Mmio {
        /// Guest physical address.
        addr: u64,
        /// Bytes: 1 to 8. Not always a power of two: an access that crosses pages arrives in parts.
        size: u8,
        /// True if the guest writes.
        is_write: bool,
    },
    /// The guest called the host (VMCALL/VMMCALL, HVC, SMC). Arguments are in registers; what the VMM leaves in RAX or
    /// X0 is the result. The program counter needs no correction.
    SystemCall,
    /// A breakpoint, watchpoint or single step; see [`VcpuOps::debug_event`].
    Debug,
    /// The guest waits for an interrupt (HLT, WFI) and no in-kernel interrupt controller blocks for it. The program
    /// counter is behind the instruction.
    Halted,
    /// Nothing happened in the guest: a kick, a signal, or the end of [`VcpuOps::quiesce`].
    Interrupt,
    /// The guest can take an interrupt now; asked for with
    /// [`X86Vcpu::request_interrupt_window`].
    InterruptWindow,
    /// The guest switched itself off (PSCI SYSTEM_OFF and the like).
    Shutdown,
    /// The guest asked to be reset (PSCI SYSTEM_RESET and the like).
    Reset,
    /// The guest reported that it crashed (a hypervisor-specific crash call).
    Crash,
    /// An x86 CPU's shutdown state: an exception during the delivery of a double fault.
    TripleFault,
    /// An access to an MSR that the VMM asked to see. A read wants 8 bytes; either direction can be refused with
    /// [`VcpuOps::fail_access`], which the guest sees as a general protection fault.
    Msr {
        /// The MSR.
        index: u32,
        /// True for WRMSR.
        is_write: bool,
    },
    /// A level-triggered interrupt of an I/O APIC in the VMM was acknowledged ([`IrqChip::Split`](crate::IrqChip)).
    EndOfInterrupt {
        /// The vector.
        vector: u8,
    },
    /// The virtual timer of an aarch64 CPU fired, and no in-kernel GIC takes notice: raise its interrupt in the VMM's controller. It
    /// comes once until the guest has dealt with the timer;
    /// [`Aarch64Vcpu::get_virtual_timer`] tells when.
    VirtualTimer,
    /// The platform stopped for a reason that this library does not know. [`VcpuOps::raw_exit`] tells its number.
    Unknown,
}

/// The access that the last exit is about and that the next `run()` will finish.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PendingAccess {
    /// Port number, guest physical address or MSR index.
    pub addr: u64,
    /// Bytes to transfer, all elements of a string instruction together.
    pub len: usize,
    /// True if the guest writes.
    pub is_write: bool,
    /// True if nothing is left to supply: a write, or a read that was answered.
    pub answered: bool,
}

/// What stopped the guest with [`VcpuExit::Debug`].
#[non_exhaustive]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DebugEvent {
    /// A software breakpoint (INT3, BRK) at `pc`.
    SoftwareBreakpoint {
        /// Address of the breakpoint instruction.
        pc: u64,
    },
    /// A hardware breakpoint at `pc`.
    HardwareBreakpoint {
        /// Address of the instruction, which has not run.
        pc: u64,
    },
    /// A watchpoint.
    Watchpoint {
        /// Address of (x86-64) the instruction after, (aarch64) the instruction that did the access.
        pc: u64,
        /// The watched address if the platform tells it.
        addr: Option<u64>,
    },
    /// A single step is done; `pc` is the next instruction.
    SingleStep {
        /// Address of the next instruction.
        pc: u64,
    },
}

/// A hardware watchpoint or breakpoint for [`GuestDebug`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HardwareBreakpoint {
    /// Guest virtual address.
    pub addr: u64,
    /// Bytes: 1 for execution; 1, 2, 4 or 8, naturally aligned, for data.
    pub len: u8,
    /// What to stop at.
    pub on: BreakOn,
}

/// What a [`HardwareBreakpoint`] stops at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BreakOn {
    /// Execution of the instruction at the address.
    Execute,
    /// Writes.
    Write,
    /// Reads and writes.
    Access,
}

/// What the host debugs in a guest. The default debugs nothing.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct GuestDebug {
    /// Stop after every instruction.
    pub single_step: bool,
    /// INT3 or BRK exits instead of raising the guest's exception.
    pub software_breakpoints: bool,
    /// Hardware breakpoints and watchpoints; the guest's own are hidden meanwhile.
    pub hardware: Vec<HardwareBreakpoint>,
}

/// Converts a platform's registers into [`GuestRegs`].
pub trait ToGuestRegs {
    /// The registers in neutral form.
    ///
    /// # Errors
    /// Whatever reading them from the platform gives; pure conversions do not fail.
    fn to_guest_regs(&self) -> VcpuResult<GuestRegs>;
}

/// Converts [`GuestRegs`] into a platform's registers.
pub trait FromGuestRegs: Sized {
    /// The platform's form.
    ///
    /// # Errors
    /// [`AccelError::InvalidArgument`] if the platform cannot represent a value.
    fn from_guest_regs(regs: &GuestRegs) -> VcpuResult<Self>;
}

/// What stands behind a [`VcpuKick`].
pub trait KickTarget: Send + Sync {
    /// Makes the vCPU return from `run()`, now or, if it is not in it, at its next call.
    fn kick(&self);
}

/// Makes a vCPU return from [`VcpuOps::run`] with [`VcpuExit::Interrupt`], from any thread.
///
/// A kick is sticky: if the vCPU is not running, its next `run()` returns at once. Several kicks before one return
/// coalesce. No kick is lost. A kick to a vCPU that is gone does nothing.
#[derive(Clone)]
pub struct VcpuKick(Arc<dyn KickTarget>);

impl VcpuKick {
    /// Wraps a backend's (or a test's) kick.
    #[must_use]
    pub fn new(target: Arc<dyn KickTarget>) -> Self {
        Self(target)
    }

    /// Kicks the vCPU.
    pub fn kick(&self) {
        self.0.kick();
    }
}

impl fmt::Debug for VcpuKick {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("VcpuKick").finish_non_exhaustive()
    }
}

/// One virtual CPU.
///
/// The first six methods are what a backend must have; each further one answers [`AccelError::Unsupported`] unless the
/// backend overrides it.
///
/// Threads: a vCPU of KVM or the fallback may move between threads. HVF binds it to the thread that first uses it and
/// answers [`AccelError::WrongThread`] elsewhere.
pub trait VcpuOps: Send {
    /// The id that it was created with.
    fn get_id(&self) -> u32;

    /// Runs the guest until something needs the VMM. Finishes a pending access first.
    ///
    /// # Errors
    /// [`AccelError::PendingRead`] if a read is unanswered; [`AccelError::EntryFailed`], [`AccelError::Emulation`],
    /// [`AccelError::MemoryFault`] or [`AccelError::Backend`] if the platform cannot go on. The vCPU's registers can
    /// be read after an error.
    fn run(&mut self) -> VcpuResult<VcpuExit>;

    /// The general-purpose registers, program counter and flags. Between an access exit and the next `run()` they show
    /// the state before the instruction, except on KVM where HLT and the finished elements of a REP string
    /// instruction are already accounted for; after [`quiesce`](VcpuOps::quiesce) they are architectural everywhere.
    ///
    /// # Errors
    /// [`AccelError::Backend`] if the platform refuses.
    fn get_regs(&self) -> VcpuResult<GuestRegs>;

    /// Sets the general-purpose registers, program counter and flags, from the next `run()` on.
    ///
    /// On KVM x86-64 a pending exception or soft interrupt is dropped by this call (the kernel's rule).
    ///
    /// # Errors
    /// [`AccelError::Backend`] if the platform refuses.
    fn set_regs(&mut self, regs: &GuestRegs) -> VcpuResult<()>;

    /// The floating-point and SIMD registers.
    ///
    /// # Errors
    /// [`AccelError::Backend`] if the platform refuses.
    fn get_fpu_regs(&self) -> VcpuResult<FpuRegs>;

    /// Sets the floating-point and SIMD registers.
    ///
    /// # Errors
    /// [`AccelError::InvalidArgument`] for another architecture's registers or reserved MXCSR bits,
    /// [`AccelError::Backend`] if the platform refuses.
    fn set_fpu_regs(&mut self, regs: &FpuRegs) -> VcpuResult<()>;

    /// The kind of backend, if it is one of this library's.
    fn kind(&self) -> Option<AccelKind> {
        None
    }

    /// The bytes that the guest wrote with the last exit (port, MMIO or MSR write). For OUTS with REP all elements at
    /// once.
    ///
    /// # Errors
    /// [`AccelError::InvalidArgument`] if the last exit was not a write.
    fn io_data(&self) -> VcpuResult<&[u8]> {
        Err(self.unsupported("reading the data of an exit"))
    }

    /// Supplies the bytes that the guest reads: exactly [`PendingAccess::len`].
    ///
    /// # Errors
    /// [`AccelError::InvalidArgument`] if no read is pending or the length differs.
    fn complete_read(&mut self, data: &[u8]) -> VcpuResult<()> {
        let _ = data;
        Err(self.unsupported("answering a read"))
    }

    /// Refuses the pending access, which must be of an MSR: the guest gets a general protection fault.
    ///
    /// # Errors
    /// [`AccelError::InvalidArgument`] if no MSR access is pending.
    fn fail_access(&mut self) -> VcpuResult<()> {
        Err(self.unsupported("refusing an access"))
    }

    /// The access that the next `run()` finishes, if there is one.
    fn pending_access(&self) -> Option<PendingAccess> {
        None
    }

    /// Finishes what is pending without running the guest further. Returns [`VcpuExit::Interrupt`] when nothing is
    /// left; any other exit is a further access of the same instruction: handle it and call `quiesce` again.
    ///
    /// A kick that comes meanwhile is kept for the next `run()`.
    ///
    /// # Errors
    /// As [`run`](VcpuOps::run).
    fn quiesce(&mut self) -> VcpuResult<VcpuExit> {
        Err(self.unsupported("quiesce"))
    }

    /// A handle with which any thread can make this vCPU return from `run()`.
    ///
    /// # Errors
    /// [`AccelError::Unsupported`] if the backend has none.
    fn kick_handle(&self) -> VcpuResult<VcpuKick> {
        Err(self.unsupported("kicking a vCPU"))
    }

    /// Sets what the host debugs.
    ///
    /// # Errors
    /// [`AccelError::Unsupported`] if the platform lacks it, [`AccelError::InvalidArgument`] for too many or impossible
    /// hardware breakpoints.
    fn set_guest_debug(&mut self, debug: &GuestDebug) -> VcpuResult<()> {
        let _ = debug;
        Err(self.unsupported("guest debugging"))
    }

    /// What the last [`VcpuExit::Debug`] was.
    ///
    /// # Errors
    /// [`AccelError::InvalidArgument`] if the last exit was another one.
    fn debug_event(&self) -> VcpuResult<DebugEvent> {
        Err(self.unsupported("guest debugging"))
    }

    /// The platform's own number of the last exit (`KVM_EXIT_*`, `WHvRunVpExitReason*`, VMX reason), for logs.
    fn raw_exit(&self) -> Option<u64> {
        None
    }

    /// The x86-64 groups of state, if the guest is x86-64.
    fn as_x86(&mut self) -> Option<&mut dyn X86Vcpu> {
        None
    }

    /// The aarch64 groups of state, if the guest is aarch64.
    fn as_aarch64(&mut self) -> Option<&mut dyn Aarch64Vcpu> {
        None
    }

    /// Runs until `handler` says stop, doing what [the protocol](crate::vcpu_common) asks. Returns the exit at which the
    /// handler stopped.
    ///
    /// # Errors
    /// As [`run`](VcpuOps::run), and whatever the handler returns.
    fn run_with(&mut self, handler: &mut dyn ExitHandler) -> VcpuResult<VcpuExit> {
        // Most accesses fit; REP INS can be larger.
        let mut buffer = Vec::with_capacity(8);
        loop {
            let exit = self.run()?;
            match exit {
                VcpuExit::Io { port, direction: IoDirection::Out, size } => {
                    handler.io_write(port, size, self.io_data()?)?
                }
                VcpuExit::Mmio { addr, is_write: true, .. } => handler.mmio_write(addr, self.io_data()?)?,
                VcpuExit::Io { port, direction: IoDirection::In, size } => {
                    self.prepare_read(&mut buffer);
                    handler.io_read(port, size, &mut buffer)?;
                    self.complete_read(&buffer)?;
                }
                VcpuExit::Mmio { addr, is_write: false, .. } => {
                    self.prepare_read(&mut buffer);
                    handler.mmio_read(addr, &mut buffer)?;
                    self.complete_read(&buffer)?;
                }
                _ => {
                    if handler.stop_at(exit)? {
                        return Ok(exit);
                    }
                }
            }
        }
    }

    /// Makes `buffer` as long as the pending read, all ones: what a bus answers where nobody is.
    fn prepare_read(&self, buffer: &mut Vec<u8>) {
        buffer.clear();
        buffer.resize(self.pending_access().map_or(0, |access| access.len), 0xff);
    }

    /// An [`AccelError::Unsupported`] of this vCPU's backend.
    fn unsupported(&self, what: &'static str) -> AccelError {
        AccelError::Unsupported { kind: self.kind(), what }
    }
}

impl fmt::Debug for dyn VcpuOps + '_ {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vcpu").field("kind", &self.kind()).field("id", &self.get_id()).finish_non_exhaustive()
    }
}

/// What [`VcpuOps::run_with`] calls. An access that a handler leaves alone reads all ones and writes nothing.
pub trait ExitHandler {
    /// The guest reads `data.len()` bytes from a port in elements of `size` bytes. `data` arrives all ones.
    ///
    /// # Errors
    /// An error ends [`VcpuOps::run_with`] with it; the read stays pending.
    fn io_read(&mut self, port: u16, size: u8, data: &mut [u8]) -> VcpuResult<()> {
        let _ = (port, size, data);
        Ok(())
    }

    /// The guest wrote `data` to a port in elements of `size` bytes.
    ///
    /// # Errors
    /// An error ends [`VcpuOps::run_with`] with it.
    fn io_write(&mut self, port: u16, size: u8, data: &[u8]) -> VcpuResult<()> {
        let _ = (port, size, data);
        Ok(())
    }

    /// The guest reads from a guest physical address. `data` arrives all ones.
    ///
    /// # Errors
    /// As [`io_read`](ExitHandler::io_read).
    fn mmio_read(&mut self, addr: u64, data: &mut [u8]) -> VcpuResult<()> {
        let _ = (addr, data);
        Ok(())
    }

    /// The guest wrote to a guest physical address.
    ///
    /// # Errors
    /// As [`io_write`](ExitHandler::io_write).
    fn mmio_write(&mut self, addr: u64, data: &[u8]) -> VcpuResult<()> {
        let _ = (addr, data);
        Ok(())
    }

    /// Any other exit: `Ok(true)` ends [`VcpuOps::run_with`], `Ok(false)` goes on. The default ends at every one.
    ///
    /// # Errors
    /// As [`io_write`](ExitHandler::io_write).
    fn stop_at(&mut self, exit: VcpuExit) -> VcpuResult<bool> {
        let _ = exit;
        Ok(true)
    }
}
