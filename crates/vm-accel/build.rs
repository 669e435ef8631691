//! Names the combinations of operating system and architecture that a backend needs, so that `cfg(kvm)` can stand at a
//! `mod` line instead of the whole expression. The feature `sim` compiles the foreign backends on every host.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let os = std::env::var("CARGO_CFG_TARGET_OS").unwrap_or_default();
    let arch = std::env::var("CARGO_CFG_TARGET_ARCH").unwrap_or_default();
    let sim = std::env::var_os("CARGO_FEATURE_SIM").is_some();
    let (x86_64, aarch64) = (arch == "x86_64", arch == "aarch64");
    for (cfg, on) in [
        ("kvm", os == "linux" && (x86_64 || aarch64)),
        ("hvf_x86_64", os == "macos" && x86_64 || sim),
        ("hvf_aarch64", os == "macos" && aarch64 || sim),
        ("whpx", os == "windows" && (x86_64 || aarch64)),
        ("vz", os == "macos" || sim),
    ] {
        println!("cargo::rustc-check-cfg=cfg({cfg})");
        if on {
            println!("cargo::rustc-cfg={cfg}");
        }
    }
}
