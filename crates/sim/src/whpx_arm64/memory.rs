//! Guest memory: mappings in pages of 4 KiB that replace one another, and their dirty bitmaps.

use super::{Answer, code, misuse};
use crate::host;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use vm_accel_sys::whpx::code::{E_INVALIDARG, WHV_E_GPA_RANGE_NOT_FOUND};
use vm_accel_sys::whpx::map_flag;

const PAGE: u64 = 4096;
const ALL_FLAGS: i32 = map_flag::READ | map_flag::WRITE | map_flag::EXECUTE | map_flag::TRACK_DIRTY_PAGES;
/// Width of guest physical addresses.
pub(super) const PHYSICAL_BITS: u32 = 40;

/// Memory that is mapped as one piece.
#[derive(Debug)]
struct Piece {
    size: u64,
    host: usize,
    flags: i32,
    /// One bit per page.
    dirty: Vec<AtomicU64>,
}

impl Piece {
    fn new(size: u64, host: usize, flags: i32) -> Self {
        Self { size, host, flags, dirty: (0..(size / PAGE).div_ceil(64)).map(|_| AtomicU64::new(0)).collect() }
    }

    fn is_dirty(&self, page: u64) -> bool {
        self.dirty[page as usize / 64].load(Ordering::Relaxed) >> (page % 64) & 1 != 0
    }

    fn mark(&self, page: u64) {
        self.dirty[page as usize / 64].fetch_or(1 << (page % 64), Ordering::Relaxed);
    }

    /// A part of it, with the part's dirty pages.
    fn part(&self, offset: u64, size: u64) -> Self {
        let part = Self::new(size, self.host + offset as usize, self.flags);
        (0..size / PAGE).filter(|page| self.is_dirty(offset / PAGE + page)).for_each(|page| part.mark(page));
        part
    }
}

type Pieces = BTreeMap<u64, Piece>;

/// What is mapped where. Guests hold the lock for reading as long as they touch a byte.
#[derive(Debug, Default)]
pub(super) struct Memory {
    pieces: RwLock<Pieces>,
}

fn find(pieces: &Pieces, pa: u64) -> Option<(u64, &Piece)> {
    let (at, piece) = pieces.range(..=pa).next_back()?;
    (pa - at < piece.size).then_some((*at, piece))
}

/// Makes a piece begin at `at`, if one holds it.
fn split(pieces: &mut Pieces, at: u64) {
    let Some((start, piece)) = find(pieces, at).filter(|(start, _)| *start != at) else {
        return;
    };
    let front = at - start;
    let (first, second) = (piece.part(0, front), piece.part(front, piece.size - front));
    pieces.insert(start, first);
    pieces.insert(at, second);
}

fn check(gpa: u64, size: u64) -> Answer<Range<u64>> {
    let end = gpa.checked_add(size).filter(|end| *end <= 1 << PHYSICAL_BITS);
    match end {
        Some(end) if size != 0 && (gpa | size).is_multiple_of(PAGE) => Ok(gpa..end),
        _ => code(E_INVALIDARG),
    }
}

impl Memory {
    fn read_lock(&self) -> RwLockReadGuard<'_, Pieces> {
        self.pieces.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_lock(&self) -> RwLockWriteGuard<'_, Pieces> {
        self.pieces.write().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn map(&self, host: usize, gpa: u64, size: u64, flags: i32) -> Answer {
        let range = check(gpa, size)?;
        if host == 0 || !host.is_multiple_of(PAGE as usize) {
            return misuse(format!("host memory at {host:#x} is not whole pages"));
        }
        if flags & !ALL_FLAGS != 0 || flags & map_flag::READ == 0 {
            return code(E_INVALIDARG);
        }
        let mut pieces = self.write_lock();
        remove(&mut pieces, &range);
        pieces.insert(gpa, Piece::new(size, host, flags));
        Ok(())
    }

    pub(super) fn unmap(&self, gpa: u64, size: u64) -> Answer {
        let range = check(gpa, size)?;
        let mut pieces = self.write_lock();
        covered(&pieces, &range, 0)?;
        remove(&mut pieces, &range);
        Ok(())
    }

    /// Takes the dirty pages of a range.
    pub(super) fn take_dirty(&self, gpa: u64, size: u64) -> Answer<Vec<u64>> {
        let range = check(gpa, size)?;
        let pieces = self.read_lock();
        covered(&pieces, &range, map_flag::TRACK_DIRTY_PAGES)?;
        let mut words = vec![0; (size / PAGE).div_ceil(64) as usize];
        for page in 0..size / PAGE {
            let at = gpa + page * PAGE;
            let Some((start, piece)) = find(&pieces, at) else {
                continue;
            };
            let (word, bit) = (((at - start) / PAGE / 64) as usize, 1 << ((at - start) / PAGE % 64));
            if piece.dirty[word].fetch_and(!bit, Ordering::Relaxed) & bit != 0 {
                words[page as usize / 64] |= 1 << (page % 64);
            }
        }
        Ok(words)
    }

    /// What the guest may do at an address; 0 if nothing is mapped there.
    pub(super) fn flags(&self, pa: u64) -> i32 {
        find(&self.read_lock(), pa).map_or(0, |(_, piece)| piece.flags)
    }

    /// Calls `f` with the host address of bytes that lie in one mapping with these rights.
    fn with<T>(&self, pa: u64, len: usize, rights: i32, f: impl FnOnce(usize) -> T) -> Option<T> {
        let pieces = self.read_lock();
        let (at, piece) = find(&pieces, pa)?;
        let offset = pa - at;
        if piece.size - offset < len as u64 || piece.flags & rights == 0 {
            return None;
        }
        let result = f(piece.host + offset as usize);
        if rights == map_flag::WRITE && piece.flags & map_flag::TRACK_DIRTY_PAGES != 0 {
            (offset / PAGE..=(offset + len as u64 - 1) / PAGE).for_each(|page| piece.mark(page));
        }
        Some(result)
    }

    pub(super) fn read(&self, pa: u64, data: &mut [u8]) -> bool {
        self.with(pa, data.len(), map_flag::READ, |host| host::load(host, data)).is_some()
    }

    pub(super) fn write(&self, pa: u64, data: &[u8]) -> bool {
        self.with(pa, data.len(), map_flag::WRITE, |host| host::store(host, data)).is_some()
    }

    pub(super) fn exchange(&self, pa: u64, old: &[u8], new: &[u8]) -> Option<bool> {
        self.with(pa, old.len(), map_flag::WRITE, |host| host::exchange(host, old, new))
    }
}

/// That all of a range is mapped, with these flags.
fn covered(pieces: &Pieces, range: &Range<u64>, flags: i32) -> Answer {
    let mut at = range.start;
    while at < range.end {
        match find(pieces, at) {
            Some((start, piece)) if piece.flags & flags == flags => at = start + piece.size,
            _ => return code(WHV_E_GPA_RANGE_NOT_FOUND),
        }
    }
    Ok(())
}

fn remove(pieces: &mut Pieces, range: &Range<u64>) {
    split(pieces, range.start);
    split(pieces, range.end);
    pieces.retain(|at, _| !range.contains(at));
}
