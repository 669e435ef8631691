//! Loads and stores to devices: every width, and the forms that the CPU reports without a syndrome.

use super::Arm;
use crate::harness::{Host, Outcome, cases, fail};
use vm_accel::aarch64::Aarch64FpuRegs;
use vm_accel::{AccelError, FpuRegs, GuestRegion, MemoryFlags, VcpuExit};
use vm_accel_guests::arm64::Index::{Offset, Post, Pre};
use vm_accel_guests::arm64::{ZR, layout};

cases![
    write_sizes,
    read_sizes,
    read_extends,
    every_register,
    zero_register,
    write_back,
    pair_stores_are_two_exits,
    pair_loads,
    pair_of_signed_words,
    vector_stores,
    vector_loads,
    vector_pair,
    pair_into_memory_and_device,
    misaligned_across_pages,
    through_page_tables,
    from_el0,
    above_four_gib,
    unanswered_read_is_refused,
    quiesce_finishes_a_pair,
    undecoded_instruction_reports_its_word,
];

const D: u64 = layout::DEVICE;

fn write_sizes(host: &Host) -> Outcome {
    let mut m = Arm::new(host, |a| {
        a.mov(1, D);
        a.mov(2, 0x8877_6655_4433_2211);
        for (n, bytes) in [1, 2, 4, 8].into_iter().enumerate() {
            a.store(bytes, 2, 1, Offset(8 * n as i64));
        }
        a.report(ZR);
    })?;
    let all = 0x8877_6655_4433_2211u64.to_le_bytes();
    for (n, bytes) in [1, 2, 4, 8].into_iter().enumerate() {
        m.expect_write(D + 8 * n as u64, &all[..bytes])?;
    }
    m.expect_report(0)
}

fn read_sizes(host: &Host) -> Outcome {
    let mut m = Arm::new(host, |a| {
        a.mov(1, D);
        for (n, bytes) in [1, 2, 4, 8].into_iter().enumerate() {
            let target = 2 + n as u8;
            a.mov(target, u64::MAX);
            a.load(bytes, target, 1, Offset(8 * n as i64));
        }
        a.report(ZR);
    })?;
    let all = [0x81, 0x82, 0x83, 0x84, 0x85, 0x86, 0x87, 0x88];
    for (n, bytes) in [1, 2, 4, 8].into_iter().enumerate() {
        m.expect_read(D + 8 * n as u64, &all[..bytes])?;
    }
    m.expect_report(0)?;
    let expected = [0x81, 0x8281, 0x8483_8281, 0x8887_8685_8483_8281];
    assert_eq!(m.vcpu.get_regs()?.gpr[2..6], expected);
    Ok(())
}

fn read_extends(host: &Host) -> Outcome {
    let mut m = Arm::new(host, |a| {
        a.mov(1, D);
        a.load_signed(1, true, 2, 1, Offset(0));
        a.load_signed(1, false, 3, 1, Offset(0));
        a.load_signed(2, true, 4, 1, Offset(0));
        a.load_signed(2, false, 5, 1, Offset(0));
        a.load_signed(4, true, 6, 1, Offset(0));
        a.report(ZR);
    })?;
    m.expect_read(D, &[0x80])?;
    m.expect_read(D, &[0x80])?;
    m.expect_read(D, &[0, 0x80])?;
    m.expect_read(D, &[0, 0x80])?;
    m.expect_read(D, &[0, 0, 0, 0x80])?;
    m.expect_report(0)?;
    let expected = [0xffff_ffff_ffff_ff80, 0xffff_ff80, 0xffff_ffff_ffff_8000, 0xffff_8000, 0xffff_ffff_8000_0000];
    assert_eq!(m.vcpu.get_regs()?.gpr[2..7], expected);
    Ok(())
}

/// Each general-purpose register as source and target.
fn every_register(host: &Host) -> Outcome {
    let base = |n: u8| if n == 1 { 2 } else { 1 };
    let mut m = Arm::new(host, |a| {
        for n in 0..31 {
            a.mov(base(n), D + 8 * u64::from(n));
            a.load(8, n, base(n), Offset(0));
            a.mov(base(n), D + 8 * u64::from(n));
            a.store(8, n, base(n), Offset(0));
        }
    })?;
    for n in 0..31 {
        let value = (0x0101_0101_0101_0101u64 * (n + 1)).to_le_bytes();
        m.expect_read(D + 8 * n, &value)?;
        m.expect_write(D + 8 * n, &value)?;
    }
    Ok(())
}

