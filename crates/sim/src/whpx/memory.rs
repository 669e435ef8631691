//! Guest memory: mappings that replace one another, dirty bitmaps, and the gate that stops all processors for a change.

use super::{Answer, code, lock, misuse};
use std::sync::{Arc, Condvar, Mutex};
use vm_accel_softcpu::Ram;
use vm_accel_sys::whpx::code::{E_INVALIDARG, WHV_E_GPA_RANGE_NOT_FOUND};
use vm_accel_sys::whpx::x86_64::defs::{
    WHvMapGpaRangeFlagRead, WHvMapGpaRangeFlagTrackDirtyPages, WHvMapGpaRangeFlagWrite,
};

/// Pages are 4 KiB for the platform, whatever the host's are.
pub(super) const PAGE: u64 = 4096;
/// Guest-physical addresses are this wide.
pub(super) const PHYSICAL_BITS: u32 = 46;
/// All flags that exist.
const ALL_FLAGS: i32 = 0xf;

/// A range of guest-physical memory.
#[derive(Debug, Clone)]
struct Mapping {
    gpa: u64,
    size: u64,
    host: usize,
    flags: i32,
    /// One bit per page; only with `TrackDirtyPages`.
    dirty: Vec<u64>,
}

impl Mapping {
    fn end(&self) -> u64 {
        self.gpa + self.size
    }

    fn has(&self, flag: i32) -> bool {
        self.flags & flag != 0
    }

    /// The part between two addresses inside.
    fn part(&self, from: u64, to: u64) -> Self {
        let mut part =
            Self { gpa: from, size: to - from, host: self.host + (from - self.gpa) as usize, ..self.clone() };
        part.dirty = vec![0; words(part.size)];
        for page in 0..part.size / PAGE {
            let old = (from - self.gpa) / PAGE + page;
            if self.dirty.get(old as usize / 64).is_some_and(|word| word >> (old % 64) & 1 != 0) {
                part.dirty[page as usize / 64] |= 1 << (page % 64);
            }
        }
        part
    }
}

fn words(size: u64) -> usize {
    (size / PAGE).div_ceil(64) as usize
}

/// The memory of a partition.
#[derive(Debug)]
pub(super) struct Memory {
    pub(super) ram: Arc<Ram>,
    mappings: Mutex<Vec<Mapping>>,
    pub(super) gate: Gate,
}

impl Memory {
    pub(super) fn new() -> Self {
        Self { ram: Ram::new(), mappings: Mutex::default(), gate: Gate::default() }
    }

    fn check(gpa: u64, size: u64) -> Answer {
        let fits = gpa.checked_add(size).is_some_and(|end| end <= 1 << PHYSICAL_BITS);
        if !(gpa | size).is_multiple_of(PAGE) || size == 0 || !fits { code(E_INVALIDARG) } else { Ok(()) }
    }

    /// Maps host memory, in place of whatever is mapped there.
    pub(super) fn map(&self, source: usize, gpa: u64, size: u64, flags: i32) -> Answer {
        Self::check(gpa, size)?;
        if source == 0
            || !(source as u64).is_multiple_of(PAGE)
            || flags & !ALL_FLAGS != 0
            || flags & WHvMapGpaRangeFlagRead == 0
        {
            return code(E_INVALIDARG);
        }
        let mut mappings = lock(&self.mappings);
        self.cut(&mut mappings, gpa, size)?;
        self.insert(&mut mappings, Mapping { gpa, size, host: source, flags, dirty: vec![0; words(size)] })
    }

    /// Unmaps a range, which may be a part of one or several mappings.
    pub(super) fn unmap(&self, gpa: u64, size: u64) -> Answer {
        Self::check(gpa, size)?;
        let mut mappings = lock(&self.mappings);
        if !is_covered(&mappings, gpa, size, 0) {
            return code(WHV_E_GPA_RANGE_NOT_FOUND);
        }
        self.cut(&mut mappings, gpa, size)
    }

    /// Removes a range; what mappings have outside of it stays.
    fn cut(&self, mappings: &mut Vec<Mapping>, gpa: u64, size: u64) -> Answer {
        let end = gpa + size;
        while let Some(at) = mappings.iter().position(|m| m.gpa < end && gpa < m.end()) {
            self.harvest(&mut mappings[at]);
            let old = mappings.swap_remove(at);
            if self.ram.unmap(old.gpa).is_err() {
                return misuse(format!("the simulator lost its mapping at {:#x}", old.gpa));
            }
            if old.gpa < gpa {
                self.insert(mappings, old.part(old.gpa, gpa))?;
            }
            if end < old.end() {
                self.insert(mappings, old.part(end, old.end()))?;
            }
        }
        Ok(())
    }

    fn insert(&self, mappings: &mut Vec<Mapping>, mapping: Mapping) -> Answer {
        let writable = mapping.has(WHvMapGpaRangeFlagWrite);
        // SAFETY: the caller of the platform promises that the memory is his as long as it is mapped (WHvMapGpaRange);
        // the guest's accesses are volatile and through raw pointers.
        let mapped =
            unsafe { self.ram.map(mapping.gpa, mapping.host as *mut u8, mapping.size, writable, Arc::new(())) };
        if mapped.is_err()
            || self.ram.set_dirty_log(mapping.gpa, mapping.has(WHvMapGpaRangeFlagTrackDirtyPages)).is_err()
        {
            return code(E_INVALIDARG);
        }
        mappings.push(mapping);
        Ok(())
    }

