//! The groups of state of a vCPU, over the emulator's state.

use super::vcpu::SoftVcpu;
use super::{Engine as _, Groups, Platform};
use crate::lock;
use vm_accel_core::error::{AccelError, RawCode, VcpuResult};
use vm_accel_core::regs::FpuRegs;
use vm_accel_core::regs::x86_64::{
    CR0_PG, CR4_PAE, CpuidEntry, DescriptorTable, EFER_LMA, FXSAVE_SIZE, LapicState, MpState, Segment, X86DebugRegs,
    X86Events, X86FpuRegs, X86Msr, X86Sregs, X86Vcpu, Xcr,
};
use vm_accel_core::vcpu_common::VcpuOps as _;
use vm_accel_softcpu::state::{self, seg};
use vm_accel_softcpu::{CpuState, Exception};

/// Legacy area and header: x87 and SSE are all there is.
pub const XSAVE_SIZE: usize = FXSAVE_SIZE + 64;
/// XCR0 and XSTATE_BV bits that exist: x87 and SSE.
const COMPONENTS: u64 = 3;

/// The MSRs that a snapshot holds (Intel SDM vol. 4). Those of the local APIC are a group of their own, apart from the
/// deadline, which the registers do not show.
const MSRS: [u32; 17] = [
    0x10,
    0x3b,
    0x174,
    0x175,
    0x176,
    0x1a0,
    0x1d9,
    0x277,
    0x2ff,
    0xc000_0080,
    0xc000_0081,
    0xc000_0082,
    0xc000_0083,
    0xc000_0084,
    0xc000_0102,
    0xc000_0103,
    0x6e0,
];
/// IA32_TIME_STAMP_COUNTER.
const TSC: u32 = 0x10;
/// IA32_TSC_DEADLINE; exists with a local APIC.
const TSC_DEADLINE: u32 = 0x6e0;

fn table_of(theirs: state::Table) -> DescriptorTable {
    DescriptorTable { base: theirs.base, limit: theirs.limit }
}

fn cpu_table(ours: DescriptorTable) -> state::Table {
    state::Table { base: ours.base, limit: ours.limit }
}

fn segment_of(theirs: &state::Segment) -> Segment {
    let bit = |n: u32| theirs.access >> n & 1 != 0;
    Segment {
        base: theirs.base,
        limit: theirs.limit,
        selector: theirs.selector,
        segment_type: theirs.kind(),
        present: bit(7),
        dpl: theirs.dpl(),
        db: bit(14),
        code_or_data: bit(4),
        long: bit(13),
        granularity: bit(15),
        available: bit(12),
        unusable: theirs.unusable,
    }
}

fn cpu_segment(ours: &Segment) -> state::Segment {
    let bits = [
        (ours.code_or_data, 4),
        (ours.present, 7),
        (ours.available, 12),
        (ours.long, 13),
        (ours.db, 14),
        (ours.granularity, 15),
    ];
    let access = bits.iter().fold(0, |access, (set, bit)| access | u16::from(*set) << bit);
    state::Segment {
        selector: ours.selector,
        base: ours.base,
        limit: ours.limit,
        access: access | u16::from(ours.segment_type & 15) | u16::from(ours.dpl & 3) << 5,
        unusable: ours.unusable,
    }
}

/// Segment registers: ours, and the index of the CPU's.
macro_rules! each_segment {
    ($($field:ident = $index:ident),* ; $do:ident!($ours:expr, $theirs:expr)) => {
        $(each_segment!(@$do $ours.$field, $theirs.segs[seg::$index]);)*
    };
    (@get $ours:expr, $theirs:expr) => { $ours = segment_of(&$theirs) };
    (@set $ours:expr, $theirs:expr) => { $theirs = cpu_segment(&$ours) };
}

