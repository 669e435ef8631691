//! `cargo xtask cross`: what cannot run here compiles at least, and an executable for macOS links.
//!
//! Every target is checked as its users meet it and once more with the simulators' feature, with warnings denied. A
//! target whose standard library is not here is said to be skipped, and the command fails: what was not checked did not pass.

use crate::Usage;
use crate::cargo::cargo;
use crate::process;
use crate::rust;
use crate::workspace::shown;
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

pub(crate) const COMMAND: crate::Command = crate::Command {
    name: "cross",
    summary: "type-check the workspace for other systems; link a Mach-O",
    usage: "\
Usage: cargo xtask cross [--missing] [TARGET…]

Checks the crates that are meant for other systems, all targets of each, with warnings denied and
with and without the feature `sim`. Links the command for macOS if LLVM's linker is here (rustup's
toolchains have it; Debian: apt-get install lld).

  TARGET     only these
  --missing  only print the targets whose standard library is not here (rustup target add …)",
    run,
};

/// A target, and what is checked for it.
struct Target {
    triple: &'static str,
    scope: Scope,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Scope {
    /// Everything but [`LINUX_ONLY`].
    Workspace,
    /// There is no command line: the library alone.
    Library,
}

const fn workspace(triple: &'static str) -> Target {
    Target { triple, scope: Scope::Workspace }
}

const TARGETS: &[Target] = &[
    workspace("x86_64-pc-windows-gnu"),
    workspace("x86_64-pc-windows-msvc"),
    workspace("aarch64-pc-windows-msvc"),
    workspace("x86_64-apple-darwin"),
    workspace(MACH_O),
    Target { triple: "aarch64-apple-ios", scope: Scope::Library },
    workspace("aarch64-unknown-linux-gnu"),
];

/// Tools of the people who work on this, which run on Linux only.
const LINUX_ONLY: [&str; 2] = ["xtask", "vm-accel-nestinit"];

/// What depends on the simulators, and would switch the feature `sim` on for all that is checked with it.
const SIMULATORS: [&str; 2] = ["vm-accel-sim", "vm-accel-sim-dll"];

/// The target that is linked as well.
const MACH_O: &str = "aarch64-apple-darwin";

fn run(args: &[String]) -> Result<u8> {
    let (options, names): (Vec<_>, Vec<_>) = args.iter().map(String::as_str).partition(|arg| arg.starts_with('-'));
    let only_missing = match options[..] {
        [] => false,
        ["--missing"] => true,
        _ => return Err(Usage::error(format!("no option {}", options.join(" ")))),
    };
    if let Some(unknown) = names.iter().find(|name| TARGETS.iter().all(|target| target.triple != **name)) {
        let known: Vec<_> = TARGETS.iter().map(|target| target.triple).collect();
        return Err(Usage::error(format!("no target {unknown}; there are {}", known.join(", "))));
    }
    let wanted = TARGETS.iter().filter(|target| names.is_empty() || names.contains(&target.triple));
    let (mut here, mut missing) = (Vec::new(), Vec::new());
    for target in wanted {
        if rust::has_std(target.triple)? { here.push(target) } else { missing.push(target.triple) }
    }
    if only_missing {
        missing.iter().for_each(|triple| println!("{triple}"));
        return Ok(0);
    }
    // All of them, whatever comes of one: the reader sees which systems a mistake concerns.
    let failed: Vec<_> = here.iter().filter(|target| check(target).map_err(tell).is_err()).collect();
    if failed.is_empty() && here.iter().any(|target| target.triple == MACH_O) {
        match find_linker()? {
            Some(linker) => println!("cross: linked {}", shown(&link_mach_o(&linker)?)),
            None => println!("cross: skipped linking for macOS: there is no rust-lld and no lld"),
        }
    }
    println!("cross: {} of {} targets are clean, with and without sim", here.len() - failed.len(), here.len());
    if !missing.is_empty() {
        let list = missing.join(" ");
        bail!("skipped, for want of their standard libraries: {list} (rustup target add {list})");
    }
    if !failed.is_empty() {
        bail!("these are not: {}", failed.iter().map(|target| target.triple).collect::<Vec<_>>().join(" "));
    }
    Ok(0)
}

fn tell(error: anyhow::Error) {
    eprintln!("cross: {error:#}");
}

/// cargo for a target, with artifacts of its own: warnings are denied for these and not for others.
fn cargo_for(command: &str, triple: &str, flags: &str) -> Command {
    let mut cargo = cargo();
    cargo
        .args([command, "--quiet", "--target", triple])
        .env("CARGO_TARGET_DIR", target_dir())
        .env("RUSTFLAGS", flags)
        .env_remove("CARGO_ENCODED_RUSTFLAGS");
    cargo
}

fn check(target: &Target) -> Result<()> {
    let mut plain = cargo_for("check", target.triple, "-Dwarnings");
    let mut sim = cargo_for("check", target.triple, "-Dwarnings");
    match target.scope {
        Scope::Workspace => {
            plain.args(["--workspace", "--all-targets"]);
            plain.args(LINUX_ONLY.into_iter().chain(SIMULATORS).flat_map(|name| ["--exclude", name]));
            sim.args(["-p", "vm-accel", "--all-targets", "--features", "vm-accel/sim"]);
            sim.args(SIMULATORS.into_iter().flat_map(|name| ["-p", name]));
        }
        Scope::Library => {
            plain.args(["-p", "vm-accel"]);
            sim.args(["-p", "vm-accel", "--features", "sim"]);
        }
    }
    process::run(&mut plain)?;
    process::run(&mut sim)
}

/// Links the command for macOS against stand-ins for the system's libraries: no symbol is looked up, but all code is generated
/// and laid out, which a check does not do.
fn link_mach_o(linker: &Path) -> Result<PathBuf> {
    let sdk = target_dir().join("sdk");
    write_sdk(&sdk)?;
    let flags = format!(
        "-Dwarnings -Clinker={} -Clinker-flavor=ld64.lld -Clink-arg=-undefined -Clink-arg=dynamic_lookup",
        linker.display()
    );
    let mut build = cargo_for("build", MACH_O, &flags);
    build.args(["-p", "vm-accel-cli"]).env("SDKROOT", &sdk);
    process::run(&mut build)?;
    let program = target_dir().join(MACH_O).join("debug/vm-accel");
    let bytes = fs::read(&program).with_context(|| format!("cannot read {}", shown(&program)))?;
    // MH_MAGIC_64 (mach-o/loader.h), little endian.
    if !bytes.starts_with(&0xfeed_facf_u32.to_le_bytes()) {
        bail!("{} is no 64-bit Mach-O file", shown(&program));
    }
    Ok(program)
}

/// Text stubs (format TBD version 4) that name libraries and no symbols.
fn write_sdk(sdk: &Path) -> Result<()> {
    const LIBRARIES: [&str; 5] = ["libSystem", "libobjc", "libiconv", "libc", "libm"];
    const FRAMEWORKS: [&str; 3] = ["CoreFoundation", "Foundation", "Virtualization"];
    let libraries = LIBRARIES.map(|name| (format!("usr/lib/{name}.tbd"), format!("/usr/lib/{name}.dylib")));
    let frameworks = FRAMEWORKS.map(|name| {
        let path = format!("System/Library/Frameworks/{name}.framework/{name}");
        (format!("{path}.tbd"), format!("/{path}"))
    });
    for (stub, name) in libraries.iter().chain(&frameworks) {
        let path = sdk.join(stub);
        fs::create_dir_all(path.parent().expect("a stub lies in a folder"))?;
        let text = format!(
            "--- !tapi-tbd\ntbd-version: 4\ntargets: [ arm64-macos ]\ninstall-name: '{name}'\nexports: []\n...\n"
        );
        fs::write(&path, text).with_context(|| format!("cannot write {}", shown(&path)))?;
    }
    Ok(())
}

/// LLVM's linker, which links Mach-O when it is called with that flavor: rustup's, or one in `PATH`, where Debian appends a
/// version to the name.
fn find_linker() -> Result<Option<PathBuf>> {
    let libdir = process::text(rust::rustc().args(["--print", "target-libdir"]))?;
    let bundled = Path::new(libdir.trim()).with_file_name("bin").join("rust-lld");
    let path = std::env::var_os("PATH").unwrap_or_default();
    let names: Vec<String> =
        std::iter::once("lld".to_owned()).chain((14..40).rev().map(|version| format!("lld-{version}"))).collect();
    let installed = std::env::split_paths(&path).flat_map(|dir| names.iter().map(move |name| dir.join(name)));
    Ok(std::iter::once(bundled).chain(installed).find(|program| program.is_file()))
}

fn target_dir() -> PathBuf {
    rust::target_dir().join("cross")
}
