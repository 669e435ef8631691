//! Register tables and the code that they generate.
//!
//! A register of a platform is written once, in a [`reg_map!`](crate::reg_map) table. The macros around it turn the table
//! into straight-line conversions and accessors; no table is searched at run time.

/// A platform's general-purpose registers: index in [`GuestRegs`](crate::GuestRegs) `=>` the platform's name.
///
/// Yields a `&'static [RegMapping]`. The same tokens drive [`impl_reg_accessors!`](crate::impl_reg_accessors).
///
/// ```
/// use vm_accel::{GuestRegs, reg_map, x86_64::Reg};
/// let map = reg_map!(Reg::Rax => RAX, Reg::Rcx => RCX, GuestRegs::PC => RIP);
/// assert_eq!((map[1].index, map[1].name), (1, "RCX"));
/// ```
#[macro_export]
macro_rules! reg_map {
    ($($index:expr => $reg:ident),* $(,)?) => {
        &[$($crate::RegMapping { index: $index as usize, name: ::core::stringify!($reg) }),*] as &[$crate::RegMapping]
    };
}

/// Generates register accessors from a [`reg_map!`](crate::reg_map) table.
///
/// Shapes:
/// * `impl_reg_accessors!(Vcpu, get_fn, set_fn, reg_map!(…))`: the platform reads and writes one register per call;
///   `get_fn(&self, ID) -> VcpuResult<u64>`, `set_fn(&mut self, ID, u64) -> VcpuResult<()>`, and the names in the table
///   are constants of the ID's type. Generates `REG_MAP`, `get_regs_mapped` and `set_regs_mapped` on `Vcpu`.
/// * `impl_reg_accessors!(Vcpu, wide get_fn, set_fn, reg_map!(…))`: as above for 128-bit registers, indexed 0 to 31;
///   generates `WIDE_REG_MAP`, `get_wide_mapped` and `set_wide_mapped` with a `[u128; 32]`.
/// * `impl_reg_accessors!(Struct, reg_map!(…))`: the platform has a structure whose fields the table names. Generates
///   `ToGuestRegs` and `FromGuestRegs` for it and a `const REG_MAP`-returning function for tests.
///
/// ```
/// use vm_accel::{FromGuestRegs, GuestRegs, ToGuestRegs, impl_reg_accessors, x86_64::Reg};
/// #[derive(Default)]
/// struct Frame { a: u64, ip: u64 }
/// impl_reg_accessors!(Frame, reg_map!(Reg::Rax => a, GuestRegs::PC => ip));
/// let regs = Frame { a: 1, ip: 2 }.to_guest_regs()?;
/// assert_eq!((regs.gpr[Reg::Rax as usize], regs.pc), (1, 2));
/// assert_eq!(Frame::from_guest_regs(&regs)?.ip, 2);
/// # Ok::<(), vm_accel::AccelError>(())
/// ```
#[macro_export]
macro_rules! impl_reg_accessors {
    ($vcpu:ty, $get:ident, $set:ident, reg_map!($($index:expr => $reg:ident),* $(,)?)) => {
        impl $vcpu {
            /// The registers that the accessors move.
            #[allow(dead_code)] // Tests read it.
            pub(crate) const REG_MAP: &'static [$crate::RegMapping] = $crate::reg_map!($($index => $reg),*);

            /// Reads every register of the table.
            fn get_regs_mapped(&self) -> $crate::VcpuResult<$crate::GuestRegs> {
                let mut regs = $crate::GuestRegs::default();
                $(regs.set($index as usize, self.$get($reg)?);)*
                Ok(regs)
            }

            /// Writes every register of the table.
            fn set_regs_mapped(&mut self, regs: &$crate::GuestRegs) -> $crate::VcpuResult<()> {
                $(self.$set($reg, regs.get($index as usize))?;)*
                Ok(())
            }
        }
    };
    ($vcpu:ty, wide $get:ident, $set:ident, reg_map!($($index:expr => $reg:ident),* $(,)?)) => {
        impl $vcpu {
            /// The 128-bit registers that the accessors move.
            #[allow(dead_code)] // As above.
            pub(crate) const WIDE_REG_MAP: &'static [$crate::RegMapping] = $crate::reg_map!($($index => $reg),*);

            /// Reads every register of the table.
            fn get_wide_mapped(&self) -> $crate::VcpuResult<[u128; 32]> {
                let mut regs = [0; 32];
                $(regs[$index as usize] = self.$get($reg)?;)*
                Ok(regs)
            }

            /// Writes every register of the table.
            fn set_wide_mapped(&mut self, regs: &[u128; 32]) -> $crate::VcpuResult<()> {
                $(self.$set($reg, regs[$index as usize])?;)*
                Ok(())
            }
        }
    };
    ($regs:ty, reg_map!($($index:expr => $field:ident),* $(,)?)) => {
        impl $crate::ToGuestRegs for $regs {
            #[inline(always)]
            fn to_guest_regs(&self) -> $crate::VcpuResult<$crate::GuestRegs> {
                let mut regs = $crate::GuestRegs::default();
                $(regs.set($index as usize, self.$field);)*
                Ok(regs)
            }
        }

        impl $crate::FromGuestRegs for $regs {
            // A table need not name every field of the platform's structure.
            #[allow(clippy::needless_update)]
            #[inline(always)]
            fn from_guest_regs(regs: &$crate::GuestRegs) -> $crate::VcpuResult<Self> {
                Ok(Self { $($field: regs.get($index as usize),)* ..Default::default() })
            }
        }
    };
}

