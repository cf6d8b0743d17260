//! Who computes an expert without a slot: the CPU from its memory, or the GPU, which reads the host's copy over
//! the link. Both at once are faster than either, so the cold experts of a layer are divided.
//!
//! DISPATCH divides them by a table: of c cold rows the last `table[c]` go over the link. The table comes from a
//! model of both lanes whose rates are measured while decode runs:
//!
//! - The CPU takes `HAND_OFF + n * bytes * cpu` for n experts. A layer whose JOIN waited tells it exactly; one
//!   whose JOIN did not wait says that it was no longer than what the GPU did meanwhile.
//! - The link takes `base + n * bytes * link`: base is what the GPU does between the two nodes anyway.
//!
//! Rates are by byte, so layers of different experts share what they learn.

/// What the hand-off to the CPU and back costs, in ns (benches/handoff.rs: 7 to 8 us with rows of 8 KiB).
const HAND_OFF_NS: f64 = 7_000.0;
/// Waits of JOIN up to here are the time that it takes to look, in ns.
const LOOK_NS: u32 = 2_000;
/// Weight of a sample: some hundred layers, a few tokens.
const ALPHA: f64 = 1.0 / 128.0;
/// Of a sample that only bounds the CPU's rate from above.
const ALPHA_BOUND: f64 = 1.0 / 1024.0;
/// Tokens between two looks at the tables.
const TOKENS_PER_TABLE: u32 = 16;
/// A link that has become too slow gets nothing, and nothing tells when it is fast again: of so many tables one gives
/// it an expert of a single layer, whose samples weigh so much.
const TABLES_PER_TRIAL: u32 = 16;
const ALPHA_TRIAL: f64 = 1.0 / 4.0;
/// A kernel reads this share of what a copy moves over the link (DESIGN 6: 45 of 54 GB/s).
const KERNEL_SHARE: f64 = 0.83;
/// Reading weights, in bytes a ns: one core, and all that a machine's memory gives in the end.
const CORE_RATE: f64 = 5.0;
const MEMORY_RATE: f64 = 80.0;

/// Bytes a ns that `n_workers` workers read, where it was not measured.
pub fn assumed_rate(n_workers: usize) -> f64 {
    (n_workers as f64 * CORE_RATE).clamp(CORE_RATE, MEMORY_RATE)
}

/// What one layer of a step with one token did.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Sample {
    /// Wired layer.
    pub layer: usize,
    /// Experts that the CPU computed.
    pub on_cpu: u32,
    /// Experts that went over the link.
    pub on_link: u32,
    /// From DISPATCH to JOIN on the GPU, in ns.
    pub span_ns: u32,
    /// JOIN's longest wait for a row, in ns.
    pub wait_ns: u32,
}

/// The division of one context.
#[derive(Debug)]
pub struct Lanes {
    /// Bytes of an expert by layer; 0 where the device cannot read them.
    bytes: Vec<usize>,
    /// Cold rows of a layer at most.
    max_rows: usize,
    /// ns a byte.
    cpu: f64,
    link: f64,
    base_ns: f64,
    tokens: u32,
    /// Whether an expert has gone over the link since the last look, other than for a trial.
    in_use: bool,
    /// Of a layer that tries the link.
    trial: Option<usize>,
    /// Where the next trial is.
    next_trial: usize,
    tables: Vec<u8>,
    version: u64,
}

impl Lanes {
    /// For layers with experts of `bytes` bytes, 0 where the device cannot read them in place; ubatches have up to
    /// `max_rows` rows; workers read `read_rate` bytes a ns, and copies move `copy_rate` bytes a ns over the link.
    pub fn new(bytes: Vec<usize>, max_rows: usize, read_rate: f64, copy_rate: f64) -> Self {
        let tables = vec![0; bytes.len() * (max_rows + 1)];
        let cpu = 1.0 / read_rate;
        let link = 1.0 / (copy_rate * KERNEL_SHARE);
        let mut lanes = Lanes {
            bytes,
            max_rows,
            cpu,
            link,
            base_ns: 20_000.0,
            tokens: 0,
            in_use: true,
            trial: None,
            next_trial: 0,
            tables,
            version: 0,
        };
        lanes.make_tables();
        lanes
    }

    /// Counts changes of the tables.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// By layer: of c cold rows, how many go over the link, c from 0 to `max_rows`.
    pub fn tables(&self) -> &[u8] {
        &self.tables
    }

