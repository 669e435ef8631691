use super::*;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::PathBuf;
use std::sync::atomic::AtomicU32;

/// A file that is gone when the test ends.
struct TempFile {
    path: PathBuf,
    file: File,
}

impl TempFile {
    fn new(contents: &[u8]) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("vm-accel-memory-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        let mut file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        file.write_all(contents).unwrap();
        Self { path, file }
    }

    fn contents(&self) -> Vec<u8> {
        let mut file = &self.file;
        let mut bytes = Vec::new();
        file.seek(SeekFrom::Start(0)).unwrap();
        file.read_to_end(&mut bytes).unwrap();
        bytes
    }

    fn read_only(&self) -> File {
        File::open(&self.path).unwrap()
    }
}

impl Drop for TempFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// `pages` pages; each byte is the number of its page, plus 1.
fn numbered_pages(pages: u8) -> Vec<u8> {
    (1..=pages).flat_map(|page| std::iter::repeat_n(page, host_page_size() as usize)).collect()
}

fn byte(region: &GuestRegion, offset: u64) -> u8 {
    region.load(offset, Ordering::Relaxed).unwrap()
}

#[track_caller]
fn assert_invalid<T: fmt::Debug>(result: VcpuResult<T>, text: &str) {
    let error = result.unwrap_err();
    assert!(matches!(error, AccelError::InvalidArgument { .. }), "{error:?}");
    assert!(error.to_string().contains(text), "{error} lacks {text}");
}

#[test]
fn anonymous_memory_is_zero_and_keeps_what_is_written() {
    let region = GuestRegion::anonymous(4 * host_page_size()).unwrap();
    assert_eq!(region.as_ptr() as u64 % host_page_size(), 0);
    assert!(region.is_writable());
    let mut bytes = vec![0xff; region.size() as usize];
    region.read(0, &mut bytes).unwrap();
    assert!(bytes.iter().all(|byte| *byte == 0));
    let data: Vec<u8> = (0..2000u32).map(|i| i as u8).collect();
    region.write(1, &data).unwrap();
    region.fill(2000, 1, 0x55).unwrap();
    let clone = region.clone();
    drop(region);
    let mut back = vec![0; 2001];
    clone.read(1, &mut back).unwrap();
    assert_eq!(back[..1999], data[..1999]);
    assert_eq!(back[1999..], [0x55, 0]);
}

#[test]
fn sizes_that_are_no_pages_are_refused() {
    for size in [0, 1, host_page_size() - 1, host_page_size() + 1, u64::MAX] {
        assert_invalid(GuestRegion::anonymous(size), "page size");
    }
    assert_invalid(GuestRegion::anonymous(1 << 63), "more than the host can map");
}

#[test]
fn memory_that_the_host_cannot_map_is_a_host_error() {
    let error = GuestRegion::anonymous(1 << 62).unwrap_err();
    assert!(matches!(error, AccelError::Host { .. }), "{error:?}");
}

#[test]
fn a_large_guest_takes_no_host_memory_until_touched() {
    // More than any machine that runs this has.
    let region = GuestRegion::anonymous(1 << 42);
    // Hosts that promise memory up front (Windows, overcommit switched off) may refuse, but only so.
    match region {
        Ok(region) => {
            region.write(region.size() - 8, &[1; 8]).unwrap();
            assert_eq!(byte(&region, region.size() - 1), 1);
        }
        Err(error) => assert!(matches!(error, AccelError::Host { .. }), "{error:?}"),
    }
}

#[test]
fn accesses_outside_the_region_are_refused() {
    let region = GuestRegion::anonymous(host_page_size()).unwrap();
    let size = region.size();
    for offset in [size - 3, size, size + 1, u64::MAX - 1, u64::MAX] {
        assert_invalid(region.read(offset, &mut [0; 4]), "do not lie within");
        assert_invalid(region.write(offset, &[1; 4]), "do not lie within");
        assert_invalid(region.fill(offset, 4, 1), "do not lie within");
        assert_invalid(region.mark_dirty(offset, 4), "do not lie within");
    }
    assert_invalid(region.fill(0, u64::MAX, 1), "do not lie within");
    assert_invalid(region.load::<u64>(size, Ordering::Relaxed), "do not lie within");
    region.read(size, &mut []).unwrap();
    let mut all = vec![0; size as usize];
    region.read(0, &mut all).unwrap();
    assert!(all.iter().all(|byte| *byte == 0), "a refused write left traces");
}

