//! A small GICv3 (Arm IHI 0069): distributor, redistributors, CPU interfaces, and a frame that makes shared interrupts of MSIs, as a
//! GICv2m has it (Arm SBSA).
//!
//! One security state, affinity routing, five bits of priority, no LPIs. It knows neither a platform nor a clock: who owns it
//! brings lines, accesses by physical address and by system register, and asks which inputs of a CPU are up. Any access of
//! a guest has an answer; what is not there reads as zero.

use std::collections::BTreeMap;
use std::ops::Range;
use vm_accel_sys::hvf::aarch64::gic as icc;

/// INTIDs: 32 are private to each CPU, the others shared.
const COUNT: usize = 1020;
const PRIVATE: usize = 32;
const SPURIOUS: u64 = 1023;
/// Shared interrupts.
pub(crate) const SHARED: Range<u32> = PRIVATE as u32..COUNT as u32;
pub(crate) const DISTRIBUTOR_SIZE: u64 = 0x1_0000;
pub(crate) const REDISTRIBUTOR_SIZE: u64 = 0x2_0000;
pub(crate) const FRAME_SIZE: u64 = 0x1_0000;
/// The affinity fields of MPIDR_EL1 and of IROUTER.
pub(crate) const AFFINITY: u64 = 0xff_00ff_ffff;
/// IROUTER: any CPU.
const ANY: u64 = 1 << 31;
/// Priorities are multiples of this.
const STEP: u8 = 8;

/// Registers that have no other name here.
const ICC_IAR0: u16 = 0xc640;
const ICC_IAR1: u16 = 0xc660;
const ICC_EOIR0: u16 = 0xc641;
const ICC_EOIR1: u16 = 0xc661;
const ICC_HPPIR0: u16 = 0xc642;
const ICC_HPPIR1: u16 = 0xc662;
const ICC_DIR: u16 = 0xc659;
const ICC_SGI1R: u16 = 0xc65d;
const ICC_ASGI1R: u16 = 0xc65e;
const ICC_SGI0R: u16 = 0xc65f;
/// ICC_CTLR_EL1: five bits of priority, 16-bit INTIDs; end of interrupt does not deactivate.
const CONTROL: u64 = 4 << 8;
const EOI_MODE: u64 = 2;

/// What a register says of each interrupt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Field {
    Group,
    Enable(bool),
    Pending(bool),
    Active(bool),
    Priority,
    Trigger,
    Route,
}

/// Registers per interrupt: offset, bits for each, what they say (12.8). A redistributor's second page has the same for its own.
const FIELDS: [(u64, u64, Field); 10] = [
    (0x0080, 1, Field::Group),
    (0x0100, 1, Field::Enable(true)),
    (0x0180, 1, Field::Enable(false)),
    (0x0200, 1, Field::Pending(true)),
    (0x0280, 1, Field::Pending(false)),
    (0x0300, 1, Field::Active(true)),
    (0x0380, 1, Field::Active(false)),
    (0x0400, 8, Field::Priority),
    (0x0c00, 2, Field::Trigger),
    (0x6000, 64, Field::Route),
];

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Interrupt {
    group: usize,
    enabled: bool,
    /// Pending by itself; a level-triggered one is pending by its line, too.
    latch: bool,
    line: bool,
    active: bool,
    edge: bool,
    priority: u8,
    route: u64,
}

impl Interrupt {
    fn is_pending(&self) -> bool {
        self.latch || self.line && !self.edge
    }

    /// Of an edge-triggered one every rise counts, and no fall.
    fn set_line(&mut self, level: bool) {
        if self.edge {
            self.latch |= level;
        } else {
            self.line = level;
        }
    }

    fn get(&self, field: Field) -> u64 {
        match field {
            Field::Group => self.group as u64,
            Field::Enable(_) => self.enabled.into(),
            Field::Pending(_) => self.is_pending().into(),
            Field::Active(_) => self.active.into(),
            Field::Priority => self.priority.into(),
            Field::Trigger => u64::from(self.edge) << 1,
            Field::Route => self.route,
        }
    }

    fn set(&mut self, field: Field, value: u64) {
        match field {
            Field::Group => self.group = value as usize & 1,
            Field::Enable(to) if value & 1 != 0 => self.enabled = to,
            Field::Pending(to) if value & 1 != 0 => self.latch = to,
            Field::Active(to) if value & 1 != 0 => self.active = to,
            Field::Priority => self.priority = value as u8 & !(STEP - 1),
            Field::Trigger => self.edge = value & 2 != 0,
            Field::Route => self.route = value & (AFFINITY | ANY),
            _ => {}
        }
    }

