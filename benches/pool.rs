//! What the pool reads, against what the memory gives: 4 cold experts of a layer after another, out of more memory
//! than caches hold, by workers on all cores but one and the thread that asks, as ggml's dot products and our row
//! kernels do it, by weight type. ggml is that of a build (MOE_HOT_BUILD_DIR).
//!
//! Prints `name<TAB>value<TAB>unit`, medians over interleaved rounds. `read` is reading of the same memory by all cores,
//! without any arithmetic. With `--quick` a single round over little memory, which measures nothing.

#[path = "../tests/ggml/mod.rs"]
mod ggml;

use std::{
    ffi::c_int,
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use ggml::Ggml;
use moe_hot::{
    cold::{Activation, ColdRow, Engine, Layer, WorkerPool, placement::Placement, probe, rows::Numerics},
    measure,
};

const N_EMBD: usize = 2048;
const N_FF: usize = 1024;
const N_EXPERT: usize = 64;
const N_COLD: usize = 4;
const BOUND: Duration = Duration::from_secs(5);
const READING: Duration = Duration::from_millis(100);

const TYPES: [(i32, &str); 8] = [
    (2, "q4_0"),
    (12, "q4_K"),
    (13, "q5_K"),
    (14, "q6_K"),
    (8, "q8_0"),
    (20, "iq4_nl"),
    (23, "iq4_xs"),
    (39, "mxfp4"),
];

unsafe extern "C" fn product(n: c_int, y: *mut f32, x: *const f32, g: *const f32) {
    for i in 0..n as usize {
        // SAFETY: the engine passes n elements each.
        unsafe { *y.add(i) = *x.add(i) * *g.add(i) };
    }
}

/// Layers over `data`, as many as fit.
fn layers(ggml: &Ggml, ty: i32, data: &[u8], ours: bool) -> Vec<Layer> {
    let bytes = N_EXPERT * N_FF * ggml.row_bytes(ty, N_EMBD);
    let layer = |chunk: &[u8]| {
        let matrix = |part: usize, n_in, n_out| ggml.matrix(chunk[part * bytes..].as_ptr(), ty, n_in, n_out);
        let mut layer = Layer {
            il: 0,
            n_expert: N_EXPERT,
            n_used: N_COLD,
            gate: Some(matrix(0, N_EMBD, N_FF)),
            up: matrix(1, N_EMBD, N_FF),
            down: matrix(2, N_FF, N_EMBD),
            merged: false,
            activation: Activation::Gated(product),
        };
        if ours {
            layer.matrices_mut().for_each(|m| m.use_row_kernel(Numerics::Cuda));
        }
        layer
    };
    data.chunks_exact(3 * bytes).map(layer).collect()
}

/// Bytes a ns over `requests` requests, which go through all layers in turn.
fn pool(layers: Vec<Layer>, n_workers: usize, cpus: Option<&[usize]>, requests: usize) -> f64 {
    let layers: Arc<[Layer]> = layers.into();
    let engine = Arc::new(Engine::new(layers.clone(), 1, None));
    let workers = WorkerPool::new(n_workers, cpus).expect("threads");
    workers.attach(engine.clone());
    workers.step_begin();
    let act: Vec<f32> = (0..N_EMBD).map(|i| ((i * 37) % 101) as f32 / 50.0 - 1.0).collect();
    let request = |i: usize| {
        let expert = |k: usize| (i * 29 + k * 16) % N_EXPERT;
        let mut rows: Vec<_> =
            (0..N_COLD).map(|k| ColdRow { expert: expert(k) as u32, token: 0, row: k as u32 }).collect();
        rows.sort_unstable();
        // SAFETY: one request at a time, with an activation row of N_EMBD.
        unsafe { engine.post(i % layers.len(), 1, &rows, |_| act.as_ptr()) };
        engine.finish(BOUND).expect("the request completes");
    };
    (0..requests / 10 + 1).for_each(request);
    let start = Instant::now();
    (0..requests).for_each(request);
    let time = start.elapsed();
    workers.step_end();
    workers.detach(&engine);
    (requests * N_COLD * layers[0].expert_bytes()) as f64 / time.as_nanos() as f64
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() -> ExitCode {
    let quick = std::env::args().any(|a| a == "--quick" || a == "--test");
    let Some(ggml) = Ggml::load() else {
        eprintln!("benches/pool: there is no build of llama.cpp, run scripts/build first");
        return ExitCode::FAILURE;
    };
    let (gib, rounds, requests) = if quick { (1, 1, 10) } else { (4, 5, 400) };
    // no block has a scale that is not a number, or one so small that products are denormal
    let data: Vec<u8> = (0..(gib << 30)).map(|i: usize| 0x60 + (i % 7) as u8).collect();
    let placement = Placement::of_this_process();
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    let cpus = placement.as_ref().and_then(|p| p.workers(cores - 1));

    for (ty, name) in TYPES {
        let reading = probe::read(&layers(&ggml, ty, &data, true), placement.as_ref(), cores - 1, false);
        if let Some(r) = reading {
            println!(
                "probe/{name}\t{:.1}\tGB/s with {} workers, {} bytes ahead",
                r.rate, r.n_workers, r.ahead
            );
        }
    }
    let mut rates = vec![Vec::new(); 2 * TYPES.len() + 1];
    for _ in 0..rounds {
        let mut at = rates.iter_mut();
        at.next().expect("the first").push(measure::read_for(&data, cores, READING));
        for (ty, _) in TYPES {
            for ours in [false, true] {
                let rate = pool(layers(&ggml, ty, &data, ours), cores - 1, cpus, requests);
                at.next().expect("one for each").push(rate);
            }
        }
    }
    let mut rates = rates.into_iter().map(median);
    let all = rates.next().expect("the first");
    println!("read\t{all:.1}\tGB/s");
    for (_, name) in TYPES {
        for kernel in ["ggml", "rows"] {
            let rate = rates.next().expect("one for each");
            println!("{name}/{kernel}\t{rate:.1}\tGB/s");
            println!("{name}/{kernel}/share\t{:.3}\tof read", rate / all);
        }
    }
    ExitCode::SUCCESS
}
