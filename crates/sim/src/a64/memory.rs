//! Loads and stores, and what an abort of stage 2 tells about them.

use super::mmu::{ALIGNMENT, Access, PERMISSION, TRANSLATION};
use super::{Bus, Cpu, Monitor, Stop, Trap, class, syndrome};
use vm_accel_sys::hvf::aarch64::sys_reg;
use vm_accel_sys::hvf::memory as flags;

/// The smallest page: beyond it another translation holds.
const PAGE: u64 = 4096;

const fn field(word: u32, high: u32, low: u32) -> u32 {
    word >> low & ((1 << (high - low + 1)) - 1)
}

const fn signed(value: u32, bits: u32) -> u64 {
    (((value as i64) << (64 - bits)) >> (64 - bits)) as u64
}

/// The part of a data abort's syndrome that says what a single load or store does, or 0 where the architecture does
/// not tell (D24.2.40, "ISV").
#[derive(Debug, Clone, Copy)]
struct Told(u64);

const UNTOLD: Told = Told(0);

impl Told {
    fn single(size: u32, signed: bool, register: u32, wide: bool) -> Self {
        Self(
            1 << 24
                | u64::from(size) << 22
                | u64::from(signed) << 21
                | u64::from(register) << 16
                | u64::from(wide) << 15,
        )
    }
}

impl Cpu {
    pub(super) fn fetch(&mut self, bus: &impl Bus) -> Result<u32, Stop> {
        let pa = self.translate(bus, self.pc, Access::Execute)?;
        let mut word = [0; 4];
        if bus.flags(pa) & flags::EXEC == 0 || !bus.read(pa, &mut word) {
            let status = if bus.flags(pa) == 0 { TRANSLATION } else { PERMISSION };
            let trap = Trap { syndrome: syndrome(class::INSTRUCTION_ABORT, status), far: self.pc, ipa: pa };
            return Err(Stop::Trap(trap));
        }
        Ok(u32::from_le_bytes(word))
    }

    /// What an access to memory that stage 2 refuses ends with.
    fn abort(&self, bus: &impl Bus, va: u64, pa: u64, write: bool, told: Told) -> Stop {
        let status = if bus.flags(pa) == 0 { TRANSLATION } else { PERMISSION };
        let iss = told.0 | u64::from(write) << 6 | status;
        Stop::Trap(Trap { syndrome: syndrome(class::DATA_ABORT, iss), far: va, ipa: pa })
    }

    /// Does `f` with each part of an access that lies in one page: its offset, its addresses and length.
    fn parts(
        &self,
        bus: &impl Bus,
        va: u64,
        len: usize,
        write: bool,
        mut f: impl FnMut(usize, u64, u64, usize) -> Result<(), Stop>,
    ) -> Result<(), Stop> {
        let access = if write { Access::Write } else { Access::Read };
        let mut done = 0;
        while done < len {
            let at = va.wrapping_add(done as u64);
            let pa = self.translate(bus, at, access)?;
            let part = (len - done).min((PAGE - at % PAGE) as usize);
            f(done, at, pa, part)?;
            done += part;
        }
        Ok(())
    }

    fn check(&self, va: u64, len: usize, write: bool) -> Result<(), Stop> {
        let access = if write { Access::Write } else { Access::Read };
        if !self.mmu_is_on() && !va.is_multiple_of(len as u64) {
            // Without translation everything is device memory.
            return Err(self.stage1_fault(va, access, ALIGNMENT));
        }
        if self.watches() {
            self.watchpoints(va, len, write)?;
        }
        Ok(())
    }

