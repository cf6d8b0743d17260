//! What the fuzzer has found, and what it reached: every file of `fuzz/corpus` through the target it belongs to.
//! scripts/sanitize fuzzes on from there.

use std::{fs, path::Path};

#[path = "../fuzz/src/lib.rs"]
mod targets;

fn every_file(target: &str, run: fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let mut files: Vec<_> = fs::read_dir(folder).unwrap().map(|f| f.unwrap().path()).collect();
    files.sort();
    assert!(!files.is_empty());
    for file in files {
        // named in the output of a test that fails
        println!("{}", file.display());
        run(&fs::read(file).unwrap());
    }
}

#[test]
fn traces() {
    every_file("trace", targets::trace::run);
}

#[test]
fn profiles() {
    every_file("profile", targets::profile::run);
}

#[test]
fn options() {
    every_file("config", targets::config::run);
}

#[test]
fn replays() {
    every_file("replay", targets::replay::run);
}

#[test]
fn calls_of_the_abi() {
    every_file("abi", targets::abi::run);
}

#[test]
fn requests() {
    every_file("http", targets::http::run);
}
