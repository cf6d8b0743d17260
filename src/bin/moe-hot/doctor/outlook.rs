//! What a machine can gain with a model: how many slots fit, how to start, and what decode may reach.

use std::path::Path;

use moe_hot::{
    budget,
    config::Config,
    cost::Cost,
    device::cuda,
    model,
    replay::{self, Outcome, Routing},
    trace::TraceReader,
};
use serde::Serialize;

use super::{
    MIB,
    model::{Class, Layer, Model},
};
use crate::probe;

/// llama.cpp's largest ubatch: its compute buffer has that many rows of logits.
const UBATCH: u64 = 512;
const LOGIT_BYTES: u64 = 4;
/// Below so many slots for each expert that a token uses, slots are unlikely to pay, as the library says too.
const SLOTS_PER_USED: u64 = model::SLOTS_PER_USED as u64;
/// A context that is worth suggesting.
const LEAST_CONTEXT: u64 = 4096;

/// Routing of the shipped model in text of three kinds, none of it seen in tuning.
const TRACES: [(&str, &[u8]); 3] = [
    ("code", include_bytes!("../../../../traces/kept/code.trace.gz")),
    ("fiction", include_bytes!("../../../../traces/kept/fiction.trace.gz")),
    ("tech", include_bytes!("../../../../traces/kept/tech.trace.gz")),
];

/// Time of the kernels of a layer beyond what they read, in us: 270.3 tok/s with everything in VRAM are 3.70 ms a
/// token (benches/results/2026-11-26-gpu-check-3.md: H100, 48 layers, 1.9 GB read a token, 0.66 ms at 2.9 TB/s).
const KERNELS_US: f64 = 63.0;
/// What runs reached of this prediction on an H100 beside 16 cores, made with that machine's 122 GB/s of plain reading
/// (gpu-check-4; 1.05 times as much for CPU and link at once, as DESIGN 6 measured) and each run's own hit rate and
/// uploads: the widened model at K = 8, 16, 24 and with 6, 12, 18 of 48 layers in VRAM (gpu-check-4), the geometry
/// of Qwen3.5-122B at K = 44 and with 0 and 8 of 48 layers (gpu-check-5).
const SLOTS_REACHED: (f64, f64) = (0.79, 0.85);
const STOCK_REACHED: (f64, f64) = (0.38, 0.56);
const REACHED: &str = "benches/results/2026-11-26-gpu-check-4.md and -5.md, H100 beside 16 cores";
/// Slots in host memory against stock (README, How fast).
const HOST_RATIO: &str =
    "0.96 to 1.01 times stock (benches/results/2026-11-24-host-shipped.md and -widened.md)";

/// Rates as measured, in GB/s, and the time of a hand-over.
#[derive(Clone, Copy, Debug)]
pub struct Rates {
    /// Threads reading memory.
    pub cpu: f64,
    /// Of a GPU.
    pub gpu: Option<GpuRates>,
}

#[derive(Clone, Copy, Debug)]
pub struct GpuRates {
    /// Threads and GPU reading host memory at once.
    pub both: f64,
    /// Copies from registered memory.
    pub copy: f64,
    pub vram: f64,
    pub round_trip_us: f64,
}

/// What VRAM has to hold, in MiB.
#[derive(Debug, Serialize)]
pub struct Vram {
    pub free_mib: f64,
    pub dense_mib: f64,
    pub kv_mib: f64,
    pub context: u64,
    pub compute_mib: f64,
    pub margin_mib: f64,
    /// What is left, 0 when there is nothing.
    pub room_mib: f64,
    pub experts_mib: f64,
    pub slots: u64,
    pub slots_mib: f64,
    /// Slots of each class, in order.
    pub slots_of_classes: Vec<u64>,
    /// Of a layer, on average.
    pub k: u64,
    /// Whole layers of experts in the same VRAM.
    pub layers_instead: u64,
    pub estimates: String,
}

#[derive(Debug, PartialEq, Serialize)]
pub struct Suggestion {
    pub command: String,
    pub why: String,
}

