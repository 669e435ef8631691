//! Hypervisor.framework on Intel Macs: a thin door to VMX. There is no exit structure: the VMM reads the VMCS.
//!
//! Signatures and versions are those of Apple's Hypervisor/hv.h and hv_vmx.h; field encodings, exit reasons and control bits are
//! the processor's (Intel SDM vol. 3, appendices B and C, chapters 25 to 28). Everything per vCPU must be called by the
//! thread that created it, except [`HvfX86Api::hv_vcpu_interrupt`].

use super::HvReturn;
use core::ffi::c_void;

/// The library's name.
pub const LIBRARY: &str = "Hypervisor.framework";

crate::ffi_table! {
    /// The functions of Hypervisor.framework on x86-64 that have a use here. Required are those of its first release (macOS
    /// 10.10); the optional ones came with the version that is named above them.
    pub struct HvfX86Api: extern "C" {
        req {
            fn hv_vm_create(flags: u64) -> HvReturn;
            fn hv_vm_destroy() -> HvReturn;
            fn hv_vm_map(uva: *const c_void, gpa: u64, size: usize, flags: u64) -> HvReturn;
            fn hv_vm_unmap(gpa: u64, size: usize) -> HvReturn;
            fn hv_vm_protect(gpa: u64, size: usize, flags: u64) -> HvReturn;
            fn hv_vm_sync_tsc(tsc: u64) -> HvReturn;
            fn hv_vcpu_create(vcpu: *mut u32, flags: u64) -> HvReturn;
            fn hv_vcpu_destroy(vcpu: u32) -> HvReturn;
            fn hv_vcpu_read_register(vcpu: u32, reg: u32, value: *mut u64) -> HvReturn;
            fn hv_vcpu_write_register(vcpu: u32, reg: u32, value: u64) -> HvReturn;
            fn hv_vcpu_read_fpstate(vcpu: u32, buffer: *mut c_void, size: usize) -> HvReturn;
            fn hv_vcpu_write_fpstate(vcpu: u32, buffer: *const c_void, size: usize) -> HvReturn;
            fn hv_vcpu_enable_native_msr(vcpu: u32, msr: u32, enable: bool) -> HvReturn;
            fn hv_vcpu_read_msr(vcpu: u32, msr: u32, value: *mut u64) -> HvReturn;
            fn hv_vcpu_write_msr(vcpu: u32, msr: u32, value: u64) -> HvReturn;
            fn hv_vcpu_invalidate_tlb(vcpu: u32) -> HvReturn;
            fn hv_vcpu_run(vcpu: u32) -> HvReturn;
            fn hv_vcpu_interrupt(vcpus: *mut u32, count: u32) -> HvReturn;
            fn hv_vcpu_get_exec_time(vcpu: u32, nanoseconds: *mut u64) -> HvReturn;
            fn hv_vmx_vcpu_read_vmcs(vcpu: u32, field: u32, value: *mut u64) -> HvReturn;
            fn hv_vmx_vcpu_write_vmcs(vcpu: u32, field: u32, value: u64) -> HvReturn;
            fn hv_vmx_read_capability(capability: u32, value: *mut u64) -> HvReturn;
            fn hv_vmx_vcpu_set_apic_address(vcpu: u32, gpa: u64) -> HvReturn;
        }
        opt {
            // 10.15
            fn hv_capability(capability: u64, value: *mut u64) -> HvReturn;
            fn hv_vm_space_create(space: *mut u32) -> HvReturn;
            fn hv_vm_space_destroy(space: u32) -> HvReturn;
            fn hv_vm_map_space(space: u32, uva: *const c_void, gpa: u64, size: usize, flags: u64) -> HvReturn;
            fn hv_vm_unmap_space(space: u32, gpa: u64, size: usize) -> HvReturn;
            fn hv_vm_protect_space(space: u32, gpa: u64, size: usize, flags: u64) -> HvReturn;
            fn hv_vcpu_set_space(vcpu: u32, space: u32) -> HvReturn;
            fn hv_vcpu_run_until(vcpu: u32, deadline: u64) -> HvReturn;
            // 11
            fn hv_tsc_clock() -> u64;
            fn hv_vcpu_set_tsc_relative(vcpu: u32, offset: i64) -> HvReturn;
            fn hv_vcpu_enable_managed_msr(vcpu: u32, msr: u32, enable: bool) -> HvReturn;
            fn hv_vcpu_set_msr_access(vcpu: u32, msr: u32, flags: u32) -> HvReturn;
            fn hv_vmx_get_msr_info(info: u64, value: *mut u64) -> HvReturn;
            fn hv_vmx_vcpu_get_cap_write_vmcs(vcpu: u32, field: u32, allowed_0: *mut u64, allowed_1: *mut u64) -> HvReturn;
            // 12
            fn hv_vcpu_get_idle_time(vcpu: u32, nanoseconds: *mut u64) -> HvReturn;
            fn hv_vcpu_vmx_status(vcpu: u32, status: *mut u32) -> HvReturn;
            fn hv_vm_lapic_set_intr(vcpu: u32, vector: u8, trigger: u32) -> HvReturn;
            fn hv_vm_lapic_msi(address: u64, data: u64) -> HvReturn;
            fn hv_vm_ioapic_assert_irq(pin: i32) -> HvReturn;
            fn hv_vm_ioapic_deassert_irq(pin: i32) -> HvReturn;
            fn hv_vm_ioapic_pulse_irq(pin: i32) -> HvReturn;
            fn hv_vm_ioapic_read(gpa: u64, data: *mut u32) -> HvReturn;
            fn hv_vm_ioapic_write(gpa: u64, data: u32) -> HvReturn;
            fn hv_vm_send_ioapic_intr(data: u64) -> HvReturn;
            fn hv_vm_set_apic_bus_freq(hz: u64) -> HvReturn;
            fn hv_vcpu_apic_read(vcpu: u32, offset: u32, data: *mut u32) -> HvReturn;
            fn hv_vcpu_apic_write(vcpu: u32, offset: u32, data: u32, no_side_effect: *mut bool) -> HvReturn;
            fn hv_vcpu_apic_ctrl(vcpu: u32, controls: u64) -> HvReturn;
            fn hv_vcpu_exit_info(vcpu: u32, code: *mut u32) -> HvReturn;
            fn hv_vcpu_exit_ioapic_eoi(vcpu: u32, vector: *mut u8) -> HvReturn;
        }
    }
}

