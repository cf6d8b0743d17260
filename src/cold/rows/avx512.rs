//! With AVX-512 and VNNI: 64 weights in a register, four products and their sum in an instruction.
//!
//! `dpbusd` multiplies unsigned by signed bytes. Weights are the unsigned side, moved up by an offset where the type
//! has negative ones; the prepared activation holds what that adds to each lane, negated, and sums start from it.
//! Those sums are exact. Scales of weights and of activations are multiplied where they are few, and then spread to
//! the lanes.

use std::arch::x86_64::*;

use super::{BLOCK, IQ4_VALUES, MXFP4_VALUES, Numerics, Q4_0_OFFSET, Q8_0_BYTES, Quantized, RowKernel};
use crate::ggml;

pub fn is_available() -> bool {
    is_x86_feature_detected!("avx512bw") && is_x86_feature_detected!("avx512vnni")
}

pub fn kernel(ty: i32, numerics: Numerics) -> Option<RowKernel> {
    Some(match ty as u32 {
        ggml::GGML_TYPE_Q4_0 if numerics == Numerics::Cuda => of::<Q4_0AsCuda>("q4_0 avx512"),
        ggml::GGML_TYPE_Q4_0 => of::<Q4_0>("q4_0 avx512"),
        ggml::GGML_TYPE_IQ4_NL => of::<Iq4Nl>("iq4_nl avx512"),
        ggml::GGML_TYPE_MXFP4 => of::<Mxfp4>("mxfp4 avx512"),
        ggml::GGML_TYPE_Q8_0 => of::<Q8_0>("q8_0 avx512"),
        ggml::GGML_TYPE_Q4_K => of::<Q4K>("q4_K avx512"),
        ggml::GGML_TYPE_Q5_K => of::<Q5K>("q5_K avx512"),
        ggml::GGML_TYPE_Q6_K => of::<Q6K>("q6_K avx512"),
        ggml::GGML_TYPE_IQ4_XS => of::<Iq4Xs>("iq4_xs avx512"),
        _ => return None,
    })
}

super::row_loops!("avx512bw,avx512vnni");

/// Rounds a block of an activation; its scale.
///
/// # Safety
/// There are 32 elements, and room for them.
#[inline]
#[target_feature(enable = "avx512bw,avx512vnni")]
unsafe fn quantize(x: *const f32, q: *mut i8) -> f32 {
    // SAFETY: passed on.
    let x = unsafe { [_mm512_loadu_ps(x), _mm512_loadu_ps(x.add(16))] };
    // by their bits, so that what is no number is the largest
    let size = |i: usize| _mm512_castps_si512(_mm512_abs_ps(x[i]));
    let scale = f32::from_bits(_mm512_reduce_max_epi32(_mm512_max_epi32(size(0), size(1))) as u32) / 127.0;
    if scale.is_normal() {
        let by = _mm512_set1_ps(1.0 / scale);
        for (i, x) in x.into_iter().enumerate() {
            let x = _mm512_mul_ps(x, by);
            // halves away from zero
            let (sign, half) = (_mm512_set1_epi32(i32::MIN), _mm512_castps_si512(_mm512_set1_ps(0.5)));
            let half = _mm512_ternarylogic_epi32::<0xea>(_mm512_castps_si512(x), sign, half);
            let x = _mm512_add_ps(x, _mm512_castsi512_ps(half));
            let rounded = _mm512_cvtepi32_epi8(_mm512_cvttps_epi32(x));
            // SAFETY: passed on.
            unsafe { _mm_storeu_si128(q.add(i * 16).cast(), rounded) };
        }
    }
    scale
}

/// A row's product with an activation, so far.
#[derive(Clone, Copy)]
struct Sum {
    products: __m512,
    /// What the minimums of a type take away; kept apart, since it is as large as what remains.
    mins: __m256,
}

impl Sum {
    #[inline]
    #[target_feature(enable = "avx512bw,avx512vnni")]
    fn zero() -> Self {
        Sum { products: _mm512_setzero_ps(), mins: _mm256_setzero_ps() }
    }

