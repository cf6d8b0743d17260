//! One layer's cold experts, cut into units that threads claim one by one.
//!
//! Units of a request, in claiming order:
//!
//! | units | work | waits for |
//! |---|---|---|
//! | one a token | convert the activation row | - |
//! | chunks of hidden rows, expert by expert | gate, up, activation; the last of an expert converts the result | all tokens converted |
//! | chunks of output rows, expert by expert | down | the expert's hidden rows |
//!
//! Threads claim several units that follow each other while there are many left, and one at a time at the end:
//! a claim is a cache line that all threads want, and a longer stream of weights is read faster.
//!
//! A unit waits only for units before it in that order, and those are being worked on by threads that
//! have claimed them: no deadlock, and no barrier that stops everyone for the slowest. An expert that
//! several tokens share is one group, so its weights are read once.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::{Duration, Instant},
};

use super::kernel::{Layer, Line, Matrix, Target};
use crate::{
    fault,
    mailbox::{Claim, MAX_UNITS, Mailbox, Remote},
    sync::{
        UnsafeCell,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
        hint, memory, thread,
    },
};

/// Rows are cut at multiples of this many elements: vector body and scalar tail of ggml's activations
/// round differently, so a chunk must start where the body does. An AVX-512 register holds 16 floats,
/// the longest of SVE 64.
const ROW_ALIGN: usize = if cfg!(target_arch = "x86_64") { 16 } else { 64 };
/// Weight bytes a unit should read, some 4 us of a core: short enough that 16 threads share two experts evenly.
const UNIT_BYTES: usize = 32 << 10;
/// Most units of a claim.
const MAX_CLAIM: u32 = 8;
/// Threads take this part of what they would get if they divided the rest evenly, so that none is late.
const CLAIM_PART: u32 = 2;
/// Small matrices are cut in so many parts, but not into units of less than this.
const PARTS: usize = 8;
const MIN_UNIT_BYTES: usize = 16 << 10;
/// How long a unit of a device's request may go on after the device has gone on without it.
const REPORT_BOUND: Duration = Duration::from_secs(1);
/// How long the threads of a failed request may take to leave it.
const SETTLE_BOUND: Duration = Duration::from_millis(100);
/// Spins between two looks at the clock (or a yield) while waiting. loom runs the others in each of them.
const SPINS: u32 = if cfg!(loom) { 1 } else { 256 };

/// How long JOIN, and a unit, waits for other threads before the step fails. A layer's cold experts take
/// milliseconds; this is for a worker that died, not for a slow one.
const JOIN_BOUND: Duration = Duration::from_secs(10);

/// [`JOIN_BOUND`], shorter in tests.
pub fn join_bound() -> Duration {
    fault::armed("bound").map_or(JOIN_BOUND, Duration::from_millis)
}

/// A routed expert without a slot.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct ColdRow {
    /// The expert.
    pub expert: u32,
    /// The token of the ubatch.
    pub token: u32,
    /// Row of the result: `token * n_used + k`.
    pub row: u32,
}

/// Why a request gave no rows.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum EngineError {
    /// A unit panicked.
    #[error("a worker failed while it computed a cold expert")]
    Failed,
    /// Not all units were reported within the bound.
    #[error("the cold experts of a layer were not ready after {0:?}")]
    TimedOut(Duration),
}

/// An expert and the rows that want it.
#[derive(Clone, Copy, Default)]
struct Group {
    expert: usize,
    /// Range in `Request::rows`.
    first: usize,
    end: usize,
}

/// What DISPATCH asks for. Written by one thread while no unit is open, read under a claim.
#[derive(Default)]
struct Request {
    layer: usize,
    /// Of the device that posted it.
    remote_epoch: u32,
    rows: Vec<ColdRow>,
    groups: Vec<Group>,
    convert_units: usize,
    up_rows: usize,
    up_chunks: usize,
    down_rows: usize,
    down_chunks: usize,
}

/// Chunks of a group that follow each other.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Chunks {
    first: usize,
    n: usize,
}

/// Units that follow each other and do the same.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Part {
    Convert { token: usize },
    Up { group: usize, chunks: Chunks },
    Down { group: usize, chunks: Chunks },
}

impl Part {
    fn len(&self) -> usize {
        match self {
            Part::Convert { .. } => 1,
            Part::Up { chunks, .. } | Part::Down { chunks, .. } => chunks.n,
        }
    }
}

