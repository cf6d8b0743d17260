//! Measures how fast this machine reads experts, to choose the number of workers and the distance of prefetches.
//!
//! Neither can be told from the outside: two threads of a core may read more than one or less, a shared machine has
//! fewer cores than it shows, and the best distance depends on memory and kernel. A few milliseconds of the real
//! kernels on the real weights tell.

use std::{
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use super::{
    kernel::{Layer, Line, Matrix, Target},
    placement::{Placement, run_on},
};

/// Bytes that a thread reads in one place, as a unit of the engine does.
const UNIT_BYTES: usize = 32 << 10;
/// Time of one measurement, and how often each is made; the best counts, because noise only slows down.
const TIME: Duration = Duration::from_millis(5);
const ROUNDS: usize = 3;
/// Weights that caches could hold tell nothing.
const MIN_BYTES: usize = 256 << 20;
/// Distances of a prefetch, in bytes; 0: none.
const DISTANCES: [usize; 6] = [0, 1 << 10, 2 << 10, 3 << 10, 4 << 10, 6 << 10];
/// Of counts that differ by less than this share the smallest is taken: threads that do not help cost power, and
/// others their time.
const EQUAL: f64 = 0.03;

/// What was measured, and chosen.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Reading {
    /// Workers.
    pub n_workers: usize,
    /// Bytes that prefetches are ahead.
    pub ahead: usize,
    /// Bytes a ns that these workers read.
    pub rate: f64,
}

/// Measures on the weights of `layers`, for at most `n_workers` workers; with `fixed` for exactly so many. `None`
/// when there are too few weights to tell.
pub fn read(
    layers: &[Layer],
    placement: Option<&Placement>,
    n_workers: usize,
    fixed: bool,
) -> Option<Reading> {
    let bytes: usize = layers.iter().map(|l| l.n_expert * l.expert_bytes()).sum();
    if bytes < MIN_BYTES || n_workers == 0 {
        return None;
    }
    let matrices: Vec<(&Matrix, usize)> =
        layers.iter().flat_map(|l| l.matrices().map(move |m| (m, l.n_expert))).collect();
    let rate = |n: usize, ahead: usize| measure(&matrices, placement, n, ahead);
    let (ahead, mut best) = fastest(&DISTANCES, |ahead| rate(n_workers, ahead));
    let mut n = n_workers;
    if !fixed {
        let counts = counts(n_workers, placement.map_or(n_workers, Placement::n_cores));
        let rates = rates(&counts, |n| rate(n, ahead));
        (n, best) = smallest_of_the_best(&counts, &rates);
    }
    Some(Reading { n_workers: n, ahead, rate: best })
}

/// Numbers of workers that are worth a try, with the largest last.
fn counts(most: usize, cores: usize) -> Vec<usize> {
    let mut counts = vec![most * 3 / 4, cores.saturating_sub(1), cores, most * 7 / 8, most];
    counts.retain(|n| (most.div_ceil(2)..=most).contains(n));
    counts.sort_unstable();
    counts.dedup();
    counts
}

/// The best of a few rounds for each, interleaved.
fn rates(values: &[usize], measure: impl Fn(usize) -> f64) -> Vec<f64> {
    let mut best = vec![0.0f64; values.len()];
    for _ in 0..ROUNDS {
        for (best, value) in best.iter_mut().zip(values) {
            *best = best.max(measure(*value));
        }
    }
    best
}

fn fastest(values: &[usize], measure: impl Fn(usize) -> f64) -> (usize, f64) {
    let rates = rates(values, measure);
    let best = (0..values.len()).max_by(|a, b| rates[*a].total_cmp(&rates[*b])).expect("there are values");
    (values[best], rates[best])
}

fn smallest_of_the_best(counts: &[usize], rates: &[f64]) -> (usize, f64) {
    let best = rates.iter().copied().fold(0.0, f64::max);
    let i = rates.iter().position(|r| *r >= best * (1.0 - EQUAL)).expect("the best is one of them");
    (counts[i], rates[i])
}

/// Bytes a ns that `n` threads read of rows in places that follow no order.
fn measure(matrices: &[(&Matrix, usize)], placement: Option<&Placement>, n: usize, ahead: usize) -> f64 {
    let (ready, stop) = (AtomicUsize::new(0), AtomicBool::new(false));
    let longest = matrices.iter().map(|(m, _)| m.converted_bytes()).max().unwrap_or(0);
    let reader = |thread: usize| {
        if let Some(cpus) = placement.and_then(|p| p.workers(n)) {
            run_on(cpus);
        }
        // zeroes are as much work as anything else
        let act = vec![Line::default(); longest.div_ceil(size_of::<Line>())];
        let mut out: Vec<f32> = Vec::new();
        let mut random = 0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(thread as u64 + 1);
        let mut bytes = 0;
        ready.fetch_add(1, Ordering::Relaxed);
        while ready.load(Ordering::Relaxed) < n {
            std::hint::spin_loop();
        }
        let start = Instant::now();
        while !stop.load(Ordering::Relaxed) {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let draw = (random >> 33) as usize;
            let (m, n_expert) = matrices[draw % matrices.len()];
            let rows = UNIT_BYTES.div_ceil(m.row_bytes).min(m.n_out);
            let unit = draw / matrices.len() % (n_expert * (m.n_out / rows));
            let (expert, first) = (unit % n_expert, unit / n_expert * rows);
            out.resize(rows, 0.0);
            let target = Target { act: act.as_ptr().cast(), out: out.as_mut_ptr() };
            let m = Matrix { ahead, ..*m };
            // SAFETY: expert and rows are in range; zeroes are an activation in every format.
            unsafe { m.multiply(expert, first, first + rows, &[target]) };
            bytes += rows * m.row_bytes;
        }
        // by its own clock, since nobody knows when the others run
        bytes as f64 / start.elapsed().as_nanos() as f64
    };
    std::thread::scope(|s| {
        let threads: Vec<_> = (0..n).map(|i| s.spawn(move || reader(i))).collect();
        while ready.load(Ordering::Relaxed) < n {
            std::thread::yield_now();
        }
        std::thread::sleep(TIME);
        stop.store(true, Ordering::Relaxed);
        threads.into_iter().map(|t| t.join().unwrap_or(0.0)).sum()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_that_are_tried_end_with_all() {
        assert_eq!(counts(15, 8), [8, 11, 13, 15]);
        assert_eq!(counts(15, 16), [11, 13, 15]);
        assert_eq!(counts(1, 2), [1]);
        assert_eq!(counts(2, 2), [1, 2]);
        assert_eq!(counts(31, 32), [23, 27, 31]);
    }

    #[test]
    fn the_smallest_count_that_reads_as_fast_is_taken() {
        assert_eq!(smallest_of_the_best(&[8, 12, 16], &[70.0, 99.0, 100.0]), (12, 99.0));
        assert_eq!(smallest_of_the_best(&[8, 12, 16], &[100.0, 60.0, 50.0]), (8, 100.0));
        assert_eq!(smallest_of_the_best(&[8, 12, 16], &[50.0, 80.0, 100.0]), (16, 100.0));
    }
}
