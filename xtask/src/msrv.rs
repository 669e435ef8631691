//! `cargo xtask msrv`: the library builds with the oldest Rust it promises.

use crate::Usage;
use crate::arch::Arch;
use crate::cargo::cargo;
use crate::process;
use crate::rust::Toolchain;
use anyhow::{Context, Result};

pub(crate) const COMMAND: crate::Command = crate::Command {
    name: "msrv",
    summary: "check the library crates with the oldest Rust they promise",
    usage: "\
Usage: cargo xtask msrv

Checks vm-accel and the crates that it consists of, all features, with Debian's Rust 1.85, which is fetched
into guests-cache/rust (about 90 MB, once) and not installed.",
    run,
};

/// The `rust-version` of the library crates.
const VERSION: &str = "1.85";

fn run(args: &[String]) -> Result<u8> {
    if !args.is_empty() {
        return Err(Usage::error("msrv takes no arguments"));
    }
    let host = Arch::named(std::env::consts::ARCH).context("Debian's Rust is fetched for x86-64 and arm64 only")?;
    let mut command = cargo();
    command.args([
        "check",
        "-p",
        "vm-accel-softcpu",
        "-p",
        "vm-accel-core",
        "-p",
        "vm-accel-backend",
        "-p",
        "vm-accel-whpx",
        "-p",
        "vm-accel",
        "--all-features",
    ]);
    // Lints of other versions are no reason to fail.
    command.env("RUSTFLAGS", "--cap-lints=warn").env_remove("CARGO_ENCODED_RUSTFLAGS");
    Toolchain::debian(VERSION, host)?.apply(&mut command);
    process::run(&mut command)?;
    println!("msrv: the library builds with Rust {VERSION}");
    Ok(0)
}
