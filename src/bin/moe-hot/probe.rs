//! `moe-hot probe`: what this machine's memory, link and GPU can do, which bounds decode (DESIGN 6). With a model it
//! measures the constants of the cost model instead.

use std::time::Duration;

use moe_hot::{
    device::{cuda::measure as gpu, host},
    measure,
};
use serde::Serialize;

use crate::{constants, table};

/// Bytes that are read: more than caches hold, by the CPU, of what is free at most a part.
const CPU_BYTES: usize = 256 << 20;
const MOST_BYTES: usize = 4 << 30;
pub const LEAST_BYTES: usize = 256 << 20;
const PART_OF_FREE: usize = 4;
/// Time of one measurement, and how often each is made; the best counts, because noise only slows down.
const TIME: Duration = Duration::from_millis(200);
const ROUNDS: usize = 3;

#[derive(clap::Args)]
pub struct Args {
    /// Write JSON instead of a table.
    #[arg(long, conflicts_with = "model")]
    json: bool,
    #[command(flatten)]
    constants: constants::Args,
}

/// Rates in GB/s, 10^9 bytes a second.
#[derive(Serialize)]
pub struct Machine {
    pub cpus: usize,
    /// That threads read.
    buffer_mib: usize,
    pub cpu_read: Vec<Threads>,
    pub gpu: Option<Gpu>,
    /// Why there are no figures of a GPU.
    pub no_gpu: Option<String>,
}

#[derive(Serialize)]
pub struct Threads {
    threads: usize,
    pub gb_s: f64,
}

#[derive(Serialize)]
pub struct Gpu {
    name: String,
    pub copies: Vec<Copy>,
    reads_in_place: Vec<Blocks>,
    pub both_at_once: Both,
    pub flag_round_trip_us: f64,
    pub vram_read_gb_s: f64,
}

#[derive(Serialize)]
pub struct Copy {
    pub memory: &'static str,
    pub gb_s: f64,
}

#[derive(Serialize)]
pub struct Blocks {
    blocks: u32,
    pub gb_s: f64,
}

#[derive(Serialize)]
pub struct Both {
    threads: usize,
    pub cpu_gb_s: f64,
    pub gpu_gb_s: f64,
}

impl From<gpu::Figures> for Gpu {
    fn from(f: gpu::Figures) -> Self {
        let gpu::AtOnce { n_threads, cpu, gpu } = f.at_once;
        Gpu {
            name: f.name,
            copies: f.copies.into_iter().map(|(memory, gb_s)| Copy { memory, gb_s }).collect(),
            reads_in_place: f.in_place.into_iter().map(|(blocks, gb_s)| Blocks { blocks, gb_s }).collect(),
            both_at_once: Both { threads: n_threads, cpu_gb_s: cpu, gpu_gb_s: gpu },
            flag_round_trip_us: f.round_trip_us,
            vram_read_gb_s: f.video,
        }
    }
}

/// Numbers of threads that are tried: powers of two, and near all.
fn counts(cpus: usize) -> Vec<usize> {
    let mut counts: Vec<usize> = (0..).map(|i| 1 << i).take_while(|n| *n < cpus).collect();
    counts.extend([cpus * 3 / 4, cpus.saturating_sub(1), cpus]);
    counts.retain(|n| *n > 0);
    counts.sort_unstable();
    counts.dedup();
    counts
}

fn buffer_bytes(cpus: usize, free: Option<usize>) -> usize {
    let wanted = (cpus * CPU_BYTES).clamp(LEAST_BYTES, MOST_BYTES);
    free.map_or(LEAST_BYTES, |free| wanted.min(free / PART_OF_FREE).max(LEAST_BYTES))
}

/// `bytes` bytes, written to by all threads so that they are there, on every node that has one.
fn buffer(bytes: usize, cpus: usize) -> Vec<u8> {
    let mut data = vec![0; bytes];
    let part = bytes.div_ceil(cpus);
    std::thread::scope(|s| {
        data.chunks_mut(part).for_each(|chunk| {
            s.spawn(|| chunk.fill(1));
        });
    });
    data
}

