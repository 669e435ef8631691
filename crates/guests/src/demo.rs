//! The demo guest: what `vm-accel run` boots when it is given no kernel.
//!
//! A multiboot 1 kernel, because that is the simplest boot protocol that hands over a memory map. It reports on the
//! serial line what it runs on, counts exits, and ends with status 0 through the exit port. It must run wherever
//! anything runs, also where ring 0 is interpreted by a host that knows only the plain instructions: integer
//! arithmetic, port I/O, CPUID and RDTSC, no interrupts, no paging, no SSE.

use crate::asm::{CodeAssembler, CodeLabel, *};
use crate::{Bits, assemble, elf};
use iced_x86::IcedError;

/// I/O base of the 16550 that the demo prints on (COM1).
pub const SERIAL_PORT: u16 = 0x3f8;
/// The exit port: the demo writes 0 there when it has finished.
pub const EXIT_PORT: u16 = 0xf4;
/// The port that the demo reads to make exits: the POST diagnostic port, behind which nobody is.
pub const COUNT_PORT: u16 = 0x80;
/// How many exits the demo makes and counts.
pub const COUNT: u32 = 1000;

/// Where the demo is linked: the first mebibyte boundary, as usual for multiboot kernels.
const BASE: u32 = 0x10_0000;
/// Code starts one page behind the multiboot header and the strings.
const CODE: u32 = BASE + 0x1000;
/// Bytes of zeroed memory behind the image: variables, then the stack.
const BSS_SIZE: u32 = 0x4000;

/// Multiboot Specification 0.6.96, 3.1.1: magic in the header, and in EAX at the start.
const HEADER_MAGIC: u32 = 0x1bad_b002;
const BOOT_MAGIC: u32 = 0x2bad_b002;
/// Header flag 1: the kernel wants to be told about memory.
const WANT_MEMORY: u32 = 1 << 1;
/// Info flag 6: `mmap_length` and `mmap_addr` are valid (3.3).
const HAS_MEMORY_MAP: u32 = 1 << 6;
const INFO_MMAP_LENGTH: u32 = 44;
const INFO_MMAP_ADDR: u32 = 48;

/// Strings and variables at addresses that are known before the code is assembled.
#[derive(Debug)]
struct Data {
    bytes: Vec<u8>,
}

impl Data {
    /// Adds a string; answers its address.
    fn text(&mut self, text: &str) -> u32 {
        let at = BASE + self.bytes.len() as u32;
        self.bytes.extend(text.as_bytes());
        self.bytes.push(0);
        at
    }
}

/// The subroutines that everything in the demo prints with. Each keeps all registers.
struct Print {
    /// The character in AL.
    character: CodeLabel,
    /// The zero-terminated string at ESI.
    text: CodeLabel,
    /// EDX:EAX as 16 hexadecimal digits.
    hex: CodeLabel,
    /// EAX as a decimal number.
    decimal: CodeLabel,
}

impl Print {
    fn text_at(&self, a: &mut CodeAssembler, address: u32) -> Result<(), IcedError> {
        a.mov(esi, address)?;
        a.call(self.text)
    }
}

/// The demo as a file: a 32-bit ELF executable with a multiboot 1 header.
#[must_use]
pub fn demo() -> Vec<u8> {
    let mut data = Data { bytes: Vec::new() };
    for word in [HEADER_MAGIC, WANT_MEMORY, 0u32.wrapping_sub(HEADER_MAGIC.wrapping_add(WANT_MEMORY))] {
        data.bytes.extend(word.to_le_bytes());
    }
    let code_of = |data: &mut Data, variables: u32| assemble(Bits::B32, CODE.into(), |a| program(a, data, variables));
    // The variables lie behind the code, whose length does not depend on where they are: every address is 32 bits wide.
    let strings_start = data.bytes.clone();
    let length = code_of(&mut data, CODE).len() as u32;
    let variables = (CODE + length + 0xf) & !0xf;
    data.bytes = strings_start;
    let code = code_of(&mut data, variables);
    assert!(data.bytes.len() <= (CODE - BASE) as usize && code.len() as u32 == length);
    let mut image = data.bytes;
    image.resize((CODE - BASE) as usize, 0);
    image.extend(code);
    image.resize((variables - BASE) as usize, 0);
    elf::executable32(BASE, CODE, &image, BSS_SIZE)
}

