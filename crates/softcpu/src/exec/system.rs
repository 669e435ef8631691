//! Privileged and identification instructions: control and debug registers, descriptor table registers, MSRs, TSC, CPUID, fast
//! system calls, HLT, hypercalls. Source: SDM vol. 2, the page of each instruction.

use iced_x86::{Code, Instruction, Mnemonic, OpKind};

use super::form::{Word, by_size, has_memory};
use super::{AM_SEG, Exec, Handler, Leave, Op};
use crate::bus::MsrAnswer;
use crate::core::{Core, Trap};
use crate::cpuid::Feature;
use crate::exception::Exception;
use crate::exit::Exit;
use crate::intercept::Intercept;
use crate::mem::canonical;
use crate::state::{Segment, Table, cr0, cr4, efer, rflags, seg};

impl Core {
    /// #GP(0) above CPL 0.
    #[inline]
    fn privileged(&mut self) -> Exec {
        if self.cpl() == 0 { Ok(()) } else { self.raise(Exception::Gp(0)) }
    }

    /// #GP(0) for the instructions that CR4.UMIP keeps from programs.
    fn umip(&mut self) -> Exec {
        if self.st.cr4 & cr4::UMIP != 0 && self.cpl() > 0 { self.raise(Exception::Gp(0)) } else { Ok(()) }
    }

    /// Loads the four entries of PAE paging from the table at `cr3`; `None` if one has reserved bits.
    pub(crate) fn load_pdptes(&mut self, cr3: u64) -> Option<()> {
        let mut entries = [0; 4];
        let reserved = 0x1e6 | !((1u64 << crate::mmu::PHYS_BITS) - 1);
        for (i, entry) in entries.iter_mut().enumerate() {
            *entry = self.read_physical((cr3 & 0xffff_ffe0) + 8 * i as u64).unwrap_or(0);
            if *entry & 1 != 0 && *entry & reserved != 0 {
                return None;
            }
        }
        self.st.pdpte = entries;
        Some(())
    }

    /// PAE paging outside long mode, with the given registers.
    fn uses_pdptes(&self, cr0: u64, cr4: u64) -> bool {
        cr0 & cr0::PG != 0 && cr4 & cr4::PAE != 0 && self.st.msr.efer & efer::LME == 0
    }

    fn write_cr0(&mut self, value: u64) -> Exec {
        let old = self.st.cr0;
        let value = value & (cr0::ALL | !0xffff_ffff) | cr0::ET;
        let bad = value >> 32 != 0
            || value & cr0::PG != 0 && value & cr0::PE == 0
            || value & cr0::NW != 0 && value & cr0::CD == 0
            || value & cr0::PG == 0 && self.code64();
        if bad {
            return self.raise(Exception::Gp(0));
        }
        let on = value & !old;
        if on & cr0::PG != 0 && self.st.msr.efer & efer::LME != 0 {
            if self.st.cr4 & cr4::PAE == 0 || self.st.segs[seg::CS].long() {
                return self.raise(Exception::Gp(0));
            }
            self.st.msr.efer |= efer::LMA;
        }
        if (old ^ value) & (cr0::PG | cr0::CD | cr0::NW) != 0
            && self.uses_pdptes(value, self.st.cr4)
            && self.load_pdptes(self.st.cr3).is_none()
        {
            return self.raise(Exception::Gp(0));
        }
        if old & !value & cr0::PG != 0 {
            self.st.msr.efer &= !efer::LMA;
        }
        self.st.cr0 = value;
        if (old ^ value) & (cr0::PG | cr0::WP | cr0::PE) != 0 {
            self.flush_tlb(true);
        }
        if (old ^ value) & cr0::PE != 0 && value & cr0::PE == 0 {
            self.st.cpl = 0;
        }
        self.sync_mode();
        Ok(())
    }

    fn write_cr3(&mut self, value: u64) -> Exec {
        if self.long_mode() {
            if value >> crate::mmu::PHYS_BITS != 0 {
                return self.raise(Exception::Gp(0));
            }
        } else if self.uses_pdptes(self.st.cr0, self.st.cr4) && self.load_pdptes(value).is_none() {
            return self.raise(Exception::Gp(0));
        }
        self.st.cr3 = value;
        self.flush_tlb(false);
        Ok(())
    }

