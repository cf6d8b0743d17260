//! What the policies have to reach: on recorded text that none was tuned on, where the text changes its
//! domain, and on routing that is made to be hard.
//!
//! `traces/kept` was recorded by scripts/traces. Reads are the uses of experts without a slot, as a multiple
//! of those of the optimum over the whole pool, which knows the future and copies for free.

use std::{path::PathBuf, sync::OnceLock};

use moe_hot::{
    config::Config,
    policy::{Key, PolicySpec},
    replay::{self, Outcome, Routing, Scope},
    trace::{Step, TraceHeader, TraceLayer, TraceReader},
};

/// The policy on a GPU and the tokens between two plans, where nothing else is asked for.
const DEFAULT: (&str, u32) = ("predict", 2);
/// Slots a layer of 64 experts, and most reads.
const BARS: [(u32, f64); 3] = [(8, 1.40), (16, 1.62), (24, 1.82)];
const MIN_HITS_PER_UPLOAD: f64 = 10.0;
const TRACES: [&str; 4] = ["switch", "tech", "code", "fiction"];

fn kept(name: &str) -> &'static Routing {
    static READ: OnceLock<Vec<Routing>> = OnceLock::new();
    let all = READ.get_or_init(|| {
        let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("traces/kept");
        let read = |name| TraceReader::open(&folder.join(format!("{name}.trace.gz"))).and_then(Routing::read);
        TRACES.map(|name| read(name).unwrap()).into()
    });
    &all[TRACES.iter().position(|n| *n == name).unwrap()]
}

fn spec(text: &str) -> PolicySpec {
    text.parse().unwrap()
}

/// `f` of every item, on a thread each.
fn parallel<T: Send, U: Send>(items: Vec<T>, f: impl Fn(T) -> U + Sync) -> Vec<U> {
    std::thread::scope(|scope| {
        let f = &f;
        let threads: Vec<_> = items.into_iter().map(|i| scope.spawn(move || f(i))).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    })
}

/// Hits and uses of each step, from the swaps alone.
fn hits_by_step(routing: &Routing, policy: &str, k: u32, interval: u32) -> (Outcome, Vec<(u32, u32)>) {
    let mut swaps = Vec::new();
    let outcome = replay::replay(routing, spec(policy), k, interval, |at, _, s| swaps.push((at, *s)));
    let n_expert = usize::from(routing.header.layers[0].n_expert);
    let mut hot = vec![false; routing.header.layers.len() * n_expert];
    let index = |key: Key| usize::from(key.layer) * n_expert + usize::from(key.expert);
    let (mut next, mut copying) = (0, Vec::new());
    let steps = routing.steps.iter().enumerate().map(|(at, step)| {
        copying.drain(..).for_each(|key| hot[index(key)] = true);
        while let Some((_, s)) = swaps.get(next).filter(|s| s.0 == at) {
            s.evict.into_iter().for_each(|key| hot[index(key)] = false);
            copying.push(s.admit);
            next += 1;
        }
        let hit = |(layer, ids): (usize, &Vec<u16>)| {
            ids.iter().filter(|id| hot[layer * n_expert + usize::from(**id)]).count() as u32
        };
        let hits = step.ids.iter().enumerate().map(hit).sum();
        (hits, step.ids.iter().map(Vec::len).sum::<usize>() as u32)
    });
    (outcome, steps.collect())
}

/// A run of the default policy on a kept trace.
struct Run {
    trace: &'static str,
    k: u32,
    outcome: Outcome,
    /// Hits and uses of each step.
    steps: Vec<(u32, u32)>,
}

/// All of them, made once.
fn runs() -> &'static [Run] {
    static RUNS: OnceLock<Vec<Run>> = OnceLock::new();
    RUNS.get_or_init(|| {
        let jobs = TRACES.iter().flat_map(|trace| BARS.map(|(k, _)| (*trace, k))).collect();
        parallel(jobs, |(trace, k)| {
            let (outcome, steps) = hits_by_step(kept(trace), DEFAULT.0, k, DEFAULT.1);
            Run { trace, k, outcome, steps }
        })
    })
}

