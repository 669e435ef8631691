//! Two backends beside each other: the host's KVM executes the guest of a case one instruction at a time, the software CPU follows
//! with the same guest in memory of its own, and after every step all general-purpose registers, the instruction pointer and the flags must be
//! equal; at every exit to the VMM, so must be the exit, its data and all of memory.
//!
//! A case sees KVM only; whatever it sets (registers, memory) the software CPU copies before it follows. Where KVM's single
//! step leaves instructions out (it does at exceptions, and where it emulates), the software CPU may take several steps to the same
//! state, but never arrive at another.

use crate::harness::backend::Backend;
use iced_x86::{Decoder, DecoderOptions, Instruction, Mnemonic, Register, RflagsBits};
use std::sync::{Arc, Mutex, PoisonError};
use vm_accel::x86_64::{X86Sregs, X86Vcpu};
use vm_accel::{
    Accel, AccelError, AccelKind, Capabilities, FpuRegs, GuestDebug, GuestRegion, GuestRegs, IrqChip, MemoryFlags,
    PendingAccess, PlatformBackend, VcpuExit, VcpuKick, VcpuOps, VcpuResult, probe_kind,
};

/// KVM with the software CPU beside it.
pub(crate) const BACKEND: Backend = Backend {
    name: "kvm-and-soft",
    probe,
    create: || Ok(Box::new(Pair::new()?)),
    moves_threads: true,
    native: true,
    serial: false,
};

/// Steps that the follower may take to arrive where one step of KVM led: an exception's delivery and the longest handler, or the
/// elements of a string instruction.
const MOST_STEPS: usize = 5_000;
/// States that a message shows at most.
const SHOWN: usize = 8;

/// What a pair can do: only what does not depend on the moment at which something from outside arrives.
fn probe() -> VcpuResult<Capabilities> {
    let kvm = probe_kind(AccelKind::Kvm)?;
    let mut caps = Capabilities::minimal(kvm.guest_arch);
    caps.read_only_memory = kvm.read_only_memory;
    let soft = probe_kind(AccelKind::Fallback)?;
    caps.max_memory_slots = kvm.max_memory_slots.min(soft.max_memory_slots);
    caps.guest_phys_bits = kvm.guest_phys_bits.min(soft.guest_phys_bits);
    caps.emulates_ring0 = kvm.emulates_ring0;
    if !kvm.guest_debug {
        return Err(AccelError::Unsupported { kind: Some(AccelKind::Kvm), what: "single steps" });
    }
    Ok(caps)
}

/// A mapping: where, the memory that the case and KVM know, and the follower's copy of it.
type Mapping = (u64, GuestRegion, GuestRegion);
type Mappings = Arc<Mutex<Vec<Mapping>>>;

/// One virtual machine on both.
#[derive(Debug)]
struct Pair {
    kvm: PlatformBackend,
    soft: PlatformBackend,
    caps: Capabilities,
    memory: Mappings,
}

impl Pair {
    fn new() -> VcpuResult<Self> {
        Ok(Self {
            kvm: PlatformBackend::new(AccelKind::Kvm)?,
            soft: PlatformBackend::new(AccelKind::Fallback)?,
            caps: probe()?,
            memory: Mappings::default(),
        })
    }

    fn forget(&self, gpa: u64) {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner).retain(|(at, ..)| *at != gpa);
    }

    /// Tells both; the follower gets a region of its own.
    fn both(
        &mut self,
        gpa: u64,
        region: &GuestRegion,
        tell: impl Fn(&mut dyn Accel, &GuestRegion) -> VcpuResult<()>,
    ) -> VcpuResult<()> {
        tell(&mut self.kvm, region)?;
        let memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        let known =
            memory.iter().find(|(_, known, _)| (known.as_ptr(), known.size()) == (region.as_ptr(), region.size()));
        let copy = match known {
            Some((.., copy)) => copy.clone(),
            None => GuestRegion::anonymous(region.size())?,
        };
        drop(memory);
        tell(&mut self.soft, &copy)?;
        self.forget(gpa);
        self.memory.lock().unwrap_or_else(PoisonError::into_inner).push((gpa, region.clone(), copy));
        Ok(())
    }
}

