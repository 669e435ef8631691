//! Random x87 and SSE floating-point instructions in random states, on the software CPU and on the processor the test
//! runs on: registers, flags, status words, memory and exceptions must agree.
//!
//! Only on x86-64 Linux, where code can be made executable and a trap can be caught. `VM_ACCEL_FP_ROUNDS` multiplies
//! the number of instructions, `VM_ACCEL_FP_SEED` picks others.
//!
//! What is not compared, because processors differ among themselves: the bits of RCPSS and RSQRTSS and the last bit of
//! transcendental functions. The finer points of the x87 were established on AMD's processors; on others its exceptions
//! stay masked (what an unmasked one leaves behind is not the same everywhere) and transcendental functions are left out.

#![cfg(all(target_os = "linux", target_arch = "x86_64"))]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use iced_x86::{Code, Decoder, DecoderOptions, Instruction, Register};
use vm_accel_softcpu::state::Segment;
use vm_accel_softcpu::{Config, Cpu, CpuState, Emulated, Exception, NoBus, Ram, TscMode};

/// Guest addresses: of the instruction, of its memory operand, of the page tables.
const CODE: u64 = 0x1000;
const DATA: u64 = 0x4000;
const TABLES: u64 = 0x8000;
const RAM: usize = 0x10000;
/// Bytes of memory that operands are in.
const WINDOW: usize = 256;
/// CF, PF, AF, ZF, SF, OF.
const ARITHMETIC: u64 = 0x8d5;

/// A small generator (xorshift64*).
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 11) % n
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    /// Few bits, runs of bits, or noise.
    fn sig(&mut self) -> u64 {
        match self.below(8) {
            0 => 0,
            1 => !0,
            2 => 1 << self.below(64),
            3 => !0 << self.below(64),
            4 => (1 << self.below(64)) - 1,
            5 => 1 << self.below(64) | 1 << self.below(64),
            6 => self.next() << self.below(64),
            _ => self.next(),
        }
    }

    /// A biased exponent: often at an end or near one half.
    fn exponent(&mut self, special: u64) -> u64 {
        match self.below(6) {
            0 => self.below(3),
            1 => special - self.below(3),
            2 | 3 => special / 2 + self.below(8) - 4,
            4 => (special / 2 + self.below(140)).saturating_sub(70).min(special),
            _ => self.below(special + 1),
        }
    }

    fn single(&mut self) -> u32 {
        self.next() as u32 & 1 << 31 | (self.exponent(255) as u32) << 23 | (self.sig() >> 41) as u32
    }

    fn double(&mut self) -> u64 {
        self.next() & 1 << 63 | self.exponent(2047) << 52 | self.sig() >> 12
    }

    /// Sign and exponent, significand; sometimes an encoding that is not supported.
    fn extended(&mut self) -> (u16, u64) {
        let exponent = self.exponent(0x7fff) as u16;
        let sig = self.sig();
        let sig = match exponent {
            _ if self.one_in(32) => sig,
            0 => sig >> 1,
            _ => sig | 1 << 63,
        };
        (exponent | (self.next() as u16 & 1) << 15, sig)
    }

    /// 16 bytes that make sense as one format or another.
    fn vector(&mut self) -> u128 {
        match self.below(3) {
            0 => (0..4).fold(0, |v, _| v << 32 | u128::from(self.single())),
            1 => (0..2).fold(0, |v, _| v << 64 | u128::from(self.double())),
            _ => u128::from(self.sig()) << 64 | u128::from(self.sig()),
        }
    }

    fn memory(&mut self) -> [u8; WINDOW] {
        let mut memory = [0; WINDOW];
        for chunk in memory.chunks_exact_mut(16) {
            let value = match self.below(6) {
                0 => {
                    let (sign_exp, sig) = self.extended();
                    u128::from(sign_exp) << 64 | u128::from(sig)
                }
                // Packed decimal.
                1 => (0..18).fold(u128::from(self.next() & 1), |v, _| v << 4 | u128::from(self.below(10))),
                _ => self.vector(),
            };
            chunk.copy_from_slice(&value.to_le_bytes());
        }
        memory
    }
}