impl Request {
    /// Cuts `rows` of `layer`, which is the layer with this index, into units; the number of groups.
    fn fill(
        &mut self,
        l: &Layer,
        layer: usize,
        n_tokens: usize,
        rows: impl Iterator<Item = ColdRow>,
    ) -> usize {
        self.layer = layer;
        self.rows.clear();
        self.rows.extend(rows);
        self.rows.sort_unstable();
        self.groups.clear();
        for (i, r) in self.rows.iter().enumerate() {
            match self.groups.last_mut() {
                Some(g) if g.expert == r.expert as usize => g.end = i + 1,
                _ => self.groups.push(Group { expert: r.expert as usize, first: i, end: i + 1 }),
            }
        }

        self.convert_units = if l.up.from_float.is_some() { n_tokens } else { 0 };
        let up_bytes =
            l.up.row_bytes + l.gate.map_or(if l.merged { l.up.row_bytes } else { 0 }, |g| g.row_bytes);
        (self.up_rows, self.up_chunks) = chunk(l.n_ff(), up_bytes);
        (self.down_rows, self.down_chunks) = chunk(l.down.n_out, l.down.row_bytes);
        let groups = self.groups.len();
        while self.convert_units + groups * (self.up_chunks + self.down_chunks) > MAX_UNITS as usize {
            self.up_rows *= 2;
            self.down_rows *= 2;
            self.up_chunks = l.n_ff().div_ceil(self.up_rows);
            self.down_chunks = l.down.n_out.div_ceil(self.down_rows);
        }
        groups
    }

    /// Where the units of each kind end, the last of them the request's.
    fn ends(&self) -> [u32; 3] {
        let up_end = self.convert_units + self.groups.len() * self.up_chunks;
        let total = up_end + self.groups.len() * self.down_chunks;
        [self.convert_units, up_end, total].map(|n| n as u32)
    }

    /// The units from `unit` on, up to `end` and to the last that does the same.
    fn part(&self, unit: usize, end: usize) -> Part {
        let Some(up) = unit.checked_sub(self.convert_units) else { return Part::Convert { token: unit } };
        let n = end - unit;
        let chunks = |at: usize, of: usize| Chunks { first: at % of, n: n.min(of - at % of) };
        match up.checked_sub(self.groups.len() * self.up_chunks) {
            None => Part::Up { group: up / self.up_chunks, chunks: chunks(up, self.up_chunks) },
            Some(down) => {
                Part::Down { group: down / self.down_chunks, chunks: chunks(down, self.down_chunks) }
            }
        }
    }
}

/// A buffer that several threads write in parts that never overlap.
struct Shared<T>(Box<[std::cell::UnsafeCell<T>]>);

// SAFETY: every element is written by the one unit that owns it and read only by units that waited
// for that one (see the table above), or by JOIN after all are done.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T: Copy + Default> Shared<T> {
    fn new(n: usize) -> Self {
        Shared((0..n).map(|_| std::cell::UnsafeCell::new(T::default())).collect())
    }

    fn at(&self, i: usize) -> *mut T {
        self.0[i..].as_ptr().cast::<T>().cast_mut()
    }
}

struct Rows {
    buf: Buffer,
    /// Bytes from a row to the next.
    stride: usize,
}

enum Buffer {
    Ours(Shared<Line>),
    /// Shared with a device; see `Remote`.
    Theirs(*mut u8),
}

// SAFETY: as for `Shared`; a device takes part as its protocol allows.
unsafe impl Sync for Buffer {}
// SAFETY: as above.
unsafe impl Send for Buffer {}

impl Rows {
    fn new(n: usize, row_bytes: usize) -> Self {
        let lines = row_bytes.div_ceil(size_of::<Line>()).max(1);
        let rows = Rows { buf: Buffer::Ours(Shared::new(n * lines)), stride: lines * size_of::<Line>() };
        memory::watch(rows.at(0), n * rows.stride);
        rows
    }

    fn theirs(first: *mut u8, stride: usize) -> Self {
        Rows { buf: Buffer::Theirs(first), stride }
    }

    fn at(&self, row: usize) -> *mut u8 {
        match &self.buf {
            Buffer::Ours(lines) => lines.at(row * (self.stride / size_of::<Line>())).cast(),
            Buffer::Theirs(first) => first.wrapping_add(row * self.stride),
        }
    }

