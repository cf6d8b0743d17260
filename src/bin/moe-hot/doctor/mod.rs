//! `moe-hot doctor`: what this machine can gain, with a model. What is measured, what is estimated and what is taken
//! from reports is said beside each number.

mod model;
mod outlook;

use std::path::{Path, PathBuf};

use moe_hot::{
    cold::{
        placement::Placement,
        rows::{Numerics, RowKernel},
    },
    device::{
        cuda::{self, look, measure},
        host,
    },
    ggml, gguf,
    gguf::Gguf,
};
use serde::Serialize;

use crate::{
    probe::{self, Machine},
    table,
};
use model::{Class, Model, Stock};
use outlook::{Expected, GpuRates, Rates, Suggestion, Vram};

const MIB: f64 = (1 << 20) as f64;
/// Elements of a row that all types have blocks for.
const ROW: u64 = 256;

const NOT_TOLD: &str =
    "LoRA adapters, repacked weights, eval callbacks, precision of activations: llama.cpp says at the start";
const NO_GPU_MEANS: &str = "slots can be in host memory only, which brings nothing";

#[derive(clap::Args)]
pub struct Args {
    /// A GGUF file: what can be gained with this model; of a split one the first part.
    model: Option<PathBuf>,
    /// Context in tokens [default: the model's].
    #[arg(short, long, value_name = "N", requires = "model", value_parser = clap::value_parser!(u64).range(1..=1 << 32))]
    ctx_size: Option<u64>,
    /// Write JSON instead of a table.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Report {
    version: &'static str,
    /// Whether this program, and the library with it, contains CUDA kernels.
    cuda_kernels: bool,
    cuda_driver: Option<String>,
    gpus: Vec<Gpu>,
    /// Why there is none that can be used.
    no_gpu: Option<String>,
    ram_total_mib: Option<u64>,
    ram_available_mib: Option<u64>,
    cpus: usize,
    /// Of them on different cores, where the system tells.
    cores: Option<usize>,
    /// RLIMIT_MEMLOCK in KiB; none: unlimited.
    locked_memory_kib: Option<u64>,
    row_kernels: Vec<&'static str>,
    measured: Machine,
    model: Option<ModelReport>,
}

#[derive(Serialize)]
struct Gpu {
    name: String,
    pci: String,
    compute_capability: String,
    vram_mib: u64,
    vram_free_mib: u64,
    /// Whether a mapped file of 1 MiB could be registered.
    registers: bool,
    registers_not: Option<String>,
}

#[derive(Serialize)]
struct ModelReport {
    file: String,
    architecture: String,
    name: Option<String>,
    layers: u64,
    moe_layers: usize,
    experts_mib: f64,
    other_weights_mib: f64,
    classes: Vec<Class>,
    stock: Vec<Stock>,
    not_told: &'static str,
    /// Whether the RAM that is available cannot hold what stays there.
    short_of_ram: bool,
    vram: Option<Vram>,
    suggestion: Suggestion,
    expected: Vec<Expected>,
    basis: Vec<String>,
}

fn row_kernels() -> Vec<&'static str> {
    let kernel = |&(ty, _): &(i32, &str)| {
        let (block, bytes) = gguf::block(ty)?;
        RowKernel::find(ty, ROW as usize, (ROW / block * bytes) as usize, Numerics::Cuda).map(|k| k.name)
    };
    ggml::TYPE_NAMES.iter().filter_map(kernel).collect()
}

/// The limit of locked memory in KiB; `None`: there is none.
fn locked_memory() -> Result<Option<u64>, String> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: writes the limit.
    if unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, &raw mut limit) } != 0 {
        return Err(format!("RLIMIT_MEMLOCK: {}", std::io::Error::last_os_error()));
    }
    Ok((limit.rlim_cur != libc::RLIM_INFINITY).then_some(limit.rlim_cur >> 10))
}

fn gpu(card: look::Card) -> Gpu {
    Gpu {
        name: card.name,
        pci: card.pci,
        compute_capability: format!("{}.{}", card.capability.0, card.capability.1),
        vram_mib: card.total as u64 >> 20,
        vram_free_mib: card.free as u64 >> 20,
        registers: card.registers.is_ok(),
        registers_not: card.registers.err(),
    }
}

fn rates(m: &Machine) -> Rates {
    let cpu = m.cpu_read.iter().map(|t| t.gb_s).fold(0.0, f64::max);
    let gpu = m.gpu.as_ref().map(|g| GpuRates {
        both: cpu.max(g.both_at_once.cpu_gb_s + g.both_at_once.gpu_gb_s),
        copy: g
            .copies
            .iter()
            .filter(|c| c.memory == measure::REGISTERED_FILE)
            .map(|c| c.gb_s)
            .fold(0.0, f64::max),
        vram: g.vram_read_gb_s,
        round_trip_us: g.flag_round_trip_us,
    });
    Rates { cpu, gpu }
}

