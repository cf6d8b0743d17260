//! The moe-hot command on good and bad files.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    process::{Command, Output},
};

use moe_hot::{
    cost::{Cost, CostFile},
    policy::{PolicyKind, Routed},
    trace::{TraceHeader, TraceLayer, TraceWriter},
};

fn moe_hot(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_moe-hot")).args(args).output().unwrap()
}

fn trace(path: &Path) {
    let layer = |il| TraceLayer { il, n_expert: 16, n_used: 2, class: 0, expert_bytes: 1000 };
    let header = TraceHeader { fingerprint: 1, k: 4, uses_per_upload: 64, layers: vec![layer(0), layer(1)] };
    let mut w = TraceWriter::create(path, &header).unwrap();
    for t in 0..200u16 {
        let ids = [vec![t / 50, 5], vec![t % 16, (t + 3) % 16]];
        w.routed(false, Routed { n_tokens: 1, sequences: &[0], ids: &ids }).unwrap();
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
    let policies: Vec<String> = PolicyKind::all().map(|p| p.to_string()).collect();
    let per_k = 3 + policies.len();
    assert_eq!(
        rows[0].join("|"),
        "trace|policy|k|interval|hit rate|cold/token|reads/optimum|uploads|hits/upload|bytes/token|tok/s"
    );
    assert_eq!(rows.len(), 1 + 2 * per_k);
    assert!(rows.iter().all(|r| r.len() == rows[0].len()));
    let names: Vec<_> = rows[1..=per_k].iter().map(|r| r[1]).collect();
    assert_eq!(names[..3], ["optimum", "optimum/layer", "hindsight"]);
    assert_eq!(names[3..], policies);
    let hit_rate = |r: &Vec<&str>| r[4].parse::<f64>().unwrap();
    assert!(rows[2..=per_k].iter().all(|r| hit_rate(r) <= hit_rate(&rows[1])));
    // of 800 uses the 400 of layer 0, which uses five experts, and three times 26 of layer 1, which uses all
    assert_eq!(
        rows[3],
        ["a.trace", "hindsight", "4", "-", "0.5975", "1.61", rows[3][6], "0", "-", rows[3][9], "-"]
    );
}

#[test]
fn a_budget_is_a_share_of_the_experts_and_several_traces_are_summed() {
    let dir = tempfile::tempdir().unwrap();
    let paths = ["a.trace", "b.trace"].map(|n| dir.path().join(n));
    paths.iter().for_each(|p| trace(p));
    let [a, b] = paths.each_ref().map(|p| p.to_str().unwrap());
    let rows = |args: &[&str]| {
        let out = moe_hot(&[&["replay", "--csv", "--policy", "lru"], args].concat());
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        let text = String::from_utf8(out.stdout).unwrap();
        text.lines().map(|l| l.split(',').map(String::from).collect()).collect::<Vec<Vec<String>>>()
    };
    // 16 experts a layer; the interval is 4
    let by_share = rows(&[a, "--budget", "12.5%,25%"]);
    assert_eq!(by_share, rows(&[a, "--k", "2,4", "--interval", "4"]));
    assert_eq!(
        by_share.iter().map(|r| r[2].as_str()).collect::<Vec<_>>()[1..],
        ["2", "2", "2", "2", "4", "4", "4", "4"]
    );
    assert_eq!(rows(&[a])[1..].iter().map(|r| r[2].clone()).collect::<Vec<_>>().join(""), "222244446666");

    let both = rows(&[a, b, "--k", "4"]);
    assert_eq!(both.len(), 1 + 3 * 4);
    for (one, all) in both[1..5].iter().zip(&both[9..]) {
        assert_eq!((one[0].as_str(), all[0].as_str()), ("a.trace", "all"));
        assert_eq!(one[1..7], all[1..7], "the same text twice has the same rates");
        assert_eq!(2 * one[7].parse::<u64>().unwrap(), all[7].parse::<u64>().unwrap());
    }
    let out = moe_hot(&["replay", a, "--k", "4", "--budget", "25%"]);
    assert_eq!(out.status.code(), Some(2));
    let out = moe_hot(&["replay", a, "--budget", "0.25"]);
    let error = String::from_utf8(out.stderr).unwrap();
    assert!(error.contains("invalid value '0.25' for '--budget <BUDGET>': expected more than 0%"), "{error}");
}

#[test]
fn a_plot_is_written_as_its_name_says() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.trace");
    trace(&path);
    let plot = |name: &str, more: &[&str]| {
        let picture = dir.path().join(name);
        let args = ["replay", path.to_str().unwrap(), "--plot", picture.to_str().unwrap()];
        let out = moe_hot(&[&args, more].concat());
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        fs::read(picture).unwrap()
    };
    assert!(plot("a.png", &[]).starts_with(b"\x89PNG"));
    let svg = String::from_utf8(plot("a.svg", &["--plot-of", "hit-rate", "--interval", "1,4"])).unwrap();
    assert!(svg.starts_with("<svg"));
    for text in ["hit rate", "optimum", "hindsight", "decay, interval 1", "lru, interval 4"] {
        assert!(svg.contains(text), "{text} is missing");
    }
    let out = moe_hot(&["replay", path.to_str().unwrap(), "--plot", "a.pdf"]);
    assert_eq!(out.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&out.stderr).contains("expected a name that ends in .png or .svg"));
    let e = error_of(&moe_hot(&["replay", path.to_str().unwrap(), "--plot", "/nonexistent/a.svg"]));
    assert!(e.starts_with("moe-hot: error: --plot: /nonexistent/a.svg: "), "{e}");
}

