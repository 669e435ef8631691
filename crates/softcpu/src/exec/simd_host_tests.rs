//! Every MMX and integer SSE instruction in the CPU against the host's own: random operands, registers and memory, the whole
//! visible state compared.
//!
//! Encodings are enumerated (prefix, map, opcode, register or memory operand, REX.W), so an instruction form cannot be forgotten;
//! [`every_simd_instruction_has_a_handler`] says so. Exceptions are masked and operands aligned here: what faults is tested
//! beside the instructions. Floating-point arithmetic has tests of its own.

use std::arch::asm;

use iced_x86::{Code, CpuidFeature, Decoder, DecoderOptions, EncodingKind, Instruction, Mnemonic, OpKind, Register};

use super::xsave::legacy_image;
use super::{FAMILIES, mmx, sse_int, sse_mov};
use crate::NoBus;
use crate::state::{CpuState, rflags};
use crate::testing::Machine;

/// Rounds per encoding; each has new operands.
const ROUNDS: usize = 16;
/// Where the memory operand is in the guest.
const BUFFER: u64 = 0x2_0000;
/// Bytes compared there.
const LENGTH: usize = 64;
/// R15 points into the buffer, and so does RDI for the instructions that use it implicitly.
const POINTERS: [usize; 2] = [15, 7];

/// Registers as the trampoline loads and stores them.
#[repr(C, align(16))]
struct Frame {
    gpr: [u64; 16],
    flags: u64,
    /// The code to call.
    code: u64,
    fx: [u8; 512],
}

/// One page of executable memory.
struct Page(*mut u8);

impl Page {
    fn new() -> Self {
        // SAFETY: a new private mapping, at an address of the kernel's choice.
        let page = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                4096,
                libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(page, libc::MAP_FAILED, "no executable memory");
        Self(page.cast())
    }

    /// Runs one instruction natively with the registers of `frame`.
    fn run(&mut self, instruction: &[u8], frame: &mut Frame) {
        assert!(instruction.len() <= 15);
        // SAFETY: the page is ours, writable, and nothing runs in it now. The instruction is one of those that `is_in_scope` lets
        // through: it neither jumps nor touches RSP, and its memory operand is at R15 or RDI, which point into a live buffer. RBX and RBP are
        // saved by hand because they cannot be clobbers; FNINIT and LDMXCSR bring back the state that the ABI wants.
        unsafe {
            std::ptr::copy_nonoverlapping(instruction.as_ptr(), self.0, instruction.len());
            self.0.add(instruction.len()).write(0xc3);
            frame.code = self.0 as u64;
            asm!(
                "push rbx",
                "push rbp",
                "sub rsp, 16",
                "stmxcsr [rsp]",
                "push qword ptr [rdi + 136]",
                "push rdi",
                "fxrstor64 [rdi + 144]",
                "push qword ptr [rdi + 128]",
                "popfq",
                "mov rax, [rdi]",
                "mov rcx, [rdi + 8]",
                "mov rdx, [rdi + 16]",
                "mov rbx, [rdi + 24]",
                "mov rbp, [rdi + 40]",
                "mov rsi, [rdi + 48]",
                "mov r8, [rdi + 64]",
                "mov r9, [rdi + 72]",
                "mov r10, [rdi + 80]",
                "mov r11, [rdi + 88]",
                "mov r12, [rdi + 96]",
                "mov r13, [rdi + 104]",
                "mov r14, [rdi + 112]",
                "mov r15, [rdi + 120]",
                "mov rdi, [rdi + 56]",
                "call qword ptr [rsp + 8]",
                "push rdi",
                "pushfq",
                "mov rdi, [rsp + 16]",
                "pop qword ptr [rdi + 128]",
                "pop qword ptr [rdi + 56]",
                "mov [rdi], rax",
                "mov [rdi + 8], rcx",
                "mov [rdi + 16], rdx",
                "mov [rdi + 24], rbx",
                "mov [rdi + 40], rbp",
                "mov [rdi + 48], rsi",
                "mov [rdi + 64], r8",
                "mov [rdi + 72], r9",
                "mov [rdi + 80], r10",
                "mov [rdi + 88], r11",
                "mov [rdi + 96], r12",
                "mov [rdi + 104], r13",
                "mov [rdi + 112], r14",
                "mov [rdi + 120], r15",
                "fxsave64 [rdi + 144]",
                "fninit",
                "cld",
                "add rsp, 16",
                "ldmxcsr [rsp]",
                "add rsp, 16",
                "pop rbp",
                "pop rbx",
                inout("rdi") &raw mut *frame => _,
                out("rax") _, out("rcx") _, out("rdx") _, out("rsi") _, out("r8") _, out("r9") _, out("r10") _, out("r11") _,
                out("r12") _, out("r13") _, out("r14") _, out("r15") _,
                out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _, out("xmm4") _, out("xmm5") _, out("xmm6") _,
                out("xmm7") _, out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _, out("xmm12") _,
                out("xmm13") _, out("xmm14") _, out("xmm15") _,
                out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _, out("st(4)") _, out("st(5)") _,
                out("st(6)") _, out("st(7)") _,
            );
        }
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `new`.
        unsafe { libc::munmap(self.0.cast(), 4096) };
    }
}

