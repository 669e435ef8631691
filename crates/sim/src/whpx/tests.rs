//! The platform's contract, through its table.

use super::{API, Stop, calls, partition};
use std::ptr;
use vm_accel_sys::whpx::code::{
    E_INVALIDARG, WHV_E_GPA_RANGE_NOT_FOUND, WHV_E_INSUFFICIENT_BUFFER, WHV_E_INVALID_PARTITION_CONFIG,
    WHV_E_INVALID_VP_REGISTER_NAME, WHV_E_UNKNOWN_CAPABILITY, WHV_E_UNKNOWN_PROPERTY, WHV_E_VP_ALREADY_EXISTS,
    WHV_E_VP_DOES_NOT_EXIST,
};
use vm_accel_sys::whpx::x86_64::defs::*;
use vm_accel_sys::whpx::x86_64::fields::{Deliverability, ExtendedVmExits, MsrExitBitmap, PendingInterruption};
use vm_accel_sys::whpx::x86_64::{ExitContext, InterruptControl, RegisterValue, Segment};

const CODE: u64 = 0x1000;
const SIZE: usize = 0x10_000;

/// A page-aligned piece of host memory.
#[repr(align(4096))]
struct Ram([u8; SIZE]);

/// A partition with one real-mode processor whose code is at 0x1000.
struct Vm {
    handle: isize,
    ram: *mut Ram,
}

impl Drop for Vm {
    fn drop(&mut self) {
        // SAFETY: the partition is this one's, and its memory goes after it.
        unsafe {
            assert_eq!((API.WHvDeletePartition)(self.handle), 0);
            drop(Box::from_raw(self.ram));
        }
    }
}

impl Vm {
    fn empty() -> Self {
        let mut handle = 0;
        // SAFETY: a place for the handle.
        assert_eq!(unsafe { (API.WHvCreatePartition)(&mut handle) }, 0);
        Self { handle, ram: Box::into_raw(Box::new(Ram([0; SIZE]))) }
    }

    fn property(&self, code: i32, value: &[u8]) -> i32 {
        // SAFETY: a slice and its length.
        unsafe { (API.WHvSetPartitionProperty)(self.handle, code, value.as_ptr().cast(), value.len() as u32) }
    }

    fn new(code: &[u8]) -> Self {
        Self::with(code, |_| {})
    }

    fn with(code: &[u8], prepare: impl FnOnce(&Self)) -> Self {
        let vm = Self::empty();
        assert_eq!(vm.property(WHvPartitionPropertyCodeProcessorCount, &2u32.to_le_bytes()), 0);
        prepare(&vm);
        // SAFETY: the memory lives as long as the partition.
        unsafe {
            assert_eq!((API.WHvSetupPartition)(vm.handle), 0);
            (&raw mut (*vm.ram).0).cast::<u8>().add(CODE as usize).copy_from(code.as_ptr(), code.len());
            assert_eq!(vm.map(0, SIZE as u64, 7), 0);
            assert_eq!((API.WHvCreateVirtualProcessor)(vm.handle, 0, 0), 0);
        }
        let cs = Segment { base: 0, limit: 0xffff, selector: 0, attributes: 0x9b };
        vm.set(WHvX64RegisterCs, RegisterValue::from_segment(cs));
        vm.set(WHvX64RegisterRip, RegisterValue::from_u64(CODE));
        vm
    }

    fn map(&self, gpa: u64, size: u64, flags: i32) -> i32 {
        // SAFETY: the memory lives as long as the partition.
        unsafe { (API.WHvMapGpaRange)(self.handle, self.ram.cast(), gpa, size, flags) }
    }

    fn try_set(&self, name: i32, value: RegisterValue) -> i32 {
        // SAFETY: one name, one value.
        unsafe { (API.WHvSetVirtualProcessorRegisters)(self.handle, 0, &name, 1, &value) }
    }

    #[track_caller]
    fn set(&self, name: i32, value: RegisterValue) {
        assert_eq!(self.try_set(name, value), 0);
    }

