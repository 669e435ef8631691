//! The functions.
//!
//! Each first asks the failure plan; then it finds the VM, and for what belongs to a vCPU checks the calling thread.

use super::gic::Config;
use super::vcpu::{Inner, Vcpu, feature};
use super::vm::{self, DEFAULT_BITS, MAX_VCPUS, MOST_BITS, Vm, ticks};
use super::{FAILURES, complain, lock};
use std::collections::BTreeMap;
use std::ffi::c_void;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard};
use vm_accel_sys::hvf::aarch64::{HvfArm64Api, HvfArm64Functions, Object, Timebase, VcpuExit, Vector, reg, sys_reg};
use vm_accel_sys::hvf::{HvReturn, code};

/// The first system: no optional function, guest physical addresses of 36 bits.
pub static MACOS_11: HvfArm64Api = HvfArm64Api {
    hv_vcpu_set_simd_fp_reg,
    functions: HvfArm64Functions {
        hv_vm_create,
        hv_vm_destroy,
        hv_vm_map,
        hv_vm_unmap,
        hv_vm_protect,
        hv_vcpu_create,
        hv_vcpu_destroy,
        hv_vcpu_get_reg,
        hv_vcpu_set_reg,
        hv_vcpu_get_simd_fp_reg,
        hv_vcpu_get_sys_reg,
        hv_vcpu_set_sys_reg,
        hv_vcpu_get_pending_interrupt,
        hv_vcpu_set_pending_interrupt,
        hv_vcpu_get_trap_debug_exceptions,
        hv_vcpu_set_trap_debug_exceptions,
        hv_vcpu_get_trap_debug_reg_accesses,
        hv_vcpu_set_trap_debug_reg_accesses,
        hv_vcpu_run,
        hv_vcpus_exit,
        hv_vcpu_get_exec_time,
        hv_vcpu_get_vtimer_mask,
        hv_vcpu_set_vtimer_mask,
        hv_vcpu_get_vtimer_offset,
        hv_vcpu_set_vtimer_offset,
        hv_vcpu_config_create,
        hv_vcpu_config_get_feature_reg,
        mach_absolute_time,
        mach_timebase_info,
        os_release,
        hv_vm_get_max_vcpu_count: None,
        hv_vcpu_config_get_ccsidr_el1_sys_reg_values: None,
        hv_vm_allocate: None,
        hv_vm_deallocate: None,
        hv_vm_config_create: None,
        hv_vm_config_get_max_ipa_size: None,
        hv_vm_config_get_default_ipa_size: None,
        hv_vm_config_set_ipa_size: None,
        hv_vm_config_get_ipa_size: None,
        hv_vm_config_get_el2_supported: None,
        hv_vm_config_get_el2_enabled: None,
        hv_vm_config_set_el2_enabled: None,
        hv_gic_create: None,
        hv_gic_set_spi: None,
        hv_gic_send_msi: None,
        hv_gic_get_distributor_reg: None,
        hv_gic_set_distributor_reg: None,
        hv_gic_get_redistributor_base: None,
        hv_gic_get_redistributor_reg: None,
        hv_gic_set_redistributor_reg: None,
        hv_gic_get_icc_reg: None,
        hv_gic_set_icc_reg: None,
        hv_gic_get_msi_reg: None,
        hv_gic_set_msi_reg: None,
        hv_gic_set_state: None,
        hv_gic_reset: None,
        hv_gic_state_create: None,
        hv_gic_state_get_size: None,
        hv_gic_state_get_data: None,
        hv_gic_config_create: None,
        hv_gic_config_set_distributor_base: None,
        hv_gic_config_set_redistributor_base: None,
        hv_gic_config_set_msi_region_base: None,
        hv_gic_config_set_msi_interrupt_range: None,
        hv_gic_get_distributor_size: None,
        hv_gic_get_distributor_base_alignment: None,
        hv_gic_get_redistributor_region_size: None,
        hv_gic_get_redistributor_size: None,
        hv_gic_get_redistributor_base_alignment: None,
        hv_gic_get_msi_region_size: None,
        hv_gic_get_msi_region_base_alignment: None,
        hv_gic_get_spi_interrupt_range: None,
        hv_gic_get_intid: None,
        hv_sme_config_get_max_svl_bytes: None,
        hv_vcpu_get_sme_state: None,
        hv_vcpu_set_sme_state: None,
    },
};

