//! `vm-accel selftest`: the library's conformance suite on this host, as a report for an issue.
//!
//! It is how backends are verified on machines that their authors do not have, so it must survive what it looks for: each
//! case runs in a process of its own, and one that crashes or hangs is a line in the report. It never repairs, retries or
//! leaves out anything; what is skipped has its reason beside it.

use crate::args::{AccelList, SelftestArgs};
use crate::console::tell;
use crate::info;
use crate::status::{NoBackend, Status};
use anyhow::{Context as _, Result, bail};
use std::collections::VecDeque;
use std::fmt::Write as _;
use std::io::Write as _;
use std::process::{Command, ExitStatus, Output, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use vm_accel::{AccelKind, ProbeReport, probe_kind};
use vm_accel_conformance::{Backend, CONFORMANCE, PLATFORM_BACKENDS, Test, plan};

/// Longer than a case's own watchdog takes: this is for what happens around the case.
const CASE_LIMIT: Duration = Duration::from_secs(120);

pub(crate) fn selftest(args: &SelftestArgs) -> Result<Status> {
    if let Some(name) = &args.case {
        return case(name);
    }
    let kinds = match &args.accel {
        AccelList::Auto => AccelKind::ALL.to_vec(),
        AccelList::Kinds(kinds) => kinds.clone(),
    };
    let sections = kinds.into_iter().map(|kind| Section::new(kind, args.filter.as_deref())).collect::<Vec<_>>();
    if sections.iter().all(|section| section.probe.outcome.is_err()) {
        let reasons: Vec<_> = sections.iter().filter_map(|s| s.probe.outcome.as_ref().err()).collect();
        return Err(NoBackend(reasons.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")).into());
    }
    if sections.iter().all(|section| section.cases.is_empty()) {
        bail!("no case on these backends has {:?} in its name", args.filter.as_deref().unwrap_or_default());
    }
    if args.list {
        print(&list(&sections))?;
        return Ok(Status::Ok);
    }
    let sections = run_all(sections)?;
    print(&report(&host(), &sections))?;
    let failed = sections.iter().flat_map(|s| &s.cases).any(|case| matches!(case.result, Some(Err(_))));
    Ok(if failed { Status::Error } else { Status::Ok })
}

fn print(text: &str) -> Result<()> {
    std::io::stdout().write_all(text.as_bytes()).context("cannot write the report")
}

/// One backend's part of the report.
#[derive(Debug)]
struct Section {
    probe: ProbeReport,
    cases: Vec<Case>,
}

/// One case: neither skipped nor with a result, it has not run.
#[derive(Debug)]
struct Case {
    name: String,
    skip: Option<String>,
    result: Option<Result<(), String>>,
}

impl Section {
    fn new(kind: AccelKind, filter: Option<&str>) -> Self {
        let tests = tests(|backend| backend.name == kind.name());
        let wanted = tests.into_iter().filter(|test| filter.is_none_or(|part| test.name.contains(part)));
        let cases = wanted.map(|Test { name, skip, .. }| Case { name, skip, result: None });
        Self { probe: ProbeReport { kind, outcome: probe_kind(kind) }, cases: cases.collect() }
    }
}

/// The cases on those of the backends that are there.
fn tests(wanted: impl Fn(&Backend) -> bool) -> Vec<Test> {
    let backends: Vec<Backend> = PLATFORM_BACKENDS.iter().copied().filter(wanted).collect();
    plan(&CONFORMANCE, &backends).tests
}

/// The process of one case: status 0 says that it passed, and stderr why not.
fn case(name: &str) -> Result<Status> {
    std::thread::spawn(|| {
        std::thread::sleep(CASE_LIMIT);
        tell("the process of the case hangs");
        std::process::exit(i32::from(Status::Timeout.code()));
    });
    let backend = name.split("::").next().unwrap_or_default();
    let Some(test) = tests(|b| b.name == backend).into_iter().find(|test| test.name == name) else {
        bail!("there is no case {name} here");
    };
    if let Err(difference) = test.run() {
        bail!("{difference}");
    }
    Ok(Status::Ok)
}

/// Runs what is not skipped, one process per case, as many at a time as the host has CPUs.
fn run_all(mut sections: Vec<Section>) -> Result<Vec<Section>> {
    let this = std::env::current_exe().context("cannot find this program")?;
    let cases = sections.iter_mut().flat_map(|section| &mut section.cases);
    let queue: VecDeque<&mut Case> = cases.filter(|case| case.skip.is_none()).collect();
    tell(format_args!("running {} cases; the report follows", queue.len()));
    let queue = Mutex::new(queue);
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                // A statement of its own: the lock is not held while the case runs.
                let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
                while let Some(case) = next() {
                    let mut command = Command::new(&this);
                    command.args(["selftest", "--case", &case.name]).stdin(Stdio::null()).env_remove("RUST_BACKTRACE");
                    let result = match command.output() {
                        Ok(output) => judge(&output),
                        Err(error) => Err(format!("its process does not start: {error}")),
                    };
                    if result.is_err() {
                        tell(format_args!("{} failed", case.name));
                    }
                    case.result = Some(result);
                }
            });
        }
    });
    Ok(sections)
}

