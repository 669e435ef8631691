//! The init of a guest in a boot test.
//!
//! The line it prints is what the test looks for, so it carries what the test wants to know about the guest.

use crate::{End, end, mount_all};
use std::fs;
use std::thread;

/// Says that userspace was reached, with the number of CPUs, and ends the machine as the kernel command line says:
/// `vm_accel.end=poweroff` (without one), `reset`, `idle`, or `exit`, which ends init so that the kernel panics.
pub fn guest() {
    mount_all();
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let cpus = thread::available_parallelism().map_or(0, usize::from);
    println!(
        "vm-accel: userspace reached, {cpus} CPU(s) online, {} KiB memory, Linux {}",
        memory_kib(&read("/proc/meminfo")),
        read("/proc/sys/kernel/osrelease").trim()
    );
    let command_line = read("/proc/cmdline");
    let wish = command_line.split_whitespace().filter_map(|w| w.strip_prefix("vm_accel.end=")).next_back();
    match wish.unwrap_or("poweroff") {
        "poweroff" => end(End::PowerOff),
        "reset" => end(End::Reset),
        "idle" => end(End::Idle),
        "exit" => {}
        other => {
            println!("init: no such end: {other}");
            end(End::PowerOff)
        }
    }
}

/// The first figure of `/proc/meminfo`, which is the memory the kernel has.
fn memory_kib(meminfo: &str) -> u64 {
    meminfo.split_whitespace().nth(1).and_then(|n| n.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::memory_kib;

    #[test]
    fn the_memory_is_the_first_figure() {
        assert_eq!(memory_kib("MemTotal:         985032 kB\nMemFree:  1 kB\n"), 985_032);
        assert_eq!(memory_kib(""), 0);
    }
}
