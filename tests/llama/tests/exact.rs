//! With slots, the logits of every position equal stock's to the last bit: every architecture, every
//! weight type, any number of slots, ubatches on both sides of the hot path's limit, several sequences,
//! several contexts, experts coming and going all the while.

use llama_tests::{
    Context, ContextOptions, Exclusive, Hot, Input, Llama, LoadOptions, Logits, Model, Stats,
    compare::{self, Failures, difference},
    models::{self, TestModel},
    schedule::Schedule,
};

const POLICIES: [&str; 7] = ["decay", "lru", "lfu", "static", "lfru", "s3fifo", "predict"];

fn llama() -> Exclusive {
    let llama = Llama::get();
    assert!(llama.has_moe_hot(), "this libllama was built without LLAMA_MOE_HOT");
    llama.exclusive()
}

fn load<'a>(llama: &'a Exclusive, about: &TestModel) -> Model<'a> {
    llama.load(&about.file, LoadOptions::default()).unwrap_or_else(|e| panic!("{e}"))
}

/// Compares all of `configs` with one run of stock, each with a pool that starts empty: experts are
/// uploaded, and unless all have a slot they replace each other.
fn all_from_empty(
    failures: &mut Failures,
    llama: &Exclusive,
    model: &Model<'_>,
    about: &TestModel,
    schedule: &Schedule,
    configs: &[Hot],
) {
    let swapped = |config: &Hot, s: &Stats| {
        if config.k >= about.n_expert {
            // all were there before the first token
            return s.n_misses == 0 && s.n_uploads == 0;
        }
        let all_used = about.n_used == about.n_expert;
        s.n_uploads > 0 && (s.n_evictions > 0 || all_used || config.interval > 1)
    };
    for (config, mut s) in configs.iter().zip(all(failures, llama, model, about, schedule, configs)) {
        // the run takes milliseconds, and copies are made by a thread that a busy machine may forget for as long
        for _ in 0..4 {
            if !swapped(config, &s) {
                s = all(failures, llama, model, about, schedule, std::slice::from_ref(config))
                    .pop()
                    .unwrap_or(s);
            }
        }
        let what = || format!("{}, {}, {config}: no swaps; {s:?}", about.name(), schedule.name);
        failures.check(if swapped(config, &s) { Ok(()) } else { Err(what()) });
    }
}

/// Compares all of `configs` with one run of stock.
fn all(
    failures: &mut Failures,
    llama: &Exclusive,
    model: &Model<'_>,
    about: &TestModel,
    schedule: &Schedule,
    configs: &[Hot],
) -> Vec<Stats> {
    let expected = compare::stock(llama, model, schedule);
    let expected = expected.map_err(|e| format!("{}, {}: {e}", about.name(), schedule.name));
    let Some(expected) = failures.check(expected) else { return Vec::new() };
    let run = |config| failures.check(compare::hot(llama, model, about, schedule, config, &expected));
    configs.iter().filter_map(run).collect()
}

/// A few combinations that reach all code paths.
fn some(about: &TestModel) -> [Hot; 3] {
    let [one, middle, every] = about.ks();
    [
        Hot { k: one, interval: 1, workers: 0, ..Hot::default() },
        Hot { k: middle, interval: 1, workers: 2, ..Hot::default() },
        Hot { k: every, interval: 64, workers: 0, ..Hot::default() },
    ]
}

/// Every number of slots with every interval, with and without workers.
fn matrix(about: &TestModel) -> Vec<Hot> {
    let mut configs = Vec::new();
    for k in about.ks() {
        for interval in [1, 64] {
            for workers in [0, 2] {
                configs.push(Hot { k, interval, workers, ..Hot::default() });
            }
        }
    }
    configs
}

fn supported() -> impl Iterator<Item = &'static TestModel> {
    models::test_set().iter().filter(|m| m.supported && m.arch != "lora")
}

#[test]
fn every_synthetic_model() {
    let llama = llama();
    let mut failures = Failures::default();
    for about in supported() {
        let model = load(&llama, about);
        let schedule = Schedule::mixed(model.n_vocab(), 1, 80);
        all_from_empty(&mut failures, &llama, &model, about, &schedule, &some(about));
    }
    failures.done();
}

