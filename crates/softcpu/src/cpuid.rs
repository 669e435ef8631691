//! What CPUID says, and with it which instructions exist: x86-64-v2 with what the crate documentation lists. An owner may take features
//! away or change identification; a feature bit that the CPU does not implement is never shown.
//! Source: Intel SDM vol. 2A, CPUID; AMD APM vol. 3, appendix E for the extended leaves.

use iced_x86::{CpuidFeature, Instruction};

use crate::apic::TIMER_HZ;
use crate::mmu::PHYS_BITS;

/// One leaf, or one subleaf of a leaf that has them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuidEntry {
    /// EAX on input.
    pub leaf: u32,
    /// ECX on input; 0 for leaves without subleaves.
    pub subleaf: u32,
    /// Result.
    pub eax: u32,
    /// Result.
    pub ebx: u32,
    /// Result.
    pub ecx: u32,
    /// Result.
    pub edx: u32,
}

/// Feature bits of leaf 1, ECX.
mod leaf1c {
    pub(super) const SSE3: u32 = 1 << 0;
    pub(super) const PCLMULQDQ: u32 = 1 << 1;
    pub(super) const SSSE3: u32 = 1 << 9;
    pub(super) const CX16: u32 = 1 << 13;
    pub(super) const SSE41: u32 = 1 << 19;
    pub(super) const SSE42: u32 = 1 << 20;
    pub(super) const X2APIC: u32 = 1 << 21;
    pub(super) const MOVBE: u32 = 1 << 22;
    pub(super) const POPCNT: u32 = 1 << 23;
    pub(super) const TSC_DEADLINE: u32 = 1 << 24;
    pub(super) const AES: u32 = 1 << 25;
    pub(super) const XSAVE: u32 = 1 << 26;
    pub(super) const OSXSAVE: u32 = 1 << 27;
    pub(super) const RDRAND: u32 = 1 << 30;
    pub(super) const HYPERVISOR: u32 = 1 << 31;
    pub(super) const ALL: u32 = SSE3
        | PCLMULQDQ
        | SSSE3
        | CX16
        | SSE41
        | SSE42
        | X2APIC
        | MOVBE
        | POPCNT
        | TSC_DEADLINE
        | AES
        | XSAVE
        | RDRAND
        | HYPERVISOR;
}

/// Feature bits of leaf 1, EDX: FPU, VME is not, DE, PSE, TSC, MSR, PAE, MCE, CX8, APIC, SEP, MTRR, PGE, MCA, CMOV, PAT, PSE36, CLFSH, MMX,
/// FXSR, SSE, SSE2.
mod leaf1d {
    pub(super) const FPU: u32 = 1 << 0;
    pub(super) const TSC: u32 = 1 << 4;
    pub(super) const MSR: u32 = 1 << 5;
    pub(super) const CX8: u32 = 1 << 8;
    pub(super) const APIC: u32 = 1 << 9;
    pub(super) const SEP: u32 = 1 << 11;
    pub(super) const CMOV: u32 = 1 << 15;
    pub(super) const CLFSH: u32 = 1 << 19;
    pub(super) const MMX: u32 = 1 << 23;
    pub(super) const FXSR: u32 = 1 << 24;
    pub(super) const SSE: u32 = 1 << 25;
    pub(super) const SSE2: u32 = 1 << 26;
    pub(super) const ALL: u32 = FPU
        | 1 << 2
        | 1 << 3
        | TSC
        | MSR
        | 1 << 6
        | 1 << 7
        | CX8
        | APIC
        | SEP
        | 1 << 12
        | 1 << 13
        | 1 << 14
        | CMOV
        | 1 << 16
        | 1 << 17
        | CLFSH
        | MMX
        | FXSR
        | SSE
        | SSE2;
}

