//! `cargo xtask guests`: kernels, modules, busybox and firmware from Debian, under stable names.

use crate::Usage;
use crate::apt::Apt;
use crate::arch::Arch;
use crate::process;
use crate::workspace::shown;
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command as Process;

pub(crate) const COMMAND: crate::Command = crate::Command {
    name: "guests",
    summary: "fetch Debian's kernels, busybox and firmware into guests-cache/",
    usage: "\
Usage: cargo xtask guests [x86] [arm64] [--update]

Fetches by apt, without installing anything and without being root, from the apt sources
of this machine. What is already there is kept.

  --update   fetch the package lists and the newest packages even so

Leaves guests-cache/{x86_64,aarch64}/:
  vmlinuz                 Debian's cloud kernel
  modules/*.ko            KVM's modules (x86 only; arm64 kernels have KVM built in)
  busybox                 static
  firmware/seabios.bin    x86 only
  PACKAGES                which packages these are",
    run,
};

/// A package and what to take from it.
struct Source {
    package: &'static str,
    /// For a meta package: the beginning of the name of the package it stands for.
    stands_for: Option<&'static str>,
    /// Debian's `all` packages have no architecture of their own.
    any_arch: bool,
    /// Where a file is in the package (`*` matches anything), and its name in the cache.
    take: &'static [(&'static str, &'static str)],
}

const X86: &[Source] = &[
    Source {
        package: "linux-image-cloud-amd64",
        stands_for: Some("linux-image-"),
        any_arch: false,
        // Later Debian releases compress modules and move /lib below /usr.
        take: &[
            ("boot/vmlinuz-*", "vmlinuz"),
            ("*/virt/lib/irqbypass.ko*", "modules/irqbypass.ko"),
            ("*/arch/x86/kvm/kvm.ko*", "modules/kvm.ko"),
            ("*/arch/x86/kvm/kvm-amd.ko*", "modules/kvm-amd.ko"),
        ],
    },
    BUSYBOX,
    Source {
        package: "seabios",
        stands_for: None,
        any_arch: true,
        take: &[("usr/share/seabios/bios-256k.bin", "firmware/seabios.bin")],
    },
];

const ARM64: &[Source] = &[
    Source {
        package: "linux-image-cloud-arm64",
        stands_for: Some("linux-image-"),
        any_arch: false,
        take: &[("boot/vmlinuz-*", "vmlinuz")],
    },
    BUSYBOX,
];

const BUSYBOX: Source =
    Source { package: "busybox-static", stands_for: None, any_arch: false, take: &[("*bin/busybox", "busybox")] };

/// The list of what was fetched. Written last: without it, the folder is not complete.
const RECORD: &str = "PACKAGES";

fn run(args: &[String]) -> Result<u8> {
    let (flags, names): (Vec<&str>, Vec<&str>) = args.iter().map(String::as_str).partition(|a| a.starts_with('-'));
    if let Some(flag) = flags.iter().find(|f| **f != "--update") {
        return Err(Usage::error(format!("no option '{flag}'")));
    }
    if !flags.is_empty() {
        Apt::expire_lists()?;
    }
    for arch in Arch::named_or_all(names)? {
        if flags.is_empty() && is_complete(arch) {
            let packages = fs::read_to_string(arch.dir().join(RECORD))?;
            println!("{}: up to date\n{}", shown(&arch.dir()), indented(&packages));
        } else {
            fetch(arch)?;
        }
    }
    Ok(0)
}

/// Fetches what the cache lacks for `arch`.
pub(crate) fn ensure(arch: &Arch) -> Result<()> {
    if !is_complete(arch) {
        fetch(arch)?;
    }
    Ok(())
}

fn sources(arch: &Arch) -> &'static [Source] {
    match arch.debian {
        "amd64" => X86,
        _ => ARM64,
    }
}

fn is_complete(arch: &Arch) -> bool {
    let names = sources(arch).iter().flat_map(|s| s.take).map(|(_, name)| *name);
    names.chain([RECORD]).all(|name| arch.dir().join(name).is_file())
}

