//! Online linear prediction.
//!
//! A slot is worth the uses that its expert will have soon. This policy predicts them: the discounted
//! uses of each expert over the next tokens are a linear function of what was routed lately, and the
//! function is learned while decoding.
//!
//! The prediction has two parts. The first looks at the expert alone: a weighted sum of its use rates
//! over six half-lives, with weights shared by all experts. The second looks at all experts of all layers
//! at once, since an expert is often announced by others: their use rates over three half-lives, projected
//! onto a few random directions, times a matrix with a column for each expert. The matrix is fitted to what
//! the first part left over, by recursive least squares with ridge regularisation, and counts only as
//! far as it has been right so far: at the start, and where routing cannot be predicted, it counts nothing.
//!
//! A plan is made beside a step, takes effect after it, and its copies run beside the next one. So the uses
//! predicted are those that begin after this lag: the next step's uses are gone before a plan can serve
//! them.
//!
//! An expert is admitted when its predicted uses exceed a resident's by a margin, and no longer when swaps
//! are seen to gain nothing.
//!
//! With sequences in parallel, a step is what all of them route at once. The prediction is linear, so that of
//! the sum is the sum of those of each sequence.
//!
//! Everything is ordered and no multiplication is fused with an addition, so a replay on another machine
//! decides as the run did.

use std::collections::VecDeque;

use super::{
    Key, Limits, Policy, PoolShape, Routed, Swap,
    evidence::{Evidence, keep_fills},
    residency::{self, Residents},
    rounds::Rounds,
    rows,
    spec::{Param, ParamKind, Params},
};

/// Half-lives of the use rates of an expert, in tokens.
const OWN: [f32; 6] = [1.0, 4.0, 16.0, 64.0, 256.0, 2048.0];
/// Weights of these, then a constant: least squares over the tuning traces, where learning begins.
const OWN_WEIGHTS: [f64; OWN.len() + 1] = [0.047, -0.059, 0.523, 0.260, 0.117, 0.095, 0.004];
/// Every so many examples are one for these weights: there are few to learn.
const OWN_STRIDE: u32 = 4;
/// How much of what these weights were learned from an example leaves.
const OWN_MEMORY: f64 = 0.999;
/// Half-lives of the rates that are projected, in tokens.
const SHARED: [f32; 3] = [2.0, 8.0, 64.0];
/// Uses by token of the model that the ridge was tuned with.
const TUNED_USES: f32 = 48.0;
/// Fewest directions of the projection.
const MIN_RANK: usize = 32;
/// Entries of the matrix: bounds the time of a plan, about 0.2 ms for each million, and what it takes of the cache from the
/// threads that compute cold experts.
const MAX_ENTRIES: usize = 1 << 19;
/// Tokens at the end of a prompt that are learned from, in each ubatch of it.
const PROMPT_TAIL: usize = 256;

/// Constants of the policy.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct PredictConfig {
    /// Predicted uses by step that a candidate must have more than its victim.
    pub margin: f64,
    /// Steps before the uses that are predicted: what passes before a plan can serve any.
    pub lag: u32,
    /// Uses are discounted by half every so many steps ...
    pub half_life: f64,
    /// ... and counted over so many.
    pub horizon: u32,
    /// Whether the experts announce one another.
    pub shared: bool,
    /// Most directions that their rates are projected on.
    pub rank: u32,
    /// Every so many steps are an example to learn from: neighbours are alike.
    pub stride: u32,
    /// Likewise in a prompt; 0: none.
    pub prompt_stride: u32,
    /// Ridge: pulls the matrix to zero.
    pub ridge: f64,
    /// How much of what was learned an example leaves.
    pub memory: f64,
    /// Whether the matrix counts as far as it has been right, or fully.
    pub trust: bool,
    /// Whether the weights of an expert's own rates are learned.
    pub own: bool,
    /// Whether the margin grows while swaps gain less than the copy.
    pub caution: bool,
    /// Whether swaps stop that gain nothing.
    pub give_up: bool,
}

