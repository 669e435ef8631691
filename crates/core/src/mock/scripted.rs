//! The vCPU that plays a [`Script`].

use super::script::{Access, Answer, Script, Step, Transfer};
use crate::error::{AccelError, VcpuResult};
use crate::regs::{FpuRegs, GuestRegs, x86_64};
use crate::vcpu_common::{DebugEvent, GuestDebug, KickTarget, PendingAccess, VcpuExit, VcpuKick, VcpuOps};
use std::mem;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A vCPU whose exits come from a [`Script`] and that checks what the VMM does about them.
///
/// A deviation (a wrong answer, a register that lacks the expected value, a run beyond the script's end) is an
/// [`AccelError::InvalidArgument`] that names the step; it is returned at once, by every later `run()` and
/// `quiesce()`, and by [`finish`](Self::finish), so that a VMM that swallows errors is found out.
///
/// An unanswered read is [`AccelError::PendingRead`] and no deviation: real VMMs may answer it then. Registers,
/// floating-point registers and debug settings are kept as they are set. Kicks are sticky.
#[derive(Debug)]
pub struct ScriptedVcpu {
    id: u32,
    steps: Vec<Step>,
    /// The step that comes next.
    next: usize,
    regs: GuestRegs,
    fpu: FpuRegs,
    debug: GuestDebug,
    kick: Arc<Kick>,
    pending: Option<Pending>,
    debug_event: Option<DebugEvent>,
    deviation: Option<AccelError>,
}

/// The access of the last exit.
#[derive(Debug)]
struct Pending {
    access: Access,
    answered: bool,
    refused: bool,
}

#[derive(Debug, Default)]
struct Kick(AtomicBool);

impl KickTarget for Kick {
    fn kick(&self) {
        // Release pairs with the Acquire in `run`: what the kicker did before is seen by who handles the Interrupt.
        self.0.store(true, Ordering::Release);
    }
}

impl ScriptedVcpu {
    /// A vCPU with cleared registers and x86-64's initial floating-point state.
    ///
    /// # Errors
    /// [`AccelError::InvalidArgument`] if the script contains what no backend can do; the error names the step.
    pub fn new(id: u32, script: Script) -> VcpuResult<Self> {
        script.check()?;
        Ok(Self {
            id,
            steps: script.steps,
            next: 0,
            regs: GuestRegs::default(),
            fpu: FpuRegs::X86(x86_64::X86FpuRegs::default()),
            debug: GuestDebug::default(),
            kick: Arc::default(),
            pending: None,
            debug_event: None,
            deviation: None,
        })
    }

    /// The same with other floating-point registers, which also say what architecture the guest is.
    #[must_use]
    pub fn with_fpu_regs(mut self, fpu: FpuRegs) -> Self {
        self.fpu = fpu;
        self
    }

    /// Steps of the script that were not played yet.
    #[must_use]
    pub fn steps_left(&self) -> usize {
        self.steps.len() - self.next
    }

    /// What was last set with [`VcpuOps::set_guest_debug`].
    #[must_use]
    pub fn guest_debug(&self) -> &GuestDebug {
        &self.debug
    }

    /// Tells whether the VMM did all that the script asks for. To be called at the end of a test.
    ///
    /// # Errors
    /// The first deviation; [`AccelError::PendingRead`] if the last read was not answered; [`AccelError::InvalidArgument`] if
    /// steps are left, or if a last access was to be refused and was not.
    pub fn finish(&self) -> VcpuResult<()> {
        if let Some(deviation) = &self.deviation {
            return Err(deviation.clone());
        }
        self.check_pending()?;
        match self.steps_left() {
            0 => Ok(()),
            left => Err(self.complaint(format!("{left} steps of the script were not played"))),
        }
    }

    /// An error that names the step that was played last, counted from 1.
    fn complaint(&self, text: impl std::fmt::Display) -> AccelError {
        AccelError::invalid("use of the scripted vCPU", format!("step {}: {text}", self.next))
    }

    /// Records a deviation.
    fn deviate(&mut self, text: impl std::fmt::Display) -> AccelError {
        let error = self.complaint(text);
        self.deviation.get_or_insert(error).clone()
    }

    /// Whether the VMM did what the last exit asks for.
    fn check_pending(&self) -> VcpuResult<()> {
        match &self.pending {
            Some(pending) if !pending.answered => {
                Err(AccelError::PendingRead { addr: pending.access.addr(), len: pending.access.len() })
            }
            Some(Pending { access: Access { transfer: Transfer::Write(_, true), .. }, refused: false, .. }) => {
                Err(self.complaint("the VMM had to refuse this write and did not"))
            }
            _ => Ok(()),
        }
    }

