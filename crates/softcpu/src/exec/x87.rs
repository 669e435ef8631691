//! x87 instructions that work on the register stack: loads, stores, arithmetic, comparison, transcendental functions.
//! What touches the unit as a whole (control word, environment, save areas) is in [`super::x87_control`].
//!
//! What is computed is in [`crate::fp`]. Here are the stack, its faults, the status word and the order of things (SDM
//! vol. 1, 8.1, 8.5 and 8.7): a pending error is reported before anything else ([`begin`]), memory is accessed next,
//! then the state changes, then the pointers are noted ([`finish`]). An unmasked exception is reported by the next
//! waiting instruction; those found before computing leave operands and stack as they were.

use core::cmp::Ordering;

use iced_x86::{Code, Instruction};

use super::sse_fp::order_flags;
use super::{AM_SEG, Exec, Handler, Op, SC_STACK};
use crate::core::Core;
use crate::exception::Exception;
use crate::flags::Flags;
use crate::fp::arith;
use crate::fp::compare::compare;
use crate::fp::format::Unpacked;
use crate::fp::x87::Quotient;
use crate::fp::{self, ALL, Env, F32, F64, F80, Float, IE, OE, PE, PRE, Round, UE, bcd, convert, trans};
use crate::mmu::Place;
use crate::state::{X87, seg};

/// Status word: stack fault.
const SF: u16 = 1 << 6;
/// Status word: an unmasked exception is pending.
pub(super) const ES: u16 = 1 << 7;
const C0: u16 = 1 << 8;
const C1: u16 = 1 << 9;
const C2: u16 = 1 << 10;
const C3: u16 = 1 << 14;
/// Status word: the copy of ES that the 8087 called busy.
const BUSY: u16 = 1 << 15;

impl X87 {
    /// The physical number of ST(i).
    fn physical(&self, i: usize) -> usize {
        (usize::from(self.fsw >> 11) + i) & 7
    }

    /// ST(i), empty or not.
    pub(super) fn st(&self, i: usize) -> F80 {
        let r = self.physical(i);
        F80 { sign_exp: self.sign_exp[r], sig: self.sig[r] }
    }

    /// Sets ST(i), which is not empty then.
    pub(super) fn set_st(&mut self, i: usize, value: F80) {
        let r = self.physical(i);
        self.sign_exp[r] = value.sign_exp;
        self.sig[r] = value.sig;
        self.valid |= 1 << r;
    }

    fn is_empty(&self, i: usize) -> bool {
        self.valid >> self.physical(i) & 1 == 0
    }

    fn free(&mut self, i: usize) {
        self.valid &= !(1 << self.physical(i));
    }

    /// Moves TOP by `by`, modulo 8.
    fn rotate(&mut self, by: u16) {
        self.fsw = self.fsw & !0x3800 | (self.fsw & 0x3800).wrapping_add(by << 11) & 0x3800;
    }

    fn pop(&mut self) {
        self.free(0);
        self.rotate(1);
    }

    fn push(&mut self, value: F80) {
        self.rotate(7);
        self.set_st(0, value);
    }

    /// Replaces C3 to C0 by `codes`, those in `of` only.
    fn set_codes(&mut self, of: u16, codes: u16) {
        self.fsw = self.fsw & !of | codes;
    }

    /// Recomputes ES and its copy from flags and masks.
    pub(super) fn summarize(&mut self) {
        self.fsw &= !(ES | BUSY);
        if u32::from(self.fsw & !self.fcw) & ALL != 0 {
            self.fsw |= ES | BUSY;
        }
    }

    /// A stack fault; C1 tells overflow from underflow. Answers whether it is masked.
    fn stack_fault(&mut self, overflow: bool) -> bool {
        self.set_codes(C1, if overflow { C1 } else { 0 });
        self.fsw |= SF | IE as u16;
        self.summarize();
        u32::from(self.fcw) & IE != 0
    }

    /// Whether any of the registers is empty, which is a stack underflow: `Some` says whether that is masked.
    fn underflow(&mut self, registers: &[usize]) -> Option<bool> {
        registers.iter().any(|&i| self.is_empty(i)).then(|| self.stack_fault(false))
    }

    /// Takes over flags and C1. Answers whether the instruction takes effect: it does not when one of `blockers` was
    /// raised unmasked.
    fn settle(&mut self, env: &Env, blockers: u32) -> bool {
        let up = env.raised & PE != 0 && env.rounded_up;
        self.set_codes(C1, if up { C1 } else { 0 });
        self.fsw |= env.raised as u16;
        self.summarize();
        env.unmasked() & blockers == 0
    }

    fn env(&self) -> Env {
        Env::x87(self.fcw)
    }

    /// Pushes `value`, unless the stack is full.
    fn push_checked(&mut self, value: impl FnOnce(&mut Self) -> Option<F80>) {
        if !self.is_empty(7) {
            if self.stack_fault(true) {
                self.push(F80::INDEFINITE);
            }
        } else if let Some(value) = value(self) {
            self.push(value);
        }
    }
}

