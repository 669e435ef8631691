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
///   `ToGuestRegs` and `FromGuestRegs` for it.
/// * `impl_reg_accessors!(fn to_fn, fn from_fn: Struct, reg_map!(…))`: the same for a structure of another crate, for which
///   this one may not implement those traits. Generates `to_fn(&Struct) -> GuestRegs` and
///   `from_fn(&GuestRegs) -> Struct`.
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
    (fn $to:ident, fn $from:ident: $regs:ty, reg_map!($($index:expr => $field:ident),* $(,)?)) => {
        /// The platform's registers as ours.
        #[inline(always)]
        fn $to(theirs: &$regs) -> $crate::GuestRegs {
            let mut regs = $crate::GuestRegs::default();
            $(regs.set($index as usize, theirs.$field);)*
            regs
        }

        /// Our registers as the platform's.
        // A table need not name every field of the platform's structure.
        #[allow(clippy::needless_update)]
        #[inline(always)]
        fn $from(regs: &$crate::GuestRegs) -> $regs {
            type Theirs = $regs;
            Theirs { $($field: regs.get($index as usize),)* ..Default::default() }
        }
    };
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
#[macro_export]
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

/// [`Capabilities`](crate::Capabilities) that differ from others in some fields. A backend outside this crate cannot write the
/// structure down, because it may get more fields.
///
/// ```
/// use vm_accel_core::{Capabilities, GuestArch, capabilities};
/// let caps = capabilities! { max_vcpus: 4, dirty_log: true, ..Capabilities::minimal(GuestArch::X86_64) };
/// assert_eq!((caps.max_vcpus, caps.dirty_log, caps.guest_debug), (4, true, false));
/// ```
#[macro_export]
macro_rules! capabilities {
    ($($field:ident: $value:expr,)* ..$base:expr) => {{
        // The base comes last, as in a structure: the values may use it.
        let ($($field,)* mut caps) = ($($value,)* $base);
        $(caps.$field = $field;)*
        caps
    }};
}