#[test]
fn costs_predict_speed_for_their_own_model_only() {
    let dir = tempfile::tempdir().unwrap();
    let (path, costs) = (dir.path().join("a.trace"), dir.path().join("cost.json"));
    trace(&path);
    let cost = Cost { step_us: 500.0, cold_us: 0.0, layer_us: 0.0, upload_us: 1.0 };
    let mut file = CostFile { fingerprint: 1, date: String::new(), commands: vec![], cost, runs: vec![] };
    file.write(&costs).unwrap();
    let args = [
        "replay",
        path.to_str().unwrap(),
        "--cost",
        costs.to_str().unwrap(),
        "--csv",
        "--k",
        "4",
        "--policy",
        "lru",
    ];
    let out = moe_hot(&args);
    let text = String::from_utf8(out.stdout).unwrap();
    let rows: Vec<Vec<&str>> = text.lines().map(|l| l.split(',').collect()).collect();
    // what has no uploads of its own to pay
    assert!(rows[1..4].iter().all(|r| r[10] == "2000.00"), "{text}");
    let uploads: f64 = rows[4][7].parse().unwrap();
    assert!(uploads > 0.0);
    assert_eq!(rows[4][10], format!("{:.2}", 200.0 * 1e6 / (200.0 * 500.0 + uploads)));

    file.fingerprint = 2;
    file.write(&costs).unwrap();
    assert_eq!(
        error_of(&moe_hot(&args)),
        format!(
            "moe-hot: error: --cost: {}: measured with model 0000000000000002, the trace is of model 0000000000000001 (a.trace)\n",
            costs.display()
        )
    );
    file.cost.cold_us = -1.0;
    file.write(&costs).unwrap();
    assert_eq!(
        error_of(&moe_hot(&args)),
        format!(
            "moe-hot: error: --cost: {}: cold_us: -1 is not allowed, expected a finite number of at least 0\n",
            costs.display()
        )
    );
}

/// A llama-bench that needs 1000 us a step, 10 a cold expert and 40 an upload.
fn bench(dir: &Path) {
    let program = dir.join("llama-bench");
    let script = r#"#!/bin/sh
here=$(dirname "$0")
while [ $# -gt 0 ]; do
    case $1 in
        -m) [ "$2" = model ] || { echo "llama_bench: error: failed to load model '$2'" >&2; exit 1; } ;;
        -n) n=$2 ;;
        -mhk) ks=$2 ;;
        -mhi) interval=$2 ;;
        -mhp) policies=$2 ;;
        --text) [ -s "$2" ] || exit 1 ;;
        --off) echo "warning: --moe-hot-k is not active for this model" >&2; exit 0 ;;
    esac
    shift
done
[ -z "$LLAMA_ARG_MOE_HOT_TRACE" ] || cp "$here/routing" "$LLAMA_ARG_MOE_HOT_TRACE"
for k in $(echo $ks | tr , ' '); do for p in $(echo $policies | tr , ' '); do
    case $p in lru) uploads=$((5 * k)) ;; *) uploads=$k ;; esac
    cold=$((20 - k))
    ns=$(((n * 1000 + n * cold * 10 + uploads * 40) * 1000))
    printf '{"moe_hot_k": %d, "moe_hot_interval": %d, "moe_hot_policy": "%s", ' $k $interval $p
    printf '"cold_per_token": %d.0, "uploads": %d, "n_gen": %d, "avg_ns": %d}\n' $cold $uploads $n $ns
