//! Replays a recorded routing against a policy: the same objects as in the server, the optimum beside
//! them.
//!
//! A plan is made at a ubatch boundary once enough tokens were decoded, as in the server. Its copies
//! take one ubatch: the expert that leaves is cold at once, the one that comes is hot a ubatch later.

use std::collections::{BTreeSet, HashMap};

use crate::{
    policy::{self, Key, Limits, Policy, PolicyKind, PoolShape, Routed, Swap},
    trace::{TraceError, TraceHeader, TraceReader, TraceRecord},
};

/// Routing of one ubatch.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Step {
    /// Tokens.
    pub n_tokens: u32,
    /// `ids[layer]`: experts routed, tokens one after the other.
    pub ids: Vec<Vec<u16>>,
}

/// A trace in memory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Routing {
    /// What it is about.
    pub header: TraceHeader,
    /// Routing by ubatch.
    pub steps: Vec<Step>,
    /// The swaps of the run that was recorded, with the number of steps before each.
    pub swaps: Vec<(usize, u16, Swap)>,
}

impl Routing {
    /// Reads all of a trace.
    ///
    /// # Errors
    /// Any [`TraceError`].
    pub fn read(reader: TraceReader) -> Result<Self, TraceError> {
        let mut routing = Routing { header: reader.header().clone(), steps: Vec::new(), swaps: Vec::new() };
        for record in reader {
            match record? {
                TraceRecord::Routed { n_tokens, ids } => {
                    routing.steps.push(Step { n_tokens: u32::from(n_tokens), ids });
                }
                TraceRecord::Swap { class, swap } => routing.swaps.push((routing.steps.len(), class, swap)),
            }
        }
        Ok(routing)
    }

    /// Tokens of all steps.
    pub fn n_tokens(&self) -> u64 {
        self.steps.iter().map(|s| u64::from(s.n_tokens)).sum()
    }

    /// Uses of each expert by layer.
    pub fn counts(&self) -> Vec<Vec<u64>> {
        let mut counts: Vec<_> =
            self.header.layers.iter().map(|l| vec![0; usize::from(l.n_expert)]).collect();
        for step in &self.steps {
            for (counts, ids) in counts.iter_mut().zip(&step.ids) {
                for id in ids {
                    counts[usize::from(*id)] += 1;
                }
            }
        }
        counts
    }

    /// The layers of each class, as indices into the header's.
    fn classes(&self) -> Vec<Vec<usize>> {
        let n = self.header.layers.iter().map(|l| usize::from(l.class) + 1).max().unwrap_or(0);
        let mut classes = vec![Vec::new(); n];
        for (i, l) in self.header.layers.iter().enumerate() {
            classes[usize::from(l.class)].push(i);
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
            expert_bytes: 1,
        }
    }
}

/// What a replay counted.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Outcome {
    /// Tokens.
    pub tokens: u64,
    /// Uses of an expert that had a slot.
    pub hits: u64,
    /// Uses of one that had none: reads from host memory.
    pub misses: u64,
    /// Experts copied into a slot.
    pub uploads: u64,
}

impl Outcome {
    /// Share of uses that found a slot.
    pub fn hit_rate(&self) -> f64 {
        self.hits as f64 / (self.hits + self.misses).max(1) as f64
    }

    /// Uses without a slot by token.
    pub fn cold_per_token(&self) -> f64 {
        self.misses as f64 / self.tokens.max(1) as f64
    }

    /// Hits that an upload brought.
    pub fn hits_per_upload(&self) -> f64 {
        self.hits as f64 / self.uploads.max(1) as f64
    }
}

/// The slots of one class during a replay.
struct Pool {
    layers: Vec<usize>,
    shape: PoolShape,
    policy: Box<dyn Policy>,
    slots: Vec<Option<Key>>,
    hot: Vec<bool>,
    /// Experts whose copy runs during the current ubatch.
    copying: Vec<Key>,
    uses_since_plan: u64,
}

