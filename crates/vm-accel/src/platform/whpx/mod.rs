//! The Windows Hypervisor Platform.

#[cfg(whpx_aarch64)]
pub mod aarch64;
mod partition;
#[cfg(whpx_x86_64)]
pub mod x86_64;
