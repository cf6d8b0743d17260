//! Independent jobs on all CPUs.

use std::{
    num::NonZero,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

/// `job(0)` to `job(n - 1)`, each on the next free thread; the results in their order.
pub fn map<T: Send>(n: usize, job: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let n_threads = thread::available_parallelism().map_or(1, NonZero::get).min(n);
    let next = AtomicUsize::new(0);
    let worker = || {
        let at = || Some(next.fetch_add(1, Ordering::Relaxed)).filter(|i| *i < n);
        std::iter::from_fn(at).map(|i| (i, job(i))).collect::<Vec<_>>()
    };
    let mut done: Vec<(usize, T)> = thread::scope(|s| {
        let threads: Vec<_> = (0..n_threads).map(|_| s.spawn(worker)).collect();
        let joined = threads.into_iter().map(|t| t.join().unwrap_or_else(|p| std::panic::resume_unwind(p)));
        joined.flatten().collect()
    });
    done.sort_unstable_by_key(|d| d.0);
    done.into_iter().map(|d| d.1).collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn every_job_runs_once_and_in_order() {
        assert_eq!(super::map(1000, |i| i * i), (0..1000).map(|i| i * i).collect::<Vec<_>>());
        assert!(super::map(0, |i| i).is_empty());
    }
}
