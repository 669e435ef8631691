//! Which instructions can be compared, and what of their results.

use iced_x86::{Code, CpuidFeature, FlowControl, Instruction, Mnemonic, OpKind, Register, RflagsBits};
use vm_accel_softcpu::state::rflags;

use crate::machine::Exactness;

/// RFLAGS bits from the decoder's.
pub(crate) fn flags(bits: u32) -> u64 {
    [
        (RflagsBits::OF, rflags::OF),
        (RflagsBits::SF, rflags::SF),
        (RflagsBits::ZF, rflags::ZF),
        (RflagsBits::AF, rflags::AF),
        (RflagsBits::CF, rflags::CF),
        (RflagsBits::PF, rflags::PF),
    ]
    .into_iter()
    .filter(|(bit, _)| bits & bit != 0)
    .fold(0, |all, (_, flag)| all | flag)
}

/// Whether both sides have the features that an instruction belongs to, and nothing about it depends on who executes it.
pub(crate) fn comparable(insn: &Instruction, amd: bool) -> bool {
    use Mnemonic as M;
    let registers = (0..insn.op_count()).filter(|&k| insn.op_kind(k) == OpKind::Register).map(|k| insn.op_register(k));
    let plain = registers.enumerate().all(|(k, register)| {
        register.is_gpr()
            || register.is_xmm()
            || register.is_mm()
            || register.is_st()
            // Selectors can be read.
            || register.is_segment_register() && k != 0 && insn.mnemonic() == M::Mov
    });
    plain
        && insn.code() != Code::INVALID
        // AMD's processors read 32 bits.
        && insn.code() != Code::Movsxd_r16_rm16
        && insn.flow_control() == FlowControl::Next
        && !insn.is_privileged()
        && insn.cpuid_features().iter().all(|feature| offered(*feature))
        && !matches!(insn.memory_segment(), Register::FS | Register::GS)
        && !matches!(
            insn.mnemonic(),
            // What they answer depends on the host, or they change more than this comparison sets up.
            M::Rdrand | M::Rdseed | M::Rdpid | M::Rdtsc | M::Rdtscp | M::Rdpmc | M::Cpuid | M::Xgetbv
            | M::Sgdt | M::Sidt | M::Sldt | M::Str | M::Smsw | M::Lmsw | M::Lar | M::Lsl | M::Verr | M::Verw
            | M::Lfs | M::Lgs | M::Lss | M::In | M::Out | M::Insb | M::Insw | M::Insd | M::Outsb | M::Outsw | M::Outsd
            | M::Cli | M::Sti | M::Xlatb | M::Ud0 | M::Ud1 | M::Ud2
            // These flags make traps, see `generate`; the frames that ENTER copies may be anywhere.
            | M::Popf | M::Popfd | M::Popfq | M::Enter
            // Pointers in x87 environments.
            | M::Fxsave | M::Fxsave64 | M::Fxrstor | M::Fxrstor64 | M::Fldenv | M::Fnstenv | M::Frstor | M::Fnsave
            // What the 8087 and the 80287 left behind.
            | M::Fneni | M::Fndisi | M::Fnsetpm | M::Frstpm
            // F3 REX.B 90 is XCHG R8 to processors and PAUSE to the decoder.
            | M::Pause
        )
        && (amd || insn.code() != Code::Fstpnce_sti && exactness(insn.code()) != Exactness::LastBit)
}

/// A feature of the software CPU that the host has too.
fn offered(feature: CpuidFeature) -> bool {
    use CpuidFeature as F;
    match feature {
        F::INTEL8086 | F::INTEL186 | F::INTEL286 | F::INTEL386 | F::INTEL486 | F::X64 | F::MULTIBYTENOP => true,
        F::CMOV | F::CX8 | F::FPU | F::FPU287 | F::FPU387 | F::MMX | F::SSE | F::SSE2 | F::CLFSH => true,
        F::SSE3 => is_x86_feature_detected!("sse3"),
        F::SSSE3 => is_x86_feature_detected!("ssse3"),
        F::SSE4_1 => is_x86_feature_detected!("sse4.1"),
        F::SSE4_2 => is_x86_feature_detected!("sse4.2"),
        F::AES => is_x86_feature_detected!("aes"),
        F::PCLMULQDQ => is_x86_feature_detected!("pclmulqdq"),
        F::SHA => is_x86_feature_detected!("sha"),
        F::MOVBE => is_x86_feature_detected!("movbe"),
        F::POPCNT => is_x86_feature_detected!("popcnt"),
        F::CMPXCHG16B => is_x86_feature_detected!("cmpxchg16b"),
        _ => false,
    }
}

