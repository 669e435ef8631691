//! Descriptors and the loading of segment registers (SDM vol. 3A, chapters 3.4, 3.5 and 5; instruction pages MOV, LLDT, LTR).

use crate::core::Core;
use crate::exception::Exception;
use crate::exec::Exec;
use crate::state::{Segment, seg};

/// System descriptor types that matter here.
pub(crate) mod kind {
    /// Task state segment, 16 bits, available.
    pub(crate) const TSS16: u8 = 1;
    /// Local descriptor table.
    pub(crate) const LDT: u8 = 2;
    /// Call gate, 16 bits.
    pub(crate) const CALL16: u8 = 4;
    /// Task gate.
    pub(crate) const TASK: u8 = 5;
    /// Interrupt gate, 16 bits.
    pub(crate) const INT16: u8 = 6;
    /// Trap gate, 16 bits.
    pub(crate) const TRAP16: u8 = 7;
    /// Task state segment, 32 or 64 bits, available; add 2 for busy.
    pub(crate) const TSS32: u8 = 9;
    /// Call gate, 32 or 64 bits.
    pub(crate) const CALL32: u8 = 12;
    /// Interrupt gate, 32 or 64 bits.
    pub(crate) const INT32: u8 = 14;
    /// Trap gate, 32 or 64 bits.
    pub(crate) const TRAP32: u8 = 15;
}

/// A descriptor as it is in a table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Descriptor(pub(crate) u64);

impl Descriptor {
    /// Code or data rather than system.
    pub(crate) fn is_segment(self) -> bool {
        self.0 >> 44 & 1 != 0
    }
    /// Type, four bits.
    pub(crate) fn kind(self) -> u8 {
        (self.0 >> 40 & 15) as u8
    }
    pub(crate) fn dpl(self) -> u8 {
        (self.0 >> 45 & 3) as u8
    }
    pub(crate) fn present(self) -> bool {
        self.0 >> 47 & 1 != 0
    }
    pub(crate) fn is_code(self) -> bool {
        self.is_segment() && self.kind() & 8 != 0
    }
    pub(crate) fn conforming(self) -> bool {
        self.kind() & 4 != 0
    }
    pub(crate) fn long(self) -> bool {
        self.0 >> 53 & 1 != 0
    }
    pub(crate) fn big(self) -> bool {
        self.0 >> 54 & 1 != 0
    }
    /// Data that can be written.
    pub(crate) fn is_writable_data(self) -> bool {
        self.is_segment() && self.kind() & 0xa == 2
    }
    /// The hidden part of a register that it is loaded into.
    pub(crate) fn segment(self, selector: u16) -> Segment {
        let raw = self.0;
        let limit = (raw & 0xffff | raw >> 32 & 0xf_0000) as u32;
        Segment {
            selector,
            base: raw >> 16 & 0xff_ffff | raw >> 56 << 24,
            limit: if raw >> 55 & 1 != 0 { limit << 12 | 0xfff } else { limit },
            access: (raw >> 40) as u16 & 0xf0ff,
            unusable: false,
        }
    }
    /// Gate: selector.
    pub(crate) fn gate_selector(self) -> u16 {
        (self.0 >> 16) as u16
    }
    /// Gate: offset, low 32 bits.
    pub(crate) fn gate_offset(self) -> u64 {
        self.0 & 0xffff | self.0 >> 32 & 0xffff_0000
    }
}

/// A null selector, whatever its RPL.
pub(crate) fn is_null(selector: u16) -> bool {
    selector & 0xfffc == 0
}

impl Core {
    /// Linear address of the descriptor of a selector, if `len` bytes of it are inside the table.
    fn descriptor_address(&self, selector: u16, len: u64) -> Option<u64> {
        let offset = u64::from(selector & 0xfff8);
        let (base, limit) = if selector & 4 != 0 {
            if self.st.ldtr.unusable {
                return None;
            }
            (self.st.ldtr.base, u64::from(self.st.ldtr.limit))
        } else {
            (self.st.gdtr.base, u64::from(self.st.gdtr.limit))
        };
        (offset + len - 1 <= limit).then(|| self.wrap(base.wrapping_add(offset)))
    }

    /// Reads a descriptor; `None` beyond the limit of its table.
    pub(crate) fn descriptor(&mut self, selector: u16) -> Exec<Option<Descriptor>> {
        match self.descriptor_address(selector, 8) {
            Some(at) => Ok(Some(Descriptor(self.read_as(self.system_set(), at)?))),
            None => Ok(None),
        }
    }

    /// Reads a descriptor or raises #GP(selector), with `ext` in bit 0.
    pub(crate) fn descriptor_or_gp(&mut self, selector: u16, ext: u16) -> Exec<Descriptor> {
        match self.descriptor(selector)? {
            Some(descriptor) => Ok(descriptor),
            None => self.raise(Exception::Gp(selector & 0xfffc | ext)),
        }
    }

    /// The upper half of a 16-byte descriptor.
    pub(crate) fn descriptor_high(&mut self, selector: u16) -> Exec<u64> {
        match self.descriptor_address(selector, 16) {
            Some(at) => self.read_as(self.system_set(), at.wrapping_add(8)),
            None => self.raise(Exception::Gp(selector & 0xfffc)),
        }
    }

