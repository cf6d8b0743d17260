//! Decayed frequency with an admission gate and a margin.
//!
//! An expert's score is the number of its uses, each halved every `half_life` tokens. Short memory
//! follows the text; the gate keeps single uses out, which would only be copied to be evicted; the
//! margin keeps two experts of like score from taking turns. Every layer of a pool routes the same
//! number of experts a token, so scores of different layers compare as they are.

use super::{
    Key, Limits, Policy, PoolShape, Routed, Swap,
    evidence::{Evidence, keep_fills},
    residency::{Residents, Touched, sort_first, swaps},
    rounds::Rounds,
    spec::{Param, ParamKind, Params},
};

/// Constants of the policy.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct DecayConfig {
    /// Tokens after which a use counts half.
    pub half_life: f64,
    /// An expert is admitted after this many uses ...
    pub gate_uses: u32,
    /// ... within this many tokens.
    pub gate_tokens: u32,
    /// A candidate must score this many times its victim.
    pub margin: f64,
    /// Whether swaps stop that gain nothing.
    pub give_up: bool,
}

impl Default for DecayConfig {
    /// Half-life and margin from the simulation in DESIGN 4, the gate from what testers of
    /// ggml-org/llama.cpp#27861 found: "3 uses within 16 steps" brought 7 hits an upload, no gate 1.5.
    fn default() -> Self {
        DecayConfig { half_life: 32.0, gate_uses: 2, gate_tokens: 16, margin: 1.3, give_up: true }
    }
}

impl Params for DecayConfig {
    const PARAMS: &'static [Param<Self>] = &[
        Param { key: "half-life", kind: ParamKind::Number(|c| &mut c.half_life, 0.5, 1e6, None) },
        Param { key: "gate", kind: ParamKind::Count(|c| &mut c.gate_uses, 1, 1000, Some(1)) },
        Param { key: "gate-tokens", kind: ParamKind::Count(|c| &mut c.gate_tokens, 1, 1_000_000, None) },
        Param { key: "margin", kind: ParamKind::Number(|c| &mut c.margin, 1.0, 100.0, Some(1.0)) },
        Param { key: "give-up", kind: ParamKind::Switch(|c| &mut c.give_up) },
    ];
}

#[derive(Clone, Copy, Default)]
struct Heat {
    /// Score at token `at`.
    score: f64,
    at: u64,
    /// Begin of the gate's window and uses in it.
    window: u64,
    uses: u32,
}

pub struct Decay {
    shape: PoolShape,
    config: DecayConfig,
    /// Tokens seen.
    now: u64,
    heat: Vec<Heat>,
    touched: Touched,
    residents: Residents,
    rounds: Rounds,
    evidence: Evidence,
    /// Prompt uses, for slots that are still free.
    prompt: Vec<u32>,
    // scratch
    candidates: Vec<(f64, Key)>,
    victims: Vec<(f64, Key, u32)>,
}

impl Decay {
    pub fn new(shape: PoolShape, config: DecayConfig) -> Self {
        Decay {
            shape,
            config,
            now: 0,
            heat: vec![Heat::default(); shape.n_keys()],
            touched: Touched::new(shape),
            residents: Residents::new(shape),
            rounds: Rounds::default(),
            evidence: Evidence::new(shape),
            prompt: Vec::new(),
            candidates: Vec::new(),
            victims: Vec::new(),
        }
    }

    fn score(&self, index: usize) -> f64 {
        let h = &self.heat[index];
        h.score * (-((self.now - h.at) as f64) / self.config.half_life).exp2()
    }

    fn passes_gate(&self, index: usize) -> bool {
        let h = &self.heat[index];
        h.uses >= self.config.gate_uses && self.now - h.window <= u64::from(self.config.gate_tokens)
    }
}

/// Best score first; equal scores by layer, then expert.
fn best_first(a: &(f64, Key), b: &(f64, Key)) -> std::cmp::Ordering {
    b.0.total_cmp(&a.0).then(a.1.cmp(&b.1))
}