    fn watchpoints(&self, va: u64, len: usize, write: bool) -> Result<(), Stop> {
        for n in 0..16 {
            let control = self.get(sys_reg::DBGWCR0_EL1 + 8 * n);
            let base = self.get(sys_reg::DBGWVR0_EL1 + 8 * n);
            let kind = if write { 2 } else { 1 };
            if control & 1 == 0 || control >> 3 & kind == 0 {
                continue;
            }
            let hit = (0..8)
                .filter(|byte| control >> (5 + byte) & 1 != 0)
                .find(|byte| (va..va.wrapping_add(len as u64)).contains(&base.wrapping_add(*byte)));
            if let Some(byte) = hit {
                let iss = u64::from(write) << 6 | 0x22;
                let far = base.wrapping_add(byte);
                return Err(Stop::Trap(Trap { syndrome: syndrome(class::WATCHPOINT, iss), far, ipa: 0 }));
            }
        }
        Ok(())
    }

    fn load_told(&mut self, bus: &impl Bus, va: u64, data: &mut [u8], told: Told) -> Result<(), Stop> {
        let len = data.len();
        self.check(va, len, false)?;
        self.parts(bus, va, len, false, |done, at, pa, part| {
            let told = if done == 0 { told } else { UNTOLD };
            if bus.read(pa, &mut data[done..done + part]) { Ok(()) } else { Err(self.abort(bus, at, pa, false, told)) }
        })
    }

    fn store_told(&mut self, bus: &impl Bus, va: u64, data: &[u8], told: Told) -> Result<(), Stop> {
        self.check(va, data.len(), true)?;
        // First the rights to all of it: a store is whole or not at all.
        self.parts(bus, va, data.len(), true, |done, at, pa, _| {
            let told = if done == 0 { told } else { UNTOLD };
            let may = bus.flags(pa) & flags::WRITE != 0;
            if may { Ok(()) } else { Err(self.abort(bus, at, pa, true, told)) }
        })?;
        self.parts(bus, va, data.len(), true, |done, at, pa, part| {
            let wrote = bus.write(pa, &data[done..done + part]);
            if wrote { Ok(()) } else { Err(self.abort(bus, at, pa, true, UNTOLD)) }
        })
    }

    pub(super) fn store_untold(&mut self, bus: &impl Bus, va: u64, data: &[u8]) -> Result<(), Stop> {
        self.store_told(bus, va, data, UNTOLD)
    }

    pub(super) fn need_vectors(&self) -> Result<(), Stop> {
        match self.get(sys_reg::CPACR_EL1) >> 20 & 3 {
            3 => Ok(()),
            1 if !self.is_el0() => Ok(()),
            _ => Err(Stop::Fault { syndrome: syndrome(class::FP, 0x1e << 20), far: None }),
        }
    }

    /// C4.1.94, "Loads and Stores".
    pub(super) fn load_store(&mut self, bus: &impl Bus, word: u32) -> Result<(), Stop> {
        match field(word, 29, 27) {
            0b101 => self.pair(bus, word),
            0b111 => self.single(bus, word),
            0b011 => self.literal(bus, word),
            0b001 if field(word, 26, 26) != 0 => self.structure(bus, word),
            0b001 if field(word, 24, 24) == 0 => self.exclusive(bus, word),
            _ => Err(self.undefined()),
        }
    }

    fn put_loaded(&mut self, vector: bool, register: u32, data: &[u8], extend: Option<u32>) {
        let mut bytes = [0; 16];
        bytes[..data.len()].copy_from_slice(data);
        let value = u128::from_le_bytes(bytes);
        if vector {
            self.v[register as usize] = value;
            return;
        }
        let mut value = value as u64;
        if let Some(bits) = extend {
            let unused = 64 - 8 * data.len() as u32;
            value = ((value << unused) as i64 >> unused) as u64;
            if bits == 32 {
                value &= 0xffff_ffff;
            }
        }
        self.set_r(register, value);
    }

    fn stored(&self, vector: bool, register: u32) -> [u8; 16] {
        if vector { self.v[register as usize].to_le_bytes() } else { u128::from(self.r(register)).to_le_bytes() }
    }

