//! Row kernels against the same sums in double precision, beside ggml's own dot products: the error of ours is no
//! larger, for any number of rows, lengths that end within a step, and any number of activations. What they sum are
//! activations as ggml's CUDA kernels round them. Beside CUDA it is no larger than that of CUDA's own sums.

mod ggml;

use ggml::Ggml;
use moe_hot::cold::{
    Matrix,
    kernel::Target,
    rows::{Numerics, RowKernel},
};
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

/// What an activation row of ggml's stands for; ggml does not tell for q8_K.
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

const F16: i32 = 1;
const Q4_0: i32 = 2;

fn half(ggml: &Ggml, x: f32) -> f32 {
    ggml.values(F16, &ggml.quantize(F16, &[x], 1), 1)[0]
}

/// What the elements of blocks of 32 add up to, in half precision, in the order of `quantize_q8_1`.
fn block_sums(ggml: &Ggml, act: &[f32]) -> Vec<f64> {
    fn sum(x: &[f32]) -> f32 {
        let (a, b) = x.split_at(x.len() / 2);
        if x.len() == 1 { x[0] } else { sum(&a.iter().zip(b).map(|(a, b)| a + b).collect::<Vec<_>>()) }
    }
    act.chunks_exact(32).map(|block| half(ggml, sum(block)).into()).collect()
}

/// What an activation stands for when it is rounded as in `quantize_q8_1` of ggml's CUDA kernels.
fn quantize_q8_1(ggml: &Ggml, act: &[f32]) -> Vec<f64> {
    let block = |block: &[f32]| {
        let d = block.iter().fold(0.0f32, |most, x| most.max(x.abs())) / 127.0;
        let scale = f64::from(half(ggml, d));
        // CUDA's division is no more exact than this; at half a step it may go the other way
        let by = if d == 0.0 { 0.0 } else { 1.0 / d };
        let value = |x: &f32| scale * f64::from((x * by).round());
        block.iter().map(value).collect::<Vec<_>>()
    };
    act.chunks_exact(32).flat_map(block).collect()
}

const NUMERICS: [Numerics; 2] = [Numerics::Best, Numerics::Cuda];

/// The kernels of this CPU for a type.
fn kernels(m: &Matrix, numerics: Numerics) -> Vec<RowKernel> {
    RowKernel::all(m.ty, m.n_in, m.row_bytes, numerics).collect()
}

/// The products of rows with an activation.
fn exact(rows: &[Vec<f32>], act: &[f64]) -> Vec<f64> {
    rows.iter().map(|row| row.iter().zip(act).map(|(w, a)| f64::from(*w) * a).sum()).collect()
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|x| f64::from(*x)).collect()
}

/// Weights and activations, the products of all pairs as they are and with what rounded activations stand for.
struct Case {
    weights: Vec<u8>,
    acts: Vec<Vec<f32>>,
    n_out: usize,
    true_sums: Vec<f64>,
    with_ggml: Vec<f64>,
    with_cuda: Vec<f64>,
    /// As the formula of CUDA's kernel, where that is another.
    as_cuda: Vec<f64>,
    /// What the terms of the products add up to without their signs.
    sizes: Vec<f64>,
}

impl Case {
    fn new(ggml: &Ggml, ty: i32, n_in: usize, n_out: usize, n_acts: usize, seed: u64) -> Self {
        let weights = ggml.quantize(ty, &numbers(n_in * n_out, seed), n_in);
        let acts: Vec<_> = (0..n_acts).map(|a| numbers(n_in, seed + 1 + a as u64)).collect();
        Case::of(ggml, ty, weights, acts)
    }

