//! Paging: from linear to guest-physical addresses (SDM vol. 3A, chapter 4), and from there to host memory or to a device.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::core::{Core, Trap};
use crate::cpuid::Feature;
use crate::exception::Exception;
use crate::exec::Exec;
use crate::mem::canonical;
use crate::ram::{Region, granules};
use crate::state::{cr0, cr4, efer};
use crate::tlb::Set;

/// Page-fault error code bits (SDM vol. 3A, 4.7).
mod code {
    pub(super) const PRESENT: u32 = 1;
    pub(super) const WRITE: u32 = 2;
    pub(super) const USER: u32 = 4;
    pub(super) const RESERVED: u32 = 8;
    pub(super) const FETCH: u32 = 16;
}

/// Page table entry bits.
mod pte {
    pub(super) const P: u64 = 1;
    pub(super) const W: u64 = 2;
    pub(super) const U: u64 = 4;
    pub(super) const A: u64 = 1 << 5;
    pub(super) const D: u64 = 1 << 6;
    pub(super) const PS: u64 = 1 << 7;
    pub(super) const G: u64 = 1 << 8;
    pub(super) const NX: u64 = 1 << 63;
}

/// Width of physical addresses; CPUID leaf 0x8000_0008 says the same.
pub(crate) const PHYS_BITS: u32 = 46;
/// Address bits of an entry.
const ADDR: u64 = ((1 << PHYS_BITS) - 1) & !0xfff;
/// Physical address bits above the width, which must be zero.
const ADDR_RESERVED: u64 = ((1 << 52) - 1) & !((1 << PHYS_BITS) - 1);

/// What an access is, for rights and error codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    Read,
    Write,
    Fetch,
}

/// A translation that was found and allows the access it was made for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Walk {
    pub(crate) gpa: u64,
    /// A write is allowed too and the dirty bit is set.
    pub(crate) write: bool,
    pub(crate) global: bool,
    /// log2 of the page size if it is larger than 4 KiB.
    pub(crate) large: Option<u32>,
}

/// Where an access goes.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Place {
    /// Nowhere: the part is empty.
    None,
    /// Host address in guest RAM.
    Host(usize),
    /// Guest-physical address of a device.
    Device(u64),
}

/// A cached translation for code.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ItlbEntry {
    /// Linear page, and bit 0 for CPL 3; all ones when empty.
    key: u64,
    gpa: u64,
}

impl ItlbEntry {
    pub(crate) const EMPTY: ItlbEntry = ItlbEntry { key: u64::MAX, gpa: 0 };
}

/// Shape of a paging mode: levels from the top, each with the shift of its index.
struct Shape {
    shifts: &'static [u32],
    index_mask: u64,
    /// Eight-byte entries.
    wide: bool,
}

const LONG: Shape = Shape { shifts: &[39, 30, 21, 12], index_mask: 511, wide: true };
const PAE: Shape = Shape { shifts: &[21, 12], index_mask: 511, wide: true };
const LEGACY: Shape = Shape { shifts: &[22, 12], index_mask: 1023, wide: false };

impl Core {
    /// An entry of a page table; outside RAM it reads as all ones.
    fn read_entry(&self, gpa: u64, wide: bool) -> u64 {
        let Some(region) = self.layout.find(gpa) else {
            return u64::MAX;
        };
        let host = region.host(gpa);
        if wide {
            // SAFETY: inside a region of the current layout, which lives as long as `self.layout`; entries are aligned.
            let cell = unsafe { AtomicU64::from_ptr(std::ptr::with_exposed_provenance_mut(host)) };
            u64::from_le(cell.load(Ordering::Relaxed))
        } else {
            // SAFETY: as above.
            let cell = unsafe { AtomicU32::from_ptr(std::ptr::with_exposed_provenance_mut(host)) };
            u64::from(u32::from_le(cell.load(Ordering::Relaxed)))
        }
    }

