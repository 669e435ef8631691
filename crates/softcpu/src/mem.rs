//! Accesses to guest memory by instructions: the fast path through the TLB, operands with their segments, and
//! read-modify-write with host atomics. The only unsafe code of the CPU besides `ram` is here: it turns a TLB hit into a host access.
//!
//! Guest memory is shared with other CPUs and with devices: it is only ever touched through raw pointers, by volatile or
//! atomic accesses, and never through references.

use std::ptr::{with_exposed_provenance, with_exposed_provenance_mut};
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use crate::core::{Core, Trap};
use crate::exception::Exception;
use crate::exec::form::Word;
use crate::exec::{AM_16, AM_32, AM_LONG, Exec, Op};
use crate::mmu::Place;
use crate::state::seg;
use crate::tlb::Set;

/// A value as it is in memory, at any address.
#[derive(Clone, Copy)]
#[repr(C, packed)]
struct Unaligned<T>(T);

/// Plain data of a fixed size that can be in guest memory.
pub(crate) trait Mem: Copy + 'static {
    /// Bytes.
    const SIZE: u64 = size_of::<Self>() as u64;
    /// From little-endian bytes; `bytes` has `SIZE` bytes.
    fn from_bytes(bytes: &[u8]) -> Self;
    /// To little-endian bytes; `out` has `SIZE` bytes.
    fn to_bytes(self, out: &mut [u8]);
    /// From little endian to the host's order.
    fn swap(self) -> Self;
}

macro_rules! impl_mem {
    ($($t:ty)*) => {$(
        impl Mem for $t {
            fn from_bytes(bytes: &[u8]) -> Self {
                let mut raw = [0; size_of::<Self>()];
                raw.copy_from_slice(&bytes[..size_of::<Self>()]);
                Self::from_le_bytes(raw)
            }
            fn to_bytes(self, out: &mut [u8]) {
                out.copy_from_slice(&self.to_le_bytes());
            }
            #[inline(always)]
            fn swap(self) -> Self {
                self.to_le()
            }
        }
    )*};
}
impl_mem!(u8 u16 u32 u64 u128);

/// Reads guest memory.
///
/// # Safety
/// `host` came from a TLB hit or from [`Place::Host`] for at least `T::SIZE` bytes, in the current block.
#[inline(always)]
unsafe fn host_read<T: Mem>(host: usize) -> T {
    // SAFETY: the caller's promise; the address was exposed by `Ram::map`. Volatile, because other threads write it.
    unsafe { with_exposed_provenance::<Unaligned<T>>(host).read_volatile().0.swap() }
}

/// Writes guest memory.
///
/// # Safety
/// As [`host_read`], for writing.
#[inline(always)]
unsafe fn host_write<T: Mem>(host: usize, value: T) {
    if host % align_of::<T>() == 0 {
        // One store instruction, and one that the compiler does not make by way of the stack.
        // SAFETY: the caller's promise, see `host_read`; aligned as just checked.
        unsafe { with_exposed_provenance_mut::<T>(host).write_volatile(value.swap()) }
    } else {
        // SAFETY: the caller's promise; see `host_read`.
        unsafe { with_exposed_provenance_mut::<Unaligned<T>>(host).write_volatile(Unaligned(value.swap())) }
    }
}

impl Core {
    /// Reads at a linear address with the rights of the current CPL.
    #[inline(always)]
    pub(crate) fn read<T: Mem>(&mut self, lin: u64) -> Exec<T> {
        let entry = self.tlb.entry(lin);
        // The tag of the last byte: an access that crosses the page cannot match, see `tlb::index`.
        if entry.read == self.tlb.tag(lin.wrapping_add(T::SIZE - 1)) {
            // SAFETY: the entry is of this generation, so the page is mapped, and the access stays in it.
            Ok(unsafe { host_read(entry.add.wrapping_add(lin as usize)) })
        } else {
            self.read_slow(self.set, lin)
        }
    }

    /// Writes at a linear address with the rights of the current CPL.
    #[inline(always)]
    pub(crate) fn write<T: Mem>(&mut self, lin: u64, value: T) -> Exec {
        let entry = self.tlb.entry(lin);
        if entry.write == self.tlb.tag(lin.wrapping_add(T::SIZE - 1)) {
            // SAFETY: as in `read`; the write tag is only set for writable RAM without decoded code.
            unsafe { host_write(entry.add.wrapping_add(lin as usize), value) };
            Ok(())
        } else {
            self.write_slow(self.set, lin, value)
        }
    }

