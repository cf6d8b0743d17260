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
//! An expert is admitted when its predicted uses exceed a resident's by a margin, which grows while
//! uploads bring few hits.
//!
//! Everything is ordered and no multiplication is fused with an addition, so a replay on another machine
//! decides as the run did.

use std::collections::VecDeque;

use super::{Key, Limits, Policy, PoolShape, Routed, Swap, residency::Residents};

/// Half-lives of the use rates of an expert, in tokens.
const OWN: [f32; 6] = [1.0, 4.0, 16.0, 64.0, 256.0, 2048.0];
/// Weights of these, then a constant: least squares over the tuning traces, where learning begins.
const OWN_WEIGHTS: [f64; OWN.len() + 1] = [0.047, -0.059, 0.523, 0.260, 0.117, 0.095, 0.004];
/// Every so many examples are one for these weights: there are few to learn.
const OWN_STRIDE: usize = 4;
/// How much of what these weights were learned from an example leaves.
const OWN_MEMORY: f64 = 0.999;
/// Half-lives of the rates that are projected, in tokens.
const SHARED: [f32; 3] = [2.0, 8.0, 64.0];
/// Most directions of the projection.
const MAX_RANK: usize = 256;
/// Fewest.
const MIN_RANK: usize = 32;
/// Entries of the matrix: bounds the time of a plan, about 0.2 ms for each pass over it.
const MAX_ENTRIES: usize = 1 << 20;

/// Constants of the policy.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct PredictConfig {
    /// Uses are discounted by half every so many tokens ...
    pub target_half_life: f32,
    /// ... and counted over so many.
    pub horizon: usize,
    /// Every so many tokens are an example to learn from: neighbours are alike.
    pub stride: usize,
    /// Ridge: pulls the matrix to zero.
    pub ridge: f64,
    /// How much of what was learned an example leaves.
    pub memory: f64,
    /// Predicted uses by token that a candidate must have more than its victim.
    pub margin: f32,
    /// Whether the experts announce one another.
    pub shared: bool,
    /// Whether the weights of an expert's own rates are learned.
    pub own: bool,
}

impl Default for PredictConfig {
    fn default() -> Self {
        PredictConfig {
            target_half_life: 4.0,
            horizon: 12,
            stride: 4,
            ridge: 50.0,
            memory: 0.9999,
            margin: 0.1,
            shared: true,
            own: true,
        }
    }
}

