//! What a scripted guest does, step by step.
//!
//! A script must never describe what no backend can do: [`Script::check`] refuses it before a test runs on it.

use crate::error::{AccelError, VcpuResult};
use crate::regs::GuestRegs;
use crate::vcpu_common::{DebugEvent, IoDirection, VcpuExit};

/// How the VMM has to answer a read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// With exactly these bytes.
    Exactly(Vec<u8>),
    /// With any bytes, this many.
    Any(usize),
    /// With [`VcpuOps::fail_access`](crate::VcpuOps::fail_access). Only reads of MSRs can be refused.
    Refused,
}

impl Answer {
    /// [`Answer::Exactly`] these bytes.
    #[must_use]
    pub fn exactly(bytes: impl AsRef<[u8]>) -> Self {
        Self::Exactly(bytes.as_ref().to_vec())
    }
}

/// What an access transfers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Transfer {
    /// The guest writes these bytes; true if the VMM has to refuse them (MSRs only).
    Write(Vec<u8>, bool),
    /// The guest reads.
    Read(Answer),
}

/// One access of the guest that the VMM completes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Access {
    pub(super) exit: VcpuExit,
    pub(super) transfer: Transfer,
    /// True if the same instruction goes on with the next step.
    pub(super) continues: bool,
}

impl Access {
    /// Port, guest physical address or MSR.
    pub(super) fn addr(&self) -> u64 {
        match self.exit {
            VcpuExit::Io { port, .. } => u64::from(port),
            VcpuExit::Mmio { addr, .. } => addr,
            VcpuExit::Msr { index, .. } => u64::from(index),
            _ => 0,
        }
    }

    /// Bytes that are transferred. Refused reads are of MSRs: 8.
    pub(super) fn len(&self) -> usize {
        match &self.transfer {
            Transfer::Write(bytes, _) | Transfer::Read(Answer::Exactly(bytes)) => bytes.len(),
            Transfer::Read(Answer::Any(len)) => *len,
            Transfer::Read(Answer::Refused) => 8,
        }
    }

    fn is_msr(&self) -> bool {
        matches!(self.exit, VcpuExit::Msr { .. })
    }

    /// What is wrong with the access, if anything.
    fn flaw(&self) -> Option<&'static str> {
        let len = self.len();
        let refused = matches!(self.transfer, Transfer::Write(_, true) | Transfer::Read(Answer::Refused));
        match self.exit {
            _ if refused && !self.is_msr() => Some("only accesses to MSRs can be refused"),
            VcpuExit::Io { size, .. } if !matches!(size, 1 | 2 | 4) => Some("an I/O element has 1, 2 or 4 bytes"),
            VcpuExit::Io { size, .. } if len == 0 || len % usize::from(size) != 0 => {
                Some("an I/O access transfers whole elements, at least one")
            }
            VcpuExit::Mmio { .. } if !(1..=8).contains(&len) => Some("an MMIO access has 1 to 8 bytes"),
            VcpuExit::Msr { .. } if len != 8 => Some("an MSR has 8 bytes"),
            _ => None,
        }
    }
}

/// One step of a script.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    Access(Access),
    Exit(VcpuExit),
    Debug(DebugEvent),
    Fail(AccelError),
    SetReg(usize, u64),
    ExpectReg(usize, u64),
}

/// What a [`ScriptedVcpu`](super::ScriptedVcpu)'s guest does, in order. Built by chained calls.
///
/// Register numbers are indices of [`GuestRegs`]: `x86_64::Reg::Rax as usize`, [`GuestRegs::PC`], …
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[must_use]
pub struct Script {
    pub(super) steps: Vec<Step>,
    /// The first [`Script::same_instruction`] that did not follow an access.
    misplaced: Option<usize>,
}

impl Script {
    /// A guest that does nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// The guest reads elements of `size` bytes from a port; more than one if the answer is longer (REP INS).
    pub fn io_in(self, port: u16, size: u8, answer: Answer) -> Self {
        let direction = IoDirection::In;
        self.access(VcpuExit::Io { port, direction, size }, Transfer::Read(answer))
    }

    /// The guest writes elements of `size` bytes to a port; more than one if `data` is longer (REP OUTS).
    pub fn io_out(self, port: u16, size: u8, data: impl AsRef<[u8]>) -> Self {
        let direction = IoDirection::Out;
        let transfer = Transfer::Write(data.as_ref().to_vec(), false);
        self.access(VcpuExit::Io { port, direction, size }, transfer)
    }

