//! `moe-hot probe -m MODEL`: measures the constants of the cost model with the patched llama-bench.
//!
//! First the routing of the text is recorded. Then passes over all configurations, every second one
//! backwards, so that a machine that warms up or has other work does so for all alike. The counts are
//! llama-bench's own; the layers with a cold expert, which it does not count, come from replaying the
//! routing. Of each configuration the repetition with the median time is fitted.

use std::{
    fs::{self, File},
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::SystemTime,
};

use moe_hot::{
    cost::{self, CostFile, NAMES, Run},
    policy::PolicyKind,
    replay::{self, Outcome, Routing},
};
use serde::Deserialize;

use crate::{policy, read, table};

const TEXT: &str = include_str!("../../../models/texts/fiction.txt");
/// Fewer runs than this fit the four constants whatever the machine did.
const MIN_RUNS: usize = 6;

#[derive(clap::Args)]
#[group(skip)]
pub struct Args {
    /// Folder of the patched llama-bench.
    #[arg(long, value_name = "DIR", requires = "model")]
    pub bin: Option<PathBuf>,
    /// Measure the constants of replay --cost with this model, a GGUF file, instead of the machine alone.
    #[arg(short, long, value_name = "FILE", requires = "bin")]
    pub model: Option<PathBuf>,
    /// Text to decode, so that the routing is that of text [default: a built-in one].
    #[arg(long, value_name = "FILE", requires = "model")]
    text: Option<PathBuf>,
    /// Where the constants go, for replay --cost.
    #[arg(short, long, value_name = "FILE", requires = "model")]
    output: Option<PathBuf>,
    /// Slots per layer [default: an eighth, a quarter and half of the experts].
    #[arg(long, requires = "model", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..))]
    k: Vec<u32>,
    /// Tokens between two plans.
    #[arg(long, requires = "model", value_delimiter = ',', default_value = "4", value_parser = clap::value_parser!(u32).range(1..))]
    interval: Vec<u32>,
    /// Policies: one that copies much and one that copies little tell an upload from a cold expert.
    #[arg(long, requires = "model", value_delimiter = ',', default_value = "decay,lru,static", value_parser = policy)]
    policy: Vec<PolicyKind>,
    /// Tokens of a run.
    #[arg(short = 'n', long, requires = "model", default_value_t = 256, value_parser = clap::value_parser!(u32).range(16..))]
    tokens: u32,
    /// Passes over all configurations.
    #[arg(short, long, requires = "model", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    repeat: u32,
    /// More arguments of llama-bench, such as -ngl 99 -t 8.
    #[arg(last = true, requires = "model")]
    extra: Vec<String>,
}

/// The fields of llama-bench's result that are used here.
#[derive(Deserialize)]
struct Bench {
    moe_hot_k: u32,
    moe_hot_interval: u32,
    moe_hot_policy: String,
    cold_per_token: Option<f64>,
    uploads: u64,
    n_gen: u64,
    avg_ns: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Config {
    k: u32,
    interval: u32,
    kind: PolicyKind,
}

#[derive(Clone, Copy)]
struct Sample {
    us: f64,
    cold: u64,
    uploads: u64,
}

/// The line of a log that says why a program failed: the last that calls itself an error, else the last.
fn reason(log: &str) -> &str {
    let mut lines = log.lines().rev().map(str::trim).filter(|l| !l.is_empty());
    let last = lines.clone().next().unwrap_or("it said nothing");
    lines.find(|l| l.starts_with("error:") || l.contains(" error: ")).unwrap_or(last)
}

/// llama-bench with what all runs have in common.
struct Bencher<'a> {
    args: &'a Args,
    model: &'a Path,
    program: PathBuf,
    text: PathBuf,
    /// Folder for what only the probe reads.
    scratch: &'a Path,
    commands: Vec<String>,
}

