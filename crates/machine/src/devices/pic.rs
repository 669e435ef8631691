//! The pair of 8259A interrupt controllers of a PC, as a pure state machine (Intel 8259A data sheet), with the edge/level control registers
//! of EISA (ports 4d0h and 4d1h), for accelerators that have no PIC of their own.
//!
//! The second controller hangs at line 2 of the first. Whoever owns the pair drives its lines, watches [`PicPair::output`] (the CPU's
//! INTR, or LINT0 of the first local APIC) and fetches the vector by [`PicPair::acknowledge`]. It must never panic on what a guest writes.

/// Command and data port of the first controller.
pub const FIRST_PORT: u16 = 0x20;
/// Command and data port of the second controller.
pub const SECOND_PORT: u16 = 0xa0;
/// Ports of each.
pub const PIC_LEN: u16 = 2;
/// The edge/level control registers, one port for each controller.
pub const ELCR_PORT: u16 = 0x4d0;
/// The line of the first controller at which the second hangs.
const CASCADE: u8 = 2;
/// Lines that can be level triggered: not the timer, the keyboard, the cascade, the clock and the coprocessor.
const ELCR_BITS: [u8; 2] = [0xf8, 0xde];

/// What the next write to the data port is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Expect {
    /// The interrupt mask (OCW1).
    #[default]
    Mask,
    /// ICW2: the vector base.
    Vector,
    /// ICW3: the cascade.
    Cascade,
    /// ICW4: modes.
    Modes,
}

/// One 8259A.
#[derive(Debug, Clone, Default)]
struct Chip {
    /// Requests: an edge came, or a level is there.
    irr: u8,
    /// In service.
    isr: u8,
    /// Mask.
    imr: u8,
    /// Levels of the lines.
    lines: u8,
    /// Level-triggered lines.
    elcr: u8,
    /// ICW1's LTIM: all lines level triggered.
    all_level: bool,
    vector: u8,
    expect: Expect,
    /// ICW1 announced ICW3, ICW4.
    cascaded: bool,
    wants_modes: bool,
    /// The line with the highest priority.
    first: u8,
    read_isr: bool,
    poll: bool,
    special_mask: bool,
    special_nested: bool,
    auto_eoi: bool,
    rotate_on_auto_eoi: bool,
}

impl Chip {
    fn level_lines(&self) -> u8 {
        if self.all_level { 0xff } else { self.elcr }
    }

    fn set_line(&mut self, line: u8, level: bool) {
        let bit = 1 << line;
        let rising = level && self.lines & bit == 0;
        self.lines = if level { self.lines | bit } else { self.lines & !bit };
        if self.level_lines() & bit != 0 {
            self.irr = if level { self.irr | bit } else { self.irr & !bit };
        } else if rising {
            // A request stays until it is acknowledged even if the line goes down again before: sources here pulse.
            self.irr |= bit;
        }
    }

    /// How far a line is from the highest priority; the nearest of a set is the one that counts.
    fn nearest(&self, set: u8) -> Option<u8> {
        (set != 0).then(|| set.rotate_right(self.first.into()).trailing_zeros() as u8)
    }

    /// The line that the output stands for.
    fn pending(&self) -> Option<u8> {
        let request = self.nearest(self.irr & !self.imr)?;
        let mut served = self.isr;
        if self.special_mask {
            served &= !self.imr;
        }
        if self.special_nested {
            served &= !(1 << CASCADE);
        }
        let blocked = self.nearest(served).is_some_and(|service| service <= request);
        (!blocked).then_some((request + self.first) & 7)
    }

    /// INTA for `line`.
    fn acknowledge(&mut self, line: u8) {
        let bit = 1 << line;
        if self.level_lines() & bit == 0 {
            self.irr &= !bit;
        }
        if !self.auto_eoi {
            self.isr |= bit;
        } else if self.rotate_on_auto_eoi {
            self.first = (line + 1) & 7;
        }
    }

    fn write_command(&mut self, value: u8) {
        if value & 0x10 != 0 {
            self.initialize(value);
        } else if value & 0x08 != 0 {
            // OCW3
            self.poll = value & 4 != 0;
            if value & 2 != 0 {
                self.read_isr = value & 1 != 0;
            }
            if value & 0x40 != 0 {
                self.special_mask = value & 0x20 != 0;
            }
        } else {
            self.end(value);
        }
    }

    /// ICW1: edges are forgotten, everything else begins anew.
    fn initialize(&mut self, value: u8) {
        let fresh = Self { lines: self.lines, elcr: self.elcr, vector: self.vector, ..Self::default() };
        *self = Self {
            all_level: value & 8 != 0,
            cascaded: value & 2 == 0,
            wants_modes: value & 1 != 0,
            expect: Expect::Vector,
            ..fresh
        };
        self.irr = self.lines & self.level_lines();
    }

