//! The registers of a vCPU: kept here until its thread enters it for the first time, the framework's from then on.

use super::{Vm, gic};
use crate::platform::hvf::check;
use crate::platform::hvf::thread::{Owner, reap};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use vm_accel_backend::aarch64_access::exception::pstate;
use vm_accel_core::error::{AccelError, VcpuResult};
use vm_accel_core::regs::GuestRegs;
use vm_accel_core::regs::aarch64::{
    self as aarch64, Aarch64FpuRegs, PSTATE_EL1H_MASKED, PlatformRegister, Reg, affinity,
};
use vm_accel_sys::hvf::aarch64::{HvfArm64Api, VcpuExit, Vector, gic as numbers, reg, sys_reg};

/// Bits of SCTLR_EL1 that are one on a CPU without extensions (Arm ARM, D24.2.118).
const SCTLR_RESET: u64 = 0x30d0_0800;
/// What the framework gives a guest itself: an Apple CPU of an unnamed part.
const MIDR: u64 = 0x610f_0000;
const MPIDR_RES1: u64 = 1 << 31;

/// Indices of [`GuestRegs`] and the framework's numbers. PSTATE goes before SP, as it selects the stack pointer.
fn general() -> impl Iterator<Item = (usize, u32)> {
    (0..31).map(|n| (n, n as u32)).chain([(GuestRegs::PC, reg::PC), (GuestRegs::FLAGS, reg::CPSR)])
}

/// The framework's vCPU. All of it belongs to one thread.
struct Link {
    id: u64,
    exit: *const VcpuExit,
    owner: Owner,
}

// SAFETY: the pointer is followed on the owner's thread only.
unsafe impl Send for Link {}

/// Registers that no framework has yet.
#[derive(Debug, Clone)]
struct Kept {
    general: [u64; reg::MAX as usize],
    vectors: [u128; 32],
    sys: BTreeMap<u16, u64>,
}

/// A vCPU's registers, wherever they are.
pub(super) struct Registers {
    vm: Arc<Vm>,
    api: &'static HvfArm64Api,
    id: u32,
    kept: Kept,
    link: Option<Link>,
}

impl Registers {
    pub(super) fn new(vm: &Arc<Vm>, id: u32) -> Self {
        let kept = Kept { general: [0; reg::MAX as usize], vectors: [0; 32], sys: BTreeMap::new() };
        let mut new = Self { vm: Arc::clone(vm), api: vm.api, id, kept, link: None };
        new.kept = new.reset_values();
        new
    }

    /// The state after reset, which is nothing that the framework promises.
    fn reset_values(&self) -> Kept {
        let mut general = [0; reg::MAX as usize];
        general[reg::CPSR as usize] = PSTATE_EL1H_MASKED;
        let value = |register| match register {
            sys_reg::SCTLR_EL1 => SCTLR_RESET,
            sys_reg::MIDR_EL1 => MIDR,
            sys_reg::MPIDR_EL1 => MPIDR_RES1 | affinity(self.id),
            _ => gic::interface_reset(register).unwrap_or_else(|| self.vm.feature(register)),
        };
        let sys = self.list().into_iter().map(|register| (register, value(register))).collect();
        Kept { general, vectors: [0; 32], sys }
    }

    /// How many breakpoints and watchpoints there are (Arm ARM, D24.2.64: less one in bits 15:12 and 23:20).
    pub(super) fn comparators(&self) -> [u16; 2] {
        let feature = self.vm.feature(sys_reg::ID_AA64DFR0_EL1);
        [12, 20].map(|shift| (feature >> shift & 0xf) as u16 + 1)
    }

    /// The registers that the framework has.
    fn list(&self) -> Vec<u16> {
        let [breakpoints, watchpoints] = self.comparators();
        let numbered = |count, first| (0..count).flat_map(move |n| [first + 8 * n, first + 1 + 8 * n]);
        let debug = numbered(breakpoints, sys_reg::DBGBVR0_EL1).chain(numbered(watchpoints, sys_reg::DBGWVR0_EL1));
        let with_gic: &[&[u16]] = if self.vm.gic.get().is_some() { &[&numbers::CNTP, &numbers::ICC] } else { &[] };
        sys_reg::ALL.iter().chain(with_gic.iter().copied().flatten()).copied().chain(debug).collect()
    }

    /// As [`list`](Self::list), with the count.
    pub(super) fn list_sys_regs(&self) -> Vec<u16> {
        let mut list = self.list();
        list.push(aarch64::CNTVCT_EL0);
        list
    }

    /// The framework's vCPU, if there is one; an error on a thread that is not its own.
    fn link(&self, op: &'static str) -> VcpuResult<Option<&Link>> {
        if let Some(link) = &self.link {
            link.owner.check(op)?;
        }
        Ok(self.link.as_ref())
    }

