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
//!
//! # Memory orderings
//!
//! All that threads share without a lock, here and in the modules around, why each ordering is enough, and which model
//! fails with less. Models are the tests named `loom_...`, see `model_loom`; each row was tried by weakening it in that
//! place alone. What is not listed is relaxed: counters for people, or written before and read behind one of these.
//!
//! | what | ordering | why | fails without |
//! |---|---|---|---|
//! | `Ticket::open` | release | who claims sees the request, and the counters at zero | `a_claim_makes...`, `two_workers...`, `one_request_after_the_other...` |
//! | `Ticket::claim` | acquire | the other half. Not release: a claim that follows another reads what `open` released, through the first | as above |
//! | `Mailbox::units_done` | release | JOIN sees the rows; the next request is written behind all reads of this one | as above |
//! | `Mailbox::done` | acquire | the other half | as above |
//! | `failed` | relaxed | set before `units_done`, read behind `done`; reset before `open` | `join_sees_that_a_unit_failed...`, with the reset behind `open`; `a_unit_that_panics...`, with the report before the mark |
//! | `Remote::epoch` | acquire; the device releases | the worker sees request and activations | `a_device_and_a_worker...` |
//! | `Remote::answer` | release; the device acquires | the device sees the row, and writes the next request behind all reads of this one | `a_device_and_a_worker...`, `a_row_is_answered...` |
//! | `Engine::remote_seen`, load | acquire | whoever sees that an epoch was taken does not then see an older one as new | `the_requests_of_a_device...`, also with the two loads the other way round |
//! | `Engine::remote_seen`, exchange | release | the other half. Not acquire: the value is the one that was just loaded | `the_requests_of_a_device...` |
//! | `Engine::tokens_ready`, add | release | who waits for the tokens sees them converted | `units_wait...`, `one_request_after_the_other...` |
//! | `Engine::up_done` | acquire and release | the last of an expert's chunks converts the rows of all | `units_wait...`, with either half alone |
//! | `Engine::hidden_ready`, store | release | who waits for an expert's rows sees them converted | `units_wait...`, `one_request_after_the_other...` |
//! | `Engine::wait_for` | acquire | the other half of three | `units_wait...`, `one_request_after_the_other...` |
//! | `Engine::down_done` | acquire and release | the last of an expert's chunks answers for all | `a_row_is_answered...`, with either half alone |
//! | `Engine::is_idle` before a request is written | (`done`) | threads of one that was given up still read it | `what_was_given_up...`, `the_requests_of_a_device...` |
//! | `WorkerPool`: `active`, `stop`, `version` | relaxed | the lock of `parked`, or of the engines, is taken behind each change and before each last look | `a_step_finds_a_worker...`, `the_end_of_a_pool...`, without the lock or with the change behind it |
//! | `LayerMap`, store | release | a slot is in the map when its bytes are in place | `a_step_never_reads...` |
//! | `LayerMap`, load and copy | acquire | the other half, for steps that began before | `a_step_never_reads...` |
//! | `Model::map_version`, add behind the store | release | who saw the number has every change that it counts | `who_copies_a_map...`, also with the store behind it |
//! | `Model::map_version`, load before the copy | acquire | the other half | `who_copies_a_map...` |
//! | running steps, slots, orders | a lock | a slot is copied into behind the end of every step that could read it | `a_step_never_reads...`, when a step is not noted, or its age ignored |
//! | events of the planner | a lock | who takes one holds the worker: a plan that was wished for is there | `a_plan_that_was_wished_for...`, when it is taken first |

use std::{any::Any, sync::Arc};

use crossbeam_utils::CachePadded;

use crate::sync::{
    atomic::{AtomicU32, AtomicU64, Ordering},
    memory,
};

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
            memory::reads(&head.layer, size_of::<[u32; 3]>());
            let n = (head.n_rows as usize).min(self.max_rows);
            (head, std::slice::from_raw_parts(self.request.add(1).cast::<u32>(), n))
        };
        let row = |r: &u32| {
            memory::reads(r, size_of::<u32>());
            (r >> 16, r & 0xffff)
        };
        (head.layer as usize, head.n_tokens as usize, rows.iter().map(row))
    }

    /// Answers `row` of request `epoch`: the row is in place, or it failed.
    pub fn answer(&self, row: u32, epoch: u32, ok: bool) {
        debug_assert!((row as usize) < self.max_rows);
        let answer = if ok { epoch } else { epoch | FAILED_BIT };
        // SAFETY: there is an answer for each of `max_rows` rows.
        unsafe { (*self.answers.add(row as usize)).0.store(answer, Ordering::Release) };
    }
}

/// The device's end of a [`Remote`], in ordinary memory.
#[cfg(test)]
pub(crate) mod device_end {
    use std::cell::UnsafeCell;

