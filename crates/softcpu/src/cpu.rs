//! One CPU: the loop that runs blocks, the places where it pauses, and the interface for its owner.
//!
//! There is one place where a block is entered ([`Cpu::blocks`]). Everything that is rare (events, single steps, breakpoints,
//! device accesses, code that modifies itself) happens between blocks or with one instruction run alone ([`Cpu::step`]).

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use crate::bus::{Bus, NoBus};
use crate::cache::{Cache, Link, code_address};
use crate::core::{Core, Trap};
use crate::cpuid::CpuidPolicy;
use crate::decode;
use crate::exception::Exception;
use crate::exec::{Exec, Leave, Op, thread};
use crate::exit::{Exit, GuestDebug};
use crate::flags::Flags;
use crate::intercept::Intercept;
use crate::mmu::ItlbEntry;
use crate::ram::{Kick, Ram, Remote};
use crate::replay::Replay;
use crate::state::{CpuState, rflags};
use crate::time::{Clock, TscMode};
use crate::tlb::{Set, Tlb};

/// How many instructions run between two looks at the bus for timers.
const SLICE: u64 = 20_000;

/// What a CPU is made with.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// What the TSC counts.
    pub tsc: TscMode,
    /// When the TSC was zero; the same for all CPUs of a machine.
    pub start: Instant,
}

impl Default for Config {
    /// A TSC of 1 GHz that starts now.
    fn default() -> Self {
        Config { tsc: TscMode::Host(1_000_000_000), start: Instant::now() }
    }
}

/// How [`Cpu::emulate_one`] ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Emulated {
    /// The instruction is complete; RIP is behind it (or on it, for a repeated string instruction that has more to do).
    Done,
    /// It waits for this access: answer it, then call again with the same bytes.
    Pending(Exit),
    /// It raised an exception, which was not delivered; the state is that before the instruction.
    Exception(Exception),
    /// It is complete and asks to leave (HLT, a hypercall, a debug trap).
    Exit(Exit),
}

/// Why the block loop paused.
enum Pause {
    /// Look for events, then go on.
    Look,
    /// Return this to the owner.
    Exit(Exit),
    /// Run the next instruction alone.
    Step,
}

/// A software CPU.
pub struct Cpu {
    pub(crate) core: Core,
    pub(crate) cache: Cache,
    window: bool,
    /// The bus is to be asked for an interrupt.
    poll: bool,
    /// When `icount` is here, at the latest. It does not move when a block ends early, or a guest whose blocks all do would never be
    /// interrupted by a timer.
    next_poll: u64,
}

impl fmt::Debug for Cpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cpu")
            .field("rip", &format_args!("{:#x}", self.core.st.rip))
            .field("instructions", &self.core.icount)
            .finish_non_exhaustive()
    }
}

impl Drop for Cpu {
    fn drop(&mut self) {
        self.core.ram.detach(&self.core.remote);
    }
}

impl Cpu {
    /// A CPU in reset state. `id` is its APIC id; `ram` is shared with the other CPUs of the machine; `bus` is its own.
    #[must_use]
    pub fn new(id: u32, config: Config, ram: Arc<Ram>, bus: Box<dyn Bus>) -> Self {
        let remote = Arc::new(Remote::default());
        ram.attach(&remote);
        let clock = Clock::new(config.tsc, config.start);
        let mut core = Core {
            st: CpuState::reset(),
            fl: Flags::from_bits(0),
            tlb: Tlb::new(),
            block_rip: 0,
            left: 0,
            icount: 0,
            limit: 0,
            mode: 0,
            set: Set::Supervisor,
            links: 1,
            jump_tag: 0,
            alone: false,
            trap: Trap::Nothing,
            watching: false,
            watch_hits: 0,
            replay: Replay::default(),
            code_writes: Vec::new(),
            itlb: Box::new([ItlbEntry::EMPTY; 64]),
            // Older than any: taken in below.
            epoch: u64::MAX,
            layout: ram.layout(),
            ram,
            remote,
            bus,
            cpuid: CpuidPolicy::new(id, clock.frequency()),
            clock,
            debug: GuestDebug::default(),
        };
        core.sync_all();
        core.take_in();
        Cpu { core, cache: Cache::new(), window: false, poll: true, next_poll: 0 }
    }

