//! Random sequences. A sequence grows one instruction at a time, and the software CPU executes each at once: so the values of all registers are
//! known when the next is made, its memory operand can be put where it should be, a branch can be given its distance, and
//! flags that are undefined can be followed.

use iced_x86::{CpuidFeature, Decoder, DecoderOptions, Instruction, Mnemonic, OpKind, Register};
use vm_accel_softcpu::CpuState;
use vm_accel_softcpu::state::rflags;

use crate::Class;
use crate::guest::Guest;
use crate::machine::{CODE, DATA, DATA_LEN, Exactness, READ_ONLY, READ_ONLY_LEN, Sequence, State};
use crate::policy;
use crate::random::Random;

/// Most instructions in a sequence.
const LONGEST: u64 = 10;
/// Candidates that are tried for one place in a sequence.
const TRIES: usize = 200;
/// F3 0F BC and BD are BSF and BSR here, on the host TZCNT and LZCNT: they are left out below.
const OPTIONS: u32 = DecoderOptions::NO_MPFX_0FBC | DecoderOptions::NO_MPFX_0FBD;

/// What a candidate is.
enum Candidate {
    /// These instructions, one after the other.
    Plain(Vec<Vec<u8>>),
    /// A trap: its delivery is part of it, so it ends the sequence and is not executed here.
    Trap(Vec<u8>),
    /// The last one is a branch whose target is this far behind it, if it is taken.
    Branch(Vec<Vec<u8>>, usize),
}

/// A sequence under construction.
struct Builder<'a> {
    random: &'a mut Random,
    guest: &'a mut Guest,
    amd: bool,
    code: Vec<u8>,
    executed: Vec<(usize, usize)>,
    undefined: u64,
    exactness: Exactness,
}

/// A random state: a third of the registers point into memory.
fn start(random: &mut Random, amd: bool, x87: bool) -> State {
    let mut gpr: [u64; 16] = std::array::from_fn(|_| match random.below(3) {
        0 => pointer(random),
        _ => random.integer(),
    });
    gpr[4] = DATA + (DATA_LEN as u64) / 2 + 8 * random.below(64);
    let rflags = random.next() & rflags::ARITH | rflags::FIXED;
    let mut st = CpuState::reset();
    st.x87.fcw = 0x40 | random.next() as u16 & 0xc00 | random.pick(&[0, 0x200, 0x300, 0x300]);
    // Elsewhere than on AMD's processors what an unmasked exception leaves behind differs.
    st.x87.fcw |= if amd && x87 && random.one_in(2) { random.next() as u16 & 0x3f } else { 0x3f };
    st.x87.fsw = random.next() as u16 & 0x7f00;
    if random.one_in(3) {
        st.x87.fsw |= random.next() as u16 & 0x7f;
    }
    let pending = st.x87.fsw & !st.x87.fcw & 0x3f;
    if pending != 0 && random.one_in(8) {
        st.x87.fsw |= 0x8080;
    } else {
        st.x87.fsw &= !pending;
    }
    // Three registers in use, so that most instructions meet no stack fault, or any.
    let top = st.x87.fsw >> 11 & 7;
    st.x87.valid = if random.one_in(2) { random.next() as u8 } else { 7u8.rotate_left(u32::from(top)) };
    for r in 0..8 {
        let value = random.extended();
        // Some as MMX instructions leave them.
        st.x87.sign_exp[r] = if random.one_in(20) { 0xffff } else { (value >> 64) as u16 };
        st.x87.sig[r] = value as u64;
    }
    st.xmm = std::array::from_fn(|_| random.vector());
    st.mxcsr = if random.one_in(2) { 0x3f << 7 } else { (random.next() as u32 & 0x3f) << 7 };
    for (chance, bits) in [(2, 0xe000), (4, 0x40), (2, 0x3f)] {
        if random.one_in(chance) {
            st.mxcsr |= random.next() as u32 & bits;
        }
    }
    State { gpr, rip: CODE, rflags, fx: st.fxsave() }
}

/// An address of data that is not too close to the ends.
fn pointer(random: &mut Random) -> u64 {
    let at = DATA + 512 + random.below(DATA_LEN as u64 - 1024);
    if random.one_in(2) { at & !15 } else { at }
}

