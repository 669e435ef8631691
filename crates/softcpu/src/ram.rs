//! Guest RAM as all CPUs of a machine share it: host mappings by guest-physical address, which pages hold code that some CPU has
//! decoded, which pages were written, and how changes of any of that reach CPUs that are running.
//!
//! A CPU caches host pointers (software TLB) and decoded code. Whoever changes what those caches rely on goes through
//! [`Ram::synchronize`]: it raises the epoch, wakes every running CPU and waits until each has dropped what it cached. After
//! that no CPU holds a stale pointer, so a mapping may be freed and a dirty bitmap handed out.
//!
//! Nothing here may be called from a [`Bus`](crate::Bus) callback: it would wait for the very CPU that calls.

use std::any::Any;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

/// Bytes of a page.
pub(crate) const PAGE: u64 = 4096;
/// log2 of the granule of code tracking: 64 granules of 64 bytes per page.
const GRANULE: u64 = 6;

/// Why a mapping was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RamError {
    /// Address or size is not a multiple of 4096, or the size is zero, or the range wraps, or the host address is not a multiple of 16.
    Misaligned,
    /// The range overlaps one that is mapped.
    Overlap,
    /// Nothing is mapped at that address.
    NotMapped,
    /// The host has no memory for the bookkeeping of a range of this size.
    TooLarge,
}

impl fmt::Display for RamError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            RamError::Misaligned => "guest RAM ranges must be whole 4096-byte pages",
            RamError::Overlap => "the range overlaps guest RAM that is mapped",
            RamError::NotMapped => "no guest RAM is mapped at that address",
            RamError::TooLarge => "the host has no memory for the bookkeeping of a range of this size",
        })
    }
}

impl std::error::Error for RamError {}

/// One mapped range.
pub(crate) struct Region {
    pub(crate) gpa: u64,
    pub(crate) size: u64,
    /// Host address of the first byte.
    host: usize,
    pub(crate) writable: bool,
    /// Writes are noted in `dirty`.
    log: AtomicBool,
    /// One bit per page.
    dirty: Box<[AtomicU64]>,
    /// One word per page: bit `i` set when some CPU has decoded code from granule `i`.
    code: Box<[AtomicU64]>,
    /// Keeps the host mapping alive.
    _owner: Arc<dyn Any + Send + Sync>,
}

impl Region {
    /// Host address of `gpa`, which must be inside.
    #[inline]
    pub(crate) fn host(&self, gpa: u64) -> usize {
        self.host + (gpa - self.gpa) as usize
    }

    fn page(&self, gpa: u64) -> usize {
        ((gpa - self.gpa) / PAGE) as usize
    }

    /// The granules of the page of `gpa` that hold decoded code.
    #[inline]
    pub(crate) fn code_mask(&self, gpa: u64) -> u64 {
        self.code[self.page(gpa)].load(Ordering::SeqCst)
    }

    /// Whether writes are logged.
    #[inline]
    pub(crate) fn logs(&self) -> bool {
        self.log.load(Ordering::Relaxed)
    }

    /// Notes a write if writes are logged.
    #[inline]
    pub(crate) fn mark_dirty(&self, gpa: u64) {
        if self.logs() {
            let page = self.page(gpa);
            self.dirty[page / 64].fetch_or(1 << (page % 64), Ordering::Relaxed);
        }
    }
}

/// The granules of its page that `len` bytes from `gpa` touch (cut at the end of the page).
pub(crate) fn granules(gpa: u64, len: u64) -> u64 {
    let first = (gpa % PAGE) >> GRANULE;
    let last = ((gpa % PAGE + len.max(1) - 1) >> GRANULE).min(63);
    (u64::MAX << first) & (u64::MAX >> (63 - last))
}

/// `count` words of zero, or an error if the host has no memory for them: the size of a range is the owner's word.
fn clear_words(count: usize) -> Result<Box<[AtomicU64]>, RamError> {
    // Asked first and given back: collecting zeros gets memory that the host need not touch, but cannot fail softly.
    Vec::<AtomicU64>::new().try_reserve_exact(count).map_err(|_| RamError::TooLarge)?;
    Ok((0..count).map(|_| AtomicU64::new(0)).collect())
}