#[test]
fn every_synthetic_model_with_several_sequences() {
    let llama = llama();
    let mut failures = Failures::default();
    for (i, about) in supported().enumerate() {
        let model = load(&llama, about);
        let n_seq = 2 + i as u32 % 3;
        let schedule = Schedule::sequences(model.n_vocab(), 2, n_seq, 40);
        let schedule = if i % 2 == 0 { schedule } else { schedule.last_outputs() };
        let config =
            Hot { k: about.ks()[1], interval: 1 + i as u32 % 5, workers: i as u32 % 2, ..Hot::default() };
        all(&mut failures, &llama, &model, about, &schedule, &[config]);
    }
    failures.done();
}

#[test]
fn every_synthetic_model_with_the_logits_of_last_tokens() {
    let llama = llama();
    let mut failures = Failures::default();
    for (i, about) in supported().enumerate() {
        let model = load(&llama, about);
        let n_vocab = model.n_vocab();
        let n_ubatch = [3, 7, 16][i % 3];
        let config = [Hot { k: about.ks()[1], interval: 1, workers: i as u32 % 2, ..Hot::default() }];
        let (a, b) = (Schedule::mixed(n_vocab, 16, 16), Schedule::ubatches(n_vocab, 17, n_ubatch));
        all(&mut failures, &llama, &model, about, &a.last_outputs(), &config);
        all(&mut failures, &llama, &model, about, &b.last_outputs(), &config);
    }
    failures.done();
}

/// One model in depth.
fn in_depth(about: &TestModel, n_single: usize) {
    let llama = llama();
    let mut failures = Failures::default();
    let model = load(&llama, about);
    let n_vocab = model.n_vocab();
    let [_, middle, every] = about.ks();
    all_from_empty(
        &mut failures,
        &llama,
        &model,
        about,
        &Schedule::mixed(n_vocab, 3, n_single),
        &matrix(about),
    );

    for n_ubatch in [1, 2, 3, 4, 5, 6, 7, 8, 33] {
        let configs = [
            Hot { k: middle, interval: 1, workers: n_ubatch % 3, ..Hot::default() },
            Hot { k: every, interval: 5, workers: 0, ..Hot::default() },
        ];
        all(&mut failures, &llama, &model, about, &Schedule::ubatches(n_vocab, 4, n_ubatch), &configs);
    }
    let schedule = Schedule::mixed(n_vocab, 18, 32).last_outputs();
    all(&mut failures, &llama, &model, about, &schedule, &matrix(about));
    for n_seq in [2, 3, 4] {
        let configs =
            [1, middle, every].map(|k| Hot { k, interval: 4, workers: n_seq % 2, ..Hot::default() });
        let schedule = Schedule::sequences(n_vocab, 5, n_seq, 64);
        all(&mut failures, &llama, &model, about, &schedule, &configs);
        all(&mut failures, &llama, &model, about, &schedule.last_outputs(), &configs);
    }
    let policies = POLICIES.map(|policy| Hot { k: middle, interval: 2, policy, ..Hot::default() });
    all(&mut failures, &llama, &model, about, &Schedule::mixed(n_vocab, 6, n_single), &policies);
    let bypass = [1, 3, 7, 100].map(|n| Hot { k: middle, pp_bypass: Some(n), ..Hot::default() });
    all(&mut failures, &llama, &model, about, &Schedule::mixed(n_vocab, 7, 16), &bypass);
    failures.done();
}

#[test]
fn the_shipped_model_in_depth() {
    in_depth(&models::shipped(), 100);
}

#[test]
fn a_model_with_two_classes_in_depth() {
    in_depth(models::named("qwen3moe"), 100);
}

/// Elsewhere ggml has one thread, which suits small models and a busy machine; JOIN is for several.
#[test]
fn several_threads_of_ggml() {
    let llama = llama();
    let mut failures = Failures::default();
    for about in [models::shipped(), models::named("qwen3moe").clone()] {
        let model = load(&llama, &about);
        for n_threads in [2, 3] {
            let mut schedule = Schedule::mixed(model.n_vocab(), 15, 12);
            schedule.context.n_threads = n_threads;
            let configs = [1, about.ks()[1]].map(|k| Hot { k, workers: k % 2, ..Hot::default() });
            all(&mut failures, &llama, &model, &about, &schedule, &configs);
        }
    }
    failures.done();
}

