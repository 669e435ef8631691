//! What KVM has only on x86-64: the groups of state, synchronised registers, guest debugging, the set-up of a virtual
//! machine.
//!
//! With KVM_CAP_SYNC_REGS the kernel leaves the general-purpose registers in the run area at every exit and takes them
//! from there at the next entry if they are marked dirty: reading and setting them costs no system call. Three rules keep
//! that equal to the ioctls:
//! * the kernel applies dirty registers as KVM_SET_REGS would, at entry. That drops a pending exception, so whatever sets
//!   events, or reads them, first writes dirty registers back with the ioctl;
//! * an entry that ends before the registers are applied (a CPU that waits for its SIPI) overwrites them, so registers
//!   are only left in the run area after an exit that ran the guest;
//! * with single step on, dirty registers would switch it off for one instruction (wtf, `kvm_backend.cc`), so then they
//!   are written with the ioctl.

use super::vcpu::KvmVcpu;
use super::{AccelKvm, ArchVm, KvmVm, errno, refused};
use crate::ffi::kvm as ffi;
use kvm_bindings as kb;
use kvm_ioctls::{Cap, Kvm, VmFd};
use std::cell::Cell;
use vm_accel_backend::x86_debug;
use vm_accel_core::accel::{Accel, AccelKind, Capabilities, GuestArch, IrqChip, MemoryFlags};
use vm_accel_core::error::{AccelError, VcpuResult};
use vm_accel_core::memory::GuestRegion;
use vm_accel_core::regs::aarch64::Aarch64Vcpu;
use vm_accel_core::regs::x86_64::{
    CpuidEntry, DescriptorTable, FXSAVE_SIZE, LapicState, MpState, Reg, Segment, X86DebugRegs, X86Events, X86FpuRegs,
    X86Msr, X86Sregs, X86Vcpu, Xcr,
};
use vm_accel_core::regs::{FpuRegs, GuestRegs};
use vm_accel_core::vcpu_common::{DebugEvent, GuestDebug, VcpuExit, VcpuOps};

pub(super) const GUEST_ARCH: GuestArch = GuestArch::X86_64;

/// Pages that KVM needs on some Intel CPUs for real mode; boards keep 0xfeff_c000–0xfeff_ffff free.
const IDENTITY_MAP: u64 = 0xfeff_c000;
const TSS: u64 = 0xfeff_d000;
/// Pins of the I/O APIC in the VMM with a split interrupt controller.
const SPLIT_PINS: u64 = 24;
/// The TSC's MSR (Intel SDM vol. 4).
const MSR_TSC: u32 = 0x10;
/// KVM's vector of "page ready" interrupts (Linux `Documentation/virt/kvm/x86/msr.rst`).
const MSR_KVM_ASYNC_PF_INT: u32 = 0x4b56_4d06;

vm_accel_core::impl_reg_accessors!(
    fn guest_regs, fn kvm_regs: kb::kvm_regs,
    reg_map!(
        Reg::Rax => rax, Reg::Rcx => rcx, Reg::Rdx => rdx, Reg::Rbx => rbx,
        Reg::Rsp => rsp, Reg::Rbp => rbp, Reg::Rsi => rsi, Reg::Rdi => rdi,
        Reg::R8 => r8, Reg::R9 => r9, Reg::R10 => r10, Reg::R11 => r11,
        Reg::R12 => r12, Reg::R13 => r13, Reg::R14 => r14, Reg::R15 => r15,
        GuestRegs::PC => rip, GuestRegs::FLAGS => rflags,
    )
);

/// Between a structure of this library and KVM's of the same meaning.
trait Translate<T> {
    fn translate(&self) -> T;
}

/// Copies a group of state field by field, both ways.
///
/// `struct_map!(Ours, Theirs { ours = theirs, …; flags: ours = theirs, … })`: fields in the first part have the same
/// meaning and convertible integer types; those after `flags:` are `bool` in ours and 0 or 1 in theirs.
macro_rules! struct_map {
    ($ours:ty, $theirs:ty {
        $($ours_field:ident = $theirs_field:ident),* $(,)?
        $(; flags: $($ours_flag:ident = $theirs_flag:ident),* $(,)?)?
    }) => {
        impl Translate<$ours> for $theirs {
            #[allow(clippy::needless_update)]
            fn translate(&self) -> $ours {
                type Ours = $ours;
                Ours {
                    $($ours_field: self.$theirs_field as _,)*
                    $($($ours_flag: self.$theirs_flag != 0,)*)?
                    ..Default::default()
                }
            }
        }

        impl Translate<$theirs> for $ours {
            #[allow(clippy::needless_update)]
            fn translate(&self) -> $theirs {
                type Theirs = $theirs;
                Theirs {
                    $($theirs_field: self.$ours_field as _,)*
                    $($($theirs_flag: self.$ours_flag.into(),)*)?
                    ..Default::default()
                }
            }
        }
    };
}

