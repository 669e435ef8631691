//! Cases times backends: makes a named test of each pair, says what is skipped and why, and counts.
//!
//! What is skipped is decided before anything runs, from the backend's capabilities and from a table of exceptions; a
//! case never skips itself. A skip cannot hide: it has a reason, it is counted, and `VM_ACCEL_REQUIRE` (names of backends,
//! separated by commas) turns a missing backend into a failure.

use super::Failure;
use super::backend::{Backend, Host, cpu_is_emulated};
use super::watch::Watch;
use libtest_mimic::{Arguments, Failed, Trial};
use std::fmt;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use vm_accel::{AccelError, Capabilities, GuestArch};

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
    /// Local APICs, wherever the I/O APIC is.
    LocalApic,
    SplitIrqchip,
    Irqfd,
    Ioevent,
    GuestDebug,
    MsrExits,
    Xsave,
    ThreadMoves,
    SeveralVms,
}

impl Need {
    fn met(self, backend: &Backend, caps: &Capabilities) -> bool {
        match self {
            Self::ReadOnlyMemory => caps.read_only_memory,
            Self::DirtyLog => caps.dirty_log,
            Self::KernelIrqchip => caps.kernel_irqchip,
            Self::LocalApic => caps.kernel_irqchip || caps.split_irqchip,
            Self::SplitIrqchip => caps.split_irqchip,
            Self::Irqfd => caps.irqfd,
            Self::Ioevent => caps.ioevent,
            Self::GuestDebug => caps.guest_debug,
            Self::MsrExits => caps.msr_exits,
            Self::Xsave => caps.xsave_size != 0,
            Self::ThreadMoves => backend.moves_threads,
            Self::SeveralVms => !backend.serial,
        }
    }
}

/// Hosts on which a case provably cannot work, although the backend claims the capability.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum When {
    /// No host.
    Anywhere,
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

/// A list of cases.
pub struct Suite {
    pub(crate) themes: &'static [Theme],
    pub(crate) exceptions: &'static [Exception],
    /// How long a case may take.
    pub(crate) limit: Duration,
}

impl fmt::Debug for Suite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Suite").field("themes", &self.themes.len()).finish_non_exhaustive()
    }
}

/// One case on one backend.
pub struct Test {
    /// `backend::theme::case`.
    pub name: String,
    /// Why it is not to be run: the backend lacks what it needs, or the host provably cannot do it.
    pub skip: Option<String>,
    run: Box<dyn FnOnce() -> Result<(), String> + Send>,
}

impl Test {
    /// Runs it, under its watchdog.
    ///
    /// # Errors
    /// What differs from what was expected. Some cases panic instead.
    pub fn run(self) -> Result<(), String> {
        (self.run)()
    }
}

impl fmt::Debug for Test {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Test").field("name", &self.name).field("skip", &self.skip).finish_non_exhaustive()
    }
}

/// A backend that cannot be used here.
#[derive(Debug, Clone)]
pub struct Absent {
    /// The backend's name.
    pub backend: &'static str,
    /// Why.
    pub why: AccelError,
}

/// What there is to run, and what cannot be.
#[derive(Debug, Default)]
pub struct Plan {
    /// Cases on backends that are there.
    pub tests: Vec<Test>,
    /// Backends that are not.
    pub absent: Vec<Absent>,
}

/// The cases of `suite` times `backends`.
///
/// # Panics
/// If the table of exceptions names a case that does not exist.
#[must_use]
pub fn plan(suite: &'static Suite, backends: &[Backend]) -> Plan {
    let paths: Vec<_> = suite
        .themes
        .iter()
        .flat_map(|theme| theme.cases.iter().map(|case| format!("{}::{}", theme.name, case.name)))
        .collect();
    for Exception { case, .. } in suite.exceptions {
        assert!(paths.iter().any(|path| path == case), "an exception names a case that does not exist: {case}");
    }
    let mut plan = Plan::default();
    for backend in backends {
        match (backend.probe)() {
            Ok(caps) => add_backend(*backend, &caps, suite, &mut plan.tests),
            Err(why) => plan.absent.push(Absent { backend: backend.name, why }),
        }
    }
    plan
}

/// A test program that runs `suite` on `backends`, with libtest's command line.
#[must_use]
pub fn main(suite: &'static Suite, backends: &[Backend]) -> ExitCode {
    let args = Arguments::from_args();
    let required = std::env::var("VM_ACCEL_REQUIRE").unwrap_or_default();
    let required: Vec<&str> = required.split(',').map(str::trim).filter(|name| !name.is_empty()).collect();
    for name in &required {
        if !backends.iter().any(|backend| backend.name == *name) {
            eprintln!("VM_ACCEL_REQUIRE: the suite knows no backend {name:?}");
            return ExitCode::FAILURE;
        }
    }

    let plan = plan(suite, backends);
    let mut trials = Vec::new();
    let mut skips = Vec::new();
    for Absent { backend, why } in plan.absent {
        let required = required.contains(&backend);
        let text = format!("required, but {why}");
        trials.push(Trial::test(backend, move || Err(Failed::from(text))).with_ignored_flag(!required));
        if !required {
            skips.push((backend.to_owned(), why.to_string()));
        }
    }
    for Test { name, skip, run } in plan.tests {
        trials.push(Trial::test(name.clone(), || run().map_err(Failed::from)).with_ignored_flag(skip.is_some()));
        skips.extend(skip.map(|reason| (name, reason)));
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

fn add_backend(backend: Backend, caps: &Capabilities, suite: &'static Suite, tests: &mut Vec<Test>) {
    let Suite { themes, exceptions, limit } = suite;
    let holds = |when| match when {
        When::Anywhere => true,
        When::InterpretedRing0 => caps.emulates_ring0 == Some(true),
        When::EmulatedCpu => backend.native && cpu_is_emulated(),
    };
    for theme in themes.iter().filter(|theme| theme.arch == caps.guest_arch) {
        for case in theme.cases {
            let path = format!("{}::{}", theme.name, case.name);
            let name = format!("{}::{path}", backend.name);
            let unmet = case.needs.iter().find(|need| !need.met(&backend, caps));
            let skip = match unmet {
                Some(need) => Some(format!("the backend lacks {need:?} here")),
                None => exceptions
                    .iter()
                    .find(|e| holds(e.when) && e.case == path)
                    .map(|e| format!("{:?}: {}", e.when, e.reason)),
            };
            let (caps, test_name) = (caps.clone(), name.clone());
            let run = Box::new(move || run_case(backend, caps, case, &test_name, *limit));
            tests.push(Test { name, skip, run });
        }
    }
}

/// Runs a case under its watchdog. A panic is a failure like any other and is left to the test runner.
fn run_case(backend: Backend, caps: Capabilities, case: &Case, name: &str, limit: Duration) -> Result<(), String> {
    struct Finish(Arc<Watch>);
    impl Drop for Finish {
        fn drop(&mut self) {
            self.0.finish();
        }
    }
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _alone = backend.serial.then(|| ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner));
    let watch = Arc::new(Watch::new(limit));
    let host = Host { backend, caps, watch: watch.clone() };
    std::thread::scope(|scope| {
        let guard = watch.clone();
        scope.spawn(move || guard.guard(name));
        let _finish = Finish(watch);
        match (case.run)(&host) {
            Ok(()) if host.in_time() => Ok(()),
            Ok(()) => Err("passed, but only after its deadline".to_owned()),
            Err(failure) => Err(failure.0),
        }
    })
}
