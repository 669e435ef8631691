//! One piece of host memory that a guest can use as its RAM or ROM.
//!
//! It must never outlive its mapping or hand out references to guest bytes: see the [module documentation](super).

use super::access::{self, GuestWord};
use super::dirty::{DirtyBitmap, HostDirty};
use super::mapping::Mapping;
use super::{discard, host_page_size};
use crate::error::{AccelError, VcpuResult};
use std::fmt;
use std::fs::File;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError, RwLock, Weak};

/// How a file becomes guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FileMapping {
    /// Writes go to the file, and others who map it see them. The file must be open for reading and writing.
    Shared,
    /// Writes stay in this region; the file is never changed and need only be open for reading. Pages that were
    /// not written may or may not follow changes that others make to the file.
    CopyOnWrite,
    /// Host and guest can only read. The file need only be open for reading.
    ReadOnly,
}

/// A piece of host memory for a guest: anonymous, or part of a file.
///
/// A region is a handle: clones refer to the same bytes, which stay mapped until the last clone is dropped. An
/// accelerator that maps a region into a guest keeps a clone. All methods may be called from several threads at once.
///
/// ```
/// use vm_accel::memory::GuestRegion;
///
/// let ram = GuestRegion::anonymous(1 << 20)?;
/// ram.write(0x1000, b"hello")?;
/// let mut bytes = [0; 6];
/// ram.clone().read(0x1000, &mut bytes)?;
/// assert_eq!(&bytes, b"hello\0");
/// # Ok::<(), vm_accel::AccelError>(())
/// ```
#[derive(Clone)]
pub struct GuestRegion(Arc<Inner>);

/// Who must know when the host writes to a region: a software CPU, which may have decoded code from there.
pub trait WriteWatcher: Send + Sync {
    /// The host wrote `len` bytes at `offset`.
    fn written(&self, offset: u64, len: u64);
}

struct Inner {
    mapping: Mapping,
    /// There is a watcher, or was one.
    watched: AtomicBool,
    watchers: RwLock<Vec<Weak<dyn WriteWatcher>>>,
    /// None: anonymous.
    backing: Option<FileMapping>,
    dirty: HostDirty,
}

impl GuestRegion {
    /// `size` bytes of zeroed memory. The host provides the pages as they are touched (on Windows the whole size counts
    /// against the commit limit at once).
    ///
    /// # Errors
    /// [`AccelError::InvalidArgument`] if `size` is 0, not a multiple of [`host_page_size`] or larger than an object can
    /// be; [`AccelError::Host`] if the operating system refuses.
    pub fn anonymous(size: u64) -> VcpuResult<Self> {
        let len = check_size(size)?;
        let mapping = Mapping::anonymous(len)?;
        // SAFETY: the mapping is private, and it is alive.
        unsafe { discard::prefer_large_pages(mapping.as_ptr(), len) };
        Ok(Self::new(mapping, None))
    }

    /// `size` bytes of a regular file, from `offset` on.
    ///
    /// The file may be closed afterwards, but must keep its length: where it was cut off, an access ends the process
    /// on Unix (SIGBUS), because the memory is not there any more.
    ///
    /// # Errors
    /// [`AccelError::InvalidArgument`] if `size` is as [`anonymous`](Self::anonymous) does not take it, `offset` is not a
    /// multiple of [`host_page_size`], the range ends beyond the file's end, or it is no regular file;
    /// [`AccelError::Host`] if the operating system refuses, for instance because the file is not open for writing.
    pub fn from_file(file: &File, offset: u64, size: u64, mapping: FileMapping) -> VcpuResult<Self> {
        let len = check_size(size)?;
        if offset % host_page_size() != 0 {
            return Err(AccelError::invalid(
                "file offset",
                format!("{offset:#x} is not a multiple of the host's page size {:#x}", host_page_size()),
            ));
        }
        let metadata =
            file.metadata().map_err(|error| AccelError::host("reading the length of the memory file", &error))?;
        if !metadata.is_file() {
            return Err(AccelError::invalid("memory file", "it is not a regular file, so its length is not known"));
        }
        if offset.checked_add(size).is_none_or(|end| end > metadata.len()) {
            return Err(AccelError::invalid(
                "file range",
                format!("{size:#x} bytes at {offset:#x} end beyond the file's {:#x} bytes", metadata.len()),
            ));
        }
        Ok(Self::new(Mapping::file(file, offset, len, mapping)?, Some(mapping)))
    }

