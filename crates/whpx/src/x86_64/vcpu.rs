//! A virtual processor: entered, left, its registers moved.
//!
//! The platform never completes an access: RIP stands at the instruction, which the emulator executes. After HLT alone RIP is
//! behind it already (inferred from openvmm, QEMU, crosvm and hyperlight, which never touch it).
//!
//! Later builds keep a halted processor inside instead, whose APIC nobody emulates (as QEMU's developers found): only its
//! internal activity tells. So whoever comes back by a cancellation is looked at, until an exit for HLT was seen.

use super::Whpx;
use super::partition::Partition;
use super::registers::{ROWS, Row};
use crate::partition::is_code;
use std::cell::RefCell;
use std::sync::Arc;
use std::time::Duration;
use vm_accel_backend::lock;
use vm_accel_backend::x86::{Engine, Groups, Left, Order, PlatformApic, PortAccess, Shared};
use vm_accel_core::accel::{AccelKind, MemoryFlags};
use vm_accel_core::error::{AccelError, VcpuResult};
use vm_accel_core::regs::x86_64::{FXSAVE_SIZE, MpState, X86FpuRegs};
use vm_accel_core::vcpu_common::VcpuExit;
use vm_accel_softcpu::{Cpu, CpuState, Exception, Exit};
use vm_accel_sys::whpx::code::WHV_E_INVALID_VP_REGISTER_NAME;
use vm_accel_sys::whpx::x86_64::defs::*;
use vm_accel_sys::whpx::x86_64::fields::{Deliverability, InternalActivity, MemoryAccessInfo};
use vm_accel_sys::whpx::x86_64::{ExitContext, RegisterValue};

/// Where an XSAVE area has XCOMP_BV (Intel SDM vol. 1, 13.4.2).
const XCOMP_BV: usize = FXSAVE_SIZE + 8;

/// How long a halted processor may stay inside where the VMM waits to hear of it.
const LOOK_FOR_HALT: Duration = Duration::from_millis(20);

/// Registers that each entry sets if they differ; with the platform's APIC only the last.
const EXTRAS: [WHV_REGISTER_NAME; 3] =
    [WHvX64RegisterCr8, WHvX64RegisterApicBase, WHvX64RegisterDeliverabilityNotifications];
const CR8: usize = 0;
const NOTIFICATIONS: usize = 2;

/// One virtual processor.
pub(super) struct Processor {
    shared: Arc<Shared<Whpx>>,
    partition: Arc<Partition>,
    vp: u32,
    /// The platform emulates its local APIC.
    has_apic: bool,
    /// HLT was seen to leave.
    halt_leaves: bool,
    /// The registers that this version of the platform has.
    rows: Vec<&'static Row>,
    /// What the platform has in [`EXTRAS`], as far as it is known.
    extras: [Option<u64>; EXTRAS.len()],
    /// The XSAVE area as it was last read: what the emulator does not know of it goes back unchanged.
    xsave: RefCell<Vec<u8>>,
    last_exit: WHV_RUN_VP_EXIT_REASON,
    /// Nothing was stored so far.
    is_new: bool,
}

impl Processor {
    pub(super) fn new(shared: &Arc<Shared<Whpx>>, vp: u32) -> VcpuResult<Self> {
        let (partition, has_apic) = lock(&shared.platform().partition).clone();
        partition.create_vp(vp)?;
        let mut new = Self {
            shared: Arc::clone(shared),
            partition,
            vp,
            has_apic,
            halt_leaves: false,
            rows: ROWS.iter().collect(),
            extras: [None; EXTRAS.len()],
            xsave: RefCell::default(),
            last_exit: WHvRunVpExitReasonNone,
            is_new: true,
        };
        let mut scratch = CpuState::reset();
        match new.read(Groups::MSR, &mut scratch) {
            Err(why) if is_code(&why, WHV_E_INVALID_VP_REGISTER_NAME) => {
                // Each release has more of them; which ones this one has only trying tells.
                let has = |row: &Row| row.group != Groups::MSR || new.partition.get(vp, &[row.name]).is_ok();
                new.rows = ROWS.iter().filter(|row| has(row)).collect();
            }
            other => other?,
        }
        Ok(new)
    }

    /// Reads the registers of the table.
    fn read(&self, groups: Groups, into: &mut CpuState) -> VcpuResult<()> {
        let rows: Vec<_> = self.rows.iter().filter(|row| groups.contains(row.group)).collect();
        let names: Vec<_> = rows.iter().map(|row| row.name).collect();
        if names.is_empty() {
            return Ok(());
        }
        let values = self.partition.get(self.vp, &names)?;
        rows.iter().zip(values).for_each(|(row, value)| (row.set)(into, value));
        Ok(())
    }

