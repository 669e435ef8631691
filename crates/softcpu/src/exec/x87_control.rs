//! x87 instructions that touch the unit as a whole: control and status word, environment, save areas, WAIT.
//!
//! None of them notes the instruction pointer. Those whose name starts with FN do not report a pending error.

use iced_x86::{Code, Instruction};

use super::x87::begin;
use super::{Exec, Handler, Op};
use crate::core::Core;
use crate::fp::format::Kind;
use crate::fp::{F80, Float};
use crate::state::X87;

/// The bits of the control word that can be written (bit 12, the infinity control of the 8087, is kept but idle).
const FCW_BITS: u16 = 0x1f3f;
/// The one that always reads as one.
const FCW_FIXED: u16 = 0x40;

impl X87 {
    /// The control word as loading `value` leaves it, and the error summary that follows from it.
    fn load_fcw(&mut self, value: u16) {
        self.fcw = value & FCW_BITS | FCW_FIXED;
        self.summarize();
    }

    /// What FNINIT does: everything but the registers' contents.
    fn init(&mut self) {
        *self = X87 { sig: self.sig, sign_exp: self.sign_exp, ..X87::default() };
    }

    /// The full tag word: 0 valid, 1 zero, 2 special, 3 empty for each physical register.
    fn tag_word(&self) -> u16 {
        (0..8).fold(0, |tags, r| {
            let value = F80 { sign_exp: self.sign_exp[r], sig: self.sig[r] };
            let tag = if self.valid >> r & 1 == 0 {
                3
            } else {
                match value.unpack() {
                    u if u.is_zero() => 1,
                    u if u.kind == Kind::Finite && !u.denormal => 0,
                    _ => 2,
                }
            };
            tags | tag << (2 * r)
        })
    }

    /// Only emptiness is taken from a tag word; the rest is recomputed when it is stored.
    fn load_tag_word(&mut self, tags: u16) {
        self.valid = (0..8).fold(0, |valid, r| valid | u8::from(tags >> (2 * r) & 3 != 3) << r);
    }
}

/// The layouts of the environment (SDM vol. 1, figures 8-9 to 8-12).
#[derive(Clone, Copy)]
enum Layout {
    Protected,
    /// Real-address and virtual-8086 mode: pointers are linear addresses.
    Real,
}

fn layout(cpu: &Core) -> Layout {
    if cpu.protected() { Layout::Protected } else { Layout::Real }
}

/// The seven fields in order: control, status, tags, then four that hold pointers and opcode.
fn fields(x: &X87, layout: Layout, wide: bool) -> [u32; 7] {
    let head = [u32::from(x.fcw), u32::from(x.fsw), u32::from(x.tag_word())];
    let (fop, fcs, fds) = (u32::from(x.fop), u32::from(x.fcs), u32::from(x.fds));
    let tail = match (layout, wide) {
        (Layout::Protected, true) => [x.fip as u32, fcs | fop << 16, x.fdp as u32, fds],
        (Layout::Protected, false) => [x.fip as u32, fcs, x.fdp as u32, fds],
        (Layout::Real, _) => {
            let ip = (x.fip as u32).wrapping_add(fcs << 4);
            let dp = (x.fdp as u32).wrapping_add(fds << 4);
            if wide {
                [ip & 0xffff, fop | ip >> 16 << 12, dp & 0xffff, dp >> 16 << 12]
            } else {
                [ip, fop | ip >> 4 & 0xf000, dp, dp >> 4 & 0xf000]
            }
        }
    };
    [head[0], head[1], head[2], tail[0], tail[1], tail[2], tail[3]]
}

/// The environment as bytes: 14, or 28 when `wide`.
fn environment(x: &X87, layout: Layout, wide: bool) -> ([u8; 28], usize) {
    let mut bytes = [0; 28];
    let size = if wide { 4 } else { 2 };
    for (i, (field, slot)) in fields(x, layout, wide).into_iter().zip(bytes.chunks_exact_mut(size)).enumerate() {
        // The upper halves of 16-bit fields are stored as ones.
        let sixteen =
            i < 3 || i == 6 && matches!(layout, Layout::Protected) || matches!(layout, Layout::Real) && i & 1 == 1;
        let field = if sixteen { field | 0xffff_0000 } else { field };
        slot.copy_from_slice(&field.to_le_bytes()[..size]);
    }
    (bytes, 7 * size)
}

/// Takes in an environment.
fn load_environment(x: &mut X87, layout: Layout, wide: bool, bytes: &[u8]) {
    let size = if wide { 4 } else { 2 };
    let mut fields = [0u32; 7];
    for (field, slot) in fields.iter_mut().zip(bytes.chunks_exact(size)) {
        let mut word = [0; 4];
        word[..size].copy_from_slice(slot);
        *field = u32::from_le_bytes(word);
    }
    let [fcw, fsw, tags, ip, code, dp, data] = fields;
    x.fsw = fsw as u16;
    x.load_fcw(fcw as u16);
    x.load_tag_word(tags as u16);
    match layout {
        Layout::Protected => {
            (x.fip, x.fcs, x.fdp, x.fds) = (u64::from(ip), code as u16, u64::from(dp), data as u16);
            if wide {
                x.fop = (code >> 16) as u16 & 0x7ff;
            }
        }
        Layout::Real => {
            let upper = |field: u32| {
                if wide { field << 4 & 0xffff_0000 } else { (field & 0xf000) << 4 }
            };
            (x.fcs, x.fds) = (0, 0);
            x.fip = u64::from(ip & 0xffff | upper(code));
            x.fdp = u64::from(dp & 0xffff | upper(data));
            x.fop = code as u16 & 0x7ff;
        }
    }
}