    fn write_cr4(&mut self, value: u64) -> Exec {
        let mut exist =
            cr4::TSD | cr4::DE | cr4::PSE | cr4::PAE | cr4::MCE | cr4::PGE | cr4::PCE | cr4::OSFXSR | cr4::OSXMMEXCPT;
        for (feature, bit) in [
            (Feature::Umip, cr4::UMIP),
            (Feature::Fsgsbase, cr4::FSGSBASE),
            (Feature::Xsave, cr4::OSXSAVE),
            (Feature::Smep, cr4::SMEP),
            (Feature::Smap, cr4::SMAP),
        ] {
            if self.cpuid.has(feature) {
                exist |= bit;
            }
        }
        let old = self.st.cr4;
        if value & !exist != 0 || self.long_mode() && value & cr4::PAE == 0 {
            return self.raise(Exception::Gp(0));
        }
        let paging = cr4::PSE | cr4::PAE | cr4::PGE | cr4::SMEP | cr4::SMAP;
        if (old ^ value) & (cr4::PSE | cr4::PAE | cr4::PGE | cr4::SMEP) != 0
            && self.uses_pdptes(self.st.cr0, value)
            && self.load_pdptes(self.st.cr3).is_none()
        {
            return self.raise(Exception::Gp(0));
        }
        self.st.cr4 = value;
        if (old ^ value) & paging != 0 {
            self.flush_tlb(true);
        }
        self.sync_mode();
        Ok(())
    }
}

fn read_cr(cpu: &mut Core, op: &Op) -> Exec {
    cpu.privileged()?;
    let value = match op.s {
        0 => cpu.st.cr0,
        2 => cpu.st.cr2,
        3 => cpu.st.cr3,
        4 => cpu.st.cr4,
        8 => {
            cpu.need_alone()?;
            cpu.intercept(Intercept::Cr { number: 8, value: None })?;
            u64::from(cpu.bus.cr8())
        }
        _ => return cpu.raise(Exception::Ud),
    };
    let value = if cpu.code64() { value } else { value & 0xffff_ffff };
    cpu.set_reg::<u64>(op.d, value);
    Ok(())
}

fn write_cr(cpu: &mut Core, op: &Op) -> Exec {
    cpu.privileged()?;
    let value = if cpu.code64() { cpu.reg::<u64>(op.s) } else { cpu.reg::<u32>(op.s) };
    if matches!(op.d, 0 | 3 | 4 | 8) {
        cpu.intercept(Intercept::Cr { number: op.d, value: Some(value) })?;
    }
    match op.d {
        0 => cpu.write_cr0(value)?,
        2 => cpu.st.cr2 = value,
        3 => cpu.write_cr3(value)?,
        4 => cpu.write_cr4(value)?,
        8 => {
            if value > 15 {
                return cpu.raise(Exception::Gp(0));
            }
            cpu.need_alone()?;
            cpu.bus.set_cr8(value as u8);
        }
        _ => return cpu.raise(Exception::Ud),
    }
    Err(Leave::Next)
}

/// The number of a debug register, with DR4 and DR5 as DR6 and DR7 unless CR4.DE forbids them; checks privilege and DR7.GD.
fn debug_register(cpu: &mut Core, number: u8) -> Exec<u8> {
    if number > 7 || matches!(number, 4 | 5) && cpu.st.cr4 & cr4::DE != 0 {
        return cpu.raise(Exception::Ud);
    }
    cpu.privileged()?;
    if cpu.st.dr7 & 1 << 13 != 0 {
        return cpu.raise(Exception::Db(1 << 13));
    }
    Ok(if matches!(number, 4 | 5) { number + 2 } else { number })
}

fn read_dr(cpu: &mut Core, op: &Op) -> Exec {
    let value = match debug_register(cpu, op.s)? {
        6 => cpu.st.dr6,
        7 => cpu.st.dr7,
        n => cpu.st.dr[usize::from(n & 3)],
    };
    let value = if cpu.code64() { value } else { value & 0xffff_ffff };
    cpu.set_reg::<u64>(op.d, value);
    Ok(())
}

fn write_dr(cpu: &mut Core, op: &Op) -> Exec {
    let number = debug_register(cpu, op.d)?;
    let value = if cpu.code64() { cpu.reg::<u64>(op.s) } else { cpu.reg::<u32>(op.s) };
    if number >= 6 && value >> 32 != 0 {
        return cpu.raise(Exception::Gp(0));
    }
    match number {
        6 => cpu.st.dr6 = value & 0xe00f | 0xffff_0ff0,
        7 => cpu.st.dr7 = value & 0xffff_2bff | 0x400,
        n => cpu.st.dr[usize::from(n & 3)] = value,
    }
    cpu.sync_debug();
    Err(Leave::Next)
}

