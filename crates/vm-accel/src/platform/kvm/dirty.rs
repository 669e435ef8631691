//! Which pages the guest wrote: a bitmap per slot, or a ring per vCPU.
//!
//! Bitmap: with manual clear (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2) the kernel write-protects only what is cleared, page by
//! page, instead of the whole slot under one lock. Ring: the kernel appends (slot, page) entries to a ring that it shares
//! per vCPU; a full ring makes KVM_RUN exit, and the run loop empties it there.

use super::{Slot, errno, lock, refused};
use crate::ffi::kvm as ffi;
use kvm_bindings as kb;
use kvm_ioctls::{VcpuFd, VmFd};
use std::collections::HashMap;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use vm_accel_core::accel::MemoryFlags;
use vm_accel_core::error::{AccelError, VcpuResult};
use vm_accel_core::memory::DirtyBitmap;

/// The kernel logs in units of its page size; slots are multiples of it.
fn page() -> u64 {
    vm_accel_core::memory::host_page_size()
}

/// The ring's capability on this kernel, the one with stated memory ordering first.
pub(super) fn ring_capability(fd: &VmFd) -> Option<u32> {
    [kb::KVM_CAP_DIRTY_LOG_RING_ACQ_REL, kb::KVM_CAP_DIRTY_LOG_RING]
        .into_iter()
        .find(|cap| fd.check_extension_raw(u64::from(*cap)) > 0)
}

#[derive(Debug)]
pub(super) struct DirtyTracking {
    manual_clear: bool,
    rings: Mutex<Rings>,
}

#[derive(Debug, Default)]
struct Rings {
    /// Entries per ring; 0 while bitmaps are in use.
    entries: u32,
    rings: Vec<Ring>,
    /// What was collected from the rings and not yet taken, by slot number: words of 64 pages.
    collected: HashMap<u32, Vec<u64>>,
}

impl DirtyTracking {
    pub(super) fn new(fd: &VmFd) -> Self {
        let cap = kb::kvm_enable_cap {
            cap: kb::KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
            args: [u64::from(kb::KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE), 0, 0, 0],
            ..Default::default()
        };
        let offered = fd.check_extension_raw(u64::from(cap.cap)) > 0;
        Self { manual_clear: offered && fd.enable_cap(&cap).is_ok(), rings: Mutex::default() }
    }

    pub(super) fn enable_ring(&self, fd: &VmFd, entries: u32) -> VcpuResult<()> {
        let cap = kb::kvm_enable_cap {
            cap: ring_capability(fd).unwrap_or(kb::KVM_CAP_DIRTY_LOG_RING),
            args: [u64::from(entries) * size_of::<kb::kvm_dirty_gfn>() as u64, 0, 0, 0],
            ..Default::default()
        };
        fd.enable_cap(&cap).map_err(|error| {
            AccelError::invalid("dirty ring", format!("the kernel refuses {entries} entries (errno {})", error.errno()))
        })?;
        lock(&self.rings).entries = entries;
        Ok(())
    }

    /// A slot was mapped, or its flags changed: logging starts anew.
    pub(super) fn mapped(&self, slot: &Slot) {
        let logged = slot.flags.contains(MemoryFlags::LOG_DIRTY);
        // Never off again: another mapping of the same region may still be logged.
        if logged {
            slot.region.track_dirty(true);
        }
        let mut rings = lock(&self.rings);
        if rings.entries != 0 && logged {
            let words = slot.region.size().div_ceil(page() * 64) as usize;
            rings.collected.insert(slot.number, vec![0; words]);
        } else {
            rings.collected.remove(&slot.number);
        }
    }

    /// Maps the ring of a new vCPU, if rings are in use.
    pub(super) fn vcpu_created(&self, fd: &VcpuFd) -> VcpuResult<()> {
        let mut rings = lock(&self.rings);
        if rings.entries != 0 {
            let ring = Ring::map(fd, rings.entries)?;
            rings.rings.push(ring);
        }
        Ok(())
    }

    /// Empties the rings into `collected` and lets the kernel use the entries again.
    pub(super) fn collect(&self, fd: &VmFd) -> VcpuResult<()> {
        let mut rings = lock(&self.rings);
        let Rings { rings, collected, .. } = &mut *rings;
        let mut any = false;
        for ring in rings {
            while let Some((slot, page)) = ring.next() {
                any = true;
                // A slot that is gone, or a page behind its end, has no bit: nobody can ask for it.
                if let Some(word) = collected.get_mut(&slot).and_then(|words| words.get_mut((page / 64) as usize)) {
                    *word |= 1 << (page % 64);
                }
            }
        }
        if any {
            // SAFETY: the request takes no argument.
            unsafe { ffi::ioctl(fd.as_raw_fd(), ffi::KVM_RESET_DIRTY_RINGS, 0) }
                .map_err(|code| errno("KVM_RESET_DIRTY_RINGS", code))?;
        }
        Ok(())
    }

