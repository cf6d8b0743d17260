//! Row kernels: rows of one expert's matrix times a few activations, at the speed of memory.
//!
//! Against ggml's dot products, which most of the time wait for their own instructions, they differ in three ways:
//!
//! - The activation is *prepared* once: rounded to 8 bits, put into the order in which the weights' nibbles come out
//!   of a register, with its scales spread to the lanes, and with what an offset of the weights adds, so that unsigned
//!   weights and signed activations meet in one exact integer instruction.
//! - A thread reads one contiguous stream and asks for what comes next a few KiB ahead. (Four rows at a time are
//!   faster from a cache and slower from memory: the hardware prefetcher loses the streams.)
//! - Weights are decoded once for all activations.
//!
//! Activations are rounded as ggml's CUDA kernels round them ([`Quantized`]): every 32 elements have a scale. An expert
//! in a slot and the same expert on the CPU then differ only by the order in which blocks are added up, and for k-quants
//! and iq4_xs, for which ggml's CPU kernels have a scale for every 256 elements, that is nearer to the activation. For
//! q4_0 the two exclude each other, and [`Numerics`] says which is wanted.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;

use super::kernel::Target;
use crate::ggml;

/// Activations that a kernel multiplies while it holds a row: as many as keep their sums in registers.
const MAX_AT_ONCE: usize = 4;
/// Of registers and cache lines.
const ALIGN: usize = 64;

/// Rows of a matrix that follow each other in memory.
#[derive(Clone, Copy, Debug)]
pub struct Rows {
    /// The first.
    pub first: *const u8,
    /// How many.
    pub n: usize,
    /// From one to the next; what a row has.
    pub row_bytes: usize,
    /// Elements of a row.
    pub n_in: usize,
    /// Bytes that a prefetch is ahead of the reading; 0: none.
    pub ahead: usize,
}

/// Whose sums a kernel computes. They differ for q4_0, whose weights are `d * (q - 8)`: ggml's CUDA kernel takes the 8
/// times the sum of the activations as they were before they were rounded, which makes the error of a product three
/// times as large.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Numerics {
    /// Those with the smallest error.
    Best,
    /// CUDA's, with their error: where the GPU computes some experts and the CPU others, what an expert gives depends on
    /// where it is by no more than the order in which blocks are added up.
    Cuda,
}

/// The kernel of one weight type.
#[derive(Clone, Copy, Debug)]
pub struct RowKernel {
    /// The type's name, and the instructions that it needs.
    pub name: &'static str,
    /// Bytes of a prepared activation of so many elements, a multiple of 64.
    pub act_bytes: fn(usize) -> usize,
    /// Prepares an activation of so many elements.
    prepare: unsafe fn(usize, *const f32, *mut u8),
    /// Multiplies with up to `MAX_AT_ONCE` prepared activations.
    multiply: unsafe fn(&Rows, &[Target]),
}

impl RowKernel {
    /// The fastest kernel for rows of `n_in` weights of type `ty` on this CPU. `row_bytes` is what ggml says of a row:
    /// a format that is not the one that kernels know gets none.
    pub fn find(ty: i32, n_in: usize, row_bytes: usize, numerics: Numerics) -> Option<RowKernel> {
        RowKernel::all(ty, n_in, row_bytes, numerics).next()
    }

    /// As `find`, all that this CPU can run, the fastest first.
    pub fn all(
        ty: i32,
        n_in: usize,
        row_bytes: usize,
        numerics: Numerics,
    ) -> impl Iterator<Item = RowKernel> {
        let known = Format::of(ty)
            .is_some_and(|f| n_in.is_multiple_of(f.block) && n_in / f.block * f.bytes == row_bytes);
        SETS.iter()
            .filter(move |_| known)
            .filter(|set| (set.is_available)())
            .filter_map(move |set| (set.kernel)(ty, numerics))
    }

    /// Prepares an activation.
    ///
    /// # Safety
    /// `act` has `n_in` elements, `out` is aligned to 64 bytes and has `act_bytes(n_in)`.
    pub unsafe fn prepare(&self, n_in: usize, act: *const f32, out: *mut u8) {
        debug_assert!(out.addr().is_multiple_of(ALIGN));
        // SAFETY: passed on; `find` checked the CPU.
        unsafe { (self.prepare)(n_in, act, out) };
    }

    /// Multiplies `rows` with every target's activation.
    ///
    /// # Safety
    /// Rows are there, activations are prepared by this kernel, outputs have room for `rows.n` elements.
    pub unsafe fn multiply(&self, rows: &Rows, targets: &[Target]) {
        for targets in targets.chunks(MAX_AT_ONCE) {
            // SAFETY: passed on; `find` checked the CPU.
            unsafe { (self.multiply)(rows, targets) };
        }
    }
}

/// Kernels that need the same instructions.
struct InstructionSet {
    is_available: fn() -> bool,
    kernel: fn(i32, Numerics) -> Option<RowKernel>,
}

