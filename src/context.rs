//! What belongs to one llama_context: its mailbox and cold engine, the usage of the step that runs, and
//! its counters.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::{Mutex, MutexGuard};

use crate::{
    cold::{ColdRow, Engine, EngineError, join_bound},
    device::{
        Device,
        cuda::{CudaError, Fault, Port, PortShape},
    },
    judge::Judge,
    lanes::{Lanes, Sample},
    log::{Level, log},
    model::{Boundary, Model, Took},
    telemetry::{Stats, Step, StepLog},
    usage::StepUsage,
    verify::Verify,
};

/// Counters of a context since its creation or the last reset.
#[derive(Default)]
struct Counters {
    steps: AtomicU64,
    tokens: AtomicU64,
    hits: AtomicU64,
    misses: AtomicU64,
    linked: AtomicU64,
    join_wait_ns: AtomicU64,
}

/// One context. Freed before its model's pool.
pub struct Context {
    id: u64,
    model: Arc<Model>,
    engine: Arc<Engine>,
    /// Shared with the kernels when the slots are in VRAM.
    port: Option<Port>,
    lanes: Mutex<Measured>,
    /// By layer: where its experts are that had their slots for good when the context was made. Whether a layer has
    /// nodes must not depend on when that is asked: they count its uses.
    resident: Box<[Option<usize>]>,
    /// Hits a token in layers without nodes.
    uncounted: u64,
    usage: Mutex<StepUsage>,
    /// What a ubatch on the stock graph routed: the prompt.
    prompt: Mutex<StepUsage>,
    cold: Mutex<Vec<ColdRow>>,
    counters: Counters,
    /// The model's counters when ours were reset last.
    base: Mutex<Stats>,
    failed: Mutex<Option<StepError>>,
    /// The engine did not answer in time and still works on that request.
    stuck: AtomicBool,
    /// The ubatch on the hot path that is running.
    running: Mutex<Option<Running>>,
    log: Option<Mutex<StepLog>>,
    verify: Option<Mutex<Verify>>,
    judged: Option<Mutex<Judged>>,
    /// Changes when the graphs that were built before must not be used again.
    graph_version: AtomicU64,
    /// Busy time that the model knows of, in us.
    busy_told: AtomicU64,
}

/// Whether the slots pay, from how long steps of one token take from begin to begin.
#[derive(Default)]
struct Judged {
    judge: Judge,
    /// The step before, if it was of one token: its begin, and whether it used slots.
    before: Option<(Instant, bool)>,
}

/// A longer time from one step to the next was not decode.
const LONGEST_STEP: Duration = Duration::from_secs(2);

/// After a failure of the cold engine its experts go over the link for so many tokens, where that is possible.
const REST_TOKENS: u32 = 64;

/// How cold experts are divided, and what the last step measured.
struct Measured {
    lanes: Lanes,
    samples: Vec<Sample>,
}

struct Running {
    since: Instant,
    boundary: Boundary,
    /// JOIN's time before it.
    join_wait_ns: u64,
}

/// Why the output of a step must not be used.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum StepError {
    /// The cold engine gave no rows.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The driver refused a call.
    #[error(transparent)]
    Cuda(#[from] CudaError),
    /// A node ran on another backend than its slots are on.
    #[error("a node of the expert slots in VRAM was scheduled on the CPU")]
    Misplaced,
}

impl Context {
    /// A context on an active pool; `id` is unique among the model's contexts.
    ///
    /// # Errors
    /// The driver gives no memory for what is shared with the kernels.
    pub(crate) fn new(id: u64, model: Arc<Model>) -> Result<Self, CudaError> {
        let layers = model.layers();
        let max_tokens = model.max_tokens() as usize;
        let port = match model.device() {
            Device::Host => None,
            Device::Cuda(device) => Some(Port::new(device.clone(), PortShape::new(layers, max_tokens))?),
        };
        let max_rows = port.as_ref().map_or(0, Port::max_rows);
        let lanes = model.lanes(max_rows);
        let remote = port.as_ref().map(Port::remote);
        let engine = Arc::new(Engine::new(layers.clone(), max_tokens, remote));
        model.attach(&engine);
        let usage = StepUsage::new(layers.len());
        let resident: Box<[_]> = (0..layers.len()).map(|l| model.resident_from(l)).collect();
        let without_nodes = layers.iter().zip(&resident).filter(|(_, first)| first.is_some());
        let base = model.stats();
        Ok(Context {
            id,
            engine,
            port,
            lanes: Mutex::new(Measured { lanes, samples: Vec::new() }),
            uncounted: without_nodes.map(|(l, _)| l.n_used as u64).sum(),
            resident,
            prompt: Mutex::new(usage.clone()),
            usage: Mutex::new(usage),
            cold: Mutex::default(),
            counters: Counters::default(),
            base: Mutex::new(base),
            failed: Mutex::default(),
            stuck: AtomicBool::new(false),
            running: Mutex::default(),
            log: StepLog::new().map(Mutex::new),
            verify: Verify::from_env().map(Mutex::new),
            judged: model.judges().then(Mutex::default),
            graph_version: AtomicU64::new(0),
            busy_told: AtomicU64::new(0),
            model,
        })
    }

