//! moe-hot doctor on the machine alone, on models of all kinds and on damaged files.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use moe_hot::gguf::Gguf;
use serde_json::Value;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");
const SHIPPED: &str = "models/moe-e64-Q4_0.gguf";

fn doctor(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_moe-hot")).arg("doctor").args(args).current_dir(ROOT).output().unwrap()
}

fn text(out: &Output) -> String {
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout.clone()).unwrap()
}

fn json(model: &Path, more: &[&str]) -> Value {
    let out = doctor(&[&[model.to_str().unwrap(), "--json"], more].concat());
    serde_json::from_str(&text(&out)).unwrap()
}

fn error(args: &[&str]) -> String {
    let out = doctor(args);
    assert_eq!(out.status.code(), Some(1), "{}", String::from_utf8_lossy(&out.stdout));
    String::from_utf8(out.stderr).unwrap()
}

/// A synthetic model.
fn model(dir: &Path, args: &[&str]) -> PathBuf {
    let path = dir.join("m.gguf");
    let out = Command::new(format!("{ROOT}/scripts/gen-moe-gguf")).arg(&path).args(args).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    path
}

#[test]
fn the_machine_alone_is_told_with_reasons_for_what_is_not_there() {
    let report: Value = serde_json::from_str(&text(&doctor(&["--json"]))).unwrap();
    assert!(report["model"].is_null());
    assert!(report["ram_total_mib"].as_u64() > report["ram_available_mib"].as_u64(), "{report}");
    assert!(
        report["cpus"].as_u64() >= report["cores"].as_u64() && report["cpus"].as_u64() > Some(0),
        "{report}"
    );
    assert_eq!(report["gpus"].as_array().unwrap().is_empty(), report["no_gpu"].is_string(), "{report}");
    assert!(!report["measured"]["cpu_read"].as_array().unwrap().is_empty());
    let n_kernels = report["row_kernels"].as_array().unwrap().len();
    // kernels exist for eight types, of each the fastest
    #[cfg(target_arch = "x86_64")]
    assert_eq!(n_kernels, if std::is_x86_feature_detected!("avx2") { 8 } else { 0 }, "{report}");
    #[cfg(not(target_arch = "x86_64"))]
    assert_eq!(n_kernels, 0, "{report}");
    let out = doctor(&["--ctx-size", "4096"]);
    assert_eq!(out.status.code(), Some(2), "a context is a model's");
}

#[test]
fn the_shipped_model_has_one_class() {
    let report = json(Path::new(SHIPPED), &[]);
    let m = &report["model"];
    assert_eq!((m["architecture"].as_str(), m["moe_layers"].as_u64()), (Some("qwen3moe"), Some(6)), "{m}");
    let classes = m["classes"].as_array().unwrap();
    assert_eq!(classes.len(), 1);
    let c = &classes[0];
    // three matrices of 256 x 128 in blocks of 32 weights and 18 bytes
    assert_eq!(
        (c["layers"].as_str(), c["expert_bytes"].as_u64()),
        (Some("0-5"), Some(3 * 256 * 128 / 32 * 18))
    );
    assert_eq!((c["experts_per_layer"].as_u64(), c["experts_used"].as_u64()), (Some(64), Some(8)));
    assert!(c["matrices"].as_array().unwrap().iter().all(|x| x["type"] == "q4_0"), "{c}");
    assert_eq!(m["stock"].as_array().unwrap().len(), 0);
    let experts = m["experts_mib"].as_f64().unwrap();
    assert!((experts * 1048576.0 - 6.0 * 64.0 * c["expert_bytes"].as_f64().unwrap()).abs() < 1.0);
    // it fits beside any GPU, and without one there is nothing to win
    let command = m["suggestion"]["command"].as_str().unwrap();
    assert!(!command.contains("--moe-hot"), "{command}");
    assert_eq!(m["vram"].is_null(), report["gpus"].as_array().unwrap().is_empty());
    // caches hold it, and those were not measured
    assert_eq!(m["expected"].as_array().unwrap().len(), 0);
    if m["vram"].is_null() || report["cuda_kernels"] == true {
        assert!(
            m["basis"][0].as_str().unwrap().starts_with("nothing is expected: caches may hold the 23."),
            "{m}"
        );
    }

    let table = text(&doctor(&[SHIPPED]));
    for what in ["class 0", "suggested", "basis", "not told by the file"] {
        assert!(table.lines().any(|l| l.starts_with(what)), "{what} is missing:\n{table}");
    }
    assert!(table.contains("down q4_0 128 x 256; layers 0-5\n"), "{table}");
    if report["no_gpu"].is_string() {
        assert!(table.contains("slots can be in host memory only, which brings nothing"), "{table}");
    }
}

