//! How registers move between the framework and the emulator's state.
//!
//! Reads take whole groups; writes only what differs from what the framework holds. What VMX demands of a guest's state and the
//! emulator does not is supplied on the way (Intel SDM vol. 3, 27.3.1): bits of CR0 and CR4 that must be set, which the guest
//! does not see, accessed and busy bits of segments, granularity.

use super::vcpu::Link;
use vm_accel_backend::x86::{Groups, exception};
use vm_accel_core::error::VcpuResult;

use vm_accel_softcpu::CpuState;
use vm_accel_softcpu::state::{Events, Segment, Table, cr0, cr4, efer, rflags, seg};
use vm_accel_sys::hvf::x86_64::{SEGMENT_UNUSABLE, entry_controls, interruptibility, irq_info, reg, vmcs};

/// CR4.VMXE: always on while a guest runs.
const VMXE: u64 = 1 << 13;
/// Bits of CR0 that are not the guest's: it sees the shadow. A change of PG exits, because it changes EFER, too.
pub(super) const CR0_MASK: u64 = cr0::PG | cr0::CD | cr0::NW | cr0::NE | cr0::ET;
/// Bits of CR0 that do nothing to a guest but must have a value.
const CR0_FORCED: u64 = cr0::NE | cr0::ET;
const CR0_HIDDEN: u64 = cr0::CD | cr0::NW;
/// As [`CR0_MASK`], for CR4.
pub(super) const CR4_MASK: u64 = VMXE;
/// Single step, among the pending debug exceptions.
const PENDING_STEP: u64 = 1 << 14;
/// x87 and SSE, in the header of an XSAVE area.
const LEGACY: u8 = 3;
/// Where that header is.
const XSTATE_BV: usize = 512;

/// In the order of instructions.
const GPRS: [u32; 16] = [
    reg::RAX,
    reg::RCX,
    reg::RDX,
    reg::RBX,
    reg::RSP,
    reg::RBP,
    reg::RSI,
    reg::RDI,
    reg::R8,
    reg::R9,
    reg::R10,
    reg::R11,
    reg::R12,
    reg::R13,
    reg::R14,
    reg::R15,
];

const DRS: [u32; 4] = [reg::DR0, reg::DR1, reg::DR2, reg::DR3];

/// ES, CS, SS, DS, FS, GS, LDTR, TR have consecutive even encodings: selector, limit, access rights, base.
const SEGMENT: [u32; 4] = [vmcs::GUEST_ES, vmcs::GUEST_ES_LIMIT, vmcs::GUEST_ES_AR, vmcs::GUEST_ES_BASE];
const LDTR: u32 = 6;
const TR: u32 = 7;

/// MSRs that the guest reaches without an exit: number and place in the emulator's state.
macro_rules! native_msrs {
    ($($index:literal => $field:ident),* $(,)?) => {
        /// The numbers of the MSRs that the guest reaches without an exit and that are state of the emulator.
        pub(super) const NATIVE_MSRS: &[u32] = &[$($index),*];

        fn load_msrs(link: &Link, into: &mut CpuState) -> VcpuResult<()> {
            $(into.msr.$field = link.msr($index)?;)*
            Ok(())
        }

        fn store_msrs(link: &Link, old: &CpuState, new: &CpuState) -> VcpuResult<()> {
            $(if old.msr.$field != new.msr.$field {
                link.set_msr($index, new.msr.$field)?;
            })*
            Ok(())
        }
    };
}
native_msrs! {
    0x174 => sysenter_cs,
    0x175 => sysenter_esp,
    0x176 => sysenter_eip,
    0xc000_0081 => star,
    0xc000_0082 => lstar,
    0xc000_0083 => cstar,
    0xc000_0084 => fmask,
    0xc000_0102 => kernel_gs_base,
    0xc000_0103 => tsc_aux,
}

