//! Apple's Hypervisor.framework. A virtual machine's architecture is the host's; the two backends share the framework's codes and
//! its rule that a vCPU belongs to a thread.

#[cfg(hvf_aarch64)]
pub mod aarch64;
mod memory;
mod thread;
#[cfg(hvf_x86_64)]
pub mod x86_64;

#[cfg(all(target_os = "macos", target_arch = "aarch64"))]
pub use aarch64::AccelHvf;
#[cfg(all(target_os = "macos", target_arch = "x86_64"))]
pub use x86_64::AccelHvf;

use vm_accel_core::accel::AccelKind;
use vm_accel_core::error::{AccelError, RawCode, UnavailableReason, VcpuResult};
use vm_accel_sys::hvf::{HvReturn, code};

/// Makes an error of what the framework answered.
fn check(op: &'static str, answer: HvReturn) -> VcpuResult<()> {
    match answer {
        code::SUCCESS => Ok(()),
        code => Err(AccelError::Backend { kind: AccelKind::Hvf, op, code: RawCode::HvReturn(code) }),
    }
}

/// Why there can be no virtual machine, from what a call that everything depends on answered.
fn unavailable(op: &'static str, answer: HvReturn) -> AccelError {
    let reason = match answer {
        code::BUSY => UnavailableReason::InUse,
        code::DENIED => UnavailableReason::EntitlementMissing { entitlement: "com.apple.security.hypervisor" },
        code::UNSUPPORTED | code::NO_DEVICE => UnavailableReason::UnsupportedHardware {
            detail: "the processor lacks virtualization, or this is a virtual machine without nesting".into(),
        },
        code => UnavailableReason::Failed { op, code: RawCode::HvReturn(code) },
    };
    AccelError::Unavailable { kind: AccelKind::Hvf, reason }
}

/// Why the framework's functions are not there.
#[cfg(target_os = "macos")]
fn missing(why: vm_accel_sys::LoadError) -> AccelError {
    let reason = match why {
        vm_accel_sys::LoadError::Function { library, name } => {
            UnavailableReason::FunctionMissing { library, function: name }
        }
        _ => {
            UnavailableReason::LibraryMissing { library: "Hypervisor.framework", hint: "it needs macOS 10.10 or later" }
        }
    };
    AccelError::Unavailable { kind: AccelKind::Hvf, reason }
}
