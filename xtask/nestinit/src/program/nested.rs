//! The init of the emulated machine: load KVM, run one program, report its exit status, power off.
//!
//! What to run stands in the file `/nest/job`, a directive and its value per line. What this init has to tell, it tells
//! in lines of its own on the console, marked with the job's token: what the program writes can then not be taken
//! for it.

use crate::{End, end, load_module, mount_all};
use std::fs;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// The status of a program that was killed because its time was up, as of timeout(1).
const TIMED_OUT: i32 = 124;
/// The status when there was no program to run.
const NOT_STARTED: i32 = 125;

/// What `/nest/job` says.
#[derive(Debug, Default, PartialEq, Eq)]
struct Job {
    token: String,
    limit: Duration,
    modules: Vec<String>,
    program: String,
    args: Vec<String>,
    env: Vec<(String, String)>,
}

impl Job {
    fn parse(text: &str) -> Self {
        let mut job = Self::default();
        for line in text.lines() {
            let (key, value) = line.split_once(' ').unwrap_or((line, ""));
            let value = value.to_owned();
            match key {
                "token" => job.token = value,
                "limit" => job.limit = Duration::from_secs(value.parse().unwrap_or(0)),
                "module" => job.modules.push(value),
                "program" => job.program = value,
                "arg" => job.args.push(value),
                "env" => job.env.extend(value.split_once('=').map(|(k, v)| (k.to_owned(), v.to_owned()))),
                _ => println!("init: the job has an unknown line: {line}"),
            }
        }
        job
    }
}

/// Runs the job and powers the machine off.
pub fn nested() {
    mount_all();
    let job = Job::parse(&fs::read_to_string("/nest/job").unwrap_or_default());
    for module in &job.modules {
        if let Err(error) = load_module(module) {
            println!("init: cannot load {module}: {error}");
        }
    }
    let began = Instant::now();
    let status = run(&job);
    // A line of its own even if the program's output ended in the middle of one.
    println!("\n@@NEST {} ran {}", job.token, began.elapsed().as_millis());
    println!("@@NEST {} exit {status}", job.token);
    end(End::PowerOff)
}

fn run(job: &Job) -> i32 {
    let began = Instant::now();
    let child = Command::new(&job.program)
        .args(&job.args)
        .envs(job.env.iter().map(|(k, v)| (k, v)))
        .stdin(Stdio::null())
        .spawn();
    let mut child = match child {
        Ok(child) => child,
        Err(error) => {
            println!("init: cannot start {}: {error}", job.program);
            return NOT_STARTED;
        }
    };
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return code(status),
            Ok(None) if began.elapsed() < job.limit => thread::sleep(Duration::from_millis(5)),
            Ok(None) => {
                println!("init: killed after {} s", job.limit.as_secs());
                let _ = child.kill();
                return TIMED_OUT;
            }
            Err(error) => {
                println!("init: cannot wait: {error}");
                return NOT_STARTED;
            }
        }
    }
}

/// The exit status as a shell would give it.
fn code(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_is_read_line_by_line() {
        let job =
            Job::parse("token t1\nlimit 9\nmodule /m/a.ko\nmodule /m/b.ko\nprogram /p\narg -x y\narg \nenv A=b=c\n");
        assert_eq!(
            job,
            Job {
                token: "t1".into(),
                limit: Duration::from_secs(9),
                modules: vec!["/m/a.ko".into(), "/m/b.ko".into()],
                program: "/p".into(),
                args: vec!["-x y".into(), String::new()],
                env: vec![("A".into(), "b=c".into())],
            }
        );
    }

    #[test]
    fn a_status_is_what_a_shell_says() {
        assert_eq!(code(ExitStatus::from_raw(7 << 8)), 7);
        assert_eq!(code(ExitStatus::from_raw(libc::SIGKILL)), 137);
    }

    #[test]
    fn the_time_limit_ends_a_program() {
        let job = Job { program: "/bin/sleep".into(), args: vec!["1000".into()], ..Job::default() };
        assert_eq!(run(&job), TIMED_OUT);
        let job = Job { program: "/no/such".into(), ..Job::default() };
        assert_eq!(run(&job), NOT_STARTED);
    }
}
