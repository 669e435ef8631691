//! A whole machine: RAM, board and vCPUs on one accelerator, from its configuration to its end.
//!
//! # Threads
//!
//! [`Machine::run`] starts one thread per vCPU. Each sets up its vCPU, waits until all have, runs it, and drops it: some
//! platforms bind a vCPU to the thread that first uses it. The calling thread waits for the end, kicks every vCPU and
//! joins every thread; none outlives the call. A thread can only be late if the guest's output blocks, that is, as
//! long as the sink that the caller supplied does.

use std::any::Any;
use std::fmt;
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, PoisonError, mpsc};
use std::thread;
use std::time::Duration;

use vm_accel::x86_64::X86Msr;
use vm_accel::{Accel, AccelError, GuestArch, GuestMemory, GuestRegion, IrqChip, MemoryFlags, VcpuKick, VcpuOps};

use crate::boot::{
    BootKind, BootPlan, BootRequest, BootState, DEFAULT_FLAT_ADDRESS, MemorySink, Module, Protocol, X86BootState,
};
use crate::bus::lock;
use crate::control::{Control, Failure, Outcome};
use crate::cpuid::{self, FeatureMask};
use crate::devices::acpi_pm::AcpiPm;
use crate::devices::uart::UartInput;
use crate::error::MachineError;
use crate::pc::interrupts::{Interrupts, SharedAccel, SplitChips};
use crate::pc::memory::{ACPI_ADDRESS, ONE_MIB, RamLayout, SHADOW};
use crate::pc::{self, Board, acpi};
use crate::runloop::{self, Wiring};
use crate::virt::{self, fdt};

/// IA32_MTRR_DEF_TYPE (Intel SDM vol. 3, 12.11.2.1).
const MTRR_DEF_TYPE: u32 = 0x2ff;
/// MTRRs on, everything write-back: what firmware leaves to an operating system.
const MTRR_WRITE_BACK: u64 = 1 << 11 | 6;

/// How a machine is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MachineConfig {
    /// RAM in bytes: a multiple of 64 KiB, at least 2 MiB.
    pub memory: u64,
    /// Number of CPUs, at least one.
    pub cpus: u32,
    /// Whose the interrupt controllers are. `None` is the best that the accelerator offers: all its own
    /// ([`IrqChip::Kernel`]), its local APICs with the board's PIC, PIT and I/O APIC ([`IrqChip::Split`]), or none.
    pub irqchip: Option<IrqChip>,
    /// CPUID features that the guest is not shown; x86-64 guests only.
    pub masked: FeatureMask,
}

impl Default for MachineConfig {
    /// 512 MiB and one CPU with everything that the accelerator offers.
    fn default() -> Self {
        Self { memory: 512 << 20, cpus: 1, irqchip: None, masked: FeatureMask::default() }
    }
}

/// What the machine boots.
#[derive(Debug, Clone, Copy)]
pub struct Guest<'a> {
    /// Which boot protocol to use.
    pub kind: BootKind,
    /// The kernel or firmware image.
    pub image: &'a [u8],
    /// A name for the image, see [`BootRequest::name`].
    pub name: &'a str,
    /// The command line.
    pub cmdline: &'a str,
    /// Modules; the first is the initial RAM disk of Linux.
    pub modules: &'a [Module<'a>],
    /// Where a flat binary is loaded and begins.
    pub flat_address: u64,
}

impl<'a> Guest<'a> {
    /// An image of which everything else is left to detection and defaults.
    #[must_use]
    pub fn new(image: &'a [u8]) -> Self {
        Self {
            kind: BootKind::Auto,
            image,
            name: "kernel",
            cmdline: "",
            modules: &[],
            flat_address: DEFAULT_FLAT_ADDRESS,
        }
    }
}

/// A machine that is ready to run.
pub struct Machine {
    // Declared before the accelerator and so dropped before it.
    vcpus: Vec<Box<dyn VcpuOps>>,
    accel: SharedAccel,
    memory: GuestMemory,
    board: AnyBoard,
    control: Control,
    state: BootState,
    protocol: Protocol,
    masked: FeatureMask,
}

/// The board that belongs to the guest's architecture.
#[derive(Debug)]
enum AnyBoard {
    Pc(Board),
    Virt(virt::Board),
}

