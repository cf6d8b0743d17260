//! Replays a recorded routing against a policy: the same objects as in the server, the optimum and the
//! best fixed set beside them.
//!
//! As in the server, a plan is made beside a ubatch, once enough tokens were decoded before it, and takes
//! effect at the next boundary: the experts that leave are cold from there on, those that come are copied
//! during that ubatch and hot after it. At the boundary before a ubatch therefore, in this order: what was
//! copied during the last one is hot; the swaps planned beside the last one take effect; and the policy
//! plans the next ones, with the slots as they are then and all that was used so far. It plans at once
//! before the first decoded ubatch after a prompt, too.

use std::{
    collections::{BTreeMap, BinaryHeap},
    ops::AddAssign,
};

use crate::{
    policy::{self, Key, Limits, Policy, PolicySpec, PoolShape, Routed, Swap},
    trace::{Step, TraceError, TraceHeader, TraceReader, TraceRecord},
};

/// A trace in memory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Routing {
    /// What it is about.
    pub header: TraceHeader,
    /// Routing by ubatch.
    pub steps: Vec<Step>,
    /// The swaps of the run that was recorded, with the number of steps before each.
    pub swaps: Vec<(usize, u16, Swap)>,
    /// Changes of the run's pools: the number of steps before each, class, slots.
    pub opens: Vec<(usize, u16, u32)>,
}

impl Routing {
    /// Reads all of a trace.
    ///
    /// # Errors
    /// Any [`TraceError`].
    pub fn read(reader: TraceReader) -> Result<Self, TraceError> {
        let header = reader.header().clone();
        let mut routing = Routing { header, steps: Vec::new(), swaps: Vec::new(), opens: Vec::new() };
        for record in reader {
            match record? {
                TraceRecord::Routed(step) => routing.steps.push(step),
                TraceRecord::Swap { class, swap } => routing.swaps.push((routing.steps.len(), class, swap)),
                TraceRecord::Open { class, n_slots } => {
                    routing.opens.push((routing.steps.len(), class, n_slots))
                }
            }
        }
        Ok(routing)
    }

    /// The steps that were decoded.
    fn decoded(&self) -> impl Iterator<Item = &Step> {
        self.steps.iter().filter(|s| !s.prefill)
    }

    /// Tokens that were decoded.
    pub fn n_tokens(&self) -> u64 {
        self.decoded().map(|s| u64::from(s.n_tokens)).sum()
    }

    /// Tokens of prompts.
    pub fn n_prompt_tokens(&self) -> u64 {
        self.steps.iter().filter(|s| s.prefill).map(|s| u64::from(s.n_tokens)).sum()
    }

    /// Uses of each expert by layer, in decode.
    pub fn counts(&self) -> Vec<Vec<u64>> {
        let mut counts: Vec<_> =
            self.header.layers.iter().map(|l| vec![0; usize::from(l.n_expert)]).collect();
        for step in self.decoded() {
            for (counts, ids) in counts.iter_mut().zip(&step.ids) {
                for id in ids {
                    counts[usize::from(*id)] += 1;
                }
            }
        }
        counts
    }

    /// The layers of each class that has any, as indices into the header's.
    fn classes(&self) -> BTreeMap<u16, Vec<usize>> {
        let mut classes: BTreeMap<u16, Vec<usize>> = BTreeMap::new();
        for (i, l) in self.header.layers.iter().enumerate() {
            classes.entry(l.class).or_default().push(i);
        }
        classes
    }

    fn shape(&self, layers: &[usize], k: u32) -> PoolShape {
        let max = |f: fn(&crate::trace::TraceLayer) -> u16| {
            layers.iter().map(|l| f(&self.header.layers[*l])).max().unwrap_or(0)
        };
        let n_expert = max(|l| l.n_expert);
        PoolShape {
            n_layers: layers.len() as u16,
            n_expert,
            n_used: max(|l| l.n_used),
            n_slots: k.min(u32::from(n_expert)) * layers.len() as u32,
            expert_bytes: layers.iter().map(|l| self.expert_bytes(*l)).max().unwrap_or(0),
        }
    }

