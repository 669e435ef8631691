//! SSE to SSE4.1 floating point: arithmetic, comparison, conversion, rounding, dot products, and MXCSR itself.
//!
//! What is computed is in [`crate::fp`]; here is which lanes it is computed on, and the one rule all of it follows
//! (SDM vol. 1, 11.5): the flags of all lanes are merged into MXCSR, and when one of them is unmasked, the destination
//! stays as it was and #XM is raised. Nothing here may write a register before [`complete`] has answered.
//!
//! RCPSS, RSQRTSS and their packed forms give the reciprocal rounded to 12 bits of fraction. The architecture bounds
//! the error by 1.5 * 2^-12 and processors differ in the bits; these stay below 2^-13.

use core::cmp::Ordering;

use iced_x86::{Code, Instruction};

use super::form::has_memory;
use super::thread::{self, Thread};
use super::{Exec, Handler, Leave, Op};
use crate::core::Core;
use crate::exception::Exception;
use crate::fp::host::{self, Add, Div, HostFloat, Max, Min, Mul, Operation, Sqrt, Sub};
use crate::fp::{self, Env, F32, F64, Float, Round, arith};

/// The bits of MXCSR that exist; DAZ is one of them.
const MXCSR_BITS: u32 = 0xffff;

/// A format as a lane of an XMM register.
trait Lane: HostFloat {
    const LANES: usize;
    fn get(v: u128, lane: usize) -> Self;
    fn put(self, v: u128, lane: usize) -> u128;
    fn load(cpu: &mut Core, op: &Op) -> Exec<Self>;
    /// The memory operand if the TLB has it at hand.
    fn hit(cpu: &Core, op: &Op) -> Option<Self>;
}

impl Lane for F32 {
    const LANES: usize = 4;

    #[inline(always)]
    fn get(v: u128, lane: usize) -> Self {
        F32((v >> (32 * lane)) as u32)
    }

    #[inline(always)]
    fn put(self, v: u128, lane: usize) -> u128 {
        v & !(0xffff_ffff << (32 * lane)) | u128::from(self.0) << (32 * lane)
    }

    #[inline(always)]
    fn load(cpu: &mut Core, op: &Op) -> Exec<Self> {
        Ok(F32(cpu.load::<u32>(op)?))
    }

    #[inline(always)]
    fn hit(cpu: &Core, op: &Op) -> Option<Self> {
        cpu.hit_load::<u32, false>(op).map(F32)
    }
}

impl Lane for F64 {
    const LANES: usize = 2;

    #[inline(always)]
    fn get(v: u128, lane: usize) -> Self {
        F64((v >> (64 * lane)) as u64)
    }

    #[inline(always)]
    fn put(self, v: u128, lane: usize) -> u128 {
        v & !(0xffff_ffff_ffff_ffff << (64 * lane)) | u128::from(self.0) << (64 * lane)
    }

    #[inline(always)]
    fn load(cpu: &mut Core, op: &Op) -> Exec<Self> {
        Ok(F64(cpu.load::<u64>(op)?))
    }

    #[inline(always)]
    fn hit(cpu: &Core, op: &Op) -> Option<Self> {
        cpu.hit_load::<u64, false>(op).map(F64)
    }
}

/// All lanes, each made by `f`.
#[inline(always)]
fn lanes<F: Lane>(mut f: impl FnMut(usize) -> F) -> u128 {
    (0..F::LANES).fold(0, |v, lane| f(lane).put(v, lane))
}

/// The source operand of a scalar instruction.
#[inline(always)]
fn scalar_source<F: Lane, const M: bool>(cpu: &mut Core, op: &Op) -> Exec<F> {
    if M { F::load(cpu, op) } else { Ok(F::get(cpu.xmm(op.s), 0)) }
}

/// The source operand of a packed instruction.
#[inline(always)]
fn packed_source<const M: bool>(cpu: &mut Core, op: &Op) -> Exec<u128> {
    if M { cpu.load_aligned(op) } else { Ok(cpu.xmm(op.s)) }
}

/// The low half of an XMM register, or eight bytes of memory that need no alignment.
#[inline(always)]
fn half_source<const M: bool>(cpu: &mut Core, op: &Op) -> Exec<u128> {
    if M { Ok(u128::from(cpu.load::<u64>(op)?)) } else { Ok(cpu.xmm(op.s)) }
}

