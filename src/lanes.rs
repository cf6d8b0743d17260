//! Who computes an expert without a slot: the CPU from its memory, or the GPU, which reads the host's copy over
//! the link. Both at once are faster than either, so the cold experts of a layer are divided.
//!
//! DISPATCH divides them by a table: of c cold rows the last `table[c]` go over the link. The table comes from a
//! model of both lanes whose rates are measured while decode runs:
//!
//! - The CPU takes `HAND_OFF + n * bytes * cpu` for n experts, and tells what it took. (What JOIN waited tells it
//!   only where the CPU was last, and taken for that elsewhere it drives all experts to the link.)
//! - The link takes `base + n * bytes * link`: base is what the GPU does between the two nodes anyway.
//!
//! Uploads, the copies of experts into slots, use the link too. They begin with a step, so it is in its first layers
//! that the link is slower. How many those are follows from what copies take and from what a layer takes; in them the
//! division is another one, with a rate and corrections of its own.
//!
//! Rates are by byte, so layers of different experts share what they learn. The model knows nothing of what the lanes
//! do to each other: both read the same memory, and other processes use it and the link as well. So every way to
//! divide has a correction, the ratio of the time that a layer took to what the model said, and now and then a layer
//! tries an expert more or less on the link than seems best. And since a lane that is hardly used looks worse than it
//! is (threads that only spin are taken off their cores, in virtual machines above all), the whole is compared with
//! the CPU alone from time to time, a few tokens of each.
//!
//! The link's nodes take time on the GPU even when there is nothing for them. Mostly JOIN waits for the CPU meanwhile; where
//! few experts are cold it does not, and then graphs of one token are better off without them.

use std::{
    collections::BTreeMap,
    fmt::{self, Display, Formatter},
    ops::Range,
    time::Duration,
};

/// What the hand-off to the CPU and back costs, in ns (benches/handoff.rs: 7 to 8 us with rows of 8 KiB).
const HAND_OFF_NS: f64 = 7_000.0;
/// Weight of a sample: some hundred layers, a few tokens.
const ALPHA: f64 = 1.0 / 128.0;
/// Of a sample in a correction, and of one that a trial brought: there are few of them.
const ALPHA_CORRECTION: f64 = 1.0 / 32.0;
const ALPHA_TRIAL: f64 = 1.0 / 4.0;
const ALPHA_RARE: f64 = 1.0 / 2.0;
/// Tokens between two looks at the tables.
const TOKENS_PER_TABLE: u32 = 4;
/// One of so many layers tries another division at a time.
const LAYERS_PER_TRIAL: usize = 32;
/// A trial that is expected to take longer than this many times what is best costs too much; only one of so many is
/// made all the same, because what is expected may be old.
const TRIAL_PRICE: f64 = 1.25;
const TRIALS_AT_ANY_PRICE: usize = 16;
/// Tokens of a comparison of both lanes with the CPU alone, the first of which are not counted.
const COMPARED_TOKENS: u32 = 8;
const WARM_TOKENS: u32 = 2;
/// Tokens between two of them: at first, after what has been used was changed, and at most, doubled each time that
/// nothing was.
const MIN_PERIOD: u32 = 96;
const MAX_PERIOD: u32 = 1024;
/// Before the link is compared again, a layer tells its rate for so long.
const SCOUTED_TOKENS: u32 = 8;
/// A comparison ends at the first token that costs so many times as much.
const HOPELESS: f64 = 1.5;
/// What is in use has become so much slower: the next comparison is made at once.
const SLOWER: f64 = 1.1;
/// Weight of a token in the cost of what is in use.
const ALPHA_COST: f64 = 1.0 / 8.0;
/// The link has to be worth so much more than none, which costs the GPU and the memory nothing.
const WORTH: f64 = 1.03;
/// A division is left for one that promises to take less than this share of its time.
const BETTER: f64 = 0.98;
/// A kernel reads this share of what a copy moves over the link (DESIGN 6: 45 of 54 GB/s).
const KERNEL_SHARE: f64 = 0.83;
/// While uploads use the link too, a byte of a kernel takes so many times as long before that was measured, and at most.
const SHARED: f64 = 2.0;
const MOST_SHARED: f64 = 8.0;
/// What a layer with all that is around it takes before that was measured, in ns, and the weight of a token.
const LAYER_NS: f64 = 200_000.0;
const ALPHA_LAYER: f64 = 1.0 / 8.0;
/// What the link's nodes take that have nothing to do, in ns (H200: 11.7 us, four kernels).
const NODES_NS: f64 = 10_000.0;
/// Weight of a token in what they save and cost, and tokens until that is looked at, at first and when they are back.
const ALPHA_NODES: f64 = 1.0 / 64.0;
const LOOKED_AT: u32 = 256;
const TRIED_AGAIN: u32 = 64;
/// Tokens without them: at first, and at most, doubled each time that they did not pay in between.
const MIN_WITHOUT: u32 = 512;
const MAX_WITHOUT: u32 = 8192;
/// They come back at once where they promise to save so many times what they cost.
const PROMISE: f64 = 3.0;
/// Reading weights, in bytes a ns: one core, and all that a machine's memory gives in the end.
const CORE_RATE: f64 = 5.0;
const MEMORY_RATE: f64 = 80.0;

