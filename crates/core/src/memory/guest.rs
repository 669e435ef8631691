//! Where regions lie in a guest's physical address space: what loaders and devices use.
//!
//! This is the host's view; mapping regions into the guest is the accelerator's business. It must never leave an
//! access half done because of a bad address: ranges are checked as a whole before the first byte moves.

use super::access::GuestWord;
use super::{GuestRegion, host_page_size};
use crate::error::{AccelError, VcpuResult};
use std::fmt;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// A guest's physical memory: regions at guest physical addresses.
///
/// A handle: clones refer to the same set. Devices read and write on their threads while another inserts or removes
/// regions; an access sees the set before or after, and [`remove`](Self::remove) returns when no access is under way any more.
/// Accesses may span regions that lie next to each other.
///
/// Errors name the first guest physical address that the access cannot have.
///
/// ```
/// use vm_accel::memory::{GuestMemory, GuestRegion};
///
/// let memory = GuestMemory::new();
/// memory.insert(0, GuestRegion::anonymous(0x10000)?)?;
/// memory.insert(0x10000, GuestRegion::anonymous(0x10000)?)?;
/// memory.write_u64(0xfffc, 0x1122_3344_5566_7788)?;
/// assert_eq!(memory.read_u32(0x10000)?, 0x1122_3344);
/// assert!(memory.write(0x1fffe, b"too long").is_err());
/// # Ok::<(), vm_accel::AccelError>(())
/// ```
#[derive(Clone, Default)]
pub struct GuestMemory(Arc<RwLock<Vec<Placed>>>);

/// A region at its place. The set is sorted by address, without overlap.
struct Placed {
    gpa: u64,
    region: GuestRegion,
}

impl Placed {
    /// One past the last byte; `insert` made sure that it does not overflow.
    fn end(&self) -> u64 {
        self.gpa + self.region.size()
    }

    fn allows(&self, access: Access) -> bool {
        access == Access::Read || self.region.is_writable()
    }
}

/// What an access does to memory.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Access {
    Read,
    Write,
}

macro_rules! word_accessors {
    ($($read:ident, $write:ident, $word:ident);* $(;)?) => {$(
        #[doc = concat!("Reads a little-endian `", stringify!($word), "`; in one piece if `gpa` is naturally aligned.")]
        ///
        /// # Errors
        /// As for [`read`](Self::read).
        pub fn $read(&self, gpa: u64) -> VcpuResult<$word> {
            if gpa % size_of::<$word>() as u64 == 0 {
                return self.load(gpa, Ordering::Relaxed);
            }
            let mut bytes = [0; size_of::<$word>()];
            self.read(gpa, &mut bytes)?;
            Ok($word::from_le_bytes(bytes))
        }

        #[doc = concat!("Writes a little-endian `", stringify!($word), "`; in one piece if `gpa` is naturally aligned.")]
        ///
        /// # Errors
        /// As for [`write`](Self::write).
        pub fn $write(&self, gpa: u64, value: $word) -> VcpuResult<()> {
            if gpa % size_of::<$word>() as u64 == 0 {
                return self.store(gpa, value, Ordering::Relaxed);
            }
            self.write(gpa, &value.to_le_bytes())
        }
    )*};
}

impl GuestMemory {
    /// A guest without memory.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts a region at a guest physical address.
    ///
    /// # Errors
    /// [`AccelError::InvalidArgument`] if `gpa` is not a multiple of [`host_page_size`], the region would end beyond the
    /// 64-bit address space, or it overlaps another one (which the error names). Nothing is changed then.
    pub fn insert(&self, gpa: u64, region: GuestRegion) -> VcpuResult<()> {
        let page = host_page_size();
        if gpa % page != 0 {
            return Err(AccelError::invalid(
                "guest physical address",
                format!("{gpa:#x} of the region is not a multiple of the host's page size {page:#x}"),
            ));
        }
        let Some(end) = gpa.checked_add(region.size()) else {
            return Err(AccelError::invalid(
                "guest physical address",
                format!("a region of {:#x} bytes at {gpa:#x} ends beyond the address space", region.size()),
            ));
        };
        let mut regions = self.lock_for_change();
        let at = regions.partition_point(|placed| placed.end() <= gpa);
        if let Some(other) = regions.get(at).filter(|other| other.gpa < end) {
            return Err(AccelError::invalid(
                "guest physical address",
                format!("the region [{gpa:#x}, {end:#x}) overlaps the region [{:#x}, {:#x})", other.gpa, other.end()),
            ));
        }
        regions.insert(at, Placed { gpa, region });
        Ok(())
    }

