//! What the functions do, behind their C interface.

use super::apic::{deliver, targets};
use super::bus::Doorbell;
use super::memory::PAGE;
use super::partition::{Partition, find, ready};
use super::registers::place;
use super::{Answer, code, lock, misuse};
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use vm_accel_softcpu::apic::{DeliveryMode, Destination, Message};
use vm_accel_sys::whpx::code::hv::{ERROR_HV_INVALID_PARAMETER, ERROR_HV_INVALID_PARTITION_STATE};
use vm_accel_sys::whpx::code::{
    E_INVALIDARG, WHV_E_GPA_RANGE_NOT_FOUND, WHV_E_INVALID_PARTITION_CONFIG, WHV_E_VP_DOES_NOT_EXIST,
};
use vm_accel_sys::whpx::x86_64::defs::*;
use vm_accel_sys::whpx::x86_64::{ExitContext, InterruptControl, RegisterValue};

/// An array that the platform may access with aligned instructions.
pub(super) fn check_aligned(pointer: usize, what: &str) -> Answer {
    if !pointer.is_multiple_of(16) {
        return misuse(format!("{what} at {pointer:#x} is not aligned to 16 bytes"));
    }
    Ok(())
}

pub(super) fn map(partition: isize, source: usize, gpa: u64, size: u64, flags: i32) -> Answer {
    let partition = ready(partition)?;
    let _closed = partition.stopped();
    partition.memory.map(source, gpa, size, flags)
}

pub(super) fn unmap(partition: isize, gpa: u64, size: u64) -> Answer {
    let partition = ready(partition)?;
    let _closed = partition.stopped();
    partition.memory.unmap(gpa, size)
}

pub(super) fn advise(partition: isize, ranges: &[WHV_MEMORY_RANGE_ENTRY]) -> Answer {
    let partition = ready(partition)?;
    let is_there = |range: &WHV_MEMORY_RANGE_ENTRY| partition.memory.is_mapped(range.GuestAddress, range.SizeInBytes);
    if ranges.iter().any(|range| (range.GuestAddress | range.SizeInBytes) % PAGE != 0) {
        return code(E_INVALIDARG);
    }
    if ranges.iter().all(is_there) { Ok(()) } else { code(WHV_E_GPA_RANGE_NOT_FOUND) }
}

pub(super) fn access_memory(partition: isize, gpa: u64, data: &mut [u8], write: bool) -> Answer {
    let partition = ready(partition)?;
    if data.len() > WHV_READ_WRITE_GPA_RANGE_MAX_SIZE as usize {
        return code(E_INVALIDARG);
    }
    let memory = &partition.memory;
    let done = if write { memory.write(gpa, data) } else { memory.read(gpa, data) };
    if done { Ok(()) } else { code(WHV_E_GPA_RANGE_NOT_FOUND) }
}

pub(super) fn dirty(partition: isize, gpa: u64, size: u64, bitmap: Option<&mut [u64]>) -> Answer {
    let bits = ready(partition)?.memory.take_dirty(gpa, size)?;
    match bitmap {
        // Cleared without being asked for.
        None => Ok(()),
        Some(out) if out.len() >= bits.len() => {
            out[..bits.len()].copy_from_slice(&bits);
            Ok(())
        }
        Some(_) => code(E_INVALIDARG),
    }
}

/// What a walk of the guest's page tables found.
pub(super) fn translate(partition: isize, vp: u32, gva: u64, flags: i32) -> Answer<(i32, u64)> {
    let partition = ready(partition)?;
    let vp = partition.vp(vp)?;
    let mut state = vp.state()?;
    let found = state.cpu.translate(gva);
    let writes = flags & WHvTranslateGvaFlagValidateWrite != 0;
    Ok(match found {
        None => (WHvTranslateGvaResultPageNotPresent, 0),
        Some(gpa) if !partition.memory.is_mapped(gpa & !(PAGE - 1), PAGE) => (WHvTranslateGvaResultGpaUnmapped, gpa),
        Some(gpa) if writes && !partition.memory.is_writable(gpa) => (WHvTranslateGvaResultGpaNoWriteAccess, gpa),
        Some(gpa) => (WHvTranslateGvaResultSuccess, gpa),
    })
}