/// What came of a case's process.
fn judge(Output { status, stderr, .. }: &Output) -> Result<(), String> {
    if status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(stderr);
    let said = said.trim().trim_start_matches("vm-accel: ");
    // An orderly failure explains itself; a crash has only its status, and perhaps last words.
    let orderly = status.code() == Some(i32::from(Status::Error.code()));
    Err(if orderly && !said.is_empty() { said.to_owned() } else { last_words(*status, said) })
}

fn last_words(status: ExitStatus, said: &str) -> String {
    format!("its process ended with {status}\n{said}").trim_end().to_owned()
}

/// The names of the cases, and of those that would be skipped the reason.
fn list(sections: &[Section]) -> String {
    sections.iter().flat_map(|section| &section.cases).fold(String::new(), |mut text, case| {
        let _ = match &case.skip {
            Some(reason) => writeln!(text, "{}: skipped: {reason}", case.name),
            None => writeln!(text, "{}", case.name),
        };
        text
    })
}

/// The report, in Markdown: the code block keeps it as it is in an issue.
fn report(host: &[(&str, String)], sections: &[Section]) -> String {
    let mut text = String::from("```text\n");
    for (what, value) in host {
        let _ = writeln!(text, "{what:<8} {value}");
    }
    for Section { probe, cases } in sections {
        let _ = write!(text, "\n{}", info::table_row(probe));
        if cases.is_empty() {
            continue;
        }
        let failed = cases.iter().filter(|case| matches!(case.result, Some(Err(_)))).count();
        let skipped = cases.iter().filter(|case| case.skip.is_some()).count();
        let passed = cases.len() - failed - skipped;
        let _ = writeln!(text, "{passed} passed, {failed} failed, {skipped} skipped");
        for Case { name, skip, result } in cases {
            if let Some(Err(why)) = result {
                let _ = writeln!(text, "FAILED  {name}\n        {}", why.trim_end().replace('\n', "\n        "));
            }
            if let Some(reason) = skip {
                let _ = writeln!(text, "skipped {name}: {reason}");
            }
        }
    }
    text + "```\n"
}

/// What a reader must know of the machine. It identifies the model, never the owner.
fn host() -> Vec<(&'static str, String)> {
    let profile = if cfg!(debug_assertions) { ", debug build" } else { "" };
    let (os, cpu) = match std::env::consts::OS {
        "macos" => (
            format!("macOS {}", said(Command::new("sw_vers").arg("-productVersion"))),
            said(Command::new("sysctl").args(["-n", "machdep.cpu.brand_string"])),
        ),
        "windows" => (
            said(Command::new("cmd").args(["/c", "ver"])),
            std::env::var("PROCESSOR_IDENTIFIER").unwrap_or_else(|_| UNKNOWN.to_owned()),
        ),
        "linux" => (
            format!("Linux {}", file("/proc/sys/kernel/osrelease").trim()),
            // Arm's CPUs have numbers instead of names.
            ["model name", "CPU part"].iter().find_map(|key| field(&file("/proc/cpuinfo"), key)).unwrap_or_default(),
        ),
        other => (other.to_owned(), String::new()),
    };
    let cpus = std::thread::available_parallelism().map_or(0, usize::from);
    let cpu = if cpu.is_empty() { UNKNOWN.to_owned() } else { cpu };
    vec![
        ("vm-accel", format!("{} selftest{profile}", env!("CARGO_PKG_VERSION"))),
        ("os", os),
        ("cpu", format!("{cpu}, {} CPUs, {}", cpus, std::env::consts::ARCH)),
    ]
}

