//! Creating, moving and dropping virtual machines and vCPUs, in every order; code that changes under the guest; the demo.

use crate::harness::machine::{assemble64, set_up_vcpu};
use crate::harness::{Host, Machine, Outcome, cases, fail};
use vm_accel::x86_64::{MpState, Reg, X86Events};
use vm_accel::{AccelError, ExitHandler, GuestRegion, GuestRegs, MemoryFlags, VcpuExit, VcpuResult};
use vm_accel_guests::asm::*;
use vm_accel_guests::world::{World, layout};

cases![
    vm_dropped_before_vcpu,
    vcpu_dropped_before_vm,
    nothing_but_a_vm,
    two_vms_at_once[SeveralVms],
    two_vms_from_two_threads[ThreadMoves],
    many_vms_one_after_the_other,
    vcpu_moves_between_threads[ThreadMoves],
    vcpu_moves_with_an_access_pending[ThreadMoves],
    duplicate_vcpu_id_is_refused,
    impossible_vcpu_ids_are_refused,
    vcpu_knows_its_id_and_kind,
    irqchip_comes_before_vcpus[LocalApic],
    run_after_a_triple_fault,
    errors_leave_registers_readable,
    host_patches_code_between_runs,
    guest_writes_code,
    guest_rewrites_code_it_ran,
    capabilities_match_the_probe,
    demo_guest_reports_and_exits,
];

fn counting_exits(host: &Host) -> Outcome<Machine> {
    Machine::long(host, |a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.inc(ebx)?;
        a.out(0x10, al)?;
        a.jmp(again)
    })
}

const OUT: VcpuExit = VcpuExit::Io { port: 0x10, direction: vm_accel::IoDirection::Out, size: 1 };

/// The vCPU keeps what it needs alive.
fn vm_dropped_before_vcpu(host: &Host) -> Outcome {
    let mut m = counting_exits(host)?;
    m.expect_out(0x10, 1)?;
    let Machine { mut vcpu, vm, ram, .. } = m;
    drop(vm);
    drop(ram);
    assert_eq!(vcpu.run()?, OUT);
    assert_eq!(vcpu.run()?, OUT);
    assert_eq!(vcpu.get_regs()?.gpr[Reg::Rbx as usize], 3);
    Ok(())
}

fn vcpu_dropped_before_vm(host: &Host) -> Outcome {
    let mut m = counting_exits(host)?;
    m.expect_out(0x10, 1)?;
    let Machine { vcpu, mut vm, .. } = m;
    drop(vcpu);
    // The virtual machine is still one.
    let region = GuestRegion::anonymous(0x1000)?;
    vm.map_memory(0x4000_0000, &region, MemoryFlags::RAM)?;
    vm.unmap_memory(0)?;
    Ok(())
}

fn nothing_but_a_vm(host: &Host) -> Outcome {
    drop(host.vm()?);
    let mut vm = host.vm()?;
    drop(vm.create_vcpu(0)?);
    drop(vm);
    let mut vm = host.vm()?;
    vm.map_memory(0, &GuestRegion::anonymous(0x1000)?, MemoryFlags::RAM)?;
    Ok(())
}

fn two_vms_at_once(host: &Host) -> Outcome {
    let mut machines = [counting_exits(host)?, counting_exits(host)?];
    for round in 1..6u64 {
        for (i, m) in machines.iter_mut().enumerate() {
            for _ in 0..=i {
                m.expect_out(0x10, 1)?;
            }
            m.quiesce()?;
            assert_eq!(m.gpr(Reg::Rbx)?, round * (i as u64 + 1));
        }
    }
    // What one writes does not appear in the other.
    machines[0].write(layout::DATA, &[1])?;
    assert_eq!(machines[1].read(layout::DATA)?, [0]);
    let [first, mut second] = machines;
    drop(first);
    second.expect_out(0x10, 1)?;
    Ok(())
}

fn two_vms_from_two_threads(host: &Host) -> Outcome {
    std::thread::scope(|scope| {
        let threads = [500u64, 700].map(|count| {
            scope.spawn(move || -> Outcome {
                let mut m = counting_exits(host)?;
                for _ in 0..count {
                    m.expect_out(0x10, 1)?;
                }
                assert_eq!(m.gpr(Reg::Rbx)?, count);
                Ok(())
            })
        });
        threads.into_iter().try_for_each(|thread| thread.join().expect("no panic"))
    })
}

