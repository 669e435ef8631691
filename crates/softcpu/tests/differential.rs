//! The software CPU against the processor that the tests run on: a few thousand random sequences of each class. `cargo xtask diff` runs as
//! many as one likes. `SOFTCPU_SEED` and `SOFTCPU_SEQUENCES` in the environment look elsewhere and further.

use vm_accel_difftest::{Class, Differential};

/// Sequences of each class.
const SEQUENCES: u64 = 2_000;
/// Instruction forms that so many sequences must reach.
const FORMS: usize = 900;

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().expect("a number"))
}

#[test]
fn random_sequences_match_the_host() {
    let mut differential = match Differential::new(setting("SOFTCPU_SEED", 1)) {
        Ok(differential) => differential,
        Err(why) => {
            eprintln!("skipped: {why}");
            return;
        }
    };
    let sequences = setting("SOFTCPU_SEQUENCES", SEQUENCES);
    for class in Class::ALL {
        let wrong: Vec<String> = (0..sequences).filter_map(|index| differential.run(class, index)).take(5).collect();
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
        let count = differential.count(class);
        assert_eq!(count.sequences, sequences);
        assert!(count.instructions >= sequences, "{class:?}: only {count:?}");
        assert!((count.faults > sequences / 2) == (class == Class::Fault), "{class:?}: {count:?}");
    }
    assert!(differential.forms() >= FORMS || sequences < SEQUENCES, "only {} forms", differential.forms());
}
