//! The register file by the platform's names.

use super::bus::Own;
use super::partition::TSC_HZ;
use super::vp::{Inner, exception};
use super::{Answer, code};
use std::sync::atomic::Ordering;
use vm_accel_softcpu::state::{self, rflags};
use vm_accel_softcpu::{Cpu, Exception};
use vm_accel_sys::whpx::code::WHV_E_INVALID_VP_REGISTER_NAME;
use vm_accel_sys::whpx::code::hv::ERROR_HV_INVALID_REGISTER_VALUE;
use vm_accel_sys::whpx::x86_64::defs::*;
use vm_accel_sys::whpx::x86_64::fields::{
    Deliverability, InternalActivity, InterruptState, PendingDebug, PendingException, PendingExtInt,
    PendingInterruption,
};
use vm_accel_sys::whpx::x86_64::{REGISTER_IA32_MISC_ENABLE, RegisterValue, Segment};

/// Where a register is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    Gpr(usize),
    Rip,
    Rflags,
    Seg(usize),
    Ldtr,
    Tr,
    Idtr,
    Gdtr,
    Cr0,
    Cr2,
    Cr3,
    Cr4,
    Cr8,
    Dr(usize),
    Dr6,
    Dr7,
    Xcr0,
    /// Sixteen bytes of the FXSAVE image.
    Fx(usize),
    Tsc,
    Efer,
    ApicBase,
    ApicId,
    /// One that RDMSR and WRMSR reach as well.
    Msr(u32),
    /// Of the local APIC's page, if the platform emulates it.
    Apic(usize),
    PendingInterruption,
    InterruptState,
    PendingEvent,
    Deliverability,
    InternalActivity,
    PendingDebug,
}

/// The names as unsigned numbers.
const PENDING_INTERRUPTION: u32 = WHvRegisterPendingInterruption as u32;
const INTERRUPT_STATE: u32 = WHvRegisterInterruptState as u32;
const PENDING_EVENT: u32 = WHvRegisterPendingEvent as u32;
const DELIVERABILITY: u32 = WHvX64RegisterDeliverabilityNotifications as u32;
const INTERNAL_ACTIVITY: u32 = WHvRegisterInternalActivityState as u32;
const PENDING_DEBUG: u32 = WHvX64RegisterPendingDebugException as u32;
const MISC_ENABLE: u32 = REGISTER_IA32_MISC_ENABLE as u32;

/// Where the register of that name is; unknown names fail the whole call.
pub(super) fn place(name: WHV_REGISTER_NAME, has_apic: bool) -> Answer<Place> {
    let n = name as u32;
    let at = |first: u32| (n - first) as usize;
    Ok(match n {
        0..=15 => Place::Gpr(at(0)),
        16 => Place::Rip,
        17 => Place::Rflags,
        18..=23 => Place::Seg(at(18)),
        24 => Place::Ldtr,
        25 => Place::Tr,
        26 => Place::Idtr,
        27 => Place::Gdtr,
        28 => Place::Cr0,
        29 => Place::Cr2,
        30 => Place::Cr3,
        31 => Place::Cr4,
        32 => Place::Cr8,
        33..=36 => Place::Dr(at(33)),
        37 => Place::Dr6,
        38 => Place::Dr7,
        39 => Place::Xcr0,
        0x1000..=0x100f => Place::Fx(160 + 16 * at(0x1000)),
        0x1010..=0x1017 => Place::Fx(32 + 16 * at(0x1010)),
        0x1018 => Place::Fx(0),
        0x1019 => Place::Fx(16),
        0x2000 => Place::Tsc,
        0x2001 => Place::Efer,
        0x2002 => Place::Msr(0xc000_0102),
        0x2003 => Place::ApicBase,
        0x2004 => Place::Msr(0x277),
        0x2005 => Place::Msr(0x174),
        0x2006 => Place::Msr(0x176),
        0x2007 => Place::Msr(0x175),
        0x2008..=0x200b => Place::Msr(0xc000_0081 + n - 0x2008),
        0x200c => Place::ApicId,
        0x200d => Place::Msr(0xfe),
        0x200e => Place::Msr(0x2ff),
        0x2010..=0x2017 => Place::Msr(0x200 + 2 * (n - 0x2010)),
        0x2040..=0x2047 => Place::Msr(0x201 + 2 * (n - 0x2040)),
        0x2070 => Place::Msr(0x250),
        0x2071..=0x2072 => Place::Msr(0x258 + n - 0x2071),
        0x2073..=0x207a => Place::Msr(0x268 + n - 0x2073),
        0x207b => Place::Msr(0xc000_0103),
        0x2096 => Place::Msr(0x3b),
        MISC_ENABLE => Place::Msr(0x1a0),
        0x3000..=0x303f if has_apic => Place::Apic(at(0x3000)),
        PENDING_INTERRUPTION => Place::PendingInterruption,
        INTERRUPT_STATE => Place::InterruptState,
        PENDING_EVENT => Place::PendingEvent,
        DELIVERABILITY => Place::Deliverability,
        INTERNAL_ACTIVITY => Place::InternalActivity,
        PENDING_DEBUG => Place::PendingDebug,
        _ => return code(WHV_E_INVALID_VP_REGISTER_NAME),
    })
}

