//! What loads segment registers: MOV and POP of selectors, LDS and the like, far jumps, calls and returns, call gates, IRET, LLDT, LTR, and
//! the instructions that ask about selectors. Source: SDM vol. 2 (each page) and vol. 3A, chapter 5. Hardware task switching
//! is not offered: task gates and TSS selectors raise #GP.

use iced_x86::{Code, Instruction, Mnemonic, OpKind};

use super::form::{Word, by_size, has_memory};
use super::{Exec, Handler, Leave, Op};
use crate::core::Core;
use crate::exception::Exception;
use crate::mem::canonical;
use crate::segment::{Descriptor, is_null, kind};
use crate::state::{Segment, rflags, seg};

fn mov_from_seg<T: Word, const M: bool>(cpu: &mut Core, op: &Op) -> Exec {
    let value = cpu.st.segs[usize::from(op.s & 7)].selector;
    if M {
        return cpu.store(op, value);
    }
    cpu.set_reg::<T>(op.d, u64::from(value));
    Ok(())
}

fn mov_to_seg<const M: bool>(cpu: &mut Core, op: &Op) -> Exec {
    let index = usize::from(op.d & 7);
    if index == seg::CS {
        return cpu.raise(Exception::Ud);
    }
    let value = if M { cpu.load::<u16>(op)? } else { cpu.reg::<u16>(op.s) as u16 };
    cpu.load_segment(index, value)?;
    if index == seg::SS {
        cpu.st.events.mov_ss_shadow = true;
        return Err(Leave::Next);
    }
    Ok(())
}

/// LES, LDS, LSS, LFS, LGS.
fn load_pointer<T: Word, const SEG: usize>(cpu: &mut Core, op: &Op) -> Exec {
    let lin = cpu.linear(op, T::BYTES + 2, false)?;
    let offset = cpu.read_word::<T>(lin)?;
    let selector = cpu.read::<u16>(cpu.wrap(lin.wrapping_add(T::BYTES)))?;
    cpu.load_segment(SEG, selector)?;
    cpu.set_reg::<T>(op.d, offset);
    if SEG == seg::SS { Err(Leave::Next) } else { Ok(()) }
}

impl Core {
    /// Whether RIP may be `rip` in the code segment that `descriptor` describes.
    fn check_target(&mut self, descriptor: Descriptor, rip: u64) -> Exec {
        let inside = if self.long_mode() && descriptor.long() {
            canonical(rip)
        } else {
            rip <= u64::from(descriptor.segment(0).limit)
        };
        if inside { Ok(()) } else { self.raise(Exception::Gp(0)) }
    }

    /// The descriptor of a code segment that a far jump or call names directly, checked.
    fn direct_code(&mut self, selector: u16, descriptor: Descriptor) -> Exec {
        let error = selector & 0xfffc;
        let cpl = self.cpl();
        let allowed = if descriptor.conforming() {
            descriptor.dpl() <= cpl
        } else {
            (selector & 3) as u8 <= cpl && descriptor.dpl() == cpl
        };
        if !descriptor.is_code() || !allowed || self.long_mode() && descriptor.long() && descriptor.big() {
            return self.raise(Exception::Gp(error));
        }
        if !descriptor.present() {
            return self.raise(Exception::Np(error));
        }
        Ok(())
    }

    /// CS and RIP in real mode.
    fn real_far(&mut self, selector: u16, rip: u64) -> Exec {
        if rip > u64::from(self.st.segs[seg::CS].limit) {
            return self.raise(Exception::Gp(0));
        }
        let cs = &mut self.st.segs[seg::CS];
        cs.selector = selector;
        cs.base = u64::from(selector) << 4;
        self.st.rip = rip;
        self.segment_changed(seg::CS);
        Ok(())
    }

