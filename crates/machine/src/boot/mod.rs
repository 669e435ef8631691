//! Boot protocols: from the bytes of a kernel or firmware image to what stands in guest memory and in the boot CPU's
//! registers.
//!
//! # How it works
//!
//! [`BootRequest::plan`] is a pure function: bytes and a [`MemoryMap`] in, a [`BootPlan`] or a [`BootError`] out. It reads
//! no file, touches no guest memory and depends on no host, so every guest architecture is handled on every host and each
//! parser can be fuzzed. The caller then [loads](BootPlan::load) the plan into memory and sets [`BootPlan::state`] on the
//! boot CPU. [`read_image`] reads a file with its size bounded.
//!
//! | [`Protocol`] | image | the boot CPU begins |
//! |---|---|---|
//! | [`Linux`](Protocol::Linux) | x86 `bzImage` | in 64-bit mode at its 64-bit entry, RSI = zero page |
//! | [`Linux32`](Protocol::Linux32) | x86 `bzImage` | in 32-bit mode at its 32-bit entry, ESI = zero page |
//! | [`Elf`](Protocol::Elf) | ELF64 `vmlinux` | x86: in 64-bit mode, RSI = zero page; aarch64: X0 = device tree |
//! | [`Pvh`](Protocol::Pvh) | ELF with a PVH note | in 32-bit mode, EBX = `hvm_start_info` |
//! | [`Multiboot`](Protocol::Multiboot) | multiboot 1, ELF or flat with addresses in the header | in 32-bit mode, EAX = 0x2BADB002, EBX = information |
//! | [`Flat`](Protocol::Flat) | anything | x86: in real mode at a given address; aarch64: at it, X0 = device tree |
//! | [`Firmware`](Protocol::Firmware) | BIOS or UEFI flash image | at the reset vector, as a real machine |
//! | [`Image`](Protocol::Image) | arm64 `Image`, plain, gzip-compressed or in an EFI zboot wrapper | X0 = device tree |
//!
//! # What is placed where
//!
//! Images go where they ask to. Nothing else has a fixed address: tables (GDT, page tables, zero page, command line, memory
//! map) take the lowest free conventional memory from 0x1000, or, where the image occupies that, the next that is free; RAM disks
//! the highest that the protocol allows. Only ranges of kind [`MemoryKind::Ram`] are used, so a board keeps its
//! own tables safe by marking them reserved.
//!
//! # Hostile input
//!
//! Every offset, length and address in an image is taken to be hostile: reads are bounded by the file, writes by the memory map, and each
//! part is checked against all others before anything is written. Decompression stops at the size of the guest's RAM.
//! No input makes this module panic, loop or allocate beyond that.

mod arm64;
mod detect;
mod elf;
mod error;
mod file;
mod flat;
mod layout;
mod linux;
mod multiboot;
mod plan;
mod pvh;
mod view;
mod x86;

pub use error::BootError;
pub use file::read_image;
pub use layout::{MAX_ADDRESS, MAX_RANGES, MemoryKind, MemoryMap, MemoryRange};
pub use plan::{BootPlan, BootState, Chunk, Mapping, MemorySink};
pub use x86::{X86BootState, X86Mode};

use plan::Builder;
use std::fmt;
use std::str::FromStr;
use view::View;
use vm_accel::GuestArch;

/// Where a flat binary is loaded if nothing else is said: where a PC BIOS puts a boot sector.
pub const DEFAULT_FLAT_ADDRESS: u64 = 0x7c00;

/// Longest command line of any protocol, in bytes; Linux on x86 takes 2,047.
pub const MAX_CMDLINE: usize = 0xffff;

/// A boot protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// x86 Linux `bzImage` by its 64-bit entry. (Linux `Documentation/arch/x86/boot.rst`.)
    Linux,
    /// x86 Linux `bzImage` by its 32-bit entry.
    Linux32,
    /// ELF64 executable, such as `vmlinux`: x86 by Linux' 64-bit entry with a zero page, aarch64 with a device tree.
    Elf,
    /// ELF executable by the entry that its PVH note names. (Xen `docs/misc/pvh.pandoc`, Linux
    /// `arch/x86/platform/pvh`.)
    Pvh,
    /// Multiboot version 1. (GNU Multiboot Specification 0.6.96.)
    Multiboot,
    /// A flat binary at [`BootRequest::flat_address`].
    Flat,
    /// A firmware image that ends at the top of the first 4 GiB, where the reset vector is.
    Firmware,
    /// aarch64 Linux `Image`. (Linux `Documentation/arch/arm64/booting.rst`.)
    Image,
}

impl Protocol {
    /// Every protocol, in the order in which help texts list them.
    pub const ALL: [Self; 8] =
        [Self::Linux, Self::Linux32, Self::Elf, Self::Pvh, Self::Multiboot, Self::Flat, Self::Firmware, Self::Image];