/// Merge the flags of an instruction into MXCSR; an unmasked one ends the instruction.
#[inline(always)]
fn complete(cpu: &mut Core, env: &Env) -> Exec {
    if env.raised == 0 {
        return Ok(());
    }
    complete_flags(cpu, env)
}

fn complete_flags(cpu: &mut Core, env: &Env) -> Exec {
    let unmasked = env.unmasked();
    // An unmasked exception found before computing keeps every lane from being computed.
    let raised = if unmasked & fp::PRE != 0 { env.raised & fp::PRE } else { env.raised };
    cpu.st.mxcsr |= raised;
    if unmasked == 0 {
        return Ok(());
    }
    cpu.simd_exception()
}

/// ADDSS and the like.
fn scalar<O: Operation, F: Lane, const M: bool>(cpu: &mut Core, op: &Op) -> Exec {
    let b = scalar_source::<F, M>(cpu, op)?;
    let a = cpu.xmm(op.d);
    let mut env = Env::sse(cpu.st.mxcsr);
    let result = host::apply::<O, F>(&mut env, F::get(a, 0), b);
    complete(cpu, &env)?;
    cpu.set_xmm(op.d, result.put(a, 0));
    Ok(())
}

/// ADDPS and the like.
fn packed<O: Operation, F: Lane, const M: bool>(cpu: &mut Core, op: &Op) -> Exec {
    let b = packed_source::<M>(cpu, op)?;
    let a = cpu.xmm(op.d);
    let mut env = Env::sse(cpu.st.mxcsr);
    let result = lanes(|i| host::apply::<O, F>(&mut env, F::get(a, i), F::get(b, i)));
    complete(cpu, &env)?;
    cpu.set_xmm(op.d, result);
    Ok(())
}

/// ADDSUBPS, ADDSUBPD: even lanes subtract.
fn add_sub<F: Lane, const M: bool>(cpu: &mut Core, op: &Op) -> Exec {
    let b = packed_source::<M>(cpu, op)?;
    let a = cpu.xmm(op.d);
    let mut env = Env::sse(cpu.st.mxcsr);
    let result = lanes(|i| {
        let (a, b) = (F::get(a, i), F::get(b, i));
        if i & 1 == 0 { host::apply::<Sub, F>(&mut env, a, b) } else { host::apply::<Add, F>(&mut env, a, b) }
    });
    complete(cpu, &env)?;
    cpu.set_xmm(op.d, result);
    Ok(())
}

/// HADDPS, HSUBPD and their kin: neighbours within the destination, then within the source.
fn horizontal<O: Operation, F: Lane, const M: bool>(cpu: &mut Core, op: &Op) -> Exec {
    let b = packed_source::<M>(cpu, op)?;
    let a = cpu.xmm(op.d);
    let mut env = Env::sse(cpu.st.mxcsr);
    let result = lanes(|i| {
        let half = F::LANES / 2;
        let from = if i < half { a } else { b };
        let first = i % half * 2;
        host::apply::<O, F>(&mut env, F::get(from, first), F::get(from, first + 1))
    });
    complete(cpu, &env)?;
    cpu.set_xmm(op.d, result);
    Ok(())
}

/// DPPS, DPPD: the products that the high immediate bits select, summed in pairs, into the lanes that the low bits
/// select. The products report their exceptions before anything is summed.
fn dot<F: Lane, const M: bool>(cpu: &mut Core, op: &Op) -> Exec {
    let b = packed_source::<M>(cpu, op)?;
    let a = cpu.xmm(op.d);
    let mut env = Env::sse(cpu.st.mxcsr);
    let products = lanes(|i| {
        if op.imm >> (4 + i) & 1 == 1 {
            host::apply::<Mul, F>(&mut env, F::get(a, i), F::get(b, i))
        } else {
            F::zero(false)
        }
    });
    complete(cpu, &env)?;
    let mut env = Env::sse(cpu.st.mxcsr);
    let pair = |env: &mut Env, i: usize| host::apply::<Add, F>(env, F::get(products, i), F::get(products, i + 1));
    let mut sum = pair(&mut env, 0);
    if F::LANES == 4 {
        let upper = pair(&mut env, 2);
        complete(cpu, &env)?;
        env = Env::sse(cpu.st.mxcsr);
        sum = host::apply::<Add, F>(&mut env, sum, upper);
    }
    complete(cpu, &env)?;
    cpu.set_xmm(op.d, lanes(|i| if op.imm >> i & 1 == 1 { sum } else { F::zero(false) }));
    Ok(())
}

