//! Which pages changed: what the host wrote, what the accelerator logged, and both together.
//!
//! Pages are 4 KiB here whatever the host's page size is, so that bitmaps of different sources can be combined. A bit
//! may be set for a page that did not change; it must never be missing for one that did.

use crate::error::{AccelError, VcpuResult};
use std::fmt;
use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Bytes that one bit of a [`DirtyBitmap`] stands for.
pub const DIRTY_PAGE_SIZE: u64 = 4096;

const BITS: u64 = u64::BITS as u64;

/// The bits of `pages` (start <= end) that fall into each word, as (word index, mask).
fn masks(pages: Range<u64>) -> impl Iterator<Item = (usize, u64)> {
    (pages.start / BITS..pages.end.div_ceil(BITS)).map(move |word| {
        let first = pages.start.saturating_sub(word * BITS);
        let last = (pages.end - word * BITS).min(BITS);
        (word as usize, (u64::MAX << first) & (u64::MAX >> (BITS - last)))
    })
}

/// The host's own writes to one region, recorded by any thread.
pub(super) struct HostDirty {
    enabled: AtomicBool,
    pages: u64,
    /// Made when tracking is first switched on: most regions never need it.
    words: OnceLock<Box<[AtomicU64]>>,
}

impl HostDirty {
    /// Tracking for a region of `len` bytes, switched off.
    pub(super) fn new(len: u64) -> Self {
        Self { enabled: AtomicBool::new(false), pages: len.div_ceil(DIRTY_PAGE_SIZE), words: OnceLock::new() }
    }

    pub(super) fn is_enabled(&self) -> bool {
        self.enabled.load(Ordering::Acquire)
    }

    /// Switches tracking; switching on what was off starts with no page dirty.
    pub(super) fn enable(&self, on: bool) {
        if on && !self.is_enabled() {
            self.words.get_or_init(|| (0..self.pages.div_ceil(BITS)).map(|_| AtomicU64::new(0)).collect());
            drop(self.take());
        }
        self.enabled.store(on, Ordering::SeqCst);
    }

    /// Records a write of `len` bytes at `offset`, both within the region. To be called after the bytes are written:
    /// whoever takes the bit then sees them.
    #[inline]
    pub(super) fn mark(&self, offset: u64, len: u64) {
        if self.enabled.load(Ordering::Relaxed) && len != 0 {
            self.mark_enabled(offset, len);
        }
    }

    #[cold]
    fn mark_enabled(&self, offset: u64, len: u64) {
        if let Some(words) = self.words.get() {
            for (word, mask) in masks(offset / DIRTY_PAGE_SIZE..(offset + len).div_ceil(DIRTY_PAGE_SIZE)) {
                // Release pairs with the Acquire in `take`. Never skipped for a bit that is already set: a taker may
                // be between clearing it and copying the page, and would miss this write.
                words[word].fetch_or(mask, Ordering::Release);
            }
        }
    }

    /// True if the page at `offset` is recorded.
    #[cfg(any(test, feature = "vm-memory"))]
    pub(super) fn is_dirty(&self, offset: u64) -> bool {
        let page = offset / DIRTY_PAGE_SIZE;
        self.words
            .get()
            .and_then(|words| words.get((page / BITS) as usize))
            .is_some_and(|word| word.load(Ordering::Acquire) & (1 << (page % BITS)) != 0)
    }

    /// Takes what is recorded and starts anew.
    pub(super) fn take(&self) -> DirtyBitmap {
        let len = self.pages.div_ceil(BITS) as usize;
        let words = match self.words.get() {
            // AcqRel: see `mark`.
            Some(words) => words.iter().map(|word| word.swap(0, Ordering::AcqRel)).collect(),
            None => vec![0; len],
        };
        DirtyBitmap { base: 0, pages: self.pages, words }
    }
}

/// A set of 4 KiB pages of a range of addresses that starts at [`base`](Self::base).
///
/// Addresses are whatever the maker says: offsets in a region ([`GuestRegion::take_host_dirty`] starts at 0) or guest
/// physical addresses (after [`with_base`](Self::with_base)).
///
/// ```
/// use vm_accel::memory::DirtyBitmap;
///
/// // The accelerator logged 16 KiB page 1, the host wrote 4 KiB page 6: together pages 4 to 7.
/// let mut dirty = DirtyBitmap::from_log(0, 0x10000, &[0b10], 0x4000)?;
/// let mut host = DirtyBitmap::new(0, 0x10000)?;
/// host.set(0x6000, 1)?;
/// dirty.union(&host)?;
/// assert_eq!(dirty.ranges().collect::<Vec<_>>(), [0x4000..0x8000]);
/// # Ok::<(), vm_accel::AccelError>(())
/// ```
///
/// [`GuestRegion::take_host_dirty`]: super::GuestRegion::take_host_dirty
#[derive(Clone, PartialEq, Eq)]
pub struct DirtyBitmap {
    base: u64,
    pages: u64,
    /// Bits beyond `pages` are 0.
    words: Vec<u64>,
}

