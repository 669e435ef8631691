//! `cargo xtask diff`: random user-mode instruction sequences on the software CPU and on the host processor, for as long as one likes.

use crate::Usage;
use anyhow::{Result, anyhow};
use std::str::FromStr;
use std::time::{Duration, Instant};
use vm_accel_difftest::{Class, Count, Differential};

pub(crate) const COMMAND: crate::Command = crate::Command {
    name: "diff",
    summary: "compare the software CPU with the host processor on random instructions",
    usage: "\
Usage: cargo xtask diff --seconds N [--seed S] [--class NAME] [--from INDEX] [--count N]

Runs random sequences of user-mode instructions on the software CPU and on this processor (Linux on x86-64 only) and
compares registers, flags, memory, x87, MXCSR, XMM registers and exceptions. Status 1 if any differs.

  --seconds N    stop after that time (default 60)
  --seed S       other sequences (default 1)
  --class NAME   only integer, stack, string, simd, sse-float, x87, fault or mixed
  --from INDEX   begin with this sequence of each class
  --count N      stop after so many sequences of each class

For long runs build it optimised: cargo run --release -p xtask -- diff …",
    run,
};

/// Mismatches that are printed in full.
const PRINTED: u64 = 20;

fn number<T: FromStr>(name: &str, value: Option<&String>) -> Result<T> {
    value.and_then(|text| text.parse().ok()).ok_or_else(|| Usage::error(format!("{name} needs a number")))
}

fn run(args: &[String]) -> Result<u8> {
    let (mut seconds, mut seed, mut from, mut most) = (60, 1, 0u64, u64::MAX);
    let mut classes = Class::ALL.to_vec();
    let mut args = args.iter();
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--seconds" => seconds = number(arg, args.next())?,
            "--seed" => seed = number(arg, args.next())?,
            "--from" => from = number(arg, args.next())?,
            "--count" => most = number(arg, args.next())?,
            "--class" => {
                let name = args.next().ok_or_else(|| Usage::error("--class needs a name"))?;
                classes.retain(|class| class.name() == name);
                if classes.is_empty() {
                    return Err(Usage::error(format!("no class '{name}'")));
                }
            }
            other => return Err(Usage::error(format!("no argument '{other}'"))),
        }
    }
    let mut differential = Differential::new(seed).map_err(|why| anyhow!(why))?;
    let (began, limit) = (Instant::now(), Duration::from_secs(seconds));
    let mut mismatches = 0;
    for index in from..from.saturating_add(most) {
        if began.elapsed() >= limit {
            break;
        }
        for &class in &classes {
            if let Some(text) = differential.run(class, index) {
                mismatches += 1;
                if mismatches <= PRINTED {
                    println!("{text}");
                }
            }
        }
    }
    println!("{:10} {:>12} {:>13} {:>11} {:>10}", "class", "sequences", "instructions", "exceptions", "mismatches");
    let line = |name: &str, count: Count| {
        let Count { sequences, instructions, faults, mismatches, .. } = count;
        println!("{name:10} {sequences:12} {instructions:13} {faults:11} {mismatches:10}");
    };
    let mut all = Count::default();
    for class in classes {
        let count = differential.count(class);
        line(class.name(), count);
        all.sequences += count.sequences;
        all.instructions += count.instructions;
        all.faults += count.faults;
        all.mismatches += count.mismatches;
    }
    line("all", all);
    println!("{} instruction forms, seed {seed}, {:.0} s", differential.forms(), began.elapsed().as_secs_f64());
    Ok(u8::from(all.mismatches != 0))
}
