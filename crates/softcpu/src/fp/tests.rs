//! Known answers, for hosts that have no x86 to compare with, and for what no host shows without trapping.

use super::*;

const RC_DOWN: u32 = 1 << RC_SHIFT;
const RC_UP: u32 = 2 << RC_SHIFT;
const MASKED: u32 = ALL << MASK_SHIFT;

const SIN_1: u64 = 0xd76a_a478_4867_7021;
const COS_1: u64 = 0x8a51_407d_a834_5c92;
const TAN_HALF: u64 = 0x8bda_7adf_9a3a_5219;
const ATAN_THIRD: u64 = 0xa4bc_7d19_34f7_0924;
const SQRT_2_LESS_1: u64 = 0xd413_cccf_e779_9211;
const LOG2_3: u64 = 0xcae0_0d1c_fdeb_43d0;
const LOG2_E: u64 = 0xb8aa_3b29_5c17_f0bc;
const SIN_2_62: F80 = F80 { sign_exp: 0xbffe, sig: 0xb506_a9dd_559c_f157 };

fn f64_of(x: f64) -> F64 {
    F64(x.to_bits())
}

fn f80(sign_exp: u16, sig: u64) -> F80 {
    F80 { sign_exp, sig }
}

/// Result bits and flags of an SSE operation.
fn sse(mxcsr: u32, operation: impl FnOnce(&mut Env) -> F64) -> (u64, u32) {
    let mut env = Env::sse(mxcsr);
    (operation(&mut env).0, env.raised)
}

#[test]
fn sse_flags_follow_the_priorities_of_the_manual() {
    let (one, zero, denormal) = (f64_of(1.0), f64_of(0.0), F64(1));
    let (quiet, signaling) = (F64(0x7ff8 << 48 | 5), F64(0x7ff0 << 48 | 7));
    // A signalling NaN in front, made quiet; a quiet NaN hides a denormal; a zero divisor hides it too.
    assert_eq!(sse(MASKED, |e| host::apply::<host::Add, _>(e, signaling, quiet)), (0x7ff8 << 48 | 7, IE));
    assert_eq!(sse(MASKED, |e| host::apply::<host::Add, _>(e, quiet, signaling)), (quiet.0, IE));
    assert_eq!(sse(MASKED, |e| host::apply::<host::Mul, _>(e, quiet, denormal)), (quiet.0, 0));
    assert_eq!(sse(MASKED, |e| host::apply::<host::Div, _>(e, denormal, zero)), (0x7ff0 << 48, ZE));
    assert_eq!(sse(MASKED, |e| host::apply::<host::Div, _>(e, zero, zero)), (F64::INDEFINITE.0, IE));
    assert_eq!(
        sse(MASKED, |e| host::apply::<host::Sqrt, _>(e, f64_of(0.0), F64(1 << 63 | 1))),
        (F64::INDEFINITE.0, IE)
    );
    assert_eq!(sse(MASKED, |e| host::apply::<host::Add, _>(e, one, denormal)), (one.0, DE | PE));
    assert_eq!(sse(MASKED | DAZ, |e| host::apply::<host::Add, _>(e, one, denormal)), (one.0, 0));
    // MINSD hands its second operand through for any NaN and for equal zeros.
    assert_eq!(sse(MASKED, |e| host::apply::<host::Min, _>(e, one, quiet)), (quiet.0, IE));
    assert_eq!(sse(MASKED, |e| host::apply::<host::Max, _>(e, zero, F64(1 << 63))), (1 << 63, 0));
}

#[test]
fn exact_results_leave_the_inexact_flag_alone() {
    // Both the short cut and the integer code decide exactness; PE is not sticky here.
    for (x, y) in [(3.0, 0.5), (1e15, 7.0), (0.1, 0.3), (1.0 / 3.0, 3.0), (2f64.powi(52), 1.5), (6.25, 2.5)] {
        let (a, b) = (f64_of(x), f64_of(y));
        let mut fast = Env::sse(MASKED);
        let mut slow = Env::sse(MASKED);
        let (ua, ub) = (a.operand(&slow), b.operand(&slow));
        assert_eq!(host::apply::<host::Add, _>(&mut fast, a, b), arith::add(&mut slow, ua, ub));
        assert_eq!(host::apply::<host::Sub, _>(&mut fast, a, b), arith::sub(&mut slow, ua, ub));
        assert_eq!(fast.raised, slow.raised, "{x} +- {y}");
        (fast.raised, slow.raised) = (0, 0);
        assert_eq!(host::apply::<host::Mul, _>(&mut fast, a, b), arith::mul(&mut slow, ua, ub));
        assert_eq!(fast.raised, slow.raised, "{x} * {y}");
        (fast.raised, slow.raised) = (0, 0);
        assert_eq!(host::apply::<host::Div, _>(&mut fast, a, b), arith::div(&mut slow, ua, ub));
        assert_eq!(fast.raised, slow.raised, "{x} / {y}");
        (fast.raised, slow.raised) = (0, 0);
        assert_eq!(host::apply::<host::Sqrt, _>(&mut fast, a, a), arith::sqrt(&mut slow, a));
        assert_eq!(fast.raised, slow.raised, "sqrt {x}");
    }
}