impl Accel for Pair {
    fn kind(&self) -> AccelKind {
        AccelKind::Kvm
    }

    fn capabilities(&self) -> &Capabilities {
        &self.caps
    }

    fn create_vcpu(&mut self, id: u32) -> VcpuResult<Box<dyn VcpuOps>> {
        let (kvm, soft) = (self.kvm.create_vcpu(id)?, self.soft.create_vcpu(id)?);
        Ok(Box::new(Both { kvm, soft, memory: self.memory.clone(), inside: false }))
    }

    fn map_memory(&mut self, gpa: u64, region: &GuestRegion, flags: MemoryFlags) -> VcpuResult<()> {
        self.both(gpa, region, |vm, region| vm.map_memory(gpa, region, flags))
    }

    fn unmap_memory(&mut self, gpa: u64) -> VcpuResult<()> {
        self.kvm.unmap_memory(gpa)?;
        self.forget(gpa);
        self.soft.unmap_memory(gpa)
    }

    fn remap_memory(&mut self, gpa: u64, region: &GuestRegion, flags: MemoryFlags) -> VcpuResult<()> {
        self.both(gpa, region, |vm, region| vm.remap_memory(gpa, region, flags))
    }

    fn protect_memory(&mut self, gpa: u64, flags: MemoryFlags) -> VcpuResult<()> {
        self.kvm.protect_memory(gpa, flags)?;
        self.soft.protect_memory(gpa, flags)
    }

    fn create_irqchip(&mut self, chip: IrqChip) -> VcpuResult<()> {
        self.kvm.create_irqchip(chip)?;
        self.soft.create_irqchip(chip)
    }
}

/// One vCPU on both.
struct Both {
    kvm: Box<dyn VcpuOps>,
    soft: Box<dyn VcpuOps>,
    memory: Mappings,
    /// Both are within the instruction that the last exit is about.
    inside: bool,
}

/// The trap flag: where KVM steps by it, the guest finds it in flags that an exception or PUSHF saved.
const TF: u64 = 1 << 8;
/// The resume flag: set in the middle of a string instruction.
const RF: u64 = 1 << 16;
/// An instruction's longest form.
const MOST_BYTES: u64 = 15;

fn x86(vcpu: &mut dyn VcpuOps) -> &mut dyn X86Vcpu {
    vcpu.as_x86().expect("an x86-64 vCPU has the x86-64 groups")
}

impl Both {
    /// The follower's memory and state become KVM's.
    fn copy(&mut self) -> VcpuResult<()> {
        for (_, from, to) in &*self.memory.lock().unwrap_or_else(PoisonError::into_inner) {
            to.write(0, &contents(from)?)?;
        }
        let (from, to) = (x86(&mut *self.kvm), x86(&mut *self.soft));
        to.set_sregs(&from.get_sregs()?)?;
        let indices = to.msr_indices()?;
        let indices: Vec<u32> = from.msr_indices()?.into_iter().filter(|index| indices.contains(index)).collect();
        to.set_msrs(&from.get_msrs(&indices)?)?;
        to.set_debug_regs(&from.get_debug_regs()?)?;
        to.set_events(&from.get_events()?)?;
        self.soft.set_regs(&self.kvm.get_regs()?)?;
        self.soft.set_fpu_regs(&self.kvm.get_fpu_regs()?)
    }

    /// Both stop after each instruction, or do not. KVM's emulator loses the exit of a HLT that it steps over.
    fn step(&mut self, single_step: bool) -> VcpuResult<()> {
        let debug = GuestDebug { single_step, ..GuestDebug::default() };
        self.kvm.set_guest_debug(&debug)?;
        self.soft.set_guest_debug(&debug)
    }

