//! Guest memory: mapping, unmapping and protecting it, also while the guest runs; read-only memory; the dirty log.

use crate::harness::{Host, Machine, Outcome, cases, fail};
use std::io::{Read, Seek, SeekFrom, Write};
use std::sync::atomic::Ordering;
use vm_accel::x86_64::Reg;
use vm_accel::{AccelError, FileMapping, GuestMemory, GuestRegion, IrqChip, MemoryFlags, VcpuExit};
use vm_accel_guests::asm::*;
use vm_accel_guests::world::{World, layout};

cases![
    read_only_memory_exits_on_writes[ReadOnlyMemory],
    code_runs_from_read_only_memory[ReadOnlyMemory],
    read_only_memory_refuses_read_modify_write[ReadOnlyMemory],
    protect_and_unprotect[ReadOnlyMemory],
    read_only_host_memory_cannot_be_writable[ReadOnlyMemory],
    dirty_log_has_guest_and_host_writes[DirtyLog],
    dirty_log_of_many_pages[DirtyLog],
    dirty_log_starts_and_stops[DirtyLog],
    dirty_log_of_an_unlogged_mapping_is_refused[DirtyLog],
    unmapped_memory_is_mmio,
    unmap_while_running,
    map_while_running,
    remap_replaces_the_memory,
    remap_of_another_size_is_refused,
    overlaps_are_refused,
    misaligned_and_overflowing_are_refused,
    zero_size_is_refused,
    unknown_mappings_are_refused,
    too_many_mappings_are_refused,
    refused_calls_change_nothing,
    two_windows_on_one_region,
    two_windows_of_which_one_is_logged[DirtyLog],
    mapping_keeps_memory_alive,
    shared_file_sees_guest_writes,
    private_file_does_not_see_guest_writes,
    host_writes_are_seen,
    guest_and_host_share_atomics,
    guest_memory_finds_regions,
];

/// Where the cases map a region of their own: inside the identity map of the worlds, outside their RAM.
const WINDOW: u64 = 0x4000_0000;
const PAGE: u64 = 0x1000;

/// A ring 0 guest with a loop: stores EAX to the address in RDI, reads it back to EBX, and halts.
fn store_and_load(host: &Host) -> Outcome<Machine> {
    Machine::long(host, |a| {
        let mut again = a.create_label();
        a.mov(edi, WINDOW as u32)?;
        a.mov(eax, 0x55aa)?;
        a.set_label(&mut again)?;
        a.mov(dword_ptr(rdi), eax)?;
        a.mov(ebx, dword_ptr(rdi))?;
        a.hlt()?;
        a.jmp(again)
    })
}

fn word(region: &GuestRegion, offset: u64) -> Outcome<u32> {
    let mut bytes = [0; 4];
    region.read(offset, &mut bytes)?;
    Ok(u32::from_le_bytes(bytes))
}

/// The call was refused as an invalid argument, and the text names the address.
fn assert_invalid<T: std::fmt::Debug>(result: Result<T, AccelError>, names: u64) {
    let text = match &result {
        Err(error @ AccelError::InvalidArgument { .. }) => error.to_string(),
        other => panic!("not an invalid argument: {other:?}"),
    };
    assert!(text.contains(&format!("{names:#x}")), "{text:?} does not name {names:#x}");
}

fn read_only_memory_exits_on_writes(host: &Host) -> Outcome {
    let mut m = store_and_load(host)?;
    let rom = GuestRegion::anonymous(PAGE)?;
    rom.write(0, &[1, 2, 3, 4])?;
    m.vm.map_memory(WINDOW, &rom, MemoryFlags::ROM)?;
    m.expect_mmio_write(WINDOW, &0x55aau32.to_le_bytes())?;
    m.expect_halted()?;
    assert_eq!(m.gpr(Reg::Rbx)?, 0x0403_0201);
    assert_eq!(word(&rom, 0)?, 0x0403_0201);
    Ok(())
}

