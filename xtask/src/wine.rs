//! `cargo xtask wine`: the Windows binaries, run under Wine against a simulated WinHvPlatform.dll.
//!
//! What this shows and tests on Linux cannot: Windows' loader, its calling convention, its memory functions, and that the
//! programs start at all. What it cannot show: how the real hypervisor behaves.
//!
//! Wine has neither WinHvPlatform.dll nor bcryptprimitives.dll, which Rust's standard library takes its random numbers
//! from. Both are made here and put where Windows has its own, so that the library loads what it loads on a real machine.

use crate::Usage;
use crate::cargo::cargo;
use crate::process;
use crate::rust::{has_std, target_dir};
use crate::workspace::{root, shown};
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

pub(crate) const COMMAND: crate::Command = crate::Command {
    name: "wine",
    summary: "run the Windows programs under Wine, on the simulated hypervisor platform",
    usage: "\
Usage: cargo xtask wine [--seed N] [--required] [FILTER...]

Builds for x86_64-pc-windows-gnu and runs under Wine: the unit tests of the declarations and of the simulator, the
conformance suite on WHPX through a simulated WinHvPlatform.dll, and `vm-accel.exe run --accel whpx`, whose output and
status are checked. FILTERs select conformance cases, e.g. whpx::mmio.

Where Wine, MinGW or the target's standard library are missing they are installed if that can be done (apt-get as
root, rustup); otherwise the command says what it skips and succeeds.

  --seed N     make the simulated platform hostile
  --required   fail instead of skipping",
    run,
};

const TARGET: &str = "x86_64-pc-windows-gnu";
const LINKER: &str = "x86_64-w64-mingw32-gcc";
/// Debian's and Ubuntu's packages.
const PACKAGES: [&str; 2] = ["gcc-mingw-w64-x86-64", "wine64"];
/// Where distributions put the 64-bit loader; the wrapper `wine` complains about a missing 32-bit one.
const LOADERS: [&str; 3] = ["/usr/lib/wine/wine64", "/usr/bin/wine64", "/usr/bin/wine"];

/// What Wine 8 lacks of Windows 10 and Rust imports: the system's random numbers.
const RANDOM_SHIM: &str = "\
#include <windows.h>
BOOLEAN NTAPI SystemFunction036(PVOID, ULONG);
__declspec(dllexport) BOOL WINAPI ProcessPrng(PBYTE buffer, SIZE_T size) { return SystemFunction036(buffer, (ULONG)size); }
";

fn run(args: &[String]) -> Result<u8> {
    let (mut seed, mut required, mut filters) = (None, false, Vec::new());
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--seed" => {
                let number = args.next().and_then(|n| n.parse::<u64>().ok());
                seed = Some(number.ok_or_else(|| Usage::error("--seed needs a number"))?);
            }
            "--required" => required = true,
            option if option.starts_with('-') => return Err(Usage::error(format!("unknown option {option}"))),
            filter => filters.push(filter.to_owned()),
        }
    }
    let wine = match Wine::prepare(seed) {
        Ok(wine) => wine,
        Err(why) if !required => {
            println!("wine: skipped: {why:#}");
            return Ok(0);
        }
        Err(why) => return Err(why),
    };
    wine.install("bcryptprimitives.dll", &shim(&wine.dir)?)?;
    let platform = build(&["build", "-p", "vm-accel-sim-dll"])?;
    let library = platform.iter().find(|file| file.extension() == Some(OsStr::new("dll")));
    wine.install("WinHvPlatform.dll", library.context("cargo built no WinHvPlatform.dll")?)?;

    for package in ["vm-accel-sys", "vm-accel-core", "vm-accel-backend", "vm-accel-whpx", "vm-accel-sim"] {
        for test in build(&["test", "--no-run", "--lib", "-p", package])? {
            wine.run(&test, &[])?;
        }
    }
    let mut cases: Vec<_> = filters.iter().map(String::as_str).collect();
    if cases.is_empty() {
        cases.push("whpx::");
    }
    for test in build(&["test", "--no-run", "-p", "vm-accel", "--test", "conformance"])? {
        wine.run(&test, &cases)?;
    }
    let programs = build(&["build", "-p", "vm-accel-cli"])?;
    let program = programs.first().context("cargo built no vm-accel.exe")?;
    demo(&wine, program)?;
    println!("wine: everything passed");
    Ok(0)
}

/// Boots the demo guest by the command, and checks what it printed.
fn demo(wine: &Wine, program: &Path) -> Result<()> {
    let info = process::text(wine.command(program).arg("info"))?;
    println!("{}", info.trim_end());
    if !info.lines().any(|line| line.contains("whpx") && line.contains("available")) {
        bail!("vm-accel.exe info does not say that whpx is available");
    }
    for cpus in ["1", "2"] {
        let run = ["run", "--accel", "whpx", "--timeout", "300", "--cpus", cpus];
        let output = process::text(wine.command(program).args(run))?;
        print!("{output}");
        for words in ["Hello from the vm-accel demo guest.", "Done."] {
            if !output.contains(words) {
                bail!("the demo guest on {cpus} CPUs did not print {words:?}");
            }
        }
    }
    Ok(())
}

/// Wine with a prefix of its own.
struct Wine {
    loader: PathBuf,
    dir: PathBuf,
    prefix: PathBuf,
    seed: Option<u64>,
}