struct_map!(Segment, kb::kvm_segment {
    base = base, limit = limit, selector = selector, segment_type = type_, dpl = dpl;
    flags: present = present, db = db, code_or_data = s, long = l, granularity = g, available = avl, unusable = unusable
});
struct_map!(DescriptorTable, kb::kvm_dtable { base = base, limit = limit });
struct_map!(X86DebugRegs, kb::kvm_debugregs { db = db, dr6 = dr6, dr7 = dr7 });
struct_map!(X86Msr, kb::kvm_msr_entry { index = index, value = data });
struct_map!(Xcr, kb::kvm_xcr { index = xcr, value = value });

/// Copies the special registers, which nest other structures, in one direction.
macro_rules! copy_sregs {
    ($from:expr => $to:expr) => {{
        let (from, to) = ($from, $to);
        copy_sregs!(from, to; convert cs ds es fs gs ss tr ldt gdt idt; copy cr0 cr2 cr3 cr4 cr8 efer apic_base);
    }};
    ($from:ident, $to:ident; convert $($nested:ident)*; copy $($plain:ident)*) => {
        $($to.$nested = $from.$nested.translate();)*
        $($to.$plain = $from.$plain;)*
    };
}

/// MP states, ours and KVM's.
const MP_STATES: [(MpState, u32); 5] = [
    (MpState::Runnable, kb::KVM_MP_STATE_RUNNABLE),
    (MpState::Uninitialized, kb::KVM_MP_STATE_UNINITIALIZED),
    (MpState::InitReceived, kb::KVM_MP_STATE_INIT_RECEIVED),
    (MpState::SipiReceived, kb::KVM_MP_STATE_SIPI_RECEIVED),
    (MpState::Halted, kb::KVM_MP_STATE_HALTED),
];

/// What a new virtual machine needs before its first vCPU.
pub(super) fn prepare_vm(fd: &VmFd) -> VcpuResult<()> {
    fd.set_identity_map_address(IDENTITY_MAP).map_err(refused("KVM_SET_IDENTITY_MAP_ADDR"))?;
    fd.set_tss_address(TSS as usize).map_err(refused("KVM_SET_TSS_ADDR"))?;
    // The calls that the kernel can hand over; it answers the others itself. A kernel that offers none is older.
    let calls = fd.check_extension_raw(kb::KVM_CAP_EXIT_HYPERCALL.into());
    if calls > 0 {
        fd.enable_cap(&kb::kvm_enable_cap {
            cap: kb::KVM_CAP_EXIT_HYPERCALL,
            args: [calls as u64, 0, 0, 0],
            ..Default::default()
        })
        .map_err(refused("KVM_CAP_EXIT_HYPERCALL"))?;
    }
    Ok(())
}

pub(super) fn capabilities(kvm: &Kvm, fd: &VmFd, caps: &mut Capabilities) -> VcpuResult<()> {
    let cpuid = kvm.get_supported_cpuid(kb::KVM_MAX_CPUID_ENTRIES).map_err(refused("KVM_GET_SUPPORTED_CPUID"))?;
    let bits = cpuid.as_slice().iter().find(|entry| entry.function == 0x8000_0008).map_or(36, |entry| entry.eax as u8);
    let xsave = usize::try_from(fd.check_extension_int(Cap::Xsave2)).unwrap_or(0);
    caps.guest_phys_bits = bits;
    caps.split_irqchip = fd.check_extension_int(Cap::SplitIrqchip) > 0;
    caps.msr_exits = fd.check_extension_int(Cap::X86UserSpaceMsr) > 0;
    caps.sync_regs = fd.check_extension_int(Cap::SyncRegs) & kb::KVM_SYNC_X86_REGS as i32 != 0;
    caps.xsave_size = xsave.max(size_of::<kb::kvm_xsave>());
    Ok(())
}

/// What only this architecture keeps per virtual machine.
#[derive(Debug, Default)]
pub(super) struct VmArch {}

/// The machine type for KVM_CREATE_VM.
pub(super) fn vm_type(_kvm: &Kvm) -> u64 {
    0
}

/// Sets an interrupt line.
pub(super) fn set_line(vm: &KvmVm, gsi: u32, level: bool) -> VcpuResult<()> {
    vm.fd.set_irq_line(gsi, level).map_err(refused("KVM_IRQ_LINE"))
}

