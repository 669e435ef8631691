//! What instruction handlers see: the architectural state, the lazy flags, the TLB and the way to the machine. Everything derived
//! from the state is recomputed here ([`Core::sync_mode`]) whenever the state changed behind the handlers' back.

use std::sync::Arc;

use crate::bus::Bus;
use crate::cpuid::CpuidPolicy;
use crate::exception::Exception;
use crate::exec::{Exec, Leave};
use crate::exit::Exit;
use crate::flags::Flags;
use crate::mmu::ItlbEntry;
use crate::ram::{Layout, Ram, Remote};
use crate::replay::Replay;
use crate::state::{CpuState, cr0, cr4, efer, rflags, seg};
use crate::time::Clock;
use crate::tlb::{Set, Tlb};

/// Why a handler answered [`Leave::Trap`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Trap {
    /// An exception to deliver.
    Exception(Exception),
    /// A linear address that is not canonical: #SS(0) or #GP(0), as the operand goes through SS or not.
    NonCanonical(u64),
    /// The instruction must run alone, outside a cached block (device memory, ports, a write to decoded code).
    StepAlone,
    /// An access waits for the machine; see `Replay`.
    Pending,
    /// Leave `run`, with RIP at this instruction or, if set, at the next.
    Exit(Exit, bool),
    /// A task switch or an event delivery already set RIP to what runs next.
    Nothing,
}

/// Bits of the mode key: what decoding depends on, besides the bytes.
pub(crate) mod mode {
    /// 32-bit code.
    pub(crate) const CODE32: u32 = 1 << 0;
    /// 64-bit code.
    pub(crate) const CODE64: u32 = 1 << 1;
    /// 32-bit stack pointer (outside 64-bit mode).
    pub(crate) const STACK32: u32 = 1 << 2;
    /// CPL 3.
    pub(crate) const USER: u32 = 1 << 3;
    /// Protected mode.
    pub(crate) const PROTECTED: u32 = 1 << 4;
    /// Virtual-8086 mode.
    pub(crate) const VM86: u32 = 1 << 5;
    /// CR0.TS.
    pub(crate) const TS: u32 = 1 << 6;
    /// CR0.EM.
    pub(crate) const EM: u32 = 1 << 7;
    /// CR0.MP.
    pub(crate) const MP: u32 = 1 << 8;
    /// CR4.OSFXSR.
    pub(crate) const OSFXSR: u32 = 1 << 9;
}

/// The CPU as handlers see it.
pub(crate) struct Core {
    pub(crate) st: CpuState,
    pub(crate) fl: Flags,
    pub(crate) tlb: Tlb,
    /// RIP of the first instruction of the current block.
    pub(crate) block_rip: u64,
    /// Records of the current block that were not begun when it was left.
    pub(crate) left: usize,
    /// Instructions begun; exact when no block is in progress.
    pub(crate) icount: u64,
    /// The block loop pauses when `icount` reaches this.
    pub(crate) limit: u64,
    /// Key of the mode for cached blocks.
    pub(crate) mode: u32,
    /// `links` and `mode` together: what a cached jump is valid for.
    pub(crate) jump_tag: u64,
    /// The current TLB set for data.
    pub(crate) set: Set,
    /// Links between blocks made in an earlier generation must be looked up again.
    pub(crate) links: u32,
    /// One instruction runs alone: device accesses and writes to decoded code are allowed.
    pub(crate) alone: bool,
    /// Why the last handler answered `Leave::Trap`.
    pub(crate) trap: Trap,
    /// Some data breakpoint is enabled in DR7.
    pub(crate) watching: bool,
    /// DR6 bits of data breakpoints that the current instruction hit.
    pub(crate) watch_hits: u64,
    /// Accesses of the current instruction that the machine has answered.
    pub(crate) replay: Replay,
    /// Ranges of decoded code that the current instruction writes.
    pub(crate) code_writes: Vec<(u64, u64)>,
    pub(crate) itlb: Box<[ItlbEntry; 64]>,
    pub(crate) ram: Arc<Ram>,
    pub(crate) layout: Arc<Layout>,
    /// The epoch of `ram` that `layout` and the TLB belong to.
    pub(crate) epoch: u64,
    pub(crate) remote: Arc<Remote>,
    pub(crate) bus: Box<dyn Bus>,
    pub(crate) cpuid: CpuidPolicy,
    pub(crate) clock: Clock,
    /// What the owner wants to see of the guest's debugging.
    pub(crate) debug: crate::exit::GuestDebug,
}