impl DirtyBitmap {
    /// An empty set over `len` bytes from `base` on.
    ///
    /// # Errors
    /// [`AccelError::InvalidArgument`] if either is not a multiple of 4096, or the range ends beyond 2^64 - 1.
    pub fn new(base: u64, len: u64) -> VcpuResult<Self> {
        if base % DIRTY_PAGE_SIZE != 0 || len % DIRTY_PAGE_SIZE != 0 {
            return Err(AccelError::invalid(
                "dirty bitmap range",
                format!("{base:#x} + {len:#x} is not aligned to {DIRTY_PAGE_SIZE} bytes"),
            ));
        }
        check_end(base, len)?;
        let pages = len / DIRTY_PAGE_SIZE;
        Ok(Self { base, pages, words: vec![0; pages.div_ceil(BITS) as usize] })
    }

    /// An accelerator's log of `len` bytes from `base` on: bit n of word m stands for page 64 m + n of `log_page_size`
    /// bytes. A page of the log that is larger than 4 KiB becomes several pages here.
    ///
    /// # Errors
    /// [`AccelError::InvalidArgument`] if `log_page_size` is not a power of two of at least 4096, if `log` is too short
    /// for the range, and as for [`new`](Self::new).
    pub fn from_log(base: u64, len: u64, log: &[u64], log_page_size: u64) -> VcpuResult<Self> {
        if !log_page_size.is_power_of_two() || log_page_size < DIRTY_PAGE_SIZE {
            return Err(AccelError::invalid(
                "dirty log page size",
                format!("{log_page_size} is not a power of two of at least {DIRTY_PAGE_SIZE}"),
            ));
        }
        let mut bitmap = Self::new(base, len)?;
        let needed = len.div_ceil(log_page_size).div_ceil(BITS);
        let Some(log) = log.get(..needed as usize) else {
            return Err(AccelError::invalid(
                "dirty log",
                format!("{} words are too few, {len:#x} bytes need {needed}", log.len()),
            ));
        };
        let log = SetBits { words: log };
        let scale = log_page_size / DIRTY_PAGE_SIZE;
        let mut from = 0;
        while let Some(run) = log.next_run(from) {
            from = run.end;
            // The last page of the log, and unused bits of its last word, may lie beyond the range.
            let end = run.end.saturating_mul(scale).min(bitmap.pages);
            bitmap.set_pages(run.start.saturating_mul(scale).min(end)..end);
        }
        Ok(bitmap)
    }

    /// The same pages, counted from another address: `base` becomes the address of the first one.
    ///
    /// # Errors
    /// As for [`new`](Self::new).
    pub fn with_base(mut self, base: u64) -> VcpuResult<Self> {
        if base % DIRTY_PAGE_SIZE != 0 {
            return Err(AccelError::invalid(
                "dirty bitmap base",
                format!("{base:#x} is not aligned to {DIRTY_PAGE_SIZE} bytes"),
            ));
        }
        check_end(base, self.size())?;
        self.base = base;
        Ok(self)
    }

    /// The address of the first page.
    #[must_use]
    pub fn base(&self) -> u64 {
        self.base
    }

