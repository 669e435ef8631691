//! The boot loader compared with rust-vmm's `linux-loader`, which others boot Linux with: whatever both accept must stand
//! in memory alike, and what we write must read back through its bindings of Linux' and Xen's structures.
//!
//! It loads x86 kernels only when it is built for x86, so this runs on Linux on x86-64 only.

#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

use linux_loader::bootparam::boot_params;
use linux_loader::loader::bzimage::BzImage;
use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use linux_loader::loader::{KernelLoader, KernelLoaderResult};
use std::io::Cursor;
use vm_accel::GuestArch::X86_64;
use vm_accel::x86_64::Reg;
use vm_accel_fuzz::mutate::Mutator;
use vm_accel_fuzz::targets;
use vm_accel_machine::boot::{
    BootKind, BootPlan, BootRequest, BootState, MemoryKind, MemoryMap, MemoryRange, MemorySink,
    Module, Protocol, X86BootState,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const RAM: u64 = 96 << 20;
const RSDP: u64 = 0xe_0000;
const INITRD: &[u8] = b"what Linux unpacks";
const CMDLINE: &str = "console=ttyS0 panic=-1";

struct Guest(GuestMemoryMmap);

impl MemorySink for Guest {
    type Error = vm_memory::GuestMemoryError;

    fn write(&mut self, gpa: u64, data: &[u8]) -> Result<(), Self::Error> {
        self.0.write_slice(data, GuestAddress(gpa))
    }

    fn zero(&mut self, gpa: u64, len: u64) -> Result<(), Self::Error> {
        self.write(gpa, &vec![0; len as usize])
    }
}

impl Guest {
    fn new() -> Self {
        Self(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM as usize)]).unwrap())
    }

    fn bytes(&self, gpa: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.0.read_slice(&mut bytes, GuestAddress(gpa)).unwrap();
        bytes
    }

    fn string(&self, gpa: u64) -> String {
        let bytes = self.bytes(gpa, 256);
        String::from_utf8(bytes.split(|&byte| byte == 0).next().unwrap().to_vec()).unwrap()
    }
}

fn memory_map() -> MemoryMap {
    let range = |base, end: u64, kind| MemoryRange {
        base,
        size: end - base,
        kind,
    };
    MemoryMap::new(vec![
        range(0, 0x9_fc00, MemoryKind::Ram),
        range(0x9_fc00, 1 << 20, MemoryKind::Reserved),
        range(1 << 20, RAM, MemoryKind::Ram),
    ])
    .unwrap()
}

fn with_plan(kind: BootKind, image: &[u8], test: impl FnOnce(&BootPlan<'_>, &X86BootState)) {
    let memory = memory_map();
    let modules = [Module {
        data: INITRD,
        cmdline: "module",
    }];
    let request = BootRequest {
        kind,
        cmdline: CMDLINE,
        modules: &modules,
        acpi_rsdp: Some(RSDP),
        ..BootRequest::new(X86_64, image, &memory)
    };
    let Ok(plan) = request.plan() else { return };
    let BootState::X86(state) = plan.state else {
        unreachable!()
    };
    test(&plan, &state);
}

fn loaded(plan: &BootPlan<'_>) -> Guest {
    let mut guest = Guest::new();
    plan.load(&mut guest).unwrap();
    guest
}

fn seeds(target: &str) -> Vec<Vec<u8>> {
    (targets()
        .into_iter()
        .find(|found| found.name == target)
        .unwrap()
        .seeds)()
}

/// Seeds and damaged copies of them.
fn images(target: &str, copies: u64) -> Vec<Vec<u8>> {
    let seeds = seeds(target);
    let damaged: Vec<_> = (0..copies)
        .map(|run| Mutator::new(run).damaged(&seeds))
        .collect();
    seeds.into_iter().chain(damaged).collect()
}

/// The kernel that `cargo xtask guests` fetches, if it did.
fn debian_kernel() -> Option<Vec<u8>> {
    std::fs::read(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../guests-cache/x86_64/vmlinuz"
    ))
    .ok()
}

