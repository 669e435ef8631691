//! `cargo xtask initrd`: the initrd of the boot tests.

use crate::Usage;
use crate::arch::Arch;
use crate::cargo::build_static;
use crate::cpio::Archive;
use crate::workspace::shown;
use anyhow::{Context, Result};
use std::fs;
use std::path::PathBuf;

pub(crate) const COMMAND: crate::Command = crate::Command {
    name: "initrd",
    summary: "build the initrd whose init reports and powers off",
    usage: "\
Usage: cargo xtask initrd [x86] [arm64]

Writes guests-cache/{x86_64,aarch64}/initrd.cpio. Its init prints
  vm-accel: userspace reached, N CPU(s) online, …
and powers off; with vm_accel.end=reset, idle or exit on the kernel command line it
resets the machine, stays, or ends, which makes the kernel panic.",
    run,
};

/// What the init of [`build`]'s initrd prints first.
pub(crate) const REACHED: &str = "vm-accel: userspace reached";

fn run(args: &[String]) -> Result<u8> {
    if let Some(flag) = args.iter().find(|a| a.starts_with('-')) {
        return Err(Usage::error(format!("no option '{flag}'")));
    }
    for arch in Arch::named_or_all(args.iter().map(String::as_str))? {
        build(arch)?;
    }
    Ok(0)
}

/// Builds the initrd for `arch` and puts it in its place.
pub(crate) fn build(arch: &Arch) -> Result<PathBuf> {
    let init = init_program(arch, "guestinit")?;
    let mut archive = Archive::with_base()?;
    archive.file("init", 0o755, &init)?;
    let bytes = archive.finish()?;
    let path = arch.initrd();
    fs::create_dir_all(arch.dir())?;
    fs::write(&path, &bytes).with_context(|| format!("cannot write {}", shown(&path)))?;
    println!("{}: {} KiB", shown(&path), bytes.len() / 1024);
    Ok(path)
}

/// Builds one of the init programs and answers its bytes.
pub(crate) fn init_program(arch: &Arch, name: &str) -> Result<Vec<u8>> {
    let path = build_static(arch, &["build", "--release", "-p", "vm-accel-nestinit", "--bin", name], name)?;
    fs::read(&path).with_context(|| format!("cannot read {}", path.display()))
}
