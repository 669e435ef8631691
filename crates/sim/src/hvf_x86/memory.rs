//! Guest memory: mappings in whole pages, whose protection changes page by page.

use super::{complain, lock};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use vm_accel_softcpu::Ram;
use vm_accel_sys::hvf::{HvReturn, code, memory};

/// Pages are 4 KiB for the platform.
pub(super) const PAGE: u64 = 4096;
/// Guest-physical addresses are this wide.
pub(super) const PHYSICAL_BITS: u32 = 46;
const ALL_FLAGS: u64 = memory::READ | memory::WRITE | memory::EXEC;

#[derive(Debug, Clone, Copy)]
struct Piece {
    size: u64,
    host: usize,
    flags: u64,
}

/// What is mapped where.
#[derive(Debug)]
pub(super) struct Memory {
    pub(super) ram: Arc<Ram>,
    pieces: Mutex<BTreeMap<u64, Piece>>,
}

impl Memory {
    pub(super) fn new() -> Self {
        Self { ram: Ram::new(), pieces: Mutex::default() }
    }

    fn check(gpa: u64, size: u64, flags: u64) -> Result<(), HvReturn> {
        let fits = gpa.checked_add(size).is_some_and(|end| end <= 1 << PHYSICAL_BITS);
        let aligned = gpa.is_multiple_of(PAGE) && size.is_multiple_of(PAGE) && size != 0;
        if aligned && fits && flags & !ALL_FLAGS == 0 { Ok(()) } else { Err(code::BAD_ARGUMENT) }
    }

    /// Adds a piece, to the processors too if it can be read.
    fn insert(&self, pieces: &mut BTreeMap<u64, Piece>, gpa: u64, piece: Piece) -> Result<(), HvReturn> {
        if piece.flags & memory::READ != 0 {
            let writable = piece.flags & memory::WRITE != 0;
            // SAFETY: the caller of the platform promises that the memory is his as long as it is mapped (hv_vm_map); the
            // guest's accesses are volatile and through raw pointers.
            let mapped = unsafe { self.ram.map(gpa, piece.host as *mut u8, piece.size, writable, Arc::new(())) };
            mapped.map_err(|_| code::NO_RESOURCES)?;
        }
        pieces.insert(gpa, piece);
        Ok(())
    }

    fn remove(&self, pieces: &mut BTreeMap<u64, Piece>, gpa: u64) -> Option<Piece> {
        let piece = pieces.remove(&gpa)?;
        if piece.flags & memory::READ != 0 && self.ram.unmap(gpa).is_err() {
            complain(format!("the simulator lost its mapping at {gpa:#x}"));
        }
        Some(piece)
    }

    /// Whether all of a range is mapped.
    fn covers(pieces: &BTreeMap<u64, Piece>, gpa: u64, size: u64) -> bool {
        let mut at = gpa;
        while at < gpa + size {
            match pieces.range(..=at).next_back() {
                Some((start, piece)) if at < start + piece.size => at = start + piece.size,
                _ => return false,
            }
        }
        true
    }

    /// Makes a piece begin at `at`, if one holds it.
    fn split(&self, pieces: &mut BTreeMap<u64, Piece>, at: u64) -> Result<(), HvReturn> {
        let Some((&start, &piece)) = pieces.range(..at).next_back().filter(|(start, p)| at < **start + p.size) else {
            return Ok(());
        };
        self.remove(pieces, start);
        let front = at - start;
        self.insert(pieces, start, Piece { size: front, ..piece })?;
        let back = Piece { size: piece.size - front, host: piece.host + front as usize, ..piece };
        self.insert(pieces, at, back)
    }

    pub(super) fn map(&self, host: usize, gpa: u64, size: u64, flags: u64) -> Result<(), HvReturn> {
        Self::check(gpa, size, flags)?;
        if host == 0 || !(host as u64).is_multiple_of(PAGE) {
            complain(format!("hv_vm_map: host address {host:#x} is not that of a page"));
            return Err(code::BAD_ARGUMENT);
        }
        let mut pieces = lock(&self.pieces);
        let overlaps = pieces.range(..gpa + size).next_back().is_some_and(|(at, piece)| at + piece.size > gpa);
        if overlaps {
            return Err(code::ERROR);
        }
        self.insert(&mut pieces, gpa, Piece { size, host, flags })
    }

    /// Changes all pieces of a range, which must be mapped; `None` unmaps.
    pub(super) fn change(&self, gpa: u64, size: u64, flags: Option<u64>) -> Result<(), HvReturn> {
        Self::check(gpa, size, flags.unwrap_or(0))?;
        let mut pieces = lock(&self.pieces);
        if !Self::covers(&pieces, gpa, size) {
            return Err(code::ERROR);
        }
        self.split(&mut pieces, gpa)?;
        self.split(&mut pieces, gpa + size)?;
        let starts: Vec<u64> = pieces.range(gpa..gpa + size).map(|(at, _)| *at).collect();
        for at in starts {
            let piece = self.remove(&mut pieces, at);
            if let (Some(piece), Some(flags)) = (piece, flags) {
                self.insert(&mut pieces, at, Piece { flags, ..piece })?;
            }
        }
        Ok(())
    }

    /// What the guest may do at an address; 0 if nothing is mapped there.
    pub(super) fn flags(&self, gpa: u64) -> u64 {
        let pieces = lock(&self.pieces);
        let piece = pieces.range(..=gpa).next_back().filter(|(at, piece)| gpa - **at < piece.size);
        piece.map_or(0, |(_, piece)| piece.flags)
    }
}
