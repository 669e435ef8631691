//! The board `pc`: a PC without PCI, as small as operating systems accept, in the manner of QEMU's `microvm` and Firecracker.
//!
//! Ports: UART 0x3f8 (IRQ 4), RTC 0x70, i8042 0x60/0x64 (IRQ 1), ports 0x61, 0x80 and 0x92, PCI configuration 0xcf8 with
//! the reset register 0xcf9, exit port 0xf4, fw_cfg 0x510, ACPI PM 0x600 (IRQ 9), and the [test
//! device](crate::devices::testdev). Local APICs are the accelerator's; PIC,
//! PIT and I/O APIC are, too, where it has them, and the board's own elsewhere. Memory: see [`memory`].

pub mod acpi;
pub(crate) mod interrupts;
pub mod memory;

use std::io::Write;
use std::sync::{Arc, Mutex};

use crate::boot::MemoryMap;
use crate::bus::{Bus, BusError};
use crate::control::{Control, Failure, Outcome};
use crate::devices::acpi_pm::{AcpiPm, PM_BASE, PM_LEN, SCI_IRQ};
use crate::devices::chipset::{
    PCI_CONFIG, PCI_CONFIG_LEN, PORT_61, PORT_92, POST_PORT, PciConfig, Port61, Port92, PostCode,
};
use crate::devices::exit_port::{EXIT_PORT, EXIT_PORT_LEN, ExitPort};
use crate::devices::fw_cfg::{FW_CFG_LEN, FW_CFG_PORT, FwCfg};
use crate::devices::i8042::{COMMAND_PORT, DATA_PORT, I8042};
use crate::devices::rtc::{RTC_LEN, RTC_PORT, Rtc};
use crate::devices::testdev::{
    TEST_IRQ_PORT, TEST_MEMORY, TEST_MEMORY_LEN, TEST_PORT, TEST_PORT_LEN, TestIrqs, TestMemory, TestPorts,
};
use crate::devices::uart::{UART_PORTS, Uart};
use interrupts::Interrupts;
use memory::RamLayout;

/// First port of the serial port.
pub const COM1: u64 = 0x3f8;
/// Interrupt line of the serial port.
pub const COM1_IRQ: u32 = 4;
/// Interrupt line of the keyboard controller.
pub const KEYBOARD_IRQ: u32 = 1;
/// Guest physical address of the local APICs.
pub const LOCAL_APIC_ADDRESS: u32 = 0xfee0_0000;
/// Guest physical address of the I/O APIC.
pub const IO_APIC_ADDRESS: u32 = 0xfec0_0000;
/// Id of the I/O APIC. With x2APIC ids it need not differ from those of the CPUs.
pub const IO_APIC_ID: u8 = 0;
/// Pins of the I/O APIC.
pub const IO_APIC_PINS: u32 = 24;
/// The pin of the I/O APIC at which the timer, ISA interrupt 0, is.
pub const TIMER_PIN: u32 = 2;
/// The interrupt of the first PIC at which the second hangs: it leads nowhere else.
const CASCADE: u32 = 2;
/// Most CPUs that the board can have; the accelerator usually sets a lower limit.
pub const MAX_CPUS: u32 = 4096;

/// The devices of one machine.
#[derive(Debug)]
pub(crate) struct Board {
    pub(crate) ports: Bus,
    pub(crate) mmio: Bus,
    pub(crate) uart: Arc<Mutex<Uart>>,
    pub(crate) pm: Arc<Mutex<AcpiPm>>,
    pub(crate) interrupts: Interrupts,
}