/// Bytes a ns that `n_workers` workers read, where it was not measured.
pub fn assumed_rate(n_workers: usize) -> f64 {
    (n_workers as f64 * CORE_RATE).clamp(CORE_RATE, MEMORY_RATE)
}

/// What one layer of a step with one token did.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Sample {
    /// Wired layer.
    pub layer: usize,
    /// Experts that the CPU computed.
    pub on_cpu: u32,
    /// Experts that went over the link.
    pub on_link: u32,
    /// From DISPATCH to JOIN on the GPU, in ns.
    pub span_ns: u32,
    /// JOIN's longest wait for a row, in ns.
    pub wait_ns: u32,
    /// What the CPU took for its experts, from the time that it saw them, in ns.
    pub cpu_ns: u32,
}

/// What layers and context are like.
#[derive(Clone, Debug)]
pub struct Shape {
    /// Bytes of an expert by layer; 0 where the device cannot read them.
    pub bytes: Vec<usize>,
    /// Cold rows of a layer at most.
    pub max_rows: usize,
    /// Experts that a token uses: as many rows it has at most.
    pub n_used: usize,
    /// Bytes a ns that workers read.
    pub read_rate: f64,
    /// Bytes a ns that copies move over the link.
    pub copy_rate: f64,
}

/// The division of one context.
#[derive(Debug)]
pub struct Lanes {
    shape: Shape,
    /// ns a byte.
    cpu: f64,
    link: f64,
    /// `link` is multiplied with it while uploads use the link too.
    shared: f64,
    base_ns: f64,
    /// From a layer to the next.
    layer_ns: f64,
    /// Of the model, by bytes of an expert: for layers without uploads, and with them.
    corrections: [BTreeMap<usize, Corrections>; 2],
    /// The first layers of the step, so many, have uploads.
    uploading: usize,
    tokens: u32,
    /// So many more tokens the CPU gets nothing.
    resting: u32,
    trial: Option<Trial>,
    guard: Guard,
    nodes: Nodes,
    /// How many trials there were.
    trials: usize,
    tables: Vec<u8>,
    version: u64,
}

/// Compares both lanes with the CPU alone.
#[derive(Clone, Copy, Debug)]
struct Guard {
    /// What is in use: the CPU alone, or both lanes.
    alone: bool,
    /// Its cost, in ns a cold expert, and what that was after the last comparison; 0 before there is one.
    cost: f64,
    settled: f64,
    /// Tokens until the next comparison, and between two.
    left: u32,
    period: u32,
    /// The other, while it is tried.
    other: Option<Tried>,
}

#[derive(Clone, Copy, Default, Debug)]
struct Tried {
    tokens: u32,
    ns: f64,
    experts: f64,
}

impl Guard {
    fn new() -> Self {
        Guard { alone: false, cost: 0.0, settled: 0.0, left: MIN_PERIOD, period: MIN_PERIOD, other: None }
    }

    /// Compares again soon, with what is in use now.
    fn restart(&mut self) {
        *self = Guard { alone: self.alone, left: SCOUTED_TOKENS, ..Guard::new() };
    }

    /// Whether the CPU is alone now.
    fn is_alone(&self) -> bool {
        self.alone != self.other.is_some()
    }

    /// Takes the time and the cold experts of a token; whether something else is in use from now on.
    fn observe(&mut self, ns: f64, experts: f64) -> bool {
        if let Some(tried) = &mut self.other {
            tried.tokens += 1;
            if tried.tokens > WARM_TOKENS {
                tried.ns += ns;
                tried.experts += experts;
            }
            // of the link; the CPU may have to wake up first
            let hopeless = self.alone && ns > self.cost * experts * HOPELESS;
            if tried.tokens < COMPARED_TOKENS && !hopeless {
                return false;
            }
            let cost = if hopeless { ns / experts } else { tried.ns / tried.experts };
            // both have to be worth it
            let better = if self.alone { cost * WORTH < self.cost } else { cost < self.cost * WORTH };
            self.period = if better { MIN_PERIOD } else { (self.period * 2).min(MAX_PERIOD) };
            if better {
                self.alone = !self.alone;
                self.cost = cost;
            }
            (self.settled, self.left, self.other) = (self.cost, self.period, None);
            return !better;
        }
        let cost = ns / experts;
        if self.cost == 0.0 {
            self.cost = cost;
        }
        mix(&mut self.cost, cost, ALPHA_COST);
        self.left = self.left.saturating_sub(1);
        let slower = self.settled > 0.0
            && self.cost > self.settled * SLOWER
            && self.period - self.left > COMPARED_TOKENS;
        if self.left == 0 || slower {
            self.other = Some(Tried::default());
        }
        self.other.is_some()
    }
}

/// Whether graphs of one token have the link's nodes.
#[derive(Clone, Copy, Debug)]
struct Nodes {
    there: bool,
    /// What they save a token, and what they cost it, in ns.
    saved: f64,
    cost: f64,
    /// Tokens until the next look, and for how long they are left out the next time.
    left: u32,
    without: u32,
    /// What brings them back at once, and whether it has. A promise that is not kept makes the next one worth less.
    promise: f64,
    promised: bool,
}