    fn far_jump(&mut self, selector: u16, rip: u64) -> Exec {
        if !self.protected() {
            self.real_far(selector, rip)?;
            return Err(Leave::Jump);
        }
        if is_null(selector) {
            return self.raise(Exception::Gp(0));
        }
        let mut descriptor = self.descriptor_or_gp(selector, 0)?;
        if descriptor.is_segment() {
            self.direct_code(selector, descriptor)?;
            self.check_target(descriptor, rip)?;
            self.set_accessed(selector, &mut descriptor)?;
            let cpl = self.cpl();
            self.set_cs(selector, descriptor, cpl, rip);
            return Err(Leave::Jump);
        }
        let (selector, mut code, rip, _) = self.call_gate(selector, descriptor)?;
        let cpl = self.cpl();
        let allowed = if code.conforming() { code.dpl() <= cpl } else { code.dpl() == cpl };
        if !allowed {
            return self.raise(Exception::Gp(selector & 0xfffc));
        }
        self.check_target(code, rip)?;
        self.set_accessed(selector, &mut code)?;
        self.set_cs(selector, code, cpl, rip);
        Err(Leave::Jump)
    }

    /// Checks a call gate and the code segment behind it: selector, descriptor, RIP, and the gate.
    fn call_gate(&mut self, selector: u16, gate: Descriptor) -> Exec<(u16, Descriptor, u64, Descriptor)> {
        let error = selector & 0xfffc;
        let long = self.long_mode();
        let wide = match gate.kind() {
            kind::CALL32 => true,
            kind::CALL16 if !long => false,
            _ => return self.raise(Exception::Gp(error)),
        };
        if gate.dpl() < self.cpl() || gate.dpl() < (selector & 3) as u8 {
            return self.raise(Exception::Gp(error));
        }
        let high = if long { self.descriptor_high(selector)? } else { 0 };
        if high >> 40 & 0x1f != 0 {
            return self.raise(Exception::Gp(error));
        }
        if !gate.present() {
            return self.raise(Exception::Np(error));
        }
        let target = gate.gate_selector();
        if is_null(target) {
            return self.raise(Exception::Gp(0));
        }
        let code = self.descriptor_or_gp(target, 0)?;
        if !code.is_code() || code.dpl() > self.cpl() || long && (!code.long() || code.big()) {
            return self.raise(Exception::Gp(target & 0xfffc));
        }
        if !code.present() {
            return self.raise(Exception::Np(target & 0xfffc));
        }
        let rip = gate.gate_offset() | high << 32;
        Ok((target, code, if wide { rip } else { rip & 0xffff }, gate))
    }

    fn far_call<T: Word>(&mut self, selector: u16, rip: u64, next: u64) -> Exec {
        let old_cs = u64::from(self.st.segs[seg::CS].selector);
        if !self.protected() {
            if rip > u64::from(self.st.segs[seg::CS].limit) {
                return self.raise(Exception::Gp(0));
            }
            self.poke::<T>(1, old_cs)?;
            self.poke::<T>(2, next)?;
            let sp = self.sp();
            self.set_sp(sp.wrapping_sub(2 * T::BYTES));
            self.real_far(selector, rip)?;
            return Err(Leave::Jump);
        }
        if is_null(selector) {
            return self.raise(Exception::Gp(0));
        }
        let mut descriptor = self.descriptor_or_gp(selector, 0)?;
        if descriptor.is_segment() {
            self.direct_code(selector, descriptor)?;
            self.check_target(descriptor, rip)?;
            self.poke::<T>(1, old_cs)?;
            self.poke::<T>(2, next)?;
            self.set_accessed(selector, &mut descriptor)?;
            let sp = self.sp();
            self.set_sp(sp.wrapping_sub(2 * T::BYTES));
            let cpl = self.cpl();
            self.set_cs(selector, descriptor, cpl, rip);
            return Err(Leave::Jump);
        }
        let (selector, code, rip, gate) = self.call_gate(selector, descriptor)?;
        self.check_target(code, rip)?;
        if !code.conforming() && code.dpl() < self.cpl() {
            self.gate_inward(selector, code, rip, gate, next)?;
        } else {
            self.gate_same(selector, code, rip, gate, next)?;
        }
        Err(Leave::Jump)
    }