impl ArchVm for VmArch {}

pub(super) fn create_irqchip(vm: &KvmVm, chip: IrqChip) -> VcpuResult<()> {
    let fd = &vm.fd;
    if chip == IrqChip::Split {
        return fd
            .enable_cap(&kb::kvm_enable_cap {
                cap: kb::KVM_CAP_SPLIT_IRQCHIP,
                args: [SPLIT_PINS, 0, 0, 0],
                ..Default::default()
            })
            .map_err(refused("KVM_CAP_SPLIT_IRQCHIP"));
    }
    fd.create_irq_chip().map_err(refused("KVM_CREATE_IRQCHIP"))?;
    fd.create_pit2(kb::kvm_pit_config {
        // The speaker port answers, so that guests can calibrate with channel 2.
        flags: kb::KVM_PIT_SPEAKER_DUMMY,
        ..Default::default()
    })
    .map_err(refused("KVM_CREATE_PIT2"))
}

/// Runs POPCNT in ring 0 of a small guest: hardware executes it, a host that emulates ring 0 has no handler for it and
/// gives up. Protected mode, because some Intel CPUs leave real mode to the emulator everywhere.
pub(super) fn emulates_ring0(vm: &mut AccelKvm) -> VcpuResult<Option<bool>> {
    const CODE: u64 = 0x1000;
    let memory = GuestRegion::anonymous(0x1000)?;
    memory.write(0, &[0xf3, 0x0f, 0xb8, 0xc3, 0xf4])?; // popcnt eax, ebx; hlt
    vm.map_memory(CODE, &memory, MemoryFlags::RAM)?;
    let mut vcpu = vm.create_vcpu(0)?;
    let Some(x86) = vcpu.as_x86() else {
        return Ok(None);
    };
    let mut sregs = x86.get_sregs()?;
    sregs.cr0 |= crate::x86_64::CR0_PE;
    sregs.cs = Segment::flat_code32(8, 0);
    for segment in [&mut sregs.ds, &mut sregs.es, &mut sregs.ss] {
        *segment = Segment::flat_data(16, 0);
    }
    x86.set_sregs(&sregs)?;
    let regs = GuestRegs { pc: CODE, flags: crate::x86_64::RFLAGS_RESERVED, ..Default::default() };
    vcpu.set_regs(&regs)?;
    for _ in 0..100 {
        match vcpu.run() {
            // A signal of somebody else: again.
            Ok(VcpuExit::Interrupt) => {}
            Err(AccelError::Emulation { .. }) => return Ok(Some(true)),
            Ok(VcpuExit::Halted | VcpuExit::TripleFault) => return Ok(Some(false)),
            _ => break,
        }
    }
    Ok(None)
}

/// What a debug exit was, from the debug registers that it carries. KVM does not report DR0–DR3.
pub(super) fn debug_event(debug: &kb::kvm_debug_exit_arch) -> DebugEvent {
    x86_debug::debug_event(debug.exception as u8, debug.pc, debug.dr6, debug.dr7, None)
}

/// State of this library about a vCPU's registers.
#[derive(Debug)]
pub(super) struct VcpuArch {
    sync: bool,
    xsave_size: usize,
    /// The run area holds the current general-purpose registers.
    synced: Cell<bool>,
    /// They were changed there.
    dirty: Cell<bool>,
    /// What single stepping was switched on with, while it is on.
    single_step: Option<kb::kvm_guest_debug>,
}

impl VcpuArch {
    pub(super) fn new(vm: &KvmVm) -> Self {
        Self {
            sync: vm.caps.sync_regs,
            xsave_size: vm.caps.xsave_size,
            synced: Cell::new(false),
            dirty: Cell::new(false),
            single_step: None,
        }
    }
}

impl KvmVcpu {
    pub(super) fn arch_init(&mut self) -> VcpuResult<()> {
        if self.arch.sync {
            self.run_area_mut().kvm_valid_regs = u64::from(kb::KVM_SYNC_X86_REGS);
        }
        Ok(())
    }

    /// The kernel finishes every access itself.
    #[inline(always)]
    pub(super) fn arch_resume(&mut self) -> VcpuResult<Option<VcpuExit>> {
        Ok(None)
    }

    /// An exit that only this architecture could have.
    #[cold]
    pub(super) fn arch_exit(&mut self, _reason: u32) -> VcpuResult<VcpuExit> {
        Ok(VcpuExit::Unknown)
    }

    /// The kernel writes the hypercall's result to RAX when it goes on: let that be what stands there.
    #[cold]
    pub(super) fn arch_finish_call(&mut self) -> VcpuResult<()> {
        let rax = self.arch_get_regs()?.gpr[Reg::Rax as usize];
        self.run_area_mut().__bindgen_anon_1.hypercall.ret = rax;
        Ok(())
    }

