//! Tests of the whole CPU on the machine of `testing`: exits and their completion, exceptions, privilege, debugging, code that changes,
//! several CPUs. Instruction bytes are written out with their meaning beside them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::state::{CpuState, Segment, cr0, efer, rflags, seg};
use crate::testing::{CODE, Machine, STACK, TABLES, flat, run};
use crate::{Bus, Config, Cpu, Emulated, Exception, Exit, GuestDebug, NoBus, TscMode};

/// Linear and physical address of a device page: no RAM there.
const DEVICE: u64 = 0x20_0000;
/// Where tests put an IDT, a GDT, a TSS and handlers.
const IDT: u64 = 0x2000;
const GDT: u64 = 0x3000;
const TSS: u64 = 0x3800;
const HANDLER: u64 = 0x4000;

/// A bus with an interrupt that waits to be acknowledged.
struct Line(Option<u8>);

impl Bus for Line {
    fn interrupt_pending(&mut self, _: u64) -> bool {
        self.0.is_some()
    }
    fn acknowledge(&mut self) -> Option<u8> {
        self.0.take()
    }
}

/// A bus whose timer is due at a time stamp.
struct Timer(u64);

impl Bus for Timer {
    fn interrupt_pending(&mut self, tsc: u64) -> bool {
        tsc >= self.0
    }
    fn acknowledge(&mut self) -> Option<u8> {
        self.0 = u64::MAX;
        Some(0x30)
    }
}

fn machine() -> Machine {
    let machine = Machine::new(Box::new(NoBus));
    machine.memory.write(TABLES + 0x2000 + 8, &(TABLES + 0x4007).to_le_bytes());
    machine.memory.write(TABLES + 0x4000, &(DEVICE | 7).to_le_bytes());
    machine
}

/// A machine with a GDT (code 8, data 16, user data 0x1b, user code 0x23, TSS 0x28) and an IDT whose vectors all go to
/// `HANDLER + 16 * vector`, where there is HLT.
fn with_tables() -> Machine {
    tables(machine())
}

fn tables(mut machine: Machine) -> Machine {
    let descriptors: [u64; 5] =
        [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x00cf_f300_0000_ffff, 0x00af_fb00_0000_ffff];
    for (i, descriptor) in descriptors.iter().enumerate() {
        machine.memory.write(GDT + 8 * i as u64, &descriptor.to_le_bytes());
    }
    for vector in 0..256u64 {
        let offset = HANDLER + 16 * vector;
        let low = offset & 0xffff | 8 << 16 | 0xee00 << 32 | (offset >> 16) << 48;
        machine.memory.write(IDT + 16 * vector, &low.to_le_bytes());
        machine.memory.write(offset, &[0xf4]);
    }
    // RSP0.
    machine.memory.write(TSS + 4, &0x7000u64.to_le_bytes());
    // No port bitmap.
    machine.memory.write(TSS + 102, &104u16.to_le_bytes());
    machine.cpu.update(|st| {
        st.gdtr = crate::state::Table { base: GDT, limit: 39 };
        st.idtr = crate::state::Table { base: IDT, limit: 0xfff };
        st.tr = Segment { selector: 0x28, base: TSS, limit: 103, access: 0x8b, unusable: false };
    });
    machine
}

/// Puts the CPU at CPL 3; code and stack are the user alias, 1 MiB up.
fn user(st: &mut CpuState) {
    st.segs[seg::CS] = Segment { selector: 0x23, base: 0, limit: u32::MAX, access: 0xa0fb, unusable: false };
    st.segs[seg::SS] = Segment { selector: 0x1b, base: 0, limit: u32::MAX, access: 0xc0f3, unusable: false };
    st.cpl = 3;
    st.rip = CODE + 0x10_0000;
    st.gpr[4] = STACK + 0x10_0000;
}

/// Runs until the handler of `vector` halts and answers the frame: error code if there is one, RIP, CS, flags, RSP, SS.
#[track_caller]
fn expect_vector(machine: &mut Machine, vector: u64, words: usize) -> Vec<u64> {
    let st = machine.run();
    assert_eq!(st.rip, HANDLER + 16 * vector + 1, "another vector");
    let sp = st.gpr[4];
    (0..words as u64).map(|i| machine.memory.read_u64(sp + 8 * i)).collect()
}

/// What the manual leaves undefined and valgrind's shrld.c found on AMD's processors.
#[test]
fn double_shifts_of_words_by_more_than_their_size_rotate_the_second_operand() {
    let mut m = machine();
    // mov eax, 0x7788; mov edx, 0xabcd; mov ebx, eax; shld ax, dx, 17; shrd bx, dx, 19.
    m.code(&[
        0xb8, 0x88, 0x77, 0, 0, 0xba, 0xcd, 0xab, 0, 0, 0x89, 0xc3, 0x66, 0x0f, 0xa4, 0xd0, 17, 0x66, 0x0f, 0xac, 0xd3,
        19,
    ]);
    let st = m.run();
    assert_eq!((st.gpr[0], st.gpr[3]), (0x579b, 0xb579));
}

/// Neither a loop of jumps nor one in which no block runs to its end keeps a timer from the bus.
#[test]
fn a_timer_interrupts_every_loop() {
    // jmp $; pushf, popf, jmp to both.
    for code in [&[0xeb, 0xfe][..], &[0x9c, 0x9d, 0xeb, 0xfc]] {
        let mut m = tables(Machine::new(Box::new(Timer(100_000))));
        m.code(code);
        m.cpu.update(|st| st.rflags |= rflags::IF);
        assert_eq!(m.cpu.run(1_000_000), Exit::Halted, "{code:x?}");
        assert_eq!(m.cpu.state().rip, HANDLER + 16 * 0x30 + 1, "{code:x?}");
    }
}

