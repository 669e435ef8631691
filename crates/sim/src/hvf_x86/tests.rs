//! The facade by itself.