    fn pair(&mut self, bus: &impl Bus, word: u32) -> Result<(), Stop> {
        let vector = field(word, 26, 26) != 0;
        let load = field(word, 22, 22) != 0;
        let (size, extend) = match (vector, field(word, 31, 30)) {
            (false, 0) => (4, None),
            (false, 1) if load => (4, Some(64)),
            (false, 2) => (8, None),
            (true, opc @ 0..=2) => (4usize << opc, None),
            _ => return Err(self.undefined()),
        };
        if vector {
            self.need_vectors()?;
        }
        let (n, t, t2) = (field(word, 9, 5), field(word, 4, 0), field(word, 14, 10));
        let distance = signed(field(word, 21, 15), 7).wrapping_mul(size as u64);
        let base = self.r_sp(n);
        let (at, back) = match field(word, 24, 23) {
            1 => (base, Some(base.wrapping_add(distance))),
            3 => (base.wrapping_add(distance), Some(base.wrapping_add(distance))),
            _ => (base.wrapping_add(distance), None),
        };
        let mut data = [0; 32];
        if load {
            for (n, part) in data[..2 * size].chunks_mut(size).enumerate() {
                self.load_told(bus, at.wrapping_add((n * size) as u64), part, UNTOLD)?;
            }
            self.put_loaded(vector, t, &data[..size], extend);
            self.put_loaded(vector, t2, &data[size..2 * size], extend);
        } else {
            data[..size].copy_from_slice(&self.stored(vector, t)[..size]);
            data[size..2 * size].copy_from_slice(&self.stored(vector, t2)[..size]);
            for (n, part) in data[..2 * size].chunks(size).enumerate() {
                self.store_told(bus, at.wrapping_add((n * size) as u64), part, UNTOLD)?;
            }
        }
        if let Some(back) = back {
            self.set_r_sp(n, back);
        }
        Ok(())
    }

    fn single(&mut self, bus: &impl Bus, word: u32) -> Result<(), Stop> {
        let vector = field(word, 26, 26) != 0;
        let (mut scale, opc) = (field(word, 31, 30), field(word, 23, 22));
        let (load, extend) = match (vector, opc, scale) {
            (_, 0, _) => (false, None),
            (_, 1, _) => (true, None),
            (true, _, 0) => {
                scale = 4;
                (opc == 3, None)
            }
            // PRFM.
            (false, 2, 3) => return Ok(()),
            (false, 2, _) => (true, Some(64)),
            (false, 3, 0 | 1) => (true, Some(32)),
            _ => return Err(self.undefined()),
        };
        let (n, t) = (field(word, 9, 5), field(word, 4, 0));
        let base = self.r_sp(n);
        let distance = signed(field(word, 20, 12), 9);
        let (at, back) = match (field(word, 24, 24), field(word, 21, 21), field(word, 11, 10)) {
            (1, _, _) => (base.wrapping_add(u64::from(field(word, 21, 10)) << scale), None),
            (0, 0, 0 | 2) => (base.wrapping_add(distance), None),
            (0, 0, 1) => (base, Some(base.wrapping_add(distance))),
            (0, 0, 3) => (base.wrapping_add(distance), Some(base.wrapping_add(distance))),
            (0, 1, 2) => {
                let shift = if field(word, 12, 12) != 0 { scale } else { 0 };
                (base.wrapping_add(self.extended(field(word, 20, 16), field(word, 15, 13), shift)), None)
            }
            (0, 1, 0) if !vector => return self.atomic(bus, word),
            _ => return Err(self.undefined()),
        };
        if vector {
            self.need_vectors()?;
        }
        let len = 1usize << scale;
        let wide = scale == 3 || extend == Some(64);
        let told = match (vector, back) {
            (false, None) => Told::single(scale, extend.is_some(), t, wide),
            _ => UNTOLD,
        };
        let mut data = [0; 16];
        if load {
            self.load_told(bus, at, &mut data[..len], told)?;
            self.put_loaded(vector, t, &data[..len], extend);
        } else {
            data = self.stored(vector, t);
            self.store_told(bus, at, &data[..len], told)?;
        }
        if let Some(back) = back {
            self.set_r_sp(n, back);
        }
        Ok(())
    }