    /// OCW2: ends of interrupts and rotation.
    fn end(&mut self, value: u8) {
        let (rotate, specific, eoi) = (value & 0x80 != 0, value & 0x40 != 0, value & 0x20 != 0);
        let line = match (specific, eoi) {
            (true, _) => Some(value & 7),
            (false, true) => {
                let served = if self.special_mask { self.isr & !self.imr } else { self.isr };
                self.nearest(served).map(|nearest| (nearest + self.first) & 7)
            }
            (false, false) => {
                self.rotate_on_auto_eoi = rotate;
                None
            }
        };
        if let Some(line) = line {
            if eoi {
                self.isr &= !(1 << line);
            }
            if rotate {
                self.first = (line + 1) & 7;
            }
        }
    }

    fn write_data(&mut self, value: u8) {
        self.expect = match self.expect {
            Expect::Mask => {
                self.imr = value;
                Expect::Mask
            }
            Expect::Vector => {
                self.vector = value & 0xf8;
                match (self.cascaded, self.wants_modes) {
                    (true, _) => Expect::Cascade,
                    (false, true) => Expect::Modes,
                    (false, false) => Expect::Mask,
                }
            }
            Expect::Cascade if self.wants_modes => Expect::Modes,
            Expect::Cascade => Expect::Mask,
            Expect::Modes => {
                self.special_nested = value & 0x10 != 0;
                self.auto_eoi = value & 2 != 0;
                Expect::Mask
            }
        };
    }

    fn read(&mut self, data_port: bool) -> u8 {
        if std::mem::take(&mut self.poll) {
            // "Poll Command": the next read is an acknowledge.
            return self.pending().map_or(0, |line| {
                self.acknowledge(line);
                0x80 | line
            });
        }
        match (data_port, self.read_isr) {
            (true, _) => self.imr,
            (false, true) => self.isr,
            (false, false) => self.irr,
        }
    }
}

/// The two controllers of a PC, with lines 0 to 15.
#[derive(Debug, Clone, Default)]
pub struct PicPair {
    chips: [Chip; 2],
}

impl PicPair {
    /// The pair after power-up: nothing pending, no vectors set.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Which controller a port belongs to, and whether it is the data port.
    fn chip(port: u16) -> Option<(usize, bool)> {
        match port {
            0x20 | 0x21 => Some((0, port & 1 != 0)),
            0xa0 | 0xa1 => Some((1, port & 1 != 0)),
            _ => None,
        }
    }

    /// IN from one of the ports; all ones from any other.
    pub fn read(&mut self, port: u16) -> u8 {
        let value = match (Self::chip(port), port.wrapping_sub(ELCR_PORT)) {
            (Some((chip, data)), _) => self.chips[chip].read(data),
            (None, chip @ (0 | 1)) => self.chips[usize::from(chip)].elcr,
            _ => 0xff,
        };
        self.cascade();
        value
    }

    /// OUT to one of the ports; any other is ignored.
    pub fn write(&mut self, port: u16, value: u8) {
        match (Self::chip(port), port.wrapping_sub(ELCR_PORT)) {
            (Some((chip, true)), _) => self.chips[chip].write_data(value),
            (Some((chip, false)), _) => self.chips[chip].write_command(value),
            (None, number @ (0 | 1)) => {
                let number = usize::from(number);
                self.chips[number].elcr = value & ELCR_BITS[number];
            }
            _ => {}
        }
        self.cascade();
    }

    /// Drives line 0 to 15; line 2 and lines beyond are ignored.
    pub fn set_irq(&mut self, line: u8, level: bool) {
        match line {
            CASCADE => {}
            0..8 => self.chips[0].set_line(line, level),
            8..16 => self.chips[1].set_line(line - 8, level),
            _ => {}
        }
        self.cascade();
    }

    /// Carries the second controller's output to the first's line 2.
    fn cascade(&mut self) {
        let output = self.chips[1].pending().is_some();
        self.chips[0].set_line(CASCADE, output);
        if !output {
            // The second took its request back (masked, ended): unlike a device it keeps its line up until it is served.
            self.chips[0].irr &= !(1 << CASCADE);
        }
    }

    /// The output: an interrupt wants to be delivered.
    #[must_use]
    pub fn output(&self) -> bool {
        self.chips[0].pending().is_some()
    }

