use super::*;
use crate::vcpu_common::IoDirection;
use crate::x86_64::Reg;

fn vcpu(script: Script) -> ScriptedVcpu {
    ScriptedVcpu::new(0, script).unwrap()
}

#[track_caller]
fn assert_complains<T: std::fmt::Debug>(result: VcpuResult<T>, text: &str) {
    let error = result.unwrap_err();
    assert!(matches!(error, AccelError::InvalidArgument { .. }), "{error:?}");
    assert!(error.to_string().contains(text), "{error} lacks {text}");
}

#[test]
fn exits_come_in_order_with_their_data() {
    let mut vcpu = vcpu(
        Script::new()
            .io_out(0x3f8, 2, [1, 2, 3, 4])
            .mmio_read(0xfee0_0000, Answer::Any(4))
            .mmio_write(0x1000, [5])
            .exit(VcpuExit::TripleFault),
    );
    let direction = IoDirection::Out;
    assert_eq!(vcpu.run().unwrap(), VcpuExit::Io { port: 0x3f8, direction, size: 2 });
    assert_eq!(vcpu.io_data().unwrap(), [1, 2, 3, 4]);
    let (addr, size) = (0xfee0_0000, 4);
    assert_eq!(vcpu.run().unwrap(), VcpuExit::Mmio { addr, size, is_write: false });
    assert_complains(vcpu.io_data(), "not a write");
    let pending = vcpu.pending_access().unwrap();
    assert_eq!((pending.addr, pending.len, pending.is_write, pending.answered), (addr, 4, false, false));
    vcpu.complete_read(&[0; 4]).unwrap();
    assert!(vcpu.pending_access().unwrap().answered);
    assert_eq!(vcpu.run().unwrap(), VcpuExit::Mmio { addr: 0x1000, size: 1, is_write: true });
    assert_eq!(vcpu.steps_left(), 1);
    assert_complains(vcpu.finish(), "1 steps");
    assert_eq!(vcpu.run().unwrap(), VcpuExit::TripleFault);
    assert!(vcpu.pending_access().is_none());
    vcpu.finish().unwrap();
}

#[test]
fn unanswered_reads_are_pending_until_answered() {
    let mut vcpu = vcpu(Script::new().io_in(0x60, 1, Answer::exactly([9])).exit(VcpuExit::Halted));
    vcpu.run().unwrap();
    let pending = AccelError::PendingRead { addr: 0x60, len: 1 };
    assert_eq!(vcpu.run(), Err(pending.clone()));
    assert_eq!(vcpu.quiesce(), Err(pending.clone()));
    assert_complains(vcpu.complete_read(&[9, 9]), "reads 1 bytes, not 2");
    vcpu.complete_read(&[9]).unwrap();
    assert_complains(vcpu.complete_read(&[9]), "no read is pending");
    assert_eq!(vcpu.run().unwrap(), VcpuExit::Halted);
    assert_complains(vcpu.complete_read(&[9]), "no read is pending");
    vcpu.finish().unwrap();
}

#[test]
fn a_last_read_without_answer_is_not_finished() {
    let mut vcpu = vcpu(Script::new().io_in(0x60, 1, Answer::Any(1)));
    vcpu.run().unwrap();
    assert_eq!(vcpu.finish(), Err(AccelError::PendingRead { addr: 0x60, len: 1 }));
}

#[test]
fn a_deviation_stays_although_its_error_is_swallowed() {
    let mut vcpu = vcpu(Script::new().io_in(0x60, 1, Answer::exactly([9])).exit(VcpuExit::Halted));
    vcpu.run().unwrap();
    assert_complains(vcpu.complete_read(&[8]), "step 1");
    assert_complains(vcpu.run(), "expects [09]");
    assert_complains(vcpu.quiesce(), "expects [09]");
    assert_complains(vcpu.finish(), "expects [09]");
}

#[test]
fn running_beyond_the_end_is_a_deviation() {
    let mut vcpu = vcpu(Script::new().exit(VcpuExit::Halted));
    vcpu.run().unwrap();
    vcpu.finish().unwrap();
    assert_complains(vcpu.run(), "at its end");
    assert_complains(vcpu.finish(), "at its end");
}

#[test]
fn registers_are_set_by_the_guest_and_expected_of_the_vmm() {
    let script = Script::new()
        .set_reg(Reg::Rax as usize, 5)
        .set_reg(GuestRegs::PC, 0x1000)
        .exit(VcpuExit::SystemCall)
        .expect_reg(Reg::Rax as usize, 6)
        .exit(VcpuExit::Halted);
    let mut good = vcpu(script.clone());
    good.run().unwrap();
    let mut regs = good.get_regs().unwrap();
    assert_eq!((regs.gpr[Reg::Rax as usize], regs.pc), (5, 0x1000));
    regs.gpr[Reg::Rax as usize] = 6;
    good.set_regs(&regs).unwrap();
    assert_eq!(good.run().unwrap(), VcpuExit::Halted);
    good.finish().unwrap();
    let mut bad = vcpu(script);
    bad.run().unwrap();
    assert_complains(bad.run(), "register 0 is 0x5");
}

#[test]
fn kicks_are_sticky_coalesce_and_wait_for_an_instruction_under_way() {
    let mut vcpu =
        vcpu(Script::new().mmio_write(0x1000, [1]).same_instruction().mmio_write(0x2000, [2]).exit(VcpuExit::Halted));
    let kick = vcpu.kick_handle().unwrap();
    kick.kick();
    kick.clone().kick();
    assert_eq!(vcpu.run().unwrap(), VcpuExit::Interrupt);
    vcpu.run().unwrap();
    kick.kick();
    assert!(matches!(vcpu.run().unwrap(), VcpuExit::Mmio { addr: 0x2000, .. }));
    assert_eq!(vcpu.run().unwrap(), VcpuExit::Interrupt);
    assert_eq!(vcpu.run().unwrap(), VcpuExit::Halted);
    drop(vcpu);
    kick.kick();
}

