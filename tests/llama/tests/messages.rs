//! What is said, word for word: requested against active, what was skipped and why, and what is refused.
//! The numbers and names in these messages are what a user acts on.

use std::process::{Command, Output};

use llama_tests::{
    ContextOptions, Exclusive, Hot, Line, Llama, LoadOptions, compare, models, paths, schedule::Schedule,
};

const WARNING: u32 = 3;

fn llama() -> Exclusive {
    let llama = Llama::get();
    assert!(llama.has_moe_hot(), "this libllama was built without LLAMA_MOE_HOT");
    llama.exclusive()
}

/// The messages of the expert cache among `lines`, at least as severe as `level`.
fn said(lines: &[Line], level: u32) -> Vec<String> {
    let of_cache = |l: &&Line| l.level >= level && l.text.contains("moe-hot");
    lines.iter().filter(of_cache).map(|l| l.text.clone()).collect()
}

/// Warnings and errors while a context of `model` is made with `hot`, and what it says of itself.
fn warnings(llama: &Exclusive, model: &str, hot: &Hot) -> (Vec<String>, Option<String>) {
    let model = llama.load(&models::named(model).file, LoadOptions::default()).unwrap();
    llama.hot(hot);
    llama.take_log();
    let ctx = model.context(ContextOptions::default()).unwrap();
    (said(&llama.take_log(), WARNING), ctx.status())
}

fn k(k: u32) -> Hot {
    Hot { k, interval: 4, ..Hot::default() }
}

#[test]
fn what_is_active_is_said_in_one_line() {
    let llama = llama();
    let (warnings, status) = warnings(&llama, "qwen3moe-e32", &Hot { workers: 2, ..k(12) });
    assert_eq!(warnings, [""; 0]);
    assert_eq!(
        status.as_deref(),
        Some(
            "moe-hot: requested K = 12, active: 48 slots for 128 experts in host memory (0.75 MiB, 2 classes), \
             4 of 4 MoE layers, policy decay, rebalance interval 4 tokens, ubatches up to 7 tokens, 2 workers (ggml)"
        )
    );
}

#[test]
fn the_same_line_is_in_the_log() {
    let llama = llama();
    let model = llama.load(&paths::shipped_model(), LoadOptions::default()).unwrap();
    llama.hot(&Hot { policy: "lru", pp_bypass: Some(3), interval: 16, ..k(32) });
    llama.take_log();
    let ctx = model.context(ContextOptions::default()).unwrap();
    let expected = "moe-hot: requested K = 32, active: 192 slots for 384 experts in host memory (10.12 MiB, 1 class), \
                    6 of 6 MoE layers, policy lru, rebalance interval 16 tokens, ubatches up to 3 tokens, 0 workers (ggml)";
    assert_eq!(said(&llama.take_log(), 0), [expected]);
    assert_eq!(ctx.status().as_deref(), Some(expected));
}

#[test]
fn more_slots_than_experts_are_clamped() {
    let llama = llama();
    let (warnings, status) = warnings(&llama, "olmoe", &k(100));
    assert_eq!(warnings, ["moe-hot: K = 100 is more than the 8 experts of a layer, using 8"], "said once");
    let status = status.unwrap();
    assert!(status.starts_with("moe-hot: requested K = 100, active: 16 slots for 16 experts "), "{status}");
}

#[test]
fn too_few_slots_to_pay_are_a_warning() {
    let llama = llama();
    let expected = "moe-hot: K = 11 is less than 3 x 4 experts a token: experts will leave before they are used again, \
                    this is unlikely to pay";
    let (said, status) = warnings(&llama, "qwen3moe-e32", &k(11));
    assert_eq!(said, [expected], "said once");
    assert!(status.is_some(), "it is active all the same");
    // 12 are enough, and so are all of few
    assert_eq!(warnings(&llama, "qwen3moe-e32", &k(12)).0, [""; 0]);
    assert_eq!(warnings(&llama, "qwen3moe-all", &k(4)).0, [""; 0]);
}

#[test]
fn a_dense_model_is_not_active() {
    let llama = llama();
    let (warnings, status) = warnings(&llama, "qwen3", &k(4));
    assert_eq!(warnings, ["moe-hot: requested K = 4, not active: the model has no MoE layers"]);
    assert_eq!(status, None);
}

#[test]
fn unsupported_layers_are_named_with_the_reason() {
    let llama = llama();
    for (model, reason) in
        [("gpt-oss", "its experts have biases"), ("qwen3moe-scaled", "its experts have scales")]
    {
        let (warnings, status) = warnings(&llama, model, &k(4));
        let layers = format!("moe-hot: layers 0-1 take the stock graph: {reason}");
        assert_eq!(
            warnings,
            ["moe-hot: requested K = 4, not active: no MoE layer can take the hot path", &layers]
        );
        assert_eq!(status, None, "{model}");
    }
}

