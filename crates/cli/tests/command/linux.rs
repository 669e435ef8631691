//! Special files and permissions, as Linux has them.

use crate::support::{Run, command, run};
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};

/// A device that is always full.
#[test]
fn a_full_disk_is_an_error() {
    let full = || std::fs::File::create("/dev/full").unwrap();
    let demo = run(["run", "--timeout", "300", "--serial", "file=/dev/full"]);
    demo.ended_with(1);
    assert!(demo.stderr.contains("No space left"), "{demo:#?}");

    let output = command(["info"]).stdout(full()).output().unwrap();
    Run::from(output).failed(1, &["No space left"]);

    // Where errors cannot be told, the status still tells.
    let status = command(["run", "/nowhere"]).stderr(full()).status().unwrap();
    assert_eq!(status.code(), Some(1));
}

#[test]
fn an_endless_file_is_not_read_for_ever() {
    let kernel = run(["run", "/dev/zero", "--memory", "2M"]);
    kernel.failed(1, &["/dev/zero", "more than 2097152 bytes"]);
}

/// As a user who may not open `/dev/kvm`.
#[test]
fn a_user_without_permission_is_told_so() {
    const NOBODY: u32 = 65534;
    let as_nobody = |args: &[&str]| {
        // This drops root's supplementary groups too.
        command(args).uid(NOBODY).gid(NOBODY).output().map(Run::from)
    };
    let mode = std::fs::metadata("/dev/kvm").map(|meta| {
        use std::os::unix::fs::MetadataExt as _;
        meta.mode()
    });
    match mode {
        Ok(mode) if mode & 0o006 == 0 => {}
        Ok(_) => return println!("skipped: everybody may open /dev/kvm"),
        Err(error) => return println!("skipped: /dev/kvm: {error}"),
    }
    let kvm = match as_nobody(&["run", "--accel", "kvm"]) {
        Ok(run) => run,
        Err(error) => return println!("skipped: cannot run as another user: {error}"),
    };
    kvm.failed(3, &["/dev/kvm", "permission denied"]);
    // A fallback is said in one line.
    let soft = as_nobody(&["run", "--accel", "kvm,soft", "--timeout", "300"]).unwrap();
    soft.ended_with(0);
    assert_eq!((soft.warnings(), soft.stderr.lines().count()), (1, 1), "{soft:#?}");
    assert!(soft.stderr.contains("permission denied"), "{soft:#?}");
}

/// Where there is no `/dev/kvm`: an empty `/dev` in a mount namespace of our own, which only root can make.
#[test]
fn a_host_without_kvm_is_told_so() {
    let without = |args: &[&str]| -> Run {
        let script = r#"mount -t tmpfs none /dev || exit 99; exec "$0" "$@""#;
        Command::new("unshare")
            .args(["-m", "sh", "-c", script, env!("CARGO_BIN_EXE_vm-accel")])
            .args(args)
            .stdin(Stdio::null())
            .output()
            .map_or_else(|error| Run { status: None, stdout: String::new(), stderr: error.to_string() }, Run::from)
    };
    let kvm = without(&["run", "--accel", "kvm"]);
    if kvm.status != Some(3) && !kvm.stderr.starts_with("vm-accel:") {
        return println!("skipped: no mount namespace: {}", kvm.stderr.trim());
    }
    kvm.failed(3, &["/dev/kvm does not exist", "modprobe"]);
    let any = without(&["run", "--timeout", "300"]);
    any.ended_with(0);
    assert_eq!(any.warnings(), 1, "{any:#?}");
}
