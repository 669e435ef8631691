//! Giving pages back to the host where that cannot be done under a live guest mapping.
//!
//! macOS' MADV_DONTNEED keeps the bytes, and replacing the pages would leave the guest with the old ones; Windows'
//! decommit would take pages away that the partition has mapped.

use super::FileMapping;
use crate::error::{AccelError, VcpuResult};

/// Always [`AccelError::Unsupported`].
///
/// # Safety
/// None is needed; the Linux form of this function has requirements.
pub(super) unsafe fn discard(_ptr: *mut u8, _len: usize, _backing: Option<FileMapping>) -> VcpuResult<()> {
    Err(AccelError::Unsupported { kind: None, what: "discarding guest memory on this operating system" })
}

/// Nothing can be asked for here.
///
/// # Safety
/// None is needed; the Linux form of this function has requirements.
pub(super) unsafe fn prefer_large_pages(_ptr: *mut u8, _len: usize) {}
