//! A KVM vCPU: the run loop, its exits, and the completion protocol over the shared run area.
//!
//! The kernel finishes an access itself at the next `KVM_RUN`, from the data that stands in the run area. So `io_data` and
//! `complete_read` work on that area directly, and `quiesce` is a `KVM_RUN` with `immediate_exit` set, which finishes the
//! access and returns before the guest is entered. What only one architecture has is in `x86_64.rs` and
//! `aarch64.rs`.

use super::arch;
use super::kick::{Kick, RunFlag};
use super::{KvmVm, errno};
use crate::ffi::kvm as ffi;
use kvm_bindings as kb;
use kvm_ioctls::VcpuFd;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::Arc;
use vm_accel_core::accel::AccelKind;
use vm_accel_core::error::{AccelError, InstructionBytes, VcpuResult};
use vm_accel_core::regs::aarch64::Aarch64Vcpu;
use vm_accel_core::regs::x86_64::X86Vcpu;
use vm_accel_core::regs::{FpuRegs, GuestRegs};
use vm_accel_core::vcpu_common::{DebugEvent, GuestDebug, IoDirection, PendingAccess, VcpuExit, VcpuKick, VcpuOps};

/// An access that the next `KVM_RUN` finishes.
#[derive(Debug, Clone, Copy)]
struct Pending {
    kind: PendingKind,
    /// Port, guest physical address or MSR.
    addr: u64,
    /// Where in the run area the data stands.
    offset: usize,
    len: usize,
    is_write: bool,
    answered: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PendingKind {
    /// A port or memory access.
    Io,
    Msr,
    /// The guest called the host: the kernel writes a result to RAX.
    Hypercall,
}

/// One KVM vCPU.
pub(super) struct KvmVcpu {
    pub(super) vm: Arc<KvmVm>,
    id: u32,
    pub(super) fd: VcpuFd,
    run: RunArea,
    kick: Arc<Kick>,
    flag: RunFlag,
    pending: Option<Pending>,
    pub(super) arch: arch::VcpuArch,
    last_exit: Option<u32>,
    debug_event: Option<DebugEvent>,
}

vm_accel_core::impl_vcpu_new!(KvmVcpu, KvmVm, run_area_size);

/// The `kvm_run` structure that the kernel shares with this vCPU, and the data behind it.
#[derive(Debug, Clone, Copy)]
pub(super) struct RunArea {
    run: NonNull<kb::kvm_run>,
    size: usize,
}

// SAFETY: the area belongs to one vCPU, which moves between threads as a whole; the kernel writes it only inside KVM_RUN,
// which needs the vCPU exclusively.
unsafe impl Send for RunArea {}

impl RunArea {
    /// The structure. The kernel changes it only inside `KVM_RUN`, that is, never while `&self` is borrowed from a vCPU.
    /// `immediate_exit` is the exception: other threads store to it, and nobody reads it through this reference.
    #[inline(always)]
    pub(super) fn get(&self) -> &kb::kvm_run {
        // SAFETY: mapped for `size >= size_of::<kvm_run>()` bytes as long as the vCPU's descriptor, which the holder owns.
        unsafe { self.run.as_ref() }
    }

    /// The structure, for writing.
    #[inline(always)]
    pub(super) fn get_mut(&mut self) -> &mut kb::kvm_run {
        // SAFETY: as `get`; the vCPU is borrowed exclusively.
        unsafe { self.run.as_mut() }
    }

    /// Data in the area; empty if the kernel claims a place outside it.
    #[inline]
    fn bytes(&self, offset: usize, len: usize) -> &[u8] {
        if offset.checked_add(len).is_none_or(|end| end > self.size) {
            return &[];
        }
        // SAFETY: the range lies in the mapped area, and the kernel writes there only inside KVM_RUN.
        unsafe { std::slice::from_raw_parts(self.run.as_ptr().cast::<u8>().add(offset), len) }
    }

