//! Runs a schedule with and without slots and compares the logits, bit by bit.

use std::time::Duration;

use crate::{
    llama::{Context, Exclusive, Hot, Logits, Model, Stats},
    models::TestModel,
    schedule::Schedule,
};

/// Largest ubatch of the hot path on this device, in tokens (DESIGN 2: T).
pub const MAX_TOKENS: u32 = 7;

/// What a schedule gave.
pub struct Run {
    /// By batch.
    pub logits: Vec<Logits>,
    /// Counters at the end; `None` without slots.
    pub stats: Option<Stats>,
}

/// Decodes `schedule` in `ctx`.
///
/// # Errors
/// What `llama_decode` returned.
pub fn decode(ctx: &mut Context<'_>, schedule: &Schedule) -> Result<Run, String> {
    let mut logits = Vec::new();
    for batch in &schedule.batches {
        logits.push(ctx.decode(batch)?);
        if ctx.stats().is_some_and(|s| s.n_rebalances > 0 && s.n_uploads + s.n_hits == 0) {
            // small models are through before a busy machine has given the copy thread its turn
            std::thread::sleep(Duration::from_millis(1));
        }
    }
    Ok(Run { logits, stats: ctx.stats() })
}

/// Decodes `schedule` in a context of its own without slots. The logits are numbers, and not all the same.
///
/// # Errors
/// There is no context, or it has slots, or the logits are no good to compare with.
pub fn stock(llama: &Exclusive, model: &Model<'_>, schedule: &Schedule) -> Result<Run, String> {
    llama.off();
    let run = decode(&mut model.context(schedule.context)?, schedule)?;
    if run.stats.is_some() {
        return Err("stock has slots".into());
    }
    let values = || run.logits.iter().flat_map(|l| &l.values);
    if !values().all(|v| v.is_finite()) {
        return Err("stock's logits are not finite".into());
    }
    let first = run.logits.first().and_then(|l| l.values.first());
    if values().all(|v| Some(v) == first) {
        return Err("stock's logits are all the same".into());
    }
    Ok(run)
}

/// Decodes `schedule` with slots and compares with what stock gave. Also checks by the counters that the
/// slots took part: every token of a small ubatch went through every layer with slots.
///
/// # Errors
/// One line that says what differs where, or what the counters lack.
pub fn hot(
    llama: &Exclusive,
    model: &Model<'_>,
    about: &TestModel,
    schedule: &Schedule,
    hot: &Hot,
    expected: &Run,
) -> Result<Stats, String> {
    llama.hot(hot);
    let name = format!("{}, {}, {hot}", about.name(), schedule.name);
    let run = model.context(schedule.context).and_then(|mut ctx| decode(&mut ctx, schedule));
    let run = run.map_err(|e| format!("{name}: {e}"))?;
    if let Some(what) = difference(schedule, &expected.logits, &run.logits) {
        return Err(format!("{name}: {what}; {:?}", run.stats));
    }
    let Some(s) = run.stats else { return Err(format!("{name}: there are no slots")) };
    let lacks = lacking(about, schedule, hot, &s);
    if lacks.is_empty() { Ok(s) } else { Err(format!("{name}: {}; {s:?}", lacks.join(", "))) }
}

/// What is wrong about the counters of an exact run.
fn lacking(about: &TestModel, schedule: &Schedule, hot: &Hot, s: &Stats) -> Vec<String> {
    let mut lacks = Vec::new();
    let mut expect = |ok: bool, what: &str| {
        if !ok {
            lacks.push(what.to_string());
        }
    };
    let limit = hot.pp_bypass.unwrap_or(MAX_TOKENS).min(MAX_TOKENS);
    match schedule.tokens_up_to(limit) {
        Some(n) => expect(s.n_tokens == n, &format!("{n} tokens belong on the hot path")),
        None => expect(s.n_tokens > 0, "no token took the hot path"),
    }
    expect(s.n_layers as u32 == about.n_moe_layer, &format!("{} layers have experts", about.n_moe_layer));
    let routed = s.n_tokens * u64::from(about.n_used * about.n_moe_layer);
    if schedule.is_all_outputs() {
        expect(s.n_hits + s.n_misses == routed, &format!("{routed} experts were routed"));
    } else {
        // the last layer may compute the tokens whose logits are wanted only
        let least = s.n_tokens * u64::from(about.n_used * (about.n_moe_layer - 1));
        let ok = (least..=routed).contains(&(s.n_hits + s.n_misses));
        expect(ok, &format!("{least} to {routed} experts were routed"));
    }
    let slots = about.n_moe_layer * hot.k.min(about.n_expert);
    expect(s.n_slots as u32 == slots, &format!("{slots} slots were asked for"));
    if hot.k < about.n_expert {
        expect(s.n_misses > 0, "no expert was ever cold");
    } else {
        expect(s.n_misses == 0 && s.n_uploads == 0, "all were there before the first token");
    }
    expect(s.n_uploads <= u64::from(slots) + s.n_evictions, "more uploads than slots that were free");
    if s.n_tokens > u64::from(hot.interval) && hot.k < about.n_expert {
        expect(s.n_rebalances > 0, "no plan was made");
    }
    // a copy is seen at the first boundary after it has ended: not in a run that ends with the plan
    if s.n_tokens >= u64::from(hot.interval) + 16 {
        // a pool that an earlier context has filled needs no more
        expect(s.n_uploads + s.n_hits > 0, "no expert was uploaded");
    }
    if s.n_tokens >= 64 && hot.interval == 1 {
        expect(s.n_hits > 0, "no expert was ever hot");
    }
    lacks
}

/// Where `got` differs from `expected` first, and by how much at most.
pub fn difference(schedule: &Schedule, expected: &[Logits], got: &[Logits]) -> Option<String> {
    let mut first = None;
    let (mut n_rows, mut max) = (0, 0.0f32);
    for (b, (batch, (expected, got))) in schedule.batches.iter().zip(expected.iter().zip(got)).enumerate() {
        for (i, input) in batch.iter().filter(|i| i.output).enumerate() {
            let (e, g) = (expected.row(i), got.row(i));
            let Some(at) = e.iter().zip(g).position(|(e, g)| e.to_bits() != g.to_bits()) else { continue };
            n_rows += 1;
            max = e.iter().zip(g).map(|(e, g)| (e - g).abs()).fold(max, f32::max);
            first.get_or_insert_with(|| {
                format!(
                    "batch {b} of {} tokens, output {i}, position {} of sequence {}: logit {at} is {:e}, stock's {:e}",
                    batch.len(),
                    input.pos,
                    input.seq,
                    g[at],
                    e[at]
                )
            });
        }
    }
    first.map(|f| format!("{f}; {n_rows} positions differ, by {max:e} at most"))
}

/// Collects what went wrong, so that one run tells all of it.
#[derive(Default)]
pub struct Failures {
    list: Vec<String>,
    n: usize,
}

impl Failures {
    /// Counts a check, and keeps what it says. `None` when it failed.
    pub fn check<T>(&mut self, result: Result<T, String>) -> Option<T> {
        self.n += 1;
        result.map_err(|e| self.list.push(e)).ok()
    }

    /// # Panics
    /// With all failures, when there are any, or when nothing was checked.
    pub fn done(self) {
        assert!(self.n > 0, "nothing was checked");
        let Failures { list, n } = self;
        assert!(list.is_empty(), "{} of {n} failed:\n{}", list.len(), list.join("\n"));
        eprintln!("{n} comparisons");
    }
}