/// Feature bits of leaf 7: EBX, ECX, EDX.
mod leaf7 {
    pub(super) const FSGSBASE: u32 = 1 << 0;
    pub(super) const TSC_ADJUST: u32 = 1 << 1;
    pub(super) const SMEP: u32 = 1 << 7;
    pub(super) const ERMS: u32 = 1 << 9;
    pub(super) const RDSEED: u32 = 1 << 18;
    pub(super) const SMAP: u32 = 1 << 20;
    pub(super) const CLFLUSHOPT: u32 = 1 << 23;
    pub(super) const CLWB: u32 = 1 << 24;
    pub(super) const SHA: u32 = 1 << 29;
    /// FDP only changes on unmasked exceptions is not claimed; FCS and FDS are not deprecated.
    pub(super) const EBX: u32 = FSGSBASE | TSC_ADJUST | SMEP | ERMS | RDSEED | SMAP | CLFLUSHOPT | CLWB | SHA;
    pub(super) const UMIP: u32 = 1 << 2;
    pub(super) const RDPID: u32 = 1 << 22;
    pub(super) const ECX: u32 = UMIP | RDPID;
    pub(super) const FSRM: u32 = 1 << 4;
    pub(super) const EDX: u32 = FSRM;
}

/// Feature bits of leaf 0x8000_0001: ECX, EDX.
mod ext1 {
    pub(super) const LAHF: u32 = 1 << 0;
    pub(super) const PREFETCHW: u32 = 1 << 8;
    pub(super) const ECX: u32 = LAHF | PREFETCHW;
    pub(super) const SYSCALL: u32 = 1 << 11;
    pub(super) const NX: u32 = 1 << 20;
    pub(super) const PAGE1G: u32 = 1 << 26;
    pub(super) const RDTSCP: u32 = 1 << 27;
    pub(super) const LM: u32 = 1 << 29;
    pub(super) const EDX: u32 = SYSCALL | NX | PAGE1G | RDTSCP | LM;
}

/// Bytes of an XSAVE area with x87 and SSE: the legacy part and the header.
const XSAVE_SIZE: u32 = 576;

/// What one CPU answers.
#[derive(Clone, Debug)]
pub(crate) struct CpuidPolicy {
    entries: Vec<CpuidEntry>,
    /// Leaf 1 ECX, leaf 1 EDX, leaf 7 EBX, ECX, EDX, leaf 0x8000_0001 ECX, EDX: for quick questions.
    features: [u32; 7],
}

/// A feature that CPU code asks about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "named as in the manual")]
pub(crate) enum Feature {
    Fsgsbase,
    Smep,
    Smap,
    Umip,
    Xsave,
    Syscall,
    Nx,
    Page1g,
    Rdtscp,
    LongMode,
    TscAdjust,
    TscDeadline,
    X2apic,
}

impl Feature {
    /// Index in `CpuidPolicy::features` and bit.
    fn place(self) -> (usize, u32) {
        match self {
            Feature::Xsave => (0, leaf1c::XSAVE),
            Feature::X2apic => (0, leaf1c::X2APIC),
            Feature::TscDeadline => (0, leaf1c::TSC_DEADLINE),
            Feature::Fsgsbase => (2, leaf7::FSGSBASE),
            Feature::TscAdjust => (2, leaf7::TSC_ADJUST),
            Feature::Smep => (2, leaf7::SMEP),
            Feature::Smap => (2, leaf7::SMAP),
            Feature::Umip => (3, leaf7::UMIP),
            Feature::Syscall => (6, ext1::SYSCALL),
            Feature::Nx => (6, ext1::NX),
            Feature::Page1g => (6, ext1::PAGE1G),
            Feature::Rdtscp => (6, ext1::RDTSCP),
            Feature::LongMode => (6, ext1::LM),
        }
    }
}

/// Four registers of text.
fn text(entry: &mut CpuidEntry, bytes: &[u8; 16]) {
    let word = |i: usize| u32::from_le_bytes([bytes[4 * i], bytes[4 * i + 1], bytes[4 * i + 2], bytes[4 * i + 3]]);
    (entry.eax, entry.ebx, entry.ecx, entry.edx) = (word(0), word(1), word(2), word(3));
}

