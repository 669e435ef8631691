//! 100,000 kicks at random moments, on each backend: none is lost.
//!
//! A kicker numbers its kicks and sends the next one only when the vCPU's thread has seen that number after a return with
//! `Interrupt`. A lost kick therefore leaves the guest running for ever, and the watchdog ends the test as failed. Between
//! kicks it waits a random while, so that they arrive before, in and after `run()`, while the guest exits for other
//! reasons, while an access is being finished, and while the CPU is halted in the platform.

use crate::harness::{Host, Machine, Outcome, cases, fail};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;
use vm_accel::VcpuExit;
use vm_accel_guests::asm::*;
use vm_accel_guests::world::{World, layout};

cases![spinning, exiting, halted[LocalApic], several_kickers];

/// How many kicks a case sends: its share of the 100,000, or what the environment says.
fn kicks(share: u64) -> u64 {
    std::env::var("VM_ACCEL_KICKS").ok().and_then(|text| text.parse().ok()).unwrap_or(share)
}

/// xorshift64: the same moments every time, as far as the host's scheduler allows.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// What the kickers and the vCPU's thread share.
#[derive(Default)]
struct Count {
    /// Number of the last kick, counted before it is sent.
    sent: AtomicU64,
    /// The value of `sent` that the vCPU's thread saw after its last `Interrupt`.
    seen: Mutex<u64>,
    changed: Condvar,
}

impl Count {
    /// The vCPU's thread: `run()` returned with `Interrupt`.
    fn answer(&self) {
        let sent = self.sent.load(Ordering::SeqCst);
        *self.seen.lock().expect("nobody panics with it") = sent;
        self.changed.notify_all();
    }

    /// A kicker: until its kick was answered. False if that takes longer than the test may.
    fn wait_for(&self, host: &Host, number: u64) -> bool {
        let mut seen = self.seen.lock().expect("nobody panics with it");
        while *seen < number {
            if !host.in_time() {
                return false;
            }
            let second = Duration::from_secs(1);
            seen = self.changed.wait_timeout(seen, second).expect("nobody panics with it").0;
        }
        true
    }
}

/// However the vCPU's thread ends, nobody waits for its answers any more.
struct Release<'a>(&'a Count);

impl Drop for Release<'_> {
    fn drop(&mut self) {
        // Poisoned or not, the number is what counts.
        *self.0.seen.lock().unwrap_or_else(PoisonError::into_inner) = u64::MAX;
        self.0.changed.notify_all();
    }
}

/// Kicks `m` `total` times from each of `kickers` threads while it runs; `serve` handles its other exits.
fn stress(
    host: &Host,
    m: &mut Machine,
    total: u64,
    kickers: u64,
    mut serve: impl FnMut(&mut Machine, VcpuExit) -> Outcome,
) -> Outcome {
    let kick = m.vcpu.kick_handle()?;
    let (count, running) = (Count::default(), AtomicU64::new(kickers));
    std::thread::scope(|scope| {
        for seed in 1..=kickers {
            let (kick, count, running) = (&kick, &count, &running);
            scope.spawn(move || {
                let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
                for _ in 0..total {
                    // Mostly short, sometimes long enough for the guest to get going.
                    let pause = if random.below(8) == 0 { 20_000 } else { 300 };
                    for _ in 0..random.below(pause) {
                        std::hint::spin_loop();
                    }
                    let number = count.sent.fetch_add(1, Ordering::SeqCst) + 1;
                    kick.kick();
                    if !count.wait_for(host, number) {
                        break;
                    }
                }
                running.fetch_sub(1, Ordering::SeqCst);
                // The vCPU's thread may be in its run already when it could see that.
                kick.kick();
            });
        }
        let _release = Release(&count);
        let mut random = Random(0x1234_5678_9abc_def1);
        while running.load(Ordering::SeqCst) != 0 {
            match m.vcpu.run()? {
                VcpuExit::Interrupt => count.answer(),
                exit => serve(m, exit)?,
            }
            // Sometimes outside of run() for a while.
            for _ in 0..random.below(200) {
                std::hint::spin_loop();
            }
            if !host.in_time() {
                let seen = *count.seen.lock().expect("nobody panics with it");
                fail!(
                    "of {} kicks a thread only {} were sent and {seen} answered in time",
                    total,
                    count.sent.load(Ordering::SeqCst)
                );
            }
        }
        Ok(())
    })
}

/// A guest that only computes. Ring 3, because there every host runs it natively.
fn spinning(host: &Host) -> Outcome {
    let world = World::user().code(|a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.inc(dword_ptr(layout::DATA))?;
        a.jmp(again)
    });
    let mut m = Machine::new(host, &world)?;
    stress(host, &mut m, kicks(50_000), 1, |_, exit| fail!("exit is {exit:?}"))
}

/// A guest whose every other instruction exits: kicks fall between exits, answers and entries. All accesses arrive in
/// order, none twice.
fn exiting(host: &Host) -> Outcome {
    let world = World::long().code(|a| {
        let mut again = a.create_label();
        a.mov(edi, layout::MMIO as u32)?;
        a.xor(ebx, ebx)?;
        a.set_label(&mut again)?;
        a.inc(ebx)?;
        a.mov(dword_ptr(rdi), ebx)?;
        a.mov(eax, dword_ptr(rdi + 4))?;
        a.xor(eax, ebx)?;
        a.out(0x10, eax)?;
        a.jmp(again)
    });
    let mut m = Machine::new(host, &world)?;
    let (mut step, mut number, mut random) = (0, 0u32, Random(7));
    stress(host, &mut m, kicks(30_000), 1, |m, exit| {
        match (step, exit) {
            (0, VcpuExit::Mmio { is_write: true, .. }) => {
                number = number.wrapping_add(1);
                assert_eq!(m.vcpu.io_data()?, number.to_le_bytes());
            }
            (1, VcpuExit::Mmio { is_write: false, .. }) => m.vcpu.complete_read(&0x5a5a_5a5au32.to_le_bytes())?,
            (2, VcpuExit::Io { .. }) => {
                assert_eq!(m.vcpu.io_data()?, (number ^ 0x5a5a_5a5a).to_le_bytes())
            }
            _ => fail!("exit is {exit:?} in step {step} of turn {number}"),
        }
        step = (step + 1) % 3;
        if random.below(16) == 0 {
            m.quiesce()?;
        }
        Ok(())
    })
}

/// A CPU that is blocked in the platform.
fn halted(host: &Host) -> Outcome {
    let world = World::long().code(|a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.sti()?;
        a.hlt()?;
        a.jmp(again)
    });
    host.with_local_apics(|chip| {
        let mut m = Machine::with_chip(host, &world, chip)?;
        stress(host, &mut m, kicks(10_000), 1, |_, exit| fail!("exit is {exit:?}"))
    })
}

fn several_kickers(host: &Host) -> Outcome {
    let world = World::user().code(|a| {
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.inc(dword_ptr(layout::DATA))?;
        a.jmp(again)
    });
    let mut m = Machine::new(host, &world)?;
    stress(host, &mut m, kicks(10_000) / 4, 4, |_, exit| fail!("exit is {exit:?}"))
}