/// xorshift64*.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Bytes, doublewords that are interesting as floats, or few distinct bytes.
    fn fill(&mut self, bytes: &mut [u8]) {
        const FLOATS: [u32; 12] = [
            0,
            0x8000_0000,
            0x3f80_0000,
            0xbf80_0000,
            0x7f80_0000,
            0xff80_0000,
            0x7fc0_0000,
            0x7fa0_0000,
            0x0000_0001,
            0x4b00_0001,
            0x3ff0_0000,
            0x7ff8_0000,
        ];
        let kind = self.next() % 4;
        for chunk in bytes.chunks_mut(4) {
            let r = self.next();
            let word = match kind {
                0 => r as u32,
                1 => FLOATS[r as usize % FLOATS.len()],
                2 => r as u32 & 0x0303_0303,
                _ => 0x3f80_0000 ^ (r as u32 & 0x83ff_ffff),
            };
            let length = chunk.len();
            chunk.copy_from_slice(&word.to_le_bytes()[..length]);
        }
    }

    fn vector(&mut self) -> u128 {
        let mut bytes = [0; 16];
        self.fill(&mut bytes);
        u128::from_le_bytes(bytes)
    }
}

/// An instruction of MMX or SSE that computes or moves, and that this CPU should have.
fn is_simd(code: Code) -> bool {
    use CpuidFeature as F;
    let fence = matches!(code.mnemonic(), Mnemonic::Lfence | Mnemonic::Mfence | Mnemonic::Sfence);
    code.encoding() == EncodingKind::Legacy
        && !fence
        && code.cpuid_features().iter().all(|feature| {
            matches!(
                feature,
                F::MMX | F::SSE | F::SSE2 | F::SSE3 | F::SSSE3 | F::SSE4_1 | F::SSE4_2 | F::AES | F::PCLMULQDQ | F::SHA
            )
        })
}

/// Whether it is of the families tested here, the host has it, and it leaves the stack pointer and the pointers to the buffer alone.
fn is_in_scope(insn: &Instruction) -> bool {
    let ours = [sse_int::lower, sse_int::lower_crc32, sse_mov::lower, mmx::lower, mmx::lower_mixed];
    let offered = insn.cpuid_features().iter().all(|feature| match feature {
        CpuidFeature::SSE3 => is_x86_feature_detected!("sse3"),
        CpuidFeature::SSSE3 => is_x86_feature_detected!("ssse3"),
        CpuidFeature::SSE4_1 => is_x86_feature_detected!("sse4.1"),
        CpuidFeature::SSE4_2 => is_x86_feature_detected!("sse4.2"),
        CpuidFeature::AES => is_x86_feature_detected!("aes"),
        CpuidFeature::PCLMULQDQ => is_x86_feature_detected!("pclmulqdq"),
        CpuidFeature::SHA => is_x86_feature_detected!("sha"),
        _ => true,
    });
    let pointers = (0..insn.op_count())
        .filter(|&i| insn.op_kind(i) == OpKind::Register)
        .any(|i| matches!(insn.op_register(i).full_register(), Register::RSP | Register::RDI | Register::R15));
    is_simd(insn.code()) && offered && !pointers && ours.iter().any(|lower| lower(insn).is_some())
}

/// Calls `act` with every SIMD encoding: `fields` gives the register numbers of each.
fn for_each_encoding(mut fields: impl FnMut() -> u64, mut act: impl FnMut(&Instruction, &[u8])) {
    for prefix in [&[][..], &[0x66], &[0xf3], &[0xf2], &[0x66, 0xf2]] {
        for map in [&[0x0f][..], &[0x0f, 0x38], &[0x0f, 0x3a]] {
            // 38h and 3Ah lead to the other maps.
            for opcode in (0..=255u8).filter(|opcode| map.len() > 1 || !matches!(opcode, 0x38 | 0x3a)) {
                for variant in 0..4 {
                    let (wide, memory) = (variant & 1, variant & 2 != 0);
                    let r = fields();
                    let reg = (r >> 8) as u8 & 15;
                    let rm = if memory { 15 } else { (r >> 16) as u8 & 15 };
                    let mut code = Vec::new();
                    code.extend(prefix);
                    code.push(0x40 | wide << 3 | reg >> 3 << 2 | rm >> 3);
                    code.extend(map);
                    code.push(opcode);
                    code.push(if memory { 0 } else { 0xc0 } | (reg & 7) << 3 | rm & 7);
                    code.push((r >> 24) as u8);
                    let insn = Decoder::with_ip(64, &code, 0, DecoderOptions::NONE).decode();
                    if is_simd(insn.code()) {
                        act(&insn, &code[..insn.len()]);
                    }
                }
            }
        }
    }
}

