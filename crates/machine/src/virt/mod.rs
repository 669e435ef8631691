//! The board `virt`: an aarch64 machine without firmware, in the manner of QEMU's board of that name: RAM from 1 GiB on, a
//! GIC of the accelerator's, a PL011 serial port, a PL031 clock, and PSCI to switch CPUs and the machine off.
//!
//! The description is data and is built on any host. Nothing here depends on the host's architecture.

pub mod fdt;

use std::io::Write;
use std::sync::{Arc, Mutex};

use vm_accel::aarch64::{self, Gic, spi_line};
use vm_accel::{AccelError, GuestMemory, GuestRegion, GuestRegs, IrqHandle, VcpuOps};

use crate::boot::{MemoryKind, MemoryMap, MemoryRange};
use crate::bus::{Bus, BusError};
use crate::control::{Control, Failure, Outcome};
use crate::devices::pl011::{PL011_LEN, Pl011};
use crate::devices::pl031::{PL031_LEN, Pl031};
use crate::error::MachineError;
use crate::irq::{IrqLine, IrqPin};

/// Where RAM begins.
pub const RAM: u64 = 1 << 30;
/// RAM sizes are multiples of this many bytes.
pub const MEMORY_GRANULE: u64 = 64 << 10;
/// Least RAM that a board can have, in bytes.
pub const MIN_MEMORY: u64 = 8 << 20;
/// Most RAM that a board can have, in bytes; the host and the CPU usually set a lower limit.
pub const MAX_MEMORY: u64 = 1 << 46;
/// Guest physical address of the serial port.
pub const UART: u64 = 0x0900_0000;
/// INTID of the serial port's interrupt.
pub const UART_INTID: u32 = 33;
/// Guest physical address of the clock.
pub const RTC: u64 = 0x0901_0000;
/// Most CPUs that the board can have: as many redistributors fit below RAM. The accelerator usually sets a lower limit.
pub const MAX_CPUS: u32 = 512;

/// The memory map for the guest.
///
/// # Errors
/// [`MachineError::Memory`] if the size is too small, too large or no multiple of 64 KiB.
pub fn memory_map(size: u64, address_bits: u8) -> Result<MemoryMap, MachineError> {
    let refuse = |rule: String| Err(MachineError::Memory { size, rule });
    if size < MIN_MEMORY {
        return refuse(format!("at least {MIN_MEMORY} bytes (8 MiB) are needed"));
    }
    if !size.is_multiple_of(MEMORY_GRANULE) {
        return refuse("it must be a multiple of 64 KiB".to_owned());
    }
    let space = match address_bits {
        0 => u64::MAX,
        bits => 1u64.checked_shl(bits.into()).unwrap_or(u64::MAX),
    };
    let most = MAX_MEMORY.min(space.saturating_sub(RAM));
    if size > most {
        return refuse(format!("at most {most} bytes fit the guest's physical addresses"));
    }
    let range = MemoryRange { base: RAM, size, kind: MemoryKind::Ram };
    Ok(MemoryMap::new(vec![range])?)
}

/// Allocates the RAM.
pub(crate) fn allocate(size: u64) -> Result<GuestMemory, MachineError> {
    let during = MachineError::accel("allocating the guest's memory");
    let memory = GuestMemory::new();
    let region = GuestRegion::anonymous(size).map_err(&during)?;
    memory.insert(RAM, region).map_err(&during)?;
    Ok(memory)
}

/// A line to the accelerator's GIC.
struct SharedLine {
    handle: IrqHandle,
    intid: u32,
    control: Control,
}

impl IrqLine for SharedLine {
    fn set_level(&self, asserted: bool) {
        if let Err(source) = self.handle.set_line(spi_line(self.intid), asserted) {
            let what = format!("INTID {}", self.intid);
            self.control.finish(Outcome::Failed(Failure::Interrupt { what, source }));
        }
    }
}

/// The devices of one machine.
#[derive(Debug)]
pub(crate) struct Board {
    pub(crate) ports: Bus,
    pub(crate) mmio: Bus,
    pub(crate) uart: Arc<Mutex<Pl011>>,
}

impl Board {
    /// Builds the devices and puts them on their bus.
    pub(crate) fn new(
        interrupts: IrqHandle,
        serial: Box<dyn Write + Send>,
        control: &Control,
    ) -> Result<Self, BusError> {
        let on_error = {
            let control = control.clone();
            move |error: std::io::Error| {
                control.finish(Outcome::Failed(Failure::Output { device: "serial port", message: error.to_string() }));
            }
        };
        let line =
            IrqPin::new(Arc::new(SharedLine { handle: interrupts, intid: UART_INTID, control: control.clone() }));
        let uart = Arc::new(Mutex::new(Pl011::new(serial, line, on_error)));
        let mut mmio = Bus::mmio();
        mmio.register(UART, PL011_LEN, uart.clone())?;
        mmio.register(RTC, PL031_LEN, Arc::new(Mutex::new(Pl031::host_time())))?;
        Ok(Self { ports: Bus::ports(), mmio, uart })
    }
}

/// Where the board's parts are that are not devices of its own: nothing else may be there.
pub const GIC: std::ops::Range<u64> = Gic::DISTRIBUTOR..UART;

/// Brings a vCPU into the state in which the guest begins; those but the first wait for PSCI CPU_ON.
pub(crate) fn set_up(vcpu: &mut dyn VcpuOps, boot: &GuestRegs) -> Result<(), AccelError> {
    let cpu = vcpu.get_id();
    let unsupported = vcpu.unsupported("aarch64 state");
    let arm = vcpu.as_aarch64().ok_or(unsupported)?;
    // The device tree names CPUs by these.
    let mpidr = arm.get_sys_reg(aarch64::MPIDR_EL1)?;
    let affinity = aarch64::affinity(cpu);
    if mpidr & aarch64::MPIDR_AFFINITY != affinity {
        arm.set_sys_reg(aarch64::MPIDR_EL1, mpidr & !aarch64::MPIDR_AFFINITY | affinity)?;
    }
    if cpu == 0 {
        vcpu.set_regs(boot)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_begins_at_one_gib() {
        let map = memory_map(64 << 20, 40).unwrap();
        assert_eq!(map.ranges()[0].base, RAM);
        assert_eq!(map.ram_size(), 64 << 20);
        for (size, bits) in [(0, 0), (1 << 20, 0), ((64 << 20) + 4096, 0), (1 << 36, 36), (!0xffff, 0), (1 << 47, 52)] {
            assert!(matches!(memory_map(size, bits), Err(MachineError::Memory { .. })), "{size:#x} {bits}");
        }
        assert!(memory_map((1 << 36) - RAM, 36).is_ok());
    }

    #[test]
    fn places_do_not_overlap() {
        const { assert!(Gic::ITS + Gic::ITS_SIZE <= UART) };
        const { assert!(UART + PL011_LEN <= RTC && RTC + PL031_LEN <= Gic::GICV3_REDISTRIBUTORS) };
        let last = Gic::GICV3_REDISTRIBUTORS + u64::from(MAX_CPUS) * Gic::GICV3_REDISTRIBUTOR_SIZE;
        assert!(last <= RAM);
    }
}