#[test]
fn stock_equals_itself() {
    let llama = llama();
    let about = models::shipped();
    let model = load(&llama, &about);
    let schedule = Schedule::mixed(model.n_vocab(), 8, 32);
    let [a, b] = [(); 2].map(|()| compare::stock(&llama, &model, &schedule).unwrap());
    assert_eq!(difference(&schedule, &a.logits, &b.logits), None);
}

/// Decodes `text`, then `n` tokens, each the most likely after the one before.
fn continue_greedily(
    ctx: &mut Context<'_>,
    model: &Model<'_>,
    text: &str,
    n: usize,
) -> (Vec<i32>, Vec<Logits>) {
    let prompt = model.tokens(text).into_iter().enumerate();
    let prompt: Vec<_> =
        prompt.map(|(i, token)| Input { token, pos: i as i32, seq: 0, output: true }).collect();
    let mut logits = vec![ctx.decode(&prompt).unwrap()];
    let mut tokens = vec![logits[0].argmax(prompt.len() - 1)];
    for i in 0..n {
        let next = Input { token: tokens[i], pos: (prompt.len() + i) as i32, seq: 0, output: true };
        logits.push(ctx.decode(&[next]).unwrap());
        tokens.push(logits[i + 1].argmax(0));
    }
    (tokens, logits)
}

#[test]
fn the_shipped_model_continues_a_text_as_stock_does() {
    let llama = llama();
    let about = models::shipped();
    let model = load(&llama, &about);
    let text = include_str!("../src/schedule.rs").lines().take(24).collect::<Vec<_>>().join("\n");
    let (expected, expected_logits) =
        continue_greedily(&mut model.context(ContextOptions::default()).unwrap(), &model, &text, 128);
    for (k, interval, policy) in [
        (1, 1, "lru"),
        (8, 1, "decay"),
        (12, 4, "decay"),
        (16, 1, "lru"),
        (63, 16, "decay"),
        (64, 16, "decay"),
    ] {
        let config = Hot { k, interval, policy, workers: interval % 2, ..Hot::default() };
        llama.hot(&config);
        let mut ctx = model.context(ContextOptions::default()).unwrap();
        let (tokens, logits) = continue_greedily(&mut ctx, &model, &text, 128);
        assert_eq!(tokens, expected, "{config}");
        let bits = |l: &[Logits]| l.iter().flat_map(|l| &l.values).map(|v| v.to_bits()).collect::<Vec<_>>();
        assert!(bits(&logits) == bits(&expected_logits), "{config}: the logits differ, the tokens do not");
        let s = ctx.stats().expect("there are slots");
        assert_eq!(s.n_tokens, 128, "{config}: {s:?}");
        let all = k == 64;
        assert!(s.n_hits > 0 && all == (s.n_misses == 0) && all == (s.n_uploads == 0), "{config}: {s:?}");
        if k < 63 {
            assert!(s.n_evictions > 0, "{config}: no swap in the middle: {s:?}");
        }
    }
}

#[test]
fn a_context_that_is_cleared_and_used_again() {
    let llama = llama();
    let about = models::shipped();
    let model = load(&llama, &about);
    let schedule = Schedule::mixed(model.n_vocab(), 9, 40);
    let expected = compare::stock(&llama, &model, &schedule).unwrap();
    llama.hot(&Hot { k: 16, interval: 3, workers: 1, ..Hot::default() });
    let mut ctx = model.context(schedule.context).unwrap();
    for round in 0..3 {
        let run = compare::decode(&mut ctx, &schedule).unwrap();
        assert_eq!(difference(&schedule, &expected.logits, &run.logits), None, "round {round}");
        ctx.clear();
    }
}

#[test]
fn a_second_context_finds_the_experts_of_the_first() {
    let llama = llama();
    let about = models::shipped();
    let model = load(&llama, &about);
    let schedule = Schedule::mixed(model.n_vocab(), 10, 64);
    let expected = compare::stock(&llama, &model, &schedule).unwrap();
    llama.hot(&Hot { k: 32, interval: 2, ..Hot::default() });
    let mut hits = Vec::new();
    for round in 0..2 {
        let run = compare::decode(&mut model.context(schedule.context).unwrap(), &schedule).unwrap();
        assert_eq!(difference(&schedule, &expected.logits, &run.logits), None, "context {round}");
        hits.push(run.stats.expect("there are slots").n_hits);
    }
    assert!(hits[1] > hits[0], "the second context starts with a filled pool: {hits:?}");
}