    /// Creates the framework's vCPU for this thread, if there is none yet. `created` is told its number; `destroy` is called
    /// on this thread when the number means nothing any more.
    pub(super) fn bind(
        &mut self,
        created: impl FnOnce(u64),
        destroy: impl FnOnce() + Send + 'static,
    ) -> VcpuResult<u64> {
        if let Some(link) = self.link("run")? {
            return Ok(link.id);
        }
        reap();
        let (mut id, mut exit) = (0, std::ptr::null());
        // SAFETY: the pointers are those of local variables; without a configuration the default is meant.
        let answer = unsafe { (self.api.hv_vcpu_create)(&mut id, &mut exit, std::ptr::null_mut()) };
        check("hv_vcpu_create", answer)?;
        let vm = Arc::clone(&self.vm);
        let owner = Owner::new(move || {
            destroy();
            // SAFETY: called once, on the thread that created the vCPU, of which nobody knows any more.
            let _ = unsafe { (vm.api.hv_vcpu_destroy)(id) };
        });
        self.link = Some(Link { id, exit, owner });
        let kept = self.kept.clone();
        if let Err(why) = self.put_all(&kept) {
            // The next entry begins anew.
            self.link = None;
            return Err(why);
        }
        created(id);
        Ok(id)
    }

    fn put_all(&mut self, kept: &Kept) -> VcpuResult<()> {
        for (n, value) in (0..).zip(kept.general) {
            self.set(n, value)?;
        }
        for (n, value) in (0..).zip(kept.vectors) {
            self.set_vector(n, value)?;
        }
        kept.sys.iter().try_for_each(|(register, value)| self.set_sys(*register, *value))
    }

    /// Everything as after reset.
    pub(super) fn reset(&mut self) -> VcpuResult<()> {
        let values = self.reset_values();
        self.put_all(&values)
    }

    /// What the last run left behind.
    pub(super) fn exit(&self) -> VcpuResult<VcpuExit> {
        match self.link("run")? {
            // SAFETY: the framework's structure lives as long as the vCPU, and is written only by runs, on this thread.
            Some(link) => Ok(unsafe { link.exit.read() }),
            None => Ok(VcpuExit::default()),
        }
    }

    pub(super) fn get(&self, register: u32) -> VcpuResult<u64> {
        let Some(link) = self.link("reading registers")? else {
            return Ok(self.kept.general[register as usize]);
        };
        let mut value = 0;
        // SAFETY: the pointer is that of a local variable, the vCPU is this thread's.
        check("hv_vcpu_get_reg", unsafe { (self.api.hv_vcpu_get_reg)(link.id, register, &mut value) })?;
        Ok(value)
    }

    pub(super) fn set(&mut self, register: u32, value: u64) -> VcpuResult<()> {
        let Some(link) = self.link("writing registers")? else {
            self.kept.general[register as usize] = value;
            return Ok(());
        };
        // SAFETY: the vCPU is this thread's.
        check("hv_vcpu_set_reg", unsafe { (self.api.hv_vcpu_set_reg)(link.id, register, value) })
    }

    fn get_vector(&self, register: u32) -> VcpuResult<u128> {
        let Some(link) = self.link("reading registers")? else {
            return Ok(self.kept.vectors[register as usize]);
        };
        let mut value = Vector::default();
        // SAFETY: the pointer is that of a local variable, the vCPU is this thread's.
        let answer = unsafe { (self.api.hv_vcpu_get_simd_fp_reg)(link.id, register, &mut value) };
        check("hv_vcpu_get_simd_fp_reg", answer)?;
        Ok(u128::from_le_bytes(value.0))
    }

    fn set_vector(&mut self, register: u32, value: u128) -> VcpuResult<()> {
        let Some(link) = self.link("writing registers")? else {
            self.kept.vectors[register as usize] = value;
            return Ok(());
        };
        // SAFETY: the vCPU is this thread's.
        let answer = unsafe { (self.api.hv_vcpu_set_simd_fp_reg)(link.id, register, &value.to_le_bytes()) };
        check("hv_vcpu_set_simd_fp_reg", answer)
    }

    /// A system register that the framework, or this library for it, has.
    pub(super) fn sys(&self, register: u16) -> VcpuResult<u64> {
        if register == aarch64::CNTVCT_EL0 {
            return Ok(self.vm.count());
        }
        let kept = self.kept.sys.get(&register);
        let kept = *kept.ok_or_else(|| AccelError::invalid("system register", format!("{register:#x}")))?;
        let Some(link) = self.link("reading registers")? else {
            return Ok(kept);
        };
        if numbers::ICC.contains(&register) {
            return gic::interface(self.api, link.id, register);
        }
        let mut value = 0;
        // SAFETY: the pointer is that of a local variable, the vCPU is this thread's.
        check("hv_vcpu_get_sys_reg", unsafe { (self.api.hv_vcpu_get_sys_reg)(link.id, register, &mut value) })?;
        Ok(value)
    }

