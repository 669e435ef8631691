//! Writes the seeds of every target into `corpus/<target>/` of the folder it is run for, where `cargo fuzz` looks.

use std::fs;
use std::io;
use std::path::Path;

fn main() -> io::Result<()> {
    for target in vm_accel_fuzz::targets() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("corpus")
            .join(target.name);
        fs::create_dir_all(&folder)?;
        for (index, seed) in (target.seeds)().into_iter().enumerate() {
            fs::write(folder.join(format!("seed-{index}")), seed)?;
        }
    }
    Ok(())
}