    /// A CPU for [`Cpu::emulate_one`] only: nothing is served, every device access is answered by the caller.
    #[must_use]
    pub fn emulator(ram: Arc<Ram>) -> Self {
        Cpu::new(0, Config::default(), ram, Box::new(NoBus))
    }

    /// A handle that makes `run` return, from any thread.
    #[must_use]
    pub fn kick_handle(&self) -> Kick {
        Kick(self.core.remote.clone())
    }

    /// Runs until something needs the owner or about `budget` instructions are done. After an exit with a pending read that was
    /// not answered, the same exit is returned again.
    pub fn run(&mut self, budget: u64) -> Exit {
        let end = self.core.icount.saturating_add(budget);
        // SeqCst pairs with `Ram::synchronize`: either it sees us running, or we see its round.
        self.core.remote.running.store(true, Ordering::SeqCst);
        self.core.take_in();
        let exit = self.run_to(end);
        self.core.remote.running.store(false, Ordering::SeqCst);
        self.core.st.rflags = self.core.rflags();
        exit
    }

    fn run_to(&mut self, end: u64) -> Exit {
        self.poll = true;
        if let Some(access) = self.core.replay.pending {
            if !access.write {
                return access.exit();
            }
            // The owner has seen the write: it is done.
            self.core.replay.answer(&[]);
        }
        loop {
            if self.core.remote.wake.load(Ordering::Relaxed) {
                self.attend();
            }
            let latest = self.core.icount.saturating_add(SLICE);
            if self.next_poll <= self.core.icount || self.next_poll > latest {
                self.poll = true;
                self.next_poll = latest;
            }
            // A kick in the middle of an instruction waits for its end; Acquire: what the kicker did before is visible.
            if !self.core.replay.resume && self.core.remote.kicked.swap(false, Ordering::Acquire) {
                return Exit::Kicked;
            }
            let pause = if self.core.st.events.shutdown {
                Pause::Exit(Exit::Shutdown)
            } else if self.core.replay.resume {
                self.step()
            } else if self.core.icount >= end {
                Pause::Exit(Exit::Budget)
            } else {
                self.events().unwrap_or_else(|| {
                    if self.careful() {
                        self.step()
                    } else {
                        self.core.limit = end.min(self.next_poll);
                        self.blocks()
                    }
                })
            };
            match pause {
                Pause::Look => {}
                Pause::Exit(exit) => return exit,
                Pause::Step => {
                    if let Pause::Exit(exit) = self.step() {
                        return exit;
                    }
                }
            }
        }
    }

    /// Takes in what other threads asked for, except kicks.
    fn attend(&mut self) {
        self.poll = true;
        let remote = self.core.remote.clone();
        // Acquire: what was done before the wake is visible.
        remote.wake.swap(false, Ordering::AcqRel);
        self.core.take_in();
        let stale = std::mem::take(&mut *remote.stale.lock().unwrap_or_else(std::sync::PoisonError::into_inner));
        for (gpa, len) in stale {
            self.cache.invalidate(gpa, len);
        }
    }

    /// Whether each instruction must be looked at on its own.
    fn careful(&self) -> bool {
        let st = &self.core.st;
        st.rflags & (rflags::TF | rflags::RF) != 0
            || st.events.sti_shadow
            || st.events.mov_ss_shadow
            || self.core.debug.single_step
            || st.dr7 & 0xff != 0
            || self.core.debug.dr7() & 0xff != 0
    }

