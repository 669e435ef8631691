//! The functions.
//!
//! Each first asks the failure plan; then it finds the VM, and for what belongs to a vCPU checks the calling thread.

use super::entry::{CONTROLS, capability};
use super::state::{alias, field_kind};
use super::vcpu::{Inner, Vcpu, XSAVE_SIZE};
use super::vm::{self, MAX_VCPUS, Vm};
use super::{FAILURES, complain, lock};
use std::ffi::c_void;
use std::sync::Arc;
use std::time::Instant;
use vm_accel_sys::hvf::x86_64::{HvfX86Api, capability as hv_capability_id, reg, vmcs};
use vm_accel_sys::hvf::{HvReturn, code};

/// The table of a current macOS, without the platform's local APIC.
pub static API: HvfX86Api = HvfX86Api {
    hv_vm_create,
    hv_vm_destroy,
    hv_vm_map,
    hv_vm_unmap,
    hv_vm_protect,
    hv_vm_sync_tsc,
    hv_vcpu_create,
    hv_vcpu_destroy,
    hv_vcpu_read_register,
    hv_vcpu_write_register,
    hv_vcpu_read_fpstate,
    hv_vcpu_write_fpstate,
    hv_vcpu_enable_native_msr,
    hv_vcpu_read_msr,
    hv_vcpu_write_msr,
    hv_vcpu_invalidate_tlb,
    hv_vcpu_run,
    hv_vcpu_interrupt,
    hv_vcpu_get_exec_time,
    hv_vmx_vcpu_read_vmcs,
    hv_vmx_vcpu_write_vmcs,
    hv_vmx_read_capability,
    hv_vmx_vcpu_set_apic_address,
    hv_capability: Some(hv_capability),
    hv_vm_space_create: None,
    hv_vm_space_destroy: None,
    hv_vm_map_space: None,
    hv_vm_unmap_space: None,
    hv_vm_protect_space: None,
    hv_vcpu_set_space: None,
    hv_vcpu_run_until: Some(hv_vcpu_run_until),
    hv_tsc_clock: Some(hv_tsc_clock),
    hv_vcpu_set_tsc_relative: None,
    hv_vcpu_enable_managed_msr: Some(hv_vcpu_enable_managed_msr),
    hv_vcpu_set_msr_access: Some(hv_vcpu_set_msr_access),
    hv_vmx_get_msr_info: Some(hv_vmx_get_msr_info),
    hv_vmx_vcpu_get_cap_write_vmcs: Some(hv_vmx_vcpu_get_cap_write_vmcs),
    hv_vcpu_get_idle_time: None,
    hv_vcpu_vmx_status: Some(hv_vcpu_vmx_status),
    hv_vm_lapic_set_intr: None,
    hv_vm_lapic_msi: None,
    hv_vm_ioapic_assert_irq: None,
    hv_vm_ioapic_deassert_irq: None,
    hv_vm_ioapic_pulse_irq: None,
    hv_vm_ioapic_read: None,
    hv_vm_ioapic_write: None,
    hv_vm_send_ioapic_intr: None,
    hv_vm_set_apic_bus_freq: None,
    hv_vcpu_apic_read: None,
    hv_vcpu_apic_write: None,
    hv_vcpu_apic_ctrl: None,
    hv_vcpu_exit_info: None,
    hv_vcpu_exit_ioapic_eoi: None,
};

type Answer = Result<(), HvReturn>;

/// The frame of every function.
fn answer(function: &'static str, call: impl FnOnce() -> Answer) -> HvReturn {
    if let Some(code) = FAILURES.check(function) {
        return code;
    }
    call().err().unwrap_or(code::SUCCESS)
}

/// The frame of what belongs to the VM.
fn with_vm(function: &'static str, call: impl FnOnce(&Arc<Vm>) -> Answer) -> HvReturn {
    answer(function, || match vm::current() {
        Some(vm) => call(&vm),
        None => {
            complain(format!("{function}: there is no VM"));
            Err(code::NO_DEVICE)
        }
    })
}

/// The frame of what belongs to a vCPU.
fn with_vcpu(function: &'static str, id: u32, call: impl FnOnce(&Vm, &Vcpu) -> Answer) -> HvReturn {
    with_vm(function, |vm| {
        let Some(vcpu) = lock(&vm.vcpus).get(&id).cloned() else {
            complain(format!("{function}: there is no vCPU {id}"));
            return Err(code::BAD_ARGUMENT);
        };
        if vcpu.owner != std::thread::current().id() {
            complain(format!("{function}: vCPU {id} belongs to another thread"));
            return Err(code::BAD_ARGUMENT);
        }
        call(vm, &vcpu)
    })
}

