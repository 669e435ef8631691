//! Random integer instructions, executed by the host processor and by the interpreter from the same state: registers, flags and memory
//! must come out equal. Flags that the manual leaves undefined are not compared.
//!
//! The host runs the instruction from a page of its own, between code that loads and stores all registers. Instructions that
//! the interpreter finds faulting are not given to the host; memory operands always lie in the data page, which has the same address in
//! the guest.

use std::sync::Arc;

use iced_x86::{Code, Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic, OpKind, Register};

use crate::exit::Exit;
use crate::state::rflags;
use crate::testing::{CODE, Machine, TABLES};
use crate::{Cpu, NoBus};

/// Where the data page is, in the host and in the guest.
const DATA: u64 = 0x1234_5000;
/// Guest-physical address of the data page.
const DATA_GPA: u64 = 0x2_0000;
/// Bytes at the start of the code page for the context.
const CONTEXT: usize = 512;
/// Instructions tried per test run; SOFTCPU_TRIES and SOFTCPU_SEED in the environment look further.
const TRIES: u64 = 40_000;

/// A small generator with a full period; tests must be repeatable.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }
    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
    /// A register value: corner cases as often as random ones.
    fn value(&mut self) -> u64 {
        match self.below(8) {
            0 => self.below(4).wrapping_sub(2),
            1 => 1 << self.below(64),
            2 => (1u64 << self.below(64)).wrapping_sub(1),
            3 => self.below(256),
            4 => (self.next() as i32) as u64,
            5 => {
                [0x7f, 0x80, 0x7fff, 0x8000, 0x7fff_ffff, 0x8000_0000, i64::MAX as u64, 1 << 63][self.below(8) as usize]
            }
            _ => self.next(),
        }
    }
}

/// Memory of the host at a fixed address, executable if need be.
struct Mapping(*mut u8, usize);

impl Mapping {
    fn new(at: u64, len: usize, code: bool) -> Self {
        let protection = libc::PROT_READ | libc::PROT_WRITE | if code { libc::PROT_EXEC } else { 0 };
        let fixed = if at != 0 { libc::MAP_FIXED_NOREPLACE } else { 0 };
        // SAFETY: a new anonymous mapping that replaces nothing.
        let start = unsafe {
            libc::mmap(at as *mut _, len, protection, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | fixed, -1, 0)
        };
        assert!(start != libc::MAP_FAILED, "no memory at {at:#x}");
        Mapping(start.cast(), len)
    }
    fn write(&self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= self.1);
        // SAFETY: inside the mapping.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.0.add(at), bytes.len()) };
    }
    fn read(&self, at: usize, bytes: &mut [u8]) {
        assert!(at + bytes.len() <= self.1);
        // SAFETY: inside the mapping.
        unsafe { std::ptr::copy_nonoverlapping(self.0.add(at), bytes.as_mut_ptr(), bytes.len()) };
    }
    fn read_u64(&self, at: usize) -> u64 {
        let mut bytes = [0; 8];
        self.read(at, &mut bytes);
        u64::from_le_bytes(bytes)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, nothing refers to it.
        unsafe { libc::munmap(self.0.cast(), self.1) };
    }
}

/// The host as an executor of single instructions.
struct Host {
    code: Mapping,
    data: Mapping,
}

/// Offsets in the context: 16 registers, then flags, then the host's stack pointer.
const FLAGS: usize = 128;
const HOST_RSP: usize = 136;

impl Host {
    fn new() -> Self {
        Host { code: Mapping::new(0, 8192, true), data: Mapping::new(DATA, 4096, false) }
    }

