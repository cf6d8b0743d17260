//! Decode starts warm: after a prompt by what the prompt routed, after an earlier run by its profile.

use llama_tests::{Context, ContextOptions, Exclusive, Hot, Input, Llama, LoadOptions, Model, paths};

const K: u32 = 16;
const PROMPT: usize = 512;
/// Tokens decoded after it.
const DECODED: usize = 384;
/// Of these the start, which is compared with the last half.
const START: usize = 16;
const SHARE: f64 = 0.9;

fn text(model: &Model<'_>) -> Vec<i32> {
    let text = std::fs::read_to_string(paths::root().join("models/texts/fiction.txt")).expect("is shipped");
    let tokens = model.tokens(&text.chars().take(6 * (PROMPT + DECODED)).collect::<String>());
    assert!(tokens.len() >= PROMPT + DECODED, "the text is too short: {} tokens", tokens.len());
    tokens
}

fn inputs(tokens: &[i32], first: usize) -> Vec<Input> {
    let input = |(i, &token): (usize, &i32)| Input { token, pos: (first + i) as i32, seq: 0, output: true };
    tokens.iter().enumerate().map(input).collect()
}

/// Feeds tokens one at a time; the hit rate of each.
fn decode(ctx: &mut Context<'_>, tokens: &[i32], first: usize) -> Vec<f64> {
    let mut before = ctx.stats().expect("there are slots");
    let mut rates = Vec::new();
    for (i, token) in tokens.iter().enumerate() {
        ctx.decode(&inputs(&[*token], first + i)).unwrap();
        // copies take as long as on a machine with nothing else to do
        std::thread::sleep(std::time::Duration::from_millis(2));
        let now = ctx.stats().expect("there are slots");
        let (hits, misses) = (now.n_hits - before.n_hits, now.n_misses - before.n_misses);
        assert!(hits + misses > 0, "the step did not use the slots");
        rates.push(hits as f64 / (hits + misses) as f64);
        before = now;
    }
    rates
}

fn mean(rates: &[f64]) -> f64 {
    rates.iter().sum::<f64>() / rates.len() as f64
}

fn context<'a>(model: &'a Model<'a>) -> Context<'a> {
    model.context(ContextOptions::default()).unwrap()
}

fn load<'a>(llama: &'a Exclusive, policy: &'static str) -> Model<'a> {
    llama.hot(&Hot { k: K, interval: 4, policy, ..Hot::default() });
    llama.load(&paths::shipped_model(), LoadOptions::default()).unwrap()
}

#[test]
fn a_prompt_tells_what_decode_will_use() {
    let llama = Llama::get().exclusive();
    for policy in ["decay", "predict"] {
        let model = load(&llama, policy);
        let mut ctx = context(&model);
        let tokens = text(&model);
        ctx.decode(&inputs(&tokens[..PROMPT], 0)).unwrap();
        let stats = ctx.stats().expect("there are slots");
        assert_eq!((stats.n_hits, stats.n_misses), (0, 0), "the prompt takes the stock graph");

        let rates = decode(&mut ctx, &tokens[PROMPT..PROMPT + DECODED], PROMPT);
        // the first two find empty slots: a plan is made beside one and its copies run beside the next
        let (reached, steady) = (mean(&rates[START / 2..START]), mean(&rates[DECODED / 2..]));
        println!("{policy}: hit rate {reached:.3} by token {START}, {steady:.3} later");
        assert!(reached >= SHARE * steady, "{policy}: {reached:.3} by token {START}, {steady:.3} later");
    }
}

#[test]
fn a_profile_makes_the_first_token_warm() {
    let llama = Llama::get().exclusive();
    let dir = tempfile::tempdir().unwrap();
    let profile = dir.path().join("profile.json");
    let path = profile.to_str().unwrap();

    llama.set("moe-hot-profile-out", Some(path)).unwrap();
    let model = load(&llama, "decay");
    let tokens = text(&model);
    let mut ctx = context(&model);
    let cold = decode(&mut ctx, &tokens[..PROMPT], 0);
    assert_eq!(cold[0], 0.0, "without a profile the slots are empty");
    drop(ctx);
    drop(model);
    assert!(profile.is_file(), "is written when the model is freed");
    llama.set("moe-hot-profile-out", None).unwrap();

    llama.set("moe-hot-profile", Some(path)).unwrap();
    let model = load(&llama, "decay");
    let mut ctx = context(&model);
    let rates = decode(&mut ctx, &tokens[PROMPT..PROMPT + DECODED], 0);
    llama.set("moe-hot-profile", None).unwrap();
    let (start, steady) = (mean(&rates[..START]), mean(&rates[DECODED / 2..]));
    println!(
        "hit rate {:.3} at the first token, {start:.3} in the first {START}, {steady:.3} later",
        rates[0]
    );
    assert!(
        rates[0] >= SHARE * steady && start >= SHARE * steady,
        "{start:.3} at the start, {steady:.3} later"
    );
}

#[test]
fn a_profile_that_is_none_is_refused_and_kept() {
    let llama = Llama::get().exclusive();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("notes.txt");
    std::fs::write(&file, "not a profile").unwrap();
    for option in ["moe-hot-profile", "moe-hot-profile-out"] {
        llama.set(option, Some(file.to_str().unwrap())).unwrap();
    }
    llama.take_log();
    let model = load(&llama, "decay");
    let mut ctx = context(&model);
    let tokens = text(&model);
    decode(&mut ctx, &tokens[..START], 0);
    drop(ctx);
    drop(model);
    for option in ["moe-hot-profile", "moe-hot-profile-out"] {
        llama.set(option, None).unwrap();
    }
    let log: String = llama.take_log().iter().map(|l| l.text.as_str()).collect();
    for option in ["--moe-hot-profile ", "--moe-hot-profile-out "] {
        let named = format!("{option}{}", file.display());
        assert!(log.contains(&named), "nothing about {named}:\n{log}");
    }
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "not a profile");
}
