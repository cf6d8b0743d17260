//! Any trace replayed against any policy.

use std::{collections::BTreeSet, io::Cursor, path::Path};

use arbitrary::{Arbitrary, Unstructured};
use moe_hot::{
    policy::{PolicyKind, PolicySpec},
    replay::{Routing, Scope, hindsight, optimum, replay},
    trace::TraceReader,
};

use super::{memory::bounded, trace::with_checksums};

/// What a policy knows of an expert, all tables together.
const PER_EXPERT: usize = 2 << 10;
/// What the trace's tokens cost: their sequences and the steps that they are taken apart into.
const PER_TOKEN: usize = 128;
const PER_BYTE: usize = 128;
const FIXED: usize = 1 << 20;
/// The tables of `predict` for a pool at [`MAX_RANK`].
const PER_POOL: usize = 1 << 20;
/// Larger ones are valid, and slow.
const MAX_EXPERTS: usize = 2048;
const MAX_TOKENS: u64 = 1 << 11;
const MAX_STEPS: usize = 256;
const MAX_RANK: u32 = 64;

#[derive(Arbitrary, Debug)]
struct Run<'a> {
    policy: Policy<'a>,
    k: u8,
    interval: u8,
    trace: &'a [u8],
}

#[derive(Arbitrary, Debug)]
enum Policy<'a> {
    Kind(u8),
    Text(&'a str),
}

/// Whoever chooses the slots, the uses are the same ones.
pub fn run(data: &[u8]) {
    let Ok(run) = Run::arbitrary_take_rest(Unstructured::new(data)) else { return };
    let mut spec: PolicySpec = match run.policy {
        Policy::Kind(i) => {
            let kinds: Vec<_> = PolicyKind::all().collect();
            kinds[usize::from(i) % kinds.len()].into()
        }
        Policy::Text(text) => match text.parse() {
            Ok(spec) => spec,
            Err(_) => return,
        },
    };
    if let PolicySpec::Predict(config) = &mut spec {
        config.rank = config.rank.min(MAX_RANK);
    }
    let trace = Cursor::new(with_checksums(run.trace));
    let Ok(reader) = TraceReader::unpack(trace, Path::new("t.trace")) else { return };
    let Ok(routing) = Routing::read(reader) else { return };
    // a table is as long as the longest layer for each of a class
    let layers = &routing.header.layers;
    let widest = layers.iter().map(|l| usize::from(l.n_expert)).max().unwrap_or(0);
    let n_experts = widest * layers.len();
    let n_tokens: u64 = routing.steps.iter().map(|s| u64::from(s.n_tokens)).sum();
    if n_experts > MAX_EXPERTS || n_tokens > MAX_TOKENS || routing.steps.len() > MAX_STEPS {
        return;
    }
    let n_pools = layers.iter().map(|l| l.class).collect::<BTreeSet<_>>().len();
    let bound = FIXED
        + PER_POOL * n_pools
        + PER_EXPERT * n_experts
        + PER_TOKEN * n_tokens as usize
        + PER_BYTE * data.len();
    bounded(bound, || {
        let (k, interval) = (run.k.into(), run.interval.into());
        let uses = routing.counts().iter().flatten().sum::<u64>();
        let mut swaps = 0;
        let outcome = replay(&routing, spec, k, interval, |_, _, _| swaps += 1);
        assert!(outcome.uploads <= swaps);
        for o in [
            outcome,
            hindsight(&routing, k),
            optimum(&routing, k, Scope::Pool),
            optimum(&routing, k, Scope::Layer),
        ] {
            assert_eq!(o.hits + o.misses, uses, "{o:?}");
            assert!(o.cold <= o.misses && o.cold_layers <= o.cold, "{o:?}");
        }
    });
}
