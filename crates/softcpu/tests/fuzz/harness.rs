//! A hostile guest on the software CPU: any code in any mode with any page tables, control registers and segments. What must hold: nothing
//! panics, `run` comes back within its budget, exits are what the documentation says, and no byte outside guest RAM is touched.
//!
//! One input is one guest. It is read from the front: mode, what the machine answers, the seed of what is in memory; then changes of
//! single registers and of single words of memory; the rest is code. Any bytes are an input. The fuzz target of the same name
//! includes this file.

use std::alloc::{Layout, alloc, dealloc, handle_alloc_error};
use std::sync::Arc;

use vm_accel_softcpu::state::{Segment, cr0, cr4, efer, rflags, seg};
use vm_accel_softcpu::{Answer, Bus, Config, Cpu, CpuState, Emulated, Exit, GuestDebug, MsrAnswer, Ram, TscMode};

/// RAM at guest-physical address 0.
const LOW: usize = 0x1_0000;
/// RAM that can only be read, behind a hole.
const ROM: u64 = 0x2_0000;
const ROM_LEN: usize = 0x1000;
/// RAM above 4 GiB.
const HIGH: u64 = 1 << 32;
const HIGH_LEN: usize = 0x2000;
/// Where the tables and the code are.
const TABLES: u64 = 0x8000;
const GDT: u64 = 0x6000;
const IDT: u64 = 0x6800;
const TSS: u64 = 0x7800;
const CODE: u64 = 0x1000;
const STACK: u64 = 0x5000;
/// Instructions per call of `run`, and calls.
const BUDGET: u64 = 300;
const CALLS: usize = 24;
/// What is written around RAM when it is padded.
const CANARY: u8 = 0xa5;

/// Host memory of its own allocation, so that an address sanitizer sees what goes past its ends. Padding on both sides shows it without
/// one, as far as it is written.
struct Host {
    start: *mut u8,
    layout: Layout,
    padding: usize,
}

// SAFETY: the memory is only reached through pointers; one thread uses it.
unsafe impl Send for Host {}
// SAFETY: as above.
unsafe impl Sync for Host {}

impl Host {
    fn new(len: usize, padding: usize) -> Arc<Self> {
        let layout = Layout::from_size_align(len + 2 * padding, 4096).expect("a small layout");
        // SAFETY: the layout is not empty.
        let start = unsafe { alloc(layout) };
        if start.is_null() {
            handle_alloc_error(layout);
        }
        // SAFETY: the whole allocation.
        unsafe { start.write_bytes(CANARY, layout.size()) };
        Arc::new(Self { start, layout, padding })
    }

    fn len(&self) -> usize {
        self.layout.size() - 2 * self.padding
    }

    fn guest(&self) -> *mut u8 {
        self.start.wrapping_add(self.padding)
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        let at = at as usize % self.len();
        let len = bytes.len().min(self.len() - at);
        // SAFETY: cut to what lies inside.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.guest().add(at), len) };
    }

    fn check(&self) {
        for side in [0, self.padding + self.len()] {
            for at in side..side + self.padding {
                // SAFETY: inside the allocation.
                assert_eq!(unsafe { self.start.add(at).read() }, CANARY, "written outside of RAM, at {at:#x}");
            }
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout; the CPU that used it is gone, or holds an `Arc` of this.
        unsafe { dealloc(self.start, self.layout) };
    }
}

/// The input; zeros behind its end.
#[derive(Clone)]
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        let len = N.min(self.0.len());
        bytes[..len].copy_from_slice(&self.0[..len]);
        self.0 = &self.0[len..];
        bytes
    }

    fn byte(&mut self) -> u8 {
        self.take::<1>()[0]
    }

    fn word(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }
}

/// A machine that answers some accesses itself and leaves others to the owner, and sometimes has an interrupt.
struct Machine {
    random: Random,
    answers: u8,
}

impl Machine {
    fn answer(&mut self, data: Option<&mut [u8]>) -> Answer {
        if self.answers & 1 == 0 || self.answers & 2 != 0 && self.random.next() & 1 != 0 {
            return Answer::Pending;
        }
        data.into_iter().flatten().for_each(|byte| *byte = self.random.next() as u8);
        Answer::Done
    }
}

