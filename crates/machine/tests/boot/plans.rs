//! What each protocol leaves in memory and in the boot CPU.

use crate::support::*;
use vm_accel::GuestArch::{Aarch64, X86_64};
use vm_accel::aarch64;
use vm_accel::x86_64::Reg;
use vm_accel_machine::boot::{
    BootError, BootKind, BootPlan, BootRequest, BootState, MemoryKind, MemoryMap, MemoryRange, Module, Protocol,
    X86BootState, X86Mode,
};

const RAM: u64 = 64 * MIB;

fn x86(plan: &BootPlan<'_>) -> X86BootState {
    match plan.state {
        BootState::X86(state) => state,
        other => panic!("not an x86 CPU: {other:?}"),
    }
}

fn gpr(state: &X86BootState, reg: Reg) -> u64 {
    state.regs.gpr[reg as usize]
}

/// Checks segments, control registers and the GDT that they came from.
fn assert_protected(state: &X86BootState, memory: &Memory) {
    let s = &state.sregs;
    assert_eq!((s.cs.selector, s.ds.selector, s.ss.selector), (0x10, 0x18, 0x18));
    assert_eq!((s.cs.base, s.cs.limit, s.ds.base, s.ds.limit), (0, u32::MAX, 0, u32::MAX));
    assert_eq!(memory.u64(s.gdt.base + 0x18), 0x00cf_9300_0000_ffff);
    let code = match state.mode {
        X86Mode::Long64 => 0x00af_9b00_0000_ffff,
        _ => 0x00cf_9b00_0000_ffff,
    };
    assert_eq!(memory.u64(s.gdt.base + 0x10), code);
    assert_eq!(u64::from(s.gdt.limit) + 1, 48);
    assert_eq!((s.tr.segment_type, s.tr.limit, s.tr.base), (0xb, 0x67, 0));
    assert!(s.ldt.unusable);
    assert_eq!(state.regs.flags, 2);
    match state.mode {
        X86Mode::Long64 => {
            assert_eq!((s.cr0, s.cr4, s.efer), (0x8000_0031, 0x20, 0x500));
            assert_eq!(memory.u64(s.cr3) & 0xfff, 3);
        }
        _ => assert_eq!((s.cr0, s.cr3, s.cr4, s.efer), (0x11, 0, 0, 0)),
    }
}

#[test]
fn every_seed_is_detected_and_planned() {
    for (name, arch, protocol, image) in seeds() {
        let memory = memory_of(arch, RAM);
        let plan = BootRequest::new(arch, &image, &memory).plan().unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(plan.protocol, protocol, "{name}");
        check(&plan, &memory);
        if !matches!(protocol, Protocol::Flat | Protocol::Firmware) {
            exercise(arch, BootKind::Auto, &image, &memory).unwrap();
        }
        exercise(arch, BootKind::Exactly(protocol), &image, &memory).unwrap();
    }
}

