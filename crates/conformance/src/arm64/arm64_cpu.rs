//! Registers, exceptions, calls, power, kicks: what a CPU is beyond its loads and stores.

use super::machine::prepare;
use super::{Arm, poll};
use crate::harness::{Host, Outcome, cases, fail};
use vm_accel::aarch64::{self as aarch64, Aarch64Events, Aarch64FpuRegs, Aarch64MpState, PSTATE_EL1H_MASKED};
use vm_accel::{Accel, FpuRegs, IrqChip, MemoryFlags, VcpuExit, VcpuOps};
use vm_accel_guests::arm64::Index::Offset;
use vm_accel_guests::arm64::{Assembler, Cond, SP, ZR, layout, psci};

cases![
    general_registers_round_trip,
    stack_pointer_follows_pstate,
    vector_registers_round_trip,
    guest_and_host_share_vectors,
    system_registers,
    unknown_system_register,
    every_listed_register_reads,
    supervisor_call,
    undefined_instruction,
    power_off,
    reset_call,
    psci_version,
    unknown_call,
    service_call,
    secondary_begins_powered_off,
    psci_starts_a_cpu,
    reset_begins_anew,
    system_error_is_delivered,
    virtual_timer_registers,
    atomics_with_mmu,
    snapshot_moves_to_another_machine,
    kick_ends_a_spin,
    kick_ends_a_wait,
    kick_before_run_is_kept,
    kick_does_not_lose_an_answer,
    features_are_off_unless_asked_for,
    performance_monitors,
    pointer_authentication,
];

fn general_registers_round_trip(host: &Host) -> Outcome {
    let mut m = Arm::new(host, |a| a.report(ZR))?;
    let mut regs = m.vcpu.get_regs()?;
    for (n, gpr) in regs.gpr.iter_mut().enumerate() {
        *gpr = 0x0101_0101_0101_0101 * (n as u64 + 1);
    }
    regs.flags = PSTATE_EL1H_MASKED | 0xf << 28;
    m.vcpu.set_regs(&regs)?;
    assert_eq!(m.vcpu.get_regs()?, regs);
    m.expect_report(0)?;
    let mut after = m.vcpu.get_regs()?;
    after.gpr[16] = regs.gpr[16];
    assert_eq!(after.gpr, regs.gpr);
    assert_eq!(after.flags, regs.flags);
    Ok(())
}

fn stack_pointer_follows_pstate(host: &Host) -> Outcome {
    const EL1T: u64 = 0x3c4;
    let mut m = Arm::new(host, |a| {
        a.add(0, SP, 0);
        a.report(0);
    })?;
    let mut regs = m.vcpu.get_regs()?;
    m.arm().set_sys_reg(aarch64::SP_EL0, 0x1111)?;
    m.arm().set_sys_reg(aarch64::SP_EL1, 0x2222)?;
    assert_eq!(m.vcpu.get_regs()?.gpr[31], 0x2222);
    regs.flags = EL1T;
    regs.gpr[31] = 0x3330;
    m.vcpu.set_regs(&regs)?;
    assert_eq!(m.vcpu.get_regs()?.gpr[31], 0x3330);
    assert_eq!(m.arm().get_sys_reg(aarch64::SP_EL0)?, 0x3330);
    assert_eq!(m.arm().get_sys_reg(aarch64::SP_EL1)?, 0x2222);
    m.expect_report(0x3330)
}

fn pattern() -> Aarch64FpuRegs {
    let mut fpu = Aarch64FpuRegs { fpcr: 0x0100_0000, fpsr: 0x1f, ..Default::default() };
    for (n, v) in fpu.v.iter_mut().enumerate() {
        *v = 0x0123_4567_89ab_cdef_0011_2233_4455_6600 ^ ((n as u128) << 64 | n as u128);
    }
    fpu
}