    fn literal(&mut self, bus: &impl Bus, word: u32) -> Result<(), Stop> {
        let vector = field(word, 26, 26) != 0;
        let (len, extend) = match (vector, field(word, 31, 30)) {
            (false, 0) => (4, None),
            (false, 1) => (8, None),
            (false, 2) => (4, Some(64)),
            (false, _) => return Ok(()),
            (true, opc @ 0..=2) => (4usize << opc, None),
            _ => return Err(self.undefined()),
        };
        if vector {
            self.need_vectors()?;
        }
        let at = self.pc.wrapping_add(signed(field(word, 23, 5), 19) << 2);
        let mut data = [0; 16];
        self.load_told(bus, at, &mut data[..len], UNTOLD)?;
        self.put_loaded(vector, field(word, 4, 0), &data[..len], extend);
        Ok(())
    }

    /// LD1 and ST1 of one whole register without write-back: enough to fault on.
    fn structure(&mut self, bus: &impl Bus, word: u32) -> Result<(), Stop> {
        if field(word, 29, 23) != 0b001_1000 || field(word, 21, 12) != 0b00_0000_0111 {
            return Err(self.undefined());
        }
        self.need_vectors()?;
        let (at, t) = (self.r_sp(field(word, 9, 5)), field(word, 4, 0));
        let len = if field(word, 30, 30) != 0 { 16 } else { 8 };
        // Elements of bytes, so nothing is misaligned.
        for n in 0..len {
            let mut byte = [self.v[t as usize].to_le_bytes()[n]];
            if field(word, 22, 22) == 0 {
                self.store_told(bus, at.wrapping_add(n as u64), &byte, UNTOLD)?;
                continue;
            }
            self.load_told(bus, at.wrapping_add(n as u64), &mut byte, UNTOLD)?;
            let mut value = self.v[t as usize].to_le_bytes();
            value[n] = byte[0];
            self.v[t as usize] = u128::from_le_bytes(value);
        }
        Ok(())
    }

    /// Exclusives of one register, and loads and stores with acquire and release (C3.2.6, C3.2.7).
    fn exclusive(&mut self, bus: &impl Bus, word: u32) -> Result<(), Stop> {
        let scale = field(word, 31, 30);
        let (n, t, s) = (field(word, 9, 5), field(word, 4, 0), field(word, 20, 16));
        let (ordered, load, pair) = (field(word, 23, 23) != 0, field(word, 22, 22) != 0, field(word, 21, 21) != 0);
        let len = 1usize << scale;
        let at = self.r_sp(n);
        let mut data = [0; 8];
        if pair {
            return if ordered { self.compare_and_swap(bus, word, at, len) } else { Err(self.undefined()) };
        }
        match (ordered, load) {
            (true, true) => {
                self.load_told(bus, at, &mut data[..len], Told::single(scale, false, t, scale == 3))?;
                self.put_loaded(false, t, &data[..len], None);
            }
            (true, false) => {
                let data = self.r(t).to_le_bytes();
                self.store_told(bus, at, &data[..len], Told::single(scale, false, t, scale == 3))?;
            }
            (false, true) => {
                self.load_told(bus, at, &mut data[..len], UNTOLD)?;
                let pa = self.translate(bus, at, Access::Read)?;
                self.monitor = Some(Monitor { pa, len, seen: data });
                self.put_loaded(false, t, &data[..len], None);
            }
            (false, false) => {
                let value = self.r(t).to_le_bytes();
                let pa = self.aligned(bus, at, len)?;
                let monitor = self.monitor.take().filter(|monitor| (monitor.pa, monitor.len) == (pa, len));
                let stored = match monitor {
                    Some(Monitor { seen, .. }) => bus
                        .exchange(pa, &seen[..len], &value[..len])
                        .ok_or_else(|| self.abort(bus, at, pa, true, UNTOLD))?,
                    None => false,
                };
                self.set_r(s, u64::from(!stored));
            }
        }
        Ok(())
    }

