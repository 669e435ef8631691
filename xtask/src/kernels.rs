//! `cargo xtask kernels`: how fast the software CPU is, compared with QEMU's TCG in one run.
//!
//! Both sides boot the same guest (`vm_accel_guests::kernels`) in turns. What is measured is the processor time of the
//! whole process between two lines on the serial port, so other work on the host disturbs little; what is told are
//! ratios within a round, so a slow host disturbs little, too.

use crate::arch::X86;
use crate::cargo::build_release;
use crate::{Usage, initrd, process, workspace};
use anyhow::{Context, Result, bail};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use vm_accel_guests::kernels::{BEGIN, ENDED, KERNELS, multiboot};

pub(crate) const COMMAND: crate::Command = crate::Command {
    name: "kernels",
    summary: "compare the software CPU's speed with QEMU's TCG",
    usage: "\
Usage: cargo xtask kernels [--rounds N] [--no-boot] [--program FILE]

Boots a guest with ten computing kernels on QEMU's TCG and on the software CPU, in turns, and prints how fast the
software CPU is at each, TCG being 1: the median of N rounds (3). Then the same for Debian's kernel from start to
power-off, unless --no-boot is given; that needs `cargo xtask guests`. --program measures a `vm-accel` that is built
already. Only on Linux.",
    run,
};

/// The serial port and the exit port of both machines.
const PORTS: (u16, u16) = (0x3f8, 0xf4);

/// What belongs together: a name, the kernels, and the speed that is wanted at least, TCG being 1.
const GROUPS: [(&str, &[&str], f64); 4] = [
    ("integer", &["fib", "sieve", "crc", "copy", "sort", "vm"], 0.25),
    ("floating point", &["nbody", "matmul"], 1.0),
    ("string", &["rep"], 4.0),
    ("TLB misses", &["rand"], 2.0),
];
/// The same for the boot: at most three times TCG's time.
const BOOT_GOAL: f64 = 1.0 / 3.0;

fn run(args: &[String]) -> Result<u8> {
    let (mut rounds, mut with_boot, mut program) = (3_usize, true, None);
    let mut args = args.iter();
    while let Some(flag) = args.next() {
        match flag.as_str() {
            "--no-boot" => with_boot = false,
            "--program" => {
                program = Some(PathBuf::from(args.next().ok_or_else(|| Usage::error("--program wants a file"))?));
            }
            "--rounds" => {
                rounds = args
                    .next()
                    .and_then(|n| n.parse().ok())
                    .filter(|n| *n > 0)
                    .ok_or_else(|| Usage::error("--rounds wants a number above 0"))?;
            }
            _ => return Err(Usage::error(format!("no option '{flag}'"))),
        }
    }
    let arch = &X86;
    let qemu = process::require(arch.qemu[0], arch.qemu[1])?;
    let program = program.map_or_else(|| build_release("vm-accel-cli", "vm-accel"), Ok)?;
    let tmp = workspace::cache().join("tmp");
    std::fs::create_dir_all(&tmp)?;
    let guest = tmp.join(format!("kernels-{}.elf", std::process::id()));
    std::fs::write(&guest, multiboot(PORTS.0, PORTS.1)).with_context(|| format!("cannot write {}", guest.display()))?;
    let result = compare(rounds, || Ok((kernels(&mut tcg(&qemu, &guest))?, kernels(&mut soft(&program, &guest))?)));
    // Left behind it would only take space.
    let _ = std::fs::remove_file(&guest);
    let table = result?;
    for (kernel, sides) in KERNELS.iter().zip(&table) {
        println!("{:<14} {}", kernel.name, sides.line());
    }
    for (name, members, goal) in GROUPS {
        let speeds = KERNELS.iter().zip(&table).filter(|(k, _)| members.contains(&k.name)).map(|(_, s)| s.speed());
        let product: f64 = speeds.map(f64::ln).sum();
        println!("{name:<14} {:.2} (wanted: {goal})", (product / members.len() as f64).exp());
    }
    if with_boot {
        let ramdisk = initrd::build(arch)?;
        let linux = |command: &mut Command, [disk, append]: [&str; 2]| {
            command.arg(disk).arg(&ramdisk).args([append, "console=ttyS0 mitigations=off quiet panic=-1"]);
            whole(command)
        };
        let table = compare(rounds, || {
            let tcg = linux(&mut tcg(&qemu, &arch.kernel()), ["-initrd", "-append"])?;
            Ok((vec![tcg], vec![linux(&mut soft(&program, &arch.kernel()), ["--initrd", "--cmdline"])?]))
        })?;
        println!("{:<14} {} (wanted: {BOOT_GOAL:.2})", "Debian's boot", table[0].line());
    }
    Ok(0)
}