fn vector_registers_round_trip(host: &Host) -> Outcome {
    let mut m = Arm::new(host, |a| a.report(ZR))?;
    m.vcpu.set_fpu_regs(&FpuRegs::Aarch64(pattern()))?;
    assert_eq!(m.vcpu.get_fpu_regs()?, FpuRegs::Aarch64(pattern()));
    m.expect_report(0)?;
    assert_eq!(m.vcpu.get_fpu_regs()?, FpuRegs::Aarch64(pattern()));
    assert!(m.vcpu.set_fpu_regs(&FpuRegs::X86(Default::default())).is_err());
    Ok(())
}

fn guest_and_host_share_vectors(host: &Host) -> Outcome {
    let mut m = Arm::new(host, |a| {
        a.mov(1, layout::DATA);
        a.store_vector(16, 5, 1, Offset(0));
        a.load_vector(16, 6, 1, Offset(16));
        a.report(ZR);
    })?;
    m.vcpu.set_fpu_regs(&FpuRegs::Aarch64(pattern()))?;
    m.ram.write(layout::DATA - layout::RAM + 16, &[0x77; 16])?;
    m.expect_report(0)?;
    let mut stored = [0; 16];
    m.ram.read(layout::DATA - layout::RAM, &mut stored)?;
    assert_eq!(u128::from_le_bytes(stored), pattern().v[5]);
    let mut expected = pattern();
    expected.v[6] = u128::from_le_bytes([0x77; 16]);
    assert_eq!(m.vcpu.get_fpu_regs()?, FpuRegs::Aarch64(expected));
    Ok(())
}

fn system_registers(host: &Host) -> Outcome {
    let mut m = Arm::new(host, |a| {
        a.mrs(0, aarch64::TPIDR_EL1);
        a.report(0);
        a.mov(0, 0x5678);
        a.msr(aarch64::TPIDR_EL0, 0);
        a.mrs(0, aarch64::MPIDR_EL1);
        a.report(0);
    })?;
    m.arm().set_sys_reg(aarch64::TPIDR_EL1, 0x1234)?;
    assert_eq!(m.arm().get_sys_reg(aarch64::TPIDR_EL1)?, 0x1234);
    m.expect_report(0x1234)?;
    let mpidr = m.report()?;
    assert_eq!(m.arm().get_sys_reg(aarch64::TPIDR_EL0)?, 0x5678);
    assert_eq!(m.arm().get_sys_reg(aarch64::MPIDR_EL1)?, mpidr);
    assert_eq!(mpidr & aarch64::MPIDR_AFFINITY, aarch64::affinity(0));
    Ok(())
}

fn unknown_system_register(host: &Host) -> Outcome {
    let mut m = Arm::new(host, |a| a.report(ZR))?;
    let none = aarch64::sys_reg(3, 7, 15, 15, 7);
    assert!(matches!(m.arm().get_sys_reg(none), Err(vm_accel::AccelError::InvalidArgument { .. })));
    assert!(m.arm().set_sys_reg(none, 1).is_err());
    m.expect_report(0)
}

fn every_listed_register_reads(host: &Host) -> Outcome {
    let mut m = Arm::new(host, |a| a.report(ZR))?;
    let arm = m.arm();
    let list = arm.list_sys_regs()?;
    for register in [aarch64::SP_EL1, aarch64::SCTLR_EL1, aarch64::CNTV_CVAL_EL0, aarch64::CNTVCT_EL0] {
        assert!(list.contains(&register), "{register:#x} is not listed");
    }
    for register in list {
        arm.get_sys_reg(register)?;
    }
    Ok(())
}

fn supervisor_call(host: &Host) -> Outcome {
    let mut m = Arm::new(host, |a| {
        a.svc(0x42);
        a.mrs(0, aarch64::ESR_EL1);
        a.report(0);
    })?;
    // A synchronous exception from the same level with its own stack pointer.
    m.expect_report(0x200)?;
    let esr = m.report()?;
    assert_eq!((esr >> 26, esr & 0xffff), (0x15, 0x42));
    Ok(())
}

fn undefined_instruction(host: &Host) -> Outcome {
    let mut m = Arm::new(host, |a| a.udf())?;
    m.expect_report(0x200)?;
    assert_eq!(m.arm().get_sys_reg(aarch64::ESR_EL1)? >> 26, 0);
    assert_eq!(m.arm().get_sys_reg(aarch64::ELR_EL1)?, layout::CODE);
    assert_eq!(m.arm().get_sys_reg(aarch64::SPSR_EL1)?, PSTATE_EL1H_MASKED);
    Ok(())
}

