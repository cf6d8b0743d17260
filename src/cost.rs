//! What a decode step costs on a machine: a line through four counts, so that a replay can say tokens a
//! second. The constants are measured (`moe-hot probe -m`) and kept in a file with the model they are for.
//!
//! For steps of one token: a step of many tokens has more to compute for each expert than to read.

use std::{fs, io, path::Path};

use serde::{Deserialize, Serialize};

use crate::replay::Outcome;

/// What one thing of each kind adds to the time of a decode step, in us.
#[derive(Clone, Copy, PartialEq, Debug, Serialize, Deserialize)]
pub struct Cost {
    /// The step itself, with every expert hot.
    pub step_us: f64,
    /// An expert that has no slot.
    pub cold_us: f64,
    /// A layer with at least one such expert: the hand-over to the CPU and back.
    pub layer_us: f64,
    /// An expert copied into a slot.
    pub upload_us: f64,
}

/// The names of the constants, in the order of [`counts`].
pub const NAMES: [&str; 4] = ["step_us", "cold_us", "layer_us", "upload_us"];

/// What the constants are multiplied with.
pub fn counts(o: &Outcome) -> [f64; 4] {
    [o.steps, o.cold, o.cold_layers, o.uploads].map(|n| n as f64)
}

impl From<[f64; 4]> for Cost {
    fn from([step_us, cold_us, layer_us, upload_us]: [f64; 4]) -> Self {
        Cost { step_us, cold_us, layer_us, upload_us }
    }
}

impl Cost {
    /// The constants in the order of [`NAMES`].
    pub fn constants(&self) -> [f64; 4] {
        [self.step_us, self.cold_us, self.layer_us, self.upload_us]
    }

    /// The time of what was counted, in us.
    pub fn us(&self, o: &Outcome) -> f64 {
        self.constants().iter().zip(counts(o)).map(|(us, n)| us * n).sum()
    }

    /// Tokens a second.
    pub fn tokens_per_s(&self, o: &Outcome) -> f64 {
        o.tokens as f64 * 1e6 / self.us(o)
    }

    /// Are these times?
    ///
    /// # Errors
    /// The name and the value of one that is not finite, is negative, or of a step that takes no time.
    pub fn check(&self) -> Result<(), String> {
        for (name, us) in NAMES.iter().zip(self.constants()) {
            if !us.is_finite() || us < 0.0 {
                return Err(format!("{name}: {us} is not allowed, expected a finite number of at least 0"));
            }
        }
        if self.step_us == 0.0 {
            return Err("step_us: 0 is not allowed, a step takes time even when every expert is hot".into());
        }
        Ok(())
    }
}

/// A measured configuration and what the fitted constants say about it.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Run {
    /// Slots a layer.
    pub k: u32,
    /// Tokens between two plans.
    pub interval: u32,
    /// The policy's name.
    pub policy: String,
    /// Tokens a second of each repetition.
    pub tokens_per_s: Vec<f64>,
    /// Tokens a second by the constants.
    pub fitted_tokens_per_s: f64,
}

/// The constants with their origin, as they lie in a file (JSON).
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct CostFile {
    /// Of the model, as in its traces: 16 hex digits.
    #[serde(with = "hex")]
    pub fingerprint: u64,
    /// When it was measured: RFC 3339, UTC.
    pub date: String,
    /// The commands that were run for it.
    pub commands: Vec<String>,
    /// The constants.
    pub cost: Cost,
    /// What they were fitted to.
    pub runs: Vec<Run>,
}

impl CostFile {
    /// Reads a file and checks it.
    ///
    /// # Errors
    /// The path and why it cannot be used.
    pub fn read(path: &Path) -> Result<Self, String> {
        let named = |e: String| format!("{}: {e}", path.display());
        let text = fs::read_to_string(path).map_err(|e| named(e.to_string()))?;
        let file: CostFile =
            serde_json::from_str(&text).map_err(|e| named(format!("not a file of costs: {e}")))?;
        file.cost.check().map_err(named)?;
        Ok(file)
    }

    /// Writes the file.
    ///
    /// # Errors
    /// The path and what the system says.
    pub fn write(&self, path: &Path) -> Result<(), String> {
        let text = serde_json::to_string_pretty(self).map_err(io::Error::from);
        let written = text.and_then(|text| fs::write(path, text + "\n"));
        written.map_err(|e| format!("{}: {e}", path.display()))
    }

    /// Is it for the model with this fingerprint?
    ///
    /// # Errors
    /// Both fingerprints.
    pub fn check_model(&self, fingerprint: u64) -> Result<(), String> {
        if self.fingerprint == fingerprint {
            return Ok(());
        }
        let (own, other) = (self.fingerprint, fingerprint);
        Err(format!("measured with model {own:016x}, the trace is of model {other:016x}"))
    }
}