    pub(super) fn arch_debug_event(&self, debug: &kb::kvm_debug_exit_arch) -> VcpuResult<DebugEvent> {
        Ok(debug_event(debug))
    }

    /// The guest ran, or `KVM_RUN` failed: says whether the run area holds its registers now.
    #[inline(always)]
    pub(super) fn arch_after_run(&mut self, exited: bool) {
        self.arch.synced.set(self.arch.sync && exited);
        if self.arch.dirty.replace(false) {
            self.clear_dirty_regs();
        }
    }

    /// The registers in the run area.
    #[inline(always)]
    fn synced_regs(&self) -> &kb::kvm_regs {
        // SAFETY: the union's only variant on x86-64 that is not padding.
        unsafe { &self.run_area().s.regs.regs }
    }

    #[inline]
    pub(super) fn arch_get_regs(&self) -> VcpuResult<GuestRegs> {
        if self.arch.synced.get() {
            return Ok(guest_regs(self.synced_regs()));
        }
        Ok(guest_regs(&self.fd.get_regs().map_err(refused("KVM_GET_REGS"))?))
    }

    #[inline]
    pub(super) fn arch_set_regs(&mut self, regs: &GuestRegs) -> VcpuResult<()> {
        let regs = kvm_regs(regs);
        if self.arch.synced.get() && self.arch.single_step.is_none() {
            let run = self.run_area_mut();
            run.s.regs.regs = regs;
            run.kvm_dirty_regs = u64::from(kb::KVM_SYNC_X86_REGS);
            self.arch.dirty.set(true);
            return Ok(());
        }
        self.arch.synced.set(false);
        self.fd.set_regs(&regs).map_err(refused("KVM_SET_REGS"))?;
        if let Some(debug) = &self.arch.single_step {
            // The kernel has cleared the trap flag: it keeps it only if RIP is where stepping was switched on.
            self.fd.set_guest_debug(debug).map_err(refused("KVM_SET_GUEST_DEBUG"))?;
        }
        Ok(())
    }

    /// Gives registers that were left in the run area to the kernel, before something that must come after them.
    fn flush_regs(&self) -> VcpuResult<()> {
        if self.arch.dirty.replace(false) {
            self.clear_dirty_regs();
            self.fd.set_regs(self.synced_regs()).map_err(refused("KVM_SET_REGS"))?;
        }
        Ok(())
    }

    pub(super) fn arch_get_fpu(&self) -> VcpuResult<FpuRegs> {
        Ok(FpuRegs::X86(X86FpuRegs::from_xsave(&self.get_xsave()?)?))
    }

    /// KVM_SET_FPU leaves XSTATE_BV alone, so that the guest would start with the initial state; KVM_SET_XSAVE does not.
    pub(super) fn arch_set_fpu(&mut self, regs: &FpuRegs) -> VcpuResult<()> {
        let regs = regs.as_x86()?;
        let mut area = self.get_xsave()?;
        const MXCSR_MASK: usize = 28;
        let mask = area[MXCSR_MASK..FXSAVE_SIZE].first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes));
        regs.check(mask)?;
        regs.write_xsave(&mut area)?;
        self.set_xsave(&area)
    }

    pub(super) fn arch_set_guest_debug(&mut self, debug: &GuestDebug) -> VcpuResult<()> {
        let (addresses, dr7) = x86_debug::debug_registers(&debug.hardware)?;
        let mut theirs = kb::kvm_guest_debug::default();
        theirs.arch.debugreg[..4].copy_from_slice(&addresses);
        theirs.arch.debugreg[7] = dr7;
        for (wanted, flag) in [
            (debug.single_step, kb::KVM_GUESTDBG_SINGLESTEP),
            (debug.software_breakpoints, kb::KVM_GUESTDBG_USE_SW_BP),
            (!debug.hardware.is_empty(), kb::KVM_GUESTDBG_USE_HW_BP),
        ] {
            if wanted {
                theirs.control |= kb::KVM_GUESTDBG_ENABLE | flag;
            }
        }
        self.flush_regs()?;
        self.fd.set_guest_debug(&theirs).map_err(refused("KVM_SET_GUEST_DEBUG"))?;
        self.arch.single_step = debug.single_step.then_some(theirs);
        Ok(())
    }

    pub(super) fn arch_as_x86(&mut self) -> Option<&mut dyn X86Vcpu> {
        Some(self)
    }

    pub(super) fn arch_as_aarch64(&mut self) -> Option<&mut dyn Aarch64Vcpu> {
        None
    }
}