    /// The CPU acknowledges: answers the vector. If the request went away meanwhile it is the spurious one, line 7 of the controller in question,
    /// which is then not in service.
    pub fn acknowledge(&mut self) -> u8 {
        const SPURIOUS: u8 = 7;
        let line = self.chips[0].pending();
        if let Some(line) = line {
            self.chips[0].acknowledge(line);
        }
        let vector = if line == Some(CASCADE) {
            let line = self.chips[1].pending();
            if let Some(line) = line {
                self.chips[1].acknowledge(line);
                // The second drops its output during INTA and raises it again if it has more: that is a new edge.
                self.chips[0].set_line(CASCADE, false);
            }
            self.chips[1].vector | line.unwrap_or(SPURIOUS)
        } else {
            self.chips[0].vector | line.unwrap_or(SPURIOUS)
        };
        self.cascade();
        vector
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Initialised as BIOS and Linux do: vectors 30h and 38h, nothing masked.
    fn pair() -> PicPair {
        let mut pic = PicPair::new();
        for (port, vector, cascade) in [(FIRST_PORT, 0x30, 4), (SECOND_PORT, 0x38, 2)] {
            pic.write(port, 0x11);
            for value in [vector, cascade, 0x01, 0x00] {
                pic.write(port + 1, value);
            }
        }
        pic
    }

    fn eoi(pic: &mut PicPair, line: u8) {
        if line >= 8 {
            pic.write(SECOND_PORT, 0x20);
        }
        pic.write(FIRST_PORT, 0x20);
    }

    #[test]
    fn lines_come_in_priority_order_and_nest() {
        let mut pic = pair();
        pic.set_irq(4, true);
        assert_eq!(pic.acknowledge(), 0x34);
        pic.set_irq(6, true);
        assert!(!pic.output(), "a lower one waits");
        pic.set_irq(1, true);
        assert_eq!(pic.acknowledge(), 0x31, "a higher one nests");
        eoi(&mut pic, 1);
        assert!(!pic.output());
        eoi(&mut pic, 4);
        assert_eq!(pic.acknowledge(), 0x36);
    }

    #[test]
    fn the_second_controller_is_between_lines_1_and_3_of_the_first() {
        let mut pic = pair();
        for line in [3, 8, 15] {
            pic.set_irq(line, true);
        }
        assert_eq!(pic.acknowledge(), 0x38);
        assert!(!pic.output());
        eoi(&mut pic, 8);
        assert_eq!(pic.acknowledge(), 0x3f);
        eoi(&mut pic, 15);
        assert_eq!(pic.acknowledge(), 0x33);
    }

    #[test]
    fn an_edge_counts_once_and_needs_a_new_one() {
        let mut pic = pair();
        pic.set_irq(5, true);
        assert_eq!(pic.acknowledge(), 0x35);
        eoi(&mut pic, 5);
        assert!(!pic.output());
        pic.set_irq(5, false);
        pic.set_irq(5, true);
        pic.set_irq(5, false);
        assert_eq!(pic.acknowledge(), 0x35, "a pulse is enough");
    }

    #[test]
    fn a_level_comes_again_until_it_is_gone() {
        let mut pic = pair();
        pic.write(ELCR_PORT, 0xff);
        pic.write(ELCR_PORT + 1, 0xff);
        assert_eq!((pic.read(ELCR_PORT), pic.read(ELCR_PORT + 1)), (0xf8, 0xde));
        for (line, vector) in [(5, 0x35), (11, 0x3b)] {
            pic.set_irq(line, true);
            assert_eq!(pic.acknowledge(), vector);
            assert!(!pic.output());
            eoi(&mut pic, line);
            assert_eq!(pic.acknowledge(), vector);
            pic.set_irq(line, false);
            eoi(&mut pic, line);
            assert!(!pic.output());
        }
    }

    #[test]
    fn what_goes_away_before_its_acknowledge_is_spurious_and_not_in_service() {
        let mut pic = pair();
        assert_eq!(pic.acknowledge(), 0x37);
        pic.write(FIRST_PORT, 0x0b);
        assert_eq!(pic.read(FIRST_PORT), 0);
        pic.set_irq(5, true);
        pic.write(FIRST_PORT + 1, 0x20);
        assert!(!pic.output());
        assert_eq!(pic.acknowledge(), 0x37);
        pic.write(FIRST_PORT + 1, 0);
        assert_eq!(pic.acknowledge(), 0x35, "the mask only held it back");
    }

    #[test]
    fn masking_in_the_second_takes_the_request_back_from_the_first() {
        let mut pic = pair();
        pic.set_irq(12, true);
        assert!(pic.output());
        pic.write(SECOND_PORT + 1, 0x10);
        assert!(!pic.output());
        pic.write(SECOND_PORT + 1, 0);
        assert_eq!(pic.acknowledge(), 0x3c);
    }

    #[test]
    fn registers_are_read_as_ocw3_chose() {
        let mut pic = pair();
        pic.set_irq(3, true);
        pic.set_irq(6, true);
        assert_eq!(pic.acknowledge(), 0x33);
        assert_eq!(pic.read(FIRST_PORT), 0x40);
        pic.write(FIRST_PORT, 0x0b);
        assert_eq!(pic.read(FIRST_PORT), 0x08);
        pic.write(FIRST_PORT, 0x0a);
        assert_eq!(pic.read(FIRST_PORT), 0x40);
        pic.write(FIRST_PORT + 1, 0xa5);
        assert_eq!(pic.read(FIRST_PORT + 1), 0xa5);
    }

    #[test]
    fn a_specific_end_ends_that_line_only() {
        let mut pic = pair();
        pic.set_irq(5, true);
        assert_eq!(pic.acknowledge(), 0x35);
        pic.set_irq(1, true);
        assert_eq!(pic.acknowledge(), 0x31);
        pic.write(FIRST_PORT, 0x65);
        pic.write(FIRST_PORT, 0x0b);
        assert_eq!(pic.read(FIRST_PORT), 0x02);
    }

    #[test]
    fn rotation_moves_the_lowest_priority() {
        let mut pic = pair();
        pic.set_irq(3, true);
        assert_eq!(pic.acknowledge(), 0x33);
        pic.write(FIRST_PORT, 0xa0);
        pic.set_irq(3, false);
        pic.set_irq(3, true);
        pic.set_irq(4, true);
        assert_eq!(pic.acknowledge(), 0x34, "line 3 is now the last");
        eoi(&mut pic, 4);
        assert_eq!(pic.acknowledge(), 0x33);
        eoi(&mut pic, 3);
        pic.write(FIRST_PORT, 0xc5);
        pic.set_irq(6, true);
        pic.set_irq(1, true);
        assert_eq!(pic.acknowledge(), 0x36, "set priority: line 5 is the last");
    }

    #[test]
    fn automatic_end_leaves_nothing_in_service() {
        let mut pic = pair();
        pic.write(FIRST_PORT, 0x11);
        for value in [0x30, 4, 0x03, 0] {
            pic.write(FIRST_PORT + 1, value);
        }
        pic.set_irq(4, true);
        assert_eq!(pic.acknowledge(), 0x34);
        pic.set_irq(7, true);
        assert_eq!(pic.acknowledge(), 0x37);
    }

    #[test]
    fn special_mask_mode_lets_lower_lines_through_a_masked_service() {
        let mut pic = pair();
        pic.set_irq(1, true);
        assert_eq!(pic.acknowledge(), 0x31);
        pic.set_irq(6, true);
        pic.write(FIRST_PORT, 0x68);
        assert!(!pic.output());
        pic.write(FIRST_PORT + 1, 0x02);
        assert_eq!(pic.acknowledge(), 0x36);
    }

    #[test]
    fn special_fully_nested_mode_lets_the_second_nest_in_itself() {
        let mut pic = pair();
        pic.write(FIRST_PORT, 0x11);
        for value in [0x30, 4, 0x11, 0] {
            pic.write(FIRST_PORT + 1, value);
        }
        pic.set_irq(12, true);
        assert_eq!(pic.acknowledge(), 0x3c);
        pic.set_irq(9, true);
        assert_eq!(pic.acknowledge(), 0x39);
    }

    #[test]
    fn polling_acknowledges() {
        let mut pic = pair();
        pic.set_irq(5, true);
        pic.write(FIRST_PORT, 0x0c);
        assert_eq!(pic.read(FIRST_PORT), 0x85);
        pic.write(FIRST_PORT, 0x0c);
        assert_eq!(pic.read(FIRST_PORT), 0);
        pic.write(FIRST_PORT, 0x0b);
        assert_eq!(pic.read(FIRST_PORT), 0x20);
    }

    #[test]
    fn initialising_forgets_edges_but_not_levels() {
        let mut pic = pair();
        pic.write(ELCR_PORT, 0x20);
        pic.set_irq(4, true);
        pic.set_irq(5, true);
        pic.write(FIRST_PORT, 0x11);
        for value in [0x40, 4, 1] {
            pic.write(FIRST_PORT + 1, value);
        }
        assert_eq!(pic.acknowledge(), 0x45);
        eoi(&mut pic, 5);
        pic.set_irq(5, false);
        assert!(!pic.output());
    }

    #[test]
    fn any_sequence_of_accesses_is_survived() {
        let mut pic = pair();
        let mut seed = 7u32;
        for _ in 0..200_000 {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let (what, value) = (seed >> 24, (seed >> 16) as u8);
            let port = [0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x4d1, 0x80][what as usize % 7];
            match what >> 3 & 3 {
                0 => pic.write(port, value),
                1 => {
                    pic.read(port);
                }
                2 => pic.set_irq(value & 31, value & 0x20 != 0),
                _ => {
                    let output = pic.output();
                    let vector = pic.acknowledge();
                    assert!(output || vector & 7 == 7);
                }
            }
        }
    }
}