    /// Delivers what is pending and may be; `None` when the next instruction is to run.
    fn events(&mut self) -> Option<Pause> {
        let core = &mut self.core;
        if let Some(exception) = core.st.events.exception.take() {
            return Some(self.present_exception(exception));
        }
        let shadow = core.st.events.sti_shadow || core.st.events.mov_ss_shadow;
        if core.st.events.debug_trap != 0 && !core.st.events.mov_ss_shadow {
            let dr6 = std::mem::take(&mut core.st.events.debug_trap);
            core.st.events.halted = false;
            return Some(self.deliver_exception(Exception::Db(dr6)));
        }
        if core.st.events.nmi && !core.st.events.nmi_blocked && !shadow {
            core.st.events.nmi = false;
            core.st.events.halted = false;
            core.st.events.nmi_blocked = true;
            return Some(self.deliver(crate::interrupt::Source::Nmi));
        }
        // Accepted when it was injected: in delivery, whatever IF says now.
        if let Some(vector) = core.st.events.interrupt.take() {
            core.st.events.halted = false;
            return Some(self.deliver(crate::interrupt::Source::External(vector)));
        }
        let open = core.st.rflags & rflags::IF != 0 && !shadow;
        // The bus is asked when its answer may be another than last time, not after each jump of the guest.
        if open && (self.poll || core.st.events.halted) {
            let tsc = core.tsc();
            self.poll = core.bus.interrupt_pending(tsc);
            if self.poll {
                if let Some(vector) = core.bus.acknowledge() {
                    core.st.events.halted = false;
                    return Some(self.deliver(crate::interrupt::Source::External(vector)));
                }
            }
        } else if !open {
            self.poll = true;
        }
        if self.window && open {
            self.window = false;
            return Some(Pause::Exit(Exit::InterruptWindow));
        }
        self.core.st.events.halted.then_some(Pause::Exit(Exit::Halted))
    }

    fn deliver(&mut self, source: crate::interrupt::Source) -> Pause {
        match self.core.deliver(source) {
            Ok(()) => Pause::Look,
            Err(_) => self.trapped(),
        }
    }

    fn deliver_exception(&mut self, exception: Exception) -> Pause {
        let what = Intercept::Exception(exception);
        if self.core.bus.intercept(what) {
            return Pause::Exit(Exit::Intercept(what));
        }
        self.present_exception(exception)
    }

    /// Delivers an exception, whether the guest raised it or it was injected.
    fn present_exception(&mut self, exception: Exception) -> Pause {
        let core = &mut self.core;
        if core.debug.software_breakpoints && exception == Exception::Bp {
            return Pause::Exit(Exit::Debug { vector: 3, dr6: 0 });
        }
        if let Exception::Db(dr6) = exception {
            if core.debug.hardware_breakpoints || core.debug.single_step {
                return Pause::Exit(Exit::Debug { vector: 1, dr6 });
            }
        }
        self.deliver(crate::interrupt::Source::Exception(exception))
    }

    /// Runs blocks until one of them needs more than that.
    fn blocks(&mut self) -> Pause {
        let core = &mut self.core;
        let Ok(mut id) = self.cache.find(core, core.st.rip) else {
            return self.unfetched();
        };
        loop {
            let Some(block) = self.cache.blocks.get(id as usize) else {
                return Pause::Look;
            };
            core.block_rip = block.rip;
            if core.icount >= core.limit || core.remote.wake.load(Ordering::Relaxed) {
                core.st.rip = block.rip;
                self.poll = true;
                return Pause::Look;
            }
            core.icount += u64::from(block.count);
            let leave = thread::next(core, &block.ops);
            let which = match leave {
                Leave::Taken => 0,
                Leave::Fall => 1,
                Leave::Indirect => {
                    match self.cache.find(core, core.st.rip) {
                        Ok(next) => id = next,
                        Err(_) => return self.unfetched(),
                    }
                    continue;
                }
                _ => {
                    // The last record that was begun. Of several instructions in one, only the first leaves here.
                    let begun = &block.ops[block.ops.len() - core.left - 1..];
                    let op = begun[0];
                    let count: u64 = begun.iter().map(|op| u64::from(op.count)).sum();
                    core.icount -= (count - 1).min(block.count.into());
                    let rip = core.block_rip.wrapping_add(u64::from(op.off));
                    match leave {
                        Leave::Next => core.st.rip = core.wrap_rip(rip.wrapping_add(u64::from(op.len))),
                        Leave::Jump => {}
                        Leave::Stale => {
                            core.st.rip = core.block_rip;
                            match self.cache.find_slow(core, core.st.rip) {
                                Ok(next) => id = next,
                                Err(_) => return self.unfetched(),
                            }
                            continue;
                        }
                        _ => {
                            core.st.rip = rip;
                            if leave == Leave::Again {
                                self.poll = true;
                                return Pause::Look;
                            }
                            core.resolve_canonical(op.sc & crate::exec::SC_STACK != 0);
                            if matches!(core.trap, Trap::StepAlone | Trap::Exit(Exit::Intercept(_), _)) {
                                // It counts when it really runs.
                                core.icount -= 1;
                            }
                            return self.trapped();
                        }
                    }
                    return Pause::Look;
                }
            };
            let link = block.links[which];
            if link.generation == core.links {
                id = link.block;
                continue;
            }
            let from = id;
            let generation = core.links;
            core.st.rip = block.targets[which];
            match self.cache.find(core, core.st.rip) {
                Ok(next) => id = next,
                Err(_) => return self.unfetched(),
            }
            // Decoding the next block may have dropped all blocks; then the generation is another.
            if core.links == generation {
                if let Some(block) = self.cache.blocks.get_mut(from as usize) {
                    block.links[which] = Link { block: id, generation };
                }
            }
        }
    }