    use super::*;
    use crate::{cold::kernel::Line, sync::thread};

    const MAX_ROWS: usize = 2;

    #[repr(C)]
    struct Posted {
        head: RemoteRequest,
        rows: [u32; MAX_ROWS],
    }

    struct Memory {
        posted: UnsafeCell<Posted>,
        answers: [Answer; MAX_ROWS],
        act: UnsafeCell<Vec<Line>>,
        out: UnsafeCell<Vec<Line>>,
    }

    // SAFETY: access follows the protocol of `Remote`, which is what is tested.
    unsafe impl Send for Memory {}
    // SAFETY: as above.
    unsafe impl Sync for Memory {}

    pub(crate) struct DeviceEnd {
        memory: Arc<Memory>,
        floats: usize,
    }

    impl DeviceEnd {
        /// Rows of `floats` floats, those of a whole number of lines.
        pub(crate) fn new(floats: usize) -> Self {
            let lines = floats * size_of::<f32>() / size_of::<Line>();
            let head =
                RemoteRequest { epoch: AtomicU32::new(0), layer: 0, n_tokens: 0, n_rows: 0, pad: [0; 12] };
            let memory = Arc::new(Memory {
                posted: UnsafeCell::new(Posted { head, rows: [0; MAX_ROWS] }),
                answers: std::array::from_fn(|_| Answer(AtomicU32::new(0))),
                act: UnsafeCell::new(vec![Line::default(); lines]),
                out: UnsafeCell::new(vec![Line::default(); MAX_ROWS * lines]),
            });
            let end = DeviceEnd { memory, floats };
            let remote = end.remote();
            memory::watch(remote.request, size_of::<Posted>());
            memory::watch(remote.act, lines * size_of::<Line>());
            memory::watch(remote.out, MAX_ROWS * lines * size_of::<Line>());
            end
        }

        pub(crate) fn remote(&self) -> Remote {
            let m = &self.memory;
            let stride = self.floats * size_of::<f32>();
            // SAFETY: the vectors never change; only their lines do.
            let (act, out) = unsafe { ((*m.act.get()).as_mut_ptr(), (*m.out.get()).as_mut_ptr()) };
            Remote {
                request: m.posted.get().cast(),
                act: act.cast(),
                act_stride: stride,
                answers: m.answers.as_ptr(),
                out: out.cast(),
                out_stride: stride,
                max_rows: MAX_ROWS,
                memory: m.clone(),
            }
        }

        /// Asks for row i of the token by each of `experts`, with activations of `act`.
        pub(crate) fn post(&self, epoch: u32, act: f32, experts: &[u32]) {
            let (r, posted) = (self.remote(), self.memory.posted.get());
            memory::writes(r.act, r.act_stride);
            memory::writes(r.request, size_of::<Posted>());
            // SAFETY: the request before is answered, so the memory is ours. What is atomic is not written here.
            unsafe {
                std::slice::from_raw_parts_mut(r.act.cast::<f32>(), self.floats).fill(act);
                (*posted).head.n_tokens = 1;
                (*posted).head.n_rows = experts.len() as u32;
                for (i, expert) in experts.iter().enumerate() {
                    (*posted).rows[i] = (i as u32) << 16 | expert;
                }
                (*posted).head.epoch.store(epoch, Ordering::Release);
            }
        }