#[test]
fn a_wider_bypass_than_possible_is_clamped() {
    let llama = llama();
    let (warnings, status) = warnings(&llama, "qwen3moe-Q4_0", &Hot { pp_bypass: Some(32), ..k(6) });
    let expected = "moe-hot: the hot path takes ubatches of up to 7 tokens, --moe-hot-pp-bypass 32 means 7";
    assert_eq!(warnings, [expected]);
    assert!(status.unwrap().contains("ubatches up to 7 tokens"));
}

#[test]
fn a_second_context_shares_the_slots() {
    let llama = llama();
    let model = llama.load(&models::named("qwen3moe-e32").file, LoadOptions::default()).unwrap();
    llama.hot(&k(16));
    let first = model.context(ContextOptions::default()).unwrap();
    llama.take_log();
    let second = model.context(ContextOptions::default()).unwrap();
    let shares = "moe-hot: this context shares the 64 slots of its model with 1 other context";
    assert_eq!(said(&llama.take_log(), 0), [shares]);

    // other options do not change slots that are in use
    llama.hot(&k(20));
    let third = model.context(ContextOptions::default()).unwrap();
    assert_eq!(
        said(&llama.take_log(), 0),
        [
            "moe-hot: this context shares the 64 slots of its model with 2 other contexts",
            "moe-hot: the options have changed, but the model's slots are in use: K = 16 and all else stays"
        ]
    );
    for ctx in [&first, &second, &third] {
        assert_eq!(ctx.stats().unwrap().n_slots, 64);
    }
    drop((first, second, third));

    // once nobody uses them they do
    llama.take_log();
    let fourth = model.context(ContextOptions::default()).unwrap();
    assert_eq!(fourth.stats().unwrap().n_slots, 80);
    let lines = said(&llama.take_log(), 0);
    assert!(
        lines.len() == 1 && lines[0].starts_with("moe-hot: requested K = 20, active: 80 slots"),
        "{lines:?}"
    );
}

#[test]
fn an_adapter_on_experts_is_said_once_a_layer() {
    let llama = llama();
    let model = llama.load(&models::named("qwen3moe").file, LoadOptions::default()).unwrap();
    let adapter = model.adapter(&models::named("lora-experts").file).unwrap();
    llama.hot(&k(8));
    let mut ctx = model.context(ContextOptions::default()).unwrap();
    ctx.set_adapters(&[&adapter]);
    llama.take_log();
    compare::decode(&mut ctx, &Schedule::mixed(model.n_vocab(), 1, 4)).unwrap();
    let mut lines = said(&llama.take_log(), WARNING);
    lines.sort();
    let expected = [0, 1]
        .map(|il| format!("moe-hot: layer {il} takes the stock graph: a LoRA adapter changes its experts"));
    assert_eq!(lines, expected);
}

#[test]
fn experts_that_were_repacked_before_are_said() {
    let llama = llama();
    let model = llama
        .load(&models::named("qwen3moe-Q4_0").file, LoadOptions { repack: true, ..LoadOptions::default() })
        .unwrap();
    let repacked = llama.take_log().iter().any(|l| l.text.contains("CPU_REPACK"));
    llama.hot(&k(6));
    let ctx = model.context(ContextOptions::default()).unwrap();
    let warnings = said(&llama.take_log(), WARNING);
    if repacked {
        assert_eq!(
            warnings,
            [
                "moe-hot: requested K = 6, not active: no MoE layer can take the hot path",
                "moe-hot: layers 0-1 take the stock graph: its experts were repacked when they were loaded"
            ]
        );
        assert_eq!(ctx.status(), None);
    } else {
        // this CPU has no repacked layout for the type
        assert_eq!(warnings, [""; 0]);
        assert!(ctx.status().is_some());
    }
    drop(ctx);
    drop(model);

    // with the option set first, they are loaded as they are
    let model = llama
        .load(&models::named("qwen3moe-Q4_0").file, LoadOptions { repack: true, ..LoadOptions::default() })
        .unwrap();
    assert!(model.context(ContextOptions::default()).unwrap().status().is_some());
}

#[test]
fn a_trace_that_cannot_be_written_is_said() {
    let llama = llama();
    let model = llama.load(&models::named("qwen3moe-e32").file, LoadOptions::default()).unwrap();
    llama.hot(&k(16));
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("missing").join("trace");
    llama.set("moe-hot-trace", path.to_str()).unwrap();
    llama.take_log();
    let ctx = model.context(ContextOptions::default()).unwrap();
    let lines = said(&llama.take_log(), WARNING);
    let start = "moe-hot: requested K = 16, not active: --moe-hot-trace: ";
    assert!(lines.len() == 1 && lines[0].starts_with(start), "{lines:?}");
    assert!(lines[0].contains(path.to_str().unwrap()) && lines[0].contains("No such file"), "{lines:?}");
    assert_eq!(ctx.status(), None);
}

