//! Worlds: a guest in real, flat protected or long mode, ready to run, with handlers for every interrupt vector.
//!
//! A world is the bytes of guest memory and the registers of its boot CPU. Every vector leads to a handler that writes
//! what happened into [`layout::REPORT`], tells the host with an OUT of the vector to [`REPORT_PORT`] (unless
//! [`flags::SILENT`] is set), acknowledges where [`flags`] says so, and returns. The handlers use plain integer
//! instructions only, so that they run where ring 0 is interpreted.

use crate::asm::{CodeAssembler, *};
use crate::{Bits, assemble};
use iced_x86::IcedError;
use std::sync::OnceLock;

/// Where things are in guest physical memory. Everything is below [`layout::RAM_SIZE`].
pub mod layout {
    /// Stubs of the real-mode handlers (the vector table itself is at 0).
    pub const REAL_STUBS: u64 = 0x1000;
    /// Interrupt descriptor table.
    pub const IDT: u64 = 0x2000;
    /// Global descriptor table.
    pub const GDT: u64 = 0x3000;
    /// 64-bit task-state segment.
    pub const TSS64: u64 = 0x3800;
    /// 32-bit task-state segment.
    pub const TSS32: u64 = 0x3900;
    /// What the handlers write; see [`Report`](super::Report).
    pub const REPORT: u64 = 0x4000;
    /// 8 KiB for the program's data.
    pub const DATA: u64 = 0x5000;
    /// The program. It is below 64 KiB and page aligned, so that real mode and a SIPI reach it.
    pub const CODE: u64 = 0x8000;
    /// Page tables: PML4, PDPT, four page directories, then [`SPARE_TABLES`].
    pub const PAGE_TABLES: u64 = 0x1_0000;
    /// Eight zeroed pages for a case's own page tables.
    pub const SPARE_TABLES: u64 = 0x1_6000;
    /// Handlers of protected and long mode.
    pub const HANDLERS: u64 = 0x2_0000;
    /// Top of the stack of real mode, below the program.
    pub const REAL_STACK: u64 = 0x7ff0;
    /// Top of the stack of ring 0.
    pub const STACK: u64 = 0x7_0000;
    /// Top of the stack of ring 3.
    pub const USER_STACK: u64 = 0x8_0000;
    /// Bytes of RAM that a world needs, from address 0.
    pub const RAM_SIZE: u64 = 0x20_0000;
    /// An address where no world has memory, and which page tables map.
    pub const MMIO: u64 = 0x1000_0000;
}

/// Selectors in the GDT. The order serves SYSCALL and SYSRET (Intel SDM vol. 3, 5.8.8).
pub mod selector {
    /// 64-bit code, ring 0.
    pub const CODE64: u16 = 0x08;
    /// Data, ring 0.
    pub const DATA: u16 = 0x10;
    /// 32-bit code, ring 3.
    pub const USER_CODE32: u16 = 0x1b;
    /// Data, ring 3.
    pub const USER_DATA: u16 = 0x23;
    /// 64-bit code, ring 3.
    pub const USER_CODE64: u16 = 0x2b;
    /// 32-bit code, ring 0.
    pub const CODE32: u16 = 0x30;
    /// 64-bit TSS (two entries).
    pub const TSS64: u16 = 0x38;
    /// 32-bit TSS.
    pub const TSS32: u16 = 0x48;
}

/// The port to which a handler writes the vector.
pub const REPORT_PORT: u16 = 0xee;

/// Bits of the word at [`layout::REPORT`] + [`FLAGS_OFFSET`], set by the host.
pub mod flags {
    /// Acknowledge at the local APIC (xAPIC mode, 0xfee0_00b0).
    pub const EOI_LAPIC: u8 = 1;
    /// Acknowledge at both PICs.
    pub const EOI_PIC: u8 = 2;
    /// Do not tell the host.
    pub const SILENT: u8 = 4;
}

/// Offset of the flags word in the report.
pub const FLAGS_OFFSET: u64 = 64;

/// What the handlers leave at [`layout::REPORT`], as 64-bit words. Real mode fills the low 16 bits of vector, IP, CS and
/// flags; protected mode the low 32 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Report {
    /// Vector of the last interrupt.
    pub vector: u64,
    /// Its error code; 0 if it has none.
    pub error_code: u64,
    /// Where it happened.
    pub ip: u64,
    /// Code segment there.
    pub cs: u64,
    /// Flags there.
    pub flags: u64,
    /// Stack pointer there (long mode).
    pub sp: u64,
    /// CR2.
    pub cr2: u64,
    /// How many interrupts were handled.
    pub count: u64,
}

