//! The ACPI tables of the board: what tells an operating system of its CPUs, its interrupt controllers, the power
//! switch and the serial port (ACPI 6.5, chapter 5).
//!
//! [`build`] is pure: it lays all tables out in one image for a given address. It must describe the board as it is; the
//! addresses and numbers come from the devices' own constants.

use acpi_tables::aml::{Device, EISAName, IO, Interrupt, Name, Package, Path, ResourceTemplate, Scope};
use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, Checksum};

use super::{COM1, COM1_IRQ, IO_APIC_ADDRESS, IO_APIC_ID, LOCAL_APIC_ADDRESS, TIMER_PIN};
use crate::devices::acpi_pm::{PM_BASE, PM_TIMER, PM1_CONTROL, SCI_IRQ, SLEEP_TYPE_S5};
use crate::devices::chipset::{RESET_CONTROL, RESET_CONTROL_VALUE};
use crate::devices::rtc::{RTC_CENTURY, RTC_LEN, RTC_PORT};
use crate::devices::uart::UART_PORTS;

const OEM_ID: [u8; 6] = *b"VMACCL";
const OEM_TABLE: [u8; 8] = *b"VMACCLPC";
const OEM_REVISION: u32 = 1;

/// FADT `IAPC_BOOT_ARCH`: there are ISA devices (bit 0) and no VGA (bit 2). Bit 1 stays clear: the keyboard controller is
/// for resets, and operating systems need not look for a keyboard.
const BOOT_ARCH: u16 = 1 | 1 << 2;
/// MADT flag: there is a PIC pair that must be masked when the APICs are used.
const PCAT_COMPAT: u32 = 1;
/// MADT flags of an interrupt: level-triggered, active high.
const LEVEL_ACTIVE_HIGH: u16 = 0b1101;
/// The largest local APIC id that an 8-bit MADT entry can name; 255 is the broadcast.
const LAST_XAPIC_ID: u32 = 254;

const RSDP_LEN: usize = 36;
/// Tables begin at multiples of this; the FACS requires it.
const ALIGN: usize = 64;

/// All tables, to be written at the address that they were built for. The RSDP is first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AcpiImage {
    /// Guest physical address of the image and of the RSDP in it.
    pub address: u32,
    /// The tables.
    pub bytes: Vec<u8>,
}

/// Lays out the tables for `cpus` CPUs with local APIC ids from 0 at `address`, a multiple of 64 below 4 GiB.
#[must_use]
pub fn build(address: u32, cpus: u32) -> AcpiImage {
    let mut image = AcpiImage { address, bytes: vec![0; RSDP_LEN] };
    let facs = image.append(&bytes_of(&FACS::new()));
    let dsdt = image.append(dsdt().as_slice());
    let tables = [image.append(&fadt(dsdt, facs)), image.append(madt(cpus).as_slice())];

    // Both forms of the root table: old guests only know the 32-bit one.
    let mut rsdt = sdt(*b"RSDT", 1);
    let mut xsdt = sdt(*b"XSDT", 1);
    for table in tables {
        rsdt.append_slice(&table.to_le_bytes());
        xsdt.append_slice(&u64::from(table).to_le_bytes());
    }
    let (rsdt, xsdt) = (image.append(rsdt.as_slice()), image.append(xsdt.as_slice()));
    let rsdp = rsdp(rsdt, xsdt);
    image.bytes[..RSDP_LEN].copy_from_slice(&rsdp);
    image
}

impl AcpiImage {
    /// Adds a table and answers its address.
    fn append(&mut self, table: &[u8]) -> u32 {
        self.bytes.resize(self.bytes.len().next_multiple_of(ALIGN), 0);
        let address = self.address + self.bytes.len() as u32;
        self.bytes.extend_from_slice(table);
        address
    }
}