/// A segment as VMX accepts it.
fn segment_values(n: u32, segment: &Segment) -> [u64; 4] {
    const CODE_OR_DATA: u64 = 1 << 4;
    const GRANULAR: u64 = 1 << 15;
    const BUSY_TSS: u64 = 0x8b;
    let (mut access, mut limit) = (u64::from(segment.access & 0xf0ff), u64::from(segment.limit));
    let unusable = segment.unusable && n != TR;
    if n == TR {
        // A processor always has a task register that is busy.
        access = if segment.unusable { BUSY_TSS } else { access | 2 };
    } else if !unusable && access & CODE_OR_DATA != 0 {
        access |= 1;
    }
    if limit >> 20 != 0 {
        (access, limit) = (access | GRANULAR, limit | 0xfff);
    } else if limit & 0xfff != 0xfff {
        access &= !GRANULAR;
    }
    let unusable = if unusable { SEGMENT_UNUSABLE } else { 0 };
    [segment.selector.into(), limit, access | unusable, segment.base]
}

/// The event that the framework is to deliver with the next entry, and its error code.
fn injection(events: &Events) -> (u32, u32) {
    if let Some(exception) = events.exception {
        let kind = if exception.is_trap() { irq_info::SOFT_EXCEPTION } else { irq_info::HARD_EXCEPTION };
        let valid = if exception.error_code().is_some() { irq_info::ERROR_VALID } else { 0 };
        let code = exception.error_code().unwrap_or(0);
        (irq_info::VALID | kind | valid | u32::from(exception.vector()), code)
    } else if let Some(vector) = events.interrupt {
        (irq_info::VALID | irq_info::EXTERNAL | u32::from(vector), 0)
    } else if events.nmi {
        (irq_info::VALID | irq_info::NMI | 2, 0)
    } else {
        (0, 0)
    }
}

fn blocked(events: &Events) -> u64 {
    let bit = |on: bool, bit: u64| if on { bit } else { 0 };
    bit(events.sti_shadow, interruptibility::STI)
        | bit(events.mov_ss_shadow, interruptibility::MOV_SS)
        | bit(events.nmi_blocked, interruptibility::NMI)
}

/// Guest PDPTEs are used with PAE paging outside of long mode.
fn has_pdptes(st: &CpuState) -> bool {
    st.cr0 & cr0::PG != 0 && st.cr4 & cr4::PAE != 0 && st.msr.efer & efer::LMA == 0
}

impl Link {
    /// Reads groups; see [`Engine::load`](vm_accel_backend::x86::Engine::load).
    pub(super) fn load(&self, groups: Groups, into: &mut CpuState) -> VcpuResult<()> {
        if groups.contains(Groups::GPR) {
            for (gpr, register) in into.gpr.iter_mut().zip(GPRS) {
                *gpr = self.register(register)?;
            }
            into.rip = self.register(reg::RIP)?;
            into.rflags = self.register(reg::RFLAGS)?;
        }
        if groups.contains(Groups::SYSTEM) {
            for n in 0..6 {
                into.segs[n as usize] = self.segment(n)?;
            }
            (into.ldtr, into.tr) = (self.segment(LDTR)?, self.segment(TR)?);
            into.gdtr = self.table(vmcs::GUEST_GDTR_BASE, vmcs::GUEST_GDTR_LIMIT)?;
            into.idtr = self.table(vmcs::GUEST_IDTR_BASE, vmcs::GUEST_IDTR_LIMIT)?;
            into.cr0 = self.field(vmcs::GUEST_CR0)? & !CR0_MASK | self.field(vmcs::CR0_SHADOW)? & CR0_MASK;
            into.cr2 = self.register(reg::CR2)?;
            into.cr3 = self.field(vmcs::GUEST_CR3)?;
            into.cr4 = self.field(vmcs::GUEST_CR4)? & !CR4_MASK | self.field(vmcs::CR4_SHADOW)? & CR4_MASK;
            into.msr.efer = self.field(vmcs::GUEST_EFER)?;
        }
        if groups.contains(Groups::MSR) {
            load_msrs(self, into)?;
        }
        if groups.contains(Groups::FPU) {
            let area = self.fpstate()?;
            let mut image = [0; 512];
            image.copy_from_slice(&area.0[..512]);
            // What the header leaves out is in its initial state, whatever the bytes are.
            let initial = CpuState { xmm: [0; 16], x87: Default::default(), ..CpuState::reset() }.fxsave();
            if area.0[XSTATE_BV] & 1 == 0 {
                image[..24].copy_from_slice(&initial[..24]);
                image[32..160].copy_from_slice(&initial[32..160]);
            }
            if area.0[XSTATE_BV] & 2 == 0 {
                image[160..416].copy_from_slice(&initial[160..416]);
            }
            // MXCSR came from a processor.
            let _ = into.fxrstor(&image);
            into.xcr0 = self.register(reg::XCR0)?;
        }
        if groups.contains(Groups::DEBUG) {
            (into.dr, into.dr7) = self.debug_registers()?;
            into.dr6 = self.register(reg::DR6)?;
        }
        if groups.contains(Groups::EVENTS) {
            let held = self.field(vmcs::GUEST_INTERRUPTIBILITY)?;
            let info = self.field(vmcs::VMENTRY_IRQ_INFO)? as u32;
            let kind = (info & irq_info::VALID != 0).then_some(info & irq_info::TYPE);
            let vector = info as u8;
            let events = &mut into.events;
            events.sti_shadow = held & interruptibility::STI != 0;
            events.mov_ss_shadow = held & interruptibility::MOV_SS != 0;
            events.nmi_blocked = held & interruptibility::NMI != 0;
            events.interrupt = (kind == Some(irq_info::EXTERNAL)).then_some(vector);
            events.nmi = kind == Some(irq_info::NMI);
            events.exception = None;
            if kind == Some(irq_info::HARD_EXCEPTION) {
                let code = self.field(vmcs::VMENTRY_EXC_ERROR)? as u32;
                // Of a page fault CR2 has been set, of a debug exception DR6 has not.
                let payload = if vector == 14 { self.register(reg::CR2)? } else { 0 };
                events.exception = exception(vector, code, payload);
            }
        }
        Ok(())
    }

