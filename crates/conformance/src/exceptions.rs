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

pub(crate) const TABLE: &[Exception] = &[
    interpreted("modes::paging_32_bit", "no 32-bit paging: the guest dies when it sets CR0.PG"),
    interpreted("modes::paging_pae", "no 32-bit paging: the guest dies when it sets CR0.PG"),
    interpreted("modes::ring3_software_interrupt", "INT n in ring 3 raises #UD"),
    interpreted("modes::ring3_system_call", "SYSCALL arrives at its entry point still in ring 3"),
    interpreted("modes::hypercall", "VMCALL in ring 0 never ends"),
    interpreted(
        "interrupts::irqfd_resamples_not_before_the_end",
        "the local APIC forgets that a vector is in service when it is delivered",
    ),
    interpreted("registers::tsc_can_be_set", "setting the TSC is accepted and has no effect"),
    interpreted("debug::watchpoint_ring0", "the emulator does not look at data breakpoints"),
    interpreted("debug::software_breakpoint_ring0", "the emulator cannot execute INT3"),
    emulated("debug::hardware_breakpoint_ring0", "QEMU before 10.0 does not intercept #DB for its nested guests"),
    emulated("debug::watchpoint_ring0", "QEMU before 10.0 does not intercept #DB for its nested guests"),
    emulated("debug::software_breakpoint_ring0", "QEMU reports INT3 to the nested hypervisor as a software interrupt"),
    emulated("arm64_access::read_extends", "QEMU 7.2 leaves the sign extension out of the syndrome"),
];