fn code_runs_from_read_only_memory(host: &Host) -> Outcome {
    let mut world = World::long();
    world.cpu.rip = WINDOW + 0x10;
    let mut m = Machine::new(host, &world)?;
    let rom = GuestRegion::anonymous(PAGE)?;
    let code = vm_accel_guests::assemble(world.bits, WINDOW + 0x10, |a| {
        a.mov(eax, 77)?;
        a.out(0x10, al)?;
        a.hlt()
    });
    rom.write(0x10, &code)?;
    m.vm.map_memory(WINDOW, &rom, MemoryFlags::ROM)?;
    m.expect_out_data(0x10, &[77])?;
    m.expect_halted()
}

/// The read comes from the memory, only the write exits.
fn read_only_memory_refuses_read_modify_write(host: &Host) -> Outcome {
    let mut m = Machine::long(host, |a| {
        a.mov(edi, WINDOW as u32)?;
        a.add(dword_ptr(rdi + 8), 1)?;
        a.hlt()
    })?;
    let rom = GuestRegion::anonymous(PAGE)?;
    rom.write(8, &[41])?;
    m.vm.map_memory(WINDOW, &rom, MemoryFlags::ROM)?;
    m.expect_mmio_write(WINDOW + 8, &[42, 0, 0, 0])?;
    m.expect_halted()?;
    assert_eq!(word(&rom, 8)?, 41);
    Ok(())
}

fn protect_and_unprotect(host: &Host) -> Outcome {
    let mut m = store_and_load(host)?;
    let region = GuestRegion::anonymous(4 * PAGE)?;
    m.vm.map_memory(WINDOW, &region, MemoryFlags::RAM)?;
    m.expect_halted()?;
    assert_eq!(word(&region, 0)?, 0x55aa);
    region.write(0, &[0; 4])?;

    m.vm.protect_memory(WINDOW, MemoryFlags::ROM)?;
    m.expect_mmio_write(WINDOW, &0x55aau32.to_le_bytes())?;
    m.expect_halted()?;
    assert_eq!((word(&region, 0)?, m.gpr(Reg::Rbx)?), (0, 0));

    m.vm.protect_memory(WINDOW, MemoryFlags::RAM)?;
    m.expect_halted()?;
    assert_eq!((word(&region, 0)?, m.gpr(Reg::Rbx)?), (0x55aa, 0x55aa));
    Ok(())
}

/// A temporary file that has no name any more.
fn temporary_file(content: &[u8]) -> Outcome<std::fs::File> {
    use std::sync::atomic::AtomicU32;
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let path = std::env::temp_dir().join(format!("vm-accel-conformance-{}-{number}", std::process::id()));
    let mut file = std::fs::File::options().read(true).write(true).create_new(true).open(&path)?;
    // Windows refuses to remove an open file; there the temporary folder keeps it.
    let _ = std::fs::remove_file(&path);
    file.write_all(content)?;
    Ok(file)
}

fn read_only_host_memory_cannot_be_writable(host: &Host) -> Outcome {
    let mut m = store_and_load(host)?;
    let file = temporary_file(&[7; 4096])?;
    let region = GuestRegion::from_file(&file, 0, PAGE, FileMapping::ReadOnly)?;
    assert!(!region.is_writable());
    assert_invalid(m.vm.map_memory(WINDOW, &region, MemoryFlags::RAM), WINDOW);
    m.vm.map_memory(WINDOW, &region, MemoryFlags::ROM)?;
    assert_invalid(m.vm.protect_memory(WINDOW, MemoryFlags::RAM), WINDOW);
    m.expect_mmio_write(WINDOW, &0x55aau32.to_le_bytes())?;
    m.expect_halted()?;
    assert_eq!(m.gpr(Reg::Rbx)?, 0x0707_0707);
    Ok(())
}