fn many_vms_one_after_the_other(host: &Host) -> Outcome {
    for i in 0..20 {
        let mut m = counting_exits(host)?;
        m.expect_out(0x10, 1)?;
        if i % 2 == 0 {
            drop(m.vm);
        } else {
            drop(m.vcpu);
        }
    }
    Ok(())
}

fn vcpu_moves_between_threads(host: &Host) -> Outcome {
    let m = counting_exits(host)?;
    let mut vcpu = m.vcpu;
    for round in 1..10u64 {
        vcpu = std::thread::scope(|scope| {
            let other = scope.spawn(move || {
                let exit = vcpu.run();
                (exit, vcpu)
            });
            let (exit, vcpu) = other.join().expect("no panic");
            assert_eq!(exit, Ok(OUT));
            vcpu
        });
        assert_eq!(vcpu.get_regs()?.gpr[Reg::Rbx as usize], round);
        // Registers set here count over there.
        let mut regs = vcpu.get_regs()?;
        regs.gpr[Reg::R9 as usize] = round;
        vcpu.set_regs(&regs)?;
    }
    assert_eq!(vcpu.get_regs()?.gpr[Reg::R9 as usize], 9);
    Ok(())
}

fn vcpu_moves_with_an_access_pending(host: &Host) -> Outcome {
    let mut m = Machine::long(host, |a| {
        a.in_(al, 0x10)?;
        a.mov(esi, layout::MMIO as u32)?;
        a.mov(edi, layout::MMIO as u32 + 0x1000)?;
        a.movsb()?;
        a.hlt()
    })?;
    m.expect_in(0x10, &[5])?;
    let read = VcpuExit::Mmio { addr: layout::MMIO, size: 1, is_write: false };
    let write = VcpuExit::Mmio { addr: layout::MMIO + 0x1000, size: 1, is_write: true };
    let mut vcpu = m.vcpu;
    for (expected, answer) in [(read, true), (write, false), (VcpuExit::Halted, false)] {
        vcpu = std::thread::scope(|scope| {
            let other = scope.spawn(move || {
                let exit = vcpu.run();
                (exit, vcpu)
            });
            let (exit, vcpu) = other.join().expect("no panic");
            assert_eq!(exit, Ok(expected));
            vcpu
        });
        if answer {
            vcpu.complete_read(&[0x99])?;
        } else if expected == write {
            assert_eq!(vcpu.io_data()?, [0x99]);
        }
    }
    assert_eq!(vcpu.get_regs()?.gpr[Reg::Rax as usize], 5);
    Ok(())
}

fn refused<T>(result: VcpuResult<T>) {
    match result {
        Err(AccelError::InvalidArgument { .. }) => {}
        Err(other) => panic!("not an invalid argument: {other:?}"),
        Ok(_) => panic!("was not refused"),
    }
}

fn duplicate_vcpu_id_is_refused(host: &Host) -> Outcome {
    let mut m = counting_exits(host)?;
    refused(m.vm.create_vcpu(0));
    m.expect_out(0x10, 1)?;
    let second = m.vm.create_vcpu(1)?;
    refused(m.vm.create_vcpu(1));
    assert_eq!(second.get_id(), 1);
    m.expect_out(0x10, 1)?;
    Ok(())
}

fn impossible_vcpu_ids_are_refused(host: &Host) -> Outcome {
    let mut vm = host.vm()?;
    for id in [host.caps.max_vcpu_id, u32::MAX] {
        refused(vm.create_vcpu(id));
    }
    vm.create_vcpu(0)?;
    Ok(())
}

fn vcpu_knows_its_id_and_kind(host: &Host) -> Outcome {
    let mut vm = host.vm()?;
    let vcpus = [vm.create_vcpu(0)?, vm.create_vcpu(1)?];
    for (id, vcpu) in (0..).zip(&vcpus) {
        assert_eq!((vcpu.get_id(), vcpu.kind()), (id, Some(vm.kind())));
    }
    Ok(())
}

fn irqchip_comes_before_vcpus(host: &Host) -> Outcome {
    host.with_local_apics(|chip| {
        let mut vm = host.vm()?;
        let vcpu = vm.create_vcpu(0)?;
        refused(vm.create_irqchip(chip));
        // Some platforms have one virtual machine at a time.
        drop((vcpu, vm));
        let mut vm = host.vm()?;
        vm.create_irqchip(chip)?;
        refused(vm.create_irqchip(chip));
        vm.create_vcpu(0)?;
        Ok(())
    })
}

