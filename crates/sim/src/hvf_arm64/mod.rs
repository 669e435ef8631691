//! Hypervisor.framework for arm64 guests, simulated.