/// A segment as the platform has it: an unusable one is not present.
pub(super) fn segment(theirs: &state::Segment) -> Segment {
    const PRESENT: u16 = 1 << 7;
    let attributes = if theirs.unusable { theirs.access & !PRESENT } else { theirs.access };
    Segment { base: theirs.base, limit: theirs.limit, selector: theirs.selector, attributes }
}

fn to_segment(ours: Segment) -> state::Segment {
    state::Segment {
        selector: ours.selector,
        base: ours.base,
        limit: ours.limit,
        access: ours.attributes & 0xf0ff,
        unusable: ours.attributes & 1 << 7 == 0,
    }
}

impl Inner {
    /// Reads a register.
    pub(super) fn get(&mut self, place: Place) -> Answer<RegisterValue> {
        let own = self.own.clone();
        let st = self.cpu.state();
        let events = &st.events;
        let value = match place {
            Place::Gpr(n) => st.gpr[n],
            Place::Rip => st.rip,
            Place::Rflags => st.rflags,
            Place::Seg(n) => return Ok(RegisterValue::from_segment(segment(&st.segs[n]))),
            Place::Ldtr => return Ok(RegisterValue::from_segment(segment(&st.ldtr))),
            Place::Tr => return Ok(RegisterValue::from_segment(segment(&st.tr))),
            Place::Idtr => return Ok(RegisterValue::from_table(st.idtr.base, st.idtr.limit)),
            Place::Gdtr => return Ok(RegisterValue::from_table(st.gdtr.base, st.gdtr.limit)),
            Place::Cr0 => st.cr0,
            Place::Cr2 => st.cr2,
            Place::Cr3 => st.cr3,
            Place::Cr4 => st.cr4,
            Place::Cr8 => u64::from(self.cpu.bus_mut().cr8()),
            Place::Dr(n) => st.dr[n],
            Place::Dr6 => st.dr6,
            Place::Dr7 => st.dr7,
            Place::Xcr0 => st.xcr0,
            Place::Fx(at) => {
                let image = st.fxsave();
                let bytes = std::array::from_fn(|i| image[at + i]);
                return Ok(RegisterValue::from_u128(u128::from_le_bytes(bytes)));
            }
            Place::Tsc => self.cpu.tsc(),
            Place::Efer => st.msr.efer,
            Place::ApicBase => self.apic_base(&own),
            Place::ApicId => u64::from(self.apic.index),
            Place::Msr(index) => self.cpu.msr(index).unwrap_or(0),
            Place::Apic(n) => {
                let page = self.apic_page();
                u64::from(u32::from_le_bytes(std::array::from_fn(|i| page[16 * n + i])))
            }
            Place::PendingInterruption => {
                match (events.interrupt, events.exception) {
                    (_, Some(exception)) => in_delivery(WHvX64PendingException, exception.vector())
                        .with_deliver_error_code(exception.error_code().is_some().into())
                        .with_error_code(exception.error_code().unwrap_or(0).into()),
                    (Some(vector), None) => in_delivery(WHvX64PendingInterrupt, vector),
                    (None, None) if events.nmi => in_delivery(WHvX64PendingNmi, 2),
                    (None, None) => PendingInterruption(0),
                }
                .0
            }
            Place::InterruptState => {
                let shadow = events.sti_shadow || events.mov_ss_shadow;
                InterruptState(0).with_interrupt_shadow(shadow.into()).with_nmi_masked(events.nmi_blocked.into()).0
            }
            Place::PendingEvent => self.ext_int.map_or(0, |vector| {
                let kind = WHvX64PendingEventExtInt as u64;
                PendingExtInt(0).with_pending(1).with_kind(kind).with_vector(vector.into()).0
            }),
            Place::Deliverability => self.wanted.0,
            Place::InternalActivity => {
                InternalActivity(0)
                    .with_halt_suspend(events.halted.into())
                    .with_startup_suspend(self.startup_suspend.into())
                    .0
            }
            Place::PendingDebug => 0,
        };
        Ok(RegisterValue::from_u64(value))
    }

