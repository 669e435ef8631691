//! Tiny guest programs for x86 and (in [`arm64`]) aarch64, assembled at run time, and the worlds in which they start.
//!
//! Shared by the library's conformance suite, the benchmarks and the demo of `vm-accel run`. Everything here is data: a
//! guest's architecture says nothing about the host's, so this crate builds and runs on any host. It knows no hypervisor
//! and must never depend on one: a [`World`](world::World) says which bytes belong where and which registers to set, and
//! whoever uses it sets them.

pub mod arm64;
pub mod demo;
mod elf;
pub mod kernels;
pub mod world;

pub use demo::demo;
/// What the closures of [`assemble`] fail with.
pub use iced_x86::IcedError;
/// The assembler that [`assemble`] drives: register names, memory operands, labels.
pub use iced_x86::code_asm as asm;

use iced_x86::code_asm::CodeAssembler;

/// Operand and address size of a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Bits {
    /// Real mode, or a 16-bit code segment.
    B16,
    /// A 32-bit code segment.
    B32,
    /// A 64-bit code segment.
    B64,
}

impl Bits {
    const fn number(self) -> u32 {
        match self {
            Self::B16 => 16,
            Self::B32 => 32,
            Self::B64 => 64,
        }
    }
}

/// Assembles a program that is to run at linear address `base`.
///
/// ```
/// use vm_accel_guests::{Bits, asm::*, assemble};
/// let program = assemble(Bits::B64, 0x8000, |a| {
///     a.mov(al, 7)?;
///     a.out(0xf4, al)
/// });
/// assert_eq!(program, [0xb0, 7, 0xe6, 0xf4]);
/// ```
///
/// # Panics
/// If the program does not assemble: it is written in this repository, so that is a bug of its author and no input of
/// anybody's.
#[must_use]
pub fn assemble(bits: Bits, base: u64, write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Vec<u8> {
    let mut assembler = CodeAssembler::new(bits.number()).expect("16, 32 and 64 are all there is");
    write(&mut assembler)
        .and_then(|()| assembler.assemble(base))
        .unwrap_or_else(|error| panic!("the guest program does not assemble: {error}"))
}
