//! Where things lie in the checkout.

use std::path::{Path, PathBuf};

/// The root of the checkout.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the workspace root")
}

/// The ignored folder for everything fetched or built from what was fetched. Safe to delete.
pub(crate) fn cache() -> PathBuf {
    root().join("guests-cache")
}

/// `path` as people want to read it: relative to the root where it lies below it.
pub(crate) fn shown(path: &Path) -> String {
    path.strip_prefix(root()).unwrap_or(path).display().to_string()
}