/// What every waiting instruction does first: report a pending error.
#[inline]
pub(super) fn begin(cpu: &mut Core) -> Exec {
    if cpu.st.x87.fsw & ES != 0 { cpu.raise(Exception::Mf) } else { Ok(()) }
}

/// What every non-control instruction does last: note where it is, and its operand when it has one in memory.
fn finish(cpu: &mut Core, op: &Op, memory: bool) {
    cpu.st.x87.fip = cpu.rip_of(op);
    cpu.st.x87.fcs = cpu.st.segs[seg::CS].selector;
    if memory {
        cpu.st.x87.fdp = cpu.effective(op);
        let segment = match op.am & 7 {
            // Flat addressing does not name its segment; there are only these two.
            _ if op.am & AM_SEG == 0 || op.am & 7 == 6 => {
                if op.sc & SC_STACK != 0 {
                    seg::SS
                } else {
                    seg::DS
                }
            }
            named => usize::from(named),
        };
        cpu.st.x87.fds = cpu.st.segs[segment].selector;
    }
    if cpu.st.x87.fsw & ES != 0 {
        note_opcode(cpu, op);
    }
}

/// FOP: the low bits of the first opcode byte and the second, noted when an exception becomes pending (SDM vol. 1,
/// 8.1.9.1; that is what processors do unless told to be compatible with older ones).
#[cold]
fn note_opcode(cpu: &mut Core, op: &Op) {
    let base = if cpu.code64() { 0 } else { cpu.st.segs[seg::CS].base };
    let start = cpu.wrap(cpu.rip_of(op).wrapping_add(base));
    let mut bytes = [0; 15];
    let length = usize::from(op.len).clamp(2, bytes.len());
    // The bytes were fetched to be decoded. This look at them must not be noticed: not by data breakpoints, not by a
    // device, and a page that is gone by now is not a fault.
    let kept = cpu.trap;
    let plain = |cpu: &mut Core, lin| matches!(cpu.place(cpu.set, lin, 1, false), Ok(Place::Host(_)));
    let read = !cpu.watching
        && plain(cpu, start)
        && plain(cpu, cpu.wrap(start.wrapping_add(length as u64 - 1)))
        && cpu.read_bytes(cpu.set, start, &mut bytes[..length]).is_ok();
    cpu.trap = kept;
    if !read {
        return;
    }
    if let Some(at) = bytes[..length - 1].iter().position(|b| (0xd8..=0xdf).contains(b)) {
        cpu.st.x87.fop = u16::from(bytes[at] & 7) << 8 | u16::from(bytes[at + 1]);
    }
}

/// An instruction on registers only.
#[inline]
fn on_stack(cpu: &mut Core, op: &Op, body: impl FnOnce(&mut X87)) -> Exec {
    begin(cpu)?;
    body(&mut cpu.st.x87);
    finish(cpu, op, false);
    Ok(())
}

// Operands in memory.

/// A format in memory that arithmetic takes an operand from.
trait Source {
    fn load(cpu: &mut Core, op: &Op) -> Exec<Unpacked>;
}

struct Single;
struct Double;
struct Int16;
struct Int32;
struct Int64;

impl Source for Single {
    fn load(cpu: &mut Core, op: &Op) -> Exec<Unpacked> {
        Ok(F32(cpu.load::<u32>(op)?).unpack())
    }
}

impl Source for Double {
    fn load(cpu: &mut Core, op: &Op) -> Exec<Unpacked> {
        Ok(F64(cpu.load::<u64>(op)?).unpack())
    }
}

/// An integer, exactly.
fn unpack_int(value: i64) -> Unpacked {
    convert::int_to_float::<F80>(&mut Env::x87(0x37f), value).unpack()
}

impl Source for Int16 {
    fn load(cpu: &mut Core, op: &Op) -> Exec<Unpacked> {
        Ok(unpack_int(i64::from(cpu.load::<u16>(op)? as i16)))
    }
}

impl Source for Int32 {
    fn load(cpu: &mut Core, op: &Op) -> Exec<Unpacked> {
        Ok(unpack_int(i64::from(cpu.load::<u32>(op)? as i32)))
    }
}

impl Source for Int64 {
    fn load(cpu: &mut Core, op: &Op) -> Exec<Unpacked> {
        Ok(unpack_int(cpu.load::<u64>(op)? as i64))
    }
}

// Arithmetic.

/// One of the six: destination and source to result.
trait Binary {
    fn apply(env: &mut Env, dst: Unpacked, src: Unpacked) -> F80;
}

macro_rules! binary {
    ($($name:ident = |$env:ident, $dst:ident, $src:ident| $body:expr;)*) => {$(
        struct $name;
        impl Binary for $name {
            fn apply($env: &mut Env, $dst: Unpacked, $src: Unpacked) -> F80 {
                $body
            }
        }
    )*};
}

