//! The Windows Hypervisor Platform. A virtual machine's architecture is the host's; the two backends share partitions and codes.

#[cfg(whpx_aarch64)]
pub mod aarch64;
mod partition;
#[cfg(whpx_x86_64)]
pub mod x86_64;

#[cfg(all(windows, target_arch = "aarch64"))]
pub use aarch64::AccelWhpx;
#[cfg(all(windows, target_arch = "x86_64"))]
pub use x86_64::AccelWhpx;