/// A later system, which lets the width of guest physical addresses be chosen.
pub static MACOS_13: HvfArm64Api = HvfArm64Api {
    functions: HvfArm64Functions {
        hv_vm_get_max_vcpu_count: Some(hv_vm_get_max_vcpu_count),
        hv_vm_config_create: Some(hv_vm_config_create),
        hv_vm_config_get_max_ipa_size: Some(hv_vm_config_get_max_ipa_size),
        hv_vm_config_get_default_ipa_size: Some(hv_vm_config_get_default_ipa_size),
        hv_vm_config_set_ipa_size: Some(hv_vm_config_set_ipa_size),
        hv_vm_config_get_ipa_size: Some(hv_vm_config_get_ipa_size),
        ..MACOS_11.functions
    },
    ..MACOS_11
};

pub(super) type Answer = Result<(), HvReturn>;

/// The frame of every function.
pub(super) fn answer(function: &'static str, call: impl FnOnce() -> Answer) -> HvReturn {
    if let Some(code) = FAILURES.check(function) {
        return code;
    }
    call().err().unwrap_or(code::SUCCESS)
}

/// The frame of what belongs to the VM.
pub(super) fn with_vm(function: &'static str, call: impl FnOnce(&Arc<Vm>) -> Answer) -> HvReturn {
    answer(function, || match vm::current() {
        Some(vm) => call(&vm),
        None => {
            complain(format!("{function}: there is no VM"));
            Err(code::NO_DEVICE)
        }
    })
}

