//! Boards, boot protocols and devices for [`vm_accel`]: what stands around vCPUs so that a real guest boots.
//!
//! * [`bus`]: address spaces and the devices in them;
//! * [`control`]: why and how a machine ends;
//! * [`devices`]: the devices of a PC;
//! * [`irq`]: the wire from a device to an interrupt controller.
//!
//! Devices and loaders face hostile guests and files: nothing in here may panic, loop or allocate without bound because
//! of what they supply.

pub mod bus;
pub mod control;
pub mod devices;
pub mod irq;