impl Nodes {
    fn new() -> Self {
        let (left, without) = (LOOKED_AT, MIN_WITHOUT);
        Nodes { there: true, saved: 0.0, cost: 0.0, left, without, promise: PROMISE, promised: false }
    }

    /// Takes what they saved and cost in a token, or would have; whether they come or go.
    fn observe(&mut self, saved: f64, cost: f64) -> bool {
        mix(&mut self.saved, saved, ALPHA_NODES);
        mix(&mut self.cost, cost, ALPHA_NODES);
        self.left = self.left.saturating_sub(1);
        let promising = !self.there && self.saved > self.cost * self.promise;
        if self.left > 0 && !promising {
            return false;
        }
        if self.there && self.saved >= self.cost {
            *self = Nodes { saved: self.saved, cost: self.cost, ..Nodes::new() };
            return false;
        }
        if self.there {
            self.left = self.without;
            self.without = (self.without * 2).min(MAX_WITHOUT);
            if std::mem::take(&mut self.promised) {
                self.promise *= 2.0;
            }
        } else {
            (self.left, self.promised) = (TRIED_AGAIN, promising);
        }
        self.there = !self.there;
        true
    }

    /// They come back, for something else than speed.
    fn call_back(&mut self) {
        (self.there, self.left) = (true, LOOKED_AT);
    }
}

/// A layer that divides in another way for a while.
#[derive(Clone, Copy, Debug)]
struct Trial {
    layer: usize,
    kind: Kind,
    at_any_price: bool,
}

/// An expert more on the link, or one less.
#[derive(Clone, Copy, Debug)]
enum Kind {
    More,
    Less,
}

/// For each number of cold experts and of those on the link: what the model's time is multiplied with.
#[derive(Clone, Debug)]
struct Corrections {
    n: usize,
    by_division: Vec<f64>,
    /// What is best now, for all numbers of cold experts that a layer may have.
    chosen: Vec<usize>,
}

impl Corrections {
    fn new(n: usize, max_rows: usize) -> Self {
        Corrections { n, by_division: vec![1.0; (n + 1) * (n + 1)], chosen: vec![0; max_rows.max(n) + 1] }
    }

    fn forget(&mut self) {
        self.by_division.fill(1.0);
    }

    /// 1 where there are more cold experts than a token has: nothing measures those.
    fn get(&self, cold: usize, on_link: usize) -> f64 {
        if cold > self.n { 1.0 } else { self.by_division[cold * (self.n + 1) + on_link] }
    }

    fn at(&mut self, cold: usize, on_link: usize) -> Option<&mut f64> {
        (cold <= self.n).then(|| &mut self.by_division[cold * (self.n + 1) + on_link])
    }
}

impl Lanes {
    /// Before anything was measured.
    pub fn new(shape: Shape) -> Self {
        let tables = vec![0; shape.bytes.len() * (shape.max_rows + 1)];
        let new = |b: &usize| (*b, Corrections::new(shape.n_used, shape.max_rows));
        let corrections: BTreeMap<_, _> = shape.bytes.iter().filter(|b| **b > 0).map(new).collect();
        let mut lanes = Lanes {
            cpu: 1.0 / shape.read_rate,
            link: 1.0 / (shape.copy_rate * KERNEL_SHARE),
            shared: SHARED,
            base_ns: 20_000.0,
            layer_ns: LAYER_NS,
            corrections: [corrections.clone(), corrections],
            uploading: 0,
            tokens: 0,
            resting: 0,
            trial: None,
            guard: Guard::new(),
            nodes: Nodes::new(),
            trials: 0,
            tables,
            version: 0,
            shape,
        };
        lanes.make_tables();
        lanes
    }

    /// Counts changes of the tables.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// Whether a graph of one token should have the link's nodes; without them the CPU gets all cold experts.
    pub fn nodes(&self) -> bool {
        self.nodes.there
    }

    /// By layer: of c cold rows, how many go over the link, c from 0 to `max_rows`.
    pub fn tables(&self) -> &[u8] {
        &self.tables
    }

    /// Gives the CPU nothing for so many tokens, because it failed; false where the device cannot read all experts.
    pub fn rest_cpu(&mut self, tokens: u32) -> bool {
        let possible = self.shape.bytes.iter().all(|b| *b > 0) && self.shape.max_rows <= u8::MAX.into();
        if possible {
            self.resting = tokens;
            self.nodes.call_back();
            self.make_tables();
        }
        possible
    }

    /// A step begins, and for so long uploads will use the link.
    pub fn begin(&mut self, uploads: Duration) {
        let layers = (uploads.as_nanos() as f64 / self.layer_ns).round() as usize;
        let before = std::mem::replace(&mut self.uploading, layers.min(self.shape.bytes.len()));
        self.write_tables(before.min(self.uploading)..before.max(self.uploading));
    }

