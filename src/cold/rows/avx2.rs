//! With AVX2 and FMA, for most CPUs without AVX-512: 32 weights in a register.
//!
//! `maddubs` multiplies unsigned by signed bytes and adds pairs to 16 bits, which limits what the unsigned side may
//! be. Bits of a quant fit as they are; where they have an offset, the prepared activation holds what it adds, negated.
//! Values of a table and whole bytes go in without their signs, which the activations take over.

use std::arch::x86_64::*;

use super::{IQ4_VALUES, MXFP4_VALUES, Q8_0_BYTES, Q8_K_BYTES, RowKernel, spread};
use crate::ggml;

pub fn is_available() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
}

pub fn kernel(ty: i32) -> Option<RowKernel> {
    Some(match ty as u32 {
        ggml::GGML_TYPE_Q4_0 => of::<Q4_0>("q4_0 avx2"),
        ggml::GGML_TYPE_IQ4_NL => of::<Iq4Nl>("iq4_nl avx2"),
        ggml::GGML_TYPE_MXFP4 => of::<Mxfp4>("mxfp4 avx2"),
        ggml::GGML_TYPE_Q8_0 => of::<Q8_0>("q8_0 avx2"),
        ggml::GGML_TYPE_Q4_K => of::<Q4K>("q4_K avx2"),
        ggml::GGML_TYPE_Q5_K => of::<Q5K>("q5_K avx2"),
        ggml::GGML_TYPE_Q6_K => of::<Q6K>("q6_K avx2"),
        ggml::GGML_TYPE_IQ4_XS => of::<Iq4Xs>("iq4_xs avx2"),
        _ => return None,
    })
}

super::row_loops!("avx2,fma,f16c");

/// A row's product with an activation, so far.
#[derive(Clone, Copy)]
struct Sum {
    products: __m256,
    /// What the minimums of a type take away; kept apart, since it is as large as what remains.
    mins: __m128,
}

impl Sum {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn zero() -> Self {
        Sum { products: _mm256_setzero_ps(), mins: _mm_setzero_ps() }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn add(self, products: __m256, scale: __m256) -> Self {
        Sum { products: _mm256_fmadd_ps(products, scale, self.products), ..self }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn total(self) -> f32 {
        // in double precision, since products and minimums nearly cancel each other
        let low = _mm256_cvtps_pd(_mm256_castps256_ps128(self.products));
        let high = _mm256_cvtps_pd(_mm256_extractf128_ps::<1>(self.products));
        let four = _mm256_sub_pd(_mm256_add_pd(low, high), _mm256_cvtps_pd(self.mins));
        let two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd::<1>(four));
        _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two))) as f32
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn load(at: *const u8) -> __m256i {
    // SAFETY: the caller has 32 bytes.
    unsafe { _mm256_loadu_si256(at.cast()) }
}

/// Two pieces of 16 bytes, `STRIDE` apart.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn pieces<const STRIDE: usize>(at: *const u8) -> __m256i {
    // SAFETY: the caller has the bytes.
    unsafe {
        let low = _mm256_castsi128_si256(_mm_loadu_si128(at.cast()));
        _mm256_inserti128_si256::<1>(low, _mm_loadu_si128(at.add(STRIDE).cast()))
    }
}

/// The low and the high nibbles of all bytes.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn nibbles(x: __m256i) -> [__m256i; 2] {
    let low = _mm256_set1_epi8(0x0f);
    [_mm256_and_si256(x, low), _mm256_and_si256(_mm256_srli_epi16::<4>(x), low)]
}

/// The values that nibbles stand for.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn values(table: &[i8; 16], nibbles: [__m256i; 2]) -> [__m256i; 2] {
    // SAFETY: the table has 16 bytes.
    let table = _mm256_broadcastsi128_si256(unsafe { _mm_loadu_si128(table.as_ptr().cast()) });
    [_mm256_shuffle_epi8(table, nibbles[0]), _mm256_shuffle_epi8(table, nibbles[1])]
}

/// Sums of neighbouring 16-bit numbers.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn pairs(x: __m256i) -> __m256i {
    _mm256_madd_epi16(x, _mm256_set1_epi16(1))
}

/// Sums of four products of signed bytes, none of the activations -128.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn signed_products(w: __m256i, act: __m256i) -> __m256i {
    pairs(_mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(act, w)))
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn half(at: *const u8) -> f32 {
    // SAFETY: the caller has two bytes.
    let bits = unsafe { at.cast::<i16>().read_unaligned() };
    _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(bits.into())))
}