/// The truth of CMPPS predicate `imm` (0 to 7) for two lanes.
#[inline(always)]
fn predicate<F: HostFloat>(env: &mut Env, a: F, b: F, imm: u64) -> bool {
    // LT, LE and their negations signal quiet NaNs too.
    let order = host::compare(env, a, b, matches!(imm & 3, 1 | 2));
    let truth = match imm & 3 {
        0 => order == Some(Ordering::Equal),
        1 => order == Some(Ordering::Less),
        2 => matches!(order, Some(Ordering::Less | Ordering::Equal)),
        _ => order.is_none(),
    };
    truth ^ (imm & 4 != 0)
}

/// A mask of ones or zeros as wide as a lane.
#[inline(always)]
fn mask<F: Lane>(on: bool) -> F {
    F::get(if on { !0 } else { 0 }, 0)
}

/// CMPSS, CMPSD.
fn compare_scalar<F: Lane, const M: bool>(cpu: &mut Core, op: &Op) -> Exec {
    let b = scalar_source::<F, M>(cpu, op)?;
    let a = cpu.xmm(op.d);
    let mut env = Env::sse(cpu.st.mxcsr);
    let result = predicate(&mut env, F::get(a, 0), b, op.imm);
    complete(cpu, &env)?;
    cpu.set_xmm(op.d, mask::<F>(result).put(a, 0));
    Ok(())
}

/// CMPPS, CMPPD.
fn compare_packed<F: Lane, const M: bool>(cpu: &mut Core, op: &Op) -> Exec {
    let b = packed_source::<M>(cpu, op)?;
    let a = cpu.xmm(op.d);
    let mut env = Env::sse(cpu.st.mxcsr);
    let result = lanes(|i| mask::<F>(predicate(&mut env, F::get(a, i), F::get(b, i), op.imm)));
    complete(cpu, &env)?;
    cpu.set_xmm(op.d, result);
    Ok(())
}

/// COMISS, COMISD (`SIGNALING`), UCOMISS, UCOMISD: ZF, PF and CF say the order, OF, SF and AF are cleared.
fn compare_flags<F: Lane, const SIGNALING: bool, const M: bool>(cpu: &mut Core, op: &Op) -> Exec {
    let b = scalar_source::<F, M>(cpu, op)?;
    let a = F::get(cpu.xmm(op.d), 0);
    let mut env = Env::sse(cpu.st.mxcsr);
    let order = host::compare(&mut env, a, b, SIGNALING);
    complete(cpu, &env)?;
    cpu.fl = crate::flags::Flags::from_bits(order_flags(order));
    Ok(())
}

/// CF, PF and ZF of an ordering, as COMISD and FCOMI set them.
pub(super) fn order_flags(order: Option<Ordering>) -> u64 {
    match order {
        None => 0x45,
        Some(Ordering::Less) => 0x01,
        Some(Ordering::Equal) => 0x40,
        Some(Ordering::Greater) => 0,
    }
}

/// The environment of ROUNDSS and the like: the immediate may replace the rounding mode and keep PE away.
fn round_lane<F: Lane>(env: &mut Env, a: F, imm: u64) -> F {
    if imm & 4 != 0 {
        return arith::round_to_integral(env, a, imm & 8 == 0);
    }
    let mut with = env.with_rounding(Round::from_bits(imm as u32));
    let result = arith::round_to_integral(&mut with, a, imm & 8 == 0);
    env.raised = with.raised;
    result
}

/// ROUNDSS, ROUNDSD.
fn round_scalar<F: Lane, const M: bool>(cpu: &mut Core, op: &Op) -> Exec {
    let b = scalar_source::<F, M>(cpu, op)?;
    let mut env = Env::sse(cpu.st.mxcsr);
    let result = round_lane(&mut env, b, op.imm);
    complete(cpu, &env)?;
    cpu.set_xmm(op.d, result.put(cpu.xmm(op.d), 0));
    Ok(())
}