    /// The name by which it is chosen on a command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Linux => "linux",
            Self::Linux32 => "linux32",
            Self::Elf => "elf",
            Self::Pvh => "pvh",
            Self::Multiboot => "multiboot",
            Self::Flat => "flat",
            Self::Firmware => "firmware",
            Self::Image => "image",
        }
    }

    /// Whether guests of architecture `arch` can be booted this way. An ELF file says itself which one it is for.
    #[must_use]
    pub const fn is_for(self, arch: GuestArch) -> bool {
        match self {
            Self::Elf | Self::Flat => true,
            Self::Image => matches!(arch, GuestArch::Aarch64),
            Self::Linux | Self::Linux32 | Self::Pvh | Self::Multiboot | Self::Firmware => {
                matches!(arch, GuestArch::X86_64)
            }
        }
    }

    /// Whether a guest of architecture `arch` can be given a command line and modules.
    #[must_use]
    pub const fn takes_arguments(self, arch: GuestArch) -> bool {
        !matches!((self, arch), (Self::Flat, GuestArch::X86_64) | (Self::Firmware, _))
    }
}

/// What it is, for messages: "a Linux bzImage" without the article.
impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Linux => "Linux bzImage",
            Self::Linux32 => "Linux bzImage (32-bit entry)",
            Self::Elf => "ELF kernel",
            Self::Pvh => "PVH kernel",
            Self::Multiboot => "multiboot kernel",
            Self::Flat => "flat binary",
            Self::Firmware => "firmware image",
            Self::Image => "arm64 Linux Image",
        })
    }
}

/// Which protocol to use: the one that the image shows, or a given one.
///
/// ```
/// use vm_accel_machine::boot::{BootKind, Protocol};
/// assert_eq!("pvh".parse(), Ok(BootKind::Exactly(Protocol::Pvh)));
/// assert_eq!("auto".parse(), Ok(BootKind::Auto));
/// assert!("floppy".parse::<BootKind>().is_err());
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum BootKind {
    /// Detect it from the image.
    #[default]
    Auto,
    /// Use this one; an image that is not of its kind is an error.
    Exactly(Protocol),
}

impl BootKind {
    /// The protocol for `image` on a machine of architecture `arch`: the given one, or the one that the image shows.
    ///
    /// # Errors
    /// [`BootError::Empty`] or [`BootError::Unrecognised`], and what detection finds wrong with a header.
    pub fn protocol(self, image: &[u8], arch: GuestArch) -> Result<Protocol, BootError> {
        if image.is_empty() {
            return Err(BootError::Empty { what: "the image".to_owned() });
        }
        match self {
            Self::Exactly(protocol) => Ok(protocol),
            Self::Auto => detect::detect(image, arch),
        }
    }
}

/// The name by which it is chosen on a command line; parses back.
impl fmt::Display for BootKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Auto => "auto",
            Self::Exactly(protocol) => protocol.name(),
        })
    }
}

impl FromStr for BootKind {
    type Err = UnknownBootKind;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let kinds = std::iter::once(Self::Auto).chain(Protocol::ALL.map(Self::Exactly));
        kinds.into_iter().find(|kind| kind.to_string() == text).ok_or_else(|| UnknownBootKind { name: text.to_owned() })
    }
}

/// A name that is no [`BootKind`]'s.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown boot protocol {name:?}; known are auto, {}", Protocol::ALL.map(Protocol::name).join(", "))]
pub struct UnknownBootKind {
    name: String,
}

/// A file that a guest gets beside its kernel: an initial RAM disk, or a multiboot module.
#[derive(Clone, Copy)]
pub struct Module<'a> {
    /// Its bytes.
    pub data: &'a [u8],
    /// Its own command line, for protocols that give modules one (PVH, multiboot).
    pub cmdline: &'a str,
}

// Files have megabytes: their size says enough.
impl fmt::Debug for Module<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Module {{ {:#x} bytes, cmdline: {:?} }}", self.data.len(), self.cmdline)
    }
}

/// A guest to start: the image and what goes with it.
#[derive(Clone, Copy)]
pub struct BootRequest<'a> {
    /// The guest's architecture.
    pub arch: GuestArch,
    /// Which protocol to use.
    pub kind: BootKind,
    /// The kernel or firmware image.
    pub image: &'a [u8],
    /// A name for the image (a file name without folders). Multiboot kernels find it as the first word of their command
    /// line; white space in it becomes `_`.
    pub name: &'a str,
    /// The command line; at most [`MAX_CMDLINE`] bytes, none of them NUL. Flat binaries and firmware cannot take any.
    pub cmdline: &'a str,
    /// Modules; the first is the initial RAM disk of Linux, which takes at most one.
    pub modules: &'a [Module<'a>],
    /// The memory that the guest is told about.
    pub memory: &'a MemoryMap,
    /// Where the board puts ACPI's root system description pointer, if it has ACPI. Linux and PVH kernels are told.
    pub acpi_rsdp: Option<u64>,
    /// Where a flat binary is loaded and begins.
    pub flat_address: u64,
}

impl fmt::Debug for BootRequest<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BootRequest")
            .field("arch", &self.arch)
            .field("kind", &self.kind)
            .field("image", &format_args!("{:#x} bytes", self.image.len()))
            .field("name", &self.name)
            .field("cmdline", &self.cmdline)
            .field("modules", &self.modules)
            .field("memory", &self.memory)
            .field("acpi_rsdp", &self.acpi_rsdp)
            .field("flat_address", &self.flat_address)
            .finish()
    }
}

