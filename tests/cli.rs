//! The moe-hot command on good and bad files.

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

use moe_hot::trace::{TraceHeader, TraceLayer, TraceWriter};

fn moe_hot(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_moe-hot")).args(args).output().unwrap()
}

fn trace(path: &Path) {
    let layer = |il| TraceLayer { il, n_expert: 16, n_used: 2, class: 0 };
    let header = TraceHeader { fingerprint: 1, k: 4, uses_per_upload: 64, layers: vec![layer(0), layer(1)] };
    let mut w = TraceWriter::create(path, &header).unwrap();
    for t in 0..200u16 {
        w.routed(1, &[vec![t / 50, 5], vec![t % 16, (t + 3) % 16]]).unwrap();
    }
    w.flush().unwrap();
}

fn error_of(out: &Output) -> String {
    assert_eq!(out.status.code(), Some(1), "{}", String::from_utf8_lossy(&out.stdout));
    String::from_utf8(out.stderr.clone()).unwrap()
}

#[test]
fn replay_prints_every_policy_and_the_optimum() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.trace");
    trace(&path);
    let out = moe_hot(&["replay", path.to_str().unwrap(), "--k", "4,8", "--interval", "1", "--csv"]);
    assert!(out.status.success());
    let text = String::from_utf8(out.stdout).unwrap();
    let rows: Vec<Vec<&str>> = text.lines().map(|l| l.split(',').collect()).collect();
    assert_eq!(rows.len(), 1 + 2 * (2 + 4));
    assert!(rows.iter().all(|r| r.len() == rows[0].len()));
    let names: Vec<_> = rows[1..7].iter().map(|r| r[1]).collect();
    assert_eq!(names, ["optimum", "optimum/layer", "decay", "lru", "lfu", "static"]);
    let hit_rate = |r: &Vec<&str>| r[4].parse::<f64>().unwrap();
    assert!(rows[2..7].iter().all(|r| hit_rate(r) <= hit_rate(&rows[1])));
}

#[test]
fn heatmap_writes_a_picture() {
    let dir = tempfile::tempdir().unwrap();
    let (path, png) = (dir.path().join("a.trace"), dir.path().join("a.png"));
    trace(&path);
    let out = moe_hot(&["heatmap", path.to_str().unwrap(), "-o", png.to_str().unwrap()]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    assert!(fs::read(png).unwrap().starts_with(b"\x89PNG"));
}

#[test]
fn bad_traces_and_values_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.trace");
    trace(&path);
    let name = path.to_str().unwrap();
    assert_eq!(
        error_of(&moe_hot(&["replay", name, "--k", "17"])),
        "moe-hot: error: --k: 17 is not allowed, a.trace has 16 experts a layer\n"
    );
    assert_eq!(
        error_of(&moe_hot(&["replay", "/nonexistent/t"])),
        "moe-hot: error: /nonexistent/t: No such file or directory (os error 2)\n"
    );
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() - 5]).unwrap();
    let end = bytes.len() - 5;
    assert_eq!(
        error_of(&moe_hot(&["replay", name])),
        format!("moe-hot: error: {name}: truncated at offset {end}, in the block that begins at offset 56\n")
    );
    fs::write(&path, "GGUF").unwrap();
    assert_eq!(
        error_of(&moe_hot(&["heatmap", name, "-o", "/dev/null"])),
        format!("moe-hot: error: {name}: not a routing trace, it does not begin with MOEHOTRT\n")
    );
    let out = moe_hot(&["replay", name, "--policy", "fifo"]);
    assert_eq!(out.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&out.stderr).contains("expected one of decay, lru, lfu, static"));
}
