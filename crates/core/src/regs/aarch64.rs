//! aarch64 register names and the groups of state beyond the general-purpose registers.

use super::FpuRegs;
use crate::error::{AccelError, VcpuResult};

/// Names of the indices in [`GuestRegs::gpr`](super::GuestRegs::gpr).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(usize)]
#[allow(missing_docs)]
pub enum Reg {
    X0 = 0,
    X1,
    X2,
    X3,
    X4,
    X5,
    X6,
    X7,
    X8,
    X9,
    X10,
    X11,
    X12,
    X13,
    X14,
    X15,
    X16,
    X17,
    X18,
    X19,
    X20,
    X21,
    X22,
    X23,
    X24,
    X25,
    X26,
    X27,
    X28,
    X29,
    X30,
    /// The stack pointer that PSTATE selects.
    Sp,
}

/// V0–V31 and the floating-point control and status registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Aarch64FpuRegs {
    /// V0–V31.
    pub v: [u128; 32],
    /// Floating-point control register.
    pub fpcr: u32,
    /// Floating-point status register.
    pub fpsr: u32,
}

impl FpuRegs {
    /// The aarch64 registers.
    ///
    /// # Errors
    /// [`AccelError::InvalidArgument`] if they are another architecture's.
    pub fn as_aarch64(&self) -> VcpuResult<&Aarch64FpuRegs> {
        match self {
            Self::Aarch64(regs) => Ok(regs),
            Self::X86(_) => Err(AccelError::invalid("FPU registers", "they are x86-64's, the vCPU is aarch64")),
        }
    }
}

/// The encoding of a system register as MRS and MSR carry it (Arm ARM, C5.1.2): what
/// [`Aarch64Vcpu::get_sys_reg`] names registers by.
#[must_use]
pub const fn sys_reg(op0: u16, op1: u16, crn: u16, crm: u16, op2: u16) -> u16 {
    (op0 & 3) << 14 | (op1 & 7) << 11 | (crn & 15) << 7 | (crm & 15) << 3 | (op2 & 7)
}

