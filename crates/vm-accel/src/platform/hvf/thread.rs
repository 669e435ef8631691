//! vCPUs that belong to the thread that created them.
//!
//! The framework refuses nearly every call on a vCPU from another thread, `hv_vcpu_destroy` included. A VMM may drop its object
//! anywhere all the same: then the destruction waits for the owner, which does it when it next creates a vCPU, or when it
//! ends. No call is ever made from another thread, and nothing is destroyed twice.

use std::cell::RefCell;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::ThreadId;
use vm_accel_backend::lock;
use vm_accel_core::error::{AccelError, VcpuResult};

type Destroy = Box<dyn FnOnce() + Send>;

struct Entry {
    /// Taken when it is called.
    destroy: Mutex<Option<Destroy>>,
    orphan: AtomicBool,
}

impl Entry {
    fn destroy(&self) {
        let destroy = lock(&self.destroy).take();
        if let Some(destroy) = destroy {
            destroy();
        }
    }
}

/// The vCPUs of a thread; destroyed with it.
#[derive(Default)]
struct Mine(RefCell<Vec<Arc<Entry>>>);

impl Drop for Mine {
    fn drop(&mut self) {
        self.0.get_mut().drain(..).for_each(|entry| entry.destroy());
    }
}

thread_local! {
    static MINE: Mine = Mine::default();
}

/// Destroys the vCPUs of the calling thread whose objects were dropped on others.
pub(super) fn reap() {
    let mut orphans = Vec::new();
    // Not there any more when the thread is ending: then its vCPUs are gone, too.
    let _ = MINE.try_with(|mine| {
        mine.0.borrow_mut().retain(|entry| {
            let is_orphan = entry.orphan.load(Ordering::Acquire);
            if is_orphan {
                orphans.push(Arc::clone(entry));
            }
            !is_orphan
        });
    });
    orphans.iter().for_each(|entry| entry.destroy());
}

/// The tie between a vCPU and its thread.
pub(super) struct Owner {
    thread: ThreadId,
    entry: Arc<Entry>,
}

impl fmt::Debug for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Owner").field(&self.thread).finish()
    }
}

impl Owner {
    /// Ties a vCPU to the calling thread, which created it. `destroy` is called once, on this thread.
    pub(super) fn new(destroy: impl FnOnce() + Send + 'static) -> Self {
        let entry = Arc::new(Entry { destroy: Mutex::new(Some(Box::new(destroy))), orphan: AtomicBool::new(false) });
        let _ = MINE.try_with(|mine| mine.0.borrow_mut().push(Arc::clone(&entry)));
        Self { thread: std::thread::current().id(), entry }
    }

    fn is_here(&self) -> bool {
        self.thread == std::thread::current().id()
    }

    /// [`AccelError::WrongThread`] on any other thread.
    pub(super) fn check(&self, op: &'static str) -> VcpuResult<()> {
        if self.is_here() { Ok(()) } else { Err(AccelError::WrongThread { op }) }
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        // Release: what was done with the vCPU here happens before its destruction there.
        self.entry.orphan.store(true, Ordering::Release);
        if self.is_here() {
            reap();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    /// An owner that reports the thread on which its vCPU is destroyed.
    fn owner(log: &Arc<Mutex<Vec<ThreadId>>>) -> Owner {
        let log = Arc::clone(log);
        Owner::new(move || lock(&log).push(std::thread::current().id()))
    }

    #[test]
    fn a_drop_on_the_owners_thread_destroys_at_once() {
        let log = Arc::default();
        drop(owner(&log));
        assert_eq!(*lock(&log), [std::thread::current().id()]);
    }

    #[test]
    fn a_drop_elsewhere_waits_for_the_owner_to_create_another() {
        let log: Arc<Mutex<Vec<ThreadId>>> = Arc::default();
        let owner = owner(&log);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                assert_eq!(owner.check("run"), Err(AccelError::WrongThread { op: "run" }));
                drop(owner);
            });
        });
        assert!(lock(&log).is_empty());
        reap();
        assert_eq!(*lock(&log), [std::thread::current().id()]);
    }

    #[test]
    fn a_drop_elsewhere_waits_for_the_owner_to_end() {
        let log = Arc::default();
        let (send, receive) = channel();
        let (done, wait) = channel::<()>();
        let theirs = Arc::clone(&log);
        let thread = std::thread::spawn(move || {
            send.send(owner(&theirs)).unwrap();
            wait.recv().unwrap();
        });
        let id = thread.thread().id();
        drop(receive.recv().unwrap());
        assert!(lock(&log).is_empty());
        done.send(()).unwrap();
        thread.join().unwrap();
        assert_eq!(*lock(&log), [id]);
    }

    #[test]
    fn a_thread_that_ends_takes_its_vcpus_along() {
        let log = Arc::default();
        let theirs = Arc::clone(&log);
        let owner = std::thread::spawn(move || owner(&theirs)).join().unwrap();
        assert_eq!(lock(&log).len(), 1);
        assert!(owner.check("run").is_err());
        drop(owner);
        assert_eq!(lock(&log).len(), 1);
    }
}
