//! The state in which an x86 boot CPU enters an image, and the tables that this state points to.
//!
//! One GDT serves every protected-mode protocol. Its selectors are the ones that Linux' 32-bit and 64-bit boot protocols
//! ask for (`__BOOT_CS` 0x10, `__BOOT_DS` 0x18); PVH and multiboot leave them open. Interrupts are off and there is no
//! IDT: an exception before the image installs one is a triple fault, as on hardware.

use super::layout::Side;
use super::plan::Builder;
use super::view::Put;
use super::{BootError, BootState};
use std::ops::Range;
use vm_accel::GuestRegs;
use vm_accel::x86_64::{
    CR0_ET, CR0_NE, CR0_PE, CR0_PG, CR4_PAE, DescriptorTable, EFER_LMA, EFER_LME, RFLAGS_RESERVED, Reg, Segment,
    X86Sregs,
};

/// `__BOOT_CS` of the Linux boot protocol.
const BOOT_CS: u16 = 0x10;
/// `__BOOT_DS` of the Linux boot protocol.
const BOOT_DS: u16 = 0x18;
/// Task register: VMX cannot enter a guest without a busy TSS (Intel SDM vol. 3, 26.3.1.2), and PVH asks for one.
const BOOT_TR: u16 = 0x20;
/// Limit of a 32-bit TSS without an I/O bitmap; PVH asks for exactly this.
const TSS_LIMIT: u32 = 0x67;
/// Null, unused, code, data, TSS with its upper half.
const GDT_ENTRIES: usize = 6;

/// Conventional memory in which the tables go, above the interrupt vectors and BIOS data of the first page.
pub(crate) const LOW_MEMORY: Range<u64> = 0x1000..0xa_0000;
/// The address behind the last byte that 32-bit code reaches.
pub(crate) const FOUR_GIB: u64 = 1 << 32;

const PAGE: usize = 0x1000;
/// Page tables of the identity map: one level-4 table, one level-3 table, four level-2 tables of 1 GiB each.
const PAGE_TABLES: usize = 6;
const ENTRIES: usize = 512;
/// Present, writable.
const PTE_TABLE: u64 = 0b11;
/// Present, writable, 2 MiB page (PS).
const PTE_LARGE: u64 = 0b1000_0011;

/// How the boot CPU begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum X86Mode {
    /// 16-bit real mode.
    Real,
    /// 32-bit protected mode with flat segments, paging off.
    Protected32,
    /// 64-bit mode with the first 4 GiB identity-mapped.
    Long64,
}

/// Registers of an x86 boot CPU. What is not in it keeps its value after reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct X86BootState {
    /// The mode that the special registers describe.
    pub mode: X86Mode,
    /// General-purpose registers, RIP and RFLAGS.
    pub regs: GuestRegs,
    /// Segments, descriptor tables and control registers. CR2, CR8 and the APIC base are 0 here: a boot protocol has no
    /// say in them; see [`X86BootState::over`].
    pub sregs: X86Sregs,
}

impl X86BootState {
    /// The special registers to set on a vCPU that has `current`: those of the protocol, with CR2, CR8 and the APIC base
    /// of the vCPU.
    #[must_use]
    pub const fn over(&self, current: &X86Sregs) -> X86Sregs {
        X86Sregs { cr2: current.cr2, cr8: current.cr8, apic_base: current.apic_base, ..self.sregs }
    }
}

/// Registers with `values` set, everything else 0, interrupts disabled.
pub(crate) fn registers(entry: u64, values: &[(Reg, u64)]) -> GuestRegs {
    let mut regs = GuestRegs { pc: entry, flags: RFLAGS_RESERVED, ..GuestRegs::default() };
    for &(reg, value) in values {
        regs.gpr[reg as usize] = value;
    }
    regs
}

/// Special registers of a CPU in real mode with the interrupt vectors at 0, all segments at 0.
pub(crate) fn real_mode() -> X86Sregs {
    let data = Segment::real_mode(0);
    let table = DescriptorTable { base: 0, limit: 0xffff };
    X86Sregs {
        cs: Segment { segment_type: 0xb, ..data },
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        tr: Segment::busy_tss(0, 0, 0xffff),
        // An empty but present LDT (type 2), as after reset (Intel SDM vol. 3, table 10-1).
        ldt: Segment { segment_type: 2, ..Segment::busy_tss(0, 0, 0xffff) },
        gdt: table,
        idt: table,
        cr0: CR0_ET,
        ..X86Sregs::default()
    }
}

