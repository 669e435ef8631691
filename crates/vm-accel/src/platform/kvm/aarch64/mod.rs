//! What KVM has only on aarch64: the set-up of a virtual machine and its vCPUs, exits, guest debugging. Registers are in
//! `regs.rs`, the GIC in `gic.rs`, accesses that the kernel leaves to us in `access.rs`.
//!
//! The kernel implements PSCI, the timers and the GIC. Differences from x86-64 that show:
//! * WFI always blocks in the kernel, with or without a GIC: there is no [`VcpuExit::Halted`].
//! * HVC and SMC are the kernel's to answer (PSCI, SMCCC). From Linux 6.4 on, calls to silicon-partner and OEM services
//!   exit as [`VcpuExit::SystemCall`]; before, the guest gets NOT_SUPPORTED for them.
//! * Every vCPU but number 0 begins powered off, until the guest calls PSCI CPU_ON or the VMM sets its MP state.
//!
//! Sources: Linux `Documentation/virt/kvm/api.rst`, `arm/hypercalls.rst`, `devices/vcpu.rst`; Arm ARM (DDI 0487).

mod access;
mod gic;
mod regs;

pub(super) use gic::create_irqchip;

use super::vcpu::KvmVcpu;
use super::{AccelKvm, ArchVm, KvmVm, lock, not_here, refused};
use crate::ffi::kvm as ffi;
use gic::KernelGic;
use kvm_bindings as kb;
use kvm_ioctls::{Cap, Kvm, VmFd};
use regs::PC;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock};
use vm_accel_core::accel::{AccelKind, Capabilities, GuestArch};
use vm_accel_core::error::{AccelError, VcpuResult};
use vm_accel_core::regs::aarch64::{Aarch64Features, Aarch64Vcpu, Gic, GicState, PMU_INTID, private_line};
use vm_accel_core::regs::x86_64::X86Vcpu;
use vm_accel_core::vcpu_common::{BreakOn, DebugEvent, GuestDebug, HardwareBreakpoint, VcpuExit, VcpuOps};

pub(super) const GUEST_ARCH: GuestArch = GuestArch::Aarch64;

/// Guest physical addresses get no wider than this: 52 bits would cost every guest another level of page tables.
const MOST_ADDRESS_BITS: i32 = 48;
/// What a virtual machine of type 0 has.
const DEFAULT_ADDRESS_BITS: u8 = 40;

/// Services that belong to no standard that the kernel implements (SMCCC, Arm DEN0028, "Function Identifiers"): the
/// silicon partner's and the OEM's, fast calls, 32 and 64-bit.
const FORWARDED_CALLS: [u32; 2] = [0x8200_0000, 0xc200_0000];
/// Of each: two owners with 2^24 functions.
const FORWARDED_FUNCTIONS: u32 = 2 << 24;

/// The features that a guest can be given: ours, the kernel's capabilities, the kernel's feature bits.
const FEATURES: [(Aarch64Features, &[u32], &[u32]); 3] = [
    (Aarch64Features::PMU, &[kb::KVM_CAP_ARM_PMU_V3], &[kb::KVM_ARM_VCPU_PMU_V3]),
    (Aarch64Features::SVE, &[kb::KVM_CAP_ARM_SVE], &[kb::KVM_ARM_VCPU_SVE]),
    (
        Aarch64Features::POINTER_AUTHENTICATION,
        &[kb::KVM_CAP_ARM_PTRAUTH_ADDRESS, kb::KVM_CAP_ARM_PTRAUTH_GENERIC],
        &[kb::KVM_ARM_VCPU_PTRAUTH_ADDRESS, kb::KVM_ARM_VCPU_PTRAUTH_GENERIC],
    ),
];

/// Width of guest physical addresses, if the kernel lets it be chosen.
fn address_bits(value: i32) -> Option<u8> {
    (value > 0).then(|| value.min(MOST_ADDRESS_BITS) as u8)
}

/// The machine type for KVM_CREATE_VM: the width of guest physical addresses.
pub(super) fn vm_type(kvm: &Kvm) -> u64 {
    address_bits(kvm.check_extension_int(Cap::ArmVmIPASize)).map_or(0, u64::from)
}

