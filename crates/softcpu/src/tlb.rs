//! The software TLB: from linear pages to host pages, one set for user, one for supervisor accesses under SMAP, one for
//! supervisor accesses without it. Flushing is a new generation number, so it costs nothing; global pages survive a
//! flush and are revived when they are next touched.

/// Entries per set: what 32 MiB need.
const SIZE: usize = 8192;
/// Entries that were pushed out and may come back, per set.
const VICTIMS: usize = 8;
/// Low bits of a tag hold the generation.
const GEN_MASK: u64 = 0xfff;

/// Who accesses: chooses a set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Set {
    /// CPL 3.
    User = 0,
    /// Supervisor, user pages forbidden (CR4.SMAP, and EFLAGS.AC clear or an implicit access).
    Smap = 1,
    /// Supervisor.
    Supervisor = 2,
}

/// One translation.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Entry {
    /// Page and generation for which reads may use `add`.
    pub(crate) read: u64,
    /// The same for writes.
    pub(crate) write: u64,
    /// Host address less linear address.
    pub(crate) add: usize,
    /// Page, bit 0: global, bit 1: writes allowed; bits 2 to 11: global generation.
    meta: u64,
}

/// No page has this tag: generation 0 is never used.
const EMPTY: Entry = Entry { read: 0, write: 0, add: 0, meta: 0 };
const GLOBAL: u64 = 1;
const WRITE: u64 = 2;

/// All sets.
pub(crate) struct Tlb {
    /// The selected set first.
    sets: [Box<[Entry; SIZE]>; 3],
    /// Where in `sets` each is.
    places: [usize; 3],
    victims: [[Entry; VICTIMS]; 3],
    next_victim: usize,
    generation: u64,
    /// Bits 2 to 11, as in `meta`.
    global_generation: u64,
    /// A filter of the 2 MiB and 1 GiB regions from which pieces of large pages were cached.
    large: [u64; 16],
}

/// The place of a page in its set. Two adjacent pages (the last and the first, too) must never share one: an access that crosses
/// from one to the other looks at the entry of its first byte and compares the tag of its last.
#[inline(always)]
fn index(lin: u64) -> usize {
    (lin >> 12).wrapping_add(lin >> 24) as usize & (SIZE - 1)
}

fn large_bit(region: u64) -> (usize, u64) {
    let hash = (region ^ region >> 10) as usize & 1023;
    (hash / 64, 1 << (hash % 64))
}

impl Tlb {
    pub(crate) fn new() -> Self {
        let set = |_| {
            let entries = vec![EMPTY; SIZE].into_boxed_slice();
            let Ok(entries) = entries.try_into() else { unreachable!("the length is right") };
            entries
        };
        Tlb {
            sets: std::array::from_fn(set),
            places: [0, 1, 2],
            victims: [[EMPTY; VICTIMS]; 3],
            next_victim: 0,
            generation: 1,
            global_generation: 4,
            large: [0; 16],
        }
    }

    /// Chooses the set that [`Tlb::entry`] uses.
    #[inline]
    pub(crate) fn select(&mut self, set: Set) {
        let from = self.places[set as usize];
        if from != 0 {
            self.sets.swap(0, from);
            self.places.iter_mut().filter(|place| **place == 0).for_each(|place| *place = from);
            self.places[set as usize] = 0;
        }
    }

    /// The tag that an entry for the page of `lin` must have.
    #[inline(always)]
    pub(crate) fn tag(&self, lin: u64) -> u64 {
        lin & !GEN_MASK | self.generation
    }

    /// The only entry of the current set that can translate `lin`.
    #[inline(always)]
    pub(crate) fn entry(&self, lin: u64) -> &Entry {
        &self.sets[0][index(lin)]
    }

    /// The host address for `len` bytes that do not cross a page, from the main array, the victims, or a global entry of
    /// an earlier generation.
    pub(crate) fn lookup(&mut self, set: Set, lin: u64, write: bool) -> Option<usize> {
        let tag = self.tag(lin);
        let hit = |e: &Entry| if write { e.write == tag } else { e.read == tag };
        let entry = &mut self.sets[self.places[set as usize]][index(lin)];
        if hit(entry) {
            return Some(entry.add.wrapping_add(lin as usize));
        }
        let revived = lin & !GEN_MASK | self.global_generation | GLOBAL;
        if entry.meta & !WRITE == revived && entry.read != tag {
            entry.read = tag;
            entry.write = if entry.meta & WRITE != 0 { tag } else { 0 };
            if hit(entry) {
                return Some(entry.add.wrapping_add(lin as usize));
            }
        }
        let victims = &mut self.victims[set as usize];
        let found = victims.iter().position(hit)?;
        std::mem::swap(&mut victims[found], entry);
        Some(entry.add.wrapping_add(lin as usize))
    }

