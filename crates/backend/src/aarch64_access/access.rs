//! A load or store that a VMM has to finish, one access at a time, as the completion protocol asks. Where the CPU told what
//! the instruction does it is one access at a known address; where not, the instruction was decoded and the guest's
//! tables are walked for each part.

use super::{MOST, Stage1, Transfer};
use vm_accel_core::error::VcpuResult;
use vm_accel_core::regs::GuestRegs;
use vm_accel_core::regs::aarch64::Aarch64FpuRegs;
use vm_accel_core::vcpu_common::{PendingAccess, VcpuExit};

/// Pages of the smallest granule: an access does not cross one in one piece.
const PAGE: u64 = 4096;

/// What finishing an access needs of a vCPU.
pub trait Cpu {
    /// The general registers.
    fn regs(&self) -> VcpuResult<GuestRegs>;
    /// Sets the general registers.
    fn set_regs(&mut self, regs: &GuestRegs) -> VcpuResult<()>;
    /// The SIMD registers.
    fn fpu(&self) -> VcpuResult<Aarch64FpuRegs>;
    /// Sets the SIMD registers.
    fn set_fpu(&mut self, regs: &Aarch64FpuRegs) -> VcpuResult<()>;
    /// Moves bytes to or from mapped memory; false if they are not in it, or must not be written.
    fn memory(&self, gpa: u64, is_write: bool, data: &mut [u8]) -> bool;
}

/// Where the bytes are.
#[derive(Debug, Clone, Copy)]
enum Place {
    Physical(u64),
    Virtual(Stage1, u64),
}

/// What an access needs next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Next {
    /// The VMM's answer.
    Exit(VcpuExit),
    /// Nothing: the instruction is done.
    Done,
    /// An address that the guest's tables do not map any more.
    Lost,
}

/// A load or store on its way.
#[derive(Debug)]
pub struct Access {
    transfer: Transfer,
    place: Place,
    /// What is stored, or was loaded so far.
    data: [u8; MOST],
    done: usize,
    /// The part that the VMM is asked for.
    asked: Option<PendingAccess>,
}

impl Access {
    fn new(transfer: Transfer, place: Place, cpu: &impl Cpu, regs: &GuestRegs) -> VcpuResult<Self> {
        let fpu = if transfer.is_vector() { cpu.fpu()? } else { Aarch64FpuRegs::default() };
        let data = if transfer.is_load { [0; MOST] } else { transfer.stored(regs, &fpu) };
        Ok(Self { transfer, place, data, done: 0, asked: None })
    }

    /// What the syndrome of a data abort tells, at the guest physical address that goes with it.
    pub fn told(transfer: Transfer, gpa: u64, cpu: &impl Cpu) -> VcpuResult<Self> {
        Self::new(transfer, Place::Physical(gpa), cpu, &cpu.regs()?)
    }

    /// A decoded instruction.
    pub fn decoded(transfer: Transfer, stage1: Stage1, cpu: &impl Cpu) -> VcpuResult<Self> {
        let regs = cpu.regs()?;
        Self::new(transfer, Place::Virtual(stage1, transfer.address(&regs)), cpu, &regs)
    }

    /// The access that the VMM is asked for.
    pub fn pending(&self) -> Option<PendingAccess> {
        self.asked
    }

    /// The bytes of that access.
    pub fn data(&self) -> &[u8] {
        let len = self.asked.map_or(0, |asked| asked.len);
        &self.data[self.done..self.done + len]
    }

    /// Answers a read. The caller has checked direction and length.
    pub fn answer(&mut self, data: &[u8]) {
        self.data[self.done..self.done + data.len()].copy_from_slice(data);
        if let Some(asked) = &mut self.asked {
            asked.answered = true;
        }
    }

    /// The next part: where it is, and how long. `None` if the guest's tables do not tell.
    fn part(&self, cpu: &impl Cpu) -> Option<(u64, usize)> {
        let size = usize::from(self.transfer.size);
        let whole = (size - self.done % size).min(8);
        match self.place {
            Place::Physical(gpa) => Some((gpa, whole)),
            Place::Virtual(stage1, address) => {
                let at = address.wrapping_add(self.done as u64);
                let gpa = stage1.translate(at, |gpa| {
                    let mut word = [0; 8];
                    cpu.memory(gpa, false, &mut word).then(|| u64::from_le_bytes(word))
                })?;
                Some((gpa, whole.min((PAGE - at % PAGE) as usize)))
            }
        }
    }

    /// Takes the answer to the last exit, and goes on to the next one, or to the end of the instruction.
    pub fn resume(&mut self, cpu: &mut impl Cpu) -> VcpuResult<Next> {
        if let Some(asked) = self.asked.take() {
            self.done += asked.len;
        }
        let is_write = !self.transfer.is_load;
        while self.done < self.transfer.bytes() {
            let Some((addr, len)) = self.part(cpu) else {
                return Ok(Next::Lost);
            };
            if !cpu.memory(addr, is_write, &mut self.data[self.done..self.done + len]) {
                self.asked = Some(PendingAccess { addr, len, is_write, answered: is_write });
                return Ok(Next::Exit(VcpuExit::Mmio { addr, size: len as u8, is_write }));
            }
            self.done += len;
        }
        let mut regs = cpu.regs()?;
        let is_vector_load = self.transfer.is_vector() && self.transfer.is_load;
        let mut fpu = if is_vector_load { cpu.fpu()? } else { Aarch64FpuRegs::default() };
        self.transfer.finish(&self.data, &mut regs, &mut fpu);
        if is_vector_load {
            cpu.set_fpu(&fpu)?;
        }
        cpu.set_regs(&regs)?;
        Ok(Next::Done)
    }
}
