//! Register values and exit contexts with the alignment that the platform demands.

use super::defs::{
    WHV_INTERRUPT_CONTROL, WHV_MEMORY_ACCESS_CONTEXT, WHV_RUN_VP_EXIT_CONTEXT, WHV_RUN_VP_EXIT_REASON,
    WHV_VP_EXCEPTION_CONTEXT, WHV_X64_CPUID_ACCESS_CONTEXT, WHV_X64_IO_PORT_ACCESS_CONTEXT, WHV_X64_MSR_ACCESS_CONTEXT,
    WHV_X64_RDTSC_CONTEXT, WHV_X64_SEGMENT_REGISTER,
};
use super::fields::{
    ExceptionInfo, ExecutionState, InterruptKind, IoAccessInfo, LengthAndCr8, MemoryAccessInfo, MsrAccessInfo,
};
use core::fmt;

/// `WHV_REGISTER_VALUE`: 16 bytes, aligned to 16. The platform may read and write arrays of them with aligned SSE instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C, align(16))]
pub struct RegisterValue {
    /// The lower half; all of a 64-bit register.
    pub low: u64,
    /// The upper half.
    pub high: u64,
}

/// `WHV_X64_SEGMENT_REGISTER` with its attributes as the upper word of a descriptor has them: type, S, DPL, P in bits 0 to 7,
/// AVL, L, D/B, G in bits 12 to 15.
#[allow(missing_docs, reason = "each is named as in WinHvPlatformDefs.h")]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct Segment {
    pub base: u64,
    pub limit: u32,
    pub selector: u16,
    pub attributes: u16,
}

impl RegisterValue {
    /// A register of up to 64 bits.
    #[must_use]
    pub const fn from_u64(value: u64) -> Self {
        Self { low: value, high: 0 }
    }

    /// A register of 128 bits.
    #[must_use]
    pub const fn from_u128(value: u128) -> Self {
        Self { low: value as u64, high: (value >> 64) as u64 }
    }

    /// All 128 bits.
    #[must_use]
    pub const fn as_u128(self) -> u128 {
        (self.high as u128) << 64 | self.low as u128
    }

    /// A segment register.
    #[must_use]
    pub const fn from_segment(segment: Segment) -> Self {
        Self {
            low: segment.base,
            high: segment.limit as u64 | (segment.selector as u64) << 32 | (segment.attributes as u64) << 48,
        }
    }

    /// As a segment register.
    #[must_use]
    pub const fn as_segment(self) -> Segment {
        Segment {
            base: self.low,
            limit: self.high as u32,
            selector: (self.high >> 32) as u16,
            attributes: (self.high >> 48) as u16,
        }
    }

    /// GDTR or IDTR (`WHV_X64_TABLE_REGISTER`).
    #[must_use]
    pub const fn from_table(base: u64, limit: u16) -> Self {
        Self { low: (limit as u64) << 48, high: base }
    }

    /// As GDTR or IDTR: base and limit.
    #[must_use]
    pub const fn as_table(self) -> (u64, u16) {
        (self.high, (self.low >> 48) as u16)
    }
}

impl From<WHV_X64_SEGMENT_REGISTER> for Segment {
    fn from(raw: WHV_X64_SEGMENT_REGISTER) -> Self {
        // SAFETY: both members of the union are 16 bits of plain data.
        let attributes = unsafe { raw.Anonymous.Attributes };
        Self { base: raw.Base, limit: raw.Limit, selector: raw.Selector, attributes }
    }
}

impl From<Segment> for WHV_X64_SEGMENT_REGISTER {
    fn from(segment: Segment) -> Self {
        let mut raw = Self { Base: segment.base, Limit: segment.limit, Selector: segment.selector, ..Self::default() };
        raw.Anonymous.Attributes = segment.attributes;
        raw
    }
}

/// `WHV_INTERRUPT_CONTROL`: what `WHvRequestInterrupt` delivers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct InterruptControl {
    /// Type, destination mode, trigger mode.
    pub kind: InterruptKind,
    /// An APIC id or a logical destination.
    pub destination: u32,
    /// The vector.
    pub vector: u32,
}

impl From<WHV_INTERRUPT_CONTROL> for InterruptControl {
    fn from(raw: WHV_INTERRUPT_CONTROL) -> Self {
        Self { kind: InterruptKind(raw._bitfield), destination: raw.Destination, vector: raw.Vector }
    }
}

impl From<InterruptControl> for WHV_INTERRUPT_CONTROL {
    fn from(control: InterruptControl) -> Self {
        Self { _bitfield: control.kind.0, Destination: control.destination, Vector: control.vector }
    }
}

/// `WHV_RUN_VP_EXIT_CONTEXT`, aligned to 16.
#[derive(Clone, Copy, Default)]
#[repr(C, align(16))]
pub struct ExitContext(pub WHV_RUN_VP_EXIT_CONTEXT);

