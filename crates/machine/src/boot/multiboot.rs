//! Multiboot version 1, the kernel as an ELF file or flat with its addresses in the header.
//!
//! (GNU Multiboot Specification 0.6.96; section numbers are its. What kvm-unit-tests expect of the command line
//! was learned from QEMU's behaviour: its first word is the kernel's name.)

use super::elf::{self, Elf};
use super::layout::{MemoryKind, Side};
use super::plan::{BootPlan, Builder};
use super::view::{Put, View};
use super::x86::{self, FOUR_GIB, LOW_MEMORY};
use super::{BootError, BootRequest, MAX_CMDLINE, Protocol, c_string};
use vm_accel::x86_64::Reg;

const HEADER_MAGIC: u32 = 0x1bad_b002;
const BOOT_MAGIC: u64 = 0x2bad_b002;
/// The header is in the first 8 KiB, 32-bit aligned (3.1.1).
const HEADER_SEARCH: usize = 8192;
const HEADER_SIZE: u64 = 12;

// Header flags (3.1.2). Bits 0–15 are demands that a loader must meet or refuse.
/// Bit 0: modules on page boundaries. We always place them so. Bit 1: memory information. Always there.
/// Bit 2: a video mode. Granted although there is none: the information structure then says so, as QEMU does, and
/// kernels fall back to text or the serial line.
const KNOWN_DEMANDS: u32 = 0b111;
const DEMANDS: u32 = 0xffff;
const HAS_ADDRESSES: u32 = 1 << 16;

// Flags of the information structure (3.3).
const INFO_MEMORY: u32 = 1;
const INFO_CMDLINE: u32 = 1 << 2;
const INFO_MODULES: u32 = 1 << 3;
const INFO_MEMORY_MAP: u32 = 1 << 6;
const INFO_LOADER_NAME: u32 = 1 << 9;
const INFO_SIZE: usize = 116;
const MODULE_SIZE: usize = 16;
const MEMORY_ENTRY_SIZE: usize = 24;

const LOADER_NAME: &str = "vm-accel";
const MIB: u64 = 1 << 20;
const PAGE: u64 = 0x1000;

/// File offset of the multiboot header: the first place with the magic number and a checksum that is right.
pub(crate) fn find_header(image: &[u8]) -> Option<u64> {
    let words: Vec<u32> = image[..image.len().min(HEADER_SEARCH)]
        .chunks_exact(4)
        .map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]]))
        .collect();
    let is_header = |w: &[u32]| w[0] == HEADER_MAGIC && w[0].wrapping_add(w[1]).wrapping_add(w[2]) == 0;
    words.windows(3).position(is_header).map(|index| index as u64 * 4)
}

pub(crate) fn plan<'a>(request: &BootRequest<'a>, mut builder: Builder<'a>) -> Result<BootPlan<'a>, BootError> {
    let protocol = Protocol::Multiboot;
    let view = request.view(protocol);
    let header = find_header(request.image)
        .ok_or_else(|| view.malformed("the multiboot header", "is not in the first 8 KiB, or its checksum is wrong"))?;
    let flags = view.u32("flags", header + 4)?;
    if flags & DEMANDS & !KNOWN_DEMANDS != 0 {
        return Err(view.malformed("flags", format!("({flags:#x}) demands a feature that is not offered")));
    }
    let (entry, end) = if flags & HAS_ADDRESSES != 0 {
        place_flat(view, header, &mut builder)?
    } else if elf::is_elf(request.image) {
        place_elf(view, &mut builder)?
    } else {
        return Err(
            view.malformed("flags", format!("({flags:#x}) gives no addresses (bit 16), and this is no ELF file"))
        );
    };
    let info = place_info(request, end, &mut builder)?;
    let state = x86::enter_protected32(&mut builder, entry, &[(Reg::Rax, BOOT_MAGIC), (Reg::Rbx, info)])?;
    Ok(builder.finish(state))
}

/// Loads an ELF kernel. Returns its entry and the address behind it.
fn place_elf<'a>(view: View<'a>, builder: &mut Builder<'a>) -> Result<(u64, u64), BootError> {
    let elf = Elf::parse(view)?;
    // 64-bit files with 32-bit code at their entry are common, and the specification says just "ELF".
    elf::require_machine(&elf, &[elf::EM_386, elf::EM_X86_64], "3 or 62 (x86)")?;
    let entry = elf::require_below_4_gib(elf.physical_entry()?, view.protocol)?;
    Ok((entry, elf.place(builder)?))
}