#[test]
fn layers_of_different_types_are_different_classes() {
    let dir = tempfile::tempdir().unwrap();
    let path = model(dir.path(), &["--arch", "qwen3moe", "--type", "Q4_K_M", "--layers", "8"]);
    let report = json(&path, &[]);
    let classes = report["model"]["classes"].as_array().unwrap();
    // the quantiser gives Q6_K to the down projections of some layers
    let down = |c: &Value| c["matrices"][2]["type"].as_str().unwrap().to_string();
    let mut types: Vec<String> = classes.iter().map(down).collect();
    types.sort();
    assert_eq!(types, ["q4_K", "q6_K"], "{classes:?}");
    assert_eq!(classes.iter().map(|c| c["n_layers"].as_u64().unwrap()).sum::<u64>(), 8);
    for c in classes {
        let bytes: u64 = c["matrices"].as_array().unwrap().iter().map(|x| x["bytes"].as_u64().unwrap()).sum();
        assert_eq!(c["expert_bytes"].as_u64(), Some(bytes));
    }
}

#[test]
fn speeds_of_a_large_model_come_with_their_basis() {
    let dir = tempfile::tempdir().unwrap();
    // two layers of 48 experts of 3 x 1024 x 1024 weights, 34 bytes each 32: 306 MiB
    let shape = ["--embd", "1024", "--ff", "1024", "--experts", "48", "--layers", "2", "--type", "Q8_0"];
    let path = model(dir.path(), &[&["--arch", "qwen3moe"], &shape[..]].concat());
    let report = json(&path, &[]);
    let m = &report["model"];
    let expected = m["expected"].as_array().unwrap();
    if !m["vram"].is_null() && report["cuda_kernels"] == false {
        assert!(expected.is_empty(), "the GPU was not measured: {m}");
        return;
    }
    assert!(!expected.is_empty(), "{m}");
    for e in expected {
        assert!(e["at_most_tokens_per_s"].as_f64().unwrap() > 0.0, "{e}");
    }
    let basis = m["basis"].to_string();
    assert!(basis.contains("a token reads") && basis.contains("measured now"), "{basis}");
}

#[test]
fn every_type_and_architecture_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let out = Command::new(format!("{ROOT}/scripts/gen-moe-gguf"))
        .arg("--test-set")
        .arg(dir.path())
        .output()
        .unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let index: Value = serde_json::from_slice(&fs::read(dir.path().join("index.json")).unwrap()).unwrap();
    let models = index.as_array().unwrap();
    assert!(models.len() > 50);
    for m in models {
        let path = dir.path().join(m["file"].as_str().unwrap());
        let g = Gguf::open(&path).unwrap();
        assert!(g.text("general.architecture").unwrap().is_some() && !g.tensors.is_empty(), "{m}");
    }
}

#[test]
fn models_without_a_hot_path_say_why() {
    let dir = tempfile::tempdir().unwrap();
    let report = json(&model(dir.path(), &["--arch", "gpt-oss"]), &[]);
    let m = &report["model"];
    assert_eq!(m["classes"].as_array().unwrap().len(), 0);
    assert_eq!(m["stock"][0]["layers"], "0-1");
    assert_eq!(m["stock"][0]["why"], "its experts have biases");

    let path = model(dir.path(), &["--arch", "qwen3"]);
    let report = json(&path, &[]);
    let m = &report["model"];
    assert_eq!((m["moe_layers"].as_u64(), m["experts_mib"].as_f64()), (Some(0), Some(0.0)));
    assert!(!m["suggestion"]["command"].as_str().unwrap().contains("moe"), "{m}");
    let table = text(&doctor(&[path.to_str().unwrap()]));
    assert!(table.contains("none: the model is dense, there is nothing to gain"), "{table}");
}

#[test]
fn files_that_are_no_models_are_refused_with_the_offset() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let name = path.to_str().unwrap();
    let shipped = fs::read(Path::new(ROOT).join(SHIPPED)).unwrap();
    let cut = |n: usize| {
        fs::write(&path, &shipped[..n]).unwrap();
        error(&[name])
    };
    for n in [0, 3, 1000, 300_000] {
        let e = cut(n);
        assert!(e.starts_with(&format!("moe-hot: error: {name}: truncated at offset {n}, in ")), "{e}");
    }
    let e = cut(shipped.len() - 1);
    assert!(e.starts_with(&format!(
        "moe-hot: error: {name}: truncated at offset {}, in tensor '",
        shipped.len() - 1
    )));
    fs::write(&path, "MOEHOTRT and more").unwrap();
    assert_eq!(
        error(&[name]),
        format!("moe-hot: error: {name}: at offset 0: not a GGUF file, it does not begin with GGUF\n")
    );
    assert_eq!(
        error(&["/nonexistent/m.gguf"]),
        "moe-hot: error: /nonexistent/m.gguf: No such file or directory (os error 2)\n"
    );
    let out = doctor(&[SHIPPED, "--ctx-size", "0"]);
    let e = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(out.status.code() == Some(2) && e.contains("--ctx-size"), "{e}");
}
