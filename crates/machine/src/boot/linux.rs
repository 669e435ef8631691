//! x86 Linux: `bzImage` by either entry, and `vmlinux` by the 64-bit entry, with the zero page that both take.
//!
//! Offsets and rules are those of Linux `Documentation/arch/x86/boot.rst` and `zero-page.rst`; field names are theirs.

use super::elf::{self, Elf};
use super::layout::Side;
use super::plan::{BootPlan, Builder};
use super::view::{Put, View};
use super::x86::{self, FOUR_GIB, LOW_MEMORY};
use super::{BootError, BootRequest, MAX_CMDLINE, Protocol};
use vm_accel::x86_64::Reg;

// The setup header, by its offset in the file, which is also its offset in the zero page.
const SETUP_SECTS: u64 = 0x1f1;
const SYSSIZE: u64 = 0x1f4;
const BOOT_FLAG: u64 = 0x1fe;
const JUMP: u64 = 0x201;
const HEADER: u64 = 0x202;
const VERSION: u64 = 0x206;
const TYPE_OF_LOADER: u64 = 0x210;
const LOADFLAGS: u64 = 0x211;
const CODE32_START: u64 = 0x214;
const RAMDISK_IMAGE: u64 = 0x218;
const RAMDISK_SIZE: u64 = 0x21c;
const CMD_LINE_PTR: u64 = 0x228;
const INITRD_ADDR_MAX: u64 = 0x22c;
const KERNEL_ALIGNMENT: u64 = 0x230;
const RELOCATABLE_KERNEL: u64 = 0x234;
const XLOADFLAGS: u64 = 0x236;
const CMDLINE_SIZE: u64 = 0x238;
const PREF_ADDRESS: u64 = 0x258;
const INIT_SIZE: u64 = 0x260;

const HDRS: &[u8] = b"HdrS";
const BOOT_MAGIC: u16 = 0xaa55;
const LOADED_HIGH: u8 = 1;
const XLF_KERNEL_64: u16 = 1;
const XLF_CAN_BE_LOADED_ABOVE_4G: u16 = 1 << 1;
/// "Some other boot loader".
const LOADER_UNDEFINED: u8 = 0xff;
/// Where the 64-bit entry is, from the start of the protected-mode kernel.
const ENTRY_64: u64 = 0x200;
const SECTOR: u64 = 512;

// The rest of the zero page.
const ZERO_PAGE_SIZE: usize = 0x1000;
const ACPI_RSDP_ADDR: usize = 0x070;
const EXT_RAMDISK_IMAGE: usize = 0x0c0;
const EXT_RAMDISK_SIZE: usize = 0x0c4;
const E820_ENTRIES: usize = 0x1e8;
/// The setup header must end before this: the zero page has something else there.
const SETUP_HEADER_END: u64 = 0x290;
const E820_TABLE: usize = 0x2d0;
const E820_ENTRY: usize = 20;

const PAGE: u64 = 0x1000;
const MIB: u64 = 1 << 20;
/// `initrd_addr_max` of kernels that do not state it.
const OLD_INITRD_ADDR_MAX: u32 = 0x37ff_ffff;
/// Command line bytes, without the NUL, of kernels that do not state it.
const OLD_CMDLINE_SIZE: u32 = 255;
/// Linux' COMMAND_LINE_SIZE on x86 without the NUL, which an ELF file has no field for.
const VMLINUX_CMDLINE_SIZE: usize = 2047;

/// True if the file has the setup header's magic numbers.
pub(crate) fn is_bzimage(image: &[u8]) -> bool {
    image.get(HEADER as usize..).is_some_and(|rest| rest.starts_with(HDRS))
}

/// The protocol by which a `bzImage` is best entered: the 64-bit entry if it has one.
pub(crate) fn preferred_entry(view: View<'_>) -> Result<Protocol, BootError> {
    let setup = Setup::parse(view)?;
    Ok(if setup.xloadflags & XLF_KERNEL_64 != 0 { Protocol::Linux } else { Protocol::Linux32 })
}

