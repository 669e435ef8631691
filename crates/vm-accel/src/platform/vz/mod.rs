//! Apple's Virtualization.framework: whole virtual machines, no vCPU access.