/// The VMM may set up the CPU anew and go on.
fn run_after_a_triple_fault(host: &Host) -> Outcome {
    let mut world = World::long().code(|a| a.ud2());
    world.cpu.idt.1 = 0;
    let mut m = Machine::new(host, &world)?;
    m.expect(VcpuExit::TripleFault)?;
    m.write(layout::CODE, &assemble64(layout::CODE, |a| a.hlt()))?;
    let reset = m.x86().get_sregs()?;
    let fresh = World::long();
    m.x86().set_sregs(&crate::harness::machine::sregs(&fresh.cpu, &reset))?;
    m.vcpu.set_regs(&GuestRegs { pc: fresh.cpu.rip, flags: fresh.cpu.rflags, ..GuestRegs::default() })?;
    m.x86().set_events(&X86Events::default())?;
    m.x86().set_mp_state(MpState::Runnable)?;
    m.expect_halted()
}

/// The CPU fetches code where nothing is mapped: whatever the platform calls that, the VMM can look at the registers.
fn errors_leave_registers_readable(host: &Host) -> Outcome {
    let mut m = Machine::long(host, |a| {
        a.mov(ebx, 0x77)?;
        a.mov(eax, layout::MMIO as u32)?;
        a.jmp(rax)
    })?;
    match m.vcpu.run() {
        Err(AccelError::Emulation { pc, .. }) => assert_eq!(pc, layout::MMIO),
        // Some hand it over as an access.
        Ok(VcpuExit::Mmio { addr, is_write, .. }) => {
            assert_eq!((addr, is_write), (layout::MMIO, false));
        }
        // Some fetch all ones, as from a bus on which nobody answers; that is no instruction.
        Ok(VcpuExit::Io { port: 0xee, .. }) => {
            let report = m.report()?;
            assert_eq!((report.vector, report.ip), (6, layout::MMIO));
            assert_eq!(m.gpr(Reg::Rbx)?, 0x77);
            return Ok(());
        }
        other => fail!("run() returned {other:?}"),
    }
    let regs = m.vcpu.get_regs()?;
    assert_eq!((regs.pc, regs.gpr[Reg::Rbx as usize]), (layout::MMIO, 0x77));
    Ok(())
}

fn host_patches_code_between_runs(host: &Host) -> Outcome {
    let mut m = Machine::long(host, |a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.mov(al, 1)?;
        a.hlt()?;
        a.jmp(again)
    })?;
    for value in 1..20u8 {
        m.write(layout::CODE + 1, &[value])?;
        m.expect_halted()?;
        assert_eq!(m.gpr(Reg::Rax)?, u64::from(value));
    }
    Ok(())
}

fn guest_writes_code(host: &Host) -> Outcome {
    let target = layout::CODE + 0x1000;
    let bytes = assemble64(target, |a| {
        a.mov(eax, 0x42)?;
        a.ret()
    });
    let world = World::long().put(layout::DATA, bytes).code(|a| {
        a.mov(esi, layout::DATA as u32)?;
        a.mov(edi, target as u32)?;
        a.mov(ecx, 6)?;
        a.rep().movsb()?;
        a.call(target)?;
        a.hlt()
    });
    let mut m = Machine::new(host, &world)?;
    m.expect_halted()?;
    assert_eq!(m.gpr(Reg::Rax)?, 0x42);
    Ok(())
}

/// A routine runs, is rewritten by the guest, and runs again. The stores and the call are far apart, with an exit in
/// between, which serialises (Intel SDM vol. 3, 9.1.3).
fn guest_rewrites_code_it_ran(host: &Host) -> Outcome {
    let target = layout::CODE + 0x1000;
    let world = World::long()
        .put(
            target,
            assemble64(target, |a| {
                a.mov(al, 1)?;
                a.ret()
            }),
        )
        .code(|a| {
            let mut again = a.create_label();
            a.mov(edi, target as u32)?;
            a.set_label(&mut again)?;
            a.call(target)?;
            a.out(0x10, al)?;
            a.inc(byte_ptr(rdi + 1))?;
            a.out(0x11, al)?;
            a.jmp(again)
        });
    let mut m = Machine::new(host, &world)?;
    for value in 1..20u8 {
        m.expect_out_data(0x10, &[value])?;
        m.expect_out(0x11, 1)?;
    }
    Ok(())
}