    fn f32(&self, row: usize) -> *mut f32 {
        self.at(row).cast()
    }
}

/// The cold engine of one context.
pub struct Engine {
    layers: Arc<[Layer]>,
    mailbox: Mailbox,
    /// Where requests come from when DISPATCH runs on a device.
    remote: Option<Remote>,
    /// Epoch of the last request that was taken from there.
    remote_seen: AtomicU32,
    request: UnsafeCell<Request>,
    epoch: AtomicU32,
    total: AtomicU32,
    /// Where the units of the open request that convert end, and those of hidden rows. Read without a claim: a stale
    /// value makes a claim longer or shorter than it should be, and nothing else.
    convert_end: AtomicU32,
    up_end: AtomicU32,
    /// Threads that claim units.
    n_threads: AtomicU32,
    /// Whether the last `post` opened a request; see there.
    open: AtomicBool,
    tokens_ready: AtomicU32,
    /// Per group: chunks of hidden rows done.
    up_done: Box<[AtomicU32]>,
    /// Per group: 1 once the hidden rows are converted.
    hidden_ready: Box<[AtomicU32]>,
    /// Per group: chunks of output rows done.
    down_done: Box<[AtomicU32]>,
    /// Activations as the router's layer gives them, `[n_embd]` f32 a token.
    act: Rows,
    /// The same, converted for the first projections.
    act_conv: Rows,
    /// Gate result, then the activated hidden row, `[n_ff]` f32 a cold row.
    hidden: Rows,
    /// Up result, `[n_ff]` f32 a cold row.
    up: Rows,
    /// Hidden rows converted for the down projection.
    hidden_conv: Rows,
    /// Output, `[n_embd]` f32 a cold row.
    out: Rows,
    busy_ns: AtomicU64,
    /// When the device's request was seen, in ns since `made`, and by layer how long its last one took.
    made: Instant,
    seen_ns: AtomicU64,
    took_ns: Box<[AtomicU32]>,
}

// SAFETY: `request` is written only by `post`, while no unit is open (its contract), and read only
// under a claim; see `mailbox`. All else is atomics or `Shared`.
unsafe impl Sync for Engine {}
// SAFETY: nothing in it is bound to a thread.
unsafe impl Send for Engine {}

impl Engine {
    /// An engine for ubatches of up to `max_tokens` tokens over `layers`. With `remote`, requests come from
    /// there and nobody calls [`Engine::post`].
    pub fn new(layers: Arc<[Layer]>, max_tokens: usize, remote: Option<Remote>) -> Self {
        let max = |f: &dyn Fn(&Layer) -> usize| layers.iter().map(f).max().unwrap_or(0);
        let rows = max_tokens * max(&|l| l.n_used);
        let f32s = size_of::<f32>();
        let (act, out) = match &remote {
            Some(r) => (Rows::theirs(r.act, r.act_stride), Rows::theirs(r.out, r.out_stride)),
            None => (
                Rows::new(max_tokens, max(&|l| l.n_embd()) * f32s),
                Rows::new(rows, max(&|l| l.down.n_out) * f32s),
            ),
        };
        Engine {
            mailbox: Mailbox::default(),
            remote,
            remote_seen: AtomicU32::new(0),
            request: UnsafeCell::default(),
            epoch: AtomicU32::new(0),
            total: AtomicU32::new(0),
            convert_end: AtomicU32::new(0),
            up_end: AtomicU32::new(0),
            n_threads: AtomicU32::new(1),
            open: AtomicBool::new(false),
            tokens_ready: AtomicU32::new(0),
            up_done: (0..rows).map(|_| AtomicU32::new(0)).collect(),
            hidden_ready: (0..rows).map(|_| AtomicU32::new(0)).collect(),
            down_done: (0..rows).map(|_| AtomicU32::new(0)).collect(),
            act,
            act_conv: Rows::new(max_tokens, max(&|l| l.up.converted_bytes())),
            hidden: Rows::new(rows, max(&|l| l.n_ff()) * f32s),
            up: Rows::new(rows, max(&|l| l.n_ff()) * f32s),
            hidden_conv: Rows::new(rows, max(&|l| l.down.converted_bytes())),
            out,
            busy_ns: AtomicU64::new(0),
            made: Instant::now(),
            seen_ns: AtomicU64::new(0),
            took_ns: layers.iter().map(|_| AtomicU32::new(0)).collect(),
            layers,
        }
    }