    #[inline]
    fn bytes_mut(&mut self, offset: usize, len: usize) -> &mut [u8] {
        if offset.checked_add(len).is_none_or(|end| end > self.size) {
            return &mut [];
        }
        // SAFETY: as `bytes`; the vCPU is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.run.as_ptr().cast::<u8>().add(offset), len) }
    }
}

/// Where a field of an exit stands in the run area.
macro_rules! exit_offset {
    ($($field:tt)+) => { std::mem::offset_of!(kb::kvm_run, __bindgen_anon_1.$($field)+) };
}

impl KvmVcpu {
    /// For `impl_vcpu_new!`: what this library uses of the run area; port data may stand behind it.
    const RUN_AREA: usize = size_of::<kb::kvm_run>();

    fn from_parts(vm: Arc<KvmVm>, id: u32, mut fd: VcpuFd) -> VcpuResult<Self> {
        let run = RunArea { run: NonNull::from(fd.get_kvm_run()), size: vm.run_area_size()? };
        let byte = run.run.as_ptr().cast::<u8>();
        // SAFETY: the field lies inside the mapped structure.
        let byte = unsafe { byte.add(std::mem::offset_of!(kb::kvm_run, immediate_exit)) };
        // SAFETY: the byte stays mapped until the descriptor is dropped; `Drop` retires the kick before that. Nobody
        // accesses it otherwise.
        let flag = unsafe { RunFlag::new(NonNull::new_unchecked(byte)) };
        vm.dirty.vcpu_created(&fd)?;
        let mut vcpu = Self {
            arch: arch::VcpuArch::new(&vm),
            vm,
            id,
            fd,
            run,
            kick: Arc::new(Kick::new(flag)?),
            flag,
            pending: None,
            last_exit: None,
            debug_event: None,
        };
        vcpu.arch_init()?;
        Ok(vcpu)
    }

    #[inline(always)]
    pub(super) fn run_area(&self) -> &kb::kvm_run {
        self.run.get()
    }

    #[inline(always)]
    pub(super) fn run_area_mut(&mut self) -> &mut kb::kvm_run {
        self.run.get_mut()
    }

    /// Takes the mark off the registers in the run area.
    #[allow(dead_code)] // Not every architecture's kernel leaves registers there.
    #[inline(always)]
    pub(super) fn clear_dirty_regs(&self) {
        // SAFETY: the field lies in the mapped structure; a vCPU is not `Sync`, and no reference into the structure
        // outlives a call, so nobody reads the field meanwhile.
        unsafe { (&raw mut (*self.run.run.as_ptr()).kvm_dirty_regs).write(0) };
    }

    /// An ioctl of this vCPU.
    ///
    /// # Safety
    /// As [`ffi::ioctl`].
    pub(super) unsafe fn ioctl(&self, op: &'static str, request: u64, argument: u64) -> VcpuResult<i32> {
        // SAFETY: the caller's promise.
        unsafe { ffi::ioctl(self.fd.as_raw_fd(), request as _, argument as _) }.map_err(|code| errno(op, code))
    }

    /// `KVM_RUN` until something happens: `None` if it was interrupted.
    #[inline]
    fn enter(&mut self) -> VcpuResult<Option<u32>> {
        loop {
            self.kick.enter();
            // SAFETY: KVM_RUN takes no argument. The area that it writes is borrowed by nobody, as `self` is exclusive.
            let result = unsafe { ffi::ioctl(self.fd.as_raw_fd(), ffi::KVM_RUN, 0) };
            self.kick.leave();
            self.arch_after_run(result.is_ok());
            match result {
                Ok(_) => return Ok(Some(self.run.get().exit_reason)),
                Err(libc::EINTR) => return Ok(None),
                // An application processor woke up for INIT and waits on for its SIPI.
                Err(libc::EAGAIN) => {}
                Err(code) => return Err(self.run_error(code)),
            }
        }
    }