fn power_off(host: &Host) -> Outcome {
    Arm::new(host, |a| a.psci(psci::SYSTEM_OFF))?.expect(VcpuExit::Shutdown)
}

fn reset_call(host: &Host) -> Outcome {
    Arm::new(host, |a| a.psci(psci::SYSTEM_RESET))?.expect(VcpuExit::Reset)
}

fn psci_version(host: &Host) -> Outcome {
    let mut m = Arm::new(host, |a| {
        a.psci(psci::VERSION);
        a.report(0);
    })?;
    let version = m.report()?;
    assert!(version >= 2, "PSCI {version:#x} is older than 0.2");
    Ok(())
}

fn unknown_call(host: &Host) -> Outcome {
    let mut m = Arm::new(host, |a| {
        a.psci(0x8400_7777);
        a.report(0);
    })?;
    assert_eq!(m.report()? as u32, u32::MAX, "NOT_SUPPORTED");
    Ok(())
}

/// A call to the OEM's services: the VMM's to answer, where the platform can hand it over.
fn service_call(host: &Host) -> Outcome {
    let mut m = Arm::new(host, |a| {
        a.mov(1, 5);
        a.psci(0xc300_0001);
        a.report(0);
    })?;
    if !host.caps.aarch64_calls {
        assert_eq!(m.report()? as u32, u32::MAX, "NOT_SUPPORTED");
        return Ok(());
    }
    m.expect(VcpuExit::SystemCall)?;
    let mut regs = m.vcpu.get_regs()?;
    assert_eq!(regs.gpr[..2], [0xc300_0001, 5]);
    regs.gpr[0] = 77;
    m.vcpu.set_regs(&regs)?;
    m.expect_report(77)
}

fn secondary_begins_powered_off(host: &Host) -> Outcome {
    let mut m = Arm::new(host, |a| a.report(ZR))?;
    assert_eq!(m.arm().get_mp_state()?, Aarch64MpState::Running);
    let mut other = m.vm.create_vcpu(1)?;
    host.watch.add(other.kick_handle()?);
    prepare(&mut *other)?;
    let arm = other.as_aarch64().expect("aarch64");
    assert_eq!(arm.get_mp_state()?, Aarch64MpState::PoweredOff);
    assert_eq!(arm.get_sys_reg(aarch64::MPIDR_EL1)? & aarch64::MPIDR_AFFINITY, aarch64::affinity(1));
    // It can be switched on by hand.
    arm.set_mp_state(Aarch64MpState::Running)?;
    let mut regs = other.get_regs()?;
    regs.pc = layout::CODE;
    other.set_regs(&regs)?;
    // On a thread of its own: some platforms have one vCPU per thread.
    let exit = std::thread::spawn(move || other.run()).join().expect("no panic")?;
    assert_eq!(exit, VcpuExit::Mmio { addr: layout::REPORT, size: 8, is_write: true });
    m.expect_report(0)
}

/// CPU 0 switches CPU 1 on, which gets its context and switches the machine off.
fn psci_starts_a_cpu(host: &Host) -> Outcome {
    let mut m = Arm::new(host, |a| {
        let entry = a.label();
        a.mov(1, aarch64::affinity(1));
        a.adr(2, entry);
        a.mov(3, 0xcafe);
        a.psci(psci::CPU_ON);
        a.report(0);
        let spin = a.bound();
        a.b(spin);
        a.bind(entry);
        a.mov(1, layout::DEVICE);
        a.store(8, 0, 1, Offset(0));
        a.load(8, 2, 1, Offset(8));
        a.psci(psci::SYSTEM_OFF);
    })?;
    let mut other = m.vm.create_vcpu(1)?;
    host.watch.add(other.kick_handle()?);
    // SYSTEM_OFF stops CPU 0 wherever it is, so CPU 1 is held back until CPU 0 has reported.
    let (reported, wait) = std::sync::mpsc::channel::<()>();
    let second = std::thread::spawn(move || -> Result<(u64, VcpuExit), vm_accel::AccelError> {
        let mut context = 0;
        loop {
            match other.run()? {
                VcpuExit::Mmio { is_write: true, .. } => {
                    context = u64::from_le_bytes(other.io_data()?.try_into().unwrap_or_default());
                }
                VcpuExit::Mmio { .. } => {
                    // If CPU 0 fails, its end of the channel is dropped.
                    let _ = wait.recv();
                    other.complete_read(&[0; 8])?;
                }
                exit => return Ok((context, exit)),
            }
        }
    });
    m.expect_report(0)?;
    drop(reported);
    let ended = second.join().expect("the second CPU's thread does not panic")?;
    assert_eq!(ended, (0xcafe, VcpuExit::Shutdown));
    Ok(())
}

