//! The registers of a virtual processor. They move in batches; the general ones are read once between two runs, and what is
//! written is what differs.

use super::Vm;
use super::gic::redistributor;
use crate::partition::is_code;
use std::cell::Cell;
use std::sync::Arc;
use vm_accel_backend::aarch64_access::exception::pstate;
use vm_accel_core::error::{AccelError, VcpuResult};
use vm_accel_core::regs::GuestRegs;
use vm_accel_core::regs::aarch64::{
    Aarch64FpuRegs, Aarch64MpState, CNTVCT_EL0, MPIDR_EL1, PSTATE_EL1H_MASKED, PlatformRegister, Reg, SCTLR_EL1,
    SP_EL0, SP_EL1, affinity,
};
use vm_accel_sys::whpx::aarch64::{
    ANY_VP, Activity, FEATURE_REGS, RegisterName, RegisterValue, SYSTEM_REGS, feature, register,
};
use vm_accel_sys::whpx::code::WHV_E_INVALID_VP_REGISTER_NAME;

/// X0 to X30, PC, PSTATE, SP_EL0, SP_EL1: what [`GuestRegs`] is made of.
type General = [u64; 35];
const PC: usize = 31;
const PSTATE: usize = 32;
const STACK: [(usize, u16); 2] = [(33, SP_EL0), (34, SP_EL1)];
/// Most registers in one call.
const BATCH: usize = 64;

/// Bits of SCTLR_EL1 that are one on a CPU without extensions (Arm ARM, D24.2.118).
const SCTLR_RESET: u64 = 0x30d0_0800;
const MPIDR_RES1: u64 = 1 << 31;
/// ID_AA64DFR0_EL1: less one, how many breakpoints and watchpoints there are (Arm ARM, D24.2.64).
const ID_AA64DFR0: u16 = 0xc028;
const BREAKPOINTS: u32 = 12;
const WATCHPOINTS: u32 = 20;

fn general_name(n: usize) -> RegisterName {
    match n {
        PC => register::PC,
        PSTATE => register::PSTATE,
        33 => register::SP_EL0,
        34 => register::SP_EL1,
        n => register::X0 + n as u32,
    }
}

/// Which of the stack pointers PSTATE selects.
fn stack_pointer(general: &General) -> usize {
    if general[PSTATE] & pstate::MODE == pstate::EL1H { STACK[1].0 } else { STACK[0].0 }
}

/// V0 to V31, FPCR, FPSR.
fn vector_names() -> impl Iterator<Item = RegisterName> {
    (register::Q0..register::Q0 + 32).chain([register::FPCR, register::FPSR])
}

fn value(low: u64) -> RegisterValue {
    RegisterValue { low, high: 0 }
}

/// A system register.
#[derive(Debug, Clone, Copy)]
pub(super) struct Row {
    encoding: u16,
    name: RegisterName,
    /// It is the partition's.
    is_global: bool,
}

/// The system registers that this version of the platform has.
fn rows(vm: &Vm, vp: u32) -> VcpuResult<Vec<Row>> {
    let partition = vm.partition();
    let dfr0 = partition.get(ANY_VP, &[feature(ID_AA64DFR0)])?[0].low;
    // DBGBVR<n>, DBGBCR<n>: op0 2, CRn 0, CRm n, op2 4 and 5; DBGWVR<n>, DBGWCR<n>: 6 and 7.
    let kinds = [
        (BREAKPOINTS, 0x8004, register::DBGBVR0_EL1),
        (BREAKPOINTS, 0x8005, register::DBGBCR0_EL1),
        (WATCHPOINTS, 0x8006, register::DBGWVR0_EL1),
        (WATCHPOINTS, 0x8007, register::DBGWCR0_EL1),
    ];
    let debug = kinds.into_iter().flat_map(|(shift, encoding, name)| {
        (0..=(dfr0 >> shift & 0xf) as u16).map(move |n| (encoding + 8 * n, name + u32::from(n)))
    });
    let own = SYSTEM_REGS.into_iter().chain(debug).map(|(encoding, name)| (encoding, name, false));
    let global = FEATURE_REGS.into_iter().map(|encoding| (encoding, feature(encoding), true));
    let last = [(CNTVCT_EL0, register::CNTVCT_EL0, false)];
    let mut rows = Vec::new();
    for (encoding, name, is_global) in own.chain(global).chain(last) {
        match partition.get(if is_global { ANY_VP } else { vp }, &[name]) {
            Ok(_) => rows.push(Row { encoding, name, is_global }),
            // Each version has more of them; which ones this one has only trying tells.
            Err(why) if is_code(&why, WHV_E_INVALID_VP_REGISTER_NAME) => {}
            Err(why) => return Err(why),
        }
    }
    Ok(rows)
}

/// The registers of one virtual processor.
pub(super) struct Registers {
    vm: Arc<Vm>,
    id: u32,
    /// The general registers, from when they were asked for until the processor runs.
    known: Cell<Option<General>>,
}

