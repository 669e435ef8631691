//! Names the places where declarations that need `windows-sys` exist, so that `cfg(whpx)` can stand at a `mod` line.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-check-cfg=cfg(whpx)");
    let is_set = |name: &str| std::env::var_os(name).is_some();
    if is_set("CARGO_CFG_WINDOWS") || is_set("CARGO_FEATURE_SIM") {
        println!("cargo::rustc-cfg=whpx");
    }
}
