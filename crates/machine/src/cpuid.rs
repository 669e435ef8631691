//! The CPUID that each CPU of a machine sees: what the backend supports, with the topology of the machine in it.
//!
//! The topology is one package of single-threaded cores whose APIC ids count from 0. Which features a guest may use is the
//! backend's knowledge; the user may take some away ([`FeatureMask`]) but add none. Leaves are those of Intel SDM vol. 2A "CPUID" and
//! AMD APM vol. 3, appendix E.

use std::str::FromStr;

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

/// A register of a CPUID answer.
#[derive(Debug, Clone, Copy)]
enum Answer {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

/// A feature that can be masked: its name, and the leaf, subleaf, register and bit that say that it is there.
type Feature = (&'static str, u32, u32, Answer, u32);

/// AMD repeats the low bits of leaf 1, EDX in this leaf; they are not named here.
const EXTENDED: u32 = 0x8000_0001;

/// What can be masked. The names are QEMU's, which follow Linux' `/proc/cpuinfo`.
const FEATURES: &[Feature] = &[
    ("pse", 1, 0, Answer::Edx, 3),
    ("tsc", 1, 0, Answer::Edx, 4),
    ("pae", 1, 0, Answer::Edx, 6),
    ("mce", 1, 0, Answer::Edx, 7),
    ("cx8", 1, 0, Answer::Edx, 8),
    ("apic", 1, 0, Answer::Edx, 9),
    ("sep", 1, 0, Answer::Edx, 11),
    ("mtrr", 1, 0, Answer::Edx, 12),
    ("pge", 1, 0, Answer::Edx, 13),
    ("mca", 1, 0, Answer::Edx, 14),
    ("cmov", 1, 0, Answer::Edx, 15),
    ("pat", 1, 0, Answer::Edx, 16),
    ("pse36", 1, 0, Answer::Edx, 17),
    ("clflush", 1, 0, Answer::Edx, 19),
    ("mmx", 1, 0, Answer::Edx, 23),
    ("fxsr", 1, 0, Answer::Edx, 24),
    ("sse", 1, 0, Answer::Edx, 25),
    ("sse2", 1, 0, Answer::Edx, 26),
    ("sse3", 1, 0, Answer::Ecx, 0),
    ("pclmulqdq", 1, 0, Answer::Ecx, 1),
    ("monitor", 1, 0, Answer::Ecx, 3),
    ("vmx", 1, 0, Answer::Ecx, 5),
    ("ssse3", 1, 0, Answer::Ecx, 9),
    ("fma", 1, 0, Answer::Ecx, 12),
    ("cx16", 1, 0, Answer::Ecx, 13),
    ("pdcm", 1, 0, Answer::Ecx, 15),
    ("pcid", 1, 0, Answer::Ecx, 17),
    ("sse4.1", 1, 0, Answer::Ecx, 19),
    ("sse4.2", 1, 0, Answer::Ecx, 20),
    ("x2apic", 1, 0, Answer::Ecx, 21),
    ("movbe", 1, 0, Answer::Ecx, 22),
    ("popcnt", 1, 0, Answer::Ecx, 23),
    ("tsc-deadline", 1, 0, Answer::Ecx, 24),
    ("aes", 1, 0, Answer::Ecx, 25),
    ("xsave", 1, 0, Answer::Ecx, 26),
    ("avx", 1, 0, Answer::Ecx, 28),
    ("f16c", 1, 0, Answer::Ecx, 29),
    ("rdrand", 1, 0, Answer::Ecx, 30),
    ("arat", 6, 0, Answer::Eax, 2),
    ("fsgsbase", 7, 0, Answer::Ebx, 0),
    ("tsc-adjust", 7, 0, Answer::Ebx, 1),
    ("bmi1", 7, 0, Answer::Ebx, 3),
    ("avx2", 7, 0, Answer::Ebx, 5),
    ("smep", 7, 0, Answer::Ebx, 7),
    ("bmi2", 7, 0, Answer::Ebx, 8),
    ("erms", 7, 0, Answer::Ebx, 9),
    ("invpcid", 7, 0, Answer::Ebx, 10),
    ("rtm", 7, 0, Answer::Ebx, 11),
    ("avx512f", 7, 0, Answer::Ebx, 16),
    ("rdseed", 7, 0, Answer::Ebx, 18),
    ("adx", 7, 0, Answer::Ebx, 19),
    ("smap", 7, 0, Answer::Ebx, 20),
    ("clflushopt", 7, 0, Answer::Ebx, 23),
    ("clwb", 7, 0, Answer::Ebx, 24),
    ("sha-ni", 7, 0, Answer::Ebx, 29),
    ("umip", 7, 0, Answer::Ecx, 2),
    ("pku", 7, 0, Answer::Ecx, 3),
    ("vaes", 7, 0, Answer::Ecx, 9),
    ("vpclmulqdq", 7, 0, Answer::Ecx, 10),
    ("la57", 7, 0, Answer::Ecx, 16),
    ("rdpid", 7, 0, Answer::Ecx, 22),
    ("pks", 7, 0, Answer::Ecx, 31),
    ("fsrm", 7, 0, Answer::Edx, 4),
    ("xsaveopt", 0xd, 1, Answer::Eax, 0),
    ("xsavec", 0xd, 1, Answer::Eax, 1),
    ("xgetbv1", 0xd, 1, Answer::Eax, 2),
    ("xsaves", 0xd, 1, Answer::Eax, 3),
    ("lahf-lm", EXTENDED, 0, Answer::Ecx, 0),
    ("svm", EXTENDED, 0, Answer::Ecx, 2),
    ("abm", EXTENDED, 0, Answer::Ecx, 5),
    ("sse4a", EXTENDED, 0, Answer::Ecx, 6),
    ("3dnowprefetch", EXTENDED, 0, Answer::Ecx, 8),
    ("topoext", EXTENDED, 0, Answer::Ecx, 22),
    ("syscall", EXTENDED, 0, Answer::Edx, 11),
    ("nx", EXTENDED, 0, Answer::Edx, 20),
    ("pdpe1gb", EXTENDED, 0, Answer::Edx, 26),
    ("rdtscp", EXTENDED, 0, Answer::Edx, 27),
    ("lm", EXTENDED, 0, Answer::Edx, 29),
    ("invtsc", 0x8000_0007, 0, Answer::Edx, 8),
];

// A mask has a bit for each.
const _: () = assert!(FEATURES.len() <= u128::BITS as usize);

/// CPUID features that a guest is not shown, whatever the backend has.
///
/// From a list of names, each behind a minus: `-x2apic,-tsc-deadline`. What else depends on a feature is not masked with it. Whether
/// instructions of a masked feature still work is the backend's affair: hardware cannot forbid most of them, the software CPU does.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FeatureMask(u128);

impl FeatureMask {
    /// Whether nothing is masked.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The names that can be masked.
    pub fn names() -> impl Iterator<Item = &'static str> {
        FEATURES.iter().map(|feature| feature.0)
    }

    /// Clears the bits of the masked features.
    pub fn apply(self, entries: &mut [CpuidEntry]) {
        for (_, leaf, subleaf, answer, bit) in self.features() {
            let of_it = |entry: &&mut CpuidEntry| entry.leaf == leaf && entry.subleaf.unwrap_or(0) == subleaf;
            for entry in entries.iter_mut().filter(of_it) {
                let register = match answer {
                    Answer::Eax => &mut entry.eax,
                    Answer::Ebx => &mut entry.ebx,
                    Answer::Ecx => &mut entry.ecx,
                    Answer::Edx => &mut entry.edx,
                };
                *register &= !(1 << bit);
            }
        }
    }

    fn features(self) -> impl Iterator<Item = Feature> {
        FEATURES.iter().enumerate().filter(move |(index, _)| self.0 >> index & 1 != 0).map(|(_, feature)| *feature)
    }
}

/// A list of features that is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FeatureMaskError {
    /// No feature has this name.
    #[error("no CPU feature is called {name:?}; these can be masked: {}", FeatureMask::names().collect::<Vec<_>>().join(", "))]
    Unknown {
        /// The name.
        name: String,
    },
    /// A name without a minus.
    #[error("features can only be taken away: -{name}")]
    NoMinus {
        /// The name.
        name: String,
    },
}

