//! PVH: an ELF kernel that names a 32-bit entry in a note, and takes `hvm_start_info`.
//!
//! (Xen `docs/misc/pvh.pandoc` for the CPU's state, `public/arch-x86/hvm/start_info.h` for the structures.)

use super::elf::{self, Elf};
use super::layout::Side;
use super::plan::{BootPlan, Builder};
use super::view::Put;
use super::x86::{self, FOUR_GIB, LOW_MEMORY};
use super::{BootError, BootRequest, MAX_CMDLINE, Protocol, c_string};
use vm_accel::x86_64::Reg;

const MAGIC: u32 = 0x336e_c578;
/// The first version with a memory map.
const VERSION: u32 = 1;
const START_INFO_SIZE: usize = 56;
const MODULE_SIZE: usize = 32;
const MEMORY_ENTRY_SIZE: usize = 24;
const MIB: u64 = 1 << 20;

pub(crate) fn plan<'a>(request: &BootRequest<'a>, mut builder: Builder<'a>) -> Result<BootPlan<'a>, BootError> {
    let protocol = Protocol::Pvh;
    let view = request.view(protocol);
    let elf = Elf::parse(view)?;
    elf::require_machine(&elf, &[elf::EM_386, elf::EM_X86_64], "3 or 62 (x86)")?;
    let Some(entry) = elf.pvh_entry()? else {
        return Err(view.malformed("the PVH note", "(type 18 of Xen) is not there; try the protocol elf"));
    };
    let entry = elf::require_below_4_gib(entry, protocol)?;
    if !elf.covers(entry) {
        return Err(view.malformed("the PVH note", format!("gives the entry {entry:#x}, in no loadable segment")));
    }
    elf.place(&mut builder)?;

    let mut low = |what, data: Vec<u8>| builder.put(what, data, 16, LOW_MEMORY, Side::Bottom);
    let cmdline = low("the command line", request.cmdline_bytes(protocol, MAX_CMDLINE)?)?;
    let module_cmdlines: Vec<u64> = request
        .modules
        .iter()
        .map(|module| low("a module's command line", c_string(module.cmdline)))
        .collect::<Result<_, _>>()?;

    let mut modules = vec![0; request.modules.len() * MODULE_SIZE];
    let entries = modules.chunks_exact_mut(MODULE_SIZE);
    for ((entry, module), cmdline) in entries.zip(request.modules).zip(module_cmdlines) {
        let address = builder.put("a module", module.data, 0x1000, MIB..FOUR_GIB, Side::Top)?;
        let size = module.data.len() as u64;
        // Linux takes the first module for its initial RAM disk.
        builder.initrd.get_or_insert(address..address + size);
        entry.put_u64(0, address);
        entry.put_u64(8, size);
        entry.put_u64(16, cmdline);
    }
    let ranges = request.memory.ranges();
    let mut map = vec![0; ranges.len() * MEMORY_ENTRY_SIZE];
    for (entry, range) in map.chunks_exact_mut(MEMORY_ENTRY_SIZE).zip(ranges) {
        entry.put_u64(0, range.base);
        entry.put_u64(8, range.size);
        entry.put_u32(16, range.kind as u32);
    }

    let mut low = |what, data: Vec<u8>| builder.put(what, data, 16, LOW_MEMORY, Side::Bottom);
    let mut info = vec![0; START_INFO_SIZE];
    info.put_u32(0, MAGIC);
    info.put_u32(4, VERSION);
    info.put_u32(12, request.modules.len() as u32);
    if !modules.is_empty() {
        info.put_u64(16, low("the module list", modules)?);
    }
    info.put_u64(24, cmdline);
    info.put_u64(32, request.acpi_rsdp.unwrap_or(0));
    info.put_u64(40, low("the memory map", map)?);
    info.put_u32(48, ranges.len() as u32);
    let info = low("hvm_start_info", info)?;
    let state = x86::enter_protected32(&mut builder, entry, &[(Reg::Rbx, info)])?;
    Ok(builder.finish(state))
}
