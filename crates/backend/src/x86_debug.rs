//! x86 debug registers as hosts use them to debug a guest: from the neutral request to DR0–DR3 and DR7, and from DR6 back.
//! (Intel SDM vol. 3, 18.2.)

use vm_accel_core::error::{AccelError, VcpuResult};
use vm_accel_core::vcpu_common::{BreakOn, DebugEvent, HardwareBreakpoint};

/// DR0–DR3 and DR7 for these breakpoints.
pub fn debug_registers(breakpoints: &[HardwareBreakpoint]) -> VcpuResult<([u64; 4], u64)> {
    let mut addresses = [0; 4];
    if breakpoints.len() > addresses.len() {
        return Err(AccelError::invalid(
            "hardware breakpoints",
            format!("{} were given, an x86 CPU has 4", breakpoints.len()),
        ));
    }
    // Bit 10 is always set; each breakpoint has enable bits at 2n, and type and length at 16 + 4n.
    let mut dr7 = 0x400;
    for (n, breakpoint) in breakpoints.iter().enumerate() {
        let bad = |why| {
            let (len, addr) = (breakpoint.len, breakpoint.addr);
            AccelError::invalid("hardware breakpoint", format!("{len} bytes at {addr:#x}: {why}"))
        };
        let kind = match breakpoint.on {
            BreakOn::Execute => 0,
            BreakOn::Write => 1,
            BreakOn::Access => 3,
        };
        let len = match breakpoint.len {
            1 => 0,
            2 => 1,
            4 => 3,
            8 => 2,
            _ => return Err(bad("the length is none of 1, 2, 4, 8")),
        };
        if kind == 0 && len != 0 {
            return Err(bad("execution breakpoints have 1 byte"));
        }
        if breakpoint.addr % u64::from(breakpoint.len) != 0 {
            return Err(bad("the address is not aligned to the length"));
        }
        addresses[n] = breakpoint.addr;
        dr7 |= 2 << (2 * n) | (kind | len << 2) << (16 + 4 * n);
    }
    Ok((addresses, dr7))
}

/// What a debug exit was: the exception's vector, where the guest stands, and the debug registers that belong to it.
/// `addresses` are DR0–DR3 if they are known.
pub fn debug_event(vector: u8, pc: u64, dr6: u64, dr7: u64, addresses: Option<[u64; 4]>) -> DebugEvent {
    const BREAKPOINT: u8 = 3;
    const SINGLE_STEP: u64 = 1 << 14;
    if vector == BREAKPOINT {
        return DebugEvent::SoftwareBreakpoint { pc };
    }
    let hit = (dr6 & 0xf).trailing_zeros() as usize;
    if hit < 4 && dr6 & SINGLE_STEP == 0 {
        return match dr7 >> (16 + 4 * hit) & 3 {
            0 => DebugEvent::HardwareBreakpoint { pc },
            _ => DebugEvent::Watchpoint { pc, addr: addresses.map(|all| all[hit]) },
        };
    }
    DebugEvent::SingleStep { pc }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_exits_are_told_apart() {
        let event = |vector, dr6, dr7| debug_event(vector, 7, dr6, dr7, Some([1, 2, 3, 4]));
        assert_eq!(event(3, 0, 0), DebugEvent::SoftwareBreakpoint { pc: 7 });
        assert_eq!(event(1, 0x4000, 0), DebugEvent::SingleStep { pc: 7 });
        assert_eq!(event(1, 2, 0), DebugEvent::HardwareBreakpoint { pc: 7 });
        assert_eq!(event(1, 2, 1 << 20), DebugEvent::Watchpoint { pc: 7, addr: Some(2) });
        assert_eq!(debug_event(1, 7, 2, 1 << 20, None), DebugEvent::Watchpoint { pc: 7, addr: None });
    }

    #[test]
    fn breakpoints_fill_the_registers_as_the_manual_says() {
        let at = |addr, len, on| HardwareBreakpoint { addr, len, on };
        let (addresses, dr7) = debug_registers(&[
            at(0x1000, 1, BreakOn::Execute),
            at(0x2008, 8, BreakOn::Write),
            at(4, 4, BreakOn::Access),
        ])
        .unwrap();
        assert_eq!(addresses, [0x1000, 0x2008, 4, 0]);
        assert_eq!(dr7, 0x400 | 0x2a | 0x9 << 20 | 0xf << 24);
        for bad in [at(1, 2, BreakOn::Write), at(0, 3, BreakOn::Write), at(0, 2, BreakOn::Execute)] {
            assert!(debug_registers(&[bad]).is_err(), "{bad:?}");
        }
        assert!(debug_registers(&[at(0, 1, BreakOn::Execute); 5]).is_err());
    }
}