/// The setup header of a `bzImage`, checked as far as it goes without knowing the guest.
struct Setup<'a> {
    view: View<'a>,
    /// From [`SETUP_SECTS`] to the end that the header states: what is copied to the zero page.
    header: &'a [u8],
    /// The kernel itself.
    protected: &'a [u8],
    version: u16,
    code32_start: u64,
    initrd_addr_max: u64,
    /// `None`: not relocatable.
    alignment: Option<u64>,
    xloadflags: u16,
    cmdline_size: usize,
    pref_address: Option<u64>,
    init_size: u64,
}

impl<'a> Setup<'a> {
    fn parse(view: View<'a>) -> Result<Self, BootError> {
        if view.bytes("the setup header's magic number", HEADER, 4)? != HDRS {
            return Err(view.malformed("the setup header's magic number", "is not there; this is no bzImage"));
        }
        let boot_flag = view.u16("boot_flag", BOOT_FLAG)?;
        if boot_flag != BOOT_MAGIC {
            return Err(view.malformed("boot_flag", format!("is {boot_flag:#x}, not {BOOT_MAGIC:#x}")));
        }
        let version = view.u16("version", VERSION)?;
        if version < 0x202 {
            return Err(view.unsupported("its boot protocol is older than 2.02 (Linux 2.4)"));
        }
        if view.u8("loadflags", LOADFLAGS)? & LOADED_HIGH == 0 {
            return Err(view.unsupported("it is a zImage, which is loaded low; only bzImages can be loaded"));
        }
        // The jump over the header ends it: its operand counts from the byte behind it.
        let end = HEADER + u64::from(view.u8("the jump over the setup header", JUMP)?);
        if !(INITRD_ADDR_MAX..=SETUP_HEADER_END).contains(&end) {
            return Err(view.malformed(
                "the jump over the setup header",
                format!("ends it at {end:#x}, not between {INITRD_ADDR_MAX:#x} and {SETUP_HEADER_END:#x}"),
            ));
        }
        let header = view.bytes("the setup header", SETUP_SECTS, end - SETUP_SECTS)?;
        // A field counts from the protocol version that defined it.
        let since = |needed: u16| version >= needed;
        let u32_since = |needed, field, at, old: u32| {
            if since(needed) { view.u32(field, at) } else { Ok(old) }
        };

        let setup_sects = match view.u8("setup_sects", SETUP_SECTS)? {
            0 => 4,
            sectors => u64::from(sectors),
        };
        let start = (setup_sects + 1) * SECTOR;
        let rest = view.len().saturating_sub(start);
        // In paragraphs, rounded up: the file may lack up to 15 bytes of the last. It may have more, such as a signature.
        let stated = u64::from(u32_since(0x204, "syssize", SYSSIZE, 0)?) * 16;
        if stated.saturating_sub(rest) > 15 || rest == 0 {
            view.bytes("the protected-mode kernel (setup_sects, syssize)", start, stated.max(1))?;
        }
        let size = if stated == 0 { rest } else { stated.min(rest) };
        let protected = view.bytes("the protected-mode kernel (setup_sects, syssize)", start, size)?;

        let relocatable = since(0x205) && view.u8("relocatable_kernel", RELOCATABLE_KERNEL)? != 0;
        let alignment = relocatable.then(|| view.u32("kernel_alignment", KERNEL_ALIGNMENT)).transpose()?;
        if let Some(alignment) = alignment
            && !(alignment.is_power_of_two() && (0x1000..=1 << 30).contains(&alignment))
        {
            return Err(view.malformed(
                "kernel_alignment",
                format!("is {alignment:#x}, not a power of two between 4 KiB and 1 GiB"),
            ));
        }
        let pref_address = since(0x20a).then(|| view.u64("pref_address", PREF_ADDRESS)).transpose()?;
        Ok(Self {
            view,
            header,
            protected,
            version,
            code32_start: u64::from(view.u32("code32_start", CODE32_START)?),
            initrd_addr_max: u32_since(0x203, "initrd_addr_max", INITRD_ADDR_MAX, OLD_INITRD_ADDR_MAX)?.into(),
            alignment: alignment.map(u64::from),
            xloadflags: if since(0x20c) { view.u16("xloadflags", XLOADFLAGS)? } else { 0 },
            cmdline_size: u32_since(0x206, "cmdline_size", CMDLINE_SIZE, OLD_CMDLINE_SIZE)? as usize,
            pref_address: pref_address.filter(|&address| address != 0),
            init_size: u32_since(0x20a, "init_size", INIT_SIZE, 0)?.into(),
        })
    }

