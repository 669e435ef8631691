//! Why `run` returns, and what the owner may ask of the guest's debugging.

use crate::intercept::Intercept;

/// Why a CPU stopped running.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Exit {
    /// A port access that the bus did not serve. A write: its bytes are in `Cpu::io_data`. A read: answer with `Cpu::complete_read`.
    Io {
        /// Port number.
        port: u16,
        /// 1, 2 or 4 bytes.
        size: u8,
        /// OUT or OUTS.
        write: bool,
    },
    /// An access to memory that is not RAM, or a write to read-only RAM.
    Mmio {
        /// Guest-physical address.
        gpa: u64,
        /// 1 to 8 bytes.
        size: u8,
        /// A write: its bytes are in `Cpu::io_data`.
        write: bool,
    },
    /// HLT with nothing to wake the CPU. RIP is behind it; the next `run` answers the same until an event wakes the CPU.
    Halted,
    /// VMCALL or VMMCALL; RIP is behind it, the arguments are in registers.
    Hypercall,
    /// A debug event that the owner asked for with [`GuestDebug`]; RIP is at the instruction (breakpoints) or behind it.
    Debug {
        /// Vector: 1 for hardware breakpoints and steps, 3 for INT3.
        vector: u8,
        /// What DR6 would show.
        dr6: u64,
    },
    /// Triple fault.
    Shutdown,
    /// Somebody kicked the CPU.
    Kicked,
    /// The budget is used up.
    Budget,
    /// The bus intercepts what comes next; it has not taken effect.
    Intercept(Intercept),
    /// The owner asked for it and the CPU could now take an external interrupt.
    InterruptWindow,
}

/// What the owner wants to see of the guest's debugging. While hardware breakpoints are set here, those of the guest do not work.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuestDebug {
    /// Exit after each instruction.
    pub single_step: bool,
    /// INT3 exits instead of raising #BP.
    pub software_breakpoints: bool,
    /// Use `dr` and `dr7` instead of the guest's, and exit instead of raising #DB.
    pub hardware_breakpoints: bool,
    /// Breakpoint addresses, as DR0 to DR3.
    pub dr: [u64; 4],
    /// Control, as DR7.
    pub dr7: u64,
}

impl GuestDebug {
    /// DR7 in force, if the owner's.
    pub(crate) fn dr7(&self) -> u64 {
        if self.hardware_breakpoints { self.dr7 } else { 0 }
    }
}
