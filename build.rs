//! Generates the ggml types that cross the C ABI from the pinned headers, so that a change of
//! `ggml_tensor` upstream is a compile error here and not a wrong offset at run time.

use std::{env, path::PathBuf};

fn main() {
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("set by cargo"));
    let include = root.join("llama.cpp/ggml/include");
    let header = include.join("ggml.h");
    println!("cargo::rerun-if-changed={}", header.display());
    assert!(header.exists(), "{} is missing: run scripts/setup first", header.display());

    let out = PathBuf::from(env::var_os("OUT_DIR").expect("set by cargo")).join("ggml.rs");
    bindgen::Builder::default()
        .header(header.to_str().expect("path is UTF-8"))
        .clang_arg(format!("-I{}", include.display()))
        .allowlist_type("ggml_tensor")
        .allowlist_type("ggml_custom_op_t")
        .allowlist_type("ggml_log_level")
        .default_enum_style(bindgen::EnumVariation::Consts)
        .prepend_enum_name(false)
        .derive_debug(false)
        .layout_tests(true)
        .generate_comments(false)
        .generate()
        .expect("bindgen reads ggml.h (is libclang installed? scripts/setup brings one)")
        .write_to_file(&out)
        .expect("the build directory is writable");
}