    /// Asks for the exits and values that an entry is ordered with.
    fn set_extras(&mut self, order: &Order) -> VcpuResult<()> {
        let notifications = Deliverability(0)
            .with_nmi(order.nmi_window.into())
            .with_interrupt(order.window.is_some().into())
            .with_interrupt_priority(order.window.unwrap_or(0).into());
        let wanted = [order.cr8.into(), order.apic_base, notifications.0];
        let (mut names, mut values) = (Vec::new(), Vec::new());
        let first = if self.has_apic { NOTIFICATIONS } else { CR8 };
        let differs = |(n, value): &(usize, u64)| Some(*value) != self.extras[*n];
        for (n, value) in wanted.into_iter().enumerate().skip(first).filter(differs) {
            names.push(EXTRAS[n]);
            values.push(RegisterValue::from_u64(value));
        }
        self.partition.set(self.vp, &names, &values)?;
        self.extras = wanted.map(Some);
        Ok(())
    }

    fn activity(&self) -> VcpuResult<InternalActivity> {
        let values = self.partition.get(self.vp, &[WHvRegisterInternalActivityState])?;
        Ok(InternalActivity(values.first().map_or(0, |value| value.low)))
    }

    fn set_activity(&self, activity: InternalActivity) -> VcpuResult<()> {
        let value = RegisterValue::from_u64(activity.0);
        self.partition.set(self.vp, &[WHvRegisterInternalActivityState], &[value])
    }

    /// Ends HLT; false if the processor is not in it.
    fn leave_halt(&self) -> VcpuResult<bool> {
        let activity = self.activity()?;
        if activity.halt_suspend() == 0 {
            return Ok(false);
        }
        self.set_activity(activity.with_halt_suspend(0))?;
        Ok(true)
    }

    /// What a cancellation met. An event in delivery ends HLT, so with one there is nothing to tell.
    fn canceled(&self, event_pending: bool) -> VcpuResult<Left> {
        if self.has_apic || self.halt_leaves || event_pending || self.activity()?.halt_suspend() == 0 {
            return Ok(Left::Again);
        }
        // That it may not be written without an APIC does no harm: an event in delivery ends HLT.
        let _ = self.leave_halt();
        Ok(Left::Exit(Exit::Halted))
    }

    /// What to do about a fault. Memory that is mapped may just not have been there yet (openvmm, `handle_memory_access`): the
    /// platform tries again. A write may be one to read-only memory as well; nobody tells what else the instruction does.
    /// With the platform's APIC the emulator has none, so it gets no instruction that the platform can finish itself.
    fn memory_access(&self, info: MemoryAccessInfo, gpa: u64, event_pending: bool) -> Left {
        let is_write = info.access_type() == WHvMemoryAccessWrite as u32;
        let is_ram = || self.shared.slots.find(gpa).is_some_and(|(.., flags)| flags.contains(MemoryFlags::WRITE));
        match info.gpa_unmapped() != 0 {
            true => Left::Emulate(Groups::FPU | Groups::DEBUG),
            false if !is_write || event_pending || self.has_apic && is_ram() => Left::Again,
            false => Left::Emulate(Groups::FPU | Groups::DEBUG | Groups::MSR),
        }
    }
}

/// A port access of which the context tells all that there is to know.
fn port_access(context: &ExitContext) -> Option<PortAccess> {
    let (state, (info, payload)) = (context.execution_state(), context.io_access());
    let is_more = info.string_op() | info.rep_prefix() != 0
        || state.debug_active() | state.interruption_pending() | state.interrupt_shadow() != 0;
    let rip = context.rip();
    let next = PortAccess::next(rip, context.instruction_length(), context.rflags()).filter(|_| !is_more)?;
    let (size, is_write) = (info.access_size() as u8, info.is_write() != 0);
    let access = PortAccess { port: payload.PortNumber, size, is_write, rax: payload.Rax, rip, next };
    matches!(size, 1 | 2 | 4).then_some(access)
}

impl PlatformApic for Processor {
    fn page(&self) -> VcpuResult<[u8; 1024]> {
        self.partition.apic_page(self.vp)
    }

    fn set_page(&self, page: &[u8; 1024]) -> VcpuResult<()> {
        self.partition.set_apic_page(self.vp, page)
    }