/// Whether an instruction is of the integer kind.
pub(crate) fn is_integer(insn: &Instruction) -> bool {
    (0..insn.op_count()).all(|k| insn.op_kind(k) != OpKind::Register || !is_vector(insn.op_register(k)))
        && !is_x87(insn)
        && !matches!(insn.mnemonic(), Mnemonic::Ldmxcsr | Mnemonic::Stmxcsr | Mnemonic::Emms)
        && !insn.is_string_instruction()
        && !insn.is_stack_instruction()
}

fn is_vector(register: Register) -> bool {
    register.is_xmm() || register.is_mm()
}

pub(crate) fn is_x87(insn: &Instruction) -> bool {
    insn.cpuid_features()
        .iter()
        .any(|feature| matches!(feature, CpuidFeature::FPU | CpuidFeature::FPU287 | CpuidFeature::FPU387))
}

/// How exactly an instruction's result can be compared.
pub(crate) fn exactness(code: Code) -> Exactness {
    use Code::*;
    match code {
        F2xm1 | Fyl2x | Fyl2xp1 | Fpatan | Fsin | Fcos | Fsincos | Fptan => Exactness::LastBit,
        Rcpss_xmm_xmmm32 | Rcpps_xmm_xmmm128 | Rsqrtss_xmm_xmmm32 | Rsqrtps_xmm_xmmm128 => Exactness::Approximate,
        _ => Exactness::Exact,
    }
}

/// Flags that are undefined after an instruction, from those that were before it. `gpr` are the registers before it.
pub(crate) fn undefined_after(insn: &Instruction, gpr: &[u64; 16], undefined: u64) -> u64 {
    use Mnemonic as M;
    let repeats = insn.has_rep_prefix() || insn.has_repne_prefix();
    let count_register = match insn.mnemonic() {
        M::Shl | M::Sal | M::Shr | M::Sar | M::Rol | M::Ror | M::Rcl | M::Rcr => Some(1),
        M::Shld | M::Shrd => Some(2),
        _ => None,
    };
    // Nothing is written if the count is 0.
    let mask = if insn.op_count() > 0 && operand_bytes(insn, 0) == 8 { 63 } else { 31 };
    let count = match count_register {
        Some(k) if insn.op_kind(k) == OpKind::Register => Some(gpr[1] & mask),
        Some(k) if insn.op_kind(k) == OpKind::Immediate8 => Some(u64::from(insn.immediate8()) & mask),
        _ if insn.is_string_instruction() && repeats => Some(gpr[1]),
        _ => None,
    };
    if count == Some(0) {
        return undefined;
    }
    undefined & !flags(insn.rflags_modified()) | flags(insn.rflags_undefined())
}

/// Bytes of an operand that is a register or memory.
pub(crate) fn operand_bytes(insn: &Instruction, k: u32) -> usize {
    match insn.op_kind(k) {
        OpKind::Register => insn.op_register(k).size(),
        OpKind::Memory => insn.memory_size().size(),
        _ => 0,
    }
}

/// Whether it shows in the exception which operand had an address that is not canonical: for PUSH and the like with an operand
/// in memory AMD's processors name the stack for both.
pub(crate) fn blames_an_operand(insn: &Instruction) -> bool {
    let memory = (0..insn.op_count()).any(|k| insn.op_kind(k) == OpKind::Memory);
    !(memory && insn.is_stack_instruction())
}

/// Whether the manual leaves the destination undefined: SHLD and SHRD of 16 bits by more than that.
pub(crate) fn undefined_result(insn: &Instruction, gpr: &[u64; 16]) -> bool {
    let count = match insn.code() {
        Code::Shld_rm16_r16_imm8 | Code::Shrd_rm16_r16_imm8 => u64::from(insn.immediate8()),
        Code::Shld_rm16_r16_CL | Code::Shrd_rm16_r16_CL => gpr[1],
        _ => return false,
    };
    count & 31 > 16
}