fn gcd(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Leaf 1, EDX: there is a local APIC.
pub(crate) const APIC_BIT: u32 = leaf1d::APIC;

/// Everything this CPU can do, for the CPU with APIC id `id`, with a TSC of `tsc_hz`.
pub(crate) fn supported(id: u32, tsc_hz: u64) -> Vec<CpuidEntry> {
    let entry = |leaf, subleaf, eax, ebx, ecx, edx| CpuidEntry { leaf, subleaf, eax, ebx, ecx, edx };
    let vendor = |leaf, eax| {
        entry(leaf, 0, eax, u32::from_le_bytes(*b"Genu"), u32::from_le_bytes(*b"ntel"), u32::from_le_bytes(*b"ineI"))
    };
    let mhz = (tsc_hz / 1_000_000).min(u64::from(u32::MAX)) as u32;
    let common = gcd(1000, mhz);
    let mut entries = vec![
        vendor(0, 0x16),
        // Family 6, model 26, stepping 3: the oldest model with this instruction set (x86-64-v2).
        entry(1, 0, 0x0001_06a3, (id & 0xff) << 24 | 1 << 16 | 8 << 8, leaf1c::ALL, leaf1d::ALL),
        // Cache and TLB: see leaf 4.
        entry(2, 0, 0x00ff_ff01, 0, 0, 0),
        // 32 KiB, 8 ways, 64 bytes: data, then instructions; 2 MiB second level.
        entry(4, 0, 0x0000_0121, 7 << 22 | 63, 63, 0),
        entry(4, 1, 0x0000_0122, 7 << 22 | 63, 63, 0),
        entry(4, 2, 0x0000_0143, 15 << 22 | 63, 2047, 0),
        entry(4, 3, 0, 0, 0, 0),
        entry(6, 0, 1 << 2, 0, 0, 0),
        entry(7, 0, 0, leaf7::EBX, leaf7::ECX, leaf7::EDX),
        // One thread per core; the owner replaces this to describe a topology.
        entry(0xb, 0, 0, 1, 1 << 8, id),
        entry(0xb, 1, 0, 1, 2 << 8 | 1, id),
        entry(0xd, 0, 3, XSAVE_SIZE, XSAVE_SIZE, 0),
        // XSAVEOPT, XSAVEC, XGETBV with ECX = 1.
        entry(0xd, 1, 0b0111, XSAVE_SIZE, 0, 0),
        // Guests take the crystal for the clock of the local APIC's timer (Linux, `native_calibrate_tsc`), so it is that.
        // The ratio is in lowest terms, since they multiply in 32 bits.
        entry(0x15, 0, 1000 / common, mhz / common, TIMER_HZ, 0),
        entry(0x16, 0, mhz, mhz, 100, 0),
        vendor(0x8000_0000, 0x8000_0008),
        entry(0x8000_0001, 0, 0, 0, ext1::ECX, ext1::EDX),
        entry(0x8000_0002, 0, 0, 0, 0, 0),
        entry(0x8000_0003, 0, 0, 0, 0, 0),
        entry(0x8000_0004, 0, 0, 0, 0, 0),
        entry(0x8000_0006, 0, 0, 0, 2048 << 16 | 8 << 12 | 64, 0),
        // Invariant TSC.
        entry(0x8000_0007, 0, 0, 0, 0, 1 << 8),
        entry(0x8000_0008, 0, 48 << 8 | PHYS_BITS, 0, 0, 0),
    ];
    let brand = b"vm-accel software CPU\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    for i in 0..3 {
        let mut part = [0; 16];
        let rest = &brand[(16 * i).min(brand.len())..];
        let n = rest.len().min(16);
        part[..n].copy_from_slice(&rest[..n]);
        if let Some(entry) = entries.iter_mut().find(|e| e.leaf == 0x8000_0002 + i as u32) {
            text(entry, &part);
        }
    }
    entries
}

