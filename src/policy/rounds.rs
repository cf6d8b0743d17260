//! A ubatch as steps in time.
//!
//! Tokens of one sequence follow one another; tokens of different sequences do not. So the first tokens of
//! all sequences of a ubatch are one step, the second ones the next, and so on: with sequences decoded in
//! parallel a step is what all of them route at once, and what comes next for the slots is the sum of what
//! comes next for each.

use super::{Key, PoolShape, Routed};

/// The uses of each step, as indices by [`PoolShape::index`]. Keeps its memory from ubatch to ubatch.
#[derive(Default)]
pub struct Rounds {
    uses: Vec<Vec<u32>>,
    n: usize,
    /// Step of each token.
    of: Vec<usize>,
    /// Sequences of the ubatch, and the tokens of each so far.
    sequences: Vec<(u32, usize)>,
}

impl Rounds {
    /// Takes a ubatch apart.
    pub fn split(&mut self, shape: PoolShape, routed: Routed<'_>) -> &[Vec<u32>] {
        let n_tokens = routed.n_tokens.max(1) as usize;
        self.sequences.clear();
        self.of.clear();
        for t in 0..n_tokens {
            let sequence = routed.sequences.get(t).copied().unwrap_or(0);
            let at = self.sequences.iter().position(|s| s.0 == sequence).unwrap_or_else(|| {
                self.sequences.push((sequence, 0));
                self.sequences.len() - 1
            });
            self.of.push(self.sequences[at].1);
            self.sequences[at].1 += 1;
        }
        self.n = self.sequences.iter().map(|s| s.1).max().unwrap_or(0);
        self.uses.resize_with(self.n.max(self.uses.len()), Vec::new);
        self.uses.iter_mut().for_each(Vec::clear);
        let n_used = usize::from(shape.n_used).max(1);
        for (layer, ids) in routed.ids.iter().enumerate() {
            // the last layer of a prompt has only the tokens whose output is wanted
            let last = ids.len() < n_tokens * n_used && ids.len() % n_used == 0;
            let (each, of) = if last {
                (n_used, &self.of[n_tokens - ids.len() / n_used..])
            } else {
                ((ids.len() / n_tokens).max(1), &self.of[..])
            };
            for (i, &expert) in ids.iter().enumerate() {
                let round = of[(i / each).min(of.len() - 1)];
                self.uses[round].push(shape.index(Key { layer: layer as u16, expert }) as u32);
            }
        }
        &self.uses[..self.n]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: PoolShape = PoolShape { n_layers: 2, n_expert: 8, n_used: 2, n_slots: 1, expert_bytes: 1 };

    #[test]
    fn tokens_of_one_sequence_are_steps_one_after_the_other() {
        let ids = [vec![0, 1, 2, 3, 4, 5], vec![0, 1, 2, 3, 4, 5]];
        for sequences in [&[][..], &[7, 7, 7]] {
            let mut rounds = Rounds::default();
            let steps = rounds.split(SHAPE, Routed { n_tokens: 3, sequences, ids: &ids });
            assert_eq!(steps, [[0, 1, 8, 9], [2, 3, 10, 11], [4, 5, 12, 13]]);
        }
    }

    #[test]
    fn tokens_of_different_sequences_are_one_step() {
        let ids = [vec![0, 1, 2, 3, 4, 5], vec![]];
        let mut rounds = Rounds::default();
        let routed = Routed { n_tokens: 3, sequences: &[1, 2, 1], ids: &ids };
        assert_eq!(rounds.split(SHAPE, routed), [vec![0, 1, 2, 3], vec![4, 5]]);
        let routed = Routed { n_tokens: 3, sequences: &[1, 2, 3], ids: &ids };
        assert_eq!(rounds.split(SHAPE, routed), [[0, 1, 2, 3, 4, 5]], "nothing of the ubatch before");
    }

    #[test]
    fn a_layer_with_fewer_tokens_has_the_last_ones() {
        let ids = [vec![0, 1, 2, 3, 4, 5], vec![6, 7]];
        let mut rounds = Rounds::default();
        let steps = rounds.split(SHAPE, Routed { n_tokens: 3, sequences: &[], ids: &ids });
        assert_eq!(steps, [vec![0, 1], vec![2, 3], vec![4, 5, 14, 15]]);
    }
}