binary! {
    Add = |env, dst, src| arith::add(env, dst, src);
    Mul = |env, dst, src| arith::mul(env, dst, src);
    Sub = |env, dst, src| arith::sub(env, dst, src);
    SubR = |env, dst, src| arith::sub(env, src, dst);
    Div = |env, dst, src| arith::div(env, dst, src);
    DivR = |env, dst, src| arith::div(env, src, dst);
}

/// FADD m32 and the like.
fn arith_memory<O: Binary, S: Source>(cpu: &mut Core, op: &Op) -> Exec {
    begin(cpu)?;
    let src = S::load(cpu, op)?;
    let x = &mut cpu.st.x87;
    if let Some(masked) = x.underflow(&[0]) {
        if masked {
            x.set_st(0, F80::INDEFINITE);
        }
    } else {
        let mut env = x.env();
        let result = O::apply(&mut env, x.st(0).unpack(), src);
        if x.settle(&env, PRE) {
            x.set_st(0, result);
        }
    }
    finish(cpu, op, true);
    Ok(())
}

/// FADD ST, ST(i) and FADD ST(i), ST; `P` pops.
fn arith_stack<O: Binary, const P: bool>(cpu: &mut Core, op: &Op) -> Exec {
    let (d, s) = (usize::from(op.d), usize::from(op.s));
    on_stack(cpu, op, |x| {
        let result = match x.underflow(&[d, s]) {
            Some(masked) => masked.then_some(F80::INDEFINITE),
            None => {
                let mut env = x.env();
                let result = O::apply(&mut env, x.st(d).unpack(), x.st(s).unpack());
                x.settle(&env, PRE).then_some(result)
            }
        };
        if let Some(result) = result {
            x.set_st(d, result);
            if P {
                x.pop();
            }
        }
    })
}

/// An instruction that replaces ST(0) by a function of it.
fn unary(cpu: &mut Core, op: &Op, f: impl FnOnce(&mut Env, F80) -> F80) -> Exec {
    on_stack(cpu, op, |x| match x.underflow(&[0]) {
        Some(true) => x.set_st(0, F80::INDEFINITE),
        Some(false) => {}
        None => {
            let mut env = x.env();
            let result = f(&mut env, x.st(0));
            if x.settle(&env, PRE) {
                x.set_st(0, result);
            }
        }
    })
}

fn fsqrt(cpu: &mut Core, op: &Op) -> Exec {
    unary(cpu, op, arith::sqrt)
}

fn frndint(cpu: &mut Core, op: &Op) -> Exec {
    unary(cpu, op, |env, a| arith::round_to_integral(env, a, true))
}

fn f2xm1(cpu: &mut Core, op: &Op) -> Exec {
    unary(cpu, op, trans::f2xm1)
}

fn fchs(cpu: &mut Core, op: &Op) -> Exec {
    unary(cpu, op, |_, a| a.with_sign(a.sign_exp >> 15 == 0))
}

fn fabs(cpu: &mut Core, op: &Op) -> Exec {
    unary(cpu, op, |_, a| a.with_sign(false))
}

/// An instruction that combines ST(0) and ST(1): into ST(0), or (`P`) into ST(1), popping ST(0).
fn two_operands<const P: bool>(cpu: &mut Core, op: &Op, f: impl FnOnce(&mut Env, F80, F80) -> F80) -> Exec {
    on_stack(cpu, op, |x| {
        let result = match x.underflow(&[0, 1]) {
            Some(masked) => masked.then_some(F80::INDEFINITE),
            None => {
                let mut env = x.env();
                let result = f(&mut env, x.st(0), x.st(1));
                x.settle(&env, PRE).then_some(result)
            }
        };
        if let Some(result) = result {
            if P {
                x.pop();
            }
            x.set_st(0, result);
        }
    })
}

fn fscale(cpu: &mut Core, op: &Op) -> Exec {
    two_operands::<false>(cpu, op, fp::x87::scale)
}

fn fyl2x(cpu: &mut Core, op: &Op) -> Exec {
    two_operands::<true>(cpu, op, trans::fyl2x)
}

fn fyl2xp1(cpu: &mut Core, op: &Op) -> Exec {
    two_operands::<true>(cpu, op, trans::fyl2xp1)
}

fn fpatan(cpu: &mut Core, op: &Op) -> Exec {
    two_operands::<true>(cpu, op, trans::fpatan)
}

/// FPREM and (`NEAREST`) FPREM1.
fn fprem<const NEAREST: bool>(cpu: &mut Core, op: &Op) -> Exec {
    on_stack(cpu, op, |x| {
        x.set_codes(C2, 0);
        if let Some(masked) = x.underflow(&[0, 1]) {
            if masked {
                x.set_st(0, F80::INDEFINITE);
            }
            return;
        }
        let mut env = x.env();
        let r = fp::x87::remainder(&mut env, x.st(0), x.st(1), NEAREST);
        if !x.settle(&env, PRE) {
            return;
        }
        x.set_st(0, r.value);
        match r.quotient {
            Quotient::None => {}
            Quotient::Partial => x.set_codes(C0 | C1 | C2 | C3, C2),
            Quotient::Low(low) => {
                let bit = |n: u8, code: u16| if low >> n & 1 == 1 { code } else { 0 };
                x.set_codes(C0 | C1 | C3, bit(2, C0) | bit(1, C3) | bit(0, C1));
            }
        }
    })
}

