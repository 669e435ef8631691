//! Exit contexts: what each reason tells, and garbage everywhere else.

use super::registers::segment;
use super::vp::Inner;
use vm_accel_softcpu::state::seg;
use vm_accel_softcpu::{CpuState, Exception};
use vm_accel_sys::whpx::x86_64::ExitContext;
use vm_accel_sys::whpx::x86_64::defs::*;
use vm_accel_sys::whpx::x86_64::fields::{
    ExceptionInfo, ExecutionState, IoAccessInfo, LengthAndCr8, MemoryAccessInfo, MsrAccessInfo,
};

/// The prefixes of an instruction, and its opcode.
struct Shape {
    is_string: bool,
    has_rep: bool,
}

/// Whether a port instruction is a string instruction, and repeated.
fn shape(bytes: &[u8], is_long: bool) -> Shape {
    let mut has_rep = false;
    for byte in bytes {
        match byte {
            0xf2 | 0xf3 => has_rep = true,
            0x26 | 0x2e | 0x36 | 0x3e | 0x64..=0x67 | 0xf0 => {}
            0x40..=0x4f if is_long => {}
            opcode => return Shape { is_string: (0x6c..=0x6f).contains(opcode), has_rep },
        }
    }
    Shape { is_string: false, has_rep }
}

impl Inner {
    fn execution_state(&self, st: &CpuState) -> ExecutionState {
        let events = &st.events;
        let bit = |set: bool| u16::from(set);
        ExecutionState(0)
            .with_cpl(st.cpl.into())
            .with_cr0_pe(bit(st.cr0 & 1 != 0))
            .with_cr0_am(bit(st.cr0 >> 18 & 1 != 0))
            .with_efer_lma(bit(st.msr.efer >> 10 & 1 != 0))
            .with_debug_active(bit(st.dr7 & 0xff != 0))
            .with_interruption_pending(bit(events.interrupt.is_some() || events.exception.is_some() || events.nmi))
            .with_interrupt_shadow(bit(events.sti_shadow || events.mov_ss_shadow))
    }

    /// The part that all exits have; the payload is garbage afterwards.
    pub(super) fn leave(&mut self, reason: WHV_RUN_VP_EXIT_REASON, context: &mut ExitContext) {
        let cr8 = self.cpu.bus_mut().cr8();
        let st = self.cpu.state().clone();
        let raw = &mut context.0;
        raw.ExitReason = reason;
        raw.Reserved = 0;
        raw.VpContext = WHV_VP_EXIT_CONTEXT {
            _bitfield: LengthAndCr8(0).with_cr8(cr8).0,
            Cs: segment(&st.segs[seg::CS]).into(),
            Rip: st.rip,
            Rflags: st.rflags,
            ..WHV_VP_EXIT_CONTEXT::default()
        };
        raw.VpContext.ExecutionState.AsUINT16 = self.execution_state(&st).0;
        let mut garbage = WHV_HYPERCALL_CONTEXT::default();
        garbage.XmmRegisters.iter_mut().for_each(|xmm| xmm.Dword = [self.garbage.draw() as u32; 4]);
        for word in [
            &mut garbage.Rax,
            &mut garbage.Rbx,
            &mut garbage.Rcx,
            &mut garbage.Rdx,
            &mut garbage.R8,
            &mut garbage.Rsi,
            &mut garbage.Rdi,
        ] {
            *word = self.garbage.draw();
        }
        // The largest payload, so that all bytes are covered.
        raw.Anonymous.Hypercall = garbage;
    }

    fn set_length(context: &mut ExitContext, length: u8) {
        let field = &mut context.0.VpContext._bitfield;
        *field = LengthAndCr8(*field).with_instruction_length(length).0;
    }

    /// Instruction bytes as the platform tells them: perhaps all 16, perhaps none.
    fn bytes(&mut self) -> (u8, [u8; 16]) {
        let (bytes, _) = self.cpu.peek().unwrap_or_default();
        let mut all: [u8; 16] = [self.garbage.draw() as u8; 16];
        let mut count = bytes.len();
        if self.mischief.one_in(2) {
            count = self.mischief.draw() as usize % (count + 1);
        }
        all[..count].copy_from_slice(&bytes[..count]);
        (count as u8, all)
    }