    /// The pool it works on.
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// The slot of a layer's expert 0 when the layer has no nodes in this context, see [`Model::resident_from`].
    pub fn resident_from(&self, layer: usize) -> Option<usize> {
        self.resident[layer]
    }

    /// Whether any layer has nodes, and so may have cold experts. Where none has, workers that spin would only slow down the
    /// thread that launches the graph.
    fn has_nodes(&self) -> bool {
        self.resident.iter().any(Option::is_none)
    }

    /// Its cold engine.
    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// What it shares with the kernels, when its slots are in VRAM.
    pub fn port(&self) -> Option<&Port> {
        self.port.as_ref()
    }

    /// The usage of the running step.
    pub fn usage(&self) -> MutexGuard<'_, StepUsage> {
        self.usage.lock()
    }

    /// DISPATCH's scratch list.
    pub fn cold_list(&self) -> MutexGuard<'_, Vec<ColdRow>> {
        self.cold.lock()
    }

    /// Helps with the open request until it is complete; `timed` for one of the calling threads.
    pub fn wait_cold(&self, timed: bool) -> Result<(), EngineError> {
        if !timed {
            return self.engine.finish(join_bound());
        }
        let start = Instant::now();
        let ready = self.engine.finish(join_bound());
        self.counters.join_wait_ns.fetch_add(start.elapsed().as_nanos() as u64, Ordering::Relaxed);
        ready
    }

    /// Marks the running step as failed; the first reason is kept.
    pub fn fail(&self, why: impl Into<StepError>) {
        let mut why = why.into();
        if matches!(why, StepError::Engine(_)) && !self.engine.settles() {
            // units that wait for a stuck one fail first
            why = EngineError::TimedOut(join_bound()).into();
            self.stuck.store(true, Ordering::Relaxed);
        }
        self.failed.lock().get_or_insert(why);
    }

    /// Largest ubatch that takes the hot path, in tokens; 0 where slots do not pay, and while a thread of the cold engine
    /// is stuck and the device cannot do without: the stock graph needs none of them.
    pub fn max_tokens(&self) -> u32 {
        if self.judged.as_ref().is_some_and(|j| !j.lock().judge.slots()) {
            return 0;
        }
        if self.stuck.load(Ordering::Relaxed) {
            if !self.engine.is_idle() {
                return if self.rest_cpu() { self.model.max_tokens() } else { 0 };
            }
            self.stuck.store(false, Ordering::Relaxed);
            log!(
                Level::Warn,
                "moe-hot: the cold experts that were late have arrived, the slots are in use again"
            );
        }
        self.model.max_tokens()
    }

    /// The device gets all cold experts for a while; false where it cannot read them.
    fn rest_cpu(&self) -> bool {
        self.change_lanes(&mut self.lanes.lock().lanes, |l| l.rest_cpu(REST_TOKENS))
    }

    /// Changes the division, and graphs with it where they get or lose the link.
    fn change_lanes<T>(&self, lanes: &mut Lanes, change: impl FnOnce(&mut Lanes) -> T) -> T {
        let had = lanes.nodes();
        let out = change(lanes);
        if lanes.nodes() != had {
            self.graph_version.fetch_add(1, Ordering::Relaxed);
            log!(Level::Debug, "moe-hot: {lanes}");
        }
        out
    }

    /// A ubatch of `n_tokens` tokens, of one of `sequences` each, is about to be computed; whether it takes the
    /// hot path.
    ///
    /// # Errors
    /// The device could not be told where experts are: the ubatch must not be computed.
    pub fn step_begin(&self, n_tokens: u32, sequences: &[u32]) -> Result<bool, StepError> {
        // a step that was given up ends here
        self.close_step();
        let since = Instant::now();
        let hot = n_tokens <= self.max_tokens();
        self.judge(n_tokens, hot, since);
        let boundary = self.model.step_begin(self.id, hot, self.has_nodes());
        if !hot {
            self.prompt.lock().begin(n_tokens, sequences);
            return Ok(false);
        }
        let join_wait_ns = self.counters.join_wait_ns.load(Ordering::Relaxed);
        *self.running.lock() = Some(Running { since, boundary, join_wait_ns });
        self.usage.lock().begin(n_tokens, sequences);
        if let Some(port) = &self.port {
            // the version first: what changes meanwhile is copied with the next step
            let version = self.model.map_version();
            let lanes = &mut self.lanes.lock().lanes;
            lanes.begin(boundary.uploads);
            let fill = |layer: usize, map: &mut [i32]| self.model.map(layer).copy_to(map);
            port.update((version, lanes.version()), fill, lanes.tables())?;
        }
        Ok(true)
    }

    /// Changes when the graphs that were built before must not be used again.
    pub fn graph_version(&self) -> u64 {
        self.graph_version.load(Ordering::Relaxed)
    }

    /// Whether the graph of a ubatch of `n_tokens` tokens should have the nodes with which the device reads cold experts over
    /// the link.
    pub fn links(&self, n_tokens: u32) -> bool {
        n_tokens > 1 || self.lanes.lock().lanes.nodes()
    }

    /// Whether what a ubatch of `n_tokens` tokens routes on the stock graph is worth knowing: a prompt's, unless slots are
    /// not used for now.
    pub fn observes(&self, n_tokens: u32) -> bool {
        let Some(judged) = &self.judged else { return true };
        n_tokens > self.model.max_tokens() && !judged.lock().judge.is_off()
    }

    /// A step begins, and with that the one before has ended. What follows from it is for the next: the graph of this one
    /// has been built.
    fn judge(&self, n_tokens: u32, slots: bool, now: Instant) {
        let Some(judged) = &self.judged else { return };
        let Judged { judge, before } = &mut *judged.lock();
        let this = (n_tokens == 1).then_some((now, slots));
        let Some((at, slots)) = std::mem::replace(before, this) else { return };
        let took = now - at;
        if this.is_none() || took > LONGEST_STEP {
            return;
        }
        let used = judge.slots();
        let verdict = judge.observe(slots, took.as_micros() as u64);
        if judge.slots() != used {
            self.graph_version.fetch_add(1, Ordering::Relaxed);
        }
        let Some(verdict) = verdict else { return };
        if verdict.changed {
            let what = if verdict.on {
                "the slots pay again"
            } else {
                "the slots do not pay here, and are off until they do"
            };
            log!(Level::Warn, "moe-hot: {what}: {verdict}");
        }
        self.model.judged(verdict);
    }

    /// The graph of the ubatch has been launched: what need not be done before can be done now.
    pub fn step_work(&self) {
        self.model.step_work();
    }

    /// What a layer has routed in a ubatch on the stock graph: `ids`, the tokens one after the other. Layers that
    /// are not told about, or ids that are no experts, are left out.
    pub fn prompt_routed(&self, layer: usize, ids: &[i32]) {
        let n_expert = self.model.layers()[layer].n_expert;
        let experts =
            ids.iter().filter_map(|&id| u16::try_from(id).ok().filter(|id| usize::from(*id) < n_expert));
        let to = &mut self.prompt.lock().ids[layer];
        to.clear();
        to.extend(experts);
    }

    /// The ubatch has been computed, successfully or not, and its device is idle.
    ///
    /// # Errors
    /// The cold engine failed in this step: its output must not be used.
    pub fn step_end(&self) -> Result<(), StepError> {
        self.close_prompt();
        self.close_step();
        let Some(why) = self.failed.lock().take() else { return Ok(()) };
        if matches!(why, StepError::Engine(_)) {
            let without = self.rest_cpu();
            let until = match (self.stuck.load(Ordering::Relaxed), without) {
                (true, true) => "the device reads all cold experts over the link until they arrive".into(),
                (true, false) => "this context takes the stock graph until they arrive".into(),
                (false, true) => {
                    format!("the device reads all cold experts over the link for {REST_TOKENS} tokens")
                }
                (false, false) => String::new(),
            };
            if !until.is_empty() {
                log!(Level::Warn, "moe-hot: {until}");
            }
        }
        Err(why)
    }

    fn close_prompt(&self) {
        let mut prompt = self.prompt.lock();
        if !prompt.is_empty() {
            self.model.prompt_end(&prompt);
        }
        prompt.clear();
    }

    fn close_step(&self) {
        let Some(step) = self.running.lock().take() else { return };
        let mut usage = self.usage.lock();
        if let Some(port) = &self.port {
            let mut lanes = self.lanes.lock();
            let Measured { lanes, samples } = &mut *lanes;
            samples.clear();
            let waited = port.harvest(&mut usage, samples, |layer| self.engine.took_ns(layer));
            self.counters.join_wait_ns.fetch_add(waited.as_nanos() as u64, Ordering::Relaxed);
            match port.take_fault() {
                Ok(None) if samples.is_empty() => {}
                // of a step that failed the times say nothing
                Ok(None) => {
                    self.change_lanes(lanes, |l| l.observe(samples.drain(..), step.since.elapsed()));
                }
                Ok(Some(Fault::TimedOut)) => self.fail(EngineError::TimedOut(join_bound())),
                Ok(Some(Fault::RowFailed)) => self.fail(EngineError::Failed),
                Err(e) => self.fail(e),
            }
        }
        usage.hits += u64::from(usage.n_tokens) * self.uncounted;
        if usage.hits + usage.misses() > 0 {
            self.counters.steps.fetch_add(1, Ordering::Relaxed);
            self.counters.tokens.fetch_add(u64::from(usage.n_tokens), Ordering::Relaxed);
            self.counters.hits.fetch_add(usage.hits, Ordering::Relaxed);
            self.counters.misses.fetch_add(usage.misses(), Ordering::Relaxed);
            self.counters.linked.fetch_add(usage.linked, Ordering::Relaxed);
        }
        let join_wait_ns = self.counters.join_wait_ns.load(Ordering::Relaxed);
        let join_wait = Duration::from_nanos(join_wait_ns.saturating_sub(step.join_wait_ns));
        let busy_us = self.engine.busy_us();
        let told_us = self.busy_told.swap(busy_us, Ordering::Relaxed);
        let took = Took {
            step: step.since.elapsed(),
            join_wait,
            // the counter may have been reset meanwhile
            busy: Duration::from_micros(busy_us.checked_sub(told_us).unwrap_or(busy_us)),
        };
        self.model.step_end(self.id, self.has_nodes(), &usage, took);
        if let Some(log) = &self.log {
            log.lock().add(Step {
                us: took.step.as_micros() as u64,
                tokens: usage.n_tokens,
                hits: usage.hits,
                misses: usage.misses(),
                copying: step.boundary.copying,
                rebalance_us: step.boundary.rebalance_us,
                join_wait_us: join_wait.as_micros() as u64,
            });
        }
        usage.clear();
        if let Some(verify) = &self.verify {
            verify.lock().step_end(&self.model);
        }
    }

    /// Its counters; those of swaps are the model's since our reset.
    pub fn stats(&self) -> Stats {
        let c = &self.counters;
        let now = self.model.stats();
        let base = self.base.lock();
        Stats {
            steps: c.steps.load(Ordering::Relaxed),
            tokens: c.tokens.load(Ordering::Relaxed),
            hits: c.hits.load(Ordering::Relaxed),
            misses: c.misses.load(Ordering::Relaxed),
            linked: c.linked.load(Ordering::Relaxed),
            join_wait_us: c.join_wait_ns.load(Ordering::Relaxed) / 1000,
            worker_busy_us: self.engine.busy_us(),
            ..now.since(&base)
        }
    }

    /// Sets its counters to zero.
    pub fn reset_stats(&self) {
        let c = &self.counters;
        for a in [&c.steps, &c.tokens, &c.hits, &c.misses, &c.linked, &c.join_wait_ns] {
            a.store(0, Ordering::Relaxed);
        }
        self.engine.reset_busy();
        *self.base.lock() = self.model.stats();
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        self.close_step();
        self.model.detach(&self.engine);
        let stats = self.stats();
        if stats.tokens > 0 {
            log!(Level::Info, "moe-hot: {stats}");
        }
        if stats.linked > 0 {
            log!(Level::Debug, "moe-hot: {}", self.lanes.lock().lanes);
        }
        if let Some(Err(e)) = self.log.as_ref().map(|l| l.lock().write()) {
            log!(Level::Error, "moe-hot: the log of steps cannot be written: {e}");
        }
        if let Some(verify) = &self.verify {
            verify.lock().end(&self.model);
        }
    }
}