    fn of(ggml: &Ggml, ty: i32, weights: Vec<u8>, acts: Vec<Vec<f32>>) -> Self {
        let n_in = acts[0].len();
        let n_out = weights.len() / ggml.row_bytes(ty, n_in);
        let m = ggml.matrix(weights.as_ptr(), ty, n_in, n_out);
        let act_type = ggml.traits(ty).vec_dot_type;
        let rows: Vec<_> = weights.chunks_exact(m.row_bytes).map(|row| ggml.values(ty, row, n_in)).collect();
        let unsigned = |x: &[f32]| x.iter().map(|x| x.abs()).collect::<Vec<f32>>();
        let magnitudes: Vec<_> = rows.iter().map(|row| unsigned(row)).collect();
        let sizes = acts.iter().flat_map(|act| exact(&magnitudes, &wide(&unsigned(act)))).collect();
        // what CUDA multiplies with the sums of blocks: 8 times the scales of q4_0's
        let offsets = |row: &[u8]| -> Vec<f32> {
            let scale = |block: &[u8]| 8.0 * ggml.values(F16, &block[..2], 1)[0];
            if ty == Q4_0 { row.chunks_exact(18).map(scale).collect() } else { vec![0.0; n_in / 32] }
        };
        let offsets: Vec<_> = weights.chunks_exact(m.row_bytes).map(offsets).collect();
        let (mut true_sums, mut with_ggml, mut with_cuda) = (Vec::new(), Vec::new(), Vec::new());
        let mut as_cuda = Vec::new();
        for act in &acts {
            let mut converted = vec![0u8; m.act_row_bytes];
            // SAFETY: the row has the bytes of such an activation.
            unsafe { m.from_float.unwrap()(act.as_ptr(), converted.as_mut_ptr().cast(), n_in as i64) };
            true_sums.extend(exact(&rows, &wide(act)));
            with_ggml.extend(exact(&rows, &wide(&act_values(ggml, act_type, &converted, n_in))));
            let rounded = quantize_q8_1(ggml, act);
            let lost = |(sum, block): (f64, &[f64])| sum - block.iter().sum::<f64>();
            let lost: Vec<_> =
                block_sums(ggml, act).into_iter().zip(rounded.chunks_exact(32)).map(lost).collect();
            let sums = exact(&rows, &rounded);
            as_cuda.extend(sums.iter().zip(exact(&offsets, &lost)).map(|(sum, lost)| sum - lost));
            with_cuda.extend(sums);
        }
        Case { weights, acts, n_out, true_sums, with_ggml, with_cuda, as_cuda, sizes }
    }

    /// What kernels of these numerics sum, but for their error.
    fn expected(&self, numerics: Numerics) -> &[f64] {
        match numerics {
            Numerics::Best => &self.with_cuda,
            Numerics::Cuda => &self.as_cuda,
        }
    }

    /// What ggml's dot product computes.
    fn by_ggml(&self, ggml: &Ggml, ty: i32) -> Vec<f64> {
        self.by(self.matrix(ggml, ty))
    }

    /// What our kernels compute.
    fn by_ours(&self, ggml: &Ggml, ty: i32, numerics: Numerics) -> Vec<(&'static str, Vec<f64>)> {
        let m = self.matrix(ggml, ty);
        let by = |k: RowKernel| (k.name, self.by(Matrix { kernel: Some(k), ..m }));
        kernels(&m, numerics).into_iter().map(by).collect()
    }

    fn matrix(&self, ggml: &Ggml, ty: i32) -> Matrix {
        ggml.matrix(self.weights.as_ptr(), ty, self.acts[0].len(), self.n_out)
    }

    fn by(&self, m: Matrix) -> Vec<f64> {
        wide(&products(&m, &self.acts).concat())
    }
}

/// The root of the squared differences, relative to the sums.
fn distance(of: &[f64], from: &[f64]) -> f64 {
    let squares: f64 = of.iter().zip(from).map(|(a, b)| (a - b).powi(2)).sum();
    (squares / from.iter().map(|x| x.powi(2)).sum::<f64>()).sqrt()
}

