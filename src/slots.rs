//! Which expert is in which slot, and the states of a swap.
//!
//! ```text
//!             assign                    readers gone              copied, at a boundary
//! Resident(a) ------> Retiring(a -> b) -------------> Copying(b) ----------------------> Resident(b)
//! Empty       ----------------------------^               |  copy failed
//!                                                         v
//!                                                       Empty
//! ```
//!
//! - *Retire*, at a step boundary: the map says cold from now on. Steps that began before may still
//!   read the slot.
//! - *Copy*, once every such step has ended: the bytes are replaced beside decode.
//! - *Publish*, at the first step boundary after the copy: the map says where the expert is.
//!
//! An assignment may come while the slot is still retiring or being copied into: then the newer expert
//! waits its turn, and what was copied for nothing is never published. The plan sees a slot as
//! belonging to the expert that was assigned last, so plans do not depend on how fast copies are.
//!
//! A table can have fewer *open* slots than slots, the first ones: the others' memory may be given back. Closing a
//! slot is a retirement that nothing follows; [`SlotTable::closed`] says when nobody can touch it any more.

use crate::policy::Key;

/// A moment on the model's clock; each begin of a step and each retirement gets its own.
pub type Stamp = u64;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Slot {
    Empty,
    Resident {
        key: Key,
    },
    /// Not in the map any more, and nothing follows; steps that began before `since` may still read it.
    Closing {
        since: Stamp,
    },
    /// Not in the map any more; steps that began before `since` may still read it.
    Retiring {
        next: Key,
        since: Stamp,
    },
    /// Being copied into; published when that has ended.
    Copying {
        key: Key,
    },
    /// Being copied into for nothing: somebody else got the slot meanwhile, or it was closed.
    Overtaken {
        next: Option<Key>,
    },
}

impl Slot {
    /// In the middle of a swap.
    fn in_flight(&self) -> bool {
        matches!(self, Slot::Retiring { .. } | Slot::Copying { .. } | Slot::Overtaken { .. })
    }
}

/// What the owner of the map has to do after a transition.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    /// Take `key` out of the map.
    Retire {
        /// The expert that loses its slot.
        key: Key,
    },
    /// Put `key` into the map.
    Publish {
        /// The expert that is now readable there.
        key: Key,
    },
    /// Nothing.
    None,
}

/// The slots of one class.
#[derive(Debug)]
pub struct SlotTable {
    slots: Vec<Slot>,
    /// The first so many are open.
    open: usize,
    /// Slots that wait for readers or for a copy, in the order of their assignment.
    retiring: Vec<u32>,
}

impl SlotTable {
    /// `n` empty slots, of which the first `open` are open.
    pub fn new(n: u32, open: u32) -> Self {
        assert!(open <= n, "{open} of {n} slots");
        SlotTable { slots: vec![Slot::Empty; n as usize], open: open as usize, retiring: Vec::new() }
    }

    /// Number of slots, open or not.
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// Whether the class has no slots.
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Number of open slots.
    pub fn open(&self) -> usize {
        self.open
    }

    /// Opens slots, whose memory must be there, or closes some, at a step boundary at time `now`: the first `n` stay
    /// open. Calls `retire` for each expert that has to leave the map.
    pub fn set_open(&mut self, n: usize, now: Stamp, mut retire: impl FnMut(Key)) {
        assert!(n <= self.slots.len(), "{n} of {} slots", self.slots.len());
        for s in self.slots.iter_mut().take(self.open).skip(n) {
            match *s {
                Slot::Resident { key } => {
                    retire(key);
                    *s = Slot::Closing { since: now };
                }
                Slot::Retiring { since, .. } => *s = Slot::Closing { since },
                // also when it opens again before the copy has ended: the expert may be elsewhere by then
                Slot::Copying { .. } | Slot::Overtaken { .. } => *s = Slot::Overtaken { next: None },
                Slot::Empty | Slot::Closing { .. } => {}
            }
        }
        self.open = n;
        self.retiring.retain(|slot| (*slot as usize) < n);
    }

