//! Hypervisor.framework on Apple silicon: a vCPU is EL1 and EL0 of the host's CPU. Exits come as a structure that the framework
//! owns and rewrites at each run.
//!
//! Signatures and versions are those of Apple's Hypervisor/hv_vm.h, hv_vcpu.h, hv_vcpu_types.h, hv_vm_config.h, hv_gic.h and
//! hv_gic_config.h (macOS 15 SDK). Everything per vCPU must be called by the thread that created it, except
//! [`HvfArm64Functions::hv_vcpus_exit`] and what raises interrupts of the GIC.

use super::HvReturn;
use core::ffi::c_void;
use core::fmt;

/// The library's name.
pub const LIBRARY: &str = "Hypervisor.framework";

/// An object of the framework with a reference count (`os_object`): configurations, saved states.
pub type Object = *mut c_void;

/// A 128-bit register as the framework's getter writes it (`hv_simd_fp_uchar16_t`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C, align(16))]
pub struct Vector(pub [u8; 16]);

/// What a run left behind (`hv_vcpu_exit_t`). `reason` is a plain number: newer systems may know more of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct VcpuExit {
    /// One of [`reason`].
    pub reason: u32,
    /// Only with [`reason::EXCEPTION`].
    pub exception: ExitException,
}

/// An exception to EL2 (`hv_vcpu_exit_exception_t`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct ExitException {
    /// ESR_EL2.
    pub syndrome: u64,
    /// FAR_EL2.
    pub virtual_address: u64,
    /// The intermediate physical address of an abort, offset in the page included.
    pub physical_address: u64,
}

/// Values of [`VcpuExit::reason`] (`hv_exit_reason_t`).
#[allow(missing_docs, reason = "each is named as in hv_vcpu_types.h")]
pub mod reason {
    pub const CANCELED: u32 = 0;
    pub const EXCEPTION: u32 = 1;
    /// The virtual timer fired; it is masked from now on.
    pub const VTIMER_ACTIVATED: u32 = 2;
    pub const UNKNOWN: u32 = 3;
}

/// Interrupt inputs of a CPU (`hv_interrupt_type_t`).
#[allow(missing_docs, reason = "each is named as in hv_vcpu_types.h")]
pub mod interrupt {
    pub const IRQ: u32 = 0;
    pub const FIQ: u32 = 1;
}