#[derive(Debug, Serialize)]
pub struct Expected {
    pub what: String,
    /// Share of uses that find their expert in VRAM.
    pub hit_rate: f64,
    pub at_most_tokens_per_s: f64,
    /// What runs have reached of that, as a range.
    pub likely_tokens_per_s: Option<(f64, f64)>,
}

/// As the library allocates: the same share of each class, a number of slots a layer where there is one for each.
fn slots(classes: &[Class], room: u64) -> Vec<u64> {
    let needed: u64 = classes.iter().map(|c| c.n_experts * c.expert_bytes).sum();
    if needed <= room {
        return classes.iter().map(|c| c.n_experts).collect();
    }
    let share = room as f64 / needed as f64;
    let of = |c: &Class| {
        let n = (c.n_experts as f64 * share) as u64;
        if n < c.n_layers { n } else { n / c.n_layers * c.n_layers }
    };
    classes.iter().map(of).collect()
}

impl Vram {
    pub fn new(model: &Model, classes: &[Class], free: u64, context: u64) -> Self {
        let kv = model.kv_per_token.saturating_mul(context);
        let compute = UBATCH * model.n_vocab.saturating_mul(LOGIT_BYTES);
        let others = [model.dense, kv, compute, budget::FIRST_MARGIN];
        let others = others.into_iter().fold(0u64, u64::saturating_add);
        let room = free.saturating_sub(others);
        let mut of = slots(classes, room);
        // the library wants at least one for each class
        if of.contains(&0) {
            of.fill(0);
        }
        let (n, bytes) = classes
            .iter()
            .zip(&of)
            .fold((0, 0), |(n, bytes), (c, slots)| (n + slots, bytes + slots * c.expert_bytes));
        let n_layers: u64 = classes.iter().map(|c| c.n_layers).sum();
        let layer = (model.experts / (model.layers.len() as u64).max(1)).max(1);
        Vram {
            free_mib: free as f64 / MIB,
            dense_mib: model.dense as f64 / MIB,
            kv_mib: kv as f64 / MIB,
            context,
            compute_mib: compute as f64 / MIB,
            margin_mib: budget::FIRST_MARGIN as f64 / MIB,
            room_mib: room as f64 / MIB,
            experts_mib: model.experts as f64 / MIB,
            slots: n,
            slots_mib: bytes as f64 / MIB,
            slots_of_classes: of,
            k: n / n_layers.max(1),
            layers_instead: bytes / layer,
            estimates: format!(
                "KV cache: {} layers with one, {} bytes a token in f16, windows taken as the whole context, states of \
                 recurrent layers not counted; compute: {UBATCH} rows of {} logits; what --moe-hot-k auto takes is \
                 measured when llama.cpp has allocated its own",
                model.n_kv, model.kv_per_token, model.n_vocab
            ),
        }
    }

    /// Whether all experts fit without slots.
    pub fn all_fit(&self) -> bool {
        self.experts_mib <= self.room_mib
    }
}