    /// Takes what a step of one token measured, and how long it took.
    pub fn observe(&mut self, samples: impl Iterator<Item = Sample>, step: Duration) {
        let n_layers = self.shape.bytes.len().max(1);
        mix(&mut self.layer_ns, step.as_nanos() as f64 / n_layers as f64, ALPHA_LAYER);
        let (mut ns, mut experts) = (0.0, 0.0);
        let (mut saved, mut cost) = (0.0, 0.0);
        for s in samples {
            let bytes = self.shape.bytes[s.layer];
            if bytes > 0 {
                saved += self.saved(bytes, &s);
                cost += if s.on_link == 0 { (NODES_NS - f64::from(s.wait_ns)).max(0.0) } else { 0.0 };
                self.correct(bytes, &s);
                self.learn(bytes as f64, &s);
                ns += f64::from(s.span_ns) + f64::from(s.wait_ns);
                experts += f64::from(s.on_cpu + s.on_link);
            }
        }
        if self.resting == 0 && self.nodes.observe(saved, cost) && self.nodes.there {
            // what was measured before is old
            self.guard.restart();
        }
        let compares = self.resting == 0 && self.nodes.there;
        let other = compares && experts > 0.0 && self.guard.observe(ns, experts);
        if other && self.guard.alone && !self.guard.is_alone() {
            // what is known of divisions is old
            self.corrections.iter_mut().flat_map(BTreeMap::values_mut).for_each(Corrections::forget);
        }
        self.tokens += 1;
        let rested = self.resting == 1;
        self.resting = self.resting.saturating_sub(1);
        if rested || other || self.tokens.is_multiple_of(TOKENS_PER_TABLE) {
            self.trial = self.next_trial();
            self.make_tables();
        }
    }

    /// What the link saves a layer, by the model, with as many cold experts as the sample's: nothing where the comparison
    /// says so, but without the nodes that is old.
    fn saved(&self, bytes: usize, s: &Sample) -> f64 {
        let (cold, uploads) = ((s.on_cpu + s.on_link) as usize, self.has_uploads(s.layer));
        if (self.guard.alone && self.nodes.there) || cold > self.shape.n_used {
            return 0.0;
        }
        let chosen = self.corrections(bytes, uploads).chosen[cold];
        (self.cost(bytes, cold, 0, uploads) - self.cost(bytes, cold, chosen, uploads)).max(0.0)
    }

    fn has_uploads(&self, layer: usize) -> bool {
        layer < self.uploading
    }

    fn is_trial(&self, s: &Sample) -> bool {
        self.trial.is_some_and(|t| t.layer == s.layer)
    }

    /// The correction of a division.
    fn correct(&mut self, bytes: usize, s: &Sample) {
        let (cold, on_link) = ((s.on_cpu + s.on_link) as usize, s.on_link as usize);
        let uploads = self.has_uploads(s.layer);
        let said = self.time(bytes, cold, on_link, uploads);
        let alpha = if self.is_trial(s) { ALPHA_TRIAL } else { ALPHA_CORRECTION };
        let corrections = &mut self.corrections[usize::from(uploads)];
        if let Some(c) = corrections.get_mut(&bytes).and_then(|c| c.at(cold, on_link)) {
            let took = f64::from(s.span_ns) + f64::from(s.wait_ns);
            mix(c, took / said, alpha);
        }
    }

    /// The rates of the lanes.
    fn learn(&mut self, bytes: f64, s: &Sample) {
        let span = f64::from(s.span_ns);
        if s.on_link == 0 {
            mix(&mut self.base_ns, span, ALPHA);
        } else {
            let uploads = self.has_uploads(s.layer);
            let alpha = match self.trial.filter(|t| t.layer == s.layer) {
                // nothing else may have told the rate for long
                Some(t) if t.at_any_price => ALPHA_RARE,
                Some(_) => ALPHA_TRIAL,
                // few layers have uploads
                None if uploads => ALPHA_CORRECTION,
                None => ALPHA,
            };
            let rate = ((span - self.base_ns) / (f64::from(s.on_link) * bytes)).max(0.0);
            if uploads {
                mix(&mut self.shared, (rate / self.link).min(MOST_SHARED), alpha);
            } else {
                mix(&mut self.link, rate, alpha);
            }
        }
        if s.on_cpu > 0 {
            mix(&mut self.cpu, f64::from(s.cpu_ns) / (f64::from(s.on_cpu) * bytes), ALPHA);
        }
    }

    /// The layers in turn, each kind on each.
    fn next_trial(&mut self) -> Option<Trial> {
        let n = self.shape.bytes.len();
        let periods = (self.tokens / TOKENS_PER_TABLE) as usize;
        let due = match self.guard.is_alone() {
            // so that the comparison knows the link's rate
            true => self.guard.alone && self.guard.left <= SCOUTED_TOKENS,
            false => periods.is_multiple_of((LAYERS_PER_TRIAL / n.max(1)).max(1)),
        };
        if n == 0 || !due || !self.nodes.there {
            return None;
        }
        self.trials += 1;
        let turn = self.trials / 2;
        let layer = turn % n;
        (self.shape.bytes[layer] > 0).then_some(Trial {
            layer,
            kind: if self.guard.is_alone() { Kind::More } else { [Kind::More, Kind::Less][self.trials % 2] },
            at_any_price: self.guard.is_alone() || turn.is_multiple_of(TRIALS_AT_ANY_PRICE),
        })
    }

