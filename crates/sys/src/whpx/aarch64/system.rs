//! The table of the running Windows.

use super::WhpApi;
use crate::load::{LoadError, symbols};
use crate::whpx::LIBRARY;
use std::sync::OnceLock;

impl WhpApi {
    /// The platform of this Windows, loaded at the first call.
    ///
    /// # Errors
    /// [`LoadError::Library`] where the feature "Windows Hypervisor Platform" is switched off or unknown,
    /// [`LoadError::Function`] on a Windows whose platform is not the released one. The answer is kept: a feature that is switched on needs a restart anyway.
    pub fn system() -> Result<&'static Self, LoadError> {
        static TABLE: OnceLock<Result<WhpApi, LoadError>> = OnceLock::new();
        let table = TABLE.get_or_init(|| {
            let symbols = symbols(LIBRARY)?;
            // SAFETY: the system's library of that name has these functions with these signatures (WinHvPlatform.h), and
            // it is never unloaded.
            unsafe { WhpApi::resolve(symbols) }.map_err(|name| LoadError::Function { library: LIBRARY, name })
        });
        table.as_ref().map_err(Clone::clone)
    }
}
