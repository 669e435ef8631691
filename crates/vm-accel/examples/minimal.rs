//! The smallest virtual machine: a guest of five instructions in real mode reads a port, adds two, writes the sum to
//! another port and halts.
//!
//! ```text
//! cargo run -p vm-accel --example minimal
//! ```

use vm_accel::x86_64::Segment;
use vm_accel::{
    Accel, AccelKind, GuestArch, GuestRegion, IoDirection, MemoryFlags, PlatformBackend, VcpuExit, VcpuResult,
};

/// `in al, 0x10; add al, 2; out 0x11, al; hlt`
const GUEST: [u8; 7] = [0xe4, 0x10, 0x04, 0x02, 0xe6, 0x11, 0xf4];
const ENTRY: u64 = 0x1000;

fn main() -> VcpuResult<()> {
    // The first backend of this host that runs x86-64 guests.
    let backends = AccelKind::ALL.into_iter().map(PlatformBackend::new);
    let Some(mut vm) = backends.filter_map(Result::ok).find(|vm| vm.capabilities().runs_vcpus(GuestArch::X86_64))
    else {
        println!("No backend here runs x86-64 guests:");
        for report in vm_accel::probe() {
            println!("  {}: {:?}", report.kind, report.outcome);
        }
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

    loop {
        match vcpu.run()? {
            VcpuExit::Io { port, direction: IoDirection::In, .. } => {
                println!("The guest reads port {port:#x}; it gets 40.");
                vcpu.complete_read(&[40])?;
            }
            VcpuExit::Io { port, direction: IoDirection::Out, .. } => {
                println!("The guest writes {:?} to port {port:#x}.", vcpu.io_data()?)
            }
            VcpuExit::Halted => {
                println!("The guest halted.");
                return Ok(());
            }
            // Signals and kicks may end any run.
            VcpuExit::Interrupt => {}
            other => {
                println!("The guest left with {other:?}, which this example does not expect.");
                return Ok(());
            }
        }
    }
}
