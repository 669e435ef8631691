//! The fuzz target `cpu` without a fuzzer: its seeds, damaged copies of them, and noise. The same inputs on every run;
//! `SOFTCPU_FUZZ_RUNS` and `SOFTCPU_FUZZ_SEED` in the environment look further and elsewhere.

mod harness;

/// Inputs of each kind.
const RUNS: u64 = 4_000;
/// Bytes on both sides of each piece of RAM that must stay as they are.
const PADDING: usize = 4096;

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().expect("a number"))
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
}

fn run(input: &[u8], what: &str) {
    let outcome = std::panic::catch_unwind(|| harness::run(input, PADDING));
    assert!(outcome.is_ok(), "{what}: {input:02x?}");
}

#[test]
fn seeds_run() {
    for (index, seed) in harness::seeds().iter().enumerate() {
        run(seed, &format!("seed {index}"));
    }
}

#[test]
fn damaged_seeds_do_no_harm() {
    let seeds = harness::seeds();
    for index in 0..setting("SOFTCPU_FUZZ_RUNS", RUNS) {
        let mut random = Random(setting("SOFTCPU_FUZZ_SEED", 1) << 32 | index);
        let mut input = seeds[random.below(seeds.len())].clone();
        for _ in 0..=random.below(8) {
            let at = random.below(input.len());
            match random.below(4) {
                0 => input[at] ^= 1 << random.below(8),
                1 => input[at] = random.next() as u8,
                2 => input.insert(at, random.next() as u8),
                _ => input.extend_from_slice(&seeds[random.below(seeds.len())][29..]),
            }
        }
        run(&input, &format!("damaged seed {index}"));
    }
}

#[test]
fn noise_does_no_harm() {
    for index in 0..setting("SOFTCPU_FUZZ_RUNS", RUNS) {
        let mut random = Random(setting("SOFTCPU_FUZZ_SEED", 1) << 32 | 1 << 31 | index);
        let input: Vec<u8> = (0..random.below(400)).map(|_| random.next() as u8).collect();
        run(&input, &format!("noise {index}"));
    }
}