#[test]
fn every_simd_instruction_has_a_handler() {
    let mut random = Random(1);
    let mut missing: Vec<Code> = Code::values().filter(|&code| is_simd(code)).collect();
    for _ in 0..60 {
        for_each_encoding(
            || random.next(),
            |insn, _| {
                let lowered = FAMILIES.iter().any(|family| (family.lower)(insn).is_some());
                assert!(lowered, "{:?}", insn.code());
                missing.retain(|&code| code != insn.code());
            },
        );
    }
    assert_eq!(missing, [], "not enumerated");
}

/// What is compared of an FXSAVE image: not the last instruction's pointers, nor what is reserved.
fn visible(mut image: [u8; 512]) -> [u8; 512] {
    image[6..24].fill(0);
    image[28..32].fill(0);
    image[416..].fill(0);
    image
}

#[test]
fn simd_instructions_do_what_the_host_does() {
    let mut machine = Machine::new(Box::new(NoBus));
    let mut code = Page::new();
    let mut random = Random(0x1234_5678_9abc_def1);
    let mut fields = Random(2);
    let mut executed = 0;
    for _ in 0..ROUNDS {
        for_each_encoding(
            || fields.next(),
            |insn, bytes| {
                if is_in_scope(insn) {
                    compare(&mut machine, &mut code, &mut random, insn, bytes);
                    executed += 1;
                }
            },
        );
    }
    assert!(executed > 5_000, "only {executed} were compared");
}

fn compare(machine: &mut Machine, code: &mut Page, random: &mut Random, insn: &Instruction, bytes: &[u8]) {
    let mut frame = Frame { gpr: std::array::from_fn(|_| random.next()), flags: rflags::FIXED, code: 0, fx: [0; 512] };
    frame.flags |= random.next() & rflags::ARITH;
    for length in [0, 2] {
        // The lengths of PCMPESTRx, near the size of a register.
        frame.gpr[length] = (random.next() % 40).wrapping_sub(20);
    }
    let mut buffer = [0u8; LENGTH];
    random.fill(&mut buffer);
    let mut host = Buffer(buffer);
    let top = random.next() as u16 & 7;
    machine.memory.write(BUFFER, &buffer);
    machine.code(bytes);
    machine.cpu.update(|st| {
        st.gpr[..16].copy_from_slice(&frame.gpr);
        for pointer in POINTERS {
            st.gpr[pointer] = BUFFER + 16;
        }
        st.rflags = frame.flags;
        st.xmm = std::array::from_fn(|_| random.vector());
        st.mxcsr = 0x1f80 | (random.next() as u32 & 0xe040) | random.next() as u32 & 0x3f;
        st.x87.fcw = 0x37f;
        st.x87.fsw = top << 11 | random.next() as u16 & 0x473f;
        st.x87.valid = random.next() as u8;
        for register in 0..8 {
            st.x87.sig[register] = random.vector() as u64;
            st.x87.sign_exp[register] = random.next() as u16;
        }
        st.rip = crate::testing::CODE;
        st.events.halted = false;
    });
    frame.fx = legacy_image(machine.cpu.state(), true);
    for pointer in POINTERS {
        frame.gpr[pointer] = host.0[16..].as_mut_ptr() as u64;
    }
    let before: CpuState = machine.cpu.state().clone();
    code.run(bytes, &mut frame);
    let after = machine.run();
    let context = || format!("{:?} {bytes:02x?} from {before:x?}, memory {:x?}", insn.code(), buffer);
    for register in (0..16).filter(|r| !POINTERS.contains(r) && *r != 4) {
        assert_eq!(after.gpr[register], frame.gpr[register], "register {register}: {}", context());
    }
    assert_eq!(after.rflags & rflags::ARITH, frame.flags & rflags::ARITH, "{}", context());
    assert_eq!(visible(legacy_image(after, true)), visible(frame.fx), "{}", context());
    assert_eq!(machine.memory.read(BUFFER), host.0, "{}", context());
}

/// The host's side of the memory operand.
#[repr(align(16))]
struct Buffer([u8; LENGTH]);