/// The log may say more than was written (platforms may count reads), never less, and a second look finds it cleared.
fn dirty_log_has_guest_and_host_writes(host: &Host) -> Outcome {
    let mut m = Machine::long(host, |a| {
        let mut again = a.create_label();
        a.mov(edi, WINDOW as u32)?;
        a.set_label(&mut again)?;
        a.mov(byte_ptr(rdi + PAGE as u32), 1)?;
        // A write across a page boundary, and the last byte.
        a.mov(dword_ptr(rdi + 4 * PAGE as u32 - 2), 2)?;
        a.mov(byte_ptr(rdi + 70 * PAGE as u32 - 1), 3)?;
        a.hlt()?;
        a.mov(byte_ptr(rdi + 9 * PAGE as u32), 4)?;
        a.hlt()?;
        a.jmp(again)
    })?;
    let region = GuestRegion::anonymous(70 * PAGE)?;
    m.vm.map_memory(WINDOW, &region, MemoryFlags::RAM | MemoryFlags::LOG_DIRTY)?;
    let is_dirty = |log: &vm_accel::DirtyBitmap, page: u64| log.is_dirty(WINDOW + page * PAGE);

    m.vm.take_dirty(WINDOW)?;
    m.expect_halted()?;
    region.write(20 * PAGE - 1, &[1, 2])?;
    let log = m.vm.take_dirty(WINDOW)?;
    assert_eq!((log.base(), log.size()), (WINDOW, 70 * PAGE));
    for page in [1, 3, 4, 69, 19, 20] {
        assert!(is_dirty(&log, page), "page {page} was written and is not in the log");
    }
    assert_eq!(m.vm.take_dirty(WINDOW)?.count(), 0, "nothing was written since");

    m.expect_halted()?;
    let log = m.vm.take_dirty(WINDOW)?;
    assert!(is_dirty(&log, 9));
    for page in [1, 19, 69] {
        assert!(!is_dirty(&log, page), "page {page} was not touched since the last look");
    }

    // A page that was logged and cleared is logged again.
    m.expect_halted()?;
    let log = m.vm.take_dirty(WINDOW)?;
    assert!(is_dirty(&log, 1) && is_dirty(&log, 69));
    Ok(())
}

/// More pages than a platform's buffer of dirty pages holds: none is lost when it overflows in the middle of a run.
/// In ring 3: hosts that interpret ring 0 do so without a look at the buffer.
fn dirty_log_of_many_pages(host: &Host) -> Outcome {
    const PAGES: u64 = 3000;
    let world = World::user().code(|a| {
        let mut page = a.create_label();
        a.mov(edi, WINDOW as u32)?;
        a.mov(ecx, PAGES as u32)?;
        a.set_label(&mut page)?;
        a.inc(byte_ptr(rdi))?;
        // Every other page.
        a.add(edi, 2 * PAGE as i32)?;
        a.dec(ecx)?;
        a.jnz(page)?;
        a.ud2()
    });
    let mut m = Machine::new(host, &world)?;
    let region = GuestRegion::anonymous(2 * PAGES * PAGE)?;
    m.vm.map_memory(WINDOW, &region, MemoryFlags::RAM | MemoryFlags::LOG_DIRTY)?;
    m.vm.take_dirty(WINDOW)?;
    m.expect_vector(6)?;
    let log = m.vm.take_dirty(WINDOW)?;
    for page in (0..2 * PAGES).step_by(2) {
        assert!(log.is_dirty(WINDOW + page * PAGE), "page {page} was written and is not in the log");
    }
    Ok(())
}

fn dirty_log_starts_and_stops(host: &Host) -> Outcome {
    let mut m = store_and_load(host)?;
    let region = GuestRegion::anonymous(8 * PAGE)?;
    m.vm.map_memory(WINDOW, &region, MemoryFlags::RAM)?;
    m.expect_halted()?;
    m.vm.protect_memory(WINDOW, MemoryFlags::RAM | MemoryFlags::LOG_DIRTY)?;
    m.vm.take_dirty(WINDOW)?;
    m.expect_halted()?;
    assert!(m.vm.take_dirty(WINDOW)?.is_dirty(WINDOW));
    m.vm.protect_memory(WINDOW, MemoryFlags::RAM)?;
    m.expect_halted()?;
    assert_invalid(m.vm.take_dirty(WINDOW), WINDOW);
    m.vm.protect_memory(WINDOW, MemoryFlags::RAM | MemoryFlags::LOG_DIRTY)?;
    m.vm.take_dirty(WINDOW)?;
    m.expect_halted()?;
    assert!(m.vm.take_dirty(WINDOW)?.is_dirty(WINDOW));
    Ok(())
}