impl Policy for Decay {
    fn name(&self) -> &'static str {
        "decay"
    }

    fn observe(&mut self, routed: Routed<'_>) {
        let mut rounds = std::mem::take(&mut self.rounds);
        for uses in rounds.split(self.shape, routed) {
            self.now += 1;
            self.evidence.step(uses, self.residents.misses(uses));
            for &i in uses {
                let i = i as usize;
                let score = self.score(i) + 1.0;
                let h = &mut self.heat[i];
                if self.now - h.window > u64::from(self.config.gate_tokens) || h.uses == 0 {
                    (h.window, h.uses) = (self.now, 0);
                }
                h.uses += 1;
                (h.score, h.at) = (score, self.now);
                self.touched.add(i);
            }
        }
        self.rounds = rounds;
    }

    fn warm(&mut self, heat: &[f32]) {
        // the score of an expert that has been used at this rate all the time
        let scale = 1.0 / (1.0 - (-1.0 / self.config.half_life).exp2());
        for (i, heat) in heat.iter().enumerate().filter(|(_, heat)| **heat > 0.0) {
            self.heat[i].score = f64::from(*heat) * scale;
            self.touched.add(i);
        }
    }

    fn gave_up(&self) -> bool {
        self.config.give_up && self.evidence.gave_up()
    }

    fn observe_prompt(&mut self, routed: Routed<'_>) {
        self.evidence.cut();
        self.prompt.resize(self.shape.n_keys(), 0);
        for (layer, ids) in routed.ids.iter().enumerate() {
            for &expert in ids {
                self.prompt[self.shape.index(Key { layer: layer as u16, expert })] += 1;
            }
        }
    }

    fn plan(&mut self, slots: &[Option<Key>], limits: Limits, out: &mut Vec<Swap>) {
        self.residents.set(self.shape, slots);
        let free = slots.iter().any(Option::is_none);
        let mut candidates = std::mem::take(&mut self.candidates);
        candidates.clear();
        for i in self.touched.iter() {
            // a free slot costs nobody anything, so the gate is for full pools only
            if !self.residents.has(i) && (free || self.passes_gate(i)) {
                candidates.push((self.score(i), self.shape.key(i)));
            }
        }
        if free && !self.prompt.is_empty() {
            // below any decoded use, in the order of the prompt's counts
            let n: u32 = self.prompt.iter().sum();
            for (i, &uses) in self.prompt.iter().enumerate() {
                if uses > 0 && !self.residents.has(i) && self.heat[i].at == 0 {
                    candidates
                        .push((f64::from(uses) / f64::from(n) * f64::MIN_POSITIVE.sqrt(), self.shape.key(i)));
                }
            }
        }
        sort_first(&mut candidates, limits.max_swaps, best_first);

        self.victims.clear();
        if !free || candidates.len() > slots.iter().filter(|s| s.is_none()).count() {
            for (slot, key) in slots.iter().enumerate() {
                if let Some(key) = key {
                    self.victims.push((self.score(self.shape.index(*key)), *key, slot as u32));
                }
            }
            // worst first; equal scores: the later layer and expert goes first
            let worst_first =
                |a: &(f64, Key, u32), b: &(f64, Key, u32)| a.0.total_cmp(&b.0).then(b.1.cmp(&a.1));
            sort_first(&mut self.victims, limits.max_swaps, worst_first);
        }
        let margin = self.config.margin;
        let from = out.len();
        swaps(
            slots,
            candidates.iter().copied(),
            self.victims.iter().map(|v| (v.0, v.2)),
            |new, old| new > margin * old,
            limits,
            out,
        );
        self.evidence.watch(&out[from..]);
        if self.gave_up() {
            keep_fills(out, from);
        }
        self.candidates = candidates;
        // a use that did not pass the gate may pass it with the next one, as long as its window lasts
        let (heat, now, window) = (&self.heat, self.now, u64::from(self.config.gate_tokens));
        self.touched.retain(|i| now - heat[i].window <= window);
    }
}
