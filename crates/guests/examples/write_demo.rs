//! Writes the demo guest to a file, for booting it elsewhere: `qemu-system-x86_64 -kernel FILE` takes it too.

use std::process::ExitCode;

fn main() -> ExitCode {
    let Some(path) = std::env::args_os().nth(1) else {
        eprintln!("Usage: write_demo FILE");
        return ExitCode::from(2);
    };
    match std::fs::write(&path, vm_accel_guests::demo()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cannot write {}: {error}", path.display());
            ExitCode::FAILURE
        }
    }
}