fn capabilities_match_the_probe(host: &Host) -> Outcome {
    let vm = host.vm()?;
    let caps = vm.capabilities();
    // Only the probe examines ring 0.
    let probed = vm_accel::Capabilities::clone(&host.caps);
    let mut examined = caps.clone();
    examined.emulates_ring0 = probed.emulates_ring0;
    assert_eq!(examined, probed);
    assert!(caps.max_vcpus >= 1 && caps.max_vcpu_id >= caps.max_vcpus.min(1));
    assert!(caps.max_memory_slots >= 1 && caps.page_size.is_power_of_two());
    Ok(())
}

/// The serial line and the exit port of the demo.
#[derive(Default)]
struct DemoBoard {
    text: String,
    reads: u32,
    status: Option<u8>,
}

impl ExitHandler for DemoBoard {
    fn io_read(&mut self, port: u16, _: u8, data: &mut [u8]) -> VcpuResult<()> {
        match port {
            // Line status: the transmitter is empty.
            0x3fd => data.fill(0x60),
            vm_accel_guests::demo::COUNT_PORT => self.reads += 1,
            _ => {}
        }
        Ok(())
    }

    fn io_write(&mut self, port: u16, _: u8, data: &[u8]) -> VcpuResult<()> {
        match port {
            // Characters begin after the set-up, which ends with the modem control register.
            0x3fc => self.text.clear(),
            0x3f8 => self.text.extend(data.iter().map(|byte| char::from(*byte))),
            vm_accel_guests::demo::EXIT_PORT => self.status = data.first().copied(),
            _ => {}
        }
        Ok(())
    }

    fn stop_at(&mut self, exit: VcpuExit) -> VcpuResult<bool> {
        Ok(exit != VcpuExit::Interrupt)
    }
}

/// The demo guest of the command, on a board of two ports.
fn demo_guest_reports_and_exits(host: &Host) -> Outcome {
    let file = vm_accel_guests::demo();
    let word = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| file[at + i]));
    let mut vm = host.vm()?;
    let ram = GuestRegion::anonymous(4 << 20)?;
    vm.map_memory(0, &ram, MemoryFlags::RAM)?;
    // ELF: entry at 24, one program header at 52 with offset, address and size at 4, 8 and 16.
    ram.write(word(52 + 8).into(), &file[word(52 + 4) as usize..][..word(52 + 16) as usize])?;
    // Multiboot information: memory map of one entry at DATA + 0x100.
    let (info, map) = (layout::DATA, layout::DATA + 0x100);
    ram.write(info, &(1u32 << 6).to_le_bytes())?;
    ram.write(info + 44, &24u32.to_le_bytes())?;
    ram.write(info + 48, &(map as u32).to_le_bytes())?;
    ram.write(map, &20u32.to_le_bytes())?;
    ram.write(map + 12, &(4u64 << 20).to_le_bytes())?;
    ram.write(map + 20, &1u32.to_le_bytes())?;

    let world = World::protected();
    for (gpa, bytes) in &world.memory {
        ram.write(*gpa, bytes)?;
    }
    let mut vcpu = vm.create_vcpu(0)?;
    set_up_vcpu(&mut *vcpu, &world.cpu)?;
    let mut regs = GuestRegs { pc: word(24).into(), flags: 2, ..GuestRegs::default() };
    regs.gpr[Reg::Rax as usize] = 0x2bad_b002;
    regs.gpr[Reg::Rbx as usize] = info;
    vcpu.set_regs(&regs)?;
    host.watch.add(vcpu.kick_handle()?);

    let mut board = DemoBoard::default();
    assert_eq!(vcpu.run_with(&mut board)?, VcpuExit::Halted);
    for expected in [
        "Hello from the vm-accel demo guest.\r\n",
        "CPU vendor:  ",
        "Hypervisor:  ",
        "  0x0000000000000000-0x00000000003fffff usable\r\n",
        "1000 port reads",
        "Done.\r\n",
    ] {
        assert!(board.text.contains(expected), "{expected:?} is not in {:?}", board.text);
    }
    assert_eq!((board.reads, board.status), (vm_accel_guests::demo::COUNT, Some(0)));
    Ok(())
}
