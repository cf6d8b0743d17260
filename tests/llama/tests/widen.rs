//! scripts/widen: the wide model computes the function of the small one, whatever the type of its weights.

use std::{cmp::Ordering, path::Path, process::Command};

use llama_tests::{
    ContextOptions, Exclusive, Input, Llama, LoadOptions, Logits,
    compare::Failures,
    paths::{root, shipped_model, tool},
};

const TEXT: &str = include_str!("../../../models/texts/fiction.txt");
/// Tokens of the text, and of the greedy continuation.
const PROMPT: usize = 48;
const GENERATED: usize = 16;
/// Positions of the text where the wide model may have another most likely token: two are as likely there.
const TIES: usize = 3;

/// Factors of width, width of experts and layers.
const SHAPES: [[&str; 3]; 2] = [["2", "2", "1"], ["4", "2", "2"]];
/// Weight types, and by shape the most that the logits of a position may differ in the median over positions, relative
/// to their size; a third to a half of it is usual. Without more layers only sums round otherwise, and with quantised
/// weights that turns activations into their neighbours; the copies of a layer write 2^-8 of what it writes. Wrong
/// weights give around 1.
const WEIGHTS: [(&str, [f64; 2]); 3] =
    [("F16", [0.002, 0.01]), ("Q8_0", [0.03, 0.04]), ("Q4_0", [0.03, 0.04])];

struct Run {
    logits: Vec<Logits>,
    tokens: Vec<i32>,
}

fn program(command: &mut Command) -> Result<(), String> {
    let out = command.output().map_err(|e| format!("{command:?}: {e}"))?;
    let said = String::from_utf8_lossy(&out.stderr);
    if out.status.success() { Ok(()) } else { Err(format!("{command:?}: {}: {said}", out.status)) }
}

/// The text, then what the model writes after it.
fn run(llama: &Exclusive, path: &Path) -> Result<Run, String> {
    let model = llama.load(path, LoadOptions::default())?;
    let text = model.tokens(&TEXT[..PROMPT * 8]);
    let mut ctx = model.context(ContextOptions::default())?;
    let mut r = Run { logits: Vec::new(), tokens: Vec::new() };
    let input = |token, pos: usize| [Input { token, pos: pos as i32, seq: 0, output: true }];
    for (pos, token) in text.into_iter().take(PROMPT).enumerate() {
        r.logits.push(ctx.decode(&input(token, pos))?);
    }
    for pos in PROMPT..PROMPT + GENERATED {
        let token = r.logits[pos - 1].argmax(0);
        r.tokens.push(token);
        r.logits.push(ctx.decode(&input(token, pos))?);
    }
    Ok(r)
}

/// Relative errors of the logits over the text, sorted.
fn errors(small: &Run, wide: &Run) -> Vec<f64> {
    let error = |(s, w): (&Logits, &Logits)| {
        let (s, w) = (s.row(0), w.row(0));
        let squares = |f: &dyn Fn(f64, f64) -> f64| -> f64 {
            s.iter().zip(w).map(|(s, w)| f((*s).into(), (*w).into()).powi(2)).sum()
        };
        (squares(&|s, w| s - w) / squares(&|s, _| s)).sqrt()
    };
    let mut errors: Vec<f64> = small.logits.iter().zip(&wide.logits).take(PROMPT).map(error).collect();
    errors.sort_by(f64::total_cmp);
    errors
}

fn check(llama: &Exclusive, dir: &Path, weights: &str, most: [f64; 2]) -> Result<(), String> {
    let small = dir.join(format!("{weights}.gguf"));
    let mut quantise = Command::new(tool("llama-quantize"));
    program(quantise.arg("--allow-requantize").args([&shipped_model(), &small]).arg(weights))?;
    let expected = run(llama, &small)?;
    for ([r, s, t], most) in SHAPES.into_iter().zip(most) {
        let wide = dir.join("wide.gguf");
        program(
            Command::new(root().join("scripts/widen"))
                .args([&small, &wide])
                .args(["-r", r, "-s", s, "-t", t]),
        )?;
        let got = run(llama, &wide)?;
        let what = format!("{weights}, -r {r} -s {s} -t {t}");
        let errors = errors(&expected, &got);
        let median = errors[errors.len() / 2];
        let others =
            (0..PROMPT).filter(|i| expected.logits[*i].argmax(0) != got.logits[*i].argmax(0)).count();
        eprintln!("{what}: median error {median:.6}, {others} other tokens of {PROMPT}");
        // a NaN is no error that passes
        if !matches!(median.partial_cmp(&most), Some(Ordering::Less)) {
            return Err(format!(
                "{what}: the logits differ by {median:.5} in the median, expected is at most {most}"
            ));
        }
        if others > TIES {
            return Err(format!(
                "{what}: other tokens at {others} of {PROMPT} positions, expected are at most {TIES}"
            ));
        }
        if expected.tokens != got.tokens {
            return Err(format!("{what}: writes {:?}, expected {:?}", got.tokens, expected.tokens));
        }
    }
    Ok(())
}

#[test]
fn a_wide_model_computes_the_function_of_the_small_one() {
    let llama = Llama::get().exclusive();
    let dir = tempfile::tempdir().expect("a temporary folder");
    let mut failures = Failures::default();
    for (weights, most) in WEIGHTS {
        failures.check(check(&llama, dir.path(), weights, most));
    }
    failures.done();
}