impl Bus for Machine {
    fn mmio_read(&mut self, _: u64, data: &mut [u8]) -> Answer {
        assert!((1..=8).contains(&data.len()));
        self.answer(Some(data))
    }
    fn mmio_write(&mut self, _: u64, data: &[u8]) -> Answer {
        assert!((1..=8).contains(&data.len()));
        self.answer(None)
    }
    fn port_read(&mut self, _: u16, data: &mut [u8]) -> Answer {
        assert!(matches!(data.len(), 1 | 2 | 4));
        self.answer(Some(data))
    }
    fn port_write(&mut self, _: u16, data: &[u8]) -> Answer {
        assert!(matches!(data.len(), 1 | 2 | 4));
        self.answer(None)
    }
    fn msr_read(&mut self, index: u32, _: u64) -> MsrAnswer {
        match self.answers & 0xc {
            4 => MsrAnswer::Done(self.random.next()),
            8 => MsrAnswer::Fault,
            _ if index == 0x1b => MsrAnswer::Done(0xfee0_0900),
            _ => MsrAnswer::NotMine,
        }
    }
    fn interrupt_pending(&mut self, _: u64) -> bool {
        self.answers & 0x10 != 0 && self.random.next() & 7 == 0
    }
    fn acknowledge(&mut self) -> Option<u8> {
        let random = self.random.next();
        (random & 0x300 != 0).then_some(random as u8)
    }
}

fn flat(selector: u16, access: u16) -> Segment {
    Segment { selector, base: 0, limit: u32::MAX, access, unusable: false }
}

/// What memory holds before the changes: descriptor tables that work, page tables that map most of the first 2 MiB of each GiB to
/// RAM, and noise that looks like both.
fn fill(low: &Host, high: &Host, random: &mut Random, mode: u8) {
    let entry = |random: &mut Random| {
        let flags = random.next();
        // Present, writable and for users most of the time; a frame that exists, most of the time.
        let rights = 7 ^ if flags & 0x70 == 0 { flags & 7 } else { 0 };
        let frame = match flags >> 8 & 31 {
            0 => random.next() & 0xf_ffff_ffff_f000,
            1 => HIGH | flags & 0x1000,
            2 => ROM,
            _ => random.next() & 0xf000,
        };
        let rare = if flags >> 16 & 31 == 0 { flags & 0x8000_0000_0000_0ff8 } else { 0x60 };
        rights | frame | rare
    };
    for at in (0..LOW as u64).step_by(8) {
        low.write(at, &entry(random).to_le_bytes());
    }
    for at in (0..HIGH_LEN as u64).step_by(8) {
        high.write(at, &random.next().to_le_bytes());
    }
    // 32-bit tables and PAE ones have their own formats; what is here suits them often enough.
    let wide = mode & 7 != 2;
    for index in 0..512u64 {
        let slot = |table: u64, value: u64| {
            if wide {
                low.write(table + 8 * index, &value.to_le_bytes());
            } else {
                low.write(table + 4 * index, &(value as u32).to_le_bytes());
            }
        };
        let levels = if wide { 3 } else { 1 };
        for level in 0..levels {
            slot(TABLES + 0x1000 * level, (TABLES + 0x1000 * (level + 1)) | 0x67);
        }
        slot(TABLES + 0x1000 * levels, (index << 12) & 0xf000 | 0x67);
        if mode & 0x80 != 0 && random.next() & 3 == 0 {
            slot(TABLES + 0x1000 * (random.next() & 3), entry(random));
        }
    }
    let code = match mode & 7 {
        0 | 1 => 0x0000_9b00_0000_ffff_u64,
        2 | 3 => 0x00cf_9b00_0000_ffff,
        _ => 0x00af_9b00_0000_ffff,
    };
    let dpl = 0x6000_0000_0000;
    let descriptors =
        [0, code, 0x00cf_9300_0000_ffff, code | dpl, 0x00cf_f300_0000_ffff, 0x0000_8b00_7800_0067, 0, random.next()];
    for (index, descriptor) in descriptors.into_iter().enumerate() {
        low.write(GDT + 8 * index as u64, &descriptor.to_le_bytes());
    }
    for vector in 0..256u64 {
        let target = CODE + 0x800 + vector;
        let size = if mode & 7 > 4 { 16 } else { 8 };
        let kind = if mode & 7 == 1 { 0x8600 } else { 0x8e00 } | (vector & 1) << 8 | (vector & 2) << 13;
        low.write(IDT + size * vector, &(target | 8 << 16 | kind << 32).to_le_bytes());
        if size == 16 {
            low.write(IDT + size * vector + 8, &[0; 8]);
        }
    }
}

