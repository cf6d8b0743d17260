//! Generates the bindings of libllama. They load the library at run time, so that the crate compiles
//! without one, and so that the same tests can look at a build that has no expert cache.

use std::{env, path::PathBuf};

fn main() {
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("set by cargo")).join("../..");
    let include = root.join("llama.cpp/include");
    let headers = ["llama.h", "llama-moe-hot.h"].map(|h| include.join(h));
    let mut builder = bindgen::Builder::default();
    for header in &headers {
        println!("cargo::rerun-if-changed={}", header.display());
        assert!(header.exists(), "{} is missing: run scripts/setup first", header.display());
        builder = builder.header(header.to_str().expect("path is UTF-8"));
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("set by cargo")).join("llama.rs");
    builder
        .clang_arg(format!("-I{}", include.display()))
        .clang_arg(format!("-I{}", root.join("llama.cpp/ggml/include").display()))
        .allowlist_function("llama_.*")
        // found through libllama, which depends on the library that has it
        .allowlist_function("ggml_backend_cpu_buffer_type")
        .allowlist_type("ggml_log_level")
        .dynamic_library_name("Llama")
        .default_enum_style(bindgen::EnumVariation::Consts)
        .prepend_enum_name(false)
        .derive_debug(false)
        .layout_tests(false)
        .generate_comments(false)
        .generate()
        .expect("bindgen reads llama.h (is libclang installed? scripts/setup brings one)")
        .write_to_file(&out)
        .expect("the build directory is writable");
}