impl Board {
    /// Builds the devices and puts them on their buses.
    ///
    /// `serial` takes what the guest writes to its serial port.
    pub(crate) fn new(
        ram: RamLayout,
        map: &MemoryMap,
        cpus: u32,
        interrupts: Interrupts,
        serial: Box<dyn Write + Send>,
        control: &Control,
    ) -> Result<Self, BusError> {
        let on_error = {
            let control = control.clone();
            move |error: std::io::Error| {
                control.finish(Outcome::Failed(Failure::Output { device: "serial port", message: error.to_string() }));
            }
        };
        let uart = Arc::new(Mutex::new(Uart::new(serial, interrupts.pin(COM1_IRQ), on_error)));
        let pm = Arc::new(Mutex::new(AcpiPm::new(control.clone(), interrupts.pin(SCI_IRQ))));
        let keyboard = Arc::new(Mutex::new(I8042::new(control.clone(), interrupts.pin(KEYBOARD_IRQ))));
        let fw_cfg = FwCfg::new(cpus.try_into().unwrap_or(u16::MAX), ram.size(), &[("etc/e820", e820(map))]);

        let mut ports = Bus::ports();
        ports.register(COM1, UART_PORTS, uart.clone())?;
        ports.register(PM_BASE.into(), PM_LEN, pm.clone())?;
        ports.register_window(DATA_PORT, 1, 0, keyboard.clone())?;
        ports.register_window(COMMAND_PORT, 1, 1, keyboard)?;
        ports.register(RTC_PORT, RTC_LEN, Arc::new(Mutex::new(Rtc::host_time(ram.below_4g, ram.above_4g))))?;
        ports.register(POST_PORT, 1, Arc::new(Mutex::new(PostCode::default())))?;
        ports.register(PORT_92, 1, Arc::new(Mutex::new(Port92::new(control.clone()))))?;
        ports.register(EXIT_PORT, EXIT_PORT_LEN, Arc::new(Mutex::new(ExitPort::new(control.clone()))))?;
        ports.register(PCI_CONFIG, PCI_CONFIG_LEN, Arc::new(Mutex::new(PciConfig::new(control.clone()))))?;
        ports.register(FW_CFG_PORT, FW_CFG_LEN, Arc::new(Mutex::new(fw_cfg)))?;
        let lines = (0..IO_APIC_PINS).map(|gsi| interrupts.pin(gsi)).collect();
        ports.register(TEST_PORT, TEST_PORT_LEN, Arc::new(Mutex::new(TestPorts::default())))?;
        ports.register(TEST_IRQ_PORT, IO_APIC_PINS.into(), Arc::new(Mutex::new(TestIrqs::new(lines))))?;
        let mut mmio = Bus::mmio();
        match interrupts.split() {
            Some(chips) => chips.register(&mut ports, &mut mmio)?,
            None => ports.register(PORT_61, 1, Arc::new(Mutex::new(Port61::default())))?,
        }
        mmio.register(TEST_MEMORY, TEST_MEMORY_LEN, Arc::new(Mutex::new(TestMemory::default())))?;
        Ok(Self { ports, mmio, uart, pm, interrupts })
    }
}

/// The memory map as fw_cfg offers it: base, size and E820 type of each range.
fn e820(map: &MemoryMap) -> Vec<u8> {
    let mut table = Vec::new();
    for range in map.ranges() {
        table.extend(range.base.to_le_bytes());
        table.extend(range.size.to_le_bytes());
        table.extend((range.kind as u32).to_le_bytes());
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::lock;

    fn board(control: &Control) -> Board {
        let ram = RamLayout::new(64 << 20, 0).unwrap();
        let map = ram.map().unwrap();
        Board::new(ram, &map, 2, Interrupts::None, Box::new(std::io::sink()), control).unwrap()
    }

    fn read(board: &Board, port: u64) -> u8 {
        let mut data = [0];
        board.ports.read(port, &mut data);
        data[0]
    }

    #[test]
    fn every_way_to_end_the_machine_works_through_the_bus() {
        let ways: [(u64, &[u8], Outcome); 7] = [
            (0xf4, &[3, 0, 0, 0], Outcome::ExitPort(3)),
            (0xf4, &[3], Outcome::ExitPort(3)),
            (0x64, &[0xfe], Outcome::Reset),
            (0x92, &[1], Outcome::Reset),
            (0xcf9, &[6], Outcome::Reset),
            (0x604, &[0, 0x20], Outcome::Shutdown),
            (0x604, &[1, 0x20, 0, 0], Outcome::Shutdown),
        ];
        for (port, data, outcome) in ways {
            let control = Control::new();
            board(&control).ports.write(port, data);
            assert_eq!(control.outcome(), Some(outcome), "{port:#x}");
        }
    }

    #[test]
    fn devices_answer_where_the_board_says() {
        let control = Control::new();
        let board = board(&control);
        assert_eq!(read(&board, 0x3fd), 0x60);
        board.ports.write(0x64, &[0xaa]);
        assert_eq!((read(&board, 0x64) & 1, read(&board, 0x60)), (1, 0x55));
        board.ports.write(0x510, &[5, 0]);
        assert_eq!((read(&board, 0x511), read(&board, 0x511)), (2, 0));
        for port in [0x2f8, 0x20, 0x1f7, 0xcfc, 0xffff] {
            assert_eq!(read(&board, port), 0xff, "{port:#x}");
        }
        lock(&board.pm).press_power_button();
        assert_eq!(read(&board, 0x601), 1);
    }

    #[test]
    fn any_access_anywhere_is_survived() {
        let board = board(&Control::new());
        for port in 0..=0xffff {
            for size in [1, 2, 4] {
                let mut data = [0xa5; 4];
                board.ports.write(port, &data[..size]);
                board.ports.read(port, &mut data[..size]);
            }
        }
    }

    #[test]
    fn a_closed_output_ends_the_machine() {
        struct Closed;
        impl Write for Closed {
            fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
                Err(std::io::ErrorKind::BrokenPipe.into())
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let control = Control::new();
        let ram = RamLayout::new(64 << 20, 0).unwrap();
        let map = ram.map().unwrap();
        let board = Board::new(ram, &map, 1, Interrupts::None, Box::new(Closed), &control).unwrap();
        board.ports.write(COM1, b"x");
        assert!(matches!(control.outcome(), Some(Outcome::Failed(Failure::Output { .. }))));
    }
}