#[cfg(all(target_os = "macos", target_arch = "x86_64"))]
mod system;

/// The deadline of [`HvfX86Api::hv_vcpu_run_until`] that never comes (`HV_DEADLINE_FOREVER`).
pub const DEADLINE_FOREVER: u64 = u64::MAX;

/// What [`HvfX86Api::hv_capability`] tells (`hv_capability_t`).
#[allow(missing_docs, reason = "each is named as in hv_types.h")]
pub mod capability {
    pub const VCPU_MAX: u64 = 0;
    pub const ADDRESS_SPACE_MAX: u64 = 1;
}

/// What [`HvfX86Api::hv_vmx_read_capability`] tells (`hv_vmx_capability_t`). Of the controls: low half the bits that must be 1, high
/// half those that may be 1.
#[allow(missing_docs, reason = "each is named as in hv_vmx.h")]
pub mod vmx_capability {
    pub const PINBASED: u32 = 0;
    pub const PROCBASED: u32 = 1;
    pub const PROCBASED2: u32 = 2;
    pub const ENTRY: u32 = 3;
    pub const EXIT: u32 = 4;
    pub const BASIC: u32 = 5;
    pub const TRUE_PINBASED: u32 = 6;
    pub const TRUE_PROCBASED: u32 = 7;
    pub const TRUE_ENTRY: u32 = 8;
    pub const TRUE_EXIT: u32 = 9;
    pub const MISC: u32 = 10;
    pub const CR0_FIXED0: u32 = 11;
    pub const CR0_FIXED1: u32 = 12;
    pub const CR4_FIXED0: u32 = 13;
    pub const CR4_FIXED1: u32 = 14;
    pub const VMCS_ENUM: u32 = 15;
    pub const EPT_VPID: u32 = 16;
    pub const PREEMPTION_TIMER: u32 = 32;
}

