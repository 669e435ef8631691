//! Partitions: the registry of handles, properties and the order of calls.

use super::apic::LocalApic;
use super::bus::Shared;
use super::memory::{Closed, Memory};
use super::vp::Vp;
use super::{Answer, code, lock, mischief, misuse};
use crate::hostile::Mischief;
use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicIsize, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use vm_accel_softcpu::{Config, CpuidEntry, TscMode};
use vm_accel_sys::whpx::code::{
    E_INVALIDARG, WHV_E_INSUFFICIENT_BUFFER, WHV_E_INVALID_PARTITION_CONFIG, WHV_E_UNKNOWN_PROPERTY,
    WHV_E_VP_ALREADY_EXISTS, WHV_E_VP_DOES_NOT_EXIST,
};
use vm_accel_sys::whpx::x86_64::defs::*;

/// Frequency of the time stamp counter.
pub(super) const TSC_HZ: u64 = 1_000_000_000;
/// Of the local APIC's timer.
pub(super) const APIC_HZ: u64 = 1_000_000_000;
/// Most processors of a partition.
pub(super) const MAX_PROCESSORS: u32 = 64;

/// What is set before the set-up.
#[derive(Debug, Default)]
struct Settings {
    is_set_up: bool,
    processors: u32,
    apic_mode: i32,
    /// Values as they were set, to be read back.
    values: HashMap<i32, Vec<u8>>,
    cpuid: Vec<CpuidResult>,
}

/// A replacement of a CPUID answer.
#[derive(Debug, Clone, Copy)]
struct CpuidResult {
    leaf: u32,
    subleaf: Option<u32>,
    vp: Option<u32>,
    /// EAX, EBX, ECX, EDX, and which bits of them count.
    output: [u32; 4],
    mask: [u32; 4],
}

/// One partition.
#[derive(Debug)]
pub(super) struct Partition {
    settings: Mutex<Settings>,
    pub(super) memory: Memory,
    pub(super) shared: Arc<Shared>,
    vps: Mutex<BTreeMap<u32, Arc<Vp>>>,
    /// Cancellations under way.
    pub(super) cancels: AtomicU32,
    pub(super) mischief: Mutex<Mischief>,
}

static NEXT: AtomicIsize = AtomicIsize::new(0x1_0000);
static REGISTRY: Mutex<BTreeMap<isize, Arc<Partition>>> = Mutex::new(BTreeMap::new());
/// Handles grow by this, so that a number that is none is noticed.
const STRIDE: isize = 0x10;

pub(super) fn live() -> usize {
    lock(&REGISTRY).len()
}

/// Creates a partition. Without `halt_leaves` a processor that halts stays inside, whoever has the APICs.
pub(super) fn create(halt_leaves: bool) -> isize {
    let handle = NEXT.fetch_add(STRIDE, Ordering::Relaxed);
    let partition = Partition {
        settings: Mutex::default(),
        memory: Memory::new(),
        shared: Arc::new(Shared::new(halt_leaves)),
        vps: Mutex::default(),
        cancels: AtomicU32::new(0),
        mischief: Mutex::new(mischief()),
    };
    lock(&REGISTRY).insert(handle, Arc::new(partition));
    handle
}

/// The partition of a handle.
pub(super) fn find(handle: isize) -> Answer<Arc<Partition>> {
    if let Some(partition) = lock(&REGISTRY).get(&handle) {
        return Ok(Arc::clone(partition));
    }
    if (0x1_0000..NEXT.load(Ordering::Relaxed)).contains(&handle) && (handle - 0x1_0000) % STRIDE == 0 {
        return misuse(format!("the partition {handle:#x} was deleted"));
    }
    code(E_INVALIDARG)
}

/// The partition of a handle, after its set-up.
pub(super) fn ready(handle: isize) -> Answer<Arc<Partition>> {
    let partition = find(handle)?;
    if lock(&partition.settings).is_set_up { Ok(partition) } else { code(WHV_E_INVALID_PARTITION_CONFIG) }
}

