//! Bit fields of the platform's structures (WinHvPlatformDefs.h). `windows-sys` gives them as raw integers.

use crate::whpx::bits::bits;

bits! {
    /// `WHV_X64_VP_EXECUTION_STATE`: the state of the virtual processor at an exit.
    pub struct ExecutionState(u16) {
        /// Privilege level.
        cpl / with_cpl: 0, 2;
        /// CR0.PE.
        cr0_pe / with_cr0_pe: 2, 1;
        /// CR0.AM.
        cr0_am / with_cr0_am: 3, 1;
        /// EFER.LMA.
        efer_lma / with_efer_lma: 4, 1;
        /// A breakpoint of the debug registers is armed.
        debug_active / with_debug_active: 5, 1;
        /// An event is in delivery (see `PendingInterruption`).
        interruption_pending / with_interruption_pending: 6, 1;
        /// Behind STI or MOV SS: interrupts wait.
        interrupt_shadow / with_interrupt_shadow: 12, 1;
    }

    /// The byte behind the execution state in `WHV_VP_EXIT_CONTEXT`.
    pub struct LengthAndCr8(u8) {
        /// Length of the instruction that left, where the exit's kind tells it.
        instruction_length / with_instruction_length: 0, 4;
        /// CR8.
        cr8 / with_cr8: 4, 4;
    }

    /// `WHV_MEMORY_ACCESS_INFO`.
    pub struct MemoryAccessInfo(u32) {
        /// `WHvMemoryAccessRead`, `Write` or `Execute`.
        access_type / with_access_type: 0, 2;
        /// Nothing is mapped there; otherwise the mapping forbids the access.
        gpa_unmapped / with_gpa_unmapped: 2, 1;
        /// The virtual address is told.
        gva_valid / with_gva_valid: 3, 1;
    }

    /// `WHV_X64_IO_PORT_ACCESS_INFO`.
    pub struct IoAccessInfo(u32) {
        /// OUT or OUTS.
        is_write / with_is_write: 0, 1;
        /// 1, 2 or 4 bytes.
        access_size / with_access_size: 1, 3;
        /// INS or OUTS.
        string_op / with_string_op: 4, 1;
        /// With a REP prefix.
        rep_prefix / with_rep_prefix: 5, 1;
    }

    /// `WHV_X64_MSR_ACCESS_INFO`.
    pub struct MsrAccessInfo(u32) {
        /// WRMSR.
        is_write / with_is_write: 0, 1;
    }

    /// `WHV_VP_EXCEPTION_INFO`.
    pub struct ExceptionInfo(u32) {
        /// The exception has an error code.
        error_code_valid / with_error_code_valid: 0, 1;
        /// Raised by INT3, INTO or INT1, not by a fault.
        software_exception / with_software_exception: 1, 1;
    }

    /// `WHV_EXTENDED_VM_EXITS`: which further exits a partition takes, and which there are.
    pub struct ExtendedVmExits(u64) {
        /// CPUID of the leaves in the exit list.
        x64_cpuid_exit / with_x64_cpuid_exit: 0, 1;
        /// RDMSR and WRMSR of MSRs in the exit bitmap.
        x64_msr_exit / with_x64_msr_exit: 1, 1;
        /// Exceptions in the exit bitmap.
        exception_exit / with_exception_exit: 2, 1;
        /// RDTSC and RDTSCP.
        x64_rdtsc_exit / with_x64_rdtsc_exit: 3, 1;
        /// A guest's APIC sends an SMI.
        x64_apic_smi_exit_trap / with_x64_apic_smi_exit_trap: 4, 1;
        /// Hypercalls.
        hypercall_exit / with_hypercall_exit: 10, 1;
        /// A guest's APIC sends INIT or SIPI.
        x64_apic_init_sipi_exit_trap / with_x64_apic_init_sipi_exit_trap: 11, 1;
    }

    /// `WHV_X64_MSR_EXIT_BITMAP`: which MSR accesses leave.
    pub struct MsrExitBitmap(u64) {
        /// Those that the hypervisor does not know.
        unhandled_msrs / with_unhandled_msrs: 0, 1;
        /// WRMSR of IA32_TIME_STAMP_COUNTER.
        tsc_msr_write / with_tsc_msr_write: 1, 1;
        /// RDMSR of IA32_TIME_STAMP_COUNTER.
        tsc_msr_read / with_tsc_msr_read: 2, 1;
        /// WRMSR of IA32_APIC_BASE.
        apic_base_msr_write / with_apic_base_msr_write: 3, 1;
    }

    /// `WHV_CAPABILITY_FEATURES`.
    pub struct Features(u64) {
        /// Parts of a mapping can be unmapped.
        partial_unmap / with_partial_unmap: 0, 1;
        /// The platform emulates local APICs.
        local_apic_emulation / with_local_apic_emulation: 1, 1;
        /// Extended state can be used and moved.
        xsave / with_xsave: 2, 1;
        /// Dirty bitmaps.
        dirty_page_tracking / with_dirty_page_tracking: 5, 1;
        /// Speculation control MSRs.
        speculation_control / with_speculation_control: 6, 1;
        /// Remote reads between APICs.
        apic_remote_read / with_apic_remote_read: 7, 1;
        /// The idle state can be entered by the guest.
        idle_suspend / with_idle_suspend: 9, 1;
    }

    /// `WHV_X64_INTERRUPT_STATE_REGISTER`.
    pub struct InterruptState(u64) {
        /// Behind STI or MOV SS.
        interrupt_shadow / with_interrupt_shadow: 0, 1;
        /// Between an NMI and the next IRET.
        nmi_masked / with_nmi_masked: 1, 1;
    }

    /// `WHV_X64_PENDING_INTERRUPTION_REGISTER`: the event that is delivered at the next entry.
    pub struct PendingInterruption(u64) {
        /// There is one.
        pending / with_pending: 0, 1;
        /// `WHvX64PendingInterrupt`, `Nmi` or `Exception`.
        kind / with_kind: 1, 3;
        /// Push the error code.
        deliver_error_code / with_deliver_error_code: 4, 1;
        /// Length of the instruction, for software events.
        instruction_length / with_instruction_length: 5, 4;
        /// The vector.
        vector / with_vector: 16, 16;
        /// The error code.
        error_code / with_error_code: 32, 32;
    }

    /// The first 64 bits of `WHV_X64_PENDING_EXCEPTION_EVENT` (register `WHvRegisterPendingEvent`).
    pub struct PendingException(u64) {
        /// There is one.
        pending / with_pending: 0, 1;
        /// `WHvX64PendingEventException`.
        kind / with_kind: 1, 3;
        /// Push the error code.
        deliver_error_code / with_deliver_error_code: 8, 1;
        /// The vector.
        vector / with_vector: 16, 16;
        /// The error code.
        error_code / with_error_code: 32, 32;
    }

    /// The first 64 bits of `WHV_X64_PENDING_EXT_INT_EVENT` (register `WHvRegisterPendingEvent`).
    pub struct PendingExtInt(u64) {
        /// There is one.
        pending / with_pending: 0, 1;
        /// `WHvX64PendingEventExtInt`.
        kind / with_kind: 1, 3;
        /// The vector.
        vector / with_vector: 8, 8;
    }

    /// `WHV_X64_DELIVERABILITY_NOTIFICATIONS_REGISTER`: asks for one exit when an event can be delivered.
    pub struct Deliverability(u64) {
        /// When an NMI can.
        nmi / with_nmi: 0, 1;
        /// When an external interrupt can.
        interrupt / with_interrupt: 1, 1;
        /// Of at least this priority class; 0 for any.
        interrupt_priority / with_interrupt_priority: 2, 4;
    }

    /// `WHV_INTERNAL_ACTIVITY_REGISTER`: why a virtual processor does not run.
    pub struct InternalActivity(u64) {
        /// It waits for a SIPI.
        startup_suspend / with_startup_suspend: 0, 1;
        /// It halted.
        halt_suspend / with_halt_suspend: 1, 1;
        /// It idles.
        idle_suspend / with_idle_suspend: 2, 1;
    }

    /// `WHV_X64_PENDING_DEBUG_EXCEPTION`.
    pub struct PendingDebug(u64) {
        /// Breakpoints of DR0 to DR3 that were hit.
        breakpoints / with_breakpoints: 0, 4;
        /// A single step was done.
        single_step / with_single_step: 4, 1;
    }

    /// The bit field of `WHV_INTERRUPT_CONTROL`.
    pub struct InterruptKind(u64) {
        /// `WHvX64InterruptType...`.
        kind / with_kind: 0, 8;
        /// `WHvX64InterruptDestinationMode...`.
        destination_mode / with_destination_mode: 8, 4;
        /// `WHvX64InterruptTriggerMode...`.
        trigger_mode / with_trigger_mode: 12, 4;
    }

    /// The bit field of `WHV_DOORBELL_MATCH_DATA`.
    pub struct DoorbellMatch(u32) {
        /// Only this value matches.
        match_on_value / with_match_on_value: 0, 1;
        /// Only this length matches.
        match_on_length / with_match_on_length: 1, 1;
    }

    /// The bit field of `WHV_X64_FP_REGISTER` behind the mantissa.
    pub struct FpExponent(u64) {
        /// The biased exponent.
        biased_exponent / with_biased_exponent: 0, 15;
        /// The sign.
        sign / with_sign: 15, 1;
    }
}