crate::ffi_table! {
    /// The functions of Hypervisor.framework on Apple silicon that have a use here, and three of the system that go with
    /// them. Required are those of macOS 11; the optional ones came with the version that is named above them.
    ///
    /// The setter of SIMD registers takes its value in a vector register, which Rust has no stable type for: see [`HvfArm64Api`].
    pub struct HvfArm64Functions: extern "C" {
        req {
            fn hv_vm_create(config: Object) -> HvReturn;
            fn hv_vm_destroy() -> HvReturn;
            fn hv_vm_map(address: *const c_void, ipa: u64, size: usize, flags: u64) -> HvReturn;
            fn hv_vm_unmap(ipa: u64, size: usize) -> HvReturn;
            fn hv_vm_protect(ipa: u64, size: usize, flags: u64) -> HvReturn;
            fn hv_vcpu_create(vcpu: *mut u64, exit: *mut *const VcpuExit, config: Object) -> HvReturn;
            fn hv_vcpu_destroy(vcpu: u64) -> HvReturn;
            fn hv_vcpu_get_reg(vcpu: u64, reg: u32, value: *mut u64) -> HvReturn;
            fn hv_vcpu_set_reg(vcpu: u64, reg: u32, value: u64) -> HvReturn;
            fn hv_vcpu_get_simd_fp_reg(vcpu: u64, reg: u32, value: *mut Vector) -> HvReturn;
            fn hv_vcpu_get_sys_reg(vcpu: u64, reg: u16, value: *mut u64) -> HvReturn;
            fn hv_vcpu_set_sys_reg(vcpu: u64, reg: u16, value: u64) -> HvReturn;
            fn hv_vcpu_get_pending_interrupt(vcpu: u64, kind: u32, pending: *mut bool) -> HvReturn;
            fn hv_vcpu_set_pending_interrupt(vcpu: u64, kind: u32, pending: bool) -> HvReturn;
            fn hv_vcpu_get_trap_debug_exceptions(vcpu: u64, value: *mut bool) -> HvReturn;
            fn hv_vcpu_set_trap_debug_exceptions(vcpu: u64, value: bool) -> HvReturn;
            fn hv_vcpu_get_trap_debug_reg_accesses(vcpu: u64, value: *mut bool) -> HvReturn;
            fn hv_vcpu_set_trap_debug_reg_accesses(vcpu: u64, value: bool) -> HvReturn;
            fn hv_vcpu_run(vcpu: u64) -> HvReturn;
            fn hv_vcpus_exit(vcpus: *const u64, count: u32) -> HvReturn;
            fn hv_vcpu_get_exec_time(vcpu: u64, time: *mut u64) -> HvReturn;
            fn hv_vcpu_get_vtimer_mask(vcpu: u64, masked: *mut bool) -> HvReturn;
            fn hv_vcpu_set_vtimer_mask(vcpu: u64, masked: bool) -> HvReturn;
            fn hv_vcpu_get_vtimer_offset(vcpu: u64, offset: *mut u64) -> HvReturn;
            fn hv_vcpu_set_vtimer_offset(vcpu: u64, offset: u64) -> HvReturn;
            fn hv_vcpu_config_create() -> Object;
            fn hv_vcpu_config_get_feature_reg(config: Object, reg: u32, value: *mut u64) -> HvReturn;
            // libSystem, on which the framework depends: mach_time.h and os/object.h.
            fn mach_absolute_time() -> u64;
            fn mach_timebase_info(info: *mut Timebase) -> i32;
            fn os_release(object: Object) -> ();
        }
        opt {
            // 11
            fn hv_vm_get_max_vcpu_count(count: *mut u32) -> HvReturn;
            fn hv_vcpu_config_get_ccsidr_el1_sys_reg_values(config: Object, kind: u32, values: *mut [u64; 8]) -> HvReturn;
            // 12.1
            fn hv_vm_allocate(address: *mut *mut c_void, size: usize, flags: u64) -> HvReturn;
            fn hv_vm_deallocate(address: *mut c_void, size: usize) -> HvReturn;
            // 13
            fn hv_vm_config_create() -> Object;
            fn hv_vm_config_get_max_ipa_size(bits: *mut u32) -> HvReturn;
            fn hv_vm_config_get_default_ipa_size(bits: *mut u32) -> HvReturn;
            fn hv_vm_config_set_ipa_size(config: Object, bits: u32) -> HvReturn;
            fn hv_vm_config_get_ipa_size(config: Object, bits: *mut u32) -> HvReturn;
            // 15
            fn hv_vm_config_get_el2_supported(supported: *mut bool) -> HvReturn;
            fn hv_vm_config_get_el2_enabled(config: Object, enabled: *mut bool) -> HvReturn;
            fn hv_vm_config_set_el2_enabled(config: Object, enabled: bool) -> HvReturn;
            fn hv_gic_create(config: Object) -> HvReturn;
            fn hv_gic_set_spi(intid: u32, level: bool) -> HvReturn;
            fn hv_gic_send_msi(address: u64, intid: u32) -> HvReturn;
            fn hv_gic_get_distributor_reg(reg: u16, value: *mut u64) -> HvReturn;
            fn hv_gic_set_distributor_reg(reg: u16, value: u64) -> HvReturn;
            fn hv_gic_get_redistributor_base(vcpu: u64, address: *mut u64) -> HvReturn;
            fn hv_gic_get_redistributor_reg(vcpu: u64, reg: u32, value: *mut u64) -> HvReturn;
            fn hv_gic_set_redistributor_reg(vcpu: u64, reg: u32, value: u64) -> HvReturn;
            fn hv_gic_get_icc_reg(vcpu: u64, reg: u16, value: *mut u64) -> HvReturn;
            fn hv_gic_set_icc_reg(vcpu: u64, reg: u16, value: u64) -> HvReturn;
            fn hv_gic_get_msi_reg(reg: u16, value: *mut u64) -> HvReturn;
            fn hv_gic_set_msi_reg(reg: u16, value: u64) -> HvReturn;
            fn hv_gic_set_state(state: *const c_void, size: usize) -> HvReturn;
            fn hv_gic_reset() -> HvReturn;
            fn hv_gic_state_create() -> Object;
            fn hv_gic_state_get_size(state: Object, size: *mut usize) -> HvReturn;
            fn hv_gic_state_get_data(state: Object, data: *mut c_void) -> HvReturn;
            fn hv_gic_config_create() -> Object;
            fn hv_gic_config_set_distributor_base(config: Object, base: u64) -> HvReturn;
            fn hv_gic_config_set_redistributor_base(config: Object, base: u64) -> HvReturn;
            fn hv_gic_config_set_msi_region_base(config: Object, base: u64) -> HvReturn;
            fn hv_gic_config_set_msi_interrupt_range(config: Object, first: u32, count: u32) -> HvReturn;
            fn hv_gic_get_distributor_size(size: *mut usize) -> HvReturn;
            fn hv_gic_get_distributor_base_alignment(alignment: *mut usize) -> HvReturn;
            fn hv_gic_get_redistributor_region_size(size: *mut usize) -> HvReturn;
            fn hv_gic_get_redistributor_size(size: *mut usize) -> HvReturn;
            fn hv_gic_get_redistributor_base_alignment(alignment: *mut usize) -> HvReturn;
            fn hv_gic_get_msi_region_size(size: *mut usize) -> HvReturn;
            fn hv_gic_get_msi_region_base_alignment(alignment: *mut usize) -> HvReturn;
            fn hv_gic_get_spi_interrupt_range(first: *mut u32, count: *mut u32) -> HvReturn;
            fn hv_gic_get_intid(interrupt: u16, intid: *mut u32) -> HvReturn;
            // 15.2
            fn hv_sme_config_get_max_svl_bytes(bytes: *mut usize) -> HvReturn;
            fn hv_vcpu_get_sme_state(vcpu: u64, state: *mut SmeState) -> HvReturn;
            fn hv_vcpu_set_sme_state(vcpu: u64, state: *const SmeState) -> HvReturn;
        }
    }
}