impl CpuidPolicy {
    pub(crate) fn new(id: u32, tsc_hz: u64) -> Self {
        let mut policy = CpuidPolicy { entries: supported(id, tsc_hz), features: [0; 7] };
        policy.index();
        policy
    }

    fn index(&mut self) {
        let one = self.lookup(1, 0);
        let seven = self.lookup(7, 0);
        let ext = self.lookup(0x8000_0001, 0);
        self.features = [one.ecx, one.edx, seven.ebx, seven.ecx, seven.edx, ext.ecx, ext.edx];
    }

    /// Replaces the answers; bits of features that are not implemented are cleared.
    pub(crate) fn set(&mut self, entries: &[CpuidEntry]) {
        self.entries = entries.to_vec();
        for entry in &mut self.entries {
            match (entry.leaf, entry.subleaf) {
                (1, _) => {
                    entry.ecx &= leaf1c::ALL;
                    entry.edx &= leaf1d::ALL | 1 << 28;
                }
                (7, 0) => {
                    entry.eax = 0;
                    entry.ebx &= leaf7::EBX;
                    entry.ecx &= leaf7::ECX;
                    entry.edx &= leaf7::EDX;
                }
                (7 | 0x14 | 0x19, _) => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
                (0xd, 0) => {
                    entry.eax &= 3;
                    entry.ecx = XSAVE_SIZE;
                    entry.edx = 0;
                }
                (0xd, 1) => (entry.eax, entry.ecx, entry.edx) = (entry.eax & 0b0111, 0, 0),
                (0xd, _) => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
                (0x8000_0001, _) => {
                    entry.ecx &= ext1::ECX;
                    // AMD repeats some bits of leaf 1 here; they do not enable anything.
                    entry.edx &= ext1::EDX | leaf1d::ALL & 0x0183_f3ff;
                }
                _ => {}
            }
        }
        self.index();
    }

    pub(crate) fn entries(&self) -> &[CpuidEntry] {
        &self.entries
    }

    /// The entry for a leaf and subleaf; a leaf beyond the highest answers as the highest basic leaf, others with zeros.
    pub(crate) fn lookup(&self, leaf: u32, subleaf: u32) -> CpuidEntry {
        let find = |leaf: u32| {
            let mut of_leaf = self.entries.iter().filter(|e| e.leaf == leaf);
            let indexed = matches!(leaf, 4 | 7 | 0xb | 0xd | 0x14 | 0x1f);
            of_leaf.find(|e| !indexed || e.subleaf == subleaf).copied()
        };
        let top = |base: u32| self.entries.iter().find(|e| e.leaf == base).map_or(base, |e| e.eax);
        let beyond = if leaf >= 0x8000_0000 {
            leaf > top(0x8000_0000)
        } else if (0x4000_0000..0x5000_0000).contains(&leaf) {
            leaf > top(0x4000_0000)
        } else {
            leaf > top(0)
        };
        let leaf = if beyond { top(0) } else { leaf };
        let mut entry = find(leaf).unwrap_or_default();
        if leaf == 0xb && entry.leaf == 0 {
            // Past the last level: the subleaf is echoed, the x2APIC id stays.
            entry.ecx = subleaf & 0xff;
            entry.edx = self.entries.iter().find(|e| e.leaf == 0xb).map_or(0, |e| e.edx);
        }
        entry
    }

    /// CPUID as executed, with the bits that follow CR4 and XCR0.
    pub(crate) fn execute(&self, leaf: u32, subleaf: u32, osxsave: bool) -> CpuidEntry {
        let mut entry = self.lookup(leaf, subleaf);
        if leaf == 1 && osxsave {
            entry.ecx |= leaf1c::OSXSAVE;
        }
        entry
    }

    /// Whether a feature is offered.
    #[inline]
    pub(crate) fn has(&self, feature: Feature) -> bool {
        let (word, bit) = feature.place();
        self.features[word] & bit != 0
    }

