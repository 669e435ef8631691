//! `cargo xtask vectors`: other projects' instruction tests, on this processor and on the software CPU.
//!
//! The tests are built elsewhere, as static Linux programs (CONTRIBUTING.md says how); this takes the folder. Each runs on this host and
//! as the only program of Debian's kernel on the software CPU, and must print the same and end with the same status.

use crate::arch::X86;
use crate::qemu::{self, Host, Job};
use crate::{Usage, boot, guests};
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

pub(crate) const COMMAND: crate::Command = crate::Command {
    name: "vectors",
    summary: "run static Linux programs on this host and on the software CPU, and compare",
    usage: "\
Usage: cargo xtask vectors FOLDER [PROGRAM…]

Runs the executables of FOLDER (or those named) on this x86-64 Linux host and in Debian's kernel on the software CPU. What
they print and their exit status must be equal. Meant for the instruction tests of valgrind and the like.",
    run,
};

/// Different lines that are shown of a program.
const SHOWN: usize = 12;

fn run(args: &[String]) -> Result<u8> {
    let [folder, names @ ..] = args else {
        return Err(Usage::error("a folder with programs is needed"));
    };
    let programs = programs(Path::new(folder), names)?;
    guests::ensure(&X86)?;
    let host = Host::Soft(boot::vm_accel(&X86)?);
    let (mut lines, mut failed) = (0, 0);
    for program in &programs {
        let expected = natively(program)?;
        let job = Job {
            program: program.clone(),
            args: Vec::new(),
            env: Vec::new(),
            files: Vec::new(),
            limit: Duration::from_secs(600),
            memory_mib: 512,
        };
        let outcome = qemu::run_on(&X86, &job, &host).with_context(|| program.display().to_string())?;
        let found = (i32::from(outcome.status), outcome.transcript);
        let differences = differences(&expected, &found);
        let word = if differences.is_empty() { "PASS" } else { "FAIL" };
        let name = program.file_name().unwrap_or_default().to_string_lossy();
        println!("{word} {name:<26} {:6} lines, status {}", expected.1.lines().count(), expected.0);
        differences.iter().take(SHOWN).for_each(|line| println!("     {line}"));
        lines += expected.1.lines().count();
        failed += usize::from(!differences.is_empty());
    }
    println!("{} programs, {lines} lines, {failed} failed", programs.len());
    Ok(u8::from(failed != 0))
}

/// The files of the folder, or those of them that are named.
fn programs(folder: &Path, names: &[String]) -> Result<Vec<PathBuf>> {
    let mut programs: Vec<PathBuf> = if names.is_empty() {
        let entries = std::fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
        entries.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?
    } else {
        names.iter().map(|name| folder.join(name)).collect()
    };
    programs.retain(|path| path.is_file());
    programs.sort();
    if programs.is_empty() || programs.len() < names.len() {
        bail!("{} has no such programs", folder.display());
    }
    Ok(programs)
}

/// Status and output on this host.
fn natively(program: &Path) -> Result<(i32, String)> {
    let output = Command::new(program).stdin(Stdio::null()).output();
    let output = output.with_context(|| format!("cannot start {}", program.display()))?;
    let status = output.status.code().with_context(|| format!("{} ended with {}", program.display(), output.status))?;
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    text += &String::from_utf8_lossy(&output.stderr);
    Ok((status, text))
}

/// What is not the same, in words.
fn differences(expected: &(i32, String), found: &(i32, String)) -> Vec<String> {
    let mut all = Vec::new();
    if expected.0 != found.0 {
        all.push(format!("status {} instead of {}", found.0, expected.0));
    }
    let text =
        |text: &str| text.lines().map(|line| line.trim_end().to_owned()).filter(|line| !line.is_empty()).collect();
    let (ours, theirs): (Vec<_>, Vec<_>) = (text(&found.1), text(&expected.1));
    if ours.len() != theirs.len() {
        all.push(format!("{} lines instead of {}", ours.len(), theirs.len()));
    }
    let pairs = ours.iter().zip(&theirs).filter(|(ours, theirs)| ours != theirs);
    all.extend(pairs.map(|(ours, theirs)| format!("{ours}\n     instead of {theirs}")));
    all
}

#[cfg(test)]
mod tests {
    use super::differences;

    #[test]
    fn ends_of_lines_do_not_matter_and_all_else_does() {
        let native = (0, "a ... ok\nb 1\n".to_owned());
        assert!(differences(&native, &(0, "a ... ok\r\n\nb 1".to_owned())).is_empty());
        assert_eq!(differences(&native, &(1, "a ... ok\nb 1\n".to_owned())).len(), 1);
        assert_eq!(differences(&native, &(0, "a ... not ok\nb 2\n".to_owned())).len(), 2);
        assert_eq!(differences(&native, &(0, "a ... ok\n".to_owned())).len(), 1);
    }
}
