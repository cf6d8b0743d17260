//! 10,000 ubatches while copies, allocations and writes fail by chance, copies and cold experts are late, and the pool
//! gets another size, policy or interval every 40 ubatches: the output stays stock's to the last bit, nothing hangs, and
//! at the end every slot is accounted for and holds the bytes of its expert.

use std::{
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use llama_tests::models::test_set;
use serde_json::Value;

const UBATCHES: u64 = 10_000;
/// Of 1000 operations so many fail, or are late.
const CHANCE: u32 = 30;
/// What a healthy run takes is under a minute; a hang is forever.
const BOUND: Duration = Duration::from_secs(600);

/// What llama-probe prints, and its messages.
fn run(seed: u64, hot: bool) -> (String, String) {
    let model = test_set().iter().find(|m| m.name() == "qwen3moe-Q4_0").expect("a model");
    let dir = tempfile::tempdir().expect("a folder");
    let mut command = Command::new(env!("CARGO_BIN_EXE_llama-probe"));
    command.arg("chaos").arg(&model.file).args([
        UBATCHES.to_string(),
        seed.to_string(),
        model.n_expert.to_string(),
    ]);
    if hot {
        command.env("LLAMA_ARG_MOE_HOT_K", (model.n_expert / 4).to_string());
        command.env("LLAMA_ARG_MOE_HOT_THREADS", "2").env("MOE_HOT_VERIFY", "1");
        command.env("LLAMA_ARG_MOE_HOT_TRACE", dir.path().join("trace"));
        command.env("LLAMA_ARG_MOE_HOT_PROFILE_OUT", dir.path().join("profile"));
        command.env("MOE_HOT_FAULT", format!("chance={CHANCE},seed={seed}"));
    }
    let [out, err] = ["out", "err"].map(|name| dir.path().join(name));
    let file = |path| std::fs::File::create(path).expect("a file");
    let mut child =
        command.stdin(Stdio::null()).stdout(file(&out)).stderr(file(&err)).spawn().expect("llama-probe");
    let start = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().expect("the child can be asked") {
            break status;
        }
        if start.elapsed() > BOUND {
            child.kill().expect("it runs");
            panic!("seed {seed}: it hangs:\n{}", std::fs::read_to_string(&err).unwrap_or_default());
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    let [out, err] = [out, err].map(|path| std::fs::read_to_string(path).expect("its output"));
    assert!(status.success(), "seed {seed}: {status}\n{err}");
    (out, err)
}

#[test]
fn whatever_fails_the_output_is_stocks_and_no_slot_is_lost() {
    for seed in [1, 2] {
        let (expected, _) = run(seed, false);
        let (got, messages) = run(seed, true);
        assert_eq!(got.lines().count() as u64, UBATCHES.max(expected.lines().count() as u64));
        let differs = expected.lines().zip(got.lines()).find(|(e, g)| e != g);
        assert_eq!(differs, None, "seed {seed}:\n{messages}");

        let state = messages.lines().find_map(|l| l.split_once(" changes; ")).expect("how it ends").1;
        let state: Value = serde_json::from_str(state).expect("JSON");
        let pool = &state["models"][0];
        let number = |what: &str| pool["stats"][what].as_u64().unwrap();
        assert!(
            number("copy_failures") > 30 && number("uploads") > 1000 && number("evictions") > 1000,
            "{pool}"
        );
        assert!(pool["slots_used"].as_u64() <= pool["slots"].as_u64(), "{pool}");
        assert!(messages.contains("moe-hot: there is no memory for more slots"), "{messages}");
        let verified: Vec<_> = messages.lines().filter(|l| l.starts_with("moe-hot: verified ")).collect();
        assert!(verified.len() > 20 && verified.iter().all(|l| l.ends_with("all equal")), "{verified:?}");
    }
}