    /// The physical address of an atomic access, which must be aligned.
    fn aligned(&self, bus: &impl Bus, at: u64, len: usize) -> Result<u64, Stop> {
        if !at.is_multiple_of(len as u64) {
            return Err(self.stage1_fault(at, Access::Write, ALIGNMENT));
        }
        let pa = self.translate(bus, at, Access::Write)?;
        if bus.flags(pa) & flags::WRITE == 0 {
            return Err(self.abort(bus, at, pa, true, UNTOLD));
        }
        Ok(pa)
    }

    /// Replaces what stands in memory by what `f` makes of it, at once; answers what stood there.
    fn modify(&mut self, bus: &impl Bus, at: u64, len: usize, f: impl Fn(u64) -> u64) -> Result<u64, Stop> {
        let pa = self.aligned(bus, at, len)?;
        loop {
            let mut old = [0; 8];
            if !bus.read(pa, &mut old[..len]) {
                return Err(self.abort(bus, at, pa, false, UNTOLD));
            }
            let new = f(u64::from_le_bytes(old)).to_le_bytes();
            match bus.exchange(pa, &old[..len], &new[..len]) {
                Some(true) => return Ok(u64::from_le_bytes(old)),
                Some(false) => {}
                None => return Err(self.abort(bus, at, pa, true, UNTOLD)),
            }
        }
    }

    fn compare_and_swap(&mut self, bus: &impl Bus, word: u32, at: u64, len: usize) -> Result<(), Stop> {
        let (s, t) = (field(word, 20, 16), field(word, 4, 0));
        let mask = u64::MAX >> (64 - 8 * len);
        let (expected, new) = (self.r(s) & mask, self.r(t));
        let old = self.modify(bus, at, len, |old| if old == expected { new } else { old })?;
        self.set_r(s, old);
        Ok(())
    }

    /// LDADD and its like, SWP (C3.2.13, C3.2.14).
    fn atomic(&mut self, bus: &impl Bus, word: u32) -> Result<(), Stop> {
        let len = 1usize << field(word, 31, 30);
        let (s, n, t) = (self.r(field(word, 20, 16)), field(word, 9, 5), field(word, 4, 0));
        let unused = 64 - 8 * len as u32;
        let signed = |value: u64| (value << unused) as i64;
        let unsigned = |value: u64| value << unused;
        let old = match (field(word, 15, 15), field(word, 14, 12)) {
            (0, 0) => self.modify(bus, self.r_sp(n), len, |old| old.wrapping_add(s))?,
            (0, 1) => self.modify(bus, self.r_sp(n), len, |old| old & !s)?,
            (0, 2) => self.modify(bus, self.r_sp(n), len, |old| old ^ s)?,
            (0, 3) => self.modify(bus, self.r_sp(n), len, |old| old | s)?,
            (0, 4) => self.modify(bus, self.r_sp(n), len, |old| if signed(s) > signed(old) { s } else { old })?,
            (0, 5) => self.modify(bus, self.r_sp(n), len, |old| if signed(s) < signed(old) { s } else { old })?,
            (0, 6) => self.modify(bus, self.r_sp(n), len, |old| if unsigned(s) > unsigned(old) { s } else { old })?,
            (0, 7) => self.modify(bus, self.r_sp(n), len, |old| if unsigned(s) < unsigned(old) { s } else { old })?,
            (1, 0) => self.modify(bus, self.r_sp(n), len, |_| s)?,
            _ => return Err(self.undefined()),
        };
        self.set_r(t, old);
        Ok(())
    }
}
