//! Partitions: the registry of handles, properties and the order of calls.

use super::memory::Memory;
use super::registers::FEATURES;
use super::vp::Vp;
use super::{Answer, SEED, code, lock, mischief, misuse};
use crate::a64::FREQUENCY;
use crate::a64::gic::Gic;
use crate::hostile::Mischief;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicIsize, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::Instant;
use vm_accel_sys::whpx::aarch64::{ExtendedVmExits, FEATURE_REGS, IcParameters, property};
use vm_accel_sys::whpx::code::{
    E_INVALIDARG, WHV_E_INVALID_PARTITION_CONFIG, WHV_E_UNKNOWN_PROPERTY, WHV_E_VP_ALREADY_EXISTS,
    WHV_E_VP_DOES_NOT_EXIST,
};

/// Most processors of a partition.
const MAX_PROCESSORS: u32 = 64;
/// Identifiers of messages that a GIC can have.
pub(super) const LPI_BITS: u32 = 1;
const GICV3: u32 = 1;
/// The exits that can be asked for.
pub(super) const EXTENDED_EXITS: u64 = ExtendedVmExits(0).with_hypercall_exit(1).0;
/// Encodings of the keys of pointer authentication: a version of the platform may lack their names.
const KEYS: std::ops::RangeInclusive<u16> = 0xc108..=0xc119;

#[derive(Debug, Default)]
struct Settings {
    is_set_up: bool,
    processors: u32,
    gic: Option<(u64, u32)>,
    exits: u64,
}

/// Where a processor is for the GIC.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Place {
    pub(super) affinity: u64,
    pub(super) redistributor: Option<u64>,
}

/// One partition.
#[derive(Debug)]
pub(super) struct Partition {
    settings: Mutex<Settings>,
    pub(super) memory: Memory,
    gic: OnceLock<Mutex<Gic>>,
    places: Mutex<BTreeMap<u32, Place>>,
    pub(super) features: Mutex<BTreeMap<u16, u64>>,
    vps: Mutex<BTreeMap<u32, Arc<Vp>>>,
    /// What the virtual count is behind the host's.
    offset: AtomicU64,
    lacks_keys: bool,
    /// Cancellations under way.
    pub(super) cancels: AtomicU32,
    pub(super) mischief: Mutex<Mischief>,
}

static NEXT: AtomicIsize = AtomicIsize::new(0x1_0000);
static REGISTRY: Mutex<BTreeMap<isize, Arc<Partition>>> = Mutex::new(BTreeMap::new());
/// Handles grow by this, so that a number that is none is noticed.
const STRIDE: isize = 0x10;

/// The host's count.
pub(super) fn ticks() -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    const BEFORE: u64 = 1 << 44;
    let nanoseconds = START.get_or_init(Instant::now).elapsed().as_nanos();
    BEFORE + (nanoseconds * u128::from(FREQUENCY) / 1_000_000_000) as u64
}

pub(super) fn live() -> usize {
    lock(&REGISTRY).len()
}

