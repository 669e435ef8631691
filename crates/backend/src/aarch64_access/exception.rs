//! What a VMM does about a trapped instruction: an access is taken over, or an exception taken.

use super::{Access, Cpu, Next, Stage1, Transfer, decode};
use vm_accel_core::accel::AccelKind;
use vm_accel_core::error::{AccelError, InstructionBytes, VcpuResult};
use vm_accel_core::regs::aarch64::{
    ELR_EL1, ESR_EL1, FAR_EL1, SCTLR_EL1, SPSR_EL1, TCR_EL1, TTBR0_EL1, TTBR1_EL1, VBAR_EL1,
};
use vm_accel_core::vcpu_common::{PendingAccess, VcpuExit};

/// Exception classes (Arm ARM, D24.2.40, "EC"); the aborts are a lower level's, one more is the same level's.
pub mod class {
    /// An instruction that the CPU does not know.
    pub const UNKNOWN: u64 = 0;
    /// From a lower exception level.
    pub const INSTRUCTION_ABORT: u64 = 0x20;
    /// From a lower exception level.
    pub const DATA_ABORT: u64 = 0x24;
    /// A system error.
    pub const SERROR: u64 = 0x2f;
}

/// PSTATE in SPSR layout (Arm ARM, C5.2.19).
pub mod pstate {
    /// Single step.
    pub const SS: u64 = 1 << 21;
    /// System errors are masked.
    pub const A: u64 = 1 << 8;
    /// AArch32, exception level, selected stack pointer.
    pub const MODE: u64 = 0x1f;
    /// The exception level.
    pub const EL: u64 = 0xc;
    /// The mode of EL1 with its own stack pointer.
    pub const EL1H: u64 = 5;
    /// What an exception keeps: the flags.
    pub const FLAGS: u64 = 0xf << 28;
    /// D, A, I, F.
    pub const MASKED: u64 = 0xf << 6;
}

/// In the syndrome of an abort: the access was a write.
pub const ISS_WRITE: u64 = 1 << 6;
/// In the syndrome of an abort: it came of a walk of the guest's tables.
pub const ISS_WALK: u64 = 1 << 7;
/// In the syndrome of an abort: it came of a cache maintenance instruction.
pub const ISS_CACHE: u64 = 1 << 8;
/// A synchronous external abort, as a fault status; and that FAR says nothing.
const EXTERNAL: u64 = 0x10;
const ISS_NO_ADDRESS: u64 = 1 << 10;
/// Offsets in a quarter of the vectors (Arm ARM, D1.3.1).
pub const SYNCHRONOUS: u64 = 0;
const SERROR: u64 = 0x180;

/// What that needs of a vCPU.
pub trait System: Cpu + Sized {
    /// The kind of backend, for errors.
    const KIND: AccelKind;

    /// The access that the VMM is asked for, if there is one.
    fn access(&self) -> &Option<Access>;
    /// The same, to change it.
    fn access_mut(&mut self) -> &mut Option<Access>;
    /// Of the last abort.
    fn syndrome(&self) -> u64;
    /// The program counter and PSTATE.
    fn state(&self) -> VcpuResult<(u64, u64)>;
    /// Sets the program counter and PSTATE.
    fn set_state(&mut self, pc: u64, pstate: u64) -> VcpuResult<()>;
    /// A system register, by its number in `vm_accel_core::aarch64`.
    fn sys(&self, register: u16) -> VcpuResult<u64>;
    /// Sets a system register.
    fn set_sys(&mut self, register: u16, value: u64) -> VcpuResult<()>;

    /// Lets the guest take an exception at EL1 (Arm ARM, D1.3.2, "AArch64.TakeException").
    fn inject(&mut self, vector: u64, syndrome: u64, far: Option<u64>) -> VcpuResult<()> {
        let (pc, pstate) = self.state()?;
        let pstate = pstate & !pstate::SS;
        let quarter = match pstate & pstate::MODE {
            mode if mode & pstate::EL == 0 => 0x400,
            pstate::EL1H => 0x200,
            _ => 0,
        };
        self.set_sys(ESR_EL1, syndrome)?;
        if let Some(far) = far {
            self.set_sys(FAR_EL1, far)?;
        }
        self.set_sys(ELR_EL1, pc)?;
        self.set_sys(SPSR_EL1, pstate)?;
        let vectors = self.sys(VBAR_EL1)?;
        self.set_state(vectors.wrapping_add(quarter + vector), pstate & pstate::FLAGS | pstate::MASKED | pstate::EL1H)
    }

    /// The access that was aborted with this syndrome, at this virtual address if it is known, ends with an external abort.
    fn external_abort(&mut self, syndrome: u64, far: Option<u64>) -> VcpuResult<()> {
        let from_el0 = self.state()?.1 & pstate::EL == 0;
        let class = syndrome >> 26 & 0x3f | u64::from(!from_el0);
        let unknown = if far.is_none() { ISS_NO_ADDRESS } else { 0 };
        let syndrome = class << 26 | 1 << 25 | syndrome & ISS_WRITE | unknown | EXTERNAL;
        self.inject(SYNCHRONOUS, syndrome, far)
    }

