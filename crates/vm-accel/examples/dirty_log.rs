//! Which pages were written since last time: what a snapshot or a live migration copies again.
//!
//! The log joins what the guest wrote with what the host wrote through [`GuestRegion`].
//!
//! ```text
//! cargo run -p vm-accel --example dirty_log
//! ```

use vm_accel::x86_64::Segment;
use vm_accel::{Accel, AccelKind, GuestArch, GuestRegion, MemoryFlags, PlatformBackend, VcpuExit, VcpuResult};

/// `mov byte [0x3000], 1; mov byte [0x5000], 1; mov byte [0x6fff], 1; hlt`
const GUEST: [u8; 16] = [0xc6, 0x06, 0x00, 0x30, 1, 0xc6, 0x06, 0x00, 0x50, 1, 0xc6, 0x06, 0xff, 0x6f, 1, 0xf4];
const ENTRY: u64 = 0x1000;

fn main() -> VcpuResult<()> {
    let backends = AccelKind::ALL.into_iter().map(PlatformBackend::new);
    let Some(mut vm) = backends.filter_map(Result::ok).find(|vm| {
        let caps = vm.capabilities();
        caps.runs_vcpus(GuestArch::X86_64) && caps.dirty_log
    }) else {
        println!("No backend here runs x86-64 guests and logs what they write.");
        return Ok(());
    };
    println!("Running on {}.", vm.kind());

    let memory = GuestRegion::anonymous(0x10000)?;
    memory.write(ENTRY, &GUEST)?;
    vm.map_memory(0, &memory, MemoryFlags::RAM | MemoryFlags::LOG_DIRTY)?;

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

    while vcpu.run()? == VcpuExit::Interrupt {}
    show("The guest wrote", &mut vm)?;

    memory.write(0x9ff0, &[0; 32])?;
    show("The host wrote", &mut vm)?;

    show("Nobody wrote", &mut vm)
}

/// Takes the log, which clears it. It may name pages that were only read; it never misses one that was written.
fn show(what: &str, vm: &mut PlatformBackend) -> VcpuResult<()> {
    let dirty = vm.take_dirty(0)?;
    let ranges: Vec<String> = dirty.ranges().map(|range| format!("{range:#x?}")).collect();
    println!("{what}: {} pages: {}", dirty.count(), ranges.join(", "));
    Ok(())
}