    /// Takes what a step of one token measured.
    pub fn observe(&mut self, samples: impl Iterator<Item = Sample>) {
        for s in samples {
            let bytes = self.bytes[s.layer] as f64;
            if bytes == 0.0 {
                continue;
            }
            let span = f64::from(s.span_ns);
            if s.on_link == 0 {
                mix(&mut self.base_ns, span, ALPHA);
            } else {
                let is_trial = self.trial == Some(s.layer);
                self.in_use |= !is_trial;
                let alpha = if is_trial { ALPHA_TRIAL } else { ALPHA };
                let rate = (span - self.base_ns) / (f64::from(s.on_link) * bytes);
                mix(&mut self.link, rate.max(0.0), alpha);
            }
            if s.on_cpu > 0 {
                let weights = f64::from(s.on_cpu) * bytes;
                if s.wait_ns > LOOK_NS {
                    let rate = (span + f64::from(s.wait_ns) - HAND_OFF_NS) / weights;
                    mix(&mut self.cpu, rate.max(0.0), ALPHA);
                } else {
                    let most = (span - HAND_OFF_NS) / weights;
                    if most < self.cpu {
                        mix(&mut self.cpu, most.max(0.0), ALPHA_BOUND);
                    }
                }
            }
        }
        self.tokens += 1;
        if self.tokens.is_multiple_of(TOKENS_PER_TABLE) {
            let due = (self.tokens / TOKENS_PER_TABLE).is_multiple_of(TABLES_PER_TRIAL);
            self.trial = if due && !self.in_use { self.choose_trial() } else { None };
            self.in_use = false;
            self.make_tables();
        }
    }

    /// The layers in turn.
    fn choose_trial(&mut self) -> Option<usize> {
        let n = self.bytes.len();
        let layer = (0..n).map(|i| (self.next_trial + i) % n).find(|l| self.bytes[*l] > 0)?;
        self.next_trial = layer + 1;
        Some(layer)
    }

    fn make_tables(&mut self) {
        let mut changed = false;
        for layer in 0..self.bytes.len() {
            for cold in 0..=self.max_rows {
                let trial = usize::from(self.trial == Some(layer)).min(cold);
                let n = self.divide(self.bytes[layer], cold).max(trial) as u8;
                let entry = &mut self.tables[layer * (self.max_rows + 1) + cold];
                changed |= *entry != n;
                *entry = n;
            }
        }
        self.version += u64::from(changed || self.version == 0);
    }

    /// How many of `cold` experts of `bytes` bytes go over the link, so that the slower lane ends first.
    fn divide(&self, bytes: usize, cold: usize) -> usize {
        if bytes == 0 {
            return 0;
        }
        let bytes = bytes as f64;
        let cpu = |n: usize| if n == 0 { 0.0 } else { HAND_OFF_NS + n as f64 * bytes * self.cpu };
        let link = |n: usize| self.base_ns + n as f64 * bytes * self.link;
        let end = |n: usize| cpu(cold - n).max(link(n));
        // of equals the fewest
        (0..=cold.min(u8::MAX.into())).min_by(|a, b| end(*a).total_cmp(&end(*b))).unwrap_or(0)
    }
}

fn mix(value: &mut f64, sample: f64, alpha: f64) {
    *value += alpha * (sample - *value);
}

#[cfg(test)]
mod tests {
    use super::*;

    const BYTES: usize = 3_538_944;

    fn table(l: &Lanes) -> Vec<u8> {
        l.tables()[..9].to_vec()
    }

    #[test]
    fn a_fast_cpu_takes_twice_what_the_link_takes() {
        let l = Lanes::new(vec![BYTES], 8, 80.0, 54.0);
        assert_eq!(table(&l), [0, 0, 0, 1, 1, 2, 2, 2, 3]);
    }

    #[test]
    fn few_cores_leave_most_to_the_link() {
        let l = Lanes::new(vec![BYTES], 8, 10.0, 54.0);
        assert_eq!(table(&l), [0, 1, 2, 3, 4, 4, 5, 6, 7]);
    }

    #[test]
    fn what_the_device_cannot_read_stays_on_the_cpu() {
        let l = Lanes::new(vec![0, BYTES], 8, 20.0, 54.0);
        assert_eq!(table(&l), [0; 9]);
        assert!(l.tables()[9..].iter().any(|n| *n > 0));
    }