fn with_state(function: &'static str, id: u32, call: impl FnOnce(&mut Inner) -> Answer) -> HvReturn {
    with_vcpu(function, id, |_, vcpu| call(&mut lock(&vcpu.inner)))
}

/// Writes an answer.
///
/// # Safety
/// `to` is null or good for a write.
unsafe fn put<T>(to: *mut T, value: T) -> Answer {
    if to.is_null() || !to.is_aligned() {
        complain("a pointer for an answer is null or not aligned");
        return Err(code::BAD_ARGUMENT);
    }
    // SAFETY: not null, aligned, and the caller's promise.
    unsafe { to.write(value) };
    Ok(())
}

unsafe extern "C" fn hv_capability(id: u64, value: *mut u64) -> HvReturn {
    answer("hv_capability", || match id {
        // SAFETY: the caller's promise (hv_capability).
        hv_capability_id::VCPU_MAX => unsafe { put(value, MAX_VCPUS.into()) },
        // SAFETY: as above.
        hv_capability_id::ADDRESS_SPACE_MAX => unsafe { put(value, 1) },
        _ => Err(code::BAD_ARGUMENT),
    })
}

unsafe extern "C" fn hv_vm_create(flags: u64) -> HvReturn {
    answer("hv_vm_create", || if flags == 0 { vm::create() } else { Err(code::BAD_ARGUMENT) })
}

unsafe extern "C" fn hv_vm_destroy() -> HvReturn {
    answer("hv_vm_destroy", vm::destroy)
}

unsafe extern "C" fn hv_vm_map(uva: *const c_void, gpa: u64, size: usize, flags: u64) -> HvReturn {
    let host = uva.expose_provenance();
    with_vm("hv_vm_map", |vm| vm.change_memory(|memory| memory.map(host, gpa, size as u64, flags)))
}

unsafe extern "C" fn hv_vm_unmap(gpa: u64, size: usize) -> HvReturn {
    with_vm("hv_vm_unmap", |vm| vm.change_memory(|memory| memory.unmap(gpa, size as u64)))
}

unsafe extern "C" fn hv_vm_protect(gpa: u64, size: usize, flags: u64) -> HvReturn {
    with_vm("hv_vm_protect", |vm| vm.change_memory(|memory| memory.protect(gpa, size as u64, flags)))
}

unsafe extern "C" fn hv_vm_sync_tsc(tsc: u64) -> HvReturn {
    with_vm("hv_vm_sync_tsc", |vm| {
        let mut sync = lock(&vm.tsc);
        *sync = (tsc, Some(Instant::now()), sync.2.wrapping_add(1));
        Ok(())
    })
}

unsafe extern "C" fn hv_tsc_clock() -> u64 {
    vm::current().map_or(0, |vm| vm.start.elapsed().as_nanos() as u64)
}

unsafe extern "C" fn hv_vcpu_create(vcpu: *mut u32, flags: u64) -> HvReturn {
    with_vm("hv_vcpu_create", |vm| {
        if flags != 0 {
            return Err(code::BAD_ARGUMENT);
        }
        let mut vcpus = lock(&vm.vcpus);
        let me = std::thread::current().id();
        if vcpus.values().any(|vcpu| vcpu.owner == me) {
            return Err(code::BUSY);
        }
        let id = (0..MAX_VCPUS).find(|id| !vcpus.contains_key(id)).ok_or(code::NO_RESOURCES)?;
        // SAFETY: the caller's promise (hv_vcpu_create).
        unsafe { put(vcpu, id)? };
        vcpus.insert(id, Arc::new(Vcpu::new(vm, id)));
        Ok(())
    })
}

unsafe extern "C" fn hv_vcpu_destroy(vcpu: u32) -> HvReturn {
    with_vcpu("hv_vcpu_destroy", vcpu, |vm, _| {
        lock(&vm.vcpus).remove(&vcpu);
        Ok(())
    })
}