/// Option, environment variable, refused value, what is allowed.
const REFUSED: [(&str, &str, &str, &str); 14] = [
    ("moe-hot-vram", "LLAMA_ARG_MOE_HOT_VRAM", "4G", "a number of MiB from 1 to 16777216"),
    ("moe-hot-auto-off", "LLAMA_ARG_MOE_HOT_AUTO_OFF", "no", "one of auto, on, off"),
    ("moe-hot-k", "LLAMA_ARG_MOE_HOT_K", "-3", "auto or a number of slots per layer, 0 (off) or more"),
    ("moe-hot-k", "LLAMA_ARG_MOE_HOT_K", "many", "auto or a number of slots per layer, 0 (off) or more"),
    (
        "moe-hot-rebalance-interval",
        "LLAMA_ARG_MOE_HOT_REBALANCE_INTERVAL",
        "0",
        "a number of tokens from 1 to 1048576",
    ),
    (
        "moe-hot-policy",
        "LLAMA_ARG_MOE_HOT_POLICY",
        "fifo",
        "auto or one of decay, lru, lfu, static, lfru, s3fifo, predict",
    ),
    ("moe-hot-threads", "LLAMA_ARG_MOE_HOT_THREADS", "-1", "auto or a number of threads from 0 to 512"),
    ("moe-hot-threads", "LLAMA_ARG_MOE_HOT_THREADS", "513", "auto or a number of threads from 0 to 512"),
    ("moe-hot-pp-bypass", "LLAMA_MOE_HOT_PP_BYPASS_N_TOKENS", "0", "auto or a number of tokens, 1 or more"),
    ("moe-hot-link", "LLAMA_ARG_MOE_HOT_LINK", "on", "auto or off"),
    ("moe-hot-kernels", "LLAMA_ARG_MOE_HOT_KERNELS", "fast", "one of auto, rows, ggml"),
    (
        "moe-hot-profile",
        "LLAMA_ARG_MOE_HOT_PROFILE",
        "",
        "the path of a file that --moe-hot-profile-out wrote",
    ),
    ("moe-hot-profile-out", "LLAMA_ARG_MOE_HOT_PROFILE_OUT", "", "the path of a file to write"),
    ("moe-hot-trace", "LLAMA_ARG_MOE_HOT_TRACE", "", "the path of a file to write"),
];

#[test]
fn refused_values_leave_the_option_as_it_was() {
    let llama = llama();
    for (option, _, value, allowed) in REFUSED {
        let before = llama.option(option).unwrap();
        let message = llama.set(option, Some(value)).unwrap_err();
        assert_eq!(message, format!("--{option}: '{value}' is not allowed, expected {allowed}"));
        assert_eq!(llama.option(option).unwrap(), before);
    }
    let message = llama.set("moe-hot-size", Some("1")).unwrap_err();
    assert_eq!(
        message,
        "there is no option 'moe-hot-size', expected moe-hot-k, moe-hot-vram, moe-hot-rebalance-interval, moe-hot-pp-bypass, \
         moe-hot-policy, moe-hot-threads, moe-hot-link, moe-hot-kernels, moe-hot-profile, moe-hot-profile-out, \
         moe-hot-trace, moe-hot-auto-off"
    );
}

/// Runs a tool on the small model `model`, a few tokens.
fn tool(name: &str, model: &str, args: &[&str], env: &[(&str, &str)]) -> Output {
    let path = paths::tool(name);
    assert!(path.is_file(), "{} is missing: run scripts/build first", path.display());
    let mut command = Command::new(path);
    for (_, variable, _, _) in REFUSED {
        command.env_remove(variable);
    }
    command.arg("-m").arg(&models::named(model).file).args(["-t", "1", "-n", "4"]);
    match name {
        "llama-completion" => command.args(["-no-cnv", "-p", "a"]),
        "llama-bench" => command.args(["-p", "0", "-r", "1"]),
        _ => unreachable!("no arguments for {name}"),
    };
    command.args(args).envs(env.iter().copied()).stdin(std::process::Stdio::null());
    // llama.cpp writes its messages from a thread of its own, and on a busy machine a program may end before the last are out
    let whole = |out: &Output| {
        name != "llama-completion" || !out.status.success() || all_output(out).contains("graphs reused =")
    };
    let mut runs =
        std::iter::repeat_with(|| command.output().unwrap_or_else(|e| panic!("{name}: {e}"))).take(10);
    runs.find(whole).unwrap_or_else(|| panic!("{name}: the end of its output is missing, ten times"))
}

