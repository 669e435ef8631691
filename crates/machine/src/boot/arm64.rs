//! aarch64: Linux' `Image`, also compressed, ELF kernels and flat binaries. All of them take a device tree in X0.
//!
//! (Linux `Documentation/arch/arm64/booting.rst` for the header, placement and the CPU's state;
//! `drivers/firmware/efi/libstub/zboot-header.S` for the wrapper around compressed kernels.)

use super::elf::{self, Elf};
use super::layout::Side;
use super::plan::{BootPlan, BootState, Builder};
use super::view::View;
use super::{BootError, BootRequest, MAX_ADDRESS, Protocol};
use std::borrow::Cow;
use std::io::Read;
use vm_accel::GuestRegs;
use vm_accel::aarch64::Reg;

const TEXT_OFFSET: u64 = 8;
const IMAGE_SIZE: u64 = 16;
const FLAGS: u64 = 24;
const MAGIC: u64 = 56;
const PE_OFFSET: u64 = 60;
const HEADER_SIZE: u64 = 64;
const IMAGE_MAGIC: &[u8] = b"ARM\x64";
const FLAG_BIG_ENDIAN: u64 = 1;
/// Where kernels without an image size (before Linux 3.17) begin.
const OLD_TEXT_OFFSET: u64 = 0x8_0000;

const GZIP_MAGIC: &[u8] = b"\x1f\x8b";
/// "MZ", two zero bytes, "zimg"; then offset and size of the payload, and at 24 how it is compressed.
const ZBOOT_MAGIC: &[u8] = b"MZ\0\0zimg";
const ZBOOT_PAYLOAD_OFFSET: u64 = 8;
const ZBOOT_PAYLOAD_SIZE: u64 = 12;
const ZBOOT_COMPRESSION: u64 = 24;

const MIB: u64 = 1 << 20;
const PAGE: u64 = 0x1000;
/// A kernel's base, and the place of a device tree, which must not be larger.
const BLOCK: u64 = 2 * MIB;
/// Kernel and RAM disk fit into a window of this size that begins at a multiple of 1 GiB.
const INITRD_WINDOW: u64 = 32 << 30;
const GIB: u64 = 1 << 30;
/// EL1h, with debug exceptions, SErrors, IRQs and FIQs masked.
const PSTATE: u64 = 0x3c5;

/// True if it has the header of an uncompressed `Image`.
pub(crate) fn is_image(image: &[u8]) -> bool {
    image.get(MAGIC as usize..).is_some_and(|rest| rest.starts_with(IMAGE_MAGIC))
}

/// True if it may unpack to an `Image`.
pub(crate) fn is_compressed(image: &[u8]) -> bool {
    image.starts_with(GZIP_MAGIC) || image.starts_with(ZBOOT_MAGIC)
}

/// The uncompressed image, no larger than `limit` bytes.
fn unpack<'a>(view: View<'a>, limit: u64) -> Result<Cow<'a, [u8]>, BootError> {
    let packed = if view.data.starts_with(ZBOOT_MAGIC) {
        let compression = view.bytes("the compression type", ZBOOT_COMPRESSION, 5)?;
        if compression != b"gzip\0" {
            return Err(view.unsupported("is not compressed by gzip; unpack the kernel first"));
        }
        let offset = view.u32("payload_offset", ZBOOT_PAYLOAD_OFFSET)?;
        let size = view.u32("payload_size", ZBOOT_PAYLOAD_SIZE)?;
        view.bytes("the compressed payload", offset.into(), size.into())?
    } else if view.data.starts_with(GZIP_MAGIC) {
        view.data
    } else {
        return Ok(Cow::Borrowed(view.data));
    };
    let mut image = Vec::new();
    let mut decoder = flate2::read::GzDecoder::new(packed).take(limit.saturating_add(1));
    decoder.read_to_end(&mut image).map_err(|error| {
        view.malformed("the compressed data", format!("is damaged after {} unpacked bytes: {error}", image.len()))
    })?;
    if image.len() as u64 > limit {
        return Err(BootError::TooLarge { what: "the unpacked kernel".to_owned(), size: image.len() as u64, limit });
    }
    Ok(Cow::Owned(image))
}

/// Finds out whether the end of an `Image` is missing. Its own header does not tell, as `image_size` counts memory; but
/// kernels with an EFI stub are PE files too, whose sections do. (Microsoft PE format, "COFF File Header".)
fn check_sections(view: View<'_>) -> Result<(), BootError> {
    const FIELD: &str = "a section of its PE header";
    let header = u64::from(view.u32("the offset of its PE header", PE_OFFSET)?);
    if !view.data.starts_with(b"MZ") || header == 0 {
        return Ok(());
    }
    let sections = view.u16("the number of its PE sections", header + 6)?;
    let optional = view.u16("the size of its optional PE header", header + 20)?;
    for index in 0..u64::from(sections) {
        let section = header + 24 + u64::from(optional) + index * 40;
        let size = view.u32(FIELD, section + 16)?;
        let offset = view.u32(FIELD, section + 20)?;
        view.bytes(FIELD, offset.into(), size.into())?;
    }
    Ok(())
}

