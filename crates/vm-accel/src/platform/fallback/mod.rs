//! The software CPU as a backend: it needs no accelerator, no privilege and no particular host.
//!
//! The emulator of the shared x86 layer is the CPU here. vCPUs run in parallel, each on the thread that calls `run`, where
//! the host orders memory as x86 does; on other hosts they take turns.

use std::sync::{Arc, Mutex};
use vm_accel_backend::impl_accel;
use vm_accel_backend::lock;
use vm_accel_backend::x86::{Engine, Groups, Left, Machine, Order, Platform, Shared, software_capabilities};
use vm_accel_core::accel::{AccelKind, MemoryFlags};
use vm_accel_core::error::VcpuResult;
use vm_accel_core::memory::{GuestRegion, WriteWatcher};
use vm_accel_softcpu::{Cpu, CpuState, Exit, Ram};

/// Whether the host orders memory accesses as an x86 guest expects; then vCPUs may run in parallel.
const HOST_ORDERS_AS_X86: bool = cfg!(any(target_arch = "x86_64", target_arch = "x86"));
/// Instructions per turn where they may not.
const TURN: u64 = 200_000;

/// One virtual machine on software CPUs.
///
/// ```
/// use vm_accel::{Accel, platform::fallback::NoAccel};
/// let vm = NoAccel::new();
/// assert!(vm.capabilities().split_irqchip);
/// ```
#[derive(Debug)]
pub struct NoAccel {
    machine: Machine<Software>,
}

impl Default for NoAccel {
    fn default() -> Self {
        Self::new()
    }
}

impl NoAccel {
    /// Creates a virtual machine.
    #[must_use]
    pub fn new() -> Self {
        Self { machine: Machine::new(Software::default(), software_capabilities(), None, None) }
    }
}

impl_accel!(NoAccel);

/// The platform that is none.
#[derive(Debug, Default)]
struct Software {
    /// Held by the vCPU that runs, on hosts where only one may.
    turn: Arc<Mutex<()>>,
}

/// Tells the CPUs that the host changed memory from which they may have decoded code.
#[derive(Debug)]
struct CodeWatch {
    ram: Arc<Ram>,
    gpa: u64,
}

impl WriteWatcher for CodeWatch {
    fn written(&self, offset: u64, len: u64) {
        self.ram.invalidate_code(self.gpa + offset, len);
    }
}

impl Platform for Software {
    const KIND: AccelKind = AccelKind::Fallback;
    type Engine = Interpreter;
    /// Hears of host writes as long as the mapping is there.
    type Hold = Arc<CodeWatch>;

    fn engine(shared: &Arc<Shared<Self>>, _: u32) -> VcpuResult<Interpreter> {
        Ok(Interpreter { turn: Arc::clone(&shared.platform().turn) })
    }

    fn map(&self, ram: &Arc<Ram>, gpa: u64, region: &GuestRegion, _: MemoryFlags) -> VcpuResult<Arc<CodeWatch>> {
        let watch = Arc::new(CodeWatch { ram: Arc::clone(ram), gpa });
        let weak = Arc::downgrade(&watch);
        region.watch(weak);
        Ok(watch)
    }
}

/// Runs the emulator.
struct Interpreter {
    turn: Arc<Mutex<()>>,
}

impl Engine for Interpreter {
    const IN_PLACE: bool = true;

    fn load(&self, _: Groups, _: &mut CpuState) -> VcpuResult<()> {
        Ok(())
    }

    fn store(&mut self, _: Groups, _: &CpuState, _: &CpuState) -> VcpuResult<()> {
        Ok(())
    }

    fn enter(&mut self, cpu: &mut Cpu, order: &Order) -> VcpuResult<Left> {
        if order.nmi_window {
            // Come back as soon as the CPU has room for it.
            return Ok(Left::Exit(cpu.run(1)));
        }
        if HOST_ORDERS_AS_X86 {
            return Ok(Left::Exit(cpu.run(u64::MAX)));
        }
        loop {
            let turn = lock(&self.turn);
            let exit = cpu.run(TURN);
            drop(turn);
            if exit != Exit::Budget {
                return Ok(Left::Exit(exit));
            }
            // Let the next vCPU have the lock.
            std::thread::yield_now();
        }
    }

    fn canceller(&self) -> Option<Box<dyn Fn() + Send + Sync>> {
        None
    }
}