/// Deletes a partition.
pub(super) fn delete(handle: isize) -> Answer {
    let partition = find(handle)?;
    if partition.cancels.load(Ordering::SeqCst) != 0 {
        return misuse("a cancellation overlaps the deletion of its partition");
    }
    if let Some((index, _)) = lock(&partition.vps).iter().find(|(_, vp)| vp.is_running()) {
        return misuse(format!("virtual processor {index} runs while its partition is deleted"));
    }
    lock(&REGISTRY).remove(&handle);
    // Whoever found the partition just before shows himself now.
    if partition.cancels.load(Ordering::SeqCst) != 0 {
        return misuse("a cancellation overlaps the deletion of its partition");
    }
    Ok(())
}

/// Reads little-endian 32-bit numbers.
fn numbers(data: &[u8]) -> Vec<u32> {
    data.chunks_exact(4).map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]])).collect()
}

fn number(data: &[u8]) -> u64 {
    let mut bytes = [0; 8];
    let len = data.len().min(8);
    bytes[..len].copy_from_slice(&data[..len]);
    u64::from_le_bytes(bytes)
}

/// A property: its size (of an element, for lists), whether it is a list, and whether the set-up fixes it.
fn property(code: i32) -> Option<(usize, bool, bool)> {
    Some(match code {
        WHvPartitionPropertyCodeExtendedVmExits
        | WHvPartitionPropertyCodeExceptionExitBitmap
        | WHvPartitionPropertyCodeX64MsrExitBitmap => (8, false, false),
        WHvPartitionPropertyCodeCpuidExitList => (4, true, false),
        WHvPartitionPropertyCodeCpuidResultList => (32, true, true),
        WHvPartitionPropertyCodeCpuidResultList2 => (48, true, true),
        WHvPartitionPropertyCodeMsrActionList => (8, true, true),
        WHvPartitionPropertyCodeProcessorFeatures
        | WHvPartitionPropertyCodeProcessorXsaveFeatures
        | WHvPartitionPropertyCodeProcessorClockFrequency
        | WHvPartitionPropertyCodeInterruptClockFrequency
        | WHvPartitionPropertyCodeReferenceTime
        | WHvPartitionPropertyCodeCpuGroupId
        | WHvPartitionPropertyCodeProcessorPerfmonFeatures => (8, false, true),
        WHvPartitionPropertyCodeProcessorFeaturesBanks => (24, false, true),
        WHvPartitionPropertyCodeSyntheticProcessorFeaturesBanks => (16, false, true),
        WHvPartitionPropertyCodeProcessorClFlushSize => (1, false, true),
        WHvPartitionPropertyCodePrimaryNumaNode => (2, false, true),
        WHvPartitionPropertyCodeProcessorCount
        | WHvPartitionPropertyCodeLocalApicEmulationMode
        | WHvPartitionPropertyCodeSeparateSecurityDomain
        | WHvPartitionPropertyCodeNestedVirtualization
        | WHvPartitionPropertyCodeApicRemoteReadSupport
        | WHvPartitionPropertyCodeCpuReserve
        | WHvPartitionPropertyCodeCpuCap
        | WHvPartitionPropertyCodeCpuWeight
        | WHvPartitionPropertyCodeProcessorFrequencyCap
        | WHvPartitionPropertyCodeAllowDeviceAssignment
        | WHvPartitionPropertyCodeDisableSmt
        | WHvPartitionPropertyCodeUnimplementedMsrAction => (4, false, true),
        _ => return None,
    })
}

