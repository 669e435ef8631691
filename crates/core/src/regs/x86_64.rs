//! x86-64 register names and the groups of state beyond the general-purpose registers.
//!
//! Layouts follow the Intel SDM; field names are the manual's. Conversions from and to a platform's structures live with
//! the platform.

use super::FpuRegs;
use crate::error::{AccelError, VcpuResult};

/// Names of the indices in [`GuestRegs::gpr`](super::GuestRegs::gpr), in ModRM order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(usize)]
#[allow(missing_docs)]
pub enum Reg {
    Rax = 0,
    Rcx,
    Rdx,
    Rbx,
    Rsp,
    Rbp,
    Rsi,
    Rdi,
    R8,
    R9,
    R10,
    R11,
    R12,
    R13,
    R14,
    R15,
}

/// RFLAGS bit 1, which is always set.
pub const RFLAGS_RESERVED: u64 = 1 << 1;
/// RFLAGS.IF: maskable interrupts are enabled.
pub const RFLAGS_IF: u64 = 1 << 9;
/// CR0.PE: protected mode.
pub const CR0_PE: u64 = 1;
/// CR0.MP: WAIT honours TS.
pub const CR0_MP: u64 = 1 << 1;
/// CR0.ET: always set.
pub const CR0_ET: u64 = 1 << 4;
/// CR0.NE: x87 errors raise #MF.
pub const CR0_NE: u64 = 1 << 5;
/// CR0.WP: supervisor writes honour read-only pages.
pub const CR0_WP: u64 = 1 << 16;
/// CR0.PG: paging.
pub const CR0_PG: u64 = 1 << 31;
/// CR4.PAE: 64-bit page-table entries.
pub const CR4_PAE: u64 = 1 << 5;
/// CR4.OSFXSR: SSE and FXSAVE are enabled.
pub const CR4_OSFXSR: u64 = 1 << 9;
/// CR4.OSXMMEXCPT: SSE errors raise #XM.
pub const CR4_OSXMMEXCPT: u64 = 1 << 10;
/// EFER.SCE: SYSCALL is enabled.
pub const EFER_SCE: u64 = 1;
/// EFER.LME: long mode is enabled once paging is.
pub const EFER_LME: u64 = 1 << 8;
/// EFER.LMA: long mode is active.
pub const EFER_LMA: u64 = 1 << 10;
/// EFER.NXE: the no-execute bit of page tables counts.
pub const EFER_NXE: u64 = 1 << 11;

/// A segment register with its hidden part. (Intel SDM vol. 3, 3.4.)
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Segment {
    /// Base address.
    pub base: u64,
    /// Limit in bytes, granularity already applied.
    pub limit: u32,
    /// Selector.
    pub selector: u16,
    /// Descriptor type, bits 0–3 of the access byte.
    pub segment_type: u8,
    /// Present.
    pub present: bool,
    /// Descriptor privilege level, 0–3.
    pub dpl: u8,
    /// D/B: 32-bit default operand size.
    pub db: bool,
    /// S: code or data segment (false: system segment).
    pub code_or_data: bool,
    /// L: 64-bit code segment.
    pub long: bool,
    /// G: limit was in 4 KiB units.
    pub granularity: bool,
    /// Available for system software.
    pub available: bool,
    /// The segment cannot be used (null selector).
    pub unusable: bool,
}

impl Segment {
    /// A real-mode segment: base is `selector * 16`, limit 64 KiB, read/write/accessed data.
    #[must_use]
    pub const fn real_mode(selector: u16) -> Self {
        Self {
            base: (selector as u64) << 4,
            limit: 0xffff,
            selector,
            segment_type: 3,
            present: true,
            dpl: 0,
            db: false,
            code_or_data: true,
            long: false,
            granularity: false,
            available: false,
            unusable: false,
        }
    }

    /// A flat 4 GiB segment of protected mode: data (read/write) with `selector` and privilege `dpl`.
    #[must_use]
    pub const fn flat_data(selector: u16, dpl: u8) -> Self {
        Self {
            base: 0,
            limit: 0xffff_ffff,
            selector,
            segment_type: 3,
            present: true,
            dpl,
            db: true,
            code_or_data: true,
            long: false,
            granularity: true,
            available: false,
            unusable: false,
        }
    }

