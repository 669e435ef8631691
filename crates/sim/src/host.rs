//! Accesses to memory that a VMM shares with its guests, of any size and alignment; single-copy atomic where they are aligned.

use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

/// Runs `$body` with `$atomic` as the atomic integer at an aligned host address of 1, 2, 4 or 8 bytes.
macro_rules! atomically {
    ($host:expr, $len:expr, $atomic:ident, $word:ident => $body:expr, $otherwise:expr) => {
        match $len {
            1 => atomically!(@ $host, AtomicU8, u8, $atomic, $word, $body),
            2 if $host.is_multiple_of(2) => atomically!(@ $host, AtomicU16, u16, $atomic, $word, $body),
            4 if $host.is_multiple_of(4) => atomically!(@ $host, AtomicU32, u32, $atomic, $word, $body),
            8 if $host.is_multiple_of(8) => atomically!(@ $host, AtomicU64, u64, $atomic, $word, $body),
            _ => $otherwise,
        }
    };
    (@ $host:expr, $type:ident, $word_type:ident, $atomic:ident, $word:ident, $body:expr) => {{
        // SAFETY: the address lies in a mapping that the caller's lock keeps, is aligned, and the user of the platform promises
        // that the memory is his as long as it is mapped; who shares it with the guest does so by atomic or volatile
        // accesses.
        let $atomic = unsafe { $type::from_ptr($host as *mut $word_type) };
        #[allow(non_camel_case_types, reason = "stands for the integer type in the body")]
        type $word = $word_type;
        $body
    }};
}

/// Reads memory of the guest that is mapped, and stays so until this returns.
pub(crate) fn load(host: usize, data: &mut [u8]) {
    let len = data.len();
    atomically!(host, len, atomic, Word => data.copy_from_slice(&Word::to_ne_bytes(atomic.load(Ordering::SeqCst))), {
        for (n, byte) in data.iter_mut().enumerate() {
            load(host + n, std::slice::from_mut(byte));
        }
    });
}

/// Writes it.
pub(crate) fn store(host: usize, data: &[u8]) {
    atomically!(host, data.len(), atomic, Word => {
        let mut bytes = [0; size_of::<Word>()];
        bytes.copy_from_slice(data);
        atomic.store(Word::from_ne_bytes(bytes), Ordering::SeqCst);
    }, data.iter().enumerate().for_each(|(n, byte)| store(host + n, &[*byte])));
}

/// Writes `new` where `old` stands, at once; false if something else does, or the place is not aligned.
pub(crate) fn exchange(host: usize, old: &[u8], new: &[u8]) -> bool {
    atomically!(host, old.len(), atomic, Word => {
        let word = |bytes: &[u8]| {
            let mut word = [0; size_of::<Word>()];
            word.copy_from_slice(bytes);
            Word::from_ne_bytes(word)
        };
        atomic.compare_exchange(word(old), word(new), Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }, false)
}
