//! Files, sizes and backends that cannot be: each ends with one sentence and status 1 or 3.

use crate::support::{Folder, a_backend, backends, run};
use std::path::Path;

/// Runs a kernel file on a backend that could boot it.
fn boot(backend: &str, kernel: &Path, more: &[&str]) -> crate::support::Run {
    let kernel = kernel.to_str().unwrap();
    let mut args = vec!["run", kernel, "--accel", backend, "--timeout", "300"];
    args.extend_from_slice(more);
    run(args)
}

/// The header of a Linux bzImage whose file ends too early (Linux `Documentation/arch/x86/boot.rst`).
fn truncated_bzimage() -> Vec<u8> {
    let mut image = vec![0; 0x300];
    image[0x1f1] = 20; // setup_sects
    image[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    image[0x200..0x202].copy_from_slice(&[0xeb, 0x66]); // jump over the header
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x206..0x208].copy_from_slice(&0x20f_u16.to_le_bytes());
    image[0x211] = 1; // loaded high
    image
}

#[test]
fn a_file_that_is_no_kernel_is_named_with_what_is_wrong() {
    let Some(backend) = a_backend() else { return };
    let folder = Folder::new();
    for (name, bytes, words) in [
        ("empty", &b""[..], &["empty"][..]),
        ("photo.jpg", b"\xff\xd8\xff\xe0\0\x10JFIF\0", &["JPEG"]),
        ("notes.txt", b"remember the milk\n", &["text"]),
        ("vmlinuz", &truncated_bzimage(), &["truncated"]),
        ("vmlinux", b"\x7fELF\x02\x01\x01", &["truncated"]),
    ] {
        let path = folder.file(name, bytes);
        boot(&backend, &path, &[]).failed(1, words);
        boot(&backend, &path, &[]).failed(1, &["cannot boot", name]);
    }
}

#[test]
fn the_sentence_stands_alone_whichever_backend_is_chosen() {
    // The search for a backend may have something to say too, but not beside an error.
    let folder = Folder::new();
    let photo = folder.file("photo.jpg", b"\xff\xd8\xff");
    if a_backend().is_some() {
        boot("auto", &photo, &[]).failed(1, &["photo.jpg", "JPEG"]);
    }
}

#[test]
fn files_that_cannot_be_read_are_named() {
    let folder = Folder::new();
    let (missing, here) = (folder.path("nowhere"), folder.path(""));
    boot("auto", &missing, &[]).failed(1, &["kernel", "nowhere"]);
    boot("auto", &here, &[]).failed(1, &["kernel", here.to_str().unwrap()]);
    run(["run", "--initrd", missing.to_str().unwrap()]).failed(1, &["initrd", "nowhere"]);
    run(["run", "--initrd", here.to_str().unwrap()]).failed(1, &["initrd"]);
}

#[test]
fn an_initrd_larger_than_memory_is_refused() {
    let folder = Folder::new();
    let initrd = folder.file("initrd", &[0; (2 << 20) + 1]);
    let initrd = initrd.to_str().unwrap();
    run(["run", "--initrd", initrd, "--memory", "2M"]).failed(1, &["initrd", "2097152"]);
}

#[test]
fn machines_that_cannot_be_built_say_the_rule() {
    for backend in backends() {
        let accel = ["run", "--timeout", "300", "--accel", &backend.name];
        let with = |option, value| run(accel.into_iter().chain([option, value]));
        with("--memory", "1").failed(1, &["1 bytes", "2 MiB"]);
        with("--memory", "3000001").failed(1, &["multiple of 64 KiB"]);
        with("--memory", "9999999T").failed(1, &["at most"]);
        with("--cpus", "10000").failed(1, &["10000 CPUs", "from 1 to"]);
    }
}

#[test]
fn an_absent_backend_is_status_3_and_says_why() {
    let (absent, needs) = if cfg!(target_os = "macos") { ("kvm", "Linux") } else { ("hvf", "macOS") };
    let words = [absent, needs, "vm-accel info"];
    run(["run", "--accel", absent]).failed(3, &words);
    run(["run", "--accel", &format!("{absent},vz")]).failed(3, &[absent, "vz"]);
}

#[test]
fn a_kernel_for_another_architecture_finds_no_backend() {
    let folder = Folder::new();
    let mut image = [0; 64];
    image[0x38..0x3c].copy_from_slice(b"ARM\x64");
    let image = folder.file("Image", &image);
    // The software CPU has no aarch64 guests on any host.
    boot("soft", &image, &[]).failed(3, &["soft", "x86_64 guests"]);
}

#[test]
fn a_serial_file_that_cannot_be_made_is_an_error() {
    let folder = Folder::new();
    let file = folder.path("nowhere").join("log");
    let serial = format!("file={}", file.display());
    run(["run", "--serial", &serial]).failed(1, &["serial port", "nowhere"]);
}

#[test]
fn a_flat_binary_takes_no_command_line() {
    let Some(backend) = a_backend() else { return };
    let folder = Folder::new();
    let guest = folder.file("guest", crate::support::guests::SPIN);
    boot(&backend, &guest, &["--boot", "flat", "--cmdline", "quiet"]).failed(1, &["guest", "command line"]);
}