#[test]
fn tiny_is_decided_after_rounding() {
    let smallest = f64_of(f64::MIN_POSITIVE);
    // (2 - 2^-52) * 2^-1023 rounds to the smallest normal number, but not with an unbounded exponent.
    let below = f64_of(0.5 * (2.0 - f64::EPSILON));
    assert_eq!(sse(MASKED, |e| host::apply::<host::Mul, _>(e, smallest, below)), (smallest.0, UE | PE));
    assert_eq!(sse(MASKED | FTZ, |e| host::apply::<host::Mul, _>(e, smallest, below)), (0, UE | PE));
    // Exact denormals underflow only when that is unmasked.
    let half = f64_of(0.5);
    assert_eq!(sse(MASKED, |e| host::apply::<host::Mul, _>(e, smallest, half)), (1 << 51, 0));
    assert_eq!(sse(MASKED & !(UE << MASK_SHIFT), |e| host::apply::<host::Mul, _>(e, smallest, half)).1, UE);
    // Upwards, the largest number below is not tiny any more when the rounding reaches it.
    assert_eq!(sse(MASKED | RC_UP, |e| host::apply::<host::Mul, _>(e, smallest, below)), (smallest.0, UE | PE));
    assert_eq!(sse(MASKED | RC_DOWN, |e| host::apply::<host::Mul, _>(e, smallest, below)), (smallest.0 - 1, UE | PE));
}

#[test]
fn unmasked_sse_exceptions_are_reported_before_what_follows() {
    let unmasked = |flag: u32| MASKED & !(flag << MASK_SHIFT);
    let mut env = Env::sse(unmasked(DE));
    host::apply::<host::Add, _>(&mut env, f64_of(1.0), F64(1));
    assert_eq!((env.raised, env.unmasked()), (DE, DE), "nothing is computed, so nothing is inexact");
    let mut env = Env::sse(unmasked(OE));
    host::apply::<host::Mul, _>(&mut env, f64_of(1e300), f64_of(1e300));
    assert_eq!((env.raised, env.unmasked()), (OE | PE, OE));
}

#[test]
fn integers_that_do_not_fit_are_indefinite() {
    let mut env = Env::sse(MASKED);
    assert_eq!(host::float_to_int(&mut env, f64_of(2147483647.5), 32, true), 2147483647);
    assert_eq!(env.raised, PE);
    let mut env = Env::sse(MASKED);
    assert_eq!(host::float_to_int(&mut env, f64_of(2147483647.5), 32, false), i64::from(i32::MIN));
    assert_eq!(env.raised, IE, "an invalid conversion is not inexact too");
    let mut env = Env::sse(MASKED);
    assert_eq!(host::float_to_int(&mut env, f64_of(-9223372036854775808.0), 64, false), i64::MIN);
    assert_eq!(env.raised, 0);
    assert_eq!(host::int_to_float::<F32>(&mut env, 0x0100_0001).0, 16777216f32.to_bits());
    assert_eq!(env.raised, PE);
}

#[test]
fn x87_precision_control_cuts_results_and_c1_tells_the_direction() {
    let third = |fcw: u16| {
        let mut env = Env::x87(fcw);
        let q: F80 = arith::div(&mut env, F80::ONE.unpack(), f80(0x4000, 3 << 62).unpack());
        (q.sig, env.raised, env.rounded_up)
    };
    assert_eq!(third(0x37f), (0xaaaa_aaaa_aaaa_aaab, PE, true));
    assert_eq!(third(0xf7f), (0xaaaa_aaaa_aaaa_aaaa, PE, false));
    assert_eq!(third(0x27f), (0xaaaa_aaaa_aaaa_a800, PE, false));
    assert_eq!(third(0x07f), (0xaaaa_ab00_0000_0000, PE, true));
}

#[test]
fn x87_unmasked_overflow_moves_the_exponent() {
    let big = f80(0x7000, 1 << 63);
    let mut env = Env::x87(0x377);
    let product: F80 = arith::mul(&mut env, big.unpack(), big.unpack());
    // 2^(2 * 0x3001), less 24576.
    assert_eq!(product, f80(0x3fff + 2 * 0x3001 - 24576, 1 << 63));
    assert_eq!((env.raised, env.unmasked()), (OE, OE));
}