    /// Takes the region away that starts at `gpa`, and returns it.
    ///
    /// # Errors
    /// [`AccelError::InvalidArgument`] if no region starts there.
    pub fn remove(&self, gpa: u64) -> VcpuResult<GuestRegion> {
        let mut regions = self.lock_for_change();
        match regions.binary_search_by_key(&gpa, |placed| placed.gpa) {
            Ok(at) => Ok(regions.remove(at).region),
            Err(_) => Err(AccelError::invalid("guest physical address", format!("no region starts at {gpa:#x}"))),
        }
    }

    /// The regions and where they start, in ascending order.
    #[must_use]
    pub fn regions(&self) -> Vec<(u64, GuestRegion)> {
        self.lock().iter().map(|placed| (placed.gpa, placed.region.clone())).collect()
    }

    /// The region that holds `gpa`, and the offset of `gpa` in it.
    #[must_use]
    pub fn find(&self, gpa: u64) -> Option<(GuestRegion, u64)> {
        let regions = self.lock();
        let placed = &regions[holder(&regions, gpa)?];
        Some((placed.region.clone(), gpa - placed.gpa))
    }

    /// True if all of `len` bytes from `gpa` on are memory (of any kind); true for no bytes.
    #[must_use]
    pub fn contains(&self, gpa: u64, len: u64) -> bool {
        locate(&self.lock(), gpa, len, Access::Read).is_ok()
    }

    /// Copies guest memory into `buf`.
    ///
    /// # Errors
    /// [`AccelError::InvalidArgument`] if not all of the range is memory; `buf` is left alone then.
    pub fn read(&self, gpa: u64, buf: &mut [u8]) -> VcpuResult<()> {
        self.access(gpa, buf.len() as u64, Access::Read, |region, offset, part| {
            region.read(offset, &mut buf[part.start as usize..part.end as usize])
        })
    }

    /// Copies `data` into guest memory.
    ///
    /// # Errors
    /// [`AccelError::InvalidArgument`] if not all of the range is memory that can be written; nothing is written then.
    pub fn write(&self, gpa: u64, data: &[u8]) -> VcpuResult<()> {
        self.access(gpa, data.len() as u64, Access::Write, |region, offset, part| {
            region.write(offset, &data[part.start as usize..part.end as usize])
        })
    }

    /// Sets `len` bytes of guest memory to `byte`.
    ///
    /// # Errors
    /// As for [`write`](Self::write).
    pub fn fill(&self, gpa: u64, len: u64, byte: u8) -> VcpuResult<()> {
        self.access(gpa, len, Access::Write, |region, offset, part| region.fill(offset, part.end - part.start, byte))
    }

    word_accessors! {
        read_u8, write_u8, u8;
        read_u16, write_u16, u16;
        read_u32, write_u32, u32;
        read_u64, write_u64, u64;
    }

    /// [`GuestRegion::load`] at a guest physical address.
    ///
    /// # Errors
    /// [`AccelError::InvalidArgument`] as there, or if no memory is at `gpa`.
    pub fn load<T: GuestWord>(&self, gpa: u64, order: Ordering) -> VcpuResult<T> {
        self.with_region(gpa, Access::Read, |region, offset| region.load(offset, order))
    }

    /// [`GuestRegion::store`] at a guest physical address.
    ///
    /// # Errors
    /// [`AccelError::InvalidArgument`] as there, or if no memory is at `gpa`.
    pub fn store<T: GuestWord>(&self, gpa: u64, value: T, order: Ordering) -> VcpuResult<()> {
        self.with_region(gpa, Access::Write, |region, offset| region.store(offset, value, order))
    }