fn zero_register(host: &Host) -> Outcome {
    let mut m = Arm::new(host, |a| {
        a.mov(1, D);
        a.load(8, ZR, 1, Offset(0));
        a.store(4, ZR, 1, Offset(8));
        a.report(ZR);
    })?;
    m.expect_read(D, &[0xff; 8])?;
    m.expect_write(D + 8, &[0; 4])?;
    m.expect_report(0)?;
    assert_eq!(m.vcpu.get_regs()?.gpr[31], layout::STACK, "the load wrote SP");
    Ok(())
}

fn write_back(host: &Host) -> Outcome {
    let mut m = Arm::new(host, |a| {
        a.mov(1, D);
        a.mov(2, 0x1122_3344);
        a.store(4, 2, 1, Post(8));
        a.store(2, 2, 1, Pre(8));
        a.load(8, 3, 1, Post(-16));
        a.load_signed(1, true, 4, 1, Pre(1));
        a.report(1);
    })?;
    m.expect_write(D, &[0x44, 0x33, 0x22, 0x11])?;
    m.expect_write(D + 16, &[0x44, 0x33])?;
    m.expect_read(D + 16, &[1, 2, 3, 4, 5, 6, 7, 8])?;
    m.expect_read(D + 1, &[0xfe])?;
    m.expect_report(D + 1)?;
    assert_eq!((m.x(3)?, m.x(4)?), (0x0807_0605_0403_0201, u64::MAX - 1));
    Ok(())
}

fn pair_stores_are_two_exits(host: &Host) -> Outcome {
    let mut m = Arm::new(host, |a| {
        a.mov(1, D);
        a.mov(2, 0x2222);
        a.mov(3, 0x3333_3333_3333);
        a.store_pair(8, [2, 3], 1, Offset(16));
        a.store_pair(4, [3, ZR], 1, Pre(8));
        a.report(1);
    })?;
    m.expect_write(D + 16, &0x2222u64.to_le_bytes())?;
    m.expect_write(D + 24, &0x3333_3333_3333u64.to_le_bytes())?;
    m.expect_write(D + 8, &0x3333_3333u32.to_le_bytes())?;
    m.expect_write(D + 12, &[0; 4])?;
    m.expect_report(D + 8)
}

fn pair_loads(host: &Host) -> Outcome {
    let mut m = Arm::new(host, |a| {
        a.mov(1, D);
        a.load_pair(8, [2, 3], 1, Post(-8));
        a.load_pair(4, [4, 5], 1, Offset(8));
        a.report(1);
    })?;
    m.expect_read(D, &[1; 8])?;
    let regs = m.vcpu.get_regs()?;
    assert_eq!(regs.gpr[2], 0, "between its accesses an instruction has done nothing");
    m.expect_read(D + 8, &[2; 8])?;
    m.expect_read(D, &[0x83; 4])?;
    m.expect_read(D + 4, &[0x84; 4])?;
    m.expect_report(D - 8)?;
    let ones = 0x0101_0101_0101_0101;
    assert_eq!(m.vcpu.get_regs()?.gpr[2..6], [ones, 2 * ones, 0x8383_8383, 0x8484_8484]);
    Ok(())
}

fn pair_of_signed_words(host: &Host) -> Outcome {
    let mut m = Arm::new(host, |a| {
        a.mov(1, D);
        a.load_pair_signed([2, 3], 1, Offset(0));
        a.report(ZR);
    })?;
    m.expect_read(D, &[0xfe, 0xff, 0xff, 0xff])?;
    m.expect_read(D + 4, &[1, 0, 0, 0x40])?;
    m.expect_report(0)?;
    assert_eq!((m.x(2)?, m.x(3)?), (u64::MAX - 1, 0x4000_0001));
    Ok(())
}

/// V0 to V31 with a pattern in each.
fn vectors() -> Aarch64FpuRegs {
    let mut fpu = Aarch64FpuRegs::default();
    for (n, v) in fpu.v.iter_mut().enumerate() {
        *v = u128::from_le_bytes(std::array::from_fn(|byte| (16 * n + byte) as u8));
    }
    fpu
}

fn vector_stores(host: &Host) -> Outcome {
    let mut m = Arm::new(host, |a| {
        a.mov(1, D);
        for bytes in [1, 2, 4, 8, 16] {
            a.store_vector(bytes, 3, 1, Offset(0));
        }
        a.store_vector(16, 4, 1, Post(16));
        a.report(1);
    })?;
    m.vcpu.set_fpu_regs(&FpuRegs::Aarch64(vectors()))?;
    let pattern = |n: usize| vectors().v[n].to_le_bytes();
    for bytes in [1, 2, 4, 8] {
        m.expect_write(D, &pattern(3)[..bytes])?;
    }
    m.expect_write(D, &pattern(3)[..8])?;
    m.expect_write(D + 8, &pattern(3)[8..])?;
    m.expect_write(D, &pattern(4)[..8])?;
    m.expect_write(D + 8, &pattern(4)[8..])?;
    m.expect_report(D + 16)
}