/// Real mode; protected mode of 16 bits, of 32 bits with 32-bit paging, with PAE; compatibility mode; 64-bit mode at either level.
fn mode(st: &mut CpuState, mode: u8) {
    let user = mode & 0x40 != 0 && mode & 7 != 0;
    let dpl = if user { 0x60 } else { 0 };
    let selector = |index: u16| if user { index << 3 | 3 } else { index << 3 };
    let code = match mode & 7 {
        0 | 1 => 0x009b,
        2..=4 => 0xc09b,
        _ => 0xa09b,
    };
    if mode & 7 == 0 {
        st.segs[seg::CS] = Segment::real(0, true);
        st.idtr.base = 0;
    } else {
        st.segs[..6].fill(flat(selector(if user { 4 } else { 2 }), 0xc093 | dpl));
        st.segs[seg::CS] = flat(selector(if user { 3 } else { 1 }), code | dpl);
        st.gdtr.base = GDT;
        st.gdtr.limit = 0x3f;
        st.idtr.base = IDT;
        st.idtr.limit = if mode & 7 > 4 { 0xfff } else { 0x7ff };
        st.tr = Segment { selector: 0x28, base: TSS, limit: 0x67, access: 0x8b, unusable: false };
        st.cr0 |= cr0::PE | cr0::NE;
        st.cpl = if user { 3 } else { 0 };
    }
    st.cr3 = TABLES;
    st.cr4 = cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE;
    st.xcr0 = 3;
    if mode & 7 > 1 {
        st.cr0 |= cr0::PG | cr0::WP;
    }
    if mode & 7 > 2 {
        st.cr4 |= cr4::PAE;
        st.pdpte = [TABLES + 0x1001; 4];
        if mode & 7 == 3 {
            st.cr3 = TABLES + 0x1000;
        }
    }
    if mode & 7 > 3 {
        st.msr.efer = efer::LME | efer::LMA | efer::SCE | efer::NXE;
    }
    st.rip = CODE;
    st.gpr[4] = STACK;
    st.rflags = rflags::FIXED | if mode & 0x20 != 0 { rflags::IF } else { 0 };
}

/// One change of the state.
fn change(st: &mut CpuState, which: u8, value: u64) {
    let low = value as u32;
    let segment = |segment: &mut Segment| match which >> 5 {
        0 | 1 => segment.base = value,
        2 => segment.limit = low,
        3 => segment.access = value as u16,
        4 => segment.selector = value as u16,
        5 => segment.unusable ^= true,
        _ => (segment.access, segment.limit, segment.base) = (value as u16, low, value >> 32),
    };
    match which & 31 {
        0 => st.cr0 = if which & 0x80 == 0 { value & cr0::ALL } else { value },
        1 => st.cr4 ^= if which & 0x80 == 0 { value & 0x37_1fff } else { value },
        2 => st.cr3 = value,
        3 => st.msr.efer = value,
        4 => st.rflags = value & rflags::ALL,
        5 => st.rip = value,
        6..=11 => segment(&mut st.segs[usize::from(which & 31) - 6]),
        12 => segment(&mut st.tr),
        13 => segment(&mut st.ldtr),
        14 => (st.gdtr.base, st.gdtr.limit) = (value >> 16, value as u16),
        15 => (st.idtr.base, st.idtr.limit) = (value >> 16, value as u16),
        16 => st.dr7 = value & 0xffff_ffff,
        17 => st.dr[usize::from(which >> 5 & 3)] = value,
        18 => st.cpl = value as u8,
        19 => st.mxcsr = low & 0xffff,
        20 => (st.x87.fcw, st.x87.fsw, st.x87.valid) = (value as u16, (value >> 16) as u16, (value >> 32) as u8),
        21 => st.xcr0 = value,
        22 => st.xmm[usize::from(which >> 5)] = u128::from(value) << 64 | u128::from(!value),
        23 => st.x87.sig[usize::from(which >> 5)] = value,
        24 => {
            (st.events.nmi, st.events.sti_shadow, st.events.mov_ss_shadow) =
                (value & 1 != 0, value & 2 != 0, value & 4 != 0)
        }
        25 => st.events.interrupt = Some(value as u8),
        26 => st.pdpte[usize::from(which >> 5 & 3)] = value,
        _ => st.gpr[usize::from(which >> 5) | usize::from(which & 1) << 3] = value,
    }
}

