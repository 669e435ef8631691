//! The functions under the platform's names, and the table of them.
//!
//! Each is exported by its name, too, so that a C library made of this crate is a stand-in for the system's. Nothing here
//! decides anything: arguments become references, and `calls` does the rest.

use super::calls::{self, State, check_aligned};
use super::partition::{self, find, give, ready};
use super::{Answer, answer, capability, code};
use std::ffi::c_void;
use std::slice;
use vm_accel_sys::whpx::code::{E_INVALIDARG, E_POINTER, WHV_E_INSUFFICIENT_BUFFER};
use vm_accel_sys::whpx::x86_64::defs::*;
use vm_accel_sys::whpx::x86_64::{ExitContext, InterruptControl, RegisterValue, WhpApi};
use vm_accel_sys::whpx::{HANDLE, HRESULT};

/// More registers than exist.
const MOST_REGISTERS: u32 = 512;

/// The elements behind a pointer.
///
/// # Safety
/// Unless null, `data` is good for reads of `count` elements for as long as the answer lives, and aligned.
unsafe fn elements<'a, T>(data: *const T, count: u32) -> Answer<&'a [T]> {
    if count == 0 {
        return Ok(&[]);
    }
    if data.is_null() || !data.is_aligned() {
        return code(E_POINTER);
    }
    // SAFETY: the caller's promise.
    Ok(unsafe { slice::from_raw_parts(data, count as usize) })
}

/// The bytes behind a pointer.
///
/// # Safety
/// As [`elements`].
unsafe fn bytes<'a>(data: *const c_void, size: u32) -> Answer<&'a [u8]> {
    // SAFETY: the caller's promise.
    unsafe { elements(data.cast(), size) }
}

/// Writes through an output pointer.
///
/// # Safety
/// Unless null, `out` is good for a write.
unsafe fn put<T>(out: *mut T, value: T) -> Answer {
    if out.is_null() {
        return code(E_POINTER);
    }
    // SAFETY: the caller's promise; unaligned, because a C caller's is not ours to judge here.
    unsafe { out.write_unaligned(value) };
    Ok(())
}

/// Simulates `WHvCreatePartition` of builds that do not leave for HLT.
///
/// # Safety
/// As for the function of the platform.
pub(super) unsafe extern "system" fn create_without_halt_exits(partition: *mut WHV_PARTITION_HANDLE) -> HRESULT {
    // SAFETY: the caller's promise.
    answer("WHvCreatePartition", || unsafe { put(partition, partition::create(false)) })
}

macro_rules! functions {
    (
        req { $(fn $req:ident($($req_arg:ident: $req_type:ty),* $(,)?) $req_body:block)* }
        opt { $(fn $opt:ident($($opt_arg:ident: $opt_type:ty),* $(,)?) $opt_body:block)* }
    ) => {
        $(functions!(@one $req ($($req_arg: $req_type),*) $req_body);)*
        $(functions!(@one $opt ($($opt_arg: $opt_type),*) $opt_body);)*

        /// The table of a current Windows.
        pub static API: WhpApi = WhpApi { $($req,)* $($opt: Some($opt),)* ..ABSENT };

        /// A table that lacks these optional functions. It lives as long as the process.
        #[must_use]
        pub fn without(names: &[&str]) -> &'static WhpApi {
            let mut api = API;
            $(if names.contains(&stringify!($opt)) {
                api.$opt = None;
            })*
            Box::leak(Box::new(api))
        }

        /// Every function that is simulated.
        pub const SIMULATED: &[&str] = &[$(stringify!($req),)* $(stringify!($opt),)*];
    };
    (@one $name:ident ($($arg:ident: $type:ty),*) $body:block) => {
        #[doc = concat!("Simulates `", stringify!($name), "`.")]
        ///
        /// # Safety
        /// What Microsoft's documentation asks of the arguments: pointers are null or good for the sizes that go with them, and
        /// guest memory stays valid until it is unmapped.
        #[unsafe(no_mangle)]
        #[allow(non_snake_case, reason = "the platform's name")]
        #[allow(clippy::too_many_arguments, reason = "the platform's signature")]
        pub unsafe extern "system" fn $name($($arg: $type),*) -> HRESULT {
            answer(stringify!($name), || $body)
        }
    };
}

