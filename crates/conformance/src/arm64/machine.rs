//! A virtual machine with one aarch64 program in it, and the expectations that cases are made of.

use crate::harness::{Host, Outcome, fail};
use vm_accel::aarch64::{
    Aarch64Vcpu, CPACR_EL1, MAIR_EL1, PSTATE_EL1H_MASKED, SCTLR_EL1, TCR_EL1, TTBR0_EL1, VBAR_EL1,
};
use vm_accel::{Accel, GuestRegion, IrqChip, MemoryFlags, VcpuExit, VcpuOps};
use vm_accel_guests::arm64::{
    Assembler, IDENTITY_MAIR, IDENTITY_TCR, identity_tables, layout, program, reporting_vectors,
};

pub(crate) struct Arm {
    // The vCPU goes first, as in a VMM.
    pub(crate) vcpu: Box<dyn VcpuOps>,
    pub(crate) vm: Box<dyn Accel>,
    /// RAM at [`layout::RAM`].
    pub(crate) ram: GuestRegion,
    expired: Box<dyn Fn() -> bool>,
}

impl Arm {
    /// A program on a machine without interrupt controllers.
    pub(crate) fn new(host: &Host, write: impl FnOnce(&mut Assembler)) -> Outcome<Self> {
        Self::build(host, IrqChip::None, MemoryFlags::RAM, write)
    }

    /// A program on a machine with a GIC.
    pub(crate) fn with_gic(host: &Host, write: impl FnOnce(&mut Assembler)) -> Outcome<Self> {
        Self::build(host, IrqChip::Kernel, MemoryFlags::RAM, write)
    }

    pub(crate) fn build(
        host: &Host,
        chip: IrqChip,
        flags: MemoryFlags,
        write: impl FnOnce(&mut Assembler),
    ) -> Outcome<Self> {
        let mut vm = host.vm()?;
        vm.create_irqchip(chip)?;
        let ram = GuestRegion::anonymous(layout::RAM_SIZE)?;
        ram.write(layout::CODE - layout::RAM, &program(write))?;
        ram.write(layout::VECTORS - layout::RAM, &reporting_vectors())?;
        ram.write(layout::TABLES - layout::RAM, &identity_tables())?;
        vm.map_memory(layout::RAM, &ram, flags)?;
        let mut vcpu = vm.create_vcpu(0)?;
        prepare(&mut *vcpu)?;
        let mut regs = vcpu.get_regs()?;
        regs.pc = layout::CODE;
        regs.flags = PSTATE_EL1H_MASKED;
        regs.gpr[31] = layout::STACK;
        vcpu.set_regs(&regs)?;
        host.watch.add(vcpu.kick_handle()?);
        let watch = host.watch.clone();
        Ok(Self { vcpu, vm, ram, expired: Box::new(move || watch.expired()) })
    }

    pub(crate) fn arm(&mut self) -> &mut dyn Aarch64Vcpu {
        self.vcpu.as_aarch64().expect("an aarch64 vCPU has the aarch64 groups")
    }

    /// Switches the MMU on, with the first 4 GiB mapped one to one.
    pub(crate) fn mmu_on(&mut self) -> Outcome {
        let arm = self.arm();
        arm.set_sys_reg(MAIR_EL1, IDENTITY_MAIR)?;
        arm.set_sys_reg(TCR_EL1, IDENTITY_TCR)?;
        arm.set_sys_reg(TTBR0_EL1, layout::TABLES)?;
        let sctlr = arm.get_sys_reg(SCTLR_EL1)?;
        // M, C, I.
        arm.set_sys_reg(SCTLR_EL1, sctlr | 1 | 1 << 2 | 1 << 12)?;
        Ok(())
    }

    /// Runs to the next exit. An unasked-for `Interrupt` is the watchdog's or a bug; either way the case fails.
    pub(crate) fn run(&mut self) -> Outcome<VcpuExit> {
        let result = self.vcpu.run();
        if (self.expired)() {
            fail!("the deadline passed; last: {result:?}, {}", self.state());
        }
        match result {
            Ok(VcpuExit::Interrupt) => fail!("run() returned Interrupt without a kick"),
            Ok(exit) => Ok(exit),
            Err(error) => fail!("run(): {error} [{error:?}], {}", self.state()),
        }
    }

    pub(crate) fn expect(&mut self, expected: VcpuExit) -> Outcome {
        let exit = self.run()?;
        if exit != expected {
            fail!("exit is {exit:x?}, expected {expected:x?}; {}", self.state());
        }
        Ok(())
    }

    pub(crate) fn expect_write(&mut self, addr: u64, data: &[u8]) -> Outcome {
        self.expect(VcpuExit::Mmio { addr, size: data.len() as u8, is_write: true })?;
        let written = self.vcpu.io_data()?;
        if written != data {
            fail!("the write to {addr:#x} is {written:02x?}, expected {data:02x?}");
        }
        Ok(())
    }

    pub(crate) fn expect_read(&mut self, addr: u64, data: &[u8]) -> Outcome {
        self.expect(VcpuExit::Mmio { addr, size: data.len() as u8, is_write: false })?;
        self.vcpu.complete_read(data)?;
        Ok(())
    }

    /// The program reports this number.
    pub(crate) fn expect_report(&mut self, value: u64) -> Outcome {
        self.expect_write(layout::REPORT, &value.to_le_bytes())
    }

    /// The program reports some number.
    pub(crate) fn report(&mut self) -> Outcome<u64> {
        self.expect(VcpuExit::Mmio { addr: layout::REPORT, size: 8, is_write: true })?;
        let data = self.vcpu.io_data()?;
        Ok(u64::from_le_bytes(data.try_into().expect("the exit has 8 bytes")))
    }

    pub(crate) fn x(&self, n: usize) -> Outcome<u64> {
        Ok(self.vcpu.get_regs()?.gpr[n])
    }

    pub(crate) fn read_u64(&self, gpa: u64) -> Outcome<u64> {
        let mut bytes = [0; 8];
        self.ram.read(gpa - layout::RAM, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn state(&self) -> String {
        let data = self.vcpu.io_data().map(<[u8]>::to_vec);
        format!("data {data:02x?}, regs {:x?}", self.vcpu.get_regs())
    }
}

/// Gives a vCPU its vectors, and floating point.
pub(crate) fn prepare(vcpu: &mut dyn VcpuOps) -> Outcome {
    let arm = vcpu.as_aarch64().expect("an aarch64 vCPU has the aarch64 groups");
    arm.set_sys_reg(VBAR_EL1, layout::VECTORS)?;
    arm.set_sys_reg(CPACR_EL1, 3 << 20)?;
    Ok(())
}

/// Waits until `done`, as long as the case has time.
pub(crate) fn poll(host: &Host, what: &str, mut done: impl FnMut() -> bool) -> Outcome {
    while !done() {
        if !host.in_time() {
            fail!("{what} did not happen");
        }
        std::thread::yield_now();
    }
    Ok(())
}