/// Registers (`hv_x86_reg_t`).
#[allow(missing_docs, reason = "each is named as in hv_arch_x86.h")]
pub mod reg {
    pub const RIP: u32 = 0;
    pub const RFLAGS: u32 = 1;
    pub const RAX: u32 = 2;
    pub const RCX: u32 = 3;
    pub const RDX: u32 = 4;
    pub const RBX: u32 = 5;
    pub const RSI: u32 = 6;
    pub const RDI: u32 = 7;
    pub const RSP: u32 = 8;
    pub const RBP: u32 = 9;
    pub const R8: u32 = 10;
    pub const R9: u32 = 11;
    pub const R10: u32 = 12;
    pub const R11: u32 = 13;
    pub const R12: u32 = 14;
    pub const R13: u32 = 15;
    pub const R14: u32 = 16;
    pub const R15: u32 = 17;
    pub const CS: u32 = 18;
    pub const SS: u32 = 19;
    pub const DS: u32 = 20;
    pub const ES: u32 = 21;
    pub const FS: u32 = 22;
    pub const GS: u32 = 23;
    pub const IDT_BASE: u32 = 24;
    pub const IDT_LIMIT: u32 = 25;
    pub const GDT_BASE: u32 = 26;
    pub const GDT_LIMIT: u32 = 27;
    pub const LDTR: u32 = 28;
    pub const LDT_BASE: u32 = 29;
    pub const LDT_LIMIT: u32 = 30;
    pub const LDT_AR: u32 = 31;
    pub const TR: u32 = 32;
    pub const TSS_BASE: u32 = 33;
    pub const TSS_LIMIT: u32 = 34;
    pub const TSS_AR: u32 = 35;
    pub const CR0: u32 = 36;
    pub const CR1: u32 = 37;
    pub const CR2: u32 = 38;
    pub const CR3: u32 = 39;
    pub const CR4: u32 = 40;
    pub const DR0: u32 = 41;
    pub const DR1: u32 = 42;
    pub const DR2: u32 = 43;
    pub const DR3: u32 = 44;
    pub const DR4: u32 = 45;
    pub const DR5: u32 = 46;
    pub const DR6: u32 = 47;
    pub const DR7: u32 = 48;
    pub const TPR: u32 = 49;
    pub const XCR0: u32 = 50;
    /// One more than the last.
    pub const MAX: u32 = 51;
}

