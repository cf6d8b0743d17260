//! Row kernels against the same sums in double precision, beside ggml's own dot products: the error of ours is no
//! larger, for any number of rows, lengths that end within a step, and any number of activations.

mod ggml;

use ggml::Ggml;
use moe_hot::cold::{Matrix, kernel::Target, rows::RowKernel};
use proptest::prelude::*;

/// ggml's types with kernels, q4_0 to mxfp4, and the elements of a block.
const TYPES: [(i32, usize); 8] =
    [(2, 32), (8, 32), (12, 256), (13, 256), (14, 256), (20, 32), (23, 256), (39, 32)];

fn ggml() -> Ggml {
    Ggml::load().expect("these tests need ggml: run scripts/build first")
}

/// Numbers like weights: most small, a few large.
fn numbers(n: usize, seed: u64) -> Vec<f32> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut uniform = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        (x >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    (0..n).map(|_| uniform() * uniform() * uniform() * 8.0).collect()
}

#[repr(align(64))]
#[derive(Clone, Copy)]
struct Line(#[allow(dead_code, reason = "for its size")] [u8; 64]);

/// Multiplies all rows of expert 0 with `acts`; `[act][row]`.
fn products(m: &Matrix, acts: &[Vec<f32>]) -> Vec<Vec<f32>> {
    let mut out = vec![vec![f32::NAN; m.n_out]; acts.len()];
    let lines = m.converted_bytes().div_ceil(64);
    let mut rows = vec![vec![Line([0; 64]); lines]; acts.len()];
    let mut targets = Vec::new();
    for ((act, row), out) in acts.iter().zip(&mut rows).zip(&mut out) {
        let row = row.as_mut_ptr().cast::<u8>();
        // SAFETY: the row is aligned and long enough.
        assert!(unsafe { m.convert(act.as_ptr(), row) });
        targets.push(Target { act: row, out: out.as_mut_ptr() });
    }
    // SAFETY: activations are converted for the matrix, outputs have room for all rows.
    unsafe { m.multiply(0, 0, m.n_out, &targets) };
    out
}

/// What an activation row stands for; ggml does not tell for q8_K.
fn act_values(ggml: &Ggml, ty: i32, row: &[u8], n: usize) -> Vec<f32> {
    const Q8_K: i32 = 15;
    if ty != Q8_K {
        return ggml.values(ty, row, n);
    }
    let block = |b: &[u8]| {
        let scale = f32::from_le_bytes(b[..4].try_into().unwrap());
        b[4..][..256].iter().map(|q| scale * f32::from(*q as i8)).collect::<Vec<_>>()
    };
    row.chunks_exact(4 + 256 + 32).flat_map(block).collect()
}

/// The kernels of this CPU for a type.
fn kernels(m: &Matrix) -> Vec<RowKernel> {
    RowKernel::all(m.ty, m.n_in, m.row_bytes, m.act_row_bytes).collect()
}

/// A kernel's name, the squared errors of ggml and of it against double precision, and the squared sum.
type Errors = (&'static str, [f64; 3]);

fn errors(ggml: &Ggml, ty: i32, n_in: usize, n_out: usize, n_acts: usize, seed: u64) -> Vec<Errors> {
    let weights = ggml.quantize(ty, &numbers(n_in * n_out, seed), n_in);
    let acts: Vec<_> = (0..n_acts).map(|a| numbers(n_in, seed + 1 + a as u64)).collect();
    let m = ggml.matrix(weights.as_ptr(), ty, n_in, n_out);
    let act_type = ggml.traits(ty).vec_dot_type;
    let rows: Vec<_> = weights.chunks_exact(m.row_bytes).map(|row| ggml.values(ty, row, n_in)).collect();
    let exact = acts.iter().map(|act| {
        let mut converted = vec![0u8; m.act_row_bytes];
        // SAFETY: the row has the bytes of such an activation.
        unsafe { m.from_float.unwrap()(act.as_ptr(), converted.as_mut_ptr().cast(), n_in as i64) };
        let act = act_values(ggml, act_type, &converted, n_in);
        let dot = |row: &Vec<f32>| row.iter().zip(&act).map(|(w, a)| f64::from(*w) * f64::from(*a)).sum();
        rows.iter().map(dot).collect::<Vec<f64>>()
    });
    let exact: Vec<f64> = exact.collect::<Vec<_>>().concat();
    let error = |kernel| {
        let out = products(&Matrix { kernel, ..m }, &acts).concat();
        out.iter().zip(&exact).map(|(x, exact)| (f64::from(*x) - exact).powi(2)).sum::<f64>()
    };
    let theirs = error(None);
    let sum = exact.iter().map(|x| x.powi(2)).sum();
    kernels(&m).into_iter().map(|k| (k.name, [theirs, error(Some(k)), sum])).collect()
}

#[test]
fn the_error_is_no_larger_than_that_of_ggml() {
    let ggml = ggml();
    let mut tested = Vec::new();
    for (ty, _) in TYPES {
        for n_in in [512, 1024, 2048, 4096] {
            for (name, [theirs, ours, sum]) in errors(&ggml, ty, n_in, 512, 16, n_in as u64) {
                let relative = |e: f64| (e / sum).sqrt();
                println!("{name} {n_in}: {:.2e}, ggml {:.2e}", relative(ours), relative(theirs));
                assert!(ours <= theirs, "{name}, {n_in}: {:e} and {:e}", relative(ours), relative(theirs));
                assert!(relative(ours) < 1e-6, "{name}, {n_in}: {:e}", relative(ours));
                tested.push(name);
            }
        }
    }
    #[cfg(target_arch = "x86_64")]
    for (set, available) in
        [("avx2", is_x86_feature_detected!("avx2")), ("avx512", is_x86_feature_detected!("avx512vnni"))]
    {
        let n = tested.iter().filter(|name| name.ends_with(set)).count();
        assert_eq!(n, if available { 4 * TYPES.len() } else { 0 }, "{set}: a kernel for each type");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..Default::default() })]

    #[test]
    fn any_shape_and_number_of_activations(
        ty in 0..TYPES.len(),
        blocks in 1usize..20,
        n_out in 1usize..40,
        n_acts in 1usize..=8,
        seed: u32,
    ) {
        let (ty, block) = TYPES[ty];
        for (name, [_, ours, sum]) in errors(&ggml(), ty, blocks * block, n_out, n_acts, seed.into()) {
            prop_assert!(ours <= sum * 1e-11, "{name}: {:e} of {:e}", ours.sqrt(), sum.sqrt());
        }
    }

    /// What no quantiser writes: any bytes at all, scales included, as long as the result is finite.
    #[test]
    fn any_bytes(ty in 0..TYPES.len(), blocks in 1usize..5, bytes in prop::collection::vec(any::<u8>(), 5 * 210)) {
        let ggml = ggml();
        let (ty, block) = TYPES[ty];
        let n_in = blocks * block;
        let m = ggml.matrix(bytes.as_ptr(), ty, n_in, 1);
        let size: f32 = ggml.values(ty, &bytes, n_in).iter().map(|w| w.abs()).sum();
        if !size.is_finite() || size > 1e30 {
            return Ok(());
        }
        let act = vec![numbers(n_in, 7)];
        let theirs = products(&m, &act)[0][0];
        for kernel in kernels(&m) {
            let ours = products(&Matrix { kernel: Some(kernel), ..m }, &act)[0][0];
            // sums of large terms that cancel each other are only as exact as the terms
            prop_assert!((theirs - ours).abs() <= size * 1e-5, "{}: {theirs} and {ours}, of {size}", kernel.name);
        }
    }
}

#[test]
fn other_formats_have_no_kernel() {
    let ggml = ggml();
    let (row, act) = (ggml.row_bytes(2, 256), ggml.row_bytes(8, 256));
    for ty in [0, 1, 3, 10, 30, 1000, -1] {
        assert!(RowKernel::find(ty, 256, row, act).is_none(), "type {ty}");
    }
    // rows with something between them, or an activation of another format
    assert!(RowKernel::find(2, 256, row + 2, act).is_none());
    assert!(RowKernel::find(2, 256, row, act + 2).is_none());
    assert!(RowKernel::find(12, 32, 18, 34).is_none());
}
