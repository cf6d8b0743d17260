//! S3-FIFO: a small queue that new experts must prove themselves in, a main queue that gives those in use
//! another round, and a memory of who passed by.
//!
//! Yang, Zhang, Qiu, Yue, Rashmi: "FIFO queues are all you need for cache eviction", SOSP 2023, section 4,
//! algorithm 1. As there: the small queue S aims at a tenth of the slots, a resident has two bits for the
//! uses it has seen, one that leaves S after more than one use moves to the main queue M and otherwise to
//! the ghosts G, M reinserts what was used since the last round, G remembers as many as M holds, and an
//! expert in G is admitted to M. The ghosts are stamps, as the paper proposes: an expert is in G as long
//! as fewer than |G| others have entered since.
//!
//! The paper admits at every miss. Here a plan comes every few tokens, with a limit, and a miss does
//! without a slot. So:
//!
//! - Uses between an expert's miss and the plan count as those it would have seen in S.
//! - Candidates are admitted in the order ghosts, uses, layers in turn, first use.
//! - What a plan admits cannot evict one another: there is no slot to take twice. In the paper, new experts
//!   that S has no room for push one another through it to G; here those beyond the room go to G at once,
//!   and so do those beyond the limit. The next use, while G remembers, makes them candidates for M.
//! - One eviction makes room for one admission. When an expert moves from S to M, it is M that gives a
//!   slot (the paper's M is full then) and S is not searched on.
//! - Residents that came without a plan, as at the start with room for all, enter S in the order of slots.

use std::{cmp::Reverse, collections::VecDeque};

use super::{
    Key, Limits, Policy, PoolShape, Routed, Swap,
    lfru::{in_turn, next_turn},
};

/// Slots for each one of the small queue; the paper's 10 %.
const SLOTS_PER_SMALL: u32 = 10;
/// Most uses that an expert's two bits hold.
const MAX_USES: u8 = 3;
/// An expert leaves S for M after more uses than this.
const USES_IN_SMALL: u8 = 1;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    /// It has no slot.
    Out,
    /// It has none, and was used since the last plan.
    Missed,
    Small(u32),
    Main(u32),
}

#[derive(Clone, Copy)]
struct Record {
    place: Place,
    /// Uses seen in S, or not yet spent on rounds in M; of one that missed, those after the first.
    uses: u8,
    /// When it entered G: number of entries up to its own, 0 for never.
    ghost: u64,
}

impl Record {
    /// Its slot.
    fn slot(&self) -> Option<u32> {
        match self.place {
            Place::Small(slot) | Place::Main(slot) => Some(slot),
            Place::Out | Place::Missed => None,
        }
    }
}

pub struct S3Fifo {
    shape: PoolShape,
    records: Vec<Record>,
    /// `slots` as the last plan left them.
    slots: Vec<Option<Key>>,
    /// S and M: indices of experts, the oldest first. Together they are all of `slots`.
    small: VecDeque<u32>,
    main: VecDeque<u32>,
    /// Entries into G.
    ghosts: u64,
    /// Experts that missed since the last plan, in the order of their first use.
    missed: Vec<u32>,
    /// The layer that is first among equals in the next plan.
    first: u16,
}

impl S3Fifo {
    pub fn new(shape: PoolShape) -> Self {
        S3Fifo {
            shape,
            records: vec![Record { place: Place::Out, uses: 0, ghost: 0 }; shape.n_keys()],
            slots: vec![None; shape.n_slots as usize],
            small: VecDeque::new(),
            main: VecDeque::new(),
            ghosts: 0,
            missed: Vec::new(),
            first: 0,
        }
    }

    /// Slots that S aims at.
    fn small_size(&self) -> usize {
        (self.shape.n_slots / SLOTS_PER_SMALL).max(1) as usize
    }

    fn is_ghost(&self, index: usize) -> bool {
        let entered = self.records[index].ghost;
        let size = (self.shape.n_slots as usize).saturating_sub(self.small_size());
        entered > 0 && self.ghosts - entered < size as u64
    }

    fn enter_ghosts(&mut self, index: usize) {
        self.ghosts += 1;
        self.records[index].ghost = self.ghosts;
    }

