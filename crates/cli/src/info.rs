//! `vm-accel info`: the probe, as a table or as JSON.

use crate::args::InfoArgs;
use crate::status::Status;
use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use std::io::Write as _;
use vm_accel::{AccelError, Capabilities, ProbeReport};

pub(crate) fn info(args: &InfoArgs) -> Result<Status> {
    let reports = vm_accel::probe();
    let text = if args.json {
        let backends: Vec<Value> = reports.iter().map(json_report).collect();
        format!("{:#}\n", json!({ "schema_version": 1, "backends": backends }))
    } else {
        reports.iter().map(table_row).collect()
    };
    std::io::stdout().write_all(text.as_bytes()).context("cannot write the report")?;
    Ok(Status::Ok)
}

/// What a capability is called, in the table and in JSON, and whether it is there.
fn features(caps: &Capabilities) -> [(&'static str, bool); 10] {
    [
        ("kernel_irqchip", caps.kernel_irqchip),
        ("split_irqchip", caps.split_irqchip),
        ("read_only_memory", caps.read_only_memory),
        ("dirty_log", caps.dirty_log),
        ("dirty_ring", caps.dirty_ring),
        ("irqfd", caps.irqfd),
        ("ioevent", caps.ioevent),
        ("guest_debug", caps.guest_debug),
        ("msr_exits", caps.msr_exits),
        ("sync_regs", caps.sync_regs),
    ]
}

/// What a user of this backend must know.
fn note(caps: &Capabilities) -> Option<&'static str> {
    (caps.emulates_ring0 == Some(true)).then_some(
        "this host emulates the guest's ring 0 instruction by instruction: operating systems do not boot here, \
         use --accel soft for them",
    )
}

/// The reason alone; the kind stands beside it.
fn reason(error: &AccelError) -> String {
    match error {
        AccelError::Unavailable { reason, .. } => reason.to_string(),
        other => other.to_string(),
    }
}

pub(crate) fn table_row(report: &ProbeReport) -> String {
    let kind = report.kind;
    match &report.outcome {
        Ok(caps) => {
            let (arch, cpus, bits) = (caps.guest_arch, caps.max_vcpus, caps.guest_phys_bits);
            if cpus == 0 {
                let cpus = caps.max_whole_vm_cpus;
                return format!("{kind:<5} available    whole machines ({arch}), up to {cpus} CPUs; not for `run`\n");
            }
            let list: Vec<&str> = features(caps).iter().filter(|(_, there)| *there).map(|(name, _)| *name).collect();
            let mut row = format!("{kind:<5} available    {arch} guests, up to {cpus} CPUs, {bits}-bit addresses\n");
            row += &format!("{:19}{}\n", "", list.join(", "));
            if let Some(note) = note(caps) {
                row += &format!("{:19}note: {note}\n", "");
            }
            row
        }
        Err(error) => format!("{kind:<5} unavailable  {}\n", reason(error)),
    }
}

fn json_report(report: &ProbeReport) -> Value {
    let kind = report.kind.name();
    match &report.outcome {
        Ok(caps) => json!({
            "kind": kind,
            "available": true,
            "guest_arch": caps.guest_arch.to_string(),
            "max_vcpus": caps.max_vcpus,
            "max_whole_vm_cpus": caps.max_whole_vm_cpus,
            "max_memory_slots": caps.max_memory_slots,
            "guest_phys_bits": caps.guest_phys_bits,
            "page_size": caps.page_size,
            "xsave_size": caps.xsave_size,
            "emulates_ring0": caps.emulates_ring0,
            "features": features(caps).into_iter().map(|(name, there)| (name.to_owned(), json!(there)))
                .collect::<serde_json::Map<_, _>>(),
            "note": note(caps),
        }),
        Err(error) => json!({ "kind": kind, "available": false, "reason": reason(error) }),
    }
}
