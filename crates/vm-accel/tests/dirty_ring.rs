//! The conformance cases about memory on KVM with a dirty ring per vCPU instead of the bitmap.
#![cfg(target_os = "linux")]

use vm_accel::platform::kvm::AccelKvm;
use vm_accel::{Accel, AccelError, AccelKind, Capabilities, VcpuResult};
use vm_accel_conformance::{Backend, MEMORY, plan};

/// As small as kernels allow, so that it overflows.
const ENTRIES: u32 = 1024;

const KVM_WITH_RING: Backend = Backend {
    name: "kvm-ring",
    probe,
    create: || {
        let mut vm = AccelKvm::new()?;
        vm.enable_dirty_ring(ENTRIES)?;
        Ok(Box::new(vm))
    },
    moves_threads: true,
    native: true,
    serial: false,
};

fn probe() -> VcpuResult<Capabilities> {
    let caps = vm_accel::probe_kind(AccelKind::Kvm)?;
    if !caps.dirty_ring {
        return Err(AccelError::Unsupported { kind: Some(AccelKind::Kvm), what: "a dirty ring" });
    }
    Ok(caps)
}

#[test]
fn memory_with_a_dirty_ring() {
    let plan = plan(&MEMORY, &[KVM_WITH_RING]);
    for absent in &plan.absent {
        println!("{}: skipped: {}", absent.backend, absent.why);
    }
    for test in plan.tests {
        let name = test.name.clone();
        match &test.skip {
            Some(reason) => println!("{name}: skipped: {reason}"),
            None => test.run().unwrap_or_else(|why| panic!("{name}: {why}")),
        }
    }
}

#[test]
fn a_ring_comes_before_the_vcpus() {
    let Ok(mut vm) = AccelKvm::new() else {
        println!("skipped: no KVM here");
        return;
    };
    if !vm.capabilities().dirty_ring {
        println!("skipped: no dirty ring here");
        return;
    }
    assert!(matches!(vm.enable_dirty_ring(3), Err(AccelError::InvalidArgument { .. })), "not a power of two");
    let _vcpu = vm.create_vcpu(0).expect("KVM gives a vCPU");
    assert!(matches!(vm.enable_dirty_ring(ENTRIES), Err(AccelError::InvalidArgument { .. })));
}
