//! Blocks against single steps. Random programs run twice: as decoded blocks, where threads take shortcuts, comparisons are fused with
//! branches, flags that nobody sees are not made and blocks are linked; and instruction by instruction, where none of that
//! exists. After each, everything must be equal: exit, registers, flags, memory, the number of instructions.
//!
//! The two sides share nothing but the interpreter. Programs depend on the seed only: `SOFTCPU_SEED` and
//! `SOFTCPU_PROGRAMS` in the environment look elsewhere and further.

use std::collections::HashSet;
use std::fmt::Write;

use iced_x86::{Code, Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic, OpKind};

use crate::state::{CpuState, cr0, seg};
use crate::testing::{CODE, Machine, RAM, STACK, TABLES, flat};
use crate::{Bus, Exception, Exit, Intercept};

/// Programs of each mode.
const PROGRAMS: u64 = 1_200;
/// How often each runs, with other registers and with what the TLB and the links hold by then.
const RUNS: usize = 4;
/// Instructions of a run, about: programs may loop.
const BUDGET: u64 = 150;
/// Memory that pointers point to: the pages beside it and the one in its middle can be written, the last can only be read.
const DATA: u64 = 0x1_0000;
/// A page that is not present, in 64-bit mode.
const HOLE: u64 = 0x1_4000;
/// A page that is read-only, in 64-bit mode.
const READ_ONLY: u64 = 0x1_2000;

