//! Calls of the guest: PSCI (Arm DEN0022) and the SMC calling convention (Arm DEN0028), as a KVM host's kernel answers them.

use super::Vm;
use super::vcpu::Shared;
use std::sync::Arc;
use vm_accel_backend::lock;
use vm_accel_core::regs::aarch64::{MPIDR_AFFINITY, affinity};
use vm_accel_core::vcpu_common::VcpuExit;

/// Functions; those with [`WIDE`] set take 64-bit arguments.
mod function {
    pub(super) const VERSION: u32 = 0x8400_0000;
    pub(super) const CPU_SUSPEND: u32 = 0x8400_0001;
    pub(super) const CPU_OFF: u32 = 0x8400_0002;
    pub(super) const CPU_ON: u32 = 0x8400_0003;
    pub(super) const AFFINITY_INFO: u32 = 0x8400_0004;
    pub(super) const MIGRATE_INFO_TYPE: u32 = 0x8400_0006;
    pub(super) const SYSTEM_OFF: u32 = 0x8400_0008;
    pub(super) const SYSTEM_RESET: u32 = 0x8400_0009;
    pub(super) const FEATURES: u32 = 0x8400_000a;
    pub(super) const SMCCC_VERSION: u32 = 0x8000_0000;
    pub(super) const SMCCC_ARCH_FEATURES: u32 = 0x8000_0001;
}

const WIDE: u32 = 1 << 30;
const VERSION_1_1: u64 = 0x1_0001;
/// There is no trusted operating system to migrate.
const NO_MIGRATION: u64 = 2;
const SUCCESS: u64 = 0;
const NOT_SUPPORTED: u64 = -1_i64 as u64;
const INVALID_PARAMETERS: u64 = -2_i64 as u64;
const ALREADY_ON: u64 = -4_i64 as u64;
const ALREADY_PENDING: u64 = -5_i64 as u64;
const IS_OFF: u64 = 1;
const ON_PENDING: u64 = 2;

/// Owners of services whose calls are the VMM's (DEN0028, "Owning Entity Number"): silicon partner, OEM.
const FORWARDED: [u32; 2] = [2, 3];

/// Whether a CPU runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Power {
    On,
    Off,
    /// Switched on by another CPU, and not there yet.
    Starting {
        entry: u64,
        context: u64,
    },
}

/// What is to be done about a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    /// The result, for X0.
    Result(u64),
    /// The CPU waits for an interrupt, then gets 0.
    Suspend,
    /// The CPU is off.
    Off,
    Exit(VcpuExit),
}

fn cpu(vm: &Vm, mpidr: u64) -> Option<Arc<Shared>> {
    let vcpus = lock(&vm.vcpus);
    vcpus.iter().find(|(id, _)| affinity(**id) == mpidr & MPIDR_AFFINITY).map(|(_, shared)| Arc::clone(shared))
}

fn cpu_on(vm: &Vm, [_, mpidr, entry, context]: [u64; 4]) -> u64 {
    let Some(target) = cpu(vm, mpidr) else {
        return INVALID_PARAMETERS;
    };
    let was = target.change_power(|power| match power {
        Power::Off => Power::Starting { entry, context },
        other => other,
    });
    match was {
        Power::Off => SUCCESS,
        Power::On => ALREADY_ON,
        Power::Starting { .. } => ALREADY_PENDING,
    }
}

/// Stops all CPUs but the one that asked, wherever they are.
fn stop_others(vm: &Vm, me: u32) {
    let others: Vec<_> = lock(&vm.vcpus).iter().filter(|(id, _)| **id != me).map(|(_, s)| Arc::clone(s)).collect();
    for other in others {
        other.change_power(|_| Power::Off);
        // It is off all the same, when it next looks.
        let _ = other.interrupt();
    }
}

/// Answers a call with its function in X0 and arguments in X1 to X3.
pub(super) fn answer(vm: &Vm, me: u32, x: [u64; 4]) -> Answer {
    let called = x[0] as u32;
    let is_fast = called >> 31 != 0;
    if is_fast && FORWARDED.contains(&(called >> 24 & 0x3f)) {
        return Answer::Exit(VcpuExit::SystemCall);
    }
    let mut x = x;
    if called & WIDE == 0 {
        x = x.map(|x| x & 0xffff_ffff);
    }
    Answer::Result(match called {
        function::VERSION | function::SMCCC_VERSION => VERSION_1_1,
        function::MIGRATE_INFO_TYPE => NO_MIGRATION,
        function::CPU_OFF => return Answer::Off,
        function::SYSTEM_OFF | function::SYSTEM_RESET => {
            stop_others(vm, me);
            let off = called == function::SYSTEM_OFF;
            return Answer::Exit(if off { VcpuExit::Shutdown } else { VcpuExit::Reset });
        }
        function::FEATURES => match x[1] as u32 {
            function::VERSION
            | function::CPU_OFF
            | function::MIGRATE_INFO_TYPE
            | function::SYSTEM_OFF
            | function::SYSTEM_RESET
            | function::FEATURES
            | function::SMCCC_VERSION => SUCCESS,
            other => match other & !WIDE {
                function::CPU_SUSPEND | function::CPU_ON | function::AFFINITY_INFO => SUCCESS,
                _ => NOT_SUPPORTED,
            },
        },
        function::SMCCC_ARCH_FEATURES => match x[1] as u32 {
            function::SMCCC_VERSION | function::SMCCC_ARCH_FEATURES => SUCCESS,
            _ => NOT_SUPPORTED,
        },
        _ => match called & !WIDE {
            // The one state that there is: standby, from which an interrupt wakes.
            function::CPU_SUSPEND => return Answer::Suspend,
            function::CPU_ON => cpu_on(vm, x),
            function::AFFINITY_INFO if x[2] == 0 => cpu(vm, x[1]).map_or(INVALID_PARAMETERS, |cpu| match cpu.power() {
                Power::On => SUCCESS,
                Power::Off => IS_OFF,
                Power::Starting { .. } => ON_PENDING,
            }),
            function::AFFINITY_INFO => INVALID_PARAMETERS,
            _ => NOT_SUPPORTED,
        },
    })
}
