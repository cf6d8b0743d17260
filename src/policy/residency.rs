//! What all policies share: experts used since the last plan, and turning a ranking into swaps.

use std::cmp::Ordering;

use super::{Key, Limits, PoolShape, Swap};

/// Experts used since the last plan, in the order of their first use. Only these can have become worth
/// a slot, so a plan looks at them and not at every expert.
pub struct Touched {
    list: Vec<u32>,
    seen: Vec<bool>,
}

impl Touched {
    pub fn new(shape: PoolShape) -> Self {
        Touched { list: Vec::new(), seen: vec![false; shape.n_keys()] }
    }

    pub fn add(&mut self, index: usize) {
        if !std::mem::replace(&mut self.seen[index], true) {
            self.list.push(index as u32);
        }
    }

    pub fn iter(&self) -> impl Iterator<Item = usize> + '_ {
        self.list.iter().map(|i| *i as usize)
    }

    /// Forgets those that `keep` does not want to see again.
    pub fn retain(&mut self, mut keep: impl FnMut(usize) -> bool) {
        let seen = &mut self.seen;
        self.list.retain(|&i| {
            let kept = keep(i as usize);
            seen[i as usize] = kept;
            kept
        });
    }
}

/// Which experts have a slot, as a table over all experts.
pub struct Residents(Vec<bool>);

impl Residents {
    pub fn new(shape: PoolShape) -> Self {
        Residents(vec![false; shape.n_keys()])
    }

    pub fn set(&mut self, shape: PoolShape, slots: &[Option<Key>]) {
        self.0.fill(false);
        for key in slots.iter().flatten() {
            self.0[shape.index(*key)] = true;
        }
    }

    pub fn has(&self, index: usize) -> bool {
        self.0[index]
    }

    /// Uses of experts that had none at the last plan.
    pub fn misses(&self, uses: &[u32]) -> usize {
        uses.iter().filter(|i| !self.has(**i as usize)).count()
    }
}

/// The first `n` of a list, in order: a plan that may swap a few looks at no more of either side.
pub fn sort_first<T>(list: &mut Vec<T>, n: u32, mut order: impl FnMut(&T, &T) -> Ordering) {
    let n = n as usize;
    if n < list.len() {
        list.select_nth_unstable_by(n, &mut order);
        list.truncate(n);
    }
    list.sort_unstable_by(order);
}

/// Pairs candidates, best first, with free slots and then with residents, worst first, as long as
/// `worth(candidate, victim)`. Scores are compared by the caller's order alone: ties were broken there.
pub fn swaps<S: Copy>(
    slots: &[Option<Key>],
    candidates: impl Iterator<Item = (S, Key)>,
    victims: impl Iterator<Item = (S, u32)>,
    worth: impl Fn(S, S) -> bool,
    limits: Limits,
    out: &mut Vec<Swap>,
) {
    let mut free = slots.iter().enumerate().filter(|(_, k)| k.is_none()).map(|(s, _)| s as u32);
    let mut victims = victims.peekable();
    for (score, admit) in candidates.take(limits.max_swaps as usize) {
        if let Some(slot) = free.next() {
            out.push(Swap { slot, evict: None, admit });
            continue;
        }
        match victims.next_if(|(worst, _)| worth(score, *worst)) {
            Some((_, slot)) => out.push(Swap { slot, evict: slots[slot as usize], admit }),
            None => return,
        }
    }
}