    fn new(mapping: Mapping, backing: Option<FileMapping>) -> Self {
        let dirty = HostDirty::new(mapping.len() as u64);
        Self(Arc::new(Inner { mapping, watched: AtomicBool::new(false), watchers: RwLock::default(), backing, dirty }))
    }

    /// Tells `watcher` of every later write by the host, as long as it lives.
    pub fn watch(&self, watcher: Weak<dyn WriteWatcher>) {
        let mut watchers = self.0.watchers.write().unwrap_or_else(PoisonError::into_inner);
        watchers.retain(|old| old.strong_count() != 0);
        watchers.push(watcher);
        self.0.watched.store(true, Ordering::Release);
    }

    /// The host has written: notes it, and tells who wants to know.
    #[inline]
    fn wrote(&self, offset: u64, len: u64) {
        self.0.dirty.mark(offset, len);
        if self.0.watched.load(Ordering::Acquire) {
            let watchers = self.0.watchers.read().unwrap_or_else(PoisonError::into_inner);
            for watcher in watchers.iter().filter_map(Weak::upgrade) {
                watcher.written(offset, len);
            }
        }
    }

    /// Bytes in the region: a multiple of [`host_page_size`], never 0.
    #[must_use]
    #[inline]
    pub fn size(&self) -> u64 {
        self.0.mapping.len() as u64
    }

    /// The first byte, page aligned, for accelerators that map host addresses.
    ///
    /// The pointer is good while a clone of the region lives. Whoever reads or writes through it does so at their own
    /// risk: the guest and other threads may access the bytes at the same time, read-only memory cannot be written,
    /// and writes are to be reported with [`mark_dirty`](Self::mark_dirty).
    #[must_use]
    #[inline]
    pub fn as_ptr(&self) -> *mut u8 {
        self.0.mapping.as_ptr()
    }

    /// False if the memory was mapped [`FileMapping::ReadOnly`].
    #[must_use]
    #[inline]
    pub fn is_writable(&self) -> bool {
        self.0.backing != Some(FileMapping::ReadOnly)
    }

    /// How the file became memory; `None` for anonymous memory.
    #[must_use]
    pub fn file_mapping(&self) -> Option<FileMapping> {
        self.0.backing
    }

    /// True if both are handles of the same mapping.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Copies bytes at `offset` into `buf`.
    ///
    /// # Errors
    /// [`AccelError::InvalidArgument`] if the range does not lie within the region.
    #[inline]
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> VcpuResult<()> {
        let src = self.range(offset, buf.len() as u64)?;
        // SAFETY: `range` checked that the bytes lie in the mapping, which `self` keeps alive.
        unsafe { access::read(src, buf) };
        Ok(())
    }

    /// Copies `data` to `offset`.
    ///
    /// # Errors
    /// [`AccelError::InvalidArgument`] if the range does not lie within the region or the region is read-only; nothing
    /// is written then.
    #[inline]
    pub fn write(&self, offset: u64, data: &[u8]) -> VcpuResult<()> {
        let dst = self.writable_range(offset, data.len() as u64)?;
        // SAFETY: `writable_range` checked that the bytes lie in the mapping and may be written; `self` keeps it alive.
        unsafe { access::write(dst, data) };
        self.wrote(offset, data.len() as u64);
        Ok(())
    }

