//! Each protocol's state on a CPU: a kernel of a few bytes reads what its registers point to and says it at a port.
//!
//! Straight on the accelerator, without a board. One that this host lacks is skipped with its reason;
//! `VM_ACCEL_REQUIRE` (`kvm,soft`) makes that a failure.

use crate::support::*;
use vm_accel::GuestArch::X86_64;
use vm_accel::{Accel, AccelKind, GuestMemory, GuestRegion, MemoryFlags, PlatformBackend, VcpuExit, probe_kind};
use vm_accel_machine::boot::{BootKind, BootRequest, BootState, Protocol};

const RAM: u64 = 32 * MIB;
const PORT: u16 = 0xf4;

/// Every accelerator of this host that has x86 guests.
fn accelerators() -> Vec<AccelKind> {
    let required = std::env::var("VM_ACCEL_REQUIRE").unwrap_or_default();
    let usable = |kind: &AccelKind| {
        let reason = match probe_kind(*kind) {
            Ok(caps) if caps.runs_vcpus(X86_64) => return true,
            Ok(caps) => format!("it has no vCPUs for x86-64 but guests of {}", caps.guest_arch),
            Err(error) => error.to_string(),
        };
        let is_required = required.split(',').any(|name| name == kind.name());
        assert!(!is_required, "{kind} is required, but: {reason}");
        println!("skipped: {kind}: {reason}");
        false
    };
    AccelKind::ALL.into_iter().filter(usable).collect()
}

/// Boots `image` and returns what it says at [`PORT`] until it halts.
fn answers(accel: AccelKind, protocol: Protocol, image: &[u8]) -> Vec<Vec<u8>> {
    let map = pc_memory(RAM);
    let request = BootRequest { kind: BootKind::Exactly(protocol), ..BootRequest::new(X86_64, image, &map) };
    let plan = request.plan().unwrap();
    let mut vm = PlatformBackend::new(accel).unwrap();
    let region = GuestRegion::anonymous(RAM).unwrap();
    vm.map_memory(0, &region, MemoryFlags::RAM).unwrap();
    let memory = GuestMemory::new();
    memory.insert(0, region).unwrap();
    plan.load(&mut &memory).unwrap();
    for mapping in plan.mappings.iter().filter(|mapping| !mapping.writable) {
        let rom = GuestRegion::anonymous(mapping.data.len() as u64).unwrap();
        rom.write(0, mapping.data).unwrap();
        vm.map_memory(mapping.gpa, &rom, MemoryFlags::ROM).unwrap();
    }

    let BootState::X86(state) = plan.state else {
        panic!("not an x86 CPU");
    };
    let mut vcpu = vm.create_vcpu(0).unwrap();
    let x86 = vcpu.as_x86().expect("it has x86 guests");
    let sregs = state.over(&x86.get_sregs().unwrap());
    x86.set_sregs(&sregs).unwrap();
    vcpu.set_regs(&state.regs).unwrap();
    let mut said = Vec::new();
    loop {
        match vcpu.run().unwrap() {
            VcpuExit::Io { port: PORT, .. } => said.push(vcpu.io_data().unwrap().to_vec()),
            VcpuExit::Halted => return said,
            other => panic!("{accel}, {protocol}: unexpected {other:?} at {:x?}", vcpu.get_regs()),
        }
    }
}

/// Loads every data segment from the GDT anew, runs `code`, and says EAX. The same bytes in 32-bit and 64-bit mode.
fn saying_eax(code: &[u8]) -> Vec<u8> {
    let reload = [
        0x8c, 0xd9, // mov ecx, ds
        0x8e, 0xd9, // mov ds, ecx
        0x8e, 0xc1, // mov es, ecx
        0x8e, 0xd1, // mov ss, ecx
    ];
    let say = [
        0x66, 0xba, 0xf4, 0x00, // mov dx, 0xf4
        0xef, // out dx, eax
    ];
    [&reload[..], code, &say].concat()
}

/// Replaces the bytes of `image` from `at` on.
fn with(mut image: Vec<u8>, at: usize, code: &[u8]) -> Vec<u8> {
    image[at..at + code.len()].copy_from_slice(code);
    image
}

const HLT: &[u8] = &[0xf4];

#[track_caller]
fn assert_says(protocol: Protocol, image: &[u8], expected: &[&[u8]]) {
    for accel in accelerators() {
        assert_eq!(answers(accel, protocol, image), expected, "{accel}, {protocol}");
    }
}

/// mov eax, [rsi + 0x202]: the magic number in the zero page.
const ZERO_PAGE_MAGIC: &[u8] = &[0x8b, 0x86, 0x02, 0x02, 0x00, 0x00];

#[test]
fn linux_finds_its_zero_page_in_64_bit_mode() {
    // mov rax, imm64 in 64-bit mode only: its upper half says that this is it.
    let wide = [0x48, 0xb8, 0, 0, 0, 0, 0x78, 0x56, 0x34, 0x12, 0x48, 0xc1, 0xe8, 0x20];
    let code = [saying_eax(ZERO_PAGE_MAGIC), saying_eax(&wide), HLT.to_vec()].concat();
    let expected: &[&[u8]] = &[b"HdrS", &[0x78, 0x56, 0x34, 0x12]];
    assert_says(Protocol::Linux, &with(bzimage(0x400), 1024 + 0x200, &code), expected);
    assert_says(Protocol::Elf, &with(plain_elf(), 0x1000, &code), expected);
}

#[test]
fn linux_finds_its_zero_page_in_32_bit_mode() {
    let code = [saying_eax(ZERO_PAGE_MAGIC), HLT.to_vec()].concat();
    assert_says(Protocol::Linux32, &with(bzimage(0x400), 1024, &code), &[b"HdrS"]);
}

#[test]
fn pvh_kernels_find_their_start_info() {
    // mov eax, [ebx]
    let code = [saying_eax(&[0x8b, 0x03]), HLT.to_vec()].concat();
    let magic = 0x336e_c578u32.to_le_bytes();
    assert_says(Protocol::Pvh, &with(pvh_kernel(), 0x2010, &code), &[&magic]);
}

#[test]
fn multiboot_kernels_find_their_information() {
    // EAX as it is; mov eax, [ebx + 44], the length of the memory map.
    let code = [saying_eax(&[]), saying_eax(&[0x8b, 0x43, 44]), HLT.to_vec()].concat();
    let magic = 0x2bad_b002u32.to_le_bytes();
    let expected: &[&[u8]] = &[&magic, &[72, 0, 0, 0]];
    assert_says(Protocol::Multiboot, &with(multiboot_elf(), 0x1010, &code), expected);
    assert_says(Protocol::Multiboot, &with(multiboot_flat(), 0x30 + 0x80, &code), expected);
}

/// 16-bit: mov ax, sp; mov dx, 0xf4; out dx, ax; hlt.
const SAY_SP: &[u8] = &[0x89, 0xe0, 0xba, 0xf4, 0x00, 0xef, 0xf4];

#[test]
fn flat_binaries_have_their_stack_below() {
    assert_says(Protocol::Flat, &with(boot_sector(), 0, SAY_SP), &[&[0x00, 0x7c]]);
}

#[test]
fn firmware_begins_at_the_reset_vector() {
    let size = 64 << 10;
    // A short jump back to 16 bytes before it: still at the top of the first 4 GiB.
    let image = with(firmware(size), size - 16, &[0xeb, 0xee]);
    let image = with(image, size - 32, SAY_SP);
    assert_says(Protocol::Firmware, &image, &[&[0, 0]]);
}
