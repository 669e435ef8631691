//! Where things go: the guest's memory map, and the one place that decides whether two parts collide.
//!
//! Every byte that a boot protocol puts into guest memory is claimed here first, so an image that asks for an address
//! outside RAM, or for one that something else has, is refused before anything is written. What has no fixed address
//! (page tables, the zero page, an initial RAM disk) is placed around what has.

use super::{BootError, Protocol};
use std::collections::BTreeMap;
use std::ops::Range;

/// Highest guest physical address plus one that a memory map may use: 52 bits, the architectural maximum of x86-64
/// (Intel SDM vol. 3, 4.1.4) and of Armv8.2 without LPA2 extensions beyond it.
pub const MAX_ADDRESS: u64 = 1 << 52;

/// Most entries in a memory map: what the Linux zero page holds (E820_MAX_ENTRIES_ZEROPAGE).
pub const MAX_RANGES: usize = 128;

/// What a range of guest physical addresses is good for. The values are E820's types (ACPI 6.5, table 15.4).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum MemoryKind {
    /// Usable RAM. Only here does a boot protocol put anything.
    Ram = 1,
    /// Not to be touched.
    Reserved = 2,
    /// ACPI tables that the guest may reclaim after reading them.
    AcpiTables = 3,
    /// ACPI non-volatile storage.
    AcpiNvs = 4,
}

/// One range of a [`MemoryMap`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MemoryRange {
    /// First guest physical address.
    pub base: u64,
    /// Size in bytes; not 0.
    pub size: u64,
    /// What it is good for.
    pub kind: MemoryKind,
}

impl MemoryRange {
    /// The address behind the last byte. Exact for ranges of a [`MemoryMap`]; saturates otherwise.
    #[must_use]
    pub const fn end(&self) -> u64 {
        self.base.saturating_add(self.size)
    }
}

/// The memory that a guest is told about: sorted, free of overlaps, below [`MAX_ADDRESS`].
///
/// It becomes the E820 table of Linux' zero page, the memory map of PVH and that of multiboot.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct MemoryMap {
    ranges: Vec<MemoryRange>,
}

impl MemoryMap {
    /// Sorts and checks ranges.
    ///
    /// # Errors
    /// [`BootError::MemoryMap`] for more than [`MAX_RANGES`] entries, an empty one, one that reaches beyond
    /// [`MAX_ADDRESS`], or two that overlap.
    pub fn new(mut ranges: Vec<MemoryRange>) -> Result<Self, BootError> {
        let invalid = |detail| Err(BootError::MemoryMap { detail });
        if ranges.len() > MAX_RANGES {
            return invalid(format!("{} entries, at most {MAX_RANGES} are allowed", ranges.len()));
        }
        ranges.sort_by_key(|range| range.base);
        for range in &ranges {
            let end = range.base.checked_add(range.size);
            if range.size == 0 || end.is_none_or(|end| end > MAX_ADDRESS) {
                return invalid(format!(
                    "the entry at {:#x} has {:#x} bytes; it must not be empty or reach beyond {MAX_ADDRESS:#x}",
                    range.base, range.size
                ));
            }
        }
        for pair in ranges.windows(2) {
            if pair[0].end() > pair[1].base {
                return invalid(format!(
                    "the entry at {:#x} ends at {:#x}, inside the next, which begins at {:#x}",
                    pair[0].base,
                    pair[0].end(),
                    pair[1].base
                ));
            }
        }
        Ok(Self { ranges })
    }

    /// The ranges, in ascending order.
    #[must_use]
    pub fn ranges(&self) -> &[MemoryRange] {
        &self.ranges
    }

    /// Bytes of usable RAM.
    #[must_use]
    pub fn ram_size(&self) -> u64 {
        self.ram().map(|range| range.size).sum()
    }

    /// The ranges of usable RAM.
    pub(crate) fn ram(&self) -> impl Iterator<Item = &MemoryRange> {
        self.ranges.iter().filter(|range| range.kind == MemoryKind::Ram)
    }
}

/// From which side a free place is looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Bottom,
    Top,
}

