//! `cargo xtask`: everything CI does, runnable by hand.
//!
//! One table of commands, one module each. A command prints what it does before it does it, never touches anything
//! outside the workspace's `target/` and `guests-cache/` folders, and never needs to be root. One exception: `wine` installs
//! Debian packages where it may.

mod apt;
mod arch;
mod boot;
mod budget;
mod cargo;
mod cpio;
mod cross;
mod diff;
mod guests;
mod initrd;
mod kernels;
mod kut;
mod msrv;
mod nested;
mod process;
mod qemu;
mod rust;
mod vectors;
mod wine;
mod workspace;

use std::process::ExitCode;

/// One `cargo xtask` command.
#[derive(Debug)]
pub(crate) struct Command {
    name: &'static str,
    summary: &'static str,
    /// What `--help` prints below the summary.
    usage: &'static str,
    /// Gets the arguments after the command's name; answers the exit status.
    run: fn(&[String]) -> anyhow::Result<u8>,
}

const COMMANDS: &[&Command] = &[
    &guests::COMMAND,
    &initrd::COMMAND,
    &boot::COMMAND,
    &nested::COMMAND,
    &kut::COMMAND,
    &diff::COMMAND,
    &vectors::COMMAND,
    &kernels::COMMAND,
    &wine::COMMAND,
    &cross::COMMAND,
    &msrv::COMMAND,
    &budget::COMMAND,
];

/// The status for a command line that makes no sense, as in most Unix tools.
const USAGE: u8 = 2;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let Some(name) = args.first().filter(|a| !is_help(a)) else {
        println!("{}", overview());
        return if args.is_empty() { ExitCode::from(USAGE) } else { ExitCode::SUCCESS };
    };
    let Some(command) = COMMANDS.iter().find(|c| c.name == name) else {
        eprintln!("xtask: no command '{name}'\n\n{}", overview());
        return ExitCode::from(USAGE);
    };
    // What follows `--` belongs to whatever the command runs.
    if args[1..].iter().take_while(|a| *a != "--").any(|a| is_help(a)) {
        println!("{}\n\n{}", command.summary, command.usage.trim_end());
        return ExitCode::SUCCESS;
    }
    match (command.run)(&args[1..]) {
        Ok(status) => ExitCode::from(status),
        Err(error) if error.is::<Usage>() => {
            eprintln!("xtask {name}: {error}\n\n{}", command.usage.trim_end());
            ExitCode::from(USAGE)
        }
        Err(error) => {
            eprintln!("xtask {name}: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn is_help(arg: &str) -> bool {
    matches!(arg, "--help" | "-h" | "help")
}

fn overview() -> String {
    let mut text = String::from("Usage: cargo xtask COMMAND [ARGUMENT…]\n\nCommands (each has --help):\n");
    for command in COMMANDS {
        text += &format!("  {:<8} {}\n", command.name, command.summary);
    }
    text.trim_end().to_owned()
}

/// An error in the command line: printed with the command's usage, status 2.
#[derive(Debug)]
pub(crate) struct Usage(String);

impl Usage {
    pub(crate) fn error(text: impl Into<String>) -> anyhow::Error {
        anyhow::Error::new(Self(text.into()))
    }
}

impl std::fmt::Display for Usage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}
