//! `vm-accel run`: builds the machine, connects it to the console, runs it, and starts it again when the guest resets.

use crate::args::{RunArgs, Serial};
use crate::console::{self, Target};
use crate::files;
use crate::os::EndSignal;
use crate::select::{self, Choice, Needs};
use crate::status::Status;
use anyhow::{Context as _, Result};
use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::time::Instant;
use vm_accel::{Accel as _, GuestArch, PlatformBackend};
use vm_accel_machine::boot::{BootKind, Module};
use vm_accel_machine::{Guest, Machine, MachineConfig, MachineError, Outcome};

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
    let path = args.kernel.as_deref();
    let name = path
        .and_then(Path::file_name)
        .map_or("demo".into(), |name| name.to_string_lossy());
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
    // After what concerns files: a message about the backend would only hide what is wrong with them.
    let Choice {
        backend,
        mut warning,
    } = select::backend(
        &args.accel,
        match args.kernel {
            Some(_) => Needs::Ring0,
            None => Needs::Little,
        },
    )?;
    let arch = backend.capabilities().guest_arch;
    let guest = Guest {
        kind: args.boot,
        name: &name,
        cmdline: match &args.cmdline {
            Some(text) => text,
            None => default_cmdline(args.boot, &image, arch),
        },
        modules: &modules,
        flat_address: args.flat_address,
        ..Guest::new(&image)
    };
    let kind = backend.kind();
    let mut first = Some(backend);
    let mut terminal = None;
    let outcome = loop {
        // A guest that resets gets a new machine of the same kind.
        let backend = match first.take() {
            Some(backend) => backend,
            None => PlatformBackend::new(kind)?,
        };
        let machine = build(args, backend, &guest, serial_file.as_ref())?;
        target.set(machine.serial_input(), machine.control());
        if let Some(warning) = warning.take() {
            console::tell(format_args!("warning: {warning}"));
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
        console::tell(outcome);
    }
    Ok(status)
}

/// The command line of a kernel that the user gave none: its console is the serial port.
fn default_cmdline(kind: BootKind, image: &[u8], arch: GuestArch) -> &'static str {
    match kind.protocol(image, arch) {
        Ok(protocol) if protocol.takes_arguments(arch) => "console=ttyS0",
        // Building the machine will say what is wrong with the image.
        _ => "",
    }
}

/// A new machine with the guest in it.
fn build(
    args: &RunArgs,
    backend: PlatformBackend,
    guest: &Guest<'_>,
    serial_file: Option<&File>,
) -> Result<Machine> {
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
    Machine::new(Box::new(backend), &config, guest, serial).map_err(|error| match error {
        MachineError::Boot(error) => {
            anyhow::Error::new(error).context(format!("cannot boot {}", guest.name))
        }
        other => other.into(),
    })
}
