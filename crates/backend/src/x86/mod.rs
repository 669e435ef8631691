//! x86-64 virtual machines on everything that is not KVM: the software CPU, and hypervisors that hand unfinished
//! instructions over (HVF, WHPX).
//!
//! A vCPU ([`Machine`] makes them) always has a CPU of `vm-accel-softcpu`. On the fallback that CPU runs the guest. On a
//! hypervisor it *completes*: what the platform leaves undone (port and device accesses of any instruction, writes to
//! read-only memory, CPUID, MSRs) it executes on the registers that the platform held, and they go back before the next
//! entry. So the completion protocol, exceptions of such instructions, and the local APIC are the same code everywhere,
//! and a platform's part is an [`Engine`]: enter the guest, move registers.

mod bus;
mod machine;
mod state;
mod vcpu;

pub use machine::{Machine, PAGE, Shared, reduced_cpuid, software_capabilities};
pub use state::{XSAVE_SIZE, exception};

use std::sync::Arc;
use std::time::Duration;
use vm_accel_core::accel::{AccelKind, MemoryFlags};
use vm_accel_core::error::VcpuResult;
use vm_accel_core::memory::GuestRegion;
use vm_accel_core::regs::x86_64::MpState;
use vm_accel_core::vcpu_common::{GuestDebug, VcpuExit};
use vm_accel_softcpu::apic::Message;
use vm_accel_softcpu::{Cpu, CpuState, Exit, Ram};

bitflags::bitflags! {
    /// Parts of [`CpuState`] that move together.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct Groups: u8 {
        /// `gpr[..16]`, `rip`, `rflags`.
        const GPR = 1;
        /// `segs[..6]`, `ldtr`, `tr`, `gdtr`, `idtr`, `cr0`, `cr2`, `cr3`, `cr4`, `msr.efer`. Needs GPR.
        const SYSTEM = 2;
        /// The rest of `msr`, as far as the platform has them.
        const MSR = 4;
        /// `x87`, `xmm`, `mxcsr`, `xcr0`.
        const FPU = 8;
        /// `dr`, `dr6`, `dr7`.
        const DEBUG = 16;
        /// `events`: `exception`, `interrupt` and `nmi` that the platform has in delivery (it delivers them at the next entry), and
        /// what holds interrupts back. `halted` and `shutdown` are never the platform's.
        const EVENTS = 32;
    }
}

impl Groups {
    /// Copies these groups. `nmi` is joined: one may wait that the platform has not got.
    fn copy(self, from: &CpuState, to: &mut CpuState) {
        if self.contains(Self::GPR) {
            to.gpr[..16].copy_from_slice(&from.gpr[..16]);
            (to.rip, to.rflags) = (from.rip, from.rflags);
        }
        if self.contains(Self::SYSTEM) {
            to.segs[..6].copy_from_slice(&from.segs[..6]);
            (to.ldtr, to.tr, to.gdtr, to.idtr) = (from.ldtr, from.tr, from.gdtr, from.idtr);
            (to.cr0, to.cr2, to.cr3, to.cr4) = (from.cr0, from.cr2, from.cr3, from.cr4);
            to.msr.efer = from.msr.efer;
        }
        if self.contains(Self::MSR) {
            let efer = to.msr.efer;
            to.msr = from.msr;
            to.msr.efer = efer;
        }
        if self.contains(Self::FPU) {
            (to.x87, to.xmm, to.mxcsr, to.xcr0) = (from.x87, from.xmm, from.mxcsr, from.xcr0);
        }
        if self.contains(Self::DEBUG) {
            (to.dr, to.dr6, to.dr7) = (from.dr, from.dr6, from.dr7);
        }
        if self.contains(Self::EVENTS) {
            let (from, to) = (&from.events, &mut to.events);
            (to.exception, to.interrupt) = (from.exception, from.interrupt);
            (to.nmi_blocked, to.sti_shadow, to.mov_ss_shadow) = (from.nmi_blocked, from.sti_shadow, from.mov_ss_shadow);
            to.nmi |= from.nmi;
        }
    }
}

/// What an entry is to do besides running.
#[derive(Debug, Clone, Copy, Default)]
pub struct Order {
    /// Leave with [`Left::Again`] when an external interrupt of a priority class above this task priority class could be
    /// taken: the highest requested class. Class 0 stands for "whatever the task priority is".
    pub window: Option<u8>,
    /// Leave with [`Left::Again`] when a non-maskable interrupt could be taken.
    pub nmi_window: bool,
    /// The local APIC's task priority class, which the guest may have in CR8.
    pub cr8: u8,
    /// IA32_APIC_BASE.
    pub apic_base: u64,
}

