//! A partition, and what its processors have on x86-64 alone: the XSAVE area, a local APIC.

use crate::partition::{call, is_code, partition};
use std::ffi::c_void;
use vm_accel_core::error::VcpuResult;
use vm_accel_sys::whpx::code::WHV_E_INSUFFICIENT_BUFFER;
use vm_accel_sys::whpx::x86_64::{
    ExitContext, INTERRUPT_CONTROLLER_STATE_SIZE, InterruptControl, RegisterValue, WhpApi,
};

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

    /// The registers of the platform's local APIC: as in its page, four bytes every sixteen.
    pub(super) fn apic_page(&self, vp: u32) -> VcpuResult<[u8; 1024]> {
        let mut page = [0; INTERRUPT_CONTROLLER_STATE_SIZE];
        let (out, size, mut written) = (page.as_mut_ptr().cast(), page.len() as u32, 0);
        let to = &raw mut written;
        call!(self.api, optional WHvGetVirtualProcessorInterruptControllerState2(self.handle, vp, out, size, to))?;
        Ok(std::array::from_fn(|n| page[n]))
    }

    pub(super) fn set_apic_page(&self, vp: u32, registers: &[u8; 1024]) -> VcpuResult<()> {
        let mut page = [0; INTERRUPT_CONTROLLER_STATE_SIZE];
        page[..registers.len()].copy_from_slice(registers);
        let (from, size) = (page.as_ptr().cast(), page.len() as u32);
        call!(self.api, optional WHvSetVirtualProcessorInterruptControllerState2(self.handle, vp, from, size))
    }

    /// Delivers an interrupt to the platform's local APICs.
    pub(super) fn request_interrupt(&self, control: &InterruptControl) -> VcpuResult<()> {
        let size = size_of::<InterruptControl>() as u32;
        call!(self.api, optional WHvRequestInterrupt(self.handle, control, size))
    }
}
