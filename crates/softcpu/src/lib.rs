//! A software x86-64 CPU: what a virtual machine runs on where there is no hypervisor, and what completes device accesses for hypervisors
//! that hand over instructions instead of results.
//!
//! * [`Cpu`] is one CPU: [`Cpu::run`] executes guest code until something needs the owner ([`Exit`]), [`Cpu::emulate_one`] executes one
//!   instruction that somebody else fetched.
//! * [`Ram`] is guest memory, shared by the CPUs of a machine; each may run on a thread of its own.
//! * [`Bus`] is the rest of the machine as the CPU sees it: device memory, ports, interrupts, some MSRs.
//! * [`CpuState`] is the whole architectural state.
//!
//! # What it is
//!
//! x86-64-v2 (to SSE4.2, POPCNT, CMPXCHG16B) with AES, PCLMULQDQ, SHA, MOVBE, RDTSCP, RDPID, FSGSBASE, SMEP, SMAP, UMIP, x2APIC, TSC deadline,
//! RDRAND, RDSEED, ERMS, FSRM, XSAVE, XSAVEOPT, XSAVEC, 1 GiB pages and NX; real, protected, compatibility and 64-bit mode; 4-level, PAE, PSE
//! and 32-bit paging. Not there: virtual-8086 mode, hardware task switching, PCID, LA57, AVX, VMX and SVM. What a CPU does not have, or what
//! its owner masked in CPUID, raises #UD.
//!
//! # How it works
//!
//! Instructions are decoded by iced-x86 into blocks of small records with a function each (`decode`, `cache`, `exec`); addresses go
//! through a software TLB (`tlb`, `mmu`, `mem`); everything rare happens between blocks (`cpu`). Memory order is that of the host: on hosts with a
//! weaker order than x86, CPUs of one machine must take turns on one thread.
//!
//! ```
//! use std::sync::Arc;
//! use vm_accel_softcpu::{Config, Cpu, Exit, NoBus, Ram};
//!
//! # fn main() -> Result<(), vm_accel_softcpu::RamError> {
//! // mov al, 42; out 0x80, al
//! let mut page = Box::new([0u128; 256]);
//! page[0] = u128::from(u32::from_le_bytes([0xb0, 42, 0xe6, 0x80]));
//! let host: *mut u8 = Box::leak(page).as_mut_ptr().cast();
//! let ram = Ram::new();
//! // SAFETY: the page is never freed and nothing else uses it.
//! unsafe { ram.map(0, host, 4096, true, Arc::new(()))? };
//! let mut cpu = Cpu::new(0, Config::default(), ram, Box::new(NoBus));
//! cpu.update(|state| {
//!     state.segs[1].base = 0;
//!     state.rip = 0;
//! });
//! assert_eq!(cpu.run(1000), Exit::Io { port: 0x80, size: 1, write: true });
//! assert_eq!(cpu.io_data(), [42]);
//! # Ok(())
//! # }
//! ```

#[cfg(test)]
mod block_tests;
mod bus;
mod cache;
mod core;
mod cpu;
#[cfg(test)]
mod cpu_tests;
mod cpuid;
mod debug;
mod decode;
mod exception;
mod exec;
mod exit;
mod flags;
mod intercept;
mod interrupt;
mod mem;
mod mmu;
mod msr;
mod ram;
mod replay;
mod segment;
pub mod state;
#[cfg(test)]
mod testing;
mod time;
mod tlb;

pub mod apic;
mod fp;
mod simd;

pub use bus::{Answer, Bus, MsrAnswer, NoBus};
pub use cpu::{Config, Cpu, Emulated};
pub use cpuid::CpuidEntry;
pub use exception::Exception;
pub use exit::{Exit, GuestDebug};
pub use intercept::Intercept;
pub use ram::{Kick, Ram, RamError};
pub use state::CpuState;
pub use time::TscMode;
