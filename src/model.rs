//! What belongs to one llama_model: which layers take the hot path, the slots of each class, the map
//! from expert to slot, the policy, the copy thread and the workers. Contexts share it.
//!
//! A pool is made in two phases. While the first graphs are built, the bridge *offers* every MoE layer
//! that passes its predicate and reports those that do not. *Activation* then groups the layers into
//! classes, allocates the slots and says what was requested and what is active.

pub mod state;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use crate::{
    budget::{self, Budget, Seen},
    cold::{
        Engine, Layer, Matrix, WorkerPool,
        placement::Placement,
        probe::{self, Reading},
        rows::Numerics,
    },
    config::{AutoOff, Config, Kernels},
    device::{Device, SlotMemory, cuda, host},
    fault,
    judge::Verdict,
    lanes::{self, Lanes, assumed_rate},
    log::{Level, log},
    planner::{ClassPolicy, Observed, Phase, Planner, Request},
    policy::{self, Key, Limits, PolicySpec, PoolShape, Routed, Swap},
    profile::hash_routers,
    slots::{Action, SlotTable, Stamp},
    sync::{
        Mutex,
        atomic::{AtomicI32, AtomicU64, Ordering},
        thread,
    },
    telemetry::Stats,
    trace::{TraceError, TraceHeader, TraceLayer, TraceWriter},
    transfer::{Copier, HostCopier, Move, Order, Pace, Report, Resize, Transfer},
    usage::StepUsage,
    warm::{self, Heat, Keeper, Subject},
};

/// With fewer slots a layer than this many times its experts a token, the set turns over faster than
/// it is used.
pub const SLOTS_PER_USED: u32 = 3;

/// When an allocation fails although there seemed to be room, the next try asks for this share.
const SHRINK: f64 = 0.9;
/// How often the progress of registering host memory is told, and from how many bytes on before they are
/// registered: 14 GB take a second.
const TELL_EVERY: Duration = Duration::from_secs(2);
const LONG_BYTES: usize = 8 << 30;
/// How long copies under way are waited for before slots are verified.
const COPIES_END: Duration = Duration::from_secs(2);
const MIB: f64 = (1 << 20) as f64;
/// How often it is looked whether the slots have the memory that they should.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// Swaps that are kept to be looked at.
const LAST_SWAPS: usize = 32;
/// Nobody has looked for so long: nobody does any more.
const WATCHED: Duration = Duration::from_secs(10);
/// Tokens after which a use counts half for who looks.
const WATCH_HALF_LIFE: f32 = 64.0;
/// After a change, so many looks are left out.
const SETTLE: u32 = 4;
/// How long who asks for another size waits for it.
const RESIZED: Duration = Duration::from_secs(2);

/// Types, shapes and bytes that experts must share to share slots. Gate and up may be merged, hence a list.
type ClassKey = Vec<(i32, usize, usize, usize)>;

/// Slot of every expert of one layer, -1 for cold. Read by DISPATCH at any time.
pub struct LayerMap(Box<[AtomicI32]>);

impl LayerMap {
    /// Slot of `expert`, or -1.
    pub fn slot(&self, expert: usize) -> i32 {
        // acquire: pairs with the publishing store, behind which the slot's bytes are in place
        self.0[expert].load(Ordering::Acquire)
    }

    fn set(&self, expert: u16, slot: i32) {
        self.0[usize::from(expert)].store(slot, Ordering::Release);
    }

    /// Copies the slots of all experts to the start of `out`.
    pub fn copy_to(&self, out: &mut [i32]) {
        for (out, slot) in out.iter_mut().zip(&self.0) {
            *out = slot.load(Ordering::Acquire);
        }
    }
}

/// A layer that may take the hot path.
#[derive(Clone)]
pub struct Offer {
    /// The layer.
    pub layer: Layer,
    /// PCI address of the CUDA device that computes it; `None`: the CPU does.
    pub device: Option<String>,
    /// Largest ubatch for which its kernels skip experts without a slot; 0: as the device says.
    pub max_tokens: u32,
}

/// How long a step took.
#[derive(Clone, Copy, Default, Debug)]
pub struct Took {
    /// From its begin, plan included, to its end.
    pub step: Duration,
    /// JOIN worked or waited for cold experts.
    pub join_wait: Duration,
    /// Threads computed cold experts, summed over threads.
    pub busy: Duration,
}

/// Slots for experts of equal types and shapes.
pub struct Class {
    /// Layers in it, by their index among the wired layers; `Key::layer` counts these.
    pub layers: Vec<usize>,
    /// Slots that there are addresses for: one for every expert.
    pub capacity: u32,
    /// One memory a matrix, in the order gate, up, down: slot s at `s * expert_bytes`.
    pub memory: Vec<Arc<SlotMemory>>,
    /// Bytes of one expert over all its matrices.
    pub expert_bytes: usize,
}

/// What happened at the begin of a step.
#[derive(Clone, Copy, Default, Debug)]
pub struct Boundary {
    /// Copies under way when it began.
    pub copying: usize,
    /// Time of the plan that was made there, in us; 0 without one.
    pub rebalance_us: u64,
    /// What the copies will take that are under way now, those that were ordered there included.
    pub uploads: Duration,
}

/// How far the memory of a class has come.
enum Sizing {
    /// Its open slots have memory, and nobody else.
    Settled,
    /// Slots were closed, and may still be read.
    Closing,
    /// The copy thread changes it under this order, for so many open slots.
    Changing { order: u64, open: usize },
}

struct ClassControl {
    table: SlotTable,
    /// Slots that it should have.
    wanted: usize,
    sizing: Sizing,
    /// A graph uses the slots as its weights, without asking where an expert is.
    resident: bool,
    hits: u64,
    misses: u64,
    uses_since_plan: u64,
    /// Copies that have not been reported.
    copying: usize,
    /// Most of them at a time: what the plan wished for last may cost.
    max_copying: usize,
}

/// How much each expert is used: uses, halved every so many tokens.
struct Watch {
    uses: Vec<Vec<f32>>,
    /// What a use counts by now, instead of making the others less.
    worth: f32,
    until: Instant,
}

impl Watch {
    fn new(a: &Active) -> Self {
        let uses = a.layers.iter().map(|l| vec![0.0; l.n_expert]).collect();
        Watch { uses, worth: 1.0, until: Instant::now() + WATCHED }
    }

    fn observe(&mut self, usage: &StepUsage) {
        for (uses, ids) in self.uses.iter_mut().zip(&usage.ids) {
            ids.iter().for_each(|id| uses[usize::from(*id)] += self.worth);
        }
        self.worth *= (usage.n_tokens as f32 / WATCH_HALF_LIFE).exp2();
        if self.worth > 1e20 {
            self.uses.iter_mut().flatten().for_each(|u| *u /= self.worth);
            self.worth = 1.0;
        }
    }

    fn is_over(&self) -> bool {
        Instant::now() > self.until
    }
}

