//! Little-endian reads at hostile offsets, and writes into tables of our own.
//!
//! [`View`] is the only way in which parsers touch an image: no slice index of theirs comes from a file.

use super::{BootError, Protocol};
use std::fmt;

/// An image, or a part of one, whose reads fail with the name of the field.
#[derive(Clone, Copy)]
pub(crate) struct View<'a> {
    pub(crate) data: &'a [u8],
    pub(crate) protocol: Protocol,
}

impl fmt::Debug for View<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "View {{ {}, {:#x} bytes }}", self.protocol, self.len())
    }
}

impl<'a> View<'a> {
    pub(crate) fn new(data: &'a [u8], protocol: Protocol) -> Self {
        Self { data, protocol }
    }

    pub(crate) fn len(&self) -> u64 {
        self.data.len() as u64
    }

    /// `len` bytes at `offset`, both as the file gives them.
    pub(crate) fn bytes(&self, field: &'static str, offset: u64, len: u64) -> Result<&'a [u8], BootError> {
        let range = offset.checked_add(len).filter(|&end| end <= self.len());
        // The end is at most the length of a slice, so the casts lose nothing.
        range.map(|end| &self.data[offset as usize..end as usize]).ok_or(BootError::Truncated {
            protocol: self.protocol,
            field,
            offset,
            needed: len,
            available: self.len(),
        })
    }

    fn array<const N: usize>(&self, field: &'static str, offset: u64) -> Result<[u8; N], BootError> {
        let mut bytes = [0; N];
        bytes.copy_from_slice(self.bytes(field, offset, N as u64)?);
        Ok(bytes)
    }

    pub(crate) fn u8(&self, field: &'static str, offset: u64) -> Result<u8, BootError> {
        Ok(u8::from_le_bytes(self.array(field, offset)?))
    }

    pub(crate) fn u16(&self, field: &'static str, offset: u64) -> Result<u16, BootError> {
        Ok(u16::from_le_bytes(self.array(field, offset)?))
    }

    pub(crate) fn u32(&self, field: &'static str, offset: u64) -> Result<u32, BootError> {
        Ok(u32::from_le_bytes(self.array(field, offset)?))
    }

    pub(crate) fn u64(&self, field: &'static str, offset: u64) -> Result<u64, BootError> {
        Ok(u64::from_le_bytes(self.array(field, offset)?))
    }

    /// A [`BootError::Malformed`] of this image's kind.
    pub(crate) fn malformed(&self, field: &'static str, detail: impl Into<String>) -> BootError {
        BootError::Malformed { protocol: self.protocol, field, detail: detail.into() }
    }

    /// A [`BootError::Unsupported`] of this image's kind.
    pub(crate) fn unsupported(&self, what: &'static str) -> BootError {
        BootError::Unsupported { protocol: self.protocol, what }
    }
}

/// A table that we build for a guest. Offsets are constants of the format; out of range is our own bug.
pub(crate) trait Put {
    fn put(&mut self, offset: usize, bytes: &[u8]);

    fn put_u16(&mut self, offset: usize, value: u16) {
        self.put(offset, &value.to_le_bytes());
    }

    fn put_u32(&mut self, offset: usize, value: u32) {
        self.put(offset, &value.to_le_bytes());
    }

    fn put_u64(&mut self, offset: usize, value: u64) {
        self.put(offset, &value.to_le_bytes());
    }
}

impl Put for [u8] {
    fn put(&mut self, offset: usize, bytes: &[u8]) {
        self[offset..offset + bytes.len()].copy_from_slice(bytes);
    }
}