/// As text: JSON's readers take numbers for f64, which 64 bits do not fit.
mod hex {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<S: Serializer>(v: &u64, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&format!("{v:016x}"))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<u64, D::Error> {
        let text = String::deserialize(d)?;
        u64::from_str_radix(&text, 16)
            .map_err(|_| D::Error::custom(format!("fingerprint: '{text}' is not 16 hex digits")))
    }
}

/// Non-negative least squares: the x >= 0 with the least sum of (`rows[i]` . x - `values[i]`)^2. Few
/// unknowns, so every choice of those above 0 is solved and the best that is allowed taken; the first is
/// in all of them. An unknown that the rows do not tell from others is 0.
pub fn nnls<const N: usize>(rows: &[[f64; N]], values: &[f64]) -> [f64; N] {
    // columns of length 1, so that one bound says which choices the rows leave open
    let mut lengths = [0.0; N];
    for (j, length) in lengths.iter_mut().enumerate() {
        *length = rows.iter().map(|r| r[j] * r[j]).sum::<f64>().sqrt();
    }
    let scaled = |r: &[f64; N], j: usize| r[j] / lengths[j];
    let mut best = [0.0; N];
    let mut least = f64::INFINITY;
    for choice in (1..1u32 << N).step_by(2) {
        let of: Vec<usize> = (0..N).filter(|j| choice >> j & 1 == 1).collect();
        if of.iter().any(|j| lengths[*j] == 0.0) {
            continue;
        }
        let normal: Vec<Vec<f64>> = of
            .iter()
            .map(|&i| {
                let column = of.iter().map(|&j| rows.iter().map(|r| scaled(r, i) * scaled(r, j)).sum());
                column.chain([rows.iter().zip(values).map(|(r, v)| scaled(r, i) * v).sum()]).collect()
            })
            .collect();
        let Some(solved) = solve(normal).filter(|s| s.iter().all(|x| *x >= 0.0)) else { continue };
        let mut x = [0.0; N];
        of.iter().zip(solved).for_each(|(&j, s)| x[j] = s / lengths[j]);
        let dot = |r: &[f64; N]| r.iter().zip(&x).map(|(a, b)| a * b).sum::<f64>();
        let error: f64 = rows.iter().zip(values).map(|(r, v)| (dot(r) - v).powi(2)).sum();
        if error < least {
            (best, least) = (x, error);
        }
    }
    best
}

/// Solves a symmetric system, right side in the last column, by elimination; none when it is singular.
fn solve(mut m: Vec<Vec<f64>>) -> Option<Vec<f64>> {
    let n = m.len();
    for i in 0..n {
        // what is left of a column of length 1 that the others do not explain
        if m[i][i] < 1e-10 {
            return None;
        }
        let row = m[i].clone();
        for below in &mut m[i + 1..] {
            let f = below[i] / row[i];
            below.iter_mut().zip(&row).for_each(|(b, r)| *b -= f * r);
        }
    }
    let mut x = vec![0.0; n];
    for i in (0..n).rev() {
        let known: f64 = (i + 1..n).map(|j| m[i][j] * x[j]).sum();
        x[i] = (m[i][n] - known) / m[i][i];
    }
    Some(x)
}

/// Constants for runs, each what it counted and its time in us, with the least sum of squared relative
/// errors. A step always takes time: nearly all layers have a cold expert in nearly all steps, so that noise can make
/// a layer's hand-over seem to be all that there is.
///
/// # Errors
/// As [`Cost::check`]: the runs do not tell what a step costs.
pub fn fit(runs: &[(Outcome, f64)]) -> Result<Cost, String> {
    let rows: Vec<[f64; 4]> = runs.iter().map(|(o, us)| counts(o).map(|n| n / us)).collect();
    let cost = Cost::from(nnls(&rows, &vec![1.0; runs.len()]));
    cost.check()?;
    Ok(cost)
}

#[cfg(test)]
mod tests {
    use super::*;

    const COST: Cost = Cost { step_us: 1000.0, cold_us: 20.0, layer_us: 50.0, upload_us: 400.0 };

    fn outcome(cold: u64, cold_layers: u64, uploads: u64) -> Outcome {
        Outcome { steps: 10, tokens: 10, cold, cold_layers, uploads, ..Outcome::default() }
    }

    fn file() -> CostFile {
        CostFile {
            fingerprint: u64::MAX - 1,
            date: "2026-01-01T00:00:00Z".into(),
            commands: vec!["llama-bench".into()],
            cost: COST,
            runs: vec![],
        }
    }

    #[test]
    fn a_step_costs_the_sum_of_its_parts() {
        let o = outcome(30, 8, 2);
        assert_eq!(COST.us(&o), 10.0 * 1000.0 + 30.0 * 20.0 + 8.0 * 50.0 + 2.0 * 400.0);
        assert_eq!(COST.tokens_per_s(&o), 10.0 * 1e6 / 11_800.0);
    }