    /// Runs one instruction from a state; answers registers and flags.
    fn run(&self, insn: &[u8], regs: &[u64; 16], flags: u64) -> ([u64; 16], u64) {
        let mut code = Vec::new();
        let relative = |code: &mut Vec<u8>, opcode: &[u8], slot: usize| {
            code.extend_from_slice(opcode);
            let next = CONTEXT + code.len() + 4;
            code.extend_from_slice(&(slot as i32 - next as i32).to_le_bytes());
        };
        let mov = |code: &mut Vec<u8>, reg: usize, load: bool| {
            let rex = 0x48 | if reg >= 8 { 4 } else { 0 };
            relative(code, &[rex, if load { 0x8b } else { 0x89 }, 5 | (reg as u8 & 7) << 3], 8 * reg);
        };
        // push rbx rbp r12 r13 r14 r15
        code.extend_from_slice(&[0x53, 0x55, 0x41, 0x54, 0x41, 0x55, 0x41, 0x56, 0x41, 0x57]);
        relative(&mut code, &[0x48, 0x89, 0x25], HOST_RSP);
        // push flags; popfq
        relative(&mut code, &[0xff, 0x35], FLAGS);
        code.push(0x9d);
        for reg in 0..16 {
            mov(&mut code, reg, true);
        }
        code.extend_from_slice(insn);
        mov(&mut code, 4, false);
        relative(&mut code, &[0x48, 0x8b, 0x25], HOST_RSP);
        // pushfq; pop flags
        code.push(0x9c);
        relative(&mut code, &[0x8f, 0x05], FLAGS);
        for reg in (0..16).filter(|reg| *reg != 4) {
            mov(&mut code, reg, false);
        }
        // cld; pop all; ret
        code.extend_from_slice(&[0xfc, 0x41, 0x5f, 0x41, 0x5e, 0x41, 0x5d, 0x41, 0x5c, 0x5d, 0x5b, 0xc3]);
        self.code.write(CONTEXT, &code);
        for (i, reg) in regs.iter().enumerate() {
            self.code.write(8 * i, &reg.to_le_bytes());
        }
        self.code.write(FLAGS, &flags.to_le_bytes());
        // SAFETY: the code above keeps what the ABI asks for; the instruction in it only touches registers and the data page.
        unsafe {
            let entry: extern "C" fn() = std::mem::transmute(self.code.0.add(CONTEXT));
            entry();
        }
        (std::array::from_fn(|i| self.code.read_u64(8 * i)), self.code.read_u64(FLAGS))
    }
}

/// One-byte opcodes and those behind 0F that are tried.
fn opcodes(random: &mut Random) -> Vec<u8> {
    let two = [
        0x40..=0x4f,
        0x90..=0x9f,
        0xa3..=0xa5,
        0xab..=0xad,
        0xaf..=0xb1,
        0xb3..=0xb3,
        0xb6..=0xb8,
        0xba..=0xc1,
        0xc7..=0xcf,
    ];
    let one = [
        0x00..=0x05,
        0x08..=0x0d,
        0x10..=0x15,
        0x18..=0x1d,
        0x20..=0x25,
        0x28..=0x2d,
        0x30..=0x35,
        0x38..=0x3d,
        0x63..=0x63,
        0x69..=0x69,
        0x6b..=0x6b,
        0x80..=0x81,
        0x83..=0x8b,
        0x8d..=0x8d,
        0x90..=0x99,
        0x9e..=0x9f,
        0xa8..=0xa9,
        0xb0..=0xc1,
        0xc6..=0xc7,
        0xd0..=0xd3,
        0xf5..=0xf9,
        0xfc..=0xff,
    ];
    match random.below(5) {
        0 | 1 => {
            let range = &two[random.below(two.len() as u64) as usize];
            vec![0x0f, range.start() + random.below(u64::from(range.end() - range.start()) + 1) as u8]
        }
        2 if random.below(8) == 0 => vec![0x0f, 0x38, 0xf0 + random.below(2) as u8],
        _ => {
            let range = &one[random.below(one.len() as u64) as usize];
            vec![range.start() + random.below(u64::from(range.end() - range.start()) + 1) as u8]
        }
    }
}

