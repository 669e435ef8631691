//! Getting a vCPU back from a guest that never exits: another thread kicks it.
//!
//! A kick is sticky. One that comes before `run()` makes that `run()` return at once, so there is no moment at which it
//! could be lost and no need to know what the vCPU's thread is doing.
//!
//! ```text
//! cargo run -p vm-accel --example kick
//! ```

use std::thread;
use std::time::{Duration, Instant};
use vm_accel::x86_64::Segment;
use vm_accel::{Accel, AccelKind, GuestArch, GuestRegion, MemoryFlags, PlatformBackend, VcpuExit, VcpuResult};

/// `jmp $`
const GUEST: [u8; 2] = [0xeb, 0xfe];
const ENTRY: u64 = 0x1000;

fn main() -> VcpuResult<()> {
    let backends = AccelKind::ALL.into_iter().map(PlatformBackend::new);
    let Some(mut vm) = backends.filter_map(Result::ok).find(|vm| vm.capabilities().runs_vcpus(GuestArch::X86_64))
    else {
        println!("No backend here runs x86-64 guests.");
        return Ok(());
    };
    println!("Running on {}.", vm.kind());

    let memory = GuestRegion::anonymous(0x10000)?;
    memory.write(ENTRY, &GUEST)?;
    vm.map_memory(0, &memory, MemoryFlags::RAM)?;
    let mut vcpu = vm.create_vcpu(0)?;
    let unsupported = vcpu.unsupported("x86-64 state");
    let x86 = vcpu.as_x86().ok_or(unsupported)?;
    let mut sregs = x86.get_sregs()?;
    sregs.cs = Segment {
        segment_type: 0xb, // code, readable, accessed
        ..Segment::real_mode(0)
    };
    x86.set_sregs(&sregs)?;
    let mut regs = vcpu.get_regs()?;
    regs.pc = ENTRY;
    vcpu.set_regs(&regs)?;

    // The handle can be cloned and sent to any thread, and outlives the vCPU without harm.
    let kick = vcpu.kick_handle()?;

    kick.kick();
    let started = Instant::now();
    // A signal for this process ends a run with the same exit, which no caller needs to tell from a kick.
    assert_eq!(vcpu.run()?, VcpuExit::Interrupt);
    println!("Kicked before it ran: back after {:?}.", started.elapsed());

    let kicker = thread::spawn(move || {
        thread::sleep(Duration::from_millis(200));
        kick.kick();
    });
    let started = Instant::now();
    assert_eq!(vcpu.run()?, VcpuExit::Interrupt);
    println!("Kicked while it ran: back after {:?}.", started.elapsed());
    kicker.join().expect("the kicker does not panic");
    Ok(())
}
