//! Help, version, the probe, and arguments that make no sense.

use crate::support::{backends, info, run};

#[test]
fn help_goes_to_stdout_and_lists_the_statuses() {
    for args in [&["--help"][..], &["run", "--help"]] {
        let help = run(args);
        help.ended_with(0);
        assert_eq!(help.stderr, "");
        for words in ["Usage: vm-accel", "Exit statuses:", "124", "0xf4"] {
            assert!(help.stdout.contains(words), "{words:?}: {}", help.stdout);
        }
    }
}

#[test]
fn version_is_the_packages() {
    let version = run(["--version"]);
    version.ended_with(0);
    assert_eq!(version.stdout, format!("vm-accel {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn info_has_a_line_for_every_kind() {
    let info = run(["info"]);
    info.ended_with(0);
    assert_eq!(info.stderr, "");
    for kind in ["kvm", "hvf", "whpx", "vz", "soft"] {
        let lines = info.stdout.lines();
        assert_eq!(lines.filter(|line| line.starts_with(kind)).count(), 1, "{kind}: {}", info.stdout);
    }
}

#[test]
fn info_in_json_gives_capabilities_or_a_reason() {
    let info = info();
    assert_eq!(info["schema_version"], 1);
    let backends = info["backends"].as_array().unwrap();
    let kinds: Vec<_> = backends.iter().map(|b| &b["kind"]).collect();
    assert_eq!(kinds, ["kvm", "hvf", "whpx", "vz", "soft"]);
    for backend in backends {
        if backend["available"] == true {
            // A backend of whole machines has no vCPUs.
            let cpus = ["max_vcpus", "max_whole_vm_cpus"].map(|key| backend[key].as_u64().unwrap());
            assert!(cpus[0] + cpus[1] >= 1, "{backend}");
            assert!(backend["features"].is_object(), "{backend}");
            assert!(backend["guest_arch"].is_string(), "{backend}");
        } else {
            assert!(!backend["reason"].as_str().unwrap().is_empty(), "{backend}");
        }
    }
}

#[test]
fn what_is_required_is_there() {
    // Fails if VM_ACCEL_REQUIRE names a backend that this host does not have.
    let _ = backends();
}

#[test]
fn wrong_usage_is_status_2() {
    run([""; 0]).refused(&["Usage: vm-accel"]);
    run(["fly"]).refused(&["fly"]);
    run(["run", "--fly"]).refused(&["--fly"]);
    run(["info", "kernel"]).refused(&["kernel"]);
    run(["run", "kernel", "another"]).refused(&["another"]);
    for (option, value, word) in [
        ("--cpus", "0", "at least 1"),
        ("--cpus", "many", "number"),
        ("--memory", "0", "must not be 0"),
        ("--memory", "1X", "suffix K, M, G or T"),
        ("--memory", "99999999T", "64 bits"),
        ("--accel", "tcg", "auto, kvm, hvf, whpx, vz, soft"),
        ("--accel", "", "auto, kvm, hvf, whpx, vz, soft"),
        ("--serial", "file=", "stdio, null, file=PATH"),
        ("--serial", "com1", "stdio, null, file=PATH"),
        ("--boot", "floppy", "multiboot"),
        ("--cpu", "-x3apic", "x2apic"),
        ("--cpu", "+x2apic", "taken away"),
        ("--cpu", "", "no CPU feature"),
        ("--flat-address", "7c00h", "0x"),
        ("--timeout", "0", "above 0"),
        ("--timeout", "soon", "number"),
    ] {
        run(["run", option, value]).refused(&[option, word]);
    }
}