    /// Tells how many threads work for it.
    pub fn set_threads(&self, n: usize) {
        self.n_threads.store(n.max(1) as u32, Ordering::Relaxed);
    }

    /// How long the last request of a device for `layer` took, from the time that it was seen, in ns.
    pub fn took_ns(&self, layer: usize) -> u32 {
        self.took_ns[layer].load(Ordering::Relaxed)
    }

    /// Time that threads spent in units since the last reset, in us, summed over threads.
    pub fn busy_us(&self) -> u64 {
        self.busy_ns.load(Ordering::Relaxed) / 1000
    }

    /// Sets the busy time to zero.
    pub fn reset_busy(&self) {
        self.busy_ns.store(0, Ordering::Relaxed);
    }

    /// Opens a request for `rows` of `layer`; `act` gives the activation row of a token.
    ///
    /// If the request before was given up and a thread still works on it, nothing is opened, and
    /// [`Engine::finish`] fails: its memory is in use. Once that thread is through, all is well again.
    ///
    /// # Safety
    /// Called by DISPATCH only, after the request before was waited for; `act(t)` is valid for
    /// `n_embd` reads for every token of `rows`; experts are below the layer's count.
    pub unsafe fn post(
        &self,
        layer: usize,
        n_tokens: usize,
        rows: &[ColdRow],
        act: impl Fn(usize) -> *const f32,
    ) {
        if !self.begin(layer, n_tokens, rows.iter().copied()) {
            return;
        }
        let n_embd = self.layers[layer].n_embd();
        for t in 0..n_tokens {
            // SAFETY: the caller vouches for the source; the row holds `n_embd` elements.
            unsafe { std::ptr::copy_nonoverlapping(act(t), self.act.f32(t), n_embd) };
            memory::writes(self.act.f32(t), n_embd * size_of::<f32>());
        }
        self.open();
    }

    /// Opens the request that a device has posted, if there is a new one and no other thread was faster.
    fn take_remote(&self) {
        let Some(remote) = &self.remote else { return };
        // In this order: what is seen is never newer than the epoch, so a thread that was held up between
        // the two cannot bring an old request back.
        let seen = self.remote_seen.load(Ordering::Acquire);
        let epoch = remote.epoch();
        if epoch == seen
            || self.remote_seen.compare_exchange(seen, epoch, Ordering::Release, Ordering::Relaxed).is_err()
        {
            return;
        }
        // SAFETY: its epoch has just been seen, and only this thread goes on to answer it.
        let (layer, n_tokens, rows) = unsafe { remote.read() };
        self.seen_ns.store(self.made.elapsed().as_nanos() as u64, Ordering::Relaxed);
        self.took_ns[layer].store(0, Ordering::Relaxed);
        let n_used = self.layers[layer].n_used as u32;
        let rows = rows.map(|(row, expert)| ColdRow { expert, token: row / n_used, row });
        // The device may post as soon as it has the last answer, before the thread that gave it has
        // reported its unit. Only after a request that was given up does this take longer.
        let start = Instant::now();
        while !self.is_idle() && start.elapsed() < REPORT_BOUND {
            thread::yield_now();
        }
        if self.begin(layer, n_tokens, rows) {
            // SAFETY: `begin` found that nobody looks at the request, and nothing is open yet.
            self.request.with_mut(|req| unsafe { (*req).remote_epoch = epoch });
            self.open();
        } else {
            // SAFETY: as above, no row is answered yet.
            let (_, _, rows) = unsafe { remote.read() };
            rows.for_each(|(row, _)| remote.answer(row, epoch, false));
        }
    }

    /// Writes a request, to be opened by `open`; false when a thread still works on the one before.
    fn begin(&self, layer: usize, n_tokens: usize, rows: impl Iterator<Item = ColdRow>) -> bool {
        let idle = self.is_idle();
        self.open.store(idle, Ordering::Relaxed);
        if !idle {
            return false;
        }
        // SAFETY: all units are done, so nobody else looks at the request.
        let groups =
            self.request.with_mut(|req| unsafe { (*req).fill(&self.layers[layer], layer, n_tokens, rows) });
        self.tokens_ready.store(0, Ordering::Relaxed);
        for g in 0..groups {
            self.up_done[g].store(0, Ordering::Relaxed);
            self.hidden_ready[g].store(0, Ordering::Relaxed);
            self.down_done[g].store(0, Ordering::Relaxed);
        }
        true
    }

