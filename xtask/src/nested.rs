//! `cargo xtask nested`: upstream KVM on any machine, by emulating one that has it.

use crate::Usage;
use crate::arch::Arch;
use crate::cargo::build_static;
use crate::qemu::{self, Job, Outcome};
use crate::{guests, initrd};
use anyhow::{Context, Result, bail};
use std::path::PathBuf;
use std::time::Duration;

pub(crate) const COMMAND: crate::Command = crate::Command {
    name: "nested",
    summary: "run programs on upstream KVM inside an emulated machine",
    usage: "\
Usage: cargo xtask nested x86|arm64 ACTION [OPTION…] [--] [ARGUMENT…]

The machine is emulated by QEMU (TCG; no virtualization needed on the host) and runs
Debian's kernel with KVM. Needs qemu-system-x86_64 or qemu-system-aarch64, and for a
foreign architecture a cross gcc; fetches the rest as `cargo xtask guests` does.

Actions:
  test [ARGUMENT…]      the conformance suite of the library, which must find KVM there
  lockstep [ARGUMENT…]  its guests step for step on KVM and on the software CPU (x86)
  boot [ARGUMENT…]      `vm-accel run` boots Debian's kernel as its guest to a userspace
                        line and a power-off; arguments are added to those of `run`
  run BINARY [ARG…]     any static Linux executable; its exit status becomes this one's
  selftest              the harness itself: statuses, time limit, /dev/kvm

Options, before the arguments:
  --limit SECONDS       kill the program after this time (exit status 124)
  --memory MIB          memory of the emulated machine
  --env NAME=VALUE      set a variable for the program, repeatable
  --file INSIDE=HERE    put a file into the machine, repeatable",
    run,
};

#[derive(Debug)]
struct Options {
    limit: Option<Duration>,
    memory_mib: Option<u32>,
    env: Vec<(String, String)>,
    files: Vec<(String, PathBuf)>,
    /// What follows the options.
    rest: Vec<String>,
}

impl Options {
    fn parse(args: &[String]) -> Result<Self> {
        let mut options = Self { limit: None, memory_mib: None, env: Vec::new(), files: Vec::new(), rest: Vec::new() };
        let mut args = args.iter();
        while let Some(arg) = args.next() {
            let mut value = || args.next().ok_or_else(|| Usage::error(format!("{arg} needs a value")));
            let pair = |text: &str| {
                text.split_once('=')
                    .filter(|(name, _)| !name.is_empty())
                    .map(|(a, b)| (a.to_owned(), b.to_owned()))
                    .ok_or_else(|| Usage::error(format!("{arg} {text}: not NAME=VALUE")))
            };
            match arg.as_str() {
                "--limit" => options.limit = Some(Duration::from_secs(number(arg, value()?)?.into())),
                "--memory" => options.memory_mib = Some(number(arg, value()?)?),
                "--env" => options.env.push(pair(value()?)?),
                "--file" => {
                    let (inside, here) = pair(value()?)?;
                    options.files.push((inside.trim_start_matches('/').to_owned(), PathBuf::from(here)));
                }
                "--" => {
                    options.rest.extend(args.by_ref().cloned());
                }
                flag if flag.starts_with("--") => {
                    return Err(Usage::error(format!("no option '{flag}'")));
                }
                first => {
                    options.rest.push(first.to_owned());
                    options.rest.extend(args.by_ref().cloned());
                }
            }
        }
        Ok(options)
    }

    /// The job of running `program`, with the defaults of an action where no option says otherwise.
    fn job(self, program: PathBuf, args: Vec<String>, limit: u64, memory_mib: u32) -> Job {
        Job {
            program,
            args,
            env: self.env,
            files: self.files,
            limit: self.limit.unwrap_or(Duration::from_secs(limit)),
            memory_mib: self.memory_mib.unwrap_or(memory_mib),
        }
    }
}

fn number(option: &str, text: &str) -> Result<u32> {
    text.parse().ok().filter(|n| *n > 0).ok_or_else(|| Usage::error(format!("{option} {text}: not a positive number")))
}

fn run(args: &[String]) -> Result<u8> {
    let [arch, action, rest @ ..] = args else {
        return Err(Usage::error("an architecture and an action are needed"));
    };
    let arch = Arch::named(arch)?;
    let action: fn(&Arch, Options) -> Result<u8> = match action.as_str() {
        "test" => |arch, options| test(arch, options, "conformance", "kvm"),
        "lockstep" => |arch, options| test(arch, options, "lockstep", "kvm-and-soft"),
        "boot" => boot,
        "run" => program,
        "selftest" => selftest,
        other => return Err(Usage::error(format!("no action '{other}'"))),
    };
    let options = Options::parse(rest)?;
    guests::ensure(arch)?;
    action(arch, options)
}