    /// The memory operand if the TLB has it, for threads: `op.am` is 0. `ALIGNED`: 16 bytes that must be.
    #[inline(always)]
    pub(crate) fn hit_load<T: Mem, const ALIGNED: bool>(&self, op: &Op) -> Option<T> {
        let lin = self.offset(op);
        let entry = self.tlb.entry(lin);
        if entry.read != self.tlb.tag(lin.wrapping_add(T::SIZE - 1)) || ALIGNED && lin & (T::SIZE - 1) != 0 {
            return None;
        }
        // SAFETY: as in `read`.
        Some(unsafe { host_read(entry.add.wrapping_add(lin as usize)) })
    }

    /// The counterpart of [`Core::hit_load`]; `false` if nothing was done.
    #[inline(always)]
    pub(crate) fn hit_store<T: Mem, const ALIGNED: bool>(&mut self, op: &Op, value: T) -> bool {
        let lin = self.offset(op);
        let entry = self.tlb.entry(lin);
        let hit = entry.write == self.tlb.tag(lin.wrapping_add(T::SIZE - 1)) && (!ALIGNED || lin & (T::SIZE - 1) == 0);
        if hit {
            // SAFETY: as in `write`.
            unsafe { host_write(entry.add.wrapping_add(lin as usize), value) };
        }
        hit
    }

    /// The value at `lin` if the TLB has it; handlers use it for a path without calls, before the general one.
    #[inline(always)]
    pub(crate) fn hit_read<T: Word>(&self, lin: u64) -> Option<u64> {
        let entry = self.tlb.entry(lin);
        if entry.read != self.tlb.tag(lin.wrapping_add(T::BYTES - 1)) {
            return None;
        }
        let host = entry.add.wrapping_add(lin as usize);
        // SAFETY: as in `read`.
        Some(unsafe {
            match T::BITS {
                8 => u64::from(host_read::<u8>(host)),
                16 => u64::from(host_read::<u16>(host)),
                32 => u64::from(host_read::<u32>(host)),
                _ => host_read::<u64>(host),
            }
        })
    }

    /// Writes at `lin` if the TLB has it; `false` if nothing was done.
    #[inline(always)]
    pub(crate) fn hit_write<T: Word>(&mut self, lin: u64, value: u64) -> bool {
        let entry = self.tlb.entry(lin);
        if entry.write != self.tlb.tag(lin.wrapping_add(T::BYTES - 1)) {
            return false;
        }
        let host = entry.add.wrapping_add(lin as usize);
        // SAFETY: as in `write`.
        unsafe {
            match T::BITS {
                8 => host_write(host, value as u8),
                16 => host_write(host, value as u16),
                32 => host_write(host, value as u32),
                _ => host_write(host, value),
            }
        }
        true
    }

    /// Read-modify-write without `LOCK` at `lin` if the TLB has it; the old value.
    #[inline(always)]
    pub(crate) fn hit_rmw<T: Word>(&mut self, lin: u64, f: impl Fn(u64) -> u64) -> Option<u64> {
        let entry = self.tlb.entry(lin);
        if entry.write != self.tlb.tag(lin.wrapping_add(T::BYTES - 1)) {
            return None;
        }
        let old = self.hit_read::<T>(lin)?;
        self.hit_write::<T>(lin, f(old));
        Some(old)
    }

    /// Reads as the given set of rights.
    pub(crate) fn read_as<T: Mem>(&mut self, set: Set, lin: u64) -> Exec<T> {
        self.read_slow(set, lin)
    }

    /// Writes as the given set of rights.
    pub(crate) fn write_as<T: Mem>(&mut self, set: Set, lin: u64, value: T) -> Exec {
        self.write_slow(set, lin, value)
    }