/// FNSTENV; afterwards all exceptions are masked.
fn fnstenv<const WIDE: bool>(cpu: &mut Core, op: &Op) -> Exec {
    let (bytes, len) = environment(&cpu.st.x87, layout(cpu), WIDE);
    let address = cpu.linear(op, len as u64, true)?;
    cpu.write_bytes(cpu.set, address, &bytes[..len])?;
    let x = &mut cpu.st.x87;
    x.fcw |= 0x3f;
    x.summarize();
    Ok(())
}

fn fldenv<const WIDE: bool>(cpu: &mut Core, op: &Op) -> Exec {
    begin(cpu)?;
    let mut bytes = [0; 28];
    let bytes = &mut bytes[..if WIDE { 28 } else { 14 }];
    let address = cpu.linear(op, bytes.len() as u64, false)?;
    cpu.read_bytes(cpu.set, address, bytes)?;
    let layout = layout(cpu);
    load_environment(&mut cpu.st.x87, layout, WIDE, bytes);
    Ok(())
}

/// FNSAVE: the environment, ST(0) to ST(7), then as FNINIT.
fn fnsave<const WIDE: bool>(cpu: &mut Core, op: &Op) -> Exec {
    let (head, len) = environment(&cpu.st.x87, layout(cpu), WIDE);
    let mut bytes = [0; 108];
    bytes[..len].copy_from_slice(&head[..len]);
    for (i, slot) in bytes[len..len + 80].chunks_exact_mut(10).enumerate() {
        slot.copy_from_slice(&cpu.st.x87.st(i).to_bytes());
    }
    let bytes = &bytes[..len + 80];
    let address = cpu.linear(op, bytes.len() as u64, true)?;
    cpu.write_bytes(cpu.set, address, bytes)?;
    cpu.st.x87.init();
    Ok(())
}

fn frstor<const WIDE: bool>(cpu: &mut Core, op: &Op) -> Exec {
    begin(cpu)?;
    let mut bytes = [0; 108];
    let head = if WIDE { 28 } else { 14 };
    let bytes = &mut bytes[..head + 80];
    let address = cpu.linear(op, bytes.len() as u64, false)?;
    cpu.read_bytes(cpu.set, address, bytes)?;
    let layout = layout(cpu);
    let x = &mut cpu.st.x87;
    load_environment(x, layout, WIDE, &bytes[..head]);
    let valid = x.valid;
    for (i, slot) in bytes[head..].chunks_exact(10).enumerate() {
        let mut value = [0; 10];
        value.copy_from_slice(slot);
        x.set_st(i, F80::from_bytes(value));
    }
    x.valid = valid;
    Ok(())
}

fn fldcw(cpu: &mut Core, op: &Op) -> Exec {
    begin(cpu)?;
    let value = cpu.load::<u16>(op)?;
    cpu.st.x87.load_fcw(value);
    Ok(())
}

fn fnstcw(cpu: &mut Core, op: &Op) -> Exec {
    cpu.store::<u16>(op, cpu.st.x87.fcw)
}

fn fnstsw(cpu: &mut Core, op: &Op) -> Exec {
    cpu.store::<u16>(op, cpu.st.x87.fsw)
}

fn fnstsw_ax(cpu: &mut Core, _: &Op) -> Exec {
    cpu.set_reg::<u16>(0, u64::from(cpu.st.x87.fsw));
    Ok(())
}

/// FNCLEX: flags, stack fault, summary and busy.
fn fnclex(cpu: &mut Core, _: &Op) -> Exec {
    cpu.st.x87.fsw &= 0x7f00;
    Ok(())
}

fn fninit(cpu: &mut Core, _: &Op) -> Exec {
    cpu.st.x87.init();
    Ok(())
}

/// FNENI, FNDISI, FNSETPM: they did something on the 8087 or the 287.
fn ignored(_: &mut Core, _: &Op) -> Exec {
    Ok(())
}

/// WAIT.
fn wait(cpu: &mut Core, _: &Op) -> Exec {
    begin(cpu)
}

