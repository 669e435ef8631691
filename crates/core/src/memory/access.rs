//! Copies between guest memory and the host's own: the only code that touches guest bytes.
//!
//! It must never make a reference to guest bytes other than to an atomic, and never access a word in two pieces that
//! the caller may expect in one.
//!
//! Two host threads that copy over the same bytes with [`ptr::copy_nonoverlapping`] race. The pointers come from
//! the operating system, nothing else in the program refers to that memory, and the lengths are unknown to the
//! compiler, so the outcome is what the CPU does: torn bytes, which is what the module documentation says. Everything
//! that is not bulk goes through atomics, which may race.

use crate::error::{AccelError, VcpuResult};
use std::ptr;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering, fence};

/// Up to this length a copy is made of naturally aligned words; beyond it the call of the system's copy routine pays.
const WORDWISE_MAX: usize = 64;

/// A word of guest memory: `u8`, `u16`, `u32` or `u64`. Values are little endian in guest memory on every host.
///
/// Sealed: the size of each implementor is one that all supported hosts access in one piece.
pub trait GuestWord: sealed::AtomicWord {}

pub(crate) mod sealed {
    use super::Ordering;

    /// The atomic operations of a word. Values cross in host byte order, memory is little endian.
    pub trait AtomicWord: Copy + Send + Sync + 'static {
        /// Loads the word.
        ///
        /// # Safety
        /// `ptr` is valid for reads, and for writes too unless `order` is `Relaxed`; it is aligned to the word's size,
        /// and `order` is one that a load may have.
        unsafe fn load(ptr: *const u8, order: Ordering) -> Self;

        /// Stores the word.
        ///
        /// # Safety
        /// `ptr` is valid for reads and writes and aligned, and `order` is one that a store may have.
        unsafe fn store(self, ptr: *mut u8, order: Ordering);

        /// Stores `new` if the word is `current`; returns what was there, as `Ok` if it stored.
        ///
        /// # Safety
        /// `ptr` is valid for reads and writes and aligned, and `failure` is an order that a load may have.
        unsafe fn compare_exchange(
            ptr: *mut u8,
            current: Self,
            new: Self,
            success: Ordering,
            failure: Ordering,
        ) -> Result<Self, Self>;
    }
}

macro_rules! impl_guest_word {
    ($($word:ty => $atomic:ty),* $(,)?) => {$(
        impl sealed::AtomicWord for $word {
            #[inline]
            unsafe fn load(ptr: *const u8, order: Ordering) -> Self {
                // SAFETY: the caller vouches for `ptr`. Relaxed loads of up to 8 bytes are documented to work on
                // read-only memory on all 64-bit hosts ("Atomic accesses to read-only memory" in `std::sync::atomic`).
                let word = unsafe { &*ptr.cast::<$atomic>() };
                <$word>::from_le(word.load(order))
            }

            #[inline]
            unsafe fn store(self, ptr: *mut u8, order: Ordering) {
                // SAFETY: the caller vouches for `ptr`.
                let word = unsafe { <$atomic>::from_ptr(ptr.cast()) };
                word.store(self.to_le(), order);
            }

            unsafe fn compare_exchange(
                ptr: *mut u8,
                current: Self,
                new: Self,
                success: Ordering,
                failure: Ordering,
            ) -> Result<Self, Self> {
                // SAFETY: the caller vouches for `ptr`.
                let word = unsafe { <$atomic>::from_ptr(ptr.cast()) };
                word.compare_exchange(current.to_le(), new.to_le(), success, failure)
                    .map(<$word>::from_le)
                    .map_err(<$word>::from_le)
            }
        }

        impl GuestWord for $word {}
    )*};
}

impl_guest_word!(u8 => AtomicU8, u16 => AtomicU16, u32 => AtomicU32, u64 => AtomicU64);

/// Refuses an order that a load cannot have (`std` would panic on it).
#[inline]
pub(super) fn check_load_order(order: Ordering) -> VcpuResult<()> {
    match order {
        Ordering::Relaxed | Ordering::Acquire | Ordering::SeqCst => Ok(()),
        _ => Err(AccelError::invalid("memory order", format!("a load cannot be {order:?}"))),
    }
}

/// Refuses an order that a store cannot have (`std` would panic on it).
#[inline]
pub(super) fn check_store_order(order: Ordering) -> VcpuResult<()> {
    match order {
        Ordering::Relaxed | Ordering::Release | Ordering::SeqCst => Ok(()),
        _ => Err(AccelError::invalid("memory order", format!("a store cannot be {order:?}"))),
    }
}

/// Loads a word from memory that may be mapped read-only, with at least the strength of `order`.
///
/// # Safety
/// `ptr` is valid for reads and aligned to the word's size.
pub(super) unsafe fn load_read_only<T: GuestWord>(ptr: *const u8, order: Ordering) -> T {
    if order == Ordering::SeqCst {
        fence(Ordering::SeqCst);
    }
    // SAFETY: the caller vouches for `ptr`; Relaxed needs no write access.
    let value = unsafe { T::load(ptr, Ordering::Relaxed) };
    if order != Ordering::Relaxed {
        fence(Ordering::Acquire);
    }
    value
}

