//! The VMCS and the registers beside it, and how guest state moves between them and a CPU.

use vm_accel_softcpu::CpuState;
use vm_accel_softcpu::state::{Segment, seg};
use vm_accel_sys::hvf::x86_64::{SEGMENT_UNUSABLE, entry_controls, interruptibility, reg, vmcs};

/// Registers in the order of instructions (RAX, RCX, RDX, RBX, RSP, ...) by the platform's names.
pub(super) const GPRS: [u32; 16] = [
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

/// The fields that can be written, apart from those of segments.
const WRITABLE: &[u32] = &[
    vmcs::TSC_OFFSET,
    vmcs::GUEST_LINK_POINTER,
    vmcs::GUEST_DEBUGCTL,
    vmcs::GUEST_PAT,
    vmcs::GUEST_EFER,
    vmcs::GUEST_PDPTE0,
    vmcs::GUEST_PDPTE1,
    vmcs::GUEST_PDPTE2,
    vmcs::GUEST_PDPTE3,
    vmcs::PIN_BASED,
    vmcs::CPU_BASED,
    vmcs::EXCEPTION_BITMAP,
    vmcs::VMEXIT_CONTROLS,
    vmcs::VMENTRY_CONTROLS,
    vmcs::VMENTRY_IRQ_INFO,
    vmcs::VMENTRY_EXC_ERROR,
    vmcs::VMENTRY_INSTR_LEN,
    vmcs::TPR_THRESHOLD,
    vmcs::CPU_BASED2,
    vmcs::GUEST_GDTR_LIMIT,
    vmcs::GUEST_IDTR_LIMIT,
    vmcs::GUEST_INTERRUPTIBILITY,
    vmcs::GUEST_ACTIVITY_STATE,
    vmcs::GUEST_SYSENTER_CS,
    vmcs::CR0_MASK,
    vmcs::CR4_MASK,
    vmcs::CR0_SHADOW,
    vmcs::CR4_SHADOW,
    vmcs::GUEST_CR0,
    vmcs::GUEST_CR3,
    vmcs::GUEST_CR4,
    vmcs::GUEST_GDTR_BASE,
    vmcs::GUEST_IDTR_BASE,
    vmcs::GUEST_DR7,
    vmcs::GUEST_RSP,
    vmcs::GUEST_RIP,
    vmcs::GUEST_RFLAGS,
    vmcs::GUEST_PENDING_DEBUG,
    vmcs::GUEST_SYSENTER_ESP,
    vmcs::GUEST_SYSENTER_EIP,
];

/// The fields that tell of an exit.
const READ_ONLY: &[u32] = &[
    vmcs::GUEST_PHYSICAL_ADDRESS,
    vmcs::INSTR_ERROR,
    vmcs::EXIT_REASON,
    vmcs::VMEXIT_IRQ_INFO,
    vmcs::VMEXIT_IRQ_ERROR,
    vmcs::IDT_VECTOR_INFO,
    vmcs::IDT_VECTOR_ERROR,
    vmcs::VMEXIT_INSTR_LEN,
    vmcs::INSTR_INFO,
    vmcs::EXIT_QUALIFICATION,
    vmcs::GUEST_LINEAR_ADDRESS,
];

/// Selector, limit, access rights, base: ES, CS, SS, DS, FS, GS, LDTR, TR have consecutive even encodings.
const SEGMENT_FIELDS: [u32; 4] = [vmcs::GUEST_ES, vmcs::GUEST_ES_LIMIT, vmcs::GUEST_ES_AR, vmcs::GUEST_ES_BASE];
const SEGMENTS: u32 = 8;
/// LDTR among the segments.
pub(super) const LDTR: u32 = 6;
/// TR among the segments.
pub(super) const TR: u32 = 7;

/// All fields, and the registers that are no fields.
pub(super) struct Vmcs {
    fields: Box<[u64]>,
    pub(super) regs: [u64; reg::MAX as usize],
}

/// Where a register is a VMCS field, too.
pub(super) fn alias(register: u32) -> Option<u32> {
    Some(match register {
        reg::RIP => vmcs::GUEST_RIP,
        reg::RFLAGS => vmcs::GUEST_RFLAGS,
        reg::RSP => vmcs::GUEST_RSP,
        reg::CS => vmcs::GUEST_CS,
        reg::SS => vmcs::GUEST_SS,
        reg::DS => vmcs::GUEST_DS,
        reg::ES => vmcs::GUEST_ES,
        reg::FS => vmcs::GUEST_FS,
        reg::GS => vmcs::GUEST_GS,
        reg::IDT_BASE => vmcs::GUEST_IDTR_BASE,
        reg::IDT_LIMIT => vmcs::GUEST_IDTR_LIMIT,
        reg::GDT_BASE => vmcs::GUEST_GDTR_BASE,
        reg::GDT_LIMIT => vmcs::GUEST_GDTR_LIMIT,
        reg::LDTR => vmcs::GUEST_LDTR,
        reg::LDT_BASE => vmcs::GUEST_LDTR_BASE,
        reg::LDT_LIMIT => vmcs::GUEST_LDTR_LIMIT,
        reg::LDT_AR => vmcs::GUEST_LDTR_AR,
        reg::TR => vmcs::GUEST_TR,
        reg::TSS_BASE => vmcs::GUEST_TR_BASE,
        reg::TSS_LIMIT => vmcs::GUEST_TR_LIMIT,
        reg::TSS_AR => vmcs::GUEST_TR_AR,
        reg::CR0 => vmcs::GUEST_CR0,
        reg::CR3 => vmcs::GUEST_CR3,
        reg::CR4 => vmcs::GUEST_CR4,
        reg::DR7 => vmcs::GUEST_DR7,
        _ => return None,
    })
}

/// Whether the field exists, and whether it can be written.
pub(super) fn field_kind(field: u32) -> Option<bool> {
    let is_segment =
        SEGMENT_FIELDS.iter().any(|first| (*first..first + 2 * SEGMENTS).step_by(2).any(|one| one == field));
    if is_segment || WRITABLE.contains(&field) { Some(true) } else { READ_ONLY.contains(&field).then_some(false) }
}

impl Vmcs {
    pub(super) fn new() -> Self {
        let mut new = Self { fields: vec![0; vmcs::MAX as usize / 2].into_boxed_slice(), regs: [0; reg::MAX as usize] };
        new.set(vmcs::GUEST_LINK_POINTER, u64::MAX);
        new
    }

    /// A field, or 0 for one that does not exist.
    pub(super) fn get(&self, field: u32) -> u64 {
        self.fields.get(field as usize / 2).copied().unwrap_or(0)
    }

    /// Sets a field, cut to its width (Intel SDM vol. 3, 25.11.2).
    pub(super) fn set(&mut self, field: u32, value: u64) {
        let value = match field >> 13 & 3 {
            0 => value & 0xffff,
            2 => value & 0xffff_ffff,
            _ => value,
        };
        if let Some(slot) = self.fields.get_mut(field as usize / 2) {
            *slot = value;
        }
    }

    pub(super) fn get32(&self, field: u32) -> u32 {
        self.get(field) as u32
    }

    pub(super) fn has(&self, field: u32, bits: u32) -> bool {
        self.get32(field) & bits != 0
    }

    pub(super) fn segment(&self, n: u32) -> Segment {
        let [selector, limit, access, base] = SEGMENT_FIELDS.map(|first| self.get(first + 2 * n));
        Segment {
            selector: selector as u16,
            base,
            limit: limit as u32,
            access: access as u16,
            unusable: access & SEGMENT_UNUSABLE != 0,
        }
    }

    fn set_segment(&mut self, n: u32, segment: &Segment) {
        let access = u64::from(segment.access) | if segment.unusable { SEGMENT_UNUSABLE } else { 0 };
        let values = [segment.selector.into(), segment.limit.into(), access, segment.base];
        for (first, value) in SEGMENT_FIELDS.iter().zip(values) {
            self.set(first + 2 * n, value);
        }
    }

    /// Control register 0 or 4 as the guest sees it: the shadow where the mask says so.
    fn visible(&self, [real, mask, shadow]: [u32; 3]) -> u64 {
        let mask = self.get(mask);
        self.get(real) & !mask | self.get(shadow) & mask
    }

    /// Gives the guest's state to a CPU, which keeps what a VMCS has not. Events are the entry's own matter.
    pub(super) fn enter(&self, st: &mut CpuState) {
        for (gpr, name) in st.gpr.iter_mut().zip(GPRS) {
            *gpr = alias(name).map_or(self.regs[name as usize], |field| self.get(field));
        }
        (st.rip, st.rflags) = (self.get(vmcs::GUEST_RIP), self.get(vmcs::GUEST_RFLAGS));
        for n in 0..6 {
            st.segs[n as usize] = self.segment(n);
        }
        (st.ldtr, st.tr) = (self.segment(LDTR), self.segment(TR));
        (st.gdtr.base, st.gdtr.limit) = (self.get(vmcs::GUEST_GDTR_BASE), self.get(vmcs::GUEST_GDTR_LIMIT) as u16);
        (st.idtr.base, st.idtr.limit) = (self.get(vmcs::GUEST_IDTR_BASE), self.get(vmcs::GUEST_IDTR_LIMIT) as u16);
        st.cr0 = self.visible([vmcs::GUEST_CR0, vmcs::CR0_MASK, vmcs::CR0_SHADOW]);
        st.cr2 = self.regs[reg::CR2 as usize];
        st.cr3 = self.get(vmcs::GUEST_CR3);
        st.cr4 = self.visible([vmcs::GUEST_CR4, vmcs::CR4_MASK, vmcs::CR4_SHADOW]);
        st.dr.copy_from_slice(&self.regs[reg::DR0 as usize..=reg::DR3 as usize]);
        (st.dr6, st.dr7) = (self.regs[reg::DR6 as usize], self.get(vmcs::GUEST_DR7));
        st.xcr0 = self.regs[reg::XCR0 as usize];
        st.msr.efer = self.get(vmcs::GUEST_EFER);
        st.msr.pat = self.get(vmcs::GUEST_PAT);
        st.msr.debugctl = self.get(vmcs::GUEST_DEBUGCTL);
        st.msr.sysenter_cs = self.get(vmcs::GUEST_SYSENTER_CS);
        st.msr.sysenter_esp = self.get(vmcs::GUEST_SYSENTER_ESP);
        st.msr.sysenter_eip = self.get(vmcs::GUEST_SYSENTER_EIP);
        for (n, pdpte) in st.pdpte.iter_mut().enumerate() {
            *pdpte = self.get(vmcs::GUEST_PDPTE0 + 2 * n as u32);
        }
        st.cpl = st.segs[seg::SS].dpl();
        let blocked = self.get(vmcs::GUEST_INTERRUPTIBILITY);
        st.events.sti_shadow = blocked & interruptibility::STI != 0;
        st.events.mov_ss_shadow = blocked & interruptibility::MOV_SS != 0;
        st.events.nmi_blocked = blocked & interruptibility::NMI != 0;
        st.events.halted = false;
        st.events.shutdown = false;
        st.events.debug_trap = self.get(vmcs::GUEST_PENDING_DEBUG) & 0xf;
    }

    /// Takes the guest's state back.
    pub(super) fn leave(&mut self, st: &CpuState) {
        for (gpr, name) in st.gpr.iter().zip(GPRS) {
            self.regs[name as usize] = *gpr;
        }
        self.set(vmcs::GUEST_RSP, st.gpr[4]);
        self.set(vmcs::GUEST_RIP, st.rip);
        self.set(vmcs::GUEST_RFLAGS, st.rflags);
        for n in 0..6 {
            self.set_segment(n, &st.segs[n as usize]);
        }
        self.set_segment(LDTR, &st.ldtr);
        self.set_segment(TR, &st.tr);
        self.set(vmcs::GUEST_GDTR_BASE, st.gdtr.base);
        self.set(vmcs::GUEST_GDTR_LIMIT, st.gdtr.limit.into());
        self.set(vmcs::GUEST_IDTR_BASE, st.idtr.base);
        self.set(vmcs::GUEST_IDTR_LIMIT, st.idtr.limit.into());
        let keep = |real: u64, mask: u64, visible: u64| real & mask | visible & !mask;
        self.set(vmcs::GUEST_CR0, keep(self.get(vmcs::GUEST_CR0), self.get(vmcs::CR0_MASK), st.cr0));
        self.set(vmcs::GUEST_CR4, keep(self.get(vmcs::GUEST_CR4), self.get(vmcs::CR4_MASK), st.cr4));
        self.set(vmcs::GUEST_CR3, st.cr3);
        self.regs[reg::CR2 as usize] = st.cr2;
        self.regs[reg::DR0 as usize..=reg::DR3 as usize].copy_from_slice(&st.dr);
        self.regs[reg::DR6 as usize] = st.dr6;
        self.regs[reg::XCR0 as usize] = st.xcr0;
        self.set(vmcs::GUEST_DR7, st.dr7);
        self.set(vmcs::GUEST_EFER, st.msr.efer);
        self.set(vmcs::GUEST_PAT, st.msr.pat);
        self.set(vmcs::GUEST_DEBUGCTL, st.msr.debugctl);
        self.set(vmcs::GUEST_SYSENTER_CS, st.msr.sysenter_cs);
        self.set(vmcs::GUEST_SYSENTER_ESP, st.msr.sysenter_esp);
        self.set(vmcs::GUEST_SYSENTER_EIP, st.msr.sysenter_eip);
        for (n, pdpte) in st.pdpte.iter().enumerate() {
            self.set(vmcs::GUEST_PDPTE0 + 2 * n as u32, *pdpte);
        }
        // Intel SDM vol. 3, 28.3.1: with unrestricted guests an exit stores EFER.LMA there.
        let controls = self.get32(vmcs::VMENTRY_CONTROLS) & !entry_controls::GUEST_IA32E;
        let long = if st.msr.efer & vm_accel_softcpu::state::efer::LMA != 0 { entry_controls::GUEST_IA32E } else { 0 };
        self.set(vmcs::VMENTRY_CONTROLS, (controls | long).into());
        let events = &st.events;
        let blocked = [
            (events.sti_shadow, interruptibility::STI),
            (events.mov_ss_shadow, interruptibility::MOV_SS),
            (events.nmi_blocked, interruptibility::NMI),
        ];
        let blocked = blocked.iter().filter(|(on, _)| *on).fold(0, |all, (_, bit)| all | bit);
        self.set(vmcs::GUEST_INTERRUPTIBILITY, blocked);
        let step = if blocked & 3 != 0 && st.rflags & vm_accel_softcpu::state::rflags::TF != 0 { 1 << 14 } else { 0 };
        self.set(vmcs::GUEST_PENDING_DEBUG, events.debug_trap | step);
    }
}