#[test]
fn shared_file_writes_reach_the_file_and_other_mappings() {
    let page = host_page_size();
    let file = TempFile::new(&numbered_pages(3));
    let region = GuestRegion::from_file(&file.file, page, 2 * page, FileMapping::Shared).unwrap();
    let other = GuestRegion::from_file(&file.file, 0, 3 * page, FileMapping::Shared).unwrap();
    assert_eq!(byte(&region, 0), 2);
    region.write(page - 1, &[0xaa, 0xbb]).unwrap();
    assert_eq!((byte(&other, 2 * page - 1), byte(&other, 2 * page)), (0xaa, 0xbb));
    drop((region, other));
    let contents = file.contents();
    assert_eq!(contents[2 * page as usize - 1..=2 * page as usize], [0xaa, 0xbb]);
    assert_eq!(contents.len() as u64, 3 * page);
}

#[test]
fn copy_on_write_leaves_the_file_alone() {
    let page = host_page_size();
    let before = numbered_pages(2);
    let file = TempFile::new(&before);
    let region = GuestRegion::from_file(&file.read_only(), page, page, FileMapping::CopyOnWrite).unwrap();
    assert!(region.is_writable());
    region.fill(0, page, 0x77).unwrap();
    assert_eq!(byte(&region, page - 1), 0x77);
    let fresh = GuestRegion::from_file(&file.read_only(), page, page, FileMapping::CopyOnWrite).unwrap();
    assert_eq!(byte(&fresh, 0), 2);
    assert_eq!(file.contents(), before);
}

#[test]
fn read_only_memory_refuses_every_write_and_can_be_loaded() {
    let page = host_page_size();
    let file = TempFile::new(&numbered_pages(1));
    let region = GuestRegion::from_file(&file.read_only(), 0, page, FileMapping::ReadOnly).unwrap();
    region.track_dirty(true);
    assert!(!region.is_writable());
    assert_invalid(region.write(0, &[0]), "read-only");
    assert_invalid(region.fill(0, 1, 0), "read-only");
    assert_invalid(region.store(0, 0u8, Ordering::Relaxed), "read-only");
    assert_invalid(region.compare_exchange(0, 1u8, 0, Ordering::SeqCst, Ordering::SeqCst), "read-only");
    for order in [Ordering::Relaxed, Ordering::Acquire, Ordering::SeqCst] {
        assert_eq!(region.load::<u64>(8, order).unwrap(), 0x0101_0101_0101_0101);
    }
    assert!(region.take_host_dirty().is_clean());
}

#[test]
fn file_ranges_that_are_not_there_are_refused() {
    let page = host_page_size();
    let file = TempFile::new(&numbered_pages(2)[1..]);
    for (offset, size) in [(0, 2 * page), (page, page), (4 * page, page), (u64::MAX - page + 1, page)] {
        assert_invalid(GuestRegion::from_file(&file.file, offset, size, FileMapping::Shared), "beyond the file's");
    }
    assert_invalid(GuestRegion::from_file(&file.file, 1, page, FileMapping::Shared), "page size");
    assert_invalid(GuestRegion::from_file(&file.file, 0, 0, FileMapping::Shared), "page size");
    let error = GuestRegion::from_file(&file.read_only(), 0, page, FileMapping::Shared).unwrap_err();
    assert!(matches!(error, AccelError::Host { .. }), "{error:?}");
}

#[cfg(unix)]
#[test]
fn a_directory_or_device_is_no_memory_file() {
    for path in ["/", "/dev/null"] {
        let file = File::open(path).unwrap();
        assert_invalid(GuestRegion::from_file(&file, 0, host_page_size(), FileMapping::ReadOnly), "regular file");
    }
}

#[test]
fn words_are_little_endian_and_must_be_aligned() {
    let region = GuestRegion::anonymous(host_page_size()).unwrap();
    region.store(8, 0x0102_0304u32, Ordering::Release).unwrap();
    let mut bytes = [0; 4];
    region.read(8, &mut bytes).unwrap();
    assert_eq!(bytes, [4, 3, 2, 1]);
    assert_eq!(region.load::<u16>(10, Ordering::Acquire).unwrap(), 0x0102);
    assert_invalid(region.load::<u32>(10, Ordering::Relaxed), "aligned");
    assert_invalid(region.store(1, 0u16, Ordering::Relaxed), "aligned");
    let exchange =
        |current, new| region.compare_exchange(8, current, new, Ordering::AcqRel, Ordering::Acquire).unwrap();
    assert_eq!(exchange(0u32, 1), Err(0x0102_0304));
    assert_eq!(exchange(0x0102_0304, 7), Ok(0x0102_0304));
    assert_eq!(region.load::<u64>(8, Ordering::SeqCst).unwrap(), 7);
}

#[test]
fn impossible_memory_orders_are_errors_not_panics() {
    let region = GuestRegion::anonymous(host_page_size()).unwrap();
    for order in [Ordering::Release, Ordering::AcqRel] {
        assert_invalid(region.load::<u8>(0, order), "a load cannot be");
        assert_invalid(region.compare_exchange(0, 0u8, 1, Ordering::SeqCst, order), "a load cannot be");
    }
    for order in [Ordering::Acquire, Ordering::AcqRel] {
        assert_invalid(region.store(0, 1u8, order), "a store cannot be");
    }
    assert_eq!(byte(&region, 0), 0);
}