    fn make_tables(&mut self) {
        for uploads in [false, true] {
            let bytes: Vec<usize> = self.corrections[0].keys().copied().collect();
            for bytes in bytes {
                for cold in 0..=self.shape.max_rows.max(self.shape.n_used) {
                    let best = self.divide(bytes, cold, uploads);
                    let chosen = self.corrections(bytes, uploads).chosen[cold];
                    let cost = |on_link| self.cost(bytes, cold, on_link, uploads);
                    if self.version == 0 || cost(best) < cost(chosen) * BETTER {
                        let corrections = self.corrections[usize::from(uploads)].get_mut(&bytes);
                        corrections.expect("one of the keys").chosen[cold] = best;
                    }
                }
            }
        }
        self.write_tables(0..self.shape.bytes.len());
    }

    fn write_tables(&mut self, layers: Range<usize>) {
        let mut changed = false;
        for layer in layers {
            for cold in 0..=self.shape.max_rows {
                let n = self.entry(layer, cold) as u8;
                let entry = &mut self.tables[layer * (self.shape.max_rows + 1) + cold];
                changed |= *entry != n;
                *entry = n;
            }
        }
        self.version += u64::from(changed || self.version == 0);
    }

    fn corrections(&self, bytes: usize, uploads: bool) -> &Corrections {
        &self.corrections[usize::from(uploads)][&bytes]
    }

    fn entry(&self, layer: usize, cold: usize) -> usize {
        if self.resting > 0 {
            return cold;
        }
        let trial = self.trial.filter(|t| t.layer == layer);
        if self.guard.is_alone() {
            return usize::from(trial.is_some()).min(cold);
        }
        let (bytes, uploads) = (self.shape.bytes[layer], self.has_uploads(layer));
        if bytes == 0 {
            return 0;
        }
        let chosen = self.corrections(bytes, uploads).chosen[cold];
        // with more cold experts than a token has nothing is measured
        let Some(trial) = trial.filter(|_| cold <= self.shape.n_used) else { return chosen };
        let other = match trial.kind {
            Kind::More => (chosen + 1).min(cold),
            Kind::Less => chosen.saturating_sub(1),
        };
        let cost = |on_link| self.cost(bytes, cold, on_link, uploads);
        if trial.at_any_price || cost(other) <= cost(chosen) * TRIAL_PRICE { other } else { chosen }
    }

    /// How many of `cold` experts of `bytes` bytes go over the link, so that the slower lane ends first.
    fn divide(&self, bytes: usize, cold: usize, uploads: bool) -> usize {
        let cost = |on_link: usize| (self.cost(bytes, cold, on_link, uploads), on_link);
        // of equals the fewest
        (0..=cold.min(u8::MAX.into())).map(cost).min_by(|a, b| a.0.total_cmp(&b.0)).map_or(0, |c| c.1)
    }

    /// The corrected time of a division, and what the link has to be worth.
    fn cost(&self, bytes: usize, cold: usize, on_link: usize, uploads: bool) -> f64 {
        let worth = if on_link > 0 { WORTH } else { 1.0 };
        let correction = self.corrections(bytes, uploads).get(cold, on_link);
        self.time(bytes, cold, on_link, uploads) * correction * worth
    }

    /// What the model says, in ns.
    fn time(&self, bytes: usize, cold: usize, on_link: usize, uploads: bool) -> f64 {
        let bytes = bytes as f64;
        let link = self.link * if uploads { self.shared } else { 1.0 };
        let on_cpu = cold - on_link;
        let cpu = if on_cpu == 0 { 0.0 } else { HAND_OFF_NS + on_cpu as f64 * bytes * self.cpu };
        cpu.max(self.base_ns + on_link as f64 * bytes * link)
    }
}

impl Display for Lanes {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(f, "the CPU reads {:.0} GB/s, the link {:.0}", 1.0 / self.cpu, 1.0 / self.link)?;
        if !self.nodes.there {
            return write!(f, "; so few experts are cold that graphs are without the link");
        }
        if self.guard.alone {
            return write!(f, "; the CPU alone is faster than both");
        }
        for (bytes, c) in &self.corrections[0] {
            let beside = &self.corrections(*bytes, true).chosen[..=c.n];
            write!(f, "; of 0 to {} cold experts of {bytes} bytes it takes {:?}", c.n, &c.chosen[..=c.n])?;
            write!(f, ", beside uploads {beside:?}")?;
        }
        Ok(())
    }
}

fn mix(value: &mut f64, sample: f64, alpha: f64) {
    *value += alpha * (sample - *value);
}

#[cfg(test)]
mod tests {
    use super::*;

    const BYTES: usize = 3_538_944;

    fn lanes(bytes: Vec<usize>, read_rate: f64) -> Lanes {
        Lanes::new(Shape { bytes, max_rows: 8, n_used: 8, read_rate, copy_rate: 54.0 })
    }