/// What a new virtual machine needs before its first vCPU.
pub(super) fn prepare_vm(fd: &VmFd) -> VcpuResult<()> {
    if fd.check_extension_raw(kb::KVM_CAP_ARM_NISV_TO_USER.into()) > 0 {
        fd.enable_cap(&kb::kvm_enable_cap { cap: kb::KVM_CAP_ARM_NISV_TO_USER, ..Default::default() })
            .map_err(refused("KVM_CAP_ARM_NISV_TO_USER"))?;
    }
    if forwards_calls(fd) {
        for base in FORWARDED_CALLS {
            let filter = kb::kvm_smccc_filter {
                base,
                nr_functions: FORWARDED_FUNCTIONS,
                action: kb::kvm_smccc_filter_action_KVM_SMCCC_FILTER_FWD_TO_USER as u8,
                ..Default::default()
            };
            fd.set_device_attr(&kb::kvm_device_attr { addr: &raw const filter as u64, ..call_filter() })
                .map_err(refused("KVM_ARM_VM_SMCCC_FILTER"))?;
        }
    }
    Ok(())
}

fn call_filter() -> kb::kvm_device_attr {
    kb::kvm_device_attr {
        group: kb::KVM_ARM_VM_SMCCC_CTRL,
        attr: kb::KVM_ARM_VM_SMCCC_FILTER.into(),
        ..Default::default()
    }
}

fn forwards_calls(fd: &VmFd) -> bool {
    fd.has_device_attr(&call_filter()).is_ok()
}

pub(super) fn capabilities(kvm: &Kvm, fd: &VmFd, caps: &mut Capabilities) -> VcpuResult<()> {
    caps.guest_phys_bits = address_bits(kvm.check_extension_int(Cap::ArmVmIPASize)).unwrap_or(DEFAULT_ADDRESS_BITS);
    caps.aarch64_calls = forwards_calls(fd);
    for (ours, needs, _) in FEATURES {
        let has = |cap: &u32| fd.check_extension_raw(u64::from(*cap)) > 0;
        caps.aarch64_features.set(ours, needs.iter().all(has));
    }
    Ok(())
}

/// KVM runs guests on aarch64 CPUs only where their EL1 really runs.
pub(super) fn emulates_ring0(_vm: &mut AccelKvm) -> VcpuResult<Option<bool>> {
    Ok(Some(false))
}

/// What only this architecture keeps per virtual machine.
#[derive(Debug, Default)]
pub(super) struct VmArch {
    features: Mutex<Aarch64Features>,
    /// Ids of the vCPUs.
    vcpus: Mutex<Vec<u32>>,
    gic: OnceLock<KernelGic>,
    /// Nothing is left to do before interrupts work.
    ready: AtomicBool,
}

impl ArchVm for VmArch {
    /// A GIC is complete when all vCPUs exist; the kernel must be told.
    fn before_interrupts(&self) -> VcpuResult<()> {
        if self.ready.load(Ordering::Acquire) {
            return Ok(());
        }
        // The lock keeps others from going on before the GIC is ready.
        let vcpus = lock(&self.vcpus);
        if let Some(gic) = self.gic.get() {
            if !self.ready.load(Ordering::Acquire) {
                gic.complete()?;
            }
        }
        // Release pairs with the loads above: whoever sees it may use the GIC.
        self.ready.store(true, Ordering::Release);
        drop(vcpus);
        Ok(())
    }

    fn set_features(&self, caps: &Capabilities, features: Aarch64Features) -> VcpuResult<()> {
        if !caps.aarch64_features.contains(features) {
            return Err(not_here("a part of the architecture that this host lacks"));
        }
        *lock(&self.features) = features;
        Ok(())
    }

    fn gic(&self) -> VcpuResult<Gic> {
        Ok(self.kernel_gic()?.layout)
    }

    fn get_gic_state(&self) -> VcpuResult<GicState> {
        self.before_interrupts()?;
        self.kernel_gic()?.save(&lock(&self.vcpus))
    }