/// Generates the constructor of a KVM-like vCPU: creates it, checks that the shared run area is large enough, and maps
/// the platform's errors.
///
/// `impl_vcpu_new!(VcpuType, VmType, mmap_size_fn)` expects of `VmType` (behind an `Arc`) the methods
/// `mmap_size_fn(&self) -> VcpuResult<usize>` and `open_vcpu(&self, id: u32) -> VcpuResult<Fd>`, and of `VcpuType` the
/// constant `RUN_AREA` (bytes that it uses of the run area) and `from_parts(Arc<VmType>, u32, Fd) -> VcpuResult<Self>`.
// Hosts without a KVM-like platform have no vCPU that is made this way.
#[allow(unused_macros)]
macro_rules! impl_vcpu_new {
    ($vcpu:ty, $vm:ty, $mmap_size:ident) => {
        impl $vcpu {
            /// Creates the vCPU `id` of `vm`.
            ///
            /// # Errors
            /// `InvalidArgument` if the id exists or is too large, `Backend` if the platform refuses or shares less state
            /// than this library was built for.
            pub(crate) fn new(vm: &::std::sync::Arc<$vm>, id: u32) -> $crate::VcpuResult<Self> {
                let shared = vm.$mmap_size()?;
                if shared < Self::RUN_AREA {
                    return Err($crate::AccelError::invalid(
                        "run area",
                        format!("the platform shares {shared} bytes per vCPU, {} are needed", Self::RUN_AREA),
                    ));
                }
                Self::from_parts(::std::sync::Arc::clone(vm), id, vm.open_vcpu(id)?)
            }
        }
    };
}
#[allow(unused_imports)]
pub(crate) use impl_vcpu_new;

/// Copies a group of state between one of this library's structures and a platform's, field by field, both ways.
///
/// `struct_map!(Ours, Theirs { ours = theirs, …; flags: ours = theirs, … })`: fields in the first part have the same
/// meaning and convertible integer types; those after `flags:` are `bool` in ours and 0 or 1 in theirs.
macro_rules! struct_map {
    ($ours:ty, $theirs:ty {
        $($ours_field:ident = $theirs_field:ident),* $(,)?
        $(; flags: $($ours_flag:ident = $theirs_flag:ident),* $(,)?)?
    }) => {
        impl From<&$theirs> for $ours {
            #[allow(clippy::needless_update)]
            fn from(theirs: &$theirs) -> Self {
                Self {
                    $($ours_field: theirs.$theirs_field as _,)*
                    $($($ours_flag: theirs.$theirs_flag != 0,)*)?
                    ..Default::default()
                }
            }
        }

        impl From<&$ours> for $theirs {
            #[allow(clippy::needless_update)]
            fn from(ours: &$ours) -> Self {
                Self {
                    $($theirs_field: ours.$ours_field as _,)*
                    $($($theirs_flag: ours.$ours_flag.into(),)*)?
                    ..Default::default()
                }
            }
        }
    };
}
#[allow(unused_imports)] // As above.
pub(crate) use struct_map;

/// Checks that a conversion moves every register of its table, each into its own place.
#[cfg(test)]
#[allow(dead_code)] // Platforms without a structure of registers have no such conversion.
pub(crate) fn assert_round_trip<T: crate::ToGuestRegs + crate::FromGuestRegs>(map: &[crate::RegMapping]) {
    let mut regs = crate::GuestRegs::default();
    for (n, entry) in map.iter().enumerate() {
        assert_eq!(regs.get(entry.index), 0, "{} shares its index with another register", entry.name);
        regs.set(entry.index, 0x0101_0101_0101_0101 * (n as u64 + 1));
    }
    let back = T::from_guest_regs(&regs).and_then(|theirs| theirs.to_guest_regs());
    assert_eq!(back, Ok(regs));
}
