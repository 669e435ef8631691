//! Tests of the run loop, against a vCPU that plays a script and obeys the completion protocol.

use super::*;
use crate::bus::BusDevice;
use crate::script::{Script, Step};
use std::sync::{Arc, Mutex};

/// Remembers writes; reads count up.
#[derive(Default)]
struct Recorder {
    writes: Vec<(u64, Vec<u8>)>,
    next: u8,
}

impl BusDevice for Recorder {
    fn name(&self) -> &'static str {
        "recorder"
    }
    fn max_access(&self) -> usize {
        8
    }
    fn read(&mut self, _: u64, data: &mut [u8]) {
        self.next += 1;
        data.fill(self.next);
    }
    fn write(&mut self, offset: u64, data: &[u8]) {
        self.writes.push((offset, data.to_vec()));
    }
}

fn play(steps: Vec<Step>) -> (Script, Outcome, Vec<(u64, Vec<u8>)>) {
    let device = Arc::new(Mutex::new(Recorder::default()));
    let (mut ports, mut mmio) = (Bus::ports(), Bus::mmio());
    ports.register(0x10, 8, device.clone()).unwrap();
    mmio.register(0x1000, 0x100, device.clone()).unwrap();
    let control = Control::new();
    let mut script = Script::new(7, steps);
    run(&mut script, Wiring { ports: &ports, mmio: &mmio, chips: None }, &control);
    let writes = crate::bus::lock(&device).writes.clone();
    (script, control.outcome().unwrap(), writes)
}

fn io(port: u16, direction: IoDirection, size: u8) -> VcpuExit {
    VcpuExit::Io { port, direction, size }
}

fn mmio(addr: u64, size: u8, is_write: bool) -> VcpuExit {
    VcpuExit::Mmio { addr, size, is_write }
}

#[test]
fn accesses_reach_their_bus_and_reads_are_answered() {
    let (script, outcome, writes) = play(vec![
        Step::Write(io(0x10, IoDirection::Out, 2), vec![1, 2]),
        Step::Write(mmio(0x1008, 8, true), vec![1, 2, 3, 4, 5, 6, 7, 8]),
        Step::Read(io(0x10, IoDirection::In, 4), 4),
        Step::Read(mmio(0x1000, 2, false), 2),
        Step::Read(io(0x80, IoDirection::In, 2), 2),
        Step::Read(mmio(0x2000, 8, false), 8),
        Step::Exit(VcpuExit::Shutdown),
    ]);
    assert_eq!(outcome, Outcome::Shutdown);
    assert_eq!(writes, [(0, vec![1, 2]), (8, vec![1, 2, 3, 4, 5, 6, 7, 8])]);
    assert_eq!(script.answers, [vec![1; 4], vec![2; 2], vec![0xff; 2], vec![0xff; 8]]);
}

#[test]
fn string_instructions_go_element_by_element() {
    let (script, _, writes) = play(vec![
        Step::Write(io(0x10, IoDirection::Out, 2), vec![1, 2, 3, 4, 5, 6]),
        Step::Read(io(0x10, IoDirection::In, 1), 3),
        Step::Exit(VcpuExit::Shutdown),
    ]);
    assert_eq!(writes, [(0, vec![1, 2]), (0, vec![3, 4]), (0, vec![5, 6])]);
    assert_eq!(script.answers, [vec![1, 2, 3]]);
}

#[test]
fn mmio_of_an_odd_size_is_served() {
    let (script, _, writes) = play(vec![
        Step::Write(mmio(0x10fd, 5, true), vec![1, 2, 3, 4, 5]),
        Step::Read(mmio(0x10fd, 5, false), 5),
        Step::Exit(VcpuExit::Shutdown),
    ]);
    assert_eq!(writes, [(0xfd, vec![1]), (0xfe, vec![2, 3])]);
    assert_eq!(script.answers, [vec![1, 2, 2, 0xff, 0xff]]);
}

#[test]
fn every_end_has_its_outcome() {
    for (exit, outcome) in [
        (VcpuExit::Shutdown, Outcome::Shutdown),
        (VcpuExit::Reset, Outcome::Reset),
        (VcpuExit::TripleFault, Outcome::TripleFault { cpu: 7 }),
        (VcpuExit::Crash, Outcome::Crash { cpu: 7 }),
        (VcpuExit::Halted, Outcome::Failed(Failure::HaltedForever { cpu: 7 })),
    ] {
        assert_eq!(play(vec![Step::Exit(exit)]).1, outcome);
    }
}

#[test]
fn an_exit_without_an_answer_is_named_with_its_place() {
    for exit in [VcpuExit::Debug, VcpuExit::Unknown, VcpuExit::EndOfInterrupt { vector: 3 }] {
        let (_, outcome, _) = play(vec![Step::Exit(exit)]);
        let text = outcome.to_string();
        let name = format!("{exit:?}");
        assert!(text.contains("vCPU 7") && text.contains(&name[..5]) && text.contains("0x1234"), "{text}");
    }
}

#[test]
fn an_error_names_the_vcpu_and_what_it_was_doing() {
    let error = AccelError::Host { op: "KVM_RUN", message: "bad address".to_owned(), code: Some(14) };
    let (_, outcome, _) = play(vec![Step::Error(error.clone())]);
    assert_eq!(outcome, Outcome::Failed(Failure::Vcpu { cpu: 7, during: "run".to_owned(), source: error }));
    // A write exit whose data the backend does not have.
    let (_, outcome, _) = play(vec![Step::Exit(io(0x3f8, IoDirection::Out, 1))]);
    let text = outcome.to_string();
    assert!(text.contains("vCPU 7") && text.contains("3f8") && text.contains("0x1234"), "{text}");
}

#[test]
fn hypercalls_fail_and_msrs_fault() {
    let (script, _, _) = play(vec![
        Step::Exit(VcpuExit::SystemCall),
        Step::Msr(VcpuExit::Msr { index: 0x1b0, is_write: false }),
        Step::Exit(VcpuExit::Shutdown),
    ]);
    assert_eq!(script.regs.gpr[0], NO_SUCH_HYPERCALL);
    assert_eq!(script.refused, 1);
}

#[test]
fn kicks_do_not_end_it_and_a_device_does_at_once() {
    let control = Control::new();
    let mut ports = Bus::ports();
    let port = crate::devices::exit_port::ExitPort::new(control.clone());
    ports.register(0xf4, 4, Arc::new(Mutex::new(port))).unwrap();
    let mut script = Script::new(
        0,
        vec![
            Step::Exit(VcpuExit::Interrupt),
            Step::Exit(VcpuExit::InterruptWindow),
            Step::Write(io(0xf4, IoDirection::Out, 4), vec![9, 0, 0, 0]),
            Step::Exit(VcpuExit::TripleFault),
        ],
    );
    run(&mut script, Wiring { ports: &ports, mmio: &Bus::mmio(), chips: None }, &control);
    assert_eq!(control.outcome(), Some(Outcome::ExitPort(9)));
    assert_eq!(script.left(), 1, "the guest did not run on");
}
