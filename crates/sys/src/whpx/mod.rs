//! The Windows Hypervisor Platform. Its structures differ between the architectures: each has a module of its own.

pub mod aarch64;
mod bits;
pub mod code;
pub mod x86_64;

pub use code::HRESULT;
pub use windows_sys::Win32::Foundation::HANDLE;

/// The library that has the functions; Windows has it when the feature "Windows Hypervisor Platform" is switched on.
pub const LIBRARY: &str = "WinHvPlatform.dll";

/// `WHV_MAP_GPA_RANGE_FLAGS`.
#[allow(missing_docs, reason = "each is named as in WinHvPlatformDefs.h, without its prefix")]
pub mod map_flag {
    pub const READ: i32 = 1;
    pub const WRITE: i32 = 2;
    pub const EXECUTE: i32 = 4;
    pub const TRACK_DIRTY_PAGES: i32 = 8;
}
