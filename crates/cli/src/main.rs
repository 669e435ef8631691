//! The command `vm-accel`: boots a guest on whatever the host has, and says what the host has.
//!
//! Guest output goes to stdout, everything else to stderr. `status.rs` lists the exit statuses. What the command knows of
//! virtual machines is in the library and the machine layer; here are only arguments, the terminal and texts.

mod args;
mod console;
mod files;
mod info;
mod run;
mod select;
mod selftest;
mod status;

#[cfg_attr(unix, path = "os/unix.rs")]
#[cfg_attr(not(unix), path = "os/other.rs")]
mod os;

use clap::Parser as _;
use std::process::ExitCode;

fn main() -> ExitCode {
    // On wrong usage clap prints to stderr and exits with 2; on --help and --version to stdout, with 0.
    let args = args::Args::parse();
    let result = match args.command {
        args::Command::Run(run) => run::run(&run),
        args::Command::Info(info) => info::info(&info),
        args::Command::Selftest(selftest) => selftest::selftest(&selftest),
    };
    match result {
        Ok(status) => status.into(),
        Err(error) => {
            console::tell(sentence(&error));
            status::of_error(&error).into()
        }
    }
}

/// An error with its causes, in one line. Some errors say their cause themselves; it is not said twice.
fn sentence(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text += &format!(": {cause}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_are_said_once() {
        let error = anyhow::anyhow!("no such file").context("cannot read it");
        assert_eq!(sentence(&error), "cannot read it: no such file");
        let error = anyhow::anyhow!("no such file").context("cannot read it: no such file");
        assert_eq!(sentence(&error), "cannot read it: no such file");
    }
}