/// How to start a server. `vram`: `None` without a GPU.
pub fn suggest(
    file: &str,
    model: &Model,
    classes: &[Class],
    vram: Option<&Vram>,
    asked: Option<u64>,
    n_gpus: usize,
) -> Suggestion {
    let mut command = format!("llama-server -m {}", quoted(file));
    let context = asked.map_or(String::new(), |c| format!(" -c {c}"));
    let one_gpu = if n_gpus > 1 { " --split-mode none" } else { "" };
    if vram.is_some() {
        command += " -ngl 99";
    }
    if model.layers.is_empty() {
        let why = "the model is dense: there are no experts to keep in slots";
        return Suggestion { command: command + &context, why: why.into() };
    }
    let Some(vram) = vram else {
        let why = "there is no GPU that can be used: slots in host memory bring nothing";
        return Suggestion { command: command + &context, why: why.into() };
    };
    if vram.all_fit() {
        let why = "all experts fit into VRAM: slots would bring nothing";
        return Suggestion { command: command + &context, why: why.into() };
    }
    if classes.is_empty() {
        let why =
            "no MoE layer can take the hot path: --fit, which is llama.cpp's default, places whole layers";
        return Suggestion { command: format!("llama-server -m {}{context}", quoted(file)), why: why.into() };
    }
    let n_used = classes.iter().map(|c| c.experts_used).max().unwrap_or(0);
    let enough =
        (SLOTS_PER_USED * n_used).min(classes.iter().map(|c| c.experts_per_layer).max().unwrap_or(0));
    command += " --cpu-moe";
    if vram.k >= enough {
        let why = format!("{:.0} MiB of VRAM are left for slots", vram.room_mib);
        return Suggestion { command: format!("{command}{one_gpu} --moe-hot-k auto{context}"), why };
    }
    let short = format!(
        "{} slots a layer are fewer than {enough}, {SLOTS_PER_USED} for each of {n_used} experts that a token uses: unlikely \
         to pay",
        vram.k
    );
    let needed: u64 = classes.iter().map(|c| enough * c.n_layers * c.expert_bytes).sum();
    let beside = vram.free_mib - vram.dense_mib - vram.compute_mib - vram.margin_mib;
    let left = (beside * MIB) as i64 - needed as i64;
    let context_then =
        u64::try_from(left).unwrap_or(0).checked_div(model.kv_per_token).unwrap_or(0) / 256 * 256;
    if context_then >= LEAST_CONTEXT && context_then < vram.context {
        return Suggestion {
            command: format!("{command}{one_gpu} --moe-hot-k auto -c {context_then}"),
            why: format!(
                "with a context of {} tokens {short}; with {context_then} there are enough",
                vram.context
            ),
        };
    }
    Suggestion { command: command + &context, why: short }
}

/// For a shell.
fn quoted(path: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+=:,@%".contains(c);
    if path.chars().all(plain) { path.into() } else { format!("'{}'", path.replace('\'', r"'\''")) }
}

/// What the shipped model's routing gives where this share of the experts has a slot: hit rate, and uploads a use.
fn shipped(share: f64, config: &Config) -> Result<(f64, f64), String> {
    let mut sum = Outcome::default();
    for (name, bytes) in TRACES {
        let reader = TraceReader::unpack(bytes, Path::new(name)).map_err(|e| e.to_string())?;
        let mut routing = Routing::read(reader).map_err(|e| e.to_string())?;
        routing.header.uses_per_upload = cuda::USES_PER_UPLOAD;
        let n_expert = routing.header.layers.iter().map(|l| l.n_expert).max().unwrap_or(0);
        let k = ((share * f64::from(n_expert)).round() as u32).max(1);
        sum += replay::replay(&routing, config.policy_of(true), k, config.rebalance_interval, |_, _, _| {});
    }
    Ok((sum.hit_rate(), sum.uploads as f64 / (sum.hits + sum.misses).max(1) as f64))
}

/// Layers of one kind, as a token sees them.
#[derive(Clone, Copy, Default)]
struct Token {
    layers: f64,
    uses: f64,
    bytes: f64,
}

impl Token {
    fn of<'a>(layers: impl Iterator<Item = &'a Layer>) -> Self {
        layers.fold(Token::default(), |t, l| Token {
            layers: t.layers + 1.0,
            uses: t.uses + l.n_used as f64,
            bytes: t.bytes + (l.n_used * l.expert_bytes()) as f64,
        })
    }

    /// Bytes of a used expert.
    fn expert(self) -> f64 {
        if self.uses > 0.0 { self.bytes / self.uses } else { 0.0 }
    }

    /// What so many tokens count, as if an expert was cold whatever the others of its layer are.
    fn outcome(self, steps: f64, hit_rate: f64, uploads_per_use: f64) -> Outcome {
        let used = if self.layers > 0.0 { self.uses / self.layers } else { 0.0 };
        let count = |n: f64| (n * steps).round() as u64;
        Outcome {
            steps: count(1.0),
            tokens: count(1.0),
            cold: count(self.uses * (1.0 - hit_rate)),
            cold_layers: count(self.layers * (1.0 - hit_rate.powf(used))),
            uploads: count(self.uses * uploads_per_use),
            ..Outcome::default()
        }
    }
}

/// Tokens that are counted: enough that rounding does not matter.
const TOKENS: f64 = 10_000.0;

