//! Every foreign declaration of the library, and nothing else: no policy, no state.

#[cfg(kvm)]
#[allow(dead_code)] // Each architecture has its own ioctls.
pub(crate) mod kvm;
