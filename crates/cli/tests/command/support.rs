//! Runs the command and says what came of it.

use serde_json::Value;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

/// The command, with nothing on stdin.
pub(crate) fn command<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vm-accel"));
    command
        .args(args)
        .stdin(Stdio::null())
        // A backtrace is not part of any message.
        .env_remove("RUST_BACKTRACE");
    command
}

/// What a run left behind.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) status: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl From<Output> for Run {
    fn from(output: Output) -> Self {
        Self {
            status: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

impl Run {
    /// It ended with `status`.
    #[track_caller]
    pub(crate) fn ended_with(&self, status: i32) -> &Self {
        assert_eq!(self.status, Some(status), "{self:#?}");
        self
    }

    /// It failed as a command should: with `status`, nothing on stdout, and one sentence on stderr that has these words.
    #[track_caller]
    pub(crate) fn failed(&self, status: i32, words: &[&str]) {
        self.ended_with(status);
        assert_eq!(self.stdout, "", "{self:#?}");
        assert!(self.stderr.starts_with("vm-accel: "), "{self:#?}");
        assert_eq!(self.stderr.lines().count(), 1, "{self:#?}");
        for word in words {
            assert!(self.stderr.contains(word), "{word:?} missing: {self:#?}");
        }
    }

    /// It refused its arguments: status 2, nothing on stdout, an explanation with these words on stderr.
    #[track_caller]
    pub(crate) fn refused(&self, words: &[&str]) {
        self.ended_with(2);
        assert_eq!(self.stdout, "", "{self:#?}");
        for word in words {
            assert!(self.stderr.contains(word), "{word:?} missing: {self:#?}");
        }
    }

    /// Lines on stderr that are warnings.
    pub(crate) fn warnings(&self) -> usize {
        let lines = self.stderr.lines();
        lines.filter(|line| line.contains("warning:")).count()
    }
}

/// Runs the command to its end.
#[track_caller]
pub(crate) fn run<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Run {
    command(args).output().expect("the command runs").into()
}

/// Collects the rest of a running command.
#[track_caller]
pub(crate) fn finish(child: Child) -> Run {
    child.wait_with_output().expect("the command ends").into()
}

/// A backend that this host has for x86-64 guests.
#[derive(Debug, Clone)]
pub(crate) struct Backend {
    pub(crate) name: String,
    /// It has only plain instructions in ring 0.
    pub(crate) emulates_ring0: bool,
}

/// What `info --json` says.
#[track_caller]
pub(crate) fn info() -> Value {
    let info = run(["info", "--json"]);
    info.ended_with(0);
    serde_json::from_str(&info.stdout).expect("valid JSON")
}

/// Every backend that can be tested here; says which are skipped, and why.
#[track_caller]
pub(crate) fn backends() -> Vec<Backend> {
    let required = std::env::var("VM_ACCEL_REQUIRE").unwrap_or_default();
    let required: Vec<&str> = required.split(',').map(str::trim).collect();
    let mut there = Vec::new();
    for backend in info()["backends"].as_array().expect("a list") {
        let name = backend["kind"].as_str().expect("a name");
        let why = if backend["available"] == false {
            backend["reason"].as_str().expect("a reason")
        } else if backend["guest_arch"] != "x86_64" || backend["max_vcpus"] == 0 {
            "it has no vCPUs for x86-64"
        } else {
            there.push(Backend { name: name.to_owned(), emulates_ring0: backend["emulates_ring0"] == true });
            continue;
        };
        assert!(!required.contains(&name), "{name} is required: {why}");
        println!("skipped: {name}: {why}");
    }
    there
}

/// One backend that runs everything, if there is one: for tests of what is the same on all.
#[track_caller]
pub(crate) fn a_backend() -> Option<String> {
    let backend = backends().into_iter().rfind(|b| !b.emulates_ring0);
    if backend.is_none() {
        println!("skipped: no backend that runs every guest");
    }
    backend.map(|backend| backend.name)
}

/// The arguments to run a flat binary on a backend; every guest gets a time limit that no test means to reach.
pub(crate) fn flat(backend: &str, guest: &Path, more: &[&str]) -> Vec<String> {
    let guest = guest.to_str().expect("a temporary path is UTF-8");
    let mut args = vec!["run", guest, "--boot", "flat", "--accel", backend];
    args.extend_from_slice(more);
    if !more.contains(&"--timeout") {
        args.extend(["--timeout", "300"]);
    }
    args.into_iter().map(str::to_owned).collect()
}

/// A folder for one test's files; it goes when this does.
#[derive(Debug)]
pub(crate) struct Folder(PathBuf);

impl Folder {
    pub(crate) fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("vm-accel-command-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).expect("a temporary folder");
        Self(path)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Writes a file; answers its path.
    pub(crate) fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, bytes).expect("a temporary file");
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Guests in 16-bit code, entered at 0x7c00.
pub(crate) mod guests {
    /// `jmp $`
    pub(crate) const SPIN: &[u8] = &[0xeb, 0xfe];
    /// Prints `!`, then spins: for signals and terminals.
    #[cfg(unix)]
    pub(crate) const PRINT_AND_SPIN: &[u8] = &[0xba, 0xf8, 0x03, 0xb0, b'!', 0xee, 0xeb, 0xfe];
    /// Prints `!`, then resets through the keyboard controller.
    pub(crate) const PRINT_AND_RESET: &[u8] = &[
        0xba, 0xf8, 0x03, 0xb0, b'!', 0xee, // mov dx, 0x3f8; mov al, '!'; out dx, al
        0xb0, 0xfe, 0xe6, 0x64, 0xeb, 0xfe, // mov al, 0xfe; out 0x64, al; jmp $
    ];
    /// Prints `.` for ever.
    pub(crate) const FLOOD: &[u8] = &[0xba, 0xf8, 0x03, 0xb0, b'.', 0xee, 0xeb, 0xfd];
    /// Loads an empty interrupt table, then int3.
    pub(crate) const TRIPLE_FAULT: &[u8] = &[
        0x0f, 0x01, 0x1e, 0x09, 0x7c, 0xcd, 0x03, 0xeb, 0xfe, // lidt [0x7c09]; int 3; jmp $
        0, 0, 0, 0, 0, 0,
    ];
    /// Sends back what it receives, and ends with the status `q` after that letter.
    pub(crate) const ECHO: &[u8] = &[
        0xba, 0xfd, 0x03, // 0: mov dx, 0x3fd
        0xec, 0xa8, 0x01, 0x74, 0xfb, // 3: in al, dx; test al, 1; jz 3
        0xba, 0xf8, 0x03, 0xec, 0xee, // mov dx, 0x3f8; in al, dx; out dx, al
        0x3c, b'q', 0x75, 0xef, // cmp al, 'q'; jne 0
        0xe6, 0xf4, 0xeb, 0xfe, // out 0xf4, al; jmp $
    ];

    /// Writes a value to the exit port.
    pub(crate) fn exit(value: u8) -> Vec<u8> {
        vec![0xb0, value, 0xe6, 0xf4, 0xeb, 0xfe]
    }
}
