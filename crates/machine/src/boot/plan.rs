//! What a boot protocol decided: what is written where, and how the boot CPU begins. Nothing in here parses.

use super::layout::{Layout, Side};
use super::x86::X86BootState;
use super::{BootError, MemoryMap, Protocol};
use std::borrow::Cow;
use std::fmt;
use std::ops::Range;
use vm_accel::GuestRegs;

/// Guest memory as the loader sees it: something to write to.
pub trait MemorySink {
    /// Why a write failed.
    type Error;

    /// Writes `data` at guest physical address `gpa`.
    ///
    /// # Errors
    /// If part of it is not memory, or is read-only.
    fn write(&mut self, gpa: u64, data: &[u8]) -> Result<(), Self::Error>;

    /// Writes `len` zeros at guest physical address `gpa`.
    ///
    /// # Errors
    /// If part of it is not memory, or is read-only.
    fn zero(&mut self, gpa: u64, len: u64) -> Result<(), Self::Error>;
}

/// Bytes that go into guest RAM, followed by zeros.
#[derive(Clone, PartialEq, Eq)]
pub struct Chunk<'a> {
    /// What it is, for messages.
    pub what: &'static str,
    /// Guest physical address of the first byte.
    pub gpa: u64,
    /// The bytes.
    pub data: Cow<'a, [u8]>,
    /// Zero bytes that follow (an image's BSS). They matter when a machine is reset: its memory is not fresh then.
    pub zeros: u64,
}

/// Memory outside the guest's RAM that the board must provide, with this content.
#[derive(Clone, PartialEq, Eq)]
pub struct Mapping<'a> {
    /// What it is, for messages.
    pub what: &'static str,
    /// Guest physical address, page aligned.
    pub gpa: u64,
    /// The content, a multiple of 4 KiB.
    pub data: &'a [u8],
    /// False: a ROM. True: the guest may write to it (firmware that runs from its legacy copy does).
    pub writable: bool,
}

// Kernels have megabytes: their size says enough.
impl fmt::Debug for Chunk<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (what, gpa, len, zeros) = (self.what, self.gpa, self.data.len(), self.zeros);
        write!(f, "Chunk {{ {what} at {gpa:#x}, {len:#x} bytes and {zeros:#x} zeros }}")
    }
}

impl fmt::Debug for Mapping<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (what, gpa, len, writable) = (self.what, self.gpa, self.data.len(), self.writable);
        write!(f, "Mapping {{ {what} at {gpa:#x}, {len:#x} bytes, writable: {writable} }}")
    }
}

/// How the boot CPU begins. The other CPUs wait as they do after reset (for a startup IPI, or for PSCI).
#[non_exhaustive]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
// One exists per machine that is started; a box would only be in the way.
#[allow(clippy::large_enum_variant)]
pub enum BootState {
    /// An x86 CPU.
    X86(X86BootState),
    /// An aarch64 CPU, MMU and caches off as after reset: X0–X30, the program counter and PSTATE. (Linux
    /// `Documentation/arch/arm64/booting.rst`.)
    Aarch64(GuestRegs),
}

/// A guest ready to be written to memory.
///
/// No two [`chunks`](BootPlan::chunks) overlap, all lie inside usable RAM of the memory map, and so does the entry point
/// (for firmware: inside a [mapping](BootPlan::mappings)).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BootPlan<'a> {
    /// The protocol; the detected one if detection was asked for.
    pub protocol: Protocol,
    /// What goes into RAM.
    pub chunks: Vec<Chunk<'a>>,
    /// What the board must provide besides RAM.
    pub mappings: Vec<Mapping<'a>>,
    /// Where the boot CPU begins.
    pub state: BootState,
    /// Where the initial RAM disk is; a device tree must name it.
    pub initrd: Option<Range<u64>>,
    /// Room for a device tree, which the board writes at its start; X0 points to it. Only on aarch64.
    pub device_tree: Option<Range<u64>>,
}

impl BootPlan<'_> {
    /// Writes every chunk. [Mappings](BootPlan::mappings) are the board's to make.
    ///
    /// # Errors
    /// The sink's first error; memory then holds a part of the guest.
    pub fn load<S: MemorySink>(&self, memory: &mut S) -> Result<(), S::Error> {
        for chunk in &self.chunks {
            memory.write(chunk.gpa, &chunk.data)?;
            if chunk.zeros > 0 {
                memory.zero(chunk.gpa + chunk.data.len() as u64, chunk.zeros)?;
            }
        }
        Ok(())
    }
}

/// Collects what a protocol places; the only way to make a [`BootPlan`].
#[derive(Debug)]
pub(crate) struct Builder<'a> {
    protocol: Protocol,
    layout: Layout,
    chunks: Vec<Chunk<'a>>,
    pub(crate) mappings: Vec<Mapping<'a>>,
    pub(crate) initrd: Option<Range<u64>>,
    pub(crate) device_tree: Option<Range<u64>>,
}

impl<'a> Builder<'a> {
    pub(crate) fn new(protocol: Protocol, map: &MemoryMap) -> Self {
        Self {
            protocol,
            layout: Layout::new(protocol, map),
            chunks: Vec::new(),
            mappings: Vec::new(),
            initrd: None,
            device_tree: None,
        }
    }

    /// Takes `size` bytes at `gpa`, which the image dictates, and puts `data` there. Bytes of `size` behind `data` are
    /// zeros.
    pub(crate) fn place(
        &mut self,
        what: &'static str,
        gpa: u64,
        size: u64,
        data: impl Into<Cow<'a, [u8]>>,
    ) -> Result<(), BootError> {
        self.layout.claim(what, gpa, size)?;
        let data = data.into();
        let zeros = size.saturating_sub(data.len() as u64);
        self.push(what, gpa, data, zeros);
        Ok(())
    }

    /// Finds `size` bytes in `window` at a multiple of `align` and takes them; [`Builder::fill`] writes them.
    pub(crate) fn reserve(
        &mut self,
        what: &'static str,
        size: u64,
        align: u64,
        window: Range<u64>,
        side: Side,
    ) -> Result<u64, BootError> {
        self.layout.allocate(what, size, align, window, side)
    }

    /// Finds a place for `data` in `window` at a multiple of `align` and puts it there. Returns its address.
    pub(crate) fn put(
        &mut self,
        what: &'static str,
        data: impl Into<Cow<'a, [u8]>>,
        align: u64,
        window: Range<u64>,
        side: Side,
    ) -> Result<u64, BootError> {
        let data = data.into();
        let gpa = self.reserve(what, data.len() as u64, align, window, side)?;
        self.push(what, gpa, data, 0);
        Ok(gpa)
    }

    /// Puts `data` at the start of a place that is reserved already.
    pub(crate) fn fill(&mut self, what: &'static str, gpa: u64, data: impl Into<Cow<'a, [u8]>>, zeros: u64) {
        self.push(what, gpa, data.into(), zeros);
    }

    fn push(&mut self, what: &'static str, gpa: u64, data: Cow<'a, [u8]>, zeros: u64) {
        if !data.is_empty() || zeros > 0 {
            self.chunks.push(Chunk { what, gpa, data, zeros });
        }
    }

    pub(crate) fn finish(self, state: BootState) -> BootPlan<'a> {
        BootPlan {
            protocol: self.protocol,
            chunks: self.chunks,
            mappings: self.mappings,
            state,
            initrd: self.initrd,
            device_tree: self.device_tree,
        }
    }
}
