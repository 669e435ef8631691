//! ELF executables, as far as a boot loader reads them: file header, program headers, notes. (System V ABI, chapters 4
//! and 5; section headers and symbols are never read.)

use super::plan::Builder;
use super::view::View;
use super::{BootError, Protocol};

pub(crate) const EM_386: u16 = 3;
pub(crate) const EM_X86_64: u16 = 62;
pub(crate) const EM_AARCH64: u16 = 183;

const MAGIC: &[u8] = b"\x7fELF";
const ELFCLASS32: u8 = 1;
const ELFCLASS64: u8 = 2;
const ELFDATA2LSB: u8 = 1;
const ET_EXEC: u16 = 2;
const ET_DYN: u16 = 3;
const PT_LOAD: u32 = 1;
const PT_INTERP: u32 = 3;
const PT_NOTE: u32 = 4;
/// The note by which a kernel offers a PVH entry. (Xen `public/elfnote.h`.)
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;
/// Bytes of notes that are searched. Real kernels have a few hundred; more would only cost time.
const MAX_NOTE_BYTES: u64 = 1 << 20;

/// True if the file begins as ELF files do.
pub(crate) fn is_elf(image: &[u8]) -> bool {
    image.starts_with(MAGIC)
}

/// A program header.
#[derive(Debug, Clone, Copy)]
struct Segment {
    kind: u32,
    offset: u64,
    vaddr: u64,
    paddr: u64,
    file_size: u64,
    memory_size: u64,
    align: u64,
}

/// The headers of an ELF executable.
#[derive(Debug)]
pub(crate) struct Elf<'a> {
    view: View<'a>,
    pub(crate) machine: u16,
    pub(crate) is_64bit: bool,
    entry: u64,
    segments: Vec<Segment>,
}

impl<'a> Elf<'a> {
    /// Reads the headers. Messages carry the protocol of `view`.
    pub(crate) fn parse(view: View<'a>) -> Result<Self, BootError> {
        if view.bytes("the ELF magic number", 0, 4)? != MAGIC {
            return Err(view.malformed("the ELF magic number", "is not there; this is no ELF file"));
        }
        let is_64bit = match view.u8("e_ident[EI_CLASS]", 4)? {
            ELFCLASS32 => false,
            ELFCLASS64 => true,
            other => {
                return Err(view.malformed("e_ident[EI_CLASS]", format!("is {other}, neither 1 nor 2")));
            }
        };
        if view.u8("e_ident[EI_DATA]", 5)? != ELFDATA2LSB {
            return Err(view.malformed("e_ident[EI_DATA]", "is not 1: only little-endian files can be loaded"));
        }
        let kind = view.u16("e_type", 16)?;
        if kind != ET_EXEC && kind != ET_DYN {
            return Err(view.malformed(
                "e_type",
                format!("is {kind}, not an executable (2 or 3): an object file must be linked first"),
            ));
        }
        let machine = view.u16("e_machine", 18)?;
        // Offset and width of the fields that differ between the classes.
        let word = |field, at32, at64| {
            if is_64bit { view.u64(field, at64) } else { view.u32(field, at32).map(u64::from) }
        };
        let half = |field, at32, at64| view.u16(field, if is_64bit { at64 } else { at32 });
        let entry = word("e_entry", 24, 24)?;
        let table = word("e_phoff", 28, 32)?;
        let stride = half("e_phentsize", 42, 54)?;
        let count = half("e_phnum", 44, 56)?;
        let expected = if is_64bit { 56 } else { 32 };
        if count == 0 {
            return Err(view.malformed("e_phnum", "is 0: nothing to load"));
        }
        if stride != expected {
            return Err(view.malformed("e_phentsize", format!("is {stride}, not {expected}")));
        }
        let bytes = u64::from(count) * u64::from(stride);
        let headers = View::new(view.bytes("the program header table", table, bytes)?, view.protocol);
        let segments: Vec<_> = (0..u64::from(count))
            .map(|index| Segment::parse(headers, index * u64::from(stride), is_64bit))
            .collect::<Result<_, _>>()?;
        if segments.iter().any(|segment| segment.kind == PT_INTERP) {
            return Err(view.malformed("PT_INTERP", "is present: this is a user program, not a kernel"));
        }
        Ok(Self { view, machine, is_64bit, entry, segments })
    }

    fn loaded(&self) -> impl Iterator<Item = &Segment> {
        self.segments.iter().filter(|segment| segment.kind == PT_LOAD && segment.memory_size > 0)
    }

    /// Puts the loadable segments at their physical addresses. Returns the address behind the highest.
    pub(crate) fn place(&self, builder: &mut Builder<'a>) -> Result<u64, BootError> {
        let mut end = 0;
        for segment in self.loaded() {
            if segment.file_size > segment.memory_size {
                return Err(self.view.malformed(
                    "p_filesz",
                    format!("({:#x}) is larger than p_memsz ({:#x})", segment.file_size, segment.memory_size),
                ));
            }
            let data = self.view.bytes("a loadable segment (p_offset, p_filesz)", segment.offset, segment.file_size)?;
            builder.place("kernel segment (p_paddr, p_memsz)", segment.paddr, segment.memory_size, data)?;
            // Inside RAM, as `place` has found, so the sum is exact.
            end = end.max(segment.paddr.saturating_add(segment.memory_size));
        }
        if end == 0 {
            return Err(self.view.malformed("the program header table", "has no loadable segment"));
        }
        Ok(end)
    }

