//! A wrapper that makes a vCPU misbehave as hosts do.
//!
//! It must never break the completion protocol by itself: an injected failure happens instead of the call, and an
//! injected Interrupt finishes the pending access first.

use crate::accel::AccelKind;
use crate::error::{AccelError, VcpuResult};
use crate::regs::aarch64::Aarch64Vcpu;
use crate::regs::x86_64::X86Vcpu;
use crate::regs::{FpuRegs, GuestRegs};
use crate::vcpu_common::{DebugEvent, GuestDebug, PendingAccess, VcpuExit, VcpuKick, VcpuOps};
use std::cell::Cell;

/// The operations of [`VcpuOps`] that a [`FaultInjector`] can make fail.
#[allow(missing_docs)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(usize)]
pub enum Operation {
    Run,
    Quiesce,
    GetRegs,
    SetRegs,
    GetFpuRegs,
    SetFpuRegs,
    IoData,
    CompleteRead,
    FailAccess,
    KickHandle,
    SetGuestDebug,
    DebugEvent,
}

const OPERATIONS: usize = Operation::DebugEvent as usize + 1;

/// Wraps a vCPU: makes the n-th call of an operation fail, and lets `run()` return [`VcpuExit::Interrupt`] at
/// moments that a seed decides, as signals do on a real host.
///
/// A call that fails does not reach the wrapped vCPU. What hangs off [`VcpuOps::as_x86`] and [`VcpuOps::as_aarch64`]
/// is passed through.
#[derive(Debug)]
pub struct FaultInjector<V> {
    inner: V,
    calls: [Cell<u64>; OPERATIONS],
    faults: Vec<(Operation, u64, AccelError)>,
    interrupts: Option<Interrupts>,
}

/// When to interrupt.
#[derive(Debug)]
struct Interrupts {
    state: u64,
    one_in: u32,
    /// Never twice in a row: a loop that goes on after an Interrupt has to get somewhere.
    last: bool,
}

impl Interrupts {
    fn now(&mut self) -> bool {
        // SplitMix64 (Steele, Lea, Flood 2014): any seed is good, and a run can be repeated.
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let hit = (z ^ (z >> 31)).checked_rem(u64::from(self.one_in)) == Some(0);
        self.last = hit && !self.last;
        self.last
    }
}

impl<V: VcpuOps> FaultInjector<V> {
    /// A wrapper that injects nothing yet.
    #[must_use]
    pub fn new(inner: V) -> Self {
        Self { inner, calls: Default::default(), faults: Vec::new(), interrupts: None }
    }

    /// Lets the `nth` call (the first is 1) of an operation fail with `error`. May be used several times.
    #[must_use]
    pub fn fail(mut self, operation: Operation, nth: u64, error: AccelError) -> Self {
        self.faults.push((operation, nth, error));
        self
    }

    /// Lets about one in `one_in` calls of `run()` return [`VcpuExit::Interrupt`] without running the guest, but never
    /// two in a row; 0 is never. The same seed gives the same moments.
    ///
    /// The pending access is finished first if the wrapped vCPU can [`quiesce`](VcpuOps::quiesce); if that gives a
    /// further access, it is returned instead. Where it cannot, a call with a pending access is not interrupted.
    #[must_use]
    pub fn spurious_interrupts(mut self, seed: u64, one_in: u32) -> Self {
        self.interrupts = Some(Interrupts { state: seed, one_in, last: false });
        self
    }

    /// Calls of an operation until now, the failed ones included.
    #[must_use]
    pub fn calls(&self, operation: Operation) -> u64 {
        self.calls[operation as usize].get()
    }

    /// The wrapped vCPU.
    #[must_use]
    pub fn inner(&self) -> &V {
        &self.inner
    }

    /// The wrapped vCPU, without the wrapper.
    #[must_use]
    pub fn into_inner(self) -> V {
        self.inner
    }