    /// Acts on the fault of a fetch. It counts as an instruction: a guest whose handlers cannot be fetched either would never use up its
    /// budget.
    fn unfetched(&mut self) -> Pause {
        if matches!(self.core.trap, Trap::Exception(_) | Trap::NonCanonical(_)) {
            self.core.icount += 1;
        }
        self.trapped()
    }

    /// Acts on `core.trap`; RIP is that of the instruction.
    fn trapped(&mut self) -> Pause {
        match std::mem::replace(&mut self.core.trap, Trap::Nothing) {
            Trap::Exception(exception) => {
                self.core.replay.commit();
                self.deliver_exception(exception)
            }
            Trap::NonCanonical(_) => {
                self.core.replay.commit();
                self.deliver_exception(Exception::Gp(0))
            }
            Trap::StepAlone => Pause::Step,
            Trap::Pending => match self.core.replay.pending {
                Some(access) => Pause::Exit(access.exit()),
                None => Pause::Look,
            },
            Trap::Exit(exit, _) => Pause::Exit(exit),
            Trap::Nothing => Pause::Look,
        }
    }

    /// Runs one instruction alone, with everything that can only be seen between instructions: instruction and data breakpoints,
    /// single step, shadows, device accesses, writes to code.
    fn step(&mut self) -> Pause {
        let core = &mut self.core;
        let rip = core.st.rip;
        // Behind MOV SS instruction breakpoints wait, too (SDM vol. 3A, 6.8.3).
        if !core.replay.resume && !core.st.events.mov_ss_shadow {
            if let Some(dr6) = core.code_breakpoint(rip) {
                return self.deliver_exception(Exception::Db(dr6));
            }
        }
        let mut bytes = [0; 15];
        let Ok(n) = self.fetch(rip, &mut bytes) else {
            return self.unfetched();
        };
        self.step_bytes(&bytes[..n], true)
    }

    /// Fetches what could be one instruction: the bytes up to the end of the page, and of the next page if it can be fetched.
    pub(crate) fn fetch(&mut self, rip: u64, bytes: &mut [u8; 15]) -> Exec<usize> {
        let core = &mut self.core;
        let mut have = 0;
        while have < bytes.len() {
            let lin = match code_address(core, core.wrap_rip(rip.wrapping_add(have as u64))) {
                Ok(lin) => lin,
                Err(_) if have > 0 => break,
                Err(why) => return Err(why),
            };
            let gpa = match core.fetch_address(lin) {
                Ok(gpa) => gpa,
                // The instruction may well end before: only if it does not is this fault its own.
                Err(_) if have > 0 && decode::one(core, rip, &bytes[..have]).is_some() => break,
                Err(why) => return Err(why),
            };
            let part = (0x1000 - (gpa & 0xfff) as usize).min(bytes.len() - have);
            let layout = core.layout.clone();
            match layout.find(gpa) {
                Some(region) => {
                    core.code_bytes(region, gpa, &mut bytes[have..have + part]);
                }
                // Nothing answers there: the bus floats, FF FF is no instruction.
                None => bytes[have..have + part].fill(0xff),
            }
            have += part;
        }
        Ok(have)
    }

