//! Process 1 of the emulated machine in which `cargo xtask nested` runs a program on upstream KVM.

fn main() {
    vm_accel_nestinit::program::nested();
}
