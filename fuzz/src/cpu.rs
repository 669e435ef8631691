//! Hostile guests on the software CPU: any code in any mode over any page tables.

#[allow(dead_code)]
#[path = "../../crates/softcpu/tests/fuzz/harness.rs"]
mod harness;

use crate::Target;

/// Every target of this module.
pub const TARGETS: &[Target] = &[Target {
    name: "cpu",
    run: guest,
    seeds: harness::seeds,
}];

/// One guest. An address sanitizer watches the ends of its RAM.
pub fn guest(input: &[u8]) {
    harness::run(input, 0);
}