/// What one sequence may decode at, and what that rests on.
pub fn expect(
    model: &Model,
    classes: &[Class],
    vram: Option<&Vram>,
    rates: Rates,
) -> Result<(Vec<Expected>, Vec<String>), String> {
    let main: Vec<&Layer> = model.layers.iter().filter(|l| (l.il as u64) < model.n_layers).collect();
    let all = Token::of(main.iter().copied());
    let dense = model.dense as f64;
    if model.dense + model.experts < probe::LEAST_BYTES as u64 {
        let why = format!(
            "nothing is expected: caches may hold the {:.1} MiB of weights, and only memory was measured",
            (dense + model.experts as f64) / MIB
        );
        return Ok((Vec::new(), vec![why]));
    }
    let reads = format!(
        "a token reads {:.1} MiB of experts and {:.1} MiB of other weights (what --cpu-moe puts on the GPU)",
        all.bytes / MIB,
        dense / MIB
    );
    let (Some(gpu), Some(vram)) = (rates.gpu, vram) else {
        let at_most = rates.cpu * 1e9 / (dense + all.bytes);
        let row = |what: &str| Expected {
            what: what.into(),
            hit_rate: 0.0,
            at_most_tokens_per_s: at_most,
            likely_tokens_per_s: None,
        };
        let mut rows = vec![row("stock, on the CPU")];
        let mut bases = vec![format!(
            "{reads}; at most: these bytes at the {:.1} GB/s that threads read here, measured now",
            rates.cpu
        )];
        if !classes.is_empty() {
            rows.push(row("slots in host memory: the same"));
            bases.push(format!("slots in host memory ran at {HOST_RATIO}"));
        }
        return Ok((rows, bases));
    };
    // us a byte
    let [cpu, both, copy, of_vram] = [rates.cpu, gpu.both, gpu.copy, gpu.vram].map(|rate| 1e-3 / rate);
    let hot = Token::of(main.iter().copied().filter(|l| l.stock.is_none() && l.quantized));
    let step_us = (dense + all.bytes) * of_vram + model.n_layers as f64 * KERNELS_US;
    let cost = |expert: f64, read: f64| Cost {
        step_us,
        cold_us: expert * (read - of_vram).max(0.0),
        layer_us: gpu.round_trip_us,
        upload_us: expert * copy,
    };
    let row = |what: String, hit_rate: f64, us: f64, (least, most): (f64, f64)| {
        let at_most = TOKENS * 1e6 / us;
        let likely_tokens_per_s = Some((at_most * least, at_most * most));
        Expected { what, hit_rate, at_most_tokens_per_s: at_most, likely_tokens_per_s }
    };
    let stock = |what: String, n: u64| {
        let part = (n as f64 / all.layers.max(1.0)).min(1.0);
        let left = Token {
            layers: all.layers * (1.0 - part),
            uses: all.uses * (1.0 - part),
            bytes: all.bytes * (1.0 - part),
        };
        row(what, part, cost(all.expert(), cpu).us(&left.outcome(TOKENS, 0.0, 0.0)), STOCK_REACHED)
    };
    if model.layers.is_empty() || vram.all_fit() {
        let us = cost(0.0, cpu).us(&Token::default().outcome(TOKENS, 1.0, 0.0));
        let at_most = Expected {
            what: "all in VRAM".into(),
            hit_rate: 1.0,
            at_most_tokens_per_s: TOKENS * 1e6 / us,
            likely_tokens_per_s: None,
        };
        return Ok((vec![at_most], vec![reads, basis_of_a_step(&gpu)]));
    }
    let mut rows = vec![stock("stock, experts on the CPU".into(), 0)];
    if vram.slots == 0 {
        return Ok((rows, vec![reads, basis_of_a_step(&gpu), basis_of_the_rest(&rates, &gpu)]));
    }
    let n = vram.layers_instead;
    let what = format!("stock, {n} of {} MoE layers in the same VRAM", main.len());
    rows.push(stock(what, n));
    let n_experts: u64 = classes.iter().map(|c| c.n_experts).sum();
    let share = vram.slots as f64 / n_experts as f64;
    // what takes the stock graph is read by the CPU alone
    let rest =
        Token { layers: all.layers - hot.layers, uses: all.uses - hot.uses, bytes: all.bytes - hot.bytes };
    let rest_us = Cost { step_us: 0.0, ..cost(rest.expert(), cpu) }.us(&rest.outcome(TOKENS, 0.0, 0.0));
    let mut slots = |what: &str, hit_rate: f64, uploads: f64| {
        let us = cost(hot.expert(), both).us(&hot.outcome(TOKENS, hit_rate, uploads)) + rest_us;
        rows.push(row(what.into(), hit_rate, us, SLOTS_REACHED));
    };
    slots("slots, routing without any locality", share, 0.0);
    let config = Config::default();
    let (hit_rate, uploads) = shipped(share, &config)?;
    slots("slots, routing like the shipped model's", hit_rate, uploads);
    let bases = vec![
        reads,
        basis_of_a_step(&gpu),
        basis_of_the_rest(&rates, &gpu),
        format!(
            "hit rates: {:.1}% of the experts have a slot, which is the rate without locality; {:.1}% is what {}, interval {}, \
             reaches there on three traces of the shipped model (traces/kept, replayed now), a model whose \
             routing is harder to cache than most (models/README.md)",
            100.0 * share,
            100.0 * hit_rate,
            config.policy_of(true),
            config.rebalance_interval
        ),
        format!(
            "likely: {} to {} of that with slots and {} to {} in stock, which is what runs reached ({REACHED}); other machines \
             were not measured",
            SLOTS_REACHED.0, SLOTS_REACHED.1, STOCK_REACHED.0, STOCK_REACHED.1
        ),
    ];
    Ok((rows, bases))
}

