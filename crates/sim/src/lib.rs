//! Hypervisor.framework and the Windows Hypervisor Platform in software: what stands behind `vm-accel-sys`'s tables where
//! there is neither a Mac nor a Windows machine.
//!
//! x86-64 guests run on `vm-accel-softcpu`, arm64 guests on the small interpreter in here. A facade owns exactly what its
//! platform documents: who advances the program counter, what is sticky, which fields are undefined (they hold garbage
//! here), which code a mistake is answered with. It also judges its caller: alignment, order of calls, threads, double
//! frees. The hostile mode adds what a platform may do and rarely does; see [`hostile`].

mod a64;
mod host;
pub mod hostile;
pub mod hvf_arm64;
pub mod hvf_x86;
pub mod whpx;
pub mod whpx_arm64;
