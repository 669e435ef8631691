//! Accesses to devices in the middle of an instruction. An access that the bus cannot serve at once leaves `run`; when it is
//! answered, the instruction starts again from its beginning and takes the answers from here, in order, until it needs
//! the next one. So no access happens twice. Works because a handler changes no state before its last access.

use crate::bus::Answer;
use crate::core::{Core, Trap};
use crate::exec::Exec;
use crate::exit::Exit;

/// One access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Access {
    pub(crate) port: bool,
    pub(crate) write: bool,
    pub(crate) addr: u64,
    pub(crate) len: u8,
    pub(crate) data: [u8; 8],
}

impl Access {
    /// The exit that asks for it.
    pub(crate) fn exit(&self) -> Exit {
        if self.port {
            Exit::Io { port: self.addr as u16, size: self.len, write: self.write }
        } else {
            Exit::Mmio { gpa: self.addr, size: self.len, write: self.write }
        }
    }
}

/// What the current instruction has asked of the machine so far.
#[derive(Clone, Debug, Default)]
pub(crate) struct Replay {
    /// Answered accesses of this instruction.
    log: Vec<Access>,
    /// How many of them the current attempt has used.
    used: usize,
    /// The access that waits for its answer.
    pub(crate) pending: Option<Access>,
    /// The instruction was interrupted by an access and must be run again before anything else.
    pub(crate) resume: bool,
}

impl Replay {
    /// A new attempt at the same instruction.
    pub(crate) fn rewind(&mut self) {
        self.used = 0;
    }

    /// The instruction, or one element of a string instruction, is complete.
    #[inline]
    pub(crate) fn commit(&mut self) {
        self.log.clear();
        self.used = 0;
        self.resume = false;
        self.pending = None;
    }

    /// Answers the pending access.
    pub(crate) fn answer(&mut self, data: &[u8]) -> bool {
        let Some(mut access) = self.pending else {
            return false;
        };
        if !access.write {
            if data.len() != usize::from(access.len) {
                return false;
            }
            access.data[..data.len()].copy_from_slice(data);
        }
        self.pending = None;
        self.log.push(access);
        true
    }
}

impl Core {
    /// Reads a device: at most eight bytes.
    pub(crate) fn device_read(&mut self, gpa: u64, data: &mut [u8]) -> Exec {
        self.access(false, gpa, data, false)
    }

    /// Writes a device: at most eight bytes.
    pub(crate) fn device_write(&mut self, gpa: u64, data: &[u8]) -> Exec {
        let mut copy = [0; 8];
        copy[..data.len()].copy_from_slice(data);
        self.access(false, gpa, &mut copy[..data.len()], true)
    }

    /// IN, OUT and their string forms.
    pub(crate) fn port_access(&mut self, port: u16, data: &mut [u8], write: bool) -> Exec {
        self.access(true, u64::from(port), data, write)
    }

    fn access(&mut self, port: bool, addr: u64, data: &mut [u8], write: bool) -> Exec {
        self.need_alone()?;
        let len = data.len() as u8;
        let same = |a: &Access| a.port == port && a.write == write && a.addr == addr && a.len == len;
        if let Some(done) = self.replay.log.get(self.replay.used).copied().filter(same) {
            self.replay.used += 1;
            if !write {
                data.copy_from_slice(&done.data[..data.len()]);
            }
            return Ok(());
        }
        // What was answered for another path through the instruction is of no use.
        self.replay.log.truncate(self.replay.used);
        let answer = match (port, write) {
            (false, false) => self.bus.mmio_read(addr, data),
            (false, true) => self.bus.mmio_write(addr, data),
            (true, false) => self.bus.port_read(addr as u16, data),
            (true, true) => self.bus.port_write(addr as u16, data),
        };
        let mut access = Access { port, write, addr, len, data: [0; 8] };
        access.data[..data.len()].copy_from_slice(data);
        if answer == Answer::Done {
            self.replay.log.push(access);
            self.replay.used += 1;
            return Ok(());
        }
        self.replay.pending = Some(access);
        self.replay.resume = true;
        self.trap(Trap::Pending)
    }
}
