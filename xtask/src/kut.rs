//! `cargo xtask kut`: kvm-unit-tests on `vm-accel run`, the software CPU by default.
//!
//! The tests are another project's and are built elsewhere (`./configure && make` in a checkout of kvm-unit-tests); this
//! takes the folder of `.flat` files. A test ends through the exit port: 0 is success, 38 means that everything was
//! skipped (77 shifted, as the project's `lib/x86/io.c` writes it).

use crate::arch::X86;
use crate::{Usage, boot};
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

pub(crate) const COMMAND: crate::Command = crate::Command {
    name: "kut",
    summary: "run kvm-unit-tests from a folder of .flat files",
    usage: "\
Usage: cargo xtask kut FOLDER [--accel LIST] [TEST…]

Runs the x86 tests of kvm-unit-tests that the software CPU must pass (or those named) and prints a line for each.
FOLDER holds *.flat: the folder x86/ of a built checkout.",
    run,
};

/// A test: name, file, CPUs, arguments, seconds.
struct Test {
    name: &'static str,
    file: &'static str,
    cpus: u32,
    arguments: &'static str,
    limit: u32,
    /// The test's environment module: `TEST_DEVICE=0` switches off parts that belong to KVM (paravirtual IPIs) or to
    /// AMD's form of SYSCALL, which the tests try without looking at CPUID if they find the test device.
    environment: &'static str,
    /// CPUID features that the test must not see, as `--cpu` takes them.
    masked: &'static str,
}

const fn test(name: &'static str, file: &'static str, cpus: u32, arguments: &'static str) -> Test {
    Test { name, file, cpus, arguments, limit: 120, environment: "", masked: "" }
}

const fn without_device(name: &'static str, file: &'static str, cpus: u32) -> Test {
    Test { environment: "TEST_DEVICE=0\n", ..test(name, file, cpus, "") }
}

const fn long(name: &'static str, file: &'static str) -> Test {
    Test { limit: 900, ..test(name, file, 1, "") }
}

const TESTS: &[Test] = &[
    test("eventinj", "eventinj", 1, ""),
    test("memory", "memory", 1, ""),
    test("realmode", "realmode", 1, ""),
    test("setjmp", "setjmp", 1, ""),
    long("sieve", "sieve"),
    test("smap", "smap", 1, ""),
    test("smptest", "smptest", 2, ""),
    test("smptest3", "smptest", 3, ""),
    without_device("syscall", "syscall", 1),
    test("tsc", "tsc", 1, ""),
    test("tsc_adjust", "tsc_adjust", 1, ""),
    test("umip", "umip", 1, ""),
    test("xsave", "xsave", 1, ""),
    test("rmap_chain", "rmap_chain", 1, ""),
    test("rdpru", "rdpru", 1, ""),
    test("ioapic", "ioapic", 4, ""),
    without_device("x2apic", "apic", 2),
    Test { masked: "-x2apic", ..without_device("xapic", "apic", 2) },
    test("emulator", "emulator", 1, ""),
    test("idt_test", "idt_test", 1, ""),
    test("msr", "msr", 1, ""),
    test("hypercall", "hypercall", 1, ""),
    long("access", "access_test"),
    test("debug", "debug", 1, ""),
    test("tscdeadline_latency", "tscdeadline_latency", 1, ""),
    test("vmexit_cpuid", "vmexit", 1, "cpuid"),
    test("vmexit_vmcall", "vmexit", 1, "vmcall"),
    test("vmexit_mov_from_cr8", "vmexit", 1, "mov_from_cr8"),
    test("vmexit_mov_to_cr8", "vmexit", 1, "mov_to_cr8"),
    test("vmexit_inl_pmtimer", "vmexit", 1, "inl_from_pmtimer"),
    test("vmexit_ipi", "vmexit", 2, "ipi"),
    test("vmexit_ipi_halt", "vmexit", 2, "ipi_halt"),
    test("vmexit_ple_round_robin", "vmexit", 1, "ple_round_robin"),
    test("vmexit_tscdeadline", "vmexit", 1, "tscdeadline"),
    test("vmexit_tscdeadline_immed", "vmexit", 1, "tscdeadline_immed"),
    test("vmexit_cr0_wp", "vmexit", 2, "toggle_cr0_wp"),
    test("vmexit_cr4_pge", "vmexit", 2, "toggle_cr4_pge"),
    test("pku", "pku", 1, ""),
    test("pks", "pks", 1, ""),
];

