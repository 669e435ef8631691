//! Devices of the board `pc`. Each is a [`BusDevice`](crate::bus::BusDevice) that knows nothing of the bus it sits on,
//! of vCPUs or of any accelerator: its surroundings are an interrupt pin, a power latch or a byte sink.
pub mod uart;