    /// Bytes that the bitmap covers.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.pages * DIRTY_PAGE_SIZE
    }

    /// True if no page is dirty.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    /// Bytes of one page: [`DIRTY_PAGE_SIZE`].
    #[must_use]
    pub fn page_size(&self) -> u64 {
        DIRTY_PAGE_SIZE
    }

    /// The bits: page n is bit n mod 64 of word n / 64. Bits beyond the last page are 0.
    #[must_use]
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// Dirty pages.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// True if the page that holds `address` is dirty; false for an address outside.
    #[must_use]
    pub fn is_dirty(&self, address: u64) -> bool {
        address.checked_sub(self.base).is_some_and(|offset| {
            let page = offset / DIRTY_PAGE_SIZE;
            page < self.pages && self.words[(page / BITS) as usize] & (1 << (page % BITS)) != 0
        })
    }

    /// Makes every page dirty that has a byte in `len` bytes from `address` on.
    ///
    /// # Errors
    /// [`AccelError::InvalidArgument`] if a byte lies outside; nothing is changed then.
    pub fn set(&mut self, address: u64, len: u64) -> VcpuResult<()> {
        let pages = self.pages_of(address, len)?;
        self.set_pages(pages);
        Ok(())
    }

    /// Adds the dirty pages of `other`, which must all lie in this bitmap's range.
    ///
    /// # Errors
    /// [`AccelError::InvalidArgument`] if one lies outside; nothing is changed then.
    pub fn union(&mut self, other: &Self) -> VcpuResult<()> {
        if (self.base, self.pages) == (other.base, other.pages) {
            for (word, more) in self.words.iter_mut().zip(&other.words) {
                *word |= more;
            }
            return Ok(());
        }
        for range in other.ranges() {
            self.pages_of(range.start, range.end - range.start)?;
        }
        other.ranges().try_for_each(|range| self.set(range.start, range.end - range.start))
    }

    /// The dirty addresses in ascending order; pages next to each other are one range.
    #[must_use]
    pub fn ranges(&self) -> DirtyRanges<'_> {
        DirtyRanges { bitmap: self, from: 0 }
    }

    fn pages_of(&self, address: u64, len: u64) -> VcpuResult<Range<u64>> {
        address
            .checked_sub(self.base)
            .filter(|offset| offset.checked_add(len).is_some_and(|end| end <= self.size()))
            .map(|offset| match len {
                0 => 0..0,
                _ => offset / DIRTY_PAGE_SIZE..(offset + len).div_ceil(DIRTY_PAGE_SIZE),
            })
            .ok_or_else(|| {
                AccelError::invalid(
                    "dirty range",
                    format!(
                        "{address:#x} + {len:#x} is not within the bitmap of {:#x} + {:#x}",
                        self.base,
                        self.size()
                    ),
                )
            })
    }

    fn set_pages(&mut self, pages: Range<u64>) {
        for (word, mask) in masks(pages) {
            self.words[word] |= mask;
        }
    }
}

fn check_end(base: u64, len: u64) -> VcpuResult<()> {
    match base.checked_add(len) {
        Some(_) => Ok(()),
        None => Err(AccelError::invalid(
            "dirty bitmap range",
            format!("{base:#x} + {len:#x} ends beyond the address space"),
        )),
    }
}

impl fmt::Debug for DirtyBitmap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DirtyBitmap")
            .field("base", &format_args!("{:#x}", self.base))
            .field("len", &format_args!("{:#x}", self.size()))
            .field("dirty_pages", &self.count())
            .finish()
    }
}

/// Runs of set bits.
struct SetBits<'a> {
    words: &'a [u64],
}

impl SetBits<'_> {
    /// The first bit at or after `from` for which `flip ^ bit` is set; the number of bits if there is none.
    fn find(&self, from: u64, flip: u64) -> u64 {
        let end = self.words.len() as u64 * BITS;
        let mut at = from.min(end);
        while at < end {
            let word = (self.words[(at / BITS) as usize] ^ flip) >> (at % BITS);
            if word != 0 {
                return at + u64::from(word.trailing_zeros());
            }
            at = (at / BITS + 1) * BITS;
        }
        end
    }

    /// The next run of set bits at or after `from`.
    fn next_run(&self, from: u64) -> Option<Range<u64>> {
        let start = self.find(from, 0);
        let end = self.find(start, u64::MAX);
        (start < end).then_some(start..end)
    }
}

/// Iterator over the dirty address ranges of a [`DirtyBitmap`].
#[derive(Debug, Clone)]
pub struct DirtyRanges<'a> {
    bitmap: &'a DirtyBitmap,
    from: u64,
}