    /// Bytes of an expert of a layer, all its matrices.
    fn expert_bytes(&self, layer: usize) -> u64 {
        self.header.layers[layer].expert_bytes
    }
}

/// What a replay counted, of decode alone.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Outcome {
    /// Ubatches.
    pub steps: u64,
    /// Tokens.
    pub tokens: u64,
    /// Uses of an expert that had a slot.
    pub hits: u64,
    /// Uses of one that had none: reads from host memory.
    pub misses: u64,
    /// Experts without a slot, each counted once a ubatch and layer however many of its tokens used it.
    pub cold: u64,
    /// Layers with an expert without a slot, summed over the ubatches.
    pub cold_layers: u64,
    /// Experts copied into a slot.
    pub uploads: u64,
    /// Bytes read from host memory, for cold experts and for uploads.
    pub bytes: u64,
}

impl Outcome {
    fn of(routing: &Routing) -> Self {
        let steps = routing.decoded().count() as u64;
        Outcome { steps, tokens: routing.n_tokens(), ..Outcome::default() }
    }

    /// Share of uses that found a slot.
    pub fn hit_rate(&self) -> f64 {
        self.hits as f64 / (self.hits + self.misses).max(1) as f64
    }

    /// Uses without a slot by token.
    pub fn cold_per_token(&self) -> f64 {
        self.misses as f64 / self.tokens.max(1) as f64
    }

    /// Hits that an upload brought; none without uploads.
    pub fn hits_per_upload(&self) -> Option<f64> {
        (self.uploads > 0).then(|| self.hits as f64 / self.uploads as f64)
    }

    /// Bytes read from host memory by token.
    pub fn bytes_per_token(&self) -> f64 {
        self.bytes as f64 / self.tokens.max(1) as f64
    }

    fn read(&mut self, n_bytes: u64) {
        self.bytes += n_bytes;
    }
}

impl AddAssign for Outcome {
    /// Sums over traces.
    fn add_assign(&mut self, o: Outcome) {
        self.steps += o.steps;
        self.tokens += o.tokens;
        self.hits += o.hits;
        self.misses += o.misses;
        self.cold += o.cold;
        self.cold_layers += o.cold_layers;
        self.uploads += o.uploads;
        self.bytes += o.bytes;
    }
}

/// The uses of one pool: what is hot, and the counts of what is not.
struct Residence {
    shape: PoolShape,
    /// Index into the header's layers of each of the pool's.
    layers: Vec<usize>,
    /// Bytes of an expert of each of the pool's layers.
    bytes: Vec<u64>,
    hot: Vec<bool>,
    /// Step of the last cold use, from 1: tells the first use in a ubatch from the others.
    cold_at: Vec<u32>,
}

impl Residence {
    fn new(routing: &Routing, shape: PoolShape, layers: Vec<usize>) -> Self {
        let bytes = layers.iter().map(|l| routing.expert_bytes(*l)).collect();
        Residence { shape, layers, bytes, hot: vec![false; shape.n_keys()], cold_at: vec![0; shape.n_keys()] }
    }

    fn set(&mut self, key: Key, hot: bool) {
        self.hot[self.shape.index(key)] = hot;
    }

    fn bytes_of(&self, layer: u16) -> u64 {
        self.bytes[usize::from(layer)]
    }