/// Declares encodings of system registers (Arm ARM, D19.2).
macro_rules! sys_regs {
    ($($name:ident = $op0:literal $op1:literal $crn:literal $crm:literal $op2:literal, $what:literal;)*) => {
        $(#[doc = $what] pub const $name: u16 = sys_reg($op0, $op1, $crn, $crm, $op2);)*
    };
}

sys_regs! {
    MPIDR_EL1 = 3 0 0 0 5, "Multiprocessor affinity.";
    MIDR_EL1 = 3 0 0 0 0, "Main id.";
    ID_AA64PFR0_EL1 = 3 0 0 4 0, "Processor feature register 0.";
    ID_AA64MMFR0_EL1 = 3 0 0 7 0, "Memory model feature register 0.";
    SCTLR_EL1 = 3 0 1 0 0, "System control of EL1.";
    CPACR_EL1 = 3 0 1 0 2, "Access to floating point and SIMD.";
    TTBR0_EL1 = 3 0 2 0 0, "Translation table of the lower addresses.";
    TTBR1_EL1 = 3 0 2 0 1, "Translation table of the upper addresses.";
    TCR_EL1 = 3 0 2 0 2, "Translation control of EL1.";
    SPSR_EL1 = 3 0 4 0 0, "PSTATE to return to from EL1.";
    ELR_EL1 = 3 0 4 0 1, "Address to return to from EL1.";
    SP_EL0 = 3 0 4 1 0, "Stack pointer of EL0, selected by SPSel = 0.";
    SP_EL1 = 3 4 4 1 0, "Stack pointer of EL1.";
    ESR_EL1 = 3 0 5 2 0, "Syndrome of an exception to EL1.";
    FAR_EL1 = 3 0 6 0 0, "Faulting address of an exception to EL1.";
    MAIR_EL1 = 3 0 10 2 0, "Memory attributes of EL1.";
    VBAR_EL1 = 3 0 12 0 0, "Vectors of EL1.";
    TPIDR_EL1 = 3 0 13 0 4, "Software's thread id of EL1.";
    TPIDR_EL0 = 3 3 13 0 2, "Software's thread id of EL0.";
    CNTKCTL_EL1 = 3 0 14 1 0, "EL0's access to the timers.";
    CNTFRQ_EL0 = 3 3 14 0 0, "Frequency of the counters.";
    CNTVCT_EL0 = 3 3 14 0 2, "The virtual count.";
    CNTV_CTL_EL0 = 3 3 14 3 1, "Control of the virtual timer.";
    CNTV_CVAL_EL0 = 3 3 14 3 2, "Compare value of the virtual timer.";
}

/// PSTATE, in SPSR layout, of a CPU that starts in EL1 with its own stack pointer and all exceptions masked.
pub const PSTATE_EL1H_MASKED: u64 = 0x3c5;

/// The affinity fields of [`MPIDR_EL1`], as the kernel gives them to the vCPU `id`: 16 CPUs per cluster, which is what
/// a GICv3 can address at once.
#[must_use]
pub const fn affinity(id: u32) -> u64 {
    let id = id as u64;
    (id & 0xf) | (id >> 4 & 0xff) << 8 | (id >> 12 & 0xff) << 16
}

/// Which affinity fields MPIDR_EL1 has.
pub const MPIDR_AFFINITY: u64 = 0xff_00ff_ffff;

/// The interrupt that the architecture recommends for the virtual timer (Arm SBSA), a private one: INTID 27.
pub const VIRTUAL_TIMER_INTID: u32 = 27;
/// The interrupt of the non-secure physical timer, as [`VIRTUAL_TIMER_INTID`].
pub const PHYSICAL_TIMER_INTID: u32 = 30;
/// The interrupt of the performance monitors, as [`VIRTUAL_TIMER_INTID`].
pub const PMU_INTID: u32 = 23;

/// The interrupt line of a GIC's shared peripheral interrupt, for [`Accel::set_irq_line`](crate::Accel::set_irq_line):
/// line `n` is INTID `32 + n`. The same number routes an irqfd.
#[must_use]
pub const fn spi_line(intid: u32) -> u32 {
    intid.saturating_sub(32)
}

const PRIVATE: u32 = 1 << 31;

/// The interrupt line of a private peripheral interrupt (INTID 16–31) of one vCPU, for
/// [`Accel::set_irq_line`](crate::Accel::set_irq_line). Private interrupts cannot be routed from an irqfd.
#[must_use]
pub const fn ppi_line(vcpu: u32, intid: u32) -> u32 {
    PRIVATE | (vcpu & 0xffff) << 8 | (intid & 0xff)
}

/// The inverse of [`ppi_line`]: vCPU and INTID, or `None` if the line is a shared one.
#[must_use]
pub const fn private_line(line: u32) -> Option<(u32, u32)> {
    if line & PRIVATE == 0 {
        return None;
    }
    Some((line >> 8 & 0xffff, line & 0xff))
}

bitflags::bitflags! {
    /// Parts of the architecture that a guest gets only if they are asked for, before the first vCPU, with
    /// [`Accel::set_aarch64_features`](crate::Accel::set_aarch64_features). All are off by default, so that the same
    /// guest state fits most hosts.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct Aarch64Features: u32 {
        /// The performance monitors (PMUv3). With an in-kernel GIC their interrupt is INTID 23.
        const PMU = 1;
        /// Scalable vectors, at the largest length that the host offers. Their registers go with
        /// [`Aarch64Vcpu::save_registers`]; [`FpuRegs`] cannot be set then, as they overlap.
        const SVE = 2;
        /// Pointer authentication, address and generic keys.
        const POINTER_AUTHENTICATION = 4;
    }
}

/// The version of a GIC.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum GicVersion {
    /// GICv2: at most 8 CPUs, a memory-mapped CPU interface.
    V2,
    /// GICv3: a redistributor per CPU, a CPU interface in system registers.
    V3,
}

