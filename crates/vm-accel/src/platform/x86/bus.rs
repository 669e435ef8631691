//! The machine as an emulator's CPU sees it: its local APIC. Everything else is an exit.

use crate::platform::soft_apic::{Fabric, LocalApic, lock};
use std::sync::Arc;
use std::time::Instant;
use vm_accel_softcpu::apic::Now;
use vm_accel_softcpu::{Answer, Bus, MsrAnswer};

/// The bus of a CPU with a local APIC.
pub(super) struct ApicBus {
    pub(super) fabric: Arc<Fabric>,
    pub(super) apic: Arc<LocalApic>,
    pub(super) start: Instant,
    /// The time stamp counter when the CPU last told it; the APIC's MMIO interface does not carry it.
    pub(super) tsc: u64,
}

impl ApicBus {
    fn now(&self, tsc: u64) -> Now {
        Now { ns: nanoseconds(self.start), tsc }
    }

    /// Whether a page is that of the APIC's registers.
    fn is_mine(&self, gpa: u64) -> bool {
        lock(&self.apic.apic).mmio_base() == Some(gpa & !0xfff)
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

    fn msr_read(&mut self, index: u32, tsc: u64) -> MsrAnswer {
        let now = self.now(tsc);
        let mut apic = lock(&self.apic.apic);
        if !apic.owns_msr(index) {
            return MsrAnswer::NotMine;
        }
        apic.read_msr(index, now).map_or(MsrAnswer::Fault, MsrAnswer::Done)
    }

    fn msr_write(&mut self, index: u32, value: u64, tsc: u64) -> MsrAnswer {
        let now = self.now(tsc);
        let result = {
            let mut apic = lock(&self.apic.apic);
            if !apic.owns_msr(index) {
                return MsrAnswer::NotMine;
            }
            apic.write_msr(index, value, now)
        };
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
        apic.pending().is_some()
    }

    fn acknowledge(&mut self) -> Option<u8> {
        lock(&self.apic.apic).acknowledge()
    }
}

/// The bus of a CPU without a local APIC: only the task priority is kept, because CR8 exists all the same.
#[derive(Default)]
pub(super) struct BareBus {
    cr8: u8,
}

impl Bus for BareBus {
    fn cr8(&mut self) -> u8 {
        self.cr8
    }

    fn set_cr8(&mut self, class: u8) {
        self.cr8 = class & 15;
    }
}
