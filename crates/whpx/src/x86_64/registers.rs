//! The registers of a virtual processor: one table that names each once, with its place in the emulator's state.
//!
//! The x87 and SSE registers are not in it: they move as an XSAVE area, whose layout is beyond doubt.

use vm_accel_backend::x86::{Groups, exception};
use vm_accel_softcpu::CpuState;
use vm_accel_softcpu::state::{Events, Segment, Table};
use vm_accel_sys::whpx::x86_64::defs::*;
use vm_accel_sys::whpx::x86_64::fields::{InterruptState, PendingInterruption};
use vm_accel_sys::whpx::x86_64::{REGISTER_IA32_MISC_ENABLE, RegisterValue, Segment as PlatformSegment};

/// A register.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) name: WHV_REGISTER_NAME,
    pub(super) group: Groups,
    pub(super) get: fn(&CpuState) -> RegisterValue,
    pub(super) set: fn(&mut CpuState, RegisterValue),
}

/// The table: groups of registers of one shape, each with its place in the state.
macro_rules! rows {
    ($($group:ident $shape:ident {
        $($name:ident => $field:ident $([$n:tt])? $(. $sub:ident $([$m:tt])?)?),* $(,)?
    })*) => {
        &[$($(Row {
            name: $name,
            group: Groups::$group,
            get: |state| $shape::get(&state.$field $([$n])? $(.$sub $([$m])?)?),
            set: |state, value| $shape::set(&mut state.$field $([$n])? $(.$sub $([$m])?)?, value),
        }),*),*]
    };
}