    /// As a saved state has it.
    fn to_bytes(self) -> [u8; 10] {
        let flags = [self.group != 0, self.enabled, self.latch, self.line, self.active, self.edge];
        let mut bytes = [0; 10];
        bytes[0] = flags.iter().enumerate().map(|(n, flag)| u8::from(*flag) << n).sum();
        bytes[1] = self.priority;
        bytes[2..].copy_from_slice(&self.route.to_le_bytes());
        bytes
    }

    fn from_bytes(bytes: [u8; 10]) -> Self {
        let flag = |n: u8| bytes[0] >> n & 1 != 0;
        let mut route = [0; 8];
        route.copy_from_slice(&bytes[2..]);
        Self {
            group: flag(0).into(),
            enabled: flag(1),
            latch: flag(2),
            line: flag(3),
            active: flag(4),
            edge: flag(5),
            priority: bytes[1],
            route: u64::from_le_bytes(route),
        }
    }
}

/// A CPU's redistributor and interface.
#[derive(Debug, Clone)]
struct Port {
    affinity: u64,
    /// Where the redistributor is.
    base: u64,
    asleep: bool,
    private: [Interrupt; PRIVATE],
    mask: u8,
    points: [u64; 2],
    control: u64,
    enabled: [bool; 2],
    /// Active priorities of both groups, one bit each.
    active: [u32; 2],
}

impl Port {
    fn new(affinity: u64, base: u64) -> Self {
        let mut private = [Interrupt::default(); PRIVATE];
        private[..16].iter_mut().for_each(|sgi| sgi.edge = true);
        Self {
            affinity,
            base,
            asleep: true,
            private,
            mask: 0,
            points: [0; 2],
            control: 0,
            enabled: [false; 2],
            active: [0; 2],
        }
    }

    /// The priority of what the CPU is at.
    fn running(&self) -> u64 {
        match self.active[0] | self.active[1] {
            0 => 0xff,
            active => u64::from(active.trailing_zeros()) * u64::from(STEP),
        }
    }
}

/// The frame for MSIs: where, and which INTIDs.
#[derive(Debug, Clone)]
pub(crate) struct Frame {
    pub(crate) base: u64,
    pub(crate) intids: Range<u32>,
}

/// Whose registers are at an address, and which.
#[derive(Debug, Clone, Copy)]
enum Place {
    Distributor(u64),
    Redistributor(u64, u64),
    Frame(u64),
}

#[derive(Debug)]
pub(crate) struct Gic {
    distributor: u64,
    pub(crate) frame: Option<Frame>,
    /// Which groups the distributor lets through.
    enabled: [bool; 2],
    shared: Vec<Interrupt>,
    ports: BTreeMap<u64, Port>,
}

impl Gic {
    pub(crate) fn new(distributor: u64, frame: Option<Frame>) -> Self {
        let shared = vec![Interrupt::default(); COUNT - PRIVATE];
        Self { distributor, frame, enabled: [false; 2], shared, ports: BTreeMap::new() }
    }

    /// Connects a CPU, or moves it.
    pub(crate) fn connect(&mut self, cpu: u64, affinity: u64, base: u64) {
        let port = self.ports.entry(cpu).or_insert_with(|| Port::new(affinity, base));
        (port.affinity, port.base) = (affinity, base);
    }

    pub(crate) fn disconnect(&mut self, cpu: u64) {
        self.ports.remove(&cpu);
    }

    /// As it was when it was made; CPU interfaces stay.
    pub(crate) fn reset(&mut self) {
        self.enabled = [false; 2];
        self.shared.fill(Interrupt::default());
        for port in self.ports.values_mut() {
            let Port { private, asleep, .. } = Port::new(port.affinity, port.base);
            (port.private, port.asleep) = (private, asleep);
        }
    }

    /// Where a CPU's redistributor is.
    pub(crate) fn redistributor(&self, cpu: u64) -> Option<u64> {
        self.ports.get(&cpu).map(|port| port.base)
    }

    fn interrupt(&mut self, cpu: u64, intid: usize) -> Option<&mut Interrupt> {
        match intid.checked_sub(PRIVATE) {
            None => self.ports.get_mut(&cpu).map(|port| &mut port.private[intid]),
            Some(n) => self.shared.get_mut(n),
        }
    }

    /// Sets the line of a shared interrupt, or of a private one of a CPU.
    pub(crate) fn set_line(&mut self, cpu: u64, intid: u32, level: bool) {
        if let Some(interrupt) = self.interrupt(cpu, intid as usize) {
            interrupt.set_line(level);
        }
    }