/// An IN or OUT of which the platform told everything, so that nothing else need be loaded. Nothing else may happen with the
/// instruction: no string, no trap or breakpoint behind it, no shadow that it ends, no event in delivery.
#[derive(Debug, Clone, Copy)]
pub struct PortAccess {
    /// The port.
    pub port: u16,
    /// Bytes: 1, 2 or 4.
    pub size: u8,
    /// OUT.
    pub is_write: bool,
    /// RAX before the instruction.
    pub rax: u64,
    /// RIP at the instruction.
    pub rip: u64,
    /// RIP behind it.
    pub next: u64,
}

impl PortAccess {
    /// What must not be set in RFLAGS: TF, RF.
    const FLAGS: u64 = 1 << 8 | 1 << 16;

    /// RIP behind an instruction of `length` bytes, if nothing in RFLAGS makes it more than a step and it does not reach the end
    /// of a 16-bit or 32-bit segment.
    pub fn next(rip: u64, length: u8, flags: u64) -> Option<u64> {
        let next = rip.wrapping_add(length.into());
        (flags & Self::FLAGS == 0 && (1..=15).contains(&length) && (rip ^ next) >> 16 == 0).then_some(next)
    }

    /// RAX with what was read in its lowest bytes; 32 bits clear the upper half.
    fn merge(&self, rax: u64, data: &[u8]) -> u64 {
        let value = data.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte));
        match self.size {
            1 => rax & !0xff | value,
            2 => rax & !0xffff | value,
            _ => value,
        }
    }
}

/// How the guest was left.
#[derive(Debug, Clone, Copy)]
pub enum Left {
    /// The CPU of the emulator tells why; an [`Exit::Halted`] of a platform stands behind its HLT.
    Exit(Exit),
    /// The instruction at RIP is to be executed by the emulator, which needs these groups besides GPR, SYSTEM and EVENTS;
    /// with MSR it is given the time-stamp counter, too.
    Emulate(Groups),
    /// A port access without string and prefix; RIP is at it.
    Port(PortAccess),
    /// Nobody need know of it: a cancellation, a spurious exit.
    Again,
    /// An exit that the platform alone knows.
    Other(VcpuExit),
}

/// The platform's local APIC of a virtual CPU, in a machine that has the platform's.
pub trait PlatformApic {
    /// The page of its registers.
    fn page(&self) -> VcpuResult<[u8; 1024]>;

    /// Sets its registers.
    fn set_page(&self, page: &[u8; 1024]) -> VcpuResult<()>;

    /// IA32_APIC_BASE and CR8.
    fn control(&self) -> VcpuResult<(u64, u8)>;

    /// Sets IA32_APIC_BASE and CR8.
    fn set_control(&self, base: u64, cr8: u8) -> VcpuResult<()>;

    /// Whether the CPU runs, halted, or waits to be started.
    fn mp_state(&self) -> VcpuResult<MpState>;

    /// Sets that. Halted and running do not differ from each other while something else keeps the CPU from running.
    fn set_mp_state(&self, state: MpState) -> VcpuResult<()>;
}

/// One virtual CPU of a platform.
///
/// Who saves what when: after [`enter`](Engine::enter) everything is the platform's. [`load`](Engine::load) is called for groups
/// that somebody asks for, once each; before the next entry [`store`](Engine::store) gets, for the groups that were loaded,
/// what was loaded and what it is now, and writes the difference. Nothing is written that was not read or that did not
/// change.
pub trait Engine: Send {
    /// The guest's state is the emulator's own: nothing is loaded or stored.
    const IN_PLACE: bool = false;

    /// A guest that the host debugs runs on the emulator. Otherwise the engine obeys
    /// [`set_guest_debug`](Engine::set_guest_debug).
    const DEBUGS_ON_EMULATOR: bool = false;

    /// Reads groups from the platform. `into` holds what was last loaded or stored: fields that the platform lacks stay.
    /// RIP and RFLAGS must be those with which the guest would go on.
    fn load(&self, groups: Groups, into: &mut CpuState) -> VcpuResult<()>;

    /// Writes what differs between `old`, which the platform holds, and `new`. A new `events.interrupt` or `events.nmi` is
    /// to be delivered with the next entry (both never come together, nor while an exception is in delivery; the guest can
    /// take it); one that is gone is dropped.
    fn store(&mut self, groups: Groups, old: &CpuState, new: &CpuState) -> VcpuResult<()>;

    /// Enters the guest. `cpu` is the emulator; only an engine that is [`IN_PLACE`](Engine::IN_PLACE) may touch its state.
    fn enter(&mut self, cpu: &mut Cpu, order: &Order) -> VcpuResult<Left>;

    /// Sets RIP, and RAX if it is given: the end of a [`Left::Port`]. May be repeated after an error.
    fn finish_port(&mut self, rip: u64, rax: Option<u64>) -> VcpuResult<()> {
        let _ = (rip, rax);
        Ok(())
    }