    #[track_caller]
    fn get(&self, name: i32) -> RegisterValue {
        let mut value = RegisterValue::default();
        // SAFETY: one name, room for one value.
        assert_eq!(unsafe { (API.WHvGetVirtualProcessorRegisters)(self.handle, 0, &name, 1, &mut value) }, 0);
        value
    }

    #[track_caller]
    fn run(&self) -> ExitContext {
        let mut context = ExitContext::default();
        let size = size_of::<ExitContext>() as u32;
        // SAFETY: a context and its size.
        assert_eq!(unsafe { (API.WHvRunVirtualProcessor)(self.handle, 0, &mut context, size) }, 0);
        context
    }

    #[track_caller]
    fn expect(&self, reason: i32) -> ExitContext {
        let context = self.run();
        assert_eq!(context.reason(), reason, "{context:?}");
        context
    }

    fn rip(&self) -> u64 {
        self.get(WHvX64RegisterRip).low
    }
}

#[test]
fn the_order_of_calls_and_its_codes() {
    let vm = Vm::empty();
    // SAFETY: handles and numbers only.
    unsafe {
        assert_eq!((API.WHvSetupPartition)(vm.handle), WHV_E_INVALID_PARTITION_CONFIG, "no processor count");
        assert_eq!((API.WHvCreateVirtualProcessor)(vm.handle, 0, 0), WHV_E_INVALID_PARTITION_CONFIG);
        assert_eq!(vm.map(0, 0x1000, 7), WHV_E_INVALID_PARTITION_CONFIG);
        assert_eq!(vm.property(WHvPartitionPropertyCodeProcessorCount, &[0; 4]), E_INVALIDARG);
        // The whole union instead of the value.
        let mut union = [0; size_of::<WHV_PARTITION_PROPERTY>()];
        union[0] = 2;
        assert_eq!(vm.property(WHvPartitionPropertyCodeProcessorCount, &union), 0);
        assert_eq!(vm.property(0x7777, &[0; 8]), WHV_E_UNKNOWN_PROPERTY);
        assert_eq!((API.WHvSetupPartition)(vm.handle), 0);
        assert_eq!(vm.property(WHvPartitionPropertyCodeProcessorCount, &union), E_INVALIDARG, "fixed by the set-up");
        assert_eq!(vm.property(WHvPartitionPropertyCodeExceptionExitBitmap, &[2; 8]), 0);
        assert_eq!((API.WHvCreateVirtualProcessor)(vm.handle, 2, 0), E_INVALIDARG);
        assert_eq!((API.WHvCreateVirtualProcessor)(vm.handle, 1, 0), 0);
        assert_eq!((API.WHvCreateVirtualProcessor)(vm.handle, 1, 0), WHV_E_VP_ALREADY_EXISTS);
        assert_eq!((API.WHvCancelRunVirtualProcessor)(vm.handle, 0, 0), WHV_E_VP_DOES_NOT_EXIST);
        let mut written = 0;
        let code = (API.WHvGetCapability)(0x999, ptr::null_mut(), 0, &mut written);
        assert_eq!(code, WHV_E_UNKNOWN_CAPABILITY);
        let code = (API.WHvGetCapability)(WHvCapabilityCodeFeatures, ptr::null_mut(), 0, &mut written);
        assert_eq!((code, written), (WHV_E_INSUFFICIENT_BUFFER, 8));
    }
}

