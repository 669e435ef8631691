//! The simulator of the Windows Hypervisor Platform as the library that Windows programs load.
//!
//! `cargo xtask wine` puts it where Windows has its own. It exports the simulator's functions, which have the platform's names;
//! `VM_ACCEL_SIM_SEED=n` in the environment makes it hostile. It must never be installed on a real machine.

#![allow(non_snake_case, reason = "the library's name is the platform's")]

pub use vm_accel_sim::whpx::*;
