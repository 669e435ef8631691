//! Adapters to rust-vmm's `vm-memory` 0.18 (feature `vm-memory`), for device crates that are written against its traits.
//!
//! [`GuestMemory::to_vm_memory`] gives a collection of [`VmMemoryRegion`]s, which is a `vm_memory::GuestMemoryBackend`:
//! a picture of the regions at that moment, as `vm-memory` wants it; it keeps their bytes mapped. Writes through it are
//! recorded by [`GuestRegion::track_dirty`] like all others.
//!
//! It must never give out memory that a write through safe code would fault on: `vm-memory` has no read-only slices, so
//! read-only regions are there by address, but every access to their bytes answers `HostAddressNotAvailable`.

use super::{GuestMemory, GuestRegion};
use crate::error::{AccelError, VcpuResult};
use ::vm_memory::bitmap::{BS, Bitmap, BitmapSlice, WithBitmapSlice};
use ::vm_memory::{
    GuestAddress, GuestMemoryError, GuestMemoryRegion, GuestMemoryRegionBytes, GuestMemoryResult,
    GuestRegionCollection, GuestUsize, MemoryRegionAddress, VolatileSlice,
};

/// A [`GuestRegion`] at its guest physical address, as a `vm_memory::GuestMemoryRegion`.
#[derive(Debug, Clone)]
pub struct VmMemoryRegion {
    start: GuestAddress,
    region: GuestRegion,
}

impl VmMemoryRegion {
    /// The region's own type again.
    #[must_use]
    pub fn region(&self) -> &GuestRegion {
        &self.region
    }

    fn writable(&self) -> GuestMemoryResult<&GuestRegion> {
        match self.region.is_writable() {
            true => Ok(&self.region),
            false => Err(GuestMemoryError::HostAddressNotAvailable),
        }
    }
}

impl GuestMemory {
    /// The regions as they are now, for `vm-memory`'s users. Later changes of the set do not show in it.
    ///
    /// # Errors
    /// [`AccelError::InvalidArgument`] if `vm-memory` refuses the set.
    pub fn to_vm_memory(&self) -> VcpuResult<GuestRegionCollection<VmMemoryRegion>> {
        let regions: Vec<_> = self
            .regions()
            .into_iter()
            .map(|(gpa, region)| VmMemoryRegion { start: GuestAddress(gpa), region })
            .collect();
        if regions.is_empty() {
            return Ok(GuestRegionCollection::new());
        }
        GuestRegionCollection::from_regions(regions)
            .map_err(|error| AccelError::invalid("guest memory", error.to_string()))
    }
}

impl GuestMemoryRegion for VmMemoryRegion {
    type B = GuestRegion;

    fn len(&self) -> GuestUsize {
        self.region.size()
    }

    fn start_addr(&self) -> GuestAddress {
        self.start
    }

    fn bitmap(&self) -> BS<'_, Self::B> {
        self.region.slice_at(0)
    }

    fn get_host_address(&self, addr: MemoryRegionAddress) -> GuestMemoryResult<*mut u8> {
        self.writable()?.range(addr.0, 1).map_err(|_| GuestMemoryError::InvalidBackendAddress)
    }

    fn get_slice(
        &self,
        offset: MemoryRegionAddress,
        count: usize,
    ) -> GuestMemoryResult<VolatileSlice<'_, BS<'_, Self::B>>> {
        let ptr =
            self.writable()?.range(offset.0, count as u64).map_err(|_| GuestMemoryError::InvalidBackendAddress)?;
        let bitmap = self.region.slice_at(offset.0 as usize);
        // SAFETY: `range` checked that the bytes lie in the mapping, which may be written and which `self.region` keeps
        // for the slice's lifetime; nobody makes references to guest bytes.
        Ok(unsafe { VolatileSlice::with_bitmap(ptr, count, bitmap, None) })
    }
}

impl GuestMemoryRegionBytes for VmMemoryRegion {}

/// `vm-memory`'s view of the host-write record of a part of a region.
#[derive(Debug, Clone, Copy)]
pub struct HostDirtySlice<'a> {
    region: &'a GuestRegion,
    start: u64,
}

impl<'a> WithBitmapSlice<'a> for GuestRegion {
    type S = HostDirtySlice<'a>;
}

impl Bitmap for GuestRegion {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.slice_at(0).mark_dirty(offset, len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.slice_at(0).dirty_at(offset)
    }

    fn slice_at(&self, offset: usize) -> HostDirtySlice<'_> {
        HostDirtySlice { region: self, start: offset as u64 }
    }
}

