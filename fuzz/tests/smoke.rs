//! Every target over its seeds and over damaged copies of them, without libFuzzer.
//!
//! `VM_ACCEL_FUZZ_RUNS` changes how many copies per target.

use vm_accel_fuzz::mutate::Mutator;
use vm_accel_fuzz::targets;

const RUNS: u64 = 1_000;

#[test]
fn every_target_stands_damaged_inputs() {
    let runs = std::env::var("VM_ACCEL_FUZZ_RUNS")
        .map_or(RUNS, |runs| runs.parse().expect("a number of runs"));
    for target in targets() {
        let seeds = (target.seeds)();
        assert!(!seeds.is_empty(), "{} has no seed", target.name);
        seeds.iter().for_each(|seed| (target.run)(seed));
        for run in 0..runs {
            // A generator per input, so that one number in a message is enough to get it back.
            let input = Mutator::new(run).damaged(&seeds);
            let outcome = std::panic::catch_unwind(|| (target.run)(&input));
            assert!(
                outcome.is_ok(),
                "{} failed on Mutator::new({run}): {input:02x?}",
                target.name
            );
        }
    }
}