/// What the native code loads and stores; the offsets are in [`Native::assemble`].
#[repr(C, align(64))]
struct Context {
    before: [u8; 512],
    after: [u8; 512],
    rax: u64,
    rcx: u64,
    rbx: u64,
    rflags: u64,
    rflags_after: u64,
    rax_after: u64,
    rcx_after: u64,
    scratch: u64,
}

/// Where the signal handler continues, and which signal it saw.
static RESUME: AtomicU64 = AtomicU64::new(0);
static SIGNAL: AtomicU64 = AtomicU64::new(0);

extern "C" fn on_signal(signal: i32, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    SIGNAL.store(signal as u64, Ordering::SeqCst);
    // SAFETY: the kernel hands a valid context to a handler installed with SA_SIGINFO.
    let context = unsafe { &mut *context.cast::<libc::ucontext_t>() };
    context.uc_mcontext.gregs[libc::REG_RIP as usize] = RESUME.load(Ordering::SeqCst) as i64;
}

/// One page to run code from.
struct Native {
    page: *mut u8,
}

impl Native {
    fn new() -> Self {
        // SAFETY: a fresh anonymous mapping; the handler is async-signal-safe and only signals that nothing else in
        // this test process expects are taken.
        unsafe {
            let access = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let page = libc::mmap(std::ptr::null_mut(), 4096, access, flags, -1, 0);
            assert_ne!(page, libc::MAP_FAILED, "no executable memory");
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_signal as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER;
            for signal in [libc::SIGFPE, libc::SIGSEGV, libc::SIGILL] {
                assert_eq!(libc::sigaction(signal, &action, std::ptr::null_mut()), 0);
            }
            Native { page: page.cast() }
        }
    }

    /// The code around `insn`, and where in it the instruction and what follows it are.
    fn assemble(insn: &[u8]) -> (Vec<u8>, usize, usize) {
        let mut code = vec![
            0x53, 0x55, 0x41, 0x54, 0x41, 0x55, 0x41, 0x56, 0x41, 0x57, // push rbx, rbp, r12 to r15
            0x49, 0x89, 0xff, // mov r15, rdi
            0x49, 0x0f, 0xae, 0x0f, // fxrstor64 [r15]
            0x49, 0x8b, 0x87, 0x00, 0x04, 0, 0, // mov rax, [r15 + 0x400]
            0x49, 0x8b, 0x8f, 0x08, 0x04, 0, 0, // mov rcx, [r15 + 0x408]
            0x49, 0x8b, 0x9f, 0x10, 0x04, 0, 0, // mov rbx, [r15 + 0x410]
            0x41, 0xff, 0xb7, 0x18, 0x04, 0, 0, 0x9d, // push qword [r15 + 0x418]; popfq
        ];
        let at = code.len();
        code.extend(insn);
        let resume = code.len();
        code.extend([
            0x9c, 0x41, 0x8f, 0x87, 0x20, 0x04, 0, 0, // pushfq; pop qword [r15 + 0x420]
            0x49, 0x0f, 0xae, 0x87, 0x00, 0x02, 0, 0, // fxsave64 [r15 + 0x200]
            0x49, 0x89, 0x87, 0x28, 0x04, 0, 0, // mov [r15 + 0x428], rax
            0x49, 0x89, 0x8f, 0x30, 0x04, 0, 0, // mov [r15 + 0x430], rcx
            0xdb, 0xe3, // fninit
            0x41, 0xc7, 0x87, 0x38, 0x04, 0, 0, 0x80, 0x1f, 0, 0, // mov dword [r15 + 0x438], 0x1f80
            0x41, 0x0f, 0xae, 0x97, 0x38, 0x04, 0, 0, // ldmxcsr [r15 + 0x438]
            0x41, 0x5f, 0x41, 0x5e, 0x41, 0x5d, 0x41, 0x5c, 0x5d, 0x5b, 0xc3, // pop them; ret
        ]);
        (code, at, resume)
    }

