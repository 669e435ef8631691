//! Breakpoints, watchpoints and debug exceptions of the architecture, for every hypervisor that lets a VMM use them.

use vm_accel_core::error::{AccelError, VcpuResult};
use vm_accel_core::vcpu_common::{BreakOn, DebugEvent, HardwareBreakpoint};

/// Control and value of a breakpoint's or watchpoint's registers (Arm ARM, D24.3.2 DBGBCR, D24.3.11 DBGWCR).
pub fn comparator(wanted: &HardwareBreakpoint) -> VcpuResult<(u64, u64)> {
    const ENABLE_AT_EL0_AND_EL1: u64 = 1 | 3 << 1;
    let HardwareBreakpoint { addr, len, on } = *wanted;
    let bad = |rule: &str| {
        let detail = format!("{len} bytes at {addr:#x}: {rule}");
        Err(AccelError::invalid("hardware breakpoint", detail))
    };
    let kind = match on {
        BreakOn::Execute if addr % 4 != 0 || len != 1 => {
            return bad("for execution it is 1 byte at an instruction");
        }
        BreakOn::Execute => return Ok((ENABLE_AT_EL0_AND_EL1 | 0xf << 5, addr)),
        BreakOn::Write => 2,
        BreakOn::Access => 3,
    };
    if !matches!(len, 1 | 2 | 4 | 8) || addr % u64::from(len) != 0 {
        return bad("must be 1, 2, 4 or 8 bytes, aligned");
    }
    let bytes = ((1u64 << len) - 1) << (addr & 7);
    Ok((ENABLE_AT_EL0_AND_EL1 | kind << 3 | bytes << 5, addr & !7))
}

/// A list's settings: what for, which register of the kind, control, value. There are so many of each kind.
pub fn comparators(
    wanted: &[HardwareBreakpoint],
    breakpoints: usize,
    watchpoints: usize,
) -> VcpuResult<Vec<(BreakOn, u16, u64, u64)>> {
    let mut used = [0; 2];
    let mut settings = Vec::new();
    for one in wanted {
        let (kind, most) = if one.on == BreakOn::Execute { (0, breakpoints) } else { (1, watchpoints) };
        if used[kind] == most {
            let detail = format!("this CPU has {most} of the kind of {one:x?}");
            return Err(AccelError::invalid("hardware breakpoints", detail));
        }
        let (control, value) = comparator(one)?;
        settings.push((one.on, used[kind] as u16, control, value));
        used[kind] += 1;
    }
    Ok(settings)
}

/// What a debug exception was, from its syndrome (Arm ARM, D24.2.40, "EC encoding"); `None` if it is another one.
pub fn debug_event(syndrome: u64, far: u64, pc: u64) -> Option<DebugEvent> {
    Some(match syndrome >> 26 & 0x3f {
        0x30 | 0x31 => DebugEvent::HardwareBreakpoint { pc },
        0x32 | 0x33 => DebugEvent::SingleStep { pc },
        0x34 | 0x35 => DebugEvent::Watchpoint { pc, addr: Some(far) },
        0x38 | 0x3c => DebugEvent::SoftwareBreakpoint { pc },
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_exceptions_are_told_apart() {
        let event = |class: u64| debug_event(class << 26 | 0x1ff_ffff, 9, 7);
        assert_eq!(event(0x31), Some(DebugEvent::HardwareBreakpoint { pc: 7 }));
        assert_eq!(event(0x32), Some(DebugEvent::SingleStep { pc: 7 }));
        assert_eq!(event(0x35), Some(DebugEvent::Watchpoint { pc: 7, addr: Some(9) }));
        assert_eq!(event(0x3c), Some(DebugEvent::SoftwareBreakpoint { pc: 7 }));
        assert_eq!(event(0x24), None);
    }

    #[test]
    fn watchpoints_select_their_bytes() {
        let at = |addr, len, on| comparator(&HardwareBreakpoint { addr, len, on }).ok();
        assert_eq!(at(0x1006, 2, BreakOn::Write), Some((7 | 2 << 3 | 0xc0 << 5, 0x1000)));
        assert_eq!(at(0x1000, 8, BreakOn::Access), Some((7 | 3 << 3 | 0xff << 5, 0x1000)));
        assert_eq!(at(0x1004, 1, BreakOn::Execute), Some((7 | 0xf << 5, 0x1004)));
        assert_eq!(at(0x1002, 1, BreakOn::Execute), None);
        assert_eq!(at(0x1002, 4, BreakOn::Write), None);
        assert_eq!(at(0x1000, 3, BreakOn::Write), None);
    }

    #[test]
    fn each_kind_has_its_own_registers() {
        let at = |addr, on| HardwareBreakpoint { addr, len: 1, on };
        let list = [at(0, BreakOn::Write), at(4, BreakOn::Execute), at(8, BreakOn::Access)];
        let places: Vec<_> = comparators(&list, 1, 2).unwrap().into_iter().map(|(_, n, _, _)| n).collect();
        assert_eq!(places, [0, 0, 1]);
        assert!(comparators(&list, 1, 1).is_err());
    }
}
