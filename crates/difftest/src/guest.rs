//! The software CPU: user mode of a small machine whose code and data are where the host has them. Each exception leads to a HLT of its
//! own in the kernel, so that delivery is tested too.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vm_accel_softcpu::state::{Events, Segment, Table, cr0, cr4, efer, rflags, seg};
use vm_accel_softcpu::{Config, Cpu, CpuState, Emulated, Exit, NoBus, Ram, TscMode};

use crate::machine::{
    CODE, CODE_LEN, CS, DATA, DATA_LEN, Fault, Outcome, READ_ONLY, READ_ONLY_LEN, SS, Sequence, State, read_only,
};

/// Where guest-physical address 0 is: the first 64 KiB are the kernel's, in the upper half, as Linux has it.
const KERNEL: u64 = 0xffff_8000_0000_0000;
/// Guest-physical addresses.
const TABLES: u64 = 0x1000;
const GDT: u64 = 0xa000;
const IDT: u64 = 0xb000;
const TSS: u64 = 0xc000;
const STUBS: u64 = 0xd000;
const STACK: u64 = 0xf000;
const CODE_GPA: u64 = 0x1_0000;
const DATA_GPA: u64 = 0x1_1000;
const RAM: usize = 0x2_0000;
/// Vectors that have a gate.
const VECTORS: u64 = 32;
/// Far more than a sequence has; repeated string instructions count as one.
const BUDGET: u64 = 10_000;

/// Guest RAM: cells, because the CPU writes to them through a shared reference.
struct Memory(Box<[Page]>);

#[repr(align(4096))]
struct Page([AtomicU64; 512]);

impl Memory {
    fn new() -> Arc<Self> {
        Arc::new(Memory((0..RAM / 4096).map(|_| Page([const { AtomicU64::new(0) }; 512])).collect()))
    }

    fn host(&self) -> *mut u8 {
        self.0.as_ptr().cast_mut().cast()
    }

    fn write(&self, gpa: u64, bytes: &[u8]) {
        assert!(gpa as usize + bytes.len() <= RAM);
        // SAFETY: inside the allocation, whose cells may be written through a shared reference; the CPU runs on this thread.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.host().add(gpa as usize), bytes.len()) };
    }

    fn write_u64(&self, gpa: u64, value: u64) {
        self.write(gpa, &value.to_le_bytes());
    }

    fn read(&self, gpa: u64, len: usize) -> Vec<u8> {
        assert!(gpa as usize + len <= RAM);
        let mut bytes = vec![0; len];
        // SAFETY: as above.
        unsafe { std::ptr::copy_nonoverlapping(self.host().add(gpa as usize), bytes.as_mut_ptr(), len) };
        bytes
    }

    fn read_u64(&self, gpa: u64) -> u64 {
        self.0[gpa as usize >> 12].0[gpa as usize >> 3 & 511].load(Ordering::Relaxed)
    }
}

/// The machine.
pub(crate) struct Guest {
    cpu: Cpu,
    memory: Arc<Memory>,
    ram: Arc<Ram>,
}

fn user_segment(selector: u16, access: u16) -> Segment {
    Segment { selector, base: 0, limit: u32::MAX, access, unusable: false }
}

impl Guest {
    pub(crate) fn new() -> Self {
        let memory = Memory::new();
        let ram = Ram::new();
        // SAFETY: `Memory` owns the allocation and allows writes through shared references.
        unsafe { ram.map(0, memory.host(), RAM as u64, true, memory.clone()) }.expect("the range is valid");
        let (kernel, user, no_execute) = (3, 7, 1 << 63);
        let read_only_gpa = DATA_GPA + DATA_LEN as u64;
        let mut next = TABLES + 0x1000;
        for (linear, gpa, len, rights) in [
            (KERNEL, 0, CODE_GPA, kernel),
            (CODE, CODE_GPA, CODE_LEN as u64, user),
            (DATA, DATA_GPA, DATA_LEN as u64, user | no_execute),
            (READ_ONLY, read_only_gpa, READ_ONLY_LEN as u64, 5 | no_execute),
        ] {
            for page in (0..len).step_by(0x1000) {
                let mut table = TABLES;
                for level in [39, 30, 21] {
                    let entry = table + 8 * (((linear + page) >> level) & 511);
                    if memory.read_u64(entry) == 0 {
                        memory.write_u64(entry, next | 7);
                        next += 0x1000;
                    }
                    table = memory.read_u64(entry) & !0xfff;
                }
                memory.write_u64(table + 8 * (((linear + page) >> 12) & 511), (gpa + page) | rights);
            }
        }
        assert!(next <= GDT);
        memory.write(read_only_gpa, &read_only());
        let descriptors =
            [(1, 0x00af_9b00_0000_ffff), (SS >> 3, 0x00cf_f300_0000_ffff), (CS >> 3, 0x00af_fb00_0000_ffff)];
        for (index, descriptor) in descriptors {
            memory.write_u64(GDT + 8 * u64::from(index), descriptor);
        }
        for vector in 0..VECTORS {
            let stub = STUBS + 16 * vector;
            let high = KERNEL + stub;
            memory.write_u64(IDT + 16 * vector, stub & 0xffff | 8 << 16 | 0xee00 << 32 | (high >> 16 & 0xffff) << 48);
            memory.write_u64(IDT + 16 * vector + 8, high >> 32);
            memory.write(stub, &[0xf4]);
        }
        memory.write_u64(TSS + 4, KERNEL + STACK);
        // No port bitmap.
        memory.write(TSS + 102, &104u16.to_le_bytes());
        let config = Config { tsc: TscMode::Instructions(1), ..Config::default() };
        let cpu = Cpu::new(0, config, ram.clone(), Box::new(NoBus));
        Self { cpu, memory, ram }
    }

