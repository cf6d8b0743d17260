//! Looks at one build of llama.cpp from a process of its own: `MOE_HOT_BUILD_DIR` says which, and two
//! builds do not fit into one process. Works with a libllama that has no expert cache.
//!
//! ```text
//! llama-probe graph MODEL N...   the nodes and splits of the graphs of ubatches of N tokens
//! llama-probe logits MODEL       a checksum of every position's logits, and a greedy continuation
//! llama-probe retry MODEL N      checksums of N tokens, each decoded again as long as decoding it fails; on stderr
//!                                what failed, what was warned of, and how many tokens took the slots
//! llama-probe chaos MODEL N SEED K
//!                                checksums of N ubatches of decode and prompts of several sequences, while the pool gets
//!                                up to K slots a layer, other intervals and policies; on stderr how the slots end
//! llama-probe contexts MODEL K [gpu]
//!                                contexts that share the slots, come, go and are aborted while experts are swapped:
//!                                how far the output is from that without slots, as KL divergence
//! ```

use std::{
    path::Path,
    process::ExitCode,
    sync::atomic::{AtomicBool, Ordering},
};

use llama_tests::{
    Context, ContextOptions, Exclusive, Input, Llama, LoadOptions, Logits, Model, schedule::Schedule,
};

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let result = match args[..] {
        ["graph", model, ref sizes @ ..] => graph(Path::new(model), sizes),
        ["logits", model] => logits(Path::new(model)),
        ["retry", model, n] => {
            n.parse().map_err(|_| format!("'{n}' is no number")).and_then(|n| retry(Path::new(model), n))
        }
        ["chaos", model, n, seed, k] => match (n.parse(), seed.parse(), k.parse()) {
            (Ok(n), Ok(seed), Ok(k)) => chaos(Path::new(model), n, seed, k),
            _ => Err(format!("'{n}', '{seed}' or '{k}' is no number")),
        },
        ["contexts", model, k, ref gpu @ ..] if gpu.is_empty() || *gpu == ["gpu"] => {
            contexts(Path::new(model), k, !gpu.is_empty())
        }
        _ => {
            Err("usage: llama-probe graph MODEL N... | logits MODEL | retry MODEL N | chaos MODEL N SEED K | contexts MODEL K [gpu]"
                .into())
        }
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

/// Most tries of one token.
const TRIES: usize = 5;

fn retry(path: &Path, n: i32) -> Result<String, String> {
    let llama = Llama::get().exclusive();
    let model = llama.load(path, LoadOptions::default())?;
    let mut ctx = model.context(ContextOptions::default())?;
    let n_vocab = model.n_vocab() as i32;
    let mut out = String::new();
    for pos in 0..n {
        let input = [Input { token: (pos * 37 + 11) % n_vocab, pos, seq: 0, output: true }];
        let mut tries =
            (0..TRIES).map(|_| ctx.decode(&input).inspect_err(|e| eprintln!("failed at {pos}: {e}")));
        let logits = tries.find_map(Result::ok).ok_or(format!("position {pos} fails again and again"))?;
        out += &format!("{pos}: {:016x}\n", checksum(logits.row(0)));
    }
    let slots = ctx.stats().map_or(0, |s| s.n_tokens);
    eprintln!("{slots} tokens took the slots");
    drop(ctx);
    drop(model);
    for line in llama.take_log().iter().filter(|l| l.text.starts_with("moe-hot: ")) {
        eprintln!("{}", line.text);
    }
    Ok(out)
}

/// Ubatches between two changes of the pool.
const CHANGE_EVERY: u64 = 40;

fn chaos(path: &Path, n: u64, seed: u64, most: u64) -> Result<String, String> {
    let llama = Llama::get().exclusive();
    let model = llama.load(path, LoadOptions::default())?;
    let mut random = seed;
    let mut below = |n: u64| {
        random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (random >> 33) % n
    };
    let hot = llama.option("moe-hot-k")? != "0";
    let (mut out, mut done, mut changes) = (String::new(), 0, 0);
    while done < n {
        let seed = below(1 << 30);
        // prompts and decode in one sequence, or decode of some in one ubatch
        let schedule = match below(2) {
            0 => Schedule::mixed(model.n_vocab(), seed, 100),
            _ => Schedule::sequences(model.n_vocab(), seed, 3, 100),
        };
        let mut ctx = model.context(schedule.context)?;
        for batch in &schedule.batches {
            if done % CHANGE_EVERY == 0 {
                let change = match below(4) {
                    0 => format!(r#"{{"interval": {}}}"#, 1 + below(8)),
                    1 => format!(
                        r#"{{"policy": "{}"}}"#,
                        ["decay", "lru", "predict", "s3fifo", "lfru"][below(5) as usize]
                    ),
                    _ => format!(r#"{{"k": {}}}"#, 1 + below(most)),
                };
                if hot {
                    let (status, answer) = llama.http("POST", "/moe-hot", &change);
                    if status != 200 {
                        return Err(format!("{change}: {status} {answer}"));
                    }
                    changes += 1;
                }
            }
            let logits = ctx.decode(batch)?;
            let rows = logits.values.chunks(logits.n_vocab);
            let sum = rows.fold(0, |sum: u64, row| sum.rotate_left(1) ^ checksum(row));
            out += &format!("{done}: {sum:016x}\n");
            done += 1;
        }
    }
    if hot {
        eprintln!("{changes} changes; {}", llama.http("GET", "/moe-hot", "").1);
    }
    drop(model);
    for line in llama.take_log().iter().filter(|l| l.text.starts_with("moe-hot: ")) {
        eprintln!("{}", line.text);
    }
    Ok(out)
}

/// Positions of each context of `contexts`.
const POSITIONS: usize = 96;
/// What one context alone may diverge in the mean: experts with a slot are computed on another device than those
/// without, and routing is sensitive. Wrong weights give more than 1.
const KL: f64 = 0.05;
/// What the others may diverge, against the one alone: which experts have a slot when depends on the run.
const KL_AGAINST: f64 = 2.0;

struct Run {
    logits: Vec<Logits>,
    /// Tokens that took the slots.
    hot: u64,
}

/// Decodes tokens of `text`, one by one.
fn decode_all(
    ctx: &mut Context<'_>,
    text: &[i32],
    pos: std::ops::Range<usize>,
) -> Result<Vec<Logits>, String> {
    pos.map(|pos| ctx.decode(&[input_at(text, pos)])).collect()
}

fn input_at(text: &[i32], pos: usize) -> Input {
    Input { token: text[pos], pos: pos as i32, seq: 0, output: true }
}

/// Mean and largest KL divergence.
fn divergence(expected: &[Logits], got: &[Logits]) -> (f64, f64) {
    let kl = |(e, g): (&Logits, &Logits)| {
        let log_sum = |row: &[f32]| {
            let most = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            f64::from(most) + row.iter().map(|v| f64::from(v - most).exp()).sum::<f64>().ln()
        };
        let (e, g) = (e.row(0), g.row(0));
        let (le, lg) = (log_sum(e), log_sum(g));
        let term = |(e, g): (&f32, &f32)| {
            let (e, g) = (f64::from(*e) - le, f64::from(*g) - lg);
            e.exp() * (e - g)
        };
        e.iter().zip(g).map(term).sum::<f64>()
    };
    let all: Vec<f64> = expected.iter().zip(got).map(kl).collect();
    (all.iter().sum::<f64>() / all.len() as f64, all.iter().copied().fold(0.0, f64::max))
}

fn contexts(path: &Path, k: &str, gpu: bool) -> Result<String, String> {
    static ABORT: AtomicBool = AtomicBool::new(false);
    let llama: Exclusive = Llama::get().exclusive();
    let model = llama.load(path, LoadOptions { gpu, ..LoadOptions::default() })?;
    let tokens = model.tokens(include_str!("../llama.rs"));
    let texts = [&tokens[..POSITIONS], &tokens[POSITIONS..2 * POSITIONS]];
    let new = || model.context(ContextOptions { n_ctx: 256, ..ContextOptions::default() });
    let mut expected = Vec::new();
    for text in texts {
        expected.push(decode_all(&mut new()?, text, 0..POSITIONS)?);
    }
    llama.set("moe-hot-k", Some(k))?;
    llama.set("moe-hot-rebalance-interval", Some("1"))?;
    if new()?.status().is_none() {
        return Err("there are no slots".into());
    }

    let mut out = String::new();
    let mut alone = [None; 2];
    let mut check = |what: &str, text: usize, run: Run| {
        let (mean, most) = divergence(&expected[text], &run.logits);
        out += &format!("{what}: KL {mean:.6}, at most {most:.6}, {} tokens took the slots\n", run.hot);
        let bar = alone[text].map_or(KL, |alone| KL_AGAINST * alone + 1e-6);
        alone[text].get_or_insert(mean);
        // a divergence that is no number is none that passes
        let good = mean <= bar && run.hot >= POSITIONS as u64 / 2;
        if good { Ok(()) } else { Err(format!("{out}{what}: the mean is to be {bar:.6} at most")) }
    };
    let hot = |ctx: &Context<'_>| ctx.stats().map_or(0, |s| s.n_tokens);

    for (text, name) in ["one context, the first text", "one context, the second"].into_iter().enumerate() {
        let mut ctx = new()?;
        let run = Run { logits: decode_all(&mut ctx, texts[text], 0..POSITIONS)?, hot: hot(&ctx) };
        check(name, text, run)?;
    }

    let (mut a, mut b) = (new()?, new()?);
    let mut logits = [Vec::new(), Vec::new()];
    for pos in 0..POSITIONS {
        logits[0].extend(decode_all(&mut a, texts[0], pos..pos + 1)?);
        logits[1].extend(decode_all(&mut b, texts[1], pos..pos + 1)?);
    }
    let [x, y] = logits;
    check("two contexts in turn, the first", 0, Run { logits: x, hot: hot(&a) })?;
    check("two contexts in turn, the second", 1, Run { logits: y, hot: hot(&b) })?;
    drop((a, b));

    let at_once = std::thread::scope(|s| {
        let threads = texts.map(|text| {
            let mut ctx = new();
            s.spawn(move || {
                let ctx = ctx.as_mut().map_err(|e| e.clone())?;
                Ok::<_, String>(Run { logits: decode_all(ctx, text, 0..POSITIONS)?, hot: hot(ctx) })
            })
        });
        threads.map(|t| t.join().map_err(|_| "a thread panicked".to_string())?)
    });
    let [x, y] = at_once;
    check("two threads at once, the first", 0, x?)?;
    check("two threads at once, the second", 1, y?)?;

    for n in 0..24 {
        decode_all(&mut new()?, &tokens[n * 3..], 0..3)?;
    }
    let mut ctx = new()?;
    let run = Run { logits: decode_all(&mut ctx, texts[0], 0..POSITIONS)?, hot: hot(&ctx) };
    check("after 24 contexts that ended within a swap", 0, run)?;

    let mut ctx = new()?;
    ctx.set_abort(Some(&ABORT));
    let (mut logits, mut aborted) = (Vec::new(), 0);
    for pos in 0..POSITIONS {
        let input = [input_at(texts[1], pos)];
        let abort = pos % 8 == 5;
        ABORT.store(abort, Ordering::Relaxed);
        let mut result = ctx.decode(&input);
        ABORT.store(false, Ordering::Relaxed);
        if abort && result.is_err() {
            aborted += 1;
            result = ctx.decode(&input);
        }
        logits.push(result?);
    }
    if aborted == 0 {
        return Err("no step could be aborted".into());
    }
    let run = Run { logits, hot: hot(&ctx) };
    check(&format!("after {aborted} steps that were aborted"), 1, run)?;
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