    /// Whether an instruction exists on this CPU: all the features it belongs to are offered.
    pub(crate) fn allows(&self, insn: &Instruction) -> bool {
        insn.cpuid_features().iter().all(|feature| {
            use CpuidFeature as F;
            let (word, bit) = match feature {
                F::INTEL8086
                | F::INTEL186
                | F::INTEL286
                | F::INTEL386
                | F::INTEL486
                | F::X64
                | F::MULTIBYTENOP
                | F::INTEL8086_ONLY
                | F::INTEL286_ONLY
                | F::CPUID
                | F::SMM
                | F::PAUSE
                | F::UDBG
                | F::CET_IBT
                | F::CET_SS
                | F::PREFETCHW
                | F::MCOMMIT
                | F::SVM
                | F::VMX
                | F::HLE
                | F::RTM
                | F::RDPMC
                | F::SKINIT
                | F::CLDEMOTE
                | F::MPX => return true,
                F::FPU | F::FPU287 | F::FPU387 | F::FPU287XL_ONLY => (1, leaf1d::FPU),
                F::TSC => (1, leaf1d::TSC),
                F::MSR => (1, leaf1d::MSR),
                F::CX8 => (1, leaf1d::CX8),
                F::SEP => (1, leaf1d::SEP),
                F::CMOV => (1, leaf1d::CMOV),
                F::CLFSH => (1, leaf1d::CLFSH),
                F::MMX => (1, leaf1d::MMX),
                F::FXSR => (1, leaf1d::FXSR),
                F::SSE => (1, leaf1d::SSE),
                F::SSE2 => (1, leaf1d::SSE2),
                F::SSE3 => (0, leaf1c::SSE3),
                F::PCLMULQDQ => (0, leaf1c::PCLMULQDQ),
                F::SSSE3 => (0, leaf1c::SSSE3),
                F::CMPXCHG16B => (0, leaf1c::CX16),
                F::SSE4_1 => (0, leaf1c::SSE41),
                F::SSE4_2 => (0, leaf1c::SSE42),
                F::MOVBE => (0, leaf1c::MOVBE),
                F::POPCNT => (0, leaf1c::POPCNT),
                F::AES => (0, leaf1c::AES),
                F::XSAVE => (0, leaf1c::XSAVE),
                F::XSAVEOPT | F::XSAVEC => (0, leaf1c::XSAVE),
                F::RDRAND => (0, leaf1c::RDRAND),
                F::FSGSBASE => (2, leaf7::FSGSBASE),
                F::RDSEED => (2, leaf7::RDSEED),
                F::SMAP => (2, leaf7::SMAP),
                F::CLFLUSHOPT => (2, leaf7::CLFLUSHOPT),
                F::CLWB => (2, leaf7::CLWB),
                F::SHA => (2, leaf7::SHA),
                F::RDPID => (3, leaf7::RDPID),
                F::RDTSCP => (6, ext1::RDTSCP),
                F::SYSCALL => (6, ext1::SYSCALL),
                _ => return false,
            };
            self.features[word] & bit != 0
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crystal_and_ratio_tell_the_frequencies() {
        for mhz in [1, 999, 1000, 2445, 3000, 4000, 5250] {
            let entries = supported(0, mhz * 1_000_000);
            let leaf = entries.iter().find(|entry| entry.leaf == 0x15).unwrap();
            assert_eq!(leaf.ecx, TIMER_HZ);
            assert_eq!(u64::from(leaf.ecx) * u64::from(leaf.ebx) / u64::from(leaf.eax), mhz * 1_000_000);
            // What Linux calculates with: kHz in 32 bits.
            assert!((leaf.ecx / 1000).checked_mul(leaf.ebx).is_some(), "{mhz} MHz");
        }
        // Too slow to be told: without a ratio there is nothing to calculate.
        let entries = supported(0, 999_999);
        assert_eq!(entries.iter().find(|entry| entry.leaf == 0x15).unwrap().ebx, 0);
    }
}
