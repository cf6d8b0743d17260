//! Looks at one build of llama.cpp from a process of its own: `MOE_HOT_BUILD_DIR` says which, and two
//! builds do not fit into one process. Works with a libllama that has no expert cache.
//!
//! ```text
//! llama-probe graph MODEL N...   the nodes and splits of the graphs of ubatches of N tokens
//! llama-probe logits MODEL       a checksum of every position's logits, and a greedy continuation
//! ```

use std::{path::Path, process::ExitCode};

use llama_tests::{ContextOptions, Input, Llama, LoadOptions, Logits, Model, schedule::Schedule};

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let result = match args[..] {
        ["graph", model, ref sizes @ ..] => graph(Path::new(model), sizes),
        ["logits", model] => logits(Path::new(model)),
        _ => Err("usage: llama-probe graph MODEL N... | llama-probe logits MODEL".into()),
    };
    match result {
        Ok(text) => {
            print!("{text}");
            ExitCode::SUCCESS
        }
        Err(e) => {
            eprintln!("llama-probe: {e}");
            ExitCode::FAILURE
        }
    }
}

/// The scheduler's own listing, `GGML_SCHED_DEBUG=2` in the environment, with runs of spaces made one.
fn graph(path: &Path, sizes: &[&str]) -> Result<String, String> {
    let llama = Llama::get().exclusive();
    let model = llama.load(path, LoadOptions::default())?;
    let mut ctx = model.context(ContextOptions::default())?;
    let mut out = String::new();
    for size in sizes {
        let n: i32 = size.parse().map_err(|_| format!("'{size}' is no number of tokens"))?;
        ctx.clear();
        llama.take_log();
        // as for a prompt: the last layer computes one token only
        let input = |pos| Input { token: pos + 5, pos, seq: 0, output: pos + 1 == n };
        ctx.decode(&(0..n).map(input).collect::<Vec<_>>())?;
        out += &format!("# ubatch of {n}\n");
        let mut listed = false;
        for line in llama.take_log() {
            let text = line.text.split_whitespace().collect::<Vec<_>>().join(" ");
            if text.starts_with("## SPLIT") || text.starts_with("node #") {
                listed = true;
                out += &text;
                out.push('\n');
            }
        }
        if !listed {
            return Err("the scheduler listed no graph: is GGML_SCHED_DEBUG=2 set?".into());
        }
    }
    Ok(out)
}

fn logits(path: &Path) -> Result<String, String> {
    let llama = Llama::get().exclusive();
    let model = llama.load(path, LoadOptions::default())?;
    let mut out = String::new();
    for schedule in
        [Schedule::mixed(model.n_vocab(), 21, 48), Schedule::sequences(model.n_vocab(), 22, 3, 24)]
    {
        let mut ctx = model.context(schedule.context)?;
        for (b, batch) in schedule.batches.iter().enumerate() {
            let logits = ctx.decode(batch)?;
            for i in 0..batch.len() {
                out += &format!("{}: batch {b} token {i}: {:016x}\n", schedule.name, checksum(logits.row(i)));
            }
        }
    }
    out += &continuation(&model)?;
    Ok(out)
}

fn continuation(model: &Model<'_>) -> Result<String, String> {
    let mut ctx = model.context(ContextOptions::default())?;
    let mut logits: Logits = ctx.decode(&[Input { token: 7, pos: 0, seq: 0, output: true }])?;
    let mut out = String::from("greedy:");
    for pos in 1..64 {
        let token = logits.argmax(0);
        out += &format!(" {token}");
        logits = ctx.decode(&[Input { token, pos, seq: 0, output: true }])?;
    }
    out.push('\n');
    Ok(out)
}

/// FNV-1a over the bits.
fn checksum(row: &[f32]) -> u64 {
    let bytes = row.iter().flat_map(|v| v.to_bits().to_le_bytes());
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, b| (hash ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
}