/// The part of an exit context that belongs to one reason: the payload, and its bit field.
macro_rules! payloads {
    ($($(#[$attr:meta])* $name:ident: $member:ident, $Payload:ty, $info:ident, $Info:ident, $raw:ident;)*) => {$(
        $(#[$attr])*
        #[must_use]
        pub fn $name(&self) -> ($Info, &$Payload) {
            // SAFETY: a context is initialised in full (`Default` is all zeroes), and every member of the union is plain
            // data, for which each pattern of bits is a value. So is each member of the inner union.
            unsafe {
                let payload = &self.0.Anonymous.$member;
                ($Info(payload.$info.$raw), payload)
            }
        }
    )*};
}

impl ExitContext {
    /// Why the processor left.
    #[must_use]
    pub const fn reason(&self) -> WHV_RUN_VP_EXIT_REASON {
        self.0.ExitReason
    }

    /// RIP; for most reasons that of the instruction that left.
    #[must_use]
    pub const fn rip(&self) -> u64 {
        self.0.VpContext.Rip
    }

    /// RFLAGS.
    #[must_use]
    pub const fn rflags(&self) -> u64 {
        self.0.VpContext.Rflags
    }

    /// CS.
    #[must_use]
    pub fn cs(&self) -> Segment {
        self.0.VpContext.Cs.into()
    }

    /// The execution state.
    #[must_use]
    pub fn execution_state(&self) -> ExecutionState {
        // SAFETY: both members of the union are 16 bits of plain data.
        ExecutionState(unsafe { self.0.VpContext.ExecutionState.AsUINT16 })
    }

    /// Length of the instruction that left; meaningful for port, MSR and CPUID accesses only.
    #[must_use]
    pub const fn instruction_length(&self) -> u8 {
        LengthAndCr8(self.0.VpContext._bitfield).instruction_length()
    }

    /// CR8.
    #[must_use]
    pub const fn cr8(&self) -> u8 {
        LengthAndCr8(self.0.VpContext._bitfield).cr8()
    }

    payloads! {
        /// After `WHvRunVpExitReasonMemoryAccess`.
        memory_access: MemoryAccess, WHV_MEMORY_ACCESS_CONTEXT, AccessInfo, MemoryAccessInfo, AsUINT32;
        /// After `WHvRunVpExitReasonX64IoPortAccess`.
        io_access: IoPortAccess, WHV_X64_IO_PORT_ACCESS_CONTEXT, AccessInfo, IoAccessInfo, AsUINT32;
        /// After `WHvRunVpExitReasonX64MsrAccess`.
        msr_access: MsrAccess, WHV_X64_MSR_ACCESS_CONTEXT, AccessInfo, MsrAccessInfo, AsUINT32;
        /// After `WHvRunVpExitReasonException`.
        exception: VpException, WHV_VP_EXCEPTION_CONTEXT, ExceptionInfo, ExceptionInfo, AsUINT32;
    }

    /// After `WHvRunVpExitReasonX64Cpuid`.
    #[must_use]
    pub fn cpuid(&self) -> &WHV_X64_CPUID_ACCESS_CONTEXT {
        // SAFETY: as in `payloads!`: initialised in full, plain data.
        unsafe { &self.0.Anonymous.CpuidAccess }
    }

    /// After `WHvRunVpExitReasonX64Rdtsc`.
    #[must_use]
    pub fn rdtsc(&self) -> &WHV_X64_RDTSC_CONTEXT {
        // SAFETY: as in `payloads!`: initialised in full, plain data.
        unsafe { &self.0.Anonymous.ReadTsc }
    }

    /// The vector, after `WHvRunVpExitReasonX64ApicEoi`.
    #[must_use]
    pub fn eoi_vector(&self) -> u32 {
        // SAFETY: as in `payloads!`: initialised in full, plain data.
        unsafe { self.0.Anonymous.ApicEoi.InterruptVector }
    }

    /// The interrupt command, after `WHvRunVpExitReasonX64ApicInitSipiTrap`.
    #[must_use]
    pub fn init_sipi_icr(&self) -> u64 {
        // SAFETY: as in `payloads!`: initialised in full, plain data.
        unsafe { self.0.Anonymous.ApicInitSipi.ApicIcr }
    }

    /// Which event can be delivered, after `WHvRunVpExitReasonX64InterruptWindow`.
    #[must_use]
    pub fn deliverable(&self) -> i32 {
        // SAFETY: as in `payloads!`: initialised in full, plain data.
        unsafe { self.0.Anonymous.InterruptWindow.DeliverableType }
    }

    /// Feature code and parameter, after `WHvRunVpExitReasonUnsupportedFeature`.
    #[must_use]
    pub fn unsupported_feature(&self) -> (i32, u64) {
        // SAFETY: as in `payloads!`: initialised in full, plain data.
        let payload = unsafe { &self.0.Anonymous.UnsupportedFeature };
        (payload.FeatureCode, payload.FeatureParameter)
    }
}

impl fmt::Debug for ExitContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ExitContext")
            .field("reason", &format_args!("{:#x}", self.reason()))
            .field("rip", &format_args!("{:#x}", self.rip()))
            .finish_non_exhaustive()
    }
}
