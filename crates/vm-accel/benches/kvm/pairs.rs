//! The pairs: the library's way and the raw way of the same work.

use criterion::Criterion;
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuExit as RawExit, VcpuFd, VmFd};
use std::hint::black_box;
use std::time::{Duration, Instant};
use vm_accel::platform::kvm::AccelKvm;
use vm_accel::x86_64::{Reg, Segment};
use vm_accel::{Accel, GuestRegion, GuestRegs, MemoryFlags, VcpuExit, VcpuOps};

/// `again: out 0x10, al; jmp again`
const GUEST: [u8; 4] = [0xe6, 0x10, 0xeb, 0xfc];
const ENTRY: u64 = 0x1000;
const MEMORY: u64 = 0x10_0000;
/// Rounds of a pair, and how long one side of a round takes at least.
const ROUNDS: usize = 41;
const ROUND: Duration = Duration::from_millis(15);

fn guest_memory() -> GuestRegion {
    let memory = GuestRegion::anonymous(MEMORY).expect("guest memory");
    memory.write(ENTRY, &GUEST).expect("guest code");
    memory
}

fn library_vm(memory: &GuestRegion) -> (AccelKvm, Box<dyn VcpuOps>) {
    let mut vm = AccelKvm::new().expect("a virtual machine");
    vm.map_memory(0, memory, MemoryFlags::RAM).expect("a mapping");
    let mut vcpu = vm.create_vcpu(0).expect("a vCPU");
    let x86 = vcpu.as_x86().expect("an x86-64 vCPU");
    let mut sregs = x86.get_sregs().expect("special registers");
    sregs.cs = Segment { segment_type: 0xb, ..Segment::real_mode(0) };
    x86.set_sregs(&sregs).expect("special registers");
    vcpu.set_regs(&GuestRegs { pc: ENTRY, flags: 2, ..GuestRegs::default() }).expect("registers");
    (vm, vcpu)
}

fn raw_vm(kvm: &Kvm, memory: &GuestRegion) -> (VmFd, VcpuFd) {
    let vm = kvm.create_vm().expect("a virtual machine");
    // What a careful VMM sets on Intel CPUs, and the library does too.
    vm.set_identity_map_address(0xfeff_c000).expect("identity map");
    vm.set_tss_address(0xfeff_d000).expect("TSS");
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: memory.size(),
        userspace_addr: memory.as_ptr() as u64,
    };
    // SAFETY: every caller keeps `memory` until after the virtual machine is dropped.
    unsafe { vm.set_user_memory_region(region) }.expect("a mapping");
    let vcpu = vm.create_vcpu(0).expect("a vCPU");
    let mut sregs = vcpu.get_sregs().expect("special registers");
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs).expect("special registers");
    let mut regs = vcpu.get_regs().expect("registers");
    (regs.rip, regs.rflags) = (ENTRY, 2);
    vcpu.set_regs(&regs).expect("registers");
    (vm, vcpu)
}

fn library_exit(vcpu: &mut dyn VcpuOps) {
    match vcpu.run() {
        Ok(VcpuExit::Io { port: 0x10, .. }) => {
            black_box(vcpu.io_data().expect("data"));
        }
        other => panic!("{other:?}"),
    }
}

fn raw_exit(vcpu: &mut VcpuFd) {
    match vcpu.run() {
        Ok(RawExit::IoOut(0x10, data)) => {
            black_box(data);
        }
        other => panic!("{other:?}"),
    }
}

fn library_exit_and_regs(vcpu: &mut dyn VcpuOps) {
    library_exit(vcpu);
    let mut regs = vcpu.get_regs().expect("registers");
    regs.gpr[Reg::Rbx as usize] += 1;
    vcpu.set_regs(&regs).expect("registers");
}

fn raw_exit_and_regs(vcpu: &mut VcpuFd) {
    raw_exit(vcpu);
    let mut regs = vcpu.get_regs().expect("registers");
    regs.rbx += 1;
    vcpu.set_regs(&regs).expect("registers");
}

/// Time of `n` calls.
fn time(n: u32, mut work: impl FnMut()) -> Duration {
    let start = Instant::now();
    for _ in 0..n {
        work();
    }
    start.elapsed()
}

/// Runs both sides in turns; prints the median ratio and the middle half of the ratios.
fn compare(name: &str, criterion: &mut Criterion, mut library: impl FnMut(), mut raw: impl FnMut()) {
    let mut n = 1;
    while time(n, &mut raw) < ROUND {
        n *= 2;
    }
    let mut ratios: Vec<f64> = (0..ROUNDS)
        .map(|round| {
            // Alternate who goes first, so that drift does not favour a side.
            let (ours, theirs) = if round % 2 == 0 {
                let ours = time(n, &mut library);
                (ours, time(n, &mut raw))
            } else {
                let theirs = time(n, &mut raw);
                (time(n, &mut library), theirs)
            };
            ours.as_secs_f64() / theirs.as_secs_f64()
        })
        .collect();
    ratios.sort_by(f64::total_cmp);
    let at = |part: usize| ratios[ROUNDS * part / 4];
    println!("ratio {name}: {:.3} of raw kvm-ioctls (middle half {:.3} to {:.3})", at(2), at(1), at(3));
    let mut group = criterion.benchmark_group(name);
    group.bench_function("vm-accel", |bencher| bencher.iter(&mut library));
    group.bench_function("kvm-ioctls", |bencher| bencher.iter(&mut raw));
    group.finish();
}

pub(crate) fn main() {
    let kvm = match (AccelKvm::new(), Kvm::new()) {
        (Ok(_), Ok(kvm)) => kvm,
        (Err(why), _) => return println!("skipped: {why}"),
        (_, Err(why)) => return println!("skipped: {why}"),
    };
    let mut criterion = Criterion::default()
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2))
        .configure_from_args();
    {
        let memory = guest_memory();
        let (_vm, mut ours) = library_vm(&memory);
        let (_raw_vm, mut theirs) = raw_vm(&kvm, &memory);
        compare("exit", &mut criterion, || library_exit(ours.as_mut()), || raw_exit(&mut theirs));
        compare(
            "exit + read and write all GPRs",
            &mut criterion,
            || library_exit_and_regs(ours.as_mut()),
            || raw_exit_and_regs(&mut theirs),
        );
    }
    let memory = guest_memory();
    compare(
        "life cycle: create, first exit, drop",
        &mut criterion,
        || {
            let (vm, mut vcpu) = library_vm(&memory);
            library_exit(vcpu.as_mut());
            drop((vcpu, vm));
        },
        || {
            let (vm, mut vcpu) = raw_vm(&kvm, &memory);
            raw_exit(&mut vcpu);
            drop((vcpu, vm));
        },
    );
    criterion.final_summary();
}
