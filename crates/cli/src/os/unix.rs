//! The terminal and signals on Unix.
//!
//! Raw mode is entered only on a terminal, and left on every way out: the guard's drop, a panic on any thread, and the
//! signals that end a process.

use crate::console::Target;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook::iterator::Signals;
use std::io::{IsTerminal as _, stdin};
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Mutex, Once, PoisonError};
use std::thread;

/// How the terminal was, while it is raw.
static SAVED: Mutex<Option<Termios>> = Mutex::new(None);

/// Restores the terminal if it is raw; again does nothing.
fn restore() {
    let saved = SAVED.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(saved) = saved {
        // There is nobody to tell if the terminal is gone.
        let _ = tcsetattr(stdin(), OptionalActions::Drain, &saved);
    }
}

/// A terminal in raw mode; dropping it restores the terminal.
#[derive(Debug)]
pub(crate) struct RawTerminal(());

impl RawTerminal {
    /// Puts stdin into raw mode; `None` if it is no terminal. Output keeps turning a newline into a carriage return and a
    /// newline, so that messages of this program stay legible.
    pub(crate) fn enter() -> anyhow::Result<Option<Self>> {
        if !stdin().is_terminal() {
            return Ok(None);
        }
        static PANIC_HOOK: Once = Once::new();
        PANIC_HOOK.call_once(|| {
            let before = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |panic| {
                restore();
                before(panic);
            }));
        });
        let saved = tcgetattr(stdin())?;
        let mut raw = saved.clone();
        raw.make_raw();
        raw.output_modes = saved.output_modes;
        *SAVED.lock().unwrap_or_else(PoisonError::into_inner) = Some(saved);
        let guard = Self(());
        tcsetattr(stdin(), OptionalActions::Now, &raw)?;
        Ok(Some(guard))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore();
    }
}

/// The signal that asked this process to end, once one did.
#[derive(Debug, Clone, Default)]
pub(crate) struct EndSignal(Arc<AtomicI32>);

impl EndSignal {
    /// Ends the machine at the first signal that asks for it; a second one ends the process at once, as if nobody listened.
    pub(crate) fn listen(target: &Target) -> anyhow::Result<Self> {
        let received = Self::default();
        let mut signals = Signals::new([SIGHUP, SIGINT, SIGQUIT, SIGTERM])?;
        let (store, target) = (Arc::clone(&received.0), target.clone());
        thread::Builder::new().name("signals".into()).spawn(move || {
            for signal in signals.forever() {
                if store.swap(signal, Ordering::SeqCst) != 0 {
                    restore();
                    // The default action of these signals is to end the process.
                    let _ = signal_hook::low_level::emulate_default_handler(signal);
                }
                target.stop();
            }
        })?;
        Ok(received)
    }

    /// Its number.
    pub(crate) fn number(&self) -> Option<u8> {
        match self.0.load(Ordering::SeqCst) {
            0 => None,
            signal => u8::try_from(signal).ok(),
        }
    }
}