/// Enters 32-bit code at `entry`: flat segments, paging off. Places the GDT.
pub(crate) fn enter_protected32(
    builder: &mut Builder<'_>,
    entry: u64,
    values: &[(Reg, u64)],
) -> Result<BootState, BootError> {
    let cs = Segment::flat_code32(BOOT_CS, 0);
    let sregs = X86Sregs { cr0: CR0_PE | CR0_ET, ..flat(builder, cs)? };
    Ok(BootState::X86(X86BootState { mode: X86Mode::Protected32, regs: registers(entry, values), sregs }))
}

/// Enters 64-bit code at `entry`: flat segments, first 4 GiB identity-mapped. Places the GDT and the page tables.
pub(crate) fn enter_long64(
    builder: &mut Builder<'_>,
    entry: u64,
    values: &[(Reg, u64)],
) -> Result<BootState, BootError> {
    let cs = Segment::code64(BOOT_CS, 0);
    let flat = flat(builder, cs)?;
    let size = (PAGE_TABLES * PAGE) as u64;
    let cr3 = builder.reserve("page tables", size, PAGE as u64, LOW_MEMORY, Side::Bottom)?;
    builder.fill("page tables", cr3, identity_map(cr3), 0);
    let sregs =
        X86Sregs { cr0: CR0_PE | CR0_ET | CR0_NE | CR0_PG, cr3, cr4: CR4_PAE, efer: EFER_LME | EFER_LMA, ..flat };
    Ok(BootState::X86(X86BootState { mode: X86Mode::Long64, regs: registers(entry, values), sregs }))
}

/// Places the GDT and gives the segments that it describes.
fn flat(builder: &mut Builder<'_>, cs: Segment) -> Result<X86Sregs, BootError> {
    let data = Segment::flat_data(BOOT_DS, 0);
    let tr = Segment::busy_tss(BOOT_TR, 0, TSS_LIMIT);
    let mut table = vec![0; GDT_ENTRIES * 8];
    for segment in [cs, data, tr] {
        table.put_u64(usize::from(segment.selector), segment.descriptor());
    }
    let limit = (table.len() - 1) as u16;
    let base = builder.put("GDT", table, 16, LOW_MEMORY, Side::Bottom)?;
    Ok(X86Sregs {
        cs,
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        tr,
        ldt: Segment { unusable: true, ..Segment::default() },
        gdt: DescriptorTable { base, limit },
        ..X86Sregs::default()
    })
}

/// Page tables, to be written at `base`, that map the first 4 GiB to themselves (Intel SDM vol. 3, 4.5.4).
fn identity_map(base: u64) -> Vec<u8> {
    let mut tables = vec![0; PAGE_TABLES * PAGE];
    let table = |index: usize| (base + (index * PAGE) as u64) | PTE_TABLE;
    tables.put_u64(0, table(1));
    for gib in 0..4 {
        tables.put_u64(PAGE + gib * 8, table(2 + gib));
        for entry in 0..ENTRIES {
            let address = (gib * ENTRIES + entry) as u64 * (2 << 20);
            tables.put_u64((2 + gib) * PAGE + entry * 8, address | PTE_LARGE);
        }
    }
    tables
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Walks the tables as the CPU does.
    fn translate(tables: &[u8], base: u64, linear: u64) -> Option<u64> {
        let entry = |table: u64, index: u64| {
            let at = (table - base + index * 8) as usize;
            u64::from_le_bytes(tables[at..at + 8].try_into().unwrap())
        };
        let address = |entry: u64| (entry & 1 != 0).then_some(entry & 0x000f_ffff_ffff_f000);
        let level3 = address(entry(base, linear >> 39 & 511))?;
        let level2 = address(entry(level3, linear >> 30 & 511))?;
        let page = entry(level2, linear >> 21 & 511);
        (page & 0x81 == 0x81).then_some((page & 0x000f_ffff_ffe0_0000) | linear & 0x1f_ffff)
    }

    #[test]
    fn four_gib_are_mapped_to_themselves_and_no_more() {
        let tables = identity_map(0x5000);
        for linear in [0, 0x1234, 0x20_0000, 0x3fff_ffff, 0x4000_0000, 0xfee0_0000, 0xffff_ffff] {
            assert_eq!(translate(&tables, 0x5000, linear), Some(linear));
        }
        assert_eq!(translate(&tables, 0x5000, 1 << 32), None);
        assert_eq!(translate(&tables, 0x5000, 1 << 39), None);
    }

    #[test]
    fn what_the_protocol_does_not_set_comes_from_the_vcpu() {
        let state = X86BootState { mode: X86Mode::Real, regs: registers(0, &[]), sregs: real_mode() };
        let current = X86Sregs { apic_base: 0xfee0_0900, cr3: 0x1000, ..X86Sregs::default() };
        let merged = state.over(&current);
        assert_eq!((merged.apic_base, merged.cr3, merged.cr0), (0xfee0_0900, 0, CR0_ET));
    }
}