    #[inline]
    #[target_feature(enable = "avx512bw,avx512vnni")]
    fn add(self, products: __m512, scale: __m512) -> Self {
        Sum { products: _mm512_fmadd_ps(products, scale, self.products), ..self }
    }

    #[inline]
    #[target_feature(enable = "avx512bw,avx512vnni")]
    fn total(self) -> f32 {
        // in double precision, since products and minimums nearly cancel each other
        let low = _mm512_cvtps_pd(_mm512_castps512_ps256(self.products));
        let high = _mm512_cvtps_pd(_mm256_castsi256_ps(_mm512_extracti64x4_epi64::<1>(_mm512_castps_si512(
            self.products,
        ))));
        _mm512_reduce_add_pd(_mm512_sub_pd(_mm512_add_pd(low, high), _mm512_cvtps_pd(self.mins))) as f32
    }
}

/// Four pieces of 16 bytes, `stride` apart.
#[inline]
#[target_feature(enable = "avx512bw,avx512vnni")]
unsafe fn pieces<const STRIDE: usize>(at: *const u8) -> __m512i {
    // SAFETY: the caller has the bytes.
    unsafe {
        let piece = |i: usize| _mm_loadu_si128(at.add(i * STRIDE).cast());
        let x = _mm512_castsi128_si512(piece(0));
        let x = _mm512_inserti32x4::<1>(x, piece(1));
        let x = _mm512_inserti32x4::<2>(x, piece(2));
        _mm512_inserti32x4::<3>(x, piece(3))
    }
}

/// Two pieces of 32 bytes, `stride` apart.
#[inline]
#[target_feature(enable = "avx512bw,avx512vnni")]
unsafe fn halves<const STRIDE: usize>(at: *const u8) -> __m512i {
    // SAFETY: the caller has the bytes.
    unsafe {
        let x = _mm512_castsi256_si512(_mm256_loadu_si256(at.cast()));
        _mm512_inserti64x4::<1>(x, _mm256_loadu_si256(at.add(STRIDE).cast()))
    }
}

#[inline]
#[target_feature(enable = "avx512bw,avx512vnni")]
unsafe fn load(at: *const u8) -> __m512i {
    // SAFETY: the caller has 64 bytes.
    unsafe { _mm512_loadu_si512(at.cast()) }
}

/// The low and the high nibbles of all bytes.
#[inline]
#[target_feature(enable = "avx512bw,avx512vnni")]
fn nibbles(x: __m512i) -> [__m512i; 2] {
    let low = _mm512_set1_epi8(0x0f);
    [_mm512_and_si512(x, low), _mm512_and_si512(_mm512_srli_epi16::<4>(x), low)]
}

/// The values that nibbles stand for, moved up by `TABLE_OFFSET` to unsigned bytes.
#[inline]
#[target_feature(enable = "avx512bw,avx512vnni")]
fn values(table: &[i8; 16], nibbles: [__m512i; 2]) -> [__m512i; 2] {
    // SAFETY: the table has 16 bytes.
    let table = _mm512_broadcast_i32x4(unsafe { _mm_loadu_si128(table.as_ptr().cast()) });
    let table = _mm512_xor_si512(table, _mm512_set1_epi8(-128));
    [_mm512_shuffle_epi8(table, nibbles[0]), _mm512_shuffle_epi8(table, nibbles[1])]
}

const TABLE_OFFSET: i32 = 128;

/// What weights that are `offset` too large add to a lane's sum of products with these activations, negated.
#[inline]
#[target_feature(enable = "avx512bw,avx512vnni")]
fn correction<const N: usize>(acts: [__m512i; N], offset: i32) -> __m512i {
    let ones = _mm512_set1_epi8(1);
    let sum = acts.into_iter().fold(_mm512_setzero_si512(), |sum, a| _mm512_dpbusd_epi32(sum, ones, a));
    _mm512_mullo_epi32(sum, _mm512_set1_epi32(-offset))
}

