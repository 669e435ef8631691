//! A partition, and what its processors have on x86-64 alone: the XSAVE area.

use crate::error::VcpuResult;
use crate::platform::whpx::partition::{call, is_code, partition};
use std::ffi::c_void;
use vm_accel_sys::whpx::code::WHV_E_INSUFFICIENT_BUFFER;
use vm_accel_sys::whpx::x86_64::{ExitContext, RegisterValue, WhpApi};

partition!(WhpApi, i32, RegisterValue, ExitContext);

impl Partition {
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
