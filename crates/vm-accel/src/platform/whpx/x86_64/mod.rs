//! The Windows Hypervisor Platform on x64.