/// Runs one input. `padding` is put around RAM and looked at afterwards; 0 leaves that to an address sanitizer.
pub(crate) fn run(input: &[u8], padding: usize) {
    let mut input = Input(input);
    let (kind, answers, seed) = (input.byte(), input.byte(), input.word());
    let mut random = Random(seed);
    let hosts = [(0, LOW, true), (ROM, ROM_LEN, false), (HIGH, HIGH_LEN, true)]
        .map(|(gpa, len, writable)| (gpa, Host::new(len, padding), writable));
    fill(&hosts[0].1, &hosts[2].1, &mut random, kind);
    let ram = Ram::new();
    for (gpa, host, writable) in &hosts {
        // SAFETY: the owner that is handed over keeps the allocation; nothing but the guest and this thread use it.
        unsafe { ram.map(*gpa, host.guest(), host.len() as u64, *writable, host.clone()) }.expect("ranges are valid");
    }
    let config = Config { tsc: TscMode::Instructions(3), ..Config::default() };
    let bus = Machine { random: Random(seed ^ 1), answers };
    let mut cpu = Cpu::new(u32::from(answers >> 7), config, ram.clone(), Box::new(bus));
    let (registers, words) = (input.byte() & 31, input.byte() & 31);
    cpu.update(|st| {
        mode(st, kind);
        for _ in 0..registers {
            let which = input.byte();
            let value = input.word();
            change(st, which, value);
        }
    });
    for _ in 0..words {
        let at = u16::from_le_bytes(input.take());
        hosts[0].1.write(u64::from(at) & !7, &input.word().to_le_bytes());
    }
    // From here on the input is code, and what is read from devices.
    hosts[0].1.write(CODE, &input.0[..input.0.len().min(0x800)]);
    hosts[0].1.write(CODE + 0x800, input.0);
    let mut answers_left = input.clone();
    if kind & 8 != 0 {
        cpu.set_guest_debug(GuestDebug {
            single_step: kind & 16 != 0,
            software_breakpoints: true,
            ..GuestDebug::default()
        });
    }
    if kind & 16 != 0 {
        for (gpa, ..) in &hosts {
            ram.set_dirty_log(*gpa, true).expect("it is mapped");
        }
    }
    for call in 0..CALLS {
        let before = cpu.instructions();
        let exit = cpu.run(BUDGET);
        // The last block may go on to its end.
        assert!(cpu.instructions() - before <= BUDGET + 64, "{} instructions", cpu.instructions() - before);
        match exit {
            Exit::Io { size, write, .. } => {
                assert!(matches!(size, 1 | 2 | 4));
                assert!(!write || cpu.io_data().len() >= usize::from(size));
                if !write {
                    let data: [u8; 8] = answers_left.take();
                    assert!(!cpu.complete_read(&data[..usize::from(size) - 1]), "a short answer was taken");
                    // REP INS asks for more than one element.
                    let _ = cpu.complete_read(&data[..usize::from(size)]);
                }
            }
            Exit::Mmio { size, write, .. } => {
                assert!((1..=8).contains(&size));
                if write {
                    assert_eq!(cpu.io_data().len(), usize::from(size));
                } else {
                    let data: [u8; 8] = answers_left.take();
                    assert!(cpu.complete_read(&data[..usize::from(size)]));
                }
            }
            Exit::Halted => {
                if call & 1 == 0 {
                    cpu.inject_nmi();
                } else {
                    let _ = cpu.inject_interrupt(answers_left.byte());
                }
            }
            Exit::Shutdown => break,
            _ => {}
        }
        if call == CALLS / 2 && cpu.quiesce().is_none() {
            // The same code as a hypervisor hands it over.
            let code: [u8; 15] = answers_left.take();
            let emulated = cpu.emulate_one(&code);
            if let Emulated::Pending(Exit::Mmio { size, write: false, .. } | Exit::Io { size, write: false, .. }) =
                emulated
            {
                let data: [u8; 8] = answers_left.take();
                let _ = cpu.complete_read(&data[..usize::from(size)]);
                let _ = cpu.emulate_one(&code);
            }
        }
        let _ = cpu.translate(answers_left.clone().word());
    }
    let st = cpu.state();
    assert!(st.gpr[16..].iter().all(|value| *value == 0), "a register that does not exist was written");
    assert_eq!(st.rflags & !rflags::ALL, rflags::FIXED, "flags that do not exist");
    drop(cpu);
    drop(ram);
    hosts.iter().for_each(|(_, host, _)| host.check());
}

