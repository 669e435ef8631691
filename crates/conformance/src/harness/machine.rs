//! A virtual machine with one vCPU and a world from `vm-accel-guests` in it, and the expectations that cases are made of.

use super::{Host, Outcome, fail};
use std::sync::Arc;
use vm_accel::x86_64::{DescriptorTable, Reg, Segment, X86Sregs, X86Vcpu};
use vm_accel::{Accel, GuestRegion, GuestRegs, IoDirection, IrqChip, MemoryFlags, VcpuExit, VcpuOps};
use vm_accel_guests::Bits;
use vm_accel_guests::asm::CodeAssembler;
use vm_accel_guests::world::{CpuState, REPORT_PORT, Report, SegmentState, World, layout};

pub(crate) struct Machine {
    // The vCPU goes first, as in a VMM; other orders are cases of their own.
    pub(crate) vcpu: Box<dyn VcpuOps>,
    pub(crate) vm: Box<dyn Accel>,
    /// RAM from address 0, [`layout::RAM_SIZE`] bytes.
    pub(crate) ram: GuestRegion,
    watch: Arc<super::watch::Watch>,
}

/// A segment as the library describes it.
pub(crate) fn segment(state: &SegmentState) -> Segment {
    let bit = |n: u16| state.access >> n & 1 != 0;
    Segment {
        base: state.base,
        limit: state.limit,
        selector: state.selector,
        segment_type: (state.access & 0xf) as u8,
        code_or_data: bit(4),
        dpl: (state.access >> 5 & 3) as u8,
        present: bit(7),
        available: bit(12),
        long: bit(13),
        db: bit(14),
        granularity: bit(15),
        unusable: false,
    }
}

/// The special registers of a world's CPU; what the world does not say stays as it was after reset.
pub(crate) fn sregs(cpu: &CpuState, reset: &X86Sregs) -> X86Sregs {
    let data = segment(&cpu.data);
    X86Sregs {
        cs: segment(&cpu.cs),
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        tr: segment(&cpu.tr),
        gdt: DescriptorTable { base: cpu.gdt.0, limit: cpu.gdt.1 },
        idt: DescriptorTable { base: cpu.idt.0, limit: cpu.idt.1 },
        cr0: cpu.cr0,
        cr3: cpu.cr3,
        cr4: cpu.cr4,
        efer: cpu.efer,
        ..*reset
    }
}

/// Gives a vCPU the CPUID that the host supports, and a world's registers.
pub(crate) fn set_up_vcpu(vcpu: &mut dyn VcpuOps, cpu: &CpuState) -> Outcome {
    let x86 = x86(vcpu);
    let cpuid = x86.supported_cpuid()?;
    x86.set_cpuid(&cpuid)?;
    let reset = x86.get_sregs()?;
    x86.set_sregs(&sregs(cpu, &reset))?;
    let mut regs = GuestRegs { pc: cpu.rip, flags: cpu.rflags, ..GuestRegs::default() };
    regs.gpr[Reg::Rsp as usize] = cpu.rsp;
    vcpu.set_regs(&regs)?;
    Ok(())
}

/// The x86-64 groups of a vCPU whose guest is known to be x86-64.
pub(crate) fn x86(vcpu: &mut dyn VcpuOps) -> &mut dyn X86Vcpu {
    vcpu.as_x86().expect("an x86-64 vCPU has the x86-64 groups")
}

impl Machine {
    /// A world without interrupt controllers.
    pub(crate) fn new(host: &Host, world: &World) -> Outcome<Self> {
        Self::with_chip(host, world, IrqChip::None)
    }

    pub(crate) fn with_chip(host: &Host, world: &World, chip: IrqChip) -> Outcome<Self> {
        Self::build(host, world, chip, MemoryFlags::RAM)
    }

    pub(crate) fn build(host: &Host, world: &World, chip: IrqChip, flags: MemoryFlags) -> Outcome<Self> {
        let mut vm = host.vm()?;
        vm.create_irqchip(chip)?;
        let ram = GuestRegion::anonymous(layout::RAM_SIZE)?;
        for (gpa, bytes) in &world.memory {
            ram.write(*gpa, bytes)?;
        }
        vm.map_memory(0, &ram, flags)?;
        let mut vcpu = vm.create_vcpu(0)?;
        set_up_vcpu(&mut *vcpu, &world.cpu)?;
        host.watch.add(vcpu.kick_handle()?);
        Ok(Self { vcpu, vm, ram, watch: host.watch.clone() })
    }

    /// A long-mode ring 0 guest with this program.
    pub(crate) fn long(
        host: &Host,
        write: impl FnOnce(&mut CodeAssembler) -> Result<(), vm_accel_guests::IcedError>,
    ) -> Outcome<Self> {
        Self::new(host, &World::long().code(write))
    }

    pub(crate) fn x86(&mut self) -> &mut dyn X86Vcpu {
        x86(&mut *self.vcpu)
    }

