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
    };
    match result {
        Ok(status) => status.into(),
        Err(error) => {
            // The alternate form prints the chain of causes in one line.
            eprintln!("vm-accel: {error:#}");
            status::of_error(&error).into()
        }
    }
}