/// What was known when an example was taken.
struct Example {
    /// Steps since then.
    age: usize,
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
    now: usize,
    /// `rates[j][expert]`: uses a step with half-life `OWN[j]`.
    rates: [Vec<f32>; OWN.len()],
    used: Vec<bool>,
    /// `states[h]`: projection of the rates with half-life `SHARED[h]`.
    states: [Vec<f32>; SHARED.len()],
    /// Signs of each half-life, so that its state is told from the others'.
    signs: [Vec<f32>; SHARED.len()],
    examples: VecDeque<Example>,
    spare: Vec<Example>,
    weights: [f64; OWN.len() + 1],
    own_fit: OwnFit,
    fit: SharedFit,
    residents: Residents,
    // scratch
    row: Vec<f32>,
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

/// Recursive least squares for the matrix.
struct SharedFit {
    /// Inverse of the inputs' second moments, rank x rank.
    inverse: Vec<f64>,
    /// Row by direction, column by expert.
    matrix: Vec<f32>,
    /// How well the matrix has predicted: its predictions' moments with the truth, and their own.
    with_truth: f64,
    own: f64,
    gain: Vec<f64>,
    error: Vec<f32>,
}

/// A bit of a hash by key and direction: a projection that needs no table.
fn mix(mut x: u64) -> u64 {
    // splitmix64
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

fn sign(bits: u64, i: usize) -> f32 {
    if bits >> (i % 64) & 1 == 0 { 1.0 } else { -1.0 }
}

fn decay(half_life: f32) -> f32 {
    (-1.0 / half_life).exp2()
}

/// Runs `f` compiled for AVX2 where the CPU has it. Lanes are independent and nothing is fused, so the
/// result is the same.
#[inline]
fn wide(f: impl FnOnce()) {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2")]
        fn avx2(f: impl FnOnce()) {
            f();
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the CPU has it.
            return unsafe { avx2(f) };
        }
    }
    f();
}

/// `out[e] += sum over i of z[i] * matrix[i][e]`, in that order.
fn add_product(out: &mut [f32], matrix: &[f32], z: &[f32]) {
    wide(
        #[inline(always)]
        || add_product_lanes(out, matrix, z),
    );
}

/// `matrix[i][e] += gain[i] * error[e]`.
fn add_outer(matrix: &mut [f32], gain: &[f64], error: &[f32]) {
    wide(
        #[inline(always)]
        || add_outer_lanes(matrix, gain, error),
    );
}

#[inline(always)]
fn add_product_lanes(out: &mut [f32], matrix: &[f32], z: &[f32]) {
    const BLOCK: usize = 1024; // of `out` that stays in the first cache
    let n = out.len();
    for (b, out) in out.chunks_mut(BLOCK).enumerate() {
        for (i, z) in z.iter().enumerate() {
            let row = &matrix[i * n + b * BLOCK..][..out.len()];
            for (o, m) in out.iter_mut().zip(row) {
                *o += z * m;
            }
        }
    }
}

#[inline(always)]
fn add_outer_lanes(matrix: &mut [f32], gain: &[f64], error: &[f32]) {
    for (row, g) in matrix.chunks_exact_mut(error.len()).zip(gain) {
        let g = *g as f32;
        for (m, e) in row.iter_mut().zip(error) {
            *m += g * e;
        }
    }
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
            inverse,
            matrix: vec![0.0; rank * n_keys],
            with_truth: 0.0,
            own: 1e-3,
            gain: vec![0.0; rank],
            error: vec![0.0; n_keys],
        }
    }

    /// How much of its prediction to believe.
    fn trust(&self) -> f32 {
        (self.with_truth / self.own).clamp(0.0, 1.0) as f32
    }

    fn learn(&mut self, example: &Example, memory: f64) {
        let rank = self.gain.len();
        let z = &example.z;
        self.error.fill(0.0);
        add_product(&mut self.error, &self.matrix, z);
        let (mut with_truth, mut own) = (0.0, 0.0);
        for ((e, truth), first) in self.error.iter_mut().zip(&example.uses).zip(&example.own) {
            let left = truth - first;
            with_truth += f64::from(*e * left);
            own += f64::from(*e * *e);
            *e = left - *e;
        }
        self.with_truth = self.with_truth * 0.998 + with_truth;
        self.own = self.own * 0.998 + own;

        let mut denominator = memory;
        for (gain, row) in self.gain.iter_mut().zip(self.inverse.chunks_exact(rank)) {
            *gain = row.iter().zip(z).map(|(p, z)| p * f64::from(*z)).sum();
        }
        for (gain, z) in self.gain.iter().zip(z) {
            denominator += gain * f64::from(*z);
        }
        for i in 0..rank {
            let g = self.gain[i] / denominator;
            for j in 0..rank {
                let p = &mut self.inverse[i * rank + j];
                *p = (*p - g * self.gain[j]) / memory;
            }
        }
        for g in &mut self.gain {
            *g /= denominator;
        }
        add_outer(&mut self.matrix, &self.gain, &self.error);
    }
}

impl Predict {
    pub fn new(shape: PoolShape, config: PredictConfig) -> Self {
        let n = shape.n_keys();
        let rank = (MAX_ENTRIES / n.max(1)).clamp(MIN_RANK, MAX_RANK);
        Predict {
            shape,
            config,
            rank,
            now: 0,
            rates: std::array::from_fn(|_| vec![0.0; n]),
            used: vec![false; n],
            states: std::array::from_fn(|_| vec![0.0; rank]),
            signs: std::array::from_fn(|h| {
                let bits = |i: usize| mix(u64::MAX - (h * MAX_RANK + i / 64) as u64);
                (0..rank).map(|i| sign(bits(i), i)).collect()
            }),
            examples: VecDeque::new(),
            spare: Vec::new(),
            weights: OWN_WEIGHTS,
            own_fit: OwnFit::new(n),
            fit: SharedFit::new(rank + 1, n, config.ridge),
            residents: Residents::new(shape),
            row: vec![0.0; rank],
            z: vec![0.0; rank + 1],
            scores: vec![0.0; n],
            candidates: Vec::new(),
            victims: Vec::new(),
        }
    }

