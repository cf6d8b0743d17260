//! Any bytes as a profile.

use std::path::Path;

use moe_hot::profile::{Profile, Tally};

use super::memory::bounded;

/// An empty layer is 20 bytes of text; a vector grows by doubling.
const PER_BYTE: usize = 24;
const FIXED: usize = 64 << 10;

/// What is read is sound: a run can start from it.
pub fn run(data: &[u8]) {
    bounded(FIXED + PER_BYTE * data.len(), || {
        let profile = match Profile::read(data, Path::new("p.json")) {
            Ok(p) => p,
            Err(e) => return assert!(e.to_string().starts_with("p.json: "), "{e}"),
        };
        let layers: Vec<_> = profile.layers.iter().take(8).map(|l| (l.il, l.heat.len() as u16)).collect();
        // of more experts than a layer can have
        let Ok(heat) = profile.heat_for(profile.model, &layers) else { return };
        assert!(heat.iter().flatten().all(|h| h.is_finite() && *h >= 0.0));
        let mut tally = Tally::new(&layers);
        tally.resume(&profile, profile.model).expect("is of its own model");
        tally.observe(1, &layers.iter().map(|l| vec![0; usize::from(l.1.min(1))]).collect::<Vec<_>>());
        assert!(tally.shares().iter().flatten().all(|s| (0.0..=1.0).contains(s)));
    });
}
