//! A vCPU of the framework: its VMCS, how it is entered, and what its exits mean.

use super::state::{CR0_MASK, CR4_MASK, NATIVE_MSRS};
use super::{Hvf, Vm};
use crate::platform::hvf::check;
use crate::platform::hvf::thread::{Owner, reap};
use std::cell::{Cell, OnceCell};
use std::ffi::c_void;
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};
use vm_accel_backend::x86::{Engine, Groups, Left, Order, PortAccess, Shared};
use vm_accel_backend::x86_debug::debug_registers;
use vm_accel_core::accel::{AccelKind, MemoryFlags};
use vm_accel_core::error::{AccelError, UnavailableReason, VcpuResult};
use vm_accel_core::vcpu_common::{GuestDebug, VcpuExit};
use vm_accel_softcpu::state::rflags;
use vm_accel_softcpu::{Cpu, CpuState, Exit};
use vm_accel_sys::hvf::x86_64::{
    DEADLINE_FOREVER, HvfX86Api, cpu_based, cpu_based2, entry_controls, ept_violation, exit, exit_controls,
    interruptibility, irq_info, pin_based, reg, vmcs, vmx_capability,
};

/// IA32_TIME_STAMP_COUNTER.
const TSC: u32 = 0x10;
/// Further MSRs that the guest reaches without an exit: the counter, FS base and GS base, which are fields of the VMCS.
const OTHER_NATIVE_MSRS: [u32; 3] = [TSC, 0xc000_0100, 0xc000_0101];
/// Larger than the XSAVE area of any Intel Mac (which ends with AVX-512 and PKRU at 2,696 bytes).
const FPSTATE: usize = 4096;
/// Bit of DR6: single step.
const DR6_BS: u64 = 1 << 14;
/// The vectors that host debugging needs.
const DB: u8 = 1;
const BP: u8 = 3;

/// An XSAVE area.
#[repr(C, align(64))]
pub(super) struct FpState(pub(super) [u8; FPSTATE]);

/// What the processor's execution controls can and must be.
#[derive(Debug, Clone, Copy)]
pub(super) struct Controls {
    pin: u64,
    cpu: u64,
    cpu2: u64,
    entry: u64,
    exit: u64,
}

/// What we want, as far as the capability allows (Intel SDM vol. 3, appendix A.3: low half must be 1, high half may be 1).
fn allowed(want: u32, capability: u64) -> u32 {
    (want | capability as u32) & (capability >> 32) as u32
}

impl Controls {
    /// The exits without which a guest cannot be run our way.
    const NEEDED: u32 = cpu_based::HLT
        | cpu_based::UNCONDITIONAL_IO
        | cpu_based::CR8_LOAD
        | cpu_based::CR8_STORE
        | cpu_based::IRQ_WINDOW
        | cpu_based::SECONDARY;

    pub(super) fn new(api: &HvfX86Api) -> VcpuResult<Self> {
        let read = |id| {
            let mut value = 0;
            // SAFETY: the pointer is that of a local variable.
            match unsafe { (api.hv_vmx_read_capability)(id, &mut value) } {
                0 => Ok(value),
                code => Err(super::unavailable("hv_vmx_read_capability", code)),
            }
        };
        let new = Self {
            pin: read(vmx_capability::PINBASED)?,
            cpu: read(vmx_capability::PROCBASED)?,
            cpu2: read(vmx_capability::PROCBASED2)?,
            entry: read(vmx_capability::ENTRY)?,
            exit: read(vmx_capability::EXIT)?,
        };
        if !new.can(Self::NEEDED) || allowed(cpu_based2::UNRESTRICTED, new.cpu2) & cpu_based2::UNRESTRICTED == 0 {
            let detail = "the processor cannot run unrestricted guests, or not with the exits that they need".into();
            let reason = UnavailableReason::UnsupportedHardware { detail };
            return Err(AccelError::Unavailable { kind: AccelKind::Hvf, reason });
        }
        Ok(new)
    }

    /// Whether all these bits of the primary controls may be set.
    pub(super) fn can(&self, cpu_based: u32) -> bool {
        allowed(cpu_based, self.cpu) & cpu_based == cpu_based
    }