/// FSIN and FCOS: C2 is set and nothing else done when the operand is out of range.
fn trigonometric(cpu: &mut Core, op: &Op, f: fn(&mut Env, F80) -> Option<F80>) -> Exec {
    on_stack(cpu, op, |x| {
        x.set_codes(C2, 0);
        if let Some(masked) = x.underflow(&[0]) {
            if masked {
                x.set_st(0, F80::INDEFINITE);
            }
            return;
        }
        let mut env = x.env();
        match f(&mut env, x.st(0)) {
            None => x.set_codes(C1 | C2, C2),
            Some(result) => {
                if x.settle(&env, PRE) {
                    x.set_st(0, result);
                }
            }
        }
    })
}

fn fsin(cpu: &mut Core, op: &Op) -> Exec {
    trigonometric(cpu, op, trans::fsin)
}

fn fcos(cpu: &mut Core, op: &Op) -> Exec {
    trigonometric(cpu, op, trans::fcos)
}

/// FSINCOS, FPTAN, FXTRACT: one operand becomes two results, the second of which is pushed.
fn one_to_two(cpu: &mut Core, op: &Op, ranged: bool, f: fn(&mut Env, F80) -> Option<(F80, F80)>) -> Exec {
    on_stack(cpu, op, |x| {
        if ranged {
            x.set_codes(C2, 0);
        }
        if x.is_empty(0) || !x.is_empty(7) {
            if x.stack_fault(!x.is_empty(0)) {
                x.set_st(0, F80::INDEFINITE);
                x.push(F80::INDEFINITE);
            }
            return;
        }
        let mut env = x.env();
        match f(&mut env, x.st(0)) {
            None => x.set_codes(C1 | C2, C2),
            Some((replaced, pushed)) => {
                if x.settle(&env, PRE) {
                    x.set_st(0, replaced);
                    x.push(pushed);
                }
            }
        }
    })
}

fn fsincos(cpu: &mut Core, op: &Op) -> Exec {
    one_to_two(cpu, op, true, trans::fsincos)
}

fn fptan(cpu: &mut Core, op: &Op) -> Exec {
    one_to_two(cpu, op, true, trans::fptan)
}

fn fxtract(cpu: &mut Core, op: &Op) -> Exec {
    one_to_two(cpu, op, false, |env, a| Some(fp::x87::extract(env, a)))
}

// Loads.

/// FLD m32 and m64. A denormal operand is loaded even when that exception is unmasked.
fn fld_memory<S: Source, F: Float>(cpu: &mut Core, op: &Op) -> Exec {
    begin(cpu)?;
    let u = S::load(cpu, op)?;
    cpu.st.x87.push_checked(|x| {
        let mut env = x.env();
        let value = convert::unpacked_to_float::<F, F80>(&mut env, &u);
        x.settle(&env, IE).then_some(value)
    });
    finish(cpu, op, true);
    Ok(())
}

/// FILD m16, m32 and m64.
fn fild<S: Source>(cpu: &mut Core, op: &Op) -> Exec {
    begin(cpu)?;
    let u = S::load(cpu, op)?;
    push_exact(cpu, F80::from_parts(u.sign, if u.is_zero() { 0 } else { u.exp + F80::EMAX }, u.sig));
    finish(cpu, op, true);
    Ok(())
}

/// FLD m80 and FBLD.
fn fld_ten_bytes<const DECIMAL: bool>(cpu: &mut Core, op: &Op) -> Exec {
    begin(cpu)?;
    let mut bytes = [0; 10];
    let address = cpu.linear(op, bytes.len() as u64, false)?;
    cpu.read_bytes(cpu.set, address, &mut bytes)?;
    push_exact(cpu, if DECIMAL { bcd::load(bytes) } else { F80::from_bytes(bytes) });
    finish(cpu, op, true);
    Ok(())
}

/// Push what needs no conversion.
fn push_exact(cpu: &mut Core, value: F80) {
    cpu.st.x87.push_checked(|x| {
        x.set_codes(C1, 0);
        Some(value)
    });
}

/// FLD ST(i).
fn fld_register(cpu: &mut Core, op: &Op) -> Exec {
    let i = usize::from(op.d);
    on_stack(cpu, op, |x| {
        // An empty source comes before a full stack.
        match x.underflow(&[i]) {
            Some(true) => x.push(F80::INDEFINITE),
            Some(false) => {}
            None => x.push_checked(|x| {
                x.set_codes(C1, 0);
                Some(x.st(i))
            }),
        }
    })
}