    /// Sets `len` bytes at `offset` to `byte`.
    ///
    /// # Errors
    /// As for [`write`](Self::write).
    pub fn fill(&self, offset: u64, len: u64, byte: u8) -> VcpuResult<()> {
        let dst = self.writable_range(offset, len)?;
        // SAFETY: as in `write`; a length that lies in the mapping fits usize.
        unsafe { access::fill(dst, len as usize, byte) };
        self.wrote(offset, len);
        Ok(())
    }

    /// Loads the little-endian word at `offset` in one piece.
    ///
    /// # Errors
    /// [`AccelError::InvalidArgument`] if the word does not lie within the region or is not naturally aligned, or if
    /// `order` is one that a load cannot have (`Release`, `AcqRel`).
    #[inline]
    pub fn load<T: GuestWord>(&self, offset: u64, order: Ordering) -> VcpuResult<T> {
        access::check_load_order(order)?;
        let ptr = self.word::<T>(offset, Self::range)?;
        Ok(if self.is_writable() {
            // SAFETY: `word` checked range and alignment in the mapping, which may be written; the order was checked.
            unsafe { T::load(ptr, order) }
        } else {
            // SAFETY: as above, without the need for write access.
            unsafe { access::load_read_only(ptr, order) }
        })
    }

    /// Stores the little-endian word at `offset` in one piece.
    ///
    /// # Errors
    /// [`AccelError::InvalidArgument`] if the word does not lie within the region or is not naturally aligned, if the
    /// region is read-only, or if `order` is one that a store cannot have (`Acquire`, `AcqRel`).
    #[inline]
    pub fn store<T: GuestWord>(&self, offset: u64, value: T, order: Ordering) -> VcpuResult<()> {
        access::check_store_order(order)?;
        let ptr = self.word::<T>(offset, Self::writable_range)?;
        // SAFETY: `word` checked range, alignment and write access in the mapping; the order was checked.
        unsafe { value.store(ptr, order) };
        self.wrote(offset, size_of::<T>() as u64);
        Ok(())
    }

    /// Stores `new` at `offset` if the little-endian word there is `current`, in one step. The answer is what was there:
    /// `Ok(Ok(current))` if `new` was stored, `Ok(Err(other))` if not.
    ///
    /// # Errors
    /// [`AccelError::InvalidArgument`] as for [`store`](Self::store), with `failure` an order that a load can have.
    pub fn compare_exchange<T: GuestWord>(
        &self,
        offset: u64,
        current: T,
        new: T,
        success: Ordering,
        failure: Ordering,
    ) -> VcpuResult<Result<T, T>> {
        access::check_load_order(failure)?;
        let ptr = self.word::<T>(offset, Self::writable_range)?;
        // SAFETY: `word` checked range, alignment and write access in the mapping; the failure order was checked.
        let outcome = unsafe { T::compare_exchange(ptr, current, new, success, failure) };
        if outcome.is_ok() {
            self.wrote(offset, size_of::<T>() as u64);
        }
        Ok(outcome)
    }

    /// Gives the host pages of a range back. Afterwards anonymous memory reads as zeros and copy-on-write memory as its
    /// file; the pages count as written.
    ///
    /// # Errors
    /// [`AccelError::InvalidArgument`] if the range does not lie within the region or is not aligned to
    /// [`host_page_size`]; [`AccelError::Unsupported`] for shared and read-only files, and on other hosts than Linux.
    pub fn discard(&self, offset: u64, len: u64) -> VcpuResult<()> {
        let ptr = self.range(offset, len)?;
        let page = host_page_size();
        if offset % page != 0 || len % page != 0 {
            return Err(AccelError::invalid(
                "range to discard",
                format!("{len:#x} bytes at {offset:#x} are not aligned to the host's page size {page:#x}"),
            ));
        }
        // SAFETY: the range was checked, the mapping is alive, and its backing is what it was made with.
        unsafe { discard::discard(ptr, len as usize, self.0.backing)? };
        self.wrote(offset, len);
        Ok(())
    }