/// The frame of what belongs to a vCPU.
pub(super) fn with_vcpu(function: &'static str, id: u64, call: impl FnOnce(&Vm, &Vcpu) -> Answer) -> HvReturn {
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

fn with_state(function: &'static str, id: u64, call: impl FnOnce(&mut Inner) -> Answer) -> HvReturn {
    with_vcpu(function, id, |_, vcpu| call(&mut lock(&vcpu.inner)))
}

/// Writes an answer.
///
/// # Safety
/// `to` is null or good for a write.
pub(super) unsafe fn put<T>(to: *mut T, value: T) -> Answer {
    if to.is_null() || !to.is_aligned() {
        complain("a pointer for an answer is null or not aligned");
        return Err(code::BAD_ARGUMENT);
    }
    // SAFETY: not null, aligned, and the caller's promise.
    unsafe { to.write(value) };
    Ok(())
}

/// What an object of the VMM's is.
pub(super) enum Thing {
    /// A VM's configuration: the width of addresses that it asks for. Or a vCPU's, which has nothing in it.
    Config(u32),
    Gic(Config),
    State(Vec<u8>),
}

/// Objects that a VMM holds, and the last number.
static OBJECTS: Mutex<(usize, BTreeMap<usize, Thing>)> = Mutex::new((0, BTreeMap::new()));

pub(super) fn create_object(thing: Thing) -> Object {
    let (last, objects) = &mut *lock(&OBJECTS);
    *last += 16;
    objects.insert(*last, thing);
    *last as Object
}

pub(super) fn with_thing(object: Object, call: impl FnOnce(&mut Thing) -> Answer) -> Answer {
    match lock(&OBJECTS).1.get_mut(&(object as usize)) {
        Some(thing) => call(thing),
        None => {
            complain("an object that was never created, or was released");
            Err(code::BAD_ARGUMENT)
        }
    }
}

/// An object of another kind.
pub(super) fn wrong_thing() -> Answer {
    complain("an object of another kind");
    Err(code::BAD_ARGUMENT)
}

fn with_object(object: Object, call: impl FnOnce(&mut u32) -> Answer) -> Answer {
    with_thing(object, |thing| match thing {
        Thing::Config(bits) => call(bits),
        _ => wrong_thing(),
    })
}

unsafe extern "C" fn os_release(object: Object) {
    if lock(&OBJECTS).1.remove(&(object as usize)).is_none() {
        complain("os_release: no such object");
    }
}

unsafe extern "C" fn mach_absolute_time() -> u64 {
    ticks()
}

unsafe extern "C" fn mach_timebase_info(info: *mut Timebase) -> i32 {
    // SAFETY: the caller's promise (mach_time.h).
    unsafe { put(info, Timebase { numerator: 125, denominator: 3 }) }.err().unwrap_or(0)
}

unsafe extern "C" fn hv_vm_create(config: Object) -> HvReturn {
    answer("hv_vm_create", || {
        let mut bits = DEFAULT_BITS;
        if !config.is_null() {
            with_object(config, |asked| {
                bits = *asked;
                Ok(())
            })?;
        }
        vm::create(bits)
    })
}

unsafe extern "C" fn hv_vm_destroy() -> HvReturn {
    answer("hv_vm_destroy", vm::destroy)
}

unsafe extern "C" fn hv_vm_map(address: *const c_void, ipa: u64, size: usize, flags: u64) -> HvReturn {
    let host = address.expose_provenance();
    with_vm("hv_vm_map", |vm| vm.memory.map(host, ipa, size as u64, flags))
}

unsafe extern "C" fn hv_vm_unmap(ipa: u64, size: usize) -> HvReturn {
    with_vm("hv_vm_unmap", |vm| vm.memory.change(ipa, size as u64, None))
}

unsafe extern "C" fn hv_vm_protect(ipa: u64, size: usize, flags: u64) -> HvReturn {
    with_vm("hv_vm_protect", |vm| vm.memory.change(ipa, size as u64, Some(flags)))
}

unsafe extern "C" fn hv_vm_get_max_vcpu_count(count: *mut u32) -> HvReturn {
    // SAFETY: the caller's promise (hv_vm.h).
    answer("hv_vm_get_max_vcpu_count", || unsafe { put(count, MAX_VCPUS) })
}

unsafe extern "C" fn hv_vm_config_create() -> Object {
    create_object(Thing::Config(DEFAULT_BITS))
}

unsafe extern "C" fn hv_vm_config_get_max_ipa_size(bits: *mut u32) -> HvReturn {
    // SAFETY: the caller's promise (hv_vm_config.h).
    answer("hv_vm_config_get_max_ipa_size", || unsafe { put(bits, MOST_BITS) })
}

unsafe extern "C" fn hv_vm_config_get_default_ipa_size(bits: *mut u32) -> HvReturn {
    // SAFETY: the caller's promise (hv_vm_config.h).
    answer("hv_vm_config_get_default_ipa_size", || unsafe { put(bits, DEFAULT_BITS) })
}

unsafe extern "C" fn hv_vm_config_set_ipa_size(config: Object, bits: u32) -> HvReturn {
    answer("hv_vm_config_set_ipa_size", || {
        if !(32..=MOST_BITS).contains(&bits) {
            return Err(code::BAD_ARGUMENT);
        }
        with_object(config, |asked| {
            *asked = bits;
            Ok(())
        })
    })
}

unsafe extern "C" fn hv_vm_config_get_ipa_size(config: Object, bits: *mut u32) -> HvReturn {
    // SAFETY: the caller's promise (hv_vm_config.h).
    answer("hv_vm_config_get_ipa_size", || with_object(config, |asked| unsafe { put(bits, *asked) }))
}

unsafe extern "C" fn hv_vcpu_config_create() -> Object {
    create_object(Thing::Config(DEFAULT_BITS))
}

unsafe extern "C" fn hv_vcpu_config_get_feature_reg(config: Object, reg: u32, value: *mut u64) -> HvReturn {
    answer("hv_vcpu_config_get_feature_reg", || {
        with_object(config, |_| match feature(reg) {
            // SAFETY: the caller's promise (hv_vcpu_config.h).
            Some(feature) => unsafe { put(value, feature) },
            None => Err(code::BAD_ARGUMENT),
        })
    })
}

unsafe extern "C" fn hv_vcpu_create(vcpu: *mut u64, exit: *mut *const VcpuExit, config: Object) -> HvReturn {
    with_vm("hv_vcpu_create", |vm| {
        if !config.is_null() {
            with_object(config, |_| Ok(()))?;
        }
        let mut vcpus = lock(&vm.vcpus);
        let me = std::thread::current().id();
        if vcpus.values().any(|other| other.owner == me) {
            return Err(code::BUSY);
        }
        let id = (0..u64::from(MAX_VCPUS)).find(|id| !vcpus.contains_key(id)).ok_or(code::NO_RESOURCES)?;
        if vm.gic.get().is_some() && vm.has_run.load(Ordering::SeqCst) {
            complain("hv_vcpu_create: vCPUs run already, and there is a GIC");
            return Err(code::ERROR);
        }
        let new = Arc::new(Vcpu::new(id, vm.gic.get().is_some()));
        // SAFETY: the caller's promise (hv_vcpu.h). The area lives as long as the vCPU.
        unsafe {
            put(vcpu, id)?;
            put(exit, new.exit.get())?;
        }
        vcpus.insert(id, new);
        Ok(())
    })
}

unsafe extern "C" fn hv_vcpu_destroy(vcpu: u64) -> HvReturn {
    with_vcpu("hv_vcpu_destroy", vcpu, |vm, _| {
        lock(&vm.vcpus).remove(&vcpu);
        if let Some(device) = vm.gic.get() {
            lock(&device.gic).disconnect(vcpu);
        }
        Ok(())
    })
}

unsafe extern "C" fn hv_vcpu_run(vcpu: u64) -> HvReturn {
    with_vcpu("hv_vcpu_run", vcpu, |vm, cpu| {
        if vm.gic.get().is_some_and(|device| lock(&device.gic).redistributor(vcpu).is_none()) {
            complain("hv_vcpu_run: there is a GIC, and the vCPU's MPIDR_EL1 was never set");
            return Err(code::ILLEGAL_GUEST_STATE);
        }
        vm.has_run.store(true, Ordering::SeqCst);
        vm.running.fetch_add(1, Ordering::SeqCst);
        cpu.run(vm);
        vm.running.fetch_sub(1, Ordering::SeqCst);
        Ok(())
    })
}

unsafe extern "C" fn hv_vcpus_exit(vcpus: *const u64, count: u32) -> HvReturn {
    with_vm("hv_vcpus_exit", |vm| {
        if vcpus.is_null() || !vcpus.is_aligned() {
            complain("hv_vcpus_exit: no list");
            return Err(code::BAD_ARGUMENT);
        }
        // SAFETY: the caller's promise (hv_vcpu.h): a list of that many.
        let ids = unsafe { std::slice::from_raw_parts(vcpus, count as usize) };
        let live = lock(&vm.vcpus);
        ids.iter().try_for_each(|id| match live.get(id) {
            Some(vcpu) => {
                vcpu.cancel();
                vm.notify();
                Ok(())
            }
            None => {
                complain(format!("hv_vcpus_exit: there is no vCPU {id}"));
                Err(code::BAD_ARGUMENT)
            }
        })
    })
}

unsafe extern "C" fn hv_vcpu_get_exec_time(vcpu: u64, time: *mut u64) -> HvReturn {
    // SAFETY: the caller's promise (hv_vcpu.h).
    with_state("hv_vcpu_get_exec_time", vcpu, |_| unsafe { put(time, 0) })
}

/// The place of a general register.
fn general(inner: &mut Inner, register: u32) -> Result<&mut u64, HvReturn> {
    let cpu = &mut inner.cpu;
    match register {
        reg::PC => Ok(&mut cpu.pc),
        reg::FPCR => Ok(&mut cpu.fpcr),
        reg::FPSR => Ok(&mut cpu.fpsr),
        reg::CPSR => Ok(&mut cpu.pstate),
        _ => cpu.x.get_mut(register as usize).ok_or(code::BAD_ARGUMENT),
    }
}

unsafe extern "C" fn hv_vcpu_get_reg(vcpu: u64, register: u32, value: *mut u64) -> HvReturn {
    // SAFETY: the caller's promise (hv_vcpu.h).
    with_state("hv_vcpu_get_reg", vcpu, |inner| unsafe { put(value, *general(inner, register)?) })
}

unsafe extern "C" fn hv_vcpu_set_reg(vcpu: u64, register: u32, value: u64) -> HvReturn {
    with_state("hv_vcpu_set_reg", vcpu, |inner| {
        *general(inner, register)? = value;
        Ok(())
    })
}

unsafe extern "C" fn hv_vcpu_get_simd_fp_reg(vcpu: u64, register: u32, value: *mut Vector) -> HvReturn {
    with_state("hv_vcpu_get_simd_fp_reg", vcpu, |inner| {
        let v = inner.cpu.v.get(register as usize).ok_or(code::BAD_ARGUMENT)?;
        // SAFETY: the caller's promise (hv_vcpu.h).
        unsafe { put(value, Vector(v.to_le_bytes())) }
    })
}

unsafe fn hv_vcpu_set_simd_fp_reg(vcpu: u64, register: u32, value: &[u8; 16]) -> HvReturn {
    with_state("hv_vcpu_set_simd_fp_reg", vcpu, |inner| {
        *inner.cpu.v.get_mut(register as usize).ok_or(code::BAD_ARGUMENT)? = u128::from_le_bytes(*value);
        Ok(())
    })
}

unsafe extern "C" fn hv_vcpu_get_sys_reg(vcpu: u64, register: u16, value: *mut u64) -> HvReturn {
    with_vcpu("hv_vcpu_get_sys_reg", vcpu, |_, vcpu| {
        let cpu = &mut lock(&vcpu.inner).cpu;
        let mut found = *cpu.sys.get(&register).ok_or(code::BAD_ARGUMENT)?;
        if register == sys_reg::CNTV_CTL_EL0 {
            let due = found & 1 != 0 && ticks().wrapping_sub(cpu.offset) >= cpu.get(sys_reg::CNTV_CVAL_EL0);
            found = found & 3 | u64::from(due) << 2;
        }
        // SAFETY: the caller's promise (hv_vcpu.h).
        unsafe { put(value, found) }
    })
}

unsafe extern "C" fn hv_vcpu_set_sys_reg(vcpu: u64, register: u16, value: u64) -> HvReturn {
    with_vcpu("hv_vcpu_set_sys_reg", vcpu, |vm, cpu| {
        *lock(&cpu.inner).cpu.sys.get_mut(&register).ok_or(code::BAD_ARGUMENT)? = value;
        if let Some(device) = vm.gic.get().filter(|_| register == sys_reg::MPIDR_EL1) {
            device.place(vcpu, value);
        }
        Ok(())
    })
}

/// The state of a vCPU whose inputs are the VMM's: with a GIC they are not.
fn without_gic<'a>(vm: &Vm, vcpu: &'a Vcpu) -> Result<MutexGuard<'a, Inner>, HvReturn> {
    if vm.gic.get().is_some() { Err(code::UNSUPPORTED) } else { Ok(lock(&vcpu.inner)) }
}

