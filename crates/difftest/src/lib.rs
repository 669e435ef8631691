//! The host processor as the judge of the software CPU: random sequences of user-mode instructions, executed by both from the same
//! state. Registers, flags, memory, x87, MXCSR and XMM registers must come out equal, and so must the exception that ended a sequence: vector,
//! error code, address, and the state it found.
//!
//! This is the one place where code is run natively for comparison (`native`). The tests of the software CPU run a fixed number of
//! sequences, `cargo xtask diff` as many as time allows.
//!
//! # What is not compared
//!
//! * Flags that the manual leaves undefined. They are followed through a sequence: an instruction that reads one is not generated
//!   until another has defined it.
//! * The approximations of RCP and RSQRT and the last bit of the x87's transcendental functions: both end a sequence.
//! * What depends on the host's own state: time stamps, random numbers, CPUID, segment bases, XSAVE areas.
//! * On processors that are not AMD's, unmasked x87 exceptions, transcendental functions and FSTPNCE: what they leave behind differs
//!   between makers, and the software CPU was compared with AMD's.

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod compare;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod generate;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod guest;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod machine;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod native;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod policy;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod random;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod runner;
#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
#[path = "elsewhere.rs"]
mod runner;

pub use runner::Differential;

/// What the instructions of a sequence are taken from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// Integer arithmetic, logic, shifts, bits, moves.
    Integer,
    /// Pushes, pops, jumps, calls, with integer instructions between them.
    Stack,
    /// String instructions with and without prefixes.
    String,
    /// MMX and integer SSE.
    Simd,
    /// SSE floating point.
    SseFloat,
    /// x87.
    X87,
    /// Instructions that fault or trap more often than not.
    Fault,
    /// All of these.
    Mixed,
}

impl Class {
    /// Every class, in the order in which [`Differential`] takes turns.
    pub const ALL: [Class; 8] = [
        Class::Integer,
        Class::Stack,
        Class::String,
        Class::Simd,
        Class::SseFloat,
        Class::X87,
        Class::Fault,
        Class::Mixed,
    ];

    /// A name for reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Class::Integer => "integer",
            Class::Stack => "stack",
            Class::String => "string",
            Class::Simd => "simd",
            Class::SseFloat => "sse-float",
            Class::X87 => "x87",
            Class::Fault => "fault",
            Class::Mixed => "mixed",
        }
    }
}

/// What was compared of one class.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Count {
    /// Sequences.
    pub sequences: u64,
    /// Instructions in them.
    pub instructions: u64,
    /// Sequences that an exception ended.
    pub faults: u64,
    /// Sequences that came out differently.
    pub mismatches: u64,
}