fn tcg(qemu: &Path, kernel: &Path) -> Command {
    let mut command = Command::new(qemu);
    command
        .args(["-accel", "tcg", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
        .args(["-M", "pc", "-cpu", "max", "-m", "512", "-serial", "stdio"])
        .args(["-device", &format!("isa-debug-exit,iobase={:#x}", PORTS.1)])
        .arg("-kernel")
        .arg(kernel);
    command
}

fn soft(program: &Path, kernel: &Path) -> Command {
    let mut command = Command::new(program);
    command.args(["run", "--accel", "soft", "--memory", "512M"]).arg(kernel);
    command
}

/// Seconds of processor time on both sides, one for each round.
#[derive(Debug)]
struct Sides {
    tcg: Vec<f64>,
    soft: Vec<f64>,
}

impl Sides {
    /// How fast the software CPU is, TCG being 1.
    fn speed(&self) -> f64 {
        median(self.tcg.iter().zip(&self.soft).map(|(tcg, soft)| tcg / soft.max(0.01)).collect())
    }

    fn line(&self) -> String {
        let [tcg, soft] = [&self.tcg, &self.soft].map(|times| median(times.clone()));
        format!("{:6.2}   TCG {tcg:7.3} s, soft {soft:7.3} s", self.speed())
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    if values.len() % 2 == 1 { values[middle] } else { (values[middle - 1] + values[middle]) / 2.0 }
}

/// Runs `round` so many times; it answers the times of TCG and of the software CPU, alike in number and order.
fn compare(rounds: usize, mut round: impl FnMut() -> Result<(Vec<f64>, Vec<f64>)>) -> Result<Vec<Sides>> {
    let mut table: Vec<Sides> = Vec::new();
    for number in 1..=rounds {
        println!("round {number} of {rounds}");
        let (tcg, soft) = round()?;
        table.resize_with(tcg.len(), || Sides { tcg: Vec::new(), soft: Vec::new() });
        for (sides, (tcg, soft)) in table.iter_mut().zip(tcg.into_iter().zip(soft)) {
            sides.tcg.push(tcg);
            sides.soft.push(soft);
        }
    }
    Ok(table)
}

/// The time of each kernel. A wrong checksum is an error.
fn kernels(command: &mut Command) -> Result<Vec<f64>> {
    let mut began = 0.0;
    let mut times = Vec::new();
    watch(command, |line, now| {
        let mut words = line.split_whitespace();
        match (words.next(), words.next(), words.next()) {
            (Some(BEGIN), Some(_), None) => began = now,
            (Some(ENDED), Some(name), Some(sum)) => {
                let wanted = KERNELS.get(times.len()).filter(|kernel| kernel.name == name);
                if wanted.is_none_or(|kernel| u64::from_str_radix(sum, 16) != Ok(kernel.checksum)) {
                    bail!("the guest says '{line}'");
                }
                times.push(now - began);
            }
            _ => {}
        }
        Ok(())
    })?;
    if times.len() != KERNELS.len() {
        bail!("the guest stopped after {} kernels", times.len());
    }
    Ok(times)
}

/// The time from the start to the last line of a guest that reaches userspace.
fn whole(command: &mut Command) -> Result<f64> {
    let (mut reached, mut end) = (false, 0.0);
    watch(command, |line, now| {
        reached |= line.contains(initrd::REACHED);
        end = now;
        Ok(())
    })?;
    if !reached {
        bail!("the guest never reached its userspace");
    }
    Ok(end)
}

/// Runs a machine and shows each line of its output, with the processor time that it has taken so far, to `see`.
fn watch(command: &mut Command, mut see: impl FnMut(&str, f64) -> Result<()>) -> Result<()> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {}", command.get_program().to_string_lossy()))?;
    let output = child.stdout.take().context("the child has an output")?;
    let result = BufReader::new(output).split(b'\n').try_for_each(|line| {
        let line = line?;
        see(&String::from_utf8_lossy(&line), processor_time(child.id())?)
    });
    if result.is_err() {
        let _ = child.kill();
    }
    child.wait()?;
    result
}

/// Seconds of processor time of a process, which may have ended but was not waited for yet: `utime` and `stime` in
/// hundredths (proc(5), /proc/pid/stat).
fn processor_time(process: u32) -> Result<f64> {
    let text =
        std::fs::read_to_string(format!("/proc/{process}/stat")).context("processor times are read from /proc")?;
    hundredths(&text).map(|n| n as f64 / 100.0).context("/proc has no processor times")
}

/// The fields 14 and 15 together. The second is a name in brackets, in which anything may be.
fn hundredths(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    Some(fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_speed_is_the_median_of_ratios() {
        let sides = Sides { tcg: vec![1.0, 2.0, 9.0], soft: vec![2.0, 2.0, 3.0] };
        assert_eq!(sides.speed(), 1.0);
        assert_eq!(median(vec![4.0, 1.0]), 2.5);
    }

    #[test]
    fn processor_times_are_behind_the_name() {
        assert_eq!(hundredths("1 (a) b) S 1 2 3 4 5 6 7 8 9 10 120 34 0 0 20"), Some(154));
        assert_eq!(hundredths("1 (a) S 1"), None);
    }

    #[test]
    fn every_kernel_has_a_group() {
        assert!(KERNELS.iter().all(|kernel| GROUPS.iter().any(|(_, members, _)| members.contains(&kernel.name))));
    }
}
