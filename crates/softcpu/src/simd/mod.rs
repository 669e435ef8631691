//! Integer SIMD as pure functions: what MMX and SSE to SSE4.2, AES, PCLMULQDQ, SHA and CRC32 compute.
//!
//! Every function takes and answers register values: `u64` is an MMX register, `u128` an XMM register, lane 0 in the
//! least significant bits. A function generic over [`Vector`] serves both. Nothing here knows of the CPU state, of memory
//! or of faults, and nothing here can panic: immediates and counts of any value have the meaning that the manual gives them.
//! Never use host SIMD here: the result must be the same on every host.
//!
//! Source of all semantics: Intel SDM volume 2, the page of the instruction that the function is named after.
//! The tests run the same instruction on the host CPU, where it is an x86-64.

mod arith;
mod crypto;
#[cfg(all(test, target_arch = "x86_64"))]
mod host_tests;
mod shuffle;
mod strings;

pub(crate) use arith::*;
pub(crate) use crypto::*;
pub(crate) use shuffle::*;
pub(crate) use strings::*;

use std::ops::{BitAnd, BitOr, BitXor, Not};

/// A register value seen as an array of lanes of type `L`.
pub(crate) trait Lanes<L>: Copy {
    /// The lanes, lane 0 first.
    type Array: AsRef<[L]>;
    /// Number of lanes.
    const COUNT: usize;
    /// Takes the value apart.
    fn split(self) -> Self::Array;
    /// Builds a value: lane `i` is `f(i)`.
    fn build(f: impl FnMut(usize) -> L) -> Self;
}

/// An MMX (`u64`) or XMM (`u128`) register value.
pub(crate) trait Vector:
    Lanes<u8>
    + Lanes<i8>
    + Lanes<u16>
    + Lanes<i16>
    + Lanes<u32>
    + Lanes<i32>
    + Lanes<u64>
    + Lanes<i64>
    + BitAnd<Output = Self>
    + BitOr<Output = Self>
    + BitXor<Output = Self>
    + Not<Output = Self>
{
}

impl Vector for u64 {}
impl Vector for u128 {}

macro_rules! impl_lanes {
    ($($vector:ty: $($lane:ty),+;)+) => {$($(
        impl Lanes<$lane> for $vector {
            type Array = [$lane; size_of::<$vector>() / size_of::<$lane>()];
            const COUNT: usize = size_of::<$vector>() / size_of::<$lane>();

            #[inline]
            fn split(self) -> Self::Array {
                const SIZE: usize = size_of::<$lane>();
                let bytes = self.to_le_bytes();
                std::array::from_fn(|lane| {
                    <$lane>::from_le_bytes(std::array::from_fn(|byte| bytes[lane * SIZE + byte]))
                })
            }

            #[inline]
            fn build(mut f: impl FnMut(usize) -> $lane) -> Self {
                const SIZE: usize = size_of::<$lane>();
                let mut bytes = [0; size_of::<$vector>()];
                for (lane, chunk) in bytes.chunks_exact_mut(SIZE).enumerate() {
                    chunk.copy_from_slice(&f(lane).to_le_bytes());
                }
                Self::from_le_bytes(bytes)
            }
        }
    )+)+};
}

impl_lanes! {
    u64: u8, i8, u16, i16, u32, i32, u64, i64;
    u128: u8, i8, u16, i16, u32, i32, u64, i64;
}

/// The lanes of `v`; a free function so that the lane type can be named first.
#[inline]
fn split<L, V: Lanes<L>>(v: V) -> V::Array {
    v.split()
}

/// Applies `f` to each lane.
#[inline]
fn map<L: Copy, V: Lanes<L>>(a: V, f: impl Fn(L) -> L) -> V {
    let a = a.split();
    V::build(|i| f(a.as_ref()[i]))
}

/// Applies `f` to each pair of lanes of the same number.
#[inline]
fn zip<L: Copy, V: Lanes<L>>(a: V, b: V, f: impl Fn(L, L) -> L) -> V {
    let (a, b) = (a.split(), b.split());
    V::build(|i| f(a.as_ref()[i], b.as_ref()[i]))
}
