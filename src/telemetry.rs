//! Counters, how they are shown, and the log of single steps.

use std::{
    fmt::{self, Display, Formatter},
    fs::File,
    io::{self, BufWriter, Write},
    path::Path,
};

use serde::{Serialize, Serializer};

/// Counters over a span of time.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug, Serialize)]
pub struct Stats {
    /// Ubatches on the hot path.
    pub steps: u64,
    /// Their tokens.
    pub tokens: u64,
    /// Routed experts that had a slot.
    pub hits: u64,
    /// Routed experts that had none.
    pub misses: u64,
    /// Of these, those that the device read over the link.
    pub linked: u64,
    /// Experts copied into a slot and published.
    pub uploads: u64,
    /// Bytes of those copies.
    pub upload_bytes: u64,
    /// Experts that lost their slot.
    pub evictions: u64,
    /// Copies that failed.
    pub copy_failures: u64,
    /// Times the policy was asked for a plan.
    pub rebalances: u64,
    /// Time that took on the decode thread, in us.
    #[serde(rename = "rebalance_seconds", serialize_with = "in_seconds")]
    pub rebalance_us: u64,
    /// Time JOIN worked or waited for cold experts, in us.
    #[serde(rename = "join_wait_seconds", serialize_with = "in_seconds")]
    pub join_wait_us: u64,
    /// Time that threads spent computing cold experts, summed over threads, in us.
    #[serde(rename = "worker_busy_seconds", serialize_with = "in_seconds")]
    pub worker_busy_us: u64,
    /// Time of steps, in us; always of all contexts.
    #[serde(rename = "step_seconds", serialize_with = "in_seconds")]
    pub step_us: u64,
}

/// As Prometheus and JSON have times.
pub fn seconds(us: u64) -> f64 {
    us as f64 / 1e6
}

fn in_seconds<S: Serializer>(us: &u64, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_f64(seconds(*us))
}

impl Stats {
    /// Counters since `base` was taken.
    pub fn since(&self, base: &Stats) -> Stats {
        Stats {
            steps: self.steps - base.steps,
            tokens: self.tokens - base.tokens,
            hits: self.hits - base.hits,
            misses: self.misses - base.misses,
            linked: self.linked - base.linked,
            uploads: self.uploads - base.uploads,
            upload_bytes: self.upload_bytes - base.upload_bytes,
            evictions: self.evictions - base.evictions,
            copy_failures: self.copy_failures - base.copy_failures,
            rebalances: self.rebalances - base.rebalances,
            rebalance_us: self.rebalance_us - base.rebalance_us,
            join_wait_us: self.join_wait_us - base.join_wait_us,
            worker_busy_us: self.worker_busy_us - base.worker_busy_us,
            step_us: self.step_us - base.step_us,
        }
    }

    /// Share of routed experts that had a slot; 0 when nothing was routed.
    pub fn hit_rate(&self) -> f64 {
        ratio(self.hits, self.hits + self.misses)
    }

    /// Experts a token that the cold engine computed, over all layers.
    pub fn cold_per_token(&self) -> f64 {
        ratio(self.misses, self.tokens)
    }

    /// Experts a token that were read over the link, over all layers.
    pub fn linked_per_token(&self) -> f64 {
        ratio(self.linked, self.tokens)
    }

    /// Hits that each upload brought; 0 without uploads.
    pub fn hits_per_upload(&self) -> f64 {
        ratio(self.hits, self.uploads)
    }
}

impl Display for Stats {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} tokens, hit rate {:.1}%, {:.1} cold experts a token ({:.1} over the link), {} uploads ({:.1} MiB, {:.1} hits each), \
             {} evictions, {} rebalances in {:.2} ms, join {:.2} ms, cold experts {:.2} ms of thread time",
            self.tokens,
            100.0 * self.hit_rate(),
            self.cold_per_token(),
            self.linked_per_token(),
            self.uploads,
            self.upload_bytes as f64 / f64::from(1 << 20),
            self.hits_per_upload(),
            self.evictions,
            self.rebalances,
            self.rebalance_us as f64 / 1e3,
            self.join_wait_us as f64 / 1e3,
            self.worker_busy_us as f64 / 1e3,
        )
    }
}

/// One step on the hot path.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Step {
    /// From its begin, plan included, to its end, in us.
    pub us: u64,
    /// Tokens of its ubatch.
    pub tokens: u32,
    /// Routed experts that had a slot.
    pub hits: u64,
    /// Routed experts that had none.
    pub misses: u64,
    /// Copies into slots that were under way when it began.
    pub copying: usize,
    /// Time of the plan before it, in us.
    pub rebalance_us: u64,
    /// Time JOIN worked or waited for cold experts, in us.
    pub join_wait_us: u64,
}

/// A file with a line for each step, for benchmarks: `MOE_HOT_STEP_LOG` names it. A context writes its
/// lines when it is freed, and other contexts' lines stay.
pub struct StepLog {
    steps: Vec<Step>,
}

impl StepLog {
    /// A log, if the environment asks for one.
    pub fn new() -> Option<Self> {
        std::env::var_os(Self::VARIABLE).map(|_| StepLog { steps: Vec::new() })
    }

    const VARIABLE: &str = "MOE_HOT_STEP_LOG";

    /// Keeps a step in memory: the disk is no part of what is measured.
    pub fn add(&mut self, step: Step) {
        self.steps.push(step);
    }

    /// Writes what was kept, to the file that the environment names.
    ///
    /// # Errors
    /// As the system says.
    pub fn write(&self) -> io::Result<()> {
        let Some(path) = std::env::var_os(Self::VARIABLE) else { return Ok(()) };
        self.append_to(Path::new(&path))
    }

    fn append_to(&self, path: &Path) -> io::Result<()> {
        let file = File::options().create(true).append(true).open(path)?;
        let is_new = file.metadata()?.len() == 0;
        let mut out = BufWriter::new(file);
        if is_new {
            writeln!(out, "step_us,tokens,hits,misses,copying,rebalance_us,join_wait_us")?;
        }
        for s in &self.steps {
            let Step { us, tokens, hits, misses, copying, rebalance_us, join_wait_us } = s;
            writeln!(out, "{us},{tokens},{hits},{misses},{copying},{rebalance_us},{join_wait_us}")?;
        }
        out.flush()
    }
}

fn ratio(a: u64, b: u64) -> f64 {
    if b == 0 { 0.0 } else { a as f64 / b as f64 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_of_nothing_are_zero() {
        let s = Stats::default();
        assert_eq!((s.hit_rate(), s.cold_per_token(), s.hits_per_upload()), (0.0, 0.0, 0.0));
    }

    #[test]
    fn the_steps_of_several_contexts_go_to_one_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("steps.csv");
        for us in [7, 8] {
            let mut log = StepLog { steps: Vec::new() };
            log.add(Step { us, tokens: 1, misses: 3, ..Step::default() });
            log.append_to(&path).unwrap();
        }
        let text = std::fs::read_to_string(&path).unwrap();
        let expected =
            "step_us,tokens,hits,misses,copying,rebalance_us,join_wait_us\n7,1,0,3,0,0,0\n8,1,0,3,0,0,0\n";
        assert_eq!(text, expected);
    }
}