/// The status of a test that skipped everything.
const SKIPPED: i32 = 38;

fn run(args: &[String]) -> Result<u8> {
    let mut accel = "soft".to_owned();
    let mut names = Vec::new();
    let mut folder: Option<PathBuf> = None;
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--accel" => {
                accel = args.next().ok_or_else(|| Usage::error("--accel needs a value"))?.clone();
            }
            flag if flag.starts_with('-') => {
                return Err(Usage::error(format!("no option '{flag}'")));
            }
            _ if folder.is_none() => folder = Some(arg.into()),
            name => names.push(name),
        }
    }
    let folder = folder.ok_or_else(|| Usage::error("which folder?"))?;
    if let Some(unknown) = names.iter().find(|n| TESTS.iter().all(|t| t.name != **n)) {
        return Err(Usage::error(format!("no test '{unknown}'")));
    }
    let arch = &X86;
    let program = boot::vm_accel(arch)?;
    let environment = std::env::temp_dir().join(format!("vm-accel-kut-{}", std::process::id()));
    let (mut passed, mut failed, mut skipped) = (0, 0, 0);
    for test in TESTS {
        if !names.is_empty() && !names.contains(&test.name) {
            continue;
        }
        match one(&program, &folder, &environment, &accel, test)? {
            Verdict::Passed => passed += 1,
            Verdict::Skipped => skipped += 1,
            Verdict::Failed => failed += 1,
        }
    }
    // It exists only if a test needed it.
    let _ = std::fs::remove_file(&environment);
    println!("{passed} passed, {failed} failed, {skipped} skipped");
    if failed != 0 {
        bail!("{failed} of kvm-unit-tests failed");
    }
    Ok(0)
}

enum Verdict {
    Passed,
    Skipped,
    Failed,
}

fn one(program: &Path, folder: &Path, environment: &Path, accel: &str, test: &Test) -> Result<Verdict> {
    let began = Instant::now();
    let mut command = Command::new(program);
    command
        .arg("run")
        .arg(folder.join(test.file).with_extension("flat"))
        .args(["--accel", accel, "--boot", "multiboot"])
        .args(["--cpus", &test.cpus.to_string()])
        .args(["--timeout", &test.limit.to_string()])
        .args(["--cmdline", test.arguments])
        .stdin(Stdio::null());
    if !test.environment.is_empty() {
        std::fs::write(environment, test.environment).context("cannot write the environment module")?;
        command.arg("--initrd").arg(environment);
    }
    if !test.masked.is_empty() {
        command.args(["--cpu", test.masked]);
    }
    let output = command.output().context("cannot start vm-accel")?;
    let text = String::from_utf8_lossy(&output.stdout);
    let failures: Vec<&str> = text.lines().filter(|line| line.starts_with("FAIL")).collect();
    let summary = text.lines().rfind(|line| line.starts_with("SUMMARY")).unwrap_or("");
    let verdict = match output.status.code() {
        Some(0) if failures.is_empty() => Verdict::Passed,
        Some(SKIPPED) if failures.is_empty() => Verdict::Skipped,
        _ => Verdict::Failed,
    };
    let word = match verdict {
        Verdict::Passed => "PASS",
        Verdict::Skipped => "SKIP",
        Verdict::Failed => "FAIL",
    };
    println!("{word} {:<26} {:6.1} s  {summary}", test.name, began.elapsed().as_secs_f64());
    if matches!(verdict, Verdict::Failed) {
        println!("     {}", output.status);
        for line in failures {
            println!("     {line}");
        }
        print!("{}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(verdict)
}
