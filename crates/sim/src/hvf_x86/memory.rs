//! Guest memory: mappings in whole pages, whose protection changes page by page.
//!
//! The processors' RAM knows a mapping as a whole, writable only while all of it is. Where a part of it is not, allowed writes come over the
//! processors' bus ([`Memory::write`]), so that protecting a page costs no change of RAM, which stops all processors. Locked
//! instructions are not atomic there.

use super::{complain, lock};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use vm_accel_softcpu::Ram;
use vm_accel_sys::hvf::{HvReturn, code, memory};

/// Pages are 4 KiB for the platform.
pub(super) const PAGE: u64 = 4096;
/// Guest-physical addresses are this wide.
pub(super) const PHYSICAL_BITS: u32 = 46;
const ALL_FLAGS: u64 = memory::READ | memory::WRITE | memory::EXEC;

#[derive(Debug)]
struct Mapping {
    size: u64,
    host: usize,
    /// RAM takes the guest's writes.
    writable: bool,
    /// The protection from an offset to the next.
    flags: BTreeMap<u64, u64>,
}

impl Mapping {
    fn flags(&self, offset: u64) -> u64 {
        self.flags.range(..=offset).next_back().map_or(0, |(_, flags)| *flags)
    }

    fn protect(&mut self, from: u64, to: u64, flags: u64) {
        let after = self.flags(to);
        self.flags.retain(|at, _| !(from..to).contains(at));
        self.flags.insert(from, flags);
        if to < self.size {
            self.flags.entry(to).or_insert(after);
        }
    }
}

/// What is mapped where.
#[derive(Debug)]
pub(super) struct Memory {
    pub(super) ram: Arc<Ram>,
    mappings: Mutex<BTreeMap<u64, Mapping>>,
}

fn find(mappings: &mut BTreeMap<u64, Mapping>, gpa: u64) -> Option<(u64, &mut Mapping)> {
    let (at, mapping) = mappings.range_mut(..=gpa).next_back()?;
    (gpa - at < mapping.size).then_some((*at, mapping))
}

impl Memory {
    pub(super) fn new() -> Self {
        Self { ram: Ram::new(), mappings: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Mapping>> {
        lock(&self.mappings)
    }

    fn check(gpa: u64, size: u64, flags: u64) -> Result<(), HvReturn> {
        let fits = gpa.checked_add(size).is_some_and(|end| end <= 1 << PHYSICAL_BITS);
        let aligned = gpa.is_multiple_of(PAGE) && size.is_multiple_of(PAGE) && size != 0;
        if aligned && fits && flags & !ALL_FLAGS == 0 { Ok(()) } else { Err(code::BAD_ARGUMENT) }
    }

    fn map_ram(&self, gpa: u64, host: usize, size: u64, writable: bool) -> Result<(), HvReturn> {
        // SAFETY: the caller of the platform promises that the memory is his as long as it is mapped (hv_vm_map); the guest's
        // accesses are volatile and through raw pointers.
        let mapped = unsafe { self.ram.map(gpa, host as *mut u8, size, writable, Arc::new(())) };
        mapped.map_err(|_| code::NO_RESOURCES)
    }

    pub(super) fn map(&self, host: usize, gpa: u64, size: u64, flags: u64) -> Result<(), HvReturn> {
        Self::check(gpa, size, flags)?;
        if host == 0 || !(host as u64).is_multiple_of(PAGE) || flags & memory::READ == 0 {
            complain(format!("hv_vm_map: host address {host:#x}, flags {flags:#x}"));
            return Err(code::BAD_ARGUMENT);
        }
        let mut mappings = self.lock();
        if mappings.range(..gpa + size).next_back().is_some_and(|(at, mapping)| at + mapping.size > gpa) {
            return Err(code::ERROR);
        }
        let writable = flags & memory::WRITE != 0;
        self.map_ram(gpa, host, size, writable)?;
        mappings.insert(gpa, Mapping { size, host, writable, flags: BTreeMap::from([(0, flags)]) });
        Ok(())
    }

    /// Unmaps a mapping; a part of one, which nobody does here, is refused.
    pub(super) fn unmap(&self, gpa: u64, size: u64) -> Result<(), HvReturn> {
        Self::check(gpa, size, 0)?;
        let mut mappings = self.lock();
        if mappings.get(&gpa).is_none_or(|mapping| mapping.size != size) || self.ram.unmap(gpa).is_err() {
            return Err(code::ERROR);
        }
        mappings.remove(&gpa);
        Ok(())
    }

    /// Changes the protection of a mapping or a part of it.
    pub(super) fn protect(&self, gpa: u64, size: u64, flags: u64) -> Result<(), HvReturn> {
        Self::check(gpa, size, flags)?;
        let mut mappings = self.lock();
        let Some((at, mapping)) = find(&mut mappings, gpa) else {
            return Err(code::ERROR);
        };
        let (from, to) = (gpa - at, gpa - at + size);
        if to > mapping.size || flags & memory::READ == 0 {
            return Err(code::ERROR);
        }
        mapping.protect(from, to, flags);
        let is_whole = from == 0 && to == mapping.size;
        let writable = flags & memory::WRITE != 0 && (is_whole || mapping.writable);
        if writable != mapping.writable {
            mapping.writable = writable;
            let unmapped = self.ram.unmap(at).map_err(|_| code::ERROR);
            unmapped.and_then(|()| self.map_ram(at, mapping.host, mapping.size, writable))?;
        }
        Ok(())
    }

    /// What the guest may do at an address; 0 if nothing is mapped there.
    pub(super) fn flags(&self, gpa: u64) -> u64 {
        find(&mut self.lock(), gpa).map_or(0, |(at, mapping)| mapping.flags(gpa - at))
    }

    /// A write that RAM does not take, of 1 to 8 bytes that do not cross a page. False if it is not allowed.
    pub(super) fn write(&self, gpa: u64, data: &[u8]) -> bool {
        let host = match find(&mut self.lock(), gpa) {
            Some((at, mapping)) if mapping.flags(gpa - at) & memory::WRITE != 0 => mapping.host + (gpa - at) as usize,
            _ => return false,
        };
        /// Stores a value at once if it is aligned.
        macro_rules! store {
            ($int:ty, $atomic:ty) => {
                if let (Ok(bytes), true) = (data.try_into(), host % size_of::<$int>() == 0) {
                    // SAFETY: inside a mapping, which its owner keeps valid (hv_vm_map), and aligned; other threads access
                    // the guest's memory by atomic or volatile operations only.
                    let cell = unsafe { <$atomic>::from_ptr(std::ptr::with_exposed_provenance_mut(host)) };
                    cell.store(<$int>::from_ne_bytes(bytes), Ordering::SeqCst);
                    self.ram.invalidate_code(gpa, data.len() as u64);
                    return true;
                }
            };
        }
        store!(u64, AtomicU64);
        store!(u32, AtomicU32);
        store!(u16, AtomicU16);
        for (n, byte) in data.iter().enumerate() {
            // SAFETY: as above; a byte is always aligned.
            let cell = unsafe { AtomicU8::from_ptr(std::ptr::with_exposed_provenance_mut(host + n)) };
            cell.store(*byte, Ordering::SeqCst);
        }
        self.ram.invalidate_code(gpa, data.len() as u64);
        true
    }
}
