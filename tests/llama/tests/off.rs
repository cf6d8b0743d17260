//! Off is off: without the option the graph (nodes and splits) and the logits are those of an unpatched
//! llama.cpp, and with it the graphs of large ubatches still are.
//!
//! `golden/` holds the graphs of the pin, unpatched. They are written anew, for another pin, by
//! `MOE_HOT_UPDATE_GOLDEN=1 MOE_HOT_BUILD_DIR=<build of the unpatched pin> cargo test -p llama-tests --test off`.
//! With `MOE_HOT_STOCK_BUILD=<such a build>` all is compared with that build directly, too.

use std::{
    path::{Path, PathBuf},
    process::Command,
};

use llama_tests::{Llama, models, paths};

/// Ubatch sizes: one token, several on the hot path, more than it takes.
const SIZES: [&str; 3] = ["1", "4", "64"];

/// The trained model, and one model of each: shared experts behind a dense layer, GeGLU with gate and up
/// in one tensor.
fn cases() -> [(&'static str, PathBuf); 3] {
    let synthetic = |name| (name, models::named(name).file.clone());
    [("moe-e64", paths::shipped_model()), synthetic("deepseek2"), synthetic("gemma4")]
}

/// What llama-probe prints for `build`, with these options of the expert cache in the environment.
fn probe(build: &Path, args: &[&str], model: &Path, sizes: &[&str], env: &[(&str, &str)]) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_llama-probe"));
    for name in ["K", "REBALANCE_INTERVAL", "POLICY", "THREADS", "TRACE"] {
        command.env_remove(format!("LLAMA_ARG_MOE_HOT_{name}"));
    }
    command.env_remove("LLAMA_MOE_HOT_PP_BYPASS_N_TOKENS");
    command.env("MOE_HOT_BUILD_DIR", build).env("GGML_SCHED_DEBUG", "2").envs(env.iter().copied());
    let out = command.args(args).arg(model).args(sizes).output().expect("llama-probe can be started");
    assert!(
        out.status.success(),
        "llama-probe {args:?} {} of {}: {}\n{}",
        model.display(),
        build.display(),
        out.status,
        String::from_utf8_lossy(&out.stderr)
    );
    String::from_utf8(out.stdout).expect("the listing is UTF-8")
}

fn graphs(build: &Path, model: &Path, env: &[(&str, &str)]) -> String {
    probe(build, &["graph"], model, &SIZES, env)
}

/// The first line that differs, for a message.
fn difference(expected: &str, got: &str) -> Option<String> {
    if expected == got {
        return None;
    }
    let (mut e, mut g) = (expected.lines(), got.lines());
    for n in 1.. {
        let (e, g) = (e.next(), g.next());
        if e != g {
            let show = |l: Option<&str>| l.unwrap_or("(the end)").to_string();
            return Some(format!("line {n}:\n  expected {}\n  got      {}", show(e), show(g)));
        }
    }
    None
}

/// The part of a listing about ubatches of `size`.
fn section<'a>(listing: &'a str, size: &str) -> &'a str {
    let start = listing.find(&format!("# ubatch of {size}\n")).expect("the listing has the size");
    let rest = &listing[start..];
    rest[1..].find("# ubatch").map_or(rest, |end| &rest[..=end])
}

#[test]
fn without_the_option_the_graph_is_stocks() {
    let build = paths::build_dir();
    let update = std::env::var_os("MOE_HOT_UPDATE_GOLDEN").is_some();
    if update {
        assert!(!Llama::get().has_moe_hot(), "golden files are made from a build without the expert cache");
    }
    for (name, model) in cases() {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden").join(format!("{name}.txt"));
        let got = graphs(&build, &model, &[]);
        if update {
            std::fs::write(&golden, &got).unwrap_or_else(|e| panic!("{}: {e}", golden.display()));
            continue;
        }
        let expected =
            std::fs::read_to_string(&golden).unwrap_or_else(|e| panic!("{}: {e}", golden.display()));
        if let Some(what) = difference(&expected, &got) {
            panic!("the graph of {name} is not that of {}: {what}", golden.display());
        }
        let zero = graphs(&build, &model, &[("LLAMA_ARG_MOE_HOT_K", "0")]);
        assert_eq!(difference(&expected, &zero), None, "{name} with K = 0");
    }
}

