//! A virtual processor: entered, left, its registers moved.
//!
//! The platform never completes an access: RIP stands at the instruction, which the emulator executes. After HLT alone RIP is
//! behind it already (inferred from openvmm, QEMU, crosvm and hyperlight, which never touch it).

use super::partition::Partition;
use super::registers::{ROWS, Row};
use crate::accel::AccelKind;
use crate::error::{AccelError, VcpuResult};
use crate::platform::whpx::partition::is_code;
use crate::platform::x86::{Engine, Groups, Left, Order};
use crate::regs::x86_64::{FXSAVE_SIZE, X86FpuRegs};
use crate::vcpu_common::VcpuExit;
use std::cell::RefCell;
use std::sync::Arc;
use vm_accel_softcpu::{Cpu, CpuState, Exception, Exit};
use vm_accel_sys::whpx::code::WHV_E_INVALID_VP_REGISTER_NAME;
use vm_accel_sys::whpx::x86_64::defs::*;
use vm_accel_sys::whpx::x86_64::fields::{Deliverability, MemoryAccessInfo};
use vm_accel_sys::whpx::x86_64::{ExitContext, RegisterValue};

/// Where an XSAVE area has XCOMP_BV (Intel SDM vol. 1, 13.4.2).
const XCOMP_BV: usize = FXSAVE_SIZE + 8;

/// Registers that each entry sets if they differ.
const EXTRAS: [WHV_REGISTER_NAME; 3] =
    [WHvX64RegisterCr8, WHvX64RegisterApicBase, WHvX64RegisterDeliverabilityNotifications];
const CR8: usize = 0;
const NOTIFICATIONS: usize = 2;

/// One virtual processor.
pub(super) struct Processor {
    partition: Arc<Partition>,
    vp: u32,
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
    pub(super) fn new(partition: &Arc<Partition>, vp: u32) -> VcpuResult<Self> {
        partition.create_vp(vp)?;
        let mut new = Self {
            partition: Arc::clone(partition),
            vp,
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
                new.rows.retain(|row| row.group != Groups::MSR || partition.get(vp, &[row.name]).is_ok());
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
        for (n, value) in wanted.into_iter().enumerate().filter(|(n, value)| Some(*value) != self.extras[*n]) {
            names.push(EXTRAS[n]);
            values.push(RegisterValue::from_u64(value));
        }
        self.partition.set(self.vp, &names, &values)?;
        self.extras = wanted.map(Some);
        Ok(())
    }
}

/// What to do about a fault. Memory that is mapped may just not have been there yet (openvmm, `handle_memory_access`): the
/// platform tries again. A write may be one to read-only memory as well; nobody tells what else the instruction does.
fn memory_access(info: MemoryAccessInfo, event_pending: bool) -> Left {
    let is_write = info.access_type() == WHvMemoryAccessWrite as u32;
    match info.gpa_unmapped() != 0 {
        true => Left::Emulate(Groups::FPU | Groups::DEBUG),
        false if is_write && !event_pending => Left::Emulate(Groups::FPU | Groups::DEBUG | Groups::MSR),
        false => Left::Again,
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
        #[allow(non_upper_case_globals, reason = "the platform's names")]
        Ok(match context.reason() {
            WHvRunVpExitReasonMemoryAccess => {
                let is_pending = context.execution_state().interruption_pending() != 0;
                memory_access(context.memory_access().0, is_pending)
            }
            WHvRunVpExitReasonX64IoPortAccess | WHvRunVpExitReasonX64Cpuid | WHvRunVpExitReasonHypercall => {
                Left::Emulate(Groups::DEBUG)
            }
            WHvRunVpExitReasonX64MsrAccess => Left::Emulate(Groups::DEBUG | Groups::MSR),
            WHvRunVpExitReasonX64Halt => Left::Exit(Exit::Halted),
            WHvRunVpExitReasonUnrecoverableException => Left::Exit(Exit::Shutdown),
            WHvRunVpExitReasonX64InterruptWindow => {
                // Documented as one-shot; written anew in either case.
                self.extras[NOTIFICATIONS] = None;
                Left::Again
            }
            WHvRunVpExitReasonNone | WHvRunVpExitReasonCanceled => Left::Again,
            WHvRunVpExitReasonInvalidVpRegisterValue => {
                return Err(AccelError::EntryFailed { kind: AccelKind::Whpx, reason: context.reason() as u64 });
            }
            _ => Left::Other(VcpuExit::Unknown),
        })
    }

    fn canceller(&self) -> Option<Box<dyn Fn() + Send + Sync>> {
        let (partition, vp) = (Arc::clone(&self.partition), self.vp);
        // A cancellation that fails is repeated.
        Some(Box::new(move || drop(partition.cancel(vp))))
    }

    fn cr8(&self) -> Option<u8> {
        self.extras[CR8].map(|class| class as u8)
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