/// FLD1 and its kin: a constant of 64 bits of significand and more, rounded as the rounding control says. The table
/// holds the exponent, the truncated significand and whether nearest rounds it up.
fn constant<const N: usize>(cpu: &mut Core, op: &Op) -> Exec {
    const TABLE: [(u16, u64, bool, bool); 7] = [
        // 1, log2(10), log2(e), pi, log10(2), ln(2), 0: exponent, significand, inexact, next bit.
        (0x3fff, 1 << 63, false, false),
        (0x4000, 0xd49a_784b_cd1b_8afe, true, false),
        (0x3fff, 0xb8aa_3b29_5c17_f0bb, true, true),
        (0x4000, 0xc90f_daa2_2168_c234, true, true),
        (0x3ffd, 0x9a20_9a84_fbcf_f798, true, true),
        (0x3ffe, 0xb172_17f7_d1cf_79ab, true, true),
        (0, 0, false, false),
    ];
    begin(cpu)?;
    let (sign_exp, sig, inexact, half) = TABLE[N];
    let up = inexact
        && match cpu.st.x87.env().rounding() {
            Round::Nearest => half,
            Round::Up => true,
            Round::Down | Round::Zero => false,
        };
    push_exact(cpu, F80 { sign_exp, sig: sig + u64::from(up) });
    finish(cpu, op, false);
    Ok(())
}

// Stores.

/// What a store puts into memory: up to ten bytes, little endian.
struct Stored {
    bytes: [u8; 10],
    len: usize,
}

impl Stored {
    fn new(bytes: &[u8]) -> Self {
        let mut stored = Stored { bytes: [0; 10], len: bytes.len() };
        stored.bytes[..bytes.len()].copy_from_slice(bytes);
        stored
    }
}

/// A format that stores write.
trait Target {
    /// The exceptions that, unmasked, prevent the store.
    const BLOCKERS: u32;
    const BYTES: usize;
    fn convert(env: &mut Env, a: F80) -> Stored;
    fn indefinite() -> Stored;
}

macro_rules! float_target {
    ($($name:ident, $float:ident, $bytes:literal;)*) => {$(
        impl Target for $name {
            const BLOCKERS: u32 = IE | OE | UE;
            const BYTES: usize = $bytes;
            fn convert(env: &mut Env, a: F80) -> Stored {
                Stored::new(&convert::float_to_float::<F80, $float>(env, a).0.to_le_bytes())
            }
            fn indefinite() -> Stored {
                Stored::new(&$float::INDEFINITE.0.to_le_bytes())
            }
        }
    )*};
}

float_target! {
    Single, F32, 4;
    Double, F64, 8;
}

macro_rules! int_target {
    ($($name:ident, $int:ty, $truncate:literal;)*) => {$(
        impl Target for $name {
            const BLOCKERS: u32 = IE;
            const BYTES: usize = size_of::<$int>();
            fn convert(env: &mut Env, a: F80) -> Stored {
                if $truncate {
                    *env = env.with_rounding(Round::Zero);
                }
                Stored::new(&(convert::float_to_int(env, a, <$int>::BITS) as $int).to_le_bytes())
            }
            fn indefinite() -> Stored {
                Stored::new(&<$int>::MIN.to_le_bytes())
            }
        }
    )*};
}

struct Trunc16;
struct Trunc32;
struct Trunc64;

int_target! {
    Int16, i16, false;
    Int32, i32, false;
    Int64, i64, false;
    Trunc16, i16, true;
    Trunc32, i32, true;
    Trunc64, i64, true;
}

struct Extended;
struct Decimal;

impl Target for Extended {
    const BLOCKERS: u32 = 0;
    const BYTES: usize = 10;
    fn convert(_: &mut Env, a: F80) -> Stored {
        Stored::new(&a.to_bytes())
    }
    fn indefinite() -> Stored {
        Stored::new(&F80::INDEFINITE.to_bytes())
    }
}

impl Target for Decimal {
    const BLOCKERS: u32 = IE;
    const BYTES: usize = 10;
    fn convert(env: &mut Env, a: F80) -> Stored {
        Stored::new(&bcd::store(env, a))
    }
    fn indefinite() -> Stored {
        Stored::new(&bcd::INDEFINITE)
    }
}

/// FST, FIST, FISTTP, FBSTP to memory; `P` pops.
fn store<T: Target, const P: bool>(cpu: &mut Core, op: &Op) -> Exec {
    begin(cpu)?;
    let address = cpu.linear(op, T::BYTES as u64, true)?;
    let mut env = cpu.st.x87.env();
    let empty = cpu.st.x87.is_empty(0);
    let (stored, goes_on) = if empty {
        (T::indefinite(), u32::from(cpu.st.x87.fcw) & IE != 0)
    } else {
        let stored = T::convert(&mut env, cpu.st.x87.st(0));
        (stored, env.unmasked() & T::BLOCKERS == 0)
    };
    if goes_on {
        cpu.write_bytes(cpu.set, address, &stored.bytes[..stored.len])?;
    } else {
        // Nothing is stored, but where nothing could be stored that is the fault.
        cpu.probe_write(address, T::BYTES as u64)?;
    }
    let x = &mut cpu.st.x87;
    if empty {
        x.stack_fault(false);
    } else {
        x.settle(&env, 0);
    }
    if goes_on && P {
        x.pop();
    }
    finish(cpu, op, true);
    Ok(())
}

