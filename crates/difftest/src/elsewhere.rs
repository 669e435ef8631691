//! In place of the comparison on hosts whose processor or system cannot be the judge.

use crate::{Class, Count};

/// See the module of the same name for x86-64 Linux: here it cannot be had.
#[derive(Debug)]
pub struct Differential(std::convert::Infallible);

impl Differential {
    /// Always an error: this host is no judge.
    ///
    /// # Errors
    /// On every call.
    pub fn new(_seed: u64) -> Result<Self, String> {
        Err("the host is not Linux on x86-64: its processor cannot run the instructions".to_owned())
    }

    /// See the other implementation.
    pub fn run(&mut self, _class: Class, _index: u64) -> Option<String> {
        match self.0 {}
    }

    /// See the other implementation.
    #[must_use]
    pub fn count(&self, _class: Class) -> Count {
        match self.0 {}
    }

    /// See the other implementation.
    #[must_use]
    pub fn forms(&self) -> usize {
        match self.0 {}
    }
}
