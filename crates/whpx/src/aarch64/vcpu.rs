//! A virtual processor: how it is entered and called back, and what its exits mean.
//!
//! An exit's header says where the program counter stands: at the instruction, which has not been done. That the register says
//! the same is likely and written nowhere, so the header is believed.

use super::Vm;
use super::registers::Registers;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use vm_accel_backend::aarch64_access::exception::{ISS_WALK, ISS_WRITE, class};
use vm_accel_backend::aarch64_access::{Access, Cpu, System};
use vm_accel_backend::gate::Gate;
use vm_accel_backend::gate::Wake;
use vm_accel_core::accel::{AccelKind, MemoryFlags};
use vm_accel_core::error::{AccelError, VcpuResult};
use vm_accel_core::regs::aarch64::{
    Aarch64Events, Aarch64Features, Aarch64FpuRegs, Aarch64MpState, Aarch64Vcpu, CNTV_CTL_EL0, CNTV_CVAL_EL0,
    CNTVCT_EL0, PlatformRegister, VirtualTimer,
};
use vm_accel_core::regs::{FpuRegs, GuestRegs};
use vm_accel_core::vcpu_common::{KickTarget, PendingAccess, VcpuExit, VcpuKick, VcpuOps};
use vm_accel_sys::whpx::aarch64::{ExitContext, Hypercall, MemoryAccess, exit_reason};

/// `WHV_MEMORY_ACCESS_TYPE`.
const EXECUTE: u8 = 2;
/// Owners of services whose calls are the VMM's (Arm DEN0028, "Owning Entity Number"): silicon partner, OEM.
const FORWARDED: [u64; 2] = [2, 3];
const NOT_SUPPORTED: u64 = u64::MAX;

/// What others know of a vCPU.
struct Kick {
    kicked: AtomicBool,
    gate: Arc<Gate>,
}

impl KickTarget for Kick {
    fn kick(&self) {
        self.kicked.store(true, Ordering::SeqCst);
        self.gate.kick();
    }
}

/// One virtual processor.
pub(super) struct WhpxVcpu {
    vm: Arc<Vm>,
    id: u32,
    kick: Arc<Kick>,
    registers: Registers,
    access: Option<Access>,
    /// Syndrome of the last abort, and the virtual address if the platform told it.
    abort: (u64, Option<u64>),
    /// A system error that the guest has not taken, with its syndrome.
    serror: Option<u64>,
    last_exit: u32,
}

impl WhpxVcpu {
    pub(super) fn new(vm: &Arc<Vm>, id: u32) -> VcpuResult<Self> {
        vm.partition().create_vp(id)?;
        let registers = Registers::new(vm, id).inspect_err(|_| {
            // The error before is the one that matters.
            let _ = vm.partition().delete_vp(id);
        })?;
        let machine = Arc::clone(vm);
        // A cancellation that fails is repeated.
        let gate = Gate::new(Box::new(move || drop(machine.partition().cancel(id))), &vm.alarm);
        Ok(Self {
            vm: Arc::clone(vm),
            id,
            kick: Arc::new(Kick { kicked: AtomicBool::new(false), gate }),
            registers,
            access: None,
            abort: (0, None),
            serror: None,
            last_exit: exit_reason::NONE,
        })
    }

    /// Runs until something needs the VMM; `None` if it was kicked.
    fn enter(&mut self) -> VcpuResult<Option<VcpuExit>> {
        loop {
            self.kick.gate.attend();
            if self.kick.kicked.swap(false, Ordering::SeqCst) {
                return Ok(None);
            }
            self.deliver_serror()?;
            if !self.kick.gate.enter(None) {
                continue;
            }
            self.registers.forget();
            let mut context = ExitContext::default();
            let ran = self.vm.partition().run(self.id, &mut context);
            self.kick.gate.leave();
            ran?;
            self.last_exit = context.reason;
            if let Some(exit) = self.translate(&context)? {
                return Ok(Some(exit));
            }
        }
    }

    /// Makes an exit of what the platform reports; `None` if the guest can go on.
    fn translate(&mut self, context: &ExitContext) -> VcpuResult<Option<VcpuExit>> {
        Ok(Some(match context.reason {
            exit_reason::NONE | exit_reason::CANCELED => return Ok(None),
            exit_reason::UNMAPPED_GPA | exit_reason::GPA_INTERCEPT => {
                return self.memory_access(context.memory_access());
            }
            exit_reason::HYPERCALL => return self.call(context.hypercall()),
            exit_reason::ARM64_RESET => match context.reset().reset_type {
                0 => VcpuExit::Shutdown,
                // Reboot, and the reset of SYSTEM_RESET2.
                1 | 2 => VcpuExit::Reset,
                _ => VcpuExit::Unknown,
            },
            exit_reason::UNRECOVERABLE_EXCEPTION => VcpuExit::Shutdown,
            exit_reason::INVALID_VP_REGISTER_VALUE => {
                return Err(AccelError::EntryFailed { kind: AccelKind::Whpx, reason: context.reason.into() });
            }
            _ => VcpuExit::Unknown,
        }))
    }