fn bytes_of(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn sdt(signature: [u8; 4], revision: u8) -> Sdt {
    const HEADER: u32 = 36;
    Sdt::new(signature, HEADER, revision, OEM_ID, OEM_TABLE, OEM_REVISION)
}

fn checksum(bytes: &[u8]) -> u8 {
    let mut sum = Checksum::default();
    sum.append(bytes);
    sum.value()
}

/// The root pointer, revision 2 (section 5.2.5.3): the first checksum covers the 20 bytes of revision 0.
fn rsdp(rsdt: u32, xsdt: u32) -> [u8; RSDP_LEN] {
    let mut rsdp = [0; RSDP_LEN];
    rsdp[..8].copy_from_slice(b"RSD PTR ");
    rsdp[9..15].copy_from_slice(&OEM_ID);
    rsdp[15] = 2;
    rsdp[16..20].copy_from_slice(&rsdt.to_le_bytes());
    rsdp[20..24].copy_from_slice(&(RSDP_LEN as u32).to_le_bytes());
    rsdp[24..32].copy_from_slice(&u64::from(xsdt).to_le_bytes());
    rsdp[8] = checksum(&rsdp[..20]);
    rsdp[32] = checksum(&rsdp);
    rsdp
}

/// An I/O register of `bits` bits for the FADT.
fn port(address: u16, bits: u8) -> GAS {
    let access = match bits {
        8 => AccessSize::ByteAccess,
        16 => AccessSize::WordAccess,
        _ => AccessSize::DwordAccess,
    };
    GAS::new(AddressSpace::SystemIo, bits, 0, access, u64::from(address))
}

/// The fixed hardware (section 5.2.9). There is no SMI port: the board is in ACPI mode from the start.
fn fadt(dsdt: u32, facs: u32) -> Vec<u8> {
    // "Not supported" for the C2 and C3 states (P_LVL2_LAT above 100, P_LVL3_LAT above 1000).
    let (no_c2, no_c3) = (101u16, 1001u16);
    let mut fadt = [
        Flags::Wbinvd,
        Flags::ProcC1,
        Flags::SlpButton, // no sleep button in the fixed hardware
        Flags::FixRtc,    // and no wake by the clock
        Flags::TmrValExt,
        Flags::ResetRegSup,
        Flags::Headless,
    ]
    .into_iter()
    .fold(FADTBuilder::new(OEM_ID, OEM_TABLE, OEM_REVISION), FADTBuilder::flag);
    fadt.firmware_ctrl = facs.into();
    fadt.dsdt = dsdt.into();
    fadt.x_dsdt = u64::from(dsdt).into();
    fadt.sci_int = (SCI_IRQ as u16).into();
    fadt.pm1a_evt_blk = u32::from(PM_BASE).into();
    fadt.pm1_evt_len = 4;
    fadt.x_pm1a_evt_blk = port(PM_BASE, 32);
    fadt.pm1a_cnt_blk = u32::from(PM1_CONTROL).into();
    fadt.pm1_cnt_len = 2;
    fadt.x_pm1a_cnt_blk = port(PM1_CONTROL, 16);
    fadt.pm_tmr_blk = u32::from(PM_TIMER).into();
    fadt.pm_tmr_len = 4;
    fadt.x_pm_tmr_blk = port(PM_TIMER, 32);
    fadt.p_lvl2_lat = no_c2.into();
    fadt.p_lvl3_lat = no_c3.into();
    fadt.century = RTC_CENTURY;
    fadt.iapc_boot_arch = BOOT_ARCH.into();
    fadt.reset_reg = port(RESET_CONTROL, 8);
    fadt.reset_value = RESET_CONTROL_VALUE;
    bytes_of(&fadt.finalize())
}

/// The interrupt controllers (section 5.2.12).
fn madt(cpus: u32) -> Sdt {
    let mut body = Vec::new();
    body.extend(LOCAL_APIC_ADDRESS.to_le_bytes());
    body.extend(PCAT_COMPAT.to_le_bytes());
    for id in 0..cpus {
        match u8::try_from(id) {
            // Processor local APIC: uid, APIC id, enabled.
            Ok(id) if u32::from(id) <= LAST_XAPIC_ID => body.extend([0, 8, id, id, 1, 0, 0, 0]),
            // Processor local x2APIC: reserved, x2APIC id, enabled, uid.
            _ => {
                body.extend([9, 16, 0, 0]);
                [id, 1, id].iter().for_each(|field| body.extend(field.to_le_bytes()));
            }
        }
    }
    body.extend([1, 12, IO_APIC_ID, 0]);
    body.extend(IO_APIC_ADDRESS.to_le_bytes());
    body.extend(0u32.to_le_bytes());
    // Interrupt source overrides: ISA bus, IRQ, GSI, flags.
    for (irq, gsi, flags) in [(0u8, TIMER_PIN, 0u16), (SCI_IRQ as u8, SCI_IRQ, LEVEL_ACTIVE_HIGH)] {
        body.extend([2, 10, 0, irq]);
        body.extend(gsi.to_le_bytes());
        body.extend(flags.to_le_bytes());
    }
    // LINT1 of every CPU is the NMI.
    body.extend([4, 6, 0xff, 0, 0, 1]);
    if cpus > LAST_XAPIC_ID + 1 {
        body.extend([10, 12, 0, 0, 0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0]);
    }
    let mut madt = sdt(*b"APIC", 4);
    madt.append_slice(&body);
    madt
}

/// The devices that cannot be found by probing, and the type of S5.
fn dsdt() -> Sdt {
    let com1 = COM1 as u16;
    let rtc = RTC_PORT as u16;
    let mut dsdt = sdt(*b"DSDT", 2);
    dsdt.append_slice(&bytes_of(&Scope::new(
        "_SB_".into(),
        vec![
            &Device::new(
                "COM1".into(),
                vec![
                    &Name::new("_HID".into(), &EISAName::new("PNP0501")),
                    &Name::new("_UID".into(), &1u8),
                    &Name::new(
                        "_CRS".into(),
                        &ResourceTemplate::new(vec![
                            &IO::new(com1, com1, 1, UART_PORTS as u8),
                            // A consumer of the interrupt; edge-triggered, active high, not shared.
                            &Interrupt::new(true, true, false, false, COM1_IRQ),
                        ]),
                    ),
                ],
            ),
            // Without an interrupt: the clock has no alarm.
            &Device::new(
                "RTC_".into(),
                vec![
                    &Name::new("_HID".into(), &EISAName::new("PNP0B00")),
                    &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&IO::new(rtc, rtc, 1, RTC_LEN as u8)])),
                ],
            ),
        ],
    )));
    // SLP_TYP for PM1a and PM1b control, and two reserved fields.
    let s5 = Package::new(vec![&SLEEP_TYPE_S5, &SLEEP_TYPE_S5, &0u8, &0u8]);
    dsdt.append_slice(&bytes_of(&Name::new(Path::new("\\_S5_"), &s5)));
    dsdt
}

