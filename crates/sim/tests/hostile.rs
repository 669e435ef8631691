//! The conformance suite on hostile platforms: whatever a platform may do and rarely does must stay invisible.
//!
//! ```text
//! VM_ACCEL_SEEDS=100 cargo test -p vm-accel-sim --test hostile              many seeds
//! VM_ACCEL_SEED=17 cargo test -p vm-accel-sim --test hostile -- whpx::mmio  one seed, some cases
//! ```

mod platforms;

use platforms::{PLATFORMS, Platform};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::Mutex;
use vm_accel_conformance::{CONFORMANCE, Test, plan};

/// Seeds of a run that asks for nothing.
const USUAL: u64 = 2;

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable}={text} is not a number")))
}

/// The seeds to run.
fn seeds() -> Range<u64> {
    match (number("VM_ACCEL_SEED"), number("VM_ACCEL_SEEDS")) {
        (Some(first), count) => first..first + count.unwrap_or(1),
        (None, count) => 1..1 + count.unwrap_or(USUAL),
    }
}

/// Runs one test; a panic is a failure.
fn outcome(test: Test) -> Result<(), String> {
    catch_unwind(AssertUnwindSafe(|| test.run())).unwrap_or_else(|why| {
        let text = why.downcast_ref::<String>().cloned();
        Err(text.or_else(|| why.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default())
    })
}

/// Runs the suite with one seed; answers how many tests ran and what failed.
fn run(platform: &Platform, seed: u64, filters: &[String]) -> (usize, Vec<String>) {
    (platform.set_hostile)(Some(seed));
    let mut tests = plan(&CONFORMANCE, &[platform.backend]).tests;
    tests.retain(|test| test.skip.is_none() && (filters.is_empty() || filters.iter().any(|f| test.name.contains(f))));
    let count = tests.len();
    let (queue, failures) = (Mutex::new(tests), Mutex::new(Vec::new()));
    let threads = if platform.backend.serial { 1 } else { std::thread::available_parallelism().map_or(1, usize::from) };
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let Some(test) = queue.lock().expect("nothing panics here").pop() else {
                        break;
                    };
                    let name = test.name.clone();
                    if let Err(why) = outcome(test) {
                        failures.lock().expect("nothing panics here").push(format!("seed {seed}: {name}: {why}"));
                    }
                }
            });
        }
    });
    (platform.set_hostile)(None);
    (count, failures.into_inner().expect("nothing panics here"))
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args.iter().any(|arg| arg == "--list") {
        // For runners that ask what there is: it is one test.
        println!("hostile: test");
        return ExitCode::SUCCESS;
    }
    // Options of libtest mean nothing here.
    let filters: Vec<_> = args.into_iter().filter(|arg| !arg.starts_with('-') && arg != "hostile").collect();
    let (mut total, mut failed) = (0, 0);
    for platform in PLATFORMS {
        for seed in seeds() {
            let (count, failures) = run(platform, seed, &filters);
            total += count;
            failed += failures.len();
            failures.iter().for_each(|failure| println!("FAILED {failure}"));
        }
        println!("{}: {} seeds", platform.backend.name, seeds().count());
    }
    println!("{total} runs of cases, {failed} failed");
    if failed == 0 && (total != 0 || !filters.is_empty()) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