impl Default for PredictConfig {
    fn default() -> Self {
        PredictConfig {
            margin: 0.09,
            lag: 1,
            half_life: 3.0,
            horizon: 8,
            shared: true,
            // Miri gets through the same code with a smaller matrix
            rank: if cfg!(miri) { 32 } else { 512 },
            stride: 2,
            prompt_stride: 16,
            ridge: 50.0,
            memory: 0.9999,
            trust: true,
            own: true,
            caution: true,
            give_up: true,
        }
    }
}

impl Params for PredictConfig {
    const PARAMS: &'static [Param<Self>] = &[
        Param { key: "margin", kind: ParamKind::Number(|c| &mut c.margin, 0.0, 100.0, Some(0.0)) },
        Param { key: "lag", kind: ParamKind::Count(|c| &mut c.lag, 0, 16, Some(0)) },
        Param { key: "half-life", kind: ParamKind::Number(|c| &mut c.half_life, 0.5, 1000.0, None) },
        Param { key: "horizon", kind: ParamKind::Count(|c| &mut c.horizon, 1, 256, None) },
        Param { key: "shared", kind: ParamKind::Switch(|c| &mut c.shared) },
        Param { key: "rank", kind: ParamKind::Count(|c| &mut c.rank, 32, 4096, None) },
        Param { key: "stride", kind: ParamKind::Count(|c| &mut c.stride, 1, 1024, None) },
        Param { key: "prompt-stride", kind: ParamKind::Count(|c| &mut c.prompt_stride, 0, 1024, Some(0)) },
        Param { key: "ridge", kind: ParamKind::Number(|c| &mut c.ridge, 1e-3, 1e6, None) },
        Param { key: "memory", kind: ParamKind::Number(|c| &mut c.memory, 0.9, 1.0, None) },
        Param { key: "trust", kind: ParamKind::Switch(|c| &mut c.trust) },
        Param { key: "own", kind: ParamKind::Switch(|c| &mut c.own) },
        Param { key: "caution", kind: ParamKind::Switch(|c| &mut c.caution) },
        Param { key: "give-up", kind: ParamKind::Switch(|c| &mut c.give_up) },
    ];
}

/// What was known when an example was taken.
struct Example {
    /// Steps since then.
    age: u32,
    /// The projected rates.
    z: Vec<f32>,
    /// The first part of the prediction.
    own: Vec<f32>,
    /// The rates, when the first part learns from it too.
    rates: Vec<f32>,
    /// Discounted uses since then.
    uses: Vec<f32>,
}

pub struct Predict {
    shape: PoolShape,
    config: PredictConfig,
    rank: usize,
    /// Steps observed.
    now: u32,
    /// `rates[j][expert]`: uses a step with half-life `OWN[j]`.
    rates: [Vec<f32>; OWN.len()],
    used: Vec<bool>,
    /// `states[h]`: projection of the rates with half-life `SHARED[h]`.
    states: [Vec<f32>; SHARED.len()],
    /// Signs of each half-life, so that its state is told from the others'.
    signs: [Vec<f32>; SHARED.len()],
    /// Signs of each expert: its direction, 1 or -1 by row.
    directions: Vec<i8>,
    rounds: Rounds,
    evidence: Evidence,
    examples: VecDeque<Example>,
    spare: Vec<Example>,
    weights: [f64; OWN.len() + 1],
    own_fit: OwnFit,
    fit: SharedFit,
    residents: Residents,
    // scratch
    row: Vec<i16>,
    z: Vec<f32>,
    scores: Vec<f32>,
    candidates: Vec<(f32, Key)>,
    victims: Vec<(f32, Key, u32)>,
}

/// Least squares for the weights of an expert's own rates.
struct OwnFit {
    /// Where learning begins: as many examples' worth of [`OWN_WEIGHTS`].
    prior: [f64; OWN.len() + 1],
    /// Moments of the rates and a constant with one another ...
    a: [[f64; OWN.len() + 1]; OWN.len() + 1],
    /// ... and with the uses that came.
    b: [f64; OWN.len() + 1],
}