impl AnyBoard {
    fn wiring(&self) -> Wiring<'_> {
        match self {
            Self::Pc(board) => {
                Wiring { ports: &board.ports, mmio: &board.mmio, chips: board.interrupts.split().map(Arc::as_ref) }
            }
            Self::Virt(board) => Wiring { ports: &board.ports, mmio: &board.mmio, chips: None },
        }
    }

    fn serial_input(&self) -> UartInput {
        match self {
            Self::Pc(board) => UartInput::new(board.uart.clone()),
            Self::Virt(board) => UartInput::new(board.uart.clone()),
        }
    }
}

impl MemorySink for &GuestMemory {
    type Error = AccelError;

    fn write(&mut self, gpa: u64, data: &[u8]) -> Result<(), AccelError> {
        GuestMemory::write(self, gpa, data)
    }

    fn zero(&mut self, gpa: u64, len: u64) -> Result<(), AccelError> {
        self.fill(gpa, len, 0)
    }
}

impl Machine {
    /// Builds a board on `accel`, a fresh virtual machine, and puts `guest` into it: [`pc`] for x86-64 guests,
    /// [`virt`](mod@virt) for aarch64 ones.
    ///
    /// `serial` takes what the guest writes to its serial port, byte by byte; if it blocks, the guest waits, and if it
    /// fails, the machine ends.
    ///
    /// Without any interrupt controller the guest gets no interrupts, and a HLT ends the machine with
    /// [`Failure::HaltedForever`].
    ///
    /// # Errors
    /// [`MachineError`], if the machine cannot be as `config` asks, or `guest` is nothing that it can boot.
    pub fn new(
        accel: Box<dyn Accel>,
        config: &MachineConfig,
        guest: &Guest<'_>,
        serial: Box<dyn Write + Send>,
    ) -> Result<Self, MachineError> {
        match accel.capabilities().guest_arch {
            GuestArch::X86_64 => Self::pc(accel, config, guest, serial),
            GuestArch::Aarch64 => Self::virt(accel, config, guest, serial),
        }
    }

    /// Refuses a number of CPUs that the board or the accelerator cannot have.
    fn check_cpus(accel: &dyn Accel, count: u32, most: u32) -> Result<(), MachineError> {
        let capabilities = accel.capabilities();
        let most = most.min(capabilities.max_vcpus).min(capabilities.max_vcpu_id);
        if (1..=most).contains(&count) { Ok(()) } else { Err(MachineError::Cpus { count, most }) }
    }

    /// Gives the guest its RAM.
    fn map_ram(accel: &mut dyn Accel, memory: &GuestMemory) -> Result<(), MachineError> {
        for (gpa, region) in memory.regions() {
            accel
                .map_memory(gpa, &region, MemoryFlags::RAM)
                .map_err(MachineError::accel("giving the guest its memory"))?;
        }
        Ok(())
    }

    fn create_vcpus(accel: &SharedAccel, count: u32) -> Result<Vec<Box<dyn VcpuOps>>, MachineError> {
        let create = |id| lock(accel).create_vcpu(id);
        (0..count).map(|id| create(id).map_err(MachineError::accel("creating a vCPU"))).collect()
    }

