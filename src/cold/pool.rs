//! The worker threads: they spin while decode runs and park when it stops.
//!
//! A worker takes no lock and makes no call into the driver while it spins: JOIN may be waiting for it
//! with a GPU behind it. Locks are taken only to park, to wake, and to learn of new engines.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use super::{engine::Engine, placement::run_on};
use crate::{
    fault,
    log::{Level, log},
    sync::{
        Condvar, Mutex,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
        hint,
        thread::{self, JoinHandle},
    },
};

/// How long a worker spins without work after the last step ended. Sampling, tokenising and the
/// server's own loop fit into it, so that decode finds its workers awake. loom knows no time.
const LINGER: Duration = Duration::from_millis(if cfg!(loom) { 0 } else { 2 });
/// How long the end of a pool waits for a worker that is stuck in a unit.
const END_BOUND: Duration = Duration::from_secs(5);
/// A pause takes up to 140 cycles, and a request waits for the next look. To loom a pause lets the others run.
const SPINS_PER_LOOK: u32 = if cfg!(loom) { 1 } else { 4 };

struct State {
    /// Engines to serve; `version` counts changes.
    engines: Mutex<Vec<Arc<Engine>>>,
    version: AtomicU64,
    /// Steps running now, over all contexts.
    active: AtomicU32,
    stop: AtomicBool,
    parked: Mutex<u32>,
    wake: Condvar,
}

/// Cold-engine threads of one model, shared by its contexts.
pub struct WorkerPool {
    state: Arc<State>,
    threads: Vec<JoinHandle<()>>,
}

impl WorkerPool {
    /// Starts `n` workers, on `cpus` where they are given. With 0 there are none, and the threads that run JOIN do all
    /// the work.
    ///
    /// # Errors
    /// When the system gives no thread; those already started are stopped again.
    pub fn new(n: usize, cpus: Option<&[usize]>) -> std::io::Result<Self> {
        let state = Arc::new(State {
            engines: Mutex::default(),
            version: AtomicU64::new(0),
            active: AtomicU32::new(0),
            stop: AtomicBool::new(false),
            parked: Mutex::new(0),
            wake: Condvar::new(),
        });
        let mut pool = WorkerPool { state, threads: Vec::with_capacity(n) };
        for i in 0..n {
            let state = pool.state.clone();
            let cpus = cpus.map(<[usize]>::to_vec);
            fault::io("thread")?;
            let thread = thread::Builder::new().name(format!("moe-hot-{i}"));
            pool.threads.push(thread.spawn(move || {
                if let Some(cpus) = cpus
                    && !run_on(&cpus)
                {
                    log!(Level::Debug, "moe-hot: worker {i} runs on any CPU, the system refuses {cpus:?}");
                }
                worker(&state);
            })?);
        }
        Ok(pool)
    }

    /// Number of threads.
    pub fn len(&self) -> usize {
        self.threads.len()
    }

    /// Whether there are no workers.
    pub fn is_empty(&self) -> bool {
        self.threads.is_empty()
    }

    /// Threads that are parked at the moment.
    pub fn parked(&self) -> u32 {
        *self.state.parked.lock()
    }

    /// Lets the workers serve `engine`.
    pub fn attach(&self, engine: Arc<Engine>) {
        engine.set_threads(self.len() + 1);
        self.state.engines.lock().push(engine);
        self.state.version.fetch_add(1, Ordering::Relaxed);
    }

    /// The workers forget `engine`. One that is looking through what it knows may still look at it once, which finds
    /// nothing: nobody posts to an engine that was detached.
    pub fn detach(&self, engine: &Arc<Engine>) {
        self.state.engines.lock().retain(|e| !Arc::ptr_eq(e, engine));
        self.state.version.fetch_add(1, Ordering::Relaxed);
    }

    /// A step begins: wakes the workers.
    pub fn step_begin(&self) {
        if self.is_empty() {
            return;
        }
        self.state.active.fetch_add(1, Ordering::Relaxed);
        // the lock orders this and a worker's last look before it waits: either it is counted, or it has seen the step
        if *self.state.parked.lock() > 0 {
            self.state.wake.notify_all();
        }
    }

