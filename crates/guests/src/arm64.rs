//! A tiny assembler for A64, with just the instructions that the guest programs of this repository need, and the world in
//! which those begin.
//!
//! Encodings: Arm ARM (DDI 0487), C4.1 "A64 instruction set encoding". A number that does not fit its field is a bug of
//! the program's author, and panics.

use std::collections::HashMap;

/// Addresses that the programs share.
pub mod layout {
    /// Where RAM begins.
    pub const RAM: u64 = 0x4000_0000;
    /// Bytes of RAM.
    pub const RAM_SIZE: u64 = 0x20_0000;
    /// Where programs are put and begin.
    pub const CODE: u64 = RAM + 0x1_0000;
    /// Vectors of EL1 (Arm ARM, D1.3.1): 16 entries of 128 bytes.
    pub const VECTORS: u64 = RAM + 0x8000;
    /// Scratch memory of a program.
    pub const DATA: u64 = RAM + 0x4_0000;
    /// Stacks end here, one per CPU, 64 KiB apart.
    pub const STACK: u64 = RAM + 0x8_0000;
    /// Translation tables.
    pub const TABLES: u64 = RAM + 0x10_0000;
    /// An address at which nothing is: accesses exit.
    pub const DEVICE: u64 = 0x0a00_0000;
    /// Where a program writes a number to report something.
    pub const REPORT: u64 = DEVICE + 0x8000;
}

/// The number of the zero register, or of the stack pointer where an instruction takes one.
pub const ZR: u8 = 31;
/// See [`ZR`].
pub const SP: u8 = 31;

/// A condition of `b.cond` (Arm ARM, C1.2.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Cond {
    /// Equal.
    Eq = 0,
    /// Not equal.
    Ne = 1,
    /// Unsigned higher or same.
    Hs = 2,
    /// Unsigned lower.
    Lo = 3,
}

/// A place in a program, made by [`Assembler::label`] and put down by [`Assembler::bind`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Label(usize);

/// How an address is made of a base register and a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Index {
    /// `[xn, #imm]`
    Offset(i64),
    /// `[xn], #imm`
    Post(i64),
    /// `[xn, #imm]!`
    Pre(i64),
}

#[derive(Debug, Clone, Copy)]
enum Field {
    /// 26 bits of words at 0: B, BL.
    Branch26,
    /// 19 bits of words at 5: B.cond, CBZ.
    Branch19,
    /// 21 bits of bytes, split: ADR.
    Address21,
}

/// Collects a program.
///
/// ```
/// use vm_accel_guests::arm64::Assembler;
/// let mut a = Assembler::new(0x4000_0000);
/// a.mov(0, 7);
/// a.hvc(0);
/// assert_eq!(a.finish(), [0xe0, 0, 0x80, 0xd2, 2, 0, 0, 0xd4]);
/// ```
#[derive(Debug)]
pub struct Assembler {
    base: u64,
    words: Vec<u32>,
    bound: HashMap<Label, usize>,
    uses: Vec<(usize, Label, Field)>,
    labels: usize,
}

fn check(holds: bool, what: &str) {
    assert!(holds, "the guest program does not assemble: {what}");
}

/// `value` as a signed number of `bits` bits.
fn signed(value: i64, bits: u32) -> u32 {
    let limit = 1 << (bits - 1);
    check((-limit..limit).contains(&value), "a number does not fit its field");
    (value as u32) & ((1 << bits) - 1)
}

fn reg(number: u8) -> u32 {
    check(number < 32, "there are 32 registers");
    number.into()
}

impl Assembler {
    /// An empty program that is to run at `base`.
    #[must_use]
    pub fn new(base: u64) -> Self {
        Self { base, words: Vec::new(), bound: HashMap::new(), uses: Vec::new(), labels: 0 }
    }

