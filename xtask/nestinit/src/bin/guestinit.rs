//! Process 1 of the Linux guests in boot tests: says that userspace was reached, and ends the machine.

fn main() {
    vm_accel_nestinit::program::guest();
}