fn clts(cpu: &mut Core, _: &Op) -> Exec {
    cpu.privileged()?;
    cpu.intercept(Intercept::Cr { number: 0, value: Some(cpu.st.cr0 & !cr0::TS) })?;
    cpu.st.cr0 &= !cr0::TS;
    cpu.sync_mode();
    Err(Leave::Next)
}

fn lmsw<const M: bool>(cpu: &mut Core, op: &Op) -> Exec {
    cpu.privileged()?;
    let value = if M { u64::from(cpu.load::<u16>(op)?) } else { cpu.reg::<u16>(op.d) };
    // PE can be set but not cleared.
    let low = value & 0xf | cpu.st.cr0 & cr0::PE;
    let value = cpu.st.cr0 & !0xf | low;
    cpu.intercept(Intercept::Cr { number: 0, value: Some(value) })?;
    cpu.write_cr0(value)?;
    Err(Leave::Next)
}

/// Stores a selector or the machine status word: 16 bits to memory, zero-extended to a register.
fn store_word<T: Word, const M: bool>(cpu: &mut Core, op: &Op, value: u64) -> Exec {
    if M {
        return cpu.store(op, value as u16);
    }
    cpu.set_reg::<T>(op.d, T::cut(value));
    Ok(())
}

fn smsw<T: Word, const M: bool>(cpu: &mut Core, op: &Op) -> Exec {
    cpu.umip()?;
    let value = cpu.st.cr0;
    store_word::<T, M>(cpu, op, value)
}

fn sldt<T: Word, const M: bool>(cpu: &mut Core, op: &Op) -> Exec {
    if !cpu.protected() {
        return cpu.raise(Exception::Ud);
    }
    cpu.umip()?;
    let value = u64::from(cpu.st.ldtr.selector);
    store_word::<T, M>(cpu, op, value)
}

fn str<T: Word, const M: bool>(cpu: &mut Core, op: &Op) -> Exec {
    if !cpu.protected() {
        return cpu.raise(Exception::Ud);
    }
    cpu.umip()?;
    let value = u64::from(cpu.st.tr.selector);
    store_word::<T, M>(cpu, op, value)
}

fn store_table<const IDT: bool>(cpu: &mut Core, op: &Op) -> Exec {
    cpu.umip()?;
    let table = if IDT { cpu.st.idtr } else { cpu.st.gdtr };
    let len = if cpu.code64() { 10 } else { 6 };
    let mut bytes = [0; 10];
    bytes[..2].copy_from_slice(&table.limit.to_le_bytes());
    bytes[2..].copy_from_slice(&table.base.to_le_bytes());
    let lin = cpu.linear(op, len as u64, true)?;
    let set = cpu.set;
    cpu.write_bytes(set, lin, &bytes[..len])
}

fn load_table<const IDT: bool, const WIDE: bool>(cpu: &mut Core, op: &Op) -> Exec {
    cpu.privileged()?;
    let len = if cpu.code64() { 10 } else { 6 };
    let mut bytes = [0; 10];
    let lin = cpu.linear(op, len as u64, false)?;
    let set = cpu.set;
    cpu.read_bytes(set, lin, &mut bytes[..len])?;
    let [l0, l1, base @ ..] = bytes;
    let mut base = u64::from_le_bytes(base);
    if !cpu.code64() && !WIDE {
        // A 16-bit operand size keeps 24 bits of the base.
        base &= 0xff_ffff;
    }
    if !canonical(base) {
        return cpu.raise(Exception::Gp(0));
    }
    let table = Table { base, limit: u16::from_le_bytes([l0, l1]) };
    if IDT {
        cpu.st.idtr = table;
    } else {
        cpu.st.gdtr = table;
    }
    Ok(())
}

fn invlpg(cpu: &mut Core, op: &Op) -> Exec {
    cpu.privileged()?;
    let offset = cpu.effective(op);
    let base = if op.am & AM_SEG != 0 { cpu.st.segs[usize::from(op.am & 7)].base } else { 0 };
    let lin = cpu.wrap(base.wrapping_add(offset));
    cpu.flush_page(lin);
    Err(Leave::Next)
}

/// INVD, WBINVD: caches are always coherent here.
fn invd(cpu: &mut Core, _: &Op) -> Exec {
    cpu.privileged()
}

