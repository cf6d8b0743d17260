//! The hand-off of one layer's cold experts: a request that DISPATCH posts, rows that the workers
//! write, and the counters by which both sides know where the other is.
//!
//! A context has one mailbox and at most one request is open at a time, because a graph runs its
//! nodes in order: DISPATCH(l), ..., JOIN(l), DISPATCH(l+1). Addresses never change while the context
//! lives. The protocol, in the order in which things happen:
//!
//! 1. DISPATCH fills the request (plain memory) and opens the [`Ticket`] with a new epoch.
//! 2. Any thread claims units by moving the ticket on. A successful claim (acquire) makes the request
//!    readable, and it stays as it is until those units are reported done: the request cannot complete
//!    without them, and only a complete request is ever overwritten. Nobody reads it without a claim.
//! 3. Claimed units end with `done += n` (release).
//! 4. JOIN sees `done == total` (acquire), and with it every row.
//!
//! This is also why the ticket carries the total: a thread that finds nothing to claim must not have
//! touched the request.

use std::{
    any::Any,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
};

use crossbeam_utils::CachePadded;

/// Most units of one request; the ticket packs the count into 16 bits.
pub const MAX_UNITS: u32 = u16::MAX as u32;

/// `epoch:32 | next:16 | total:16`. A unit is claimed by moving `next` on.
#[derive(Default)]
pub struct Ticket(AtomicU64);

/// Claimed units of work.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Claim {
    /// The request they belong to.
    pub epoch: u32,
    /// Index of the first in its request.
    pub unit: u32,
    /// How many.
    pub n: u32,
}

impl Ticket {
    fn pack(epoch: u32, next: u32, total: u32) -> u64 {
        u64::from(epoch) << 32 | u64::from(next) << 16 | u64::from(total)
    }

    fn unpack(v: u64) -> (u32, u32, u32) {
        ((v >> 32) as u32, (v >> 16) as u32 & 0xffff, v as u32 & 0xffff)
    }

    /// Offers `total` units under `epoch`. The request must be complete in memory.
    pub fn open(&self, epoch: u32, total: u32) {
        debug_assert!(total <= MAX_UNITS);
        self.0.store(Self::pack(epoch, 0, total), Ordering::Release);
    }

    /// Takes the next units, or `None` when all are taken. `how_many` says how many for the next unit and the total,
    /// at least one.
    pub fn claim(&self, how_many: impl Fn(u32, u32) -> u32) -> Option<Claim> {
        let mut v = self.0.load(Ordering::Relaxed);
        loop {
            let (epoch, next, total) = Self::unpack(v);
            if next >= total {
                return None;
            }
            let n = how_many(next, total).clamp(1, total - next);
            match self.0.compare_exchange_weak(
                v,
                Self::pack(epoch, next + n, total),
                Ordering::Acquire,
                Ordering::Relaxed,
            ) {
                Ok(_) => return Some(Claim { epoch, unit: next, n }),
                Err(now) => v = now,
            }
        }
    }
}

/// The counters of a mailbox, each on a cache line of its own: workers hammer `ticket` while JOIN
/// watches `done`.
#[derive(Default)]
pub struct Mailbox {
    /// Which units of which request are still to be had.
    pub ticket: CachePadded<Ticket>,
    done: CachePadded<AtomicU32>,
    failed: CachePadded<AtomicU32>,
}

impl Mailbox {
    /// Opens request `epoch` with `total` units. Only DISPATCH calls this, and only after the request
    /// before it was complete or given up.
    pub fn post(&self, epoch: u32, total: u32) {
        self.done.store(0, Ordering::Relaxed);
        self.failed.store(0, Ordering::Relaxed);
        self.ticket.open(epoch, total);
    }

    /// Reports claimed units as finished; what the thread wrote before is visible to JOIN.
    pub fn units_done(&self, n: u32) {
        self.done.fetch_add(n, Ordering::Release);
    }

    /// Marks the request as failed. The unit must still be reported with [`Mailbox::units_done`].
    pub fn unit_failed(&self) {
        self.failed.store(1, Ordering::Relaxed);
    }

    /// Units reported done; once it equals the total, every row of the request is readable.
    pub fn done(&self) -> u32 {
        self.done.load(Ordering::Acquire)
    }

    /// Whether a unit failed. Meaningful once all are done.
    pub fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Relaxed) != 0
    }
}

/// Set in the answer to a row that could not be computed.
pub const FAILED_BIT: u32 = 1 << 31;

/// Head of a request in memory that a device writes; the rows follow, `row << 16 | expert` each.
#[repr(C, align(64))]
pub struct RemoteRequest {
    /// Last written: all else is in place when it changes. Never has [`FAILED_BIT`].
    pub epoch: AtomicU32,
    /// Hot layer.
    pub layer: u32,
    /// Tokens of the ubatch.
    pub n_tokens: u32,
    /// Cold rows.
    pub n_rows: u32,
    pad: [u32; 12],
}

