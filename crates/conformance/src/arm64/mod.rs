//! The aarch64 cases. A program begins in EL1 with the MMU off, so that every access outside RAM exits.

pub(crate) mod arm64_access;
pub(crate) mod arm64_cpu;
pub(crate) mod arm64_debug;
pub(crate) mod arm64_interrupts;
pub(crate) mod arm64_memory;
mod machine;

pub(crate) use machine::{Arm, poll};
