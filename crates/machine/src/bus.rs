//! Address spaces of a machine: which device answers at which port or guest physical address.
//!
//! One [`Bus`] is one address space; a PC has two, ports and memory-mapped I/O. It is filled while the
//! board is built (`&mut self`) and shared read-only afterwards, so that finding a device takes no lock at all.
//! Each device has a mutex of its own; the bus holds at most one of them at a time, and none
//! while it looks for the next, so two vCPUs in two devices never wait for each other.
//!
//! It must never panic or fail on what a guest does: an access to nobody reads all ones and writes nothing,
//! as an ISA bus with its pull-up resistors does.
//!
//! # How an access is cut
//!
//! An access is first cut at the borders of the registered ranges, and the part inside one range then into naturally aligned
//! pieces (relative to the start of the range) no wider than [`BusDevice::max_access`]. So a 16-bit `out` to a
//! UART becomes two byte writes at ascending addresses, as the ISA bus did it, a 64-bit store to 32-bit
//! registers two 32-bit writes, and a 32-bit `in` that begins before a device and ends in it reads all ones
//! for the bytes that nobody has. A device therefore only sees 1, 2, 4 or 8 bytes inside its range.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Widest access that the bus hands to a device in one piece, in bytes.
pub const MAX_ACCESS: usize = 8;

/// A device that answers accesses in a range of an address space.
///
/// All calls are made with the device's mutex held. A device may drive interrupt lines and request
/// power events from inside, but must not access the bus it sits on: that could wait for itself.
pub trait BusDevice: Send {
    /// A short name for messages, such as `uart`.
    fn name(&self) -> &'static str;

    /// The widest access in bytes that the device takes in one piece: 1, 2, 4 or 8. Wider ones are cut.
    ///
    /// Asked once, at registration.
    fn max_access(&self) -> usize {
        1
    }

    /// The guest reads `data.len()` bytes (1, 2, 4 or 8) at `offset`, which counts from the start of the range plus what
    /// [`Bus::register_window`] was told.
    ///
    /// `data` arrives filled with ones; what the device leaves alone reads as ones.
    fn read(&mut self, offset: u64, data: &mut [u8]);

    /// The guest writes `data` (1, 2, 4 or 8 bytes) at `offset`, counted as for a read.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// A device as the bus and its other users (an input thread, for one) share it.
pub type SharedDevice = Arc<Mutex<dyn BusDevice>>;

/// Locks a device's mutex, poisoned or not.
///
/// A device has no invariant that a panic in another thread could break in a way that matters more than the
/// machine going on to its orderly end.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Why a range cannot be registered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BusError {
    /// The range has no bytes.
    #[error("device {device}: its range at {start:#x} is empty")]
    Empty {
        /// The device that was to be registered.
        device: &'static str,
        /// First address of the range.
        start: u64,
    },
    /// The range does not fit the address space.
    #[error("device {device}: {len:#x} bytes at {start:#x} end beyond the address space")]
    OutOfSpace {
        /// The device that was to be registered.
        device: &'static str,
        /// First address of the range.
        start: u64,
        /// Length of the range in bytes.
        len: u64,
    },
    /// Another device is there already.
    #[error("device {device}: {len:#x} bytes at {start:#x} overlap device {other} at {other_start:#x}")]
    Overlap {
        /// The device that was to be registered.
        device: &'static str,
        /// First address of its range.
        start: u64,
        /// Length of its range in bytes.
        len: u64,
        /// The device that is there.
        other: &'static str,
        /// First address of that one's range.
        other_start: u64,
    },
    /// The device names an access width that no bus has.
    #[error("device {device}: its widest access is {width} bytes, not 1, 2, 4 or 8")]
    Width {
        /// The device that was to be registered.
        device: &'static str,
        /// What its `max_access` answered.
        width: usize,
    },
}

struct Entry {
    start: u64,
    /// The device's offset of `start`.
    base: u64,
    /// Last address: inclusive, so that a range may end at the top of the space.
    last: u64,
    max_access: usize,
    name: &'static str,
    device: SharedDevice,
}

/// One address space. See the [module](self) for how it cuts accesses and locks devices.
pub struct Bus {
    /// Sorted by `start`, disjoint.
    entries: Vec<Entry>,
    last_address: u64,
}

/// A part of an access: bytes `from..to` of it, and who takes them.
struct Piece<'a> {
    from: usize,
    to: usize,
    offset: u64,
    entry: &'a Entry,
}

impl Bus {
    /// An empty space of 64 Ki ports.
    #[must_use]
    pub fn ports() -> Self {
        Self { entries: Vec::new(), last_address: 0xffff }
    }

    /// An empty space of 64-bit physical addresses.
    #[must_use]
    pub fn mmio() -> Self {
        Self { entries: Vec::new(), last_address: u64::MAX }
    }

