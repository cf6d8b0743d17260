//! The cold engine by weight type and the two nodes of a layer, with ggml's own row functions from
//! build/bin (MOE_HOT_BUILD_DIR); without a build there is nothing to measure, and that is said.
//!
//! `cold/TYPE/KERNEL`: one thread computes a token's 8 cold experts of a layer 1024 wide with 512 hidden units, by
//! ggml's dot product and by each of our row kernels that this CPU can run; the experts are taken in turn from more
//! memory than the caches hold. `node/...`: DISPATCH and JOIN of a layer whose experts all have slots, and of one that
//! has none but no weights to speak of.

#[path = "../tests/ggml/mod.rs"]
mod ggml;

use std::{
    ffi::{CString, c_char, c_int, c_void},
    hint::black_box,
    ptr,
    time::Duration,
};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use ggml::Ggml;
use moe_hot::{
    cold::{
        Activation, ColdRow, Engine, Layer, Matrix,
        rows::{Numerics, RowKernel},
    },
    ffi,
    ggml::ggml_tensor,
};

const N_EMBD: usize = 1024;
const N_FF: usize = 512;
const N_USED: usize = 8;
/// Weights to go through before an expert comes again, in bytes.
const MEMORY: usize = 256 << 20;

/// ggml's type, its name, elements and bytes of a block.
const TYPES: [(i32, &str, usize, usize); 9] = [
    (2, "q4_0", 32, 18),
    (8, "q8_0", 32, 34),
    (12, "q4_K", 256, 144),
    (13, "q5_K", 256, 176),
    (14, "q6_K", 256, 210),
    (20, "iq4_nl", 32, 18),
    (23, "iq4_xs", 256, 136),
    (39, "mxfp4", 32, 17),
    (1, "f16", 1, 2),
];

unsafe extern "C" fn swiglu(n: c_int, y: *mut f32, x: *const f32, g: *const f32) {
    for i in 0..n as usize {
        // SAFETY: the engine passes n elements each.
        unsafe { *y.add(i) = *x.add(i) / (1.0 + (-*x.add(i)).exp()) * *g.add(i) };
    }
}

fn cold(c: &mut Criterion, ggml: &Ggml) {
    let act: Vec<f32> = (0..N_EMBD).map(|i| ((i * 37) % 101) as f32 / 50.0 - 1.0).collect();
    for (ty, name, elements, bytes) in TYPES {
        let expert = 3 * N_EMBD * N_FF / elements * bytes;
        let n_expert = MEMORY / expert / N_USED * N_USED;
        // no block has a scale that is not a number, or one so small that products are denormal
        let data: Vec<u8> = (0..n_expert * expert).map(|i| 0x60 + (i % 7) as u8).collect();
        let at = |part: usize| data[part * n_expert * expert / 3..].as_ptr();
        let m = ggml.matrix(at(0), ty, N_EMBD, N_FF);
        let kernels = RowKernel::all(ty, N_EMBD, m.row_bytes, Numerics::Cuda).map(Some);
        let mut group = c.benchmark_group(format!("cold/{name}"));
        for kernel in std::iter::once(None).chain(kernels) {
            let matrix = |part, n_in, n_out| Matrix { kernel, ..ggml.matrix(at(part), ty, n_in, n_out) };
            let layer = Layer {
                il: 0,
                n_expert,
                n_used: N_USED,
                gate: Some(matrix(0, N_EMBD, N_FF)),
                up: matrix(1, N_EMBD, N_FF),
                down: matrix(2, N_FF, N_EMBD),
                merged: false,
                activation: Activation::Gated(swiglu),
            };
            let set = kernel.map_or("ggml", |k| k.name.rsplit(' ').next().unwrap_or(k.name));
            group.throughput(Throughput::Bytes((N_USED * layer.expert_bytes()) as u64));
            let engine = Engine::new([layer].into(), 1, None);
            let mut first = 0;
            group.bench_function(set, |b| {
                b.iter(|| {
                    first = (first + N_USED) % n_expert;
                    let row = |k| ColdRow { expert: (first + k) as u32, token: 0, row: k as u32 };
                    let rows: Vec<_> = (0..N_USED).map(row).collect();
                    // SAFETY: one request at a time, with an activation row of N_EMBD.
                    unsafe { engine.post(0, 1, &rows, |_| act.as_ptr()) };
                    engine.finish(Duration::from_secs(1)).unwrap();
                    // SAFETY: the request is finished.
                    black_box(unsafe { engine.output(0, N_EMBD) }[0])
                });
            });
        }
    }
}

fn tensor(data: *mut c_void, size: usize, ne: [i64; 3], nb1: usize) -> ggml_tensor {
    // SAFETY: a tensor of zeroes is one without sources.
    let mut t: ggml_tensor = unsafe { std::mem::zeroed() };
    t.data = data;
    t.ne = [ne[0], ne[1], ne[2], 1];
    t.nb = [size, nb1, nb1 * ne[1] as usize, nb1 * (ne[1] * ne[2]) as usize];
    t
}

