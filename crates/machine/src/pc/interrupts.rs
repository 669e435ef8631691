//! Where the board's interrupt lines lead: into the accelerator's controllers, or into the board's own.
//!
//! [`SplitChips`] are the latter, for accelerators that only have local APICs ([`IrqChip::Split`]): the PIC pair, the I/O
//! APIC and the PIT, which are pure state machines, with what moves them. What goes out: the I/O APIC's messages to the accelerator; the PICs' vector into the boot CPU when its run loop
//! [offers](SplitChips::offer) to take one; the PIT's edges, for which [`SplitChips::run_timer`] needs a thread. One mutex guards all
//! three chips. It is never held while the accelerator is called, which may take its time.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use vm_accel::{Accel, AccelError, IrqChip, IrqHandle, IrqTarget, MsiMessage, VcpuKick, VcpuOps, VcpuResult};

use super::{CASCADE, IO_APIC_ADDRESS, IO_APIC_ID, IO_APIC_PINS, TIMER_PIN};
use crate::bus::{Bus, BusDevice, BusError, lock};
use crate::control::{Control, Failure, Outcome};
use crate::devices::chipset::PORT_61;
use crate::devices::ioapic::{IOAPIC_LEN, IoApic};
use crate::devices::pic::PicPair;
use crate::devices::pit::Pit;
use crate::irq::{IrqLine, IrqPin};

/// Ports of the PICs and of their edge/level registers, two at each place.
const PIC_PORTS: [u64; 3] = [0x20, 0xa0, 0x4d0];
/// First port of the PIT.
const PIT_PORT: u64 = 0x40;
const PIT_PORTS: u64 = 4;
/// The timer's interrupt.
const TIMER_GSI: u32 = 0;
/// Interrupts from here on are the I/O APIC's alone.
const ISA_INTERRUPTS: u32 = 16;

/// A line to controllers in the accelerator.
struct KernelLine {
    handle: IrqHandle,
    gsi: u32,
    control: Control,
}

impl IrqLine for KernelLine {
    fn set_level(&self, asserted: bool) {
        if let Err(source) = self.handle.set_line(self.gsi, asserted) {
            let what = format!("line {}", self.gsi);
            self.control.finish(Outcome::Failed(Failure::Interrupt { what, source }));
        }
    }
}

/// An accelerator that devices use while the machine runs.
pub(crate) type SharedAccel = Arc<Mutex<Box<dyn Accel>>>;

/// Who has the board's interrupt controllers.
#[derive(Debug)]
pub(crate) enum Interrupts {
    /// Nobody: the guest gets no interrupts.
    None,
    /// The accelerator.
    Kernel { handle: IrqHandle, control: Control },
    /// The board, all but the local APICs.
    Split(Arc<SplitChips>),
}

impl Interrupts {
    /// Creates the controllers. Must precede the first vCPU.
    pub(crate) fn new(accel: &SharedAccel, chip: IrqChip, control: &Control) -> VcpuResult<Self> {
        let mut vm = lock(accel);
        vm.create_irqchip(chip)?;
        let control = control.clone();
        Ok(match chip {
            IrqChip::None => Self::None,
            IrqChip::Kernel => {
                vm.set_irq_routes(&kernel_routes())?;
                Self::Kernel { handle: vm.irq_handle()?, control }
            }
            IrqChip::Split => {
                let handle = vm.irq_handle()?;
                Self::Split(Arc::new(SplitChips::new(accel.clone(), handle, control)))
            }
        })
    }

    /// A device's end of line `gsi`.
    pub(crate) fn pin(&self, gsi: u32) -> IrqPin {
        match self {
            Self::None => IrqPin::unconnected(),
            Self::Kernel { handle, control } => {
                IrqPin::new(Arc::new(KernelLine { handle: handle.clone(), gsi, control: control.clone() }))
            }
            Self::Split(chips) => IrqPin::new(Arc::new(SplitLine { chips: chips.clone(), gsi })),
        }
    }

    /// The board's own controllers, if it has them.
    pub(crate) fn split(&self) -> Option<&Arc<SplitChips>> {
        match self {
            Self::Split(chips) => Some(chips),
            _ => None,
        }
    }
}

/// Where in-kernel controllers take each GSI: ISA interrupts to the PICs and the I/O APIC, with the timer at pin 2 of
/// the I/O APIC as on a PC and as the MADT says, the others to the I/O APIC alone.
fn kernel_routes() -> Vec<(u32, IrqTarget)> {
    const IO_APIC: u32 = 2;
    let pics = (0..ISA_INTERRUPTS).filter(|&gsi| gsi != CASCADE);
    let pics = pics.map(|gsi| (gsi, IrqTarget::Pin { chip: gsi / 8, pin: gsi % 8 }));
    let io_apic = (0..IO_APIC_PINS).filter(|&gsi| gsi != CASCADE);
    let io_apic = io_apic.map(|gsi| (gsi, IrqTarget::Pin { chip: IO_APIC, pin: io_apic_pin(gsi) }));
    pics.chain(io_apic).collect()
}

