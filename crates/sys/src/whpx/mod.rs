//! The Windows Hypervisor Platform. Its structures differ between the architectures: each has a module of its own.

pub mod aarch64;
pub mod x86_64;
