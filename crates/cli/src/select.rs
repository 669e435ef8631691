//! Choosing the backend. A choice that a user would not expect is said on stderr.

use crate::args::AccelList;
use crate::status::NoBackend;
use anyhow::Result;
use vm_accel::{Accel as _, AccelError, AccelKind, GuestArch, PlatformBackend, probe_kind};

/// What the guest needs of a backend.
#[derive(Debug)]
pub(crate) struct Needs {
    /// It is a real kernel, not a guest of plain instructions: ring 0 must run everything that a CPU runs.
    pub(crate) ring0: bool,
    /// The architectures that it can be booted on.
    pub(crate) archs: Vec<GuestArch>,
}

/// A virtual machine on the backend that was chosen.
#[derive(Debug)]
pub(crate) struct Choice {
    pub(crate) backend: PlatformBackend,
    /// What the user should know of it before the guest runs.
    pub(crate) warning: Option<String>,
}

/// Creates a virtual machine on the first backend of the list that works.
pub(crate) fn backend(list: &AccelList, needs: &Needs) -> Result<Choice> {
    let kinds: Vec<AccelKind> = match list {
        // Virtualization.framework runs whole machines of its own; it is not one that this command can drive.
        AccelList::Auto => AccelKind::ALL.into_iter().filter(|kind| *kind != AccelKind::Vz).collect(),
        AccelList::Kinds(kinds) => kinds.clone(),
    };
    let mut refusals = Vec::new();
    for (n, &kind) in kinds.iter().enumerate() {
        let mut warning = None;
        if needs.ring0 && emulates_ring0(kind) {
            const WHY: &str = "this host emulates the guest's ring 0 and cannot run an operating system";
            if kinds[n + 1..].iter().any(|other| probe_kind(*other).is_ok()) {
                refusals.push(format!("{kind}: {WHY}"));
                continue;
            }
            warning = Some(format!("{kind}: {WHY}; expect the guest to fail"));
        }
        match PlatformBackend::new(kind) {
            Ok(backend) if backend.as_whole_vm().is_some() => {
                refusals.push(format!("{kind}: it runs whole machines of its own, which this command cannot drive"));
            }
            Ok(backend) if !needs.archs.contains(&backend.capabilities().guest_arch) => {
                let arch = backend.capabilities().guest_arch;
                refusals.push(format!("{kind}: it runs {arch} guests, and this is none"));
            }
            Ok(backend) => {
                if kind == AccelKind::Fallback && kinds.len() > 1 {
                    let why = explain(list, &refusals);
                    warning = Some(format!(
                        "no accelerator can run this guest; using the software CPU, which is slow ({why})"
                    ));
                }
                return Ok(Choice { backend, warning });
            }
            Err(why) => refusals.push(match &why {
                // The kind stands in the text already.
                AccelError::Unavailable { .. } => why.to_string(),
                _ => format!("{kind}: {why}"),
            }),
        }
    }
    Err(NoBackend(format!(
        "no backend here can run this guest: {}; `vm-accel info` says more",
        explain(list, &refusals)
    ))
    .into())
}

/// The reasons that help: of a search through everything only those of platforms that belong to this host.
fn explain(list: &AccelList, refusals: &[String]) -> String {
    let helpful = refusals.iter().filter(|why| *list != AccelList::Auto || !why.contains("exists only on"));
    helpful.map(String::as_str).collect::<Vec<_>>().join("; ")
}

fn emulates_ring0(kind: AccelKind) -> bool {
    kind == AccelKind::Kvm && probe_kind(kind).is_ok_and(|caps| caps.emulates_ring0 == Some(true))
}
