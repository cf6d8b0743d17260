//! How many bytes the slots may have, from what is free on the device.
//!
//! Others allocate there, too: contexts, draft models, projectors, other programs. The slots leave a margin, give memory
//! back when others take it, and take it again when they have left for a while.

use std::{collections::VecDeque, time::Duration};

/// Bytes that stay free beside the slots, whatever was seen: what llama.cpp and the driver allocate without notice. Too
/// many slots slow everything down, too few a little.
pub const MARGIN: u64 = 512 << 20;
/// Bytes that stay free when the slots are allocated: the margin, and what the first batches allocate for good. Kernels are
/// loaded when they are first used; they and their buffers took up to 282 MiB on an H200. What is left of it the slots
/// take when they grow.
pub const FIRST_MARGIN: u64 = MARGIN + (256 << 20);
/// What others take and give back within this time is kept free for them.
const MEMORY: Duration = Duration::from_secs(60);
/// The slots do not grow for so long after others took memory, nor after the first look: a draft model, too, has run by
/// then.
const REST: Duration = Duration::from_secs(10);
/// Growing by less than the lesser of these bytes and this part of all that is allowed is not worth the calls.
const LEAST_GROWTH: u64 = 128 << 20;
const LEAST_SHARE: u64 = 16;

/// What is free, and what the slots have.
#[derive(Clone, Copy, Debug)]
pub struct Seen {
    /// Bytes free on the device.
    pub free: u64,
    /// Bytes of the slots.
    pub slots: u64,
}

/// Follows what others leave.
#[derive(Debug)]
pub struct Budget {
    /// Most bytes of slots.
    most: u64,
    /// What would be free without the slots, by time.
    left: VecDeque<(Duration, u64)>,
    /// Since when there is nothing to add: the first look, or the last time that others took memory.
    rests: Option<Duration>,
}

impl Budget {
    /// At most `most` bytes of slots.
    pub fn new(most: u64) -> Self {
        Budget { most, left: VecDeque::new(), rests: None }
    }

    /// Allows `most` bytes from now on.
    pub fn set_most(&mut self, most: u64) {
        self.most = most;
    }

    /// What is kept free: the margin, and what others have lately taken and given back.
    pub fn margin(&self) -> u64 {
        let left = || self.left.iter().map(|(_, left)| *left);
        MARGIN + left().max().unwrap_or(0) - left().min().unwrap_or(0)
    }

    /// At the time `now`: bytes that the slots should have from now on, `None` when all is well.
    pub fn observe(&mut self, now: Duration, seen: Seen) -> Option<u64> {
        let left = seen.free + seen.slots;
        self.left.push_back((now, left));
        while self.left.front().is_some_and(|(at, _)| *at + MEMORY < now) {
            self.left.pop_front();
        }
        let right = left.saturating_sub(self.margin()).min(self.most);
        if seen.free < MARGIN / 2 && right < seen.slots {
            self.rests = Some(now);
            return Some(right);
        }
        let rested = *self.rests.get_or_insert(now) + REST <= now;
        let worth = right >= seen.slots + LEAST_GROWTH.min(self.most / LEAST_SHARE);
        (rested && worth).then_some(right)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    /// With a first look at 0 s that is over.
    fn rested(most: u64) -> Budget {
        Budget { rests: Some(at(0)), ..Budget::new(most) }
    }

    #[test]
    fn what_the_first_batches_take_is_not_given_to_the_slots() {
        let mut b = Budget::new(8 * GIB);
        let seen = |free: u64| Seen { free: free << 20, slots: GIB };
        assert_eq!(b.observe(at(300), seen(768)), None, "the first look");
        assert_eq!(b.observe(at(301), seen(660)), None);
        assert_eq!(b.observe(at(309), seen(900)), None);
        let more = b.observe(at(310), seen(900));
        assert_eq!(more, Some(GIB + (660 << 20) - MARGIN), "they may take it again");
    }

    #[test]
    fn slots_leave_when_others_come_and_return_when_they_have_left() {
        let mut b = Budget::new(8 * GIB);
        let seen = |others: u64, slots: u64| Seen { free: 12 * GIB - others - slots, slots };
        assert_eq!(b.observe(at(0), seen(3 * GIB, 8 * GIB)), None, "1 GiB is free");
        // another 900 MiB: under half of the margin is left
        let others = 3 * GIB + (900 << 20);
        let less = b.observe(at(1), seen(others, 8 * GIB)).expect("others need it");
        assert_eq!(less, 12 * GIB - others - MARGIN - (900 << 20), "what they took they may take once more");
        assert_eq!(b.observe(at(2), seen(others, less)), None, "room for what comes and goes");
        assert_eq!(b.observe(at(5), seen(3 * GIB, less)), None, "not yet");
        assert!(b.observe(at(12), seen(3 * GIB, less)).is_some_and(|more| more > less));
        assert_eq!(b.observe(at(80), seen(2 * GIB, less)), Some(8 * GIB), "all that is allowed");
    }

    #[test]
    fn slots_never_have_more_than_is_allowed_or_there() {
        let mut b = rested(2 * GIB);
        assert_eq!(b.observe(at(10), Seen { free: 90 * GIB, slots: GIB }), Some(2 * GIB));
        assert_eq!(b.observe(at(11), Seen { free: 90 * GIB, slots: 2 * GIB }), None);
        let mut b = Budget::new(8 * GIB);
        assert_eq!(b.observe(at(0), Seen { free: 0, slots: 100 << 20 }), Some(0));
    }

    #[test]
    fn small_gains_are_left() {
        let mut b = rested(8 * GIB);
        assert_eq!(b.observe(at(10), Seen { free: MARGIN + LEAST_GROWTH - 1, slots: GIB }), None);
        let mut b = rested(8 * GIB);
        let more = b.observe(at(10), Seen { free: MARGIN + LEAST_GROWTH, slots: GIB });
        assert_eq!(more, Some(GIB + LEAST_GROWTH));
    }
}