    /// Whether nobody reads or writes the slots that are not open; `oldest` is the begin of the oldest running step.
    pub fn closed(&mut self, oldest: Option<Stamp>) -> bool {
        let mut closed = true;
        for s in &mut self.slots[self.open..] {
            match *s {
                Slot::Closing { since } if oldest.is_none_or(|o| o > since) => *s = Slot::Empty,
                Slot::Empty => {}
                _ => closed = false,
            }
        }
        closed
    }

    /// The expert each open slot belongs to as far as planning goes: the one assigned last.
    pub fn assigned(&self) -> impl Iterator<Item = Option<Key>> + '_ {
        self.slots[..self.open].iter().map(|s| match *s {
            Slot::Empty | Slot::Closing { .. } => None,
            Slot::Resident { key } | Slot::Retiring { next: key, .. } | Slot::Copying { key } => Some(key),
            Slot::Overtaken { next } => next,
        })
    }

    /// Experts that a dispatch can find.
    pub fn resident(&self) -> usize {
        self.slots.iter().filter(|s| matches!(s, Slot::Resident { .. })).count()
    }

    /// Whether slot after slot holds what `keys` say, and nothing else is there.
    pub fn holds(&self, keys: &[Key]) -> bool {
        let resident = |(s, key): (&Slot, &Key)| *s == Slot::Resident { key: *key };
        self.open == keys.len() && self.slots[..self.open].iter().zip(keys).all(resident)
    }

    /// Gives the open slot `slot` to `key`, at a step boundary at time `now`.
    pub fn assign(&mut self, slot: u32, key: Key, now: Stamp) -> Action {
        assert!((slot as usize) < self.open, "slot {slot} of {} open ones", self.open);
        let s = &mut self.slots[slot as usize];
        let (next, action) = match *s {
            // opened again before its last readers were gone
            Slot::Closing { since } => (Slot::Retiring { next: key, since }, Action::None),
            Slot::Empty => (Slot::Retiring { next: key, since: 0 }, Action::None),
            Slot::Resident { key: old } => {
                (Slot::Retiring { next: key, since: now }, Action::Retire { key: old })
            }
            Slot::Retiring { since, .. } => (Slot::Retiring { next: key, since }, Action::None),
            Slot::Copying { .. } | Slot::Overtaken { .. } => {
                (Slot::Overtaken { next: Some(key) }, Action::None)
            }
        };
        let waits = s.in_flight();
        *s = next;
        if !waits {
            self.retiring.push(slot);
        }
        action
    }

    /// Slots whose copy may start, `most` at most: no step that began before their retirement is running.
    /// `oldest` is the begin of the oldest running step. Calls `start(slot, key)` for each.
    pub fn start_copies(&mut self, oldest: Option<Stamp>, most: usize, mut start: impl FnMut(u32, Key)) {
        let slots = &mut self.slots;
        let mut left = most;
        self.retiring.retain(|&slot| match slots[slot as usize] {
            Slot::Retiring { next, since } if left > 0 && oldest.is_none_or(|o| o > since) => {
                slots[slot as usize] = Slot::Copying { key: next };
                start(slot, next);
                left -= 1;
                false
            }
            _ => true,
        });
    }

    /// The copy into `slot` has ended, at a step boundary.
    pub fn copied(&mut self, slot: u32, ok: bool) -> Action {
        let s = &mut self.slots[slot as usize];
        match *s {
            Slot::Copying { key } if ok => {
                *s = Slot::Resident { key };
                Action::Publish { key }
            }
            // nobody has ever read this slot since its last retirement
            Slot::Overtaken { next: Some(next) } => {
                *s = Slot::Retiring { next, since: 0 };
                self.retiring.push(slot);
                Action::None
            }
            Slot::Copying { .. } | Slot::Overtaken { next: None } => {
                *s = Slot::Empty;
                Action::None
            }
            _ => unreachable!("a copy was reported for a slot that was not being copied into: {s:?}"),
        }
    }

    /// Swaps that have not ended.
    pub fn in_flight(&self) -> usize {
        self.slots.iter().filter(|s| s.in_flight()).count()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    fn key(expert: u16) -> Key {
        Key { layer: 0, expert }
    }

    fn started(t: &mut SlotTable, oldest: Option<Stamp>) -> Vec<(u32, Key)> {
        let mut got = Vec::new();
        t.start_copies(oldest, usize::MAX, |s, k| got.push((s, k)));
        got
    }

    #[test]
    fn a_slot_that_opens_again_does_not_publish_who_was_overtaken() {
        let mut t = SlotTable::new(2, 2);
        t.assign(1, key(1), 1);
        assert_eq!(started(&mut t, None), [(1, key(1))]);
        // expert 1 is free again and gets another slot
        t.assign(1, key(2), 2);
        t.assign(0, key(1), 3);
        assert_eq!(started(&mut t, None), [(0, key(1))]);
        assert_eq!(t.copied(0, true), Action::Publish { key: key(1) });
        t.set_open(1, 4, |key| unreachable!("{key:?} is not there yet"));
        t.set_open(2, 5, |_| unreachable!("slots only open"));
        assert_eq!(t.copied(1, true), Action::None, "expert 1 has slot 0");
        assert_eq!(t.assigned().collect::<Vec<_>>(), [Some(key(1)), None]);
    }

    #[test]
    fn a_swap_goes_through_its_three_states() {
        let mut t = SlotTable::new(1, 1);
        assert_eq!(t.assign(0, key(1), 10), Action::None);
        assert_eq!(started(&mut t, Some(5)), [(0, key(1))], "an empty slot has no readers");
        assert_eq!(t.resident(), 0, "not readable before it is published");
        assert_eq!(t.copied(0, true), Action::Publish { key: key(1) });

        assert_eq!(t.assign(0, key(2), 20), Action::Retire { key: key(1) });
        assert_eq!(started(&mut t, Some(15)), [], "a step that began at 15 may read it");
        assert_eq!(started(&mut t, Some(21)), [(0, key(2))]);
        assert_eq!(t.copied(0, true), Action::Publish { key: key(2) });
        assert_eq!(t.in_flight(), 0);
    }

    #[test]
    fn copies_over_the_limit_wait_in_the_order_of_their_assignment() {
        let mut t = SlotTable::new(3, 3);
        for slot in [2, 0, 1] {
            t.assign(slot, key(slot as u16), 1);
        }
        let mut got = Vec::new();
        for most in [0, 2, 1, 1] {
            t.start_copies(None, most, |s, _| got.push(s));
        }
        assert_eq!(got, [2, 0, 1]);
    }

    #[test]
    fn a_failed_copy_leaves_the_slot_empty() {
        let mut t = SlotTable::new(1, 1);
        t.assign(0, key(1), 1);
        started(&mut t, None);
        assert_eq!(t.copied(0, false), Action::None);
        assert_eq!(t.assigned().collect::<Vec<_>>(), [None]);
    }

    #[test]
    fn a_newer_assignment_wins_over_one_in_flight() {
        let mut t = SlotTable::new(1, 1);
        t.assign(0, key(1), 1);
        t.assign(0, key(2), 2);
        assert_eq!(started(&mut t, None), [(0, key(2))], "the first never started");
        t.assign(0, key(3), 3);
        assert_eq!(t.assigned().collect::<Vec<_>>(), [Some(key(3))]);
        assert_eq!(t.copied(0, true), Action::None, "expert 2 is not wanted any more");
        assert_eq!(started(&mut t, Some(1)), [(0, key(3))]);
        assert_eq!(t.copied(0, true), Action::Publish { key: key(3) });
    }

    #[test]
    fn a_slot_is_closed_when_its_readers_and_its_copy_are_gone() {
        let mut t = SlotTable::new(3, 3);
        for slot in 0..3 {
            t.assign(slot, key(slot as u16), 1);
        }
        started(&mut t, None);
        assert_eq!(t.copied(0, true), Action::Publish { key: key(0) });
        assert_eq!(t.copied(1, true), Action::Publish { key: key(1) });
        let mut retired = Vec::new();
        t.set_open(1, 5, |k| retired.push(k));
        assert_eq!(retired, [key(1)]);
        assert_eq!(t.assigned().collect::<Vec<_>>(), [Some(key(0))]);
        assert!(!t.closed(Some(3)), "slot 1 may be read, slot 2 is being written");
        assert_eq!(t.copied(2, true), Action::None, "closed meanwhile");
        assert!(!t.closed(Some(3)), "slot 1 may be read");
        assert!(t.closed(Some(6)));

        t.set_open(3, 9, |_| unreachable!());
        assert_eq!(t.assigned().collect::<Vec<_>>(), [Some(key(0)), None, None]);
    }

    #[test]
    fn a_slot_that_opens_again_still_waits_for_its_readers() {
        let mut t = SlotTable::new(1, 1);
        t.assign(0, key(1), 1);
        started(&mut t, None);
        t.copied(0, true);
        t.set_open(0, 5, |_| {});
        t.set_open(1, 6, |_| {});
        t.assign(0, key(2), 7);
        assert_eq!(started(&mut t, Some(4)), []);
        assert_eq!(started(&mut t, Some(6)), [(0, key(2))]);
    }

    #[derive(Clone, Copy, Debug)]
    enum Op {
        Assign(u32, u16),
        Open(usize),
        Begin,
        End,
        Start(usize),
        Copied(bool),
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            (0..4u32, 0..12u16).prop_map(|(s, e)| Op::Assign(s, e)),
            Just(Op::Begin),
            Just(Op::End),
            (0..3usize).prop_map(Op::Start),
            (0..5usize).prop_map(Op::Open),
            any::<bool>().prop_map(Op::Copied),
        ]
    }

    proptest! {
        /// Against a model of memory: a published expert's bytes are its own, and no running step
        /// can read a slot that is being written.
        #[test]
        fn readers_never_see_a_slot_being_written(ops in prop::collection::vec(op(), 1..200)) {
            let mut t = SlotTable::new(4, 4);
            let mut now = 0;
            let mut map: HashMap<Key, u32> = HashMap::new();
            let mut content: [Option<Key>; 4] = [None; 4];
            let mut copying: Vec<(u32, Key)> = Vec::new();
            // running steps: (begin, everything they may have looked up)
            let mut steps: Vec<(Stamp, Vec<u32>)> = Vec::new();
            for op in ops {
                now += 1;
                match op {
                    Op::Assign(slot, e) => {
                        if slot as usize >= t.open() || t.assigned().any(|k| k == Some(key(e))) { continue; }
                        if let Action::Retire { key } = t.assign(slot, key(e), now) {
                            prop_assert_eq!(map.remove(&key), Some(slot));
                        }
                    }
                    Op::Open(n) => {
                        let mut retired = Vec::new();
                        t.set_open(n, now, |k| retired.push(k));
                        for k in retired { prop_assert!(map.remove(&k).is_some_and(|s| s as usize >= n)); }
                        if t.closed(steps.iter().map(|s| s.0).min()) {
                            let read = |s: &(Stamp, Vec<u32>)| s.1.iter().any(|s| *s as usize >= n);
                            prop_assert!(!steps.iter().any(read) && copying.iter().all(|c| (c.0 as usize) < n));
                        }
                    }
                    Op::Begin => steps.push((now, map.values().copied().collect())),
                    Op::End => { steps.pop(); }
                    Op::Start(most) => {
                        let before = copying.len();
                        let oldest = steps.iter().map(|s| s.0).min();
                        t.start_copies(oldest, most, |s, k| copying.push((s, k)));
                        prop_assert!(copying.len() - before <= most);
                        for (slot, _) in &copying {
                            prop_assert!(steps.iter().all(|s| !s.1.contains(slot)), "slot {} is read", slot);
                        }
                    }
                    Op::Copied(ok) => {
                        let Some((slot, k)) = copying.pop() else { continue };
                        content[slot as usize] = ok.then_some(k);
                        if let Action::Publish { key } = t.copied(slot, ok) {
                            prop_assert_eq!(content[slot as usize], Some(key));
                            map.insert(key, slot);
                            // running steps look the map up at any time
                            steps.iter_mut().for_each(|s| s.1.push(slot));
                        }
                    }
                }
                for (k, slot) in &map {
                    prop_assert_eq!(content[*slot as usize], Some(*k));
                }
            }
        }
    }
}
