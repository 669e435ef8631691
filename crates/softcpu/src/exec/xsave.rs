//! FXSAVE, FXRSTOR, the XSAVE family, XGETBV and XSETBV, and the images they store, which are also how an owner saves and restores the
//! floating-point state. Components: x87 (bit 0) and SSE (bit 1), both in the legacy area of 512 bytes; the header is 64 bytes.
//! Source: SDM vol. 1, chapters 10.5 and 13.

use iced_x86::{Instruction, Mnemonic};

use super::{Exec, Handler, Leave, Op};
use crate::core::Core;
use crate::exception::Exception;
use crate::intercept::Intercept;
use crate::state::{CpuState, X87, cr0, cr4};

/// x87 state component.
const X87_BIT: u64 = 1;
/// SSE state component.
const SSE_BIT: u64 = 2;
/// Components that exist.
const COMPONENTS: u64 = X87_BIT | SSE_BIT;
/// Bits of MXCSR that exist: DAZ included.
pub(crate) const MXCSR_MASK: u32 = 0xffff;
/// XCOMP_BV: compacted format.
const COMPACT: u64 = 1 << 63;

/// Legacy area of FXSAVE with 64-bit pointers (`wide`) or selectors.
pub(crate) fn legacy_image(st: &CpuState, wide: bool) -> [u8; 512] {
    let mut image = [0; 512];
    put_x87(st, wide, &mut image);
    put_mxcsr(st, &mut image);
    put_xmm(st, 16, &mut image);
    image
}

fn put(image: &mut [u8], at: usize, bytes: &[u8]) {
    image[at..at + bytes.len()].copy_from_slice(bytes);
}

fn put_x87(st: &CpuState, wide: bool, image: &mut [u8]) {
    let f = &st.x87;
    put(image, 0, &f.fcw.to_le_bytes());
    put(image, 2, &f.fsw.to_le_bytes());
    put(image, 4, &[f.valid, 0]);
    put(image, 6, &f.fop.to_le_bytes());
    if wide {
        put(image, 8, &f.fip.to_le_bytes());
        put(image, 16, &f.fdp.to_le_bytes());
    } else {
        put(image, 8, &(f.fip as u32).to_le_bytes());
        put(image, 12, &f.fcs.to_le_bytes());
        put(image, 14, &[0; 2]);
        put(image, 16, &(f.fdp as u32).to_le_bytes());
        put(image, 20, &f.fds.to_le_bytes());
        put(image, 22, &[0; 2]);
    }
    // Registers are stored from the top of the stack.
    let top = usize::from(f.fsw >> 11 & 7);
    for i in 0..8 {
        let physical = (top + i) & 7;
        put(image, 32 + 16 * i, &f.sig[physical].to_le_bytes());
        put(image, 40 + 16 * i, &f.sign_exp[physical].to_le_bytes());
        put(image, 42 + 16 * i, &[0; 6]);
    }
}

fn put_mxcsr(st: &CpuState, image: &mut [u8]) {
    put(image, 24, &st.mxcsr.to_le_bytes());
    put(image, 28, &MXCSR_MASK.to_le_bytes());
}

fn put_xmm(st: &CpuState, count: usize, image: &mut [u8]) {
    for (i, xmm) in st.xmm[..count].iter().enumerate() {
        put(image, 160 + 16 * i, &xmm.to_le_bytes());
    }
}

fn get<const N: usize>(image: &[u8], at: usize) -> [u8; N] {
    let mut bytes = [0; N];
    bytes.copy_from_slice(&image[at..at + N]);
    bytes
}

fn take_x87(st: &mut CpuState, wide: bool, image: &[u8]) {
    let mut f = X87 {
        fcw: u16::from_le_bytes(get(image, 0)) & 0x1f7f | 0x40,
        fsw: u16::from_le_bytes(get(image, 2)),
        valid: image[4],
        fop: u16::from_le_bytes(get(image, 6)) & 0x7ff,
        ..X87::default()
    };
    if wide {
        f.fip = u64::from_le_bytes(get(image, 8));
        f.fdp = u64::from_le_bytes(get(image, 16));
    } else {
        f.fip = u64::from(u32::from_le_bytes(get(image, 8)));
        f.fcs = u16::from_le_bytes(get(image, 12));
        f.fdp = u64::from(u32::from_le_bytes(get(image, 16)));
        f.fds = u16::from_le_bytes(get(image, 20));
    }
    let top = usize::from(f.fsw >> 11 & 7);
    for i in 0..8 {
        let physical = (top + i) & 7;
        f.sig[physical] = u64::from_le_bytes(get(image, 32 + 16 * i));
        f.sign_exp[physical] = u16::from_le_bytes(get(image, 40 + 16 * i));
    }
    // ES and B follow from the flags and the masks.
    let error = f.fsw & !f.fcw & 0x3f != 0;
    f.fsw = f.fsw & !0x8080 | if error { 0x8080 } else { 0 };
    st.x87 = f;
}