/// 16-bit words of a register by their index, converted from half precision.
#[inline]
#[target_feature(enable = "avx512bw,avx512vnni")]
fn words_to_f32(index: [i16; 16], from: __m512i) -> __m512 {
    // SAFETY: the array has 32 bytes.
    let index = unsafe { _mm256_loadu_si256(index.as_ptr().cast()) };
    let words = _mm512_permutexvar_epi16(_mm512_castsi256_si512(index), from);
    _mm512_cvtph_ps(_mm512_castsi512_si256(words))
}

#[inline]
#[target_feature(enable = "avx512bw,avx512vnni")]
unsafe fn half(at: *const u8) -> f32 {
    // SAFETY: the caller has two bytes.
    let bits = unsafe { at.cast::<i16>().read_unaligned() };
    _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(bits.into())))
}

/// As often as fits, each of some values.
const fn spread<T: Copy, const N: usize, const M: usize>(values: [T; N]) -> [T; M] {
    let mut out = [values[0]; M];
    let mut i = 0;
    while i < M {
        out[i] = values[i * N / M];
        i += 1;
    }
    out
}

/// Four blocks of 32: a block's 16 bytes are a quarter of a register, their low nibbles its first 16 weights, the high
/// ones the others.
#[repr(C, align(64))]
struct FourBlocks {
    low: __m512i,
    high: __m512i,
    correction: __m512i,
    scale: __m512,
}

struct Nibbles {
    q: [__m512i; 2],
    scale: __m512,
}

#[inline]
#[target_feature(enable = "avx512bw,avx512vnni")]
fn lanes<const N: usize>(values: [f32; N]) -> __m512 {
    // SAFETY: the array has 64 bytes.
    unsafe { _mm512_loadu_ps(spread::<_, N, 16>(values).as_ptr()) }
}

/// Activations in the order of `Nibbles`.
#[inline]
#[target_feature(enable = "avx512bw,avx512vnni")]
fn four_blocks(act: &Quantized) -> ([__m512i; 2], __m512) {
    let q: *const u8 = act.q.as_ptr().cast();
    let [a, b, c, d, ..] = act.scale;
    // SAFETY: these are the first four blocks.
    (unsafe { [pieces::<BLOCK>(q), pieces::<BLOCK>(q.add(16))] }, lanes([a, b, c, d]))
}

#[inline]
#[target_feature(enable = "avx512bw,avx512vnni")]
fn prepare_nibbles(act: &Quantized, offset: i32) -> FourBlocks {
    let ([low, high], scale) = four_blocks(act);
    FourBlocks { low, high, correction: correction([low, high], offset), scale }
}

#[inline]
#[target_feature(enable = "avx512bw,avx512vnni")]
fn dot_nibbles(w: &Nibbles, act: &FourBlocks, sum: Sum) -> Sum {
    let products = _mm512_dpbusd_epi32(act.correction, w.q[0], act.low);
    let products = _mm512_dpbusd_epi32(products, w.q[1], act.high);
    sum.add(_mm512_cvtepi32_ps(products), _mm512_mul_ps(w.scale, act.scale))
}

/// q4_0 and iq4_nl: a scale in half precision, then 16 bytes.
const Q4_BYTES: usize = 18;

#[inline]
#[target_feature(enable = "avx512bw,avx512vnni")]
unsafe fn q4_scales(w: *const u8) -> __m512 {
    // the last of the scales begins at byte 54
    // SAFETY: the caller has four blocks, 72 bytes.
    words_to_f32(const { spread([0, 9, 18, 27]) }, unsafe { load(w) })
}

macro_rules! four_blocks {
    ($name:ident, $bytes:expr, $offset:expr, |$w:ident| $decode:expr) => {
        struct $name;

        impl Format for $name {
            const N: usize = 4 * 32;
            const BYTES: usize = 4 * $bytes;
            type Act = FourBlocks;
            type Weights = Nibbles;

            #[inline]
            #[target_feature(enable = "avx512bw,avx512vnni")]
            unsafe fn prepare(act: &Quantized) -> FourBlocks {
                prepare_nibbles(act, $offset)
            }

            #[inline]
            #[target_feature(enable = "avx512bw,avx512vnni")]
            unsafe fn decode($w: *const u8) -> Nibbles {
                // SAFETY: passed on.
                unsafe { $decode }
            }

            #[inline]
            #[target_feature(enable = "avx512bw,avx512vnni")]
            unsafe fn dot(w: &Nibbles, act: &FourBlocks, sum: Sum) -> Sum {
                dot_nibbles(w, act, sum)
            }
        }
    };
}