fn dirty_log_of_an_unlogged_mapping_is_refused(host: &Host) -> Outcome {
    let mut vm = host.vm()?;
    let region = GuestRegion::anonymous(PAGE)?;
    vm.map_memory(WINDOW, &region, MemoryFlags::RAM)?;
    assert_invalid(vm.take_dirty(WINDOW), WINDOW);
    assert_invalid(vm.take_dirty(WINDOW + PAGE), WINDOW + PAGE);
    Ok(())
}

fn unmapped_memory_is_mmio(host: &Host) -> Outcome {
    let mut m = store_and_load(host)?;
    let region = GuestRegion::anonymous(PAGE)?;
    m.vm.map_memory(WINDOW, &region, MemoryFlags::RAM)?;
    m.expect_halted()?;
    assert_eq!(word(&region, 0)?, 0x55aa);
    m.vm.unmap_memory(WINDOW)?;
    m.expect_mmio_write(WINDOW, &0x55aau32.to_le_bytes())?;
    m.expect_mmio_read(WINDOW, &[9, 0, 0, 0])?;
    m.expect_halted()?;
    assert_eq!(m.gpr(Reg::Rbx)?, 9);
    m.vm.map_memory(WINDOW, &region, MemoryFlags::RAM)?;
    m.expect_halted()?;
    assert_eq!(m.gpr(Reg::Rbx)?, 0x55aa);
    Ok(())
}

/// A guest that increments a counter at [`WINDOW`] for ever.
fn counting_guest(host: &Host) -> Outcome<Machine> {
    Machine::long(host, |a| {
        let mut again = a.create_label();
        a.mov(edi, WINDOW as u32)?;
        a.xor(eax, eax)?;
        a.set_label(&mut again)?;
        a.inc(eax)?;
        a.mov(dword_ptr(rdi), eax)?;
        a.jmp(again)
    })
}

/// Waits until the guest has written something else than `old` to the start of the region.
fn wait_for_change(host: &Host, region: &GuestRegion, old: u32) -> u32 {
    while host.in_time() {
        let now = region.load::<u32>(0, Ordering::Acquire).expect("inside the region");
        if now != old {
            return now;
        }
        std::thread::yield_now();
    }
    old
}

fn unmap_while_running(host: &Host) -> Outcome {
    let mut m = counting_guest(host)?;
    let region = GuestRegion::anonymous(PAGE)?;
    m.vm.map_memory(WINDOW, &region, MemoryFlags::RAM)?;
    let Machine { mut vcpu, mut vm, .. } = m;
    std::thread::scope(|scope| {
        let helper = scope.spawn(|| {
            let seen = wait_for_change(host, &region, 0);
            wait_for_change(host, &region, seen);
            vm.unmap_memory(WINDOW)
        });
        let exit = vcpu.run()?;
        let count = vcpu.io_data().map(<[u8]>::to_vec);
        helper.join().expect("the helper does not panic")?;
        let expected = VcpuExit::Mmio { addr: WINDOW, size: 4, is_write: true };
        assert_eq!(exit, expected);
        // Nothing is lost: the exit carries the count after the last one in memory.
        let last = word(&region, 0)?;
        assert_eq!(count?, last.wrapping_add(1).to_le_bytes());
        Ok(())
    })
}