    /// Writes a register.
    pub(super) fn set(&mut self, place: Place, value: RegisterValue) -> Answer {
        let low = value.low;
        let own = self.own.clone();
        let mut invalid = false;
        match place {
            Place::Rflags => self.bad_rflags = low & rflags::FIXED == 0 || low & !(rflags::ALL | rflags::FIXED) != 0,
            Place::Cr8 => {
                if low > 15 {
                    return code(ERROR_HV_INVALID_REGISTER_VALUE);
                }
                self.cpu.bus_mut().set_cr8(low as u8);
                return Ok(());
            }
            Place::Tsc => {
                self.cpu.set_tsc(low);
                return Ok(());
            }
            Place::ApicBase => return self.set_apic_base(&own, low),
            Place::ApicId => return if low == u64::from(self.apic.index) { Ok(()) } else { refuse() },
            Place::Msr(index) => {
                let is_same = self.cpu.msr(index) == Some(low);
                return if is_same || self.cpu.set_msr(index, low) { Ok(()) } else { refuse() };
            }
            Place::Apic(_) => return refuse(),
            Place::PendingInterruption => return self.set_pending(PendingInterruption(low)),
            Place::PendingEvent => return self.set_event(value),
            Place::Deliverability => {
                self.wanted = Deliverability(low);
                return Ok(());
            }
            Place::InternalActivity => {
                let activity = InternalActivity(low);
                self.startup_suspend = activity.startup_suspend() != 0;
                let halted = activity.halt_suspend() != 0;
                self.held_event &= halted;
                self.cpu.update(|st| st.events.halted = halted);
                return Ok(());
            }
            Place::PendingDebug => {
                let debug = PendingDebug(low);
                if debug.breakpoints() | debug.single_step() != 0 {
                    let bits = debug.breakpoints() | debug.single_step() << 14;
                    self.cpu.update(|st| st.events.exception = Some(Exception::Db(bits)));
                }
                return Ok(());
            }
            _ => {}
        }
        self.cpu.update(|st| match place {
            Place::Gpr(n) => st.gpr[n] = low,
            Place::Rip => st.rip = low,
            Place::Rflags => st.rflags = low & rflags::ALL,
            Place::Seg(n) => st.segs[n] = to_segment(value.as_segment()),
            Place::Ldtr => st.ldtr = to_segment(value.as_segment()),
            Place::Tr => st.tr = to_segment(value.as_segment()),
            Place::Idtr => (st.idtr.base, st.idtr.limit) = value.as_table(),
            Place::Gdtr => (st.gdtr.base, st.gdtr.limit) = value.as_table(),
            Place::Cr0 => st.cr0 = low,
            Place::Cr2 => st.cr2 = low,
            Place::Cr3 => st.cr3 = low,
            Place::Cr4 => st.cr4 = low,
            Place::Efer => st.msr.efer = low,
            Place::Dr(n) => st.dr[n] = low,
            Place::Dr6 => st.dr6 = low,
            Place::Dr7 => st.dr7 = low,
            Place::Xcr0 => {
                invalid = low & 1 == 0 || low & !3 != 0;
                if !invalid {
                    st.xcr0 = low;
                }
            }
            Place::Fx(at) => {
                let mut image = st.fxsave();
                image[at..at + 16].copy_from_slice(&value.as_u128().to_le_bytes());
                invalid = !st.fxrstor(&image);
            }
            Place::InterruptState => {
                let state = InterruptState(low);
                st.events.sti_shadow = state.interrupt_shadow() != 0;
                st.events.mov_ss_shadow = false;
                st.events.nmi_blocked = state.nmi_masked() != 0;
            }
            _ => {}
        });
        if matches!(place, Place::Cr0 | Place::Seg(state::seg::SS)) {
            // The stack segment's privilege is the processor's; real mode has none.
            self.cpu.update(|st| {
                let protected = st.cr0 & state::cr0::PE != 0;
                st.cpl = if protected { st.segs[state::seg::SS].dpl() } else { 0 };
            });
        }
        if matches!(place, Place::Cr0 | Place::Cr3 | Place::Cr4 | Place::Efer) {
            self.reload_pdptes = true;
        }
        if invalid { refuse() } else { Ok(()) }
    }