/// ROUNDPS, ROUNDPD.
fn round_packed<F: Lane, const M: bool>(cpu: &mut Core, op: &Op) -> Exec {
    let b = packed_source::<M>(cpu, op)?;
    let mut env = Env::sse(cpu.st.mxcsr);
    let result = lanes(|i| round_lane(&mut env, F::get(b, i), op.imm));
    complete(cpu, &env)?;
    cpu.set_xmm(op.d, result);
    Ok(())
}

/// `value` rounded to 12 bits of fraction, never to a denormal.
fn twelve_bits(value: f32) -> F32 {
    if value.is_subnormal() {
        return F32(value.to_bits() & 1 << 31);
    }
    // A carry out of the fraction moves on into the exponent, as it should.
    F32((value.to_bits() + 0x400) & !0x7ff)
}

/// RCPSS of one lane: no flags, whatever MXCSR says; denormals count as zero.
fn reciprocal(a: F32) -> F32 {
    let u = a.unpack();
    if u.is_nan() {
        return F32::quiet(&u);
    }
    let x = if u.denormal { F32::zero(u.sign) } else { a };
    twelve_bits(1.0 / x.native())
}

/// RSQRTSS of one lane: no flags; denormals count as zero, negative numbers give the default NaN.
fn reciprocal_root(a: F32) -> F32 {
    let u = a.unpack();
    if u.is_nan() {
        return F32::quiet(&u);
    }
    if u.denormal || u.is_zero() {
        return F32::infinity(u.sign);
    }
    if u.sign {
        return F32::INDEFINITE;
    }
    twelve_bits((1.0 / f64::from(a.native()).sqrt()) as f32)
}

/// RCPSS (`ROOT` false) and RSQRTSS.
fn approximate_scalar<const ROOT: bool, const M: bool>(cpu: &mut Core, op: &Op) -> Exec {
    let b = scalar_source::<F32, M>(cpu, op)?;
    let result = if ROOT { reciprocal_root(b) } else { reciprocal(b) };
    cpu.set_xmm(op.d, result.put(cpu.xmm(op.d), 0));
    Ok(())
}

/// RCPPS (`ROOT` false) and RSQRTPS.
fn approximate_packed<const ROOT: bool, const M: bool>(cpu: &mut Core, op: &Op) -> Exec {
    let b = packed_source::<M>(cpu, op)?;
    cpu.set_xmm(op.d, lanes(|i| if ROOT { reciprocal_root(F32::get(b, i)) } else { reciprocal(F32::get(b, i)) }));
    Ok(())
}

/// CVTSI2SS, CVTSI2SD from a 32-bit or 64-bit (`Q`) integer.
fn from_int<F: Lane, const Q: bool, const M: bool>(cpu: &mut Core, op: &Op) -> Exec {
    let value = match (Q, M) {
        (false, false) => i64::from(cpu.reg::<u32>(op.s) as u32 as i32),
        (false, true) => i64::from(cpu.load::<u32>(op)? as i32),
        (true, false) => cpu.reg::<u64>(op.s) as i64,
        (true, true) => cpu.load::<u64>(op)? as i64,
    };
    let mut env = Env::sse(cpu.st.mxcsr);
    let result = host::int_to_float::<F>(&mut env, value);
    complete(cpu, &env)?;
    cpu.set_xmm(op.d, result.put(cpu.xmm(op.d), 0));
    Ok(())
}

/// CVTSS2SI, CVTTSD2SI and the like, to a 32-bit or 64-bit (`Q`) register.
fn to_int<F: Lane, const T: bool, const Q: bool, const M: bool>(cpu: &mut Core, op: &Op) -> Exec {
    let b = scalar_source::<F, M>(cpu, op)?;
    let mut env = Env::sse(cpu.st.mxcsr);
    let result = host::float_to_int(&mut env, b, if Q { 64 } else { 32 }, T);
    complete(cpu, &env)?;
    if Q {
        cpu.set_reg::<u64>(op.d, result as u64);
    } else {
        cpu.set_reg::<u32>(op.d, u64::from(result as u32));
    }
    Ok(())
}

