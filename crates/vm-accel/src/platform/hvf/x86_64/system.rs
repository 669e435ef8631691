//! The backend on the running macOS.

use super::{AccelHvf, Host};
use crate::platform::hvf::missing;
use std::arch::x86_64::__cpuid_count;
use vm_accel_core::accel::Capabilities;
use vm_accel_core::error::VcpuResult;
use vm_accel_sys::hvf::x86_64::HvfX86Api;

/// The processor below.
fn host() -> Host {
    let mut tsc_hz = 0_u64;
    let mut size = size_of::<u64>();
    // SAFETY: the name is a C string, and the answer's buffer has the size that is given.
    let told = unsafe {
        libc::sysctlbyname(
            c"machdep.tsc.frequency".as_ptr(),
            (&raw mut tsc_hz).cast(),
            &mut size,
            std::ptr::null_mut(),
            0,
        )
    };
    Host {
        cpuid: Some(|leaf, subleaf| {
            // SAFETY: every processor that macOS runs on has the instruction.
            #[allow(unused_unsafe, reason = "the function is unsafe in older releases of Rust only")]
            let answer = unsafe { __cpuid_count(leaf, subleaf) };
            [answer.eax, answer.ebx, answer.ecx, answer.edx]
        }),
        // Where the kernel does not tell, a guest that calibrates its clocks finds out.
        tsc_hz: if told == 0 && tsc_hz != 0 { tsc_hz } else { 1_000_000_000 },
    }
}

impl AccelHvf {
    /// Creates a virtual machine. A process can have one.
    ///
    /// # Errors
    /// [`AccelError::Unavailable`](crate::AccelError::Unavailable) with the reason.
    pub fn new() -> VcpuResult<Self> {
        Self::create(HvfX86Api::system().map_err(missing)?, host())
    }

    /// What the framework can do on this Mac.
    ///
    /// # Errors
    /// [`AccelError::Unavailable`](crate::AccelError::Unavailable) with the reason.
    pub fn probe() -> VcpuResult<Capabilities> {
        Self::examine(HvfX86Api::system().map_err(missing)?, host())
    }
}
