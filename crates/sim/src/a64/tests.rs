use super::gic::{Frame, Gic, REDISTRIBUTOR_SIZE};
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

const GICD: u64 = 0x800_0000;
const GICR: u64 = 0x1000_0000;
const FRAME: u64 = 0x802_0000;
const IAR: u16 = 0xc660;
const EOIR: u16 = 0xc661;
const SGI1R: u16 = 0xc65d;
const PMR: u16 = 0xc230;

/// A GIC with CPUs of the affinities 0.0.0 and 0.1.2, which let everything of group 1 through.
fn two_cpus() -> Gic {
    let mut gic = Gic::new(GICD, Some(Frame { base: FRAME, intids: 256..260 }));
    gic.write(GICD, 4, 2);
    for (cpu, affinity) in [(0, 0), (1, 0x102)] {
        let base = GICR + cpu * REDISTRIBUTOR_SIZE;
        gic.connect(cpu, affinity, base);
        gic.write(base + 0x14, 4, 0);
        gic.write(base + 0x1_0080, 4, u64::MAX);
        gic.write(base + 0x1_0100, 4, u64::MAX);
        gic.write_register(cpu, PMR, 0xff);
        gic.write_register(cpu, 0xc667, 1);
    }
    for word in 1..32 {
        gic.write(GICD + 0x80 + 4 * word, 4, u64::MAX);
        gic.write(GICD + 0x100 + 4 * word, 4, u64::MAX);
    }
    gic
}

#[test]
fn gic_serves_by_priority_and_preempts() {
    let mut gic = two_cpus();
    gic.write(GICD + 0x400 + 40, 1, 0x80);
    gic.write(GICD + 0x400 + 41, 1, 0x40);
    gic.set_line(0, 40, true);
    assert_eq!((gic.outputs(0), gic.outputs(1)), ([true, false], [false; 2]));
    assert_eq!(gic.read_register(0, IAR), Some(40));
    assert_eq!((gic.outputs(0), gic.read_register(0, IAR)), ([false; 2], Some(1023)), "it is active");
    gic.set_line(0, 41, true);
    assert_eq!(gic.read_register(0, IAR), Some(41), "a higher priority preempts");
    assert_eq!(gic.read_register(0, 0xc65b), Some(0x40), "the running priority");
    gic.set_line(0, 41, false);
    gic.write_register(0, EOIR, 41);
    assert_eq!((gic.outputs(0), gic.read_register(0, 0xc65b)), ([false; 2], Some(0x80)));
    gic.write_register(0, EOIR, 40);
    assert_eq!(gic.outputs(0), [true, false], "the line is still up");
    gic.write_register(0, PMR, 0x80);
    assert_eq!(gic.outputs(0), [false; 2], "masked by its priority");
    gic.write_register(0, PMR, 0xff);
    gic.write(GICD + 0x6000 + 8 * 40, 8, 0x102);
    assert_eq!((gic.outputs(0), gic.outputs(1)), ([false; 2], [true, false]), "routed elsewhere");
    gic.write(GICD + 0x80 + 4, 4, !(1 << 8));
    gic.write(GICD, 4, 3);
    gic.write_register(1, 0xc666, 1);
    assert_eq!((gic.outputs(1), gic.read_register(1, IAR)), ([false, true], Some(1023)), "group 0 is FIQ");
    assert_eq!(gic.read_register(1, 0xc640), Some(40));
}

#[test]
fn gic_tells_edges_from_levels() {
    let mut gic = two_cpus();
    gic.write(GICD + 0xc00 + 4 * 2, 4, 2 << (2 * (40 - 32)));
    gic.set_line(0, 40, true);
    gic.set_line(0, 40, false);
    assert_eq!(gic.read_register(0, IAR), Some(40));
    gic.set_line(0, 40, true);
    gic.write_register(0, EOIR, 40);
    assert_eq!(gic.read_register(0, IAR), Some(40), "an edge while it was active");
    gic.write_register(0, EOIR, 40);
    assert_eq!(gic.read_register(0, IAR), Some(1023));
    gic.set_line(0, 42, true);
    gic.set_line(0, 42, false);
    assert_eq!(gic.read_register(0, IAR), Some(1023), "a level that has gone");
    gic.write(FRAME + 0x40, 4, 257);
    gic.write(FRAME + 0x40, 4, 300);
    assert_eq!(gic.read_register(0, IAR), Some(257));
    gic.write_register(0, EOIR, 257);
    assert_eq!(gic.read_register(0, IAR), Some(1023), "300 is no message");
}

#[test]
fn gic_sends_generated_interrupts_where_they_are_named() {
    let mut gic = two_cpus();
    gic.write_register(0, SGI1R, 3 << 24 | 1 << 16 | 1 << 2);
    assert_eq!((gic.outputs(0), gic.outputs(1)), ([false; 2], [true, false]));
    assert_eq!(gic.read_register(1, IAR), Some(3));
    gic.write_register(1, SGI1R, 1 << 40 | 5 << 24);
    assert_eq!(gic.read_register(0, IAR), Some(5), "all others");
    gic.write_register(0, EOIR, 5);
    gic.write_register(0, SGI1R, 7 << 24 | 2 << 16 | 1 << 2);
    assert_eq!((gic.outputs(0), gic.outputs(1)), ([false; 2], [false; 2]), "nobody is there");
}

#[test]
fn gic_state_goes_to_a_gic_with_the_same_cpus_only() {
    let mut gic = two_cpus();
    gic.set_line(0, 40, true);
    gic.write_register(0, SGI1R, 3 << 24 | 1 << 16 | 1 << 2);
    let state = gic.save();
    let mut next = Gic::new(GICD, None);
    assert!(!next.restore(&state));
    next.connect(0, 0, GICR);
    next.connect(1, 1, GICR + REDISTRIBUTOR_SIZE);
    assert!(!next.restore(&state));
    next.connect(1, 0x102, GICR + REDISTRIBUTOR_SIZE);
    for len in 0..state.len() {
        assert!(!next.restore(&state[..len]));
    }
    assert!(next.restore(&state));
    assert_eq!(next.save(), state);
    for cpu in [0, 1] {
        next.write_register(cpu, PMR, 0xff);
        next.write_register(cpu, 0xc667, 1);
        assert_eq!(next.outputs(cpu), [true, false]);
    }
}

/// Whatever a guest does with the GIC has an answer.
#[test]
fn gic_answers_every_access() {
    let mut gic = two_cpus();
    for base in [GICD, GICR, GICR + 0x1_0000, FRAME] {
        for offset in (0..0x1_0000).step_by(7).chain([u64::MAX - base]) {
            for len in [1, 4, 5, 8] {
                gic.write(base + offset, len, u64::MAX);
                gic.read(base + offset, len);
            }
        }
    }
    for register in 0xc000..=0xffff {
        for value in [0, 1, u64::MAX] {
            gic.write_register(0, register, value);
            gic.read_register(0, register);
        }
    }
    gic.outputs(0);
    assert!(gic.has(GICD) && gic.has(FRAME) && !gic.has(GICR + 2 * REDISTRIBUTOR_SIZE));
}
