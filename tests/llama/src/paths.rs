//! Where things are.

use std::path::{Path, PathBuf};

/// The root of the project.
pub fn root() -> PathBuf {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR"));
    dir.ancestors().nth(2).expect("this crate is in tests/llama of the project").to_path_buf()
}

/// The build of llama.cpp under test: `MOE_HOT_BUILD_DIR`, else `build/`.
pub fn build_dir() -> PathBuf {
    std::env::var_os("MOE_HOT_BUILD_DIR").map_or_else(|| root().join("build"), PathBuf::from)
}

/// A build of the unpatched pin to compare with, if there is one: `MOE_HOT_STOCK_BUILD`.
pub fn stock_build_dir() -> Option<PathBuf> {
    std::env::var_os("MOE_HOT_STOCK_BUILD").map(PathBuf::from)
}

/// A tool of the build under test, by its name.
pub fn tool(name: &str) -> PathBuf {
    build_dir().join("bin").join(name)
}

/// The trained model that ships with the project.
///
/// # Panics
/// When it is not there.
pub fn shipped_model() -> PathBuf {
    let path = root().join("models/moe-e64-Q4_0.gguf");
    assert!(path.is_file(), "{} is missing, it belongs to the project", path.display());
    path
}
