//! Models of protocols between threads, for loom and for real threads.
//!
//! A model is a test named `loom_...` beside what it checks. Under `cfg(loom)` (`scripts/test --only loom`) it runs in
//! every order of its threads that takes few preemptions, with every value that the memory orderings allow a load to
//! see; otherwise some hundred times as it comes, so that a model is an ordinary test, too.

use std::{
    ffi::{c_int, c_void},
    sync::LazyLock,
};

use crate::cold::{Activation, Layer, Matrix};

/// Preemptions of a run, unless LOOM_MAX_PREEMPTIONS says otherwise. Bugs that need more are rare, and each one makes
/// the runs as many times more as a run has steps.
#[cfg(loom)]
const PREEMPTIONS: usize = 3;
/// The same where a run has many steps.
#[cfg(loom)]
const PREEMPTIONS_LONG: usize = 2;
/// Steps of a run, after which it does not end.
#[cfg(loom)]
const STEPS: usize = 4000;
/// Turns of loops that wait, as [`crate::sync::explore_waits`] counts them.
#[cfg(loom)]
const WAITS: u32 = 12;

#[cfg(loom)]
fn run(preemptions: usize, model: impl Fn() + Send + Sync + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound.get_or_insert(preemptions);
    builder.max_branches = STEPS;
    builder.check(move || {
        crate::sync::memory::forget();
        crate::sync::explore_waits(WAITS);
        model();
    });
}

/// Checks a model.
#[cfg(loom)]
pub fn check(model: impl Fn() + Send + Sync + 'static) {
    run(PREEMPTIONS, model);
}

/// Checks a model whose runs have many steps.
#[cfg(loom)]
pub fn check_long(model: impl Fn() + Send + Sync + 'static) {
    run(PREEMPTIONS_LONG, model);
}

/// Runs a model with real threads.
#[cfg(not(loom))]
pub fn check(model: impl Fn() + Send + Sync + 'static) {
    // Miri sees races in a few runs, and takes its time
    (0..if cfg!(miri) { 10 } else { 200 }).for_each(|_| model());
}

#[cfg(not(loom))]
pub use check as check_long;

/// What a model begins with and does not check: one order is enough.
pub fn prepare<T>(f: impl FnOnce() -> T) -> T {
    #[cfg(loom)]
    {
        loom::stop_exploring();
        crate::sync::explore_waits(u32::MAX);
    }
    let made = f();
    #[cfg(loom)]
    {
        crate::sync::explore_waits(WAITS);
        loom::explore();
    }
    made
}

unsafe extern "C" fn dot(
    n: c_int,
    out: *mut f32,
    _: usize,
    x: *const c_void,
    _: usize,
    y: *const c_void,
    _: usize,
    _: c_int,
) {
    // SAFETY: the caller passes rows of n elements.
    let row = |at: *const c_void| unsafe { std::slice::from_raw_parts(at.cast::<f32>(), n as usize) };
    // SAFETY: as above.
    unsafe { *out = row(x).iter().zip(row(y)).map(|(x, y)| x * y).sum() };
}

unsafe extern "C" fn copy(from: *const f32, to: *mut c_void, n: i64) {
    // SAFETY: the caller passes rows of n elements.
    unsafe { std::ptr::copy_nonoverlapping(from, to.cast::<f32>(), n as usize) };
}

/// Experts of [`SMALL`] and [`CHUNKED`].
pub const N_EXPERT: usize = 2;

/// A layer whose expert i has weights of i + 1 in all places.
fn layer(n_embd: usize, n_ff: usize) -> Layer {
    let matrix = |n_in: usize, n_out: usize| {
        let weights: Vec<f32> = (0..N_EXPERT).flat_map(|e| vec![(e + 1) as f32; n_in * n_out]).collect();
        Matrix {
            // two layers are made, once
            data: weights.leak().as_ptr().cast(),
            buffer: None,
            ty: 0,
            n_in,
            n_out,
            row_bytes: n_in * size_of::<f32>(),
            expert_bytes: n_in * n_out * size_of::<f32>(),
            vec_dot: dot,
            from_float: Some(copy),
            act_row_bytes: n_in * size_of::<f32>(),
            kernel: None,
            ahead: 0,
        }
    };
    Layer {
        il: 0,
        n_expert: N_EXPERT,
        n_used: 1,
        gate: None,
        up: matrix(n_embd, n_ff),
        down: matrix(n_ff, n_embd),
        merged: false,
        activation: Activation::ReluSqr,
    }
}

/// An expert of it is a unit a matrix.
pub static SMALL: LazyLock<Layer> = LazyLock::new(|| layer(16, 16));
/// An expert of it is two units a matrix.
pub static CHUNKED: LazyLock<Layer> = LazyLock::new(|| layer(256, 32));

/// What `expert` of `layer` makes of activations of `act`, in all places; small enough to be exact.
pub fn expected(layer: &Layer, expert: usize, act: f32) -> f32 {
    let weight = (expert + 1) as f32;
    let hidden = layer.n_embd() as f32 * weight * act;
    layer.n_ff() as f32 * weight * hidden * hidden
}
