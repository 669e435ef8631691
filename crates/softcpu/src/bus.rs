//! What a CPU needs from the machine around it, apart from RAM: device memory, ports, interrupts, time.
//!
//! Every access may answer [`Answer::Pending`]: the CPU then leaves `run` with that access as its exit and repeats the
//! instruction when the answer is there. An implementation must not block.

use crate::intercept::Intercept;

/// How the machine answered an access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Served at once; for a read the buffer is filled.
    Done,
    /// Nobody here serves it: the access becomes an exit of the CPU.
    Pending,
}

/// How the machine answered an MSR access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MsrAnswer {
    /// Read or written; the value of a read.
    Done(u64),
    /// The register exists but the access is not allowed, or nobody knows the register: #GP(0).
    Fault,
    /// The register is not the machine's; the CPU serves it if it can.
    NotMine,
}

/// The machine around a CPU. Each CPU owns one.
pub trait Bus: Send {
    /// A read of device memory: 1 to 8 bytes that do not cross a page.
    fn mmio_read(&mut self, gpa: u64, data: &mut [u8]) -> Answer {
        let _ = (gpa, data);
        Answer::Pending
    }
    /// A write of device memory: 1 to 8 bytes that do not cross a page.
    fn mmio_write(&mut self, gpa: u64, data: &[u8]) -> Answer {
        let _ = (gpa, data);
        Answer::Pending
    }
    /// IN: 1, 2 or 4 bytes.
    fn port_read(&mut self, port: u16, data: &mut [u8]) -> Answer {
        let _ = (port, data);
        Answer::Pending
    }
    /// OUT: 1, 2 or 4 bytes.
    fn port_write(&mut self, port: u16, data: &[u8]) -> Answer {
        let _ = (port, data);
        Answer::Pending
    }
    /// RDMSR of a register that belongs to the machine (local APIC base, x2APIC, TSC deadline).
    fn msr_read(&mut self, index: u32, tsc: u64) -> MsrAnswer {
        let _ = (index, tsc);
        MsrAnswer::NotMine
    }
    /// WRMSR of a register that belongs to the machine.
    fn msr_write(&mut self, index: u32, value: u64, tsc: u64) -> MsrAnswer {
        let _ = (index, value, tsc);
        MsrAnswer::NotMine
    }
    /// Whether the CPU is to leave before this takes effect.
    fn intercept(&mut self, what: Intercept) -> bool {
        let _ = what;
        false
    }
    /// CR8: the task priority class, 0 to 15.
    fn cr8(&mut self) -> u8 {
        0
    }
    /// Sets CR8.
    fn set_cr8(&mut self, class: u8) {
        let _ = class;
    }
    /// Whether a maskable interrupt waits that the task priority lets through. Called often (each time slice, after each access
    /// that the bus answered, after a kick) with the current TSC, so timers can be advanced here.
    fn interrupt_pending(&mut self, tsc: u64) -> bool {
        let _ = tsc;
        false
    }
    /// Interrupt acknowledge: the vector to deliver, `None` if the request went away. Called once per delivery.
    fn acknowledge(&mut self) -> Option<u8> {
        None
    }
}

/// A bus on which nothing is served: every access is an exit.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoBus;

impl Bus for NoBus {}
