use super::*;
use std::cell::RefCell;
use vm_accel_sys::hvf::memory;

/// 64 KiB of memory at 0, and nothing behind.
struct Ram(RefCell<Vec<u8>>);

impl Bus for Ram {
    fn read(&self, pa: u64, data: &mut [u8]) -> bool {
        let ram = self.0.borrow();
        let found = ram.get(pa as usize..).and_then(|rest| rest.get(..data.len()));
        found.map(|bytes| data.copy_from_slice(bytes)).is_some()
    }

    fn write(&self, pa: u64, data: &[u8]) -> bool {
        let mut ram = self.0.borrow_mut();
        let found = ram.get_mut(pa as usize..).and_then(|rest| rest.get_mut(..data.len()));
        found.map(|bytes| bytes.copy_from_slice(data)).is_some()
    }

    fn exchange(&self, pa: u64, old: &[u8], new: &[u8]) -> Option<bool> {
        let mut seen = vec![0; old.len()];
        (self.read(pa, &mut seen)).then(|| seen == old && self.write(pa, new))
    }

    fn flags(&self, pa: u64) -> u64 {
        if pa < 0x1_0000 { memory::READ | memory::WRITE | memory::EXEC } else { 0 }
    }

    fn ticks(&self) -> u64 {
        1000
    }

    fn read_gic(&self, _: u16) -> Option<u64> {
        None
    }

    fn write_gic(&self, _: u16, _: u64) -> Option<()> {
        None
    }
}

/// A CPU at a program, at EL1.
fn cpu(program: &[u32]) -> (Cpu, Ram) {
    let mut bytes: Vec<u8> = program.iter().flat_map(|word| word.to_le_bytes()).collect();
    bytes.resize(0x1_0000, 0);
    let mut cpu = Cpu::new(sys_reg::ALL.iter().map(|register| (*register, 0)));
    cpu.pstate = 0x3c5;
    (cpu, Ram(RefCell::new(bytes)))
}

/// Runs one instruction on these registers; answers X0 and the flags.
fn one(word: u32, x1: u64, x2: u64) -> (u64, u64) {
    let (mut cpu, ram) = cpu(&[word]);
    (cpu.x[1], cpu.x[2], cpu.x[0]) = (x1, x2, 0x5555);
    cpu.step(&ram).unwrap();
    assert_eq!(cpu.pc, 4, "{word:#x} did not end");
    (cpu.x[0], cpu.pstate >> 28)
}

#[test]
fn integer_instructions_compute_what_the_manual_says() {
    // Words as GNU as makes them. Flags are N, Z, C, V.
    for (word, x1, x2, expected, flags) in [
        (0xab02_0020, u64::MAX, 1, 0, 0b0110),                       // adds x0, x1, x2
        (0xeb02_0020, 1 << 63, 1, (1 << 63) - 1, 0b0011),            // subs x0, x1, x2
        (0x6b02_0020, 0, 1, 0xffff_ffff, 0b1000),                    // subs w0, w1, w2
        (0xf240_1c20, 0x1ff, 0, 0xff, 0b0000),                       // ands x0, x1, #0xff
        (0xb200_f020, 0, 0, 0x5555_5555_5555_5555, 0),               // orr x0, x1, #0x5555555555555555
        (0xd344_1c20, 0xabcd, 0, 0xc, 0),                            // ubfx x0, x1, #4, #4
        (0x9344_1c20, 0xabcd, 0, u64::MAX - 3, 0),                   // sbfx x0, x1, #4, #4
        (0xb37c_0c20, 0xabcd, 0, 0x55d5, 0),                         // bfi x0, x1, #4, #4
        (0x9ac2_0820, 7, 0, 0, 0),                                   // udiv x0, x1, x2
        (0x9ac2_0c20, (-7_i64) as u64, 2, (-3_i64) as u64, 0),       // sdiv x0, x1, x2
        (0x9bc2_7c20, u64::MAX, 2, 1, 0),                            // umulh x0, x1, x2
        (0xdac0_1020, 1, 0, 63, 0),                                  // clz x0, x1
        (0xdac0_0c20, 0x0102, 0, 0x0201_0000_0000_0000, 0),          // rev x0, x1
        (0x5ac0_0820, 0x0102, 0, 0x0201_0000, 0),                    // rev w0, w1
        (0x93c2_2020, 0xff, 0xaa00, 0xff00_0000_0000_00aa, 0),       // extr x0, x1, x2, #8
        (0x8b22_c020, 1, 0x8000_0000, 1 + 0xffff_ffff_8000_0000, 0), // add x0, x1, w2, sxtw
    ] {
        assert_eq!(one(word, x1, x2), (expected, flags), "{word:#x}");
    }
}

