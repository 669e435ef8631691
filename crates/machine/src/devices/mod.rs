//! Devices of the boards. Each is a [`BusDevice`](crate::bus::BusDevice) that knows nothing of the bus it sits on,
//! of vCPUs or of any accelerator: its surroundings are an interrupt pin, the machine's end or a byte sink.

pub mod acpi_pm;
pub mod chipset;
pub mod exit_port;
pub mod fw_cfg;
pub mod i8042;
pub mod ioapic;
pub mod pic;
pub mod pit;
pub mod pl011;
pub mod pl031;
pub mod rtc;
pub mod testdev;
pub mod uart;
