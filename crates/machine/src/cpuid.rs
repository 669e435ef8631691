//! The CPUID that each CPU of a machine sees: what the backend supports, with the topology of the machine in it.
//!
//! The topology is one package of single-threaded cores whose APIC ids count from 0. Features are not touched: which ones a
//! guest may use is the backend's knowledge. Leaves are those of Intel SDM vol. 2A "CPUID" and AMD APM vol. 3, appendix E.

use vm_accel::x86_64::CpuidEntry;

const ECX_HYPERVISOR: u32 = 1 << 31;
const EDX_HTT: u32 = 1 << 28;
/// AMD, leaf 0x8000_0001: HTT means cores, not threads.
const ECX_CMP_LEGACY: u32 = 1 << 1;
const LEAF_X2APIC: u32 = 0x0b;
const LEAF_X2APIC_V2: u32 = 0x1f;
const LEVEL_THREAD: u32 = 1 << 8;
const LEVEL_CORE: u32 = 2 << 8;

/// Bits of an APIC id that tell `cpus` cores apart.
fn core_bits(cpus: u32) -> u32 {
    u32::BITS - cpus.saturating_sub(1).leading_zeros()
}

/// What CPU `cpu` of `cpus` sees, made from what the backend supports.
#[must_use]
pub fn for_cpu(supported: &[CpuidEntry], cpu: u32, cpus: u32) -> Vec<CpuidEntry> {
    let bits = core_bits(cpus);
    let last = cpus.saturating_sub(1);
    let basic = supported.iter().find(|entry| entry.leaf == 0);
    let is_amd = basic.is_some_and(|e| {
        [e.ebx, e.edx, e.ecx].map(u32::to_le_bytes).concat() == b"AuthenticAMD"
            || [e.ebx, e.edx, e.ecx].map(u32::to_le_bytes).concat() == b"HygonGenuine"
    });
    let mut entries: Vec<CpuidEntry> =
        supported.iter().filter(|entry| !matches!(entry.leaf, LEAF_X2APIC | LEAF_X2APIC_V2)).copied().collect();
    for entry in &mut entries {
        match entry.leaf {
            1 => {
                // Initial APIC id, logical CPUs in the package; what does not fit is in leaf 0x0b.
                entry.ebx = entry.ebx & 0x0000_ffff | cpus.min(255) << 16 | (cpu & 0xff) << 24;
                entry.ecx |= ECX_HYPERVISOR;
                entry.edx = if cpus > 1 { entry.edx | EDX_HTT } else { entry.edx & !EDX_HTT };
            }
            // Caches (Intel's leaf, and AMD's of the same form): levels 1 and 2 belong to a core, others to the package.
            4 | 0x8000_001d if entry.eax & 0x1f != 0 => {
                let level = entry.eax >> 5 & 7;
                let sharing = if level >= 3 { (1u32 << bits) - 1 } else { 0 };
                entry.eax = entry.eax & 0x0000_3fff | (sharing & 0xfff) << 14;
                if entry.leaf == 4 {
                    entry.eax |= last.min(63) << 26;
                }
            }
            0x8000_0001 if is_amd => {
                entry.ecx = if cpus > 1 { entry.ecx | ECX_CMP_LEGACY } else { entry.ecx & !ECX_CMP_LEGACY };
            }
            0x8000_0008 if is_amd => {
                entry.ecx = entry.ecx & 0xffff_0000 | bits.min(15) << 12 | last.min(255);
            }
            // Extended APIC id, core id with one thread per core, one node.
            0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (cpu, cpu & 0xff, 0),
            _ => {}
        }
    }
    if basic.is_some_and(|entry| entry.eax >= LEAF_X2APIC) {
        let levels = [(0, 1, LEVEL_THREAD), (bits, cpus, LEVEL_CORE), (0, 0, 0)];
        entries.extend((0..).zip(levels).map(|(subleaf, (shift, count, level))| CpuidEntry {
            leaf: LEAF_X2APIC,
            subleaf: Some(subleaf),
            eax: shift,
            ebx: count,
            ecx: subleaf | level,
            edx: cpu,
        }));
    }
    entries
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(leaf: u32, subleaf: Option<u32>, [eax, ebx, ecx, edx]: [u32; 4]) -> CpuidEntry {
        CpuidEntry { leaf, subleaf, eax, ebx, ecx, edx }
    }

    fn vendor(name: &[u8; 12], max: u32) -> CpuidEntry {
        let word = |at: usize| u32::from_le_bytes(name[at..at + 4].try_into().unwrap());
        entry(0, None, [max, word(0), word(8), word(4)])
    }

    fn supported(name: &[u8; 12]) -> Vec<CpuidEntry> {
        vec![
            vendor(name, 0x1f),
            entry(1, None, [0x663, 0x5502_0800, 0x1, 0x2]),
            entry(4, Some(0), [0x7c00_4121, 1, 2, 3]),
            entry(4, Some(3), [0x7c00_4163, 1, 2, 3]),
            entry(4, Some(4), [0, 0, 0, 0]),
            entry(0x0b, Some(0), [9, 9, 9, 9]),
            entry(0x1f, Some(0), [9, 9, 9, 9]),
            entry(0x8000_0001, None, [0, 0, 0x100, 0]),
            entry(0x8000_0008, None, [0x3030, 0, 0x0000_7f7f, 0]),
            entry(0x8000_001d, Some(3), [0x0003_c163, 0, 0, 0]),
            entry(0x8000_001e, None, [7, 0x107, 0x7, 0]),
        ]
    }

    fn get(entries: &[CpuidEntry], leaf: u32, subleaf: Option<u32>) -> CpuidEntry {
        let mut found = entries.iter().filter(|e| e.leaf == leaf && e.subleaf == subleaf);
        let entry = *found.next().unwrap();
        assert_eq!(found.next(), None, "leaf {leaf:#x} is there twice");
        entry
    }

    #[test]
    fn each_cpu_sees_its_own_id_and_the_hypervisor_bit() {
        for cpu in [0, 1, 2, 300] {
            let entries = for_cpu(&supported(b"GenuineIntel"), cpu, 301);
            let one = get(&entries, 1, None);
            assert_eq!((one.ebx >> 24, one.ebx >> 16 & 0xff, one.ebx & 0xffff), (cpu & 0xff, 255, 0x800));
            assert_eq!((one.ecx, one.edx, one.eax), (1 << 31 | 1, 1 << 28 | 2, 0x663));
            for subleaf in 0..3 {
                assert_eq!(get(&entries, 0x0b, Some(subleaf)).edx, cpu);
            }
            assert!(entries.iter().all(|e| e.leaf != 0x1f));
        }
    }

    #[test]
    fn levels_of_the_topology() {
        for (cpus, bits) in [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (255, 8), (257, 9)] {
            let entries = for_cpu(&supported(b"GenuineIntel"), 0, cpus);
            let level = |n| get(&entries, 0x0b, Some(n));
            assert_eq!((level(0).eax, level(0).ebx, level(0).ecx), (0, 1, 0x100));
            assert_eq!((level(1).eax, level(1).ebx, level(1).ecx), (bits, cpus, 0x201));
            assert_eq!((level(2).eax, level(2).ebx, level(2).ecx), (0, 0, 2));
        }
    }

    #[test]
    fn caches_are_shared_from_level_3_on() {
        let entries = for_cpu(&supported(b"GenuineIntel"), 0, 4);
        assert_eq!(get(&entries, 4, Some(0)).eax, 3 << 26 | 0x121);
        assert_eq!(get(&entries, 4, Some(3)).eax, 3 << 26 | 3 << 14 | 0x163);
        assert_eq!(get(&entries, 4, Some(4)).eax, 0);
        assert_eq!(get(&entries, 0x8000_001d, Some(3)).eax, 3 << 14 | 0x163);
    }

    #[test]
    fn amd_says_it_its_own_way() {
        let entries = for_cpu(&supported(b"AuthenticAMD"), 2, 4);
        assert_eq!(get(&entries, 0x8000_0001, None).ecx, 0x102);
        assert_eq!(get(&entries, 0x8000_0008, None).ecx, 0x2003);
        let ids = get(&entries, 0x8000_001e, None);
        assert_eq!((ids.eax, ids.ebx, ids.ecx), (2, 2, 0));
        let one = for_cpu(&supported(b"AuthenticAMD"), 0, 1);
        assert_eq!(get(&one, 0x8000_0001, None).ecx, 0x100);
        assert_eq!(get(&one, 1, None).edx & EDX_HTT, 0);
        let intel = for_cpu(&supported(b"GenuineIntel"), 0, 4);
        assert_eq!(get(&intel, 0x8000_0008, None).ecx, 0x7f7f);
    }

    #[test]
    fn a_cpu_without_leaf_0b_gets_none() {
        let mut old = supported(b"GenuineIntel");
        old[0].eax = 4;
        assert!(for_cpu(&old, 0, 2).iter().all(|e| e.leaf != 0x0b));
        assert!(for_cpu(&[], 0, 2).is_empty());
    }
}
