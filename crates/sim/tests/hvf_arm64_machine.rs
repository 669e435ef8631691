//! The board `virt` on HVF of Apple silicon with the framework's GIC: a guest that needs all of it, from power-on to power-off.
//!
//! The demo guest is x86 code, and the interpreter lacks most of what Linux for arm64 executes; so the guest is a program of
//! its own, in the manner of a small kernel.

use std::io::Write;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use vm_accel::aarch64::{
    CNTV_CTL_EL0, CNTV_CVAL_EL0, CNTVCT_EL0, Gic, VBAR_EL1, VIRTUAL_TIMER_INTID, affinity, sys_reg,
};
use vm_accel::platform::hvf::aarch64::AccelHvf;
use vm_accel_guests::arm64::Index::Offset;
use vm_accel_guests::arm64::{Assembler, ZR, psci};
use vm_accel_machine::boot::{BootKind, Protocol};
use vm_accel_machine::virt::{RAM, UART, UART_INTID};
use vm_accel_machine::{Guest, Machine, MachineConfig, MachineError, Outcome};
use vm_accel_sim::hvf_arm64::{MACOS_13, MACOS_15, complaints, live_vcpus, reset};
use vm_accel_sys::hvf::aarch64::HvfArm64Api;

const AT: u64 = RAM + 0x8_0000;
const VECTORS: u64 = AT + 0x1000;
/// Where IRQs of the same level go.
const IRQ: u64 = VECTORS + 0x280;

const ICC_IAR1: u16 = sys_reg(3, 0, 12, 12, 0);
const ICC_EOIR1: u16 = sys_reg(3, 0, 12, 12, 1);
const ICC_PMR: u16 = sys_reg(3, 0, 4, 6, 0);
const ICC_IGRPEN1: u16 = sys_reg(3, 0, 12, 12, 7);
const ICC_SGI1R: u16 = sys_reg(3, 0, 12, 11, 5);
const SGI: u32 = 1;

/// PL011 (Arm DDI 0183): data, control, interrupt mask.
const DATA: u64 = UART;
const CONTROL: u64 = UART + 0x30;
const MASK: u64 = UART + 0x38;
const RECEIVED: u32 = 1 << 4;

/// CPU 0 tells `A` and switches CPU 1 on, which sends it an interrupt (`S`); that starts the timer (`T`), and that the serial
/// port, which echoes until a `q`.
fn kernel() -> Vec<u8> {
    let mut a = Assembler::new(AT);
    let second = a.label();
    a.mov(0, VECTORS);
    a.msr(VBAR_EL1, 0);
    a.poke(CONTROL, 0x301);
    a.poke(DATA, b'A'.into());
    a.poke(Gic::DISTRIBUTOR, 0x12);
    a.poke(Gic::GICV3_REDISTRIBUTORS + 0x14, 0);
    a.poke(Gic::GICV3_REDISTRIBUTORS + 0x1_0080, u32::MAX);
    a.poke(Gic::GICV3_REDISTRIBUTORS + 0x1_0100, 1 << SGI | 1 << VIRTUAL_TIMER_INTID);
    a.poke(Gic::DISTRIBUTOR + 0x84, u32::MAX);
    a.poke(Gic::DISTRIBUTOR + 0x104, 1 << (UART_INTID - 32));
    a.poke64(Gic::DISTRIBUTOR + 0x6000 + 8 * u64::from(UART_INTID), affinity(0));
    a.mov(0, 0xff);
    a.msr(ICC_PMR, 0);
    a.mov(0, 1);
    a.msr(ICC_IGRPEN1, 0);
    a.mov(1, affinity(1));
    a.adr(2, second);
    a.psci(psci::CPU_ON);
    a.daif_clear(2);
    let wait = a.bound();
    a.wfi();
    a.b(wait);

    a.bind(second);
    a.mov(0, u64::from(SGI) << 24 | 1);
    a.msr(ICC_SGI1R, 0);
    a.isb();
    a.psci(psci::CPU_OFF);
    let mut code = a.finish();

    let mut a = Assembler::new(IRQ);
    let (timer, serial, end) = (a.label(), a.label(), a.label());
    a.mrs(10, ICC_IAR1);
    a.subs(11, 10, VIRTUAL_TIMER_INTID);
    a.cbz(11, timer);
    a.subs(11, 10, UART_INTID);
    a.cbz(11, serial);
    a.subs(11, 10, SGI);
    a.cbnz(11, end);
    a.poke(DATA, b'S'.into());
    a.mrs(0, CNTVCT_EL0);
    a.add(0, 0, 4095);
    a.msr(CNTV_CVAL_EL0, 0);
    a.mov(0, 1);
    a.msr(CNTV_CTL_EL0, 0);
    a.b(end);
    a.bind(timer);
    a.msr(CNTV_CTL_EL0, ZR);
    a.poke(DATA, b'T'.into());
    a.poke(MASK, RECEIVED);
    a.b(end);
    a.bind(serial);
    a.mov(12, DATA);
    a.load(4, 13, 12, Offset(0));
    a.store(4, 13, 12, Offset(0));
    a.subs(11, 13, b'q'.into());
    a.cbnz(11, end);
    a.psci(psci::SYSTEM_OFF);
    a.bind(end);
    a.msr(ICC_EOIR1, 10);
    a.eret();
    code.resize((IRQ - AT) as usize, 0);
    code.extend(a.finish());
    code
}

#[derive(Clone, Default)]
struct Sink(Arc<Mutex<Vec<u8>>>);

impl Write for Sink {
    fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
        self.0.lock().expect("nobody panics with it").extend_from_slice(data);
        Ok(data.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn machine(api: &'static HvfArm64Api, image: &[u8], sink: &Sink) -> Result<Machine, MachineError> {
    let accel = Box::new(AccelHvf::with_api(api).expect("available"));
    let config = MachineConfig { memory: 16 << 20, cpus: 2, ..MachineConfig::default() };
    let guest = Guest { kind: BootKind::Exactly(Protocol::Flat), flat_address: AT, ..Guest::new(image) };
    Machine::new(accel, &config, &guest, Box::new(sink.clone()))
}

/// One test: there is one virtual machine per process.
#[test]
fn the_board_runs_with_the_framework_s_gic_and_not_without() {
    reset();
    let (kernel, sink) = (kernel(), Sink::default());
    let error = machine(&MACOS_13, &kernel, &sink).expect_err("there is no GIC before macOS 15");
    assert!(error.to_string().contains("interrupt controller"), "{error}");
    for _ in 0..3 {
        let machine = machine(&MACOS_15, &kernel, &sink).expect("there is a GIC");
        assert_eq!(machine.serial_input().try_send(b"hq"), 2);
        // The limit is for a guest that hangs, and far beyond what it takes.
        assert_eq!(machine.run(Some(Duration::from_secs(60))), Outcome::Shutdown);
        let text = std::mem::take(&mut *sink.0.lock().expect("nobody panics with it"));
        assert_eq!(String::from_utf8_lossy(&text), "ASThq");
    }
    assert_eq!(live_vcpus(), None);
    assert_eq!(complaints(), [""; 0]);
}