/// A random instruction that both sides can run.
fn instruction(random: &mut Random) -> Option<(Vec<u8>, Instruction)> {
    let mut bytes = Vec::new();
    match random.below(8) {
        0 | 1 => bytes.push(0x66),
        2 => bytes.push([0xf0, 0xf2, 0xf3, 0xf3][random.below(4) as usize]),
        _ => {}
    }
    if random.below(2) == 0 {
        bytes.push(0x40 | random.below(16) as u8);
    }
    bytes.extend(opcodes(random));
    let modrm = random.next() as u8;
    // Registers half of the time; otherwise [reg + disp8] or [reg + index + disp8].
    bytes.push(if random.below(2) == 0 { modrm | 0xc0 } else { modrm & 0x3f | 0x40 });
    for _ in 0..12 {
        bytes.push(random.next() as u8);
    }
    let options = DecoderOptions::NO_MPFX_0FBC | DecoderOptions::NO_MPFX_0FBD;
    let mut decoder = Decoder::with_ip(64, &bytes, CODE, options);
    let insn = decoder.decode();
    let usable = insn.code() != Code::INVALID
        && insn.flow_control() == FlowControl::Next
        && !insn.is_privileged()
        && !insn.is_stack_instruction()
        && !insn.is_string_instruction()
        && !matches!(
            insn.mnemonic(),
            Mnemonic::Rdrand
                | Mnemonic::Rdseed
                | Mnemonic::Rdpid
                | Mnemonic::Cli
                | Mnemonic::Sti
                // Not integers: what they store depends on the host's own state.
                | Mnemonic::Xsavec
                | Mnemonic::Xsavec64
                // F3 REX.B 90 is XCHG R8 to processors and PAUSE to the decoder.
                | Mnemonic::Pause
                | Mnemonic::In
                | Mnemonic::Out
                | Mnemonic::Xlatb
        )
        // F3 0F BC and BD are other instructions on the host.
        && !(bytes[0] == 0xf3 && matches!(insn.mnemonic(), Mnemonic::Bsf | Mnemonic::Bsr))
        && (0..insn.op_count()).all(|k| insn.op_kind(k) != OpKind::Register || insn.op_register(k).is_gpr());
    bytes.truncate(insn.len());
    usable.then_some((bytes, insn))
}

/// Makes the memory operand, if there is one, lie in the data page.
fn place(random: &mut Random, insn: &Instruction, regs: &mut [u64; 16]) -> bool {
    if !(0..insn.op_count()).any(|k| insn.op_kind(k) == OpKind::Memory) || insn.mnemonic() == Mnemonic::Lea {
        return true;
    }
    let (base, index) = (insn.memory_base(), insn.memory_index());
    if !base.is_gpr64()
        || base == index
        || insn.memory_segment() == Register::FS
        || insn.memory_segment() == Register::GS
    {
        return false;
    }
    if matches!(insn.mnemonic(), Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc)
        && insn.op1_kind() == OpKind::Register
    {
        let bit = insn.op1_register().full_register().number();
        // Signed, and small enough to stay in the page.
        regs[bit] = (random.below(4096) as i64 - 2048) as u64;
        if base.number() == bit || index != Register::None {
            return false;
        }
    }
    if index != Register::None {
        regs[index.number()] = random.below(32);
    }
    let mut target = DATA + 0x600 + random.below(0x400);
    if insn.mnemonic() == Mnemonic::Cmpxchg16b {
        target &= !15;
    }
    let index = if index == Register::None { 0 } else { regs[index.number()] * u64::from(insn.memory_index_scale()) };
    regs[base.number()] = target.wrapping_sub(index).wrapping_sub(insn.memory_displacement64());
    true
}

/// A guest that has the data page where the host has it.
fn guest() -> Machine {
    let mut machine = Machine::new(Box::new(NoBus));
    let table = |gpa: u64, entry: u64| machine.memory.write(gpa, &entry.to_le_bytes());
    table(TABLES + 0x2000 + 8 * (DATA >> 21), TABLES + 0x4007);
    table(TABLES + 0x4000 + 8 * (DATA >> 12 & 511), DATA_GPA | 7);
    machine.cpu.update(|_| {});
    machine
}

fn run_guest(cpu: &mut Cpu, regs: &[u64; 16], flags: u64) -> Exit {
    cpu.update(|st| {
        st.gpr[..16].copy_from_slice(regs);
        st.rflags = flags;
        st.rip = CODE;
        st.events = crate::state::Events::default();
        // A fault has nowhere to go: triple fault.
        st.idtr.limit = 0;
    });
    cpu.run(10)
}

