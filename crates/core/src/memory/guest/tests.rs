use super::*;
use std::sync::atomic::AtomicBool;

fn region(pages: u64) -> GuestRegion {
    GuestRegion::anonymous(pages * host_page_size()).unwrap()
}

fn page(number: u64) -> u64 {
    number * host_page_size()
}

#[track_caller]
fn assert_invalid<T: fmt::Debug>(result: VcpuResult<T>, texts: &[&str]) {
    let error = result.unwrap_err();
    assert!(matches!(error, AccelError::InvalidArgument { .. }), "{error:?}");
    for text in texts {
        assert!(error.to_string().contains(text), "{error} lacks {text}");
    }
}

/// Pages 1, 2 (one region), 3 (another), a hole, 5 (read-only).
fn memory() -> GuestMemory {
    let memory = GuestMemory::new();
    memory.insert(page(3), region(1)).unwrap();
    memory.insert(page(1), region(2)).unwrap();
    memory.insert(page(5), read_only_page()).unwrap();
    memory
}

fn read_only_page() -> GuestRegion {
    let path = std::env::current_exe().unwrap();
    let file = std::fs::File::open(path).unwrap();
    GuestRegion::from_file(&file, 0, host_page_size(), super::super::FileMapping::ReadOnly).unwrap()
}

#[test]
fn regions_come_sorted_whatever_the_order_of_insertion() {
    let memory = memory();
    let places: Vec<u64> = memory.regions().iter().map(|(gpa, _)| *gpa).collect();
    assert_eq!(places, vec![page(1), page(3), page(5)]);
}

#[test]
fn overlaps_are_refused_and_named() {
    let memory = memory();
    let named = |gpa: u64, end: u64| format!("[{gpa:#x}, {end:#x})");
    for (at, pages, with) in [
        (1, 1, named(page(1), page(3))),
        (2, 1, named(page(1), page(3))),
        (0, 2, named(page(1), page(3))),
        (0, 9, named(page(1), page(3))),
        (4, 2, named(page(5), page(6))),
    ] {
        assert_invalid(
            memory.insert(page(at), region(pages)),
            &["overlaps", &with, &named(page(at), page(at + pages))],
        );
    }
    assert_eq!(memory.regions().len(), 3);
    memory.insert(page(4), region(1)).unwrap();
    memory.insert(0, region(1)).unwrap();
    memory.insert(page(6), region(1)).unwrap();
}

#[test]
fn misplaced_regions_are_refused() {
    let memory = memory();
    assert_invalid(memory.insert(page(8) + 1, region(1)), &["page size"]);
    let last = 0u64.wrapping_sub(page(1));
    assert_invalid(memory.insert(last, region(1)), &["beyond the address space"]);
    assert_invalid(memory.insert(last, region(2)), &["beyond the address space"]);
    memory.insert(last - page(1), region(1)).unwrap();
    memory.write_u8(last - 1, 1).unwrap();
    assert_invalid(memory.write_u8(last, 1), &["no memory", &format!("{last:#x}")]);
}

#[test]
fn only_the_start_of_a_region_removes_it() {
    let memory = memory();
    assert_invalid(memory.remove(page(2)), &["no region starts"]);
    memory.write_u32(page(1), 42).unwrap();
    let removed = memory.remove(page(1)).unwrap();
    assert!(memory.read_u32(page(1)).is_err());
    assert_eq!(removed.load::<u32>(0, Ordering::Relaxed).unwrap(), 42);
    assert_invalid(memory.remove(page(1)), &["no region starts"]);
}

#[test]
fn accesses_span_neighbouring_regions() {
    let memory = memory();
    let data: Vec<u8> = (0..2 * host_page_size()).map(|i| (i % 251) as u8).collect();
    let gpa = page(3) - host_page_size() - 5;
    memory.write(gpa, &data).unwrap();
    let mut back = vec![0; data.len()];
    memory.read(gpa, &mut back).unwrap();
    assert_eq!(back, data);
    memory.write_u64(page(3) - 3, 0x8877_6655_4433_2211).unwrap();
    assert_eq!(memory.read_u64(page(3) - 3).unwrap(), 0x8877_6655_4433_2211);
    assert_eq!(memory.read_u16(page(3) - 1).unwrap(), 0x4433);
    assert_eq!(memory.read_u8(page(3)).unwrap(), 0x44);
    memory.fill(page(1), page(3), 0xab).unwrap();
    assert_eq!(memory.read_u32(page(4) - 4).unwrap(), 0xabab_abab);
}