impl Core {
    /// Raises an exception: `return cpu.raise(Exception::Ud)`.
    #[cold]
    pub(crate) fn raise<T>(&mut self, exception: Exception) -> Exec<T> {
        self.trap = Trap::Exception(exception);
        Err(Leave::Trap)
    }

    /// Leaves the handler for another reason than an exception.
    #[cold]
    pub(crate) fn trap<T>(&mut self, trap: Trap) -> Exec<T> {
        self.trap = trap;
        Err(Leave::Trap)
    }

    /// Answers `StepAlone` unless the instruction already runs alone. First line of handlers that talk to the bus.
    #[inline]
    pub(crate) fn need_alone(&mut self) -> Exec {
        if self.alone { Ok(()) } else { self.trap(Trap::StepAlone) }
    }

    /// RFLAGS, complete.
    pub(crate) fn rflags(&self) -> u64 {
        self.st.rflags & !rflags::ARITH | self.fl.bits() | rflags::FIXED
    }

    /// Sets RFLAGS as a whole; `sync_mode` must follow if VM, AC, IF or TF may have changed.
    pub(crate) fn set_rflags(&mut self, value: u64) {
        self.st.rflags = value & rflags::ALL | rflags::FIXED;
        self.fl = Flags::from_bits(value);
    }

    /// Current privilege level.
    #[inline]
    pub(crate) fn cpl(&self) -> u8 {
        self.st.cpl
    }

    /// Long mode is active (64-bit or compatibility).
    #[inline]
    pub(crate) fn long_mode(&self) -> bool {
        self.st.msr.efer & efer::LMA != 0
    }

    /// 64-bit code.
    #[inline]
    pub(crate) fn code64(&self) -> bool {
        self.mode & mode::CODE64 != 0
    }

    /// Protected mode, not virtual-8086.
    #[inline]
    pub(crate) fn protected(&self) -> bool {
        self.mode & (mode::PROTECTED | mode::VM86) == mode::PROTECTED
    }

    /// Protected mode, or virtual-8086 mode.
    #[inline]
    pub(crate) fn pe(&self) -> bool {
        self.mode & mode::PROTECTED != 0
    }

    /// Virtual-8086 mode.
    #[inline]
    pub(crate) fn vm86(&self) -> bool {
        self.mode & mode::VM86 != 0
    }

    /// IOPL.
    pub(crate) fn iopl(&self) -> u8 {
        (self.st.rflags >> 12 & 3) as u8
    }

    /// Recomputes what is derived from the state: the mode key and the TLB set.
    pub(crate) fn sync_mode(&mut self) {
        let st = &self.st;
        let mut mode = 0;
        let cs = &st.segs[seg::CS];
        let protected = st.cr0 & cr0::PE != 0;
        let vm = protected && st.rflags & rflags::VM != 0;
        if st.msr.efer & efer::LMA != 0 && cs.long() {
            mode |= mode::CODE64;
        } else if cs.big() {
            mode |= mode::CODE32;
        }
        for (on, bit) in [
            (st.segs[seg::SS].big(), mode::STACK32),
            (st.cpl == 3, mode::USER),
            (protected, mode::PROTECTED),
            (vm, mode::VM86),
            (st.cr0 & cr0::TS != 0, mode::TS),
            (st.cr0 & cr0::EM != 0, mode::EM),
            (st.cr0 & cr0::MP != 0, mode::MP),
            (st.cr4 & cr4::OSFXSR != 0, mode::OSFXSR),
        ] {
            if on {
                mode |= bit;
            }
        }
        self.mode = mode;
        self.sync_jump_tag();
        self.sync_set();
    }

