//! Memory of the framework's virtual machine: mappings, and a dirty log by write protection, as there is no other.

use super::check;
use std::collections::BTreeMap;
use std::ffi::c_void;
use std::fmt;
use std::sync::Mutex;
use vm_accel_backend::lock;
use vm_accel_backend::slots::Mapper;
use vm_accel_core::accel::MemoryFlags;
use vm_accel_core::error::VcpuResult;
use vm_accel_core::memory::GuestRegion;
use vm_accel_sys::hvf::{HvReturn, memory};

/// The framework's calls; both architectures have the same.
#[derive(Clone, Copy)]
pub(super) struct Calls {
    pub(super) map: unsafe extern "C" fn(*const c_void, u64, usize, u64) -> HvReturn,
    pub(super) unmap: unsafe extern "C" fn(u64, usize) -> HvReturn,
    pub(super) protect: unsafe extern "C" fn(u64, usize, u64) -> HvReturn,
}

struct Mapping {
    /// What is mapped stays in memory as long as the framework may know of it.
    region: GuestRegion,
    flags: MemoryFlags,
    /// With a dirty log: the pages that were written since they were last protected.
    dirty: Vec<u64>,
}

impl Mapping {
    /// The protection of pages, `written` or not.
    fn protection(&self, written: bool) -> u64 {
        let logged = self.flags.contains(MemoryFlags::LOG_DIRTY) && !written;
        [
            (MemoryFlags::READ, memory::READ),
            (MemoryFlags::WRITE, if logged { 0 } else { memory::WRITE }),
            (MemoryFlags::EXECUTE, memory::EXEC),
        ]
        .into_iter()
        .filter(|(ours, _)| self.flags.contains(*ours))
        .fold(0, |all, (_, theirs)| all | theirs)
    }

    fn start_log(&mut self, page: u64) {
        let pages = if self.flags.contains(MemoryFlags::LOG_DIRTY) { self.region.size() / page } else { 0 };
        self.dirty = vec![0; pages.div_ceil(64) as usize];
    }
}

/// What is mapped where.
pub(super) struct Mappings {
    calls: Calls,
    page: u64,
    map: Mutex<BTreeMap<u64, Mapping>>,
}

impl fmt::Debug for Mappings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mappings").finish_non_exhaustive()
    }
}

impl Mappings {
    pub(super) fn new(calls: Calls, page: u64) -> Self {
        Self { calls, page, map: Mutex::default() }
    }

    fn protect(&self, gpa: u64, size: u64, flags: u64) -> VcpuResult<()> {
        // SAFETY: no preconditions: the framework checks the range.
        check("hv_vm_protect", unsafe { (self.calls.protect)(gpa, size as usize, flags) })
    }

    /// An access was refused: true if it may be tried again. That is where the framework, as far as it was told, lets it pass, or
    /// where the dirty log refused it, which has noted the page now and lets writes pass.
    pub(super) fn retry(&self, gpa: u64, rights: MemoryFlags) -> VcpuResult<bool> {
        let mut map = lock(&self.map);
        let found = map.range_mut(..=gpa).next_back();
        let Some((at, mapping)) = found.filter(|(at, mapping)| gpa - **at < mapping.region.size()) else {
            return Ok(false);
        };
        if !mapping.flags.contains(rights) {
            return Ok(false);
        }
        if rights.contains(MemoryFlags::WRITE) && !mapping.dirty.is_empty() {
            let page = (gpa - at) / self.page;
            self.protect(at + page * self.page, self.page, mapping.protection(true))?;
            mapping.dirty[page as usize / 64] |= 1 << (page % 64);
        }
        Ok(true)
    }
}

impl Mapper for Mappings {
    type Hold = ();

    fn map(&self, gpa: u64, region: &GuestRegion, flags: MemoryFlags) -> VcpuResult<()> {
        let mut mapping = Mapping { region: region.clone(), flags, dirty: Vec::new() };
        mapping.start_log(self.page);
        let mut map = lock(&self.map);
        let (host, size) = (region.as_ptr().cast_const().cast(), region.size() as usize);
        // SAFETY: the memory is the region's, of which a clone is kept until it is unmapped or the VM is gone.
        let mapped = unsafe { (self.calls.map)(host, gpa, size, mapping.protection(false)) };
        check("hv_vm_map", mapped)?;
        map.insert(gpa, mapping);
        Ok(())
    }

    fn unmap(&self, gpa: u64, size: u64) -> VcpuResult<()> {
        let mut map = lock(&self.map);
        // SAFETY: no preconditions: the framework checks the range.
        check("hv_vm_unmap", unsafe { (self.calls.unmap)(gpa, size as usize) })?;
        map.remove(&gpa);
        Ok(())
    }

    fn log_dirty(&self, gpa: u64, _: &GuestRegion, flags: MemoryFlags) -> VcpuResult<()> {
        let mut map = lock(&self.map);
        let Some(mapping) = map.get_mut(&gpa) else {
            return Ok(());
        };
        let old = std::mem::replace(&mut mapping.flags, flags);
        let changed = self.protect(gpa, mapping.region.size(), mapping.protection(false));
        match changed {
            Ok(()) => mapping.start_log(self.page),
            Err(_) => mapping.flags = old,
        }
        changed
    }

    fn take_dirty(&self, gpa: u64, size: u64) -> VcpuResult<Vec<u64>> {
        let mut words = vec![0; (size / self.page).div_ceil(64) as usize];
        let mut map = lock(&self.map);
        let Some(mapping) = map.get_mut(&gpa) else {
            return Ok(words);
        };
        for (n, word) in words.iter_mut().enumerate() {
            let mut bits = mapping.dirty.get(n).copied().unwrap_or(0);
            *word = bits;
            // One call per run of pages. The bits stay until all are protected again: then a page is in this answer only when
            // later writes are noted anew, and the caller reads it after that.
            while bits != 0 {
                let first = bits.trailing_zeros();
                let count = (bits >> first).trailing_ones();
                let at = gpa + (n as u64 * 64 + u64::from(first)) * self.page;
                self.protect(at, u64::from(count) * self.page, mapping.protection(false))?;
                bits &= !(u64::MAX >> (64 - count) << first);
            }
        }
        mapping.dirty.fill(0);
        Ok(words)
    }
}