    #[inline(never)]
    fn read_slow<T: Mem>(&mut self, set: Set, lin: u64) -> Exec<T> {
        if (lin & 0xfff) + T::SIZE <= 0x1000 && !self.watching {
            if let Some(host) = self.tlb.lookup(set, lin, false) {
                // SAFETY: a TLB hit for the page, and the access stays in it.
                return Ok(unsafe { host_read(host) });
            }
            if let Place::Host(host) = self.place(set, lin, T::SIZE, false)? {
                // SAFETY: just translated; the access stays in the page.
                return Ok(unsafe { host_read(host) });
            }
        }
        let mut bytes = [0; 16];
        let bytes = &mut bytes[..T::SIZE as usize];
        self.read_bytes(set, lin, bytes)?;
        Ok(T::from_bytes(bytes))
    }

    #[inline(never)]
    fn write_slow<T: Mem>(&mut self, set: Set, lin: u64, value: T) -> Exec {
        if (lin & 0xfff) + T::SIZE <= 0x1000 && !self.watching {
            if let Some(host) = self.tlb.lookup(set, lin, true) {
                // SAFETY: a TLB hit for the page, and the access stays in it.
                unsafe { host_write(host, value) };
                return Ok(());
            }
            if let Place::Host(host) = self.place(set, lin, T::SIZE, true)? {
                // SAFETY: just translated; the access stays in the page.
                unsafe { host_write(host, value) };
                return Ok(());
            }
        }
        let mut bytes = [0; 16];
        let bytes = &mut bytes[..T::SIZE as usize];
        value.to_bytes(bytes);
        self.write_bytes(set, lin, bytes)
    }

    /// The parts of an access that lie in one page each: the length of the first, where the second is.
    fn split(&mut self, lin: u64, len: usize) -> Exec<(usize, u64)> {
        let first = (0x1000 - (lin & 0xfff) as usize).min(len);
        let second = self.wrap(lin.wrapping_add(first as u64));
        // Every byte must have a canonical address, and that is found out before any of them is translated.
        if first < len && self.long_mode() && !canonical(second) {
            return self.trap(Trap::NonCanonical(second));
        }
        Ok((first, second))
    }

    /// A linear address: 32 bits wide outside 64-bit mode.
    #[inline]
    pub(crate) fn wrap(&self, lin: u64) -> u64 {
        if self.code64() || self.long_mode() && lin >> 32 == 0 { lin } else { lin & 0xffff_ffff }
    }

    /// Reads up to 4096 bytes; devices see accesses of at most eight.
    pub(crate) fn read_bytes(&mut self, set: Set, lin: u64, bytes: &mut [u8]) -> Exec {
        let (first, second) = self.split(lin, bytes.len())?;
        self.watch(lin, bytes.len() as u64, false);
        let places = [self.place(set, lin, first as u64, false)?, {
            if first < bytes.len() {
                self.place(set, second, (bytes.len() - first) as u64, false)?
            } else {
                Place::None
            }
        }];
        let (low, high) = bytes.split_at_mut(first);
        for (place, part) in places.into_iter().zip([low, high]) {
            match place {
                Place::None => {}
                Place::Host(host) => {
                    for (i, byte) in part.iter_mut().enumerate() {
                        // SAFETY: `place` covered all of the part.
                        *byte = unsafe { host_read(host + i) };
                    }
                }
                Place::Device(gpa) => {
                    let mut at = gpa;
                    for chunk in part.chunks_mut(8) {
                        self.device_read(at, chunk)?;
                        at = at.wrapping_add(chunk.len() as u64);
                    }
                }
            }
        }
        Ok(())
    }

    /// Writes up to 4096 bytes, all or (on a fault) none.
    pub(crate) fn write_bytes(&mut self, set: Set, lin: u64, bytes: &[u8]) -> Exec {
        let (first, second) = self.split(lin, bytes.len())?;
        self.watch(lin, bytes.len() as u64, true);
        let places = [self.place(set, lin, first as u64, true)?, {
            if first < bytes.len() { self.place(set, second, (bytes.len() - first) as u64, true)? } else { Place::None }
        }];
        let (low, high) = bytes.split_at(first);
        for (place, part) in places.into_iter().zip([low, high]) {
            match place {
                Place::None => {}
                Place::Host(host) => {
                    for (i, byte) in part.iter().enumerate() {
                        // SAFETY: `place` covered all of the part, for writing.
                        unsafe { host_write(host + i, *byte) };
                    }
                }
                Place::Device(gpa) => {
                    let mut at = gpa;
                    for chunk in part.chunks(8) {
                        self.device_write(at, chunk)?;
                        at = at.wrapping_add(chunk.len() as u64);
                    }
                }
            }
        }
        Ok(())
    }

