//! What peculiar hosts provably cannot do although they claim to. Nothing else is ever skipped for being red.
//!
//! Hosts that interpret guest ring 0 show only the behaviour of the kernel's instruction emulator there, and of their own
//! switch between rings; capabilities do not reveal that, so it was found by trying, once per line. On a CPU that QEMU
//! emulates the kernel's KVM is the real one, but the debug facilities below it are not.

use crate::harness::{Exception, When};

const fn interpreted(case: &'static str, reason: &'static str) -> Exception {
    Exception { when: When::InterpretedRing0, case, reason }
}

const fn emulated(case: &'static str, reason: &'static str) -> Exception {
    Exception { when: When::EmulatedCpu, case, reason }
}

const ENDS_EARLY: &str = "the local APIC forgets that a vector is in service when it is delivered";
const NO_PAGING: &str = "no 32-bit paging: the guest dies when it sets CR0.PG";

pub(crate) const TABLE: &[Exception] = &[
    interpreted("modes::paging_32_bit", NO_PAGING),
    interpreted("modes::paging_pae", NO_PAGING),
    interpreted("modes::ring3_software_interrupt", "INT n in ring 3 raises #UD"),
    interpreted("modes::ring3_system_call", "SYSCALL arrives at its entry point still in ring 3"),
    interpreted("modes::hypercall", "VMCALL in ring 0 never ends"),
    interpreted("interrupts::irqfd_resamples_not_before_the_end", ENDS_EARLY),
    // 3 of 400 times on a host with other load: the end is reported before the handler has run.
    interpreted("interrupts::split_reports_end_of_interrupt", ENDS_EARLY),
    interpreted("registers::tsc_can_be_set", "setting the TSC is accepted and has no effect"),
    interpreted("debug::watchpoint_ring0", "the emulator does not look at data breakpoints"),
    interpreted("debug::software_breakpoint_ring0", "the emulator cannot execute INT3"),
    emulated("debug::hardware_breakpoint_ring0", "QEMU before 10.0 does not intercept #DB for its nested guests"),
    emulated("debug::watchpoint_ring0", "QEMU before 10.0 does not intercept #DB for its nested guests"),
    emulated("debug::software_breakpoint_ring0", "QEMU reports INT3 to the nested hypervisor as a software interrupt"),
    emulated("arm64_access::read_extends", "QEMU 7.2 leaves the sign extension out of the syndrome"),
];

const fn anywhere(case: &'static str, reason: &'static str) -> Exception {
    Exception { when: When::Anywhere, case, reason }
}

const CONCURRENT: &str = "another thread writes to the guest's memory";
const REMAPPED: &str = "memory goes away on the two hosts at two moments, and the guest runs between them";
const UNSTEPPED: &str = "KVM runs the guest's ring 3 without single steps";

const LOST: &str = "a HLT that the guest comes back to by IRET is stepped over without an exit";

/// Cases whose guests cannot be followed step for step.
pub(crate) const LOCKSTEP: &[Exception] = &[
    anywhere("memory::map_while_running", CONCURRENT),
    anywhere("memory::unmap_while_running", REMAPPED),
    anywhere("memory::guest_and_host_share_atomics", CONCURRENT),
    anywhere("memory::too_many_mappings_are_refused", "the software CPU and KVM run out of slots at different moments"),
    anywhere("modes::divide_error", "changes the guest's stack in the middle of an OUT"),
    anywhere("modes::ring3_page_fault_is_fixed_up", "changes the page tables in the middle of an OUT"),
    anywhere(
        "registers::exception_is_injected",
        "KVM pushes an injected fault's flags as they are, the software CPU with RF",
    ),
    emulated("modes::paging_pae", "QEMU sets the accessed bit of page-directory-pointer entries, which have none"),
    anywhere("registers::tsc_runs_forward", "time goes on meanwhile"),
    anywhere("registers::tsc_can_be_set", "time goes on meanwhile"),
    anywhere("modes::hypercall", "KVM answers calls of its own interface itself"),
    interpreted("mmio::from_ring3", UNSTEPPED),
    interpreted("modes::ring3_undefined_instruction", UNSTEPPED),
    interpreted("modes::ring3_software_interrupt", UNSTEPPED),
    interpreted("modes::ring3_system_call", UNSTEPPED),
    interpreted("registers::fpu_seen_by_guest", UNSTEPPED),
    interpreted("registers::fpu_changed_by_guest", UNSTEPPED),
    interpreted("modes::paging_32_bit", NO_PAGING),
    interpreted("modes::paging_pae", NO_PAGING),
    interpreted("registers::interrupt_in_delivery_is_injected", LOST),
];