/// Turns a list of MSRs into the kernel's, in parts that it takes at once, and calls `each` per part with the list and how
/// many entries came before it.
fn in_parts(
    op: &'static str,
    msrs: &[X86Msr],
    mut each: impl FnMut(&mut kb::Msrs) -> VcpuResult<usize>,
) -> VcpuResult<()> {
    let mut done = 0;
    for part in msrs.chunks(kb::KVM_MAX_MSR_ENTRIES) {
        let entries: Vec<kb::kvm_msr_entry> = part.iter().map(Translate::translate).collect();
        let mut list = kb::Msrs::from_entries(&entries)
            .map_err(|_| AccelError::invalid("MSR list", format!("{} entries at once", entries.len())))?;
        let processed = each(&mut list)?;
        done += processed;
        if let Some(failed) = part.get(processed) {
            return Err(AccelError::Msr { kind: AccelKind::Kvm, op, index: failed.index, done });
        }
    }
    Ok(())
}

fn cpuid_entry(theirs: &kb::kvm_cpuid_entry2) -> CpuidEntry {
    CpuidEntry {
        leaf: theirs.function,
        subleaf: (theirs.flags & kb::KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0).then_some(theirs.index),
        eax: theirs.eax,
        ebx: theirs.ebx,
        ecx: theirs.ecx,
        edx: theirs.edx,
    }
}

impl X86Vcpu for KvmVcpu {
    fn get_sregs(&self) -> VcpuResult<X86Sregs> {
        let theirs = self.fd.get_sregs().map_err(refused("KVM_GET_SREGS"))?;
        let mut ours = X86Sregs::default();
        copy_sregs!(&theirs => &mut ours);
        Ok(ours)
    }

    fn set_sregs(&mut self, sregs: &X86Sregs) -> VcpuResult<()> {
        // What we do not name, the interrupt bitmap, stays.
        let mut theirs = self.fd.get_sregs().map_err(refused("KVM_GET_SREGS"))?;
        copy_sregs!(sregs => &mut theirs);
        self.fd.set_sregs(&theirs).map_err(refused("KVM_SET_SREGS"))?;
        // Without a local APIC in the kernel the run area's CR8 counts at the next entry.
        self.run_area_mut().cr8 = sregs.cr8;
        Ok(())
    }

    fn msr_indices(&self) -> VcpuResult<Vec<u32>> {
        let list = self.vm.kvm.get_msr_index_list().map_err(refused("KVM_GET_MSR_INDEX_LIST"))?;
        let mut indices = list.as_slice().to_vec();
        if !self.vm.has_local_apics() {
            // The kernel lists it for every virtual machine, and refuses to set it where it could not interrupt.
            indices.retain(|index| *index != MSR_KVM_ASYNC_PF_INT);
        }
        Ok(indices)
    }

    fn get_msrs(&self, indices: &[u32]) -> VcpuResult<Vec<X86Msr>> {
        let wanted: Vec<X86Msr> = indices.iter().map(|&index| X86Msr { index, value: 0 }).collect();
        let mut found = Vec::with_capacity(indices.len());
        in_parts("get_msrs", &wanted, |list| {
            let done = self.fd.get_msrs(list).map_err(refused("KVM_GET_MSRS"))?;
            found.extend(list.as_slice().iter().map(Translate::translate));
            Ok(done)
        })?;
        Ok(found)
    }

    fn set_msrs(&mut self, msrs: &[X86Msr]) -> VcpuResult<()> {
        in_parts("set_msrs", msrs, |list| self.fd.set_msrs(list).map_err(refused("KVM_SET_MSRS")))
    }

    fn supported_cpuid(&self) -> VcpuResult<Vec<CpuidEntry>> {
        let list =
            self.vm.kvm.get_supported_cpuid(kb::KVM_MAX_CPUID_ENTRIES).map_err(refused("KVM_GET_SUPPORTED_CPUID"))?;
        Ok(list.as_slice().iter().map(cpuid_entry).collect())
    }

    fn get_cpuid(&self) -> VcpuResult<Vec<CpuidEntry>> {
        let list = self.fd.get_cpuid2(kb::KVM_MAX_CPUID_ENTRIES).map_err(refused("KVM_GET_CPUID2"))?;
        Ok(list.as_slice().iter().map(cpuid_entry).collect())
    }