    fn apic_base(&self, own: &Own) -> u64 {
        if self.has_apic { super::lock(&self.apic.apic).base() } else { own.apic_base.load(Ordering::Relaxed) }
    }

    fn set_apic_base(&self, own: &Own, value: u64) -> Answer {
        if !self.has_apic {
            own.apic_base.store(value, Ordering::Relaxed);
            return Ok(());
        }
        let mut apic = super::lock(&self.apic.apic);
        if apic.base() == value || apic.restore_base(value).is_ok() { Ok(()) } else { refuse() }
    }

    fn set_pending(&mut self, event: PendingInterruption) -> Answer {
        let kind = event.kind() as i32;
        let vector = event.vector();
        let cr2 = self.cpu.state().cr2;
        let (mut interrupt, mut nmi, mut fault) = (None, false, None);
        if event.pending() != 0 {
            match (kind, u8::try_from(vector)) {
                (WHvX64PendingInterrupt, Ok(vector)) => interrupt = Some(vector),
                (WHvX64PendingNmi, Ok(2)) => nmi = true,
                (WHvX64PendingException, Ok(vector)) => {
                    fault = exception(vector, event.error_code() as u32, if vector == 14 { cr2 } else { 0 });
                    let takes_code = fault.is_some_and(|fault| fault.error_code().is_some());
                    if fault.is_none() || takes_code != (event.deliver_error_code() != 0) {
                        return refuse();
                    }
                }
                _ => return refuse(),
            }
        }
        self.held_event = self.has_apic && event.pending() != 0;
        self.cpu.update(|st| {
            (st.events.interrupt, st.events.exception) = (interrupt, fault);
            st.events.nmi = nmi;
        });
        Ok(())
    }

    fn set_event(&mut self, value: RegisterValue) -> Answer {
        let event = PendingException(value.low);
        self.ext_int = None;
        if event.pending() == 0 {
            return Ok(());
        }
        match event.kind() as i32 {
            WHvX64PendingEventException => {
                let vector = u8::try_from(event.vector()).unwrap_or(u8::MAX);
                let Some(fault) = exception(vector, event.error_code() as u32, value.high) else {
                    return refuse();
                };
                if fault.error_code().is_some() != (event.deliver_error_code() != 0) {
                    return refuse();
                }
                self.cpu.update(|st| st.events.exception = Some(fault));
            }
            WHvX64PendingEventExtInt => self.ext_int = Some(PendingExtInt(value.low).vector() as u8),
            _ => return refuse(),
        }
        Ok(())
    }