    /// A flat 32-bit code segment.
    #[must_use]
    pub const fn flat_code32(selector: u16, dpl: u8) -> Self {
        Self { segment_type: 0xb, ..Self::flat_data(selector, dpl) }
    }

    /// A 64-bit code segment.
    #[must_use]
    pub const fn code64(selector: u16, dpl: u8) -> Self {
        Self { db: false, long: true, ..Self::flat_code32(selector, dpl) }
    }

    /// A busy 64-bit (or 32-bit) TSS.
    #[must_use]
    pub const fn busy_tss(selector: u16, base: u64, limit: u32) -> Self {
        Self {
            base,
            limit,
            selector,
            segment_type: 0xb,
            present: true,
            dpl: 0,
            db: false,
            code_or_data: false,
            long: false,
            granularity: false,
            available: false,
            unusable: false,
        }
    }

    /// The eight bytes that a GDT holds for this segment (Intel SDM vol. 3, figure 3-8). Only the low 32 bits of the
    /// base fit; a 64-bit TSS needs its upper half in the next entry.
    #[must_use]
    pub const fn descriptor(&self) -> u64 {
        let limit = if self.granularity { self.limit >> 12 } else { self.limit } as u64;
        let access = self.segment_type as u64 & 0xf
            | (self.code_or_data as u64) << 4
            | (self.dpl as u64 & 3) << 5
            | (self.present as u64) << 7;
        let flags =
            self.available as u64 | (self.long as u64) << 1 | (self.db as u64) << 2 | (self.granularity as u64) << 3;
        limit & 0xffff
            | (self.base & 0xff_ffff) << 16
            | access << 40
            | (limit >> 16 & 0xf) << 48
            | flags << 52
            | (self.base >> 24 & 0xff) << 56
    }
}

/// GDTR or IDTR.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DescriptorTable {
    /// Linear base address.
    pub base: u64,
    /// Limit: size in bytes minus one.
    pub limit: u16,
}

/// Segments, descriptor tables and control registers ("special registers").
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[allow(missing_docs)]
pub struct X86Sregs {
    pub cs: Segment,
    pub ds: Segment,
    pub es: Segment,
    pub fs: Segment,
    pub gs: Segment,
    pub ss: Segment,
    /// Task register.
    pub tr: Segment,
    pub ldt: Segment,
    pub gdt: DescriptorTable,
    pub idt: DescriptorTable,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    /// Task priority, bits 0–3.
    pub cr8: u64,
    pub efer: u64,
    /// IA32_APIC_BASE. Setting it may be refused without a local APIC.
    pub apic_base: u64,
}

/// A model-specific register and its value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct X86Msr {
    /// Index, as in ECX of RDMSR.
    pub index: u32,
    /// Value.
    pub value: u64,
}

/// One answer of CPUID.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[allow(missing_docs)]
pub struct CpuidEntry {
    /// EAX of the question.
    pub leaf: u32,
    /// ECX of the question; `None` if the leaf does not look at it.
    pub subleaf: Option<u32>,
    pub eax: u32,
    pub ebx: u32,
    pub ecx: u32,
    pub edx: u32,
}

/// Debug registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[allow(missing_docs)]
pub struct X86DebugRegs {
    /// DR0–DR3: addresses.
    pub db: [u64; 4],
    pub dr6: u64,
    pub dr7: u64,
}

/// An extended control register; XCR0 is the only one in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Xcr {
    /// Index, as in ECX of XGETBV.
    pub index: u32,
    /// Value.
    pub value: u64,
}

/// Events that are pending or in delivery. (KVM API documentation, KVM_GET_VCPU_EVENTS.)
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct X86Events {
    /// Vector of an exception that is being delivered.
    pub exception_injected: Option<u8>,
    /// Vector of an exception that is recognised, not yet delivered.
    pub exception_pending: Option<u8>,
    /// Its error code.
    pub exception_error_code: Option<u32>,
    /// What its delivery will write: CR2 of a page fault, DR6 bits of a debug exception.
    pub exception_payload: Option<u64>,
    /// Vector of an interrupt that is being delivered.
    pub interrupt_injected: Option<u8>,
    /// That interrupt comes from an INT n instruction.
    pub interrupt_soft: bool,
    /// Interrupts are blocked for one instruction by STI.
    pub sti_shadow: bool,
    /// Interrupts are blocked for one instruction by MOV SS or POP SS.
    pub mov_ss_shadow: bool,
    /// An NMI is being delivered.
    pub nmi_injected: bool,
    /// An NMI is pending.
    pub nmi_pending: bool,
    /// NMIs are blocked until IRET.
    pub nmi_masked: bool,
    /// Start vector of a SIPI that was received.
    pub sipi_vector: u8,
    /// The CPU is in system-management mode.
    pub smm: bool,
    /// A triple fault is pending.
    pub triple_fault_pending: bool,
}

