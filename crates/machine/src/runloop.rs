//! The loop of one vCPU: runs the guest and serves its exits until the machine has ended.
//!
//! It must leave whenever the machine's [`Control`] says so, and put into it every reason of its own; it never unwinds
//! or panics on what a guest does.

use vm_accel::aarch64;
use vm_accel::x86_64::Reg;
use vm_accel::{AccelError, IoDirection, VcpuExit, VcpuOps};

use crate::bus::Bus;
use crate::control::{Control, Failure, Outcome};
use crate::pc::interrupts::{Offer, SplitChips};

/// What a call that no hypervisor implements leaves in RAX: KVM's `-KVM_ENOSYS` (Linux `uapi/linux/kvm_para.h`).
const NO_SUCH_HYPERCALL: u64 = (-1000i64) as u64;
/// What it leaves in X0: NOT_SUPPORTED (Arm DEN0028, "Return Codes").
const NOT_SUPPORTED: u64 = (-1i64) as u64;

/// What the exits of a guest lead to.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wiring<'a> {
    pub(crate) ports: &'a Bus,
    pub(crate) mmio: &'a Bus,
    /// The board's own interrupt controllers, if it has them.
    pub(crate) chips: Option<&'a SplitChips>,
}

/// The CPU that takes the PICs' interrupts.
const BOOT_CPU: u32 = 0;

/// Runs `vcpu` until the machine of `control` has ended, for its own reasons or others'.
pub(crate) fn run(vcpu: &mut dyn VcpuOps, wiring: Wiring<'_>, control: &Control) {
    let cpu = vcpu.get_id();
    let fail = |during: String, source| Outcome::Failed(Failure::Vcpu { cpu, during, source });
    // Most accesses fit; a string instruction with REP can be longer.
    let mut buffer = Vec::with_capacity(8);
    let external = wiring.chips.filter(|_| cpu == BOOT_CPU);
    let mut offer = Offer::default();
    // The order matters: whoever ends the machine sets the latch first and kicks then, and a kick is sticky. So either
    // the latch is seen here, or the kick makes run() return.
    while !control.is_finished() {
        let step = external
            .map_or(Ok(()), |chips| chips.offer(vcpu, &mut offer))
            .map_err(|source| fail("injecting an interrupt".to_owned(), source))
            .and_then(|()| vcpu.run().map_err(|source| fail("run".to_owned(), source)))
            .and_then(|exit| {
                serve(vcpu, exit, wiring, &mut buffer).map_err(|source| fail(describe(vcpu, exit), source))
            });
        if let Some(outcome) = step.unwrap_or_else(Some) {
            control.finish(outcome);
        }
    }
}

/// Serves one exit. `Some` ends the machine.
fn serve(
    vcpu: &mut dyn VcpuOps,
    exit: VcpuExit,
    wiring: Wiring<'_>,
    buffer: &mut Vec<u8>,
) -> Result<Option<Outcome>, AccelError> {
    let cpu = vcpu.get_id();
    if let (VcpuExit::EndOfInterrupt { vector }, Some(chips)) = (exit, wiring.chips) {
        chips.end_of_interrupt(vector);
        return Ok(None);
    }
    match exit {
        VcpuExit::Io { port, direction: IoDirection::Out, size } => {
            vcpu.io_data()?.chunks(element(size)).for_each(|data| wiring.ports.write(port.into(), data));
        }
        VcpuExit::Io { port, direction: IoDirection::In, size } => {
            vcpu.prepare_read(buffer);
            buffer.chunks_mut(element(size)).for_each(|data| wiring.ports.read(port.into(), data));
            vcpu.complete_read(buffer)?;
        }
        VcpuExit::Mmio { addr, is_write: true, .. } => wiring.mmio.write(addr, vcpu.io_data()?),
        VcpuExit::Mmio { addr, is_write: false, .. } => {
            vcpu.prepare_read(buffer);
            wiring.mmio.read(addr, buffer);
            vcpu.complete_read(buffer)?;
        }
        // A kick (the loop looks at the latch), or the moment for an interrupt (the loop offers it).
        VcpuExit::Interrupt | VcpuExit::InterruptWindow => {}
        VcpuExit::SystemCall => {
            let mut regs = vcpu.get_regs()?;
            match vcpu.as_aarch64() {
                Some(_) => regs.gpr[aarch64::Reg::X0 as usize] = NOT_SUPPORTED,
                None => regs.gpr[Reg::Rax as usize] = NO_SUCH_HYPERCALL,
            }
            vcpu.set_regs(&regs)?;
        }
        VcpuExit::Msr { .. } => vcpu.fail_access()?,
        VcpuExit::Shutdown => return Ok(Some(Outcome::Shutdown)),
        VcpuExit::Reset => return Ok(Some(Outcome::Reset)),
        VcpuExit::TripleFault => return Ok(Some(Outcome::TripleFault { cpu })),
        VcpuExit::Crash => return Ok(Some(Outcome::Crash { cpu })),
        VcpuExit::Halted => return Ok(Some(Outcome::Failed(Failure::HaltedForever { cpu }))),
        _ => {
            let exit = describe(vcpu, exit);
            return Ok(Some(Outcome::Failed(Failure::UnexpectedExit { cpu, exit })));
        }
    }
    Ok(None)
}

/// The size of an element as a chunk length, which must not be zero whatever a backend says.
fn element(size: u8) -> usize {
    usize::from(size.max(1))
}

/// An exit for messages: what it is, where, and the platform's own number if there is one.
fn describe(vcpu: &dyn VcpuOps, exit: VcpuExit) -> String {
    let place = vcpu.get_regs().map_or_else(|_| String::new(), |regs| format!(" at {:#x}", regs.pc));
    let raw = vcpu.raw_exit().map_or_else(String::new, |raw| format!(" (platform's exit {raw:#x})"));
    format!("{exit:x?}{place}{raw}")
}

#[cfg(test)]
#[path = "runloop_tests.rs"]
mod tests;