#[test]
fn two_contexts_of_one_model_in_turns_and_on_two_threads() {
    let llama = llama();
    for about in [models::shipped(), models::named("qwen3moe").clone()] {
        let model = load(&llama, &about);
        let schedules = [11, 12].map(|seed| Schedule::mixed(model.n_vocab(), seed, 80));
        let expected = schedules.each_ref().map(|s| compare::stock(&llama, &model, s).unwrap());
        for workers in [0, 2] {
            llama.hot(&Hot { k: about.ks()[1], interval: 1, workers, ..Hot::default() });

            let mut contexts = schedules.each_ref().map(|s| model.context(s.context).unwrap());
            let mut logits = [Vec::new(), Vec::new()];
            for step in 0..schedules[0].batches.len() {
                for i in 0..2 {
                    logits[i].push(contexts[i].decode(&schedules[i].batches[step]).unwrap());
                }
            }
            for i in 0..2 {
                let what = difference(&schedules[i], &expected[i].logits, &logits[i]);
                assert_eq!(what, None, "{}, context {i} in turns", about.name());
            }

            contexts.iter_mut().for_each(Context::clear);
            let [a, b] = &mut contexts;
            let runs = std::thread::scope(|scope| {
                let b = scope.spawn(|| compare::decode(b, &schedules[1]).unwrap());
                [compare::decode(a, &schedules[0]).unwrap(), b.join().unwrap()]
            });
            for i in 0..2 {
                let what = difference(&schedules[i], &expected[i].logits, &runs[i].logits);
                assert_eq!(what, None, "{}, context {i} beside the other", about.name());
                let s = runs[i].stats.expect("there are slots");
                assert!(s.n_hits > 0 && s.n_misses > 0, "{s:?}");
            }
        }
    }
}

#[test]
fn models_without_eligible_layers_take_the_stock_graph() {
    let llama = llama();
    let unsupported: Vec<_> =
        models::test_set().iter().filter(|m| !m.supported && m.arch != "lora").collect();
    assert!(!unsupported.is_empty());
    for about in unsupported {
        let model = load(&llama, about);
        let schedule = Schedule::mixed(model.n_vocab(), 13, 20);
        let expected = compare::stock(&llama, &model, &schedule).unwrap();
        llama.hot(&Hot { k: 4, ..Hot::default() });
        let run = compare::decode(&mut model.context(schedule.context).unwrap(), &schedule).unwrap();
        assert_eq!(difference(&schedule, &expected.logits, &run.logits), None, "{}", about.name());
        assert_eq!(run.stats, None, "{} has slots", about.name());
    }
}

#[test]
fn adapters_on_attention_and_on_experts() {
    let llama = llama();
    let about = models::named("qwen3moe");
    let model = load(&llama, about);
    let schedule = Schedule::mixed(model.n_vocab(), 14, 40);
    for (name, on_hot_path) in [("lora-attention", true), ("lora-experts", false)] {
        let adapter = model.adapter(&models::named(name).file).unwrap_or_else(|e| panic!("{e}"));
        let decode = || {
            let mut ctx = model.context(schedule.context).unwrap();
            ctx.set_adapters(&[&adapter]);
            let with = compare::decode(&mut ctx, &schedule).unwrap();
            // and the plain model again, in the same context
            ctx.set_adapters(&[]);
            ctx.clear();
            let without = compare::decode(&mut ctx, &schedule).unwrap();
            (with, without)
        };
        llama.off();
        let (with, without) = decode();
        assert!(difference(&schedule, &with.logits, &without.logits).is_some(), "{name} changes nothing");
        llama.hot(&Hot { k: about.ks()[1], ..Hot::default() });
        let (hot_with, hot_without) = decode();
        assert_eq!(difference(&schedule, &with.logits, &hot_with.logits), None, "{name}");
        assert_eq!(difference(&schedule, &without.logits, &hot_without.logits), None, "after {name}");
        let n_tokens = |run: &compare::Run| run.stats.expect("there are slots").n_tokens;
        assert_eq!(n_tokens(&hot_with) > 0, on_hot_path, "{name}: {:?}", hot_with.stats);
        assert!(n_tokens(&hot_without) > n_tokens(&hot_with), "{name}: {:?}", hot_without.stats);
    }
}
