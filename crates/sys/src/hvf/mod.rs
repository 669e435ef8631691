//! Apple's Hypervisor.framework. The two architectures share names, not signatures: each has a table of its own.

/// What every function answers (`hv_return_t`, Hypervisor/hv_error.h).
pub type HvReturn = i32;

/// Codes of [`HvReturn`].
#[allow(missing_docs, reason = "each is named as in hv_error.h")]
pub mod code {
    use super::HvReturn;

    const fn code(n: u32) -> HvReturn {
        (0xfae9_4000 | n) as HvReturn
    }

    pub const SUCCESS: HvReturn = 0;
    pub const ERROR: HvReturn = code(1);
    pub const BUSY: HvReturn = code(2);
    pub const BAD_ARGUMENT: HvReturn = code(3);
    pub const ILLEGAL_GUEST_STATE: HvReturn = code(4);
    pub const NO_RESOURCES: HvReturn = code(5);
    pub const NO_DEVICE: HvReturn = code(6);
    pub const DENIED: HvReturn = code(7);
    pub const FAULT: HvReturn = code(8);
    pub const UNSUPPORTED: HvReturn = code(15);
}

/// Protection bits of a mapping (`hv_memory_flags_t`).
#[allow(missing_docs, reason = "each is named as in hv_types.h")]
pub mod memory {
    pub const READ: u64 = 1;
    pub const WRITE: u64 = 2;
    pub const EXEC: u64 = 4;
}

pub mod aarch64;
pub mod x86_64;