unsafe extern "C" fn hv_vcpu_get_pending_interrupt(vcpu: u64, kind: u32, pending: *mut bool) -> HvReturn {
    with_vcpu("hv_vcpu_get_pending_interrupt", vcpu, |vm, vcpu| {
        let inner = &mut *without_gic(vm, vcpu)?;
        let is_pending = inner.pending.get(kind as usize).ok_or(code::BAD_ARGUMENT)?;
        // SAFETY: the caller's promise (hv_vcpu.h).
        unsafe { put(pending, *is_pending) }
    })
}

unsafe extern "C" fn hv_vcpu_set_pending_interrupt(vcpu: u64, kind: u32, pending: bool) -> HvReturn {
    with_vcpu("hv_vcpu_set_pending_interrupt", vcpu, |vm, vcpu| {
        let inner = &mut *without_gic(vm, vcpu)?;
        *inner.pending.get_mut(kind as usize).ok_or(code::BAD_ARGUMENT)? = pending;
        Ok(())
    })
}

/// A getter and a setter of a part of a vCPU.
macro_rules! accessors {
    ($($get:ident, $set:ident: $type:ty = $inner:ident => $place:expr;)*) => {
        $(
            unsafe extern "C" fn $get(vcpu: u64, value: *mut $type) -> HvReturn {
                // SAFETY: the caller's promise (hv_vcpu.h).
                with_state(stringify!($get), vcpu, |$inner| unsafe { put(value, $place) })
            }

            unsafe extern "C" fn $set(vcpu: u64, value: $type) -> HvReturn {
                with_state(stringify!($set), vcpu, |$inner| {
                    $place = value;
                    Ok(())
                })
            }
        )*
    };
}

accessors! {
    hv_vcpu_get_trap_debug_exceptions, hv_vcpu_set_trap_debug_exceptions: bool = inner => inner.cpu.trap_debug;
    hv_vcpu_get_trap_debug_reg_accesses, hv_vcpu_set_trap_debug_reg_accesses: bool = inner => inner.trap_debug_accesses;
    hv_vcpu_get_vtimer_mask, hv_vcpu_set_vtimer_mask: bool = inner => inner.timer_masked;
    hv_vcpu_get_vtimer_offset, hv_vcpu_set_vtimer_offset: u64 = inner => inner.cpu.offset;
}
