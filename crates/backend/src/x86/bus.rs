//! The machine as an emulator's CPU sees it: its local APIC. Everything else is an exit. In a machine without local APICs there
//! are still a task priority (CR8) and a base register, which nobody looks at.

use crate::lock;
use crate::soft_apic::{Fabric, LocalApic};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;
use vm_accel_softcpu::apic::{MSR_APIC_BASE, MSR_TSC_DEADLINE, Now};
use vm_accel_softcpu::{Answer, Bus, Exception, Intercept, MsrAnswer};

/// What becomes of a CPU's next RDMSR or WRMSR where the VMM wants exits for those that fault. Only executing one tells
/// whether it does.
#[derive(Debug, Clone, Copy, Default)]
pub(super) enum MsrTurn {
    /// The CPU leaves before it.
    #[default]
    Ask,
    /// The CPU executes it, and leaves in place of a general protection fault.
    Try,
    /// The VMM has answered.
    Answered(MsrAnswer),
}

/// The bus of a CPU.
pub(super) struct ApicBus {
    /// The machine has local APICs.
    pub(super) has_apic: bool,
    pub(super) fabric: Arc<Fabric>,
    pub(super) apic: Arc<LocalApic>,
    pub(super) start: Instant,
    /// The time stamp counter when the CPU last told it; the APIC's MMIO interface does not carry it.
    pub(super) tsc: u64,
    /// The VMM wants exits for MSR accesses that fault.
    pub(super) msr_exits: Arc<AtomicBool>,
    pub(super) msr_turn: Arc<Mutex<MsrTurn>>,
}

impl ApicBus {
    fn now(&self, tsc: u64) -> Now {
        Now { ns: nanoseconds(self.start), tsc }
    }

    fn owns_msr(&self, index: u32) -> bool {
        index == MSR_APIC_BASE || self.has_apic && lock(&self.apic.apic).owns_msr(index)
    }

    /// Whether a page is that of the APIC's registers.
    fn is_mine(&self, gpa: u64) -> bool {
        self.has_apic && lock(&self.apic.apic).mmio_base() == Some(gpa & !0xfff)
    }
}

/// Nanoseconds since the machine was made.
pub(super) fn nanoseconds(start: Instant) -> u64 {
    u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

impl Bus for ApicBus {
    fn mmio_read(&mut self, gpa: u64, data: &mut [u8]) -> Answer {
        if !self.is_mine(gpa) {
            return Answer::Pending;
        }
        let now = self.now(self.tsc);
        lock(&self.apic.apic).read_mmio(gpa & 0xfff, data, now);
        Answer::Done
    }

    fn mmio_write(&mut self, gpa: u64, data: &[u8]) -> Answer {
        if !self.is_mine(gpa) {
            return Answer::Pending;
        }
        let now = self.now(self.tsc);
        let outcome = lock(&self.apic.apic).write_mmio(gpa & 0xfff, data, now);
        self.fabric.act(&self.apic, outcome);
        Answer::Done
    }

    fn intercept(&mut self, what: Intercept) -> bool {
        // Relaxed: the answer orders nothing.
        if !self.msr_exits.load(Ordering::Relaxed) {
            return false;
        }
        match (what, *lock(&self.msr_turn)) {
            // Those of the local APIC are nobody else's, whether the guest is shown them or not.
            (Intercept::Msr { index: MSR_APIC_BASE | MSR_TSC_DEADLINE | 0x800..=0x8ff, .. }, _) => false,
            (Intercept::Msr { .. }, MsrTurn::Ask) => true,
            (Intercept::Exception(Exception::Gp(_)), MsrTurn::Try) => true,
            _ => false,
        }
    }

    fn msr_read(&mut self, index: u32, tsc: u64) -> MsrAnswer {
        if let MsrTurn::Answered(answer) = *lock(&self.msr_turn) {
            return answer;
        }
        if !self.owns_msr(index) {
            return MsrAnswer::NotMine;
        }
        let now = self.now(tsc);
        lock(&self.apic.apic).read_msr(index, now).map_or(MsrAnswer::Fault, MsrAnswer::Done)
    }

    fn msr_write(&mut self, index: u32, value: u64, tsc: u64) -> MsrAnswer {
        if let MsrTurn::Answered(answer) = *lock(&self.msr_turn) {
            return answer;
        }
        if !self.owns_msr(index) {
            return MsrAnswer::NotMine;
        }
        let now = self.now(tsc);
        let result = lock(&self.apic.apic).write_msr(index, value, now);
        match result {
            Ok(outcome) => {
                self.fabric.act(&self.apic, outcome);
                MsrAnswer::Done(0)
            }
            Err(_) => MsrAnswer::Fault,
        }
    }

    fn cr8(&mut self) -> u8 {
        lock(&self.apic.apic).cr8()
    }

    fn set_cr8(&mut self, class: u8) {
        lock(&self.apic.apic).set_cr8(class);
    }

    fn interrupt_pending(&mut self, tsc: u64) -> bool {
        self.tsc = tsc;
        let now = self.now(tsc);
        let mut apic = lock(&self.apic.apic);
        apic.advance(now);
        self.has_apic && apic.pending().is_some()
    }

    fn acknowledge(&mut self) -> Option<u8> {
        lock(&self.apic.apic).acknowledge()
    }
}