/// What a CPU is doing between instructions.
#[non_exhaustive]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum MpState {
    /// It runs.
    #[default]
    Runnable,
    /// It never received INIT: an application processor after reset.
    Uninitialized,
    /// It received INIT and waits for a SIPI.
    InitReceived,
    /// It received a SIPI.
    SipiReceived,
    /// It executed HLT and waits for an interrupt.
    Halted,
}

/// The registers of a local APIC: a KiB laid out as its MMIO page (Intel SDM vol. 3, table "Local APIC Register Address
/// Map").
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LapicState {
    /// Register page; a register is 4 bytes at a multiple of 16.
    pub regs: [u8; 1024],
}

impl LapicState {
    /// The register at byte offset `offset` of the APIC page, a multiple of 16 below 1024; `None` beyond.
    #[must_use]
    pub fn reg(&self, offset: usize) -> Option<u32> {
        let bytes = self.regs.get(offset..offset + 4)?;
        Some(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }

    /// Sets the register at byte offset `offset`; beyond the page it does nothing.
    pub fn set_reg(&mut self, offset: usize, value: u32) {
        if let Some(bytes) = self.regs.get_mut(offset..offset + 4) {
            bytes.copy_from_slice(&value.to_le_bytes());
        }
    }
}

/// x87 and SSE state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct X86FpuRegs {
    /// ST(0)–ST(7): 80 bits each in the low bits.
    pub st: [u128; 8],
    /// x87 control word.
    pub fcw: u16,
    /// x87 status word.
    pub fsw: u16,
    /// x87 tags, abridged: bit n is set if register n (not ST(n)) holds something.
    pub ftw: u8,
    /// Opcode of the last x87 instruction.
    pub fop: u16,
    /// Address of the last x87 instruction.
    pub fip: u64,
    /// Address of its operand.
    pub fdp: u64,
    /// XMM0–XMM15.
    pub xmm: [u128; 16],
    /// SSE control and status.
    pub mxcsr: u32,
}

impl Default for X86FpuRegs {
    /// The state after FNINIT and with MXCSR at its reset value.
    fn default() -> Self {
        Self { st: [0; 8], fcw: 0x37f, fsw: 0, ftw: 0, fop: 0, fip: 0, fdp: 0, xmm: [0; 16], mxcsr: 0x1f80 }
    }
}

/// Bytes of an FXSAVE image, and of the legacy region of an XSAVE area.
pub const FXSAVE_SIZE: usize = 512;
/// Where an XSAVE area keeps XSTATE_BV (Intel SDM vol. 1, 13.4.2).
const XSTATE_BV: usize = 512;
/// XSTATE_BV bits of x87 and SSE.
const XSTATE_FPU_SSE: u64 = 3;

