//! The table of memory mappings of one virtual machine, for platforms that keep none themselves.
//!
//! What every backend must refuse is refused here, before the platform sees it; what the platform does with a mapping is
//! its [`Mapper`]. A call that fails leaves table and platform as they were.

use crate::lock;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Mutex, MutexGuard};
use vm_accel_core::accel::{AccelKind, MemoryFlags};
use vm_accel_core::error::{AccelError, VcpuResult};
use vm_accel_core::memory::{DirtyBitmap, GuestRegion};

/// What a platform does with mappings; addresses and flags were checked.
pub trait Mapper: fmt::Debug + Send + Sync {
    /// What must live as long as a mapping.
    type Hold: fmt::Debug + Send + Sync;

    /// Maps a region where nothing is mapped.
    fn map(&self, gpa: u64, region: &GuestRegion, flags: MemoryFlags) -> VcpuResult<Self::Hold>;

    /// Removes a mapping of `size` bytes; after that the platform does not touch its host memory.
    fn unmap(&self, gpa: u64, size: u64) -> VcpuResult<()>;

    /// Changes whether a mapping's writes are logged, its rights stay as they are. The log starts clean.
    fn log_dirty(&self, gpa: u64, region: &GuestRegion, flags: MemoryFlags) -> VcpuResult<()>;

    /// Takes the guest's part of the dirty log: one bit per page of the platform.
    fn take_dirty(&self, gpa: u64, size: u64) -> VcpuResult<Vec<u64>>;
}

/// What a platform asks of mappings.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    /// For errors.
    pub kind: AccelKind,
    /// Addresses and sizes are multiples of it: bytes, a power of two.
    pub page: u64,
    /// Bits of a guest physical address.
    pub address_bits: u8,
    /// Most mappings at a time.
    pub most: u32,
    /// Memory can be mapped that the guest may not execute.
    pub no_execute: bool,
}

#[derive(Debug)]
struct Slot<H> {
    region: GuestRegion,
    flags: MemoryFlags,
    _hold: H,
}

/// The mappings, and the platform behind them.
#[derive(Debug)]
pub struct Slots<M: Mapper> {
    /// The platform.
    pub mapper: M,
    rules: Rules,
    map: Mutex<BTreeMap<u64, Slot<M::Hold>>>,
}

fn no_mapping(gpa: u64) -> AccelError {
    AccelError::invalid("guest physical address", format!("no mapping starts at {gpa:#x}"))
}