    /// Runs one instruction: the signal it caused (or 0) and its address.
    fn run(&self, context: &mut Context, insn: &[u8]) -> (u64, u64) {
        let (code, at, resume) = Self::assemble(insn);
        RESUME.store(self.page as u64 + resume as u64, Ordering::SeqCst);
        SIGNAL.store(0, Ordering::SeqCst);
        // SAFETY: the code fits the page and follows the C ABI; the instruction under test writes nothing but the
        // memory that RBX points to, RAX, RCX and floating-point state, which the code puts back.
        unsafe {
            std::ptr::copy_nonoverlapping(code.as_ptr(), self.page, code.len());
            let run: extern "C" fn(*mut Context) = std::mem::transmute(self.page);
            run(context);
        }
        (SIGNAL.load(Ordering::SeqCst), self.page as u64 + at as u64)
    }
}

/// Guest memory that outlives the CPU.
struct Memory(*mut u8);
// SAFETY: the allocation is leaked, and one thread at a time uses it.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    fn new() -> Self {
        let words: &'static mut [u128] = vec![0u128; RAM / 16].leak();
        Memory(words.as_mut_ptr().cast())
    }

    fn write(&self, gpa: u64, bytes: &[u8]) {
        assert!(gpa as usize + bytes.len() <= RAM);
        // SAFETY: inside the allocation.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.0.add(gpa as usize), bytes.len()) };
    }

    fn window(&self) -> [u8; WINDOW] {
        let mut bytes = [0; WINDOW];
        // SAFETY: inside the allocation.
        unsafe { std::ptr::copy_nonoverlapping(self.0.add(DATA as usize), bytes.as_mut_ptr(), WINDOW) };
        bytes
    }
}

/// A software CPU in 64-bit mode with its first 64 KiB mapped one to one.
fn machine() -> (Cpu, Arc<Memory>) {
    let memory = Arc::new(Memory::new());
    let ram = Ram::new();
    // SAFETY: the allocation is never freed.
    unsafe { ram.map(0, memory.0, RAM as u64, true, memory.clone()) }.expect("the range is valid");
    let config = Config { tsc: TscMode::Instructions(1), ..Config::default() };
    let mut cpu = Cpu::new(0, config, ram, Box::new(NoBus));
    for level in 0..3 {
        let table = TABLES + 0x1000 * level;
        memory.write(table, &(table + 0x1003).to_le_bytes());
    }
    for page in 0..RAM as u64 >> 12 {
        memory.write(TABLES + 0x3000 + 8 * page, &(page << 12 | 3).to_le_bytes());
    }
    cpu.update(|st| {
        let code = Segment { selector: 8, base: 0, limit: u32::MAX, access: 0xa09b, unusable: false };
        st.segs[..6].fill(Segment { selector: 16, access: 0xc093, ..code });
        st.segs[1] = code;
        st.cr0 = 0x8001_0031;
        st.cr3 = TABLES;
        st.cr4 = 0x620;
        st.msr.efer = 0xd01;
        st.rip = CODE;
        st.x87.fcw = 0x37f;
        st.x87.valid = 0;
    });
    (cpu, memory)
}