    /// Counts the uses of step `at`.
    fn count(&mut self, at: usize, step: &Step, out: &mut Outcome) {
        let n_expert = usize::from(self.shape.n_expert);
        for (i, layer) in self.layers.iter().enumerate() {
            let ids = &step.ids[*layer];
            let (mut misses, mut cold) = (0, 0);
            let hot = &self.hot[i * n_expert..][..n_expert];
            let cold_at = &mut self.cold_at[i * n_expert..][..n_expert];
            for id in ids {
                let id = usize::from(*id);
                if !hot[id] {
                    misses += 1;
                    cold += u64::from(std::mem::replace(&mut cold_at[id], at as u32 + 1) != at as u32 + 1);
                }
            }
            out.misses += misses;
            out.hits += ids.len() as u64 - misses;
            out.cold += cold;
            out.cold_layers += u64::from(cold > 0);
            out.read(cold * self.bytes_of(i as u16));
        }
    }
}

/// The slots of one class during a replay.
struct Pool {
    class: u16,
    residence: Residence,
    policy: Box<dyn Policy>,
    slots: Vec<Option<Key>>,
    /// Swaps that take effect at the next boundary.
    pending: Vec<Swap>,
    /// Swaps whose copy runs during the current ubatch.
    copying: Vec<Swap>,
    uses_since_plan: u64,
    /// Routing of the pool's layers, when they do not lie side by side in the trace.
    gathered: Vec<Vec<u16>>,
    /// Sequence of each token of the current ubatch.
    sequences: Vec<u32>,
}

impl Pool {
    /// What was copied during the last ubatch is hot.
    fn publish(&mut self, out: &mut Outcome) {
        for s in self.copying.drain(..) {
            self.residence.set(s.admit, true);
            out.uploads += 1;
            out.read(self.residence.bytes_of(s.admit.layer));
        }
    }

    /// Starts the swaps that were planned beside the last ubatch.
    fn take_effect(&mut self, mut told: impl FnMut(&Swap)) {
        for s in &self.pending {
            told(s);
            if let Some(old) = s.evict {
                self.residence.set(old, false);
            }
            self.slots[s.slot as usize] = Some(s.admit);
        }
        self.copying.append(&mut self.pending);
    }

    /// The pool has `n_slots` slots from now on.
    fn open(&mut self, n_slots: usize) {
        let n_slots = n_slots.min(self.residence.hot.len());
        for key in self.slots.drain(n_slots.min(self.slots.len())..).flatten() {
            self.residence.set(key, false);
        }
        self.slots.resize(n_slots, None);
        let open = |s: &Swap| (s.slot as usize) < n_slots;
        self.pending.retain(open);
        self.copying.retain(open);
    }

    fn observe(&mut self, step: &Step) {
        let layers = &self.residence.layers;
        let (first, n) = (layers.first().copied().unwrap_or(0), layers.len());
        let ids = if layers.last().is_none_or(|l| l + 1 == first + n) {
            &step.ids[first..first + n]
        } else {
            self.gathered.resize_with(n, Vec::new);
            for (to, layer) in self.gathered.iter_mut().zip(layers) {
                to.clone_from(&step.ids[*layer]);
            }
            &self.gathered
        };
        step.sequences(&mut self.sequences);
        let routed = Routed { n_tokens: step.n_tokens, sequences: &self.sequences, ids };
        if step.prefill { self.policy.observe_prompt(routed) } else { self.policy.observe(routed) }
    }
}

/// Replays `routing` with `k` slots a layer and a plan every `interval` tokens. `plan` is told of every
/// swap as it takes effect: steps before it, class, swap.
pub fn replay(
    routing: &Routing,
    policy: impl Into<PolicySpec>,
    k: u32,
    interval: u32,
    plan: impl FnMut(usize, u16, &Swap),
) -> Outcome {
    let spec = policy.into();
    replay_with(routing, &|shape| policy::build(spec, shape), k, interval, plan)
}

