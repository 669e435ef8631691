//! Debug registers: instruction and data breakpoints (SDM vol. 3B, chapter 17).

use crate::core::Core;
use crate::state::rflags;

impl Core {
    /// DR7 and the addresses in force: the owner's if it debugs the guest.
    fn breakpoints(&self) -> (u64, [u64; 4]) {
        if self.debug.hardware_breakpoints { (self.debug.dr7, self.debug.dr) } else { (self.st.dr7, self.st.dr) }
    }

    /// DR6 bits of the instruction breakpoints at `rip`; RF suppresses them.
    pub(crate) fn code_breakpoint(&self, rip: u64) -> Option<u64> {
        let (dr7, dr) = self.breakpoints();
        if self.st.rflags & rflags::RF != 0 && !self.debug.hardware_breakpoints || dr7 & 0xff == 0 {
            return None;
        }
        let lin =
            if self.code64() { rip } else { self.st.segs[crate::state::seg::CS].base.wrapping_add(rip) & 0xffff_ffff };
        let hits = (0..4)
            .filter(|i| dr7 >> (2 * i) & 3 != 0 && dr7 >> (16 + 4 * i) & 3 == 0 && dr[*i] == lin)
            .fold(0, |hits, i| hits | 1 << i);
        (hits != 0).then_some(hits)
    }

    /// Notes the data breakpoints that an access hits.
    #[cold]
    pub(crate) fn watch_slow(&mut self, lin: u64, len: u64, write: bool) {
        let (dr7, dr) = self.breakpoints();
        for (i, address) in dr.into_iter().enumerate() {
            let control = dr7 >> (16 + 4 * i);
            let enabled = dr7 >> (2 * i) & 3 != 0;
            let kind = control & 3;
            if !enabled || !(kind == 3 || kind == 1 && write) {
                continue;
            }
            let size = [1, 2, 8, 4][(control >> 2 & 3) as usize];
            let start = address & !(size - 1);
            if lin < start.wrapping_add(size) && start < lin.wrapping_add(len) {
                self.watch_hits |= 1 << i;
            }
        }
    }

    /// Notes I/O breakpoints (CR4.DE with type 2).
    pub(crate) fn watch_port(&mut self, port: u16, len: u64) {
        let (dr7, dr) = self.breakpoints();
        if self.st.cr4 & crate::state::cr4::DE == 0 {
            return;
        }
        for (i, address) in dr.into_iter().enumerate() {
            let control = dr7 >> (16 + 4 * i);
            let size = [1, 2, 8, 4][(control >> 2 & 3) as usize];
            let start = address & !(size - 1);
            let port = u64::from(port);
            if dr7 >> (2 * i) & 3 != 0 && control & 3 == 2 && port < start + size && start < port + len {
                self.watch_hits |= 1 << i;
            }
        }
    }
}
