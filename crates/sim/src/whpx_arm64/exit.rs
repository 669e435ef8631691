//! What the platform tells about an exit, and what it leaves undefined.

use super::vp::Inner;
use crate::a64::{Trap, class};
use vm_accel_sys::whpx::aarch64::{
    ExecutionState, ExitContext, Hypercall, InterceptHeader, MemoryAccess, MemoryAccessInfo, Reset, exit_reason,
};

/// The bits of a data abort's syndrome that say what the instruction does, and that which says that they do (Arm ARM,
/// D24.2.40).
const TOLD: u64 = 0x1ff << 15 | 1 << 24;
const VALID: u64 = 1 << 24;
const WRITE: u64 = 1 << 6;

impl Inner {
    fn header(&self, pc: u64, access_type: u8) -> InterceptHeader {
        InterceptHeader {
            vp_index: self.index,
            instruction_length: 4,
            access_type,
            execution_state: ExecutionState(0).with_cpl((self.cpu.pstate >> 2 & 3) as u16),
            pc,
            cpsr: self.cpu.pstate,
        }
    }

    /// The register's idea of where the program counter stands, which nobody documents.
    fn misplace_pc(&mut self, pc: u64) {
        self.cpu.pc = if self.mischief.one_in(3) { pc.wrapping_add(4) } else { pc };
    }

    /// An exit without a payload: the rest is what happens to stand there.
    pub(super) fn leave(&mut self, reason: u32, context: &mut ExitContext) {
        context.set_garbage(reason, self.garbage.draw());
    }

    /// An abort of stage 2.
    pub(super) fn abort(&mut self, trap: Trap, is_mapped: bool, word: Option<u32>, context: &mut ExitContext) {
        let Trap { mut syndrome, far, ipa } = trap;
        let pc = self.cpu.pc;
        let is_data = syndrome >> 26 == class::DATA_ABORT;
        if is_data && self.mischief.one_in(4) {
            syndrome &= !TOLD;
        }
        if is_data && syndrome & VALID == 0 {
            syndrome |= self.garbage.draw() & TOLD & !VALID;
        }
        let access_type = match (is_data, syndrome & WRITE != 0) {
            (false, _) => 2,
            (true, true) => 1,
            (true, false) => 0,
        };
        let gva = (!self.mischief.one_in(4)).then_some(far);
        let word = word.filter(|_| !self.mischief.one_in(2));
        let garbage = self.garbage.draw();
        let access = MemoryAccess {
            header: self.header(pc, access_type),
            instruction_byte_count: if word.is_some() { 4 } else { 0 },
            instruction_bytes: word.unwrap_or(garbage as u32).to_le_bytes(),
            access_info: MemoryAccessInfo(0)
                .with_gva_valid(u8::from(gva.is_some()))
                .with_gva_gpa_valid(u8::from(gva.is_some())),
            gva: gva.unwrap_or(garbage),
            gpa: ipa,
            syndrome,
            ..MemoryAccess::default()
        };
        let reason = if is_mapped { exit_reason::GPA_INTERCEPT } else { exit_reason::UNMAPPED_GPA };
        self.leave(reason, context);
        context.set_memory_access(reason, access);
        self.misplace_pc(pc);
    }

    /// A call, whose instruction is at `pc`.
    pub(super) fn hypercall(&mut self, pc: u64, immediate: u16, context: &mut ExitContext) {
        let x = std::array::from_fn(|n| self.cpu.x[n]);
        let call = Hypercall { header: self.header(pc, 2), immediate, x, ..Hypercall::default() };
        context.set_hypercall(call);
        self.misplace_pc(pc);
    }

    pub(super) fn reset_request(&mut self, pc: u64, reset_type: u32, context: &mut ExitContext) {
        self.leave(exit_reason::ARM64_RESET, context);
        context.set_reset(Reset { header: self.header(pc, 2), reset_type, reserved: 0 });
    }
}
