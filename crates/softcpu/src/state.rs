//! The architectural state of one CPU, and nothing else: what a save must hold and a restore brings back.
//! Derived state (TLB, mode key, cached blocks) lives in `core` and is recomputed from here.

/// RFLAGS bits (SDM vol. 1, 3.4.3).
pub mod rflags {
    /// Carry.
    pub const CF: u64 = 1 << 0;
    /// Always one.
    pub const FIXED: u64 = 1 << 1;
    /// Parity.
    pub const PF: u64 = 1 << 2;
    /// Auxiliary carry.
    pub const AF: u64 = 1 << 4;
    /// Zero.
    pub const ZF: u64 = 1 << 6;
    /// Sign.
    pub const SF: u64 = 1 << 7;
    /// Trap: single step.
    pub const TF: u64 = 1 << 8;
    /// Interrupt enable.
    pub const IF: u64 = 1 << 9;
    /// Direction.
    pub const DF: u64 = 1 << 10;
    /// Overflow.
    pub const OF: u64 = 1 << 11;
    /// I/O privilege level, two bits.
    pub const IOPL: u64 = 3 << 12;
    /// Nested task.
    pub const NT: u64 = 1 << 14;
    /// Resume.
    pub const RF: u64 = 1 << 16;
    /// Virtual-8086 mode.
    pub const VM: u64 = 1 << 17;
    /// Alignment check, and SMAP override.
    pub const AC: u64 = 1 << 18;
    /// Virtual interrupt flag.
    pub const VIF: u64 = 1 << 19;
    /// Virtual interrupt pending.
    pub const VIP: u64 = 1 << 20;
    /// CPUID can be used if this can be changed.
    pub const ID: u64 = 1 << 21;
    /// The six arithmetic flags.
    pub const ARITH: u64 = CF | PF | AF | ZF | SF | OF;
    /// All flags that exist.
    pub const ALL: u64 = ARITH | TF | IF | DF | IOPL | NT | RF | VM | AC | VIF | VIP | ID;
}

/// CR0 bits (SDM vol. 3A, 2.5).
pub mod cr0 {
    /// Protection enable.
    pub const PE: u64 = 1 << 0;
    /// Monitor coprocessor.
    pub const MP: u64 = 1 << 1;
    /// Emulation: no x87.
    pub const EM: u64 = 1 << 2;
    /// Task switched.
    pub const TS: u64 = 1 << 3;
    /// Extension type, always one.
    pub const ET: u64 = 1 << 4;
    /// Numeric error: #MF rather than the external interrupt.
    pub const NE: u64 = 1 << 5;
    /// Write protect.
    pub const WP: u64 = 1 << 16;
    /// Alignment mask.
    pub const AM: u64 = 1 << 18;
    /// Not write-through.
    pub const NW: u64 = 1 << 29;
    /// Cache disable.
    pub const CD: u64 = 1 << 30;
    /// Paging.
    pub const PG: u64 = 1 << 31;
    /// All bits that exist.
    pub const ALL: u64 = PE | MP | EM | TS | ET | NE | WP | AM | NW | CD | PG;
}

/// CR4 bits (SDM vol. 3A, 2.5).
pub mod cr4 {
    /// Virtual-8086 mode extensions.
    pub const VME: u64 = 1 << 0;
    /// Protected-mode virtual interrupts.
    pub const PVI: u64 = 1 << 1;
    /// RDTSC only at CPL 0.
    pub const TSD: u64 = 1 << 2;
    /// Debugging extensions: DR4 and DR5 are #UD.
    pub const DE: u64 = 1 << 3;
    /// 4 MiB pages in 32-bit paging.
    pub const PSE: u64 = 1 << 4;
    /// Physical address extension.
    pub const PAE: u64 = 1 << 5;
    /// Machine check.
    pub const MCE: u64 = 1 << 6;
    /// Global pages.
    pub const PGE: u64 = 1 << 7;
    /// RDPMC at any CPL.
    pub const PCE: u64 = 1 << 8;
    /// FXSAVE, FXRSTOR and SSE.
    pub const OSFXSR: u64 = 1 << 9;
    /// #XM for SIMD floating-point exceptions.
    pub const OSXMMEXCPT: u64 = 1 << 10;
    /// SGDT, SIDT, SLDT, SMSW, STR only at CPL 0.
    pub const UMIP: u64 = 1 << 11;
    /// RDFSBASE and the like.
    pub const FSGSBASE: u64 = 1 << 16;
    /// XSAVE and XCR0.
    pub const OSXSAVE: u64 = 1 << 18;
    /// No execution of user pages by the supervisor.
    pub const SMEP: u64 = 1 << 20;
    /// No access to user pages by the supervisor.
    pub const SMAP: u64 = 1 << 21;
}