    /// Whether RDTSCP and RDPID work.
    pub(super) fn has_rdtscp(&self) -> bool {
        allowed(cpu_based2::RDTSCP, self.cpu2) & cpu_based2::RDTSCP != 0
    }

    /// The primary controls with these on top of those that are always on.
    fn primary(&self, more: u32) -> u32 {
        allowed(
            Self::NEEDED & !cpu_based::IRQ_WINDOW
                | cpu_based::TSC_OFFSET
                | cpu_based::MWAIT
                | cpu_based::MONITOR
                | more,
            self.cpu,
        )
    }
}

/// The framework's vCPU. All of it belongs to one thread.
pub(super) struct Link {
    id: u32,
    api: &'static HvfX86Api,
    owner: Owner,
    /// DR0 to DR3 and DR7 of the guest while the host has breakpoints in them.
    pub(super) aside: Cell<Option<([u64; 4], u64)>>,
}

/// The accessors: one call each. The pointers are those of local variables, the id is that of a vCPU which lives as long as `owner`.
impl Link {
    pub(super) fn register(&self, register: u32) -> VcpuResult<u64> {
        let mut value = 0;
        // SAFETY: see above.
        let answer = unsafe { (self.api.hv_vcpu_read_register)(self.id, register, &mut value) };
        check("hv_vcpu_read_register", answer).map(|()| value)
    }

    pub(super) fn write_register(&self, register: u32, value: u64) -> VcpuResult<()> {
        // SAFETY: see above.
        check("hv_vcpu_write_register", unsafe { (self.api.hv_vcpu_write_register)(self.id, register, value) })
    }

    /// Writes a register if it differs.
    pub(super) fn set_register(&self, register: u32, old: u64, new: u64) -> VcpuResult<()> {
        if old == new { Ok(()) } else { self.write_register(register, new) }
    }

    pub(super) fn field(&self, field: u32) -> VcpuResult<u64> {
        let mut value = 0;
        // SAFETY: see above.
        let answer = unsafe { (self.api.hv_vmx_vcpu_read_vmcs)(self.id, field, &mut value) };
        check("hv_vmx_vcpu_read_vmcs", answer).map(|()| value)
    }

    pub(super) fn write_field(&self, field: u32, value: u64) -> VcpuResult<()> {
        // SAFETY: see above.
        check("hv_vmx_vcpu_write_vmcs", unsafe { (self.api.hv_vmx_vcpu_write_vmcs)(self.id, field, value) })
    }

    /// Writes a field if it differs.
    pub(super) fn set_field(&self, field: u32, old: u64, new: u64) -> VcpuResult<()> {
        if old == new { Ok(()) } else { self.write_field(field, new) }
    }

    pub(super) fn msr(&self, index: u32) -> VcpuResult<u64> {
        let mut value = 0;
        // SAFETY: see above.
        check("hv_vcpu_read_msr", unsafe { (self.api.hv_vcpu_read_msr)(self.id, index, &mut value) }).map(|()| value)
    }

    pub(super) fn set_msr(&self, index: u32, value: u64) -> VcpuResult<()> {
        // SAFETY: see above.
        check("hv_vcpu_write_msr", unsafe { (self.api.hv_vcpu_write_msr)(self.id, index, value) })
    }

    pub(super) fn fpstate(&self) -> VcpuResult<Box<FpState>> {
        let mut area = Box::new(FpState([0; FPSTATE]));
        // SAFETY: see above; the buffer has the size that is given.
        let answer = unsafe { (self.api.hv_vcpu_read_fpstate)(self.id, (&raw mut area.0).cast::<c_void>(), FPSTATE) };
        check("hv_vcpu_read_fpstate", answer).map(|()| area)
    }

    pub(super) fn set_fpstate(&self, area: &FpState) -> VcpuResult<()> {
        // SAFETY: see above; the buffer has the size that is given.
        let answer =
            unsafe { (self.api.hv_vcpu_write_fpstate)(self.id, (&raw const area.0).cast::<c_void>(), FPSTATE) };
        check("hv_vcpu_write_fpstate", answer)
    }

    pub(super) fn invalidate_tlb(&self) -> VcpuResult<()> {
        // SAFETY: see above.
        check("hv_vcpu_invalidate_tlb", unsafe { (self.api.hv_vcpu_invalidate_tlb)(self.id) })
    }

