//! Delivery of exceptions and interrupts through the IVT or the IDT (SDM vol. 3A, chapter 6), with double and triple faults.
//!
//! Delivery changes no register before its last memory access, so a fault in the middle finds the state it interrupted.

use crate::core::{Core, Trap};
use crate::exception::Exception;
use crate::exec::{Exec, Leave};
use crate::exit::Exit;
use crate::mem::canonical;
use crate::segment::{Descriptor, is_null, kind};
use crate::state::{Segment, rflags, seg};
use crate::tlb::Set;

/// What is delivered.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Source {
    /// A fault or trap of the current instruction.
    Exception(Exception),
    /// A non-maskable interrupt.
    Nmi,
    /// An external interrupt.
    External(u8),
    /// INT n, with the RIP behind it.
    Software(u8, u64),
    /// INT3, INTO or INT1: like `Software`, but the last one ignores the gate's privilege level.
    Trap(Exception, u64),
}

impl Source {
    fn vector(self) -> u8 {
        match self {
            Source::Exception(e) | Source::Trap(e, _) => e.vector(),
            Source::Nmi => 2,
            Source::External(vector) | Source::Software(vector, _) => vector,
        }
    }
    /// The vector for the double fault rules: only exceptions count.
    fn first(self) -> Option<u8> {
        match self {
            Source::Exception(e) => Some(e.vector()),
            _ => None,
        }
    }
    fn error_code(self) -> Option<u32> {
        match self {
            Source::Exception(e) => e.error_code(),
            _ => None,
        }
    }
    /// The gate's DPL is checked against CPL.
    fn checked(self) -> bool {
        matches!(self, Source::Software(..) | Source::Trap(Exception::Bp | Exception::Of, _))
    }
    /// Bit 0 of error codes about this delivery: an event outside the program.
    fn ext(self) -> u16 {
        u16::from(!matches!(self, Source::Software(..) | Source::Trap(Exception::Bp | Exception::Of, _)))
    }
}

impl Core {
    /// Delivers an event; faults on the way are delivered in its place. `Err` only for a triple fault.
    pub(crate) fn deliver(&mut self, source: Source) -> Exec {
        // Tables and stacks in device memory are not supported as such: the access below answers and is not an exit.
        let alone = std::mem::replace(&mut self.alone, true);
        let result = self.deliver_all(source);
        self.alone = alone;
        if !self.code_writes.is_empty() {
            let (ram, layout) = (self.ram.clone(), self.layout.clone());
            for (gpa, len) in std::mem::take(&mut self.code_writes) {
                ram.code_written(&layout, gpa, len);
            }
        }
        result
    }

    fn deliver_all(&mut self, source: Source) -> Exec {
        let mut current = source;
        loop {
            if let Source::Exception(exception) | Source::Trap(exception, _) = current {
                match exception {
                    Exception::Pf { addr, .. } => self.st.cr2 = addr,
                    Exception::Db(bits) => {
                        // BS and BD are sticky, B0 to B3 are not; GD is cleared when a #DB is delivered.
                        self.st.dr6 = self.st.dr6 & !0xf | bits;
                        self.st.dr7 &= !(1 << 13);
                    }
                    _ => {}
                }
            }
            let result = if self.pe() { self.protected_delivery(current) } else { self.real_delivery(current) };
            if result.is_ok() {
                self.st.events.sti_shadow = false;
                self.st.events.mov_ss_shadow = false;
                return Ok(());
            }
            let second = match std::mem::replace(&mut self.trap, Trap::Nothing) {
                Trap::Exception(second) => second,
                Trap::NonCanonical(_) => Exception::Ss(current.ext()),
                // An IDT or a stack in device memory that the bus does not serve.
                _ => {
                    self.replay.commit();
                    Exception::Gp(0)
                }
            };
            current = match current.first() {
                Some(8) => {
                    self.st.events.shutdown = true;
                    return self.trap(Trap::Exit(Exit::Shutdown, false));
                }
                Some(first) if second.doubles(first) => Source::Exception(Exception::Df),
                _ => Source::Exception(second),
            };
        }
    }

    /// RIP and RFLAGS to push.
    fn return_point(&self, source: Source) -> (u64, u64) {
        let flags = self.rflags();
        match source {
            Source::Software(_, rip) | Source::Trap(_, rip) => (rip, flags & !rflags::RF),
            Source::Exception(e) if !e.is_trap() && !matches!(e, Exception::Db(_)) => (self.st.rip, flags | rflags::RF),
            _ => (self.st.rip, flags),
        }
    }