    /// Runs to the next exit. An unasked-for `Interrupt` is the watchdog's or a bug; either way the case fails.
    pub(crate) fn run(&mut self) -> Outcome<VcpuExit> {
        let result = self.vcpu.run();
        if self.watch.expired() {
            fail!("the deadline passed; last: {result:?}, {:x?}", self.vcpu.get_regs());
        }
        match result {
            Ok(VcpuExit::Interrupt) => fail!("run() returned Interrupt without a kick"),
            Ok(exit) => Ok(exit),
            Err(error) => fail!("run(): {error} [{error:?}], {:x?}", self.vcpu.get_regs()),
        }
    }

    pub(crate) fn expect(&mut self, expected: VcpuExit) -> Outcome {
        let exit = self.run()?;
        if exit != expected {
            fail!("exit is {exit:x?}, expected {expected:x?}; {}", self.state());
        }
        Ok(())
    }

    pub(crate) fn expect_halted(&mut self) -> Outcome {
        self.expect(VcpuExit::Halted)
    }

    /// An OUT of `size`-byte elements; answers all the bytes.
    pub(crate) fn expect_out(&mut self, port: u16, size: u8) -> Outcome<Vec<u8>> {
        self.expect(VcpuExit::Io { port, direction: IoDirection::Out, size })?;
        Ok(self.vcpu.io_data()?.to_vec())
    }

    /// An OUT of exactly these bytes as one element.
    pub(crate) fn expect_out_data(&mut self, port: u16, data: &[u8]) -> Outcome {
        let written = self.expect_out(port, data.len() as u8)?;
        if written != data {
            fail!("OUT to {port:#x} wrote {written:02x?}, expected {data:02x?}");
        }
        Ok(())
    }

    /// An IN of one element, answered with `data`.
    pub(crate) fn expect_in(&mut self, port: u16, data: &[u8]) -> Outcome {
        self.expect(VcpuExit::Io { port, direction: IoDirection::In, size: data.len() as u8 })?;
        self.vcpu.complete_read(data)?;
        Ok(())
    }

    pub(crate) fn expect_mmio_write(&mut self, addr: u64, data: &[u8]) -> Outcome {
        self.expect(VcpuExit::Mmio { addr, size: data.len() as u8, is_write: true })?;
        let written = self.vcpu.io_data()?;
        if written != data {
            fail!("MMIO write to {addr:#x} is {written:02x?}, expected {data:02x?}");
        }
        Ok(())
    }

    pub(crate) fn expect_mmio_read(&mut self, addr: u64, data: &[u8]) -> Outcome {
        self.expect(VcpuExit::Mmio { addr, size: data.len() as u8, is_write: false })?;
        self.vcpu.complete_read(data)?;
        Ok(())
    }

    /// The handlers of the world report this vector.
    pub(crate) fn expect_vector(&mut self, vector: u8) -> Outcome<Report> {
        self.expect_out_data(REPORT_PORT, &[vector])?;
        let report = self.report()?;
        if report.vector != u64::from(vector) {
            fail!("the handler reports {report:x?}, expected vector {vector:#x}");
        }
        Ok(report)
    }

    /// Finishes what is pending; it must not be more than one access.
    pub(crate) fn quiesce(&mut self) -> Outcome {
        match self.vcpu.quiesce()? {
            VcpuExit::Interrupt => Ok(()),
            other => fail!("quiesce() found a further access: {other:x?}"),
        }
    }

    pub(crate) fn report(&self) -> Outcome<Report> {
        let mut bytes = [0; Report::SIZE];
        self.ram.read(layout::REPORT, &mut bytes)?;
        Ok(Report::parse(&bytes))
    }

    pub(crate) fn gpr(&self, reg: Reg) -> Outcome<u64> {
        Ok(self.vcpu.get_regs()?.gpr[reg as usize])
    }

    pub(crate) fn set_gpr(&mut self, reg: Reg, value: u64) -> Outcome {
        let mut regs = self.vcpu.get_regs()?;
        regs.gpr[reg as usize] = value;
        self.vcpu.set_regs(&regs)?;
        Ok(())
    }

    pub(crate) fn read<const N: usize>(&self, gpa: u64) -> Outcome<[u8; N]> {
        let mut bytes = [0; N];
        self.ram.read(gpa, &mut bytes)?;
        Ok(bytes)
    }

    pub(crate) fn read_u64(&self, gpa: u64) -> Outcome<u64> {
        Ok(u64::from_le_bytes(self.read(gpa)?))
    }

    pub(crate) fn write(&self, gpa: u64, data: &[u8]) -> Outcome {
        Ok(self.ram.write(gpa, data)?)
    }

    /// Where the guest is, for messages.
    fn state(&mut self) -> String {
        let data = self.vcpu.io_data().map(<[u8]>::to_vec);
        format!("data {data:02x?}, regs {:x?}, report {:x?}", self.vcpu.get_regs(), self.report())
    }
}

/// Assembles 64-bit code for any address.
pub(crate) fn assemble64(
    at: u64,
    write: impl FnOnce(&mut CodeAssembler) -> Result<(), vm_accel_guests::IcedError>,
) -> Vec<u8> {
    vm_accel_guests::assemble(Bits::B64, at, write)
}
