//! Hypervisor.framework on Apple silicon.