    /// The instruction at `pc`, if there is memory.
    fn instruction(&mut self, pc: u64) -> VcpuResult<Instruction> {
        let x86 = x86(&mut *self.soft);
        let X86Sregs { cs, cr0, .. } = x86.get_sregs()?;
        let (bits, base) = match (cs.long, cs.db && cr0 & 1 != 0) {
            (true, _) => (64, 0),
            (_, true) => (32, cs.base),
            (_, false) => (16, cs.base),
        };
        let mut bytes = Vec::new();
        for offset in 0..MOST_BYTES {
            let Some(gpa) = x86.translate(base.wrapping_add(pc).wrapping_add(offset))? else { break };
            let memory = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
            let region = memory.iter().find(|(at, _, copy)| (*at..at + copy.size()).contains(&gpa));
            let Some((at, _, copy)) = region else { break };
            let mut byte = [0];
            copy.read(gpa - at, &mut byte)?;
            bytes.extend(byte);
        }
        Ok(Decoder::with_ip(bits, &bytes, pc, DecoderOptions::NONE).decode())
    }

    /// The follower goes where KVM went.
    fn follow(&mut self, insn: &Instruction, before: &GuestRegs, goal: &GuestRegs, exit: VcpuExit) -> VcpuResult<()> {
        let undefined = flags(insn.rflags_undefined());
        let mut passed = Vec::new();
        for _ in 0..MOST_STEPS {
            let followed = self.soft.run()?;
            if followed != VcpuExit::Debug {
                assert_eq!(
                    followed, exit,
                    "exits differ after {before:x?}; KVM is at {goal:x?}, the software CPU passed {passed:x?}"
                );
                if self.kvm.pending_access().is_some() {
                    assert_eq!(self.soft.io_data().ok(), self.kvm.io_data().ok(), "data of {exit:x?} differ");
                    return Ok(());
                }
                // After a triple fault the registers are nobody's: some processors reset them.
                if exit == VcpuExit::Halted {
                    let regs = self.soft.get_regs()?;
                    assert!(same(goal, &regs, undefined), "HLT finds KVM at {goal:x?}, the software CPU at {regs:x?}");
                }
                return self.compare_memory(exit);
            }
            if exit == VcpuExit::Debug {
                let regs = self.soft.get_regs()?;
                if same(goal, &regs, undefined) || (goal.pc == regs.pc && differs_by_machine(insn)) {
                    // With the trap flag that KVM shows, if it does.
                    return self.soft.set_regs(goal);
                }
                passed.push(regs);
                passed.truncate(SHOWN);
            }
        }
        panic!("from {before:x?}\nKVM went to {goal:x?} ({exit:x?}),\nthe software CPU by {passed:x?} and never there")
    }

    fn compare_memory(&self, exit: VcpuExit) -> VcpuResult<()> {
        for (gpa, kvm, soft) in &*self.memory.lock().unwrap_or_else(PoisonError::into_inner) {
            let (kvm, soft) = (contents(kvm)?, contents(soft)?);
            let words = || kvm.chunks_exact(2).zip(soft.chunks_exact(2)).map(|(kvm, soft)| (number(kvm), number(soft)));
            if let Some(at) = words().position(|(kvm, soft)| kvm != soft && kvm != soft | TF) {
                let (at, (kvm, soft)) = (2 * at, words().nth(at).unwrap_or_default());
                panic!(
                    "memory at {:#x} is {kvm:#x} on KVM and {soft:#x} on the software CPU; {exit:x?}",
                    gpa + at as u64
                );
            }
        }
        Ok(())
    }
}

/// Whether KVM's state is the other, but for undefined flags and the flag by which it steps.
fn same(kvm: &GuestRegs, soft: &GuestRegs, undefined: u64) -> bool {
    kvm.pc == soft.pc
        && (kvm.flags ^ soft.flags) & !(RF | TF | undefined) == 0
        && kvm.gpr.iter().zip(&soft.gpr).all(|(kvm, soft)| kvm == soft || *kvm == soft | TF)
}

/// RFLAGS bits from the decoder's.
fn flags(bits: u32) -> u64 {
    let table = [
        (RflagsBits::CF, 0),
        (RflagsBits::PF, 2),
        (RflagsBits::AF, 4),
        (RflagsBits::ZF, 6),
        (RflagsBits::SF, 7),
        (RflagsBits::OF, 11),
    ];
    table.into_iter().filter(|(bit, _)| bits & bit != 0).fold(0, |all, (_, shift)| all | 1 << shift)
}