impl Registers {
    /// Those of a new processor, which are nothing that the platform promises.
    pub(super) fn new(vm: &Arc<Vm>, id: u32) -> VcpuResult<Self> {
        if vm.rows.get().is_none() {
            // Two may find out the same at once.
            let _ = vm.rows.set(rows(vm, id)?);
        }
        let new = Self { vm: Arc::clone(vm), id, known: Cell::new(None) };
        new.put(&[(register::GICR_BASE_GPA, value(redistributor(id)))])?;
        new.reset()?;
        Ok(new)
    }

    fn rows(&self) -> &[Row] {
        self.vm.rows.get().map_or(&[], Vec::as_slice)
    }

    fn row(&self, encoding: u16) -> VcpuResult<&Row> {
        let found = self.rows().iter().find(|row| row.encoding == encoding);
        found.ok_or_else(|| AccelError::invalid("system register", format!("{encoding:#x}")))
    }

    fn fetch(&self, names: &[RegisterName]) -> VcpuResult<Vec<RegisterValue>> {
        let mut values = Vec::with_capacity(names.len());
        for names in names.chunks(BATCH) {
            values.extend(self.vm.partition().get(self.id, names)?);
        }
        Ok(values)
    }

    fn put(&self, registers: &[(RegisterName, RegisterValue)]) -> VcpuResult<()> {
        for registers in registers.chunks(BATCH) {
            let (names, values): (Vec<_>, Vec<_>) = registers.iter().copied().unzip();
            self.vm.partition().set(self.id, &names, &values)?;
        }
        Ok(())
    }

    /// Writes what differs: not every register can be written, and most are as they should be.
    fn change(&self, vp: u32, registers: &[(RegisterName, RegisterValue)]) -> VcpuResult<()> {
        for registers in registers.chunks(BATCH) {
            let names: Vec<_> = registers.iter().map(|(name, _)| *name).collect();
            let now = self.vm.partition().get(vp, &names)?;
            let differ = registers.iter().zip(now).filter(|((_, new), now)| new != now);
            let (names, values): (Vec<_>, Vec<_>) = differ.map(|(register, _)| *register).unzip();
            self.vm.partition().set(vp, &names, &values)?;
        }
        Ok(())
    }

    /// The processor is about to run, or its registers are written past this.
    pub(super) fn forget(&self) {
        self.known.set(None);
    }

    fn general(&self) -> VcpuResult<General> {
        if let Some(known) = self.known.get() {
            return Ok(known);
        }
        let names: [_; 35] = std::array::from_fn(general_name);
        let values = self.fetch(&names)?;
        let general = std::array::from_fn(|n| values[n].low);
        self.known.set(Some(general));
        Ok(general)
    }

    fn set_general(&self, new: &General) -> VcpuResult<()> {
        let old = self.general()?;
        let changed = (0..new.len()).filter(|n| old[*n] != new[*n]);
        let changed: Vec<_> = changed.map(|n| (general_name(n), value(new[n]))).collect();
        // Should it fail halfway only the platform knows.
        self.forget();
        self.put(&changed)?;
        self.known.set(Some(*new));
        Ok(())
    }

    /// Everything as after reset; off, unless it is processor 0.
    pub(super) fn reset(&self) -> VcpuResult<()> {
        self.forget();
        let own = self.rows().iter().filter(|row| !row.is_global && row.encoding != CNTVCT_EL0);
        let system = own.filter(|row| row.name != register::MIDR_EL1).map(|row| {
            let reset = match row.encoding {
                SCTLR_EL1 => SCTLR_RESET,
                MPIDR_EL1 => MPIDR_RES1 | affinity(self.id),
                _ => 0,
            };
            (row.name, value(reset))
        });
        let general = (0..=PSTATE).map(|n| {
            let reset = if n == PSTATE { PSTATE_EL1H_MASKED } else { 0 };
            (general_name(n), value(reset))
        });
        let vectors = vector_names().map(|name| (name, value(0)));
        self.change(self.id, &general.chain(system).chain(vectors).collect::<Vec<_>>())?;
        self.set_power(if self.id == 0 { Aarch64MpState::Running } else { Aarch64MpState::PoweredOff })
    }

    pub(super) fn power(&self) -> VcpuResult<Aarch64MpState> {
        let activity = Activity(self.fetch(&[register::INTERNAL_ACTIVITY_STATE])?[0].low);
        let is_off = activity.startup_suspend() != 0;
        Ok(if is_off { Aarch64MpState::PoweredOff } else { Aarch64MpState::Running })
    }

    pub(super) fn set_power(&self, state: Aarch64MpState) -> VcpuResult<()> {
        let is_off = state == Aarch64MpState::PoweredOff;
        let activity = Activity(0).with_startup_suspend(is_off.into());
        self.put(&[(register::INTERNAL_ACTIVITY_STATE, value(activity.0))])
    }

    /// The program counter and PSTATE.
    pub(super) fn state(&self) -> VcpuResult<(u64, u64)> {
        self.general().map(|general| (general[PC], general[PSTATE]))
    }

