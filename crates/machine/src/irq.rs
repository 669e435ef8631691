//! The wire from a device to whatever interrupt controller the machine has.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// One interrupt line, driven by one device.
///
/// A device calls this with its own mutex held; an implementation must not call back into the device.
pub trait IrqLine: Send + Sync {
    /// Drives the line: `true` asserts it, `false` takes it back. Driving it to the level it has is harmless.
    fn set_level(&self, asserted: bool);
}

/// A device's end of an interrupt line; remembers the level and passes on changes only.
///
/// Passing on changes only matters: a level that did not change costs no system call.
#[derive(Clone)]
pub struct IrqPin {
    line: Option<Arc<dyn IrqLine>>,
    asserted: bool,
}

impl IrqPin {
    /// A pin on `line`, not asserted.
    #[must_use]
    pub fn new(line: Arc<dyn IrqLine>) -> Self {
        Self { line: Some(line), asserted: false }
    }

    /// A pin that leads nowhere, for a device that the guest polls.
    #[must_use]
    pub fn unconnected() -> Self {
        Self { line: None, asserted: false }
    }

    /// Drives the pin.
    pub fn set(&mut self, asserted: bool) {
        if self.asserted != asserted {
            self.asserted = asserted;
            if let Some(line) = &self.line {
                line.set_level(asserted);
            }
        }
    }

    /// Whether the pin is asserted.
    #[must_use]
    pub fn is_asserted(&self) -> bool {
        self.asserted
    }
}

impl fmt::Debug for IrqPin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IrqPin").field("connected", &self.line.is_some()).field("asserted", &self.asserted).finish()
    }
}

/// A line that only counts: for tests of devices, and for boards that have nothing to connect.
#[derive(Debug, Default)]
pub struct CountingLine {
    asserted: AtomicBool,
    edges: AtomicU64,
}

impl CountingLine {
    /// Whether the line is asserted now.
    #[must_use]
    pub fn is_asserted(&self) -> bool {
        self.asserted.load(Ordering::SeqCst)
    }

    /// How often it went from not asserted to asserted.
    #[must_use]
    pub fn edges(&self) -> u64 {
        self.edges.load(Ordering::SeqCst)
    }
}

impl IrqLine for CountingLine {
    fn set_level(&self, asserted: bool) {
        if !self.asserted.swap(asserted, Ordering::SeqCst) && asserted {
            self.edges.fetch_add(1, Ordering::SeqCst);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_changes_are_passed_on() {
        let line = Arc::new(CountingLine::default());
        let mut pin = IrqPin::new(line.clone());
        for level in [true, true, false, false, true] {
            pin.set(level);
        }
        assert_eq!(line.edges(), 2);
        assert!(line.is_asserted() && pin.is_asserted());
        IrqPin::unconnected().set(true);
    }
}