/// The in-kernel GIC of a virtual machine: what a device tree says of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Gic {
    /// Its version.
    pub version: GicVersion,
    /// Guest physical address of the distributor.
    pub distributor: u64,
    /// Guest physical address of the CPU interface (GICv2) or of the first redistributor (GICv3; vCPU `n` has the one
    /// at `n * GICV3_REDISTRIBUTOR_SIZE` behind it).
    pub cpus: u64,
    /// Guest physical address of the interrupt translation service, if there is one: MSIs work then.
    pub its: Option<u64>,
    /// The frame that makes shared interrupts of MSIs, if there is one: MSIs work then, too.
    pub msi_frame: Option<MsiFrame>,
}

/// A frame as a GICv2m has it (Arm SBSA, "GICv2m architecture"): a device that writes an INTID to
/// [`MsiFrame::DOORBELL`] makes that shared interrupt pending.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MsiFrame {
    /// Guest physical address.
    pub address: u64,
    /// The first INTID that it has; edge-triggered, and no line of [`Accel::set_irq_line`](crate::Accel::set_irq_line) leads there.
    pub first: u32,
    /// How many.
    pub count: u32,
}

impl MsiFrame {
    /// The register to which MSIs are written (MSI_SETSPI_NS), as an offset.
    pub const DOORBELL: u64 = 0x40;
}

impl Gic {
    /// Where every in-kernel GIC has its distributor.
    pub const DISTRIBUTOR: u64 = 0x0800_0000;
    /// Bytes of a distributor.
    pub const DISTRIBUTOR_SIZE: u64 = 0x1_0000;
    /// Where a GICv2 has its CPU interface.
    pub const GICV2_CPU: u64 = 0x0801_0000;
    /// Bytes of a GICv2's CPU interface.
    pub const GICV2_CPU_SIZE: u64 = 0x2000;
    /// Where an [`MsiFrame`] is, and its bytes at most.
    pub const MSI_FRAME: u64 = 0x0802_0000;
    /// See [`MSI_FRAME`](Self::MSI_FRAME).
    pub const MSI_FRAME_SIZE: u64 = 0x6_0000;
    /// Where an interrupt translation service is.
    pub const ITS: u64 = 0x0808_0000;
    /// Bytes of an interrupt translation service.
    pub const ITS_SIZE: u64 = 0x2_0000;
    /// Where the page to which MSIs are written lies in an interrupt translation service, and its register in it.
    pub const ITS_TRANSLATER: u64 = 0x1_0040;
    /// Where a GICv3 has its redistributors.
    pub const GICV3_REDISTRIBUTORS: u64 = 0x1000_0000;
    /// Bytes of one redistributor.
    pub const GICV3_REDISTRIBUTOR_SIZE: u64 = 0x2_0000;
    /// INTIDs of a GIC: 32 private, the others shared. Lines 0–223 exist.
    pub const INTERRUPTS: u32 = 256;
}

/// What a register of a [`GicState`] belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum GicPart {
    /// The distributor; `register` is an offset.
    Distributor,
    /// The redistributor of the CPU with this affinity (packed: Aff3.Aff2.Aff1.Aff0); `register` is an offset.
    Redistributor {
        /// The CPU.
        affinity: u32,
    },
    /// The CPU interface of a CPU; `register` is a system register's encoding ([`sys_reg`]).
    CpuInterface {
        /// The CPU, as for the redistributor.
        affinity: u32,
    },
    /// The levels of 32 lines; `register` is the first one's INTID. Private ones are per CPU.
    Lines {
        /// The CPU, as for the redistributor.
        affinity: u32,
    },
    /// The interrupt translation service; `register` is an offset. Its tables stand in guest memory.
    Its,
}

/// One register of a [`GicState`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GicRegister {
    /// What it belongs to.
    pub part: GicPart,
    /// Which one.
    pub register: u32,
    /// Its value.
    pub value: u64,
}

/// The state of an in-kernel GICv3, in the order in which it is written back.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct GicState {
    /// The registers.
    pub registers: Vec<GicRegister>,
    /// What the platform keeps in a format of its own (HVF, which has all but the CPU interfaces in here; those are registers of
    /// the vCPUs there). Empty elsewhere.
    pub opaque: Vec<u8>,
}

