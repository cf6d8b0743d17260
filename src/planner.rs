//! Lets the policies work while the device computes.
//!
//! What a step routed and the wish for a plan are queued at step boundaries, which must be short, and
//! are worked off by [`Planner::work`], which the bridge calls once the ubatch's graph has been launched:
//! the calling thread has nothing else to do until the device is done. A plan that is wished for at a
//! boundary takes effect at the next one, however long the policy takes, so a replay decides as the run
//! did; when it is not made by then, the boundary makes it, and nothing else: what was routed since can wait.
//!
//! A prompt on the stock graph keeps the calling thread, which copies experts layer by layer, but no other: there a
//! thread of its own does the work ([`Planner::work_aside`]).

use std::{
    collections::VecDeque,
    sync::Arc,
    thread::{Builder, JoinHandle},
    time::Instant,
};

use crate::{
    log::{Level, log},
    policy::{Key, Limits, Policy, PoolShape, Routed, Swap},
    sync::{
        Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
    warm::Keeper,
};

/// Which steps a record of routing is of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase {
    /// Decoded through the slots.
    Decode,
    /// A ubatch of a prompt, on the stock graph.
    Prompt,
}

/// What a ubatch routed.
#[derive(Clone, Debug)]
pub struct Observed {
    /// Which kind of ubatch.
    pub phase: Phase,
    /// Tokens.
    pub n_tokens: u32,
    /// Sequence of each token; empty when all are of one.
    pub sequences: Vec<u32>,
    /// `ids[layer]`, over the layers of all classes: experts routed, tokens one after the other.
    pub ids: Vec<Vec<u16>>,
}

/// What one class would like to know.
#[derive(Clone, Debug)]
pub struct Request {
    /// What each slot is assigned to, copies in flight included.
    pub slots: Vec<Option<Key>>,
    /// What the plan may cost.
    pub limits: Limits,
}

enum Event {
    Observed(Observed),
    Plan(Vec<Request>),
}

/// The policy of a class.
pub struct ClassPolicy {
    /// Its layers, as indices into [`Observed::ids`].
    pub layers: Vec<usize>,
    /// What it is for.
    pub shape: PoolShape,
    /// Decides.
    pub policy: Box<dyn Policy>,
}

struct Worker {
    classes: Vec<ClassPolicy>,
    /// The plan that was made last and not taken yet, by class.
    plan: Option<Vec<Vec<Swap>>>,
    /// Counts for the next run.
    keeper: Option<Keeper>,
    /// Whether it has been said that a policy gave up.
    told: bool,
    // scratch
    ids: Vec<Vec<u16>>,
}

struct Shared {
    queue: Mutex<VecDeque<Event>>,
    /// Locked before `queue`, for as long as a policy works.
    worker: Mutex<Worker>,
    worked_us: AtomicU64,
}

/// The policies of a model's classes, and what they have not been told yet.
pub struct Planner {
    shared: Arc<Shared>,
    /// The thread of [`Planner::work_aside`].
    aside: Mutex<Option<JoinHandle<()>>>,
}

impl Planner {
    /// With the policies of all classes, and who counts for the next run.
    pub fn new(classes: Vec<ClassPolicy>, keeper: Option<Keeper>) -> Self {
        let worker = Worker { classes, plan: None, keeper, told: false, ids: Vec::new() };
        let shared =
            Shared { queue: Mutex::default(), worker: Mutex::new(worker), worked_us: AtomicU64::new(0) };
        Planner { shared: Arc::new(shared), aside: Mutex::new(None) }
    }

    /// Tells the policy of a class the uses by token that an earlier run found, before anything is observed.
    pub fn warm(&self, class: usize, uses: impl Iterator<Item = (Key, f32)>) {
        let ClassPolicy { shape, policy, .. } = &mut self.shared.worker.lock().classes[class];
        let mut heat = vec![0.0; shape.n_keys()];
        for (key, uses) in uses {
            heat[shape.index(key)] = uses;
        }
        policy.warm(&heat);
    }

