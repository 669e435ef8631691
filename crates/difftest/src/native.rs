//! The host processor: a sequence runs in this process, between code that loads and stores all registers, at fixed addresses. An exception
//! arrives as a signal, whose frame has the state.
//!
//! Only code that `generate` made may be run here: it makes no system call, changes no segment register, and what it reads and writes is
//! in pages that are its own, or nobody's.

use std::sync::{Mutex, MutexGuard, PoisonError};

use vm_accel_softcpu::state::rflags;

use crate::machine::{
    CODE, CODE_LEN, DATA, DATA_LEN, Fault, Outcome, READ_ONLY, READ_ONLY_LEN, Sequence, State, read_only,
};

/// The context page, and behind it the page of the code around a sequence.
const CONTEXT: u64 = 0x2a10_0000;
const STUBS: u64 = CONTEXT + 0x1000;

/// What is in the context page. The host's stack pointer and MXCSR while a sequence runs; the state before it; the state after it.
#[repr(C, align(64))]
struct Context {
    host_rsp: u64,
    host_mxcsr: u32,
    /// Whether the handler was there, and what it saw.
    faulted: u32,
    fault: [u64; 3],
    rip: u64,
    before: Registers,
    after: Registers,
}

#[repr(C, align(64))]
struct Registers {
    fx: [u8; 512],
    gpr: [u64; 16],
    rflags: u64,
}

const BEFORE: usize = std::mem::offset_of!(Context, before);
const AFTER: usize = std::mem::offset_of!(Context, after);
const GPR: usize = std::mem::offset_of!(Registers, gpr);
const RFLAGS: usize = std::mem::offset_of!(Registers, rflags);
const HOST_RSP: usize = std::mem::offset_of!(Context, host_rsp);
const HOST_MXCSR: usize = std::mem::offset_of!(Context, host_mxcsr);

/// Code that refers to the context by RIP-relative operands.
struct Assembler(Vec<u8>);

impl Assembler {
    /// An instruction whose last byte so far is a ModRM byte with mod 0 and r/m 5.
    fn relative(&mut self, bytes: &[u8], slot: usize) {
        self.0.extend(bytes);
        let next = STUBS + self.0.len() as u64 + 4;
        self.0.extend(((CONTEXT + slot as u64).wrapping_sub(next) as u32).to_le_bytes());
    }

    fn registers(&mut self, opcode: u8, at: usize) {
        for reg in 0..16 {
            let rex = if reg < 8 { 0x48 } else { 0x4c };
            self.relative(&[rex, opcode, 5 | (reg as u8 & 7) << 3], at + GPR + 8 * reg);
        }
    }

    fn jump(&mut self, target: u64) {
        self.0.push(0xe9);
        let next = STUBS + self.0.len() as u64 + 4;
        self.0.extend((target.wrapping_sub(next) as u32).to_le_bytes());
    }
}

/// The code around a sequence, where it is entered from its end, and where after a signal.
fn stubs() -> (Vec<u8>, usize, usize) {
    let mut code = Assembler(Vec::new());
    // push rbx, rbp, r12 to r15; mov [host_rsp], rsp; stmxcsr [host_mxcsr]
    code.0.extend([0x53, 0x55, 0x41, 0x54, 0x41, 0x55, 0x41, 0x56, 0x41, 0x57]);
    code.relative(&[0x48, 0x89, 0x25], HOST_RSP);
    code.relative(&[0x0f, 0xae, 0x1d], HOST_MXCSR);
    // fxrstor64; push flags; popfq; mov of all registers; jmp
    code.relative(&[0x48, 0x0f, 0xae, 0x0d], BEFORE);
    code.relative(&[0xff, 0x35], BEFORE + RFLAGS);
    code.0.push(0x9d);
    code.registers(0x8b, BEFORE);
    code.jump(CODE);
    let done = code.0.len();
    code.registers(0x89, AFTER);
    // mov rsp, [host_rsp]; pushfq; pop flags; fxsave64
    code.relative(&[0x48, 0x8b, 0x25], HOST_RSP);
    code.0.push(0x9c);
    code.relative(&[0x8f, 0x05], AFTER + RFLAGS);
    code.relative(&[0x48, 0x0f, 0xae, 0x05], AFTER);
    let leave = code.0.len();
    // mov rsp, [host_rsp]; push 0x202; popfq; fninit; ldmxcsr; pop all; ret
    code.relative(&[0x48, 0x8b, 0x25], HOST_RSP);
    code.0.extend([0x68, 0x02, 0x02, 0, 0, 0x9d, 0xdb, 0xe3]);
    code.relative(&[0x0f, 0xae, 0x15], HOST_MXCSR);
    code.0.extend([0x41, 0x5f, 0x41, 0x5e, 0x41, 0x5d, 0x41, 0x5c, 0x5d, 0x5b, 0xc3]);
    (code.0, done, leave)
}

