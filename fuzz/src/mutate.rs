//! A small deterministic mutator for runs without libFuzzer: the same seed gives the same inputs everywhere.

/// Values that break arithmetic more often than random ones.
const EDGES: &[u64] = &[
    0,
    1,
    0x7f,
    0x80,
    0xff,
    0xfff,
    0x1000,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    1 << 32,
    1 << 52,
    u64::MAX,
];

/// Makes damaged copies of inputs.
#[derive(Debug, Clone)]
pub struct Mutator {
    state: u64,
}

impl Mutator {
    /// A mutator whose inputs depend on `seed` only.
    pub fn new(seed: u64) -> Self {
        Self { state: seed }
    }

    /// SplitMix64.
    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.state ^ (self.state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `limit`, which is not 0.
    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    /// A copy of one of `seeds` with a few changes.
    pub fn damaged(&mut self, seeds: &[Vec<u8>]) -> Vec<u8> {
        let mut input = seeds[self.below(seeds.len())].clone();
        for _ in 0..=self.below(6) {
            if input.is_empty() {
                break;
            }
            // Headers matter more than what they describe.
            let reach = if self.below(2) == 0 {
                input.len().min(0x280)
            } else {
                input.len()
            };
            let at = self.below(reach);
            match self.below(8) {
                0 => input.truncate(at),
                1 => input[at] ^= 1 << self.below(8),
                2 => {
                    let end = (at + self.below(64)).min(input.len());
                    input.drain(at..end);
                }
                3 => {
                    let other = &seeds[self.below(seeds.len())];
                    let from = self.below(other.len());
                    let end = (from + self.below(256)).min(other.len());
                    let count = (end - from).min(input.len() - at);
                    input[at..at + count].copy_from_slice(&other[from..from + count]);
                }
                _ => {
                    let edge = EDGES[self.below(EDGES.len())];
                    let value = match self.below(4) {
                        0 => self.next(),
                        1 => edge.wrapping_neg(),
                        2 => edge.wrapping_add(self.next() % 32),
                        _ => edge,
                    };
                    let count = (1 << self.below(4)).min(input.len() - at);
                    // Fields are aligned, most of the time.
                    let at = if self.below(4) > 0 {
                        at & !(count - 1)
                    } else {
                        at
                    };
                    let count = count.min(input.len() - at);
                    input[at..at + count].copy_from_slice(&value.to_le_bytes()[..count]);
                }
            }
        }
        input
    }
}
