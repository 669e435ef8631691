//! Random numbers as instructions like them: corner cases as often as noise. Everything depends on the seed only.

/// SplitMix64.
#[derive(Debug, Clone)]
pub(crate) struct Random(u64);

impl Random {
    /// Number `index` of the generators that belong to a seed.
    pub(crate) fn new(seed: u64, index: u64) -> Self {
        let mut random = Random(seed ^ index.wrapping_mul(0xd134_2543_de82_ef95));
        random.0 = random.next();
        random
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    pub(crate) fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 11) % n
    }

    pub(crate) fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    pub(crate) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    /// A register.
    pub(crate) fn integer(&mut self) -> u64 {
        match self.below(8) {
            0 => self.below(4).wrapping_sub(2),
            1 => 1 << self.below(64),
            2 => (1u64 << self.below(64)).wrapping_sub(1),
            3 => self.below(256),
            4 => self.next() as i32 as u64,
            5 => self.pick(&[0x7f, 0x80, 0x7fff, 0x8000, 0x7fff_ffff, 0x8000_0000, i64::MAX as u64, 1 << 63]),
            _ => self.next(),
        }
    }

    /// A significand: few bits, runs of bits, or noise.
    fn significand(&mut self) -> u64 {
        match self.below(8) {
            0 => 0,
            1 => !0,
            2 => 1 << self.below(64),
            3 => !0 << self.below(64),
            4 => (1 << self.below(64)) - 1,
            5 => 1 << self.below(64) | 1 << self.below(64),
            6 => self.next() << self.below(64),
            _ => self.next(),
        }
    }

    /// A biased exponent: often at an end or near one half.
    fn exponent(&mut self, special: u64) -> u64 {
        match self.below(6) {
            0 => self.below(3),
            1 => special - self.below(3),
            2 | 3 => special / 2 + self.below(8) - 4,
            4 => (special / 2 + self.below(140)).saturating_sub(70).min(special),
            _ => self.below(special + 1),
        }
    }

    pub(crate) fn single(&mut self) -> u32 {
        self.next() as u32 & 1 << 31 | (self.exponent(255) as u32) << 23 | (self.significand() >> 41) as u32
    }

    pub(crate) fn double(&mut self) -> u64 {
        self.next() & 1 << 63 | self.exponent(2047) << 52 | self.significand() >> 12
    }

    /// Sign and exponent above the significand; sometimes an encoding that is not supported.
    pub(crate) fn extended(&mut self) -> u128 {
        let exponent = self.exponent(0x7fff);
        let significand = self.significand();
        let significand = match exponent {
            _ if self.one_in(32) => significand,
            0 => significand >> 1,
            _ => significand | 1 << 63,
        };
        u128::from(exponent | (self.next() & 1) << 15) << 64 | u128::from(significand)
    }

    /// 16 bytes that make sense as something: numbers of some format, characters, packed decimals.
    pub(crate) fn vector(&mut self) -> u128 {
        match self.below(8) {
            0 => (0..4).fold(0, |v, _| v << 32 | u128::from(self.single())),
            1 => (0..2).fold(0, |v, _| v << 64 | u128::from(self.double())),
            2 => u128::from(self.significand()) << 64 | u128::from(self.significand()),
            3 => self.extended(),
            4 => (0..18).fold(u128::from(self.next() & 1), |v, _| v << 4 | u128::from(self.below(10))),
            // Few distinct bytes: strings match, comparisons are equal.
            5 => {
                u128::from(self.next() & 0x0303_0303_0303_0303) << 64 | u128::from(self.next() & 0x0303_0303_0303_0303)
            }
            _ => u128::from(self.next()) << 64 | u128::from(self.next()),
        }
    }
}
