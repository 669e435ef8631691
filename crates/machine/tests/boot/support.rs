//! Hand-made images of every kind, and what must hold for every plan. Shared by the tests and the fuzz targets.

use vm_accel::GuestArch;
use vm_accel_machine::boot::{
    BootError, BootKind, BootPlan, BootRequest, BootState, MemoryKind, MemoryMap, MemoryRange, MemorySink, Module,
    Protocol, X86Mode,
};

pub(crate) const MIB: u64 = 1 << 20;

/// The memory of a small PC: conventional memory, a reserved hole, and RAM from 1 MiB to `size`.
pub(crate) fn pc_memory(size: u64) -> MemoryMap {
    let range = |base, end: u64, kind| MemoryRange { base, size: end - base, kind };
    MemoryMap::new(vec![
        range(0, 0x9_fc00, MemoryKind::Ram),
        range(0x9_fc00, MIB, MemoryKind::Reserved),
        range(MIB, size, MemoryKind::Ram),
    ])
    .unwrap()
}

/// The memory of a small arm64 board: RAM from 1 GiB on.
pub(crate) fn arm_memory(size: u64) -> MemoryMap {
    MemoryMap::new(vec![MemoryRange { base: 1 << 30, size, kind: MemoryKind::Ram }]).unwrap()
}

pub(crate) fn memory_of(arch: GuestArch, size: u64) -> MemoryMap {
    match arch {
        GuestArch::X86_64 => pc_memory(size),
        _ => arm_memory(size),
    }
}

fn put(image: &mut [u8], at: usize, bytes: &[u8]) {
    image[at..at + bytes.len()].copy_from_slice(bytes);
}

/// A relocatable 64-bit `bzImage` of protocol 2.15 whose protected-mode kernel has `kernel` bytes.
pub(crate) fn bzimage(kernel: usize) -> Vec<u8> {
    let mut image = vec![0x90; 2 * 512 + kernel];
    image[..1024].fill(0);
    image[0x1f1] = 1;
    put(&mut image, 0x1f4, &(kernel.div_ceil(16) as u32).to_le_bytes());
    put(&mut image, 0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]);
    put(&mut image, 0x202, b"HdrS");
    put(&mut image, 0x206, &0x20fu16.to_le_bytes());
    image[0x211] = 1;
    put(&mut image, 0x214, &0x10_0000u32.to_le_bytes());
    put(&mut image, 0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(&mut image, 0x230, &0x20_0000u32.to_le_bytes());
    image[0x234] = 1;
    put(&mut image, 0x236, &1u16.to_le_bytes());
    put(&mut image, 0x238, &2047u32.to_le_bytes());
    put(&mut image, 0x258, &0x20_0000u64.to_le_bytes());
    put(&mut image, 0x260, &0x10_0000u32.to_le_bytes());
    image
}

/// One program header: type, file offset, virtual address, physical address, file size, memory size.
pub(crate) type Header = (u32, u64, u64, u64, u64, u64);

/// An ELF64 executable with the given headers, `data` behind them at offset 0x1000.
pub(crate) fn elf64(machine: u16, entry: u64, headers: &[Header], data: &[u8]) -> Vec<u8> {
    let mut image = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0".to_vec();
    image.extend(machine.to_le_bytes());
    image.extend(1u32.to_le_bytes());
    for word in [entry, 64, 0] {
        image.extend(word.to_le_bytes());
    }
    image.extend(0u32.to_le_bytes());
    for half in [64, 56, headers.len() as u16, 0, 0, 0] {
        image.extend(half.to_le_bytes());
    }
    for &(kind, offset, vaddr, paddr, file_size, memory_size) in headers {
        image.extend(kind.to_le_bytes());
        image.extend(7u32.to_le_bytes());
        for word in [offset, vaddr, paddr, file_size, memory_size, 4] {
            image.extend(word.to_le_bytes());
        }
    }
    image.resize(0x1000, 0);
    image.extend(data);
    image
}