    fn table(l: &Lanes) -> Vec<u8> {
        l.tables()[..9].to_vec()
    }

    #[test]
    fn a_fast_cpu_takes_twice_what_the_link_takes() {
        assert_eq!(table(&lanes(vec![BYTES], 80.0)), [0, 0, 0, 1, 1, 2, 2, 2, 3]);
    }

    #[test]
    fn few_cores_leave_most_to_the_link() {
        assert_eq!(table(&lanes(vec![BYTES], 10.0)), [0, 1, 2, 3, 4, 4, 5, 6, 7]);
    }

    #[test]
    fn what_the_device_cannot_read_stays_on_the_cpu() {
        let mut l = lanes(vec![0, BYTES], 20.0);
        assert_eq!(table(&l), [0; 9]);
        assert!(l.tables()[9..].iter().any(|n| *n > 0));
        let s =
            Sample { layer: 0, on_cpu: 5, on_link: 0, span_ns: 20_000, wait_ns: 900_000, cpu_ns: 910_000 };
        (0..1000).for_each(|_| l.observe([s].into_iter(), Duration::from_millis(1)));
        assert_eq!(table(&l), [0; 9]);
    }

    #[test]
    fn a_cpu_that_failed_gets_nothing_for_a_while() {
        let mut l = lanes(vec![BYTES], 80.0);
        let before = (table(&l), l.version());
        assert!(l.rest_cpu(3));
        assert_eq!(table(&l), [0, 1, 2, 3, 4, 5, 6, 7, 8]);
        assert!(l.version() > before.1);
        let s = Sample { layer: 0, on_cpu: 0, on_link: 4, span_ns: 400_000, wait_ns: 0, cpu_ns: 0 };
        let step = Duration::from_micros(500);
        l.observe([s].into_iter(), step);
        l.observe([s].into_iter(), step);
        assert_eq!(table(&l)[8], 8);
        l.observe([s].into_iter(), step);
        assert!(table(&l)[8] < 8);
        assert!(!lanes(vec![BYTES, 0], 80.0).rest_cpu(3), "an expert that only the CPU can read");
    }

    #[test]
    fn ubatches_with_more_rows_than_a_token_are_divided_by_the_rates() {
        let l = Lanes::new(Shape {
            bytes: vec![BYTES],
            max_rows: 64,
            n_used: 8,
            read_rate: 80.0,
            copy_rate: 54.0,
        });
        let share = f64::from(l.tables()[64]) / 64.0;
        assert!((0.3..0.4).contains(&share), "{share}");
    }

    /// What a machine does that moves so many bytes a ns on each lane, with all else as on the GPU machine.
    struct Machine {
        layers: usize,
        cpu: f64,
        link: f64,
        /// What is left of the CPU's rate while the link is in use.
        left: f64,
        hand_off_ns: f64,
        /// Of a request to workers that had little to do, in ns.
        sleepy_ns: f64,
        /// Share of the experts that they had.
        busy: f64,
        uploads: Uploads,
        /// From none to all of so many experts of a layer are cold.
        cold: usize,
        random: u64,
    }

    /// Copies that begin with a token.
    #[derive(Clone, Copy)]
    struct Uploads {
        /// Tokens from one time to the next.
        every: usize,
        /// How many bytes at a time.
        bytes: f64,
        /// How much they delay a kernel's bytes: 1 where both have half of the link.
        delay: f64,
        /// The division is told so many times what they take.
        told: f64,
    }

    const NO_UPLOADS: Uploads = Uploads { every: 1, bytes: 0.0, delay: 1.0, told: 1.0 };

    /// Around the nodes of a layer, in ns: attention and what goes with it.
    const AROUND_NS: f64 = 60_000.0;
    /// Of copies, in bytes a ns.
    const COPY_RATE: f64 = 54.0;

    impl Machine {
        fn new(layers: usize) -> Self {
            let (hand_off_ns, sleepy_ns) = (8_000.0, 0.0);
            Machine {
                layers,
                cpu: 90.0,
                link: 42.0,
                left: 0.88,
                hand_off_ns,
                sleepy_ns,
                busy: 1.0,
                uploads: NO_UPLOADS,
                cold: 8,
                random: 1,
            }
        }

        /// 0 to 1.
        fn draw(&mut self) -> f64 {
            self.random =
                self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (self.random >> 40) as f64 / (1u64 << 24) as f64
        }