/// Loads a kernel by the addresses in its header (3.1.3, "a.out kludge"). Returns its entry and the address behind it.
fn place_flat<'a>(view: View<'a>, header: u64, builder: &mut Builder<'a>) -> Result<(u64, u64), BootError> {
    let fields = header + HEADER_SIZE;
    let field = |name, index: u64| view.u32(name, fields + index * 4).map(u64::from);
    let header_addr = field("header_addr", 0)?;
    let load_addr = field("load_addr", 1)?;
    let load_end_addr = field("load_end_addr", 2)?;
    let bss_end_addr = field("bss_end_addr", 3)?;
    let entry = field("entry_addr", 4)?;

    // The header is as far into the loaded part as its address is behind load_addr; what precedes is not loaded.
    let offset = header_addr.checked_sub(load_addr).and_then(|into| header.checked_sub(into)).ok_or_else(|| {
        view.malformed(
            "header_addr",
            format!("({header_addr:#x}) and load_addr ({load_addr:#x}) put the start before the file's"),
        )
    })?;
    let size = match load_end_addr {
        0 => view.len() - offset,
        end => end.checked_sub(load_addr).ok_or_else(|| {
            view.malformed("load_end_addr", format!("({end:#x}) is below load_addr ({load_addr:#x})"))
        })?,
    };
    let data = view.bytes("the kernel (load_addr, load_end_addr)", offset, size)?;
    let load_end = load_addr + size;
    let end = match bss_end_addr {
        0 => load_end,
        end if end >= load_end => end,
        end => {
            return Err(view
                .malformed("bss_end_addr", format!("({end:#x}) is below the end of the loaded part ({load_end:#x})")));
        }
    };
    if !(load_addr..end).contains(&entry) {
        return Err(view.malformed("entry_addr", format!("({entry:#x}) is outside {load_addr:#x} to {end:#x}")));
    }
    builder.place("the kernel (load_addr, bss_end_addr)", load_addr, end - load_addr, data)?;
    Ok((entry, end))
}

/// Places modules, strings, memory map and the information structure (3.3). Returns the address of the latter.
fn place_info<'a>(request: &BootRequest<'a>, kernel_end: u64, builder: &mut Builder<'a>) -> Result<u64, BootError> {
    let name: String = request.name.chars().map(|c| if c.is_whitespace() || c == '\0' { '_' } else { c }).collect();
    let cmdline = [&name, request.cmdline].join(" ");
    if cmdline.len() > MAX_CMDLINE {
        let detail = format!("and the kernel's name have {} bytes; at most {MAX_CMDLINE} are possible", cmdline.len());
        return Err(request.view(Protocol::Multiboot).malformed("the command line", detail));
    }
    let mut modules = vec![0; request.modules.len() * MODULE_SIZE];
    for (entry, module) in modules.chunks_exact_mut(MODULE_SIZE).zip(request.modules) {
        // Right behind the kernel, as other loaders do: kernels with little memory mapped early rely on it.
        let from = kernel_end.clamp(MIB, FOUR_GIB);
        let start = builder.put("a module", module.data, PAGE, from..FOUR_GIB, Side::Bottom)?;
        let end = start + module.data.len() as u64;
        builder.initrd.get_or_insert(start..end);
        let string = builder.put("a module's string", c_string(module.cmdline), 1, LOW_MEMORY, Side::Bottom)?;
        entry.put_u32(0, start as u32);
        // Below or at 4 GiB; a module that ends exactly there has the end 0, as 32-bit arithmetic gives it.
        entry.put_u32(4, end as u32);
        entry.put_u32(8, string as u32);
    }
    let ranges = request.memory.ranges();
    let mut map = vec![0; ranges.len() * MEMORY_ENTRY_SIZE];
    for (entry, range) in map.chunks_exact_mut(MEMORY_ENTRY_SIZE).zip(ranges) {
        // The size does not count itself.
        entry.put_u32(0, MEMORY_ENTRY_SIZE as u32 - 4);
        entry.put_u64(4, range.base);
        entry.put_u64(12, range.size);
        entry.put_u32(20, range.kind as u32);
    }

    // Kilobytes of RAM from 0 on, at most 640, and from 1 MiB on.
    let ram_from = |start: u64| {
        let range =
            request.memory.ranges().iter().find(|r| r.kind == MemoryKind::Ram && (r.base..r.end()).contains(&start));
        range.map_or(0, |range| (range.end() - start) / 1024)
    };
    let mut low = |what, data: Vec<u8>| builder.put(what, data, 16, LOW_MEMORY, Side::Bottom).map(|at| at as u32);
    let mut info = vec![0; INFO_SIZE];
    let mut flags = INFO_MEMORY | INFO_CMDLINE | INFO_MEMORY_MAP | INFO_LOADER_NAME;
    info.put_u32(4, ram_from(0).min(640) as u32);
    info.put_u32(8, ram_from(MIB).min(u64::from(u32::MAX)) as u32);
    info.put_u32(16, low("the command line", c_string(&cmdline))?);
    if !modules.is_empty() {
        flags |= INFO_MODULES;
        info.put_u32(20, request.modules.len() as u32);
        info.put_u32(24, low("the module list", modules)?);
    }
    info.put_u32(44, map.len() as u32);
    info.put_u32(48, low("the memory map", map)?);
    info.put_u32(64, low("the loader's name", c_string(LOADER_NAME))?);
    info.put_u32(0, flags);
    low("the multiboot information", info).map(u64::from)
}
