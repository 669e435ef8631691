//! Whether KVM can be used here: the device, the permission, the version, and whether guest ring 0 really runs.

use super::{AccelKvm, arch};
use kvm_ioctls::{Cap, Kvm};
use std::ffi::CStr;
use std::os::unix::fs::MetadataExt;
use vm_accel_core::accel::{Accel, AccelKind, Capabilities};
use vm_accel_core::error::{AccelError, RawCode, UnavailableReason, VcpuResult};

const DEVICE: &str = "/dev/kvm";

fn unavailable(reason: UnavailableReason) -> AccelError {
    AccelError::Unavailable { kind: AccelKind::Kvm, reason }
}

/// Opens `/dev/kvm` and checks its version.
pub(super) fn open() -> VcpuResult<Kvm> {
    let kvm = Kvm::new().map_err(|error| {
        unavailable(match error.errno() {
            libc::ENOENT | libc::ENODEV | libc::ENXIO => UnavailableReason::NoDevice { path: DEVICE },
            libc::EACCES | libc::EPERM => UnavailableReason::PermissionDenied {
                path: DEVICE,
                group: std::fs::metadata(DEVICE).ok().and_then(|meta| group_name(meta.gid())),
            },
            code => UnavailableReason::Failed { op: "opening /dev/kvm", code: RawCode::Errno(code) },
        })
    })?;
    let (found, needed) = (kvm.get_api_version(), kvm_bindings::KVM_API_VERSION as i32);
    if found != needed {
        return Err(unavailable(UnavailableReason::ApiVersion { found, needed }));
    }
    if !kvm.check_extension(Cap::ImmediateExit) {
        return Err(unavailable(UnavailableReason::UnsupportedHardware {
            detail: "this kernel's KVM is older than Linux 4.13 (no immediate_exit)".into(),
        }));
    }
    Ok(kvm)
}

/// The name of a group, if it has one.
fn group_name(gid: u32) -> Option<String> {
    let mut buffer = vec![0; 4096];
    // SAFETY: a zeroed group is plain storage (integers and null pointers).
    let mut group: libc::group = unsafe { std::mem::zeroed() };
    let mut found = std::ptr::null_mut();
    // SAFETY: all pointers are to locals, and the buffer's length is given.
    let code = unsafe { libc::getgrgid_r(gid, &raw mut group, buffer.as_mut_ptr(), buffer.len(), &raw mut found) };
    if code != 0 || found.is_null() {
        return None;
    }
    // SAFETY: on success gr_name is a terminated string inside `buffer`.
    let name = unsafe { CStr::from_ptr(group.gr_name) };
    Some(name.to_string_lossy().into_owned())
}

/// See [`crate::probe_kind`].
pub(crate) fn probe() -> VcpuResult<Capabilities> {
    let mut vm = AccelKvm::new()?;
    let mut caps = vm.capabilities().clone();
    caps.emulates_ring0 = arch::emulates_ring0(&mut vm)?;
    Ok(caps)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn group_zero_has_a_name_and_an_absurd_one_has_none() {
        assert_eq!(group_name(0).as_deref(), Some("root"));
        assert_eq!(group_name(4_000_000_001), None);
    }
}
