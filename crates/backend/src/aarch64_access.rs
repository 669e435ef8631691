//! Loads and stores to devices that the CPU reports without a syndrome: pairs, SIMD registers, write-back.
//!
//! A data abort tells a hypervisor what a simple load or store does; for the other forms ("ISV = 0", Arm ARM D24.2.40) it
//! must read the instruction itself. [`decode`] is a pure function of the instruction word, [`Stage1`] one of the
//! guest's translation registers and tables. What is not decoded (exclusives, atomics, structure loads, cache
//! maintenance) is `None`, and the backend's typed error then carries the word. Nothing here knows a platform.

mod access;
pub mod exception;
mod walk;

pub use access::{Access, Cpu, Next};
pub use exception::System;
pub use walk::Stage1;

use vm_accel_core::regs::GuestRegs;
use vm_accel_core::regs::aarch64::Aarch64FpuRegs;

/// Most bytes that one instruction moves: a pair of 128-bit registers.
pub const MOST: usize = 32;

/// The number that means the zero register as a value and the stack pointer as a base.
const ZERO_OR_SP: u8 = 31;

/// What is added to the base register for the address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Offset {
    Immediate(i64),
    /// A register, extended as its option field says, shifted left.
    Register {
        index: u8,
        option: u8,
        shift: u8,
    },
}

/// One decoded load or store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Transfer {
    /// Memory to registers.
    pub is_load: bool,
    vector: bool,
    registers: [u8; 2],
    /// How many of `registers` count.
    count: u8,
    /// Bytes per register: 1, 2, 4, 8, 16.
    pub size: u8,
    /// A loaded value is sign-extended to this many bits.
    extend: Option<u8>,
    base: u8,
    offset: Offset,
    /// What is added to the base register afterwards.
    write_back: Option<i64>,
}

/// Bits `high` to `low` of the word.
const fn field(word: u32, high: u32, low: u32) -> u32 {
    word >> low & ((1 << (high - low + 1)) - 1)
}

/// The low `bits` bits of `value` as a signed number.
const fn signed(value: u32, bits: u32) -> i64 {
    ((value as i64) << (64 - bits)) >> (64 - bits)
}

/// Decodes an instruction word (Arm ARM, C4.1.94 "Loads and Stores").
pub fn decode(word: u32) -> Option<Transfer> {
    let transfer = match field(word, 29, 27) {
        0b101 => pair(word),
        0b111 => single(word),
        _ => None,
    }?;
    // Where the architecture leaves a result open, no result is right.
    let uses = |register| transfer.registers[..usize::from(transfer.count)].contains(&register);
    let unpredictable = (transfer.is_load && transfer.count == 2 && transfer.registers[0] == transfer.registers[1])
        || (transfer.write_back.is_some() && !transfer.vector && transfer.base != ZERO_OR_SP && uses(transfer.base));
    (!unpredictable).then_some(transfer)
}

fn pair(word: u32) -> Option<Transfer> {
    let vector = field(word, 26, 26) != 0;
    let is_load = field(word, 22, 22) != 0;
    let (size, extend) = match (vector, field(word, 31, 30), is_load) {
        (false, 0, _) => (4, None),
        (false, 1, true) if field(word, 24, 23) != 0 => (4, Some(64)),
        (false, 2, _) => (8, None),
        (true, opc @ 0..=2, _) => (4 << opc, None),
        _ => return None,
    };
    let distance = signed(field(word, 21, 15), 7) * i64::from(size);
    let (offset, write_back) = match field(word, 25, 23) {
        0 | 2 => (distance, None),
        1 => (0, Some(distance)),
        3 => (distance, Some(distance)),
        _ => return None,
    };
    Some(Transfer {
        is_load,
        vector,
        registers: [field(word, 4, 0) as u8, field(word, 14, 10) as u8],
        count: 2,
        size,
        extend,
        base: field(word, 9, 5) as u8,
        offset: Offset::Immediate(offset),
        write_back,
    })
}

