//! Finds out what an image is. A wrong guess costs a user more than a question, so detection asks for a format's magic
//! number, and says what an unknown file looks like instead of trying it.

use super::view::View;
use super::{BootError, Protocol, arm64, elf, flat, linux, multiboot};
use vm_accel::GuestArch;

/// Files that people give by mistake: offset, magic number, and what to tell them.
const MISTAKEN: &[(usize, &[u8], &str)] = &[
    (0, b"\xff\xd8\xff", "it looks like a JPEG picture"),
    (0, b"\x89PNG", "it looks like a PNG picture"),
    (0, b"GIF8", "it looks like a GIF picture"),
    (0, b"%PDF", "it looks like a PDF document"),
    (0, b"#!", "it looks like a script"),
    (0, b"PK\x03\x04", "it looks like a ZIP archive; unpack it first"),
    (0, b"!<arch>", "it looks like a package or a library archive; unpack it first"),
    (0, b"\xed\xab\xee\xdb", "it looks like an RPM package; unpack it first"),
    (257, b"ustar", "it looks like a tar archive; unpack it first"),
    (0, b"070701", "it looks like an initial RAM disk (cpio); give it as the initrd, with a kernel"),
    (0, b"070702", "it looks like an initial RAM disk (cpio); give it as the initrd, with a kernel"),
    (0, b"\x1f\x8b", "it is gzip-compressed (an initial RAM disk, or a kernel to unpack first)"),
    (0, b"\xfd7zXZ", "it is xz-compressed (an initial RAM disk, or a kernel to unpack first)"),
    (0, b"\x28\xb5\x2f\xfd", "it is zstd-compressed (an initial RAM disk, or a kernel to unpack first)"),
    (0, b"\x02\x21\x4c\x18", "it is lz4-compressed (an initial RAM disk, or a kernel to unpack first)"),
    (0, b"BZh", "it is bzip2-compressed; unpack it first"),
    (0, b"QFI\xfb", "it looks like a qcow2 disk image; a kernel is needed to boot from a disk"),
    (0x8001, b"CD001", "it looks like a CD or DVD image; a kernel is needed to boot from it"),
    (512, b"EFI PART", "it looks like a disk image; a kernel is needed to boot from a disk"),
    (0, b"\x27\x05\x19\x56", "it looks like a U-Boot image; give the kernel inside it"),
    (0, b"\xd0\x0d\xfe\xed", "it looks like a device tree or a FIT image; give the kernel inside it"),
    (0, b"\xcf\xfa\xed\xfe", "it looks like a program for macOS"),
    (
        0,
        b"MZ",
        "it looks like an EFI application or a program for Windows; EFI applications need a firmware image to run",
    ),
    (510, b"\x55\xaa", "it looks like a disk image; to run its boot sector in real mode, choose the protocol flat"),
];

/// The protocol of an image.
pub(crate) fn detect(image: &[u8], arch: GuestArch) -> Result<Protocol, BootError> {
    if linux::is_bzimage(image) {
        let header = View::new(image, Protocol::Linux);
        return linux::preferred_entry(header);
    }
    if arm64::is_image(image) || (arch == GuestArch::Aarch64 && arm64::is_compressed(image)) {
        return Ok(Protocol::Image);
    }
    if multiboot::find_header(image).is_some() {
        return Ok(Protocol::Multiboot);
    }
    if elf::is_elf(image) {
        return detect_elf(image, arch);
    }
    if let Some((.., guess)) = MISTAKEN.iter().find(|(offset, magic, _)| {
        // A boot sector alone is for the flat protocol, which takes no more than it.
        image.get(*offset..).is_some_and(|rest| rest.starts_with(magic)) && !flat::is_boot_sector(image)
    }) {
        return Err(BootError::Unrecognised { guess });
    }
    if flat::is_boot_sector(image) {
        return Ok(Protocol::Flat);
    }
    if flat::is_firmware(image) {
        return Ok(Protocol::Firmware);
    }
    let text = image.iter().take(512).all(|&byte| byte.is_ascii_graphic() || byte.is_ascii_whitespace());
    Err(BootError::Unrecognised {
        guess: if text {
            "it looks like a text file"
        } else {
            "it has no header of a known format; if it is a flat binary or a firmware image, choose that protocol"
        },
    })
}

/// What an ELF file is for. Errors name the header's field.
fn detect_elf(image: &[u8], arch: GuestArch) -> Result<Protocol, BootError> {
    let elf = elf::Elf::parse(View::new(image, Protocol::Elf))?;
    match (elf.machine, arch) {
        (elf::EM_386 | elf::EM_X86_64, GuestArch::X86_64) => {}
        (elf::EM_AARCH64, GuestArch::Aarch64) => return Ok(Protocol::Elf),
        (machine, guest) => {
            return Err(BootError::WrongArch {
                image: match machine {
                    elf::EM_386 | elf::EM_X86_64 => "x86 ELF file",
                    elf::EM_AARCH64 => "arm64 ELF file",
                    _ => "ELF file",
                },
                guest,
            });
        }
    }
    if elf.pvh_entry()?.is_some() {
        return Ok(Protocol::Pvh);
    }
    if elf.machine == elf::EM_386 {
        return Err(BootError::Unrecognised {
            guess: "it is a 32-bit ELF file with neither a multiboot header nor a PVH note",
        });
    }
    Ok(Protocol::Elf)
}