fn vector_loads(host: &Host) -> Outcome {
    let mut m = Arm::new(host, |a| {
        a.mov(1, D);
        a.load_vector(16, 3, 1, Offset(0));
        a.load_vector(4, 4, 1, Pre(32));
        a.report(1);
    })?;
    m.vcpu.set_fpu_regs(&FpuRegs::Aarch64(vectors()))?;
    m.expect_read(D, &[0xa0; 8])?;
    m.expect_read(D + 8, &[0xb0; 8])?;
    m.expect_read(D + 32, &[1, 2, 3, 4])?;
    m.expect_report(D + 32)?;
    let FpuRegs::Aarch64(fpu) = m.vcpu.get_fpu_regs()? else {
        fail!("an aarch64 vCPU has aarch64 registers");
    };
    let mut expected = vectors();
    expected.v[3] = 0xb0b0_b0b0_b0b0_b0b0_a0a0_a0a0_a0a0_a0a0;
    expected.v[4] = 0x0403_0201;
    assert_eq!(fpu, expected);
    Ok(())
}

fn vector_pair(host: &Host) -> Outcome {
    let mut m = Arm::new(host, |a| {
        a.mov(1, D);
        a.load_pair_vector(16, [0, 1], 1, Offset(0));
        a.store_pair_vector(8, [1, 0], 1, Offset(64));
        a.store_pair_vector(16, [1, 0], 1, Offset(128));
        a.report(ZR);
    })?;
    for n in 0..4 {
        m.expect_read(D + 8 * n, &[n as u8 + 1; 8])?;
    }
    m.expect_write(D + 64, &[3; 8])?;
    m.expect_write(D + 72, &[1; 8])?;
    for (n, byte) in [3, 4, 1, 2].into_iter().enumerate() {
        m.expect_write(D + 128 + 8 * n as u64, &[byte; 8])?;
    }
    m.expect_report(0)
}

/// One half of the pair is memory, the other is not.
fn pair_into_memory_and_device(host: &Host) -> Outcome {
    const END: u64 = layout::RAM + layout::RAM_SIZE;
    let mut m = Arm::new(host, |a| {
        a.mov(1, END - 8);
        a.mov(2, 0x2222);
        a.mov(3, 0x3333);
        a.store_pair(8, [2, 3], 1, Offset(0));
        a.mov(2, 0);
        a.load_pair(8, [2, 3], 1, Offset(0));
        a.report(2);
    })?;
    m.expect_write(END, &0x3333u64.to_le_bytes())?;
    m.expect_read(END, &[7; 8])?;
    m.expect_report(0x2222)?;
    assert_eq!(m.read_u64(END - 8)?, 0x2222);
    assert_eq!(m.x(3)?, 0x0707_0707_0707_0707);
    Ok(())
}

/// Memory is normal with the MMU on, so that a misaligned access is no fault; the device is mapped as such behind RAM.
fn misaligned_across_pages(host: &Host) -> Outcome {
    const END: u64 = layout::RAM + layout::RAM_SIZE;
    let mut m = Arm::new(host, |a| {
        a.mov(1, END - 3);
        a.mov(2, 0x8877_6655_4433_2211);
        a.store_pair(8, [2, 2], 1, Offset(0));
        a.report(ZR);
    })?;
    m.mmu_on()?;
    m.expect_write(END, &[0x44, 0x55, 0x66, 0x77, 0x88])?;
    m.expect_write(END + 5, &[0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88])?;
    m.expect_report(0)?;
    assert_eq!(m.read_u64(END - 8)? >> 40, 0x33_2211);
    Ok(())
}

/// Code and stack by virtual addresses that are not the physical ones: the backend has to walk the tables.
fn through_page_tables(host: &Host) -> Outcome {
    let mut m = Arm::new(host, |a| {
        a.mov(1, D);
        a.mov(2, 0x1234);
        a.store_pair(8, [2, ZR], 1, Offset(0));
        a.mov(16, layout::REPORT);
        a.load_pair(8, [3, 4], 1, Offset(16));
        a.report(3);
    })?;
    m.mmu_on()?;
    // A second table: the program's page at 3 GiB.
    let entry = layout::RAM | 1 | 1 << 10 | 3 << 8 | 1 << 2;
    m.ram.write(layout::TABLES - layout::RAM + 24, &entry.to_le_bytes())?;
    let mut regs = m.vcpu.get_regs()?;
    regs.pc = layout::CODE - layout::RAM + (3 << 30);
    m.vcpu.set_regs(&regs)?;
    m.expect_write(D, &0x1234u64.to_le_bytes())?;
    m.expect_write(D + 8, &[0; 8])?;
    m.expect_read(D + 16, &[9; 8])?;
    m.expect_read(D + 24, &[8; 8])?;
    m.expect_report(0x0909_0909_0909_0909)
}