    fn set_cpuid(&mut self, entries: &[CpuidEntry]) -> VcpuResult<()> {
        let theirs: Vec<_> = entries
            .iter()
            .map(|ours| kb::kvm_cpuid_entry2 {
                function: ours.leaf,
                index: ours.subleaf.unwrap_or(0),
                flags: ours.subleaf.map_or(0, |_| kb::KVM_CPUID_FLAG_SIGNIFCANT_INDEX),
                eax: ours.eax,
                ebx: ours.ebx,
                ecx: ours.ecx,
                edx: ours.edx,
                ..Default::default()
            })
            .collect();
        let list = kb::CpuId::from_entries(&theirs)
            .map_err(|_| AccelError::invalid("CPUID", format!("{} entries are too many", theirs.len())))?;
        self.fd.set_cpuid2(&list).map_err(refused("KVM_SET_CPUID2"))
    }

    fn get_xsave(&self) -> VcpuResult<Vec<u8>> {
        let size = self.arch.xsave_size;
        let mut area = vec![0_u8; size];
        // KVM_GET_XSAVE2 is there exactly if the capability told a size beyond the classic one, or that size.
        let (op, request) = match size > size_of::<kb::kvm_xsave>() {
            true => ("KVM_GET_XSAVE2", ffi::KVM_GET_XSAVE2),
            false => ("KVM_GET_XSAVE", ffi::KVM_GET_XSAVE),
        };
        // SAFETY: the kernel writes 4096 bytes, or with XSAVE2 as many as its capability told, which is the area's size.
        unsafe { self.ioctl(op, request, area.as_mut_ptr() as u64)? };
        Ok(area)
    }

    fn set_xsave(&mut self, area: &[u8]) -> VcpuResult<()> {
        let size = self.arch.xsave_size;
        if area.len() != size {
            return Err(AccelError::invalid(
                "XSAVE area",
                format!("{} bytes were given, {size} are needed", area.len()),
            ));
        }
        // SAFETY: the kernel reads at most as many bytes as its capability told, which is the area's size.
        unsafe { self.ioctl("KVM_SET_XSAVE", ffi::KVM_SET_XSAVE, area.as_ptr() as u64) }.map(drop)
    }

    fn get_xcrs(&self) -> VcpuResult<Vec<Xcr>> {
        let theirs = self.fd.get_xcrs().map_err(refused("KVM_GET_XCRS"))?;
        let count = (theirs.nr_xcrs as usize).min(theirs.xcrs.len());
        Ok(theirs.xcrs[..count].iter().map(Translate::translate).collect())
    }

    fn set_xcrs(&mut self, xcrs: &[Xcr]) -> VcpuResult<()> {
        let mut theirs = kb::kvm_xcrs::default();
        let places = theirs
            .xcrs
            .get_mut(..xcrs.len())
            .ok_or_else(|| AccelError::invalid("extended control registers", format!("{} are too many", xcrs.len())))?;
        for (place, ours) in places.iter_mut().zip(xcrs) {
            *place = ours.translate();
        }
        theirs.nr_xcrs = xcrs.len() as u32;
        self.fd.set_xcrs(&theirs).map_err(refused("KVM_SET_XCRS"))
    }

    fn get_debug_regs(&self) -> VcpuResult<X86DebugRegs> {
        Ok(self.fd.get_debug_regs().map_err(refused("KVM_GET_DEBUGREGS"))?.translate())
    }

    fn set_debug_regs(&mut self, regs: &X86DebugRegs) -> VcpuResult<()> {
        self.fd.set_debug_regs(&regs.translate()).map_err(refused("KVM_SET_DEBUGREGS"))
    }

    fn get_events(&self) -> VcpuResult<X86Events> {
        self.flush_regs()?;
        let theirs = self.fd.get_vcpu_events().map_err(refused("KVM_GET_VCPU_EVENTS"))?;
        let exception = &theirs.exception;
        let payload_valid = theirs.flags & kb::KVM_VCPUEVENT_VALID_PAYLOAD != 0;
        let shadow = u32::from(theirs.interrupt.shadow);
        Ok(X86Events {
            exception_injected: (exception.injected != 0).then_some(exception.nr),
            exception_pending: (payload_valid && exception.pending != 0).then_some(exception.nr),
            exception_error_code: (exception.has_error_code != 0).then_some(exception.error_code),
            exception_payload: (payload_valid && theirs.exception_has_payload != 0).then_some(theirs.exception_payload),
            interrupt_injected: (theirs.interrupt.injected != 0).then_some(theirs.interrupt.nr),
            interrupt_soft: theirs.interrupt.soft != 0,
            sti_shadow: shadow & kb::KVM_X86_SHADOW_INT_STI != 0,
            mov_ss_shadow: shadow & kb::KVM_X86_SHADOW_INT_MOV_SS != 0,
            nmi_injected: theirs.nmi.injected != 0,
            nmi_pending: theirs.nmi.pending != 0,
            nmi_masked: theirs.nmi.masked != 0,
            sipi_vector: theirs.sipi_vector as u8,
            smm: theirs.smi.smm != 0,
            triple_fault_pending: theirs.triple_fault.pending != 0,
        })
    }