impl Partition {
    /// Changes memory while no processor runs.
    pub(super) fn stopped(&self) -> Closed<'_> {
        let vps: Vec<_> = lock(&self.vps).values().cloned().collect();
        self.memory.gate.close(|| vps.iter().for_each(|vp| vp.kick()))
    }

    pub(super) fn set_property(&self, property_code: i32, data: &[u8]) -> Answer {
        let Some((size, is_list, is_fixed)) = property(property_code) else {
            return code(WHV_E_UNKNOWN_PROPERTY);
        };
        let mut settings = lock(&self.settings);
        // A single value may come in a buffer that is larger (callers pass the whole union), a list is as long as it is.
        let wrong = if is_list { !data.len().is_multiple_of(size) } else { data.len() < size };
        if wrong || settings.is_set_up && is_fixed {
            return code(E_INVALIDARG);
        }
        let data = if is_list { data } else { &data[..size] };
        let value = number(data);
        match property_code {
            WHvPartitionPropertyCodeProcessorCount => {
                if value == 0 || value > u64::from(MAX_PROCESSORS) {
                    return code(E_INVALIDARG);
                }
                settings.processors = value as u32;
            }
            WHvPartitionPropertyCodeLocalApicEmulationMode => {
                if value > WHvX64LocalApicEmulationModeX2Apic as u64 {
                    return code(E_INVALIDARG);
                }
                settings.apic_mode = value as i32;
            }
            WHvPartitionPropertyCodeExtendedVmExits => {
                if value & !super::capability::EXTENDED_EXITS != 0 {
                    return code(E_INVALIDARG);
                }
                self.shared.extended_exits.store(value, Ordering::Relaxed);
                let traps = self.shared.exits().x64_apic_init_sipi_exit_trap() != 0;
                self.shared.apics().iter().for_each(|apic| apic.traps_init.store(traps, Ordering::Relaxed));
            }
            WHvPartitionPropertyCodeExceptionExitBitmap => {
                self.shared.exception_bitmap.store(value, Ordering::Relaxed);
            }
            WHvPartitionPropertyCodeX64MsrExitBitmap => self.shared.msr_bitmap.store(value, Ordering::Relaxed),
            WHvPartitionPropertyCodeCpuidExitList => {
                *self.shared.cpuid_list.write().unwrap_or_else(PoisonError::into_inner) = numbers(data);
            }
            WHvPartitionPropertyCodeCpuidResultList => {
                settings.cpuid = numbers(data)
                    .chunks_exact(8)
                    .map(|n| CpuidResult {
                        leaf: n[0],
                        subleaf: None,
                        vp: None,
                        output: [n[4], n[5], n[6], n[7]],
                        mask: [u32::MAX; 4],
                    })
                    .collect();
            }
            WHvPartitionPropertyCodeCpuidResultList2 => {
                settings.cpuid = numbers(data)
                    .chunks_exact(12)
                    .map(|n| CpuidResult {
                        leaf: n[0],
                        subleaf: (n[3] & WHvX64CpuidResult2FlagSubleafSpecific as u32 != 0).then_some(n[1]),
                        vp: (n[3] & WHvX64CpuidResult2FlagVpSpecific as u32 != 0).then_some(n[2]),
                        output: [n[4], n[5], n[6], n[7]],
                        mask: [n[8], n[9], n[10], n[11]],
                    })
                    .collect();
            }
            _ => {}
        }
        settings.values.insert(property_code, data.to_vec());
        Ok(())
    }

    pub(super) fn property(&self, property_code: i32) -> Answer<Vec<u8>> {
        let Some((size, is_list, _)) = property(property_code) else {
            return code(WHV_E_UNKNOWN_PROPERTY);
        };
        let settings = lock(&self.settings);
        let default = match property_code {
            _ if is_list => Vec::new(),
            WHvPartitionPropertyCodeProcessorClockFrequency => TSC_HZ.to_le_bytes().to_vec(),
            WHvPartitionPropertyCodeInterruptClockFrequency => APIC_HZ.to_le_bytes().to_vec(),
            _ => vec![0; size],
        };
        Ok(settings.values.get(&property_code).cloned().unwrap_or(default))
    }

    pub(super) fn set_up(&self) -> Answer {
        let mut settings = lock(&self.settings);
        if settings.is_set_up || settings.processors == 0 {
            return code(WHV_E_INVALID_PARTITION_CONFIG);
        }
        settings.is_set_up = true;
        Ok(())
    }

    pub(super) fn emulates_apic(&self) -> bool {
        lock(&self.settings).apic_mode != WHvX64LocalApicEmulationModeNone
    }

    pub(super) fn create_vp(&self, index: u32) -> Answer {
        let settings = lock(&self.settings);
        if index >= settings.processors {
            return code(E_INVALIDARG);
        }
        let mut vps = lock(&self.vps);
        if vps.contains_key(&index) {
            return code(WHV_E_VP_ALREADY_EXISTS);
        }
        let x2apic = settings.apic_mode == WHvX64LocalApicEmulationModeX2Apic;
        let apic = LocalApic::new(index, x2apic);
        let traps = self.shared.exits().x64_apic_init_sipi_exit_trap() != 0;
        apic.traps_init.store(traps, Ordering::Relaxed);
        let emulated = settings.apic_mode != WHvX64LocalApicEmulationModeNone;
        if emulated {
            self.shared.apics.write().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(&apic));
        }
        let config = Config { tsc: TscMode::Host(TSC_HZ), start: self.shared.start };
        let seed = lock(&self.mischief).draw();
        let mischief = Mischief::new(lock(&self.mischief).is_hostile().then_some(seed));
        let vp = Vp::new(index, config, &self.memory.ram, &self.shared, apic, emulated, mischief);
        vp.replace_cpuid(|entries| settings.apply_cpuid(index, entries));
        vps.insert(index, Arc::new(vp));
        Ok(())
    }

    pub(super) fn delete_vp(&self, index: u32) -> Answer {
        let mut vps = lock(&self.vps);
        let Some(vp) = vps.get(&index) else {
            return misuse(format!("virtual processor {index} does not exist; was it deleted twice?"));
        };
        if vp.is_running() {
            return misuse(format!("virtual processor {index} is deleted while it runs"));
        }
        let mut apics = self.shared.apics.write().unwrap_or_else(PoisonError::into_inner);
        apics.retain(|apic| apic.index != index);
        vps.remove(&index);
        Ok(())
    }

    pub(super) fn vp(&self, index: u32) -> Answer<Arc<Vp>> {
        lock(&self.vps).get(&index).cloned().map_or_else(|| code(WHV_E_VP_DOES_NOT_EXIST), Ok)
    }

    pub(super) fn vps(&self) -> Vec<Arc<Vp>> {
        lock(&self.vps).values().cloned().collect()
    }
}