#[test]
fn a_call_is_behind_its_instruction_and_everything_else_at_it() {
    for (word, class, pc) in [
        (0xd400_0002, class::HVC, 4),        // hvc #0
        (0xd400_0003, class::SMC, 0),        // smc #0
        (0xd503_207f, class::WFX, 0),        // wfi
        (0xd538_0660, class::SYS_REG, 0),    // mrs x0, s3_0_c0_c6_3
        (0xf940_0020, class::DATA_ABORT, 0), // ldr x0, [x1]
    ] {
        let (mut cpu, ram) = cpu(&[word]);
        cpu.x[1] = 0x2_0000;
        let trap = cpu.step(&ram).unwrap_err();
        assert_eq!((trap.syndrome >> 26, cpu.pc), (class, pc), "{word:#x}");
    }
}

#[test]
fn simple_accesses_are_told_and_others_are_not() {
    const VALID: u64 = 1 << 24;
    for (word, told) in [
        (0xf940_0020, Some((3, 0, 0, 1))),  // ldr x0, [x1]
        (0x3980_0022, Some((0, 1, 2, 1))),  // ldrsb x2, [x1]
        (0x79c0_0023, Some((1, 1, 3, 0))),  // ldrsh w3, [x1]
        (0xb900_003f, Some((2, 0, 31, 0))), // str wzr, [x1]
        (0xa940_0c22, None),                // ldp x2, x3, [x1]
        (0xf840_8422, None),                // ldr x2, [x1], #8
    ] {
        let (mut cpu, ram) = cpu(&[word]);
        cpu.x[1] = 0x2_0000;
        let trap = cpu.step(&ram).unwrap_err();
        let iss = trap.syndrome;
        let fields = (iss >> 22 & 3, iss >> 21 & 1, iss >> 16 & 31, iss >> 15 & 1);
        assert_eq!((iss & VALID != 0).then_some(fields), told, "{word:#x}");
        assert_eq!((trap.far, trap.ipa, cpu.x[1]), (0x2_0000, 0x2_0000, 0x2_0000));
    }
}

#[test]
fn a_store_that_another_cpu_came_before_fails() {
    // ldxr x0, [x1]; stxr w2, x3, [x1]
    let (mut cpu, ram) = cpu(&[0xc85f_7c20, 0xc802_7c23]);
    (cpu.x[1], cpu.x[3]) = (0x1000, 9);
    cpu.step(&ram).unwrap();
    assert!(ram.write(0x1000, &[1; 8]));
    cpu.step(&ram).unwrap();
    assert_eq!(cpu.x[2], 1);
    cpu.pc = 0;
    cpu.step(&ram).unwrap();
    cpu.step(&ram).unwrap();
    assert_eq!((cpu.x[0], cpu.x[2]), (0x0101_0101_0101_0101, 0));
    let mut stored = [0; 8];
    assert!(ram.read(0x1000, &mut stored));
    assert_eq!(stored, 9_u64.to_le_bytes());
}

#[test]
fn interrupts_wait_until_they_are_unmasked() {
    // nop; msr daifclr, #2
    let (mut cpu, ram) = cpu(&[0xd503_201f, 0xd503_42ff]);
    cpu.set(sys_reg::VBAR_EL1, 0x800);
    cpu.irq = true;
    cpu.step(&ram).unwrap();
    cpu.step(&ram).unwrap();
    assert_eq!(cpu.pc, 8);
    cpu.step(&ram).unwrap();
    assert_eq!((cpu.pc, cpu.get(sys_reg::ELR_EL1)), (0x800 + 0x280, 8));
}

#[test]
fn any_word_is_survived() {
    let (mut cpu, ram) = cpu(&[]);
    let mut word = 1_u32;
    for _ in 0..100_000 {
        word = word.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        cpu.pc = 0;
        ram.write(0, &word.to_le_bytes());
        let _ = cpu.step(&ram);
    }
}