/// The exception of a vector and an error code, as an event restores it.
pub fn exception(vector: u8, code: u32, payload: u64) -> Option<Exception> {
    let selector = code as u16;
    let plain = [
        Exception::De,
        Exception::Bp,
        Exception::Of,
        Exception::Br,
        Exception::Ud,
        Exception::Nm,
        Exception::Df,
        Exception::Mf,
        Exception::Ac,
        Exception::Xm,
    ];
    match vector {
        1 => Some(Exception::Db(payload)),
        10 => Some(Exception::Ts(selector)),
        11 => Some(Exception::Np(selector)),
        12 => Some(Exception::Ss(selector)),
        13 => Some(Exception::Gp(selector)),
        14 => Some(Exception::Pf { addr: payload, code }),
        _ => plain.into_iter().find(|exception| exception.vector() == vector),
    }
}

/// A refusal of the emulator, which has no codes: the errno that hypervisors use.
fn refused<P: Platform>(op: &'static str) -> AccelError {
    const EINVAL: i32 = 22;
    AccelError::Backend { kind: P::KIND, op, code: RawCode::Errno(EINVAL) }
}

impl<P: Platform> SoftVcpu<P> {
    pub(super) fn fpu(&self) -> VcpuResult<FpuRegs> {
        self.load(Groups::FPU)?;
        Ok(FpuRegs::X86(X86FpuRegs::from_fxsave(&self.cpu.borrow().state().fxsave())))
    }

    pub(super) fn set_fpu(&mut self, regs: &FpuRegs) -> VcpuResult<()> {
        let regs = regs.as_x86()?;
        regs.check(0xffff)?;
        self.change(Groups::FPU, |state| {
            let mut image = state.fxsave();
            regs.write_fxsave(&mut image);
            state.fxrstor(&image).then_some(()).ok_or_else(|| refused::<P>("setting the FPU registers"))
        })
    }

    /// Changes these groups of the state; an error must leave them as they were.
    fn change<T>(&mut self, groups: Groups, change: impl FnOnce(&mut CpuState) -> VcpuResult<T>) -> VcpuResult<T> {
        self.load(groups)?;
        let mut result = None;
        self.cpu.get_mut().update(|state| result = Some(change(state)));
        result.unwrap_or_else(|| Err(refused::<P>("changing the state")))
    }

    fn need_apic(&self) -> VcpuResult<()> {
        if self.has_apic { Ok(()) } else { Err(self.unsupported("the local APIC of a machine without one")) }
    }

    /// The page-directory pointers that a CPU loads with CR3 in PAE mode (Intel SDM vol. 3, 4.4.1).
    pub(super) fn page_directory_pointers(&self, cr0: u64, cr3: u64, cr4: u64, efer: u64) -> VcpuResult<[u64; 4]> {
        let is_pae = cr0 & CR0_PG != 0 && cr4 & CR4_PAE != 0 && efer & EFER_LMA == 0;
        let mut bytes = [0; 32];
        if is_pae {
            if let Some((region, offset, _)) = self.shared.slots.find(cr3 & 0xffff_ffe0) {
                region.read(offset, &mut bytes)?;
            }
        }
        Ok(std::array::from_fn(|n| u64::from_le_bytes(std::array::from_fn(|i| bytes[8 * n + i]))))
    }
}

impl<P: Platform> X86Vcpu for SoftVcpu<P> {
    fn get_sregs(&self) -> VcpuResult<X86Sregs> {
        self.load(Groups::SYSTEM)?;
        let mut cpu = self.cpu.borrow_mut();
        let (apic_base, cr8) = match self.engine.apic() {
            Some(apic) => apic.control()?,
            None => {
                let cr8 = cpu.bus_mut().cr8();
                (lock(&self.apic.apic).base(), cr8)
            }
        };
        let state = cpu.state();
        let mut sregs = X86Sregs {
            tr: segment_of(&state.tr),
            ldt: segment_of(&state.ldtr),
            gdt: table_of(state.gdtr),
            idt: table_of(state.idtr),
            cr0: state.cr0,
            cr2: state.cr2,
            cr3: state.cr3,
            cr4: state.cr4,
            cr8: cr8.into(),
            efer: state.msr.efer,
            apic_base,
            ..X86Sregs::default()
        };
        each_segment!(cs = CS, ds = DS, es = ES, fs = FS, gs = GS, ss = SS; get!(sregs, state));
        Ok(sregs)
    }