    fn set_events(&mut self, events: &X86Events) -> VcpuResult<()> {
        self.flush_regs()?;
        let mut theirs = kb::kvm_vcpu_events::default();
        theirs.exception.injected = events.exception_injected.is_some().into();
        theirs.exception.nr = events.exception_injected.or(events.exception_pending).unwrap_or(0);
        theirs.exception.has_error_code = events.exception_error_code.is_some().into();
        theirs.exception.error_code = events.exception_error_code.unwrap_or(0);
        theirs.interrupt.injected = events.interrupt_injected.is_some().into();
        theirs.interrupt.nr = events.interrupt_injected.unwrap_or(0);
        theirs.interrupt.soft = events.interrupt_soft.into();
        for (set, bit) in
            [(events.sti_shadow, kb::KVM_X86_SHADOW_INT_STI), (events.mov_ss_shadow, kb::KVM_X86_SHADOW_INT_MOV_SS)]
        {
            if set {
                theirs.interrupt.shadow |= bit as u8;
            }
        }
        theirs.nmi.injected = events.nmi_injected.into();
        theirs.nmi.pending = events.nmi_pending.into();
        theirs.nmi.masked = events.nmi_masked.into();
        theirs.sipi_vector = events.sipi_vector.into();
        theirs.flags =
            kb::KVM_VCPUEVENT_VALID_NMI_PENDING | kb::KVM_VCPUEVENT_VALID_SIPI_VECTOR | kb::KVM_VCPUEVENT_VALID_SHADOW;
        // The kernel refuses the fields below unless their capability was enabled; say so only if one is used.
        if events.exception_pending.is_some() || events.exception_payload.is_some() {
            return Err(self.unsupported("setting a pending exception"));
        }
        if events.smm || events.triple_fault_pending {
            return Err(self.unsupported("setting system-management mode or a pending triple fault"));
        }
        self.fd.set_vcpu_events(&theirs).map_err(refused("KVM_SET_VCPU_EVENTS"))
    }

    fn get_lapic(&self) -> VcpuResult<LapicState> {
        if !self.vm.has_local_apics() {
            return Err(self.unsupported("the local APIC of a machine without one"));
        }
        let theirs = self.fd.get_lapic().map_err(refused("KVM_GET_LAPIC"))?;
        Ok(LapicState { regs: theirs.regs.map(|byte| byte as u8) })
    }

    fn set_lapic(&mut self, lapic: &LapicState) -> VcpuResult<()> {
        if !self.vm.has_local_apics() {
            return Err(self.unsupported("the local APIC of a machine without one"));
        }
        let theirs = kb::kvm_lapic_state { regs: lapic.regs.map(|byte| byte as _) };
        self.fd.set_lapic(&theirs).map_err(refused("KVM_SET_LAPIC"))
    }

    fn get_mp_state(&self) -> VcpuResult<MpState> {
        let theirs = self.fd.get_mp_state().map_err(refused("KVM_GET_MP_STATE"))?.mp_state;
        MP_STATES
            .iter()
            .find(|(_, number)| *number == theirs)
            .map(|(state, _)| *state)
            .ok_or_else(|| AccelError::invalid("MP state", format!("the kernel reports an unknown one, {theirs}")))
    }

    fn set_mp_state(&mut self, state: MpState) -> VcpuResult<()> {
        let number = MP_STATES.iter().find(|(ours, _)| *ours == state).map_or(0, |(_, number)| *number);
        self.fd.set_mp_state(kb::kvm_mp_state { mp_state: number }).map_err(refused("KVM_SET_MP_STATE"))
    }

    fn get_tsc_khz(&self) -> VcpuResult<u32> {
        self.fd.get_tsc_khz().map_err(refused("KVM_GET_TSC_KHZ"))
    }

    fn set_tsc_khz(&mut self, khz: u32) -> VcpuResult<()> {
        // The kernel remembers a frequency that it refused, so that reading back proves nothing.
        self.fd.set_tsc_khz(khz).map_err(|error| match error.errno() {
            libc::EINVAL => self.unsupported("scaling the TSC on this CPU"),
            code => errno("KVM_SET_TSC_KHZ", code),
        })
    }

    fn get_tsc(&self) -> VcpuResult<u64> {
        Ok(self.get_msrs(&[MSR_TSC])?[0].value)
    }