#[test]
fn a_device_read_exits_and_resumes() {
    let mut m = machine();
    // mov rbx, [DEVICE]; inc rbx
    m.code(&[0x48, 0x8b, 0x1c, 0x25, 0, 0, 0x20, 0, 0x48, 0xff, 0xc3]);
    let exit = Exit::Mmio { gpa: DEVICE, size: 8, write: false };
    assert_eq!(m.cpu.run(100), exit);
    assert_eq!(m.cpu.state().rip, CODE, "registers show the state before the instruction");
    assert_eq!(m.cpu.run(100), exit, "an unanswered read stays");
    assert!(!m.cpu.complete_read(&[1]), "the length counts");
    assert!(m.cpu.complete_read(&0x1122_3344_5566_7788u64.to_le_bytes()));
    assert_eq!(m.cpu.run(100), Exit::Halted);
    assert_eq!(m.cpu.state().gpr[3], 0x1122_3344_5566_7789);
}

#[test]
fn every_access_of_an_instruction_is_one_exit() {
    let mut m = machine();
    // add [DEVICE], eax; push qword [DEVICE + 8]; movsd
    m.code(&[0x01, 0x04, 0x25, 0, 0, 0x20, 0, 0xff, 0x34, 0x25, 8, 0, 0x20, 0, 0xa5]);
    m.cpu.update(|st| {
        st.gpr[0] = 5;
        st.gpr[6] = DEVICE + 0x100;
        st.gpr[7] = DEVICE + 0x200;
    });
    assert_eq!(m.cpu.run(100), Exit::Mmio { gpa: DEVICE, size: 4, write: false });
    assert!(m.cpu.complete_read(&7u32.to_le_bytes()));
    assert_eq!(m.cpu.run(100), Exit::Mmio { gpa: DEVICE, size: 4, write: true });
    assert_eq!(m.cpu.io_data(), 12u32.to_le_bytes());
    assert_eq!(m.cpu.run(100), Exit::Mmio { gpa: DEVICE + 8, size: 8, write: false });
    assert!(m.cpu.complete_read(&99u64.to_le_bytes()));
    assert_eq!(m.cpu.run(100), Exit::Mmio { gpa: DEVICE + 0x100, size: 4, write: false });
    assert_eq!(m.memory.read_u64(STACK - 8), 99, "the push is complete");
    assert!(m.cpu.complete_read(&0xabcdu32.to_le_bytes()));
    assert_eq!(m.cpu.run(100), Exit::Mmio { gpa: DEVICE + 0x200, size: 4, write: true });
    assert_eq!(m.cpu.io_data(), 0xabcdu32.to_le_bytes());
    assert_eq!(m.cpu.quiesce(), None);
    assert_eq!((m.cpu.state().gpr[6], m.cpu.state().gpr[7]), (DEVICE + 0x104, DEVICE + 0x204));
    assert_eq!(m.cpu.run(100), Exit::Halted);
}

#[test]
fn repeated_port_input_is_one_exit_per_element() {
    let mut m = machine();
    // rep insw
    m.code(&[0xf3, 0x66, 0x6d]);
    m.cpu.update(|st| {
        st.gpr[1] = 3;
        st.gpr[2] = 0x1f0;
        st.gpr[7] = 0x5000;
    });
    for i in 0..3u16 {
        assert_eq!(m.cpu.run(100), Exit::Io { port: 0x1f0, size: 2, write: false });
        assert_eq!(m.cpu.state().gpr[1], u64::from(3 - i), "elements before this one are committed");
        assert!(m.cpu.complete_read(&(0x1000 + i).to_le_bytes()));
    }
    assert_eq!(m.cpu.run(100), Exit::Halted);
    assert_eq!(m.memory.read_u64(0x5000) & 0xffff_ffff_ffff, 0x1002_1001_1000);
}

#[test]
fn a_misaligned_access_over_ram_and_device_touches_the_device_only_for_its_part() {
    let mut m = machine();
    // The page before the device is RAM: user alias of physical 0xff000.
    m.memory.write(0xf_fffe, &[0xaa, 0xbb]);
    // mov eax, [DEVICE - 2]; mov [DEVICE - 2], ecx
    m.code(&[0x8b, 0x04, 0x25, 0xfe, 0xff, 0x1f, 0, 0x89, 0x0c, 0x25, 0xfe, 0xff, 0x1f, 0]);
    m.cpu.update(|st| st.gpr[1] = 0x4433_2211);
    assert_eq!(m.cpu.run(100), Exit::Mmio { gpa: DEVICE, size: 2, write: false });
    assert!(m.cpu.complete_read(&[0xcc, 0xdd]));
    assert_eq!(m.cpu.run(100), Exit::Mmio { gpa: DEVICE, size: 2, write: true });
    assert_eq!(m.cpu.io_data(), [0x33, 0x44]);
    assert_eq!(m.cpu.run(100), Exit::Halted);
    assert_eq!(m.cpu.state().gpr[0], 0xddcc_bbaa);
    assert_eq!(m.memory.read::<2>(0xf_fffe), [0x11, 0x22]);
}

#[test]
fn emulate_one_completes_an_access_that_a_hypervisor_handed_over() {
    let mut m = machine();
    m.cpu.update(|st| st.gpr[3] = DEVICE);
    // xchg [rbx], eax
    let bytes = [0x87, 0x03];
    assert_eq!(m.cpu.emulate_one(&bytes), Emulated::Pending(Exit::Mmio { gpa: DEVICE, size: 4, write: false }));
    assert!(m.cpu.complete_read(&[1, 2, 3, 4]));
    assert_eq!(m.cpu.emulate_one(&bytes), Emulated::Pending(Exit::Mmio { gpa: DEVICE, size: 4, write: true }));
    assert_eq!(m.cpu.emulate_one(&bytes), Emulated::Done);
    assert_eq!((m.cpu.state().gpr[0], m.cpu.state().rip), (0x0403_0201, CODE + 2));
    // ud2; mov eax, [unmapped]
    assert_eq!(m.cpu.emulate_one(&[0x0f, 0x0b]), Emulated::Exception(Exception::Ud));
    let fault = m.cpu.emulate_one(&[0x8b, 0x04, 0x25, 0, 0, 0x40, 0]);
    assert_eq!(fault, Emulated::Exception(Exception::Pf { addr: 0x40_0000, code: 0 }));
}