    /// Lets threads claim the units of the request that `begin` wrote.
    fn open(&self) {
        // SAFETY: nothing is open, so nobody writes the request.
        let [convert_end, up_end, total] = self.request.with(|req| unsafe { (*req).ends() });
        let epoch = self.epoch.load(Ordering::Relaxed).wrapping_add(1);
        self.epoch.store(epoch, Ordering::Relaxed);
        self.total.store(total, Ordering::Relaxed);
        self.convert_end.store(convert_end, Ordering::Relaxed);
        self.up_end.store(up_end, Ordering::Relaxed);
        self.mailbox.post(epoch, total);
    }

    /// Whether no thread works on a request, not even on one that was given up.
    pub fn is_idle(&self) -> bool {
        self.mailbox.done() == self.total.load(Ordering::Relaxed)
    }

    /// Whether all threads leave a request that has failed, soon.
    pub fn settles(&self) -> bool {
        let start = Instant::now();
        while !self.is_idle() {
            if start.elapsed() > SETTLE_BOUND {
                return false;
            }
            thread::yield_now();
        }
        true
    }

    fn claim(&self) -> Option<Claim> {
        let parts = CLAIM_PART * self.n_threads.load(Ordering::Relaxed);
        self.mailbox.ticket.claim(|next, total| {
            if next < self.convert_end.load(Ordering::Relaxed) {
                return 1;
            }
            // those of the next phase wait for these
            let up_end = self.up_end.load(Ordering::Relaxed);
            let end = if next < up_end { up_end.min(total) } else { total };
            ((end - next) / parts).min(MAX_CLAIM)
        })
    }

    /// Claims and computes units until there are none left; false when there was none.
    pub fn run(&self) -> bool {
        self.take_remote();
        let Some(first) = self.claim() else { return false };
        let start = Instant::now();
        let mut next = Some(first);
        while let Some(claim) = next {
            // SAFETY: the claim makes the request readable until `units_done`.
            self.request.with(|req| unsafe { self.work(&*req, claim) });
            // the clock is read before the last report, after which JOIN may look at the sum
            next = self.claim();
            if next.is_none() {
                self.busy_ns.fetch_add(start.elapsed().as_nanos() as u64, Ordering::Relaxed);
            }
            self.mailbox.units_done(claim.n);
        }
        true
    }

    /// Computes the units of a claim.
    fn work(&self, req: &Request, claim: Claim) {
        let end = (claim.unit + claim.n) as usize;
        let mut at = claim.unit as usize;
        while at < end {
            let part = req.part(at, end);
            if !catch_unwind(AssertUnwindSafe(|| self.compute(req, part))).unwrap_or(false) {
                self.mailbox.unit_failed();
            }
            if let (Some(remote), Part::Down { group, chunks }) = (&self.remote, part) {
                self.answer(remote, req, group, chunks);
            }
            at += part.len();
        }
    }

    /// Helps until the open request is complete; at most `bound` of waiting for other threads.
    ///
    /// # Errors
    /// A unit failed, or is still running after `bound`: the rows must not be used.
    pub fn finish(&self, bound: Duration) -> Result<(), EngineError> {
        if !self.open.load(Ordering::Relaxed) {
            return Err(EngineError::TimedOut(bound));
        }
        self.run();
        let total = self.total.load(Ordering::Relaxed);
        let mut since = None;
        let mut spins = 0u32;
        while self.mailbox.done() != total {
            spins = spins.wrapping_add(1);
            if spins.is_multiple_of(SPINS) {
                let start = *since.get_or_insert_with(Instant::now);
                if start.elapsed() > bound {
                    return Err(EngineError::TimedOut(bound));
                }
                thread::yield_now();
            } else {
                hint::spin_loop();
            }
        }
        if self.mailbox.has_failed() { Err(EngineError::Failed) } else { Ok(()) }
    }

    /// Output row `row` (`token * n_used + k`) of the finished request, `[n_embd]`.
    ///
    /// # Safety
    /// The request was finished and asked for this row; no other is posted while the slice lives.
    pub unsafe fn output(&self, row: usize, n_embd: usize) -> &[f32] {
        memory::reads(self.out.f32(row), n_embd * size_of::<f32>());
        // SAFETY: the row holds `n_embd` elements and all writers are done.
        unsafe { std::slice::from_raw_parts(self.out.f32(row), n_embd) }
    }