    /// A step ended; workers park a little later if no other begins.
    pub fn step_end(&self) {
        if !self.is_empty() {
            self.state.active.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl Drop for WorkerPool {
    fn drop(&mut self) {
        self.state.stop.store(true, Ordering::Relaxed);
        {
            // under the lock, so that no worker is between its last look and its wait
            let _parked = self.state.parked.lock();
            self.state.wake.notify_all();
        }
        let start = Instant::now();
        while self.threads.iter().any(|t| !t.is_finished()) && start.elapsed() < END_BOUND {
            thread::sleep(Duration::from_micros(100));
        }
        for t in self.threads.drain(..) {
            if t.is_finished() {
                // a worker catches what its units throw; there is nothing to hand on
                let _ = t.join();
            } else {
                let name = t.thread().name().unwrap_or_default().to_string();
                log!(Level::Error, "moe-hot: worker {name} does not end, it is left behind");
            }
        }
    }
}

fn worker(state: &State) {
    let mut engines = Vec::new();
    let mut version = u64::MAX;
    let mut idle_since: Option<Instant> = None;
    while !state.stop.load(Ordering::Relaxed) {
        let now = state.version.load(Ordering::Relaxed);
        if now != version {
            engines.clone_from(&state.engines.lock());
            version = now;
        }
        let mut worked = false;
        for e in &engines {
            worked |= e.run();
        }
        if worked {
            idle_since = None;
            continue;
        }
        for _ in 0..SPINS_PER_LOOK {
            hint::spin_loop();
        }
        if state.active.load(Ordering::Relaxed) > 0 {
            idle_since = None;
        } else if idle_since.get_or_insert_with(Instant::now).elapsed() >= LINGER {
            park(state);
            idle_since = None;
        }
    }
}

fn park(state: &State) {
    let mut parked = state.parked.lock();
    *parked += 1;
    while state.active.load(Ordering::Relaxed) == 0 && !state.stop.load(Ordering::Relaxed) {
        state.wake.wait(&mut parked);
    }
    *parked -= 1;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        cold::{ColdRow, Layer},
        model_loom::{SMALL, check, expected, prepare},
    };

    fn eventually(what: &str, ok: impl Fn() -> bool) {
        let start = Instant::now();
        while !ok() {
            assert!(start.elapsed() < Duration::from_secs(20), "{what}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn workers_park_when_decode_stops_and_wake_when_it_runs() {
        let pool = WorkerPool::new(2, None).unwrap();
        eventually("park at the start", || pool.parked() == 2);
        pool.step_begin();
        eventually("wake for a step", || pool.parked() == 0);
        std::thread::sleep(LINGER * 3);
        assert_eq!(pool.parked(), 0, "no parking while a step runs");
        pool.step_end();
        eventually("park after the step", || pool.parked() == 2);
    }

    #[test]
    fn an_empty_pool_needs_no_steps() {
        let pool = WorkerPool::new(0, None).unwrap();
        pool.step_begin();
        pool.step_end();
        assert_eq!((pool.len(), pool.parked()), (0, 0));
    }

    fn engine() -> Arc<Engine> {
        let layers: Arc<[Layer]> = Arc::new([SMALL.clone()]);
        Arc::new(Engine::new(layers, 1, None))
    }

    /// A request that nobody but the workers will work on.
    fn post(engine: &Engine, expert: u32) {
        let act = vec![1.0; SMALL.n_embd()];
        // SAFETY: the request before is done, and the activations are there.
        unsafe { engine.post(0, 1, &[ColdRow { expert, token: 0, row: 0 }], |_| act.as_ptr()) };
    }

    fn wait(engine: &Engine, expert: usize) {
        while !engine.is_idle() {
            thread::yield_now();
        }
        // SAFETY: the request is done.
        let row = unsafe { engine.output(0, SMALL.n_embd()) };
        assert_eq!(row, [expected(&SMALL, expert, 1.0)].repeat(SMALL.n_embd()));
    }

    #[test]
    fn loom_a_step_finds_a_worker_whether_it_is_about_to_park_or_parked() {
        check(|| {
            let (engine, pool) = prepare(|| (engine(), WorkerPool::new(1, None).unwrap()));
            pool.attach(engine.clone());
            pool.step_begin();
            post(&engine, 1);
            wait(&engine, 1);
            pool.step_end();
            // and this is the end of a pool, which finds it as well
        });
    }

    #[test]
    fn loom_the_end_of_a_pool_ends_all_workers() {
        check(|| {
            let state = {
                let pool = WorkerPool::new(2, None).unwrap();
                pool.state.clone()
            };
            assert_eq!(Arc::strong_count(&state), 1, "no worker is left behind");
        });
    }
}
