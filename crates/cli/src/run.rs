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
use vm_accel_machine::boot::{BootKind, DEFAULT_FLAT_ADDRESS, Module};
use vm_accel_machine::{Guest, Machine, MachineConfig, MachineError, Outcome, virt};

/// No kernel file is larger; it bounds what is read of an endless one.
const LARGEST_FILE: u64 = 4 << 30;

pub(crate) fn run(args: &RunArgs) -> Result<Status> {
    let most = args.memory.0.min(LARGEST_FILE);
    let image = match &args.kernel {
        Some(path) => files::read("kernel", path, most)?,
        None => vm_accel_guests::demo(),
    };
    let initrd = args.initrd.as_deref().map(|path| files::read("initrd", path, most)).transpose()?;
    let modules: Vec<Module<'_>> = initrd.iter().map(|data| Module { data, cmdline: "" }).collect();
    let path = args.kernel.as_deref();
    let name = path.and_then(Path::file_name).map_or("demo".into(), |name| name.to_string_lossy());
    let target = Target::default();
    let signal = EndSignal::listen(&target)?;
    let end = args.timeout.map(|limit| (Instant::now(), limit));
    let serial_file = match &args.serial {
        Serial::File(path) => {
            let file = File::create(path);
            Some(file.with_context(|| format!("cannot create the serial port's file {}", path.display()))?)
        }
        Serial::Stdio | Serial::Null => None,
    };
    // After what concerns files: a message about the backend would only hide what is wrong with them.
    let Choice { backend, mut warning } =
        select::backend(&args.accel, &Needs { ring0: args.kernel.is_some(), archs: architectures(args.boot, &image) })?;
    let arch = backend.capabilities().guest_arch;
    let guest = Guest {
        kind: args.boot,
        name: &name,
        cmdline: match &args.cmdline {
            Some(text) => text,
            None => default_cmdline(args.boot, &image, arch),
        },
        modules: &modules,
        flat_address: args.flat_address.unwrap_or(match arch {
            GuestArch::X86_64 => DEFAULT_FLAT_ADDRESS,
            GuestArch::Aarch64 => virt::RAM,
        }),
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

/// The architectures on which the image can be booted; all of them for one that is wrong everywhere, so that building the
/// machine says what is wrong with it.
fn architectures(kind: BootKind, image: &[u8]) -> Vec<GuestArch> {
    let all = [GuestArch::X86_64, GuestArch::Aarch64];
    let mut fit = all.to_vec();
    fit.retain(|&arch| {
        let protocol = kind.protocol(image, arch);
        protocol.is_ok_and(|protocol| protocol.is_for(arch))
    });
    if fit.is_empty() { all.to_vec() } else { fit }
}

/// The command line of a kernel that the user gave none: its console is the board's serial port.
fn default_cmdline(kind: BootKind, image: &[u8], arch: GuestArch) -> &'static str {
    match (kind.protocol(image, arch), arch) {
        (Ok(protocol), _) if !protocol.takes_arguments(arch) => "",
        (_, GuestArch::X86_64) => "console=ttyS0",
        (_, GuestArch::Aarch64) => "console=ttyAMA0",
    }
}

/// A new machine with the guest in it.
fn build(args: &RunArgs, backend: PlatformBackend, guest: &Guest<'_>, serial_file: Option<&File>) -> Result<Machine> {
    let config = MachineConfig {
        memory: args.memory.0,
        cpus: args.cpus,
        masked: args.cpu.unwrap_or_default(),
        ..MachineConfig::default()
    };
    let serial: Box<dyn Write + Send> = match (&args.serial, serial_file) {
        (Serial::Stdio, _) => Box::new(console::Stdout),
        (_, Some(file)) => Box::new(file.try_clone().context("cannot share the serial port's file")?),
        (_, None) => Box::new(io::sink()),
    };
    Machine::new(Box::new(backend), &config, guest, serial).map_err(|error| match error {
        MachineError::Boot(error) => anyhow::Error::new(error).context(format!("cannot boot {}", guest.name)),
        other => other.into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_chooses_its_architecture() {
        let (x86, arm) = (GuestArch::X86_64, GuestArch::Aarch64);
        assert_eq!(architectures(BootKind::Auto, &vm_accel_guests::demo()), [x86]);
        let mut image = [0; 64];
        image[0x38..0x3c].copy_from_slice(b"ARM\x64");
        assert_eq!(architectures(BootKind::Auto, &image), [arm]);
        let flat = BootKind::Exactly(vm_accel_machine::boot::Protocol::Flat);
        assert_eq!(architectures(flat, &[0]), [x86, arm]);
        assert_eq!(architectures(BootKind::Auto, b"text"), [x86, arm]);
    }

    #[test]
    fn a_kernels_console_is_the_boards() {
        let demo = vm_accel_guests::demo();
        let cmdline = default_cmdline(BootKind::Auto, &demo, GuestArch::X86_64);
        assert_eq!(cmdline, "console=ttyS0");
        let flat = BootKind::Exactly(vm_accel_machine::boot::Protocol::Flat);
        assert_eq!(default_cmdline(flat, &[0], GuestArch::X86_64), "");
        let cmdline = default_cmdline(flat, &[0], GuestArch::Aarch64);
        assert_eq!(cmdline, "console=ttyAMA0");
    }
}
