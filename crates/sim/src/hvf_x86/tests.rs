//! The facade by itself: what it promises, and what it says to callers that break the rules.

use super::*;
use std::ffi::c_void;
use std::sync::MutexGuard;
use vm_accel_sys::hvf::x86_64::{
    cpu_based, cpu_based2, ept_violation, exit, irq_info, pin_based, reg, vmcs, vmx_capability,
};
use vm_accel_sys::hvf::{HvReturn, code, memory};

/// One VM per process: the tests take turns.
static TURN: Mutex<()> = Mutex::new(());

#[repr(C, align(4096))]
struct Page([u8; 4096]);

/// A VM of one page at address 0x1000 and one vCPU in real mode, at the page's begin.
struct Machine {
    vcpu: u32,
    page: *mut Page,
    _turn: MutexGuard<'static, ()>,
}

macro_rules! call {
    ($name:ident($($arg:expr),*)) => {
        // SAFETY: pointers are those of locals, ids and memory are the machine's.
        unsafe { (API.$name)($($arg),*) }
    };
}

impl Machine {
    fn new(program: &[u8]) -> Self {
        let turn = lock(&TURN);
        reset();
        let mut page = Box::new(Page([0xf4; 4096]));
        page.0[..program.len()].copy_from_slice(program);
        let page = Box::into_raw(page);
        assert_eq!(call!(hv_vm_create(0)), 0);
        let flags = memory::READ | memory::WRITE | memory::EXEC;
        assert_eq!(call!(hv_vm_map(page.cast(), 0x1000, 4096, flags)), 0);
        let mut vcpu = 99;
        assert_eq!(call!(hv_vcpu_create(&mut vcpu, 0)), 0);
        let machine = Self { vcpu, page, _turn: turn };
        for (field, id, want) in [
            (vmcs::PIN_BASED, vmx_capability::PINBASED, pin_based::VIRTUAL_NMI),
            (vmcs::CPU_BASED, vmx_capability::PROCBASED, cpu_based::HLT),
            (vmcs::CPU_BASED2, vmx_capability::PROCBASED2, cpu_based2::UNRESTRICTED),
            (vmcs::VMENTRY_CONTROLS, vmx_capability::ENTRY, 0),
            (vmcs::VMEXIT_CONTROLS, vmx_capability::EXIT, 0),
        ] {
            let mut allowed = 0;
            assert_eq!(call!(hv_vmx_read_capability(id, &mut allowed)), 0);
            machine.set(field, u64::from((want | allowed as u32) & (allowed >> 32) as u32));
        }
        for n in 0..8 {
            machine.set(vmcs::GUEST_ES_LIMIT + 2 * n, 0xffff);
            machine.set(vmcs::GUEST_ES_AR + 2 * n, [0x93, 0x9b, 0x93, 0x93, 0x93, 0x93, 0x82, 0x8b][n as usize]);
        }
        machine.set(vmcs::GUEST_CR0, 0x20);
        machine.set(vmcs::GUEST_CR4, 1 << 13);
        machine.set(vmcs::GUEST_RFLAGS, 2);
        machine.set(vmcs::GUEST_RIP, 0x1000);
        machine
    }

    fn set(&self, field: u32, value: u64) {
        assert_eq!(call!(hv_vmx_vcpu_write_vmcs(self.vcpu, field, value)), 0, "{field:#x}");
    }

    fn get(&self, field: u32) -> u64 {
        let mut value = 0;
        assert_eq!(call!(hv_vmx_vcpu_read_vmcs(self.vcpu, field, &mut value)), 0, "{field:#x}");
        value
    }

    fn reg(&self, register: u32) -> u64 {
        let mut value = 0;
        assert_eq!(call!(hv_vcpu_read_register(self.vcpu, register, &mut value)), 0);
        value
    }

    /// Runs by `hv_vcpu_run_until` and answers the exit reason.
    fn run(&self) -> u32 {
        // SAFETY: the vCPU is this thread's.
        assert_eq!(unsafe { API.hv_vcpu_run_until.unwrap()(self.vcpu, u64::MAX) }, 0);
        self.get(vmcs::EXIT_REASON) as u32
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = call!(hv_vcpu_destroy(self.vcpu));
        let _ = call!(hv_vm_destroy());
        // SAFETY: made by `Box::into_raw`, and no VM has it any more.
        drop(unsafe { Box::from_raw(self.page) });
        set_hostile(None);
    }
}

