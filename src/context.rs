//! What belongs to one llama_context: its mailbox and cold engine, the usage of the step that runs, and
//! its counters.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::{Mutex, MutexGuard};

use crate::{
    cold::{ColdRow, Engine, EngineError},
    device::{
        Device,
        cuda::{CudaError, Fault, Port, PortShape},
    },
    log::{Level, log},
    model::Model,
    telemetry::Stats,
    usage::StepUsage,
};

/// How long JOIN waits for other threads before it fails the step. A layer's cold experts take
/// milliseconds; this is for a worker that died, not for a slow one.
pub const JOIN_BOUND: Duration = Duration::from_secs(10);

/// Counters of a context since its creation or the last reset.
#[derive(Default)]
struct Counters {
    steps: AtomicU64,
    tokens: AtomicU64,
    hits: AtomicU64,
    misses: AtomicU64,
    join_wait_ns: AtomicU64,
}

/// One context. Freed before its model's pool.
pub struct Context {
    id: u64,
    model: Arc<Model>,
    engine: Arc<Engine>,
    /// Shared with the kernels when the slots are in VRAM.
    port: Option<Port>,
    usage: Mutex<StepUsage>,
    cold: Mutex<Vec<ColdRow>>,
    counters: Counters,
    /// The model's counters when ours were reset last.
    base: Mutex<Stats>,
    failed: Mutex<Option<StepError>>,
    /// Whether a ubatch on the hot path is running.
    running: Mutex<bool>,
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
        let remote = port.as_ref().map(Port::remote);
        let engine = Arc::new(Engine::new(layers.clone(), max_tokens, remote));
        model.attach(&engine);
        let usage = StepUsage::new(layers.len());
        let base = model.stats();
        Ok(Context {
            id,
            engine,
            port,
            usage: Mutex::new(usage),
            cold: Mutex::default(),
            counters: Counters::default(),
            base: Mutex::new(base),
            failed: Mutex::default(),
            running: Mutex::new(false),
            model,
        })
    }

    /// The pool it works on.
    pub fn model(&self) -> &Arc<Model> {
        &self.model
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
            return self.engine.finish(JOIN_BOUND);
        }
        let start = Instant::now();
        let ready = self.engine.finish(JOIN_BOUND);
        self.counters.join_wait_ns.fetch_add(start.elapsed().as_nanos() as u64, Ordering::Relaxed);
        ready
    }

    /// Marks the running step as failed; the first reason is kept.
    pub fn fail(&self, why: impl Into<StepError>) {
        self.failed.lock().get_or_insert(why.into());
    }

    /// A ubatch of `n_tokens` tokens is about to be computed; whether it takes the hot path, and thus has
    /// an end.
    ///
    /// # Errors
    /// The device could not be told where experts are: the ubatch must not be computed.
    pub fn step_begin(&self, n_tokens: u32) -> Result<bool, StepError> {
        // a step that was given up ends here
        self.close_step();
        let hot = n_tokens <= self.model.max_tokens();
        self.model.step_begin(self.id, hot);
        if !hot {
            return Ok(false);
        }
        *self.running.lock() = true;
        self.usage.lock().n_tokens = n_tokens;
        if let Some(port) = &self.port {
            // the version first: what changes meanwhile is copied with the next step
            let version = self.model.map_version();
            port.update_map(version, |layer, map| self.model.map(layer).copy_to(map))?;
        }
        Ok(true)
    }

    /// The ubatch has been computed, successfully or not, and its device is idle.
    ///
    /// # Errors
    /// The cold engine failed in this step: its output must not be used.
    pub fn step_end(&self) -> Result<(), StepError> {
        self.close_step();
        match self.failed.lock().take() {
            Some(why) => Err(why),
            None => Ok(()),
        }
    }

    fn close_step(&self) {
        if !std::mem::take(&mut *self.running.lock()) {
            return;
        }
        let mut usage = self.usage.lock();
        if let Some(port) = &self.port {
            let waited = port.harvest(&mut usage);
            self.counters.join_wait_ns.fetch_add(waited.as_nanos() as u64, Ordering::Relaxed);
            match port.take_fault() {
                Ok(None) => {}
                Ok(Some(Fault::TimedOut)) => self.fail(EngineError::TimedOut(JOIN_BOUND)),
                Ok(Some(Fault::RowFailed)) => self.fail(EngineError::Failed),
                Err(e) => self.fail(e),
            }
        }
        if !usage.is_empty() {
            self.counters.steps.fetch_add(1, Ordering::Relaxed);
            self.counters.tokens.fetch_add(u64::from(usage.n_tokens), Ordering::Relaxed);
            self.counters.hits.fetch_add(usage.hits, Ordering::Relaxed);
            self.counters.misses.fetch_add(usage.misses, Ordering::Relaxed);
        }
        self.model.step_end(self.id, &usage);
        usage.clear();
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
            join_wait_us: c.join_wait_ns.load(Ordering::Relaxed) / 1000,
            worker_busy_us: self.engine.busy_us(),
            ..now.since(&base)
        }
    }

    /// Sets its counters to zero.
    pub fn reset_stats(&self) {
        let c = &self.counters;
        for a in [&c.steps, &c.tokens, &c.hits, &c.misses, &c.join_wait_ns] {
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
    }
}
