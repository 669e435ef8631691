//! The Linux calls of a process 1 that std does not have.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::fd::AsRawFd as _;

/// How the machine ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Power off, by what the machine offers for it (ACPI, PSCI).
    PowerOff,
    /// Reset.
    Reset,
    /// Leave init running with nothing to do.
    Idle,
}

/// Mounts what programs expect: `/proc`, `/sys`, `/dev` and a `/tmp` in memory.
pub fn mount_all() {
    for (kind, at) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev"), ("tmpfs", "/tmp")] {
        if let Err(error) = mount(kind, at) {
            println!("init: cannot mount {at}: {error}");
        }
    }
}

fn mount(kind: &str, at: &str) -> io::Result<()> {
    fs::create_dir_all(at)?;
    let (kind, at) = (CString::new(kind)?, CString::new(at)?);
    // SAFETY: three strings that end with NUL and outlive the call; no file system here takes data.
    let result = unsafe { libc::mount(kind.as_ptr(), at.as_ptr(), kind.as_ptr(), 0, std::ptr::null()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Loads the kernel module in the file `path`.
///
/// # Errors
/// What the file system or the kernel answers.
pub fn load_module(path: &str) -> io::Result<()> {
    let file = File::open(path)?;
    // SAFETY: an open descriptor, a string that ends with NUL, no flags. The kernel checks the module.
    let result = unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Ends the machine once everything written is out; a machine that cannot end stays idle.
pub fn end(how: End) -> ! {
    let _ = io::stdout().flush();
    // SAFETY: no memory is involved; descriptor 1 is only waited for.
    unsafe {
        libc::tcdrain(1);
        libc::sync();
    }
    let command = match how {
        End::PowerOff => Some(libc::LINUX_REBOOT_CMD_POWER_OFF),
        End::Reset => Some(libc::LINUX_REBOOT_CMD_RESTART),
        End::Idle => None,
    };
    if let Some(command) = command {
        // SAFETY: takes a number, and comes back only if it failed.
        let result = unsafe { libc::reboot(command) };
        println!("init: reboot answered {result}: {}", io::Error::last_os_error());
    }
    loop {
        std::thread::park();
    }
}
