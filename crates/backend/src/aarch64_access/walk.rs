//! Translation by a guest's own page tables (Arm ARM, D8.2 and D8.3): EL1 and EL0, granules of 4, 16 and 64 KiB, 48 and
//! 52-bit addresses. For finding an instruction, or the second half of an access whose first half the CPU already
//! checked; so permissions and the access flag are not looked at, and nothing is written.

/// The registers that control the translation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stage1 {
    /// SCTLR_EL1.
    pub sctlr: u64,
    /// TCR_EL1.
    pub tcr: u64,
    /// TTBR0_EL1.
    pub ttbr0: u64,
    /// TTBR1_EL1.
    pub ttbr1: u64,
}

const SCTLR_MMU: u64 = 1 << 0;
const SCTLR_BIG_ENDIAN: u64 = 3 << 24; // E0E and EE
const TCR_DS: u64 = 1 << 59;
const ADDRESS: u64 = 0x0000_ffff_ffff_f000;

/// Bits `high` to `low`.
const fn bits(value: u64, high: u32, low: u32) -> u64 {
    value >> low & ((1 << (high - low + 1)) - 1)
}

impl Stage1 {
    /// True if the guest's data is big-endian, which nothing in this library handles.
    pub fn is_big_endian(&self) -> bool {
        self.sctlr & SCTLR_BIG_ENDIAN != 0
    }