four_blocks!(Q4_0, Q4_BYTES, Q4_0_OFFSET.into(), |w| Nibbles {
    q: nibbles(pieces::<Q4_BYTES>(w.add(2))),
    scale: q4_scales(w)
});

/// q4_0 with the sums of CUDA's kernel.
struct Q4_0AsCuda;

/// As `FourBlocks`, for weights that are taken as they are.
#[repr(C, align(64))]
struct FourBlocksAsCuda {
    low: __m512i,
    high: __m512i,
    scale: __m512,
    /// What the offset of the weights adds to a lane, negated.
    correction: __m512,
}

impl Format for Q4_0AsCuda {
    const N: usize = Q4_0::N;
    const BYTES: usize = Q4_0::BYTES;
    const ELEMENT_SUMS: bool = true;
    type Act = FourBlocksAsCuda;
    type Weights = Nibbles;

    #[inline]
    #[target_feature(enable = "avx512bw,avx512vnni")]
    unsafe fn prepare(act: &Quantized) -> FourBlocksAsCuda {
        let ([low, high], scale) = four_blocks(act);
        let [a, b, c, d, ..] = act.q4_0_corrections();
        FourBlocksAsCuda { low, high, scale, correction: lanes([a, b, c, d]) }
    }

    #[inline]
    #[target_feature(enable = "avx512bw,avx512vnni")]
    unsafe fn decode(w: *const u8) -> Nibbles {
        // SAFETY: passed on.
        unsafe { Q4_0::decode(w) }
    }

    #[inline]
    #[target_feature(enable = "avx512bw,avx512vnni")]
    unsafe fn dot(w: &Nibbles, act: &FourBlocksAsCuda, sum: Sum) -> Sum {
        let products = _mm512_dpbusd_epi32(_mm512_setzero_si512(), w.q[0], act.low);
        let products = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(products, w.q[1], act.high));
        sum.add(_mm512_fmadd_ps(products, act.scale, act.correction), w.scale)
    }
}

four_blocks!(Iq4Nl, Q4_BYTES, TABLE_OFFSET, |w| Nibbles {
    q: values(&IQ4_VALUES, nibbles(pieces::<Q4_BYTES>(w.add(2)))),
    scale: q4_scales(w),
});

/// mxfp4: an exponent, then 16 bytes.
const MXFP4_BYTES: usize = 17;

four_blocks!(Mxfp4, MXFP4_BYTES, TABLE_OFFSET, |w| Nibbles {
    q: values(&MXFP4_VALUES, nibbles(pieces::<MXFP4_BYTES>(w.add(1)))),
    scale: mxfp4_scales(w),
});

/// Half of what the exponents say, since the table's values are doubled: 2^(e - 128).
#[inline]
#[target_feature(enable = "avx512bw,avx512vnni")]
unsafe fn mxfp4_scales(w: *const u8) -> __m512 {
    // SAFETY: the caller has four blocks.
    let x = unsafe { pieces::<MXFP4_BYTES>(w) };
    // the first byte of each quarter to all its lanes
    let e = _mm512_shuffle_epi8(x, _mm512_set1_epi32(0x8080_8000_u32 as i32));
    let bits = _mm512_slli_epi32::<23>(_mm512_sub_epi32(e, _mm512_set1_epi32(1)));
    // the two smallest are denormal
    let small = _mm512_cmplt_epu32_mask(e, _mm512_set1_epi32(2));
    _mm512_castsi512_ps(_mm512_mask_sllv_epi32(bits, small, _mm512_set1_epi32(0x0020_0000), e))
}

/// q8_0 by q8_0, two blocks.
struct Q8_0;