#[test]
fn an_exit_happens_before_its_instruction() {
    // in al, 0x10; hlt
    let m = Machine::new(&[0xe4, 0x10, 0xf4]);
    for _ in 0..2 {
        assert_eq!(m.run(), exit::IO);
        assert_eq!(m.get(vmcs::EXIT_QUALIFICATION), 0x10 << 16 | 1 << 6 | 1 << 3);
        assert_eq!((m.reg(reg::RIP), m.get(vmcs::VMEXIT_INSTR_LEN)), (0x1000, 2));
    }
    m.set(vmcs::GUEST_RIP, 0x1002);
    assert_eq!(m.run(), exit::HLT);
    assert_eq!(m.reg(reg::RIP), 0x1002);
    assert_eq!(complaints(), [""; 0]);
}

#[test]
fn string_output_tells_its_kind() {
    // rep outsb
    let m = Machine::new(&[0xf3, 0x6e]);
    for (register, value) in [(reg::RCX, 3), (reg::RSI, 0x1000)] {
        assert_eq!(call!(hv_vcpu_write_register(m.vcpu, register, value)), 0);
    }
    assert_eq!(m.run(), exit::IO);
    assert_eq!(m.get(vmcs::EXIT_QUALIFICATION) & 0x3f, 1 << 4 | 1 << 5);
}

#[test]
fn a_device_access_is_a_violation_without_an_instruction() {
    // mov [0x8000], al
    let m = Machine::new(&[0xa2, 0x00, 0x80]);
    assert_eq!(m.run(), exit::EPT_VIOLATION);
    assert_eq!(m.get(vmcs::GUEST_PHYSICAL_ADDRESS), 0x8000);
    assert_eq!(m.get(vmcs::EXIT_QUALIFICATION), ept_violation::WRITE);
    assert!(m.get(vmcs::VMEXIT_INSTR_LEN) > 15, "the length is garbage");
}

#[test]
fn only_the_older_call_tells_of_first_touches() {
    let m = Machine::new(&[0xf4]);
    assert_eq!(call!(hv_vcpu_run(m.vcpu)), 0);
    assert_eq!(m.get(vmcs::EXIT_REASON) as u32, exit::EPT_VIOLATION);
    assert_eq!(call!(hv_vcpu_run(m.vcpu)), 0);
    assert_eq!(m.get(vmcs::EXIT_REASON) as u32, exit::HLT);
    let other = Box::into_raw(Box::new(Page([0; 4096])));
    assert_eq!(call!(hv_vm_map(other.cast::<c_void>(), 0x2000, 4096, memory::READ)), 0);
    assert_eq!(m.run(), exit::HLT);
    assert_eq!(call!(hv_vm_unmap(0x2000, 4096)), 0);
    // SAFETY: made by `Box::into_raw`, and unmapped.
    drop(unsafe { Box::from_raw(other) });
}

#[test]
fn an_injected_interrupt_goes_through_the_vector_table() {
    let m = Machine::new(&[0xf4]);
    m.set(vmcs::GUEST_IDTR_LIMIT, 0x3ff);
    m.set(vmcs::GUEST_IDTR_BASE, 0x1800);
    m.set(vmcs::GUEST_RSP, 0x1f00);
    m.set(vmcs::GUEST_RFLAGS, 0x202);
    // SAFETY: inside the page, which the machine owns.
    unsafe { m.page.cast::<u8>().add(0x800 + 4 * 0x30).cast::<[u8; 4]>().write([0x00, 0x14, 0, 0]) };
    m.set(vmcs::VMENTRY_IRQ_INFO, u64::from(irq_info::VALID | 0x30));
    assert_eq!(m.run(), exit::HLT);
    assert_eq!(m.reg(reg::RIP), 0x1400);
    assert_eq!(m.get(vmcs::VMENTRY_IRQ_INFO) & u64::from(irq_info::VALID), 0);
    assert_eq!(m.get(vmcs::GUEST_RFLAGS) & 0x200, 0);
    // Once more, while interrupts are blocked: no processor enters that.
    m.set(vmcs::VMENTRY_IRQ_INFO, u64::from(irq_info::VALID | 0x30));
    assert_eq!(m.run(), exit::ENTRY_FAILED | exit::ENTRY_GUEST);
    assert_eq!(complaints().len(), 1);
}

#[test]
fn an_interrupt_outside_is_kept_or_lost() {
    let m = Machine::new(&[0xf4]);
    for (sticky, reason) in [(true, exit::IRQ), (false, exit::HLT)] {
        set_sticky(sticky);
        let mut ids = [m.vcpu];
        assert_eq!(call!(hv_vcpu_interrupt(ids.as_mut_ptr(), 1)), 0);
        assert_eq!(m.run(), reason);
        assert_eq!(m.run(), exit::HLT, "once");
    }
}

#[test]
fn an_interrupt_ends_a_loop() {
    // jmp $
    let m = Machine::new(&[0xeb, 0xfe]);
    set_sticky(false);
    let vcpu = m.vcpu;
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let done = &done;
        scope.spawn(move || {
            while !done.load(Ordering::Relaxed) {
                let mut ids = [vcpu];
                call!(hv_vcpu_interrupt(ids.as_mut_ptr(), 1));
                std::thread::yield_now();
            }
        });
        assert_eq!(m.run(), exit::IRQ);
        done.store(true, Ordering::Relaxed);
    });
}