/// All regions, sorted by address; replaced as a whole when it changes.
#[derive(Default)]
pub(crate) struct Layout {
    regions: Vec<Arc<Region>>,
}

impl Layout {
    /// The region that holds `gpa`.
    #[inline]
    pub(crate) fn find(&self, gpa: u64) -> Option<&Region> {
        let after = self.regions.partition_point(|r| r.gpa <= gpa);
        let region = self.regions.get(after.checked_sub(1)?)?;
        (gpa - region.gpa < region.size).then_some(region)
    }
}

/// What other threads see of a CPU.
#[derive(Debug, Default)]
pub(crate) struct Remote {
    /// Something of the below wants attention at the next block end.
    pub(crate) wake: AtomicBool,
    /// The owner asked the CPU to leave `run`.
    pub(crate) kicked: AtomicBool,
    /// Inside `run`: it may hold host pointers.
    pub(crate) running: AtomicBool,
    /// The last round that the CPU has passed.
    pub(crate) seen: AtomicU64,
    /// Ranges of code that were written: `(gpa, length)`.
    pub(crate) stale: Mutex<Vec<(u64, u64)>>,
}

/// Makes a CPU leave `run` with [`Exit::Kicked`](crate::Exit::Kicked), from any thread. A kick is sticky: it ends the next `run` at once
/// if the CPU is not in one. Several kicks are one.
#[derive(Clone, Debug)]
pub struct Kick(pub(crate) Arc<Remote>);

impl Kick {
    /// Kicks the CPU.
    pub fn kick(&self) {
        // Release: what the caller did before is visible to the CPU that takes the kick.
        self.0.kicked.store(true, Ordering::Release);
        self.0.wake.store(true, Ordering::Release);
    }