/// The numerator and denominator by which ticks of `mach_absolute_time` become nanoseconds (`mach_timebase_info_data_t`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct Timebase {
    /// Numerator.
    pub numerator: u32,
    /// Denominator.
    pub denominator: u32,
}

/// PSTATE.SM and PSTATE.ZA (`hv_vcpu_sme_state_t`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct SmeState {
    /// Streaming SVE mode.
    pub streaming_sve_mode_enabled: bool,
    /// The ZA storage.
    pub za_storage_enabled: bool,
}

/// Sets a SIMD register: vCPU, register, its 16 bytes in memory order. A Rust function on purpose: the framework's takes
/// the value in Q0, which no `extern` declaration of stable Rust can say.
pub type SetVector = unsafe fn(vcpu: u64, reg: u32, value: &[u8; 16]) -> HvReturn;

/// The platform: [`HvfArm64Functions`], and the one that needs more than a pointer.
#[derive(Clone, Copy)]
pub struct HvfArm64Api {
    /// The functions that can be declared.
    pub functions: HvfArm64Functions,
    /// `hv_vcpu_set_simd_fp_reg`.
    pub hv_vcpu_set_simd_fp_reg: SetVector,
}

impl core::ops::Deref for HvfArm64Api {
    type Target = HvfArm64Functions;