/// All that changes at step boundaries.
struct Control {
    clock: Stamp,
    /// Begin of each running step by context.
    running: BTreeMap<u64, Stamp>,
    tokens_since_plan: u32,
    /// A prompt was computed since the last wish for a plan: what it has used is likely to be used on.
    prompt_since_plan: bool,
    /// A plan has been wished for, and takes effect at the next boundary.
    planning: bool,
    classes: Vec<ClassControl>,
    orders: BTreeMap<u64, (usize, u32)>,
    next_order: u64,
    pace: Pace,
    trace: Option<TraceWriter>,
    stats: Stats,
    /// Tokens between two plans.
    interval: u32,
    /// The slots keep what they have, on request.
    frozen: bool,
    /// What the slots cost and bring, where that was found out.
    verdict: Option<Verdict>,
    /// Swaps of the last plans, the newest first.
    last: VecDeque<(u64, usize, Swap)>,
    /// How much each expert is used, while somebody looks.
    watch: Option<Watch>,
    /// What was said of a growth that did not succeed.
    refused: Option<String>,
    // scratch
    reports: Vec<Report>,
}

/// Looks after the memory of the slots.
struct Sizer {
    budget: Budget,
    since: Instant,
    /// When to look next; never where a number of slots is taken at its word.
    next: Option<Instant>,
}

struct Active {
    // fields are dropped in this order: the copies end before the slots they write to are freed
    transfer: Transfer,
    workers: WorkerPool,
    device: Device,
    /// Its PCI address, when it is a GPU.
    pci: Option<String>,
    /// What people call the model.
    name: String,
    /// Layers that take the stock graph, by reason, when the pool was made.
    skipped: BTreeMap<String, Vec<i32>>,
    /// Bytes of host memory that the device reads in place.
    registered: usize,
    /// Who decides, since it was changed last.
    policy: Mutex<PolicySpec>,
    max_tokens: u32,
    layers: Arc<[Layer]>,
    /// Class of a layer and its index there.
    place: Vec<(usize, u16)>,
    classes: Vec<Class>,
    maps: Vec<LayerMap>,
    /// By layer: where the device reads the experts of each matrix in place, empty where it does not.
    links: Vec<Vec<u64>>,
    /// Bytes a ns of a copy over the link.
    copy_rate: f64,
    /// What was measured of the CPU, where it was.
    reading: Option<Reading>,
    /// Counts changes of `maps`.
    map_version: AtomicU64,
    control: Mutex<Control>,
    sizer: Mutex<Sizer>,
    planner: Planner,
    status: String,
}

#[derive(Default)]
struct Offers {
    layers: Vec<Offer>,
    skipped: BTreeMap<String, Vec<i32>>,
    /// Hash of the router's weights by `il`, of all MoE layers.
    routers: BTreeMap<u16, u64>,
}

/// The pool of one model.
pub struct Model {
    config: Config,
    offers: Mutex<Offers>,
    active: OnceLock<Option<Active>>,
}

impl Model {
    /// A pool that is not active yet.
    pub fn new(config: Config) -> Self {
        Model { config, offers: Mutex::default(), active: OnceLock::new() }
    }

    /// The options it was made with.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Largest ubatch of the hot path, in tokens; before activation the largest that may be.
    pub fn max_tokens(&self) -> u32 {
        self.active().map_or(cuda::MAX_TOKENS, |a| a.max_tokens)
    }

    /// Offers a layer. Offers of the same weights, and offers after activation, change nothing.
    pub fn offer(&self, offer: Offer) {
        let mut offers = self.offers.lock();
        if !offers.layers.iter().any(|l| l.layer.down.data == offer.layer.down.data) {
            offers.layers.push(offer);
        }
    }

    /// Notes the router of a MoE layer.
    pub fn router(&self, il: i32, weights: &[u8]) {
        let Ok(il) = u16::try_from(il) else { return };
        let hash = || hash_routers([(il, weights)]);
        self.offers.lock().routers.entry(il).or_insert_with(hash);
    }

    /// Notes that a MoE layer takes the stock graph, and why.
    pub fn skip(&self, il: i32, reason: &str) {
        let mut offers = self.offers.lock();
        let active = self.active.get().is_some();
        if active && offers.skipped.values().any(|l| l.contains(&il)) {
            return;
        }
        let layers = offers.skipped.entry(reason.into()).or_default();
        if !layers.contains(&il) {
            layers.push(il);
            if active {
                log!(Level::Warn, "moe-hot: layer {il} takes the stock graph: {reason}");
            }
        }
    }

    /// Index of the wired layer with these down weights, once active.
    pub fn find(&self, down: *const u8) -> Option<usize> {
        self.active()?.layers.iter().position(|l| l.down.data == down)
    }

    /// Makes the pool from what was offered and says what was requested and what is active. Further
    /// calls return what the first did.
    pub fn activate(&self, n_threads: usize, name: &str) -> bool {
        self.active.get_or_init(|| self.build(n_threads, name)).is_some()
    }