    /// A call through a gate at the same privilege level: the gate's size, not the instruction's.
    fn gate_same(&mut self, selector: u16, mut code: Descriptor, rip: u64, gate: Descriptor, next: u64) -> Exec {
        let old_cs = u64::from(self.st.segs[seg::CS].selector);
        let size = if self.long_mode() {
            self.poke::<u64>(1, old_cs)?;
            self.poke::<u64>(2, next)?;
            8
        } else if gate.kind() == kind::CALL32 {
            self.poke::<u32>(1, old_cs)?;
            self.poke::<u32>(2, next)?;
            4
        } else {
            self.poke::<u16>(1, old_cs)?;
            self.poke::<u16>(2, next)?;
            2
        };
        self.set_accessed(selector, &mut code)?;
        let sp = self.sp();
        self.set_sp(sp.wrapping_sub(2 * size));
        let cpl = self.cpl();
        self.set_cs(selector, code, cpl, rip);
        Ok(())
    }

    /// A call through a gate to an inner level: another stack, parameters copied.
    fn gate_inward(&mut self, selector: u16, mut code: Descriptor, rip: u64, gate: Descriptor, next: u64) -> Exec {
        let cpl = code.dpl();
        let old_cs = self.st.segs[seg::CS].selector;
        let (old_ss, old_sp) = (self.st.segs[seg::SS].selector, self.st.gpr[4]);
        let system = self.system_set();
        if self.long_mode() {
            let top = self.read_tss_pointer(4 + 8 * u64::from(cpl), 0)?;
            let mut frame = [0; 32];
            for (slot, word) in frame.chunks_exact_mut(8).zip([next, u64::from(old_cs), old_sp, u64::from(old_ss)]) {
                slot.copy_from_slice(&word.to_le_bytes());
            }
            let sp = top.wrapping_sub(32);
            if !canonical(sp) {
                return self.raise(Exception::Ss(0));
            }
            self.write_bytes(system, sp, &frame)?;
            self.set_accessed(selector, &mut code)?;
            self.st.gpr[4] = sp;
            self.st.segs[seg::SS] = Segment {
                selector: u16::from(cpl),
                access: u16::from(cpl) << 5 | 0x93,
                unusable: true,
                ..Segment::default()
            };
            self.set_cs(selector, code, cpl, rip);
            return Ok(());
        }
        let wide = gate.kind() == kind::CALL32;
        let (ss, top) = self.inner_stack(cpl, 0)?;
        let count = gate.0 >> 32 & 31;
        let mut words = vec![u32::from(old_ss), old_sp as u32];
        for i in (0..count).rev() {
            words.push(if wide { self.peek::<u32>(i)?.0 } else { self.peek::<u16>(i)?.0 } as u32);
        }
        words.extend([u32::from(old_cs), next as u32]);
        let sp = self.push_frame(&ss, top, &words, wide, system)?;
        self.set_accessed(selector, &mut code)?;
        self.st.segs[seg::SS] = ss;
        self.set_stack_pointer(&ss, sp);
        self.set_cs(selector, code, cpl, rip);
        Ok(())
    }

    /// Checks the code segment that RETF or IRET returns to.
    fn return_code(&mut self, selector: u16) -> Exec<Descriptor> {
        let error = selector & 0xfffc;
        if is_null(selector) {
            return self.raise(Exception::Gp(0));
        }
        let descriptor = self.descriptor_or_gp(selector, 0)?;
        let rpl = (selector & 3) as u8;
        let allowed = if descriptor.conforming() { descriptor.dpl() <= rpl } else { descriptor.dpl() == rpl };
        if !descriptor.is_code()
            || rpl < self.cpl()
            || !allowed
            || self.long_mode() && descriptor.long() && descriptor.big()
        {
            return self.raise(Exception::Gp(error));
        }
        if !descriptor.present() {
            return self.raise(Exception::Np(error));
        }
        Ok(descriptor)
    }

    /// Checks the stack segment of a return to level `rpl`, to code that `code` describes.
    fn return_stack(&mut self, selector: u16, rpl: u8, code: Descriptor) -> Exec<Segment> {
        if is_null(selector) && self.long_mode() && code.long() && rpl != 3 && (selector & 3) as u8 == rpl {
            return Ok(Segment { selector, access: u16::from(rpl) << 5 | 0x93, unusable: true, ..Segment::default() });
        }
        if is_null(selector) {
            return self.raise(Exception::Gp(0));
        }
        self.stack_segment(selector, rpl, Exception::Gp)
    }