/// VMCS fields. Their values move as `u64` whatever their width is.
#[allow(missing_docs, reason = "each is named nearly as in Intel SDM vol. 3, appendix B")]
pub mod vmcs {
    pub const GUEST_ES: u32 = 0x0800;
    pub const GUEST_CS: u32 = 0x0802;
    pub const GUEST_SS: u32 = 0x0804;
    pub const GUEST_DS: u32 = 0x0806;
    pub const GUEST_FS: u32 = 0x0808;
    pub const GUEST_GS: u32 = 0x080a;
    pub const GUEST_LDTR: u32 = 0x080c;
    pub const GUEST_TR: u32 = 0x080e;
    pub const TSC_OFFSET: u32 = 0x2010;
    pub const GUEST_PHYSICAL_ADDRESS: u32 = 0x2400;
    pub const GUEST_LINK_POINTER: u32 = 0x2800;
    pub const GUEST_DEBUGCTL: u32 = 0x2802;
    pub const GUEST_PAT: u32 = 0x2804;
    pub const GUEST_EFER: u32 = 0x2806;
    pub const GUEST_PDPTE0: u32 = 0x280a;
    pub const GUEST_PDPTE1: u32 = 0x280c;
    pub const GUEST_PDPTE2: u32 = 0x280e;
    pub const GUEST_PDPTE3: u32 = 0x2810;
    pub const PIN_BASED: u32 = 0x4000;
    pub const CPU_BASED: u32 = 0x4002;
    pub const EXCEPTION_BITMAP: u32 = 0x4004;
    pub const VMEXIT_CONTROLS: u32 = 0x400c;
    pub const VMENTRY_CONTROLS: u32 = 0x4012;
    /// The event that the next entry injects; cleared by that entry.
    pub const VMENTRY_IRQ_INFO: u32 = 0x4016;
    pub const VMENTRY_EXC_ERROR: u32 = 0x4018;
    pub const VMENTRY_INSTR_LEN: u32 = 0x401a;
    pub const TPR_THRESHOLD: u32 = 0x401c;
    pub const CPU_BASED2: u32 = 0x401e;
    pub const INSTR_ERROR: u32 = 0x4400;
    pub const EXIT_REASON: u32 = 0x4402;
    pub const VMEXIT_IRQ_INFO: u32 = 0x4404;
    pub const VMEXIT_IRQ_ERROR: u32 = 0x4406;
    /// The event that was being delivered when the guest exited, and was not.
    pub const IDT_VECTOR_INFO: u32 = 0x4408;
    pub const IDT_VECTOR_ERROR: u32 = 0x440a;
    /// Undefined for EPT violations.
    pub const VMEXIT_INSTR_LEN: u32 = 0x440c;
    pub const INSTR_INFO: u32 = 0x440e;
    pub const GUEST_ES_LIMIT: u32 = 0x4800;
    pub const GUEST_CS_LIMIT: u32 = 0x4802;
    pub const GUEST_SS_LIMIT: u32 = 0x4804;
    pub const GUEST_DS_LIMIT: u32 = 0x4806;
    pub const GUEST_FS_LIMIT: u32 = 0x4808;
    pub const GUEST_GS_LIMIT: u32 = 0x480a;
    pub const GUEST_LDTR_LIMIT: u32 = 0x480c;
    pub const GUEST_TR_LIMIT: u32 = 0x480e;
    pub const GUEST_GDTR_LIMIT: u32 = 0x4810;
    pub const GUEST_IDTR_LIMIT: u32 = 0x4812;
    pub const GUEST_ES_AR: u32 = 0x4814;
    pub const GUEST_CS_AR: u32 = 0x4816;
    pub const GUEST_SS_AR: u32 = 0x4818;
    pub const GUEST_DS_AR: u32 = 0x481a;
    pub const GUEST_FS_AR: u32 = 0x481c;
    pub const GUEST_GS_AR: u32 = 0x481e;
    pub const GUEST_LDTR_AR: u32 = 0x4820;
    pub const GUEST_TR_AR: u32 = 0x4822;
    pub const GUEST_INTERRUPTIBILITY: u32 = 0x4824;
    pub const GUEST_ACTIVITY_STATE: u32 = 0x4826;
    pub const GUEST_SYSENTER_CS: u32 = 0x482a;
    pub const CR0_MASK: u32 = 0x6000;
    pub const CR4_MASK: u32 = 0x6002;
    pub const CR0_SHADOW: u32 = 0x6004;
    pub const CR4_SHADOW: u32 = 0x6006;
    pub const EXIT_QUALIFICATION: u32 = 0x6400;
    pub const GUEST_LINEAR_ADDRESS: u32 = 0x640a;
    pub const GUEST_CR0: u32 = 0x6800;
    pub const GUEST_CR3: u32 = 0x6802;
    pub const GUEST_CR4: u32 = 0x6804;
    pub const GUEST_ES_BASE: u32 = 0x6806;
    pub const GUEST_CS_BASE: u32 = 0x6808;
    pub const GUEST_SS_BASE: u32 = 0x680a;
    pub const GUEST_DS_BASE: u32 = 0x680c;
    pub const GUEST_FS_BASE: u32 = 0x680e;
    pub const GUEST_GS_BASE: u32 = 0x6810;
    pub const GUEST_LDTR_BASE: u32 = 0x6812;
    pub const GUEST_TR_BASE: u32 = 0x6814;
    pub const GUEST_GDTR_BASE: u32 = 0x6816;
    pub const GUEST_IDTR_BASE: u32 = 0x6818;
    pub const GUEST_DR7: u32 = 0x681a;
    pub const GUEST_RSP: u32 = 0x681c;
    pub const GUEST_RIP: u32 = 0x681e;
    pub const GUEST_RFLAGS: u32 = 0x6820;
    pub const GUEST_PENDING_DEBUG: u32 = 0x6822;
    pub const GUEST_SYSENTER_ESP: u32 = 0x6824;
    pub const GUEST_SYSENTER_EIP: u32 = 0x6826;
    /// One more than the last field (`VMCS_MAX`).
    pub const MAX: u32 = 0x6d00;
}

/// Basic exit reasons (Intel SDM vol. 3, appendix C): the low 16 bits of [`vmcs::EXIT_REASON`].
#[allow(missing_docs, reason = "each is named nearly as in hv_arch_vmx.h")]
pub mod exit {
    pub const EXCEPTION_NMI: u32 = 0;
    pub const IRQ: u32 = 1;
    pub const TRIPLE_FAULT: u32 = 2;
    pub const INIT: u32 = 3;
    pub const SIPI: u32 = 4;
    pub const IRQ_WINDOW: u32 = 7;
    pub const NMI_WINDOW: u32 = 8;
    pub const TASK: u32 = 9;
    pub const CPUID: u32 = 10;
    pub const HLT: u32 = 12;
    pub const INVD: u32 = 13;
    pub const RDPMC: u32 = 15;
    pub const RDTSC: u32 = 16;
    pub const VMCALL: u32 = 18;
    pub const MOV_CR: u32 = 28;
    pub const MOV_DR: u32 = 29;
    pub const IO: u32 = 30;
    pub const RDMSR: u32 = 31;
    pub const WRMSR: u32 = 32;
    /// Entry failure: the guest state is not valid.
    pub const ENTRY_GUEST: u32 = 33;
    /// Entry failure while MSRs were loaded.
    pub const ENTRY_MSR: u32 = 34;
    pub const MWAIT: u32 = 36;
    pub const MONITOR_TRAP: u32 = 37;
    pub const MONITOR: u32 = 39;
    pub const PAUSE: u32 = 40;
    pub const TPR_THRESHOLD: u32 = 43;
    pub const APIC_ACCESS: u32 = 44;
    pub const EPT_VIOLATION: u32 = 48;
    pub const EPT_MISCONFIG: u32 = 49;
    pub const RDTSCP: u32 = 51;
    pub const VMX_TIMER: u32 = 52;
    pub const WBINVD: u32 = 54;
    pub const XSETBV: u32 = 55;
    /// Bit of [`super::vmcs::EXIT_REASON`]: the guest was not entered.
    pub const ENTRY_FAILED: u32 = 1 << 31;
}