    fn build(&self, n_threads: usize, name: &str) -> Option<Active> {
        let requested = self.config.requested();
        let mut offers = self.offers.lock();
        let pci = keep_one_device(&mut offers);
        let not_active = |why: &str| {
            log!(Level::Warn, "moe-hot: requested {requested}, not active: {why}");
            for (reason, layers) in &offers.skipped {
                log!(
                    Level::Warn,
                    "moe-hot: layers {} take the stock graph: {reason}",
                    ranges(layers.iter().copied())
                );
            }
            None
        };
        // who asks for none is not expected here, but would get one for every expert
        if !self.config.enabled() {
            return not_active("no slots are asked for");
        }
        if offers.layers.is_empty() {
            return not_active(if offers.skipped.is_empty() {
                "the model has no MoE layers"
            } else {
                "no MoE layer can take the hot path"
            });
        }
        let device = match pci.as_deref().map(cuda::Device::open) {
            None => Device::Host,
            Some(Ok(d)) => Device::Cuda(d),
            Some(Err(e)) => return not_active(&e.to_string()),
        };
        let max_tokens = self.largest_ubatch(&offers, &device);
        let mut layers: Vec<Layer> = offers.layers.iter().map(|o| o.layer.clone()).collect();
        if self.uses_row_kernels(&device) {
            let numerics = if device.is_gpu() { Numerics::Cuda } else { Numerics::Best };
            layers.iter_mut().flat_map(Layer::matrices_mut).for_each(|m| m.use_row_kernel(numerics));
        }
        let mut by_key: BTreeMap<ClassKey, Vec<usize>> = BTreeMap::new();
        for (i, l) in layers.iter().enumerate() {
            by_key.entry(class_key(l)).or_default().push(i);
        }

        // classes often have the same to say
        let mut notes: Vec<String> = Vec::new();
        let mut note = |text: String| {
            if !notes.contains(&text) {
                log!(Level::Warn, "{text}");
                notes.push(text);
            }
        };
        let (mut classes, mut maps, mut controls, mut shapes) =
            (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let mut place = vec![(0, 0); layers.len()];
        for l in &layers {
            maps.push(LayerMap((0..l.n_expert).map(|_| AtomicI32::new(-1)).collect()));
        }
        for (c, members) in by_key.into_values().enumerate() {
            let first = &layers[members[0]];
            for (i, &layer) in members.iter().enumerate() {
                place[layer] = (c, i as u16);
            }
            let n_expert = members.iter().map(|&l| layers[l].n_expert).max().unwrap_or(0) as u32;
            let n_used = members.iter().map(|&l| layers[l].n_used).max().unwrap_or(0) as u32;
            if let Some(k) = self.config.k.filter(|k| *k > n_expert) {
                note(format!(
                    "moe-hot: K = {k} is more than the {n_expert} experts of a layer, using {n_expert}"
                ));
            }
            let per_layer = self.config.slots_of(n_expert);
            let shape = PoolShape {
                n_layers: members.len() as u16,
                n_expert: n_expert as u16,
                n_used: n_used as u16,
                // no more than there are experts, where layers have different numbers of them
                n_slots: members
                    .iter()
                    .map(|l| layers[*l].n_expert as u32)
                    .sum::<u32>()
                    .min(per_layer * members.len() as u32),
                expert_bytes: first.expert_bytes() as u64,
            };
            shapes.push((shape, members));
        }
        let allocated = match allocate(&self.config, &device, &layers, &mut shapes) {
            Ok(a) => a,
            Err(why) => return not_active(&why),
        };
        for (shape, members) in &shapes {
            let per_layer = shape.n_slots / members.len() as u32;
            let n_used = u32::from(shape.n_used);
            if per_layer < SLOTS_PER_USED * n_used && per_layer < u32::from(shape.n_expert) {
                note(format!(
                    "moe-hot: K = {per_layer} is less than {SLOTS_PER_USED} x {n_used} experts a token: \
                     experts will leave before they are used again, this is unlikely to pay"
                ));
            }
        }
        let policy = self.config.policy_of(device.is_gpu());
        let mut policies = Vec::new();
        for ((shape, members), memory) in shapes.into_iter().zip(allocated.memory) {
            let capacity = members.iter().map(|l| layers[*l].n_expert as u32).sum();
            controls.push(ClassControl {
                table: SlotTable::new(capacity, shape.n_slots),
                wanted: shape.n_slots as usize,
                sizing: Sizing::Settled,
                resident: false,
                hits: 0,
                misses: 0,
                uses_since_plan: 0,
                copying: 0,
                max_copying: usize::MAX,
            });
            policies.push(ClassPolicy {
                layers: members.clone(),
                shape,
                policy: policy::build(policy, shape),
            });
            let expert_bytes = shape.expert_bytes as usize;
            classes.push(Class { layers: members, capacity, memory, expert_bytes });
        }
        let (copier, registration) = match copier(&device, &layers) {
            Ok(c) => c,
            Err(e) => return not_active(&e.to_string()),
        };
        let links = self.links(&layers, registration.as_deref());
        let copy_rate = match measure(registration.as_deref(), &classes) {
            Ok(rate) => rate,
            Err(e) => return not_active(&e.to_string()),
        };

        let most = self.workers(&device, n_threads);
        let (placement, reading) = match &device {
            Device::Host => (None, None),
            Device::Cuda(_) => {
                let placement = Placement::of_this_process();
                let reading = probe::read(&layers, placement.as_ref(), most, self.config.threads.is_some());
                (placement, reading)
            }
        };
        if let Some(r) = &reading {
            layers.iter_mut().flat_map(Layer::matrices_mut).for_each(|m| m.prefetch(r.ahead));
        }
        let n_workers = reading.map_or(most, |r| r.n_workers);
        let cpus = placement.as_ref().and_then(|p| p.workers(n_workers));
        let layers: Arc<[Layer]> = layers.into();

        let started = Transfer::new(copier).and_then(|t| Ok((t, WorkerPool::new(n_workers, cpus)?)));
        let (transfer, workers) = match started {
            Ok(x) => x,
            Err(e) => return not_active(&format!("the system gives no thread: {e}")),
        };
        let n_slots = controls.iter().map(|c| c.table.open()).sum::<usize>();
        let trace_k = self.config.k.filter(|k| *k > 0).unwrap_or((n_slots / layers.len()) as u32);
        let mut trace = match self.open_trace(&device, &layers, &place, trace_k) {
            Ok(t) => t,
            Err(e) => return not_active(&format!("--moe-hot-trace: {e}")),
        };
        let subject = Subject {
            model: model_hash(&offers.routers, &layers),
            name: name.into(),
            layers: layers.iter().map(|l| (l.il as u16, l.n_expert as u16)).collect(),
        };
        let (profile, heat) = warm::load(&self.config, &subject).unzip();
        let keeper = Keeper::new(&self.config, subject, profile.as_ref());

        let bytes: usize = classes.iter().map(Class::bytes).sum();
        let status = format!(
            "moe-hot: requested {requested}, active: {n_slots} slots for {} experts in {} ({:.2} MiB, {} class{}), \
             {} of {} MoE layers{}, policy {}, rebalance interval {} tokens, ubatches up to {} tokens, {} worker{}{}",
            layers.iter().map(|l| l.n_expert).sum::<usize>(),
            match &device {
                Device::Host => "host memory".into(),
                Device::Cuda(_) => format!("VRAM of {}", pci.as_deref().unwrap_or_default()),
            },
            bytes as f64 / f64::from(1 << 20),
            classes.len(),
            if classes.len() == 1 { "" } else { "es" },
            layers.len(),
            layers.len() + offers.skipped.values().map(Vec::len).sum::<usize>(),
            match links.iter().filter(|l| !l.is_empty()).count() {
                0 => String::new(),
                n => format!(" ({n} over the link too, {copy_rate:.0} GB/s)"),
            },
            policy,
            self.config.rebalance_interval,
            max_tokens,
            workers.len(),
            if workers.len() == 1 { "" } else { "s" },
            cold_side(&layers, reading.as_ref()),
        );
        log!(Level::Info, "{status}");
        if let Some(faults) = fault::announcement() {
            log!(Level::Warn, "{faults}");
        }
        if let Some(n) = self.config.pp_bypass.filter(|n| *n > max_tokens) {
            log!(
                Level::Warn,
                "moe-hot: the hot path takes ubatches of up to {max_tokens} tokens, \
                 --moe-hot-pp-bypass {n} means {max_tokens}"
            );
        }
        for (reason, layers) in &offers.skipped {
            log!(
                Level::Warn,
                "moe-hot: layers {} take the stock graph: {reason}",
                ranges(layers.iter().copied())
            );
        }

        if let Some(trace) = &mut trace {
            for (i, (class, control)) in classes.iter().zip(&controls).enumerate() {
                // what a reader makes of K
                let widest = class.layers.iter().map(|l| layers[*l].n_expert as u32).max().unwrap_or(0);
                let told = trace_k.min(widest) * class.layers.len() as u32;
                if control.table.open() != told as usize {
                    trace.open(i as u16, control.table.open() as u32);
                }
            }
        }
        let control = Control {
            clock: 0,
            running: BTreeMap::new(),
            tokens_since_plan: 0,
            prompt_since_plan: false,
            planning: false,
            classes: controls,
            orders: BTreeMap::new(),
            next_order: 0,
            pace: Pace::new(copy_rate),
            trace,
            stats: Stats::default(),
            interval: self.config.rebalance_interval,
            frozen: false,
            verdict: None,
            last: VecDeque::new(),
            watch: None,
            refused: None,
            reports: Vec::new(),
        };
        let now = Instant::now();
        let watches = device.is_gpu() || self.config.k.is_none() || fault::armed("vram").is_some();
        let active = Active {
            pci,
            name: name.into(),
            skipped: offers.skipped.clone(),
            registered: registration.as_ref().map_or(0, |r| r.bytes()),
            policy: Mutex::new(policy),
            transfer,
            workers,
            device,
            max_tokens,
            layers,
            place,
            classes,
            maps,
            links,
            copy_rate,
            reading,
            map_version: AtomicU64::new(1),
            control: Mutex::new(control),
            sizer: Mutex::new(Sizer {
                budget: Budget::new(allocated.most),
                since: now,
                next: watches.then_some(now),
            }),
            planner: Planner::new(policies, keeper),
            status,
        };
        active.fill(heat.as_ref());
        Some(active)
    }

    fn largest_ubatch(&self, offers: &Offers, device: &Device) -> u32 {
        let most = match device {
            Device::Host => host::MAX_TOKENS,
            Device::Cuda(_) => cuda::MAX_TOKENS,
        };
        let limits = offers.layers.iter().map(|o| o.max_tokens).filter(|n| *n > 0);
        let most = limits.min().map_or(most, |n| n.min(most));
        self.config.pp_bypass.map_or(most, |n| n.min(most))
    }

    /// Workers beside ggml's own threads: as asked for, else one for every core that ggml leaves. The
    /// threads that run JOIN help, so on a machine that ggml fills there are none. Beside a GPU all
    /// cores but the one that launches, because ggml's threads sleep there.
    fn workers(&self, device: &Device, n_threads: usize) -> usize {
        let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
        match device {
            Device::Host => self.config.threads.map_or(cores.saturating_sub(n_threads), |n| n as usize),
            // JOIN cannot help there
            Device::Cuda(_) => self.config.threads.map_or(cores.saturating_sub(1), |n| n as usize).max(1),
        }
    }

    fn uses_row_kernels(&self, device: &Device) -> bool {
        match self.config.kernels {
            Kernels::Auto => device.is_gpu(),
            Kernels::Rows => true,
            Kernels::Ggml => false,
        }
    }

    /// Where the device reads the experts of each layer in place.
    fn links(&self, layers: &[Layer], registration: Option<&cuda::Registration>) -> Vec<Vec<u64>> {
        let link = |l: &Layer| -> Option<Vec<u64>> {
            let registration = registration.filter(|_| self.config.link)?;
            l.matrices()
                .map(|m| registration.on_device(m.data as usize, m.expert_bytes * l.n_expert))
                .collect()
        };
        layers.iter().map(|l| link(l).unwrap_or_default()).collect()
    }

    fn open_trace(
        &self,
        device: &Device,
        layers: &[Layer],
        place: &[(usize, u16)],
        k: u32,
    ) -> Result<Option<TraceWriter>, TraceError> {
        let Some(path) = &self.config.trace else { return Ok(None) };
        let layer = |(l, place): (&Layer, &(usize, u16))| TraceLayer {
            il: l.il as u16,
            n_expert: l.n_expert as u16,
            n_used: l.n_used as u16,
            class: place.0 as u16,
            expert_bytes: l.expert_bytes() as u64,
        };
        let header = TraceHeader {
            fingerprint: fingerprint(layers),
            k,
            uses_per_upload: device.uses_per_upload(),
            layers: layers.iter().zip(place).map(layer).collect(),
        };
        TraceWriter::create(path, &header).map(Some)
    }

    fn active(&self) -> Option<&Active> {
        self.active.get()?.as_ref()
    }

    /// Only contexts call this, and they exist only on an active pool.
    fn pool(&self) -> &Active {
        self.active().expect("a context exists only on an active pool")
    }

    /// Whether there are slots.
    pub fn is_active(&self) -> bool {
        self.active().is_some()
    }

    /// What was requested and what is active, in one line.
    pub fn status(&self) -> &str {
        &self.pool().status
    }

    /// The wired layers.
    pub fn layers(&self) -> &Arc<[Layer]> {
        &self.pool().layers
    }

    /// Slots a layer on average, after clamping.
    pub fn slots_per_layer(&self) -> u32 {
        self.n_slots() / self.layers().len() as u32
    }

    /// Slots of all classes.
    pub fn n_slots(&self) -> u32 {
        self.pool().control.lock().classes.iter().map(|c| c.table.open() as u32).sum()
    }

    /// Bytes of all slots.
    pub fn slot_bytes(&self) -> u64 {
        self.pool().slot_bytes()
    }

    /// The slot of a layer's expert 0 when all experts of its class have theirs for good, one after the
    /// other. `None` too when the routing is traced, which needs the nodes.
    pub fn resident_from(&self, layer: usize) -> Option<usize> {
        let a = self.pool();
        let (class, member) = a.place[layer];
        let n_expert = |l: &usize| a.layers[*l].n_expert;
        let layers = &a.classes[class].layers;
        let keys = policy::all_keys(layers.iter().map(n_expert));
        let mut control = a.control.lock();
        let traced = control.trace.is_some();
        let class = &mut control.classes[class];
        // slots that are about to close hold nothing for good
        if traced || class.wanted < keys.len() || !class.table.holds(&keys) {
            return None;
        }
        class.resident = true;
        // as `fill` has placed them
        Some(layers[..usize::from(member)].iter().map(n_expert).sum())
    }

    /// Where the device reads all experts of a layer in place, by matrix; empty when it does not.
    pub fn link(&self, layer: usize) -> &[u64] {
        &self.pool().links[layer]
    }

    /// How a context divides cold experts of up to `max_rows` rows a layer.
    pub(crate) fn lanes(&self, max_rows: usize) -> Lanes {
        let a = self.pool();
        let bytes = |(l, link): (&Layer, &Vec<u64>)| if link.is_empty() { 0 } else { l.expert_bytes() };
        Lanes::new(lanes::Shape {
            bytes: a.layers.iter().zip(&a.links).map(bytes).collect(),
            max_rows,
            n_used: a.layers.iter().map(|l| l.n_used).max().unwrap_or(0),
            read_rate: a.reading.map_or_else(|| assumed_rate(a.workers.len()), |r| r.rate),
            copy_rate: a.copy_rate,
        })
    }

    /// The class of a wired layer.
    pub fn class_of(&self, layer: usize) -> &Class {
        let a = self.pool();
        &a.classes[a.place[layer].0]
    }

    /// Where the slots are.
    pub fn device(&self) -> &Device {
        &self.pool().device
    }

    /// Changes whenever a map does.
    pub fn map_version(&self) -> u64 {
        self.pool().map_version.load(Ordering::Acquire)
    }

    /// Where the experts of a wired layer are.
    pub fn map(&self, layer: usize) -> &LayerMap {
        &self.pool().maps[layer]
    }

    /// Whether contexts find out if slots pay.
    pub(crate) fn judges(&self) -> bool {
        match self.config.auto_off {
            AutoOff::Auto => self.pool().device.is_gpu(),
            AutoOff::On => true,
            AutoOff::Off => false,
        }
    }

    /// A context has found out whether slots pay.
    pub(crate) fn judged(&self, verdict: Verdict) {
        self.pool().control.lock().verdict = Some(verdict);
    }

    /// Counters over all contexts.
    pub fn stats(&self) -> Stats {
        self.pool().control.lock().stats
    }

    pub(crate) fn attach(&self, engine: &Arc<Engine>) {
        self.pool().workers.attach(engine.clone());
    }

    pub(crate) fn detach(&self, engine: &Arc<Engine>) {
        self.pool().workers.detach(engine);
    }

    /// A step boundary before a ubatch of context `id`; `hot` when it may take the hot path, `cold` when it may then have
    /// cold experts.
    pub(crate) fn step_begin(&self, id: u64, hot: bool, cold: bool) -> Boundary {
        let a = self.pool();
        let mut c = a.control.lock();
        c.publish(a);
        c.size(a);
        let start = Instant::now();
        let planned = c.apply_plan(a);
        // After a prompt at once, but not before another part of it: its experts cross the link, too.
        let due = c.tokens_since_plan >= c.interval || (hot && c.prompt_since_plan);
        if due && !c.frozen {
            c.request_plan(a);
        }
        let rebalance_us = start.elapsed().as_micros() as u64;
        c.stats.rebalance_us += rebalance_us;
        c.start_copies(a);
        let boundary = Boundary {
            copying: c.classes.iter().map(|k| k.copying).sum(),
            rebalance_us: if planned { rebalance_us } else { 0 },
            uploads: c.pace.time(c.copying_bytes(a)),
        };
        if hot {
            c.clock += 1;
            let now = c.clock;
            c.running.insert(id, now);
            drop(c);
            if cold {
                a.workers.step_begin();
            }
        }
        boundary
    }

    /// The policies work, while the device computes.
    pub(crate) fn step_work(&self) {
        let a = self.pool();
        a.planner.work();
        a.look();
    }

    /// Gives the slots so many bytes, or what there is room for, and allows no more from now on. Waits for it for a while.
    ///
    /// # Errors
    /// Says why there are no such slots.
    pub fn resize(&self, bytes: u64) -> Result<(), String> {
        let a = self.pool();
        let now = a.slot_bytes();
        let free = a.device.free(now)?;
        let room = (now + free).saturating_sub(budget::MARGIN);
        if bytes > now && room < bytes.min(a.capacity_bytes()) {
            return Err(format!(
                "there is room for {} MiB of slots beside {} MiB that stay free",
                room >> 20,
                budget::MARGIN >> 20
            ));
        }
        a.sizer.lock().budget.set_most(bytes);
        a.want(bytes);
        a.finish_sizing(RESIZED);
        Ok(())
    }

    /// Somebody got no memory of the device with PCI address `pci`: gives `bytes` bytes of it back, at once. Whether that
    /// was possible.
    pub fn give_back(&self, pci: &str, bytes: u64) -> bool {
        let Some(a) = self.active() else { return false };
        a.pci.as_ref().is_some_and(|own| own.eq_ignore_ascii_case(pci)) && a.give_back(bytes)
    }

    /// The step of context `id` on the hot path has ended; `cold` as when it began.
    pub(crate) fn step_end(&self, id: u64, cold: bool, usage: &StepUsage, took: Took) {
        let a = self.pool();
        if cold {
            a.workers.step_end();
        }
        let mut c = a.control.lock();
        c.running.remove(&id);
        if !usage.is_empty() {
            c.observe(a, Phase::Decode, usage);
        }
        c.count(a, usage, took);
        c.publish(a);
        c.start_copies(a);
    }

    /// A ubatch of a prompt has been computed on the stock graph.
    pub(crate) fn prompt_end(&self, usage: &StepUsage) {
        let a = self.pool();
        a.control.lock().observe(a, Phase::Prompt, usage);
        // in host memory the threads of the graph have all cores
        if a.device.is_gpu() {
            a.planner.work_aside();
        }
    }

    /// Waits until no swap is under way. For tests and orderly ends; decode never calls it.
    pub fn settle(&self) {
        self.pool().settle();
    }

    /// Calls `f` while no slot changes its expert and none begins to be copied into. Copies that are under way are
    /// waited for, so that what they bring is there; other contexts may order more of them meanwhile, hence no longer
    /// than a while.
    pub(crate) fn hold_slots(&self, f: impl FnOnce()) {
        let (a, start) = (self.pool(), Instant::now());
        loop {
            let mut c = a.control.lock();
            c.publish(a);
            if start.elapsed() > COPIES_END || c.classes.iter().all(|k| k.copying == 0) {
                return f();
            }
            drop(c);
            thread::yield_now();
        }
    }
}

impl Class {
    /// Bytes of its slots.
    pub fn bytes(&self) -> usize {
        self.memory.iter().map(|m| m.bytes()).sum()
    }
}

impl Active {
    /// Where an expert of a class is from now on, -1 for cold.
    fn set_slot(&self, class: &Class, key: Key, slot: i32) {
        self.maps[class.layers[usize::from(key.layer)]].set(key.expert, slot);
        self.map_version.fetch_add(1, Ordering::Release);
    }