#[test]
fn reads_on_recorded_text_are_within_the_bars() {
    let config = Config::default();
    assert_eq!((config.policy_of(true), config.rebalance_interval), (spec(DEFAULT.0), DEFAULT.1));
    for (k, most) in BARS {
        let (mut policy, mut best, mut fixed) = (None, None, None);
        let add = |sum: &mut Option<Outcome>, o: Outcome| match sum {
            Some(sum) => *sum += o,
            None => *sum = Some(o),
        };
        for run in runs().iter().filter(|r| r.k == k) {
            add(&mut policy, run.outcome);
            add(&mut best, replay::optimum(kept(run.trace), k, Scope::Pool));
            add(&mut fixed, replay::hindsight(kept(run.trace), k));
        }
        let (policy, best, fixed) = (policy.unwrap(), best.unwrap(), fixed.unwrap());
        let reads = policy.misses as f64 / best.misses as f64;
        let hits_per_upload = policy.hits_per_upload().unwrap();
        assert!(reads <= most, "K = {k}: {reads:.3}, at most {most}");
        assert!(hits_per_upload >= MIN_HITS_PER_UPLOAD, "K = {k}: {hits_per_upload:.1} hits an upload");
        assert!(policy.misses < fixed.misses, "K = {k}: worse than the best fixed set");
    }
}

#[test]
fn the_swaps_alone_tell_every_hit() {
    for run in runs() {
        let hits: u64 = run.steps.iter().map(|s| u64::from(s.0)).sum();
        assert_eq!(hits, run.outcome.hits, "{}, K = {}", run.trace, run.k);
    }
}

/// Where the domain changes: the routing of the `W` tokens before is unlike that of the `W` after.
fn changes(routing: &Routing) -> Vec<usize> {
    const W: usize = 128;
    const APART: usize = 250;
    let n_expert = usize::from(routing.header.layers[0].n_expert);
    let count = |from: &[Step]| {
        let mut counts = vec![0f64; routing.header.layers.len() * n_expert];
        for step in from {
            for (layer, ids) in step.ids.iter().enumerate() {
                ids.iter().for_each(|id| counts[layer * n_expert + usize::from(*id)] += 1.0);
            }
        }
        counts
    };
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let mut unlike: Vec<(f64, usize)> = (W..routing.steps.len() - W)
        .step_by(4)
        .map(|at| {
            let (a, b) = (count(&routing.steps[at - W..at]), count(&routing.steps[at..at + W]));
            (1.0 - dot(&a, &b) / (dot(&a, &a) * dot(&b, &b)).sqrt(), at)
        })
        .collect();
    // the most unlike first; pieces of 1400 bytes are 300 tokens and more
    unlike.sort_by(|a, b| b.0.total_cmp(&a.0));
    let mut changes: Vec<usize> = Vec::new();
    let n = routing.steps.len() / 600;
    for (_, at) in unlike {
        if changes.len() < n && changes.iter().all(|c| c.abs_diff(at) >= APART) {
            changes.push(at);
        }
    }
    changes
}

#[test]
fn a_change_of_domain_costs_at_most_64_tokens() {
    let routing = kept("switch");
    let changes = changes(routing);
    let n = changes.len();
    assert!(n >= 60, "{n} changes of domain");
    for Run { k, steps, .. } in runs().iter().filter(|r| r.trace == "switch") {
        // hit rate from `from` to `to` tokens after a change
        let rate = |from: usize, to: usize| {
            let (mut hits, mut uses) = (0, 0);
            for at in changes.iter().filter(|at| **at + 256 <= steps.len()) {
                for s in &steps[at + from..at + to] {
                    (hits, uses) = (hits + s.0, uses + s.1);
                }
            }
            f64::from(hits) / f64::from(uses)
        };
        let steady = rate(128, 256);
        let curve: Vec<_> =
            (0..160).step_by(16).map(|o| format!("{:.3}", rate(o, o + 16) / steady)).collect();
        println!("K = {k}: {n} changes, steady {steady:.3}, of which by 16 tokens after a change {curve:?}");
        assert!(rate(0, 16) < 0.9 * steady, "K = {k}: a change has to be felt to be one");
        let back = rate(64, 128);
        assert!(back >= 0.98 * steady, "K = {k}: {back:.3} of {steady:.3} after 64 tokens");
    }
}

/// One token a step, from a function of layer and step.
fn made(n_layers: u16, n_expert: u16, n_steps: u32, ids: impl Fn(u16, u32) -> Vec<u16>) -> Routing {
    let layer = |il| TraceLayer { il, n_expert, n_used: ids(il, 0).len() as u16, class: 0, expert_bytes: 1 };
    let layers = (0..n_layers).map(layer).collect();
    Routing {
        header: TraceHeader { fingerprint: 0, k: 1, uses_per_upload: 8, layers },
        steps: (0..n_steps)
            .map(|t| Step { n_tokens: 1, ids: (0..n_layers).map(|l| ids(l, t)).collect(), ..Step::default() })
            .collect(),
        swaps: vec![],
        opens: vec![],
    }
}