/// What it leaves behind is the processor's own.
fn differs_by_machine(insn: &Instruction) -> bool {
    use Mnemonic::{Cpuid, Rdmsr, Rdrand, Rdseed, Rdtsc, Rdtscp};
    matches!(insn.mnemonic(), Cpuid | Rdmsr | Rdrand | Rdseed | Rdtsc | Rdtscp)
}

/// After it a processor does not stop for a single step, though KVM's emulator does.
fn blocks_traps(insn: &Instruction) -> bool {
    matches!(insn.mnemonic(), Mnemonic::Mov | Mnemonic::Pop) && insn.op0_register() == Register::SS
}

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

fn contents(region: &GuestRegion) -> VcpuResult<Vec<u8>> {
    let mut bytes = vec![0; region.size() as usize];
    region.read(0, &mut bytes)?;
    Ok(bytes)
}

impl VcpuOps for Both {
    fn get_id(&self) -> u32 {
        self.kvm.get_id()
    }

    fn run(&mut self) -> VcpuResult<VcpuExit> {
        if !self.inside {
            self.copy()?;
        }
        let mut before = self.kvm.get_regs()?;
        loop {
            let insn = self.instruction(before.pc)?;
            self.step(insn.mnemonic() != Mnemonic::Hlt)?;
            let exit = self.kvm.run()?;
            if exit == VcpuExit::Interrupt {
                self.inside = false;
                return Ok(exit);
            }
            let after = self.kvm.get_regs()?;
            let within = blocks_traps(&insn) || (after.pc == before.pc && after.flags & RF != 0);
            if exit == VcpuExit::Debug && within {
                continue;
            }
            self.follow(&insn, &before, &after, exit)?;
            if exit != VcpuExit::Debug {
                self.inside = self.kvm.pending_access().is_some();
                return Ok(exit);
            }
            before = after;
        }
    }

    fn get_regs(&self) -> VcpuResult<GuestRegs> {
        self.kvm.get_regs()
    }

    fn set_regs(&mut self, regs: &GuestRegs) -> VcpuResult<()> {
        if self.inside {
            // Where the program counter stands in the middle of an instruction is each backend's own.
            let (old, mut soft) = (self.kvm.get_regs()?, self.soft.get_regs()?);
            for (soft, (old, new)) in soft.gpr.iter_mut().zip(old.gpr.iter().zip(&regs.gpr)) {
                *soft = if old == new { *soft } else { *new };
            }
            self.soft.set_regs(&soft)?;
        }
        self.kvm.set_regs(regs)
    }

    fn get_fpu_regs(&self) -> VcpuResult<FpuRegs> {
        self.kvm.get_fpu_regs()
    }

    fn set_fpu_regs(&mut self, regs: &FpuRegs) -> VcpuResult<()> {
        self.kvm.set_fpu_regs(regs)
    }

    fn io_data(&self) -> VcpuResult<&[u8]> {
        self.kvm.io_data()
    }

    fn complete_read(&mut self, data: &[u8]) -> VcpuResult<()> {
        self.kvm.complete_read(data)?;
        // Stepping, the follower reads the elements of a string instruction one by one.
        let mut rest = data;
        while let Some(access) = self.soft.pending_access().filter(|access| access.len < rest.len()) {
            let (element, others) = rest.split_at(access.len);
            self.soft.complete_read(element)?;
            rest = others;
            while self.soft.run()? == VcpuExit::Debug {}
        }
        self.soft.complete_read(rest)
    }

    fn fail_access(&mut self) -> VcpuResult<()> {
        self.kvm.fail_access()?;
        self.soft.fail_access()
    }

    fn pending_access(&self) -> Option<PendingAccess> {
        self.kvm.pending_access()
    }

    fn quiesce(&mut self) -> VcpuResult<VcpuExit> {
        self.step(false)?;
        let exit = self.kvm.quiesce()?;
        if self.inside {
            assert_eq!(self.soft.quiesce()?, exit, "quiesce() differs");
        }
        self.inside = self.kvm.pending_access().is_some();
        Ok(exit)
    }

    fn kick_handle(&self) -> VcpuResult<VcpuKick> {
        self.kvm.kick_handle()
    }

    fn as_x86(&mut self) -> Option<&mut dyn X86Vcpu> {
        self.kvm.as_x86()
    }
}
