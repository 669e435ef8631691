//! What the integer SIMD instructions do besides computing: faults, the x87 state, what stays untouched; and that none is missing. Any
//! host; that they compute what processors do is for `tests/differential.rs`.

use iced_x86::{Code, CpuidFeature, Decoder, DecoderOptions, EncodingKind, Instruction, Mnemonic};

use super::FAMILIES;
use crate::exception::Exception;
use crate::state::{CpuState, cr0, cr4};
use crate::testing::{Machine, RAM};
use crate::{Emulated, NoBus};

const BUFFER: u64 = 0x2_0000;

/// Runs an instruction that must fault, and answers the exception; nothing may have changed.
#[track_caller]
fn fault(code: &[u8], prepare: impl FnOnce(&mut CpuState)) -> Exception {
    let mut machine = Machine::new(Box::new(NoBus));
    machine.cpu.update(prepare);
    let before = machine.cpu.state().clone();
    let exception = exception(&mut machine, code);
    let after = machine.cpu.state();
    assert_eq!((after.gpr, after.xmm, after.x87), (before.gpr, before.xmm, before.x87), "{code:02x?}");
    exception
}

#[track_caller]
fn exception(machine: &mut Machine, code: &[u8]) -> Exception {
    match machine.cpu.emulate_one(code) {
        Emulated::Exception(exception) => exception,
        other => panic!("{code:02x?}: {other:?}"),
    }
}

#[test]
fn sixteen_byte_operands_must_be_aligned_except_where_the_manual_says_so() {
    let at = |st: &mut CpuState| st.gpr[0] = BUFFER + 8;
    for code in [
        &[0x0f, 0x28, 0x00][..],         // movaps xmm0, [rax]
        &[0x0f, 0x29, 0x00],             // movaps [rax], xmm0
        &[0x66, 0x0f, 0x6f, 0x00],       // movdqa xmm0, [rax]
        &[0x66, 0x0f, 0xe7, 0x00],       // movntdq [rax], xmm0
        &[0x66, 0x0f, 0x38, 0x2a, 0x00], // movntdqa xmm0, [rax]
        &[0x66, 0x0f, 0xfc, 0x00],       // paddb xmm0, [rax]
        &[0x66, 0x0f, 0xd1, 0x00],       // psrlw xmm0, [rax]
        &[0x66, 0x0f, 0x70, 0x00, 0],    // pshufd xmm0, [rax], 0
        &[0x66, 0x0f, 0x38, 0xdc, 0x00], // aesenc xmm0, [rax]
        &[0x0f, 0x38, 0xc8, 0x00],       // sha1nexte xmm0, [rax]
        &[0x66, 0x0f, 0x38, 0x17, 0x00], // ptest xmm0, [rax]
        &[0x0f, 0x54, 0x00],             // andps xmm0, [rax]
        &[0xf3, 0x0f, 0x12, 0x00],       // movsldup xmm0, [rax]
    ] {
        assert_eq!(fault(code, at), Exception::Gp(0), "{code:02x?}");
    }
    for code in [
        &[0x0f, 0x10, 0x00][..],            // movups xmm0, [rax]
        &[0xf2, 0x0f, 0xf0, 0x00],          // lddqu xmm0, [rax]
        &[0x66, 0x0f, 0x3a, 0x63, 0x00, 0], // pcmpistri xmm0, [rax], 0
        &[0x66, 0x0f, 0x38, 0x20, 0x40, 1], // pmovsxbw xmm0, [rax + 1]
        &[0x0f, 0xfc, 0x40, 1],             // paddb mm0, [rax + 1]
        &[0xf2, 0x0f, 0x12, 0x40, 1],       // movddup xmm0, [rax + 1]
    ] {
        let mut machine = Machine::new(Box::new(NoBus));
        machine.code(code);
        machine.cpu.update(at);
        machine.run();
    }
}

