//! The table of the running macOS, and the call that no declaration can make.

use super::{HvfArm64Api, HvfArm64Functions, LIBRARY};
use crate::hvf::HvReturn;
use crate::load::{LoadError, symbols};
use core::arch::aarch64::vld1q_u8;
use core::arch::asm;
use core::ffi::c_void;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, Ordering};

/// `hv_vcpu_set_simd_fp_reg`, stored before the table that leads to it is handed out.
static SET_VECTOR: AtomicPtr<c_void> = AtomicPtr::new(core::ptr::null_mut());

/// Calls the framework with the value in Q0, where `simd_uchar16` is passed (Arm AAPCS64, 6.8.2).
///
/// # Safety
/// As the framework's function. Reached only through a table, so after [`SET_VECTOR`] was stored.
unsafe fn set_vector(vcpu: u64, reg: u32, value: &[u8; 16]) -> HvReturn {
    // Acquire pairs with the Release in `system`.
    let function = SET_VECTOR.load(Ordering::Acquire);
    let answer: u64;
    // SAFETY: `value` has 16 bytes to load. The function takes its arguments in x0, w1 and q0, answers in w0, and keeps
    // the platform's C convention otherwise.
    unsafe {
        asm!(
            "blr {function}",
            function = in(reg) function,
            inlateout("x0") vcpu => answer,
            in("x1") u64::from(reg),
            in("v0") vld1q_u8(value.as_ptr()),
            clobber_abi("C"),
        );
    }
    answer as HvReturn
}

impl HvfArm64Api {
    /// The platform of this macOS, loaded at the first call.
    ///
    /// # Errors
    /// [`LoadError::Library`] where there is no such framework, [`LoadError::Function`] before macOS 11. The answer is kept.
    pub fn system() -> Result<&'static Self, LoadError> {
        static TABLE: OnceLock<Result<HvfArm64Api, LoadError>> = OnceLock::new();
        let table = TABLE.get_or_init(|| {
            let mut symbols = symbols(LIBRARY, c"/System/Library/Frameworks/Hypervisor.framework/Hypervisor")?;
            let missing = |name| LoadError::Function { library: LIBRARY, name };
            let set = symbols(c"hv_vcpu_set_simd_fp_reg");
            if set.is_null() {
                return Err(missing("hv_vcpu_set_simd_fp_reg"));
            }
            SET_VECTOR.store(set.cast_mut(), Ordering::Release);
            // SAFETY: the system's framework, and libSystem on which it depends, have these functions with these signatures
            // (headers of the SDK), and they are never unloaded.
            let functions = unsafe { HvfArm64Functions::resolve(symbols) }.map_err(missing)?;
            Ok(HvfArm64Api { functions, hv_vcpu_set_simd_fp_reg: set_vector })
        });
        table.as_ref().map_err(Clone::clone)
    }
}