    /// Sets the accessed bit of a code or data descriptor.
    pub(crate) fn set_accessed(&mut self, selector: u16, descriptor: &mut Descriptor) -> Exec {
        if descriptor.kind() & 1 == 0 {
            self.set_descriptor_bits(selector, 1)?;
            descriptor.0 |= 1 << 40;
        }
        Ok(())
    }

    /// Sets bits of the type of a descriptor in memory.
    pub(crate) fn set_descriptor_bits(&mut self, selector: u16, bits: u8) -> Exec {
        let Some(at) = self.descriptor_address(selector, 8) else {
            return Ok(());
        };
        let set = self.system_set();
        let old: u8 = self.read_as(set, at.wrapping_add(5))?;
        self.write_as(set, at.wrapping_add(5), old | bits)
    }

    /// Loads ES, SS, DS, FS or GS as MOV, POP and LDS do.
    pub(crate) fn load_segment(&mut self, index: usize, selector: u16) -> Exec {
        if !self.protected() {
            // Limit and rights stay as they were: "unreal" mode.
            let s = &mut self.st.segs[index];
            s.selector = selector;
            s.base = u64::from(selector) << 4;
            s.unusable = false;
            self.segment_changed(index);
            return Ok(());
        }
        if index == seg::SS {
            let loaded = self.stack_segment(selector, self.cpl(), Exception::Gp)?;
            self.st.segs[seg::SS] = loaded;
            self.segment_changed(index);
            return Ok(());
        }
        if is_null(selector) {
            // Intel keeps base and limit; in 64-bit mode the base still counts for FS and GS, and becomes zero here.
            self.st.segs[index] = Segment { selector, unusable: true, ..Segment::default() };
            self.segment_changed(index);
            return Ok(());
        }
        let error = selector & 0xfffc;
        let mut descriptor = self.descriptor_or_gp(selector, 0)?;
        let readable = !descriptor.is_code() || descriptor.kind() & 2 != 0;
        let privileged = descriptor.is_code() && descriptor.conforming()
            || descriptor.dpl() >= self.cpl() && descriptor.dpl() >= (selector & 3) as u8;
        if !descriptor.is_segment() || !readable || !privileged {
            return self.raise(Exception::Gp(error));
        }
        if !descriptor.present() {
            return self.raise(Exception::Np(error));
        }
        self.set_accessed(selector, &mut descriptor)?;
        self.st.segs[index] = descriptor.segment(selector);
        self.segment_changed(index);
        Ok(())
    }

    /// Checks a stack segment for privilege level `cpl`; `bad` is what a wrong selector raises (#GP or #TS).
    pub(crate) fn stack_segment(&mut self, selector: u16, cpl: u8, bad: fn(u16) -> Exception) -> Exec<Segment> {
        let error = selector & 0xfffc;
        if is_null(selector) {
            if self.code64() && cpl != 3 && (selector & 3) as u8 == cpl {
                return Ok(Segment {
                    selector,
                    access: u16::from(cpl) << 5 | 0x93,
                    unusable: true,
                    ..Segment::default()
                });
            }
            return self.raise(bad(0));
        }
        let Some(mut descriptor) = self.descriptor(selector)? else {
            return self.raise(bad(error));
        };
        if (selector & 3) as u8 != cpl || !descriptor.is_writable_data() || descriptor.dpl() != cpl {
            return self.raise(bad(error));
        }
        if !descriptor.present() {
            return self.raise(Exception::Ss(error));
        }
        self.set_accessed(selector, &mut descriptor)?;
        Ok(descriptor.segment(selector))
    }

    /// What depends on a segment register is brought up to date.
    pub(crate) fn segment_changed(&mut self, index: usize) {
        match index {
            seg::CS => {
                // Cached jumps are by RIP: another base means other code.
                self.bump_links();
                self.sync_mode();
            }
            seg::SS => self.sync_mode(),
            _ => {}
        }
    }

    /// Loads CS with a checked descriptor at privilege level `cpl`, and RIP.
    pub(crate) fn set_cs(&mut self, selector: u16, descriptor: Descriptor, cpl: u8, rip: u64) {
        let old = self.st.segs[seg::CS].base;
        self.st.segs[seg::CS] = descriptor.segment(selector & 0xfffc | u16::from(cpl));
        self.st.cpl = cpl;
        self.st.rip = rip;
        if self.st.segs[seg::CS].base != old {
            self.bump_links();
        }
        self.sync_mode();
    }

    /// After a return to an outer level: data segments that it may not use become null.
    pub(crate) fn drop_inner_segments(&mut self) {
        for index in [seg::ES, seg::DS, seg::FS, seg::GS] {
            let s = &mut self.st.segs[index];
            let conforming = s.access & 0x1c == 0x1c;
            if !s.unusable && !conforming && s.dpl() < self.st.cpl {
                // The base stays: in 64-bit mode that of FS and GS still counts.
                *s = Segment { base: s.base, unusable: true, ..Segment::default() };
            }
        }
    }
}