/// The handler of an x87 control instruction.
pub(crate) fn lower(insn: &Instruction) -> Option<Handler> {
    use Code::*;
    Some(match insn.code() {
        Fnstenv_m14byte => fnstenv::<false>,
        Fnstenv_m28byte => fnstenv::<true>,
        Fldenv_m14byte => fldenv::<false>,
        Fldenv_m28byte => fldenv::<true>,
        Fnsave_m94byte => fnsave::<false>,
        Fnsave_m108byte => fnsave::<true>,
        Frstor_m94byte => frstor::<false>,
        Frstor_m108byte => frstor::<true>,
        Fldcw_m2byte => fldcw,
        Fnstcw_m2byte => fnstcw,
        Fnstsw_m2byte => fnstsw,
        Fnstsw_AX => fnstsw_ax,
        Fnclex => fnclex,
        Fninit => fninit,
        Fneni | Fndisi | Fnsetpm => ignored,
        _ => return None,
    })
}

/// The handler of WAIT, which needs other control bits than the rest of the x87.
pub(crate) fn lower_wait(insn: &Instruction) -> Option<Handler> {
    (insn.code() == Code::Wait).then_some(wait)
}

#[cfg(test)]
mod tests {
    use crate::Exit;
    use crate::NoBus;
    use crate::state::seg;
    use crate::testing::{CODE, Machine};

    const AREA: u64 = 0x4000;

    fn machine() -> Machine {
        let mut machine = Machine::new(Box::new(NoBus));
        machine.cpu.update(|st| st.gpr[3] = AREA);
        machine
    }

    #[test]
    fn fnsave_stores_the_protected_layout_and_frstor_takes_it_back() {
        let mut machine = machine();
        // fldz; fld1; fld qword [rbx + 0x80]; fnsave [rbx]; fnstsw [rbx + 0xc0]; frstor [rbx]; faddp; fnstsw ax
        machine.memory.write(AREA + 0x80, &2.5f64.to_bits().to_le_bytes());
        machine.memory.write(AREA + 0xc0, &[0xff; 2]);
        machine.code(&[
            0xd9, 0xee, 0xd9, 0xe8, 0xdd, 0x83, 0x80, 0, 0, 0, 0xdd, 0x33, 0xdd, 0xbb, 0xc0, 0, 0, 0, 0xdd, 0x23, 0xde,
            0xc1, 0xdf, 0xe0,
        ]);
        let st = machine.run().clone();
        let selectors = (st.segs[seg::CS].selector, st.segs[seg::DS].selector);
        let word = |at: u64| u32::from_le_bytes(machine.memory.read(AREA + at));
        assert_eq!((word(0), word(4)), (0xffff_037f, 0xffff_2800));
        // R7 zero, R6 and R5 valid, the rest empty.
        assert_eq!(word(8), 0xffff_43ff);
        assert_eq!((word(12), word(16) as u16), (CODE as u32 + 4, selectors.0));
        assert_eq!((word(20), word(24)), (AREA as u32 + 0x80, 0xffff_0000 | u32::from(selectors.1)));
        assert_eq!(machine.memory.read::<10>(AREA + 28), [0, 0, 0, 0, 0, 0, 0, 0xa0, 0, 0x40]);
        assert_eq!(word(0xc0) as u16, 0, "saving initialises");
        assert_eq!((st.gpr[0], st.x87.valid), (0x3000, 0xc0));
        assert_eq!((st.x87.sign_exp[6], st.x87.sig[6]), (0x4000, 0xe000_0000_0000_0000));
    }

    #[test]
    fn real_mode_environments_hold_linear_addresses() {
        let mut machine = Machine::real(Box::new(NoBus));
        machine.cpu.update(|st| {
            st.x87 =
                crate::state::X87 { fop: 0x123, fip: 0x1234, fcs: 0xf000, fdp: 8, fds: 0x4000, ..Default::default() };
            st.gpr[3] = AREA;
        });
        // fnstenv [bx]; fldenv [bx]
        machine.code(&[0xd9, 0x37, 0xd9, 0x27]);
        let st = machine.run().clone();
        let word = |at: u64| u16::from_le_bytes(machine.memory.read(AREA + at));
        assert_eq!([word(0), word(2), word(4)], [0x37f, 0, 0xffff]);
        assert_eq!([word(6), word(8), word(10), word(12)], [0x1234, 0xf123, 0x0008, 0x4000]);
        assert_eq!((st.x87.fip, st.x87.fcs, st.x87.fdp, st.x87.fop), (0xf1234, 0, 0x40008, 0x123));
    }

    #[test]
    fn a_pending_error_is_raised_by_the_next_waiting_instruction() {
        let mut machine = machine();
        machine.cpu.update(|st| st.x87.fcw = 0x37b);
        // fld1; fldz; fdivp (unmasked zero divide); fnstsw ax; fwait
        machine.code(&[0xd9, 0xe8, 0xd9, 0xee, 0xde, 0xf9, 0xdf, 0xe0, 0x9b]);
        let exit = machine.cpu.run(100);
        let st = machine.cpu.state();
        assert_ne!(exit, Exit::Halted, "without an IDT the exception shuts the machine down");
        assert_eq!(st.rip, CODE + 8, "the exception is that of FWAIT");
        assert_eq!(st.gpr[0] as u16, 0xb084);
        assert_eq!((st.x87.valid, st.x87.fop), (0xc0, 0x6f9), "nothing was popped, the opcode is noted");
    }
}