/// Bits of [`vmcs::PIN_BASED`].
#[allow(missing_docs, reason = "each is named as in Intel SDM vol. 3, 25.6.1")]
pub mod pin_based {
    pub const EXTERNAL_INTERRUPT: u32 = 1 << 0;
    pub const NMI: u32 = 1 << 3;
    pub const VIRTUAL_NMI: u32 = 1 << 5;
    pub const PREEMPTION_TIMER: u32 = 1 << 6;
}

/// Bits of [`vmcs::CPU_BASED`].
#[allow(missing_docs, reason = "each is named as in Intel SDM vol. 3, 25.6.2")]
pub mod cpu_based {
    pub const IRQ_WINDOW: u32 = 1 << 2;
    pub const TSC_OFFSET: u32 = 1 << 3;
    pub const HLT: u32 = 1 << 7;
    pub const MWAIT: u32 = 1 << 10;
    pub const RDPMC: u32 = 1 << 11;
    pub const RDTSC: u32 = 1 << 12;
    pub const CR3_LOAD: u32 = 1 << 15;
    pub const CR3_STORE: u32 = 1 << 16;
    pub const CR8_LOAD: u32 = 1 << 19;
    pub const CR8_STORE: u32 = 1 << 20;
    pub const TPR_SHADOW: u32 = 1 << 21;
    pub const NMI_WINDOW: u32 = 1 << 22;
    pub const MOV_DR: u32 = 1 << 23;
    pub const UNCONDITIONAL_IO: u32 = 1 << 24;
    pub const IO_BITMAPS: u32 = 1 << 25;
    pub const MONITOR_TRAP: u32 = 1 << 27;
    pub const MSR_BITMAPS: u32 = 1 << 28;
    pub const MONITOR: u32 = 1 << 29;
    pub const PAUSE: u32 = 1 << 30;
    pub const SECONDARY: u32 = 1 << 31;
}

/// Bits of [`vmcs::CPU_BASED2`].
#[allow(missing_docs, reason = "each is named as in Intel SDM vol. 3, 25.6.2")]
pub mod cpu_based2 {
    pub const VIRTUAL_APIC: u32 = 1 << 0;
    pub const EPT: u32 = 1 << 1;
    pub const RDTSCP: u32 = 1 << 3;
    pub const VPID: u32 = 1 << 5;
    pub const WBINVD: u32 = 1 << 6;
    pub const UNRESTRICTED: u32 = 1 << 7;
    pub const INVPCID: u32 = 1 << 12;
    pub const XSAVES: u32 = 1 << 20;
}

/// Bits of [`vmcs::VMENTRY_CONTROLS`].
#[allow(missing_docs, reason = "each is named as in Intel SDM vol. 3, 25.8.1")]
pub mod entry_controls {
    pub const LOAD_DEBUG: u32 = 1 << 2;
    pub const GUEST_IA32E: u32 = 1 << 9;
    pub const LOAD_PAT: u32 = 1 << 14;
    pub const LOAD_EFER: u32 = 1 << 15;
}

/// Bits of [`vmcs::VMEXIT_CONTROLS`].
#[allow(missing_docs, reason = "each is named as in Intel SDM vol. 3, 25.7.1")]
pub mod exit_controls {
    pub const SAVE_DEBUG: u32 = 1 << 2;
    pub const HOST_IA32E: u32 = 1 << 9;
    pub const ACKNOWLEDGE_INTERRUPT: u32 = 1 << 15;
    pub const SAVE_PAT: u32 = 1 << 18;
    pub const LOAD_PAT: u32 = 1 << 19;
    pub const SAVE_EFER: u32 = 1 << 20;
    pub const LOAD_EFER: u32 = 1 << 21;
}

