//! The machine as a processor sees it: the platform's local APIC if there is one, doorbells, and otherwise exits.

use super::apic::{LocalApic, act};
use super::event::signal;
use super::lock;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, RwLock};
use std::time::Instant;
use vm_accel_softcpu::apic::{DEFAULT_BASE, MSR_APIC_BASE, MSR_TSC_DEADLINE, MSR_X2APIC, Now};
use vm_accel_softcpu::{Answer, Bus, Intercept, MsrAnswer};
use vm_accel_sys::whpx::x86_64::defs::WHV_DOORBELL_MATCH_DATA;
use vm_accel_sys::whpx::x86_64::fields::{DoorbellMatch, ExtendedVmExits, MsrExitBitmap};

/// Which exits a partition takes, and what its processors share besides memory.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) extended_exits: AtomicU64,
    pub(super) exception_bitmap: AtomicU64,
    pub(super) msr_bitmap: AtomicU64,
    pub(super) cpuid_list: RwLock<Vec<u32>>,
    pub(super) apics: RwLock<Vec<Arc<LocalApic>>>,
    pub(super) doorbells: RwLock<Vec<Doorbell>>,
    pub(super) start: Instant,
    /// HLT leaves where the platform emulates no APIC.
    pub(super) halt_leaves: bool,
}

impl Shared {
    pub(super) fn new(halt_leaves: bool) -> Self {
        Self {
            extended_exits: AtomicU64::new(0),
            exception_bitmap: AtomicU64::new(0),
            msr_bitmap: AtomicU64::new(0),
            cpuid_list: RwLock::default(),
            apics: RwLock::default(),
            doorbells: RwLock::default(),
            start: Instant::now(),
            halt_leaves,
        }
    }

    pub(super) fn exits(&self) -> ExtendedVmExits {
        ExtendedVmExits(self.extended_exits.load(Ordering::Relaxed))
    }

    pub(super) fn apics(&self) -> Vec<Arc<LocalApic>> {
        self.apics.read().unwrap_or_else(std::sync::PoisonError::into_inner).clone()
    }

    /// Rings the doorbell that a write matches, if one does.
    pub(super) fn ring(&self, gpa: u64, data: &[u8]) -> bool {
        let doorbells = self.doorbells.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        let found = doorbells.iter().find(|bell| bell.matches(gpa, data));
        found.inspect(|bell| signal(bell.event)).is_some()
    }
}

/// A registered doorbell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Doorbell {
    pub(super) gpa: u64,
    /// Only this value, if any.
    pub(super) value: Option<u64>,
    /// Only this length, if any.
    pub(super) length: Option<u32>,
    pub(super) event: usize,
}

impl Doorbell {
    pub(super) fn new(data: &WHV_DOORBELL_MATCH_DATA, event: usize) -> Self {
        let how = DoorbellMatch(data._bitfield);
        Self {
            gpa: data.GuestAddress,
            value: (how.match_on_value() != 0).then_some(data.Value),
            length: (how.match_on_length() != 0).then_some(data.Length),
            event,
        }
    }

    fn matches(&self, gpa: u64, data: &[u8]) -> bool {
        let mut value = [0; 8];
        value[..data.len()].copy_from_slice(data);
        self.gpa == gpa
            && self.length.is_none_or(|length| length as usize == data.len())
            && self.value.is_none_or(|wanted| wanted == u64::from_le_bytes(value))
    }
}

/// What a processor's bus shares with the processor.
#[derive(Debug)]
pub(super) struct Own {
    pub(super) cr8: AtomicU8,
    /// IA32_APIC_BASE where the platform emulates no APIC.
    pub(super) apic_base: AtomicU64,
    /// The time stamp counter when the processor last told it.
    tsc: AtomicU64,
}

impl Own {
    pub(super) fn new(index: u32) -> Arc<Self> {
        const ENABLED: u64 = 1 << 11;
        const BOOT: u64 = 1 << 8;
        let base = DEFAULT_BASE | ENABLED | if index == 0 { BOOT } else { 0 };
        Arc::new(Self { cr8: AtomicU8::new(0), apic_base: AtomicU64::new(base), tsc: AtomicU64::new(0) })
    }
}

pub(super) struct PlatformBus {
    pub(super) shared: Arc<Shared>,
    pub(super) own: Arc<Own>,
    /// Only with `LocalApicEmulationMode`.
    pub(super) apic: Option<Arc<LocalApic>>,
}

/// MSRs that the hypervisor serves without an exit, besides those of its APIC.
fn is_known(index: u32) -> bool {
    matches!(
        index,
        0x10 | 0x17 | 0x3a | 0x3b | 0x79 | 0x8b | 0xfe | 0x174..=0x176 | 0x179 | 0x17a | 0x1a0 | 0x1d9 | 0x1db..=0x1de
            | 0x200..=0x20f | 0x250 | 0x258 | 0x259 | 0x268..=0x26f | 0x277 | 0x2ff | 0xc000_0080..=0xc000_0084
            | 0xc000_0100..=0xc000_0103
    )
}

impl PlatformBus {
    fn now(&self, tsc: u64) -> Now {
        Now { ns: u64::try_from(self.shared.start.elapsed().as_nanos()).unwrap_or(u64::MAX), tsc }
    }

    fn last(&self) -> Now {
        self.now(self.own.tsc.load(Ordering::Relaxed))
    }