    fn deref(&self) -> &HvfArm64Functions {
        &self.functions
    }
}

impl fmt::Debug for HvfArm64Api {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HvfArm64Api").finish_non_exhaustive()
    }
}

#[cfg(all(target_os = "macos", target_arch = "aarch64"))]
mod system;

/// General registers (`hv_reg_t`). X0 to X30 are 0 to 30.
#[allow(missing_docs, reason = "each is named as in hv_vcpu_types.h")]
pub mod reg {
    pub const X0: u32 = 0;
    pub const X30: u32 = 30;
    pub const PC: u32 = 31;
    pub const FPCR: u32 = 32;
    pub const FPSR: u32 = 33;
    pub const CPSR: u32 = 34;
    /// One more than the last.
    pub const MAX: u32 = 35;
}

/// What [`HvfArm64Functions::hv_vcpu_config_get_feature_reg`] tells (`hv_feature_reg_t`), and the system register that it is.
pub const FEATURE_REGS: [(u32, u16); 9] = [
    (0, sys_reg::ID_AA64DFR0_EL1),
    (1, sys_reg::ID_AA64DFR1_EL1),
    (2, sys_reg::ID_AA64ISAR0_EL1),
    (3, sys_reg::ID_AA64ISAR1_EL1),
    (4, sys_reg::ID_AA64MMFR0_EL1),
    (5, sys_reg::ID_AA64MMFR1_EL1),
    (6, sys_reg::ID_AA64MMFR2_EL1),
    (7, sys_reg::ID_AA64PFR0_EL1),
    (8, sys_reg::ID_AA64PFR1_EL1),
];

/// System registers (`hv_sys_reg_t`). The numbers are the encodings of MRS: op0, op1, CRn, CRm, op2 in 2, 3, 4, 4 and 3 bits.
#[allow(missing_docs, reason = "each is named as in the Arm ARM")]
pub mod sys_reg {
    macro_rules! sys_regs {
        ($($name:ident = $number:literal),* $(,)?) => {
            $(pub const $name: u16 = $number;)*

            /// Those that every version of the framework knows, without the debug registers of `DEBUG`.
            pub const ALL: &[u16] = &[$($name),*];
        };
    }

    sys_regs! {
        MDCCINT_EL1 = 0x8010, MDSCR_EL1 = 0x8012,
        MIDR_EL1 = 0xc000, MPIDR_EL1 = 0xc005,
        ID_AA64PFR0_EL1 = 0xc020, ID_AA64PFR1_EL1 = 0xc021,
        ID_AA64DFR0_EL1 = 0xc028, ID_AA64DFR1_EL1 = 0xc029,
        ID_AA64ISAR0_EL1 = 0xc030, ID_AA64ISAR1_EL1 = 0xc031,
        ID_AA64MMFR0_EL1 = 0xc038, ID_AA64MMFR1_EL1 = 0xc039, ID_AA64MMFR2_EL1 = 0xc03a,
        SCTLR_EL1 = 0xc080, CPACR_EL1 = 0xc082,
        TTBR0_EL1 = 0xc100, TTBR1_EL1 = 0xc101, TCR_EL1 = 0xc102,
        APIAKEYLO_EL1 = 0xc108, APIAKEYHI_EL1 = 0xc109, APIBKEYLO_EL1 = 0xc10a, APIBKEYHI_EL1 = 0xc10b,
        APDAKEYLO_EL1 = 0xc110, APDAKEYHI_EL1 = 0xc111, APDBKEYLO_EL1 = 0xc112, APDBKEYHI_EL1 = 0xc113,
        APGAKEYLO_EL1 = 0xc118, APGAKEYHI_EL1 = 0xc119,
        SPSR_EL1 = 0xc200, ELR_EL1 = 0xc201, SP_EL0 = 0xc208,
        AFSR0_EL1 = 0xc288, AFSR1_EL1 = 0xc289, ESR_EL1 = 0xc290, FAR_EL1 = 0xc300, PAR_EL1 = 0xc3a0,
        MAIR_EL1 = 0xc510, AMAIR_EL1 = 0xc518, VBAR_EL1 = 0xc600,
        CONTEXTIDR_EL1 = 0xc681, TPIDR_EL1 = 0xc684, CNTKCTL_EL1 = 0xc708, CSSELR_EL1 = 0xd000,
        TPIDR_EL0 = 0xde82, TPIDRRO_EL0 = 0xde83, CNTV_CTL_EL0 = 0xdf19, CNTV_CVAL_EL0 = 0xdf1a,
        SP_EL1 = 0xe208,
    }

