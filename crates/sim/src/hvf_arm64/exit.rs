//! What the platform tells about an exit, and what it leaves undefined.

use crate::a64::{Trap, class};
use crate::hostile::Mischief;
use vm_accel_sys::hvf::aarch64::{ExitException, VcpuExit, reason};

/// The bits of a data abort's syndrome that say what the instruction does, and that which says that they do (Arm ARM,
/// D24.2.40).
const TOLD: u64 = 0x1ff << 15 | 1 << 24;
const VALID: u64 = 1 << 24;

/// An exit without an exception: the rest is what happens to stand there.
pub(super) fn only(reason: u32, mischief: &mut Mischief) -> VcpuExit {
    let mut garbage = || mischief.draw() | 0x5a5a_0000_0000_0000;
    let exception = ExitException { syndrome: garbage(), virtual_address: garbage(), physical_address: garbage() };
    VcpuExit { reason, exception }
}

pub(super) fn exception(trap: Trap, mischief: &mut Mischief) -> VcpuExit {
    let Trap { mut syndrome, mut far, mut ipa } = trap;
    let class = syndrome >> 26;
    if class == class::DATA_ABORT {
        if mischief.one_in(4) {
            syndrome &= !TOLD;
        }
        if syndrome & VALID == 0 {
            syndrome |= mischief.draw() & TOLD & !VALID;
        }
    }
    let is_abort = [class::DATA_ABORT, class::INSTRUCTION_ABORT].contains(&class);
    if !is_abort {
        ipa = mischief.draw() | 0xa5a5_0000;
        if class != class::WATCHPOINT {
            far = mischief.draw() | 0x5a5a_0000;
        }
    }
    let exception = ExitException { syndrome, virtual_address: far, physical_address: ipa };
    VcpuExit { reason: reason::EXCEPTION, exception }
}
