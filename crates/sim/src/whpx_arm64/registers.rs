//! The registers by the platform's names.

use super::partition::Partition;
use super::vp::{Power, Vp};
use super::{Answer, FIXED_FEATURES, code, lock};
use crate::a64::Cpu;
use crate::a64::gic::AFFINITY;
use std::sync::atomic::Ordering;
use vm_accel_sys::whpx::aarch64::{
    Activity, FEATURE_REGS, RegisterName, RegisterValue, SYSTEM_REGS, feature, register,
};
use vm_accel_sys::whpx::code::{E_ACCESSDENIED, E_INVALIDARG, WHV_E_INVALID_VP_REGISTER_NAME};

pub(super) const MPIDR_EL1: u16 = 0xc005;
/// The encodings of DBGBCR0_EL1 and its like go with these names; each next one is 8 more.
const DEBUG: [(RegisterName, u16); 4] = [
    (register::DBGBVR0_EL1, 0x8004),
    (register::DBGBCR0_EL1, 0x8005),
    (register::DBGWVR0_EL1, 0x8006),
    (register::DBGWCR0_EL1, 0x8007),
];
/// Breakpoints and watchpoints that there are.
const COMPARATORS: [u32; 4] = [6, 6, 4, 4];

/// Feature registers of the host, as `FEATURE_REGS` lists them. With scalable vectors, performance monitors and pointer authentication,
/// which a VMM may hide.
pub(super) const FEATURES: [u64; FEATURE_REGS.len()] = [
    0x0000_0001_0100_0011, // PFR0: AArch64 at EL0 and EL1, GIC, SVE
    0x0000_0000_0100_0000, // PFR1: SME
    0,
    0x0000_0000_1030_5406, // DFR0: 6 breakpoints, 4 watchpoints, PMU
    0,
    0x0000_1000_0021_1120, // ISAR0: atomics, CRC32, SHA, AES
    0x0000_0000_0000_0110, // ISAR1: API, APA
    0x0000_0000_0000_1100, // ISAR2: APA3, GPA3
    0x0000_0000_0010_0002, // MMFR0: 40 bits, granules of 4, 16 and 64 KiB
    0,
    0,
    0,
];

/// Every system register that a processor keeps.
pub(super) fn kept() -> impl Iterator<Item = u16> {
    let debug = DEBUG
        .into_iter()
        .zip(COMPARATORS)
        .flat_map(|((_, encoding), count)| (0..count as u16).map(move |n| encoding + 8 * n));
    SYSTEM_REGS.into_iter().map(|(encoding, _)| encoding).chain(FEATURE_REGS).chain(debug)
}

/// Where a register is.
#[derive(Debug, Clone, Copy)]
enum Place {
    General(usize),
    Pc,
    Pstate,
    Vector(usize),
    Fpcr,
    Fpsr,
    System(u16),
    Count,
    Redistributor,
    Activity,
}

fn place(partition: &Partition, name: RegisterName) -> Answer<Place> {
    let debug = || {
        let with = DEBUG.into_iter().zip(COMPARATORS);
        let mut found = with.filter(|((first, _), count)| (*first..first + count).contains(&name));
        found.next().map(|((first, encoding), _)| encoding + 8 * (name - first) as u16)
    };
    let system = || SYSTEM_REGS.iter().find(|(_, known)| *known == name).map(|(encoding, _)| *encoding);
    Ok(match name {
        register::X0..=register::LR => Place::General((name - register::X0) as usize),
        register::PC => Place::Pc,
        register::PSTATE => Place::Pstate,
        register::Q0..0x3_0020 => Place::Vector((name - register::Q0) as usize),
        register::FPCR => Place::Fpcr,
        register::FPSR => Place::Fpsr,
        register::CNTVCT_EL0 => Place::Count,
        register::GICR_BASE_GPA => Place::Redistributor,
        register::INTERNAL_ACTIVITY_STATE => Place::Activity,
        _ => match system().or_else(debug) {
            Some(encoding) if !partition.lacks(encoding) => Place::System(encoding),
            _ => return code(WHV_E_INVALID_VP_REGISTER_NAME),
        },
    })
}

