//! A recorded run and its replay.

use std::path::Path;

use moe_hot::{
    policy::PolicyKind,
    replay::{Routing, replay},
    trace::TraceReader,
};

/// Replays the trace at `path` with the options of its run.
///
/// # Panics
/// When the trace cannot be read, the run swapped nothing, or the replay plans anything else, or at another moment.
pub fn assert_replays(path: &Path, kind: PolicyKind, k: u32, interval: u32) -> Routing {
    let routing = TraceReader::open(path).and_then(Routing::read).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(routing.header.k, k);
    assert!(!routing.swaps.is_empty(), "{kind}: the run swapped nothing");
    let mut planned = Vec::new();
    replay(&routing, kind, k, interval, |at, class, swap| planned.push((at, class, *swap)));
    let (n, recorded) = (planned.len(), routing.swaps.len());
    let same = planned.iter().zip(&routing.swaps).take_while(|(p, r)| p == r).count();
    assert!(
        planned == routing.swaps,
        "{kind}: {n} swaps replayed, {recorded} recorded; after {same} equal ones {:?} replayed, {:?} recorded",
        planned.get(same),
        routing.swaps.get(same)
    );
    routing
}
