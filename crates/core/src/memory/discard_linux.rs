//! Giving pages back to the host on Linux, and asking it for large ones.

use super::FileMapping;
use crate::error::{AccelError, VcpuResult};
use std::io;

/// Drops the host's pages of a mapping: anonymous memory then reads as zeros, copy-on-write memory as its file.
///
/// # Safety
/// `ptr` and `len` are page aligned and lie in a live private mapping of the caller, of the `backing` that it states.
pub(super) unsafe fn discard(ptr: *mut u8, len: usize, backing: Option<FileMapping>) -> VcpuResult<()> {
    if matches!(backing, Some(FileMapping::Shared | FileMapping::ReadOnly)) {
        // The bytes live in the file: dropping the mapping's pages would free nothing for good.
        return Err(AccelError::Unsupported { kind: None, what: "discarding memory that lives in a file" });
    }
    // SAFETY: the caller vouches for the range. MADV_DONTNEED of a private mapping changes the bytes, as a write
    // of another thread would; nothing holds references to them.
    if unsafe { libc::madvise(ptr.cast(), len, libc::MADV_DONTNEED) } != 0 {
        return Err(AccelError::host("madvise(MADV_DONTNEED)", &io::Error::last_os_error()));
    }
    Ok(())
}

/// Asks for large pages where the host has them to spare: each access of a guest whose memory is in small ones may miss the host's
/// TLB, too. A wish: a kernel without them refuses, and nothing is lost.
///
/// # Safety
/// `ptr` and `len` are page aligned and lie in a live private mapping of the caller.
pub(super) unsafe fn prefer_large_pages(ptr: *mut u8, len: usize) {
    // SAFETY: the caller vouches for the range; the advice changes no byte.
    unsafe { libc::madvise(ptr.cast(), len, libc::MADV_HUGEPAGE) };
}