fn of_model(
    path: &Path,
    gguf: &Gguf,
    args: &Args,
    free: Option<u64>,
    n_gpus: usize,
    rates: Rates,
) -> Result<ModelReport, String> {
    let file = path.display().to_string();
    let model = Model::new(gguf).map_err(|e| format!("{file}: {e}"))?;
    let has_gpu = free.is_some();
    let classes = model.classes(has_gpu);
    let vram = match free {
        Some(free) => {
            let context = args.ctx_size.or(model.context).ok_or_else(|| {
                format!("{file}: there is no key {}.context_length: give --ctx-size", model.arch)
            })?;
            Some(Vram::new(&model, &classes, free, context))
        }
        None => None,
    };
    let suggestion = outlook::suggest(&file, &model, &classes, vram.as_ref(), args.ctx_size, n_gpus);
    let (mut expected, mut basis) = if has_gpu && rates.gpu.is_none() {
        (Vec::new(), vec!["nothing is expected without the figures of the GPU".to_string()])
    } else {
        outlook::expect(&model, &classes, vram.as_ref(), rates)?
    };
    let in_ram = if has_gpu { model.experts } else { model.experts.saturating_add(model.dense) };
    let short = host::memory("MemAvailable").is_some_and(|available| available < in_ram);
    if short && !expected.is_empty() {
        expected.iter_mut().for_each(|e| e.likely_tokens_per_s = None);
        basis.push(
            "the weights do not fit into the RAM that is available: the disk, not measured, decides".into(),
        );
    }
    Ok(ModelReport {
        file,
        layers: model.n_layers,
        moe_layers: model.layers.len(),
        experts_mib: model.experts as f64 / MIB,
        other_weights_mib: model.dense as f64 / MIB,
        stock: model.stock(has_gpu),
        not_told: NOT_TOLD,
        short_of_ram: short,
        classes,
        vram,
        suggestion,
        expected,
        basis,
        architecture: model.arch,
        name: model.name,
    })
}

fn report(args: &Args) -> Result<Report, String> {
    // first: a model that cannot be read needs no measuring
    let gguf = args.model.as_deref().map(|path| Gguf::open(path).map_err(|e| e.to_string())).transpose()?;
    let (cuda_driver, gpus, no_gpu) = match look::look() {
        Err(e) => (None, Vec::new(), Some(e.to_string())),
        Ok(found) => {
            let none = found.cards.is_empty().then(|| "the CUDA driver shows no device".to_string());
            (Some(found.driver), found.cards, none)
        }
    };
    let measured = probe::machine();
    // of the first, which is the one that was measured
    let free = gpus.first().map(|c| c.free as u64);
    let rates = rates(&measured);
    let model = args.model.as_deref().zip(gguf);
    let model = model.map(|(path, gguf)| of_model(path, &gguf, args, free, gpus.len(), rates)).transpose()?;
    let placement = Placement::of_this_process();
    let mib = |what: &str| host::memory(what).map(|bytes| bytes >> 20);
    Ok(Report {
        version: env!("CARGO_PKG_VERSION"),
        cuda_kernels: cuda::kernels_built(),
        cuda_driver,
        gpus: gpus.into_iter().map(gpu).collect(),
        no_gpu,
        ram_total_mib: mib("MemTotal"),
        ram_available_mib: mib("MemAvailable"),
        cpus: placement.as_ref().map_or(measured.cpus, Placement::n_cpus),
        cores: placement.as_ref().map(Placement::n_cores),
        locked_memory_kib: locked_memory()?,
        row_kernels: row_kernels(),
        measured,
        model,
    })
}

struct Rows(Vec<Vec<String>>);

impl Rows {
    fn add(&mut self, what: impl Into<String>, value: impl Into<String>) {
        self.0.push(vec![what.into(), value.into()]);
    }
}

