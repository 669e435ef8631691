//! WHPX on arm64 (Windows 11 24H2, build 26100.3915 and later): structures, constants and the table.
//!
//! All of it is declared here: on this architecture `windows-sys` compiles, but gives the x86-64 structures. Names, sizes,
//! offsets and values are those of Microsoft's WinHvPlatformDefs.h; the tests hold them against it.

use super::bits::bits;
use super::{HANDLE, HRESULT};
use core::ffi::c_void;
use core::fmt;

/// `WHV_PARTITION_HANDLE`.
pub type PartitionHandle = isize;
/// `WHV_REGISTER_NAME`.
pub type RegisterName = u32;
/// The index that means the partition, for registers that all processors share (ID registers).
pub const ANY_VP: u32 = u32::MAX;

/// `WHV_CAPABILITY_CODE`.
#[allow(missing_docs, reason = "each is named as in WinHvPlatformDefs.h, without its prefix")]
pub mod capability {
    pub const HYPERVISOR_PRESENT: u32 = 0;
    pub const FEATURES: u32 = 1;
    pub const EXTENDED_VM_EXITS: u32 = 2;
    pub const PHYSICAL_ADDRESS_WIDTH: u32 = 0x100a;
    pub const GIC_LPI_INT_ID_BITS: u32 = 0x2011;
}

/// `WHV_PARTITION_PROPERTY_CODE`.
#[allow(missing_docs, reason = "each is named as in WinHvPlatformDefs.h, without its prefix")]
pub mod property {
    pub const EXTENDED_VM_EXITS: u32 = 1;
    pub const SEPARATE_SECURITY_DOMAIN: u32 = 3;
    pub const REFERENCE_TIME: u32 = 0x100b;
    pub const PHYSICAL_ADDRESS_WIDTH: u32 = 0x1011;
    pub const ARM64_IC_PARAMETERS: u32 = 0x1012;
    pub const PROCESSOR_COUNT: u32 = 0x1fff;
}

/// `WHV_RUN_VP_EXIT_REASON`: the hypervisor's message types.
#[allow(missing_docs, reason = "each is named as in WinHvPlatformDefs.h, without its prefix")]
pub mod exit_reason {
    pub const NONE: u32 = 0;
    pub const UNMAPPED_GPA: u32 = 0x8000_0000;
    pub const GPA_INTERCEPT: u32 = 0x8000_0001;
    pub const INVALID_VP_REGISTER_VALUE: u32 = 0x8000_0020;
    pub const UNRECOVERABLE_EXCEPTION: u32 = 0x8000_0021;
    pub const UNSUPPORTED_FEATURE: u32 = 0x8000_0022;
    pub const HYPERCALL: u32 = 0x8000_0050;
    pub const SYNIC_SINT_DELIVERABLE: u32 = 0x8000_0062;
    pub const REGISTER_INTERCEPT: u32 = 0x8001_0006;
    pub const ARM64_RESET: u32 = 0x8001_000c;
    pub const CANCELED: u32 = 0xffff_ffff;
}

/// `WHV_REGISTER_NAME` of those that a virtual machine monitor moves. `X0` to `X28`, `FP` and `LR` follow one another, as do the
/// vector registers.
#[allow(missing_docs, reason = "each is named as in WinHvPlatformDefs.h, without its prefix")]
pub mod register {
    pub const INTERNAL_ACTIVITY_STATE: u32 = 4;
    pub const X0: u32 = 0x2_0000;
    pub const LR: u32 = 0x2_001e;
    pub const SP: u32 = 0x2_001f;
    pub const SP_EL0: u32 = 0x2_0020;
    pub const SP_EL1: u32 = 0x2_0021;
    pub const PC: u32 = 0x2_0022;
    pub const PSTATE: u32 = 0x2_0023;
    /// The first of the feature registers, which belong to the partition: CRm and op2 of their encoding count on from here.
    pub const ID_MIDR_EL1: u32 = 0x2_2000;
    pub const Q0: u32 = 0x3_0000;
    pub const MPIDR_EL1: u32 = 0x4_0001;
    pub const FPCR: u32 = 0x4_0012;
    pub const FPSR: u32 = 0x4_0013;
    pub const MIDR_EL1: u32 = 0x4_0051;
    /// Those of breakpoints and watchpoints count on, 16 of each kind.
    pub const DBGBCR0_EL1: u32 = 0x5_0000;
    pub const DBGWCR0_EL1: u32 = 0x5_0010;
    pub const DBGBVR0_EL1: u32 = 0x5_0020;
    pub const DBGWVR0_EL1: u32 = 0x5_0030;
    pub const CNTVCT_EL0: u32 = 0x5_8011;
    pub const GICR_BASE_GPA: u32 = 0x6_3000;
}