    /// Runs the instruction in `bytes` alone. With `deliver`, exceptions go to the guest.
    fn step_bytes(&mut self, bytes: &[u8], deliver: bool) -> Pause {
        self.poll = true;
        let core = &mut self.core;
        let rip = core.st.rip;
        let Some((op, targets)) = decode::one(core, rip, bytes) else {
            // Longer than 15 bytes, or cut by the end of CS.
            core.trap = Trap::Exception(Exception::Gp(0));
            return if deliver { self.trapped() } else { Pause::Look };
        };
        let trap_flag = core.st.rflags & rflags::TF != 0;
        let shadows = (core.st.events.sti_shadow, core.st.events.mov_ss_shadow);
        let resume_flag = core.st.rflags & rflags::RF != 0;
        core.alone = true;
        core.watch_hits = 0;
        core.block_rip = rip;
        core.replay.rewind();
        core.code_writes.clear();
        core.icount += 1;
        let leave = (op.f)(core, &op);
        core.alone = false;
        if !core.code_writes.is_empty() {
            let writes = std::mem::take(&mut core.code_writes);
            let (ram, layout) = (core.ram.clone(), core.layout.clone());
            writes.into_iter().for_each(|(gpa, len)| ram.code_written(&layout, gpa, len));
        }
        let next = core.wrap_rip(rip.wrapping_add(u64::from(op.len)));
        let mut exit = None;
        let mut again = false;
        match leave {
            Ok(()) | Err(Leave::Next) => core.st.rip = next,
            Err(Leave::Fall) => core.st.rip = targets[1],
            Err(Leave::Taken) => core.st.rip = targets[0],
            Err(Leave::Indirect | Leave::Jump) => {}
            Err(Leave::Again | Leave::Stale) => again = true,
            Err(Leave::Trap) => {
                core.resolve_canonical(op.sc & crate::exec::SC_STACK != 0);
                match core.trap {
                    Trap::Exit(Exit::Intercept(_), _) => {
                        core.icount -= 1;
                        return self.trapped();
                    }
                    Trap::Exit(why, advance) => {
                        if advance {
                            core.st.rip = next;
                        }
                        exit = Some(why);
                    }
                    Trap::Nothing => {}
                    Trap::Pending => {
                        core.icount -= 1;
                        return self.trapped();
                    }
                    _ => return if deliver { self.trapped() } else { Pause::Look },
                }
            }
        }
        core.trap = Trap::Nothing;
        core.replay.commit();
        // What held for this instruction only. A handler that starts a new shadow sets it anew.
        if core.st.events.sti_shadow && shadows.0 {
            core.st.events.sti_shadow = false;
        }
        let shadow = core.st.events.mov_ss_shadow && !shadows.1;
        if shadows.1 {
            core.st.events.mov_ss_shadow = false;
        }
        if resume_flag && !again && !matches!(leave, Err(Leave::Jump)) {
            core.st.rflags &= !rflags::RF;
        }
        if shadow {
            // Data breakpoints that MOV SS itself hit come behind the next instruction; the single step's trap does not (SDM vol.
            // 3A, 6.8.3).
            core.st.events.debug_trap |= core.watch_hits;
        }
        let mut dr6 = core.watch_hits;
        if trap_flag && (core.st.rflags & rflags::TF != 0 || !matches!(leave, Err(Leave::Jump)))
            || core.debug.single_step
        {
            dr6 |= 1 << 14;
        }
        if dr6 != 0 && !shadow && exit.is_none() && deliver {
            // A debug trap ends HLT (SDM vol. 2A, HLT).
            core.st.events.halted = false;
            dr6 |= std::mem::take(&mut core.st.events.debug_trap);
            return self.deliver_exception(Exception::Db(dr6));
        }
        match exit {
            Some(exit) => Pause::Exit(exit),
            None => Pause::Look,
        }
    }

    /// Executes the instruction in `bytes` at the current RIP, once, without caching anything: what a hypervisor hands over for
    /// emulation. Guest page tables are walked afresh.
    pub fn emulate_one(&mut self, bytes: &[u8]) -> Emulated {
        self.attend();
        self.core.flush_tlb(true);
        if let Some(access) = self.core.replay.pending {
            if !access.write {
                return Emulated::Pending(access.exit());
            }
            self.core.replay.answer(&[]);
        }
        let pause = self.step_bytes(&bytes[..bytes.len().min(15)], false);
        self.core.st.rflags = self.core.rflags();
        match pause {
            Pause::Exit(exit) if self.core.replay.pending.is_some() => Emulated::Pending(exit),
            Pause::Exit(exit) => Emulated::Exit(exit),
            _ => match std::mem::replace(&mut self.core.trap, Trap::Nothing) {
                Trap::Exception(exception) => {
                    self.core.replay.commit();
                    Emulated::Exception(exception)
                }
                _ => Emulated::Done,
            },
        }
    }