    /// The APIC's registers as the platform saves them: a page.
    pub(super) fn apic_page(&self) -> Vec<u8> {
        let now = self.now();
        let mut page = vec![0; 4096];
        page[..1024].copy_from_slice(&super::lock(&self.apic.apic).page(now));
        page
    }

    /// Restores the APIC's registers.
    pub(super) fn set_apic_page(&self, page: &[u8]) -> Answer {
        let now = self.now();
        let Some(registers) = page.first_chunk::<1024>() else {
            return code(vm_accel_sys::whpx::code::WHV_E_INSUFFICIENT_BUFFER);
        };
        super::lock(&self.apic.apic).set_page(registers, now);
        Ok(())
    }

    /// The extended state in compacted format (SDM vol. 1, 13.4.3), with the components of `XCR0`.
    pub(super) fn xsave(&mut self) -> Vec<u8> {
        let mut area = vec![0; XSAVE_SIZE];
        let image = self.cpu.state().fxsave();
        area[..512].copy_from_slice(&image);
        let mut in_use = COMPONENTS;
        // XSAVEC does not write a component that is in its initial configuration, and says so.
        if image[160..416].iter().all(|byte| *byte == 0) && self.mischief.one_in(2) {
            in_use &= !2;
            area[160..416].fill(0xa5);
        }
        area[512..520].copy_from_slice(&in_use.to_le_bytes());
        area[520..528].copy_from_slice(&(COMPACTED | COMPONENTS).to_le_bytes());
        area
    }

    /// Restores the extended state; only the compacted format is taken.
    pub(super) fn set_xsave(&mut self, area: &[u8]) -> Answer {
        if area.len() < XSAVE_SIZE {
            return code(vm_accel_sys::whpx::code::WHV_E_INSUFFICIENT_BUFFER);
        }
        let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| area[at + i]));
        let (in_use, format) = (word(512), word(520));
        let reserved = area[528..XSAVE_SIZE].iter().any(|byte| *byte != 0);
        if format & COMPACTED == 0 || format & !(COMPACTED | COMPONENTS) != 0 || in_use & !format != 0 || reserved {
            return code(vm_accel_sys::whpx::code::E_INVALIDARG);
        }
        let mut image: [u8; 512] = std::array::from_fn(|i| area[i]);
        // What is not in use takes its initial configuration; MXCSR goes with SSE.
        if in_use & 1 == 0 {
            image[..24].fill(0);
            image[32..160].fill(0);
            image[..2].copy_from_slice(&0x37f_u16.to_le_bytes());
        }
        if in_use & 2 == 0 {
            image[160..416].fill(0);
        }
        let mut taken = false;
        self.cpu.update(|st| taken = st.fxrstor(&image));
        if taken { Ok(()) } else { code(vm_accel_sys::whpx::code::E_INVALIDARG) }
    }
}

/// Legacy area and header.
pub(super) const XSAVE_SIZE: usize = 576;
/// x87 and SSE.
const COMPONENTS: u64 = 3;
/// XCOMP_BV: the area is compacted.
const COMPACTED: u64 = 1 << 63;

fn refuse() -> Answer {
    code(ERROR_HV_INVALID_REGISTER_VALUE)
}

fn in_delivery(kind: i32, vector: u8) -> PendingInterruption {
    PendingInterruption(0).with_pending(1).with_kind(kind as u64).with_vector(vector.into())
}

/// Nanoseconds as the APIC wants them; the TSC counts just those.
pub(super) fn time(cpu: &Cpu, start: std::time::Instant) -> vm_accel_softcpu::apic::Now {
    const { assert!(TSC_HZ == 1_000_000_000) };
    vm_accel_softcpu::apic::Now { ns: u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX), tsc: cpu.tsc() }
}