fn take_xmm(st: &mut CpuState, count: usize, image: &[u8]) {
    for (i, xmm) in st.xmm[..count].iter_mut().enumerate() {
        *xmm = u128::from_le_bytes(get(image, 160 + 16 * i));
    }
}

/// Takes over an FXSAVE image with 64-bit pointers. `false` if MXCSR has reserved bits; nothing is changed then.
pub(crate) fn restore_legacy(st: &mut CpuState, image: &[u8; 512]) -> bool {
    let mxcsr = u32::from_le_bytes(get(image, 24));
    if mxcsr & !MXCSR_MASK != 0 {
        return false;
    }
    take_x87(st, true, image);
    take_xmm(st, 16, image);
    st.mxcsr = mxcsr;
    true
}

impl CpuState {
    /// The x87 and SSE state as FXSAVE64 stores it.
    #[must_use]
    pub fn fxsave(&self) -> [u8; 512] {
        legacy_image(self, true)
    }

    /// Takes over an image of FXSAVE64. `false` if MXCSR has reserved bits; nothing is changed then.
    #[must_use = "an image that was refused changed nothing"]
    pub fn fxrstor(&mut self, image: &[u8; 512]) -> bool {
        restore_legacy(self, image)
    }
}

impl Core {
    /// XMM registers that the mode can name.
    fn xmm_count(&self) -> usize {
        if self.code64() { 16 } else { 8 }
    }

    /// #NM when CR0.TS is set; #UD for the XSAVE family when CR4.OSXSAVE is clear.
    fn save_enabled(&mut self, xsave: bool) -> Exec {
        if xsave && self.st.cr4 & cr4::OSXSAVE == 0 {
            return self.raise(Exception::Ud);
        }
        if self.st.cr0 & cr0::TS != 0 || !xsave && self.st.cr0 & cr0::EM != 0 {
            return self.raise(Exception::Nm);
        }
        Ok(())
    }

    fn area(&mut self, op: &Op, len: u64, align: u64, write: bool) -> Exec<u64> {
        let lin = self.linear(op, len, write)?;
        if lin % align != 0 {
            return self.raise(Exception::Gp(0));
        }
        Ok(lin)
    }

    /// EDX:EAX.
    fn requested(&self) -> u64 {
        self.reg::<u32>(2) << 32 | self.reg::<u32>(0)
    }

    /// Components that are not in their initial state.
    fn in_use(&self) -> u64 {
        let mut bits = 0;
        if self.st.x87 != X87::default() {
            bits |= X87_BIT;
        }
        if self.st.xmm[..self.xmm_count()].iter().any(|x| *x != 0) {
            bits |= SSE_BIT;
        }
        bits
    }
}

fn fxsave<const WIDE: bool>(cpu: &mut Core, op: &Op) -> Exec {
    cpu.save_enabled(false)?;
    let lin = cpu.area(op, 512, 16, true)?;
    let image = legacy_image(&cpu.st, WIDE);
    let end = 160 + 16 * cpu.xmm_count();
    let set = cpu.set;
    cpu.write_bytes(set, lin, &image[..end])
}

fn fxrstor<const WIDE: bool>(cpu: &mut Core, op: &Op) -> Exec {
    cpu.save_enabled(false)?;
    let lin = cpu.area(op, 512, 16, false)?;
    let mut image = [0; 512];
    let set = cpu.set;
    cpu.read_bytes(set, lin, &mut image)?;
    let mxcsr = u32::from_le_bytes(get(&image, 24));
    if mxcsr & !MXCSR_MASK != 0 {
        return cpu.raise(Exception::Gp(0));
    }
    let count = cpu.xmm_count();
    take_x87(&mut cpu.st, WIDE, &image);
    take_xmm(&mut cpu.st, count, &image);
    cpu.st.mxcsr = mxcsr;
    Ok(())
}

const PLAIN: u8 = 0;
const OPT: u8 = 1;
const COMPACTED: u8 = 2;

/// XSAVE, XSAVEOPT (which may leave out what is in its initial state), XSAVEC.
fn xsave<const WIDE: bool, const KIND: u8>(cpu: &mut Core, op: &Op) -> Exec {
    cpu.save_enabled(true)?;
    let lin = cpu.area(op, 576, 64, true)?;
    let wanted = cpu.requested() & cpu.st.xcr0;
    let in_use = cpu.in_use();
    let set = cpu.set;
    let mut image = [0; 576];
    cpu.read_bytes(set, lin, &mut image)?;
    let saved = if KIND == PLAIN { wanted } else { wanted & in_use };
    if saved & X87_BIT != 0 {
        put_x87(&cpu.st, WIDE, &mut image);
    }
    if KIND != COMPACTED && wanted & SSE_BIT != 0 || saved & SSE_BIT != 0 {
        put_mxcsr(&cpu.st, &mut image);
    }
    if saved & SSE_BIT != 0 {
        put_xmm(&cpu.st, cpu.xmm_count(), &mut image);
    }
    let header = if KIND == COMPACTED {
        put(&mut image, 520, &(wanted | COMPACT).to_le_bytes());
        put(&mut image, 528, &[0; 48]);
        wanted & in_use
    } else {
        u64::from_le_bytes(get(&image, 512)) & !wanted | wanted & in_use
    };
    put(&mut image, 512, &header.to_le_bytes());
    cpu.write_bytes(set, lin, &image)
}