    /// The meaning of a `KVM_RUN` that failed.
    #[cold]
    fn run_error(&self, code: i32) -> AccelError {
        let run = self.run.get();
        if !matches!(code, libc::EFAULT | libc::EHWPOISON) {
            return errno("KVM_RUN", code);
        }
        let (mut gpa, mut size, mut flags) = (0, 0, 0);
        if run.exit_reason == kb::KVM_EXIT_MEMORY_FAULT {
            // SAFETY: the exit reason says that the kernel filled this variant.
            let fault = unsafe { run.__bindgen_anon_1.memory_fault };
            (gpa, size, flags) = (fault.gpa, fault.size, fault.flags);
        }
        AccelError::MemoryFault { kind: AccelKind::Kvm, gpa, size, flags }
    }

    /// What `run` and `quiesce` share: enters, and translates the exit.
    #[inline]
    fn step(&mut self) -> VcpuResult<Option<VcpuExit>> {
        if let Some(pending) = &self.pending {
            if !pending.answered {
                return Err(AccelError::PendingRead { addr: pending.addr, len: pending.len });
            }
            if pending.kind == PendingKind::Hypercall {
                self.arch_finish_call()?;
            }
        }
        if let Some(access) = self.arch_resume()? {
            return Ok(Some(access));
        }
        loop {
            let Some(reason) = self.enter()? else {
                // An interrupted KVM_RUN has finished what was pending before it looked at the signal.
                self.pending = None;
                return Ok(None);
            };
            self.pending = None;
            self.last_exit = Some(reason);
            if reason == kb::KVM_EXIT_DIRTY_RING_FULL {
                self.vm.dirty.collect(&self.vm.fd)?;
                continue;
            }
            return self.translate(reason).map(Some);
        }
    }

    /// Makes an exit of what the kernel reports, and remembers the access.
    #[inline]
    fn translate(&mut self, reason: u32) -> VcpuResult<VcpuExit> {
        let exit = &self.run.get().__bindgen_anon_1;
        match reason {
            kb::KVM_EXIT_IO => {
                // SAFETY: the exit reason says that the kernel filled this variant.
                let io = unsafe { exit.io };
                let is_write = u32::from(io.direction) == kb::KVM_EXIT_IO_OUT;
                let len = usize::from(io.size) * io.count as usize;
                self.expect_io(u64::from(io.port), io.data_offset as usize, len, is_write);
                Ok(VcpuExit::Io {
                    port: io.port,
                    direction: if is_write { IoDirection::Out } else { IoDirection::In },
                    size: io.size,
                })
            }
            kb::KVM_EXIT_MMIO => {
                // SAFETY: as above.
                let mmio = unsafe { exit.mmio };
                let is_write = mmio.is_write != 0;
                let len = (mmio.len as usize).min(mmio.data.len());
                self.expect_io(mmio.phys_addr, exit_offset!(mmio.data), len, is_write);
                Ok(VcpuExit::Mmio { addr: mmio.phys_addr, size: len as u8, is_write })
            }
            kb::KVM_EXIT_HLT => Ok(VcpuExit::Halted),
            kb::KVM_EXIT_INTR | kb::KVM_EXIT_NMI | kb::KVM_EXIT_SET_TPR => Ok(VcpuExit::Interrupt),
            kb::KVM_EXIT_IRQ_WINDOW_OPEN => Ok(VcpuExit::InterruptWindow),
            kb::KVM_EXIT_SHUTDOWN => Ok(VcpuExit::TripleFault),
            kb::KVM_EXIT_HYPERCALL => {
                self.pending = Some(Pending {
                    kind: PendingKind::Hypercall,
                    addr: 0,
                    offset: 0,
                    len: 0,
                    is_write: true,
                    answered: true,
                });
                Ok(VcpuExit::SystemCall)
            }
            kb::KVM_EXIT_X86_RDMSR | kb::KVM_EXIT_X86_WRMSR => {
                // SAFETY: as above.
                let index = unsafe { exit.msr.index };
                let is_write = reason == kb::KVM_EXIT_X86_WRMSR;
                self.pending = Some(Pending {
                    kind: PendingKind::Msr,
                    addr: u64::from(index),
                    offset: exit_offset!(msr.data),
                    len: 8,
                    is_write,
                    answered: is_write,
                });
                Ok(VcpuExit::Msr { index, is_write })
            }
            kb::KVM_EXIT_IOAPIC_EOI => {
                // SAFETY: as above.
                let vector = unsafe { exit.eoi.vector };
                Ok(VcpuExit::EndOfInterrupt { vector })
            }
            kb::KVM_EXIT_SYSTEM_EVENT => {
                // SAFETY: as above.
                let kind = unsafe { exit.system_event.type_ };
                Ok(match kind {
                    kb::KVM_SYSTEM_EVENT_SHUTDOWN => VcpuExit::Shutdown,
                    kb::KVM_SYSTEM_EVENT_RESET => VcpuExit::Reset,
                    kb::KVM_SYSTEM_EVENT_CRASH => VcpuExit::Crash,
                    _ => VcpuExit::Unknown,
                })
            }
            kb::KVM_EXIT_DEBUG => {
                // SAFETY: as above.
                let debug = unsafe { exit.debug.arch };
                self.debug_event = Some(self.arch_debug_event(&debug)?);
                Ok(VcpuExit::Debug)
            }
            kb::KVM_EXIT_FAIL_ENTRY => {
                // SAFETY: as above.
                let reason = unsafe { exit.fail_entry.hardware_entry_failure_reason };
                Err(AccelError::EntryFailed { kind: AccelKind::Kvm, reason })
            }
            kb::KVM_EXIT_INTERNAL_ERROR => Err(self.internal_error()),
            _ => self.arch_exit(reason),
        }
    }