    fn real_delivery(&mut self, source: Source) -> Exec {
        let offset = u64::from(source.vector()) * 4;
        if offset + 3 > u64::from(self.st.idtr.limit) {
            return self.raise(Exception::Gp(0));
        }
        let entry: u32 = self.read_as(Set::Supervisor, self.st.idtr.base.wrapping_add(offset) & 0xffff_ffff)?;
        let (rip, flags) = self.return_point(source);
        let mut frame = [0; 6];
        frame[..2].copy_from_slice(&(rip as u16).to_le_bytes());
        frame[2..4].copy_from_slice(&self.st.segs[seg::CS].selector.to_le_bytes());
        frame[4..].copy_from_slice(&(flags as u16).to_le_bytes());
        let sp = self.st.gpr[4].wrapping_sub(6) & 0xffff;
        let at = self.segment_address(seg::SS, sp, 6, true)?;
        self.write_bytes(Set::Supervisor, at, &frame)?;
        self.st.gpr[4] = self.st.gpr[4] & !0xffff | sp;
        self.st.rflags &= !(rflags::IF | rflags::TF | rflags::AC | rflags::RF);
        let selector = (entry >> 16) as u16;
        let cs = &mut self.st.segs[seg::CS];
        cs.selector = selector;
        cs.base = u64::from(selector) << 4;
        self.st.rip = u64::from(entry & 0xffff);
        self.segment_changed(seg::CS);
        Ok(())
    }

    fn protected_delivery(&mut self, source: Source) -> Exec {
        let vector = source.vector();
        let ext = source.ext();
        let long = self.long_mode();
        let bad = Exception::Gp(u16::from(vector) * 8 + 2 + ext);
        let size = if long { 16 } else { 8 };
        let offset = u64::from(vector) * size;
        if offset + size - 1 > u64::from(self.st.idtr.limit) {
            return self.raise(bad);
        }
        let at = self.st.idtr.base.wrapping_add(offset);
        let at = if long { at } else { at & 0xffff_ffff };
        let system = self.system_set();
        let gate = Descriptor(self.read_as(system, at)?);
        let high = if long { self.read_as::<u64>(system, at.wrapping_add(8))? } else { 0 };
        let wide = match gate.kind() {
            kind::INT32 | kind::TRAP32 if !gate.is_segment() => true,
            kind::INT16 | kind::TRAP16 if !gate.is_segment() && !long => false,
            // Task gates: hardware task switching is not offered.
            _ => return self.raise(bad),
        };
        if source.checked() && gate.dpl() < self.cpl() {
            return self.raise(Exception::Gp(u16::from(vector) * 8 + 2));
        }
        if !gate.present() {
            return self.raise(Exception::Np(u16::from(vector) * 8 + 2 + ext));
        }
        let selector = gate.gate_selector();
        if is_null(selector) {
            return self.raise(Exception::Gp(ext));
        }
        let error = selector & 0xfffc | ext;
        let mut code = self.descriptor_or_gp(selector, ext)?;
        if !code.is_code() || code.dpl() > self.cpl() || long && (!code.long() || code.big()) {
            return self.raise(Exception::Gp(error));
        }
        if !code.present() {
            return self.raise(Exception::Np(error));
        }
        let cpl = if code.conforming() { self.cpl() } else { code.dpl() };
        let rip = gate.gate_offset() | high << 32;
        if long && !canonical(rip) {
            return self.raise(Exception::Gp(ext));
        }
        let rip = if wide { rip } else { rip & 0xffff };
        let (return_rip, return_flags) = self.return_point(source);
        let set = if cpl == 3 { Set::User } else { system };
        let (old_ss, old_sp) = (self.st.segs[seg::SS].selector, self.st.gpr[4]);
        let old_cs = self.st.segs[seg::CS].selector;
        if long {
            let ist = high_ist(gate);
            let top = if ist != 0 {
                self.read_tss_pointer(36 + 8 * (u64::from(ist) - 1), ext)?
            } else if cpl < self.cpl() {
                self.read_tss_pointer(4 + 8 * u64::from(cpl), ext)?
            } else {
                old_sp
            } & !15;
            let mut frame = [0; 48];
            let words = [
                source.error_code().map_or(0, u64::from),
                return_rip,
                u64::from(old_cs),
                return_flags,
                old_sp,
                u64::from(old_ss),
            ];
            for (slot, word) in frame.chunks_exact_mut(8).zip(words) {
                slot.copy_from_slice(&word.to_le_bytes());
            }
            let frame = if source.error_code().is_some() { &frame[..] } else { &frame[8..] };
            let sp = top.wrapping_sub(frame.len() as u64);
            if !canonical(sp) {
                return self.raise(Exception::Ss(ext));
            }
            self.write_bytes(set, sp, frame)?;
            self.set_accessed(selector, &mut code)?;
            self.st.gpr[4] = sp;
            if cpl < self.cpl() {
                self.st.segs[seg::SS] = Segment {
                    selector: u16::from(cpl),
                    access: u16::from(cpl) << 5 | 0x93,
                    unusable: true,
                    ..Segment::default()
                };
            }
        } else {
            let inner = cpl < self.cpl();
            let (ss, top) = if inner { self.inner_stack(cpl, ext)? } else { (self.st.segs[seg::SS], old_sp) };
            let mut words = Vec::with_capacity(6);
            if inner {
                words.extend([u32::from(old_ss), old_sp as u32]);
            }
            words.extend([return_flags as u32, u32::from(old_cs), return_rip as u32]);
            words.extend(source.error_code());
            let sp = self.push_frame(&ss, top, &words, wide, set)?;
            self.set_accessed(selector, &mut code)?;
            self.st.segs[seg::SS] = ss;
            self.set_stack_pointer(&ss, sp);
        }
        self.st.rflags &= !(rflags::TF | rflags::NT | rflags::RF | rflags::VM);
        if gate.kind() & 1 == 0 {
            self.st.rflags &= !rflags::IF;
        }
        self.set_cs(selector, code, cpl, rip);
        Ok(())
    }