#[repr(C, align(64))]
struct TwoBlocks {
    q: __m512i,
    correction: __m512i,
    scale: __m512,
}

struct Bytes {
    q: __m512i,
    scale: __m512,
}

impl Q8_0 {
    /// The scales of two blocks, each for half of the lanes.
    #[inline]
    #[target_feature(enable = "avx512bw,avx512vnni")]
    unsafe fn scales(at: *const u8) -> __m512 {
        // SAFETY: the caller has two blocks, 68 bytes.
        words_to_f32(const { spread([0, 17]) }, unsafe { load(at) })
    }
}

impl Format for Q8_0 {
    const N: usize = 2 * 32;
    const BYTES: usize = 2 * Q8_0_BYTES;
    type Act = TwoBlocks;
    type Weights = Bytes;

    #[inline]
    #[target_feature(enable = "avx512bw,avx512vnni")]
    unsafe fn prepare(act: &Quantized) -> TwoBlocks {
        // SAFETY: there are more than 64.
        let q = unsafe { load(act.q.as_ptr().cast()) };
        let [a, b, ..] = act.scale;
        TwoBlocks { q, correction: correction([q], 128), scale: lanes([a, b]) }
    }

    #[inline]
    #[target_feature(enable = "avx512bw,avx512vnni")]
    unsafe fn decode(w: *const u8) -> Bytes {
        // SAFETY: passed on.
        unsafe {
            let signed = halves::<Q8_0_BYTES>(w.add(2));
            Bytes { q: _mm512_xor_si512(signed, _mm512_set1_epi8(-128)), scale: Q8_0::scales(w) }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512bw,avx512vnni")]
    unsafe fn dot(w: &Bytes, act: &TwoBlocks, sum: Sum) -> Sum {
        let products = _mm512_dpbusd_epi32(act.correction, w.q, act.q);
        sum.add(_mm512_cvtepi32_ps(products), _mm512_mul_ps(w.scale, act.scale))
    }
}

/// The activation of 256 weights of q4_K or q5_K: two blocks to a register, as two times 32 bytes of nibbles come out
/// of one.
#[repr(C, align(64))]
struct WithSums {
    q: [__m512i; 4],
    scale: __m256,
    /// What a block adds up to is what its minimum is multiplied with.
    sums: __m256,
}

/// Which blocks are in `q`.
const BLOCKS_OF: [[i32; 2]; 4] = [[0, 2], [1, 3], [4, 6], [5, 7]];

#[inline]
#[target_feature(enable = "avx512bw,avx512vnni")]
fn prepare_q45_k(act: &Quantized) -> WithSums {
    // SAFETY: there are 8 blocks, scales and sums.
    unsafe {
        let block = |b: i32| _mm256_loadu_si256(act.q.as_ptr().add(b as usize * BLOCK).cast());
        WithSums {
            q: BLOCKS_OF.map(|[a, b]| _mm512_inserti64x4::<1>(_mm512_castsi256_si512(block(a)), block(b))),
            scale: _mm256_loadu_ps(act.scale.as_ptr()),
            sums: _mm256_loadu_ps(act.sums().as_ptr()),
        }
    }
}

/// The weights of q4_K or q5_K. Scales and minimums are those of blocks.
struct WithMins {
    q: [__m512i; 4],
    scale: __m256,
    mins: __m256,
    d: f32,
    d_min: f32,
}

/// For each lane the number that `index` says.
#[inline]
#[target_feature(enable = "avx512bw,avx512vnni")]
fn select(index: &[i32; 16], from: __m512) -> __m512 {
    // SAFETY: the array has 64 bytes.
    _mm512_permutexvar_ps(unsafe { _mm512_loadu_si512(index.as_ptr().cast()) }, from)
}

/// Products of four registers, by those of the scales that `index` says.
#[inline]
#[target_feature(enable = "avx512bw,avx512vnni")]
fn sum_of_four(products: [__m512i; 4], index: &[[i32; 16]; 4], scales: __m512) -> __m512 {
    let scale = |i: usize| select(&index[i], scales);
    let add = |sum, i: usize| _mm512_fmadd_ps(_mm512_cvtepi32_ps(products[i]), scale(i), sum);
    add(add(add(_mm512_mul_ps(_mm512_cvtepi32_ps(products[0]), scale(0)), 1), 2), 3)
}

/// What q4_K and q5_K begin with: two scales in half precision, eight 6-bit scales and minimums.
#[inline]
#[target_feature(enable = "avx512bw,avx512vnni")]
unsafe fn decode_q45_k(w: *const u8, q: [__m512i; 4]) -> WithMins {
    // SAFETY: the caller has a block.
    let [a, b, c] = unsafe { w.add(4).cast::<[u32; 3]>().read_unaligned() };
    let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
    let scales = pair(a & 0x3f3f_3f3f, c & 0x0f0f_0f0f | a >> 2 & 0x3030_3030);
    let mins = pair(b & 0x3f3f_3f3f, c >> 4 & 0x0f0f_0f0f | b >> 2 & 0x3030_3030);
    let floats = |x: u64| _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(x as i64)));
    // SAFETY: as above.
    let (d, d_min) = unsafe { (half(w), half(w.add(2))) };
    WithMins { q, scale: floats(scales), mins: floats(mins), d, d_min }
}

