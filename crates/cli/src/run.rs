//! `vm-accel run`: builds the machine, connects it to the console, runs it, and starts it again when the guest resets.

use crate::args::{RunArgs, Serial};
use crate::console::{self, Target};
use crate::files;
use crate::os::EndSignal;
use crate::select::{self, Needs};
use crate::status::Status;
use anyhow::{Context as _, Result};
use std::fs::File;
use std::io::{self, Write};
use std::time::Instant;
use vm_accel_machine::boot::Module;
use vm_accel_machine::{Guest, Machine, MachineConfig, Outcome};

/// No kernel file is larger; it bounds what is read of an endless one.
const LARGEST_FILE: u64 = 4 << 30;

pub(crate) fn run(args: &RunArgs) -> Result<Status> {
    let most = args.memory.0.min(LARGEST_FILE);
    let image = match &args.kernel {
        Some(path) => files::read("kernel", path, most)?,
        None => vm_accel_guests::demo(),
    };
    let initrd = args
        .initrd
        .as_deref()
        .map(|path| files::read("initrd", path, most))
        .transpose()?;
    let modules: Vec<Module<'_>> = initrd
        .iter()
        .map(|data| Module { data, cmdline: "" })
        .collect();
    let name = args
        .kernel
        .as_ref()
        .map_or("demo".into(), |path| path.to_string_lossy());
    let guest = Guest {
        kind: args.boot,
        name: &name,
        cmdline: &args.cmdline,
        modules: &modules,
        flat_address: args.flat_address,
        ..Guest::new(&image)
    };

    let target = Target::default();
    let signal = EndSignal::listen(&target)?;
    let end = args.timeout.map(|limit| (Instant::now(), limit));
    let serial_file = match &args.serial {
        Serial::File(path) => {
            let file = File::create(path);
            Some(file.with_context(|| {
                format!("cannot create the serial port's file {}", path.display())
            })?)
        }
        Serial::Stdio | Serial::Null => None,
    };
    let mut terminal = None;
    let outcome = loop {
        let machine = build(args, &guest, serial_file.as_ref())?;
        target.set(machine.serial_input(), machine.control());
        if signal.number().is_some() {
            // It came before there was a machine to stop.
            target.stop();
        }
        if terminal.is_none() && args.serial == Serial::Stdio {
            // After everything that fails early, so that its message meets an ordinary terminal.
            terminal = Some(console::start(&target)?);
        }
        let limit = end.map(|(start, limit)| limit.saturating_sub(start.elapsed()));
        match machine.run(limit) {
            Outcome::Reset if !args.no_reboot => {}
            outcome => break outcome,
        }
    };
    drop(terminal);
    if let Some(number) = signal.number() {
        return Ok(Status::Signal(number));
    }
    let status = Status::of_outcome(&outcome);
    if !matches!(outcome, Outcome::Shutdown | Outcome::ExitPort(_)) {
        eprintln!("vm-accel: {outcome}");
    }
    Ok(status)
}

/// A new machine with the guest in it.
fn build(args: &RunArgs, guest: &Guest<'_>, serial_file: Option<&File>) -> Result<Machine> {
    let needs = if args.kernel.is_some() {
        Needs::Ring0
    } else {
        Needs::Little
    };
    let config = MachineConfig {
        memory: args.memory.0,
        cpus: args.cpus,
        ..MachineConfig::default()
    };
    let serial: Box<dyn Write + Send> = match (&args.serial, serial_file) {
        (Serial::Stdio, _) => Box::new(console::Stdout),
        (_, Some(file)) => Box::new(
            file.try_clone()
                .context("cannot share the serial port's file")?,
        ),
        (_, None) => Box::new(io::sink()),
    };
    let backend = select::backend(&args.accel, needs)?;
    Ok(Machine::new(Box::new(backend), &config, guest, serial)?)
}