/// Encodings of feature registers (op0 3, op1 0, CRn 0, CRm, op2) that a guest sees, all of the partition's.
pub const FEATURE_REGS: [u16; 12] =
    [0xc020, 0xc021, 0xc024, 0xc028, 0xc029, 0xc030, 0xc031, 0xc032, 0xc038, 0xc039, 0xc03a, 0xc03b];

/// The platform's name of a feature register, by its encoding; to be used with [`ANY_VP`].
#[must_use]
pub const fn feature(encoding: u16) -> RegisterName {
    register::ID_MIDR_EL1 + (encoding & 0x7f) as u32
}

/// System registers of a processor: the encoding of MRS (op0, op1, CRn, CRm, op2 in 2, 3, 4, 4 and 3 bits) and the platform's name.
/// Without [`register::CNTVCT_EL0`], which counts, those of breakpoints and watchpoints, and feature registers.
pub const SYSTEM_REGS: [(u16, RegisterName); 35] = [
    (0x8012, 0x5_004d), // MDSCR_EL1
    (0xc000, register::MIDR_EL1),
    (0xc005, register::MPIDR_EL1),
    (0xc080, 0x4_0002), // SCTLR_EL1
    (0xc082, 0x4_0004), // CPACR_EL1
    (0xc100, 0x4_0005), // TTBR0_EL1
    (0xc101, 0x4_0006), // TTBR1_EL1
    (0xc102, 0x4_0007), // TCR_EL1
    (0xc108, 0x4_002d), // APIAKEYLO_EL1
    (0xc109, 0x4_002c),
    (0xc10a, 0x4_002f), // APIBKEYLO_EL1
    (0xc10b, 0x4_002e),
    (0xc110, 0x4_0027), // APDAKEYLO_EL1
    (0xc111, 0x4_0026),
    (0xc112, 0x4_0029), // APDBKEYLO_EL1
    (0xc113, 0x4_0028),
    (0xc118, 0x4_002b), // APGAKEYLO_EL1
    (0xc119, 0x4_002a),
    (0xc200, 0x4_0014), // SPSR_EL1
    (0xc201, 0x4_0015), // ELR_EL1
    (0xc208, register::SP_EL0),
    (0xc290, 0x4_0008), // ESR_EL1
    (0xc300, 0x4_0009), // FAR_EL1
    (0xc3a0, 0x4_000a), // PAR_EL1
    (0xc510, 0x4_000b), // MAIR_EL1
    (0xc600, 0x4_000c), // VBAR_EL1
    (0xc681, 0x4_000d), // CONTEXTIDR_EL1
    (0xc684, 0x4_000e), // TPIDR_EL1
    (0xc708, 0x5_8008), // CNTKCTL_EL1
    (0xd000, 0x4_0035), // CSSELR_EL1
    (0xde82, 0x4_0011), // TPIDR_EL0
    (0xde83, 0x4_0010), // TPIDRRO_EL0
    (0xdf19, 0x5_800e), // CNTV_CTL_EL0
    (0xdf1a, 0x5_800f), // CNTV_CVAL_EL0
    (0xe208, register::SP_EL1),
];

bits! {
    /// `WHV_VP_EXECUTION_STATE`.
    pub struct ExecutionState(u16) {
        /// Exception level.
        cpl / with_cpl: 0, 2;
        /// Debugging is active.
        debug_active / with_debug_active: 2, 1;
        /// An event is in delivery.
        interruption_pending / with_interruption_pending: 3, 1;
    }

    /// `WHV_CAPABILITY_FEATURES`, as far as it has a use here.
    pub struct Features(u64) {
        /// `WHvQueryGpaRangeDirtyBitmap` has something to tell.
        dirty_page_tracking / with_dirty_page_tracking: 3, 1;
        /// The platform is the released one (build 26100.3915 and later).
        arm64_support / with_arm64_support: 11, 1;
    }

    /// `WHV_EXTENDED_VM_EXITS`, as far as it exists on arm64.
    pub struct ExtendedVmExits(u64) {
        /// `HYPERCALL`.
        hypercall_exit / with_hypercall_exit: 5, 1;
    }

    /// `WHV_INTERNAL_ACTIVITY_REGISTER`.
    pub struct Activity(u64) {
        /// Off, until PSCI or a VMM starts it.
        startup_suspend / with_startup_suspend: 0, 1;
        /// Halted.
        halt_suspend / with_halt_suspend: 1, 1;
        /// Idle.
        idle_suspend / with_idle_suspend: 2, 1;
    }

    /// `WHV_MEMORY_ACCESS_INFO`.
    pub struct MemoryAccessInfo(u8) {
        /// The virtual address is told.
        gva_valid / with_gva_valid: 0, 1;
        /// The virtual address belongs to the physical one.
        gva_gpa_valid / with_gva_gpa_valid: 1, 1;
    }

    /// `WHV_INTERRUPT_CONTROL2`.
    pub struct InterruptKind(u64) {
        /// 0: fixed.
        kind / with_kind: 0, 32;
        /// The line is high.
        asserted / with_asserted: 34, 1;
        /// Route it anew.
        retarget / with_retarget: 35, 1;
    }
}