    /// Builds a board `virt`.
    fn virt(
        mut accel: Box<dyn Accel>,
        config: &MachineConfig,
        guest: &Guest<'_>,
        serial: Box<dyn Write + Send>,
    ) -> Result<Self, MachineError> {
        if !config.masked.is_empty() {
            return Err(MachineError::NoCpuid);
        }
        Self::check_cpus(accel.as_ref(), config.cpus, virt::MAX_CPUS)?;
        let map = virt::memory_map(config.memory, accel.capabilities().guest_phys_bits)?;
        let plan = BootRequest {
            kind: guest.kind,
            name: guest.name,
            cmdline: guest.cmdline,
            modules: guest.modules,
            flat_address: guest.flat_address,
            ..BootRequest::new(GuestArch::Aarch64, guest.image, &map)
        }
        .plan()?;
        let during = MachineError::accel("creating the interrupt controllers");
        accel.create_irqchip(config.irqchip.unwrap_or(IrqChip::Kernel)).map_err(&during)?;
        let gic = accel.gic().map_err(&during)?;

        let memory = virt::allocate(config.memory)?;
        let write = MachineError::accel("writing the guest to its memory");
        plan.load(&mut &memory).map_err(&write)?;
        if let Some(place) = &plan.device_tree {
            let mut seed = [0; fdt::SEED_LEN];
            getrandom::fill(&mut seed).map_err(|error| MachineError::Random { message: error.to_string() })?;
            let tree = fdt::build(&fdt::Description {
                memory: config.memory,
                cpus: config.cpus,
                gic,
                cmdline: guest.cmdline,
                initrd: plan.initrd.clone(),
                seed,
            })
            .map_err(|error| MachineError::DeviceTree { message: error.to_string() })?;
            let room = place.end - place.start;
            if tree.len() as u64 > room {
                let message = format!("{} bytes are more than {room}", tree.len());
                return Err(MachineError::DeviceTree { message });
            }
            memory.write(place.start, &tree).map_err(&write)?;
        }
        Self::map_ram(accel.as_mut(), &memory)?;

        let control = Control::new();
        let interrupts = accel.irq_handle().map_err(&during)?;
        let board = virt::Board::new(interrupts, serial, &control)?;
        let accel: SharedAccel = Arc::new(Mutex::new(accel));
        Ok(Self {
            vcpus: Self::create_vcpus(&accel, config.cpus)?,
            accel,
            memory,
            board: AnyBoard::Virt(board),
            control,
            state: plan.state,
            protocol: plan.protocol,
            masked: config.masked,
        })
    }

    /// Builds a board `pc`.
    fn pc(
        mut accel: Box<dyn Accel>,
        config: &MachineConfig,
        guest: &Guest<'_>,
        serial: Box<dyn Write + Send>,
    ) -> Result<Self, MachineError> {
        Self::check_cpus(accel.as_ref(), config.cpus, pc::MAX_CPUS)?;
        let capabilities = accel.capabilities();
        let irqchip = config.irqchip.unwrap_or(match capabilities {
            caps if caps.kernel_irqchip => IrqChip::Kernel,
            caps if caps.split_irqchip => IrqChip::Split,
            _ => IrqChip::None,
        });
        let ram = RamLayout::new(config.memory, capabilities.guest_phys_bits)?;
        let map = ram.map()?;
        // Everything that depends on the guest's file comes first: it fails most often and costs least.
        let plan = BootRequest {
            kind: guest.kind,
            name: guest.name,
            cmdline: guest.cmdline,
            modules: guest.modules,
            acpi_rsdp: Some(ACPI_ADDRESS.into()),
            flat_address: guest.flat_address,
            ..BootRequest::new(GuestArch::X86_64, guest.image, &map)
        }
        .plan()?;
        let memory = ram.allocate()?;
        fill_memory(&memory, &plan, config.cpus)?;
        Self::map_ram(accel.as_mut(), &memory)?;
        for (gpa, region) in roms(&plan)? {
            accel
                .map_memory(gpa, &region, MemoryFlags::ROM)
                .map_err(MachineError::accel("giving the guest its firmware"))?;
            memory.insert(gpa, region).map_err(MachineError::accel("giving the guest its firmware"))?;
        }

        let control = Control::new();
        let accel: SharedAccel = Arc::new(Mutex::new(accel));
        let interrupts = Interrupts::new(&accel, irqchip, &control)
            .map_err(MachineError::accel("creating the interrupt controllers"))?;
        let board = Board::new(ram, &map, config.cpus, interrupts, serial, &control)?;
        Ok(Self {
            vcpus: Self::create_vcpus(&accel, config.cpus)?,
            accel,
            memory,
            board: AnyBoard::Pc(board),
            control,
            state: plan.state,
            protocol: plan.protocol,
            masked: config.masked,
        })
    }

    /// The machine's end: to stop it from another thread, or to see why it ended.
    #[must_use]
    pub fn control(&self) -> Control {
        self.control.clone()
    }

    /// The host's end of the serial port's receive line.
    #[must_use]
    pub fn serial_input(&self) -> UartInput {
        self.board.serial_input()
    }

