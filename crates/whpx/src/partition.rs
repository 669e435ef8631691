//! A partition, and the calls on it: each answers the platform's code as an error of this library. The architectures'
//! functions differ in nothing but the types of codes, names and values.
//!
//! Virtual processors and cancellations hold the partition, so it is deleted when the last of them is gone: no call overlaps
//! the deletion.

use vm_accel_core::accel::{AccelKind, MemoryFlags};
use vm_accel_core::error::{AccelError, RawCode, UnavailableReason};
use vm_accel_sys::whpx::HRESULT;
use vm_accel_sys::whpx::map_flag;

/// An error of the platform.
pub(super) fn failed(op: &'static str, code: HRESULT) -> AccelError {
    AccelError::Backend { kind: AccelKind::Whpx, op, code: RawCode::Hresult(code) }
}

/// Whether an error is that code of the platform.
pub(super) fn is_code(error: &AccelError, wanted: HRESULT) -> bool {
    matches!(error, AccelError::Backend { code: RawCode::Hresult(code), .. } if *code == wanted)
}

/// An error of the probe as the reason why the platform cannot be used.
pub(super) fn unavailable(reason: UnavailableReason) -> AccelError {
    AccelError::Unavailable { kind: AccelKind::Whpx, reason }
}

/// Why the platform's functions are not there.
#[cfg(windows)]
pub(super) fn missing(why: vm_accel_sys::LoadError) -> AccelError {
    unavailable(match why {
        vm_accel_sys::LoadError::Function { library, name } => {
            UnavailableReason::FunctionMissing { library, function: name }
        }
        _ => UnavailableReason::LibraryMissing {
            library: vm_accel_sys::whpx::LIBRARY,
            hint: "switch on the Windows feature \"Windows Hypervisor Platform\" and restart",
        },
    })
}

/// That the library is there and the hypervisor is not.
pub(super) fn is_off() -> AccelError {
    unavailable(UnavailableReason::FeatureOff {
        hint: "switch on virtualization in the firmware and the Windows feature \"Windows Hypervisor Platform\", then restart",
    })
}

/// The platform's flags of a mapping.
pub(super) fn map_flags(flags: MemoryFlags) -> i32 {
    let pairs = [
        (MemoryFlags::READ, map_flag::READ),
        (MemoryFlags::WRITE, map_flag::WRITE),
        (MemoryFlags::EXECUTE, map_flag::EXECUTE),
        (MemoryFlags::LOG_DIRTY, map_flag::TRACK_DIRTY_PAGES),
    ];
    pairs.iter().filter(|(ours, _)| flags.contains(*ours)).fold(0, |all, (_, theirs)| all | theirs)
}

/// Calls a function of the table; its name is in the error.
macro_rules! call {
    ($api:expr, $function:ident($($arg:expr),* $(,)?)) => {{
        // SAFETY: see the place of the call: pointers are to live values of the sizes that are told.
        let code = unsafe { ($api.$function)($($arg),*) };
        if vm_accel_sys::whpx::code::succeeded(code) {
            Ok(())
        } else {
            Err($crate::partition::failed(stringify!($function), code))
        }
    }};
    ($api:expr, optional $function:ident($($arg:expr),* $(,)?)) => {
        match $api.$function {
            // SAFETY: as above.
            Some(function) => match unsafe { function($($arg),*) } {
                code if vm_accel_sys::whpx::code::succeeded(code) => Ok(()),
                code => Err($crate::partition::failed(stringify!($function), code)),
            },
            None => Err(vm_accel_core::error::AccelError::Unsupported {
                kind: Some(vm_accel_core::accel::AccelKind::Whpx),
                what: stringify!($function),
            }),
        }
    };
}
pub(super) use call;