/// FST ST(i), FSTP ST(i).
fn store_register<const P: bool>(cpu: &mut Core, op: &Op) -> Exec {
    let i = usize::from(op.d);
    on_stack(cpu, op, |x| {
        let value = match x.underflow(&[0]) {
            Some(masked) => masked.then_some(F80::INDEFINITE),
            None => {
                x.set_codes(C1, 0);
                Some(x.st(0))
            }
        };
        if let Some(value) = value {
            x.set_st(i, value);
            if P {
                x.pop();
            }
        }
    })
}

// Comparison.

/// C3, C2 and C0 of an ordering.
fn codes(order: Option<Ordering>) -> u16 {
    match order {
        None => C3 | C2 | C0,
        Some(Ordering::Less) => C0,
        Some(Ordering::Equal) => C3,
        Some(Ordering::Greater) => 0,
    }
}

/// Compare ST(0) with an operand, which has been found to exist or not: the order, and whether to pop. The order is
/// reported even when an unmasked exception keeps the stack as it is.
fn compare_with(
    x: &mut X87,
    fault: Option<bool>,
    src: impl FnOnce(&X87) -> Unpacked,
    signaling: bool,
) -> (Option<Ordering>, bool) {
    match fault {
        Some(masked) => (None, masked),
        None => {
            let mut env = x.env();
            let order = compare(&mut env, &x.st(0).unpack(), &src(x), signaling);
            x.fsw |= env.raised as u16;
            x.summarize();
            (order, env.unmasked() & PRE == 0)
        }
    }
}

/// [`compare_with`] that answers in C3, C2 and C0, then pops.
fn compare_codes(x: &mut X87, fault: Option<bool>, src: impl FnOnce(&X87) -> Unpacked, signaling: bool, pops: u32) {
    let (order, done) = compare_with(x, fault, src, signaling);
    x.set_codes(C1 | C0 | C2 | C3, codes(order));
    for _ in 0..if done { pops } else { 0 } {
        x.pop();
    }
}

/// FCOM ST(i), FUCOM ST(i) and those that pop.
fn fcom<const SIGNALING: bool, const POPS: u32>(cpu: &mut Core, op: &Op) -> Exec {
    let i = usize::from(op.s);
    on_stack(cpu, op, |x| {
        let fault = x.underflow(&[0, i]);
        compare_codes(x, fault, |x| x.st(i).unpack(), SIGNALING, POPS);
    })
}

/// FCOMPP, FUCOMPP.
fn fcompp<const SIGNALING: bool>(cpu: &mut Core, op: &Op) -> Exec {
    on_stack(cpu, op, |x| {
        let fault = x.underflow(&[0, 1]);
        compare_codes(x, fault, |x| x.st(1).unpack(), SIGNALING, 2);
    })
}

/// FCOM m32, FICOM m16 and the like.
fn fcom_memory<S: Source, const POPS: u32>(cpu: &mut Core, op: &Op) -> Exec {
    begin(cpu)?;
    let src = S::load(cpu, op)?;
    let x = &mut cpu.st.x87;
    let fault = x.underflow(&[0]);
    compare_codes(x, fault, |_| src, true, POPS);
    finish(cpu, op, true);
    Ok(())
}

fn ftst(cpu: &mut Core, op: &Op) -> Exec {
    on_stack(cpu, op, |x| {
        let fault = x.underflow(&[0]);
        compare_codes(x, fault, |_| F80::ZERO.unpack(), true, 0);
    })
}

/// FCOMI, FUCOMI and those that pop: the order goes to ZF, PF and CF.
fn fcomi<const SIGNALING: bool, const P: bool>(cpu: &mut Core, op: &Op) -> Exec {
    let i = usize::from(op.s);
    let mut flags = 0;
    on_stack(cpu, op, |x| {
        let fault = x.underflow(&[0, i]);
        let (order, done) = compare_with(x, fault, |x| x.st(i).unpack(), SIGNALING);
        flags = order_flags(order);
        if P && done {
            x.pop();
        }
    })?;
    cpu.fl = Flags::from_bits(flags);
    Ok(())
}