/// One lane to a 32-bit integer.
#[inline(always)]
fn lane_to_i32<F: Lane, const T: bool>(env: &mut Env, v: u128, lane: usize) -> u128 {
    u128::from(host::float_to_int(env, F::get(v, lane), 32, T) as u32) << (32 * lane)
}

/// One 32-bit integer to a lane.
#[inline(always)]
fn lane_from_i32<F: Lane>(env: &mut Env, v: u128, lane: usize) -> F {
    host::int_to_float(env, i64::from((v >> (32 * lane)) as u32 as i32))
}

/// CVTPS2DQ, CVTPD2DQ and the truncating ones; unused upper lanes become zero.
fn to_dwords<F: Lane, const T: bool, const M: bool>(cpu: &mut Core, op: &Op) -> Exec {
    let b = packed_source::<M>(cpu, op)?;
    let mut env = Env::sse(cpu.st.mxcsr);
    let result = (0..F::LANES).fold(0, |v, i| v | lane_to_i32::<F, T>(&mut env, b, i));
    complete(cpu, &env)?;
    cpu.set_xmm(op.d, result);
    Ok(())
}

/// CVTDQ2PS.
fn dwords_to_single<const M: bool>(cpu: &mut Core, op: &Op) -> Exec {
    let b = packed_source::<M>(cpu, op)?;
    let mut env = Env::sse(cpu.st.mxcsr);
    let result = lanes(|i| lane_from_i32::<F32>(&mut env, b, i));
    complete(cpu, &env)?;
    cpu.set_xmm(op.d, result);
    Ok(())
}

/// CVTDQ2PD: exact.
fn dwords_to_double<const M: bool>(cpu: &mut Core, op: &Op) -> Exec {
    let b = half_source::<M>(cpu, op)?;
    let mut env = Env::sse(cpu.st.mxcsr);
    cpu.set_xmm(op.d, lanes(|i| lane_from_i32::<F64>(&mut env, b, i)));
    Ok(())
}

/// CVTPS2PD.
fn widen_packed<const M: bool>(cpu: &mut Core, op: &Op) -> Exec {
    let b = half_source::<M>(cpu, op)?;
    let mut env = Env::sse(cpu.st.mxcsr);
    let result = lanes(|i| host::widen(&mut env, F32::get(b, i)));
    complete(cpu, &env)?;
    cpu.set_xmm(op.d, result);
    Ok(())
}

/// CVTPD2PS.
fn narrow_packed<const M: bool>(cpu: &mut Core, op: &Op) -> Exec {
    let b = packed_source::<M>(cpu, op)?;
    let mut env = Env::sse(cpu.st.mxcsr);
    let result = (0..2).fold(0, |v, i| host::narrow(&mut env, F64::get(b, i)).put(v, i));
    complete(cpu, &env)?;
    cpu.set_xmm(op.d, result);
    Ok(())
}

/// CVTSS2SD.
fn widen_scalar<const M: bool>(cpu: &mut Core, op: &Op) -> Exec {
    let b = scalar_source::<F32, M>(cpu, op)?;
    let mut env = Env::sse(cpu.st.mxcsr);
    let result = host::widen(&mut env, b);
    complete(cpu, &env)?;
    cpu.set_xmm(op.d, result.put(cpu.xmm(op.d), 0));
    Ok(())
}

/// CVTSD2SS.
fn narrow_scalar<const M: bool>(cpu: &mut Core, op: &Op) -> Exec {
    let b = scalar_source::<F64, M>(cpu, op)?;
    let mut env = Env::sse(cpu.st.mxcsr);
    let result = host::narrow(&mut env, b);
    complete(cpu, &env)?;
    cpu.set_xmm(op.d, result.put(cpu.xmm(op.d), 0));
    Ok(())
}

/// What an instruction with an MMX operand does first: report a pending x87 error.
fn mmx_check(cpu: &mut Core) -> Exec {
    if cpu.st.x87.fsw & super::x87::ES != 0 { cpu.raise(Exception::Mf) } else { Ok(()) }
}

/// What it does to the x87: TOP becomes 0 and every register valid.
fn mmx_enter(cpu: &mut Core) {
    cpu.st.x87.fsw &= !0x3800;
    cpu.st.x87.valid = 0xff;
}