    fn far_return<T: Word>(&mut self, release: u64) -> Exec {
        let (rip, sp) = self.peek::<T>(0)?;
        let selector = self.peek::<T>(1)?.0 as u16;
        if !self.protected() {
            if rip > u64::from(self.st.segs[seg::CS].limit) {
                return self.raise(Exception::Gp(0));
            }
            self.set_sp(sp.wrapping_add(2 * T::BYTES + release));
            self.real_far(selector, rip)?;
            return Err(Leave::Jump);
        }
        let mut code = self.return_code(selector)?;
        let rpl = (selector & 3) as u8;
        if rpl == self.cpl() {
            self.check_target(code, rip)?;
            self.set_accessed(selector, &mut code)?;
            self.set_sp(sp.wrapping_add(2 * T::BYTES + release));
            self.set_cs(selector, code, rpl, rip);
            return Err(Leave::Jump);
        }
        let at = self.cut_sp(sp.wrapping_add(2 * T::BYTES + release));
        let old = self.st.gpr[4];
        self.set_sp(at);
        let outer = self.peek::<T>(0).and_then(|(sp, _)| self.peek::<T>(1).map(|(ss, _)| (sp, ss as u16)));
        self.st.gpr[4] = old;
        let (outer_sp, outer_ss) = outer?;
        let ss = self.return_stack(outer_ss, rpl, code)?;
        self.check_target(code, rip)?;
        self.set_accessed(selector, &mut code)?;
        self.st.segs[seg::SS] = ss;
        self.set_cs(selector, code, rpl, rip);
        self.outer_sp(outer_sp.wrapping_add(release), T::BITS);
        self.drop_inner_segments();
        Err(Leave::Jump)
    }

    /// The stack pointer after a return to an outer level, in the new mode.
    fn outer_sp(&mut self, sp: u64, bits: u32) {
        if self.code64() || bits == 64 {
            self.st.gpr[4] = sp;
        } else {
            self.set_sp(sp);
        }
    }

    /// The flags that IRET at the current level may change, and their new values.
    fn return_flags<T: Word>(&mut self, value: u64) {
        let mut change = rflags::ARITH | rflags::TF | rflags::DF | rflags::NT | rflags::RF | rflags::AC | rflags::ID;
        if self.cpl() == 0 || !self.pe() {
            change |= rflags::IOPL;
        }
        if !self.pe() || self.cpl() <= self.iopl() {
            change |= rflags::IF;
        }
        if T::BITS == 16 {
            change &= 0xffff;
        }
        let flags = self.rflags();
        self.set_rflags(flags & !change | value & change);
    }

    fn interrupt_return<T: Word>(&mut self) -> Exec {
        let (rip, sp) = self.peek::<T>(0)?;
        let selector = self.peek::<T>(1)?.0 as u16;
        let flags = self.peek::<T>(2)?.0;
        if !self.protected() {
            if rip > u64::from(self.st.segs[seg::CS].limit) {
                return self.raise(Exception::Gp(0));
            }
            self.set_sp(sp.wrapping_add(3 * T::BYTES));
            self.return_flags::<T>(flags);
            self.st.events.nmi_blocked = false;
            self.real_far(selector, rip)?;
            return Err(Leave::Jump);
        }
        // NT asks for a task switch, VM for virtual-8086 mode: neither is offered.
        if self.st.rflags & rflags::NT != 0 {
            return self.raise(if self.long_mode() { Exception::Gp(0) } else { Exception::Ts(0) });
        }
        if !self.long_mode() && flags & rflags::VM != 0 && T::BITS == 32 && self.cpl() == 0 {
            return self.raise(Exception::Gp(0));
        }
        let mut code = self.return_code(selector)?;
        let rpl = (selector & 3) as u8;
        let from64 = self.code64();
        if rpl == self.cpl() && !from64 {
            self.check_target(code, rip)?;
            self.set_accessed(selector, &mut code)?;
            self.set_sp(sp.wrapping_add(3 * T::BYTES));
            self.return_flags::<T>(flags);
            self.st.events.nmi_blocked = false;
            self.set_cs(selector, code, rpl, rip);
            return Err(Leave::Jump);
        }
        let outer_sp = self.peek::<T>(3)?.0;
        let outer_ss = self.peek::<T>(4)?.0 as u16;
        let ss = self.return_stack(outer_ss, rpl, code)?;
        self.check_target(code, rip)?;
        self.set_accessed(selector, &mut code)?;
        self.return_flags::<T>(flags);
        self.st.events.nmi_blocked = false;
        let outward = rpl > self.cpl();
        self.st.segs[seg::SS] = ss;
        self.set_cs(selector, code, rpl, rip);
        self.outer_sp(outer_sp, T::BITS);
        if outward {
            self.drop_inner_segments();
        }
        Err(Leave::Jump)
    }