#[test]
fn bzimage_by_the_64_bit_entry() {
    let image = bzimage(0x1230);
    let memory = pc_memory(RAM);
    let modules = [Module { data: b"initial RAM disk", cmdline: "" }];
    let request = BootRequest {
        cmdline: "console=ttyS0 panic=-1",
        modules: &modules,
        acpi_rsdp: Some(0xe_0000),
        ..BootRequest::new(X86_64, &image, &memory)
    };
    let plan = request.plan().unwrap();
    let state = x86(&plan);
    let guest = Memory::of(&plan);
    assert_eq!((state.mode, state.regs.pc), (X86Mode::Long64, 0x20_0200));
    assert_protected(&state, &guest);
    assert_eq!(guest.bytes(0x20_0000, 0x1230), &image[1024..]);
    assert_eq!(guest.u8(0x20_1230), 0, "what init_size adds is zero");

    let zero_page = gpr(&state, Reg::Rsi);
    assert!((0x1000..0x9_f000).contains(&zero_page) && zero_page.is_multiple_of(4096));
    assert_eq!(guest.bytes(zero_page + 0x202, 4), b"HdrS");
    assert_eq!(guest.u16(zero_page + 0x1fe), 0xaa55);
    assert_eq!(guest.u8(zero_page + 0x210), 0xff);
    assert_eq!(guest.u32(zero_page + 0x260), 0x10_0000, "the header is copied up to its end");
    assert_eq!(guest.u64(zero_page + 0x70), 0xe_0000);
    assert_eq!(guest.string(guest.u32(zero_page + 0x228).into()), "console=ttyS0 panic=-1");

    let initrd = u64::from(guest.u32(zero_page + 0x218));
    assert_eq!(initrd, RAM - 4096, "as high as possible");
    assert_eq!(guest.u32(zero_page + 0x21c), 16);
    assert_eq!((guest.u32(zero_page + 0xc0), guest.u32(zero_page + 0xc4)), (0, 0));
    assert_eq!(guest.bytes(initrd, 16), b"initial RAM disk");
    assert_eq!(plan.initrd, Some(initrd..initrd + 16));

    assert_eq!(guest.u8(zero_page + 0x1e8), 3);
    let entry = zero_page + 0x2d0 + 2 * 20;
    assert_eq!((guest.u64(entry), guest.u64(entry + 8), guest.u32(entry + 16)), (MIB, RAM - MIB, 1));
    assert_eq!(guest.u32(zero_page + 0x2d0 + 20 + 16), 2, "the hole is reserved");
}

#[test]
fn bzimage_by_the_32_bit_entry() {
    let mut image = bzimage(0x400);
    let memory = pc_memory(RAM);
    let mut request = BootRequest::new(X86_64, &image, &memory);
    request.kind = BootKind::Exactly(Protocol::Linux32);
    let plan = request.plan().unwrap();
    let state = x86(&plan);
    assert_eq!((state.mode, state.regs.pc), (X86Mode::Protected32, 0x20_0000));
    assert_protected(&state, &Memory::of(&plan));
    assert_ne!(gpr(&state, Reg::Rsi), 0);
    assert_eq!((gpr(&state, Reg::Rbp), gpr(&state, Reg::Rdi), gpr(&state, Reg::Rbx)), (0, 0, 0));

    // Without a 64-bit entry it is what detection chooses, and forcing the other says so.
    image[0x236] = 0;
    let mut request = BootRequest::new(X86_64, &image, &memory);
    assert_eq!(request.plan().unwrap().protocol, Protocol::Linux32);
    request.kind = BootKind::Exactly(Protocol::Linux);
    let text = request.plan().unwrap_err().to_string();
    assert!(text.contains("linux32"), "{text}");
}

#[test]
fn initrd_respects_initrd_addr_max_and_the_4_gib_line() {
    let gib = 1u64 << 30;
    let range = |base, size| MemoryRange { base, size, kind: MemoryKind::Ram };
    let memory = MemoryMap::new(vec![range(0, 3 * gib), range(4 * gib, 4 * gib)]).unwrap();
    let data = vec![1; 5 << 20];
    let modules = [Module { data: &data, cmdline: "" }];
    let place = |image: &[u8], memory: &MemoryMap| {
        let request = BootRequest { modules: &modules, ..BootRequest::new(X86_64, image, memory) };
        let plan = request.plan()?;
        let guest = Memory::of(&plan);
        let zero_page = gpr(&x86(&plan), Reg::Rsi);
        let high = u64::from(guest.u32(zero_page + 0xc0)) << 32;
        let address = high | u64::from(guest.u32(zero_page + 0x218));
        assert_eq!(plan.initrd.clone().unwrap().start, address);
        Ok::<_, BootError>(address)
    };
    let mut image = bzimage(0x400);
    assert_eq!(place(&image, &memory).unwrap(), 2 * gib - (5 << 20), "at most 0x7fffffff");
    image[0x236] |= 2;
    assert_eq!(place(&image, &memory).unwrap(), 3 * gib - (5 << 20), "anywhere, but below 4 GiB if there is room");
    let tight = MemoryMap::new(vec![range(0, 8 << 20), range(4 * gib, gib)]).unwrap();
    image[0x260..0x264].copy_from_slice(&(4u32 << 20).to_le_bytes());
    assert_eq!(place(&image, &tight).unwrap(), 5 * gib - (5 << 20), "above only if there is none below");
    image[0x236] &= !2;
    assert!(matches!(place(&image, &tight), Err(BootError::NoRoom { .. })));
}