    /// One step in time: `ids` gives the expert and layer of each use.
    fn step(&mut self, uses: impl Iterator<Item = usize> + Clone, learn: bool) {
        self.now += 1;
        for (rates, half_life) in self.rates.iter_mut().zip(OWN) {
            let decay = decay(half_life);
            rates.iter_mut().for_each(|r| *r *= decay);
            for i in uses.clone() {
                rates[i] += 1.0 - decay;
            }
        }
        for i in uses.clone() {
            self.used[i] = true;
        }
        if self.config.shared {
            self.row.fill(0.0);
            for i in uses.clone() {
                for (word, row) in self.row.chunks_mut(64).enumerate() {
                    let bits = mix((i * MAX_RANK / 64 + word) as u64);
                    for (b, v) in row.iter_mut().enumerate() {
                        *v += sign(bits, b);
                    }
                }
            }
            for (state, half_life) in self.states.iter_mut().zip(SHARED) {
                let decay = decay(half_life);
                for (s, r) in state.iter_mut().zip(&self.row) {
                    *s = *s * decay + *r * (1.0 - decay);
                }
            }
        }
        if learn {
            self.learn(uses);
        }
    }

    fn learn(&mut self, uses: impl Iterator<Item = usize> + Clone) {
        let discount = decay(self.config.target_half_life);
        let total: f32 = (0..self.config.horizon).map(|d| discount.powi(d as i32)).sum();
        for e in &mut self.examples {
            let weight = discount.powi(e.age as i32) / total;
            for i in uses.clone() {
                e.uses[i] += weight;
            }
            e.age += 1;
        }
        while self.examples.front().is_some_and(|e| e.age >= self.config.horizon) {
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
        if self.now.is_multiple_of(self.config.stride) {
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
            if self.config.own && (self.now / self.config.stride).is_multiple_of(OWN_STRIDE) {
                self.rates.iter().for_each(|r| e.rates.extend_from_slice(r));
            }
            self.examples.push_back(e);
        }
    }

    /// `z`: the projected rates and a constant.
    fn project(&mut self) {
        self.z.fill(0.0);
        for (state, signs) in self.states.iter().zip(&self.signs) {
            for ((z, s), sign) in self.z.iter_mut().zip(state).zip(signs) {
                *z += s * sign;
            }
        }
        let scale = 1.0 / (self.rank as f32).sqrt();
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
        let trust = self.fit.trust();
        if self.config.shared && trust > 0.0 {
            self.project();
            self.z.iter_mut().for_each(|z| *z *= trust);
            add_product(&mut self.scores, &self.fit.matrix, &self.z);
        }
    }
}

impl Policy for Predict {
    fn name(&self) -> &'static str {
        "predict"
    }

    fn observe(&mut self, routed: Routed<'_>) {
        let n = routed.n_tokens.max(1) as usize;
        let shape = self.shape;
        for t in 0..n {
            let of = |(layer, ids): (usize, &Vec<u16>)| {
                let each = ids.len() / n;
                let range = t * each..if t + 1 == n { ids.len() } else { (t + 1) * each };
                (layer, range)
            };
            let uses = routed.ids.iter().enumerate().flat_map(move |(layer, ids)| {
                let (layer, range) = of((layer, ids));
                ids[range].iter().map(move |&expert| shape.index(Key { layer: layer as u16, expert }))
            });
            self.step(uses, true);
        }
    }

    fn observe_prompt(&mut self, _routed: Routed<'_>) {}

    fn plan(&mut self, slots: &[Option<Key>], limits: Limits, out: &mut Vec<Swap>) {
        self.predict();
        self.residents.set(self.shape, slots);
        let most = limits.max_swaps as usize;
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
        self.candidates.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        self.victims.sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then(b.1.cmp(&a.1)));
        let margin = self.config.margin;
        super::residency::swaps(
            slots,
            self.candidates.iter().copied(),
            self.victims.iter().map(|v| (v.0, v.2)),
            |new, old| new > old.max(0.0) + margin,
            Limits { max_swaps: most as u32 },
            out,
        );
    }
}