/// CVTPI2PS, CVTPI2PD. The forms that read memory do not touch the x87, as processors have it.
fn from_mmx<F: Lane, const M: bool>(cpu: &mut Core, op: &Op) -> Exec {
    if !M {
        mmx_check(cpu)?;
    }
    let b = u128::from(if M { cpu.load::<u64>(op)? } else { cpu.mmx(op.s) });
    let mut env = Env::sse(cpu.st.mxcsr);
    let low: F = lane_from_i32(&mut env, b, 0);
    let high: F = lane_from_i32(&mut env, b, 1);
    if !M {
        mmx_enter(cpu);
    }
    complete(cpu, &env)?;
    cpu.set_xmm(op.d, high.put(low.put(cpu.xmm(op.d), 0), 1));
    Ok(())
}

/// CVTPS2PI, CVTPD2PI and the truncating ones. The packed double operand must be aligned.
fn to_mmx<F: Lane, const T: bool, const M: bool>(cpu: &mut Core, op: &Op) -> Exec {
    mmx_check(cpu)?;
    let b = if F::LANES == 4 { half_source::<M>(cpu, op)? } else { packed_source::<M>(cpu, op)? };
    let mut env = Env::sse(cpu.st.mxcsr);
    let result = lane_to_i32::<F, T>(&mut env, b, 0) | lane_to_i32::<F, T>(&mut env, b, 1);
    mmx_enter(cpu);
    complete(cpu, &env)?;
    cpu.set_mmx(op.d, result as u64);
    Ok(())
}

/// LDMXCSR: #GP(0) for bits that do not exist.
fn ldmxcsr(cpu: &mut Core, op: &Op) -> Exec {
    let value = cpu.load::<u32>(op)?;
    if value & !MXCSR_BITS != 0 {
        return cpu.raise(Exception::Gp(0));
    }
    cpu.st.mxcsr = value;
    Ok(())
}

/// STMXCSR.
fn stmxcsr(cpu: &mut Core, op: &Op) -> Exec {
    cpu.store::<u32>(op, cpu.st.mxcsr)
}