/// The floating-point state as FXSAVE64 lays it out.
fn image(st: &CpuState) -> [u8; 512] {
    let mut image = [0; 512];
    image[0..2].copy_from_slice(&st.x87.fcw.to_le_bytes());
    image[2..4].copy_from_slice(&st.x87.fsw.to_le_bytes());
    image[4] = st.x87.valid;
    image[6..8].copy_from_slice(&st.x87.fop.to_le_bytes());
    image[8..16].copy_from_slice(&st.x87.fip.to_le_bytes());
    image[16..24].copy_from_slice(&st.x87.fdp.to_le_bytes());
    image[24..28].copy_from_slice(&st.mxcsr.to_le_bytes());
    let top = usize::from(st.x87.fsw >> 11);
    for i in 0..8 {
        let (r, at) = ((top + i) & 7, 32 + 16 * i);
        image[at..at + 8].copy_from_slice(&st.x87.sig[r].to_le_bytes());
        image[at + 8..at + 10].copy_from_slice(&st.x87.sign_exp[r].to_le_bytes());
    }
    for (i, xmm) in st.xmm.iter().enumerate() {
        image[160 + 16 * i..176 + 16 * i].copy_from_slice(&xmm.to_le_bytes());
    }
    image
}

/// A register or `[rbx + offset]`.
fn modrm(rng: &mut Rng) -> Vec<u8> {
    let reg = rng.below(8) as u8;
    if rng.one_in(2) {
        vec![0xc0 | reg << 3 | rng.below(8) as u8]
    } else {
        vec![0x43 | reg << 3, rng.pick(&[0u8, 4, 8, 16, 32, 64])]
    }
}

fn x87_bytes(rng: &mut Rng) -> Vec<u8> {
    if rng.one_in(100) {
        return vec![0x9b];
    }
    let mut bytes = vec![0xd8 + rng.below(8) as u8];
    bytes.extend(modrm(rng));
    bytes
}

fn sse_bytes(rng: &mut Rng) -> Vec<u8> {
    const OPCODES: [u8; 23] = [
        0x2a, 0x2c, 0x2d, 0x2e, 0x2f, 0x51, 0x52, 0x53, 0x58, 0x59, 0x5a, 0x5b, 0x5c, 0x5d, 0x5e, 0x5f, 0x7c, 0x7d,
        0xd0, 0xe6, 0xc2, 0x3a, 0xae,
    ];
    let prefix: &[u8] = rng.pick(&[&[], &[0x66], &[0xf2], &[0xf3]]);
    let mut bytes = prefix.to_vec();
    if rng.one_in(4) {
        bytes.push(0x48);
    }
    let opcode = rng.pick(&OPCODES);
    bytes.extend([0x0f, opcode]);
    if opcode == 0x3a {
        bytes.push(rng.pick(&[8u8, 9, 10, 11, 0x40, 0x41]));
    }
    bytes.extend(modrm(rng));
    if opcode == 0xc2 || opcode == 0x3a {
        bytes.push(rng.next() as u8);
    }
    bytes
}

/// Whether the instruction is for this test.
fn suits(insn: &Instruction, x87: bool) -> bool {
    let registers_fit = [insn.op0_register(), insn.op1_register()]
        .iter()
        .all(|r| !r.is_gpr() || matches!(r.full_register(), Register::RAX | Register::RCX));
    // Loading an environment loads whatever the memory holds as status word; other members of these opcode groups
    // are not floating point; the 8087's leftovers differ.
    let other = matches!(
        insn.code(),
        Code::Fldenv_m28byte
            | Code::Frstor_m108byte
            | Code::Fnstenv_m28byte
            | Code::Fnsave_m108byte
            | Code::Frstpm
            | Code::Fxsave_m512byte
            | Code::Fxsave64_m512byte
            | Code::Fxrstor_m512byte
            | Code::Fxrstor64_m512byte
            | Code::Ldmxcsr_m32
    );
    let family = x87 || format!("{:?}", insn.code()).contains("mm") || insn.code() == Code::Stmxcsr_m32;
    registers_fit && family && !other
}