    fn set_sregs(&mut self, sregs: &X86Sregs) -> VcpuResult<()> {
        use state::{cr0, cr4, efer};
        let unknown = sregs.cr0 & !cr0::ALL | sregs.efer & !(efer::SCE | efer::LME | efer::LMA | efer::NXE);
        let long = sregs.efer & (efer::LME | efer::LMA);
        let needs = (sregs.cr0 & cr0::PG == 0 || sregs.cr0 & cr0::PE != 0)
            && (long & efer::LMA == 0 || long & efer::LME != 0 && sregs.cr4 & cr4::PAE != 0);
        if unknown != 0 || !needs {
            return Err(refused::<P>("setting the special registers"));
        }
        if self.has_apic && lock(&self.apic.apic).base() != sregs.apic_base {
            lock(&self.apic.apic).restore_base(sregs.apic_base).map_err(|_| refused::<P>("setting the APIC base"))?;
        }
        let pdpte = self.page_directory_pointers(sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer)?;
        if let Some(apic) = self.engine.apic() {
            apic.set_control(sregs.apic_base, sregs.cr8 as u8 & 15)?;
        }
        self.cpu.get_mut().bus_mut().set_cr8(sregs.cr8 as u8 & 15);
        self.change(Groups::SYSTEM, |state| {
            each_segment!(cs = CS, ds = DS, es = ES, fs = FS, gs = GS, ss = SS; set!(sregs, state));
            state.tr = cpu_segment(&sregs.tr);
            state.ldtr = cpu_segment(&sregs.ldt);
            state.gdtr = cpu_table(sregs.gdt);
            state.idtr = cpu_table(sregs.idt);
            (state.cr0, state.cr2, state.cr3, state.cr4) = (sregs.cr0, sregs.cr2, sregs.cr3, sregs.cr4);
            state.msr.efer = sregs.efer;
            state.pdpte = pdpte;
            // The stack segment's privilege is the CPU's (Intel SDM vol. 3, 5.5); real mode has none.
            state.cpl = if sregs.cr0 & cr0::PE != 0 { sregs.ss.dpl & 3 } else { 0 };
            Ok(())
        })
    }

    fn msr_indices(&self) -> VcpuResult<Vec<u32>> {
        // Which there are depends on CPUID and on the APIC.
        let has = |index: &u32| {
            (*index != TSC_DEADLINE || self.has_apic && self.shared.features.tsc_deadline)
                && self.cpu.borrow_mut().msr(*index).is_some()
        };
        self.load(Groups::SYSTEM | Groups::MSR)?;
        Ok(MSRS.into_iter().filter(has).collect())
    }

    fn get_msrs(&self, indices: &[u32]) -> VcpuResult<Vec<X86Msr>> {
        self.load(Groups::SYSTEM | Groups::MSR)?;
        let read = |(done, &index): (usize, &u32)| {
            let failed = AccelError::Msr { kind: P::KIND, op: "get_msrs", index, done };
            let value = if index == TSC { Some(self.get_tsc()?) } else { self.cpu.borrow_mut().msr(index) };
            value.map(|value| X86Msr { index, value }).ok_or(failed)
        };
        indices.iter().enumerate().map(read).collect()
    }

    fn set_msrs(&mut self, msrs: &[X86Msr]) -> VcpuResult<()> {
        const EFER: u32 = 0xc000_0080;
        self.load(Groups::SYSTEM | Groups::MSR)?;
        for (done, &X86Msr { index, value }) in msrs.iter().enumerate() {
            // WRMSR cannot set LMA, which a restored state has.
            let is_set = index == EFER && self.cpu.get_mut().state().msr.efer == value
                || index == TSC && self.engine.set_tsc(value)?
                || self.cpu.get_mut().set_msr(index, value);
            if !is_set {
                return Err(AccelError::Msr { kind: P::KIND, op: "set_msrs", index, done });
            }
        }
        Ok(())
    }