    fn set_gic_state(&self, state: &GicState) -> VcpuResult<()> {
        self.before_interrupts()?;
        self.kernel_gic()?.restore(state)
    }
}

impl VmArch {
    fn kernel_gic(&self) -> VcpuResult<&KernelGic> {
        self.gic.get().ok_or_else(|| not_here("a GIC in a machine without one"))
    }
}

/// Sets an interrupt line. The kernel's number has the kind of interrupt and the vCPU in it (`api.rst`, KVM_IRQ_LINE).
pub(super) fn set_line(vm: &KvmVm, gsi: u32, level: bool) -> VcpuResult<()> {
    let number = match private_line(gsi) {
        None if gsi < Gic::INTERRUPTS - 32 => kb::KVM_ARM_IRQ_TYPE_SPI << kb::KVM_ARM_IRQ_TYPE_SHIFT | (gsi + 32),
        Some((vcpu, intid @ 16..32)) => {
            (vcpu >> 8) << kb::KVM_ARM_IRQ_VCPU2_SHIFT
                | kb::KVM_ARM_IRQ_TYPE_PPI << kb::KVM_ARM_IRQ_TYPE_SHIFT
                | (vcpu & 0xff) << kb::KVM_ARM_IRQ_VCPU_SHIFT
                | intid
        }
        _ => {
            let most = Gic::INTERRUPTS - 33;
            let detail = format!("{gsi:#x} is neither a shared one (0 to {most}) nor a ppi_line");
            return Err(AccelError::invalid("interrupt line", detail));
        }
    };
    vm.fd.set_irq_line(number, level).map_err(refused("KVM_IRQ_LINE"))
}

/// State of this library about a vCPU.
#[derive(Debug)]
pub(super) struct VcpuArch {
    features: Aarch64Features,
    /// It was prepared for its first run.
    started: bool,
    /// A load or store that we finish.
    access: Option<access::Access>,
    breakpoints: usize,
    watchpoints: usize,
}

impl VcpuArch {
    pub(super) fn new(vm: &KvmVm) -> Self {
        let count = |cap: u32| vm.fd.check_extension_raw(cap.into()).clamp(0, 16) as usize;
        Self {
            features: *lock(&vm.arch.features),
            started: false,
            access: None,
            breakpoints: count(kb::KVM_CAP_GUEST_DEBUG_HW_BPS),
            watchpoints: count(kb::KVM_CAP_GUEST_DEBUG_HW_WPS),
        }
    }
}

impl KvmVcpu {
    pub(super) fn arch_init(&mut self) -> VcpuResult<()> {
        self.init_cpu()?;
        if self.arch.features.contains(Aarch64Features::SVE) {
            let feature = kb::KVM_ARM_VCPU_SVE as i32;
            self.fd.vcpu_finalize(&feature).map_err(refused("KVM_ARM_VCPU_FINALIZE"))?;
        }
        lock(&self.vm.arch.vcpus).push(self.get_id());
        Ok(())
    }

    /// Resets the CPU.
    fn init_cpu(&self) -> VcpuResult<()> {
        let mut init = kb::kvm_vcpu_init::default();
        self.vm.fd.get_preferred_target(&mut init).map_err(refused("KVM_ARM_PREFERRED_TARGET"))?;
        init.features[0] |= 1 << kb::KVM_ARM_VCPU_PSCI_0_2;
        if self.get_id() != 0 {
            init.features[0] |= 1 << kb::KVM_ARM_VCPU_POWER_OFF;
        }
        for (ours, _, bits) in FEATURES {
            if self.arch.features.contains(ours) {
                bits.iter().for_each(|bit| init.features[0] |= 1 << bit);
            }
        }
        self.fd.vcpu_init(&init).map_err(refused("KVM_ARM_VCPU_INIT"))
    }