/// Declares `Partition` and `capability` for a table. `$Code` is the type of capabilities, properties and register names.
macro_rules! partition {
    ($Api:ty, $Code:ty, $Value:ty, $Exit:ty) => {
        /// A partition.
        #[derive(Debug)]
        pub(super) struct Partition {
            pub(super) api: &'static $Api,
            handle: isize,
        }

        /// A capability of up to eight bytes; `None` if this version of the platform does not know it.
        pub(super) fn capability(api: &$Api, code: $Code) -> VcpuResult<Option<u64>> {
            let mut value = 0u64;
            let answer = call!(api, WHvGetCapability(code, (&raw mut value).cast(), 8, std::ptr::null_mut()));
            match answer {
                Ok(()) => Ok(Some(value)),
                Err(why) if is_code(&why, vm_accel_sys::whpx::code::WHV_E_UNKNOWN_CAPABILITY) => Ok(None),
                Err(why) => Err(why),
            }
        }

        impl Partition {
            pub(super) fn new(api: &'static $Api) -> VcpuResult<Self> {
                let mut handle = 0;
                call!(api, WHvCreatePartition(&raw mut handle))?;
                Ok(Self { api, handle })
            }

            /// Sets a property; lists are slices, single values slices of one.
            pub(super) fn set_property<T: Copy>(&self, code: $Code, value: &[T]) -> VcpuResult<()> {
                let size = size_of_val(value) as u32;
                call!(self.api, WHvSetPartitionProperty(self.handle, code, value.as_ptr().cast(), size))
            }

            pub(super) fn set_up(&self) -> VcpuResult<()> {
                call!(self.api, WHvSetupPartition(self.handle))
            }

            /// Maps host memory in place of what is mapped there. It must stay until it is unmapped or the partition is gone.
            pub(super) fn map(&self, host: *mut u8, gpa: u64, size: u64, flags: i32) -> VcpuResult<()> {
                call!(self.api, WHvMapGpaRange(self.handle, host.cast(), gpa, size, flags))
            }

            pub(super) fn unmap(&self, gpa: u64, size: u64) -> VcpuResult<()> {
                call!(self.api, WHvUnmapGpaRange(self.handle, gpa, size))
            }

            /// Takes the dirty pages of a range: one bit for each of its pages of 4 KiB.
            pub(super) fn take_dirty(&self, gpa: u64, size: u64, bitmap: &mut [u64]) -> VcpuResult<()> {
                let (bytes, bitmap) = (size_of_val(bitmap) as u32, bitmap.as_mut_ptr());
                call!(self.api, optional WHvQueryGpaRangeDirtyBitmap(self.handle, gpa, size, bitmap, bytes))
            }

            pub(super) fn create_vp(&self, vp: u32) -> VcpuResult<()> {
                call!(self.api, WHvCreateVirtualProcessor(self.handle, vp, 0))
            }

            pub(super) fn delete_vp(&self, vp: u32) -> VcpuResult<()> {
                call!(self.api, WHvDeleteVirtualProcessor(self.handle, vp))
            }

            pub(super) fn run(&self, vp: u32, context: &mut $Exit) -> VcpuResult<()> {
                let size = size_of::<$Exit>() as u32;
                call!(self.api, WHvRunVirtualProcessor(self.handle, vp, (&raw mut *context).cast(), size))
            }

            pub(super) fn cancel(&self, vp: u32) -> VcpuResult<()> {
                call!(self.api, WHvCancelRunVirtualProcessor(self.handle, vp, 0))
            }

            pub(super) fn get(&self, vp: u32, names: &[$Code]) -> VcpuResult<Vec<$Value>> {
                let mut values = vec![<$Value>::default(); names.len()];
                let (count, out) = (names.len() as u32, values.as_mut_ptr());
                call!(self.api, WHvGetVirtualProcessorRegisters(self.handle, vp, names.as_ptr(), count, out))?;
                Ok(values)
            }

            /// Writes registers: as many values as names.
            pub(super) fn set(&self, vp: u32, names: &[$Code], values: &[$Value]) -> VcpuResult<()> {
                let count = names.len().min(values.len()) as u32;
                if count == 0 {
                    return Ok(());
                }
                let (names, values) = (names.as_ptr(), values.as_ptr());
                call!(self.api, WHvSetVirtualProcessorRegisters(self.handle, vp, names, count, values))
            }
        }

        impl Drop for Partition {
            fn drop(&mut self) {
                // Nobody is left who could be told; the handle is not used again in either case.
                let _ = call!(self.api, WHvDeletePartition(self.handle));
            }
        }
    };
}
pub(super) use partition;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rights_and_log_are_flags_of_their_own() {
        assert_eq!(map_flags(MemoryFlags::ROM), map_flag::READ | map_flag::EXECUTE);
        let all = map_flags(MemoryFlags::RAM | MemoryFlags::LOG_DIRTY);
        assert_eq!(all, map_flags(MemoryFlags::RAM) | map_flag::TRACK_DIRTY_PAGES);
    }
}