    /// Remembers an access of `len` bytes whose data stands at `offset` in the run area.
    #[inline(always)]
    pub(super) fn expect_io(&mut self, addr: u64, offset: usize, len: usize, is_write: bool) {
        self.pending = Some(Pending { kind: PendingKind::Io, addr, offset, len, is_write, answered: is_write });
    }

    /// An instruction that the kernel could not emulate, or an error of its own.
    #[cold]
    fn internal_error(&self) -> AccelError {
        // SAFETY: the exit reason says that the kernel filled this variant.
        let failure = unsafe { self.run.get().__bindgen_anon_1.emulation_failure };
        let has_bytes = failure.suberror == kb::KVM_INTERNAL_ERROR_EMULATION
            && failure.ndata >= 1
            && failure.flags & u64::from(kb::KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES) != 0;
        let mut instruction = InstructionBytes::default();
        if has_bytes {
            // SAFETY: the flag says that the kernel filled these bytes.
            let bytes = unsafe { failure.__bindgen_anon_1.__bindgen_anon_1 };
            let len = usize::from(bytes.insn_size).min(bytes.insn_bytes.len());
            instruction = InstructionBytes::new(&bytes.insn_bytes[..len]);
        }
        AccelError::Emulation {
            kind: AccelKind::Kvm,
            code: failure.suberror,
            pc: self.get_regs().map_or(0, |regs| regs.pc),
            instruction,
        }
    }

    /// The pending access if it is one of the wanted direction.
    fn expect(&self, what: &'static str, is_write: bool) -> VcpuResult<Pending> {
        self.pending
            .filter(|pending| pending.is_write == is_write && pending.kind != PendingKind::Hypercall)
            .ok_or_else(|| AccelError::invalid(what, "no such access is pending"))
    }
}

impl Drop for KvmVcpu {
    fn drop(&mut self) {
        // The run area is unmapped when `fd` is dropped, after this.
        self.kick.retire();
    }
}

impl VcpuOps for KvmVcpu {
    fn get_id(&self) -> u32 {
        self.id
    }