    /// Lets `device` answer for the `len` bytes from `start`, with offsets from 0.
    ///
    /// # Errors
    /// [`BusError`] if the range is empty, leaves the address space or overlaps a registered one. The bus is then unchanged.
    pub fn register(&mut self, start: u64, len: u64, device: SharedDevice) -> Result<(), BusError> {
        self.register_window(start, len, 0, device)
    }

    /// Lets `device` answer for the `len` bytes from `start`, the first of which is offset `base` to the device.
    ///
    /// This is how a device with registers in several places tells them apart.
    ///
    /// # Errors
    /// As [`register`](Self::register); offsets must not leave 64 bits either.
    pub fn register_window(&mut self, start: u64, len: u64, base: u64, device: SharedDevice) -> Result<(), BusError> {
        let (name, width) = {
            let guard = lock(&device);
            (guard.name(), guard.max_access())
        };
        if !matches!(width, 1 | 2 | 4 | MAX_ACCESS) {
            return Err(BusError::Width { device: name, width });
        }
        let Some(extra) = len.checked_sub(1) else {
            return Err(BusError::Empty { device: name, start });
        };
        let last = match start.checked_add(extra) {
            Some(last) if last <= self.last_address && base.checked_add(extra).is_some() => last,
            _ => {
                return Err(BusError::OutOfSpace { device: name, start, len });
            }
        };
        // Ranges are disjoint, so the first one that ends at or after our start is the only one to ask.
        let at = self.entries.partition_point(|e| e.last < start);
        if let Some(other) = self.entries.get(at).filter(|e| e.start <= last) {
            return Err(BusError::Overlap { device: name, start, len, other: other.name, other_start: other.start });
        }
        self.entries.insert(at, Entry { start, base, last, max_access: width, name, device });
        Ok(())
    }

    /// Serves a read of `data.len()` bytes at `addr`. Bytes that nobody answers are `0xff`.
    pub fn read(&self, addr: u64, data: &mut [u8]) {
        data.fill(0xff);
        let mut done = 0;
        while let Some(piece) = self.next_piece(addr, done, data.len()) {
            lock(&piece.entry.device).read(piece.offset, &mut data[piece.from..piece.to]);
            done = piece.to;
        }
    }

    /// Serves a write of `data` at `addr`. Bytes that nobody takes are dropped.
    pub fn write(&self, addr: u64, data: &[u8]) {
        let mut done = 0;
        while let Some(piece) = self.next_piece(addr, done, data.len()) {
            lock(&piece.entry.device).write(piece.offset, &data[piece.from..piece.to]);
            done = piece.to;
        }
    }

    /// The first piece at or after byte `done` of an access of `len` bytes at `addr` that a device takes.
    fn next_piece(&self, addr: u64, done: usize, len: usize) -> Option<Piece<'_>> {
        if done >= len {
            return None;
        }
        let at = addr.checked_add(done as u64)?;
        let entry = self.entries.get(self.entries.partition_point(|e| e.last < at))?;
        let from = if entry.start > at {
            let gap = usize::try_from(entry.start - at).ok()?;
            done.checked_add(gap).filter(|&from| from < len)?
        } else {
            done
        };
        let offset = at.max(entry.start) - entry.start;
        let room = entry.last - entry.start - offset;
        let mut size = entry.max_access;
        while offset % size as u64 != 0 || size > len - from || size as u64 - 1 > room {
            size /= 2; // ends at 1, which always fits
        }
        Some(Piece { from, to: from + size, offset: entry.base + offset, entry })
    }

    /// The registered ranges in ascending order: first address, last address, device name.
    pub fn ranges(&self) -> impl Iterator<Item = (u64, u64, &'static str)> + '_ {
        self.entries.iter().map(|e| (e.start, e.last, e.name))
    }
}