fn xrstor<const WIDE: bool>(cpu: &mut Core, op: &Op) -> Exec {
    cpu.save_enabled(true)?;
    let lin = cpu.area(op, 576, 64, false)?;
    let mut image = [0; 576];
    let set = cpu.set;
    cpu.read_bytes(set, lin, &mut image)?;
    let wanted = cpu.requested() & cpu.st.xcr0;
    let present = u64::from_le_bytes(get(&image, 512));
    let layout = u64::from_le_bytes(get(&image, 520));
    let compact = layout & COMPACT != 0;
    // Standard: XCOMP_BV is zero and so are bytes 23 to 16 of the header. Compact: the rest of the header is zero.
    let clean = if compact { &image[528..576] } else { &image[520..536] };
    let bad = clean.iter().any(|byte| *byte != 0)
        || present & !cpu.st.xcr0 != 0
        || compact && (layout & !COMPACT & !cpu.st.xcr0 != 0 || present & !layout != 0);
    let mxcsr = u32::from_le_bytes(get(&image, 24));
    let load_mxcsr = if compact { wanted & present & SSE_BIT != 0 } else { wanted & SSE_BIT != 0 };
    if bad || load_mxcsr && mxcsr & !MXCSR_MASK != 0 {
        return cpu.raise(Exception::Gp(0));
    }
    let count = cpu.xmm_count();
    if wanted & X87_BIT != 0 {
        if present & X87_BIT != 0 {
            take_x87(&mut cpu.st, WIDE, &image);
        } else {
            cpu.st.x87 = X87::default();
        }
    }
    if wanted & SSE_BIT != 0 {
        if present & SSE_BIT != 0 {
            take_xmm(&mut cpu.st, count, &image);
        } else {
            cpu.st.xmm[..count].fill(0);
        }
        if load_mxcsr {
            cpu.st.mxcsr = mxcsr;
        } else {
            cpu.st.mxcsr = 0x1f80;
        }
    }
    Ok(())
}

fn xgetbv(cpu: &mut Core, _: &Op) -> Exec {
    if cpu.st.cr4 & cr4::OSXSAVE == 0 {
        return cpu.raise(Exception::Ud);
    }
    let value = match cpu.st.gpr[1] as u32 {
        0 => cpu.st.xcr0,
        1 => cpu.st.xcr0 & cpu.in_use(),
        _ => return cpu.raise(Exception::Gp(0)),
    };
    cpu.set_reg::<u32>(0, value);
    cpu.set_reg::<u32>(2, value >> 32);
    Ok(())
}

fn xsetbv(cpu: &mut Core, _: &Op) -> Exec {
    if cpu.st.cr4 & cr4::OSXSAVE == 0 {
        return cpu.raise(Exception::Ud);
    }
    let value = cpu.requested();
    if cpu.cpl() != 0 || cpu.st.gpr[1] as u32 != 0 || value & X87_BIT == 0 || value & !COMPONENTS != 0 {
        return cpu.raise(Exception::Gp(0));
    }
    cpu.intercept(Intercept::Xsetbv)?;
    cpu.st.xcr0 = value;
    Err(Leave::Next)
}

/// See the module documentation of `exec`.
pub(crate) fn lower(insn: &Instruction) -> Option<Handler> {
    Some(match insn.mnemonic() {
        Mnemonic::Fxsave => fxsave::<false>,
        Mnemonic::Fxsave64 => fxsave::<true>,
        Mnemonic::Fxrstor => fxrstor::<false>,
        Mnemonic::Fxrstor64 => fxrstor::<true>,
        Mnemonic::Xsave => xsave::<false, PLAIN>,
        Mnemonic::Xsave64 => xsave::<true, PLAIN>,
        Mnemonic::Xsaveopt => xsave::<false, OPT>,
        Mnemonic::Xsaveopt64 => xsave::<true, OPT>,
        Mnemonic::Xsavec => xsave::<false, COMPACTED>,
        Mnemonic::Xsavec64 => xsave::<true, COMPACTED>,
        Mnemonic::Xrstor => xrstor::<false>,
        Mnemonic::Xrstor64 => xrstor::<true>,
        Mnemonic::Xgetbv => xgetbv,
        Mnemonic::Xsetbv => xsetbv,
        _ => return None,
    })
}