    /// Makes `enter` return soon, from any thread. Called again until it did; it may come when the guest is not entered, then it
    /// may end the next entry. Not called any more when the engine is dropped.
    fn canceller(&self) -> Option<Box<dyn Fn() + Send + Sync>>;

    /// The task priority class as the guest left it in CR8, where the guest changes it without an exit.
    fn cr8(&self) -> Option<u8> {
        None
    }

    /// The platform's local APIC, which then is the guest's: it waits in HLT and for its start, and `order` is about windows
    /// alone.
    fn apic(&self) -> Option<&dyn PlatformApic> {
        None
    }

    /// The platform may keep a halted CPU without a word: it is to be cancelled after this time, and then tells.
    fn look_for_halt(&self) -> Option<Duration> {
        None
    }

    /// The platform refuses calls from this thread.
    fn check_thread(&self, op: &'static str) -> VcpuResult<()> {
        let _ = op;
        Ok(())
    }

    /// The guest's time-stamp counter now; `None` if it is the emulator's.
    fn tsc(&self) -> VcpuResult<Option<u64>> {
        Ok(None)
    }

    /// Sets the time-stamp counter; false if it is the emulator's.
    fn set_tsc(&mut self, value: u64) -> VcpuResult<bool> {
        let _ = value;
        Ok(false)
    }

    /// What the host debugs was changed; the emulator knows already.
    fn set_guest_debug(&mut self, debug: &GuestDebug) -> VcpuResult<()> {
        let _ = debug;
        Ok(())
    }

    /// The platform's number of the last exit.
    fn raw_exit(&self) -> Option<u64> {
        None
    }
}

/// One virtual machine of a platform.
pub trait Platform: std::fmt::Debug + Send + Sync + Sized + 'static {
    /// The kind of backend.
    const KIND: AccelKind;
    /// Its vCPUs.
    type Engine: Engine + 'static;
    /// What must live as long as a mapping; `()` if nothing.
    type Hold: std::fmt::Debug + Send + Sync;

    /// Creates a vCPU. The id is free and in range.
    fn engine(shared: &Arc<Shared<Self>>, id: u32) -> VcpuResult<Self::Engine>;

    /// Gives the machine the platform's local APICs; false if it has none, then the machine's are ours. Memory may be mapped,
    /// vCPUs there are none. After an error nothing has changed.
    fn use_apics(shared: &Shared<Self>) -> VcpuResult<bool> {
        let _ = shared;
        Ok(false)
    }

    /// Delivers a message to the platform's local APICs.
    fn deliver(&self, message: &Message) -> VcpuResult<()> {
        let _ = message;
        Err(vm_accel_core::error::AccelError::Unsupported {
            kind: Some(Self::KIND),
            what: "interrupts of the platform",
        })
    }

    /// Maps memory; the emulator has it already.
    fn map(&self, ram: &Arc<Ram>, gpa: u64, region: &GuestRegion, flags: MemoryFlags) -> VcpuResult<Self::Hold>;

    /// Unmaps memory.
    fn unmap(&self, gpa: u64, size: u64) -> VcpuResult<()> {
        let _ = (gpa, size);
        Ok(())
    }

    /// Switches the dirty log of a mapping; `flags` are its flags from now on.
    fn log_dirty(&self, gpa: u64, region: &GuestRegion, flags: MemoryFlags) -> VcpuResult<()> {
        let _ = (gpa, region, flags);
        Ok(())
    }

    /// Joins the pages that the guest wrote on the platform into `words`, one bit per 4 KiB page, and starts anew.
    fn take_dirty(&self, gpa: u64, size: u64, words: &mut [u64]) -> VcpuResult<()> {
        let _ = (gpa, size, words);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_access_without_an_emulator_is_a_plain_step() {
        const TF: u64 = 1 << 8;
        const RF: u64 = 1 << 16;
        assert_eq!(PortAccess::next(0x1000, 2, 0x202), Some(0x1002));
        assert_eq!(PortAccess::next(0x1000, 2, TF), None);
        assert_eq!(PortAccess::next(0x1000, 2, RF), None);
        assert_eq!(PortAccess::next(0xffff, 1, 0), None, "a 16-bit IP wraps");
        assert_eq!(PortAccess::next(u64::MAX, 1, 0), None);
        assert_eq!(PortAccess::next(0x1000, 0, 0), None, "the platform did not tell");
    }

    #[test]
    fn what_is_read_goes_into_the_lowest_bytes() {
        let access = |size| PortAccess { port: 0, size, is_write: false, rax: 0, rip: 0, next: 1 };
        let rax = 0x1122_3344_5566_7788;
        assert_eq!(access(1).merge(rax, &[0xaa]), 0x1122_3344_5566_77aa);
        assert_eq!(access(2).merge(rax, &[0xaa, 0xbb]), 0x1122_3344_5566_bbaa);
        assert_eq!(access(4).merge(rax, &[1, 2, 3, 0x84]), 0x8403_0201);
    }
}
