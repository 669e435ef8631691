//! Writes "newc" cpio archives, the format of Linux's initramfs.
//!
//! Format: the kernel's Documentation/driver-api/early-userspace/buffer-format.rst. Archives are reproducible: no times,
//! no owners, inode numbers in order of entry.

use anyhow::{Context, Result, bail};

const DIRECTORY: u32 = 0o040000;
const FILE: u32 = 0o100000;
const CHARACTER_DEVICE: u32 = 0o020000;

/// The entry that ends an archive.
const TRAILER: &str = "TRAILER!!!";

/// An archive being written.
#[derive(Debug, Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
    entries: u32,
    folders: Vec<String>,
}

impl Archive {
    /// An archive with what every init of ours needs: the mount points and a console, which the kernel opens as the
    /// standard streams of init before anything can be mounted.
    pub(crate) fn with_base() -> Result<Self> {
        let mut archive = Self::default();
        for dir in ["dev", "proc", "sys", "tmp"] {
            archive.dir(dir)?;
        }
        archive.device("dev/console", 5, 1)?;
        Ok(archive)
    }

    /// Adds a folder, and the folders it lies in. One that is there already is no error.
    pub(crate) fn dir(&mut self, path: &str) -> Result<()> {
        if self.folders.iter().any(|f| f == path) {
            return Ok(());
        }
        if let Some((parent, _)) = path.rsplit_once('/') {
            self.dir(parent)?;
        }
        self.entry(path, DIRECTORY | 0o755, 2, (0, 0), &[])?;
        self.folders.push(path.to_owned());
        Ok(())
    }

    /// Adds a file with the permissions `mode`, and the folders it lies in.
    pub(crate) fn file(&mut self, path: &str, mode: u32, data: &[u8]) -> Result<()> {
        if let Some((parent, _)) = path.rsplit_once('/') {
            self.dir(parent)?;
        }
        self.entry(path, FILE | mode, 1, (0, 0), data)
    }

    /// Adds a character device that root may use.
    pub(crate) fn device(&mut self, path: &str, major: u32, minor: u32) -> Result<()> {
        self.entry(path, CHARACTER_DEVICE | 0o600, 1, (major, minor), &[])
    }

    /// Ends the archive.
    pub(crate) fn finish(mut self) -> Result<Vec<u8>> {
        self.entry(TRAILER, 0, 1, (0, 0), &[])?;
        Ok(self.bytes)
    }

    fn entry(&mut self, path: &str, mode: u32, links: u32, device: (u32, u32), data: &[u8]) -> Result<()> {
        if path.is_empty() || path.starts_with('/') || path.contains('\0') {
            bail!("'{}' is no name for a file in an archive", path.escape_default());
        }
        let size = u32::try_from(data.len()).with_context(|| format!("{path}: an archive's file ends at 4 GiB"))?;
        self.entries += 1;
        // ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check.
        let name_size = u32::try_from(path.len() + 1)?;
        let fields = [self.entries, mode, 0, 0, links, 0, size, 0, 0, device.0, device.1, name_size, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(data);
        self.pad();
        Ok(())
    }

    /// Header with name, and data, each end on a multiple of four.
    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Entry {
        name: String,
        mode: u32,
        device: (u32, u32),
        data: Vec<u8>,
    }

    /// Reads an archive back by the format's rules.
    fn parse(bytes: &[u8]) -> Vec<Entry> {
        let mut entries = Vec::new();
        let mut at = 0;
        loop {
            assert_eq!(at % 4, 0);
            assert_eq!(&bytes[at..at + 6], b"070701");
            let field = |n: usize| {
                let start = at + 6 + n * 8;
                u32::from_str_radix(std::str::from_utf8(&bytes[start..start + 8]).unwrap(), 16).unwrap()
            };
            let (mode, size, name_size) = (field(1), field(6) as usize, field(11) as usize);
            let name = &bytes[at + 110..at + 110 + name_size];
            assert_eq!(name.last(), Some(&0));
            let name = String::from_utf8(name[..name_size - 1].to_vec()).unwrap();
            let data = (at + 110 + name_size).next_multiple_of(4);
            let device = (field(9), field(10));
            at = (data + size).next_multiple_of(4);
            if name == TRAILER {
                assert_eq!(at, bytes.len());
                return entries;
            }
            let data = bytes[data..data + size].to_vec();
            entries.push(Entry { name, mode, device, data });
        }
    }

    #[test]
    fn what_goes_in_comes_out() {
        let mut archive = Archive::with_base().unwrap();
        archive.file("init", 0o755, b"#!/bin/sh\n").unwrap();
        archive.file("a/b/odd", 0o644, &[7; 5]).unwrap();
        archive.file("a/b/empty", 0o600, &[]).unwrap();
        let entries = parse(&archive.finish().unwrap());
        let names: Vec<&str> = entries.iter().map(|e| e.name.as_str()).collect();
        assert_eq!(names, ["dev", "proc", "sys", "tmp", "dev/console", "init", "a", "a/b", "a/b/odd", "a/b/empty"]);
        assert_eq!(entries[0].mode, 0o040755);
        assert_eq!((entries[4].mode, entries[4].device), (0o020600, (5, 1)));
        assert_eq!((entries[5].mode, entries[5].data.as_slice()), (0o100755, b"#!/bin/sh\n".as_slice()));
        assert_eq!(entries[8].data, [7; 5]);
        assert!(entries[9].data.is_empty());
    }

    #[test]
    fn impossible_names_are_refused() {
        for name in ["", "/init", "a\0b"] {
            assert!(Archive::default().file(name, 0o644, b"").is_err(), "{name:?}");
        }
    }
}