    /// What a device does that writes an INTID to the frame; false if that is not one of the frame's.
    pub(crate) fn message(&mut self, intid: u32) -> bool {
        let ours = self.frame.as_ref().is_some_and(|frame| frame.intids.contains(&intid));
        if let Some(interrupt) = self.interrupt(0, intid as usize).filter(|_| ours) {
            interrupt.latch = true;
        }
        ours
    }

    /// The interrupt that a CPU would acknowledge: its INTID, group and priority.
    fn best(&self, cpu: u64) -> Option<(usize, usize, u8)> {
        let port = self.ports.get(&cpu).filter(|port| !port.asleep)?;
        let first = self.ports.keys().next();
        let is_ours = |interrupt: &Interrupt| match interrupt.route & ANY {
            0 => interrupt.route & AFFINITY == port.affinity,
            _ => first == Some(&cpu),
        };
        let private = port.private.iter().enumerate();
        let shared = self.shared.iter().enumerate().map(|(n, interrupt)| (n + PRIVATE, interrupt));
        let (priority, intid, group) = private
            .chain(shared)
            .filter(|(_, it)| it.enabled && it.is_pending() && !it.active)
            .filter(|(_, it)| self.enabled[it.group] && port.enabled[it.group])
            .filter(|(intid, it)| *intid < PRIVATE || is_ours(it))
            .map(|(intid, it)| (it.priority, intid, it.group))
            .min()?;
        let group_priority = u64::from(priority) >> port.points[group] << port.points[group];
        (priority < port.mask && group_priority < port.running()).then_some((intid, group, priority))
    }

    /// The inputs of a CPU: IRQ, FIQ.
    pub(crate) fn outputs(&self, cpu: u64) -> [bool; 2] {
        let group = self.best(cpu).map(|(_, group, _)| group);
        [group == Some(1), group == Some(0)]
    }

    fn acknowledge(&mut self, cpu: u64, group: usize) -> u64 {
        let Some((intid, _, priority)) = self.best(cpu).filter(|(_, of, _)| *of == group) else {
            return SPURIOUS;
        };
        if let Some(interrupt) = self.interrupt(cpu, intid) {
            (interrupt.active, interrupt.latch) = (true, false);
        }
        if let Some(port) = self.ports.get_mut(&cpu) {
            port.active[group] |= 1 << (priority / STEP);
        }
        intid as u64
    }

    fn deactivate(&mut self, cpu: u64, intid: u64) {
        if let Some(interrupt) = self.interrupt(cpu, intid as usize & 0xff_ffff) {
            interrupt.active = false;
        }
    }

    fn end(&mut self, cpu: u64, group: usize, intid: u64) {
        let Some(port) = self.ports.get_mut(&cpu) else {
            return;
        };
        port.active[group] &= port.active[group].wrapping_sub(1);
        if port.control & EOI_MODE == 0 {
            self.deactivate(cpu, intid);
        }
    }

    /// A software-generated interrupt: the target list is in the value (12.2.22).
    fn generate(&mut self, cpu: u64, value: u64) {
        let others = value >> 40 & 1 != 0;
        let cluster = (value >> 16 & 0xff) << 8 | (value >> 32 & 0xff) << 16 | (value >> 48 & 0xff) << 32;
        for (id, port) in &mut self.ports {
            let aff0 = port.affinity & 0xff;
            let is_named =
                port.affinity & !0xff == cluster && aff0 >> 4 == value >> 44 & 0xf && value >> (aff0 & 0xf) & 1 != 0;
            if if others { *id != cpu } else { is_named } {
                port.private[(value >> 24 & 0xf) as usize].latch = true;
            }
        }
    }

    /// MRS of the CPU interface; an acknowledgement has its effect.
    pub(crate) fn read_register(&mut self, cpu: u64, register: u16) -> Option<u64> {
        let pending = |gic: &Self, group| match gic.best(cpu) {
            Some((intid, of, _)) if of == group => intid as u64,
            _ => SPURIOUS,
        };
        match register {
            ICC_IAR0 | ICC_IAR1 => return Some(self.acknowledge(cpu, (register == ICC_IAR1).into())),
            ICC_HPPIR0 | ICC_HPPIR1 => return Some(pending(self, (register == ICC_HPPIR1).into())),
            _ => {}
        }
        let port = self.ports.get(&cpu)?;
        Some(match register {
            icc::ICC_PMR_EL1 => port.mask.into(),
            icc::ICC_BPR0_EL1 => port.points[0],
            icc::ICC_BPR1_EL1 => port.points[1],
            icc::ICC_AP0R0_EL1 => port.active[0].into(),
            icc::ICC_AP1R0_EL1 => port.active[1].into(),
            icc::ICC_RPR_EL1 => port.running(),
            icc::ICC_CTLR_EL1 => CONTROL | port.control,
            icc::ICC_SRE_EL1 => 7,
            icc::ICC_IGRPEN0_EL1 => port.enabled[0].into(),
            icc::ICC_IGRPEN1_EL1 => port.enabled[1].into(),
            _ => return None,
        })
    }