    /// Writes what differs; see [`Engine::store`](vm_accel_backend::x86::Engine::store).
    pub(super) fn store(&self, groups: Groups, old: &CpuState, new: &CpuState) -> VcpuResult<()> {
        if groups.contains(Groups::GPR) {
            for (n, register) in GPRS.into_iter().enumerate() {
                self.set_register(register, old.gpr[n], new.gpr[n])?;
            }
            self.set_register(reg::RIP, old.rip, new.rip)?;
            self.set_register(reg::RFLAGS, old.rflags, new.rflags)?;
        }
        if groups.contains(Groups::SYSTEM) {
            self.store_system(old, new)?;
        }
        if groups.contains(Groups::MSR) {
            store_msrs(self, old, new)?;
        }
        if groups.contains(Groups::FPU) {
            self.set_register(reg::XCR0, old.xcr0, new.xcr0)?;
            if (&old.x87, &old.xmm, old.mxcsr) != (&new.x87, &new.xmm, new.mxcsr) {
                // The rest of the area is the processor's other registers, which stay.
                let mut area = self.fpstate()?;
                area.0[..512].copy_from_slice(&new.fxsave());
                area.0[XSTATE_BV] |= LEGACY;
                self.set_fpstate(&area)?;
            }
        }
        if groups.contains(Groups::DEBUG) {
            if (old.dr, old.dr7) != (new.dr, new.dr7) {
                self.set_debug_registers(new.dr, new.dr7)?;
            }
            self.set_register(reg::DR6, old.dr6, new.dr6)?;
        }
        if groups.contains(Groups::EVENTS) {
            self.set_field(vmcs::GUEST_INTERRUPTIBILITY, blocked(&old.events), blocked(&new.events))?;
            let (was, (info, code)) = (injection(&old.events), injection(&new.events));
            self.set_field(vmcs::VMENTRY_EXC_ERROR, was.1.into(), code.into())?;
            self.set_field(vmcs::VMENTRY_IRQ_INFO, was.0.into(), info.into())?;
            // An instruction was finished, or the VMM moved the guest: what was pending behind the old one is gone, and in a shadow
            // a single step is pending (Intel SDM vol. 3, 27.3.1.5).
            if groups.contains(Groups::GPR)
                && (old.rip, old.rflags, blocked(&old.events)) != (new.rip, new.rflags, blocked(&new.events))
            {
                let shadow = new.events.sti_shadow || new.events.mov_ss_shadow;
                let step = if shadow && new.rflags & rflags::TF != 0 { PENDING_STEP } else { 0 };
                self.write_field(vmcs::GUEST_PENDING_DEBUG, step | new.events.debug_trap & 0xf)?;
            }
        }
        Ok(())
    }