#[test]
fn a_port_access_is_left_to_the_caller() {
    // in al, 0x40; out dx, ax; rep insb
    let vm = Vm::new(&[0xe4, 0x40, 0xef, 0xf3, 0x6c, 0xf4]);
    let context = vm.expect(WHvRunVpExitReasonX64IoPortAccess);
    let (info, payload) = context.io_access();
    assert_eq!((info.is_write(), info.access_size(), info.string_op(), payload.PortNumber), (0, 1, 0, 0x40));
    assert_eq!((context.rip(), context.instruction_length()), (CODE, 2));
    assert_eq!(vm.rip(), CODE, "RIP stays");
    // Run again without an answer: the access happens anew.
    vm.expect(WHvRunVpExitReasonX64IoPortAccess);
    vm.set(WHvX64RegisterRip, RegisterValue::from_u64(CODE + 2));
    vm.set(WHvX64RegisterRdx, RegisterValue::from_u64(0x70));
    let context = vm.expect(WHvRunVpExitReasonX64IoPortAccess);
    let (info, payload) = context.io_access();
    assert_eq!((info.is_write(), info.access_size(), payload.PortNumber), (1, 2, 0x70));
    vm.set(WHvX64RegisterRip, RegisterValue::from_u64(CODE + 3));
    vm.set(WHvX64RegisterRcx, RegisterValue::from_u64(3));
    let context = vm.expect(WHvRunVpExitReasonX64IoPortAccess);
    let (info, payload) = context.io_access();
    assert_eq!((info.is_write(), info.string_op(), info.rep_prefix(), payload.Rcx), (0, 1, 1, 3));
}

#[test]
fn a_memory_access_tells_its_bytes_and_no_length() {
    // mov [0x8000 + 0x8000], al with a 32-bit address: behind the RAM
    let vm = Vm::new(&[0x67, 0x88, 0x05, 0x00, 0x00, 0x01, 0x00, 0xf4]);
    vm.set(
        WHvX64RegisterDs,
        RegisterValue::from_segment(Segment { limit: u32::MAX, attributes: 0x8093, ..Segment::default() }),
    );
    let context = vm.expect(WHvRunVpExitReasonMemoryAccess);
    let (info, payload) = context.memory_access();
    assert_eq!((info.access_type() as i32, info.gpa_unmapped(), payload.Gpa), (WHvMemoryAccessWrite, 1, 0x1_0000));
    assert_eq!(payload.InstructionBytes[..3], [0x67, 0x88, 0x05]);
    assert_eq!((vm.rip(), context.instruction_length()), (CODE, 0));
    // A mapping without the right to write is a permission fault.
    assert_eq!(vm.map(0x1_0000, 0x1000, 5), 0);
    let context = vm.expect(WHvRunVpExitReasonMemoryAccess);
    assert_eq!(context.memory_access().0.gpa_unmapped(), 0);
    // A mapping replaces another.
    assert_eq!(vm.map(0x1_0000, 0x1000, 7), 0);
    vm.expect(WHvRunVpExitReasonX64Halt);
}

#[test]
fn after_hlt_rip_is_behind_it() {
    let vm = Vm::new(&[0xf4, 0xe6, 1]);
    let context = vm.expect(WHvRunVpExitReasonX64Halt);
    assert_ne!(context.rip(), CODE + 1, "the context's RIP is undefined");
    assert_eq!(vm.rip(), CODE + 1);
    vm.expect(WHvRunVpExitReasonX64IoPortAccess);
}

#[test]
fn a_cancellation_is_sticky_and_used_up() {
    let vm = Vm::new(&[0xf4]);
    // SAFETY: handles only.
    let cancel = || assert_eq!(unsafe { (API.WHvCancelRunVirtualProcessor)(vm.handle, 0, 0) }, 0);
    cancel();
    cancel();
    vm.expect(WHvRunVpExitReasonCanceled);
    assert_eq!(vm.rip(), CODE);
    vm.expect(WHvRunVpExitReasonX64Halt);
}

#[test]
fn a_run_is_cancelled_from_another_thread() {
    let vm = Vm::new(&[0xeb, 0xfe]);
    let handle = vm.handle;
    let thread = std::thread::spawn(move || {
        // SAFETY: the partition lives until this thread is joined.
        unsafe { (API.WHvCancelRunVirtualProcessor)(handle, 0, 0) }
    });
    vm.expect(WHvRunVpExitReasonCanceled);
    assert_eq!(thread.join().unwrap(), 0);
}

