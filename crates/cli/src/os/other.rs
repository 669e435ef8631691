//! Hosts without Unix terminals and signals: input arrives line by line, and Ctrl-C ends the process.

use crate::console::Target;

/// There is no raw mode here.
#[derive(Debug)]
pub(crate) struct RawTerminal(());

impl RawTerminal {
    /// Always `None`: whatever stdin is, it is treated as a pipe.
    pub(crate) fn enter() -> anyhow::Result<Option<Self>> {
        Ok(None)
    }
}

/// No signal arrives here.
#[derive(Debug, Clone, Default)]
pub(crate) struct EndSignal(());

impl EndSignal {
    pub(crate) fn listen(_: &Target) -> anyhow::Result<Self> {
        Ok(Self(()))
    }

    pub(crate) fn number(&self) -> Option<u8> {
        None
    }
}
