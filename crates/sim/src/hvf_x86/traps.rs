//! What makes the processor leave: the execution controls as the CPU asks for them.

use super::lock;
use super::memory::Memory;
use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use vm_accel_softcpu::{Answer, Bus, Intercept};
use vm_accel_sys::hvf::x86_64::cpu_based;

/// The controls of one vCPU.
#[derive(Debug, Default)]
pub(super) struct Controls {
    pub(super) cpu_based: u32,
    pub(super) rdtscp: bool,
    pub(super) exceptions: u32,
    /// Guest/host mask and read shadow of CR0 and CR4.
    pub(super) cr0: (u64, u64),
    pub(super) cr4: (u64, u64),
    /// MSRs that the guest reaches without an exit.
    pub(super) msrs: BTreeSet<u32>,
    /// The task priority that the TPR shadow holds.
    pub(super) tpr: u8,
}

impl Controls {
    fn has(&self, bit: u32) -> bool {
        self.cpu_based & bit != 0
    }

    fn traps(&self, what: Intercept) -> bool {
        let changes = |(mask, shadow): (u64, u64), value: u64| (value ^ shadow) & mask != 0;
        match what {
            Intercept::Msr { index, .. } => !self.msrs.contains(&index),
            Intercept::Cr { number: 0, value: Some(value) } => changes(self.cr0, value),
            Intercept::Cr { number: 3, value: Some(_) } => self.has(cpu_based::CR3_LOAD),
            Intercept::Cr { number: 4, value: Some(value) } => changes(self.cr4, value),
            Intercept::Cr { number: 8, value: Some(_) } => self.has(cpu_based::CR8_LOAD),
            Intercept::Cr { number: 8, value: None } => self.has(cpu_based::CR8_STORE),
            Intercept::Cr { .. } => false,
            // Without RDTSCP it is an invalid opcode, which the processor raises itself.
            Intercept::Rdtsc { p } => self.has(cpu_based::RDTSC) || p && !self.rdtscp,
            // Always looked at: is it because nothing is mapped where the instruction should be?
            Intercept::Exception(vm_accel_softcpu::Exception::Ud) => true,
            Intercept::Exception(exception) => self.exceptions >> exception.vector() & 1 != 0,
            // Unconditional (Intel SDM vol. 3, 26.1.2), and HLT, without whose exit nobody runs a guest here.
            _ => true,
        }
    }
}

/// The bus of a vCPU: no device, no APIC.
pub(super) struct TrapBus {
    pub(super) controls: Arc<Mutex<Controls>>,
    pub(super) memory: Arc<Memory>,
}

impl Bus for TrapBus {
    fn mmio_write(&mut self, gpa: u64, data: &[u8]) -> Answer {
        if self.memory.write(gpa, data) { Answer::Done } else { Answer::Pending }
    }

    fn intercept(&mut self, what: Intercept) -> bool {
        lock(&self.controls).traps(what)
    }

    fn cr8(&mut self) -> u8 {
        lock(&self.controls).tpr >> 4
    }

    fn set_cr8(&mut self, class: u8) {
        lock(&self.controls).tpr = class << 4;
    }
}