fn map_while_running(host: &Host) -> Outcome {
    // The guest counts in RAM; meanwhile the host maps and unmaps elsewhere, then shows it a flag.
    let mut m = Machine::long(host, |a| {
        let mut again = a.create_label();
        a.mov(edi, layout::DATA as u32)?;
        a.set_label(&mut again)?;
        a.inc(dword_ptr(rdi))?;
        a.cmp(dword_ptr(rdi + 8), 0)?;
        a.je(again)?;
        a.mov(esi, WINDOW as u32)?;
        a.mov(eax, dword_ptr(rsi))?;
        a.hlt()
    })?;
    let region = GuestRegion::anonymous(PAGE)?;
    region.write(0, &[1, 2, 3, 4])?;
    let ram = m.ram.clone();
    let Machine { vcpu, vm, .. } = &mut m;
    std::thread::scope(|scope| {
        let helper = scope.spawn(|| -> Result<(), AccelError> {
            for _ in 0..20 {
                vm.map_memory(WINDOW, &region, MemoryFlags::RAM)?;
                vm.unmap_memory(WINDOW)?;
            }
            vm.map_memory(WINDOW, &region, MemoryFlags::RAM)?;
            ram.store::<u32>(layout::DATA + 8, 1, Ordering::Release)
        });
        let exit = vcpu.run()?;
        helper.join().expect("the helper does not panic")?;
        assert_eq!(exit, VcpuExit::Halted);
        assert_eq!(vcpu.get_regs()?.gpr[Reg::Rax as usize], 0x0403_0201);
        Ok(())
    })
}

fn remap_replaces_the_memory(host: &Host) -> Outcome {
    let mut m = Machine::long(host, |a| {
        let mut again = a.create_label();
        a.mov(edi, WINDOW as u32)?;
        a.set_label(&mut again)?;
        a.mov(ebx, dword_ptr(rdi))?;
        a.mov(dword_ptr(rdi + 8), ebx)?;
        a.hlt()?;
        a.jmp(again)
    })?;
    let regions = [GuestRegion::anonymous(PAGE)?, GuestRegion::anonymous(PAGE)?];
    for (region, byte) in regions.iter().zip([1, 2]) {
        region.write(0, &[byte])?;
    }
    m.vm.map_memory(WINDOW, &regions[0], MemoryFlags::RAM)?;
    m.expect_halted()?;
    assert_eq!(m.gpr(Reg::Rbx)?, 1);
    m.vm.remap_memory(WINDOW, &regions[1], MemoryFlags::RAM)?;
    m.expect_halted()?;
    assert_eq!(m.gpr(Reg::Rbx)?, 2);
    m.vm.remap_memory(WINDOW, &regions[0], MemoryFlags::RAM)?;
    m.expect_halted()?;
    assert_eq!(m.gpr(Reg::Rbx)?, 1);
    assert_eq!((word(&regions[0], 8)?, word(&regions[1], 8)?), (1, 2));
    Ok(())
}

fn remap_of_another_size_is_refused(host: &Host) -> Outcome {
    let mut m = store_and_load(host)?;
    let small = GuestRegion::anonymous(PAGE)?;
    let large = GuestRegion::anonymous(2 * PAGE)?;
    m.vm.map_memory(WINDOW, &small, MemoryFlags::RAM)?;
    assert_invalid(m.vm.remap_memory(WINDOW, &large, MemoryFlags::RAM), WINDOW);
    assert_invalid(m.vm.remap_memory(WINDOW + PAGE, &small, MemoryFlags::RAM), WINDOW + PAGE);
    m.expect_halted()?;
    assert_eq!(word(&small, 0)?, 0x55aa);
    Ok(())
}

fn overlaps_are_refused(host: &Host) -> Outcome {
    let mut vm = host.vm()?;
    let four = GuestRegion::anonymous(4 * PAGE)?;
    let one = GuestRegion::anonymous(PAGE)?;
    vm.map_memory(WINDOW, &four, MemoryFlags::RAM)?;
    for (region, gpa) in [
        (&four, WINDOW),
        (&one, WINDOW),
        (&one, WINDOW + PAGE),
        (&one, WINDOW + 3 * PAGE),
        (&four, WINDOW - PAGE),
        (&four, WINDOW - 3 * PAGE),
        (&four, WINDOW + 3 * PAGE),
    ] {
        assert_invalid(vm.map_memory(gpa, region, MemoryFlags::RAM), gpa);
    }
    let eight = GuestRegion::anonymous(8 * PAGE)?;
    let around = WINDOW - 2 * PAGE;
    assert_invalid(vm.map_memory(around, &eight, MemoryFlags::RAM), around);
    // Neighbours do not overlap.
    vm.map_memory(WINDOW - PAGE, &one, MemoryFlags::RAM)?;
    vm.map_memory(WINDOW + 4 * PAGE, &one, MemoryFlags::RAM)?;
    Ok(())
}