/// The first number for the lower half of the lanes, the second for the upper.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn halves(low: f32, high: f32) -> __m256 {
    _mm256_set_m128(_mm_set1_ps(high), _mm_set1_ps(low))
}

/// Two blocks of 32 with an activation of q8_0: a block's 16 bytes are a half of a register, their low nibbles its
/// first 16 weights, the high ones the others.
#[repr(C, align(64))]
struct TwoBlocks {
    low: __m256i,
    high: __m256i,
    /// What weights add that are too large by their offset, negated.
    correction: __m256i,
    scale: __m256,
}

struct Nibbles {
    q: [__m256i; 2],
    scale: __m256,
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn prepare_nibbles(act: *const u8, offset: i32) -> TwoBlocks {
    // SAFETY: the caller has two blocks.
    unsafe {
        let low = pieces::<Q8_0_BYTES>(act.add(2));
        let high = pieces::<Q8_0_BYTES>(act.add(2 + 16));
        let ones = _mm256_set1_epi8(1);
        let sums = pairs(_mm256_add_epi16(_mm256_maddubs_epi16(ones, low), _mm256_maddubs_epi16(ones, high)));
        let correction = _mm256_mullo_epi32(sums, _mm256_set1_epi32(-offset));
        TwoBlocks { low, high, correction, scale: halves(half(act), half(act.add(Q8_0_BYTES))) }
    }
}

macro_rules! two_blocks {
    ($name:ident, $bytes:expr, $offset:expr, |$w:ident| $decode:expr, |$q:ident, $act:ident| $products:expr) => {
        struct $name;

        impl Format for $name {
            const N: usize = 2 * 32;
            const BYTES: usize = 2 * $bytes;
            const GGML_ACT_BYTES: usize = 2 * Q8_0_BYTES;
            type Act = TwoBlocks;
            type Weights = Nibbles;

            #[inline]
            #[target_feature(enable = "avx2,fma,f16c")]
            unsafe fn prepare(act: *const u8) -> TwoBlocks {
                // SAFETY: passed on.
                unsafe { prepare_nibbles(act, $offset) }
            }

            #[inline]
            #[target_feature(enable = "avx2,fma,f16c")]
            unsafe fn decode($w: *const u8) -> Nibbles {
                // SAFETY: passed on.
                unsafe { $decode }
            }

            #[inline]
            #[target_feature(enable = "avx2,fma,f16c")]
            unsafe fn dot(w: &Nibbles, $act: &TwoBlocks, sum: Sum) -> Sum {
                let $q = &w.q;
                let products = $products;
                sum.add(_mm256_cvtepi32_ps(products), _mm256_mul_ps(w.scale, $act.scale))
            }
        }
    };
}

/// q4_0 and iq4_nl: a scale in half precision, then 16 bytes.
const Q4_BYTES: usize = 2 + 16;
/// mxfp4: an exponent, then 16 bytes.
const MXFP4_BYTES: usize = 1 + 16;

two_blocks!(
    Q4_0,
    Q4_BYTES,
    8,
    |w| Nibbles { q: nibbles(pieces::<Q4_BYTES>(w.add(2))), scale: halves(half(w), half(w.add(Q4_BYTES))) },
    |q, act| {
        // two pairs of 15 * 127 fit 16 bits
        let both =
            _mm256_add_epi16(_mm256_maddubs_epi16(q[0], act.low), _mm256_maddubs_epi16(q[1], act.high));
        _mm256_add_epi32(pairs(both), act.correction)
    }
);

two_blocks!(
    Iq4Nl,
    Q4_BYTES,
    0,
    |w| Nibbles {
        q: values(&IQ4_VALUES, nibbles(pieces::<Q4_BYTES>(w.add(2)))),
        scale: halves(half(w), half(w.add(Q4_BYTES)))
    },
    |q, act| _mm256_add_epi32(signed_products(q[0], act.low), signed_products(q[1], act.high))
);

two_blocks!(
    Mxfp4,
    MXFP4_BYTES,
    0,
    |w| Nibbles {
        q: values(&MXFP4_VALUES, nibbles(pieces::<MXFP4_BYTES>(w.add(1)))),
        scale: halves(exponent(w), exponent(w.add(MXFP4_BYTES))),
    },
    |q, act| _mm256_add_epi32(signed_products(q[0], act.low), signed_products(q[1], act.high))
);

/// Half of what an exponent says, since the table's values are doubled: 2^(e - 128), the two smallest denormal.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn exponent(at: *const u8) -> f32 {
    // SAFETY: the caller has a byte.
    let e = u32::from(unsafe { *at });
    f32::from_bits(if e < 2 { 0x0020_0000 << e } else { (e - 1) << 23 })
}