fn reset_begins_anew(host: &Host) -> Outcome {
    let mut m = Arm::new(host, |a| {
        a.mov(5, 1);
        a.msr(aarch64::TPIDR_EL1, 5);
        a.report(5);
    })?;
    m.expect_report(1)?;
    assert_eq!(m.vcpu.quiesce()?, VcpuExit::Interrupt);
    m.arm().reset()?;
    let regs = m.vcpu.get_regs()?;
    assert_eq!((regs.gpr[5], regs.pc, regs.flags), (0, 0, PSTATE_EL1H_MASKED));
    assert_eq!(m.arm().get_sys_reg(aarch64::VBAR_EL1)?, 0);
    Ok(())
}

fn system_error_is_delivered(host: &Host) -> Outcome {
    let mut m = Arm::new(host, |a| {
        a.report(ZR);
        a.daif_clear(4);
        a.nop();
        a.report(ZR);
    })?;
    m.expect_report(0)?;
    assert_eq!(m.arm().get_events()?, Aarch64Events::default());
    let events = Aarch64Events { serror_pending: true, ..Default::default() };
    m.arm().set_events(&events)?;
    assert!(m.arm().get_events()?.serror_pending);
    m.expect_report(0x380)?;
    assert!(!m.arm().get_events()?.serror_pending);
    m.expect_report(0)
}

fn virtual_timer_registers(host: &Host) -> Outcome {
    let mut m = Arm::new(host, |a| {
        a.mrs(0, aarch64::CNTV_CVAL_EL0);
        a.report(0);
        a.mrs(0, aarch64::CNTVCT_EL0);
        a.report(0);
    })?;
    let mut timer = m.arm().get_virtual_timer()?;
    timer.compare = 0x1234_5678_9abc;
    timer.count = 1 << 50;
    m.arm().set_virtual_timer(&timer)?;
    m.expect_report(0x1234_5678_9abc)?;
    let count = m.report()?;
    assert_eq!(count >> 50, 1, "the count {count:#x} does not go on from where it was set");
    assert!(m.arm().get_virtual_timer()?.count >= count);
    Ok(())
}

fn atomics_with_mmu(host: &Host) -> Outcome {
    let mut m = Arm::new(host, |a| {
        a.mov(1, layout::DATA);
        a.mov(2, 5);
        let again = a.bound();
        a.word(0xc85f_7c23); // ldxr x3, [x1]
        a.add_reg(3, 3, 2);
        a.word(0xc804_7c23); // stxr w4, x3, [x1]
        a.cbnz(4, again);
        a.load(8, 0, 1, Offset(0));
        a.report(0);
    })?;
    m.mmu_on()?;
    m.ram.write(layout::DATA - layout::RAM, &37u64.to_le_bytes())?;
    m.expect_report(42)
}

/// A long sum in general and vector registers, with an access to a device now and then.
fn summing(a: &mut Assembler) {
    a.mov(1, layout::DATA);
    a.mov(5, 0);
    a.mov(6, 0);
    let again = a.bound();
    a.add(5, 5, 7);
    a.add_reg(6, 6, 5);
    a.word(0x4ee0_8400); // add v0.2d, v0.2d, v0.2d, wrapping
    a.store(8, 6, 1, Offset(0));
    a.report(6);
    a.mov(7, 7 * 40);
    a.cmp_reg(5, 7);
    a.b_if(Cond::Ne, again);
    a.mrs(8, aarch64::TPIDR_EL1);
    a.report(8);
    a.psci(psci::SYSTEM_OFF);
}

