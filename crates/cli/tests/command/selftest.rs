//! `selftest`: the report, the list, and its statuses.

use crate::support::run;

#[test]
fn a_theme_on_the_software_cpu_passes() {
    let report = run(["selftest", "--accel", "soft", "soft::pio::"]);
    report.ended_with(0);
    for words in ["```text\n", "vm-accel ", "\nos ", "\ncpu ", "\nsoft  available", " passed, 0 failed, "] {
        assert!(report.stdout.contains(words), "{words:?}: {}", report.stdout);
    }
    assert!(!report.stdout.contains("\n0 passed"), "{}", report.stdout);
}

#[test]
fn the_list_names_cases_and_what_would_be_skipped() {
    let list = run(["selftest", "--list", "--accel", "soft"]);
    list.ended_with(0);
    assert_eq!(list.stderr, "");
    assert!(list.stdout.lines().count() > 100, "{}", list.stdout);
    assert!(list.stdout.lines().all(|line| line.starts_with("soft::")), "{}", list.stdout);
    assert!(list.stdout.contains(": skipped: "), "{}", list.stdout);
}

#[test]
fn a_process_runs_one_case() {
    let list = run(["selftest", "--list", "--accel", "soft", "soft::pio::"]);
    let name = list.stdout.lines().find(|line| !line.contains("skipped")).expect("a case");
    run(["selftest", "--case", name]).ended_with(0);
    run(["selftest", "--case", "soft::pio::no_such_case"]).failed(1, &["soft::pio::no_such_case"]);
}

#[test]
fn nothing_to_run_is_no_success() {
    run(["selftest", "--accel", "soft", "no such case"]).failed(1, &["no such case"]);
    // No host has both.
    let foreign = if cfg!(windows) { "hvf" } else { "whpx" };
    run(["selftest", "--accel", foreign]).failed(3, &[foreign]);
    run(["selftest", "--accel", "tcg"]).refused(&["tcg"]);
}