/// A suite of the library. One that skipped KVM would prove nothing here.
fn test(arch: &Arch, mut options: Options, suite: &str, required: &str) -> Result<u8> {
    let program = build_static(arch, &["test", "-p", "vm-accel", "--test", suite, "--no-run"], suite)?;
    options.env.insert(0, ("VM_ACCEL_REQUIRE".to_owned(), required.to_owned()));
    options.env.insert(0, ("RUST_BACKTRACE".to_owned(), "1".to_owned()));
    let args = std::mem::take(&mut options.rest);
    Ok(qemu::run(arch, &options.job(program, args, 600, 768))?.status)
}

fn boot(arch: &Arch, mut options: Options) -> Result<u8> {
    let program = build_static(arch, &["build", "--release", "-p", "vm-accel-cli", "--bin", "vm-accel"], "vm-accel")?;
    options.files.push(("g/vmlinuz".to_owned(), arch.kernel()));
    options.files.push(("g/initrd.cpio".to_owned(), initrd::build(arch)?));
    options.env.insert(0, ("RUST_BACKTRACE".to_owned(), "1".to_owned()));
    let command_line = format!("console={} panic=-1 mitigations=off", arch.console);
    let mut args: Vec<String> =
        ["run", "/g/vmlinuz", "--initrd", "/g/initrd.cpio", "--accel", "kvm", "--memory", "256M", "--cmdline"]
            .map(str::to_owned)
            .to_vec();
    args.push(command_line);
    args.append(&mut options.rest);
    let Outcome { status, transcript } = qemu::run(arch, &options.job(program, args, 300, 1024))?;
    if status != 0 {
        bail!("vm-accel ended with status {status}, not 0");
    }
    let line = transcript
        .lines()
        .find(|line| line.contains(initrd::REACHED))
        .with_context(|| format!("vm-accel ended with status 0, but its guest never said '{}'", initrd::REACHED))?;
    println!("nested {} boot: passed: {}", arch.name, line.trim());
    Ok(0)
}

fn program(arch: &Arch, mut options: Options) -> Result<u8> {
    if options.rest.is_empty() {
        return Err(Usage::error("run needs an executable"));
    }
    let args = options.rest.split_off(1);
    let program = PathBuf::from(options.rest.remove(0));
    Ok(qemu::run(arch, &options.job(program, args, 120, 512))?.status)
}

/// A script for the shell inside, its time limit, and the status and output it must have.
struct Check {
    what: &'static str,
    script: &'static str,
    limit: u64,
    status: u8,
    prints: &'static str,
}

const CHECKS: &[Check] = &[
    Check {
        what: "KVM is there",
        script: "test -c /dev/kvm && echo $((6 * 7)) devices",
        limit: 60,
        status: 0,
        prints: "42 devices",
    },
    Check { what: "a failure is reported", script: "echo out; exit 101", limit: 60, status: 101, prints: "out" },
    Check { what: "a signal is reported", script: "kill -9 $$", limit: 60, status: 137, prints: "" },
    Check { what: "the time limit holds", script: "echo slow; sleep 1000", limit: 2, status: 124, prints: "slow" },
    Check {
        what: "a program cannot report for init",
        script: "echo '@@NEST token exit 0'; exit 3",
        limit: 60,
        status: 3,
        prints: "@@NEST",
    },
];

fn selftest(arch: &Arch, options: Options) -> Result<u8> {
    if !options.rest.is_empty() {
        return Err(Usage::error("selftest takes no arguments"));
    }
    for check in CHECKS {
        let job = Job {
            program: arch.dir().join("busybox"),
            args: ["sh", "-c", check.script].map(str::to_owned).to_vec(),
            env: Vec::new(),
            files: Vec::new(),
            limit: Duration::from_secs(check.limit),
            memory_mib: 256,
        };
        let outcome = qemu::run(arch, &job).with_context(|| check.what.to_owned())?;
        if outcome.status != check.status || !outcome.transcript.contains(check.prints) {
            bail!(
                "{}: status {} instead of {}, output:\n{}",
                check.what,
                outcome.status,
                check.status,
                outcome.transcript
            );
        }
        println!("nested {} selftest: {}: ok", arch.name, check.what);
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(args: &[&str]) -> Result<Options> {
        Options::parse(&args.iter().map(|a| (*a).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn options_end_where_the_arguments_begin() {
        let options = parse(&["--limit", "5", "--env", "A=b=c", "--file", "/g/k=x", "bin", "--limit", "6"]).unwrap();
        assert_eq!(options.limit, Some(Duration::from_secs(5)));
        assert_eq!(options.env, [("A".to_owned(), "b=c".to_owned())]);
        assert_eq!(options.files, [("g/k".to_owned(), PathBuf::from("x"))]);
        assert_eq!(options.rest, ["bin", "--limit", "6"]);
        assert_eq!(parse(&["--", "--exact"]).unwrap().rest, ["--exact"]);
    }

    #[test]
    fn wrong_options_are_usage_errors() {
        for args in
            [&["--limit"][..], &["--limit", "0"], &["--memory", "x"], &["--env", "A"], &["--env", "=b"], &["--no"]]
        {
            assert!(parse(args).unwrap_err().is::<Usage>(), "{args:?}");
        }
    }
}
