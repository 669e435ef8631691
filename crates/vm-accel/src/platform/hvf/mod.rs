//! Apple's Hypervisor.framework. A virtual machine's architecture is the host's; the two backends share names only.

#[cfg(hvf_aarch64)]
pub mod aarch64;
#[cfg(hvf_x86_64)]
pub mod x86_64;