    /// Takes over what the processors wrote.
    fn harvest(&self, mapping: &mut Mapping) {
        if mapping.has(WHvMapGpaRangeFlagTrackDirtyPages) {
            for (kept, new) in mapping.dirty.iter_mut().zip(self.ram.take_dirty_log(mapping.gpa).unwrap_or_default()) {
                *kept |= new;
            }
        }
    }

    /// The pages of a range that were written since the last call, which forgets them.
    pub(super) fn take_dirty(&self, gpa: u64, size: u64) -> Answer<Vec<u64>> {
        Self::check(gpa, size)?;
        let mut mappings = lock(&self.mappings);
        if !is_covered(&mappings, gpa, size, WHvMapGpaRangeFlagTrackDirtyPages) {
            return code(WHV_E_GPA_RANGE_NOT_FOUND);
        }
        let mut bitmap = vec![0; words(size)];
        for mapping in mappings.iter_mut().filter(|m| m.gpa < gpa + size && gpa < m.end()) {
            self.harvest(mapping);
            let (from, to) = (mapping.gpa.max(gpa), mapping.end().min(gpa + size));
            for page in from / PAGE..to / PAGE {
                let (mine, theirs) = (page - mapping.gpa / PAGE, page - gpa / PAGE);
                let bit = &mut mapping.dirty[mine as usize / 64];
                bitmap[theirs as usize / 64] |= (*bit >> (mine % 64) & 1) << (theirs % 64);
                *bit &= !(1 << (mine % 64));
            }
        }
        Ok(bitmap)
    }

    /// Whether all of a range is mapped.
    pub(super) fn is_mapped(&self, gpa: u64, size: u64) -> bool {
        is_covered(&lock(&self.mappings), gpa, size, 0)
    }

    /// Whether the guest may write there.
    pub(super) fn is_writable(&self, gpa: u64) -> bool {
        is_covered(&lock(&self.mappings), gpa, 1, WHvMapGpaRangeFlagWrite)
    }

    /// Copies out of guest memory; false if a byte is not mapped.
    pub(super) fn read(&self, gpa: u64, data: &mut [u8]) -> bool {
        let mappings = lock(&self.mappings);
        data.iter_mut().zip(gpa..).all(|(byte, at)| {
            let mapping = mappings.iter().find(|m| m.gpa <= at && at < m.end());
            mapping.is_some_and(|m| {
                // SAFETY: inside a mapping, which its owner keeps valid; volatile, because the guest may write it.
                *byte = unsafe { ((m.host + (at - m.gpa) as usize) as *const u8).read_volatile() };
                true
            })
        })
    }

    /// Copies into guest memory; false if a byte is not mapped.
    pub(super) fn write(&self, gpa: u64, data: &[u8]) -> bool {
        let mappings = lock(&self.mappings);
        data.iter().zip(gpa..).all(|(byte, at)| {
            let mapping = mappings.iter().find(|m| m.gpa <= at && at < m.end() && m.has(WHvMapGpaRangeFlagWrite));
            mapping.is_some_and(|m| {
                // SAFETY: as in `read`, and the mapping is one that may be written.
                unsafe { ((m.host + (at - m.gpa) as usize) as *mut u8).write_volatile(*byte) };
                true
            })
        })
    }
}

fn is_covered(mappings: &[Mapping], gpa: u64, size: u64, flag: i32) -> bool {
    let end = gpa + size;
    let mut at = gpa;
    while at < end {
        match mappings.iter().find(|m| m.gpa <= at && at < m.end() && (flag == 0 || m.has(flag))) {
            Some(mapping) => at = mapping.end(),
            None => return false,
        }
    }
    true
}

/// Lets processors run, or a change happen, never both: a guest must not see a mapping that is being replaced.
#[derive(Debug, Default)]
pub(super) struct Gate {
    state: Mutex<GateState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct GateState {
    inside: u32,
    closed: u32,
}

/// Keeps the gate closed.
pub(super) struct Closed<'a>(&'a Gate);

impl Gate {
    /// A processor goes in; it waits while the gate is closed.
    pub(super) fn enter(&self) {
        let mut state = lock(&self.state);
        while state.closed != 0 {
            state = self.changed.wait(state).unwrap_or_else(std::sync::PoisonError::into_inner);
        }
        state.inside += 1;
    }

    pub(super) fn leave(&self) {
        lock(&self.state).inside -= 1;
        self.changed.notify_all();
    }

    /// Closes the gate and waits for those inside, whom `drive_out` makes leave.
    pub(super) fn close(&self, drive_out: impl FnOnce()) -> Closed<'_> {
        lock(&self.state).closed += 1;
        drive_out();
        let mut state = lock(&self.state);
        while state.inside != 0 {
            state = self.changed.wait(state).unwrap_or_else(std::sync::PoisonError::into_inner);
        }
        Closed(self)
    }
}

impl Drop for Closed<'_> {
    fn drop(&mut self) {
        lock(&self.0.state).closed -= 1;
        self.0.changed.notify_all();
    }
}