unsafe extern "C" fn hv_vcpu_read_register(vcpu: u32, register: u32, value: *mut u64) -> HvReturn {
    with_state("hv_vcpu_read_register", vcpu, |inner| {
        let found = match alias(register) {
            Some(field) => inner.vmcs.get(field),
            None if is_register(register) => inner.vmcs.regs[register as usize],
            None => return Err(code::BAD_ARGUMENT),
        };
        // SAFETY: the caller's promise (hv_vcpu_read_register).
        unsafe { put(value, found) }
    })
}

unsafe extern "C" fn hv_vcpu_write_register(vcpu: u32, register: u32, value: u64) -> HvReturn {
    with_state("hv_vcpu_write_register", vcpu, |inner| {
        match alias(register) {
            Some(field) => inner.vmcs.set(field, value),
            None if register == reg::XCR0 && value & 1 == 0 => return Err(code::BAD_ARGUMENT),
            None if is_register(register) => inner.vmcs.regs[register as usize] = value,
            None => return Err(code::BAD_ARGUMENT),
        }
        Ok(())
    })
}

fn is_register(register: u32) -> bool {
    register < reg::MAX && !matches!(register, reg::CR1 | reg::DR4 | reg::DR5)
}

/// The components of the state that are there, as the header of an XSAVE area says.
const XSTATE_BV: usize = 512;

unsafe extern "C" fn hv_vcpu_read_fpstate(vcpu: u32, buffer: *mut c_void, size: usize) -> HvReturn {
    with_state("hv_vcpu_read_fpstate", vcpu, |inner| {
        if size < XSAVE_SIZE || buffer.is_null() {
            complain(format!("hv_vcpu_read_fpstate: {size} bytes are too few"));
            return Err(code::BAD_ARGUMENT);
        }
        let mut area = [0; XSAVE_SIZE];
        area[..512].copy_from_slice(&inner.cpu.state().fxsave());
        area[576..].copy_from_slice(&inner.avx);
        area[XSTATE_BV] = 7;
        // A component in its initial state need not be stored (Intel SDM vol. 1, 13.6).
        if inner.mischief.one_in(2) && inner.cpu.state().xmm == [0; 16] {
            area[XSTATE_BV] &= !2;
            area[160..416].fill(0x5a);
        }
        if inner.mischief.one_in(2) && inner.cpu.state().x87 == vm_accel_softcpu::state::X87::default() {
            area[XSTATE_BV] &= !1;
            area[..24].fill(0x5a);
            area[32..160].fill(0x5a);
        }
        // SAFETY: the caller's buffer has `size` bytes (hv_vcpu_read_fpstate), which are enough.
        unsafe { buffer.cast::<[u8; XSAVE_SIZE]>().write_unaligned(area) };
        Ok(())
    })
}

unsafe extern "C" fn hv_vcpu_write_fpstate(vcpu: u32, buffer: *const c_void, size: usize) -> HvReturn {
    with_state("hv_vcpu_write_fpstate", vcpu, |inner| {
        if size < XSAVE_SIZE || buffer.is_null() {
            complain(format!("hv_vcpu_write_fpstate: {size} bytes are too few"));
            return Err(code::BAD_ARGUMENT);
        }
        // SAFETY: the caller's buffer has `size` bytes (hv_vcpu_write_fpstate), which are enough.
        let area = unsafe { buffer.cast::<[u8; XSAVE_SIZE]>().read_unaligned() };
        let present = area[XSTATE_BV];
        if area[XSTATE_BV + 1..576].iter().any(|byte| *byte != 0) || present & !7 != 0 {
            complain("hv_vcpu_write_fpstate: the header of the XSAVE area has reserved bits");
            return Err(code::BAD_ARGUMENT);
        }
        let mut image = [0; 512];
        image.copy_from_slice(&area[..512]);
        let mut taken = true;
        inner.cpu.update(|st| {
            taken = st.fxrstor(&image);
            if present & 1 == 0 {
                st.x87 = vm_accel_softcpu::state::X87::default();
            }
            if present & 2 == 0 {
                st.xmm = [0; 16];
            }
        });
        if present & 4 == 0 || area[576..] != inner.avx {
            complain("hv_vcpu_write_fpstate: the AVX registers changed");
        }
        if taken { Ok(()) } else { Err(code::BAD_ARGUMENT) }
    })
}

/// MSRs that the guest may be given: those that processors switch, or that the kernel does.
fn can_be_native(msr: u32) -> bool {
    matches!(msr, 0x10 | 0x48 | 0x174..=0x176 | 0xc000_0081..=0xc000_0084 | 0xc000_0100..=0xc000_0103)
}

