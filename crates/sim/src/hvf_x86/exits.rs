//! What an exit leaves in the VMCS.

use super::state::Vmcs;
use crate::hostile::Mischief;
use vm_accel_softcpu::{Cpu, Exception, Intercept};
use vm_accel_sys::hvf::x86_64::{ept_violation, exit, irq_info, vmcs};

/// What an exit tells, apart from the guest's state.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Told {
    pub(super) reason: u32,
    pub(super) qualification: u64,
    /// `None` where the manual leaves it undefined.
    pub(super) length: Option<u8>,
    pub(super) gpa: Option<u64>,
    pub(super) event: Option<(u32, u32)>,
}

impl Told {
    /// An exit that has nothing to tell.
    pub(super) fn only(reason: u32) -> Self {
        Self { reason, ..Self::default() }
    }

    /// An instruction that exits.
    fn instruction(reason: u32, qualification: u64, length: u8) -> Self {
        Self { reason, qualification, length: Some(length), ..Self::default() }
    }

    /// A violation of the EPT; what the tables allow is `flags`.
    pub(super) fn ept(gpa: u64, access: u64, flags: u64) -> Self {
        let qualification = access | (flags & 7) << ept_violation::ALLOWED_SHIFT;
        Self { reason: exit::EPT_VIOLATION, qualification, gpa: Some(gpa), ..Self::default() }
    }

    /// Writes it down. Undefined fields hold garbage.
    pub(super) fn record(self, fields: &mut Vmcs, garbage: &mut Mischief) {
        let mut noise = || if garbage.is_hostile() { garbage.draw() } else { 0x5a5a_a5a5_dead_beef };
        fields.set(vmcs::EXIT_REASON, self.reason.into());
        fields.set(vmcs::EXIT_QUALIFICATION, self.qualification);
        fields.set(vmcs::VMEXIT_INSTR_LEN, self.length.map_or_else(&mut noise, u64::from));
        fields.set(vmcs::GUEST_PHYSICAL_ADDRESS, self.gpa.unwrap_or_else(&mut noise));
        fields.set(vmcs::GUEST_LINEAR_ADDRESS, noise());
        fields.set(vmcs::INSTR_INFO, noise());
        let (info, code) = self.event.unwrap_or((0, noise() as u32));
        fields.set(vmcs::VMEXIT_IRQ_INFO, info.into());
        fields.set(vmcs::VMEXIT_IRQ_ERROR, code.into());
    }
}

/// The information field of an exception (Intel SDM vol. 3, 25.9.2).
pub(super) fn event_of(exception: Exception) -> (u32, u32) {
    let kind = if exception.is_trap() { irq_info::SOFT_EXCEPTION } else { irq_info::HARD_EXCEPTION };
    let code = exception.error_code();
    let valid = if code.is_some() { irq_info::ERROR_VALID } else { 0 };
    (irq_info::VALID | kind | valid | u32::from(exception.vector()), code.unwrap_or(0))
}

/// Skips legacy prefixes; answers the opcode and whether there was a REP.
fn opcode(bytes: &[u8]) -> (u8, bool) {
    let mut rep = false;
    for byte in bytes {
        match byte {
            0xf2 | 0xf3 => rep = true,
            0x26 | 0x2e | 0x36 | 0x3e | 0x40..=0x4f | 0x64..=0x67 | 0xf0 => {}
            _ => return (*byte, rep),
        }
    }
    (0, rep)
}

/// A port access (Intel SDM vol. 3, table 28-5).
pub(super) fn io(cpu: &mut Cpu, port: u16, size: u8, write: bool) -> Told {
    let (bytes, length) = cpu.peek().unwrap_or_default();
    let (opcode, rep) = opcode(&bytes);
    let bit = |on: bool, n: u32| u64::from(on) << n;
    let is_string = matches!(opcode, 0x6c..=0x6f);
    let qualification = u64::from(size - 1)
        | bit(!write, 3)
        | bit(is_string, 4)
        | bit(rep && is_string, 5)
        | bit(matches!(opcode, 0xe4..=0xe7), 6)
        | u64::from(port) << 16;
    Told::instruction(exit::IO, qualification, length)
}

/// What became of an intercept.
pub(super) enum Intercepted {
    Exit(Told),
    /// The processor raises this instead.
    Raise(Exception),
}

/// An instruction or exception that the controls intercept.
pub(super) fn intercepted(cpu: &mut Cpu, what: Intercept, rdtsc_exits: bool) -> Intercepted {
    let (bytes, length) = cpu.peek().unwrap_or_default();
    let instruction = |reason, qualification| Intercepted::Exit(Told::instruction(reason, qualification, length));
    match what {
        Intercept::Cpuid { .. } => instruction(exit::CPUID, 0),
        Intercept::Msr { write, .. } => instruction(if write { exit::WRMSR } else { exit::RDMSR }, 0),
        Intercept::Xsetbv => instruction(exit::XSETBV, 0),
        Intercept::Halt => instruction(exit::HLT, 0),
        Intercept::Rdtsc { p: true } if !rdtsc_exits => Intercepted::Raise(Exception::Ud),
        Intercept::Rdtsc { p } => instruction(if p { exit::RDTSCP } else { exit::RDTSC }, 0),
        // VMMCALL is AMD's.
        Intercept::Hypercall if bytes.get(2) == Some(&0xd9) => Intercepted::Raise(Exception::Ud),
        Intercept::Hypercall => instruction(exit::VMCALL, 0),
        Intercept::Cr { number, value } => {
            // Intel SDM vol. 3, table 28-3: the register, and how it is reached.
            let how = match (bytes.get(..2), value) {
                (Some([0x0f, 0x06]), _) => 2,
                (Some([0x0f, 0x01]), _) => 3,
                (_, Some(_)) => 0,
                (_, None) => 1,
            };
            instruction(exit::MOV_CR, u64::from(number) | how << 4)
        }
        Intercept::Exception(exception) => Intercepted::Exit(Told {
            reason: exit::EXCEPTION_NMI,
            qualification: match exception {
                Exception::Db(bits) => bits,
                Exception::Pf { addr, .. } => addr,
                _ => 0,
            },
            length: exception.is_trap().then_some(length),
            gpa: None,
            event: Some(event_of(exception)),
        }),
        other => {
            super::complain(format!("the simulator does not know the intercept {other:?}"));
            instruction(exit::INVD, 0)
        }
    }
}