/// Replays `routing` with `k` slots a layer and a plan every `interval` tokens. `plan` is told of every
/// swap: steps before it, class, swap.
pub fn replay(
    routing: &Routing,
    kind: PolicyKind,
    k: u32,
    interval: u32,
    mut plan: impl FnMut(usize, u16, &Swap),
) -> Outcome {
    let mut pools: Vec<Pool> = Vec::new();
    for layers in routing.classes() {
        let shape = routing.shape(&layers, k);
        pools.push(Pool {
            layers,
            shape,
            policy: policy::build(kind, shape),
            slots: vec![None; shape.n_slots as usize],
            hot: vec![false; shape.n_keys()],
            copying: Vec::new(),
            uses_since_plan: 0,
        });
    }
    for p in &mut pools {
        // as the run does: with room for all, all are there from the start
        let keys = policy::all_keys(p.layers.iter().map(|l| routing.header.layers[*l].n_expert.into()));
        if keys.len() <= p.slots.len() {
            for (slot, key) in p.slots.iter_mut().zip(keys) {
                *slot = Some(key);
                p.hot[p.shape.index(key)] = true;
            }
        }
    }
    let mut out = Outcome { tokens: routing.n_tokens(), ..Outcome::default() };
    let mut since_plan = 0;
    let (mut ids, mut swaps) = (Vec::new(), Vec::new());
    for (at, step) in routing.steps.iter().enumerate() {
        let planning = since_plan >= interval;
        for (class, p) in pools.iter_mut().enumerate() {
            // boundary: what was copied during the last ubatch is there
            for key in p.copying.drain(..) {
                if p.slots.contains(&Some(key)) {
                    p.hot[p.shape.index(key)] = true;
                    out.uploads += 1;
                }
            }
            if planning {
                swaps.clear();
                let limits =
                    Limits::after(std::mem::take(&mut p.uses_since_plan), routing.header.uses_per_upload);
                p.policy.plan(&p.slots, limits, &mut swaps);
                for s in &swaps {
                    plan(at, class as u16, s);
                    if let Some(old) = s.evict {
                        p.hot[p.shape.index(old)] = false;
                    }
                    p.slots[s.slot as usize] = Some(s.admit);
                    p.copying.push(s.admit);
                }
            }
            ids.clear();
            for (i, layer) in p.layers.iter().enumerate() {
                for &expert in &step.ids[*layer] {
                    let hot = p.hot[p.shape.index(Key { layer: i as u16, expert })];
                    *(if hot { &mut out.hits } else { &mut out.misses }) += 1;
                }
                p.uses_since_plan += step.ids[*layer].len() as u64;
                ids.push(step.ids[*layer].clone());
            }
            p.policy.observe(Routed { n_tokens: step.n_tokens, sequences: &[], ids: &ids });
        }
        since_plan = if planning { step.n_tokens } else { since_plan + step.n_tokens };
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
/// times in one ubatch of a layer is read once.
pub fn optimum(routing: &Routing, k: u32, scope: Scope) -> Outcome {
    let mut out = Outcome { tokens: routing.n_tokens(), ..Outcome::default() };
    for class in routing.classes() {
        match scope {
            Scope::Pool => optimum_of(routing, &class, k, &mut out),
            Scope::Layer => class.iter().for_each(|l| optimum_of(routing, &[*l], k, &mut out)),
        }
    }
    out
}

fn optimum_of(routing: &Routing, layers: &[usize], k: u32, out: &mut Outcome) {
    let shape = routing.shape(layers, k);
    let mut uses: Vec<(u32, u32)> = Vec::new(); // expert, uses in that ubatch
    for step in &routing.steps {
        for (i, layer) in layers.iter().enumerate() {
            let mut ids = step.ids[*layer].clone();
            ids.sort_unstable();
            for run in ids.chunk_by(|a, b| a == b) {
                uses.push((shape.index(Key { layer: i as u16, expert: run[0] }) as u32, run.len() as u32));
            }
        }
    }
    let mut next = vec![usize::MAX; uses.len()];
    let mut seen = HashMap::new();
    for (i, (key, _)) in uses.iter().enumerate().rev() {
        next[i] = seen.insert(*key, i).unwrap_or(usize::MAX);
    }
    // residents by their next use
    let mut residents: BTreeSet<(usize, u32)> = BTreeSet::new();
    for (i, &(key, n)) in uses.iter().enumerate() {
        if residents.remove(&(i, key)) {
            out.hits += u64::from(n);
        } else {
            out.misses += u64::from(n);
            if next[i] == usize::MAX {
                continue;
            }
            out.uploads += 1;
        }
        residents.insert((next[i], key));
        if residents.len() > shape.n_slots as usize {
            let last = residents.pop_last();
            // bypass: what was just read is not kept, so it was not uploaded
            if last == Some((next[i], key)) {
                out.uploads -= 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::trace::TraceLayer;

    fn routing(n_layers: u16, n_expert: u16, steps: Vec<Vec<Vec<u16>>>) -> Routing {
        let layer = |il| TraceLayer { il, n_expert, n_used: 2, class: 0 };
        Routing {
            header: TraceHeader {
                fingerprint: 0,
                k: 1,
                uses_per_upload: 64,
                layers: (0..n_layers).map(layer).collect(),
            },
            steps: steps.into_iter().map(|ids| Step { n_tokens: 1, ids }).collect(),
            swaps: vec![],
        }
    }

    #[test]
    fn a_copy_takes_one_ubatch() {
        let r = routing(1, 4, vec![vec![vec![1]]; 4]);
        let mut planned = vec![];
        let o = replay(&r, PolicyKind::Lru, 1, 1, |at, _, s| planned.push((at, *s)));
        // seen in step 0, planned before step 1, copied during it, hot from step 2
        assert_eq!(planned, [(1, Swap { slot: 0, evict: None, admit: Key { layer: 0, expert: 1 } })]);
        assert_eq!(o, Outcome { tokens: 4, hits: 2, misses: 2, uploads: 1 });
    }

    #[test]
    fn the_optimum_bypasses_what_is_not_used_again() {
        let steps = [1, 2, 1, 3, 1].map(|e| vec![vec![e]]).to_vec();
        let o = optimum(&routing(1, 4, steps), 1, Scope::Pool);
        assert_eq!(o, Outcome { tokens: 5, hits: 2, misses: 3, uploads: 1 });
    }

    #[test]
    fn a_shared_pool_can_give_one_layer_more_than_its_share() {
        let steps = (0..40).map(|i| vec![vec![i % 2], vec![0]]).collect();
        let r = routing(2, 3, steps);
        assert!(optimum(&r, 1, Scope::Pool).hits <= optimum(&r, 2, Scope::Layer).hits);
        assert!(optimum(&r, 1, Scope::Pool).hits >= optimum(&r, 1, Scope::Layer).hits);
    }

    proptest! {
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
            prop_assert_eq!(o.hits + o.misses, best.hits + best.misses);
        }
    }
}