    #[test]
    fn a_fit_gives_back_what_the_times_were_made_from() {
        let runs: Vec<_> = [(900, 90, 10), (500, 80, 40), (300, 75, 5), (100, 40, 60), (20, 11, 2)]
            .map(|(c, l, u)| outcome(c, l, u))
            .map(|o| (o, COST.us(&o)))
            .to_vec();
        let got = fit(&runs).unwrap();
        for (got, made) in got.constants().iter().zip(COST.constants()) {
            assert!((got - made).abs() < 1e-6 * made, "{got} for {made}");
        }
    }

    #[test]
    fn what_would_be_negative_is_zero_and_the_others_are_fitted_without_it() {
        // v = 10 - b, while b >= 0 has to hold: the mean is the best
        let x = nnls(&[[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]], &[10.0, 9.0, 8.0]);
        assert!((x[0] - 9.0).abs() < 1e-9 && x[1] == 0.0, "{x:?}");
        let x = nnls(&[[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]], &[1.0, 3.0, 5.0]);
        assert!((x[0] - 1.0).abs() < 1e-9 && (x[1] - 2.0).abs() < 1e-9, "{x:?}");
    }

    #[test]
    fn what_the_runs_do_not_tell_is_zero() {
        // no uploads, and each cold expert in a layer of its own
        let runs = [(10, 10, 0), (20, 20, 0), (40, 40, 0)].map(|(c, l, u)| outcome(c, l, u));
        let cost = fit(&runs.map(|o| (o, COST.us(&o)))).unwrap();
        assert!((cost.step_us - 1000.0).abs() < 1e-6, "{cost:?}");
        assert!((cost.cold_us + cost.layer_us - 70.0).abs() < 1e-6 && cost.upload_us == 0.0, "{cost:?}");
        assert!(fit(&[]).unwrap_err().starts_with("step_us: 0 is not allowed"));
    }

    #[test]
    fn noise_does_not_take_the_time_of_a_step_for_that_of_its_layers() {
        // decay, lru and static at 8, 16 and 32 slots of 64 on an H200: cold experts and layers a token, uploads, tok/s
        let runs = [
            (274.60, 47.95, 1418, 83.44),
            (325.96, 47.96, 12078, 72.78),
            (274.62, 47.92, 1647, 87.79),
            (209.24, 47.61, 2099, 94.33),
            (256.07, 47.89, 12077, 79.56),
            (210.15, 47.49, 2414, 96.12),
            (121.44, 42.75, 3043, 119.74),
            (158.01, 44.64, 12096, 100.58),
            (121.29, 43.04, 2943, 126.13),
        ];
        let (steps, count) = (256, |per_token: f64| (per_token * 256.0).round() as u64);
        let runs = runs.map(|(cold, layers, uploads, speed)| {
            let (cold, cold_layers) = (count(cold), count(layers));
            (
                Outcome { steps, tokens: steps, cold, cold_layers, uploads, ..Outcome::default() },
                256e6 / speed,
            )
        });
        let cost = fit(&runs).unwrap();
        assert!((4000.0..6000.0).contains(&cost.step_us) && cost.cold_us > 20.0, "{cost:?}");
        for (o, us) in &runs {
            assert!((cost.us(o) / us - 1.0).abs() < 0.06, "{us} us, fitted {}", cost.us(o));
        }
    }

    #[test]
    fn a_file_is_read_as_it_was_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cost.json");
        file().write(&path).unwrap();
        let read = CostFile::read(&path).unwrap();
        assert_eq!(read, file());
        assert_eq!(read.check_model(u64::MAX - 1), Ok(()));
        assert_eq!(
            read.check_model(7).unwrap_err(),
            "measured with model fffffffffffffffe, the trace is of model 0000000000000007"
        );
    }

    #[test]
    fn bad_files_are_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cost.json");
        let error = |text: &str| {
            fs::write(&path, text).unwrap();
            let e = CostFile::read(&path).unwrap_err();
            e.strip_prefix(&format!("{}: ", path.display())).expect("the file is named").to_string()
        };
        let text = serde_json::to_string(&file()).unwrap();
        assert_eq!(
            error(&text.replace("20.0", "-20.0")),
            "cold_us: -20 is not allowed, expected a finite number of at least 0"
        );
        assert!(error(&text.replace("1000.0", "0")).starts_with("step_us: 0 is not allowed"));
        assert!(error(&text.replace("20.0", "1e999")).contains("out of range"));
        assert!(error(&text.replace("cold_us", "warm_us")).contains("missing field `cold_us`"));
        assert!(error(&text.replace("fffe\"", "fffg\"")).contains("is not 16 hex digits"));
        assert!(error("").starts_with("not a file of costs: "));
        assert_eq!(
            CostFile::read(Path::new("/nonexistent/c.json")).unwrap_err(),
            "/nonexistent/c.json: No such file or directory (os error 2)"
        );
        assert!(Cost { step_us: f64::NAN, ..COST }.check().is_err());
    }
}