        /// Waits for `row` of request `epoch`, and does something useful meanwhile if there is something; what is in the
        /// row, or that it failed.
        pub(crate) fn wait(&self, epoch: u32, row: usize, meanwhile: impl Fn() -> bool) -> Option<Vec<f32>> {
            loop {
                let answer = self.memory.answers[row].0.load(Ordering::Acquire);
                if answer & !FAILED_BIT == epoch {
                    let r = self.remote();
                    let at = r.out.wrapping_add(row * r.out_stride).cast::<f32>();
                    memory::reads(at, r.out_stride);
                    // SAFETY: the row is ours until the next request.
                    let row = unsafe { std::slice::from_raw_parts(at, self.floats) };
                    return (answer == epoch).then(|| row.to_vec());
                }
                if !meanwhile() {
                    thread::yield_now();
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{device_end::DeviceEnd, *};
    use crate::{
        model_loom::check,
        sync::{UnsafeCell, thread},
    };

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
        let first = if cfg!(miri) { MAX_UNITS - 100 } else { 0 };
        assert!(first == 0 || t.claim(|_, _| first).is_some());
        for unit in first..MAX_UNITS {
            assert_eq!(t.claim(ONE), Some(Claim { epoch: u32::MAX, unit, n: 1 }));
        }
        assert_eq!(t.claim(ONE), None);
    }

    #[test]
    fn threads_share_units_without_loss() {
        let m = Mailbox::default();
        for epoch in 1..if cfg!(miri) { 10 } else { 200 } {
            m.post(epoch, 64);
            let sum = std::sync::atomic::AtomicU32::new(0);
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

    /// A mailbox with a request and rows that say of which epoch they are.
    #[derive(Default)]
    struct Posted {
        mailbox: Mailbox,
        request: UnsafeCell<u32>,
        rows: [UnsafeCell<u32>; 2],
    }

    // SAFETY: access follows the protocol of the mailbox, which is what is tested.
    unsafe impl Send for Posted {}
    // SAFETY: as above.
    unsafe impl Sync for Posted {}

    impl Posted {
        fn post(&self, epoch: u32) {
            // SAFETY: every unit of the request before is done.
            self.request.with_mut(|r| unsafe { *r = epoch });
            self.mailbox.post(epoch, 2);
        }

        /// Does a unit if there is one. Unit 0 of a request that `fails` does.
        fn work(&self, fails: impl Fn(u32) -> bool) -> bool {
            let Some(c) = self.mailbox.ticket.claim(ONE) else { return false };
            // SAFETY: the claim makes the request readable, and the row of the unit ours.
            let epoch = self.request.with(|r| unsafe { *r });
            assert_eq!(epoch, c.epoch);
            // SAFETY: as above.
            self.rows[c.unit as usize].with_mut(|r| unsafe { *r = epoch });
            if c.unit == 0 && fails(epoch) {
                self.mailbox.unit_failed();
            }
            self.mailbox.units_done(c.n);
            true
        }

        /// JOIN: helps, waits and reads every row.
        fn join(&self, fails: impl Fn(u32) -> bool) -> Vec<u32> {
            while self.work(&fails) {}
            while self.mailbox.done() != 2 {
                thread::yield_now();
            }
            // SAFETY: all units are done.
            self.rows.iter().map(|r| r.with(|r| unsafe { *r })).collect()
        }
    }

    #[test]
    fn loom_a_claim_makes_the_request_readable_and_join_sees_every_row() {
        check(|| {
            let m = Arc::new(Posted::default());
            let worker = m.clone();
            // some of its looks are of a thread that was held up since the request before
            let worker = thread::spawn(move || (0..3).for_each(|_| _ = worker.work(|_| false)));
            for epoch in [1, 2] {
                m.post(epoch);
                assert_eq!(m.join(|_| false), [epoch; 2]);
            }
            worker.join().unwrap();
        });
    }

    #[test]
    fn loom_two_workers_and_join_share_a_request() {
        check(|| {
            let m = Arc::new(Posted::default());
            let workers = [m.clone(), m.clone()].map(|m| thread::spawn(move || _ = m.work(|_| false)));
            m.post(1);
            assert_eq!(m.join(|_| false), [1; 2]);
            m.post(2);
            for w in workers {
                w.join().unwrap();
            }
            assert_eq!(m.join(|_| false), [2; 2]);
        });
    }

    #[test]
    fn loom_join_sees_that_a_unit_failed_and_the_next_request_starts_anew() {
        // of two requests the first, or both
        for fails in [|epoch| epoch == 1, |_| true] as [fn(u32) -> bool; 2] {
            check(move || {
                let m = Arc::new(Posted::default());
                let worker = m.clone();
                let worker = thread::spawn(move || (0..2).for_each(|_| _ = worker.work(fails)));
                for epoch in [1, 2] {
                    m.post(epoch);
                    m.join(fails);
                    assert_eq!(m.mailbox.has_failed(), fails(epoch));
                }
                worker.join().unwrap();
            });
        }
    }

    #[test]
    fn loom_a_device_and_a_worker_hand_requests_and_rows_to_each_other() {
        check(|| {
            let device = DeviceEnd::new(16);
            let remote = device.remote();
            let worker = thread::spawn(move || {
                for epoch in [1, 2] {
                    while remote.epoch() != epoch {
                        thread::yield_now();
                    }
                    // SAFETY: the epoch has been seen, and nothing is answered.
                    let (_, n_tokens, rows) = unsafe { remote.read() };
                    assert_eq!((n_tokens, rows.collect::<Vec<_>>()), (1, vec![(0, epoch)]));
                    memory::reads(remote.act, remote.act_stride);
                    memory::writes(remote.out, remote.out_stride);
                    // SAFETY: the row is ours until it is answered.
                    unsafe { std::ptr::copy_nonoverlapping(remote.act, remote.out, remote.out_stride) };
                    remote.answer(0, epoch, true);
                }
            });
            for epoch in [1, 2] {
                device.post(epoch, epoch as f32, &[epoch]);
                assert_eq!(device.wait(epoch, 0, || false), Some(vec![epoch as f32; 16]));
            }
            worker.join().unwrap();
        });
    }
}
