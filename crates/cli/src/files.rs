//! Reading the files that a guest is made of, each failure in a sentence.

use anyhow::{Context as _, Result, bail};
use std::fs::File;
use std::io::Read as _;
use std::path::Path;

/// Reads `path` whole. A file of more than `most` bytes, which may be endless (a device), is an error.
pub(crate) fn read(what: &str, path: &Path, most: u64) -> Result<Vec<u8>> {
    let failed = || format!("cannot read the {what} {}", path.display());
    let mut file = File::open(path).with_context(failed)?;
    if file.metadata().with_context(failed)?.is_dir() {
        bail!("{}: it is a directory", failed());
    }
    let mut bytes = Vec::new();
    file.by_ref().take(most.saturating_add(1)).read_to_end(&mut bytes).with_context(failed)?;
    if bytes.len() as u64 > most {
        bail!("{}: it has more than {most} bytes and cannot fit into the guest's memory", failed());
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unreadable_files_are_named() {
        let error = read("kernel", Path::new("/nonexistent/vmlinuz"), 10).unwrap_err();
        assert!(format!("{error:#}").contains("/nonexistent/vmlinuz"), "{error:#}");
        let error = read("kernel", &std::env::temp_dir(), 10).unwrap_err();
        assert!(format!("{error:#}").contains("kernel"), "{error:#}");
    }

    #[test]
    fn a_file_is_taken_up_to_the_limit() {
        let path = std::env::temp_dir().join(format!("vm-accel-files-{}", std::process::id()));
        std::fs::write(&path, [7; 10]).unwrap();
        assert_eq!(read("initrd", &path, 10).unwrap(), [7; 10]);
        let error = read("initrd", &path, 9).unwrap_err();
        std::fs::remove_file(&path).unwrap();
        assert!(error.to_string().contains("more than 9 bytes"), "{error}");
    }
}
