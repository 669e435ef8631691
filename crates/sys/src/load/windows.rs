//! `LoadLibraryExW` and `GetProcAddress`, for libraries of the system.

use super::LoadError;
use std::ffi::{CStr, c_void};
use std::ptr;
use windows_sys::Win32::System::LibraryLoader::{GetProcAddress, LOAD_LIBRARY_SEARCH_SYSTEM32, LoadLibraryExW};

/// A library of this name beside the program must not be taken for the system's; simulators are loaded from there.
const SEARCH: u32 = if cfg!(feature = "sim") { 0 } else { LOAD_LIBRARY_SEARCH_SYSTEM32 };

/// Opens the library for the rest of the process and answers a function that finds its symbols.
pub(crate) fn symbols(name: &'static str) -> Result<impl FnMut(&CStr) -> *const c_void + use<>, LoadError> {
    let wide: Vec<u16> = name.encode_utf16().chain([0]).collect();
    // SAFETY: the name ends with zero, and the reserved handle is null as documented.
    let library = unsafe { LoadLibraryExW(wide.as_ptr(), ptr::null_mut(), SEARCH) };
    if library.is_null() {
        return Err(LoadError::Library { name, detail: std::io::Error::last_os_error().to_string() });
    }
    let library = library as usize;
    Ok(move |symbol: &CStr| {
        // SAFETY: the library is never freed, and the name is a C string.
        let found = unsafe { GetProcAddress(library as *mut c_void, symbol.as_ptr().cast()) };
        found.map_or(ptr::null(), |function| function as *const c_void)
    })
}