fn fetch(arch: &Arch) -> Result<()> {
    let dir = arch.dir();
    let apt = Apt::open()?;
    fs::create_dir_all(&dir)?;
    let mut packages = String::new();
    for source in sources(arch) {
        let name = |package: &str| match source.any_arch {
            true => package.to_owned(),
            false => format!("{package}:{}", arch.debian),
        };
        let package = match source.stands_for {
            Some(prefix) => name(&apt.dependency(&name(source.package), prefix)?),
            None => name(source.package),
        };
        let version = apt.version(&package, "")?;
        println!("fetching {package} {version}");
        let unpacked = apt.scratch(arch.rust)?;
        apt.unpack(&format!("{package}={version}"), &unpacked)?;
        let files = walk(&unpacked)?;
        for (pattern, to) in source.take {
            let from = only_match(&files, &unpacked, pattern).with_context(|| format!("in package {package}"))?;
            store(from, &dir.join(to))?;
        }
        fs::remove_dir_all(&unpacked)?;
        packages += &format!("{package} {version}\n");
    }
    fs::write(dir.join(RECORD), &packages)?;
    println!("{}: complete\n{}", shown(&dir), indented(&packages));
    Ok(())
}

fn indented(text: &str) -> String {
    text.lines().map(|l| format!("  {l}")).collect::<Vec<_>>().join("\n")
}

/// All regular files below `dir`. Links are not followed: a package could point anywhere.
fn walk(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut pending = vec![dir.to_owned()];
    while let Some(dir) = pending.pop() {
        for entry in fs::read_dir(&dir)? {
            let entry = entry?;
            match entry.file_type()? {
                kind if kind.is_dir() => pending.push(entry.path()),
                kind if kind.is_file() => files.push(entry.path()),
                _ => {}
            }
        }
    }
    Ok(files)
}

fn only_match<'a>(files: &'a [PathBuf], root: &Path, pattern: &str) -> Result<&'a Path> {
    let matches: Vec<&PathBuf> =
        files.iter().filter(|f| f.strip_prefix(root).is_ok_and(|f| glob(pattern, &f.to_string_lossy()))).collect();
    match matches[..] {
        [one] => Ok(one),
        [] => bail!("no file {pattern}"),
        _ => bail!("{} files {pattern}", matches.len()),
    }
}

/// Whether `text` matches `pattern`, where `*` stands for any text, also across folders.
fn glob(pattern: &str, text: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == text,
        Some((head, tail)) => text
            .strip_prefix(head)
            .is_some_and(|rest| (0..=rest.len()).any(|i| rest.get(i..).is_some_and(|rest| glob(tail, rest)))),
    }
}

/// Puts `from` in place under its stable name, uncompressed; never leaves half a file there.
fn store(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to.parent().context("a file has a folder")?)?;
    let unpacker = match from.extension().and_then(|e| e.to_str()) {
        Some("xz") => Some(("xz", "xz-utils")),
        Some("zst") => Some(("zstd", "zstd")),
        _ => None,
    };
    let partial = to.with_extension("partial");
    match unpacker {
        Some((program, package)) => {
            process::require(program, package)?;
            fs::write(&partial, process::output(Process::new(program).arg("-dc").arg(from))?)?;
        }
        None => {
            fs::copy(from, &partial)?;
        }
    }
    fs::rename(&partial, to)?;
    println!("  {} ({} KiB)", shown(to), fs::metadata(to)?.len() / 1024);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::glob;

    #[test]
    fn glob_matches_any_text_at_each_star() {
        assert!(glob("boot/vmlinuz-*", "boot/vmlinuz-6.1.0-56-cloud-amd64"));
        assert!(glob("*/kvm.ko*", "lib/modules/6.1/kernel/arch/x86/kvm/kvm.ko.xz"));
        assert!(glob("*bin/busybox", "bin/busybox"));
        assert!(glob("*bin/busybox", "usr/bin/busybox"));
        assert!(!glob("*/kvm.ko*", "lib/modules/kvm-amd.ko"));
        assert!(!glob("boot/vmlinuz-*", "usr/boot/vmlinuz-6.1"));
        assert!(!glob("*bin/busybox", "usr/share/bin/busybox.1"));
    }
}