/// SplitMix64.
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
        (self.next() >> 11) % n
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    /// A byte of an immediate.
    fn byte(&mut self) -> u8 {
        if self.one_in(2) { self.next() as u8 } else { self.pick(&[0, 0, 0xff, 1, 0x7f, 0x80, 7]) }
    }

    /// An address in or near the data.
    fn pointer(&mut self) -> u64 {
        match self.below(64) {
            0 => CODE + self.below(256),
            1 => HOLE + self.below(64),
            2..6 => READ_ONLY + self.below(256),
            6..10 => DATA + 0x1000 - self.below(32),
            10..32 => DATA + 0x800 + self.below(256),
            _ => DATA + 0x400 + 16 * self.below(64),
        }
    }

    /// What a register holds at the start.
    fn register(&mut self) -> u64 {
        match self.below(8) {
            0 => 1 << self.below(64),
            1 => self.next() >> self.below(64),
            2 => self.below(4).wrapping_sub(2),
            3 => self.below(64),
            _ => self.pointer(),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Long,
    Protected32,
    Protected16,
}

impl Mode {
    fn bits(self) -> u32 {
        match self {
            Mode::Long => 64,
            Mode::Protected32 => 32,
            Mode::Protected16 => 16,
        }
    }
}

/// Opcodes that are frequent in programs: they have threads. Two bytes: behind 0F.
const FREQUENT: &[u16] = &[
    0x00, 0x01, 0x02, 0x03, 0x04, 0x05, 0x08, 0x09, 0x0b, 0x11, 0x13, 0x19, 0x1b, 0x21, 0x23, 0x25, 0x28, 0x29, 0x2a,
    0x2b, 0x30, 0x31, 0x33, 0x38, 0x39, 0x3a, 0x3b, 0x3c, 0x3d, 0x50, 0x53, 0x55, 0x58, 0x5b, 0x5d, 0x63, 0x69, 0x6b,
    0x80, 0x81, 0x83, 0x83, 0x83, 0x84, 0x85, 0x88, 0x89, 0x89, 0x89, 0x8a, 0x8b, 0x8b, 0x8b, 0x8d, 0x8d, 0x90, 0x98,
    0x99, 0xb0, 0xb8, 0xbb, 0xc0, 0xc1, 0xc1, 0xc1, 0xc6, 0xc7, 0xd1, 0xd3, 0xf6, 0xf7, 0xfe, 0xff, 0x0f10, 0x0f11,
    0x0f28, 0x0f29, 0x0f2a, 0x0f2e, 0x0f42, 0x0f45, 0x0f4c, 0x0f51, 0x0f54, 0x0f57, 0x0f58, 0x0f59, 0x0f5c, 0x0f5e,
    0x0f6e, 0x0f6f, 0x0f7e, 0x0f7f, 0x0f92, 0x0f94, 0x0f9f, 0x0fa3, 0x0faf, 0x0fb6, 0x0fb7, 0x0fbe, 0x0fbf, 0x0fd6,
];

/// Whether an instruction may be in a program: it does not change the mode, and its result does not come from outside.
fn allowed(insn: &Instruction) -> bool {
    let segment = |k| insn.op_kind(k) == OpKind::Register && insn.op_register(k).is_segment_register();
    let special =
        |k| insn.op_kind(k) == OpKind::Register && (insn.op_register(k).is_cr() || insn.op_register(k).is_dr());
    insn.code() != Code::INVALID
        && insn.flow_control() == FlowControl::Next
        && !insn.is_privileged()
        && !(0..insn.op_count()).any(special)
        && !(insn.op_count() > 0 && segment(0) && insn.mnemonic() != Mnemonic::Push)
        // In a loop their count of instructions depends on where the TLB cuts them.
        && !insn.has_rep_prefix()
        && !insn.has_repne_prefix()
        && !matches!(
            insn.mnemonic(),
            Mnemonic::Rdtsc
                | Mnemonic::Rdtscp
                | Mnemonic::Rdpmc
                | Mnemonic::Rdrand
                | Mnemonic::Rdseed
                | Mnemonic::Sti
                | Mnemonic::Cli
                | Mnemonic::Popf
                | Mnemonic::Popfd
                | Mnemonic::Popfq
                | Mnemonic::Lds
                | Mnemonic::Les
                | Mnemonic::Lfs
                | Mnemonic::Lgs
                | Mnemonic::Lss
                | Mnemonic::Wrfsbase
                | Mnemonic::Wrgsbase
                | Mnemonic::Wrpkru
                | Mnemonic::Arpl
                | Mnemonic::Monitor
                | Mnemonic::Mwait
                | Mnemonic::Out
                | Mnemonic::In
        )
}

/// The bytes of a random instruction.
fn instruction(r: &mut Random, mode: Mode) -> Vec<u8> {
    loop {
        let mut bytes = Vec::with_capacity(32);
        if r.one_in(10) {
            bytes.push(0x66);
        }
        let opcode = if r.one_in(4) {
            (r.below(512) as u16 & 0xff) | if r.one_in(2) { 0x0f00 } else { 0 }
        } else {
            r.pick(FREQUENT)
        };
        if opcode > 0xff && r.one_in(3) || r.one_in(100) {
            bytes.push(r.pick(&[0xf2, 0xf3]));
        }
        if r.one_in(60) {
            bytes.push(r.pick(&[0xf0, 0x64, 0x65, 0x67, 0x36]));
        }
        if mode == Mode::Long && !r.one_in(3) {
            bytes.push(0x40 | r.below(16) as u8);
        }
        if opcode > 0xff {
            bytes.push(0x0f);
        }
        bytes.push(opcode as u8);
        let modrm = r.pick(&[0xc0, 0xc0, 0xc0, 0x40, 0x40, 0x00, 0x80]) | r.below(64) as u8;
        bytes.push(modrm);
        if modrm < 0xc0 && modrm & 7 == 4 && mode != Mode::Protected16 {
            bytes.push(r.next() as u8);
        }
        match modrm >> 6 {
            1 => bytes.push(r.next() as u8 & 0x3f),
            2 => bytes.extend((r.below(512) as i32 - 128).to_le_bytes()),
            _ => {}
        }
        bytes.extend((0..8).map(|_| r.byte()));
        bytes.truncate(15);
        let insn = Decoder::new(mode.bits(), &bytes, DecoderOptions::NONE).decode();
        if allowed(&insn) {
            bytes.truncate(insn.len());
            return bytes;
        }
    }
}

/// What is fused if it stands together: MOV and an operation on the copy, an addition and a comparison.
fn pair(r: &mut Random, mode: Mode) -> Vec<u8> {
    let [a, b, c] = [0; 3].map(|_| r.below(8) as u8);
    let wide = |r: &mut Random| {
        let long = mode == Mode::Long && r.one_in(2);
        let wide = mode == Mode::Protected16 && r.one_in(2);
        if long {
            vec![0x48 | r.pick(&[0, 0, 0, 1, 4])]
        } else if wide {
            vec![0x66]
        } else {
            vec![]
        }
    };
    let modrm = |reg: u8, rm: u8| 0xc0 | reg << 3 | rm;
    let mut code = wide(r);
    if r.one_in(2) {
        code.extend([0x89, modrm(b, a)]);
        code.extend(wide(r));
        match r.below(7) {
            0 => code.extend([r.pick(&[0x01, 0x09, 0x11, 0x19, 0x21, 0x29, 0x31]), modrm(c, a)]),
            1 => code.extend([r.pick(&[0x03, 0x0b, 0x13, 0x1b, 0x23, 0x2b, 0x33]), modrm(a, c)]),
            2 => code.extend([0x83, modrm(r.below(7) as u8, a), r.byte()]),
            3 => code.extend([0xc1, modrm(r.pick(&[0, 1, 4, 5, 7]), a), r.byte()]),
            4 => code.extend([0xf7, modrm(2 + r.below(2) as u8, a)]),
            5 => code.extend([0xff, modrm(r.below(2) as u8, a)]),
            _ => code.extend([0x0f, 0xaf, modrm(a, c)]),
        }
        return code;
    }
    match r.below(4) {
        0 => code.extend([0x83, modrm(0, a), r.byte()]),
        1 => code.extend([0x83, modrm(5, a), r.byte()]),
        2 => code.extend([0x01, modrm(b, a)]),
        _ => code.extend([0xff, modrm(r.below(2) as u8, a)]),
    }
    code.extend(wide(r));
    match r.below(3) {
        0 => code.extend([0x39, modrm(c, a)]),
        1 => code.extend([0x3b, modrm(a, c)]),
        _ => code.extend([0x83, modrm(7, a), r.byte()]),
    }
    code
}

/// A program: blocks that jump to one another, the last of which may reach the HLT behind it.
fn program(r: &mut Random, mode: Mode) -> Vec<u8> {
    let blocks = 1 + r.below(4);
    let mut starts = Vec::new();
    let mut code = Vec::new();
    // Where an offset to the start of a block is to be put.
    let mut holes = Vec::new();
    for _ in 0..blocks {
        starts.push(code.len());
        for _ in 0..r.below(14) {
            if r.one_in(6) {
                // mov reg, pointer: without it registers soon point nowhere.
                let reg = r.pick(&[0, 1, 2, 3, 5, 6, 7]);
                if mode == Mode::Long && r.one_in(2) {
                    code.push(0x41);
                } else if mode == Mode::Protected16 {
                    code.push(0x66);
                }
                code.push(0xb8 | reg);
                code.extend((r.pointer() as u32).to_le_bytes());
            } else {
                code.extend(if r.one_in(8) { pair(r, mode) } else { instruction(r, mode) });
            }
        }
        if r.one_in(2) {
            code.extend(pair(r, mode));
        }
        let opcode: &[u8] = match r.below(12) {
            0..7 => &[0x0f, 0x80 | r.below(16) as u8],
            7 => &[0xe9],
            8 => &[0xe8],
            // A short LOOP, JRCXZ or the like, on itself or over nothing.
            9 => {
                code.extend([0xe0 | r.below(4) as u8, r.pick(&[0, 0xfe])]);
                continue;
            }
            // push imm32 of a block's start; ret
            10 if mode == Mode::Long => {
                code.push(0x68);
                holes.push((code.len(), true));
                code.extend([0, 0, 0, 0, 0xc3]);
                continue;
            }
            _ => continue,
        };
        code.extend(opcode);
        holes.push((code.len(), false));
        code.extend(if mode == Mode::Protected16 { &[0; 2][..] } else { &[0; 4] });
    }
    starts.push(code.len());
    for (at, absolute) in holes {
        // Often to the start of its own block.
        let own = starts.iter().copied().filter(|start| *start <= at).max().unwrap_or(0);
        let target = if r.one_in(3) { own } else { r.pick(&starts) };
        if mode == Mode::Protected16 {
            let offset = target as u16;
            code[at..at + 2].copy_from_slice(&offset.wrapping_sub(at as u16 + 2).to_le_bytes());
        } else {
            let offset = if absolute { CODE as u32 } else { 0u32.wrapping_sub(at as u32 + 4) };
            code[at..at + 4].copy_from_slice(&offset.wrapping_add(target as u32).to_le_bytes());
        }
    }
    code
}

/// Exceptions end a run before they are delivered: there are no handlers.
struct Catch;

impl Bus for Catch {
    fn intercept(&mut self, what: Intercept) -> bool {
        matches!(what, Intercept::Exception(exception) if !matches!(exception, Exception::Db(_)))
    }
}

fn machine(mode: Mode) -> Machine {
    if mode == Mode::Long {
        let m = Machine::new(Box::new(Catch));
        let page = |lin: u64, entry: u64| m.memory.write(TABLES + 0x3000 + (lin >> 12) * 8, &entry.to_le_bytes());
        page(HOLE, 0);
        page(READ_ONLY, READ_ONLY | 1);
        // The tables themselves, and their second mapping.
        (TABLES >> 12..RAM as u64 >> 12).for_each(|n| [n, n + 256].into_iter().for_each(|n| page(n << 12, 0)));
        return m;
    }
    let mut m = Machine::real(Box::new(Catch));
    m.cpu.update(|st| {
        flat(st, false);
        if mode == Mode::Protected16 {
            [seg::CS, seg::SS].into_iter().for_each(|i| st.segs[i].access &= !(1 << 14));
        }
        st.cr0 = cr0::PE | cr0::NE | cr0::ET;
        st.cr4 = crate::state::cr4::OSFXSR | crate::state::cr4::OSXMMEXCPT;
    });
    m
}

/// Gives a run its registers, and nothing that would make the CPU forget translations.
fn prepare(m: &mut Machine, start: &CpuState) {
    m.cpu.abandon();
    let core = &mut m.cpu.core;
    core.st = start.clone();
    core.set_rflags(start.rflags);
}

fn start(r: &mut Random, old: &CpuState, mode: Mode) -> CpuState {
    let mut st = old.clone();
    for reg in 0..if mode == Mode::Long { 16 } else { 8 } {
        st.gpr[reg] = r.register() & if mode == Mode::Long { u64::MAX } else { 0xffff_ffff };
    }
    st.gpr[4] = STACK - 8 * r.below(8);
    for xmm in &mut st.xmm {
        let value = r.pick(&[1.0f64, -0.5, 1e300, 0.0, f64::NAN, 3.25, 1e-310]).to_bits();
        *xmm = u128::from(if r.one_in(2) { value } else { r.next() }) << 64 | u128::from(r.register());
    }
    st.mxcsr = 0x1f80;
    st.x87 = Default::default();
    st.rip = CODE;
    st.rflags = 2 | r.next() & crate::state::rflags::ARITH;
    st.events = Default::default();
    st
}

/// Steps to the exit of the other side, or to as many instructions as it did.
fn step(m: &mut Machine, exit: Exit, count: u64) -> Exit {
    let first = m.cpu.instructions();
    if exit == Exit::Budget && count == 0 {
        return exit;
    }
    loop {
        match m.cpu.finish_instruction() {
            // A budget that ends with the HLT is told first.
            None if exit == Exit::Budget && m.cpu.instructions() - first == count => return exit,
            None if m.cpu.state().events.halted => return Exit::Halted,
            None if m.cpu.instructions() - first <= count => {}
            None => return Exit::Budget,
            Some(other) => return other,
        }
    }
}

fn disassembly(code: &[u8], mode: Mode) -> String {
    let mut text = String::new();
    let mut decoder = Decoder::with_ip(mode.bits(), code, CODE, DecoderOptions::NONE);
    while decoder.can_decode() {
        let insn = decoder.decode();
        let at = (insn.ip() - CODE) as usize;
        let _ = writeln!(text, "{:#x}: {:02x?} {insn}", insn.ip(), &code[at..at + insn.len()]);
    }
    text
}

/// What differs, in words.
fn difference(fast: &CpuState, slow: &CpuState) -> String {
    let lines = |st: &CpuState| format!("{st:#x?}").lines().map(str::to_owned).collect::<Vec<_>>();
    let (fast, slow) = (lines(fast), lines(slow));
    fast.iter().zip(&slow).filter(|(f, s)| f != s).map(|(f, s)| format!("block {f} step {s}\n")).collect()
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().expect("a number"))
}