/// Every register that moves.
#[rustfmt::skip]
pub(super) const ROWS: &[Row] = rows! {
    GPR word {
        WHvX64RegisterRax => gpr[0], WHvX64RegisterRcx => gpr[1], WHvX64RegisterRdx => gpr[2], WHvX64RegisterRbx => gpr[3],
        WHvX64RegisterRsp => gpr[4], WHvX64RegisterRbp => gpr[5], WHvX64RegisterRsi => gpr[6], WHvX64RegisterRdi => gpr[7],
        WHvX64RegisterR8 => gpr[8], WHvX64RegisterR9 => gpr[9], WHvX64RegisterR10 => gpr[10], WHvX64RegisterR11 => gpr[11],
        WHvX64RegisterR12 => gpr[12], WHvX64RegisterR13 => gpr[13], WHvX64RegisterR14 => gpr[14], WHvX64RegisterR15 => gpr[15],
        WHvX64RegisterRip => rip, WHvX64RegisterRflags => rflags,
    }
    SYSTEM segment {
        WHvX64RegisterEs => segs[0], WHvX64RegisterCs => segs[1], WHvX64RegisterSs => segs[2], WHvX64RegisterDs => segs[3],
        WHvX64RegisterFs => segs[4], WHvX64RegisterGs => segs[5], WHvX64RegisterLdtr => ldtr, WHvX64RegisterTr => tr,
    }
    SYSTEM table { WHvX64RegisterGdtr => gdtr, WHvX64RegisterIdtr => idtr }
    SYSTEM word {
        WHvX64RegisterCr0 => cr0, WHvX64RegisterCr2 => cr2, WHvX64RegisterCr3 => cr3, WHvX64RegisterCr4 => cr4,
        WHvX64RegisterEfer => msr.efer,
    }
    MSR word {
        WHvX64RegisterStar => msr.star, WHvX64RegisterLstar => msr.lstar, WHvX64RegisterCstar => msr.cstar,
        WHvX64RegisterSfmask => msr.fmask, WHvX64RegisterKernelGsBase => msr.kernel_gs_base, WHvX64RegisterPat => msr.pat,
        WHvX64RegisterSysenterCs => msr.sysenter_cs, WHvX64RegisterSysenterEsp => msr.sysenter_esp,
        WHvX64RegisterSysenterEip => msr.sysenter_eip, WHvX64RegisterTscAux => msr.tsc_aux,
        REGISTER_IA32_MISC_ENABLE => msr.misc_enable, WHvX64RegisterMsrMtrrDefType => msr.mtrr_def_type,
        WHvX64RegisterMsrMtrrPhysBase0 => msr.mtrr_var[0], WHvX64RegisterMsrMtrrPhysMask0 => msr.mtrr_var[1],
        WHvX64RegisterMsrMtrrPhysBase1 => msr.mtrr_var[2], WHvX64RegisterMsrMtrrPhysMask1 => msr.mtrr_var[3],
        WHvX64RegisterMsrMtrrPhysBase2 => msr.mtrr_var[4], WHvX64RegisterMsrMtrrPhysMask2 => msr.mtrr_var[5],
        WHvX64RegisterMsrMtrrPhysBase3 => msr.mtrr_var[6], WHvX64RegisterMsrMtrrPhysMask3 => msr.mtrr_var[7],
        WHvX64RegisterMsrMtrrPhysBase4 => msr.mtrr_var[8], WHvX64RegisterMsrMtrrPhysMask4 => msr.mtrr_var[9],
        WHvX64RegisterMsrMtrrPhysBase5 => msr.mtrr_var[10], WHvX64RegisterMsrMtrrPhysMask5 => msr.mtrr_var[11],
        WHvX64RegisterMsrMtrrPhysBase6 => msr.mtrr_var[12], WHvX64RegisterMsrMtrrPhysMask6 => msr.mtrr_var[13],
        WHvX64RegisterMsrMtrrPhysBase7 => msr.mtrr_var[14], WHvX64RegisterMsrMtrrPhysMask7 => msr.mtrr_var[15],
        WHvX64RegisterMsrMtrrFix64k00000 => msr.mtrr_fixed[0], WHvX64RegisterMsrMtrrFix16k80000 => msr.mtrr_fixed[1],
        WHvX64RegisterMsrMtrrFix16kA0000 => msr.mtrr_fixed[2], WHvX64RegisterMsrMtrrFix4kC0000 => msr.mtrr_fixed[3],
        WHvX64RegisterMsrMtrrFix4kC8000 => msr.mtrr_fixed[4], WHvX64RegisterMsrMtrrFix4kD0000 => msr.mtrr_fixed[5],
        WHvX64RegisterMsrMtrrFix4kD8000 => msr.mtrr_fixed[6], WHvX64RegisterMsrMtrrFix4kE0000 => msr.mtrr_fixed[7],
        WHvX64RegisterMsrMtrrFix4kE8000 => msr.mtrr_fixed[8], WHvX64RegisterMsrMtrrFix4kF0000 => msr.mtrr_fixed[9],
        WHvX64RegisterMsrMtrrFix4kF8000 => msr.mtrr_fixed[10],
    }
    FPU word { WHvX64RegisterXCr0 => xcr0 }
    DEBUG word {
        WHvX64RegisterDr0 => dr[0], WHvX64RegisterDr1 => dr[1], WHvX64RegisterDr2 => dr[2], WHvX64RegisterDr3 => dr[3],
        WHvX64RegisterDr6 => dr6, WHvX64RegisterDr7 => dr7,
    }
    EVENTS delivery { WHvRegisterPendingInterruption => events }
    EVENTS shadow { WHvRegisterInterruptState => events }
};

/// A register of 64 bits.
mod word {
    use super::RegisterValue;

    pub(super) fn get(place: &u64) -> RegisterValue {
        RegisterValue::from_u64(*place)
    }

    pub(super) fn set(place: &mut u64, value: RegisterValue) {
        *place = value.low;
    }
}

/// A segment register. What is unusable is not present here: the platform has no other mark.
mod segment {
    use super::{PlatformSegment, RegisterValue, Segment};

    const PRESENT: u16 = 1 << 7;
    /// The limit's part of a descriptor's upper half.
    const LIMIT: u16 = 0xf00;

    pub(super) fn get(place: &Segment) -> RegisterValue {
        let &Segment { base, limit, selector, access, unusable } = place;
        let attributes = if unusable { access & !PRESENT } else { access };
        RegisterValue::from_segment(PlatformSegment { base, limit, selector, attributes })
    }

    pub(super) fn set(place: &mut Segment, value: RegisterValue) {
        let PlatformSegment { base, limit, selector, attributes } = value.as_segment();
        let unusable = attributes & PRESENT == 0;
        *place = Segment { base, limit, selector, access: attributes & !LIMIT, unusable };
    }
}

/// GDTR, IDTR.
mod table {
    use super::{RegisterValue, Table};

    pub(super) fn get(place: &Table) -> RegisterValue {
        RegisterValue::from_table(place.base, place.limit)
    }