pub(super) fn create() -> isize {
    let handle = NEXT.fetch_add(STRIDE, Ordering::Relaxed);
    // A version of the platform, so all partitions of a seed are alike.
    let lacks_keys = lock(&SEED).is_some_and(|seed| seed % 2 == 0);
    let partition = Partition {
        settings: Mutex::default(),
        memory: Memory::default(),
        gic: OnceLock::new(),
        places: Mutex::default(),
        features: Mutex::new(FEATURE_REGS.into_iter().zip(FEATURES).collect()),
        vps: Mutex::default(),
        offset: AtomicU64::new(ticks()),
        lacks_keys,
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

/// The value of a property, which may come in a buffer that is larger.
///
/// # Safety
/// `T` is plain data, for which each pattern of bits is a value.
unsafe fn read<T: Copy>(data: &[u8]) -> Answer<T> {
    if data.len() < size_of::<T>() {
        return code(E_INVALIDARG);
    }
    // SAFETY: there are enough bytes, and the caller's promise.
    Ok(unsafe { data.as_ptr().cast::<T>().read_unaligned() })
}

impl Partition {
    pub(super) fn set_property(&self, property_code: u32, data: &[u8]) -> Answer {
        let mut settings = lock(&self.settings);
        if settings.is_set_up && property_code != property::EXTENDED_VM_EXITS {
            return code(E_INVALIDARG);
        }
        match property_code {
            property::PROCESSOR_COUNT => {
                // SAFETY: a number.
                settings.processors = match unsafe { read::<u32>(data) }? {
                    count @ 1..=MAX_PROCESSORS => count,
                    _ => return code(E_INVALIDARG),
                };
            }
            property::EXTENDED_VM_EXITS => {
                // SAFETY: a number.
                let exits = unsafe { read::<u64>(data) }?;
                if exits & !EXTENDED_EXITS != 0 {
                    return code(E_INVALIDARG);
                }
                settings.exits = exits;
            }
            property::ARM64_IC_PARAMETERS => {
                // SAFETY: numbers.
                let gic = unsafe { read::<IcParameters>(data) }?;
                let ppis = [gic.gic_ppi_overflow_interrupt_from_cntv, gic.gic_ppi_performance_monitors_interrupt];
                let reserved = gic.reserved | gic.reserved1 | gic.reserved2.iter().fold(0, |all, one| all | one);
                let is_good = gic.emulation_mode == GICV3
                    && gic.gicd_base_address & 0xffff == 0
                    && gic.gic_lpi_int_id_bits <= LPI_BITS
                    && ppis.iter().all(|ppi| (16..32).contains(ppi))
                    && reserved == 0;
                if !is_good {
                    return code(E_INVALIDARG);
                }
                settings.gic = Some((gic.gicd_base_address, ppis[0]));
            }
            property::SEPARATE_SECURITY_DOMAIN | property::REFERENCE_TIME | property::PHYSICAL_ADDRESS_WIDTH => {}
            _ => return code(WHV_E_UNKNOWN_PROPERTY),
        }
        Ok(())
    }

    pub(super) fn set_up(&self) -> Answer {
        let mut settings = lock(&self.settings);
        if settings.is_set_up || settings.processors == 0 || settings.gic.is_none() {
            return code(WHV_E_INVALID_PARTITION_CONFIG);
        }
        settings.is_set_up = true;
        Ok(())
    }

    pub(super) fn gic(&self) -> MutexGuard<'_, Gic> {
        let make = || {
            let base = lock(&self.settings).gic.map_or(0, |(base, _)| base);
            Mutex::new(Gic::new(base, None))
        };
        lock(self.gic.get_or_init(make))
    }

    /// Changes where a processor is. It is connected to the GIC when that has an address for it.
    pub(super) fn place(&self, vp: u32, change: impl FnOnce(&mut Place)) {
        let mut places = lock(&self.places);
        let place = places.entry(vp).or_default();
        change(place);
        if let Place { affinity, redistributor: Some(base) } = *place {
            self.gic().connect(vp.into(), affinity, base);
        }
    }

    /// The processor with an affinity.
    pub(super) fn find_affinity(&self, affinity: u64) -> Option<u32> {
        lock(&self.places).iter().find(|(_, place)| place.affinity == affinity).map(|(vp, _)| *vp)
    }

    pub(super) fn timer_ppi(&self) -> u32 {
        lock(&self.settings).gic.map_or(0, |(_, ppi)| ppi)
    }

    pub(super) fn wants_calls(&self) -> bool {
        ExtendedVmExits(lock(&self.settings).exits).hypercall_exit() != 0
    }

    /// Whether this version of the platform does not know a register.
    pub(super) fn lacks(&self, encoding: u16) -> bool {
        self.lacks_keys && KEYS.contains(&encoding)
    }

    pub(super) fn offset(&self) -> u64 {
        self.offset.load(Ordering::Relaxed)
    }

    pub(super) fn count(&self) -> u64 {
        ticks().wrapping_sub(self.offset())
    }

    pub(super) fn set_count(&self, count: u64) {
        self.offset.store(ticks().wrapping_sub(count), Ordering::Relaxed);
    }

    pub(super) fn create_vp(&self, index: u32) -> Answer {
        if index >= lock(&self.settings).processors {
            return code(E_INVALIDARG);
        }
        let mut vps = lock(&self.vps);
        if vps.contains_key(&index) {
            return code(WHV_E_VP_ALREADY_EXISTS);
        }
        let mut mine = lock(&self.mischief);
        let seed = mine.draw();
        let mischief = Mischief::new(mine.is_hostile().then_some(seed));
        self.place(index, |place| place.affinity = index.into());
        vps.insert(index, Arc::new(Vp::new(index, mischief)));
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
        self.gic().disconnect(index.into());
        lock(&self.places).remove(&index);
        vps.remove(&index);
        Ok(())
    }

    pub(super) fn vp(&self, index: u32) -> Answer<Arc<Vp>> {
        lock(&self.vps).get(&index).cloned().map_or_else(|| code(WHV_E_VP_DOES_NOT_EXIST), Ok)
    }

    /// Something happened that a processor may wait for.
    pub(super) fn wake_all(&self) {
        let vps: Vec<_> = lock(&self.vps).values().cloned().collect();
        vps.iter().for_each(|vp| vp.wake());
    }
}