impl Settings {
    /// The CPUID of a processor with the replacements.
    fn apply_cpuid(&self, vp: u32, entries: &mut Vec<CpuidEntry>) {
        for result in self.cpuid.iter().filter(|result| result.vp.is_none_or(|only| only == vp)) {
            let fits = |entry: &CpuidEntry| {
                entry.leaf == result.leaf && result.subleaf.is_none_or(|subleaf| subleaf == entry.subleaf)
            };
            if !entries.iter().any(fits) {
                let subleaf = result.subleaf.unwrap_or(0);
                entries.push(CpuidEntry { leaf: result.leaf, subleaf, ..CpuidEntry::default() });
            }
            for entry in entries.iter_mut().filter(|entry| fits(entry)) {
                let slots = [&mut entry.eax, &mut entry.ebx, &mut entry.ecx, &mut entry.edx];
                for (slot, (value, mask)) in slots.into_iter().zip(result.output.iter().zip(result.mask)) {
                    *slot = *slot & !mask | value & mask;
                }
            }
        }
    }
}

/// Copies an answer into a caller's buffer; `written` gets the size that is needed, also if the buffer is too small.
///
/// # Safety
/// `buffer` must be good for writes of `size` bytes and `written` for one number, unless they are null.
pub(super) unsafe fn give(data: &[u8], buffer: *mut u8, size: u32, written: *mut u32) -> Answer {
    if !written.is_null() {
        // SAFETY: the caller's promise.
        unsafe { written.write_unaligned(data.len() as u32) };
    }
    if (size as usize) < data.len() || buffer.is_null() {
        return code(WHV_E_INSUFFICIENT_BUFFER);
    }
    // SAFETY: the caller's promise, and the data fits.
    unsafe { buffer.copy_from_nonoverlapping(data.as_ptr(), data.len()) };
    Ok(())
}
