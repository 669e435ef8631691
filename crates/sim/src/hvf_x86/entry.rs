//! What the processor checks before it enters a guest (Intel SDM vol. 3, 27.2 and 27.3), as far as a VMM can get it wrong, and the
//! capabilities.

use super::state::{LDTR, TR, Vmcs};
use vm_accel_softcpu::Exception;
use vm_accel_softcpu::state::{Segment, cr0, cr4, efer, rflags, seg};
use vm_accel_sys::hvf::x86_64::{
    cpu_based, cpu_based2, entry_controls, exit_controls, interruptibility, irq_info, pin_based, vmcs, vmx_capability,
};

/// CR4.VMXE: always on in VMX operation.
pub(super) const VMXE: u64 = 1 << 13;

/// Low half: must be 1. High half: may be 1.
const fn allowed(must: u32, may: u32) -> u64 {
    must as u64 | ((must | may) as u64) << 32
}

/// The controls, their capability and its number.
pub(super) const CONTROLS: [(u32, u32, u64); 5] = [
    (
        vmcs::PIN_BASED,
        vmx_capability::PINBASED,
        allowed(0x16 | pin_based::EXTERNAL_INTERRUPT | pin_based::NMI, pin_based::VIRTUAL_NMI),
    ),
    (
        vmcs::CPU_BASED,
        vmx_capability::PROCBASED,
        // Reserved bits that must be 1 (appendix A.3.2), and what Apple insists on.
        allowed(
            0x0400_6172 | cpu_based::UNCONDITIONAL_IO | cpu_based::MSR_BITMAPS | cpu_based::SECONDARY,
            0x7fff_fffe & !cpu_based::IO_BITMAPS,
        ),
    ),
    (
        vmcs::CPU_BASED2,
        vmx_capability::PROCBASED2,
        allowed(
            cpu_based2::EPT | cpu_based2::VPID | cpu_based2::UNRESTRICTED,
            cpu_based2::RDTSCP | cpu_based2::WBINVD | cpu_based2::INVPCID,
        ),
    ),
    (
        vmcs::VMENTRY_CONTROLS,
        vmx_capability::ENTRY,
        allowed(0x11fb, entry_controls::GUEST_IA32E | entry_controls::LOAD_PAT | entry_controls::LOAD_EFER | 4),
    ),
    (
        vmcs::VMEXIT_CONTROLS,
        vmx_capability::EXIT,
        allowed(
            0x36dfb | exit_controls::HOST_IA32E,
            exit_controls::SAVE_PAT | exit_controls::LOAD_PAT | exit_controls::SAVE_EFER | exit_controls::LOAD_EFER,
        ),
    ),
];

/// What `hv_vmx_read_capability` answers.
pub(super) fn capability(id: u32) -> Option<u64> {
    if let Some((_, _, value)) = CONTROLS.iter().find(|(_, capability, _)| *capability == id) {
        return Some(*value);
    }
    Some(match id {
        vmx_capability::CR0_FIXED0 => cr0::NE | cr0::PE | cr0::PG,
        vmx_capability::CR0_FIXED1 => 0xffff_ffff,
        vmx_capability::CR4_FIXED0 => VMXE,
        vmx_capability::CR4_FIXED1 => 0x37_27ff | VMXE,
        vmx_capability::PREEMPTION_TIMER => 5,
        _ => return None,
    })
}

/// A control whose bits do not suit its capability.
pub(super) fn bad_control(fields: &Vmcs) -> Option<u32> {
    let bad = CONTROLS.iter().find(|(field, _, allowed)| {
        let (value, must, may) = (fields.get32(*field), *allowed as u32, (allowed >> 32) as u32);
        value & must != must || value & !may != 0
    });
    bad.map(|(field, ..)| *field)
}

fn canonical(address: u64) -> bool {
    (address as i64) << 16 >> 16 == address as i64
}

/// Granularity and limit must fit (27.3.1.2).
fn limit_fits(segment: &Segment) -> bool {
    let granular = segment.access & 1 << 15 != 0;
    if granular { segment.limit & 0xfff == 0xfff } else { segment.limit >> 20 == 0 }
}

