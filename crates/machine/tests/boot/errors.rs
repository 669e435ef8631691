//! What a user is told about files that cannot be booted: one sentence that names the kind, the field and what helps.

use crate::support::*;
use std::fs;
use std::path::Path;
use vm_accel::GuestArch::{self, Aarch64, X86_64};
use vm_accel_machine::boot::{
    BootError, BootKind, BootRequest, MAX_CMDLINE, MemoryKind, MemoryMap, MemoryRange, Module, Protocol, read_image,
};

fn refusal(arch: GuestArch, kind: BootKind, image: &[u8]) -> String {
    let memory = memory_of(arch, 32 * MIB);
    let request = BootRequest { kind, ..BootRequest::new(arch, image, &memory) };
    let text = request.plan().expect_err("it must be refused").to_string();
    assert!(!text.contains('\n'), "one sentence: {text}");
    text
}

#[track_caller]
fn assert_refused(image: &[u8], parts: &[&str]) {
    let text = refusal(X86_64, BootKind::Auto, image);
    assert!(parts.iter().all(|part| text.contains(part)), "{text:?} lacks one of {parts:?}");
}

/// `image` with `bytes` at `at`.
fn with(mut image: Vec<u8>, at: usize, bytes: &[u8]) -> Vec<u8> {
    image[at..at + bytes.len()].copy_from_slice(bytes);
    image
}

#[test]
fn files_that_are_no_kernel() {
    assert_refused(b"", &["empty"]);
    assert_refused(b"\xff\xd8\xff\xe0\0\x10JFIF", &["JPEG"]);
    assert_refused(b"#!/bin/sh\n", &["script"]);
    assert_refused(b"Dear reader,\n", &["text file"]);
    assert_refused(b"070701000", &["initrd"]);
    assert_refused(&gzip(b"x"), &["gzip"]);
    assert_refused(b"MZ\x90\0", &["EFI"]);
    assert_refused(&[0; 100], &["no header of a known format"]);
    assert_refused(b"\x7f", &["no header"]);
    let disk = with(vec![0; 4096], 510, &[0x55, 0xaa]);
    assert_refused(&disk, &["disk image", "flat"]);
}

#[test]
fn bzimage_fields() {
    let good = || bzimage(0x400);
    assert_refused(&good()[..0x300], &["bzImage", "truncated", "protected-mode kernel"]);
    assert_refused(&good()[..0x600], &["bzImage", "truncated", "syssize"]);
    assert_refused(&good()[..0x230], &["bzImage", "truncated", "setup header"]);
    assert_refused(&with(good(), 0x1fe, &[0, 0]), &["boot_flag"]);
    assert_refused(&with(good(), 0x206, &[1, 2]), &["older than 2.02"]);
    assert_refused(&with(good(), 0x211, &[0]), &["zImage"]);
    for jump in [0, 0x10, 0x8f, 0xff] {
        assert_refused(&with(good(), 0x201, &[jump]), &["jump over the setup header"]);
    }
    for alignment in [0u32, 3, 1, 1 << 31] {
        assert_refused(&with(good(), 0x230, &alignment.to_le_bytes()), &["kernel_alignment"]);
    }
    for address in [u64::MAX, 1 << 33, u64::MAX - 0x1f_ffff] {
        assert_refused(&with(good(), 0x258, &address.to_le_bytes()), &["pref_address", "memory"]);
    }
    assert_refused(&with(good(), 0x260, &u32::MAX.to_le_bytes()), &["init_size", "memory"]);
    assert_refused(&bzimage(0x200), &["64-bit entry"]);
    assert_refused(&with(good(), 0x1f1, &[0xff]), &["setup_sects"]);
}

#[test]
fn elf_fields() {
    let load = |paddr, file, memory| (1, 0x1000, paddr, paddr, file, memory);
    let elf = |headers: &[Header]| elf64(62, 0x100_0000, headers, &[0xf4; 0x800]);
    let good = || elf(&[load(0x100_0000, 0x800, 0x800)]);
    assert_refused(&good()[..0x30], &["ELF", "truncated"]);
    assert_refused(&good()[..0x1400], &["p_filesz", "truncated"]);
    assert_refused(&with(good(), 4, &[3]), &["EI_CLASS"]);
    assert_refused(&with(good(), 5, &[2]), &["EI_DATA"]);
    assert_refused(&with(good(), 16, &[1]), &["e_type", "linked"]);
    assert_refused(&with(good(), 18, &[8]), &["ELF", "x86_64"]);
    assert_refused(&with(good(), 18, &[183]), &["arm64", "x86_64"]);
    assert_refused(&with(good(), 24, &[0; 8]), &["e_entry"]);
    assert_refused(&with(good(), 32, &[0xff; 8]), &["program header table"]);
    assert_refused(&with(good(), 54, &[55]), &["e_phentsize"]);
    assert_refused(&with(good(), 56, &[0]), &["e_phnum"]);
    assert_refused(&with(good(), 56, &[0xff, 0xff]), &["program header table", "truncated"]);
    assert_refused(&elf(&[load(0x100_0000, 0x800, 0x700)]), &["p_filesz", "p_memsz"]);
    assert_refused(&elf(&[load(0x100_0000, 0x800, 1 << 40)]), &["p_memsz", "memory"]);
    assert_refused(&elf(&[load(0x100_0000, u64::MAX, u64::MAX)]), &["p_filesz"]);
    assert_refused(&elf(&[load(0x100_0000, 0x800, 0x800), load(0x100_07ff, 1, 1)]), &["overlaps", "p_paddr"]);
    assert_refused(&elf(&[(3, 0, 0, 0, 0, 0), load(0x100_0000, 0x800, 0x800)]), &["user program"]);
    assert_refused(&elf(&[(4, 0x1000, 0, 0, 1 << 30, 0), load(0x100_0000, 0x800, 0x800)]), &["notes"]);
    let high = 1 << 32;
    let text = refusal(X86_64, BootKind::Auto, &elf64(62, high, &[load(high, 1, 1)], &[0; 4]));
    assert!(text.contains("4 GiB"), "{text}");
    assert_refused(&elf32(3, 0x10_0000, 0x10_0000, 16, &[0; 16]), &["32-bit ELF", "multiboot"]);
}