    /// The APIC, if this page is that of its registers.
    fn registers(&self, gpa: u64) -> Option<&Arc<LocalApic>> {
        self.apic.as_ref().filter(|apic| lock(&apic.apic).mmio_base() == Some(gpa & !0xfff))
    }

    fn act(&self, apic: &LocalApic, outcome: vm_accel_softcpu::apic::Outcome, now: Now) {
        let page = lock(&apic.apic).page(now);
        let word = |at: usize| u64::from(u32::from_le_bytes([page[at], page[at + 1], page[at + 2], page[at + 3]]));
        act(&self.shared.apics(), apic, outcome, word(0x300) | word(0x310) << 32);
    }

    fn intercepts_msr(&self, index: u32, write: bool) -> bool {
        let bitmap = MsrExitBitmap(self.shared.msr_bitmap.load(Ordering::Relaxed));
        if self.shared.exits().x64_msr_exit() == 0 {
            return false;
        }
        let owned = self.apic.as_ref().is_some_and(|apic| lock(&apic.apic).owns_msr(index));
        match index {
            0x10 if write => bitmap.tsc_msr_write() != 0,
            0x10 => bitmap.tsc_msr_read() != 0,
            MSR_APIC_BASE if write => bitmap.apic_base_msr_write() != 0,
            MSR_APIC_BASE => false,
            _ => !owned && !is_known(index) && bitmap.unhandled_msrs() != 0,
        }
    }
}

impl Bus for PlatformBus {
    fn mmio_read(&mut self, gpa: u64, data: &mut [u8]) -> Answer {
        let Some(apic) = self.registers(gpa) else {
            return Answer::Pending;
        };
        lock(&apic.apic).read_mmio(gpa & 0xfff, data, self.last());
        Answer::Done
    }

    fn mmio_write(&mut self, gpa: u64, data: &[u8]) -> Answer {
        let Some(apic) = self.registers(gpa) else {
            return if self.shared.ring(gpa, data) { Answer::Done } else { Answer::Pending };
        };
        let now = self.last();
        let outcome = lock(&apic.apic).write_mmio(gpa & 0xfff, data, now);
        self.act(apic, outcome, now);
        Answer::Done
    }

    fn msr_read(&mut self, index: u32, tsc: u64) -> MsrAnswer {
        match &self.apic {
            Some(apic) if lock(&apic.apic).owns_msr(index) => {
                lock(&apic.apic).read_msr(index, self.now(tsc)).map_or(MsrAnswer::Fault, MsrAnswer::Done)
            }
            None if index == MSR_APIC_BASE => MsrAnswer::Done(self.own.apic_base.load(Ordering::Relaxed)),
            _ if index == MSR_TSC_DEADLINE || (MSR_X2APIC..MSR_X2APIC + 0x100).contains(&index) => MsrAnswer::Fault,
            _ => MsrAnswer::NotMine,
        }
    }

    fn msr_write(&mut self, index: u32, value: u64, tsc: u64) -> MsrAnswer {
        match &self.apic {
            Some(apic) if lock(&apic.apic).owns_msr(index) => {
                let now = self.now(tsc);
                let result = lock(&apic.apic).write_msr(index, value, now);
                result.map_or(MsrAnswer::Fault, |outcome| {
                    self.act(apic, outcome, now);
                    MsrAnswer::Done(0)
                })
            }
            None if index == MSR_APIC_BASE => {
                self.own.apic_base.store(value, Ordering::Relaxed);
                MsrAnswer::Done(0)
            }
            _ => MsrAnswer::NotMine,
        }
    }

    fn intercept(&mut self, what: Intercept) -> bool {
        let exits = self.shared.exits();
        match what {
            Intercept::Cpuid { leaf } => {
                let list = self.shared.cpuid_list.read().unwrap_or_else(std::sync::PoisonError::into_inner);
                exits.x64_cpuid_exit() != 0 && list.contains(&leaf)
            }
            Intercept::Msr { index, write } => self.intercepts_msr(index, write),
            Intercept::Rdtsc { .. } => exits.x64_rdtsc_exit() != 0,
            // Without the exit it is an invalid opcode, which the processor must raise itself.
            Intercept::Hypercall => true,
            Intercept::Exception(exception) => {
                let bitmap = self.shared.exception_bitmap.load(Ordering::Relaxed);
                exits.exception_exit() != 0 && bitmap >> exception.vector() & 1 != 0
            }
            _ => false,
        }
    }

    fn cr8(&mut self) -> u8 {
        self.apic.as_ref().map_or_else(|| self.own.cr8.load(Ordering::Relaxed), |apic| lock(&apic.apic).cr8())
    }

    fn set_cr8(&mut self, class: u8) {
        match &self.apic {
            Some(apic) => lock(&apic.apic).set_cr8(class),
            None => self.own.cr8.store(class & 15, Ordering::Relaxed),
        }
    }

    fn interrupt_pending(&mut self, tsc: u64) -> bool {
        self.own.tsc.store(tsc, Ordering::Relaxed);
        let now = self.now(tsc);
        self.apic.as_ref().is_some_and(|apic| {
            let mut apic = lock(&apic.apic);
            apic.advance(now);
            apic.pending().is_some()
        })
    }

    fn acknowledge(&mut self) -> Option<u8> {
        self.apic.as_ref().and_then(|apic| lock(&apic.apic).acknowledge())
    }
}
