//! Least frequently used, all-time counts: adapts ever more slowly. Here for comparison.

use super::{
    Key, Limits, Policy, PoolShape, Routed, Swap,
    residency::{Residents, Touched, sort_first, swaps},
};

pub struct Lfu {
    shape: PoolShape,
    counts: Vec<u64>,
    touched: Touched,
    residents: Residents,
}

impl Lfu {
    pub fn new(shape: PoolShape) -> Self {
        Lfu {
            shape,
            counts: vec![0; shape.n_keys()],
            touched: Touched::new(shape),
            residents: Residents::new(shape),
        }
    }

    /// Adds the uses of one ubatch.
    pub fn count(&mut self, ids: &[Vec<u16>]) {
        for (layer, ids) in ids.iter().enumerate() {
            for &expert in ids {
                let i = self.shape.index(Key { layer: layer as u16, expert });
                self.counts[i] += 1;
                self.touched.add(i);
            }
        }
    }
}

impl Policy for Lfu {
    fn name(&self) -> &'static str {
        "lfu"
    }

    fn observe(&mut self, routed: Routed<'_>) {
        self.count(routed.ids);
    }

    fn observe_prompt(&mut self, _routed: Routed<'_>) {}

    fn plan(&mut self, slots: &[Option<Key>], limits: Limits, out: &mut Vec<Swap>) {
        self.residents.set(self.shape, slots);
        let mut candidates: Vec<(u64, Key)> = self
            .touched
            .iter()
            .filter(|i| !self.residents.has(*i))
            .map(|i| (self.counts[i], self.shape.key(i)))
            .collect();
        sort_first(&mut candidates, limits.max_swaps, |a, b| b.0.cmp(&a.0).then(a.1.cmp(&b.1)));
        let mut victims: Vec<(u64, Key, u32)> = slots
            .iter()
            .enumerate()
            .filter_map(|(s, k)| k.map(|k| (self.counts[self.shape.index(k)], k, s as u32)))
            .collect();
        sort_first(&mut victims, limits.max_swaps, |a, b| a.0.cmp(&b.0).then(b.1.cmp(&a.1)));
        let victims = victims.into_iter().map(|v| (v.0, v.2));
        let before = out.len();
        swaps(slots, candidates.into_iter(), victims, |new, old| new > old, limits, out);
        // what the limit cut off stays a candidate
        let cut = out.len() - before >= limits.max_swaps as usize;
        self.touched.retain(|_| cut);
    }
}
