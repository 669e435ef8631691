//! What can be said on the command line.

use clap::{Args as ClapArgs, Parser, Subcommand};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;
use vm_accel::AccelKind;
use vm_accel_machine::boot::BootKind;
use vm_accel_machine::cpuid::FeatureMask;

/// Boots guests on KVM, Hypervisor.framework, Windows Hypervisor Platform or a software CPU.
#[derive(Debug, Parser)]
#[command(name = "vm-accel", version, after_help = crate::status::HELP)]
pub(crate) struct Args {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Boot a guest; without KERNEL a small demo guest that reports what it runs on.
    Run(RunArgs),
    /// Say which backends this host has, and why others cannot be used.
    Info(InfoArgs),
    /// Run the library's conformance suite on this host's backends and print a report for an issue.
    Selftest(SelftestArgs),
}

#[derive(Debug, ClapArgs)]
#[command(after_help = crate::status::HELP)]
pub(crate) struct RunArgs {
    /// Kernel or firmware: Linux bzImage, ELF (with or without PVH note), multiboot, flat binary, firmware image.
    pub(crate) kernel: Option<PathBuf>,
    /// Initial RAM disk (multiboot: the first module).
    #[arg(long, short, value_name = "FILE", alias = "initramfs")]
    pub(crate) initrd: Option<PathBuf>,
    /// Command line of the kernel [default: its console on the serial port, where the boot protocol has a command line]
    #[arg(long, short = 'p', value_name = "TEXT", alias = "append", alias = "params")]
    pub(crate) cmdline: Option<String>,
    /// RAM: bytes, or with a suffix K, M, G or T (powers of 1024).
    #[arg(long, short, value_name = "SIZE", default_value = "512M", alias = "mem")]
    pub(crate) memory: Size,
    /// Number of CPUs.
    #[arg(long, short, value_name = "N", default_value_t = 1, value_parser = count)]
    pub(crate) cpus: u32,
    /// Backend: auto, kvm, hvf, whpx, vz or soft. A list (kvm,soft) means the first that works.
    #[arg(long, value_name = "LIST", default_value = "auto")]
    pub(crate) accel: AccelList,
    /// CPUID features to hide from the guest, such as -x2apic,-smap (x86 guests; a wrong name prints them all).
    #[arg(long, value_name = "-FEATURE,…", allow_hyphen_values = true)]
    pub(crate) cpu: Option<FeatureMask>,
    /// Where the serial port leads: stdio, null, or file=PATH.
    #[arg(long, value_name = "WHERE", default_value = "stdio")]
    pub(crate) serial: Serial,
    /// How the kernel file is booted, instead of detecting it.
    #[arg(long, value_name = "PROTOCOL", default_value = "auto")]
    pub(crate) boot: BootKind,
    /// Where a flat binary is loaded and entered (x86: in real mode) [default: 0x7c00; on aarch64 the start of RAM]
    #[arg(long, value_name = "ADDRESS", value_parser = address)]
    pub(crate) flat_address: Option<u64>,
    /// Ends the machine after this many seconds, with status 124.
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub(crate) timeout: Option<Duration>,
    /// A guest that resets ends the machine, with status 32, instead of starting it again.
    #[arg(long)]
    pub(crate) no_reboot: bool,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct InfoArgs {
    /// Print JSON instead of a table.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, ClapArgs)]
pub(crate) struct SelftestArgs {
    /// Only cases whose name (backend::theme::case) contains this.
    pub(crate) filter: Option<String>,
    /// Only these backends, such as hvf or kvm,soft [default: every one that is there]
    #[arg(long, value_name = "LIST", default_value = "auto", hide_default_value = true)]
    pub(crate) accel: AccelList,
    /// Print the cases instead of running them.
    #[arg(long)]
    pub(crate) list: bool,
    /// Run one case in this process: what the command starts for each.
    #[arg(long, value_name = "NAME", hide = true)]
    pub(crate) case: Option<String>,
}

/// A size in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Size(pub(crate) u64);

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (number, suffix) = text.split_at(digits);
        let shift = match suffix.to_ascii_uppercase().as_str() {
            "" | "B" => 0,
            "K" | "KB" | "KIB" => 10,
            "M" | "MB" | "MIB" => 20,
            "G" | "GB" | "GIB" => 30,
            "T" | "TB" | "TIB" => 40,
            _ => {
                return Err("a size is a number of bytes, or one with a suffix K, M, G or T".into());
            }
        };
        let number: u64 = number.parse().map_err(|_| "a size begins with a whole number".to_owned())?;
        match number.checked_mul(1 << shift) {
            Some(0) => Err("it must not be 0".into()),
            Some(size) => Ok(Self(size)),
            None => Err("it exceeds 64 bits".into()),
        }
    }
}