    pub(super) fn set_sys(&mut self, register: u16, value: u64) -> VcpuResult<()> {
        if register == aarch64::CNTVCT_EL0 {
            self.vm.count_offset.store(self.vm.ticks().wrapping_sub(value), Ordering::Relaxed);
            return Ok(());
        }
        let Some(link) = self.link("writing registers")? else {
            let kept = self.kept.sys.get_mut(&register);
            *kept.ok_or_else(|| AccelError::invalid("system register", format!("{register:#x}")))? = value;
            return Ok(());
        };
        if numbers::ICC.contains(&register) {
            return gic::set_interface(self.api, link.id, register, value);
        }
        // Not every feature register can be written, and most are as the host has them.
        let is_feature = self.vm.features.contains_key(&register);
        if is_feature && self.sys(register)? == value {
            return Ok(());
        }
        // SAFETY: the vCPU is this thread's.
        check("hv_vcpu_set_sys_reg", unsafe { (self.api.hv_vcpu_set_sys_reg)(link.id, register, value) })
    }

    /// The stack pointer that PSTATE selects.
    fn stack_pointer(&self) -> VcpuResult<u16> {
        let el1h = self.get(reg::CPSR)? & pstate::MODE == pstate::EL1H;
        Ok(if el1h { sys_reg::SP_EL1 } else { sys_reg::SP_EL0 })
    }

    pub(super) fn get_regs(&self) -> VcpuResult<GuestRegs> {
        let mut regs = GuestRegs::default();
        for (index, register) in general() {
            regs.set(index, self.get(register)?);
        }
        // Ours, see `debug.rs`.
        regs.flags &= !pstate::SS;
        regs.gpr[Reg::Sp as usize] = self.sys(self.stack_pointer()?)?;
        Ok(regs)
    }

    pub(super) fn set_regs(&mut self, regs: &GuestRegs) -> VcpuResult<()> {
        for (index, register) in general() {
            self.set(register, regs.get(index))?;
        }
        self.set_sys(self.stack_pointer()?, regs.gpr[Reg::Sp as usize])
    }

    pub(super) fn get_fpu(&self) -> VcpuResult<Aarch64FpuRegs> {
        let mut fpu = Aarch64FpuRegs {
            fpcr: self.get(reg::FPCR)? as u32,
            fpsr: self.get(reg::FPSR)? as u32,
            ..Aarch64FpuRegs::default()
        };
        for (n, v) in (0..).zip(&mut fpu.v) {
            *v = self.get_vector(n)?;
        }
        Ok(fpu)
    }

    pub(super) fn set_fpu(&mut self, fpu: &Aarch64FpuRegs) -> VcpuResult<()> {
        for (n, v) in (0..).zip(fpu.v) {
            self.set_vector(n, v)?;
        }
        self.set(reg::FPCR, fpu.fpcr.into())?;
        self.set(reg::FPSR, fpu.fpsr.into())
    }
}

/// Kinds of [`PlatformRegister`]: the upper half of its id.
const GENERAL: u64 = 0;
const VECTOR: u64 = 1;
const SYSTEM: u64 = 2;

impl Registers {
    /// The number of a system register in a list of all registers.
    pub(super) fn system_number(register: &PlatformRegister) -> Option<u16> {
        (register.id >> 32 == SYSTEM).then_some(register.id as u16)
    }

    pub(super) fn save(&self) -> VcpuResult<Vec<PlatformRegister>> {
        let make =
            |kind: u64, number: u64, value: &[u8]| PlatformRegister { id: kind << 32 | number, value: value.to_vec() };
        let mut all = Vec::new();
        for n in 0..reg::MAX {
            let value = self.get(n)? & if n == reg::CPSR { !pstate::SS } else { u64::MAX };
            all.push(make(GENERAL, n.into(), &value.to_le_bytes()));
        }
        for n in 0..32 {
            all.push(make(VECTOR, n.into(), &self.get_vector(n)?.to_le_bytes()));
        }
        // The count, which is the last of the list, goes on from its restoring.
        for register in self.list_sys_regs() {
            all.push(make(SYSTEM, register.into(), &self.sys(register)?.to_le_bytes()));
        }
        Ok(all)
    }

    pub(super) fn restore(&mut self, registers: &[PlatformRegister]) -> VcpuResult<()> {
        for PlatformRegister { id, value } in registers {
            let unknown = || AccelError::invalid("register", format!("{id:#x} with {} bytes", value.len()));
            let number = *id as u32;
            let word = <[u8; 8]>::try_from(value.as_slice()).map(u64::from_le_bytes);
            match (id >> 32, number) {
                (GENERAL, 0..reg::MAX) => self.set(number, word.map_err(|_| unknown())?)?,
                (VECTOR, 0..32) => {
                    let bytes = value.as_slice().try_into().map_err(|_| unknown())?;
                    self.set_vector(number, u128::from_le_bytes(bytes))?;
                }
                (SYSTEM, 0..=0xffff) => self.set_sys(number as u16, word.map_err(|_| unknown())?)?,
                _ => return Err(unknown()),
            }
        }
        Ok(())
    }
}