/// EFER bits (SDM vol. 3A, 2.2.1).
pub mod efer {
    /// SYSCALL enable.
    pub const SCE: u64 = 1 << 0;
    /// Long mode enable.
    pub const LME: u64 = 1 << 8;
    /// Long mode active.
    pub const LMA: u64 = 1 << 10;
    /// No-execute enable.
    pub const NXE: u64 = 1 << 11;
}

/// Segment register numbers, as encoded in instructions.
pub mod seg {
    /// ES.
    pub const ES: usize = 0;
    /// CS.
    pub const CS: usize = 1;
    /// SS.
    pub const SS: usize = 2;
    /// DS.
    pub const DS: usize = 3;
    /// FS.
    pub const FS: usize = 4;
    /// GS.
    pub const GS: usize = 5;
}

/// A segment register with its hidden part; LDTR and TR too.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    /// Visible selector.
    pub selector: u16,
    /// Linear base address.
    pub base: u64,
    /// Highest offset (lowest less one, for expand-down), granularity applied.
    pub limit: u32,
    /// Access rights as bits 8 to 23 of the descriptor's high doubleword, moved down by eight: type 0-3, S 4, DPL 5-6, P 7, AVL 12,
    /// L 13, D/B 14, G 15. The limit's bits 8-11 read as zero.
    pub access: u16,
    /// Cannot be used: a null selector was loaded.
    pub unusable: bool,
}

impl Segment {
    /// Descriptor type, four bits.
    #[must_use]
    pub fn kind(&self) -> u8 {
        self.access as u8 & 15
    }
    /// Descriptor privilege level.
    #[must_use]
    pub fn dpl(&self) -> u8 {
        self.access as u8 >> 5 & 3
    }
    /// 64-bit code segment.
    #[must_use]
    pub fn long(&self) -> bool {
        self.access & 1 << 13 != 0
    }
    /// D/B: default size 32 bits, or 32-bit stack pointer, or 4 GiB upper bound.
    #[must_use]
    pub fn big(&self) -> bool {
        self.access & 1 << 14 != 0
    }
    /// Code rather than data.
    #[must_use]
    pub fn is_code(&self) -> bool {
        self.access & 8 != 0
    }
    /// A real-mode segment: base is 16 times the selector.
    #[must_use]
    pub fn real(selector: u16, code: bool) -> Self {
        Segment {
            selector,
            base: u64::from(selector) << 4,
            limit: 0xffff,
            access: if code { 0x9b } else { 0x93 },
            unusable: false,
        }
    }
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Table {
    /// Linear base address.
    pub base: u64,
    /// Highest byte offset.
    pub limit: u16,
}

/// x87 and MMX registers and control. MMX register `i` is `sig[i]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct X87 {
    /// Significands of the physical registers R0 to R7.
    pub sig: [u64; 8],
    /// Signs and exponents of R0 to R7.
    pub sign_exp: [u16; 8],
    /// Control word.
    pub fcw: u16,
    /// Status word with TOP in bits 11-13.
    pub fsw: u16,
    /// Bit `i` set: R`i` is not empty (the abridged tag of FXSAVE).
    pub valid: u8,
    /// Last opcode, 11 bits.
    pub fop: u16,
    /// Last instruction pointer.
    pub fip: u64,
    /// Last instruction's code selector.
    pub fcs: u16,
    /// Last data pointer.
    pub fdp: u64,
    /// Last data selector.
    pub fds: u16,
}

impl Default for X87 {
    /// The state after FNINIT.
    fn default() -> Self {
        X87 { sig: [0; 8], sign_exp: [0; 8], fcw: 0x37f, fsw: 0, valid: 0, fop: 0, fip: 0, fcs: 0, fdp: 0, fds: 0 }
    }
}

/// Model-specific registers that the CPU itself serves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "each is named as in the manual, SDM vol. 4")]
pub struct Msrs {
    pub efer: u64,
    pub star: u64,
    pub lstar: u64,
    pub cstar: u64,
    pub fmask: u64,
    pub kernel_gs_base: u64,
    pub tsc_aux: u64,
    pub tsc_adjust: u64,
    pub sysenter_cs: u64,
    pub sysenter_esp: u64,
    pub sysenter_eip: u64,
    pub pat: u64,
    pub misc_enable: u64,
    pub mtrr_def_type: u64,
    pub mtrr_fixed: [u64; 11],
    /// PHYSBASE0, PHYSMASK0, PHYSBASE1, ...
    pub mtrr_var: [u64; 16],
    pub debugctl: u64,
    pub xss: u64,
    pub spec_ctrl: u64,
    pub bios_sign_id: u64,
}