    /// Host address for up to a page of RAM at `lin` in the current set, for the bulk paths of string instructions;
    /// `None` if it crosses the page, or is not plain RAM.
    pub(crate) fn bulk(&mut self, lin: u64, len: u64, write: bool) -> Option<usize> {
        if (lin & 0xfff) + len > 0x1000 || self.watching {
            return None;
        }
        self.tlb.lookup(self.set, lin, write)
    }

    /// Copies RAM to RAM, byte by byte in ascending order if the ranges overlap so.
    pub(crate) fn bulk_copy(&mut self, from: usize, to: usize, len: u64) {
        // SAFETY: both come from `bulk` in this very instruction with this length. `copy` allows overlap.
        unsafe {
            std::ptr::copy(with_exposed_provenance::<u8>(from), with_exposed_provenance_mut::<u8>(to), len as usize)
        };
    }

    /// Fills RAM with `count` copies of `value`.
    pub(crate) fn bulk_fill<T: Mem>(&mut self, to: usize, value: T, count: u64) {
        let to = with_exposed_provenance_mut::<Unaligned<T>>(to);
        for i in 0..count as usize {
            // SAFETY: `to` comes from `bulk` in this very instruction with `count * T::SIZE` bytes.
            unsafe { to.add(i).write(Unaligned(value.swap())) };
        }
    }

    /// Checks that `len` bytes at `lin` can be written, and raises what a write would raise. For instructions that store twice.
    pub(crate) fn probe_write(&mut self, lin: u64, len: u64) -> Exec {
        let set = self.set;
        let (first, second) = self.split(lin, len as usize)?;
        self.place(set, lin, first as u64, true)?;
        if (first as u64) < len {
            self.place(set, second, len - first as u64, true)?;
        }
        Ok(())
    }

    /// The offset part of the memory operand's address, not yet cut to the address size.
    #[inline(always)]
    pub(crate) fn offset(&self, op: &Op) -> u64 {
        self.st.gpr[usize::from(op.b & 31)]
            .wrapping_add(self.st.gpr[usize::from(op.i & 31)].wrapping_mul(u64::from(op.mul)))
            .wrapping_add(op.disp)
    }

    /// The effective address, as LEA computes it.
    #[inline(always)]
    pub(crate) fn effective(&self, op: &Op) -> u64 {
        let offset = self.offset(op);
        if op.am == 0 { offset } else { cut_offset(op, offset) }
    }

    /// The linear address of the memory operand for an access of `len` bytes; segment checks included.
    #[inline(always)]
    pub(crate) fn linear(&mut self, op: &Op, len: u64, write: bool) -> Exec<u64> {
        let offset = self.offset(op);
        if op.am == 0 { Ok(offset) } else { self.segmented(op, cut_offset(op, offset), len, write) }
    }

    /// As [`Core::linear`], for an offset computed elsewhere (string instructions).
    #[inline]
    pub(crate) fn segmented(&mut self, op: &Op, offset: u64, len: u64, write: bool) -> Exec<u64> {
        let segment = usize::from(op.am & 7);
        if op.am & AM_LONG != 0 || op.am == 0 {
            return Ok(self.st.segs[segment * usize::from(op.am != 0) + 6 * usize::from(op.am == 0)]
                .base
                .wrapping_add(offset));
        }
        self.segment_address(segment, offset, len, write)
    }

    /// Checks limit and rights of a segment (SDM vol. 3A, 5.3 to 5.5) and answers the linear address.
    #[inline(never)]
    pub(crate) fn segment_address(&mut self, segment: usize, offset: u64, len: u64, write: bool) -> Exec<u64> {
        let s = &self.st.segs[segment];
        let last = offset.wrapping_add(len - 1);
        let in_limit = if s.kind() & 0xc == 4 && !s.unusable {
            let top = if s.big() { 0xffff_ffff } else { 0xffff };
            offset > u64::from(s.limit) && last <= top
        } else {
            last <= u64::from(s.limit)
        };
        let allowed =
            !self.pe() || self.vm86() || !s.unusable && if write { s.kind() & 0xa == 2 } else { s.kind() & 0xa != 8 };
        if in_limit && allowed {
            return Ok(s.base.wrapping_add(offset) & 0xffff_ffff);
        }
        self.raise(if segment == seg::SS { Exception::Ss(0) } else { Exception::Gp(0) })
    }