/// A listing without the copies of what a prompt selects, which are read back for the policy and used by no node. They
/// count in the numbers of nodes and in how often the selection is used, so these go as well.
fn without_routed(listing: &str) -> String {
    let mut out = String::new();
    for line in listing.lines().filter(|l| !l.contains("): ffn_moe_routed-")) {
        let line = if line.starts_with("node #") { line.trim_start_matches(|c| c != '(') } else { line };
        let words = line.split(' ');
        // nodes without a name are called after their number
        let unnumbered = |w| if str::starts_with(w, "node_") { "node_" } else { w };
        let words: Vec<_> = words.filter(|w| !w.starts_with("use=")).map(unnumbered).collect();
        out += &words.join(" ");
        out.push('\n');
    }
    out
}

#[test]
fn with_the_option_only_the_graphs_of_small_ubatches_change() {
    if !Llama::get().has_moe_hot() {
        eprintln!("not checked: this build has no expert cache");
        return;
    }
    let build = paths::build_dir();
    for (name, model) in cases() {
        let off = graphs(&build, &model, &[]);
        let on = graphs(&build, &model, &[("LLAMA_ARG_MOE_HOT_K", "4")]);
        for size in SIZES {
            let (off, on) = (section(&off, size), section(&on, size));
            let n_slots = on.matches("): ffn_moe_slots-").count();
            if size == "64" {
                let n_routed = on.matches("): ffn_moe_routed-").count();
                assert_eq!(n_routed, off.matches("): ffn_moe_down-").count(), "{name}, ubatch of {size}");
                let (off, on) = (without_routed(off), without_routed(on));
                assert_eq!(difference(&off, &on), None, "{name}, ubatch of {size}");
            } else {
                let n_layers = off.matches("): ffn_moe_down-").count();
                assert!(n_layers > 0, "{name}: the listing shows no MoE layer:\n{off}");
                assert_eq!(n_slots, n_layers, "{name}, ubatch of {size}");
                assert_eq!(on.matches("## SPLIT").count(), off.matches("## SPLIT").count(), "{name}: splits");
            }
        }
        let narrow = [("LLAMA_ARG_MOE_HOT_K", "4"), ("LLAMA_MOE_HOT_PP_BYPASS_N_TOKENS", "3")];
        let narrow = graphs(&build, &model, &narrow);
        assert_eq!(difference(section(&on, "1"), section(&narrow, "1")), None, "{name}");
        assert_eq!(
            difference(&without_routed(section(&off, "4")), &without_routed(section(&narrow, "4"))),
            None,
            "{name}: 4 tokens are above 3"
        );
    }
}

#[test]
fn graphs_and_logits_equal_those_of_an_unpatched_build() {
    let Some(stock) = paths::stock_build_dir() else {
        eprintln!("not checked: MOE_HOT_STOCK_BUILD names no build of the unpatched pin");
        return;
    };
    let build = paths::build_dir();
    for (name, model) in cases() {
        assert_eq!(
            difference(&graphs(&stock, &model, &[]), &graphs(&build, &model, &[])),
            None,
            "{name}: graph"
        );
        let expected = probe(&stock, &["logits"], &model, &[], &[]);
        let off = probe(&build, &["logits"], &model, &[], &[]);
        assert_eq!(difference(&expected, &off), None, "{name}: logits without the option");
        let on = [("LLAMA_ARG_MOE_HOT_K", "4"), ("LLAMA_ARG_MOE_HOT_REBALANCE_INTERVAL", "2")];
        let on = probe(&build, &["logits"], &model, &[], &on);
        assert_eq!(difference(&expected, &on), None, "{name}: logits with slots");
    }
}