fn basis_of_a_step(gpu: &GpuRates) -> String {
    format!(
        "at most, for the GPU: these bytes at {:.0} GB/s, measured now, and {KERNELS_US} us a layer for its kernels, as on an \
         H100 (benches/results/2026-11-26-gpu-check-3.md)",
        gpu.vram
    )
}

fn basis_of_the_rest(rates: &Rates, gpu: &GpuRates) -> String {
    format!(
        "at most, for experts in host memory, measured now: {:.1} GB/s in stock, {:.1} GB/s by CPU and link at once with slots, \
         {:.2} us a layer for the hand-over, {:.1} GB/s for copies into slots",
        rates.cpu, gpu.both, gpu.round_trip_us, gpu.copy
    )
}

#[cfg(test)]
mod tests {
    use super::{super::model::tests::gguf, *};

    const GPU: GpuRates = GpuRates { both: 100.0, copy: 50.0, vram: 1000.0, round_trip_us: 3.0 };
    const RATES: Rates = Rates { cpu: 50.0, gpu: Some(GPU) };
    /// Of the model: its other weights, a KV cache for its 1024 tokens and 512 rows of logits.
    const OTHERS: u64 = (1 << 20) + 1024 * 256 + 512 * 8192 * 4 + budget::FIRST_MARGIN;
    const EXPERT: u64 = 3 * 1152;
    const LARGE: u64 = 4000;

    fn model() -> Model {
        Model::new(&gguf()).unwrap()
    }

    /// The model with experts of so many times the bytes, which no cache holds.
    fn large() -> Model {
        let mut g = gguf();
        for t in g.tensors.iter_mut().filter(|t| t.shape[2] > 1) {
            t.bytes *= LARGE;
        }
        Model::new(&g).unwrap()
    }

    fn with(free: u64) -> (Model, Vec<Class>, Vram) {
        let m = model();
        let classes = m.classes(true);
        let vram = Vram::new(&m, &classes, free, 1024);
        (m, classes, vram)
    }

    #[test]
    fn slots_take_what_the_others_leave() {
        let (_, _, vram) = with(OTHERS + 13 * EXPERT);
        assert_eq!((vram.slots, vram.k, vram.layers_instead), (12, 6, 0), "the same number in each layer");
        assert!((vram.room_mib - 13.0 * EXPERT as f64 / MIB).abs() < 1e-9);
        assert_eq!(with(OTHERS + EXPERT).2.slots, 1);
        assert_eq!(with(OTHERS).2.slots, 0);
        assert_eq!(with(0).2.slots, 0);
        let (_, _, vram) = with(OTHERS + 32 * EXPERT);
        assert!(vram.all_fit() && vram.slots == 32);
        assert!(!with(OTHERS + 32 * EXPERT - 1).2.all_fit());
    }