/// Recursive least squares for the matrix. Examples are learned from in batches: one by one they would have to read and
/// write all of the matrix each, from memory that other threads are busy with.
struct SharedFit {
    rank: usize,
    /// Inverse of the inputs' second moments, rank x rank.
    inverse: Vec<f64>,
    /// Row by direction, column by expert.
    matrix: Vec<f32>,
    /// How well the matrix has predicted: its predictions' moments with the truth, and their own.
    with_truth: f64,
    own: f64,
    /// Examples that wait for the batch to be full: their inputs, and what the first part left over.
    waiting: usize,
    inputs: Vec<f32>,
    left: Vec<f32>,
    // scratch, a row by example
    predicted: Vec<f32>,
    spread: Vec<f64>,
    gains: Vec<f64>,
}

/// Examples of a batch.
const BATCH: usize = rows::ROWS;

/// A hash, for signs that are the same on every machine.
fn mix(mut x: u64) -> u64 {
    // splitmix64
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Sign `i` of those that `of` has.
fn sign(of: u64, i: usize) -> i8 {
    if mix(of << 32 | (i / 64) as u64) >> (i % 64) & 1 == 0 { 1 } else { -1 }
}

fn decay(half_life: f32) -> f32 {
    (-1.0 / half_life).exp2()
}

/// Columns of the matrix that are worked on at a time: with a group of rows they stay in the first cache.
const BLOCK: usize = 512;

type AddRows<T> = fn(&mut [T], [&[T]; rows::ROWS], [T; rows::ROWS]);
type AddRow<T> = fn(&mut [T], &[T], T);
const IN_F32: (AddRows<f32>, AddRow<f32>) = (rows::add_rows, rows::add_scaled);
const IN_F64: (AddRows<f64>, AddRow<f64>) = (rows::add_rows_f64, rows::add_scaled_f64);

/// `out[e] += sum over i of z[i] * matrix[i][e]`, in that order, for each of `outs` and its `z`; with the functions of
/// [`rows`] that add several rows and one.
fn add_products<T: Copy + From<f32>>(
    outs: &mut [T],
    matrix: &[T],
    zs: &[f32],
    rank: usize,
    (add_rows, add_row): (AddRows<T>, AddRow<T>),
) {
    let n = matrix.len() / rank;
    for from in (0..n).step_by(BLOCK) {
        let block = from..n.min(from + BLOCK);
        let row = |i: usize| &matrix[i * n..][block.clone()];
        for first in (0..rank).step_by(rows::ROWS) {
            for (out, z) in outs.chunks_exact_mut(n).zip(zs.chunks_exact(rank)) {
                let out = &mut out[block.clone()];
                if first + rows::ROWS <= rank {
                    let group = std::array::from_fn(|k| row(first + k));
                    add_rows(out, group, std::array::from_fn(|k| z[first + k].into()));
                } else {
                    (first..rank).for_each(|i| add_row(out, row(i), z[i].into()));
                }
            }
        }
    }
}

/// The rows of `x`, one for each example of a batch.
fn batch_of<T>(x: &[T]) -> [&[T]; BATCH] {
    let n = x.len() / BATCH;
    std::array::from_fn(|b| &x[b * n..][..n])
}

/// The inverse of a positive definite matrix, by Gauss without pivots.
fn inverse_of<const N: usize>(mut a: [[f64; N]; N]) -> [[f64; N]; N] {
    let mut inverse = [[0.0; N]; N];
    (0..N).for_each(|i| inverse[i][i] = 1.0);
    for i in 0..N {
        let pivot = a[i][i];
        a[i].iter_mut().chain(&mut inverse[i]).for_each(|v| *v /= pivot);
        let (of, its) = (a[i], inverse[i]);
        for r in (0..N).filter(|r| *r != i) {
            let f = a[r][i];
            a[r].iter_mut().zip(of).for_each(|(v, o)| *v -= f * o);
            inverse[r].iter_mut().zip(its).for_each(|(v, o)| *v -= f * o);
        }
    }
    inverse
}

impl OwnFit {
    fn new(n_keys: usize) -> Self {
        // a rate's second moment is about 0.02 where an eighth of the experts is used
        let prior = std::array::from_fn(|j| 64.0 * n_keys as f64 * if j < OWN.len() { 0.02 } else { 1.0 });
        OwnFit { prior, a: Default::default(), b: Default::default() }
    }

    fn learn(&mut self, example: &Example) {
        let n = example.uses.len();
        self.a.as_flattened_mut().iter_mut().chain(&mut self.b).for_each(|v| *v *= OWN_MEMORY);
        let column = |j: usize| &example.rates[j * n..][..n];
        let dot = |x: &[f32], y: &[f32]| x.iter().zip(y).map(|(x, y)| f64::from(x * y)).sum::<f64>();
        let sum = |x: &[f32]| x.iter().map(|x| f64::from(*x)).sum::<f64>();
        const ONE: usize = OWN.len();
        for i in 0..ONE {
            for j in i..ONE {
                self.a[i][j] += dot(column(i), column(j));
            }
            self.a[i][ONE] += sum(column(i));
            self.b[i] += dot(column(i), &example.uses);
        }
        self.a[ONE][ONE] += n as f64;
        self.b[ONE] += sum(&example.uses);
    }

    #[expect(clippy::needless_range_loop, reason = "rows of one matrix with those of another")]
    fn solve(&self) -> [f64; OWN.len() + 1] {
        let (mut a, mut b) = (self.a, self.b);
        for i in 0..b.len() {
            for j in 0..i {
                a[i][j] = a[j][i];
            }
            a[i][i] += self.prior[i];
            b[i] += self.prior[i] * OWN_WEIGHTS[i];
        }
        // Gauss without pivots: the moments and the prior are positive definite
        for i in 0..b.len() {
            for r in i + 1..b.len() {
                let f = a[r][i] / a[i][i];
                for c in i..b.len() {
                    a[r][c] -= f * a[i][c];
                }
                b[r] -= f * b[i];
            }
        }
        for i in (0..b.len()).rev() {
            for c in i + 1..b.len() {
                b[i] -= a[i][c] * b[c];
            }
            b[i] /= a[i][i];
        }
        b
    }
}

impl SharedFit {
    fn new(rank: usize, n_keys: usize, ridge: f64) -> Self {
        let mut inverse = vec![0.0; rank * rank];
        for i in 0..rank {
            inverse[i * rank + i] = 1.0 / ridge;
        }
        SharedFit {
            rank,
            inverse,
            matrix: vec![0.0; rank * n_keys],
            with_truth: 0.0,
            own: 1e-3,
            waiting: 0,
            inputs: vec![0.0; BATCH * rank],
            left: vec![0.0; BATCH * n_keys],
            predicted: vec![0.0; BATCH * n_keys],
            spread: vec![0.0; BATCH * rank],
            gains: vec![0.0; BATCH * rank],
        }
    }

    /// How much of its prediction to believe.
    fn trust(&self) -> f32 {
        (self.with_truth / self.own).clamp(0.0, 1.0) as f32
    }

    fn learn(&mut self, example: &Example, memory: f64) {
        let n = example.uses.len();
        self.inputs[self.waiting * self.rank..][..self.rank].copy_from_slice(&example.z);
        let left = &mut self.left[self.waiting * n..][..n];
        for ((left, truth), first) in left.iter_mut().zip(&example.uses).zip(&example.own) {
            *left = truth - first;
        }
        self.waiting += 1;
        if self.waiting == BATCH {
            self.waiting = 0;
            self.learn_batch(memory.powi(BATCH as i32));
        }
    }

    /// Least squares of a batch as a whole, of which `memory` leaves so much of what was learned before.
    fn learn_batch(&mut self, memory: f64) {
        let (rank, n) = (self.rank, self.left.len() / BATCH);
        self.predicted.fill(0.0);
        add_products(&mut self.predicted, &self.matrix, &self.inputs, rank, IN_F32);
        for (predicted, left) in self.predicted.chunks_exact(n).zip(self.left.chunks_exact_mut(n)) {
            let (mut with_truth, mut own) = (0.0, 0.0);
            for (p, left) in predicted.iter().zip(left) {
                with_truth += f64::from(p * *left);
                own += f64::from(p * p);
                *left -= p;
            }
            self.with_truth = self.with_truth * 0.998 + with_truth;
            self.own = self.own * 0.998 + own;
        }

        // the inverse is symmetric, so its rows are its columns
        self.spread.fill(0.0);
        add_products(&mut self.spread, &self.inverse, &self.inputs, rank, IN_F64);
        let (inputs, spread) = (batch_of(&self.inputs), batch_of(&self.spread));
        let moments: [[f64; BATCH]; BATCH] = std::array::from_fn(|b| {
            std::array::from_fn(|c| {
                let moment: f64 = inputs[b].iter().zip(spread[c]).map(|(z, s)| f64::from(*z) * s).sum();
                if b == c { memory + moment } else { moment }
            })
        });
        let weights = inverse_of(moments);
        self.gains.fill(0.0);
        for (gain, weights) in self.gains.chunks_exact_mut(rank).zip(weights) {
            rows::add_rows_f64(gain, spread, weights);
        }

        let (gains, left) = (batch_of(&self.gains), batch_of(&self.left));
        for (i, row) in self.inverse.chunks_exact_mut(rank).enumerate() {
            rows::add_rows_and_grow(row, spread, gains.map(|g| -g[i]), 1.0 / memory);
        }
        for from in (0..n).step_by(BLOCK) {
            let block = from..n.min(from + BLOCK);
            let left = left.map(|l| &l[block.clone()]);
            for (i, row) in self.matrix.chunks_exact_mut(n).enumerate() {
                rows::add_rows(&mut row[block.clone()], left, gains.map(|g| g[i] as f32));
            }
        }
    }
}

impl Predict {
    pub fn new(shape: PoolShape, config: PredictConfig) -> Self {
        let n = shape.n_keys();
        let rank = (MAX_ENTRIES / n.max(1)).clamp(MIN_RANK, config.rank as usize);
        Predict {
            shape,
            config,
            rank,
            now: 0,
            rates: std::array::from_fn(|_| vec![0.0; n]),
            used: vec![false; n],
            states: std::array::from_fn(|_| vec![0.0; rank]),
            signs: std::array::from_fn(|h| {
                (0..rank).map(|i| f32::from(sign(u64::from(u32::MAX) - h as u64, i))).collect()
            }),
            directions: (0..n * rank).map(|i| sign((i / rank) as u64, i % rank)).collect(),
            rounds: Rounds::default(),
            evidence: Evidence::new(shape),
            examples: VecDeque::new(),
            spare: Vec::new(),
            weights: OWN_WEIGHTS,
            own_fit: OwnFit::new(n),
            fit: SharedFit::new(rank + 1, n, config.ridge),
            residents: Residents::new(shape),
            row: vec![0; rank],
            z: vec![0.0; rank + 1],
            scores: vec![0.0; n],
            candidates: Vec::new(),
            victims: Vec::new(),
        }
    }

    /// One step in time.
    fn step(&mut self, uses: &[u32], stride: u32) {
        self.now = self.now.wrapping_add(1);
        self.advance_rates(std::iter::once(uses));
        if self.config.shared {
            self.row.fill(0);
            for i in uses {
                let direction = &self.directions[*i as usize * self.rank..][..self.rank];
                rows::add_signs(&mut self.row, direction);
            }
            for (state, half_life) in self.states.iter_mut().zip(SHARED) {
                let decay = decay(half_life);
                for (s, r) in state.iter_mut().zip(&self.row) {
                    *s = *s * decay + f32::from(*r) * (1.0 - decay);
                }
            }
        }
        self.learn(uses);
        if stride > 0 && self.now.is_multiple_of(stride) {
            self.take_example(self.now / stride);
        }
    }

    /// The rates after some steps, the last one now.
    fn advance_rates<'a>(&mut self, steps: impl ExactSizeIterator<Item = &'a [u32]> + Clone) {
        let n = steps.len();
        for (rates, half_life) in self.rates.iter_mut().zip(OWN) {
            let decay = decay(half_life);
            let all = decay.powi(n as i32);
            rates.iter_mut().for_each(|r| *r *= all);
            for (back, uses) in (0..n).rev().zip(steps.clone()) {
                let share = decay.powi(back as i32) * (1.0 - decay);
                uses.iter().for_each(|i| rates[*i as usize] += share);
            }
        }
        for i in steps.flatten() {
            self.used[*i as usize] = true;
        }
    }

    /// Adds a step's uses to the examples, and learns from those that have all of theirs.
    fn learn(&mut self, uses: &[u32]) {
        let discount = decay(self.config.half_life as f32);
        let (lag, horizon) = (self.config.lag, self.config.horizon);
        let total: f32 = (0..horizon).map(|d| discount.powi(d as i32)).sum();
        for e in &mut self.examples {
            if e.age >= lag {
                let weight = discount.powi((e.age - lag) as i32) / total;
                uses.iter().for_each(|i| e.uses[*i as usize] += weight);
            }
            e.age += 1;
        }
        while self.examples.front().is_some_and(|e| e.age >= lag + horizon) {
            let example = self.examples.pop_front().expect("there is one");
            if self.config.shared {
                self.fit.learn(&example, self.config.memory);
            }
            if !example.rates.is_empty() {
                self.own_fit.learn(&example);
                self.weights = self.own_fit.solve();
            }
            self.spare.push(example);
        }
    }

    /// Example number `number`: what is known now.
    fn take_example(&mut self, number: u32) {
        let n = self.shape.n_keys();
        let mut e = self.spare.pop().unwrap_or_else(|| Example {
            age: 0,
            z: vec![0.0; self.rank + 1],
            own: vec![0.0; n],
            rates: Vec::new(),
            uses: vec![0.0; n],
        });
        e.age = 0;
        e.uses.fill(0.0);
        self.project();
        e.z.copy_from_slice(&self.z);
        self.own_prediction();
        e.own.copy_from_slice(&self.scores);
        e.rates.clear();
        if self.config.own && number.is_multiple_of(OWN_STRIDE) {
            self.rates.iter().for_each(|r| e.rates.extend_from_slice(r));
        }
        self.examples.push_back(e);
    }

    /// `z`: the projected rates and a constant.
    fn project(&mut self) {
        self.z.fill(0.0);
        for (state, signs) in self.states.iter().zip(&self.signs) {
            for ((z, s), sign) in self.z.iter_mut().zip(state).zip(signs) {
                *z += s * sign;
            }
        }
        // as large whatever number of experts a step uses, so that the ridge fits every model
        let uses = f32::from(self.shape.n_layers) * f32::from(self.shape.n_used);
        let scale = (TUNED_USES / uses.max(1.0) / self.rank as f32).sqrt();
        self.z.iter_mut().for_each(|z| *z *= scale);
        self.z[self.rank] = 0.3;
    }

    /// `scores`: the first part of the prediction.
    fn own_prediction(&mut self) {
        self.scores.fill(self.weights[OWN.len()] as f32);
        for (rates, weight) in self.rates.iter().zip(self.weights) {
            let weight = weight as f32;
            for (s, r) in self.scores.iter_mut().zip(rates) {
                *s += weight * r;
            }
        }
    }

    fn predict(&mut self) {
        self.own_prediction();
        let trust = if self.config.trust { self.fit.trust() } else { 1.0 };
        if self.config.shared && trust > 0.0 {
            self.project();
            self.z.iter_mut().for_each(|z| *z *= trust);
            add_products(&mut self.scores, &self.fit.matrix, &self.z, self.rank + 1, IN_F32);
        }
    }
}

