//! Tests of the board's own interrupt controllers, with an accelerator that only remembers.

use super::*;
use vm_accel::{AccelKind, Capabilities, GuestArch, GuestRegion, IrqSink, MemoryFlags};

#[derive(Debug, Default)]
struct Remembered {
    messages: Vec<MsiMessage>,
    routes: Vec<(u32, IrqTarget)>,
    lines: Vec<(u32, bool)>,
}

#[derive(Debug)]
struct Recorder(Arc<Mutex<Remembered>>, Capabilities);

struct Sink(Arc<Mutex<Remembered>>);

impl IrqSink for Sink {
    fn set_line(&self, gsi: u32, level: bool) -> VcpuResult<()> {
        lock(&self.0).lines.push((gsi, level));
        Ok(())
    }
    fn signal_msi(&self, msi: MsiMessage) -> VcpuResult<()> {
        lock(&self.0).messages.push(msi);
        Ok(())
    }
}

impl Accel for Recorder {
    fn kind(&self) -> AccelKind {
        AccelKind::Fallback
    }
    fn capabilities(&self) -> &Capabilities {
        &self.1
    }
    fn create_vcpu(&mut self, _: u32) -> VcpuResult<Box<dyn VcpuOps>> {
        Err(self.unsupported("a vCPU"))
    }
    fn map_memory(&mut self, _: u64, _: &GuestRegion, _: MemoryFlags) -> VcpuResult<()> {
        Ok(())
    }
    fn unmap_memory(&mut self, _: u64) -> VcpuResult<()> {
        Ok(())
    }
    fn remap_memory(&mut self, _: u64, _: &GuestRegion, _: MemoryFlags) -> VcpuResult<()> {
        Ok(())
    }
    fn protect_memory(&mut self, _: u64, _: MemoryFlags) -> VcpuResult<()> {
        Ok(())
    }
    fn create_irqchip(&mut self, _: IrqChip) -> VcpuResult<()> {
        Ok(())
    }
    fn irq_handle(&self) -> VcpuResult<IrqHandle> {
        Ok(IrqHandle::new(Arc::new(Sink(self.0.clone()))))
    }
    fn set_irq_routes(&mut self, routes: &[(u32, IrqTarget)]) -> VcpuResult<()> {
        lock(&self.0).routes = routes.to_vec();
        Ok(())
    }
}

struct Fixture {
    interrupts: Interrupts,
    remembered: Arc<Mutex<Remembered>>,
    control: Control,
    ports: Bus,
    mmio: Bus,
}

fn fixture(chip: IrqChip) -> Fixture {
    let remembered = Arc::default();
    let recorder = Recorder(Arc::clone(&remembered), Capabilities::minimal(GuestArch::X86_64));
    let accel: SharedAccel = Arc::new(Mutex::new(Box::new(recorder)));
    let control = Control::new();
    let interrupts = Interrupts::new(&accel, chip, &control).unwrap();
    let (mut ports, mut mmio) = (Bus::ports(), Bus::mmio());
    if let Some(chips) = interrupts.split() {
        chips.register(&mut ports, &mut mmio).unwrap();
    }
    Fixture { interrupts, remembered, control, ports, mmio }
}

impl Fixture {
    fn io_apic(&self, register: u32, value: u32) {
        self.mmio.write(0xfec0_0000, &register.to_le_bytes());
        self.mmio.write(0xfec0_0010, &value.to_le_bytes());
    }

    fn out(&self, port: u64, values: &[u8]) {
        values.iter().for_each(|value| self.ports.write(port, &[*value]));
    }

    /// The data of the messages sent since the last call.
    fn messages(&self) -> Vec<u32> {
        lock(&self.remembered).messages.drain(..).map(|message| message.data & 0xff).collect()
    }
}