    fn slot_bytes(&self) -> u64 {
        self.classes.iter().map(|c| c.bytes() as u64).sum()
    }

    /// Bytes of slots for all experts.
    fn capacity_bytes(&self) -> u64 {
        self.classes.iter().map(|c| u64::from(c.capacity) * c.expert_bytes as u64).sum()
    }

    /// Now and then, whether the slots have the memory that they should.
    fn look(&self) {
        let now = Instant::now();
        let Some(mut sizer) = self.sizer.try_lock().filter(|s| s.next.is_some_and(|next| next <= now)) else {
            return;
        };
        sizer.next = Some(now + LOOK_EVERY);
        // without a number there is nothing to decide
        let slots = self.slot_bytes();
        let Ok(free) = self.device.free(slots) else { return };
        let at = now - sizer.since;
        let Some(bytes) = sizer.budget.observe(at, Seen { free, slots }) else { return };
        // what was asked for has not come yet, or cannot
        sizer.next = Some(now + LOOK_EVERY * SETTLE);
        let will = self.want(bytes);
        if will != slots {
            let mib = |b: u64| b >> 20;
            log!(
                Level::Info,
                "moe-hot: {} MiB are free beside {} MiB of slots, which get {} MiB from now on",
                mib(free),
                mib(slots),
                mib(will)
            );
        }
    }