#[test]
fn the_error_is_no_larger_than_that_of_ggml() {
    let ggml = ggml();
    let mut tested = Vec::new();
    for (ty, block) in TYPES {
        for n_in in [512, 1024, 2048, 4096] {
            let case = Case::new(&ggml, ty, n_in, 512, 16, n_in as u64);
            let theirs = case.by_ggml(&ggml, ty);
            // of the arithmetic, and with what rounding the activations adds
            let their_sums = distance(&theirs, &case.with_ggml);
            let their_all = distance(&theirs, &case.true_sums);
            for (name, ours) in case.by_ours(&ggml, ty, Numerics::Best) {
                let (sums, all) = (distance(&ours, &case.with_cuda), distance(&ours, &case.true_sums));
                println!(
                    "{name} {n_in}: {sums:.2e}, ggml {their_sums:.2e}; in all {all:.3e}, ggml {their_all:.3e}"
                );
                assert!(sums <= their_sums, "{name}, {n_in}: {sums:e} and {their_sums:e}");
                assert!(sums < 1e-6, "{name}, {n_in}: {sums:e}");
                // a scale for every 32 elements, which for blocks of 32 weights ggml has, too
                let bar = their_all * if block == 32 { 1.001 } else { 0.8 };
                assert!(all <= bar, "{name}, {n_in}: {all:e}, expected at most {bar:e}");
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

#[test]
fn beside_cuda_the_error_is_that_of_its_sums() {
    let ggml = ggml();
    for (ty, _) in TYPES {
        for n_in in [512, 2048] {
            let case = Case::new(&ggml, ty, n_in, 512, 16, n_in as u64);
            let best = case.by_ours(&ggml, ty, Numerics::Best);
            let ours = case.by_ours(&ggml, ty, Numerics::Cuda);
            assert_eq!(best.len(), ours.len(), "type {ty}");
            for ((name, ours), (_, best)) in ours.into_iter().zip(best) {
                let error = |of: &[f64]| distance(of, &case.true_sums);
                let (sums, all) = (distance(&ours, &case.as_cuda), error(&ours));
                println!("{name} {n_in}: {sums:.2e}; in all {all:.3e}, best {:.3e}", error(&best));
                assert!(sums < 1e-6, "{name}, {n_in}: {sums:e}");
                if ty == Q4_0 {
                    let between = distance(&ours, &best);
                    assert!(between > 1e-2, "{name}, {n_in}: {between:e} from the best");
                } else {
                    assert_eq!(ours, best, "{name}, {n_in}");
                }
            }
        }
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
        let ggml = ggml();
        let case = Case::new(&ggml, ty, blocks * block, n_out, n_acts, seed.into());
        for numerics in NUMERICS {
            for (name, ours) in case.by_ours(&ggml, ty, numerics) {
                for ((ours, exact), size) in ours.iter().zip(case.expected(numerics)).zip(&case.sizes) {
                    prop_assert!((ours - exact).abs() <= size * 1e-6, "{name}: {ours} and {exact}, of {size}");
                }
            }
        }
    }

    /// What no quantiser writes: any bytes at all, scales included, as long as the result is finite.
    #[test]
    fn any_bytes(ty in 0..TYPES.len(), blocks in 1usize..5, bytes in prop::collection::vec(any::<u8>(), 5 * 210)) {
        let ggml = ggml();
        let (ty, block) = TYPES[ty];
        let n_in = blocks * block;
        let row = bytes[..ggml.row_bytes(ty, n_in)].to_vec();
        let size: f32 = ggml.values(ty, &row, n_in).iter().map(|w| w.abs()).sum();
        if !size.is_finite() || size > 1e30 {
            return Ok(());
        }
        let case = Case::of(&ggml, ty, row, vec![numbers(n_in, 7)]);
        for numerics in NUMERICS {
            for (name, ours) in case.by_ours(&ggml, ty, numerics) {
                let (ours, exact) = (ours[0], case.expected(numerics)[0]);
                // sums of large terms that cancel each other are only as exact as the terms
                prop_assert!((ours - exact).abs() <= f64::from(size) * 1e-5, "{name}: {ours} and {exact}, of {size}");
            }
        }
    }
}

#[test]
fn what_is_no_number_is_not_lost() {
    let ggml = ggml();
    for (ty, _) in TYPES {
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut act = numbers(512, 1);
            act[300] = value;
            let case = Case::of(&ggml, ty, ggml.quantize(ty, &numbers(512, 2), 512), vec![act]);
            for (name, ours) in NUMERICS.into_iter().flat_map(|n| case.by_ours(&ggml, ty, n)) {
                assert!(!ours[0].is_finite(), "{name}: {value} gives {}", ours[0]);
            }
        }
    }
}

#[test]
fn scales_that_half_precision_does_not_have() {
    let ggml = ggml();
    for (ty, _) in TYPES {
        for size in [1e-30, 1e-9, 1e9] {
            let act = numbers(512, 1).iter().map(|x| x * size).collect();
            let case = Case::of(&ggml, ty, ggml.quantize(ty, &numbers(512 * 64, 2), 512), vec![act]);
            for (name, ours) in NUMERICS.into_iter().flat_map(|n| case.by_ours(&ggml, ty, n)) {
                let error = distance(&ours, &case.true_sums);
                assert!(error < 0.02, "{name}, {size:e}: {error:e}");
            }
        }
    }
}

#[test]
fn other_formats_have_no_kernel() {
    let ggml = ggml();
    let row = ggml.row_bytes(2, 256);
    for ty in [0, 1, 3, 10, 30, 1000, -1] {
        assert!(RowKernel::find(ty, 256, row, Numerics::Best).is_none(), "type {ty}");
    }
    // rows with something between them, or a part of a block
    assert!(RowKernel::find(2, 256, row + 2, Numerics::Best).is_none());
    assert!(RowKernel::find(2, 240, row, Numerics::Best).is_none());
    assert!(RowKernel::find(12, 32, 18, Numerics::Best).is_none());
}