/// Plans an `Image`.
pub(crate) fn image<'a>(request: &BootRequest<'a>, mut builder: Builder<'a>) -> Result<BootPlan<'a>, BootError> {
    const WHAT: &str = "the kernel (text_offset, image_size)";
    let protocol = Protocol::Image;
    let image = unpack(request.view(protocol), request.memory.ram_size())?;
    let view = View::new(&image, protocol);
    view.bytes("the header", 0, HEADER_SIZE)?;
    if !is_image(&image) {
        return Err(view.malformed("the magic number", "(ARM\\x64 at offset 56) is not there; this is no arm64 Image"));
    }
    check_sections(view)?;
    if view.u64("flags", FLAGS)? & FLAG_BIG_ENDIAN != 0 {
        return Err(view.unsupported("is a big-endian kernel; the machine is little-endian"));
    }
    let (text_offset, size) = match view.u64("image_size", IMAGE_SIZE)? {
        0 => (OLD_TEXT_OFFSET, view.len()),
        // More in the file than that is a signature or the like.
        size => (view.u64("text_offset", TEXT_OFFSET)?, size.max(view.len())),
    };
    let needed = text_offset.checked_add(size).filter(|&needed| needed <= MAX_ADDRESS).ok_or_else(|| {
        view.malformed("text_offset", format!("({text_offset:#x}) and image_size ({size:#x}) are too large"))
    })?;
    let zeros = size - view.len();
    // What precedes the kernel in its block is reserved too: kernels before 4.6 cannot use it, and nobody misses it.
    let base = builder.reserve(WHAT, needed, BLOCK, 0..MAX_ADDRESS, Side::Bottom)?;
    let entry = base + text_offset;
    builder.fill(WHAT, entry, image, zeros);
    finish(request, protocol, builder, entry, base + needed)
}

/// Plans an ELF kernel, or one that runs where its headers say.
pub(crate) fn elf<'a>(request: &BootRequest<'a>, mut builder: Builder<'a>) -> Result<BootPlan<'a>, BootError> {
    let elf = Elf::parse(request.view(Protocol::Elf))?;
    elf::require_machine(&elf, &[elf::EM_AARCH64], "183 (aarch64)")?;
    if !elf.is_64bit {
        return Err(request
            .view(Protocol::Elf)
            .malformed("e_ident[EI_CLASS]", "is 1: a 32-bit file for a 64-bit machine"));
    }
    let entry = elf.physical_entry()?;
    let end = elf.place(&mut builder)?;
    finish(request, Protocol::Elf, builder, entry, end)
}

/// Plans a flat binary at the given address.
pub(crate) fn flat<'a>(request: &BootRequest<'a>, mut builder: Builder<'a>) -> Result<BootPlan<'a>, BootError> {
    let (address, size) = (request.flat_address, request.image.len() as u64);
    if !address.is_multiple_of(4) {
        let detail = format!("({address:#x}) is not a multiple of 4, as instructions are");
        return Err(request.view(Protocol::Flat).malformed("the load address", detail));
    }
    builder.place("the binary", address, size, request.image)?;
    finish(request, Protocol::Flat, builder, address, address + size)
}

/// Finds room for device tree and RAM disk, and gives the CPU's state. The command line is the device tree's to carry.
fn finish<'a>(
    request: &BootRequest<'a>,
    protocol: Protocol,
    mut builder: Builder<'a>,
    entry: u64,
    kernel_end: u64,
) -> Result<BootPlan<'a>, BootError> {
    // In the blocks behind the kernel: kernels before 4.2 want it within 512 MiB.
    let tree = builder.reserve("the device tree", BLOCK, BLOCK, kernel_end..MAX_ADDRESS, Side::Bottom)?;
    builder.device_tree = Some(tree..tree + BLOCK);
    if let Some(data) = request.initrd(protocol)? {
        let window = entry & !(GIB - 1);
        let window = window..window.saturating_add(INITRD_WINDOW);
        let address = builder.put("the initial RAM disk", data, PAGE, window, Side::Top)?;
        builder.initrd = Some(address..address + data.len() as u64);
    }
    let mut regs = GuestRegs { pc: entry, flags: PSTATE, ..GuestRegs::default() };
    regs.gpr[Reg::X0 as usize] = tree;
    Ok(builder.finish(BootState::Aarch64(regs)))
}
