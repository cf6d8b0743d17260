//! Least frequently and least recently used: the resident with the fewest uses for its age goes.
//!
//! An expert's score is `uses / (tokens since the last one + 1)`, and its uses are counted anew each time
//! it gets a slot. So the expert cache of tinyserve (github.com/e1n00r/tinyserve, `src/cache_policy.py`)
//! and of vllm-project/vllm#37190 does it, the two that gave the name its meaning for experts. Two things
//! are ours:
//!
//! - There a miss waits for its copy, so every miss is admitted. Here a plan has a limit: the misses since
//!   the last plan compete for it by the same score, and the uses of those that lose are forgotten, as
//!   those of an expert that was evicted at once would be. Nor is a resident evicted that was used as late
//!   as the candidate.
//! - There the clock ticks with every lookup; here with every token, so that an expert of the first layer
//!   is not older than one of the last by the lookups of a forward pass.
//!
//! Uses do not fade: an expert with n of them outlives up to n tokens of silence. Here for comparison.

use std::cmp::Ordering;

use super::{
    Key, Limits, Policy, PoolShape, Routed, Swap,
    residency::{Residents, Touched, sort_first, swaps},
};

#[derive(Clone, Copy, Default)]
struct Record {
    /// Since it got its slot; for an expert without one, since the last plan.
    uses: u32,
    /// Token of the last use, 0 for never.
    last: u64,
}

/// A candidate or a resident as a plan sees it.
#[derive(Clone, Copy)]
struct Ranked {
    score: f64,
    last: u64,
    key: Key,
    /// Of a resident.
    slot: u32,
}

impl Ranked {
    /// More valuable first; equal scores by recency, as in tinyserve.
    fn order(&self, other: &Self) -> Ordering {
        other.score.total_cmp(&self.score).then(other.last.cmp(&self.last))
    }
}

pub struct Lfru {
    shape: PoolShape,
    /// Tokens seen.
    now: u64,
    records: Vec<Record>,
    touched: Touched,
    residents: Residents,
    /// The layer that is first among equals in the next plan.
    first: u16,
    // scratch
    candidates: Vec<Ranked>,
    victims: Vec<Ranked>,
}

impl Lfru {
    pub fn new(shape: PoolShape) -> Self {
        Lfru {
            shape,
            now: 0,
            records: vec![Record::default(); shape.n_keys()],
            touched: Touched::new(shape),
            residents: Residents::new(shape),
            first: 0,
            candidates: Vec::new(),
            victims: Vec::new(),
        }
    }

    fn rank(&self, index: usize, slot: u32) -> Ranked {
        let Record { uses, last } = self.records[index];
        let score = f64::from(uses) / (self.now - last + 1) as f64;
        Ranked { score, last, key: self.shape.key(index), slot }
    }
}

/// Position of `layer` when the layers take turns and it is the turn of `first`. Most candidates of a
/// plan are equals with a single use; were the first layer always first among them, a limit on swaps
/// would starve the last ones.
pub fn in_turn(shape: PoolShape, first: u16, layer: u16) -> u16 {
    if layer >= first { layer - first } else { layer + (shape.n_layers - first) }
}

/// Whose turn it is after `first`.
pub fn next_turn(shape: PoolShape, first: u16) -> u16 {
    if first + 1 < shape.n_layers { first + 1 } else { 0 }
}

impl Policy for Lfru {
    fn name(&self) -> &'static str {
        "lfru"
    }

    fn observe(&mut self, routed: Routed<'_>) {
        self.now += u64::from(routed.n_tokens);
        for (layer, ids) in routed.ids.iter().enumerate() {
            for &expert in ids {
                let i = self.shape.index(Key { layer: layer as u16, expert });
                let r = &mut self.records[i];
                (r.uses, r.last) = (r.uses.saturating_add(1), self.now);
                self.touched.add(i);
            }
        }
    }

    fn observe_prompt(&mut self, _routed: Routed<'_>) {}

    fn plan(&mut self, slots: &[Option<Key>], limits: Limits, out: &mut Vec<Swap>) {
        self.residents.set(self.shape, slots);
        let (shape, first) = (self.shape, self.first);
        let mut candidates = std::mem::take(&mut self.candidates);
        candidates.clear();
        candidates
            .extend(self.touched.iter().filter(|i| !self.residents.has(*i)).map(|i| self.rank(i, u32::MAX)));
        sort_first(&mut candidates, limits.max_swaps, |a, b| {
            let layers = |k: Key| (in_turn(shape, first, k.layer), k.expert);
            a.order(b).then(layers(a.key).cmp(&layers(b.key)))
        });

        let mut victims = std::mem::take(&mut self.victims);
        victims.clear();
        if !candidates.is_empty() {
            for (slot, key) in slots.iter().enumerate() {
                if let Some(key) = key {
                    victims.push(self.rank(shape.index(*key), slot as u32));
                }
            }
            let worst_first = |a: &Ranked, b: &Ranked| b.order(a).then(b.key.cmp(&a.key));
            // of the least valuable there can go as many as may come
            sort_first(&mut victims, candidates.len() as u32, worst_first);
        }
        let begin = out.len();
        swaps(
            slots,
            candidates.iter().map(|c| (c.last, c.key)),
            victims.iter().map(|v| (v.last, v.slot)),
            |new, old| new > old,
            limits,
            out,
        );
        (self.candidates, self.victims) = (candidates, victims);

        // who has lost its slot, or a plan, starts again; who was admitted brings its uses
        let plan = &out[begin..];
        let admitted: Vec<Record> = plan.iter().map(|s| self.records[shape.index(s.admit)]).collect();
        let (records, residents) = (&mut self.records, &self.residents);
        self.touched.retain(|i| {
            if !residents.has(i) {
                records[i].uses = 0;
            }
            false
        });
        for (swap, record) in plan.iter().zip(admitted) {
            records[shape.index(swap.admit)] = record;
            if let Some(old) = swap.evict {
                records[shape.index(old)].uses = 0;
            }
        }
        self.first = next_turn(shape, first);
    }
}
