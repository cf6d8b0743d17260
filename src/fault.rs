//! Faults on demand, so that tests reach what machines rarely do.
//!
//! `MOE_HOT_FAULT` is a list of names with numbers, `copy=3,register=1`; unset in all real use. Every
//! fault that is armed is announced when a pool becomes active.
//!
//! | name | what |
//! |---|---|
//! | `alloc=N` | the N-th time that slots get memory fails |
//! | `register=N`, `copy=N` | every N-th registration, copy fails |
//! | `torn=N` | every N-th copy brings only the first half of each matrix, and says that it brought all |
//! | `row=N` | a panic in every N-th request for cold experts |
//! | `stall=N`, `stall_ms=N` | a worker sleeps in the N-th one that workers begin; for how long |
//! | `slow=N` | DISPATCH takes N ms more when an expert is cold, in host memory |
//! | `bound=N` | JOIN waits for N ms at most |
//! | `vram=N` | the device of the slots claims to have N MiB for them and all that comes later |
//! | `driver=N` | the driver claims to be of CUDA version N, as `cuDriverGetVersion` counts |
//! | `thread=N`, `file=N` | the N-th start of a thread, the N-th write to a trace or profile fails |
//! | `chance=N`, `seed=S` | N of 1000 allocations, registrations, copies and writes fail, and as many copies and requests for cold experts are late; which ones follows from the seed |

use std::{
    collections::BTreeMap,
    sync::{
        LazyLock,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use xxhash_rust::xxh64::xxh64;

struct Armed {
    n: u64,
    calls: AtomicU64,
}

static ARMED: LazyLock<BTreeMap<String, Armed>> = LazyLock::new(|| {
    let list = std::env::var("MOE_HOT_FAULT").unwrap_or_default();
    let one = |fault: &str| {
        let (name, n) = fault.split_once('=')?;
        Some((name.to_string(), Armed { n: n.parse().ok()?, calls: AtomicU64::new(0) }))
    };
    list.split(',').filter_map(one).collect()
});

/// The number a fault was armed with.
pub fn armed(name: &str) -> Option<u64> {
    ARMED.get(name).map(|a| a.n)
}

/// What may be hit by chance: what costs speed and not a step.
const BY_CHANCE: [&str; 5] = ["alloc", "register", "copy", "file", "late"];

/// True in as many calls of 1000 as `chance` says, the same ones for the same seed and order of calls with this name.
fn by_chance(name: &str) -> bool {
    static CALLS: [AtomicU64; BY_CHANCE.len()] = [const { AtomicU64::new(0) }; BY_CHANCE.len()];
    let (Some(chance), Some(i)) = (armed("chance"), BY_CHANCE.iter().position(|n| *n == name)) else {
        return false;
    };
    let call = CALLS[i].fetch_add(1, Ordering::Relaxed);
    let seed = armed("seed").unwrap_or(0);
    xxh64(format!("{name} {call}").as_bytes(), seed) % 1000 < chance
}

/// Waits for a moment, by chance.
pub fn delay() {
    if by_chance("late") {
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// As a result of the system's, for what is armed with this name once or by chance.
///
/// # Errors
/// When it strikes.
pub fn io(name: &str) -> std::io::Result<()> {
    if strikes_once(name) { Err(std::io::Error::other("a fault was injected")) } else { Ok(()) }
}

/// True for the n-th call with this name, 2n-th, and so on, and by chance.
pub fn strikes(name: &str) -> bool {
    by_chance(name)
        || ARMED
            .get(name)
            .is_some_and(|a| (a.calls.fetch_add(1, Ordering::Relaxed) + 1).is_multiple_of(a.n.max(1)))
}

/// True for the n-th call with this name alone, and by chance.
pub fn strikes_once(name: &str) -> bool {
    by_chance(name) || ARMED.get(name).is_some_and(|a| a.calls.fetch_add(1, Ordering::Relaxed) + 1 == a.n)
}

/// What may happen to the thread that computes a unit: it panics (`row`), or, as a worker, it stalls (`stall`)
/// for `stall_ms`, an hour unless that is armed.
pub fn in_unit() {
    assert!(!strikes("row"), "a fault was injected");
    delay();
    let on_worker = || std::thread::current().name().is_some_and(|n| n.starts_with("moe-hot-"));
    if armed("stall").is_some() && on_worker() && strikes_once("stall") {
        std::thread::sleep(Duration::from_millis(armed("stall_ms").unwrap_or(3_600_000)));
    }
}

/// What is armed, `None` when nothing is.
pub fn announcement() -> Option<String> {
    let names: Vec<_> = ARMED.iter().map(|(name, a)| format!("{name}={}", a.n)).collect();
    (!names.is_empty()).then(|| format!("moe-hot: faults are injected (MOE_HOT_FAULT): {}", names.join(", ")))
}
