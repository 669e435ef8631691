//! Which bits of CPUID the bits of `WHV_PROCESSOR_FEATURES` stand for (WinHvPlatformDefs.h names the features, Intel SDM vol. 2A,
//! CPUID, and AMD APM vol. 3, appendix E, the bits).

/// Registers of a CPUID answer, as indices into EAX, EBX, ECX, EDX.
const EBX: usize = 1;
const ECX: usize = 2;
const EDX: usize = 3;

/// What a feature bit of the platform says about CPUID.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuidBit {
    /// Bit of `WHV_PROCESSOR_FEATURES`.
    pub feature: u32,
    /// Leaf; its subleaf is 0.
    pub leaf: u32,
    /// Index into EAX, EBX, ECX, EDX.
    pub register: usize,
    /// Bit of that register.
    pub bit: u32,
}

const fn row(feature: u32, leaf: u32, register: usize, bit: u32) -> CpuidBit {
    CpuidBit { feature, leaf, register, bit }
}

/// Features that a guest may be shown only if the platform has them. Those of bank 0 that this list lacks are of later
/// vector extensions, of AMD's own instructions, or no bits of CPUID.
#[rustfmt::skip]
pub const CPUID_BITS: [CpuidBit; 22] = [
    row(0, 1, ECX, 0),                // SSE3
    row(1, 0x8000_0001, ECX, 0),      // LAHF and SAHF
    row(2, 1, ECX, 9),                // SSSE3
    row(3, 1, ECX, 19),               // SSE4.1
    row(4, 1, ECX, 20),               // SSE4.2
    row(7, 1, ECX, 23),               // POPCNT
    row(8, 1, ECX, 13),               // CMPXCHG16B
    row(15, 0x8000_0001, EDX, 26),    // 1 GiB pages
    row(16, 1, ECX, 25),              // AES
    row(17, 1, ECX, 1),               // PCLMULQDQ
    row(21, 1, ECX, 30),              // RDRAND
    row(22, 7, EBX, 0),               // FSGSBASE
    row(23, 7, EBX, 7),               // SMEP
    row(24, 7, EBX, 9),               // ERMS
    row(29, 1, ECX, 22),              // MOVBE
    row(32, 7, EBX, 18),              // RDSEED
    row(34, 0x8000_0001, ECX, 8),     // PREFETCHW
    row(35, 7, EBX, 20),              // SMAP
    row(38, 0x8000_0001, EDX, 27),    // RDTSCP
    row(39, 7, EBX, 23),              // CLFLUSHOPT
    row(40, 7, EBX, 24),              // CLWB
    row(41, 7, EBX, 29),              // SHA
];

/// As [`CPUID_BITS`], for features that platforms before Windows 10 2004 do not report at all; absent there.
pub const LATER_CPUID_BITS: [CpuidBit; 3] = [
    row(49, 7, EDX, 4),  // FSRM
    row(57, 7, ECX, 22), // RDPID
    row(58, 7, ECX, 2),  // UMIP
];