#[inline]
#[target_feature(enable = "avx512bw,avx512vnni")]
fn dot_q45_k(w: &WithMins, act: &WithSums, sum: Sum) -> Sum {
    const INDEX: [[i32; 16]; 4] =
        [spread(BLOCKS_OF[0]), spread(BLOCKS_OF[1]), spread(BLOCKS_OF[2]), spread(BLOCKS_OF[3])];
    let scales = _mm512_castps256_ps512(_mm256_mul_ps(w.scale, act.scale));
    let products = |i: usize| _mm512_dpbusd_epi32(_mm512_setzero_si512(), w.q[i], act.q[i]);
    let four = sum_of_four([products(0), products(1), products(2), products(3)], &INDEX, scales);
    let mins = _mm256_mul_ps(w.mins, act.sums);
    Sum {
        mins: _mm256_fmadd_ps(mins, _mm256_set1_ps(w.d_min), sum.mins),
        ..sum.add(four, _mm512_set1_ps(w.d))
    }
}

macro_rules! with_mins {
    ($name:ident, $bytes:expr, |$w:ident| $decode:expr) => {
        struct $name;

        impl Format for $name {
            const N: usize = 256;
            const BYTES: usize = $bytes;
            type Act = WithSums;
            type Weights = WithMins;

            #[inline]
            #[target_feature(enable = "avx512bw,avx512vnni")]
            unsafe fn prepare(act: &Quantized) -> WithSums {
                prepare_q45_k(act)
            }

            #[inline]
            #[target_feature(enable = "avx512bw,avx512vnni")]
            unsafe fn decode($w: *const u8) -> WithMins {
                // SAFETY: passed on.
                unsafe { decode_q45_k($w, $decode) }
            }

            #[inline]
            #[target_feature(enable = "avx512bw,avx512vnni")]
            unsafe fn dot(w: &WithMins, act: &WithSums, sum: Sum) -> Sum {
                dot_q45_k(w, act, sum)
            }
        }
    };
}

/// Before the weights of q4_K, and before the high bits of those of q5_K.
const HEAD: usize = 2 + 2 + 12;

with_mins!(Q4K, HEAD + 128, |w| {
    let [a, b] = nibbles(load(w.add(HEAD)));
    let [c, d] = nibbles(load(w.add(HEAD + 64)));
    [a, b, c, d]
});

with_mins!(Q5K, HEAD + 32 + 128, |w| {
    // bit i of byte k: the fifth of weight 32 * i + k
    let high = _mm512_broadcast_i64x4(_mm256_loadu_si256(w.add(HEAD).cast()));
    let fifth = |q: __m512i, bit: u32| {
        let bits = _mm512_inserti64x4::<1>(
            _mm512_set1_epi8((1u8 << bit) as i8),
            _mm256_set1_epi8((1u8 << (bit + 2)) as i8),
        );
        _mm512_mask_add_epi8(q, _mm512_test_epi8_mask(high, bits), q, _mm512_set1_epi8(16))
    };
    let [a, b] = nibbles(load(w.add(HEAD + 32)));
    let [c, d] = nibbles(load(w.add(HEAD + 32 + 64)));
    [fifth(a, 0), fifth(b, 1), fifth(c, 4), fifth(d, 5)]
});

