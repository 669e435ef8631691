//! Hypervisor.framework on Intel Macs.