/// An ELF32 executable with one segment at physical address `paddr`.
pub(crate) fn elf32(machine: u16, entry: u32, paddr: u32, memory_size: u32, data: &[u8]) -> Vec<u8> {
    let mut image = b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0\x02\0".to_vec();
    image.extend(machine.to_le_bytes());
    for word in [1, entry, 52, 0, 0] {
        image.extend(word.to_le_bytes());
    }
    for half in [52u16, 32, 1, 0, 0, 0] {
        image.extend(half.to_le_bytes());
    }
    for word in [1, 0x1000, paddr, paddr, data.len() as u32, memory_size, 7, 0x1000] {
        image.extend(word.to_le_bytes());
    }
    image.resize(0x1000, 0);
    image.extend(data);
    image
}

/// The note by which a kernel offers a PVH entry.
pub(crate) fn pvh_note(entry: u32) -> Vec<u8> {
    let mut note = Vec::new();
    // Another note first, so that finding the right one is work.
    for word in [4u32, 5, 1] {
        note.extend(word.to_le_bytes());
    }
    note.extend(b"GNU\0hello\0\0\0");
    for word in [4u32, 4, 18] {
        note.extend(word.to_le_bytes());
    }
    note.extend(b"Xen\0");
    note.extend(entry.to_le_bytes());
    note
}

/// An x86 `vmlinux` at 16 MiB with a PVH entry 0x10 behind its start.
pub(crate) fn pvh_kernel() -> Vec<u8> {
    let note = pvh_note(0x100_0010);
    let size = note.len() as u64;
    let mut data = note;
    data.resize(0x1000, 0);
    data.extend([0xf4; 0x800]);
    let headers = [(1, 0x2000, 0xffff_ffff_8100_0000, 0x100_0000, 0x800, 0x4000), (4, 0x1000, 0, 0, size, size)];
    elf64(62, 0xffff_ffff_8100_0000, &headers, &data)
}

/// An x86 ELF64 kernel at 16 MiB without notes.
pub(crate) fn plain_elf() -> Vec<u8> {
    elf64(62, 0x100_0000, &[(1, 0x1000, 0x100_0000, 0x100_0000, 0x800, 0x4000)], &[0xf4; 0x800])
}

/// An aarch64 ELF kernel 2 MiB behind the start of RAM.
pub(crate) fn arm_elf() -> Vec<u8> {
    let at = 0x4020_0000;
    elf64(183, at, &[(1, 0x1000, at, at, 0x800, 0x4000)], &[0x1f; 0x800])
}

/// A multiboot header with these flags, its checksum, and `addresses`.
pub(crate) fn multiboot_header(flags: u32, addresses: &[u32]) -> Vec<u8> {
    let magic = 0x1bad_b002u32;
    let checksum = 0u32.wrapping_sub(magic).wrapping_sub(flags);
    [magic, flags, checksum].iter().chain(addresses).flat_map(|word| word.to_le_bytes()).collect()
}

/// A multiboot kernel as a 32-bit ELF file at 4 MiB, as kvm-unit-tests are.
pub(crate) fn multiboot_elf() -> Vec<u8> {
    let mut data = multiboot_header(0, &[]);
    data.resize(0x800, 0xf4);
    elf32(3, 0x40_0010, 0x40_0000, 0x3000, &data)
}

/// A flat multiboot kernel at 1 MiB; what precedes its header by more than 0x10 bytes is not loaded.
pub(crate) fn multiboot_flat() -> Vec<u8> {
    let mut image = vec![0xcc; 0x40];
    let addresses = [0x10_0010, 0x10_0000, 0x10_0100, 0x10_1000, 0x10_0080];
    image.extend(multiboot_header(0x1_0003, &addresses));
    image.resize(0x400, 0xf4);
    image
}

/// A BIOS image of `size` bytes with a far jump at its reset vector.
pub(crate) fn firmware(size: usize) -> Vec<u8> {
    let mut image: Vec<u8> = (0..size).map(|i| (i >> 8) as u8).collect();
    put(&mut image, size - 16, &[0xea, 0x5b, 0xe0, 0x00, 0xf0]);
    image
}

/// A boot sector.
pub(crate) fn boot_sector() -> Vec<u8> {
    let mut image = vec![0xf4; 512];
    put(&mut image, 510, &[0x55, 0xaa]);
    image
}

