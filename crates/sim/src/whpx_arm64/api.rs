//! The functions, and the tables of them. Arguments become references here; what they do is elsewhere.

use super::memory::PHYSICAL_BITS;
use super::partition::{self, EXTENDED_EXITS, LPI_BITS, find, ready};
use super::{Answer, FAILURES, PRESENT, RELEASED, Stop, code, lock, misuse, registers};
use crate::a64::gic::SHARED;
use std::ffi::c_void;
use std::slice;
use std::sync::atomic::Ordering;
use vm_accel_sys::whpx::HRESULT;
use vm_accel_sys::whpx::aarch64::{
    ANY_VP, ExitContext, Features, InterruptControl, PartitionHandle, RegisterName, RegisterValue, WhpApi, capability,
};
use vm_accel_sys::whpx::code::{E_INVALIDARG, E_POINTER, WHV_E_INSUFFICIENT_BUFFER, WHV_E_UNKNOWN_CAPABILITY};

/// More registers than exist.
const MOST_REGISTERS: u32 = 512;

/// A current Windows.
pub static API: WhpApi = WhpApi { WHvQueryGpaRangeDirtyBitmap: Some(WHvQueryGpaRangeDirtyBitmap), ..FIRST };

const FIRST: WhpApi = WhpApi {
    WHvGetCapability,
    WHvCreatePartition,
    WHvSetupPartition,
    WHvDeletePartition,
    WHvSetPartitionProperty,
    WHvMapGpaRange,
    WHvUnmapGpaRange,
    WHvCreateVirtualProcessor,
    WHvDeleteVirtualProcessor,
    WHvRunVirtualProcessor,
    WHvCancelRunVirtualProcessor,
    WHvGetVirtualProcessorRegisters,
    WHvSetVirtualProcessorRegisters,
    WHvRequestInterrupt,
    WHvQueryGpaRangeDirtyBitmap: None,
    WHvMapGpaRange2: None,
    WHvSuspendPartitionTime: None,
    WHvResumePartitionTime: None,
};

/// The table without any optional function.
#[must_use]
pub fn first_release() -> &'static WhpApi {
    static TABLE: WhpApi = FIRST;
    &TABLE
}

/// The frame of every function: the failure plan first, then the call.
fn answer(function: &'static str, call: impl FnOnce() -> Answer) -> HRESULT {
    if let Some(code) = FAILURES.check(function) {
        return code;
    }
    match call() {
        Ok(()) => 0,
        Err(Stop::Code(code)) => code,
        // The caller is across a C interface: the panic ends the process, after the message.
        Err(Stop::Misuse(what)) => panic!("{function}: misuse of the platform: {what}"),
    }
}

/// The elements behind a pointer.
///
/// # Safety
/// Unless null, `data` is good for reads of `count` elements for as long as the answer lives.
unsafe fn elements<'a, T>(data: *const T, count: u32) -> Answer<&'a [T]> {
    match count {
        0 => Ok(&[]),
        _ if data.is_null() => code(E_POINTER),
        _ if !data.is_aligned() => misuse(format!("an array at {data:?} is not aligned to {} bytes", align_of::<T>())),
        // SAFETY: the caller's promise.
        _ => Ok(unsafe { slice::from_raw_parts(data, count as usize) }),
    }
}

/// As [`elements`], to be written.
///
/// # Safety
/// Unless null, `data` is good for reads and writes of `count` elements for as long as the answer lives, and nobody else's.
unsafe fn elements_mut<'a, T>(data: *mut T, count: u32) -> Answer<&'a mut [T]> {
    // SAFETY: the caller's promise.
    unsafe { elements(data.cast_const(), count)? };
    // SAFETY: as above; an empty array has no pointer.
    Ok(if count == 0 { &mut [] } else { unsafe { slice::from_raw_parts_mut(data, count as usize) } })
}

fn value_of(capability_code: u32) -> Answer<u64> {
    let features = Features(0).with_dirty_page_tracking(1);
    Ok(match capability_code {
        capability::HYPERVISOR_PRESENT => PRESENT.load(Ordering::Relaxed).into(),
        capability::FEATURES => features.with_arm64_support(RELEASED.load(Ordering::Relaxed).into()).0,
        capability::EXTENDED_VM_EXITS => EXTENDED_EXITS,
        capability::PHYSICAL_ADDRESS_WIDTH => PHYSICAL_BITS.into(),
        capability::GIC_LPI_INT_ID_BITS => LPI_BITS.into(),
        _ => return code(WHV_E_UNKNOWN_CAPABILITY),
    })
}