/// `WHV_REGISTER_VALUE`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C, align(16))]
pub struct RegisterValue {
    /// The lower half; all of a 64-bit register.
    pub low: u64,
    /// The upper half.
    pub high: u64,
}

/// `WHV_INTERCEPT_MESSAGE_HEADER`.
#[allow(missing_docs, reason = "each is named as in WinHvPlatformDefs.h")]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct InterceptHeader {
    pub vp_index: u32,
    pub instruction_length: u8,
    /// 0 read, 1 write, 2 execute.
    pub access_type: u8,
    pub execution_state: ExecutionState,
    pub pc: u64,
    pub cpsr: u64,
}

/// `WHV_MEMORY_ACCESS_CONTEXT`: after `UNMAPPED_GPA` and `GPA_INTERCEPT`.
#[allow(missing_docs, reason = "each is named as in WinHvPlatformDefs.h")]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct MemoryAccess {
    pub header: InterceptHeader,
    pub reserved0: u32,
    pub instruction_byte_count: u8,
    pub access_info: MemoryAccessInfo,
    pub reserved1: u16,
    pub instruction_bytes: [u8; 4],
    pub reserved2: u32,
    pub gva: u64,
    pub gpa: u64,
    /// ESR_EL2 (Arm ARM, D24.2.40).
    pub syndrome: u64,
}

/// `WHV_ARM64_RESET_CONTEXT`: the guest asked PSCI, which the hypervisor serves, to be switched off or reset.
#[allow(missing_docs, reason = "each is named as in WinHvPlatformDefs.h")]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct Reset {
    pub header: InterceptHeader,
    /// 0 power off, 1 reboot.
    pub reset_type: u32,
    pub reserved: u32,
}

/// `WHV_ARM64_HYPERCALL_CONTEXT`.
#[allow(missing_docs, reason = "each is named as in WinHvPlatformDefs.h")]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct Hypercall {
    pub header: InterceptHeader,
    pub immediate: u16,
    pub reserved1: u16,
    pub reserved2: u32,
    pub x: [u64; 18],
}

/// The union in [`ExitContext`].
#[derive(Clone, Copy)]
#[repr(C, align(16))]
union Payload {
    memory_access: MemoryAccess,
    reset: Reset,
    hypercall: Hypercall,
    words: [u64; 32],
}

/// `WHV_RUN_VP_EXIT_CONTEXT`.
#[derive(Clone, Copy)]
#[repr(C, align(16))]
pub struct ExitContext {
    /// Why the processor left: see [`exit_reason`].
    pub reason: u32,
    reserved: u32,
    reserved1: u64,
    payload: Payload,
}

impl Default for ExitContext {
    fn default() -> Self {
        Self { reason: 0, reserved: 0, reserved1: 0, payload: Payload { words: [0; 32] } }
    }
}

impl ExitContext {
    /// After [`exit_reason::UNMAPPED_GPA`] and [`exit_reason::GPA_INTERCEPT`].
    #[must_use]
    pub fn memory_access(&self) -> &MemoryAccess {
        // SAFETY: a context is initialised in full, and every member is plain data, for which each pattern of bits is a value.
        unsafe { &self.payload.memory_access }
    }

    /// After [`exit_reason::ARM64_RESET`].
    #[must_use]
    pub fn reset(&self) -> &Reset {
        // SAFETY: as above.
        unsafe { &self.payload.reset }
    }

    /// After [`exit_reason::HYPERCALL`].
    #[must_use]
    pub fn hypercall(&self) -> &Hypercall {
        // SAFETY: as above.
        unsafe { &self.payload.hypercall }
    }