/// What is wrong with the guest's state.
pub(super) fn bad_state(fields: &Vmcs) -> Option<&'static str> {
    let (cr0, cr4) = (fields.get(vmcs::GUEST_CR0), fields.get(vmcs::GUEST_CR4));
    let (flags, blocked) = (fields.get(vmcs::GUEST_RFLAGS), fields.get(vmcs::GUEST_INTERRUPTIBILITY));
    let efer = fields.get(vmcs::GUEST_EFER);
    let long = fields.has(vmcs::VMENTRY_CONTROLS, entry_controls::GUEST_IA32E);
    let paging = cr0 & cr0::PG != 0;
    let segs: [Segment; 8] = std::array::from_fn(|n| fields.segment(n as u32));
    let usable_data = |n: usize| (!segs[n].unusable).then_some(&segs[n]);
    let (ldtr, tr) = (&segs[LDTR as usize], &segs[TR as usize]);
    let cs = &segs[seg::CS];
    let long_code = long && cs.long();
    let shadow = blocked & (interruptibility::STI | interruptibility::MOV_SS);
    let rules = [
        (cr0 & cr0::NE == 0, "CR0.NE is clear"),
        (cr0 >> 32 != 0, "CR0 has reserved bits"),
        (paging && cr0 & cr0::PE == 0, "CR0.PG without CR0.PE"),
        (cr0 & cr0::NW != 0 && cr0 & cr0::CD == 0, "CR0.NW without CR0.CD"),
        (cr4 & VMXE == 0, "CR4.VMXE is clear"),
        (cr4 >> 32 != 0, "CR4 has reserved bits"),
        (long && !(paging && cr4 & cr4::PAE != 0), "IA-32e mode without paging and PAE"),
        (efer & efer::LMA != 0 && !long || efer & efer::LMA == 0 && long, "EFER.LMA is not the entry control's"),
        (paging && (efer & efer::LME != 0) != long, "EFER.LME is not the entry control's"),
        (fields.get(vmcs::GUEST_CR3) >> 52 != 0, "CR3 has reserved bits"),
        (fields.get(vmcs::GUEST_DR7) >> 32 != 0, "DR7 has reserved bits"),
        (flags & rflags::FIXED == 0, "RFLAGS bit 1 is clear"),
        (flags & !(rflags::ALL | rflags::FIXED) != 0, "RFLAGS has reserved bits"),
        (flags & rflags::VM != 0, "virtual-8086 mode is not simulated"),
        (!long_code && fields.get(vmcs::GUEST_RIP) >> 32 != 0, "RIP has more than 32 bits outside of 64-bit code"),
        (!canonical(fields.get(vmcs::GUEST_RIP)), "RIP is not canonical"),
        (cs.unusable || cs.access & 0x90 != 0x90, "CS is not a present code segment"),
        (!matches!(cs.kind(), 3 | 9 | 11 | 13 | 15), "CS has no type of accessed code"),
        (cs.long() && cs.big() && long, "CS has both L and D"),
        (usable_data(seg::SS).is_some_and(|ss| !matches!(ss.kind(), 3 | 7)), "SS is not accessed writable data"),
        (
            [seg::ES, seg::DS, seg::FS, seg::GS].iter().any(|n| usable_data(*n).is_some_and(|s| s.kind() & 1 == 0)),
            "a data segment is not accessed",
        ),
        (
            [seg::ES, seg::SS, seg::DS, seg::FS, seg::GS]
                .iter()
                .any(|n| usable_data(*n).is_some_and(|s| s.access & 0x90 != 0x90)),
            "a data segment is not present",
        ),
        ((0..6).any(|n| usable_data(n).is_some_and(|s| !limit_fits(s))), "a limit does not fit its granularity"),
        (segs.iter().any(|s| s.access & 0x0f00 != 0), "access rights have reserved bits"),
        (!canonical(segs[seg::FS].base) || !canonical(segs[seg::GS].base), "FS or GS base is not canonical"),
        (cs.base >> 32 != 0, "CS base has more than 32 bits"),
        (
            tr.unusable
                || tr.access & 0x90 != 0x80
                || !(tr.kind() == 11 || tr.kind() == 3 && !long)
                || !limit_fits(tr)
                || tr.selector & 4 != 0,
            "TR is not a busy task state segment",
        ),
        (
            !ldtr.unusable && (ldtr.access & 0x9f != 0x82 || !limit_fits(ldtr) || ldtr.selector & 4 != 0),
            "LDTR is neither unusable nor a local descriptor table",
        ),
        (
            fields.get(vmcs::GUEST_GDTR_LIMIT) >> 16 != 0 || fields.get(vmcs::GUEST_IDTR_LIMIT) >> 16 != 0,
            "a descriptor table's limit has more than 16 bits",
        ),
        (
            !canonical(fields.get(vmcs::GUEST_GDTR_BASE)) || !canonical(fields.get(vmcs::GUEST_IDTR_BASE)),
            "a descriptor table's base is not canonical",
        ),
        (fields.get(vmcs::GUEST_LINK_POINTER) != u64::MAX, "there is a VMCS link pointer"),
        (fields.get(vmcs::GUEST_ACTIVITY_STATE) != 0, "the activity state is not active"),
        (shadow == 3, "both STI and MOV SS block interrupts"),
        (blocked & interruptibility::STI != 0 && flags & rflags::IF == 0, "STI blocks interrupts while IF is clear"),
        (
            shadow != 0 && (flags & rflags::TF != 0) != (fields.get(vmcs::GUEST_PENDING_DEBUG) & 1 << 14 != 0),
            "the pending debug exception does not fit TF in a shadow",
        ),
        (
            blocked & interruptibility::NMI != 0
                && !fields.has(vmcs::PIN_BASED, pin_based::VIRTUAL_NMI)
                && !fields.has(vmcs::PIN_BASED, pin_based::NMI),
            "NMIs are blocked that do not exit",
        ),
        (
            fields.has(vmcs::CPU_BASED, cpu_based::NMI_WINDOW) && !fields.has(vmcs::PIN_BASED, pin_based::VIRTUAL_NMI),
            "an NMI window without virtual NMIs",
        ),
    ];
    rules.iter().find(|(broken, _)| *broken).map(|(_, why)| *why).or_else(|| bad_injection(fields, flags, blocked))
}

