//! What peculiar hosts provably cannot do although they claim to. Nothing else is ever skipped for being red.
//!
//! Hosts that interpret guest ring 0 show only the behaviour of the kernel's instruction emulator there, and of their own
//! switch between rings; capabilities do not reveal that, so it was found by trying, once per line.

use crate::harness::{Exception, When};

const fn interpreted(case: &'static str, reason: &'static str) -> Exception {
    Exception {
        when: When::InterpretedRing0,
        case,
        reason,
    }
}

pub(crate) const TABLE: &[Exception] = &[
    interpreted(
        "modes::paging_32_bit",
        "no 32-bit paging: the guest dies when it sets CR0.PG",
    ),
    interpreted(
        "modes::paging_pae",
        "no 32-bit paging: the guest dies when it sets CR0.PG",
    ),
    interpreted(
        "modes::ring3_software_interrupt",
        "INT n in ring 3 raises #UD",
    ),
    interpreted(
        "modes::ring3_system_call",
        "SYSCALL arrives at its entry point still in ring 3",
    ),
    interpreted("modes::hypercall", "VMCALL in ring 0 never ends"),
    interpreted(
        "interrupts::irqfd_resamples_not_before_the_end",
        "the local APIC forgets that a vector is in service when it is delivered",
    ),
    interpreted(
        "registers::tsc_can_be_set",
        "setting the TSC is accepted and has no effect",
    ),
];