done; done
"#;
    fs::write(&program, script).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    trace(&dir.join("routing"));
}

#[test]
fn probe_fits_the_constants_and_replay_takes_them() {
    let dir = tempfile::tempdir().unwrap();
    bench(dir.path());
    let (bin, costs) = (dir.path().to_str().unwrap(), dir.path().join("cost.json"));
    let out = moe_hot(&[
        "probe",
        "--bin",
        bin,
        "-m",
        "model",
        "-n",
        "200",
        "-r",
        "2",
        "-o",
        costs.to_str().unwrap(),
    ]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let text = String::from_utf8(out.stdout).unwrap();
    assert!(text.contains("largest error 0.0%"), "{text}");
    let file = CostFile::read(&costs).unwrap();
    for (got, made) in file.cost.constants().iter().zip([1000.0, 10.0, 0.0, 40.0]) {
        assert!((got - made).abs() < 0.01, "{:?}", file.cost);
    }
    // 3 policies at 2, 4 and 8 of 16 experts
    assert_eq!((file.fingerprint, file.commands.len(), file.runs.len()), (1, 3, 9));
    assert!(file.runs.iter().all(|r| r.tokens_per_s.len() == 2));
    assert!(file.commands[0].contains("--text (built-in text)"), "{}", file.commands[0]);
    let routing = dir.path().join("routing");
    let out = moe_hot(&["replay", routing.to_str().unwrap(), "--cost", costs.to_str().unwrap()]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
}

#[test]
fn probe_measures_the_machine() {
    let out = moe_hot(&["probe", "--json"]);
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let machine: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    let reads = machine["cpu_read"].as_array().unwrap();
    let threads = |r: &serde_json::Value| r["threads"].as_u64().unwrap();
    assert_eq!(threads(&reads[0]), 1);
    assert_eq!(threads(reads.last().unwrap()), machine["cpus"].as_u64().unwrap());
    assert!(reads.iter().all(|r| r["gb_s"].as_f64().unwrap() > 0.0), "{machine}");
    // a GPU's figures, or why there are none
    assert_eq!(machine["gpu"].is_null(), machine["no_gpu"].is_string(), "{machine}");
    // what belongs to the constants needs a model
    let out = moe_hot(&["probe", "--interval", "2"]);
    let e = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.code() == Some(2) && e.contains("--bin") && e.contains("--model"), "{e}");
}

#[test]
fn probe_says_why_it_cannot_measure() {
    let dir = tempfile::tempdir().unwrap();
    let bin = dir.path().to_str().unwrap();
    let program = dir.path().join("llama-bench").display().to_string();
    // what comes before the error tells how far it is
    let error = |args: &[&str]| {
        let e = error_of(&moe_hot(&[&["probe", "--bin", bin], args].concat()));
        e.lines().last().unwrap_or_default().to_string()
    };
    assert_eq!(
        error(&["-m", "model"]),
        format!("moe-hot: error: --bin: {program}: No such file or directory (os error 2)")
    );
    bench(dir.path());
    assert_eq!(
        error(&["-m", "other"]),
        format!(
            "moe-hot: error: {program}: exit status: 1: llama_bench: error: failed to load model 'other'"
        )
    );
    assert_eq!(
        error(&["-m", "model", "--", "--off"]),
        format!(
            "moe-hot: error: {program}: no routing was recorded: warning: --moe-hot-k is not active for this model"
        )
    );
    assert_eq!(
        error(&["-m", "model", "--k", "17"]),
        "moe-hot: error: --k: 17 is not allowed, the model has 16 experts a layer"
    );
    assert_eq!(
        error(&["-m", "model", "--k", "4"]),
        "moe-hot: error: --k, --interval, --policy: 3 combinations are not enough for 4 constants, expected at least 6"
    );
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
        format!("moe-hot: error: {name}: truncated at offset {end}, in the block that begins at offset 72\n")
    );
    fs::write(&path, "GGUF").unwrap();
    assert_eq!(
        error_of(&moe_hot(&["heatmap", name, "-o", "/dev/null"])),
        format!("moe-hot: error: {name}: not a routing trace, it does not begin with MOEHOTRT\n")
    );
    let out = moe_hot(&["replay", name, "--policy", "fifo"]);
    assert_eq!(out.status.code(), Some(2));
    assert!(
        String::from_utf8_lossy(&out.stderr).contains(&format!("expected one of {}", PolicyKind::names()))
    );
}
