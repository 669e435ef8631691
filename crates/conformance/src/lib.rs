//! The conformance suite of `vm-accel`: one list of cases, run on every backend that is asked for.
//!
//! A case is a function over the neutral API; it never asks which backend it runs on. What a backend may honestly lack
//! is declared beside the case and judged by the backend's capabilities; what a peculiar host provably cannot do stands in
//! a table of exceptions, each line with its reason. No case asserts a time; every case has a deadline.
//!
//! [`CONFORMANCE`] and [`KICK_STRESS`] are the suites, [`PLATFORM_BACKENDS`] the backends of this host. A simulated platform
//! joins as a [`Backend`] of its own. [`main`] is a test program of libtest's manners; [`plan`] is for those who report
//! in their own way.
//!
//! ```text
//! cargo test -p vm-accel --test conformance                 all
//! cargo test -p vm-accel --test conformance -- kvm::mmio    one theme on one backend
//! VM_ACCEL_REQUIRE=kvm,soft cargo test …                    a backend that is not there is a failure
//! ```

mod arm64;
mod debug;
mod exceptions;
mod harness;
mod interrupts;
mod kick_stress;
mod kicks;
mod lifecycle;
mod lockstep;
mod memory;
mod mmio;
mod modes;
mod pio;
mod protocol;
mod registers;
mod snapshot;

use arm64::{arm64_access, arm64_cpu, arm64_debug, arm64_interrupts, arm64_memory};
pub use harness::backend::{Backend, PLATFORM_BACKENDS};
use harness::runner::Theme;
pub use harness::runner::{Absent, Plan, Suite, Test, main, plan};
use std::time::Duration;
use vm_accel::GuestArch::{Aarch64, X86_64};

macro_rules! themes {
    ($($arch:ident $name:ident),* $(,)?) => {
        &[$(Theme { name: stringify!($name), arch: $arch, cases: $name::CASES }),*]
    };
}

#[rustfmt::skip]
const THEMES: &[Theme] = themes![
    X86_64 pio, X86_64 mmio, X86_64 memory, X86_64 modes, X86_64 registers, X86_64 interrupts, X86_64 kicks,
    X86_64 protocol, X86_64 lifecycle, X86_64 debug, X86_64 snapshot,
    Aarch64 arm64_access, Aarch64 arm64_cpu, Aarch64 arm64_memory, Aarch64 arm64_interrupts, Aarch64 arm64_debug,
];

/// Everything that a backend must do.
pub static CONFORMANCE: Suite = Suite {
    themes: THEMES,
    exceptions: exceptions::TABLE,
    // Emulated machines take a tenth of it for the longest case.
    limit: Duration::from_secs(60),
};

/// 100,000 kicks at random moments: none is lost. `VM_ACCEL_KICKS=n` sends n kicks in each case instead.
pub static KICK_STRESS: Suite =
    Suite { themes: themes![X86_64 kick_stress], exceptions: &[], limit: Duration::from_secs(280) };

/// The cases about guest memory alone, for other ways to set up a virtual machine.
pub static MEMORY: Suite = Suite { themes: themes![X86_64 memory], exceptions: &[], limit: Duration::from_secs(60) };

/// The guests of the suite, step for step on the host's KVM and on the software CPU: run it on [`LOCKSTEP_BACKENDS`].
pub static LOCKSTEP: Suite = Suite {
    themes: themes![X86_64 pio, X86_64 mmio, X86_64 memory, X86_64 modes, X86_64 registers, X86_64 protocol],
    exceptions: exceptions::LOCKSTEP,
    limit: Duration::from_secs(60),
};

/// The pair that [`LOCKSTEP`] compares.
pub const LOCKSTEP_BACKENDS: &[Backend] = &[lockstep::BACKEND];
