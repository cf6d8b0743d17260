//! What fails in the library fails a step at most, with a message, and the output stays stock's.
//!
//! Faults are armed in the environment of a process of its own; slots are in host memory. Those of a GPU are the
//! business of scripts/gpu-check.

use std::process::Command;

use llama_tests::paths;

const TOKENS: u32 = 120;

/// What llama-probe says about decoding token by token with these slots and faults: checksums, and messages.
fn probe(k: u32, tokens: u32, faults: &str) -> (String, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_llama-probe"));
    command.arg("retry").arg(paths::shipped_model()).arg(tokens.to_string());
    command.env("LLAMA_ARG_MOE_HOT_K", k.to_string()).env("LLAMA_ARG_MOE_HOT_REBALANCE_INTERVAL", "1");
    command.env("LLAMA_ARG_MOE_HOT_THREADS", "2").env("MOE_HOT_FAULT", faults);
    let out = command.output().expect("llama-probe can be started");
    let messages = String::from_utf8_lossy(&out.stderr).into_owned();
    assert!(out.status.success(), "K = {k}, {faults}: {}\n{messages}", out.status);
    (String::from_utf8_lossy(&out.stdout).into_owned(), messages)
}

/// Runs with faults; gives the messages. The logits equal stock's.
fn survives(tokens: u32, faults: &str) -> String {
    let (expected, _) = probe(0, tokens, "");
    let (got, messages) = probe(16, tokens, faults);
    assert!(messages.contains("moe-hot: faults are injected (MOE_HOT_FAULT): "), "{messages}");
    assert_eq!(got.lines().count(), tokens as usize);
    let differs = expected.lines().zip(got.lines()).find(|(e, g)| e != g);
    assert_eq!(differs, None, "{faults}:\n{messages}");
    messages
}

fn tokens_on_slots(messages: &str) -> u32 {
    let line = messages.lines().find_map(|l| l.strip_suffix(" tokens took the slots"));
    line.expect("llama-probe says it").parse().expect("a number")
}

#[test]
fn copies_that_fail_cost_no_step() {
    let messages = survives(TOKENS, "copy=3");
    assert!(
        messages.contains("moe-hot: copying an expert into a slot failed (1 so far): a fault was injected"),
        "{messages}"
    );
    assert!(!messages.contains("failed at "), "{messages}");
    assert_eq!(tokens_on_slots(&messages), TOKENS);
}

#[test]
fn a_worker_that_panics_fails_its_step_only() {
    let messages = survives(TOKENS, "row=200");
    assert!(
        messages.contains("failed at ") && messages.contains("llama_decode of 1 tokens returned"),
        "{messages}"
    );
    assert!(messages.contains("moe-hot: a worker failed while it computed a cold expert"), "{messages}");
    assert!(!messages.contains("takes the stock graph"), "{messages}");
    assert!(tokens_on_slots(&messages) >= TOKENS, "{messages}");
}

#[test]
fn a_worker_that_stalls_fails_a_step_and_the_stock_graph_goes_on() {
    // no machine is so slow that a sound worker is late by as much: the one failure is the stall's
    // on a busy machine workers get few units of so small a model
    const TOKENS: u32 = 1000;
    let messages = survives(TOKENS, "stall=20,stall_ms=600000,bound=5000");
    assert_eq!(messages.matches("failed at ").count(), 1, "{messages}");
    for said in [
        "moe-hot: the cold experts of a layer were not ready after 5s",
        "moe-hot: this context takes the stock graph until they arrive",
        "does not end, it is left behind",
    ] {
        assert!(messages.contains(said), "no '{said}' in\n{messages}");
    }
    let n = tokens_on_slots(&messages);
    assert!(0 < n && n < TOKENS, "{messages}");
}

#[test]
fn the_slots_are_used_again_when_a_late_worker_arrives() {
    let messages = survives(1000, "stall=20,stall_ms=1000,bound=300");
    for said in [
        "moe-hot: this context takes the stock graph until they arrive",
        "moe-hot: the cold experts that were late have arrived, the slots are in use again",
    ] {
        assert!(messages.contains(said), "no '{said}' in\n{messages}");
    }
    assert!(!messages.contains("left behind"), "{messages}");
}

/// On the host everything is exact; a GPU has divergences that llama-probe allows.
#[test]
fn contexts_come_and_go_while_experts_are_swapped() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_llama-probe"));
    command.arg("contexts").arg(paths::shipped_model()).arg("16").env("LLAMA_ARG_MOE_HOT_THREADS", "1");
    let out = command.output().expect("llama-probe can be started");
    let text = String::from_utf8_lossy(&out.stdout);
    assert!(out.status.success(), "{}\n{text}", String::from_utf8_lossy(&out.stderr));
    assert_eq!(text.lines().count(), 8, "{text}");
    for line in text.lines() {
        assert!(line.contains(": KL 0.000000, at most 0.000000, "), "{text}");
    }
}