    /// Loads the kernel and takes the memory that it needs until it reads the memory map. Returns its address.
    fn place(&self, builder: &mut Builder<'a>) -> Result<u64, BootError> {
        const WHAT: &str = "the kernel (pref_address, init_size)";
        let file_size = self.protected.len() as u64;
        let needed = self.init_size.max(file_size);
        let Some(alignment) = self.alignment else {
            // Runs at its load address only, and may move itself to a preferred address above.
            let load = self.code32_start;
            let moved = self.pref_address.map_or(0, |to| to.saturating_sub(load));
            let what = "the kernel (code32_start, pref_address, init_size)";
            builder.place(what, load, needed.saturating_add(moved), self.protected)?;
            return Ok(load);
        };
        // A kernel loaded below its preferred address moves itself there, so that is the lowest.
        let lowest = self.pref_address.unwrap_or(MIB);
        if lowest.is_multiple_of(alignment) && lowest.checked_add(needed).is_some_and(|end| end <= FOUR_GIB) {
            match builder.place(WHAT, lowest, needed, self.protected) {
                // Too little memory below a hole, perhaps; there may be more above it.
                Err(BootError::OutsideRam { .. }) => {}
                placed => return placed.map(|()| lowest),
            }
        }
        let load = builder.reserve(WHAT, needed, alignment, lowest..FOUR_GIB, Side::Bottom)?;
        builder.fill(WHAT, load, self.protected, needed - file_size);
        Ok(load)
    }
}

/// Plans a `bzImage`, by its 64-bit entry or, for [`Protocol::Linux32`], its 32-bit one.
pub(crate) fn bzimage<'a>(
    request: &BootRequest<'a>,
    protocol: Protocol,
    mut builder: Builder<'a>,
) -> Result<BootPlan<'a>, BootError> {
    let setup = Setup::parse(request.view(protocol))?;
    let long = protocol == Protocol::Linux;
    if long && setup.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(setup.view.unsupported("has no 64-bit entry (xloadflags); choose the protocol linux32"));
    }
    if long && setup.protected.len() as u64 <= ENTRY_64 {
        return Err(setup.view.malformed("the protected-mode kernel", "ends before its 64-bit entry at 0x200"));
    }
    let mut zero_page = ZeroPage::new();
    zero_page.page.put(SETUP_SECTS as usize, setup.header);
    zero_page.page.put(TYPE_OF_LOADER as usize, &[LOADER_UNDEFINED]);

    let load = setup.place(&mut builder)?;
    let limit = InitrdLimit {
        below: setup.initrd_addr_max + 1,
        above_4_gib: long && setup.version >= 0x20c && setup.xloadflags & XLF_CAN_BE_LOADED_ABOVE_4G != 0,
    };
    zero_page.put_initrd(request, protocol, &mut builder, limit)?;
    zero_page.put_cmdline(request, protocol, &mut builder, setup.cmdline_size)?;
    let zero_page = zero_page.place(request, &mut builder)?;
    let state = if long {
        x86::enter_long64(&mut builder, load + ENTRY_64, &[(Reg::Rsi, zero_page)])?
    } else {
        x86::enter_protected32(&mut builder, load, &[(Reg::Rsi, zero_page)])?
    };
    Ok(builder.finish(state))
}