const SIGNALS: [i32; 5] = [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL, libc::SIGTRAP];
/// Bytes of the stack on which signals are handled; a sequence may leave any value in RSP.
const SIGNAL_STACK: usize = 64 << 10;

/// Puts the state that a signal found into the context and makes the sequence end.
extern "C" fn on_signal(signal: i32, _: *mut libc::siginfo_t, frame: *mut libc::c_void) {
    // SAFETY: the kernel hands a valid context to a handler installed with SA_SIGINFO.
    let frame = unsafe { &mut (*frame.cast::<libc::ucontext_t>()).uc_mcontext };
    let gregs = &mut frame.gregs;
    let rip = gregs[libc::REG_RIP as usize] as u64;
    if !(CODE..CODE + CODE_LEN as u64).contains(&rip) {
        // Not a sequence's: with the default action the instruction that caused it ends the process.
        // SAFETY: sigaction with a zeroed action is SIG_DFL.
        unsafe { libc::sigaction(signal, &std::mem::zeroed(), std::ptr::null_mut()) };
        return;
    }
    const ORDER: [i32; 16] = [
        libc::REG_RAX,
        libc::REG_RCX,
        libc::REG_RDX,
        libc::REG_RBX,
        libc::REG_RSP,
        libc::REG_RBP,
        libc::REG_RSI,
        libc::REG_RDI,
        libc::REG_R8,
        libc::REG_R9,
        libc::REG_R10,
        libc::REG_R11,
        libc::REG_R12,
        libc::REG_R13,
        libc::REG_R14,
        libc::REG_R15,
    ];
    // SAFETY: sequences run only while `Native` holds the page, and the thread that runs one is the only one that uses it. The
    // frame of an x86-64 process always has a floating-point state, which begins as an FXSAVE image.
    unsafe {
        let context = &mut *(CONTEXT as *mut Context);
        context.after.gpr = ORDER.map(|reg| gregs[reg as usize] as u64);
        context.after.rflags = gregs[libc::REG_EFL as usize] as u64;
        std::ptr::copy_nonoverlapping(frame.fpregs.cast::<u8>(), context.after.fx.as_mut_ptr(), 512);
        context.rip = rip;
        context.fault = [libc::REG_TRAPNO, libc::REG_ERR, libc::REG_CR2].map(|reg| gregs[reg as usize] as u64);
        // The stub for it is behind the other code, see `Native::new`.
        gregs[libc::REG_RIP as usize] = i64::from(context.faulted) + STUBS as i64;
        context.faulted = 0;
    }
    gregs[libc::REG_EFL as usize] = 0x202;
}

/// The fixed addresses and the signals belong to one of these at a time.
static ONE: Mutex<()> = Mutex::new(());

/// The host as an executor. Bound to its thread by the signal stack.
pub(crate) struct Native {
    context: *mut Context,
    done: usize,
    leave: usize,
    signal_stack: Vec<u8>,
    old_stack: libc::stack_t,
    old_actions: Vec<(i32, libc::sigaction)>,
    _one: MutexGuard<'static, ()>,
}

/// The ranges of addresses that are ours, with the pages around them that nothing may be in.
const RANGES: [(u64, usize); 2] = [(CONTEXT, 0x4000), (DATA - 0x1000, DATA_LEN + READ_ONLY_LEN + 0x2000)];

fn last_error(what: &str) -> String {
    format!("{what}: {}", std::io::Error::last_os_error())
}