    /// The bytes that the guest writes, after an `Io` or `Mmio` exit that is a write; empty otherwise.
    #[must_use]
    pub fn io_data(&self) -> &[u8] {
        match &self.core.replay.pending {
            Some(access) if access.write => &access.data[..usize::from(access.len)],
            _ => &[],
        }
    }

    /// Answers the read of the last exit. `false` if there is none or the length is wrong.
    #[must_use = "an answer that was not taken leaves the read pending"]
    pub fn complete_read(&mut self, data: &[u8]) -> bool {
        self.core.replay.pending.is_some_and(|access| !access.write) && self.core.replay.answer(data)
    }

    /// Whether an access or the rest of an instruction is outstanding.
    #[must_use]
    pub fn is_mid_instruction(&self) -> bool {
        self.core.replay.resume
    }

    /// Finishes the instruction that is under way, without beginning another. `None` when none is; otherwise an access to answer,
    /// or what the instruction itself ended with.
    pub fn quiesce(&mut self) -> Option<Exit> {
        if !self.core.replay.resume {
            return None;
        }
        let end = self.core.icount;
        self.core.remote.running.store(true, Ordering::SeqCst);
        self.core.take_in();
        let exit = self.run_to(end);
        self.core.remote.running.store(false, Ordering::SeqCst);
        self.core.st.rflags = self.core.rflags();
        (exit != Exit::Budget).then_some(exit)
    }

    /// Executes the instruction at RIP alone, without looking for events: what a hypervisor leaves to its owner. Exceptions are
    /// delivered. The answer, and how an access is answered, are those of [`Cpu::quiesce`].
    pub fn finish_instruction(&mut self) -> Option<Exit> {
        self.core.replay.resume = true;
        self.quiesce()
    }

    /// Takes the event in delivery (exception, non-maskable or external interrupt) through the guest's descriptor tables, without
    /// running the guest further. `Some` for a shutdown.
    pub fn deliver_event(&mut self) -> Option<Exit> {
        self.core.remote.running.store(true, Ordering::SeqCst);
        self.core.take_in();
        let pause = self.events();
        self.core.remote.running.store(false, Ordering::SeqCst);
        self.core.st.rflags = self.core.rflags();
        match pause {
            Some(Pause::Exit(exit)) => Some(exit),
            _ => None,
        }
    }

    /// Asks for an [`Exit::InterruptWindow`] when an external interrupt could be taken.
    pub fn request_interrupt_window(&mut self, on: bool) {
        self.window = on;
    }

    /// Whether an external interrupt could be taken now.
    #[must_use]
    pub fn can_take_interrupt(&self) -> bool {
        let st = &self.core.st;
        st.rflags & rflags::IF != 0
            && !st.events.sti_shadow
            && !st.events.mov_ss_shadow
            && st.events.interrupt.is_none()
    }

    /// Puts an external interrupt into delivery: it comes before the next instruction, so ask [`Cpu::can_take_interrupt`] first.
    /// `false` if one already waits.
    #[must_use = "an interrupt that was not queued is lost"]
    pub fn inject_interrupt(&mut self, vector: u8) -> bool {
        let free = self.core.st.events.interrupt.is_none();
        if free {
            self.core.st.events.interrupt = Some(vector);
        }
        free
    }

    /// Queues a non-maskable interrupt.
    pub fn inject_nmi(&mut self) {
        self.core.st.events.nmi = true;
    }

    /// Queues an exception, which is delivered before the next instruction.
    pub fn inject_exception(&mut self, exception: Exception) {
        self.core.st.events.exception = Some(exception);
    }

    /// The state. Complete after `run` returned.
    #[must_use]
    pub fn state(&self) -> &CpuState {
        &self.core.st
    }

