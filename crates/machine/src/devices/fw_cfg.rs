//! QEMU's firmware configuration interface, as far as guests read it by ports (QEMU's `docs/specs/fw_cfg.rst`).
//!
//! kvm-unit-tests ask it for the number of CPUs and the memory size. Read-only, without DMA.

use std::collections::BTreeMap;

use crate::bus::BusDevice;

/// The selector port (16 bits), offset 0; the data port is the next one.
pub const FW_CFG_PORT: u64 = 0x510;
/// Ports of the device.
pub const FW_CFG_LEN: u64 = 2;

const KEY_SIGNATURE: u16 = 0x00;
const KEY_ID: u16 = 0x01;
const KEY_RAM_SIZE: u16 = 0x03;
const KEY_NB_CPUS: u16 = 0x05;
const KEY_MAX_CPUS: u16 = 0x0f;
const KEY_FILE_DIR: u16 = 0x19;
const KEY_FILE_FIRST: u16 = 0x20;
/// Bit 14 asks for write access; bit 15 is part of the key.
const KEY_MASK: u16 = 0xbfff;

/// The device.
#[derive(Debug)]
pub struct FwCfg {
    items: BTreeMap<u16, Vec<u8>>,
    selected: u16,
    position: usize,
}

impl FwCfg {
    /// A device that tells of `cpus` CPUs and `ram_size` bytes of RAM, and offers `files` by name.
    ///
    /// Names are cut to 55 bytes, contents to 4 GiB, and files after the 4,000th are left out: the format has no room for them.
    #[must_use]
    pub fn new(cpus: u16, ram_size: u64, files: &[(&str, Vec<u8>)]) -> Self {
        let files = &files[..files.len().min(4000)];
        let mut items = BTreeMap::from([
            (KEY_SIGNATURE, b"QEMU".to_vec()),
            (KEY_ID, 1u32.to_le_bytes().to_vec()),
            (KEY_RAM_SIZE, ram_size.to_le_bytes().to_vec()),
            (KEY_NB_CPUS, cpus.to_le_bytes().to_vec()),
            (KEY_MAX_CPUS, cpus.to_le_bytes().to_vec()),
        ]);
        // The directory is big-endian: count, then size, key, two reserved bytes and the name of each file.
        let mut directory = (files.len() as u32).to_be_bytes().to_vec();
        for (key, (name, content)) in (KEY_FILE_FIRST..).zip(files) {
            let size = u32::try_from(content.len()).unwrap_or(u32::MAX);
            let mut field = [0; 56];
            let length = name.len().min(field.len() - 1);
            field[..length].copy_from_slice(&name.as_bytes()[..length]);
            directory.extend(size.to_be_bytes());
            directory.extend(key.to_be_bytes());
            directory.extend([0; 2]);
            directory.extend(field);
            items.insert(key, content.clone());
        }
        items.insert(KEY_FILE_DIR, directory);
        Self { items, selected: KEY_SIGNATURE, position: 0 }
    }
}

impl BusDevice for FwCfg {
    fn name(&self) -> &'static str {
        "fw_cfg"
    }

    fn max_access(&self) -> usize {
        2
    }

    /// Reads the next byte of the selected item; zero behind its end, and if there is no such item.
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let (1, [byte]) = (offset, data) {
            *byte = self.items.get(&self.selected).and_then(|item| item.get(self.position)).copied().unwrap_or(0);
            self.position = self.position.saturating_add(1);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let (0, &[low, high]) = (offset, data) {
            self.selected = u16::from_le_bytes([low, high]) & KEY_MASK;
            self.position = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(dev: &mut FwCfg, key: u16, len: usize) -> Vec<u8> {
        dev.write(0, &key.to_le_bytes());
        (0..len)
            .map(|_| {
                let mut byte = [0xff];
                dev.read(1, &mut byte);
                byte[0]
            })
            .collect()
    }

    #[test]
    fn tells_what_test_guests_ask_for() {
        let mut dev = FwCfg::new(3, 0x1_2345_6789, &[]);
        assert_eq!(item(&mut dev, 0, 4), b"QEMU");
        assert_eq!(item(&mut dev, 1, 4), [1, 0, 0, 0]);
        assert_eq!(item(&mut dev, 3, 8), 0x1_2345_6789u64.to_le_bytes());
        assert_eq!(item(&mut dev, 5, 2), [3, 0]);
        assert_eq!(item(&mut dev, 0x0f, 2), [3, 0]);
    }

    #[test]
    fn behind_the_end_and_unknown_items_read_zero() {
        let mut dev = FwCfg::new(1, 0, &[]);
        assert_eq!(item(&mut dev, 5, 4), [1, 0, 0, 0]);
        assert_eq!(item(&mut dev, 0x1234, 2), [0, 0]);
    }

    #[test]
    fn files_are_found_through_the_directory() {
        let long = "n".repeat(80);
        let mut dev = FwCfg::new(1, 0, &[("etc/e820", vec![1, 2, 3]), (&long, vec![9; 5])]);
        let dir = item(&mut dev, 0x19, 4 + 2 * 64);
        assert_eq!(dir[..4], [0, 0, 0, 2]);
        assert_eq!(dir[4..12], [0, 0, 0, 3, 0, 0x20, 0, 0]);
        assert_eq!(&dir[12..21], b"etc/e820\0");
        assert_eq!(dir[4 + 64 + 8 + 55], 0, "a name ends with a zero");
        assert_eq!(item(&mut dev, 0x20, 3), [1, 2, 3]);
        assert_eq!(item(&mut dev, 0x21, 5), [9; 5]);
    }
}