fn word(low: u64) -> RegisterValue {
    RegisterValue { low, high: 0 }
}

/// The places of names, all of which must be known.
fn places(partition: &Partition, names: &[RegisterName]) -> Answer<Vec<Place>> {
    names.iter().map(|name| place(partition, *name)).collect()
}

fn get_one(partition: &Partition, vp: &Vp, cpu: &Cpu, redistributor: Option<u64>, place: Place) -> RegisterValue {
    match place {
        Place::General(n) => word(cpu.x[n]),
        Place::Pc => word(cpu.pc),
        Place::Pstate => word(cpu.pstate),
        Place::Vector(n) => RegisterValue { low: cpu.v[n] as u64, high: (cpu.v[n] >> 64) as u64 },
        Place::Fpcr => word(cpu.fpcr),
        Place::Fpsr => word(cpu.fpsr),
        Place::System(encoding) => word(cpu.get(encoding)),
        Place::Count => word(partition.count()),
        Place::Redistributor => word(redistributor.unwrap_or(0)),
        Place::Activity => word(Activity(0).with_startup_suspend(u64::from(*lock(&vp.power) == Power::Off)).0),
    }
}

pub(super) fn get(partition: &Partition, vp: u32, names: &[RegisterName], values: &mut [RegisterValue]) -> Answer {
    let vp = partition.vp(vp)?;
    let places = places(partition, names)?;
    let inner = vp.state()?;
    for (place, value) in places.into_iter().zip(values) {
        *value = get_one(partition, &vp, &inner.cpu, inner.redistributor, place);
    }
    Ok(())
}

pub(super) fn set(partition: &Partition, index: u32, names: &[RegisterName], values: &[RegisterValue]) -> Answer {
    let vp = partition.vp(index)?;
    let places = places(partition, names)?;
    let mut inner = vp.state()?;
    for (place, value) in places.into_iter().zip(values) {
        let RegisterValue { low, high } = *value;
        if high != 0 && !matches!(place, Place::Vector(_)) {
            return code(E_INVALIDARG);
        }
        let cpu = &mut inner.cpu;
        match place {
            Place::General(n) => cpu.x[n] = low,
            Place::Pc => cpu.pc = low,
            Place::Pstate => cpu.pstate = low,
            Place::Vector(n) => cpu.v[n] = u128::from(high) << 64 | u128::from(low),
            Place::Fpcr => cpu.fpcr = low,
            Place::Fpsr => cpu.fpsr = low,
            Place::System(encoding) => {
                cpu.sys.insert(encoding, low);
                if encoding == MPIDR_EL1 {
                    partition.place(index, |place| place.affinity = low & AFFINITY);
                }
            }
            Place::Count => partition.set_count(low),
            Place::Redistributor if low & 0xffff != 0 => return code(E_INVALIDARG),
            Place::Redistributor => {
                inner.redistributor = Some(low);
                partition.place(index, |place| place.redistributor = Some(low));
            }
            Place::Activity => {
                let is_off = Activity(low).startup_suspend() != 0;
                *lock(&vp.power) = if is_off { Power::Off } else { Power::On };
            }
        }
    }
    Ok(())
}

/// The encoding of a feature register.
fn shared(name: RegisterName) -> Answer<u16> {
    let found = FEATURE_REGS.into_iter().find(|encoding| feature(*encoding) == name);
    found.map_or_else(|| code(WHV_E_INVALID_VP_REGISTER_NAME), Ok)
}

pub(super) fn get_shared(partition: &Partition, names: &[RegisterName], values: &mut [RegisterValue]) -> Answer {
    let features = lock(&partition.features);
    for (name, value) in names.iter().zip(values) {
        *value = word(features.get(&shared(*name)?).copied().unwrap_or(0));
    }
    Ok(())
}

pub(super) fn set_shared(partition: &Partition, names: &[RegisterName], values: &[RegisterValue]) -> Answer {
    let mut features = lock(&partition.features);
    for (name, value) in names.iter().zip(values) {
        let encoding = shared(*name)?;
        if FIXED_FEATURES.load(Ordering::Relaxed) {
            return code(E_ACCESSDENIED);
        }
        features.insert(encoding, value.low);
    }
    Ok(())
}
