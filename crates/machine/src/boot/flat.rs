//! Images without a header on x86: a flat binary in real mode, and firmware at the reset vector.

use super::plan::{BootPlan, BootState, Builder, Mapping};
use super::x86::{self, FOUR_GIB, X86BootState, X86Mode};
use super::{BootError, BootRequest, Protocol};
use vm_accel::x86_64::{DescriptorTable, Reg, Segment, X86Sregs};

/// The drive number of the first hard disk, which a BIOS leaves in DL for a boot sector.
const FIRST_HARD_DISK: u64 = 0x80;
/// Lowest address that a stack below the binary may begin at: above interrupt vectors and BIOS data.
const LOWEST_STACK: u64 = 0x600;
const SEGMENT_SIZE: u64 = 0x1_0000;
/// What real-mode segments reach with selectors that are a multiple of 16 bytes.
const REAL_MODE_END: u64 = 0x10_0000;

const PAGE: u64 = 0x1000;
/// Largest firmware image: it must not reach down to the local APIC and I/O APIC at 0xfec0_0000 and 0xfee0_0000.
const MAX_FIRMWARE: u64 = 16 << 20;
/// How much of the image's end appears below 1 MiB, where 16-bit code looks for it.
const LEGACY_SIZE: u64 = 128 << 10;
/// Processor signature in EDX after reset: family 6 (Intel SDM vol. 3, 10.1.1).
const RESET_EDX: u64 = 0x600;
/// The magic number of a UEFI firmware volume, from its start.
const FIRMWARE_VOLUME_MAGIC_AT: usize = 40;
/// The reset vector, from the end of the image.
const RESET_VECTOR: u64 = 16;

/// True for a boot sector: 512 bytes with its signature.
pub(crate) fn is_boot_sector(image: &[u8]) -> bool {
    image.len() == 512 && image.ends_with(&[0x55, 0xaa])
}

/// True if it has a firmware image's size and what looks like code at the reset vector.
pub(crate) fn is_firmware(image: &[u8]) -> bool {
    let size = image.len() as u64;
    if !(SEGMENT_SIZE..=MAX_FIRMWARE).contains(&size) || !size.is_multiple_of(PAGE) {
        return false;
    }
    let vector = &image[image.len() - RESET_VECTOR as usize..];
    // A far jump (BIOS), or a near or short one, perhaps behind two NOPs.
    let jumps: &[&[u8]] = &[b"\xea", b"\xe9", b"\xeb", b"\x90\x90\xe9", b"\x90\x90\xeb"];
    // UEFI may have any code there, but begins with a firmware volume (UEFI PI 1.8, vol. 3, 3.2.1). Its store of
    // variables does too, and has nothing there.
    let is_volume = image[FIRMWARE_VOLUME_MAGIC_AT..].starts_with(b"_FVH");
    jumps.iter().any(|jump| vector.starts_with(jump)) || (is_volume && vector.iter().any(|&byte| byte != 0xff))
}

/// Plans a binary that runs in real mode where it is loaded.
///
/// Below 64 KiB CS is 0 and IP the address, so that code may be linked at its absolute address; above, CS:IP is address/16
/// and the rest. The data segments and SS are 0, SP is below the binary, DL names the first hard disk.
pub(crate) fn real_mode<'a>(request: &BootRequest<'a>, mut builder: Builder<'a>) -> Result<BootPlan<'a>, BootError> {
    let protocol = Protocol::Flat;
    request.takes_no_arguments(protocol)?;
    let address = request.flat_address;
    let size = request.image.len() as u64;
    if address >= REAL_MODE_END {
        let detail = format!("({address:#x}) is not below 1 MiB, which is all that real mode reaches");
        return Err(request.view(protocol).malformed("the load address", detail));
    }
    builder.place("the binary", address, size, request.image)?;
    let (selector, ip) = if address < SEGMENT_SIZE { (0, address) } else { ((address >> 4) as u16, address & 0xf) };
    let stack = if (LOWEST_STACK..SEGMENT_SIZE).contains(&address) {
        address & !1
    } else if address < LOWEST_STACK {
        // The first push wraps to the top of the segment.
        0
    } else {
        super::DEFAULT_FLAT_ADDRESS
    };
    let mut sregs = x86::real_mode();
    sregs.cs = Segment { segment_type: 0xb, ..Segment::real_mode(selector) };
    let state = BootState::X86(X86BootState {
        mode: X86Mode::Real,
        regs: x86::registers(ip, &[(Reg::Rsp, stack), (Reg::Rdx, FIRST_HARD_DISK)]),
        sregs,
    });
    Ok(builder.finish(state))
}

/// Plans a firmware image: read-only below 4 GiB, a writable copy of its end below 1 MiB, the CPU as after reset.
///
/// The copy is RAM because BIOSes run from it and store to it, which a PC's chipset lets them do after a while.
pub(crate) fn firmware<'a>(request: &BootRequest<'a>, mut builder: Builder<'a>) -> Result<BootPlan<'a>, BootError> {
    let protocol = Protocol::Firmware;
    request.takes_no_arguments(protocol)?;
    let image = request.image;
    let size = image.len() as u64;
    if !size.is_multiple_of(PAGE) || size > MAX_FIRMWARE {
        let detail = format!("is {size} bytes; it must be a multiple of 4 KiB, at most 16 MiB");
        return Err(request.view(protocol).malformed("the size", detail));
    }
    let base = FOUR_GIB - size;
    let legacy = size.min(LEGACY_SIZE);
    let legacy_base = REAL_MODE_END - legacy;
    for (gpa, end, what) in
        [(base, FOUR_GIB, "the firmware"), (legacy_base, REAL_MODE_END, "the firmware's legacy copy")]
    {
        if let Some(other) = request.memory.ram().find(|ram| ram.base < end && gpa < ram.end()) {
            return Err(BootError::Overlap {
                protocol,
                what,
                start: gpa,
                end,
                other: "RAM of the memory map",
                other_start: other.base,
                other_end: other.end(),
            });
        }
    }
    builder.mappings = vec![
        Mapping { what: "firmware", gpa: base, data: image, writable: false },
        Mapping {
            what: "firmware (legacy copy)",
            gpa: legacy_base,
            data: &image[(size - legacy) as usize..],
            writable: true,
        },
    ];
    let table = DescriptorTable { base: 0, limit: 0xffff };
    let sregs = X86Sregs {
        // Selector and base do not match until the first far jump (Intel SDM vol. 3, 10.1.4).
        cs: Segment { segment_type: 0xb, base: 0xffff_0000, ..Segment::real_mode(0xf000) },
        gdt: table,
        idt: table,
        // Caches off until the firmware turns them on.
        cr0: 0x6000_0010,
        ..x86::real_mode()
    };
    let state = BootState::X86(X86BootState {
        mode: X86Mode::Real,
        regs: x86::registers(SEGMENT_SIZE - RESET_VECTOR, &[(Reg::Rdx, RESET_EDX)]),
        sregs,
    });
    Ok(builder.finish(state))
}
