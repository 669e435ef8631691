//! Loads and stores to devices that the kernel hands over undone (KVM_EXIT_ARM_NISV): decoded and finished here, one
//! access at a time, as the completion protocol asks.

use super::super::lock;
use super::super::vcpu::KvmVcpu;
use kvm_bindings as kb;
use vm_accel_backend::aarch64_access::{MOST, Stage1, Transfer, decode};
use vm_accel_core::accel::{AccelKind, MemoryFlags};
use vm_accel_core::error::{AccelError, InstructionBytes, VcpuResult};
use vm_accel_core::regs::aarch64::{self as aarch64, Aarch64FpuRegs, Aarch64Vcpu};
use vm_accel_core::vcpu_common::VcpuExit;

/// Pages of the smallest granule: an access does not cross one in one piece.
const PAGE: u64 = 4096;

/// A load or store on its way.
#[derive(Debug)]
pub(super) struct Access {
    transfer: Transfer,
    stage1: Stage1,
    /// Virtual address of the first byte.
    address: u64,
    /// What is stored, or was loaded so far.
    data: [u8; MOST],
    done: usize,
    /// Bytes of the exit that the VMM is answering.
    asked: usize,
}

impl KvmVcpu {
    /// The instruction that stopped the guest: decodes it and begins with its first access.
    pub(super) fn begin_access(&mut self) -> VcpuResult<VcpuExit> {
        let regs = self.arch_get_regs()?;
        let stage1 = Stage1 {
            sctlr: self.get_sys_reg(aarch64::SCTLR_EL1)?,
            tcr: self.get_sys_reg(aarch64::TCR_EL1)?,
            ttbr0: self.get_sys_reg(aarch64::TTBR0_EL1)?,
            ttbr1: self.get_sys_reg(aarch64::TTBR1_EL1)?,
        };
        let word = self.translate_address(&stage1, regs.pc).and_then(|gpa| {
            let mut word = [0; 4];
            self.memory(gpa, false, &mut word).then_some(word)
        });
        let transfer = word
            .filter(|_| !stage1.is_big_endian())
            .and_then(|word| decode(u32::from_le_bytes(word)))
            .ok_or_else(|| Self::undecoded(regs.pc, word))?;
        let fpu = if transfer.is_vector() { self.get_fpu()? } else { Aarch64FpuRegs::default() };
        self.arch.access = Some(Access {
            transfer,
            stage1,
            address: transfer.address(&regs),
            data: if transfer.is_load { [0; MOST] } else { transfer.stored(&regs, &fpu) },
            done: 0,
            asked: 0,
        });
        // Memory that was mapped after the guest faulted lets the instruction finish at once.
        Ok(self.resume_access()?.unwrap_or(VcpuExit::Interrupt))
    }

    fn undecoded(pc: u64, word: Option<[u8; 4]>) -> AccelError {
        AccelError::Emulation {
            kind: AccelKind::Kvm,
            code: kb::KVM_EXIT_ARM_NISV,
            pc,
            instruction: word.map_or_else(InstructionBytes::default, |word| InstructionBytes::new(&word)),
        }
    }

    /// Takes the answer to the last exit, and goes on to the next one, or to the end of the instruction.
    pub(super) fn resume_access(&mut self) -> VcpuResult<Option<VcpuExit>> {
        let Some(mut access) = self.arch.access.take() else {
            return Ok(None);
        };
        if access.asked > 0 {
            if access.transfer.is_load {
                // SAFETY: any bytes are valid ones; `ask` chose this variant, and the kernel was not entered since.
                let answer = unsafe { self.run_area().__bindgen_anon_1.mmio.data };
                access.data[access.done..access.done + access.asked].copy_from_slice(&answer[..access.asked]);
            }
            access.done += access.asked;
            access.asked = 0;
        }
        while access.done < access.transfer.bytes() {
            let at = access.address.wrapping_add(access.done as u64);
            let size = usize::from(access.transfer.size);
            let len = (size - access.done % size).min(8).min((PAGE - at % PAGE) as usize);
            let Some(gpa) = self.translate_address(&access.stage1, at) else {
                return Err(Self::undecoded(self.arch_get_regs()?.pc, None));
            };
            let is_write = !access.transfer.is_load;
            let part = &mut access.data[access.done..access.done + len];
            if !self.memory(gpa, is_write, part) {
                let exit = self.ask(gpa, is_write.then_some(&*part), len);
                access.asked = len;
                self.arch.access = Some(access);
                return Ok(Some(exit));
            }
            access.done += len;
        }
        let mut regs = self.arch_get_regs()?;
        let is_vector_load = access.transfer.is_vector() && access.transfer.is_load;
        let mut fpu = if is_vector_load { self.get_fpu()? } else { Aarch64FpuRegs::default() };
        access.transfer.finish(&access.data, &mut regs, &mut fpu);
        if is_vector_load {
            self.set_fpu(&fpu)?;
        }
        self.arch_set_regs(&regs)?;
        Ok(None)
    }

    /// Makes an exit that looks like the kernel's own, with its data at the same place.
    fn ask(&mut self, addr: u64, stored: Option<&[u8]>, len: usize) -> VcpuExit {
        let mut data = [0; 8];
        if let Some(stored) = stored {
            data[..len].copy_from_slice(stored);
        }
        let is_write = stored.is_some();
        self.run_area_mut().__bindgen_anon_1.mmio.data = data;
        let offset = std::mem::offset_of!(kb::kvm_run, __bindgen_anon_1.mmio.data);
        self.expect_io(addr, offset, len, is_write);
        VcpuExit::Mmio { addr, size: len as u8, is_write }
    }

    fn translate_address(&self, stage1: &Stage1, address: u64) -> Option<u64> {
        stage1.translate(address, |gpa| {
            let mut word = [0; 8];
            self.memory(gpa, false, &mut word).then(|| u64::from_le_bytes(word))
        })
    }

    /// Moves bytes to or from mapped memory; false if they are not in it, or must not be written.
    fn memory(&self, gpa: u64, is_write: bool, data: &mut [u8]) -> bool {
        let slots = lock(&self.vm.slots);
        let Some((start, slot)) = slots.by_gpa.range(..=gpa).next_back() else {
            return false;
        };
        let offset = gpa - start;
        if is_write {
            slot.flags.contains(MemoryFlags::WRITE) && slot.region.write(offset, data).is_ok()
        } else {
            slot.region.read(offset, data).is_ok()
        }
    }
}