/// q8_0 by q8_0, a block.
struct Q8_0;

#[repr(C, align(64))]
struct OneBlock {
    q: __m256i,
    scale: f32,
}

impl Format for Q8_0 {
    const N: usize = 32;
    const BYTES: usize = Q8_0_BYTES;
    const GGML_ACT_BYTES: usize = Q8_0_BYTES;
    type Act = OneBlock;
    type Weights = OneBlock;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn prepare(act: *const u8) -> OneBlock {
        // SAFETY: the caller has a block.
        unsafe { OneBlock { q: load(act.add(2)), scale: half(act) } }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn decode(w: *const u8) -> OneBlock {
        // SAFETY: the caller has a block.
        unsafe { OneBlock { q: load(w.add(2)), scale: half(w) } }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn dot(w: &OneBlock, act: &OneBlock, sum: Sum) -> Sum {
        let products = _mm256_cvtepi32_ps(signed_products(w.q, act.q));
        sum.add(products, _mm256_set1_ps(w.scale * act.scale))
    }
}

/// The activation of a k-quant's 256 weights.
#[repr(C, align(64))]
struct Super {
    q: [__m256i; 8],
    /// Of as many activations as share a minimum (q4_K, q5_K: 32) or a scale (q6_K: 16).
    sums: __m256i,
    scale: f32,
}

impl Super {
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn new(act: *const u8) -> Self {
        // SAFETY: the caller has a block.
        unsafe {
            Super {
                q: act.add(4).cast::<[__m256i; 8]>().read_unaligned(),
                sums: load(act.add(4 + 256)),
                scale: act.cast::<f32>().read_unaligned(),
            }
        }
    }
}

/// 16 numbers of 16 bits that the products of 32 weights are multiplied with, from a byte each.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn scale_of(bytes: __m128i, index: &[i8; 16]) -> __m256i {
    // SAFETY: the index has 16 bytes.
    let index = unsafe { _mm_loadu_si128(index.as_ptr().cast()) };
    _mm256_cvtepi8_epi16(_mm_shuffle_epi8(bytes, index))
}

/// For each 32 weights which bytes those are, when 32 or 16 share a scale.
const BY_32: [[i8; 16]; 8] = [[0; 16], [1; 16], [2; 16], [3; 16], [4; 16], [5; 16], [6; 16], [7; 16]];
const BY_16: [[i8; 16]; 8] = [
    spread([0, 1]),
    spread([2, 3]),
    spread([4, 5]),
    spread([6, 7]),
    spread([8, 9]),
    spread([10, 11]),
    spread([12, 13]),
    spread([14, 15]),
];

/// The weights of a k-quant, their scales, and what has to be taken away.
struct Scaled {
    q: [__m256i; 8],
    /// A byte each; 6 bits, or signed.
    scales: __m128i,
    /// Minimums of q4_K and q5_K in 16 bits.
    mins: __m128i,
    d: f32,
    d_min: f32,
}

/// The sum of pairs of products by their scales.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn scaled(w: &Scaled, index: &[[i8; 16]; 8], act: &Super) -> __m256i {
    let mut sum = _mm256_setzero_si256();
    for ((q, act), index) in w.q.iter().zip(&act.q).zip(index) {
        let products = _mm256_maddubs_epi16(*q, *act);
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(products, scale_of(w.scales, index)));
    }
    sum
}

/// What q4_K and q5_K begin with: two scales in half precision, eight 6-bit scales and minimums.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn decode_q45_k(w: *const u8, q: [__m256i; 8]) -> Scaled {
    // SAFETY: the caller has a block.
    unsafe {
        let [a, b, c] = w.add(4).cast::<[u32; 3]>().read_unaligned();
        let pair = |low: u32, high: u32| (u64::from(low) | u64::from(high) << 32) as i64;
        let scales = pair(a & 0x3f3f_3f3f, c & 0x0f0f_0f0f | a >> 2 & 0x3030_3030);
        let mins = pair(b & 0x3f3f_3f3f, c >> 4 & 0x0f0f_0f0f | b >> 2 & 0x3030_3030);
        Scaled {
            q,
            scales: _mm_cvtsi64_si128(scales),
            mins: _mm_cvtepu8_epi16(_mm_cvtsi64_si128(mins)),
            d: half(w),
            d_min: half(w.add(2)),
        }
    }
}

