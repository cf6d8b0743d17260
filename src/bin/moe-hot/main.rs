//! The `moe-hot` command: what recorded routing (`--moe-hot-trace` of the patched tools) and this machine
//! say about policies and budgets. One file a command.

mod constants;
mod doctor;
mod parallel;
mod probe;
mod replay;
mod table;

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{Parser, Subcommand};
use moe_hot::{heatmap, policy::PolicyKind, replay::Routing, trace::TraceReader};

/// Expert caching for llama.cpp: what recorded routing says about policies and budgets.
#[derive(Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run policies over recorded routing, with the optimum and the best fixed set beside them.
    Replay(replay::Args),
    /// Measure this machine's memory, link and GPU; with -m what cold experts and uploads cost, for replay --cost.
    Probe(Box<probe::Args>),
    /// Say what this machine can gain: GPU, link, memory; with a model its slots, a command line and tokens a second.
    Doctor(doctor::Args),
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

fn read(path: &Path) -> Result<Routing, String> {
    TraceReader::open(path).and_then(Routing::read).map_err(|e| e.to_string())
}

fn run(command: Command) -> Result<(), String> {
    match command {
        Command::Replay(args) => replay::run(&args),
        Command::Probe(args) => probe::run(&args),
        Command::Doctor(args) => doctor::run(&args),
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
