//! The user's end of the serial port: stdout, stdin, and the keys that are for us.
//!
//! On a terminal Ctrl-A begins a command (as in QEMU and screen): `x` leaves, `h` helps, Ctrl-A sends one Ctrl-A. A pipe's
//! bytes all go to the guest: whoever wants to end that machine has its process.

use crate::os;
use std::fmt;
use std::io::{self, Read as _, Write};
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use vm_accel_machine::{Control, Outcome, UartInput};

const ESCAPE: u8 = 0x01;
const BELL: u8 = 0x07;
/// Reads of a terminal that wait for a guest that does not read; what comes beyond is refused with a bell.
const WAITING_READS: usize = 4096;

const HELP: &str = "
Ctrl-A x       leave
Ctrl-A h       this help
Ctrl-A Ctrl-A  send Ctrl-A to the guest
";

/// What a user's bytes mean.
#[derive(Debug, PartialEq, Eq)]
enum Key {
    Guest(u8),
    Leave,
    Help,
}

/// Takes our commands out of what the user types.
#[derive(Debug, Default)]
struct Keys {
    escaped: bool,
}

impl Keys {
    fn press(&mut self, byte: u8) -> Option<Key> {
        match (std::mem::take(&mut self.escaped), byte) {
            (false, ESCAPE) => {
                self.escaped = true;
                None
            }
            (true, b'x' | b'X') => Some(Key::Leave),
            (true, b'h' | b'H' | b'?') => Some(Key::Help),
            // Ctrl-A twice is one for the guest; after it any other key is a typing error and goes nowhere.
            (true, ESCAPE) | (false, _) => Some(Key::Guest(byte)),
            (true, _) => None,
        }
    }
}

/// Says something to the user. A stderr that takes nothing must not end the machine, as `eprintln!` would.
pub(crate) fn tell(text: impl fmt::Display) {
    let _ = writeln!(io::stderr(), "vm-accel: {text}");
}

/// The machine that input goes to at the moment; it changes when the guest resets.
#[derive(Debug, Clone, Default)]
pub(crate) struct Target(Arc<Mutex<Current>>);

#[derive(Debug, Default)]
struct Current {
    machine: Option<(UartInput, Control)>,
    /// The user asked for the end, perhaps while one machine was gone and the next not there yet.
    stopped: bool,
}

impl Target {
    pub(crate) fn set(&self, input: UartInput, control: Control) {
        let mut current = self.lock();
        if current.stopped {
            control.finish(Outcome::Stopped);
        }
        current.machine = Some((input, control));
    }

    fn lock(&self) -> MutexGuard<'_, Current> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the machine, and each that would follow it.
    pub(crate) fn stop(&self) {
        let mut current = self.lock();
        current.stopped = true;
        if let Some((_, control)) = &current.machine {
            control.finish(Outcome::Stopped);
        }
    }

    /// Gives the guest these bytes, waiting as long as it does not take them.
    fn send(&self, bytes: &[u8]) {
        let input = self.lock().machine.as_ref().map(|(input, _)| input.clone());
        if let Some(input) = input {
            // A machine that has just ended takes nothing more; what is typed then belongs to nobody.
            let _ = input.send(bytes);
        }
    }
}

/// Puts the terminal, if stdin is one, into raw mode and starts the thread that reads stdin. The guard restores it.
pub(crate) fn start(target: &Target) -> anyhow::Result<Option<os::RawTerminal>> {
    let raw = os::RawTerminal::enter()?;
    let target = target.clone();
    let interactive = raw.is_some();
    if interactive {
        tell("Ctrl-A x leaves, Ctrl-A h helps");
    }
    // The threads end with the process: a read of stdin cannot be interrupted portably.
    thread::Builder::new()
        .name("stdin".into())
        .spawn(move || if interactive { read_terminal(&target) } else { read_pipe(&target) })?;
    Ok(raw)
}

/// Everything goes to the guest; the end of the input ends nothing.
fn read_pipe(target: &Target) {
    let mut buffer = [0; 4096];
    while let Ok(count @ 1..) = io::stdin().read(&mut buffer) {
        target.send(&buffer[..count]);
    }
}

/// Commands must work even if the guest reads nothing, so another thread waits for it.
fn read_terminal(target: &Target) {
    let (sender, receiver) = sync_channel::<Vec<u8>>(WAITING_READS);
    let guest = target.clone();
    let spawned = thread::Builder::new().name("input".into()).spawn(move || {
        for bytes in receiver {
            guest.send(&bytes);
        }
    });
    if spawned.is_err() {
        return;
    }
    let mut keys = Keys::default();
    let mut buffer = [0; 256];
    while let Ok(count @ 1..) = io::stdin().read(&mut buffer) {
        let mut bytes = Vec::with_capacity(count);
        for key in buffer[..count].iter().filter_map(|byte| keys.press(*byte)) {
            match key {
                Key::Guest(byte) => bytes.push(byte),
                Key::Help => {
                    let _ = io::stderr().write_all(HELP.as_bytes());
                }
                Key::Leave => return target.stop(),
            }
        }
        forward(&sender, bytes);
    }
}

fn forward(sender: &SyncSender<Vec<u8>>, bytes: Vec<u8>) {
    if bytes.is_empty() {
        return;
    }
    if let Err(TrySendError::Full(_)) = sender.try_send(bytes) {
        let _ = io::stderr().write_all(&[BELL]);
    }
}

/// stdout without a buffer: a prompt has no newline at its end.
#[derive(Debug)]
pub(crate) struct Stdout;

impl Write for Stdout {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut out = io::stdout().lock();
        out.write_all(bytes)?;
        out.flush()?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stdout().flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn press(bytes: &[u8]) -> Vec<Key> {
        let mut keys = Keys::default();
        bytes.iter().filter_map(|byte| keys.press(*byte)).collect()
    }

    #[test]
    fn ordinary_keys_go_to_the_guest() {
        assert_eq!(press(b"x\x03"), [Key::Guest(b'x'), Key::Guest(3)]);
    }

    #[test]
    fn ctrl_a_begins_a_command() {
        assert_eq!(press(b"\x01x"), [Key::Leave]);
        assert_eq!(press(b"\x01h"), [Key::Help]);
        assert_eq!(press(b"\x01\x01x"), [Key::Guest(1), Key::Guest(b'x')]);
        assert_eq!(press(b"\x01qx"), [Key::Guest(b'x')]);
    }
}