#[test]
fn quiesce_gives_the_rest_of_the_instruction_and_keeps_kicks() {
    let mut vcpu = vcpu(
        Script::new()
            .mmio_read(0x1000, Answer::Any(1))
            .same_instruction()
            .mmio_write(0x2000, [2])
            .exit(VcpuExit::Halted),
    );
    vcpu.run().unwrap();
    vcpu.kick_handle().unwrap().kick();
    vcpu.complete_read(&[0]).unwrap();
    assert!(matches!(vcpu.quiesce().unwrap(), VcpuExit::Mmio { addr: 0x2000, .. }));
    for _ in 0..3 {
        assert_eq!(vcpu.quiesce().unwrap(), VcpuExit::Interrupt);
    }
    assert_eq!(vcpu.run().unwrap(), VcpuExit::Interrupt);
    assert_eq!(vcpu.run().unwrap(), VcpuExit::Halted);
    vcpu.finish().unwrap();
}

#[test]
fn msr_accesses_are_accepted_or_refused_as_the_script_says() {
    let script = Script::new()
        .msr_read(0x10, Answer::Refused)
        .msr_write(0x11, 0x1234, true)
        .msr_write(0x12, 0x5678, false)
        .io_out(0x80, 1, [0]);
    let mut good = vcpu(script.clone());
    good.run().unwrap();
    assert_eq!(good.pending_access().unwrap().len, 8);
    good.fail_access().unwrap();
    good.run().unwrap();
    assert_eq!(good.io_data().unwrap(), 0x1234u64.to_le_bytes());
    good.fail_access().unwrap();
    good.run().unwrap();
    good.run().unwrap();
    assert_complains(good.fail_access(), "only accesses to MSRs");
    good.finish().unwrap();

    let mut answers = vcpu(script.clone());
    answers.run().unwrap();
    assert_complains(answers.complete_read(&[0; 8]), "had to refuse");
    let mut accepts = vcpu(Script::new().msr_write(0x11, 0, true).exit(VcpuExit::Halted));
    accepts.run().unwrap();
    assert_complains(accepts.finish(), "had to refuse");
    assert_complains(accepts.run(), "had to refuse");
    assert_complains(accepts.finish(), "had to refuse");
    let mut refuses = vcpu(Script::new().msr_write(0x12, 0, false));
    refuses.run().unwrap();
    assert_complains(refuses.fail_access(), "had to accept");
}

#[test]
fn errors_and_debug_events_come_from_the_script() {
    let failure = AccelError::MemoryFault { kind: crate::AccelKind::Kvm, gpa: 1, size: 2, flags: 3 };
    let step = DebugEvent::SingleStep { pc: 4 };
    let mut vcpu = vcpu(Script::new().fail(failure.clone()).debug(step).exit(VcpuExit::Halted));
    assert_eq!(vcpu.run(), Err(failure));
    assert_complains(vcpu.debug_event(), "not a debug exit");
    assert_eq!(vcpu.run().unwrap(), VcpuExit::Debug);
    assert_eq!(vcpu.debug_event().unwrap(), step);
    let debug = GuestDebug { single_step: true, ..GuestDebug::default() };
    vcpu.set_guest_debug(&debug).unwrap();
    assert_eq!(vcpu.guest_debug(), &debug);
    vcpu.run().unwrap();
    assert_complains(vcpu.debug_event(), "not a debug exit");
    vcpu.finish().unwrap();
}

#[test]
fn floating_point_registers_are_kept_for_one_architecture() {
    let arm = FpuRegs::Aarch64(crate::aarch64::Aarch64FpuRegs::default());
    let mut vcpu = vcpu(Script::new());
    assert_complains(vcpu.set_fpu_regs(&arm), "another architecture");
    let mut vcpu = vcpu.with_fpu_regs(arm);
    vcpu.set_fpu_regs(&arm).unwrap();
    assert_eq!(vcpu.get_fpu_regs().unwrap(), arm);
}

#[test]
fn scripts_of_what_no_backend_does_are_refused() {
    let io = |size, len| Script::new().io_in(0, size, Answer::Any(len));
    for (script, text) in [
        (io(3, 3), "1, 2 or 4"),
        (io(2, 3), "whole elements"),
        (io(1, 0), "whole elements"),
        (Script::new().io_in(0, 1, Answer::Refused), "only accesses to MSRs"),
        (Script::new().mmio_write(0, [0; 9]), "1 to 8"),
        (Script::new().mmio_read(0, Answer::Any(1000)), "1 to 8"),
        (Script::new().mmio_write(0, []), "1 to 8"),
        (Script::new().msr_read(0, Answer::Any(4)), "8 bytes"),
        (Script::new().exit(VcpuExit::Debug), "call of its own"),
        (Script::new().set_reg(34, 0), "no register"),
        (Script::new().expect_reg(usize::MAX, 0), "no register"),
        (Script::new().same_instruction(), "before it"),
        (io(1, 1).same_instruction(), "behind it"),
        (io(1, 1).same_instruction().exit(VcpuExit::Halted), "behind it"),
    ] {
        assert_complains(ScriptedVcpu::new(0, script), text);
    }
    let second = Script::new().exit(VcpuExit::Halted).set_reg(99, 0);
    assert_complains(ScriptedVcpu::new(0, second), "step 2");
}