        /// Decodes `n` tokens; their time, and that of the CPU alone, in ns.
        fn decode(&mut self, lanes: &mut Lanes, n: usize) -> (f64, f64) {
            let (mut time, mut alone) = (0.0, 0.0);
            for token in 0..n {
                let mut samples = Vec::new();
                let before = time;
                let uploads = self.uploads;
                let mut left = if token % uploads.every == 0 { uploads.bytes } else { 0.0 };
                // a kernel reads about half of the time, and then half of the link is its own
                let took = left / (0.75 * COPY_RATE);
                lanes.begin(Duration::from_nanos((uploads.told * took) as u64));
                for layer in 0..self.layers {
                    let cold = ((self.cold + 1) as f64 * self.draw()) as usize;
                    let on_link =
                        if lanes.nodes() { usize::from(lanes.tables()[layer * 9 + cold]) } else { 0 };
                    let nodes = if lanes.nodes() { NODES_NS } else { 0.0 };
                    let base = (20_000.0 - NODES_NS + nodes) * (0.9 + 0.2 * self.draw());
                    let noise = 0.85 + 0.3 * self.draw();
                    // to look takes some time, too
                    let look = 1_000.0 + 3_000.0 * self.draw();
                    let work = |n: usize, rate: f64| (n * BYTES) as f64 / rate * noise;
                    let cpu = |work: f64| if work > 0.0 { self.hand_off_ns + work } else { 0.0 };
                    let rate = if on_link > 0 { self.cpu * self.left } else { self.cpu };
                    let sleepy = if self.busy < 0.3 { self.sleepy_ns } else { 0.0 };
                    let took = if cold > on_link { sleepy + work(cold - on_link, rate) } else { 0.0 };
                    if cold > 0 {
                        self.busy += 0.01 * ((cold - on_link) as f64 / cold as f64 - self.busy);
                    }
                    let beside = left.min((on_link * BYTES) as f64);
                    left -= beside;
                    let span = base + work(on_link, self.link) + uploads.delay * beside / self.link;
                    let wait = if took > 0.0 { (cpu(took) - span).max(look) } else { 0.0 };
                    time += span + wait;
                    left = (left - (base + wait + AROUND_NS) * COPY_RATE).max(0.0);
                    alone +=
                        if cold > 0 { base + (cpu(work(cold, self.cpu)) - base).max(look) } else { base };
                    samples.push(Sample {
                        layer,
                        on_cpu: (cold - on_link) as u32,
                        on_link: on_link as u32,
                        span_ns: span as u32,
                        wait_ns: wait as u32,
                        cpu_ns: took as u32,
                    });
                }
                let step = time - before + self.layers as f64 * AROUND_NS;
                lanes.observe(samples.into_iter(), Duration::from_nanos(step as u64));
            }
            (time, alone)
        }
    }

    #[test]
    fn a_link_that_others_use_is_left_within_64_tokens_and_found_again() {
        for (layers, slower) in [(48, 1.5), (48, 2.0), (48, 4.0), (48, 8.0), (48, 32.0), (6, 4.0)] {
            let mut m = Machine::new(layers);
            let mut lanes = lanes(vec![BYTES; layers], 110.0);
            m.decode(&mut lanes, 200);
            let (idle, alone) = m.decode(&mut lanes, 400);
            assert!(idle < alone * 0.87, "both lanes: {:.2} of the CPU", idle / alone);
            // whoever uses the link uses the memory as well, and the hand-off waits for them
            (m.link, m.cpu, m.hand_off_ns) = (m.link / slower, m.cpu * 0.8, m.hand_off_ns * 2.0);
            m.decode(&mut lanes, 64);
            let (busy, alone) = m.decode(&mut lanes, 1000);
            assert!(busy <= alone * 1.02, "{layers}, {slower}: {:.3} of the CPU alone", busy / alone);
            (m.link, m.cpu, m.hand_off_ns) = (m.link * slower, m.cpu / 0.8, m.hand_off_ns / 2.0);
            m.decode(&mut lanes, 1500);
            let (again, _) = m.decode(&mut lanes, 400);
            assert!(again < idle * 1.03, "{layers}, {slower}: {:.3} of what it was", again / idle);
        }
    }

    /// The time with such uploads, as a multiple of the time when the division is told nothing of them.
    fn against_untold(uploads: Uploads) -> f64 {
        let time = |told| {
            let mut m = Machine { uploads: Uploads { told, ..uploads }, ..Machine::new(48) };
            let mut lanes = lanes(vec![BYTES; 48], 90.0);
            m.decode(&mut lanes, 400);
            m.decode(&mut lanes, 2000).0
        };
        time(uploads.told) / time(0.0)
    }

    #[test]
    fn uploads_count_in_the_split_of_the_layers_that_they_last() {
        // what predict and decay order at a quarter of the experts, and more
        for (every, experts, most) in [(1, 14, 0.975), (1, 48, 0.925), (4, 20, 0.99), (4, 48, 0.98)] {
            let uploads = Uploads { every, bytes: (experts * BYTES) as f64, ..NO_UPLOADS };
            let ratio = against_untold(uploads);
            assert!(ratio < most, "{experts} in {every} tokens: {ratio:.3}");
            for told in [0.5, 2.0] {
                let ratio = against_untold(Uploads { told, ..uploads });
                assert!(ratio < 1.0, "{experts} in {every} tokens, {told} of their time told: {ratio:.3}");
            }
        }
    }

    #[test]
    fn uploads_that_are_in_nobodys_way_cost_nothing() {
        for (every, experts) in [(1, 14), (1, 48), (4, 48)] {
            let uploads = Uploads { every, bytes: (experts * BYTES) as f64, delay: 0.0, told: 1.0 };
            let ratio = against_untold(uploads);
            assert!(ratio < 1.002, "{experts} in {every} tokens: {ratio:.4}");
        }
    }

