//! `cargo xtask boot`: Debian's kernel as a guest of `vm-accel run` on this very host, the software CPU by default.

use crate::arch::{Arch, X86};
use crate::cargo::build_static;
use crate::{Usage, initrd};
use anyhow::{Context, Result, bail};
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};

pub(crate) const COMMAND: crate::Command = crate::Command {
    name: "boot",
    summary: "boot Debian's x86 kernel on this host, on the software CPU by default",
    usage: "\
Usage: cargo xtask boot [--accel LIST] [--cpus N] [--limit SECONDS]

Boots Debian's kernel to the userspace of `cargo xtask initrd` and checks that it reports all CPUs and that
vm-accel ends with status 0. Needs `cargo xtask guests`.",
    run,
};

fn run(args: &[String]) -> Result<u8> {
    let (mut accel, mut cpus, mut limit) = ("soft".to_owned(), 1_u32, 300_u32);
    let mut args = args.iter();
    while let Some(flag) = args.next() {
        let value = args.next().ok_or_else(|| Usage::error(format!("{flag} needs a value")))?;
        let number = || value.parse().map_err(|_| Usage::error(format!("{flag} wants a number, not {value}")));
        match flag.as_str() {
            "--accel" => accel = value.clone(),
            "--cpus" => cpus = number()?,
            "--limit" => limit = number()?,
            _ => return Err(Usage::error(format!("no option '{flag}'"))),
        }
    }
    let arch = &X86;
    let program = vm_accel(arch)?;
    let ramdisk = initrd::build(arch)?;
    println!("booting on {accel} with {cpus} CPU(s)");
    let mut child = Command::new(program)
        .arg("run")
        .arg(arch.kernel())
        .arg("--initrd")
        .arg(ramdisk)
        .args(["--accel", &accel])
        .args(["--cpus", &cpus.to_string()])
        .args(["--timeout", &limit.to_string()])
        .arg("--no-reboot")
        .args(["--cmdline", "console=ttyS0 panic=-1 mitigations=off"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start vm-accel")?;
    let output = child.stdout.take().context("the child has an output")?;
    let wanted = format!("{}, {cpus} CPU(s) online", initrd::REACHED);
    let mut reached = false;
    for line in BufReader::new(output).split(b'\n') {
        let line = String::from_utf8_lossy(&line?).into_owned();
        println!("{}", line.trim_end());
        reached |= line.contains(&wanted);
    }
    let status = child.wait()?;
    if !reached {
        bail!("the guest never said \"{wanted}\" (vm-accel ended with {status})");
    }
    if !status.success() {
        bail!("vm-accel ended with {status}");
    }
    println!("boot: passed");
    Ok(0)
}

/// Builds the command as the nested boot does, so that both share the work.
pub(crate) fn vm_accel(arch: &Arch) -> Result<PathBuf> {
    let args = ["build", "--release", "-p", "vm-accel-cli", "--bin", "vm-accel"];
    build_static(arch, &args, "vm-accel")
}