#[test]
fn extended_exits_are_those_that_were_asked_for() {
    // cpuid; rdmsr 0x6e0; ud2
    let code = [0x0f, 0xa2, 0x66, 0xb9, 0xe0, 6, 0, 0, 0x0f, 0x32, 0x0f, 0x0b];
    let vm = Vm::with(&code, |vm| {
        let exits = ExtendedVmExits(0).with_x64_cpuid_exit(1).with_x64_msr_exit(1).with_exception_exit(1);
        assert_eq!(vm.property(WHvPartitionPropertyCodeExtendedVmExits, &exits.0.to_le_bytes()), 0);
        let msrs = MsrExitBitmap(0).with_unhandled_msrs(1);
        assert_eq!(vm.property(WHvPartitionPropertyCodeX64MsrExitBitmap, &msrs.0.to_le_bytes()), 0);
        assert_eq!(vm.property(WHvPartitionPropertyCodeExceptionExitBitmap, &64u64.to_le_bytes()), 0);
        assert_eq!(vm.property(WHvPartitionPropertyCodeCpuidExitList, &7u32.to_le_bytes()), 0);
    });
    vm.set(WHvX64RegisterRax, RegisterValue::from_u64(7));
    let context = vm.expect(WHvRunVpExitReasonX64Cpuid);
    assert_eq!((context.cpuid().Rax, context.instruction_length()), (7, 2));
    assert_ne!(context.cpuid().DefaultResultRbx, 0);
    vm.set(WHvX64RegisterRip, RegisterValue::from_u64(CODE + 2));
    let context = vm.expect(WHvRunVpExitReasonX64MsrAccess);
    assert_eq!((context.msr_access().1.MsrNumber, context.rip()), (0x6e0, CODE + 8));
    vm.set(WHvX64RegisterRip, RegisterValue::from_u64(CODE + 10));
    let context = vm.expect(WHvRunVpExitReasonException);
    assert_eq!((context.exception().1.ExceptionType, vm.rip()), (6, CODE + 10));
}

#[test]
fn interrupts_wait_for_their_window() {
    // sti; nop; nop; vector 0x20's handler: out 1, al
    let vm = Vm::new(&[0x90, 0xfb, 0x90, 0x90, 0xf4]);
    let window = Deliverability(0).with_interrupt(1);
    vm.set(WHvX64RegisterDeliverabilityNotifications, RegisterValue::from_u64(window.0));
    let context = vm.expect(WHvRunVpExitReasonX64InterruptWindow);
    assert_eq!((context.deliverable(), vm.rip()), (WHvX64PendingInterrupt, CODE + 3), "behind the shadow of STI");
    assert_eq!(vm.get(WHvX64RegisterDeliverabilityNotifications).low, 0, "one notification per request");
    let event = PendingInterruption(0).with_pending(1).with_vector(0x20);
    vm.set(WHvRegisterPendingInterruption, RegisterValue::from_u64(event.0));
    assert_eq!(vm.get(WHvRegisterPendingInterruption).low, event.0);
    // IVT entry 0x20: 0000:2000, a HLT.
    // SAFETY: inside the memory.
    unsafe {
        let ram = (&raw mut (*vm.ram).0).cast::<u8>();
        ram.add(0x20 * 4 + 1).write(0x20);
        ram.add(0x2000).write(0xf4);
    }
    vm.set(WHvX64RegisterRsp, RegisterValue::from_u64(0x8000));
    vm.expect(WHvRunVpExitReasonX64Halt);
    assert_eq!(vm.rip(), 0x2001);
    assert_eq!(vm.get(WHvRegisterPendingInterruption).low, 0);
    // IF is off in the handler: what hardware would refuse at entry.
    vm.set(WHvRegisterPendingInterruption, RegisterValue::from_u64(event.0));
    vm.expect(WHvRunVpExitReasonInvalidVpRegisterValue);
}