const UNKNOWN: &str = "unknown";

/// What a program prints, in one line.
fn said(command: &mut Command) -> String {
    let output = command.stdin(Stdio::null()).output().map(|output| output.stdout).unwrap_or_default();
    let text = String::from_utf8_lossy(&output).split_whitespace().collect::<Vec<_>>().join(" ");
    if text.is_empty() { UNKNOWN.to_owned() } else { text }
}

fn file(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|_| UNKNOWN.to_owned())
}

/// The value of the first line `key : value`.
fn field(text: &str, key: &str) -> Option<String> {
    let (_, value) = text.lines().filter_map(|line| line.split_once(':')).find(|(name, _)| name.trim() == key)?;
    Some(value.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_accel::{AccelError, Capabilities, GuestArch, UnavailableReason};

    fn case(name: &str, skip: Option<&str>, result: Option<Result<(), String>>) -> Case {
        Case { name: name.to_owned(), skip: skip.map(str::to_owned), result }
    }

    #[test]
    fn a_report_counts_and_explains() {
        let there = Section {
            probe: ProbeReport { kind: AccelKind::Hvf, outcome: Ok(Capabilities::minimal(GuestArch::Aarch64)) },
            cases: vec![
                case("hvf::a::b", None, Some(Ok(()))),
                case("hvf::a::c", None, Some(Err("one\ntwo\n".to_owned()))),
                case("hvf::a::d", Some("lacks it"), None),
            ],
        };
        let reason = UnavailableReason::WrongOs { needs: "Windows" };
        let absent = Section {
            probe: ProbeReport {
                kind: AccelKind::Whpx,
                outcome: Err(AccelError::Unavailable { kind: AccelKind::Whpx, reason }),
            },
            cases: Vec::new(),
        };
        let text = report(&[("os", "Plan 9".to_owned())], &[there, absent]);
        for part in [
            "os       Plan 9\n",
            "\nhvf   available    aarch64 guests",
            "\n1 passed, 1 failed, 1 skipped\nFAILED  hvf::a::c\n        one\n        two\nskipped hvf::a::d: lacks it\n",
            "\nwhpx  unavailable  it exists only on Windows\n",
        ] {
            assert!(text.contains(part), "{part:?} is not in\n{text}");
        }
    }

    #[test]
    fn cpu_names_are_found() {
        let text = "processor\t: 0\nmodel name\t: Some CPU @ 1: 2\nmodel name\t: another\n";
        assert_eq!(field(text, "model name").as_deref(), Some("Some CPU @ 1: 2"));
        assert_eq!(field(text, "CPU part"), None);
    }

    #[cfg(unix)]
    #[test]
    fn a_crash_is_a_failure_with_its_status() {
        use std::os::unix::process::ExitStatusExt as _;
        let output = |raw, said: &str| Output {
            status: ExitStatus::from_raw(raw),
            stdout: Vec::new(),
            stderr: said.as_bytes().to_vec(),
        };
        assert_eq!(judge(&output(0, "a warning")), Ok(()));
        assert_eq!(judge(&output(1 << 8, "vm-accel: exit is x\n")), Err("exit is x".to_owned()));
        let crash = judge(&output(11, "last words")).unwrap_err();
        assert!(crash.contains("signal: 11") && crash.ends_with("\nlast words"), "{crash}");
        let panic = judge(&output(101 << 8, "thread panicked")).unwrap_err();
        assert!(panic.contains("101") && panic.contains("thread panicked"), "{panic}");
        assert!(judge(&output(1 << 8, "")).unwrap_err().contains("exit status: 1"));
    }
}
