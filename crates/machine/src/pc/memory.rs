//! Where the board has RAM, and what it tells the guest about it.
//!
//! ```text
//! 0          … 0xa_0000          RAM
//! 0xa_0000   … 0xc_0000          nothing (a VGA card's memory)
//! 0xc_0000   … 0x10_0000         RAM that the guest is told to leave alone: ACPI tables, or legacy firmware
//! 0x10_0000  … 3 GiB             RAM, as much as there is
//! 3 GiB      … 4 GiB             devices, APICs, firmware ROM
//! 4 GiB      …                   the rest of the RAM
//! ```

use vm_accel::{GuestMemory, GuestRegion};

use crate::boot::{MemoryKind, MemoryMap, MemoryRange};
use crate::error::MachineError;

/// Least RAM that a board can have, in bytes.
pub const MIN_MEMORY: u64 = 2 << 20;
/// RAM sizes are multiples of this many bytes.
pub const MEMORY_GRANULE: u64 = 64 << 10;
/// Most RAM that a board can have, in bytes; the host and the CPU usually set a lower limit.
pub const MAX_MEMORY: u64 = 1 << 46;

/// The end of conventional memory.
const CONVENTIONAL: u64 = 0xa_0000;
/// The start of the RAM in which option ROMs, ACPI tables and a BIOS lie on a PC.
pub(crate) const SHADOW: u64 = 0xc_0000;
/// The end of that.
pub(crate) const ONE_MIB: u64 = 0x10_0000;
/// Where the ACPI tables are: the RSDP must be found in the upper half (ACPI 6.5, section 5.2.5.1).
pub(crate) const ACPI_ADDRESS: u32 = 0xe_0000;
/// Where RAM ends below 4 GiB at the latest.
pub(crate) const HOLE: u64 = 3 << 30;
const FOUR_GIB: u64 = 4 << 30;

/// The RAM of one board, by size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RamLayout {
    /// End of the RAM below 4 GiB.
    pub(crate) below_4g: u64,
    /// Bytes of RAM from 4 GiB on.
    pub(crate) above_4g: u64,
}

impl RamLayout {
    /// Lays out `size` bytes of RAM for guest addresses of `address_bits` bits (0: not known).
    ///
    /// # Errors
    /// [`MachineError::Memory`] if the size is too small, too large or no multiple of 64 KiB.
    pub fn new(size: u64, address_bits: u8) -> Result<Self, MachineError> {
        let refuse = |rule: String| Err(MachineError::Memory { size, rule });
        if size < MIN_MEMORY {
            return refuse(format!("at least {MIN_MEMORY} bytes (2 MiB) are needed"));
        }
        if !size.is_multiple_of(MEMORY_GRANULE) {
            return refuse("it must be a multiple of 64 KiB".to_owned());
        }
        let below_4g = size.min(HOLE);
        let above_4g = size - below_4g;
        let end = if above_4g == 0 { FOUR_GIB } else { FOUR_GIB + above_4g.min(MAX_MEMORY) };
        let limit =
            if address_bits == 0 { MAX_MEMORY } else { 1u64.checked_shl(address_bits.into()).unwrap_or(u64::MAX) };
        if size > MAX_MEMORY || above_4g > 0 && end > limit {
            let most = limit.min(MAX_MEMORY).saturating_sub(FOUR_GIB - HOLE);
            return refuse(format!("at most {most} bytes fit the guest's physical addresses"));
        }
        Ok(Self { below_4g, above_4g })
    }

    /// The memory map for the guest.
    ///
    /// # Errors
    /// [`MachineError::Boot`], which would be a bug of the layout.
    pub fn map(&self) -> Result<MemoryMap, MachineError> {
        let range = |base, end, kind| MemoryRange { base, size: end - base, kind };
        let mut ranges = vec![
            range(0, CONVENTIONAL, MemoryKind::Ram),
            range(SHADOW, ONE_MIB, MemoryKind::Reserved),
            range(ONE_MIB, self.below_4g, MemoryKind::Ram),
        ];
        if self.above_4g > 0 {
            ranges.push(range(FOUR_GIB, FOUR_GIB + self.above_4g, MemoryKind::Ram));
        }
        Ok(MemoryMap::new(ranges)?)
    }

    /// Allocates the RAM.
    ///
    /// # Errors
    /// [`MachineError::Accel`] if the host has not that much.
    pub fn allocate(&self) -> Result<GuestMemory, MachineError> {
        let memory = GuestMemory::new();
        let add = |base: u64, end: u64| memory.insert(base, GuestRegion::anonymous(end - base)?);
        let low = [(0, CONVENTIONAL), (SHADOW, ONE_MIB), (ONE_MIB, self.below_4g)];
        low.into_iter()
            .try_for_each(|(base, end)| add(base, end))
            .map_err(MachineError::accel("allocating the guest's memory"))?;
        if self.above_4g > 0 {
            add(FOUR_GIB, FOUR_GIB + self.above_4g).map_err(MachineError::accel("allocating the guest's memory"))?;
        }
        Ok(memory)
    }

    /// Bytes of RAM in all, including what the map reserves and the hole below 1 MiB: what the user asked for.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.below_4g + self.above_4g
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_that_cannot_be_are_refused_with_the_rule() {
        for (size, bits, says) in [
            (0, 0, "at least"),
            (1, 0, "at least"),
            (MIN_MEMORY + 4096, 0, "multiple of 64 KiB"),
            (1 << 47, 0, "at most"),
            (!0xffff, 52, "at most"),
            (1 << 40, 40, "at most"),
            (1 << 40, 36, "at most"),
        ] {
            let error = RamLayout::new(size, bits).unwrap_err().to_string();
            assert!(error.contains(says), "{size:#x} {bits}: {error}");
        }
        assert!(RamLayout::new((1 << 40) - (1 << 30), 40).is_ok());
        assert!(RamLayout::new(3 << 30, 32).is_ok());
    }

    #[test]
    fn ram_leaves_the_hole_below_4_gib() {
        for (size, below, above) in [(2 << 20, 2 << 20, 0), (3 << 30, 3 << 30, 0), (5 << 30, 3 << 30, 2 << 30)] {
            let layout = RamLayout::new(size, 0).unwrap();
            assert_eq!((layout.below_4g, layout.above_4g, layout.size()), (below, above, size));
            let map = layout.map().unwrap();
            let ram: Vec<_> =
                map.ranges().iter().filter(|r| r.kind == MemoryKind::Ram).map(|r| (r.base, r.size)).collect();
            let mut expected = vec![(0, 0xa_0000), (0x10_0000, below - 0x10_0000)];
            if above > 0 {
                expected.push((4 << 30, above));
            }
            assert_eq!(ram, expected);
        }
    }

    #[test]
    fn memory_is_where_the_map_says() {
        let layout = RamLayout::new(4 << 20, 0).unwrap();
        let memory = layout.allocate().unwrap();
        for range in layout.map().unwrap().ranges() {
            memory.write_u8(range.base, 1).unwrap();
            memory.write_u8(range.end() - 1, 1).unwrap();
        }
        assert!(memory.write_u8(0xa_0000, 1).is_err());
        assert!(memory.write_u8(4 << 20, 1).is_err());
    }
}