    fn control(&self) -> VcpuResult<(u64, u8)> {
        let values = self.partition.get(self.vp, &[WHvX64RegisterApicBase, WHvX64RegisterCr8])?;
        Ok((values[0].low, values[1].low as u8))
    }

    fn set_control(&self, base: u64, cr8: u8) -> VcpuResult<()> {
        if self.control()? == (base, cr8) {
            return Ok(());
        }
        let values = [base, cr8.into()].map(RegisterValue::from_u64);
        self.partition.set(self.vp, &[WHvX64RegisterApicBase, WHvX64RegisterCr8], &values)
    }

    fn mp_state(&self) -> VcpuResult<MpState> {
        let activity = self.activity()?;
        Ok(match (activity.startup_suspend(), activity.halt_suspend()) {
            (0, 0) => MpState::Runnable,
            (0, _) => MpState::Halted,
            _ => MpState::Uninitialized,
        })
    }

    fn set_mp_state(&self, state: MpState) -> VcpuResult<()> {
        let waits = matches!(state, MpState::Uninitialized | MpState::InitReceived);
        let halted = (state == MpState::Halted).into();
        self.set_activity(InternalActivity(0).with_startup_suspend(waits.into()).with_halt_suspend(halted))
    }
}

/// An XSAVE area with other x87 and SSE registers; they are in the same place in both formats.
fn with_fpu(area: &[u8], fxsave: &[u8; FXSAVE_SIZE]) -> VcpuResult<Vec<u8>> {
    let mut area = area.to_vec();
    X86FpuRegs::from_fxsave(fxsave).write_xsave(&mut area)?;
    if area[XCOMP_BV + 7] & 0x80 != 0 {
        // Compacted: the area has room for exactly these components.
        area[XCOMP_BV] |= 3;
    }
    Ok(area)
}

impl Engine for Processor {
    // The platform has exits for exceptions, but no debug registers of the host's beside the guest's.
    const DEBUGS_ON_EMULATOR: bool = true;

    fn load(&self, groups: Groups, into: &mut CpuState) -> VcpuResult<()> {
        self.read(groups, into)?;
        if let Some(Exception::Pf { addr, .. }) = &mut into.events.exception {
            *addr = into.cr2;
        }
        if groups.contains(Groups::FPU) {
            let area = self.partition.xsave(self.vp)?;
            let mut image = into.fxsave();
            X86FpuRegs::from_xsave(&area)?.write_fxsave(&mut image);
            // MXCSR with bits that the emulator lacks would be refused; then the emulator's registers stay.
            let _ = into.fxrstor(&image);
            *self.xsave.borrow_mut() = area;
        }
        Ok(())
    }

    fn store(&mut self, groups: Groups, old: &CpuState, new: &CpuState) -> VcpuResult<()> {
        // The MSRs of a new processor are the platform's choice where ours is no other than the emulator's reset value
        // (IA32_MISC_ENABLE, say, which need not be writable to that).
        let reset = std::mem::take(&mut self.is_new).then(CpuState::reset);
        let (mut names, mut values) = (Vec::new(), Vec::new());
        for row in self.rows.iter().filter(|row| groups.contains(row.group)) {
            let old = reset.as_ref().filter(|_| row.group == Groups::MSR).unwrap_or(old);
            let value = (row.get)(new);
            if value != (row.get)(old) {
                names.push(row.name);
                values.push(value);
            }
        }
        self.partition.set(self.vp, &names, &values)?;
        if self.has_apic && names.contains(&WHvRegisterPendingInterruption) {
            // Otherwise the hypervisor waits with it for what ends HLT by itself (openvmm, `inject_extint`).
            self.leave_halt()?;
        }
        if groups.contains(Groups::FPU) && new.fxsave() != old.fxsave() {
            let area = with_fpu(&self.xsave.borrow(), &new.fxsave())?;
            self.partition.set_xsave(self.vp, &area)?;
            *self.xsave.get_mut() = area;
        }
        Ok(())
    }

