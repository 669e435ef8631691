//! Exceptions as data: vector, error code, class. What delivers them is in `interrupt`; what raises them is everywhere.
//! Nothing here may depend on CPU state. Source: Intel SDM vol. 3A, chapter 6 ("Interrupt and exception handling").

use std::fmt;

/// An architectural exception, with the error code that its delivery pushes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exception {
    /// #DE, divide error.
    De,
    /// #DB, debug exception; the bits are those to merge into DR6.
    Db(u64),
    /// #BP, INT3.
    Bp,
    /// #OF, INTO.
    Of,
    /// #BR, BOUND range exceeded.
    Br,
    /// #UD, invalid opcode.
    Ud,
    /// #NM, device not available.
    Nm,
    /// #DF, double fault.
    Df,
    /// #TS(selector), invalid TSS.
    Ts(u16),
    /// #NP(selector), segment not present.
    Np(u16),
    /// #SS(selector), stack fault.
    Ss(u16),
    /// #GP(selector), general protection.
    Gp(u16),
    /// #PF with the faulting linear address (CR2) and the error code.
    Pf {
        /// Linear address that goes to CR2.
        addr: u64,
        /// P, W/R, U/S, RSVD, I/D bits (SDM vol. 3A, 4.7).
        code: u32,
    },
    /// #MF, x87 floating-point error.
    Mf,
    /// #AC(0), alignment check.
    Ac,
    /// #XM, SIMD floating-point exception.
    Xm,
}

impl Exception {
    /// The vector number.
    #[must_use]
    pub fn vector(self) -> u8 {
        match self {
            Exception::De => 0,
            Exception::Db(_) => 1,
            Exception::Bp => 3,
            Exception::Of => 4,
            Exception::Br => 5,
            Exception::Ud => 6,
            Exception::Nm => 7,
            Exception::Df => 8,
            Exception::Ts(_) => 10,
            Exception::Np(_) => 11,
            Exception::Ss(_) => 12,
            Exception::Gp(_) => 13,
            Exception::Pf { .. } => 14,
            Exception::Mf => 16,
            Exception::Ac => 17,
            Exception::Xm => 19,
        }
    }

    /// The error code that is pushed, for those that have one.
    #[must_use]
    pub fn error_code(self) -> Option<u32> {
        match self {
            Exception::Df | Exception::Ac => Some(0),
            Exception::Ts(code) | Exception::Np(code) | Exception::Ss(code) | Exception::Gp(code) => {
                Some(u32::from(code))
            }
            Exception::Pf { code, .. } => Some(code),
            _ => None,
        }
    }

    /// Whether the pushed RIP is that of the next instruction (a trap) and RF is not set in the pushed flags.
    #[must_use]
    pub fn is_trap(self) -> bool {
        matches!(self, Exception::Bp | Exception::Of)
    }

    /// Whether this exception during the delivery of `first` makes a double fault (SDM vol. 3A, table 6-5).
    #[must_use]
    pub fn doubles(self, first: u8) -> bool {
        let contributory = |vector| matches!(vector, 0 | 10..=13);
        let second = self.vector();
        match first {
            14 => second == 14 || contributory(second),
            _ => contributory(first) && contributory(second),
        }
    }
}

impl fmt::Display for Exception {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const NAMES: [&str; 20] = [
            "#DE", "#DB", "NMI", "#BP", "#OF", "#BR", "#UD", "#NM", "#DF", "#9", "#TS", "#NP", "#SS", "#GP", "#PF",
            "#15", "#MF", "#AC", "#MC", "#XM",
        ];
        f.write_str(NAMES[usize::from(self.vector())])?;
        if let Some(code) = self.error_code() {
            write!(f, "({code:#x})")?;
        }
        match self {
            Exception::Pf { addr, .. } => write!(f, " at {addr:#x}"),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn double_fault_table() {
        let pf = Exception::Pf { addr: 0, code: 0 };
        assert!(Exception::Gp(0).doubles(11));
        assert!(pf.doubles(14));
        assert!(Exception::Np(8).doubles(14));
        assert!(!pf.doubles(13), "a page fault while a contributory fault is delivered is served first");
        assert!(!Exception::Ud.doubles(13));
        assert!(!Exception::Gp(0).doubles(3));
    }
}