    /// DBGBVR0_EL1; those behind it are 8 apart, up to 16. DBGBCR, DBGWVR and DBGWCR follow each by one.
    pub const DBGBVR0_EL1: u16 = 0x8004;
    /// As [`DBGBVR0_EL1`].
    pub const DBGBCR0_EL1: u16 = 0x8005;
    /// As [`DBGBVR0_EL1`].
    pub const DBGWVR0_EL1: u16 = 0x8006;
    /// As [`DBGBVR0_EL1`].
    pub const DBGWCR0_EL1: u16 = 0x8007;

    /// Whether a number is that of a breakpoint's or watchpoint's register.
    #[must_use]
    pub const fn is_debug(number: u16) -> bool {
        number >= 0x8000 && number < 0x8080 && number & 7 >= 4
    }
}

/// Numbers of the GIC (`hv_gic_types.h`): registers are named by their offsets and by the encodings of [`sys_reg`].
#[allow(missing_docs, reason = "each is named as in hv_gic_types.h")]
pub mod gic {
    /// Interrupts that are the framework's, for [`HvfArm64Functions::hv_gic_get_intid`](super::HvfArm64Functions).
    pub const INT_PERFORMANCE_MONITOR: u16 = 23;
    pub const INT_EL1_VIRTUAL_TIMER: u16 = 27;
    pub const INT_EL1_PHYSICAL_TIMER: u16 = 30;

    pub const GICR_ISPENDR0: u32 = 0x1_0200;
    pub const GICR_ICPENDR0: u32 = 0x1_0280;
    pub const GICM_TYPER: u16 = 0x8;
    pub const GICM_SET_SPI_NSR: u16 = 0x40;

    pub const ICC_PMR_EL1: u16 = 0xc230;
    pub const ICC_BPR0_EL1: u16 = 0xc643;
    pub const ICC_AP0R0_EL1: u16 = 0xc644;
    pub const ICC_AP1R0_EL1: u16 = 0xc648;
    pub const ICC_RPR_EL1: u16 = 0xc65b;
    pub const ICC_BPR1_EL1: u16 = 0xc663;
    pub const ICC_CTLR_EL1: u16 = 0xc664;
    pub const ICC_SRE_EL1: u16 = 0xc665;
    pub const ICC_IGRPEN0_EL1: u16 = 0xc666;
    pub const ICC_IGRPEN1_EL1: u16 = 0xc667;

    /// Registers of the CPU interface that can be written, in the order in which they are restored.
    pub const ICC: [u16; 9] = [
        ICC_SRE_EL1,
        ICC_CTLR_EL1,
        ICC_PMR_EL1,
        ICC_BPR0_EL1,
        ICC_BPR1_EL1,
        ICC_AP0R0_EL1,
        ICC_AP1R0_EL1,
        ICC_IGRPEN0_EL1,
        ICC_IGRPEN1_EL1,
    ];
    /// System registers (`hv_sys_reg_t`) that there are with a GIC only: the physical timer's control and compare value.
    pub const CNTP: [u16; 2] = [0xdf11, 0xdf12];
}

/// Memory is mapped in pages of this size.
pub const PAGE_SIZE: u64 = 16 * 1024;