impl X86FpuRegs {
    /// Reads a 64-bit FXSAVE image (Intel SDM vol. 1, table 10-2).
    #[must_use]
    pub fn from_fxsave(image: &[u8; FXSAVE_SIZE]) -> Self {
        let u16_at = |at: usize| u16::from_le_bytes([image[at], image[at + 1]]);
        let u64_at = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| image[at + i]));
        let u128_at = |at: usize| u128::from_le_bytes(std::array::from_fn(|i| image[at + i]));
        Self {
            // An x87 register is 80 bits; what stands in the padding means nothing.
            st: std::array::from_fn(|i| u128_at(32 + 16 * i) & ((1 << 80) - 1)),
            fcw: u16_at(0),
            fsw: u16_at(2),
            ftw: image[4],
            fop: u16_at(6),
            fip: u64_at(8),
            fdp: u64_at(16),
            xmm: std::array::from_fn(|i| u128_at(160 + 16 * i)),
            mxcsr: u64_at(24) as u32,
        }
    }

    /// Writes these registers into a 64-bit FXSAVE image, leaving MXCSR_MASK and the reserved parts as they are.
    pub fn write_fxsave(&self, image: &mut [u8; FXSAVE_SIZE]) {
        image[0..2].copy_from_slice(&self.fcw.to_le_bytes());
        image[2..4].copy_from_slice(&self.fsw.to_le_bytes());
        image[4..6].copy_from_slice(&[self.ftw, 0]);
        image[6..8].copy_from_slice(&self.fop.to_le_bytes());
        image[8..16].copy_from_slice(&self.fip.to_le_bytes());
        image[16..24].copy_from_slice(&self.fdp.to_le_bytes());
        image[24..28].copy_from_slice(&self.mxcsr.to_le_bytes());
        for (i, st) in self.st.iter().enumerate() {
            image[32 + 16 * i..][..10].copy_from_slice(&st.to_le_bytes()[..10]);
        }
        for (i, xmm) in self.xmm.iter().enumerate() {
            image[160 + 16 * i..][..16].copy_from_slice(&xmm.to_le_bytes());
        }
    }

    /// Reads the x87 and SSE state of an XSAVE area in standard format: a component whose XSTATE_BV bit is clear is in
    /// its initial state whatever the area holds (Intel SDM vol. 1, 13.4).
    ///
    /// # Errors
    /// [`AccelError::InvalidArgument`] if the area is shorter than its header.
    pub fn from_xsave(area: &[u8]) -> VcpuResult<Self> {
        let (image, header) = area
            .split_first_chunk::<FXSAVE_SIZE>()
            .filter(|(_, header)| header.len() >= 64)
            .ok_or_else(|| AccelError::invalid("XSAVE area", format!("{} bytes are too few", area.len())))?;
        let in_use = header[0];
        let all = Self::from_fxsave(image);
        let initial = Self::default();
        Ok(Self {
            xmm: if in_use & 2 != 0 { all.xmm } else { initial.xmm },
            // MXCSR is restored with either SSE or AVX state, and is not affected by XSTATE_BV of SSE alone.
            mxcsr: all.mxcsr,
            ..if in_use & 1 != 0 { all } else { initial }
        })
    }

    /// Writes the x87 and SSE state into an XSAVE area in standard format and marks both as in use. Without the mark the
    /// platform would load the initial state instead.
    ///
    /// # Errors
    /// [`AccelError::InvalidArgument`] if the area is shorter than its header.
    pub fn write_xsave(&self, area: &mut [u8]) -> VcpuResult<()> {
        let len = area.len();
        let (image, header) = area
            .split_first_chunk_mut::<FXSAVE_SIZE>()
            .filter(|(_, header)| header.len() >= 64)
            .ok_or_else(|| AccelError::invalid("XSAVE area", format!("{len} bytes are too few")))?;
        self.write_fxsave(image);
        header[XSTATE_BV - FXSAVE_SIZE] |= XSTATE_FPU_SSE as u8;
        Ok(())
    }

    /// Refuses what FXRSTOR would refuse.
    ///
    /// # Errors
    /// [`AccelError::InvalidArgument`] if MXCSR has bits that `mxcsr_mask` (of the FXSAVE image; 0 means 0xffbf) denies.
    pub fn check(&self, mxcsr_mask: u32) -> VcpuResult<()> {
        let allowed = if mxcsr_mask == 0 { 0xffbf } else { mxcsr_mask };
        if self.mxcsr & !allowed != 0 {
            return Err(AccelError::invalid(
                "MXCSR",
                format!("{:#x} has reserved bits (allowed: {allowed:#x})", self.mxcsr),
            ));
        }
        Ok(())
    }
}

impl FpuRegs {
    /// The x86-64 registers.
    ///
    /// # Errors
    /// [`AccelError::InvalidArgument`] if they are another architecture's.
    pub fn as_x86(&self) -> VcpuResult<&X86FpuRegs> {
        match self {
            Self::X86(regs) => Ok(regs),
            Self::Aarch64(_) => Err(AccelError::invalid("FPU registers", "they are aarch64's, the vCPU is x86-64")),
        }
    }
}