fn count(n: u64, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

fn machine_rows(r: &Report, rows: &mut Rows) {
    match (&r.cuda_driver, &r.no_gpu) {
        (Some(version), None) => rows.add("CUDA driver", format!("supports CUDA {version}, needed is 12.0")),
        (Some(version), Some(why)) => {
            rows.add("GPU", format!("{why} (driver for CUDA {version}): {NO_GPU_MEANS}"))
        }
        (None, why) => rows.add("GPU", format!("{}: {NO_GPU_MEANS}", why.as_deref().unwrap_or("none"))),
    }
    for (i, g) in r.gpus.iter().enumerate() {
        rows.add(
            format!("GPU {i}"),
            format!("{}, compute capability {}, {}", g.name, g.compute_capability, g.pci),
        );
        rows.add(format!("GPU {i}, VRAM"), format!("{} MiB, {} free", g.vram_mib, g.vram_free_mib));
        let registers = match &g.registers_not {
            None => "yes, tried with a mapped file of 1 MiB".into(),
            Some(why) => format!("no, copies are staged and the link is not read: {why}"),
        };
        rows.add(format!("GPU {i}, host memory registers"), registers);
    }
    if r.gpus.len() > 1 {
        rows.add("slots", "on one GPU; all below is for GPU 0");
    }
    let kernels =
        if r.cuda_kernels { "in this program" } else { "not in this program: scripts/build --cuda" };
    rows.add("CUDA kernels", kernels);
    let mib = |m: Option<u64>| m.map_or("unknown".into(), |m| format!("{m} MiB"));
    rows.add("RAM", format!("{}, {} available", mib(r.ram_total_mib), mib(r.ram_available_mib)));
    let limit = r.locked_memory_kib.map_or("unlimited".into(), |kib| format!("{kib} KiB (RLIMIT_MEMLOCK)"));
    rows.add("locked memory", limit);
    let cores = r.cores.map_or(String::new(), |n| format!(" on {}", count(n as u64, "core")));
    rows.add("CPUs that this process may use", format!("{}{cores}", r.cpus));
    let kernels = if r.row_kernels.is_empty() {
        "none for this CPU, ggml's are used".into()
    } else {
        r.row_kernels.join(", ")
    };
    rows.add("row kernels", kernels);
    rows.0.extend(probe::rows(&r.measured).into_iter().skip(1).filter(|row| row[0] != "GPU"));
    if let (false, Some(why)) = (r.gpus.is_empty(), &r.measured.no_gpu) {
        rows.add("GPU, link", format!("not measured: {why}"));
    }
}

fn model_rows(m: &ModelReport, ram_available_mib: Option<u64>, rows: &mut Rows) {
    let name = m.name.as_ref().map_or(String::new(), |n| format!(", {n}"));
    rows.add("model", format!("{} ({}{name})", m.file, m.architecture));
    if m.moe_layers == 0 {
        rows.add("MoE layers", "none: the model is dense, there is nothing to gain");
    } else {
        rows.add(
            "MoE layers",
            format!("{} of {}, {:.1} MiB of experts", m.moe_layers, m.layers, m.experts_mib),
        );
    }
    rows.add("other weights", format!("{:.1} MiB", m.other_weights_mib));
    for (i, c) in m.classes.iter().enumerate() {
        let matrix = |x: &model::Matrix| format!("{} {} {} x {}", x.name, x.ty, x.n_in, x.n_out);
        let matrices: Vec<String> = c.matrices.iter().map(matrix).collect();
        let kib = c.expert_bytes as f64 / 1024.0;
        rows.add(
            format!("class {i}"),
            format!(
                "{} experts, {} used, {kib:.1} KiB each: {}; layers {}",
                c.experts_per_layer,
                c.experts_used,
                matrices.join(", "),
                c.layers
            ),
        );
    }
    for s in &m.stock {
        rows.add("stock graph", format!("{}: layers {}", s.why, s.layers));
    }
    if m.moe_layers > 0 {
        rows.add("not told by the file", m.not_told);
    }
    if let (true, Some(available)) = (m.short_of_ram, ram_available_mib) {
        rows.add("RAM for the model", format!("too little, {available} MiB: parts come from the disk"));
    }
    if let Some(v) = &m.vram {
        rows.add(
            "VRAM beside the slots, estimate",
            format!(
                "{:.0} MiB weights, {:.0} MiB KV cache for {} tokens, {:.0} MiB compute, {:.0} MiB margin",
                v.dense_mib, v.kv_mib, v.context, v.compute_mib, v.margin_mib
            ),
        );
        rows.add("", v.estimates.clone());
        if !m.classes.is_empty() {
            let value = format!(
                "{:.0} MiB: {}, K = {}, {:.0} MiB",
                v.room_mib,
                count(v.slots, "slot"),
                v.k,
                v.slots_mib
            );
            rows.add("room for slots", value);
        }
    }
    rows.add("suggested", m.suggestion.command.clone());
    rows.add("", m.suggestion.why.clone());
    for e in &m.expected {
        let hits =
            if e.hit_rate > 0.0 { format!(", {:.1}% from VRAM", 100.0 * e.hit_rate) } else { String::new() };
        let likely =
            e.likely_tokens_per_s.map_or(String::new(), |(a, b)| format!(", likely {a:.1} to {b:.1}"));
        rows.add(
            format!("decode, {}", e.what),
            format!("at most {:.1} tok/s{likely}{hits}", e.at_most_tokens_per_s),
        );
    }
    for b in &m.basis {
        rows.add("basis", b.clone());
    }
}

pub fn run(args: &Args) -> Result<(), String> {
    let report = report(args)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report).map_err(|e| e.to_string())?);
        return Ok(());
    }
    let mut rows = Rows(vec![vec!["what".to_string(), "value".to_string()]]);
    machine_rows(&report, &mut rows);
    if let Some(m) = &report.model {
        model_rows(m, report.ram_available_mib, &mut rows);
    }
    table::print(&rows.0, 2, false)
}