    #[inline]
    fn run(&mut self) -> VcpuResult<VcpuExit> {
        match self.step()? {
            Some(exit) => Ok(exit),
            None => {
                self.last_exit = Some(kb::KVM_EXIT_INTR);
                self.kick.answered(self.flag);
                Ok(VcpuExit::Interrupt)
            }
        }
    }

    fn quiesce(&mut self) -> VcpuResult<VcpuExit> {
        Kick::force(self.flag);
        let result = self.step();
        self.kick.rearm(self.flag);
        Ok(result?.unwrap_or(VcpuExit::Interrupt))
    }

    #[inline]
    fn get_regs(&self) -> VcpuResult<GuestRegs> {
        self.arch_get_regs()
    }

    #[inline]
    fn set_regs(&mut self, regs: &GuestRegs) -> VcpuResult<()> {
        self.arch_set_regs(regs)
    }

    fn get_fpu_regs(&self) -> VcpuResult<FpuRegs> {
        self.arch_get_fpu()
    }

    fn set_fpu_regs(&mut self, regs: &FpuRegs) -> VcpuResult<()> {
        self.arch_set_fpu(regs)
    }

    fn kind(&self) -> Option<AccelKind> {
        Some(AccelKind::Kvm)
    }

    #[inline]
    fn io_data(&self) -> VcpuResult<&[u8]> {
        let pending = self.expect("data of a write", true)?;
        Ok(self.run.bytes(pending.offset, pending.len))
    }

    #[inline]
    fn complete_read(&mut self, data: &[u8]) -> VcpuResult<()> {
        let pending = self.expect("answer to a read", false)?;
        if data.len() != pending.len {
            return Err(AccelError::invalid(
                "answer to a read",
                format!("{} bytes were given, {} are needed", data.len(), pending.len),
            ));
        }
        if pending.kind == PendingKind::Msr {
            self.run.get_mut().__bindgen_anon_1.msr.error = 0;
        }
        let target = self.run.bytes_mut(pending.offset, pending.len);
        if target.len() != data.len() {
            return Err(AccelError::invalid("answer to a read", "the kernel's data lies outside its run area"));
        }
        target.copy_from_slice(data);
        self.pending = Some(Pending { answered: true, ..pending });
        Ok(())
    }

    fn fail_access(&mut self) -> VcpuResult<()> {
        match &mut self.pending {
            Some(pending) if pending.kind == PendingKind::Msr => pending.answered = true,
            _ => {
                return Err(AccelError::invalid("refused access", "no access to an MSR is pending"));
            }
        }
        self.run.get_mut().__bindgen_anon_1.msr.error = 1;
        Ok(())
    }

    fn pending_access(&self) -> Option<PendingAccess> {
        let pending = self.pending.filter(|pending| pending.kind != PendingKind::Hypercall)?;
        Some(PendingAccess {
            addr: pending.addr,
            len: pending.len,
            is_write: pending.is_write,
            answered: pending.answered,
        })
    }

    fn kick_handle(&self) -> VcpuResult<VcpuKick> {
        Ok(VcpuKick::new(Arc::clone(&self.kick) as _))
    }

    fn set_guest_debug(&mut self, debug: &GuestDebug) -> VcpuResult<()> {
        self.arch_set_guest_debug(debug)
    }

    fn debug_event(&self) -> VcpuResult<DebugEvent> {
        self.debug_event
            .filter(|_| self.last_exit == Some(kb::KVM_EXIT_DEBUG))
            .ok_or_else(|| AccelError::invalid("debug event", "the last exit was another one"))
    }

    fn raw_exit(&self) -> Option<u64> {
        self.last_exit.map(u64::from)
    }

    fn as_x86(&mut self) -> Option<&mut dyn X86Vcpu> {
        self.arch_as_x86()
    }

    fn as_aarch64(&mut self) -> Option<&mut dyn Aarch64Vcpu> {
        self.arch_as_aarch64()
    }
}
