//! Kicking a vCPU out of `KVM_RUN`.
//!
//! Two things make it return: `immediate_exit` in the shared run area, which the kernel looks at before it enters the
//! guest, and a signal, which takes it out of the guest or a blocked HLT. Setting the first and then sending the second
//! closes the race that a signal alone has (it may arrive just before the ioctl). The signal's handler does nothing; it
//! is installed once, for one signal number, and no other handler of the application is touched.
//!
//! The order that no kick escapes: the kicker stores `immediate_exit`, then loads the thread id; the vCPU stores its
//! thread id, then enters the kernel, which loads `immediate_exit`. With sequential consistency on both sides at least
//! one of them sees the other's store.

use crate::ffi::kvm::last_errno;
use std::cell::Cell;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU8, Ordering, fence};
use std::sync::{Mutex, MutexGuard, PoisonError};
use vm_accel_core::error::{AccelError, VcpuResult};
use vm_accel_core::vcpu_common::KickTarget;

/// The signal that kicks, once it is decided; 0 before.
static SIGNAL: Mutex<i32> = Mutex::new(0);

thread_local! {
    /// This thread's id, and proof that it does not block the signal: set at its first `run()`.
    static THREAD: Cell<i32> = const { Cell::new(0) };
}

/// Chooses the signal that interrupts `KVM_RUN`, for the whole process. Call it before the first virtual machine is
/// created; without it the first real-time signal that the application does not handle is taken.
///
/// # Errors
/// [`AccelError::InvalidArgument`] if the signal cannot be caught, the application handles it already, or another one was
/// chosen before.
pub fn set_kick_signal(signal: i32) -> VcpuResult<()> {
    let mut chosen = lock(&SIGNAL);
    match *chosen {
        0 => {
            install(signal)?;
            *chosen = signal;
            Ok(())
        }
        same if same == signal => Ok(()),
        other => Err(AccelError::invalid("kick signal", format!("signal {other} is in use already"))),
    }
}