pub(super) fn run(partition: isize, vp: u32, context: &mut ExitContext) -> Answer {
    let partition = ready(partition)?;
    partition.vp(vp)?.run(&partition.memory, context)
}

pub(super) fn cancel(partition: isize, vp: u32, flags: u32) -> Answer {
    let partition = find(partition)?;
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
}

pub(super) fn get_registers(partition: isize, vp: u32, names: &[i32], values: &mut [RegisterValue]) -> Answer {
    let partition = ready(partition)?;
    let vp = partition.vp(vp)?;
    let mut state = vp.state()?;
    let has_apic = partition.emulates_apic();
    let places = names.iter().map(|name| place(*name, has_apic)).collect::<Answer<Vec<_>>>()?;
    for (place, value) in places.into_iter().zip(values) {
        *value = state.get(place)?;
    }
    Ok(())
}

pub(super) fn set_registers(partition: isize, vp: u32, names: &[i32], values: &[RegisterValue]) -> Answer {
    let partition = ready(partition)?;
    let vp = partition.vp(vp)?;
    let mut state = vp.state()?;
    let has_apic = partition.emulates_apic();
    let places = names.iter().map(|name| place(*name, has_apic)).collect::<Answer<Vec<_>>>()?;
    places.into_iter().zip(values).try_for_each(|(place, value)| state.set(place, *value))
}

/// The states that have a format of their own.
#[derive(Debug, Clone, Copy)]
pub(super) enum State {
    Xsave,
    Apic,
}

impl State {
    pub(super) fn of(kind: WHV_VIRTUAL_PROCESSOR_STATE_TYPE) -> Answer<Self> {
        match kind {
            WHvVirtualProcessorStateTypeXsaveState => Ok(Self::Xsave),
            WHvVirtualProcessorStateTypeInterruptControllerState2 => Ok(Self::Apic),
            _ => code(E_INVALIDARG),
        }
    }
}

pub(super) fn get_state(partition: isize, vp: u32, kind: State) -> Answer<Vec<u8>> {
    let partition = ready(partition)?;
    let vp = partition.vp(vp)?;
    let mut state = vp.state()?;
    match kind {
        State::Xsave => Ok(state.xsave()),
        State::Apic if !state.has_apic => code(WHV_E_INVALID_PARTITION_CONFIG),
        State::Apic => Ok(state.apic_page()),
    }
}

pub(super) fn set_state(partition: isize, vp: u32, kind: State, data: &[u8]) -> Answer {
    let partition = ready(partition)?;
    let vp = partition.vp(vp)?;
    let mut state = vp.state()?;
    match kind {
        State::Xsave => state.set_xsave(data),
        State::Apic if !state.has_apic => code(WHV_E_INVALID_PARTITION_CONFIG),
        State::Apic => state.set_apic_page(data),
    }
}

fn destination(raw: u64, mode: u64) -> Destination {
    let id = if raw == 0xff { Destination::BROADCAST } else { raw as u32 };
    if mode == WHvX64InterruptDestinationModeLogical as u64 {
        Destination::Logical(id)
    } else {
        Destination::Physical(id)
    }
}

pub(super) fn request_interrupt(partition: isize, control: &InterruptControl) -> Answer {
    let partition = ready(partition)?;
    if !partition.emulates_apic() {
        return code(WHV_E_INVALID_PARTITION_CONFIG);
    }
    let mode = match control.kind.kind() as i32 {
        WHvX64InterruptTypeFixed => DeliveryMode::Fixed,
        WHvX64InterruptTypeLowestPriority => DeliveryMode::LowestPriority,
        WHvX64InterruptTypeNmi => DeliveryMode::Nmi,
        WHvX64InterruptTypeInit => DeliveryMode::Init,
        WHvX64InterruptTypeSipi => DeliveryMode::StartUp,
        _ => return code(E_INVALIDARG),
    };
    let has_vector = matches!(mode, DeliveryMode::Fixed | DeliveryMode::LowestPriority);
    if control.vector > 255 || has_vector && control.vector < 16 {
        return code(E_INVALIDARG);
    }
    let level = control.kind.trigger_mode() == WHvX64InterruptTriggerModeLevel as u64;
    let to = destination(control.destination.into(), control.kind.destination_mode());
    deliver(&partition.shared.apics(), &Message { destination: to, mode, vector: control.vector as u8, level });
    Ok(())
}