fn fxam(cpu: &mut Core, op: &Op) -> Exec {
    on_stack(cpu, op, |x| {
        let a = x.st(0);
        let class = if x.is_empty(0) { 0b101 } else { fp::x87::examine(a) };
        let code = |bit: u8, code: u16| if class >> bit & 1 == 1 { code } else { 0 };
        let sign = if a.sign_exp >> 15 == 1 { C1 } else { 0 };
        x.set_codes(C0 | C1 | C2 | C3, code(2, C3) | code(1, C2) | code(0, C0) | sign);
    })
}

// Moves within the stack.

/// FXCH: masked, an empty register counts as the default NaN.
fn fxch(cpu: &mut Core, op: &Op) -> Exec {
    let i = usize::from(op.s);
    on_stack(cpu, op, |x| {
        match x.underflow(&[0, i]) {
            Some(false) => return,
            Some(true) => {
                for i in [0, i] {
                    if x.is_empty(i) {
                        x.set_st(i, F80::INDEFINITE);
                    }
                }
            }
            None => x.set_codes(C1, 0),
        }
        let (a, b) = (x.st(0), x.st(i));
        x.set_st(0, b);
        x.set_st(i, a);
    })
}

/// FCMOVcc; `CC` is the condition as in Jcc.
fn fcmov<const CC: u8>(cpu: &mut Core, op: &Op) -> Exec {
    let i = usize::from(op.s);
    let moves = cpu.fl.condition(CC);
    on_stack(cpu, op, |x| match x.underflow(&[0, i]) {
        Some(true) => x.set_st(0, F80::INDEFINITE),
        Some(false) => {}
        None => {
            if moves {
                let value = x.st(i);
                x.set_st(0, value);
            }
        }
    })
}

/// FFREE, FFREEP.
fn ffree<const P: bool>(cpu: &mut Core, op: &Op) -> Exec {
    let i = usize::from(op.d);
    on_stack(cpu, op, |x| {
        x.free(i);
        x.set_codes(C1, 0);
        if P {
            x.pop();
        }
    })
}

/// FINCSTP (1), FDECSTP (7).
fn rotate<const BY: u16>(cpu: &mut Core, op: &Op) -> Exec {
    on_stack(cpu, op, |x| {
        x.rotate(BY);
        x.set_codes(C1, 0);
    })
}

/// FNOP.
fn fnop(cpu: &mut Core, op: &Op) -> Exec {
    on_stack(cpu, op, |_| {})
}

/// FSTPNCE ST(i), an alias of FSTP that copies nothing from an empty register and calls that no fault.
fn fstpnce(cpu: &mut Core, op: &Op) -> Exec {
    let i = usize::from(op.d);
    on_stack(cpu, op, |x| {
        x.set_codes(C1, 0);
        if !x.is_empty(0) {
            let value = x.st(0);
            x.set_st(i, value);
        }
        x.pop();
    })
}