    /// The program counter stands here.
    fn stand_at(&mut self, pc: u64) -> VcpuResult<()> {
        let (_, pstate) = self.registers.state()?;
        self.registers.set_state(pc, pstate)
    }

    fn memory_access(&mut self, access: &MemoryAccess) -> VcpuResult<Option<VcpuExit>> {
        let MemoryAccess { syndrome, gva, gpa, header, .. } = *access;
        self.stand_at(header.pc)?;
        // What a trapped instruction would do comes after a system error that waited for the guest to unmask it.
        if self.deliver_serror()? {
            return Ok(None);
        }
        let far = (access.access_info.gva_valid() != 0).then_some(gva);
        self.abort = (syndrome, far);
        let is_fetch = header.access_type == EXECUTE || syndrome >> 26 & 0x3e == class::INSTRUCTION_ABORT;
        let is_write = syndrome & ISS_WRITE != 0 && syndrome & ISS_WALK == 0;
        let rights = match (is_fetch, is_write) {
            (true, _) => MemoryFlags::EXECUTE,
            (_, true) => MemoryFlags::WRITE,
            _ => MemoryFlags::READ,
        };
        if self.vm.slots.find(gpa).is_some_and(|(.., flags)| flags.contains(rights)) {
            // The memory is there: the platform may have been about to page it in, or it was mapped just now.
            return Ok(None);
        }
        if is_fetch {
            self.external_abort(class::INSTRUCTION_ABORT << 26, far)?;
            return Ok(None);
        }
        self.data_abort(syndrome, far, gpa)
    }

    /// A call that is none of the hypervisor's (PSCI is). Its result is what is in X0 at the next entry.
    fn call(&mut self, call: &Hypercall) -> VcpuResult<Option<VcpuExit>> {
        self.stand_at(call.header.pc.wrapping_add(4))?;
        let mut regs = self.registers.get_regs()?;
        let function = regs.gpr[0];
        let is_fast = function >> 31 & 1 != 0;
        if is_fast && call.immediate == 0 && FORWARDED.contains(&(function >> 24 & 0x3f)) {
            return Ok(Some(VcpuExit::SystemCall));
        }
        regs.gpr[0] = NOT_SUPPORTED;
        self.registers.set_regs(&regs)?;
        Ok(None)
    }

    fn deliver_serror(&mut self) -> VcpuResult<bool> {
        let mut waiting = self.serror;
        let taken = self.take_serror(&mut waiting);
        self.serror = waiting;
        taken
    }

    /// Saving is whole or not at all.
    fn check_features(&self) -> VcpuResult<()> {
        match self.vm.shown.contains(Aarch64Features::SVE) {
            true => {
                Err(self.group_unsupported("the registers of SVE, which this host does not let be hidden from guests"))
            }
            false => Ok(()),
        }
    }
}

impl Cpu for WhpxVcpu {
    fn regs(&self) -> VcpuResult<GuestRegs> {
        self.registers.get_regs()
    }

    fn set_regs(&mut self, regs: &GuestRegs) -> VcpuResult<()> {
        self.registers.set_regs(regs)
    }

    fn fpu(&self) -> VcpuResult<Aarch64FpuRegs> {
        self.registers.get_fpu()
    }

    fn set_fpu(&mut self, regs: &Aarch64FpuRegs) -> VcpuResult<()> {
        self.registers.set_fpu(regs)
    }

    fn memory(&self, gpa: u64, is_write: bool, data: &mut [u8]) -> bool {
        self.vm.slots.access(gpa, is_write, data)
    }
}

impl System for WhpxVcpu {
    const KIND: AccelKind = AccelKind::Whpx;

    fn access(&self) -> &Option<Access> {
        &self.access
    }

    fn access_mut(&mut self) -> &mut Option<Access> {
        &mut self.access
    }

    fn syndrome(&self) -> u64 {
        self.abort.0
    }

    fn state(&self) -> VcpuResult<(u64, u64)> {
        self.registers.state()
    }

    fn set_state(&mut self, pc: u64, pstate: u64) -> VcpuResult<()> {
        self.registers.set_state(pc, pstate)
    }

    fn sys(&self, register: u16) -> VcpuResult<u64> {
        self.registers.sys(register)
    }

    fn set_sys(&mut self, register: u16, value: u64) -> VcpuResult<()> {
        self.registers.set_sys(register, value)
    }
}

impl VcpuOps for WhpxVcpu {
    fn get_id(&self) -> u32 {
        self.id
    }

    fn run(&mut self) -> VcpuResult<VcpuExit> {
        match self.resume()? {
            Some(exit) => Ok(exit),
            None => Ok(self.enter()?.unwrap_or(VcpuExit::Interrupt)),
        }
    }

    fn quiesce(&mut self) -> VcpuResult<VcpuExit> {
        Ok(self.resume()?.unwrap_or(VcpuExit::Interrupt))
    }