#[test]
fn faults_push_what_the_manual_says() {
    // ud2
    let mut m = with_tables();
    m.code(&[0x90, 0x0f, 0x0b]);
    let frame = expect_vector(&mut m, 6, 5);
    assert_eq!(frame[..2], [CODE + 1, 8]);
    assert_eq!(frame[2] & rflags::RF, rflags::RF);
    assert_eq!(frame[3..], [STACK, 16]);
    // div by zero: xor ecx, ecx; div ecx
    let mut m = with_tables();
    m.code(&[0x31, 0xc9, 0xf7, 0xf1]);
    assert_eq!(expect_vector(&mut m, 0, 1), [CODE + 2]);
    // A read of an absent page.
    let mut m = with_tables();
    m.code(&[0x8b, 0x04, 0x25, 0x34, 0x12, 0x40, 0]);
    assert_eq!(expect_vector(&mut m, 14, 2), [0, CODE]);
    assert_eq!(m.cpu.state().cr2, 0x40_1234);
    // An address that is not canonical: through DS #GP, through SS #SS. mov rax, [rbx] and mov rax, [rbp]
    for (code, vector) in [([0x48, 0x8b, 0x03, 0x90], 13), ([0x48, 0x8b, 0x45, 0x00], 12)] {
        let mut m = with_tables();
        m.cpu.update(|st| (st.gpr[3], st.gpr[5]) = (1 << 50, 1 << 50));
        m.code(&code);
        assert_eq!(expect_vector(&mut m, vector, 2), [0, CODE]);
    }
    // int 0x80 pushes the next RIP.
    let mut m = with_tables();
    m.code(&[0xcd, 0x80]);
    assert_eq!(expect_vector(&mut m, 0x80, 1), [CODE + 2]);
}

#[test]
fn user_mode_is_kept_out() {
    // mov eax, [0x5000]: a supervisor page. mov [rip], eax: a page without write permission is tested below.
    let mut m = with_tables();
    m.cpu.update(user);
    m.code(&[0x8b, 0x04, 0x25, 0, 0x50, 0, 0]);
    let frame = expect_vector(&mut m, 14, 6);
    assert_eq!(frame[..3], [5, CODE + 0x10_0000, 0x23]);
    assert_eq!(frame[4..], [STACK + 0x10_0000, 0x1b]);
    assert_eq!(m.cpu.state().gpr[4], 0x7000 - 48, "the stack of ring 0 comes from the TSS");
    assert_eq!(m.cpu.state().cpl, 0);
    // hlt, in al, cli, mov cr3, lgdt, wrmsr: #GP(0)
    let forbidden: [&[u8]; 6] = [
        &[0xf4],
        &[0xe4, 0x60],
        &[0xfa],
        &[0x0f, 0x22, 0xd8],
        &[0x0f, 0x01, 0x14, 0x25, 0, 0x50, 0x10, 0],
        &[0x0f, 0x30],
    ];
    for code in forbidden {
        let mut m = with_tables();
        m.cpu.update(user);
        m.code(code);
        let frame = expect_vector(&mut m, 13, 2);
        assert_eq!(frame, [0, CODE + 0x10_0000], "{code:02x?}");
    }
}

#[test]
fn syscall_and_sysret_there_and_back() {
    let mut m = with_tables();
    m.cpu.update(|st| {
        user(st);
        st.msr.star = 0x0010_0008 << 32;
        st.msr.lstar = HANDLER;
        st.msr.fmask = rflags::IF | rflags::DF;
        st.rflags |= rflags::IF;
    });
    // syscall; mov eax, [0x5000] (which faults)
    m.code(&[0x0f, 0x05, 0x8b, 0x04, 0x25, 0, 0x50, 0, 0]);
    // inc rdx; sysretq
    m.memory.write(HANDLER, &[0x48, 0xff, 0xc2, 0x48, 0x0f, 0x07]);
    let frame = expect_vector(&mut m, 14, 6);
    assert_eq!((frame[1], frame[2], frame[5]), (CODE + 0x10_0002, 0x23, 0x1b));
    assert_eq!(frame[3] & rflags::IF, rflags::IF);
    assert_eq!(m.cpu.state().gpr[2], 1);
}