    /// Counts a call; an error if it is to fail.
    fn enter(&self, operation: Operation) -> VcpuResult<()> {
        let calls = &self.calls[operation as usize];
        calls.set(calls.get() + 1);
        match self.faults.iter().find(|(op, nth, _)| (*op, *nth) == (operation, calls.get())) {
            Some((_, _, error)) => Err(error.clone()),
            None => Ok(()),
        }
    }
}

impl<V: VcpuOps> VcpuOps for FaultInjector<V> {
    fn get_id(&self) -> u32 {
        self.inner.get_id()
    }

    fn run(&mut self) -> VcpuResult<VcpuExit> {
        self.enter(Operation::Run)?;
        if self.interrupts.as_mut().is_some_and(Interrupts::now) {
            match self.inner.quiesce() {
                Err(AccelError::Unsupported { .. }) if self.inner.pending_access().is_none() => {
                    return Ok(VcpuExit::Interrupt);
                }
                Err(AccelError::Unsupported { .. }) => {}
                other => return other,
            }
        }
        self.inner.run()
    }

    fn quiesce(&mut self) -> VcpuResult<VcpuExit> {
        self.enter(Operation::Quiesce)?;
        self.inner.quiesce()
    }

    fn get_regs(&self) -> VcpuResult<GuestRegs> {
        self.enter(Operation::GetRegs)?;
        self.inner.get_regs()
    }

    fn set_regs(&mut self, regs: &GuestRegs) -> VcpuResult<()> {
        self.enter(Operation::SetRegs)?;
        self.inner.set_regs(regs)
    }

    fn get_fpu_regs(&self) -> VcpuResult<FpuRegs> {
        self.enter(Operation::GetFpuRegs)?;
        self.inner.get_fpu_regs()
    }

    fn set_fpu_regs(&mut self, regs: &FpuRegs) -> VcpuResult<()> {
        self.enter(Operation::SetFpuRegs)?;
        self.inner.set_fpu_regs(regs)
    }

    fn kind(&self) -> Option<AccelKind> {
        self.inner.kind()
    }

    fn io_data(&self) -> VcpuResult<&[u8]> {
        self.enter(Operation::IoData)?;
        self.inner.io_data()
    }

    fn complete_read(&mut self, data: &[u8]) -> VcpuResult<()> {
        self.enter(Operation::CompleteRead)?;
        self.inner.complete_read(data)
    }

    fn fail_access(&mut self) -> VcpuResult<()> {
        self.enter(Operation::FailAccess)?;
        self.inner.fail_access()
    }

    fn pending_access(&self) -> Option<PendingAccess> {
        self.inner.pending_access()
    }

    fn kick_handle(&self) -> VcpuResult<VcpuKick> {
        self.enter(Operation::KickHandle)?;
        self.inner.kick_handle()
    }

    fn set_guest_debug(&mut self, debug: &GuestDebug) -> VcpuResult<()> {
        self.enter(Operation::SetGuestDebug)?;
        self.inner.set_guest_debug(debug)
    }

    fn debug_event(&self) -> VcpuResult<DebugEvent> {
        self.enter(Operation::DebugEvent)?;
        self.inner.debug_event()
    }

    fn raw_exit(&self) -> Option<u64> {
        self.inner.raw_exit()
    }

    fn as_x86(&mut self) -> Option<&mut dyn X86Vcpu> {
        self.inner.as_x86()
    }

    fn as_aarch64(&mut self) -> Option<&mut dyn Aarch64Vcpu> {
        self.inner.as_aarch64()
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Answer, Script, ScriptedVcpu};
    use super::*;

    fn broken() -> AccelError {
        AccelError::invalid("test", "injected")
    }

    fn guest(reads: usize) -> ScriptedVcpu {
        let script = (0..reads).fold(Script::new(), |script, _| script.io_in(0x60, 1, Answer::exactly([7])));
        ScriptedVcpu::new(3, script.exit(VcpuExit::Halted)).unwrap()
    }

