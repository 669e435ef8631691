//! The platform of the running Windows.

use super::AccelWhpx;
use crate::partition::missing;
use vm_accel_core::accel::Capabilities;
use vm_accel_core::error::VcpuResult;
use vm_accel_sys::whpx::x86_64::WhpApi;

/// The system's table.
fn table() -> VcpuResult<&'static WhpApi> {
    WhpApi::system().map_err(missing)
}

impl AccelWhpx {
    /// What the platform of this Windows can do.
    ///
    /// # Errors
    /// [`AccelError::Unavailable`](vm_accel_core::AccelError::Unavailable) with the reason.
    pub fn probe() -> VcpuResult<Capabilities> {
        Self::probe_table(table()?)
    }

    /// Creates a virtual machine without memory, interrupt controllers and vCPUs.
    ///
    /// # Errors
    /// [`AccelError::Unavailable`](vm_accel_core::AccelError::Unavailable) with the reason if this Windows has no such platform,
    /// [`AccelError::Backend`](vm_accel_core::AccelError::Backend) if it refuses.
    pub fn new() -> VcpuResult<Self> {
        Self::from_table(table()?)
    }
}
