//! What the machine itself can do, whatever the program: how fast threads read memory. [`crate::device::cuda`] has
//! the side of the GPU. For `moe-hot probe` and the benchmarks.

use std::{
    hint::black_box,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

/// Distance of prefetches in bytes: without, plain reading is slower than the row kernels.
const AHEAD: usize = 4 << 10;
const LINE: usize = 64;
/// Bytes between two looks at whether the time is over.
const CHUNK: usize = 1 << 20;

/// Bytes a ns that `n` threads read of `data`, each its part from end to end, again and again while `meanwhile` runs;
/// and what that returns.
///
/// # Panics
/// When `n` is 0, or `data` is too small for `n` threads.
pub fn read<T>(data: &[u8], n: usize, meanwhile: impl FnOnce() -> T) -> (f64, T) {
    let part = data.len() / n / LINE * LINE;
    assert!(part > 0, "{} bytes for {n} threads", data.len());
    let stop = AtomicBool::new(false);
    let reader = |part: &[u8]| {
        let start = Instant::now();
        let mut bytes = 0;
        for chunk in part.chunks(CHUNK).cycle() {
            xor(chunk);
            bytes += chunk.len();
            if stop.load(Ordering::Relaxed) {
                break;
            }
        }
        bytes as f64 / start.elapsed().as_nanos() as f64
    };
    std::thread::scope(|s| {
        let threads: Vec<_> = data.chunks_exact(part).take(n).map(|p| s.spawn(|| reader(p))).collect();
        let result = meanwhile();
        stop.store(true, Ordering::Relaxed);
        (threads.into_iter().map(|t| t.join().expect("it reads")).sum(), result)
    })
}

/// As [`read`], for `time`.
pub fn read_for(data: &[u8], n: usize, time: Duration) -> f64 {
    read(data, n, || std::thread::sleep(time)).0
}

fn xor(chunk: &[u8]) {
    let mut sum = [0u64; LINE / 8];
    for line in chunk.chunks_exact(LINE) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: a hint that reads nothing, whatever the address.
        unsafe {
            use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
            _mm_prefetch::<_MM_HINT_T0>(line.as_ptr().wrapping_add(AHEAD).cast());
        }
        for (sum, word) in sum.iter_mut().zip(line.chunks_exact(8)) {
            *sum ^= u64::from_ne_bytes(word.try_into().expect("8 bytes"));
        }
    }
    black_box(sum);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_read_as_long_as_something_else_runs() {
        let data = vec![1; 3 << 20];
        let (rate, result) = read(&data, 2, || {
            std::thread::sleep(Duration::from_millis(5));
            7
        });
        assert_eq!(result, 7);
        // more than a disk and less than any cache
        assert!((0.01..10_000.0).contains(&rate), "{rate}");
    }
}
