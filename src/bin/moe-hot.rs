//! The `moe-hot` command: works on routing traces (`--moe-hot-trace` of the patched tools).

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{Parser, Subcommand};
use moe_hot::{
    heatmap,
    policy::PolicyKind,
    replay::{self, Outcome, Routing, Scope},
    trace::TraceReader,
};

/// Expert caching for llama.cpp: what recorded routing says about policies and budgets.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run policies over recorded routing, with the optimum beside them.
    Replay {
        /// Routing traces.
        #[arg(required = true)]
        traces: Vec<PathBuf>,
        /// Slots per layer.
        #[arg(long, value_delimiter = ',', default_value = "8,16,32", value_parser = clap::value_parser!(u32).range(1..))]
        k: Vec<u32>,
        /// Tokens between two plans.
        #[arg(long, value_delimiter = ',', default_value = "1,16,40", value_parser = clap::value_parser!(u32).range(1..))]
        interval: Vec<u32>,
        /// Policies.
        #[arg(long, value_delimiter = ',', default_value = "decay,lru,lfu,static", value_parser = policy)]
        policy: Vec<PolicyKind>,
        /// Comma-separated values instead of a table.
        #[arg(long)]
        csv: bool,
    },
    /// Draw which experts were used, as a PNG.
    Heatmap {
        /// A routing trace.
        trace: PathBuf,
        /// The picture.
        #[arg(short, long)]
        output: PathBuf,
        /// Its title.
        #[arg(long, default_value = "experts used")]
        title: String,
    },
}

fn policy(name: &str) -> Result<PolicyKind, String> {
    name.parse().map_err(|()| format!("expected one of {}", PolicyKind::names()))
}

const HEAD: [&str; 9] =
    ["trace", "policy", "k", "interval", "hit rate", "cold/token", "reads/optimum", "uploads", "hits/upload"];

fn row(trace: &str, name: &str, k: u32, interval: &str, o: &Outcome, best: &Outcome) -> [String; 9] {
    [
        trace.into(),
        name.into(),
        k.to_string(),
        interval.into(),
        format!("{:.4}", o.hit_rate()),
        format!("{:.2}", o.cold_per_token()),
        format!("{:.3}", o.misses as f64 / best.misses.max(1) as f64),
        o.uploads.to_string(),
        format!("{:.1}", o.hits_per_upload()),
    ]
}

fn read(path: &Path) -> Result<Routing, String> {
    TraceReader::open(path).and_then(Routing::read).map_err(|e| e.to_string())
}

fn replay_all(
    traces: &[PathBuf],
    ks: &[u32],
    intervals: &[u32],
    policies: &[PolicyKind],
    csv: bool,
) -> Result<(), String> {
    let mut rows = vec![HEAD.map(String::from)];
    for path in traces {
        let routing = read(path)?;
        let trace = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy();
        let n_expert = routing.header.layers.iter().map(|l| u32::from(l.n_expert)).max().unwrap_or(0);
        for &k in ks {
            if k > n_expert {
                return Err(format!("--k: {k} is not allowed, {trace} has {n_expert} experts a layer"));
            }
            let best = replay::optimum(&routing, k, Scope::Pool);
            rows.push(row(&trace, "optimum", k, "-", &best, &best));
            let by_layer = replay::optimum(&routing, k, Scope::Layer);
            rows.push(row(&trace, "optimum/layer", k, "-", &by_layer, &best));
            for &interval in intervals {
                for &kind in policies {
                    let o = replay::replay(&routing, kind, k, interval, |_, _, _| {});
                    rows.push(row(&trace, &kind.to_string(), k, &interval.to_string(), &o, &best));
                }
            }
        }
    }
    if csv {
        rows.iter().for_each(|r| println!("{}", r.join(",")));
        return Ok(());
    }
    let width = |c: usize| rows.iter().map(|r| r[c].len()).max().unwrap_or(0);
    for r in &rows {
        let cell = |c: usize| {
            if c < 2 { format!("{:<w$}", r[c], w = width(c)) } else { format!("{:>w$}", r[c], w = width(c)) }
        };
        println!("{}", (0..HEAD.len()).map(cell).collect::<Vec<_>>().join("  "));
    }
    Ok(())
}

fn run(command: Command) -> Result<(), String> {
    match command {
        Command::Replay { traces, k, interval, policy, csv } => {
            replay_all(&traces, &k, &interval, &policy, csv)
        }
        Command::Heatmap { trace, output, title } => {
            let r = read(&trace)?;
            heatmap::draw(&output, &title, &r.header.layers, &r.counts(), r.n_tokens())
        }
    }
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("moe-hot: error: {e}");
            ExitCode::FAILURE
        }
    }
}
