//! What a policy costs: one observed token and one plan, and a ubatch of a prompt, at the size of a 48-layer model with
//! 128 experts a layer, 8 used, 32 slots a layer.

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use moe_hot::policy::{self, Key, Limits, PolicyKind, PoolShape, Routed};

const SHAPE: PoolShape =
    PoolShape { n_layers: 48, n_expert: 128, n_used: 8, n_slots: 32 * 48, expert_bytes: 1 << 20 };

/// Routing that drifts: a window of experts that moves on, as text does.
fn token(t: u32) -> Vec<Vec<u16>> {
    let expert = |l: u32, k: u32| ((t / 16 + l * 7 + (t * (k + 3) + l) % 40) % 128) as u16;
    (0..48).map(|l| (0..8).map(|k| expert(l, k)).collect()).collect()
}

const PROMPT_TOKENS: u32 = 512;

/// Likewise a ubatch, `ids[layer]` of all its tokens.
fn prompt(from: u32) -> Vec<Vec<u16>> {
    let tokens: Vec<_> = (from..from + PROMPT_TOKENS).map(token).collect();
    (0..48).map(|l| tokens.iter().flat_map(|t| t[l].clone()).collect()).collect()
}

fn bench(c: &mut Criterion) {
    for kind in PolicyKind::all() {
        let mut policy = policy::build(kind, SHAPE);
        let mut slots: Vec<Option<Key>> = vec![None; SHAPE.n_slots as usize];
        let mut t = 0;
        let mut step = |plan: bool| {
            policy.observe(Routed { n_tokens: 1, sequences: &[], ids: &token(t) });
            t += 1;
            let mut swaps = Vec::new();
            if plan {
                policy.plan(&slots, Limits { max_swaps: u32::MAX }, &mut swaps);
                swaps.iter().for_each(|s| slots[s.slot as usize] = Some(s.admit));
            }
            swaps.len()
        };
        (0..512).for_each(|_| {
            step(true);
        });
        c.bench_function(&format!("policy/{kind}/observe"), |b| b.iter(|| step(false)));
        c.bench_function(&format!("policy/{kind}/observe+plan"), |b| {
            b.iter_batched(|| (), |()| step(true), BatchSize::SmallInput);
        });
        let ids = prompt(t);
        c.bench_function(&format!("policy/{kind}/prompt of {PROMPT_TOKENS}"), |b| {
            b.iter(|| policy.observe_prompt(Routed { n_tokens: PROMPT_TOKENS, sequences: &[], ids: &ids }));
        });
    }
}

criterion_group!(benches, bench);
criterion_main!(benches);