#[test]
fn random_integer_instructions_match_the_host() {
    let seed = std::env::var("SOFTCPU_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    let tries = std::env::var("SOFTCPU_TRIES").ok().and_then(|n| n.parse().ok()).unwrap_or(TRIES);
    let mut random = Random(seed);
    let host = Host::new();
    let mut machine = guest();
    let memory = Arc::clone(&machine.memory);
    let (mut compared, mut wrong) = (0, Vec::new());
    for _ in 0..tries {
        let Some((bytes, insn)) = instruction(&mut random) else {
            continue;
        };
        let mut regs: [u64; 16] = std::array::from_fn(|_| random.value());
        if !place(&mut random, &insn, &mut regs) {
            continue;
        }
        let count = if insn.op_count() == 3 && insn.op2_kind() == OpKind::Immediate8 {
            insn.immediate8().into()
        } else {
            regs[1]
        };
        if matches!(
            insn.code(),
            Code::Shld_rm16_r16_imm8 | Code::Shld_rm16_r16_CL | Code::Shrd_rm16_r16_imm8 | Code::Shrd_rm16_r16_CL
        ) && count & 31 > 16
        {
            // Result and flags are undefined, and differ between processors.
            continue;
        }
        let flags = random.next() & rflags::ARITH | rflags::FIXED | rflags::IF;
        let mut page: Vec<u8> = Vec::with_capacity(4096);
        let fill = random.next();
        page.extend((0..512).flat_map(|i: u64| (fill.rotate_left(i as u32 & 63) ^ i.wrapping_mul(fill)).to_le_bytes()));
        memory.write(DATA_GPA, &page);
        host.data.write(0, &page);
        machine.code(&bytes);
        if run_guest(&mut machine.cpu, &regs, flags) != Exit::Halted {
            continue;
        }
        let (host_regs, host_flags) = host.run(&bytes, &regs, flags);
        let st = machine.cpu.state();
        let undefined = u64::from(insn.rflags_undefined());
        // iced's flag bits are in an order of their own.
        let mask = rflags::ARITH & !undefined_bits(undefined);
        let mut host_page = vec![0; 4096];
        host.data.read(0, &mut host_page);
        let guest_page: [u8; 4096] = memory.read(DATA_GPA);
        compared += 1;
        let same_regs = host_regs[..] == st.gpr[..16];
        let different_flags = (host_flags ^ st.rflags) & mask;
        if !same_regs || different_flags != 0 || host_page != guest_page {
            let regs_text: Vec<String> = (0..16)
                .filter(|i| host_regs[*i] != st.gpr[*i])
                .map(|i| format!("r{i}: from {:#x} host {:#x} guest {:#x}", regs[i], host_regs[i], st.gpr[i]))
                .collect();
            wrong.push(format!(
                "{:?} {bytes:02x?}: flags from {flags:#x} host {host_flags:#x} guest {:#x} differ {different_flags:#x}; {regs_text:?}; memory {}",
                insn.code(),
                st.rflags,
                if host_page == guest_page { "same" } else { "differs" }
            ));
            if wrong.len() >= 20 {
                break;
            }
        }
    }
    assert!(wrong.is_empty(), "{} of {compared}:\n{}", wrong.len(), wrong.join("\n"));
    assert!(compared > tries / 8, "only {compared} instructions could be compared");
}

/// RFLAGS bits from iced's.
fn undefined_bits(bits: u64) -> u64 {
    use iced_x86::RflagsBits as R;
    [
        (R::OF, rflags::OF),
        (R::SF, rflags::SF),
        (R::ZF, rflags::ZF),
        (R::AF, rflags::AF),
        (R::CF, rflags::CF),
        (R::PF, rflags::PF),
    ]
    .into_iter()
    .filter(|(bit, _)| bits & u64::from(*bit) != 0)
    .fold(0, |all, (_, flag)| all | flag)
}