    pub(super) fn set_state(&self, pc: u64, pstate: u64) -> VcpuResult<()> {
        let mut general = self.general()?;
        (general[PC], general[PSTATE]) = (pc, pstate);
        self.set_general(&general)
    }

    pub(super) fn get_regs(&self) -> VcpuResult<GuestRegs> {
        let general = self.general()?;
        let mut regs = GuestRegs { pc: general[PC], flags: general[PSTATE], ..GuestRegs::default() };
        regs.gpr[..31].copy_from_slice(&general[..31]);
        regs.gpr[Reg::Sp as usize] = general[stack_pointer(&general)];
        Ok(regs)
    }

    pub(super) fn set_regs(&self, regs: &GuestRegs) -> VcpuResult<()> {
        let mut general = self.general()?;
        general[..31].copy_from_slice(&regs.gpr[..31]);
        (general[PC], general[PSTATE]) = (regs.pc, regs.flags);
        general[stack_pointer(&general)] = regs.gpr[Reg::Sp as usize];
        self.set_general(&general)
    }

    pub(super) fn get_fpu(&self) -> VcpuResult<Aarch64FpuRegs> {
        let values = self.fetch(&vector_names().collect::<Vec<_>>())?;
        let v = std::array::from_fn(|n| u128::from(values[n].high) << 64 | u128::from(values[n].low));
        Ok(Aarch64FpuRegs { v, fpcr: values[32].low as u32, fpsr: values[33].low as u32 })
    }

    pub(super) fn set_fpu(&self, fpu: &Aarch64FpuRegs) -> VcpuResult<()> {
        let vectors = fpu.v.map(|v| RegisterValue { low: v as u64, high: (v >> 64) as u64 });
        let values = vectors.into_iter().chain([value(fpu.fpcr.into()), value(fpu.fpsr.into())]);
        self.put(&vector_names().zip(values).collect::<Vec<_>>())
    }

    pub(super) fn sys(&self, encoding: u16) -> VcpuResult<u64> {
        if let Some((n, _)) = STACK.into_iter().find(|(_, stack)| *stack == encoding) {
            return Ok(self.general()?[n]);
        }
        let row = self.row(encoding)?;
        let vp = if row.is_global { ANY_VP } else { self.id };
        Ok(self.vm.partition().get(vp, &[row.name])?[0].low)
    }

    pub(super) fn set_sys(&self, encoding: u16, new: u64) -> VcpuResult<()> {
        let row = self.row(encoding)?;
        if STACK.iter().any(|(_, stack)| *stack == encoding) {
            self.forget();
        }
        self.change(if row.is_global { ANY_VP } else { self.id }, &[(row.name, value(new))])
    }

    pub(super) fn list_sys_regs(&self) -> Vec<u16> {
        self.rows().iter().map(|row| row.encoding).collect()
    }

    /// All that is saved of a processor, and whether it is the partition's. The count is last: it goes on from its restoring.
    fn names(&self) -> impl Iterator<Item = (RegisterName, bool)> {
        let plain = (0..=PSTATE).map(general_name).chain(vector_names()).map(|name| (name, false));
        plain.chain(self.rows().iter().map(|row| (row.name, row.is_global)))
    }

    pub(super) fn save(&self) -> VcpuResult<Vec<PlatformRegister>> {
        let mut all = Vec::new();
        for (name, is_global) in self.names() {
            let vp = if is_global { ANY_VP } else { self.id };
            let RegisterValue { low, high } = self.vm.partition().get(vp, &[name])?[0];
            all.push(PlatformRegister { id: name.into(), value: [low.to_le_bytes(), high.to_le_bytes()].concat() });
        }
        Ok(all)
    }

    pub(super) fn restore(&self, registers: &[PlatformRegister]) -> VcpuResult<()> {
        self.forget();
        for PlatformRegister { id, value: bytes } in registers {
            let unknown = || AccelError::invalid("register", format!("{id:#x} with {} bytes", bytes.len()));
            let (name, is_global) = self.names().find(|(name, _)| u64::from(*name) == *id).ok_or_else(unknown)?;
            let new = <[u8; 16]>::try_from(bytes.as_slice()).map(u128::from_le_bytes).map_err(|_| unknown())?;
            let new = RegisterValue { low: new as u64, high: (new >> 64) as u64 };
            self.change(if is_global { ANY_VP } else { self.id }, &[(name, new)])?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_general_register_has_a_name_of_its_own() {
        let names: std::collections::BTreeSet<_> = (0..35).map(general_name).collect();
        assert_eq!(names.len(), 35);
        assert_eq!((general_name(0), general_name(30)), (register::X0, register::LR));
    }

    #[test]
    fn pstate_selects_the_stack_pointer() {
        let mut general = [0; 35];
        for (state, index) in [(0x3c5, 34), (0x3c4, 33), (0, 33)] {
            general[PSTATE] = state;
            assert_eq!(stack_pointer(&general), index);
        }
    }
}
