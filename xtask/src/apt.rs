//! Packages from Debian's archive, without installing any.
//!
//! apt gets package lists and caches of its own below `guests-cache/apt`, so that packages of an architecture that the
//! machine does not run can be fetched without `dpkg --add-architecture`, and without being root. Where packages
//! come from is what the machine's own apt sources say. Nothing here changes the system.

use crate::process;
use crate::workspace;
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Older lists are fetched anew: a mirror drops packages that were superseded.
const LISTS_LIFETIME: Duration = Duration::from_secs(24 * 3600);

/// The configuration file in the private folder.
const CONFIG: &str = "apt.conf";

/// apt with a state of its own.
#[derive(Debug)]
pub(crate) struct Apt {
    dir: PathBuf,
}

fn dir() -> PathBuf {
    workspace::cache().join("apt")
}

/// The file whose age is that of the package lists.
fn stamp() -> PathBuf {
    dir().join("updated")
}

impl Apt {
    /// Opens the private state, and fetches the package lists if they are missing or old.
    pub(crate) fn open() -> Result<Self> {
        for program in ["apt-get", "apt-cache", "dpkg-deb"] {
            process::require(program, "apt dpkg").context("the guests come from Debian's archive and need apt")?;
        }
        let apt = Self { dir: workspace::cache().join("apt") };
        for dir in ["lists/partial", "cache/archives/partial", "unpack"] {
            fs::create_dir_all(apt.dir.join(dir))?;
        }
        apt.write_config()?;
        let stamp = stamp();
        let age = fs::metadata(&stamp).and_then(|m| m.modified()).ok().and_then(|t| t.elapsed().ok());
        if age.is_none_or(|age| age > LISTS_LIFETIME) {
            println!("fetching package lists");
            process::run(apt.command("apt-get").args(["-qq", "update"]))?;
            fs::write(&stamp, "")?;
        }
        Ok(apt)
    }

    /// Makes the next [`Apt::open`] fetch the package lists.
    pub(crate) fn expire_lists() -> Result<()> {
        if stamp().exists() {
            fs::remove_file(stamp())?;
        }
        Ok(())
    }

    /// The newest version of `package` that begins with `prefix`.
    pub(crate) fn version(&self, package: &str, prefix: &str) -> Result<String> {
        let table = process::text(self.command("apt-cache").args(["madison", package]))?;
        // Columns: package | version | source. Newest first.
        table
            .lines()
            .filter_map(|line| line.split('|').nth(1))
            .map(str::trim)
            .find(|version| version.starts_with(prefix))
            .map(str::to_owned)
            .with_context(|| format!("the apt sources of this machine have no package {package} {prefix}"))
    }

    /// The first dependency of `package` whose name begins with `prefix`: what a meta package stands for.
    pub(crate) fn dependency(&self, package: &str, prefix: &str) -> Result<String> {
        let record = process::text(self.command("apt-cache").args(["show", "--no-all-versions", package]))?;
        record
            .lines()
            .filter_map(|line| line.strip_prefix("Depends:"))
            .flat_map(|list| list.split(','))
            .filter_map(|entry| entry.split_whitespace().next())
            .find(|name| name.starts_with(prefix))
            .map(str::to_owned)
            .with_context(|| format!("package {package} depends on no {prefix}*"))
    }

    /// Fetches `package` (also `name:arch`, `name=version`) and unpacks it into `into`.
    pub(crate) fn unpack(&self, package: &str, into: &Path) -> Result<()> {
        let dir = self.dir.join("download");
        if dir.exists() {
            fs::remove_dir_all(&dir)?;
        }
        fs::create_dir_all(&dir)?;
        process::run(self.command("apt-get").args(["-qq", "download", package]).current_dir(&dir)).with_context(
            || {
                format!(
                    "cannot fetch {package}; if the package lists are outdated, `cargo xtask guests --update` helps"
                )
            },
        )?;
        let debs: Vec<PathBuf> = fs::read_dir(&dir)?.map(|e| e.map(|e| e.path())).collect::<Result<_, _>>()?;
        let [deb] = &debs[..] else { bail!("apt-get download {package} left {} files, not one", debs.len()) };
        fs::create_dir_all(into)?;
        process::output(Command::new("dpkg-deb").arg("-x").arg(deb).arg(into))?;
        fs::remove_dir_all(&dir)?;
        Ok(())
    }

    /// A folder to unpack into, empty.
    pub(crate) fn scratch(&self, name: &str) -> Result<PathBuf> {
        let dir = self.dir.join("unpack").join(name);
        if dir.exists() {
            fs::remove_dir_all(&dir)?;
        }
        fs::create_dir_all(&dir)?;
        Ok(dir)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.arg("-c").arg(self.dir.join(CONFIG)).env("LC_ALL", "C");
        command
    }

    /// What makes apt leave the system's state alone. Read after the machine's own configuration.
    fn write_config(&self) -> Result<()> {
        let config = format!(
            "APT::Architectures {{ \"amd64\"; \"arm64\"; }};\n\
             Dir::State::lists \"{lists}\";\n\
             Dir::Cache \"{cache}\";\n\
             # As root, apt would fetch as another user, who may not write here.\n\
             APT::Sandbox::User \"root\";\n",
            lists = self.dir.join("lists").display(),
            cache = self.dir.join("cache").display(),
        );
        fs::write(self.dir.join(CONFIG), config)?;
        Ok(())
    }
}
