//! Sizes, offsets and alignments against Microsoft's headers.
//!
//! The numbers are what C says: a program that prints `sizeof`, `_Alignof` and `offsetof` was compiled from
//! WinHvPlatformDefs.h (github.com/MicrosoftDocs/Virtualization-Documentation, commit 77e0742a,
//! virtualization/api/hypervisor-platform/headers, MIT) with `x86_64-w64-mingw32-gcc -std=c11 -D_AMD64_` and run under Wine 8.

use super::defs::*;
use super::{ExitContext, InterruptControl, RegisterValue, Segment};
use std::mem::offset_of;

/// What C says of a structure.
struct Layout {
    name: &'static str,
    size: usize,
    align: usize,
    /// Name, offset in C, offset here.
    fields: &'static [(&'static str, usize, usize)],
    size_here: usize,
    align_here: usize,
}

macro_rules! layouts {
    ($($name:ident: $size:literal, $align:literal { $($($field:ident).+ = $offset:literal),* })*) => {
        &[$(Layout {
            name: stringify!($name),
            size: $size,
            align: $align,
            fields: &[$((stringify!($($field).+), $offset, offset_of!($name, $($field).+))),*],
            size_here: size_of::<$name>(),
            align_here: align_of::<$name>(),
        }),*]
    };
}

#[rustfmt::skip]
const LAYOUTS: &[Layout] = layouts! {
    WHV_REGISTER_VALUE: 16, 16 {}
    WHV_UINT128: 16, 16 {}
    WHV_X64_SEGMENT_REGISTER: 16, 8 { Base = 0, Limit = 8, Selector = 12, Anonymous.Attributes = 14 }
    WHV_X64_TABLE_REGISTER: 16, 8 { Pad = 0, Limit = 6, Base = 8 }
    WHV_X64_FP_REGISTER: 16, 16 {}
    WHV_X64_FP_CONTROL_STATUS_REGISTER: 16, 16 { Anonymous.FpControl = 0, Anonymous.FpStatus = 2, Anonymous.FpTag = 4, Anonymous.LastFpOp = 6, Anonymous.Anonymous.LastFpRip = 8 }
    WHV_X64_XMM_CONTROL_STATUS_REGISTER: 16, 16 { Anonymous.Anonymous.LastFpRdp = 0, Anonymous.XmmStatusControl = 8, Anonymous.XmmStatusControlMask = 12 }
    WHV_X64_PENDING_EXCEPTION_EVENT: 16, 16 { Anonymous.ErrorCode = 4, Anonymous.ExceptionParameter = 8 }
    WHV_X64_PENDING_EXT_INT_EVENT: 16, 16 {}
    WHV_X64_PENDING_INTERRUPTION_REGISTER: 8, 8 { Anonymous.ErrorCode = 4 }
    WHV_X64_INTERRUPT_STATE_REGISTER: 8, 8 {}
    WHV_X64_DELIVERABILITY_NOTIFICATIONS_REGISTER: 8, 8 {}
    WHV_INTERNAL_ACTIVITY_REGISTER: 8, 8 {}
    WHV_X64_PENDING_DEBUG_EXCEPTION: 8, 8 {}
    WHV_RUN_VP_EXIT_CONTEXT: 224, 16 { ExitReason = 0, Reserved = 4, VpContext = 8, Anonymous.MemoryAccess = 48, Anonymous.IoPortAccess = 48, Anonymous.MsrAccess = 48, Anonymous.CpuidAccess = 48, Anonymous.VpException = 48, Anonymous.InterruptWindow = 48, Anonymous.UnsupportedFeature = 48, Anonymous.CancelReason = 48, Anonymous.ApicEoi = 48, Anonymous.ReadTsc = 48, Anonymous.ApicSmi = 48, Anonymous.Hypercall = 48, Anonymous.ApicInitSipi = 48, Anonymous.ApicWrite = 48, Anonymous.SynicSintDeliverable = 48 }
    WHV_VP_EXIT_CONTEXT: 40, 8 { ExecutionState = 0, Reserved = 3, Reserved2 = 4, Cs = 8, Rip = 24, Rflags = 32 }
    WHV_MEMORY_ACCESS_CONTEXT: 40, 8 { InstructionByteCount = 0, InstructionBytes = 4, AccessInfo = 20, Gpa = 24, Gva = 32 }
    WHV_X64_IO_PORT_ACCESS_CONTEXT: 96, 8 { InstructionByteCount = 0, InstructionBytes = 4, AccessInfo = 20, PortNumber = 24, Rax = 32, Rcx = 40, Rsi = 48, Rdi = 56, Ds = 64, Es = 80 }
    WHV_X64_MSR_ACCESS_CONTEXT: 24, 8 { AccessInfo = 0, MsrNumber = 4, Rax = 8, Rdx = 16 }
    WHV_X64_CPUID_ACCESS_CONTEXT: 64, 8 { Rax = 0, Rcx = 8, Rdx = 16, Rbx = 24, DefaultResultRax = 32, DefaultResultRcx = 40, DefaultResultRdx = 48, DefaultResultRbx = 56 }
    WHV_VP_EXCEPTION_CONTEXT: 40, 8 { InstructionByteCount = 0, InstructionBytes = 4, ExceptionInfo = 20, ExceptionType = 24, ErrorCode = 28, ExceptionParameter = 32 }
    WHV_X64_RDTSC_CONTEXT: 40, 8 { TscAux = 0, VirtualOffset = 8, Tsc = 16, ReferenceTime = 24, RdtscInfo = 32 }
    WHV_HYPERCALL_CONTEXT: 176, 16 { Rax = 0, Rbx = 8, Rcx = 16, Rdx = 24, R8 = 32, Rsi = 40, Rdi = 48, XmmRegisters = 64 }
    WHV_X64_UNSUPPORTED_FEATURE_CONTEXT: 16, 8 { FeatureCode = 0, FeatureParameter = 8 }
    WHV_X64_APIC_WRITE_CONTEXT: 16, 8 { Type = 0, WriteValue = 8 }
    WHV_INTERRUPT_CONTROL: 16, 8 { Destination = 8, Vector = 12 }
    WHV_DOORBELL_MATCH_DATA: 24, 8 { GuestAddress = 0, Value = 8, Length = 16 }
    WHV_PARTITION_PROPERTY: 48, 8 {}
    WHV_CAPABILITY: 24, 8 {}
    WHV_X64_CPUID_RESULT: 32, 4 { Function = 0, Eax = 16, Ebx = 20, Ecx = 24, Edx = 28 }
    WHV_X64_CPUID_RESULT2: 48, 4 { Function = 0, Index = 4, VpIndex = 8, Flags = 12, Output = 16, Mask = 32 }
    WHV_TRANSLATE_GVA_RESULT: 8, 4 { ResultCode = 0 }
    WHV_MEMORY_RANGE_ENTRY: 16, 8 { GuestAddress = 0, SizeInBytes = 8 }
    WHV_MSR_ACTION_ENTRY: 8, 4 { Index = 0, ReadAction = 4, WriteAction = 5 }
    WHV_TRIGGER_PARAMETERS: 32, 8 { TriggerType = 0 }
    WHV_NOTIFICATION_PORT_PARAMETERS: 32, 8 { NotificationPortType = 0 }
    WHV_VIRTUAL_PROCESSOR_PROPERTY: 16, 8 { PropertyCode = 0 }
    WHV_PROCESSOR_FEATURES_BANKS: 24, 8 { BanksCount = 0 }
};