struct Q6K;

/// The activation of 256 weights of q6_K, two blocks to a register. Weights are 32 less than their bits say.
#[repr(C, align(64))]
struct WithOffset {
    q: [__m512i; 4],
    /// Each twice.
    scale: __m512,
    /// A quarter of what that adds to the sum of 16 products, negated: of the four sums of register i in lanes i, i + 4,
    /// i + 8 and i + 12.
    correction: __m512i,
}

struct Sixteens {
    q: [__m512i; 4],
    scale: __m512,
    d: f32,
}

impl Format for Q6K {
    const N: usize = 256;
    const BYTES: usize = 128 + 64 + 16 + 2;
    type Act = WithOffset;
    type Weights = Sixteens;

    #[inline]
    #[target_feature(enable = "avx512bw,avx512vnni")]
    unsafe fn prepare(act: &Quantized) -> WithOffset {
        // SAFETY: there are 256.
        let q = [0, 64, 128, 192].map(|first| unsafe { load(act.q.as_ptr().add(first).cast()) });
        let sum = |i: usize| act.q[i * 16..][..16].iter().map(|q| i32::from(*q)).sum::<i32>();
        let correction: [i32; 16] = std::array::from_fn(|lane| -32 / 4 * sum(lane % 4 * 4 + lane / 4));
        // SAFETY: the array has 64 bytes.
        let correction = unsafe { _mm512_loadu_si512(correction.as_ptr().cast()) };
        WithOffset { q, scale: lanes(act.scale), correction }
    }

