//! Foreign declarations of the hypervisors that `vm-accel` does not reach through a crate: Apple's Hypervisor.framework and
//! the Windows Hypervisor Platform.
//!
//! Nothing here is linked. Each platform is a [`ffi_table!`]: a `Copy` struct of function pointers, filled at run time from
//! the system's library, or by a simulator. A process never dies at load because a hypervisor is absent, and what is
//! absent has a name ([`LoadError`]).
//!
//! No policy, no safe wrapper, no state: those are `vm-accel`'s.

mod load;
mod table;

pub mod hvf;
#[cfg(whpx)]
pub mod whpx;

pub use load::LoadError;
