//! Reads image files. The only part of the boot module that touches the host.

use super::BootError;
use super::error::Amount;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

/// Reads a regular file of at most `limit` bytes (a guest's RAM is a good limit); it must not be empty.
///
/// Directories, devices and pipes are refused before they are opened: opening a pipe could wait for ever.
///
/// # Errors
/// [`BootError::File`], [`BootError::NotAFile`], [`BootError::Empty`] or [`BootError::TooLarge`], each with the path.
pub fn read_image(path: &Path, limit: u64) -> Result<Vec<u8>, BootError> {
    let failed = |source| BootError::File { path: path.to_owned(), source };
    let too_large = |size| BootError::TooLarge { what: path.display().to_string(), size, limit };
    let metadata = fs::metadata(path).map_err(failed)?;
    if !metadata.is_file() {
        return Err(BootError::NotAFile {
            path: path.to_owned(),
            what: if metadata.is_dir() { "a directory" } else { "a device or a pipe" },
        });
    }
    if metadata.len() > limit {
        return Err(too_large(metadata.len()));
    }
    let mut data = Vec::new();
    let expected = usize::try_from(metadata.len()).unwrap_or(usize::MAX);
    data.try_reserve_exact(expected)
        .map_err(|_| failed(io::Error::other(format!("the host has no memory for its {}", Amount(metadata.len())))))?;
    // The file may grow while it is read.
    let mut file = File::open(path).map_err(failed)?.take(limit.saturating_add(1));
    file.read_to_end(&mut data).map_err(failed)?;
    if data.len() as u64 > limit {
        return Err(too_large(data.len() as u64));
    }
    if data.is_empty() {
        return Err(BootError::Empty { what: path.display().to_string() });
    }
    Ok(data)
}