    /// Sets accessed or dirty bits if the entry is still what was read; `false` if another CPU changed it.
    fn update_entry(&mut self, gpa: u64, wide: bool, old: u64, bits: u64) -> bool {
        if old & bits == bits {
            return true;
        }
        let layout = self.layout.clone();
        let Some(region) = layout.find(gpa).filter(|r| r.writable) else {
            return true;
        };
        let host = region.host(gpa);
        region.mark_dirty(gpa);
        let done = if wide {
            // SAFETY: as in `read_entry`, and the region is writable.
            let cell = unsafe { AtomicU64::from_ptr(std::ptr::with_exposed_provenance_mut(host)) };
            cell.compare_exchange(old.to_le(), (old | bits).to_le(), Ordering::SeqCst, Ordering::SeqCst).is_ok()
        } else {
            // SAFETY: as above.
            let cell = unsafe { AtomicU32::from_ptr(std::ptr::with_exposed_provenance_mut(host)) };
            let (old, new) = (old as u32, (old | bits) as u32);
            cell.compare_exchange(old.to_le(), new.to_le(), Ordering::SeqCst, Ordering::SeqCst).is_ok()
        };
        if region.code_mask(gpa) & granules(gpa, 8) != 0 {
            self.ram.code_written(&layout, gpa, 8);
        }
        done
    }

    /// Translates `lin` for an access, setting accessed and dirty bits; or the error code of the page fault.
    pub(crate) fn walk(&mut self, lin: u64, access: Access, set: Set) -> Result<Walk, u32> {
        if self.st.cr0 & cr0::PG == 0 {
            return Ok(Walk { gpa: lin, write: true, global: false, large: None });
        }
        loop {
            if let Some(result) = self.walk_once(lin, access, set) {
                return result;
            }
        }
    }

    /// One try; `None` if another CPU changed an entry in between.
    fn walk_once(&mut self, lin: u64, access: Access, set: Set) -> Option<Result<Walk, u32>> {
        let user = set == Set::User;
        let (cr4, nxe) = (self.st.cr4, self.st.msr.efer & efer::NXE != 0);
        let mut error = 0;
        if access == Access::Write {
            error |= code::WRITE;
        }
        if user {
            error |= code::USER;
        }
        if access == Access::Fetch && (nxe && cr4 & cr4::PAE != 0 || cr4 & cr4::SMEP != 0) {
            error |= code::FETCH;
        }
        let long = self.long_mode();
        let (shape, mut table) = if long {
            (&LONG, self.st.cr3 & ADDR)
        } else if cr4 & cr4::PAE != 0 {
            let pdpte = self.st.pdpte[(lin >> 30 & 3) as usize];
            if pdpte & pte::P == 0 {
                return Some(Err(error));
            }
            (&PAE, pdpte & ADDR)
        } else {
            (&LEGACY, self.st.cr3 & 0xffff_f000)
        };
        let mut rights = pte::W | pte::U;
        let mut nx = false;
        for &shift in shape.shifts {
            let size = if shape.wide { 8 } else { 4 };
            let at = table + (lin >> shift & shape.index_mask) * size;
            let entry = self.read_entry(at, shape.wide);
            if entry & pte::P == 0 {
                return Some(Err(error));
            }
            let leaf = shift == 12
                || entry & pte::PS != 0
                    && match shift {
                        21 | 30 => true,
                        22 => cr4 & cr4::PSE != 0,
                        _ => false,
                    };
            let mut reserved = 0;
            if shape.wide {
                reserved |= ADDR_RESERVED;
                if !nxe {
                    reserved |= pte::NX;
                }
                if !long {
                    // PAE: bits 62 to 52 are reserved too.
                    reserved |= 0x7ff0_0000_0000_0000;
                }
                if shift == 39 || shift == 30 && !self.cpuid.has(Feature::Page1g) {
                    reserved |= pte::PS;
                }
                if leaf && shift > 12 {
                    // Bit 12 is PAT.
                    reserved |= (1 << shift) - (1 << 13);
                }
            } else if leaf && shift == 22 {
                // PSE-36: bits 20 to 13 are address bits 39 to 32; bit 21 is reserved.
                reserved |= 1 << 21;
            }
            if entry & reserved != 0 {
                return Some(Err(error | code::PRESENT | code::RESERVED));
            }
            rights &= entry;
            nx |= shape.wide && entry & pte::NX != 0;
            if !leaf {
                if !self.update_entry(at, shape.wide, entry, pte::A) {
                    return None;
                }
                table = if shape.wide { entry & ADDR } else { entry & 0xffff_f000 };
                continue;
            }
            let user_page = rights & pte::U != 0;
            let writable = rights & pte::W != 0;
            let may_write = writable || !user && self.st.cr0 & cr0::WP == 0;
            let allowed = match access {
                // Users fetch from user pages; the supervisor too, unless SMEP forbids it.
                Access::Fetch => !nx && if user { user_page } else { !user_page || cr4 & cr4::SMEP == 0 },
                _ => (user_page || !user) && !(user_page && set == Set::Smap) && (access == Access::Read || may_write),
            };
            if !allowed {
                return Some(Err(error | code::PRESENT));
            }
            let bits = if access == Access::Write { pte::A | pte::D } else { pte::A };
            if !self.update_entry(at, shape.wide, entry, bits) {
                return None;
            }
            let offset = lin & ((1 << shift) - 1);
            let base = if shape.wide {
                entry & ADDR & !((1 << shift) - 1)
            } else if shift == 22 {
                entry & 0xffc0_0000 | (entry >> 13 & 0xff) << 32
            } else {
                entry & 0xffff_f000
            };
            return Some(Ok(Walk {
                gpa: base + offset,
                write: may_write && (entry | bits) & pte::D != 0,
                global: entry & pte::G != 0 && cr4 & cr4::PGE != 0,
                large: (shift > 12).then_some(shift),
            }));
        }
        Some(Err(error))
    }