#[test]
fn x87_nans_go_by_their_significands() {
    let (small, large) = (f80(0x7fff, 3 << 62 | 1), f80(0xffff, 3 << 62 | 2));
    let signaling = f80(0x7fff, 1 << 63 | 9);
    let add = |a: F80, b: F80| {
        let mut env = Env::x87(0x37f);
        let sum: F80 = arith::add(&mut env, a.unpack(), b.unpack());
        (sum, env.raised)
    };
    assert_eq!(add(small, large), (large, 0));
    assert_eq!(add(large, small), (large, 0));
    assert_eq!(add(signaling, small), (small, IE), "a quiet NaN wins over a signalling one");
    assert_eq!(add(signaling, F80::ONE), (f80(0x7fff, 3 << 62 | 9), IE));
    assert_eq!(add(f80(0x3fff, 1), F80::ONE), (F80::INDEFINITE, IE), "an unnormal is not a number any more");
}

#[test]
fn remainders_are_exact_and_partial_when_far_apart() {
    let mut env = Env::x87(0x37f);
    // 17 rem 5: truncated 3 rest 2; 18 rem 5: nearest 4 rest -2.
    let int = |n: i64| convert::int_to_float::<F80>(&mut Env::x87(0x37f), n);
    let r = x87::remainder(&mut env, int(17), int(5), false);
    assert_eq!((r.value, r.quotient), (int(2), x87::Quotient::Low(3)));
    let r = x87::remainder(&mut env, int(18), int(5), true);
    assert_eq!((r.value, r.quotient), (int(-2), x87::Quotient::Low(4)));
    let mut far = f80(0x3fff + 200, 0xffff_ffff_ffff_fff1);
    let mut steps = 0;
    loop {
        let r = x87::remainder(&mut env, far, int(7), false);
        far = r.value;
        steps += 1;
        if r.quotient != x87::Quotient::Partial {
            break;
        }
    }
    // 0xfffffffffffffff1 * 2^137 modulo 7: 2^3 is 1, so 2^137 is 4, and the significand is 1.
    assert_eq!((far, env.raised), (int(4), 0));
    assert!(steps > 2);
}

#[test]
fn packed_decimals_go_both_ways() {
    let mut env = Env::x87(0x37f);
    let bytes = [0x89, 0x67, 0x45, 0x23, 0x01, 0, 0, 0, 0x90, 0x80];
    assert_eq!(bcd::store(&mut env, bcd::load(bytes)), bytes);
    assert_eq!(env.raised, 0);
    let too_big = convert::int_to_float(&mut env, 1_000_000_000_000_000_000);
    assert_eq!(bcd::store(&mut env, too_big), bcd::INDEFINITE);
    assert_eq!(env.raised, IE);
}

#[test]
fn transcendentals_are_right_to_the_last_bit() {
    let mut env = Env::x87(0x37f);
    let half = f80(0x3ffe, 1 << 63);
    let three = f80(0x4000, 3 << 62);
    // Values computed with 400 bits elsewhere and rounded to nearest.
    let cases = [
        ("sin 1", trans::fsin(&mut env, F80::ONE).unwrap(), f80(0x3ffe, SIN_1)),
        ("cos 1", trans::fcos(&mut env, F80::ONE).unwrap(), f80(0x3ffe, COS_1)),
        ("tan 1/2", trans::fptan(&mut env, half).unwrap().0, f80(0x3ffe, TAN_HALF)),
        ("atan 1/3", trans::fpatan(&mut env, three, F80::ONE), f80(0x3ffd, ATAN_THIRD)),
        ("2^0.5 - 1", trans::f2xm1(&mut env, half), f80(0x3ffd, SQRT_2_LESS_1)),
        ("log2 3", trans::fyl2x(&mut env, three, F80::ONE), f80(0x3fff, LOG2_3)),
        ("log2(1 + 2^-70)", trans::fyl2xp1(&mut env, f80(0x3fff - 70, 1 << 63), F80::ONE), f80(0x3fff - 70, LOG2_E)),
    ];
    for (name, got, want) in cases {
        assert_eq!(got, want, "{name}");
    }
    assert_eq!(env.raised, PE);
    assert!(trans::fsin(&mut env, f80(0x3fff + 63, 1 << 63)).is_none(), "2^63 is out of range");
    // The operand 2^62 shows the pi of 66 bits: the sine of the exact number is another one.
    assert_eq!(trans::fsin(&mut env, f80(0x3fff + 62, 1 << 63)).unwrap(), SIN_2_62);
}