impl Report {
    /// Bytes that [`Report::parse`] wants.
    pub const SIZE: usize = 64;

    /// Reads a report.
    #[must_use]
    pub fn parse(bytes: &[u8; Self::SIZE]) -> Self {
        let word = |i: usize| u64::from_le_bytes(std::array::from_fn(|k| bytes[8 * i + k]));
        Self {
            vector: word(0),
            error_code: word(1),
            ip: word(2),
            cs: word(3),
            flags: word(4),
            sp: word(5),
            cr2: word(6),
            count: word(7),
        }
    }
}

/// A segment register.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SegmentState {
    /// Selector.
    pub selector: u16,
    /// Base.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u32,
    /// Bits 40–55 of its descriptor without the limit: access byte in bits 0–7, flags (AVL, L, D/B, G) in 12–15.
    pub access: u16,
}

/// Access of a flat segment: present, code or data, accessed, 4 KiB granular.
const FLAT: u16 = 0x8091;
const WRITABLE: u16 = 0x2;
const CODE_READABLE: u16 = 0xa;
const RING3: u16 = 0x60;
const BIG: u16 = 0x4000;
const LONG: u16 = 0x2000;
/// Busy TSS, present.
const BUSY_TSS: u16 = 0x8b;

impl SegmentState {
    const fn flat(selector: u16, access: u16) -> Self {
        Self {
            selector,
            base: 0,
            limit: 0xffff_ffff,
            access: FLAT | access | if selector & 3 == 3 { RING3 } else { 0 },
        }
    }

    const fn tss(selector: u16, base: u64) -> Self {
        Self { selector, base, limit: 0x67, access: BUSY_TSS }
    }

    /// A real-mode segment.
    #[must_use]
    pub const fn real(selector: u16) -> Self {
        Self { selector, base: (selector as u64) << 4, limit: 0xffff, access: 0x93 }
    }

    /// The low eight bytes of its descriptor.
    #[must_use]
    pub const fn descriptor(&self) -> u64 {
        let granular = self.access & 0x8000 != 0;
        let limit = if granular { self.limit >> 12 } else { self.limit } as u64;
        limit & 0xffff
            | (self.base & 0xff_ffff) << 16
            | (self.access as u64 & 0xf0ff) << 40
            | (limit >> 16 & 0xf) << 48
            | (self.base >> 24 & 0xff) << 56
    }
}

/// The registers with which a world starts. General-purpose registers not named here are 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct CpuState {
    pub cs: SegmentState,
    /// DS, ES, FS, GS and SS.
    pub data: SegmentState,
    /// Task register.
    pub tr: SegmentState,
    /// Base and limit.
    pub gdt: (u64, u16),
    /// Base and limit.
    pub idt: (u64, u16),
    pub cr0: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub efer: u64,
    pub rip: u64,
    pub rsp: u64,
    pub rflags: u64,
}

/// A guest that is ready to run: memory contents and registers.
#[derive(Debug, Clone)]
pub struct World {
    /// Registers of the boot CPU.
    pub cpu: CpuState,
    /// How its code is to be assembled.
    pub bits: Bits,
    /// What belongs where in guest physical memory; later entries win.
    pub memory: Vec<(u64, Vec<u8>)>,
}

/// CR0: protected mode, FPU usable (MP, ET, NE), write protection for ring 0.
const CR0_PROTECTED: u64 = 0x1_0033;
const CR0_PAGING: u64 = 1 << 31;
/// CR4: PAE, OSFXSR, OSXMMEXCPT.
const CR4_LONG: u64 = 0x620;
/// EFER: LME, LMA, NXE.
const EFER_LONG: u64 = 0xd00;
/// Page-table entry: present, writable, accessible for ring 3.
pub const PTE_TABLE: u64 = 7;
/// Page-directory entry of a 2 MiB page with the same rights.
pub const PTE_LARGE: u64 = 0x87;

impl World {
    /// Real mode: 16-bit code at [`layout::CODE`], all segments 0.
    #[must_use]
    pub fn real() -> Self {
        let mut table = Vec::new();
        for vector in 0..256 {
            table.extend((real_stub(vector) as u32).to_le_bytes());
        }
        Self {
            cpu: CpuState {
                cs: SegmentState::real(0),
                data: SegmentState::real(0),
                tr: SegmentState::tss(0, 0),
                gdt: (0, 0xffff),
                idt: (0, 0x3ff),
                cr0: 0x10,
                cr3: 0,
                cr4: 0,
                efer: 0,
                rip: layout::CODE,
                rsp: layout::REAL_STACK,
                rflags: 2,
            },
            bits: Bits::B16,
            memory: vec![(0, table), (layout::REAL_STUBS, real_handlers())],
        }
    }