#[test]
fn a_relocatable_kernel_moves_above_a_hole() {
    let image = bzimage(0x400);
    let ram = |base, size| MemoryRange { base, size, kind: MemoryKind::Ram };
    let memory = MemoryMap::new(vec![ram(0, 0x9_f000), ram(MIB, MIB + MIB / 2), ram(8 * MIB + 4096, 8 * MIB)]).unwrap();
    let plan = BootRequest::new(X86_64, &image, &memory).plan().unwrap();
    assert_eq!(x86(&plan).regs.pc, 0xa0_0200, "aligned to kernel_alignment");

    let mut fixed = image.clone();
    fixed[0x234] = 0;
    let enough = pc_memory(RAM);
    let plan = BootRequest::new(X86_64, &fixed, &enough).plan().unwrap();
    assert_eq!(x86(&plan).regs.pc, 0x10_0200, "not relocatable: at code32_start");
    fixed[0x214..0x218].copy_from_slice(&0x40_0000u32.to_le_bytes());
    assert!(matches!(BootRequest::new(X86_64, &fixed, &memory).plan(), Err(BootError::OutsideRam { .. })));
}

#[test]
fn elf_without_a_note_gets_a_zero_page() {
    let image = plain_elf();
    let memory = pc_memory(RAM);
    let request = BootRequest { cmdline: "quiet", ..BootRequest::new(X86_64, &image, &memory) };
    let plan = request.plan().unwrap();
    let state = x86(&plan);
    let guest = Memory::of(&plan);
    assert_eq!((plan.protocol, state.mode, state.regs.pc), (Protocol::Elf, X86Mode::Long64, 0x100_0000));
    assert_protected(&state, &guest);
    let zero_page = gpr(&state, Reg::Rsi);
    assert_eq!((guest.u16(zero_page + 0x1fe), guest.u8(zero_page + 0x211)), (0xaa55, 1));
    assert_eq!(guest.string(guest.u32(zero_page + 0x228).into()), "quiet");
    assert_eq!(guest.bytes(0x100_0000, 0x800), &[0xf4; 0x800]);
    assert_eq!(guest.bytes(0x100_0800, 0x3800), &[0; 0x3800]);
}

#[test]
fn a_virtual_entry_is_translated() {
    let virt = 0xffff_ffff_8100_0000;
    let image = elf64(62, virt + 0x40, &[(1, 0x1000, virt, 0x100_0000, 0x800, 0x800)], &[0xf4; 0x800]);
    let memory = pc_memory(RAM);
    let plan = BootRequest::new(X86_64, &image, &memory).plan().unwrap();
    assert_eq!(x86(&plan).regs.pc, 0x100_0040);
}

#[test]
fn pvh_start_info() {
    let image = pvh_kernel();
    let memory = pc_memory(RAM);
    let modules = [Module { data: b"first", cmdline: "one" }, Module { data: b"second", cmdline: "two" }];
    let request = BootRequest {
        cmdline: "console=ttyS0",
        modules: &modules,
        acpi_rsdp: Some(0xe_0000),
        ..BootRequest::new(X86_64, &image, &memory)
    };
    let plan = request.plan().unwrap();
    let state = x86(&plan);
    let guest = Memory::of(&plan);
    assert_eq!((plan.protocol, state.mode, state.regs.pc), (Protocol::Pvh, X86Mode::Protected32, 0x100_0010));
    assert_protected(&state, &guest);
    let info = gpr(&state, Reg::Rbx);
    assert_eq!((guest.u32(info), guest.u32(info + 4), guest.u32(info + 12)), (0x336e_c578, 1, 2));
    assert_eq!(guest.string(guest.u64(info + 24)), "console=ttyS0");
    assert_eq!(guest.u64(info + 32), 0xe_0000);
    let list = guest.u64(info + 16);
    for (index, module) in modules.iter().enumerate() {
        let entry = list + 32 * index as u64;
        assert_eq!(guest.u64(entry + 8), module.data.len() as u64);
        assert_eq!(guest.bytes(guest.u64(entry), module.data.len()), module.data);
        assert_eq!(guest.string(guest.u64(entry + 16)), module.cmdline);
    }
    assert_eq!(plan.initrd.unwrap().start, guest.u64(list));
    assert_eq!(guest.u32(info + 48), 3);
    let entry = guest.u64(info + 40) + 2 * 24;
    assert_eq!((guest.u64(entry), guest.u64(entry + 8), guest.u32(entry + 16)), (MIB, RAM - MIB, 1));
}