    fn store_system(&self, old: &CpuState, new: &CpuState) -> VcpuResult<()> {
        let segments = |st: &CpuState| {
            [st.segs[seg::ES], st.segs[1], st.segs[2], st.segs[3], st.segs[4], st.segs[5], st.ldtr, st.tr]
        };
        for (n, (old, new)) in segments(old).iter().zip(segments(new)).enumerate() {
            if *old != new {
                for (first, value) in SEGMENT.iter().zip(segment_values(n as u32, &new)) {
                    self.write_field(first + 2 * n as u32, value)?;
                }
            }
        }
        self.set_field(vmcs::GUEST_GDTR_BASE, old.gdtr.base, new.gdtr.base)?;
        self.set_field(vmcs::GUEST_GDTR_LIMIT, old.gdtr.limit.into(), new.gdtr.limit.into())?;
        self.set_field(vmcs::GUEST_IDTR_BASE, old.idtr.base, new.idtr.base)?;
        self.set_field(vmcs::GUEST_IDTR_LIMIT, old.idtr.limit.into(), new.idtr.limit.into())?;
        self.set_register(reg::CR2, old.cr2, new.cr2)?;
        let paging = |st: &CpuState| (st.cr0, st.cr3, st.cr4, st.msr.efer, st.pdpte);
        if paging(old) == paging(new) {
            return Ok(());
        }
        self.write_field(vmcs::GUEST_CR0, new.cr0 & !CR0_HIDDEN | CR0_FORCED)?;
        self.write_field(vmcs::CR0_SHADOW, new.cr0)?;
        self.write_field(vmcs::GUEST_CR4, new.cr4 | VMXE)?;
        self.write_field(vmcs::CR4_SHADOW, new.cr4)?;
        self.write_field(vmcs::GUEST_CR3, new.cr3)?;
        self.write_field(vmcs::GUEST_EFER, new.msr.efer)?;
        let controls = self.field(vmcs::VMENTRY_CONTROLS)?;
        let ia32e = u64::from(entry_controls::GUEST_IA32E);
        let wanted = if new.msr.efer & efer::LMA != 0 { controls | ia32e } else { controls & !ia32e };
        self.set_field(vmcs::VMENTRY_CONTROLS, controls, wanted)?;
        if has_pdptes(new) {
            for (n, pdpte) in new.pdpte.iter().enumerate() {
                self.write_field(vmcs::GUEST_PDPTE0 + 2 * n as u32, *pdpte)?;
            }
        }
        self.invalidate_tlb()
    }

    fn segment(&self, n: u32) -> VcpuResult<Segment> {
        let [selector, limit, access, base] = SEGMENT.map(|first| self.field(first + 2 * n));
        let access = access?;
        Ok(Segment {
            selector: selector? as u16,
            base: base?,
            limit: limit? as u32,
            access: access as u16 & 0xf0ff,
            unusable: access & SEGMENT_UNUSABLE != 0,
        })
    }

    fn table(&self, base: u32, limit: u32) -> VcpuResult<Table> {
        Ok(Table { base: self.field(base)?, limit: self.field(limit)? as u16 })
    }

    /// DR0 to DR3 and DR7 of the guest, which are put aside while the host uses them.
    fn debug_registers(&self) -> VcpuResult<([u64; 4], u64)> {
        match self.aside.get() {
            Some(guest) => Ok(guest),
            None => self.real_debug_registers(),
        }
    }

    fn set_debug_registers(&self, dr: [u64; 4], dr7: u64) -> VcpuResult<()> {
        if self.aside.get().is_some() {
            self.aside.set(Some((dr, dr7)));
            return Ok(());
        }
        self.set_real_debug_registers(dr, dr7)
    }

    pub(super) fn real_debug_registers(&self) -> VcpuResult<([u64; 4], u64)> {
        let mut dr = [0; 4];
        for (value, register) in dr.iter_mut().zip(DRS) {
            *value = self.register(register)?;
        }
        Ok((dr, self.field(vmcs::GUEST_DR7)?))
    }

    pub(super) fn set_real_debug_registers(&self, dr: [u64; 4], dr7: u64) -> VcpuResult<()> {
        for (value, register) in dr.into_iter().zip(DRS) {
            self.write_register(register, value)?;
        }
        self.write_field(vmcs::GUEST_DR7, dr7)
    }
}
