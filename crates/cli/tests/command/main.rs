//! The command as its users meet it: the built binary, run with arguments, files, pipes, signals and terminals.
//!
//! Guests are a few bytes of 16-bit code, so that a test's outcome is the command's and no kernel's. A test runs on every
//! backend that this host has for x86-64 guests; one that is absent prints `skipped: reason`, or fails the test if
//! `VM_ACCEL_REQUIRE` (a list such as `kvm,soft`) names it. No test asserts a time: a guest that never ends by itself gets
//! a generous `--timeout`, whose status would be the wrong one.

mod endings;
mod failures;
#[cfg(target_os = "linux")]
mod linux;
mod selftest;
mod support;
#[cfg(unix)]
mod terminal;
#[cfg(unix)]
mod unix;
mod usage;