fn hlt(cpu: &mut Core, _: &Op) -> Exec {
    cpu.privileged()?;
    cpu.intercept(Intercept::Halt)?;
    cpu.st.events.halted = true;
    Err(Leave::Next)
}

fn rdmsr(cpu: &mut Core, _: &Op) -> Exec {
    cpu.privileged()?;
    cpu.need_alone()?;
    cpu.intercept(Intercept::Msr { index: cpu.st.gpr[1] as u32, write: false })?;
    let Some(value) = cpu.read_msr(cpu.st.gpr[1] as u32) else {
        return cpu.raise(Exception::Gp(0));
    };
    cpu.set_reg::<u32>(0, value);
    cpu.set_reg::<u32>(2, value >> 32);
    Ok(())
}

fn wrmsr(cpu: &mut Core, _: &Op) -> Exec {
    cpu.privileged()?;
    cpu.need_alone()?;
    cpu.intercept(Intercept::Msr { index: cpu.st.gpr[1] as u32, write: true })?;
    let value = cpu.reg::<u32>(2) << 32 | cpu.reg::<u32>(0);
    if cpu.write_msr(cpu.st.gpr[1] as u32, value).is_none() {
        return cpu.raise(Exception::Gp(0));
    }
    cpu.sync_mode();
    Err(Leave::Next)
}

fn rdtsc<const P: bool>(cpu: &mut Core, _: &Op) -> Exec {
    if cpu.st.cr4 & cr4::TSD != 0 && cpu.cpl() > 0 {
        return cpu.raise(Exception::Gp(0));
    }
    cpu.intercept(Intercept::Rdtsc { p: P })?;
    let tsc = cpu.tsc();
    cpu.set_reg::<u32>(0, tsc);
    cpu.set_reg::<u32>(2, tsc >> 32);
    if P {
        let aux = cpu.st.msr.tsc_aux;
        cpu.set_reg::<u32>(1, aux);
    }
    Ok(())
}

fn rdpid(cpu: &mut Core, op: &Op) -> Exec {
    let aux = cpu.st.msr.tsc_aux;
    cpu.set_reg::<u64>(op.d, aux);
    Ok(())
}

/// There are no performance counters: every index is wrong.
fn rdpmc(cpu: &mut Core, _: &Op) -> Exec {
    cpu.raise(Exception::Gp(0))
}

fn cpuid(cpu: &mut Core, _: &Op) -> Exec {
    let leaf = cpu.st.gpr[0] as u32;
    cpu.intercept(Intercept::Cpuid { leaf })?;
    let osxsave = cpu.st.cr4 & cr4::OSXSAVE != 0;
    let mut entry = cpu.cpuid.execute(leaf, cpu.st.gpr[1] as u32, osxsave);
    if leaf == 1 {
        // A local APIC that is switched off is not there (SDM vol. 3A, "Local APIC Status and Location").
        const ENABLED: u64 = 1 << 11;
        let tsc = cpu.tsc();
        if let MsrAnswer::Done(base) = cpu.bus.msr_read(crate::apic::MSR_APIC_BASE, tsc) {
            if base & ENABLED == 0 {
                entry.edx &= !crate::cpuid::APIC_BIT;
            }
        }
    }
    for (reg, value) in [(0, entry.eax), (3, entry.ebx), (1, entry.ecx), (2, entry.edx)] {
        cpu.set_reg::<u32>(reg, u64::from(value));
    }
    Ok(())
}

/// A flat code segment at `cpl`, 64 or 32 bits wide.
fn flat_code(selector: u16, cpl: u8, long: bool) -> Segment {
    let width = if long { 1 << 13 } else { 1 << 14 };
    Segment { selector, base: 0, limit: u32::MAX, access: 0x809b | width | u16::from(cpl) << 5, unusable: false }
}

/// A flat stack segment at `cpl`.
fn flat_stack(selector: u16, cpl: u8) -> Segment {
    Segment { selector, base: 0, limit: u32::MAX, access: 0xc093 | u16::from(cpl) << 5, unusable: false }
}

/// The end of the fast calls and returns: code and stack segment, privilege, RIP.
fn enter(cpu: &mut Core, cs: u16, ss: u16, cpl: u8, long: bool, rip: u64) -> Exec {
    if cpu.st.segs[seg::CS].base != 0 {
        cpu.bump_links();
    }
    cpu.st.segs[seg::CS] = flat_code(cs, cpl, long);
    cpu.st.segs[seg::SS] = flat_stack(ss, cpl);
    cpu.st.cpl = cpl;
    cpu.st.rip = rip;
    cpu.sync_mode();
    Err(Leave::Jump)
}