/// The handler of an instruction of this family.
pub(crate) fn lower(insn: &Instruction) -> Option<Handler> {
    use Code::*;
    Some(match insn.code() {
        Fadd_m32fp => arith_memory::<Add, Single>,
        Fadd_m64fp => arith_memory::<Add, Double>,
        Fiadd_m16int => arith_memory::<Add, Int16>,
        Fiadd_m32int => arith_memory::<Add, Int32>,
        Fadd_st0_sti | Fadd_sti_st0 => arith_stack::<Add, false>,
        Faddp_sti_st0 => arith_stack::<Add, true>,
        Fmul_m32fp => arith_memory::<Mul, Single>,
        Fmul_m64fp => arith_memory::<Mul, Double>,
        Fimul_m16int => arith_memory::<Mul, Int16>,
        Fimul_m32int => arith_memory::<Mul, Int32>,
        Fmul_st0_sti | Fmul_sti_st0 => arith_stack::<Mul, false>,
        Fmulp_sti_st0 => arith_stack::<Mul, true>,
        Fsub_m32fp => arith_memory::<Sub, Single>,
        Fsub_m64fp => arith_memory::<Sub, Double>,
        Fisub_m16int => arith_memory::<Sub, Int16>,
        Fisub_m32int => arith_memory::<Sub, Int32>,
        Fsub_st0_sti | Fsub_sti_st0 => arith_stack::<Sub, false>,
        Fsubp_sti_st0 => arith_stack::<Sub, true>,
        Fsubr_m32fp => arith_memory::<SubR, Single>,
        Fsubr_m64fp => arith_memory::<SubR, Double>,
        Fisubr_m16int => arith_memory::<SubR, Int16>,
        Fisubr_m32int => arith_memory::<SubR, Int32>,
        Fsubr_st0_sti | Fsubr_sti_st0 => arith_stack::<SubR, false>,
        Fsubrp_sti_st0 => arith_stack::<SubR, true>,
        Fdiv_m32fp => arith_memory::<Div, Single>,
        Fdiv_m64fp => arith_memory::<Div, Double>,
        Fidiv_m16int => arith_memory::<Div, Int16>,
        Fidiv_m32int => arith_memory::<Div, Int32>,
        Fdiv_st0_sti | Fdiv_sti_st0 => arith_stack::<Div, false>,
        Fdivp_sti_st0 => arith_stack::<Div, true>,
        Fdivr_m32fp => arith_memory::<DivR, Single>,
        Fdivr_m64fp => arith_memory::<DivR, Double>,
        Fidivr_m16int => arith_memory::<DivR, Int16>,
        Fidivr_m32int => arith_memory::<DivR, Int32>,
        Fdivr_st0_sti | Fdivr_sti_st0 => arith_stack::<DivR, false>,
        Fdivrp_sti_st0 => arith_stack::<DivR, true>,

        Fcom_m32fp => fcom_memory::<Single, 0>,
        Fcom_m64fp => fcom_memory::<Double, 0>,
        Ficom_m16int => fcom_memory::<Int16, 0>,
        Ficom_m32int => fcom_memory::<Int32, 0>,
        Fcomp_m32fp => fcom_memory::<Single, 1>,
        Fcomp_m64fp => fcom_memory::<Double, 1>,
        Ficomp_m16int => fcom_memory::<Int16, 1>,
        Ficomp_m32int => fcom_memory::<Int32, 1>,
        Fcom_st0_sti | Fcom_st0_sti_DCD0 => fcom::<true, 0>,
        Fcomp_st0_sti | Fcomp_st0_sti_DCD8 | Fcomp_st0_sti_DED0 => fcom::<true, 1>,
        Fucom_st0_sti => fcom::<false, 0>,
        Fucomp_st0_sti => fcom::<false, 1>,
        Fcompp => fcompp::<true>,
        Fucompp => fcompp::<false>,
        Fcomi_st0_sti => fcomi::<true, false>,
        Fcomip_st0_sti => fcomi::<true, true>,
        Fucomi_st0_sti => fcomi::<false, false>,
        Fucomip_st0_sti => fcomi::<false, true>,
        Ftst => ftst,
        Fxam => fxam,

        Fld_m32fp => fld_memory::<Single, F32>,
        Fld_m64fp => fld_memory::<Double, F64>,
        Fld_m80fp => fld_ten_bytes::<false>,
        Fbld_m80bcd => fld_ten_bytes::<true>,
        Fild_m16int => fild::<Int16>,
        Fild_m32int => fild::<Int32>,
        Fild_m64int => fild::<Int64>,
        Fld_sti => fld_register,
        Fld1 => constant::<0>,
        Fldl2t => constant::<1>,
        Fldl2e => constant::<2>,
        Fldpi => constant::<3>,
        Fldlg2 => constant::<4>,
        Fldln2 => constant::<5>,
        Fldz => constant::<6>,

        Fst_m32fp => store::<Single, false>,
        Fst_m64fp => store::<Double, false>,
        Fstp_m32fp => store::<Single, true>,
        Fstp_m64fp => store::<Double, true>,
        Fstp_m80fp => store::<Extended, true>,
        Fbstp_m80bcd => store::<Decimal, true>,
        Fist_m16int => store::<Int16, false>,
        Fist_m32int => store::<Int32, false>,
        Fistp_m16int => store::<Int16, true>,
        Fistp_m32int => store::<Int32, true>,
        Fistp_m64int => store::<Int64, true>,
        Fisttp_m16int => store::<Trunc16, true>,
        Fisttp_m32int => store::<Trunc32, true>,
        Fisttp_m64int => store::<Trunc64, true>,
        Fst_sti => store_register::<false>,
        Fstp_sti | Fstp_sti_DFD0 | Fstp_sti_DFD8 => store_register::<true>,
        Fstpnce_sti => fstpnce,

        Fxch_st0_sti | Fxch_st0_sti_DDC8 | Fxch_st0_sti_DFC8 => fxch,
        Fcmovb_st0_sti => fcmov::<2>,
        Fcmovnb_st0_sti => fcmov::<3>,
        Fcmove_st0_sti => fcmov::<4>,
        Fcmovne_st0_sti => fcmov::<5>,
        Fcmovbe_st0_sti => fcmov::<6>,
        Fcmovnbe_st0_sti => fcmov::<7>,
        Fcmovu_st0_sti => fcmov::<10>,
        Fcmovnu_st0_sti => fcmov::<11>,
        Ffree_sti => ffree::<false>,
        Ffreep_sti => ffree::<true>,
        Fincstp => rotate::<1>,
        Fdecstp => rotate::<7>,
        Fnop => fnop,

        Fsqrt => fsqrt,
        Frndint => frndint,
        Fchs => fchs,
        Fabs => fabs,
        F2xm1 => f2xm1,
        Fscale => fscale,
        Fyl2x => fyl2x,
        Fyl2xp1 => fyl2xp1,
        Fpatan => fpatan,
        Fprem => fprem::<false>,
        Fprem1 => fprem::<true>,
        Fsin => fsin,
        Fcos => fcos,
        Fsincos => fsincos,
        Fptan => fptan,
        Fxtract => fxtract,
        _ => return None,
    })
}