/// A register in the platform's own naming; see [`Aarch64Vcpu::save_registers`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlatformRegister {
    /// The platform's name (KVM: the one-reg id).
    pub id: u64,
    /// Its bytes, little-endian.
    pub value: Vec<u8>,
}

/// Whether a CPU runs, in PSCI's terms.
#[non_exhaustive]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Aarch64MpState {
    /// It is on.
    #[default]
    Running,
    /// It is off and waits for CPU_ON: how every vCPU but the first begins.
    PoweredOff,
    /// It suspended itself and waits for an interrupt.
    Suspended,
}

/// Asynchronous exceptions on their way to a CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Aarch64Events {
    /// An SError is pending.
    pub serror_pending: bool,
    /// Its syndrome, where the CPU can be given one (the RAS extension).
    pub serror_esr: Option<u64>,
    /// Set only: raise a synchronous external data abort for the access that the last exit was about.
    pub external_abort: bool,
}

/// The virtual timer of a CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct VirtualTimer {
    /// CNTV_CTL_EL0: bit 0 enables, bit 1 masks the interrupt, bit 2 (read-only) says that the time has come.
    pub control: u64,
    /// CNTV_CVAL_EL0: the count at which it fires.
    pub compare: u64,
    /// CNTVCT_EL0: the count now. One count for all CPUs: setting it on one sets it on all.
    pub count: u64,
}

/// The state of an aarch64 vCPU beyond [`VcpuOps`](crate::VcpuOps). Every method answers [`AccelError::Unsupported`]
/// unless the backend overrides it.
pub trait Aarch64Vcpu {
    /// Reads a system register, named by its MRS encoding: op0, op1, CRn, CRm, op2 as in
    /// `op0 << 14 | op1 << 11 | CRn << 7 | CRm << 3 | op2` (Arm ARM, C5.1.2); see [`sys_reg`].
    ///
    /// # Errors
    /// [`AccelError::InvalidArgument`] if the platform does not know the register.
    fn get_sys_reg(&self, encoding: u16) -> VcpuResult<u64> {
        let _ = encoding;
        Err(self.group_unsupported("system registers"))
    }

    /// Sets a system register; see [`get_sys_reg`](Aarch64Vcpu::get_sys_reg).
    ///
    /// # Errors
    /// [`AccelError::InvalidArgument`] if the platform does not know the register or refuses the value.
    fn set_sys_reg(&mut self, encoding: u16, value: u64) -> VcpuResult<()> {
        let _ = (encoding, value);
        Err(self.group_unsupported("system registers"))
    }

    /// The system registers that [`get_sys_reg`](Aarch64Vcpu::get_sys_reg) can read.
    ///
    /// # Errors
    /// [`AccelError::Backend`] if the platform refuses.
    fn list_sys_regs(&self) -> VcpuResult<Vec<u16>> {
        Err(self.group_unsupported("listing system registers"))
    }

    /// Every register that the platform has for this vCPU (general, floating point, system, and those that only the
    /// platform knows), for [`restore_registers`](Aarch64Vcpu::restore_registers) of another vCPU of the same backend.
    /// With [`get_events`](Aarch64Vcpu::get_events) and [`get_mp_state`](Aarch64Vcpu::get_mp_state) that is a vCPU's
    /// whole state. Call [`quiesce`](crate::VcpuOps::quiesce) first.
    ///
    /// # Errors
    /// [`AccelError::Backend`] if the platform refuses.
    fn save_registers(&self) -> VcpuResult<Vec<PlatformRegister>> {
        Err(self.group_unsupported("saving all registers"))
    }

    /// Writes registers that [`save_registers`](Aarch64Vcpu::save_registers) gave. The guest's count goes on from where
    /// it was then.
    ///
    /// # Errors
    /// [`AccelError::InvalidArgument`] at the first register that this vCPU does not have or whose value it refuses;
    /// those before took effect.
    fn restore_registers(&mut self, registers: &[PlatformRegister]) -> VcpuResult<()> {
        let _ = registers;
        Err(self.group_unsupported("restoring all registers"))
    }