fn misaligned_and_overflowing_are_refused(host: &Host) -> Outcome {
    let mut vm = host.vm()?;
    let page = host.caps.page_size;
    let one = GuestRegion::anonymous(page)?;
    let two = GuestRegion::anonymous(2 * page)?;
    for gpa in [1, WINDOW + 0x800, WINDOW + page - 1, u64::MAX] {
        assert_invalid(vm.map_memory(gpa, &one, MemoryFlags::RAM), gpa);
    }
    let last = 0u64.wrapping_sub(page);
    assert_invalid(vm.map_memory(last, &two, MemoryFlags::RAM), last);
    if host.caps.guest_phys_bits != 0 {
        let beyond = 1u64 << host.caps.guest_phys_bits;
        assert_invalid(vm.map_memory(beyond, &one, MemoryFlags::RAM), beyond);
        assert_invalid(vm.map_memory(beyond - page, &two, MemoryFlags::RAM), beyond - page);
        vm.map_memory(beyond - page, &one, MemoryFlags::RAM)?;
    }
    assert_invalid(vm.map_memory(WINDOW, &one, MemoryFlags::WRITE), WINDOW);
    Ok(())
}

fn zero_size_is_refused(_: &Host) -> Outcome {
    let zero = GuestRegion::anonymous(0);
    assert!(matches!(zero, Err(AccelError::InvalidArgument { .. })), "{zero:?}");
    let file = temporary_file(&[1; 4096])?;
    let zero = GuestRegion::from_file(&file, 0, 0, FileMapping::Shared);
    assert!(matches!(zero, Err(AccelError::InvalidArgument { .. })), "{zero:?}");
    Ok(())
}

fn unknown_mappings_are_refused(host: &Host) -> Outcome {
    let mut vm = host.vm()?;
    let region = GuestRegion::anonymous(2 * PAGE)?;
    vm.map_memory(WINDOW, &region, MemoryFlags::RAM)?;
    for gpa in [0, WINDOW + PAGE, WINDOW - PAGE] {
        assert_invalid(vm.unmap_memory(gpa), gpa);
        assert_invalid(vm.protect_memory(gpa, MemoryFlags::RAM), gpa);
        assert_invalid(vm.remap_memory(gpa, &region, MemoryFlags::RAM), gpa);
    }
    vm.unmap_memory(WINDOW)?;
    assert_invalid(vm.unmap_memory(WINDOW), WINDOW);
    Ok(())
}

/// The last mapping that fits works, the next is refused, and a freed one can be used again.
fn too_many_mappings_are_refused(host: &Host) -> Outcome {
    let mut vm = host.vm()?;
    let page = GuestRegion::anonymous(PAGE)?;
    let slots = u64::from(host.caps.max_memory_slots);
    let at = |slot: u64| 0x1_0000_0000 + slot * 2 * PAGE;
    for slot in 0..slots {
        if let Err(error) = vm.map_memory(at(slot), &page, MemoryFlags::RAM) {
            fail!("mapping {slot} of {slots}: {error}");
        }
        if !host.in_time() {
            fail!("only {slot} of {slots} mappings in time");
        }
    }
    let refused = vm.map_memory(at(slots), &page, MemoryFlags::RAM);
    assert!(matches!(refused, Err(AccelError::InvalidArgument { .. })), "{refused:?}");
    vm.unmap_memory(at(7))?;
    vm.map_memory(at(slots), &page, MemoryFlags::RAM)?;
    Ok(())
}