fn single(word: u32) -> Option<Transfer> {
    let vector = field(word, 26, 26) != 0;
    let (size_field, opc) = (field(word, 31, 30) as u8, field(word, 23, 22));
    let (scale, is_load, extend) = match (vector, opc, size_field) {
        (_, 0, _) => (size_field, false, None),
        (_, 1, _) => (size_field, true, None),
        (true, 2, 0) => (4, false, None),
        (true, 3, 0) => (4, true, None),
        (false, 2, 0..=2) => (size_field, true, Some(64)),
        (false, 3, 0 | 1) => (size_field, true, Some(32)),
        _ => return None,
    };
    let near = signed(field(word, 20, 12), 9);
    let (offset, write_back) = match (field(word, 25, 24), field(word, 21, 21), field(word, 11, 10)) {
        (1, ..) => (Offset::Immediate(i64::from(field(word, 21, 10)) << scale), None),
        (0, 0, 0) => (Offset::Immediate(near), None),
        (0, 0, 1) => (Offset::Immediate(0), Some(near)),
        (0, 0, 3) => (Offset::Immediate(near), Some(near)),
        (0, 1, 2) if field(word, 14, 14) != 0 => {
            let offset = Offset::Register {
                index: field(word, 20, 16) as u8,
                option: field(word, 15, 13) as u8,
                shift: if field(word, 12, 12) != 0 { scale } else { 0 },
            };
            (offset, None)
        }
        _ => return None,
    };
    Some(Transfer {
        is_load,
        vector,
        registers: [field(word, 4, 0) as u8, 0],
        count: 1,
        size: 1 << scale,
        extend,
        base: field(word, 9, 5) as u8,
        offset,
        write_back,
    })
}

/// A general register as a value.
fn value(regs: &GuestRegs, index: u8) -> u64 {
    if index == ZERO_OR_SP { 0 } else { regs.gpr[usize::from(index)] }
}

impl Transfer {
    /// What the syndrome of a data abort tells of a simple load or store, if it tells (Arm ARM, D24.2.40, "ISV", "SAS", "SSE",
    /// "SRT", "SF", "WnR").
    pub fn told(syndrome: u64) -> Option<Self> {
        let iss = syndrome as u32;
        (field(iss, 24, 24) != 0).then(|| Self {
            is_load: field(iss, 6, 6) == 0,
            vector: false,
            registers: [field(iss, 20, 16) as u8, 0],
            count: 1,
            size: 1 << field(iss, 23, 22),
            extend: (field(iss, 21, 21) != 0).then_some(if field(iss, 15, 15) != 0 { 64 } else { 32 }),
            base: ZERO_OR_SP,
            offset: Offset::Immediate(0),
            write_back: None,
        })
    }

    /// Bytes that it moves.
    pub fn bytes(&self) -> usize {
        usize::from(self.size) * usize::from(self.count)
    }

    /// True if it moves SIMD registers.
    pub fn is_vector(&self) -> bool {
        self.vector
    }

    /// The virtual address of its first byte.
    pub fn address(&self, regs: &GuestRegs) -> u64 {
        let base = regs.gpr[usize::from(self.base)];
        match self.offset {
            Offset::Immediate(distance) => base.wrapping_add_signed(distance),
            Offset::Register { index, option, shift } => {
                let index = value(regs, index);
                let extended = match option {
                    0b010 => u64::from(index as u32),
                    0b110 => i64::from(index as i32) as u64,
                    _ => index,
                };
                base.wrapping_add(extended << shift)
            }
        }
    }

    fn parts(&self) -> impl Iterator<Item = (u8, std::ops::Range<usize>)> {
        let size = usize::from(self.size);
        let registers = self.registers.into_iter().take(usize::from(self.count));
        registers.enumerate().map(move |(n, register)| (register, n * size..(n + 1) * size))
    }

    /// What a store writes, [`bytes`](Self::bytes) bytes of it.
    pub fn stored(&self, regs: &GuestRegs, fpu: &Aarch64FpuRegs) -> [u8; MOST] {
        let mut data = [0; MOST];
        for (register, place) in self.parts() {
            let bytes = if self.vector {
                fpu.v[usize::from(register)].to_le_bytes()
            } else {
                u128::from(value(regs, register)).to_le_bytes()
            };
            let len = place.len();
            data[place].copy_from_slice(&bytes[..len]);
        }
        data
    }

    /// Puts what a load read into its registers, moves the base register, and goes on to the next instruction.
    pub fn finish(&self, data: &[u8; MOST], regs: &mut GuestRegs, fpu: &mut Aarch64FpuRegs) {
        if let Some(distance) = self.write_back {
            let base = &mut regs.gpr[usize::from(self.base)];
            *base = base.wrapping_add_signed(distance);
        }
        if self.is_load {
            for (register, place) in self.parts() {
                let mut bytes = [0; 16];
                bytes[..place.len()].copy_from_slice(&data[place]);
                let loaded = u128::from_le_bytes(bytes);
                if self.vector {
                    fpu.v[usize::from(register)] = loaded;
                } else if register != ZERO_OR_SP {
                    regs.gpr[usize::from(register)] = self.extended(loaded as u64);
                }
            }
        }
        regs.pc = regs.pc.wrapping_add(4);
    }