#[cfg(test)]
mod tests {
    use super::*;

    const AT: u32 = 0xe_0000;

    fn u32_at(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    /// The table at a guest address, checked as an operating system does.
    fn table(image: &AcpiImage, address: u64) -> &[u8] {
        assert_eq!(address % ALIGN as u64, 0);
        let bytes = &image.bytes[(address - u64::from(image.address)) as usize..];
        let table = &bytes[..u32_at(bytes, 4) as usize];
        if &table[..4] != b"FACS" {
            assert_eq!(sum(table), 0, "checksum of {:?}", String::from_utf8_lossy(&table[..4]));
            assert_eq!((&table[10..16], &table[16..24]), (&OEM_ID[..], &OEM_TABLE[..]));
        }
        table
    }

    /// Finds a table through the XSDT, and checks that the RSDT leads to the same.
    fn find<'a>(image: &'a AcpiImage, signature: &[u8; 4]) -> &'a [u8] {
        let rsdp = &image.bytes[..36];
        assert_eq!(&rsdp[..8], b"RSD PTR ");
        assert_eq!((sum(&rsdp[..20]), sum(rsdp), rsdp[15], u32_at(rsdp, 20)), (0, 0, 2, 36));
        let rsdt = table(image, u64::from(u32_at(rsdp, 16)));
        let xsdt = table(image, u64_at(rsdp, 24));
        assert_eq!((&rsdt[..4], &xsdt[..4]), (&b"RSDT"[..], &b"XSDT"[..]));
        let old: Vec<u64> = rsdt[36..].chunks_exact(4).map(|c| u64::from(u32_at(c, 0))).collect();
        let new: Vec<u64> = xsdt[36..].chunks_exact(8).map(|c| u64_at(c, 0)).collect();
        assert_eq!(old, new);
        new.into_iter().map(|at| table(image, at)).find(|t| &t[..4] == signature).unwrap()
    }

    /// The entries of a MADT: type and bytes behind the length.
    fn entries(madt: &[u8]) -> Vec<(u8, &[u8])> {
        let mut rest = &madt[44..];
        let mut entries = Vec::new();
        while let [kind, length, ..] = *rest {
            let (entry, next) = rest.split_at(usize::from(length));
            entries.push((kind, &entry[2..]));
            rest = next;
        }
        assert!(rest.is_empty());
        entries
    }

    #[test]
    fn the_fixed_hardware_is_where_the_devices_are() {
        let image = build(AT, 1);
        let fadt = find(&image, b"FACP");
        assert_eq!(fadt.len(), 276);
        assert_eq!(&table(&image, u64::from(u32_at(fadt, 36)))[..4], b"FACS");
        assert_eq!(&table(&image, u64::from(u32_at(fadt, 40)))[..4], b"DSDT");
        assert_eq!(u64_at(fadt, 140), u64::from(u32_at(fadt, 40)));
        assert_eq!(u16::from_le_bytes([fadt[46], fadt[47]]), 9);
        assert_eq!((u32_at(fadt, 48), u32_at(fadt, 56), u32_at(fadt, 64), u32_at(fadt, 76)), (0, 0x600, 0x604, 0x608));
        assert_eq!((fadt[88], fadt[89], fadt[91]), (4, 2, 4));
        assert_eq!(fadt[108], 0x32);
        let flags = u32_at(fadt, 112);
        assert_eq!(flags & (1 << 10 | 1 << 8 | 1 << 4 | 1 << 20), 1 << 10 | 1 << 8);
        // Reset register: I/O space, 8 bits, byte access.
        assert_eq!((&fadt[116..120], u64_at(fadt, 120), fadt[128]), (&[1, 8, 0, 1][..], 0xcf9, 6));
        assert_eq!((&fadt[148..152], u64_at(fadt, 152)), (&[1, 32, 0, 3][..], 0x600));
        assert_eq!((&fadt[172..176], u64_at(fadt, 176)), (&[1, 16, 0, 2][..], 0x604));
        assert_eq!((&fadt[208..212], u64_at(fadt, 212)), (&[1, 32, 0, 3][..], 0x608));
    }

    #[test]
    fn each_cpu_has_its_apic() {
        let image = build(AT, 3);
        let madt = find(&image, b"APIC");
        assert_eq!((u32_at(madt, 36), u32_at(madt, 40)), (0xfee0_0000, 1));
        let cpus: Vec<_> = entries(madt).into_iter().filter(|(kind, _)| *kind == 0).map(|(_, e)| e.to_vec()).collect();
        assert_eq!(cpus, [[0, 0, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0], [2, 2, 1, 0, 0, 0]]);
        assert!(entries(madt).iter().all(|(kind, _)| *kind != 9));
    }

    #[test]
    fn high_ids_are_x2apics() {
        let image = build(AT, 300);
        let madt = find(&image, b"APIC");
        let old = entries(madt).iter().filter(|(kind, _)| *kind == 0).count();
        let new: Vec<_> = entries(madt)
            .into_iter()
            .filter(|(kind, _)| *kind == 9)
            .map(|(_, e)| (u32_at(e, 2), u32_at(e, 6), u32_at(e, 10)))
            .collect();
        assert_eq!(old, 255);
        assert_eq!(new, (255..300).map(|id| (id, 1, id)).collect::<Vec<_>>());
        assert!(entries(madt).iter().any(|(kind, _)| *kind == 10));
    }

    #[test]
    fn interrupts_are_routed_as_the_board_wires_them() {
        let image = build(AT, 1);
        let madt = find(&image, b"APIC");
        let all = entries(madt);
        let of = |kind: u8| all.iter().filter(move |(k, _)| *k == kind).map(|(_, e)| e.to_vec()).collect::<Vec<_>>();
        assert_eq!(of(1), [[IO_APIC_ID, 0, 0, 0, 0xc0, 0xfe, 0, 0, 0, 0]]);
        assert_eq!(of(2), [[0, 0, 2, 0, 0, 0, 0, 0], [0, 9, 9, 0, 0, 0, 0x0d, 0]]);
        assert_eq!(of(4), [[0xff, 0, 0, 1]]);
    }

    #[test]
    fn the_dsdt_names_s5_and_the_serial_port() {
        let image = build(AT, 1);
        let fadt = find(&image, b"FACP");
        let dsdt = table(&image, u64::from(u32_at(fadt, 40)));
        let has = |wanted: &[u8]| dsdt.windows(wanted.len()).any(|window| window == wanted);
        // Name (\_S5_, Package (4) { 0, 0, 0, 0 }): zero is ZeroOp.
        assert!(has(&[0x08, b'\\', b'_', b'S', b'5', b'_', 0x12, 0x06, 0x04, 0, 0, 0, 0]));
        // EISAID ("PNP0501"), IO (Decode16, 0x3f8, 0x3f8, 1, 8), Interrupt (…) { 4 }.
        assert!(has(&[0x0c, 0x41, 0xd0, 0x05, 0x01]));
        assert!(has(&[0x47, 0x01, 0xf8, 0x03, 0xf8, 0x03, 0x01, 0x08]));
        assert!(has(&[0x89, 0x06, 0x00, 0x03, 0x01, 4, 0, 0, 0]));
    }

    #[test]
    fn the_largest_machine_fits_its_place() {
        let image = build(AT, crate::pc::MAX_CPUS);
        assert!(AT as usize + image.bytes.len() <= 0x10_0000);
        find(&image, b"APIC");
    }
}