    /// The descriptor that LAR, LSL, VERR and VERW ask about, if it is visible at this privilege.
    fn visible(&mut self, selector: u16) -> Exec<Option<Descriptor>> {
        if is_null(selector) {
            return Ok(None);
        }
        let descriptor = self.descriptor(selector)?;
        let cpl = self.cpl().max((selector & 3) as u8);
        Ok(descriptor.filter(|d| d.is_code() && d.conforming() || d.dpl() >= cpl))
    }

    fn answer_zf(&mut self, on: bool) {
        self.fl.assign(if on { rflags::ZF } else { 0 }, rflags::ZF);
    }
}

/// Selector and offset of a direct far branch.
fn direct(op: &Op) -> (u16, u64) {
    ((op.imm >> 32) as u16, op.imm & 0xffff_ffff)
}

fn jmp_direct(cpu: &mut Core, op: &Op) -> Exec {
    let (selector, rip) = direct(op);
    cpu.far_jump(selector, rip)
}

/// Reads a far pointer with an offset of size `T`.
fn pointer<T: Word>(cpu: &mut Core, op: &Op) -> Exec<(u16, u64)> {
    let lin = cpu.linear(op, T::BYTES + 2, false)?;
    let rip = cpu.read_word::<T>(lin)?;
    let selector = cpu.read::<u16>(cpu.wrap(lin.wrapping_add(T::BYTES)))?;
    Ok((selector, rip))
}

fn jmp_memory<T: Word>(cpu: &mut Core, op: &Op) -> Exec {
    let (selector, rip) = pointer::<T>(cpu, op)?;
    cpu.far_jump(selector, rip)
}

fn call_direct<T: Word>(cpu: &mut Core, op: &Op) -> Exec {
    let ((selector, rip), next) = (direct(op), cpu.next_rip(op));
    cpu.far_call::<T>(selector, rip, next)
}

fn call_memory<T: Word>(cpu: &mut Core, op: &Op) -> Exec {
    let (selector, rip) = pointer::<T>(cpu, op)?;
    let next = cpu.next_rip(op);
    cpu.far_call::<T>(selector, rip, next)
}

fn retf<T: Word>(cpu: &mut Core, op: &Op) -> Exec {
    cpu.far_return::<T>(op.imm & 0xffff)
}

fn iret<T: Word>(cpu: &mut Core, _: &Op) -> Exec {
    cpu.interrupt_return::<T>()
}

fn lldt<const M: bool>(cpu: &mut Core, op: &Op) -> Exec {
    let selector = system_selector::<M>(cpu, op)?;
    if is_null(selector) {
        cpu.st.ldtr = Segment { selector, unusable: true, ..Segment::default() };
        return Ok(());
    }
    let descriptor = system_descriptor(cpu, selector, &[kind::LDT])?;
    let segment = long_base(cpu, selector, descriptor)?;
    cpu.st.ldtr = segment;
    Ok(())
}

