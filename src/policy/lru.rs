//! Least recently used: every expert that is used gets a slot, the one unused for longest loses its own.

use super::{
    Key, Limits, Policy, PoolShape, Routed, Swap,
    residency::{Residents, Touched, sort_first, swaps},
};

pub struct Lru {
    shape: PoolShape,
    now: u64,
    /// Token of the last use, 0 for never.
    last: Vec<u64>,
    touched: Touched,
    residents: Residents,
}

impl Lru {
    pub fn new(shape: PoolShape) -> Self {
        Lru {
            shape,
            now: 0,
            last: vec![0; shape.n_keys()],
            touched: Touched::new(shape),
            residents: Residents::new(shape),
        }
    }
}

impl Policy for Lru {
    fn name(&self) -> &'static str {
        "lru"
    }

    fn observe(&mut self, routed: Routed<'_>) {
        self.now += u64::from(routed.n_tokens);
        for (layer, ids) in routed.ids.iter().enumerate() {
            for &expert in ids {
                let i = self.shape.index(Key { layer: layer as u16, expert });
                self.last[i] = self.now;
                self.touched.add(i);
            }
        }
    }

    fn observe_prompt(&mut self, _routed: Routed<'_>) {}

    fn plan(&mut self, slots: &[Option<Key>], limits: Limits, out: &mut Vec<Swap>) {
        self.residents.set(self.shape, slots);
        let mut candidates: Vec<(u64, Key)> = self
            .touched
            .iter()
            .filter(|i| !self.residents.has(*i))
            .map(|i| (self.last[i], self.shape.key(i)))
            .collect();
        sort_first(&mut candidates, limits.max_swaps, |a, b| b.0.cmp(&a.0).then(a.1.cmp(&b.1)));
        let mut victims: Vec<(u64, Key, u32)> = slots
            .iter()
            .enumerate()
            .filter_map(|(s, k)| k.map(|k| (self.last[self.shape.index(k)], k, s as u32)))
            .collect();
        sort_first(&mut victims, limits.max_swaps, |a, b| a.0.cmp(&b.0).then(b.1.cmp(&a.1)));
        let victims = victims.into_iter().map(|v| (v.0, v.2));
        swaps(slots, candidates.into_iter(), victims, |new, old| new > old, limits, out);
        self.touched.retain(|_| false);
    }
}