fn refused_calls_change_nothing(host: &Host) -> Outcome {
    let mut m = store_and_load(host)?;
    let region = GuestRegion::anonymous(2 * PAGE)?;
    m.vm.map_memory(WINDOW, &region, MemoryFlags::RAM)?;
    let other = GuestRegion::anonymous(2 * PAGE)?;
    assert_invalid(m.vm.map_memory(WINDOW + PAGE, &other, MemoryFlags::RAM), WINDOW + PAGE);
    assert_invalid(m.vm.map_memory(WINDOW + 1, &other, MemoryFlags::RAM), WINDOW + 1);
    assert_invalid(m.vm.unmap_memory(WINDOW + PAGE), WINDOW + PAGE);
    assert_invalid(m.vm.protect_memory(WINDOW, MemoryFlags::WRITE), WINDOW);
    m.expect_halted()?;
    assert_eq!((word(&region, 0)?, word(&other, 0)?), (0x55aa, 0));
    Ok(())
}

fn two_windows_on_one_region(host: &Host) -> Outcome {
    let mut m = Machine::long(host, |a| {
        a.mov(edi, WINDOW as u32)?;
        a.mov(dword_ptr(rdi + 4), 0x1234)?;
        a.mov(esi, WINDOW as u32 + 0x10_0000)?;
        a.mov(eax, dword_ptr(rsi + 4))?;
        a.hlt()
    })?;
    let region = GuestRegion::anonymous(PAGE)?;
    m.vm.map_memory(WINDOW, &region, MemoryFlags::RAM)?;
    m.vm.map_memory(WINDOW + 0x10_0000, &region, MemoryFlags::RAM)?;
    m.expect_halted()?;
    assert_eq!((m.gpr(Reg::Rax)?, word(&region, 4)?), (0x1234, 0x1234));
    Ok(())
}

/// That one window is not logged does not silence the log of the other.
fn two_windows_of_which_one_is_logged(host: &Host) -> Outcome {
    let mut vm = host.vm()?;
    let region = GuestRegion::anonymous(4 * PAGE)?;
    vm.map_memory(WINDOW, &region, MemoryFlags::RAM | MemoryFlags::LOG_DIRTY)?;
    vm.map_memory(WINDOW + 0x10_0000, &region, MemoryFlags::RAM)?;
    vm.take_dirty(WINDOW)?;
    region.write(2 * PAGE, &[1])?;
    assert!(vm.take_dirty(WINDOW)?.is_dirty(WINDOW + 2 * PAGE));
    Ok(())
}

fn mapping_keeps_memory_alive(host: &Host) -> Outcome {
    let mut m = store_and_load(host)?;
    let region = GuestRegion::anonymous(16 * PAGE)?;
    let weak = region.as_ptr();
    m.vm.map_memory(WINDOW, &region, MemoryFlags::RAM)?;
    drop(region);
    // If the memory had gone, this one might take its place.
    let other = GuestRegion::anonymous(16 * PAGE)?;
    assert_ne!(other.as_ptr(), weak);
    m.expect_halted()?;
    assert_eq!(m.gpr(Reg::Rbx)?, 0x55aa);
    assert_eq!(word(&other, 0)?, 0);
    // Also when the virtual machine's handle has gone and only the vCPU is left.
    drop(m.vm);
    assert_eq!(m.vcpu.run()?, VcpuExit::Halted);
    Ok(())
}

fn file_content(file: &mut std::fs::File) -> Outcome<Vec<u8>> {
    let mut content = Vec::new();
    file.seek(SeekFrom::Start(0))?;
    file.read_to_end(&mut content)?;
    Ok(content)
}

fn shared_file_sees_guest_writes(host: &Host) -> Outcome {
    let mut m = store_and_load(host)?;
    let mut file = temporary_file(&[7; 0x3000])?;
    let region = GuestRegion::from_file(&file, PAGE, 2 * PAGE, FileMapping::Shared)?;
    m.vm.map_memory(WINDOW, &region, MemoryFlags::RAM)?;
    m.expect_halted()?;
    let content = file_content(&mut file)?;
    assert_eq!(content[0x1000..0x1006], [0xaa, 0x55, 0, 0, 7, 7]);
    assert_eq!(content[0xffc..0x1000], [7; 4]);
    Ok(())
}

