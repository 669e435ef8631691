//! Sequence after sequence: made, executed by both sides, compared.

use crate::generate;
use crate::guest::Guest;
use crate::machine::{Outcome, Sequence};
use crate::native::Native;
use crate::random::Random;
use crate::{Class, Count, compare};

/// How often the host runs a sequence that came out differently.
const HOST_RUNS: usize = 3;

/// A comparison of the software CPU with the processor that this process runs on. One at a time exists in a process; another
/// thread's waits.
pub struct Differential {
    native: Native,
    guest: Guest,
    seed: u64,
    amd: bool,
    counts: [Count; Class::ALL.len()],
    forms: Vec<bool>,
}

impl std::fmt::Debug for Differential {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Differential").field("seed", &self.seed).field("counts", &self.counts).finish_non_exhaustive()
    }
}

impl Differential {
    /// Sequences that depend on `seed` only.
    ///
    /// # Errors
    /// In words, if the host gives no executable memory at the addresses that are needed, or cannot be the judge at all.
    pub fn new(seed: u64) -> Result<Self, String> {
        let amd = std::fs::read_to_string("/proc/cpuinfo").is_ok_and(|text| text.contains("AuthenticAMD"));
        Ok(Self {
            native: Native::new()?,
            guest: Guest::new(),
            seed,
            amd,
            counts: Default::default(),
            forms: vec![false; iced_x86::Code::values().len()],
        })
    }

    /// Makes and compares sequence `index` of a class. A text says what differed: seed, class and index bring it back.
    pub fn run(&mut self, class: Class, index: u64) -> Option<String> {
        let mut random = Random::new(self.seed, index << 3 | class as u64);
        let sequence = generate::sequence(&mut random, &mut self.guest, class, self.amd);
        let stepped = self.guest.state();
        let ours = self.guest.run(&sequence);
        let mut host = self.native.run(&sequence);
        if let Ok(ours) = &ours {
            // A task switch in the middle makes AMD's processors forget the x87's pointers. What differs must differ again.
            for _ in 1..HOST_RUNS {
                if compare::differences(&sequence, ours, &host, self.amd).is_empty() {
                    break;
                }
                host = self.native.run(&sequence);
            }
        }
        let wrong = match ours {
            Err(what) => {
                // Whatever it waits for now is not the next sequence's.
                self.guest = Guest::new();
                vec![what]
            }
            Ok(ours) => {
                // The same instructions one by one, outside the block cache, must have led to the same state.
                let single =
                    Outcome { state: crate::machine::State { rip: ours.state.rip, ..stepped }, ..ours.clone() };
                let mut wrong = compare::differences(&sequence, &ours, &single, false);
                wrong.iter_mut().for_each(|what| what.insert_str(0, "one by one instead of the host: "));
                wrong.extend(compare::differences(&sequence, &ours, &host, self.amd));
                wrong
            }
        };
        let count = &mut self.counts[class as usize];
        count.sequences += 1;
        count.instructions += sequence.executed.len() as u64;
        count.faults += u64::from(host.fault.is_some());
        for insn in generate::instructions(&sequence) {
            self.forms[insn.code() as usize] = true;
        }
        if wrong.is_empty() {
            return None;
        }
        count.mismatches += 1;
        let mut text = format!("seed {} class {} index {index}: ", self.seed, class.name());
        text += &wrong.join("; ");
        text.push('\n');
        text += &compare::describe(&sequence);
        text += &self.shorter(&sequence);
        Some(text)
    }

    /// How many of the first instructions are needed for a difference, which is what one looks for first.
    fn shorter(&mut self, sequence: &Sequence) -> String {
        for count in 1..sequence.executed.len() {
            let (at, len) = sequence.executed[count - 1];
            let mut cut = sequence.clone();
            cut.code.truncate(at + len);
            cut.executed.truncate(count);
            // Flags are not known here.
            cut.undefined = u64::MAX;
            let Ok(ours) = self.guest.run(&cut) else { continue };
            let host = self.native.run(&cut);
            let wrong = compare::differences(&cut, &ours, &host, self.amd);
            if !wrong.is_empty() {
                return format!("  after {count}: {}\n", wrong.join("; "));
            }
        }
        String::new()
    }

    /// What was compared of a class.
    #[must_use]
    pub fn count(&self, class: Class) -> Count {
        self.counts[class as usize]
    }

    /// Different instruction forms (operation and kinds of operands) that were executed.
    #[must_use]
    pub fn forms(&self) -> usize {
        self.forms.iter().filter(|seen| **seen).count()
    }
}