    fn supported_cpuid(&self) -> VcpuResult<Vec<CpuidEntry>> {
        let nothing = (vm_accel_softcpu::Ram::new(), Box::new(vm_accel_softcpu::NoBus));
        let mut fresh = vm_accel_softcpu::Cpu::new(self.get_id(), self.shared.config, nothing.0, nothing.1);
        if let Some(cpuid) = &self.shared.cpuid {
            fresh.set_cpuid(cpuid);
        }
        Ok(fresh.cpuid().iter().map(cpuid_entry).collect())
    }

    fn get_cpuid(&self) -> VcpuResult<Vec<CpuidEntry>> {
        Ok(self.cpu.borrow().cpuid().iter().map(cpuid_entry).collect())
    }

    fn set_cpuid(&mut self, entries: &[CpuidEntry]) -> VcpuResult<()> {
        const MOST: usize = 256;
        if entries.len() > MOST {
            return Err(AccelError::invalid("CPUID", format!("{} entries are more than {MOST}", entries.len())));
        }
        let theirs: Vec<_> = entries
            .iter()
            .map(|ours| vm_accel_softcpu::CpuidEntry {
                leaf: ours.leaf,
                subleaf: ours.subleaf.unwrap_or(0),
                eax: ours.eax,
                ebx: ours.ebx,
                ecx: ours.ecx,
                edx: ours.edx,
            })
            .collect();
        self.cpu.get_mut().set_cpuid(&theirs);
        Ok(())
    }

    fn get_xsave(&self) -> VcpuResult<Vec<u8>> {
        self.load(Groups::FPU)?;
        let mut area = vec![0; XSAVE_SIZE];
        area[..FXSAVE_SIZE].copy_from_slice(&self.cpu.borrow().state().fxsave());
        area[FXSAVE_SIZE..FXSAVE_SIZE + 8].copy_from_slice(&COMPONENTS.to_le_bytes());
        Ok(area)
    }

    fn set_xsave(&mut self, area: &[u8]) -> VcpuResult<()> {
        if area.len() != XSAVE_SIZE {
            let len = area.len();
            return Err(AccelError::invalid("XSAVE area", format!("{len} bytes were given, {XSAVE_SIZE} are needed")));
        }
        // The header: components in use, then the compaction word and reserved bytes, which must be 0 (SDM vol. 1, 13.8).
        let (in_use, rest) = area[FXSAVE_SIZE..].split_at(8);
        if in_use[0] & !(COMPONENTS as u8) != 0 || in_use[1..].iter().chain(rest).any(|byte| *byte != 0) {
            return Err(refused::<P>("setting the XSAVE area"));
        }
        let regs = X86FpuRegs::from_xsave(area)?;
        self.set_fpu(&FpuRegs::X86(regs))
    }

    fn get_xcrs(&self) -> VcpuResult<Vec<Xcr>> {
        self.load(Groups::FPU)?;
        Ok(vec![Xcr { index: 0, value: self.cpu.borrow().state().xcr0 }])
    }

    fn set_xcrs(&mut self, xcrs: &[Xcr]) -> VcpuResult<()> {
        if xcrs.iter().any(|xcr| xcr.index != 0 || xcr.value & 1 == 0 || xcr.value & !COMPONENTS != 0) {
            return Err(refused::<P>("setting XCR0"));
        }
        self.change(Groups::FPU, |state| {
            state.xcr0 = xcrs.last().map_or(state.xcr0, |xcr| xcr.value);
            Ok(())
        })
    }

    fn get_debug_regs(&self) -> VcpuResult<X86DebugRegs> {
        self.load(Groups::DEBUG)?;
        let cpu = self.cpu.borrow();
        let state = cpu.state();
        Ok(X86DebugRegs { db: state.dr, dr6: state.dr6, dr7: state.dr7 })
    }