    /// Switches the recording of the host's own writes on or off; it is off at first. Switching on forgets older
    /// records; switching on again what is on keeps them.
    ///
    /// A write that another thread has under way at that moment may go unrecorded. Who copies memory while devices
    /// write to it switches tracking on in a moment in which they stand still, before the first full copy.
    pub fn track_dirty(&self, on: bool) {
        self.0.dirty.enable(on);
    }

    /// True if the host's own writes are recorded.
    #[must_use]
    pub fn tracks_dirty(&self) -> bool {
        self.0.dirty.is_enabled()
    }

    /// Records `len` bytes at `offset` as written, for writes through [`as_ptr`](Self::as_ptr). To be called after the
    /// write. Does nothing while tracking is off.
    ///
    /// # Errors
    /// [`AccelError::InvalidArgument`] if the range does not lie within the region.
    pub fn mark_dirty(&self, offset: u64, len: u64) -> VcpuResult<()> {
        self.range(offset, len)?;
        self.wrote(offset, len);
        Ok(())
    }

    /// Takes the record of what the host wrote and starts a new one. Addresses are offsets in the region.
    ///
    /// The guest's own writes are in the accelerator's log; [`DirtyBitmap::union`] puts both together. Copy the pages
    /// after taking the record: what is written during the copy is in the next one.
    #[must_use = "the record is gone from the region"]
    pub fn take_host_dirty(&self) -> DirtyBitmap {
        self.0.dirty.take()
    }

    /// True if the page at `offset` is in the record.
    #[cfg(feature = "vm-memory")]
    pub(super) fn is_host_dirty(&self, offset: u64) -> bool {
        self.0.dirty.is_dirty(offset)
    }

    /// The address of `len` bytes at `offset` if they lie within the region.
    #[inline]
    pub(super) fn range(&self, offset: u64, len: u64) -> VcpuResult<*mut u8> {
        if offset.checked_add(len).is_none_or(|end| end > self.size()) {
            return Err(AccelError::invalid(
                "region range",
                format!("{len:#x} bytes at {offset:#x} do not lie within the region's {:#x} bytes", self.size()),
            ));
        }
        // SAFETY: offset is at most the mapping's length, which fits isize (`check_size`).
        Ok(unsafe { self.as_ptr().add(offset as usize) })
    }

    /// As `range`, if the region may be written.
    #[inline]
    fn writable_range(&self, offset: u64, len: u64) -> VcpuResult<*mut u8> {
        if !self.is_writable() {
            return Err(AccelError::invalid(
                "region",
                format!("it is read-only; {len:#x} bytes at {offset:#x} cannot be written"),
            ));
        }
        self.range(offset, len)
    }

    /// The address of an aligned word at `offset` in the range that `check` approves.
    #[inline]
    fn word<T: GuestWord>(
        &self,
        offset: u64,
        check: fn(&Self, u64, u64) -> VcpuResult<*mut u8>,
    ) -> VcpuResult<*mut u8> {
        let size = size_of::<T>() as u64;
        if offset % size != 0 {
            return Err(AccelError::invalid(
                "word offset",
                format!("{offset:#x} is not aligned to the word's {size} bytes"),
            ));
        }
        check(self, offset, size)
    }
}

/// The size as a length of host memory.
fn check_size(size: u64) -> VcpuResult<usize> {
    let page = host_page_size();
    if size == 0 || size % page != 0 {
        return Err(AccelError::invalid(
            "region size",
            format!("{size:#x} is not a multiple, other than 0, of the host's page size {page:#x}"),
        ));
    }
    // Offsets of pointers are isize.
    isize::try_from(size)
        .map(isize::unsigned_abs)
        .map_err(|_| AccelError::invalid("region size", format!("{size:#x} bytes is more than the host can map")))
}

impl fmt::Debug for GuestRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestRegion")
            .field("size", &format_args!("{:#x}", self.size()))
            .field("host", &self.as_ptr())
            .field("file", &self.0.backing)
            .field("tracks_dirty", &self.tracks_dirty())
            .finish()
    }
}

#[cfg(test)]
mod tests;