#[test]
fn write_protection_nx_smep_and_smap() {
    // A read-only page: CR0.WP decides for the supervisor.
    for (wp, faults) in [(true, true), (false, false)] {
        let mut m = with_tables();
        m.memory.write(TABLES + 0x3000 + 8 * 5, &0x5001u64.to_le_bytes());
        m.cpu.update(|st| st.cr0 = if wp { st.cr0 | cr0::WP } else { st.cr0 & !cr0::WP });
        // mov [0x5000], eax
        m.code(&[0x89, 0x04, 0x25, 0, 0x50, 0, 0]);
        if faults {
            assert_eq!(expect_vector(&mut m, 14, 2), [3, CODE]);
        } else {
            m.run();
            assert_eq!(m.memory.read_u64(TABLES + 0x3000 + 8 * 5) & 0x60, 0x60, "accessed and dirty");
        }
    }
    // NX: jump to a page that may not be executed.
    let mut m = with_tables();
    m.memory.write(TABLES + 0x3000 + 8 * 5, &(1u64 << 63 | 0x5003).to_le_bytes());
    m.cpu.update(|st| st.gpr[0] = 0x5000);
    m.code(&[0xff, 0xe0]);
    assert_eq!(expect_vector(&mut m, 14, 2), [0x11, 0x5000]);
    // SMEP: jump to a user page; SMAP: read it, with and without AC.
    let mut m = with_tables();
    m.cpu.update(|st| {
        st.cr4 |= crate::state::cr4::SMEP;
        st.gpr[0] = 0x10_5000;
    });
    m.code(&[0xff, 0xe0]);
    assert_eq!(expect_vector(&mut m, 14, 2), [0x11, 0x10_5000]);
    let mut m = with_tables();
    m.cpu.update(|st| st.cr4 |= crate::state::cr4::SMAP);
    // stac; mov eax, [0x105000]; clac; mov eax, [0x105000]
    m.code(&[
        0x0f, 0x01, 0xcb, 0x8b, 0x04, 0x25, 0, 0x50, 0x10, 0, 0x0f, 0x01, 0xca, 0x8b, 0x04, 0x25, 0, 0x50, 0x10, 0,
    ]);
    assert_eq!(expect_vector(&mut m, 14, 2), [1, CODE + 13]);
    // A reserved bit.
    let mut m = with_tables();
    m.memory.write(TABLES + 0x3000 + 8 * 5, &(1u64 << 51 | 0x5003).to_le_bytes());
    m.code(&[0x8b, 0x04, 0x25, 0, 0x50, 0, 0]);
    assert_eq!(expect_vector(&mut m, 14, 2), [9, CODE]);
}

#[test]
fn double_and_triple_faults() {
    // #PF whose handler's gate is absent: #NP during #PF is a double fault.
    let mut m = with_tables();
    m.memory.write(IDT + 16 * 14 + 5, &[0x6e]);
    m.code(&[0x8b, 0x04, 0x25, 0, 0, 0x40, 0]);
    assert_eq!(expect_vector(&mut m, 8, 2), [0, CODE]);
    // And without a handler for that: shutdown.
    let mut m = with_tables();
    m.cpu.update(|st| st.idtr.limit = 0);
    m.code(&[0x0f, 0x0b]);
    assert_eq!(m.cpu.run(100), Exit::Shutdown);
    assert_eq!(m.cpu.run(100), Exit::Shutdown, "nothing but a reset ends it");
}

#[test]
fn code_that_changes_itself_is_seen_at_once() {
    let mut m = machine();
    // mov byte [rip + 1], 7; mov al, 1 (whose immediate is changed to 7)
    let st = m.code(&[0xc6, 0x05, 1, 0, 0, 0, 7, 0xb0, 1]).run();
    assert_eq!(st.gpr[0] & 0xff, 7);
    // A loop that increments the immediate of an instruction it runs each time.
    // mov ecx, 100; l: mov al, 0; inc byte [rip - 7 - ...]; loop l
    let mut m = machine();
    let st = m.code(&[0xb9, 100, 0, 0, 0, 0xb0, 0, 0xfe, 0x05, 0xf9, 0xff, 0xff, 0xff, 0xe2, 0xf6]).run();
    assert_eq!((st.gpr[0] & 0xff, st.gpr[1]), (99, 0));
}

#[test]
fn host_writes_to_code_are_seen_after_they_are_announced() {
    let mut m = machine();
    m.code(&[0xb0, 1]).run();
    m.code(&[0xb0, 2]);
    m.cpu.update(|st| (st.rip, st.events.halted) = (CODE, false));
    assert_eq!(m.run().gpr[0], 2);
}

#[test]
fn kicks_are_sticky_and_coalesce() {
    let mut m = machine();
    // jmp $
    m.code(&[0xeb, 0xfe]);
    let kick = m.cpu.kick_handle();
    kick.kick();
    kick.kick();
    assert_eq!(m.cpu.run(1000), Exit::Kicked);
    assert_eq!(m.cpu.run(1000), Exit::Budget);
    assert_eq!(m.cpu.instructions(), 1000);
    let thread = std::thread::spawn(move || kick.kick());
    while m.cpu.run(u64::MAX / 2) != Exit::Kicked {}
    thread.join().expect("the kicking thread ends");
}

#[test]
fn a_kick_in_the_middle_of_an_instruction_is_not_lost() {
    let mut m = machine();
    // mov al, [DEVICE]; jmp $
    m.code(&[0x8a, 0x04, 0x25, 0, 0, 0x20, 0, 0xeb, 0xfe]);
    assert_eq!(m.cpu.run(100), Exit::Mmio { gpa: DEVICE, size: 1, write: false });
    m.cpu.kick_handle().kick();
    assert!(m.cpu.complete_read(&[7]));
    assert_eq!(m.cpu.run(100), Exit::Kicked);
    assert_eq!(m.cpu.state().rip, CODE + 7, "the instruction was finished first");
}

#[test]
fn interrupts_wait_for_the_shadow_of_sti() {
    let mut m = with_tables();
    m.cpu = {
        let state = m.cpu.state().clone();
        let mut cpu = Cpu::new(0, Config::default(), m.ram.clone(), Box::new(Line(Some(0x30))));
        cpu.update(|st| *st = state);
        cpu
    };
    // nop; sti; nop; nop
    m.code(&[0x90, 0xfb, 0x90, 0x90]);
    assert_eq!(expect_vector(&mut m, 0x30, 1), [CODE + 3], "after the instruction behind STI");
    // What the owner injects was accepted before: it is delivered at once.
    let mut m = with_tables();
    m.code(&[0x90]);
    assert!(m.cpu.inject_interrupt(0x31));
    assert!(!m.cpu.inject_interrupt(0x32), "one at a time");
    assert_eq!(expect_vector(&mut m, 0x31, 1), [CODE]);
    // An NMI wakes from HLT even with IF clear, and blocks the next until IRET.
    let mut m = with_tables();
    m.code(&[0x90]);
    m.run();
    m.cpu.inject_nmi();
    assert_eq!(expect_vector(&mut m, 2, 1), [CODE + 2]);
    m.cpu.inject_nmi();
    assert_eq!(m.cpu.run(100), Exit::Halted);
    assert_eq!(m.cpu.state().rip, HANDLER + 0x21, "still blocked");
    // The window: not before IF is set.
    let mut m = machine();
    m.code(&[0x90, 0xfb, 0x90]);
    m.cpu.request_interrupt_window(true);
    assert_eq!(m.cpu.run(100), Exit::InterruptWindow);
    assert_eq!(m.cpu.state().rip, CODE + 3);
}