/// The signal that kicks; decides on the default if none was chosen.
fn signal() -> VcpuResult<i32> {
    let mut chosen = lock(&SIGNAL);
    if *chosen == 0 {
        let (first, last) = (libc::SIGRTMIN(), libc::SIGRTMAX());
        *chosen = (first..=last)
            .find(|&candidate| install(candidate).is_ok())
            .ok_or_else(|| AccelError::invalid("kick signal", "the application handles every real-time signal"))?;
    }
    Ok(*chosen)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What the locks guard is consistent at every moment, so a panic elsewhere does not spoil it.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

extern "C" fn ignore_signal(_: i32) {}

/// Installs the empty handler if nobody handles the signal.
fn install(signal: i32) -> VcpuResult<()> {
    let refused = |why: String| AccelError::invalid("kick signal", why);
    // SAFETY: a zeroed sigaction is a valid one (default action, empty mask), and both pointers are to locals.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: as above; a null new action only reads the present one.
    if unsafe { libc::sigaction(signal, std::ptr::null(), &raw mut action) } != 0 {
        return Err(refused(format!("signal {signal} cannot be caught")));
    }
    if action.sa_sigaction != libc::SIG_DFL {
        return Err(refused(format!("the application handles signal {signal} already")));
    }
    action.sa_sigaction = ignore_signal as extern "C" fn(i32) as usize;
    // Other system calls of the thread go on; KVM_RUN returns EINTR all the same.
    action.sa_flags = libc::SA_RESTART;
    // SAFETY: the handler is async-signal-safe: it does nothing.
    if unsafe { libc::sigaction(signal, &raw const action, std::ptr::null_mut()) } != 0 {
        return Err(refused(format!("signal {signal} cannot be caught (errno {})", last_errno())));
    }
    Ok(())
}

/// What the vCPU and its kick handles share.
#[derive(Debug)]
pub(super) struct Kick {
    signal: i32,
    /// A kick came that no return from `run()` has answered yet.
    requested: AtomicBool,
    /// The thread that is in `run()` now; 0 if none is.
    thread: AtomicI32,
    /// `immediate_exit` in the run area; `None` once the vCPU is gone. Only kickers and the vCPU's drop take the lock,
    /// never `run()`.
    immediate_exit: Mutex<Option<RunFlag>>,
}

/// A pointer to the `immediate_exit` byte of a mapped run area.
#[derive(Debug, Clone, Copy)]
pub(super) struct RunFlag(NonNull<AtomicU8>);

// SAFETY: the byte is accessed atomically by everybody, the kernel included, which only reads it. That it is still
// mapped is the invariant of its holders: the vCPU that owns the mapping, and `Kick::immediate_exit`, which the vCPU
// empties before it unmaps.
unsafe impl Send for RunFlag {}
// SAFETY: as above.
unsafe impl Sync for RunFlag {}

impl RunFlag {
    /// # Safety
    /// `byte` must stay mapped as long as this value or a copy is used, and be accessed only atomically.
    pub(super) unsafe fn new(byte: NonNull<u8>) -> Self {
        Self(byte.cast())
    }

    #[inline]
    fn store(self, value: u8) {
        // SAFETY: mapped and atomic by the contract of `new`.
        unsafe { self.0.as_ref() }.store(value, Ordering::SeqCst);
    }
}

impl Kick {
    pub(super) fn new(flag: RunFlag) -> VcpuResult<Self> {
        Ok(Self {
            signal: signal()?,
            requested: AtomicBool::new(false),
            thread: AtomicI32::new(0),
            immediate_exit: Mutex::new(Some(flag)),
        })
    }

    /// To be called by the vCPU's thread right before `KVM_RUN`.
    #[inline]
    pub(super) fn enter(&self) {
        let thread = THREAD.with(|cached| match cached.get() {
            0 => self.prepare_thread(cached),
            thread => thread,
        });
        self.thread.store(thread, Ordering::SeqCst);
        // The kernel's load of immediate_exit must not come before the store; see the module's head.
        fence(Ordering::SeqCst);
    }

    /// Learns the thread's id and makes sure that the signal reaches it.
    #[cold]
    fn prepare_thread(&self, cached: &Cell<i32>) -> i32 {
        // SAFETY: a zeroed sigset_t is storage for sigemptyset; all pointers are to a local.
        unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut set);
            libc::sigaddset(&raw mut set, self.signal);
            libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, std::ptr::null_mut());
        }
        // SAFETY: gettid has no preconditions.
        let thread = unsafe { libc::gettid() };
        cached.set(thread);
        thread
    }

    /// To be called right after `KVM_RUN`.
    #[inline]
    pub(super) fn leave(&self) {
        self.thread.store(0, Ordering::Release);
    }

    /// `run()` returns because of a kick or signal: every kick up to here is answered.
    pub(super) fn answered(&self, flag: RunFlag) {
        self.requested.store(false, Ordering::SeqCst);
        self.rearm(flag);
    }

    /// Makes the next `KVM_RUN` do nothing but finish a pending access.
    pub(super) fn force(flag: RunFlag) {
        flag.store(1);
    }

    /// Clears `immediate_exit` unless an unanswered kick wants it. A kick sets `requested` first: if its store to the
    /// flag is overwritten here, the load below sees the request.
    pub(super) fn rearm(&self, flag: RunFlag) {
        flag.store(0);
        if self.requested.load(Ordering::SeqCst) {
            flag.store(1);
        }
    }

    /// The vCPU goes away: its run area will not be touched again.
    pub(super) fn retire(&self) {
        *lock(&self.immediate_exit) = None;
    }
}

impl KickTarget for Kick {
    fn kick(&self) {
        // A kick that nobody has answered yet does the work of this one. Without this a thread that kicks without pause
        // would keep the lock from the vCPU's drop, and the vCPU's thread busy with signals.
        if self.requested.swap(true, Ordering::SeqCst) {
            return;
        }
        let flag = lock(&self.immediate_exit);
        let Some(flag) = *flag else { return };
        flag.store(1);
        loop {
            let thread = self.thread.load(Ordering::SeqCst);
            if thread == 0 {
                return;
            }
            // SAFETY: tgkill takes numbers only. If the thread left meanwhile the signal does nothing: its handler is
            // empty, and a thread that is gone is an error that nobody needs.
            let sent = unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, self.signal) };
            // A real-time signal is queued, and the user's queue may be full (RLIMIT_SIGPENDING): the kick must not be
            // lost for that.
            if sent == 0 || last_errno() != libc::EAGAIN {
                return;
            }
            std::thread::yield_now();
        }
    }
}