#[test]
fn registers_come_back_and_unknown_names_fail_the_whole_call() {
    let vm = Vm::new(&[0xf4]);
    let value = RegisterValue { low: 0x1122_3344_5566_7788, high: 0x99aa_bbcc_ddee_ff00 };
    for name in [WHvX64RegisterXmm0, WHvX64RegisterXmm15] {
        vm.set(name, value);
        assert_eq!(vm.get(name), value);
    }
    for name in [WHvX64RegisterRax, WHvX64RegisterR15, WHvX64RegisterCr2, WHvX64RegisterDr3, WHvX64RegisterTsc] {
        vm.set(name, RegisterValue::from_u64(1 << 40));
        assert!(vm.get(name).low >= 1 << 40);
    }
    for name in [WHvX64RegisterStar, WHvX64RegisterSfmask, WHvX64RegisterPat, WHvX64RegisterMsrMtrrPhysMask7] {
        vm.set(name, RegisterValue::from_u64(0x0006_0000));
        assert_eq!(vm.get(name).low, 0x0006_0000);
    }
    vm.set(WHvX64RegisterGdtr, RegisterValue::from_table(0x1234, 0x5678));
    assert_eq!(vm.get(WHvX64RegisterGdtr).as_table(), (0x1234, 0x5678));
    let segment = Segment { base: 0x10, limit: 0x20, selector: 0x30, attributes: 0xc093 };
    vm.set(WHvX64RegisterFs, RegisterValue::from_segment(segment));
    assert_eq!(vm.get(WHvX64RegisterFs).as_segment(), segment);
    let names = [WHvX64RegisterRax, 0x7fff_0000];
    let values = [RegisterValue::from_u64(77); 2];
    // SAFETY: two names, two values.
    let code = unsafe { (API.WHvSetVirtualProcessorRegisters)(vm.handle, 0, names.as_ptr(), 2, values.as_ptr()) };
    assert_eq!(code, WHV_E_INVALID_VP_REGISTER_NAME);
    assert_eq!(vm.get(WHvX64RegisterRax).low, 1 << 40);
    vm.set(WHvX64RegisterRflags, RegisterValue::from_u64(0));
    vm.expect(WHvRunVpExitReasonInvalidVpRegisterValue);
}

#[test]
fn the_extended_state_is_compacted() {
    let vm = Vm::new(&[0xf4]);
    let get = API.WHvGetVirtualProcessorXsaveState.unwrap();
    let set = API.WHvSetVirtualProcessorXsaveState.unwrap();
    let mut area = [0u8; 576];
    let mut written = 0;
    // SAFETY: buffers and their sizes.
    unsafe {
        assert_eq!(get(vm.handle, 0, ptr::null_mut(), 0, &mut written), WHV_E_INSUFFICIENT_BUFFER);
        assert_eq!(written, 576);
        assert_eq!(get(vm.handle, 0, area.as_mut_ptr().cast(), 576, &mut written), 0);
        assert_eq!(area[527], 0x80, "XCOMP_BV bit 63");
        area[160] = 9;
        assert_eq!(set(vm.handle, 0, area.as_ptr().cast(), 576), 0);
        assert_eq!(vm.get(WHvX64RegisterXmm0).low, 9);
        area[527] = 0;
        assert_eq!(set(vm.handle, 0, area.as_ptr().cast(), 576), E_INVALIDARG, "the standard format is refused");
    }
}