#[test]
fn kernel_routes_are_where_the_tables_say() {
    let fixture = fixture(IrqChip::Kernel);
    let routes = lock(&fixture.remembered).routes.clone();
    let to = |chip, pin| {
        let found = routes.iter().find(|(_, target)| *target == IrqTarget::Pin { chip, pin });
        found.map(|(gsi, _)| *gsi)
    };
    assert_eq!((to(0, 0), to(0, 4), to(1, 1), to(0, 2)), (Some(0), Some(4), Some(9), None));
    assert_eq!((to(2, 0), to(2, 2), to(2, 4), to(2, 23), to(2, 24)), (None, Some(0), Some(4), Some(23), None));
    fixture.interrupts.pin(4).set(true);
    assert_eq!(lock(&fixture.remembered).lines, [(4, true)]);
}

#[test]
fn without_controllers_lines_lead_nowhere() {
    let fixture = fixture(IrqChip::None);
    fixture.interrupts.pin(4).set(true);
    assert!(lock(&fixture.remembered).lines.is_empty());
}

#[test]
fn lines_become_messages_of_the_io_apic() {
    let fixture = fixture(IrqChip::Split);
    let mut pin = fixture.interrupts.pin(4);
    pin.set(true);
    pin.set(false);
    assert_eq!(fixture.messages(), [], "masked");
    fixture.io_apic(0x10 + 2 * 4, 0x51);
    assert_eq!(lock(&fixture.remembered).routes.len(), 1);
    pin.set(true);
    assert_eq!(fixture.messages(), [0x51]);
    // The timer is at pin 2.
    fixture.io_apic(0x10 + 2 * 2, 0x52);
    fixture.interrupts.pin(0).set(true);
    assert_eq!(fixture.messages(), [0x52]);
    let routes: Vec<_> = lock(&fixture.remembered).routes.iter().map(|(gsi, _)| *gsi).collect();
    assert_eq!(routes, [2, 4]);
}

#[test]
fn a_level_comes_again_until_its_device_is_served() {
    let fixture = fixture(IrqChip::Split);
    let chips = fixture.interrupts.split().unwrap();
    fixture.io_apic(0x10 + 2 * 9, 0x8059);
    let mut pin = fixture.interrupts.pin(9);
    pin.set(true);
    assert_eq!(fixture.messages(), [0x59]);
    chips.end_of_interrupt(0x59);
    assert_eq!(fixture.messages(), [0x59]);
    pin.set(false);
    chips.end_of_interrupt(0x59);
    assert_eq!(fixture.messages(), []);
}

#[test]
fn the_pics_raise_intr_and_take_it_back() {
    let fixture = fixture(IrqChip::Split);
    let chips = fixture.interrupts.split().unwrap();
    let intr = || chips.intr.load(Ordering::SeqCst);
    fixture.out(0x20, &[0x11]);
    fixture.out(0x21, &[0x30, 4, 1, 0xef]);
    let mut pin = fixture.interrupts.pin(4);
    pin.set(true);
    assert!(intr());
    fixture.out(0x21, &[0xff]);
    assert!(!intr());
    fixture.out(0x21, &[0xef]);
    assert!(intr());
}

#[test]
fn the_timer_ticks_in_its_thread_until_the_end() {
    let fixture = fixture(IrqChip::Split);
    let chips = fixture.interrupts.split().unwrap();
    fixture.io_apic(0x10 + 2 * 2, 0x60);
    // Channel 0, mode 2, 1193 ticks: about a millisecond.
    fixture.out(0x43, &[0x34]);
    fixture.out(0x40, &[0xa9, 0x04]);
    std::thread::scope(|scope| {
        let timer = scope.spawn(|| chips.run_timer());
        let mut ticks = 0;
        while ticks < 3 {
            ticks += fixture.messages().len();
            std::thread::yield_now();
        }
        fixture.control.finish(Outcome::Stopped);
        chips.wake_timer();
        timer.join().unwrap();
    });
}

#[test]
fn port_61_shows_channel_2() {
    let fixture = fixture(IrqChip::Split);
    fixture.out(0x61, &[0]);
    fixture.out(0x43, &[0xb0]); // channel 2, mode 0
    fixture.out(0x42, &[1, 0]);
    fixture.out(0x61, &[1]);
    let mut data = [0];
    while data[0] & 0x20 == 0 {
        fixture.ports.read(0x61, &mut data);
    }
}