    fn enter(&mut self, _: &mut Cpu, order: &Order) -> VcpuResult<Left> {
        self.set_extras(order)?;
        let mut context = ExitContext::default();
        self.partition.run(self.vp, &mut context)?;
        self.last_exit = context.reason();
        self.extras[CR8] = Some(context.cr8().into());
        let is_pending = context.execution_state().interruption_pending() != 0;
        #[allow(non_upper_case_globals, reason = "the platform's names")]
        Ok(match context.reason() {
            WHvRunVpExitReasonMemoryAccess => {
                let (info, payload) = context.memory_access();
                self.memory_access(info, payload.Gpa, is_pending)
            }
            WHvRunVpExitReasonX64IoPortAccess => port_access(&context).map_or(Left::Emulate(Groups::DEBUG), Left::Port),
            WHvRunVpExitReasonX64Cpuid | WHvRunVpExitReasonHypercall => Left::Emulate(Groups::DEBUG),
            WHvRunVpExitReasonX64MsrAccess => Left::Emulate(Groups::DEBUG | Groups::MSR),
            WHvRunVpExitReasonX64Halt => {
                // With the platform's APIC nothing leaves for HLT; if something does, the platform is told to wait.
                self.halt_leaves = true;
                Left::Exit(Exit::Halted)
            }
            WHvRunVpExitReasonX64ApicEoi if self.has_apic => {
                Left::Other(VcpuExit::EndOfInterrupt { vector: context.eoi_vector() as u8 })
            }
            WHvRunVpExitReasonUnrecoverableException => Left::Exit(Exit::Shutdown),
            WHvRunVpExitReasonX64InterruptWindow => {
                // Documented as one-shot; written anew in either case.
                self.extras[NOTIFICATIONS] = None;
                Left::Again
            }
            WHvRunVpExitReasonNone => Left::Again,
            WHvRunVpExitReasonCanceled => self.canceled(is_pending)?,
            WHvRunVpExitReasonInvalidVpRegisterValue => {
                return Err(AccelError::EntryFailed { kind: AccelKind::Whpx, reason: context.reason() as u64 });
            }
            _ => Left::Other(VcpuExit::Unknown),
        })
    }

    fn finish_port(&mut self, rip: u64, rax: Option<u64>) -> VcpuResult<()> {
        let values = [rip, rax.unwrap_or(0)].map(RegisterValue::from_u64);
        let names = [WHvX64RegisterRip, WHvX64RegisterRax];
        self.partition.set(self.vp, &names[..1 + usize::from(rax.is_some())], &values)
    }

    fn canceller(&self) -> Option<Box<dyn Fn() + Send + Sync>> {
        let (partition, vp) = (Arc::clone(&self.partition), self.vp);
        // A cancellation that fails is repeated.
        Some(Box::new(move || drop(partition.cancel(vp))))
    }

    fn cr8(&self) -> Option<u8> {
        self.extras[CR8].map(|class| class as u8)
    }

    fn apic(&self) -> Option<&dyn PlatformApic> {
        self.has_apic.then_some(self)
    }

    fn look_for_halt(&self) -> Option<Duration> {
        (!self.has_apic && !self.halt_leaves).then_some(LOOK_FOR_HALT)
    }

    fn tsc(&self) -> VcpuResult<Option<u64>> {
        Ok(self.partition.get(self.vp, &[WHvX64RegisterTsc])?.first().map(|value| value.low))
    }

    fn set_tsc(&mut self, value: u64) -> VcpuResult<bool> {
        self.partition.set(self.vp, &[WHvX64RegisterTsc], &[RegisterValue::from_u64(value)])?;
        Ok(true)
    }

    fn raw_exit(&self) -> Option<u64> {
        Some(self.last_exit as u32 as u64)
    }
}

impl Drop for Processor {
    fn drop(&mut self) {
        // Nobody is left who could be told; at the latest it goes with the partition.
        let _ = self.partition.delete_vp(self.vp);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_compacted_area_keeps_its_format_and_the_components_that_are_not_ours() {
        let mut area = vec![0; 1024];
        // AVX alone is in use, and follows the header in either format.
        area[512] = 4;
        area[XCOMP_BV..XCOMP_BV + 8].copy_from_slice(&(1u64 << 63 | 7).to_le_bytes());
        area[576..832].fill(0xab);
        let mut state = CpuState::reset();
        state.xmm[3] = 0x1234;
        let changed = with_fpu(&area, &state.fxsave()).unwrap();
        assert_eq!(changed[512], 7);
        assert_eq!(changed[XCOMP_BV..832], area[XCOMP_BV..832]);
        let regs = X86FpuRegs::from_xsave(&changed).unwrap();
        assert_eq!((regs.xmm[3], regs.fcw), (0x1234, 0x40));
    }

    #[test]
    fn a_short_area_is_an_error() {
        assert!(with_fpu(&[0; 520], &CpuState::reset().fxsave()).is_err());
    }
}