/// An arm64 `Image` of `len` bytes with the given text offset and size in memory.
pub(crate) fn arm_image(len: usize, text_offset: u64, image_size: u64) -> Vec<u8> {
    let mut image = vec![0x1f; len];
    put(&mut image, 8, &text_offset.to_le_bytes());
    put(&mut image, 16, &image_size.to_le_bytes());
    put(&mut image, 24, &0b1010u64.to_le_bytes());
    put(&mut image, 56, b"ARM\x64");
    image
}

/// A wrapper around a compressed kernel, as EFI boots it.
pub(crate) fn zboot(payload: &[u8], compression: &[u8]) -> Vec<u8> {
    let mut image = vec![0; 64];
    put(&mut image, 0, b"MZ\0\0zimg");
    put(&mut image, 8, &64u32.to_le_bytes());
    put(&mut image, 12, &(payload.len() as u32).to_le_bytes());
    put(&mut image, 24, compression);
    image.extend(payload);
    image.extend([0; 7]);
    image
}

/// The gzip file of `data`.
pub(crate) fn gzip(data: &[u8]) -> Vec<u8> {
    use std::io::Write;
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

/// Small valid images, each with the architecture and the protocol that is detected: what mutations start from.
pub(crate) fn seeds() -> Vec<(&'static str, GuestArch, Protocol, Vec<u8>)> {
    use GuestArch::{Aarch64, X86_64};
    let image = arm_image(0x400, 0, 0x2000);
    vec![
        ("bzimage", X86_64, Protocol::Linux, bzimage(0x400)),
        ("elf", X86_64, Protocol::Elf, plain_elf()),
        ("pvh", X86_64, Protocol::Pvh, pvh_kernel()),
        ("multiboot-elf", X86_64, Protocol::Multiboot, multiboot_elf()),
        ("multiboot-flat", X86_64, Protocol::Multiboot, multiboot_flat()),
        ("flat", X86_64, Protocol::Flat, boot_sector()),
        ("firmware", X86_64, Protocol::Firmware, firmware(0x1_0000)),
        ("arm64-elf", Aarch64, Protocol::Elf, arm_elf()),
        ("arm64-image", Aarch64, Protocol::Image, image.clone()),
        ("arm64-gzip", Aarch64, Protocol::Image, gzip(&image)),
        ("arm64-zboot", Aarch64, Protocol::Image, zboot(&gzip(&image), b"gzip\0")),
    ]
}

/// Plans `image` by `kind` with a RAM disk and a command line if it takes them, and checks the plan.
///
/// # Panics
/// If what [`BootPlan`] promises does not hold.
pub(crate) fn exercise(arch: GuestArch, kind: BootKind, image: &[u8], memory: &MemoryMap) -> Result<(), BootError> {
    let modules = [Module { data: &[0xa5; 0x1234], cmdline: "module" }];
    let bare = BootRequest { kind, ..BootRequest::new(arch, image, memory) };
    let full = BootRequest { cmdline: "console=ttyS0", modules: &modules, acpi_rsdp: Some(0xe_0000), ..bare };
    let takes_none = matches!(kind, BootKind::Exactly(Protocol::Flat | Protocol::Firmware));
    exercise_request(if takes_none { &bare } else { &full })
}

/// Plans a request and checks the plan.
///
/// # Panics
/// If what [`BootPlan`] promises does not hold.
pub(crate) fn exercise_request(request: &BootRequest<'_>) -> Result<(), BootError> {
    let plan = request.plan().inspect_err(|error| assert!(!error.to_string().is_empty()))?;
    check(&plan, request.memory);
    Ok(())
}

/// What holds for every plan.
pub(crate) fn check(plan: &BootPlan<'_>, memory: &MemoryMap) {
    let in_ram = |start: u64, size: u64| {
        let end = start.checked_add(size).expect("a part wraps around");
        let mut at = start;
        for ram in memory.ranges().iter().filter(|range| range.kind == MemoryKind::Ram) {
            if (ram.base..ram.end()).contains(&at) {
                at = ram.end();
            }
        }
        at >= end
    };
    let mut parts: Vec<(u64, u64, &str)> = Vec::new();
    for chunk in &plan.chunks {
        let size = chunk.data.len() as u64 + chunk.zeros;
        assert!(in_ram(chunk.gpa, size), "{} is outside RAM", chunk.what);
        parts.push((chunk.gpa, chunk.gpa + size, chunk.what));
    }
    if let Some(tree) = &plan.device_tree {
        assert!(in_ram(tree.start, tree.end - tree.start));
        assert!(tree.start.is_multiple_of(8));
        parts.push((tree.start, tree.end, "device tree"));
    }
    parts.sort();
    for pair in parts.windows(2) {
        assert!(pair[0].1 <= pair[1].0, "{} overlaps {}", pair[0].2, pair[1].2);
    }
    if let Some(initrd) = &plan.initrd {
        assert!(plan.chunks.iter().any(|chunk| chunk.gpa == initrd.start));
    }
    let covered = |address: u64| parts.iter().any(|&(start, end, _)| (start..end).contains(&address));
    match plan.state {
        BootState::X86(state) => {
            let linear = state.sregs.cs.base + state.regs.pc;
            let mapped = plan.mappings.iter().any(|m| (m.gpa..m.gpa + m.data.len() as u64).contains(&linear));
            assert!(covered(linear) || mapped, "the entry {linear:#x} is in nothing that is loaded");
            assert!(linear < 1 << 32);
            if state.mode != X86Mode::Real {
                assert!(covered(state.sregs.gdt.base));
            }
            if state.mode == X86Mode::Long64 {
                assert!(covered(state.sregs.cr3));
            }
        }
        BootState::Aarch64(regs) => {
            assert!(covered(regs.pc), "the entry {:#x} is in nothing that is loaded", regs.pc);
            assert_eq!(plan.device_tree.as_ref().map(|tree| tree.start), Some(regs.gpr[0]));
        }
        _ => unreachable!("a new architecture needs its own checks"),
    }
}

/// Guest memory that keeps what is written, byte by byte addressable.
#[derive(Debug, Default)]
pub(crate) struct Memory(Vec<(u64, Vec<u8>)>);

impl MemorySink for Memory {
    type Error = std::convert::Infallible;

    fn write(&mut self, gpa: u64, data: &[u8]) -> Result<(), Self::Error> {
        self.0.push((gpa, data.to_vec()));
        Ok(())
    }

    fn zero(&mut self, gpa: u64, len: u64) -> Result<(), Self::Error> {
        self.0.push((gpa, vec![0; len as usize]));
        Ok(())
    }
}

impl Memory {
    pub(crate) fn of(plan: &BootPlan<'_>) -> Self {
        let mut memory = Self::default();
        let Ok(()) = plan.load(&mut memory);
        memory
    }

    pub(crate) fn bytes(&self, gpa: u64, len: usize) -> &[u8] {
        let inside = |&&(start, ref data): &&(u64, Vec<u8>)| gpa >= start && gpa < start + data.len() as u64;
        let (start, data) = self.0.iter().find(inside).unwrap_or_else(|| panic!("nothing was written at {gpa:#x}"));
        let at = (gpa - start) as usize;
        &data[at..at + len]
    }

    pub(crate) fn u8(&self, gpa: u64) -> u8 {
        self.bytes(gpa, 1)[0]
    }

    pub(crate) fn u16(&self, gpa: u64) -> u16 {
        u16::from_le_bytes(self.bytes(gpa, 2).try_into().unwrap())
    }

    pub(crate) fn u32(&self, gpa: u64) -> u32 {
        u32::from_le_bytes(self.bytes(gpa, 4).try_into().unwrap())
    }

    pub(crate) fn u64(&self, gpa: u64) -> u64 {
        u64::from_le_bytes(self.bytes(gpa, 8).try_into().unwrap())
    }

    pub(crate) fn string(&self, gpa: u64) -> String {
        (gpa..).map(|at| self.u8(at)).take_while(|&byte| byte != 0).map(char::from).collect()
    }
}
