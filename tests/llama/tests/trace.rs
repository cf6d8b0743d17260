//! A recorded run replays to the plan it made: same swaps, same order, same moments.

use std::process::Command;

use llama_tests::{paths, replayed::assert_replays};
use moe_hot::policy::PolicyKind;

#[test]
fn a_recorded_run_replays_swap_by_swap() {
    let dir = tempfile::tempdir().unwrap();
    for (kind, k, interval) in [
        (PolicyKind::Decay, 16, 8),
        (PolicyKind::Decay, 24, 1),
        (PolicyKind::Lru, 8, 16),
        (PolicyKind::Lfu, 16, 5),
        (PolicyKind::Lfru, 16, 4),
        (PolicyKind::S3Fifo, 16, 4),
        (PolicyKind::Predict, 16, 2),
    ] {
        let path = dir.path().join(format!("{kind}-{k}.trace"));
        let out = Command::new(paths::tool("llama-bench"))
            .arg("-m")
            .arg(paths::shipped_model())
            .args(["--repack", "0", "-p", "0", "-n", "300", "-r", "1", "--no-warmup", "-t", "1", "--text"])
            .arg(paths::root().join("models/texts/fiction.txt"))
            .args(["-mhk", &k.to_string(), "-mhi", &interval.to_string(), "-mhp", &kind.to_string()])
            .env("LLAMA_ARG_MOE_HOT_TRACE", &path)
            .output()
            .unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));

        let routing = assert_replays(&path, kind, k, interval);
        assert_eq!(routing.n_tokens(), 300);
    }
}