    /// MSR of the CPU interface.
    pub(crate) fn write_register(&mut self, cpu: u64, register: u16, value: u64) -> Option<()> {
        match register {
            ICC_EOIR0 | ICC_EOIR1 => self.end(cpu, (register == ICC_EOIR1).into(), value),
            ICC_DIR => self.deactivate(cpu, value),
            ICC_SGI0R | ICC_SGI1R | ICC_ASGI1R => self.generate(cpu, value),
            _ => {
                let port = self.ports.get_mut(&cpu)?;
                match register {
                    icc::ICC_PMR_EL1 => port.mask = value as u8 & !(STEP - 1),
                    icc::ICC_BPR0_EL1 => port.points[0] = value & 7,
                    icc::ICC_BPR1_EL1 => port.points[1] = value & 7,
                    icc::ICC_AP0R0_EL1 => port.active[0] = value as u32,
                    icc::ICC_AP1R0_EL1 => port.active[1] = value as u32,
                    icc::ICC_CTLR_EL1 => port.control = value & (EOI_MODE | 1),
                    icc::ICC_SRE_EL1 => {}
                    icc::ICC_IGRPEN0_EL1 => port.enabled[0] = value & 1 != 0,
                    icc::ICC_IGRPEN1_EL1 => port.enabled[1] = value & 1 != 0,
                    _ => return None,
                }
            }
        }
        Some(())
    }

    fn place(&self, pa: u64) -> Option<Place> {
        let offset = |base: u64, size: u64| pa.checked_sub(base).filter(|offset| *offset < size);
        let redistributor =
            |(cpu, port): (&u64, &Port)| Some(Place::Redistributor(*cpu, offset(port.base, REDISTRIBUTOR_SIZE)?));
        let frame = self.frame.as_ref().and_then(|frame| offset(frame.base, FRAME_SIZE));
        let distributor = offset(self.distributor, DISTRIBUTOR_SIZE).map(Place::Distributor);
        distributor.or(frame.map(Place::Frame)).or_else(|| self.ports.iter().find_map(redistributor))
    }

    /// Whether an address is the GIC's.
    pub(crate) fn has(&self, pa: u64) -> bool {
        self.place(pa).is_some()
    }

    /// The interrupts of whom a register speaks: the CPU, the register's field, the first of them, bits for each.
    fn field(place: Place) -> Option<(Option<u64>, Field, u64, u64)> {
        let (cpu, offset) = match place {
            Place::Distributor(offset) => (None, offset),
            Place::Redistributor(cpu, offset) => (Some(cpu), offset.checked_sub(0x1_0000)?),
            Place::Frame(_) => return None,
        };
        let (base, bits, field) =
            FIELDS.into_iter().find(|(base, bits, _)| (*base..base + 128 * bits).contains(&offset))?;
        Some((cpu, field, (offset - base) * 8 / bits, bits))
    }

    /// The interrupt of a field: the distributor has no private ones, a redistributor no others.
    fn of(&mut self, cpu: Option<u64>, intid: u64) -> Option<&mut Interrupt> {
        let intid = intid as usize;
        (cpu.is_some() == (intid < PRIVATE)).then(|| self.interrupt(cpu.unwrap_or(0), intid)).flatten()
    }

    /// A load of 1 to 8 bytes.
    pub(crate) fn read(&mut self, pa: u64, len: usize) -> u64 {
        let Some(place) = self.place(pa) else {
            return 0;
        };
        let bits = 8 * len as u64;
        match Self::field(place) {
            Some((cpu, field, first, 64)) => self.of(cpu, first).map_or(0, |it| it.get(field)) >> (pa % 8 * 8),
            Some((cpu, field, first, each)) => (0..bits / each)
                .fold(0, |all, n| all | self.of(cpu, first + n).map_or(0, |it| it.get(field)) << (n * each)),
            None => self.register(place) >> (pa % 4 * 8),
        }
    }

