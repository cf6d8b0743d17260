//! Static: the experts used most in the first tokens get the slots and keep them. What a profile from
//! another time would do, and the yardstick that a policy which follows the text must beat.

use super::{Key, Limits, Policy, PoolShape, Routed, Swap, lfu::Lfu};

/// Tokens after which the set is fixed.
const WARM_UP_TOKENS: u64 = 256;

pub struct Fixed {
    counts: Lfu,
    tokens: u64,
}

impl Fixed {
    pub fn new(shape: PoolShape) -> Self {
        Fixed { counts: Lfu::new(shape), tokens: 0 }
    }
}

impl Policy for Fixed {
    fn name(&self) -> &'static str {
        "static"
    }

    fn observe(&mut self, routed: Routed<'_>) {
        if self.tokens < WARM_UP_TOKENS {
            self.counts.count(routed.ids);
        }
        self.tokens += u64::from(routed.n_tokens);
    }

    /// The profile is the set.
    fn warm(&mut self, _heat: &[f32]) {
        self.tokens = WARM_UP_TOKENS;
    }

    fn observe_prompt(&mut self, routed: Routed<'_>) {
        if self.tokens < WARM_UP_TOKENS {
            self.counts.count(routed.ids);
        }
    }

    fn plan(&mut self, slots: &[Option<Key>], limits: Limits, out: &mut Vec<Swap>) {
        self.counts.plan(slots, limits, out);
    }
}
