//! Tests of the machine's threads with scripted vCPUs: every end joins every thread.

use super::*;
use crate::script::{Script, Step};
use std::sync::atomic::{AtomicUsize, Ordering};
use vm_accel::{IoDirection, VcpuExit};

/// Runs scripts as the vCPUs of a machine.
fn run_scripts(
    scripts: Vec<Vec<Step>>,
    control: &Control,
    limit: Option<Duration>,
    set_up: impl Fn(&mut dyn VcpuOps, u32) -> Result<(), AccelError> + Sync,
) -> Outcome {
    let ram = RamLayout::new(64 << 20, 0).unwrap();
    let map = ram.map().unwrap();
    let board = Board::new(ram, &map, 1, Interrupts::None, Box::new(std::io::sink()), control).unwrap();
    let vcpus = (0..).zip(scripts).map(|(id, steps)| Box::new(Script::new(id, steps)) as Box<dyn VcpuOps>).collect();
    run_vcpus(vcpus, &AnyBoard::Pc(board), control, limit, set_up)
}

fn out(port: u16, value: u8) -> Step {
    Step::Write(VcpuExit::Io { port, direction: IoDirection::Out, size: 1 }, vec![value])
}

#[test]
fn one_vcpu_ends_the_machine_for_all() {
    for (step, outcome) in [
        (out(0xf4, 5), Outcome::ExitPort(5)),
        (out(0x64, 0xfe), Outcome::Reset),
        (out(0x605, 0x20), Outcome::Shutdown),
        (Step::Exit(VcpuExit::TripleFault), Outcome::TripleFault { cpu: 2 }),
    ] {
        let scripts = vec![vec![], vec![], vec![step], vec![]];
        assert_eq!(run_scripts(scripts, &Control::new(), None, |_, _| Ok(())), outcome);
    }
}

#[test]
fn a_guest_that_does_nothing_meets_its_limit() {
    let scripts = vec![vec![], vec![]];
    let limit = Some(Duration::from_millis(1));
    assert_eq!(run_scripts(scripts, &Control::new(), limit, |_, _| Ok(())), Outcome::Timeout);
}

#[test]
fn the_host_stops_it_before_and_while_it_runs() {
    let control = Control::new();
    control.finish(Outcome::Stopped);
    let scripts = vec![vec![out(0xf4, 1)]];
    assert_eq!(run_scripts(scripts, &control, None, |_, _| Ok(())), Outcome::Stopped);
    let control = Control::new();
    let stopper = thread::spawn({
        let control = control.clone();
        move || control.finish(Outcome::Stopped)
    });
    assert_eq!(run_scripts(vec![vec![], vec![]], &control, None, |_, _| Ok(())), Outcome::Stopped);
    assert!(stopper.join().unwrap());
}

#[test]
fn no_vcpu_runs_before_all_are_set_up() {
    const CPUS: usize = 8;
    let ready = AtomicUsize::new(0);
    let scripts = (0..CPUS).map(|cpu| if cpu == 0 { vec![out(0xf4, 1)] } else { vec![] }).collect();
    let control = Control::new();
    let outcome = run_scripts(scripts, &control, None, |vcpu, cpus| {
        assert_eq!(cpus as usize, CPUS);
        if vcpu.get_id() != 0 {
            thread::yield_now();
        }
        assert_eq!(control.outcome(), None);
        ready.fetch_add(1, Ordering::SeqCst);
        Ok(())
    });
    assert_eq!((outcome, ready.load(Ordering::SeqCst)), (Outcome::ExitPort(1), CPUS));
}

#[test]
fn a_vcpu_that_cannot_be_set_up_ends_it() {
    let outcome = run_scripts(vec![vec![], vec![], vec![]], &Control::new(), None, |vcpu, _| match vcpu.get_id() {
        1 => Err(vcpu.unsupported("CPUID")),
        _ => Ok(()),
    });
    let text = outcome.to_string();
    assert!(text.contains("vCPU 1") && text.contains("setting it up") && text.contains("CPUID"), "{text}");
}

#[test]
fn a_panic_ends_it_in_order_wherever_it_comes() {
    let outcome = run_scripts(vec![vec![], vec![Step::Panic("bug")]], &Control::new(), None, |_, _| Ok(()));
    assert_eq!(outcome, Outcome::Failed(Failure::Panicked { thread: "vcpu1".to_owned(), message: "bug".to_owned() }));
    let outcome = run_scripts(vec![vec![], vec![]], &Control::new(), None, |vcpu, _| {
        assert_ne!(vcpu.get_id(), 0, "early");
        Ok(())
    });
    assert!(
        matches!(&outcome, Outcome::Failed(Failure::Panicked { thread, message }) if thread == "vcpu0" && message.contains("early"))
    );
}

#[test]
fn threads_come_and_go_many_times() {
    for n in 0..200u32 {
        let last = vec![out(0xf4, n as u8)];
        let scripts = vec![vec![], last.clone(), last];
        assert_eq!(run_scripts(scripts, &Control::new(), None, |_, _| Ok(())), Outcome::ExitPort(n & 0xff));
    }
}
