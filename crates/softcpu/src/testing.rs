//! A machine for unit tests: one CPU in 64-bit mode, RAM from 0 to 1 MiB mapped one to one (twice: as user pages from 1 MiB),
//! code at 0x1000, stack below 0x8000. Nothing but tests may use this.

use std::sync::Arc;

use crate::exit::Exit;
use crate::state::{CpuState, Segment, cr0, cr4, efer, seg};
use crate::{Bus, Config, Cpu, NoBus, Ram, TscMode};

/// Bytes of RAM.
pub(crate) const RAM: usize = 1 << 20;
/// Where code is put.
pub(crate) const CODE: u64 = 0x1000;
/// Initial stack pointer.
pub(crate) const STACK: u64 = 0x8000;
/// Where page tables are.
pub(crate) const TABLES: u64 = 0xf_0000;

/// Host memory for the guest.
#[derive(Debug)]
pub(crate) struct Memory(Vec<std::sync::atomic::AtomicU64>);

impl Memory {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Memory((0..RAM / 8 + 2).map(|_| std::sync::atomic::AtomicU64::new(0)).collect()))
    }

    pub(crate) fn host(&self) -> *mut u8 {
        let start = self.0.as_ptr().cast_mut().cast::<u8>();
        start.wrapping_add(start.align_offset(16))
    }

    pub(crate) fn write(&self, gpa: u64, bytes: &[u8]) {
        assert!(gpa as usize + bytes.len() <= RAM);
        for (i, byte) in bytes.iter().enumerate() {
            // SAFETY: inside the allocation, which is made of cells that may be written through a shared reference.
            unsafe { self.host().add(gpa as usize + i).write_volatile(*byte) };
        }
    }

    pub(crate) fn read<const N: usize>(&self, gpa: u64) -> [u8; N] {
        assert!(gpa as usize + N <= RAM);
        // SAFETY: inside the allocation.
        std::array::from_fn(|i| unsafe { self.host().add(gpa as usize + i).read_volatile() })
    }

    /// Whether these bytes are at an address.
    pub(crate) fn starts_with(&self, gpa: u64, bytes: &[u8]) -> bool {
        (gpa..).zip(bytes).all(|(at, byte)| self.read::<1>(at) == [*byte])
    }

    /// The first address from which this memory differs from another.
    pub(crate) fn difference(&self, other: &Memory) -> Option<u64> {
        let words = |m: &Memory| (m.host() as usize - m.0.as_ptr() as usize) / 8;
        let (own, others) = (&self.0[words(self)..], &other.0[words(other)..]);
        let load = |cell: &std::sync::atomic::AtomicU64| cell.load(std::sync::atomic::Ordering::Relaxed);
        (0..RAM / 8).find(|&i| load(&own[i]) != load(&others[i])).map(|i| i as u64 * 8)
    }

    pub(crate) fn read_u64(&self, gpa: u64) -> u64 {
        u64::from_le_bytes(self.read(gpa))
    }
}

/// A machine with one CPU.
pub(crate) struct Machine {
    pub(crate) cpu: Cpu,
    pub(crate) memory: Arc<Memory>,
    pub(crate) ram: Arc<Ram>,
}

/// Flat segments for ring 0 in 64-bit mode, or in 32-bit protected mode.
pub(crate) fn flat(st: &mut CpuState, long: bool) {
    let code =
        Segment { selector: 8, base: 0, limit: u32::MAX, access: if long { 0xa09b } else { 0xc09b }, unusable: false };
    let data = Segment { selector: 16, access: 0xc093, ..code };
    st.segs[..6].fill(data);
    st.segs[seg::CS] = code;
}

impl Machine {
    /// A machine in 64-bit mode with paging.
    pub(crate) fn new(bus: Box<dyn Bus>) -> Self {
        let mut machine = Machine::real(bus);
        let table = |gpa: u64, entry: u64| machine.memory.write(gpa, &entry.to_le_bytes());
        table(TABLES, TABLES + 0x1007);
        table(TABLES + 0x1000, TABLES + 0x2007);
        table(TABLES + 0x2000, TABLES + 0x3007);
        for page in 0..256 {
            // 0 to 1 MiB for the supervisor, 1 to 2 MiB the same memory for users too.
            table(TABLES + 0x3000 + 8 * page, page << 12 | 3);
            table(TABLES + 0x3000 + 8 * (page + 256), page << 12 | 7);
        }
        machine.cpu.update(|st| {
            flat(st, true);
            st.cr0 = cr0::PE | cr0::PG | cr0::NE | cr0::ET | cr0::WP;
            st.cr3 = TABLES;
            st.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE;
            st.msr.efer = efer::LME | efer::LMA | efer::SCE | efer::NXE;
            st.xcr0 = 3;
            st.rip = CODE;
            st.gpr = [0; 32];
            st.gpr[4] = STACK;
            st.x87 = crate::state::X87::default();
        });
        machine
    }

    /// A machine in real mode, at 0000:1000.
    pub(crate) fn real(bus: Box<dyn Bus>) -> Self {
        let memory = Memory::new();
        let ram = Ram::new();
        // SAFETY: `Memory` is the owner of the allocation and allows writes through shared references.
        unsafe { ram.map(0, memory.host(), RAM as u64, true, memory.clone()) }.expect("the range is valid");
        let mut cpu = Cpu::new(0, Config { tsc: TscMode::Instructions(1), ..Config::default() }, ram.clone(), bus);
        cpu.update(|st| {
            st.segs[seg::CS] = Segment::real(0, true);
            st.rip = CODE;
            st.gpr[4] = STACK;
            st.gpr[2] = 0;
        });
        Machine { cpu, memory, ram }
    }

    /// Puts code at `CODE` and a HLT behind it.
    pub(crate) fn code(&mut self, code: &[u8]) -> &mut Self {
        self.memory.write(CODE, code);
        self.memory.write(CODE + code.len() as u64, &[0xf4]);
        self.ram.invalidate_code(CODE, code.len() as u64 + 1);
        self
    }

    /// Runs to HLT.
    #[track_caller]
    pub(crate) fn run(&mut self) -> &CpuState {
        let exit = self.cpu.run(1_000_000);
        assert_eq!(exit, Exit::Halted, "at {:#x}", self.cpu.state().rip);
        self.cpu.state()
    }
}

/// Runs 64-bit code to the HLT behind it.
#[track_caller]
pub(crate) fn run(code: &[u8], prepare: impl FnOnce(&mut CpuState)) -> CpuState {
    let mut machine = Machine::new(Box::new(NoBus));
    machine.cpu.update(prepare);
    machine.code(code);
    machine.run().clone()
}