fn syscall(cpu: &mut Core, op: &Op) -> Exec {
    if cpu.st.msr.efer & efer::SCE == 0 || !cpu.code64() {
        return cpu.raise(Exception::Ud);
    }
    let flags = cpu.rflags();
    cpu.st.gpr[1] = cpu.next_rip(op);
    cpu.st.gpr[11] = flags & !rflags::RF;
    let mask = cpu.st.msr.fmask;
    cpu.set_rflags(flags & !mask & !rflags::RF);
    let star = (cpu.st.msr.star >> 32) as u16 & 0xfffc;
    let target = cpu.st.msr.lstar;
    enter(cpu, star, star.wrapping_add(8), 0, true, target)
}

fn sysret<const LONG: bool>(cpu: &mut Core, _: &Op) -> Exec {
    if cpu.st.msr.efer & efer::SCE == 0 || !cpu.code64() {
        return cpu.raise(Exception::Ud);
    }
    cpu.privileged()?;
    let rip = cpu.st.gpr[1];
    if LONG && !canonical(rip) {
        return cpu.raise(Exception::Gp(0));
    }
    let flags = cpu.st.gpr[11];
    cpu.set_rflags(flags & 0x3c_7fd7);
    let star = (cpu.st.msr.star >> 48) as u16;
    let cs = if LONG { star.wrapping_add(16) } else { star } | 3;
    let rip = if LONG { rip } else { rip & 0xffff_ffff };
    enter(cpu, cs, star.wrapping_add(8) | 3, 3, LONG, rip)
}

fn sysenter(cpu: &mut Core, _: &Op) -> Exec {
    let cs = cpu.st.msr.sysenter_cs as u16 & 0xfffc;
    if !cpu.pe() || cs == 0 {
        return cpu.raise(Exception::Gp(0));
    }
    cpu.st.rflags &= !(rflags::IF | rflags::VM | rflags::RF);
    let long = cpu.long_mode();
    let cut = if long { u64::MAX } else { 0xffff_ffff };
    cpu.st.gpr[4] = cpu.st.msr.sysenter_esp & cut;
    let target = cpu.st.msr.sysenter_eip & cut;
    enter(cpu, cs, cs.wrapping_add(8), 0, long, target)
}

fn sysexit<const LONG: bool>(cpu: &mut Core, _: &Op) -> Exec {
    let base = cpu.st.msr.sysenter_cs as u16 & 0xfffc;
    if !cpu.pe() || cpu.cpl() != 0 || base == 0 {
        return cpu.raise(Exception::Gp(0));
    }
    let (sp, rip) = (cpu.st.gpr[1], cpu.st.gpr[2]);
    if LONG && !(canonical(sp) && canonical(rip)) {
        return cpu.raise(Exception::Gp(0));
    }
    let cut = if LONG { u64::MAX } else { 0xffff_ffff };
    cpu.st.gpr[4] = sp & cut;
    let offset = if LONG { 32 } else { 16 };
    enter(cpu, base.wrapping_add(offset) | 3, base.wrapping_add(offset + 8) | 3, 3, LONG, rip & cut)
}

fn swapgs(cpu: &mut Core, _: &Op) -> Exec {
    cpu.privileged()?;
    let core = &mut cpu.st;
    std::mem::swap(&mut core.segs[seg::GS].base, &mut core.msr.kernel_gs_base);
    Ok(())
}

fn fsgsbase<T: Word, const SEG: usize, const WRITE: bool>(cpu: &mut Core, op: &Op) -> Exec {
    if cpu.st.cr4 & cr4::FSGSBASE == 0 {
        return cpu.raise(Exception::Ud);
    }
    if WRITE {
        let value = cpu.reg::<T>(op.d);
        if !canonical(value) {
            return cpu.raise(Exception::Gp(0));
        }
        cpu.st.segs[SEG].base = value;
    } else {
        let value = cpu.st.segs[SEG].base;
        cpu.set_reg::<T>(op.d, T::cut(value));
    }
    Ok(())
}

/// The instruction is complete and the owner is asked.
fn hypercall(cpu: &mut Core, _: &Op) -> Exec {
    cpu.need_alone()?;
    cpu.intercept(Intercept::Hypercall)?;
    cpu.trap(Trap::Exit(Exit::Hypercall, true))
}