#[test]
fn iret_restores_what_the_interrupt_pushed() {
    let mut m = with_tables();
    // iretq
    m.memory.write(HANDLER + 16 * 0x80, &[0x48, 0xcf]);
    // int 0x80; mov al, 9
    let st = m.code(&[0xcd, 0x80, 0xb0, 9]).run();
    assert_eq!((st.gpr[0], st.gpr[4], st.rip), (9, STACK, CODE + 5));
}

#[test]
fn a_data_breakpoint_hit_by_mov_ss_waits_for_the_next_instruction() {
    // mov ss, [0x5000], which DR1 watches, and what follows it: the vector whose handler halts, and the return addresses on the
    // stack, innermost first (frames of five words at multiples of 16 bytes).
    let mov_ss = [0x8e, 0x14, 0x25, 0, 0x50, 0, 0];
    for (next, returns) in [
        (&[0x90][..], &[CODE + 8][..]),
        // INT1 is a #DB already: one delivery for both.
        (&[0xf1], &[CODE + 8]),
        // Interrupts are delivered first, and then the #DB at the first instruction of the handler.
        (&[0xcc], &[HANDLER + 16 * 3, CODE + 8]),
        (&[0xcd, 0x80], &[HANDLER + 16 * 0x80, CODE + 9]),
        // So are faults.
        (&[0x0f, 0x0b], &[HANDLER + 16 * 6, CODE + 7]),
    ] {
        let mut m = with_tables();
        m.memory.write(0x5000, &16u16.to_le_bytes());
        m.code(&[&mov_ss, next].concat());
        m.cpu.update(|st| (st.dr[1], st.dr7) = (0x5000, 0x408 | 0xf << 20));
        let stack = expect_vector(&mut m, 1, 6 * returns.len());
        let found: Vec<u64> = stack.iter().step_by(6).copied().collect();
        assert_eq!(found, returns, "behind {next:02x?}");
        assert_eq!(m.cpu.state().dr6 & 0x400f, 2);
        assert_eq!(m.cpu.state().events.debug_trap, 0);
    }
    // The trap of a single step is not held.
    let mut m = with_tables();
    m.code(&[0x8e, 0xd0, 0x90, 0x90]);
    m.cpu.update(|st| (st.rflags, st.gpr[0]) = (st.rflags | rflags::TF, 16));
    assert_eq!(expect_vector(&mut m, 1, 1), [CODE + 3]);
}

#[test]
fn an_x87_store_that_an_exception_prevents_faults_like_any_other() {
    let mut m = with_tables();
    // fstp dword [0x300000], where nothing is mapped, of an empty register with invalid operations unmasked.
    m.code(&[0xd9, 0x1c, 0x25, 0, 0, 0x30, 0]);
    m.cpu.update(|st| (st.x87.fcw, st.x87.valid) = (0x37e, 0));
    assert_eq!(expect_vector(&mut m, 14, 2), [2, CODE]);
    assert_eq!((m.cpu.state().cr2, m.cpu.state().x87.fsw), (0x30_0000, 0));
}

#[test]
fn loops_with_a_condition_are_jumps_within_a_block_too() {
    // mov ecx, 5; xor eax, eax; again: inc eax; cmp eax, 3; loopne again (e0) or loope again (e1)
    for (opcode, count, left) in [(0xe0, 3, 2), (0xe1, 1, 4)] {
        let mut m = machine();
        let st = m.code(&[0xb9, 5, 0, 0, 0, 0x31, 0xc0, 0xff, 0xc0, 0x83, 0xf8, 3, opcode, 0xf9]).run();
        assert_eq!((st.gpr[0], st.gpr[1]), (count, left), "{opcode:x}");
    }
}

#[test]
fn addresses_that_are_not_canonical_fault_by_segment() {
    let edge = 0x7fff_ffff_fffe;
    let high = 1 << 62;
    for (code, register, value, vector) in [
        // mov eax, [rbx], the same with the prefix for SS, which is ignored; lodsb with it.
        (&[0x8b, 0x03][..], 3, high, 13),
        (&[0x36, 0x8b, 0x03], 3, high, 13),
        (&[0x36, 0xac], 6, high, 13),
        // mov eax, [rbp + 0], the same with the prefix for DS.
        (&[0x8b, 0x45, 0], 5, high, 12),
        (&[0x3e, 0x8b, 0x45, 0], 5, high, 12),
        // Bytes that reach over the edge of the lower half, whose last page is not mapped either: MOV both ways, LEAVE, ADD, FSTP m80.
        (&[0x8b, 0x03], 3, edge, 13),
        (&[0x89, 0x03], 3, edge, 13),
        (&[0xc9], 5, edge, 12),
        (&[0x01, 0x03], 3, edge, 13),
        (&[0xdb, 0x3b], 3, edge, 13),
    ] {
        let mut m = with_tables();
        m.code(code);
        m.cpu.update(|st| st.gpr[register] = value);
        assert_eq!(expect_vector(&mut m, vector, 2), [0, CODE], "{code:02x?}");
    }
    // push [0x5000], pop [0x5000], call [0x5000] where the stack is the operand with the bad address; the handler has its own.
    for code in
        [[0xff, 0x34, 0x25, 0, 0x50, 0, 0], [0x8f, 0x04, 0x25, 0, 0x50, 0, 0], [0xff, 0x14, 0x25, 0, 0x50, 0, 0]]
    {
        let mut m = with_tables();
        m.code(&code);
        m.memory.write(TSS + 36, &0x7000u64.to_le_bytes());
        m.memory.write(IDT + 16 * 12 + 4, &[1]);
        m.cpu.update(|st| st.gpr[4] = high);
        assert_eq!(expect_vector(&mut m, 12, 2), [0, CODE], "{code:02x?}");
    }
}