/// The answer to a row. On a cache line of its own: every poll of the device takes the line from the core
/// that wants to write it, about 1 us each time.
#[repr(C, align(64))]
pub struct Answer(AtomicU32);

/// The workers' end of a mailbox whose DISPATCH and JOIN run on a device: memory that both sides see.
///
/// The device writes request and activations and raises the epoch (release); the workers read them after
/// they have seen it (acquire), write each row, and then its answer, the epoch (release), for which JOIN
/// waits row by row. The device posts again only when JOIN has every answer or has given up.
#[derive(Clone)]
pub struct Remote {
    /// The request.
    pub request: *const RemoteRequest,
    /// Activations, a row a token.
    pub act: *mut u8,
    /// Bytes from an activation row to the next.
    pub act_stride: usize,
    /// One a row of the result.
    pub answers: *const Answer,
    /// Rows of the result.
    pub out: *mut u8,
    /// Bytes from a row of the result to the next.
    pub out_stride: usize,
    /// Rows there is room for.
    pub max_rows: usize,
    /// What owns the memory: workers look at it until they learn that the context is gone.
    pub memory: Arc<dyn Any + Send + Sync>,
}

// SAFETY: we hold the memory, and the protocol above orders all access.
unsafe impl Send for Remote {}
// SAFETY: as above.
unsafe impl Sync for Remote {}

impl Remote {
    /// Epoch of the last request.
    pub fn epoch(&self) -> u32 {
        // SAFETY: the request is valid while we are.
        unsafe { (*self.request).epoch.load(Ordering::Acquire) }
    }

    /// The last request: layer, tokens, and the rows as `(row, expert)`.
    ///
    /// # Safety
    /// Its epoch has been seen, and not all of its rows are answered.
    pub unsafe fn read(&self) -> (usize, usize, impl Iterator<Item = (u32, u32)>) {
        // SAFETY: the device writes no request before this one is answered.
        let (head, rows) = unsafe {
            let head = &*self.request;
            let n = (head.n_rows as usize).min(self.max_rows);
            (head, std::slice::from_raw_parts(self.request.add(1).cast::<u32>(), n))
        };
        (head.layer as usize, head.n_tokens as usize, rows.iter().map(|r| (r >> 16, r & 0xffff)))
    }

    /// Answers `row` of request `epoch`: the row is in place, or it failed.
    pub fn answer(&self, row: u32, epoch: u32, ok: bool) {
        debug_assert!((row as usize) < self.max_rows);
        let answer = if ok { epoch } else { epoch | FAILED_BIT };
        // SAFETY: there is an answer for each of `max_rows` rows.
        unsafe { (*self.answers.add(row as usize)).0.store(answer, Ordering::Release) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: fn(u32, u32) -> u32 = |_, _| 1;

    #[test]
    fn every_unit_is_claimed_once() {
        let t = Ticket::default();
        assert_eq!(t.claim(ONE), None);
        t.open(7, 3);
        let got: Vec<_> = std::iter::from_fn(|| t.claim(ONE)).collect();
        assert_eq!(got, (0..3).map(|unit| Claim { epoch: 7, unit, n: 1 }).collect::<Vec<_>>());
        t.open(8, 1);
        assert_eq!(t.claim(ONE), Some(Claim { epoch: 8, unit: 0, n: 1 }));
        assert_eq!(t.claim(ONE), None);
    }

    #[test]
    fn several_are_claimed_at_once_and_never_more_than_there_are() {
        let t = Ticket::default();
        t.open(1, 10);
        let half = |next: u32, total: u32| (total - next) / 2;
        let got: Vec<_> = std::iter::from_fn(|| t.claim(half)).map(|c| (c.unit, c.n)).collect();
        assert_eq!(got, [(0, 5), (5, 2), (7, 1), (8, 1), (9, 1)]);
        t.open(2, 3);
        assert_eq!(t.claim(|_, _| 100), Some(Claim { epoch: 2, unit: 0, n: 3 }));
        assert_eq!(t.claim(ONE), None);
    }

    #[test]
    fn the_largest_request_fits() {
        let t = Ticket::default();
        t.open(u32::MAX, MAX_UNITS);
        for unit in 0..MAX_UNITS {
            assert_eq!(t.claim(ONE), Some(Claim { epoch: u32::MAX, unit, n: 1 }));
        }
        assert_eq!(t.claim(ONE), None);
    }

    #[test]
    fn threads_share_units_without_loss() {
        let m = Mailbox::default();
        for epoch in 1..200 {
            m.post(epoch, 64);
            let sum = AtomicU32::new(0);
            std::thread::scope(|s| {
                for _ in 0..3 {
                    s.spawn(|| {
                        while let Some(c) = m.ticket.claim(|next, _| next % 5) {
                            assert_eq!(c.epoch, epoch);
                            sum.fetch_add((c.unit..c.unit + c.n).sum(), Ordering::Relaxed);
                            m.units_done(c.n);
                        }
                    });
                }
            });
            assert_eq!((m.done(), sum.into_inner()), (64, 63 * 64 / 2));
        }
    }
}