pub fn machine() -> Machine {
    let cpus = std::thread::available_parallelism().map_or(1, |n| n.get());
    let data = buffer(buffer_bytes(cpus, host::memory("MemAvailable").map(|b| b as usize)), cpus);
    let counts = counts(cpus);
    let mut rates = vec![0.0f64; counts.len()];
    for _ in 0..ROUNDS {
        for (rate, &n) in rates.iter_mut().zip(&counts) {
            *rate = rate.max(measure::read_for(&data, n, TIME));
        }
    }
    let cpu_read = counts.into_iter().zip(rates).map(|(threads, gb_s)| Threads { threads, gb_s }).collect();
    // one is left to the thread that launches kernels, as in decode
    let gpu = gpu::measure(&data, (cpus - 1).max(1), TIME);
    let (gpu, no_gpu) = match gpu {
        Ok(figures) => (Some(figures.into()), None),
        Err(e) => (None, Some(e.to_string())),
    };
    Machine { cpus, buffer_mib: data.len() >> 20, cpu_read, gpu, no_gpu }
}

pub fn rows(m: &Machine) -> Vec<Vec<String>> {
    let gb_s = |rate: f64| format!("{rate:.1} GB/s");
    let threads = |n: usize| format!("{n} thread{}", if n == 1 { "" } else { "s" });
    let mut rows = vec![vec!["what".to_string(), "value".to_string()]];
    let mut row = |what: String, value: String| rows.push(vec![what, value]);
    for t in &m.cpu_read {
        row(format!("CPU reads memory, {}", threads(t.threads)), gb_s(t.gb_s));
    }
    let Some(g) = &m.gpu else {
        row("GPU".into(), m.no_gpu.clone().unwrap_or_default());
        return rows;
    };
    row("GPU".into(), g.name.clone());
    for c in &g.copies {
        row(format!("copy to the GPU, {} memory", c.memory), gb_s(c.gb_s));
    }
    for b in &g.reads_in_place {
        row(format!("GPU reads host memory in place, {} blocks", b.blocks), gb_s(b.gb_s));
    }
    let both = &g.both_at_once;
    row(format!("both at once: CPU, {}", threads(both.threads)), gb_s(both.cpu_gb_s));
    row("both at once: GPU, in place".into(), gb_s(both.gpu_gb_s));
    row("both at once: together".into(), gb_s(both.cpu_gb_s + both.gpu_gb_s));
    row("flag from the GPU to the CPU and back".into(), format!("{:.2} us", g.flag_round_trip_us));
    row("GPU reads VRAM".into(), gb_s(g.vram_read_gb_s));
    rows
}

pub fn run(args: &Args) -> Result<(), String> {
    if let (Some(bin), Some(model)) = (&args.constants.bin, &args.constants.model) {
        return constants::run(&args.constants, bin, model);
    }
    let machine = machine();
    if args.json {
        println!("{}", serde_json::to_string_pretty(&machine).map_err(|e| e.to_string())?);
        return Ok(());
    }
    table::print(&rows(&machine), 1, false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_threads_go_up_to_all() {
        assert_eq!(counts(1), [1]);
        assert_eq!(counts(2), [1, 2]);
        assert_eq!(counts(16), [1, 2, 4, 8, 12, 15, 16]);
        assert_eq!(counts(6), [1, 2, 4, 5, 6]);
    }

    #[test]
    fn the_buffer_takes_a_part_of_what_is_free() {
        assert_eq!(buffer_bytes(16, None), LEAST_BYTES);
        assert_eq!(buffer_bytes(16, Some(1 << 30)), LEAST_BYTES);
        assert_eq!(buffer_bytes(16, Some(8 << 30)), 2 << 30);
        assert_eq!(buffer_bytes(2, Some(512 << 30)), 512 << 20);
        assert_eq!(buffer_bytes(96, Some(512 << 30)), MOST_BYTES);
    }
}