/// A sequence of a class.
pub(crate) fn sequence(random: &mut Random, guest: &mut Guest, class: Class, amd: bool) -> Sequence {
    let state = start(random, amd, matches!(class, Class::X87 | Class::Mixed));
    let memory: Vec<u8> = (0..DATA_LEN / 16).flat_map(|_| random.vector().to_le_bytes()).collect();
    guest.load(&state, &memory);
    let count = 1 + random.below(LONGEST);
    let mut builder = Builder {
        random,
        guest,
        amd,
        code: Vec::new(),
        executed: Vec::new(),
        undefined: 0,
        exactness: Exactness::Exact,
    };
    for _ in 0..count {
        if builder.append(class).is_none() {
            break;
        }
    }
    let Builder { code, executed, undefined, exactness, .. } = builder;
    Sequence { start: state, memory, code, executed, undefined, exactness }
}

impl Builder<'_> {
    /// Adds an instruction, or a few that belong together. `None` when the sequence must end here.
    fn append(&mut self, class: Class) -> Option<()> {
        let class = match class {
            Class::Mixed => {
                const OTHERS: [Class; 6] =
                    [Class::Integer, Class::Stack, Class::String, Class::Simd, Class::SseFloat, Class::X87];
                if self.random.one_in(40) { Class::Fault } else { self.random.pick(&OTHERS) }
            }
            class => class,
        };
        let candidate = (0..TRIES).find_map(|_| match class {
            Class::Integer => self.integer(),
            Class::Stack => self.stack(),
            Class::String => self.string(),
            Class::Fault => self.fault(),
            _ => self.vector(class),
        })?;
        match candidate {
            Candidate::Plain(instructions) => instructions.iter().try_for_each(|bytes| self.execute(bytes)),
            Candidate::Trap(bytes) => {
                self.executed.push((self.code.len(), bytes.len()));
                self.code.extend(bytes);
                None
            }
            Candidate::Branch(instructions, distance) => {
                instructions.iter().try_for_each(|bytes| self.execute(bytes))?;
                let skipped = self.guest.cpu_state().rip.wrapping_sub(CODE + self.code.len() as u64);
                if skipped != 0 {
                    assert_eq!(skipped, distance as u64, "a branch went elsewhere");
                    // What is jumped over is never executed, but both CPUs may look at it.
                    let rest: Vec<u8> = (0..distance).map(|_| self.random.next() as u8).collect();
                    self.code.extend(rest);
                }
                Some(())
            }
        }
    }

    /// Executes an instruction and appends it. `None` if the sequence ends with it.
    fn execute(&mut self, bytes: &[u8]) -> Option<()> {
        let insn = decode(self.next_ip(), bytes);
        let before = self.gpr();
        self.executed.push((self.code.len(), bytes.len()));
        self.code.extend(bytes);
        let stopped = self.guest.step(bytes);
        if stopped.is_some() {
            // What a fault does to flags that its instruction leaves undefined is as undefined.
            self.undefined |= policy::flags(insn.rflags_undefined());
            return None;
        }
        self.undefined = policy::undefined_after(&insn, &before, self.undefined);
        self.exactness = policy::exactness(insn.code());
        (self.exactness == Exactness::Exact).then_some(())
    }

    fn next_ip(&self) -> u64 {
        CODE + self.code.len() as u64
    }

    fn gpr(&self) -> [u64; 16] {
        std::array::from_fn(|i| self.guest.cpu_state().gpr[i])
    }

    /// Whether an instruction may come next.
    fn fits(&self, insn: &Instruction) -> bool {
        policy::comparable(insn, self.amd)
            && policy::flags(insn.rflags_read()) & self.undefined == 0
            && !policy::undefined_result(insn, &self.gpr())
    }

    /// Random prefixes, then these bytes, then a ModRM byte with what belongs to it, and bytes enough for immediates.
    fn encoding(&mut self, prefixes: &[u8], opcode: &[u8]) -> Vec<u8> {
        let random = &mut *self.random;
        let mut bytes = Vec::with_capacity(24);
        if random.one_in(24) {
            bytes.push(0x67);
        }
        if random.one_in(24) {
            bytes.push(random.pick(&[0x26, 0x2e, 0x36, 0x3e]));
        }
        bytes.extend(prefixes);
        if random.one_in(2) {
            bytes.push(0x40 | random.below(16) as u8);
        }
        bytes.extend(opcode);
        let modrm = random.next() as u8;
        bytes.push(match random.below(8) {
            0..=3 => modrm | 0xc0,
            // RIP-relative; a displacement of 8 bits; of 32 bits.
            4 => modrm & 0x38 | 5,
            5 => modrm & 0x3f | 0x40,
            _ => modrm & 0x3f | 0x80,
        });
        bytes.extend(random.next().to_le_bytes());
        bytes.extend(random.next().to_le_bytes());
        bytes
    }

    /// Makes a candidate of an encoding: cut to its length, its memory operand put in place.
    fn place(&mut self, mut bytes: Vec<u8>) -> Option<Candidate> {
        let ip = self.next_ip();
        let mut decoder = Decoder::with_ip(64, &bytes, ip, OPTIONS);
        let insn = decoder.decode();
        if !self.fits(&insn) || bytes.contains(&0xf3) && matches!(insn.mnemonic(), Mnemonic::Bsf | Mnemonic::Bsr) {
            return None;
        }
        let constants = decoder.get_constant_offsets(&insn);
        let uses_memory = (0..insn.op_count()).any(|k| insn.op_kind(k) == OpKind::Memory);
        bytes.truncate(insn.len());
        if uses_memory && !matches!(insn.mnemonic(), Mnemonic::Lea | Mnemonic::Nop | Mnemonic::Reservednop) {
            let target = self.target(&insn);
            let gpr = self.gpr();
            let (base, index) = (insn.memory_base(), insn.memory_index());
            let narrow = base.is_gpr32() || index.is_gpr32() || base == Register::EIP;
            let register = |register: Register| {
                if register.is_gpr() { gpr[register.full_register().number()] } else { 0 }
            };
            let at = match base {
                Register::RIP | Register::EIP => ip + insn.len() as u64,
                _ => register(base),
            };
            let at = at.wrapping_add(register(index).wrapping_mul(u64::from(insn.memory_index_scale())));
            let distance = target.wrapping_sub(at).wrapping_sub(bit_offset(&insn, &gpr));
            let distance = if narrow { distance as i32 as i64 } else { distance as i64 };
            let (offset, size) = (constants.displacement_offset(), constants.displacement_size());
            let reachable = match size {
                1 => i8::try_from(distance).is_ok(),
                4 => i32::try_from(distance).is_ok(),
                _ => distance == 0,
            };
            if reachable {
                bytes[offset..offset + size].copy_from_slice(&distance.to_le_bytes()[..size]);
            } else if base.is_gpr() && base != Register::RSP && self.random.one_in(8) {
                // The next try finds a register that points to memory.
                let reg = base.full_register().number() as u8;
                return Some(Candidate::Plain(vec![mov(reg, pointer(self.random))]));
            } else if !self.random.one_in(200) || is_sha(&insn) || size != 0 && base.is_gpr() && in_code(at) {
                return None;
            }
        }
        if insn.mnemonic() == Mnemonic::Ldmxcsr {
            // Not the same bits are reserved everywhere.
            return None;
        }
        if matches!(insn.mnemonic(), Mnemonic::Maskmovq | Mnemonic::Maskmovdqu) {
            let at = pointer(self.random);
            return Some(Candidate::Plain(vec![mov(7, at), bytes]));
        }
        Some(Candidate::Plain(vec![bytes]))
    }

    /// Where a memory operand should be.
    fn target(&mut self, insn: &Instruction) -> u64 {
        let size = insn.memory_size().size().max(1) as u64;
        let end = DATA + DATA_LEN as u64;
        match self.random.below(96) {
            // Across the boundary of pages, into what is read-only, into nothing.
            0..=6 if is_sha(insn) => pointer(self.random) & !15,
            0..=2 => DATA + 0x1000 - self.random.below(size + 1),
            3 => end - self.random.below(size + 1),
            4 => READ_ONLY + self.random.below(READ_ONLY_LEN as u64 - 64),
            5 => READ_ONLY + READ_ONLY_LEN as u64 - self.random.below(size + 1),
            6 => DATA - self.random.below(size + 1),
            // SHA's operands must be aligned, but AMD's processors do not insist.
            7..=20 if !is_sha(insn) => pointer(self.random),
            _ => pointer(self.random) & !15,
        }
    }

    fn integer(&mut self) -> Option<Candidate> {
        const TWO: [(u8, u8); 10] = [
            (0x40, 0x4f),
            (0x90, 0x9f),
            (0xa3, 0xa5),
            (0xab, 0xad),
            (0xaf, 0xb1),
            (0xb3, 0xb3),
            (0xb6, 0xb8),
            (0xba, 0xc1),
            (0xc3, 0xc3),
            (0xc7, 0xcf),
        ];
        const ONE: [(u8, u8); 23] = [
            (0x00, 0x05),
            (0x08, 0x0d),
            (0x10, 0x15),
            (0x18, 0x1d),
            (0x20, 0x25),
            (0x28, 0x2d),
            (0x30, 0x35),
            (0x38, 0x3d),
            (0x63, 0x63),
            (0x69, 0x69),
            (0x6b, 0x6b),
            (0x80, 0x81),
            (0x83, 0x8d),
            (0x90, 0x99),
            (0x9e, 0x9f),
            (0xa8, 0xa9),
            (0xb0, 0xc1),
            (0xc6, 0xc7),
            (0xd0, 0xd3),
            (0xf5, 0xf9),
            (0xfc, 0xfd),
            (0xfe, 0xff),
            (0xf6, 0xf7),
        ];
        let prefixes: &[u8] = match self.random.below(8) {
            0 | 1 => &[0x66],
            2 => self.random.pick(&[&[0xf0][..], &[0xf2], &[0xf3], &[0xf3], &[0x66, 0xf2]]),
            _ => &[],
        };
        let range =
            |random: &mut Random, (first, last): (u8, u8)| first + random.below(u64::from(last - first) + 1) as u8;
        let opcode = match self.random.below(10) {
            0..=3 => {
                let opcodes = self.random.pick(&TWO);
                vec![0x0f, range(self.random, opcodes)]
            }
            4 => vec![0x0f, 0x38, self.random.pick(&[0xf0, 0xf1])],
            _ => {
                let opcodes = self.random.pick(&ONE);
                vec![range(self.random, opcodes)]
            }
        };
        let bytes = self.encoding(prefixes, &opcode);
        let insn = decode(self.next_ip(), &bytes);
        if !policy::is_integer(&insn) {
            return None;
        }
        self.place(bytes)
    }

    fn vector(&mut self, class: Class) -> Option<Candidate> {
        let (prefixes, opcode): (&[u8], Vec<u8>) = if class == Class::X87 {
            if self.random.one_in(60) {
                return Some(Candidate::Plain(vec![vec![0x9b]]));
            }
            (&[], vec![0xd8 + self.random.below(8) as u8])
        } else {
            let prefixes = self.random.pick(&[&[][..], &[0x66], &[0xf2], &[0xf3], &[0x66, 0xf2]]);
            let last = self.random.next() as u8;
            let opcode = match (class, self.random.below(3)) {
                (Class::SseFloat, 0) => {
                    vec![0x0f, 0x3a, self.random.pick(&[0x08, 0x09, 0x0a, 0x0b, 0x40, 0x41])]
                }
                (Class::SseFloat, _) => {
                    const OPCODES: [u8; 22] = [
                        0x2a, 0x2c, 0x2d, 0x2e, 0x2f, 0x51, 0x52, 0x53, 0x58, 0x59, 0x5a, 0x5b, 0x5c, 0x5d, 0x5e, 0x5f,
                        0x7c, 0x7d, 0xd0, 0xe6, 0xc2, 0xae,
                    ];
                    vec![0x0f, self.random.pick(&OPCODES)]
                }
                (_, 0) if !(0x90..0xc0).contains(&last) => vec![0x0f, 0x38, last],
                (_, 1) if !(0x90..0xc0).contains(&last) => vec![0x0f, 0x3a, last],
                _ => vec![0x0f, last],
            };
            (prefixes, opcode)
        };
        let bytes = self.encoding(prefixes, &opcode);
        let insn = decode(self.next_ip(), &bytes);
        let x87 = policy::is_x87(&insn);
        let wanted = match class {
            Class::X87 => x87,
            _ => !x87 && !policy::is_integer(&insn) && !insn.is_stack_instruction() && !insn.is_string_instruction(),
        };
        if !wanted {
            return None;
        }
        self.place(bytes)
    }

    fn string(&mut self) -> Option<Candidate> {
        if self.random.one_in(6) {
            return self.integer();
        }
        let opcode = self.random.pick(&[0xa4, 0xa5, 0xa6, 0xa7, 0xaa, 0xab, 0xac, 0xad, 0xae, 0xaf]);
        let prefix = self.random.below(3);
        let mut bytes = Vec::new();
        if self.random.one_in(16) {
            bytes.push(0x67);
        }
        match self.random.below(4) {
            0 => bytes.push(0x66),
            1 => bytes.push(0x2e),
            _ => {}
        }
        match prefix {
            0 => bytes.push(0xf2),
            1 => bytes.push(0xf3),
            _ => {}
        }
        if self.random.one_in(2) {
            bytes.push(0x48);
        }
        bytes.push(opcode);
        let insn = decode(self.next_ip(), &bytes);
        if !self.fits(&insn) {
            return None;
        }
        // Source, destination, count; near each other now and then, and across the end now and then.
        let (mut source, mut destination) = (pointer(self.random), pointer(self.random));
        if self.random.one_in(4) {
            destination = source.wrapping_add(self.random.below(32)).wrapping_sub(16);
        }
        if self.random.one_in(16) {
            source = DATA + DATA_LEN as u64 + READ_ONLY_LEN as u64 - self.random.below(64);
        }
        if self.random.one_in(16) {
            destination = DATA + DATA_LEN as u64 - self.random.below(64);
        }
        let count = match self.random.below(8) {
            0 => 0,
            1 => self.random.below(200),
            2 => self.random.integer() & 0xff,
            _ => self.random.below(20),
        };
        // If both operands of CMPS fault it is not said which is first: only its source may come near an end.
        let compares = matches!(opcode, 0xa6 | 0xa7);
        let (destination, count) = if compares { (pointer(self.random), count % 40) } else { (destination, count) };
        let mut all = vec![mov(6, source), mov(7, destination), mov(1, count)];
        if self.random.one_in(8) {
            all.push(vec![0xfd]);
        } else if self.random.one_in(4) {
            all.push(vec![0xfc]);
        }
        all.push(bytes);
        Some(Candidate::Plain(all))
    }

    fn stack(&mut self) -> Option<Candidate> {
        let sp = self.gpr()[4];
        let room = DATA + 256..DATA + DATA_LEN as u64 - 256;
        if !room.contains(&sp) && (in_code(sp) || !self.random.one_in(8)) {
            let sp = DATA + (DATA_LEN as u64) / 2 + self.random.below(16);
            return Some(Candidate::Plain(vec![mov(4, sp)]));
        }
        let distance = self.random.below(100) as usize;
        let after =
            |instructions: &[Vec<u8>], ip: u64| ip + instructions.iter().map(|bytes| bytes.len() as u64).sum::<u64>();
        let ip = self.next_ip();
        let reg = self.random.below(16) as u8;
        let rex = (reg >= 8).then_some(0x41);
        match self.random.below(12) {
            0 | 1 => self.integer(),
            2..=4 => {
                // PUSH and POP of registers, immediates, memory, flags; LEAVE.
                let opcode = match self.random.below(8) {
                    0 => self.random.pick(&[0x68, 0x6a, 0x9c, 0xc9]),
                    1 | 2 => self.random.pick(&[0x8f, 0xff]),
                    _ => 0x50 + self.random.below(16) as u8,
                };
                let prefixes: &[u8] = if self.random.one_in(6) { &[0x66] } else { &[] };
                let bytes = self.encoding(prefixes, &[opcode]);
                let insn = decode(self.next_ip(), &bytes);
                let chosen = matches!(insn.mnemonic(), Mnemonic::Push | Mnemonic::Pop | Mnemonic::Leave)
                    || matches!(insn.mnemonic(), Mnemonic::Pushf | Mnemonic::Pushfq);
                if insn.mnemonic() == Mnemonic::Leave && in_code(self.gpr()[5]) {
                    return None;
                }
                if chosen && policy::flags(insn.rflags_read()) & self.undefined == 0 { self.place(bytes) } else { None }
            }
            5 => {
                // POPFQ of flags that have no consequences: and dword [rsp], mask; popfq.
                let mut mask = vec![0x81, 0x24, 0x24];
                mask.extend((State::FLAGS as u32).to_le_bytes());
                Some(Candidate::Plain(vec![mask, vec![0x9d]]))
            }
            6..=8 => {
                // Conditional jumps near and short, LOOP and JRCXZ, JMP, CALL.
                let short = (distance as u8).to_le_bytes();
                let near = (distance as u32).to_le_bytes();
                let condition = self.random.below(16) as u8;
                let bytes = match self.random.below(8) {
                    0..=2 => [&[0x70 | condition][..], &short].concat(),
                    3 | 4 => [&[0x0f, 0x80 | condition][..], &near].concat(),
                    5 => [&[0xe0 | condition & 3][..], &short].concat(),
                    6 => [&[self.random.pick(&[0xe8, 0xe9])][..], &near].concat(),
                    _ => [&[0xeb][..], &short].concat(),
                };
                let insn = decode(self.next_ip(), &bytes);
                if policy::flags(insn.rflags_read()) & self.undefined != 0 {
                    return None;
                }
                Some(Candidate::Branch(vec![bytes], distance))
            }
            9 | 10 => {
                // mov reg, target; jmp reg or call reg
                let mut jump: Vec<u8> = rex.into_iter().collect();
                jump.extend([0xff, self.random.pick(&[0xd0, 0xe0]) | reg & 7]);
                if reg == 4 {
                    return None;
                }
                let load = mov(reg, 0);
                let target = after(&[load, jump.clone()], ip) + distance as u64;
                Some(Candidate::Branch(vec![mov(reg, target), jump], distance))
            }
            _ => {
                // mov reg, target; push reg; ret or ret n
                if reg == 4 {
                    return None;
                }
                let push: Vec<u8> = rex.into_iter().chain([0x50 | reg & 7]).collect();
                let ret = if self.random.one_in(2) { vec![0xc3] } else { vec![0xc2, self.random.below(32) as u8, 0] };
                let target = after(&[mov(reg, 0), push.clone(), ret.clone()], ip) + distance as u64;
                Some(Candidate::Branch(vec![mov(reg, target), push, ret], distance))
            }
        }
    }

    fn fault(&mut self) -> Option<Candidate> {
        match self.random.below(12) {
            // Mostly something before it.
            0..=4 => {
                const OTHERS: [Class; 5] = [Class::Integer, Class::Stack, Class::Simd, Class::SseFloat, Class::X87];
                match self.random.pick(&OTHERS) {
                    Class::Integer => self.integer(),
                    Class::Stack => self.stack(),
                    class => self.vector(class),
                }
            }
            5 => {
                const PRIVILEGED: [&[u8]; 20] = [
                    &[0xf4],
                    &[0xfa],
                    &[0xfb],
                    &[0xe4, 0x80],
                    &[0xe7, 0x80],
                    &[0xec],
                    &[0xef],
                    &[0x6c],
                    &[0x6f],
                    &[0x0f, 0x06],
                    &[0x0f, 0x08],
                    &[0x0f, 0x09],
                    &[0x0f, 0x20, 0xc0],
                    &[0x0f, 0x22, 0xd8],
                    &[0x0f, 0x21, 0xf8],
                    &[0x0f, 0x23, 0xf8],
                    &[0x0f, 0x30],
                    &[0x0f, 0x32],
                    &[0x0f, 0x01, 0xf8],
                    &[0x0f, 0x01, 0x3d, 0, 0, 0, 0],
                ];
                Some(Candidate::Plain(vec![self.random.pick(&PRIVILEGED).to_vec()]))
            }
            6 => {
                // Not in 64-bit mode, or never.
                const INVALID: [&[u8]; 22] = [
                    &[0x06],
                    &[0x07],
                    &[0x0e],
                    &[0x16],
                    &[0x17],
                    &[0x1e],
                    &[0x1f],
                    &[0x27],
                    &[0x2f],
                    &[0x37],
                    &[0x3f],
                    &[0x60],
                    &[0x61],
                    &[0x82, 0xc0, 0],
                    &[0x9a],
                    &[0xce],
                    &[0xd4, 10],
                    &[0xd5, 10],
                    &[0xd6],
                    &[0xea],
                    &[0x0f, 0x0b],
                    &[0x8e, 0xc8],
                ];
                Some(Candidate::Plain(vec![self.random.pick(&INVALID).to_vec()]))
            }
            7 => Some(Candidate::Trap(vec![0xcc])),
            8 => {
                // LOCK where it may not be: ADD of registers, MOV, CMP to memory.
                const LOCKED: [&[u8]; 3] = [&[0xf0, 0x01, 0xc8], &[0xf0, 0x89, 0x0c, 0x24], &[0xf0, 0x39, 0x0c, 0x24]];
                Some(Candidate::Plain(vec![self.random.pick(&LOCKED).to_vec()]))
            }
            9 => {
                // DIV and IDIV with whatever is there.
                let modrm = 0xc0 | self.random.pick(&[0x30, 0x38]) | self.random.below(8) as u8;
                Some(Candidate::Plain(vec![vec![0x48 | self.random.below(2) as u8, 0xf7, modrm]]))
            }
            _ => {
                // An address that is not canonical, not mapped, read-only or misaligned; through RBX, or through RBP and so SS.
                let address = match self.random.below(4) {
                    0 => self.random.next() | 1 << 62,
                    1 => DATA - 1 - self.random.below(64),
                    2 => READ_ONLY + self.random.below(64),
                    _ => DATA + 1 + self.random.below(64),
                };
                const ACCESSES: [&[u8]; 8] = [
                    &[0x48, 0x01, 0x03],
                    &[0x48, 0x03, 0x03],
                    &[0x88, 0x45, 0x00],
                    &[0x48, 0x8b, 0x45, 0x00],
                    &[0x0f, 0x28, 0x03],
                    &[0x66, 0x0f, 0x7f, 0x45, 0x00],
                    &[0x0f, 0xc7, 0x0b],
                    &[0xff, 0x33],
                ];
                let access = self.random.pick(&ACCESSES).to_vec();
                let reg = if access.contains(&0x45) { 5 } else { 3 };
                Some(Candidate::Plain(vec![mov(reg, address), access]))
            }
        }
    }
}

