//! What is decoded: sequences of batches, made from a seed.
//!
//! The tokens have locality, as text has: stretches in which few tokens come up again and again, then
//! others. Routing follows the tokens, so experts become hot and cold again.

use crate::llama::{ContextOptions, Input};

/// Tokens of one stretch.
const STRETCH: usize = 24;
/// Tokens that come up in a stretch.
const TOPIC: u64 = 12;

/// Batches, one `llama_decode` each, in a context of these options.
#[derive(Clone, Debug)]
pub struct Schedule {
    /// For messages.
    pub name: String,
    /// The context to decode in.
    pub context: ContextOptions,
    /// The batches.
    pub batches: Vec<Vec<Input>>,
}

/// The next tokens of a sequence.
struct Tokens {
    state: u64,
    n_vocab: u64,
    topic: u64,
    n: usize,
}

impl Tokens {
    fn new(seed: u64, n_vocab: usize) -> Self {
        Tokens { state: seed, n_vocab: n_vocab as u64, topic: 0, n: 0 }
    }

    /// SplitMix64.
    fn random(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.state ^ (self.state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn next(&mut self) -> i32 {
        if self.n.is_multiple_of(STRETCH) {
            self.topic = self.random();
        }
        self.n += 1;
        let token = self.topic.wrapping_add(self.random() % TOPIC * 7919) % self.n_vocab;
        token as i32
    }
}

/// One sequence of a batch under construction.
struct Sequence {
    seq: i32,
    pos: i32,
    tokens: Tokens,
}

impl Sequence {
    fn new(seq: i32, seed: u64, n_vocab: usize) -> Self {
        Sequence { seq, pos: 0, tokens: Tokens::new(seed * 1000 + seq as u64, n_vocab) }
    }

    fn take(&mut self, n: usize) -> Vec<Input> {
        let next = |_| {
            self.pos += 1;
            Input { token: self.tokens.next(), pos: self.pos - 1, seq: self.seq, output: true }
        };
        (0..n).map(next).collect()
    }
}

impl Schedule {
    /// One sequence: a prompt, batches of every size around the limit of the hot path, `n_single` tokens
    /// one by one, and a second prompt.
    pub fn mixed(n_vocab: usize, seed: u64, n_single: usize) -> Self {
        let mut s = Sequence::new(0, seed, n_vocab);
        let mut batches: Vec<_> = [40, 1, 2, 3, 4, 5, 6, 7, 8, 33].map(|n| s.take(n)).into();
        batches.extend((0..n_single).map(|_| s.take(1)));
        batches.extend([7, 6, 20, 5, 1].map(|n| s.take(n)));
        Schedule { name: "mixed batches".into(), context: ContextOptions::default(), batches }
    }

    /// One sequence in ubatches of `n_ubatch` tokens, of which the last of a batch is shorter.
    pub fn ubatches(n_vocab: usize, seed: u64, n_ubatch: u32) -> Self {
        let mut s = Sequence::new(0, seed, n_vocab);
        let n = n_ubatch as usize;
        let batches = [2 * n + 1, 30, 8 * n, 70, 1].map(|n| s.take(n)).into();
        let context = ContextOptions { n_ubatch, ..ContextOptions::default() };
        Schedule { name: format!("ubatches of {n_ubatch}"), context, batches }
    }

    /// `n_seq` sequences that are decoded together, most often one token of each. They start one after the
    /// other, with a prompt in the same batch as the next tokens of those before.
    pub fn sequences(n_vocab: usize, seed: u64, n_seq: u32, n_rounds: usize) -> Self {
        let mut all: Vec<_> = (0..n_seq as i32).map(|seq| Sequence::new(seq, seed, n_vocab)).collect();
        let mut batches = Vec::new();
        for newest in 0..all.len() {
            let prompt = |s: usize| if s == newest { 4 + 5 * s } else { 1 };
            batches.push((0..=newest).flat_map(|s| all[s].take(prompt(s))).collect());
        }
        for round in 0..n_rounds {
            let length = |s: &Sequence| match round % 8 {
                // some have stopped
                3 => usize::from(s.seq % 2 == 0),
                // one drafts
                5 => 1 + 2 * usize::from(s.seq == 0),
                _ => 1,
            };
            batches.push(all.iter_mut().flat_map(|s| s.take(length(s))).collect());
        }
        batches.push(all.iter_mut().flat_map(|s| s.take(9)).collect());
        let kv_unified = n_seq % 2 == 1;
        let context = ContextOptions { n_seq_max: n_seq, kv_unified, ..ContextOptions::default() };
        Schedule { name: format!("{n_seq} sequences"), context, batches }
    }

    /// The same, but the logits only of the last token of each sequence in a batch, as for a prompt. The
    /// last layer then has fewer tokens than the others, in some ubatches none.
    pub fn last_outputs(mut self) -> Self {
        self.name += ", logits of the last token";
        for batch in &mut self.batches {
            for i in 0..batch.len() {
                batch[i].output = batch[i + 1..].iter().all(|later| later.seq != batch[i].seq);
            }
        }
        self
    }

    /// Whether the logits of every token are wanted.
    pub fn is_all_outputs(&self) -> bool {
        self.batches.iter().flatten().all(|i| i.output)
    }

    /// How many tokens come in ubatches of at most `limit`. Only for one sequence, whose batches are cut
    /// at multiples of the ubatch size.
    pub fn tokens_up_to(&self, limit: u32) -> Option<u64> {
        if self.context.n_seq_max > 1 {
            return None;
        }
        let of_batch = |b: &Vec<Input>| {
            let sizes = b.chunks(self.context.n_ubatch as usize).map(|u| u.len() as u64);
            sizes.filter(|n| *n <= u64::from(limit)).sum::<u64>()
        };
        Some(self.batches.iter().map(of_batch).sum())
    }
}