    /// Recomputes the TLB set for data accesses.
    pub(crate) fn sync_set(&mut self) {
        self.set = if self.st.cpl == 3 {
            Set::User
        } else if self.st.cr4 & cr4::SMAP != 0 && self.st.rflags & rflags::AC == 0 {
            Set::Smap
        } else {
            Set::Supervisor
        };
        self.tlb.select(self.set);
    }

    /// The TLB set for implicit supervisor accesses (descriptor tables, TSS), whatever CPL is.
    pub(crate) fn system_set(&self) -> Set {
        if self.st.cr4 & cr4::SMAP != 0 { Set::Smap } else { Set::Supervisor }
    }

    /// Recomputes everything derived, after the state was replaced or patched from outside.
    pub(crate) fn sync_all(&mut self) {
        self.fl = Flags::from_bits(self.st.rflags);
        self.sync_mode();
        self.sync_debug();
        self.flush_tlb(true);
    }

    /// Recomputes `watching` after DR7 changed.
    pub(crate) fn sync_debug(&mut self) {
        let dr7 = self.st.dr7 | self.debug.dr7();
        self.watching = (0..4).any(|i| dr7 >> (2 * i) & 3 != 0 && dr7 >> (16 + 4 * i) & 3 != 0);
        // Watched accesses must reach the slow path, so nothing may be cached while watching.
        self.flush_tlb(true);
    }

    /// Forgets translations, global ones too if `all`.
    pub(crate) fn flush_tlb(&mut self, all: bool) {
        if all {
            self.tlb.flush_all();
        } else {
            self.tlb.flush();
        }
        self.itlb.fill(ItlbEntry::EMPTY);
        self.bump_links();
    }

    /// INVLPG.
    pub(crate) fn flush_page(&mut self, lin: u64) {
        self.tlb.flush_page(lin);
        self.itlb.fill(ItlbEntry::EMPTY);
        self.bump_links();
    }

    /// Makes every block link stale.
    pub(crate) fn bump_links(&mut self) {
        // 0 marks a link that was never made.
        self.links = self.links.checked_add(1).unwrap_or(1);
        self.sync_jump_tag();
    }

    fn sync_jump_tag(&mut self) {
        self.jump_tag = u64::from(self.links) << 32 | u64::from(self.mode);
    }

    /// Takes in changes of the memory layout and of dirty logging by other threads, and says so. Only between blocks.
    pub(crate) fn take_in(&mut self) {
        let round = self.ram.round();
        let epoch = self.ram.epoch();
        if epoch != self.epoch {
            self.epoch = epoch;
            self.layout = self.ram.layout();
            self.flush_tlb(true);
        }
        self.remote.seen.store(round, std::sync::atomic::Ordering::SeqCst);
    }

    /// XMM register `index` (0 to 15).
    #[inline(always)]
    pub(crate) fn xmm(&self, index: u8) -> u128 {
        self.st.xmm[usize::from(index & 15)]
    }

    /// Sets XMM register `index`.
    #[inline(always)]
    pub(crate) fn set_xmm(&mut self, index: u8, value: u128) {
        self.st.xmm[usize::from(index & 15)] = value;
    }

    /// MMX register `index` (0 to 7), as it is in the significand of the x87 register.
    #[inline]
    pub(crate) fn mmx(&self, index: u8) -> u64 {
        self.st.x87.sig[usize::from(index & 7)]
    }

    /// Sets MMX register `index`; its sign and exponent become ones.
    #[inline]
    pub(crate) fn set_mmx(&mut self, index: u8, value: u64) {
        self.st.x87.sig[usize::from(index & 7)] = value;
        self.st.x87.sign_exp[usize::from(index & 7)] = 0xffff;
    }
}