    /// Creates the framework's vCPU for this thread, with the controls set.
    fn create(vm: &Arc<Vm>, controls: &Controls) -> VcpuResult<Self> {
        reap();
        let api = vm.api;
        let mut id = 0;
        // SAFETY: the pointer is that of a local variable; 0 is HV_VCPU_DEFAULT.
        check("hv_vcpu_create", unsafe { (api.hv_vcpu_create)(&mut id, 0) })?;
        let vm = Arc::clone(vm);
        let owner = Owner::new(move || {
            // SAFETY: called once, on the thread that created the vCPU, of which nobody knows any more.
            let _ = unsafe { (vm.api.hv_vcpu_destroy)(id) };
        });
        let link = Self { id, api, owner, aside: Cell::new(None) };
        link.set_up(controls)?;
        Ok(link)
    }

    /// What is never changed again, and what must not be what a new vCPU happens to hold.
    fn set_up(&self, controls: &Controls) -> VcpuResult<()> {
        let wanted = [
            (vmcs::PIN_BASED, pin_based::EXTERNAL_INTERRUPT | pin_based::NMI | pin_based::VIRTUAL_NMI, controls.pin),
            (
                vmcs::CPU_BASED2,
                cpu_based2::EPT | cpu_based2::VPID | cpu_based2::UNRESTRICTED | cpu_based2::RDTSCP,
                controls.cpu2,
            ),
            (vmcs::VMENTRY_CONTROLS, entry_controls::LOAD_EFER, controls.entry),
            (
                vmcs::VMEXIT_CONTROLS,
                exit_controls::HOST_IA32E | exit_controls::SAVE_EFER | exit_controls::LOAD_EFER,
                controls.exit,
            ),
        ];
        for (field, want, capability) in wanted {
            self.write_field(field, allowed(want, capability).into())?;
        }
        self.write_field(vmcs::CPU_BASED, controls.primary(0).into())?;
        for (field, value) in [
            (vmcs::EXCEPTION_BITMAP, 0),
            (vmcs::TPR_THRESHOLD, 0),
            (vmcs::CR0_MASK, CR0_MASK),
            (vmcs::CR4_MASK, CR4_MASK),
            (vmcs::GUEST_DEBUGCTL, 0),
            (vmcs::GUEST_ACTIVITY_STATE, 0),
            (vmcs::GUEST_PENDING_DEBUG, 0),
            (vmcs::VMENTRY_IRQ_INFO, 0),
        ] {
            self.write_field(field, value)?;
        }
        for msr in NATIVE_MSRS.iter().chain(&OTHER_NATIVE_MSRS) {
            // SAFETY: see the accessors.
            let answer = unsafe { (self.api.hv_vcpu_enable_native_msr)(self.id, *msr, true) };
            check("hv_vcpu_enable_native_msr", answer)?;
        }
        Ok(())
    }

    /// Runs until the guest exits. Of macOS 10.15 it is known that `hv_vcpu_run_until` fails without a reason (VirtualBox,
    /// NEMR3Native-darwin.cpp), so it is used where a function of macOS 11 is there, too.
    fn run(&self) -> VcpuResult<()> {
        match self.api.hv_vcpu_run_until.filter(|_| self.api.hv_vmx_get_msr_info.is_some()) {
            // SAFETY: see the accessors.
            Some(run_until) => check("hv_vcpu_run_until", unsafe { run_until(self.id, DEADLINE_FOREVER) }),
            // SAFETY: see the accessors.
            None => check("hv_vcpu_run", unsafe { (self.api.hv_vcpu_run)(self.id) }),
        }
    }

    /// An event that was being delivered when the guest exited is delivered with the next entry (Intel SDM vol. 3, 28.2.4).
    /// True if there is one.
    fn keep_event(&self) -> VcpuResult<bool> {
        /// Bits that are undefined there and must be 0 here.
        const UNDEFINED: u64 = 0x7fff_f000;
        let info = self.field(vmcs::IDT_VECTOR_INFO)?;
        let kind = info as u32 & irq_info::TYPE;
        // INT n and its like are executed again: RIP is at the instruction.
        let is_soft = kind > irq_info::HARD_EXCEPTION;
        if info as u32 & irq_info::VALID == 0 || is_soft {
            return Ok(false);
        }
        if info as u32 & irq_info::ERROR_VALID != 0 {
            self.write_field(vmcs::VMENTRY_EXC_ERROR, self.field(vmcs::IDT_VECTOR_ERROR)?)?;
        }
        if kind == irq_info::NMI {
            // It blocked the next one already.
            let held = self.field(vmcs::GUEST_INTERRUPTIBILITY)?;
            self.set_field(vmcs::GUEST_INTERRUPTIBILITY, held, held & !interruptibility::NMI)?;
        }
        self.write_field(vmcs::VMENTRY_IRQ_INFO, info & !UNDEFINED).map(|()| true)
    }
}