    /// Computes units; false when what they need does not come.
    fn compute(&self, req: &Request, part: Part) -> bool {
        let layer = &self.layers[req.layer];
        match part {
            Part::Convert { token } => {
                if token == 0 {
                    fault::in_unit();
                }
                self.convert(layer, token);
                self.tokens_ready.fetch_add(1, Ordering::Release);
            }
            Part::Up { group, chunks } => {
                if (group, chunks.first, req.convert_units) == (0, 0, 0) {
                    fault::in_unit();
                }
                if !self.wait_for(&self.tokens_ready, req.convert_units as u32) {
                    return false;
                }
                self.hidden_rows(layer, req, group, chunks);
                let n = chunks.n as u32;
                if self.up_done[group].fetch_add(n, Ordering::AcqRel) + n == req.up_chunks as u32 {
                    self.convert_hidden(layer, req, group);
                    self.hidden_ready[group].store(1, Ordering::Release);
                }
            }
            Part::Down { group, chunks } => {
                if !self.wait_for(&self.hidden_ready[group], 1) {
                    return false;
                }
                self.output_rows(layer, req, group, chunks);
            }
        }
        true
    }

    /// Waits until `counter` reaches `target`; false when it does not, because of a thread that is stuck or of a
    /// unit that failed: what that one has left must not be read. Whoever brings it there has claimed its unit and is
    /// running.
    fn wait_for(&self, counter: &AtomicU32, target: u32) -> bool {
        let mut since = None;
        let mut spins = 0u32;
        while counter.load(Ordering::Acquire) < target {
            spins = spins.wrapping_add(1);
            if spins.is_multiple_of(SPINS) {
                let since: &mut Instant = since.get_or_insert_with(Instant::now);
                if self.mailbox.has_failed() || since.elapsed() > join_bound() {
                    return false;
                }
                // more threads than cores: let the one we wait for run
                thread::yield_now();
            } else {
                hint::spin_loop();
            }
        }
        true
    }

    /// Answers the rows of a group with the last of its output chunks.
    fn answer(&self, remote: &Remote, req: &Request, group: usize, chunks: Chunks) {
        let n = chunks.n as u32;
        if self.down_done[group].fetch_add(n, Ordering::AcqRel) + n == req.down_chunks as u32 {
            // before the last answer, after which the step may end
            let seen_ns = self.seen_ns.load(Ordering::Relaxed);
            let took = (self.made.elapsed().as_nanos() as u64).saturating_sub(seen_ns);
            self.took_ns[req.layer].fetch_max(took.try_into().unwrap_or(u32::MAX), Ordering::Relaxed);
            let ok = !self.mailbox.has_failed();
            for row in &req.rows[req.groups[group].first..req.groups[group].end] {
                remote.answer(row.row, req.remote_epoch, ok);
            }
        }
    }

    fn convert(&self, layer: &Layer, token: usize) {
        memory::reads(self.act.f32(token), layer.n_embd() * size_of::<f32>());
        memory::writes(self.act_conv.at(token), layer.up.converted_bytes());
        // SAFETY: the rows hold `n_embd` elements in their format; this unit owns the target.
        unsafe { layer.up.convert(self.act.f32(token), self.act_conv.at(token)) };
    }

    /// The activation row of `token` as the first projections take it.
    fn act_row(&self, m: &Matrix, token: usize) -> *const u8 {
        if m.from_float.is_some() { self.act_conv.at(token) } else { self.act.at(token) }
    }