    /// Wishes for `bytes` bytes of slots, which each class gets its share of; the bytes that they will have.
    fn want(&self, bytes: u64) -> u64 {
        let share = bytes as f64 / self.capacity_bytes() as f64;
        let mut c = self.control.lock();
        let each = self.classes.iter().zip(&mut c.classes).map(|(class, control)| {
            if !control.resident {
                // a share that was made from slots gives those slots
                let n = (f64::from(class.capacity) * share + 1e-6) as usize;
                control.wanted = n.clamp(1, class.capacity as usize);
            }
            (control.wanted * class.expert_bytes) as u64
        });
        each.sum()
    }

    /// Waits for a change of size, up to `bound`. Steps that begin bring it on; where none runs, this does.
    fn finish_sizing(&self, bound: Duration) {
        let start = Instant::now();
        while start.elapsed() < bound {
            let mut c = self.control.lock();
            if c.running.is_empty() {
                c.publish(self);
                c.size(self);
            }
            if c.classes.iter().all(|k| matches!(k.sizing, Sizing::Settled) && k.wanted == k.table.open()) {
                return;
            }
            drop(c);
            thread::sleep(Duration::from_micros(200));
        }
    }

    fn give_back(&self, bytes: u64) -> bool {
        // a step of the caller's own would never end
        if !self.control.lock().running.is_empty() {
            return false;
        }
        let had = self.slot_bytes();
        self.want(had.saturating_sub(bytes));
        self.finish_sizing(RESIZED);
        let has = self.slot_bytes();
        log!(
            Level::Warn,
            "moe-hot: {} MiB more are needed on the device: the slots have {} MiB instead of {}",
            bytes >> 20,
            has >> 20,
            had >> 20
        );
        has < had
    }
    /// The experts that are there when decode begins: all of them in a class that has room for all, where there is
    /// nothing to decide; else the hottest of a profile.
    fn fill(&self, heat: Option<&Heat>) {
        let mut c = self.control.lock();
        let Control { classes, trace, .. } = &mut *c;
        for (i, (class, control)) in self.classes.iter().zip(classes).enumerate() {
            let keys = policy::all_keys(class.layers.iter().map(|l| self.layers[*l].n_expert));
            if keys.len() <= control.table.open() {
                for (slot, key) in keys.into_iter().enumerate() {
                    control.table.assign(slot as u32, key, 0);
                }
            } else if let Some(heat) = heat {
                let uses = |key: &Key| {
                    let layer = class.layers[usize::from(key.layer)];
                    heat[layer][usize::from(key.expert)] * self.layers[layer].n_used as f32
                };
                self.planner.warm(i, keys.iter().map(|k| (*k, uses(k))));
                for (slot, key) in hottest(keys, control.table.open(), uses).into_iter().enumerate() {
                    let slot = slot as u32;
                    control.table.assign(slot, key, 0);
                    if let Some(trace) = trace {
                        trace.swap(i as u16, &Swap { slot, evict: None, admit: key });
                    }
                }
            }
        }
        drop(c);
        self.settle();
    }