fn snapshot_moves_to_another_machine(host: &Host) -> Outcome {
    let mut m = Arm::new(host, summing)?;
    m.arm().set_sys_reg(aarch64::TPIDR_EL1, 0xabcd)?;
    let mut fpu = Aarch64FpuRegs::default();
    fpu.v[0] = 3 << 64 | 1;
    m.vcpu.set_fpu_regs(&FpuRegs::Aarch64(fpu))?;
    let mut total = 0;
    for round in 1..=40 {
        total += 7 * round;
        m.expect_report(total)?;
        if round % 8 == 0 {
            assert_eq!(m.vcpu.quiesce()?, VcpuExit::Interrupt);
            let registers = m.arm().save_registers()?;
            let events = m.arm().get_events()?;
            let mut page = vec![0; layout::RAM_SIZE as usize];
            m.ram.read(0, &mut page)?;
            // Some platforms have one virtual machine at a time.
            drop(m);
            m = Arm::new(host, summing)?;
            m.ram.write(0, &page)?;
            m.arm().restore_registers(&registers)?;
            m.arm().set_events(&events)?;
        }
    }
    m.expect_report(0xabcd)?;
    assert_eq!(m.read_u64(layout::DATA)?, total);
    let FpuRegs::Aarch64(fpu) = m.vcpu.get_fpu_regs()? else {
        fail!("an aarch64 vCPU has aarch64 registers");
    };
    assert_eq!(fpu.v[0], 3 << (64 + 40) | 1 << 40);
    m.expect(VcpuExit::Shutdown)
}

/// Runs `vcpu` on another thread until it returns, and kicks it when the guest has begun.
fn kicked(host: &Host, write: impl FnOnce(&mut Assembler)) -> Outcome {
    let mut m = Arm::new(host, write)?;
    // With caches on, so that the host sees the guest's store at once on every CPU.
    m.mmu_on()?;
    let Arm { mut vcpu, vm, ram, .. } = m;
    let kick = vcpu.kick_handle()?;
    let runner = std::thread::spawn(move || vcpu.run().map(|exit| (exit, vcpu)));
    poll(host, "the guest's first store", || {
        let mut byte = [0];
        ram.read(layout::DATA - layout::RAM, &mut byte).is_ok() && byte != [0]
    })?;
    kick.kick();
    let (exit, _vcpu) = runner.join().expect("the vCPU's thread does not panic")?;
    assert_eq!(exit, VcpuExit::Interrupt);
    drop(vm);
    Ok(())
}

fn begin(a: &mut Assembler) {
    a.mov(1, layout::DATA);
    a.mov(2, 1);
    a.store(8, 2, 1, Offset(0));
}

fn kick_ends_a_spin(host: &Host) -> Outcome {
    kicked(host, |a| {
        begin(a);
        let spin = a.bound();
        a.b(spin);
    })
}

fn kick_ends_a_wait(host: &Host) -> Outcome {
    kicked(host, |a| {
        begin(a);
        let wait = a.bound();
        a.wfi();
        a.b(wait);
    })
}

fn kick_before_run_is_kept(host: &Host) -> Outcome {
    let mut m = Arm::new(host, |a| a.report(ZR))?;
    let kick = m.vcpu.kick_handle()?;
    kick.kick();
    kick.kick();
    assert_eq!(m.vcpu.run()?, VcpuExit::Interrupt);
    assert_eq!(m.vcpu.get_regs()?.pc, layout::CODE);
    m.expect_report(0)
}