#[test]
fn registers_of_hidden_apic_features_do_not_exist() {
    struct Apic;
    impl crate::Bus for Apic {
        fn msr_read(&mut self, _: u32, _: u64) -> crate::MsrAnswer {
            crate::MsrAnswer::Done(0)
        }
        fn msr_write(&mut self, _: u32, _: u64, _: u64) -> crate::MsrAnswer {
            crate::MsrAnswer::Done(0)
        }
    }
    let mut m = Machine::new(Box::new(Apic));
    let x2apic_mode = 0xfee0_0c00;
    for (index, value) in [(0x1b, x2apic_mode), (0x802, 0), (0x6e0, 1)] {
        assert!(m.cpu.msr(index).is_some() && m.cpu.set_msr(index, value), "{index:#x}");
    }
    let mut entries = m.cpu.cpuid().to_vec();
    for entry in entries.iter_mut().filter(|entry| entry.leaf == 1) {
        entry.ecx &= !(1 << 21 | 1 << 24);
    }
    m.cpu.set_cpuid(&entries);
    for (index, value) in [(0x802, 0), (0x6e0, 1)] {
        assert!(m.cpu.msr(index).is_none() && !m.cpu.set_msr(index, value), "{index:#x}");
    }
    assert!(m.cpu.set_msr(0x1b, 0xfee0_0800) && !m.cpu.set_msr(0x1b, x2apic_mode));
}

#[test]
fn handlers_that_cannot_be_fetched_use_up_the_budget() {
    for step in [false, true] {
        let mut m = with_tables();
        // The page fault's handler is where nothing is mapped.
        m.memory.write(IDT + 16 * 14 + 6, &0x30u16.to_le_bytes());
        m.cpu.update(|st| {
            st.rip = 0x30_0000;
            // Instruction breakpoints make the CPU look at each instruction on its own.
            st.dr7 = if step { 0x401 } else { 0x400 };
        });
        assert_eq!(m.cpu.run(50), Exit::Budget);
        assert!(m.cpu.state().cr2 >= 0x30_0000);
    }
}

#[test]
fn single_step_and_breakpoints() {
    // TF: #DB after each instruction.
    let mut m = with_tables();
    m.code(&[0x90, 0x90]);
    m.cpu.update(|st| st.rflags |= rflags::TF);
    assert_eq!(expect_vector(&mut m, 1, 1), [CODE + 1]);
    assert_eq!(m.cpu.state().dr6 & 0x4000, 0x4000);
    // DR0: an instruction breakpoint at the second instruction, DR1: a write to 0x5000.
    let mut m = with_tables();
    m.code(&[0x90, 0x90]);
    m.cpu.update(|st| (st.dr[0], st.dr7) = (CODE + 1, 0x401));
    assert_eq!(expect_vector(&mut m, 1, 1), [CODE + 1]);
    assert_eq!(m.cpu.state().dr6 & 0xf, 1);
    let mut m = with_tables();
    // mov [0x5002], al; nop
    m.code(&[0x88, 0x04, 0x25, 2, 0x50, 0, 0, 0x90]);
    m.cpu.update(|st| (st.dr[1], st.dr7) = (0x5000, 0x404 | 0xd << 20));
    assert_eq!(expect_vector(&mut m, 1, 1), [CODE + 7]);
    assert_eq!(m.cpu.state().dr6 & 0xf, 2);
    // The owner's: INT3 and steps are exits.
    let mut m = machine();
    m.code(&[0x90, 0xcc]);
    m.cpu.set_guest_debug(GuestDebug { software_breakpoints: true, single_step: true, ..GuestDebug::default() });
    assert_eq!(m.cpu.run(100), Exit::Debug { vector: 1, dr6: 0x4000 });
    assert_eq!(m.cpu.run(100), Exit::Debug { vector: 3, dr6: 0 });
    assert_eq!(m.cpu.state().rip, CODE + 1);
}

#[test]
fn string_instructions_move_pages_and_single_elements() {
    let mut m = machine();
    for i in 0..0x3000u64 {
        m.memory.write(0x1_0000 + i, &[(i * 7) as u8]);
    }
    // rep movsb over three pages, misaligned
    let st = m
        .code(&[0xf3, 0xa4])
        .tap(|m| {
            m.cpu.update(|st| (st.gpr[1], st.gpr[6], st.gpr[7]) = (0x2ffd, 0x1_0003, 0x2_0001));
        })
        .run();
    assert_eq!((st.gpr[1], st.gpr[6], st.gpr[7]), (0, 0x1_3000, 0x2_2ffe));
    assert_eq!(m.memory.read::<0x2ffd>(0x2_0001), m.memory.read::<0x2ffd>(0x1_0003));
    // An overlapping forward copy repeats its start; backwards it does not.
    let st = run(&[0xf3, 0xa4, 0x8b, 0x04, 0x25, 0, 0x50, 0, 0], |st| {
        (st.gpr[1], st.gpr[6], st.gpr[7]) = (0x10, 0x5000, 0x5001);
    });
    assert_eq!(st.gpr[0], 0);
    // repne scasb finds; ZF set, RCX left
    let mut m = machine();
    m.memory.write(0x5000, b"hello");
    let st = m
        .code(&[0xf2, 0xae])
        .tap(|m| m.cpu.update(|st| (st.gpr[0], st.gpr[1], st.gpr[7]) = (u64::from(b'l'), 10, 0x5000)))
        .run();
    assert_eq!((st.gpr[1], st.gpr[7], st.rflags & rflags::ZF), (7, 0x5003, rflags::ZF));
}