/// Fences, prefetches, cache line flushes: memory is always in order and coherent here.
fn nothing(_: &mut Core, _: &Op) -> Exec {
    std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
    Ok(())
}

fn prefetch(_: &mut Core, _: &Op) -> Exec {
    Ok(())
}

/// CLFLUSH and the like fault as a read does.
fn flush_line(cpu: &mut Core, op: &Op) -> Exec {
    cpu.load::<u8>(op).map(drop)
}

fn pick_fsgs<const SEG: usize, const WRITE: bool>(insn: &Instruction) -> Handler {
    if insn.op0_register().size() == 8 { fsgsbase::<u64, SEG, WRITE> } else { fsgsbase::<u32, SEG, WRITE> }
}

/// See the module documentation of `exec`.
pub(crate) fn lower(insn: &Instruction) -> Option<Handler> {
    let memory = has_memory(insn);
    let size = if memory || insn.op_count() == 0 { 2 } else { insn.op0_register().size() };
    macro_rules! stored {
        ($h:ident) => {
            if memory { $h::<u16, true> } else { by_size!(size, $h::<[T], false>) }
        };
    }
    Some(match insn.mnemonic() {
        Mnemonic::Mov if insn.op1_kind() == OpKind::Register && insn.op1_register().is_cr() => read_cr,
        Mnemonic::Mov if insn.op0_kind() == OpKind::Register && insn.op0_register().is_cr() => write_cr,
        Mnemonic::Mov if insn.op1_kind() == OpKind::Register && insn.op1_register().is_dr() => read_dr,
        Mnemonic::Mov if insn.op0_kind() == OpKind::Register && insn.op0_register().is_dr() => write_dr,
        Mnemonic::Clts => clts,
        Mnemonic::Lmsw if memory => lmsw::<true>,
        Mnemonic::Lmsw => lmsw::<false>,
        Mnemonic::Smsw => stored!(smsw),
        Mnemonic::Sldt => stored!(sldt),
        Mnemonic::Str => stored!(str),
        Mnemonic::Sgdt => store_table::<false>,
        Mnemonic::Sidt => store_table::<true>,
        Mnemonic::Lgdt => {
            if insn.code() == Code::Lgdt_m1632_16 {
                load_table::<false, false>
            } else {
                load_table::<false, true>
            }
        }
        Mnemonic::Lidt => {
            if insn.code() == Code::Lidt_m1632_16 {
                load_table::<true, false>
            } else {
                load_table::<true, true>
            }
        }
        Mnemonic::Invlpg => invlpg,
        Mnemonic::Invd | Mnemonic::Wbinvd => invd,
        Mnemonic::Hlt => hlt,
        Mnemonic::Rdmsr => rdmsr,
        Mnemonic::Wrmsr => wrmsr,
        Mnemonic::Rdtsc => rdtsc::<false>,
        Mnemonic::Rdtscp => rdtsc::<true>,
        Mnemonic::Rdpid => rdpid,
        Mnemonic::Rdpmc => rdpmc,
        Mnemonic::Cpuid => cpuid,
        Mnemonic::Syscall => syscall,
        Mnemonic::Sysret => sysret::<false>,
        Mnemonic::Sysretq => sysret::<true>,
        Mnemonic::Sysenter => sysenter,
        Mnemonic::Sysexit => sysexit::<false>,
        Mnemonic::Sysexitq => sysexit::<true>,
        Mnemonic::Swapgs => swapgs,
        Mnemonic::Rdfsbase => pick_fsgs::<{ seg::FS }, false>(insn),
        Mnemonic::Rdgsbase => pick_fsgs::<{ seg::GS }, false>(insn),
        Mnemonic::Wrfsbase => pick_fsgs::<{ seg::FS }, true>(insn),
        Mnemonic::Wrgsbase => pick_fsgs::<{ seg::GS }, true>(insn),
        Mnemonic::Vmcall | Mnemonic::Vmmcall => hypercall,
        Mnemonic::Lfence | Mnemonic::Mfence | Mnemonic::Sfence => nothing,
        Mnemonic::Prefetch
        | Mnemonic::Prefetchw
        | Mnemonic::Prefetchwt1
        | Mnemonic::Prefetchnta
        | Mnemonic::Prefetcht0
        | Mnemonic::Prefetcht1
        | Mnemonic::Prefetcht2
        | Mnemonic::Reservednop => prefetch,
        Mnemonic::Clflush | Mnemonic::Clflushopt | Mnemonic::Clwb => flush_line,
        _ => return None,
    })
}