/// The backends to try, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum AccelList {
    /// Whatever the host has.
    Auto,
    /// These.
    Kinds(Vec<AccelKind>),
}

impl FromStr for AccelList {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "auto" {
            return Ok(Self::Auto);
        }
        text.split([',', ':'])
            .map(|name| name.parse().map_err(|_| format!("{name:?} is none of auto, kvm, hvf, whpx, vz, soft")))
            .collect::<Result<_, _>>()
            .map(Self::Kinds)
    }
}

/// Where the serial port leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Serial {
    Stdio,
    Null,
    File(PathBuf),
}

impl FromStr for Serial {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.strip_prefix("file=")) {
            ("stdio", _) => Ok(Self::Stdio),
            ("null", _) => Ok(Self::Null),
            (_, Some(path)) if !path.is_empty() => Ok(Self::File(path.into())),
            _ => Err("it is none of stdio, null, file=PATH".into()),
        }
    }
}

fn count(text: &str) -> Result<u32, String> {
    match text.parse() {
        Ok(0) => Err("it must be at least 1".into()),
        Ok(count) => Ok(count),
        Err(_) => Err("it is no number that a machine could have".into()),
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "it is no number of seconds".to_owned())?;
    if seconds > 0.0 {
        Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())
    } else {
        Err("it must be above 0".into())
    }
}

fn address(text: &str) -> Result<u64, String> {
    let parsed = match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => text.parse(),
    };
    parsed.map_err(|_| "it is no number; hexadecimal begins with 0x".into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_definition_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn sizes_take_suffixes_and_refuse_nonsense() {
        assert_eq!("512M".parse(), Ok(Size(512 << 20)));
        assert_eq!("1".parse(), Ok(Size(1)));
        assert_eq!("3gib".parse(), Ok(Size(3 << 30)));
        for bad in ["", "M", "0", "-1", "1X", "1.5G", "99999999999999999999", "18446744073709551615K"] {
            assert!(bad.parse::<Size>().is_err(), "{bad:?} was taken");
        }
    }

    #[test]
    fn accelerators_are_a_list() {
        assert_eq!("auto".parse(), Ok(AccelList::Auto));
        let list = AccelList::Kinds(vec![AccelKind::Kvm, AccelKind::Fallback]);
        assert_eq!("kvm,soft".parse(), Ok(list.clone()));
        assert_eq!("kvm:soft".parse(), Ok(list));
        assert!("kvm,".parse::<AccelList>().is_err());
        assert!("tcg".parse::<AccelList>().is_err());
    }

    #[test]
    fn a_count_is_a_number_above_zero() {
        assert_eq!(count("64"), Ok(64));
        for bad in ["", "0", "-1", "two", "4294967296"] {
            assert!(count(bad).is_err(), "{bad:?} was taken");
        }
    }

    #[test]
    fn time_limits_must_be_positive_and_finite() {
        assert_eq!(seconds("1.5"), Ok(Duration::from_millis(1500)));
        for bad in ["0", "-1", "inf", "NaN", "1e30", "x"] {
            assert!(seconds(bad).is_err(), "{bad:?} was taken");
        }
    }
}