pub(crate) fn decode(ip: u64, bytes: &[u8]) -> Instruction {
    Decoder::with_ip(64, bytes, ip, OPTIONS).decode()
}

fn is_sha(insn: &Instruction) -> bool {
    insn.cpuid_features().contains(&CpuidFeature::SHA)
}

/// Whether an address is in the code, which is not complete while the sequence grows and so cannot be read, or where an instruction of
/// 16 bits can move a pointer to it: among the host's own pages.
fn in_code(address: u64) -> bool {
    address >> 16 == CODE >> 16
}

/// mov reg, imm64
fn mov(reg: u8, value: u64) -> Vec<u8> {
    let mut bytes = vec![0x48 | reg >> 3, 0xb8 | reg & 7];
    bytes.extend(value.to_le_bytes());
    bytes
}

/// How far the bit offset in a register moves the memory operand of BT and its like.
fn bit_offset(insn: &Instruction, gpr: &[u64; 16]) -> u64 {
    let bits = matches!(insn.mnemonic(), Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc);
    if !bits || insn.op1_kind() != OpKind::Register {
        return 0;
    }
    let value = gpr[insn.op1_register().full_register().number()] as i64;
    let (value, unit) = match insn.op1_register().size() {
        2 => (i64::from(value as i16), 4),
        4 => (i64::from(value as i32), 5),
        _ => (value, 6),
    };
    ((value >> unit) << (unit - 3)) as u64
}

/// The instructions that a sequence executes.
pub(crate) fn instructions(sequence: &Sequence) -> impl Iterator<Item = Instruction> + '_ {
    sequence.executed.iter().map(|&(at, len)| decode(CODE + at as u64, &sequence.code[at..at + len]))
}
