//! Interrupt messages: what travels between local APICs, I/O APICs and devices with MSI.

/// How an interrupt is delivered (SDM volume 3A, "Local Vector Table" and "Interrupt Command Register").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeliveryMode {
    /// To every CPU of the destination, with a vector.
    Fixed,
    /// To the one of the destination's CPUs that has the lowest priority, with a vector.
    LowestPriority,
    /// System management interrupt.
    Smi,
    /// Non-maskable interrupt.
    Nmi,
    /// INIT.
    Init,
    /// Start-up IPI; the vector is the page to start at.
    StartUp,
    /// The vector comes from an 8259A.
    ExtInt,
    /// Not defined.
    Reserved,
}

impl DeliveryMode {
    /// From the three bits of ICR, a local vector, a redirection entry or an MSI.
    #[must_use]
    pub fn from_bits(bits: u8) -> Self {
        match bits & 7 {
            0 => Self::Fixed,
            1 => Self::LowestPriority,
            2 => Self::Smi,
            4 => Self::Nmi,
            5 => Self::Init,
            6 => Self::StartUp,
            7 => Self::ExtInt,
            _ => Self::Reserved,
        }
    }

    /// The three bits.
    #[must_use]
    pub fn bits(self) -> u8 {
        match self {
            Self::Fixed => 0,
            Self::LowestPriority => 1,
            Self::Smi => 2,
            Self::Reserved => 3,
            Self::Nmi => 4,
            Self::Init => 5,
            Self::StartUp => 6,
            Self::ExtInt => 7,
        }
    }
}

/// Whom a message is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Destination {
    /// The CPU with this APIC ID.
    Physical(u32),
    /// The CPUs whose logical destination has these bits, as their model says.
    Logical(u32),
}

impl Destination {
    /// Every CPU, in both kinds of destination.
    pub const BROADCAST: u32 = u32::MAX;

    /// The eight bits that xAPICs, I/O APICs and MSIs have: FFH is everyone.
    #[must_use]
    pub fn widen(id: u8) -> u32 {
        if id == 0xff { Self::BROADCAST } else { u32::from(id) }
    }
}

/// An interrupt on its way to CPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message {
    /// Whom it is for.
    pub destination: Destination,
    /// How it is delivered.
    pub mode: DeliveryMode,
    /// The vector, for the modes that have one.
    pub vector: u8,
    /// Level triggered: the end of the interrupt is told to the I/O APICs.
    pub level: bool,
}

impl Message {
    /// The message that an MSI write to `address` (FEExxxxxH) with `data` means (SDM volume 3A, "Message Signalled Interrupts").
    #[must_use]
    pub fn from_msi(address: u64, data: u32) -> Self {
        let id = Destination::widen((address >> 12) as u8);
        Self {
            destination: if address & 4 != 0 { Destination::Logical(id) } else { Destination::Physical(id) },
            mode: DeliveryMode::from_bits((data >> 8) as u8),
            vector: data as u8,
            level: data & 1 << 15 != 0,
        }
    }
}

/// A destination that needs no number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shorthand {
    /// Use the message's destination.
    None,
    /// The sender.
    OnlySelf,
    /// Every CPU.
    AllIncludingSelf,
    /// Every CPU but the sender.
    AllExcludingSelf,
}

impl Shorthand {
    pub(super) fn from_bits(bits: u8) -> Self {
        match bits & 3 {
            0 => Self::None,
            1 => Self::OnlySelf,
            2 => Self::AllIncludingSelf,
            _ => Self::AllExcludingSelf,
        }
    }
}

/// An interprocessor interrupt for the machine to carry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ipi {
    /// If this is not `None`, the message's destination does not count.
    pub shorthand: Shorthand,
    /// What is sent.
    pub message: Message,
}

/// What the CPU itself must do with an interrupt that its APIC took.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Reception {
    /// Nothing.
    Ignored,
    /// Something is requested: look at [`Apic::pending`](super::Apic::pending), wake from HLT.
    Interrupt,
    /// Take an NMI.
    Nmi,
    /// Take an SMI.
    Smi,
    /// Reset ([`Apic::init`](super::Apic::init) is part of it) and wait for a start-up IPI.
    Init,
    /// If waiting for it, start in real mode at this number times 4096.
    StartUp(u8),
    /// Take an interrupt whose vector the 8259A gives.
    ExtInt,
}