/// The state of an x86-64 vCPU beyond [`VcpuOps`](crate::VcpuOps). Every method answers [`AccelError::Unsupported`]
/// unless the backend overrides it.
///
/// To restore a vCPU set the groups in this order: CPUID, TSC frequency, XCRs, special registers, XSAVE, local APIC,
/// MSRs (TSC before TSC_DEADLINE), general-purpose registers, debug registers, events, MP state. (Firecracker,
/// `src/vmm/src/arch/x86_64/vcpu.rs` gives reasons.)
pub trait X86Vcpu {
    /// Segments, descriptor tables and control registers.
    ///
    /// # Errors
    /// [`AccelError::Backend`] if the platform refuses.
    fn get_sregs(&self) -> VcpuResult<X86Sregs> {
        Err(self.group_unsupported("special registers"))
    }

    /// Sets segments, descriptor tables and control registers; a pending interrupt is kept.
    ///
    /// # Errors
    /// [`AccelError::Backend`] if the platform refuses (an impossible combination of CR0, CR4 and EFER).
    fn set_sregs(&mut self, sregs: &X86Sregs) -> VcpuResult<()> {
        let _ = sregs;
        Err(self.group_unsupported("special registers"))
    }

    /// The MSRs that [`get_msrs`](X86Vcpu::get_msrs) can read and a snapshot should hold.
    ///
    /// # Errors
    /// [`AccelError::Backend`] if the platform refuses.
    fn msr_indices(&self) -> VcpuResult<Vec<u32>> {
        Err(self.group_unsupported("MSRs"))
    }

    /// Reads MSRs, in the order of `indices`.
    ///
    /// # Errors
    /// [`AccelError::Msr`] names the first that was refused.
    fn get_msrs(&self, indices: &[u32]) -> VcpuResult<Vec<X86Msr>> {
        let _ = indices;
        Err(self.group_unsupported("MSRs"))
    }

    /// Writes MSRs in order.
    ///
    /// # Errors
    /// [`AccelError::Msr`] names the first that was refused; those before it took effect.
    fn set_msrs(&mut self, msrs: &[X86Msr]) -> VcpuResult<()> {
        let _ = msrs;
        Err(self.group_unsupported("MSRs"))
    }

    /// The CPUID that the backend can offer to a guest on this host.
    ///
    /// # Errors
    /// [`AccelError::Backend`] if the platform refuses.
    fn supported_cpuid(&self) -> VcpuResult<Vec<CpuidEntry>> {
        Err(self.group_unsupported("CPUID"))
    }

    /// The CPUID that the guest sees.
    ///
    /// # Errors
    /// [`AccelError::Backend`] if the platform refuses.
    fn get_cpuid(&self) -> VcpuResult<Vec<CpuidEntry>> {
        Err(self.group_unsupported("CPUID"))
    }

    /// Sets the CPUID that the guest sees, before the first `run()`.
    ///
    /// # Errors
    /// [`AccelError::InvalidArgument`] for too many entries, [`AccelError::Backend`] if the platform refuses (KVM does
    /// after the first run).
    fn set_cpuid(&mut self, entries: &[CpuidEntry]) -> VcpuResult<()> {
        let _ = entries;
        Err(self.group_unsupported("CPUID"))
    }

    /// The XSAVE area in standard (not compacted) format, [`Capabilities::xsave_size`](crate::Capabilities) bytes.
    ///
    /// # Errors
    /// [`AccelError::Backend`] if the platform refuses.
    fn get_xsave(&self) -> VcpuResult<Vec<u8>> {
        Err(self.group_unsupported("XSAVE"))
    }

    /// Sets the XSAVE area in standard format.
    ///
    /// # Errors
    /// [`AccelError::InvalidArgument`] for another length, [`AccelError::Backend`] if the platform refuses.
    fn set_xsave(&mut self, area: &[u8]) -> VcpuResult<()> {
        let _ = area;
        Err(self.group_unsupported("XSAVE"))
    }

    /// The extended control registers.
    ///
    /// # Errors
    /// [`AccelError::Backend`] if the platform refuses.
    fn get_xcrs(&self) -> VcpuResult<Vec<Xcr>> {
        Err(self.group_unsupported("extended control registers"))
    }