fn enable_msr(function: &'static str, vcpu: u32, msr: u32, enable: bool) -> HvReturn {
    with_state(function, vcpu, |inner| {
        if !can_be_native(msr) {
            return Err(code::BAD_ARGUMENT);
        }
        let mut controls = lock(&inner.controls);
        if enable {
            controls.msrs.insert(msr);
        } else {
            controls.msrs.remove(&msr);
        }
        Ok(())
    })
}

unsafe extern "C" fn hv_vcpu_enable_native_msr(vcpu: u32, msr: u32, enable: bool) -> HvReturn {
    enable_msr("hv_vcpu_enable_native_msr", vcpu, msr, enable)
}

unsafe extern "C" fn hv_vcpu_enable_managed_msr(vcpu: u32, msr: u32, enable: bool) -> HvReturn {
    enable_msr("hv_vcpu_enable_managed_msr", vcpu, msr, enable)
}

unsafe extern "C" fn hv_vcpu_set_msr_access(vcpu: u32, msr: u32, flags: u32) -> HvReturn {
    enable_msr("hv_vcpu_set_msr_access", vcpu, msr, flags == 3)
}

/// Where an MSR is a VMCS field.
fn msr_field(msr: u32) -> Option<u32> {
    Some(match msr {
        0x174 => vmcs::GUEST_SYSENTER_CS,
        0x175 => vmcs::GUEST_SYSENTER_ESP,
        0x176 => vmcs::GUEST_SYSENTER_EIP,
        0xc000_0080 => vmcs::GUEST_EFER,
        0xc000_0100 => vmcs::GUEST_FS_BASE,
        0xc000_0101 => vmcs::GUEST_GS_BASE,
        _ => return None,
    })
}

unsafe extern "C" fn hv_vcpu_read_msr(vcpu: u32, msr: u32, value: *mut u64) -> HvReturn {
    with_vcpu("hv_vcpu_read_msr", vcpu, |vm, vcpu| {
        let mut inner = lock(&vcpu.inner);
        inner.sync_tsc(vm);
        let found = match msr_field(msr) {
            Some(field) => Some(inner.vmcs.get(field)),
            None if msr == 0x10 => Some(inner.cpu.tsc()),
            None if lock(&inner.controls).msrs.contains(&msr) => inner.cpu.msr(msr),
            None => None,
        };
        // SAFETY: the caller's promise (hv_vcpu_read_msr).
        unsafe { put(value, found.ok_or(code::BAD_ARGUMENT)?) }
    })
}

unsafe extern "C" fn hv_vcpu_write_msr(vcpu: u32, msr: u32, value: u64) -> HvReturn {
    with_state("hv_vcpu_write_msr", vcpu, |inner| {
        if let Some(field) = msr_field(msr) {
            inner.vmcs.set(field, value);
            return Ok(());
        }
        let is_enabled = lock(&inner.controls).msrs.contains(&msr);
        if is_enabled && inner.cpu.set_msr(msr, value) { Ok(()) } else { Err(code::BAD_ARGUMENT) }
    })
}

unsafe extern "C" fn hv_vmx_get_msr_info(_: u64, value: *mut u64) -> HvReturn {
    // SAFETY: the caller's promise (hv_vmx_get_msr_info).
    answer("hv_vmx_get_msr_info", || unsafe { put(value, 0) })
}

unsafe extern "C" fn hv_vcpu_invalidate_tlb(vcpu: u32) -> HvReturn {
    // The CPU's translations are dropped with every change of its state.
    with_state("hv_vcpu_invalidate_tlb", vcpu, |_| Ok(()))
}

unsafe extern "C" fn hv_vcpu_run(vcpu: u32) -> HvReturn {
    with_vcpu("hv_vcpu_run", vcpu, |vm, vcpu| vcpu.run(vm, false))
}

unsafe extern "C" fn hv_vcpu_run_until(vcpu: u32, deadline: u64) -> HvReturn {
    with_vcpu("hv_vcpu_run_until", vcpu, |vm, vcpu| {
        // Other deadlines use the preemption timer, which this processor has not.
        if deadline == u64::MAX { vcpu.run(vm, true) } else { Err(code::UNSUPPORTED) }
    })
}