    pub(super) fn io(&mut self, port: u16, size: u8, write: bool, context: &mut ExitContext) {
        self.leave(WHvRunVpExitReasonX64IoPortAccess, context);
        let st = self.cpu.state().clone();
        let (bytes, length) = self.cpu.peek().unwrap_or_default();
        let shape = shape(&bytes, st.segs[seg::CS].long() && st.msr.efer >> 10 & 1 != 0);
        let (count, instruction) = self.bytes();
        Self::set_length(context, length);
        let info = IoAccessInfo(0)
            .with_is_write(write.into())
            .with_access_size(size.into())
            .with_string_op(shape.is_string.into())
            .with_rep_prefix((shape.is_string && shape.has_rep).into());
        context.0.Anonymous.IoPortAccess = WHV_X64_IO_PORT_ACCESS_CONTEXT {
            InstructionByteCount: count,
            Reserved: [0; 3],
            InstructionBytes: instruction,
            AccessInfo: WHV_X64_IO_PORT_ACCESS_INFO { AsUINT32: info.0 },
            PortNumber: port,
            Reserved2: [0; 3],
            Rax: st.gpr[0],
            Rcx: st.gpr[1],
            Rsi: st.gpr[6],
            Rdi: st.gpr[7],
            Ds: segment(&st.segs[seg::DS]).into(),
            Es: segment(&st.segs[seg::ES]).into(),
        };
    }

    pub(super) fn memory(&mut self, gpa: u64, access: i32, unmapped: bool, context: &mut ExitContext) {
        self.leave(WHvRunVpExitReasonMemoryAccess, context);
        let (count, instruction) = self.bytes();
        let info = MemoryAccessInfo(0).with_access_type(access as u32).with_gpa_unmapped(unmapped.into());
        context.0.Anonymous.MemoryAccess = WHV_MEMORY_ACCESS_CONTEXT {
            InstructionByteCount: count,
            Reserved: [0; 3],
            InstructionBytes: instruction,
            AccessInfo: WHV_MEMORY_ACCESS_INFO { AsUINT32: info.0 },
            Gpa: gpa,
            // Not valid, and not said to be.
            Gva: self.garbage.draw(),
        };
    }

    pub(super) fn halt(&mut self, context: &mut ExitContext) {
        self.leave(WHvRunVpExitReasonX64Halt, context);
        // The register is behind HLT. What the context says is documented nowhere.
        context.0.VpContext.Rip = self.garbage.draw();
        Self::set_length(context, self.garbage.draw() as u8);
    }

    pub(super) fn msr(&mut self, index: u32, write: bool, context: &mut ExitContext) {
        self.leave(WHvRunVpExitReasonX64MsrAccess, context);
        let length = self.cpu.peek().map_or(0, |(_, length)| length);
        Self::set_length(context, length);
        let st = self.cpu.state();
        context.0.Anonymous.MsrAccess = WHV_X64_MSR_ACCESS_CONTEXT {
            AccessInfo: WHV_X64_MSR_ACCESS_INFO { AsUINT32: MsrAccessInfo(0).with_is_write(write.into()).0 },
            MsrNumber: index,
            Rax: st.gpr[0],
            Rdx: st.gpr[2],
        };
    }

    pub(super) fn cpuid(&mut self, context: &mut ExitContext) {
        self.leave(WHvRunVpExitReasonX64Cpuid, context);
        let length = self.cpu.peek().map_or(0, |(_, length)| length);
        Self::set_length(context, length);
        let [eax, ebx, ecx, edx] = self.cpuid_output(None);
        let st = self.cpu.state();
        context.0.Anonymous.CpuidAccess = WHV_X64_CPUID_ACCESS_CONTEXT {
            Rax: st.gpr[0],
            Rcx: st.gpr[1],
            Rdx: st.gpr[2],
            Rbx: st.gpr[3],
            DefaultResultRax: eax.into(),
            DefaultResultRcx: ecx.into(),
            DefaultResultRdx: edx.into(),
            DefaultResultRbx: ebx.into(),
        };
    }

    /// What CPUID answers for a leaf and subleaf, or for those in the registers.
    pub(super) fn cpuid_output(&self, of: Option<(u32, u32)>) -> [u32; 4] {
        let st = self.cpu.state();
        let (leaf, subleaf) = of.unwrap_or((st.gpr[0] as u32, st.gpr[1] as u32));
        let entries = self.cpu.cpuid();
        let found = |wanted: u32| {
            let of_leaf = || entries.iter().filter(move |entry| entry.leaf == wanted);
            let exact = of_leaf().find(|entry| entry.subleaf == subleaf);
            exact.or_else(|| of_leaf().next().filter(|_| of_leaf().count() == 1))
        };
        found(leaf).map_or([0; 4], |entry| [entry.eax, entry.ebx, entry.ecx, entry.edx])
    }