    /// Where `len` bytes at `lin` are (within one page), for an access with the rights of `set`; fills the TLB. Raises #PF, or asks to
    /// run alone for devices and for writes to decoded code.
    pub(crate) fn place(&mut self, set: Set, lin: u64, len: u64, write: bool) -> Exec<Place> {
        let access = if write { Access::Write } else { Access::Read };
        if self.long_mode() && !canonical(lin) {
            return self.trap(Trap::NonCanonical(lin));
        }
        let walk = match self.walk(lin, access, set) {
            Ok(walk) => walk,
            Err(code) => return self.raise(Exception::Pf { addr: lin, code }),
        };
        let Some(region) = self.layout.find(walk.gpa).filter(|r| r.writable || !write) else {
            self.need_alone()?;
            return Ok(Place::Device(walk.gpa));
        };
        let mask = region.code_mask(walk.gpa);
        let host = region.host(walk.gpa);
        // A page that is read and could be written without further ado is filled for both.
        let fast = mask == 0 && walk.write && region.writable && (write || !region.logs());
        if write {
            region.mark_dirty(walk.gpa);
            if mask & granules(walk.gpa, len) != 0 {
                self.need_alone()?;
                self.code_writes.push((walk.gpa, len));
            }
        }
        if !self.watching {
            self.tlb.fill(set, lin, host - (walk.gpa & 0xfff) as usize, fast, walk.global, walk.large);
        }
        Ok(Place::Host(host))
    }

    /// Guest-physical address for a fetch at `lin`.
    pub(crate) fn fetch_address(&mut self, lin: u64) -> Exec<u64> {
        let user = self.st.cpl == 3;
        let key = lin & !0xfff | u64::from(user);
        let slot = (lin >> 12 & 63) as usize;
        let entry = self.itlb[slot];
        if entry.key == key {
            return Ok(entry.gpa | lin & 0xfff);
        }
        if self.long_mode() && !canonical(lin) {
            return self.raise(Exception::Gp(0));
        }
        let set = if user { Set::User } else { Set::Supervisor };
        match self.walk(lin, Access::Fetch, set) {
            Ok(walk) => {
                self.itlb[slot] = ItlbEntry { key, gpa: walk.gpa & !0xfff };
                Ok(walk.gpa)
            }
            Err(code) => self.raise(Exception::Pf { addr: lin, code }),
        }
    }

    /// Reads physical memory, if all of it is RAM.
    pub(crate) fn read_physical(&self, gpa: u64) -> Option<u64> {
        self.layout.find(gpa).filter(|_| gpa % 8 == 0).map(|_| self.read_entry(gpa, true))
    }

    /// The bytes of code at a physical address, to the end of its page at most.
    pub(crate) fn code_bytes(&self, region: &Region, gpa: u64, out: &mut [u8]) -> usize {
        let len = out.len().min(0x1000 - (gpa & 0xfff) as usize);
        let host = region.host(gpa);
        for (i, byte) in out[..len].iter_mut().enumerate() {
            // SAFETY: inside the page of a region of the current layout.
            *byte = unsafe { std::ptr::with_exposed_provenance::<u8>(host + i).read_volatile() };
        }
        len
    }
}