/// Plans an ELF64 kernel by Linux' 64-bit entry, with a zero page made from nothing.
pub(crate) fn vmlinux<'a>(request: &BootRequest<'a>, mut builder: Builder<'a>) -> Result<BootPlan<'a>, BootError> {
    let protocol = Protocol::Elf;
    let view = request.view(protocol);
    let elf = Elf::parse(view)?;
    elf::require_machine(
        &elf,
        &[elf::EM_X86_64],
        "62 (x86-64); a 32-bit kernel needs a PVH note or a multiboot header",
    )?;
    if !elf.is_64bit {
        return Err(view.malformed("e_ident[EI_CLASS]", "is 1: a 32-bit file has no 64-bit entry"));
    }
    let entry = elf::require_below_4_gib(elf.physical_entry()?, protocol)?;
    elf.place(&mut builder)?;

    let mut zero_page = ZeroPage::new();
    // What the kernel's own header would say: the fields that it checks or that are not zero.
    zero_page.page.put_u16(BOOT_FLAG as usize, BOOT_MAGIC);
    zero_page.page.put(HEADER as usize, HDRS);
    zero_page.page.put_u16(VERSION as usize, 0x20c);
    zero_page.page.put(TYPE_OF_LOADER as usize, &[LOADER_UNDEFINED, LOADED_HIGH]);
    zero_page.page.put_u32(CMDLINE_SIZE as usize, VMLINUX_CMDLINE_SIZE as u32);
    let limit = InitrdLimit { below: FOUR_GIB, above_4_gib: true };
    zero_page.put_initrd(request, protocol, &mut builder, limit)?;
    zero_page.put_cmdline(request, protocol, &mut builder, VMLINUX_CMDLINE_SIZE)?;
    let zero_page = zero_page.place(request, &mut builder)?;
    let state = x86::enter_long64(&mut builder, entry, &[(Reg::Rsi, zero_page)])?;
    Ok(builder.finish(state))
}

/// Where a kernel takes an initial RAM disk.
struct InitrdLimit {
    /// It ends at or below this address,
    below: u64,
    /// unless the kernel also takes one anywhere.
    above_4_gib: bool,
}

/// `struct boot_params`.
struct ZeroPage {
    page: Vec<u8>,
}

impl ZeroPage {
    fn new() -> Self {
        Self { page: vec![0; ZERO_PAGE_SIZE] }
    }

    fn put_initrd<'a>(
        &mut self,
        request: &BootRequest<'a>,
        protocol: Protocol,
        builder: &mut Builder<'a>,
        limit: InitrdLimit,
    ) -> Result<(), BootError> {
        const WHAT: &str = "the initial RAM disk (initrd_addr_max)";
        let Some(data) = request.initrd(protocol)? else {
            return Ok(());
        };
        let mut place = |end| builder.put(WHAT, data, PAGE, MIB..end, Side::Top);
        let address = match place(if limit.above_4_gib { FOUR_GIB } else { limit.below }) {
            Err(BootError::NoRoom { .. }) if limit.above_4_gib => place(super::MAX_ADDRESS)?,
            placed => placed?,
        };
        let size = data.len() as u64;
        self.page.put_u32(RAMDISK_IMAGE as usize, address as u32);
        self.page.put_u32(EXT_RAMDISK_IMAGE, (address >> 32) as u32);
        self.page.put_u32(RAMDISK_SIZE as usize, size as u32);
        self.page.put_u32(EXT_RAMDISK_SIZE, (size >> 32) as u32);
        builder.initrd = Some(address..address + size);
        Ok(())
    }

    fn put_cmdline(
        &mut self,
        request: &BootRequest<'_>,
        protocol: Protocol,
        builder: &mut Builder<'_>,
        max: usize,
    ) -> Result<(), BootError> {
        let bytes = request.cmdline_bytes(protocol, max.min(MAX_CMDLINE))?;
        let address = builder.put("the command line", bytes, 16, LOW_MEMORY, Side::Bottom)?;
        self.page.put_u32(CMD_LINE_PTR as usize, address as u32);
        Ok(())
    }

    /// Adds the memory map and puts the page into conventional memory. Returns its address.
    fn place(mut self, request: &BootRequest<'_>, builder: &mut Builder<'_>) -> Result<u64, BootError> {
        let ranges = request.memory.ranges();
        // At most MAX_RANGES, which is 128.
        self.page.put(E820_ENTRIES, &[ranges.len() as u8]);
        for (range, at) in ranges.iter().zip((E820_TABLE..).step_by(E820_ENTRY)) {
            self.page.put_u64(at, range.base);
            self.page.put_u64(at + 8, range.size);
            self.page.put_u32(at + 16, range.kind as u32);
        }
        self.page.put_u64(ACPI_RSDP_ADDR, request.acpi_rsdp.unwrap_or(0));
        builder.put("the zero page", self.page, PAGE, LOW_MEMORY, Side::Bottom)
    }
}