    /// Reads the memory operand.
    #[inline(always)]
    pub(crate) fn load<T: Mem>(&mut self, op: &Op) -> Exec<T> {
        let lin = self.linear(op, T::SIZE, false)?;
        self.read(lin)
    }

    /// Writes the memory operand.
    #[inline(always)]
    pub(crate) fn store<T: Mem>(&mut self, op: &Op, value: T) -> Exec {
        let lin = self.linear(op, T::SIZE, true)?;
        self.write(lin, value)
    }

    /// Reads a 16-byte operand that must be aligned: else #GP(0).
    #[inline(always)]
    pub(crate) fn load_aligned(&mut self, op: &Op) -> Exec<u128> {
        let lin = self.linear(op, 16, false)?;
        if lin & 15 != 0 {
            return self.raise(Exception::Gp(0));
        }
        self.read(lin)
    }

    /// Writes a 16-byte operand that must be aligned: else #GP(0).
    #[inline(always)]
    pub(crate) fn store_aligned(&mut self, op: &Op, value: u128) -> Exec {
        let lin = self.linear(op, 16, true)?;
        if lin & 15 != 0 {
            return self.raise(Exception::Gp(0));
        }
        self.write(lin, value)
    }

    /// Reads an integer of the given width at a linear address, zero-extended.
    #[inline(always)]
    pub(crate) fn read_word<T: Word>(&mut self, lin: u64) -> Exec<u64> {
        match T::BITS {
            8 => self.read::<u8>(lin).map(u64::from),
            16 => self.read::<u16>(lin).map(u64::from),
            32 => self.read::<u32>(lin).map(u64::from),
            _ => self.read::<u64>(lin),
        }
    }

    /// Writes the low bits of `value` at a linear address.
    #[inline(always)]
    pub(crate) fn write_word<T: Word>(&mut self, lin: u64, value: u64) -> Exec {
        match T::BITS {
            8 => self.write(lin, value as u8),
            16 => self.write(lin, value as u16),
            32 => self.write(lin, value as u32),
            _ => self.write(lin, value),
        }
    }

    /// The integer memory operand, zero-extended.
    #[inline(always)]
    pub(crate) fn load_word<T: Word>(&mut self, op: &Op) -> Exec<u64> {
        let lin = self.linear(op, T::BYTES, false)?;
        self.read_word::<T>(lin)
    }

    /// Stores an integer memory operand.
    #[inline(always)]
    pub(crate) fn store_word<T: Word>(&mut self, op: &Op, value: u64) -> Exec {
        let lin = self.linear(op, T::BYTES, true)?;
        self.write_word::<T>(lin, value)
    }

    /// Reads, computes and writes back an integer at `lin`; answers the old value. Without `LOCK` it is a read and a write; the
    /// write's rights are checked before the read.
    #[inline(always)]
    pub(crate) fn rmw<T: Word, const LOCK: bool>(&mut self, lin: u64, f: impl Fn(u64) -> u64) -> Exec<u64> {
        let entry = self.tlb.entry(lin);
        if entry.write == self.tlb.tag(lin.wrapping_add(T::BYTES - 1)) {
            let host = entry.add.wrapping_add(lin as usize);
            // SAFETY: a TLB hit for writing, within the page.
            return Ok(unsafe { host_rmw::<T, LOCK>(&self.ram.split_lock, host, f) });
        }
        self.rmw_slow::<T, LOCK>(lin, f)
    }