#[allow(non_snake_case, reason = "the platform's name")]
unsafe extern "system" fn WHvGetCapability(
    capability_code: u32,
    buffer: *mut c_void,
    size: u32,
    written: *mut u32,
) -> HRESULT {
    answer("WHvGetCapability", || {
        let value = value_of(capability_code)?;
        let is_wide = matches!(capability_code, capability::FEATURES | capability::EXTENDED_VM_EXITS);
        let needed = if is_wide { 8 } else { 4 };
        if !written.is_null() {
            // SAFETY: the caller's promise (WinHvPlatform.h).
            unsafe { written.write_unaligned(needed) };
        }
        if size < needed || buffer.is_null() {
            return code(WHV_E_INSUFFICIENT_BUFFER);
        }
        // SAFETY: as above, and there is room.
        unsafe { buffer.cast::<u8>().copy_from_nonoverlapping(value.to_le_bytes().as_ptr(), needed as usize) };
        Ok(())
    })
}

#[allow(non_snake_case, reason = "the platform's name")]
unsafe extern "system" fn WHvCreatePartition(handle: *mut PartitionHandle) -> HRESULT {
    answer("WHvCreatePartition", || {
        // SAFETY: the caller's promise.
        let handle = unsafe { elements_mut(handle, 1) }?;
        handle[0] = partition::create();
        Ok(())
    })
}

#[allow(non_snake_case, reason = "the platform's name")]
unsafe extern "system" fn WHvSetupPartition(handle: PartitionHandle) -> HRESULT {
    answer("WHvSetupPartition", || find(handle)?.set_up())
}

#[allow(non_snake_case, reason = "the platform's name")]
unsafe extern "system" fn WHvDeletePartition(handle: PartitionHandle) -> HRESULT {
    answer("WHvDeletePartition", || partition::delete(handle))
}

#[allow(non_snake_case, reason = "the platform's name")]
unsafe extern "system" fn WHvSetPartitionProperty(
    handle: PartitionHandle,
    property: u32,
    buffer: *const c_void,
    size: u32,
) -> HRESULT {
    answer("WHvSetPartitionProperty", || {
        // SAFETY: the caller's promise.
        let data = unsafe { elements(buffer.cast(), size) }?;
        find(handle)?.set_property(property, data)
    })
}

#[allow(non_snake_case, reason = "the platform's name")]
unsafe extern "system" fn WHvMapGpaRange(
    handle: PartitionHandle,
    source: *mut c_void,
    gpa: u64,
    size: u64,
    flags: i32,
) -> HRESULT {
    let host = source.expose_provenance();
    answer("WHvMapGpaRange", || ready(handle)?.memory.map(host, gpa, size, flags))
}

#[allow(non_snake_case, reason = "the platform's name")]
unsafe extern "system" fn WHvUnmapGpaRange(handle: PartitionHandle, gpa: u64, size: u64) -> HRESULT {
    answer("WHvUnmapGpaRange", || ready(handle)?.memory.unmap(gpa, size))
}

#[allow(non_snake_case, reason = "the platform's name")]
unsafe extern "system" fn WHvQueryGpaRangeDirtyBitmap(
    handle: PartitionHandle,
    gpa: u64,
    size: u64,
    bitmap: *mut u64,
    bytes: u32,
) -> HRESULT {
    answer("WHvQueryGpaRangeDirtyBitmap", || {
        // SAFETY: the caller's promise.
        let bitmap = unsafe { elements_mut(bitmap, bytes / 8) }?;
        let words = ready(handle)?.memory.take_dirty(gpa, size)?;
        // Without a bitmap it is cleared only.
        if !bitmap.is_empty() && bitmap.len() < words.len() {
            return code(E_INVALIDARG);
        }
        bitmap.iter_mut().zip(words).for_each(|(out, word)| *out = word);
        Ok(())
    })
}

#[allow(non_snake_case, reason = "the platform's name")]
unsafe extern "system" fn WHvCreateVirtualProcessor(handle: PartitionHandle, vp: u32, flags: u32) -> HRESULT {
    answer("WHvCreateVirtualProcessor", || {
        if flags != 0 {
            return code(E_INVALIDARG);
        }
        ready(handle)?.create_vp(vp)
    })
}

#[allow(non_snake_case, reason = "the platform's name")]
unsafe extern "system" fn WHvDeleteVirtualProcessor(handle: PartitionHandle, vp: u32) -> HRESULT {
    answer("WHvDeleteVirtualProcessor", || ready(handle)?.delete_vp(vp))
}