impl Wine {
    /// Finds or installs what is needed, and makes the prefix.
    fn prepare(seed: Option<u64>) -> Result<Self> {
        let find = || LOADERS.iter().map(PathBuf::from).find(|path| path.is_file());
        if find().is_none() || process::require(LINKER, PACKAGES[0]).is_err() {
            install_packages()?;
        }
        process::require(LINKER, PACKAGES[0])?;
        let loader = find().context("there is no Wine")?;
        need_std()?;
        let dir = target_dir().join("wine");
        let wine = Self { loader, prefix: dir.join("prefix"), dir, seed };
        if !wine.system().is_dir() {
            println!("making a Wine prefix in {}", shown(&wine.prefix));
            fs::create_dir_all(&wine.dir)?;
            let mut boot = Command::new(&wine.loader);
            boot.arg("wineboot").arg("--init");
            // It complains of the 32-bit half, which is not needed, and of the absent display.
            let _ =
                wine.environment(&mut boot).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
            if !wine.system().is_dir() {
                bail!("wineboot made no {}", shown(&wine.system()));
            }
        }
        Ok(wine)
    }

    fn system(&self) -> PathBuf {
        self.prefix.join("drive_c/windows/system32")
    }

    /// Puts a library where Windows has its own.
    fn install(&self, name: &str, from: &Path) -> Result<()> {
        fs::copy(from, self.system().join(name)).with_context(|| format!("cannot install {name}"))?;
        Ok(())
    }

    fn environment<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        command.env("WINEPREFIX", &self.prefix).env("WINEDEBUG", "-all").env("VM_ACCEL_REQUIRE", "whpx");
        if let Some(seed) = self.seed {
            command.env("VM_ACCEL_SIM_SEED", seed.to_string());
        }
        command
    }

    /// A Windows program.
    fn command(&self, program: &Path) -> Command {
        let mut command = Command::new(&self.loader);
        self.environment(&mut command).arg(program).current_dir(root());
        command
    }

    /// Runs a test program.
    fn run(&self, program: &Path, args: &[&str]) -> Result<()> {
        process::run(self.command(program).args(args))
    }
}

/// Installs the packages, if that can be done without asking anybody.
fn install_packages() -> Result<()> {
    let needs = || format!("needs {} (apt-get install {})", PACKAGES.join(" and "), PACKAGES.join(" "));
    process::require("apt-get", "apt").with_context(needs)?;
    if process::text(Command::new("id").arg("-u"))?.trim() != "0" {
        bail!("{}", needs());
    }
    let apt = || {
        let mut command = Command::new("apt-get");
        command.env("DEBIAN_FRONTEND", "noninteractive").args(["-qq", "-o", "Dpkg::Use-Pty=0"]);
        command
    };
    // Package lists may be absent or old; the installation shows.
    let _ = process::run(apt().arg("update"));
    process::run(apt().args(["install", "-y", "--no-install-recommends"]).args(PACKAGES)).with_context(needs)
}

/// Makes sure of the target's standard library.
fn need_std() -> Result<()> {
    if !has_std(TARGET)? {
        process::require("rustup", "rustup").with_context(|| format!("needs Rust's standard library for {TARGET}"))?;
        process::run(Command::new("rustup").args(["target", "add", TARGET]).current_dir(root()))?;
    }
    if has_std(TARGET)? { Ok(()) } else { bail!("rustup added {TARGET} to another toolchain than the one at hand") }
}

/// The library with the random numbers.
fn shim(dir: &Path) -> Result<PathBuf> {
    let (source, library) = (dir.join("bcryptprimitives.c"), dir.join("bcryptprimitives.dll"));
    if !library.is_file() {
        fs::write(&source, RANDOM_SHIM)?;
        process::run(Command::new(LINKER).args(["-shared", "-O1", "-o"]).arg(&library).arg(&source).arg("-ladvapi32"))?;
    }
    Ok(library)
}

/// Builds for Windows; answers the programs and the C libraries that were made.
fn build(args: &[&str]) -> Result<Vec<PathBuf>> {
    let mut command = cargo();
    command
        .args(args)
        .args(["--target", TARGET, "--message-format", "json-render-diagnostics"])
        .env("CARGO_TARGET_X86_64_PC_WINDOWS_GNU_LINKER", LINKER)
        .stderr(Stdio::inherit());
    println!("cargo {} --target {TARGET}", args.join(" "));
    let output = command.output().context("cannot start cargo")?;
    if !output.status.success() {
        bail!("cargo {} ended with {}", args.join(" "), output.status);
    }
    Ok(products(&String::from_utf8_lossy(&output.stdout)))
}

/// Programs and libraries in cargo's messages.
fn products(messages: &str) -> Vec<PathBuf> {
    let of_message = |message: Value| {
        let program = message["executable"].as_str().map(PathBuf::from);
        let is_library =
            message["target"]["crate_types"].as_array().is_some_and(|kinds| kinds.contains(&"cdylib".into()));
        let files = message["filenames"].as_array().cloned().unwrap_or_default();
        let library = files.iter().filter_map(Value::as_str).map(PathBuf::from).find(|_| is_library);
        program.or(library)
    };
    messages
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|message| message["reason"] == "compiler-artifact")
        .filter_map(of_message)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::products;
    use std::path::PathBuf;

    #[test]
    fn programs_and_libraries_are_found() {
        let messages = r#"
{"reason":"compiler-artifact","target":{"crate_types":["lib"]},"filenames":["/t/libx.rlib"],"executable":null}
{"reason":"compiler-artifact","target":{"crate_types":["cdylib"]},"filenames":["/t/W.dll","/t/libW.dll.a"],"executable":null}
{"reason":"compiler-artifact","target":{"crate_types":["bin"]},"filenames":["/t/a.exe"],"executable":"/t/a.exe"}
{"reason":"build-finished","success":true}"#;
        assert_eq!(products(messages), [PathBuf::from("/t/W.dll"), PathBuf::from("/t/a.exe")]);
    }
}
