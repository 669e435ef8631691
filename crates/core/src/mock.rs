//! Test doubles for a VMM's own unit tests, without any hypervisor (feature `mock`).
//!
//! * [`ScriptedVcpu`] is a vCPU whose exits come from a [`Script`]. It obeys the completion protocol to the letter and
//!   reports, as errors, where the VMM under test does not.
//! * [`FaultInjector`] wraps any vCPU, makes chosen calls fail and lets `run()` return [`VcpuExit::Interrupt`] for no reason,
//!   as signals do on real hosts.
//!
//! They must never panic on what the VMM under test does: a test asserts on the errors.
//!
//! ```
//! use vm_accel::mock::{Answer, FaultInjector, Operation, Script, ScriptedVcpu};
//! use vm_accel::{AccelError, ExitHandler, VcpuExit, VcpuOps, VcpuResult};
//!
//! /// The code under test: a serial port at 0x3f8 whose status at 0x3fd says "ready", in a loop that survives signals.
//! #[derive(Default)]
//! struct Serial(Vec<u8>);
//!
//! impl ExitHandler for Serial {
//!     fn io_read(&mut self, port: u16, _size: u8, data: &mut [u8]) -> VcpuResult<()> {
//!         if port == 0x3fd {
//!             data.fill(0x60);
//!         }
//!         Ok(())
//!     }
//!     fn io_write(&mut self, port: u16, _size: u8, data: &[u8]) -> VcpuResult<()> {
//!         if port == 0x3f8 {
//!             self.0.extend_from_slice(data);
//!         }
//!         Ok(())
//!     }
//!     fn stop_at(&mut self, exit: VcpuExit) -> VcpuResult<bool> {
//!         Ok(exit != VcpuExit::Interrupt)
//!     }
//! }
//!
//! let script = Script::new()
//!     .io_in(0x3fd, 1, Answer::exactly([0x60]))
//!     .io_out(0x3f8, 1, b"OK")
//!     .io_in(0x70, 1, Answer::exactly([0xff])) // nobody is there: all ones
//!     .exit(VcpuExit::Halted);
//!
//! let mut vcpu = FaultInjector::new(ScriptedVcpu::new(0, script.clone())?).spurious_interrupts(42, 2);
//! let mut serial = Serial::default();
//! assert_eq!(vcpu.run_with(&mut serial)?, VcpuExit::Halted);
//! assert_eq!(serial.0, b"OK");
//! vcpu.inner().finish()?; // the whole script was played, and the VMM kept to the protocol
//!
//! // What does the loop do if the second entry into the guest fails?
//! let broken = AccelError::MemoryFault { kind: vm_accel::AccelKind::Kvm, gpa: 0, size: 0, flags: 0 };
//! let mut vcpu = FaultInjector::new(ScriptedVcpu::new(0, script)?).fail(Operation::Run, 2, broken.clone());
//! assert_eq!(vcpu.run_with(&mut serial), Err(broken));
//! # Ok::<(), AccelError>(())
//! ```
//!
//! [`VcpuExit::Interrupt`]: crate::VcpuExit::Interrupt

mod fault;
mod script;
mod scripted;

pub use fault::{FaultInjector, Operation};
pub use script::{Answer, Script};
pub use scripted::ScriptedVcpu;
