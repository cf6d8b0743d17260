//! Decides which experts should have a slot: counts in, plan out.
//!
//! Pure and deterministic: no clock, no thread, no I/O, no map whose order depends on the run. The
//! running server and the offline replay drive the same objects, so a recorded run can be replayed swap
//! by swap. One file a policy; a new one is a new file and its lines in `spec`.

mod decay;
mod evidence;
mod fixed;
mod lfru;
mod lfu;
mod lru;
mod predict;
mod residency;
mod rounds;
mod rows;
mod s3fifo;
mod spec;

pub use decay::DecayConfig;
pub use predict::PredictConfig;
pub use spec::{PolicyError, PolicyKind, PolicySpec, build};

/// An expert of a layer; `layer` counts the pool's own layers from 0.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Key {
    /// Layer of the pool.
    pub layer: u16,
    /// Expert of the layer.
    pub expert: u16,
}

/// What a pool is for.
#[derive(Clone, Copy, Debug)]
pub struct PoolShape {
    /// Layers that share it.
    pub n_layers: u16,
    /// Experts of each.
    pub n_expert: u16,
    /// Experts a token is routed to.
    pub n_used: u16,
    /// Slots.
    pub n_slots: u32,
    /// Bytes of an expert.
    pub expert_bytes: u64,
}

impl PoolShape {
    /// Number of experts over all layers.
    pub fn n_keys(&self) -> usize {
        usize::from(self.n_layers) * usize::from(self.n_expert)
    }

    /// Position of `key` in a table over all experts.
    pub fn index(&self, key: Key) -> usize {
        usize::from(key.layer) * usize::from(self.n_expert) + usize::from(key.expert)
    }

    /// Inverse of [`PoolShape::index`].
    pub fn key(&self, index: usize) -> Key {
        let n = usize::from(self.n_expert);
        Key { layer: (index / n) as u16, expert: (index % n) as u16 }
    }
}

/// What a plan may cost.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Most swaps in it.
    pub max_swaps: u32,
}

impl Limits {
    /// What the plan after `uses` uses of experts of the pool may cost, when a copy costs decode about as
    /// much as a use on this device does times `uses_per_upload`. Counted in uses and not in time, so that
    /// a replay decides as the run did.
    pub fn after(uses: u64, uses_per_upload: u32) -> Self {
        let swaps = uses / u64::from(uses_per_upload.max(1));
        Limits { max_swaps: swaps.clamp(1, u64::from(u32::MAX)) as u32 }
    }
}

/// All experts of layers with `n_expert` experts each.
pub fn all_keys(n_expert: impl Iterator<Item = usize>) -> Vec<Key> {
    let layer = |(layer, n): (usize, usize)| {
        (0..n).map(move |expert| Key { layer: layer as u16, expert: expert as u16 })
    };
    n_expert.enumerate().flat_map(layer).collect()
}

/// One expert takes a slot.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Swap {
    /// The slot.
    pub slot: u32,
    /// Who had it.
    pub evict: Option<Key>,
    /// Who gets it.
    pub admit: Key,
}

/// What a ubatch routed.
#[derive(Clone, Copy, Debug)]
pub struct Routed<'a> {
    /// Tokens.
    pub n_tokens: u32,
    /// Sequence of each token; empty when all are of one.
    pub sequences: &'a [u32],
    /// `ids[layer]`: experts routed, the tokens one after the other. Where a layer has fewer than `n_used`
    /// for each token, they are the last tokens'.
    pub ids: &'a [Vec<u16>],
}

/// A way to choose the hot set of one pool.
pub trait Policy: Send {
    /// Its name on the command line.
    fn name(&self) -> &'static str;

    /// One decoded ubatch.
    fn observe(&mut self, routed: Routed<'_>);

    /// The routing of a prompt: may seed slots that are free, and stays out of recency.
    fn observe_prompt(&mut self, routed: Routed<'_>);

    /// Starts from what an earlier run found, uses by token of each expert by [`PoolShape::index`]; called before
    /// anything is observed.
    fn warm(&mut self, _heat: &[f32]) {}

    /// Whether it found that swaps gain nothing on what is routed now, and swaps no more until they would:
    /// the slots keep what they have.
    fn gave_up(&self) -> bool {
        false
    }

    /// Appends swaps to `out`. `slots[s]` is what slot s is assigned to, copies in flight included.
    /// At most `limits.max_swaps`; no slot and no expert twice; no expert that has a slot.
    fn plan(&mut self, slots: &[Option<Key>], limits: Limits, out: &mut Vec<Swap>);
}

#[cfg(test)]
mod tests;
