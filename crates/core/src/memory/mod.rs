//! Guest memory: host mappings ([`GuestRegion`]), where they lie in the guest's physical address space
//! ([`GuestMemory`]), and which of their pages changed ([`DirtyBitmap`]).
//!
//! The guest, its other vCPUs and device threads access the same bytes at the same time, so nothing here ever makes a
//! `&[u8]` or `&mut [u8]` of guest memory: a reference would promise the compiler that the bytes stand still. Every
//! access is a copy through a raw pointer. What a copy promises:
//!
//! * 1, 2, 4 or 8 bytes at a naturally aligned offset are read or written in one piece (single-copy atomic), as
//!   virtqueue indices and page table entries need it. Copies of up to 64 bytes consist of naturally aligned words.
//! * Longer copies may be torn anywhere if somebody else writes meanwhile; they are plain bulk copies.
//! * Order between accesses is promised only by [`GuestRegion::load`], [`GuestRegion::store`] and
//!   [`GuestRegion::compare_exchange`], which take an [`Ordering`](std::sync::atomic::Ordering).
//!
//! Alignment counts from the start of the region, which is page aligned in host memory and must be in guest memory.

mod access;
mod dirty;
#[cfg_attr(target_os = "linux", path = "discard_linux.rs")]
#[cfg_attr(not(target_os = "linux"), path = "discard_none.rs")]
mod discard;
mod guest;
#[cfg_attr(unix, path = "mapping_unix.rs")]
#[cfg_attr(windows, path = "mapping_windows.rs")]
mod mapping;
mod region;
#[cfg(feature = "vm-memory")]
pub mod vm_memory;

pub use access::GuestWord;
pub use dirty::{DIRTY_PAGE_SIZE, DirtyBitmap, DirtyRanges};
pub use guest::GuestMemory;
pub use region::{FileMapping, GuestRegion, WriteWatcher};

/// The host's page size in bytes: a power of two, at least 4096 (16384 on Apple silicon).
///
/// Sizes, file offsets and guest physical addresses of regions are multiples of it.
#[must_use]
pub fn host_page_size() -> u64 {
    mapping::page_size()
}
