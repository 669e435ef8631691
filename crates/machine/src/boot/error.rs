//! What can be wrong with an image or with where it should go, as sentences that a user can act on.

use super::Protocol;
use std::fmt;
use std::io;
use std::path::PathBuf;
use vm_accel::GuestArch;

/// Why a guest cannot be started from a file. Nothing was written to guest memory.
#[non_exhaustive]
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The operating system refused to open or read the file.
    #[error("cannot read {}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// The operating system's reason.
        source: io::Error,
    },
    /// The path names something other than a regular file.
    #[error("{} is {what}, not a file that can be loaded", path.display())]
    NotAFile {
        /// The path.
        path: PathBuf,
        /// What it is, with its article ("a directory").
        what: &'static str,
    },
    /// There are no bytes at all.
    #[error("{what} is empty (0 bytes)")]
    Empty {
        /// The file's path, or what the bytes were given as.
        what: String,
    },
    /// A file, or what it unpacks to, is larger than the limit; usually the guest's memory.
    #[error("{what} has {}, more than the limit of {}; give the guest more memory or a smaller file", Amount(*size), Amount(*limit))]
    TooLarge {
        /// The file's path, or what the bytes were given as.
        what: String,
        /// Its size in bytes, or the size at which reading stopped.
        size: u64,
        /// The limit in bytes.
        limit: u64,
    },
    /// The kind was to be detected, and the image is none of those that are known.
    #[error("not a kernel or firmware image that can be booted: {guess}")]
    Unrecognised {
        /// What it seems to be, and what helps.
        guess: &'static str,
    },
    /// The image is for another architecture than the guest's.
    #[error("this {image} is not for the guest's architecture, {guest}")]
    WrongArch {
        /// What the image is.
        image: &'static str,
        /// The architecture of the machine that was to boot it.
        guest: GuestArch,
    },
    /// A field lies beyond the end of the file.
    #[error("{protocol}: {field} needs {} at offset {offset:#x}, but the file has only {}; it is truncated, or not of this kind", Amount(*needed), Amount(*available))]
    Truncated {
        /// The kind of image.
        protocol: Protocol,
        /// The field or part of the file.
        field: &'static str,
        /// Where it begins, as the file says.
        offset: u64,
        /// Bytes that it takes.
        needed: u64,
        /// Bytes in the file.
        available: u64,
    },
    /// A field holds a value that its format forbids, or an argument one that the protocol cannot express.
    #[error("{protocol}: {field} {detail}")]
    Malformed {
        /// The kind of image.
        protocol: Protocol,
        /// The field.
        field: &'static str,
        /// Its value and the rule that it breaks; the field's name precedes it.
        detail: String,
    },
    /// The image or the request is valid, but asks for something that is not offered.
    #[error("{protocol}: {what}")]
    Unsupported {
        /// The kind of image.
        protocol: Protocol,
        /// What is not offered, and what helps.
        what: &'static str,
    },
    /// A part must be at an address at which the guest has no usable memory.
    #[error("{protocol}: {what} needs {} at {start:#x}, but the guest's usable memory there is only {}; more memory may help", Amount(*size), Amount(*usable))]
    OutsideRam {
        /// The kind of image.
        protocol: Protocol,
        /// The part.
        what: &'static str,
        /// Guest physical address of the part.
        start: u64,
        /// Its size in bytes.
        size: u64,
        /// Usable bytes from `start` on.
        usable: u64,
    },
    /// Two parts would be at the same address.
    #[error("{protocol}: {what} ({start:#x} to {end:#x}) overlaps {other} ({other_start:#x} to {other_end:#x})")]
    Overlap {
        /// The kind of image.
        protocol: Protocol,
        /// The part that came later.
        what: &'static str,
        /// Its first guest physical address.
        start: u64,
        /// The address behind its last byte.
        end: u64,
        /// The part that was there.
        other: &'static str,
        /// Its first guest physical address.
        other_start: u64,
        /// The address behind its last byte.
        other_end: u64,
    },
    /// A part may be anywhere in a range, but no hole in it is large enough.
    #[error("{protocol}: no room for {what}: it needs {} free between {low:#x} and {high:#x}; give the guest more memory", Amount(*size))]
    NoRoom {
        /// The kind of image.
        protocol: Protocol,
        /// The part.
        what: &'static str,
        /// Its size in bytes.
        size: u64,
        /// Lowest guest physical address that it may have.
        low: u64,
        /// The address that it must not reach.
        high: u64,
    },
    /// The memory map of the machine contradicts itself.
    #[error("invalid memory map: {detail}")]
    MemoryMap {
        /// The entry and the rule that it breaks.
        detail: String,
    },
}

/// Prints a number of bytes the way a person would write it, without rounding.
pub(crate) struct Amount(pub(crate) u64);

impl fmt::Display for Amount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (shift, unit) in [(30, "GiB"), (20, "MiB"), (10, "KiB")] {
            if self.0 >> shift != 0 && self.0.trailing_zeros() >= shift {
                return write!(f, "{} {unit}", self.0 >> shift);
            }
        }
        write!(f, "{} byte{}", self.0, if self.0 == 1 { "" } else { "s" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn amounts_are_exact() {
        for (bytes, text) in [
            (0, "0 bytes"),
            (1, "1 byte"),
            (1023, "1023 bytes"),
            (1024, "1 KiB"),
            (1 << 29, "512 MiB"),
            ((1 << 20) + 1024, "1025 KiB"),
            (u64::MAX, "18446744073709551615 bytes"),
            (3 << 30, "3 GiB"),
        ] {
            assert_eq!(Amount(bytes).to_string(), text);
        }
    }
}