fn all_output(out: &Output) -> String {
    String::from_utf8_lossy(&out.stderr).into_owned() + &String::from_utf8_lossy(&out.stdout)
}

/// llama-bench has flags for what one wants to compare, and takes the others from the environment.
const BENCH_FLAGS: [&str; 4] =
    ["moe-hot-k", "moe-hot-rebalance-interval", "moe-hot-policy", "moe-hot-threads"];

#[test]
fn tools_refuse_bad_values_as_flag_and_in_the_environment() {
    for name in ["llama-completion", "llama-bench"] {
        for (option, variable, value, allowed) in REFUSED {
            let flag = format!("--{option}");
            let expected = format!("'{value}' is not allowed, expected {allowed}");
            for source in [flag.as_str(), variable] {
                if name == "llama-bench" && !BENCH_FLAGS.contains(&option) && source == flag {
                    continue;
                }
                let out = if source == flag {
                    tool(name, "qwen3moe", &[&flag, value], &[])
                } else {
                    tool(name, "qwen3moe", &[], &[(variable, value)])
                };
                let text = all_output(&out);
                // an empty variable is as good as none for llama.cpp
                if value.is_empty() && source == variable && out.status.success() {
                    continue;
                }
                let code = out.status.code();
                assert!(code.is_some_and(|c| c != 0), "{name} {source}={value}: {:?}\n{text}", out.status);
                assert!(text.contains(&expected), "{name} {source}={value}: no '{expected}' in\n{text}");
                let line = text.lines().find(|l| l.contains(&expected)).unwrap_or_default();
                assert!(line.contains(source), "{name}: '{line}' does not name {source}");
            }
        }
    }
}

/// MiB that --fit expects the shipped model to take: host memory, when there is no GPU.
fn projected(options: &[&str]) -> i64 {
    let model = paths::shipped_model();
    let model = ["-m", model.to_str().expect("a path in UTF-8"), "-c", "512", "-lv", "4"];
    // the last model counts
    let out = tool("llama-completion", "olmoe", &[&model, options].concat(), &[("CUDA_VISIBLE_DEVICES", "")]);
    let text = all_output(&out);
    assert!(out.status.success(), "{text}");
    let (_, after) = text.split_once("projected to use ").unwrap_or_else(|| panic!("no --fit in\n{text}"));
    after.split(' ').next().and_then(|n| n.parse().ok()).expect("a number of MiB")
}

#[test]
fn slots_are_part_of_what_is_fitted() {
    let without = projected(&["--no-repack"]);
    // 384 experts of 54 KiB
    for (options, mib) in [
        (["--moe-hot-k", "64"], 20),
        (["--moe-hot-k", "32"], 10),
        (["--moe-hot-vram", "7"], 7),
        // as many as there is room for: nothing to keep free
        (["--moe-hot-k", "auto"], 0),
        (["--moe-hot-k", "0"], 0),
    ] {
        let more = projected(&[&["--no-repack"], &options[..]].concat()) - without;
        assert!((more - mib).abs() <= 1, "{options:?}: {more} MiB more, not {mib}");
    }
}

#[test]
fn tools_say_what_is_not_as_requested() {
    let out = tool("llama-completion", "olmoe", &["--moe-hot-k", "100"], &[]);
    let text = all_output(&out);
    assert!(out.status.success(), "{text}");
    assert!(text.contains("moe-hot: K = 100 is more than the 8 experts of a layer, using 8"), "{text}");
    assert!(text.contains("moe-hot: requested K = 100, active: 16 slots"), "{text}");

    let out = tool("llama-completion", "gpt-oss", &[], &[("LLAMA_ARG_MOE_HOT_K", "4")]);
    let text = all_output(&out);
    assert!(out.status.success(), "{text}");
    assert!(
        text.contains("moe-hot: requested K = 4, not active: no MoE layer can take the hot path"),
        "{text}"
    );
    assert!(text.contains("moe-hot: layers 0-1 take the stock graph: its experts have biases"), "{text}");

    let out = tool("llama-bench", "qwen3", &["--moe-hot-k", "4"], &[]);
    let text = all_output(&out);
    assert!(out.status.success(), "{text}");
    assert!(text.contains("--moe-hot-k 4 is not active for this model, -v tells why"), "{text}");
    let out = tool("llama-bench", "qwen3", &["--moe-hot-k", "4", "-v"], &[]);
    assert!(all_output(&out).contains("moe-hot: requested K = 4, not active: the model has no MoE layers"));
}

#[test]
fn tools_without_the_option_say_nothing_of_it() {
    for name in ["llama-completion", "llama-bench"] {
        let out = tool(name, "qwen3moe", &[], &[]);
        let text = all_output(&out);
        assert!(out.status.success(), "{text}");
        assert!(!text.contains("moe-hot"), "{text}");
    }
}