fn option(name: &str, value: &str) {
    let (name, value) = (CString::new(name).unwrap(), CString::new(value).unwrap());
    let (name, value): (*const c_char, *const c_char) = (name.as_ptr(), value.as_ptr());
    // SAFETY: both are zero-terminated.
    assert_eq!(unsafe { ffi::moe_hot_option_set(name, value) }, ffi::moe_hot_status::MOE_HOT_OK);
}

/// A layer with experts of one block, so that the nodes themselves are what is measured.
fn nodes(c: &mut Criterion, ggml: &Ggml) {
    const SMALL: usize = 32;
    const EXPERTS: usize = 64;
    let data = vec![1u8; 3 * EXPERTS * SMALL * 18];
    let matrix = |part: usize| {
        let m = ggml.matrix(data[part * EXPERTS * SMALL * 18..].as_ptr(), 2, SMALL, SMALL);
        ffi::moe_hot_matrix {
            buffer: ptr::null(),
            buffer_bytes: 0,
            data: m.data.cast(),
            type_: m.ty,
            n_in: SMALL as i64,
            n_out: SMALL as i64,
            row_bytes: m.row_bytes,
            expert_bytes: m.expert_bytes,
            vec_dot: Some(m.vec_dot),
            from_float: m.from_float,
            act_row_bytes: m.act_row_bytes,
        }
    };
    let layer = ffi::moe_hot_layer {
        il: 0,
        n_expert: EXPERTS as i32,
        n_used: N_USED as i32,
        gate: matrix(0),
        up: matrix(1),
        down: matrix(2),
        merged: false,
        activation: ffi::moe_hot_activation::MOE_HOT_GATED as i32,
        gated: Some(swiglu),
        unary: None,
        device: ptr::null(),
        max_tokens: 0,
    };
    // room for those in use, but not for all: those would be there from the start
    option("moe-hot-k", "32");
    option("moe-hot-threads", "0");
    for (name, interval) in [("node/all hot", "1"), ("node/all cold", "1048576")] {
        option("moe-hot-rebalance-interval", interval);
        let (mut ctx, mut active) = (ptr::null_mut(), false);
        // SAFETY: as the C test does it: one context, used by one thread, freed at the end.
        unsafe {
            ffi::moe_hot_context_create(data.as_ptr().cast(), &raw mut ctx);
            ffi::moe_hot_offer(ctx, &raw const layer);
            ffi::moe_hot_activate(ctx, 1, c"bench".as_ptr(), &raw mut active);
            assert!(active);
            let op = ffi::moe_hot_op_data(ctx, 0);
            let mut cur = [0.5f32; SMALL];
            let mut ids: [i32; N_USED] = std::array::from_fn(|k| k as i32 * 7);
            let mut slots = [0i32; N_USED];
            let mut out = [0.0f32; SMALL * N_USED];
            let mut t_cur = tensor(cur.as_mut_ptr().cast(), 4, [SMALL as i64, 1, 1], SMALL * 4);
            let mut t_ids = tensor(ids.as_mut_ptr().cast(), 4, [N_USED as i64, 1, 1], N_USED * 4);
            let mut t_slots = tensor(slots.as_mut_ptr().cast(), 4, [N_USED as i64, 1, 1], N_USED * 4);
            let mut t_out = tensor(out.as_mut_ptr().cast(), 4, [SMALL as i64, N_USED as i64, 1], SMALL * 4);
            t_slots.src[0] = &raw mut t_cur;
            t_slots.src[1] = &raw mut t_ids;
            t_out.src[1] = &raw mut t_slots;
            let mut hot = false;
            let mut token = || {
                ffi::moe_hot_step_begin(ctx, 1, std::ptr::null(), &raw mut hot);
                ffi::moe_hot_dispatch(&raw mut t_slots, 0, 1, op);
                ffi::moe_hot_join(&raw mut t_out, 0, 1, op);
                ffi::moe_hot_step_end(ctx);
            };
            // until the slots are filled, or will never be
            for _ in 0..50 {
                token();
                std::thread::sleep(Duration::from_millis(1));
            }
            assert!(slots.iter().all(|s| (*s >= 0) == (interval == "1")), "{name}: {slots:?}");
            c.bench_function(name, |b| b.iter(&mut token));
            ffi::moe_hot_context_free(ctx);
        }
    }
    ffi::moe_hot_model_free(data.as_ptr().cast());
}

fn bench(c: &mut Criterion) {
    match Ggml::load() {
        Some(ggml) => {
            nodes(c, &ggml);
            cold(c, &ggml);
        }
        None => eprintln!("benches/cold: there is no build of llama.cpp, run scripts/build first"),
    }
}

criterion_group!(benches, bench);
criterion_main!(benches);
