//! Why a platform's table could not be filled, and the system's loaders.

use std::fmt;

#[cfg(target_os = "macos")]
mod macos;
#[cfg(windows)]
mod windows;
#[cfg(target_os = "macos")]
pub(crate) use macos::symbols;
#[cfg(windows)]
pub(crate) use windows::symbols;

/// What is missing of a platform.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum LoadError {
    /// The library is not there (or not loadable): the system lacks the feature, or it is switched off.
    Library {
        /// The library's name.
        name: &'static str,
        /// What the system's loader says.
        detail: String,
    },
    /// The library lacks a function that is needed: the system is too old.
    Function {
        /// The library's name.
        library: &'static str,
        /// The function.
        name: &'static str,
    },
}

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Library { name, detail } => write!(f, "cannot load {name}: {detail}"),
            Self::Function { library, name } => write!(f, "{library} lacks the function {name}: the system is too old"),
        }
    }
}

impl std::error::Error for LoadError {}