    /// Delivers a system error that waits, if the guest does not mask it: true if it was.
    fn take_serror(&mut self, waiting: &mut Option<u64>) -> VcpuResult<bool> {
        let Some(syndrome) = *waiting else {
            return Ok(false);
        };
        if self.state()?.1 & pstate::A != 0 {
            return Ok(false);
        }
        self.inject(SERROR, class::SERROR << 26 | 1 << 25 | syndrome & 0x1ff_ffff, None)?;
        *waiting = None;
        Ok(true)
    }

    /// The instruction at the program counter is done.
    fn skip(&mut self) -> VcpuResult<()> {
        let (pc, pstate) = self.state()?;
        self.set_state(pc.wrapping_add(4), pstate)
    }

    /// The guest's translation, and the instruction that it is at.
    fn instruction(&self) -> VcpuResult<(Stage1, Option<u32>)> {
        let stage1 = Stage1 {
            sctlr: self.sys(SCTLR_EL1)?,
            tcr: self.sys(TCR_EL1)?,
            ttbr0: self.sys(TTBR0_EL1)?,
            ttbr1: self.sys(TTBR1_EL1)?,
        };
        let (pc, _) = self.state()?;
        let table = |gpa| {
            let mut word = [0; 8];
            self.memory(gpa, false, &mut word).then(|| u64::from_le_bytes(word))
        };
        let word = stage1.translate(pc, table).and_then(|gpa| {
            let mut word = [0; 4];
            self.memory(gpa, false, &mut word).then(|| u32::from_le_bytes(word))
        });
        Ok((stage1, word))
    }

    /// The load or store that was aborted with this syndrome at a guest physical address.
    fn aborted(&self, syndrome: u64, gpa: u64) -> VcpuResult<Access> {
        if let Some(transfer) = Transfer::told(syndrome) {
            return Access::told(transfer, gpa, self);
        }
        let (stage1, word) = self.instruction()?;
        let transfer = word.filter(|_| !stage1.is_big_endian()).and_then(decode);
        Access::decoded(transfer.ok_or_else(|| self.undecoded(word))?, stage1, self)
    }

    /// A data abort where no memory is.
    fn data_abort(&mut self, syndrome: u64, far: Option<u64>, gpa: u64) -> VcpuResult<Option<VcpuExit>> {
        if syndrome & ISS_WALK != 0 {
            // The guest's tables are there.
            self.external_abort(syndrome, far)?;
        } else if syndrome & ISS_CACHE != 0 {
            // Nothing to maintain.
            self.skip()?;
        } else {
            *self.access_mut() = Some(self.aborted(syndrome, gpa)?);
        }
        self.resume()
    }

    /// Goes on with an access of the VMM's. `Some` if it needs the VMM again.
    fn resume(&mut self) -> VcpuResult<Option<VcpuExit>> {
        let Some(mut access) = self.access_mut().take() else {
            return Ok(None);
        };
        if let Some(PendingAccess { addr, len, answered: false, .. }) = access.pending() {
            *self.access_mut() = Some(access);
            return Err(AccelError::PendingRead { addr, len });
        }
        match access.resume(self)? {
            Next::Exit(exit) => {
                *self.access_mut() = Some(access);
                Ok(Some(exit))
            }
            Next::Done => Ok(None),
            Next::Lost => Err(self.undecoded(None)),
        }
    }

    /// The access that the VMM was asked for, in this direction.
    fn expect(&self, what: &'static str, is_write: bool) -> VcpuResult<(&Access, PendingAccess)> {
        let access = self.access().as_ref().and_then(|access| Some((access, access.pending()?)));
        access
            .filter(|(_, pending)| pending.is_write == is_write)
            .ok_or_else(|| AccelError::invalid(what, "no such access is pending"))
    }

    /// The VMM's answer to a read.
    fn answer(&mut self, data: &[u8]) -> VcpuResult<()> {
        let (_, pending) = self.expect("answer to a read", false)?;
        if data.len() != pending.len {
            let detail = format!("{} bytes for a read of {}", data.len(), pending.len);
            return Err(AccelError::invalid("answer to a read", detail));
        }
        if let Some(access) = self.access_mut() {
            access.answer(data);
        }
        Ok(())
    }

    /// That the instruction cannot be done here.
    fn undecoded(&self, word: Option<u32>) -> AccelError {
        AccelError::Emulation {
            kind: Self::KIND,
            code: self.syndrome() as u32,
            pc: self.state().map_or(0, |(pc, _)| pc),
            instruction: word.map_or_else(Default::default, |word| InstructionBytes::new(&word.to_le_bytes())),
        }
    }
}