macro_rules! with_mins {
    ($name:ident, $bytes:expr, |$w:ident| $decode:expr) => {
        struct $name;

        impl Format for $name {
            const N: usize = 256;
            const BYTES: usize = $bytes;
            const GGML_ACT_BYTES: usize = Q8_K_BYTES;
            type Act = Super;
            type Weights = Scaled;

            #[inline]
            #[target_feature(enable = "avx2,fma,f16c")]
            unsafe fn prepare(act: *const u8) -> Super {
                // SAFETY: passed on.
                let mut act = unsafe { Super::new(act) };
                let pairs = pairs(act.sums);
                let sums =
                    _mm_packs_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256::<1>(pairs));
                act.sums = _mm256_zextsi128_si256(sums);
                act
            }

            #[inline]
            #[target_feature(enable = "avx2,fma,f16c")]
            unsafe fn decode($w: *const u8) -> Scaled {
                // SAFETY: passed on.
                unsafe { decode_q45_k($w, $decode) }
            }

            #[inline]
            #[target_feature(enable = "avx2,fma,f16c")]
            unsafe fn dot(w: &Scaled, act: &Super, sum: Sum) -> Sum {
                let products = _mm256_cvtepi32_ps(scaled(w, &BY_32, act));
                let sum = sum.add(products, _mm256_set1_ps(w.d * act.scale));
                let mins = _mm_cvtepi32_ps(_mm_madd_epi16(w.mins, _mm256_castsi256_si128(act.sums)));
                Sum { mins: _mm_fmadd_ps(mins, _mm_set1_ps(w.d_min * act.scale), sum.mins), ..sum }
            }
        }
    };
}

/// Before the weights of q4_K, and before the high bits of those of q5_K.
const HEAD: usize = 2 + 2 + 12;

with_mins!(Q4K, HEAD + 128, |w| {
    let [a, b] = nibbles(load(w.add(HEAD)));
    let [c, d] = nibbles(load(w.add(HEAD + 32)));
    let [e, f] = nibbles(load(w.add(HEAD + 64)));
    let [g, h] = nibbles(load(w.add(HEAD + 96)));
    [a, b, c, d, e, f, g, h]
});

/// Bit `BIT` of each byte as its fifth.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn fifth<const BIT: i32>(high: __m256i) -> __m256i {
    let bit = _mm256_and_si256(_mm256_srli_epi16::<BIT>(high), _mm256_set1_epi8(1));
    _mm256_slli_epi16::<4>(bit)
}

with_mins!(Q5K, HEAD + 32 + 128, |w| {
    // bit i of byte k: the fifth of weight 32 * i + k
    let high = load(w.add(HEAD));
    let at = w.add(HEAD + 32);
    let [a, b] = nibbles(load(at));
    let [c, d] = nibbles(load(at.add(32)));
    let [e, f] = nibbles(load(at.add(64)));
    let [g, h] = nibbles(load(at.add(96)));
    [
        _mm256_or_si256(a, fifth::<0>(high)),
        _mm256_or_si256(b, fifth::<1>(high)),
        _mm256_or_si256(c, fifth::<2>(high)),
        _mm256_or_si256(d, fifth::<3>(high)),
        _mm256_or_si256(e, fifth::<4>(high)),
        _mm256_or_si256(f, fifth::<5>(high)),
        _mm256_or_si256(g, fifth::<6>(high)),
        _mm256_or_si256(h, fifth::<7>(high)),
    ]
});

struct Q6K;

/// 128 weights of q6_K: low nibbles of 64 bytes, then their high ones; the two bits above them of weight k of each
/// 32 in byte k, from the lowest up.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn half_of_q6_k(low: *const u8, high: *const u8) -> [__m256i; 4] {
    // SAFETY: the caller has 64 and 32 bytes.
    let (x, y, high) = unsafe { (load(low), load(low.add(32)), load(high)) };
    let two_bits = |x| _mm256_and_si256(x, _mm256_set1_epi8(0x30));
    let [a, c] = nibbles(x);
    let [b, d] = nibbles(y);
    [
        _mm256_or_si256(a, two_bits(_mm256_slli_epi16::<4>(high))),
        _mm256_or_si256(b, two_bits(_mm256_slli_epi16::<2>(high))),
        _mm256_or_si256(c, two_bits(high)),
        _mm256_or_si256(d, two_bits(_mm256_srli_epi16::<2>(high))),
    ]
}

