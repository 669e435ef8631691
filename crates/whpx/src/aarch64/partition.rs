//! A partition on arm64.

use crate::partition::{call, is_code, partition};
use vm_accel_core::error::VcpuResult;
use vm_accel_sys::whpx::aarch64::{ExitContext, InterruptControl, RegisterValue, WhpApi};

partition!(WhpApi, u32, RegisterValue, ExitContext);

impl Partition {
    /// Sets the level of an interrupt's line at the GIC.
    pub(super) fn request_interrupt(&self, interrupt: &InterruptControl) -> VcpuResult<()> {
        let size = size_of::<InterruptControl>() as u32;
        call!(self.api, WHvRequestInterrupt(self.handle, interrupt, size))
    }
}