fn private_file_does_not_see_guest_writes(host: &Host) -> Outcome {
    let mut m = store_and_load(host)?;
    let mut file = temporary_file(&[7; 0x2000])?;
    let region = GuestRegion::from_file(&file, 0, 2 * PAGE, FileMapping::CopyOnWrite)?;
    m.vm.map_memory(WINDOW, &region, MemoryFlags::RAM)?;
    m.expect_halted()?;
    assert_eq!(word(&region, 0)?, 0x55aa);
    assert_eq!(word(&region, 4)?, 0x0707_0707);
    assert_eq!(file_content(&mut file)?, vec![7; 0x2000]);
    Ok(())
}

fn host_writes_are_seen(host: &Host) -> Outcome {
    let mut m = Machine::long(host, |a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.mov(rax, qword_ptr(layout::DATA + 3))?;
        a.hlt()?;
        a.jmp(again)
    })?;
    for value in [1u64, 0x1234_5678_9abc_def0, u64::MAX] {
        m.write(layout::DATA + 3, &value.to_le_bytes())?;
        m.expect_halted()?;
        assert_eq!(m.gpr(Reg::Rax)?, value);
    }
    Ok(())
}

/// Guest and host increment the same word with locked instructions: no increment is lost.
fn guest_and_host_share_atomics(host: &Host) -> Outcome {
    const TURNS: u32 = 20_000;
    let mut m = Machine::long(host, |a| {
        let mut again = a.create_label();
        a.mov(ecx, TURNS)?;
        a.mov(edi, layout::DATA as u32)?;
        a.set_label(&mut again)?;
        a.lock().inc(dword_ptr(rdi))?;
        a.dec(ecx)?;
        a.jne(again)?;
        a.hlt()
    })?;
    let ram = m.ram.clone();
    std::thread::scope(|scope| {
        let helper = scope.spawn(|| -> Result<(), AccelError> {
            for _ in 0..TURNS {
                let mut now = ram.load::<u32>(layout::DATA, Ordering::Relaxed)?;
                while let Err(other) =
                    ram.compare_exchange::<u32>(layout::DATA, now, now + 1, Ordering::AcqRel, Ordering::Relaxed)?
                {
                    now = other;
                }
            }
            Ok(())
        });
        m.expect_halted()?;
        helper.join().expect("the helper does not panic")?;
        assert_eq!(u32::from_le_bytes(m.read(layout::DATA)?), 2 * TURNS);
        Ok(())
    })
}

/// The view that loaders and devices use shows the same bytes as the guest, across neighbouring regions.
fn guest_memory_finds_regions(host: &Host) -> Outcome {
    let mut m = Machine::with_chip(
        host,
        &World::long().code(|a| {
            a.mov(edi, WINDOW as u32 + PAGE as u32 - 4)?;
            a.mov(rax, qword_ptr(rdi))?;
            a.not(rax)?;
            a.mov(qword_ptr(rdi), rax)?;
            a.hlt()
        }),
        IrqChip::None,
    )?;
    let memory = GuestMemory::new();
    for gpa in [WINDOW, WINDOW + PAGE] {
        let region = GuestRegion::anonymous(PAGE)?;
        m.vm.map_memory(gpa, &region, MemoryFlags::RAM)?;
        memory.insert(gpa, region)?;
    }
    memory.write_u64(WINDOW + PAGE - 4, 0x0123_4567_89ab_cdef)?;
    m.expect_halted()?;
    assert_eq!(memory.read_u64(WINDOW + PAGE - 4)?, !0x0123_4567_89ab_cdef);
    let outside = memory.read_u64(WINDOW + 2 * PAGE - 4);
    assert!(matches!(outside, Err(AccelError::InvalidArgument { .. })), "{outside:?}");
    Ok(())
}
