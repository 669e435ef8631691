//! Cases times backends: makes a named test of each pair, says what is skipped and why, and counts.
//!
//! What is skipped is decided before anything runs, from the backend's capabilities and from a table of exceptions; a
//! case never skips itself. A skip cannot hide: it has a reason, it is counted, and `VM_ACCEL_REQUIRE` (names of backends,
//! separated by commas) turns a missing backend into a failure.

use super::Failure;
use super::backend::{BACKENDS, Backend, Host, cpu_is_emulated};
use super::watch::Watch;
use libtest_mimic::{Arguments, Failed, Trial};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use vm_accel::{Capabilities, GuestArch};

/// What a case returns.
pub(crate) type Outcome<T = ()> = Result<T, Failure>;

/// One case of the suite.
pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) needs: &'static [Need],
    pub(crate) run: fn(&Host) -> Outcome,
}

/// A theme: the module's name, its guests' architecture and its cases.
pub(crate) struct Theme {
    pub(crate) name: &'static str,
    pub(crate) arch: GuestArch,
    pub(crate) cases: &'static [Case],
}

/// Something that a backend may honestly lack.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Need {
    ReadOnlyMemory,
    DirtyLog,
    KernelIrqchip,
    SplitIrqchip,
    Irqfd,
    Ioevent,
    GuestDebug,
    MsrExits,
    Xsave,
    ThreadMoves,
}

impl Need {
    fn met(self, backend: &Backend, caps: &Capabilities) -> bool {
        match self {
            Self::ReadOnlyMemory => caps.read_only_memory,
            Self::DirtyLog => caps.dirty_log,
            Self::KernelIrqchip => caps.kernel_irqchip,
            Self::SplitIrqchip => caps.split_irqchip,
            Self::Irqfd => caps.irqfd,
            Self::Ioevent => caps.ioevent,
            Self::GuestDebug => caps.guest_debug,
            Self::MsrExits => caps.msr_exits,
            Self::Xsave => caps.xsave_size != 0,
            Self::ThreadMoves => backend.moves_threads,
        }
    }
}

/// Hosts on which a case provably cannot work, although the backend claims the capability.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum When {
    /// The host interprets guest ring 0 ([`Capabilities::emulates_ring0`]).
    InterpretedRing0,
    /// The CPU below the host's kernel is QEMU's TCG.
    EmulatedCpu,
}

/// A line in the table of exceptions.
pub(crate) struct Exception {
    pub(crate) when: When,
    /// `theme::case`.
    pub(crate) case: &'static str,
    pub(crate) reason: &'static str,
}

/// What a test program runs.
pub(crate) struct Suite {
    pub(crate) themes: &'static [Theme],
    pub(crate) exceptions: &'static [Exception],
    /// How long a case may take.
    pub(crate) limit: Duration,
}

/// Runs all themes on all backends.
pub(crate) fn main(suite: &'static Suite) -> ExitCode {
    let Suite { themes, exceptions, .. } = suite;
    let args = Arguments::from_args();
    let required = std::env::var("VM_ACCEL_REQUIRE").unwrap_or_default();
    let required: Vec<&str> = required.split(',').map(str::trim).filter(|name| !name.is_empty()).collect();
    for name in &required {
        if !BACKENDS.iter().any(|backend| backend.name == *name) {
            eprintln!("VM_ACCEL_REQUIRE: the suite knows no backend {name:?}");
            return ExitCode::FAILURE;
        }
    }
    for exception in *exceptions {
        let known = themes
            .iter()
            .flat_map(|theme| theme.cases.iter().map(|case| format!("{}::{}", theme.name, case.name)))
            .any(|name| name == exception.case);
        assert!(known, "the table of exceptions names a case that does not exist: {}", exception.case);
    }

    let mut trials = Vec::new();
    let mut skips = Vec::new();
    for backend in BACKENDS {
        match (backend.probe)() {
            Ok(caps) => add_backend(backend, &caps, suite, &mut trials, &mut skips),
            Err(why) => {
                let required = required.contains(&backend.name);
                let text = format!("required, but {why}");
                trials.push(Trial::test(backend.name, move || Err(Failed::from(text))).with_ignored_flag(!required));
                if !required {
                    skips.push((backend.name.to_owned(), why.to_string()));
                }
            }
        }
    }

    let listing = args.list;
    let conclusion = libtest_mimic::run(&args, trials);
    if !listing {
        for (name, reason) in skips.iter().filter(|(name, _)| is_selected(&args, name)) {
            println!("{name}: skipped: {reason}");
        }
        println!(
            "{} passed, {} failed, {} skipped",
            conclusion.num_passed, conclusion.num_failed, conclusion.num_ignored
        );
    }
    conclusion.exit_code()
}

/// True if the command line does not leave the test out: what is not asked for is not reported as skipped either.
fn is_selected(args: &Arguments, name: &str) -> bool {
    let hit = |filter: &String| {
        if args.exact { name == filter } else { name.contains(filter.as_str()) }
    };
    args.filter.as_ref().is_none_or(hit) && !args.skip.iter().any(hit)
}

fn add_backend(
    backend: &'static Backend,
    caps: &Capabilities,
    suite: &'static Suite,
    trials: &mut Vec<Trial>,
    skips: &mut Vec<(String, String)>,
) {
    let Suite { themes, exceptions, limit } = suite;
    let holds = |when| match when {
        When::InterpretedRing0 => caps.emulates_ring0 == Some(true),
        When::EmulatedCpu => backend.native && cpu_is_emulated(),
    };
    for theme in themes.iter().filter(|theme| theme.arch == caps.guest_arch) {
        for case in theme.cases {
            let path = format!("{}::{}", theme.name, case.name);
            let name = format!("{}::{path}", backend.name);
            let unmet = case.needs.iter().find(|need| !need.met(backend, caps));
            let skip = match unmet {
                Some(need) => Some(format!("the backend lacks {need:?} here")),
                None => exceptions
                    .iter()
                    .find(|e| holds(e.when) && e.case == path)
                    .map(|e| format!("{:?}: {}", e.when, e.reason)),
            };
            let caps = caps.clone();
            let test_name = name.clone();
            let test = move || run_case(backend, caps, case, &test_name, *limit);
            trials.push(Trial::test(name.clone(), test).with_ignored_flag(skip.is_some()));
            if let Some(reason) = skip {
                skips.push((name, reason));
            }
        }
    }
}

/// Runs a case under its watchdog. A panic is a failure like any other and is left to the test runner.
fn run_case(
    backend: &'static Backend,
    caps: Capabilities,
    case: &Case,
    name: &str,
    limit: Duration,
) -> Result<(), Failed> {
    struct Finish(Arc<Watch>);
    impl Drop for Finish {
        fn drop(&mut self) {
            self.0.finish();
        }
    }
    let watch = Arc::new(Watch::new(limit));
    let host = Host { backend, caps, watch: watch.clone() };
    std::thread::scope(|scope| {
        let guard = watch.clone();
        scope.spawn(move || guard.guard(name));
        let _finish = Finish(watch);
        let outcome = (case.run)(&host);
        match outcome {
            Ok(()) if host.in_time() => Ok(()),
            Ok(()) => Err(Failed::from("passed, but only after its deadline")),
            Err(failure) => Err(Failed::from(failure.0)),
        }
    })
}