    /// The dirty pages of a slot, joined with what the host wrote.
    pub(super) fn take(&self, fd: &VmFd, slot: &Slot) -> VcpuResult<DirtyBitmap> {
        let size = slot.region.size();
        let words = if lock(&self.rings).entries != 0 {
            self.collect(fd)?;
            let mut rings = lock(&self.rings);
            let clean = vec![0; size.div_ceil(page() * 64) as usize];
            rings.collected.insert(slot.number, clean.clone()).unwrap_or(clean)
        } else {
            let words = fd.get_dirty_log(slot.number, size as usize).map_err(refused("KVM_GET_DIRTY_LOG"))?;
            if self.manual_clear {
                clear(fd, slot, &words)?;
            }
            words
        };
        let mut dirty = DirtyBitmap::from_log(0, size, &words, page())?;
        dirty.union(&slot.region.take_host_dirty())?;
        Ok(dirty)
    }
}

/// Write-protects the pages of `words` again.
fn clear(fd: &VmFd, slot: &Slot, words: &[u64]) -> VcpuResult<()> {
    let pages = slot.region.size() / page();
    // num_pages has 32 bits, and parts must start at multiples of 64 pages: take the largest such multiple per call.
    const PART: u64 = u32::MAX as u64 & !63;
    let mut first_page = 0;
    while first_page < pages {
        let num_pages = (pages - first_page).min(PART);
        let request = kb::kvm_clear_dirty_log {
            slot: slot.number,
            num_pages: num_pages as u32,
            first_page,
            __bindgen_anon_1: kb::kvm_clear_dirty_log__bindgen_ty_1 {
                dirty_bitmap: words[(first_page / 64) as usize..].as_ptr() as *mut _,
            },
        };
        // SAFETY: the request is the structure that the number was made from; the kernel only reads the bitmap, which
        // has a bit for each of the pages.
        unsafe { ffi::ioctl(fd.as_raw_fd(), ffi::KVM_CLEAR_DIRTY_LOG, &raw const request as std::ffi::c_ulong) }
            .map_err(|code| errno("KVM_CLEAR_DIRTY_LOG", code))?;
        first_page += num_pages;
    }
    Ok(())
}

/// The dirty ring of one vCPU, shared with the kernel.
#[derive(Debug)]
struct Ring {
    entries: NonNull<kb::kvm_dirty_gfn>,
    count: u32,
    next: u32,
}

// SAFETY: the ring is owned by this value alone on the process's side, and the kernel does not care about threads.
unsafe impl Send for Ring {}

const DIRTY: u32 = 1;
const RESET: u32 = 2;

impl Ring {
    fn bytes(count: u32) -> usize {
        count as usize * size_of::<kb::kvm_dirty_gfn>()
    }

    fn map(fd: &VcpuFd, count: u32) -> VcpuResult<Self> {
        let offset = i64::from(kb::KVM_DIRTY_LOG_PAGE_OFFSET) * page() as i64;
        // SAFETY: a new shared mapping at an address of the kernel's choice touches no memory of ours.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                Self::bytes(count),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd.as_raw_fd(),
                offset,
            )
        };
        match NonNull::new(address).filter(|_| address != libc::MAP_FAILED) {
            Some(address) => Ok(Self { entries: address.cast(), count, next: 0 }),
            None => Err(errno("mapping the dirty ring", ffi::last_errno())),
        }
    }

    /// The next dirty (slot, page), marked as collected.
    fn next(&mut self) -> Option<(u32, u64)> {
        // SAFETY: `next` is below `count`, the number of entries that were mapped.
        let entry = unsafe { self.entries.add(self.next as usize) };
        // SAFETY: `flags` is a u32 of a mapped entry that the kernel and this process access atomically.
        let flags = unsafe { AtomicU32::from_ptr(&raw mut (*entry.as_ptr()).flags) };
        // Acquire pairs with the kernel's release after it filled the entry.
        if flags.load(Ordering::Acquire) & (DIRTY | RESET) != DIRTY {
            return None;
        }
        // SAFETY: the kernel does not touch an entry between DIRTY and RESET.
        let found = unsafe { ((*entry.as_ptr()).slot, (*entry.as_ptr()).offset) };
        // The upper half of `slot` is the address space, which is 0 outside SMM.
        flags.store(DIRTY | RESET, Ordering::Release);
        self.next = (self.next + 1) % self.count;
        Some((found.0 & 0xffff, found.1))
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: the mapping was made with this size by `map`, and nobody else knows its address.
        unsafe { libc::munmap(self.entries.as_ptr().cast(), Self::bytes(self.count)) };
    }
}