#[test]
fn control_registers_disable_them() {
    let paddb_xmm = &[0x66, 0x0f, 0xfc, 0xc1][..];
    let paddb_mm = &[0x0f, 0xfc, 0xc1][..];
    let movdq2q = &[0xf2, 0x0f, 0xd6, 0xc1][..];
    for (code, cr0_bit, osfxsr, expected) in [
        (paddb_xmm, cr0::EM, true, Exception::Ud),
        (paddb_xmm, cr0::TS, true, Exception::Nm),
        (paddb_xmm, cr0::TS, false, Exception::Ud),
        (paddb_xmm, 0, false, Exception::Ud),
        (paddb_mm, cr0::EM, true, Exception::Ud),
        (paddb_mm, cr0::TS, false, Exception::Nm),
        (movdq2q, 0, false, Exception::Ud),
    ] {
        let exception = fault(code, |st| {
            st.cr0 |= cr0_bit;
            if !osfxsr {
                st.cr4 &= !cr4::OSFXSR;
            }
        });
        assert_eq!(exception, expected, "{code:02x?} CR0 {cr0_bit:#x} OSFXSR {osfxsr}");
    }
    // CRC32 is on general registers and needs none of it.
    let mut machine = Machine::new(Box::new(NoBus));
    machine.code(&[0xf2, 0x0f, 0x38, 0xf1, 0xc1]);
    machine.cpu.update(|st| {
        st.cr0 |= cr0::EM | cr0::TS;
        st.gpr[0] = u64::MAX;
        st.gpr[1] = 0x3433_3231;
    });
    assert_eq!(machine.run().gpr[0], u64::from(crate::simd::crc32(u32::MAX, b"1234")));
}

#[test]
fn a_pending_x87_error_comes_before_an_mmx_instruction() {
    for code in [
        &[0x0f, 0xfc, 0xc1][..],   // paddb mm0, mm1
        &[0x0f, 0x6f, 0x00],       // movq mm0, [rax] (rax leads nowhere)
        &[0x0f, 0x77],             // emms
        &[0xf2, 0x0f, 0xd6, 0xc1], // movdq2q mm0, xmm1
        &[0x0f, 0xd7, 0xc1],       // pmovmskb eax, mm1
    ] {
        let exception = fault(code, |st| {
            st.gpr[0] = 0x4000_0000;
            st.x87.fcw &= !1;
            st.x87.fsw = 0x8081;
        });
        assert_eq!(exception, Exception::Mf, "{code:02x?}");
    }
}

#[test]
fn mmx_instructions_reset_the_x87_stack_and_emms_empties_it() {
    let mut machine = Machine::new(Box::new(NoBus));
    machine.code(&[0x0f, 0xfc, 0xc1]); // paddb mm0, mm1
    machine.cpu.update(|st| st.x87.fsw = 0x3d00);
    let st = machine.run();
    assert_eq!((st.x87.fsw, st.x87.valid), (0x0500, 0xff));
    assert_eq!((st.x87.sign_exp[0], st.x87.sign_exp[1]), (0xffff, 0));
    let st = crate::testing::run(&[0x0f, 0x77], |st| st.x87.valid = 0x55);
    assert_eq!(st.x87.valid, 0);
}

#[test]
fn a_faulting_mmx_load_leaves_the_x87_stack_alone() {
    let exception = fault(&[0x0f, 0x6f, 0x00], |st| {
        st.gpr[0] = 0x4000_0000;
        st.x87.fsw = 0x1800;
    });
    assert!(matches!(exception, Exception::Pf { addr: 0x4000_0000, .. }), "{exception:?}");
}

#[test]
fn masked_stores_touch_only_their_bytes() {
    // maskmovdqu xmm1, xmm2 across the end of memory that is mapped: 2 MiB.
    const CODE_BYTES: &[u8] = &[0x66, 0x0f, 0xf7, 0xca];
    let store = |mask: u128| {
        let mut machine = Machine::new(Box::new(NoBus));
        machine.code(CODE_BYTES);
        machine.cpu.update(|st| {
            st.gpr[7] = 0x20_0000 - 8;
            st.xmm[1] = u128::MAX;
            st.xmm[2] = mask;
        });
        machine
    };
    let mut machine = store(0x80_0000_8000_0080);
    machine.run();
    let stored: [u8; 8] = machine.memory.read(RAM as u64 - 8);
    assert_eq!(stored, [0xff, 0, 0, 0xff, 0, 0, 0xff, 0], "only bytes in mapped memory were wanted");
    let mut machine = store(u128::MAX);
    let exception = exception(&mut machine, CODE_BYTES);
    assert!(matches!(exception, Exception::Pf { addr: 0x20_0000, .. }), "{exception:?}");
    let stored: [u8; 8] = machine.memory.read(RAM as u64 - 8);
    assert_eq!(stored, [0; 8], "all bytes are checked before the first is stored");
    // An empty mask stores nothing, so it cannot fault either.
    let mut machine = store(0);
    machine.cpu.update(|st| st.gpr[7] = 0x4000_0000);
    machine.run();
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