impl<'a> WithBitmapSlice<'_> for HostDirtySlice<'a> {
    type S = HostDirtySlice<'a>;
}

impl BitmapSlice for HostDirtySlice<'_> {}

impl Bitmap for HostDirtySlice<'_> {
    fn mark_dirty(&self, offset: usize, len: usize) {
        // The trait cannot report an error; the part of a range that lies outside has no page to mark.
        let start = self.start.saturating_add(offset as u64).min(self.region.size());
        let len = (len as u64).min(self.region.size() - start);
        let _ = self.region.mark_dirty(start, len);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.region.is_host_dirty(self.start.saturating_add(offset as u64))
    }

    fn slice_at(&self, offset: usize) -> Self {
        Self { region: self.region, start: self.start.saturating_add(offset as u64) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{FileMapping, host_page_size};
    use ::vm_memory::{Bytes, GuestMemoryBackend};
    use std::sync::atomic::Ordering;

    fn memory() -> GuestMemory {
        let memory = GuestMemory::new();
        for gpa in [0, 0x10000] {
            memory.insert(gpa, GuestRegion::anonymous(0x10000).unwrap()).unwrap();
        }
        memory
    }

    #[test]
    fn both_views_show_the_same_bytes_over_region_borders() {
        let memory = memory();
        let view = memory.to_vm_memory().unwrap();
        assert_eq!((view.num_regions(), view.last_addr()), (2, GuestAddress(0x1ffff)));
        view.write_obj(0x1122_3344_5566_7788u64, GuestAddress(0xfffc)).unwrap();
        assert_eq!(memory.read_u64(0xfffc).unwrap(), 0x1122_3344_5566_7788);
        memory.write(0x10000, b"device").unwrap();
        let mut bytes = [0; 6];
        view.read_slice(&mut bytes, GuestAddress(0x10000)).unwrap();
        assert_eq!(&bytes, b"device");
        view.store(7u32, GuestAddress(0x20), Ordering::Release).unwrap();
        assert_eq!(memory.load::<u32>(0x20, Ordering::Acquire).unwrap(), 7);
        assert!(view.write_obj(0u64, GuestAddress(0x1fffc)).is_err());
        assert!(view.read_obj::<u8>(GuestAddress(0x20000)).is_err());
    }

    #[test]
    fn writes_through_the_adapter_are_recorded() {
        let memory = memory();
        let (_, second) = &memory.regions()[1];
        second.track_dirty(true);
        let view = memory.to_vm_memory().unwrap();
        view.write_slice(&[1; 0x10], GuestAddress(0xfff8)).unwrap();
        view.write_obj(1u8, GuestAddress(0x13fff)).unwrap();
        let slice = view.get_slice(GuestAddress(0x15000), 0x2000).unwrap();
        slice.offset(0x1000).unwrap().write_obj(1u8, 0).unwrap();
        let bitmap = view.find_region(GuestAddress(0x10000)).unwrap().bitmap();
        assert!(bitmap.dirty_at(0x3000) && !bitmap.dirty_at(0x2000) && !bitmap.dirty_at(usize::MAX));
        bitmap.mark_dirty(usize::MAX, usize::MAX);
        let dirty: Vec<_> = second.take_host_dirty().ranges().collect();
        assert_eq!(dirty, vec![0..0x1000, 0x3000..0x4000, 0x6000..0x7000]);
    }

    #[test]
    fn a_view_keeps_regions_that_were_removed() {
        let memory = memory();
        let view = memory.to_vm_memory().unwrap();
        drop(memory.remove(0).unwrap());
        view.write_obj(1u8, GuestAddress(0)).unwrap();
        assert_eq!(memory.to_vm_memory().unwrap().num_regions(), 1);
        assert_eq!(GuestMemory::new().to_vm_memory().unwrap().num_regions(), 0);
    }

    #[test]
    fn read_only_regions_refuse_slices_instead_of_faulting() {
        let file = std::fs::File::open(std::env::current_exe().unwrap()).unwrap();
        let rom = GuestRegion::from_file(&file, 0, host_page_size(), FileMapping::ReadOnly).unwrap();
        let memory = memory();
        memory.insert(0x10_0000, rom).unwrap();
        let view = memory.to_vm_memory().unwrap();
        assert_eq!(view.num_regions(), 3);
        assert!(matches!(view.write_obj(0u8, GuestAddress(0x10_0000)), Err(GuestMemoryError::HostAddressNotAvailable)));
        assert!(view.get_host_address(GuestAddress(0x10_0000)).is_err());
    }
}
