//! Floating point of the guest: IEEE 754 single and double, the 80-bit extended format of the x87, and everything
//! x86 adds to them (flags, masks, NaN choice, flushing, integer indefinite, BCD, transcendental functions).
//!
//! All of it is integer arithmetic on one unpacked form, so a result never depends on the host: [`arith`],
//! [`convert`], [`compare`], [`x87`] and [`trans`] are pure functions of their operands and an [`Env`]. [`host`]
//! is the one exception: it answers common SSE cases with the host's own operation, and only those in which every
//! IEEE host must give the same bits and the flags are known.
//!
//! What this module must never do: touch CPU state, panic on any bit pattern, or read the host's floating-point
//! environment.
//!
//! # How a caller uses it
//!
//! Make an [`Env`] from MXCSR or from the x87 control word, run one operation (all elements of it, for a packed
//! one), and look at [`Env::raised`]. For SSE: when [`Env::unmasked`] is not zero, merge the flags into MXCSR, write
//! no destination and raise #XM. For x87: merge the flags into the status word; when a pre-computation exception
//! ([`PRE`]) is unmasked, write nothing, otherwise write the result (which is already bias adjusted when an overflow
//! or underflow is unmasked).
//!
//! The rules are those of the Intel SDM, volume 1, sections 4.8 and 4.9 (formats, NaNs, exceptions), 8.3 to 8.5
//! (x87), 11.5 (SSE) and appendix E; where the manual leaves room, results follow what processors do, and the tests
//! compare with the host processor where that is an x86.

pub(crate) mod arith;
pub(crate) mod bcd;
pub(crate) mod compare;
pub(crate) mod convert;
pub(crate) mod format;
pub(crate) mod host;
pub(crate) mod trans;
mod wide;
pub(crate) mod x87;

#[cfg(all(test, target_arch = "x86_64"))]
mod host_tests;
#[cfg(test)]
mod tests;

pub(crate) use format::{F32, F64, F80, Float};

/// Invalid operation (bit of MXCSR and of the x87 status word).
pub(crate) const IE: u32 = 1 << 0;
/// Denormal operand.
pub(crate) const DE: u32 = 1 << 1;
/// Division by zero.
pub(crate) const ZE: u32 = 1 << 2;
/// Overflow.
pub(crate) const OE: u32 = 1 << 3;
/// Underflow.
pub(crate) const UE: u32 = 1 << 4;
/// Inexact result ("precision").
pub(crate) const PE: u32 = 1 << 5;
/// The exceptions found before anything is computed: unmasked, they leave the destination alone on x87 too.
pub(crate) const PRE: u32 = IE | DE | ZE;
/// All six.
pub(crate) const ALL: u32 = 0x3f;

/// MXCSR bit: denormal operands count as zero.
pub(crate) const DAZ: u32 = 1 << 6;
/// MXCSR bit: tiny results become zero (when underflow is masked).
pub(crate) const FTZ: u32 = 1 << 15;
/// How far the mask bits are above the flags in MXCSR.
pub(crate) const MASK_SHIFT: u32 = 7;
/// Where the two rounding control bits are in MXCSR.
pub(crate) const RC_SHIFT: u32 = 13;

/// Rounding mode, numbered as in MXCSR.RC and FCW.RC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Round {
    /// To nearest, ties to even.
    Nearest,
    /// Toward minus infinity.
    Down,
    /// Toward plus infinity.
    Up,
    /// Toward zero.
    Zero,
}

impl Round {
    /// The mode of a two-bit rounding control field (higher bits are ignored).
    #[inline]
    pub(crate) fn from_bits(bits: u32) -> Self {
        match bits & 3 {
            0 => Round::Nearest,
            1 => Round::Down,
            2 => Round::Up,
            _ => Round::Zero,
        }
    }
}

/// Control in, flags out, for one instruction.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Env {
    /// Rounding control, masks, DAZ, FTZ and sticky flags, in the layout of MXCSR for both units.
    control: u32,
    /// Bits of significand that x87 arithmetic rounds to: 24, 53 or 64.
    precision: u32,
    /// x87 rules for NaNs and unmasked responses instead of those of SSE.
    x87: bool,
    /// What this instruction raised so far ([`IE`] to [`PE`]).
    pub(crate) raised: u32,
    /// The magnitude of the last result was rounded up (C1 of the x87 status word).
    pub(crate) rounded_up: bool,
}

impl Env {
    /// The environment that MXCSR describes.
    #[inline(always)]
    pub(crate) fn sse(mxcsr: u32) -> Self {
        Env { control: mxcsr, precision: 64, x87: false, raised: 0, rounded_up: false }
    }

    /// The environment that an x87 control word describes.
    #[inline]
    pub(crate) fn x87(fcw: u16) -> Self {
        let fcw = u32::from(fcw);
        let precision = match fcw >> 8 & 3 {
            0 => 24,
            2 => 53,
            // 1 is reserved; processors treat it like 3.
            _ => 64,
        };
        let control = (fcw & ALL) << MASK_SHIFT | (fcw >> 10 & 3) << RC_SHIFT;
        Env { control, precision, x87: true, raised: 0, rounded_up: false }
    }

    /// The same environment with another rounding mode (ROUNDSD, CVTTSD2SI, FISTTP).
    #[inline]
    pub(crate) fn with_rounding(mut self, mode: Round) -> Self {
        self.control = self.control & !(3 << RC_SHIFT) | (mode as u32) << RC_SHIFT;
        self
    }

    /// The rounding mode in force.
    #[inline]
    pub(crate) fn rounding(&self) -> Round {
        Round::from_bits(self.control >> RC_SHIFT)
    }

    /// The exceptions that were raised and are not masked.
    #[inline(always)]
    pub(crate) fn unmasked(&self) -> u32 {
        self.raised & !(self.control >> MASK_SHIFT)
    }

    /// Whether `flag` has its masked response.
    #[inline]
    fn masks(&self, flag: u32) -> bool {
        self.control & flag << MASK_SHIFT != 0
    }

    /// Raise `flag`; true when it is unmasked, so that the operation must end here.
    #[inline]
    fn raise(&mut self, flag: u32) -> bool {
        self.raised |= flag;
        !self.masks(flag)
    }

    /// Note the denormal operands of one operation; true when the operation must end here.
    #[inline]
    fn denormal(&mut self, any: bool) -> bool {
        any && self.raise(DE)
    }
}
