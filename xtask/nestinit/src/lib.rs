//! What the init programs of the boot tests share: the few Linux calls of a process 1.
//!
//! Both programs run as the first process of a Linux machine that exists for one test. They never leave by returning:
//! a kernel whose init ends panics.

#[cfg(target_os = "linux")]
mod linux;

#[cfg(target_os = "linux")]
pub use linux::{End, end, load_module, mount_all};

/// The init programs, each as a module so that they exist on Linux only.
#[cfg(target_os = "linux")]
pub mod program;

/// Says that init programs are for Linux; lets the workspace build elsewhere.
#[cfg(not(target_os = "linux"))]
pub mod program {
    /// Refuses.
    pub fn nested() {
        eprintln!("an init program of Linux");
    }

    /// Refuses.
    pub fn guest() {
        eprintln!("an init program of Linux");
    }
}