#[test]
fn every_kind_of_host_write_is_recorded() {
    let page = 4096;
    let region = GuestRegion::anonymous(64 * host_page_size()).unwrap();
    region.write(0, &[1]).unwrap();
    region.track_dirty(true);
    assert!(region.tracks_dirty());
    region.write(page - 1, &[1, 2]).unwrap();
    region.fill(3 * page, page + 1, 0).unwrap();
    region.store(6 * page, 0u64, Ordering::Relaxed).unwrap();
    let exchange = |offset, current: u8| {
        let answer = region.compare_exchange(offset, current, 9, Ordering::Relaxed, Ordering::Relaxed);
        answer.unwrap().is_ok()
    };
    assert!(exchange(8 * page, 0) && !exchange(9 * page, 1));
    region.mark_dirty(11 * page, 0).unwrap();
    region.mark_dirty(12 * page, 1).unwrap();
    let dirty = region.take_host_dirty();
    let pages: Vec<_> = dirty.ranges().map(|range| range.start / page..range.end / page).collect();
    assert_eq!(pages, vec![0..2, 3..5, 6..7, 8..9, 12..13]);
    assert_eq!((dirty.base(), dirty.size()), (0, region.size()));
    assert!(region.take_host_dirty().is_clean());
}

#[cfg(target_os = "linux")]
#[test]
fn discarded_pages_fall_back_to_zeros_or_the_file() {
    let page = host_page_size();
    let file = TempFile::new(&numbered_pages(2));
    let anonymous = GuestRegion::anonymous(2 * page).unwrap();
    let private = GuestRegion::from_file(&file.file, 0, 2 * page, FileMapping::CopyOnWrite).unwrap();
    for (region, expected) in [(anonymous, 0), (private, 2)] {
        region.fill(0, 2 * page, 0xcc).unwrap();
        region.track_dirty(true);
        region.discard(page, page).unwrap();
        assert_eq!((byte(&region, page - 1), byte(&region, page)), (0xcc, expected));
        assert_eq!(region.take_host_dirty().ranges().next(), Some(page..2 * page));
        assert_invalid(region.discard(1, page), "aligned");
        assert_invalid(region.discard(page, 2 * page), "do not lie within");
    }
    let shared = GuestRegion::from_file(&file.file, 0, 2 * page, FileMapping::Shared).unwrap();
    assert!(matches!(shared.discard(0, page), Err(AccelError::Unsupported { .. })));
}

#[test]
fn aligned_words_never_tear_between_threads() {
    // Two patterns without a half in common; a torn copy shows a third value.
    const PATTERNS: [u64; 2] = [0x1111_1111_1111_1111, 0xeeee_eeee_eeee_eeee];
    let region = GuestRegion::anonymous(host_page_size()).unwrap();
    region.write(8, &PATTERNS[0].to_le_bytes()).unwrap();
    std::thread::scope(|scope| {
        for pattern in PATTERNS {
            let region = &region;
            scope.spawn(move || {
                for _ in 0..20_000 {
                    region.write(8, &pattern.to_le_bytes()).unwrap();
                }
            });
        }
        for _ in 0..20_000 {
            let mut bytes = [0; 8];
            region.read(8, &mut bytes).unwrap();
            assert!(PATTERNS.contains(&u64::from_le_bytes(bytes)), "torn: {bytes:x?}");
        }
    });
}

#[test]
fn no_host_write_is_missing_from_the_records_taken_meanwhile() {
    // Each page is written for the last time while records are being taken, so that no later write makes good for one
    // that was missed. Many pages at a time, so that the moment between their bytes and their mark is long.
    const CHUNK: u64 = 32 * 4096;
    const CHUNKS: u64 = 16;
    const ROUNDS: u8 = 100;
    let region = GuestRegion::anonymous(CHUNKS * CHUNK).unwrap();
    region.track_dirty(true);
    let mut copy = vec![0u8; region.size() as usize];
    let take = |copy: &mut [u8]| {
        for range in region.take_host_dirty().ranges() {
            let part = range.start as usize..range.end as usize;
            region.read(range.start, &mut copy[part]).unwrap();
        }
    };
    for round in 0..ROUNDS {
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                for chunk in 0..CHUNKS {
                    for step in 1..=2 {
                        let data = [2 * round + step; CHUNK as usize];
                        region.write(chunk * CHUNK, &data).unwrap();
                    }
                }
            });
            while !writer.is_finished() {
                take(&mut copy);
            }
        });
        take(&mut copy);
        let mut memory = vec![0; region.size() as usize];
        region.read(0, &mut memory).unwrap();
        assert!(copy == memory, "a page changed without being recorded");
    }
}