    /// Finishes the access of the last exit. True if its instruction goes on with the next step.
    fn complete(&mut self) -> VcpuResult<bool> {
        if let Some(deviation) = &self.deviation {
            return Err(deviation.clone());
        }
        if let Err(error) = self.check_pending() {
            if !matches!(error, AccelError::PendingRead { .. }) {
                self.deviation = Some(error.clone());
            }
            return Err(error);
        }
        self.debug_event = None;
        // A refused access raises an exception, which ends the instruction.
        Ok(self.pending.take().is_some_and(|pending| pending.access.continues && !pending.refused))
    }

    /// Plays the script up to and including the next exit.
    fn play(&mut self) -> VcpuResult<VcpuExit> {
        while let Some(step) = self.steps.get(self.next).cloned() {
            self.next += 1;
            match step {
                Step::SetReg(index, value) => self.regs.set(index, value),
                Step::ExpectReg(index, value) => {
                    let found = self.regs.get(index);
                    if found != value {
                        return Err(
                            self.deviate(format_args!("register {index} is {found:#x}, the script expects {value:#x}"))
                        );
                    }
                }
                Step::Fail(error) => return Err(error),
                Step::Exit(exit) => return Ok(exit),
                Step::Debug(event) => {
                    self.debug_event = Some(event);
                    return Ok(VcpuExit::Debug);
                }
                Step::Access(access) => {
                    let exit = access.exit;
                    self.pending = Some(Pending {
                        answered: matches!(access.transfer, Transfer::Write(..)),
                        refused: false,
                        access,
                    });
                    return Ok(exit);
                }
            }
        }
        Err(self.deviate("the script is at its end, but the VMM runs the guest on"))
    }
}

impl VcpuOps for ScriptedVcpu {
    fn get_id(&self) -> u32 {
        self.id
    }

    fn run(&mut self) -> VcpuResult<VcpuExit> {
        let continues = self.complete()?;
        // An instruction that is under way comes first; the kick stays for the next call.
        if !continues && self.kick.0.swap(false, Ordering::Acquire) {
            return Ok(VcpuExit::Interrupt);
        }
        self.play()
    }

    fn quiesce(&mut self) -> VcpuResult<VcpuExit> {
        match self.complete()? {
            true => self.play(),
            false => Ok(VcpuExit::Interrupt),
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
        Ok(self.fpu)
    }

    fn set_fpu_regs(&mut self, regs: &FpuRegs) -> VcpuResult<()> {
        if mem::discriminant(regs) != mem::discriminant(&self.fpu) {
            return Err(AccelError::invalid("floating-point registers", "they are another architecture's"));
        }
        self.fpu = *regs;
        Ok(())
    }

    fn io_data(&self) -> VcpuResult<&[u8]> {
        match &self.pending {
            Some(Pending { access: Access { transfer: Transfer::Write(data, _), .. }, .. }) => Ok(data),
            _ => Err(self.complaint("the last exit is not a write, it has no data")),
        }
    }

    fn complete_read(&mut self, data: &[u8]) -> VcpuResult<()> {
        let Some(Pending { access, answered: answered @ false, .. }) = &mut self.pending else {
            return Err(self.complaint("no read is pending"));
        };
        let len = access.len();
        if data.len() != len {
            return Err(self.complaint(format_args!("the guest reads {len} bytes, not {}", data.len())));
        }
        let wrong = match &access.transfer {
            Transfer::Read(Answer::Exactly(expected)) if expected != data => {
                Some(format!("the answer is {data:02x?}, the script expects {expected:02x?}"))
            }
            Transfer::Read(Answer::Refused) => Some("the VMM had to refuse this read and answered it".into()),
            _ => None,
        };
        match wrong {
            Some(text) => Err(self.deviate(text)),
            None => {
                *answered = true;
                Ok(())
            }
        }
    }

    fn fail_access(&mut self) -> VcpuResult<()> {
        let Some(pending) = &mut self.pending else {
            return Err(self.complaint("no access is pending"));
        };
        if !matches!(pending.access.exit, VcpuExit::Msr { .. }) {
            return Err(self.complaint("only accesses to MSRs can be refused"));
        }
        if !matches!(pending.access.transfer, Transfer::Write(_, true) | Transfer::Read(Answer::Refused)) {
            return Err(self.deviate("the VMM refused an access that it had to accept"));
        }
        pending.answered = true;
        pending.refused = true;
        Ok(())
    }

    fn pending_access(&self) -> Option<PendingAccess> {
        self.pending.as_ref().map(|pending| PendingAccess {
            addr: pending.access.addr(),
            len: pending.access.len(),
            is_write: matches!(pending.access.transfer, Transfer::Write(..)),
            answered: pending.answered,
        })
    }

    fn kick_handle(&self) -> VcpuResult<VcpuKick> {
        Ok(VcpuKick::new(self.kick.clone()))
    }

    fn set_guest_debug(&mut self, debug: &GuestDebug) -> VcpuResult<()> {
        self.debug = debug.clone();
        Ok(())
    }

    fn debug_event(&self) -> VcpuResult<DebugEvent> {
        self.debug_event.ok_or_else(|| self.complaint("the last exit is not a debug exit"))
    }
}

#[cfg(test)]
mod tests;
