//! Building the workspace's programs: as static Linux binaries that run in any initramfs, or as a user does.

use crate::arch::Arch;
use crate::rust::Toolchain;
use crate::workspace;
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// cargo, as the caller of `cargo xtask` runs it, in the workspace.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(workspace::root()).stdin(Stdio::null());
    command
}

/// Builds with the arguments `args` (`build -p …`, `test --no-run …`) for `arch`, static and without debug
/// information, and answers where the executable of the target called `name` is.
pub(crate) fn build_static(arch: &Arch, args: &[&str], name: &str) -> Result<PathBuf> {
    let mut flags = std::env::var("RUSTFLAGS").unwrap_or_default();
    flags += " -C target-feature=+crt-static -C strip=debuginfo";
    let mut command = cargo();
    command
        .args(args)
        .args(["--target", &arch.triple()])
        .env("RUSTFLAGS", flags.trim_start())
        // Nobody measures with these programs, and optimising across crates takes longer than all that they do.
        .env("CARGO_PROFILE_RELEASE_LTO", "off")
        .env_remove("CARGO_ENCODED_RUSTFLAGS");
    Toolchain::for_target(arch)?.apply(&mut command);
    println!("building {name} for {} (static)", arch.rust);
    built(command, name)
}

/// Builds the program `name` of the package `package` for this host, optimised in full, and answers where it is.
pub(crate) fn build_release(package: &str, name: &str) -> Result<PathBuf> {
    let mut command = cargo();
    command.args(["build", "--release", "-p", package, "--bin", name]);
    println!("building {name}");
    built(command, name)
}

/// Runs cargo and answers where the executable of the target called `name` is.
fn built(mut command: Command, name: &str) -> Result<PathBuf> {
    command.args(["--message-format", "json-render-diagnostics"]);
    let output = command.stderr(Stdio::inherit()).output().context("cannot start cargo")?;
    if !output.status.success() {
        bail!("building {name} ended with {}", output.status);
    }
    executable(&String::from_utf8_lossy(&output.stdout), name)
        .with_context(|| format!("cargo built no executable {name}"))
}

/// Finds the executable of the target `name` in cargo's messages.
fn executable(messages: &str, name: &str) -> Option<PathBuf> {
    messages
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|message| message["reason"] == "compiler-artifact" && message["target"]["name"] == name)
        .find_map(|message| message["executable"].as_str().map(PathBuf::from))
}

#[cfg(test)]
mod tests {
    use super::executable;
    use std::path::Path;

    #[test]
    fn the_executable_of_the_named_target_is_found() {
        let messages = r#"
{"reason":"compiler-artifact","target":{"name":"vm-accel"},"executable":null}
{"reason":"compiler-artifact","target":{"name":"other"},"executable":"/t/other"}
not json
{"reason":"compiler-artifact","target":{"name":"vm-accel"},"executable":"/t/vm-accel"}
{"reason":"build-finished","success":true}"#;
        assert_eq!(executable(messages, "vm-accel").as_deref(), Some(Path::new("/t/vm-accel")));
        assert_eq!(executable(messages, "absent"), None);
    }
}