/// A random state for an instruction.
fn randomize(rng: &mut Rng, st: &mut CpuState, unmask_x87: bool) {
    st.x87.fcw = 0x40 | rng.next() as u16 & 0xc00 | rng.pick(&[0, 0x200, 0x300, 0x300]);
    st.x87.fcw |= if unmask_x87 && rng.one_in(2) { rng.next() as u16 & 0x3f } else { 0x3f };
    st.x87.fsw = rng.next() as u16 & 0x7f00;
    if rng.one_in(3) {
        st.x87.fsw |= rng.next() as u16 & 0x7f;
    }
    let pending = st.x87.fsw & !st.x87.fcw & 0x3f;
    if pending != 0 && rng.one_in(8) {
        st.x87.fsw |= 0x8080;
    } else {
        st.x87.fsw &= !pending;
    }
    // Three registers in use, so that most instructions meet no stack fault, or any.
    let top = st.x87.fsw >> 11 & 7;
    st.x87.valid = if rng.one_in(2) { rng.next() as u8 } else { 7u8.rotate_left(u32::from(top)) };
    for r in 0..8 {
        (st.x87.sign_exp[r], st.x87.sig[r]) = if rng.one_in(20) { (0xffff, rng.next()) } else { rng.extended() };
    }
    (st.x87.fop, st.x87.fip, st.x87.fdp) = (0, 0, 0);
    for xmm in &mut st.xmm {
        *xmm = rng.vector();
    }
    let masks = if rng.one_in(2) { 0x3f } else { rng.next() as u32 & 0x3f };
    st.mxcsr = masks << 7;
    if rng.one_in(2) {
        st.mxcsr |= rng.next() as u32 & 0xe000;
    }
    if rng.one_in(4) {
        st.mxcsr |= 0x40;
    }
    if rng.one_in(2) {
        st.mxcsr |= rng.next() as u32 & 0x3f;
    }
    st.rip = CODE;
    (st.gpr[0], st.gpr[1], st.gpr[3]) = (rng.sig(), rng.sig(), DATA);
    st.rflags = 2 | rng.next() & ARITHMETIC;
}

fn word(image: &[u8; 512], at: usize) -> u64 {
    image[at..at + 8].iter().rev().fold(0, |v, &b| v << 8 | u64::from(b))
}

/// Whether two results are at most one unit in the last place apart.
fn neighbours(a: &[u8], b: &[u8]) -> bool {
    let line = |x: &[u8]| {
        let sig = x[..8].iter().rev().fold(0u128, |v, &b| v << 8 | u128::from(b)) & !(1 << 63);
        u128::from(x[8]) << 63 | u128::from(x[9]) << 71 | sig
    };
    line(a).abs_diff(line(b)) <= 1
}

fn transcendental(code: Code) -> bool {
    use Code::*;
    matches!(code, F2xm1 | Fyl2x | Fyl2xp1 | Fpatan | Fsin | Fcos | Fsincos | Fptan)
}

fn approximate(code: Code) -> bool {
    use Code::*;
    matches!(code, Rcpss_xmm_xmmm32 | Rcpps_xmm_xmmm128 | Rsqrtss_xmm_xmmm32 | Rsqrtps_xmm_xmmm128)
}