    /// Makes the CPU ask its bus for interrupts soon, without leaving `run`.
    pub fn poll_interrupts(&self) {
        self.0.wake.store(true, Ordering::Release);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing panics while these locks are held; a poisoned one still guards whole values.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Guest RAM, shared by the CPUs of one machine.
#[derive(Default)]
pub struct Ram {
    layout: RwLock<Arc<Layout>>,
    /// Counts changes after which CPUs must drop what they cached.
    epoch: AtomicU64,
    /// Counts calls of `synchronize`.
    round: AtomicU64,
    cpus: Mutex<Vec<Arc<Remote>>>,
    /// Serialises changes (not the CPUs).
    change: Mutex<()>,
    /// Makes locked accesses that cross a page atomic towards one another.
    pub(crate) split_lock: Mutex<()>,
}

impl fmt::Debug for Ram {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let layout = self.layout();
        f.debug_list().entries(layout.regions.iter().map(|r| (r.gpa, r.size, r.writable))).finish()
    }
}

impl Ram {
    /// No memory at all.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Maps `size` bytes of host memory at `host` to `gpa`. `owner` is kept until the range is unmapped and no CPU uses it.
    /// A range that is not writable reads as memory; writes to it go to the bus.
    ///
    /// # Errors
    /// When the range is not made of whole pages or overlaps another.
    ///
    /// # Safety
    /// `host` must be valid for reads (and for writes if `writable`) of `size` bytes as long as `owner` lives, and all other
    /// accesses to it must be through raw pointers: the guest changes it at any time.
    pub unsafe fn map(
        &self,
        gpa: u64,
        host: *mut u8,
        size: u64,
        writable: bool,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> Result<(), RamError> {
        if gpa % PAGE != 0 || size % PAGE != 0 || size == 0 || host.addr() % 16 != 0 || gpa.checked_add(size).is_none()
        {
            return Err(RamError::Misaligned);
        }
        let _change = lock(&self.change);
        let mut regions = self.layout().regions.clone();
        if regions.iter().any(|r| gpa < r.gpa + r.size && r.gpa < gpa + size) {
            return Err(RamError::Overlap);
        }
        let pages = (size / PAGE) as usize;
        regions.push(Arc::new(Region {
            gpa,
            size,
            host: host.expose_provenance(),
            writable,
            log: AtomicBool::new(false),
            dirty: clear_words(pages.div_ceil(64))?,
            code: clear_words(pages)?,
            _owner: owner,
        }));
        regions.sort_by_key(|r| r.gpa);
        self.replace(regions);
        Ok(())
    }

    /// Unmaps the range that was mapped at `gpa`. When this returns, no CPU uses the host memory any more.
    ///
    /// # Errors
    /// When no range starts there.
    pub fn unmap(&self, gpa: u64) -> Result<(), RamError> {
        let _change = lock(&self.change);
        let mut regions = self.layout().regions.clone();
        let at = regions.iter().position(|r| r.gpa == gpa).ok_or(RamError::NotMapped)?;
        let gone = regions.remove(at);
        self.replace(regions);
        self.invalidate_code(gone.gpa, gone.size);
        self.synchronize(None, true);
        Ok(())
    }

    fn replace(&self, regions: Vec<Arc<Region>>) {
        *self.layout.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(Layout { regions });
        self.synchronize(None, true);
    }

    pub(crate) fn layout(&self) -> Arc<Layout> {
        self.layout.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Starts or stops noting which pages of the range at `gpa` are written; starts with a clean bitmap.
    ///
    /// # Errors
    /// When no range starts there.
    pub fn set_dirty_log(&self, gpa: u64, on: bool) -> Result<(), RamError> {
        let layout = self.layout();
        let region = layout.regions.iter().find(|r| r.gpa == gpa).ok_or(RamError::NotMapped)?;
        region.dirty.iter().for_each(|word| word.store(0, Ordering::Relaxed));
        region.log.store(on, Ordering::SeqCst);
        self.synchronize(None, true);
        Ok(())
    }

    /// The pages of the range at `gpa` that CPUs wrote since the last call, one bit each, and starts anew. A page that is written
    /// while this runs is in this answer or in the next; its bytes are read after this returns.
    ///
    /// # Errors
    /// When no range starts there.
    pub fn take_dirty_log(&self, gpa: u64) -> Result<Vec<u64>, RamError> {
        let layout = self.layout();
        let region = layout.regions.iter().find(|r| r.gpa == gpa).ok_or(RamError::NotMapped)?;
        // A CPU may still write through a pointer from before the bits were taken; such a page is in the bits taken, and
        // synchronize() ends the use of such pointers before the caller looks at the page.
        let bits = region.dirty.iter().map(|word| word.swap(0, Ordering::SeqCst)).collect();
        self.synchronize(None, true);
        Ok(bits)
    }

    /// Tells the CPUs that the host wrote `len` bytes at `gpa` (DMA, a loader): code that was decoded from there is dropped.
    /// Cheap when there is none.
    pub fn invalidate_code(&self, gpa: u64, len: u64) {
        let end = gpa.saturating_add(len);
        let layout = self.layout();
        let mut at = gpa;
        let mut hit = false;
        while at < end {
            let next = ((at | (PAGE - 1)) + 1).min(end);
            if let Some(region) = layout.find(at) {
                hit |= region.code[region.page(at)].load(Ordering::SeqCst) & granules(at, next - at) != 0;
            }
            at = next;
        }
        if hit || layout.find(gpa).is_none() {
            self.code_written(&layout, gpa, len);
        }
    }

    /// Code at `gpa` was written: clears the marks and tells every CPU.
    pub(crate) fn code_written(&self, layout: &Layout, gpa: u64, len: u64) {
        let end = gpa.saturating_add(len);
        let mut at = gpa;
        while at < end {
            let next = ((at | (PAGE - 1)) + 1).min(end);
            if let Some(region) = layout.find(at) {
                region.code[region.page(at)].fetch_and(!granules(at, next - at), Ordering::SeqCst);
            }
            at = next;
        }
        for cpu in lock(&self.cpus).iter() {
            lock(&cpu.stale).push((gpa, len));
            cpu.wake.store(true, Ordering::Release);
        }
    }

    /// Marks granules of a page as decoded by `me`, before their bytes are read. Answers whether the page had no code before, so
    /// that `me` must forget its own write pointers.
    pub(crate) fn mark_code(&self, region: &Region, gpa: u64, mask: u64, me: &Remote) -> bool {
        let before = region.code[region.page(gpa)].fetch_or(mask, Ordering::SeqCst);
        if before & mask != mask && lock(&self.cpus).len() > 1 {
            // Another CPU may be in the middle of a write that it believes to be to plain data. Once it has passed a block
            // end, its write is visible here and its next one looks at the mark.
            self.synchronize(Some(me), before == 0);
        }
        before == 0
    }

    /// The current epoch.
    pub(crate) fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::SeqCst)
    }

