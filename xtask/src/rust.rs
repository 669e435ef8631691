//! Rust toolchains beside the one at hand: Debian's, unpacked below `guests-cache/rust` and never installed.
//!
//! Debian carries the oldest Rust that the library promises to build with, and the standard library for arm64; rustup
//! has both too, but not on a machine that only reaches Debian's archive.

use crate::apt::Apt;
use crate::arch::Arch;
use crate::process;
use crate::workspace::{self, shown};
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What `cargo` needs to be told to compile for a target.
#[derive(Debug, Default)]
pub(crate) struct Toolchain {
    /// The compiler, if it is not the one at hand.
    rustc: Option<PathBuf>,
    /// Artifacts of another compiler lie apart, so that the two do not rebuild each other's.
    target_dir: Option<PathBuf>,
    /// Variable and value naming the linker, for a foreign architecture.
    linker: Option<(String, String)>,
}

impl Toolchain {
    /// One that compiles static binaries for `arch`: the compiler at hand if it has the target's standard library,
    /// else Debian's.
    pub(crate) fn for_target(arch: &Arch) -> Result<Self> {
        let mut toolchain = if has_std(&arch.triple())? { Self::default() } else { Self::debian("", arch)? };
        if arch.rust != std::env::consts::ARCH {
            let linker = format!("{}-linux-gnu-gcc", arch.rust);
            process::require(&linker, &format!("gcc-{}-linux-gnu libc6-dev-{}-cross", arch.rust, arch.debian))?;
            let variable = format!("CARGO_TARGET_{}_LINKER", arch.triple().to_uppercase().replace('-', "_"));
            toolchain.linker = Some((variable, linker));
        }
        Ok(toolchain)
    }

    /// Debian's newest Rust whose version begins with `version`, with the standard library for `arch`.
    pub(crate) fn debian(version: &str, arch: &Arch) -> Result<Self> {
        let host = Arch::named(std::env::consts::ARCH).context("Debian's Rust is fetched for x86-64 and arm64 only")?;
        let name = if version.is_empty() { "newest" } else { version };
        let dir = workspace::cache().join("rust").join(format!("{name}-{}", arch.rust));
        let rustc = dir.join("rustc");
        // The wrapper is written last: where it is, the rest is complete.
        if !rustc.is_file() {
            let apt = Apt::open()?;
            let package = format!("rustc-web:{}", host.debian);
            let full = apt.version(&package, version)?;
            println!("fetching Rust {full} from Debian into {}", shown(&dir));
            if dir.exists() {
                fs::remove_dir_all(&dir)?;
            }
            apt.unpack(&format!("{package}={full}"), &dir)?;
            let std = format!("libstd-rust-web-dev:{}", host.debian);
            let shared = apt.dependency(&format!("{std}={full}"), "libstd-rust-web-")?;
            apt.unpack(&format!("{std}={full}"), &dir)?;
            apt.unpack(&format!("{shared}:{}={full}", host.debian), &dir)?;
            if arch.debian != host.debian {
                apt.unpack(&format!("libstd-rust-web-dev:{}={full}", arch.debian), &dir)?;
            }
            let llvm = apt.dependency(&format!("{shared}:{}={full}", host.debian), "libllvm")?;
            apt.unpack(&format!("{llvm}:{}", host.debian), &dir)?;
            write_wrapper(&rustc, &dir, host)?;
            println!("  {}", process::text(Command::new(&rustc).arg("-V"))?.trim());
        }
        Ok(Self { rustc: Some(rustc), target_dir: Some(target_dir().join(format!("debian-{name}"))), linker: None })
    }

    /// Makes `command`, a cargo, use this toolchain.
    pub(crate) fn apply(&self, command: &mut Command) {
        if let Some(rustc) = &self.rustc {
            command.env("RUSTC", rustc).env_remove("RUSTC_WRAPPER");
        }
        if let Some(dir) = &self.target_dir {
            command.env("CARGO_TARGET_DIR", dir);
        }
        if let Some((variable, linker)) = &self.linker {
            command.env(variable, linker);
        }
    }
}

/// A script in front of the unpacked compiler: only the compiler shall see the libraries that came with it.
fn write_wrapper(path: &Path, dir: &Path, host: &Arch) -> Result<()> {
    let library_dir = dir.join("usr/lib").join(format!("{}-linux-gnu", host.rust));
    let rustc = dir.join("usr/bin/rustc");
    if !rustc.exists() {
        bail!("Debian's package has no {}", shown(&rustc));
    }
    let script = format!(
        "#!/bin/sh\nLD_LIBRARY_PATH='{}' exec '{}' --sysroot '{}' \"$@\"\n",
        library_dir.display(),
        rustc.display(),
        dir.join("usr").display()
    );
    fs::write(path, script)?;
    process::run(Command::new("chmod").arg("+x").arg(path))
}

/// The compiler at hand, run in the workspace, as cargo would run it.
pub(crate) fn rustc() -> Command {
    let mut rustc = Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
    rustc.current_dir(workspace::root());
    rustc
}

/// Whether the compiler at hand has the standard library of the target `triple`.
pub(crate) fn has_std(triple: &str) -> Result<bool> {
    let dir = process::text(rustc().args(["--print", "target-libdir", "--target", triple]))?;
    let found = fs::read_dir(dir.trim())
        .is_ok_and(|entries| entries.flatten().any(|e| e.file_name().to_string_lossy().starts_with("libstd-")));
    Ok(found)
}

/// Where cargo puts what it builds.
pub(crate) fn target_dir() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace::root().join("target"), PathBuf::from)
}