    fn settle(&self) {
        loop {
            let mut c = self.control.lock();
            c.publish(self);
            c.start_copies(self);
            let stuck = !c.running.is_empty();
            if stuck || c.classes.iter().all(|k| k.table.in_flight() == 0) {
                return;
            }
            drop(c);
            thread::yield_now();
        }
    }
}

impl Control {
    /// The memory of the slots follows what was wished for, at a step boundary.
    fn size(&mut self, a: &Active) {
        let oldest = self.running.values().copied().min();
        for (i, (class, control)) in a.classes.iter().zip(&mut self.classes).enumerate() {
            let memory = |open: usize| {
                let layer = &a.layers[class.layers[0]];
                layer
                    .matrices()
                    .zip(&class.memory)
                    .map(|(m, to)| (to.clone(), open * m.expert_bytes))
                    .collect()
            };
            let open = control.table.open();
            if control.wanted < open {
                self.clock += 1;
                control.table.set_open(control.wanted, self.clock, |key| {
                    a.set_slot(class, key, -1);
                    self.stats.evictions += 1;
                });
                if let Some(trace) = &mut self.trace {
                    trace.open(i as u16, control.wanted as u32);
                }
                if matches!(control.sizing, Sizing::Settled) {
                    control.sizing = Sizing::Closing;
                }
            }
            let open = control.table.open();
            let to = match control.sizing {
                Sizing::Closing if control.table.closed(oldest) => open,
                Sizing::Settled if control.wanted > open => control.wanted,
                _ => continue,
            };
            let order = self.next_order;
            self.next_order += 1;
            control.sizing = Sizing::Changing { order, open: to };
            a.transfer.resize(Resize { id: order, memory: memory(to) });
        }
    }

    /// The copy thread has changed the memory of a class, or could not.
    fn sized(&mut self, a: &Active, i: usize, open: usize, result: Result<Duration, String>) {
        let control = &mut self.classes[i];
        control.sizing = Sizing::Settled;
        match result {
            Ok(_) if open > control.table.open() && control.wanted >= open => {
                control.table.set_open(open, self.clock, |_| unreachable!("slots only open"));
                if let Some(trace) = &mut self.trace {
                    trace.open(i as u16, open as u32);
                }
                self.refused = None;
            }
            // others were closed meanwhile, or more memory has come than is wanted by now
            Ok(_) => {
                if a.classes[i].bytes() > control.table.open() * a.classes[i].expert_bytes {
                    control.sizing = Sizing::Closing;
                }
            }
            Err(why) => {
                control.wanted = control.table.open();
                if self.refused.as_ref() != Some(&why) {
                    log!(
                        Level::Warn,
                        "moe-hot: there is no memory for more slots, {} it is: {why}",
                        control.wanted
                    );
                    self.refused = Some(why);
                }
            }
        }
    }

    fn count(&mut self, a: &Active, usage: &StepUsage, took: Took) {
        if usage.hits + usage.misses() == 0 {
            return;
        }
        let s = &mut self.stats;
        s.steps += 1;
        s.tokens += u64::from(usage.n_tokens);
        s.hits += usage.hits;
        s.misses += usage.misses();
        s.linked += usage.linked;
        s.join_wait_us += took.join_wait.as_micros() as u64;
        s.worker_busy_us += took.busy.as_micros() as u64;
        s.step_us += took.step.as_micros() as u64;
        for (class, control) in a.classes.iter().zip(&mut self.classes) {
            for &layer in &class.layers {
                let cold = u64::from(usage.cold[layer]);
                control.misses += cold;
                control.hits += usage.ids[layer].len() as u64 - cold;
            }
        }
    }

    fn observe(&mut self, a: &Active, phase: Phase, usage: &StepUsage) {
        if let Some(watch) = &mut self.watch {
            watch.observe(usage);
            if watch.is_over() {
                self.watch = None;
            }
        }
        match phase {
            Phase::Decode => self.tokens_since_plan = self.tokens_since_plan.saturating_add(usage.n_tokens),
            Phase::Prompt => self.prompt_since_plan = true,
        }
        for (class, control) in a.classes.iter().zip(&mut self.classes) {
            control.uses_since_plan += class.layers.iter().map(|l| usage.ids[*l].len() as u64).sum::<u64>();
        }
        if let Some(trace) = &mut self.trace
            && let Err(e) = trace.routed(
                phase == Phase::Prompt,
                Routed { n_tokens: usage.n_tokens, sequences: &usage.sequences, ids: &usage.ids },
            )
        {
            log!(Level::Error, "moe-hot: the routing trace ends here: {e}");
            self.trace = None;
        }
        let (sequences, ids) = (usage.sequences.clone(), usage.ids.clone());
        a.planner.observe(Observed { phase, n_tokens: usage.n_tokens, sequences, ids });
    }

    fn request_plan(&mut self, a: &Active) {
        self.tokens_since_plan = 0;
        self.prompt_since_plan = false;
        self.planning = true;
        let request = |control: &mut ClassControl| {
            let uses = std::mem::take(&mut control.uses_since_plan);
            let limits = Limits::after(uses, a.device.uses_per_upload());
            control.max_copying = limits.max_swaps as usize;
            Request { slots: control.table.assigned().collect(), limits }
        };
        a.planner.request(self.classes.iter_mut().map(request).collect());
    }