    #[test]
    fn the_first_layers_of_a_step_with_uploads_leave_more_to_the_cpu() {
        let mut l = lanes(vec![BYTES; 4], 80.0);
        let of = |l: &Lanes, layer: usize| l.tables()[layer * 9 + 8];
        let (alone, version) = (of(&l, 0), l.version());
        // a step takes 1 ms, a layer 0.25
        (0..100).for_each(|_| l.observe(std::iter::empty(), Duration::from_millis(1)));
        l.begin(Duration::from_micros(510));
        assert!(of(&l, 0) < alone && of(&l, 1) < alone, "{:?}", l.tables());
        assert!(of(&l, 2) == alone && of(&l, 3) == alone, "{:?}", l.tables());
        assert!(l.version() > version, "the device has to be told");
        l.begin(Duration::from_secs(1));
        assert!((0..4).all(|layer| of(&l, layer) < alone));
        let version = l.version();
        l.begin(Duration::from_secs(2));
        assert_eq!(l.version(), version, "nothing has changed");
        l.begin(Duration::ZERO);
        assert!((0..4).all(|layer| of(&l, layer) == alone));
    }

    #[test]
    fn graphs_are_without_the_link_while_few_experts_are_cold() {
        let mut m = Machine { cold: 1, ..Machine::new(48) };
        let mut lanes = lanes(vec![BYTES; 48], 90.0);
        let (with, _) = m.decode(&mut lanes, 200);
        assert!(lanes.nodes(), "it is not known yet");
        m.decode(&mut lanes, 200);
        assert!(!lanes.nodes());
        let (without, _) = m.decode(&mut lanes, 200);
        assert!(without < with * 0.95, "{:.3} of the time with it", without / with);
        // as long as nothing changes it is hardly tried again
        let there = (0..4000).filter(|_| {
            m.decode(&mut lanes, 1);
            lanes.nodes()
        });
        assert!(there.count() < 4000 / 16);
        m.cold = 8;
        m.decode(&mut lanes, 64);
        assert!(lanes.nodes(), "the text has changed");
        let changes = (0..8000).filter(|_| {
            m.decode(&mut lanes, 1);
            !lanes.nodes()
        });
        assert_eq!(changes.count(), 0, "the link is worth its nodes");
    }

    #[test]
    fn a_link_that_is_of_no_use_leaves_the_graphs_and_is_looked_for_again() {
        let mut m = Machine { link: 1.0, ..Machine::new(48) };
        let mut lanes = lanes(vec![BYTES; 48], 90.0);
        m.decode(&mut lanes, 1500);
        assert!(!lanes.nodes());
        m.link = 42.0;
        m.decode(&mut lanes, 2 * MAX_WITHOUT as usize);
        assert!(lanes.nodes() && !lanes.guard.alone, "{lanes}");
    }

    #[test]
    fn a_cpu_that_fails_gets_the_link_back() {
        let mut m = Machine { cold: 1, ..Machine::new(48) };
        let mut lanes = lanes(vec![BYTES; 48], 90.0);
        m.decode(&mut lanes, 400);
        assert!(!lanes.nodes());
        assert!(lanes.rest_cpu(3) && lanes.nodes());
        m.decode(&mut lanes, 3);
        assert!(lanes.nodes(), "for a while at least");
    }

    #[test]
    fn a_cpu_that_has_gone_to_sleep_is_woken() {
        let mut m = Machine { sleepy_ns: 800_000.0, busy: 0.0, cpu: 50.0, link: 25.0, ..Machine::new(48) };
        let mut lanes = lanes(vec![BYTES; 48], 50.0);
        // all but nothing was left to it
        lanes.cpu = 1.0 / 4.0;
        m.decode(&mut lanes, 256);
        let (both, alone) = m.decode(&mut lanes, 1000);
        assert!(both <= alone * 1.02, "{:.3} of the CPU alone", both / alone);
    }

    #[test]
    fn a_cpu_that_takes_all_of_the_memory_keeps_all_experts() {
        // what the link reads is what the CPU does not
        let mut m = Machine { cpu: 60.0, link: 25.0, left: 0.5, ..Machine::new(48) };
        let mut lanes = lanes(vec![BYTES; 48], 60.0);
        m.decode(&mut lanes, 64);
        let (both, alone) = m.decode(&mut lanes, 1000);
        assert!(both <= alone * 1.02, "{:.3} of the CPU alone", both / alone);
    }

    #[test]
    fn a_link_that_is_better_than_it_seems_gets_more() {
        let mut m = Machine { cpu: 20.0, link: 42.0, ..Machine::new(48) };
        // a measurement that noise has spoiled
        let mut lanes = Lanes::new(Shape {
            bytes: vec![BYTES; 48],
            max_rows: 8,
            n_used: 8,
            read_rate: 110.0,
            copy_rate: 10.0,
        });
        m.decode(&mut lanes, 300);
        let (both, alone) = m.decode(&mut lanes, 300);
        assert!(both <= alone * 0.45, "{:.3} of the CPU alone", both / alone);
    }
}