    /// The program's bytes.
    ///
    /// # Panics
    /// If a label was used and not bound, or is too far away.
    #[must_use]
    pub fn finish(mut self) -> Vec<u8> {
        for (at, label, field) in &self.uses {
            let target = self.bound.get(label).copied();
            let target = target.unwrap_or_else(|| panic!("the guest program has an unbound label"));
            let words = target as i64 - *at as i64;
            self.words[*at] |= match field {
                Field::Branch26 => signed(words, 26),
                Field::Branch19 => signed(words, 19) << 5,
                Field::Address21 => {
                    let bytes = signed(words * 4, 21);
                    (bytes & 3) << 29 | (bytes >> 2) << 5
                }
            };
        }
        self.words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    /// The address of the next instruction.
    #[must_use]
    pub fn here(&self) -> u64 {
        self.base + 4 * self.words.len() as u64
    }

    /// A label that is not bound yet.
    pub fn label(&mut self) -> Label {
        self.labels += 1;
        Label(self.labels)
    }

    /// Binds a label to the next instruction.
    pub fn bind(&mut self, label: Label) {
        check(self.bound.insert(label, self.words.len()).is_none(), "a label is bound twice");
    }

    /// A label at the next instruction.
    pub fn bound(&mut self) -> Label {
        let label = self.label();
        self.bind(label);
        label
    }

    /// An instruction by its word.
    pub fn word(&mut self, word: u32) {
        self.words.push(word);
    }

    fn branch_to(&mut self, word: u32, label: Label, field: Field) {
        self.uses.push((self.words.len(), label, field));
        self.word(word);
    }

    /// `xd = value`, in one to four instructions.
    pub fn mov(&mut self, d: u8, value: u64) {
        let halves = (0..4).map(|n| (n, value >> (16 * n) & 0xffff));
        let mut word = 0xd280_0000; // MOVZ, then MOVK
        for (n, half) in halves.filter(|(n, half)| *half != 0 || (*n == 0 && value == 0)) {
            self.word(word | n << 21 | (half as u32) << 5 | reg(d));
            word = 0xf280_0000;
        }
    }

    /// `xd = xn`; neither is SP.
    pub fn mov_reg(&mut self, d: u8, n: u8) {
        self.word(0xaa00_03e0 | reg(n) << 16 | reg(d));
    }

    /// `sp = xn`
    pub fn mov_to_sp(&mut self, n: u8) {
        self.word(0x9100_001f | reg(n) << 5);
    }

    /// `xd = xn + imm`
    pub fn add(&mut self, d: u8, n: u8, imm: u32) {
        check(imm < 4096, "an addend has 12 bits");
        self.word(0x9100_0000 | imm << 10 | reg(n) << 5 | reg(d));
    }

    /// `xd = xn + xm`
    pub fn add_reg(&mut self, d: u8, n: u8, m: u8) {
        self.word(0x8b00_0000 | reg(m) << 16 | reg(n) << 5 | reg(d));
    }

    /// `xd = xn - imm`, and the flags with `subs`.
    pub fn subs(&mut self, d: u8, n: u8, imm: u32) {
        check(imm < 4096, "a subtrahend has 12 bits");
        self.word(0xf100_0000 | imm << 10 | reg(n) << 5 | reg(d));
    }

    /// Compares `xn` with `xm`.
    pub fn cmp_reg(&mut self, n: u8, m: u8) {
        self.word(0xeb00_001f | reg(m) << 16 | reg(n) << 5);
    }

    /// `xd = address of label`
    pub fn adr(&mut self, d: u8, label: Label) {
        self.branch_to(0x1000_0000 | reg(d), label, Field::Address21);
    }

    /// Jumps.
    pub fn b(&mut self, label: Label) {
        self.branch_to(0x1400_0000, label, Field::Branch26);
    }

    /// Jumps if the flags say so.
    pub fn b_if(&mut self, cond: Cond, label: Label) {
        self.branch_to(0x5400_0000 | cond as u32, label, Field::Branch19);
    }

    /// Jumps if `xt` is zero.
    pub fn cbz(&mut self, t: u8, label: Label) {
        self.branch_to(0xb400_0000 | reg(t), label, Field::Branch19);
    }

    /// Jumps if `xt` is not zero.
    pub fn cbnz(&mut self, t: u8, label: Label) {
        self.branch_to(0xb500_0000 | reg(t), label, Field::Branch19);
    }

    /// Jumps to the address in `xn`.
    pub fn br(&mut self, n: u8) {
        self.word(0xd61f_0000 | reg(n) << 5);
    }

    /// Calls the supervisor.
    pub fn svc(&mut self, imm: u16) {
        self.word(0xd400_0001 | u32::from(imm) << 5);
    }

    /// Calls the hypervisor.
    pub fn hvc(&mut self, imm: u16) {
        self.word(0xd400_0002 | u32::from(imm) << 5);
    }

    /// A breakpoint.
    pub fn brk(&mut self, imm: u16) {
        self.word(0xd420_0000 | u32::from(imm) << 5);
    }

    /// Returns from an exception.
    pub fn eret(&mut self) {
        self.word(0xd69f_03e0);
    }

    /// Does nothing.
    pub fn nop(&mut self) {
        self.word(0xd503_201f);
    }

    /// Waits for an interrupt.
    pub fn wfi(&mut self) {
        self.word(0xd503_207f);
    }

    /// Synchronises the instruction stream.
    pub fn isb(&mut self) {
        self.word(0xd503_3fdf);
    }

    /// Waits until all memory accesses are complete.
    pub fn dsb(&mut self) {
        self.word(0xd503_3f9f);
    }

    /// An instruction that is undefined for ever.
    pub fn udf(&mut self) {
        self.word(0);
    }

    /// `xt = system register`, by its encoding (op0, op1, CRn, CRm, op2 in 2, 3, 4, 4 and 3 bits).
    pub fn mrs(&mut self, t: u8, register: u16) {
        self.word(0xd520_0000 | u32::from(register) << 5 | reg(t));
    }

    /// `system register = xt`
    pub fn msr(&mut self, register: u16, t: u8) {
        self.word(0xd500_0000 | u32::from(register) << 5 | reg(t));
    }

    /// Unmasks exceptions: debug 8, SError 4, IRQ 2, FIQ 1.
    pub fn daif_clear(&mut self, mask: u32) {
        self.word(0xd503_40ff | (mask & 15) << 8);
    }

    /// A load or store of one register: `size` is its width as a power of two, `opc` what the encoding says.
    fn single(&mut self, vector: bool, size: u32, opc: u32, t: u8, n: u8, index: Index) {
        let word = 0x3800_0000 | size << 30 | u32::from(vector) << 26 | opc << 22;
        let scale = if vector && opc & 2 != 0 { 4 } else { size };
        let place = match index {
            Index::Offset(imm) if imm >= 0 && imm & ((1 << scale) - 1) == 0 => {
                let scaled = imm >> scale;
                check(scaled < 4096, "an offset has 12 bits");
                1 << 24 | (scaled as u32) << 10
            }
            Index::Offset(imm) => signed(imm, 9) << 12,
            Index::Post(imm) => signed(imm, 9) << 12 | 1 << 10,
            Index::Pre(imm) => signed(imm, 9) << 12 | 3 << 10,
        };
        self.word(word | place | reg(n) << 5 | reg(t));
    }

    /// Stores the low `bytes` (1, 2, 4, 8) of `xt`.
    pub fn store(&mut self, bytes: u32, t: u8, n: u8, index: Index) {
        self.single(false, bytes.ilog2(), 0, t, n, index);
    }

    /// Loads `bytes` (1, 2, 4, 8) into `xt`, with zeros above.
    pub fn load(&mut self, bytes: u32, t: u8, n: u8, index: Index) {
        self.single(false, bytes.ilog2(), 1, t, n, index);
    }

    /// Loads `bytes` (1, 2, 4) sign-extended, into `wt` or `xt`.
    pub fn load_signed(&mut self, bytes: u32, to_64: bool, t: u8, n: u8, index: Index) {
        self.single(false, bytes.ilog2(), if to_64 { 2 } else { 3 }, t, n, index);
    }

    /// Stores the low `bytes` (1 to 16) of vector register `t`.
    pub fn store_vector(&mut self, bytes: u32, t: u8, n: u8, index: Index) {
        match bytes {
            16 => self.single(true, 0, 2, t, n, index),
            _ => self.single(true, bytes.ilog2(), 0, t, n, index),
        }
    }

    /// Loads `bytes` (1 to 16) into vector register `t`.
    pub fn load_vector(&mut self, bytes: u32, t: u8, n: u8, index: Index) {
        match bytes {
            16 => self.single(true, 0, 3, t, n, index),
            _ => self.single(true, bytes.ilog2(), 1, t, n, index),
        }
    }

    /// A load or store of two registers of `scale` as a power of two.
    fn pair(&mut self, head: u32, scale: u32, is_load: bool, t: [u8; 2], n: u8, index: Index) {
        let (kind, imm) = match index {
            Index::Post(imm) => (1, imm),
            Index::Offset(imm) => (2, imm),
            Index::Pre(imm) => (3, imm),
        };
        check(imm & ((1 << scale) - 1) == 0, "a pair's offset is a multiple of its size");
        let word = 0x2800_0000 | head | kind << 23 | u32::from(is_load) << 22;
        let place = signed(imm >> scale, 7) << 15 | reg(t[1]) << 10 | reg(n) << 5 | reg(t[0]);
        self.word(word | place);
    }

    /// Stores a pair of general registers of `bytes` (4, 8) each.
    pub fn store_pair(&mut self, bytes: u32, t: [u8; 2], n: u8, index: Index) {
        self.pair((bytes / 8) << 31, bytes.ilog2(), false, t, n, index);
    }

    /// Loads a pair of general registers of `bytes` (4, 8) each.
    pub fn load_pair(&mut self, bytes: u32, t: [u8; 2], n: u8, index: Index) {
        self.pair((bytes / 8) << 31, bytes.ilog2(), true, t, n, index);
    }

    /// Loads a pair of words sign-extended to 64 bits.
    pub fn load_pair_signed(&mut self, t: [u8; 2], n: u8, index: Index) {
        self.pair(1 << 30, 2, true, t, n, index);
    }

    /// Stores a pair of vector registers of `bytes` (4, 8, 16) each.
    pub fn store_pair_vector(&mut self, bytes: u32, t: [u8; 2], n: u8, index: Index) {
        let scale = bytes.ilog2();
        self.pair((scale - 2) << 30 | 1 << 26, scale, false, t, n, index);
    }

    /// Loads a pair of vector registers of `bytes` (4, 8, 16) each.
    pub fn load_pair_vector(&mut self, bytes: u32, t: [u8; 2], n: u8, index: Index) {
        let scale = bytes.ilog2();
        self.pair((scale - 2) << 30 | 1 << 26, scale, true, t, n, index);
    }

    /// Writes a number to an address with a 32-bit store; changes x16 and x17.
    pub fn poke(&mut self, address: u64, value: u32) {
        self.mov(16, address);
        self.mov(17, value.into());
        self.store(4, 17, 16, Index::Offset(0));
    }

    /// As [`poke`](Self::poke), 64-bit.
    pub fn poke64(&mut self, address: u64, value: u64) {
        self.mov(16, address);
        self.mov(17, value);
        self.store(8, 17, 16, Index::Offset(0));
    }

    /// Writes `xt` to [`layout::REPORT`]; changes x16.
    pub fn report(&mut self, t: u8) {
        self.mov(16, layout::REPORT);
        self.store(8, t, 16, Index::Offset(0));
    }

    /// Calls PSCI (Arm DEN0022) by HVC: `function` in w0, further arguments are in x1 to x3 already.
    pub fn psci(&mut self, function: u32) {
        self.mov(0, function.into());
        self.hvc(0);
    }
}

/// Functions of PSCI.
pub mod psci {
    /// PSCI_VERSION.
    pub const VERSION: u32 = 0x8400_0000;
    /// CPU_OFF.
    pub const CPU_OFF: u32 = 0x8400_0002;
    /// CPU_ON: x1 affinity, x2 entry, x3 context.
    pub const CPU_ON: u32 = 0xc400_0003;
    /// SYSTEM_OFF.
    pub const SYSTEM_OFF: u32 = 0x8400_0008;
    /// SYSTEM_RESET.
    pub const SYSTEM_RESET: u32 = 0x8400_0009;
}

/// Assembles a program at [`layout::CODE`].
#[must_use]
pub fn program(write: impl FnOnce(&mut Assembler)) -> Vec<u8> {
    let mut assembler = Assembler::new(layout::CODE);
    write(&mut assembler);
    assembler.finish()
}

/// Vectors of EL1 of which each writes its offset to [`layout::REPORT`], and then returns with ERET. They change x16
/// and x17.
#[must_use]
pub fn reporting_vectors() -> Vec<u8> {
    let mut vectors = Vec::new();
    for entry in 0..16_u64 {
        let mut a = Assembler::new(layout::VECTORS + entry * 0x80);
        a.mov(17, entry * 0x80);
        a.report(17);
        a.eret();
        let mut code = a.finish();
        code.resize(0x80, 0);
        vectors.extend(code);
    }
    vectors
}

/// Translation tables at [`layout::TABLES`] for TTBR0 with [`IDENTITY_TCR`]: the first 4 GiB by 1 GiB blocks, one to one.
/// The first is device memory, the second (RAM) normal memory, both for EL0 too; the third maps RAM a second time as
/// memory that EL0 can execute but EL1 cannot touch differently: its addresses are RAM's plus 1 GiB.
#[must_use]
pub fn identity_tables() -> Vec<u8> {
    const BLOCK: u64 = 1 | 1 << 10; // valid block, access flag
    const EL0: u64 = 1 << 6;
    const INNER: u64 = 3 << 8;
    const NEVER_EXECUTE: u64 = 3 << 53;
    const NORMAL: u64 = 1 << 2; // MAIR entry 1
    let table =
        [BLOCK | EL0 | NEVER_EXECUTE, layout::RAM | BLOCK | INNER | NORMAL, layout::RAM | BLOCK | INNER | NORMAL | EL0];
    table.iter().flat_map(|entry| entry.to_le_bytes()).collect()
}

/// MAIR_EL1 for [`identity_tables`]: entry 0 device memory, entry 1 write-back memory.
pub const IDENTITY_MAIR: u64 = 0xff00;
/// TCR_EL1 for [`identity_tables`]: 39-bit addresses, 4 KiB granule, write-back walks, no upper half, 40-bit output.
pub const IDENTITY_TCR: u64 = 25 | 1 << 8 | 1 << 10 | 3 << 12 | 1 << 23 | 2 << 32;

#[cfg(test)]
mod tests {
    use super::*;

