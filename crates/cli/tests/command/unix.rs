//! Signals.

use crate::support::{Backend, Folder, Run, backends, command, finish, flat, guests};
use rustix::process::{Pid, Signal, kill_process};
use std::io::Read as _;
use std::path::Path;
use std::process::Stdio;

/// Starts a guest, waits until it runs, and sends the command a signal.
fn interrupted(backend: &Backend, guest: &Path, signal: Signal) -> Run {
    let mut child =
        command(flat(&backend.name, guest, &[])).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut first = [0];
    child.stdout.as_mut().unwrap().read_exact(&mut first).unwrap();
    kill_process(Pid::from_child(&child), signal).unwrap();
    // A guest that prints for ever needs a reader to the end.
    finish(child)
}

#[test]
fn a_signal_ends_the_machine_with_128_and_its_number() {
    let folder = Folder::new();
    let spin = folder.file("spin", guests::PRINT_AND_SPIN);
    for backend in backends() {
        for (signal, number) in [(Signal::INT, 2), (Signal::TERM, 15), (Signal::HUP, 1), (Signal::QUIT, 3)] {
            interrupted(&backend, &spin, signal).ended_with(128 + number);
        }
    }
}

#[test]
fn a_signal_is_kept_while_the_guest_resets() {
    let folder = Folder::new();
    let reset = folder.file("reset", guests::PRINT_AND_RESET);
    for backend in backends() {
        interrupted(&backend, &reset, Signal::TERM).ended_with(128 + 15);
    }
}

#[test]
fn a_signal_ends_a_machine_whose_output_is_read() {
    let folder = Folder::new();
    let flood = folder.file("flood", guests::FLOOD);
    for backend in backends() {
        interrupted(&backend, &flood, Signal::INT).ended_with(128 + 2);
    }
}
