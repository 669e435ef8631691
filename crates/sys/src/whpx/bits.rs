//! Typed access to the bit fields that C has and Rust has not.

/// Declares integers with named fields: for each field a getter and a `with_` setter that answers a changed copy.
macro_rules! bits {
    ($(
        $(#[$attr:meta])*
        pub struct $Name:ident($int:ty) { $($(#[$field_attr:meta])* $field:ident / $with:ident: $shift:literal, $width:literal;)* }
    )*) => {$(
        $(#[$attr])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
        #[repr(transparent)]
        pub struct $Name(pub $int);

        impl $Name {
            $(
                $(#[$field_attr])*
                #[must_use]
                pub const fn $field(self) -> $int {
                    self.0 >> $shift & (<$int>::MAX >> (<$int>::BITS - $width))
                }

                /// A copy with that field set; excess bits of `value` are cut.
                #[must_use]
                pub const fn $with(self, value: $int) -> Self {
                    let mask = (<$int>::MAX >> (<$int>::BITS - $width)) << $shift;
                    Self(self.0 & !mask | value << $shift & mask)
                }
            )*
        }
    )*};
}

pub(crate) use bits;