pub(super) fn interrupt_targets(partition: isize, raw: u64, mode: i32) -> Answer<Vec<u32>> {
    let partition = ready(partition)?;
    Ok(targets(&partition.shared.apics(), destination(raw, mode as u64)))
}

fn change_doorbells(partition: isize, change: impl FnOnce(&Partition, &mut Vec<Doorbell>) -> Answer) -> Answer {
    let partition = ready(partition)?;
    let mut doorbells = partition.shared.doorbells.write().unwrap_or_else(PoisonError::into_inner);
    change(&partition, &mut doorbells)
}

fn check_doorbell(data: &WHV_DOORBELL_MATCH_DATA) -> Answer {
    let length = matches!(data.Length, 1 | 2 | 4 | 8);
    if !length || data._bitfield >> 2 != 0 { code(E_INVALIDARG) } else { Ok(()) }
}

pub(super) fn register_doorbell(partition: isize, data: &WHV_DOORBELL_MATCH_DATA, event: usize) -> Answer {
    check_doorbell(data)?;
    change_doorbells(partition, |_, doorbells| {
        let new = Doorbell::new(data, event);
        let conflicts = |old: &&Doorbell| Doorbell { event, ..(*old).clone() } == new;
        if doorbells.iter().find(conflicts).is_some() {
            return code(ERROR_HV_INVALID_PARAMETER);
        }
        doorbells.push(new);
        Ok(())
    })
}

pub(super) fn unregister_doorbell(partition: isize, data: &WHV_DOORBELL_MATCH_DATA) -> Answer {
    check_doorbell(data)?;
    change_doorbells(partition, |_, doorbells| {
        let before = doorbells.len();
        doorbells.retain(|old| *old != Doorbell::new(data, old.event));
        if doorbells.len() == before { code(ERROR_HV_INVALID_PARAMETER) } else { Ok(()) }
    })
}

pub(super) fn cpuid(partition: isize, vp: u32, leaf: u32, subleaf: u32) -> Answer<[u32; 4]> {
    let partition = ready(partition)?;
    let vp = partition.vp(vp)?;
    let state = vp.state()?;
    Ok(state.cpuid_output(Some((leaf, subleaf))))
}

/// Time stops, or goes on: all processors must stand.
pub(super) fn set_time(partition: isize, runs: bool) -> Answer {
    let partition = ready(partition)?;
    if partition.vps().iter().any(|vp| vp.is_running()) {
        return code(ERROR_HV_INVALID_PARTITION_STATE);
    }
    for vp in partition.vps() {
        vp.state()?.set_time(runs);
    }
    Ok(())
}

pub(super) fn reset(partition: isize) -> Answer {
    let partition = ready(partition)?;
    if partition.vps().iter().any(|vp| vp.is_running()) {
        return code(ERROR_HV_INVALID_PARTITION_STATE);
    }
    for vp in partition.vps() {
        lock(&vp.apic().apic).reset();
        vp.state()?.reset();
    }
    Ok(())
}

/// The counters of a processor that anybody asks for: 64-bit numbers.
pub(super) fn counters(partition: isize, vp: Option<u32>, set: i32) -> Answer<Vec<u8>> {
    let partition = ready(partition)?;
    let count = match (vp, set) {
        (None, 0) => 3,
        (None, _) => return code(E_INVALIDARG),
        (Some(vp), _) if partition.vp(vp).is_err() => return code(WHV_E_VP_DOES_NOT_EXIST),
        (Some(_), 0) => 2,
        (Some(_), 1) => 28,
        (Some(_), 2) => 3,
        (Some(_), 3) => 5,
        (Some(_), 4) => 2,
        (Some(_), _) => return code(E_INVALIDARG),
    };
    Ok(vec![0; 8 * count])
}