#[test]
fn bzimages_stand_in_memory_as_linux_loader_puts_them() {
    let mut compared = 0;
    for image in images("boot_bzimage", 500)
        .into_iter()
        .chain(debian_kernel())
    {
        with_plan(BootKind::Exactly(Protocol::Linux), &image, |plan, state| {
            let ours = loaded(plan);
            let theirs = Guest::new();
            let load = state.regs.pc - 0x200;
            // It loads what stands behind the kernel (a signature) too; only the kernel is compared.
            let result = BzImage::load(
                &theirs.0,
                Some(GuestAddress(load)),
                &mut Cursor::new(&image),
                None,
            );
            let Ok(KernelLoaderResult {
                setup_header: Some(header),
                ..
            }) = result
            else {
                return;
            };
            let kernel = plan.chunks.iter().find(|chunk| chunk.gpa == load).unwrap();
            assert_eq!(
                ours.bytes(load, kernel.data.len()),
                theirs.bytes(load, kernel.data.len())
            );

            let page: boot_params = ours
                .0
                .read_obj(GuestAddress(state.regs.gpr[Reg::Rsi as usize]))
                .unwrap();
            let hdr = page.hdr;
            assert_eq!(
                ({ hdr.header }, { hdr.boot_flag }),
                ({ header.header }, { header.boot_flag })
            );
            assert_eq!(
                ({ hdr.setup_sects }, { hdr.version }),
                ({ header.setup_sects }, { header.version })
            );
            assert_eq!(
                ({ hdr.xloadflags }, { hdr.kernel_alignment }),
                ({ header.xloadflags }, { header.kernel_alignment })
            );
            assert_eq!(
                ({ hdr.initrd_addr_max }, { hdr.type_of_loader }),
                ({ header.initrd_addr_max }, 0xff)
            );
            assert_eq!(ours.string(hdr.cmd_line_ptr.into()), CMDLINE);
            assert_eq!(
                ours.bytes(hdr.ramdisk_image.into(), hdr.ramdisk_size as usize),
                INITRD
            );
            assert_eq!(
                ({ page.ext_ramdisk_image }, { page.ext_ramdisk_size }),
                (0, 0)
            );
            assert_eq!({ page.acpi_rsdp_addr }, RSDP);
            assert_eq!(
                page.sentinel, 0,
                "Linux clears much of the page if it is not"
            );
            let table = page.e820_table;
            let map = memory_map();
            assert_eq!(usize::from(page.e820_entries), map.ranges().len());
            for (entry, range) in table.iter().zip(map.ranges()) {
                assert_eq!(
                    ({ entry.addr }, { entry.size }, { entry.r#type }),
                    (range.base, range.size, range.kind as u32)
                );
            }
            compared += 1;
        });
    }
    assert!(
        compared > 20,
        "only {compared} images were accepted by both"
    );
}

#[test]
fn elf_kernels_stand_in_memory_as_linux_loader_puts_them() {
    let mut compared = 0;
    for image in images("boot_elf", 500) {
        for protocol in [Protocol::Elf, Protocol::Pvh] {
            with_plan(BootKind::Exactly(protocol), &image, |plan, state| {
                let theirs = Guest::new();
                let Ok(result) = Elf::load(&theirs.0, None, &mut Cursor::new(&image), None) else {
                    return;
                };
                let ours = loaded(plan);
                for chunk in plan
                    .chunks
                    .iter()
                    .filter(|chunk| chunk.what.starts_with("kernel segment"))
                {
                    let len = chunk.data.len() + chunk.zeros as usize;
                    assert!(
                        ours.bytes(chunk.gpa, len) == theirs.bytes(chunk.gpa, len),
                        "at {:#x}",
                        chunk.gpa
                    );
                }
                if protocol == Protocol::Pvh {
                    // Of several note segments it keeps the last one's answer; ours is the first entry that is there.
                    if let PvhBootCapability::PvhEntryPresent(entry) = result.pvh_boot_cap {
                        assert_eq!(entry.0, state.regs.pc);
                    }
                }
                compared += 1;
            });
        }
    }
    assert!(
        compared > 100,
        "only {compared} images were accepted by both"
    );
}

#[test]
fn start_info_reads_back_through_xens_structures() {
    let image = seeds("boot_pvh").remove(0);
    let mut tested = false;
    with_plan(BootKind::Auto, &image, |plan, state| {
        let guest = loaded(plan);
        let info: hvm_start_info = guest
            .0
            .read_obj(GuestAddress(state.regs.gpr[Reg::Rbx as usize]))
            .unwrap();
        assert_eq!(
            (info.magic, info.version, info.flags, info.nr_modules),
            (0x336e_c578, 1, 0, 1)
        );
        assert_eq!(guest.string(info.cmdline_paddr), CMDLINE);
        assert_eq!(info.rsdp_paddr, RSDP);
        let module: hvm_modlist_entry = guest.0.read_obj(GuestAddress(info.modlist_paddr)).unwrap();
        assert_eq!(guest.bytes(module.paddr, module.size as usize), INITRD);
        assert_eq!(guest.string(module.cmdline_paddr), "module");
        let map = memory_map();
        assert_eq!(info.memmap_entries as usize, map.ranges().len());
        for (index, range) in map.ranges().iter().enumerate() {
            let at = info.memmap_paddr + (index * size_of::<hvm_memmap_table_entry>()) as u64;
            let entry: hvm_memmap_table_entry = guest.0.read_obj(GuestAddress(at)).unwrap();
            assert_eq!(
                (entry.addr, entry.size, entry.type_),
                (range.base, range.size, range.kind as u32)
            );
        }
        tested = true;
    });
    assert!(tested);
}