    /// Adds a translation: reads allowed, writes if `write`.
    pub(crate) fn fill(&mut self, set: Set, lin: u64, host: usize, write: bool, global: bool, large: Option<u32>) {
        let tag = self.tag(lin);
        let page = lin & !GEN_MASK;
        if let Some(shift) = large {
            let (word, bit) = large_bit(lin >> shift);
            self.large[word] |= bit;
        }
        let entry = &mut self.sets[self.places[set as usize]][index(lin)];
        let old = *entry;
        if old.read & GEN_MASK == self.generation && old.read != tag {
            self.victims[set as usize][self.next_victim % VICTIMS] = old;
            self.next_victim = self.next_victim.wrapping_add(1);
        }
        *entry = Entry {
            read: tag,
            write: if write { tag } else { 0 },
            add: host.wrapping_sub(page as usize),
            meta: page | self.global_generation | if global { GLOBAL } else { 0 } | if write { WRITE } else { 0 },
        };
    }

    /// Forgets everything but global pages.
    pub(crate) fn flush(&mut self) {
        self.generation += 1;
        if self.generation > GEN_MASK {
            self.clear();
        }
    }

    /// Forgets everything.
    pub(crate) fn flush_all(&mut self) {
        self.global_generation += 4;
        self.large = [0; 16];
        if self.global_generation > GEN_MASK {
            self.clear();
        } else {
            self.flush();
        }
    }

    fn clear(&mut self) {
        self.sets.iter_mut().for_each(|set| set.fill(EMPTY));
        self.victims = [[EMPTY; VICTIMS]; 3];
        self.large = [0; 16];
        self.generation = 1;
        self.global_generation = 4;
    }

    /// Forgets the page of `lin`, global or not.
    pub(crate) fn flush_page(&mut self, lin: u64) {
        for shift in [21, 22, 30] {
            let (word, bit) = large_bit(lin >> shift);
            if self.large[word] & bit != 0 {
                // Pieces of one large page are many entries.
                self.flush_all();
                return;
            }
        }
        let page = lin >> 12;
        let places = self.sets.iter_mut().map(|set| &mut set[index(lin)]);
        for entry in places.chain(self.victims.iter_mut().flatten()) {
            if entry.meta >> 12 == page {
                *entry = EMPTY;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fill_flush_and_global() {
        let mut tlb = Tlb::new();
        tlb.fill(Set::User, 0x1000, 0x5000, false, false, None);
        tlb.fill(Set::User, 0x2000, 0x6000, true, true, None);
        assert_eq!(tlb.lookup(Set::User, 0x1234, false), Some(0x5234));
        assert_eq!(tlb.lookup(Set::User, 0x1234, true), None, "read only");
        assert_eq!(tlb.lookup(Set::Supervisor, 0x1234, false), None, "another set");
        tlb.flush();
        assert_eq!(tlb.lookup(Set::User, 0x1234, false), None);
        assert_eq!(tlb.lookup(Set::User, 0x2010, true), Some(0x6010), "global pages survive");
        tlb.flush_all();
        assert_eq!(tlb.lookup(Set::User, 0x2010, true), None);
    }

    #[test]
    fn victims_come_back_and_pages_are_flushed() {
        let mut tlb = Tlb::new();
        let alias = 0x3ffe << 12;
        assert_eq!(index(alias), index(0x1000));
        tlb.fill(Set::User, 0x1000, 0x5000, false, false, None);
        tlb.fill(Set::User, alias, 0x6000, false, false, None);
        assert_eq!(tlb.lookup(Set::User, 0x1000, false), Some(0x5000));
        assert_eq!(tlb.lookup(Set::User, alias, false), Some(0x6000));
        tlb.flush_page(0x1000);
        tlb.flush_page(alias);
        assert_eq!(tlb.lookup(Set::User, 0x1000, false), None);
        assert_eq!(tlb.lookup(Set::User, alias, false), None);
    }

    #[test]
    fn a_piece_of_a_large_page_takes_the_rest_along() {
        let mut tlb = Tlb::new();
        tlb.fill(Set::Supervisor, 0x20_1000, 0x1000, true, true, Some(21));
        tlb.flush_page(0x3f_f000);
        assert_eq!(tlb.lookup(Set::Supervisor, 0x20_1000, true), None);
    }

    #[test]
    fn a_selected_set_keeps_its_entries() {
        let mut tlb = Tlb::new();
        for set in [Set::User, Set::Smap, Set::Supervisor] {
            tlb.fill(set, 0x1000, 0x5000 + set as usize, false, false, None);
        }
        for set in [Set::Supervisor, Set::User, Set::Smap, Set::Smap, Set::Supervisor, Set::Smap, Set::User] {
            tlb.select(set);
            let entry = *tlb.entry(0x1008);
            assert_eq!(entry.read, tlb.tag(0x1008));
            assert_eq!(entry.add.wrapping_add(0x1008), 0x5008 + set as usize);
            assert_eq!(tlb.lookup(Set::Smap, 0x1000, false), Some(0x5001));
        }
    }

    #[test]
    fn adjacent_pages_have_different_places() {
        for boundary in
            (0..64).flat_map(|bit| (0..64).map(move |more| (1u64 << bit).wrapping_add(1 << more))).chain([0])
        {
            let page = boundary & !0xfff;
            assert_ne!(index(page), index(page.wrapping_sub(1)), "{page:#x}");
        }
    }

    #[test]
    fn generations_wrap() {
        let mut tlb = Tlb::new();
        tlb.fill(Set::User, 0x1000, 0x5000, false, true, None);
        for _ in 0..5000 {
            tlb.flush_all();
            assert_eq!(tlb.lookup(Set::User, 0x1000, false), None);
        }
    }
}