/// The usable RAM of one guest and the parts that are already placed in it.
#[derive(Debug)]
pub(crate) struct Layout {
    protocol: Protocol,
    /// Usable RAM, ascending, adjacent ranges merged.
    ram: Vec<Range<u64>>,
    /// Start of each placed part → its end and its name.
    claims: BTreeMap<u64, (u64, &'static str)>,
}

impl Layout {
    pub(crate) fn new(protocol: Protocol, map: &MemoryMap) -> Self {
        let mut ram: Vec<Range<u64>> = Vec::new();
        for range in map.ram() {
            match ram.last_mut() {
                Some(last) if last.end == range.base => last.end = range.end(),
                _ => ram.push(range.base..range.end()),
            }
        }
        Self { protocol, ram, claims: BTreeMap::new() }
    }

    /// Takes `size` bytes at `start`, which the image dictates. Nothing is taken if `size` is 0.
    pub(crate) fn claim(&mut self, what: &'static str, start: u64, size: u64) -> Result<(), BootError> {
        if size == 0 {
            return Ok(());
        }
        let protocol = self.protocol;
        let region = self.ram.iter().find(|ram| ram.contains(&start));
        let usable = region.map_or(0, |ram| ram.end - start);
        if usable < size {
            return Err(BootError::OutsideRam { protocol, what, start, size, usable });
        }
        let end = start + size;
        // Claims do not overlap each other, so the last that begins below our end is the only one that can reach us.
        if let Some((&other_start, &(other_end, other))) = self.claims.range(..end).next_back()
            && other_end > start
        {
            return Err(BootError::Overlap { protocol, what, start, end, other, other_start, other_end });
        }
        self.claims.insert(start, (end, what));
        Ok(())
    }

    /// Finds and takes `size` bytes (at least one) in `window`, at a multiple of `align` (a power of two).
    pub(crate) fn allocate(
        &mut self,
        what: &'static str,
        size: u64,
        align: u64,
        window: Range<u64>,
        from: Side,
    ) -> Result<u64, BootError> {
        debug_assert!(align.is_power_of_two());
        let size = size.max(1);
        let mut found = None;
        'ram: for ram in &self.ram {
            let (mut low, high) = (ram.start.max(window.start), ram.end.min(window.end));
            if low >= high {
                continue;
            }
            // Walk the holes between claims; the part before the first claim may begin inside an earlier one.
            if let Some((_, &(end, _))) = self.claims.range(..low).next_back() {
                low = low.max(end);
            }
            let ends = self.claims.range(low.min(high)..high).map(|(&start, &(end, _))| (start, end));
            for (hole_end, next) in ends.chain([(high, high)]) {
                if let Some(address) = fit(low..hole_end, size, align, from) {
                    found = Some(address);
                    if from == Side::Bottom {
                        break 'ram;
                    }
                }
                low = next;
            }
        }
        let address = found.ok_or(BootError::NoRoom {
            protocol: self.protocol,
            what,
            size,
            low: window.start,
            high: window.end,
        })?;
        self.claim(what, address, size)?;
        Ok(address)
    }
}

