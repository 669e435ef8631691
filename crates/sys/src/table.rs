//! [`ffi_table!`](crate::ffi_table): one declaration of a platform's functions gives the table and its loader.

/// Declares a table of function pointers, required and optional ones.
///
/// The struct is `Copy` and has one field per function, named as the platform names it; those under `opt` are `Option`s,
/// for functions that only newer systems have. `REQUIRED` and `OPTIONAL` list the names; `resolve` fills the table.
///
/// ```
/// vm_accel_sys::ffi_table! {
///     /// A platform of two functions.
///     pub struct Api: extern "C" {
///         req { fn answer() -> i32; }
///         opt { fn newer(n: i32) -> i32; }
///     }
/// }
/// extern "C" fn answer() -> i32 { 42 }
/// // SAFETY: the only address that is given is that of a function with the declared signature.
/// let api = unsafe { Api::resolve(|name| if name == c"answer" { answer as *const _ } else { std::ptr::null() }) };
/// let api = api.expect("the required function is there");
/// // SAFETY: `answer` has no preconditions.
/// assert_eq!(unsafe { (api.answer)() }, 42);
/// assert!(api.newer.is_none());
/// assert_eq!((Api::REQUIRED, Api::OPTIONAL), (&["answer"][..], &["newer"][..]));
/// ```
#[macro_export]
macro_rules! ffi_table {
    (
        $(#[$attr:meta])*
        pub struct $Table:ident: extern $abi:literal {
            req { $(fn $req:ident($($req_arg:ident: $req_type:ty),* $(,)?) -> $req_ret:ty;)* }
            opt { $(fn $opt:ident($($opt_arg:ident: $opt_type:ty),* $(,)?) -> $opt_ret:ty;)* }
        }
    ) => {
        $(#[$attr])*
        #[derive(Clone, Copy)]
        #[allow(missing_docs, non_snake_case, reason = "each field is documented by the platform, under that name")]
        pub struct $Table {
            $(pub $req: unsafe extern $abi fn($($req_arg: $req_type),*) -> $req_ret,)*
            $(pub $opt: ::core::option::Option<unsafe extern $abi fn($($opt_arg: $opt_type),*) -> $opt_ret>,)*
        }

        impl $Table {
            /// Functions without which the platform cannot be used.
            pub const REQUIRED: &'static [&'static str] = &[$(stringify!($req)),*];
            /// Functions that may be absent.
            pub const OPTIONAL: &'static [&'static str] = &[$(stringify!($opt)),*];

            /// Fills the table: `symbol` answers the address of the function of that name, or null.
            ///
            /// # Errors
            /// The name of the first required function that is absent.
            ///
            /// # Safety
            /// Every address that `symbol` answers is that of a function with the signature declared here, good for
            /// the rest of the process.
            pub unsafe fn resolve(
                mut symbol: impl FnMut(&::core::ffi::CStr) -> *const ::core::ffi::c_void,
            ) -> ::core::result::Result<Self, &'static str> {
                Ok(Self {
                    $($req: {
                        let address = symbol($crate::c_name!($req));
                        if address.is_null() {
                            return Err(stringify!($req));
                        }
                        // SAFETY: not null, and the caller vouches for the signature.
                        unsafe {
                            ::core::mem::transmute::<
                                *const ::core::ffi::c_void,
                                unsafe extern $abi fn($($req_arg: $req_type),*) -> $req_ret,
                            >(address)
                        }
                    },)*
                    $($opt: {
                        let address = symbol($crate::c_name!($opt));
                        // SAFETY: null is `None` (guaranteed for `Option` of a function pointer), and the caller
                        // vouches for the signature of any other address.
                        unsafe {
                            ::core::mem::transmute::<
                                *const ::core::ffi::c_void,
                                ::core::option::Option<
                                    unsafe extern $abi fn($($opt_arg: $opt_type),*) -> $opt_ret,
                                >,
                            >(address)
                        }
                    },)*
                })
            }
        }

        impl ::core::fmt::Debug for $Table {
            fn fmt(&self, f: &mut ::core::fmt::Formatter<'_>) -> ::core::fmt::Result {
                f.debug_struct(stringify!($Table)).finish_non_exhaustive()
            }
        }
    };
}

/// A name with its terminating zero.
#[doc(hidden)]
#[macro_export]
macro_rules! c_name {
    ($name:ident) => {
        const {
            match ::core::ffi::CStr::from_bytes_with_nul(concat!(stringify!($name), "\0").as_bytes()) {
                Ok(name) => name,
                Err(_) => unreachable!(),
            }
        }
    };
}