    /// A stack pointer from the 64-bit TSS.
    pub(crate) fn read_tss_pointer(&mut self, offset: u64, ext: u16) -> Exec<u64> {
        let tr = self.st.tr;
        if tr.unusable || offset + 7 > u64::from(tr.limit) {
            return self.raise(Exception::Ts(tr.selector & 0xfffc | ext));
        }
        let value = self.read_as(self.system_set(), tr.base.wrapping_add(offset))?;
        if !canonical(value) {
            return self.raise(Exception::Ss(ext));
        }
        Ok(value)
    }

    /// Stack segment and pointer of an inner level, from a 16- or 32-bit TSS.
    pub(crate) fn inner_stack(&mut self, cpl: u8, ext: u16) -> Exec<(Segment, u64)> {
        let tr = self.st.tr;
        let wide = tr.kind() & 8 != 0;
        let (offset, len) = if wide { (4 + 8 * u64::from(cpl), 8) } else { (2 + 4 * u64::from(cpl), 4) };
        if tr.unusable || offset + len - 1 > u64::from(tr.limit) {
            return self.raise(Exception::Ts(tr.selector & 0xfffc | ext));
        }
        let at = tr.base.wrapping_add(offset) & 0xffff_ffff;
        let set = self.system_set();
        let (sp, selector) = if wide {
            (u64::from(self.read_as::<u32>(set, at)?), self.read_as::<u16>(set, at.wrapping_add(4))?)
        } else {
            (u64::from(self.read_as::<u16>(set, at)?), self.read_as::<u16>(set, at.wrapping_add(2))?)
        };
        Ok((self.stack_segment(selector, cpl, Exception::Ts)?, sp))
    }

    /// Writes words (first pushed first) below `top` of a legacy stack; answers the new stack pointer.
    pub(crate) fn push_frame(&mut self, ss: &Segment, top: u64, words: &[u32], wide: bool, set: Set) -> Exec<u64> {
        let size = if wide { 4 } else { 2 };
        let mask = if ss.big() { 0xffff_ffff } else { 0xffff };
        let sp = top.wrapping_sub(words.len() as u64 * size) & mask;
        let mut bytes = Vec::with_capacity(words.len() * 4);
        for word in words.iter().rev() {
            bytes.extend_from_slice(&word.to_le_bytes()[..size as usize]);
        }
        // The segment checks are those of the new stack.
        let old = std::mem::replace(&mut self.st.segs[seg::SS], *ss);
        let at = self.segment_address(seg::SS, sp, bytes.len() as u64, true);
        self.st.segs[seg::SS] = old;
        self.write_bytes(set, at?, &bytes)?;
        Ok(sp)
    }

    /// Sets SP or ESP, as the stack segment's B bit says.
    pub(crate) fn set_stack_pointer(&mut self, ss: &Segment, sp: u64) {
        self.st.gpr[4] = if ss.big() { sp & 0xffff_ffff } else { self.st.gpr[4] & !0xffff | sp & 0xffff };
    }

    /// INT n, INT3, INTO and INT1 from their handlers. RIP is still at the instruction.
    pub(crate) fn software_interrupt(&mut self, source: Source, rip: u64) -> Exec {
        // Faults in the delivery point at the instruction itself.
        self.st.rip = rip;
        self.deliver(source)?;
        Err(Leave::Jump)
    }
}

/// The interrupt stack table index of a 64-bit gate.
fn high_ist(gate: Descriptor) -> u8 {
    (gate.0 >> 32 & 7) as u8
}