#[test]
fn an_access_that_cannot_be_whole_writes_nothing() {
    let memory = memory();
    let hole = format!("{:#x}", page(4));
    let data = vec![1; 2 * host_page_size() as usize];
    assert_invalid(memory.write(page(3), &data), &["no memory", &hole]);
    assert_invalid(memory.fill(page(1), page(4), 1), &["no memory", &hole]);
    memory.insert(page(4), region(1)).unwrap();
    assert_invalid(memory.write(page(4), &data), &["read-only", &format!("{:#x}", page(5))]);
    for number in 1..5 {
        assert_eq!(memory.read_u8(page(number)).unwrap(), 0);
    }
    let mut untouched = [7; 8];
    assert!(memory.read(page(6) - 4, &mut untouched).is_err());
    assert_eq!(untouched, [7; 8]);
}

#[test]
fn hostile_addresses_are_errors() {
    let memory = memory();
    for gpa in [0, page(1) - 1, page(4), page(6), u64::MAX - 7, u64::MAX] {
        assert!(memory.read_u64(gpa).is_err(), "{gpa:#x}");
        assert!(memory.write_u64(gpa, 0).is_err(), "{gpa:#x}");
        assert!(memory.load::<u8>(gpa, Ordering::Relaxed).is_err() || memory.contains(gpa, 1));
    }
    assert!(memory.fill(page(1), u64::MAX, 0).is_err());
    assert!(GuestMemory::new().read_u8(0).is_err());
    memory.read(u64::MAX, &mut []).unwrap();
    memory.fill(page(4), 0, 0).unwrap();
}

#[test]
fn find_and_contains_agree_with_the_regions() {
    let memory = memory();
    let (found, offset) = memory.find(page(3) - 1).unwrap();
    assert!(found.is_same(&memory.regions()[0].1));
    assert_eq!(offset, page(2) - 1);
    assert!(memory.find(page(4)).is_none() && memory.find(0).is_none());
    assert!(memory.contains(page(1), page(3)) && memory.contains(page(5), page(1)) && memory.contains(0, 0));
    assert!(!memory.contains(page(1), page(3) + 1) && !memory.contains(u64::MAX, 2));
}

#[test]
fn atomics_work_at_guest_addresses() {
    let memory = memory();
    memory.store(page(3) + 8, 5u64, Ordering::Release).unwrap();
    let exchange = memory.compare_exchange(page(3) + 8, 5u64, 6, Ordering::SeqCst, Ordering::Relaxed);
    assert_eq!(exchange.unwrap(), Ok(5));
    assert_eq!(memory.load::<u64>(page(3) + 8, Ordering::Acquire).unwrap(), 6);
    assert_invalid(memory.store(page(5), 1u8, Ordering::Relaxed), &["read-only"]);
    assert_invalid(memory.load::<u64>(page(3) + 4, Ordering::Relaxed), &["aligned"]);
}

#[test]
fn clones_are_the_same_memory() {
    let memory = memory();
    let clone = memory.clone();
    clone.insert(page(20), region(1)).unwrap();
    clone.write_u8(page(20), 3).unwrap();
    assert_eq!(memory.read_u8(page(20)).unwrap(), 3);
    assert!(format!("{memory:?}").contains(&format!("{:#x}", page(20))));
}

#[test]
fn devices_access_while_regions_come_and_go() {
    let memory = memory();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for device in 0..2u64 {
            let (memory, done) = (&memory, &done);
            scope.spawn(move || {
                let own = page(1) + device * 8;
                let mut count = 0u64;
                while !done.load(Ordering::Acquire) || count < 100 {
                    count += 1;
                    memory.write_u64(own, count).unwrap();
                    assert_eq!(memory.read_u64(own).unwrap(), count);
                    // The page that comes and goes is either there or not; both are fine, anything else is not.
                    match memory.write_u32(page(9) + device * 4, 1) {
                        Ok(()) | Err(AccelError::InvalidArgument { .. }) => {}
                        Err(error) => panic!("{error}"),
                    }
                }
            });
        }
        for _ in 0..500 {
            memory.insert(page(9), region(1)).unwrap();
            drop(memory.remove(page(9)).unwrap());
        }
        done.store(true, Ordering::Release);
    });
}
