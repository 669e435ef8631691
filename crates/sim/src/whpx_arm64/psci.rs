//! Calls of the guest: PSCI (Arm DEN0022) and the SMC calling convention (Arm DEN0028), which the hypervisor serves.

use super::lock;
use super::partition::Partition;
use super::vp::Power;

const NOT_SUPPORTED: u64 = u64::MAX;
const INVALID_PARAMETERS: u64 = -2_i64 as u64;
const ALREADY_ON: u64 = -4_i64 as u64;
const WIDE: u32 = 1 << 30;

/// What comes of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Served {
    /// The result, for X0.
    Result(u64),
    /// The processor is off.
    Off,
    /// As WFI, then 0.
    Suspend,
    /// `WHV_ARM64_RESET_TYPE`.
    Reset(u32),
    /// Nobody knows it.
    Unknown,
}

pub(super) fn serve(partition: &Partition, x: [u64; 4]) -> Served {
    let called = x[0] as u32;
    let x = if called & WIDE == 0 { x.map(|x| x & 0xffff_ffff) } else { x };
    Served::Result(match called {
        // PSCI_VERSION, SMCCC_VERSION.
        0x8400_0000 | 0x8000_0000 => 0x1_0001,
        // CPU_SUSPEND.
        0x8400_0001 | 0xc400_0001 => return Served::Suspend,
        // CPU_OFF.
        0x8400_0002 => return Served::Off,
        // CPU_ON.
        0x8400_0003 | 0xc400_0003 => match partition.find_affinity(x[1]).and_then(|vp| partition.vp(vp).ok()) {
            None => INVALID_PARAMETERS,
            Some(vp) => {
                let mut power = lock(&vp.power);
                if *power != Power::Off {
                    return Served::Result(ALREADY_ON);
                }
                *power = Power::Starting { entry: x[2], context: x[3] };
                drop(power);
                vp.wake();
                0
            }
        },
        // AFFINITY_INFO.
        0x8400_0004 | 0xc400_0004 => match partition.find_affinity(x[1]).and_then(|vp| partition.vp(vp).ok()) {
            Some(vp) if x[2] == 0 => u64::from(*lock(&vp.power) == Power::Off),
            _ => INVALID_PARAMETERS,
        },
        // MIGRATE_INFO_TYPE: there is nothing to migrate.
        0x8400_0006 => 2,
        0x8400_0008 => return Served::Reset(0),
        0x8400_0009 => return Served::Reset(1),
        // PSCI_FEATURES.
        0x8400_000a => match x[1] as u32 & !WIDE {
            0x8400_0000..=0x8400_0004 | 0x8400_0006 | 0x8400_0008..=0x8400_000a | 0x8000_0000 => 0,
            _ => NOT_SUPPORTED,
        },
        _ => return Served::Unknown,
    })
}