#[test]
fn dirty_pages_are_told_once() {
    // mov [0x3000], al; mov [0x9fff], ax; hlt
    let vm = Vm::new(&[0xa2, 0x00, 0x30, 0xa3, 0xff, 0x9f, 0xf4]);
    let query = API.WHvQueryGpaRangeDirtyBitmap.unwrap();
    let mut bits = [u64::MAX; 1];
    // SAFETY: a bitmap and its size.
    unsafe {
        let size = SIZE as u64;
        assert_eq!(query(vm.handle, 0, size, bits.as_mut_ptr(), 8), WHV_E_GPA_RANGE_NOT_FOUND);
        assert_eq!(vm.map(0, size, 15), 0);
        vm.expect(WHvRunVpExitReasonX64Halt);
        // Part of the range first.
        assert_eq!(query(vm.handle, 0x9000, 0x1000, bits.as_mut_ptr(), 8), 0);
        assert_eq!(bits, [1]);
        assert_eq!(query(vm.handle, 0, size, bits.as_mut_ptr(), 8), 0);
        assert_eq!(bits, [1 << 3 | 1 << 10]);
        assert_eq!(query(vm.handle, 0, size, bits.as_mut_ptr(), 8), 0);
        assert_eq!(bits, [0]);
    }
}

#[test]
fn parts_of_a_mapping_can_go() {
    let vm = Vm::new(&[0xf4]);
    // SAFETY: numbers only.
    let unmap = |gpa, size| unsafe { (API.WHvUnmapGpaRange)(vm.handle, gpa, size) };
    assert_eq!(unmap(0x4000, 0x2000), 0);
    assert_eq!(unmap(0x4000, 0x1000), WHV_E_GPA_RANGE_NOT_FOUND);
    assert_eq!(unmap(0x3000, 0x4000), WHV_E_GPA_RANGE_NOT_FOUND, "a hole inside");
    assert_eq!(unmap(0x800, 0x1000), E_INVALIDARG);
    vm.expect(WHvRunVpExitReasonX64Halt);
}

#[test]
fn the_platforms_apic_delivers_and_wakes() {
    // sti; hlt; hlt with the APIC enabled by a write to SVR through a flat DS
    let code = [
        0x67, 0x66, 0xc7, 0x05, 0xf0, 0, 0xe0, 0xfe, 0xff, 1, 0, 0, // mov dword [0xfee000f0], 0x1ff
        0xe6, 0x10, // out 0x10, al
        0xfb, 0xf4, // sti; hlt
    ];
    let vm = Vm::with(&code, |vm| {
        let mode = WHvX64LocalApicEmulationModeXApic as u32;
        assert_eq!(vm.property(WHvPartitionPropertyCodeLocalApicEmulationMode, &mode.to_le_bytes()), 0);
    });
    vm.set(
        WHvX64RegisterDs,
        RegisterValue::from_segment(Segment { limit: u32::MAX, attributes: 0x8093, ..Segment::default() }),
    );
    vm.set(WHvX64RegisterRsp, RegisterValue::from_u64(0x8000));
    vm.expect(WHvRunVpExitReasonX64IoPortAccess);
    vm.set(WHvX64RegisterRip, RegisterValue::from_u64(CODE + 14));
    // SAFETY: inside the memory; 0000:2000 is vector 0x30, an OUT.
    unsafe {
        let ram = (&raw mut (*vm.ram).0).cast::<u8>();
        ram.add(0x30 * 4 + 1).write(0x20);
        ram.add(0x2000).write(0xe6);
    }
    let handle = vm.handle;
    let thread = std::thread::spawn(move || {
        let control = InterruptControl { destination: 0, vector: 0x30, ..InterruptControl::default() };
        // SAFETY: the partition lives until this thread is joined.
        unsafe { API.WHvRequestInterrupt.unwrap()(handle, &control, size_of::<InterruptControl>() as u32) }
    });
    vm.expect(WHvRunVpExitReasonX64IoPortAccess);
    assert_eq!((vm.rip(), thread.join().unwrap()), (0x2000, 0));
}