    /// Protected mode with flat 4 GiB segments, ring 0, no paging.
    #[must_use]
    pub fn protected() -> Self {
        let mut world = Self::long();
        world.bits = Bits::B32;
        world.cpu.cs = SegmentState::flat(selector::CODE32, CODE_READABLE | BIG);
        world.cpu.tr = SegmentState::tss(selector::TSS32, layout::TSS32);
        world.cpu.cr0 = CR0_PROTECTED;
        world.cpu.cr3 = 0;
        world.cpu.cr4 = 0x600;
        world.cpu.efer = 0;
        world.cpu.idt = (layout::IDT, 256 * 8 - 1);
        world.put(layout::IDT, gates32()).put(layout::HANDLERS, handlers(Bits::B32))
    }

    /// Long mode, ring 0. The first 4 GiB are mapped one to one with 2 MiB pages that ring 3 may use too.
    #[must_use]
    pub fn long() -> Self {
        let cpu = CpuState {
            cs: SegmentState::flat(selector::CODE64, CODE_READABLE | LONG),
            data: SegmentState::flat(selector::DATA, WRITABLE | BIG),
            tr: SegmentState::tss(selector::TSS64, layout::TSS64),
            gdt: (layout::GDT, 10 * 8 - 1),
            idt: (layout::IDT, 256 * 16 - 1),
            cr0: CR0_PROTECTED | CR0_PAGING,
            cr3: layout::PAGE_TABLES,
            cr4: CR4_LONG,
            efer: EFER_LONG,
            rip: layout::CODE,
            rsp: layout::STACK,
            rflags: 2,
        };
        Self {
            cpu,
            bits: Bits::B64,
            memory: vec![
                (layout::GDT, gdt()),
                (layout::IDT, gates64()),
                (layout::TSS64, tss64()),
                (layout::TSS32, tss32()),
                (layout::PAGE_TABLES, page_tables()),
                (layout::HANDLERS, handlers(Bits::B64)),
            ],
        }
    }

    /// Long mode, ring 3, with the tables of [`World::long`].
    #[must_use]
    pub fn user() -> Self {
        let mut world = Self::long();
        world.cpu.cs = SegmentState::flat(selector::USER_CODE64, CODE_READABLE | LONG);
        world.cpu.data = SegmentState::flat(selector::USER_DATA, WRITABLE | BIG);
        world.cpu.rsp = layout::USER_STACK;
        world
    }

    /// 32-bit code of ring 3 under long mode (compatibility mode).
    #[must_use]
    pub fn compatibility() -> Self {
        let mut world = Self::user();
        world.bits = Bits::B32;
        world.cpu.cs = SegmentState::flat(selector::USER_CODE32, CODE_READABLE | BIG);
        world
    }

    /// Adds bytes at a guest physical address.
    #[must_use]
    pub fn put(mut self, gpa: u64, bytes: impl Into<Vec<u8>>) -> Self {
        self.memory.push((gpa, bytes.into()));
        self
    }