fn ltr<const M: bool>(cpu: &mut Core, op: &Op) -> Exec {
    let selector = system_selector::<M>(cpu, op)?;
    if is_null(selector) {
        return cpu.raise(Exception::Gp(0));
    }
    let kinds: &[u8] = if cpu.long_mode() { &[kind::TSS32] } else { &[kind::TSS16, kind::TSS32] };
    let descriptor = system_descriptor(cpu, selector, kinds)?;
    let mut segment = long_base(cpu, selector, descriptor)?;
    // Busy.
    cpu.set_descriptor_bits(selector, 2)?;
    segment.access |= 2;
    cpu.st.tr = segment;
    Ok(())
}

fn system_selector<const M: bool>(cpu: &mut Core, op: &Op) -> Exec<u16> {
    if !cpu.protected() {
        return cpu.raise(Exception::Ud);
    }
    if cpu.cpl() != 0 {
        return cpu.raise(Exception::Gp(0));
    }
    if M { cpu.load::<u16>(op) } else { Ok(cpu.reg::<u16>(op.d) as u16) }
}

fn system_descriptor(cpu: &mut Core, selector: u16, kinds: &[u8]) -> Exec<Descriptor> {
    let error = selector & 0xfffc;
    if selector & 4 != 0 {
        return cpu.raise(Exception::Gp(error));
    }
    let descriptor = cpu.descriptor_or_gp(selector, 0)?;
    if descriptor.is_segment() || !kinds.contains(&descriptor.kind()) {
        return cpu.raise(Exception::Gp(error));
    }
    if !descriptor.present() {
        return cpu.raise(Exception::Np(error));
    }
    Ok(descriptor)
}

/// The hidden part of a system segment, whose base has 64 bits in long mode.
fn long_base(cpu: &mut Core, selector: u16, descriptor: Descriptor) -> Exec<Segment> {
    let mut segment = descriptor.segment(selector);
    if cpu.long_mode() {
        let high = cpu.descriptor_high(selector)?;
        segment.base |= high << 32;
        if high >> 40 & 0x1f != 0 || !canonical(segment.base) {
            return cpu.raise(Exception::Gp(selector & 0xfffc));
        }
    }
    Ok(segment)
}

/// The selector operand of LAR, LSL (operand 1), VERR and VERW (operand 0).
fn asked<const M: bool>(cpu: &mut Core, op: &Op, reg: u8) -> Exec<u16> {
    if !cpu.protected() {
        return cpu.raise(Exception::Ud);
    }
    if M { cpu.load::<u16>(op) } else { Ok(cpu.reg::<u16>(reg) as u16) }
}

fn lar<T: Word, const M: bool>(cpu: &mut Core, op: &Op) -> Exec {
    let selector = asked::<M>(cpu, op, op.s)?;
    let long = cpu.long_mode();
    let known = cpu.visible(selector)?.filter(|d| {
        d.is_segment()
            || matches!(d.kind(), kind::LDT | kind::TSS32 | 11 | kind::CALL32)
            || !long && matches!(d.kind(), kind::TSS16 | 3 | kind::CALL16 | kind::TASK)
    });
    if let Some(descriptor) = known {
        cpu.set_reg::<T>(op.d, T::cut(descriptor.0 >> 32 & 0x00ff_ff00));
    }
    cpu.answer_zf(known.is_some());
    Ok(())
}

fn lsl<T: Word, const M: bool>(cpu: &mut Core, op: &Op) -> Exec {
    let selector = asked::<M>(cpu, op, op.s)?;
    let long = cpu.long_mode();
    let known = cpu.visible(selector)?.filter(|d| {
        d.is_segment()
            || matches!(d.kind(), kind::LDT | kind::TSS32 | 11)
            || !long && matches!(d.kind(), kind::TSS16 | 3)
    });
    if let Some(descriptor) = known {
        cpu.set_reg::<T>(op.d, T::cut(u64::from(descriptor.segment(selector).limit)));
    }
    cpu.answer_zf(known.is_some());
    Ok(())
}

fn verify<const WRITE: bool, const M: bool>(cpu: &mut Core, op: &Op) -> Exec {
    let selector = asked::<M>(cpu, op, op.d)?;
    let holds = cpu.visible(selector)?.is_some_and(|d| {
        d.is_segment() && if WRITE { d.is_writable_data() } else { !d.is_code() || d.kind() & 2 != 0 }
    });
    cpu.answer_zf(holds);
    Ok(())
}