impl FromStr for FeatureMask {
    type Err = FeatureMaskError;

    fn from_str(text: &str) -> Result<Self, FeatureMaskError> {
        let mut mask = Self::default();
        for item in text.split(',') {
            let name = item.trim_start_matches(['-', '+']);
            let Some(index) = FEATURES.iter().position(|feature| feature.0 == name) else {
                return Err(FeatureMaskError::Unknown { name: name.to_owned() });
            };
            if item.strip_prefix('-') != Some(name) {
                return Err(FeatureMaskError::NoMinus { name: name.to_owned() });
            }
            mask.0 |= 1 << index;
        }
        Ok(mask)
    }
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
    fn masked_features_are_not_shown_and_nothing_else_changes() {
        let before: Vec<_> =
            [1, 7, 0x8000_0001].map(|leaf| entry(leaf, (leaf == 7).then_some(0), [!0, !0, !0, !0])).to_vec();
        let mut entries = before.clone();
        let mask: FeatureMask = "-x2apic,-smep,-nx".parse().unwrap();
        mask.apply(&mut entries);
        assert_eq!((entries[0].ecx, entries[1].ebx, entries[2].edx), (!(1 << 21), !(1 << 7), !(1 << 20)));
        (entries[0].ecx, entries[1].ebx, entries[2].edx) = (!0, !0, !0);
        assert_eq!(entries, before);
        FeatureMask::default().apply(&mut entries);
        assert_eq!(entries, before);
    }

    #[test]
    fn a_mask_is_a_list_of_known_names_each_behind_a_minus() {
        assert!(FeatureMask::default().is_empty());
        for name in FeatureMask::names() {
            let mask: FeatureMask = format!("-{name}").parse().unwrap();
            assert_eq!(
                mask.features().map(|feature| feature.0).collect::<Vec<_>>(),
                [name],
                "it is in the table twice"
            );
        }
        let unknown = |name: &str| Err(FeatureMaskError::Unknown { name: name.to_owned() });
        for (text, name) in
            [("", ""), ("-", ""), ("-x3apic", "x3apic"), ("-nx,", ""), ("-X2APIC", "X2APIC"), ("- nx", " nx")]
        {
            assert_eq!(text.parse::<FeatureMask>(), unknown(name), "{text:?}");
        }
        for text in ["x2apic", "+x2apic", "--x2apic", "-nx,x2apic"] {
            let no_minus = Err(FeatureMaskError::NoMinus { name: "x2apic".to_owned() });
            assert_eq!(text.parse::<FeatureMask>(), no_minus, "{text:?}");
        }
    }

    #[test]
    fn a_cpu_without_leaf_0b_gets_none() {
        let mut old = supported(b"GenuineIntel");
        old[0].eax = 4;
        assert!(for_cpu(&old, 0, 2).iter().all(|e| e.leaf != 0x0b));
        assert!(for_cpu(&[], 0, 2).is_empty());
    }
}