/// A kick between an access and the next run must not repeat or drop it.
fn kick_does_not_lose_an_answer(host: &Host) -> Outcome {
    let mut m = Arm::new(host, |a| {
        a.mov(1, layout::DEVICE);
        a.load_pair(8, [2, 3], 1, Offset(0));
        a.load(8, 4, 1, Offset(0));
        a.report(4);
    })?;
    let kick = m.vcpu.kick_handle()?;
    m.expect_read(layout::DEVICE, &[1; 8])?;
    kick.kick();
    // The second half of the pair comes without entering the guest; the kick is kept for the entry.
    m.expect_read(layout::DEVICE + 8, &[2; 8])?;
    assert_eq!(m.vcpu.run()?, VcpuExit::Interrupt);
    assert_eq!(m.x(3)?, 0x0202_0202_0202_0202);
    m.expect_read(layout::DEVICE, &[3; 8])?;
    kick.kick();
    assert_eq!(m.vcpu.run()?, VcpuExit::Interrupt);
    m.expect_report(0x0303_0303_0303_0303)
}

fn features_are_off_unless_asked_for(host: &Host) -> Outcome {
    let mut m = Arm::new(host, |a| {
        a.mrs(0, aarch64::ID_AA64PFR0_EL1);
        a.report(0);
    })?;
    assert!(m.arm().features().is_empty());
    assert_eq!(m.report()? >> 32 & 0xf, 0, "SVE is shown");
    let late = m.vm.set_aarch64_features(aarch64::Aarch64Features::empty());
    assert!(late.is_err(), "features after the first vCPU");
    Ok(())
}

/// A vCPU and the machine that it belongs to.
type Guest = (Box<dyn VcpuOps>, Box<dyn Accel>);

/// A machine with these features, with a program that does not matter.
fn with_features(
    host: &Host,
    features: aarch64::Aarch64Features,
    write: impl FnOnce(&mut Assembler),
) -> Outcome<Option<Guest>> {
    let mut vm = host.vm()?;
    if !host.caps.aarch64_features.contains(features) {
        assert!(vm.set_aarch64_features(features).is_err());
        return Ok(None);
    }
    vm.set_aarch64_features(features)?;
    vm.create_irqchip(IrqChip::Kernel)?;
    let ram = vm_accel::GuestRegion::anonymous(layout::RAM_SIZE)?;
    let code = vm_accel_guests::arm64::program(write);
    ram.write(layout::CODE - layout::RAM, &code)?;
    vm.map_memory(layout::RAM, &ram, MemoryFlags::RAM)?;
    let mut vcpu = vm.create_vcpu(0)?;
    prepare(&mut *vcpu)?;
    let mut regs = vcpu.get_regs()?;
    regs.pc = layout::CODE;
    vcpu.set_regs(&regs)?;
    host.watch.add(vcpu.kick_handle()?);
    assert_eq!(vcpu.as_aarch64().map(|arm| arm.features()), Some(features));
    Ok(Some((vcpu, vm)))
}

fn written(vcpu: &mut dyn VcpuOps) -> Outcome<u64> {
    let exit = vcpu.run()?;
    if !matches!(exit, VcpuExit::Mmio { addr: layout::REPORT, .. }) {
        fail!("exit is {exit:x?}");
    }
    Ok(u64::from_le_bytes(vcpu.io_data()?.try_into().expect("8 bytes")))
}

fn performance_monitors(host: &Host) -> Outcome {
    let dfr0 = aarch64::sys_reg(3, 0, 0, 5, 0);
    let machine = with_features(host, aarch64::Aarch64Features::PMU, |a| {
        a.mrs(0, dfr0);
        a.report(0);
    })?;
    if let Some((mut vcpu, _vm)) = machine {
        let version = written(&mut *vcpu)? >> 8 & 0xf;
        assert!((1..0xf).contains(&version), "PMUVer is {version}");
    }
    Ok(())
}

fn pointer_authentication(host: &Host) -> Outcome {
    let isar1 = aarch64::sys_reg(3, 0, 0, 6, 1);
    let features = aarch64::Aarch64Features::POINTER_AUTHENTICATION;
    let machine = with_features(host, features, |a| {
        a.mrs(0, isar1);
        a.report(0);
    })?;
    if let Some((mut vcpu, _vm)) = machine {
        assert_ne!(written(&mut *vcpu)? & 0xff00_0ff0, 0, "neither APA, API, GPA nor GPI");
    }
    Ok(())
}