    /// The power button, with which the host asks the guest's operating system to shut down.
    #[must_use]
    pub fn power_button(&self) -> PowerButton {
        PowerButton(match &self.board {
            AnyBoard::Pc(board) => Some(board.pm.clone()),
            AnyBoard::Virt(_) => None,
        })
    }

    /// The guest's memory.
    #[must_use]
    pub fn memory(&self) -> GuestMemory {
        self.memory.clone()
    }

    /// The boot protocol that is used: the detected one if detection was asked for.
    #[must_use]
    pub fn protocol(&self) -> Protocol {
        self.protocol
    }

    /// Runs the machine to its end, or for `limit` at most.
    ///
    /// Whatever happens to it is in the [`Outcome`]; also a vCPU that fails or panics. When this returns all
    /// threads are joined, and [`serial_input`](Self::serial_input) takes no more.
    #[must_use]
    pub fn run(self, limit: Option<Duration>) -> Outcome {
        let Self { vcpus, accel, memory, board, control, state, masked, .. } = self;
        let outcome = run_vcpus(vcpus, &board, &control, limit, |vcpu, cpus| match &state {
            BootState::X86(state) => set_up(vcpu, state, cpus, masked),
            BootState::Aarch64(regs) => virt::set_up(vcpu, regs),
        });
        board.serial_input().close();
        drop((accel, memory));
        outcome
    }
}

impl fmt::Debug for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Machine")
            .field("accel", &self.accel)
            .field("cpus", &self.vcpus.len())
            .field("protocol", &self.protocol)
            .field("board", &self.board)
            .finish_non_exhaustive()
    }
}

/// The power button of a machine.
#[derive(Debug, Clone)]
pub struct PowerButton(Option<Arc<Mutex<AcpiPm>>>);

impl PowerButton {
    /// Presses it. A guest without ACPI does not notice; the board `virt` has none.
    pub fn press(&self) {
        if let Some(pm) = &self.0 {
            lock(pm).press_power_button();
        }
    }
}

/// Writes the guest and the ACPI tables.
fn fill_memory(memory: &GuestMemory, plan: &BootPlan<'_>, cpus: u32) -> Result<(), MachineError> {
    let write = MachineError::accel("writing the guest to its memory");
    let mut sink = memory;
    plan.load(&mut sink).map_err(&write)?;
    for mapping in plan.mappings.iter().filter(|mapping| in_shadow(mapping.gpa)) {
        memory.write(mapping.gpa, mapping.data).map_err(&write)?;
    }
    // Firmware has the place of the tables, and makes its own.
    if !plan.mappings.iter().any(|mapping| in_shadow(mapping.gpa)) {
        let tables = acpi::build(ACPI_ADDRESS, cpus);
        memory.write(tables.address.into(), &tables.bytes).map_err(&write)?;
    }
    Ok(())
}

/// Whether a mapping belongs into the RAM below 1 MiB that the guest's memory map reserves.
fn in_shadow(gpa: u64) -> bool {
    (SHADOW..ONE_MIB).contains(&gpa)
}

/// The read-only regions outside RAM that the plan asks for.
fn roms(plan: &BootPlan<'_>) -> Result<Vec<(u64, GuestRegion)>, MachineError> {
    let during = MachineError::accel("giving the guest its firmware");
    let mappings = plan.mappings.iter().filter(|mapping| !in_shadow(mapping.gpa));
    mappings
        .map(|mapping| {
            let region = GuestRegion::anonymous(mapping.data.len() as u64).map_err(&during)?;
            region.write(0, mapping.data).map_err(&during)?;
            Ok((mapping.gpa, region))
        })
        .collect()
}

/// Brings a vCPU into the state in which the guest begins.
fn set_up(vcpu: &mut dyn VcpuOps, boot: &X86BootState, cpus: u32, masked: FeatureMask) -> Result<(), AccelError> {
    let cpu = vcpu.get_id();
    let unsupported = vcpu.unsupported("x86-64 state");
    let x86 = vcpu.as_x86().ok_or(unsupported)?;
    let supported = x86.supported_cpuid()?;
    let mut entries = cpuid::for_cpu(&supported, cpu, cpus);
    masked.apply(&mut entries);
    x86.set_cpuid(&entries)?;
    // Memory types make no difference to a guest without device memory; a backend without this MSR is as good.
    match x86.set_msrs(&[X86Msr { index: MTRR_DEF_TYPE, value: MTRR_WRITE_BACK }]) {
        Ok(()) | Err(AccelError::Msr { .. } | AccelError::Unsupported { .. }) => {}
        Err(error) => return Err(error),
    }
    if cpu == 0 {
        let sregs = boot.over(&x86.get_sregs()?);
        x86.set_sregs(&sregs)?;
        vcpu.set_regs(&boot.regs)?;
    }
    Ok(())
}