/// A number that looks random and is not.
fn hash(a: u64, b: u64) -> u64 {
    let mut x = (a << 32 | b).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x ^ (x >> 32)
}

#[test]
fn predict_learns_who_follows_whom_where_a_frequency_cannot() {
    // every 16 tokens one of 24 experts of layer 0 announces one of layer 1, which works 4 to 12 tokens later
    let routing = made(2, 64, 6000, |layer, t| {
        let topic = (hash(1, u64::from(t / 16)) % 24) as u16;
        let noise = 32 + (hash(2 + u64::from(layer), u64::from(t)) % 32) as u16;
        match (layer, t % 16) {
            (0, 0..2) => vec![topic],
            (1, 4..12) => vec![topic],
            _ => vec![noise],
        }
    });
    let hits = |policy: &str| {
        let (_, steps) = hits_by_step(&routing, policy, 4, 1);
        let worked = steps.iter().enumerate().skip(3000).filter(|(t, _)| (4..6).contains(&(t % 16)));
        // layer 0's is noise here
        worked.map(|(_, s)| f64::from(s.0)).sum::<f64>() / 375.0
    };
    let (predict, alone, decay) = (hits("predict"), hits("predict:shared=off"), hits("decay"));
    assert!(predict > 0.8, "{predict:.2} of 2 uses");
    assert!(alone < 0.3 && decay < 0.3, "{alone:.2} and {decay:.2} without the announcement");
}

/// Bytes that leave host memory, for experts without a slot and for copies, as a multiple of what they
/// would be if the slots kept whom they got first: what `static` needs, and any expert is as large as
/// another.
fn bytes(routing: &Routing, policy: &str, k: u32) -> f64 {
    let of = |policy| {
        let o = replay::replay(routing, spec(policy), k, DEFAULT.1, |_, _, _| {});
        (o.misses + o.uploads) as f64
    };
    of(policy) / of("static")
}

#[test]
fn routing_made_to_be_hard_costs_at_most_2_percent_more_than_no_swaps() {
    const K: u32 = 16;
    let traces = [
        (
            "uniform",
            made(6, 64, 3000, |l, t| {
                let first = hash(u64::from(l), u64::from(t));
                (0..8).map(|i| ((first + (first >> 8 | 1) % 7 * 8 * i + i * 9) % 64) as u16).collect()
            }),
        ),
        (
            "cyclic, just over the capacity",
            made(6, 64, 3000, |_, t| (0..6).map(|i| ((t * 6 + i) % 18) as u16).collect()),
        ),
        (
            "all new",
            made(6, 256, 3000, |l, t| (0..4).map(|i| ((t * 4 + i + u32::from(l)) % 256) as u16).collect()),
        ),
    ];
    for (name, routing) in &traces {
        for policy in [DEFAULT.0, "decay"] {
            let bytes = bytes(routing, policy, K);
            assert!(bytes <= 1.02, "{name}, {policy}: {bytes:.4} times the bytes");
        }
    }
    assert!(bytes(&traces[0].1, "lru", K) > 1.1, "which costs who does not care");
}

#[test]
fn a_run_on_a_gpu_replays_swap_by_swap() {
    // of the widened model on an H100: docs/policy.md
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("traces/machine/wide.trace.gz");
    let run = TraceReader::open(&path).and_then(Routing::read).unwrap();
    let mut planned = Vec::new();
    replay::replay(&run, spec("decay"), run.header.k, 4, |at, class, swap| planned.push((at, class, *swap)));
    assert!(run.swaps.len() > 5000, "{} swaps", run.swaps.len());
    assert_eq!(planned, run.swaps);
}

#[test]
fn a_replay_is_the_same_every_time() {
    let mut routing = kept("switch").clone();
    routing.steps.truncate(1500);
    for policy in [DEFAULT.0, "decay"] {
        let run = || {
            let mut swaps = Vec::new();
            let o = replay::replay(&routing, spec(policy), 16, DEFAULT.1, |at, c, s| swaps.push((at, c, *s)));
            (o, swaps)
        };
        let (a, b) = (run(), run());
        assert!(a == b && !a.1.is_empty(), "{policy}");
    }
}