/// What waits to be delivered to a CPU, and what holds delivery back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Events {
    /// An external interrupt in delivery: accepted, and delivered before the next instruction whatever IF says.
    pub interrupt: Option<u8>,
    /// A non-maskable interrupt waits.
    pub nmi: bool,
    /// NMIs are blocked until IRET.
    pub nmi_blocked: bool,
    /// An exception that was injected and is not yet delivered.
    pub exception: Option<crate::Exception>,
    /// The previous instruction was STI (with IF clear before): interrupts wait one instruction.
    pub sti_shadow: bool,
    /// The previous instruction was MOV SS or POP SS: interrupts and debug traps wait one instruction.
    pub mov_ss_shadow: bool,
    /// DR6 bits of data breakpoints that MOV SS or POP SS hit: a #DB behind the next instruction, 0 if there are none.
    pub debug_trap: u64,
    /// The CPU waits in HLT.
    pub halted: bool,
    /// Triple fault: nothing runs until a reset.
    pub shutdown: bool,
}

/// The whole architectural state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuState {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15; the entries from 16 on are always zero (16 stands for "no register" in
    /// address computations).
    pub gpr: [u64; 32],
    /// Instruction pointer.
    pub rip: u64,
    /// RFLAGS. While the CPU runs, the arithmetic flags are kept elsewhere: use the accessors of `Core`.
    pub rflags: u64,
    /// ES, CS, SS, DS, FS, GS; the entries 6 and 7 are flat and stand for "no segment".
    pub segs: [Segment; 8],
    /// Local descriptor table.
    pub ldtr: Segment,
    /// Task register.
    pub tr: Segment,
    /// Global descriptor table.
    pub gdtr: Table,
    /// Interrupt descriptor table.
    pub idtr: Table,
    /// Control register 0.
    pub cr0: u64,
    /// Page fault address.
    pub cr2: u64,
    /// Page table base.
    pub cr3: u64,
    /// Control register 4.
    pub cr4: u64,
    /// DR0 to DR3: breakpoint addresses.
    pub dr: [u64; 4],
    /// Debug status.
    pub dr6: u64,
    /// Debug control.
    pub dr7: u64,
    /// Extended control register 0: the enabled XSAVE components.
    pub xcr0: u64,
    /// Model-specific registers.
    pub msr: Msrs,
    /// x87 and MMX.
    pub x87: X87,
    /// XMM0 to XMM15.
    pub xmm: [u128; 16],
    /// SSE control and status.
    pub mxcsr: u32,
    /// The four page-directory-pointer entries that PAE paging loaded with CR3.
    pub pdpte: [u64; 4],
    /// Current privilege level.
    pub cpl: u8,
    /// Pending events.
    pub events: Events,
}

impl CpuState {
    /// The state after power-up or INIT (SDM vol. 3A, table 9-1).
    #[must_use]
    pub fn reset() -> Self {
        let mut segs = [Segment::real(0, false); 8];
        segs[seg::CS] = Segment { base: 0xffff_0000, ..Segment::real(0xf000, true) };
        let flat = Segment { limit: u32::MAX, access: 0xc093, ..Segment::default() };
        segs[6] = flat;
        segs[7] = flat;
        let mut gpr = [0; 32];
        gpr[2] = 0x600;
        CpuState {
            gpr,
            rip: 0xfff0,
            rflags: rflags::FIXED,
            segs,
            ldtr: Segment { limit: 0xffff, access: 0x82, ..Segment::default() },
            tr: Segment { limit: 0xffff, access: 0x8b, ..Segment::default() },
            gdtr: Table { base: 0, limit: 0xffff },
            idtr: Table { base: 0, limit: 0xffff },
            cr0: cr0::CD | cr0::NW | cr0::ET,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            dr: [0; 4],
            dr6: 0xffff_0ff0,
            dr7: 0x400,
            xcr0: 1,
            msr: Msrs { pat: 0x0007_0406_0007_0406, misc_enable: 1, ..Msrs::default() },
            x87: X87 { fcw: 0x40, valid: 0xff, ..X87::default() },
            xmm: [0; 16],
            mxcsr: 0x1f80,
            pdpte: [0; 4],
            cpl: 0,
            events: Events::default(),
        }
    }
}
