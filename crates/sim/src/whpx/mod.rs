//! The Windows Hypervisor Platform for x64 guests, simulated.