    fn set_debug_regs(&mut self, regs: &X86DebugRegs) -> VcpuResult<()> {
        if (regs.dr6 | regs.dr7) >> 32 != 0 {
            return Err(refused::<P>("setting the debug registers"));
        }
        self.change(Groups::DEBUG, |state| {
            (state.dr, state.dr6, state.dr7) = (regs.db, regs.dr6, regs.dr7);
            Ok(())
        })
    }

    fn get_events(&self) -> VcpuResult<X86Events> {
        self.load(Groups::EVENTS)?;
        let cpu = self.cpu.borrow();
        let events = &cpu.state().events;
        Ok(X86Events {
            exception_injected: events.exception.map(Exception::vector),
            exception_error_code: events.exception.and_then(Exception::error_code),
            exception_payload: match events.exception {
                Some(Exception::Db(dr6)) => Some(dr6),
                Some(Exception::Pf { addr, .. }) => Some(addr),
                _ => None,
            },
            interrupt_injected: events.interrupt,
            sti_shadow: events.sti_shadow,
            mov_ss_shadow: events.mov_ss_shadow,
            nmi_pending: events.nmi || self.apic.signals().nmis != 0,
            nmi_masked: events.nmi_blocked,
            sipi_vector: self.apic.signals().startup.unwrap_or(0),
            triple_fault_pending: events.shutdown,
            ..X86Events::default()
        })
    }

    fn set_events(&mut self, events: &X86Events) -> VcpuResult<()> {
        if events.smm {
            return Err(self.unsupported("system-management mode"));
        }
        self.load(Groups::SYSTEM)?;
        let vector = events.exception_injected.or(events.exception_pending);
        let exception = match vector {
            None => None,
            Some(vector) => {
                let code = events.exception_error_code.unwrap_or(0);
                // A page fault's address is in CR2 already unless the payload says otherwise.
                let cr2 = self.cpu.get_mut().state().cr2;
                let payload = events.exception_payload.unwrap_or(if vector == 14 { cr2 } else { 0 });
                let found = exception(vector, code, payload);
                Some(found.ok_or_else(|| AccelError::invalid("exception", format!("{vector} is none of this CPU's")))?)
            }
        };
        self.change(Groups::EVENTS, |state| {
            state.events.exception = exception;
            state.events.interrupt = events.interrupt_injected;
            state.events.nmi = events.nmi_pending || events.nmi_injected;
            state.events.nmi_blocked = events.nmi_masked;
            state.events.sti_shadow = events.sti_shadow;
            state.events.mov_ss_shadow = events.mov_ss_shadow;
            state.events.shutdown = events.triple_fault_pending;
            Ok(())
        })
    }

    fn get_lapic(&self) -> VcpuResult<LapicState> {
        if let Some(apic) = self.engine.apic() {
            return Ok(LapicState { regs: apic.page()? });
        }
        self.need_apic()?;
        let now = self.now();
        Ok(LapicState { regs: lock(&self.apic.apic).page(now) })
    }

    fn set_lapic(&mut self, lapic: &LapicState) -> VcpuResult<()> {
        if let Some(apic) = self.engine.apic() {
            return apic.set_page(&lapic.regs);
        }
        self.need_apic()?;
        let now = self.now();
        lock(&self.apic.apic).set_page(&lapic.regs, now);
        Ok(())
    }

    fn get_mp_state(&self) -> VcpuResult<MpState> {
        if let Some(apic) = self.engine.apic() {
            return apic.mp_state();
        }
        Ok(match self.mp_state {
            MpState::Runnable if self.cpu.borrow().state().events.halted => MpState::Halted,
            other => other,
        })
    }