/// What is not simulated.
const ABSENT: WhpApi = WhpApi {
    WHvGetCapability,
    WHvCreatePartition,
    WHvSetupPartition,
    WHvDeletePartition,
    WHvGetPartitionProperty,
    WHvSetPartitionProperty,
    WHvMapGpaRange,
    WHvUnmapGpaRange,
    WHvTranslateGva,
    WHvCreateVirtualProcessor,
    WHvDeleteVirtualProcessor,
    WHvRunVirtualProcessor,
    WHvCancelRunVirtualProcessor,
    WHvGetVirtualProcessorRegisters,
    WHvSetVirtualProcessorRegisters,
    WHvGetVirtualProcessorXsaveState: None,
    WHvSetVirtualProcessorXsaveState: None,
    WHvQueryGpaRangeDirtyBitmap: None,
    WHvRequestInterrupt: None,
    WHvGetVirtualProcessorInterruptControllerState: None,
    WHvSetVirtualProcessorInterruptControllerState: None,
    WHvGetPartitionCounters: None,
    WHvGetVirtualProcessorCounters: None,
    WHvSuspendPartitionTime: None,
    WHvResumePartitionTime: None,
    WHvRegisterPartitionDoorbellEvent: None,
    WHvUnregisterPartitionDoorbellEvent: None,
    WHvGetVirtualProcessorInterruptControllerState2: None,
    WHvSetVirtualProcessorInterruptControllerState2: None,
    WHvMapGpaRange2: None,
    WHvCreateVirtualProcessor2: None,
    WHvGetVirtualProcessorState: None,
    WHvSetVirtualProcessorState: None,
    WHvGetVirtualProcessorCpuidOutput: None,
    WHvGetInterruptTargetVpSet: None,
    WHvAdviseGpaRange: None,
    WHvReadGpaRange: None,
    WHvWriteGpaRange: None,
    WHvCreateTrigger: None,
    WHvUpdateTriggerParameters: None,
    WHvDeleteTrigger: None,
    WHvCreateNotificationPort: None,
    WHvSetNotificationPortProperty: None,
    WHvDeleteNotificationPort: None,
    WHvResetPartition: None,
};

/// Reads a state into a caller's buffer.
///
/// # Safety
/// As [`give`].
unsafe fn give_state(
    partition: isize,
    vp: u32,
    state: State,
    buffer: *mut c_void,
    size: u32,
    written: *mut u32,
) -> Answer {
    let data = calls::get_state(partition, vp, state)?;
    // SAFETY: the caller's promise.
    unsafe { give(&data, buffer.cast(), size, written) }
}

/// Sets a state from a caller's buffer.
///
/// # Safety
/// As [`bytes`].
unsafe fn take_state(partition: isize, vp: u32, state: State, buffer: *const c_void, size: u32) -> Answer {
    // SAFETY: the caller's promise.
    calls::set_state(partition, vp, state, unsafe { bytes(buffer, size) }?)
}