impl<M: Mapper> Slots<M> {
    /// An empty table.
    pub fn new(mapper: M, rules: Rules) -> Self {
        Self { mapper, rules, map: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Slot<M::Hold>>> {
        lock(&self.map)
    }

    /// Checks what can be checked without looking at other mappings.
    fn check(&self, gpa: u64, region: &GuestRegion, flags: MemoryFlags) -> VcpuResult<()> {
        let (size, Rules { page, address_bits, .. }) = (region.size(), self.rules);
        let bad = |why: String| Err(AccelError::invalid("mapping", format!("{size:#x} bytes at {gpa:#x}: {why}")));
        if (gpa | size) % page != 0 {
            return bad(format!("address and size must be multiples of the page size {page:#x}"));
        }
        if gpa.checked_add(size).is_none_or(|end| end > 1 << address_bits) {
            return bad(format!("guest physical addresses have {address_bits} bits here"));
        }
        if !flags.contains(MemoryFlags::READ) {
            return bad("memory must be readable".into());
        }
        if !flags.contains(MemoryFlags::EXECUTE) && !self.rules.no_execute {
            return Err(AccelError::Unsupported {
                kind: Some(self.rules.kind),
                what: "memory that the guest cannot execute",
            });
        }
        if flags.contains(MemoryFlags::WRITE) && !region.is_writable() {
            return bad("the host memory is read-only".into());
        }
        Ok(())
    }

    fn slot(&self, gpa: u64, region: &GuestRegion, flags: MemoryFlags) -> VcpuResult<Slot<M::Hold>> {
        let hold = self.mapper.map(gpa, region, flags)?;
        if flags.contains(MemoryFlags::LOG_DIRTY) {
            // Never off again: another mapping of the same region may still be logged.
            region.track_dirty(true);
        }
        Ok(Slot { region: region.clone(), flags, _hold: hold })
    }

    /// See [`Accel::map_memory`](vm_accel_core::Accel::map_memory).
    pub fn map(&self, gpa: u64, region: &GuestRegion, flags: MemoryFlags) -> VcpuResult<()> {
        self.check(gpa, region, flags)?;
        let mut map = self.lock();
        if map.len() >= self.rules.most as usize {
            return Err(AccelError::invalid("mapping", format!("all {} memory slots are in use", map.len())));
        }
        let (size, end) = (region.size(), gpa + region.size());
        // The last one that starts below the end is the only one that can reach into the range.
        if map.range(..end).next_back().is_some_and(|(at, slot)| at + slot.region.size() > gpa) {
            let why = format!("{size:#x} bytes at {gpa:#x}: overlaps another mapping");
            return Err(AccelError::invalid("mapping", why));
        }
        let slot = self.slot(gpa, region, flags)?;
        map.insert(gpa, slot);
        Ok(())
    }

    /// See [`Accel::unmap_memory`](vm_accel_core::Accel::unmap_memory).
    pub fn unmap(&self, gpa: u64) -> VcpuResult<()> {
        let mut map = self.lock();
        let size = map.get(&gpa).ok_or_else(|| no_mapping(gpa))?.region.size();
        self.mapper.unmap(gpa, size)?;
        map.remove(&gpa);
        Ok(())
    }

    /// Puts another mapping in the place of one; vCPUs that run meanwhile may see the range unmapped for a moment. Where the
    /// platform refuses the new one the old one is put back.
    pub fn remap(&self, gpa: u64, region: &GuestRegion, flags: MemoryFlags) -> VcpuResult<()> {
        self.check(gpa, region, flags)?;
        let mut map = self.lock();
        let old = map.get_mut(&gpa).ok_or_else(|| no_mapping(gpa))?;
        if old.region.size() != region.size() {
            let (new, old) = (region.size(), old.region.size());
            return Err(AccelError::invalid("mapping", format!("{gpa:#x}: {new:#x} bytes cannot replace {old:#x}")));
        }
        self.mapper.unmap(gpa, region.size())?;
        match self.slot(gpa, region, flags) {
            Ok(new) => *old = new,
            Err(why) => {
                match self.slot(gpa, &old.region.clone(), old.flags) {
                    Ok(back) => *old = back,
                    Err(_) => drop(map.remove(&gpa)),
                }
                return Err(why);
            }
        }
        Ok(())
    }

    /// See [`Accel::protect_memory`](vm_accel_core::Accel::protect_memory).
    pub fn protect(&self, gpa: u64, flags: MemoryFlags) -> VcpuResult<()> {
        let (region, old) = {
            let map = self.lock();
            let slot = map.get(&gpa).ok_or_else(|| no_mapping(gpa))?;
            (slot.region.clone(), slot.flags)
        };
        if (old ^ flags).intersects(MemoryFlags::WRITE | MemoryFlags::EXECUTE) {
            return self.remap(gpa, &region, flags);
        }
        self.check(gpa, &region, flags)?;
        if flags.contains(MemoryFlags::LOG_DIRTY) {
            region.track_dirty(true);
        }
        self.mapper.log_dirty(gpa, &region, flags)?;
        if let Some(slot) = self.lock().get_mut(&gpa) {
            slot.flags = flags;
        }
        Ok(())
    }

    /// See [`Accel::take_dirty`](vm_accel_core::Accel::take_dirty).
    pub fn take_dirty(&self, gpa: u64) -> VcpuResult<DirtyBitmap> {
        let map = self.lock();
        let slot = map.get(&gpa).ok_or_else(|| no_mapping(gpa))?;
        if !slot.flags.contains(MemoryFlags::LOG_DIRTY) {
            return Err(AccelError::invalid(
                "guest physical address",
                format!("the mapping at {gpa:#x} is not logged"),
            ));
        }
        let words = self.mapper.take_dirty(gpa, slot.region.size())?;
        let mut dirty = DirtyBitmap::from_log(gpa, slot.region.size(), &words, self.rules.page)?;
        dirty.union(&slot.region.take_host_dirty().with_base(gpa)?)?;
        Ok(dirty)
    }

    /// Moves bytes to or from the mapping that holds an address, as far as the guest may; false if it may not.
    pub fn access(&self, gpa: u64, is_write: bool, data: &mut [u8]) -> bool {
        match self.find(gpa) {
            Some((region, at, flags)) if is_write => {
                flags.contains(MemoryFlags::WRITE) && region.write(at, data).is_ok()
            }
            Some((region, at, _)) => region.read(at, data).is_ok(),
            None => false,
        }
    }

    /// Calls `each` for every mapping until one fails.
    pub fn try_each(&self, mut each: impl FnMut(u64, &GuestRegion, MemoryFlags) -> VcpuResult<()>) -> VcpuResult<()> {
        self.lock().iter().try_for_each(|(gpa, slot)| each(*gpa, &slot.region, slot.flags))
    }

    /// The mapping that holds an address: region, offset in it, what the guest may do.
    pub fn find(&self, gpa: u64) -> Option<(GuestRegion, u64, MemoryFlags)> {
        let map = self.lock();
        let (at, slot) = map.range(..=gpa).next_back()?;
        (gpa - at < slot.region.size()).then(|| (slot.region.clone(), gpa - at, slot.flags))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use vm_accel_core::memory::host_page_size;

    /// A platform that refuses mappings which log writes while `refuses` is set.
    #[derive(Debug, Default)]
    struct Picky {
        mapped: Mutex<BTreeSet<u64>>,
        refuses: Mutex<bool>,
    }

    impl Mapper for Picky {
        type Hold = ();

        fn map(&self, gpa: u64, _: &GuestRegion, flags: MemoryFlags) -> VcpuResult<()> {
            if *lock(&self.refuses) && flags.contains(MemoryFlags::LOG_DIRTY) {
                return Err(AccelError::invalid("mapping", "refused"));
            }
            assert!(lock(&self.mapped).insert(gpa), "mapped twice");
            Ok(())
        }

        fn unmap(&self, gpa: u64, _: u64) -> VcpuResult<()> {
            assert!(lock(&self.mapped).remove(&gpa), "not mapped");
            Ok(())
        }

        fn log_dirty(&self, _: u64, _: &GuestRegion, _: MemoryFlags) -> VcpuResult<()> {
            Ok(())
        }

        fn take_dirty(&self, _: u64, size: u64) -> VcpuResult<Vec<u64>> {
            Ok(vec![0; (size / host_page_size()).div_ceil(64) as usize])
        }
    }

    fn slots() -> Slots<Picky> {
        let page = host_page_size();
        let rules = Rules { kind: AccelKind::Fallback, page, address_bits: 32, most: 2, no_execute: false };
        Slots::new(Picky::default(), rules)
    }

    #[test]
    fn what_does_not_fit_is_refused_before_the_platform_sees_it() {
        let (slots, page) = (slots(), host_page_size());
        let region = GuestRegion::anonymous(4 * page).unwrap();
        slots.map(8 * page, &region, MemoryFlags::RAM).unwrap();
        for gpa in [5 * page, 8 * page, 11 * page, 1, (1 << 32) - page, u64::MAX - page + 1] {
            assert!(slots.map(gpa, &region, MemoryFlags::RAM).is_err(), "{gpa:#x}");
        }
        assert!(slots.map(0, &region, MemoryFlags::WRITE | MemoryFlags::EXECUTE).is_err());
        assert!(slots.map(0, &region, MemoryFlags::READ).is_err());
        slots.map(4 * page, &region, MemoryFlags::RAM).unwrap();
        assert!(slots.map(16 * page, &region, MemoryFlags::RAM).is_err(), "there are two slots");
        assert_eq!(lock(&slots.mapper.mapped).len(), 2);
    }

    #[test]
    fn a_mapping_is_found_by_every_address_in_it() {
        let (slots, page) = (slots(), host_page_size());
        let region = GuestRegion::anonymous(2 * page).unwrap();
        slots.map(4 * page, &region, MemoryFlags::ROM).unwrap();
        assert!(slots.find(4 * page - 1).is_none() && slots.find(6 * page).is_none());
        let (_, offset, flags) = slots.find(6 * page - 1).unwrap();
        assert_eq!((offset, flags), (2 * page - 1, MemoryFlags::ROM));
    }

    #[test]
    fn a_refused_replacement_leaves_the_old_mapping() {
        let (slots, page) = (slots(), host_page_size());
        let region = GuestRegion::anonymous(page).unwrap();
        slots.map(0, &region, MemoryFlags::RAM).unwrap();
        *lock(&slots.mapper.refuses) = true;
        assert!(slots.remap(0, &region, MemoryFlags::RAM | MemoryFlags::LOG_DIRTY).is_err());
        assert_eq!(slots.find(0).unwrap().2, MemoryFlags::RAM);
        slots.unmap(0).unwrap();
        assert!(slots.unmap(0).is_err());
    }

    #[test]
    fn only_what_is_logged_has_a_log() {
        let (slots, page) = (slots(), host_page_size());
        let region = GuestRegion::anonymous(page).unwrap();
        slots.map(0, &region, MemoryFlags::RAM).unwrap();
        assert!(slots.take_dirty(0).is_err());
        slots.protect(0, MemoryFlags::RAM | MemoryFlags::LOG_DIRTY).unwrap();
        assert!(slots.take_dirty(0).unwrap().is_clean());
        region.write(0, &[1]).unwrap();
        assert!(slots.take_dirty(0).unwrap().is_dirty(0));
    }
}