    /// The physical address at which execution begins. Linkers leave a virtual address in `e_entry` unless told
    /// otherwise; one that is no physical address of the image but a virtual one is translated.
    pub(crate) fn physical_entry(&self) -> Result<u64, BootError> {
        let inside = |start: u64, size: u64| self.entry.checked_sub(start).filter(|&offset| offset < size);
        let physical = self.loaded().find(|s| inside(s.paddr, s.memory_size).is_some()).map(|_| self.entry);
        let translated = || self.loaded().find_map(|s| inside(s.vaddr, s.memory_size)?.checked_add(s.paddr));
        physical
            .or_else(translated)
            .ok_or_else(|| self.view.malformed("e_entry", format!("({:#x}) is in no loadable segment", self.entry)))
    }

    /// True if a loadable segment covers physical address `address`.
    pub(crate) fn covers(&self, address: u64) -> bool {
        self.loaded().any(|s| address.checked_sub(s.paddr).is_some_and(|offset| offset < s.memory_size))
    }

    /// The PVH entry point, if a note offers one.
    pub(crate) fn pvh_entry(&self) -> Result<Option<u64>, BootError> {
        let mut budget = MAX_NOTE_BYTES;
        for segment in self.segments.iter().filter(|segment| segment.kind == PT_NOTE) {
            budget = budget.checked_sub(segment.file_size).ok_or_else(|| {
                self.view.malformed("p_filesz", format!("of the notes adds up to more than {MAX_NOTE_BYTES:#x}"))
            })?;
            let notes = self.view.bytes("a note segment (p_offset, p_filesz)", segment.offset, segment.file_size)?;
            if let Some(entry) = self.find_note(View::new(notes, self.view.protocol), segment.align)? {
                return Ok(Some(entry));
            }
        }
        Ok(None)
    }

    fn find_note(&self, notes: View<'a>, align: u64) -> Result<Option<u64>, BootError> {
        // Four bytes whatever the header says, but for notes of the gABI's 64-bit kind.
        let align = if align == 8 { 8 } else { 4 };
        let mut at = 0;
        // Each turn advances by at least the 12 bytes of a note's header. Less than that is padding.
        while notes.len() - at >= 12 {
            let name_size = u64::from(notes.u32("n_namesz", at)?);
            let desc_size = u64::from(notes.u32("n_descsz", at + 4)?);
            let kind = notes.u32("n_type", at + 8)?;
            let name = notes.bytes("a note's name (n_namesz)", at + 12, name_size)?;
            let desc_at = (at + 12 + name_size).next_multiple_of(align);
            let desc = notes.bytes("a note's descriptor (n_descsz)", desc_at, desc_size)?;
            if kind == XEN_ELFNOTE_PHYS32_ENTRY && name == b"Xen\0" {
                let value = View::new(desc, self.view.protocol);
                return match desc_size {
                    4 => value.u32("the PVH note", 0).map(|entry| Some(u64::from(entry))),
                    8 => value.u64("the PVH note", 0).map(Some),
                    _ => Err(self.view.malformed("the PVH note", format!("has {desc_size} bytes, neither 4 nor 8"))),
                };
            }
            at = (desc_at + desc_size).next_multiple_of(align).min(notes.len());
        }
        Ok(None)
    }
}

impl Segment {
    fn parse(headers: View<'_>, at: u64, is_64bit: bool) -> Result<Self, BootError> {
        let field = |name, at32, at64| {
            if is_64bit { headers.u64(name, at + at64) } else { headers.u32(name, at + at32).map(u64::from) }
        };
        Ok(Self {
            kind: headers.u32("p_type", at)?,
            offset: field("p_offset", 4, 8)?,
            vaddr: field("p_vaddr", 8, 16)?,
            paddr: field("p_paddr", 12, 24)?,
            file_size: field("p_filesz", 16, 32)?,
            memory_size: field("p_memsz", 20, 40)?,
            align: field("p_align", 28, 48)?,
        })
    }
}

/// Refuses an ELF file of another machine than those in `allowed`.
pub(crate) fn require_machine(elf: &Elf<'_>, allowed: &[u16], needed: &'static str) -> Result<(), BootError> {
    if allowed.contains(&elf.machine) {
        return Ok(());
    }
    Err(elf.view.malformed("e_machine", format!("is {}, not {needed}", elf.machine)))
}

/// An entry point must be one that 32-bit code or the boot page tables reach.
pub(crate) fn require_below_4_gib(entry: u64, protocol: Protocol) -> Result<u64, BootError> {
    if entry < super::x86::FOUR_GIB {
        return Ok(entry);
    }
    Err(BootError::Malformed { protocol, field: "the entry point", detail: format!("({entry:#x}) is not below 4 GiB") })
}