/// The pin of the I/O APIC at which an interrupt is.
fn io_apic_pin(gsi: u32) -> u32 {
    if gsi == TIMER_GSI { TIMER_PIN } else { gsi }
}

#[derive(Debug)]
struct Chips {
    pic: PicPair,
    pit: Pit,
    io_apic: IoApic,
}

/// The chips of one machine.
pub(crate) struct SplitChips {
    chips: Mutex<Chips>,
    /// The PIT's deadline changed, or the machine has ended.
    changed: Condvar,
    started: Instant,
    handle: IrqHandle,
    accel: SharedAccel,
    /// The routes that the accelerator has; guards their order, too.
    routes: Mutex<Vec<(u32, IrqTarget)>>,
    /// The PICs' output, so that a run loop sees without the mutex that there is nothing to do.
    intr: AtomicBool,
    boot_cpu: OnceLock<VcpuKick>,
    control: Control,
}

/// What the boot CPU's run loop remembers of [`SplitChips::offer`].
#[derive(Debug, Default)]
pub(crate) struct Offer {
    window: bool,
    /// The accelerator takes no vectors from outside: its guests use the I/O APIC.
    impossible: bool,
}

impl SplitChips {
    fn new(accel: SharedAccel, handle: IrqHandle, control: Control) -> Self {
        Self {
            chips: Mutex::new(Chips { pic: PicPair::new(), pit: Pit::new(), io_apic: IoApic::new(IO_APIC_ID) }),
            changed: Condvar::new(),
            started: Instant::now(),
            handle,
            accel,
            routes: Mutex::default(),
            intr: AtomicBool::new(false),
            boot_cpu: OnceLock::new(),
            control,
        }
    }

    /// Puts the chips on the buses. They answer port 0x61.
    pub(crate) fn register(self: &Arc<Self>, ports: &mut Bus, mmio: &mut Bus) -> Result<(), BusError> {
        let pic = Arc::new(Mutex::new(PicDevice(self.clone())));
        for port in PIC_PORTS {
            ports.register_window(port, 2, port, pic.clone())?;
        }
        let pit = Arc::new(Mutex::new(PitDevice(self.clone())));
        ports.register(PIT_PORT, PIT_PORTS, pit.clone())?;
        ports.register_window(PORT_61, 1, PORT_61, pit)?;
        mmio.register(IO_APIC_ADDRESS.into(), IOAPIC_LEN, Arc::new(Mutex::new(IoApicDevice(self.clone()))))
    }

    /// Names the CPU that the PICs' interrupts go to.
    pub(crate) fn set_boot_cpu(&self, kick: VcpuKick) {
        let _ = self.boot_cpu.set(kick);
    }

