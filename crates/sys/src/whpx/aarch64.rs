//! The Windows Hypervisor Platform on arm64. `windows-sys` has the x64 structures under this name; these are ours.