    /// [`GuestRegion::compare_exchange`] at a guest physical address.
    ///
    /// # Errors
    /// [`AccelError::InvalidArgument`] as there, or if no memory is at `gpa`.
    pub fn compare_exchange<T: GuestWord>(
        &self,
        gpa: u64,
        current: T,
        new: T,
        success: Ordering,
        failure: Ordering,
    ) -> VcpuResult<Result<T, T>> {
        self.with_region(gpa, Access::Write, |region, offset| {
            region.compare_exchange(offset, current, new, success, failure)
        })
    }

    /// For an access that one region holds: an aligned word.
    #[inline]
    fn with_region<R>(
        &self,
        gpa: u64,
        access: Access,
        f: impl FnOnce(&GuestRegion, u64) -> VcpuResult<R>,
    ) -> VcpuResult<R> {
        let regions = self.lock();
        let placed = &regions[holder(&regions, gpa).ok_or_else(|| nothing_at(gpa))?];
        if !placed.allows(access) {
            return Err(read_only_at(gpa, placed));
        }
        f(&placed.region, gpa - placed.gpa)
    }

    /// Checks a range as a whole, then calls `f` for its part of each region: offset in the region, part of the range.
    #[inline]
    fn access(
        &self,
        gpa: u64,
        len: u64,
        access: Access,
        mut f: impl FnMut(&GuestRegion, u64, Range<u64>) -> VcpuResult<()>,
    ) -> VcpuResult<()> {
        let regions = self.lock();
        // Nearly every access lies in one region.
        if let Some(placed) = holder(&regions, gpa).map(|at| &regions[at]) {
            let offset = gpa - placed.gpa;
            if len <= placed.region.size() - offset && placed.allows(access) {
                return f(&placed.region, offset, 0..len);
            }
        }
        let Range { start, end } = locate(&regions, gpa, len, access)?;
        let mut done = 0;
        for placed in &regions[start..end] {
            let offset = gpa + done - placed.gpa;
            let part = (len - done).min(placed.region.size() - offset);
            f(&placed.region, offset, done..done + part)?;
            done += part;
        }
        Ok(())
    }

    // A panic cannot leave the vector half changed, so a poisoned lock is as good as any.
    fn lock(&self) -> RwLockReadGuard<'_, Vec<Placed>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_for_change(&self) -> RwLockWriteGuard<'_, Vec<Placed>> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Index of the region that holds `gpa`.
fn holder(regions: &[Placed], gpa: u64) -> Option<usize> {
    let at = regions.partition_point(|placed| placed.end() <= gpa);
    regions.get(at).filter(|placed| placed.gpa <= gpa).map(|_| at)
}

/// The regions that hold a range, or an error that names the first address without memory for the access.
#[cold]
fn locate(regions: &[Placed], gpa: u64, len: u64, access: Access) -> VcpuResult<Range<usize>> {
    if len == 0 {
        return Ok(0..0);
    }
    let Some(end) = gpa.checked_add(len) else {
        return Err(AccelError::invalid(
            "guest physical address",
            format!("{len:#x} bytes at {gpa:#x} end beyond the address space"),
        ));
    };
    let first = holder(regions, gpa).ok_or_else(|| nothing_at(gpa))?;
    let mut at = gpa;
    for (index, placed) in regions.iter().enumerate().skip(first) {
        if placed.gpa > at {
            break;
        }
        if !placed.allows(access) {
            return Err(read_only_at(at, placed));
        }
        at = placed.end();
        if at >= end {
            return Ok(first..index + 1);
        }
    }
    Err(nothing_at(at))
}

#[cold]
fn nothing_at(gpa: u64) -> AccelError {
    AccelError::invalid("guest physical address", format!("no memory is at {gpa:#x}"))
}

#[cold]
fn read_only_at(gpa: u64, placed: &Placed) -> AccelError {
    AccelError::invalid(
        "guest physical address",
        format!("{gpa:#x} is in the read-only region [{:#x}, {:#x})", placed.gpa, placed.end()),
    )
}

impl fmt::Debug for GuestMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.lock().iter().map(|placed| (format!("{:#x}", placed.gpa), &placed.region))).finish()
    }
}

#[cfg(test)]
mod tests;