    pub(crate) fn attach(&self, cpu: &Arc<Remote>) {
        lock(&self.cpus).push(cpu.clone());
    }

    pub(crate) fn detach(&self, cpu: &Arc<Remote>) {
        lock(&self.cpus).retain(|other| !Arc::ptr_eq(other, cpu));
    }

    /// The current round.
    pub(crate) fn round(&self) -> u64 {
        self.round.load(Ordering::SeqCst)
    }

    /// Waits until every running CPU has passed a block end, and with `flush` has dropped what it cached, since this call. `me` is
    /// the CPU that calls, which takes in the new epoch itself before it runs on.
    pub(crate) fn synchronize(&self, me: Option<&Remote>, flush: bool) {
        // The epoch before the round: who sees the round sees the epoch. SeqCst pairs with `running` in `Cpu::run`: either the
        // CPU sees the new round when it starts, or we see it running.
        self.epoch.fetch_add(u64::from(flush), Ordering::SeqCst);
        let round = self.round.fetch_add(1, Ordering::SeqCst) + 1;
        let cpus = lock(&self.cpus).clone();
        for cpu in &cpus {
            if me.is_some_and(|me| std::ptr::eq(me, Arc::as_ptr(cpu))) {
                continue;
            }
            cpu.wake.store(true, Ordering::SeqCst);
            let mut spins = 0u32;
            while cpu.running.load(Ordering::SeqCst) && cpu.seen.load(Ordering::SeqCst) < round {
                if let Some(me) = me {
                    // Two CPUs may wait for each other: this one is between blocks, with no pointer in hand, and takes in
                    // the epoch before its next block.
                    me.seen.store(self.round(), Ordering::SeqCst);
                }
                spins += 1;
                if spins % 64 == 0 {
                    std::thread::yield_now();
                } else {
                    std::hint::spin_loop();
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn granules_of_a_page() {
        assert_eq!(granules(0, 1), 1);
        assert_eq!(granules(0x3f, 2), 3);
        assert_eq!(granules(0xfff, 8), 1 << 63);
        assert_eq!(granules(0x1000, 4096), u64::MAX);
    }

    #[test]
    fn mapping_rules() {
        let ram = Ram::new();
        let block = Arc::new(vec![0u64; 1026]);
        let host = block.as_ptr().cast_mut().cast::<u8>();
        let host = host.wrapping_add(host.align_offset(16));
        // SAFETY: the owner is the allocation, and the region is not writable.
        let map = |gpa, size| unsafe { ram.map(gpa, host, size, false, block.clone()) };
        assert_eq!(map(1, 4096), Err(RamError::Misaligned));
        assert_eq!(map(!4095, 8192), Err(RamError::Misaligned));
        assert_eq!(map(0x1000, 8192), Ok(()));
        assert_eq!(map(0x2000, 4096), Err(RamError::Overlap));
        assert!(
            ram.layout().find(0x2fff).is_some()
                && ram.layout().find(0x3000).is_none()
                && ram.layout().find(0xfff).is_none()
        );
        assert_eq!(ram.unmap(0x2000), Err(RamError::NotMapped));
        assert_eq!(ram.unmap(0x1000), Ok(()));
        assert_eq!(Arc::strong_count(&block), 1, "an unmapped region is released");
    }
}
