//! Guest memory: mappings in whole pages, whose protection changes page by page.

use super::complain;
use crate::host::{exchange, load, store};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{PoisonError, RwLock};
use vm_accel_sys::hvf::aarch64::PAGE_SIZE;
use vm_accel_sys::hvf::{HvReturn, code, memory};

const ALL_FLAGS: u64 = memory::READ | memory::WRITE | memory::EXEC;
/// Where this runs, the host's own pages may be smaller than those of the platform.
const HOST_PAGE: usize = 4096;

#[derive(Debug, Clone, Copy)]
struct Piece {
    size: u64,
    host: usize,
    flags: u64,
}

/// What is mapped where. Guests hold the lock for reading as long as they touch a byte.
#[derive(Debug)]
pub(super) struct Memory {
    pieces: RwLock<BTreeMap<u64, Piece>>,
    bits: u32,
}

type Pieces = BTreeMap<u64, Piece>;

fn find(pieces: &Pieces, pa: u64) -> Option<(u64, Piece)> {
    let (at, piece) = pieces.range(..=pa).next_back()?;
    (pa - at < piece.size).then_some((*at, *piece))
}

/// Makes a piece begin at `at`, if one holds it.
fn split(pieces: &mut Pieces, at: u64) {
    let Some((start, piece)) = find(pieces, at).filter(|(start, _)| *start != at) else {
        return;
    };
    let front = at - start;
    pieces.insert(start, Piece { size: front, ..piece });
    pieces.insert(at, Piece { size: piece.size - front, host: piece.host + front as usize, ..piece });
}

impl Memory {
    /// Memory whose addresses have this many bits.
    pub(super) fn new(bits: u32) -> Self {
        Self { pieces: RwLock::default(), bits }
    }

    fn read_lock(&self) -> std::sync::RwLockReadGuard<'_, Pieces> {
        self.pieces.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn check(&self, ipa: u64, size: u64, flags: u64) -> Result<Range<u64>, HvReturn> {
        let end = ipa.checked_add(size).filter(|end| *end <= 1 << self.bits).ok_or(code::BAD_ARGUMENT)?;
        let aligned = ipa.is_multiple_of(PAGE_SIZE) && size.is_multiple_of(PAGE_SIZE) && size != 0;
        if !aligned {
            complain(format!("{size:#x} bytes at {ipa:#x} are not whole pages"));
        }
        if aligned && flags & !ALL_FLAGS == 0 { Ok(ipa..end) } else { Err(code::BAD_ARGUMENT) }
    }

    pub(super) fn map(&self, host: usize, ipa: u64, size: u64, flags: u64) -> Result<(), HvReturn> {
        let range = self.check(ipa, size, flags)?;
        if host == 0 || !host.is_multiple_of(HOST_PAGE) {
            complain(format!("hv_vm_map: host address {host:#x} is not that of a page"));
            return Err(code::BAD_ARGUMENT);
        }
        let mut pieces = self.pieces.write().unwrap_or_else(PoisonError::into_inner);
        let last = pieces.range(..range.end).next_back();
        if last.is_some_and(|(at, piece)| at + piece.size > range.start) {
            return Err(code::ERROR);
        }
        pieces.insert(ipa, Piece { size, host, flags });
        Ok(())
    }

    /// Changes all pieces of a range, which must be mapped; `None` unmaps.
    pub(super) fn change(&self, ipa: u64, size: u64, flags: Option<u64>) -> Result<(), HvReturn> {
        let range = self.check(ipa, size, flags.unwrap_or(0))?;
        let mut pieces = self.pieces.write().unwrap_or_else(PoisonError::into_inner);
        let mut at = range.start;
        while at < range.end {
            let (start, piece) = find(&pieces, at).ok_or(code::ERROR)?;
            at = start + piece.size;
        }
        split(&mut pieces, range.start);
        split(&mut pieces, range.end);
        match flags {
            Some(flags) => pieces.range_mut(range).for_each(|(_, piece)| piece.flags = flags),
            None => pieces.retain(|at, _| !range.contains(at)),
        }
        Ok(())
    }

    /// What the guest may do at an address; 0 if nothing is mapped there.
    pub(super) fn flags(&self, pa: u64) -> u64 {
        find(&self.read_lock(), pa).map_or(0, |(_, piece)| piece.flags)
    }

    /// Calls `f` with the host address of bytes that lie in one mapping with these rights.
    fn with<T>(&self, pa: u64, len: usize, rights: u64, f: impl FnOnce(usize) -> T) -> Option<T> {
        let pieces = self.read_lock();
        let (at, piece) = find(&pieces, pa)?;
        let fits = piece.size - (pa - at) >= len as u64 && piece.flags & rights != 0;
        fits.then(|| f(piece.host + (pa - at) as usize))
    }

    pub(super) fn read(&self, pa: u64, data: &mut [u8]) -> bool {
        self.with(pa, data.len(), memory::READ, |host| load(host, data)).is_some()
    }

    pub(super) fn write(&self, pa: u64, data: &[u8]) -> bool {
        self.with(pa, data.len(), memory::WRITE, |host| store(host, data)).is_some()
    }

    pub(super) fn exchange(&self, pa: u64, old: &[u8], new: &[u8]) -> Option<bool> {
        self.with(pa, old.len(), memory::WRITE, |host| exchange(host, old, new))
    }
}