#[allow(non_snake_case, reason = "the platform's name")]
unsafe extern "system" fn WHvRunVirtualProcessor(
    handle: PartitionHandle,
    vp: u32,
    context: *mut ExitContext,
    size: u32,
) -> HRESULT {
    answer("WHvRunVirtualProcessor", || {
        if (size as usize) < size_of::<ExitContext>() {
            return code(E_INVALIDARG);
        }
        // SAFETY: the caller's promise.
        let context = unsafe { elements_mut(context, 1) }?;
        let partition = ready(handle)?;
        partition.vp(vp)?.run(&partition, &mut context[0])
    })
}

#[allow(non_snake_case, reason = "the platform's name")]
unsafe extern "system" fn WHvCancelRunVirtualProcessor(handle: PartitionHandle, vp: u32, flags: u32) -> HRESULT {
    answer("WHvCancelRunVirtualProcessor", || {
        let partition = find(handle)?;
        partition.cancels.fetch_add(1, Ordering::SeqCst);
        let is_lost = {
            let mut mischief = lock(&partition.mischief);
            // Long enough for a deletion that does not wait to be noticed.
            if mischief.one_in(3) {
                std::thread::yield_now();
            }
            mischief.one_in(3)
        };
        let result = match partition.vp(vp) {
            _ if flags != 0 => code(E_INVALIDARG),
            // That a processor which does not run is cancelled at its next entry is what everybody sees and nobody documents.
            Ok(vp) if is_lost && !vp.is_running() => Ok(()),
            Ok(vp) => {
                vp.cancel();
                Ok(())
            }
            Err(why) => Err(why),
        };
        partition.cancels.fetch_sub(1, Ordering::SeqCst);
        result
    })
}

#[allow(non_snake_case, reason = "the platform's name")]
unsafe extern "system" fn WHvGetVirtualProcessorRegisters(
    handle: PartitionHandle,
    vp: u32,
    names: *const RegisterName,
    count: u32,
    values: *mut RegisterValue,
) -> HRESULT {
    answer("WHvGetVirtualProcessorRegisters", || {
        let count = if count > MOST_REGISTERS { return code(E_INVALIDARG) } else { count };
        // SAFETY: the caller's promise.
        let (names, values) = unsafe { (elements(names, count)?, elements_mut(values, count)?) };
        let partition = ready(handle)?;
        match vp {
            ANY_VP => registers::get_shared(&partition, names, values),
            vp => registers::get(&partition, vp, names, values),
        }
    })
}

#[allow(non_snake_case, reason = "the platform's name")]
unsafe extern "system" fn WHvSetVirtualProcessorRegisters(
    handle: PartitionHandle,
    vp: u32,
    names: *const RegisterName,
    count: u32,
    values: *const RegisterValue,
) -> HRESULT {
    answer("WHvSetVirtualProcessorRegisters", || {
        let count = if count > MOST_REGISTERS { return code(E_INVALIDARG) } else { count };
        // SAFETY: the caller's promise.
        let (names, values) = unsafe { (elements(names, count)?, elements(values, count)?) };
        let partition = ready(handle)?;
        match vp {
            ANY_VP => registers::set_shared(&partition, names, values),
            vp => registers::set(&partition, vp, names, values),
        }
    })
}

#[allow(non_snake_case, reason = "the platform's name")]
unsafe extern "system" fn WHvRequestInterrupt(
    handle: PartitionHandle,
    interrupt: *const InterruptControl,
    size: u32,
) -> HRESULT {
    answer("WHvRequestInterrupt", || {
        if size as usize != size_of::<InterruptControl>() {
            return code(E_INVALIDARG);
        }
        // SAFETY: the caller's promise.
        let asked = unsafe { elements(interrupt, 1) }?[0];
        let partition = ready(handle)?;
        let unknown = asked.target_partition != 0
            || asked.kind.kind() != 0
            || asked.target_vtl != 0
            || asked.reserved0 != 0
            || asked.reserved1 != 0;
        // Private interrupts are those of the processor with the address.
        let vp = match asked.requested_vector {
            16..32 => partition.find_affinity(asked.destination_address),
            intid if SHARED.contains(&intid) => Some(0),
            _ => None,
        };
        let level = asked.kind.asserted() != 0;
        match vp.filter(|_| !unknown) {
            Some(vp) => {
                partition.gic().set_line(vp.into(), asked.requested_vector, level);
                partition.wake_all();
                Ok(())
            }
            None => code(E_INVALIDARG),
        }
    })
}