impl fmt::Debug for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map()
            .entries(self.ranges().map(|(start, last, name)| (format!("{start:#x}..={last:#x}"), name)))
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Remembers its accesses; reads give the offset of each byte.
    struct Probe {
        width: usize,
        log: Vec<(char, u64, Vec<u8>)>,
    }

    impl BusDevice for Probe {
        fn name(&self) -> &'static str {
            "probe"
        }
        fn max_access(&self) -> usize {
            self.width
        }
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            for (byte, at) in data.iter_mut().zip(offset..) {
                *byte = at as u8;
            }
            self.log.push(('r', offset, data.to_vec()));
        }
        fn write(&mut self, offset: u64, data: &[u8]) {
            self.log.push(('w', offset, data.to_vec()));
        }
    }

    fn probe(width: usize) -> Arc<Mutex<Probe>> {
        Arc::new(Mutex::new(Probe { width, log: Vec::new() }))
    }

    fn log(probe: &Mutex<Probe>) -> Vec<(char, u64, Vec<u8>)> {
        std::mem::take(&mut lock(probe).log)
    }

    #[test]
    fn nobody_reads_all_ones_and_swallows_writes() {
        let bus = Bus::ports();
        for size in [1, 2, 4, 8] {
            let mut data = vec![0; size];
            bus.read(0x1234, &mut data);
            assert_eq!(data, vec![0xff; size]);
            bus.write(0x1234, &data);
        }
        bus.read(0, &mut []);
    }

    #[test]
    fn registration_refuses_what_does_not_fit() {
        let mut bus = Bus::ports();
        bus.register(0x100, 0x10, probe(1)).unwrap();
        for (start, len) in [(0x100, 0x10), (0xf8, 9), (0x10f, 1), (0x0, 0x1_0000), (0x104, 2)] {
            assert!(matches!(bus.register(start, len, probe(1)), Err(BusError::Overlap { other_start: 0x100, .. })));
        }
        assert!(matches!(bus.register(0x20, 0, probe(1)), Err(BusError::Empty { .. })));
        assert!(matches!(bus.register(0xffff, 2, probe(1)), Err(BusError::OutOfSpace { .. })));
        assert!(matches!(bus.register(u64::MAX, 2, probe(1)), Err(BusError::OutOfSpace { .. })));
        assert!(matches!(bus.register(0x20, 1, probe(3)), Err(BusError::Width { width: 3, .. })));
        bus.register(0xf0, 0x10, probe(1)).unwrap();
        bus.register(0x110, 1, probe(1)).unwrap();
        bus.register(0xffff, 1, probe(1)).unwrap();
        assert_eq!(
            bus.ranges().map(|(a, b, _)| (a, b)).collect::<Vec<_>>(),
            [(0xf0, 0xff), (0x100, 0x10f), (0x110, 0x110), (0xffff, 0xffff)]
        );
    }

    #[test]
    fn wide_accesses_to_byte_registers_are_cut_in_ascending_order() {
        let mut bus = Bus::ports();
        let dev = probe(1);
        bus.register(0x3f8, 8, dev.clone()).unwrap();
        bus.write(0x3f8, &[1, 2, 3, 4]);
        assert_eq!(log(&dev), (0..4).map(|i| ('w', i, vec![i as u8 + 1])).collect::<Vec<_>>());
        let mut data = [0; 2];
        bus.read(0x3fa, &mut data);
        assert_eq!(data, [2, 3]);
        assert_eq!(log(&dev).len(), 2);
    }

    #[test]
    fn pieces_are_naturally_aligned_inside_the_range() {
        let mut bus = Bus::mmio();
        let dev = probe(4);
        bus.register(0x1001, 16, dev.clone()).unwrap();
        let mut data = [0; 8];
        bus.read(0x1002, &mut data);
        assert_eq!(data, [1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(
            log(&dev).iter().map(|(_, at, d)| (*at, d.len())).collect::<Vec<_>>(),
            [(1, 1), (2, 2), (4, 4), (8, 1)]
        );
    }

    #[test]
    fn an_access_across_devices_reaches_each_of_them() {
        let mut bus = Bus::mmio();
        let (a, b) = (probe(8), probe(8));
        bus.register(0x10, 2, a.clone()).unwrap();
        bus.register(0x14, 2, b.clone()).unwrap();
        let mut data = [0; 8];
        bus.read(0xf, &mut data);
        assert_eq!(data, [0xff, 0, 1, 0xff, 0xff, 0, 1, 0xff]);
        bus.write(0xf, &[1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(log(&a)[1], ('w', 0, vec![2, 3]));
        assert_eq!(log(&b)[1], ('w', 0, vec![6, 7]));
    }

    #[test]
    fn windows_of_one_device_have_their_own_offsets() {
        let mut bus = Bus::ports();
        let dev = probe(1);
        bus.register_window(0x60, 1, 0, dev.clone()).unwrap();
        bus.register_window(0x64, 1, 1, dev.clone()).unwrap();
        assert!(matches!(bus.register_window(0x70, 2, u64::MAX, dev.clone()), Err(BusError::OutOfSpace { .. })));
        bus.write(0x64, &[7]);
        bus.write(0x60, &[8]);
        assert_eq!(log(&dev), [('w', 1, vec![7]), ('w', 0, vec![8])]);
    }

    #[test]
    fn the_top_of_the_space_does_not_wrap() {
        let mut bus = Bus::mmio();
        let (top, bottom) = (probe(8), probe(8));
        bus.register(u64::MAX - 1, 2, top.clone()).unwrap();
        bus.register(0, 8, bottom.clone()).unwrap();
        let mut data = [0; 8];
        bus.read(u64::MAX - 1, &mut data);
        assert_eq!(data, [0, 1, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
        assert!(log(&bottom).is_empty());
        let mut ports = Bus::ports();
        ports.register(0xffff, 1, bottom.clone()).unwrap();
        let mut word = [0; 2];
        ports.read(0xffff, &mut word);
        assert_eq!(word, [0, 0xff]);
    }

    #[test]
    fn devices_are_used_from_several_threads() {
        let mut bus = Bus::ports();
        let dev = probe(1);
        bus.register(0, 4, dev.clone()).unwrap();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..500).for_each(|_| bus.write(0, &[1, 2, 3, 4])));
            }
        });
        assert_eq!(log(&dev).len(), 4 * 500 * 4);
    }
}