/// log2 of the widest naturally aligned word at `address` that fits `len` (not 0) bytes: 0 to 3.
#[inline]
fn word_shift(address: usize, len: usize) -> u32 {
    address.trailing_zeros().min(len.ilog2()).min(3)
}

/// Copies guest bytes to `dst`.
///
/// # Safety
/// `src` is valid for reads of `dst.len()` bytes.
#[inline]
pub(super) unsafe fn read(src: *const u8, dst: &mut [u8]) {
    if dst.len() > WORDWISE_MAX {
        // SAFETY: the caller vouches for `src`; no `&mut [u8]` can overlap guest memory. Races: module documentation.
        unsafe { ptr::copy_nonoverlapping(src, dst.as_mut_ptr(), dst.len()) };
        return;
    }
    let mut done = 0;
    while done < dst.len() {
        // SAFETY: done < dst.len(), so the pointer stays in the caller's range.
        let at = unsafe { src.add(done) };
        let shift = word_shift(at as usize, dst.len() - done);
        let word = &mut dst[done..done + (1 << shift)];
        // SAFETY: `word_shift` chose a width that is aligned at `at` and ends within the range.
        unsafe {
            match shift {
                3 => word.copy_from_slice(&load_bytes::<u64>(at).to_le_bytes()),
                2 => word.copy_from_slice(&load_bytes::<u32>(at).to_le_bytes()),
                1 => word.copy_from_slice(&load_bytes::<u16>(at).to_le_bytes()),
                _ => word[0] = load_bytes::<u8>(at),
            }
        }
        done += word.len();
    }
}

/// A relaxed load, which also read-only memory allows.
///
/// # Safety
/// `ptr` is valid for reads and aligned to the word's size.
unsafe fn load_bytes<T: GuestWord>(ptr: *const u8) -> T {
    // SAFETY: the caller vouches for `ptr`.
    unsafe { T::load(ptr, Ordering::Relaxed) }
}

/// Copies `src` into guest memory.
///
/// # Safety
/// `dst` is valid for reads and writes of `src.len()` bytes.
#[inline]
pub(super) unsafe fn write(dst: *mut u8, src: &[u8]) {
    if src.len() > WORDWISE_MAX {
        // SAFETY: the caller vouches for `dst`; no `&[u8]` can overlap guest memory. Races: module documentation.
        unsafe { ptr::copy_nonoverlapping(src.as_ptr(), dst, src.len()) };
        return;
    }
    let mut rest = src;
    let mut at = dst;
    while !rest.is_empty() {
        let shift = word_shift(at as usize, rest.len());
        let (word, tail) = rest.split_at(1 << shift);
        // SAFETY: `word_shift` chose a width that is aligned at `at` and ends within the caller's range.
        unsafe {
            match *word {
                [a, b, c, d, e, f, g, h] => store_bytes(at, u64::from_le_bytes([a, b, c, d, e, f, g, h])),
                [a, b, c, d] => store_bytes(at, u32::from_le_bytes([a, b, c, d])),
                [a, b] => store_bytes(at, u16::from_le_bytes([a, b])),
                _ => store_bytes(at, word[0]),
            }
            at = at.add(word.len());
        }
        rest = tail;
    }
}

/// A relaxed store.
///
/// # Safety
/// `ptr` is valid for reads and writes and aligned to the word's size.
unsafe fn store_bytes<T: GuestWord>(ptr: *mut u8, value: T) {
    // SAFETY: the caller vouches for `ptr`.
    unsafe { value.store(ptr, Ordering::Relaxed) };
}

/// Sets `len` guest bytes to `byte`.
///
/// # Safety
/// `dst` is valid for writes of `len` bytes.
pub(super) unsafe fn fill(dst: *mut u8, len: usize, byte: u8) {
    // SAFETY: the caller vouches for `dst`. Races: module documentation.
    unsafe { ptr::write_bytes(dst, byte, len) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_the_widest_that_alignment_and_length_allow() {
        assert_eq!(word_shift(0x1000, 8), 3);
        assert_eq!(word_shift(0x1000, 64), 3);
        assert_eq!(word_shift(0x1000, 7), 2);
        assert_eq!(word_shift(0x1004, 8), 2);
        assert_eq!(word_shift(0x1006, 8), 1);
        assert_eq!(word_shift(0x1007, 8), 0);
        assert_eq!(word_shift(0x1008, 1), 0);
    }

    #[test]
    fn every_alignment_and_length_copies_exactly_its_bytes() {
        let mut memory = [0u64; 32];
        let base = memory.as_mut_ptr().cast::<u8>();
        for offset in 0..9usize {
            for len in 0..=WORDWISE_MAX + 9 {
                let data: Vec<u8> = (0..len).map(|i| (i * 7 + offset + 1) as u8).collect();
                let mut back = vec![0u8; len];
                let mut all = [0u8; 128];
                // SAFETY: offset + len is below the array's 256 bytes, which only this test accesses.
                unsafe {
                    fill(base, 256, 0xee);
                    write(base.add(offset), &data);
                    read(base.add(offset), &mut back);
                    read(base, &mut all);
                }
                assert_eq!(back, data, "offset {offset}, length {len}");
                assert_eq!(&all[offset..offset + len], &data[..]);
                assert!(all[..offset].iter().chain(&all[offset + len..]).all(|byte| *byte == 0xee));
            }
        }
    }
}