impl Policy for Predict {
    fn name(&self) -> &'static str {
        "predict"
    }

    fn observe(&mut self, routed: Routed<'_>) {
        let mut rounds = std::mem::take(&mut self.rounds);
        for uses in rounds.split(self.shape, routed) {
            self.evidence.step(uses, self.residents.misses(uses));
            self.step(uses, self.config.stride);
        }
        self.rounds = rounds;
    }

    fn warm(&mut self, heat: &[f32]) {
        for (i, heat) in heat.iter().enumerate().filter(|(_, heat)| **heat > 0.0) {
            self.rates.iter_mut().for_each(|rates| rates[i] = *heat);
            self.used[i] = true;
        }
    }

    fn observe_prompt(&mut self, routed: Routed<'_>) {
        let mut rounds = std::mem::take(&mut self.rounds);
        let steps = rounds.split(self.shape, routed);
        // what came before is of another text, or of the last ubatch of this prompt
        self.evidence.cut();
        self.spare.extend(self.examples.drain(..));
        let (head, tail) = steps.split_at(steps.len().saturating_sub(PROMPT_TAIL));
        self.advance_rates(head.iter().map(Vec::as_slice));
        tail.iter().for_each(|uses| self.step(uses, self.config.prompt_stride));
        self.rounds = rounds;
    }

    fn gave_up(&self) -> bool {
        self.config.give_up && self.evidence.gave_up()
    }

    fn plan(&mut self, slots: &[Option<Key>], limits: Limits, out: &mut Vec<Swap>) {
        self.predict();
        self.residents.set(self.shape, slots);
        self.candidates.clear();
        self.victims.clear();
        for (i, used) in self.used.iter().enumerate() {
            if *used && !self.residents.has(i) {
                self.candidates.push((self.scores[i], self.shape.key(i)));
            }
        }
        for (slot, key) in slots.iter().enumerate() {
            if let Some(key) = key {
                self.victims.push((self.scores[self.shape.index(*key)], *key, slot as u32));
            }
        }
        let most = limits.max_swaps;
        residency::sort_first(&mut self.candidates, most, |a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        residency::sort_first(&mut self.victims, most, |a, b| a.0.total_cmp(&b.0).then(b.1.cmp(&a.1)));
        let caution = if self.config.caution { self.evidence.caution() } else { 1.0 };
        let margin = self.config.margin as f32 * caution;
        let from = out.len();
        residency::swaps(
            slots,
            self.candidates.iter().copied(),
            self.victims.iter().map(|v| (v.0, v.2)),
            |new, old| new > old.max(0.0) + margin,
            limits,
            out,
        );
        self.evidence.watch(&out[from..]);
        if self.gave_up() {
            keep_fills(out, from);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The matrix that least squares with a ridge gives, by Gauss, row by input.
    fn least_squares(examples: &[Example], ridge: f64) -> Vec<Vec<f64>> {
        let (rank, n) = (examples[0].z.len(), examples[0].uses.len());
        let mut a = vec![vec![0.0; rank + n]; rank];
        for (i, row) in a.iter_mut().enumerate() {
            row[i] = ridge;
            for e in examples {
                let z = f64::from(e.z[i]);
                (0..rank).for_each(|j| row[j] += z * f64::from(e.z[j]));
                (0..n).for_each(|k| row[rank + k] += z * f64::from(e.uses[k] - e.own[k]));
            }
        }
        for i in 0..rank {
            let pivot = a[i][i];
            a[i].iter_mut().for_each(|v| *v /= pivot);
            let of = a[i].clone();
            for (_, row) in a.iter_mut().enumerate().filter(|(r, _)| *r != i) {
                let f = row[i];
                row.iter_mut().zip(&of).for_each(|(v, o)| *v -= f * o);
            }
        }
        a.into_iter().map(|row| row[rank..].to_vec()).collect()
    }

    #[test]
    fn batches_learn_what_least_squares_of_all_examples_gives() {
        // neither fills its last group of vectors
        let (rank, n, ridge) = (21, if cfg!(miri) { 37 } else { BLOCK + 37 }, 3.0);
        let draw = |i: usize| (mix(i as u64) >> 40) as f32 / (1u64 << 24) as f32 - 0.5;
        let example = |e: usize| Example {
            age: 0,
            z: (0..rank).map(|i| draw(e * 1000 + i)).collect(),
            own: (0..n).map(|k| draw(e * 5000 + k)).collect(),
            rates: Vec::new(),
            uses: (0..n).map(|k| draw(e * 7000 + 3 * k)).collect(),
        };
        let examples: Vec<Example> = (0..5 * BATCH).map(example).collect();
        let mut fit = SharedFit::new(rank, n, ridge);
        for (i, e) in examples.iter().enumerate() {
            fit.learn(e, 1.0);
            if (i + 1) % BATCH == 0 {
                let expected = least_squares(&examples[..=i], ridge);
                for (row, expected) in fit.matrix.chunks_exact(n).zip(expected) {
                    assert!(row.iter().zip(expected).all(|(w, x)| (f64::from(*w) - x).abs() < 1e-5));
                }
            }
        }
    }
}
