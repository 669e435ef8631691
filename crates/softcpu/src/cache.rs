//! Decoded blocks of one CPU: found by RIP through a jump cache, by physical address behind it, linked to their successors.
//! A block is a straight run of instructions in one page; it is dropped when its bytes are written, by whomever.
//!
//! Blocks are only dropped between blocks, never while one runs: a guest store to decoded code makes its instruction run
//! alone (see `Core::place`), so nothing here needs to be undone in the middle.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use crate::core::{Core, Trap, mode};
use crate::decode;
use crate::exception::Exception;
use crate::exec::{Exec, Leave, Op};
use crate::ram::granules;
use crate::state::seg;

/// Blocks kept at most; then all are dropped.
const MAX_BLOCKS: usize = 1 << 17;
/// Slots of the jump cache.
const JUMPS: usize = 4096;
/// Longest block in bytes; offsets in it fit a byte.
pub(crate) const MAX_BYTES: usize = 240;

/// Where a block goes on, and in which generation of links that was found out.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Link {
    pub(crate) block: u32,
    pub(crate) generation: u32,
}

/// A decoded block: one cache line, what it was made from is kept apart.
#[derive(Debug)]
#[repr(align(64))]
pub(crate) struct Block {
    pub(crate) rip: u64,
    /// Instructions.
    pub(crate) count: u32,
    pub(crate) ops: Box<[Op]>,
    pub(crate) links: [Link; 2],
    /// RIP if the last branch is taken, and if not.
    pub(crate) targets: [u64; 2],
}

const _: () = assert!(size_of::<Block>() == 64);

/// Where a block came from.
#[derive(Clone, Copy, Debug)]
struct Origin {
    key: Key,
    len: u16,
}

/// What a block was decoded from: physical address, RIP, mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    gpa: u64,
    rip: u64,
    mode: u32,
}

#[derive(Clone, Copy)]
struct Jump {
    rip: u64,
    tag: u64,
    block: u32,
}

/// A multiplicative hash: keys are addresses of the guest's own code, and a guest that collides them slows only itself.
#[derive(Default)]
struct Mix(u64);

