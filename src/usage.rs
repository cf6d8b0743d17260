//! What was routed: the ids that DISPATCH saw in one step, and the counters over all steps.

/// Routed experts of one step, by layer. DISPATCH fills it, the end of the step takes it.
#[derive(Clone, Default, Debug)]
pub struct StepUsage {
    /// Tokens of the step's ubatch.
    pub n_tokens: u32,
    /// Sequence of each token.
    pub sequences: Vec<u32>,
    /// `ids[layer]`: experts routed in that layer, tokens one after the other; every id, hit or miss.
    pub ids: Vec<Vec<u16>>,
    /// `cold[layer]`: those of them that had no slot.
    pub cold: Vec<u32>,
    /// Ids that had a slot.
    pub hits: u64,
    /// Of those that had none, those that the device read over the link.
    pub linked: u64,
}

impl StepUsage {
    /// Empty usage over `n_layers` layers.
    pub fn new(n_layers: usize) -> Self {
        StepUsage { ids: vec![Vec::new(); n_layers], cold: vec![0; n_layers], ..Self::default() }
    }

    /// Ids that had no slot.
    pub fn misses(&self) -> u64 {
        self.cold.iter().map(|n| u64::from(*n)).sum()
    }

    /// Whether any layer routed anything.
    pub fn is_empty(&self) -> bool {
        self.ids.iter().all(Vec::is_empty)
    }

    /// Begins a step of a ubatch; one that was given up leaves nothing.
    pub fn begin(&mut self, n_tokens: u32, sequences: &[u32]) {
        self.clear();
        self.n_tokens = n_tokens;
        self.sequences.extend_from_slice(sequences);
    }

    /// Forgets the step, keeps the memory.
    pub fn clear(&mut self) {
        self.n_tokens = 0;
        self.sequences.clear();
        self.hits = 0;
        self.linked = 0;
        self.ids.iter_mut().for_each(Vec::clear);
        self.cold.fill(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_that_was_given_up_leaves_nothing() {
        let mut usage = StepUsage::new(1);
        usage.begin(100, &[3; 100]);
        usage.ids[0].extend([1; 200]);
        usage.cold[0] = 200;
        usage.begin(2, &[]);
        assert!(usage.is_empty() && usage.sequences.is_empty());
        assert_eq!((usage.n_tokens, usage.misses()), (2, 0));
    }
}
