//! Host mappings by mmap(2), on Linux and macOS.

use super::FileMapping;
use crate::error::{AccelError, VcpuResult};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::{self, NonNull};

/// The host's page size.
pub(super) fn page_size() -> u64 {
    // SAFETY: sysconf has no preconditions.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    // POSIX requires the value; 4096 keeps a host that breaks it from dividing by zero.
    u64::try_from(size).unwrap_or(4096)
}

/// One mapping, unmapped when dropped.
#[derive(Debug)]
pub(super) struct Mapping {
    base: NonNull<u8>,
    len: usize,
}

impl Mapping {
    /// Zeroed memory that takes host memory only page by page, as it is touched.
    pub(super) fn anonymous(len: usize) -> VcpuResult<Self> {
        Self::map(
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            // NORESERVE: a guest may be larger than what the host would promise up front.
            libc::MAP_PRIVATE | libc::MAP_ANON | libc::MAP_NORESERVE,
            -1,
            0,
        )
    }

    /// Part of a file. `offset` and `len` are multiples of the page size and within the file.
    pub(super) fn file(file: &File, offset: u64, len: usize, mapping: FileMapping) -> VcpuResult<Self> {
        let (protection, flags) = match mapping {
            FileMapping::Shared => (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED),
            FileMapping::CopyOnWrite => (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_NORESERVE),
            FileMapping::ReadOnly => (libc::PROT_READ, libc::MAP_SHARED),
        };
        let offset = libc::off_t::try_from(offset)
            .map_err(|_| AccelError::invalid("file offset", format!("{offset:#x} is beyond what the host can map")))?;
        Self::map(len, protection, flags, file.as_raw_fd(), offset)
    }

    fn map(len: usize, protection: i32, flags: i32, fd: i32, offset: libc::off_t) -> VcpuResult<Self> {
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory; mmap checks the rest.
        let base = unsafe { libc::mmap(ptr::null_mut(), len, protection, flags, fd, offset) };
        if base == libc::MAP_FAILED {
            return Err(AccelError::host("mmap", &io::Error::last_os_error()));
        }
        let Some(base) = NonNull::new(base.cast()) else {
            return Err(AccelError::host("mmap", &io::Error::other("the kernel answered address 0")));
        };
        Ok(Self { base, len })
    }

    /// The first byte.
    #[inline]
    pub(super) fn as_ptr(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// Bytes mapped.
    #[inline]
    pub(super) fn len(&self) -> usize {
        self.len
    }
}

// SAFETY: the mapping belongs to the process, not to a thread; the fields never change.
unsafe impl Send for Mapping {}
// SAFETY: as above; what concurrent accesses to the bytes may do is `access`'s concern.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this is the mapping that `map` made, whole, and its only owner is going away.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}
