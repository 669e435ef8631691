//! A partition, and the calls on it: each answers the platform's code as an error of this library.
//!
//! Virtual processors and cancellations hold the partition, so it is deleted when the last of them is gone: no call overlaps
//! the deletion.

use crate::accel::AccelKind;
use crate::error::{AccelError, RawCode, VcpuResult};
use std::ffi::c_void;
use vm_accel_sys::whpx::HRESULT;
use vm_accel_sys::whpx::code::{WHV_E_INSUFFICIENT_BUFFER, WHV_E_UNKNOWN_CAPABILITY, succeeded};
use vm_accel_sys::whpx::x86_64::defs::*;
use vm_accel_sys::whpx::x86_64::{ExitContext, RegisterValue, WhpApi};

/// A partition.
#[derive(Debug)]
pub(super) struct Partition {
    pub(super) api: &'static WhpApi,
    handle: WHV_PARTITION_HANDLE,
}

/// An error of the platform.
pub(super) fn failed(op: &'static str, code: HRESULT) -> AccelError {
    AccelError::Backend { kind: AccelKind::Whpx, op, code: RawCode::Hresult(code) }
}

/// Calls a function of the table; its name is in the error.
macro_rules! call {
    ($api:expr, $function:ident($($arg:expr),* $(,)?)) => {{
        // SAFETY: see the place of the call: pointers are to live values of the sizes that are told.
        let code = unsafe { ($api.$function)($($arg),*) };
        if succeeded(code) { Ok(()) } else { Err(failed(stringify!($function), code)) }
    }};
    ($api:expr, optional $function:ident($($arg:expr),* $(,)?)) => {
        match $api.$function {
            // SAFETY: as above.
            Some(function) => match unsafe { function($($arg),*) } {
                code if succeeded(code) => Ok(()),
                code => Err(failed(stringify!($function), code)),
            },
            None => Err(AccelError::Unsupported { kind: Some(AccelKind::Whpx), what: stringify!($function) }),
        }
    };
}

/// A capability of up to eight bytes; `None` if this version of the platform does not know it.
pub(super) fn capability(api: &WhpApi, code: WHV_CAPABILITY_CODE) -> VcpuResult<Option<u64>> {
    let mut value = 0u64;
    let answer = call!(api, WHvGetCapability(code, (&raw mut value).cast(), 8, std::ptr::null_mut()));
    match answer {
        Ok(()) => Ok(Some(value)),
        Err(why) if is_code(&why, WHV_E_UNKNOWN_CAPABILITY) => Ok(None),
        Err(why) => Err(why),
    }
}

/// Whether an error is that code of the platform.
pub(super) fn is_code(error: &AccelError, wanted: HRESULT) -> bool {
    matches!(error, AccelError::Backend { code: RawCode::Hresult(code), .. } if *code == wanted)
}

impl Partition {
    pub(super) fn new(api: &'static WhpApi) -> VcpuResult<Self> {
        let mut handle = 0;
        call!(api, WHvCreatePartition(&raw mut handle))?;
        Ok(Self { api, handle })
    }

    /// Sets a property; lists are slices, single values slices of one.
    pub(super) fn set_property<T: Copy>(&self, code: WHV_PARTITION_PROPERTY_CODE, value: &[T]) -> VcpuResult<()> {
        let size = size_of_val(value) as u32;
        call!(self.api, WHvSetPartitionProperty(self.handle, code, value.as_ptr().cast(), size))
    }

    pub(super) fn set_up(&self) -> VcpuResult<()> {
        call!(self.api, WHvSetupPartition(self.handle))
    }

    /// Maps host memory in place of what is mapped there. It must stay until it is unmapped or the partition is gone.
    pub(super) fn map(&self, host: *mut u8, gpa: u64, size: u64, flags: WHV_MAP_GPA_RANGE_FLAGS) -> VcpuResult<()> {
        call!(self.api, WHvMapGpaRange(self.handle, host.cast(), gpa, size, flags))
    }