functions! {
    req {
        fn WHvGetCapability(code: WHV_CAPABILITY_CODE, buffer: *mut c_void, size: u32, written: *mut u32) {
            let data = capability::get(code)?;
            // SAFETY: the caller's promise.
            unsafe { give(&data, buffer.cast(), size, written) }
        }
        fn WHvCreatePartition(partition: *mut WHV_PARTITION_HANDLE) {
            // SAFETY: the caller's promise.
            unsafe { put(partition, 0) }?;
            // SAFETY: as above.
            unsafe { put(partition, partition::create(true)) }
        }
        fn WHvSetupPartition(partition: WHV_PARTITION_HANDLE) { find(partition)?.set_up() }
        fn WHvDeletePartition(partition: WHV_PARTITION_HANDLE) { partition::delete(partition) }
        fn WHvGetPartitionProperty(
            partition: WHV_PARTITION_HANDLE, code: WHV_PARTITION_PROPERTY_CODE, buffer: *mut c_void, size: u32,
            written: *mut u32,
        ) {
            let data = find(partition)?.property(code)?;
            // SAFETY: the caller's promise.
            unsafe { give(&data, buffer.cast(), size, written) }
        }
        fn WHvSetPartitionProperty(
            partition: WHV_PARTITION_HANDLE, code: WHV_PARTITION_PROPERTY_CODE, buffer: *const c_void, size: u32,
        ) {
            // SAFETY: the caller's promise.
            find(partition)?.set_property(code, unsafe { bytes(buffer, size) }?)
        }
        fn WHvMapGpaRange(
            partition: WHV_PARTITION_HANDLE, source: *mut c_void, gpa: u64, size: u64, flags: WHV_MAP_GPA_RANGE_FLAGS,
        ) {
            calls::map(partition, source.expose_provenance(), gpa, size, flags)
        }
        fn WHvUnmapGpaRange(partition: WHV_PARTITION_HANDLE, gpa: u64, size: u64) {
            calls::unmap(partition, gpa, size)
        }
        fn WHvTranslateGva(
            partition: WHV_PARTITION_HANDLE, vp: u32, gva: u64, flags: WHV_TRANSLATE_GVA_FLAGS,
            result: *mut WHV_TRANSLATE_GVA_RESULT, gpa: *mut u64,
        ) {
            let (code, found) = calls::translate(partition, vp, gva, flags)?;
            // SAFETY: the caller's promise.
            unsafe { put(result, WHV_TRANSLATE_GVA_RESULT { ResultCode: code, Reserved: 0 }) }?;
            // SAFETY: as above.
            unsafe { put(gpa, found) }
        }
        fn WHvCreateVirtualProcessor(partition: WHV_PARTITION_HANDLE, vp: u32, flags: u32) {
            if flags != 0 {
                return code(E_INVALIDARG);
            }
            ready(partition)?.create_vp(vp)
        }
        fn WHvDeleteVirtualProcessor(partition: WHV_PARTITION_HANDLE, vp: u32) { ready(partition)?.delete_vp(vp) }
        fn WHvRunVirtualProcessor(partition: WHV_PARTITION_HANDLE, vp: u32, context: *mut ExitContext, size: u32) {
            if context.is_null() {
                return code(E_POINTER);
            }
            check_aligned(context.addr(), "the exit context")?;
            if (size as usize) < size_of::<ExitContext>() {
                return code(WHV_E_INSUFFICIENT_BUFFER);
            }
            // SAFETY: not null, aligned and large enough; the caller lends it for the call.
            calls::run(partition, vp, unsafe { &mut *context })
        }
        fn WHvCancelRunVirtualProcessor(partition: WHV_PARTITION_HANDLE, vp: u32, flags: u32) {
            calls::cancel(partition, vp, flags)
        }
        fn WHvGetVirtualProcessorRegisters(
            partition: WHV_PARTITION_HANDLE, vp: u32, names: *const WHV_REGISTER_NAME, count: u32,
            values: *mut RegisterValue,
        ) {
            check_aligned(values.addr(), "the array of register values")?;
            if count > MOST_REGISTERS || count != 0 && values.is_null() {
                return code(E_INVALIDARG);
            }
            let mut found = vec![RegisterValue::default(); count as usize];
            // SAFETY: the caller's promise.
            calls::get_registers(partition, vp, unsafe { elements(names, count) }?, &mut found)?;
            // SAFETY: the caller's promise; not null.
            unsafe { values.copy_from_nonoverlapping(found.as_ptr(), found.len()) };
            Ok(())
        }
        fn WHvSetVirtualProcessorRegisters(
            partition: WHV_PARTITION_HANDLE, vp: u32, names: *const WHV_REGISTER_NAME, count: u32,
            values: *const RegisterValue,
        ) {
            check_aligned(values.addr(), "the array of register values")?;
            if count > MOST_REGISTERS {
                return code(E_INVALIDARG);
            }
            // SAFETY: the caller's promise.
            let (names, values) = unsafe { (elements(names, count)?, elements(values, count)?) };
            calls::set_registers(partition, vp, names, values)
        }
    }
    opt {
        fn WHvGetVirtualProcessorXsaveState(
            partition: WHV_PARTITION_HANDLE, vp: u32, buffer: *mut c_void, size: u32, written: *mut u32,
        ) {
            // SAFETY: the caller's promise.
            unsafe { give_state(partition, vp, State::Xsave, buffer, size, written) }
        }
        fn WHvSetVirtualProcessorXsaveState(
            partition: WHV_PARTITION_HANDLE, vp: u32, buffer: *const c_void, size: u32,
        ) {
            // SAFETY: the caller's promise.
            unsafe { take_state(partition, vp, State::Xsave, buffer, size) }
        }
        fn WHvQueryGpaRangeDirtyBitmap(
            partition: WHV_PARTITION_HANDLE, gpa: u64, size: u64, bitmap: *mut u64, bitmap_size: u32,
        ) {
            if !bitmap_size.is_multiple_of(8) || !bitmap.is_aligned() {
                return code(E_INVALIDARG);
            }
            let out = if bitmap.is_null() || bitmap_size == 0 {
                None
            } else {
                // SAFETY: the caller's promise; not null and aligned.
                Some(unsafe { slice::from_raw_parts_mut(bitmap, bitmap_size as usize / 8) })
            };
            calls::dirty(partition, gpa, size, out)
        }
        fn WHvRequestInterrupt(partition: WHV_PARTITION_HANDLE, interrupt: *const InterruptControl, size: u32) {
            if size as usize != size_of::<InterruptControl>() {
                return code(E_INVALIDARG);
            }
            // SAFETY: the caller's promise.
            let control = unsafe { elements(interrupt, 1) }?;
            calls::request_interrupt(partition, &control[0])
        }
        fn WHvGetVirtualProcessorInterruptControllerState(
            partition: WHV_PARTITION_HANDLE, vp: u32, state: *mut c_void, size: u32, written: *mut u32,
        ) {
            // SAFETY: the caller's promise.
            unsafe { give_state(partition, vp, State::Apic, state, size, written) }
        }
        fn WHvSetVirtualProcessorInterruptControllerState(
            partition: WHV_PARTITION_HANDLE, vp: u32, state: *const c_void, size: u32,
        ) {
            // SAFETY: the caller's promise.
            unsafe { take_state(partition, vp, State::Apic, state, size) }
        }
        fn WHvGetPartitionCounters(
            partition: WHV_PARTITION_HANDLE, set: WHV_PARTITION_COUNTER_SET, buffer: *mut c_void, size: u32,
            written: *mut u32,
        ) {
            // SAFETY: the caller's promise.
            unsafe { give(&calls::counters(partition, None, set)?, buffer.cast(), size, written) }
        }
        fn WHvGetVirtualProcessorCounters(
            partition: WHV_PARTITION_HANDLE, vp: u32, set: WHV_PROCESSOR_COUNTER_SET, buffer: *mut c_void, size: u32,
            written: *mut u32,
        ) {
            // SAFETY: the caller's promise.
            unsafe { give(&calls::counters(partition, Some(vp), set)?, buffer.cast(), size, written) }
        }
        fn WHvSuspendPartitionTime(partition: WHV_PARTITION_HANDLE) { calls::set_time(partition, false) }
        fn WHvResumePartitionTime(partition: WHV_PARTITION_HANDLE) { calls::set_time(partition, true) }
        fn WHvRegisterPartitionDoorbellEvent(
            partition: WHV_PARTITION_HANDLE, data: *const WHV_DOORBELL_MATCH_DATA, event: HANDLE,
        ) {
            // SAFETY: the caller's promise.
            let data = unsafe { elements(data, 1) }?;
            calls::register_doorbell(partition, &data[0], event.expose_provenance())
        }
        fn WHvUnregisterPartitionDoorbellEvent(
            partition: WHV_PARTITION_HANDLE, data: *const WHV_DOORBELL_MATCH_DATA,
        ) {
            // SAFETY: the caller's promise.
            let data = unsafe { elements(data, 1) }?;
            calls::unregister_doorbell(partition, &data[0])
        }
        fn WHvGetVirtualProcessorInterruptControllerState2(
            partition: WHV_PARTITION_HANDLE, vp: u32, state: *mut c_void, size: u32, written: *mut u32,
        ) {
            // SAFETY: the caller's promise.
            unsafe { give_state(partition, vp, State::Apic, state, size, written) }
        }
        fn WHvSetVirtualProcessorInterruptControllerState2(
            partition: WHV_PARTITION_HANDLE, vp: u32, state: *const c_void, size: u32,
        ) {
            // SAFETY: the caller's promise.
            unsafe { take_state(partition, vp, State::Apic, state, size) }
        }
        fn WHvMapGpaRange2(
            partition: WHV_PARTITION_HANDLE, process: HANDLE, source: *mut c_void, gpa: u64, size: u64,
            flags: WHV_MAP_GPA_RANGE_FLAGS,
        ) {
            if process.is_null() {
                return code(E_INVALIDARG);
            }
            calls::map(partition, source.expose_provenance(), gpa, size, flags)
        }
        fn WHvCreateVirtualProcessor2(
            partition: WHV_PARTITION_HANDLE, vp: u32, properties: *const WHV_VIRTUAL_PROCESSOR_PROPERTY, count: u32,
        ) {
            // SAFETY: the caller's promise.
            let properties = unsafe { elements(properties, count) }?;
            if properties.iter().any(|property| property.PropertyCode != WHvVirtualProcessorPropertyCodeNumaNode) {
                return code(E_INVALIDARG);
            }
            ready(partition)?.create_vp(vp)
        }
        fn WHvGetVirtualProcessorState(
            partition: WHV_PARTITION_HANDLE, vp: u32, kind: WHV_VIRTUAL_PROCESSOR_STATE_TYPE, buffer: *mut c_void,
            size: u32, written: *mut u32,
        ) {
            // SAFETY: the caller's promise.
            unsafe { give_state(partition, vp, State::of(kind)?, buffer, size, written) }
        }
        fn WHvSetVirtualProcessorState(
            partition: WHV_PARTITION_HANDLE, vp: u32, kind: WHV_VIRTUAL_PROCESSOR_STATE_TYPE, buffer: *const c_void,
            size: u32,
        ) {
            // SAFETY: the caller's promise.
            unsafe { take_state(partition, vp, State::of(kind)?, buffer, size) }
        }
        fn WHvGetVirtualProcessorCpuidOutput(
            partition: WHV_PARTITION_HANDLE, vp: u32, eax: u32, ecx: u32, output: *mut WHV_CPUID_OUTPUT,
        ) {
            let [a, b, c, d] = calls::cpuid(partition, vp, eax, ecx)?;
            // SAFETY: the caller's promise.
            unsafe { put(output, WHV_CPUID_OUTPUT { Eax: a, Ebx: b, Ecx: c, Edx: d }) }
        }
        fn WHvGetInterruptTargetVpSet(
            partition: WHV_PARTITION_HANDLE, destination: u64, mode: WHV_INTERRUPT_DESTINATION_MODE, targets: *mut u32,
            capacity: u32, count: *mut u32,
        ) {
            let found = calls::interrupt_targets(partition, destination, mode)?;
            // SAFETY: the caller's promise.
            unsafe { put(count, found.len() as u32) }?;
            if found.len() > capacity as usize {
                return code(WHV_E_INSUFFICIENT_BUFFER);
            }
            // SAFETY: the caller's promise; there is room.
            unsafe { targets.copy_from_nonoverlapping(found.as_ptr(), found.len()) };
            Ok(())
        }
        fn WHvAdviseGpaRange(
            partition: WHV_PARTITION_HANDLE, ranges: *const WHV_MEMORY_RANGE_ENTRY, count: u32,
            advice: WHV_ADVISE_GPA_RANGE_CODE, _buffer: *const c_void, _size: u32,
        ) {
            if !(WHvAdviseGpaRangeCodePopulate..=WHvAdviseGpaRangeCodeUnpin).contains(&advice) {
                return code(E_INVALIDARG);
            }
            // SAFETY: the caller's promise.
            calls::advise(partition, unsafe { elements(ranges, count) }?)
        }
        fn WHvReadGpaRange(
            partition: WHV_PARTITION_HANDLE, _vp: u32, gpa: u64, _controls: WHV_ACCESS_GPA_CONTROLS, data: *mut c_void,
            size: u32,
        ) {
            let mut copy = vec![0; (size as usize).min(17)];
            calls::access_memory(partition, gpa, &mut copy, false)?;
            // SAFETY: the caller's promise.
            unsafe { give(&copy, data.cast(), size, std::ptr::null_mut()) }
        }
        fn WHvWriteGpaRange(
            partition: WHV_PARTITION_HANDLE, _vp: u32, gpa: u64, _controls: WHV_ACCESS_GPA_CONTROLS,
            data: *const c_void, size: u32,
        ) {
            // SAFETY: the caller's promise.
            let mut copy = unsafe { bytes(data, size) }?.to_vec();
            calls::access_memory(partition, gpa, &mut copy, true)
        }
        fn WHvResetPartition(partition: WHV_PARTITION_HANDLE) { calls::reset(partition) }
    }
}
