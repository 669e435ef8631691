//! Instructions and exceptions for which a CPU leaves before they take effect: what hardware virtualisation calls
//! intercepts. Simulators of hypervisors ask for them through their [`Bus`](crate::Bus).

use crate::core::{Core, Trap};
use crate::cpu::Cpu;
use crate::decode;
use crate::exception::Exception;
use crate::exec::Exec;
use crate::exit::Exit;

/// What can be intercepted. The CPU leaves with [`Exit::Intercept`], RIP at the instruction and nothing changed, after the checks
/// that come first on hardware (privilege, invalid opcode).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Intercept {
    /// CPUID.
    Cpuid {
        /// EAX.
        leaf: u32,
    },
    /// RDMSR or WRMSR.
    Msr {
        /// ECX.
        index: u32,
        /// WRMSR.
        write: bool,
    },
    /// MOV to or from CR0, CR3, CR4 or CR8; CLTS and LMSW as writes of CR0.
    Cr {
        /// The register.
        number: u8,
        /// What is written; `None` for a read.
        value: Option<u64>,
    },
    /// XSETBV.
    Xsetbv,
    /// RDTSC or RDTSCP.
    Rdtsc {
        /// RDTSCP.
        p: bool,
    },
    /// HLT.
    Halt,
    /// VMCALL or VMMCALL.
    Hypercall,
    /// An exception that the guest raised, before its delivery. Injected ones are not intercepted.
    Exception(Exception),
}

impl Core {
    /// Leaves if the owner intercepts this.
    pub(crate) fn intercept(&mut self, what: Intercept) -> Exec {
        if self.bus.intercept(what) { self.trap(Trap::Exit(Exit::Intercept(what), false)) } else { Ok(()) }
    }
}

impl Cpu {
    /// Gives up the instruction that waits for an access: it starts anew at the next `run`.
    pub fn abandon(&mut self) {
        self.core.replay.commit();
    }

    /// Forgets all decoded code: the host may have changed guest memory without saying so.
    pub fn forget_code(&mut self) {
        self.cache.clear();
        self.core.bump_links();
    }

    /// The bytes at RIP, up to 15, and the length of the instruction that they begin with; `None` if it cannot be fetched.
    pub fn peek(&mut self) -> Option<(Vec<u8>, u8)> {
        let rip = self.core.st.rip;
        let mut bytes = [0; 15];
        let Ok(n) = self.fetch(rip, &mut bytes) else {
            self.core.trap = Trap::Nothing;
            return None;
        };
        let (op, _) = decode::one(&self.core, rip, &bytes[..n])?;
        Some((bytes[..n].to_vec(), op.len))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{CODE, Machine, STACK};
    use crate::{Answer, Bus, NoBus};

    /// Intercepts everything.
    struct Everything;
    impl Bus for Everything {
        fn intercept(&mut self, _: Intercept) -> bool {
            true
        }
    }

    #[test]
    fn an_intercepted_instruction_has_no_effect() {
        for (code, what) in [
            (&[0x0f, 0xa2][..], Intercept::Cpuid { leaf: 7 }),
            (&[0x0f, 0x32], Intercept::Msr { index: 0x10, write: false }),
            (&[0x0f, 0x30], Intercept::Msr { index: 0x10, write: true }),
            (&[0x0f, 0x22, 0xd8], Intercept::Cr { number: 3, value: Some(7) }),
            (&[0x44, 0x0f, 0x20, 0xc0], Intercept::Cr { number: 8, value: None }),
            (&[0x0f, 0x31], Intercept::Rdtsc { p: false }),
            (&[0xf4], Intercept::Halt),
            (&[0x0f, 0x01, 0xc1], Intercept::Hypercall),
            (&[0x0f, 0x0b], Intercept::Exception(Exception::Ud)),
            (&[0xcc], Intercept::Exception(Exception::Bp)),
        ] {
            let mut m = Machine::new(Box::new(Everything));
            // nop in front, so that a block is left in its middle.
            m.code(&[&[0x90], code].concat());
            m.cpu.update(|st| (st.gpr[0], st.gpr[1]) = (7, 0x10));
            let before = m.cpu.state().clone();
            for _ in 0..2 {
                assert_eq!(m.cpu.run(100), Exit::Intercept(what));
                let mut after = m.cpu.state().clone();
                assert_eq!(after.rip, CODE + 1);
                after.rip = CODE;
                assert!(after == before, "{what:?} changed the state");
            }
            assert_eq!(m.cpu.peek().map(|(_, len)| usize::from(len)), Some(code.len()));
        }
    }

    #[test]
    fn an_injected_exception_is_not_intercepted() {
        let mut m = Machine::new(Box::new(Everything));
        m.code(&[0x90]);
        m.cpu.inject_exception(Exception::Ud);
        // There is no IDT: the delivery fails, and what it ends with is no intercept of the injected exception.
        assert_eq!(m.cpu.run(100), Exit::Shutdown);
    }

    #[test]
    fn an_abandoned_access_happens_anew() {
        let mut m = Machine::new(Box::new(NoBus));
        // in al, 0x40
        m.code(&[0xe4, 0x40]);
        let io = Exit::Io { port: 0x40, size: 1, write: false };
        assert_eq!(m.cpu.run(100), io);
        assert!(m.cpu.complete_read(&[1]));
        m.cpu.abandon();
        assert!(!m.cpu.is_mid_instruction());
        assert_eq!(m.cpu.run(100), io);
    }

    #[test]
    fn forgotten_code_is_read_again() {
        let mut m = Machine::new(Box::new(NoBus));
        m.code(&[0x90]);
        m.run();
        // hlt where the nop was, behind the CPU's back.
        m.memory.write(CODE, &[0xf4]);
        m.cpu.forget_code();
        m.cpu.update(|st| {
            st.rip = CODE;
            st.events.halted = false;
        });
        assert_eq!(m.run().rip, CODE + 1);
    }

    #[test]
    fn bytes_at_rip_are_seen_without_running_them() {
        let mut m = Machine::new(Box::new(NoBus));
        m.code(&[0x48, 0x89, 0x04, 0x24]);
        let (bytes, len) = m.cpu.peek().expect("mapped");
        assert_eq!((&bytes[..5], len), (&[0x48, 0x89, 0x04, 0x24, 0xf4][..], 4));
        assert_eq!(m.cpu.state().gpr[4], STACK);
        m.cpu.update(|st| st.rip = 1 << 40);
        assert_eq!(m.cpu.peek(), None);
        assert_eq!(NoBus.port_read(0, &mut [0]), Answer::Pending);
    }
}
