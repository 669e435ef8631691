//! The smallest ELF executable that a boot loader takes: one header, one loadable segment, no sections.

/// File offset of the segment: a page, as loaders like it.
const SEGMENT_OFFSET: u32 = 0x1000;
const HEADER_SIZE: u16 = 52;
const PROGRAM_HEADER_SIZE: u16 = 32;

/// A 32-bit x86 executable with `image` at `base`, followed by `extra` zero bytes of memory, started at `entry`.
pub(crate) fn executable32(base: u32, entry: u32, image: &[u8], extra: u32) -> Vec<u8> {
    let size = u32::try_from(image.len()).expect("a guest program is small");
    let mut file = Vec::new();
    // Elf32_Ehdr (System V ABI, "ELF Header"): class 32, little endian, version 1.
    file.extend([0x7f, b'E', b'L', b'F', 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    let half = |file: &mut Vec<u8>, value: u16| file.extend(value.to_le_bytes());
    let word = |file: &mut Vec<u8>, value: u32| file.extend(value.to_le_bytes());
    half(&mut file, 2); // ET_EXEC
    half(&mut file, 3); // EM_386
    word(&mut file, 1);
    word(&mut file, entry);
    word(&mut file, HEADER_SIZE.into()); // program headers follow
    word(&mut file, 0); // no section headers
    word(&mut file, 0);
    half(&mut file, HEADER_SIZE);
    half(&mut file, PROGRAM_HEADER_SIZE);
    half(&mut file, 1);
    half(&mut file, 0);
    half(&mut file, 0);
    half(&mut file, 0);
    // Elf32_Phdr
    word(&mut file, 1); // PT_LOAD
    word(&mut file, SEGMENT_OFFSET);
    word(&mut file, base);
    word(&mut file, base);
    word(&mut file, size);
    word(&mut file, size + extra);
    word(&mut file, 7); // readable, writable, executable
    word(&mut file, SEGMENT_OFFSET);
    file.resize(SEGMENT_OFFSET as usize, 0);
    file.extend(image);
    file
}