/// As [`replay`], with the policy that `make` gives for each pool: for policies that have no name.
pub fn replay_with(
    routing: &Routing,
    make: &dyn Fn(PoolShape) -> Box<dyn Policy>,
    k: u32,
    interval: u32,
    mut plan: impl FnMut(usize, u16, &Swap),
) -> Outcome {
    let mut pools: Vec<Pool> = Vec::new();
    for (class, layers) in routing.classes() {
        let shape = routing.shape(&layers, k);
        // as the run does: with room for all, all are there from the start
        let keys = policy::all_keys(layers.iter().map(|l| routing.header.layers[*l].n_expert.into()));
        let mut residence = Residence::new(routing, shape, layers);
        let mut slots = vec![None; shape.n_slots as usize];
        if keys.len() <= slots.len() {
            for (slot, key) in slots.iter_mut().zip(keys) {
                *slot = Some(key);
                residence.set(key, true);
            }
        }
        pools.push(Pool {
            class,
            residence,
            policy: make(shape),
            slots,
            pending: Vec::new(),
            copying: Vec::new(),
            uses_since_plan: 0,
            gathered: Vec::new(),
            sequences: Vec::new(),
        });
    }
    let mut out = Outcome::of(routing);
    let mut since_plan = 0;
    let mut prompt_since_plan = false;
    // what the run did to its pools says nothing about pools of other sizes
    let mut opens = routing.opens.iter().filter(|_| k == routing.header.k).peekable();
    for (at, step) in routing.steps.iter().enumerate() {
        while let Some((_, class, n_slots)) = opens.next_if(|(before, ..)| *before <= at) {
            if let Some(pool) = pools.get_mut(usize::from(*class)) {
                pool.open(*n_slots as usize);
            }
        }
        let planning = since_plan >= interval || (prompt_since_plan && !step.prefill);
        for p in &mut pools {
            let class = p.class;
            p.publish(&mut out);
            p.take_effect(|s| plan(at, class, s));
            if planning {
                let uses = std::mem::take(&mut p.uses_since_plan);
                let limits = Limits::after(uses, routing.header.uses_per_upload);
                p.policy.plan(&p.slots, limits, &mut p.pending);
            }
            p.uses_since_plan += p.residence.layers.iter().map(|l| step.ids[*l].len() as u64).sum::<u64>();
            if !step.prefill {
                p.residence.count(at, step, &mut out);
            }
            p.observe(step);
        }
        if planning {
            (since_plan, prompt_since_plan) = (0, false);
        }
        since_plan += if step.prefill { 0 } else { step.n_tokens };
        prompt_since_plan |= step.prefill;
    }
    out
}

/// The best set that never changes, chosen in hindsight: the experts that the whole trace uses most have
/// the class's slots from the start, and nothing is copied. What a profile of this very text would do. Has
/// its experts before their first use, so on a short trace it can be ahead of the optimum.
pub fn hindsight(routing: &Routing, k: u32) -> Outcome {
    let mut out = Outcome::of(routing);
    let counts = routing.counts();
    for layers in routing.classes().into_values() {
        let shape = routing.shape(&layers, k);
        let mut keys = policy::all_keys(layers.iter().map(|l| counts[*l].len()));
        keys.sort_by_key(|key| {
            std::cmp::Reverse(counts[layers[usize::from(key.layer)]][usize::from(key.expert)])
        });
        let mut residence = Residence::new(routing, shape, layers);
        keys.iter().take(shape.n_slots as usize).for_each(|key| residence.set(*key, true));
        for (at, step) in routing.decoded().enumerate() {
            residence.count(at, step, &mut out);
        }
    }
    out
}

/// Whose slots the optimum may use for an expert.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Scope {
    /// Each layer has K slots.
    Layer,
    /// The layers of a class share theirs.
    Pool,
}

/// Belady's optimum with bypass: knows the future, copies for free and at once. An expert used several
/// times in one ubatch of a layer is read once. Its bytes are those of the cold experts alone.
pub fn optimum(routing: &Routing, k: u32, scope: Scope) -> Outcome {
    let mut out = Outcome::of(routing);
    for class in routing.classes().into_values() {
        match scope {
            Scope::Pool => optimum_of(routing, &class, k, &mut out),
            Scope::Layer => {
                class.iter().for_each(|l| optimum_of(routing, &[*l], k, &mut out));
            }
        }
    }
    out
}

