//! The KVM ioctls that `kvm-ioctls` does not offer in the form this library needs.
//!
//! `KVM_RUN` is here because the crate's wrapper drops the size and count of port accesses; irqfd and ioeventfd because
//! its wrappers take another event type. Numbers and structures: Linux `Documentation/virt/kvm/api.rst`.

use std::ffi::{c_int, c_ulong};
use std::os::fd::RawFd;

/// The ioctl type of KVM.
const KVMIO: c_ulong = 0xae;

const fn request(direction: c_ulong, number: c_ulong, size: usize) -> c_ulong {
    direction << 30 | (size as c_ulong) << 16 | KVMIO << 8 | number
}

/// An ioctl that moves no structure.
const fn io(number: c_ulong) -> c_ulong {
    request(0, number, 0)
}

/// An ioctl that reads a `T` from this process.
const fn iow<T>(number: c_ulong) -> c_ulong {
    request(1, number, size_of::<T>())
}

/// An ioctl that writes a `T` to this process.
const fn ior<T>(number: c_ulong) -> c_ulong {
    request(2, number, size_of::<T>())
}

/// An ioctl that reads and writes a `T` of this process.
const fn iowr<T>(number: c_ulong) -> c_ulong {
    request(3, number, size_of::<T>())
}

pub(crate) const KVM_RUN: c_ulong = io(0x80);
pub(crate) const KVM_IRQFD: c_ulong = iow::<kvm_bindings::kvm_irqfd>(0x76);
pub(crate) const KVM_IOEVENTFD: c_ulong = iow::<kvm_bindings::kvm_ioeventfd>(0x79);
pub(crate) const KVM_INTERRUPT: c_ulong = iow::<kvm_bindings::kvm_interrupt>(0x86);
pub(crate) const KVM_CLEAR_DIRTY_LOG: c_ulong = iowr::<kvm_bindings::kvm_clear_dirty_log>(0xc0);
pub(crate) const KVM_RESET_DIRTY_RINGS: c_ulong = io(0xc7);
/// The structure begins with a count that says how long it is; the number is made from the count alone.
pub(crate) const KVM_GET_REG_LIST: c_ulong = iowr::<u64>(0xb0);
pub(crate) const KVM_GET_XSAVE: c_ulong = ior::<[u8; 4096]>(0xa4);
pub(crate) const KVM_SET_XSAVE: c_ulong = iow::<[u8; 4096]>(0xa5);
pub(crate) const KVM_GET_XSAVE2: c_ulong = ior::<[u8; 4096]>(0xcf);

/// A synchronous external abort that the guest's access took (`api.rst`, from Linux 6.19 on; not in `kvm-bindings` yet).
pub(crate) const KVM_EXIT_ARM_SEA: u32 = 41;
/// [`ArmSea::gpa`] is valid.
pub(crate) const ARM_SEA_GPA_VALID: u64 = 1;

/// What comes with [`KVM_EXIT_ARM_SEA`].
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct ArmSea {
    pub(crate) flags: u64,
    pub(crate) esr: u64,
    pub(crate) gva: u64,
    pub(crate) gpa: u64,
}

/// Calls an ioctl; the error is the `errno`.
///
/// # Safety
/// `argument` must be what `request` asks for: a value, or a pointer to memory that is valid for what the kernel reads
/// and writes there.
#[inline]
pub(crate) unsafe fn ioctl(fd: RawFd, request: c_ulong, argument: c_ulong) -> Result<c_int, c_int> {
    // SAFETY: the caller vouches for the argument; a wrong descriptor is an error, not a fault. The cast suits both
    // libcs: glibc's request is an unsigned long, musl's an int that holds the same 32 bits.
    let answer = unsafe { libc::ioctl(fd, request as _, argument) };
    if answer < 0 { Err(last_errno()) } else { Ok(answer) }
}

/// This thread's `errno`.
#[inline]
pub(crate) fn last_errno() -> c_int {
    // SAFETY: the pointer is this thread's errno, valid as long as the thread.
    unsafe { *libc::__errno_location() }
}
