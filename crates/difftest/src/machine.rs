//! What both sides run: the state before and after, and the addresses, which are the same in the host process and in the guest.

use vm_accel_softcpu::state::rflags;

/// Where a sequence is; one page.
pub(crate) const CODE: u64 = 0x2a10_2000;
/// Longest sequence in bytes, with what follows it.
pub(crate) const CODE_LEN: usize = 0x1000;
/// Memory that can be read and written; nothing is mapped before it.
pub(crate) const DATA: u64 = 0x3a10_1000;
/// Bytes there.
pub(crate) const DATA_LEN: usize = 0x2000;
/// Memory that can only be read, and nothing behind it.
pub(crate) const READ_ONLY: u64 = DATA + DATA_LEN as u64;
/// Bytes there.
pub(crate) const READ_ONLY_LEN: usize = 0x1000;
/// Selectors of Linux' user segments, which instructions can read.
pub(crate) const CS: u16 = 0x33;
pub(crate) const SS: u16 = 0x2b;

/// What is in the read-only page.
pub(crate) fn read_only() -> Vec<u8> {
    (0..READ_ONLY_LEN as u64 / 8)
        .flat_map(|i| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ i << 60).to_le_bytes())
        .collect()
}

/// Registers. The floating-point state is an FXSAVE64 image.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct State {
    pub(crate) gpr: [u64; 16],
    pub(crate) rip: u64,
    pub(crate) rflags: u64,
    pub(crate) fx: [u8; 512],
}

impl State {
    /// Flags that user-mode code sees and can set without consequences for the comparison.
    pub(crate) const FLAGS: u64 = rflags::ARITH | rflags::DF | rflags::ID;

    pub(crate) fn mxcsr(&self) -> u32 {
        u32::from_le_bytes([self.fx[24], self.fx[25], self.fx[26], self.fx[27]])
    }
}

/// The exception that ended a sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Fault {
    pub(crate) vector: u8,
    /// Error code, or 0 for vectors without one.
    pub(crate) error: u64,
    /// CR2, of page faults.
    pub(crate) address: u64,
}

/// What a sequence left behind.
#[derive(Clone)]
pub(crate) struct Outcome {
    pub(crate) state: State,
    /// `None`: it ran to its end.
    pub(crate) fault: Option<Fault>,
    pub(crate) memory: Vec<u8>,
}

/// What is run: code from `CODE` on, from a state.
#[derive(Clone)]
pub(crate) struct Sequence {
    pub(crate) start: State,
    pub(crate) memory: Vec<u8>,
    pub(crate) code: Vec<u8>,
    /// Offset and length of each instruction that was executed, in that order.
    pub(crate) executed: Vec<(usize, usize)>,
    /// Flags that are undefined at its end.
    pub(crate) undefined: u64,
    /// How exactly the last instruction computes.
    pub(crate) exactness: Exactness,
}

/// How exactly results can be compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Exactness {
    /// To the bit.
    Exact,
    /// x87 registers to one unit in the last place.
    LastBit,
    /// XMM registers not at all: processors approximate differently.
    Approximate,
}