impl Machine {
    /// Does something in the middle of a chain.
    fn tap(&mut self, f: impl FnOnce(&mut Machine)) -> &mut Machine {
        f(self);
        self
    }
}

#[test]
fn a_string_instruction_stops_at_the_fault_with_exact_registers() {
    let mut m = with_tables();
    // rep stosq up to and into the absent page at 0x400000: map only the page before it.
    m.memory.write(TABLES + 0x4000 + 8 * 511, &0x5003u64.to_le_bytes());
    m.cpu.update(|st| (st.gpr[0], st.gpr[1], st.gpr[7]) = (0x55, 100, 0x3f_ffe0));
    m.code(&[0xf3, 0x48, 0xab]);
    let frame = expect_vector(&mut m, 14, 2);
    assert_eq!(frame, [2, CODE]);
    let st = m.cpu.state();
    assert_eq!((st.gpr[1], st.gpr[7], st.cr2), (96, 0x40_0000, 0x40_0000));
}

#[test]
fn real_mode_interrupts_and_far_jumps() {
    let mut m = Machine::real(Box::new(NoBus));
    // IVT entry 0x21: 0000:6000
    m.memory.write(4 * 0x21, &[0x00, 0x60, 0, 0]);
    // inc bx; iret
    m.memory.write(0x6000, &[0x43, 0xcf]);
    // jmp 0x0100:0x0010 (linear 0x1010)
    m.memory.write(CODE, &[0xea, 0x10, 0x00, 0x00, 0x01]);
    // int 0x21; mov ax, cs; hlt
    m.memory.write(CODE + 0x10, &[0xcd, 0x21, 0x8c, 0xc8, 0xf4]);
    let st = m.run();
    assert_eq!((st.gpr[3] & 0xffff, st.gpr[0] & 0xffff, st.gpr[4]), (1, 0x100, STACK));
}

#[test]
fn from_real_to_long_mode() {
    let mut m = Machine::real(Box::new(NoBus));
    let table = |gpa: u64, entry: u64| m.memory.write(gpa, &entry.to_le_bytes());
    table(TABLES, TABLES + 0x1003);
    table(TABLES + 0x1000, TABLES + 0x2003);
    // One 2 MiB page.
    table(TABLES + 0x2000, 0x83);
    table(GDT + 8, 0x00af_9b00_0000_ffff);
    m.memory.write(0x2ff0, &[23, 0]);
    m.memory.write(0x2ff2, &(GDT as u32).to_le_bytes());
    #[rustfmt::skip]
    let code: &[u8] = &[
        0x0f, 0x01, 0x16, 0xf0, 0x2f,                   // lgdt [0x2ff0]
        0x66, 0xb8, 0x20, 0, 0, 0, 0x0f, 0x22, 0xe0,    // mov eax, PAE; mov cr4, eax
        0x66, 0xb8, 0, 0, 0x0f, 0, 0x0f, 0x22, 0xd8,    // mov eax, TABLES; mov cr3, eax
        0x66, 0xb9, 0x80, 0, 0, 0xc0, 0x0f, 0x32,       // mov ecx, EFER; rdmsr
        0x66, 0x0d, 0, 1, 0, 0, 0x0f, 0x30,             // or eax, LME; wrmsr
        0x66, 0xb8, 1, 0, 0, 0x80, 0x0f, 0x22, 0xc0,    // mov eax, PG | PE; mov cr0, eax
        0xea, 0x00, 0x60, 8, 0,                         // jmp 8:0x6000
    ];
    assert_eq!(TABLES, 0xf_0000);
    m.memory.write(CODE, code);
    // mov rax, 0x1122334455667788; hlt
    m.memory.write(0x6000, &[0x48, 0xb8, 0x88, 0x77, 0x66, 0x55, 0x44, 0x33, 0x22, 0x11, 0xf4]);
    let st = m.run();
    assert_eq!(st.gpr[0], 0x1122_3344_5566_7788);
    assert_eq!(st.msr.efer & efer::LMA, efer::LMA);
}

#[test]
fn two_cpus_add_with_locks() {
    let m = machine();
    // mov ecx, 50000; l: lock inc dword [0x5000]; loop l; hlt
    m.memory.write(CODE, &[0xb9, 0x50, 0xc3, 0, 0, 0xf0, 0xff, 0x04, 0x25, 0, 0x50, 0, 0, 0xe2, 0xf6, 0xf4]);
    let threads: Vec<_> = (0..2)
        .map(|id| {
            let config = Config { tsc: TscMode::Instructions(1), ..Config::default() };
            let mut cpu = Cpu::new(id, config, m.ram.clone(), Box::new(NoBus));
            let state = m.cpu.state().clone();
            cpu.update(|st| *st = state);
            std::thread::spawn(move || cpu.run(u64::MAX / 2))
        })
        .collect();
    for thread in threads {
        assert_eq!(thread.join().expect("no panic"), Exit::Halted);
    }
    assert_eq!(m.memory.read_u64(0x5000), 100_000);
}

#[test]
fn another_cpu_changes_code_that_this_one_runs() {
    let mut m = machine();
    // l: mov al, 1; cmp al, 2; jne l; hlt
    m.code(&[0xb0, 1, 0x3c, 2, 0x75, 0xfa]);
    let mut writer = Cpu::new(1, Config::default(), m.ram.clone(), Box::new(NoBus));
    let state = m.cpu.state().clone();
    // mov byte [CODE + 1], 2; hlt
    m.memory.write(0x6000, &[0xc6, 0x04, 0x25, 1, 0x10, 0, 0, 2, 0xf4]);
    writer.update(|st| {
        *st = state;
        st.rip = 0x6000;
    });
    let kick = m.cpu.kick_handle();
    let thread = std::thread::spawn(move || m.cpu.run(u64::MAX / 2));
    assert_eq!(writer.run(1000), Exit::Halted);
    assert_eq!(thread.join().expect("no panic"), Exit::Halted);
    drop(kick);
}