fn arpl<const M: bool>(cpu: &mut Core, op: &Op) -> Exec {
    if !cpu.protected() {
        return cpu.raise(Exception::Ud);
    }
    let rpl = cpu.reg::<u16>(op.s) & 3;
    let raise = |old: u64| if old & 3 < rpl { old & !3 | rpl } else { old };
    let old = if M {
        let lin = cpu.linear(op, 2, true)?;
        cpu.rmw::<u16, false>(lin, raise)?
    } else {
        let old = cpu.reg::<u16>(op.d);
        cpu.set_reg::<u16>(op.d, raise(old));
        old
    };
    cpu.answer_zf(old & 3 < rpl);
    Ok(())
}

/// Operand size in bytes of the far branches and returns.
fn far_size(insn: &Instruction) -> usize {
    match insn.code() {
        Code::Jmp_ptr1616
        | Code::Jmp_m1616
        | Code::Call_ptr1616
        | Code::Call_m1616
        | Code::Retfw
        | Code::Retfw_imm16
        | Code::Iretw => 2,
        Code::Jmp_m1664 | Code::Call_m1664 | Code::Retfq | Code::Retfq_imm16 | Code::Iretq => 8,
        _ => 4,
    }
}

/// See the module documentation of `exec`.
pub(crate) fn lower(insn: &Instruction) -> Option<Handler> {
    let memory = has_memory(insn);
    let segment = |k: u32| insn.op_kind(k) == OpKind::Register && insn.op_register(k).is_segment_register();
    let size = if insn.op_count() > 0 && insn.op0_kind() == OpKind::Register { insn.op0_register().size() } else { 0 };
    Some(match insn.mnemonic() {
        Mnemonic::Mov if segment(1) && memory => mov_from_seg::<u16, true>,
        Mnemonic::Mov if segment(1) => by_size!(size, mov_from_seg::<[T], false>),
        Mnemonic::Mov if segment(0) && memory => mov_to_seg::<true>,
        Mnemonic::Mov if segment(0) => mov_to_seg::<false>,
        Mnemonic::Les => by_size!(size, load_pointer::<[T], { seg::ES }>),
        Mnemonic::Lds => by_size!(size, load_pointer::<[T], { seg::DS }>),
        Mnemonic::Lss => by_size!(size, load_pointer::<[T], { seg::SS }>),
        Mnemonic::Lfs => by_size!(size, load_pointer::<[T], { seg::FS }>),
        Mnemonic::Lgs => by_size!(size, load_pointer::<[T], { seg::GS }>),
        _ if insn.is_jmp_far() => jmp_direct,
        _ if insn.is_jmp_far_indirect() => by_size!(far_size(insn), jmp_memory::<[T]>),
        _ if insn.is_call_far() => by_size!(far_size(insn), call_direct::<[T]>),
        _ if insn.is_call_far_indirect() => by_size!(far_size(insn), call_memory::<[T]>),
        Mnemonic::Retf => by_size!(far_size(insn), retf::<[T]>),
        Mnemonic::Iret | Mnemonic::Iretd | Mnemonic::Iretq => by_size!(far_size(insn), iret::<[T]>),
        Mnemonic::Lldt if memory => lldt::<true>,
        Mnemonic::Lldt => lldt::<false>,
        Mnemonic::Ltr if memory => ltr::<true>,
        Mnemonic::Ltr => ltr::<false>,
        Mnemonic::Lar if memory => by_size!(size, lar::<[T], true>),
        Mnemonic::Lar => by_size!(size, lar::<[T], false>),
        Mnemonic::Lsl if memory => by_size!(size, lsl::<[T], true>),
        Mnemonic::Lsl => by_size!(size, lsl::<[T], false>),
        Mnemonic::Verr if memory => verify::<false, true>,
        Mnemonic::Verr => verify::<false, false>,
        Mnemonic::Verw if memory => verify::<true, true>,
        Mnemonic::Verw => verify::<true, false>,
        Mnemonic::Arpl if memory => arpl::<true>,
        Mnemonic::Arpl => arpl::<false>,
        _ => return None,
    })
}
