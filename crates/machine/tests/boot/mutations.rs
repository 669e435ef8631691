//! Damaged images: whatever is changed in one, the answer is a plan that keeps its promises, or an error.

use crate::support::*;
use proptest::prelude::*;
use proptest::sample::Index;
use vm_accel_machine::boot::{BootKind, Protocol};

/// Values that break arithmetic more often than random ones.
fn word() -> impl Strategy<Value = u64> {
    prop_oneof![
        any::<u64>(),
        (0u32..64).prop_map(|shift| 1 << shift),
        (0u32..64).prop_map(|shift| u64::MAX << shift),
        0u64..0x1000,
        Just(0),
        Just(0x10_0000),
        Just(0xffff_f000),
    ]
}

/// A place in the image (headers more often than the rest), what is put there, and how many bytes of it.
fn edit() -> impl Strategy<Value = (Index, bool, u64, usize)> {
    (any::<Index>(), any::<bool>(), word(), 1usize..=8)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn damaged_images_give_a_sound_plan_or_an_error(
        seed in any::<Index>(),
        edits in prop::collection::vec(edit(), 0..6),
        cut in prop::option::weighted(0.2, any::<Index>()),
        forced in prop::option::of(prop::sample::select(Protocol::ALL.to_vec())),
        mib in 1u64..64,
    ) {
        let seeds = seeds();
        let (_, arch, _, image) = seed.get(&seeds);
        let mut image = image.clone();
        for (place, in_header, value, width) in edits {
            let reach = if in_header { image.len().min(0x280) } else { image.len() };
            let at = place.index(reach);
            let end = (at + width).min(image.len());
            image[at..end].copy_from_slice(&value.to_le_bytes()[..end - at]);
        }
        if let Some(cut) = cut {
            image.truncate(cut.index(image.len()));
        }
        let kind = forced.map_or(BootKind::Auto, BootKind::Exactly);
        let _ = exercise(*arch, kind, &image, &memory_of(*arch, (1 + mib) * MIB));
    }

    #[test]
    fn noise_gives_a_sound_plan_or_an_error(
        image in prop::collection::vec(any::<u8>(), 0..2048),
        forced in prop::option::of(prop::sample::select(Protocol::ALL.to_vec())),
        arm in any::<bool>(),
    ) {
        let arch = if arm { vm_accel::GuestArch::Aarch64 } else { vm_accel::GuestArch::X86_64 };
        let kind = forced.map_or(BootKind::Auto, BootKind::Exactly);
        let _ = exercise(arch, kind, &image, &memory_of(arch, 8 * MIB));
    }
}