    /// Sets extended control registers.
    ///
    /// # Errors
    /// [`AccelError::Backend`] if the platform refuses a value.
    fn set_xcrs(&mut self, xcrs: &[Xcr]) -> VcpuResult<()> {
        let _ = xcrs;
        Err(self.group_unsupported("extended control registers"))
    }

    /// The guest's debug registers.
    ///
    /// # Errors
    /// [`AccelError::Backend`] if the platform refuses.
    fn get_debug_regs(&self) -> VcpuResult<X86DebugRegs> {
        Err(self.group_unsupported("debug registers"))
    }

    /// Sets the guest's debug registers.
    ///
    /// # Errors
    /// [`AccelError::Backend`] if the platform refuses.
    fn set_debug_regs(&mut self, regs: &X86DebugRegs) -> VcpuResult<()> {
        let _ = regs;
        Err(self.group_unsupported("debug registers"))
    }

    /// Pending events.
    ///
    /// # Errors
    /// [`AccelError::Backend`] if the platform refuses.
    fn get_events(&self) -> VcpuResult<X86Events> {
        Err(self.group_unsupported("pending events"))
    }

    /// Sets pending events. Set the general-purpose registers before, not after.
    ///
    /// # Errors
    /// [`AccelError::InvalidArgument`] for an impossible vector, [`AccelError::Backend`] if the platform refuses.
    fn set_events(&mut self, events: &X86Events) -> VcpuResult<()> {
        let _ = events;
        Err(self.group_unsupported("pending events"))
    }

    /// The local APIC's registers; needs an in-kernel or split interrupt controller, or a backend that emulates one.
    ///
    /// # Errors
    /// [`AccelError::Unsupported`] without a local APIC.
    fn get_lapic(&self) -> VcpuResult<LapicState> {
        Err(self.group_unsupported("a local APIC"))
    }

    /// Sets the local APIC's registers.
    ///
    /// # Errors
    /// [`AccelError::Unsupported`] without a local APIC.
    fn set_lapic(&mut self, lapic: &LapicState) -> VcpuResult<()> {
        let _ = lapic;
        Err(self.group_unsupported("a local APIC"))
    }

    /// What the CPU is doing.
    ///
    /// # Errors
    /// [`AccelError::Backend`] if the platform refuses.
    fn get_mp_state(&self) -> VcpuResult<MpState> {
        Err(self.group_unsupported("MP state"))
    }

    /// Sets what the CPU is doing.
    ///
    /// # Errors
    /// [`AccelError::Backend`] if the platform refuses.
    fn set_mp_state(&mut self, state: MpState) -> VcpuResult<()> {
        let _ = state;
        Err(self.group_unsupported("MP state"))
    }

    /// Frequency of the guest's time-stamp counter in kHz.
    ///
    /// # Errors
    /// [`AccelError::Unsupported`] if the platform does not tell.
    fn get_tsc_khz(&self) -> VcpuResult<u32> {
        Err(self.group_unsupported("the TSC frequency"))
    }

    /// Sets the frequency of the guest's time-stamp counter.
    ///
    /// # Errors
    /// [`AccelError::Unsupported`] if the hardware cannot scale.
    fn set_tsc_khz(&mut self, khz: u32) -> VcpuResult<()> {
        let _ = khz;
        Err(self.group_unsupported("setting the TSC frequency"))
    }

    /// The guest's time-stamp counter, now.
    ///
    /// # Errors
    /// [`AccelError::Backend`] if the platform refuses.
    fn get_tsc(&self) -> VcpuResult<u64> {
        Err(self.group_unsupported("the TSC"))
    }

    /// Sets the guest's time-stamp counter.
    ///
    /// # Errors
    /// [`AccelError::Backend`] if the platform refuses.
    fn set_tsc(&mut self, value: u64) -> VcpuResult<()> {
        let _ = value;
        Err(self.group_unsupported("the TSC"))
    }

    /// Injects an external interrupt at the next `run()`; for use without a local APIC in the platform.
    ///
    /// # Errors
    /// [`AccelError::InvalidArgument`] if the guest cannot take it now
    /// ([`ready_for_interrupt`](X86Vcpu::ready_for_interrupt)), [`AccelError::Unsupported`] if the platform has the
    /// local APIC.
    fn inject_interrupt(&mut self, vector: u8) -> VcpuResult<()> {
        let _ = vector;
        Err(self.group_unsupported("injecting interrupts"))
    }

