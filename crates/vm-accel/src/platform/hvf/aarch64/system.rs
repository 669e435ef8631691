//! The backend on the running macOS.

use super::AccelHvf;
use crate::platform::hvf::missing;
use vm_accel_core::accel::Capabilities;
use vm_accel_core::error::VcpuResult;
use vm_accel_sys::hvf::aarch64::HvfArm64Api;

impl AccelHvf {
    /// Creates a virtual machine. A process can have one.
    ///
    /// # Errors
    /// [`AccelError::Unavailable`](crate::AccelError::Unavailable) with the reason.
    pub fn new() -> VcpuResult<Self> {
        Self::create(HvfArm64Api::system().map_err(missing)?)
    }

    /// What the framework can do on this Mac.
    ///
    /// # Errors
    /// [`AccelError::Unavailable`](crate::AccelError::Unavailable) with the reason.
    pub fn probe() -> VcpuResult<Capabilities> {
        Self::examine(HvfArm64Api::system().map_err(missing)?)
    }
}