#[test]
fn multiboot_information() {
    let image = multiboot_elf();
    let memory = pc_memory(RAM);
    let modules = [Module { data: b"NR_CPUS=2\n", cmdline: "env" }, Module { data: b"x", cmdline: "" }];
    let request = BootRequest {
        name: "my kernel.flat",
        cmdline: "a b",
        modules: &modules,
        ..BootRequest::new(X86_64, &image, &memory)
    };
    let plan = request.plan().unwrap();
    let state = x86(&plan);
    let guest = Memory::of(&plan);
    assert_eq!((plan.protocol, state.mode, state.regs.pc), (Protocol::Multiboot, X86Mode::Protected32, 0x40_0010));
    assert_protected(&state, &guest);
    assert_eq!(gpr(&state, Reg::Rax), 0x2bad_b002);
    let info = gpr(&state, Reg::Rbx);
    let at = |offset: u64| u64::from(guest.u32(info + offset));
    assert_eq!(at(0), 1 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9);
    assert_eq!((at(4), at(8)), (0x9_fc00 / 1024, (RAM - MIB) / 1024));
    assert_eq!(guest.string(at(16)), "my_kernel.flat a b");
    assert_eq!(guest.string(at(64)), "vm-accel");
    assert_eq!(at(20), 2);
    let module = |index: u64, offset: u64| u64::from(guest.u32(at(24) + index * 16 + offset));
    assert_eq!(module(0, 0), 0x40_3000, "behind the kernel with its BSS");
    assert_eq!(guest.bytes(module(0, 0), 10), b"NR_CPUS=2\n");
    assert_eq!((module(0, 4), module(1, 0), module(1, 4)), (0x40_300a, 0x40_4000, 0x40_4001));
    assert_eq!(guest.string(module(0, 8)), "env");
    assert_eq!(at(44), 3 * 24);
    let entry = at(48) + 2 * 24;
    assert_eq!((guest.u32(entry), guest.u64(entry + 4), guest.u64(entry + 12)), (20, MIB, RAM - MIB));
}

#[test]
fn flat_multiboot_is_loaded_by_the_addresses_in_its_header() {
    let image = multiboot_flat();
    let memory = pc_memory(RAM);
    let plan = BootRequest::new(X86_64, &image, &memory).plan().unwrap();
    let guest = Memory::of(&plan);
    assert_eq!(x86(&plan).regs.pc, 0x10_0080);
    assert_eq!(guest.bytes(0x10_0000, 0x100), &image[0x30..0x130]);
    assert_eq!(guest.bytes(0x10_0100, 0xf00), &[0; 0xf00]);

    // An end of 0 means the rest of the file, a BSS end of 0 none.
    let mut image = vec![0xcc; 0x40];
    image.extend(multiboot_header(0x1_0000, &[0x10_0040, 0x10_0000, 0, 0, 0x10_0050]));
    image.resize(0x400, 0xf4);
    let plan = BootRequest::new(X86_64, &image, &memory).plan().unwrap();
    let chunk = plan.chunks.iter().find(|chunk| chunk.gpa == 0x10_0000).unwrap();
    assert_eq!((chunk.data.len(), chunk.zeros), (0x400, 0));
}