    /// Changes the state; what is derived from it is recomputed. Moving RIP gives up an instruction that was under way.
    pub fn update(&mut self, change: impl FnOnce(&mut CpuState)) {
        let rip = self.core.st.rip;
        change(&mut self.core.st);
        let st = &mut self.core.st;
        // What the rest relies on: empty slots read as zero, flat pseudo segments, the fixed flag.
        st.gpr[16..].fill(0);
        let reset = CpuState::reset();
        st.segs[6..].copy_from_slice(&reset.segs[6..]);
        st.rflags |= rflags::FIXED;
        st.cpl &= 3;
        if st.rip != rip {
            self.core.replay.commit();
        }
        self.core.sync_all();
    }

    /// What the owner wants to see of the guest's debugging.
    pub fn set_guest_debug(&mut self, debug: GuestDebug) {
        self.core.debug = debug;
        self.core.sync_debug();
    }

    /// The CPUID answers in force.
    #[must_use]
    pub fn cpuid(&self) -> &[crate::CpuidEntry] {
        self.core.cpuid.entries()
    }

    /// Replaces the CPUID answers. Bits of features that this CPU does not implement are cleared; instructions of features that are
    /// not set raise #UD.
    pub fn set_cpuid(&mut self, entries: &[crate::CpuidEntry]) {
        self.core.cpuid.set(entries);
        self.cache.clear();
        self.core.bump_links();
    }

    /// Reads an MSR as RDMSR at CPL 0 would; `None` where that raises #GP.
    pub fn msr(&mut self, index: u32) -> Option<u64> {
        self.core.read_msr(index)
    }

    /// Writes an MSR as WRMSR at CPL 0 would; `false` where that raises #GP.
    #[must_use = "a write that was refused has no effect"]
    pub fn set_msr(&mut self, index: u32, value: u64) -> bool {
        let done = self.core.write_msr(index, value).is_some();
        self.core.sync_mode();
        done
    }

    /// The machine around the CPU.
    pub fn bus_mut(&mut self) -> &mut dyn Bus {
        &mut *self.core.bus
    }

    /// The time stamp counter now.
    #[must_use]
    pub fn tsc(&self) -> u64 {
        self.core.tsc()
    }

    /// Frequency of the time stamp counter in Hz.
    #[must_use]
    pub fn tsc_frequency(&self) -> u64 {
        self.core.clock.frequency()
    }

    /// Sets the time stamp counter.
    pub fn set_tsc(&mut self, value: u64) {
        self.core.clock.set_tsc(self.core.icount, value);
    }

    /// Instructions executed; each iteration of a repeated string instruction counts as part of one.
    #[must_use]
    pub fn instructions(&self) -> u64 {
        self.core.icount
    }

    /// Translates a linear address as a read with supervisor rights would, accessed bits set; `None` where that faults.
    pub fn translate(&mut self, lin: u64) -> Option<u64> {
        self.core.walk(lin, crate::mmu::Access::Read, Set::Supervisor).ok().map(|walk| walk.gpa)
    }
}

impl Core {
    /// Time stamp counter.
    pub(crate) fn tsc(&self) -> u64 {
        self.clock.tsc(self.icount)
    }

    /// RIP of an instruction of the current block.
    #[inline]
    pub(crate) fn rip_of(&self, op: &Op) -> u64 {
        self.wrap_rip(self.block_rip.wrapping_add(u64::from(op.off)))
    }

    /// RIP behind an instruction of the current block.
    #[inline]
    pub(crate) fn next_rip(&self, op: &Op) -> u64 {
        self.wrap_rip(self.block_rip.wrapping_add(u64::from(op.off) + u64::from(op.len)))
    }

    /// Cuts an instruction pointer to the size of the code segment.
    #[inline]
    pub(crate) fn wrap_rip(&self, rip: u64) -> u64 {
        if self.mode & crate::core::mode::CODE64 != 0 {
            rip
        } else if self.mode & crate::core::mode::CODE32 != 0 {
            rip & 0xffff_ffff
        } else {
            rip & 0xffff
        }
    }

    /// Makes an exception of an address that is not canonical.
    fn resolve_canonical(&mut self, stack: bool) {
        if matches!(self.trap, Trap::NonCanonical(_)) {
            self.trap = Trap::Exception(if stack { Exception::Ss(0) } else { Exception::Gp(0) });
        }
    }
}
