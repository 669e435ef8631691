//! The table of the running macOS.

use super::{HvfX86Api, LIBRARY};
use crate::load::{LoadError, symbols};
use std::sync::OnceLock;

impl HvfX86Api {
    /// The platform of this macOS, loaded at the first call.
    ///
    /// # Errors
    /// [`LoadError::Library`] where there is no such framework, [`LoadError::Function`] before macOS 10.10. The answer is kept.
    pub fn system() -> Result<&'static Self, LoadError> {
        static TABLE: OnceLock<Result<HvfX86Api, LoadError>> = OnceLock::new();
        let table = TABLE.get_or_init(|| {
            let symbols = symbols(LIBRARY, c"/System/Library/Frameworks/Hypervisor.framework/Hypervisor")?;
            // SAFETY: the system's framework has these functions with these signatures (hv.h and hv_vmx.h of its SDK), and
            // it is never unloaded.
            unsafe { HvfX86Api::resolve(symbols) }.map_err(|name| LoadError::Function { library: LIBRARY, name })
        });
        table.as_ref().map_err(Clone::clone)
    }
}