    /// The plan that was wished for at the boundary before takes effect; whether there was one.
    fn apply_plan(&mut self, a: &Active) -> bool {
        if !std::mem::take(&mut self.planning) {
            return false;
        }
        let plan = a.planner.take().expect("a plan was wished for");
        self.clock += 1;
        for (i, (class, control)) in a.classes.iter().zip(&mut self.classes).enumerate() {
            let open = control.table.open();
            // slots may have closed since the wish
            for swap in plan[i].iter().filter(|s| (s.slot as usize) < open) {
                if let Action::Retire { key } = control.table.assign(swap.slot, swap.admit, self.clock) {
                    a.set_slot(class, key, -1);
                    self.stats.evictions += 1;
                }
                if let Some(trace) = &mut self.trace {
                    trace.swap(i as u16, swap);
                }
                self.last.push_front((self.stats.tokens, i, *swap));
            }
        }
        self.last.truncate(LAST_SWAPS);
        self.stats.rebalances += 1;
        true
    }

    fn start_copies(&mut self, a: &Active) {
        let oldest = self.running.values().copied().min();
        for (i, (class, control)) in a.classes.iter().zip(&mut self.classes).enumerate() {
            let (orders, next) = (&mut self.orders, &mut self.next_order);
            let room = control.max_copying.saturating_sub(control.copying);
            let copying = &mut control.copying;
            control.table.start_copies(oldest, room, |slot, key| {
                *copying += 1;
                let id = *next;
                *next += 1;
                orders.insert(id, (i, slot));
                let layer = &a.layers[class.layers[usize::from(key.layer)]];
                let moves = layer
                    .matrices()
                    .zip(&class.memory)
                    .map(|(m, memory)| into_slot(m, memory, slot, key.expert));
                a.transfer.order(Order { id, moves: moves.collect() });
            });
        }
    }

    /// Bytes of the copies that have not been reported.
    fn copying_bytes(&self, a: &Active) -> usize {
        a.classes.iter().zip(&self.classes).map(|(class, control)| control.copying * class.expert_bytes).sum()
    }

    fn publish(&mut self, a: &Active) {
        a.transfer.take_reports(&mut self.reports);
        let mut reports = std::mem::take(&mut self.reports);
        for report in reports.drain(..) {
            let changing = |k: &ClassControl| match k.sizing {
                Sizing::Changing { order, open } if order == report.id => Some(open),
                _ => None,
            };
            if let Some((i, open)) =
                self.classes.iter().enumerate().find_map(|(i, k)| Some((i, changing(k)?)))
            {
                self.sized(a, i, open, report.result);
                continue;
            }
            let (class, slot) = self.orders.remove(&report.id).expect("each order is reported once");
            match &report.result {
                Ok(took) => self.pace.observe(a.classes[class].expert_bytes, *took),
                Err(why) => {
                    self.stats.copy_failures += 1;
                    if self.stats.copy_failures.is_power_of_two() {
                        let n = self.stats.copy_failures;
                        log!(
                            Level::Warn,
                            "moe-hot: copying an expert into a slot failed ({n} so far): {why}"
                        );
                    }
                }
            }
            self.classes[class].copying -= 1;
            if let Action::Publish { key } = self.classes[class].table.copied(slot, report.result.is_ok()) {
                let c = &a.classes[class];
                a.set_slot(c, key, slot as i32);
                self.stats.uploads += 1;
                self.stats.upload_bytes += c.expert_bytes as u64;
            }
        }
        self.reports = reports;
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        if let Some(trace) = &mut self.trace
            && let Err(e) = trace.flush()
        {
            log!(Level::Error, "moe-hot: the end of the routing trace could not be written: {e}");
        }
    }
}

/// The copy of one matrix of `expert` into `slot`.
fn into_slot(m: &Matrix, memory: &SlotMemory, slot: u32, expert: u16) -> Move {
    Move {
        src: m.row(usize::from(expert), 0),
        dst: memory.ptr().wrapping_add(slot as usize * m.expert_bytes),
        bytes: m.expert_bytes,
    }
}

/// Tells models apart: shapes and types of all layers, and some bytes of each one's weights (FNV-1a).
fn fingerprint(layers: &[Layer]) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    let mut add = |bytes: &[u8]| {
        for b in bytes {
            hash = (hash ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3);
        }
    };
    for l in layers {
        add(&(l.n_expert as u64).to_le_bytes());
        for m in l.matrices() {
            add(&m.ty.to_le_bytes());
            for v in [m.n_in, m.n_out] {
                add(&(v as u64).to_le_bytes());
            }
            // SAFETY: the first row of expert 0 is there.
            add(unsafe { std::slice::from_raw_parts(m.row(0, 0), m.row_bytes.min(64)) });
        }
    }
    hash
}

/// Tells models apart by their routers, which all quantisations of a model share. A model whose routers the bridge does
/// not see is told apart by its experts.
fn model_hash(routers: &BTreeMap<u16, u64>, layers: &[Layer]) -> u64 {
    if routers.is_empty() {
        return fingerprint(layers);
    }
    let bytes: Vec<_> = routers.iter().map(|(il, hash)| (*il, hash.to_le_bytes())).collect();
    hash_routers(bytes.iter().map(|(il, b)| (*il, b.as_slice())))
}

/// Up to `n` of `keys`, those with the most uses first; none without any.
fn hottest(mut keys: Vec<Key>, n: usize, uses: impl Fn(&Key) -> f32) -> Vec<Key> {
    keys.retain(|k| uses(k) > 0.0);
    keys.sort_by(|a, b| uses(b).total_cmp(&uses(a)).then(a.cmp(b)));
    keys.truncate(n);
    keys
}

fn class_key(l: &Layer) -> ClassKey {
    l.matrices().map(|m| (m.ty, m.n_in, m.n_out, m.expert_bytes)).collect()
}

/// How the workers compute: ` (q4_0 avx512, ggml; 71 GB/s)`.
fn cold_side(layers: &[Layer], reading: Option<&Reading>) -> String {
    let mut kernels: Vec<&str> = Vec::new();
    for m in layers.iter().flat_map(Layer::matrices) {
        let name = m.kernel.map_or("ggml", |k| k.name);
        if !kernels.contains(&name) {
            kernels.push(name);
        }
    }
    let rate = reading.map_or(String::new(), |r| format!("; {:.0} GB/s", r.rate));
    format!(" ({}{rate})", kernels.join(", "))
}

/// `0-3, 7` for 7, 0, 1, 2 and 3.
pub fn ranges(layers: impl IntoIterator<Item = i32>) -> String {
    let mut layers: Vec<i32> = layers.into_iter().collect();
    layers.sort_unstable();
    let mut out: Vec<(i32, i32)> = Vec::new();
    for l in layers {
        match out.last_mut() {
            Some((_, end)) if *end + 1 == l => *end = l,
            _ => out.push((l, l)),
        }
    }
    let text = |(a, b): (i32, i32)| if a == b { a.to_string() } else { format!("{a}-{b}") };
    out.into_iter().map(text).collect::<Vec<_>>().join(", ")
}

impl Copier for Box<dyn Copier> {
    fn copy(&mut self, order: &Order) -> Result<(), String> {
        (**self).copy(order)
    }
}