    pub(super) fn set(place: &mut Table, value: RegisterValue) {
        let (base, limit) = value.as_table();
        *place = Table { base, limit };
    }
}

/// The event that is delivered with the next entry.
mod delivery {
    use super::*;

    pub(super) fn get(place: &Events) -> RegisterValue {
        let event = |kind: i32, vector: u8| {
            PendingInterruption(0).with_pending(1).with_kind(kind as u64).with_vector(vector.into())
        };
        let pending = match (place.exception, place.interrupt) {
            (Some(exception), _) => {
                let code = exception.error_code();
                event(WHvX64PendingException, exception.vector())
                    .with_deliver_error_code(code.is_some().into())
                    .with_error_code(code.unwrap_or(0).into())
            }
            (None, Some(vector)) => event(WHvX64PendingInterrupt, vector),
            (None, None) if place.nmi => event(WHvX64PendingNmi, 2),
            (None, None) => PendingInterruption(0),
        };
        RegisterValue::from_u64(pending.0)
    }

    /// A page fault's address is not in here.
    pub(super) fn set(place: &mut Events, value: RegisterValue) {
        let event = PendingInterruption(value.low);
        let vector = event.vector() as u8;
        let is = |kind: i32| event.pending() != 0 && event.kind() == kind as u64;
        place.exception = exception(vector, event.error_code() as u32, 0).filter(|_| is(WHvX64PendingException));
        place.interrupt = is(WHvX64PendingInterrupt).then_some(vector);
        place.nmi = is(WHvX64PendingNmi);
    }
}

/// What holds events back. The platform does not tell STI from MOV SS.
mod shadow {
    use super::{Events, InterruptState, RegisterValue};

    pub(super) fn get(place: &Events) -> RegisterValue {
        let shadow = place.sti_shadow || place.mov_ss_shadow;
        let state = InterruptState(0).with_interrupt_shadow(shadow.into()).with_nmi_masked(place.nmi_blocked.into());
        RegisterValue::from_u64(state.0)
    }

    pub(super) fn set(place: &mut Events, value: RegisterValue) {
        let state = InterruptState(value.low);
        (place.sti_shadow, place.mov_ss_shadow) = (state.interrupt_shadow() != 0, false);
        place.nmi_blocked = state.nmi_masked() != 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_accel_softcpu::Exception;

    /// A state in which every register of the table differs from its reset value.
    fn marked() -> CpuState {
        let mut state = CpuState::reset();
        for (n, row) in ROWS.iter().enumerate() {
            (row.set)(&mut state, RegisterValue { low: 0x1000 + n as u64, high: 0x93_0000_0000_0000 | n as u64 });
        }
        state.events = Events { interrupt: Some(0x31), sti_shadow: true, nmi_blocked: true, ..Events::default() };
        state
    }

    #[test]
    fn every_register_round_trips_and_has_its_own_place() {
        let marked = marked();
        let mut copy = CpuState::reset();
        for row in ROWS {
            let value = (row.get)(&marked);
            (row.set)(&mut copy, value);
            assert_eq!((row.get)(&copy), value, "{row:?}");
        }
        // A place that two names shared would hold the second's value.
        for row in ROWS {
            assert_eq!((row.get)(&copy), (row.get)(&marked), "{row:?}");
        }
        let mut names: Vec<_> = ROWS.iter().map(|row| row.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), ROWS.len());
    }

    #[test]
    fn an_unusable_segment_is_not_present() {
        let unusable = Segment { unusable: true, access: 0x93, ..Segment::default() };
        let value = segment::get(&unusable);
        assert_eq!(value.as_segment().attributes, 0x13);
        let mut back = Segment::default();
        segment::set(&mut back, value);
        assert!(back.unusable);
    }

    #[test]
    fn events_in_delivery_round_trip() {
        let fault = Events { exception: Some(Exception::Gp(0x18)), ..Events::default() };
        let interrupt = Events { interrupt: Some(0xfe), ..Events::default() };
        let nmi = Events { nmi: true, ..Events::default() };
        for events in [fault, interrupt, nmi, Events::default()] {
            let mut back = Events { interrupt: Some(1), nmi: true, ..Events::default() };
            delivery::set(&mut back, delivery::get(&events));
            assert_eq!(back, events);
        }
    }
}