#[cfg(not(windows))]
#[test]
fn a_doorbell_rings_instead_of_an_exit() {
    // mov [0x10000], al (67: 32-bit address), twice with another value; hlt
    let code = [0x67, 0x88, 0x05, 0, 0, 1, 0, 0xf4];
    let vm = Vm::new(&code);
    vm.set(
        WHvX64RegisterDs,
        RegisterValue::from_segment(Segment { limit: u32::MAX, attributes: 0x8093, ..Segment::default() }),
    );
    vm.set(WHvX64RegisterRax, RegisterValue::from_u64(5));
    let event = super::SimEvent::new();
    let bell = WHV_DOORBELL_MATCH_DATA { GuestAddress: 0x1_0000, Value: 5, Length: 1, _bitfield: 3 };
    // SAFETY: the event outlives the registration.
    unsafe {
        let register = API.WHvRegisterPartitionDoorbellEvent.unwrap();
        assert_eq!(register(vm.handle, &bell, event.handle()), 0);
        assert!(register(vm.handle, &bell, event.handle()) < 0, "it conflicts with itself");
        vm.expect(WHvRunVpExitReasonX64Halt);
        assert_eq!(event.count(), 1);
        assert_eq!(API.WHvUnregisterPartitionDoorbellEvent.unwrap()(vm.handle, &bell), 0);
        vm.set(WHvX64RegisterRip, RegisterValue::from_u64(CODE));
        vm.expect(WHvRunVpExitReasonMemoryAccess);
    }
}

#[test]
fn misuse_is_noticed() {
    let is_misuse = |answer: Result<(), Stop>| matches!(answer, Err(Stop::Misuse(_)));
    assert!(is_misuse(calls::check_aligned(0x1008, "an array")));
    let vm = Vm::new(&[0xf4]);
    let partition = partition::find(vm.handle).unwrap();
    partition.cancels.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
    assert!(is_misuse(partition::delete(vm.handle)), "a cancellation overlaps");
    partition.cancels.fetch_sub(1, std::sync::atomic::Ordering::SeqCst);
    assert_eq!(partition.delete_vp(0), Ok(()));
    assert!(is_misuse(partition.delete_vp(0)), "deleted twice");
    let handle = vm.handle;
    drop(vm);
    assert!(is_misuse(calls::cancel(handle, 0, 0)), "the partition is gone");
    assert!(matches!(partition::find(handle + 1), Err(Stop::Code(E_INVALIDARG))), "this never was a handle");
}

#[test]
fn every_table_is_whole() {
    use vm_accel_sys::whpx::x86_64::WhpApi;
    let all: Vec<_> = WhpApi::REQUIRED.iter().chain(WhpApi::OPTIONAL).collect();
    assert!(super::SIMULATED.iter().all(|name| all.contains(&name)));
    assert!(super::first_release().WHvRequestInterrupt.is_none());
    assert!(super::without(&["WHvMapGpaRange2"]).WHvMapGpaRange2.is_none());
}

#[test]
fn a_hostile_platform_leaves_for_nothing_and_loses_nothing() {
    // inc ax; out 0x10, al; jmp back
    let vm = Vm::new(&[0x40, 0xe6, 0x10, 0xeb, 0xfb]);
    let vp = partition::find(vm.handle).unwrap().vp(0).unwrap();
    vp.state().unwrap().mischief = crate::hostile::Mischief::new(Some(1));
    let (mut seen, mut absent_bytes, mut count) = ([0; 3], 0, 0);
    while count < 200 {
        let context = vm.run();
        match context.reason() {
            WHvRunVpExitReasonX64IoPortAccess => {
                count += 1;
                let payload = context.io_access().1;
                absent_bytes += usize::from(payload.InstructionByteCount == 0);
                assert_eq!(payload.Rax, count);
                vm.set(WHvX64RegisterRip, RegisterValue::from_u64(CODE + 3));
            }
            WHvRunVpExitReasonNone => seen[0] += 1,
            WHvRunVpExitReasonCanceled => seen[1] += 1,
            WHvRunVpExitReasonMemoryAccess => {
                seen[2] += 1;
                assert_eq!(context.memory_access().0.gpa_unmapped(), 0, "the memory is there");
            }
            other => panic!("{other:#x}"),
        }
    }
    assert!(seen.iter().all(|times| *times > 3) && absent_bytes > 3, "{seen:?}, {absent_bytes}");
}