    fn extended(&self, loaded: u64) -> u64 {
        let Some(bits) = self.extend else {
            return loaded;
        };
        let unused = 64 - 8 * u32::from(self.size);
        let wide = ((loaded << unused) as i64 >> unused) as u64;
        if bits == 32 { u64::from(wide as u32) } else { wide }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn regs() -> GuestRegs {
        let mut regs = GuestRegs { pc: 0x1000, ..GuestRegs::default() };
        for (n, gpr) in regs.gpr.iter_mut().enumerate() {
            *gpr = 0x1_0000 * n as u64 + 0x8877_6655;
        }
        regs
    }

    fn vectors() -> Aarch64FpuRegs {
        let mut fpu = Aarch64FpuRegs::default();
        for (n, v) in fpu.v.iter_mut().enumerate() {
            *v = u128::from_le_bytes([n as u8; 16]);
        }
        fpu
    }

    /// Instruction word, its text, offset, bytes, whether it writes, what is written back.
    type Form = (u32, &'static str, i64, usize, bool, Option<i64>);

    const FORMS: &[Form] = &[
        (0xa900_0841, "stp x1, x2, [x2]", 0, 16, false, None),
        (0xa941_0861, "ldp x1, x2, [x3, 16]", 16, 16, true, None),
        (0x297f_0861, "ldp w1, w2, [x3, -8]", -8, 8, true, None),
        (0x6940_8861, "ldpsw x1, x2, [x3, 4]", 4, 8, true, None),
        (0xa881_0861, "stp x1, x2, [x3], 16", 0, 16, false, Some(16)),
        (0xa9bf_0861, "stp x1, x2, [x3, -16]!", -16, 16, false, Some(-16)),
        (0xa800_0861, "stnp x1, x2, [x3]", 0, 16, false, None),
        (0x6d40_8861, "ldp d1, d2, [x3, 8]", 8, 16, true, None),
        (0xad40_0861, "ldp q1, q2, [x3]", 0, 32, true, None),
        (0x2d00_0861, "stp s1, s2, [x3]", 0, 8, false, None),
        (0xf840_8461, "ldr x1, [x3], 8", 0, 8, true, Some(8)),
        (0xb81f_cc61, "str w1, [x3, -4]!", -4, 4, false, Some(-4)),
        (0x3880_1461, "ldrsb x1, [x3], 1", 0, 1, true, Some(1)),
        (0x3dc0_0461, "ldr q1, [x3, 16]", 16, 16, true, None),
        (0x3d80_0061, "str q1, [x3]", 0, 16, false, None),
        (0x3d40_0461, "ldr b1, [x3, 1]", 1, 1, true, None),
        (0x7d00_0461, "str h1, [x3, 2]", 2, 2, false, None),
        (0xbd40_0461, "ldr s1, [x3, 4]", 4, 4, true, None),
        (0xfc1f_8061, "stur d1, [x3, -8]", -8, 8, false, None),
        (0x3c81_0461, "str q1, [x3], 16", 0, 16, false, Some(16)),
    ];

    #[test]
    fn forms_are_decoded_as_an_assembler_wrote_them() {
        for &(word, text, distance, len, is_load, write_back) in FORMS {
            let Some(transfer) = decode(word) else {
                panic!("{text} ({word:#x}) is not decoded");
            };
            let base = regs().gpr[usize::from(transfer.base)];
            let address = transfer.address(&regs());
            assert_eq!(address, base.wrapping_add_signed(distance), "{text}");
            assert_eq!((transfer.bytes(), transfer.is_load), (len, is_load), "{text}");
            assert_eq!(transfer.write_back, write_back, "{text}");
        }
    }

    #[test]
    fn register_offsets_are_extended_and_shifted() {
        let mut regs = regs();
        regs.gpr[3] = 0x1_0000;
        regs.gpr[2] = 0xffff_ffff_ffff_ffff;
        for (word, address) in [
            (0xf862_7861, 0x1_0000u64.wrapping_sub(8)), // ldr x1, [x3, x2, lsl 3]
            (0xf862_4861, 0x1_0000 + 0xffff_ffff),      // ldr x1, [x3, w2, uxtw]
            (0xf862_d861, 0x1_0000u64.wrapping_sub(8)), // ldr x1, [x3, w2, sxtw 3]
            (0xf87f_7861, 0x1_0000),                    // ldr x1, [x3, xzr, lsl 3]
        ] {
            assert_eq!(decode(word).map(|t| t.address(&regs)), Some(address), "{word:#x}");
        }
    }

    #[test]
    fn stores_write_the_registers_in_order_and_zr_as_zero() {
        let data = decode(0xa900_7c61).unwrap().stored(&regs(), &vectors()); // stp x1, xzr, [x3]
        assert_eq!(data[..8], regs().gpr[1].to_le_bytes());
        assert_eq!(data[8..16], [0; 8]);
        let data = decode(0xad00_0861).unwrap().stored(&regs(), &vectors()); // stp q1, q2, [x3]
        assert_eq!((data[0], data[15], data[16], data[31]), (1, 1, 2, 2));
        let data = decode(0xb81f_cc61).unwrap().stored(&regs(), &vectors()); // str w1, [x3, -4]!
        assert_eq!(data[..5], [0x55, 0x66, 0x78, 0x88, 0]);
    }

    #[test]
    fn loads_extend_write_back_and_go_on() {
        let mut data = [0; MOST];
        data[..8].copy_from_slice(&[0x80, 0xff, 0xff, 0xff, 1, 2, 3, 4]);
        let run = |word: u32| {
            let (mut regs, mut fpu) = (regs(), vectors());
            decode(word).unwrap().finish(&data, &mut regs, &mut fpu);
            assert_eq!(regs.pc, 0x1004);
            (regs, fpu)
        };
        let (regs, _) = run(0x6940_0861); // ldpsw x1, x2, [x3]
        assert_eq!((regs.gpr[1], regs.gpr[2]), (0xffff_ffff_ffff_ff80, 0x0403_0201));
        let (regs, _) = run(0x38c0_1461); // ldrsb w1, [x3], 1
        assert_eq!(regs.gpr[1], 0xffff_ff80);
        assert_eq!(regs.gpr[3], self::regs().gpr[3] + 1);
        let (regs, _) = run(0xf840_87ff); // ldr xzr, [sp], 8
        assert_eq!(regs.gpr[31], self::regs().gpr[31] + 8);
        let (_, fpu) = run(0xbd40_0061); // ldr s1, [x3]: the rest of v1 becomes zero
        assert_eq!(fpu.v[1], 0xffff_ff80);
    }

    #[test]
    fn syndromes_tell_every_size_and_sign() {
        let iss = |size: u64, sign: u64, register: u64, wide: u64, write: u64| {
            1 << 24 | size << 22 | sign << 21 | register << 16 | wide << 15 | write << 6 | 7
        };
        let load = |iss, data: u64| {
            let mut regs = regs();
            let mut all = [0; MOST];
            all[..8].copy_from_slice(&data.to_le_bytes());
            Transfer::told(iss).unwrap().finish(&all, &mut regs, &mut Aarch64FpuRegs::default());
            assert_eq!(regs.pc, 0x1004);
            regs
        };
        assert_eq!(load(iss(0, 0, 3, 0, 0), 0x1ff).gpr[3], 0xff);
        assert_eq!(load(iss(1, 1, 3, 0, 0), 0xfffe).gpr[3], 0xffff_fffe);
        assert_eq!(load(iss(2, 1, 3, 1, 0), 0x8000_0000).gpr[3], 0xffff_ffff_8000_0000);
        assert_eq!(load(iss(3, 0, 30, 1, 0), u64::MAX).gpr[30], u64::MAX);
        assert_eq!(load(iss(3, 0, 31, 1, 0), 1).gpr, regs().gpr, "the zero register keeps nothing");
        let store = |iss| Transfer::told(iss).unwrap().stored(&regs(), &Aarch64FpuRegs::default());
        assert_eq!(store(iss(2, 0, 1, 0, 1))[..4], [0x55, 0x66, 0x78, 0x88]);
        assert_eq!(store(iss(3, 0, 31, 1, 1)), [0; MOST]);
        assert!(Transfer::told(iss(3, 0, 1, 1, 1) & !(1 << 24)).is_none());
    }

    #[test]
    fn what_is_not_decoded_is_refused() {
        for (word, text) in [
            (0x885f_7c41, "ldxr w1, [x2]"),
            (0xb820_0041, "ldadd w0, w1, [x2]"),
            (0x4c40_7041, "ld1 {v1.16b}, [x2]"),
            (0xf980_0040, "prfm"),
            (0xd50b_7e21, "dc civac, x1"),
            (0xa940_0461, "ldp x1, x1, [x3]"),
            (0xf840_8463, "ldr x3, [x3], 8"),
            (0x6800_0861, "stgp"),
            (0xe940_0861, "unallocated pair"),
            (0x7dc0_0461, "unallocated vector size"),
            (0, "udf"),
            (u32::MAX, "all ones"),
        ] {
            assert_eq!(decode(word), None, "{text}");
        }
    }

    #[test]
    fn every_word_is_survived() {
        let mut word = 1u32;
        for _ in 0..200_000 {
            word = word.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            if let Some(transfer) = decode(word) {
                let (mut regs, mut fpu) = (regs(), vectors());
                transfer.address(&regs);
                let data = transfer.stored(&regs, &fpu);
                transfer.finish(&data, &mut regs, &mut fpu);
                assert!(transfer.bytes() <= MOST);
            }
        }
    }
}