#[test]
fn pvh_fields() {
    let kernel = |note: &[u8]| {
        let size = note.len() as u64;
        let mut data = note.to_vec();
        data.resize(0x800, 0);
        let headers = [(1, 0x1000, 0x100_0000, 0x100_0000, 0x800, 0x800), (4, 0x1000, 0, 0, size, size)];
        elf64(62, 0x100_0000, &headers, &data)
    };
    let pvh = BootKind::Exactly(Protocol::Pvh);
    for (note, expected) in [
        (pvh_note(0x1234), "no loadable segment"),
        (with(pvh_note(0), 28, &[6]), "truncated"),
        (with(pvh_note(0), 24, &[0xff; 4]), "n_namesz"),
        (with(pvh_note(0), 28, &[0xff; 4]), "n_descsz"),
        (with(pvh_note(0), 28, &[2]), "neither 4 nor 8"),
        (with(pvh_note(0), 32, &[1]), "is not there"),
        (Vec::new(), "is not there"),
    ] {
        let text = refusal(X86_64, pvh, &kernel(&note));
        assert!(text.starts_with("PVH kernel") && text.contains(expected), "{text} lacks {expected}");
    }
}

#[test]
fn multiboot_fields() {
    let flat = |flags, addresses: [u32; 5]| {
        let mut image = vec![0xcc; 0x40];
        image.extend(multiboot_header(flags, &addresses));
        image.resize(0x400, 0xf4);
        image
    };
    let base = 0x10_0000;
    assert_refused(&flat(0x1_0008, [0; 5]), &["flags", "feature"]);
    assert_refused(&flat(0, [0; 5]), &["flags", "no ELF file"]);
    assert_refused(&flat(0x1_0000, [base - 1, base, 0, 0, base]), &["header_addr"]);
    assert_refused(&flat(0x1_0000, [base + 0x41, base, 0, 0, base]), &["header_addr"]);
    assert_refused(&flat(0x1_0000, [base, base, base - 1, 0, base]), &["load_end_addr"]);
    assert_refused(&flat(0x1_0000, [base, base, base + 0x401, 0, base]), &["load_end_addr", "truncated"]);
    assert_refused(&flat(0x1_0000, [base, base, base + 0x100, base + 0xff, base]), &["bss_end_addr"]);
    assert_refused(&flat(0x1_0000, [base, base, 0, 0, base + 0x3c0]), &["entry_addr"]);
    assert_refused(&flat(0x1_0000, [base, base, 0, u32::MAX, base]), &["bss_end_addr", "memory"]);
    assert_refused(&multiboot_flat()[..0x50], &["load_addr", "truncated"]);
    let forced = refusal(X86_64, BootKind::Exactly(Protocol::Multiboot), &bzimage(0x400));
    assert!(forced.contains("multiboot header"), "{forced}");
}

#[test]
fn arm64_fields() {
    let image = BootKind::Exactly(Protocol::Image);
    for (file, expected) in [
        (arm_image(64, 0, 1 << 40), "memory"),
        (arm_image(64, u64::MAX, 64), "text_offset"),
        (arm_image(64, 0, u64::MAX), "image_size"),
        (with(arm_image(64, 0, 64), 24, &[1]), "big-endian"),
        (arm_image(64, 0, 64)[..60].to_vec(), "header"),
        (gzip(b"hello"), "header"),
        (gzip(&[0; 4096]), "magic number"),
        (gzip(&arm_image(4096, 0, 4096))[..40].to_vec(), "damaged"),
        (gzip(&vec![0; 33 << 20]), "unpacked kernel"),
        (zboot(b"", b"zstd22"), "gzip"),
        (with(zboot(b"x", b"gzip\0"), 12, &[0xff; 4]), "payload"),
        (bzimage(0x400), "magic number"),
    ] {
        let text = refusal(Aarch64, image, &file);
        assert!(text.contains(expected), "{text} lacks {expected}");
    }
}