    pub(super) fn rdtsc(&mut self, p: bool, context: &mut ExitContext) {
        self.leave(WHvRunVpExitReasonX64Rdtsc, context);
        let tsc = self.cpu.tsc();
        context.0.Anonymous.ReadTsc = WHV_X64_RDTSC_CONTEXT {
            TscAux: self.cpu.state().msr.tsc_aux,
            VirtualOffset: 0,
            Tsc: tsc,
            ReferenceTime: tsc / 100,
            RdtscInfo: WHV_X64_RDTSC_INFO { AsUINT64: p.into() },
        };
    }

    pub(super) fn exception(&mut self, exception: Exception, context: &mut ExitContext) {
        self.leave(WHvRunVpExitReasonException, context);
        let (count, instruction) = self.bytes();
        let info = ExceptionInfo(0)
            .with_error_code_valid(exception.error_code().is_some().into())
            .with_software_exception(exception.is_trap().into());
        context.0.Anonymous.VpException = WHV_VP_EXCEPTION_CONTEXT {
            InstructionByteCount: count,
            Reserved: [0; 3],
            InstructionBytes: instruction,
            ExceptionInfo: WHV_VP_EXCEPTION_INFO { AsUINT32: info.0 },
            ExceptionType: exception.vector(),
            Reserved2: [0; 3],
            ErrorCode: exception.error_code().unwrap_or(self.garbage.draw() as u32),
            ExceptionParameter: match exception {
                Exception::Pf { addr, .. } => addr,
                Exception::Db(dr6) => dr6,
                _ => self.garbage.draw(),
            },
        };
    }

    pub(super) fn hypercall(&mut self, context: &mut ExitContext) {
        self.leave(WHvRunVpExitReasonHypercall, context);
        Self::set_length(context, 3);
        let st = self.cpu.state();
        context.0.Anonymous.Hypercall = WHV_HYPERCALL_CONTEXT {
            Rax: st.gpr[0],
            Rbx: st.gpr[3],
            Rcx: st.gpr[1],
            Rdx: st.gpr[2],
            R8: st.gpr[8],
            Rsi: st.gpr[6],
            Rdi: st.gpr[7],
            ..WHV_HYPERCALL_CONTEXT::default()
        };
    }

    pub(super) fn window(&mut self, kind: i32, context: &mut ExitContext) {
        self.leave(WHvRunVpExitReasonX64InterruptWindow, context);
        context.0.Anonymous.InterruptWindow = WHV_X64_INTERRUPTION_DELIVERABLE_CONTEXT { DeliverableType: kind };
    }

    pub(super) fn canceled(&mut self, context: &mut ExitContext) {
        self.leave(WHvRunVpExitReasonCanceled, context);
        context.0.Anonymous.CancelReason = WHV_RUN_VP_CANCELED_CONTEXT { CancelReason: WHvRunVpCancelReasonUser };
    }

    pub(super) fn init_sipi(&mut self, icr: u64, context: &mut ExitContext) {
        self.leave(WHvRunVpExitReasonX64ApicInitSipiTrap, context);
        context.0.Anonymous.ApicInitSipi = WHV_X64_APIC_INIT_SIPI_CONTEXT { ApicIcr: icr };
    }

    pub(super) fn end_of_interrupt(&mut self, vector: u8, context: &mut ExitContext) {
        self.leave(WHvRunVpExitReasonX64ApicEoi, context);
        context.0.Anonymous.ApicEoi = WHV_X64_APIC_EOI_CONTEXT { InterruptVector: vector.into() };
    }

    /// An exit that a platform may make for reasons of its own; false if none is possible now.
    pub(super) fn leave_for_nothing(&mut self, context: &mut ExitContext) -> bool {
        match self.mischief.draw() % 4 {
            0 => self.leave(WHvRunVpExitReasonNone, context),
            1 => self.canceled(context),
            // Memory that is mapped but not yet there: the caller runs again, or emulates the instruction.
            _ => {
                let st = self.cpu.state();
                let long = st.segs[seg::CS].long() && st.msr.efer >> 10 & 1 != 0;
                let base = if long { 0 } else { st.segs[seg::CS].base };
                let lin = base.wrapping_add(st.rip);
                let Some(gpa) = self.cpu.translate(lin) else {
                    return false;
                };
                let access = self.mischief.pick(&[WHvMemoryAccessExecute, WHvMemoryAccessRead, WHvMemoryAccessWrite]);
                self.memory(gpa, access, false, context);
            }
        }
        true
    }
}