    /// What must follow the creation of all vCPUs.
    #[cold]
    fn start(&mut self) -> VcpuResult<()> {
        self.vm.arch.before_interrupts()?;
        if self.arch.features.contains(Aarch64Features::PMU) {
            let attribute = |attr: u32, addr| kb::kvm_device_attr {
                group: kb::KVM_ARM_VCPU_PMU_V3_CTRL,
                attr: attr.into(),
                addr,
                ..Default::default()
            };
            let set = |attribute| self.fd.set_device_attr(&attribute).map_err(refused("KVM_ARM_VCPU_PMU_V3_CTRL"));
            if self.vm.arch.gic.get().is_some() {
                let irq = PMU_INTID;
                set(attribute(kb::KVM_ARM_VCPU_PMU_V3_IRQ, &raw const irq as u64))?;
            }
            set(attribute(kb::KVM_ARM_VCPU_PMU_V3_INIT, 0))?;
        }
        self.arch.started = true;
        Ok(())
    }

    /// Before the kernel is entered: goes on with an access of ours. `Some` if it needs the VMM again.
    #[inline]
    pub(super) fn arch_resume(&mut self) -> VcpuResult<Option<VcpuExit>> {
        if !self.arch.started {
            self.start()?;
        }
        match self.arch.access {
            Some(_) => self.resume_access(),
            None => Ok(None),
        }
    }

    #[inline(always)]
    pub(super) fn arch_after_run(&mut self, _exited: bool) {}

    /// The result of a call is what the VMM left in X0.
    pub(super) fn arch_finish_call(&mut self) -> VcpuResult<()> {
        Ok(())
    }

    /// An exit that only this architecture has.
    #[cold]
    pub(super) fn arch_exit(&mut self, reason: u32) -> VcpuResult<VcpuExit> {
        match reason {
            kb::KVM_EXIT_ARM_NISV => self.begin_access(),
            ffi::KVM_EXIT_ARM_SEA => {
                // SAFETY: the exit reason says that the kernel filled the exit's part of the union with this structure,
                // which is smaller than the union.
                let sea = unsafe {
                    std::ptr::from_ref(&self.run_area().__bindgen_anon_1).cast::<ffi::ArmSea>().read_unaligned()
                };
                Err(AccelError::MemoryFault {
                    kind: AccelKind::Kvm,
                    gpa: if sea.flags & ffi::ARM_SEA_GPA_VALID != 0 { sea.gpa } else { 0 },
                    size: 0,
                    flags: sea.esr,
                })
            }
            _ => Ok(VcpuExit::Unknown),
        }
    }

    /// What a debug exit was, from its syndrome (Arm ARM, D24.2.40, "EC encoding").
    pub(super) fn arch_debug_event(&self, debug: &kb::kvm_debug_exit_arch) -> VcpuResult<DebugEvent> {
        debug_event(debug, self.get_core(PC)?)
    }

    pub(super) fn arch_set_guest_debug(&mut self, debug: &GuestDebug) -> VcpuResult<()> {
        let mut theirs = kb::kvm_guest_debug::default();
        let (mut breakpoints, mut watchpoints) = (0, 0);
        for wanted in &debug.hardware {
            let (number, most) = match wanted.on {
                BreakOn::Execute => (&mut breakpoints, self.arch.breakpoints),
                _ => (&mut watchpoints, self.arch.watchpoints),
            };
            if *number == most {
                let detail = format!("this CPU has {most} of the kind of {wanted:x?}");
                return Err(AccelError::invalid("hardware breakpoints", detail));
            }
            let (control, value) = comparator(wanted)?;
            let arch = &mut theirs.arch;
            let (controls, values) = match wanted.on {
                BreakOn::Execute => (&mut arch.dbg_bcr, &mut arch.dbg_bvr),
                _ => (&mut arch.dbg_wcr, &mut arch.dbg_wvr),
            };
            (controls[*number], values[*number]) = (control, value);
            *number += 1;
        }
        for (wanted, flag) in [
            (debug.single_step, kb::KVM_GUESTDBG_SINGLESTEP),
            (debug.software_breakpoints, kb::KVM_GUESTDBG_USE_SW_BP),
            (!debug.hardware.is_empty(), kb::KVM_GUESTDBG_USE_HW),
        ] {
            if wanted {
                theirs.control |= kb::KVM_GUESTDBG_ENABLE | flag;
            }
        }
        self.fd.set_guest_debug(&theirs).map_err(refused("KVM_SET_GUEST_DEBUG"))
    }