    /// What every payload of an intercept begins with.
    #[must_use]
    pub fn header(&self) -> &InterceptHeader {
        &self.memory_access().header
    }

    /// Makes it that of a memory access; for simulators.
    pub fn set_memory_access(&mut self, reason: u32, access: MemoryAccess) {
        self.reason = reason;
        self.payload.memory_access = access;
    }

    /// Makes it that of a call; for simulators.
    pub fn set_hypercall(&mut self, call: Hypercall) {
        self.reason = exit_reason::HYPERCALL;
        self.payload.hypercall = call;
    }

    /// Makes it that of a reset; for simulators.
    pub fn set_reset(&mut self, reset: Reset) {
        self.reason = exit_reason::ARM64_RESET;
        self.payload.reset = reset;
    }

    /// Fills all that a reason alone does not define with what happens to stand there; for simulators.
    pub fn set_garbage(&mut self, reason: u32, garbage: u64) {
        self.reason = reason;
        self.payload.words = [garbage; 32];
    }
}

impl fmt::Debug for ExitContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ExitContext")
            .field("reason", &format_args!("{:#x}", self.reason))
            .field("pc", &format_args!("{:#x}", self.header().pc))
            .finish_non_exhaustive()
    }
}

/// `WHV_INTERRUPT_CONTROL`.
#[allow(missing_docs, reason = "each is named as in WinHvPlatformDefs.h")]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct InterruptControl {
    pub target_partition: u64,
    pub kind: InterruptKind,
    pub destination_address: u64,
    /// The GIC's INTID.
    pub requested_vector: u32,
    pub target_vtl: u8,
    pub reserved0: u8,
    pub reserved1: u16,
}

/// `WHV_ARM64_IC_PARAMETERS` for a GICv3: must be set before the set-up.
#[allow(missing_docs, reason = "each is named as in WinHvPlatformDefs.h")]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct IcParameters {
    /// 0 none, 1 GICv3.
    pub emulation_mode: u32,
    pub reserved: u32,
    pub gicd_base_address: u64,
    pub gits_translater_base_address: u64,
    pub reserved1: u32,
    pub gic_lpi_int_id_bits: u32,
    pub gic_ppi_overflow_interrupt_from_cntv: u32,
    pub gic_ppi_performance_monitors_interrupt: u32,
    pub reserved2: [u32; 6],
}

crate::ffi_table! {
    /// The functions of WinHvPlatform.dll on arm64 that have a use here. The platform is younger there than all of them.
    pub struct WhpApi: extern "system" {
        req {
            fn WHvGetCapability(code: u32, buffer: *mut c_void, size: u32, written: *mut u32) -> HRESULT;
            fn WHvCreatePartition(partition: *mut PartitionHandle) -> HRESULT;
            fn WHvSetupPartition(partition: PartitionHandle) -> HRESULT;
            fn WHvDeletePartition(partition: PartitionHandle) -> HRESULT;
            fn WHvSetPartitionProperty(partition: PartitionHandle, code: u32, buffer: *const c_void, size: u32) -> HRESULT;
            fn WHvMapGpaRange(partition: PartitionHandle, source: *mut c_void, gpa: u64, size: u64, flags: i32) -> HRESULT;
            fn WHvUnmapGpaRange(partition: PartitionHandle, gpa: u64, size: u64) -> HRESULT;
            fn WHvCreateVirtualProcessor(partition: PartitionHandle, vp: u32, flags: u32) -> HRESULT;
            fn WHvDeleteVirtualProcessor(partition: PartitionHandle, vp: u32) -> HRESULT;
            fn WHvRunVirtualProcessor(partition: PartitionHandle, vp: u32, context: *mut ExitContext, size: u32) -> HRESULT;
            fn WHvCancelRunVirtualProcessor(partition: PartitionHandle, vp: u32, flags: u32) -> HRESULT;
            fn WHvGetVirtualProcessorRegisters(partition: PartitionHandle, vp: u32, names: *const RegisterName, count: u32, values: *mut RegisterValue) -> HRESULT;
            fn WHvSetVirtualProcessorRegisters(partition: PartitionHandle, vp: u32, names: *const RegisterName, count: u32, values: *const RegisterValue) -> HRESULT;
            fn WHvRequestInterrupt(partition: PartitionHandle, interrupt: *const InterruptControl, size: u32) -> HRESULT;
        }
        opt {
            fn WHvQueryGpaRangeDirtyBitmap(partition: PartitionHandle, gpa: u64, size: u64, bitmap: *mut u64, bitmap_size: u32) -> HRESULT;
            fn WHvMapGpaRange2(partition: PartitionHandle, process: HANDLE, source: *mut c_void, gpa: u64, size: u64, flags: i32) -> HRESULT;
            fn WHvSuspendPartitionTime(partition: PartitionHandle) -> HRESULT;
            fn WHvResumePartitionTime(partition: PartitionHandle) -> HRESULT;
        }
    }
}

