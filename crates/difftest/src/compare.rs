//! Two outcomes of one sequence.

use iced_x86::Code;
use vm_accel_softcpu::state::rflags;

use crate::machine::{CODE, Exactness, Fault, Outcome, Sequence, State};
use crate::policy;

/// x87 registers in an FXSAVE image: ten bytes in sixteen.
const ST: usize = 32;
/// XMM registers.
const XMM: usize = 160;
/// Status word: exceptions summary.
const ES: u16 = 0x80;

fn half(image: &[u8; 512], at: usize) -> u16 {
    u16::from_le_bytes([image[at], image[at + 1]])
}

/// Whether two x87 registers are at most one unit in the last place apart.
fn neighbours(a: &[u8], b: &[u8]) -> bool {
    let line = |x: &[u8]| {
        let significand = x[..8].iter().rev().fold(0u128, |v, &b| v << 8 | u128::from(b)) & !(1 << 63);
        u128::from(x[8]) << 63 | u128::from(x[9]) << 71 | significand
    };
    line(a).abs_diff(line(b)) <= 1
}

/// What differs, in words; empty if nothing does.
pub(crate) fn differences(sequence: &Sequence, ours: &Outcome, host: &Outcome, amd: bool) -> Vec<String> {
    let mut found = Vec::new();
    let mut check = |same: bool, what: &dyn Fn() -> String| {
        if !same {
            found.push(what());
        }
    };
    let (a, b) = (&ours.state, &host.state);
    // Whether something is mapped there is the host's affair: its kernel, libraries and stacks.
    let foreign = host.fault.is_some_and(|fault| fault.vector == 14 && fault.address >> 40 != 0);
    let blamed = crate::generate::instructions(sequence).last().is_none_or(|insn| policy::blames_an_operand(&insn));
    let plain = |fault: Fault| Fault {
        vector: if fault.vector == 12 && !blamed { 13 } else { fault.vector },
        error: fault.error | u64::from(foreign),
        ..fault
    };
    let (fault, theirs) = (ours.fault.map(plain), host.fault.map(plain));
    check(fault == theirs, &|| format!("fault {fault:x?}, host {theirs:x?}"));
    check(a.rip == b.rip, &|| format!("RIP {:#x}, host {:#x}", a.rip, b.rip));
    for i in 0..16 {
        check(a.gpr[i] == b.gpr[i], &|| format!("r{i} {:#x}, host {:#x}", a.gpr[i], b.gpr[i]));
    }
    let compared = State::FLAGS & !(sequence.undefined & rflags::ARITH);
    let flags = (a.rflags ^ b.rflags) & compared;
    check(flags == 0, &|| format!("flags {flags:#x} of {:#x}, host {:#x}", a.rflags, b.rflags));
    let (x, y) = (&a.fx, &b.fx);
    check(half(x, 0) == half(y, 0), &|| format!("FCW {:#x}, host {:#x}", half(x, 0), half(y, 0)));
    // Where the last bit may differ, so may the direction of rounding.
    let c1 = if sequence.exactness == Exactness::LastBit { 0x200 } else { 0 };
    check((half(x, 2) ^ half(y, 2)) & !c1 == 0, &|| format!("FSW {:#x}, host {:#x}", half(x, 2), half(y, 2)));
    check(x[4] == y[4], &|| format!("tags {:#x}, host {:#x}", x[4], y[4]));
    check(a.mxcsr() == b.mxcsr(), &|| format!("MXCSR {:#x}, host {:#x}", a.mxcsr(), b.mxcsr()));
    // AMD's processors save the last instruction's pointers only with an exception pending.
    if amd && half(y, 2) & ES != 0 && half(&sequence.start.fx, 2) & ES == 0 {
        check(x[8..24] == y[8..24], &|| format!("x87 pointers {:x?}, host {:x?}", &x[8..24], &y[8..24]));
        // With FLDCW an earlier exception can become pending: of its instruction only newer processors forget the opcode (SDM
        // vol. 1, 8.1.9.1).
        let unmasked_later = crate::generate::instructions(sequence).any(|insn| insn.code() == Code::Fldcw_m2byte);
        check(x[6..8] == y[6..8] || unmasked_later, &|| format!("FOP {:x?}, host {:x?}", &x[6..8], &y[6..8]));
    }
    for i in 0..8 {
        let at = ST + 16 * i..ST + 10 + 16 * i;
        let (p, q) = (&x[at.clone()], &y[at]);
        let same = p == q || sequence.exactness == Exactness::LastBit && neighbours(p, q);
        check(same, &|| format!("ST{i} {p:02x?}, host {q:02x?}"));
    }
    if sequence.exactness != Exactness::Approximate {
        for i in 0..16 {
            let at = XMM + 16 * i..XMM + 16 + 16 * i;
            let (p, q) = (&x[at.clone()], &y[at]);
            check(p == q, &|| format!("XMM{i} {p:02x?}, host {q:02x?}"));
        }
    }
    if ours.memory != host.memory {
        let at = ours.memory.iter().zip(&host.memory).position(|(p, q)| p != q).unwrap_or(0);
        let end = ours.memory.len().min(at + 16);
        check(false, &|| {
            format!("memory +{at:#x} {:02x?}, host {:02x?}", &ours.memory[at..end], &host.memory[at..end])
        });
    }
    found
}

/// A sequence with everything that is needed to run it again by hand.
pub(crate) fn describe(sequence: &Sequence) -> String {
    let mut text = String::new();
    for &(at, len) in &sequence.executed {
        let bytes = &sequence.code[at..at + len];
        let insn = crate::generate::decode(CODE + at as u64, bytes);
        text += &format!("  {:#x} {bytes:02x?} {:?}\n", CODE + at as u64, insn.code());
    }
    let start = &sequence.start;
    text +=
        &format!("  registers {:x?}\n  flags {:#x}, undefined {:#x}\n", start.gpr, start.rflags, sequence.undefined);
    text
}