/// The fastest first.
const SETS: &[InstructionSet] = &[
    #[cfg(target_arch = "x86_64")]
    InstructionSet { is_available: avx512::is_available, kernel: avx512::kernel },
    #[cfg(target_arch = "x86_64")]
    InstructionSet { is_available: avx2::is_available, kernel: avx2::kernel },
];

/// Blocks of a weight type.
struct Format {
    /// Elements of a block.
    block: usize,
    /// Bytes of one.
    bytes: usize,
}

impl Format {
    /// Of the types that kernels exist for.
    fn of(ty: i32) -> Option<Format> {
        let (block, bytes) = match ty as u32 {
            ggml::GGML_TYPE_Q4_0 | ggml::GGML_TYPE_IQ4_NL => (32, 18),
            ggml::GGML_TYPE_Q8_0 => (32, 34),
            ggml::GGML_TYPE_MXFP4 => (32, 17),
            ggml::GGML_TYPE_Q4_K => (256, 144),
            ggml::GGML_TYPE_Q5_K => (256, 176),
            ggml::GGML_TYPE_Q6_K => (256, 210),
            ggml::GGML_TYPE_IQ4_XS => (256, 136),
            _ => return None,
        };
        Some(Format { block, bytes })
    }
}

/// The nibble of q4_0 that stands for 0.
const Q4_0_OFFSET: i8 = 8;

/// `block_q8_0`: a scale in half precision, 32 bytes.
const Q8_0_BYTES: usize = 2 + 32;

/// Elements of an activation that have a scale of their own.
const BLOCK: usize = 32;
/// Blocks of the longest step.
const BLOCKS: usize = 8;

/// The activation of a step, blocks of 32, rounded to 8 bits as in `quantize_q8_1` of ggml's CUDA kernels. What is not
/// there is 0.
#[repr(C, align(64))]
struct Quantized {
    q: [i8; BLOCKS * BLOCK],
    /// The largest element of a block / 127, in half precision.
    scale: [f32; BLOCKS],
    /// What the elements of a block added up to before they were rounded, in half precision; 0 for formats that do not
    /// ask for it.
    sum: [f32; BLOCKS],
}

impl Quantized {
    const ZERO: Self = Quantized { q: [0; BLOCKS * BLOCK], scale: [0.0; BLOCKS], sum: [0.0; BLOCKS] };

    /// What the offset of q4_0's weights adds as CUDA's kernel sums it, negated: for each of the four lanes of a block.
    #[inline]
    fn q4_0_corrections(&self) -> [f32; BLOCKS] {
        self.sum.map(|sum| f32::from(-Q4_0_OFFSET) / 4.0 * sum)
    }

    /// What the rounded elements of each block add up to.
    #[inline]
    fn sums(&self) -> [f32; BLOCKS] {
        let mut out = self.scale;
        for (out, q) in out.iter_mut().zip(self.q.chunks_exact(BLOCK)) {
            *out *= q.iter().map(|q| i32::from(*q)).sum::<i32>() as f32;
        }
        out
    }
}

/// What the elements of a block add up to, in the order of a warp's `__shfl_xor_sync`.
///
/// # Safety
/// There are 32.
#[inline(always)]
unsafe fn warp_sum(x: *const f32) -> f32 {
    // SAFETY: the caller has them.
    let mut x = unsafe { x.cast::<[f32; BLOCK]>().read_unaligned() };
    for n in [16, 8, 4, 2, 1] {
        for i in 0..n {
            x[i] += x[i + n];
        }
    }
    x[0]
}

/// The least number that half precision has with all of its digits.
const LEAST_HALF: f32 = 6.103_515_6e-5;

/// `kvalues_iq4nl`.
const IQ4_VALUES: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];
/// `kvalues_mxfp4`, twice what the format says.
const MXFP4_VALUES: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// The longest step of blocks of 32, which are those that can end within one.
const PADDED: usize = 4 * Q8_0_BYTES;

/// `n` bytes and zeroes.
///
/// # Safety
/// There are `n` bytes.
unsafe fn padded(from: *const u8, n: usize) -> [u8; PADDED] {
    let mut out = [0; PADDED];
    // SAFETY: the caller has `n` bytes; more than a step are none.
    unsafe { std::ptr::copy_nonoverlapping(from, out[..n].as_mut_ptr(), n) };
    out
}

