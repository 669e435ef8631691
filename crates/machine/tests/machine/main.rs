//! Whole machines with tiny guests, on every accelerator of this host that can be the board's.
//!
//! An accelerator that is not there is skipped with its reason; `VM_ACCEL_REQUIRE` (`kvm,soft`) makes that a failure.

use std::io::Write;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use vm_accel::{AccelKind, IrqChip, PlatformBackend, probe_kind};
use vm_accel_guests::asm::{CodeAssembler, CodeLabel, *};
use vm_accel_guests::{Bits, IcedError, assemble};
use vm_accel_machine::boot::{BootKind, Protocol};
use vm_accel_machine::{Control, Failure, Guest, Machine, MachineConfig, MachineError, Outcome};

/// Where the guests are loaded: a page that a startup IPI can name.
const AT: u64 = 0x8000;
/// Longer than any guest here takes; a guest that hangs must not hang the test.
const LIMIT: Option<Duration> = Some(Duration::from_secs(60));

#[derive(Clone, Default)]
struct Sink(Arc<Mutex<Vec<u8>>>);

impl Write for Sink {
    fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(data);
        Ok(data.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Where to test: an accelerator, and whose the interrupt controllers are.
type Place = (AccelKind, IrqChip);

/// Every place that this host has.
fn places() -> Vec<Place> {
    let required = std::env::var("VM_ACCEL_REQUIRE").unwrap_or_default();
    let mut places = Vec::new();
    for kind in AccelKind::ALL {
        let reason = match probe_kind(kind) {
            Ok(caps) => {
                let chips = [(caps.kernel_irqchip, IrqChip::Kernel), (caps.split_irqchip, IrqChip::Split)];
                let before = places.len();
                places.extend(chips.into_iter().filter(|(has, _)| *has).map(|(_, chip)| (kind, chip)));
                if places.len() > before {
                    continue;
                }
                "it has no local APICs".to_owned()
            }
            Err(error) => error.to_string(),
        };
        assert!(!required.split(',').any(|name| name == kind.name()), "{kind} is required, but: {reason}");
        eprintln!("skipped: {kind}: {reason}");
    }
    places
}

/// A real-mode guest.
fn program(write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Vec<u8> {
    assemble(Bits::B16, AT, write)
}

fn guest(image: &[u8]) -> Guest<'_> {
    Guest { kind: BootKind::Exactly(Protocol::Flat), flat_address: AT, ..Guest::new(image) }
}

fn machine((kind, chip): Place, cpus: u32, image: &[u8], sink: &Sink) -> Machine {
    let accel = Box::new(PlatformBackend::new(kind).unwrap());
    let config = MachineConfig { memory: 16 << 20, cpus, irqchip: Some(chip), ..MachineConfig::default() };
    Machine::new(accel, &config, &guest(image), Box::new(sink.clone())).unwrap()
}

/// Runs a guest on each accelerator; answers each outcome and what it wrote to its serial port.
fn run(cpus: u32, write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Vec<(Outcome, String)> {
    run_at(&places(), cpus, write)
}

/// Runs a guest in some places.
fn run_at(
    places: &[Place],
    cpus: u32,
    write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Vec<(Outcome, String)> {
    let image = program(write);
    let on = |place| {
        let sink = Sink::default();
        let outcome = machine(place, cpus, &image, &sink).run(LIMIT);
        let text = String::from_utf8_lossy(&sink.0.lock().unwrap()).into_owned();
        eprintln!("{place:?}: {outcome}");
        (outcome, text)
    };
    places.iter().copied().map(on).collect()
}

fn out8(a: &mut CodeAssembler, port: u32, value: u32) -> Result<(), IcedError> {
    a.mov(dx, port)?;
    a.mov(al, value)?;
    a.out(dx, al)
}

/// Begins a program with a part that is not run through, and answers its address: 16-bit code has no addresses relative
/// to itself, so the part stands behind a jump of known length.
fn aside(
    a: &mut CodeAssembler,
    write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Result<u32, IcedError> {
    const SHORT_JUMP: u64 = 2;
    let mut over = a.create_label();
    a.jmp(over)?;
    write(a)?;
    a.set_label(&mut over)?;
    Ok((AT + SHORT_JUMP) as u32)
}

fn label(a: &mut CodeAssembler) -> Result<CodeLabel, IcedError> {
    let mut label = a.create_label();
    a.set_label(&mut label)?;
    Ok(label)
}

#[test]
fn a_guest_writes_a_line_and_leaves_through_the_exit_port() {
    for (outcome, text) in run(1, |a| {
        let message = aside(a, |a| a.db(b"hello\n"))?;
        a.mov(dx, 0x3f8)?;
        a.mov(si, message)?;
        a.mov(cx, 6)?;
        a.cld()?;
        a.rep().outsb()?;
        a.mov(al, 0x2a)?;
        a.out(0xf4, al)?;
        let end = label(a)?;
        a.jmp(end)
    }) {
        assert_eq!((outcome, text.as_str()), (Outcome::ExitPort(0x2a), "hello\n"));
    }
}

#[test]
fn shutdown_and_each_reset_are_told_apart() {
    for (port, value, expected) in [
        (0x604, 0x2000, Outcome::Shutdown),
        (0x64, 0xfe, Outcome::Reset),
        (0x92, 0x01, Outcome::Reset),
        (0xcf9, 0x06, Outcome::Reset),
    ] {
        for (outcome, _) in run(1, |a| {
            a.mov(dx, port)?;
            a.mov(ax, value)?;
            if value > 0xff {
                a.out(dx, ax)?
            } else {
                a.out(dx, al)?
            }
            let end = label(a)?;
            a.jmp(end)
        }) {
            assert_eq!(outcome, expected, "{port:#x}");
        }
    }
}

#[test]
fn a_triple_fault_names_its_cpu() {
    for (outcome, _) in run(1, |a| {
        // Protected mode with an interrupt table without an entry. (Not real mode: KVM's emulator of that looks at no limit.)
        let table = aside(a, |a| a.db(&[0; 6]))?;
        a.mov(bx, table)?;
        a.lidt(fword_ptr(bx))?;
        a.mov(eax, cr0)?;
        a.or(al, 1)?;
        a.mov(cr0, eax)?;
        a.ud2()
    }) {
        assert_eq!(outcome, Outcome::TripleFault { cpu: 0 });
    }
}

#[test]
fn a_guest_that_spins_or_sleeps_meets_its_limit() {
    for sleeps in [false, true] {
        let image = program(|a| {
            a.cli()?;
            let end = label(a)?;
            if sleeps {
                a.hlt()?;
            }
            a.jmp(end)
        });
        for place in places() {
            let outcome = machine(place, 2, &image, &Sink::default()).run(Some(Duration::from_millis(50)));
            assert_eq!(outcome, Outcome::Timeout);
        }
    }
}

#[test]
fn the_host_stops_a_guest_from_another_thread() {
    let image = program(|a| {
        out8(a, 0x3f8, u32::from(b'x'))?;
        let end = label(a)?;
        a.jmp(end)
    });
    for place in places() {
        let sink = Sink::default();
        let machine = machine(place, 1, &image, &sink);
        let control: Control = machine.control();
        let runner = std::thread::spawn(move || machine.run(LIMIT));
        while sink.0.lock().unwrap().is_empty() {
            std::thread::yield_now();
        }
        control.finish(Outcome::Stopped);
        assert_eq!(runner.join().unwrap(), Outcome::Stopped);
    }
}

#[test]
fn places_without_a_device_read_all_ones() {
    for (outcome, _) in run(1, |a| {
        // A port, and memory in the hole below 1 MiB.
        a.mov(dx, 0x2f8)?;
        a.in_(ax, dx)?;
        a.mov(bx, ax)?;
        a.mov(ax, 0xa000)?;
        a.mov(ds, ax)?;
        a.and(bx, word_ptr(0x10))?;
        a.mov(ax, bx)?;
        a.mov(dx, 0xf4)?;
        a.out(dx, ax)?;
        let end = label(a)?;
        a.jmp(end)
    }) {
        assert_eq!(outcome, Outcome::ExitPort(0xffff));
    }
}

#[test]
fn input_interrupts_the_guest_and_is_echoed() {
    const VECTOR: u32 = 0x0c; // IRQ 4
    let image = program(|a| {
        let handler = aside(a, |a| {
            let mut done = a.create_label();
            // The line is edge-triggered: all input must be taken, or the line never falls and rises again.
            let more = label(a)?;
            a.mov(dx, 0x3fd)?;
            a.in_(al, dx)?;
            a.test(al, 1)?;
            a.je(done)?;
            a.mov(dx, 0x3f8)?;
            a.in_(al, dx)?;
            a.out(dx, al)?;
            a.cmp(al, i32::from(b'\n'))?;
            a.jne(more)?;
            a.out(0xf4, al)?;
            a.set_label(&mut done)?;
            a.mov(al, 0x20)?;
            a.out(0x20, al)?;
            a.iret()
        })?;
        a.cli()?;
        a.xor(ax, ax)?;
        a.mov(ds, ax)?;
        a.mov(ss, ax)?;
        a.mov(sp, 0x7000)?;
        a.mov(word_ptr(VECTOR * 4), handler)?;
        a.mov(word_ptr(VECTOR * 4 + 2), 0)?;
        // The PICs: edge-triggered, vectors 8 and 0x70, IRQ 4 open.
        let pics = [
            (0x20, 0x11),
            (0x21, 8),
            (0x21, 4),
            (0x21, 1),
            (0xa0, 0x11),
            (0xa1, 0x70),
            (0xa1, 2),
            (0xa1, 1),
            (0x21, 0xef),
            (0xa1, 0xff),
        ];
        // The UART: FIFOs, DTR, RTS, OUT2, received-data interrupt.
        for (port, value) in pics.into_iter().chain([(0x3fa, 0x01), (0x3fc, 0x0b), (0x3f9, 0x01)]) {
            out8(a, port, value)?;
        }
        let idle = label(a)?;
        a.sti()?;
        a.hlt()?;
        a.jmp(idle)
    });
    // Beside local APICs of their own, not every accelerator takes the PICs' vectors.
    for place in places().into_iter().filter(|(_, chip)| *chip == IrqChip::Kernel) {
        let sink = Sink::default();
        let machine = machine(place, 1, &image, &sink);
        let input = machine.serial_input();
        let typed: Vec<u8> = (0..5000).map(|i| b'a' + i as u8 % 26).chain([b'\n']).collect();
        let typist = std::thread::spawn({
            let (input, typed) = (input.clone(), typed.clone());
            move || input.send(&typed)
        });
        assert_eq!(machine.run(LIMIT), Outcome::ExitPort(10));
        assert_eq!(typist.join().unwrap(), Ok(()));
        assert_eq!(*sink.0.lock().unwrap(), typed);
        assert!(input.send(b"late").is_err());
    }
}

/// Enables the local APIC in x2APIC mode, where real mode reaches its registers, and keeps the PICs' interrupts out.
fn x2apic(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.mov(ecx, 0x1b)?;
    a.rdmsr()?;
    a.or(eax, 0xc00)?;
    a.wrmsr()?;
    a.xor(edx, edx)?;
    // LINT0 masked; spurious vector 0xff, software enable.
    for (register, value) in [(0x835, 0x1_0000), (0x80f, 0x1ff)] {
        a.mov(ecx, register)?;
        a.mov(eax, value)?;
        a.wrmsr()?;
    }
    Ok(())
}

/// Leaves a guest in unreal mode: real mode whose DS reaches 4 GiB from 0. `table` is the address of [`FLAT`].
fn unreal(a: &mut CodeAssembler, table: u32) -> Result<(), IcedError> {
    a.xor(ax, ax)?;
    a.mov(ds, ax)?;
    a.mov(word_ptr(0x500), 15)?;
    a.mov(dword_ptr(0x502), table)?;
    a.lgdt(fword_ptr(0x500))?;
    a.mov(eax, cr0)?;
    a.or(al, 1)?;
    a.mov(cr0, eax)?;
    a.mov(bx, 8)?;
    a.mov(ds, bx)?;
    a.and(al, 0xfe)?;
    a.mov(cr0, eax)
}

/// A descriptor table with a flat data segment at 8.
const FLAT: [u8; 16] = [0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0, 0, 0x92, 0xcf, 0];

#[test]
fn the_timer_ticks_through_the_io_apic() {
    const VECTOR: u32 = 0x40;
    for (outcome, _) in run(1, |a| {
        let mut handler = 0;
        let table = aside(a, |a| {
            a.db(&FLAT)?;
            handler = (AT as usize + 2 + FLAT.len()) as u32;
            // Count in BP; end the interrupt through the x2APIC; leave at the tenth tick.
            let mut done = a.create_label();
            a.inc(bp)?;
            a.mov(ecx, 0x80b)?;
            a.xor(eax, eax)?;
            a.xor(edx, edx)?;
            a.wrmsr()?;
            a.cmp(bp, 10)?;
            a.jb(done)?;
            a.mov(al, 10)?;
            a.out(0xf4, al)?;
            a.set_label(&mut done)?;
            a.iret()
        })?;
        a.cli()?;
        unreal(a, table)?;
        a.xor(bp, bp)?;
        a.mov(ss, bp)?;
        a.mov(sp, 0x7000)?;
        a.mov(word_ptr(VECTOR * 4), handler)?;
        a.mov(word_ptr(VECTOR * 4 + 2), 0)?;
        x2apic(a)?;
        // I/O APIC pin 2, the timer: edge, to APIC 0.
        a.mov(ebx, 0xfec0_0000u32)?;
        for (register, value) in [(0x15, 0), (0x14, VECTOR)] {
            a.mov(dword_ptr(ebx), register)?;
            a.mov(dword_ptr(ebx + 0x10), value)?;
        }
        // PIT channel 0, mode 2, about a kilohertz.
        for (port, value) in [(0x43, 0x34), (0x40, 0xa9), (0x40, 0x04)] {
            out8(a, port, value)?;
        }
        let idle = label(a)?;
        a.sti()?;
        a.hlt()?;
        a.jmp(idle)
    }) {
        assert_eq!(outcome, Outcome::ExitPort(10));
    }
}

#[test]
fn a_level_triggered_line_comes_again_until_it_is_served() {
    const VECTOR: u32 = 0x41;
    // Of the board's own I/O APIC. One in a kernel may repeat an interrupt more often than it must.
    let mut own = places();
    own.retain(|(_, chip)| *chip == IrqChip::Split);
    for (outcome, _) in run_at(&own, 1, |a| {
        let mut handler = 0;
        let table = aside(a, |a| {
            a.db(&FLAT)?;
            handler = (AT as usize + 2 + FLAT.len()) as u32;
            // The third time the line is taken back before the interrupt is ended.
            let mut up = a.create_label();
            a.inc(bp)?;
            a.cmp(bp, 3)?;
            a.jne(up)?;
            out8(a, 0x2000 + 11, 0)?;
            a.set_label(&mut up)?;
            a.mov(ecx, 0x80b)?;
            a.xor(eax, eax)?;
            a.xor(edx, edx)?;
            a.wrmsr()?;
            a.iret()
        })?;
        a.cli()?;
        unreal(a, table)?;
        a.xor(bp, bp)?;
        a.mov(ss, bp)?;
        a.mov(sp, 0x7000)?;
        a.mov(word_ptr(VECTOR * 4), handler)?;
        a.mov(word_ptr(VECTOR * 4 + 2), 0)?;
        x2apic(a)?;
        // I/O APIC pin 11: level, active high.
        a.mov(ebx, 0xfec0_0000u32)?;
        for (register, value) in [(0x10 + 2 * 11 + 1, 0), (0x10 + 2 * 11, 0x8000 | VECTOR)] {
            a.mov(dword_ptr(ebx), register)?;
            a.mov(dword_ptr(ebx + 0x10), value)?;
        }
        a.sti()?;
        out8(a, 0x2000 + 11, 1)?;
        let mut wait = a.create_label();
        a.set_label(&mut wait)?;
        a.pause()?;
        a.cmp(bp, 3)?;
        a.jb(wait)?;
        // Some instructions later it must still be three.
        a.mov(cx, 1000)?;
        let later = label(a)?;
        a.in_(al, 0x80)?;
        a.dec(cx)?;
        a.jne(later)?;
        a.mov(ax, bp)?;
        a.out(0xf4, al)?;
        let end = label(a)?;
        a.jmp(end)
    }) {
        assert_eq!(outcome, Outcome::ExitPort(3));
    }
}

#[test]
fn every_cpu_comes_up_and_knows_its_number() {
    const CPUS: u32 = 2;
    for (outcome, _) in run(CPUS, |a| {
        let mut ap = a.create_label();
        a.xor(ax, ax)?;
        a.mov(ds, ax)?;
        // IA32_APIC_BASE: the boot CPU's bit, then x2APIC mode, whose registers real mode reaches.
        a.mov(ecx, 0x1b)?;
        a.rdmsr()?;
        a.test(eax, 1 << 8)?;
        a.je(ap)?;
        a.or(eax, 0xc00)?;
        a.wrmsr()?;
        // INIT and startup (vector = page of this program) to all but self.
        a.mov(ecx, 0x830)?;
        a.xor(edx, edx)?;
        a.mov(eax, 0x000c_4500)?;
        a.wrmsr()?;
        a.mov(eax, 0x000c_4600 | (AT >> 12) as u32)?;
        a.wrmsr()?;
        let wait = label(a)?;
        a.pause()?;
        a.cmp(byte_ptr(0x500), CPUS as i32 - 1)?;
        a.jne(wait)?;
        // The exit value: what the other CPU found out, and how many CPUs fw_cfg tells of.
        a.mov(dx, 0x510)?;
        a.mov(ax, 5)?;
        a.out(dx, ax)?;
        a.inc(dx)?;
        a.in_(al, dx)?;
        a.mov(ah, byte_ptr(0x501))?;
        a.mov(dx, 0xf4)?;
        a.out(dx, ax)?;
        let end = label(a)?;
        a.jmp(end)?;
        a.set_label(&mut ap)?;
        a.mov(eax, 1)?;
        a.cpuid()?;
        a.shr(ebx, 24)?;
        a.mov(byte_ptr(0x501), bl)?;
        a.lock().inc(byte_ptr(0x500))?;
        let sleep = label(a)?;
        a.hlt()?;
        a.jmp(sleep)
    }) {
        assert_eq!(outcome, Outcome::ExitPort(0x0102));
    }
}

#[test]
fn the_acpi_tables_are_where_the_guest_looks() {
    for (outcome, text) in run(1, |a| {
        a.mov(ax, 0xe000)?;
        a.mov(ds, ax)?;
        a.xor(si, si)?;
        a.mov(dx, 0x3f8)?;
        a.mov(cx, 8)?;
        a.cld()?;
        a.rep().outsb()?;
        a.mov(dx, 0x604)?;
        a.mov(ax, 0x2000)?;
        a.out(dx, ax)
    }) {
        assert_eq!((outcome, text.as_str()), (Outcome::Shutdown, "RSD PTR "));
    }
}

/// A guest's accesses to memory that exits, in each width.
#[test]
fn memory_mapped_devices_are_reached() {
    for (outcome, text) in run(1, |a| {
        let table = aside(a, |a| a.db(&FLAT))?;
        unreal(a, table)?;
        a.mov(ebx, 0xff00_0000u32)?;
        a.mov(dword_ptr(ebx), 0x6463_6261)?;
        a.mov(word_ptr(ebx + 1), 0x5a59)?;
        a.mov(byte_ptr(ebx + 3), u32::from(b'!'))?;
        a.mov(eax, dword_ptr(ebx))?;
        a.mov(dx, 0x3f8)?;
        for _ in 0..4 {
            a.out(dx, al)?;
            a.shr(eax, 8)?;
        }
        a.mov(dx, 0x604)?;
        a.mov(ax, 0x2000)?;
        a.out(dx, ax)
    }) {
        assert_eq!((outcome, text.as_str()), (Outcome::Shutdown, "aYZ!"));
    }
}

#[test]
fn firmware_starts_at_the_reset_vector_and_may_write_to_its_low_copy_only() {
    const SIZE: usize = 0x1_0000;
    let mut image = vec![0xf4; SIZE];
    // At 0xf000:0x0000: write to both copies of the byte at 0x100, add what reads back.
    let code = assemble(Bits::B16, 0, |a| {
        a.mov(ax, 0xf000)?;
        a.mov(ds, ax)?;
        a.mov(byte_ptr(0x100), 0x21)?;
        a.mov(al, byte_ptr(0x100))?;
        a.out(0xf4, al)?;
        a.hlt()
    });
    image[..code.len()].copy_from_slice(&code);
    // At the reset vector: a far jump to it.
    image[SIZE - 16..SIZE - 11].copy_from_slice(&[0xea, 0x00, 0x00, 0x00, 0xf0]);
    for place in places() {
        let accel = Box::new(PlatformBackend::new(place.0).unwrap());
        let firmware = Guest { kind: BootKind::Exactly(Protocol::Firmware), ..Guest::new(&image) };
        let machine = Machine::new(accel, &MachineConfig::default(), &firmware, Box::new(std::io::sink())).unwrap();
        let memory = machine.memory();
        assert_eq!(machine.run(LIMIT), Outcome::ExitPort(0x21));
        assert_eq!((memory.read_u8(0xf_0100).unwrap(), memory.read_u8(0xffff_0100).unwrap()), (0x21, 0xf4));
    }
}

#[test]
fn a_closed_serial_port_ends_the_machine_with_a_reason() {
    struct Closed;
    impl Write for Closed {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            Err(std::io::ErrorKind::BrokenPipe.into())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let image = program(|a| {
        let again = label(a)?;
        out8(a, 0x3f8, u32::from(b'x'))?;
        a.jmp(again)
    });
    for place in places() {
        let accel = Box::new(PlatformBackend::new(place.0).unwrap());
        let machine = Machine::new(accel, &MachineConfig::default(), &guest(&image), Box::new(Closed)).unwrap();
        let outcome = machine.run(LIMIT);
        assert!(matches!(outcome, Outcome::Failed(Failure::Output { .. })), "{outcome}");
    }
}

#[test]
fn what_cannot_be_built_is_refused_with_a_reason() {
    let image = program(|a| a.hlt());
    for place in places() {
        let build = |memory, cpus, image: &[u8]| {
            let accel = Box::new(PlatformBackend::new(place.0).unwrap());
            let config = MachineConfig { memory, cpus, ..MachineConfig::default() };
            Machine::new(accel, &config, &Guest { kind: BootKind::Auto, ..guest(image) }, Box::new(std::io::sink()))
        };
        for memory in [0, 1, 3 << 20 | 1, u64::MAX, 1 << 62] {
            assert!(matches!(build(memory, 1, &image), Err(MachineError::Memory { .. })), "{memory:#x}");
        }
        for cpus in [0, 100_000, u32::MAX] {
            assert!(matches!(build(16 << 20, cpus, &image), Err(MachineError::Cpus { .. })), "{cpus}");
        }
        for bad in [&[][..], b"\xff\xd8\xff\xe0 a picture", &[0; 4096]] {
            assert!(matches!(build(16 << 20, 1, bad), Err(MachineError::Boot(_))));
        }
    }
}

#[test]
fn machines_come_and_go_in_one_process() {
    let image = program(|a| {
        out8(a, 0xf4, 1)?;
        a.hlt()
    });
    for place in places() {
        for _ in 0..10 {
            assert_eq!(machine(place, 2, &image, &Sink::default()).run(LIMIT), Outcome::ExitPort(1));
        }
    }
}