/// The handler of an instruction of this family.
pub(crate) fn lower(insn: &Instruction) -> Option<Handler> {
    let memory = has_memory(insn);
    /// The register or the memory form of a generic handler.
    macro_rules! form {
        ($handler:ident $(, $argument:tt)*) => {
            if memory { $handler::<$($argument,)* true> } else { $handler::<$($argument,)* false> }
        };
    }
    use Code::*;
    Some(match insn.code() {
        Addss_xmm_xmmm32 => form!(scalar, Add, F32),
        Addsd_xmm_xmmm64 => form!(scalar, Add, F64),
        Addps_xmm_xmmm128 => form!(packed, Add, F32),
        Addpd_xmm_xmmm128 => form!(packed, Add, F64),
        Subss_xmm_xmmm32 => form!(scalar, Sub, F32),
        Subsd_xmm_xmmm64 => form!(scalar, Sub, F64),
        Subps_xmm_xmmm128 => form!(packed, Sub, F32),
        Subpd_xmm_xmmm128 => form!(packed, Sub, F64),
        Mulss_xmm_xmmm32 => form!(scalar, Mul, F32),
        Mulsd_xmm_xmmm64 => form!(scalar, Mul, F64),
        Mulps_xmm_xmmm128 => form!(packed, Mul, F32),
        Mulpd_xmm_xmmm128 => form!(packed, Mul, F64),
        Divss_xmm_xmmm32 => form!(scalar, Div, F32),
        Divsd_xmm_xmmm64 => form!(scalar, Div, F64),
        Divps_xmm_xmmm128 => form!(packed, Div, F32),
        Divpd_xmm_xmmm128 => form!(packed, Div, F64),
        Minss_xmm_xmmm32 => form!(scalar, Min, F32),
        Minsd_xmm_xmmm64 => form!(scalar, Min, F64),
        Minps_xmm_xmmm128 => form!(packed, Min, F32),
        Minpd_xmm_xmmm128 => form!(packed, Min, F64),
        Maxss_xmm_xmmm32 => form!(scalar, Max, F32),
        Maxsd_xmm_xmmm64 => form!(scalar, Max, F64),
        Maxps_xmm_xmmm128 => form!(packed, Max, F32),
        Maxpd_xmm_xmmm128 => form!(packed, Max, F64),
        Sqrtss_xmm_xmmm32 => form!(scalar, Sqrt, F32),
        Sqrtsd_xmm_xmmm64 => form!(scalar, Sqrt, F64),
        Sqrtps_xmm_xmmm128 => form!(packed, Sqrt, F32),
        Sqrtpd_xmm_xmmm128 => form!(packed, Sqrt, F64),
        Rcpss_xmm_xmmm32 => form!(approximate_scalar, false),
        Rcpps_xmm_xmmm128 => form!(approximate_packed, false),
        Rsqrtss_xmm_xmmm32 => form!(approximate_scalar, true),
        Rsqrtps_xmm_xmmm128 => form!(approximate_packed, true),
        Addsubps_xmm_xmmm128 => form!(add_sub, F32),
        Addsubpd_xmm_xmmm128 => form!(add_sub, F64),
        Haddps_xmm_xmmm128 => form!(horizontal, Add, F32),
        Haddpd_xmm_xmmm128 => form!(horizontal, Add, F64),
        Hsubps_xmm_xmmm128 => form!(horizontal, Sub, F32),
        Hsubpd_xmm_xmmm128 => form!(horizontal, Sub, F64),
        Dpps_xmm_xmmm128_imm8 => form!(dot, F32),
        Dppd_xmm_xmmm128_imm8 => form!(dot, F64),
        Cmpss_xmm_xmmm32_imm8 => form!(compare_scalar, F32),
        Cmpsd_xmm_xmmm64_imm8 => form!(compare_scalar, F64),
        Cmpps_xmm_xmmm128_imm8 => form!(compare_packed, F32),
        Cmppd_xmm_xmmm128_imm8 => form!(compare_packed, F64),
        Comiss_xmm_xmmm32 => form!(compare_flags, F32, true),
        Comisd_xmm_xmmm64 => form!(compare_flags, F64, true),
        Ucomiss_xmm_xmmm32 => form!(compare_flags, F32, false),
        Ucomisd_xmm_xmmm64 => form!(compare_flags, F64, false),
        Roundss_xmm_xmmm32_imm8 => form!(round_scalar, F32),
        Roundsd_xmm_xmmm64_imm8 => form!(round_scalar, F64),
        Roundps_xmm_xmmm128_imm8 => form!(round_packed, F32),
        Roundpd_xmm_xmmm128_imm8 => form!(round_packed, F64),
        Cvtsi2ss_xmm_rm32 => form!(from_int, F32, false),
        Cvtsi2ss_xmm_rm64 => form!(from_int, F32, true),
        Cvtsi2sd_xmm_rm32 => form!(from_int, F64, false),
        Cvtsi2sd_xmm_rm64 => form!(from_int, F64, true),
        Cvtss2si_r32_xmmm32 => form!(to_int, F32, false, false),
        Cvtss2si_r64_xmmm32 => form!(to_int, F32, false, true),
        Cvtsd2si_r32_xmmm64 => form!(to_int, F64, false, false),
        Cvtsd2si_r64_xmmm64 => form!(to_int, F64, false, true),
        Cvttss2si_r32_xmmm32 => form!(to_int, F32, true, false),
        Cvttss2si_r64_xmmm32 => form!(to_int, F32, true, true),
        Cvttsd2si_r32_xmmm64 => form!(to_int, F64, true, false),
        Cvttsd2si_r64_xmmm64 => form!(to_int, F64, true, true),
        Cvtps2dq_xmm_xmmm128 => form!(to_dwords, F32, false),
        Cvttps2dq_xmm_xmmm128 => form!(to_dwords, F32, true),
        Cvtpd2dq_xmm_xmmm128 => form!(to_dwords, F64, false),
        Cvttpd2dq_xmm_xmmm128 => form!(to_dwords, F64, true),
        Cvtdq2ps_xmm_xmmm128 => form!(dwords_to_single),
        Cvtdq2pd_xmm_xmmm64 => form!(dwords_to_double),
        Cvtps2pd_xmm_xmmm64 => form!(widen_packed),
        Cvtpd2ps_xmm_xmmm128 => form!(narrow_packed),
        Cvtss2sd_xmm_xmmm32 => form!(widen_scalar),
        Cvtsd2ss_xmm_xmmm64 => form!(narrow_scalar),
        Cvtpi2ps_xmm_mmm64 => form!(from_mmx, F32),
        Cvtpi2pd_xmm_mmm64 => form!(from_mmx, F64),
        Cvtps2pi_mm_xmmm64 => form!(to_mmx, F32, false),
        Cvttps2pi_mm_xmmm64 => form!(to_mmx, F32, true),
        Cvtpd2pi_mm_xmmm128 => form!(to_mmx, F64, false),
        Cvttpd2pi_mm_xmmm128 => form!(to_mmx, F64, true),
        Ldmxcsr_m32 => ldmxcsr,
        Stmxcsr_m32 => stmxcsr,
        _ => return None,
    })
}