/// What the host debugs, as controls.
#[derive(Debug, Default)]
struct Debugging {
    primary: u32,
    exceptions: u32,
    hardware: Option<([u64; 4], u64)>,
}

/// One vCPU.
pub(super) struct VmxVcpu {
    shared: Arc<Shared<Hvf>>,
    link: OnceCell<Link>,
    /// For those who cancel: the framework's id, once there is one.
    id: Arc<OnceLock<u32>>,
    debugging: Debugging,
    /// The primary controls and the exception bitmap as the framework has them.
    current: Option<(u32, u32)>,
    /// An exit was not looked at to its end, because a call failed.
    unread: bool,
    reason: Option<u32>,
    /// The VMM set the time-stamp counter before there was one.
    has_time: bool,
}

impl VmxVcpu {
    pub(super) fn new(shared: &Arc<Shared<Hvf>>) -> Self {
        Self {
            shared: Arc::clone(shared),
            link: OnceCell::new(),
            id: Arc::default(),
            debugging: Debugging::default(),
            current: None,
            unread: false,
            reason: None,
            has_time: false,
        }
    }

    /// The framework's vCPU, which the first call creates.
    fn link(&self) -> VcpuResult<&Link> {
        if let Some(link) = self.link.get() {
            return Ok(link);
        }
        let platform = self.shared.platform();
        let link = Link::create(&platform.vm, &platform.controls)?;
        let _ = self.id.set(link.id);
        Ok(self.link.get_or_init(|| link))
    }

    /// Gives the framework what belongs to this entry.
    fn prepare(&mut self, cpu: &Cpu, order: &Order) -> VcpuResult<()> {
        // A guest that changes its task priority exits; until it does, what that holds back need not be waited for.
        let window = order.window.is_some_and(|class| class == 0 || class > order.cr8);
        let more = if window { cpu_based::IRQ_WINDOW } else { 0 }
            | if order.nmi_window { cpu_based::NMI_WINDOW } else { 0 }
            | self.debugging.primary;
        let platform = self.shared.platform();
        let (primary, exceptions) = (platform.controls.primary(more), self.debugging.exceptions);
        let link = self.link()?;
        if self.current != Some((primary, exceptions)) {
            link.write_field(vmcs::CPU_BASED, primary.into())?;
            link.write_field(vmcs::EXCEPTION_BITMAP, exceptions.into())?;
        }
        match (self.debugging.hardware, link.aside.get()) {
            (Some((dr, dr7)), None) => {
                let guest = link.real_debug_registers()?;
                link.set_real_debug_registers(dr, dr7)?;
                link.aside.set(Some(guest));
            }
            (None, Some((dr, dr7))) => {
                link.set_real_debug_registers(dr, dr7)?;
                link.aside.set(None);
            }
            _ => {}
        }
        if self.has_time || !platform.knows_time.swap(true, Ordering::Relaxed) {
            set_time(platform.vm.api, cpu.tsc())?;
            self.has_time = false;
        }
        self.current = Some((primary, exceptions));
        Ok(())
    }