#[cfg(test)]
mod tests {
    use super::*;
    use core::mem::{align_of, offset_of, size_of};

    /// Sizes and offsets as a C compiler for arm64-apple-macos lays out the structures of hv_vcpu_types.h.
    #[test]
    fn structures_are_the_framework_s() {
        assert_eq!((size_of::<VcpuExit>(), align_of::<VcpuExit>()), (32, 8));
        assert_eq!((offset_of!(VcpuExit, reason), offset_of!(VcpuExit, exception)), (0, 8));
        assert_eq!(offset_of!(ExitException, syndrome), 0);
        assert_eq!(offset_of!(ExitException, virtual_address), 8);
        assert_eq!(offset_of!(ExitException, physical_address), 16);
        assert_eq!((size_of::<Vector>(), align_of::<Vector>()), (16, 16));
        assert_eq!((size_of::<Timebase>(), size_of::<SmeState>()), (8, 2));
    }

    /// Values of the SDK's headers.
    #[test]
    fn numbers_are_the_framework_s() {
        assert_eq!((interrupt::IRQ, interrupt::FIQ), (0, 1));
        assert_eq!([reason::CANCELED, reason::EXCEPTION, reason::VTIMER_ACTIVATED, reason::UNKNOWN], [0, 1, 2, 3]);
        assert_eq!([reg::X30, reg::PC, reg::FPCR, reg::FPSR, reg::CPSR], [30, 31, 32, 33, 34]);
    }

    #[test]
    fn numbers_of_system_registers_are_encodings() {
        const fn encoding(op0: u16, op1: u16, crn: u16, crm: u16, op2: u16) -> u16 {
            op0 << 14 | op1 << 11 | crn << 7 | crm << 3 | op2
        }
        // Arm ARM, D19.2 to D19.8.
        for (number, expected) in [
            (sys_reg::MDSCR_EL1, encoding(2, 0, 0, 2, 2)),
            (sys_reg::MPIDR_EL1, encoding(3, 0, 0, 0, 5)),
            (sys_reg::ID_AA64MMFR2_EL1, encoding(3, 0, 0, 7, 2)),
            (sys_reg::APGAKEYHI_EL1, encoding(3, 0, 2, 3, 1)),
            (sys_reg::PAR_EL1, encoding(3, 0, 7, 4, 0)),
            (sys_reg::VBAR_EL1, encoding(3, 0, 12, 0, 0)),
            (sys_reg::CSSELR_EL1, encoding(3, 2, 0, 0, 0)),
            (sys_reg::CNTV_CVAL_EL0, encoding(3, 3, 14, 3, 2)),
            (sys_reg::SP_EL1, encoding(3, 4, 4, 1, 0)),
            (gic::ICC_PMR_EL1, encoding(3, 0, 4, 6, 0)),
            (gic::ICC_AP1R0_EL1, encoding(3, 0, 12, 9, 0)),
            (gic::ICC_IGRPEN1_EL1, encoding(3, 0, 12, 12, 7)),
            (gic::CNTP[1], encoding(3, 3, 14, 2, 2)),
            (sys_reg::DBGWCR0_EL1 + 15 * 8, encoding(2, 0, 0, 15, 7)),
        ] {
            assert_eq!(number, expected);
        }
        assert!(sys_reg::ALL.is_sorted() && !sys_reg::ALL.iter().any(|number| sys_reg::is_debug(*number)));
        assert!(sys_reg::is_debug(sys_reg::DBGBVR0_EL1) && sys_reg::is_debug(0x807f));
    }

    #[test]
    fn the_first_release_is_enough() {
        // SAFETY: the addresses are never called.
        let functions = unsafe {
            HvfArm64Functions::resolve(|name| {
                let name = name.to_str().unwrap();
                if HvfArm64Functions::REQUIRED.contains(&name) { core::ptr::dangling() } else { core::ptr::null() }
            })
        };
        assert!(functions.unwrap().hv_gic_create.is_none());
    }
}