#[derive(Default)]
struct Count {
    instructions: u64,
    halted: u64,
    exceptions: u64,
    budget: u64,
    codes: HashSet<Code>,
}

fn compare(mode: Mode, seed: u64, programs: u64) -> Count {
    let (mut fast, mut slow) = (machine(mode), machine(mode));
    let mut count = Count::default();
    for number in 0..programs {
        let mut r = Random(seed ^ number.wrapping_mul(0xd134_2543_de82_ef95));
        let code = program(&mut r, mode);
        fast.code(&code);
        slow.code(&code);
        let mut decoder = Decoder::new(mode.bits(), &code, DecoderOptions::NONE);
        count.codes.extend(decoder.iter().map(|insn| insn.code()));
        for run in 0..RUNS {
            let start = start(&mut r, fast.cpu.state(), mode);
            prepare(&mut fast, &start);
            prepare(&mut slow, &start);
            let first = [fast.cpu.instructions(), slow.cpu.instructions()];
            let exit = fast.cpu.run(BUDGET);
            let done = fast.cpu.instructions() - first[0];
            let intact = fast.memory.starts_with(CODE, &code);
            if exit == Exit::Budget && !intact {
                // It wrote to itself and may have made a repeated string instruction, which counts as often as it is interrupted: no
                // way to stop the other side at the same place.
                (0..RAM as u64).step_by(8).for_each(|at| slow.memory.write(at, &fast.memory.read::<8>(at)));
                break;
            }
            let stepped = step(&mut slow, exit, done);
            let also = slow.cpu.instructions() - first[1];
            let memory = if run + 1 == RUNS { fast.memory.difference(&slow.memory) } else { None };
            let counts = !intact || done == also;
            if exit != stepped || !counts || memory.is_some() || fast.cpu.state() != slow.cpu.state() {
                panic!(
                    "{mode:?}, seed {seed}, program {number}, run {run}: blocks {exit:?} after {done}, steps {stepped:?} after \
                     {also}, memory differs at {memory:x?}\n{}\nfrom {:x?} {:#x}\n{}",
                    disassembly(&code, mode),
                    &start.gpr[..16],
                    start.rflags,
                    difference(fast.cpu.state(), slow.cpu.state()),
                );
            }
            count.instructions += done;
            match exit {
                Exit::Halted => count.halted += 1,
                Exit::Budget => count.budget += 1,
                _ => count.exceptions += 1,
            }
        }
    }
    count
}

#[test]
fn blocks_and_single_steps_agree() {
    let (seed, programs) = (setting("SOFTCPU_SEED", 1), setting("SOFTCPU_PROGRAMS", PROGRAMS));
    for mode in [Mode::Long, Mode::Protected32, Mode::Protected16] {
        let count = compare(mode, seed, programs);
        let runs = programs * RUNS as u64;
        println!(
            "{mode:?}: {} instructions of {} forms, of {runs} runs {} to the end, {} to an exception, {} cut",
            count.instructions,
            count.codes.len(),
            count.halted,
            count.exceptions,
            count.budget
        );
        // A comparison of nothing would pass, too.
        if programs >= PROGRAMS {
            assert!(count.instructions > 8 * runs && count.codes.len() > 400);
            assert!(count.halted > runs / 8 && count.exceptions > runs / 8 && count.budget > 0);
        }
    }
}