/// Runs `rounds` instructions on both sides.
fn compare(x87: bool, rounds: u64) {
    // The signal handler and its cells are for one test at a time.
    static ONE: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());

    let number = |name: &str, default| std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default);
    let mut rng = Rng(number("VM_ACCEL_FP_SEED", 0x9e37_79b9));
    let rounds = rounds * number("VM_ACCEL_FP_ROUNDS", 1);
    let amd = std::fs::read_to_string("/proc/cpuinfo").is_ok_and(|text| text.contains("AuthenticAMD"));
    let native = Native::new();
    let (mut cpu, guest) = machine();
    #[repr(align(64))]
    struct Window([u8; WINDOW]);
    let mut window = Box::new(Window([0; WINDOW]));

    let mut done = 0;
    while done < rounds {
        let bytes = if x87 { x87_bytes(&mut rng) } else { sse_bytes(&mut rng) };
        let insn = Decoder::new(64, &bytes, DecoderOptions::NONE).decode();
        if insn.is_invalid() || insn.len() != bytes.len() || !suits(&insn, x87) {
            continue;
        }
        if !amd && (insn.code() == Code::Fstpnce_sti || transcendental(insn.code())) {
            continue;
        }
        done += 1;
        let code = insn.code();
        cpu.update(|st| randomize(&mut rng, st, amd));
        let before = cpu.state().clone();
        window.0 = rng.memory();
        guest.write(DATA, &window.0);
        guest.write(CODE, &bytes);

        let base = window.0.as_ptr() as u64;
        let mut context = Box::new(Context {
            before: image(&before),
            after: [0; 512],
            rax: before.gpr[0],
            rcx: before.gpr[1],
            rbx: base,
            rflags: before.rflags | 0x200,
            rflags_after: 0,
            rax_after: 0,
            rcx_after: 0,
            scratch: 0,
        });
        let (signal, at) = native.run(&mut context, &bytes);
        let mine = match cpu.emulate_one(&bytes) {
            Emulated::Done => 0,
            Emulated::Exception(Exception::Mf | Exception::Xm) => libc::SIGFPE,
            Emulated::Exception(Exception::Gp(0)) => libc::SIGSEGV,
            Emulated::Exception(Exception::Ud) => libc::SIGILL,
            other => panic!("{code:?} {bytes:02x?}: {other:?}"),
        };

        let st = cpu.state();
        let (got, want) = (image(st), &context.after);
        let mut wrong = Vec::new();
        let mut check = |what: &str, ok: bool| {
            if !ok {
                wrong.push(what.to_owned());
            }
        };
        check("exception", mine as u64 == signal);
        check("FCW", got[..2] == want[..2]);
        // Where the last bit may differ, so may the direction of rounding.
        let c1 = if transcendental(code) { 0x200 } else { 0 };
        check("FSW", (word(&got, 2) ^ word(want, 2)) & 0xffff & !c1 == 0);
        check("tags", got[4] == want[4]);
        check("MXCSR", got[24..28] == want[24..28]);
        if want[2] & 0x80 != 0 && before.x87.fsw & 0x80 == 0 {
            check("FOP", got[6..8] == want[6..8]);
            // Control instructions leave the pointers as they were, which is zero.
            let offset = |address: u64, base: u64| {
                if address == 0 { 0 } else { address.wrapping_sub(base) }
            };
            check("FIP", offset(word(&got, 8), CODE) == offset(word(want, 8), at));
            check("FDP", offset(word(&got, 16), DATA) == offset(word(want, 16), base));
        }
        for i in 0..8 {
            let range = 32 + 16 * i..42 + 16 * i;
            let (a, b) = (&got[range.clone()], &want[range]);
            check(&format!("ST{i}"), a == b || transcendental(code) && neighbours(a, b));
        }
        for i in (0..16).filter(|_| !approximate(code)) {
            let range = 160 + 16 * i..176 + 16 * i;
            check(&format!("XMM{i}"), got[range.clone()] == want[range]);
        }
        check("RAX", st.gpr[0] == context.rax_after);
        check("RCX", st.gpr[1] == context.rcx_after);
        check("flags", (st.rflags ^ context.rflags_after) & ARITHMETIC == 0);
        check("memory", guest.window() == window.0);
        assert!(
            wrong.is_empty(),
            "{wrong:?} after {done}: {code:?} {bytes:02x?} signal {signal}\nx87 before {:x?}\nx87 after {:x?}\n\
             xmm before {:x?} mxcsr {:x}\nxmm after {:x?} mxcsr {:x}\nwant {want:x?}",
            before.x87,
            st.x87,
            before.xmm,
            before.mxcsr,
            st.xmm,
            st.mxcsr,
        );
    }
}

#[test]
fn sse_instructions() {
    compare(false, 100_000);
}

#[test]
fn x87_instructions() {
    compare(true, 100_000);
}