    /// What the exit means.
    fn left(&self, link: &Link, reason: u32, has_event: bool) -> VcpuResult<Left> {
        if reason & exit::ENTRY_FAILED != 0 {
            return Err(AccelError::EntryFailed { kind: AccelKind::Hvf, reason: reason.into() });
        }
        Ok(match reason & 0xffff {
            // The host's business, somebody's interrupt, or a window, at which the layer looks.
            exit::IRQ
            | exit::VMX_TIMER
            | exit::IRQ_WINDOW
            | exit::NMI_WINDOW
            | exit::TPR_THRESHOLD => Left::Again,
            exit::EXCEPTION_NMI => self.exception(link)?,
            exit::TRIPLE_FAULT => Left::Exit(Exit::Shutdown),
            exit::MONITOR_TRAP => Left::Exit(Exit::Debug { vector: DB, dr6: DR6_BS }),
            exit::EPT_VIOLATION => self.violation(link)?,
            exit::RDMSR | exit::WRMSR => self.emulate(link, Groups::MSR)?,
            exit::IO => match self.port_access(link, has_event)? {
                Some(access) => Left::Port(access),
                None => self.emulate(link, Groups::empty())?,
            },
            exit::XSETBV => self.emulate(link, Groups::FPU)?,
            exit::MOV_DR => Left::Emulate(Groups::DEBUG),
            exit::TASK
            | exit::CPUID
            | exit::HLT
            | exit::INVD
            | exit::RDPMC
            | exit::RDTSC
            | exit::RDTSCP
            | exit::VMCALL
            | exit::MOV_CR
            | exit::MWAIT
            | exit::MONITOR
            | exit::WBINVD
            // Instructions of nested virtualization, of which the emulator knows none: an invalid opcode.
            | 11
            | 19..=27
            | 50
            | 53 => self.emulate(link, Groups::empty())?,
            _ => Left::Other(VcpuExit::Unknown),
        })
    }

    /// A port access that needs no emulator: a few fields tell all (Intel SDM vol. 3, 28.2.1, table "Exit Qualification for I/O
    /// Instructions").
    fn port_access(&self, link: &Link, has_event: bool) -> VcpuResult<Option<PortAccess>> {
        const IN: u64 = 1 << 3;
        const STRING_OR_REP: u64 = 3 << 4;
        const DR7_ENABLED: u64 = 0xff;
        const SHADOWS: u64 = interruptibility::STI | interruptibility::MOV_SS;
        let qualification = link.field(vmcs::EXIT_QUALIFICATION)?;
        let is_debugged = self.debugging.primary != 0 || self.debugging.hardware.is_some();
        if has_event || is_debugged || qualification & STRING_OR_REP != 0 {
            return Ok(None);
        }
        let (rip, flags) = (link.register(reg::RIP)?, link.register(reg::RFLAGS)?);
        let length = link.field(vmcs::VMEXIT_INSTR_LEN)? as u8;
        let shadow = link.field(vmcs::GUEST_INTERRUPTIBILITY)? & SHADOWS;
        let armed = link.field(vmcs::GUEST_DR7)? & DR7_ENABLED;
        let Some(next) = PortAccess::next(rip, length, flags).filter(|_| shadow | armed == 0) else {
            return Ok(None);
        };
        let (size, is_write) = ((qualification & 7) as u8 + 1, qualification & IN == 0);
        let port = (qualification >> 16) as u16;
        Ok(Some(PortAccess { port, size, is_write, rax: link.register(reg::RAX)?, rip, next }))
    }

    /// The emulator's turn. It needs the debug registers where it may hit one.
    fn emulate(&self, link: &Link, groups: Groups) -> VcpuResult<Left> {
        const ENABLED: u64 = 0xff;
        let watches = link.register(reg::RFLAGS)? & rflags::TF != 0 || link.field(vmcs::GUEST_DR7)? & ENABLED != 0;
        Ok(Left::Emulate(if watches { groups | Groups::DEBUG } else { groups }))
    }

    fn exception(&self, link: &Link) -> VcpuResult<Left> {
        let info = link.field(vmcs::VMEXIT_IRQ_INFO)? as u32;
        let vector = (info & irq_info::VECTOR) as u8;
        Ok(match (info & irq_info::TYPE, vector) {
            // The host's.
            (irq_info::NMI, _) => Left::Again,
            (_, DB) => Left::Exit(Exit::Debug { vector, dr6: link.field(vmcs::EXIT_QUALIFICATION)? }),
            (_, BP) => Left::Exit(Exit::Debug { vector, dr6: 0 }),
            _ => Left::Other(VcpuExit::Unknown),
        })
    }