    pub(super) fn unmap(&self, gpa: u64, size: u64) -> VcpuResult<()> {
        call!(self.api, WHvUnmapGpaRange(self.handle, gpa, size))
    }

    /// Takes the dirty pages of a range: one bit for each of its pages of 4 KiB.
    pub(super) fn take_dirty(&self, gpa: u64, size: u64, bitmap: &mut [u64]) -> VcpuResult<()> {
        let (bytes, bitmap) = (size_of_val(bitmap) as u32, bitmap.as_mut_ptr());
        call!(self.api, optional WHvQueryGpaRangeDirtyBitmap(self.handle, gpa, size, bitmap, bytes))
    }

    pub(super) fn create_vp(&self, vp: u32) -> VcpuResult<()> {
        call!(self.api, WHvCreateVirtualProcessor(self.handle, vp, 0))
    }

    pub(super) fn delete_vp(&self, vp: u32) -> VcpuResult<()> {
        call!(self.api, WHvDeleteVirtualProcessor(self.handle, vp))
    }

    pub(super) fn run(&self, vp: u32, context: &mut ExitContext) -> VcpuResult<()> {
        let size = size_of::<ExitContext>() as u32;
        call!(self.api, WHvRunVirtualProcessor(self.handle, vp, context, size))
    }

    pub(super) fn cancel(&self, vp: u32) -> VcpuResult<()> {
        call!(self.api, WHvCancelRunVirtualProcessor(self.handle, vp, 0))
    }

    pub(super) fn get(&self, vp: u32, names: &[WHV_REGISTER_NAME]) -> VcpuResult<Vec<RegisterValue>> {
        let mut values = vec![RegisterValue::default(); names.len()];
        let (count, out) = (names.len() as u32, values.as_mut_ptr());
        call!(self.api, WHvGetVirtualProcessorRegisters(self.handle, vp, names.as_ptr(), count, out))?;
        Ok(values)
    }

    /// Writes registers: as many values as names.
    pub(super) fn set(&self, vp: u32, names: &[WHV_REGISTER_NAME], values: &[RegisterValue]) -> VcpuResult<()> {
        let count = names.len().min(values.len()) as u32;
        if count == 0 {
            return Ok(());
        }
        call!(self.api, WHvSetVirtualProcessorRegisters(self.handle, vp, names.as_ptr(), count, values.as_ptr()))
    }

    /// The XSAVE area in the platform's format, which is the compacted one.
    pub(super) fn xsave(&self, vp: u32) -> VcpuResult<Vec<u8>> {
        /// Most hosts' areas fit; the platform tells how much a larger one needs.
        const USUAL: usize = 4096;
        let mut area = vec![0; USUAL];
        loop {
            let (out, size): (*mut c_void, _) = (area.as_mut_ptr().cast(), area.len() as u32);
            let mut written = 0;
            match call!(self.api, optional WHvGetVirtualProcessorXsaveState(self.handle, vp, out, size, &raw mut written))
            {
                Ok(()) => {
                    area.truncate(written as usize);
                    return Ok(area);
                }
                Err(why) if is_code(&why, WHV_E_INSUFFICIENT_BUFFER) && written as usize > area.len() => {
                    area.resize(written as usize, 0);
                }
                Err(why) => return Err(why),
            }
        }
    }

    pub(super) fn set_xsave(&self, vp: u32, area: &[u8]) -> VcpuResult<()> {
        let (from, size) = (area.as_ptr().cast(), area.len() as u32);
        call!(self.api, optional WHvSetVirtualProcessorXsaveState(self.handle, vp, from, size))
    }
}

impl Drop for Partition {
    fn drop(&mut self) {
        // Nobody is left who could be told; the handle is not used again in either case.
        let _ = call!(self.api, WHvDeletePartition(self.handle));
    }
}