    fn now(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// Ends an access to the chips: publishes the PICs' output, wakes the boot CPU for it, and sends what came out.
    fn leave(&self, chips: MutexGuard<'_, Chips>, messages: impl IntoIterator<Item = MsiMessage>) {
        let output = chips.pic.output();
        // Under the mutex, so that the last change is the one that stays.
        let rose = !self.intr.swap(output, Ordering::SeqCst) && output;
        drop(chips);
        if let (true, Some(kick)) = (rose, self.boot_cpu.get()) {
            kick.kick();
        }
        for message in messages {
            // A message that nobody takes is lost, as on hardware: where it goes is the guest's word alone.
            let _ = self.handle.signal_msi(message);
        }
    }

    /// Drives an interrupt line of the board.
    fn set_gsi(&self, gsi: u32, asserted: bool) {
        let mut chips = lock(&self.chips);
        if gsi < ISA_INTERRUPTS {
            chips.pic.set_irq(gsi as u8, asserted);
        }
        let message = chips.io_apic.set_irq(io_apic_pin(gsi) as usize, asserted);
        self.leave(chips, message);
    }

    /// A local APIC ended an interrupt of this vector.
    pub(crate) fn end_of_interrupt(&self, vector: u8) {
        let mut chips = lock(&self.chips);
        let messages = chips.io_apic.end_of_interrupt(vector);
        self.leave(chips, messages);
    }

    /// Gives the PICs' interrupt to the boot CPU if there is one and the CPU can take it; else asks for the moment
    /// when it can. To be called before each run.
    pub(crate) fn offer(&self, vcpu: &mut dyn VcpuOps, offer: &mut Offer) -> VcpuResult<()> {
        if offer.impossible || !offer.window && !self.intr.load(Ordering::SeqCst) {
            return Ok(());
        }
        let Some(x86) = vcpu.as_x86() else {
            return Ok(());
        };
        let ready = match x86.ready_for_interrupt() {
            Err(AccelError::Unsupported { .. }) => {
                offer.impossible = true;
                return Ok(());
            }
            ready => ready?,
        };
        if ready && self.intr.load(Ordering::SeqCst) {
            let mut chips = lock(&self.chips);
            let vector = chips.pic.acknowledge();
            self.leave(chips, None);
            x86.inject_interrupt(vector)?;
        }
        let window = self.intr.load(Ordering::SeqCst);
        if window != offer.window {
            x86.request_interrupt_window(window)?;
            offer.window = window;
        }
        Ok(())
    }

    /// Lets the PIT tick until the machine has ended.
    pub(crate) fn run_timer(&self) {
        loop {
            let mut chips = lock(&self.chips);
            if self.control.is_finished() {
                return;
            }
            let now = self.now();
            if chips.pit.advance(now) > 0 {
                drop(chips);
                self.pulse_timer();
                continue;
            }
            // Whoever changes the deadline or ends the machine notifies with the mutex held or after taking it.
            match chips.pit.next_deadline(now) {
                None => drop(self.changed.wait(chips).unwrap_or_else(PoisonError::into_inner)),
                Some(at) => {
                    let left = Duration::from_nanos(at.saturating_sub(now));
                    drop(self.changed.wait_timeout(chips, left).unwrap_or_else(PoisonError::into_inner));
                }
            }
        }
    }

    /// Makes [`run_timer`](Self::run_timer) look at the machine's end.
    pub(crate) fn wake_timer(&self) {
        drop(lock(&self.chips));
        self.changed.notify_all();
    }

    fn pulse_timer(&self) {
        self.set_gsi(TIMER_GSI, true);
        self.set_gsi(TIMER_GSI, false);
    }

    /// Tells the accelerator where the pins of the I/O APIC lead, so that it knows whose ends of interrupt to report.
    fn update_routes(&self) {
        let mut known = lock(&self.routes);
        let routes: Vec<_> = {
            let chips = lock(&self.chips);
            chips.io_apic.routes().map(|(pin, message)| (pin as u32, IrqTarget::Msi(message))).collect()
        };
        if *known == routes {
            return;
        }
        match lock(&self.accel).set_irq_routes(&routes) {
            // Without routes the accelerator goes by the trigger mode in the message.
            Ok(()) | Err(AccelError::Unsupported { .. }) => *known = routes,
            Err(source) => {
                let what = "the routes of the I/O APIC";
                self.control.finish(Outcome::Failed(Failure::Interrupt { what: what.to_owned(), source }));
            }
        }
    }
}

impl fmt::Debug for SplitChips {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SplitChips").field("intr", &self.intr).finish_non_exhaustive()
    }
}

/// A line to the chips.
struct SplitLine {
    chips: Arc<SplitChips>,
    gsi: u32,
}

impl IrqLine for SplitLine {
    fn set_level(&self, asserted: bool) {
        self.chips.set_gsi(self.gsi, asserted);
    }
}

struct PicDevice(Arc<SplitChips>);

impl BusDevice for PicDevice {
    fn name(&self) -> &'static str {
        "pic"
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let mut chips = lock(&self.0.chips);
        data.fill(chips.pic.read(offset as u16));
        self.0.leave(chips, None);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let mut chips = lock(&self.0.chips);
        data.iter().for_each(|&value| chips.pic.write(offset as u16, value));
        self.0.leave(chips, None);
    }
}

struct PitDevice(Arc<SplitChips>);

impl BusDevice for PitDevice {
    fn name(&self) -> &'static str {
        "pit"
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let now = self.0.now();
        let mut chips = lock(&self.0.chips);
        let value = if offset == PORT_61 { chips.pit.read_port_61(now) } else { chips.pit.read(offset as u16, now) };
        data.fill(value);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let &[value] = data else { return };
        let mut chips = lock(&self.0.chips);
        let now = self.0.now();
        // An edge that fell due before this write must not get lost by it.
        let due = chips.pit.advance(now) > 0;
        if offset == PORT_61 {
            chips.pit.write_port_61(value, now);
        } else {
            chips.pit.write(offset as u16, value, now);
        }
        self.0.changed.notify_all();
        drop(chips);
        if due {
            self.0.pulse_timer();
        }
    }
}

struct IoApicDevice(Arc<SplitChips>);

impl BusDevice for IoApicDevice {
    fn name(&self) -> &'static str {
        "io apic"
    }

    fn max_access(&self) -> usize {
        4
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) {
        lock(&self.0.chips).io_apic.read(offset, data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let mut chips = lock(&self.0.chips);
        let messages = chips.io_apic.write(offset, data);
        // Routes first: the end of what is sent now must be reported.
        drop(chips);
        self.0.update_routes();
        self.0.leave(lock(&self.0.chips), messages);
    }
}

#[cfg(test)]
#[path = "interrupts_tests.rs"]
mod tests;
