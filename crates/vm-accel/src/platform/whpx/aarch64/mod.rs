//! The Windows Hypervisor Platform on arm64.