#[test]
fn unpacking_stops_at_the_size_of_ram() {
    let bomb = gzip(&vec![0; 64 << 20]);
    let memory = arm_memory(8 * MIB);
    match BootRequest::new(Aarch64, &bomb, &memory).plan() {
        Err(BootError::TooLarge { size, limit, .. }) => {
            assert_eq!((size, limit), (8 * MIB + 1, 8 * MIB))
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_kernel_must_end_below_4_gib() {
    let range = MemoryRange { base: 0, size: 8 << 30, kind: MemoryKind::Ram };
    let memory = MemoryMap::new(vec![range]).unwrap();
    let image = with(bzimage(0x400), 0x258, &0xffe0_0000u64.to_le_bytes());
    let image = with(image, 0x260, &(4u32 << 20).to_le_bytes());
    let error = BootRequest::new(X86_64, &image, &memory).plan().unwrap_err();
    assert!(matches!(error, BootError::NoRoom { .. }), "{error}");
}

#[test]
fn the_wrong_architecture() {
    for (_, arch, protocol, image) in seeds() {
        let other = if arch == X86_64 { Aarch64 } else { X86_64 };
        let memory = memory_of(other, 32 * MIB);
        if !matches!(protocol, Protocol::Flat | Protocol::Elf) {
            let request = BootRequest { kind: BootKind::Exactly(protocol), ..BootRequest::new(other, &image, &memory) };
            assert!(matches!(request.plan(), Err(BootError::WrongArch { .. })), "{protocol}");
        }
    }
    let text = refusal(X86_64, BootKind::Auto, &arm_image(0x400, 0, 0x400));
    assert!(text.contains("arm64") && text.contains("x86_64"), "{text}");
}

#[test]
fn command_lines_and_modules_that_cannot_be_passed() {
    let memory = pc_memory(32 * MIB);
    let image = bzimage(0x400);
    let plan = |cmdline: &str| {
        BootRequest { cmdline, ..BootRequest::new(X86_64, &image, &memory) }
            .plan()
            .map(|_| ())
            .map_err(|error| error.to_string())
    };
    assert!(plan(&"x".repeat(2047)).is_ok());
    assert!(plan(&"x".repeat(2048)).unwrap_err().contains("at most 2047"));
    assert!(plan(&"x".repeat(MAX_CMDLINE + 1)).unwrap_err().contains("at most 65535"));
    assert!(plan("a\0b").unwrap_err().contains("NUL"));

    let module = Module { data: b"x", cmdline: "" };
    let two = [module, module];
    for (image, modules, cmdline, expected) in [
        (bzimage(0x400), &two[..], "", "concatenate"),
        (boot_sector(), &two[..1], "", "initial RAM disk"),
        (boot_sector(), &[], "x", "command line"),
        (firmware(65536), &[], "x", "command line"),
    ] {
        let request = BootRequest { cmdline, modules, ..BootRequest::new(X86_64, &image, &memory) };
        let text = request.plan().unwrap_err().to_string();
        assert!(text.contains(expected), "{text} lacks {expected}");
    }
}

#[test]
fn guests_with_too_little_memory() {
    let image = bzimage(0x400);
    for size in [MIB + 1, 2 * MIB] {
        let text = BootRequest::new(X86_64, &image, &pc_memory(size)).plan().unwrap_err().to_string();
        assert!(text.contains("memory"), "{text}");
    }
    let none = vm_accel_machine::boot::MemoryMap::default();
    for (_, arch, protocol, image) in seeds() {
        if protocol != Protocol::Firmware {
            assert!(BootRequest::new(arch, &image, &none).plan().is_err(), "{protocol}");
        }
    }
}

#[test]
fn files_are_read_with_their_size_bounded() {
    let folder = std::env::temp_dir().join(format!("vm-accel-boot-{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    let file = |name: &str, data: &[u8]| {
        let path = folder.join(name);
        fs::write(&path, data).unwrap();
        path
    };
    assert_eq!(read_image(&file("good", b"1234"), 4).unwrap(), b"1234");
    let text = |path: &Path, limit| read_image(path, limit).unwrap_err().to_string();
    let large = text(&file("large", b"12345"), 4);
    assert!(large.contains("large has 5 bytes") && large.contains("4 bytes"), "{large}");
    assert!(text(&file("nothing", b""), 4).ends_with("nothing is empty (0 bytes)"));
    assert!(text(&folder, 4).contains("is a directory"));
    let missing = text(&folder.join("missing"), 4);
    assert!(missing.contains("cannot read") && missing.contains("missing"), "{missing}");
    fs::remove_dir_all(&folder).unwrap();
}

#[test]
#[cfg(unix)]
fn devices_are_refused_without_being_opened() {
    let text = read_image(Path::new("/dev/zero"), u64::MAX).unwrap_err().to_string();
    assert!(text.contains("a device or a pipe"), "{text}");
}