    /// Words as GNU as 2.40 makes them.
    #[test]
    fn instructions_are_encoded_as_an_assembler_does() {
        let mut a = Assembler::new(0);
        a.store_pair(8, [1, 2], 2, Index::Offset(0));
        a.load_pair(4, [1, 2], 3, Index::Offset(-8));
        a.load_pair_signed([1, 2], 3, Index::Offset(4));
        a.store_pair(8, [1, 2], 3, Index::Post(16));
        a.store_pair(8, [1, 2], 3, Index::Pre(-16));
        a.load_pair_vector(8, [1, 2], 3, Index::Offset(8));
        a.load_pair_vector(16, [1, 2], 3, Index::Offset(0));
        a.store_pair_vector(4, [1, 2], 3, Index::Offset(0));
        a.load(8, 1, 3, Index::Post(8));
        a.store(4, 1, 3, Index::Pre(-4));
        a.load_signed(1, true, 1, 3, Index::Post(1));
        a.load_vector(16, 1, 3, Index::Offset(16));
        a.store_vector(16, 1, 3, Index::Offset(0));
        a.load_vector(1, 1, 3, Index::Offset(1));
        a.store_vector(2, 1, 3, Index::Offset(2));
        a.store_vector(8, 1, 3, Index::Offset(-8));
        a.store_vector(16, 1, 3, Index::Post(16));
        let expected = [
            0xa900_0841u32,
            0x297f_0861,
            0x6940_8861,
            0xa881_0861,
            0xa9bf_0861,
            0x6d40_8861,
            0xad40_0861,
            0x2d00_0861,
            0xf840_8461,
            0xb81f_cc61,
            0x3880_1461,
            0x3dc0_0461,
            0x3d80_0061,
            0x3d40_0461,
            0x7d00_0461,
            0xfc1f_8061,
            0x3c81_0461,
        ];
        let words: Vec<u8> = expected.iter().flat_map(|word| word.to_le_bytes()).collect();
        assert_eq!(a.finish(), words);
    }

    #[test]
    fn branches_reach_their_labels() {
        let mut a = Assembler::new(0x1000);
        let (ahead, back) = (a.label(), a.bound());
        a.cbz(3, ahead);
        a.b(back);
        a.adr(0, back);
        a.bind(ahead);
        a.b_if(Cond::Ne, back);
        assert_eq!(a.here(), 0x1010);
        let expected = [0xb400_0063u32, 0x17ff_ffff, 0x10ff_ffc0, 0x54ff_ffa1];
        let words: Vec<u8> = expected.iter().flat_map(|word| word.to_le_bytes()).collect();
        assert_eq!(a.finish(), words);
    }

    #[test]
    fn numbers_take_as_few_instructions_as_they_need() {
        let count = |value| {
            let mut a = Assembler::new(0);
            a.mov(1, value);
            a.finish().len() / 4
        };
        assert_eq!([count(0), count(1), count(1 << 40), count(u64::MAX)], [1, 1, 1, 4]);
    }

    #[test]
    fn vectors_fit_their_places() {
        assert_eq!(reporting_vectors().len(), 0x800);
    }
}