/// Inputs to begin with: each mode with code that uses it.
pub(crate) fn seeds() -> Vec<Vec<u8>> {
    const CODES: [&[u8]; 12] = [
        // add, push, pop, call, ret, rep stos, jcc back
        &[0x01, 0xc3, 0x50, 0x5b, 0xe8, 0, 0, 0, 0, 0x58, 0xb9, 0x20, 0, 0, 0, 0xf3, 0xaa, 0x75, 0xee],
        // mov to and from control registers, a far jump, hlt
        &[0x0f, 0x20, 0xc0, 0x0f, 0x22, 0xc0, 0x0f, 0x20, 0xe0, 0x0f, 0x22, 0xe0, 0xea, 0, 0x18, 0, 0, 8, 0, 0xf4],
        // int 0x80, int3, ud2, iret
        &[0xcd, 0x80, 0xcc, 0x0f, 0x0b, 0xcf],
        // in, out, rep ins, rep outs
        &[0xe4, 0x60, 0xe6, 0x80, 0xec, 0xef, 0xf3, 0x6c, 0xf3, 0x6f],
        // SSE: movaps, addps, cvt, pshufb, pcmpistri, aesenc
        &[
            0x0f, 0x28, 0xc1, 0x0f, 0x58, 0xd3, 0xf3, 0x0f, 0x2d, 0xc2, 0x66, 0x0f, 0x38, 0, 0xca, 0x66, 0x0f, 0x3a,
            0x63, 0xc1, 8,
        ],
        // x87: fld1, fldpi, fsincos, fdivp, fstp, fxsave, fnsave
        &[0xd9, 0xe8, 0xd9, 0xeb, 0xd9, 0xfb, 0xde, 0xf9, 0xdd, 0x1c, 0x24, 0x0f, 0xae, 0x06, 0xdd, 0x36],
        // lgdt, lidt, ltr, lldt, mov ss, lss, retf
        &[0x0f, 0x01, 0x16, 0x0f, 0x01, 0x1e, 0x0f, 0, 0xd8, 0x0f, 0, 0xd0, 0x8e, 0xd0, 0x0f, 0xb2, 0x26, 0xcb],
        // rdmsr, wrmsr, cpuid, rdtsc, xgetbv, invlpg, swapgs, syscall, sysret
        &[
            0x0f, 0x32, 0x0f, 0x30, 0x0f, 0xa2, 0x0f, 0x31, 0x0f, 1, 0xd0, 0x0f, 1, 0x3e, 0x0f, 1, 0xf8, 0x0f, 5, 0x0f,
            7,
        ],
        // lock cmpxchg, xadd, cmpxchg16b, bts, enter, leave
        &[
            0xf0, 0x0f, 0xb1, 0x0b, 0xf0, 0x0f, 0xc1, 0x0b, 0x48, 0x0f, 0xc7, 0x0b, 0x0f, 0xab, 0x0b, 0xc8, 8, 0, 3,
            0xc9,
        ],
        // code that writes into itself
        &[0xc6, 0x05, 0, 0, 0, 0, 0x90, 0xc6, 0x06, 0x08, 0x10, 0xf4, 0xeb, 0xf3],
        // xsave, xrstor, movs across pages, popf, sti, cli
        &[0x0f, 0xae, 0x26, 0x0f, 0xae, 0x2e, 0xf3, 0xa5, 0x9d, 0xfb, 0xfa, 0x9c, 0x0f, 1, 0xca, 0x0f, 1, 0xcb],
        // a far call through memory, int1, sysenter, sysexit, mov dr7, mov ss followed by int
        &[0xff, 0x1e, 0xf1, 0x0f, 0x34, 0x0f, 0x35, 0x0f, 0x23, 0xf8, 0x8e, 0xd0, 0xcd, 3],
    ];
    let mut seeds = Vec::new();
    for (index, code) in CODES.into_iter().enumerate() {
        for mode in 0..=5u8 {
            let kind = mode | (index as u8 & 1) << 6 | (index as u8 & 2) << 4 | (index as u8 & 4) << 5;
            let mut seed = vec![kind, (index as u8).wrapping_mul(0x15)];
            seed.extend((index as u64 + 1).to_le_bytes());
            // One register and one word, so that there is something to change.
            seed.extend([1, 1, 27 + 32 * (index as u8 & 7)]);
            seed.extend(0x2000u64.to_le_bytes());
            seed.extend([0x10, 0x80]);
            seed.extend((TABLES + 0x1067).to_le_bytes());
            seed.extend(code);
            seeds.push(seed);
        }
    }
    seeds
}