/// ADDSS and the like, as a thread: when the host's result is the guest's and changes no flag.
fn quick_scalar<O: Operation, F: Lane, const M: bool>(cpu: &mut Core, op: &Op, rest: &[Op]) -> Leave {
    let b = if M { F::hit(cpu, op) } else { Some(F::get(cpu.xmm(op.s), 0)) };
    let a = cpu.xmm(op.d);
    match b.and_then(|b| host::quick::<O, F>(cpu.st.mxcsr, F::get(a, 0), b)) {
        Some(result) => {
            cpu.set_xmm(op.d, result.put(a, 0));
            thread::next(cpu, rest)
        }
        None => thread::plain(cpu, op, rest),
    }
}

/// ADDPS and the like, as a thread.
fn quick_packed<O: Operation, F: Lane, const M: bool>(cpu: &mut Core, op: &Op, rest: &[Op]) -> Leave {
    let b = if M { cpu.hit_load::<u128, true>(op) } else { Some(cpu.xmm(op.s)) };
    let a = cpu.xmm(op.d);
    match b.and_then(|b| host::quick_all::<O, F>(cpu.st.mxcsr, a, b)) {
        Some(result) => {
            cpu.set_xmm(op.d, result);
            thread::next(cpu, rest)
        }
        None => thread::plain(cpu, op, rest),
    }
}

/// See `thread::of`.
pub(super) fn thread(insn: &Instruction) -> Option<Thread> {
    let memory = has_memory(insn);
    macro_rules! form {
        ($quick:ident, $operation:ty, $format:ty) => {
            if memory { $quick::<$operation, $format, true> } else { $quick::<$operation, $format, false> }
        };
    }
    use Code::*;
    Some(match insn.code() {
        Addss_xmm_xmmm32 => form!(quick_scalar, Add, F32),
        Addsd_xmm_xmmm64 => form!(quick_scalar, Add, F64),
        Addps_xmm_xmmm128 => form!(quick_packed, Add, F32),
        Addpd_xmm_xmmm128 => form!(quick_packed, Add, F64),
        Subss_xmm_xmmm32 => form!(quick_scalar, Sub, F32),
        Subsd_xmm_xmmm64 => form!(quick_scalar, Sub, F64),
        Subps_xmm_xmmm128 => form!(quick_packed, Sub, F32),
        Subpd_xmm_xmmm128 => form!(quick_packed, Sub, F64),
        Mulss_xmm_xmmm32 => form!(quick_scalar, Mul, F32),
        Mulsd_xmm_xmmm64 => form!(quick_scalar, Mul, F64),
        Mulps_xmm_xmmm128 => form!(quick_packed, Mul, F32),
        Mulpd_xmm_xmmm128 => form!(quick_packed, Mul, F64),
        Divss_xmm_xmmm32 => form!(quick_scalar, Div, F32),
        Divsd_xmm_xmmm64 => form!(quick_scalar, Div, F64),
        Divps_xmm_xmmm128 => form!(quick_packed, Div, F32),
        Divpd_xmm_xmmm128 => form!(quick_packed, Div, F64),
        Sqrtss_xmm_xmmm32 => form!(quick_scalar, Sqrt, F32),
        Sqrtsd_xmm_xmmm64 => form!(quick_scalar, Sqrt, F64),
        _ => return None,
    })
}