fn program(a: &mut CodeAssembler, data: &mut Data, variables: u32) -> Result<(), IcedError> {
    let print =
        Print { character: a.create_label(), text: a.create_label(), hex: a.create_label(), decimal: a.create_label() };
    // The boot protocol gives no stack (3.2).
    a.mov(esp, variables + BSS_SIZE)?;
    a.push(ebx)?;
    a.push(eax)?;

    set_up_serial(a)?;
    print.text_at(a, data.text("\nHello from the vm-accel demo guest.\n"))?;
    print_cpu(a, data, &print, variables)?;
    a.pop(eax)?;
    a.pop(ebx)?;
    print_memory(a, data, &print)?;
    count_exits(a, data, &print)?;
    print.text_at(a, data.text("Done.\n"))?;

    // Status 0; where there is no exit port the guest stays halted.
    let mut halted = a.create_label();
    a.xor(eax, eax)?;
    a.mov(edx, u32::from(EXIT_PORT))?;
    a.out(dx, al)?;
    a.set_label(&mut halted)?;
    a.cli()?;
    a.hlt()?;
    a.jmp(halted)?;

    subroutines(a, print)
}

/// 115200 baud, 8N1, FIFOs on, no interrupts (16550 data sheet).
fn set_up_serial(a: &mut CodeAssembler) -> Result<(), IcedError> {
    for (offset, value) in [(1, 0x00), (3, 0x80), (0, 0x01), (1, 0x00), (3, 0x03), (2, 0x07), (4, 0x03)] {
        a.mov(edx, u32::from(SERIAL_PORT) + offset)?;
        a.mov(eax, value)?;
        a.out(dx, al)?;
    }
    Ok(())
}

/// Vendor string, hypervisor bit and signature.
fn print_cpu(a: &mut CodeAssembler, data: &mut Data, print: &Print, variables: u32) -> Result<(), IcedError> {
    let print_signature = |a: &mut CodeAssembler, registers: [AsmRegister32; 3]| {
        for (i, register) in registers.into_iter().enumerate() {
            a.mov(dword_ptr(variables + 4 * i as u32), register)?;
        }
        a.mov(dword_ptr(variables + 12), 0)?;
        print.text_at(a, variables)
    };
    print.text_at(a, data.text("CPU vendor:  "))?;
    a.xor(eax, eax)?;
    a.cpuid()?;
    print_signature(a, [ebx, edx, ecx])?;

    let mut none = a.create_label();
    let mut done = a.create_label();
    print.text_at(a, data.text("\nHypervisor:  "))?;
    a.mov(eax, 1)?;
    a.xor(ecx, ecx)?;
    a.cpuid()?;
    a.test(ecx, 1u32 << 31)?;
    a.je(none)?;
    a.mov(eax, 0x4000_0000u32)?;
    a.xor(ecx, ecx)?;
    a.cpuid()?;
    print_signature(a, [ebx, ecx, edx])?;
    a.jmp(done)?;
    a.set_label(&mut none)?;
    print.text_at(a, data.text("none reported"))?;
    a.set_label(&mut done)?;
    print.text_at(a, data.text("\n"))
}