#[test]
fn dirty_pages_are_logged_while_a_cpu_runs() {
    let mut m = machine();
    m.ram.set_dirty_log(0, true).expect("mapped");
    // inc dword [0x5000]; jmp back
    m.code(&[0xff, 0x04, 0x25, 0, 0x50, 0, 0, 0xeb, 0xf7]);
    let kick = m.cpu.kick_handle();
    let ram = m.ram.clone();
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = stop.clone();
    let thread = std::thread::spawn(move || {
        while !stopped.load(Ordering::Relaxed) {
            m.cpu.run(100_000);
        }
    });
    let dirty = |bits: &[u64], page: usize| bits[page / 64] >> (page % 64) & 1 != 0;
    for _ in 0..3 {
        // Each round must see the page again: a CPU that kept a pointer would not mark it.
        while !dirty(&ram.take_dirty_log(0).expect("mapped"), 5) {
            std::thread::yield_now();
        }
    }
    stop.store(true, Ordering::Relaxed);
    kick.kick();
    thread.join().expect("no panic");
}

#[test]
fn memory_can_go_away() {
    let mut m = machine();
    // mov eax, [0x5000]
    m.code(&[0x8b, 0x04, 0x25, 0, 0x50, 0, 0]).run();
    m.ram.unmap(0).expect("mapped");
    m.cpu.update(|st| (st.rip, st.events.halted) = (CODE, false));
    // Page tables read as all ones: reserved bits, then no handler.
    assert_eq!(m.cpu.run(100), Exit::Shutdown);
}

#[test]
fn masked_features_do_not_exist() {
    let mut m = with_tables();
    let mut entries = m.cpu.cpuid().to_vec();
    entries.iter_mut().filter(|e| e.leaf == 1).for_each(|e| e.ecx &= !(1 << 23));
    m.cpu.set_cpuid(&entries);
    // popcnt eax, ecx
    m.code(&[0xf3, 0x0f, 0xb8, 0xc1]);
    assert_eq!(expect_vector(&mut m, 6, 1), [CODE]);
    // AVX was never there: vaddps ymm0, ymm0, ymm0
    let mut m = with_tables();
    m.code(&[0xc5, 0xfc, 0x58, 0xc0]);
    assert_eq!(expect_vector(&mut m, 6, 1), [CODE]);
}

#[test]
fn bad_control_values_fault() {
    // mov cr4, rax with a reserved bit; mov cr0, rax with PG and not PE; wrmsr LSTAR not canonical; wrmsr of an unknown MSR
    let cases: [(&[u8], u64, u64, u64); 5] = [
        (&[0x0f, 0x22, 0xe0], 1 << 40, 0, 0),
        (&[0x0f, 0x22, 0xc0], 1 << 31, 0, 0),
        (&[0x0f, 0x22, 0xd8], 1 << 60, 0, 0),
        (&[0x0f, 0x30], 0, 0xc000_0082, 1 << 31),
        (&[0x0f, 0x30], 0, 0xc001_2345, 0),
    ];
    for (code, rax, rcx, rdx) in cases {
        let mut m = with_tables();
        m.cpu.update(|st| (st.gpr[0], st.gpr[1], st.gpr[2]) = (rax, rcx, rdx));
        m.code(code);
        assert_eq!(expect_vector(&mut m, 13, 2), [0, CODE], "{code:02x?}");
    }
}

#[test]
fn compatibility_mode_uses_32_bits() {
    let mut m = machine();
    m.cpu.update(|st| {
        flat(st, false);
        st.gpr[4] = STACK;
    });
    // push 5; pop eax; inc eax (one byte: no REX there); mov ecx, esp
    let st = m.code(&[0x6a, 5, 0x58, 0x40, 0x89, 0xe1]).run();
    assert_eq!((st.gpr[0], st.gpr[1]), (6, STACK));
    assert_eq!(m.memory.read::<4>(STACK - 4), 5u32.to_le_bytes());
}

#[test]
fn random_bytes_never_panic() {
    let mut seed = 1u64;
    let mut next = || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) as u32
    };
    for round in 0..300 {
        let mut m = match round % 3 {
            0 => Machine::real(Box::new(NoBus)),
            _ => with_tables(),
        };
        if round % 3 == 1 {
            m.cpu.update(|st| flat(st, false));
        }
        for i in 0..0x4000u64 {
            m.memory.write(CODE + 4 * i, &next().to_le_bytes());
        }
        for _ in 0..20 {
            match m.cpu.run(200) {
                Exit::Mmio { size, write: false, .. } | Exit::Io { size, write: false, .. } => {
                    assert!(m.cpu.complete_read(&vec![0xa5; usize::from(size)]));
                }
                Exit::Halted | Exit::Shutdown => {
                    let at = CODE + u64::from(next() % 0x4000);
                    m.cpu.update(|st| {
                        st.events = Default::default();
                        st.rip = at;
                    });
                }
                _ => {}
            }
        }
    }
}

#[test]
fn an_access_across_the_end_of_the_address_space_does_not_hit_the_first_page() {
    let mut m = machine();
    // mov eax, [rcx]; mov eax, [rbx]: the first page is in the TLB when the last one, which is not mapped, is read.
    m.code(&[0x8b, 0x01, 0x8b, 0x03]);
    m.cpu.update(|st| st.gpr[3] = u64::MAX);
    // Without an IDT the page fault ends in a triple fault.
    assert_eq!(m.cpu.run(100), Exit::Shutdown);
    assert_eq!((m.cpu.state().cr2, m.cpu.state().rip), (u64::MAX, CODE + 2));
}