/// Leaves the layers of one device and notes why the others take the stock graph; its PCI address,
/// `None` for the host. A GPU comes first, and among GPUs the one with the most layers.
fn keep_one_device(offers: &mut Offers) -> Option<String> {
    let mut count: BTreeMap<&str, usize> = BTreeMap::new();
    for o in &offers.layers {
        if let Some(d) = &o.device {
            *count.entry(d).or_default() += 1;
        }
    }
    let pci = count.into_iter().max_by_key(|&(_, n)| n)?.0.to_string();
    let (keep, leave): (Vec<_>, Vec<_>) =
        std::mem::take(&mut offers.layers).into_iter().partition(|o| o.device.as_ref() == Some(&pci));
    offers.layers = keep;
    for o in leave {
        let reason = match o.device {
            None => "the CPU computes all of it".to_string(),
            Some(other) => format!("it is on {other}, and the slots are on {pci}"),
        };
        offers.skipped.entry(reason).or_default().push(o.layer.il);
    }
    Some(pci)
}

/// The memory of the slots as it was allocated.
struct Allocated {
    /// Of all classes, by matrix.
    memory: Vec<Vec<Arc<SlotMemory>>>,
    /// Bytes of slots that the options allow.
    most: u64,
}

/// Memory for the slots of all classes: as many as `shapes` say, or as the options and the device have room for, which
/// they say then. On a device with too little, every class gets fewer slots, and that is said.
fn allocate(
    config: &Config,
    device: &Device,
    layers: &[Layer],
    shapes: &mut [(PoolShape, Vec<usize>)],
) -> Result<Allocated, String> {
    let wanted: Vec<u32> = shapes.iter().map(|(s, _)| s.n_slots).collect();
    let bytes = |shapes: &[(PoolShape, Vec<usize>)]| -> u64 {
        shapes.iter().map(|(s, _)| u64::from(s.n_slots) * s.expert_bytes).sum()
    };
    let needed = bytes(shapes);
    let most = config.vram.unwrap_or(u64::MAX).min(needed);
    let mib = |b: u64| b >> 20;
    let free = match device {
        Device::Host => budget::MARGIN,
        Device::Cuda(_) => budget::FIRST_MARGIN,
    };
    // in host memory a number is taken at its word
    let room = match device {
        Device::Host if config.k.is_some() => None,
        _ => Some(device.free(0)?.saturating_sub(free)),
    };
    let mut share = room.unwrap_or(u64::MAX).min(most) as f64 / needed as f64;
    // K and MiB are promises, "as many as there is room for" is not
    let short = config.k.is_some() && room.is_some_and(|room| room < most);
    loop {
        for ((shape, members), wanted) in shapes.iter_mut().zip(&wanted) {
            let n = (f64::from(*wanted) * share) as u32;
            // a number of slots a layer, where there is one for each
            let per_layer = n / members.len() as u32;
            shape.n_slots = if share < 1.0 && per_layer > 0 { per_layer * members.len() as u32 } else { n };
        }
        if shapes.iter().any(|(s, _)| s.n_slots == 0) {
            return Err(format!(
                "there is no memory for slots: one for each layer needs {:.1} MiB, there is room for {:.1} MiB",
                shapes.iter().map(|(s, members)| members.len() as f64 * s.expert_bytes as f64).sum::<f64>()
                    / MIB,
                needed as f64 * share / MIB
            ));
        }
        let memory: Result<Vec<Vec<_>>, String> = shapes
            .iter()
            .map(|(shape, members)| {
                let capacity: usize = members.iter().map(|l| layers[*l].n_expert).sum();
                let n_slots = shape.n_slots as usize;
                // all experts of a class are weights for the contexts, see [`Model::resident_from`]
                let stays = n_slots == capacity && config.trace.is_none();
                let new = |m: &Matrix| {
                    let (reserved, bytes) = (m.expert_bytes * capacity, m.expert_bytes * n_slots);
                    SlotMemory::new(device, reserved, bytes, stays).map(Arc::new)
                };
                layers[members[0]].matrices().map(new).collect()
            })
            .collect();
        match (memory, device) {
            (Ok(memory), _) => {
                if short {
                    let n: u32 = shapes.iter().map(|(s, _)| s.n_slots).sum();
                    let of = (f64::from(wanted.iter().sum::<u32>()) * most as f64 / needed as f64) as u32;
                    log!(
                        Level::Warn,
                        "moe-hot: {of} slots need {} MiB, there is room for {n} ({} MiB; {} MiB stay free)",
                        mib(most),
                        mib(bytes(shapes)),
                        mib(free)
                    );
                }
                return Ok(Allocated { memory, most });
            }
            (Err(why), Device::Host) => return Err(format!("{why} for slots, {} MiB", mib(needed))),
            (Err(why), Device::Cuda(_)) => {
                log!(Level::Warn, "moe-hot: {} MiB of slots: {why}", mib(bytes(shapes)));
                share *= SHRINK;
            }
        }
    }
}

/// Bytes a ns that copies move over the link; 0 where there is none.
fn measure(registration: Option<&cuda::Registration>, classes: &[Class]) -> Result<f64, cuda::CudaError> {
    // no slot is in use yet
    let memory = classes.iter().flat_map(|c| &c.memory).find_map(|m| match &**m {
        SlotMemory::Cuda(m) => Some(m),
        SlotMemory::Host(_) => None,
    });
    let (Some(registration), Some(memory)) = (registration, memory) else { return Ok(0.0) };
    Ok(registration.copy_rate(memory)?.unwrap_or(0.0))
}

type Copiers = (Box<dyn Copier>, Option<Arc<cuda::Registration>>);

/// Who copies experts into slots. For a device the experts are registered, so that it can read them in
/// place; what the driver refuses is staged.
fn copier(device: &Device, layers: &[Layer]) -> Result<Copiers, cuda::CudaError> {
    let Device::Cuda(device) = device else { return Ok((Box::new(HostCopier), None)) };
    let own = |l: &Layer, m: &Matrix| (m.data as usize, m.expert_bytes * l.n_expert);
    // Whole buffers: ggml copies what else is in them to the device, too, and the driver refuses a copy that begins in
    // a registered page and ends behind it.
    let mut ranges: Vec<(usize, usize)> =
        layers.iter().flat_map(|l| l.matrices().map(move |m| m.buffer.unwrap_or(own(l, m)))).collect();
    ranges.sort_unstable();
    ranges.dedup();
    let total: usize = ranges.iter().map(|r| r.1).sum();
    let start = Instant::now();
    let mut told = start;
    let mut registration = cuda::Registration::new(device.clone());
    let refused = registration.add_all(&ranges, |done, next| {
        if told.elapsed() > TELL_EVERY || next > LONG_BYTES {
            told = Instant::now();
            let (done, total) = (done >> 20, total >> 20);
            log!(Level::Info, "moe-hot: registering weights with the driver: {done} of {total} MiB done");
        }
    });
    let bytes = registration.bytes();
    if bytes > 0 {
        let seconds = start.elapsed().as_secs_f64();
        log!(Level::Info, "moe-hot: registered {} MiB of weights in {seconds:.2} s", bytes >> 20);
    }
    if let Err(why) = refused {
        log!(
            Level::Warn,
            "moe-hot: {} of {} MiB of weights are registered, the others are copied through a staging buffer: {why}",
            bytes >> 20,
            total >> 20
        );
    }
    let registration = Arc::new(registration);
    Ok((Box::new(cuda::CudaCopier::new(device, registration.clone())?), Some(registration)))
}