/// The memory map: EAX and EBX are what the boot protocol left there.
fn print_memory(a: &mut CodeAssembler, data: &mut Data, print: &Print) -> Result<(), IcedError> {
    let mut none = a.create_label();
    let mut next = a.create_label();
    let mut usable = a.create_label();
    let mut skip = a.create_label();
    let mut done = a.create_label();
    a.mov(ecx, eax)?;
    print.text_at(a, data.text("Memory map:\n"))?;
    a.cmp(ecx, BOOT_MAGIC)?;
    a.jne(none)?;
    a.test(dword_ptr(ebx), HAS_MEMORY_MAP)?;
    a.je(none)?;
    a.mov(edi, dword_ptr(ebx + INFO_MMAP_ADDR))?;
    a.mov(ebp, dword_ptr(ebx + INFO_MMAP_LENGTH))?;
    a.add(ebp, edi)?;

    // An entry is: size (of what follows), base, length, type. EDI walks, EBP is the end.
    a.set_label(&mut next)?;
    a.cmp(edi, ebp)?;
    a.jae(done)?;
    print.text_at(a, data.text("  0x"))?;
    a.mov(eax, dword_ptr(edi + 4))?;
    a.mov(edx, dword_ptr(edi + 8))?;
    a.call(print.hex)?;
    print.text_at(a, data.text("-0x"))?;
    a.add(eax, dword_ptr(edi + 12))?;
    a.adc(edx, dword_ptr(edi + 16))?;
    a.sub(eax, 1)?;
    a.sbb(edx, 0)?;
    a.call(print.hex)?;
    a.cmp(dword_ptr(edi + 20), 1)?;
    a.je(usable)?;
    print.text_at(a, data.text(" reserved\n"))?;
    a.jmp(skip)?;
    a.set_label(&mut usable)?;
    print.text_at(a, data.text(" usable\n"))?;
    a.set_label(&mut skip)?;
    // A size that is too small for an entry ends the walk: it would never get anywhere.
    a.mov(eax, dword_ptr(edi))?;
    a.cmp(eax, 20)?;
    a.jb(done)?;
    a.lea(edi, dword_ptr(edi + eax + 4))?;
    a.jmp(next)?;

    a.set_label(&mut none)?;
    print.text_at(a, data.text("  none was handed over\n"))?;
    // The next part's code follows.
    a.set_label(&mut done)
}

/// Reads a port [`COUNT`] times: each read is one exit to the host. Prints the count and the mean cost.
fn count_exits(a: &mut CodeAssembler, data: &mut Data, print: &Print) -> Result<(), IcedError> {
    let mut again = a.create_label();
    let mut slow = a.create_label();
    a.rdtsc()?;
    a.mov(ebx, eax)?;
    a.mov(ebp, edx)?;
    a.xor(ecx, ecx)?;
    a.mov(edx, u32::from(COUNT_PORT))?;
    a.set_label(&mut again)?;
    a.in_(al, dx)?;
    a.inc(ecx)?;
    a.cmp(ecx, COUNT)?;
    a.jb(again)?;
    a.rdtsc()?;
    a.sub(eax, ebx)?;
    a.sbb(edx, ebp)?;
    a.push(edx)?;
    a.push(eax)?;
    print.text_at(a, data.text("Exits:       "))?;
    a.mov(eax, ecx)?;
    a.call(print.decimal)?;
    print.text_at(a, data.text(" port reads"))?;
    a.pop(eax)?;
    a.pop(edx)?;
    // A quotient of more than 32 bits would fault; such a clock is not worth printing either.
    a.cmp(edx, ecx)?;
    a.jae(slow)?;
    a.div(ecx)?;
    print.text_at(a, data.text(", "))?;
    a.call(print.decimal)?;
    print.text_at(a, data.text(" TSC cycles each"))?;
    a.set_label(&mut slow)?;
    print.text_at(a, data.text("\n"))
}

