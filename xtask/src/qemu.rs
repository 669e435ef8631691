//! One program in one emulated machine with upstream KVM inside, or in one on the software CPU.
//!
//! QEMU interprets everything (TCG), so this works on any host and KVM runs on hardware virtualization as QEMU models it.
//! The machine has a kernel, an initrd that holds all, and a serial line; nothing it does reaches the host. Whether
//! the program succeeded is what the init inside says in a marked line, never QEMU's own exit status.

use crate::arch::Arch;
use crate::cpio::Archive;
use crate::{initrd, process, workspace};
use anyhow::{Context, Result, bail};
use std::fs;
use std::io::{BufRead as _, BufReader, Read, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// The status of what did not end in time, as of timeout(1).
pub(crate) const TIMED_OUT: u8 = 124;

/// What the machine may take beyond the program's own limit, to start and to stop. It takes 2 to 5 seconds.
const GRACE: Duration = Duration::from_secs(60);

/// More output than this is shown but not kept: a runaway program must not eat the host's memory.
const TRANSCRIPT_LIMIT: usize = 16 << 20;

/// What to run and with what.
#[derive(Debug)]
pub(crate) struct Job {
    /// A static executable.
    pub(crate) program: PathBuf,
    pub(crate) args: Vec<String>,
    pub(crate) env: Vec<(String, String)>,
    /// Files the program finds inside: the path there, without the first `/`, and the path here.
    pub(crate) files: Vec<(String, PathBuf)>,
    /// After this time the program is killed.
    pub(crate) limit: Duration,
    pub(crate) memory_mib: u32,
}

/// What the machine runs on.
#[derive(Debug)]
pub(crate) enum Host {
    /// QEMU, with KVM inside.
    Qemu,
    /// This `vm-accel`, on its software CPU; no KVM inside, and only the transcript is to be had.
    Soft(PathBuf),
}

/// How a job went.
#[derive(Debug)]
pub(crate) struct Outcome {
    /// The program's exit status, or [`TIMED_OUT`].
    pub(crate) status: u8,
    /// What came over the serial line.
    pub(crate) transcript: String,
}

/// Runs `job`, showing its output as it comes.
///
/// An error means that the machine did not do its part; a program that fails is an [`Outcome`].
pub(crate) fn run(arch: &Arch, job: &Job) -> Result<Outcome> {
    run_on(arch, job, &Host::Qemu)
}

/// As [`run`], on either host. Only QEMU's output is shown.
pub(crate) fn run_on(arch: &Arch, job: &Job, host: &Host) -> Result<Outcome> {
    let token = token();
    let dir = workspace::cache().join("tmp");
    fs::create_dir_all(&dir)?;
    let initrd = dir.join(format!("{token}.cpio"));
    fs::write(&initrd, archive(arch, job, host, &token)?)
        .with_context(|| format!("cannot write {}", initrd.display()))?;
    let result = emulate(arch, host, &initrd, job, &token);
    // Left behind it would only take space.
    let _ = fs::remove_file(&initrd);
    result
}

/// The initrd: init, KVM's modules, and the job.
fn archive(arch: &Arch, job: &Job, host: &Host, token: &str) -> Result<Vec<u8>> {
    let mut archive = Archive::with_base()?;
    archive.file("init", 0o755, &initrd::init_program(arch, "nestinit")?)?;
    let name = job.program.file_name().and_then(|n| n.to_str()).context("the program's file name is not UTF-8")?;
    let program = format!("nest/bin/{name}");
    let mut lines =
        vec![format!("token {token}"), format!("limit {}", job.limit.as_secs()), format!("program /{program}")];
    let modules = if matches!(host, Host::Qemu) { arch.modules } else { &[] };
    for module in modules {
        let path = format!("nest/modules/{module}");
        archive.file(&path, 0o644, &read(&arch.dir().join("modules").join(module))?)?;
        lines.push(format!("module /{path}"));
    }
    lines.extend(job.args.iter().map(|arg| format!("arg {arg}")));
    lines.extend(job.env.iter().map(|(key, value)| format!("env {key}={value}")));
    if lines.iter().any(|line| line.contains('\n')) {
        bail!("arguments and variables of a nested program cannot contain line breaks");
    }
    archive.file("nest/job", 0o644, (lines.join("\n") + "\n").as_bytes())?;
    archive.file(&program, 0o755, &read(&job.program)?)?;
    for (inside, here) in &job.files {
        archive.file(inside, 0o644, &read(here)?)?;
    }
    archive.finish()
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

/// What starts the machine. Its serial line is the command's standard output.
fn machine(arch: &Arch, host: &Host, initrd: &Path, job: &Job) -> Result<Command> {
    // panic=-1 resets at once, and both leave instead of resetting.
    let command_line = format!("console={} quiet loglevel=3 panic=-1 mitigations=off", arch.console);
    let mut command;
    match host {
        Host::Qemu => {
            let [qemu, package] = arch.qemu;
            command = Command::new(process::require(qemu, package)?);
            command
                // No default devices and no user configuration: no network, no boot ROMs, no surprises.
                .args(["-accel", "tcg", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
                .args(arch.machine)
                .args(["-m", &job.memory_mib.to_string(), "-serial", "stdio"])
                .arg("-kernel")
                .arg(arch.kernel())
                .arg("-initrd")
                .arg(initrd)
                .args(["-append", &command_line]);
        }
        Host::Soft(program) => {
            command = Command::new(program);
            command
                .arg("run")
                .arg(arch.kernel())
                .args(["--accel", "soft", "--no-reboot", "--memory", &format!("{}M", job.memory_mib)])
                .arg("--initrd")
                .arg(initrd)
                .args(["--cmdline", &command_line])
                .stderr(Stdio::null());
        }
    }
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    Ok(command)
}

fn emulate(arch: &Arch, host: &Host, initrd: &Path, job: &Job, token: &str) -> Result<Outcome> {
    let mut command = machine(arch, host, initrd, job)?;
    let began = Instant::now();
    let mut child = command.spawn().with_context(|| format!("cannot start {command:?}"))?;
    let serial = child.stdout.take().context("the output is a pipe")?;
    let shown = matches!(host, Host::Qemu);
    let watched = watch(serial, token, began + job.limit + GRACE, shown);
    let stopped = stop(&mut child, watched.status.is_some());
    if shown {
        println!(
            "nested {}: {:.1} s in all, {:.1} s of it the program",
            arch.name,
            began.elapsed().as_secs_f32(),
            watched.program.as_secs_f32()
        );
    }
    match (watched.status, watched.late) {
        (Some(status), _) => Ok(Outcome { status, transcript: watched.transcript }),
        (None, true) => {
            eprintln!("nested {}: no end after {} s", arch.name, (job.limit + GRACE).as_secs());
            Ok(Outcome { status: TIMED_OUT, transcript: watched.transcript })
        }
        (None, false) => {
            bail!("the emulated machine stopped before the program did ({stopped})")
        }
    }
}

/// What the serial line told.
#[derive(Debug, Default)]
struct Watched {
    transcript: String,
    status: Option<u8>,
    program: Duration,
    late: bool,
}

/// Keeps the lines of `serial` until it ends, init reports the status, or `deadline` passes; shows them if `shown`.
fn watch(serial: impl Read + Send + 'static, token: &str, deadline: Instant, shown: bool) -> Watched {
    let mark = format!("@@NEST {token} ");
    let (sender, lines) = mpsc::sync_channel::<Vec<u8>>(64);
    // Ends with the pipe, or with the first line after `lines` is dropped.
    thread::spawn(move || {
        let mut serial = BufReader::new(serial);
        let mut line = Vec::new();
        // A line without an end comes in pieces, so that it cannot grow without bound.
        while matches!((&mut serial).take(64 << 10).read_until(b'\n', &mut line), Ok(1..)) {
            if sender.send(std::mem::take(&mut line)).is_err() {
                return;
            }
        }
    });
    let mut watched = Watched::default();
    loop {
        let line = match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(line) => line,
            Err(error) => {
                watched.late = error == mpsc::RecvTimeoutError::Timeout;
                return watched;
            }
        };
        // The kernel's console ends lines with CR LF, and a guest's console doubles the CR.
        let text = String::from_utf8_lossy(&line).replace('\r', "");
        match text.trim_end().strip_prefix(&mark).and_then(|rest| rest.split_once(' ')) {
            Some(("ran", millis)) => watched.program = Duration::from_millis(millis.parse().unwrap_or(0)),
            Some(("exit", status)) => {
                watched.status = status.parse::<u8>().ok();
                return watched;
            }
            _ => {
                if watched.transcript.len() < TRANSCRIPT_LIMIT {
                    watched.transcript += &text;
                }
                // Nobody reading is no reason to stop: the status is what counts.
                if shown {
                    let _ = std::io::stdout().write_all(text.as_bytes());
                }
            }
        }
    }
}

/// Waits a moment for a machine that said it ends, and kills it otherwise.
fn stop(child: &mut Child, ending: bool) -> String {
    let deadline = Instant::now() + if ending { Duration::from_secs(5) } else { Duration::ZERO };
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return status.to_string(),
            Ok(None) if Instant::now() < deadline => thread::sleep(Duration::from_millis(10)),
            Ok(None) => {
                let _ = child.kill();
                let _ = child.wait();
                return "killed".to_owned();
            }
            Err(error) => return error.to_string(),
        }
    }
}

/// Something that no program inside prints by accident, and that two runs at a time do not share.
fn token() -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    format!("{:x}-{:x}", std::process::id(), now.as_nanos())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Cursor;

    fn watched(text: &str) -> Watched {
        watch(Cursor::new(text.to_owned().into_bytes()), "t", Instant::now() + Duration::from_secs(600), true)
    }

    #[test]
    fn the_marked_line_is_the_status() {
        let seen = watched("hello\r\r\n@@NEST x exit 0\r\n\r\n@@NEST t ran 1500\r\n@@NEST t exit 101\r\nrest\n");
        assert_eq!(seen.status, Some(101));
        assert_eq!(seen.program, Duration::from_millis(1500));
        assert_eq!(seen.transcript, "hello\n@@NEST x exit 0\n\n");
    }

    #[test]
    fn a_machine_that_stops_has_no_status() {
        let seen = watched("Kernel panic\n");
        assert_eq!((seen.status, seen.late), (None, false));
    }

    #[test]
    fn the_deadline_ends_the_watch() {
        /// A serial line on which nothing comes.
        struct Silent;
        impl Read for Silent {
            fn read(&mut self, _: &mut [u8]) -> std::io::Result<usize> {
                loop {
                    thread::park();
                }
            }
        }
        let seen = watch(Silent, "t", Instant::now(), true);
        assert_eq!((seen.status, seen.late), (None, true));
    }
}