    /// Asynchronous exceptions on their way.
    ///
    /// # Errors
    /// [`AccelError::Backend`] if the platform refuses.
    fn get_events(&self) -> VcpuResult<Aarch64Events> {
        Err(self.group_unsupported("pending exceptions"))
    }

    /// Sets asynchronous exceptions; a pending SError is not taken back.
    ///
    /// # Errors
    /// [`AccelError::Unsupported`] for a syndrome on a CPU that cannot be given one, [`AccelError::Backend`] if the platform
    /// refuses.
    fn set_events(&mut self, events: &Aarch64Events) -> VcpuResult<()> {
        let _ = events;
        Err(self.group_unsupported("pending exceptions"))
    }

    /// Whether the CPU runs.
    ///
    /// # Errors
    /// [`AccelError::Backend`] if the platform refuses.
    fn get_mp_state(&self) -> VcpuResult<Aarch64MpState> {
        Err(self.group_unsupported("MP state"))
    }

    /// Sets whether the CPU runs.
    ///
    /// # Errors
    /// [`AccelError::Unsupported`] if the platform has no such state, [`AccelError::Backend`] if it refuses.
    fn set_mp_state(&mut self, state: Aarch64MpState) -> VcpuResult<()> {
        let _ = state;
        Err(self.group_unsupported("MP state"))
    }

    /// The virtual timer.
    ///
    /// # Errors
    /// [`AccelError::Backend`] if the platform refuses.
    fn get_virtual_timer(&self) -> VcpuResult<VirtualTimer> {
        Err(self.group_unsupported("the virtual timer"))
    }

    /// Sets the virtual timer.
    ///
    /// # Errors
    /// [`AccelError::Backend`] if the platform refuses.
    fn set_virtual_timer(&mut self, timer: &VirtualTimer) -> VcpuResult<()> {
        let _ = timer;
        Err(self.group_unsupported("the virtual timer"))
    }

    /// Sets the CPU's interrupt inputs, as an interrupt controller of the VMM drives them, until the next call. For platforms
    /// without an in-kernel GIC; kick the vCPU first if it runs.
    ///
    /// # Errors
    /// [`AccelError::Unsupported`] where the platform's own controller drives them.
    fn set_interrupts(&mut self, irq: bool, fiq: bool) -> VcpuResult<()> {
        let _ = (irq, fiq);
        Err(self.group_unsupported("interrupt inputs of a CPU"))
    }

    /// The optional parts of the architecture that this vCPU has.
    fn features(&self) -> Aarch64Features {
        Aarch64Features::empty()
    }

    /// Puts the vCPU into the state in which it was created: registers as after reset, off unless it is vCPU 0.
    ///
    /// # Errors
    /// [`AccelError::Backend`] if the platform refuses.
    fn reset(&mut self) -> VcpuResult<()> {
        Err(self.group_unsupported("reset"))
    }

    /// An [`AccelError::Unsupported`] of this vCPU's backend.
    fn group_unsupported(&self, what: &'static str) -> AccelError {
        AccelError::Unsupported { kind: None, what }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn encodings_are_those_of_the_instruction() {
        // MRS X0, MPIDR_EL1 is 0xd53800a0: bits 19 to 5 are o0, op1, CRn, CRm, op2; op0 is 2 + o0.
        assert_eq!(MPIDR_EL1, (0xd538_00a0u32 >> 5 & 0x7fff) as u16 | 0x8000);
        assert_eq!(CNTV_CTL_EL0, 0xdf19);
    }

    #[test]
    fn private_lines_are_told_from_shared_ones() {
        assert_eq!(private_line(ppi_line(300, 27)), Some((300, 27)));
        assert_eq!(private_line(spi_line(40)), None);
        assert_eq!(spi_line(40), 8);
    }

    #[test]
    fn affinity_has_sixteen_cpus_per_cluster() {
        assert_eq!([affinity(0), affinity(15), affinity(16), affinity(0x123)], [0, 15, 0x100, 0x1203]);
    }
}