fn subroutines(a: &mut CodeAssembler, mut print: Print) -> Result<(), IcedError> {
    // The line status says when the transmitter is free (bit 5). A line that never is must not hang the guest.
    let mut wait = a.create_label();
    let mut ready = a.create_label();
    a.set_label(&mut print.character)?;
    a.pushad()?;
    a.mov(ebx, eax)?;
    a.mov(ecx, 0x1_0000)?;
    a.mov(edx, u32::from(SERIAL_PORT) + 5)?;
    a.set_label(&mut wait)?;
    a.in_(al, dx)?;
    a.test(al, 0x20)?;
    a.jne(ready)?;
    a.dec(ecx)?;
    a.jne(wait)?;
    a.set_label(&mut ready)?;
    a.mov(eax, ebx)?;
    a.mov(edx, u32::from(SERIAL_PORT))?;
    a.out(dx, al)?;
    a.popad()?;
    a.ret()?;

    let mut next = a.create_label();
    let mut end = a.create_label();
    let mut plain = a.create_label();
    a.set_label(&mut print.text)?;
    a.pushad()?;
    a.set_label(&mut next)?;
    a.mov(bl, byte_ptr(esi))?;
    a.inc(esi)?;
    a.test(bl, bl)?;
    a.je(end)?;
    // A serial terminal wants a carriage return before each line feed.
    a.cmp(bl, i32::from(b'\n'))?;
    a.jne(plain)?;
    a.mov(eax, u32::from(b'\r'))?;
    a.call(print.character)?;
    a.set_label(&mut plain)?;
    a.mov(al, bl)?;
    a.call(print.character)?;
    a.jmp(next)?;
    a.set_label(&mut end)?;
    a.popad()?;
    a.ret()?;

    let mut word = a.create_label();
    let mut digit = a.create_label();
    let mut is_digit = a.create_label();
    a.set_label(&mut print.hex)?;
    a.push(eax)?;
    a.mov(eax, edx)?;
    a.call(word)?;
    a.pop(eax)?;
    a.set_label(&mut word)?;
    a.pushad()?;
    a.mov(ebx, eax)?;
    a.mov(edi, 8)?;
    a.set_label(&mut digit)?;
    a.rol(ebx, 4)?;
    a.mov(eax, ebx)?;
    a.and(eax, 0xf)?;
    a.add(eax, u32::from(b'0'))?;
    a.cmp(eax, u32::from(b'9'))?;
    a.jbe(is_digit)?;
    a.add(eax, u32::from(b'a' - b'9' - 1))?;
    a.set_label(&mut is_digit)?;
    a.call(print.character)?;
    a.dec(edi)?;
    a.jne(digit)?;
    a.popad()?;
    a.ret()?;

    // Digits come lowest first: keep them on the stack.
    let mut divide = a.create_label();
    let mut emit = a.create_label();
    a.set_label(&mut print.decimal)?;
    a.pushad()?;
    a.xor(edi, edi)?;
    a.mov(ebx, 10)?;
    a.set_label(&mut divide)?;
    a.xor(edx, edx)?;
    a.div(ebx)?;
    a.add(edx, u32::from(b'0'))?;
    a.push(edx)?;
    a.inc(edi)?;
    a.test(eax, eax)?;
    a.jne(divide)?;
    a.set_label(&mut emit)?;
    a.pop(eax)?;
    a.call(print.character)?;
    a.dec(edi)?;
    a.jne(emit)?;
    a.popad()?;
    a.ret()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn word(file: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(file[at..at + 4].try_into().unwrap())
    }

    #[test]
    fn demo_is_a_multiboot_elf() {
        let file = demo();
        assert_eq!(&file[..7], b"\x7fELF\x01\x01\x01");
        assert_eq!((word(&file, 24), word(&file, 28)), (CODE, 52));
        let (offset, size, memory) = (word(&file, 56) as usize, word(&file, 68), word(&file, 72));
        assert_eq!(offset + size as usize, file.len());
        assert_eq!(memory, size + BSS_SIZE);
        // 3.1: the header is 4-byte aligned within the first 8192 bytes, and its three words sum to zero.
        assert!(offset.is_multiple_of(4) && offset < 8192 - 12);
        let sum = (0..3).fold(0u32, |sum, i| sum.wrapping_add(word(&file, offset + 4 * i)));
        assert_eq!((word(&file, offset), sum), (HEADER_MAGIC, 0));
    }

    #[test]
    fn demo_is_the_same_every_time() {
        assert_eq!(demo(), demo());
    }

    #[test]
    fn demo_uses_plain_instructions_only() {
        use iced_x86::{CpuidFeature, Decoder, DecoderOptions};
        let file = demo();
        let code = &file[(word(&file, 56) + CODE - BASE) as usize..];
        let mut decoder = Decoder::with_ip(32, code, CODE.into(), DecoderOptions::NONE);
        for instruction in &mut decoder {
            let plain = instruction.cpuid_features().iter().all(|feature| {
                matches!(
                    feature,
                    CpuidFeature::INTEL8086
                        | CpuidFeature::INTEL186
                        | CpuidFeature::INTEL386
                        | CpuidFeature::INTEL486
                        | CpuidFeature::CPUID
                        | CpuidFeature::TSC
                )
            });
            assert!(plain, "{:?} at {:#x}", instruction.code(), instruction.ip());
        }
    }
}