    /// Registers of which there is one (12.8, 12.10; SBSA for the frame). TYPER of a redistributor has 64 bits.
    fn register(&self, place: Place) -> u64 {
        const REVISION_3: u64 = 3 << 4;
        match place {
            Place::Distributor(offset) => match offset & !3 {
                // DS, ARE.
                0 => u64::from(self.enabled[0]) | u64::from(self.enabled[1]) << 1 | 0x50,
                // 10 bits of INTID, 32 times 32 of them.
                4 => 9 << 19 | 31,
                0xffe8 => REVISION_3,
                _ => 0,
            },
            Place::Redistributor(cpu, offset) => {
                let Some(port) = self.ports.get(&cpu) else {
                    return 0;
                };
                let is_last = self.ports.values().all(|other| other.base <= port.base);
                let affinity = port.affinity & 0xff_ffff | port.affinity >> 32 << 24;
                match offset & !3 {
                    8 => affinity << 32 | cpu << 8 | u64::from(is_last) << 4,
                    0xc => affinity,
                    0x14 if port.asleep => 6,
                    0xffe8 => REVISION_3,
                    _ => 0,
                }
            }
            Place::Frame(8) => self.frame.as_ref().map_or(0, |frame| {
                u64::from(frame.intids.start) << 16 | u64::from(frame.intids.end - frame.intids.start)
            }),
            Place::Frame(_) => 0,
        }
    }

    /// A store of 1 to 8 bytes.
    pub(crate) fn write(&mut self, pa: u64, len: usize, value: u64) {
        let Some(place) = self.place(pa) else {
            return;
        };
        match (Self::field(place), place) {
            (Some((cpu, field, first, 64)), _) => {
                if let Some(it) = self.of(cpu, first) {
                    let (shift, mask) = (pa % 8 * 8, u64::MAX >> (64 - 8 * len as u64));
                    it.set(field, it.get(field) & !(mask << shift) | (value & mask) << shift);
                }
            }
            (Some((cpu, field, first, each)), _) => {
                for n in 0..8 * len as u64 / each {
                    if let Some(it) = self.of(cpu, first + n) {
                        it.set(field, value >> (n * each) & ((1 << each) - 1));
                    }
                }
            }
            (None, Place::Distributor(0)) => self.enabled = [value & 1 != 0, value & 2 != 0],
            (None, Place::Redistributor(cpu, 0x14)) => {
                if let Some(port) = self.ports.get_mut(&cpu) {
                    port.asleep = value & 2 != 0;
                }
            }
            (None, Place::Frame(0x40)) => {
                self.message(value as u32);
            }
            _ => {}
        }
    }

    /// All but the CPU interfaces, in a format of its own.
    pub(crate) fn save(&self) -> Vec<u8> {
        let mut all = MAGIC.to_vec();
        all.extend(self.enabled.map(u8::from));
        all.push(self.ports.len() as u8);
        for port in self.ports.values() {
            all.extend(port.affinity.to_le_bytes());
            all.push(port.asleep.into());
        }
        let private = self.ports.values().flat_map(|port| port.private.iter());
        all.extend(private.chain(&self.shared).flat_map(|it| it.to_bytes()));
        all
    }

    /// Takes what [`save`](Self::save) gave; false, and nothing changed, if it is not that of a GIC with these CPUs.
    pub(crate) fn restore(&mut self, state: &[u8]) -> bool {
        let Some((head, mut rest)) =
            state.split_at_checked(MAGIC.len() + 3).filter(|(head, _)| head.starts_with(MAGIC))
        else {
            return false;
        };
        if usize::from(head[MAGIC.len() + 2]) != self.ports.len() {
            return false;
        }
        let mut ports = self.ports.clone();
        for port in ports.values_mut() {
            let Some((one, more)) = rest.split_at_checked(9).filter(|(one, _)| one[..8] == port.affinity.to_le_bytes())
            else {
                return false;
            };
            port.asleep = one[8] != 0;
            rest = more;
        }
        let (interrupts, left) = rest.as_chunks::<10>();
        if !left.is_empty() || interrupts.len() != PRIVATE * ports.len() + self.shared.len() {
            return false;
        }
        let mut interrupts = interrupts.iter().map(|bytes| Interrupt::from_bytes(*bytes));
        for port in ports.values_mut() {
            port.private.iter_mut().zip(&mut interrupts).for_each(|(it, saved)| *it = saved);
        }
        self.shared = interrupts.collect();
        self.ports = ports;
        self.enabled = [head[MAGIC.len()] != 0, head[MAGIC.len() + 1] != 0];
        true
    }
}

const MAGIC: &[u8] = b"simulated GIC 1";