impl Iterator for DirtyRanges<'_> {
    type Item = Range<u64>;

    fn next(&mut self) -> Option<Self::Item> {
        let bits = SetBits { words: &self.bitmap.words };
        let run = bits.next_run(self.from)?;
        self.from = run.end;
        let address = |page: u64| self.bitmap.base + page * DIRTY_PAGE_SIZE;
        Some(address(run.start)..address(run.end))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranges(bitmap: &DirtyBitmap) -> Vec<Range<u64>> {
        bitmap.ranges().collect()
    }

    #[test]
    fn a_write_over_a_page_border_marks_both_pages() {
        let mut bitmap = DirtyBitmap::new(0x10000, 0x10000).unwrap();
        bitmap.set(0x11fff, 2).unwrap();
        assert_eq!(ranges(&bitmap), vec![0x11000..0x13000]);
        assert_eq!(bitmap.count(), 2);
        assert!(bitmap.is_dirty(0x11000) && bitmap.is_dirty(0x12fff));
        assert!(!bitmap.is_dirty(0x13000) && !bitmap.is_dirty(0) && !bitmap.is_dirty(u64::MAX));
    }

    #[test]
    fn ranges_join_over_word_borders_and_reach_the_last_page() {
        let mut bitmap = DirtyBitmap::new(0, 200 * DIRTY_PAGE_SIZE).unwrap();
        bitmap.set(60 * DIRTY_PAGE_SIZE, 80 * DIRTY_PAGE_SIZE).unwrap();
        bitmap.set(199 * DIRTY_PAGE_SIZE, 1).unwrap();
        let page = |n: u64| n * DIRTY_PAGE_SIZE;
        assert_eq!(ranges(&bitmap), vec![page(60)..page(140), page(199)..page(200)]);
        assert_eq!(bitmap.count(), 81);
        let full = DirtyBitmap::from_log(0, page(128), &[u64::MAX; 2], 4096).unwrap();
        assert_eq!(ranges(&full), vec![0..page(128)]);
    }

    #[test]
    fn ranges_outside_change_nothing() {
        let mut bitmap = DirtyBitmap::new(0x1000, 0x2000).unwrap();
        for (address, len) in [(0, 1), (0x3000, 1), (0x2fff, 2), (0x1000, u64::MAX), (u64::MAX, 2)] {
            assert!(bitmap.set(address, len).is_err(), "{address:#x} + {len:#x}");
        }
        bitmap.set(0x3000, 0).unwrap();
        assert!(bitmap.is_clean());
        assert!(DirtyBitmap::new(0x800, 0x1000).is_err());
        assert!(DirtyBitmap::new(0, 0x800).is_err());
        assert!(DirtyBitmap::new(0u64.wrapping_sub(0x1000), 0x2000).is_err());
    }

    #[test]
    fn a_log_of_larger_pages_becomes_small_pages() {
        let bitmap = DirtyBitmap::from_log(0x4000, 0x9000, &[0b101], 0x4000).unwrap();
        // The third log page has only one small page in the range.
        assert_eq!(ranges(&bitmap), vec![0x4000..0x8000, 0xc000..0xd000]);
    }

    #[test]
    fn garbage_beyond_the_log_is_ignored() {
        for page_size in [0x1000, 0x4000, 0x10000, 1 << 63] {
            let bitmap = DirtyBitmap::from_log(0, 0x3000, &[u64::MAX, u64::MAX], page_size).unwrap();
            assert_eq!(bitmap.count(), 3);
            assert_eq!(bitmap.words(), &[0b111]);
        }
    }

    #[test]
    fn a_log_that_is_too_short_or_of_odd_pages_is_refused() {
        assert!(DirtyBitmap::from_log(0, 65 * 0x1000, &[0], 0x1000).is_err());
        for page_size in [0, 0x800, 0x1800, u64::MAX] {
            assert!(DirtyBitmap::from_log(0, 0x1000, &[0], page_size).is_err(), "{page_size:#x}");
        }
    }

    #[test]
    fn union_takes_other_ranges_or_nothing() {
        let mut all = DirtyBitmap::new(0, 0x10000).unwrap();
        let part = DirtyBitmap::from_log(0x4000, 0x2000, &[0b11], 0x1000).unwrap();
        all.union(&part).unwrap();
        all.union(&all.clone()).unwrap();
        assert_eq!(ranges(&all), vec![0x4000..0x6000]);
        let mut outside = DirtyBitmap::new(0xf000, 0x2000).unwrap();
        outside.set(0xf000, 0x2000).unwrap();
        assert!(all.union(&outside).is_err());
        assert_eq!(all.count(), 2);
        let moved = part.with_base(0xe000).unwrap();
        all.union(&moved).unwrap();
        assert_eq!(ranges(&all), vec![0x4000..0x6000, 0xe000..0x10000]);
    }

    #[test]
    fn host_writes_count_only_while_tracking_is_on() {
        let dirty = HostDirty::new(100 * DIRTY_PAGE_SIZE);
        dirty.mark(0, 1);
        assert!(dirty.take().is_clean());
        dirty.enable(true);
        dirty.mark(63 * DIRTY_PAGE_SIZE, 2 * DIRTY_PAGE_SIZE);
        dirty.mark(99 * DIRTY_PAGE_SIZE, 0);
        dirty.enable(true);
        assert!(dirty.is_dirty(64 * DIRTY_PAGE_SIZE));
        assert_eq!(dirty.take().words(), &[1 << 63, 1]);
        assert!(dirty.take().is_clean());
        dirty.mark(0, 1);
        dirty.enable(false);
        dirty.mark(DIRTY_PAGE_SIZE, 1);
        dirty.enable(true);
        assert!(dirty.take().is_clean(), "switching on starts anew");
    }
}