    /// The guest physical address of `va`. `read` gives the 64-bit word at a guest physical address. `None` if the address is
    /// not mapped or a table is not in memory.
    pub fn translate(&self, va: u64, mut read: impl FnMut(u64) -> Option<u64>) -> Option<u64> {
        if self.sctlr & SCTLR_MMU == 0 {
            return Some(va);
        }
        let upper = bits(va, 55, 55) != 0;
        let (ttbr, size, disabled, granule, tags_ignored) = if upper {
            // TG1 counts the granules in another order than TG0.
            let granule = [None, Some(14), Some(12), Some(16)][bits(self.tcr, 31, 30) as usize];
            (self.ttbr1, bits(self.tcr, 21, 16), bits(self.tcr, 23, 23), granule, bits(self.tcr, 38, 38))
        } else {
            let granule = [Some(12), Some(16), Some(14), None][bits(self.tcr, 15, 14) as usize];
            (self.ttbr0, bits(self.tcr, 5, 0), bits(self.tcr, 7, 7), granule, bits(self.tcr, 37, 37))
        };
        let granule: u32 = granule?;
        // 12 is the smallest size (52 bits); above 48 the range has not two bits more than a 64 KiB page's.
        if disabled != 0 || !(12..=48).contains(&size) {
            return None;
        }
        let va_bits = 64 - size as u32;
        let top = if tags_ignored != 0 { 56 } else { 64 };
        let rest = bits(va, top - 1, va_bits.min(top - 1));
        let expected = if upper { bits(u64::MAX, top - 1, va_bits.min(top - 1)) } else { 0 };
        if va_bits < top && rest != expected {
            return None;
        }
        let wide = self.tcr & TCR_DS != 0 || (granule == 16 && bits(self.tcr, 34, 32) == 6);
        let mut table = ttbr & 0x0000_ffff_ffff_fffe;
        if wide {
            table = (table & !0x3f) | bits(ttbr, 5, 2) << 48;
        }
        let stride = granule - 3;
        let levels = (va_bits - granule).div_ceil(stride);
        for left in (0..levels).rev() {
            let shift = granule + stride * left;
            let index = bits(va, (shift + stride).min(va_bits) - 1, shift);
            let descriptor = read(table.checked_add(index * 8)?)?;
            if descriptor & 1 == 0 {
                return None;
            }
            let mut output = descriptor & ADDRESS & !((1 << granule) - 1);
            if wide && granule == 16 {
                output |= bits(descriptor, 15, 12) << 48;
            } else if wide {
                output |= bits(descriptor, 49, 48) << 48 | bits(descriptor, 9, 8) << 50;
            }
            let is_table = descriptor & 2 != 0;
            match (left, is_table) {
                (0, false) => return None,
                (0, true) | (_, false) => {
                    let within = (1 << shift) - 1;
                    return Some((output & !within) | (va & within));
                }
                (_, true) => table = output,
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    fn on(tcr: u64) -> Stage1 {
        Stage1 {
            sctlr: 1,
            tcr,
            ttbr0: 0x4000_0001,           // CnP set: no part of the address
            ttbr1: 0x5000 | 0xabcd << 48, // an ASID above
        }
    }

    fn look(stage1: Stage1, tables: &[(u64, u64)], va: u64) -> Option<u64> {
        let tables: HashMap<u64, u64> = tables.iter().copied().collect();
        stage1.translate(va, |gpa| tables.get(&gpa).copied())
    }

    #[test]
    fn without_the_mmu_addresses_are_physical() {
        assert_eq!(look(Stage1::default(), &[], 0x900_0123), Some(0x900_0123));
    }

    #[test]
    fn pages_and_blocks_of_4_kib_tables_are_found() {
        let stage1 = on(25); // T0SZ 25: 39 bits, three levels
        let tables = [
            (0x4000_0000 + 8, 0x4000_1003),     // 1 GiB: table
            (0x4000_0000 + 16, 0x8000_0701),    // 2 GiB: block
            (0x4000_1000 + 8 * 3, 0x4000_2003), // 2 MiB entry 3
            (0x4000_2000 + 8 * 5, 0x0900_0703), // page 5
            (0x4000_2000 + 8 * 6, 0x0900_1701), // reserved encoding at the last level
        ];
        let page = 0x4000_0000 + 3 * 0x20_0000 + 5 * 0x1000;
        assert_eq!(look(stage1, &tables, page + 0x18), Some(0x900_0018));
        assert_eq!(look(stage1, &tables, page + 0x1000), None);
        assert_eq!(look(stage1, &tables, 0x8123_4567), Some(0x8123_4567));
        assert_eq!(look(stage1, &tables, 0xc000_0000), None, "no entry");
        assert_eq!(look(stage1, &tables, 1 << 40 | page), None, "outside the range");
        let tagged = Stage1 { tcr: 25 | 1 << 37, ..stage1 };
        assert_eq!(look(tagged, &tables, 0x5a << 56 | page), Some(0x900_0000));
        assert_eq!(look(stage1, &tables, 0x5a << 56 | page), None);
    }

    #[test]
    fn the_upper_half_has_its_own_table_and_granule() {
        // T1SZ 16, TG1 4 KiB: four levels.
        let stage1 = on(16 << 16 | 2 << 30);
        let base = 0x5000;
        let va = 0xffff_8000_0000_0000u64;
        let tables = [
            (base + 8 * 256, 0x6000_0003),
            (0x6000_0000, 0x6000_1003),
            (0x6000_1000, 0x4020_0f01), // 2 MiB block
        ];
        assert_eq!(look(stage1, &tables, va + 0x12345), Some(0x4021_2345));
        assert_eq!(look(stage1, &tables, va & !(1 << 62)), None);
    }

    #[test]
    fn large_granules_are_found() {
        // 64 KiB, 42 bits: two levels. 16 KiB, 47 bits: three.
        let big = on(22 | 1 << 14);
        let tables = [(0x4000_0000, 0x4001_0003), (0x4001_0000 + 8, 0x0900_0003)];
        assert_eq!(look(big, &tables, 0x1_0004), Some(0x900_0004));
        let middle = on(17 | 2 << 14);
        let tables = [(0x4000_0000, 0x4000_4003), (0x4000_4000, 0x4200_0001)];
        assert_eq!(look(middle, &tables, 0x123_4567), Some(0x4323_4567));
    }

    #[test]
    fn any_registers_and_tables_are_survived() {
        let mut seed = 7u64;
        let mut next = move || {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed
        };
        for _ in 0..20_000 {
            let stage1 = Stage1 { sctlr: next(), tcr: next(), ttbr0: next(), ttbr1: next() };
            let word = next();
            stage1.translate(next(), |gpa| Some(gpa ^ word | 3));
        }
    }
}
