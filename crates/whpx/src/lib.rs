//! The Windows Hypervisor Platform as a backend of [`vm-accel`](https://docs.rs/vm-accel), which re-exports it as `platform::whpx`.
//! A virtual machine's architecture is the host's; the two backends share partitions and codes. Empty on other systems.

#![cfg(any(windows, feature = "sim"))]

#[cfg(any(all(windows, target_arch = "aarch64"), feature = "sim"))]
pub mod aarch64;
mod partition;
#[cfg(any(all(windows, target_arch = "x86_64"), feature = "sim"))]
pub mod x86_64;

#[cfg(all(windows, target_arch = "aarch64"))]
pub use aarch64::AccelWhpx;
#[cfg(all(windows, target_arch = "x86_64"))]
pub use x86_64::AccelWhpx;