    fn set_mp_state(&mut self, state: MpState) -> VcpuResult<()> {
        let (ours, halted) = match state {
            MpState::Runnable => (MpState::Runnable, false),
            MpState::Halted => (MpState::Runnable, true),
            MpState::Uninitialized | MpState::InitReceived => (state, false),
            _ => return Err(self.unsupported("an MP state between start-up and running")),
        };
        if let Some(apic) = self.engine.apic() {
            return apic.set_mp_state(state);
        }
        self.mp_state = ours;
        self.change(Groups::empty(), |state| {
            state.events.halted = halted;
            Ok(())
        })
    }

    fn get_tsc_khz(&self) -> VcpuResult<u32> {
        Ok((self.cpu.borrow().tsc_frequency() / 1000) as u32)
    }

    fn set_tsc_khz(&mut self, khz: u32) -> VcpuResult<()> {
        if self.get_tsc_khz()? == khz { Ok(()) } else { Err(self.unsupported("scaling the TSC")) }
    }

    fn get_tsc(&self) -> VcpuResult<u64> {
        Ok(self.engine.tsc()?.unwrap_or_else(|| self.cpu.borrow().tsc()))
    }

    fn set_tsc(&mut self, value: u64) -> VcpuResult<()> {
        if !self.engine.set_tsc(value)? {
            self.cpu.get_mut().set_tsc(value);
        }
        Ok(())
    }

    fn inject_interrupt(&mut self, vector: u8) -> VcpuResult<()> {
        if self.can_take_interrupt()? && self.cpu.get_mut().inject_interrupt(vector) {
            return Ok(());
        }
        Err(AccelError::invalid("interrupt", "the guest cannot take one now; ask for an interrupt window"))
    }

    fn ready_for_interrupt(&self) -> VcpuResult<bool> {
        self.can_take_interrupt()
    }

    fn request_interrupt_window(&mut self, wanted: bool) -> VcpuResult<()> {
        self.window = wanted;
        self.cpu.get_mut().request_interrupt_window(wanted);
        Ok(())
    }

    fn inject_nmi(&mut self) -> VcpuResult<()> {
        self.cpu.get_mut().inject_nmi();
        Ok(())
    }

    fn translate(&self, linear: u64) -> VcpuResult<Option<u64>> {
        self.load(Groups::SYSTEM)?;
        Ok(self.cpu.borrow_mut().translate(linear))
    }

    fn exit_on_unknown_msrs(&mut self, wanted: bool) -> VcpuResult<()> {
        if !self.shared.caps.msr_exits {
            return Err(self.unsupported("MSR exits"));
        }
        // Relaxed: a vCPU that runs meanwhile may see either.
        self.shared.msr_exits.store(wanted, std::sync::atomic::Ordering::Relaxed);
        Ok(())
    }

    fn group_unsupported(&self, what: &'static str) -> AccelError {
        self.unsupported(what)
    }
}

fn cpuid_entry(theirs: &vm_accel_softcpu::CpuidEntry) -> CpuidEntry {
    // The leaves of this CPU whose answer depends on ECX.
    let has_subleaves = matches!(theirs.leaf, 4 | 7 | 0xb | 0xd);
    CpuidEntry {
        leaf: theirs.leaf,
        subleaf: has_subleaves.then_some(theirs.subleaf),
        eax: theirs.eax,
        ebx: theirs.ebx,
        ecx: theirs.ecx,
        edx: theirs.edx,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_round_trip() {
        for ours in [Segment::code64(8, 3), Segment::flat_data(16, 0), Segment::busy_tss(24, 0x1000, 0x67)] {
            let theirs = cpu_segment(&ours);
            assert_eq!(segment_of(&theirs), ours);
        }
        assert_eq!(cpu_segment(&Segment::real_mode(0x1234)), state::Segment::real(0x1234, false));
    }

    #[test]
    fn every_vector_that_is_an_exception_comes_back() {
        for vector in 0..32 {
            if let Some(exception) = exception(vector, 0, 0) {
                assert_eq!(exception.vector(), vector);
            }
        }
        assert_eq!(exception(14, 6, 0x1000), Some(Exception::Pf { addr: 0x1000, code: 6 }));
        assert_eq!(exception(2, 0, 0), None);
    }
}