impl Bencher<'_> {
    /// Runs it and gives each result to `each`. Returns what it wrote to its error output.
    fn run(
        &mut self,
        ks: &[u32],
        intervals: &[u32],
        kinds: &[PolicyKind],
        trace: Option<&Path>,
        mut each: impl FnMut(Bench),
    ) -> Result<String, String> {
        let list = |l: Vec<String>| l.join(",");
        let mut args: Vec<String> = vec!["-m".into(), self.model.display().to_string()];
        args.extend(["-p", "0", "-r", "1", "-o", "jsonl", "-n"].map(String::from));
        args.extend([self.args.tokens.to_string(), "--text".into(), self.text.display().to_string()]);
        args.extend(["-mhk".into(), list(ks.iter().map(u32::to_string).collect())]);
        args.extend(["-mhi".into(), list(intervals.iter().map(u32::to_string).collect())]);
        args.extend(["-mhp".into(), list(kinds.iter().map(PolicyKind::to_string).collect())]);
        if trace.is_some() {
            // the replay starts where the recording does
            args.push("--no-warmup".into());
        }
        args.extend(self.args.extra.iter().cloned());
        let shown = format!("{} {}", self.program.display(), args.join(" "));
        self.commands.push(match &self.args.text {
            Some(_) => shown,
            None => shown.replace(&self.text.display().to_string(), "(built-in text)"),
        });

        let log_path = self.scratch.join("log");
        let log = File::create(&log_path).map_err(|e| format!("{}: {e}", log_path.display()))?;
        let mut command = Command::new(&self.program);
        command.args(&args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log);
        // of the caller's own runs
        command.env_remove("LLAMA_ARG_MOE_HOT_TRACE");
        if let Some(path) = trace {
            command.env("LLAMA_ARG_MOE_HOT_TRACE", path);
        }
        let failed = |e: &dyn std::fmt::Display| format!("{}: {e}", self.program.display());
        let mut child = command.spawn().map_err(|e| format!("--bin: {}", failed(&e)))?;
        let out = child.stdout.take().expect("it was piped");
        let mut results = BufReader::new(out).lines().map(|line| line.map_err(|e| e.to_string()));
        let read = results.try_for_each(|line| -> Result<(), String> {
            let line = line?;
            if line.starts_with('{') {
                let bench = serde_json::from_str(&line);
                each(bench.map_err(|e| format!("a result that cannot be read, is it patched? {e}"))?);
            }
            Ok(())
        });
        if let Err(e) = read {
            // it may have ended by itself, and what matters is said already
            let _ = child.kill().and_then(|()| child.wait());
            return Err(failed(&e));
        }
        let status = child.wait().map_err(|e| failed(&e))?;
        let said = fs::read(&log_path).map_err(|e| format!("{}: {e}", log_path.display()))?;
        let said = String::from_utf8_lossy(&said).into_owned();
        if status.success() { Ok(said) } else { Err(failed(&format!("{status}: {}", reason(&said)))) }
    }

    /// The routing of the text.
    fn record(&mut self) -> Result<Routing, String> {
        eprintln!("moe-hot: recording the routing of {} tokens", self.args.tokens);
        let path = self.scratch.join("trace");
        let said = self.run(&[1], &[1], &[PolicyKind::Static], Some(&path), |_| {})?;
        if !path.exists() {
            return Err(format!("{}: no routing was recorded: {}", self.program.display(), reason(&said)));
        }
        read(&path)
    }
}

/// The slots of the runs, for layers with `n_expert` experts.
fn slots(args: &Args, n_expert: u32) -> Result<Vec<u32>, String> {
    if let Some(k) = args.k.iter().find(|k| **k > n_expert) {
        return Err(format!("--k: {k} is not allowed, the model has {n_expert} experts a layer"));
    }
    let mut ks = args.k.clone();
    if ks.is_empty() {
        ks = [8, 4, 2].map(|part| (n_expert / part).max(1)).to_vec();
    }
    ks.sort_unstable();
    ks.dedup();
    Ok(ks)
}