    pub(super) fn arch_as_x86(&mut self) -> Option<&mut dyn X86Vcpu> {
        None
    }

    pub(super) fn arch_as_aarch64(&mut self) -> Option<&mut dyn Aarch64Vcpu> {
        Some(self)
    }
}

/// Control and value of a breakpoint's or watchpoint's registers (Arm ARM, D24.3.2 DBGBCR, D24.3.11 DBGWCR).
fn comparator(wanted: &HardwareBreakpoint) -> VcpuResult<(u64, u64)> {
    const ENABLE_AT_EL0_AND_EL1: u64 = 1 | 3 << 1;
    let HardwareBreakpoint { addr, len, on } = *wanted;
    let bad = |rule: &str| {
        let detail = format!("{len} bytes at {addr:#x}: {rule}");
        Err(AccelError::invalid("hardware breakpoint", detail))
    };
    let kind = match on {
        BreakOn::Execute if addr % 4 != 0 || len != 1 => {
            return bad("for execution it is 1 byte at an instruction");
        }
        BreakOn::Execute => return Ok((ENABLE_AT_EL0_AND_EL1 | 0xf << 5, addr)),
        BreakOn::Write => 2,
        BreakOn::Access => 3,
    };
    if !matches!(len, 1 | 2 | 4 | 8) || addr % u64::from(len) != 0 {
        return bad("must be 1, 2, 4 or 8 bytes, aligned");
    }
    let bytes = ((1u64 << len) - 1) << (addr & 7);
    Ok((ENABLE_AT_EL0_AND_EL1 | kind << 3 | bytes << 5, addr & !7))
}

fn debug_event(debug: &kb::kvm_debug_exit_arch, pc: u64) -> VcpuResult<DebugEvent> {
    Ok(match debug.hsr >> 26 {
        0x30 | 0x31 => DebugEvent::HardwareBreakpoint { pc },
        0x32 | 0x33 => DebugEvent::SingleStep { pc },
        0x34 | 0x35 => DebugEvent::Watchpoint { pc, addr: Some(debug.far) },
        0x38 | 0x3c => DebugEvent::SoftwareBreakpoint { pc },
        class => {
            let detail = format!("the kernel reports an exception of class {class:#x}");
            return Err(AccelError::invalid("debug exit", detail));
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(class: u32) -> Option<DebugEvent> {
        let exit = kb::kvm_debug_exit_arch { hsr: class << 26 | 0x1ff_ffff, far: 9, ..Default::default() };
        debug_event(&exit, 7).ok()
    }

    #[test]
    fn debug_exits_are_told_apart() {
        assert_eq!(event(0x31), Some(DebugEvent::HardwareBreakpoint { pc: 7 }));
        assert_eq!(event(0x32), Some(DebugEvent::SingleStep { pc: 7 }));
        let watch = DebugEvent::Watchpoint { pc: 7, addr: Some(9) };
        assert_eq!(event(0x35), Some(watch));
        assert_eq!(event(0x3c), Some(DebugEvent::SoftwareBreakpoint { pc: 7 }));
        assert_eq!(event(0x24), None);
    }

    #[test]
    fn watchpoints_select_their_bytes() {
        let at = |addr, len, on| comparator(&HardwareBreakpoint { addr, len, on }).ok();
        assert_eq!(at(0x1006, 2, BreakOn::Write), Some((7 | 2 << 3 | 0xc0 << 5, 0x1000)));
        assert_eq!(at(0x1000, 8, BreakOn::Access), Some((7 | 3 << 3 | 0xff << 5, 0x1000)));
        assert_eq!(at(0x1004, 1, BreakOn::Execute), Some((7 | 0xf << 5, 0x1004)));
        assert_eq!(at(0x1002, 1, BreakOn::Execute), None);
        assert_eq!(at(0x1002, 4, BreakOn::Write), None);
        assert_eq!(at(0x1000, 3, BreakOn::Write), None);
    }
}