#[test]
fn tables_go_around_a_kernel_in_low_memory() {
    let mut image = vec![0xcc; 0];
    image.extend(multiboot_header(0x1_0000, &[0x1000, 0x1000, 0, 0x8_0000, 0x1020]));
    image.resize(0x400, 0xf4);
    let memory = pc_memory(RAM);
    let plan = BootRequest::new(X86_64, &image, &memory).plan().unwrap();
    check(&plan, &memory);
    assert!(gpr(&x86(&plan), Reg::Rbx) >= 0x8_0000);
}

#[test]
fn a_flat_binary_begins_in_real_mode() {
    let memory = pc_memory(RAM);
    let image = [0xf4; 100];
    let begin = |address| {
        let request = BootRequest {
            kind: BootKind::Exactly(Protocol::Flat),
            flat_address: address,
            ..BootRequest::new(X86_64, &image, &memory)
        };
        let plan = request.plan()?;
        check(&plan, &memory);
        let state = x86(&plan);
        assert_eq!(Memory::of(&plan).bytes(address, 100), &image);
        assert_eq!((state.mode, state.sregs.cr0, state.sregs.ds.selector), (X86Mode::Real, 0x10, 0));
        Ok::<_, BootError>((state.sregs.cs.selector, state.sregs.cs.base, state.regs.pc, gpr(&state, Reg::Rsp)))
    };
    assert_eq!(begin(0x7c00).unwrap(), (0, 0, 0x7c00, 0x7c00));
    assert_eq!(begin(0x100).unwrap(), (0, 0, 0x100, 0));
    assert_eq!(begin(0x2_3458).unwrap(), (0x2345, 0x2_3450, 8, 0x7c00));
    for bad in [0x9_fbff, 0xf_0000] {
        assert!(matches!(begin(bad), Err(BootError::OutsideRam { .. })));
    }
    for bad in [MIB, u64::MAX] {
        assert!(matches!(begin(bad), Err(BootError::Malformed { .. })));
    }
}

#[test]
fn firmware_is_at_the_reset_vector() {
    let image = firmware(256 << 10);
    let memory = pc_memory(RAM);
    let plan = BootRequest::new(X86_64, &image, &memory).plan().unwrap();
    check(&plan, &memory);
    let state = x86(&plan);
    assert_eq!((plan.protocol, state.mode), (Protocol::Firmware, X86Mode::Real));
    assert_eq!((state.sregs.cs.selector, state.sregs.cs.base, state.regs.pc), (0xf000, 0xffff_0000, 0xfff0));
    let [high, low] = &plan.mappings[..] else { panic!("two mappings") };
    assert_eq!((high.gpa, high.data, high.writable), (0xfffc_0000, &image[..], false));
    assert_eq!((low.gpa, low.data, low.writable), (0xe_0000, &image[128 << 10..], true));

    // Larger than 128 KiB has a copy of the last 128 KiB only; smaller one of all.
    let small = firmware(64 << 10);
    let plan = BootRequest::new(X86_64, &small, &memory).plan().unwrap();
    assert_eq!((plan.mappings[1].gpa, plan.mappings[1].data.len()), (0xf_0000, 64 << 10));
}

#[test]
fn uefi_firmware_is_known_by_its_volume_header() {
    let memory = pc_memory(RAM);
    let mut image = firmware(64 << 10);
    let vector = image.len() - 16;
    image[vector..].copy_from_slice(b"\x0f\x20\xc0\xa8\x01\x74\x05\xe9\x28\xff\xff\xff\xe9\x09\xff\x90");
    assert!(BootRequest::new(X86_64, &image, &memory).plan().is_err());
    image[40..44].copy_from_slice(b"_FVH");
    assert_eq!(BootRequest::new(X86_64, &image, &memory).plan().unwrap().protocol, Protocol::Firmware);
    // A store of variables has a header too, but nothing to run.
    image[vector..].fill(0xff);
    assert!(BootRequest::new(X86_64, &image, &memory).plan().is_err());
}

