//! What the functions answer, and how to tell success.

pub use windows_sys::Win32::Foundation::{
    E_ACCESSDENIED, E_FAIL, E_INVALIDARG, E_NOTIMPL, E_OUTOFMEMORY, E_POINTER, E_UNEXPECTED, WHV_E_GPA_RANGE_NOT_FOUND,
    WHV_E_INSUFFICIENT_BUFFER, WHV_E_INVALID_PARTITION_CONFIG, WHV_E_INVALID_VP_REGISTER_NAME, WHV_E_INVALID_VP_STATE,
    WHV_E_UNKNOWN_CAPABILITY, WHV_E_UNKNOWN_PROPERTY, WHV_E_UNSUPPORTED_HYPERVISOR_CONFIG,
    WHV_E_UNSUPPORTED_PROCESSOR_CONFIG, WHV_E_VP_ALREADY_EXISTS, WHV_E_VP_DOES_NOT_EXIST,
};
pub use windows_sys::core::HRESULT;

/// Success.
pub const S_OK: HRESULT = 0;

/// The hypervisor's own codes that callers of the platform meet (winerror.h): conflicting doorbells, bad register values, ...
#[allow(missing_docs, reason = "each is named as in winerror.h")]
pub mod hv {
    use super::HRESULT;

    pub const ERROR_HV_INVALID_PARAMETER: HRESULT = 0xc035_0005_u32 as HRESULT;
    pub const ERROR_HV_INVALID_PARTITION_STATE: HRESULT = 0xc035_0007_u32 as HRESULT;
    pub const ERROR_HV_OPERATION_DENIED: HRESULT = 0xc035_0008_u32 as HRESULT;
    pub const ERROR_HV_INSUFFICIENT_MEMORY: HRESULT = 0xc035_000b_u32 as HRESULT;
    pub const ERROR_HV_INVALID_VP_STATE: HRESULT = 0xc035_0015_u32 as HRESULT;
    pub const ERROR_HV_INVALID_REGISTER_VALUE: HRESULT = 0xc035_0050_u32 as HRESULT;
}

/// Success is any value that is not negative (winerror.h, `SUCCEEDED`).
#[must_use]
pub const fn succeeded(code: HRESULT) -> bool {
    code >= 0
}

/// Whether the code is one of the hypervisor itself (facility 0x35), below the platform's own (0x37).
#[must_use]
pub const fn is_hypervisor(code: HRESULT) -> bool {
    code as u32 & 0x3fff_0000 == 0x0035_0000
}

/// Name of a code of the platform, for messages; `None` for codes that are not particular to it.
#[must_use]
pub const fn name(code: HRESULT) -> Option<&'static str> {
    Some(match code {
        WHV_E_UNKNOWN_CAPABILITY => "WHV_E_UNKNOWN_CAPABILITY",
        WHV_E_INSUFFICIENT_BUFFER => "WHV_E_INSUFFICIENT_BUFFER",
        WHV_E_UNKNOWN_PROPERTY => "WHV_E_UNKNOWN_PROPERTY",
        WHV_E_UNSUPPORTED_HYPERVISOR_CONFIG => "WHV_E_UNSUPPORTED_HYPERVISOR_CONFIG",
        WHV_E_INVALID_PARTITION_CONFIG => "WHV_E_INVALID_PARTITION_CONFIG",
        WHV_E_GPA_RANGE_NOT_FOUND => "WHV_E_GPA_RANGE_NOT_FOUND",
        WHV_E_VP_ALREADY_EXISTS => "WHV_E_VP_ALREADY_EXISTS",
        WHV_E_VP_DOES_NOT_EXIST => "WHV_E_VP_DOES_NOT_EXIST",
        WHV_E_INVALID_VP_STATE => "WHV_E_INVALID_VP_STATE",
        WHV_E_INVALID_VP_REGISTER_NAME => "WHV_E_INVALID_VP_REGISTER_NAME",
        WHV_E_UNSUPPORTED_PROCESSOR_CONFIG => "WHV_E_UNSUPPORTED_PROCESSOR_CONFIG",
        E_INVALIDARG => "E_INVALIDARG",
        E_OUTOFMEMORY => "E_OUTOFMEMORY",
        E_ACCESSDENIED => "E_ACCESSDENIED",
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn success_is_any_code_that_is_not_negative() {
        assert!(succeeded(S_OK) && succeeded(1));
        assert!(!succeeded(E_INVALIDARG) && !succeeded(WHV_E_INVALID_VP_STATE));
    }

    #[test]
    fn codes_of_the_hypervisor_are_told_from_those_of_the_platform() {
        assert!(is_hypervisor(hv::ERROR_HV_INVALID_PARAMETER));
        assert!(!is_hypervisor(WHV_E_INVALID_VP_STATE) && !is_hypervisor(E_INVALIDARG));
        assert_eq!(name(WHV_E_GPA_RANGE_NOT_FOUND), Some("WHV_E_GPA_RANGE_NOT_FOUND"));
        assert_eq!(name(hv::ERROR_HV_INVALID_PARAMETER), None);
    }
}
