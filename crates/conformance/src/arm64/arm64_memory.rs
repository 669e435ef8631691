//! Mappings while a guest uses them: read-only memory, the dirty log, unmapping and exchanging.

use super::Arm;
use crate::harness::{Host, Outcome, cases};
use vm_accel::{GuestRegion, IrqChip, MemoryFlags, VcpuExit};
use vm_accel_guests::arm64::Index::Offset;
use vm_accel_guests::arm64::{ZR, layout};

cases![
    read_only_memory[ReadOnlyMemory],
    pair_into_read_only_memory[ReadOnlyMemory],
    dirty_log[DirtyLog],
    dirty_log_sees_finished_pairs[DirtyLog],
    unmapped_memory_exits,
    exchanged_memory_is_seen,
    many_mappings,
];

/// Where the cases map more memory.
const EXTRA: u64 = 0x8000_0000;

fn rom(m: &mut Arm) -> Outcome<GuestRegion> {
    let region = GuestRegion::anonymous(0x1_0000)?;
    region.write(0, &[0x11; 32])?;
    m.vm.map_memory(EXTRA, &region, MemoryFlags::ROM)?;
    Ok(region)
}

fn read_only_memory(host: &Host) -> Outcome {
    let mut m = Arm::new(host, |a| {
        a.mov(1, EXTRA);
        a.load(8, 2, 1, Offset(0));
        a.store(4, 2, 1, Offset(8));
        a.load(8, 3, 1, Offset(8));
        a.report(3);
    })?;
    rom(&mut m)?;
    m.expect_write(EXTRA + 8, &[0x11; 4])?;
    m.expect_report(0x1111_1111_1111_1111)
}

fn pair_into_read_only_memory(host: &Host) -> Outcome {
    let mut m = Arm::new(host, |a| {
        a.mov(1, EXTRA);
        a.mov(2, 5);
        a.store_pair(8, [2, ZR], 1, Offset(0));
        a.load_pair(8, [2, 3], 1, Offset(0));
        a.report(2);
    })?;
    rom(&mut m)?;
    m.expect_write(EXTRA, &5u64.to_le_bytes())?;
    m.expect_write(EXTRA + 8, &[0; 8])?;
    m.expect_report(0x1111_1111_1111_1111)
}

fn dirty_log(host: &Host) -> Outcome {
    let flags = MemoryFlags::RAM | MemoryFlags::LOG_DIRTY;
    let mut m = Arm::build(host, IrqChip::None, flags, |a| {
        a.mov(1, layout::DATA);
        a.report(ZR);
        a.store(8, 1, 1, Offset(0));
        a.mov(2, layout::DATA + 0x2_0000);
        a.store(8, 1, 2, Offset(0));
        a.report(ZR);
        a.report(ZR);
        a.store(8, 1, 2, Offset(8));
        a.report(ZR);
    })?;
    m.expect_report(0)?;
    m.vm.take_dirty(layout::RAM)?;
    m.expect_report(0)?;
    let dirty = m.vm.take_dirty(layout::RAM)?;
    assert!(dirty.is_dirty(layout::DATA));
    assert!(dirty.is_dirty(layout::DATA + 0x2_0000));
    assert!(!dirty.is_dirty(layout::DATA + 0x1_0000));
    m.expect_report(0)?;
    let dirty = m.vm.take_dirty(layout::RAM)?;
    assert!(!dirty.is_dirty(layout::DATA + 0x2_0000), "it was taken");
    m.expect_report(0)?;
    let dirty = m.vm.take_dirty(layout::RAM)?;
    assert!(dirty.is_dirty(layout::DATA + 0x2_0000));
    Ok(())
}

/// The half of a pair that is memory is written by the backend, and must be in the log.
fn dirty_log_sees_finished_pairs(host: &Host) -> Outcome {
    const END: u64 = layout::RAM + layout::RAM_SIZE;
    let flags = MemoryFlags::RAM | MemoryFlags::LOG_DIRTY;
    let mut m = Arm::build(host, IrqChip::None, flags, |a| {
        a.report(ZR);
        a.mov(1, END - 8);
        a.store_pair(8, [1, 1], 1, Offset(0));
        a.report(ZR);
    })?;
    m.expect_report(0)?;
    m.vm.take_dirty(layout::RAM)?;
    m.expect_write(END, &(END - 8).to_le_bytes())?;
    m.expect_report(0)?;
    let dirty = m.vm.take_dirty(layout::RAM)?;
    assert!(dirty.is_dirty(END - 8));
    Ok(())
}

fn unmapped_memory_exits(host: &Host) -> Outcome {
    let mut m = Arm::new(host, |a| {
        a.mov(1, EXTRA);
        a.load(8, 2, 1, Offset(0));
        a.report(2);
        a.load(8, 2, 1, Offset(0));
        a.report(2);
    })?;
    let region = GuestRegion::anonymous(0x1_0000)?;
    region.write(0, &[9; 8])?;
    m.vm.map_memory(EXTRA, &region, MemoryFlags::RAM)?;
    m.expect_report(0x0909_0909_0909_0909)?;
    m.vm.unmap_memory(EXTRA)?;
    m.expect_read(EXTRA, &[7; 8])?;
    m.expect_report(0x0707_0707_0707_0707)
}

fn exchanged_memory_is_seen(host: &Host) -> Outcome {
    let mut m = Arm::new(host, |a| {
        a.mov(1, EXTRA);
        let again = a.bound();
        a.load(8, 2, 1, Offset(0));
        a.report(2);
        a.b(again);
    })?;
    let regions = [1u8, 2].map(|byte| {
        let region = GuestRegion::anonymous(0x1_0000)?;
        region.write(0, &[byte; 8])?;
        Ok::<_, vm_accel::AccelError>(region)
    });
    let [first, second] = regions;
    m.vm.map_memory(EXTRA, &first?, MemoryFlags::RAM)?;
    m.expect_report(0x0101_0101_0101_0101)?;
    m.vm.remap_memory(EXTRA, &second?, MemoryFlags::RAM)?;
    m.expect_report(0x0202_0202_0202_0202)
}

fn many_mappings(host: &Host) -> Outcome {
    const COUNT: u64 = 32;
    let mut m = Arm::new(host, |a| {
        a.mov(2, 0);
        for n in 0..COUNT {
            a.mov(1, EXTRA + n * 0x2_0000);
            a.load(8, 3, 1, Offset(0));
            a.add_reg(2, 2, 3);
        }
        a.report(2);
        a.load(8, 3, 1, Offset(0));
        a.report(3);
    })?;
    for n in 0..COUNT {
        let region = GuestRegion::anonymous(0x1_0000)?;
        region.write(0, &n.to_le_bytes())?;
        m.vm.map_memory(EXTRA + n * 0x2_0000, &region, MemoryFlags::RAM)?;
    }
    m.expect_report(COUNT * (COUNT - 1) / 2)?;
    for n in 0..COUNT {
        m.vm.unmap_memory(EXTRA + n * 0x2_0000)?;
    }
    m.expect(VcpuExit::Mmio { addr: EXTRA + (COUNT - 1) * 0x2_0000, size: 8, is_write: false })
}