    #[test]
    fn tables_follow_what_is_measured() {
        let mut l = Lanes::new(vec![BYTES], 8, 80.0, 54.0);
        let before = l.version();
        // the link takes 400 us an expert instead of 79: somebody else uses it
        for _ in 0..400 {
            let slow = Sample { layer: 0, on_cpu: 5, on_link: 3, span_ns: 1_220_000, wait_ns: 0 };
            l.observe([slow].into_iter());
        }
        assert_eq!(table(&l)[..8], [0; 8]);
        assert!(l.version() > before);
        // and the CPU 300 us: most go to the link again, whose rate is what it was measured last
        for _ in 0..800 {
            let slow = Sample { layer: 0, on_cpu: 4, on_link: 0, span_ns: 20_000, wait_ns: 1_187_000 };
            l.observe([slow].into_iter());
        }
        assert!((3..=5).contains(&table(&l)[8]), "{:?}", table(&l));
    }

    /// What a machine does that moves so many bytes a ns on each lane, with all else as on the GPU machine.
    struct Machine {
        cpu: f64,
        link: f64,
        random: u64,
    }

    impl Machine {
        const LAYERS: usize = 48;
        const BASE_NS: f64 = 20_000.0;

        /// 0 to 1.
        fn draw(&mut self) -> f64 {
            self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (self.random >> 40) as f64 / (1u64 << 24) as f64
        }

        /// Decodes `n` tokens; their time, and that of the CPU alone, in ns.
        fn decode(&mut self, lanes: &mut Lanes, n: usize) -> (f64, f64) {
            let (mut time, mut alone) = (0.0, 0.0);
            for _ in 0..n {
                let mut samples = Vec::new();
                for layer in 0..Self::LAYERS {
                    let cold = (1.0 + 7.0 * self.draw()) as usize;
                    let on_link = usize::from(lanes.tables()[layer * 9 + cold]);
                    let noise = 0.9 + 0.2 * self.draw();
                    let cpu = |n: usize| match n {
                        0 => 0.0,
                        n => HAND_OFF_NS + (n * BYTES) as f64 / self.cpu * noise,
                    };
                    let span = Self::BASE_NS + (on_link * BYTES) as f64 / self.link * noise;
                    let wait = (cpu(cold - on_link) - span).max(0.0);
                    time += span + wait;
                    alone += Self::BASE_NS.max(cpu(cold));
                    samples.push(Sample {
                        layer,
                        on_cpu: (cold - on_link) as u32,
                        on_link: on_link as u32,
                        span_ns: span as u32,
                        wait_ns: wait as u32,
                    });
                }
                lanes.observe(samples.into_iter());
            }
            (time, alone)
        }
    }

    #[test]
    fn a_link_that_others_use_is_left_within_64_tokens_and_found_again() {
        for slower in [1.5, 2.0, 4.0, 8.0, 32.0] {
            let mut m = Machine { cpu: 70.0, link: 45.0, random: 1 };
            let mut lanes = Lanes::new(vec![BYTES; Machine::LAYERS], 8, 70.0, 54.0);
            m.decode(&mut lanes, 200);
            let (idle, alone) = m.decode(&mut lanes, 200);
            assert!(idle < alone * 0.75, "both lanes: {:.2} of the CPU", idle / alone);
            m.link /= slower;
            m.decode(&mut lanes, 64);
            let (busy, alone) = m.decode(&mut lanes, 1000);
            assert!(busy <= alone * 1.02, "{slower}: {:.3} of the CPU alone", busy / alone);
            m.link *= slower;
            m.decode(&mut lanes, 1500);
            let (again, _) = m.decode(&mut lanes, 200);
            assert!(again < idle * 1.02, "{slower}: {:.3} of what it was", again / idle);
        }
    }

    #[test]
    fn a_cpu_that_is_never_waited_for_gets_more() {
        let mut l = Lanes::new(vec![BYTES], 8, 20.0, 54.0);
        let at_first = table(&l)[8];
        for _ in 0..8000 {
            let idle = Sample { layer: 0, on_cpu: 2, on_link: 6, span_ns: 500_000, wait_ns: 0 };
            l.observe([idle].into_iter());
            let idle = Sample { layer: 0, on_cpu: 2, on_link: 0, span_ns: 60_000, wait_ns: 500 };
            l.observe([idle].into_iter());
        }
        assert!(table(&l)[8] < at_first, "{:?}", table(&l));
    }
}
