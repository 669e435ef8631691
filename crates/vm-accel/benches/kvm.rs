//! What this library costs over raw `kvm-ioctls`: exits, registers, life cycle of a virtual machine.
//!
//! Each pair runs interleaved in short rounds, and the printed ratio is the median of the rounds' ratios: noise of the
//! host hits both sides alike. Criterion then reports each side's time for itself.
//!
//! `cargo bench -p vm-accel --bench kvm`; `docs/performance.md` holds figures.

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
fn main() {
    println!("skipped: these benches compare with KVM on x86-64 Linux");
}

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
#[path = "kvm/pairs.rs"]
mod pairs;

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
fn main() {
    pairs::main();
}