impl Native {
    pub(crate) fn new() -> Result<Self, String> {
        let one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
        for (at, len) in RANGES {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
            // SAFETY: a new mapping that replaces nothing.
            let got = unsafe { libc::mmap(at as *mut _, len, libc::PROT_NONE, flags, -1, 0) };
            if got as u64 != at {
                return Err(last_error("addresses that are needed are taken"));
            }
        }
        let protect = |at: u64, len: usize, protection| {
            // SAFETY: changes pages that were just mapped.
            match unsafe { libc::mprotect(at as *mut _, len, protection) } {
                0 => Ok(()),
                _ => Err(last_error("memory cannot be protected")),
            }
        };
        let (read, write, execute) = (libc::PROT_READ, libc::PROT_WRITE, libc::PROT_EXEC);
        let (code, done, leave) = stubs();
        protect(CONTEXT, 0x2000, read | write)?;
        protect(DATA, DATA_LEN + READ_ONLY_LEN, read | write)?;
        // SAFETY: both fit the pages that they are copied to.
        unsafe {
            std::ptr::copy_nonoverlapping(code.as_ptr(), STUBS as *mut u8, code.len());
            std::ptr::copy_nonoverlapping(read_only().as_ptr(), READ_ONLY as *mut u8, READ_ONLY_LEN);
        }
        protect(STUBS, 0x1000, read | execute)?;
        protect(READ_ONLY, READ_ONLY_LEN, read)?;
        protect(CODE, CODE_LEN, read | write | execute)?;

        let mut signal_stack = vec![0; SIGNAL_STACK];
        let stack = libc::stack_t { ss_sp: signal_stack.as_mut_ptr().cast(), ss_flags: 0, ss_size: SIGNAL_STACK };
        let mut old_actions = Vec::new();
        // SAFETY: plain system calls; the stack lives as long as `self`, whose drop takes it out of use. The handler only touches
        // the context page.
        let old_stack = unsafe {
            let mut old_stack: libc::stack_t = std::mem::zeroed();
            if libc::sigaltstack(&stack, &mut old_stack) != 0 {
                return Err(last_error("no signal stack"));
            }
            for signal in SIGNALS {
                let mut action: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction = on_signal as *const () as usize;
                action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
                let mut old: libc::sigaction = std::mem::zeroed();
                if libc::sigaction(signal, &action, &mut old) != 0 {
                    return Err(last_error("no signal handler"));
                }
                old_actions.push((signal, old));
            }
            old_stack
        };
        Ok(Self { context: CONTEXT as *mut Context, done, leave, signal_stack, old_stack, old_actions, _one: one })
    }

    /// Runs a sequence.
    pub(crate) fn run(&mut self, sequence: &Sequence) -> Outcome {
        let code = &sequence.code;
        let mut tail = [0xe9, 0, 0, 0, 0];
        let end = CODE + code.len() as u64;
        let jump = (STUBS + self.done as u64).wrapping_sub(end + 5) as u32;
        tail[1..].copy_from_slice(&jump.to_le_bytes());
        assert!(code.len() + tail.len() <= CODE_LEN && sequence.memory.len() == DATA_LEN);
        let mut memory = vec![0; DATA_LEN];
        // SAFETY: the copies stay in pages that are ours and writable. The code at the start of the stubs follows the C ABI: it
        // keeps the registers that it must, and puts back flags, MXCSR, the x87 and the stack pointer. What the sequence itself does is
        // for `generate` to answer for.
        unsafe {
            let context = &mut *self.context;
            context.before.fx = sequence.start.fx;
            context.before.gpr = sequence.start.gpr;
            context.before.rflags = sequence.start.rflags | rflags::IF;
            context.faulted = self.leave as u32;
            std::ptr::copy_nonoverlapping(sequence.memory.as_ptr(), DATA as *mut u8, DATA_LEN);
            std::ptr::copy_nonoverlapping(code.as_ptr(), CODE as *mut u8, code.len());
            std::ptr::copy_nonoverlapping(tail.as_ptr(), (CODE as *mut u8).add(code.len()), tail.len());
            let run: extern "C" fn() = std::mem::transmute(STUBS as *const u8);
            run();
            std::ptr::copy_nonoverlapping(DATA as *const u8, memory.as_mut_ptr(), DATA_LEN);
        }
        // SAFETY: the page is mapped, and the sequence has ended.
        let context = unsafe { &*self.context };
        let faulted = context.faulted == 0;
        let [vector, error, address] = context.fault;
        let fault = faulted.then_some(Fault {
            vector: vector as u8,
            error: if matches!(vector, 8 | 10..=14 | 17) { error } else { 0 },
            address: if vector == 14 { address } else { 0 },
        });
        let after = &context.after;
        let rip = if faulted { context.rip } else { end };
        Outcome { state: State { gpr: after.gpr, rip, rflags: after.rflags, fx: after.fx }, fault, memory }
    }
}

impl Drop for Native {
    fn drop(&mut self) {
        // SAFETY: takes back what `new` installed; nothing refers to the mappings any more.
        unsafe {
            for (signal, old) in &self.old_actions {
                libc::sigaction(*signal, old, std::ptr::null_mut());
            }
            libc::sigaltstack(&self.old_stack, std::ptr::null_mut());
            for (at, len) in RANGES {
                libc::munmap(at as *mut _, len);
            }
        }
        self.signal_stack.clear();
    }
}