unsafe extern "C" fn hv_vcpu_interrupt(vcpus: *mut u32, count: u32) -> HvReturn {
    with_vm("hv_vcpu_interrupt", |vm| {
        if vcpus.is_null() || count == 0 {
            return Err(code::BAD_ARGUMENT);
        }
        // SAFETY: the caller's list has `count` entries (hv_vcpu_interrupt).
        let ids = unsafe { std::slice::from_raw_parts(vcpus, count as usize) };
        for id in ids {
            let Some(vcpu) = lock(&vm.vcpus).get(id).cloned() else {
                complain(format!("hv_vcpu_interrupt: there is no vCPU {id}"));
                return Err(code::BAD_ARGUMENT);
            };
            vcpu.interrupt(vm);
        }
        Ok(())
    })
}

unsafe extern "C" fn hv_vcpu_get_exec_time(vcpu: u32, nanoseconds: *mut u64) -> HvReturn {
    // SAFETY: the caller's promise (hv_vcpu_get_exec_time).
    with_state("hv_vcpu_get_exec_time", vcpu, |inner| unsafe { put(nanoseconds, inner.cpu.instructions()) })
}

unsafe extern "C" fn hv_vcpu_vmx_status(vcpu: u32, status: *mut u32) -> HvReturn {
    // ZF: the VM-entry failed with an error number.
    // SAFETY: the caller's promise (hv_vcpu_vmx_status).
    with_state("hv_vcpu_vmx_status", vcpu, |_| unsafe { put(status, 1 << 6) })
}

unsafe extern "C" fn hv_vmx_vcpu_read_vmcs(vcpu: u32, field: u32, value: *mut u64) -> HvReturn {
    with_state("hv_vmx_vcpu_read_vmcs", vcpu, |inner| {
        if field_kind(field).is_none() {
            complain(format!("hv_vmx_vcpu_read_vmcs: there is no field {field:#x}"));
            return Err(code::BAD_ARGUMENT);
        }
        // SAFETY: the caller's promise (hv_vmx_vcpu_read_vmcs).
        unsafe { put(value, inner.vmcs.get(field)) }
    })
}

unsafe extern "C" fn hv_vmx_vcpu_write_vmcs(vcpu: u32, field: u32, value: u64) -> HvReturn {
    with_state("hv_vmx_vcpu_write_vmcs", vcpu, |inner| {
        if field_kind(field) != Some(true) {
            complain(format!("hv_vmx_vcpu_write_vmcs: field {field:#x} cannot be written"));
            return Err(code::BAD_ARGUMENT);
        }
        // Bits that must be 1 are; hostile platforms leave it to the caller.
        let must = CONTROLS.iter().find(|(control, ..)| *control == field).map_or(0, |(.., allowed)| *allowed as u32);
        let must = if inner.mischief.is_hostile() { 0 } else { must };
        inner.vmcs.set(field, value | u64::from(must));
        Ok(())
    })
}

unsafe extern "C" fn hv_vmx_vcpu_get_cap_write_vmcs(
    vcpu: u32,
    field: u32,
    allowed_0: *mut u64,
    allowed_1: *mut u64,
) -> HvReturn {
    with_state("hv_vmx_vcpu_get_cap_write_vmcs", vcpu, |_| {
        let known = CONTROLS.iter().find(|(control, ..)| *control == field);
        let (must, may) = match (known, field_kind(field)) {
            (Some((.., allowed)), _) => (*allowed & 0xffff_ffff, allowed >> 32),
            (None, Some(true)) => (0, u64::MAX),
            _ => return Err(code::BAD_ARGUMENT),
        };
        // SAFETY: the caller's promise (hv_vmx_vcpu_get_cap_write_vmcs).
        unsafe {
            put(allowed_0, must)?;
            put(allowed_1, may)
        }
    })
}

unsafe extern "C" fn hv_vmx_read_capability(id: u32, value: *mut u64) -> HvReturn {
    // SAFETY: the caller's promise (hv_vmx_read_capability).
    answer("hv_vmx_read_capability", || unsafe { put(value, capability(id).ok_or(code::BAD_ARGUMENT)?) })
}

unsafe extern "C" fn hv_vmx_vcpu_set_apic_address(vcpu: u32, gpa: u64) -> HvReturn {
    with_state(
        "hv_vmx_vcpu_set_apic_address",
        vcpu,
        |_| {
            if gpa & 0xfff == 0 { Ok(()) } else { Err(code::BAD_ARGUMENT) }
        },
    )
}