fn from_el0(host: &Host) -> Outcome {
    let mut m = Arm::new(host, |a| {
        a.mov(1, D);
        a.load(4, 2, 1, Offset(0));
        a.store_pair(8, [2, ZR], 1, Post(16));
        a.report(2);
        a.svc(0);
    })?;
    m.mmu_on()?;
    let mut regs = m.vcpu.get_regs()?;
    // RAM is mapped for EL0 one GiB higher.
    regs.pc = layout::CODE + (1 << 30);
    regs.flags = 0x3c0;
    m.vcpu.set_regs(&regs)?;
    m.expect_read(D, &[5, 0, 0, 0])?;
    m.expect_write(D, &5u64.to_le_bytes())?;
    m.expect_write(D + 8, &[0; 8])?;
    m.expect_report(5)?;
    // A synchronous exception from a lower level.
    m.expect_report(0x400)
}

fn above_four_gib(host: &Host) -> Outcome {
    const HIGH: u64 = 0x2_4000_0000;
    let mut m = Arm::new(host, |a| {
        a.mov(1, HIGH);
        a.load(8, 2, 1, Offset(0));
        a.store(8, 2, 1, Offset(0x1000));
        a.report(ZR);
    })?;
    let region = GuestRegion::anonymous(0x1_0000)?;
    region.write(0, &[1, 2, 3, 4, 5, 6, 7, 8])?;
    m.vm.map_memory(HIGH, &region, MemoryFlags::RAM)?;
    m.expect_report(0)?;
    let mut copied = [0; 8];
    region.read(0x1000, &mut copied)?;
    assert_eq!(copied, [1, 2, 3, 4, 5, 6, 7, 8]);
    Ok(())
}

fn unanswered_read_is_refused(host: &Host) -> Outcome {
    let mut m = Arm::new(host, |a| {
        a.mov(1, D);
        a.load_pair(8, [2, 3], 1, Offset(0));
        a.report(2);
    })?;
    for addr in [D, D + 8] {
        m.expect(VcpuExit::Mmio { addr, size: 8, is_write: false })?;
        assert_eq!(m.vcpu.run(), Err(AccelError::PendingRead { addr, len: 8 }));
        assert!(m.vcpu.complete_read(&[1; 4]).is_err(), "a short answer");
        m.vcpu.complete_read(&[1; 8])?;
    }
    m.expect_report(0x0101_0101_0101_0101)
}

fn quiesce_finishes_a_pair(host: &Host) -> Outcome {
    let mut m = Arm::new(host, |a| {
        a.mov(1, D);
        a.mov(2, 0x22);
        a.store_pair(8, [2, ZR], 1, Pre(8));
        a.load(8, 3, 1, Offset(0));
        a.report(3);
    })?;
    m.expect_write(D + 8, &0x22u64.to_le_bytes())?;
    let before = m.vcpu.get_regs()?;
    let second = VcpuExit::Mmio { addr: D + 16, size: 8, is_write: true };
    assert_eq!(m.vcpu.quiesce()?, second);
    assert_eq!(m.vcpu.get_regs()?, before);
    assert_eq!(m.vcpu.quiesce()?, VcpuExit::Interrupt);
    let after = m.vcpu.get_regs()?;
    assert_eq!((after.pc, after.gpr[1]), (before.pc + 4, D + 8));
    // The same of an access that the platform finishes.
    m.expect_read(D + 8, &[3; 8])?;
    assert_eq!(m.vcpu.quiesce()?, VcpuExit::Interrupt);
    let after = m.vcpu.get_regs()?;
    assert_eq!((after.pc, after.gpr[3]), (before.pc + 8, 0x0303_0303_0303_0303));
    m.expect_report(0x0303_0303_0303_0303)
}

fn undecoded_instruction_reports_its_word(host: &Host) -> Outcome {
    const LD1: u32 = 0x4c40_7021; // ld1 {v1.16b}, [x1]
    let mut m = Arm::new(host, |a| {
        a.mov(1, D);
        a.word(LD1);
        a.report(ZR);
    })?;
    match m.vcpu.run() {
        Err(AccelError::Emulation { pc, instruction, .. }) => {
            assert_eq!(pc, layout::CODE + 4);
            assert_eq!(instruction.as_slice(), LD1.to_le_bytes());
        }
        other => fail!("expected an emulation error, got {other:x?}"),
    }
    // The VMM can step over it.
    let mut regs = m.vcpu.get_regs()?;
    assert_eq!(regs.pc, layout::CODE + 4);
    regs.pc += 4;
    m.vcpu.set_regs(&regs)?;
    m.expect_report(0)
}
