//! Guests that run: how they end is the command's status.

use crate::support::{Folder, backends, command, finish, flat, guests, run};
use std::io::{Read as _, Write as _};
use std::process::Stdio;

#[test]
fn the_demo_reports_and_ends_with_0() {
    for backend in backends() {
        let demo = run(["run", "--accel", &backend.name, "--timeout", "300"]);
        demo.ended_with(0);
        for words in ["Hello from", "CPU vendor:", "Memory map:", "Exits:", "Done."] {
            assert!(demo.stdout.contains(words), "{words:?}: {demo:#?}");
        }
        assert_eq!(demo.stderr, "", "{}", backend.name);
    }
}

#[test]
fn the_default_is_the_demo_on_whatever_there_is() {
    if backends().is_empty() {
        return;
    }
    let demo = run(["run", "--timeout", "300"]);
    demo.ended_with(0);
    assert!(demo.stdout.contains("Done."), "{demo:#?}");
    // The software CPU is never chosen silently.
    assert_eq!(demo.warnings(), usize::from(backends().len() == 1), "{demo:#?}");
}

#[test]
fn two_at_once_do_not_disturb_each_other() {
    for backend in backends() {
        let args = ["run", "--accel", &backend.name, "--timeout", "300"];
        let spawn = || {
            let mut command = command(args);
            command.stdout(Stdio::piped()).stderr(Stdio::piped());
            command.spawn().unwrap()
        };
        for run in [spawn(), spawn()].map(finish) {
            run.ended_with(0);
            assert!(run.stdout.contains("Done."), "{run:#?}");
        }
    }
}

#[test]
fn several_cpus_run_the_demo() {
    for backend in backends() {
        let args = ["run", "--accel", &backend.name, "--timeout", "300", "--cpus", "3"];
        run(args).ended_with(0);
    }
}

#[test]
fn the_exit_ports_value_is_the_status() {
    let folder = Folder::new();
    for backend in backends() {
        for value in [0, 42, 255] {
            let guest = folder.file("exit", &guests::exit(value));
            let run = run(flat(&backend.name, &guest, &[]));
            run.ended_with(value.into());
            assert_eq!(run.stdout, "");
        }
    }
}

#[test]
fn a_guest_that_spins_meets_its_time_limit() {
    let folder = Folder::new();
    let guest = folder.file("spin", guests::SPIN);
    for backend in backends() {
        let run = run(flat(&backend.name, &guest, &["--timeout", "0.2"]));
        run.ended_with(124);
        assert!(run.stderr.contains("time limit"), "{run:#?}");
    }
}

#[test]
fn a_triple_fault_is_33() {
    let folder = Folder::new();
    let guest = folder.file("fault", guests::TRIPLE_FAULT);
    for backend in backends() {
        if backend.emulates_ring0 {
            println!("skipped: {}: it has no LIDT", backend.name);
            continue;
        }
        let run = run(flat(&backend.name, &guest, &[]));
        run.failed(33, &["triple fault", "vCPU 0"]);
    }
}

#[test]
fn a_reset_without_reboot_is_32() {
    let folder = Folder::new();
    let guest = folder.file("reset", guests::PRINT_AND_RESET);
    for backend in backends() {
        let run = run(flat(&backend.name, &guest, &["--no-reboot"]));
        run.ended_with(32);
        assert_eq!(run.stdout, "!");
        assert!(run.stderr.contains("reset"), "{run:#?}");
    }
}

#[test]
fn a_reset_starts_the_guest_again_and_warns_once() {
    let folder = Folder::new();
    let guest = folder.file("reset", guests::PRINT_AND_RESET);
    for backend in backends() {
        let mut child =
            command(flat(&backend.name, &guest, &[])).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut starts = [0; 3];
        child.stdout.as_mut().unwrap().read_exact(&mut starts).unwrap();
        assert_eq!(&starts, b"!!!");
        child.kill().unwrap();
        let run = finish(child);
        assert_eq!(run.warnings(), usize::from(backend.emulates_ring0), "{run:#?}");
    }
}

#[test]
fn what_comes_through_a_pipe_reaches_the_guest() {
    let folder = Folder::new();
    let guest = folder.file("echo", guests::ECHO);
    for backend in backends() {
        let mut child = command(flat(&backend.name, &guest, &[]))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // On a pipe nothing is a command, Ctrl-A x neither.
        let input = b"more than sixteen bytes \x01x, so that the FIFO fills: q";
        child.stdin.take().unwrap().write_all(input).unwrap();
        let run = finish(child);
        run.ended_with(i32::from(b'q'));
        assert_eq!(run.stdout.as_bytes(), input);
    }
}

#[test]
fn the_serial_port_can_lead_to_a_file_or_nowhere() {
    let folder = Folder::new();
    let guest = folder.file("reset", guests::PRINT_AND_RESET);
    for backend in backends() {
        let log = folder.path("log");
        let serial = format!("file={}", log.display());
        let to_file = run(flat(&backend.name, &guest, &["--no-reboot", "--serial", &serial]));
        to_file.ended_with(32);
        assert_eq!(to_file.stdout, "");
        assert_eq!(std::fs::read(&log).unwrap(), b"!");

        let nowhere = run(flat(&backend.name, &guest, &["--no-reboot", "--serial", "null"]));
        nowhere.ended_with(32);
        assert_eq!(nowhere.stdout, "");
    }
}

#[test]
fn output_that_nobody_takes_ends_the_machine() {
    let folder = Folder::new();
    let guest = folder.file("flood", guests::FLOOD);
    for backend in backends() {
        let mut child =
            command(flat(&backend.name, &guest, &[])).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let run = finish(child);
        run.ended_with(1);
        assert!(run.stderr.contains("cannot write the guest's output"), "{run:#?}");
    }
}