    fn get_regs(&self) -> VcpuResult<GuestRegs> {
        self.registers.get_regs()
    }

    fn set_regs(&mut self, regs: &GuestRegs) -> VcpuResult<()> {
        self.registers.set_regs(regs)
    }

    fn get_fpu_regs(&self) -> VcpuResult<FpuRegs> {
        self.registers.get_fpu().map(FpuRegs::Aarch64)
    }

    fn set_fpu_regs(&mut self, regs: &FpuRegs) -> VcpuResult<()> {
        self.registers.set_fpu(regs.as_aarch64()?)
    }

    fn kind(&self) -> Option<AccelKind> {
        Some(AccelKind::Whpx)
    }

    fn io_data(&self) -> VcpuResult<&[u8]> {
        self.expect("data of a write", true).map(|(access, _)| access.data())
    }

    fn complete_read(&mut self, data: &[u8]) -> VcpuResult<()> {
        self.answer(data)
    }

    fn pending_access(&self) -> Option<PendingAccess> {
        self.access.as_ref().and_then(Access::pending)
    }

    fn kick_handle(&self) -> VcpuResult<VcpuKick> {
        Ok(VcpuKick::new(Arc::<Kick>::clone(&self.kick)))
    }

    fn raw_exit(&self) -> Option<u64> {
        Some(self.last_exit.into())
    }

    fn as_aarch64(&mut self) -> Option<&mut dyn Aarch64Vcpu> {
        Some(self)
    }
}

impl Aarch64Vcpu for WhpxVcpu {
    fn get_sys_reg(&self, encoding: u16) -> VcpuResult<u64> {
        self.registers.sys(encoding)
    }

    fn set_sys_reg(&mut self, encoding: u16, value: u64) -> VcpuResult<()> {
        self.registers.set_sys(encoding, value)
    }

    fn list_sys_regs(&self) -> VcpuResult<Vec<u16>> {
        Ok(self.registers.list_sys_regs())
    }

    fn save_registers(&self) -> VcpuResult<Vec<PlatformRegister>> {
        self.check_features()?;
        self.registers.save()
    }

    fn restore_registers(&mut self, registers: &[PlatformRegister]) -> VcpuResult<()> {
        self.check_features()?;
        self.registers.restore(registers)
    }

    fn get_events(&self) -> VcpuResult<Aarch64Events> {
        Ok(Aarch64Events {
            serror_pending: self.serror.is_some(),
            serror_esr: self.serror.filter(|esr| *esr != 0),
            external_abort: false,
        })
    }

    fn set_events(&mut self, events: &Aarch64Events) -> VcpuResult<()> {
        if events.external_abort {
            if self.access.take().is_none() {
                return Err(AccelError::invalid("external abort", "the last exit was no access"));
            }
            let (syndrome, far) = self.abort;
            self.external_abort(class::DATA_ABORT << 26 | syndrome & ISS_WRITE, far)?;
        }
        if events.serror_pending {
            self.serror = Some(events.serror_esr.unwrap_or(0));
        }
        Ok(())
    }

    fn get_mp_state(&self) -> VcpuResult<Aarch64MpState> {
        self.registers.power()
    }

    fn set_mp_state(&mut self, state: Aarch64MpState) -> VcpuResult<()> {
        match state {
            Aarch64MpState::Running | Aarch64MpState::PoweredOff => self.registers.set_power(state),
            _ => Err(self.group_unsupported("a suspended vCPU")),
        }
    }

    fn get_virtual_timer(&self) -> VcpuResult<VirtualTimer> {
        let [control, compare, count] = [CNTV_CTL_EL0, CNTV_CVAL_EL0, CNTVCT_EL0].map(|reg| self.registers.sys(reg));
        let (control, compare, count) = (control? & 3, compare?, count?);
        let due = control & 1 != 0 && count >= compare;
        Ok(VirtualTimer { control: control | u64::from(due) << 2, compare, count })
    }

    fn set_virtual_timer(&mut self, timer: &VirtualTimer) -> VcpuResult<()> {
        self.registers.set_sys(CNTVCT_EL0, timer.count)?;
        self.registers.set_sys(CNTV_CVAL_EL0, timer.compare)?;
        self.registers.set_sys(CNTV_CTL_EL0, timer.control & 3)
    }

    fn features(&self) -> Aarch64Features {
        self.vm.shown
    }

    fn reset(&mut self) -> VcpuResult<()> {
        (self.access, self.serror) = (None, None);
        self.registers.reset()
    }

    fn group_unsupported(&self, what: &'static str) -> AccelError {
        self.unsupported(what)
    }
}

impl Drop for WhpxVcpu {
    fn drop(&mut self) {
        // No cancellation is under way from here on.
        self.kick.gate.close();
        // Nobody is left who could be told; at the latest it goes with the partition.
        let _ = self.vm.partition().delete_vp(self.id);
    }
}