#[test]
fn another_thread_is_refused() {
    let m = Machine::new(&[0xf4]);
    let vcpu = m.vcpu;
    let answers: Vec<HvReturn> = std::thread::scope(|scope| {
        scope
            .spawn(move || {
                let mut value = 0;
                vec![
                    call!(hv_vcpu_read_register(vcpu, reg::RIP, &mut value)),
                    call!(hv_vcpu_run(vcpu)),
                    call!(hv_vcpu_destroy(vcpu)),
                ]
            })
            .join()
            .unwrap()
    });
    assert_eq!(answers, [code::BAD_ARGUMENT; 3]);
    assert_eq!(complaints().len(), 3);
}

#[test]
fn one_vm_one_vcpu_per_thread_and_no_double_frees() {
    let m = Machine::new(&[0xf4]);
    let mut other = 0;
    assert_eq!(call!(hv_vm_create(0)), code::BUSY);
    assert_eq!(call!(hv_vcpu_create(&mut other, 0)), code::BUSY);
    assert_eq!(call!(hv_vm_destroy()), code::BUSY);
    assert_eq!(call!(hv_vcpu_destroy(m.vcpu)), 0);
    assert_eq!(call!(hv_vcpu_destroy(m.vcpu)), code::BAD_ARGUMENT);
    assert_eq!(live_vcpus(), Some(0));
    // Leaving a VM with vCPUs, and destroying one twice.
    assert_eq!(complaints().len(), 2);
}

#[test]
fn memory_comes_in_pages_and_once() {
    let m = Machine::new(&[0xf4]);
    let page = m.page.cast::<c_void>();
    let all = memory::READ | memory::WRITE | memory::EXEC;
    assert_eq!(call!(hv_vm_map(page, 0x1800, 4096, all)), code::BAD_ARGUMENT);
    assert_eq!(call!(hv_vm_map(page, 0x3000, 100, all)), code::BAD_ARGUMENT);
    assert_eq!(call!(hv_vm_map(page, 0x1000, 4096, all)), code::ERROR, "overlaps");
    assert_eq!(call!(hv_vm_protect(0x5000, 4096, all)), code::ERROR, "is not mapped");
    assert_eq!(call!(hv_vm_unmap(0x5000, 4096)), code::ERROR);
    // mov [0x1100], al, on a page that is protected.
    // SAFETY: inside the page, which the machine owns.
    unsafe { m.page.cast::<[u8; 4]>().write([0xa2, 0x00, 0x11, 0xf4]) };
    assert_eq!(call!(hv_vm_protect(0x1000, 4096, memory::READ | memory::EXEC)), 0);
    assert_eq!(m.run(), exit::EPT_VIOLATION);
    let allowed = (memory::READ | memory::EXEC) << ept_violation::ALLOWED_SHIFT;
    assert_eq!(m.get(vmcs::EXIT_QUALIFICATION), ept_violation::WRITE | allowed);
    assert_eq!(call!(hv_vm_protect(0x1000, 4096, all)), 0);
    assert_eq!(m.run(), exit::HLT);
}

#[test]
fn what_is_undefined_and_what_cannot_be_written() {
    let m = Machine::new(&[0xf4]);
    let mut value = 0;
    assert_eq!(call!(hv_vmx_vcpu_read_vmcs(m.vcpu, 0x1234, &mut value)), code::BAD_ARGUMENT);
    assert_eq!(call!(hv_vmx_vcpu_write_vmcs(m.vcpu, vmcs::EXIT_REASON, 0)), code::BAD_ARGUMENT);
    assert_eq!(call!(hv_vcpu_read_register(m.vcpu, reg::CR1, &mut value)), code::BAD_ARGUMENT);
    assert_eq!(complaints().len(), 2);
    // Controls below what must be: fixed up on reading back.
    m.set(vmcs::CPU_BASED, 0);
    assert_ne!(m.get(vmcs::CPU_BASED), 0);
    // Above what may be: the entry fails.
    m.set(vmcs::CPU_BASED2, u64::from(u32::MAX));
    assert_eq!(call!(hv_vcpu_run(m.vcpu)), code::ERROR);
}

#[test]
fn a_failure_that_is_planned_happens_once() {
    let m = Machine::new(&[0xf4]);
    FAILURES.set(Some(crate::hostile::Failure { function: "hv_vcpu_run", after: 1, code: code::NO_RESOURCES }));
    let answers = [(); 3].map(|()| call!(hv_vcpu_run(m.vcpu)));
    assert_eq!(answers, [0, code::NO_RESOURCES, 0]);
    assert!(!FAILURES.is_waiting());
}