/// With llama-bench of the folder `bin`.
pub fn run(args: &Args, bin: &Path, model: &Path) -> Result<(), String> {
    let scratch = tempfile::tempdir().map_err(|e| format!("temporary folder: {e}"))?;
    let text = match &args.text {
        Some(text) => text.clone(),
        None => {
            let path = scratch.path().join("text");
            fs::write(&path, TEXT).map_err(|e| format!("{}: {e}", path.display()))?;
            path
        }
    };
    let program = bin.join("llama-bench");
    let mut bencher = Bencher { args, model, program, text, scratch: scratch.path(), commands: Vec::new() };
    let routing = bencher.record()?;
    let n_expert = routing.header.layers.iter().map(|l| u32::from(l.n_expert)).max().unwrap_or(0);
    let (mut ks, mut intervals, mut kinds) =
        (slots(args, n_expert)?, args.interval.clone(), args.policy.clone());
    let mut configs = Vec::new();
    for &k in &ks {
        for &interval in &intervals {
            configs.extend(kinds.iter().map(|&kind| Config { k, interval, kind }));
        }
    }
    if configs.len() < MIN_RUNS {
        return Err(format!(
            "--k, --interval, --policy: {} combinations are not enough for {} constants, expected at least {MIN_RUNS}",
            configs.len(),
            NAMES.len()
        ));
    }

    let mut samples: Vec<Vec<Sample>> = vec![Vec::new(); configs.len()];
    let mut foreign = None;
    for pass in 0..args.repeat {
        let mut done = 0;
        let said = bencher.run(&ks, &intervals, &kinds, None, |b| {
            done += 1;
            eprintln!(
                "moe-hot: pass {} of {}, run {done} of {}: {}, k {}, interval {}: {:.2} tok/s",
                pass + 1,
                args.repeat,
                configs.len(),
                b.moe_hot_policy,
                b.moe_hot_k,
                b.moe_hot_interval,
                b.n_gen as f64 * 1e9 / b.avg_ns as f64
            );
            let config = b.moe_hot_policy.parse().ok().map(|kind| Config {
                k: b.moe_hot_k,
                interval: b.moe_hot_interval,
                kind,
            });
            match (config.and_then(|c| configs.iter().position(|d| c == *d)), b.cold_per_token) {
                (Some(i), Some(cold)) if b.n_gen == u64::from(args.tokens) => samples[i].push(Sample {
                    us: b.avg_ns as f64 / 1e3,
                    cold: (cold * b.n_gen as f64).round() as u64,
                    uploads: b.uploads,
                }),
                (Some(_), None) => foreign = Some("nothing was counted"),
                _ => foreign = Some("a result of a run that was not asked for, see the arguments after --"),
            }
        })?;
        if let Some(why) = foreign {
            return Err(format!("{}: {why}: {}", bencher.program.display(), reason(&said)));
        }
        if samples.iter().any(|s| s.len() != pass as usize + 1) {
            let program = bencher.program.display();
            return Err(format!("{program}: not one result for each run: {}", reason(&said)));
        }
        // back to front the next time
        ks.reverse();
        intervals.reverse();
        kinds.reverse();
    }

    let tokens = u64::from(args.tokens);
    let mut runs = Vec::new();
    let mut replayed = Vec::new();
    for (c, samples) in configs.iter().zip(&mut samples) {
        samples.sort_by(|a, b| a.us.total_cmp(&b.us));
        let Sample { us, cold, uploads } = samples[samples.len() / 2];
        let o = replay::replay(&routing, c.kind, c.k, c.interval, |_, _, _| {});
        let cold_layers = o.cold_layers;
        runs.push((Outcome { steps: tokens, tokens, cold, cold_layers, uploads, ..Outcome::default() }, us));
        replayed.push(o);
    }
    let cost = cost::fit(&runs).map_err(|e| format!("the runs do not fit the cost model: {e}"))?;

    let head = ["policy", "k", "interval", "cold/token", "replayed", "layers/token", "uploads", "replayed"];
    let head = head.into_iter().chain(["tok/s", "least", "most", "fitted", "error"]);
    let mut rows = vec![head.map(String::from).collect::<Vec<_>>()];
    let mut largest: f64 = 0.0;
    let mut saved = Vec::new();
    for (((c, samples), (o, us)), replayed) in configs.iter().zip(&samples).zip(&runs).zip(&replayed) {
        let speed = |us: f64| tokens as f64 * 1e6 / us;
        let fitted = cost.tokens_per_s(o);
        let error = fitted / speed(*us) - 1.0;
        largest = largest.max(error.abs());
        let per_token = |n: u64| format!("{:.2}", n as f64 / tokens as f64);
        rows.push(vec![
            c.kind.to_string(),
            c.k.to_string(),
            c.interval.to_string(),
            per_token(o.cold),
            per_token(replayed.cold),
            per_token(o.cold_layers),
            o.uploads.to_string(),
            replayed.uploads.to_string(),
            format!("{:.2}", speed(*us)),
            format!("{:.2}", speed(samples[samples.len() - 1].us)),
            format!("{:.2}", speed(samples[0].us)),
            format!("{fitted:.2}"),
            format!("{:+.1}%", 100.0 * error),
        ]);
        saved.push(Run {
            k: c.k,
            interval: c.interval,
            policy: c.kind.to_string(),
            tokens_per_s: samples.iter().map(|s| speed(s.us)).collect(),
            fitted_tokens_per_s: fitted,
        });
    }
    table::print(&rows, 1, false)?;
    println!("largest error {:.1}%", 100.0 * largest);
    for (name, us) in NAMES.iter().zip(cost.constants()) {
        let note = if us == 0.0 { "  (no cost of its own shows in these runs)" } else { "" };
        println!("{name:<9} {us:>12.3}{note}");
    }
    if let Some(path) = &args.output {
        let file = CostFile {
            fingerprint: routing.header.fingerprint,
            date: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
            commands: bencher.commands,
            cost,
            runs: saved,
        };
        file.write(path).map_err(|e| format!("-o: {e}"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reason_is_the_last_error_or_the_last_line() {
        assert_eq!(
            reason("note: a\nerror: --text: 'x' cannot be read\n\nbye\n"),
            "error: --text: 'x' cannot be read"
        );
        assert_eq!(reason("llama_bench: error: no model\n"), "llama_bench: error: no model");
        assert_eq!(reason("loading\nkilled\n \n"), "killed");
        assert_eq!(reason(""), "it said nothing");
    }
}
