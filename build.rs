//! Generates the ggml types that cross the C ABI from the pinned headers, so that a change of
//! `ggml_tensor` upstream is a compile error here and not a wrong offset at run time; and compiles the
//! kernels when the environment names an nvcc.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

/// The compiler for the kernels; unset: a library without them.
const NVCC: &str = "MOE_HOT_NVCC";
/// What to compile them for, as in CMAKE_CUDA_ARCHITECTURES.
const ARCHITECTURES: &str = "MOE_HOT_CUDA_ARCHITECTURES";
/// Their sources in src/kernels.
const KERNELS: [&str; 2] = ["moe_hot", "probe"];

fn main() {
    let root = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("set by cargo"));
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("set by cargo"));
    bindings(&root, &out);
    kernels(&root, &out);
}

fn bindings(root: &Path, out: &Path) {
    let include = root.join("llama.cpp/ggml/include");
    let header = include.join("ggml.h");
    println!("cargo::rerun-if-changed={}", header.display());
    assert!(header.exists(), "{} is missing: run scripts/setup first", header.display());

    let bindings = bindgen::Builder::default()
        .header(header.to_str().expect("path is UTF-8"))
        .clang_arg(format!("-I{}", include.display()))
        .allowlist_type("ggml_tensor")
        .allowlist_type("ggml_custom_op_t")
        .allowlist_type("ggml_log_level")
        .allowlist_type("ggml_type")
        .default_enum_style(bindgen::EnumVariation::Consts)
        .prepend_enum_name(false)
        .derive_debug(false)
        .layout_tests(true)
        .generate_comments(false)
        .generate()
        .expect("bindgen reads ggml.h (is libclang installed? scripts/setup brings one)")
        .to_string();
    std::fs::write(out.join("ggml.rs"), bindings.clone() + &type_names(&bindings))
        .expect("the build directory is writable");
}

/// A table of the names of ggml's types as its tools print them, from the constants.
fn type_names(bindings: &str) -> String {
    let constant = |line: &str| {
        let (name, value) = line.strip_prefix("pub const GGML_TYPE_")?.split_once(": ggml_type = ")?;
        // what is K in a name is a capital
        let name = name.to_lowercase().replace("_k", "_K");
        Some(format!("    ({}, \"{name}\"),\n", value.trim_end_matches(';')))
    };
    let rows: String = bindings.lines().filter_map(constant).collect();
    format!("\npub const TYPE_NAMES: &[(i32, &str)] = &[\n{rows}];\n")
}

fn kernels(root: &Path, out: &Path) {
    println!("cargo::rustc-check-cfg=cfg(moe_hot_kernels)");
    for name in [NVCC, ARCHITECTURES] {
        println!("cargo::rerun-if-env-changed={name}");
    }
    let sources = KERNELS.map(|name| root.join(format!("src/kernels/{name}.cu")));
    for source in &sources {
        println!("cargo::rerun-if-changed={}", source.display());
    }
    let Some(nvcc) = env::var_os(NVCC).filter(|n| !n.is_empty()) else { return };
    let architectures = env::var(ARCHITECTURES)
        .unwrap_or_else(|_| panic!("{NVCC} is set: set {ARCHITECTURES} too, as in CMake, e.g. 80;90"));

    for (name, source) in KERNELS.iter().zip(&sources) {
        let mut command = Command::new(&nvcc);
        command.args(["-fatbin", "-O3", "-std=c++17", "-Werror", "all-warnings"]);
        for a in architectures.split(';').filter(|a| !a.is_empty()) {
            match a.split('-').next().unwrap_or_default() {
                "native" => command.arg("-arch=native"),
                a => command.args(["-gencode", &format!("arch=compute_{a},code=[sm_{a},compute_{a}]")]),
            };
        }
        command.arg("-o").arg(out.join(name).with_extension("fatbin")).arg(source);
        let status = command.status();
        let status = status.unwrap_or_else(|e| panic!("{NVCC}: {} cannot be run: {e}", nvcc.display()));
        assert!(status.success(), "{} failed: {status}", nvcc.display());
    }
    println!("cargo::rustc-cfg=moe_hot_kernels");
}
