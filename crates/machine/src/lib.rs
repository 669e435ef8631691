//! Boards, boot protocols and devices for [`vm_accel`]: what stands around vCPUs so that a real guest boots.
//!
//! [`Machine`] is the whole of it. The parts:
//!
//! * [`boot`]: from the bytes of an image to what stands in memory and registers;
//! * [`bus`]: address spaces and the devices in them;
//! * [`control`]: why and how a machine ends;
//! * [`cpuid`]: what each CPU sees of the machine;
//! * [`devices`]: the devices of the boards;
//! * [`irq`]: the wire from a device to an interrupt controller;
//! * [`pc`], [`virt`](mod@virt): the boards that put them together, for x86-64 and aarch64 guests.
//!
//! Devices and loaders face hostile guests and files: nothing in here may panic, loop or allocate without bound because
//! of what they supply.
//!
//! ```no_run
//! use vm_accel::{AccelKind, PlatformBackend};
//! use vm_accel_machine::{Guest, Machine, MachineConfig, Outcome};
//!
//! let kernel = std::fs::read("vmlinuz")?;
//! let accel = Box::new(PlatformBackend::new(AccelKind::Kvm)?);
//! let guest = Guest { cmdline: "console=ttyS0", ..Guest::new(&kernel) };
//! let machine = Machine::new(accel, &MachineConfig::default(), &guest, Box::new(std::io::stdout()))?;
//! assert_eq!(machine.run(None), Outcome::Shutdown);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

pub mod boot;
pub mod bus;
pub mod control;
pub mod cpuid;
pub mod devices;
mod error;
pub mod irq;
mod machine;
pub mod pc;
mod runloop;
#[cfg(test)]
mod script;
pub mod virt;

pub use control::{Control, Failure, Outcome};
pub use devices::uart::{InputClosed, UartInput};
pub use error::MachineError;
pub use machine::{Guest, Machine, MachineConfig, PowerButton};
