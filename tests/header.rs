//! include/moe_hot.h is what cbindgen makes of src/ffi.rs, and a C program that uses it works.

use std::{env, fs, path::PathBuf, process::Command};

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn the_checked_in_header_is_the_generated_one() {
    let config = cbindgen::Config::from_file(root().join("cbindgen.toml")).unwrap();
    let bindings =
        cbindgen::Builder::new().with_config(config).with_src(root().join("src/ffi.rs")).generate().unwrap();
    let mut generated = Vec::new();
    bindings.write(&mut generated);
    let generated = String::from_utf8(generated).unwrap();
    let path = root().join("include/moe_hot.h");
    if env::var_os("MOE_HOT_UPDATE").is_some() {
        fs::write(&path, &generated).unwrap();
    }
    let checked_in = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        checked_in == generated,
        "include/moe_hot.h is not up to date: MOE_HOT_UPDATE=1 cargo test --test header"
    );
}

/// The C program is linked with the static library as llama.cpp links it, so it also shows that the
/// library needs nothing but libc, libm and threads.
#[test]
fn a_c_program_uses_the_abi() {
    let out = tempfile::tempdir().unwrap();
    // cargo built it together with this test; older builds may lie beside it
    let exe = env::current_exe().unwrap();
    let archives = fs::read_dir(exe.parent().unwrap()).unwrap().flatten().filter(|e| {
        let name = e.file_name().into_string().unwrap_or_default();
        name.starts_with("libmoe_hot-") && name.ends_with(".a")
    });
    let archive = archives.max_by_key(|e| e.metadata().unwrap().modified().unwrap());
    let archive = archive.expect("cargo builds the archive with the library").path();

    let program = out.path().join("abi");
    // TARGET, HOST and OPT_LEVEL are a build script's; here they are the test's own
    let target = format!("{}-unknown-linux-gnu", env::consts::ARCH);
    let compiler = cc::Build::new()
        .target(&target)
        .host(&target)
        .opt_level(1)
        .out_dir(out.path())
        .cargo_metadata(false)
        .get_compiler();
    let status = compiler
        .to_command()
        .args(["-std=c11", "-Wall", "-Wextra", "-Werror", "-I"])
        .arg(root().join("include"))
        .arg("-isystem")
        .arg(root().join("llama.cpp/ggml/include"))
        .arg(root().join("tests/abi.c"))
        .arg(&archive)
        .args(["-lm", "-lpthread", "-ldl", "-o"])
        .arg(&program)
        .status()
        .unwrap();
    assert!(status.success(), "the C program does not build");
    let run = Command::new(&program).output().unwrap();
    let text = String::from_utf8_lossy(&run.stdout).into_owned() + &String::from_utf8_lossy(&run.stderr);
    assert!(run.status.success(), "{text}");
    assert!(text.ends_with("ok\n"), "{text}");
}
