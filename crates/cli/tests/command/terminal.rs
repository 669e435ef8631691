//! The command on a terminal: keys that are for it, and the terminal afterwards as it was before.

use crate::support::{Folder, a_backend, command, flat, guests};
use rustix::fs::{Mode, OFlags, open};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Termios, tcgetattr};
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::path::Path;
use std::process::{Child, Stdio};
use std::thread::{self, JoinHandle};

/// A terminal with a command on it.
struct Session {
    keyboard: File,
    /// The command's side; kept open, so that its settings can be read after the command has ended.
    terminal: File,
    before: Termios,
    child: Child,
    screen: Screen,
}

/// What appears on the terminal, read in a thread so that nothing ever waits for a reader.
struct Screen {
    bytes: std::sync::mpsc::Receiver<Vec<u8>>,
    text: String,
    _reader: JoinHandle<()>,
}

impl Screen {
    fn of(mut master: File) -> Self {
        let (sender, bytes) = std::sync::mpsc::channel();
        let reader = thread::spawn(move || {
            let mut buffer = [0; 1024];
            while let Ok(count @ 1..) = master.read(&mut buffer) {
                if sender.send(buffer[..count].to_vec()).is_err() {
                    return;
                }
            }
        });
        Self { bytes, text: String::new(), _reader: reader }
    }

    /// Waits until these words have appeared.
    #[track_caller]
    fn shows(&mut self, words: &str) {
        while !self.text.contains(words) {
            let bytes = self.bytes.recv().expect("the terminal is still there");
            self.text += &String::from_utf8_lossy(&bytes);
        }
    }
}

impl Session {
    /// Runs a guest with everything on a new terminal, and waits until the command has taken it over.
    fn new(backend: &str, guest: &Path, more: &[&str]) -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let name = ptsname(&master, Vec::new()).unwrap();
        let terminal = open(name.as_c_str(), OFlags::RDWR | OFlags::NOCTTY, Mode::empty()).unwrap();
        let terminal = File::from(terminal);
        let before = tcgetattr(&terminal).unwrap();
        let end = || Stdio::from(terminal.try_clone().unwrap());
        let mut command = command(flat(backend, guest, more));
        command.stdin(end()).stdout(end()).stderr(end());
        let keyboard = File::from(master);
        let mut session = Self {
            screen: Screen::of(keyboard.try_clone().unwrap()),
            child: command.spawn().unwrap(),
            keyboard,
            terminal,
            before,
        };
        session.screen.shows("Ctrl-A x leaves");
        session
    }

    /// The terminal is raw now; to be asked only while the guest cannot end.
    #[track_caller]
    fn is_raw(&self) {
        let raw = LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG;
        assert!(!self.modes().local_modes.intersects(raw));
    }

    fn modes(&self) -> Termios {
        tcgetattr(&self.terminal).unwrap()
    }

    fn press(&mut self, keys: &[u8]) {
        self.keyboard.write_all(keys).unwrap();
    }

    /// The command ends with `status`, and the terminal is as it was.
    #[track_caller]
    fn ends_with(mut self, status: i32) {
        let ended = self.child.wait().unwrap();
        assert_eq!(ended.code(), Some(status), "{}", self.screen.text);
        let (before, after) = (&self.before, self.modes());
        assert_eq!(before.local_modes, after.local_modes);
        assert_eq!(before.input_modes, after.input_modes);
        assert_eq!(before.output_modes, after.output_modes);
        assert_eq!(before.control_modes, after.control_modes);
    }
}

/// A session with a guest, where some backend can run one.
fn session(folder: &Folder, guest: &[u8], more: &[&str]) -> Option<Session> {
    let guest = folder.file("guest", guest);
    Some(Session::new(&a_backend()?, &guest, more))
}

#[test]
fn ctrl_a_x_leaves() {
    let folder = Folder::new();
    let Some(mut session) = session(&folder, guests::PRINT_AND_SPIN, &[]) else {
        return;
    };
    session.screen.shows("!");
    session.is_raw();
    session.press(b"\x01x");
    session.ends_with(0);
}

#[test]
fn ctrl_a_x_leaves_a_guest_that_resets_for_ever() {
    let folder = Folder::new();
    let Some(mut session) = session(&folder, guests::PRINT_AND_RESET, &[]) else {
        return;
    };
    session.screen.shows("!!");
    session.press(b"\x01x");
    session.ends_with(0);
}

#[test]
fn ctrl_a_h_helps_and_other_keys_reach_the_guest() {
    let folder = Folder::new();
    let Some(mut session) = session(&folder, guests::ECHO, &[]) else {
        return;
    };
    session.press(b"\x01h");
    session.screen.shows("send Ctrl-A to the guest");
    session.press(b"hello \x01\x01 \x03 there");
    session.screen.shows("hello \u{1} \u{3} there");
    // The guest ends by itself, with this key as its status.
    session.press(b"q");
    session.ends_with(i32::from(b'q'));
}

#[test]
fn a_signal_leaves_the_terminal_as_it_was() {
    let folder = Folder::new();
    for (signal, number) in [(Signal::TERM, 15), (Signal::INT, 2), (Signal::HUP, 1)] {
        let Some(mut session) = session(&folder, guests::PRINT_AND_SPIN, &[]) else {
            return;
        };
        session.screen.shows("!");
        session.is_raw();
        kill_process(Pid::from_child(&session.child), signal).unwrap();
        session.ends_with(128 + number);
    }
}

#[test]
fn a_guest_that_fails_leaves_the_terminal_as_it_was() {
    let folder = Folder::new();
    for (guest, more, status) in [
        (guests::TRIPLE_FAULT, &[][..], 33),
        (guests::SPIN, &["--timeout", "0.5"], 124),
        (guests::PRINT_AND_RESET, &["--no-reboot"], 32),
    ] {
        let Some(session) = session(&folder, guest, more) else {
            return;
        };
        session.ends_with(status);
    }
}