    #[test]
    fn only_the_chosen_call_fails_and_does_not_reach_the_vcpu() {
        let mut vcpu =
            FaultInjector::new(guest(2)).fail(Operation::Run, 2, broken()).fail(Operation::CompleteRead, 1, broken());
        vcpu.run().unwrap();
        assert_eq!(vcpu.complete_read(&[7]), Err(broken()));
        assert!(!vcpu.pending_access().unwrap().answered);
        vcpu.complete_read(&[7]).unwrap();
        assert_eq!(vcpu.run(), Err(broken()));
        vcpu.run().unwrap();
        vcpu.complete_read(&[7]).unwrap();
        assert_eq!(vcpu.run().unwrap(), VcpuExit::Halted);
        assert_eq!((vcpu.calls(Operation::Run), vcpu.calls(Operation::GetRegs)), (4, 0));
        vcpu.into_inner().finish().unwrap();
    }

    #[test]
    fn reads_of_registers_can_fail_through_a_shared_reference() {
        let vcpu = FaultInjector::new(guest(0)).fail(Operation::GetRegs, 1, broken());
        assert_eq!(vcpu.get_regs(), Err(broken()));
        assert!(vcpu.get_regs().is_ok());
    }

    fn moments(seed: u64, one_in: u32) -> Vec<bool> {
        let mut vcpu = FaultInjector::new(guest(200)).spurious_interrupts(seed, one_in);
        let mut moments = Vec::new();
        loop {
            let exit = vcpu.run().unwrap();
            moments.push(exit == VcpuExit::Interrupt);
            match exit {
                VcpuExit::Io { .. } => vcpu.complete_read(&[7]).unwrap(),
                VcpuExit::Interrupt => assert!(vcpu.pending_access().is_none()),
                _ => break,
            }
        }
        vcpu.inner().finish().unwrap();
        moments
    }

    #[test]
    fn spurious_interrupts_repeat_with_the_seed_and_never_come_twice_in_a_row() {
        let first = moments(1, 3);
        assert_eq!(first, moments(1, 3));
        assert_ne!(first, moments(2, 3));
        let always = moments(1, 1);
        assert!(always.windows(2).all(|pair| pair[0] != pair[1]));
        assert!(first.contains(&true) && first.len() < always.len());
        assert!(!moments(1, 0).contains(&true));
    }

    #[test]
    fn an_injected_interrupt_does_not_hide_an_unanswered_read() {
        let mut vcpu = FaultInjector::new(guest(1)).spurious_interrupts(0, 1);
        assert_eq!(vcpu.run().unwrap(), VcpuExit::Interrupt);
        vcpu.run().unwrap();
        assert_eq!(vcpu.run(), Err(AccelError::PendingRead { addr: 0x60, len: 1 }));
    }

    /// A vCPU with nothing but the six methods, and a pending access that it only tells of.
    struct Bare(Option<PendingAccess>);

    impl VcpuOps for Bare {
        fn get_id(&self) -> u32 {
            0
        }
        fn run(&mut self) -> VcpuResult<VcpuExit> {
            Ok(VcpuExit::Halted)
        }
        fn get_regs(&self) -> VcpuResult<GuestRegs> {
            Ok(GuestRegs::default())
        }
        fn set_regs(&mut self, _: &GuestRegs) -> VcpuResult<()> {
            Ok(())
        }
        fn get_fpu_regs(&self) -> VcpuResult<FpuRegs> {
            Err(self.unsupported("test"))
        }
        fn set_fpu_regs(&mut self, _: &FpuRegs) -> VcpuResult<()> {
            Err(self.unsupported("test"))
        }
        fn pending_access(&self) -> Option<PendingAccess> {
            self.0
        }
    }

    #[test]
    fn a_vcpu_that_cannot_quiesce_is_interrupted_only_between_accesses() {
        let access = PendingAccess { addr: 0, len: 1, is_write: true, answered: true };
        let run = |pending| FaultInjector::new(Bare(pending)).spurious_interrupts(0, 1).run().unwrap();
        assert_eq!(run(None), VcpuExit::Interrupt);
        assert_eq!(run(Some(access)), VcpuExit::Halted);
    }
}