impl Hasher for Mix {
    fn finish(&self) -> u64 {
        self.0 ^ self.0 >> 29
    }
    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(u64::from(byte));
        }
    }
    fn write_u32(&mut self, value: u32) {
        self.write_u64(u64::from(value));
    }
    fn write_u64(&mut self, value: u64) {
        self.0 = (self.0.rotate_left(23) ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

type Map<K, V> = HashMap<K, V, BuildHasherDefault<Mix>>;

/// All blocks of a CPU.
pub(crate) struct Cache {
    pub(crate) blocks: Vec<Block>,
    /// Of the block of the same index.
    origins: Vec<Origin>,
    by_key: Map<Key, u32>,
    by_page: Map<u64, Vec<u32>>,
    jumps: Box<[Jump; JUMPS]>,
}

/// A dropped block: look up what is there now.
fn stale(_: &mut Core, _: &Op) -> Exec {
    Err(Leave::Stale)
}

impl Cache {
    pub(crate) fn new() -> Self {
        let jumps = vec![Jump { rip: 0, tag: 0, block: 0 }; JUMPS].into_boxed_slice();
        let Ok(jumps) = jumps.try_into() else { unreachable!("the length is right") };
        Cache { blocks: Vec::new(), origins: Vec::new(), by_key: Map::default(), by_page: Map::default(), jumps }
    }

    /// The block at `rip` in the current mode, decoded if need be. Raises what fetching raises.
    #[inline]
    pub(crate) fn find(&mut self, core: &mut Core, rip: u64) -> Exec<u32> {
        let tag = core.jump_tag;
        let jump = &self.jumps[(rip ^ rip >> 12) as usize & (JUMPS - 1)];
        if jump.rip == rip && jump.tag == tag {
            return Ok(jump.block);
        }
        self.find_slow(core, rip)
    }

    /// As [`Cache::find`], past the jump cache, which may still name a dropped block.
    #[inline(never)]
    pub(crate) fn find_slow(&mut self, core: &mut Core, rip: u64) -> Exec<u32> {
        let lin = code_address(core, rip)?;
        let gpa = core.fetch_address(lin)?;
        let key = Key { gpa, rip, mode: core.mode };
        let block = match self.by_key.get(&key) {
            Some(&block) => block,
            None => self.build(core, key)?,
        };
        let tag = core.jump_tag;
        self.jumps[(rip ^ rip >> 12) as usize & (JUMPS - 1)] = Jump { rip, tag, block };
        Ok(block)
    }

    fn build(&mut self, core: &mut Core, key: Key) -> Exec<u32> {
        if self.blocks.len() >= MAX_BLOCKS {
            self.clear();
            core.bump_links();
        }
        let layout = core.layout.clone();
        let Some(region) = layout.find(key.gpa) else {
            return core.trap(Trap::StepAlone);
        };
        let mut bytes = [0; MAX_BYTES];
        let (decoded, len) = loop {
            let n = core.code_bytes(region, key.gpa, &mut bytes);
            let Some(decoded) = decode::block(core, key.rip, &bytes[..n]) else {
                // The first instruction goes on in the next page.
                return core.trap(Trap::StepAlone);
            };
            let len = decoded.len;
            let ram = core.ram.clone();
            let remote = core.remote.clone();
            if ram.mark_code(region, key.gpa, granules(key.gpa, len as u64), &remote) {
                // Write pointers to this page were cached while it was plain data.
                core.tlb.flush_all();
            }
            // Other CPUs may have waited for this one meanwhile.
            core.take_in();
            let mut again = [0; MAX_BYTES];
            core.code_bytes(region, key.gpa, &mut again[..len]);
            if again[..len] == bytes[..len] {
                break (decoded, len);
            }
        };
        let id = self.blocks.len() as u32;
        self.blocks.push(Block {
            rip: key.rip,
            count: decoded.count,
            ops: decoded.ops.into_boxed_slice(),
            links: [Link::default(); 2],
            targets: decoded.targets,
        });
        self.origins.push(Origin { key, len: len as u16 });
        self.by_key.insert(key, id);
        self.by_page.entry(key.gpa >> 12).or_default().push(id);
        Ok(id)
    }

    /// Drops the blocks that overlap `len` bytes at `gpa`.
    pub(crate) fn invalidate(&mut self, gpa: u64, len: u64) {
        let end = gpa.saturating_add(len);
        let pages = (end.saturating_sub(1) >> 12) - (gpa >> 12) + 1;
        if pages > self.by_page.len() as u64 {
            let hit: Vec<u64> =
                self.by_page.keys().copied().filter(|page| page << 12 < end && (page + 1) << 12 > gpa).collect();
            hit.into_iter().for_each(|page| self.invalidate_page(page, gpa, end));
        } else {
            (gpa >> 12..=end.saturating_sub(1) >> 12).for_each(|page| self.invalidate_page(page, gpa, end));
        }
    }

    fn invalidate_page(&mut self, page: u64, gpa: u64, end: u64) {
        let Some(ids) = self.by_page.get_mut(&page) else {
            return;
        };
        let (blocks, origins, by_key) = (&mut self.blocks, &self.origins, &mut self.by_key);
        ids.retain(|&id| {
            let block = &mut blocks[id as usize];
            let Origin { key, len } = origins[id as usize];
            // Marks are per granule, so what shares a granule with the write must go too: its mark is gone.
            let hit = key.gpa < (end + 63) & !63 && key.gpa + u64::from(len) > gpa & !63;
            if hit {
                by_key.remove(&key);
                block.ops = Box::new([Op::nothing(stale)]);
                block.count = 0;
                block.links = [Link::default(); 2];
            }
            !hit
        });
        if ids.is_empty() {
            self.by_page.remove(&page);
        }
    }

    /// Drops everything; the caller makes links stale.
    pub(crate) fn clear(&mut self) {
        self.blocks.clear();
        self.origins.clear();
        self.by_key.clear();
        self.by_page.clear();
        self.jumps.fill(Jump { rip: 0, tag: 0, block: 0 });
    }
}

/// The linear address of code at `rip`: canonical, or inside the limit of CS.
pub(crate) fn code_address(core: &mut Core, rip: u64) -> Exec<u64> {
    if core.mode & mode::CODE64 != 0 {
        return Ok(rip);
    }
    let cs = &core.st.segs[seg::CS];
    if rip > u64::from(cs.limit) {
        return core.raise(Exception::Gp(0));
    }
    Ok(cs.base.wrapping_add(rip) & 0xffff_ffff)
}
