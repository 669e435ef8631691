//! Boot images: every parser, forced and through detection, in a roomy and in a cramped machine.

#[allow(dead_code)]
#[path = "../../crates/machine/tests/boot/support.rs"]
mod support;

use crate::Target;
use support::{MIB, exercise, exercise_request, memory_of};
use vm_accel::GuestArch::{self, Aarch64, X86_64};
use vm_accel_machine::boot::{BootKind, BootRequest, MemoryKind, MemoryMap, MemoryRange, Protocol};

/// Every target of this module.
pub const TARGETS: &[Target] = &[
    target("boot_detect", detect, || seeds_of(&Protocol::ALL)),
    target("boot_bzimage", bzimage, || seeds_of(&[Protocol::Linux])),
    target("boot_elf", elf, || {
        seeds_of(&[Protocol::Elf, Protocol::Pvh])
    }),
    target("boot_pvh", pvh, || seeds_of(&[Protocol::Pvh])),
    target("boot_multiboot", multiboot, || {
        seeds_of(&[Protocol::Multiboot])
    }),
    target("boot_flat", flat, flat_seeds),
    target("boot_firmware", firmware, || {
        seeds_of(&[Protocol::Firmware])
    }),
    target("boot_arm64", arm64, || seeds_of(&[Protocol::Image])),
];

const fn target(name: &'static str, run: fn(&[u8]), seeds: fn() -> Vec<Vec<u8>>) -> Target {
    Target { name, run, seeds }
}

fn seeds_of(protocols: &[Protocol]) -> Vec<Vec<u8>> {
    let chosen = support::seeds()
        .into_iter()
        .filter(|(_, _, protocol, _)| protocols.contains(protocol));
    chosen.map(|(.., image)| image).collect()
}

fn flat_seeds() -> Vec<Vec<u8>> {
    let at = |address: u64| [&address.to_le_bytes()[..], &support::boot_sector()].concat();
    [0x7c00, 0x9_1000, 0x4000_0000].map(at).to_vec()
}

/// RAM in three pieces of odd sizes, so that whatever is placed meets an edge.
fn cramped(arch: GuestArch) -> MemoryMap {
    let start = if arch == X86_64 { 0 } else { 1 << 30 };
    let piece = |base, size| MemoryRange {
        base: start + base,
        size,
        kind: MemoryKind::Ram,
    };
    let pieces = vec![
        piece(0, 0x9_1234),
        piece(MIB, 3 * MIB + 0x777),
        piece(16 * MIB, 6 * MIB + 1),
    ];
    MemoryMap::new(pieces).expect("the pieces are in order")
}

fn plan(arch: GuestArch, kind: BootKind, image: &[u8]) {
    for memory in [memory_of(arch, 48 * MIB), cramped(arch)] {
        // Refusing is fine; what is accepted is checked.
        let _ = exercise(arch, kind, image, &memory);
    }
}

/// Detection, and whatever it finds.
pub fn detect(image: &[u8]) {
    plan(X86_64, BootKind::Auto, image);
    plan(Aarch64, BootKind::Auto, image);
}

/// `bzImage` by both entries.
pub fn bzimage(image: &[u8]) {
    plan(X86_64, BootKind::Exactly(Protocol::Linux), image);
    plan(X86_64, BootKind::Exactly(Protocol::Linux32), image);
}

/// ELF kernels of both architectures.
pub fn elf(image: &[u8]) {
    plan(X86_64, BootKind::Exactly(Protocol::Elf), image);
    plan(Aarch64, BootKind::Exactly(Protocol::Elf), image);
}

/// PVH kernels.
pub fn pvh(image: &[u8]) {
    plan(X86_64, BootKind::Exactly(Protocol::Pvh), image);
}

/// Multiboot kernels.
pub fn multiboot(image: &[u8]) {
    plan(X86_64, BootKind::Exactly(Protocol::Multiboot), image);
}

/// Flat binaries of both architectures, loaded at the address in the first eight bytes.
pub fn flat(input: &[u8]) {
    let Some((address, image)) = input.split_first_chunk() else {
        return;
    };
    for arch in [X86_64, Aarch64] {
        let memory = cramped(arch);
        let _ = exercise_request(&BootRequest {
            kind: BootKind::Exactly(Protocol::Flat),
            flat_address: u64::from_le_bytes(*address),
            ..BootRequest::new(arch, image, &memory)
        });
    }
}

/// Firmware images.
pub fn firmware(image: &[u8]) {
    plan(X86_64, BootKind::Exactly(Protocol::Firmware), image);
}

/// arm64 `Image`s, plain and compressed.
pub fn arm64(image: &[u8]) {
    plan(Aarch64, BootKind::Exactly(Protocol::Image), image);
}
