//! Fuzz targets as plain functions, each over the bytes of one input.
//!
//! `cargo fuzz run <target>` drives them with libFuzzer through the files in `fuzz_targets/`; on a stable compiler that
//! needs `RUSTC_BOOTSTRAP=1`. `cargo test --no-default-features` runs every target over its seeds and
//! mutations of them, on any compiler, so that a target cannot rot. Seeds are made by code, not kept as files; `cargo run --no-default-features --example
//! seeds` writes them into `corpus/` for libFuzzer to start from.
//!
//! A target panics if the product does, or if what the product promises does not hold.

pub mod boot;
pub mod cpu;
pub mod mutate;

/// A target and the inputs that it starts from.
#[derive(Debug, Clone, Copy)]
pub struct Target {
    /// The name of its binary.
    pub name: &'static str,
    /// Runs one input.
    pub run: fn(&[u8]),
    /// Small valid inputs.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

/// Every target.
pub fn targets() -> Vec<Target> {
    [boot::TARGETS, cpu::TARGETS].concat()
}