    fn hidden_rows(&self, layer: &Layer, req: &Request, g: usize, chunks: Chunks) {
        let group = req.groups[g];
        let rows = &req.rows[group.first..group.end];
        let n_ff = layer.n_ff();
        let first = chunks.first * req.up_rows;
        let end = (first + chunks.n * req.up_rows).min(n_ff);
        for row in rows {
            memory::reads(self.act_row(&layer.up, row.token as usize), layer.up.converted_bytes());
            for out in [&self.hidden, &self.up] {
                memory::writes(
                    out.f32(row.row as usize).wrapping_add(first),
                    (end - first) * size_of::<f32>(),
                );
            }
        }
        let project = |m: &Matrix, offset: usize, out: &Rows| {
            let target = |row: &ColdRow| Target {
                act: self.act_row(m, row.token as usize),
                // SAFETY: the row holds `n_ff` elements.
                out: unsafe { out.f32(row.row as usize).add(first) },
            };
            // SAFETY: expert and rows are in range, the activations are converted for `m` (gate and up share a type),
            // and this unit owns these elements of `out`.
            unsafe { multiply(m, group.expert, offset + first, offset + end, rows, target) };
        };
        match (&layer.gate, layer.merged) {
            (Some(gate), _) => {
                project(gate, 0, &self.hidden);
                project(&layer.up, 0, &self.up);
            }
            (None, true) => {
                project(&layer.up, 0, &self.hidden);
                project(&layer.up, n_ff, &self.up);
            }
            (None, false) => project(&layer.up, 0, &self.hidden),
        }
        for row in rows {
            let row = row.row as usize;
            // SAFETY: both rows hold `n_ff` elements; `first` is a multiple of ROW_ALIGN; this unit
            // owns `first..end`.
            unsafe {
                layer.activation.apply(
                    end - first,
                    self.hidden.f32(row).add(first),
                    self.up.f32(row).add(first),
                );
            }
        }
    }

    fn convert_hidden(&self, layer: &Layer, req: &Request, g: usize) {
        let group = req.groups[g];
        for row in &req.rows[group.first..group.end] {
            let row = row.row as usize;
            memory::reads(self.hidden.at(row), layer.n_ff() * size_of::<f32>());
            memory::writes(self.hidden_conv.at(row), layer.down.converted_bytes());
            // SAFETY: all chunks of the group are done, and this thread is the last of them.
            unsafe { layer.down.convert(self.hidden.f32(row), self.hidden_conv.at(row)) };
        }
    }

    fn output_rows(&self, layer: &Layer, req: &Request, g: usize, chunks: Chunks) {
        let group = req.groups[g];
        let m = &layer.down;
        let first = chunks.first * req.down_rows;
        let end = (first + chunks.n * req.down_rows).min(m.n_out);
        let target = |row: &ColdRow| {
            let row = row.row as usize;
            let act = if m.from_float.is_some() { self.hidden_conv.at(row) } else { self.hidden.at(row) };
            // SAFETY: the row holds `n_out` elements.
            let out = unsafe { self.out.f32(row).add(first) };
            memory::reads(act, m.converted_bytes());
            memory::writes(out, (end - first) * size_of::<f32>());
            Target { act, out }
        };
        // SAFETY: as in `hidden_rows`.
        unsafe { multiply(m, group.expert, first, end, &req.rows[group.first..group.end], target) };
    }
}

/// Rows that an expert's weights are multiplied with while they are read once: all of an ubatch on the hot path.
const TARGETS: usize = 8;

/// [`Matrix::multiply`] for the cold rows `rows` of an expert.
///
/// # Safety
/// As there, for what `target` gives.
unsafe fn multiply(
    m: &Matrix,
    expert: usize,
    first: usize,
    end: usize,
    rows: &[ColdRow],
    target: impl Fn(&ColdRow) -> Target,
) {
    for rows in rows.chunks(TARGETS) {
        let mut targets = [Target { act: std::ptr::null(), out: std::ptr::null_mut() }; TARGETS];
        for (t, row) in targets.iter_mut().zip(rows) {
            *t = target(row);
        }
        // SAFETY: passed on.
        unsafe { m.multiply(expert, first, end, &targets[..rows.len()]) };
    }
}