    /// Tells the policies what a ubatch routed.
    pub fn observe(&self, observed: Observed) {
        self.shared.queue.lock().push_back(Event::Observed(observed));
    }

    /// Wishes for a plan, one request by class, made from what has been observed so far.
    pub fn request(&self, requests: Vec<Request>) {
        self.shared.queue.lock().push_back(Event::Plan(requests));
    }

    /// Does all that is queued.
    pub fn work(&self) {
        drop(self.shared.work(|_| false));
    }

    /// Has a thread of its own do all that is queued. What is queued later the next who works does, if not that thread.
    pub fn work_aside(&self) {
        let mut aside = self.aside.lock();
        if aside.as_ref().is_some_and(|thread| !thread.is_finished()) {
            return;
        }
        let shared = self.shared.clone();
        // without a thread the next who works does it
        *aside = Builder::new().name("moe-hot-plan".into()).spawn(move || drop(shared.work(|_| false))).ok();
    }

    /// The plan that was wished for, by class; makes it when it is not there yet. `None` without a wish.
    pub fn take(&self) -> Option<Vec<Vec<Swap>>> {
        self.shared.work(|worker| worker.plan.is_some()).plan.take()
    }

    /// Another policy for all classes: what it is to know it learns from now on. What was queued is for the one before.
    pub fn replace(&self, build: impl Fn(PoolShape) -> Box<dyn Policy>, n_slots: &[usize]) {
        self.work();
        let mut worker = self.shared.worker.lock();
        for (class, n_slots) in worker.classes.iter_mut().zip(n_slots) {
            class.shape.n_slots = *n_slots as u32;
            class.policy = build(class.shape);
        }
        worker.told = false;
    }

    /// Whether all policies have found that swaps gain nothing.
    pub fn gave_up(&self) -> bool {
        self.shared.worker.lock().classes.iter().all(|c| c.policy.gave_up())
    }

    /// Writes the profile of the run now; where it is.
    ///
    /// # Errors
    /// Says that there is none, or why it cannot be written.
    pub fn save_profile(&self) -> Result<String, String> {
        self.work();
        let keeper = &mut self.shared.worker.lock().keeper;
        let keeper = keeper.as_mut().ok_or("there is no --moe-hot-profile-out to save to")?;
        keeper.save().map(|path| path.display().to_string())
    }

    /// Time that the policies have worked, in us.
    pub fn worked_us(&self) -> u64 {
        self.shared.worked_us.load(Ordering::Relaxed)
    }
}

impl Drop for Planner {
    fn drop(&mut self) {
        // a profile is written where the policies end: not in a thread that the end of the process would cut off
        if let Some(thread) = self.aside.lock().take() {
            _ = thread.join();
        }
    }
}

impl Shared {
    /// Works on what is queued, in its order, until there is no more of it or `enough` says so.
    fn work(&self, enough: impl Fn(&Worker) -> bool) -> MutexGuard<'_, Worker> {
        let mut worker = self.worker.lock();
        let start = Instant::now();
        let mut worked = false;
        while !enough(&worker) {
            // not held while a policy works: boundaries of other contexts add to it
            let Some(event) = self.queue.lock().pop_front() else { break };
            worker.handle(event);
            worked = true;
        }
        if worked {
            self.worked_us.fetch_add(start.elapsed().as_micros() as u64, Ordering::Relaxed);
        }
        worker
    }
}

impl Worker {
    fn handle(&mut self, event: Event) {
        match event {
            Event::Observed(o) => self.observe(&o),
            Event::Plan(requests) => {
                let plan = |(class, request): (&mut ClassPolicy, Request)| {
                    let mut swaps = Vec::new();
                    class.policy.plan(&request.slots, request.limits, &mut swaps);
                    swaps
                };
                self.plan = Some(self.classes.iter_mut().zip(requests).map(plan).collect());
                if !self.told && self.classes.iter().any(|c| c.policy.gave_up()) {
                    self.told = true;
                    log!(
                        Level::Info,
                        "moe-hot: all experts are used alike, swaps gain nothing: the slots keep what they have until \
                         that changes"
                    );
                }
            }
        }
    }