/// Structures whose alignment `windows-sys` drops. Those that are passed to the platform have types of their own here.
const DROPPED: [&str; 9] = [
    "WHV_REGISTER_VALUE",
    "WHV_UINT128",
    "WHV_X64_FP_REGISTER",
    "WHV_X64_FP_CONTROL_STATUS_REGISTER",
    "WHV_X64_XMM_CONTROL_STATUS_REGISTER",
    "WHV_X64_PENDING_EXCEPTION_EVENT",
    "WHV_X64_PENDING_EXT_INT_EVENT",
    "WHV_RUN_VP_EXIT_CONTEXT",
    "WHV_HYPERCALL_CONTEXT",
];

#[test]
fn structures_are_as_in_microsofts_headers() {
    for layout in LAYOUTS {
        assert_eq!(layout.size_here, layout.size, "size of {}", layout.name);
        let align = if DROPPED.contains(&layout.name) { 8 } else { layout.align };
        assert_eq!(layout.align_here, align.min(layout.align), "alignment of {}", layout.name);
        for (field, there, here) in layout.fields {
            assert_eq!(here, there, "offset of {}.{field}", layout.name);
        }
    }
    assert!(DROPPED.iter().all(|name| LAYOUTS.iter().any(|layout| layout.name == *name && layout.align == 16)));
}

#[test]
fn our_own_types_restore_the_alignment() {
    assert_eq!((size_of::<RegisterValue>(), align_of::<RegisterValue>()), (16, 16));
    assert_eq!((size_of::<ExitContext>(), align_of::<ExitContext>()), (224, 16));
    assert_eq!((size_of::<Segment>(), offset_of!(Segment, attributes)), (16, 14));
    assert_eq!((size_of::<InterruptControl>(), offset_of!(InterruptControl, vector)), (16, 12));
}

#[test]
fn register_values_are_where_the_structures_have_them() {
    let segment = Segment { base: 1, limit: 2, selector: 3, attributes: 4 };
    let value = RegisterValue::from_segment(segment);
    // SAFETY: both are 16 bytes of plain data.
    let raw: WHV_X64_SEGMENT_REGISTER = unsafe { std::mem::transmute(value) };
    assert_eq!((raw.Base, raw.Limit, raw.Selector, Segment::from(raw)), (1, 2, 3, segment));
    assert_eq!(value.as_segment(), segment);
    // SAFETY: as above.
    let raw: WHV_X64_TABLE_REGISTER = unsafe { std::mem::transmute(RegisterValue::from_table(5, 6)) };
    assert_eq!((raw.Base, raw.Limit), (5, 6));
    assert_eq!(RegisterValue::from_u128(7 << 64 | 8).as_u128(), 7 << 64 | 8);
}