/// Rows of a chunk and number of chunks for `n` rows of `row_bytes`.
fn chunk(n: usize, row_bytes: usize) -> (usize, usize) {
    let bytes = n * row_bytes;
    let unit_bytes = (bytes / PARTS).clamp(MIN_UNIT_BYTES, UNIT_BYTES);
    let parts = ((bytes + unit_bytes / 2) / unit_bytes).max(1);
    let rows = n.div_ceil(parts).next_multiple_of(ROW_ALIGN);
    (rows, n.div_ceil(rows))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        mailbox::device_end::DeviceEnd,
        model_loom::{CHUNKED, SMALL, check, check_long, expected, prepare},
    };

    const BOUND: Duration = Duration::from_secs(60);

    fn engine(layer: &Layer, remote: Option<Remote>) -> Arc<Engine> {
        let layers: Arc<[Layer]> = Arc::new([layer.clone()]);
        Arc::new(Engine::new(layers, 1, remote))
    }

    /// `times` looks of a worker.
    fn worker(engine: &Arc<Engine>, times: usize) -> thread::JoinHandle<()> {
        let engine = engine.clone();
        thread::spawn(move || (0..times).for_each(|_| _ = engine.run()))
    }

    fn post(engine: &Engine, act: f32, expert: u32) {
        let act = vec![act; engine.layers[0].n_embd()];
        // SAFETY: the request before was finished, and the activations are there.
        unsafe { engine.post(0, 1, &[ColdRow { expert, token: 0, row: 0 }], |_| act.as_ptr()) };
    }

    fn finish(engine: &Engine, act: f32, expert: u32) {
        engine.finish(BOUND).unwrap();
        let layer = &engine.layers[0];
        // SAFETY: the request is finished.
        let row = unsafe { engine.output(0, layer.n_embd()) };
        assert!(row.iter().all(|v| *v == expected(layer, expert as usize, act)), "{row:?}");
    }

    #[test]
    fn loom_one_request_after_the_other_beside_a_worker() {
        check_long(|| {
            let engine = prepare(|| engine(&SMALL, None));
            let worker = worker(&engine, 2);
            for n in [0, 1] {
                post(&engine, (n + 1) as f32, n);
                finish(&engine, (n + 1) as f32, n);
            }
            worker.join().unwrap();
        });
    }

    #[test]
    fn loom_units_wait_for_those_that_they_need() {
        check(|| {
            let engine = prepare(|| engine(&CHUNKED, None));
            post(&engine, 1.0, 1);
            let worker = worker(&engine, 1);
            finish(&engine, 1.0, 1);
            worker.join().unwrap();
        });
    }

    #[test]
    fn loom_a_unit_that_panics_fails_its_request_and_no_other() {
        check_long(|| {
            let engine = prepare(|| engine(&SMALL, None));
            let worker = worker(&engine, 2);
            // SAFETY: a token that there is no room for is not read, the engine's bounds are in the way.
            unsafe {
                let act = vec![1.0; SMALL.n_embd()];
                engine.post(0, 1, &[ColdRow { expert: 0, token: 9, row: 0 }], |_| act.as_ptr());
            }
            assert_eq!(engine.finish(BOUND), Err(EngineError::Failed));
            post(&engine, 2.0, 1);
            finish(&engine, 2.0, 1);
            worker.join().unwrap();
        });
    }

    #[test]
    fn loom_what_was_given_up_is_left_alone_until_its_threads_are_through() {
        check_long(|| {
            let engine = prepare(|| engine(&SMALL, None));
            post(&engine, 1.0, 0);
            let worker = worker(&engine, 1);
            let first = engine.finish(Duration::ZERO);
            assert!(matches!(first, Ok(()) | Err(EngineError::TimedOut(_))), "{first:?}");
            post(&engine, 2.0, 1);
            if engine.finish(BOUND).is_ok() {
                finish(&engine, 2.0, 1);
            }
            worker.join().unwrap();
            post(&engine, 3.0, 0);
            finish(&engine, 3.0, 0);
        });
    }

    #[test]
    fn loom_a_row_is_answered_when_all_of_its_chunks_are_there() {
        check_long(|| {
            let (device, engine) = prepare(|| {
                let device = DeviceEnd::new(CHUNKED.n_embd());
                let engine = engine(&CHUNKED, Some(device.remote()));
                (device, engine)
            });
            device.post(1, 1.0, &[1]);
            let worker = worker(&engine, 1);
            let row = device.wait(1, 0, || engine.run()).expect("no row fails");
            assert!(row.iter().all(|v| *v == expected(&CHUNKED, 1, 1.0)), "{row:?}");
            worker.join().unwrap();
        });
    }

    #[test]
    fn loom_the_requests_of_a_device_are_taken_once_each_and_answered() {
        check_long(|| {
            let (device, engine) = prepare(|| {
                let device = DeviceEnd::new(SMALL.n_embd());
                let engine = engine(&SMALL, Some(device.remote()));
                (device, engine)
            });
            let worker = worker(&engine, 2);
            for epoch in [1, 2] {
                device.post(epoch, epoch as f32, &[epoch - 1]);
                // beside the device this thread is a worker, which spares the model a thread
                let row = device.wait(epoch, 0, || engine.run()).expect("no row fails");
                let is = expected(&SMALL, epoch as usize - 1, epoch as f32);
                assert!(row.iter().all(|v| *v == is), "{row:?}");
            }
            worker.join().unwrap();
        });
    }
}