    fn set_tsc(&mut self, value: u64) -> VcpuResult<()> {
        self.set_msrs(&[X86Msr { index: MSR_TSC, value }])
    }

    fn inject_interrupt(&mut self, vector: u8) -> VcpuResult<()> {
        if !self.ready_for_interrupt()? {
            return Err(AccelError::invalid("interrupt", "the guest cannot take one now; ask for an interrupt window"));
        }
        let interrupt = kb::kvm_interrupt { irq: vector.into() };
        // SAFETY: the request reads one kvm_interrupt.
        unsafe { self.ioctl("KVM_INTERRUPT", ffi::KVM_INTERRUPT, &raw const interrupt as u64)? };
        // One at a time: the field is the kernel's word at the last exit.
        self.run_area_mut().ready_for_interrupt_injection = 0;
        Ok(())
    }

    fn ready_for_interrupt(&self) -> VcpuResult<bool> {
        if self.vm.has_local_apics() {
            return Err(self.unsupported("injecting interrupts beside a local APIC in the kernel"));
        }
        Ok(self.run_area().ready_for_interrupt_injection != 0)
    }

    fn request_interrupt_window(&mut self, wanted: bool) -> VcpuResult<()> {
        if self.vm.has_local_apics() {
            return Err(self.unsupported("interrupt windows beside a local APIC in the kernel"));
        }
        self.run_area_mut().request_interrupt_window = wanted.into();
        Ok(())
    }

    fn inject_nmi(&mut self) -> VcpuResult<()> {
        self.fd.nmi().map_err(refused("KVM_NMI"))
    }

    fn translate(&self, linear: u64) -> VcpuResult<Option<u64>> {
        let found = self.fd.translate_gva(linear).map_err(refused("KVM_TRANSLATE"))?;
        Ok((found.valid != 0).then_some(found.physical_address))
    }

    fn exit_on_unknown_msrs(&mut self, wanted: bool) -> VcpuResult<()> {
        if !self.vm.caps.msr_exits {
            return Err(self.unsupported("MSR exits"));
        }
        let reasons = kb::KVM_MSR_EXIT_REASON_UNKNOWN | kb::KVM_MSR_EXIT_REASON_INVAL;
        let cap = kb::kvm_enable_cap {
            cap: kb::KVM_CAP_X86_USER_SPACE_MSR,
            args: [if wanted { reasons.into() } else { 0 }, 0, 0, 0],
            ..Default::default()
        };
        self.vm.fd.enable_cap(&cap).map_err(refused("KVM_CAP_X86_USER_SPACE_MSR"))
    }

    fn group_unsupported(&self, what: &'static str) -> AccelError {
        self.unsupported(what)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn general_registers_round_trip_through_the_table() {
        let map = crate::reg_map!(
            Reg::Rax => rax, Reg::Rcx => rcx, Reg::Rdx => rdx, Reg::Rbx => rbx,
            Reg::Rsp => rsp, Reg::Rbp => rbp, Reg::Rsi => rsi, Reg::Rdi => rdi,
            Reg::R8 => r8, Reg::R9 => r9, Reg::R10 => r10, Reg::R11 => r11,
            Reg::R12 => r12, Reg::R13 => r13, Reg::R14 => r14, Reg::R15 => r15,
            GuestRegs::PC => rip, GuestRegs::FLAGS => rflags,
        );
        let mut regs = GuestRegs::default();
        for (n, entry) in map.iter().enumerate() {
            assert_eq!(regs.get(entry.index), 0, "{} shares its index with another register", entry.name);
            regs.set(entry.index, 0x0101_0101_0101_0101 * (n as u64 + 1));
        }
        assert_eq!(guest_regs(&kvm_regs(&regs)), regs);
    }

    #[test]
    fn special_registers_round_trip() {
        let ours = X86Sregs {
            cs: Segment::code64(8, 3),
            ds: Segment::flat_data(16, 3),
            tr: Segment::busy_tss(24, 0x1000, 0x67),
            ldt: Segment { unusable: true, ..Default::default() },
            gdt: DescriptorTable { base: 1, limit: 2 },
            idt: DescriptorTable { base: 3, limit: 4 },
            cr0: 5,
            cr2: 6,
            cr3: 7,
            cr4: 8,
            cr8: 9,
            efer: 10,
            apic_base: 11,
            ..Default::default()
        };
        let (mut theirs, mut back) = (kb::kvm_sregs::default(), X86Sregs::default());
        copy_sregs!(&ours => &mut theirs);
        copy_sregs!(&theirs => &mut back);
        assert_eq!(back, ours);
    }
}