/// Uses of an expert in one ubatch.
struct Use {
    /// By [`PoolShape::index`].
    key: u32,
    n: u16,
    /// The first of its ubatch and layer.
    first: bool,
}

/// No later use.
const NEVER: u32 = u32::MAX;

fn optimum_of(routing: &Routing, layers: &[usize], k: u32, out: &mut Outcome) {
    let shape = routing.shape(layers, k);
    let n_uses = routing.decoded().map(|s| layers.iter().map(|l| s.ids[*l].len()).sum::<usize>()).sum();
    let mut uses: Vec<Use> = Vec::with_capacity(n_uses);
    let mut ids = Vec::new();
    for step in routing.decoded() {
        for (i, layer) in layers.iter().enumerate() {
            ids.clone_from(&step.ids[*layer]);
            ids.sort_unstable();
            for (j, run) in ids.chunk_by(|a, b| a == b).enumerate() {
                let key = shape.index(Key { layer: i as u16, expert: run[0] }) as u32;
                uses.push(Use { key, n: run.len() as u16, first: j == 0 });
            }
        }
    }
    // the position of the next use of the same expert
    let mut next = vec![NEVER; uses.len()];
    let mut seen = vec![NEVER; shape.n_keys()];
    for (i, u) in uses.iter().enumerate().rev() {
        next[i] = std::mem::replace(&mut seen[u.key as usize], i as u32);
    }
    // Residents by their next use, the latest on top. One that is used goes on with a later entry; the old
    // one stays below all that live, as its time has passed, until they are sorted out.
    let n_slots = shape.n_slots as usize;
    let mut by_next: BinaryHeap<(u32, u32)> = BinaryHeap::with_capacity(2 * n_slots + 64);
    let mut resident = vec![false; shape.n_keys()];
    let mut n_resident = 0;
    let mut layer_is_cold = false;
    for (i, (u, next)) in uses.iter().zip(next).enumerate() {
        let key = u.key as usize;
        layer_is_cold &= !u.first;
        let hit = resident[key];
        if hit {
            out.hits += u64::from(u.n);
        } else {
            out.misses += u64::from(u.n);
            out.cold += 1;
            out.cold_layers += u64::from(!std::mem::replace(&mut layer_is_cold, true));
            out.read(routing.expert_bytes(layers[usize::from(shape.key(key).layer)]));
        }
        if next == NEVER {
            n_resident -= usize::from(std::mem::take(&mut resident[key]));
            continue;
        }
        if !hit {
            resident[key] = true;
            n_resident += 1;
            out.uploads += 1;
        }
        by_next.push((next, u.key));
        if n_resident > n_slots
            && let Some((_, last)) = by_next.pop()
        {
            resident[last as usize] = false;
            n_resident -= 1;
            // bypass: what was just read is not kept, so it was not uploaded
            out.uploads -= u64::from(last == u.key);
        }
        if by_next.len() > 2 * n_slots + 63 {
            by_next.retain(|(next, _)| *next > i as u32);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{policy::PolicyKind, trace::TraceLayer};

    fn routing(n_layers: u16, n_expert: u16, steps: Vec<Vec<Vec<u16>>>) -> Routing {
        let layer = |il| TraceLayer { il, n_expert, n_used: 2, class: 0, expert_bytes: 10 };
        Routing {
            header: TraceHeader {
                fingerprint: 0,
                k: 1,
                uses_per_upload: 64,
                layers: (0..n_layers).map(layer).collect(),
            },
            steps: steps.into_iter().map(|ids| Step { n_tokens: 1, ids, ..Step::default() }).collect(),
            opens: Vec::new(),
            swaps: vec![],
        }
    }

    #[test]
    fn a_plan_takes_effect_a_ubatch_later_and_its_copy_takes_another() {
        let r = routing(1, 4, vec![vec![vec![1]]; 5]);
        let mut planned = vec![];
        let o = replay(&r, PolicyKind::Lru, 1, 1, |at, _, s| planned.push((at, *s)));
        // used in step 0, planned beside step 1, copied during step 2, hot from step 3
        assert_eq!(planned, [(2, Swap { slot: 0, evict: None, admit: Key { layer: 0, expert: 1 } })]);
        let expected = Outcome {
            steps: 5,
            tokens: 5,
            hits: 2,
            misses: 3,
            cold: 3,
            cold_layers: 3,
            uploads: 1,
            bytes: 40,
        };
        assert_eq!(o, expected);
    }

    #[test]
    fn who_leaves_is_cold_when_the_plan_takes_effect_and_not_before() {
        let steps = [1, 1, 1, 2, 1, 1, 1].map(|e| vec![vec![e]]).to_vec();
        let mut hot = vec![];
        for n in 1..=steps.len() {
            hot.push(replay(&routing(1, 4, steps[..n].to_vec()), PolicyKind::Lru, 1, 1, |_, _, _| {}).hits);
        }
        // 1 is hot from step 3; 2, used there, is planned beside step 4, where 1 is still hot; 1 is cold in
        // step 5, when 2 is copied, and in step 6, beside which it is copied again
        assert_eq!(hot, [0, 0, 0, 0, 1, 1, 1]);
    }

    /// Notes the slots that each of its plans sees; admits expert by expert.
    struct Diary(std::sync::mpsc::Sender<(u16, Vec<Option<Key>>)>, u16);

    impl Policy for Diary {
        fn name(&self) -> &'static str {
            "diary"
        }

        fn observe(&mut self, _routed: Routed<'_>) {
            self.1 += 1;
        }

        fn observe_prompt(&mut self, _routed: Routed<'_>) {}

        fn plan(&mut self, slots: &[Option<Key>], _limits: Limits, out: &mut Vec<Swap>) {
            self.0.send((self.1, slots.to_vec())).unwrap();
            out.push(Swap { slot: 0, evict: slots[0], admit: Key { layer: 0, expert: self.1 } });
        }
    }

    #[test]
    fn a_plan_sees_the_slots_with_the_plan_before_it_and_all_uses_before_its_ubatch() {
        let r = routing(1, 8, vec![vec![vec![0]]; 6]);
        let (tx, rx) = std::sync::mpsc::channel();
        let o = replay_with(&r, &|_| Box::new(Diary(tx.clone(), 0)), 1, 2, |_, _, _| {});
        let key = |expert| vec![Some(Key { layer: 0, expert })];
        assert_eq!(rx.try_iter().collect::<Vec<_>>(), [(2, vec![None]), (4, key(2))]);
        // the first arrived before step 4; the second would have after the end
        assert_eq!(o.uploads, 1);
        let o = replay_with(&r, &|_| Box::new(Diary(tx.clone(), 0)), 1, 1, |_, _, _| {});
        let seen: Vec<_> = rx.try_iter().collect();
        assert_eq!(seen, [(1, vec![None]), (2, key(1)), (3, key(2)), (4, key(3)), (5, key(4))]);
        // each arrived as the next one took its slot
        assert_eq!(o.uploads, 3);
    }

    #[test]
    fn the_optimum_bypasses_what_is_not_used_again() {
        let steps = [1, 2, 1, 3, 1].map(|e| vec![vec![e]]).to_vec();
        let o = optimum(&routing(1, 4, steps), 1, Scope::Pool);
        let expected = Outcome {
            steps: 5,
            tokens: 5,
            hits: 2,
            misses: 3,
            cold: 3,
            cold_layers: 3,
            uploads: 1,
            bytes: 30,
        };
        assert_eq!(o, expected);
    }

    #[test]
    fn a_shared_pool_can_give_one_layer_more_than_its_share() {
        let steps = (0..40).map(|i| vec![vec![i % 2], vec![0]]).collect();
        let r = routing(2, 3, steps);
        assert!(optimum(&r, 1, Scope::Pool).hits <= optimum(&r, 2, Scope::Layer).hits);
        assert!(optimum(&r, 1, Scope::Pool).hits >= optimum(&r, 1, Scope::Layer).hits);
    }

    /// Two classes whose layers take turns, so that none lies side by side.
    fn interleaved(steps: Vec<Vec<Vec<u16>>>) -> Routing {
        let mut r = routing(4, 8, steps);
        r.header.layers.iter_mut().enumerate().for_each(|(l, layer)| layer.class = l as u16 % 2);
        r
    }

    /// Hands on what it is told, and plans nothing.
    struct Listener(std::sync::mpsc::Sender<Vec<Vec<u16>>>);

    impl Policy for Listener {
        fn name(&self) -> &'static str {
            "listener"
        }

        fn observe(&mut self, routed: Routed<'_>) {
            self.0.send(routed.ids.to_vec()).unwrap();
        }

        fn observe_prompt(&mut self, _routed: Routed<'_>) {}

        fn plan(&mut self, _slots: &[Option<Key>], _limits: Limits, _out: &mut Vec<Swap>) {}
    }

    #[test]
    fn a_policy_hears_of_the_layers_of_its_class_wherever_they_lie() {
        let (tx, rx) = std::sync::mpsc::channel();
        let r = interleaved(vec![
            vec![vec![1], vec![2], vec![3], vec![4]],
            vec![vec![5], vec![6], vec![7], vec![0]],
        ]);
        replay_with(&r, &|_| Box::new(Listener(tx.clone())), 1, 1, |_, _, _| {});
        let heard: Vec<_> = rx.try_iter().collect();
        assert_eq!(
            heard,
            [[[1], [3]], [[2], [4]], [[5], [7]], [[6], [0]]].map(|c| c.map(|l| l.to_vec()).to_vec())
        );
    }

    #[test]
    fn bytes_are_those_of_each_layers_cold_experts_and_uploads() {
        // layer 0 uses one expert again and again, layer 1 always another; both tokens of a step the same
        let mut r = routing(2, 4, (0..4).map(|i| vec![vec![1, 1], vec![i, i]]).collect());
        r.steps.iter_mut().for_each(|s| s.n_tokens = 2);
        let lru = |shape| policy::build(PolicyKind::Lru, shape);
        r.header.uses_per_upload = 1;
        r.header.layers[1].expert_bytes = 1000;
        let o = replay_with(&r, &lru, 2, 1, |_, _, _| {});
        // cold in steps 0 to 2, then hot; and all of layer 1
        assert_eq!((o.misses, o.cold, o.cold_layers), (6 + 8, 3 + 4, 3 + 4));
        // expert 1 of layer 0 and expert 0 of layer 1 before the last step
        assert_eq!((o.uploads, o.bytes), (2, 3 * 10 + 4 * 1000 + 10 + 1000));
        let mut sum = o;
        sum += o;
        assert_eq!((sum.steps, sum.tokens, sum.bytes), (8, 16, 2 * 5040));
    }

    #[test]
    fn hindsight_is_the_best_of_all_fixed_sets() {
        let steps = (0..40).map(|i| vec![vec![i % 3, 3], vec![i * i % 4, (i * i + 1) % 4]]).collect();
        let r = routing(2, 4, steps);
        let counts: Vec<u64> = r.counts().concat();
        let uses: u64 = counts.iter().sum();
        for k in 1..4 {
            let best = (0..1u32 << 8)
                .filter(|set| set.count_ones() == 2 * k)
                .map(|set| (0..8).filter(|e| set >> e & 1 == 1).map(|e| counts[e]).sum::<u64>())
                .max();
            let o = hindsight(&r, k);
            assert_eq!((Some(o.hits), o.hits + o.misses, o.uploads), (best, uses, 0));
            assert_eq!(o.hits_per_upload(), None);
        }
        assert_eq!(hindsight(&r, 4).misses, 0);
    }

    /// The optimum as first written: plain sets and maps.
    fn plain_optimum(routing: &Routing, layers: &[usize], k: u32) -> (u64, u64, u64) {
        use std::collections::{BTreeSet, HashMap};
        let shape = routing.shape(layers, k);
        let mut uses: Vec<(u32, u64)> = Vec::new();
        for step in &routing.steps {
            for (i, layer) in layers.iter().enumerate() {
                let mut ids = step.ids[*layer].clone();
                ids.sort_unstable();
                for run in ids.chunk_by(|a, b| a == b) {
                    uses.push((
                        shape.index(Key { layer: i as u16, expert: run[0] }) as u32,
                        run.len() as u64,
                    ));
                }
            }
        }
        let mut next = vec![usize::MAX; uses.len()];
        let mut seen = HashMap::new();
        for (i, (key, _)) in uses.iter().enumerate().rev() {
            next[i] = seen.insert(*key, i).unwrap_or(usize::MAX);
        }
        let (mut hits, mut misses, mut uploads) = (0, 0, 0);
        let mut residents: BTreeSet<(usize, u32)> = BTreeSet::new();
        for (i, &(key, n)) in uses.iter().enumerate() {
            if residents.remove(&(i, key)) {
                hits += n;
            } else {
                misses += n;
                if next[i] == usize::MAX {
                    continue;
                }
                uploads += 1;
            }
            residents.insert((next[i], key));
            if residents.len() > shape.n_slots as usize && residents.pop_last() == Some((next[i], key)) {
                uploads -= 1;
            }
        }
        (hits, misses, uploads)
    }

    proptest! {
        #[test]
        fn the_optimum_is_what_plain_sets_say(
            k in 1..5u32,
            steps in prop::collection::vec(prop::collection::vec(prop::collection::vec(0..8u16, 1..5), 4), 1..200),
        ) {
            let r = interleaved(steps);
            let of = |l: &[usize]| plain_optimum(&r, l, k);
            let sum = |all: Vec<(u64, u64, u64)>| {
                all.into_iter().fold((0, 0, 0), |a, b| (a.0 + b.0, a.1 + b.1, a.2 + b.2))
            };
            let counted = |o: Outcome| (o.hits, o.misses, o.uploads);
            prop_assert_eq!(counted(optimum(&r, k, Scope::Pool)), sum(vec![of(&[0, 2]), of(&[1, 3])]));
            prop_assert_eq!(counted(optimum(&r, k, Scope::Layer)), sum((0..4).map(|l| of(&[l])).collect()));
        }

        #[test]
        fn no_policy_beats_the_optimum(
            kind in prop::sample::select(PolicyKind::all().collect::<Vec<_>>()),
            k in 1..5u32,
            interval in 1..4u32,
            steps in prop::collection::vec(prop::collection::vec(prop::collection::vec(0..8u16, 2), 2), 1..150),
        ) {
            let steps = steps.into_iter().map(|s| s.into_iter().map(|mut ids: Vec<u16>| { ids.sort_unstable(); ids.dedup(); ids }).collect()).collect();
            let r = routing(2, 8, steps);
            let o = replay(&r, kind, k, interval, |_, _, _| {});
            let best = optimum(&r, k, Scope::Pool);
            prop_assert!(o.hits <= best.hits, "{o:?} against {best:?}");
            prop_assert!(optimum(&r, k, Scope::Layer).hits <= best.hits);
            // which has the experts before their first use, and the optimum does not
            prop_assert!(hindsight(&r, k).hits <= best.hits + 2 * u64::from(k));
            // one token a step: each use is of another expert
            prop_assert!(o.cold == o.misses && o.cold_layers <= o.cold && o.cold <= 8 * o.cold_layers);
            prop_assert_eq!(o.hits + o.misses, best.hits + best.misses);
        }
    }
}