/// Opens once for all.
#[derive(Debug, Default)]
struct Gate {
    open: Mutex<bool>,
    changed: Condvar,
}

impl Gate {
    fn open(&self) {
        *lock(&self.open) = true;
        self.changed.notify_all();
    }

    fn wait(&self) {
        let mut open = lock(&self.open);
        while !*open {
            open = self.changed.wait(open).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Runs each of `vcpus` in a thread of its own, after `set_up`, until the machine of `control` has ended.
fn run_vcpus(
    vcpus: Vec<Box<dyn VcpuOps>>,
    board: &AnyBoard,
    control: &Control,
    limit: Option<Duration>,
    set_up: impl Fn(&mut dyn VcpuOps, u32) -> Result<(), AccelError> + Sync,
) -> Outcome {
    let cpus = u32::try_from(vcpus.len()).unwrap_or(u32::MAX);
    let wiring = board.wiring();
    let chips = wiring.chips;
    let (gate, (ready, all_ready)) = (Gate::default(), mpsc::channel::<()>());
    thread::scope(|scope| {
        let mut kicks: Vec<VcpuKick> = Vec::new();
        let mut start_vcpu = |mut vcpu: Box<dyn VcpuOps>| {
            let cpu = vcpu.get_id();
            let kick = vcpu.kick_handle().map_err(|source| fail(cpu, "taking its kick handle", source))?;
            kicks.push(kick);
            let (ready, gate, set_up) = (ready.clone(), &gate, &set_up);
            start(scope, control, format!("vcpu{cpu}"), move || {
                let result = set_up(vcpu.as_mut(), cpus);
                drop(ready);
                if let Err(source) = result {
                    control.finish(fail(cpu, "setting it up", source));
                }
                gate.wait();
                runloop::run(vcpu.as_mut(), wiring, control);
            })
        };
        let started = vcpus.into_iter().try_for_each(&mut start_vcpu);
        if let Err(outcome) = started.and_then(|()| {
            chips.map_or(Ok(()), |chips| start(scope, control, "timer".to_owned(), || chips.run_timer()))
        }) {
            control.finish(outcome);
        }
        if let (Some(chips), Some(kick)) = (chips, kicks.first()) {
            chips.set_boot_cpu(kick.clone());
        }
        // Nobody sends: this returns when every thread has dropped its end, by a panic if need be.
        drop(ready);
        let _ = all_ready.recv();
        gate.open();
        let outcome = control.wait(limit);
        kicks.iter().for_each(VcpuKick::kick);
        chips.into_iter().for_each(SplitChips::wake_timer);
        outcome
    })
}

/// Starts a thread in which a panic ends the machine instead of leaving it without one of its parts.
fn start<'scope>(
    scope: &'scope thread::Scope<'scope, '_>,
    control: &'scope Control,
    name: String,
    body: impl FnOnce() + Send + 'scope,
) -> Result<(), Outcome> {
    let thread = name.clone();
    let guarded = move || {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(body)) {
            let message = panic_message(panic.as_ref());
            control.finish(Outcome::Failed(Failure::Panicked { thread, message }));
        }
    };
    match thread::Builder::new().name(name.clone()).spawn_scoped(scope, guarded) {
        Ok(_) => Ok(()),
        Err(error) => Err(Outcome::Failed(Failure::Thread { thread: name, message: error.to_string() })),
    }
}

fn fail(cpu: u32, during: &str, source: AccelError) -> Outcome {
    Outcome::Failed(Failure::Vcpu { cpu, during: during.to_owned(), source })
}

/// What a panic said, if it said something.
fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("no message").to_owned()
}

#[cfg(test)]
#[path = "machine_tests.rs"]
mod tests;
