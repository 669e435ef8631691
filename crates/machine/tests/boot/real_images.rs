//! Kernels and firmware that others made, where this machine has them. None is part of this repository: the folder in
//! `VM_ACCEL_BOOT_IMAGES`, the cache that `cargo xtask guests` fills, and the places in which distributions put such
//! files are searched. With `VM_ACCEL_REQUIRE` containing `boot-images` it is an error to find none.

use crate::support::{check, pc_memory};
use std::fs;
use std::path::{Path, PathBuf};
use vm_accel::GuestArch::{Aarch64, X86_64};
use vm_accel_machine::boot::{BootError, BootKind, BootRequest, BootState, Module, Protocol, read_image};

const RAM: u64 = 1 << 30;

/// The protocol of a file, if its name (or, in the cache, its folder's) tells.
fn expected(path: &Path) -> Option<Protocol> {
    let mut names = path.iter().rev().filter_map(|part| part.to_str());
    let (name, folder) = (names.next()?, names.next()?);
    match name {
        "memtest86+x64.bin" => Some(Protocol::Linux),
        "memtest86+ia32.bin" => Some(Protocol::Linux32),
        "bios.bin" | "bios-256k.bin" | "bios-microvm.bin" => Some(Protocol::Firmware),
        "OVMF.fd" | "OVMF_CODE.fd" | "OVMF_CODE_4M.fd" => Some(Protocol::Firmware),
        "vmlinuz" => match folder {
            "x86_64" => Some(Protocol::Linux),
            "aarch64" => Some(Protocol::Image),
            _ => None,
        },
        _ if name.starts_with("vmlinuz-") && name.ends_with("-amd64") => Some(Protocol::Linux),
        _ if name.starts_with("vmlinuz-") && name.ends_with("-arm64") => Some(Protocol::Image),
        _ => None,
    }
}

/// Files below `folder`, a few levels deep.
fn collect(folder: &Path, depth: u32, found: &mut Vec<(Protocol, PathBuf)>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            if depth > 0 {
                collect(&path, depth - 1, found);
            }
        } else if let Some(protocol) = expected(&path) {
            found.push((protocol, path));
        }
    }
}

#[test]
fn real_images_are_detected_and_planned() {
    let mut found = Vec::new();
    let cache = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../guests-cache");
    if let Some(folder) = std::env::var_os("VM_ACCEL_BOOT_IMAGES") {
        collect(Path::new(&folder), 6, &mut found);
    }
    collect(&cache, 6, &mut found);
    collect(Path::new("/boot"), 0, &mut found);
    for folder in ["/usr/share/seabios", "/usr/share/ovmf", "/usr/share/OVMF"] {
        collect(Path::new(folder), 0, &mut found);
    }
    if found.is_empty() {
        let required = std::env::var("VM_ACCEL_REQUIRE").unwrap_or_default();
        assert!(!required.split(',').any(|item| item == "boot-images"), "no image was found");
        println!("skipped: no kernel or firmware image on this machine; name a folder in VM_ACCEL_BOOT_IMAGES");
        return;
    }
    for (protocol, path) in found {
        let image = match read_image(&path, RAM) {
            // Distributions make kernels readable by root only.
            Err(BootError::File { source, .. }) if source.kind() == std::io::ErrorKind::PermissionDenied => {
                println!("skipped {}: permission denied", path.display());
                continue;
            }
            image => image.unwrap(),
        };
        let arch = if protocol == Protocol::Image { Aarch64 } else { X86_64 };
        let memory = match arch {
            X86_64 => pc_memory(RAM),
            _ => crate::support::arm_memory(RAM),
        };
        let modules = [Module { data: &image[..4096], cmdline: "" }];
        let request = BootRequest {
            modules: if protocol == Protocol::Firmware { &[] } else { &modules },
            cmdline: if protocol == Protocol::Firmware { "" } else { "console=ttyS0" },
            ..BootRequest::new(arch, &image, &memory)
        };
        let plan = request.plan().unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        assert_eq!(plan.protocol, protocol, "{}", path.display());
        check(&plan, &memory);
        let entry = match plan.state {
            BootState::X86(state) => state.sregs.cs.base + state.regs.pc,
            BootState::Aarch64(regs) => regs.pc,
            _ => unreachable!(),
        };
        println!("{}: {protocol}, entry {entry:#x}, initrd {:x?}", path.display(), plan.initrd);
        // Half of it is an error that says so, whatever half a compressed file unpacks to.
        if matches!(protocol, Protocol::Linux | Protocol::Linux32 | Protocol::Image) {
            let half = &image[..image.len() / 2];
            let kind = BootKind::Exactly(protocol);
            let cut = BootRequest { kind, ..BootRequest::new(arch, half, &memory) };
            let text = cut.plan().unwrap_err().to_string();
            assert!(text.contains("truncated") || text.contains("damaged"), "{text}");
        }
    }
}