/// What is wrong with the event to inject (27.2.1.3 and 27.3.1.5).
fn bad_injection(fields: &Vmcs, flags: u64, blocked: u64) -> Option<&'static str> {
    let info = fields.get32(vmcs::VMENTRY_IRQ_INFO);
    if info & irq_info::VALID == 0 {
        return None;
    }
    let (kind, vector) = (info & irq_info::TYPE, info & irq_info::VECTOR);
    let shadow = blocked & (interruptibility::STI | interruptibility::MOV_SS) != 0;
    let has_code = matches!(vector, 8 | 10..=14 | 17) && kind == irq_info::HARD_EXCEPTION;
    let protected = fields.get(vmcs::GUEST_CR0) & cr0::PE != 0;
    let rules = [
        (info & 0x7fff_f000 != 0, "the event has reserved bits"),
        ((info & irq_info::ERROR_VALID != 0) != (has_code && protected), "the event's error code is not its vector's"),
        (
            kind == irq_info::EXTERNAL && (flags & rflags::IF == 0 || shadow),
            "an external interrupt while interrupts are blocked",
        ),
        (kind == irq_info::NMI && (vector != 2 || shadow), "an NMI while interrupts are blocked"),
        (kind == irq_info::NMI && blocked & interruptibility::NMI != 0, "an NMI while NMIs are blocked"),
        (kind == irq_info::HARD_EXCEPTION && vector > 31, "an exception with such a vector"),
        (
            !matches!(kind, irq_info::EXTERNAL | irq_info::NMI | irq_info::HARD_EXCEPTION),
            "soft events are not simulated",
        ),
    ];
    rules.iter().find(|(broken, _)| *broken).map(|(_, why)| *why)
}

/// The exception that the entry injects.
pub(super) fn exception(vector: u32, code: u32, cr2: u64) -> Option<Exception> {
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
        1 => Some(Exception::Db(0)),
        10 => Some(Exception::Ts(code as u16)),
        11 => Some(Exception::Np(code as u16)),
        12 => Some(Exception::Ss(code as u16)),
        13 => Some(Exception::Gp(code as u16)),
        14 => Some(Exception::Pf { addr: cr2, code }),
        _ => plain.into_iter().find(|exception| u32::from(exception.vector()) == vector),
    }
}