    /// The guest reads from a guest physical address; the answer says how many bytes.
    pub fn mmio_read(self, addr: u64, answer: Answer) -> Self {
        self.mmio(addr, Transfer::Read(answer))
    }

    /// The guest writes to a guest physical address.
    pub fn mmio_write(self, addr: u64, data: impl AsRef<[u8]>) -> Self {
        self.mmio(addr, Transfer::Write(data.as_ref().to_vec(), false))
    }

    /// The guest executes RDMSR.
    pub fn msr_read(self, index: u32, answer: Answer) -> Self {
        let is_write = false;
        self.access(VcpuExit::Msr { index, is_write }, Transfer::Read(answer))
    }

    /// The guest executes WRMSR; the VMM has to accept it, or to refuse it if `refused`.
    pub fn msr_write(self, index: u32, value: u64, refused: bool) -> Self {
        let is_write = true;
        let transfer = Transfer::Write(value.to_le_bytes().to_vec(), refused);
        self.access(VcpuExit::Msr { index, is_write }, transfer)
    }

    /// The instruction of the access before is not done: it goes on with the access that follows. `quiesce()` gives
    /// that access, too, before it answers [`VcpuExit::Interrupt`].
    pub fn same_instruction(mut self) -> Self {
        match self.steps.last_mut() {
            Some(Step::Access(access)) => access.continues = true,
            _ => self.misplaced = self.misplaced.or(Some(self.steps.len())),
        }
        self
    }

    /// `run()` returns an exit that transfers nothing ([`VcpuExit::Halted`], [`VcpuExit::SystemCall`], …).
    pub fn exit(self, exit: VcpuExit) -> Self {
        self.step(Step::Exit(exit))
    }

    /// `run()` returns [`VcpuExit::Debug`] with this event.
    pub fn debug(self, event: DebugEvent) -> Self {
        self.step(Step::Debug(event))
    }

    /// `run()` fails with this error. The next `run()` goes on with the next step.
    pub fn fail(self, error: AccelError) -> Self {
        self.step(Step::Fail(error))
    }

    /// The guest changes a register before its next exit.
    pub fn set_reg(self, index: usize, value: u64) -> Self {
        self.step(Step::SetReg(index, value))
    }

    /// When the guest runs next, the register must have this value: what the VMM was to put there.
    pub fn expect_reg(self, index: usize, value: u64) -> Self {
        self.step(Step::ExpectReg(index, value))
    }

    fn mmio(self, addr: u64, transfer: Transfer) -> Self {
        let mut access = Access { exit: VcpuExit::Unknown, transfer, continues: false };
        access.exit = VcpuExit::Mmio {
            addr,
            // A length that no u8 holds is one that `check` refuses.
            size: u8::try_from(access.len()).unwrap_or(u8::MAX),
            is_write: matches!(access.transfer, Transfer::Write(..)),
        };
        self.step(Step::Access(access))
    }

    fn access(self, exit: VcpuExit, transfer: Transfer) -> Self {
        self.step(Step::Access(Access { exit, transfer, continues: false }))
    }

    fn step(mut self, step: Step) -> Self {
        self.steps.push(step);
        self
    }

    /// Refuses what no backend can do; the error names the step, counted from 1.
    pub(super) fn check(&self) -> VcpuResult<()> {
        if let Some(step) = self.misplaced {
            return Err(flaw(step, "same_instruction needs an access before it"));
        }
        for (index, step) in self.steps.iter().enumerate() {
            let found = match step {
                Step::Access(access)
                    if access.continues && !matches!(self.steps.get(index + 1), Some(Step::Access(_))) =>
                {
                    Some("same_instruction needs an access behind it")
                }
                Step::Access(access) => access.flaw(),
                Step::Exit(VcpuExit::Io { .. } | VcpuExit::Mmio { .. } | VcpuExit::Msr { .. } | VcpuExit::Debug) => {
                    Some("this exit transfers something and has a call of its own")
                }
                Step::SetReg(reg, _) | Step::ExpectReg(reg, _) if *reg > GuestRegs::FLAGS => {
                    Some("there is no register of this number")
                }
                _ => None,
            };
            if let Some(text) = found {
                return Err(flaw(index + 1, text));
            }
        }
        Ok(())
    }
}

fn flaw(step: usize, text: &str) -> AccelError {
    AccelError::invalid("script", format!("step {step}: {text}"))
}