    /// An access that the EPT does not allow: a device's, a write to read-only memory, one that the dirty log wants to know of, or
    /// the first touch of a page, of which `hv_vcpu_run` tells although the kernel has done what is to do.
    fn violation(&self, link: &Link) -> VcpuResult<Left> {
        let gpa = link.field(vmcs::GUEST_PHYSICAL_ADDRESS)?;
        let is_write = link.field(vmcs::EXIT_QUALIFICATION)? & ept_violation::WRITE != 0;
        let rights = if is_write { MemoryFlags::READ | MemoryFlags::WRITE } else { MemoryFlags::READ };
        if self.shared.platform().vm.mappings.retry(gpa, rights)? {
            return Ok(Left::Again);
        }
        self.emulate(link, Groups::FPU)
    }
}

/// Sets the time-stamp counters of all vCPUs.
fn set_time(api: &HvfX86Api, value: u64) -> VcpuResult<()> {
    // SAFETY: no preconditions.
    check("hv_vm_sync_tsc", unsafe { (api.hv_vm_sync_tsc)(value) })
}

impl Engine for VmxVcpu {
    fn load(&self, groups: Groups, into: &mut CpuState) -> VcpuResult<()> {
        self.link()?.load(groups, into)
    }

    fn store(&mut self, groups: Groups, old: &CpuState, new: &CpuState) -> VcpuResult<()> {
        self.link()?.store(groups, old, new)
    }

    fn enter(&mut self, cpu: &mut Cpu, order: &Order) -> VcpuResult<Left> {
        if !self.unread {
            self.prepare(cpu, order)?;
            self.link()?.run()?;
            self.unread = true;
        }
        let link = self.link()?;
        let reason = link.field(vmcs::EXIT_REASON)? as u32;
        let has_event = link.keep_event()?;
        let left = self.left(link, reason, has_event);
        self.reason = Some(reason);
        self.unread = matches!(left, Err(AccelError::Backend { .. }));
        left
    }

    fn finish_port(&mut self, rip: u64, rax: Option<u64>) -> VcpuResult<()> {
        let link = self.link()?;
        rax.map_or(Ok(()), |rax| link.write_register(reg::RAX, rax))?;
        link.write_register(reg::RIP, rip)
    }

    fn canceller(&self) -> Option<Box<dyn Fn() + Send + Sync>> {
        let (id, api) = (Arc::clone(&self.id), self.shared.platform().vm.api);
        Some(Box::new(move || {
            if let Some(id) = id.get() {
                let mut id = *id;
                // SAFETY: the list has one entry; the vCPU is not destroyed while this can be called. A failure shows as no
                // effect, and then this is called again.
                let _ = unsafe { (api.hv_vcpu_interrupt)(&mut id, 1) };
            }
        }))
    }

    fn check_thread(&self, op: &'static str) -> VcpuResult<()> {
        self.link.get().map_or(Ok(()), |link| link.owner.check(op))
    }

    fn tsc(&self) -> VcpuResult<Option<u64>> {
        self.check_thread("get_tsc")?;
        self.link.get().map(|link| link.msr(TSC)).transpose()
    }

    fn set_tsc(&mut self, value: u64) -> VcpuResult<bool> {
        self.check_thread("set_tsc")?;
        if self.link.get().is_none() {
            // Until its first entry a vCPU's counter is the emulator's.
            self.has_time = true;
            return Ok(false);
        }
        set_time(self.shared.platform().vm.api, value).map(|()| true)
    }

    fn set_guest_debug(&mut self, debug: &GuestDebug) -> VcpuResult<()> {
        let hardware = (!debug.hardware.is_empty()).then(|| debug_registers(&debug.hardware)).transpose()?;
        let bit = |on: bool, vector: u8| if on { 1 << vector } else { 0 };
        self.debugging = Debugging {
            primary: if debug.single_step { cpu_based::MONITOR_TRAP } else { 0 }
                | if hardware.is_some() { cpu_based::MOV_DR } else { 0 },
            exceptions: bit(debug.software_breakpoints, BP) | bit(hardware.is_some(), DB),
            hardware,
        };
        if self.shared.platform().controls.can(self.debugging.primary) {
            Ok(())
        } else {
            Err(AccelError::Unsupported { kind: Some(AccelKind::Hvf), what: "guest debugging" })
        }
    }

    fn raw_exit(&self) -> Option<u64> {
        self.reason.map(u64::from)
    }
}
