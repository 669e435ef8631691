//! The guest architectures of the nested harness, as data.

use crate::Usage;
use crate::workspace;
use anyhow::Result;
use std::path::PathBuf;

/// What the harness must know about an architecture.
#[derive(Debug)]
pub(crate) struct Arch {
    /// The name on the command line.
    pub(crate) name: &'static str,
    /// The name in Rust's targets, in Debian's cross tools and of the folder in the cache.
    pub(crate) rust: &'static str,
    /// The name in Debian's archive.
    pub(crate) debian: &'static str,
    /// The emulator and the Debian package that has it.
    pub(crate) qemu: [&'static str; 2],
    /// The machine that gives the kernel inside a working KVM.
    pub(crate) machine: &'static [&'static str],
    /// The kernel's name for the first serial line.
    pub(crate) console: &'static str,
    /// Modules to load, in order, before `/dev/kvm` exists.
    pub(crate) modules: &'static [&'static str],
}

/// x86-64 with AMD's SVM, which is what TCG emulates.
///
/// One CPU only: with two, QEMU 7.2 hung in 7 of 12 runs; one CPU never did.
pub(crate) static X86: Arch = Arch {
    name: "x86",
    rust: "x86_64",
    debian: "amd64",
    qemu: ["qemu-system-x86_64", "qemu-system-x86"],
    machine: &["-M", "pc", "-cpu", "max,+svm,+npt", "-smp", "1"],
    console: "ttyS0",
    modules: &["irqbypass.ko", "kvm.ko", "kvm-amd.ko"],
};

/// arm64 with EL2.
///
/// `sve=off`: QEMU runs stale guest code after the VMM rewrote it with SVE stores. `pauth-impdef=on`: the
/// architected pointer authentication algorithm is several times slower to emulate.
pub(crate) static ARM64: Arch = Arch {
    name: "arm64",
    rust: "aarch64",
    debian: "arm64",
    qemu: ["qemu-system-aarch64", "qemu-system-arm"],
    machine: &["-M", "virt,virtualization=on,gic-version=3", "-cpu", "max,pauth-impdef=on,sve=off", "-smp", "1"],
    console: "ttyAMA0",
    modules: &[],
};

/// All of them.
pub(crate) static ALL: [&Arch; 2] = [&X86, &ARM64];

impl Arch {
    /// The architecture called `name`, also by its other usual names.
    pub(crate) fn named(name: &str) -> Result<&'static Self> {
        ALL.into_iter()
            .find(|a| [a.name, a.rust, a.debian].contains(&name))
            .ok_or_else(|| Usage::error(format!("no architecture '{name}': x86 or arm64")))
    }

    /// The architectures that a list of arguments names; all without any, or with `all`.
    pub(crate) fn named_or_all<'a>(names: impl IntoIterator<Item = &'a str>) -> Result<Vec<&'static Self>> {
        let names: Vec<&str> = names.into_iter().collect();
        if names.is_empty() || names == ["all"] {
            return Ok(ALL.to_vec());
        }
        names.into_iter().map(Self::named).collect()
    }

    /// The folder with the architecture's kernel, modules, tools and initrd.
    pub(crate) fn dir(&self) -> PathBuf {
        workspace::cache().join(self.rust)
    }

    /// The kernel that runs in the emulator, and again inside it as the guest of `vm-accel`.
    pub(crate) fn kernel(&self) -> PathBuf {
        self.dir().join("vmlinuz")
    }

    /// The initrd whose init reports and powers off.
    pub(crate) fn initrd(&self) -> PathBuf {
        self.dir().join("initrd.cpio")
    }

    /// Rust's name of the Linux target.
    pub(crate) fn triple(&self) -> String {
        format!("{}-unknown-linux-gnu", self.rust)
    }
}