    #[inline]
    #[target_feature(enable = "avx512bw,avx512vnni")]
    unsafe fn decode(w: *const u8) -> Sixteens {
        // SAFETY: the caller has a block.
        unsafe {
            let two_bits = _mm512_set1_epi8(0x30);
            let shift = |a: i16, b: i16| _mm512_inserti64x4::<1>(_mm512_set1_epi16(a), _mm256_set1_epi16(b));
            // 128 weights: the low nibbles of 64 bytes, then the high ones; the two bits above them for weight k of
            // each 32 in byte k, from the lowest up
            let part = |i: usize| {
                let high = _mm512_broadcast_i64x4(_mm256_loadu_si256(w.add(128 + i * 32).cast()));
                let [a, b] = nibbles(load(w.add(i * 64)));
                let first = _mm512_and_si512(_mm512_sllv_epi16(high, shift(4, 2)), two_bits);
                let second = _mm512_and_si512(_mm512_srlv_epi16(high, shift(0, 2)), two_bits);
                [_mm512_or_si512(a, first), _mm512_or_si512(b, second)]
            };
            let ([a, b], [c, d]) = (part(0), part(1));
            let scales = _mm512_cvtepi8_epi32(_mm_loadu_si128(w.add(128 + 64).cast()));
            Sixteens { q: [a, b, c, d], scale: _mm512_cvtepi32_ps(scales), d: half(w.add(128 + 64 + 16)) }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512bw,avx512vnni")]
    unsafe fn dot(w: &Sixteens, act: &WithOffset, sum: Sum) -> Sum {
        const INDEX: [[i32; 16]; 4] =
            [spread([0, 1, 2, 3]), spread([4, 5, 6, 7]), spread([8, 9, 10, 11]), spread([12, 13, 14, 15])];
        // one to the four lanes of its sum
        let products = [
            _mm512_dpbusd_epi32(_mm512_shuffle_epi32::<0b00_00_00_00>(act.correction), w.q[0], act.q[0]),
            _mm512_dpbusd_epi32(_mm512_shuffle_epi32::<0b01_01_01_01>(act.correction), w.q[1], act.q[1]),
            _mm512_dpbusd_epi32(_mm512_shuffle_epi32::<0b10_10_10_10>(act.correction), w.q[2], act.q[2]),
            _mm512_dpbusd_epi32(_mm512_shuffle_epi32::<0b11_11_11_11>(act.correction), w.q[3], act.q[3]),
        ];
        sum.add(sum_of_four(products, &INDEX, _mm512_mul_ps(w.scale, act.scale)), _mm512_set1_ps(w.d))
    }
}

struct Iq4Xs;

/// As `FourBlocks` with four sub-blocks of 32 each.
#[repr(C, align(64))]
struct EightBlocks {
    q: [[__m512i; 2]; 2],
    correction: [__m512i; 2],
    scale: __m256,
}

struct SubBlocks {
    q: [[__m512i; 2]; 2],
    /// Of each sub-block, whole numbers.
    scale: __m256,
    d: f32,
}

impl Format for Iq4Xs {
    const N: usize = 256;
    const BYTES: usize = 2 + 2 + 4 + 128;
    type Act = EightBlocks;
    type Weights = SubBlocks;

    #[inline]
    #[target_feature(enable = "avx512bw,avx512vnni")]
    unsafe fn prepare(act: &Quantized) -> EightBlocks {
        let q: *const u8 = act.q.as_ptr().cast();
        // SAFETY: there are 256.
        let q = unsafe {
            [
                [pieces::<BLOCK>(q), pieces::<BLOCK>(q.add(16))],
                [pieces::<BLOCK>(q.add(128)), pieces::<BLOCK>(q.add(128 + 16))],
            ]
        };
        EightBlocks {
            q,
            correction: [correction(q[0], TABLE_OFFSET), correction(q[1], TABLE_OFFSET)],
            // SAFETY: there are 8.
            scale: unsafe { _mm256_loadu_ps(act.scale.as_ptr()) },
        }
    }

    #[inline]
    #[target_feature(enable = "avx512bw,avx512vnni")]
    unsafe fn decode(w: *const u8) -> SubBlocks {
        // SAFETY: the caller has a block.
        unsafe {
            // of a sub-block's scale, four bits and two bits more
            let low = _mm256_set1_epi32(w.add(4).cast::<i32>().read_unaligned());
            let high = _mm256_set1_epi32(i32::from(w.add(2).cast::<u16>().read_unaligned()) << 4);
            let low = _mm256_srlv_epi32(low, _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
            let high = _mm256_srlv_epi32(high, _mm256_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14));
            let bits = _mm256_or_si256(
                _mm256_and_si256(low, _mm256_set1_epi32(0x0f)),
                _mm256_and_si256(high, _mm256_set1_epi32(0x30)),
            );
            let scale = _mm256_cvtepi32_ps(_mm256_sub_epi32(bits, _mm256_set1_epi32(32)));
            // not a closure for both: it would not be inlined
            let q = [
                values(&IQ4_VALUES, nibbles(load(w.add(8)))),
                values(&IQ4_VALUES, nibbles(load(w.add(8 + 64)))),
            ];
            SubBlocks { q, scale, d: half(w) }
        }
    }

    #[inline]
    #[target_feature(enable = "avx512bw,avx512vnni")]
    unsafe fn dot(w: &SubBlocks, act: &EightBlocks, sum: Sum) -> Sum {
        let part = |i: usize| {
            let products = _mm512_dpbusd_epi32(act.correction[i], w.q[i][0], act.q[i][0]);
            _mm512_dpbusd_epi32(products, w.q[i][1], act.q[i][1])
        };
        const INDEX: [[i32; 16]; 2] = [spread([0, 1, 2, 3]), spread([4, 5, 6, 7])];
        let scales = _mm512_castps256_ps512(_mm256_mul_ps(w.scale, act.scale));
        let first = _mm512_mul_ps(_mm512_cvtepi32_ps(part(0)), select(&INDEX[0], scales));
        let both = _mm512_fmadd_ps(_mm512_cvtepi32_ps(part(1)), select(&INDEX[1], scales), first);
        sum.add(both, _mm512_set1_ps(w.d))
    }
}