    #[inline(never)]
    fn rmw_slow<T: Word, const LOCK: bool>(&mut self, lin: u64, f: impl Fn(u64) -> u64) -> Exec<u64> {
        let set = self.set;
        if (lin & 0xfff) + T::BYTES <= 0x1000 {
            self.watch(lin, T::BYTES, true);
            let host = match self.tlb.lookup(set, lin, true) {
                Some(host) => Some(host),
                None => match self.place(set, lin, T::BYTES, true)? {
                    Place::Host(host) => Some(host),
                    _ => None,
                },
            };
            if let Some(host) = host {
                // SAFETY: just translated for writing, within the page.
                return Ok(unsafe { host_rmw::<T, LOCK>(&self.ram.split_lock, host, f) });
            }
        } else {
            self.probe_write(lin, T::BYTES)?;
        }
        // Device memory, or across two pages: atomic only towards other such accesses.
        let ram = self.ram.clone();
        let _guard = LOCK.then(|| ram.split_lock.lock());
        let mut bytes = [0; 8];
        let bytes = &mut bytes[..T::BYTES as usize];
        self.read_bytes(set, lin, bytes)?;
        let mut old = [0; 8];
        old[..bytes.len()].copy_from_slice(bytes);
        let old = u64::from_le_bytes(old);
        bytes.copy_from_slice(&f(old).to_le_bytes()[..T::BYTES as usize]);
        self.write_bytes(set, lin, bytes)?;
        Ok(old)
    }

    /// A compare-and-exchange of 16 bytes at `lin`, aligned (CMPXCHG16B), or 8 (CMPXCHG8B, any alignment): writes `new` if the value
    /// is `expected`, and the old value back if not. Answers the old value.
    pub(crate) fn exchange16(&mut self, lin: u64, expected: u128, new: u128) -> Exec<u128> {
        self.probe_write(lin, 16)?;
        // Hosts lack a stable 128-bit atomic in Rust: atomic towards other CPUs' 128-bit exchanges by the lock. Towards plain 8-byte
        // writers it is two 64-bit operations, the first of them a real compare-and-exchange.
        let ram = self.ram.clone();
        let _guard = ram.split_lock.lock();
        let old: u128 = self.read(lin)?;
        let write = if old == expected { new } else { old };
        if old == expected || self.alone {
            self.write(lin, write)?;
        }
        Ok(old)
    }

    /// Notes which data breakpoints an access hits.
    #[inline]
    pub(crate) fn watch(&mut self, lin: u64, len: u64, write: bool) {
        if self.watching {
            self.watch_slow(lin, len, write);
        }
    }
}

/// Whether bits 63 to 47 are all equal.
#[inline]
pub(crate) fn canonical(lin: u64) -> bool {
    let top = lin as i64 >> 47;
    top == 0 || top == -1
}

/// Cuts an offset to the address size of the operand.
#[inline(always)]
fn cut_offset(op: &Op, offset: u64) -> u64 {
    if op.am & AM_32 != 0 {
        offset & 0xffff_ffff
    } else if op.am & AM_16 != 0 {
        offset & 0xffff
    } else {
        offset
    }
}

/// Read-modify-write of RAM; with `LOCK` as one host atomic operation.
///
/// # Safety
/// `host` is valid for reading and writing `T::BYTES` bytes.
#[inline(always)]
unsafe fn host_rmw<T: Word, const LOCK: bool>(
    split: &std::sync::Mutex<()>,
    host: usize,
    f: impl Fn(u64) -> u64,
) -> u64 {
    macro_rules! at {
        ($int:ty, $atomic:ty) => {{
            if LOCK && host % size_of::<$int>() == 0 {
                // SAFETY: valid by the caller's promise, aligned as just checked, and other threads use atomics or volatile accesses.
                let cell = unsafe { <$atomic>::from_ptr(with_exposed_provenance_mut(host)) };
                let mut old = cell.load(Ordering::SeqCst);
                loop {
                    let new = f(u64::from(<$int>::from_le(old))) as $int;
                    match cell.compare_exchange_weak(old, new.to_le(), Ordering::SeqCst, Ordering::SeqCst) {
                        Ok(_) => break u64::from(<$int>::from_le(old)),
                        Err(now) => old = now,
                    }
                }
            } else {
                let _guard = LOCK.then(|| split.lock());
                // SAFETY: the caller's promise.
                let old = unsafe { host_read::<$int>(host) };
                let old = u64::from(old);
                // SAFETY: the caller's promise.
                unsafe { host_write::<$int>(host, f(old) as $int) };
                old
            }
        }};
    }
    match T::BITS {
        8 => at!(u8, AtomicU8),
        16 => at!(u16, AtomicU16),
        32 => at!(u32, AtomicU32),
        _ => at!(u64, AtomicU64),
    }
}