    /// Follows what happened to the slots since the last plan: normally just what it planned.
    fn follow(&mut self, slots: &[Option<Key>]) {
        if self.slots == slots {
            return;
        }
        // the pool may have another size by now
        self.shape.n_slots = slots.len() as u32;
        let mut left = false;
        for gone in self.slots.drain(slots.len().min(self.slots.len())..).flatten() {
            self.records[self.shape.index(gone)] = Record { place: Place::Out, uses: 0, ghost: 0 };
            left = true;
        }
        self.slots.resize(slots.len(), None);
        for (was, is) in self.slots.iter().zip(slots) {
            if let Some(key) = was.filter(|_| was != is) {
                self.records[self.shape.index(key)] = Record { place: Place::Out, uses: 0, ghost: 0 };
                left = true;
            }
        }
        if left {
            let records = &self.records;
            self.small.retain(|i| records[*i as usize].slot().is_some());
            self.main.retain(|i| records[*i as usize].slot().is_some());
        }
        for (slot, (was, is)) in self.slots.iter().zip(slots).enumerate() {
            if let Some(key) = is.filter(|_| was != is) {
                let i = self.shape.index(key);
                self.records[i].place = Place::Small(slot as u32);
                self.small.push_back(i as u32);
            }
        }
        self.slots.copy_from_slice(slots);
    }

    /// Takes the next victim out of its queue, when `entered` experts of this plan are to enter S. None when
    /// only they could make room.
    fn evict(&mut self, entered: usize) -> Option<usize> {
        loop {
            if self.small.len() + entered >= self.small_size() {
                let i = self.small.pop_front()?;
                let r = &mut self.records[i as usize];
                match r.place {
                    Place::Small(slot) if r.uses > USES_IN_SMALL => {
                        (r.place, r.uses) = (Place::Main(slot), 0);
                        self.main.push_back(i);
                    }
                    _ => {
                        self.enter_ghosts(i as usize);
                        return Some(i as usize);
                    }
                }
            } else {
                let i = self.main.pop_front()?;
                let r = &mut self.records[i as usize];
                if r.uses == 0 {
                    return Some(i as usize);
                }
                r.uses -= 1;
                self.main.push_back(i);
            }
        }
    }

    /// Experts that missed since the last plan and have no slot, the first to admit first; true: a ghost.
    fn candidates(&mut self) -> Vec<(usize, bool)> {
        let (shape, first) = (self.shape, self.first);
        let mut candidates: Vec<_> = std::mem::take(&mut self.missed)
            .into_iter()
            .map(|i| i as usize)
            .filter(|i| self.records[*i].place == Place::Missed)
            .map(|i| (i, self.is_ghost(i)))
            .collect();
        // stable: equals stay in the order of their first use
        candidates.sort_by_key(|&(i, ghost)| {
            (Reverse((ghost, self.records[i].uses)), in_turn(shape, first, shape.key(i).layer))
        });
        candidates
    }
}

impl Policy for S3Fifo {
    fn name(&self) -> &'static str {
        "s3fifo"
    }

    fn observe(&mut self, routed: Routed<'_>) {
        for (layer, ids) in routed.ids.iter().enumerate() {
            for &expert in ids {
                let i = self.shape.index(Key { layer: layer as u16, expert });
                let r = &mut self.records[i];
                if r.place == Place::Out {
                    r.place = Place::Missed;
                    self.missed.push(i as u32);
                } else {
                    r.uses = (r.uses + 1).min(MAX_USES);
                }
            }
        }
    }

    fn observe_prompt(&mut self, _routed: Routed<'_>) {}

    fn plan(&mut self, slots: &[Option<Key>], limits: Limits, out: &mut Vec<Swap>) {
        self.follow(slots);
        let candidates = self.candidates();
        let mut free = slots.iter().enumerate().filter(|(_, k)| k.is_none()).map(|(s, _)| s as u32);
        let (mut n_admitted, mut n_small) = (0, 0);
        for &(i, ghost) in candidates.iter().take(limits.max_swaps as usize) {
            let admit = self.shape.key(i);
            let slot = match free.next() {
                Some(slot) => {
                    out.push(Swap { slot, evict: None, admit });
                    slot
                }
                None => {
                    let Some(victim) = self.evict(n_small) else { break };
                    let r = &mut self.records[victim];
                    let slot = r.slot().expect("who is in a queue has a slot");
                    (r.place, r.uses) = (Place::Out, 0);
                    out.push(Swap { slot, evict: Some(self.shape.key(victim)), admit });
                    slot
                }
            };
            let r = &mut self.records[i];
            r.place = if ghost { Place::Main(slot) } else { Place::Small(slot) };
            r.ghost = 0;
            n_small += usize::from(!ghost);
            self.slots[slot as usize] = Some(admit);
            n_admitted += 1;
        }
        let (admitted, passed) = candidates.split_at(n_admitted);
        for &(i, ghost) in admitted {
            if ghost { &mut self.main } else { &mut self.small }.push_back(i as u32);
        }
        // the best last, so that they are remembered longest
        for &(i, _) in passed.iter().rev() {
            let r = &mut self.records[i];
            (r.place, r.uses) = (Place::Out, 0);
            self.enter_ghosts(i);
        }
        self.first = next_turn(self.shape, self.first);
    }
}