impl Format for Q6K {
    const N: usize = 256;
    const BYTES: usize = 128 + 64 + 16 + 2;
    const GGML_ACT_BYTES: usize = Q8_K_BYTES;
    type Act = Super;
    type Weights = Scaled;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn prepare(act: *const u8) -> Super {
        // SAFETY: passed on.
        unsafe { Super::new(act) }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn decode(w: *const u8) -> Scaled {
        // SAFETY: the caller has a block.
        unsafe {
            let [a, b, c, d] = half_of_q6_k(w, w.add(128));
            let [e, f, g, h] = half_of_q6_k(w.add(64), w.add(128 + 32));
            Scaled {
                q: [a, b, c, d, e, f, g, h],
                scales: _mm_loadu_si128(w.add(128 + 64).cast()),
                mins: _mm_setzero_si128(),
                d: half(w.add(128 + 64 + 16)),
                d_min: 0.0,
            }
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn dot(w: &Scaled, act: &Super, sum: Sum) -> Sum {
        // weights are 32 less than their bits say
        let less = _mm256_slli_epi32::<5>(_mm256_madd_epi16(_mm256_cvtepi8_epi16(w.scales), act.sums));
        let products = _mm256_sub_epi32(scaled(w, &BY_16, act), less);
        sum.add(_mm256_cvtepi32_ps(products), _mm256_set1_ps(w.d * act.scale))
    }
}

struct Iq4Xs;

/// As `TwoBlocks`, four times two sub-blocks of 32.
#[repr(C, align(64))]
struct EightBlocks {
    q: [[__m256i; 2]; 4],
    scale: f32,
}

struct SubBlocks {
    q: [[__m256i; 2]; 4],
    /// Of each sub-block, whole numbers.
    scale: [__m256; 4],
    d: f32,
}

impl Format for Iq4Xs {
    const N: usize = 256;
    const BYTES: usize = 2 + 2 + 4 + 128;
    const GGML_ACT_BYTES: usize = Q8_K_BYTES;
    type Act = EightBlocks;
    type Weights = SubBlocks;

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn prepare(act: *const u8) -> EightBlocks {
        // SAFETY: the caller has a block.
        unsafe {
            let mut q = [[_mm256_setzero_si256(); 2]; 4];
            for (i, q) in q.iter_mut().enumerate() {
                let at = act.add(4 + i * 64);
                *q = [pieces::<32>(at), pieces::<32>(at.add(16))];
            }
            EightBlocks { q, scale: act.cast::<f32>().read_unaligned() }
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn decode(w: *const u8) -> SubBlocks {
        const LOW: [i32; 8] = spread([0, 4]);
        const HIGH: [i32; 8] = spread([0, 2]);
        // SAFETY: the caller has a block.
        unsafe {
            // of a sub-block's scale, four bits and two bits more
            let low = _mm256_set1_epi32(w.add(4).cast::<i32>().read_unaligned());
            let high = _mm256_set1_epi32(i32::from(w.add(2).cast::<u16>().read_unaligned()) << 4);
            let (by_low, by_high) = (load(LOW.as_ptr().cast()), load(HIGH.as_ptr().cast()));
            let mut q = [[_mm256_setzero_si256(); 2]; 4];
            let mut scale = [_mm256_setzero_ps(); 4];
            for i in 0..4 {
                q[i] = values(&IQ4_VALUES, nibbles(load(w.add(8 + i * 32))));
                let n = i as i32;
                let low = _mm256_srlv_epi32(low, _mm256_add_epi32(by_low, _mm256_set1_epi32(8 * n)));
                let high = _mm256_srlv_epi32(high, _mm256_add_epi32(by_high, _mm256_set1_epi32(4 * n)));
                let bits = _mm256_or_si256(
                    _mm256_and_si256(low, _mm256_set1_epi32(0x0f)),
                    _mm256_and_si256(high, _mm256_set1_epi32(0x30)),
                );
                scale[i] = _mm256_cvtepi32_ps(_mm256_sub_epi32(bits, _mm256_set1_epi32(32)));
            }
            SubBlocks { q, scale, d: half(w) }
        }
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn dot(w: &SubBlocks, act: &EightBlocks, sum: Sum) -> Sum {
        // whole numbers up to 2^24 are exact
        let mut all = _mm256_setzero_ps();
        for i in 0..4 {
            let products = _mm256_add_epi32(
                signed_products(w.q[i][0], act.q[i][0]),
                signed_products(w.q[i][1], act.q[i][1]),
            );
            all = _mm256_fmadd_ps(_mm256_cvtepi32_ps(products), w.scale[i], all);
        }
        sum.add(all, _mm256_set1_ps(w.d * act.scale))
    }
}