/// The format of [`vmcs::VMENTRY_IRQ_INFO`], [`vmcs::VMEXIT_IRQ_INFO`] and [`vmcs::IDT_VECTOR_INFO`] (Intel SDM vol. 3, 25.8.3 and
/// 25.9.2): vector in bits 0 to 7, type in bits 8 to 10, and these.
pub mod irq_info {
    /// Vector.
    pub const VECTOR: u32 = 0xff;
    /// Mask of the type.
    pub const TYPE: u32 = 7 << 8;
    /// External interrupt.
    pub const EXTERNAL: u32 = 0;
    /// Non-maskable interrupt.
    pub const NMI: u32 = 2 << 8;
    /// Exception by hardware.
    pub const HARD_EXCEPTION: u32 = 3 << 8;
    /// INT n.
    pub const SOFT_INTERRUPT: u32 = 4 << 8;
    /// INT1.
    pub const PRIVILEGED_SOFT_EXCEPTION: u32 = 5 << 8;
    /// INT3, INTO.
    pub const SOFT_EXCEPTION: u32 = 6 << 8;
    /// There is an error code.
    pub const ERROR_VALID: u32 = 1 << 11;
    /// The rest means something.
    pub const VALID: u32 = 1 << 31;
}

/// Bits of [`vmcs::GUEST_INTERRUPTIBILITY`] (Intel SDM vol. 3, 25.4.2).
#[allow(missing_docs, reason = "each is named as in the manual")]
pub mod interruptibility {
    pub const STI: u64 = 1 << 0;
    pub const MOV_SS: u64 = 1 << 1;
    pub const SMI: u64 = 1 << 2;
    pub const NMI: u64 = 1 << 3;
}

/// Bits of the exit qualification of [`exit::EPT_VIOLATION`] (Intel SDM vol. 3, 28.2.1).
#[allow(missing_docs, reason = "each is named for what the access was")]
pub mod ept_violation {
    pub const READ: u64 = 1 << 0;
    pub const WRITE: u64 = 1 << 1;
    pub const FETCH: u64 = 1 << 2;
    /// What the tables allow at the address: read, write, fetch.
    pub const ALLOWED_SHIFT: u32 = 3;
    /// The linear address is told.
    pub const LINEAR_VALID: u64 = 1 << 7;
    /// The access was to the translation of the linear address, not to a page table on the way.
    pub const FINAL: u64 = 1 << 8;
}

/// A segment cannot be used: bit of the access-rights fields (Intel SDM vol. 3, 25.4.1).
pub const SEGMENT_UNUSABLE: u64 = 1 << 16;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_release_is_enough() {
        // SAFETY: the addresses are never called.
        let api = unsafe {
            HvfX86Api::resolve(|name| {
                let name = name.to_str().unwrap();
                if HvfX86Api::REQUIRED.contains(&name) { core::ptr::dangling() } else { core::ptr::null() }
            })
        };
        assert!(api.unwrap().hv_vcpu_run_until.is_none());
    }

    #[test]
    fn an_absent_function_has_a_name() {
        // SAFETY: the addresses are never called.
        let api = unsafe {
            HvfX86Api::resolve(|name| if name == c"hv_vcpu_run" { core::ptr::null() } else { core::ptr::dangling() })
        };
        assert_eq!(api.unwrap_err(), "hv_vcpu_run");
    }

    #[test]
    fn field_encodings_keep_the_manual_s_rule() {
        // Intel SDM vol. 3, 25.11.2: bits 14:13 are the width, 11:10 the type, bit 0 is clear for whole fields.
        let width = |field: u32| field >> 13 & 3;
        let kind = |field: u32| field >> 10 & 3;
        for (field, w, k) in [
            (vmcs::GUEST_TR, 0, 2),
            (vmcs::GUEST_EFER, 1, 2),
            (vmcs::GUEST_PHYSICAL_ADDRESS, 1, 1),
            (vmcs::CPU_BASED2, 2, 0),
            (vmcs::EXIT_REASON, 2, 1),
            (vmcs::GUEST_INTERRUPTIBILITY, 2, 2),
            (vmcs::CR4_SHADOW, 3, 0),
            (vmcs::EXIT_QUALIFICATION, 3, 1),
            (vmcs::GUEST_RIP, 3, 2),
        ] {
            assert_eq!((width(field), kind(field), field & 1), (w, k, 0), "{field:#x}");
        }
    }
}
