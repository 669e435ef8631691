//! Hypervisor.framework for x86-64 guests, simulated.