    /// True if the guest could take an external interrupt at the last exit.
    ///
    /// # Errors
    /// [`AccelError::Unsupported`] if the platform has the local APIC.
    fn ready_for_interrupt(&self) -> VcpuResult<bool> {
        Err(self.group_unsupported("injecting interrupts"))
    }

    /// Asks for an exit with [`VcpuExit::InterruptWindow`](crate::VcpuExit::InterruptWindow) as soon as the guest can
    /// take an interrupt.
    ///
    /// # Errors
    /// [`AccelError::Unsupported`] if the platform has the local APIC.
    fn request_interrupt_window(&mut self, wanted: bool) -> VcpuResult<()> {
        let _ = wanted;
        Err(self.group_unsupported("interrupt windows"))
    }

    /// Makes a non-maskable interrupt pending.
    ///
    /// # Errors
    /// [`AccelError::Unsupported`] if the platform cannot.
    fn inject_nmi(&mut self) -> VcpuResult<()> {
        Err(self.group_unsupported("injecting NMIs"))
    }

    /// The guest physical address behind a linear address, by the guest's page tables; `None` if nothing is mapped.
    ///
    /// # Errors
    /// [`AccelError::Backend`] if the platform refuses.
    fn translate(&self, linear: u64) -> VcpuResult<Option<u64>> {
        let _ = linear;
        Err(self.group_unsupported("address translation"))
    }

    /// Makes RDMSR and WRMSR that the platform would answer with a general protection fault exit as
    /// [`VcpuExit::Msr`](crate::VcpuExit::Msr) instead; holds for every vCPU of the virtual machine.
    ///
    /// # Errors
    /// [`AccelError::Unsupported`] if the platform cannot.
    fn exit_on_unknown_msrs(&mut self, wanted: bool) -> VcpuResult<()> {
        let _ = wanted;
        Err(self.group_unsupported("MSR exits"))
    }

    /// An [`AccelError::Unsupported`] of this vCPU's backend.
    fn group_unsupported(&self, what: &'static str) -> AccelError {
        AccelError::Unsupported { kind: None, what }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> X86FpuRegs {
        X86FpuRegs {
            st: std::array::from_fn(|i| 0x4000_8000_0000_0000_0000u128 + i as u128),
            fcw: 0x27f,
            fsw: 0x3800,
            ftw: 0x81,
            fop: 0x123,
            fip: 0x1122_3344_5566_7788,
            fdp: 0x8877_6655_4433_2211,
            xmm: std::array::from_fn(|i| u128::MAX / (i as u128 + 1)),
            mxcsr: 0x9f80,
        }
    }

    #[test]
    fn fxsave_image_round_trips() {
        let mut image = [0; FXSAVE_SIZE];
        sample().write_fxsave(&mut image);
        assert_eq!(X86FpuRegs::from_fxsave(&image), sample());
    }

    #[test]
    fn xsave_without_mark_reads_as_initial_state() {
        let mut area = vec![0; 4096];
        sample().write_xsave(&mut area).unwrap();
        assert_eq!(X86FpuRegs::from_xsave(&area).unwrap(), sample());
        area[XSTATE_BV] = 0;
        let initial = X86FpuRegs { mxcsr: sample().mxcsr, ..X86FpuRegs::default() };
        assert_eq!(X86FpuRegs::from_xsave(&area).unwrap(), initial);
        assert!(X86FpuRegs::from_xsave(&area[..515]).is_err());
    }

    #[test]
    fn reserved_mxcsr_bits_are_refused() {
        let regs = X86FpuRegs { mxcsr: 0x1_0000, ..sample() };
        assert!(regs.check(0xffff).is_err());
        assert!(sample().check(0).is_ok());
    }

    #[test]
    fn descriptors_match_the_manual() {
        assert_eq!(Segment::code64(8, 0).descriptor(), 0x00af_9b00_0000_ffff);
        assert_eq!(Segment::flat_data(16, 0).descriptor(), 0x00cf_9300_0000_ffff);
        assert_eq!(Segment::flat_code32(8, 3).descriptor(), 0x00cf_fb00_0000_ffff);
        assert_eq!(Segment::busy_tss(24, 0x1234_5678, 0x67).descriptor(), 0x1200_8b34_5678_0067);
    }
}