/// What kernels of all instruction sets have in common: the format of a weight type, which is theirs, and the loops
/// over rows and steps. A macro, because what is inlined into a function needs the same features.
macro_rules! row_loops {
    ($features:tt) => {
        fn of<F: Format>(name: &'static str) -> RowKernel {
            RowKernel {
                name,
                act_bytes: |n_in| n_in.div_ceil(F::N) * size_of::<F::Act>(),
                prepare: prepare::<F>,
                multiply: multiply::<F>,
            }
        }

        /// How rows of a type are multiplied, step by step.
        trait Format {
            /// Elements of a step.
            const N: usize;
            /// Its bytes in a row.
            const BYTES: usize;
            /// Whether `prepare` looks at `Quantized::sum`.
            const ELEMENT_SUMS: bool = false;
            /// The prepared activation of a step; all of them are aligned to 64 bytes.
            type Act;
            /// The weights of a step in registers.
            type Weights;

            /// # Safety
            /// As all functions here: the CPU has the instructions, and the pointers a step's bytes.
            unsafe fn prepare(act: &$crate::cold::rows::Quantized) -> Self::Act;
            unsafe fn decode(w: *const u8) -> Self::Weights;
            /// Adds the products to `sum`.
            unsafe fn dot(w: &Self::Weights, act: &Self::Act, sum: Sum) -> Sum;
        }

        #[inline]
        #[target_feature(enable = $features)]
        fn in_half_precision(x: f32) -> f32 {
            let half = _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(_mm_set_ss(x))));
            // what half precision has too few digits for stays as it is
            if x.abs() < $crate::cold::rows::LEAST_HALF || half.is_infinite() { x } else { half }
        }

        #[target_feature(enable = $features)]
        unsafe fn prepare<F: Format>(n_in: usize, act: *const f32, out: *mut u8) {
            use $crate::cold::rows::{BLOCK, Quantized, warp_sum};
            let out = out.cast::<F::Act>();
            for s in 0..n_in.div_ceil(F::N) {
                let first = s * F::N;
                let mut step = Quantized::ZERO;
                for b in 0..F::N.min(n_in - first) / BLOCK {
                    // SAFETY: the caller has `n_in` elements, whole blocks of them.
                    unsafe {
                        let block = act.add(first + b * BLOCK);
                        let scale = quantize(block, step.q[b * BLOCK..].as_mut_ptr());
                        step.scale[b] = in_half_precision(scale);
                        if F::ELEMENT_SUMS {
                            step.sum[b] = in_half_precision(warp_sum(block));
                        }
                    }
                }
                // SAFETY: the caller has `act_bytes` of room.
                unsafe { out.add(s).write(F::prepare(&step)) };
            }
        }

        #[target_feature(enable = $features)]
        unsafe fn multiply<F: Format>(
            rows: &$crate::cold::rows::Rows,
            targets: &[$crate::cold::kernel::Target],
        ) {
            const { assert!($crate::cold::rows::MAX_AT_ONCE == 4) };
            // SAFETY: passed on.
            unsafe {
                match *targets {
                    [a] => multiply_by::<F, 1>(rows, [a]),
                    [a, b] => multiply_by::<F, 2>(rows, [a, b]),
                    [a, b, c] => multiply_by::<F, 3>(rows, [a, b, c]),
                    [a, b, c, d] => multiply_by::<F, 4>(rows, [a, b, c, d]),
                    _ => unreachable!("the caller passes 1 to 4"),
                }
            }
        }

        #[target_feature(enable = $features)]
        unsafe fn multiply_by<F: Format, const T: usize>(
            rows: &$crate::cold::rows::Rows,
            targets: [$crate::cold::kernel::Target; T],
        ) {
            const LINE: usize = 64;
            let (steps, rest) = (rows.n_in / F::N, rows.n_in % F::N);
            let acts = targets.map(|t| t.act.cast::<F::Act>());
            let last = rows.first.wrapping_add(rows.n * rows.row_bytes - 1);
            for i in 0..rows.n {
                let mut w = rows.first.wrapping_add(i * rows.row_bytes);
                let mut sums = [Sum::zero(); T];
                for s in 0..steps {
                    if rows.ahead > 0 {
                        for line in 0..F::BYTES.div_ceil(LINE) {
                            // what follows the rows is another thread's to read
                            let at = w.wrapping_add(rows.ahead + line * LINE).min(last);
                            _mm_prefetch::<_MM_HINT_T0>(at.cast());
                        }
                    }
                    // SAFETY: the caller vouches for rows and activations.
                    unsafe {
                        let weights = F::decode(w);
                        for t in 0..T {
                            sums[t] = F::dot(&weights, &*acts[t].add(s), sums[t]);
                        }
                    }
                    w = w.wrapping_add(F::BYTES);
                }
                if rest > 0 {
                    // SAFETY: as above; blocks of zeroes meet blocks of zeroes.
                    unsafe {
                        let weights =
                            F::decode($crate::cold::rows::padded(w, rest * F::BYTES / F::N).as_ptr());
                        for t in 0..T {
                            sums[t] = F::dot(&weights, &*acts[t].add(steps), sums[t]);
                        }
                    }
                }
                for t in 0..T {
                    // SAFETY: outputs have room for `rows.n`.
                    unsafe { targets[t].out.add(i).write(sums[t].total()) };
                }
            }
        }
    };
}
use row_loops;
