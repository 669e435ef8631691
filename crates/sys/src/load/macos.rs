//! `dlopen` and `dlsym`, for frameworks of the system.

use super::LoadError;
use std::ffi::{CStr, c_char, c_int, c_void};

// From libSystem, which every program on macOS is linked with (man 3 dlopen).
unsafe extern "C" {
    fn dlopen(path: *const c_char, mode: c_int) -> *mut c_void;
    fn dlsym(handle: *mut c_void, symbol: *const c_char) -> *mut c_void;
    fn dlerror() -> *const c_char;
}

const RTLD_NOW: c_int = 2;

/// Opens the library `path` for the rest of the process and answers a function that finds its symbols.
pub(crate) fn symbols(
    name: &'static str,
    path: &CStr,
) -> Result<impl FnMut(&CStr) -> *const c_void + use<>, LoadError> {
    // SAFETY: `path` is a C string; a framework of the system runs no code of ours when it is loaded.
    let handle = unsafe { dlopen(path.as_ptr(), RTLD_NOW) };
    if handle.is_null() {
        // SAFETY: after a failure dlerror answers a C string of this thread, good until its next call here.
        let detail = unsafe { dlerror().as_ref().map(|text| CStr::from_ptr(text).to_string_lossy().into_owned()) };
        return Err(LoadError::Library { name, detail: detail.unwrap_or_default() });
    }
    let handle = handle as usize;
    // SAFETY: the handle is never closed, and the name is a C string.
    Ok(move |symbol: &CStr| unsafe { dlsym(handle as *mut c_void, symbol.as_ptr()).cast_const() })
}