#[test]
fn firmware_collides_with_ram_that_is_in_its_place() {
    let image = firmware(64 << 10);
    let range = MemoryRange { base: 0, size: 2 * MIB, kind: MemoryKind::Ram };
    let memory = MemoryMap::new(vec![range]).unwrap();
    let error = BootRequest::new(X86_64, &image, &memory).plan().unwrap_err();
    assert!(matches!(error, BootError::Overlap { .. }), "{error}");
}

fn arm(plan: &BootPlan<'_>) -> (u64, u64, u64) {
    match plan.state {
        BootState::Aarch64(regs) => (regs.pc, regs.gpr[aarch64::Reg::X0 as usize], regs.flags),
        other => panic!("not an aarch64 CPU: {other:?}"),
    }
}

#[test]
fn arm64_images_plain_and_compressed() {
    let image = arm_image(0x3000, 0x8_0000, 0x40_0000);
    let memory = arm_memory(RAM);
    let data = [7; 5000];
    let modules = [Module { data: &data, cmdline: "" }];
    for packed in [image.clone(), gzip(&image), zboot(&gzip(&image), b"gzip\0")] {
        let request = BootRequest { modules: &modules, ..BootRequest::new(Aarch64, &packed, &memory) };
        let plan = request.plan().unwrap();
        check(&plan, &memory);
        let (pc, x0, pstate) = arm(&plan);
        assert_eq!((plan.protocol, pc, pstate), (Protocol::Image, 0x4008_0000, 0x3c5));
        assert_eq!(x0, 0x4060_0000, "in the first block behind the kernel");
        assert_eq!(plan.initrd, Some(0x43ff_e000..0x43ff_e000 + 5000));
        let guest = Memory::of(&plan);
        assert_eq!(guest.bytes(pc, 0x3000), image);
        assert_eq!(guest.u8(pc + 0x3000), 0);
    }
    // Before Linux 3.17 there was no size, and the text offset did not count.
    let old = arm_image(0x3000, 0x1000, 0);
    assert_eq!(arm(&BootRequest::new(Aarch64, &old, &memory).plan().unwrap()).0, 0x4008_0000);
}

#[test]
fn an_arm64_image_that_is_a_pe_file_has_all_its_sections() {
    let memory = arm_memory(RAM);
    let mut image = arm_image(0x400, 0, 0x2000);
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"MZ");
    put(60, &[0x40, 0, 0, 0]);
    put(0x46, &[1, 0]);
    put(0x54, &[0xa0, 0]);
    let section = 0x40 + 24 + 0xa0;
    put(section + 16, &[0, 2, 0, 0]);
    put(section + 20, &[0, 2, 0, 0]);
    assert!(BootRequest::new(Aarch64, &image, &memory).plan().is_ok());
    let error = BootRequest::new(Aarch64, &image[..0x3ff], &memory).plan().unwrap_err();
    assert!(matches!(error, BootError::Truncated { .. }), "{error}");
}

#[test]
fn debug_output_has_no_file_contents() {
    let (image, memory) = (bzimage(0x4000), pc_memory(RAM));
    let request = BootRequest::new(X86_64, &image, &memory);
    assert!(format!("{request:?}").len() < 1000);
    assert!(format!("{:?}", request.plan().unwrap()).len() < 5000);
}

#[test]
fn arm64_elf_and_flat() {
    let memory = arm_memory(RAM);
    let image = arm_elf();
    let plan = BootRequest::new(Aarch64, &image, &memory).plan().unwrap();
    assert_eq!(arm(&plan).0, 0x4020_0000);
    let request = BootRequest {
        kind: BootKind::Exactly(Protocol::Flat),
        flat_address: 0x4000_1000,
        ..BootRequest::new(Aarch64, &[0x1f; 8], &memory)
    };
    assert_eq!(arm(&request.plan().unwrap()).0, 0x4000_1000);
}

#[test]
fn names_of_kinds_parse_back() {
    for kind in [BootKind::Auto].into_iter().chain(Protocol::ALL.map(BootKind::Exactly)) {
        assert_eq!(kind.to_string().parse(), Ok(kind));
    }
    let text = "floppy".parse::<BootKind>().unwrap_err().to_string();
    assert!(text.contains("floppy") && text.contains("auto, linux, linux32"), "{text}");
}