/// An aligned address for `size` bytes inside `hole`.
fn fit(hole: Range<u64>, size: u64, align: u64, from: Side) -> Option<u64> {
    let room = hole.end.checked_sub(hole.start)?;
    if room < size {
        return None;
    }
    let address = match from {
        Side::Bottom => hole.start.checked_next_multiple_of(align)?,
        Side::Top => (hole.end - size) & !(align - 1),
    };
    (address >= hole.start && address.checked_add(size)? <= hole.end).then_some(address)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn ram(base: u64, size: u64) -> MemoryRange {
        MemoryRange { base, size, kind: MemoryKind::Ram }
    }

    fn layout(ranges: &[MemoryRange]) -> Layout {
        Layout::new(Protocol::Elf, &MemoryMap::new(ranges.to_vec()).unwrap())
    }

    #[test]
    fn maps_are_checked() {
        for bad in [
            vec![ram(0, 0)],
            vec![ram(MAX_ADDRESS, 1)],
            vec![ram(u64::MAX, 2)],
            vec![ram(0x1000, 0x1000), ram(0, 0x1001)],
            (0..=MAX_RANGES as u64).map(|i| ram(i * 2, 1)).collect(),
        ] {
            assert!(matches!(MemoryMap::new(bad), Err(BootError::MemoryMap { .. })));
        }
        let map = MemoryMap::new(vec![ram(0x2000, 0x1000), ram(0, 0x1000)]).unwrap();
        assert_eq!(map.ranges()[0].base, 0);
        assert_eq!(map.ram_size(), 0x2000);
    }

    #[test]
    fn a_claim_may_span_adjacent_ranges_but_no_gap() {
        let mut layout = layout(&[ram(0, 0x1000), ram(0x1000, 0x1000), ram(0x3000, 0x1000)]);
        layout.claim("a", 0x800, 0x1000).unwrap();
        let error = layout.claim("b", 0x1800, 0x1000).unwrap_err();
        assert!(matches!(error, BootError::OutsideRam { usable: 0x800, .. }), "{error}");
        assert!(matches!(layout.claim("c", 0x9000, 1), Err(BootError::OutsideRam { usable: 0, .. })));
        assert!(matches!(layout.claim("d", 0x800, u64::MAX), Err(BootError::OutsideRam { .. })));
    }

    #[test]
    fn overlaps_name_both_parts() {
        let mut layout = layout(&[ram(0, 0x10000)]);
        layout.claim("first", 0x1000, 0x1000).unwrap();
        for (start, size) in [(0xfff, 2), (0x1fff, 1), (0, 0x10000), (0x1100, 0x10)] {
            let text = layout.claim("second", start, size).unwrap_err().to_string();
            assert!(text.contains("first") && text.contains("second"), "{text}");
        }
        layout.claim("below", 0, 0x1000).unwrap();
        layout.claim("above", 0x2000, 0xe000).unwrap();
    }

    #[test]
    fn free_places_are_found_from_both_ends() {
        let mut layout = layout(&[ram(0x1000, 0x9000), ram(0x10000, 0x8000)]);
        layout.claim("x", 0x1000, 0x10).unwrap();
        layout.claim("y", 0x17000, 0x1000).unwrap();
        assert_eq!(layout.allocate("a", 0x10, 0x1000, 0..1 << 20, Side::Bottom).unwrap(), 0x2000);
        assert_eq!(layout.allocate("b", 0x1001, 0x1000, 0..1 << 20, Side::Top).unwrap(), 0x15000);
        assert_eq!(layout.allocate("c", 0x1000, 0x1000, 0..0xa000, Side::Top).unwrap(), 0x9000);
        assert!(matches!(layout.allocate("d", 0x9000, 1, 0..1 << 20, Side::Top), Err(BootError::NoRoom { .. })));
        assert!(layout.allocate("e", u64::MAX, 1 << 40, 0..u64::MAX, Side::Bottom).is_err());
    }

    proptest! {
        #[test]
        fn placed_parts_never_collide(
            claims in prop::collection::vec((0u64..0x40_0000, 0u64..0x8000), 0..20),
            wanted in prop::collection::vec((0u64..0x10_0000, 0u32..22, any::<bool>(), 0u64..0x30_0000, 0u64..0x40_0000), 0..20),
        ) {
            let mut layout = layout(&[ram(0, 0xa_0000), ram(0x10_0000, 0x20_0000)]);
            for (start, size) in claims {
                let _ = layout.claim("claim", start, size);
            }
            for (size, shift, top, low, high) in wanted {
                let from = if top { Side::Top } else { Side::Bottom };
                if let Ok(at) = layout.allocate("part", size, 1 << shift, low..high, from) {
                    prop_assert!(at >= low && at + size <= high && at % (1 << shift) == 0);
                }
            }
            let parts: Vec<_> = layout.claims.iter().map(|(&start, &(end, _))| (start, end)).collect();
            for pair in parts.windows(2) {
                prop_assert!(pair[0].1 <= pair[1].0);
            }
        }
    }
}