#[cfg(all(windows, target_arch = "aarch64"))]
mod system;

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::offset_of;

    /// As `x86_64/abi_tests.rs` says, with `_ARM64_` defined instead.
    #[test]
    fn structures_are_as_in_microsofts_headers() {
        assert_eq!((size_of::<RegisterValue>(), align_of::<RegisterValue>()), (16, 16));
        assert_eq!((size_of::<ExitContext>(), align_of::<ExitContext>()), (272, 16));
        assert_eq!(offset_of!(ExitContext, payload), 16);
        assert_eq!((size_of::<InterceptHeader>(), align_of::<InterceptHeader>()), (24, 8));
        assert_eq!((size_of::<MemoryAccess>(), align_of::<MemoryAccess>()), (64, 8));
        assert_eq!((size_of::<Reset>(), offset_of!(Reset, reset_type)), (32, 24));
        assert_eq!((size_of::<Hypercall>(), offset_of!(Hypercall, immediate), offset_of!(Hypercall, x)), (176, 24, 32));
        assert_eq!((size_of::<InterruptControl>(), align_of::<InterruptControl>()), (32, 8));
        assert_eq!((size_of::<IcParameters>(), align_of::<IcParameters>()), (64, 8));
        for (here, there) in [
            (offset_of!(InterceptHeader, instruction_length), 4),
            (offset_of!(InterceptHeader, access_type), 5),
            (offset_of!(InterceptHeader, execution_state), 6),
            (offset_of!(InterceptHeader, pc), 8),
            (offset_of!(InterceptHeader, cpsr), 16),
            (offset_of!(MemoryAccess, instruction_byte_count), 28),
            (offset_of!(MemoryAccess, access_info), 29),
            (offset_of!(MemoryAccess, instruction_bytes), 32),
            (offset_of!(MemoryAccess, gva), 40),
            (offset_of!(MemoryAccess, gpa), 48),
            (offset_of!(MemoryAccess, syndrome), 56),
            (offset_of!(InterruptControl, kind), 8),
            (offset_of!(InterruptControl, destination_address), 16),
            (offset_of!(InterruptControl, requested_vector), 24),
            (offset_of!(InterruptControl, target_vtl), 28),
            (offset_of!(IcParameters, gicd_base_address), 8),
            (offset_of!(IcParameters, gits_translater_base_address), 16),
            (offset_of!(IcParameters, gic_lpi_int_id_bits), 28),
            (offset_of!(IcParameters, gic_ppi_overflow_interrupt_from_cntv), 32),
            (offset_of!(IcParameters, gic_ppi_performance_monitors_interrupt), 36),
        ] {
            assert_eq!(here, there);
        }
    }

    /// Every name that is derived here from an encoding, or counted on, against the header's own.
    #[test]
    fn names_of_registers_are_the_headers() {
        for (encoding, name) in [(0xc020, 0x2_2020), (0xc028, 0x2_2028), (0xc032, 0x2_2032), (0xc03b, 0x2_203b)] {
            assert_eq!(feature(encoding), name);
        }
        assert_eq!([register::LR - register::X0, register::DBGBVR0_EL1 + 15], [30, 0x5_002f]);
        assert!(SYSTEM_REGS.is_sorted() && FEATURE_REGS.is_sorted());
        let mut names: Vec<_> = SYSTEM_REGS.iter().map(|(_, name)| *name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), SYSTEM_REGS.len(), "two encodings have one name");
    }

    #[test]
    fn an_exit_tells_its_payload() {
        let mut context = ExitContext::default();
        let header = InterceptHeader { pc: 0x1000, ..InterceptHeader::default() };
        context
            .set_memory_access(exit_reason::UNMAPPED_GPA, MemoryAccess { header, gpa: 7, ..MemoryAccess::default() });
        assert_eq!((context.reason, context.memory_access().gpa, context.header().pc), (0x8000_0000, 7, 0x1000));
        context.set_reset(Reset { header, reset_type: 1, reserved: 0 });
        assert_eq!((context.reason, context.reset().reset_type), (exit_reason::ARM64_RESET, 1));
        assert_eq!(InterruptKind(0).with_asserted(1).0, 1 << 34);
    }
}