    fn observe(&mut self, o: &Observed) {
        if let Some(keeper) = &mut self.keeper {
            keeper.observe(o.n_tokens, &o.ids);
        }
        for class in &mut self.classes {
            self.ids.resize_with(class.layers.len(), Vec::new);
            for (ids, &layer) in self.ids.iter_mut().zip(&class.layers) {
                ids.clone_from(&o.ids[layer]);
            }
            let routed = Routed { n_tokens: o.n_tokens, sequences: &o.sequences, ids: &self.ids };
            match o.phase {
                Phase::Decode => class.policy.observe(routed),
                Phase::Prompt => class.policy.observe_prompt(routed),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{
        model_loom::check,
        policy::{PolicyKind, build},
        sync::thread,
    };

    fn planner(n_classes: usize) -> Planner {
        let shape = PoolShape { n_layers: 1, n_expert: 8, n_used: 2, n_slots: 2, expert_bytes: 1 };
        let class = |layer| ClassPolicy { layers: vec![layer], shape, policy: build(PolicyKind::Lru, shape) };
        Planner::new((0..n_classes).map(class).collect(), None)
    }

    fn routed(ids: &[&[u16]]) -> Observed {
        let ids = ids.iter().map(|i| i.to_vec()).collect();
        Observed { phase: Phase::Decode, n_tokens: 1, sequences: vec![], ids }
    }

    fn request() -> Request {
        Request { slots: vec![None; 2], limits: Limits { max_swaps: 2 } }
    }

    fn admitted(plan: &[Swap]) -> Vec<u16> {
        let mut admitted: Vec<u16> = plan.iter().map(|s| s.admit.expert).collect();
        admitted.sort_unstable();
        admitted
    }

    #[test]
    fn a_plan_is_made_from_what_was_observed_before_the_wish() {
        for worked_before_the_end in [false, true] {
            let p = planner(1);
            p.observe(routed(&[&[1, 2]]));
            p.request(vec![request()]);
            if worked_before_the_end {
                p.work();
            }
            p.observe(routed(&[&[5, 6]]));
            let plan = p.take().expect("was wished for");
            assert_eq!(admitted(&plan[0]), [1, 2]);
            assert_eq!(p.shared.queue.lock().len(), 1, "a boundary does no more than it must");
            assert!(p.take().is_none(), "taken once");
        }
    }

    #[test]
    fn a_thread_of_its_own_does_what_is_queued() {
        let p = planner(1);
        for ids in [&[1, 2], &[3, 4]] {
            p.observe(routed(&[ids]));
            p.work_aside();
            let thread = p.aside.lock().take().expect("a thread");
            thread.join().unwrap();
            assert!(p.shared.queue.lock().is_empty());
        }
        p.request(vec![request()]);
        assert_eq!(admitted(&p.take().expect("was wished for")[0]), [3, 4]);
    }

    #[test]
    fn each_class_sees_its_own_layers() {
        let p = planner(2);
        p.observe(routed(&[&[1, 2], &[3, 4]]));
        p.request(vec![request(), request()]);
        let plan = p.take().unwrap();
        assert_eq!((admitted(&plan[0]), admitted(&plan[1])), (vec![1, 2], vec![3, 4]));
    }

    #[test]
    fn loom_a_plan_that_was_wished_for_is_there_whoever_makes_it() {
        check(|| {
            let p = Arc::new(planner(1));
            let other = p.clone();
            // another context, whose graph has been launched
            let other = thread::spawn(move || {
                other.work();
                other.observe(routed(&[&[5, 6]]));
            });
            p.observe(routed(&[&[1, 2]]));
            p.request(vec![request()]);
            let plan = p.take().expect("was wished for");
            other.join().unwrap();
            let admitted = admitted(&plan[0]);
            assert!(admitted == [1, 2] || admitted == [5, 6], "of what was observed last: {admitted:?}");
            assert!(p.take().is_none(), "taken once");
        });
    }
}