impl<'a> BootRequest<'a> {
    /// A request with everything optional left out: kind [`BootKind::Auto`], no command line, no modules.
    #[must_use]
    pub const fn new(arch: GuestArch, image: &'a [u8], memory: &'a MemoryMap) -> Self {
        Self {
            arch,
            kind: BootKind::Auto,
            image,
            name: "kernel",
            cmdline: "",
            modules: &[],
            memory,
            acpi_rsdp: None,
            flat_address: DEFAULT_FLAT_ADDRESS,
        }
    }

    /// Decides where everything goes and how the boot CPU begins. Writes nothing.
    ///
    /// # Errors
    /// Any [`BootError`] but those of files: the image is not recognised, for another architecture, malformed, or does
    /// not fit into the guest's memory.
    pub fn plan(&self) -> Result<BootPlan<'a>, BootError> {
        let protocol = self.kind.protocol(self.image, self.arch)?;
        if self.cmdline.len() > MAX_CMDLINE || self.cmdline.contains('\0') {
            return Err(self.view(protocol).malformed(
                "the command line",
                format!("has {} bytes; at most {MAX_CMDLINE} are possible, none of them NUL", self.cmdline.len()),
            ));
        }
        let builder = Builder::new(protocol, self.memory);
        match (protocol, self.arch) {
            (Protocol::Linux | Protocol::Linux32, GuestArch::X86_64) => linux::bzimage(self, protocol, builder),
            (Protocol::Elf, GuestArch::X86_64) => linux::vmlinux(self, builder),
            (Protocol::Elf, GuestArch::Aarch64) => arm64::elf(self, builder),
            (Protocol::Pvh, GuestArch::X86_64) => pvh::plan(self, builder),
            (Protocol::Multiboot, GuestArch::X86_64) => multiboot::plan(self, builder),
            (Protocol::Flat, GuestArch::X86_64) => flat::real_mode(self, builder),
            (Protocol::Flat, GuestArch::Aarch64) => arm64::flat(self, builder),
            (Protocol::Firmware, GuestArch::X86_64) => flat::firmware(self, builder),
            (Protocol::Image, GuestArch::Aarch64) => arm64::image(self, builder),
            (_, guest) => Err(BootError::WrongArch {
                image: match protocol {
                    Protocol::Image => "arm64 Linux Image",
                    Protocol::Firmware => "kind of firmware image (x86)",
                    _ => "x86 kernel",
                },
                guest,
            }),
        }
    }

    fn view(&self, protocol: Protocol) -> View<'a> {
        View::new(self.image, protocol)
    }

    /// The command line as a C string, if it is no longer than `max` bytes.
    fn cmdline_bytes(&self, protocol: Protocol, max: usize) -> Result<Vec<u8>, BootError> {
        if self.cmdline.len() > max {
            return Err(self.view(protocol).malformed(
                "the command line",
                format!("has {} bytes; this kernel takes at most {max}", self.cmdline.len()),
            ));
        }
        Ok(c_string(self.cmdline))
    }

    /// The initial RAM disk of a protocol that takes at most one module; `None` if there is none or it is empty.
    fn initrd(&self, protocol: Protocol) -> Result<Option<&'a [u8]>, BootError> {
        match self.modules {
            [] => Ok(None),
            [module] => Ok(Some(module.data).filter(|data| !data.is_empty())),
            _ => Err(self
                .view(protocol)
                .unsupported("takes one initial RAM disk; concatenate several (Linux unpacks one after the other)")),
        }
    }

    /// Refuses what a protocol has no way to pass on.
    fn takes_no_arguments(&self, protocol: Protocol) -> Result<(), BootError> {
        if !self.cmdline.is_empty() {
            return Err(self.view(protocol).unsupported("there is no way to give it a command line; leave it out"));
        }
        if !self.modules.is_empty() {
            return Err(self
                .view(protocol)
                .unsupported("there is no way to give it an initial RAM disk; leave it out"));
        }
        Ok(())
    }
}

/// `text` up to its first NUL, with a NUL behind it.
fn c_string(text: &str) -> Vec<u8> {
    let mut bytes: Vec<u8> = text.bytes().take_while(|&byte| byte != 0).collect();
    bytes.push(0);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_protocols_are_for_is_what_can_be_planned() {
        let map = MemoryMap::new(vec![MemoryRange { base: 0, size: 64 << 20, kind: MemoryKind::Ram }]).unwrap();
        for arch in [GuestArch::X86_64, GuestArch::Aarch64] {
            for protocol in Protocol::ALL {
                let plan =
                    BootRequest { kind: BootKind::Exactly(protocol), ..BootRequest::new(arch, &[0; 64], &map) }.plan();
                let refused = matches!(plan, Err(BootError::WrongArch { .. }));
                assert_eq!(refused, !protocol.is_for(arch), "{protocol} on {arch}");
            }
        }
    }
}