    /// Puts a state and memory in place.
    pub(crate) fn load(&mut self, state: &State, memory: &[u8]) {
        self.memory.write(DATA_GPA, memory);
        self.cpu.update(|st| {
            st.segs[..6].fill(Segment { unusable: true, ..Segment::default() });
            st.segs[seg::CS] = user_segment(CS, 0xa0fb);
            st.segs[seg::SS] = user_segment(SS, 0xc0f3);
            st.gdtr = Table { base: KERNEL + GDT, limit: 0x3f };
            st.idtr = Table { base: KERNEL + IDT, limit: (16 * VECTORS - 1) as u16 };
            st.tr = Segment { selector: 0x38, base: KERNEL + TSS, limit: 103, access: 0x8b, unusable: false };
            st.cr0 = cr0::PE | cr0::MP | cr0::ET | cr0::NE | cr0::WP | cr0::AM | cr0::PG;
            st.cr2 = 0;
            st.cr3 = TABLES;
            st.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT;
            st.msr.efer = efer::LME | efer::LMA | efer::SCE | efer::NXE;
            st.cpl = 3;
            st.gpr[..16].copy_from_slice(&state.gpr);
            st.rip = state.rip;
            st.rflags = state.rflags | rflags::IF;
            assert!(st.fxrstor(&state.fx), "the state is valid");
            st.events = Events::default();
        });
    }

    /// Runs the one instruction at RIP. `Some` if it raised an exception or did not complete.
    pub(crate) fn step(&mut self, bytes: &[u8]) -> Option<Emulated> {
        let rip = self.cpu.state().rip;
        // A repeated string instruction may take several calls.
        for _ in 0..BUDGET {
            match self.cpu.emulate_one(bytes) {
                Emulated::Done if self.cpu.state().rip == rip => {}
                Emulated::Done => return None,
                other => return Some(other),
            }
        }
        Some(Emulated::Exit(Exit::Budget))
    }

    /// The CPU as the last `load` or `step` left it.
    pub(crate) fn cpu_state(&self) -> &CpuState {
        self.cpu.state()
    }

    /// Registers as the last `load` or `step` left them.
    pub(crate) fn state(&self) -> State {
        let st = self.cpu.state();
        State { gpr: std::array::from_fn(|i| st.gpr[i]), rip: st.rip, rflags: st.rflags, fx: st.fxsave() }
    }

    /// Bytes of the data pages.
    pub(crate) fn data(&self, at: usize, len: usize) -> Vec<u8> {
        self.memory.read(DATA_GPA + at as u64, len)
    }

    /// Runs a sequence as code in memory. An error says what a CPU could not do.
    pub(crate) fn run(&mut self, sequence: &Sequence) -> Result<Outcome, String> {
        // HLT ends it: #GP in user mode.
        self.memory.write(CODE_GPA, &[&sequence.code[..], &[0xf4]].concat());
        self.ram.invalidate_code(CODE_GPA, sequence.code.len() as u64 + 1);
        self.load(&sequence.start, &sequence.memory);
        let exit = self.cpu.run(BUDGET);
        let st = self.cpu.state();
        if exit != Exit::Halted || st.cpl != 0 {
            return Err(format!("{exit:?} at {:#x}", st.rip));
        }
        let vector = (st.rip - 1 - KERNEL - STUBS) >> 4;
        let word = |i: u64| self.memory.read_u64(st.gpr[4] - KERNEL + 8 * i);
        let (error, frame) = if matches!(vector, 8 | 10..=14 | 17) { (word(0), 1) } else { (0, 0) };
        let mut state = self.state();
        state.rip = word(frame);
        state.rflags = word(frame + 2);
        state.gpr[4] = word(frame + 3);
        if (word(frame + 1), word(frame + 4)) != (CS.into(), SS.into()) {
            return Err(format!("selectors {:#x}, {:#x}", word(frame + 1), word(frame + 4)));
        }
        let end = CODE + sequence.code.len() as u64;
        let address = if vector == 14 { st.cr2 } else { 0 };
        let fault = (vector != 13 || state.rip != end).then_some(Fault { vector: vector as u8, error, address });
        Ok(Outcome { state, fault, memory: self.data(0, DATA_LEN) })
    }
}