    #[test]
    fn the_command_is_for_what_fits() {
        let suggested = |free: u64, n_gpus: usize| {
            let (m, classes, vram) = with(free);
            suggest("a b.gguf", &m, &classes, Some(&vram), None, n_gpus).command
        };
        let start = "llama-server -m 'a b.gguf' -ngl 99";
        assert_eq!(suggested(OTHERS + 32 * EXPERT, 1), start);
        assert_eq!(suggested(OTHERS + 12 * EXPERT, 1), format!("{start} --cpu-moe --moe-hot-k auto"));
        assert_eq!(
            suggested(OTHERS + 12 * EXPERT, 2),
            format!("{start} --cpu-moe --split-mode none --moe-hot-k auto")
        );
        assert_eq!(suggested(OTHERS + 6 * EXPERT, 1), format!("{start} --cpu-moe"), "3 slots for 2 experts");
        // a shorter context makes room
        let (m, classes, _) = with(0);
        let vram = Vram::new(&m, &classes, OTHERS + (8 << 20), 1 << 20);
        assert_eq!(vram.slots, 0);
        let context = (1024 + ((8 << 20) - 12 * EXPERT) / 256) / 256 * 256;
        let shorter = suggest("m", &m, &classes, Some(&vram), None, 1);
        assert_eq!(
            shorter.command,
            format!("llama-server -m m -ngl 99 --cpu-moe --moe-hot-k auto -c {context}")
        );
        assert_eq!(suggest("m", &m, &classes, None, Some(99), 0).command, "llama-server -m m -c 99");
    }

    #[test]
    fn speeds_follow_from_the_bytes() {
        let m = large();
        let classes = m.classes(true);
        let vram = Vram::new(&m, &classes, OTHERS + 16 * LARGE * EXPERT, 1024);
        let (rows, _) = expect(&m, &classes, Some(&vram), RATES).unwrap();
        let all = 4.0 * (LARGE * EXPERT) as f64;
        let step = (all + (1 << 20) as f64) / 1e6 + 2.0 * KERNELS_US;
        // GB/s are 1000 bytes a us
        let cold = |share: f64, rate: f64| share * all * (1.0 / (1000.0 * rate) - 1e-6);
        let at_most = |us: f64| 1e6 / us;
        let near = |row: &Expected, us: f64| {
            let value = row.at_most_tokens_per_s;
            assert!((value / at_most(us) - 1.0).abs() < 1e-4, "{}: {value} for {}", row.what, at_most(us));
        };
        near(&rows[0], step + cold(1.0, 50.0) + 2.0 * 3.0);
        near(&rows[1], step + cold(0.5, 50.0) + 3.0);
        near(&rows[2], step + cold(0.5, 100.0) + 2.0 * 0.75 * 3.0);
        assert_eq!((rows[1].hit_rate, rows[2].hit_rate), (0.5, 0.5));
        // its routing has locality, so more than the share of its experts
        assert!(rows[3].hit_rate > 0.6 && rows[3].hit_rate < 1.0, "{}", rows[3].hit_rate);
        assert!(rows.iter().all(|r| r.likely_tokens_per_s.unwrap().1 < r.at_most_tokens_per_s));
    }

    #[test]
    fn without_a_gpu_slots_change_nothing() {
        let m = large();
        let rates = Rates { cpu: 50.0, gpu: None };
        let (rows, bases) = expect(&m, &m.classes(false), None, rates).unwrap();
        let at_most = 50e9 / ((1 << 20) as f64 + 4.0 * (LARGE * EXPERT) as f64);
        assert!(
            rows.len() == 2 && rows.iter().all(|r| (r.at_most_tokens_per_s / at_most - 1.0).abs() < 1e-9)
        );
        assert!(bases[1].contains("benches/results/"));
        let (rows, bases) = expect(&model(), &m.classes(false), None, rates).unwrap();
        assert!(rows.is_empty() && bases[0].starts_with("nothing is expected: caches may hold"), "{bases:?}");
    }
}