    /// Adds the program, at [`layout::CODE`].
    ///
    /// # Panics
    /// As [`assemble`], or if it is larger than 32 KiB.
    #[must_use]
    pub fn code(self, write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Self {
        let code = assemble(self.bits, layout::CODE, write);
        assert!(code.len() as u64 <= layout::PAGE_TABLES - layout::CODE);
        self.put(layout::CODE, code)
    }

    /// Sets [`flags`] for the handlers.
    #[must_use]
    pub fn handler_flags(self, flags: u8) -> Self {
        self.put(layout::REPORT + FLAGS_OFFSET, [flags])
    }

    /// Enables interrupts.
    #[must_use]
    pub fn interrupts_on(mut self) -> Self {
        self.cpu.rflags |= 1 << 9;
        self
    }
}

fn words(values: impl IntoIterator<Item = u64>) -> Vec<u8> {
    values.into_iter().flat_map(u64::to_le_bytes).collect()
}

fn gdt() -> Vec<u8> {
    let flat = |selector, access| SegmentState::flat(selector, access).descriptor();
    words([
        0,
        flat(selector::CODE64, CODE_READABLE | LONG),
        flat(selector::DATA, WRITABLE | BIG),
        flat(selector::USER_CODE32, CODE_READABLE | BIG),
        flat(selector::USER_DATA, WRITABLE | BIG),
        flat(selector::USER_CODE64, CODE_READABLE | LONG),
        flat(selector::CODE32, CODE_READABLE | BIG),
        SegmentState::tss(selector::TSS64, layout::TSS64).descriptor(),
        0,
        SegmentState::tss(selector::TSS32, layout::TSS32).descriptor(),
    ])
}

/// RSP0 at 4; no I/O permission bitmap (its offset is the segment's end). (Intel SDM vol. 3, figure 8-11.)
fn tss64() -> Vec<u8> {
    let mut tss = vec![0; 104];
    tss[4..12].copy_from_slice(&layout::STACK.to_le_bytes());
    tss[102..104].copy_from_slice(&104u16.to_le_bytes());
    tss
}

/// ESP0 at 4, SS0 at 8. (Intel SDM vol. 3, figure 8-2.)
fn tss32() -> Vec<u8> {
    let mut tss = vec![0; 104];
    tss[4..8].copy_from_slice(&(layout::STACK as u32).to_le_bytes());
    tss[8..10].copy_from_slice(&selector::DATA.to_le_bytes());
    tss[102..104].copy_from_slice(&104u16.to_le_bytes());
    tss
}

fn page_tables() -> Vec<u8> {
    let table = |i: u64| layout::PAGE_TABLES + 0x1000 * i;
    let page = |entries: Vec<u64>| {
        let mut bytes = words(entries);
        bytes.resize(0x1000, 0);
        bytes
    };
    let mut bytes = page(vec![table(1) | PTE_TABLE]);
    bytes.extend(page((2..6).map(|i| table(i) | PTE_TABLE).collect()));
    bytes.extend(words((0..4 * 512).map(|i| (i << 21) | PTE_LARGE)));
    bytes
}

/// An entry point of a protected-mode or long-mode handler.
const fn stub(vector: u64) -> u64 {
    layout::HANDLERS + 0x1000 + 16 * vector
}

const fn real_stub(vector: u64) -> u64 {
    layout::REAL_STUBS + 0x100 + 8 * vector
}

/// Exceptions that push an error code (Intel SDM vol. 3, table 6-1).
const fn has_error_code(vector: u64) -> bool {
    matches!(vector, 8 | 10..=14 | 17 | 21)
}

/// Interrupt gates for 64-bit code; ring 3 may use vectors 3, 4 and 0x80.
fn gates64() -> Vec<u8> {
    words((0..256).flat_map(|vector| {
        let at = stub(vector);
        [gate(at, selector::CODE64, vector), at >> 32]
    }))
}

fn gates32() -> Vec<u8> {
    words((0..256).map(|vector| gate(stub(vector), selector::CODE32, vector)))
}

const fn gate(at: u64, code: u16, vector: u64) -> u64 {
    let dpl = if matches!(vector, 3 | 4 | 0x80) { 3 } else { 0 };
    at & 0xffff | (code as u64) << 16 | (0x8e | dpl << 5) << 40 | (at >> 16 & 0xffff) << 48
}

/// Appends `part` at `at`, relative to `base`.
fn place(image: &mut Vec<u8>, base: u64, at: u64, part: &[u8]) {
    let offset = (at - base) as usize;
    assert!(image.len() <= offset, "handlers overlap");
    image.resize(offset, 0xcc);
    image.extend(part);
}

/// The handlers of protected and long mode: common part, then a stub for each vector.
fn handlers(bits: Bits) -> Vec<u8> {
    static LONG_MODE: OnceLock<Vec<u8>> = OnceLock::new();
    static PROTECTED_MODE: OnceLock<Vec<u8>> = OnceLock::new();
    let cell = if bits == Bits::B64 { &LONG_MODE } else { &PROTECTED_MODE };
    let build = || {
        let base = layout::HANDLERS;
        let mut image = assemble(bits, base, |a| match bits {
            Bits::B64 => common64(a),
            _ => common32(a),
        });
        for vector in 0..256 {
            let code = assemble(bits, stub(vector), |a| {
                if !has_error_code(vector) {
                    a.push(0)?;
                }
                a.push(vector as i32)?;
                a.jmp(base)
            });
            place(&mut image, base, stub(vector), &code);
        }
        image
    };
    cell.get_or_init(build).clone()
}

/// The common part of the handlers where the stack holds: vector, error code, IP, CS, flags, (SP, SS).
macro_rules! common {
    ($name:ident, $word:literal, $a:ident, $c:ident, $d:ident, $sp:ident, $ptr:ident, $iret:ident) => {
        fn $name(a: &mut CodeAssembler) -> Result<(), IcedError> {
            let report = layout::REPORT as u32;
            a.push($a)?;
            a.push($c)?;
            a.push($d)?;
            // Vector, error code, IP, CS, flags, SP.
            for i in 0..6u32 {
                a.mov($a, $ptr($sp + $word * (3 + i)))?;
                a.mov($ptr(report + 8 * i), $a)?;
            }
            a.mov($a, cr2)?;
            a.mov($ptr(report + 48), $a)?;
            a.inc($ptr(report + 56))?;
            a.mov($c, $ptr(report + FLAGS_OFFSET as u32))?;
            let mut silent = a.create_label();
            a.test(cl, i32::from(flags::SILENT))?;
            a.jne(silent)?;
            a.mov($a, $ptr($sp + $word * 3))?;
            a.mov(edx, u32::from(REPORT_PORT))?;
            a.out(dx, al)?;
            a.set_label(&mut silent)?;
            let mut no_lapic = a.create_label();
            a.test(cl, i32::from(flags::EOI_LAPIC))?;
            a.je(no_lapic)?;
            a.mov(edx, 0xfee0_00b0u32)?;
            a.mov(dword_ptr($d), 0)?;
            a.set_label(&mut no_lapic)?;
            let mut no_pic = a.create_label();
            a.test(cl, i32::from(flags::EOI_PIC))?;
            a.je(no_pic)?;
            a.mov(al, 0x20)?;
            a.out(0xa0, al)?;
            a.out(0x20, al)?;
            a.set_label(&mut no_pic)?;
            a.pop($d)?;
            a.pop($c)?;
            a.pop($a)?;
            a.add($sp, 2 * $word)?;
            a.$iret()
        }
    };
}

common!(common64, 8, rax, rcx, rdx, rsp, qword_ptr, iretq);
common!(common32, 4, eax, ecx, edx, esp, dword_ptr, iretd);

/// The handlers of real mode, with the stubs. They tell the host, and do not acknowledge anything.
fn real_handlers() -> Vec<u8> {
    let base = layout::REAL_STUBS;
    let report = layout::REPORT as u32;
    let mut image = assemble(Bits::B16, base, |a| {
        a.push(ds)?;
        a.push(ax)?;
        a.push(dx)?;
        a.push(bp)?;
        a.xor(ax, ax)?;
        a.mov(ds, ax)?;
        a.mov(bp, sp)?;
        // Behind the four saved registers: vector, IP, CS, flags.
        for (i, slot) in [0u32, 2, 3, 4].into_iter().enumerate() {
            a.mov(ax, word_ptr(bp + 8 + 2 * i as u32))?;
            a.mov(word_ptr(report + 8 * slot), ax)?;
        }
        a.inc(word_ptr(report + 56))?;
        a.mov(ax, word_ptr(bp + 8))?;
        a.mov(dx, u32::from(REPORT_PORT))?;
        a.out(dx, al)?;
        a.pop(bp)?;
        a.pop(dx)?;
        a.pop(ax)?;
        a.pop(ds)?;
        a.add(sp, 2)?;
        a.iret()
    });
    for vector in 0..256 {
        let code = assemble(Bits::B16, real_stub(vector), |a| {
            a.push(vector as i32)?;
            a.jmp(base)
        });
        place(&mut image, base, real_stub(vector), &code);
    }
    image
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_match_the_manual() {
        // Intel SDM vol. 3, figure 3-8.
        assert_eq!(SegmentState::flat(8, CODE_READABLE | LONG).descriptor(), 0x00af_9b00_0000_ffff);
        assert_eq!(SegmentState::flat(16, WRITABLE | BIG).descriptor(), 0x00cf_9300_0000_ffff);
        assert_eq!(SegmentState::flat(0x1b, CODE_READABLE | BIG).descriptor(), 0x00cf_fb00_0000_ffff);
        assert_eq!(SegmentState::tss(0x38, 0x1234_5678).descriptor(), 0x1200_8b34_5678_0067);
    }

    #[test]
    fn worlds_fit_in_their_ram_and_do_not_overlap() {
        for world in [World::real(), World::long(), World::protected(), World::user(), World::compatibility()] {
            let world = world.code(|a| a.nop());
            for (gpa, bytes) in &world.memory {
                let end = gpa + bytes.len() as u64;
                assert!(end <= layout::USER_STACK, "{gpa:#x}..{end:#x}");
                for (other, theirs) in &world.memory {
                    let apart = end <= *other || other + theirs.len() as u64 <= *gpa;
                    assert!(apart || gpa == other, "{gpa:#x} and {other:#x}");
                }
            }
        }
    }

    #[test]
    fn every_stub_has_its_place() {
        for bits in [Bits::B32, Bits::B64] {
            let end = layout::HANDLERS + handlers(bits).len() as u64;
            assert!(end > stub(255) && end <= stub(256));
        }
        assert!(real_stub(256) <= layout::IDT);
    }
}
