//! Runs the ten programs of `vm_accel_guests::kernels` on the software CPU alone, checks what they answer, and prints
//! instructions per second. Usage: `kernels [NAME,...]`. (`cargo xtask kernels` compares with QEMU.)

use std::sync::Arc;
use std::time::Instant;

use vm_accel_guests::kernels::{BASE, KERNELS, STACK, flat};
use vm_accel_softcpu::state::{Segment, cr0, cr4, efer, seg};
use vm_accel_softcpu::{Config, Cpu, Exit, NoBus, Ram};

const RAM: usize = 128 << 20;
const TABLES: u64 = 0x780_0000;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let only = std::env::args().nth(1);
    let mut memory = vec![0u128; RAM / 16];
    let host = memory.as_mut_ptr().cast::<u8>();
    let put = |at: u64, bytes: &[u8]| {
        assert!(at as usize + bytes.len() <= RAM);
        // SAFETY: inside the allocation, as just checked; no reference to it is alive.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), host.add(at as usize), bytes.len()) };
    };
    put(BASE, &flat());
    // HLT, where the kernels return to.
    put(0x1000, &[0xf4]);
    // 4 KiB pages, one to one.
    put(TABLES, &(TABLES + 0x1003).to_le_bytes());
    put(TABLES + 0x1000, &(TABLES + 0x2003).to_le_bytes());
    for i in 0..64 {
        put(TABLES + 0x2000 + 8 * i, &(TABLES + 0x3003 + 0x1000 * i).to_le_bytes());
    }
    for page in 0..RAM as u64 / 4096 {
        put(TABLES + 0x3000 + 8 * page, &(page << 12 | 3).to_le_bytes());
    }
    let ram = Ram::new();
    // SAFETY: `memory` outlives the CPU below and is not touched otherwise.
    unsafe { ram.map(0, host, RAM as u64, true, Arc::new(()))? };
    let mut cpu = Cpu::new(0, Config::default(), ram, Box::new(NoBus));
    let (mut total, mut count) = (0.0f64, 0);
    for (number, kernel) in KERNELS.into_iter().enumerate() {
        let name = kernel.name;
        if only.as_ref().is_some_and(|only| !only.split(',').any(|x| x == name)) {
            continue;
        }
        put(STACK, &0x1000u64.to_le_bytes());
        cpu.update(|st| {
            let code = Segment { selector: 8, base: 0, limit: u32::MAX, access: 0xa09b, unusable: false };
            st.segs[..6].fill(Segment { selector: 16, access: 0xc093, ..code });
            st.segs[seg::CS] = code;
            st.cr0 = cr0::PE | cr0::PG | cr0::NE | cr0::ET | cr0::WP;
            st.cr3 = TABLES;
            st.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT;
            st.msr.efer = efer::LME | efer::LMA;
            st.rip = BASE;
            st.gpr[4] = STACK;
            st.gpr[7] = number as u64;
            st.gpr[6] = kernel.work.into();
            st.events.halted = false;
        });
        let before = cpu.instructions();
        let start = Instant::now();
        let exit = cpu.run(u64::MAX);
        let seconds = start.elapsed().as_secs_f64();
        if exit != Exit::Halted {
            return Err(format!("{name}: {exit:?} at {:#x}", cpu.state().rip).into());
        }
        if cpu.state().gpr[0] != kernel.checksum {
            return Err(format!("{name}: {:#x} is not {:#x}", cpu.state().gpr[0], kernel.checksum).into());
        }
        let done = cpu.instructions() - before;
        let mips = done as f64 / seconds / 1e6;
        println!("{name:7} {seconds:8.3} s {done:12} instructions {mips:7.0} MIPS");
        if !matches!(name, "rand" | "rep" | "nbody" | "matmul") {
            total += mips.ln();
            count += 1;
        }
    }
    if count > 0 {
        println!("integer geometric mean {:.0} MIPS", (total / f64::from(count)).exp());
    }
    drop(memory);
    Ok(())
}
