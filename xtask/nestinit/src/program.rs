//! The two init programs.

mod guest;
mod nested;

pub use guest::guest;
pub use nested::nested;
