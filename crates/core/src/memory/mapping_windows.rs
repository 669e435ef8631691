//! Host mappings by VirtualAlloc and MapViewOfFile.

use super::FileMapping;
use crate::error::{AccelError, VcpuResult};
use std::fs::File;
use std::io;
use std::os::windows::io::AsRawHandle;
use std::ptr::{self, NonNull};
use windows_sys::Win32::Foundation::CloseHandle;
use windows_sys::Win32::System::Memory::{
    CreateFileMappingW, FILE_MAP_COPY, FILE_MAP_READ, FILE_MAP_WRITE, MEM_COMMIT, MEM_RELEASE, MEM_RESERVE,
    MEMORY_MAPPED_VIEW_ADDRESS, MapViewOfFile, PAGE_READONLY, PAGE_READWRITE, PAGE_WRITECOPY, UnmapViewOfFile,
    VirtualAlloc, VirtualFree,
};
use windows_sys::Win32::System::SystemInformation::{GetSystemInfo, SYSTEM_INFO};

fn system_info() -> SYSTEM_INFO {
    let mut info = SYSTEM_INFO::default();
    // SAFETY: the call fills the structure that it is given and cannot fail.
    unsafe { GetSystemInfo(&mut info) };
    info
}

/// The host's page size.
pub(super) fn page_size() -> u64 {
    u64::from(system_info().dwPageSize)
}

/// One mapping, unmapped when dropped.
#[derive(Debug)]
pub(super) struct Mapping {
    base: NonNull<u8>,
    len: usize,
    /// The start of the view of a file, which may lie before `base`; none for allocated memory.
    view: Option<NonNull<u8>>,
}

impl Mapping {
    /// Zeroed memory. Windows charges all of it to the commit limit at once, but takes pages only as they are touched.
    pub(super) fn anonymous(len: usize) -> VcpuResult<Self> {
        // SAFETY: new memory at an address of the system's choice touches no existing memory.
        let base = unsafe { VirtualAlloc(ptr::null(), len, MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE) };
        let base = NonNull::new(base.cast()).ok_or_else(|| last_error("VirtualAlloc"))?;
        Ok(Self { base, len, view: None })
    }

    /// Part of a file. `offset` and `len` are multiples of the page size and within the file.
    pub(super) fn file(file: &File, offset: u64, len: usize, mapping: FileMapping) -> VcpuResult<Self> {
        let (protection, access) = match mapping {
            FileMapping::Shared => (PAGE_READWRITE, FILE_MAP_READ | FILE_MAP_WRITE),
            FileMapping::CopyOnWrite => (PAGE_WRITECOPY, FILE_MAP_COPY),
            FileMapping::ReadOnly => (PAGE_READONLY, FILE_MAP_READ),
        };
        // Views start at multiples of the allocation granularity (64 KiB), which is coarser than a page.
        let lead = offset % u64::from(system_info().dwAllocationGranularity);
        let start = offset - lead;
        let view_len = len.checked_add(lead as usize).ok_or_else(|| {
            AccelError::invalid("region size", format!("{len:#x} bytes is more than the host can map"))
        })?;
        // SAFETY: the file's handle is open; size 0 means the whole file, and no name is given.
        let section = unsafe { CreateFileMappingW(file.as_raw_handle(), ptr::null(), protection, 0, 0, ptr::null()) };
        if section.is_null() {
            return Err(last_error("CreateFileMappingW"));
        }
        // SAFETY: `section` is open; the system chooses the address and checks the range against the section.
        let view = unsafe { MapViewOfFile(section, access, (start >> 32) as u32, start as u32, view_len) };
        let view = NonNull::new(view.Value.cast::<u8>()).ok_or_else(|| last_error("MapViewOfFile"));
        // SAFETY: this function opened the section; the view keeps what it needs of it.
        unsafe { CloseHandle(section) };
        let view = view?;
        // SAFETY: the view has lead + len bytes.
        let base = unsafe { view.add(lead as usize) };
        Ok(Self { base, len, view: Some(view) })
    }

    /// The first byte.
    pub(super) fn as_ptr(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// Bytes mapped.
    pub(super) fn len(&self) -> usize {
        self.len
    }
}

fn last_error(op: &'static str) -> AccelError {
    AccelError::host(op, &io::Error::last_os_error())
}

// SAFETY: the mapping belongs to the process, not to a thread; the fields never change.
unsafe impl Send for Mapping {}
// SAFETY: as above; what concurrent accesses to the bytes may do is `access`'s concern.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        match self.view {
            // SAFETY: `file` mapped this view and its only owner is going away.
            Some(view) => unsafe {
                UnmapViewOfFile(MEMORY_MAPPED_VIEW_ADDRESS { Value: view.as_ptr().cast() });
            },
            // SAFETY: `anonymous` allocated this memory and its only owner is going away.
            None => unsafe {
                VirtualFree(self.base.as_ptr().cast(), 0, MEM_RELEASE);
            },
        }
    }
}
