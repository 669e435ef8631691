//! Every foreign declaration of the library, and nothing else: no policy, no state.

#[cfg(kvm)]
pub(crate) mod kvm;
