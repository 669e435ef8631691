//! A vCPU for tests that plays a script of exits, obeys the completion protocol, and waits for a kick at the end.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex};

use vm_accel::{AccelError, FpuRegs, GuestRegs, KickTarget, PendingAccess, VcpuExit, VcpuKick, VcpuOps, VcpuResult};

use crate::bus::lock;

/// What `run` does next.
#[derive(Debug, Clone)]
pub(crate) enum Step {
    /// An exit that transfers nothing.
    Exit(VcpuExit),
    /// An exit with data from the guest.
    Write(VcpuExit, Vec<u8>),
    /// An exit that wants so many bytes.
    Read(VcpuExit, usize),
    /// An exit that must be refused.
    Msr(VcpuExit),
    /// An error.
    Error(AccelError),
    /// A bug.
    Panic(&'static str),
}

/// A sticky kick.
#[derive(Default)]
pub(crate) struct Kicked {
    flag: Mutex<bool>,
    changed: Condvar,
}

impl KickTarget for Kicked {
    fn kick(&self) {
        *lock(&self.flag) = true;
        self.changed.notify_all();
    }
}

/// The vCPU.
pub(crate) struct Script {
    id: u32,
    steps: VecDeque<Step>,
    written: Option<Vec<u8>>,
    wanted: Option<usize>,
    must_refuse: bool,
    kicked: Arc<Kicked>,
    pub(crate) regs: GuestRegs,
    pub(crate) answers: Vec<Vec<u8>>,
    pub(crate) refused: usize,
}

impl Script {
    pub(crate) fn new(id: u32, steps: Vec<Step>) -> Self {
        Self {
            id,
            steps: steps.into(),
            written: None,
            wanted: None,
            must_refuse: false,
            kicked: Arc::default(),
            regs: GuestRegs { pc: 0x1234, ..GuestRegs::default() },
            answers: Vec::new(),
            refused: 0,
        }
    }

    /// Steps that were not played.
    pub(crate) fn left(&self) -> usize {
        self.steps.len()
    }
}

impl VcpuOps for Script {
    fn get_id(&self) -> u32 {
        self.id
    }

    fn run(&mut self) -> VcpuResult<VcpuExit> {
        if let Some(len) = self.wanted {
            return Err(AccelError::PendingRead { addr: 0, len });
        }
        assert!(!self.must_refuse, "an MSR access was neither answered nor refused");
        self.written = None;
        match self.steps.pop_front() {
            Some(Step::Exit(exit)) => Ok(exit),
            Some(Step::Write(exit, data)) => {
                self.written = Some(data);
                Ok(exit)
            }
            Some(Step::Read(exit, len)) => {
                self.wanted = Some(len);
                Ok(exit)
            }
            Some(Step::Msr(exit)) => {
                self.must_refuse = true;
                Ok(exit)
            }
            Some(Step::Error(error)) => Err(error),
            Some(Step::Panic(message)) => panic!("{message}"),
            None => {
                let mut flag = lock(&self.kicked.flag);
                while !std::mem::take(&mut *flag) {
                    flag = self.kicked.changed.wait(flag).unwrap();
                }
                Ok(VcpuExit::Interrupt)
            }
        }
    }

    fn get_regs(&self) -> VcpuResult<GuestRegs> {
        Ok(self.regs)
    }

    fn set_regs(&mut self, regs: &GuestRegs) -> VcpuResult<()> {
        self.regs = *regs;
        Ok(())
    }

    fn get_fpu_regs(&self) -> VcpuResult<FpuRegs> {
        Err(self.unsupported("floating point"))
    }

    fn set_fpu_regs(&mut self, _: &FpuRegs) -> VcpuResult<()> {
        Err(self.unsupported("floating point"))
    }

    fn io_data(&self) -> VcpuResult<&[u8]> {
        self.written.as_deref().ok_or_else(|| self.unsupported("data of an exit without any"))
    }

    fn complete_read(&mut self, data: &[u8]) -> VcpuResult<()> {
        assert_eq!(self.wanted.take(), Some(data.len()));
        self.answers.push(data.to_vec());
        Ok(())
    }

    fn fail_access(&mut self) -> VcpuResult<()> {
        assert!(std::mem::take(&mut self.must_refuse));
        self.refused += 1;
        Ok(())
    }

    fn pending_access(&self) -> Option<PendingAccess> {
        self.wanted.map(|len| PendingAccess { addr: 0, len, is_write: false, answered: false })
    }

    fn kick_handle(&self) -> VcpuResult<VcpuKick> {
        Ok(VcpuKick::new(self.kicked.clone()))
    }
}
